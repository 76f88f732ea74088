"""Between verl's columns and Rollouts: the only place that knows how verl lays rows out.

verl keeps a row's response columns jagged (as long as the response) in TransferQueue and in its workers; hooks see them
right-padded. What belongs to rlplugins travels under the prefix `rlplugins__`.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from rlplugins.errors import DataError
from rlplugins.rollouts import POLICY, Column, Columns, Prompts, Rollouts, as_column, written_column

PREFIX = "rlplugins__"
REQUESTS = f"{PREFIX}requests"
"""Column of a prompt: what hooks made of each of its requests, or None."""
NUMBERS = f"{PREFIX}numbers"
"""Column of a row of an update: a 1 (0: it only fills a mini-batch), then the row's part of every column without tokens."""
KEY = "_verl_key"
"""Column of the rollouts: verl's key of the row; empty for a row that a plugin made."""

DRAWN = ("prompts", "responses", "response_mask", "rm_scores", "extra_fields")
"""The stored columns that make rollouts; `rollout_log_probs` comes to them where the stack reads it."""
OF_UPDATE = {"mask": "response_mask", "old_log_probs": "old_log_probs", "ref_log_probs": "ref_log_prob"}
"""Columns of an update that stand in verl's own of the name behind them, and need not be sent."""

OF_VERL = frozenset(
    {"prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids", "rollout_log_probs", "rm_scores",
     "old_log_probs", "ref_log_prob", "entropy", "values", "log_probs", "advantages", "returns", "attention_mask",
     "routed_experts", "multi_modal_inputs", "metrics", "extra_fields", "num_turns", "session_id", "uid", "global_steps",
     "dummy_tensor", "agent_name", "raw_prompt", "index", "__rollout_n__", "__do_sample__", "mm_processor_kwargs",
     "mm_processor_output", "reward_score", "token_level_rewards", "rollout_is_weights", "teacher_ids",
     "teacher_logprobs", "tools_kwargs", "interaction_kwargs", "priority"}
)  # fmt: skip
"""Columns that are not the data's."""


def padded(column: Any, width: int = 0) -> Tensor:
    """(B, T) from a jagged column, zeros behind the end and up to `width`."""
    dense: Tensor = column.to_padded_tensor(0) if column.is_nested else column
    return torch.nn.functional.pad(dense, (0, max(0, width - dense.shape[1])))


def as_list(column: Any) -> list[Any]:
    """A column of Python objects as a list."""
    if isinstance(column, Tensor):
        return column.tolist()  # type: ignore[no-any-return]
    items = column.tolist() if hasattr(column, "tolist") else list(column)
    return [getattr(item, "data", item) if type(item).__name__.startswith("NonTensor") else item for item in items]


def values_of(column: Any) -> list[Any]:
    """A stored column as a list with one entry per row."""
    return list(column.unbind()) if isinstance(column, Tensor) else as_list(column)


def flattened(row: Mapping[str, Any]) -> dict[str, Any]:
    """The data columns of a row: its own, and what stands in `extra_info` and `reward_model`."""
    found = {}
    for name, value in row.items():
        if name in ("extra_info", "reward_model") and isinstance(value, Mapping):
            found |= {key: item for key, item in value.items() if key not in row}
        found[name] = value
    return found


def data_columns(stored: Mapping[str, Any], rows: int) -> dict[str, Column]:
    """The data columns of stored rows."""
    names = [name for name in stored if name not in OF_VERL and not name.startswith(PREFIX)]
    lists = {name: as_list(stored[name]) for name in names}
    records = [flattened({name: lists[name][place] for name in names}) for place in range(rows)]
    found = dict.fromkeys(name for record in records for name in record)
    return {name: as_column([record.get(name) for record in records]) for name in found}


