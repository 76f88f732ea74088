"""D3S: Dynamic Dual-Level Down-Sampling (arXiv 2509.22115).

Sample rule, token key and schedule as in the paper; its code is not public. Rounding, ties and the numbers of the
schedule are reconstructed, see the README.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.rollouts import Rollouts
from rlplugins.steps import Run, Step

TIE = 1e-12  # variances nearer than this times the largest squared advantage are tied
HALF = 0.5 + 1e-9  # a half that the schedule's arithmetic made a little too small still rounds up

Responses = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class D3s(Plugin):
    """Trains on the rollouts whose advantages vary most, and on their tokens with the largest |advantage| x entropy.

    Dynamic Dual-Level Down-Sampling (arXiv 2509.22115); how much is kept grows linearly during the run.
    """

    name = "d3s"
    needs = (needs.group_size(at_least=2),)
    assumes = frozenset({"absolute_advantages"})
    breaks = frozenset({"whole_groups"})

    n_init: Responses | None = None
    """Responses kept per group in the first step, on average over groups; None: a quarter of the run's group size."""
    n_final: Responses | None = None
    """Responses kept per group at the end; None: the run's group size, all of them."""
    k_init: Share = 0.2
    """Share of the kept responses' tokens that is trained in the first step."""
    k_final: Share = 1.0
    """Share of the kept responses' tokens that is trained at the end."""
    scope: Literal["batch", "group"] = "batch"
    """Choose responses among all of the step, or (D3S-I) the same number in every group."""
    token_scope: Literal["batch", "response"] = "batch"
    """Choose tokens among all kept responses of the step, or the same share of every kept response."""

    def init_state(self, run: Run) -> dict[str, Any]:
        """The steps done, and the run's group size, on which defaults depend."""
        return {"progress_step": 0, "group_size": run.group_size}

    @hookimpl
    def select_samples(
        self, advantages: Tensor, groups: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Any
    ) -> Tensor:
        per_response = (ops.masked_mean(advantages, mask) if advantages.shape[1] > 1 else advantages).flatten()
        available = (groups >= 0) & per_response.isfinite()
        n_s = self.responses_per_group(step)
        if self.scope == "group":
            within, sizes = ops.dense_groups(torch.where(available, groups, -1))[0], n_s
        else:
            within, sizes = torch.where(available, 0, -1), n_s * number_of_groups(groups, rollouts.groups)
        kept = most_varied(per_response, within, sizes)
        log("samples_per_group", n_s)
        log("samples", kept.sum() / available.sum().clamp(min=1))
        log("useful_samples", (kept & (per_response != 0)).sum() / kept.sum().clamp(min=1))
        return kept[:, None].float()

    @hookimpl(when=lambda self: min(self.k_init, self.k_final) < 1)
    def select_tokens(
        self, advantages: Tensor, weights: Tensor, groups: Tensor, entropy: Tensor, mask: Tensor, step: Step, log: Any
    ) -> Tensor:
        valid = mask & ((weights.flatten() > 0) & (groups >= 0))[:, None]
        share = self.token_share(step)
        log("token_share", share)
        kept = valid if share == 1 else most_telling(advantages, entropy, valid, share, self.token_scope)
        return ops.as_numbers(kept)

    @hookimpl
    def on_step_end(self) -> None:
        self.state.progress_step = self.state.progress_step + 1

    def responses_per_group(self, step: Step) -> int:
        """N_s: responses to keep per group in this step."""
        size = self.state.group_size
        first = self.n_init if self.n_init is not None else size / 4
        last = self.n_final if self.n_final is not None else size
        return math.floor(self.scheduled(first, last, step) + HALF)

    def token_share(self, step: Step) -> float:
        """K: share of the kept responses' tokens to train in this step."""
        return self.scheduled(self.k_init, self.k_final, step)

    def scheduled(self, first: float, last: float, step: Step) -> float:
        """(1 - p) first + p last, p the fraction of the run's steps that are done."""
        p = min(1.0, self.state.progress_step / max(1, step.total_steps))
        return (1 - p) * first + p * last


def number_of_groups(groups: Tensor, prompts: Tensor) -> int:
    """M: groups of the step, `groups` (B,); a group of `prompts` (B,) of which no response was scored still counts."""
    drawn, scored = prompts[prompts >= 0].unique(), prompts[(groups >= 0) & (prompts >= 0)].unique()
    return len(groups[groups >= 0].unique()) + len(drawn) - len(scored)


