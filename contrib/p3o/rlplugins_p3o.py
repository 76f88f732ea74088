"""P3O: Pairwise Proximal Policy Optimization (arXiv 2310.00212).

The pairwise policy gradient and its invariance are the paper's; there is no public code, and the two clipped objectives V1
and V2 are reconstructed from its description, see the README. The controller of beta is that of arXiv 1909.08593.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import HookError
from rlplugins.hookspecs import Log
from rlplugins.rollouts import POLICY, Rollouts
from rlplugins.steps import Run, Step
from rlplugins.update import LOG_RATIO_BOUND, Batch

KL_ERROR_BOUND = 0.2  # of the relative error that the controller of beta answers to

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[float, Field(ge=0)]


class P3o(Plugin):
    """Compares the responses to a prompt two by two and trains on the differences of their rewards.

    Pairwise Proximal Policy Optimization (arXiv 2310.00212): nothing that is added to all rewards of a prompt matters, and
    no value network is needed.
    """

    name = "p3o"
    uses = {"kl_penalty": "none"}
    assumes = frozenset({"response_rewards"})
    breaks = frozenset({"token_ratio"})

    version: Literal["V1", "V2"] = "V2"
    """Clip the ratio of each response of a pair (V1), or the log-ratio between the two (V2)."""
    beta: NonNegative = 0.05
    """Factor on log pi_old - log pi_ref of the response, which is subtracted from its reward."""
    eps: Width = 0.2
    """V1: how far a response's ratio may go from 1; infinity: no clip."""
    delta: Width = 0.2
    """V2: how far log pi(y1) - log pi(y2) may go from its old value; infinity: no clip."""
    partners: Literal["micro_batch", "mini_batch"] = "micro_batch"
    """Where a response finds its partners: in its micro-batch, or in the whole mini-batch, whose log-probs come first."""
    kl_target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Mean of log pi_old - log pi_ref, in nats, to which beta is adapted after every step; None: beta stays."""
    kl_horizon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10_000.0
    """Responses over which an error of the KL of 20 % changes beta by 20 %."""

    @model_validator(mode="after")
    def _something_to_adapt(self) -> P3o:
        if self.kl_target is not None and self.beta == 0:
            raise ValueError("beta 0 stays 0 whatever the kl_target")
        return self

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """Partners, in one of two ways, and the reference if the reward has a KL term."""
        together = needs.together("group") if self.partners == "micro_batch" else needs.MINI_BATCH_LOG_PROBS
        reference = (needs.column("ref_log_probs"),) if self.beta > 0 else ()
        return (needs.group_size(at_least=2), together, *reference)

    def init_state(self, run: Run) -> dict[str, Any]:
        """beta, which a controller may change."""
        return {"beta": self.beta}

    @hookimpl(when=lambda self: self.partners == "mini_batch")
    def prepare_step(self, rollouts: Rollouts, step: Step) -> None:
        """Number the rows, so that ranks know which is which."""
        step.share("rows", len(rollouts))
        rollouts["p3o_row"] = torch.arange(len(rollouts), device=rollouts.mask.device)[:, None]

    @hookimpl(when=lambda self: self.beta > 0)
    def shape_rewards(self, rewards: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
        """r = R - beta (l_old - l_ref)."""
        reference = rollouts["ref_log_probs"]
        assert isinstance(reference, Tensor) and rollouts.old_log_probs is not None
        kl = ops.by_blocks(
            lambda old, ref, mask: sequence_sum(old - ref, mask), rollouts.old_log_probs, reference, mask
        )
        drawn = rollouts.of_kind(POLICY)
        step.share("kl", (float(kl[drawn].mean()) if bool(drawn.any()) else None, int(drawn.sum())))
        log("kl", kl[drawn].sum() / drawn.sum().clamp(min=1))
        log("beta", self.state.beta)
        return rewards - self.state.beta * kl.to(rewards)

    @hookimpl
    def prepare_mini_batch(self, batch: Batch, log: Log) -> None:
        """Count the pairs on all ranks; with partners in the whole mini-batch also form them."""
        groups = paired_groups(batch)
        if self.partners == "micro_batch":
            batch.add_column("p3o_group_size", ops.group_sizes(groups)[:, None])
            batch.share("pairs", at_least_one(batch.sum(number_of_pairs(groups, batch.weights))))
            return
        sums = [sequence_sum(column, batch["mask"]) for column in (batch.log_probs, batch["old_log_probs"])]
        own = torch.cat([groups[:, None] + 1, batch["rewards"], batch.weights, *sums], dim=1).double()
        rows = batch["p3o_row"].flatten()
        numbers, rewards, weights, now, old = over_ranks(own, rows, batch).split(1, dim=1)
        groups = numbers.flatten().long() - 1  # -1 again where there is no row
        objective, slope = self.terms(rewards, groups, weights, now, old, log)
        batch.add_column("p3o_objective", objective[rows].to(batch.log_probs))
        batch.add_column("p3o_slope", slope[rows].to(batch.log_probs))
        batch.share("pairs", at_least_one(number_of_pairs(groups, weights)))

    @hookimpl(per_response=True)
    def policy_loss(
        self, log_probs: Tensor, old_log_probs: Tensor, rewards: Tensor, weights: Tensor, mask: Tensor, batch: Batch,
        log: Log,
    ) -> Tensor:  # fmt: skip
        """A response's share of -J of its pairs, (B, 1), with the gradient that it has of -J.

        The frame takes the mean over responses of a loss per response; the factor makes it the mean over pairs.
        """
        now = sequence_sum(log_probs, mask)
        if self.partners == "mini_batch":
            objective, slope = batch["p3o_objective"], batch["p3o_slope"]
        else:
            groups = paired_groups(batch)
            if bool((ops.group_sizes(groups)[:, None] != batch["p3o_group_size"]).any()):
                raise HookError(self.name, "policy_loss", "rows of a group are in different micro-batches; keep them "
                                "together or write `partners: mini_batch`")  # fmt: skip
            old = sequence_sum(old_log_probs, mask)
            objective, slope = self.terms(rewards, groups, weights, now.detach(), old, log)
        loss = -objective - slope * (now - now.detach())
        return loss * (batch.sample_weight / batch.shared["pairs"]).to(loss)

    @hookimpl(when=lambda self: self.kl_target is not None)
    def on_step_end(self, step: Step) -> None:
        """beta grows where the KL is above its target and shrinks where it is below."""
        kl, responses = step.shared.get("kl", (None, 0))
        if kl is not None:
            error = min(max(kl / self.kl_target - 1, -KL_ERROR_BOUND), KL_ERROR_BOUND)
            self.state.beta = self.state.beta * (1 + error * responses / self.kl_horizon)

    def terms(
        self, rewards: Tensor, groups: Tensor, weights: Tensor, now: Tensor, old: Tensor, log: Log
    ) -> tuple[Tensor, Tensor]:
        """A response's share of J of all its pairs and the derivative of J by its log-prob, (B, 1) each, constants."""
        first, second = ordered_pairs(groups)
        if self.version == "V1":
            objective, slope, clipped = v1(rewards, now, old, first, second, self.eps)
        else:
            objective, slope, clipped = v2(rewards, now, old, first, second, self.delta)
        log("clipped", clipped.sum() / clipped.numel() if clipped.numel() else 0.0, clipped.numel())
        shares = weights[second] * torch.cat([objective, slope], dim=1)
        sums = shares.new_zeros((len(rewards), 2)).index_add(0, first, shares)
        return sums[:, :1], sums[:, 1:]


