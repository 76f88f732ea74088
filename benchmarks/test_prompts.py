"""Work per prompt: the knapsack allocation and the prompt table."""

import pytest
import torch

from benchmarks.report import Line, seeded
from rlplugins.table import PromptTable

PART = "Prompts"


def test_knapsack_allocation(alone, record):
    allocate = pytest.importorskip("rlplugins_knapsack").allocate
    rates = torch.rand(100_000, generator=seeded())
    measure = alone(lambda: allocate(rates, 1_600_000), 2.0, rounds=7)
    record(Line(PART, "knapsack, 1,600,000 rollouts of 100,000 prompts", "2 seconds", measure.shares, 1))


@pytest.fixture(scope="module")
def table() -> tuple[PromptTable, torch.Tensor]:
    """Ten million prompts, and the keys of a step's 16,384 responses."""
    source = seeded()
    table = PromptTable()
    table.add_column("running_mean")
    keys = torch.randint(-(2**62), 2**62, (10_000_000,), generator=source)
    table.resolve(keys)
    return table, keys[torch.randint(0, len(keys), (1_024,), generator=source).repeat_interleave(16)]


def test_table_update(table, alone, record):
    prompts, keys = table
    rows, rewards, steps = prompts.resolve(keys), torch.ones(len(keys)), iter(range(10**9))

    def update() -> None:
        mean = prompts["running_mean"]
        mean[rows] = 0.9 * mean[rows] + 0.1 * rewards
        prompts.visit(rows, next(steps))

    measure = alone(update, 5e-3, rounds=30)
    what = "table of 10,000,000 prompts, update of a column and the visits by 16,384 responses"
    record(Line(PART, what, "5 milliseconds", measure.shares, 1))


def test_table_keys(table, alone, record):
    prompts, keys = table
    measure = alone(lambda: prompts.resolve(keys), 5e-3, rounds=30)
    record(Line(PART, "the same table, rows of 16,384 keys", "5 milliseconds", measure.shares))
