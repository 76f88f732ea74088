"""HBPO on tasks that need responses of known lengths: does the chosen length follow the need?

A response is right if it is at least as long as its task needs, and lengths are 1 to 32 tokens (128 times fewer than the
paper's). The policy first names a budget, then takes a length near it; its tables have a part that all tasks share, so
that what is learnt on easy tasks spreads to hard ones. It begins with long responses. Under HBPO the budgets are forced and
trained, as the first token; under the plain penalty the policy names them itself, and a right response earns the cosine of
its length. Both are judged as they respond when nothing is forced.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from claims import Claim, interval, report
from torch import Tensor

from rlplugins import Plugin, hookimpl, ops
from rlplugins.rollouts import Requests
from rlplugins.steps import generator
from rlplugins.testing import make_pool, make_rollouts, start

L, BUDGETS, BETA = 32, (4, 8, 16, 20), 4.0
NEEDS = (2, 6, 12, 18)
TASKS, GROUP, STEPS = 16, 16, 300
LEARNING_RATE = 0.05
SPREAD = 3.0  # how closely a length follows the budget at first, in tokens
FOUND: dict[str, list[list[float]]] = {}
CLAIM = Claim(
    plugin="hbpo",
    found="DeepScaleR-1.5B: the baseline's accuracy, 63.7, with 2,364 instead of 4,744 tokens, from 790 on easy to 3,988 on "
    "hard sets; a length penalty alone shortens everything.",
    measured="slope of the chosen length over the needed one after 300 steps on 16 tasks that need 2 to 18 tokens (1: follows "
    "the need, 0: the same for all)",
    expected="above",
    note="The length follows the need under HBPO, but under the cosine alone it does so too: with a table for each task its "
    "best length is the needed one, and nothing collapses. Under HBPO tasks that need 2 tokens get 6.",
)


class Cosine(Plugin):
    """The plain length penalty: a right response earns the cosine of its length."""

    name = "cosine"

    @hookimpl
    def combine_rewards(self, scores: Tensor, mask: Tensor) -> Tensor:
        """beta cos(pi n / 2L) where right, else 0."""
        return torch.where(scores > 0, BETA * torch.cos(math.pi * ops.lengths(mask) / (2 * L)), 0.0)


class Speaker:
    """The policy: a budget, then a length.

    Attributes:
        tables: logits that all tasks share and logits of each task, for budgets and for lengths; trained.
        source: random numbers.
    """

    def __init__(self, seed: int) -> None:
        self.source = generator(seed, "hbpo", "speaker")
        sizes = [(len(BUDGETS),), (TASKS, len(BUDGETS)), (L,), (TASKS, L)]
        self.tables = [torch.zeros(size) for size in sizes]
        self.tables[0][-1] = 2.0  # long responses at first
        for table in self.tables:
            table.requires_grad_()
        near = torch.arange(1, L + 1) - torch.tensor(BUDGETS)[:, None]
        self.following = -0.5 * (near / SPREAD).square()

    def log_policy(self, task: Tensor, budget: Tensor | None = None) -> Tensor:
        """Log-probs of the budgets, or of the lengths after a budget (by its place), one row per task."""
        if budget is None:
            return torch.log_softmax(self.tables[0] + self.tables[1][task], 1)
        return torch.log_softmax(self.tables[2] + self.tables[3][task] + self.following[budget], 1)

    def draw(self, log_policy: Tensor) -> Tensor:
        """One choice per row."""
        return torch.multinomial(log_policy.detach().exp(), 1, generator=self.source).flatten()

    def log_probs(self, task: Tensor, budget: Tensor, length: Tensor, mask: Tensor) -> Tensor:
        """Log-probs (B, L): the budget is the first token, the length is settled at the second, nothing else is."""
        first = self.log_policy(task).gather(1, budget[:, None])
        second = self.log_policy(task, budget).gather(1, length[:, None] - 1)
        return torch.cat([first, second, torch.zeros((len(task), L - 2))], 1) * mask

    def natural_lengths(self) -> Tensor:
        """Expected length of each task when nothing is forced, (TASKS,)."""
        with torch.no_grad():
            task = torch.arange(TASKS)
            lengths = torch.arange(1.0, L + 1)
            means = [
                self.log_policy(task, torch.full_like(task, place)).exp() @ lengths for place in range(len(BUDGETS))
            ]
            return (self.log_policy(task).exp() * torch.stack(means, 1)).sum(1)


def train(plugins: list[Any], seed: int, steps: int) -> Tensor:
    """The lengths at the end, when nothing is forced."""
    speaker, pool = Speaker(seed), make_pool(TASKS)
    needed = torch.tensor(NEEDS).repeat(TASKS // len(NEEDS))
    stack = start(plugins, pool=pool, total_steps=steps, group_size=GROUP, budget=TASKS * GROUP, seed=seed)
    optimiser = torch.optim.Adam(speaker.tables, lr=LEARNING_RATE)
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        requests = stack.rewrite_prompts(Requests.of(pool, torch.full((TASKS,), GROUP)))
        task = requests.prompt
        if "budget" in requests.columns:
            budget = torch.searchsorted(torch.tensor(BUDGETS), requests.columns["budget"]).flatten()
        else:
            budget = speaker.draw(speaker.log_policy(task))
        length = speaker.draw(speaker.log_policy(task, budget)) + 1
        mask = torch.arange(L) < length[:, None].clamp(min=2)
        log_probs = speaker.log_probs(task, budget, length, mask)
        rollouts = make_rollouts((length >= needed[task]).float(), task, mask=mask, columns=requests.columns)
        rollouts = replace(rollouts, old_log_probs=log_probs.detach())
        made = stack.credit(rollouts)
        optimiser.zero_grad()
        stack.mini_batch(stack.update_columns(rollouts, made)).loss(log_probs).total.backward()
        optimiser.step()
        stack.end_step(rollouts, made)
    return speaker.natural_lengths()


STACKS: dict[str, list[Any]] = {
    "GRPO, cosine of the length": ["grpo", Cosine()],
    "GRPO + HBPO": ["grpo", {"hbpo": {"budgets": BUDGETS, "L": L, "alpha": 1 / L, "beta": BETA}}],
}


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """The slope of each variant; the lengths by need are kept beside."""
    found = {}
    needed = torch.tensor(NEEDS, dtype=torch.float32)
    for name, plugins in STACKS.items():
        lengths = train(plugins, seed, 20 if smoke else STEPS).view(-1, len(NEEDS)).mean(0)
        centred = needed - needed.mean()
        found[name] = float((centred * lengths).sum() / centred.square().sum())
        FOUND.setdefault(name, []).append(lengths.tolist())
    return found


if __name__ == "__main__":
    report(CLAIM, measure, seeds=6)
    print(f"chosen lengths where {', '.join(map(str, NEEDS))} tokens are needed:")
    for name, rows in FOUND.items():
        means = [interval(torch.tensor(column).numpy()) for column in zip(*rows, strict=True)]
        print(f"  {name:28} {'  '.join(f'{mean:.1f} ± {width:.1f}' for mean, width in means)}")