def v1(
    rewards: Tensor, now: Tensor, old: Tensor, first: Tensor, second: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """J_i = min(c_i rho_i, c_i clip(rho_i, 1 - eps, 1 + eps)), c_i = (r_i - r_j) rho_j, for every i and partner j.

    Args:
        rewards: (B, 1).
        now: (B, 1) log-probs of the responses.
        old: (B, 1) the same under the old policy.
        first: (K,) int64, the rows i.
        second: (K,) int64, their partners j.
        eps: width of the range.

    Returns:
        J_i, its derivative by l_i, and whether it is clipped, (K, 1) each.
    """
    rho = sequence_ratio(now, old)
    c = (rewards[first] - rewards[second]) * rho[second]
    ratio = rho[first]
    clipped = ((c > 0) & (ratio > 1 + eps)) | ((c < 0) & (ratio < 1 - eps))
    return c * torch.where(clipped, ratio.clamp(1 - eps, 1 + eps), ratio), c * ratio * ~clipped, clipped


def v2(
    rewards: Tensor, now: Tensor, old: Tensor, first: Tensor, second: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """J = min(c x, c clip(x, x0 - delta, x0 + delta)), x = l_i - l_j, x0 its old value, c = (r_i - r_j) rho_i rho_j.

    Args and returns are those of `v1`, with J / 2 for each of the two.
    """
    rho = sequence_ratio(now, old)
    c = (rewards[first] - rewards[second]) * rho[first] * rho[second]
    before = old[first] - old[second]
    moved = now[first] - now[second] - before
    clipped = ((c > 0) & (moved > delta)) | ((c < 0) & (moved < -delta))
    x = before + torch.where(clipped, moved.clamp(-delta, delta), moved)
    return c * x / 2, c * ~clipped, clipped


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each response's own tokens, (B, 1), in float32 or better."""
    precision = torch.promote_types(values.dtype, torch.float32)
    return (values * ops.as_numbers(mask, values.dtype)).sum(1, keepdim=True, dtype=precision)


def sequence_ratio(now: Tensor, old: Tensor) -> Tensor:
    """rho = exp(l - l_old) of whole responses, (B, 1), the difference capped at 20."""
    return (now - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def paired_groups(batch: Batch) -> Tensor:
    """Groups (B,) in which pairs are formed: responses that the policy drew and that have a reward; else -1."""
    groups: Tensor = batch["groups"]
    return torch.where(batch.of_kind(POLICY).to(groups.device), groups, -1)


def ordered_pairs(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Every (i, j) of different rows of the same group (B,), as two (K,) int64; rows of -1 have no partners."""
    rows = (groups >= 0).nonzero().flatten()
    rows = rows[torch.argsort(groups[rows], stable=True)]
    sizes = torch.unique_consecutive(groups[rows], return_counts=True)[1]
    partners = sizes.repeat_interleave(sizes)  # of each row, itself included
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    first = torch.arange(len(rows), device=rows.device).repeat_interleave(partners)
    before = (partners.cumsum(0) - partners).repeat_interleave(partners)
    second = starts[first] + torch.arange(len(first), device=rows.device) - before
    different = first != second
    return rows[first[different]], rows[second[different]]


def number_of_pairs(groups: Tensor, weights: Tensor) -> Tensor:
    """Sum of w_i w_j over all pairs i < j of a group; groups (B,), weights (B, 1)."""
    weights = weights.double() * (groups >= 0)[:, None]
    return (weights * (ops.group_sum(weights, groups) - weights)).sum() / 2


def at_least_one(pairs: Tensor) -> Tensor:
    """1 instead of 0, so that 0 / 0 is 0."""
    return torch.where(pairs == 0, 1.0, pairs)


def over_ranks(own: Tensor, rows: Tensor, batch: Batch) -> Tensor:
    """A line for every row of the step, (N, K): those of the mini-batch on all ranks, else zeros.

    Args:
        own: (B, K) this rank's rows.
        rows: (B,) their numbers in the step.
        batch: whose `sum` adds over ranks.
    """
    table = own.new_zeros((batch.shared["rows"], own.shape[1]))
    table[rows] = own
    return batch.sum(table)
