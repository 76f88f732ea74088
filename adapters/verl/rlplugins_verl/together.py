"""Rows that a plugin wants in one micro-batch (`needs.together`): dealt whole to ranks and mini-batches, and cut whole.

verl deals rows to ranks by their length and cuts a mini-batch wherever it is full. The driver therefore numbers the units
and puts the batch in an order in which verl's equal parts hold whole ones (`dealt`); on the worker the cut itself is ours
(`WholeUnits`), within the limits that the user has set. What does not fit is an error where a plugin cannot do without,
and is cut where it can (an optional need).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.together import packed
from rlplugins_verl.columns import PREFIX, padded

UNIT = f"{PREFIX}unit"
"""Column of a row: the rows with the same number stay together."""
ROW = f"{PREFIX}row"
"""Column of a micro-batch: the row's place among the real ones of the mini-batch, -1 for one that counts nowhere."""
COUNTED = ("response_mask", "loss_mask")
"""verl's columns that say which tokens count."""


def dealt(units: Tensor, ranks: int, mini_batches: int, *, whole: bool = True) -> list[int]:
    """The order of the rows in which the equal parts that verl deals out hold whole units.

    Args:
        units: (N,) int64, of all rows of the batch.
        ranks: how many share each mini-batch; each gets N / ranks rows in a row.
        mini_batches: into how many a rank cuts its rows.
        whole: whether no unit may be cut; else units that do not fill the parts are cut at their ends.

    Raises:
        ConfigurationError: if the units do not fill the parts, and no unit may be cut.
    """
    share = len(units) // (ranks * mini_batches)
    parts = packed(units, torch.ones_like(units), share)
    if all(len(part) == share for part in parts):
        return [row for rank in range(ranks) for number in range(mini_batches) for row in parts[number * ranks + rank]]
    if whole:
        raise ConfigurationError(
            f"groups that must stay whole do not fill {ranks} rank(s) x {mini_batches} mini-batch(es) of {share} rows: make "
            "actor_rollout_ref.actor.ppo_mini_batch_size as large as data.train_batch_size, or use fewer ranks"
        )
    return torch.argsort(units, stable=True).tolist()  # type: ignore[no-any-return]


def spread(units: Tensor, costs: Tensor, ranks: int) -> list[list[int]]:
    """The rows of each rank, whole units, the largest first to the rank that has least; a rank may get none.

    Args:
        units: (N,) int64.
        costs: (N,) int64 of each row.
        ranks: how many.
    """
    parts: list[list[int]] = [[] for _ in range(ranks)]
    spent = [0] * ranks
    for unit in packed(units, costs, 0):  # each alone, the largest first
        least = spent.index(min(spent))
        parts[least] += unit
        spent[least] += int(costs[unit].sum())
    return parts


class WholeUnits:
    """Stands for `engine.forward_backward_batch`: cuts a batch whose units are numbered into micro-batches of whole ones.

    Args:
        engine: verl's.
        forward_backward: the engine's own method.
        whole: whether no unit may be cut, however small the user's limit.
    """

    def __init__(self, engine: Any, forward_backward: Callable[..., dict[str, Any]], *, whole: bool) -> None:
        self.engine = engine
        self.forward_backward = forward_backward
        self.whole = whole

    def __call__(self, data: Any, loss_function: Any, forward_only: bool = False) -> dict[str, Any]:
        """The pass over all micro-batches; what the model gave is in the order of `data`."""
        from verl.utils import tensordict_utils as tu

        if UNIT not in data.keys():  # noqa: SIM118
            return self.forward_backward(data, loss_function, forward_only)
        cut: list[Sequence[int]] = []
        by_tokens = tu.get_non_tensor_data(data, "use_dynamic_bsz", default=True)
        with self._cutting(functools.partial(micro_batches, whole=self.whole, made=cut)):
            outputs = self.forward_backward(data, loss_function, forward_only)
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", by_tokens)
        place = {row: number for number, row in reversed(list(enumerate(row for part in cut for row in part)))}
        for name, values in outputs["model_output"].items():
            rows = values.unbind()
            ordered = [rows[place[row]] for row in range(len(data))]
            outputs["model_output"][name] = torch.nested.as_nested_tensor(ordered, layout=torch.jagged)
        return outputs

    @contextlib.contextmanager
    def _cutting(self, function: Callable[..., Any]) -> Iterator[None]:
        """verl's engine calls the function where it would cut."""
        module: Any = sys.modules[type(self.engine).forward_backward_batch.__module__]
        original = module.prepare_micro_batches
        module.prepare_micro_batches = function
        try:
            yield
        finally:
            module.prepare_micro_batches = original


def micro_batches(
    data: Any, dp_group: Any = None, *, whole: bool, made: list[Sequence[int]], **options: Any
) -> tuple[list[Any], list[Sequence[int]]]:
    """Stands for verl's `prepare_micro_batches`: parts of the batch, as many on every rank, and their rows.

    Args:
        data: of this rank.
        dp_group: the ranks.
        whole: whether no unit may be cut.
        made: gets the rows of each part.
        **options: of verl, which do not matter here.
    """
    from verl.utils import tensordict_utils as tu

    units, tokens = padded(data[UNIT])[:, 0].cpu(), data["input_ids"].offsets().diff().cpu()
    if tu.get_non_tensor_data(data, "use_dynamic_bsz", default=True):
        costs, limit = tokens, int(data["max_token_len_per_gpu"]) * tu.get_non_tensor_data(data, "sp_size", default=1)
        tu.assign_non_tensor_data(data, "use_dynamic_bsz", False)  # or verl puts the rows in order, the idle ones too
    else:
        costs, limit = torch.ones_like(tokens), int(data["micro_batch_size_per_gpu"])
    parts = packed(units if whole else fitting(units, costs, limit), costs, limit)
    own = len(parts)
    parts += [[int(tokens.argmin())]] * (most(own, dp_group) - own)
    batches = [tu.index_select_tensor_dict(data, part) for part in parts]
    for idle in batches[own:]:  # the other ranks compute once more, and wait for this one in the forward
        for name in COUNTED:
            idle[name] = idle[name] * 0
        if ROW in idle.keys():  # noqa: SIM118
            idle[ROW] = torch.full_like(idle[ROW], -1)
    made += parts
    return batches, parts


def fitting(units: Tensor, costs: Tensor, limit: int) -> Tensor:
    """The units (n,) with those that cost more than the limit cut into pieces that do not, as far as single rows allow."""
    order = torch.argsort(units, stable=True)
    pieces: list[int] = []
    before, spent = None, 0
    for unit, cost in zip(units[order].tolist(), costs[order].tolist(), strict=True):
        new = unit != before or spent + cost > limit
        pieces.append((pieces[-1] + 1 if pieces else 0) if new else pieces[-1])
        before, spent = unit, cost if new else spent + cost
    return torch.empty_like(units).scatter(0, order, torch.tensor(pieces))


def most(count: int, group: Any) -> int:
    """The largest `count` of any rank."""
    from verl.utils.device import get_device_name

    largest = torch.tensor([count], device=get_device_name())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(largest)
