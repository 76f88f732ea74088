"""The prompt table: what a run knows about each prompt, as flat arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlplugins.errors import StateError


class RaggedColumn:
    """One sequence of varying length per prompt (a stored response, its log-probs).

    Values lie one after the other in one flat array; `starts` and `sizes` say where each row's lie. A new value is
    written at the end, and the array is compacted when more than half of it is no longer used.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.flat = torch.zeros(0, dtype=dtype)
        self.used = 0
        self.starts = torch.zeros(0, dtype=torch.int64)
        self.sizes = torch.zeros(0, dtype=torch.int64)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` prompts."""
        self.starts = _grown(self.starts, capacity, 0)
        self.sizes = _grown(self.sizes, capacity, 0)

    def write(self, rows: Tensor, values: Tensor, mask: Tensor) -> None:
        """Replace what is stored for `rows` (N,) by the masked entries of `values` (N, T). The last of equal rows wins."""
        known = (rows >= 0).cpu()  # prompts outside of the pool have no place here
        rows, values, mask = rows.cpu()[known], values.cpu()[known], mask.bool().cpu()[known]
        sizes = mask.sum(1)
        flat = values[mask].to(self.flat.dtype)
        if self.used + len(flat) > len(self.flat):
            self._make_room(len(flat))
        self.flat[self.used : self.used + len(flat)] = flat
        starts = self.used + (sizes.cumsum(0) - sizes)
        self.used += len(flat)
        last = _last_of_equal(rows)
        self.starts[rows[last]] = starts[last]
        self.sizes[rows[last]] = sizes[last]

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored for `rows` (N,): values (N, T), right-padded with 0, and their mask (N, T) bool; -1: nothing."""
        rows = rows.cpu()
        sizes = torch.where(rows >= 0, self.sizes[rows], 0)
        width = int(sizes.max()) if len(sizes) else 0
        offsets = torch.arange(width)
        mask = offsets < sizes[:, None]
        values = self.flat.new_zeros((len(rows), width))
        values[mask] = self.flat[(self.starts[rows][:, None] + offsets)[mask]]
        return values, mask

    def _make_room(self, more: int) -> None:
        live = int(self.sizes.sum())
        target = self.flat.new_zeros(max(1024, 2 * (live + more)))
        rows = self.sizes.nonzero().flatten()
        order = rows[torch.argsort(self.starts[rows])]
        sizes = self.sizes[order]
        ends = sizes.cumsum(0)
        within = torch.arange(live) - torch.repeat_interleave(ends - sizes, sizes)
        target[:live] = self.flat[torch.repeat_interleave(self.starts[order], sizes) + within]
        self.starts[order] = ends - sizes
        self.flat, self.used = target, live


class PromptTable:
    """Columns by name, one entry per prompt, indexed by row; `resolve` turns prompt keys into rows.

    Rows are numbered in the order in which keys were first seen and never change. Column names carry their owner:
    `<plugin>/<name>`; the run's own are `visits` and `last_step`.

    Attributes:
        size: number of prompts.
        seen: number of those that were visited.
    """

    def __init__(self) -> None:
        self.size = 0
        self.seen = 0
        self._sorted_keys = torch.zeros(0, dtype=torch.int64)
        self._sorted_rows = torch.zeros(0, dtype=torch.int64)
        self._columns: dict[str, Tensor] = {}
        self._defaults: dict[str, float] = {}
        self._ragged: dict[str, RaggedColumn] = {}
        self.add_column("visits", torch.int32, 0)
        self.add_column("last_step", torch.int32, -1)

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[str]:
        return iter([*self._columns, *self._ragged])

    def __getitem__(self, name: str) -> Tensor:
        """The column `name` (P, ...), a view: what is written to it is remembered."""
        return self._columns[name][: self.size]

    def scalars(self) -> list[str]:
        """Names of the columns with one number per prompt."""
        return list(self._columns)

    def ragged(self, name: str) -> RaggedColumn:
        """The ragged column `name`."""
        return self._ragged[name]

    def add_column(self, name: str, dtype: torch.dtype = torch.float32, default: float = 0.0) -> None:
        """Register a column; does nothing if it is already there (with what a checkpoint had in it)."""
        if name not in self._columns:
            self._defaults[name] = default
            self._columns[name] = torch.full((len(self._sorted_rows),), default, dtype=dtype)

    def add_ragged(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        """Register a ragged column; does nothing if it is already there."""
        if name not in self._ragged:
            self._ragged[name] = RaggedColumn(dtype)
            self._ragged[name].grow(len(self._sorted_rows))

    def resolve(self, keys: Tensor) -> Tensor:
        """Rows (N,) int64 of the prompts with these keys (N,); unseen keys get new rows."""
        unseen = self._find(keys) < 0
        if bool(unseen.any()):
            self._add(keys[unseen])
        return self._find(keys)

    def _find(self, keys: Tensor) -> Tensor:
        if not self.size:
            return torch.full_like(keys, -1)
        position = torch.searchsorted(self._sorted_keys, keys).clamp(max=self.size - 1)
        return torch.where(self._sorted_keys[position] == keys, self._sorted_rows[position], -1)

    def _add(self, keys: Tensor) -> None:
        unique, inverse = torch.unique(keys, return_inverse=True)
        first = torch.full((len(unique),), len(keys)).scatter_reduce(0, inverse, torch.arange(len(keys)), "amin")
        rows = self.size + torch.argsort(torch.argsort(first))
        merged = torch.cat([self._sorted_keys, unique])
        order = torch.argsort(merged)
        self._sorted_keys = merged[order]
        self._sorted_rows = torch.cat([self._sorted_rows, rows])[order]
        self.size = len(merged)
        for name, column in self._columns.items():
            self._columns[name] = _grown(column, self.size, self._defaults[name])
        for ragged in self._ragged.values():
            ragged.grow(self.size)

    def visit(self, rows: Tensor, step: int) -> None:
        """Count one visit of each of the prompts `rows` (each prompt once per step, however often it is named)."""
        known = rows[rows >= 0]
        unseen = known[self._columns["last_step"][known] != step].unique()
        visits = self._columns["visits"][unseen] + 1
        self.seen += int((visits == 1).sum())
        self._columns["visits"][unseen] = visits
        self._columns["last_step"][unseen] = step

    def restore(self, saved: PromptTable) -> None:
        """Take over everything from a saved table; columns registered here and missing there start at their default.

        Rows keep the saved numbers, so rows resolved before must be resolved again.
        """
        mine = [(name, column.dtype, self._defaults[name]) for name, column in self._columns.items()]
        ragged = [(name, column.flat.dtype) for name, column in self._ragged.items()]
        vars(self).update(vars(saved))
        for name, dtype, default in mine:
            self.add_column(name, dtype, default)
        for name, dtype in ragged:
            self.add_ragged(name, dtype)

    def save(self, path: Path) -> None:
        """Write the table to one safetensors file; arrays are streamed to it, not copied."""
        tensors = {"keys": self._sorted_keys, "rows": self._sorted_rows}
        tensors |= {f"column/{name}": column[: self.size] for name, column in self._columns.items()}
        for name, ragged in self._ragged.items():
            tensors[f"flat/{name}"] = ragged.flat[: ragged.used]
            tensors[f"starts/{name}"] = ragged.starts[: self.size]
            tensors[f"sizes/{name}"] = ragged.sizes[: self.size]
        save_file(tensors, path, metadata={"defaults": json.dumps(self._defaults)})

    @classmethod
    def load(cls, path: Path) -> PromptTable:
        """Read what `save` wrote.

        Raises:
            StateError: if the file is not a prompt table.
        """
        table = cls()
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                table._defaults = json.loads(notes["defaults"])
                table._sorted_keys = file.get_tensor("keys")
                table._sorted_rows = file.get_tensor("rows")
                table.size = len(table._sorted_keys)
                table._columns = {name: file.get_tensor(f"column/{name}") for name in table._defaults}
                table.seen = int(table._columns["visits"].count_nonzero())
                for name in [key.removeprefix("flat/") for key in file.keys() if key.startswith("flat/")]:  # noqa: SIM118
                    ragged = RaggedColumn(torch.float32)
                    ragged.flat = file.get_tensor(f"flat/{name}")
                    ragged.used = len(ragged.flat)
                    ragged.starts = file.get_tensor(f"starts/{name}")
                    ragged.sizes = file.get_tensor(f"sizes/{name}")
                    table._ragged[name] = ragged
        except Exception as error:
            raise StateError(f"{path} is not a prompt table: {error}") from error
        return table


class PluginTable:
    """The prompt table as one plugin sees it: its own columns by their short names."""

    def __init__(self, table: PromptTable, plugin: str) -> None:
        self._table = table
        self._plugin = plugin

    def __len__(self) -> int:
        return len(self._table)

    def add_column(self, name: str, dtype: torch.dtype = torch.float32, default: float = 0.0) -> None:
        """Register a column of this plugin with the value that an unseen prompt has."""
        self._table.add_column(f"{self._plugin}/{name}", dtype, default)

    def add_ragged(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        """Register a ragged column of this plugin."""
        self._table.add_ragged(f"{self._plugin}/{name}", dtype)

    def __getitem__(self, name: str) -> Tensor:
        """The column (P,), a view: index it with rows of prompts to read and to write."""
        return self._table[f"{self._plugin}/{name}"]

    def ragged(self, name: str) -> RaggedColumn:
        """The ragged column `name` of this plugin."""
        return self._table.ragged(f"{self._plugin}/{name}")

    @property
    def visits(self) -> Tensor:
        """(P,) int32, steps in which each prompt was trained on so far."""
        return self._table["visits"]

    @property
    def last_step(self) -> Tensor:
        """(P,) int32, the last such step; -1: never."""
        return self._table["last_step"]


def _grown(column: Tensor, size: int, default: float) -> Tensor:
    """`column` with room for `size` entries, the new ones holding `default`."""
    if len(column) >= size:
        return column
    return torch.cat([column, torch.full((size - len(column),), default, dtype=column.dtype)])


def _last_of_equal(rows: Tensor) -> Tensor:
    """Positions of the last occurrence of each different row."""
    unique, inverse = torch.unique(rows, return_inverse=True)
    last = torch.zeros(len(unique), dtype=torch.int64)
    return last.scatter_reduce(0, inverse, torch.arange(len(rows)), "amax")
