"""rDPO with a tabular policy: how good is what is learnt from preferences of which three in ten are flipped?

200 prompts with 8 answers each, whose true rewards are normal; 2000 pairs, ordered by the Bradley-Terry model of the rewards,
then 30 % of the labels flipped. DPO, cDPO and rDPO descend along the full gradient from the uniform policy, which is the
reference, until they are equally far from it, and all see the same pairs. DPO on the labels before the flips shows what
could be had. No model and no trainer: the stack's own loss on responses of one token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from claims import Claim, report
from torch import Tensor

from rlplugins.pairs import SIDES
from rlplugins.steps import generator
from rlplugins.testing import start
from rlplugins.testing.pairs import make_pairs

PROMPTS, ANSWERS, PAIRS, FLIPPED = 200, 8, 2000, 0.3
BETA, DISTANCE, RATE, STEPS = 1.0, 0.5, 100.0, 3000

CLAIM = Claim(
    plugin="rdpo",
    found="Trained on flipped labels rDPO is better than DPO and than label smoothing.",
    measured="mean true reward of the policy at a KL divergence of 0.5 nats from the reference (or where it stops before), in "
    "standard deviations of the rewards, with 30 % of 2000 labels flipped; the reference row is DPO on the same labels",
    expected="above",
    note="Where only the direction of the first gradients matters, the three losses are the same but for a factor.",
)

STACKS: dict[str, tuple[list[Any], Any]] = {
    "dpo": ([], {"dpo": {"beta": BETA}}),
    "cdpo": ([], {"cdpo": {"beta": BETA, "label_smoothing": FLIPPED}}),
    "rdpo": ([{"rdpo": {"beta": BETA, "eps": FLIPPED}}], None),
    "dpo, clean labels": ([], {"dpo": {"beta": BETA}}),
}
"""Plugins and the loss that owns where none does."""


def learn(name: str, prompt: Tensor, answers: dict[str, Tensor], steps: int) -> Tensor:
    """Log-probs (PROMPTS, ANSWERS) of the policy at the fixed distance, or after so many steps."""
    plugins, loss = STACKS[name]
    stack = start(plugins, owners={} if loss is None else {"preference_loss": loss})
    logits = torch.zeros(PROMPTS, ANSWERS, requires_grad=True)
    even = torch.full((len(prompt), 1), -math.log(ANSWERS))
    columns = stack.pair_columns(make_pairs([1] * len(prompt), [1] * len(prompt)))
    columns |= {f"{side}_ref_log_probs": even for side in SIDES}
    for _ in range(steps):
        log_probs = logits.log_softmax(1)
        far = (log_probs.exp() * log_probs).sum(1).mean() + math.log(ANSWERS)
        if float(far.detach()) >= DISTANCE:
            break
        mini = stack.pair_mini_batch(columns, {})
        taken = (log_probs[prompt, answers[side]][:, None] for side in SIDES)
        (gradient,) = torch.autograd.grad(mini.loss(*taken).total, logits)
        with torch.no_grad():
            logits -= RATE * gradient
    return logits.detach().log_softmax(1)


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """The true reward of every variant."""
    source = generator(seed, "rdpo", "claim")
    rewards = torch.randn(PROMPTS, ANSWERS, generator=source)
    prompt = torch.randint(0, PROMPTS, (PAIRS,), generator=source)
    both = torch.rand(PAIRS, ANSWERS, generator=source).argsort(1)[:, :2]
    gap = rewards[prompt].gather(1, both).diff(dim=1)[:, 0]
    second = torch.rand(PAIRS, generator=source) < torch.sigmoid(gap)
    flipped = torch.rand(PAIRS, generator=source) < FLIPPED
    found = {}
    for name in STACKS:
        wins = (second if "clean" in name else second ^ flipped).long()[:, None]
        answers = {"chosen": both.gather(1, wins)[:, 0], "rejected": both.gather(1, 1 - wins)[:, 0]}
        policy = learn(name, prompt, answers, 20 if smoke else STEPS).exp()
        found[name] = float((policy * rewards).sum(1).mean())
    return found


if __name__ == "__main__":
    report(CLAIM, measure, seeds=10)
