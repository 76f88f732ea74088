"""The numbers of preference training: one mini-batch of pairs, cut into micro-batches and ranks in whatever way.

With w the weights of the pairs,

    loss = sum_i w_i preference_loss_i / sum_i w_i + sum of auxiliary losses

where the sum below the fraction line runs over the whole mini-batch: a micro-batch gives its part of the upper sum. A pair
of which a log-prob is not finite at a token has weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.dispatch import Scope
from rlplugins.errors import HookError
from rlplugins.pairs import SIDES
from rlplugins.plan import Plan
from rlplugins.rollouts import POLICY, Column, ReadGuard
from rlplugins.steps import Metrics
from rlplugins.update import Prepared, Reducer, Rows, as_floating, rows_of, widened


@dataclass(frozen=True)
class PairLoss:
    """A micro-batch's part of the loss: 0-d tensors that add up over micro-batches and ranks.

    Attributes:
        total: what is differentiated.
        preference: the part of `preference_loss`.
        auxiliary: that of the auxiliary losses.
        broken: (n,) bool, pairs that count but whose current log-probs are not all finite. They are left out above, but
            are still counted below: a trainer that can makes the mini-batch again without them.
    """

    total: Tensor
    preference: Tensor
    auxiliary: Tensor
    broken: Tensor


class PairMiniBatch(Prepared):
    """This rank's pairs of a mini-batch, after `prepare_mini_batch`.

    Args:
        plan: who does what.
        guards: what each plugin may read.
        columns: at least `chosen_mask` and `rejected_mask` (N, T); see `Stack.pair_columns`. `weights` (N, 1) and the
            `token_weights` (N, T) of the sides are 1 where they are left out; `ref_log_probs` of the sides if the stack
            takes them; current `log_probs` of the sides, without gradient, if it needs those of the whole mini-batch.
        shared: per plugin what it shared in `build_preferences`.
        reduce: adds over ranks; None on one rank.
        metrics: where `log` goes.

    Attributes:
        weightless: no pair counts: no optimiser step, on any rank.
        token_weight: sum over both sides of the weights of tokens times those of their pairs, on all ranks.
        sample_weight: sum of the weights of the pairs on all ranks. Both are 1 where they are 0, so that 0 / 0 is 0.
        dropped: pairs of this rank of which a known log-prob is not finite.
    """

    def __init__(
        self,
        plan: Plan,
        guards: Mapping[str, ReadGuard],
        columns: Mapping[str, Column],
        shared: Mapping[str, Mapping[str, Any]],
        reduce: Reducer | None,
        metrics: Metrics,
    ) -> None:
        super().__init__(plan, guards, columns, shared, reduce, metrics)
        self._check_token_weights()
        self._weigh()
        self._prepare()

    def _check_token_weights(self) -> None:
        """Weights of tokens that the loss does not take would be lost without a word."""
        names = {f"{side}_token_weights" for side in SIDES}
        for _, claim in self._plan.owners["preference_loss"][POLICY] if names & set(self._columns) else ():
            item = claim.implementation
            if not names <= set(item.arguments):
                raise HookError(item.plugin.name, item.hook, "takes no token weights, but build_preferences weighs tokens: "
                                f"take {' and '.join(sorted(names))}")  # fmt: skip

    def _weigh(self) -> None:
        """Weight 0 for pairs with a log-prob that is not finite, 0 for their columns; the lower sums, in one reduction."""
        columns = self._columns
        finite = torch.ones(len(self), dtype=torch.bool, device=self._mask("chosen").device)
        known: dict[str, Tensor] = {}
        for side in SIDES:
            for name in {f"{side}_ref_log_probs", f"{side}_log_probs"} & set(columns):
                known[name] = _inside(columns[name], self._mask(side))
                finite &= known[name].isfinite().all(1)
        weights = columns.get("weights")
        weights = torch.ones((len(self), 1), device=finite.device) if weights is None else weights
        assert isinstance(weights, Tensor)
        self.dropped = ~finite & (weights[:, 0] > 0)
        columns["weights"] = weights = torch.where(finite[:, None], weights, 0.0)
        columns |= {name: torch.where(finite[:, None], values, 0.0) for name, values in known.items()}
        tokens = sum(_token_weights(columns, side, torch.float32).sum(1, dtype=torch.float64) for side in SIDES)
        sums = torch.stack([(tokens * weights[:, 0]).sum(), weights.sum(dtype=torch.float64)])
        sums = self.sum_over_ranks(sums)
        self.weightless = bool(sums[1] == 0)
        self.token_weight, self.sample_weight = (sums + (sums == 0)).unbind()

    def loss(self, chosen_log_probs: Tensor, rejected_log_probs: Tensor, rows: Rows | None = None) -> PairLoss:
        """The part of the loss that some pairs give.

        Args:
            chosen_log_probs: (n, T) with gradient, under the current weights.
            rejected_log_probs: (n, T), likewise.
            rows: which pairs of the mini-batch they are; None: all.

        Raises:
            HookError: if a hook returns something outside of its specification.
        """
        columns = {name: rows_of(column, rows) for name, column in self._columns.items()}
        weights = columns["weights"]
        assert isinstance(weights, Tensor)
        given = {"chosen": as_floating(chosen_log_probs), "rejected": as_floating(rejected_log_probs)}
        inside = {side: _inside(values, columns[f"{side}_mask"]) for side, values in given.items()}
        finite = torch.stack([values.isfinite().all(1) for values in inside.values()]).all(0)
        kept = (finite & (weights[:, 0] > 0))[:, None]
        broken = ~finite & (weights[:, 0] > 0)
        columns["weights"] = weights = torch.where(kept, weights, 0.0)
        graph = self._scope(
            columns, {f"{side}_log_probs": torch.where(kept, values, 0.0) for side, values in inside.items()}
        )
        values = self._value("preference_loss", self._plan.owners["preference_loss"][POLICY], graph, [(len(kept),)])
        preference = (values * weights[:, 0]).sum() / self.sample_weight.to(values)
        auxiliary = preference.new_zeros(())
        if self._plan.running("auxiliary_loss"):
            auxiliary = self._auxiliary(graph, auxiliary)
        return PairLoss(preference + auxiliary, preference.detach(), auxiliary.detach(), broken)

    def _scope(self, columns: Mapping[str, Column], values: Mapping[str, Any]) -> Scope:
        floating = values["chosen_log_probs"].dtype if "chosen_log_probs" in values else torch.float32
        lazy: dict[str, Callable[[Scope], Any]] = {
            "chosen_token_weights": lambda scope: _token_weights(columns, "chosen", floating),
            "rejected_token_weights": lambda scope: _token_weights(columns, "rejected", floating),
        }
        given = {name: column for name, column in columns.items() if not name.endswith("_token_weights")}
        return Scope({**given, **values}, lazy, self._personal(columns))

    def _mask(self, side: str) -> Tensor:
        mask = self._columns[f"{side}_mask"]
        assert isinstance(mask, Tensor)
        return mask


def _token_weights(columns: Mapping[str, Column], side: str, floating: torch.dtype) -> Tensor:
    """The weights of the tokens of one side, u m, (n, T)."""
    mask, weights = columns[f"{side}_mask"], columns.get(f"{side}_token_weights")
    assert isinstance(mask, Tensor)
    kept = ops.as_numbers(mask, floating)
    return kept * weights if isinstance(weights, Tensor) else kept


def _inside(values: Any, mask: Any) -> Tensor:
    """(n, T) of the mask's width, 0 outside of it."""
    return torch.where(mask, widened(values, mask.shape[1]), 0.0)
