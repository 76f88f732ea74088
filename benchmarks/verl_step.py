"""Steps of verl with an empty stack and with `grpo` through the stack, beside unmodified verl: ratios of alternating runs.

    .venv-verl/bin/python benchmarks/verl_step.py [--pairs 5] [--steps 20] [--folder runs/verl-benchmark]

Every pair starts all variants one after the other, in an order that changes from pair to pair, on the same tiny run. A
variant's time is the median over its steps but the first two; its ratio is taken within a pair, and the interval is that of the
mean of log ratios (Student's t, 95 %). Generation waits on verl's own poll of 2 s, so steps are also given without it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import time
from pathlib import Path

import psutil
from scipy.stats import t as student

from rlplugins_verl.cpu import launch, tiny

VARIANTS = {
    "plain verl": [],
    "empty stack": ["trainer.v1.trainer_mode=rlplugins_sync", "+rlplugins.plugins=[]"],
    "grpo": [
        "trainer.v1.trainer_mode=rlplugins_sync",
        "+rlplugins.plugins=[grpo]",
        "+rlplugins.owners={policy_loss:ppo_clip}",
    ],
}
PROCESSES = {"driver": "TaskRunnerV1", "worker": "WorkerDict"}
WARM = 2


def run(folder: Path, overrides: list[str], steps: int) -> dict[str, float]:
    """Seconds per step, with and without generation, and peak memory in bytes of driver and worker."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    metrics = folder / "metrics.jsonl"
    environment = launch.environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            launch.command(folder, overrides, steps=steps), cwd=folder, env=environment, stdout=log, stderr=log
        )
        while process.poll() is None:
            watch(process.pid, peaks)
            time.sleep(1)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    entries = [json.loads(line)["data"] for line in metrics.read_text().splitlines()][WARM:]
    whole = [entry["timing_s/step"] for entry in entries]
    own = [entry["timing_s/step"] - entry["timing_s/gen"] for entry in entries]
    found = {"step": statistics.median(whole), "step without generation": statistics.median(own)}
    return found | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


def watch(driver: int, peaks: dict[str, int]) -> None:
    """Raise the peaks to the memory that the processes of the run have now."""
    for child in psutil.Process(driver).children(recursive=True):
        try:
            title, memory = " ".join(child.cmdline()), child.memory_info().rss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        for name, word in PROCESSES.items():
            if word in title:
                peaks[name] = max(peaks[name], memory)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(middle), math.nan, math.nan
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/verl-benchmark"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    pairs = []
    for pair in range(options.pairs):
        names = list(VARIANTS)
        names = names[pair % len(names) :] + names[: pair % len(names)]
        found = {name: run(folder / name.replace(" ", "-"), VARIANTS[name], options.steps) for name in names}
        pairs.append(found)
        print(f"pair {pair + 1} of {options.pairs}: {json.dumps(found)}", flush=True)
    base = "plain verl"
    print(f"\n| | {' | '.join(name for name in VARIANTS if name != base)} |\n|---|{'---|' * (len(VARIANTS) - 1)}")
    for measure in pairs[0][base]:
        cells = []
        for name in VARIANTS:
            if name != base:
                middle, low, high = interval([pair[name][measure] / pair[base][measure] for pair in pairs])
                cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        print(f"| {measure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
