"""The summary of a study as a table in the terminal, and how its numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlplugins.report.statistics import Estimate

if TYPE_CHECKING:
    from rlplugins.report.results import Cell, Results


def format_estimate(estimate: Estimate | None, sign: bool = False) -> str:
    """A mean with its interval, to the digits that the interval supports: `0.812 ± 0.014`.

    Args:
        estimate: what to write; None becomes a dash.
        sign: write a plus before what is not negative.
    """
    if estimate is None:
        return "–"
    plus = "+" if sign else ""
    half = estimate.half_width
    if half is None or not math.isfinite(half) or half == 0:
        return f"{estimate.mean:{plus}.4g}" + ("" if half is None else f" ± {half:.2g}")
    decimals = 1 - math.floor(math.log10(half))
    if decimals > 5 or abs(estimate.mean) >= 1e6:
        return f"{estimate.mean:{plus}.3g} ± {half:.2g}"
    return f"{estimate.mean:{plus}.{max(0, decimals)}f} ± {half:.{max(0, decimals)}f}"


def format_status(cell: Cell) -> str:
    """How many of the cell's runs are finished, and what became of the others: `4/5, 1 failed`."""
    if cell.refused is not None:
        return "refused"
    count = {status: 0 for status in ("finished", "failed", "unfinished")}
    for run in cell.runs:
        if run.status in count:
            count[run.status] += 1
    others = [f"{count[status]} {status}" for status in ("failed", "unfinished") if count[status]]
    return ", ".join([f"{count['finished']}/{len(cell.runs)}", *others])


class SummaryTable:
    """The summary, the refused stacks and the failed runs; metrics that do not fit the width are left out.

    Args:
        results: what to show.
    """

    def __init__(self, results: Results) -> None:
        self._results = results

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, then the notes below it."""
        table, left_out = self._fitting_table(console, options)
        yield table
        yield Text(self._caption(left_out), style="dim")
        for cell in self._results.refused:
            yield Text.assemble("\n", ("refused ", "bold red"), (cell.name, "bold"))
            yield Padding(Text(cell.refused or ""), (0, 0, 0, 2), expand=False)
        for cell, run in self._results.failed:
            yield Text.assemble(
                "\n", ("failed ", "bold red"), (f"{cell.name}, seed {run.seed}", "bold"), f"  {run.folder}"
            )
            yield Padding(Text(run.failure or ""), (0, 0, 0, 2), expand=False)

    def _fitting_table(self, console: Console, options: ConsoleOptions) -> tuple[Table, int]:
        """The table with as many metrics as the width allows (one at least), and how many are left out."""
        metrics = self._results.headlines
        unlimited = options.update(max_width=10_000)
        for count in range(len(metrics), 1, -1):
            table = self._table(metrics[:count])
            if Measurement.get(console, unlimited, table).maximum <= options.max_width:
                return table, len(metrics) - count
        return self._table(metrics[:1]), max(0, len(metrics) - 1)

    def _table(self, metrics: Sequence[str]) -> Table:
        table = Table(title=Text(self._results.name), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("stack", overflow="fold")
        table.add_column("seeds")
        for place, metric in enumerate(metrics):
            table.add_column(Text(metric), justify="right", no_wrap=True)
            if place == 0:
                if self._results.baseline is not None:
                    table.add_column(Text(f"vs {self._results.baseline}"), justify="right", no_wrap=True)
                table.add_column("area", justify="right", no_wrap=True)
        for cell in self._results.cells:
            table.add_row(Text(cell.name), _status_text(cell), *self._numbers(cell, metrics))
        return table

    def _numbers(self, cell: Cell, metrics: Sequence[str]) -> list[Text]:
        """The cell's row: the first metric in full, of the others the final value."""
        row = []
        for place, metric in enumerate(metrics):
            summary = self._results.summary(cell, metric)
            row.append(Text(format_estimate(summary.final if summary else None), "dim" if cell.is_preliminary else ""))
            if place == 0:
                if self._results.baseline is not None:
                    row.append(_difference_text(summary.difference if summary else None))
                row.append(Text(format_estimate(summary.area if summary else None)))
        return row

    def _caption(self, left_out: int) -> str:
        lines = [
            "Mean of the last 10 % of the steps ± 95 % confidence interval over the seeds (Student t); "
            "area: mean height of the learning curve."
        ]
        if self._results.baseline is not None:
            lines.append(f"vs {self._results.baseline}: paired by seed; bold where the interval excludes zero.")
        if any(cell.is_preliminary for cell in self._results.cells):
            lines.append("Dim numbers are of runs that have not finished.")
        if left_out:
            lines.append(f"{left_out} more of the metrics do not fit this width; the report has them.")
        return "\n".join(lines)


def _difference_text(difference: Estimate | None) -> Text:
    style = "bold" if difference and difference.excludes_zero else ""
    return Text(format_estimate(difference, sign=True), style)


def _status_text(cell: Cell) -> Text:
    status = format_status(cell)
    return Text(status, "red" if "refused" in status or "failed" in status else "")
