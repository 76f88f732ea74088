"""AEPO on a softmax bandit: does the entropy stay near its target?

The policy chooses one of 50 arms, of which 5 are correct; every prompt is this bandit. One score in ten is wrong: with a
faultless one all responses are soon correct, no advantage is left, and nothing moves any more, with or without AEPO. GRPO
alone, and with AEPO for two targets. No model and no trainer: the stack's own credit, loss and gradient on responses of
one token. The learning rate is one at which GRPO alone loses its entropy within the run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from claims import Claim, report
from torch import Tensor

from rlplugins.rollouts import Requests, Rollouts, Sampling
from rlplugins.steps import generator
from rlplugins.testing import make_pool, make_rollouts, start

ARMS, CORRECT, ERRORS = 50, 5, 0.1
PROMPTS, GROUP = 16, 8
TARGETS = (0.5, 1.0)
STEPS, LAST = 400, 100
LEARNING_RATE = 0.2

CLAIM = Claim(
    plugin="aepo",
    found="With AEPO the measured entropy follows its target, for several targets; under GRPO it collapses.",
    measured="mean distance of the policy's entropy from the targets 0.5 and 1.0 over the last 100 of 400 steps, in nats, "
    "on a softmax bandit with 50 arms of which 5 are correct and one score in ten is wrong",
    expected="below",
)


class Bandit:
    """The policy, and the engine that draws from it.

    Attributes:
        logits: (ARMS,), trained.
        source: random numbers.
    """

    def __init__(self, seed: int) -> None:
        self.logits = torch.zeros(ARMS, requires_grad=True)
        self.source = generator(seed, "aepo", "bandit")

    def sampling(self, rows: int) -> Sampling:
        """Temperature 1."""
        return Sampling.of(rows, 1.0, 1)

    def generate(self, requests: Requests, sampling: Sampling | None = None, **_: Any) -> Rollouts:
        """One arm per request; the first arms are the correct ones, and some scores are wrong."""
        sampling = sampling or self.sampling(len(requests))
        with torch.no_grad():
            chances = torch.softmax(self.logits / sampling.temperature[:, None], 1)
            arm = torch.multinomial(chances, 1, generator=self.source)
            log_probs = self.log_probs(arm)
        right = (arm < CORRECT).float()
        wrong = torch.rand(right.shape, generator=self.source) < ERRORS
        made = make_rollouts((right - wrong.float()).abs(), requests.prompt, tokens=1, pool=requests.prompts)
        return replace(made, responses=arm, old_log_probs=log_probs)

    def log_probs(self, arms: Tensor) -> Tensor:
        """Log-probs (B, 1) at temperature 1."""
        return torch.log_softmax(self.logits, 0)[arms]

    def entropy(self) -> float:
        """Of the policy at temperature 1."""
        return float(torch.distributions.Categorical(logits=self.logits.detach()).entropy())


def train(plugins: list[Any], seed: int, steps: int) -> list[float]:
    """The policy's entropy after every step."""
    bandit, pool = Bandit(seed), make_pool(PROMPTS)
    stack = start(plugins, pool=pool, total_steps=steps, group_size=GROUP, budget=PROMPTS * GROUP, seed=seed)
    optimiser = torch.optim.Adam([bandit.logits], lr=LEARNING_RATE)
    requests = Requests.of(pool, torch.full((PROMPTS,), GROUP))
    found = []
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        rollouts = stack.extend_rollouts(bandit.generate(requests), bandit)
        made = stack.credit(rollouts)
        mini = stack.mini_batch(stack.update_columns(rollouts, made), kinds=rollouts.kinds)
        optimiser.zero_grad()
        mini.loss(bandit.log_probs(rollouts.responses)).total.backward()
        optimiser.step()
        stack.end_step(rollouts, made)
        found.append(bandit.entropy())
    return found


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """Mean distance from the targets."""
    steps, last = (20, 5) if smoke else (STEPS, LAST)
    alone = torch.tensor(train(["grpo"], seed, steps)[-last:])
    held = [torch.tensor(train(["grpo", {"aepo": {"H": target}}], seed, steps)[-last:]) for target in TARGETS]
    return {
        "GRPO": float(torch.stack([(alone - target).abs().mean() for target in TARGETS]).mean()),
        "GRPO + AEPO": float(
            torch.stack([(late - target).abs().mean() for late, target in zip(held, TARGETS, strict=True)]).mean()
        ),
    }


if __name__ == "__main__":
    report(CLAIM, measure)
