"""AEPO: Arbitrary Entropy Policy Optimization (arXiv 2510.08141).

Order of operations and constants as in the official code, 597358816/AEPO, `verl/trainer/ray_trainer.py`. A step has P
prompts and B drawn rows; H is the wanted entropy, h the last one measured, T the temperature of the second generation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.rollouts import POLICY, Columns, Prompts, Requests, Rollouts, concatenate, take
from rlplugins.services import Engine
from rlplugins.steps import Run

KIND = "controller"
SHARE = 4  # one prompt of so many is drawn a second time
STD_EPS = 1e-6

Finite = Annotated[float, Field(allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Aepo(Plugin):
    """Holds the entropy near a target by training on good samples of a higher or lower temperature.

    Arbitrary Entropy Policy Optimization (arXiv 2510.08141): no entropy term in the loss; the samples take the place of
    some of the step's own.
    """

    name = "aepo"
    kinds = frozenset({KIND})
    needs = (needs.ENGINE, needs.group_size(at_least=2))
    assumes = frozenset({"absolute_advantages", "single_entropy"})
    breaks = frozenset({"whole_groups"})

    H: Finite = 0.5
    """Wanted entropy, in nats per token; 0.5 is the authors' script, 0.75 their best published value."""
    T_hi: Temperature = 1.2
    """Temperature of the second generation while the last entropy was at most H."""
    T_lo: Temperature = 0.8
    """Temperature of the second generation while it was above H."""
    N: Annotated[int, Field(ge=0)] = 60
    """At most so many of its samples are trained (half as many while the entropy is above H); 0: none is drawn."""
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    """A sample is good if its advantage among those of its prompt is above this."""

    @model_validator(mode="after")
    def _check_temperatures(self) -> Aepo:
        if self.T_lo > self.T_hi:
            raise ValueError(f"T_lo {self.T_lo:g} is above T_hi {self.T_hi:g}")
        return self

    def init_state(self, run: Run) -> dict[str, Any]:
        """h, the entropy of the rows that were trained last."""
        return {"entropy": 0.0}

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine, log: Any) -> Rollouts:
        """Add good samples of a second generation."""
        first = first_rows(rollouts)
        first = first[: len(first) // SHARE]
        first = first[rollouts.prompt_rows[first] >= 0]  # the pool's own prompts, which can be sent again
        if not self.N or not len(first):
            return rollouts
        h = self.state.entropy
        drawn, prompt = self._second(rollouts, first, prompts, engine)
        good = selected(drawn.scores, prompt.to(drawn.scores.device), self.threshold)
        k = places(len(good), h, self.H, self.N)
        log("temperature", self.temperature(h))
        log("good", len(good))
        log("replaced", k)
        if not k:
            return rollouts
        added = drawn.select(good[:k])
        return concatenate([rollouts, as_controller(added, rollouts, first[prompt[good[:k].to(prompt.device)]])])

    def temperature(self, entropy: float) -> float:
        """T = T_hi if h <= H, else T_lo."""
        return self.T_hi if entropy <= self.H else self.T_lo

    def _second(self, rollouts: Rollouts, first: Tensor, prompts: Prompts, engine: Engine) -> tuple[Rollouts, Tensor]:
        """As many responses at temperature T as there are of the prompts of these rows, and which prompt's each is."""
        counts = drawn_sizes(rollouts)[first].cpu()
        chosen = prompts.select(prompts.positions(rollouts.prompt_rows[first]))
        requests = Requests.of(chosen, counts)
        sampling = engine.sampling(len(requests))
        hot = torch.full_like(sampling.temperature, self.temperature(self.state.entropy))
        return engine.generate(requests, replace(sampling, temperature=hot)), requests.prompt

    @hookimpl
    def shape_advantages(self, advantages: Tensor, rollouts: Rollouts) -> Tensor:
        """1 on the samples that were added, which is REINFORCE on correct ones."""
        return torch.where(rollouts.of_kind(KIND)[:, None], 1.0, advantages)

    @hookimpl
    def select_samples(self, advantages: Tensor, rollouts: Rollouts) -> Tensor:
        """0 for the first rows of the step, as many as were added, so that as many as before are trained."""
        main = rollouts.of_kind(POLICY)
        replaced = main & (main.cumsum(0) <= rollouts.of_kind(KIND).sum())
        return (~replaced)[:, None].to(advantages.dtype)

    @hookimpl
    def on_step_end(self, rollouts: Rollouts, weights: Tensor, mask: Tensor, log: Any) -> None:
        """h = - sum m log pi / sum m over the rows that were trained; stays if there is none."""
        trained = mask & (weights > 0)
        if bool(trained.any()):
            assert rollouts.old_log_probs is not None
            self.state.entropy = sampled_entropy(rollouts.old_log_probs, trained)
        log("entropy", self.state.entropy)


def sampled_entropy(log_probs: Tensor, mask: Tensor) -> float:
    """h: minus the mean log-prob of the tokens drawn, log_probs and mask (B, T)."""
    return -float((log_probs * mask).sum(dtype=torch.float64) / mask.sum())


def controller_advantages(scores: Tensor, group: Tensor) -> Tensor:
    """C (n, 1): reward minus mean, over the unbiased std plus 1e-6, among the finite scores (n, 1) of each group (n,)."""
    groups = torch.where(scores.flatten().isfinite(), group, -1)
    scores = torch.nan_to_num(scores, 0.0, 0.0, 0.0)
    centred = torch.where(groups[:, None] >= 0, scores - ops.group_mean(scores, groups), 0.0)
    return centred / (ops.group_std(scores, groups) + STD_EPS)


def selected(scores: Tensor, group: Tensor, threshold: float = 0.05) -> Tensor:
    """S: the rows with C above the threshold, in their order, (|S|,) int64."""
    return (controller_advantages(scores, group).flatten() > threshold).nonzero().flatten()


def places(good: int, entropy: float, H: float, N: int) -> int:
    """k = min(N, |S|), half of it (rounded down) while the entropy is above H."""
    k = min(N, good)
    return k if entropy <= H else k // 2


def drawn_rows(rollouts: Rollouts) -> Tensor:
    """Rows that the policy drew for a prompt of the step, (B,) bool."""
    return rollouts.of_kind(POLICY) & (rollouts.groups >= 0)


def drawn_sizes(rollouts: Rollouts) -> Tensor:
    """How many rows the policy drew for each row's prompt, (B,) int64."""
    return ops.group_sizes(torch.where(drawn_rows(rollouts), rollouts.groups, -1))


def first_rows(rollouts: Rollouts) -> Tensor:
    """The first row of each prompt of the step, in the order in which the prompts come, (P,) int64."""
    rows = drawn_rows(rollouts).nonzero().flatten()
    dense, count = ops.dense_groups(rollouts.groups[rows])
    first = torch.full((count,), len(rows), device=rows.device)
    return rows[first.scatter_reduce(0, dense, torch.arange(len(rows), device=rows.device), "amin")]


def as_controller(added: Rollouts, rollouts: Rollouts, like: Tensor) -> Rollouts:
    """Rows of the second generation as rows of their own kind and of no group, with the columns of the step's rows.

    Args:
        added: k rows.
        rollouts: the step's own.
        like: (k,) a row of the same prompt for each, which gives what other plugins wrote about the prompt.
    """
    columns = {name: added.columns[name] if name in added.columns else take(column, like)
               for name, column in rollouts.columns.items()}  # fmt: skip
    return replace(
        added.unguarded(), kinds=(POLICY, KIND), kind=torch.ones_like(added.kind), columns=Columns(columns),
        groups=torch.full_like(added.groups, -1),
    )  # fmt: skip