def to_rollouts(
    stored: Any, keys: Sequence[str], pool: Prompts, version: int, *, keep_log_probs: bool = False
) -> Rollouts:
    """The rows of a step, in the order in which they are given.

    Args:
        stored: what TransferQueue has of them.
        keys: verl's keys, with the uids of `uid_of`.
        pool: all prompts of the run.
        version: updates that the policy had made when the step began, for rows that do not say it.
        keep_log_probs: whether the stack reads the engine's log-probs.
    """
    rows = len(keys)
    mask = padded(stored["response_mask"]).bool()
    width = mask.shape[1]
    uids = [key.split("_")[0] for key in keys]
    position = torch.tensor([origin_of(key)[1] for key in keys])
    known = position >= 0
    groups = {uid: number for number, uid in enumerate(dict.fromkeys(uids))}
    extra = [dict(item or {}) for item in as_list(stored["extra_fields"])]
    components, names = components_of(extra)
    written = _written(extra)
    drawn = padded(stored["rollout_log_probs"], width).float() if "rollout_log_probs" in stored.keys() else None  # noqa: SIM118
    if bool(known.all()):
        columns = dict(pool.columns.take(position))
    else:
        columns = data_columns({name: stored[name] for name in stored.keys()}, rows)  # noqa: SIM118
    columns[KEY] = list(keys)
    return Rollouts(
        prompt_keys=torch.where(known, pool.keys[position.clamp(min=0)], 0),
        prompt_rows=torch.where(known, pool.rows[position.clamp(min=0)], -1),
        groups=torch.tensor([groups[uid] for uid in uids]),
        prompts=[row.tolist() for row in stored["prompts"].unbind()],
        responses=padded(stored["responses"], width),
        mask=mask,
        scores=scores_of(stored, rows),
        kind=torch.zeros(rows, dtype=torch.int8),
        kinds=(POLICY,),
        version=torch.tensor([_version(item, version) for item in extra]),
        rollout_log_probs=drawn * mask if drawn is not None and keep_log_probs else None,
        components=components,
        component_names=names,
        prefix=prefix_of(extra, mask),
        columns=Columns(columns | written, frozenset(written)),
    )


def no_rows(*, keep_log_probs: bool = False) -> Rollouts:
    """Rollouts without rows."""
    none, tokens = torch.zeros(0, dtype=torch.int64), torch.zeros((0, 1))
    return Rollouts(
        prompt_keys=none, prompt_rows=none, groups=none, prompts=[], responses=tokens.long(), mask=tokens.bool(),
        scores=tokens, kind=none.to(torch.int8), version=none, rollout_log_probs=tokens if keep_log_probs else None,
        columns=Columns({KEY: []}),
    )  # fmt: skip


def _version(extra: Mapping[str, Any], otherwise: int) -> int:
    steps = extra.get("min_global_steps")
    return otherwise if steps is None else int(steps)


def _written(extra: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Columns that hooks added to the requests."""
    names = dict.fromkeys(name for item in extra for name in item.get(f"{PREFIX}columns", {}))
    return {name: written_column([item.get(f"{PREFIX}columns", {}).get(name) for item in extra]) for name in names}


def components_of(extra: Sequence[Mapping[str, Any]]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The numbers (B, K) that the reward function gave beside the score, and their names."""
    given = [item.get("reward_extra_info") or {} for item in extra]
    first = next((item for item in given if item), {})
    names = tuple(name for name, value in first.items() if name != "score" and _is_number(value))
    if not names:
        return None, ()
    numbers = [[float(item[name]) if _is_number(item.get(name)) else torch.nan for name in names] for item in given]
    return torch.tensor(numbers, dtype=torch.float32), names


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "size", 1) == 1)


def prefix_of(extra: Sequence[Mapping[str, Any]], mask: Tensor) -> Tensor | None:
    """(B, T) bool, the forced beginning of each response; None if there is none."""
    sizes = torch.tensor([int(item.get(f"{PREFIX}prefix", 0)) for item in extra])
    if not bool(sizes.any()):
        return None
    return (torch.arange(mask.shape[1]) < sizes[:, None]) & mask


def scores_of(stored: Any, rows: int) -> Tensor:
    """(B, 1) rewards; NaN before a reward model on the training devices has given them."""
    if "rm_scores" not in stored.keys():  # noqa: SIM118
        return torch.full((rows, 1), torch.nan)
    return padded(stored["rm_scores"]).float().sum(1, keepdim=True)


def uid_of(place: int, prompt: int) -> str:
    """A name of a prompt that was sent, for verl's column `uid`, with which the keys of its rows begin.

    Args:
        place: its position among all that were sent, over the whole run.
        prompt: its position in the pool, -1 if it is not there.
    """
    return f"{uuid.uuid4()}.{place}.{prompt}"


def origin_of(key: str) -> tuple[int, int]:
    """Place and prompt (see `uid_of`) of a row with this key; -1, -1 of one that was sent before a stack was there."""
    _, *origin = key.split("_")[0].rsplit(".", 2)
    place, prompt = map(int, origin or (-1, -1))
    return place, prompt


def in_order(keys: Sequence[str]) -> list[str]:
    """The rows' keys in the order of prompt and draw.

    Raises:
        DataError: if an agent loop gave several outputs for one request.
    """
    if any(key.rsplit("_", 1)[1] != "0" for key in keys):
        raise DataError(
            "an agent loop gave several outputs for one request; rlplugins takes one response per request: choose another "
            "agent loop (actor_rollout_ref.rollout.agent.default_agent_loop)"
        )
    return sorted(keys, key=lambda key: (origin_of(key)[0], key.split("_")[0], int(key.rsplit("_", 2)[1])))


