"""The prompt table: against a model of plain dictionaries, and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from rlplugins import Run, Stack
from rlplugins.errors import StateError
from rlplugins.plugin import Plugin
from rlplugins.table import PluginTable, PromptTable, RaggedColumn
from rlplugins.testing import make_pool, make_rollouts, start

KEYS = [5, -3, 2**62, -(2**62), 0, 17, 18, 19, -1]
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6)


class TableMachine(RuleBasedStateMachine):
    """A table and a dictionary under the same operations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = PromptTable()
        self.table.add_column("p/score", torch.float64, 0.5)
        self.table.add_ragged("p/stored", torch.float32)
        self.rows: dict[int, int] = {}
        self.scores: dict[int, float] = {}
        self.stored: dict[int, list[float]] = {}
        self.visits: dict[int, set[int]] = {}
        self.counter = 0.0

    def resolve(self, keys: list[int]) -> Tensor:
        for key in keys:
            self.rows.setdefault(key, len(self.rows))
        rows = self.table.resolve(torch.tensor(keys))
        assert rows.tolist() == [self.rows[key] for key in keys]
        return rows

    @rule(keys=some_keys)
    def look_up(self, keys: list[int]) -> None:
        self.resolve(keys)

    @rule(keys=some_keys, value=st.floats(-5, 5))
    def write(self, keys: list[int], value: float) -> None:
        rows = self.resolve(keys)
        self.table["p/score"][rows] = value
        self.scores |= dict.fromkeys(keys, value)

    @rule(keys=some_keys, step=st.integers(0, 3))
    def visit(self, keys: list[int], step: int) -> None:
        for key in set(keys):
            if self.visits.get(key, [None])[-1] != step:
                self.visits.setdefault(key, []).append(step)
        self.table.visit(torch.cat([self.resolve(keys), torch.tensor([-1])]), step)

    @rule(keys=some_keys, data=st.data())
    def store(self, keys: list[int], data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.integers(0, 700), min_size=len(keys), max_size=len(keys)))
        mask = torch.arange(max([*sizes, 1])) < torch.tensor(sizes)[:, None]
        values = self.counter + torch.arange(mask.numel(), dtype=torch.float32).view(mask.shape)
        self.counter += 1
        self.table.ragged("p/stored").write(self.resolve(keys), values, mask)
        for place, key in enumerate(keys):  # the last of equal keys wins
            self.stored[key] = values[place, : sizes[place]].tolist()

    @rule()
    def save_and_load(self) -> None:
        path = Path(self.folder) / "table.safetensors"
        self.table.save(path)
        restored = PromptTable()
        restored.add_column("p/score", torch.float64, 0.5)
        restored.resolve(torch.tensor([18, 999]))  # what a new run resolved before it loads
        restored.restore(PromptTable.load(path))
        self.table = restored

    folder = ""

    @invariant()
    def agrees(self) -> None:
        assert len(self.table) == len(self.rows)
        if not self.rows:
            return
        rows = torch.tensor(list(self.rows.values()))
        assert self.table["p/score"][rows].tolist() == [self.scores.get(key, 0.5) for key in self.rows]
        assert self.table["visits"][rows].tolist() == [len(self.visits.get(key, [])) for key in self.rows]
        assert self.table["last_step"][rows].tolist() == [[-1, *self.visits.get(key, [])][-1] for key in self.rows]
        values, mask = self.table.ragged("p/stored").read(rows)
        for place, key in enumerate(self.rows):
            assert values[place][mask[place]].tolist() == self.stored.get(key, [])
        assert not values[~mask].any()


def test_the_table_is_a_dictionary(tmp_path: Path) -> None:
    TableMachine.folder = str(tmp_path)
    TableMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None, derandomize=True)
    TableMachine.TestCase("runTest").runTest()


def test_columns_that_are_registered_later_start_at_their_default() -> None:
    table = PromptTable()
    table.resolve(torch.tensor([3, 1, 3]))
    table.add_column("p/x", torch.int64, 7)
    table.add_column("p/x", torch.int64, 9)  # already there
    assert table["p/x"].tolist() == [7, 7]
    table.resolve(torch.tensor([8]))
    assert table["p/x"].tolist() == [7, 7, 7] and set(table) == {"visits", "last_step", "p/x"}


