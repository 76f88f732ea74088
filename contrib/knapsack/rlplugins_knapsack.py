"""Knapsack RL: rollouts per prompt by their value for learning (2025; arXiv 2509.25849).

There is no official code; the equations are the paper's. For prompt i with success rate p_i and N_i rollouts:
maximise sum_i Value(N_i, p_i) subject to sum_i N_i <= N_tot and N_lo <= N_i <= N_up.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.rollouts import POLICY, Prompts, Rollouts
from rlplugins.steps import Run

UNKNOWN = float("nan")
CANDIDATES = 4  # gains per prompt that are listed and sorted; the search narrows the table down to so many


class Knapsack(Plugin):
    """Gives each prompt as many rollouts as its remembered success rate makes worth their cost.

    Knapsack RL (arXiv 2509.25849).
    """

    name = "knapsack"
    needs = (needs.group_size(at_least=2),)
    breaks = frozenset({"equal_groups"})

    N_lo: Annotated[int, Field(ge=2)] = 2
    """Fewest rollouts of a prompt."""
    N_up: Annotated[int, Field(ge=2)] = 128
    """Most rollouts of a prompt."""
    threshold: float = 0.5
    """A rollout whose raw score is above this is a success."""
    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """A rollout that adds no more value than this is left over; what is left over goes to prompts with p = 0 first."""

    @model_validator(mode="after")
    def _check_bounds(self) -> Knapsack:
        if self.N_lo > self.N_up:
            raise ValueError(f"N_lo {self.N_lo} is above N_up {self.N_up}")
        return self

    def init_state(self, run: Run) -> dict[str, Any]:
        """The success rate at each prompt's last visit; NaN before the first."""
        run.table.add_column("rate", torch.float64, UNKNOWN)
        return {}

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts, budget: int, log: Callable[..., None]) -> Tensor:
        rates = self.table["rate"][prompts.rows]
        if len(prompts) * self.N_lo > budget:
            warnings.warn(
                f"knapsack: {budget} rollouts are too few for {len(prompts)} prompts with at least {self.N_lo} each; "
                "every prompt gets the same",
                stacklevel=2,
            )
        counts = allocate(rates, budget, self.N_lo, self.N_up, self.min_gain)
        known = ~rates.isnan()
        log("known", known.double().mean())
        log("value", value(counts[known], rates[known]).sum())
        log("largest", counts.max().double())
        log("unspent", float(max(0, budget - int(counts.sum()))))
        return counts

    @hookimpl
    def on_step_end(self, scores: Tensor, rollouts: Rollouts, log: Callable[..., None]) -> None:
        rows, score = rollouts.prompt_rows.cpu(), scores.flatten().cpu()
        counted = rollouts.of_kind(POLICY).cpu() & (rows >= 0) & score.isfinite()
        visited, place = torch.unique(rows[counted], return_inverse=True)
        if not len(visited):
            return
        successes = torch.bincount(place, (score[counted] > self.threshold).double())
        rates = successes / torch.bincount(place)
        self.table["rate"][visited] = rates
        log("rate", rates.mean(), len(visited))
        log("mixed_groups", ((rates > 0) & (rates < 1)).double().mean(), len(visited))


def nonzero_probability(N: Tensor | int, p: Tensor) -> Tensor:
    """P_nz(N, p) = 1 - p^N - (1 - p)^N: the probability that N rollouts have both outcomes."""
    return 1 - p**N - (1 - p) ** N


def info_gain(p: Tensor) -> Tensor:
    """InfoGain(p) = p (1 - p)^2: how much one policy-gradient step adds to p, to first order."""
    return p * (1 - p) ** 2


def value(N: Tensor | int, p: Tensor) -> Tensor:
    """Value(N, p) = P_nz(N, p) InfoGain(p)."""
    return nonzero_probability(N, p) * info_gain(p)


def gain(N: Tensor | int, p: Tensor) -> Tensor:
    """Value(N + 1, p) - Value(N, p) = InfoGain(p) (p^N (1 - p) + (1 - p)^N p); falls with N.

    The difference of two values would round to 0 for the larger N.
    """
    return info_gain(p) * (p**N * (1 - p) + (1 - p) ** N * p)