@dataclass(frozen=True)
class Place:
    """Where a column of an update stands in verl's store.

    Attributes:
        key: name of the stored column.
        dtype: of the column; None: Python objects.
        part: which of the numbers of a row it is, a slice if (B, n); None: it has one entry per token.
    """

    key: str
    dtype: torch.dtype | None = None
    part: int | slice | None = None


@dataclass(frozen=True)
class Packing:
    """How the columns of an update travel.

    Attributes:
        places: per column.
        width: T of the step.
    """

    places: Mapping[str, Place]
    width: int


def pack(columns: Mapping[str, Column], there: Mapping[str, str] | None = None) -> tuple[dict[str, Any], Packing]:
    """Columns of an update as TransferQueue stores them, B rows each.

    What is per token goes without its padding. All other numbers of a row go together, since what the store costs is
    per row and column.

    Args:
        columns: of B rows, `mask` among them.
        there: columns that need not be sent, and the name under which verl's store has them.
    """
    mask, there = columns["mask"], there or {}
    assert isinstance(mask, Tensor)
    width = mask.shape[1]
    sizes = ((torch.arange(width) + 1) * mask.bool().cpu()).amax(1).clamp(min=1).tolist()
    places: dict[str, Place] = {}
    packed: dict[str, Any] = {}
    numbers = [torch.ones((len(mask), 1), dtype=torch.int64)]
    count = 1
    for name, column in columns.items():
        key = f"{PREFIX}{name}"
        if not isinstance(column, Tensor):
            places[name], packed[key] = Place(key), list(column)
        elif name in there:
            places[name] = Place(there[name], column.dtype)
        elif _has_tokens(name, column, width):
            places[name] = Place(key, column.dtype)
            packed[key] = [row[:size].clone() for row, size in zip(column.unbind(), sizes, strict=True)]
        else:
            bits = _bits(column.cpu())
            part = count if column.dim() == 1 else slice(count, count + bits.shape[1])
            places[name] = Place(NUMBERS, column.dtype, part)
            numbers.append(bits)
            count += bits.shape[1]
    packed[NUMBERS] = list(torch.cat(numbers, 1).unbind())
    return packed, Packing(places, width)


def _has_tokens(name: str, column: Tensor, width: int) -> bool:
    return column.dim() > 1 and column.shape[1] == width > 1 and name != "rewards"


def _bits(column: Tensor) -> Tensor:
    """(B, n) int64 that holds the numbers of a column (B,) or (B, n) exactly."""
    column = column[:, None] if column.dim() == 1 else column
    return column.double().view(torch.int64) if column.is_floating_point() else column.long()


def real_rows(data: Mapping[str, Any]) -> Tensor:
    """(n,) bool, which rows of an update are rows, and not there to fill a mini-batch."""
    return padded(data[NUMBERS])[:, 0] > 0


def unpack(data: Mapping[str, Any], packing: Packing, rows: Tensor, device: Any) -> dict[str, Column]:
    """The columns on a worker, of the rows `rows` (n,) of its mini-batch."""
    found = {name: _unpacked(data[place.key], place, packing.width, rows, device)
             for name, place in packing.places.items()}  # fmt: skip
    for name in OF_UPDATE.keys() & found.keys() - {"mask"}:
        found[name] = found[name] * found["mask"]  # type: ignore[operator]
    return found


def _unpacked(column: Any, place: Place, width: int, rows: Tensor, device: Any) -> Column:
    if place.dtype is None:
        items = as_list(column)
        return [items[row] for row in rows.tolist()]
    dense = padded(column, width if place.part is None else 0)
    dense = dense[rows.to(dense.device)].to(device)
    if place.part is None:
        return dense.to(place.dtype)
    bits = dense[:, place.part]
    return (bits.view(torch.float64) if place.dtype.is_floating_point else bits).to(place.dtype)


def stored(rows: Mapping[str, list[Any]], count: int) -> TensorDict:
    """Columns of per-row values as TransferQueue takes and gives them: tensors jagged, objects as they are."""
    return TensorDict({name: _stored(values) for name, values in rows.items()}, batch_size=[count])


def _stored(values: list[Any]) -> Any:
    if not all(isinstance(value, Tensor) for value in values):
        return NonTensorStack(*values)
    return torch.nested.as_nested_tensor(values, layout=torch.jagged)


def filler(like: list[Any]) -> Any:
    """The value of a column on a row that only fills a mini-batch: verl gives such a row a response of one token."""
    return like[0].new_zeros(1) if isinstance(like[0], Tensor) else like[0]
