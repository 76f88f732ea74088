"""Stratified GRPO: Handling Structural Heterogeneity in RL of LLM Search Agents (Zhu et al., 2025; arXiv 2510.06214).

From the abstract and descriptions of the paper; there is no official code. A stratum is what the responses to one prompt
with the same structure, by default the same number of tool calls, have in common.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError, HookError
from rlplugins.hookspecs import Log
from rlplugins.rollouts import Column, Rollouts
from rlplugins.steps import Run

MISSING = ("None", "nan", "NaN", "<NA>")  # how str writes a value that is not there


class StratifiedGrpo(Plugin):
    """Compares each response with those of the same structure, blended with the comparison inside its whole group.

    Stratified Advantage Normalisation of Stratified GRPO (arXiv 2510.06214).
    """

    name = "stratified-grpo"

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Weight of the comparison inside the stratum (SAN); the rest is that of the group's mean and std. 1: SAN alone."""
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    """Added to the standard deviations."""
    ddof: Literal[0, 1] = 0
    """0: divide by the number of responses (variance 1 in each stratum); 1: by one less."""
    strata: str = "strata"
    """Column with the stratum of each response, a number or a string; without it the tool outputs are counted."""
    stratum_of: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """`module:function` that gives the strata (B,) of all rollouts in one call, instead of the column."""

    @property
    def uses(self) -> dict[str, str]:
        """Without a blend a stratum is a group, and its mean the baseline."""
        return {"baseline": "group_mean"} if self.alpha == 1 else {}

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """Two responses to compare; the column, if there is one."""
        size = needs.group_size(at_least=2)
        return (size,) if self.stratum_of else (size, needs.column(self.strata).optional())

    assumes = frozenset({"response_rewards"})

    @property
    def breaks(self) -> frozenset[str]:
        """Division by std; strata as groups are of any size."""
        return frozenset({"reward_scale", "equal_groups"} if self.alpha == 1 else {"reward_scale"})

    def init_state(self, run: Run) -> dict[str, Any]:
        """Nothing is remembered; a function that cannot be found is an error before the first step."""
        if self.stratum_of:
            function(self.stratum_of)
        return {}

    # SAN alone: three hooks, with the built-in difference (R - mu_k) / (sigma_k + eps)

    @hookimpl(when=lambda self: self.alpha == 1)
    def assign_groups(self, groups: Tensor, rewards: Tensor, rollouts: Rollouts, log: Log) -> Tensor:
        """The pair of prompt and stratum, (B,)."""
        strata = self.stratum_ids(rollouts, "assign_groups")
        report(rewards, groups, strata, log)
        return split(groups, strata)

    @hookimpl(when=lambda self: self.alpha == 1)
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """sigma_k + eps, (B, 1); 0, which gives advantage 0, where all rewards are equal."""
        sigma = ops.group_std(rewards.double(), groups, self.ddof)
        return torch.where(sigma == 0, 0.0, sigma + self.eps).to(rewards.dtype)

    # the blend

    @hookimpl(when=lambda self: self.alpha < 1)
    def compute_advantages(self, rewards: Tensor, groups: Tensor, rollouts: Rollouts, log: Log) -> Tensor:
        """A = alpha SAN + (1 - alpha) GN, (B, 1)."""
        strata = self.stratum_ids(rollouts, "compute_advantages")
        report(rewards, groups, strata, log)
        advantage, _, _ = blended(rewards, groups, strata, self.alpha, self.eps, self.ddof)
        return advantage.to(rewards.dtype)

    def stratum_ids(self, rollouts: Rollouts, hook: str) -> Tensor:
        """The stratum of each row, (B,) int64.

        Raises:
            HookError: if the column or the function does not give one value per response.
        """
        if self.stratum_of:
            column, source = function(self.stratum_of)(rollouts.unguarded()), self.stratum_of
        elif self.strata in rollouts.names():
            column, source = rollouts[self.strata], f"the column {self.strata!r}"
        else:
            return self.counted(rollouts.mask)
        shape = (len(column),) if isinstance(column, Tensor) and column.numel() == len(column) else np.shape(column)
        if shape != (len(rollouts),):
            raise HookError(self.name, hook, f"{source} has shape {tuple(shape)}, not one stratum for each of "
                            f"{len(rollouts)} responses")  # fmt: skip
        return numbered(column).to(rollouts.mask.device)

    def counted(self, mask: Tensor) -> Tensor:
        """The number of tool outputs, with a warning once if there is none: then the method is plain GRPO."""
        calls = tool_calls(mask)
        if len(calls) and not bool(calls.any()):
            warnings.warn(f"stratified-grpo: there is no column {self.strata!r} and no tool output in the responses: all "
                          "are in one stratum, which is GRPO", stacklevel=1)  # fmt: skip
        return calls


