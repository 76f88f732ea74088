"""GTPO: Group-relative Trajectory-based Policy Optimization (Simoni et al. 2025, arXiv 2508.03772).

Conflict tokens, constants and the loss as in the official code, winstonsmith1897/GTPO, `gtpo/gtpo_training.py`; the
entropy rule as in the formula of its README. Not the GTPO of arXiv 2508.04349.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.rollouts import Rollouts
from rlplugins.steps import Step

ROUNDING = 1e-6  # a reward this near to the mean of its group, relative to its largest, equals it: float32 rounding
BLOCK = 64  # positions that are looked at first when runs are followed


class Gtpo(Plugin):
    """Spares tokens that rewarded and penalised responses share, and drops and penalises responses of high entropy.

    Group-relative Trajectory-based Policy Optimization (arXiv 2508.03772): no division by the standard deviation, no
    clip and no reference model.
    """

    name = "gtpo"
    uses = {"baseline": "group_mean", "advantage_scale": "one", "reduce_loss": "sequence_mean", "kl_penalty": "none"}
    needs = (needs.group_size(at_least=2),)
    assumes = frozenset({"response_rewards", "absolute_advantages"})
    breaks = frozenset({"token_ratio"})

    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    """Factor on a response's mean entropy, which is subtracted from its advantage."""
    entropy_threshold: Annotated[float, Field(gt=0)] = math.log(2)
    """Largest mean entropy of a response that is trained, in nats; the released code has 0.7."""
    w_pos: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Factor on the conflict tokens of rewarded responses."""
    combine: Literal["product", "max"] = "product"
    """A conflict token counted from both ends gets the factor twice (the released code), or once."""
    always_filter: bool = False
    """Drop by entropy also if the model started above the threshold, as released."""
    divide_by_conflicts: bool = False
    """Divide each response's loss by the number of its conflict tokens and sum over responses, as released."""

    def init_state(self, run: Any) -> dict[str, Any]:
        """The mean entropy of the first step's responses; None before it."""
        return {"initial_entropy": None}

    @hookimpl
    def shape_advantages(
        self, advantages: Tensor, rewards: Tensor, groups: Tensor, entropy: Tensor, rollouts: Rollouts, mask: Tensor,
        step: Step, log: Any,
    ) -> Tensor:  # fmt: skip
        grouped = groups >= 0
        lengths = ops.lengths(mask)
        h = ops.masked_sum(entropy, mask) / lengths.clamp(min=1)
        step.share("initial_entropy", self.initial_entropy(h[grouped]))
        kept = h <= self.threshold(step.shared["initial_entropy"])
        pos, neg = reward_signs(rewards, groups)
        forward, backward = conflict_runs(rollouts.responses, mask, pos, neg, groups)
        conflicts = torch.minimum(forward + backward, lengths)
        shaped = kept * (advantages - self.gamma * h)
        if self.divide_by_conflicts:
            shaped = shaped / conflicts.clamp(min=1)
        log("entropy", h[grouped].sum() / grouped.sum().clamp(min=1))
        log("filtered", (~kept[grouped]).sum() / grouped.sum().clamp(min=1))
        log("conflict_tokens", conflicts.sum() / lengths.sum().clamp(min=1))

        def weighted(shaped: Tensor, forward: Tensor, backward: Tensor, mask: Tensor, *signs: Tensor) -> Tensor:
            factors = conflict_factors(forward, backward, mask, *signs, self.w_pos, self.combine)
            return shaped * factors.mul_(ops.as_numbers(mask))

        return ops.by_blocks(weighted, shaped, forward, backward, mask, pos, neg)

    @hookimpl
    def policy_loss(self, log_probs: Tensor, advantages: Tensor, batch: Any) -> Tensor:
        loss = -(log_probs - log_probs.detach()).exp() * advantages
        return loss * batch.sample_weight.to(loss) if self.divide_by_conflicts else loss

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        if self.state.initial_entropy is None:
            self.state.initial_entropy = step.shared.get("initial_entropy")

    def initial_entropy(self, h: Tensor) -> float | None:
        """h_ini: what the first step left, in the first step the mean of its h (N, 1); None if it has no response."""
        if self.state.initial_entropy is not None or not len(h):
            return self.state.initial_entropy
        return float(h.mean())

    def threshold(self, initial_entropy: float | None) -> float:
        """tau, or infinity if the model started above it."""
        started_above = initial_entropy is not None and initial_entropy > self.entropy_threshold
        return math.inf if started_above and not self.always_filter else self.entropy_threshold


