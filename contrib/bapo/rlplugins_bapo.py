"""BAPO: Balanced Policy Optimization with Adaptive Clipping (2025; arXiv 2510.18927).

Search, sums and values as in the official code, WooooDyy/BAPO, `recipe/bapo/policy_loss.py` and `recipe/bapo/config`;
the order `paper` is Algorithm 1 of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import ArgsKwargs
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.hookspecs import Log
from rlplugins.update import Batch

TOLERANCE = 1e-9  # of comparisons between bounds, so that repeated addition reaches the limit exactly once
EPSILON = 1e-8  # added to N in the ratio, as released
MOST_MOVES = 10_000  # of one bound; no published range has a hundred

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "configuration": {},
    "script": {"target": 0.5, "lo_start": 0.8, "lo_max": 0.95, "step_hi": 0.1},
    "paper": {"order": "paper", "target": 0.4, "lo_max": 0.9, "step_lo": 0.02, "hi_max": 3.0},
}
"""Published values where they differ from the defaults, which are those of the released configuration file."""

Lower = Annotated[float, Field(ge=0, le=1)]
Upper = Annotated[float, Field(ge=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Bapo(Plugin):
    """Moves the clip bounds in every update until positive advantages have their part in the clipped surrogate.

    Balanced Policy Optimization with Adaptive Clipping (arXiv 2510.18927), Algorithm 1.
    """

    name = "bapo"
    assumes = frozenset({"token_ratio"})

    preset: Literal["configuration", "script", "paper"] = "configuration"
    """Published values for the options that are left out: those of the configuration file, the script or the paper."""
    order: Literal["official", "paper"] = "official"
    """Which bound moves first: the lower one, as released (`official`), or the upper one (`paper`)."""
    criterion: Literal["ratio", "share"] | None = None
    """What must reach the target: P / N (`ratio`) or P / (P + N) (`share`). None: `share` if the order is `paper`."""
    target: NonNegative = 1.0
    """Where the search ends; 0: it never starts."""
    lo_start: Lower = 0.6
    """Lower bound of the ratio at the start of every search."""
    lo_max: Lower = 0.8
    """Largest lower bound."""
    step_lo: NonNegative = 0.05
    """How far the lower bound moves at a time; 0: it is fixed."""
    hi_start: Upper = 1.2
    """Upper bound of the ratio at the start of every search."""
    hi_max: Upper = 2.0
    """Largest upper bound."""
    step_hi: NonNegative = 0.05
    """How far the upper bound moves at a time; 0: it is fixed."""
    measure: Literal["official", "active"] = "official"
    """What P and N sum: the whole clipped surrogate (`official`) or only its tokens with a gradient (`active`)."""
    token_weight: bool = False
    """Weigh each token in P and N by its old probability: the paper's formula does, the released code does not."""
    scope: Literal["mini_batch", "micro_batch"] = "mini_batch"
    """One search per mini-batch over all ranks, or one per micro-batch as released (one rank only)."""

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: ArgsKwargs) -> ArgsKwargs:
        options = given.kwargs or {}
        preset = options.get("preset", "configuration")
        published = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        return ArgsKwargs(given.args, {**published, **options})

    @model_validator(mode="after")
    def _ranges(self) -> Bapo:
        for bound in ("lo", "hi"):
            start, limit = getattr(self, f"{bound}_start"), getattr(self, f"{bound}_max")
            if start > limit:
                raise ValueError(f"{bound}_start {start:g} is above {bound}_max {limit:g}")
            if limit - start > MOST_MOVES * getattr(self, f"step_{bound}") > 0:
                raise ValueError(f"step_{bound} is so small that the bound could move more than {MOST_MOVES} times")
        if self.compared == "share" and self.target >= 1:
            raise ValueError("target is a share of the surrogate here and must be below 1 (0.4 in the paper); "
                             "for P / N write `criterion: ratio`")  # fmt: skip
        return self

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """The search sees the whole mini-batch before its first backward, or only what is on one rank."""
        return (needs.MINI_BATCH_LOG_PROBS,) if self.scope == "mini_batch" else (needs.ONE_RANK,)

    @property
    def compared(self) -> str:
        """The criterion, `ratio` or `share`."""
        return self.criterion or ("share" if self.order == "paper" else "ratio")

    @hookimpl(when=lambda self: self.scope == "mini_batch")
    def prepare_mini_batch(self, batch: Batch, log: Log) -> None:
        """One search for all rows on all ranks, after one reduction of P and N of every bound that it may meet."""
        sums = batch.sum(self.sums(batch.ratio, batch["advantages"], batch))
        batch.share("clip", self.search(sums, log))

    @hookimpl
    def clip_range(self, ratio: Tensor, advantages: Tensor, batch: Batch, log: Log) -> tuple[float, float]:
        if self.scope == "mini_batch":
            return batch.shared["clip"]
        return self.search(self.sums(ratio, advantages, batch), log)

    def sums(self, ratio: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """P of every upper bound, then N of every lower bound, (H + L,) float64: neither depends on the other bound."""
        weight = batch.loss_weights * advantages
        if self.token_weight:
            weight = weight * batch["old_log_probs"].exp()
        up, down = weight > 0, weight < 0
        positive = positive_part(ratio[up], weight[up], self.upper_bounds(), self.measure == "active")
        negative = negative_part(ratio[down], -weight[down], self.lower_bounds(), self.measure == "active")
        return torch.cat([positive, negative])

    def search(self, sums: Tensor, log: Log) -> tuple[float, float]:
        """The first bounds (lo, hi) on the way that reach the target, else the last ones."""
        lower, upper = self.lower_bounds(), self.upper_bounds()
        lo_at, hi_at = torch.tensor(self.trials()).unbind(1)
        sums = sums.cpu()
        positive, negative = sums[: len(upper)][hi_at], sums[len(upper) :][lo_at]
        reached = (balance(positive, negative, self.compared) >= self.target).nonzero()
        found = int(reached[0]) if len(reached) else len(lo_at) - 1
        low, high = lower[int(lo_at[found])], upper[int(hi_at[found])]
        log("low", low)
        log("high", high)
        log("moves", found)
        log("share", balance(positive, negative, "share")[found])
        if negative[found] > 0:
            log("ratio", balance(positive, negative, "ratio")[found])
        return low, high

    def trials(self) -> list[tuple[int, int]]:
        """The way of the search: places in `lower_bounds` and `upper_bounds`, from the start values to the last."""
        low, high = len(self.lower_bounds()) - 1, len(self.upper_bounds()) - 1
        if self.order == "official":
            return [(i, 0) for i in range(low)] + [(low, j) for j in range(high + 1)]
        if low == 0:  # Algorithm 1 goes on only while the lower bound can still move
            return [(0, 0)]
        return [(0, j) for j in range(high)] + [(i, high) for i in range(low + 1)]

    def lower_bounds(self) -> list[float]:
        """L values, ascending."""
        return bounds(self.lo_start, self.lo_max, self.step_lo, last_step_may_be_short=self.order == "official")

    def upper_bounds(self) -> list[float]:
        """H values, ascending."""
        return bounds(self.hi_start, self.hi_max, self.step_hi, last_step_may_be_short=self.order == "official")


def bounds(start: float, limit: float, step: float, last_step_may_be_short: bool) -> list[float]:
    """`start` and every value that a bound takes on its way to `limit`."""
    if step == 0:
        return [start]
    distance = (limit - start) / step
    slack = TOLERANCE / step
    moves = math.ceil(distance - slack) if last_step_may_be_short else math.floor(distance + slack)
    return [start, *(min(start + k * step, limit) for k in range(1, moves + 1))]


def positive_part(ratio: Tensor, weight: Tensor, upper: list[float], active: bool) -> Tensor:
    """P = sum weight min(ratio, hi) for each upper bound hi, (H,) float64; `active`: over ratio <= hi only.

    Args:
        ratio: (n,) of the tokens with a positive advantage.
        weight: (n,) advantage times weight of the token, > 0.
        upper: H bounds, ascending.
        active: leave out tokens that are clipped.
    """
    hi = torch.tensor(upper, dtype=torch.float64, device=ratio.device)
    place = torch.bucketize(ratio, hi.to(ratio.dtype))  # the number of bounds that clip the token: the first ones
    kept = histogram(place, weight * ratio, len(hi) + 1).cumsum(0)[:-1]
    return kept if active else kept + hi * total_from(histogram(place, weight, len(hi) + 1))[1:]


def negative_part(ratio: Tensor, weight: Tensor, lower: list[float], active: bool) -> Tensor:
    """N = sum weight max(ratio, lo) for each lower bound lo, (L,) float64; `active`: over ratio >= lo only.

    Args:
        ratio: (n,) of the tokens with a negative advantage.
        weight: (n,) minus the advantage times the weight of the token, > 0.
        lower: L bounds, ascending.
        active: leave out tokens that are clipped.
    """
    lo = torch.tensor(lower, dtype=torch.float64, device=ratio.device)
    place = torch.bucketize(ratio, lo.to(ratio.dtype), right=True)  # the number of bounds that do not clip the token
    kept = total_from(histogram(place, weight * ratio, len(lo) + 1))[1:]
    return kept if active else kept + lo * histogram(place, weight, len(lo) + 1).cumsum(0)[:-1]


def histogram(place: Tensor, values: Tensor, size: int) -> Tensor:
    """Sum of the values at each place 0..size-1, (size,) float64."""
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, place, values.double())


def total_from(values: Tensor) -> Tensor:
    """Sum of values[k:] for each k."""
    return values.flip(0).cumsum(0).flip(0)


def balance(positive: Tensor, negative: Tensor, criterion: str) -> Tensor:
    """P / (N + 1e-8) (`ratio`, infinite where N = 0) or P / (P + N) (`share`, 1 where N = 0)."""
    if criterion == "ratio":
        return torch.where(negative > 0, positive / (negative + EPSILON), torch.inf)
    return torch.where(negative > 0, positive / (positive + negative), 1.0)
