"""From measurements to the tables of docs/performance.md."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PAGE = "docs/performance.md"
INTRODUCTION = """# Performance

Written by `make benchmark`. Each line compares two things that ran by turns in one process, on one thread, on the same
tensors: the median of the quotients of neighbouring runs, and in brackets their first and third quartile. Times are CPU
times, memory is what torch allocates. "Times faster" divides the other's time by ours, "of" divides ours by the
other's or by the limit. Ours is always the whole stack, its checks included; the other is the bare function. A large
tensor is freed beforehand, after which malloc keeps its pages, as in the process of a trainer.

"Its memory traffic" is a bound: every tensor of one number per token that the phase must see (the mask always) is read
once, block by block into a buffer that stays in the cache, and every such tensor that it must make is written once.
"""


STEPS_OF_VERL, STEPS_OF_OPENRLHF = "Steps of verl", "Steps of OpenRLHF"
SHARED_PREFIXES = "Prefix Grouper beside the plain forward"
"""Headings of the sections that other scripts write, and `make benchmark` leaves as they are."""


def cpu_seconds(function: Callable[[], Any], repeat: int = 1) -> float:
    """CPU time of one call, the mean of `repeat` calls."""
    begin = time.process_time()
    for _ in range(repeat):
        function()
    return (time.process_time() - begin) / repeat


@dataclass
class Measure:
    """Times of ours and theirs by turns, or of ours against a limit, in seconds."""

    limit: float | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def add(self, ours: Callable[[], Any], theirs: Callable[[], Any] | None, repeat: int) -> None:
        """Run both once more."""
        self.ours.append(cpu_seconds(ours, repeat))
        if theirs is not None:
            self.theirs.append(cpu_seconds(theirs, repeat))

    def forget(self, rounds: int) -> None:
        """Drop the first rounds, which warmed up."""
        del self.ours[:rounds], self.theirs[:rounds]

    @property
    def shares(self) -> list[float]:
        """Ours divided by theirs, or by the limit."""
        if self.limit is not None:
            return [ours / self.limit for ours in self.ours]
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def speedups(self) -> list[float]:
        """Theirs divided by ours."""
        return [1 / share for share in self.shares]


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Attributes:
        part: heading of the table.
        what: what is ours.
        against: what it is compared with.
        values: quotients, of which the median counts.
        target: what the median must reach; None: only for information.
        faster: values are "times faster" and must not be below the target, else "of" and must not be above it.
    """

    part: str
    what: str
    against: str
    values: Sequence[float]
    target: float | None = None
    faster: bool = False

    @property
    def median(self) -> float:
        """The median quotient."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none."""
        if self.target is None:
            return None
        return self.median >= self.target if self.faster else self.median <= self.target

    def cells(self) -> tuple[str, ...]:
        """The cells of the line."""
        unit = "times faster" if self.faster else "of it"
        spread = (
            "" if len(self.values) < 2 else " ({} to {})".format(*(short(value) for value in quartiles(self.values)))
        )
        wanted = "" if self.target is None else f"{'at least' if self.faster else 'at most'} {self.target:g}"
        verdict = {None: "", True: "met", False: "**missed**"}[self.met]
        return self.what, self.against, f"{short(self.median)}{spread} {unit}", wanted, verdict


def short(value: float) -> str:
    """Three digits at least where they matter."""
    return f"{value:.0f}" if value >= 20 else f"{value:.3g}"


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def table(lines: Sequence[Line]) -> str:
    """One Markdown table per part."""
    parts = []
    for part, members in itertools.groupby(lines, lambda line: line.part):
        rows = [("ours", "compared with", "result", "target", ""), *(line.cells() for line in members)]
        text = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append("\n".join([f"## {part}", "", text[0], "|---|---|---|---|---|", *text[1:]]))
    return "\n\n".join(parts)


def section(text: str, heading: str) -> str:
    """What stands under a heading of a page, up to the next one; empty if there is none."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].strip("\n")


def with_section(text: str, heading: str, body: str) -> str:
    """The page with another section under this heading, at its end if it had none."""
    before, found, after = text.partition(f"\n## {heading}\n")
    rest = after.partition("\n## ")[1:] if found else ("", "")
    return f"{before.rstrip()}\n\n## {heading}\n\n{body}\n{''.join(rest)}"


def page(lines: Sequence[Line], before: str = "") -> str:
    """The whole page; what other scripts wrote on the one `before` stays."""
    text = _page(lines)
    for heading in (STEPS_OF_VERL, STEPS_OF_OPENRLHF, SHARED_PREFIXES):
        if kept := section(before, heading):
            text = with_section(text, heading, kept)
    return text


def _page(lines: Sequence[Line]) -> str:
    found = ", ".join(f"{name} {installed(name)}" for name in ("torch", "verl", "numpy"))
    return f"{INTRODUCTION}\n{table(lines)}\n\nRun with Python {platform.python_version()}, {found}.\n"


def installed(distribution: str) -> str:
    """Its version."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "(not installed)"


def allocations(function: Callable[[], Any]) -> tuple[int, int]:
    """Peak of what torch holds on the CPU beyond what it held before, and the largest single tensor made, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0)), max(sizes, default=0)


def seeded() -> torch.Generator:
    """The generator of a benchmark's input."""
    return torch.Generator().manual_seed(0)
