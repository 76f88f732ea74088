"""Steps of a trainer's variants beside the plain trainer: what the benchmarks of verl and of OpenRLHF share.

Starts: a round starts every variant once, one after the other, in an order that changes from round to round. A variant's time
in a round is one number, and its ratio is taken to the plain trainer's in the same round. With an empty stack the trainer is
the plain one, so its line shows how far starts of the same thing lie apart.

Turns: since starts differ by more than the target, one run also takes turns between plain steps and those of the stack. Of each
two steps that follow one another one is plain, which one is drawn by chance, and the ratio is taken within the two.

Ratios of starts are few: the interval is that of the mean of their logarithms (Student's t, 95 %). Those of turns are many, and
some are wild, since a process collects its garbage in one of ten steps and needs a third of a second for it: the mean is that
of the middle 60 % of the logarithms, its interval is bootstrapped.
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
from scipy.stats import bootstrap, trim_mean
from scipy.stats import t as student

from benchmarks.report import PAGE, installed, with_section

ROOT = Path(__file__).resolve().parent.parent

STEP = "time of a step"
EVERY = f"{STEP}, all pairs"
TARGET = 1.01
"""The largest ratio of the times of a step that is wanted."""

Measured = dict[str, float]
Pair = tuple[Measured, Measured]


EXPLANATION = """Steps by turns: in one run, pairs of a plain step and one of the stack that follow one another, in an
order that is drawn; of the ratios the middle 60 % count but where it says all, since a process collects its garbage
in one of ten steps, which takes longer than anything that is looked for. Starts by turns: {rounds} rounds of one
start each, {steps} steps per start, the median of which counts; an empty stack gives the trainer itself, so its lines
show how far starts of the same thing lie apart. Ratios are geometric means with their 95 % interval, times are
medians; memory is the largest resident size of the process."""


@dataclass(frozen=True)
class Benchmark:
    """The variants of one trainer.

    Attributes:
        trainer: its distribution.
        heading: of the section on the page.
        introduction: with `{cores}`.
        variants: by name what makes each; the first is the plain trainer.
        run: measures one start, from a folder, a variant and a number of steps.
        turns: by name what measures a run of so many pairs of a plain step and one of the stack, from a folder.
    """

    trainer: str
    heading: str
    introduction: str
    variants: Mapping[str, Any]
    run: Callable[[Path, Any, int], Measured]
    turns: Mapping[str, Callable[[Path, int], list[Pair]]]

    def main(self, rounds: int, steps: int, pairs: int) -> None:
        """Run the rounds and write the section; the arguments are the defaults of the flags."""
        parser = argparse.ArgumentParser(description=self.heading)
        parser.add_argument("--rounds", type=int, default=rounds)
        parser.add_argument("--steps", type=int, default=steps, help="of each start of a round")
        parser.add_argument("--pairs", type=int, default=pairs, help="of a plain step and one of the stack")
        parser.add_argument("--folder", type=Path, default=ROOT / "runs" / f"{self.trainer}-benchmark")
        parser.add_argument("--page", type=Path, default=ROOT / PAGE, help="where the section goes")
        options = parser.parse_args()
        folder = options.folder.absolute()

        def measured(name: str) -> Measured:
            return self.run(folder / name.replace(" ", "-"), self.variants[name], options.steps)

        in_turn = {name: measure(folder / "turns", options.pairs) for name, measure in self.turns.items()}
        for name, pairs in in_turn.items():
            print(f"{name}: {middle([ours[STEP] / plain[STEP] for plain, ours in pairs])}", flush=True)
        made = run_rounds(options.rounds, self.variants, measured)
        base, *others = self.variants
        lines = [f"| | measured | {base} | ours | ratio | target |  |", "|---|---|---|---|---|---|---|"]
        for name, pairs in in_turn.items():
            label = f"grpo, {name} by turns, {len(pairs)} pairs"
            lines += rows(label, pairs, middle, TARGET)
            every = [({EVERY: plain[STEP]}, {EVERY: ours[STEP]}) for plain, ours in pairs]
            lines += rows(label, every, interval)
        for name in others:
            lines += rows(f"{name}, starts by turns", [(found[base], found[name]) for found in made], interval)
        parts = [
            self.introduction.format(cores=psutil.cpu_count()), EXPLANATION.format(rounds=len(made),
            steps=options.steps), "\n".join(lines), f"Run with {self.trainer} {installed(self.trainer)}, "
            f"torch {installed('torch')}.",
        ]  # fmt: skip
        body = "\n\n".join(parts)
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


def middle(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the middle 60 % of ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    found = bootstrap((logs,), lambda drawn, axis: trim_mean(drawn, 0.2, axis), rng=0).confidence_interval
    return math.exp(trim_mean(logs, 0.2)), math.exp(found.low), math.exp(found.high)


def rows(
    name: str, pairs: Sequence[Pair], mean: Callable[[Sequence[float]], tuple[float, float, float]],
    target: float | None = None,
) -> list[str]:  # fmt: skip
    """One line per measure: the target is met if the interval lies below it, missed if above, else nothing is settled."""
    return [row(name, measure, pairs, mean, target if measure == STEP else None) for measure in pairs[0][0]]


def row(name: str, measure: str, pairs: Sequence[Pair], mean: Callable[..., Any], target: float | None) -> str:
    """The line of one measure."""
    ratio, low, high = mean([ours[measure] / plain[measure] for plain, ours in pairs])
    sides = [statistics.median(side[measure] for side in sides) for sides in zip(*pairs, strict=True)]
    both = " | ".join(f"{side / 2**20:.0f} MiB" if "memory" in measure else f"{1000 * side:.1f} ms" for side in sides)
    wanted = verdict = ""
    if target is not None:
        wanted = f"at most {target:g}"
        verdict = "met" if high <= target else "**missed**" if low > target else "not settled"
    return f"| {name} | {measure} | {both} | {ratio:.4f} ({low:.4f} to {high:.4f}) | {wanted} | {verdict} |"
