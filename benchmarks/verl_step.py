"""Steps of verl with an empty stack and with `grpo` through the stack, beside unmodified verl; writes docs/performance.md.

    .venv-verl/bin/python benchmarks/verl_step.py [--rounds 6] [--steps 80] [--folder runs/verl-benchmark]

A round starts every variant once, one after the other, in an order that changes from round to round, on the same tiny run
(light engine, verl's replay buffer with a short poll). Steps differ, starts differ more: a variant's time in a round is the
median over its steps but the first ones, its ratio is taken to plain verl in the same round, and the interval is that of
the mean of the log ratios (Student's t, 95 %).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import quick_buffer  # noqa: E402
from benchmarks.report import PAGE, STEPS_OF_VERL, installed, with_section  # noqa: E402
from rlplugins_verl.cpu import launch, tiny  # noqa: E402

BASE = "plain verl"
VARIANTS = {
    BASE: [],
    "empty stack": ["trainer.v1.trainer_mode=rlplugins_sync", "+rlplugins.plugins=[]"],
    "grpo through the stack": [
        "trainer.v1.trainer_mode=rlplugins_sync",
        "+rlplugins.plugins=[grpo]",
        "+rlplugins.owners={policy_loss:ppo_clip}",
    ],
}
QUICK = [
    f"trainer.v1.sampler.custom_sampler.path={quick_buffer.__file__}",
    f"trainer.v1.sampler.custom_sampler.name={quick_buffer.QuickBuffer.__name__}",
]
PROCESSES = {"driver": "TaskRunnerV1", "worker": "WorkerDict"}
STEP, OWN = "time of a step", "time of a step without generation"
TARGETS = {STEP: 1.01}
WARM = 3
INTRODUCTION = """Written by `benchmarks/verl_step.py`: {rounds} rounds of one start each, {steps} steps per start, a model
of 0.1 M parameters, 32 responses of 16 tokens per step, on {cores} cores. The geometric mean of the ratios of
neighbouring starts and its 95 % interval; memory is the largest resident size of the process. With so small a
model a step costs little beside what is the same for every model, so this is an upper bound."""

Measured = dict[str, float]


def run(folder: Path, overrides: Sequence[str], steps: int) -> Measured:
    """Seconds per step, with and without generation, and peak memory in bytes of driver and worker."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    metrics = folder / "metrics.jsonl"
    environment = launch.environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    command = launch.command(folder, [*QUICK, *overrides], steps=steps)
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            watch(process.pid, peaks)
            time.sleep(2)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    entries = [json.loads(line)["data"] for line in metrics.read_text().splitlines()][WARM:]
    whole = [entry["timing_s/step"] for entry in entries]
    own = [entry["timing_s/step"] - entry["timing_s/gen"] for entry in entries]
    found = {STEP: statistics.median(whole), OWN: statistics.median(own)}
    return found | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


def watch(driver: int, peaks: dict[str, int]) -> None:
    """Raise the peaks to the memory that the processes of the run have now."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            title, memory = " ".join(child.cmdline()), child.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for name, word in PROCESSES.items():
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


def section(rounds: Sequence[dict[str, Measured]], steps: int) -> str:
    """The section of the page."""
    lines = ["| ours | measured | plain verl | ratio | target |  |", "|---|---|---|---|---|---|"]
    lines += [row(rounds, name, measure) for name in VARIANTS if name != BASE for measure in rounds[0][BASE]]
    introduction = INTRODUCTION.format(rounds=len(rounds), steps=steps, cores=psutil.cpu_count())
    return "\n".join([introduction, "", *lines, "", f"Run with verl {installed('verl')}, torch {installed('torch')}."])


def row(rounds: Sequence[dict[str, Measured]], name: str, measure: str) -> str:
    """One line of the table: the target is met if the interval lies below it, missed if above, else nothing is settled."""
    middle, low, high = interval([found[name][measure] / found[BASE][measure] for found in rounds])
    base = statistics.median(found[BASE][measure] for found in rounds)
    plain = f"{base / 2**20:.0f} MiB" if "memory" in measure else f"{1000 * base:.0f} ms"
    target = TARGETS.get(measure)
    if target is None:
        wanted = verdict = ""
    else:
        wanted = f"at most {target:g}"
        verdict = "met" if high <= target else "**missed**" if low > target else "within the interval"
    return f"| {name} | {measure} | {plain} | {middle:.4f} ({low:.4f} to {high:.4f}) | {wanted} | {verdict} |"


def main() -> None:
    """Run the rounds and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "verl-benchmark")
    parser.add_argument("--page", type=Path, default=ROOT / PAGE, help="where the section goes")
    options = parser.parse_args()
    folder, rounds = options.folder.absolute(), []
    for number in range(options.rounds):
        names = list(VARIANTS)
        names = names[number % len(names) :] + names[: number % len(names)]
        rounds.append({name: run(folder / name.replace(" ", "-"), VARIANTS[name], options.steps) for name in names})
        print(f"round {number + 1} of {options.rounds}: {json.dumps(rounds[-1])}", flush=True)
    text = options.page.read_text() if options.page.exists() else ""
    options.page.write_text(with_section(text, STEPS_OF_VERL, section(rounds, options.steps)))
    print(section(rounds, options.steps))


if __name__ == "__main__":
    main()
