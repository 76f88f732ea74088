"""`rlplugins prompts`: what a run remembers about its prompts."""

import json

import pytest
from click.testing import CliRunner

from rlplugins.cli import app
from rlplugins.errors import ConfigurationError
from rlplugins.stack import StackConfig
from rlplugins_local import train
from rlplugins_local.prompts import show


@pytest.fixture
def run(config):
    """Two steps on four of eight prompts each."""
    settings = config(reward="sevens")
    train(settings, StackConfig(plugins=["knapsack"]), progress=False)
    return settings.output


def test_shows_what_the_table_holds(run) -> None:
    shown = CliRunner().invoke(app, ["prompts", str(run), "--top", "8"])
    assert shown.exit_code == 0
    seen = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["prompts/seen"]
    assert f"{round(8 * seen)} of 8 prompts seen" in shown.output
    assert "knapsack/rate" in shown.output and "even" in shown.output and "91+82=" in shown.output


def test_largest_first(run) -> None:
    table = show(run, sort="last_step", top=8)
    headings = [str(column.header) for column in table.columns]
    steps = [float(cell) for cell in table.columns[headings.index("last_step")].cells]
    assert steps == sorted(steps, reverse=True) and steps[0] == 1


def test_wrong_names(run, tmp_path) -> None:
    with pytest.raises(ConfigurationError, match="it has: visits, last_step, knapsack/rate"):
        show(run, sort="visit")
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        show(tmp_path / "nothing")
