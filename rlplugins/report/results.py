"""The results of a study or of one run, as they lie in its folder, and their summary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import RenderableType

from rlplugins.report import statistics
from rlplugins.report.folder import (
    CONFIG,
    FAILURE,
    LOG,
    METRICS,
    PLAN,
    RESULT,
    Plan,
    PlannedCell,
    ReportError,
    is_finished,
    log_tail,
    read_config,
    read_json,
    run_folder,
)
from rlplugins.report.statistics import Array, Estimate, Series
from rlplugins.report.table import SummaryTable

Status = Literal["finished", "unfinished", "failed", "waiting"]

HEADLINES = ("reward", "validation/reward", "accuracy", "validation/accuracy", "margin", "response_length", "entropy")


@dataclass(frozen=True)
class Run:
    """One run: a stack trained with one seed.

    Attributes:
        seed: its seed; 0 for a single run whose configuration names none.
        folder: where its files are.
        status: `waiting` before it starts, `unfinished` while it runs or if it was interrupted.
        metrics: what it recorded, by name.
        steps: (S,) the steps for which it recorded anything, ascending.
        config: the options that it was started with.
        seconds: how long it took; None unless finished.
        failure: how it ended and the last lines of its log, if it failed.
    """

    seed: int
    folder: Path
    status: Status
    metrics: Mapping[str, Series]
    steps: Array
    config: Mapping[str, Any]
    seconds: float | None = None
    failure: str | None = None

    @property
    def last_step(self) -> int:
        """The last step that it recorded; 0 before the first."""
        return int(self.steps[-1]) if len(self.steps) else 0


@dataclass(frozen=True)
class Summary:
    """One metric of one cell.

    Attributes:
        final: the mean of the last 10 % of the steps.
        area: the area under the learning curve, divided by its length.
        difference: `final` minus the baseline's, paired by seed; None for the baseline itself.
        area_difference: the same for `area`.
    """

    final: Estimate
    area: Estimate
    difference: Estimate | None
    area_difference: Estimate | None


@dataclass(frozen=True)
class Cell:
    """A stack and its runs.

    Attributes:
        name: its name.
        stack: the stack as in a stack file.
        train: training options that only this cell has.
        refused: why it was not run, if the stack is illegal.
        runs: one per seed.
    """

    name: str
    stack: Mapping[str, Any]
    train: Mapping[str, Any]
    refused: str | None
    runs: Sequence[Run]

    @cached_property
    def counted(self) -> Sequence[Run]:
        """The runs that the summary is about: the finished ones, as long as there are none the unfinished."""
        finished = [run for run in self.runs if run.status == "finished"]
        return finished or [run for run in self.runs if run.status == "unfinished"]

    @property
    def is_preliminary(self) -> bool:
        """Whether the summary is about runs that have not finished."""
        return any(run.status == "unfinished" for run in self.counted)

    def finals(self, metric: str) -> dict[int, float]:
        """The metric's final value by seed, of the counted runs that recorded it."""
        runs = [run for run in self.counted if metric in run.metrics]
        return {run.seed: statistics.final_value(run.metrics[metric], run.steps) for run in runs}

    def areas(self, metric: str) -> dict[int, float]:
        """The area under the metric's learning curve by seed, of the counted runs that recorded it."""
        runs = [run for run in self.counted if metric in run.metrics]
        return {run.seed: statistics.area_under_curve(run.metrics[metric]) for run in runs}


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    Attributes:
        name: the study's name, or the run's.
        folder: the folder.
        cells: all cells, refused ones too.
        baseline: the cell that the others are compared with; None for a single run.
        chosen: the metrics that the study asks for first.
    """

    name: str
    folder: Path
    cells: Sequence[Cell]
    baseline: str | None = None
    chosen: Sequence[str] = field(default=())

    @cached_property
    def metrics(self) -> list[str]:
        """Every metric that any run recorded: the chosen, the usual, then in order of first appearance."""
        found = dict.fromkeys(name for run in self.runs for name in run.metrics)
        first = [name for name in (*self.chosen, *HEADLINES) if name in found]
        return list(dict.fromkeys([*first, *found]))

    @property
    def headlines(self) -> list[str]:
        """The metrics of the summary table: the chosen ones, else the usual ones, else the first few."""
        usual = [name for name in HEADLINES if name in self.metrics]
        return list(self.chosen) or usual or self.metrics[:3]

    @property
    def runs(self) -> list[Run]:
        """The runs of all cells."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def failed(self) -> list[tuple[Cell, Run]]:
        """The runs that failed, with their cells."""
        return [(cell, run) for cell in self.cells for run in cell.runs if run.status == "failed"]

    @property
    def refused(self) -> list[Cell]:
        """The cells whose stack is illegal."""
        return [cell for cell in self.cells if cell.refused is not None]

    def summary(self, cell: Cell, metric: str) -> Summary | None:
        """The metric of the cell over its seeds; None if no counted run recorded it."""
        finals, areas = cell.finals(metric), cell.areas(metric)
        if not finals:
            return None
        base = self._compared_with(cell)
        return Summary(
            statistics.estimate(list(finals.values())),
            statistics.estimate(list(areas.values())),
            statistics.paired_difference(finals, base.finals(metric)) if base else None,
            statistics.paired_difference(areas, base.areas(metric)) if base else None,
        )

    def table(self) -> RenderableType:
        """The summary, the refused stacks and the failed runs, to print with rich."""
        return SummaryTable(self)

    def _compared_with(self, cell: Cell) -> Cell | None:
        """The baseline, unless it is the cell itself or one of the two is not finished."""
        base = next((other for other in self.cells if other.name == self.baseline), None)
        if base is None or base is cell or base.is_preliminary or cell.is_preliminary:
            return None
        return base


