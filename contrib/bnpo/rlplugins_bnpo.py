"""BNPO: Beta Normalization Policy Optimization (Xiao, Zhang and Cao, 2025; arXiv 2506.02864).

Equations and guards as in the official code, changyi7231/BNPO, `recipe/bnpo/src/bnpo_ray_trainer.py`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import HookError
from rlplugins.hookspecs import Log
from rlplugins.rollouts import Rollouts

NO_SPREAD = 1e-12  # variance of p below which there is nothing to fit
ROUNDING = 1e-6  # a success rate so near to 0 or 1 is exactly that: only float32 rounding keeps it away

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Bnpo(Plugin):
    """Divides the centred reward by a Beta density of the prompt's success rate, fitted anew in every step.

    Beta Normalization Policy Optimization (arXiv 2506.02864), section 3.
    """

    name = "bnpo"

    reward_min: Finite = 0.0
    """Smallest possible reward (of each component, with `decompose`)."""
    reward_max: Finite = 1.0
    """Largest possible reward (of each component, with `decompose`)."""
    w_max: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e6
    """Largest weight 1/f(p)."""
    decompose: bool = False
    """Average the advantages of the reward's components, each with its own fit, instead of weighting the total."""

    @model_validator(mode="after")
    def _not_empty(self) -> Bnpo:
        if self.reward_min >= self.reward_max:
            raise ValueError("reward_min must be below reward_max")
        return self

    @property
    def uses(self) -> dict[str, str]:
        """The group mean is p itself, so the default (reward - baseline) / scale is A."""
        return {} if self.decompose else {"baseline": "group_mean"}

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """A success rate takes two responses; a decomposition takes the parts."""
        size = needs.group_size(at_least=2)
        return (size, needs.column("components")) if self.decompose else (size,)

    @property
    def assumes(self) -> frozenset[str]:
        """With `decompose` the total reward is not read, so nothing is assumed about it."""
        total = frozenset() if self.decompose else frozenset({"unit_rewards", "response_rewards"})
        return total | {"absolute_advantages"}

    @hookimpl(when=lambda self: not self.decompose)
    def advantage_scale(self, rewards: Tensor, groups: Tensor, log: Log) -> Tensor:
        """(max - min) / min(1/f(p), w_max), (B, 1): with the group mean as baseline, (R - mean) / scale is A."""
        p = self.success_rate(self.scaled(rewards), groups, "advantage_scale")
        alpha, beta = beta_parameters(p, groups)
        log("alpha", alpha)
        log("beta", beta)
        weight = beta_weight(p, alpha, beta, self.w_max)
        # where p is 0 or 1, A is 0: do not multiply the rounding error of the mean by w_max
        return (self.reward_max - self.reward_min) / torch.where(certain(p), 1.0, weight)

    @hookimpl(when=lambda self: self.decompose)
    def compute_advantages(self, components: Tensor, groups: Tensor, rollouts: Rollouts, log: Log) -> Tensor:
        """A = (1/K) sum_k A^(k), (B, 1)."""
        if "components" not in rollouts.names():
            raise HookError(self.name, "compute_advantages", "`decompose` needs the components of the score, but the "
                            "reward function gives none")  # fmt: skip
        parts = [self.part(column[:, None], groups, k, log) for k, column in enumerate(components.unbind(1))]
        return torch.stack(parts).mean(0)

    def part(self, rewards: Tensor, groups: Tensor, k: int, log: Log) -> Tensor:
        """A^(k) = min(1/f(p), w_max) (s - p) of one component (B, 1); 0 where it has no finite value."""
        present = rewards.isfinite()
        scaled = self.scaled(torch.nan_to_num(rewards))
        groups = torch.where(present.flatten(), groups, -1)
        p = self.success_rate(scaled, groups, "compute_advantages")
        alpha, beta = beta_parameters(p, groups)
        log(f"alpha_{k}", alpha)
        log(f"beta_{k}", beta)
        return torch.where(certain(p) | ~present, 0.0, beta_weight(p, alpha, beta, self.w_max) * (scaled - p))

    def scaled(self, rewards: Tensor) -> Tensor:
        """s = (R - min) / (max - min)."""
        return (rewards - self.reward_min) / (self.reward_max - self.reward_min)

    def success_rate(self, scaled: Tensor, groups: Tensor, hook: str) -> Tensor:
        """p of each row's prompt: the mean of s over its group, (B, 1); 0 for rows without a group.

        Raises:
            HookError: if a mean lies outside of [0, 1].
        """
        p = ops.group_mean(scaled, groups)
        if bool(((p < -ROUNDING) | (p > 1 + ROUNDING)).any()):
            raise HookError(self.name, hook, f"success rates from {p.min():g} to {p.max():g} are outside of [0, 1]: "
                            f"reward_min {self.reward_min:g} or reward_max {self.reward_max:g} is wrong")  # fmt: skip
        return p.clamp(0, 1)


def beta_parameters(p: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta (0-d) by the method of moments.

    With a and b the moments' solution, alpha = max(1, 1 + a/3) and beta = max(1, 1 + b/3). Each prompt with two
    responses or more counts once; 1 and 1 for fewer than two such prompts, or if all have the same success rate.

    Args:
        p: (B, 1) success rate of each row's prompt.
        groups: (B,) its group.
    """
    size = ops.group_sizes(groups)
    share = torch.where(size >= 2, 1 / size.clamp(min=1).double(), 0.0)  # the rows of a prompt add up to one
    prompts = share.sum().round()
    rate = p.double().flatten()
    m = (share * rate).sum() / prompts.clamp(min=1)
    v = (share * (rate - m).square()).sum() / (prompts - 1).clamp(min=1)
    if prompts < 2 or v < NO_SPREAD:
        return torch.ones_like(m), torch.ones_like(m)
    strength = m * (1 - m) / v - 1
    return (1 + strength * m / 3).clamp(min=1), (1 + strength * (1 - m) / 3).clamp(min=1)


def beta_weight(p: Tensor, alpha: Tensor, beta: Tensor, w_max: float) -> Tensor:
    """min(1/f(p), w_max) in the shape of p, f the density of Beta(alpha, beta); by logarithms: alpha may be large."""
    log_f = torch.xlogy(alpha - 1, p.double()) + torch.xlogy(beta - 1, 1 - p.double())
    log_f = log_f - (torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta))
    return (-log_f).exp().clamp(max=w_max).to(p.dtype)


def certain(p: Tensor) -> Tensor:
    """Where all responses of a prompt are right, or all are wrong."""
    return (p < ROUNDING) | (p > 1 - ROUNDING)
