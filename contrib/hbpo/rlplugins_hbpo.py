"""HBPO: Hierarchical Budget Policy Optimization for Adaptive Reasoning (arXiv 2507.15844).

Reward, advantage, budgets and constants from the paper's text and the official code, ZJU-REAL/HBPO,
`rllm/rewards/math_reward.py` and `verl/trainer/ppo/core_algos.py`. A response of n tokens was asked to take b.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import HookError
from rlplugins.needs import Need
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import Columns, Requests, Rollouts

BUDGET = "budget"
"""Column of the rollouts, (B, 1) int64."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Hbpo(Plugin):
    """Asks for responses of several lengths in each group, so that the policy learns which length a prompt needs.

    Hierarchical Budget Policy Optimization (arXiv 2507.15844): every sub-group begins its responses with its own token
    budget, is paid by how well it keeps it, and is compared with the best that its budget can earn.
    """

    name = "hbpo"
    assumes = frozenset({"absolute_advantages", "response_rewards"})
    breaks = frozenset({"unit_rewards"})

    budgets: tuple[Annotated[int, Field(ge=1)], ...] = (512, 1024, 2048, 2560)
    """Token budgets b, ascending; a prompt's responses are shared out among them in this order."""
    L: Annotated[int, Field(ge=1)] = 4096
    """Largest length of a response that can be right, and the scale of the cosine."""
    beta: NonNegative = 4.0
    """Largest reward."""
    alpha: NonNegative = 1 / 4096
    """Cost of every token that a response is away from its budget."""
    mode: Literal["min", "piecewise"] = "min"
    """Inside of the budget pay the lesser of f1 and f2 (released), or f2 (paper)."""
    intra_weight: NonNegative = 1.0
    """Factor on the advantage of the sub-group; the released code adds it twice."""
    wrong_reward: Finite = 0.0
    """Reward of a wrong or overlong response."""
    format_reward: Finite = 0.0
    """Reward of a response without the wanted form; -1 in the released code."""
    format_component: str | None = None
    """Component of the score that is 0 without the wanted form; None: the form is not looked at (paper)."""
    correct_component: str | None = None
    """Component of the score that says whether a response is right; None: the score itself."""
    correct_above: Finite = 0.5
    """A response is right if that number is above this."""
    prefix: str = "I will answer the question with {budget} tokens"
    """Beginning of the response; put the think tag in front unless the chat template opens it."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Distance of the lower bound of the ratio from 1."""
    clip_high: NonNegative = 0.28
    """Distance of the upper bound of the ratio from 1."""

    @property
    def uses(self) -> dict[str, BuiltinName]:
        """The bounds of the ratio."""
        return {"clip_range": {"fixed": {"low": self.clip_low, "high": self.clip_high}}}

    @property
    def needs(self) -> tuple[Need, ...]:
        """Groups, forced prefixes, and components where some are named."""
        parts = (needs.column("components"),) if self.format_component or self.correct_component else ()
        return (needs.group_size(at_least=2), needs.RESPONSE_PREFIX, *parts)

    @model_validator(mode="after")
    def _check(self) -> Hbpo:
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets must ascend, got {list(self.budgets)}")
        if self.budgets[-1] > self.L:
            raise ValueError(f"the budget {self.budgets[-1]} is above L {self.L}")
        if self.format_reward != 0 and self.format_component is None:
            raise ValueError("format_reward needs format_component, the component that looks at the form")
        if self.prefix.replace("{budget}", "").count("{") or "{budget}" not in self.prefix:
            raise ValueError("prefix must hold {budget}, and nothing else in braces")
        return self

    @hookimpl
    def rewrite_prompts(self, requests: Requests) -> Requests:
        """Force the sentence with its budget on every response."""
        counts = torch.bincount(requests.prompt)[requests.prompt] if len(requests) else requests.prompt
        budget = torch.tensor(self.budgets)[shares(requests.draw, counts, len(self.budgets))]
        texts = {value: self.prefix.replace("{budget}", str(value)) for value in self.budgets}
        prefixes = [before + texts[value] for before, value in zip(requests.prefixes, budget.tolist(), strict=True)]
        columns = Columns({**requests.columns, BUDGET: budget[:, None]}, frozenset({*requests.columns.written, BUDGET}))
        return replace(requests, prefixes=prefixes, columns=columns)

    @hookimpl
    def combine_rewards(self, scores: Tensor, rollouts: Rollouts, mask: Tensor, log: Any) -> Tensor:
        """f of length and budget where the response is right, and constants elsewhere."""
        budget = budget_of(rollouts)
        n = ops.lengths(mask)
        correct = scores if self.correct_component is None else self._component(self.correct_component, rollouts)
        right = (correct > self.correct_above) & (n <= self.L) & (n > beginning(rollouts))
        rewards = torch.where(right, self.reward(n, budget), self.wrong_reward)
        if self.format_component is not None:
            formed = self._component(self.format_component, rollouts)
            rewards = torch.where(formed == 0, self.format_reward, rewards)
            correct = correct + formed
        self._log_by_budget(log, budget, length=n, right=right)
        return torch.where((scores + correct).isfinite(), rewards, torch.nan)

    @hookimpl
    def shape_advantages(self, advantages: Tensor, rewards: Tensor, groups: Tensor, rollouts: Rollouts) -> Tensor:
        """Add the distance of the sub-group's mean reward from the best that its budget can earn."""
        return advantages + self.intra_weight * self.intra(rewards, groups, budget_of(rollouts))

    def reward(self, n: Tensor, budget: Tensor) -> Tensor:
        """Reward of right responses of n tokens, of the shape of n and b."""
        f1 = self._cosine(n) - self.alpha * (n - budget).abs()
        f2 = self._cosine(budget)
        return torch.minimum(f1, f2) if self.mode == "min" else torch.where(n > budget, f1, f2)

    def intra(self, rewards: Tensor, groups: Tensor, budget: Tensor) -> Tensor:
        """A_intra (B, 1): mean reward of the prompt's rows with this budget minus f2; 0 for a prompt's only row."""
        part = torch.where(groups >= 0, groups * len(self.budgets) + self.places(budget), -1)
        compared = (ops.group_sizes(groups) > 1)[:, None]
        return torch.where(compared, ops.group_mean(rewards, part) - self._cosine(budget), 0.0)

    def _cosine(self, n: Tensor) -> Tensor:
        """beta cos(pi n / 2L), in float32; f2 of a budget."""
        return self.beta * torch.cos(math.pi * n.float() / (2 * self.L))

    def _log_by_budget(self, log: Any, budget: Tensor, **columns: Tensor) -> None:
        """The mean of each column (B, 1) over the rows of each budget."""
        place = self.places(budget)
        counts = torch.bincount(place, minlength=len(self.budgets))
        for name, column in columns.items():
            sums = torch.bincount(place, column.flatten(), minlength=len(self.budgets))
            for value, total, count in zip(self.budgets, sums, counts, strict=True):
                log(f"{name}/{value}", total / count.clamp(min=1), count)

    def places(self, budget: Tensor) -> Tensor:
        """Which of the budgets each row (B, 1) has, (B,) int64."""
        return torch.searchsorted(torch.tensor(self.budgets, device=budget.device), budget).flatten()

    def _component(self, name: str, rollouts: Rollouts) -> Tensor:
        """One component of the score, (B, 1)."""
        names = rollouts.component_names
        if name not in names:
            raise HookError(self.name, "combine_rewards", f"the reward function gives no component {name!r}; it gives: "
                            f"{', '.join(names) or 'none'}")  # fmt: skip
        components = rollouts.components
        assert components is not None
        return components[:, names.index(name), None]


def shares(draw: Tensor, counts: Tensor, parts: int) -> Tensor:
    """floor(j k / G), (B,) int64: which of k = `parts` budgets the response `draw` j of G = `counts` gets, (B,) each."""
    return draw * parts // counts


def beginning(rollouts: Rollouts) -> Tensor | float:
    """Number of forced tokens of each response, (B, 1); 0 if there are none."""
    return 0.0 if rollouts.prefix is None else ops.lengths(rollouts.prefix)


def budget_of(rollouts: Rollouts) -> Tensor:
    """(B, 1) int64."""
    budget = rollouts[BUDGET]
    assert isinstance(budget, Tensor)
    return budget.to(rollouts.mask.device)
