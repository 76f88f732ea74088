"""Between OpenRLHF's Experience and Rollouts: the only place that knows how OpenRLHF lays rows out.

OpenRLHF keeps prompt and response in one sequence of S tokens, right-padded, and what is per token at the A = S - 1 places
from which a next token is predicted. Hooks see the response alone, (B, T). What belongs to rlplugins travels in `info`, under
the prefix `rlplugins/`: of a dictionary there OpenRLHF takes one entry per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlplugins.errors import DataError
from rlplugins.rollouts import POLICY, Column, Columns, Prompts, Rollouts, take, written_column
from rlplugins_openrlhf.pool import ELSEWHERE, PoolPrompt

PREFIX = "rlplugins/"
ROW = "_openrlhf_row"
"""Column of the rollouts: position among the samples of the step; -1 for a row that a plugin made."""
START = f"{PREFIX}start"
"""Tokens of the row's prompt, in the update."""
REAL = f"{PREFIX}real"
"""Whether a row is one, and not there to fill a mini-batch."""
FRAME = f"{PREFIX}frame"
"""What the mini-batches of the row's step need beside their rows."""
MEASURED = ("response_clip_ratio", "reward", "score")
"""What OpenRLHF itself writes into `info` of a sample; the rest is what the reward function logs."""


def starts_of(samples: Sequence[Any]) -> Tensor:
    """(B,) int64: tokens before the first that the policy drew, of samples of one row each; all, where it drew none."""
    actions = _padded(sample.action_mask for sample in samples).bool()
    whole = torch.tensor([sample.sequences.shape[1] for sample in samples], dtype=torch.int64)
    return torch.where(actions.any(1), actions.int().argmax(1) + 1, whole)


def _padded(parts: Iterable[Tensor]) -> Tensor:
    """(B, n) from one (1, m) of each sample, zeros behind its end."""
    rows = [part[0] for part in parts]
    return pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 1, dtype=torch.int64)


def to_rollouts(samples: Sequence[Any], known: Prompts, version: int, *, keep_log_probs: bool = False) -> Rollouts:
    """The rows of a step, in the order in which they are given.

    Args:
        samples: OpenRLHF's, one row each, whose prompts are `PoolPrompt`s.
        known: the prompt of each.
        version: updates that the policy had made when it drew them.
        keep_log_probs: whether the stack reads the engine's log-probs.
    """
    prompts: list[PoolPrompt] = [sample.prompts[0] for sample in samples]
    starts = starts_of(samples)
    lengths = _padded(sample.attention_mask for sample in samples).sum(1) - starts
    width = max([1, *lengths.tolist()])
    there = torch.arange(width) < lengths[:, None]
    sequences = _padded(sample.sequences for sample in samples)
    mask = there & to_responses(_padded(sample.action_mask for sample in samples), starts, width).bool()
    responses = torch.where(there, to_responses(sequences, starts + 1, width), 0)
    drawn = None
    if keep_log_probs:
        drawn = to_responses(_padded(sample.rollout_log_probs for sample in samples).float(), starts, width) * mask
    columns = dict(known.columns)
    written = _written(prompts)
    columns[ROW] = torch.arange(len(samples))
    components, names = components_of(samples)
    return Rollouts(
        prompt_keys=known.keys, prompt_rows=known.rows,
        groups=torch.tensor([prompt.place for prompt in prompts], dtype=torch.int64),
        prompts=[row[:start] for row, start in zip(sequences.tolist(), starts.tolist(), strict=True)],
        responses=responses, mask=mask, scores=scores_of(samples),
        kind=torch.zeros(len(samples), dtype=torch.int8), kinds=(POLICY,), version=torch.full((len(samples),), version),
        rollout_log_probs=drawn, components=components, component_names=names,
        prefix=prefix_of(prompts, mask), columns=Columns(columns | written, frozenset(written)),
    )  # fmt: skip


