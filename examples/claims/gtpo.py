"""GTPO on a table that says a tag and then an answer: does the tag survive when most answers are wrong?

A response has four tokens: an opening tag, the answer, filler, and a closing tag. The policy is a table of logits by
position. Tags are right in most draws; the answer is one of 20, and one of them is rewarded, whatever the tags are. Every
batch is used for four updates. All stacks have GTPO's scale (none) and reduction, so that gradients are comparable.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from claims import Claim, interval, report
from torch import Tensor

from rlplugins.testing import make_rollouts, start

POSITIONS, WORDS = 4, 20
TAGS = (0, 3)  # positions of the tags, which are word 0
SURE = 4.5  # logit of a tag at the start: about 0.83
PROMPTS, GROUP, STEPS, EPOCHS = 8, 8, 100, 4
LEARNING_RATE = 0.05
STACKS: dict[str, dict[str, Any]] = {
    "GRPO": {"plugins": ["dr_grpo"], "owners": {"reduce_loss": "sequence_mean"}},
    "GTPO": {"plugins": ["gtpo"]},
    "GTPO, no entropy terms": {"plugins": [{"gtpo": {"gamma": 0.0, "entropy_threshold": float("inf")}}]},
}
BESIDE: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
CLAIM = Claim(
    plugin="gtpo",
    found="More stable accuracy and format scores than GRPO on GSM8K, MATH and AIME24, without a reference model: tokens that "
    "rewarded and penalised responses share are no longer pushed down.",
    measured="lowest probability of the tags during 100 steps of four updates each, on a table of tagged answers of which one "
    "in 20 is right at the start",
    expected="above",
    note="Right answers at the end are the same, 98 %, and the mean entropy is lower under GTPO: 0.98 against 1.27 nats.",
)


def train(variant: str, seed: int, steps: int) -> dict[str, float]:
    """The tags' lowest probability; at the end the answer's success rate and the mean entropy in nats."""
    logits = torch.zeros((POSITIONS, WORDS))
    logits[list(TAGS), 0] = SURE
    logits.requires_grad_()
    source = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD([logits], lr=LEARNING_RATE)
    options = dict(STACKS[variant])
    stack = start(options.pop("plugins"), total_steps=steps, group_size=GROUP, seed=seed, **options)
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    lowest = 1.0
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        policy = torch.softmax(logits.detach(), 1)
        words = torch.multinomial(policy, len(prompts), replacement=True, generator=source).T
        entropy = torch.special.entr(policy).sum(1).expand(len(prompts), -1)
        reward = 20.0 * (words[:, 1] == 0)
        rollouts = make_rollouts(reward, prompts, tokens=POSITIONS, responses=words, entropy=entropy,
                                 old_log_probs=chosen(logits, words).detach())  # fmt: skip
        credit = stack.credit(rollouts)
        for _ in range(EPOCHS):
            log_probs = chosen(logits, words)
            optimiser.zero_grad()
            stack.mini_batch(stack.update_columns(rollouts, credit)).loss(log_probs).total.backward()
            optimiser.step()
            lowest = min(lowest, float(torch.softmax(logits.detach(), 1)[list(TAGS), 0].mean()))
        stack.end_step(rollouts, credit)
    p = torch.softmax(logits.detach(), 1)
    return {"tags": lowest, "right answers": float(p[1, 0]), "entropy": float(torch.special.entr(p).sum(1).mean())}


def chosen(logits: Tensor, words: Tensor) -> Tensor:
    """Log-probs (B, POSITIONS) of the words (B, POSITIONS)."""
    return torch.log_softmax(logits, 1).expand(len(words), -1, -1).gather(2, words[:, :, None]).squeeze(2)


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """The tags' lowest probability under each variant; the rest is kept beside."""
    found = {}
    for variant in STACKS:
        values = train(variant, seed, 3 if smoke else STEPS)
        found[variant] = values.pop("tags")
        for name, value in values.items():
            BESIDE[name][variant].append(value)
    return found


if __name__ == "__main__":
    report(CLAIM, measure)
    for name, variants in BESIDE.items():
        print(f"{name} at the end:")
        for variant, values in variants.items():
            mean, width = interval(np.array(values))
            print(f"  {variant:28} {mean:10.4g} ± {width:.2g}")
