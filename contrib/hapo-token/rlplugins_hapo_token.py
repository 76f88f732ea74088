"""HAPO: Heterogeneous Adaptive Policy Optimization (Liu et al. 2025, arXiv 2509.16591).

Equations as in the official code, starriver030515/HAPO, `verl/trainer/ppo/core_algos.py` and `vllm/v1/sample/sampler.py`,
with the sign of the paper's text for tokens of low entropy. Not the HAPO that remembers response lengths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import Fraction, NonNegative
from rlplugins.hookspecs import Log
from rlplugins.rollouts import Sampling
from rlplugins.steps import Step

NUMBERS = "hapo_token"
FLOOR = 1e-8  # smallest entropy inside the logarithm, and smallest extreme of h
SMALLEST_SD = 1e-4
EPS = 1e-6
FALLBACK = 5.0  # a group with an advantage of this size is normalised over responses instead
NEUTRAL = (0.0, 1.0, 0.0, 0.0)  # statistics under which every token has hhat 0


class HapoToken(Plugin):
    """Treats each token by its entropy: when it is drawn, in its group's mean, in its advantage and in its clip bounds.

    Heterogeneous Adaptive Policy Optimization (arXiv 2509.16591), on DAPO. Four parts, each of which can be off.
    """

    name = "hapo-token"

    tau: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Adaptive temperature sampling: largest relative change of the temperature; 0: off."""
    token_average: bool = True
    """Token-level group average: mean and standard deviation of the group over tokens instead of responses."""
    adv_beta: Fraction = 1.0
    """b of differential advantage redistribution: largest relative change of an advantage; 0: off."""
    clip_alpha: NonNegative = 1.0
    """c of asymmetric adaptive clipping: largest relative widening of a bound; 0: off, the trainer's bounds hold."""
    clip_low: Fraction = 0.2
    """Distance of the lower bound from 1 before it is widened; redistribution compares with it too."""
    clip_high: NonNegative = 0.2
    """Distance of the upper bound from 1 before it is widened; the paper has 0.28."""
    pivot: Fraction = 0.8
    """q: the quantile of the log-entropies at which a token counts as neither low nor high."""
    stats: Literal["step", "micro"] = "step"
    """What the update's statistics are taken over: the whole step, or each micro-batch as released."""
    released_sign: bool = False
    """Treat tokens of low entropy like those of high entropy, as released."""

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """Statistics of a micro-batch depend on the cut."""
        size = (needs.group_size(at_least=2),) if self.token_average else ()
        return (*size, needs.ONE_RANK) if self.updates and self.stats == "micro" else size

    @property
    def assumes(self) -> frozenset[str]:
        """One reward to average over tokens; a ratio per token to compare with the bounds."""
        rewards = {"response_rewards"} if self.token_average else set()
        return frozenset(rewards | ({"token_ratio"} if self.updates else set()))

    @property
    def breaks(self) -> frozenset[str]:
        """Division by the group's standard deviation."""
        return frozenset({"reward_scale"} if self.token_average else ())

    @property
    def updates(self) -> bool:
        """Whether a part changes the update."""
        return self.adv_beta > 0 or self.clip_alpha > 0

    @property
    def measures(self) -> bool:
        """Whether a part reads the statistics of the step."""
        return self.tau > 0 or (self.updates and self.stats == "step")

    def init_state(self, run: Any) -> dict[str, Any]:
        """(med, sd, s+, s-) of the last step that had tokens."""
        return {"statistics": list(NEUTRAL)}

    @hookimpl(when=lambda self: self.tau > 0)
    def sampling_params(self, sampling: Sampling) -> Sampling:
        statistics = sampling.temperature.new_tensor(self.state.statistics)
        numbers = {NUMBERS: statistics.expand(len(sampling), -1)}
        return replace(sampling, numbers=sampling.numbers | numbers)

    @hookimpl(when=lambda self: self.tau > 0)
    def process_logits(self, logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        if NUMBERS not in numbers:  # a request that was not drawn with `sampling_params`
            return logits
        return (logits / temperature_factor(logits, numbers[NUMBERS], self.tau)).to(logits.dtype)

    @hookimpl(when=lambda self: self.token_average)
    def baseline(self, rewards: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
        return token_group_statistics(rewards, groups, mask)[0]

    @hookimpl(when=lambda self: self.token_average)
    def advantage_scale(self, rewards: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
        return token_group_statistics(rewards, groups, mask)[1]

    @hookimpl(when=lambda self: self.measures)
    def shape_advantages(
        self, advantages: Tensor, entropy: Tensor, groups: Tensor, mask: Tensor, step: Step, log: Log
    ) -> Tensor:
        grouped = groups >= 0
        statistics = self.statistics(entropy, mask if bool(grouped.all()) else mask & grouped[:, None])
        step.share("statistics", statistics)
        log("log_entropy_pivot", statistics[0])
        log("log_entropy_spread", statistics[1])
        return advantages

    @hookimpl(when=lambda self: self.adv_beta > 0)
    def adapt_advantages(self, advantages: Tensor, ratio: Tensor, entropy: Tensor, mask: Tensor, batch: Any) -> Tensor:
        hhat = self.hhat(entropy, mask, batch)
        eps_low, eps_high = self.widened(hhat)
        return redistributed(advantages, hhat, ratio, eps_low, eps_high, self.adv_beta)

    @hookimpl(when=lambda self: self.clip_alpha > 0)
    def clip_range(self, entropy: Tensor, mask: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        eps_low, eps_high = self.widened(self.hhat(entropy, mask, batch))
        return 1 - eps_low, 1 + eps_high

    @hookimpl(when=lambda self: self.tau > 0)
    def on_step_end(self, step: Step) -> None:
        statistics = step.shared.get("statistics", list(NEUTRAL))
        if statistics != list(NEUTRAL):
            self.state.statistics = statistics

    def statistics(self, entropy: Tensor, mask: Tensor) -> list[float]:
        """(med, sd, s+, s-) of the masked tokens."""
        return entropy_statistics(entropy, mask, self.pivot, self.released_sign)

    def hhat(self, entropy: Tensor, mask: Tensor, batch: Any) -> Tensor:
        """Normalised entropy of a micro-batch's tokens, (B, T)."""
        if self.stats == "micro":
            return normalised_entropy(entropy, *self.statistics(entropy, mask))
        return normalised_entropy(entropy, *batch.shared.get("statistics", NEUTRAL))

    def widened(self, hhat: Tensor) -> tuple[Tensor, Tensor]:
        """eps_low and eps_high, (B, T)."""
        return widened_bounds(hhat, self.clip_low, self.clip_high, self.clip_alpha)


def entropy_statistics(entropy: Tensor, mask: Tensor, pivot: float = 0.8, released_sign: bool = False) -> list[float]:
    """med, sd, s+ and s-: where the log-entropies lie, and the factors that bring their extremes to 1 and -1.

    med is a quantile, sd the root mean square distance from it. NaN counts as missing; without tokens `NEUTRAL`. A factor
    is 0 where no token lies on its side, so that rounding in another pass is not taken for an extreme.

    Args:
        entropy: (B, T), in nats.
        mask: (B, T) bool, the tokens that count.
        pivot: q, of the quantile by nearest rank.
        released_sign: s- below 0, so that no token has hhat below 0.
    """
    present = ops.masked_values(entropy, mask)
    if bool(present.isnan().any()):
        present = present[~present.isnan()]
    logs = present.clamp_(min=FLOOR).log_()
    if not len(logs):
        return list(NEUTRAL)
    low, high = logs.aminmax()
    med = ops.kth_smallest(logs, 1 + round(pivot * (len(logs) - 1)))
    sd = logs.sub_(med).square_().mean().sqrt().clamp(min=SMALLEST_SD)
    highest, lowest = (high - med) / sd, (med - low) / sd
    s_plus, s_minus = ((end > 0) / end.clamp(min=FLOOR) for end in (highest, lowest))
    return [float(value) for value in (med, sd, s_plus, -s_minus if released_sign else s_minus)]


def normalised_entropy(
    entropy: Tensor, med: Tensor | float, sd: Tensor | float, s_plus: Tensor | float, s_minus: Tensor | float
) -> Tensor:
    """hhat in [-1, 1]: below 0 for tokens of low entropy, above 0 for high; 0 where the entropy is NaN.

    Args:
        entropy: any shape, in nats.
        med, sd, s_plus, s_minus: of `entropy_statistics`; numbers, or tensors of that shape.
    """
    h = (entropy.clamp(min=FLOOR).log() - med) / sd
    return torch.where(h > 0, h * s_plus, h * s_minus).clamp(-1, 1).nan_to_num(0.0)


def temperature_factor(logits: Tensor, statistics: Tensor, tau: float) -> Tensor:
    """T_t / T0 = 1 + tau hhat, (N, 1), from the token's logits (N, V) and the statistics (N, 4) of its request."""
    entropy = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    hhat = normalised_entropy(entropy, *statistics.to(entropy).unbind(1))
    return (1 + tau * hhat)[:, None]


def token_group_statistics(rewards: Tensor, groups: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """mu and sg + 1e-6 of each row's group, (B, 1) each, every response counted once per token.

    A group with an advantage of 5 or more falls back to the mean over responses and their sample deviation + 1e-6. In
    float64, so that equal rewards are equal to their mean.

    Args:
        rewards: (B, 1).
        groups: (B,), -1: none.
        mask: (B, T) bool.
    """
    r, length = rewards.double(), ops.lengths(mask).double()
    tokens = ops.group_sum(length, groups)
    mu = ops.safe_divide(ops.group_sum(length * r, groups), tokens)
    sg = ops.safe_divide(ops.group_sum(length * (r - mu).square(), groups), tokens).sqrt()
    size = ((r - mu) / (sg + EPS)).abs() * (length > 0)
    by_response = (ops.group_extreme(size, groups) >= FALLBACK) | (tokens == 0)
    mu = torch.where(by_response, ops.group_mean(r, groups), mu)
    sg = torch.where(by_response, ops.group_std(r, groups), sg)
    return mu.to(rewards.dtype), (sg + EPS).to(rewards.dtype)


def widened_bounds(hhat: Tensor, clip_low: float, clip_high: float, clip_alpha: float) -> tuple[Tensor, Tensor]:
    """eps_low, wider for low entropy, and eps_high, wider for high entropy; in the shape of hhat."""
    return clip_low * (1 + clip_alpha * (-hhat).clamp(min=0)), clip_high * (1 + clip_alpha * hhat.clamp(min=0))


def redistributed(
    advantages: Tensor, hhat: Tensor, ratio: Tensor, eps_low: Tensor, eps_high: Tensor, adv_beta: float
) -> Tensor:
    """A (1 + b hhat) for low entropy inside of half the bounds and for high entropy outside of them, else A; (B, T).

    Args:
        advantages: (B, 1) or (B, T).
        hhat: (B, T).
        ratio: (B, T).
        eps_low, eps_high: (B, T).
        adv_beta: b.
    """
    inside = (ratio > 1 - eps_low / 2) & (ratio < 1 + eps_high / 2)
    return torch.where(inside == (hhat <= 0), advantages * (1 + adv_beta * hhat), advantages)
