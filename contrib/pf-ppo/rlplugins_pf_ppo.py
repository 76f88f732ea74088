"""PF-PPO: Policy Filtration for RLHF to Mitigate Noise in Reward Models (2024; arXiv 2409.06957).

Choice of ranks and ties as in the official code, swtheing/PF-PPO-RLHF, `openrlhf/trainer/ppo_utils/replay_buffer.py`
(re-weighting) and `openrlhf_filter/trainer/ppo_trainer.py` (filtering). A prompt has N responses; rank 1 has the largest
reward R, and the filtered policy draws one response with probability w by rank.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import HookError
from rlplugins.rollouts import Rollouts
from rlplugins.steps import Step

CONSTANT = 1e-12  # a spread that is smaller, relative to the largest value, is rounding

Mode = Literal["none", "bon", "br", "bw"]


class PfPpo(Plugin):
    """Trains on the best response of each prompt and its worst, or a random other: a reward model errs least there.

    PF-PPO (arXiv 2409.06957): advantages are those of all responses; the ranks decide which of them count.
    """

    name = "pf-ppo"

    mode: Mode = "bw"
    """Which ranks count: best and worst (`bw`), best and one other (`br`), the best (`bon`), or all (`none`)."""
    br: Literal["sample", "expected"] = "sample"
    """The other of `br`: drawn at random, or all others with a weight of 1 / (N - 1)."""
    resample: bool = False
    """Draw as many rows as there are, with replacement, by w, as the released buffer does, in the place of weights."""
    drop: bool = False
    """Drop the other rows before the log-prob passes, as the filter release does; advantages are then GAE's."""
    true_scores: str | None = None
    """Component of the score that is right (unit tests): how well rewards predict it is logged for every mode."""
    bins: Annotated[int, Field(ge=1)] | None = None
    """Average so many runs of responses of similar reward before that fit; None: every response is a point."""

    @model_validator(mode="after")
    def _check_drop(self) -> PfPpo:
        if self.drop and (self.resample or self.mode == "none" or (self.mode == "br" and self.br == "expected")):
            raise ValueError("drop is for weights of 0 and 1: mode bon, bw, or br with br: sample, without resample")
        return self

    @property
    def uses(self) -> dict[str, str]:
        """A group's baseline would be formed from the rows that are left."""
        return {"compute_advantages": "gae"} if self.drop else {}

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """Responses to be ranked; the components, if one of them is the true score."""
        ranked = needs.group_size(at_least=2)
        return (ranked,) if self.true_scores is None else (ranked, needs.column("components"))

    @property
    def assumes(self) -> frozenset[str]:
        """Ranks are among all that was drawn for a prompt."""
        return frozenset() if self.drop or self.mode == "none" else frozenset({"complete_groups"})

    @property
    def breaks(self) -> frozenset[str]:
        """Unless every row keeps some weight."""
        every = self.mode == "none" or (self.mode == "br" and self.br == "expected")
        parts = {"whole_groups": not every or self.resample, "complete_groups": self.drop}
        return frozenset(fact for fact, broken in parts.items() if broken)

    @hookimpl(when=lambda self: self.drop)
    def filter_rollouts(self, scores: Tensor, groups: Tensor, rollouts: Rollouts, step: Step, log: Any) -> Tensor:
        return self.weights(scores, groups, rollouts, step, log)

    @hookimpl(when=lambda self: not self.drop)
    def select_samples(self, groups: Tensor, rollouts: Rollouts, step: Step, log: Any) -> Tensor:
        prompts = torch.where(groups >= 0, rollouts.groups, -1)  # of those whose reward is finite
        return self.weights(rollouts.scores, prompts, rollouts, step, log)

    def weights(self, scores: Tensor, prompts: Tensor, rollouts: Rollouts, step: Step, log: Any) -> Tensor:
        """How often each row counts, (B, 1), by its raw score (B, 1) among those of its prompt (B,)."""
        prompts = torch.where(scores.flatten().isfinite(), prompts, -1)
        if self.true_scores is not None:
            self._log_fit(scores, prompts, self._truth(rollouts), log)
        source = step.generator(self)
        companion = None
        if self.mode == "br" and self.br == "sample" and not self.resample:
            companion = random_others(scores, prompts, source)
        weights = rank_weights(scores, prompts, self.mode, companion)
        if self.resample:
            weights = drawn(weights, int((prompts >= 0).sum()), source)
        log("kept", ((weights > 0).flatten() & (prompts >= 0)).sum() / (prompts >= 0).sum().clamp(min=1))
        return weights

    def _truth(self, rollouts: Rollouts) -> Tensor:
        """The true scores, (B, 1)."""
        names = rollouts.component_names
        if self.true_scores not in names:
            hook = "filter_rollouts" if self.drop else "select_samples"
            raise HookError(self.name, hook, f"true_scores: the reward function gives no component {self.true_scores!r}; "
                            f"it gives: {', '.join(names) or 'none'}")  # fmt: skip
        components = rollouts.components
        assert components is not None
        return components[:, names.index(self.true_scores), None]

    def _log_fit(self, scores: Tensor, prompts: Tensor, truth: Tensor, log: Any) -> None:
        modes: tuple[Mode, ...] = ("none", "bon", "br", "bw")
        for mode in modes:
            log(f"r2_{mode}", r_squared(scores, truth, rank_weights(scores, prompts, mode), self.bins))


