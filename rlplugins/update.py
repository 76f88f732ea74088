"""The numbers of the update: one mini-batch, cut into micro-batches and ranks in whatever way.

A mini-batch is the rows between two optimiser steps, on all ranks. With m the mask, w the weights of the responses, u
those of the tokens, W = w u m and c the trainer's correction for stale rollouts,

    loss = R(c * policy_loss) + R(kl_penalty) + sum of auxiliary losses

where the sums below the fraction line of R run over the whole mini-batch: a micro-batch gives its part of the upper sum,
and the parts add up to the loss. 0 / 0 is 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.dispatch import Scope, call, expect, wrapped
from rlplugins.errors import HookError
from rlplugins.pairs import SIDES
from rlplugins.plan import Implementation, Owner, Plan
from rlplugins.rollouts import POLICY, Column, ReadGuard, take
from rlplugins.steps import Metrics

Reducer: TypeAlias = Callable[[Tensor], Tensor]
"""Adds a tensor over all ranks."""

Rows: TypeAlias = slice | Tensor
"""Which rows of the mini-batch a micro-batch holds."""

LOG_RATIO_BOUND = 20.0
_FRAME = frozenset(
    {"mask", "advantages", "rewards", "groups", "kind", "old_log_probs", "weights", "token_weights", "segments",
     "value_targets", "value_mask", *(f"{side}_{name}" for side in SIDES for name in
     ("mask", "token_weights", "ref_log_probs", "log_probs"))}
)  # fmt: skip
_PER_TOKEN = ("mask", "old_log_probs", "token_weights", "segments", "ref_log_probs", "entropy", "values", "value_targets",
              "value_mask", "rollout_log_probs")  # fmt: skip


@dataclass(frozen=True)
class Loss:
    """A micro-batch's part of the loss: 0-d tensors that add up over micro-batches and ranks."""

    total: Tensor
    policy: Tensor
    kl: Tensor
    auxiliary: Tensor


