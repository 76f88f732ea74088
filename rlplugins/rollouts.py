"""The batch that hooks see: prompts before generation, rollouts after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.table import PromptTable

Column: TypeAlias = Tensor | list[Any]
"""One entry per row: a tensor whose first dimension is the rows, or a list of Python objects."""

POLICY = "policy"
"""The kind of a row that the policy drew for this very prompt."""

DECLARED = frozenset({"components", "entropy", "ref_log_probs", "rollout_log_probs", "values"})
"""Fields of `Rollouts` that cost a pass or an option of the trainer: reading one takes a declared need."""


def prompt_key(identity: str) -> int:
    """The stable key of a prompt: 64 bits of a hash of the user's id, or of the prompt before rewriting."""
    return int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big", signed=True)


def take(column: Column, index: Tensor) -> Column:
    """The rows `index` (int64 or bool) of a column."""
    if isinstance(column, Tensor):
        return column[index.to(column.device)]
    rows = index.nonzero().flatten() if index.dtype == torch.bool else index
    return [column[row] for row in rows.tolist()]


def as_column(values: list[Any]) -> Column:
    """Numbers as a tensor, everything else as it is."""
    kinds = {type(value) for value in values}
    if kinds == {bool} or (kinds == {int} and all(-(2**63) <= value < 2**63 for value in values)):
        return torch.tensor(values)
    if kinds and kinds <= {int, float}:
        return torch.tensor(values, dtype=torch.float32)
    return values


def written_column(values: list[Any]) -> Column:
    """A column that a hook wrote on the requests, from `column.tolist()`: lists of k numbers as (B, k)."""
    sizes = {len(value) if isinstance(value, list | tuple) else 0 for value in values}
    if len(sizes) == 1 and 0 not in sizes:
        numbers = as_column([number for value in values for number in value])
        if isinstance(numbers, Tensor):
            return numbers.view(len(values), -1)
    return as_column(values)