def extremes(scores: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """The worst and the best row of each prompt, (B,) bool each; of equal ones the first is the worst, the last the best.

    Args:
        scores: (B, 1).
        prompts: (B,) int64; -1: takes no part.
    """
    order = torch.argsort(scores.flatten(), stable=True)
    order = order[torch.argsort(prompts[order], stable=True)]  # by prompt, then by score, then by row
    ordered = prompts[order]
    change = ordered[1:] != ordered[:-1]
    edge = torch.ones(min(1, len(ordered)), dtype=torch.bool, device=prompts.device)
    worst, best = torch.zeros((2, len(prompts)), dtype=torch.bool, device=prompts.device)
    worst[order[torch.cat([edge, change])]] = True
    best[order[torch.cat([change, edge])]] = True
    return worst & (prompts >= 0), best & (prompts >= 0)


def random_others(scores: Tensor, prompts: Tensor, source: torch.Generator) -> Tensor:
    """One row of each prompt, not its best, every one equally likely, (B,) bool."""
    _, best = extremes(scores, prompts)
    others = (prompts >= 0) & ~best
    keys = torch.rand(len(prompts), generator=source, dtype=torch.float64).to(scores.device)
    largest = ops.group_extreme(torch.where(others, keys, torch.nan)[:, None], prompts).flatten()
    return others & (keys == largest)


def rank_weights(scores: Tensor, prompts: Tensor, mode: Mode, companion: Tensor | None = None) -> Tensor:
    """2 w (`br`, `bw`), w (`bon`) or 1 (`none`) of each row, (B, 1), 0 for rows that take no part.

    Args:
        scores: (B, 1).
        prompts: (B,) int64; -1: takes no part.
        mode: which ranks count.
        companion: (B,) bool, for `br` the row that counts beside each prompt's best; None: its expectation.
    """
    worst, best = extremes(scores, prompts)
    ranked = prompts >= 0
    if mode == "none":
        weights = ranked.float()
    elif mode == "bon":
        weights = best.float()
    elif mode == "bw":
        weights = (best | worst).float()
    elif companion is not None:
        weights = (best | companion).float()
    else:
        others = (ops.group_sizes(prompts) - 1).clamp(min=1)
        weights = torch.where(best, 1.0, ranked / others)
    return weights[:, None]


def drawn(weights: Tensor, count: int, source: torch.Generator) -> Tensor:
    """How often each row comes, (B, 1), if `count` are drawn with replacement in proportion to the weights (B, 1)."""
    edges = weights.flatten().double().cpu().cumsum(0)
    points = torch.rand(count, generator=source, dtype=torch.float64) * edges[-1:]
    rows = torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)
    return torch.bincount(rows, minlength=len(weights))[:, None].to(weights)


def r_squared(rewards: Tensor, truth: Tensor, weights: Tensor, bins: int | None = None) -> Tensor:
    """R^2 of the weighted least-squares fit truth = a + b rewards, a 0-d float64; 0 if either is constant.

    Args:
        rewards: (B, 1).
        truth: (B, 1).
        weights: (B, 1); rows of weight 0 or without finite numbers take no part.
        bins: sort by reward, cut into so many runs of equal length (the first ones a row longer), and fit their means.
    """
    kept = ((weights > 0) & rewards.isfinite() & truth.isfinite()).flatten()
    R, s, w = (column.flatten()[kept].double() for column in (rewards, truth, weights))
    if bins is not None and len(R):
        R, s, w = run_means(R, s, w, min(bins, len(R)))
    if is_constant(R) or is_constant(s):
        return R.new_zeros(())
    R, s = R - (w * R).sum() / w.sum(), s - (w * s).sum() / w.sum()
    b = (w * R * s).sum() / (w * R.square()).sum()
    return 1 - (w * (s - b * R).square()).sum() / (w * s.square()).sum()


def run_means(R: Tensor, s: Tensor, w: Tensor, runs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of R and s (n,) over so many runs of similar R, and a weight of 1 for each, (runs,) each."""
    order = torch.argsort(R, stable=True)
    place = torch.arange(runs, device=R.device)
    run = torch.repeat_interleave(place, len(R) // runs + (place < len(R) % runs))
    columns = torch.stack([w, w * R, w * s])[:, order]
    total, R_sum, s_sum = columns.new_zeros((3, runs)).index_add_(1, run, columns)
    return R_sum / total, s_sum / total, torch.ones_like(total)


def is_constant(values: Tensor) -> bool:
    """Whether there is no spread beyond rounding, as of no values."""
    return not len(values) or bool(values.max() - values.min() <= CONSTANT * values.abs().max())