class Batch:
    """A mini-batch, or rows of it, as one plugin sees it: columns, shared values and sums.

    In preference training its rows are pairs; what is said of log-probs, ratios and kinds is then not there.

    Attributes:
        shared: what this plugin shared in the credit phase and in `prepare_mini_batch`.
        token_weight: sum of W over the mini-batch on all ranks; 1 where it is 0, so that 0 / 0 is 0.
        sample_weight: sum of w over the mini-batch on all ranks, likewise.
    """

    def __init__(self, mini: Prepared, plugin: str, columns: Mapping[str, Column]) -> None:
        self._mini = mini
        self._plugin = plugin
        self._columns = columns
        self._guard = mini.guards[plugin]
        self.shared = mini.shared.setdefault(plugin, {})
        self.token_weight = mini.token_weight
        self.sample_weight = mini.sample_weight

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, name: str) -> Any:
        """The column `name` of these rows; one of the data must have been declared."""
        if name not in _FRAME and name not in self._mini.written:
            self._guard.check(name)
        return self._columns[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The column `name` (see `[]`), or `default` if these rows do not have it."""
        return self[name] if name in self._columns else default

    @property
    def log_probs(self) -> Tensor:
        """Log-probs (B, T) under the weights before this mini-batch's first backward, without gradient."""
        current = self._columns.get("current_log_probs")
        column = self._columns["old_log_probs"] if current is None else current
        assert isinstance(column, Tensor)
        return column

    @property
    def ratio(self) -> Tensor:
        """exp(clamp(log_probs - old_log_probs, -20, 20)), (B, T), without gradient."""
        old = self._columns["old_log_probs"]
        assert isinstance(old, Tensor)
        return probability_ratio(self.log_probs, old)

    @property
    def weights(self) -> Tensor:
        """w, (B, 1)."""
        weights = self._columns.get("weights")
        return weights if isinstance(weights, Tensor) else torch.ones((len(self), 1), device=self.sample_weight.device)

    @property
    def loss_weights(self) -> Tensor:
        """W = w u m, (B, T)."""
        return loss_weights(self._columns)

    def of_kind(self, kind: str) -> Tensor:
        """(B,) bool, the rows of that kind."""
        assert isinstance(self._mini, MiniBatch)
        return self._mini.rows_of_kind(self._columns, kind)

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over all ranks, in `prepare_mini_batch` only; each rank must call it equally often."""
        return self._mini.sum_over_ranks(values)

    def share(self, name: str, value: Any) -> None:
        """Hand a value to this plugin's later hooks of the mini-batch, in `prepare_mini_batch` only."""
        self._mini.share(self.shared, name, value)

    def add_column(self, name: str, column: Tensor) -> None:
        """Hand a column (B, 1) or (B, T) of the mini-batch to later hooks, cut into micro-batches like the rows."""
        self._mini.add_column(name, column)


class Prepared(ABC):
    """What mini-batches of responses and of pairs have in common: columns, shared values, sums over ranks.

    Args:
        plan: who does what.
        guards: what each plugin may read.
        columns: one entry per row.
        shared: per plugin what it shared before the update.
        reduce: adds over ranks; None on one rank.
        metrics: where `log` goes.

    Attributes:
        token_weight: sum of the tokens' weights on all ranks; 1 where it is 0, so that 0 / 0 is 0.
        sample_weight: sum of the rows' weights on all ranks, likewise.
    """

    token_weight: Tensor
    sample_weight: Tensor

    def __init__(
        self,
        plan: Plan,
        guards: Mapping[str, ReadGuard],
        columns: Mapping[str, Column],
        shared: Mapping[str, Mapping[str, Any]],
        reduce: Reducer | None,
        metrics: Metrics,
    ) -> None:
        self._plan = plan
        self.guards = guards
        self._reduce = reduce
        self._metrics = metrics
        self._columns: dict[str, Column] = dict(columns)
        self.shared: dict[str, dict[str, Any]] = {plugin: dict(values) for plugin, values in shared.items()}
        declared = {name for guard in guards.values() for name in guard.declared}
        self.written = set(columns) - _FRAME - declared
        self._preparing = True

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def column(self, name: str) -> Tensor | None:
        """A column of all rows, for the trainer; None if there is none."""
        found = self._columns.get(name)
        return found if isinstance(found, Tensor) else None

    def _prepare(self) -> None:
        """`prepare_mini_batch` of every plugin; nothing communicates afterwards."""
        scope = self._scope(self._columns, {})

        def combine() -> None:
            for item in self._plan.lists.get("prepare_mini_batch", []):
                call(item, scope)

        wrapped(self._plan.wrappers.get("prepare_mini_batch", ()), scope, combine)
        self._preparing = False

    @abstractmethod
    def _scope(self, columns: Mapping[str, Column], values: Mapping[str, Any]) -> Scope:
        """What hooks may take of these rows."""

    def _personal(self, columns: Mapping[str, Column]) -> dict[str, Callable[[str], Any]]:
        return {"batch": lambda plugin: Batch(self, plugin, columns), "log": self._metrics.logger}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added over all ranks."""
        if not self._preparing:
            raise RuntimeError("only prepare_mini_batch may communicate between ranks")
        return self._reduce(values) if self._reduce is not None else values

    def share(self, shared: dict[str, Any], name: str, value: Any) -> None:
        """Add a shared value of one plugin."""
        if not self._preparing:
            raise RuntimeError(f"{name!r}: only prepare_mini_batch shares values; every other hook is a pure function")
        shared[name] = value

    def add_column(self, name: str, column: Tensor) -> None:
        """Add a column of the mini-batch."""
        if not self._preparing or len(column) != len(self):
            raise RuntimeError(f"column {name!r}: only prepare_mini_batch adds columns, of all {len(self)} rows")
        self._columns[name] = column
        self.written.add(name)

    def _auxiliary(self, graph: Scope, nothing: Tensor) -> Tensor:
        """The sum of all auxiliary losses; `nothing`: a 0 of the right type and device."""

        def combine() -> Tensor:
            total = nothing
            for item in self._plan.lists.get("auxiliary_loss", []):
                total = total + expect(item, call(item, graph), [()])
            return total

        return self._wrapped("auxiliary_loss", graph, combine, lambda item, _, after: expect(item, after, [()]))

    def _value(self, hook: str, owner: Owner, graph: Scope, shapes: Sequence[tuple[int, ...]]) -> Any:
        """An owner's loss, or the weighted sum of a mix; None if the owner says so."""

        def checked(item: Implementation, before: Any, after: Any) -> Any:
            return after if after is None and hook == "kl_penalty" else expect(item, after, shapes)

        def combine() -> Any:
            total: Any = None
            for weight, claim in owner:
                value = checked(claim.implementation, None, call(claim.implementation, graph))
                if value is None:
                    continue
                value = value * weight if weight != 1 else value
                if total is not None and total.shape != value.shape:
                    item = claim.implementation
                    raise HookError(
                        item.plugin.name, item.hook, "losses per token and losses per response cannot be mixed"
                    )
                total = value if total is None else total + value
            return total

        return self._wrapped(hook, graph, combine, checked)

    def _wrapped(
        self, hook: str, scope: Scope, combine: Callable[[], Any], check: Callable[[Implementation, Any, Any], Any]
    ) -> Any:
        return wrapped(self._plan.wrappers.get(hook, ()), scope, combine, check)


class MiniBatch(Prepared):
    """This rank's rows of a mini-batch, after `prepare_mini_batch`.

    Args:
        plan: who does what.
        guards: what each plugin may read.
        columns: at least `mask` (B, T), `advantages` (B, 1) or (B, T), `old_log_probs` (B, T); see
            `Stack.update_columns`. `weights`, `token_weights` and `correction` (B, T) are 1 where they are left out.
        shared: per plugin what it shared in the credit phase.
        kinds: names of the row kinds.
        reduce: adds over ranks; None on one rank.
        log_probs: current log-probs (B, T) of all rows, if they differ from the old ones and the stack needs them.
        metrics: where `log` goes.

    Attributes:
        weightless: no row counts and there is no auxiliary loss: no optimiser step, on any rank.
        token_weight: sum of W on all ranks; 1 where it is 0, so that 0 / 0 is 0.
        sample_weight: sum of w on all ranks, likewise.
        value_weight: sum of the critic's weights on all ranks, likewise.
    """

    def __init__(
        self,
        plan: Plan,
        guards: Mapping[str, ReadGuard],
        columns: Mapping[str, Column],
        shared: Mapping[str, Mapping[str, Any]],
        kinds: Sequence[str],
        reduce: Reducer | None,
        log_probs: Tensor | None,
        metrics: Metrics,
    ) -> None:
        super().__init__(plan, guards, columns, shared, reduce, metrics)
        self._kinds = tuple(kinds)
        current = {"current_log_probs": log_probs.detach()} if log_probs is not None else {}
        self._columns = _at_least_two_tokens({**columns, **current})
        self._correct()
        self._takes_clip = any("clip" in item.arguments for item in plan.running("policy_loss"))
        self._sum_weights()
        self._prepare()

    def _correct(self) -> None:
        """The trainer's correction is 1 on rows that the policy did not draw, and under a plugin with its own."""
        correction = self._columns.get("correction")
        if correction is None:
            return
        if any(plugin.corrects_staleness for plugin in self._plan.plugins):
            del self._columns["correction"]
        else:
            drawn = self.rows_of_kind(self._columns, POLICY)
            assert isinstance(correction, Tensor)
            self._columns["correction"] = torch.where(drawn[:, None], correction, 1.0)

    def _sum_weights(self) -> None:
        """The lower sums of R, in one reduction."""
        mask = self._tensor("mask")
        weights, token_weights = self._columns.get("weights"), self._columns.get("token_weights")
        if isinstance(token_weights, Tensor):
            kept = ops.as_numbers(mask, token_weights.dtype) * token_weights
            tokens = kept.sum(1, keepdim=True, dtype=torch.float64)
        else:
            tokens = ops.lengths(mask).double()
        if isinstance(weights, Tensor):
            tokens, samples = tokens * weights, weights.sum(dtype=torch.float64)
        else:
            samples = torch.tensor(float(len(mask)), dtype=torch.float64, device=mask.device)
        critic = self._columns.get("value_mask")
        if isinstance(critic, Tensor):
            critic = critic * weights if isinstance(weights, Tensor) else critic
            values = critic.sum(dtype=torch.float64)
        else:
            values = torch.zeros_like(samples)
        sums = self.sum_over_ranks(torch.stack([tokens.sum(), samples, values]))
        empty = sums == 0
        self.weightless = bool(empty[0]) and not self._plan.running("auxiliary_loss")
        self.token_weight, self.sample_weight, self.value_weight = (sums + empty).unbind()

    def rows_of_kind(self, columns: Mapping[str, Column], kind: str) -> Tensor:
        """(B,) bool."""
        mask, kinds = columns["mask"], columns.get("kind")
        if kinds is None:
            assert isinstance(mask, Tensor)
            return torch.full((len(mask),), kind == POLICY, device=mask.device)
        assert isinstance(kinds, Tensor)
        return kinds == self._kinds.index(kind) if kind in self._kinds else torch.zeros_like(kinds, dtype=torch.bool)

    def loss(
        self,
        log_probs: Tensor,
        rows: Rows | None = None,
        *,
        entropy: Tensor | None = None,
    ) -> Loss:
        """The part of the loss that some rows give.

        Args:
            log_probs: (b, T) with gradient, under the current weights; 0 at padding.
            rows: which rows of the mini-batch they are; None: all.
            entropy: (b, T) of the full distribution, with gradient, if `Stack.takes("entropy", "update")`.

        Raises:
            HookError: if a hook returns something outside of its specification.
        """
        columns = _at_least_two_tokens({name: rows_of(column, rows) for name, column in self._columns.items()})
        width = self._tensor("mask").shape[1]
        log_probs = widened(as_floating(log_probs), width)
        entropy = widened(as_floating(entropy), width) if entropy is not None else None
        graph = self._scope(columns, {"log_probs": log_probs} | ({"entropy": entropy} if entropy is not None else {}))
        self._adapt(graph, columns, entropy)
        total = policy = self._policy_part(graph, columns)
        kl = auxiliary = log_probs.new_zeros(())
        penalty = self._value("kl_penalty", self._plan.owners["kl_penalty"][POLICY], graph, _loss_shapes(graph))
        penalising = self._plan.owners["kl_penalty"][POLICY][0][1].implementation
        if penalty is not None:
            kl = self._reduced(graph, columns, penalty, penalising)
            total = total + kl
        if self._plan.running("auxiliary_loss"):
            auxiliary = self._auxiliary(graph, graph["log_probs"].new_zeros(()))
            total = total + auxiliary
        return Loss(total, policy.detach(), kl.detach(), auxiliary.detach())

    def value_loss(self, values: Tensor, rows: Rows | None = None, clip: float | None = None) -> Tensor:
        """The critic's part: half the mean squared error, weighted by w over the tokens of `value_targets`.

        Args:
            values: (b, T) with gradient.
            rows: which rows of the mini-batch they are; None: all.
            clip: bound of the change against the old values (column `values`), as in PPO; None: no bound.
        """
        columns = {name: rows_of(column, rows) for name, column in self._columns.items()}
        targets, mask = columns["value_targets"], columns["value_mask"]
        assert isinstance(targets, Tensor) and isinstance(mask, Tensor)
        weights = columns.get("weights")
        counts = mask * weights if isinstance(weights, Tensor) else mask.to(values.dtype)
        error = (values - targets).square()
        if clip is not None:
            old = columns["values"]
            assert isinstance(old, Tensor)
            error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - targets).square())
        return 0.5 * (error * counts).sum() / self.value_weight

    # parts

    def _adapt(self, graph: Scope, columns: Mapping[str, Column], entropy: Tensor | None) -> None:
        """`adapt_advantages` and `clip_range`: everything known, no gradient."""
        constants = self._scope(columns, {"log_probs": graph["log_probs"].detach()})
        if entropy is not None:
            constants["entropy"] = entropy.detach()
        with torch.no_grad():
            if self._plan.running("adapt_advantages"):
                constants["advantages"] = self._adapted(constants)
            graph["advantages"] = constants["advantages"]
            if self._takes_clip:
                graph["clip"] = self._clip(self._plan.owners["clip_range"][POLICY], constants)

    def _adapted(self, scope: Scope) -> Tensor:
        shapes = [(len(scope["mask"]), 1), tuple(scope["mask"].shape)]

        def clean(item: Implementation, before: Any, after: Any) -> Tensor:
            value = expect(item, after, shapes)
            return torch.where(scope["mask"], value, 0.0) if value.shape[1] > 1 else value

        def combine() -> Tensor:
            for item in self._plan.lists.get("adapt_advantages", []):
                scope["advantages"] = clean(item, None, call(item, scope))
            return scope["advantages"]

        return self._wrapped("adapt_advantages", scope, combine, clean)

    def _clip(self, owner: Owner, scope: Scope) -> tuple[Any, Any]:
        def checked(item: Implementation, before: Any, after: Any) -> tuple[Any, Any]:
            if not isinstance(after, tuple) or len(after) != 2:
                raise HookError(item.plugin.name, item.hook, "must return the lower and the upper bound of the ratio")
            return after

        def combine() -> tuple[Any, Any]:
            low: Any = 0.0
            high: Any = 0.0
            for weight, claim in owner:
                bounds = checked(claim.implementation, None, call(claim.implementation, scope))
                low, high = low + weight * bounds[0], high + weight * bounds[1]
            return low, high

        return self._wrapped("clip_range", scope, combine, checked)

    def _policy_part(self, graph: Scope, columns: Mapping[str, Column]) -> Tensor:
        """R(c * policy_loss), each row under the loss that owns its kind."""
        owners = self._plan.owners["policy_loss"]
        special = {kind: self.rows_of_kind(columns, kind) for kind in owners if kind != POLICY}
        special = {kind: rows for kind, rows in special.items() if bool(rows.any())}
        if not special:
            return self._policy_of(owners[POLICY], graph, columns)
        rest = ~torch.stack(list(special.values())).any(0)
        parts = [(owners[kind], rows) for kind, rows in special.items()]
        if bool(rest.any()):
            parts.append((owners[POLICY], rest))
        total: Tensor = graph["log_probs"].new_zeros(())
        for owner, rows in parts:
            chosen = {name: take(column, rows) for name, column in columns.items()}
            if owner is not owners[POLICY]:
                chosen.pop("correction", None)  # 1 on rows that the policy did not draw
            scope = self._scope(
                chosen, {"log_probs": graph["log_probs"][rows], "advantages": graph["advantages"][rows]}
            )
            if "entropy" in graph:
                scope["entropy"] = graph["entropy"][rows]
            if "clip" in graph:
                scope["clip"] = tuple(_rows_of_bound(bound, rows) for bound in graph["clip"])
            total = total + self._policy_of(owner, scope, chosen)
        return total

    def _policy_of(self, owner: Owner, graph: Scope, columns: Mapping[str, Column]) -> Tensor:
        loss = self._value("policy_loss", owner, graph, _loss_shapes(graph))
        item = owner[0][1].implementation
        correction = columns.get("correction")
        if isinstance(correction, Tensor):
            if loss.shape[1] == 1 and correction.shape[1] > 1:
                raise HookError(item.plugin.name, item.hook, "returned a loss per response, but the trainer corrects stale "
                                "rollouts token by token; switch that correction off")  # fmt: skip
            loss = correction * loss
        takes = any("advantages" in claim.implementation.arguments for _, claim in owner)
        if loss.shape[1] == 1 and graph["advantages"].shape[1] > 1 and takes:
            raise HookError(
                item.plugin.name, item.hook, "returned a loss per response, but the advantages are per token"
            )
        return self._reduced(graph, columns, loss, item)

    def _reduced(self, graph: Scope, columns: Mapping[str, Column], loss: Tensor, made_by: Implementation) -> Tensor:
        owner = self._plan.owners["reduce_loss"][POLICY]
        if loss.shape[1] == 1 and "token_weights" in columns:
            raise HookError(made_by.plugin.name, made_by.hook, "returned a loss per response, but tokens have weights of "
                            "their own (select_tokens)")  # fmt: skip
        graph["loss"] = loss

        def combine() -> Tensor:
            if loss.shape[1] == 1:  # whichever reduction is chosen
                return (loss * graph["weights"]).sum() / self.sample_weight.to(loss)
            parts = [
                weight * expect(claim.implementation, call(claim.implementation, graph), [()])
                for weight, claim in owner
            ]
            return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

        reduced = self._wrapped("reduce_loss", graph, combine, lambda item, _, after: expect(item, after, [()]))
        return reduced.to(loss.dtype)

    def _scope(self, columns: Mapping[str, Column], values: Mapping[str, Any]) -> Scope:
        mask = columns["mask"]
        assert isinstance(mask, Tensor)
        floating = values["log_probs"].dtype if "log_probs" in values else torch.float32
        lazy: dict[str, Callable[[Scope], Any]] = {
            "ratio": lambda scope: probability_ratio(scope["log_probs"], scope["old_log_probs"]),
            "loss_weights": lambda scope: loss_weights(columns, floating),
            "weights": lambda scope: torch.ones((len(mask), 1), dtype=floating, device=mask.device),
            "token_weights": lambda scope: torch.ones((len(mask), 1), dtype=floating, device=mask.device),
            "segments": lambda scope: mask.long() - 1,
            "kind": lambda scope: torch.zeros(len(mask), dtype=torch.int8, device=mask.device),
        }
        scope = Scope({**columns, **values}, lazy, self._personal(columns))
        if "entropy" not in values:
            scope.pop("entropy", None)  # the column of the old policy is not the current entropy
        return scope

    def _tensor(self, name: str) -> Tensor:
        column = self._columns[name]
        assert isinstance(column, Tensor)
        return column