def complete(samples: Sequence[Any]) -> None:
    """Give a response that the reward function failed on no finite reward, where OpenRLHF would give it none.

    Raises:
        DataError: if no response has a reward.
    """
    given = next((sample for sample in samples if sample.rewards is not None), None)
    if given is None:
        raise DataError("the reward function failed on every response of a step; OpenRLHF's log above says how")
    missing = torch.full((1,), torch.nan)
    for sample in samples:
        if sample.rewards is None:
            sample.rewards = sample.scores = missing.clone()
            sample.info = {name: missing.clone() for name in given.info} | sample.info


def scores_of(samples: Sequence[Any]) -> Tensor:
    """(B, 1) rewards as they were given, NaN where there is none."""
    given = [torch.nan if sample.rewards is None else float(sample.rewards[0]) for sample in samples]
    return torch.tensor(given, dtype=torch.float32)[:, None]


def components_of(samples: Sequence[Any]) -> tuple[Tensor | None, tuple[str, ...]]:
    """The numbers (B, K) that the reward function gave as `extra_logs`, and their names."""
    given = samples[0].info if samples else ()
    names = tuple(name for name in given if name not in MEASURED and not name.startswith(PREFIX))
    if not names:
        return None, ()
    missing = torch.tensor(torch.nan)
    numbers = [
        torch.stack([sample.info.get(name, missing).reshape(()).float() for sample in samples]) for name in names
    ]
    return torch.stack(numbers, 1), names


def _written(prompts: Sequence[PoolPrompt]) -> dict[str, Column]:
    """Columns that hooks added to the requests."""
    given = [(prompt.drawn.columns or {}) if prompt.drawn is not None else {} for prompt in prompts]
    names = dict.fromkeys(name for item in given for name in item)
    return {name: written_column([item.get(name) for item in given]) for name in names}


def prefix_of(prompts: Sequence[PoolPrompt], mask: Tensor) -> Tensor | None:
    """(B, T) bool, the forced beginning of each response; None if there is none."""
    sizes = torch.tensor([prompt.prefix for prompt in prompts])
    if not bool(sizes.any()):
        return None
    return (torch.arange(mask.shape[1]) < sizes[:, None]) & mask


def in_order(samples: Sequence[Any]) -> list[Any]:
    """Samples in the order of the step's prompts; those of one prompt come in the order in which they were drawn."""
    return sorted(samples, key=lambda sample: sample.prompts[0].place)


def samples_of(rollouts: Rollouts, drawn: Rollouts, samples: Sequence[Any]) -> list[Any]:
    """OpenRLHF's samples of the rollouts: its own where a row is as it was drawn, new ones where a plugin made it.

    Args:
        rollouts: after the hooks of the rollouts.
        drawn: before them.
        samples: of the drawn rows.
    """
    own = torch.as_tensor(rollouts.columns[ROW])
    same = unchanged(drawn, rollouts, own)
    by_prompt = {int(key): row for row, key in reversed(list(enumerate(drawn.prompt_keys.tolist())))}
    keys = rollouts.prompt_keys.tolist()
    found = []
    for row, (place, kept) in enumerate(zip(own.tolist(), same, strict=True)):
        like = by_prompt.get(keys[row]) if place < 0 else place
        sample = samples[like] if like is not None else _elsewhere(samples[0])
        found.append(sample if kept else _made(rollouts, row, sample))
    return found


def _elsewhere(sample: Any) -> Any:
    """A sample of a prompt of which the step has no other row."""
    return replace(
        sample, prompts=[PoolPrompt.of("", ELSEWHERE)], labels=[""], images=[None] * len(sample.images),
        mm_train_inputs=[None] * len(sample.mm_train_inputs),
    )  # fmt: skip