def reward_signs(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """pos and neg, (B, 1) bool: rewards (B, 1) above and below their group's mean, by more than rounding."""
    centred = rewards - ops.group_mean(rewards, groups)
    largest = ops.group_extreme(rewards.abs(), groups)
    signed = (groups >= 0)[:, None] & (centred.abs() >= ROUNDING * largest)
    return signed & (centred > 0), signed & (centred < 0)


def conflict_factors(
    forward: Tensor, backward: Tensor, mask: Tensor, pos: Tensor, neg: Tensor, w_pos: float = 2.0,
    combine: str = "product",
) -> Tensor:  # fmt: skip
    """lambda, (B, T): on each run of `conflict_runs` w_pos in pos and 0 in neg, (B, 1); elsewhere 1."""
    place = places(mask)
    on_forward, on_backward = place < forward, place >= ops.lengths(mask) - backward
    change = (w_pos - 1) * pos.float() - neg.float()
    if combine == "max":
        return 1 + change * ops.as_numbers(on_forward | on_backward)
    return (1 + change * ops.as_numbers(on_forward)) * (1 + change * ops.as_numbers(on_backward))


def conflict_runs(token_ids: Tensor, mask: Tensor, pos: Tensor, neg: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the unbroken runs of conflict tokens from the start and from the end of each response, (B, 1) int64.

    A token of a response in pos or neg is in conflict if at the same position, counted from that end, a response in pos
    and one in neg of the same group have it. Positions count the tokens of the mask.

    Args:
        token_ids: (B, T) int64.
        mask: (B, T) bool.
        pos: (B, 1) bool, rewarded responses.
        neg: (B, 1) bool, penalised ones.
        groups: (B,) int64, -1: none.
    """
    if has_gaps(mask):
        token_ids = token_ids.gather(1, torch.argsort(~mask, dim=1, stable=True))
    lengths = ops.lengths(mask).flatten().long()
    groups = torch.where((pos | neg).flatten(), ops.dense_groups(groups)[0], -1)
    forward = run_lengths(token_ids, lengths, pos.flatten(), groups, from_end=False)
    backward = run_lengths(token_ids, lengths, pos.flatten(), groups, from_end=True)
    return forward[:, None], backward[:, None]


def places(mask: Tensor) -> Tensor:
    """Position of each token among those of the mask (B, T); (1, T) where the mask is without gaps."""
    return mask.cumsum(1) - 1 if has_gaps(mask) else torch.arange(mask.shape[1], device=mask.device)[None]


def has_gaps(mask: Tensor) -> bool:
    """Whether tokens of the mask follow others (tool output)."""
    return bool(ops.gaps(mask).any())


def run_lengths(token_ids: Tensor, lengths: Tensor, pos: Tensor, groups: Tensor, *, from_end: bool) -> Tensor:
    """Number of conflict tokens before the first miss, (B,) int64.

    Positions are looked at in blocks that double in width, each only in groups in which some run goes on.

    Args:
        token_ids: (B, T) int64, the response's tokens first.
        lengths: (B,) int64, their number.
        pos: (B,) bool, rewarded; the others are penalised.
        groups: (B,) int64, small numbers; -1: takes no part.
        from_end: count positions from the last token.
    """
    runs = torch.zeros_like(lengths)
    rows = (groups >= 0).nonzero().flatten()
    begin, end = 0, BLOCK
    while len(rows) and begin < token_ids.shape[1]:
        length = lengths[rows, None]
        place = torch.arange(begin, min(end, token_ids.shape[1]), device=lengths.device)
        index = (length - 1 - place).clamp(min=0) if from_end else place
        conflict = in_conflict(token_ids[rows[:, None], index], place < length, pos[rows], groups[rows])
        unbroken = runs[rows] == begin
        runs[rows] += unbroken * conflict.cumprod(1).sum(1)
        going_on = torch.zeros_like(groups, dtype=torch.bool)
        going_on[groups[rows[runs[rows] == end]]] = True
        rows = rows[going_on[groups[rows]] & (lengths[rows] > end)]
        begin, end = end, 2 * end
    return runs


def in_conflict(token_ids: Tensor, there: Tensor, pos: Tensor, groups: Tensor) -> Tensor:
    """Which tokens occur in the same column in rows with and without `pos` (N,) of the same group (N,), (N, W) bool.

    Args:
        token_ids: (N, W) int64.
        there: (N, W) bool; other entries match nothing.
        pos: (N,) bool.
        groups: (N,) int64, >= 0.
    """
    columns = torch.arange(token_ids.shape[1], device=token_ids.device)
    keys = (groups[:, None] * len(columns) + columns) * (token_ids.max() + 1) + token_ids
    distinct, inverse = torch.unique(keys[there], return_inverse=True)
    seen = torch.zeros((2, len(distinct)), dtype=torch.bool, device=keys.device)
    seen[pos[:, None].expand_as(there)[there].long(), inverse] = True
    conflict = torch.zeros_like(there)
    conflict[there] = seen.all(0)[inverse]
    return conflict
