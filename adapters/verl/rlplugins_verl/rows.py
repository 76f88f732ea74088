"""Rows that plugins add to a step, written into verl's store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import transfer_queue as tq

from rlplugins.rollouts import Columns, Rollouts
from rlplugins_verl.columns import KEY, padded, stored, uid_of, values_of


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
    drawn_so = _same_tokens(drawn, extended, own)
    same = _unchanged(drawn, extended, own, drawn_so)
    keys = [str(key) if keep else "" for key, keep in zip(extended.columns[KEY], same, strict=True)]
    new = [row for row, key in enumerate(keys) if not key]
    if new:
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        made, fields, marks = _made(drawn, extended, new, own, drawn_so, there, tags)
        for row, key in zip(new, made, strict=True):
            keys[row] = key
        tq.kv_batch_put(keys=made, partition_id=batch.partition_id, fields=stored(fields, len(made)), tags=marks)
        batch = type(batch)(
            keys=[*batch.keys, *made], tags=[*batch.tags, *marks], partition_id=batch.partition_id, fields=batch.fields,
            extra_info=batch.extra_info,
        )  # fmt: skip
    columns = Columns({**extended.columns, KEY: keys}, frozenset(extended.columns.written))
    return batch, replace(extended, columns=columns)


def _same_tokens(drawn: Rollouts, extended: Rollouts, own: Sequence[int]) -> list[bool]:
    """Which rows are the prompt and response that were drawn."""
    source = torch.tensor(own, dtype=torch.int64)
    known, source = source >= 0, source.clamp(min=0)
    width = max(drawn.mask.shape[1], extended.mask.shape[1])
    pairs = ((getattr(part, name) for part in (drawn, extended)) for name in ("responses", "mask"))
    for before, after in pairs:
        known = known & (padded(before, width)[source] == padded(after, width)).all(1)
    prompts = [extended.prompts[row] == drawn.prompts[place] for row, place in enumerate(source.tolist())]
    return [bool(known[row]) and same for row, same in enumerate(prompts)]


def _unchanged(drawn: Rollouts, extended: Rollouts, own: Sequence[int], drawn_so: Sequence[bool]) -> list[bool]:
    """Which rows are those that were drawn, with their scores; of several copies the first."""
    before = drawn.scores[torch.tensor(own, dtype=torch.int64).clamp(min=0)]
    scored = ((before == extended.scores) | (before.isnan() & extended.scores.isnan())).flatten().tolist()
    seen: set[int] = set()
    result = []
    for place, same, score in zip(own, drawn_so, scored, strict=True):
        result.append(same and score and place not in seen)
        if result[-1]:
            seen.add(place)
    return result


def _made(
    drawn: Rollouts, extended: Rollouts, new: Sequence[int], own: Sequence[int], drawn_so: Sequence[bool], there: Any,
    tags: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], dict[str, list[Any]], list[dict[str, Any]]]:  # fmt: skip
    """Keys, stored columns and tags of new rows; what plugins do not set is that of a row of the same prompt, or of any."""
    pattern = {name: values_of(there[name]) for name in there.keys()}  # noqa: SIM118
    keys = [str(key) for key in drawn.columns[KEY]]
    prompts = drawn.prompt_rows.tolist()
    by_prompt = {prompt: place for place, prompt in reversed(list(enumerate(prompts))) if prompt >= 0}
    uids = _uids(extended, own, keys)
    made, marks = [], []
    fields: dict[str, list[Any]] = {name: [] for name in pattern}
    width = torch.arange(1, extended.mask.shape[1] + 1)
    for number, row in enumerate(new):
        place = own[row] if own[row] >= 0 else by_prompt.get(int(extended.prompt_rows[row]), -1)
        like = max(place, 0)
        size = max(1, int((width * (extended.mask[row] | (extended.responses[row] != 0))).max()))
        prompt, response = torch.tensor(extended.prompts[row]), extended.responses[row, :size]
        mask = extended.mask[row, :size].long()
        score = torch.zeros(size)
        score[-1] = extended.scores[row, 0]
        ids = torch.cat([prompt, response])
        values = {
            "prompts": prompt, "responses": response, "response_mask": mask, "loss_mask": mask, "input_ids": ids,
            "position_ids": torch.arange(len(ids)), "rm_scores": score, "attention_mask": torch.ones_like(ids),
            "uid": uids[row],
        }  # fmt: skip
        kept = pattern.get("rollout_log_probs") if drawn_so[row] else None
        values["rollout_log_probs"] = torch.zeros(size) if kept is None else kept[like][:size]
        if place < 0:  # of no prompt of the step
            values["multi_modal_inputs"] = {}
        for name, column in pattern.items():
            fields[name].append(values.get(name, column[like]))
        made.append(f"{uids[row]}_{10_000 + number}_0")
        sizes = {"prompt_len": len(prompt), "response_len": size, "seq_len": len(ids)}
        marks.append({**tags[keys[like]], **sizes})
    return made, fields, marks


def _uids(extended: Rollouts, own: Sequence[int], keys: Sequence[str]) -> list[str]:
    """verl's name of each row's group: that of the drawn rows in it, or a new one; a row of no group is alone."""
    groups = extended.groups.tolist()
    names = {
        group: keys[place].rsplit("_", 2)[0]
        for group, place in zip(groups, own, strict=True) if group >= 0 and place >= 0
    }  # fmt: skip
    return [names.setdefault(group, uid_of(-1, -1)) if group >= 0 else uid_of(-1, -1) for group in groups]