def load(folder: Path | str) -> Results:
    """Read a study's folder or a run's, finished or in progress.

    Args:
        folder: where `rlplugins ablate` or `rlplugins train` wrote.

    Raises:
        ReportError: if there is no study and no run in it.
    """
    folder = Path(folder)
    if (folder / PLAN).is_file():
        return _load_study(folder)
    if (folder / METRICS).is_file() or (folder / CONFIG).is_file():
        return _load_run(folder)
    state = "holds no study and no run" if folder.is_dir() else "is not a folder"
    raise ReportError(
        f"{folder} {state}: give the output folder of `rlplugins ablate` (it has a {PLAN}) "
        f"or of `rlplugins train` (it has a {METRICS})"
    )


def read_metrics(path: Path) -> tuple[dict[str, Series], Array]:
    """The metrics of a run and (S,) all its steps. A step that was written twice counts as last written.

    Args:
        path: a file of one JSON object per line. What is not a number is left out, and so is half a line.
    """
    table: dict[int, dict[str, float]] = {}
    for row in _rows(path):
        scalars = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        table.setdefault(int(scalars.pop("step")), {}).update(scalars)
    points: dict[str, list[tuple[int, float]]] = {}
    for step in sorted(table):
        for name, value in table[step].items():
            points.setdefault(name, []).append((step, value))
    series = {name: Series(*np.array(pairs, dtype=np.float64).T) for name, pairs in points.items()}
    return series, np.array(sorted(table), dtype=np.float64)


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """The complete rows of the file that have a step."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def _load_study(folder: Path) -> Results:
    plan = Plan.read(folder)
    cells = [_load_cell(folder, cell, plan.seeds) for cell in plan.cells]
    return Results(plan.name, folder, cells, plan.baseline, plan.metrics)


def _load_cell(folder: Path, cell: PlannedCell, seeds: Sequence[int]) -> Cell:
    folders = [] if cell.refused else [(run_folder(folder, cell.name, seed), seed) for seed in seeds]
    runs = [_read_run(run, seed) for run, seed in folders]
    return Cell(cell.name, cell.stack, cell.train, cell.refused, runs)


def _load_run(folder: Path) -> Results:
    seed = read_config(folder).get("seed")
    run = _read_run(folder, seed if isinstance(seed, int) else 0)
    stack = run.config.get("stack")
    name = folder.resolve().name
    cell = Cell(name, stack if isinstance(stack, dict) else {}, {}, None, [run])
    return Results(name, folder, [cell])


def _read_run(folder: Path, seed: int) -> Run:
    metrics, steps = read_metrics(folder / METRICS)
    seconds = read_json(folder / RESULT).get("seconds")
    return Run(
        seed=seed,
        folder=folder,
        status=_status(folder),
        metrics=metrics,
        steps=steps,
        config=read_config(folder),
        seconds=seconds if isinstance(seconds, int | float) else None,
        failure=_failure(folder),
    )


def _status(folder: Path) -> Status:
    if is_finished(folder):
        return "finished"
    if (folder / FAILURE).is_file():
        return "failed"
    has_begun = (folder / LOG).is_file() or (folder / METRICS).is_file()
    return "unfinished" if has_begun else "waiting"


def _failure(folder: Path) -> str | None:
    """How the run ended and the last lines of its log, if it failed."""
    if _status(folder) != "failed":
        return None
    return "\n".join([str(read_json(folder / FAILURE).get("reason", "failed")), log_tail(folder)]).rstrip()
