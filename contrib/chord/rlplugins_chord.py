"""CHORD: On-Policy RL Meets Off-Policy Experts: Harmonizing SFT and RL via Dynamic Weighting (arXiv 2508.11408).

Schedule, token weights, shares and the released reduction as in the official code, modelscope/Trinity-RFT,
`trinity/algorithm/policy_loss_fn/chord_policy_loss.py` and `trinity/algorithm/sample_strategy/mix_sample_strategy.py`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import Fraction
from rlplugins.demonstrations import DemonstrationLoader, Demonstrations
from rlplugins.hookspecs import Log
from rlplugins.needs import Need
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import Rollouts, concatenate
from rlplugins.services import Engine
from rlplugins.steps import Run, Step
from rlplugins.update import Batch

KIND = "expert"
COLUMN = "demonstration"
Steps = Annotated[int, Field(ge=0)]


class Chord(Plugin):
    """Trains on expert answers beside the policy's own, in shares that a schedule moves from imitation to reinforcement.

    CHORD (arXiv 2508.11408): L = (1 - mu) L_GRPO + mu L_SFT; expert tokens weigh p (1 - p), p their probability.
    """

    name = "chord"
    kinds = frozenset({KIND})
    assumes = frozenset({"absolute_advantages"})

    demonstrations: Path | None = None
    """JSON Lines file of expert answers, with `prompt` and `response` in every line; None: they stand in `column`."""
    column: str | None = None
    """Field of the prompt file with an expert's answer, where a prompt has one; `demonstration` if no file is given."""
    expert_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the expert answers in the rows of a step, rounded up to whole rows (64 beside 256)."""
    mu_warmup: Steps = 0
    """W: steps in which mu rises from 0 to its peak."""
    mu_decay: Steps = 0
    """D: steps after the warm-up in which mu falls to its valley, along half a cosine."""
    mu_peak: Fraction = 0.1
    """P: mu after the warm-up; without a decay it is never reached."""
    mu_valley: Fraction = 0.1
    """V: mu after the decay."""
    weight: Literal["phi", "none", "is"] = "phi"
    """Weight of an expert token of probability p: p (1 - p), 1, or p."""
    cutoff: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With `phi`: expert tokens more likely than this have no gradient; 1: off."""
    sft_reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean of the expert loss: over all tokens, or over the tokens of each answer and then over answers."""
    global_tokens: bool = True
    """Means over the tokens of the mini-batch; False: of each micro-batch, weighted by its rows, as released."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Largest ratio of a negative advantage in the clipped loss, 3 in later releases; None: the stack's loss as it is."""

    @model_validator(mode="after")
    def _check(self) -> Chord:
        if self.demonstrations is not None and self.column is not None:
            raise ValueError("give demonstrations (a file) or column (a field of the prompt file), not both")
        if self.cutoff < 1 and self.weight != "phi":
            raise ValueError(f"cutoff belongs to the weight phi, not to {self.weight}")
        return self

    @property
    def uses(self) -> dict[str, BuiltinName]:
        """The mean over tokens, and the dual clip if asked for."""
        reduction: dict[str, BuiltinName] = {"reduce_loss": "token_mean"} if self.global_tokens else {}
        return reduction | ({"policy_loss": {"ppo_clip": {"dual_clip": self.dual_clip}}} if self.dual_clip else {})

    @property
    def needs(self) -> tuple[Need, ...]:
        """An engine, groups, the column; means of micro-batches depend on the cut."""
        column = (needs.column(self.column or COLUMN),) if self.demonstrations is None else ()
        return (needs.ENGINE, needs.group_size(at_least=2), *column, *(() if self.global_tokens else (needs.ONE_RANK,)))

    def init_state(self, run: Run) -> dict[str, Any]:
        """The expert answers, and what is left of their epoch."""
        if self.demonstrations is not None:
            return {"loader": DemonstrationLoader(Demonstrations.from_file(self.demonstrations))}
        return {"loader": DemonstrationLoader(Demonstrations.from_column(run.pool, self.column or COLUMN))}

    @hookimpl(trylast=True)
    def extend_rollouts(self, rollouts: Rollouts, engine: Engine, step: Step, log: Log) -> Rollouts:
        """Append the expert answers of the step."""
        count = experts_beside(len(rollouts), self.expert_share)
        log("experts", count)
        if not count:
            return rollouts
        loader = self.state.loader
        index = loader.next(count, step.generator(self))
        return concatenate([rollouts, loader.demonstrations.rows(index, engine, rollouts, KIND)])

    @hookimpl
    def prepare_step(self, step: Step, log: Log) -> None:
        """mu(s); the first step is s = 1."""
        mu = schedule(step.number + 1, self.mu_warmup, self.mu_decay, self.mu_peak, self.mu_valley)
        step.share("mu", mu)
        log("mu", mu)

    @hookimpl(trylast=True)
    def shape_advantages(self, advantages: Tensor, step: Step) -> Tensor:
        """The factor 1 - mu on the policy loss, outside of its mean: that loss is homogeneous in the advantages."""
        return (1 - step.shared["mu"]) * advantages

    @hookimpl
    def select_samples(self, rollouts: Rollouts) -> Tensor:
        """No policy loss, KL, entropy or critic on expert rows."""
        return (~rollouts.of_kind(KIND))[:, None].float()

    @hookimpl
    def prepare_mini_batch(self, batch: Batch) -> None:
        """Expert rows and tokens, over all ranks."""
        expert = batch.of_kind(KIND)
        rows, tokens = batch.sum(torch.stack([expert.sum(), batch["mask"][expert].sum()]))
        batch.share("rows", rows.clamp(min=1))
        batch.share("tokens", tokens.clamp(min=1))

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, mask: Tensor, batch: Batch, log: Log) -> Tensor:
        """mu L_SFT."""
        expert = batch.of_kind(KIND)
        log_probs, mask = log_probs[expert], mask[expert]
        losses = token_losses(log_probs, self.weight, self.cutoff) * mask
        tokens = mask.sum()
        for name, values in (("sft_loss", losses), ("expert_probability", log_probs.exp() * mask)):
            log(name, ops.safe_divide(values.sum(), tokens), tokens)
        return batch.shared["mu"] * self.reduced(losses, mask, batch)

    @hookimpl(when=lambda self: not self.global_tokens)
    def reduce_loss(self, loss: Tensor, loss_weights: Tensor, weights: Tensor, batch: Batch) -> Tensor:
        """Mean over this micro-batch's tokens, times its share of the mini-batch's rows."""
        mean = ops.safe_divide((loss * loss_weights).sum(), loss_weights.sum())
        return mean * weights.sum() / batch.sample_weight

    def reduced(self, losses: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """This micro-batch's part of L_SFT, from the losses (X, T) of its expert rows, 0 outside of the mask."""
        rows = batch.shared["rows"]
        if self.sft_reduction == "sequence_mean":
            return ops.masked_mean(losses, mask).sum() / rows
        if self.global_tokens:
            return losses.sum() / batch.shared["tokens"]
        return ops.safe_divide(losses.sum(), mask.sum()) * len(losses) / rows


def experts_beside(rows: int, share: float) -> int:
    """E such that E is `share` of rows + E, rounded up."""
    return math.ceil(rows * share / (1 - share) - 1e-9)


def schedule(s: int, warmup: int, decay: int, peak: float, valley: float) -> float:
    """mu(s): 0 to the peak in `warmup` steps, to the valley in `decay` further ones."""
    if s < warmup:
        return s / warmup * peak
    if s >= warmup + decay:
        return valley
    return valley + (peak - valley) * (1 + math.cos(math.pi * (s - warmup) / decay)) / 2


def token_losses(log_probs: Tensor, weight: str, cutoff: float = 1.0) -> Tensor:
    """b_t = -min(l_t, log c) w(p_t), without a gradient through w, from the log-probs l (X, T)."""
    p = log_probs.detach().exp()
    w = {"phi": p * (1 - p), "none": torch.ones_like(p), "is": p}[weight]
    return -log_probs.clamp(max=math.log(cutoff)) * w
