"""Knapsack on 200 Bernoulli prompts: what does it gain to spend the same rollouts where they teach most?

A prompt is a logit of success; rates start from Beta(1/2, 1/2), so that many are near 0 or 1. Every step visits all
prompts with 1,600 rollouts and makes one gradient step on the stack's loss with GRPO's advantages.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from claims import Claim, interval, report
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlplugins import ops
from rlplugins.testing import make_pool, make_rollouts, start

PROMPTS, GROUP, STEPS = 200, 8, 50
LEARNING_RATE = 40.0  # a prompt with a rate of 1/2 and 8 rollouts moves by 0.1 in a step
EDGE = 1e-3  # rates begin at least so far from 0 and 1
STACKS: dict[str, list[Any]] = {"equal groups of 8": ["grpo"], "knapsack": ["grpo", "knapsack"]}
MIXED: dict[str, list[float]] = defaultdict(list)
CLAIM = Claim(
    plugin="knapsack",
    found="Qwen models on mathematics: 20 to 40 % more gradients that are not zero, 2 to 4 points higher on average, about "
    "what uniform allocation reaches with twice the rollouts.",
    measured="mean success rate after 50 steps of 1,600 rollouts on 200 Bernoulli prompts with rates from Beta(1/2, 1/2)",
    expected="above",
    note="Rollouts in groups with both outcomes: 74 % against 52 %.",
)


def train(variant: str, seed: int, steps: int) -> tuple[float, float]:
    """Mean success rate at the end, and the share of rollouts that were in a group with both outcomes."""
    source = torch.Generator().manual_seed(seed)
    rates = np.random.default_rng(seed).beta(0.5, 0.5, PROMPTS).clip(EDGE, 1 - EDGE)
    logits = torch.logit(torch.tensor(rates, dtype=torch.float32)).requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=LEARNING_RATE)
    pool = make_pool(PROMPTS)
    budget = PROMPTS * GROUP
    stack = start(STACKS[variant], pool=pool, total_steps=steps, group_size=GROUP, budget=budget, seed=seed)
    mixed = []
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        prompts = torch.repeat_interleave(torch.arange(PROMPTS), stack.allocate_rollouts(pool, budget))
        outcome = torch.bernoulli(torch.sigmoid(logits.detach())[prompts], generator=source)
        log_probs = outcome_log_probs(logits[prompts], outcome)
        rollouts = make_rollouts(outcome, prompts, tokens=1, pool=pool, old_log_probs=log_probs.detach())
        credit = stack.credit(rollouts)
        optimiser.zero_grad()
        stack.mini_batch(stack.update_columns(rollouts, credit)).loss(log_probs).total.backward()
        optimiser.step()
        stack.end_step(rollouts, credit)
        mixed.append(float((ops.group_std(rollouts.scores, prompts) > 0).float().mean()))
    return float(torch.sigmoid(logits.detach()).mean()), float(np.mean(mixed))


def outcome_log_probs(logits: Tensor, outcome: Tensor) -> Tensor:
    """Log-probs (B, 1) of the outcomes (B,), 1 or 0."""
    return logsigmoid(torch.where(outcome > 0, logits, -logits))[:, None]


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """The success rate of each variant; the shares of useful rollouts are kept beside."""
    found = {}
    for variant in STACKS:
        found[variant], mixed = train(variant, seed, 3 if smoke else STEPS)
        MIXED[variant].append(mixed)
    return found


if __name__ == "__main__":
    report(CLAIM, measure)
    print("share of rollouts in groups with both outcomes:")
    for variant, values in MIXED.items():
        mean, width = interval(np.array(values))
        print(f"  {variant:28} {mean:10.4g} ± {width:.2g}")
