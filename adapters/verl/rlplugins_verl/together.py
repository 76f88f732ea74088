"""Rows that a plugin needs in one micro-batch (`needs.together`): dealt whole to ranks and mini-batches, and cut whole.

verl deals rows to ranks by their length and cuts a mini-batch wherever it is full. The driver therefore puts the batch in
an order in which verl's equal parts hold whole units (`dealt`); on the worker the cut itself is ours for the time of the
mini-batch (`cut_whole`), within the limits that the user has set.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.together import packed
from rlplugins_verl.columns import PREFIX

UNIT = f"{PREFIX}unit"
"""Column of a row: the rows with the same number stay together."""
ROW = f"{PREFIX}row"
"""Column of a micro-batch: the row's place among the real ones of the mini-batch, -1 for one that counts nowhere."""


def dealt(units: Tensor, ranks: int, mini_batches: int) -> list[int]:
    """The order of the rows in which the equal parts that verl deals out hold whole units.

    Args:
        units: (N,) int64, of all rows of the batch.
        ranks: how many share each mini-batch; each gets N / ranks rows in a row.
        mini_batches: into how many a rank cuts its rows.

    Raises:
        ConfigurationError: if the units do not fill the parts.
    """
    share = len(units) // (ranks * mini_batches)
    parts = packed(units, torch.ones_like(units), share)
    if any(len(part) != share for part in parts):
        raise ConfigurationError(
            f"groups that must stay whole do not fill {ranks} rank(s) x {mini_batches} mini-batch(es) of {share} rows: make "
            "actor_rollout_ref.actor.ppo_mini_batch_size as large as data.train_batch_size, or use fewer ranks"
        )
    return [row for rank in range(ranks) for number in range(mini_batches) for row in parts[number * ranks + rank]]


@contextlib.contextmanager
def cut_whole(engine: Any, units: Tensor) -> Iterator[None]:
    """Let verl's engine cut its next mini-batch into micro-batches of whole units (n,)."""
    module: Any = sys.modules[type(engine).forward_backward_batch.__module__]
    original = module.prepare_micro_batches
    module.prepare_micro_batches = functools.partial(micro_batches, units)
    try:
        yield
    finally:
        module.prepare_micro_batches = original


def micro_batches(
    units: Tensor, data: Any, dp_group: Any = None, **options: Any
) -> tuple[list[Any], list[Sequence[int]]]:
    """Stands for verl's `prepare_micro_batches`: parts of the mini-batch, as many on every rank, and their rows."""
    from verl.utils import tensordict_utils as tu

    tokens = data["input_ids"].offsets().diff().cpu()
    if tu.get_non_tensor_data(data, "use_dynamic_bsz", default=True):
        spread = tu.get_non_tensor_data(data, "sp_size", default=1)
        parts = packed(units, tokens, int(data["max_token_len_per_gpu"]) * spread)
    else:
        parts = packed(units, torch.ones_like(tokens), int(data["micro_batch_size_per_gpu"]))
    own = len(parts)
    parts += [[int(tokens.argmin())]] * (most(own, dp_group) - own)
    batches = [tu.index_select_tensor_dict(data, part) for part in parts]
    for idle in batches[own:]:  # the other ranks compute once more, and wait for this one in the forward
        idle[ROW] = torch.full_like(idle[ROW], -1)
    return batches, parts


def most(count: int, group: Any) -> int:
    """The largest `count` of any rank."""
    from verl.utils.device import get_device_name

    largest = torch.tensor([count], device=get_device_name())
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(largest)
