"""BAPO on a softmax bandit trained from stale batches: does the policy keep its entropy?

The policy chooses one of 50 arms, of which 10 are correct and unlikely at the start. Every update uses responses that were
drawn 8 updates ago. As in language models a failed response is longer: three more tokens follow a wrong arm, so that tokens
with a negative advantage dominate, which is BAPO's premise (where they do not, its search never starts). A fixed clip range
is compared with the search, in the configuration of the authors' code and with the values of the paper. No model and no
trainer: the stack's own credit, loss and gradient.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import torch
from claims import Claim, interval, report
from torch import Tensor

from rlplugins.testing import make_rollouts, start

ARMS, CORRECT, UNLIKELY = 50, 10, 2.0
TOKENS = 4  # of a failed response
PROMPTS, GROUP = 16, 8
STALE, UPDATES = 8, 200
LEARNING_RATE = 0.05
DUAL_CLIP = {"policy_loss": {"ppo_clip": {"dual_clip": 3.0}}}
STACKS: dict[str, list[Any]] = {
    "fixed clip range": ["grpo"],
    "BAPO": ["grpo", "bapo"],
    "BAPO, paper's values": ["grpo", {"bapo": {"preset": "paper"}}],
}
SUCCESS: dict[str, list[float]] = defaultdict(list)
CLAIM = Claim(
    plugin="bapo",
    found="AIME 2024 and 2025: 87.1 and 80.0 against 84.6 and 78.8 of GRPO (32B), with stale data; fixed clipping loses "
    "entropy, adaptive clipping keeps it.",
    measured="entropy of the policy, in nats, after 200 updates from batches that are 8 updates old, on a softmax bandit with "
    "50 arms of which 10 are correct; failed responses have four tokens, the others one",
    expected="above",
    note="With responses of one token, where negative tokens do not dominate, the search never started and nothing came out.",
)


def train(variant: str, seed: int, updates: int) -> tuple[float, float]:
    """Entropy of the arms and success rate at the end."""
    logits = torch.zeros((TOKENS, ARMS))
    logits[0, :CORRECT] -= UNLIKELY
    logits.requires_grad_()
    source = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam([logits], lr=LEARNING_RATE)
    stack = start(STACKS[variant], total_steps=updates, group_size=GROUP, seed=seed, owners=DUAL_CLIP)
    waiting: deque[tuple[Tensor, Tensor]] = deque()
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    for number in range(updates + STALE):
        chances = torch.softmax(logits.detach(), 1)
        words = torch.multinomial(chances, len(prompts), replacement=True, generator=source).T
        waiting.append((words, chosen(logits.detach(), words)))
        if number < STALE:
            continue
        words, old = waiting.popleft()
        stack.begin_step(number - STALE, updates, seed)
        right = words[:, 0] < CORRECT
        lengths = torch.where(right, 1, TOKENS)
        mask = torch.arange(TOKENS) < lengths[:, None]
        rollouts = make_rollouts(right.float(), prompts, mask=mask, responses=words * mask, old_log_probs=old * mask)
        credit = stack.credit(rollouts)
        log_probs = chosen(logits, words) * mask
        mini = stack.mini_batch(stack.update_columns(rollouts, credit), log_probs=log_probs)
        optimiser.zero_grad()
        mini.loss(log_probs).total.backward()
        optimiser.step()
        stack.end_step(rollouts, credit)
    p = torch.softmax(logits.detach()[0], 0)
    return float(torch.special.entr(p).sum()), float(p[:CORRECT].sum())


def chosen(logits: Tensor, words: Tensor) -> Tensor:
    """Log-probs (B, TOKENS) of the words (B, TOKENS)."""
    return torch.log_softmax(logits, 1).expand(len(words), -1, -1).gather(2, words[:, :, None]).squeeze(2)


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """The entropy of each variant; success rates are kept beside."""
    found = {}
    for variant in STACKS:
        found[variant], success = train(variant, seed, 5 if smoke else UPDATES)
        SUCCESS[variant].append(success)
    return found


if __name__ == "__main__":
    report(CLAIM, measure)
    print("success rate at the end:")
    for variant, values in SUCCESS.items():
        mean, width = interval(np.array(values))
        print(f"  {variant:28} {mean:10.4g} ± {width:.2g}")