class Columns(MutableMapping[str, Column]):
    """Free columns by name. `written`: those that plugins added in this step, which travel to the update."""

    def __init__(self, columns: Mapping[str, Column] | None = None, written: frozenset[str] = frozenset()) -> None:
        self._columns = dict(columns or {})
        self.written = set(written)

    def __getitem__(self, name: str) -> Column:
        return self._columns[name]

    def __setitem__(self, name: str, column: Column) -> None:
        self._columns[name] = column
        self.written.add(name)

    def __delitem__(self, name: str) -> None:
        del self._columns[name]
        self.written.discard(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def take(self, index: Tensor) -> Columns:
        """The rows `index` of every column."""
        return Columns({name: take(column, index) for name, column in self.items()}, frozenset(self.written))


class ReadGuard:
    """What one plugin declared that it reads; everything else raises, naming the line to add."""

    def __init__(self, plugin: str, declared: frozenset[str]) -> None:
        self.plugin = plugin
        self.declared = declared

    def check(self, name: str) -> None:
        """Raise if `name` was not declared."""
        if name not in self.declared:
            raise ConfigurationError(
                f'{self.plugin} reads the column {name!r} without declaring it: add needs.column("{name}") to its needs'
            )


@dataclass
class Prompts:
    """P prompts: the pool of the run, or the ones chosen for a step.

    Attributes:
        keys: (P,) int64, stable across steps and epochs (`prompt_key`).
        rows: (P,) int64, the row of each prompt in `table`.
        table: what the run remembers about each prompt.
        texts: P prompts as the user wrote them: a string or a list of chat messages each.
        columns: further columns of the prompt file (category, answer, hints, ...).
    """

    keys: Tensor
    rows: Tensor
    table: PromptTable
    texts: Sequence[Any]
    columns: Columns = field(default_factory=Columns)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> Column:
        """The column `name`."""
        return self.columns[name]

    def positions(self, rows: Tensor) -> Tensor:
        """Where the prompts with these rows of the prompt table stand, (M,) int64; -1: not among these prompts."""
        place = torch.full((len(self.table) + 1,), -1)
        place[self.rows] = torch.arange(len(self))
        place[-1] = -1  # row -1, outside of the pool
        return place[rows.cpu()]

    def select(self, index: Tensor) -> Prompts:
        """The prompts at positions `index` (int64), in that order."""
        texts = [self.texts[row] for row in index.tolist()]
        return Prompts(self.keys[index], self.rows[index], self.table, texts, self.columns.take(index))


@dataclass
class Requests:
    """B requests to the engine, one per response to draw, in the order of prompt and draw.

    Attributes:
        prompt: (B,) int64, position of each row's prompt among the step's chosen prompts.
        draw: (B,) int64, 0, 1, ... among the rows of one prompt.
        prompts: the step's chosen prompts.
        texts: B prompts as they will be sent; a hook may put another one in place.
        prefixes: B forced beginnings of the response, as text or as token ids; trained like drawn tokens. Empty by default.
        columns: columns that become columns of the rollouts.
    """

    prompt: Tensor
    draw: Tensor
    prompts: Prompts
    texts: list[Any]
    prefixes: list[str | list[int]]
    columns: Columns = field(default_factory=Columns)

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def of(cls, prompts: Prompts, counts: Tensor) -> Requests:
        """`counts[i]` plain requests for the i-th prompt."""
        prompt = torch.repeat_interleave(torch.arange(len(prompts)), counts)
        starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        texts = [prompts.texts[row] for row in prompt.tolist()]
        nothing: list[str | list[int]] = [""] * len(texts)
        return cls(prompt, torch.arange(len(prompt)) - starts, prompts, texts, nothing)


@dataclass
class Sampling:
    """How B responses are drawn.

    Attributes:
        temperature: (B,) float, > 0; 0 is greedy.
        max_tokens: (B,) int64, of what is drawn: a forced beginning does not count.
        top_p: (B,) float in (0, 1].
        numbers: per name (B,) or (B, k) numbers that `process_logits` gets with each request.
    """

    temperature: Tensor
    max_tokens: Tensor
    top_p: Tensor
    numbers: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.temperature)

    @classmethod
    def of(cls, rows: int, temperature: float, max_tokens: int, top_p: float = 1.0) -> Sampling:
        """The same parameters for every row."""
        return cls(torch.full((rows,), temperature), torch.full((rows,), max_tokens), torch.full((rows,), top_p))