def most_varied(advantages: Tensor, groups: Tensor, size: int) -> Tensor:
    """In each group the `size` rows (or all) whose advantages have the largest population variance, (B,) bool.

    The best subset is always the k lowest and the size - k highest for some k, and prefix sums give every k at once.
    Equal advantages are ordered by row; the smallest k wins unless a larger one is better by more than rounding.

    Args:
        advantages: (B,).
        groups: (B,) int64, small numbers; -1: not available.
        size: responses to keep per group.
    """
    kept = torch.zeros_like(groups, dtype=torch.bool)
    rows = (groups >= 0).nonzero().flatten()
    if not len(rows):
        return kept
    rows = rows[torch.argsort(advantages[rows], stable=True)]
    rows = rows[torch.argsort(groups[rows], stable=True)]  # by group, then by advantage, then by row
    members = torch.bincount(groups[rows])
    starts = members.cumsum(0) - members
    place = torch.arange(len(rows), device=rows.device) - starts[groups[rows]]
    ordered = advantages.new_zeros((len(members), int(members.max())), dtype=torch.float64)
    ordered[groups[rows], place] = advantages[rows].double()
    lowest = extreme_split(ordered, members[:, None], size)[groups[rows], 0]
    rest = members[groups[rows]] - size + lowest  # places from here on are among the highest
    kept[rows] = (place < lowest) | (place >= rest)
    return kept


def extreme_split(ordered: Tensor, members: Tensor, size: int) -> Tensor:
    """k (S, 1) for which the k lowest and size - k highest of each line have the largest variance.

    Args:
        ordered: (S, L) float64, each line ascending in its first `members` entries, 0 behind them.
        members: (S, 1) int64.
        size: how many to choose; all of a line that has fewer.
    """
    width = ordered.shape[1]
    chosen = members.clamp(max=size)
    tie = TIE * ordered.square().amax(1, keepdim=True)
    there = torch.arange(width, device=ordered.device) < members
    centred = (ordered - ordered.sum(1, keepdim=True) / members.clamp(min=1)) * there  # the variance ignores a shift
    k = torch.arange(width + 1, device=ordered.device).expand(len(ordered), -1)
    rest = (members - chosen + k).clamp(max=width)  # where the size - k highest begin
    mean = split_sums(centred, rest) / chosen.clamp(min=1)
    variance = split_sums(centred.square(), rest) / chosen.clamp(min=1) - mean.square()
    variance = torch.where(k <= chosen, variance, -torch.inf)
    best = variance.cummax(1).values
    better = torch.searchsorted(best, variance + tie, right=True)  # the first k that beats this one by more than a tie
    better = torch.where(better <= width, better, k)
    for _ in range(width.bit_length()):  # from k = 0 to the last of these steps, twice as far each time
        better = better.gather(1, better)
    return better[:, :1]


def split_sums(values: Tensor, rest: Tensor) -> Tensor:
    """For k = 0..L the sum of each line's (S, L) first k values and of those from `rest` (S, L + 1) on."""
    sums = torch.nn.functional.pad(values.cumsum(1), (1, 0))
    return sums + sums[:, -1:] - sums.gather(1, rest)


def most_telling(advantages: Tensor, entropy: Tensor, valid: Tensor, share: float, token_scope: str) -> Tensor:
    """The `share` of the valid tokens with the largest |A| H, at least one if there is any, (B, T) bool.

    Equal keys are taken in the order of rows and positions.

    Args:
        advantages: (B, 1) or (B, T).
        entropy: (B, T), in nats.
        valid: (B, T) bool, tokens to choose from.
        share: in (0, 1].
        token_scope: `batch`: the share of all valid tokens; `response`: of each row's.
    """
    kept = torch.zeros_like(valid)
    rows = ops.lengths(valid).flatten().nonzero().flatten()
    if not len(rows):
        return kept
    valid = valid[rows]
    keys = entropy[rows].float() * advantages[rows].float().abs()
    keys.masked_fill_(~valid, -torch.inf)
    if token_scope == "response":
        wanted = rounded_share(share, valid.sum(1, keepdim=True))
        least = keys.sort(1, descending=True).values.gather(1, wanted - 1)
        missing = wanted - (keys > least).sum(1, keepdim=True)
    else:
        pool = ops.masked_values(keys, valid)
        wanted = rounded_share(share, torch.tensor(len(pool), device=pool.device))
        least = ops.kth_smallest(pool, len(pool) - int(wanted) + 1)
        tied = ops.lengths(keys == least).long()
        missing = wanted - (pool > least).sum() - (tied.cumsum(0) - tied)  # less what earlier rows took
    kept[rows] = (keys > least) | first_of_row(keys == least, missing)
    return kept


def rounded_share(share: float, count: Tensor) -> Tensor:
    """Half up, at least one."""
    return (share * count.double() + HALF).floor().long().clamp(min=1)


def first_of_row(tied: Tensor, wanted: Tensor) -> Tensor:
    """The first `wanted` (B, 1) of the true entries of each row (B, T)."""
    kept = tied & (wanted > 0)
    cut = (kept.sum(1, keepdim=True) > wanted).flatten().nonzero().flatten()
    kept[cut] &= tied[cut].cumsum(1) <= wanted[cut]
    return kept
