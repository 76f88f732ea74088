"""Rows that plugins add to a step, written into verl's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor

from rlplugins.rollouts import Columns, Rollouts
from rlplugins_verl.columns import KEY, PREFIX, PROMPT, as_list, padded, stored


def added_rows(batch: Any, there: Any, drawn: Rollouts, extended: Rollouts) -> tuple[Any, Rollouts]:
    """The batch with the rows that plugins added or changed, each under a key of its own, and the rollouts naming them.

    Args:
        batch: verl's batch of the step.
        there: what is stored of its rows, in the order of `drawn`.
        drawn: the rows as they were drawn.
        extended: the rows after `extend_rollouts`.
    """
    place = {key: row for row, key in enumerate(drawn.columns[KEY])}
    own = [place.get(str(key), -1) for key in extended.columns[KEY]]
    same = _unchanged(drawn, extended, torch.tensor(own, dtype=torch.int64))
    keys = [str(key) if keep else "" for key, keep in zip(extended.columns[KEY], same, strict=True)]
    new = [row for row, key in enumerate(keys) if not key]
    if new:
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        made, fields, marks = _made(extended, new, own, there, list(drawn.columns[KEY]), tags)
        for row, key in zip(new, made, strict=True):
            keys[row] = key
        tq.kv_batch_put(keys=made, partition_id=batch.partition_id, fields=stored(fields, len(made)), tags=marks)
        batch = type(batch)(
            keys=[*batch.keys, *made], tags=[*batch.tags, *marks], partition_id=batch.partition_id, fields=batch.fields,
            extra_info=batch.extra_info,
        )  # fmt: skip
    columns = Columns({**extended.columns, KEY: keys}, frozenset(extended.columns.written))
    return batch, replace(extended, columns=columns)


def _unchanged(drawn: Rollouts, extended: Rollouts, own: Tensor) -> list[bool]:
    """Which rows are those that were drawn, token by token; of several copies the first."""
    known = own >= 0
    source = own.clamp(min=0)
    width = max(drawn.mask.shape[1], extended.mask.shape[1])
    pairs = ((getattr(part, name) for part in (drawn, extended)) for name in ("responses", "mask"))
    for before, after in pairs:
        known = known & (padded(before, width)[source] == padded(after, width)).all(1)
    scores = (drawn.scores[source] == extended.scores) | (drawn.scores[source].isnan() & extended.scores.isnan())
    known = known & scores.flatten()
    prompts = [extended.prompts[row] == drawn.prompts[place] for row, place in enumerate(source.tolist())]
    seen: set[int] = set()
    result = []
    for row, place in enumerate(own.tolist()):
        result.append(bool(known[row]) and prompts[row] and place not in seen)
        if result[-1]:
            seen.add(place)
    return result


def _made(
    extended: Rollouts, new: Sequence[int], own: Sequence[int], there: Any, keys: Sequence[str],
    tags: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], dict[str, list[Any]], list[dict[str, Any]]]:  # fmt: skip
    """Keys, stored columns and tags of new rows; what plugins do not set is that of a row of the same prompt."""
    positions = [int(place) for place in as_list(there[PROMPT])]
    pattern = {name: _values(there[name]) for name in there.keys()}  # noqa: SIM118
    by_prompt = {int(row): place for place, row in reversed(list(enumerate(positions)))}
    made, marks = [], []
    fields: dict[str, list[Any]] = {name: [] for name in pattern}
    width = torch.arange(1, extended.mask.shape[1] + 1)
    for number, row in enumerate(new):
        like = own[row] if own[row] >= 0 else by_prompt.get(_position(extended, row), 0)
        size = max(1, int((width * (extended.mask[row] | (extended.responses[row] != 0))).max()))
        prompt, response = torch.tensor(extended.prompts[row]), extended.responses[row, :size]
        mask = extended.mask[row, :size].long()
        score = torch.zeros(size)
        score[-1] = extended.scores[row, 0]
        ids = torch.cat([prompt, response])
        values = {
            "prompts": prompt, "responses": response, "response_mask": mask, "loss_mask": mask, "input_ids": ids,
            "position_ids": torch.arange(len(ids)), "rm_scores": score, "rollout_log_probs": torch.zeros(size),
            "attention_mask": torch.ones_like(ids),
        }  # fmt: skip
        for name, column in pattern.items():
            fields[name].append(values.get(name, column[like]))
        uid, _, _ = keys[like].rsplit("_", 2)
        made.append(f"{uid}_{10_000 + number}_0")
        sizes = {"prompt_len": len(prompt), "response_len": size, "seq_len": len(ids)}
        marks.append({**tags[keys[like]], **sizes})
    return made, fields, marks


def _position(extended: Rollouts, row: int) -> int:
    found = extended.columns.get(f"{PREFIX}prompt")
    return int(found[row]) if found is not None else -1


def _values(column: Any) -> list[Any]:
    return list(column.unbind()) if isinstance(column, Tensor) else as_list(column)
