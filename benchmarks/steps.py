"""Steps of a trainer's variants beside the plain trainer: what the benchmarks of verl and of OpenRLHF share.

A round starts every variant once, one after the other, in an order that changes from round to round. Steps differ, starts
differ more: a variant's time in a round is one number, its ratio is taken to the plain trainer's in the same round, and the
interval is that of the mean of the log ratios (Student's t, 95 %).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from scipy.stats import t as student

from benchmarks.report import PAGE, installed, with_section

ROOT = Path(__file__).resolve().parent.parent

Measured = dict[str, float]
Rounds = Sequence[Mapping[str, Measured]]


@dataclass(frozen=True)
class Benchmark:
    """The variants of one trainer.

    Attributes:
        trainer: its distribution.
        heading: of the section on the page.
        introduction: with `{rounds}`, `{steps}` and `{cores}`.
        variants: by name what makes each; the first is the plain trainer.
        targets: per measure the largest ratio that is wanted.
        run: measures one start, from a folder, a variant and a number of steps.
    """

    trainer: str
    heading: str
    introduction: str
    variants: Mapping[str, Any]
    targets: Mapping[str, float]
    run: Callable[[Path, Any, int], Measured]

    def main(self, rounds: int, steps: int) -> None:
        """Run the rounds and write the section; the arguments are the defaults of the flags."""
        parser = argparse.ArgumentParser(description=self.heading)
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--folder", type=Path, default=ROOT / "runs" / f"{self.trainer}-benchmark")
        parser.add_argument("--page", type=Path, default=ROOT / PAGE, help="where the section goes")
        options = parser.parse_args()
        folder = options.folder.absolute()

        def measured(name: str) -> Measured:
            return self.run(folder / name.replace(" ", "-"), self.variants[name], options.steps)

        made = run_rounds(options.rounds, self.variants, measured)
        introduction = self.introduction.format(rounds=len(made), steps=options.steps, cores=psutil.cpu_count())
        footer = f"Run with {self.trainer} {installed(self.trainer)}, torch {installed('torch')}."
        base = next(iter(self.variants))
        body = "\n\n".join([introduction, table(made, base, self.targets), footer])
        text = options.page.read_text() if options.page.exists() else ""
        options.page.write_text(with_section(text, self.heading, body))
        print(body)


def run_rounds(count: int, variants: Iterable[str], run: Callable[[str], Measured]) -> list[dict[str, Measured]]:
    """What `run` measures of every variant, in every round."""
    rounds = []
    for number in range(count):
        names = list(variants)
        names = names[number % len(names) :] + names[: number % len(names)]
        rounds.append({name: run(name) for name in names})
        print(f"round {number + 1} of {count}: {json.dumps(rounds[-1])}", flush=True)
    return rounds


def watch(driver: int, processes: Mapping[str, str], peaks: dict[str, int]) -> None:
    """Raise the peaks to the memory in bytes that the run's processes have now; `processes` say how each is called."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            title, memory = " ".join(child.cmdline()), child.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for name, word in processes.items():
            if word in title:
                peaks[name] = max(peaks[name], memory)


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), 0.0, math.inf
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def table(rounds: Rounds, base: str, targets: Mapping[str, float]) -> str:
    """One line per variant and measure."""
    others = [name for name in rounds[0] if name != base]
    lines = [f"| ours | measured | {base} | ratio | target |  |", "|---|---|---|---|---|---|"]
    return "\n".join(
        [*lines, *(row(rounds, base, name, measure, targets) for name in sorted(others) for measure in rounds[0][base])]
    )


def row(rounds: Rounds, base: str, name: str, measure: str, targets: Mapping[str, float]) -> str:
    """One line: the target is met if the interval lies below it, missed if above, else nothing is settled."""
    middle, low, high = interval([found[name][measure] / found[base][measure] for found in rounds])
    usual = statistics.median(found[base][measure] for found in rounds)
    plain = f"{usual / 2**20:.0f} MiB" if "memory" in measure else f"{1000 * usual:.0f} ms"
    target = targets.get(measure)
    wanted = verdict = ""
    if target is not None:
        wanted = f"at most {target:g}"
        verdict = "met" if high <= target else "**missed**" if low > target else "not settled"
    return f"| {name} | {measure} | {plain} | {middle:.4f} ({low:.4f} to {high:.4f}) | {wanted} | {verdict} |"