def _loss_shapes(graph: Scope) -> list[tuple[int, ...]]:
    """One loss per response, or one per token."""
    return [(len(graph["mask"]), 1), tuple(graph["mask"].shape)]


def probability_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """exp(clamp(log_probs - old_log_probs, -20, 20)), (B, T)."""
    difference = log_probs - old_log_probs
    # The same as clamp, but its backward is one pass over the tokens instead of four.
    return torch.nn.functional.hardtanh(difference, -LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def loss_weights(columns: Mapping[str, Column], floating: torch.dtype = torch.float32) -> Tensor:
    """W = w u m, (B, T)."""
    mask = columns["mask"]
    assert isinstance(mask, Tensor)
    total = ops.as_numbers(mask, floating)
    for name in ("token_weights", "weights"):
        factor = columns.get(name)
        if isinstance(factor, Tensor):
            total = total * factor
    return total


def as_floating(values: Tensor) -> Tensor:
    """Loss arithmetic is float32 (float64 stays)."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def rows_of(column: Column, rows: Rows | None) -> Column:
    """Some rows of a column."""
    if rows is None:
        return column
    if isinstance(rows, slice):
        return column[rows]
    return take(column, rows)


def _rows_of_bound(bound: Any, rows: Tensor) -> Any:
    return bound[rows] if isinstance(bound, Tensor) and bound.dim() == 2 and len(bound) == len(rows) else bound


def _at_least_two_tokens(columns: dict[str, Column]) -> dict[str, Column]:
    """With one token a loss per token would look like a loss per response: add a column of padding."""
    mask = columns["mask"]
    if not isinstance(mask, Tensor) or mask.shape[1] != 1:
        return columns
    names = [name for name in (*_PER_TOKEN, "current_log_probs", "correction") if name in columns]
    return columns | {name: widened(columns[name], 2) for name in names}  # type: ignore[arg-type]


def moved(value: Any, device: Any) -> Any:
    """Columns or shared values with their tensors on the device of the update."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    return value


def widened(column: Tensor, width: int) -> Tensor:
    """A column (B, t) with zeros up to the width."""
    return column if column.shape[1] == width else torch.nn.functional.pad(column, (0, width - column.shape[1]))