def unchanged(drawn: Rollouts, extended: Rollouts, own: Tensor) -> list[bool]:
    """Which rows are those that were drawn, token by token; of several copies the first.

    Args:
        drawn: the rows as they were drawn.
        extended: the rows after `extend_rollouts`.
        own: (N,) int64, which drawn row each was; -1: none.
    """
    known, source = own >= 0, own.clamp(min=0)
    width = max(drawn.mask.shape[1], extended.mask.shape[1])
    for name in ("responses", "mask"):
        before, after = (_wide(getattr(part, name), width) for part in (drawn, extended))
        known = known & (before[source] == after).all(1)
    scores = (drawn.scores[source] == extended.scores) | (drawn.scores[source].isnan() & extended.scores.isnan())
    known = known & scores.flatten()
    seen: set[int] = set()
    result = []
    for row, place in enumerate(source.tolist()):
        kept = bool(known[row]) and place not in seen and extended.prompts[row] == drawn.prompts[place]
        result.append(kept)
        if kept:
            seen.add(place)
    return result


def _made(rollouts: Rollouts, row: int, like: Any) -> Any:
    """A sample of a row that a plugin made; what plugins do not set is that of a row of the same prompt."""
    prompt = torch.tensor(rollouts.prompts[row])
    there = rollouts.mask[row] | (rollouts.responses[row] != 0)
    size = max(1, int(((torch.arange(len(there)) + 1) * there).max()))
    sequence = torch.cat([prompt, rollouts.responses[row, :size].cpu()])
    own = torch.zeros(len(sequence) - 1, dtype=like.action_mask.dtype)
    own[len(prompt) - 1 :] = rollouts.mask[row, :size].to(own)
    score = rollouts.scores[row].float()
    info = {name: value.clone() for name, value in like.info.items() if not name.startswith(PREFIX)}
    if rollouts.components is not None:
        info |= dict(zip(rollouts.component_names, rollouts.components[row].float().split(1), strict=True))
    return replace(
        like, sequences=sequence[None], attention_mask=torch.ones_like(sequence)[None], action_mask=own[None],
        rollout_log_probs=None if like.rollout_log_probs is None else torch.zeros_like(own, dtype=torch.float32)[None],
        rewards=score, scores=score, response_length=own.sum()[None], truncated=torch.zeros_like(like.truncated),
        total_length=torch.tensor([float(len(sequence))]),
        info=info | {name: score for name in ("reward", "score") if name in info},
    )  # fmt: skip


def filled(samples: Sequence[Any], multiple: int, least: int) -> list[Any]:
    """The samples and, up to a multiple that is at least so many, copies of the shortest in whose mask no token is."""
    count = -len(samples) % multiple
    while len(samples) + count < least:
        count += multiple
    if not count:
        return list(samples)
    shortest = min(samples, key=lambda sample: int(sample.total_length))
    mask = torch.zeros_like(shortest.action_mask)
    return [*samples, *(replace(shortest, action_mask=mask, info=dict(shortest.info)) for _ in range(count))]


def level(experiences: Sequence[Any]) -> None:
    """Give the rows that fill the means of the others: OpenRLHF averages what it logs over all of them."""
    real = torch.cat([torch.as_tensor(experience.info[REAL]) for experience in experiences])
    if bool(real.all()):
        return
    for name in MEASURES:
        for experience, values in zip(
            experiences, _leveled([getattr(item, name) for item in experiences], real), strict=True
        ):
            setattr(experience, name, values)
    for name in [name for name in experiences[0].info if not name.startswith(PREFIX)]:
        for experience, values in zip(
            experiences, _leveled([item.info[name] for item in experiences], real), strict=True
        ):
            experience.info[name] = values


def _leveled(parts: Sequence[Tensor], real: Tensor) -> Sequence[Tensor]:
    whole = torch.cat(list(parts)).float()
    return torch.where(real, whole, whole[real].mean()).split([len(part) for part in parts])


MEASURES = ("response_length", "truncated", "total_length")
"""Numbers per row that OpenRLHF logs beside `info`."""


