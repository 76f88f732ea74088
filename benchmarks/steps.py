"""Steps of a trainer's variants beside the plain trainer: what the benchmarks of verl and of OpenRLHF share.

A round starts every variant once, one after the other, in an order that changes from round to round. Steps differ, starts
differ more: a variant's time in a round is one number, its ratio is taken to the plain trainer's in the same round, and the
interval is that of the mean of the log ratios (Student's t, 95 %).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil
from scipy.stats import t as student

from benchmarks.report import with_section

Measured = dict[str, float]
Rounds = Sequence[Mapping[str, Measured]]


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


def write(page: Path, heading: str, body: str) -> None:
    """Put the section on the page."""
    text = page.read_text() if page.exists() else ""
    page.write_text(with_section(text, heading, body))
    print(body)