def rollouts_to_both(p: Tensor) -> Tensor:
    """Expected number of rollouts until both outcomes have been seen: 1/p + 1/(1 - p) - 1."""
    return 1 / p + 1 / (1 - p) - 1


def allocate(rates: Tensor, N_tot: int, N_lo: int = 2, N_up: int = 128, min_gain: float = 0.0) -> Tensor:
    """Rollouts of each prompt, (M,) int64, that maximise the total value; ties go to the lower index.

    Args:
        rates: p, (M,); NaN where it is not known.
        N_tot: rollouts to give out.
        N_lo: fewest of a prompt, as long as `N_tot` suffices for that; else all get the same, one at least.
        N_up: most of a prompt.
        min_gain: rollouts that add no more than this are left over. They go to prompts with p = 0, then to those
            between, with p = 1, and unknown ones, one each in turn; what is left when all have `N_up` is not spent.
    """
    prompts, rates = len(rates), rates.double()
    if prompts * N_lo > N_tot:
        return torch.full((prompts,), max(1, N_tot // prompts))
    unknown = rates.isnan()
    counts = torch.where(unknown, min(N_up, max(N_lo, N_tot // prompts)), N_lo)
    interior = (rates > 0) & (rates < 1)
    spare = N_tot - int(counts.sum())
    counts[interior] += most_valuable(rates[interior], spare, N_lo, N_up, min_gain)
    for members in (rates == 0, interior, rates == 1, unknown):
        counts[members] += in_turn(N_up - counts[members], N_tot - int(counts.sum()))
    return counts


def most_valuable(p: Tensor, spare: int, N_lo: int, N_up: int, min_gain: float) -> Tensor:
    """How many of the `spare` largest gains above `min_gain`, N_lo <= N < N_up, each p in (0, 1) has, (M,) int64.

    Gains fall with N, so this is what giving one rollout after the other to the largest gain leads to. The threshold
    between taken and not taken is found by bisection until few gains are left near it; only these are made and sorted.
    """
    fewest = torch.full((len(p),), N_lo)
    most = steps_above(p, min_gain, fewest, torch.full((len(p),), N_up))
    if int((most - fewest).sum()) <= spare:
        return most - fewest
    above = float(gain(N_lo, p).max())
    below = max(min_gain, float(gain(most - 1, p)[most > N_lo].min()))
    while int((most - fewest).sum()) > CANDIDATES * len(p):
        threshold = above**0.5 * below**0.5  # on a log scale
        if not below < threshold < above:
            break
        steps = steps_above(p, threshold, fewest, most)
        if int(steps.sum()) - N_lo * len(p) <= spare:
            fewest, above = steps, threshold
        else:
            most, below = steps, threshold
    open_steps = most - fewest
    prompt = torch.repeat_interleave(torch.arange(len(p)), open_steps)
    first = torch.repeat_interleave(open_steps.cumsum(0) - open_steps, open_steps)
    N = fewest[prompt] + torch.arange(len(prompt)) - first
    order = torch.argsort(gain(N, p[prompt]), descending=True, stable=True)
    taken = order[: spare - int((fewest - N_lo).sum())]
    return fewest - N_lo + torch.bincount(prompt[taken], minlength=len(p))


def steps_above(p: Tensor, threshold: float, low: Tensor, high: Tensor) -> Tensor:
    """The smallest N in low..high (M,) whose gain is not above the threshold, `high` if all are; by bisection."""
    while bool((low < high).any()):
        middle = (low + high) // 2
        above = gain(middle, p) > threshold
        low, high = torch.where(above & (low < high), middle + 1, low), torch.where(above, high, middle)
    return low


def in_turn(room: Tensor, spare: int) -> Tensor:
    """What each gets, (M,) int64, if `spare` are given out one each in turn to all that still have room (M,)."""
    if not len(room) or spare <= 0:
        return torch.zeros_like(room)
    given = torch.bincount(room).flip(0).cumsum(0).flip(0)[1:]  # in round 1, 2, ...: all whose room reaches so far
    rounds = int(torch.searchsorted(given.cumsum(0), spare, right=True))
    rest = spare - int(given[:rounds].sum())
    waiting = room > rounds
    return room.clamp(max=rounds) + (waiting & (waiting.cumsum(0) <= rest))