def _wide(column: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(column, (0, width - column.shape[1]))


def to_responses(column: Tensor, starts: Tensor, width: int) -> Tensor:
    """(b, T) of the responses, from a column (b, A) of whole sequences, 0 beyond its end.

    Args:
        column: per place from which a token is predicted.
        starts: (b,) tokens of each row's prompt.
        width: T.
    """
    place = (starts - 1)[:, None] + torch.arange(width, device=starts.device)
    inside = place < column.shape[1]
    return torch.where(inside, column.gather(1, place.clamp(max=column.shape[1] - 1)), torch.zeros_like(column[:1, :1]))


def to_sequences(column: Tensor, starts: Tensor, width: int) -> Tensor:
    """(b, A) of whole sequences, from a column (b, T) of their responses, 0 elsewhere; `width` is A."""
    place = torch.arange(width, device=column.device) - (starts - 1)[:, None]
    inside = (place >= 0) & (place < column.shape[1])
    return torch.where(inside, column.gather(1, place.clamp(0, column.shape[1] - 1)), torch.zeros_like(column[:1, :1]))


@dataclass(frozen=True)
class Packing:
    """How the columns of an update travel.

    Attributes:
        layouts: per column `token` (B, T), `row` (B, n), `flat` (B,) or `objects`.
        width: T of the step.
    """

    layouts: Mapping[str, str]
    width: int

    @classmethod
    def of(cls, columns: Mapping[str, Column]) -> Packing:
        """The layouts of these columns."""
        mask = columns["mask"]
        assert isinstance(mask, Tensor)
        width = mask.shape[1]
        return cls({name: _layout(name, column, width) for name, column in columns.items()}, width)


def _layout(name: str, column: Column, width: int) -> str:
    if not isinstance(column, Tensor):
        return "objects"
    if column.dim() == 1:
        return "flat"
    return "token" if column.shape[1] == width > 1 and name != "rewards" else "row"


def packed(columns: Mapping[str, Column], packing: Packing, rows: Tensor, starts: Tensor) -> dict[str, Column]:
    """What goes into `info` of an experience.

    Args:
        columns: of the update, B rows each.
        packing: their layouts.
        rows: (b,) int64, the experience's rows; those beyond B fill it.
        starts: (b,) tokens of each row's prompt.
    """
    count = len(columns["mask"])
    real = rows < count
    place = rows.clamp(max=max(0, count - 1))
    found: dict[str, Column] = {START: starts, REAL: real}
    mask = columns["mask"]
    assert isinstance(mask, Tensor)
    used = mask[place].any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else 1
    for name, column in columns.items():
        values = take(column, place)
        if packing.layouts[name] == "token":
            assert isinstance(values, Tensor)
            values = values[:, :longest]
        found[f"{PREFIX}{name}"] = values.clone() if isinstance(values, Tensor) else [[value] for value in values]
    return found


def unpacked(infos: Sequence[Mapping[str, Any]], packing: Packing, device: Any) -> dict[str, Column]:
    """The columns of the real rows of several micro-batches, on the device of the update.

    Args:
        infos: per micro-batch its part of `info`, one entry per row each.
        packing: how the columns were packed.
        device: of the update.
    """
    real = [bool(kept) for info in infos for kept in info[REAL]]
    found: dict[str, Column] = {}
    for name, layout in packing.layouts.items():
        values = [value for info in infos for value in info[f"{PREFIX}{name}"]]
        values = [value for value, kept in zip(values, real, strict=True) if kept]
        found[name] = _stacked(values, layout, packing.width, device)
    return found


def _stacked(values: list[Any], layout: str, width: int, device: Any) -> Column:
    if layout == "objects":
        return [value[0] for value in values]
    if layout == "token":
        rows = [torch.nn.functional.pad(torch.as_tensor(value), (0, width - len(value))) for value in values]
    else:
        rows = [torch.as_tensor(value) for value in values]
    return torch.stack(rows).to(device) if rows else torch.zeros(0, width, device=device)


def taken(info: dict[str, Any]) -> dict[str, Any]:
    """What belongs to rlplugins, taken out of an experience's `info`, since OpenRLHF logs what is left in it."""
    return {name: info.pop(name) for name in [name for name in info if name.startswith(PREFIX)]}