@dataclass
class Rollouts:
    """B responses of one step, T tokens each, right-padded; rows in the order of prompt and draw.

    Padding is exactly 0 in every (B, T) field. Tensors are views of the trainer's own where the layouts agree. What is
    constant over a response has shape (B, 1) and is never expanded.

    Attributes:
        prompt_keys: (B,) int64, stable across steps and epochs.
        prompt_rows: (B,) int64, row of the prompt in the prompt table; -1 for a prompt outside of the pool.
        groups: (B,) int64, responses to the same prompt share a number; -1: in no group.
        prompts: B lists of token ids, each row's own prompt (the rewritten one).
        responses: (B, T) int64, token ids.
        mask: (B, T) bool, the policy's own tokens and a forced response prefix (not tool output).
        scores: (B, 1) float, what the reward function gave; NaN if it gave nothing finite.
        kind: (B,) int8, position in `kinds`.
        kinds: names of the row kinds; the first is `policy`.
        version: (B,) int64, number of updates that the drawing policy had seen.
        old_log_probs: (B, T) float32, under the weights at the start of the step's update, at the trainer's temperature.
        rollout_log_probs: (B, T) float32, what the engine drew with, if kept. Declared.
        ref_log_probs: (B, T) float32, under the reference policy. Declared.
        entropy: (B, T) float32, of the full next-token distribution at the old log-probs' pass, in nats. Declared.
        values: (B, T) float32, of the critic. Declared.
        components: (B, K) float32, parts of the score, named by `component_names`. Declared.
        component_names: K names.
        prefix: (B, T) bool, forced response prefix, or None if no row has one.
        columns: data columns and what plugins wrote (tool calls, category, difficulty, critique, ...).
    """

    prompt_keys: Tensor
    prompt_rows: Tensor
    groups: Tensor
    prompts: list[list[int]]
    responses: Tensor
    mask: Tensor
    scores: Tensor
    kind: Tensor
    kinds: tuple[str, ...] = (POLICY,)
    version: Tensor | None = None
    old_log_probs: Tensor | None = None
    rollout_log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    components: Tensor | None = None
    component_names: tuple[str, ...] = ()
    prefix: Tensor | None = None
    columns: Columns = field(default_factory=Columns)
    guard: ReadGuard | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.groups)

    def __getattribute__(self, name: str) -> Any:
        if name in DECLARED:
            guard = object.__getattribute__(self, "guard")
            if guard is not None:
                guard.check(name)
        return object.__getattribute__(self, name)

    def __getitem__(self, name: str) -> Column:
        """The field or free column `name`; raises if this plugin did not declare that it reads it.

        What a plugin wrote in this step needs no declaration.
        """
        if name in self.columns.written:
            return self.columns[name]
        if self.guard is not None:
            self.guard.check(name)
        column = getattr(self, name, None) if name in _ROW_FIELDS else self.columns.get(name)
        if column is None:
            raise ConfigurationError(f"these rollouts have no column {name!r}; they have: {', '.join(self.names())}")
        return column

    def __setitem__(self, name: str, column: Column) -> None:
        """Add a free column, which travels with its rows to every later hook, the update's included."""
        if len(column) != len(self):
            raise ConfigurationError(f"column {name!r} has {len(column)} rows, the rollouts have {len(self)}")
        self.columns[name] = column

    def get(self, name: str, default: Any = None) -> Any:
        """The column `name` (see `[]`), or `default` if these rollouts do not have it."""
        return self[name] if name in self.names() else default

    def names(self) -> list[str]:
        """Names of the columns that are there."""
        there = [name for name in _ROW_FIELDS if object.__getattribute__(self, name) is not None]
        return [*there, *self.columns]

    def guarded(self, guard: ReadGuard) -> Rollouts:
        """The same rollouts for one plugin: shares every tensor and column, checks what is read."""
        values = {item.name: object.__getattribute__(self, item.name) for item in fields(self)}
        return Rollouts(**(values | {"guard": guard}))

    def of_kind(self, kind: str) -> Tensor:
        """(B,) bool, the rows of that kind."""
        if kind not in self.kinds:
            return torch.zeros_like(self.kind, dtype=torch.bool)
        return self.kind == self.kinds.index(kind)

    def select(self, index: Tensor) -> Rollouts:
        """The rows `index` (int64 or bool), in that order."""
        changed: dict[str, Any] = {"columns": self.columns.take(index)}
        for name in _ROW_FIELDS:
            column = object.__getattribute__(self, name)
            if column is not None:
                changed[name] = take(column, index)
        return replace(self.unguarded(), **changed, guard=self.guard)

    def unguarded(self) -> Rollouts:
        """The same rollouts without a guard, for the trainer."""
        values = {item.name: object.__getattribute__(self, item.name) for item in fields(self)}
        return Rollouts(**(values | {"guard": None}))


_ROW_FIELDS = tuple(
    item.name for item in fields(Rollouts) if item.name not in {"kinds", "component_names", "columns", "guard"}
)


def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
    """The rows of all parts, in order; padded to the longest response, kinds merged by name.

    Raises:
        ConfigurationError: if a column is there in one part and missing in another.
    """
    plain = [part.unguarded() for part in parts]
    first = plain[0]
    kinds = tuple(dict.fromkeys([POLICY, *(kind for part in plain for kind in part.kinds)]))
    tokens = max(part.responses.shape[1] for part in plain)
    merged: dict[str, Any] = {}
    for name in _ROW_FIELDS:
        values = [getattr(part, name) for part in plain]
        if name == "kind":
            values = [
                torch.tensor([kinds.index(kind) for kind in part.kinds]).to(part.kind)[part.kind.long()]
                for part in plain
            ]
        if name == "prefix" and any(value is not None for value in values):
            values = [torch.zeros_like(part.mask) if part.prefix is None else part.prefix for part in plain]
        merged[name] = _join(name, values, tokens if name in _TOKEN_FIELDS else None)
    names = list(dict.fromkeys(name for part in plain for name in part.columns))
    joined = {name: _join(name, [part.columns.get(name) for part in plain], None) for name in names}
    columns = {name: column for name, column in joined.items() if column is not None}
    written = frozenset(name for part in plain for name in part.columns.written)
    return replace(first, kinds=kinds, columns=Columns(columns, written), guard=parts[0].guard, **merged)


