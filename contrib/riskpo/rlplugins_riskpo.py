"""RiskPO: Risk-based Policy Optimization (Ren et al., 2025; arXiv 2510.00911).

Papers, quantiles, advantages, credit and tracker as in the official code, RTkenny/RiskPO, `verl/trainer/ppo/core_algos.py`.
A bundle k is M consecutive questions (prompts) of the step; its paper j is the j-th response to each of them, and the
paper's score z (K, J) is the sum of their rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, ops
from rlplugins.defaults import clamp
from rlplugins.hookspecs import Log
from rlplugins.rollouts import Rollouts
from rlplugins.steps import Run, Step
from rlplugins.update import LOG_RATIO_BOUND

EPS = 1e-6
NO_SPREAD = 1e-3  # a standard deviation up to this is taken as 1
NO_SUM = 1e-6  # a sum of centred rewards up to this is no weight to share by
LEVELS = torch.arange(1, 20, dtype=torch.float64) / 20

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Level = Annotated[float, Field(ge=0, le=1)]


class Riskpo(Plugin):
    """Scores bundles of questions, weighs the lower tail of these scores and ignores what is above an upper quantile.

    Risk-based Policy Optimization (arXiv 2510.00911), objective Mixed Value-at-Risk.
    """

    name = "riskpo"
    uses = {"assign_groups": "prompt"}
    assumes = frozenset({"response_rewards", "equal_groups", "complete_groups", "whole_groups"})

    bundle_size: Annotated[int, Field(ge=1)] = 5
    """M, questions in a bundle: prompts that follow each other in the step."""
    quantile_down: Level = 0.2
    """a, level of the lower quantile; the tail is below it."""
    quantile_up: Level = 0.8
    """b, level of the upper quantile; scores above it count as the quantile."""
    mixing: bool = True
    """Give the lower tail its own weight; without it the objective is the range value-at-risk between the quantiles."""
    w_mix: Weight = 1.5
    """w = 1 + omega, weight of the lower tail."""
    weights: Literal["released", "published"] = "released"
    """`released`: tail and middle are divided by the width of their window; `published`: the paper's objective."""
    natural_baseline: bool = True
    """Subtract the height of the window, so that scores from the upper quantile on have advantage 0."""
    norm_by_std: bool = True
    """Divide by the standard deviation of the bundle's scores."""
    credit: Literal["uniform", "std", "score", "sum-mean"] = "uniform"
    """A response's part in its paper's advantage: all of it, over its question's std, by its score, by its lead."""
    quantiles: Literal["tracked", "own", "mix"] = "tracked"
    """Quantiles tracked over the steps, those of the bundle's own scores (as in the released runs), or their mean."""
    lr_q: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Step size of the tracker."""
    permute: bool = False
    """Shuffle each question's responses before they are put into papers, as the paper does; the code does not."""
    sequence_ratio: bool = False
    """Clip the geometric mean of a response's ratios (the paper) instead of leaving the loss to the trainer (the code)."""

    @model_validator(mode="after")
    def _check_levels(self) -> Riskpo:
        if self.quantile_down >= self.quantile_up:
            raise ValueError(f"quantile_down {self.quantile_down:g} must be below quantile_up {self.quantile_up:g}")
        if self.quantile_down == 0 and self.weights == "released" and self.tail_weight > 0:
            raise ValueError("quantile_down must be above 0, since the tail is divided by it (else `mixing: false`)")
        if self.quantiles != "own" and nearest_level(self.quantile_down) == nearest_level(self.quantile_up):
            raise ValueError(f"quantile_down {self.quantile_down:g} and quantile_up {self.quantile_up:g} are nearest to the "
                             "same tracked level (0.05, 0.10, ... 0.95); write `quantiles: own`")  # fmt: skip
        return self

    @property
    def breaks(self) -> frozenset[str]:
        """A std takes out a common factor; the paper's loss compares whole responses."""
        scaled = {"reward_scale"} if self.norm_by_std or self.credit == "std" else set()
        return frozenset(scaled | ({"token_ratio"} if self.sequence_ratio else set()))

    @property
    def tail_weight(self) -> float:
        """w, and 0 without `mixing`, which is the same."""
        return self.w_mix if self.mixing else 0.0

    def init_state(self, run: Run) -> dict[str, Any]:
        """Values (19,) float64 of the quantiles at `LEVELS`, and whether a step has set them."""
        return {"tracked": torch.zeros_like(LEVELS), "warm": False} if self.quantiles != "own" else {}

    @hookimpl
    def compute_advantages(self, rewards: Tensor, groups: Tensor, rollouts: Rollouts, step: Step, log: Log) -> Tensor:
        """A, (B, 1); 0 for rows in no paper. Whole, since g is piecewise linear in the sum of several rewards."""
        keys = torch.rand(len(groups), generator=step.generator(self)).to(groups.device) if self.permute else None
        papers = compose(rollouts.groups, bundles_of(rollouts.groups, self.bundle_size), groups >= 0, keys)
        r = rewards.double()
        z = papers.total(r)
        if not z.numel():
            return torch.zeros_like(rewards)
        short = papers.questions < papers.questions.max()  # its scores are no draws from what the others' are
        step.share("z", z[~short.flatten()])
        q_down, q_up = self.quantile_values(z, short)
        report(z, q_down, q_up, log)
        A = risk(z, q_down, q_up, self.quantile_down, self.quantile_up, self.tail_weight, self.natural_baseline,
                 self.weights)  # fmt: skip
        if self.norm_by_std:
            A = A / (spread(z) + EPS)
        return (papers.to_rows(A) * share_of_credit(r, groups, papers, self.credit)).to(rewards.dtype)

    def quantile_values(self, z: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
        """q_d and q_u of each bundle, (K, 1); a short bundle (K, 1) has its own whatever is tracked."""
        own = torch.nanquantile(z, z.new_tensor([self.quantile_down, self.quantile_up]), dim=1, keepdim=True)
        if self.quantiles == "own" or not self.state.warm:
            return own[0], own[1]
        places = [nearest_level(self.quantile_down), nearest_level(self.quantile_up)]
        tracked = self.state.tracked[places].sort().values.to(z.device)[:, None, None]  # they may cross
        values = torch.where(short, own, (tracked + own) / 2 if self.quantiles == "mix" else tracked)
        return values[0], values[1]

    @hookimpl(when=lambda self: self.quantiles != "own")
    def on_step_end(self, step: Step) -> None:
        """The tracker's step on the scores of this step, for the advantages of the next."""
        z = step.shared.get("z", torch.empty(0)).flatten().double().cpu()
        z = z[~z.isnan()]
        if not len(z):
            return
        self.state.tracked = track(self.state.tracked, z, self.lr_q) if self.state.warm else torch.quantile(z, LEVELS)
        self.state.warm = True

    @hookimpl(when=lambda self: self.sequence_ratio, per_response=True)
    def policy_loss(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: tuple[Any, Any], mask: Tensor
    ) -> Tensor:
        """max(-s A, -clip(s) A), (B, 1), with s = exp(mean_t (log_probs - old_log_probs))."""
        s = ops.masked_mean(log_probs - old_log_probs, mask).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
        return torch.maximum(-s * advantages, -clamp(s, *clip) * advantages)


@dataclass(frozen=True)
class Papers:
    """Which paper each response is in: K bundles of at most J papers.

    Attributes:
        index: (B,) int64, k J + j; K J for a row in none.
        complete: (K, J) bool, papers with a present response to every question of the bundle.
        questions: (K, 1) int64, questions of each bundle.
    """

    index: Tensor
    complete: Tensor
    questions: Tensor

    def total(self, values: Tensor) -> Tensor:
        """Sum of `values` (B, 1) over the responses of each paper, (K, J); NaN for a paper that is not complete."""
        sums = values.new_zeros(self.complete.numel() + 1).index_add(0, self.index, values.flatten())
        return torch.where(self.complete, sums[:-1].view_as(self.complete), torch.nan)

    def to_rows(self, table: Tensor) -> Tensor:
        """What each response's paper has in `table` (K, J), (B, 1); 0 for a row in no complete paper."""
        known = torch.where(self.complete, table, 0).flatten()
        return torch.cat([known, known.new_zeros(1)])[self.index][:, None]


def bundles_of(groups: Tensor, bundle_size: int) -> Tensor:
    """The bundle of each row, (B,) int64: M groups that follow each other in the order of the rows; -1 for none."""
    return ops.dense_groups(groups)[0] // bundle_size


def compose(groups: Tensor, bundles: Tensor, present: Tensor, keys: Tensor | None = None) -> Papers:
    """The papers of a step; a paper with a response that is not present is dropped, and the others stay as they are.

    Args:
        groups: (B,) question of each row; -1: none.
        bundles: (B,) bundle of each row, the same for all rows of a question; -1: none.
        present: (B,) bool, rows with a reward.
        keys: (B,) numbers by which each question's responses are ordered; None: the rows' own order.
    """
    bundle, count = ops.dense_groups(bundles)
    inside = bundle >= 0
    place = place_in_group(groups, keys)
    width = int(place[inside].max()) + 1 if count else 0
    index = torch.where(inside & present, bundle * width + place, count * width)
    filled = torch.bincount(index, minlength=count * width + 1)[:-1].view(count, width)
    questions = torch.bincount(bundle[inside & (place == 0)], minlength=count)[:, None]
    return Papers(index, filled == questions, questions)


def place_in_group(groups: Tensor, keys: Tensor | None = None) -> Tensor:
    """0, 1, ... among the rows of each group (B,), in the order of `keys` or of the rows."""
    rows = torch.arange(len(groups), device=groups.device)
    order = rows if keys is None else torch.argsort(keys)
    order = order[torch.argsort(groups[order], stable=True)]
    ordered = groups[order]
    return torch.empty_like(rows).scatter_(0, order, rows - torch.searchsorted(ordered, ordered))


def risk(
    z: Tensor, q_down: Tensor, q_up: Tensor, quantile_down: float, quantile_up: float, w_mix: float,
    natural_baseline: bool = True, weights: str = "released",
) -> Tensor:  # fmt: skip
    """The advantage of each paper, (K, J), before any standard deviation.

    Args:
        z: (K, J) scores.
        q_down: (K, 1) lower quantile of the scores.
        q_up: (K, 1) upper quantile.
        quantile_down: a, its level.
        quantile_up: b, its level.
        w_mix: weight of the tail; 0: none.
        natural_baseline: subtract q_u - q_d.
        weights: `released` or `published`.
    """
    g = (z - q_down).clamp(min=0) - (z - q_up).clamp(min=0)
    g = g + q_down - q_up if natural_baseline else g
    tail = -(q_down - z).clamp(min=0)
    if weights == "published":
        return w_mix * tail + g
    return (w_mix * tail / (quantile_down + EPS) + g / (quantile_up - quantile_down + EPS)) / (w_mix + 1)


def spread(z: Tensor) -> Tensor:
    """Sample standard deviation of each bundle's scores, (K, 1); 1 where it is next to nothing or there is one paper."""
    count = (~z.isnan()).sum(1, keepdim=True)
    squares = (z - z.nanmean(1, keepdim=True)).square().nansum(1, keepdim=True)
    return floored((squares / (count - 1).clamp(min=1)).sqrt())


def floored(std: Tensor) -> Tensor:
    """1 where a standard deviation is next to nothing."""
    return torch.where(std <= NO_SPREAD, 1.0, std)


def share_of_credit(rewards: Tensor, groups: Tensor, papers: Papers, credit: str) -> Tensor:
    """The factor of each response on its paper's advantage, (B, 1).

    Args:
        rewards: (B, 1).
        groups: (B,) question of each row with a reward, also of those in no paper; -1: none.
        papers: which paper each row is in.
        credit: `uniform`, `std`, `score` or `sum-mean`.
    """
    if credit == "std":
        return 1 / (floored(ops.group_std(rewards, groups)) + EPS)
    if credit == "score":
        return torch.where(rewards > 0, 0.5, 1.5)
    if credit == "sum-mean":
        lead = rewards - ops.group_mean(rewards, groups)
        total = papers.to_rows(papers.total(lead))
        equal = 1 / papers.to_rows(papers.questions.expand_as(papers.complete)).clamp(min=1)
        none = total.abs() <= NO_SUM
        return torch.where(none, equal, lead / torch.where(none, 1.0, total))
    return torch.ones_like(rewards)


def nearest_level(level: float) -> int:
    """Position in `LEVELS` of the tracked level that is nearest."""
    return int((LEVELS - level).abs().argmin())


def track(tracked: Tensor, z: Tensor, lr_q: float = 0.1) -> Tensor:
    """q_s + lr_q (s - mean 1[z < q_s]) for each level s, (19,), from scores z (n,)."""
    return tracked + lr_q * (LEVELS - (z[:, None] < tracked).double().mean(0))


def report(z: Tensor, q_down: Tensor, q_up: Tensor, log: Log) -> None:
    """Metrics: mean score and quantiles, share of papers in the tail."""
    known = ~z.isnan()
    if not bool(known.any()):
        return
    log("score", z[known].mean())
    log("quantile_down", q_down.expand_as(z)[known].mean())
    log("quantile_up", q_up.expand_as(z)[known].mean())
    log("tail", (z < q_down)[known].double().mean())