def test_a_stored_sequence_is_compacted_not_forgotten() -> None:
    column = RaggedColumn(torch.float32)
    column.grow(3)
    keep = torch.arange(100.0)[None]
    whole = torch.ones(1, 100, dtype=torch.bool)
    column.write(torch.tensor([1]), keep - 1, whole)
    column.write(torch.tensor([0]), keep, whole)  # behind what will be replaced
    for turn in range(200):
        column.write(torch.tensor([1]), torch.full((1, 100), float(turn)), whole)
    assert len(column.flat) < 4096
    values, mask = column.read(torch.tensor([0, 1, 2]))
    assert torch.equal(values[0], keep[0]) and values[1].eq(199).all() and mask.sum(1).tolist() == [100, 100, 0]


def test_prompts_outside_of_the_pool_are_neither_written_nor_read() -> None:
    column = RaggedColumn(torch.float32)
    column.grow(2)
    mask = torch.ones(2, 2, dtype=torch.bool)
    column.write(torch.tensor([0, -1]), torch.tensor([[1.0, 2.0], [8.0, 9.0]]), mask)
    values, present = column.read(torch.tensor([1, 0]))
    assert present.tolist() == [[False, False], [True, True]] and values.tolist() == [[0, 0], [1, 2]]
    column.write(torch.tensor([1]), torch.tensor([[3.0, 4.0]]), mask[:1])
    assert not column.read(torch.tensor([-1]))[1].any()


@given(keys=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=50), again=st.randoms())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_rows_are_numbered_in_the_order_of_first_sight_and_never_change(keys: list[int], again: Any) -> None:
    table = PromptTable()
    first = table.resolve(torch.tensor(keys, dtype=torch.int64)).tolist()
    order = list(dict.fromkeys(keys))
    assert first == [order.index(key) for key in keys]
    shuffled = [*keys, 1234567]
    again.shuffle(shuffled)
    rows = table.resolve(torch.tensor(shuffled, dtype=torch.int64)).tolist()
    assert all(row == order.index(key) for row, key in zip(rows, shuffled, strict=True) if key in order)


def test_a_plugin_sees_its_own_columns_by_their_short_names() -> None:
    table = PromptTable()
    a, b = PluginTable(table, "a"), PluginTable(table, "b")
    rows = table.resolve(torch.tensor([1, 2]))
    a.add_column("x", default=1.0)
    b.add_column("x", default=2.0)
    a["x"][rows[0]] = 5
    assert a["x"].tolist() == [5, 1] and b["x"].tolist() == [2, 2] and len(a) == 2
    with pytest.raises(KeyError):
        b["y"]
    table.visit(rows[:1], 4)
    assert a.visits.tolist() == [1, 0] and a.last_step.tolist() == [4, -1]


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_table_is_an_error_that_names_the_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StateError, match=r"table\.safetensors is not a prompt table"):
        PromptTable.load(path)


class Counting(Plugin):
    name = "counting"

    def init_state(self, run: Run) -> dict[str, Any]:
        run.table.add_column("alpha", torch.float32, 0.5)
        self.table.add_ragged("stored", torch.int64)
        assert len(run.prompt_table) == len({int(key) for key in run.pool.keys})
        return {}


def test_a_run_counts_visits_of_policy_rows_and_restores_the_table_under_a_pool_in_another_order(
    tmp_path: Path,
) -> None:
    pool = make_pool(6)
    stack = start([Counting()], pool=pool)
    rollouts = make_rollouts([1.0, 0.0, 1.0, 0.0], [4, 4, 2, 0], pool=pool,
                             kind=torch.tensor([0, 0, 0, 1], dtype=torch.int8), kinds=("policy", "expert"))  # fmt: skip
    stack.end_step(rollouts, stack.credit(rollouts))
    assert pool.table["visits"].tolist() == [0, 0, 1, 0, 1, 0]
    pool.table["counting/alpha"][4] = 0.9
    stack.save(tmp_path / "state", 1)

    order = torch.tensor([5, 4, 3, 2, 1, 0])
    other = make_pool(6)
    other.keys = other.keys[order]
    other.table = PromptTable()
    other.rows = other.table.resolve(other.keys)
    again: Stack = start([Counting()], pool=other)
    again.load(tmp_path / "state")
    assert again.plugins[0].table["alpha"][other.rows].tolist() == pytest.approx([0.5, 0.9, 0.5, 0.5, 0.5, 0.5])
    assert again.plugins[0].table.visits[other.rows].tolist() == [0, 1, 0, 1, 0, 0]


def test_two_million_prompts_are_resolved_in_one_call() -> None:
    table = PromptTable()
    keys = torch.randperm(2_000_000)
    assert torch.equal(table.resolve(keys), torch.arange(2_000_000))
    assert torch.equal(table.resolve(keys.flip(0)), torch.arange(2_000_000).flip(0))