def texts_of(rollouts: Rollouts, tokenizer: Any) -> list[str]:
    """The B responses up to their last token, tool output included, without special tokens."""
    mask = rollouts.mask.bool()
    ends = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(1) if mask.shape[1] else mask.sum(1)
    rows = [row[:end] for row, end in zip(rollouts.responses.tolist(), ends.tolist(), strict=True)]
    return list(tokenizer.batch_decode(rows, skip_special_tokens=True))


def completed(rows: Rollouts, like: Rollouts) -> Rollouts:
    """The rows with every field and column that `like` has and they lack: zeros, or None in a list.

    For rows whose prompts are not of the pool, before `concatenate`.
    """
    plain, pattern, count = rows.unguarded(), like.unguarded(), len(rows)
    missing: dict[str, Any] = {
        name: empty_rows(column, count)
        for name in _ROW_FIELDS if getattr(plain, name) is None and (column := getattr(pattern, name)) is not None
    }  # fmt: skip
    lacking = {name: empty_rows(column, count) for name, column in pattern.columns.items() if name not in plain.columns}
    columns = Columns({**plain.columns, **lacking}, frozenset(pattern.columns.written | plain.columns.written))
    return replace(plain, columns=columns, guard=rows.guard, **missing)


def exchanged(rollouts: Rollouts, rows: Tensor, others: Rollouts, kind: str) -> Rollouts:
    """The rollouts with other rows in the places `rows` (n,) int64, in the groups of those that go.

    What only the row that goes has (columns of other plugins), the new one takes over.

    Args:
        rollouts: B rows.
        rows: positions.
        others: n rows.
        kind: of these.
    """
    columns = {
        name: others.columns[name] if name in others.columns else take(column, rows)
        for name, column in rollouts.columns.items()
    }
    added = replace(
        others.unguarded(), kinds=(POLICY, kind), kind=torch.ones_like(others.kind), groups=rollouts.groups[rows],
        columns=Columns(columns, frozenset(rollouts.columns.written)),
    )  # fmt: skip
    index = torch.arange(len(rollouts), device=rows.device)
    index[rows] = len(rollouts) + torch.arange(len(rows), device=rows.device)
    return concatenate([rollouts, added]).select(index)


def empty_rows(column: Column, rows: int) -> Column:
    """So many rows of zeros (None in a list) in the place of a column."""
    return column.new_zeros((rows, *column.shape[1:])) if isinstance(column, Tensor) else [None] * rows


_TOKEN_FIELDS = frozenset(
    {"responses", "mask", "old_log_probs", "rollout_log_probs", "ref_log_probs", "entropy", "values", "prefix"}
)


def _join(name: str, parts: list[Column | None], tokens: int | None) -> Column | None:
    """Columns of several parts, one after the other."""
    if all(part is None for part in parts):
        return None
    if any(part is None for part in parts):
        raise ConfigurationError(f"rows without a column {name!r} cannot be added to rows that have it")
    if isinstance(parts[0], Tensor):
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if tokens is None and tensors[0].dim() == 2:
            tokens = max(tensor.shape[1] for tensor in tensors)
        if tokens is not None:
            tensors = [torch.nn.functional.pad(tensor, (0, tokens - tensor.shape[1])) for tensor in tensors]
        return torch.cat(tensors)
    return [item for part in parts if part is not None for item in part]
