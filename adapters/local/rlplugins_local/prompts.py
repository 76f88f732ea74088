"""The command `rlplugins prompts`: what a run remembers about its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlplugins.errors import ConfigurationError
from rlplugins.report.folder import read_config
from rlplugins.table import PromptTable
from rlplugins_local.data import PromptFile
from rlplugins_local.output import newest_checkpoint

CATEGORY = "category"


def show(run: Path, sort: str = "visits", top: int = 20) -> Table:
    """The prompts for which a column of the run's prompt table is largest.

    Args:
        run: folder of `rlplugins train`.
        sort: `visits`, `last_step`, or a plugin's column, `<plugin>/<name>`.
        top: how many prompts.

    Raises:
        ConfigurationError: if the folder has no checkpoint, or the table no such column.
    """
    checkpoint, data = newest_checkpoint(run), read_config(run).get("data")
    if checkpoint is None or not data:
        raise ConfigurationError(f"{run} is not the folder of a run with prompts and a checkpoint")
    table = PromptTable.load(checkpoint / "plugins" / "table.safetensors")
    columns = {name: table[name] for name in table.scalars()}
    if sort not in columns:
        raise ConfigurationError(f"the prompt table has no column {sort!r}; it has: {', '.join(columns)}")
    prompts = PromptFile(Path(data)).prompts(table)
    values = columns[sort][prompts.rows]
    best = torch.argsort(values, descending=True, stable=True)[:top].tolist()
    shown = Table(title=Text(f"{run}: {table.seen} of {len(prompts)} prompts seen, by {sort}"))
    categories = prompts.columns.get(CATEGORY)
    for heading in ["prompt", *([CATEGORY] if categories is not None else []), *columns]:
        shown.add_column(heading, overflow="ellipsis", no_wrap=heading == "prompt", max_width=60)
    for place in best:
        row = int(prompts.rows[place])
        category = [str(categories[place])] if categories is not None else []
        numbers = [f"{column[row].item():.4g}" for column in columns.values()]
        shown.add_row(Text(_line(prompts.texts[place])), *category, *numbers)
    return shown


def _line(prompt: Any) -> str:
    """A prompt in one line; of a chat the last message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return " ".join((text if isinstance(text, str) else json.dumps(text)).split())


@click.command("prompts", short_help="What a run knows about its prompts.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--sort", default="visits", show_default=True, help="Column of the prompt table; largest first.")
@click.option("--top", default=20, show_default=True, help="How many prompts.")
def command(run: Path, sort: str, top: int) -> None:
    """Visits, last step and the plugins' own columns of the prompts of RUN, as its newest checkpoint has them."""
    Console().print(show(run, sort, top))