def blended(
    rewards: Tensor, groups: Tensor, strata: Tensor, alpha: float = 0.6, eps: float = 1e-6, ddof: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`advantage`, `san` and `global_norm`, (B, 1) float64 each.

    Args:
        rewards: (B, 1).
        groups: (B,) prompt of each row; -1: none.
        strata: (B,) int64 >= 0.
        alpha: weight of `san`.
        eps: added to the standard deviations.
        ddof: 0 or 1.
    """
    san = normalised(rewards, split(groups, strata), eps, ddof)
    global_norm = normalised(rewards, groups, eps, ddof)
    return alpha * san + (1 - alpha) * global_norm, san, global_norm


def normalised(rewards: Tensor, groups: Tensor, eps: float, ddof: int) -> Tensor:
    """(R - mean) / (std + eps) inside each group, (B, 1) float64, in which equal rewards are exactly their mean."""
    centred = (rewards.double() - ops.group_mean(rewards.double(), groups)) * (groups >= 0)[:, None]
    return ops.safe_divide(centred, ops.group_std(rewards.double(), groups, ddof) + eps)


def split(groups: Tensor, strata: Tensor) -> Tensor:
    """Each group cut into its strata, (B,) int64; -1 stays."""
    dense = ops.dense_groups(groups)[0]
    count = int(strata.max()) + 1 if len(strata) else 1
    return torch.where(dense >= 0, dense * count + strata, -1)


def variances(rewards: Tensor, groups: Tensor, strata: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Var[AG], Var[AS] and the between-strata term of each row's group, (B, 1) each: the first is the sum of the others.

    AG = R - mu and AS = R - mu_k; the term is (1 / n) sum_k n_k (mu_k - mu)^2, the cross-stratum bias.
    """
    mu, mu_k = ops.group_mean(rewards, groups), ops.group_mean(rewards, split(groups, strata))
    parts = (rewards - mu, rewards - mu_k, torch.where(rewards.isnan(), torch.nan, mu_k - mu))
    total, within, between = (ops.group_mean(part.square(), groups) for part in parts)
    return total, within, between


def tool_calls(mask: Tensor) -> Tensor:
    """Tool outputs that the policy went on after, (B,) int64: gaps in the mask (B, T) of its own tokens."""
    return ops.gaps(mask.bool()).flatten().long()


def numbered(column: Column) -> Tensor:
    """Numbers 0, 1, ... for the different values of a column, (B,) int64; missing values share one of their own."""
    if isinstance(column, Tensor):
        values = column.flatten()
        missing = values.isnan()
        ids = torch.unique(torch.nan_to_num(values), return_inverse=True)[1]
    else:
        names = np.asarray(column, dtype=str)
        missing = torch.from_numpy(np.isin(names, MISSING))
        ids = torch.from_numpy(np.unique(names, return_inverse=True)[1].reshape(-1))
    return torch.where(missing, len(ids), ids)


def function(path: str) -> Callable[[Rollouts], Column]:
    """What `module:function` names.

    Raises:
        ConfigurationError: if there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        found: Callable[[Rollouts], Column] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"stratified-grpo.stratum_of: {path!r} cannot be imported: {error}") from error
    return found


def report(rewards: Tensor, groups: Tensor, strata: Tensor, log: Log) -> None:
    """Metrics over the rows that are in a group: strata per group, share of rows alone in theirs, cross-stratum bias."""
    inside = groups >= 0
    if not bool(inside.any()):
        return
    parts = split(groups, strata)
    log("strata", ops.dense_groups(parts)[1] / ops.dense_groups(groups)[1])
    log("alone", (ops.group_sizes(parts) == 1)[inside].float().mean())
    log("cross_stratum_bias", variances(rewards, groups, strata)[2][inside].mean())
