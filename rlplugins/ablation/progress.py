"""What a study shows while it runs: a bar per running run and one over all, a line per run that has ended."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from rlplugins.ablation.runs import RunSpec
from rlplugins.report.folder import METRICS

TAIL_BYTES = 65_536

LINES_BESIDE_THE_BARS = 6


class MetricsTail:
    """The last step and reward in a growing metrics file, reading only what is new at its end.

    Args:
        path: the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.step: int | None = None
        self.reward: float | None = None

    def update(self) -> None:
        """Read the rows that were added since the last call."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                start = self._offset if self._offset <= size else 0
                file.seek(max(start, size - TAIL_BYTES))
                added = file.read()
                complete = added.rfind(b"\n") + 1
                self._offset = file.tell() - len(added) + complete
        except FileNotFoundError:
            return
        for line in added[:complete].splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError:  # the first line of the tail may be cut
            return
        if isinstance(row, dict):
            self.step = row.get("step", self.step)
            self.reward = row.get("reward", self.reward)


class Display:
    """Progress of a study. Bars are drawn on a terminal only, lines everywhere.

    Args:
        console: where to write.
        total: the number of runs of the study.
        finished: how many of them are finished already.
    """

    def __init__(self, console: Console, total: int, finished: int) -> None:
        self._console = console
        self._total = total
        self._ended = finished
        self._tails: dict[RunSpec, MetricsTail] = {}
        self._bars: dict[RunSpec, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.fields[of]}"),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._overall = self._progress.add_task("all runs", total=total, completed=finished, of=total, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        """Print a line of text as it is."""
        self._console.print(Text(text, style), soft_wrap=True)

    def started(self, run: RunSpec) -> None:
        """A run was started: it gets a bar as long as the terminal has room for one."""
        self._tails[run] = MetricsTail(run.folder / METRICS)
        self._bars[run] = self._progress.add_task(
            run.name, total=run.steps, of=run.steps or "?", note="starting", visible=self._has_room()
        )

    def refresh(self) -> None:
        """Show how far the running runs are."""
        for run, tail in self._tails.items():
            tail.update()
            if tail.step is not None:
                self._progress.update(self._bars[run], completed=tail.step, note=_reward(tail))

    def ended(self, run: RunSpec, outcome: str, failed: bool) -> None:
        """A run has ended: its bar goes, its line is printed."""
        tail = self._tails.pop(run)
        tail.update()
        self._progress.remove_task(self._bars.pop(run))
        self._ended += 1
        self._progress.update(self._overall, completed=self._ended)
        note = f", {_reward(tail)}" if tail.reward is not None else ""
        self.say(f"[{self._ended}/{self._total}] {run.name}: {outcome}{note}", "red" if failed else "")
        for waiting in list(self._bars.values())[: self._room()]:
            self._progress.update(waiting, visible=True)

    def _room(self) -> int:
        return max(1, self._console.height - LINES_BESIDE_THE_BARS)

    def _has_room(self) -> bool:
        return len(self._bars) < self._room()


def _reward(tail: MetricsTail) -> str:
    return f"reward {tail.reward:.3f}" if isinstance(tail.reward, int | float) else ""
