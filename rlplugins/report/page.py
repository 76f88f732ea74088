"""The report as one HTML page that needs nothing but itself: tables, learning curves, refused stacks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlplugins.files import yaml_text
from rlplugins.report.results import Results, Summary
from rlplugins.report.statistics import Array, learning_curve
from rlplugins.report.table import format_estimate, format_status

# Colours that stay apart for colour-blind readers (after Okabe and Ito); dashes carry on where they end.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7b3fa0", "#8c6d31")
DASHES = ("solid", "dash", "dot", "dashdot")
BASELINE_COLOUR = "#333333"

SIGNIFICANT_DIGITS = 5


@dataclass(frozen=True)
class Group:
    """Metrics that are shown under one heading.

    Attributes:
        title: the heading.
        metrics: their names.
    """

    title: str
    metrics: list[str]


def write_html(results: Results, path: Path | str) -> Path:
    """Write the report to `path`, the whole of it in one file.

    Args:
        results: what `load` read.
        path: the page to write.

    Returns:
        The path.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["estimate"] = format_estimate
    environment.filters["status"] = format_status
    environment.filters["yaml"] = yaml_text
    page = environment.get_template("report.html.j2").render(
        results=results,
        summaries=_summaries(results),
        groups=metric_groups(results.metrics, drawn_before=results.metrics[:1]),
        styles=_styles(results),
        data=_data(results),
        plotly=Markup(get_plotlyjs()),
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def metric_groups(metrics: Sequence[str], drawn_before: Collection[str] = ()) -> list[Group]:
    """The metrics by what they are about: training, then each prefix; a plugin's own under its name.

    A prefix that is a metric itself (`ratio` beside `ratio/max`) makes no group.

    Args:
        metrics: their names, in the order to keep within a group.
        drawn_before: those of them to leave out.
    """
    groups: dict[str, Group] = {}
    for metric in metrics:
        if metric in drawn_before:
            continue
        first, *rest = metric.split("/")
        if first == "rlplugins" and len(rest) > 1:
            title = f"Plugin {rest[0]}"
        else:
            title = first.capitalize() if rest and first not in metrics else "Training"
        groups.setdefault(title, Group(title, [])).metrics.append(metric)
    return sorted(groups.values(), key=lambda group: (group.title != "Training", group.title.startswith("Plugin ")))


def _summaries(results: Results) -> dict[str, dict[str, Summary]]:
    """Every metric that the page names, of each cell that recorded it, by metric and cell."""
    found = {}
    for metric in dict.fromkeys([*results.headlines, *results.metrics]):
        summaries = {cell.name: results.summary(cell, metric) for cell in results.cells}
        found[metric] = {name: summary for name, summary in summaries.items() if summary}
    return found


def _styles(results: Results) -> dict[str, dict[str, str]]:
    """Colour and dash of the curves of each cell that is run, by its name; the baseline is dark."""
    names = [cell.name for cell in results.cells if cell.refused is None]
    others = [name for name in names if name != results.baseline]
    styles = {name: {"colour": BASELINE_COLOUR, "dash": "solid"} for name in names if name not in others}
    for place, name in enumerate(others):
        dash = DASHES[place // len(COLOURS) % len(DASHES)]
        styles[name] = {"colour": COLOURS[place % len(COLOURS)], "dash": dash}
    return styles


def _data(results: Results) -> dict[str, Any]:
    """What the page's script draws: the style of each cell, and its curve for each metric."""
    return {
        "styles": _styles(results),
        "curves": {metric: _curves(results, metric) for metric in results.metrics},
    }


def _curves(results: Results, metric: str) -> dict[str, dict[str, list[float | None]]]:
    """The metric's curve of each cell that has one; runs that failed are part of it as far as they came."""
    curves = {}
    for cell in results.cells:
        series = [run.metrics[metric] for run in cell.runs if metric in run.metrics]
        if series:
            curve = learning_curve(series)
            curves[cell.name] = {
                "x": _rounded(curve.steps),
                "mean": _rounded(curve.mean),
                "half": _rounded(curve.half_width),
            }
    return curves


def _rounded(values: Array) -> list[float | None]:
    """The values in a few digits; null for what is not finite."""
    return [
        float(f"{value:.{SIGNIFICANT_DIGITS}g}") if abs(value) < float("inf") else None for value in values.tolist()
    ]
