"""Steps of verl with an empty stack and with `grpo` through the stack, beside unmodified verl; writes docs/performance.md.

    .venv-verl/bin/python benchmarks/verl_step.py [--rounds 6] [--steps 30] [--pairs 250] [--folder runs/verl-benchmark]

On the same tiny run (light engine, verl's replay buffer with a short poll). See `steps.py` for the ratios.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import steps  # noqa: E402
from benchmarks.quick_buffer import QuickBuffer, TurnBuffer, ours  # noqa: E402
from benchmarks.report import STEPS_OF_VERL  # noqa: E402
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
PROCESSES = {"driver": "TaskRunnerV1", "worker": "WorkerDict"}
STEP, OWN = steps.STEP, "time of a step without generation"
WARM = 3
INTRODUCTION = """Written by `benchmarks/verl_step.py`: a model of 0.1 M parameters, 32 responses of 16 tokens per step, on
{cores} cores. A larger model brings the ratios closer to 1: what a stack costs is the same for every model."""


def run(folder: Path, overrides: Sequence[str], count: int) -> steps.Measured:
    """Medians of the seconds per step, with and without generation, and peak memory in bytes of driver and worker."""
    times, peaks = trained(folder, overrides, count, QuickBuffer)
    found = {name: statistics.median(step[name] for step in times[WARM:]) for name in times[0]}
    return found | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


def turns(folder: Path, pairs: int) -> list[steps.Pair]:
    """The seconds of verl's own and of the stack's step, of every pair but the first ones."""
    count = 2 * (pairs + WARM)
    times, _ = trained(folder, VARIANTS["grpo through the stack"], count, TurnBuffer)
    first = range(2 * WARM, count, 2)
    return [(times[step + ours(step + 1)], times[step + (not ours(step + 1))]) for step in first]


def trained(
    folder: Path, overrides: Sequence[str], count: int, buffer: type
) -> tuple[list[steps.Measured], dict[str, int]]:
    """The seconds of each step, with and without generation, and the peak memory in bytes of each process."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    metrics = folder / "metrics.jsonl"
    environment = launch.environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    sampler = "trainer.v1.sampler.custom_sampler"
    quick = [f"{sampler}.path={ROOT / 'benchmarks' / 'quick_buffer.py'}", f"{sampler}.name={buffer.__name__}"]
    command = launch.command(folder, [*quick, *overrides], steps=count)
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            steps.watch(process.pid, PROCESSES, peaks)
            time.sleep(2)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    entries = [json.loads(line)["data"] for line in metrics.read_text().splitlines()]
    times = [(entry["timing_s/step"], entry["timing_s/gen"]) for entry in entries]
    return [{STEP: whole, OWN: whole - generation} for whole, generation in times], peaks


if __name__ == "__main__":
    steps.Benchmark("verl", STEPS_OF_VERL, INTRODUCTION, VARIANTS, run, {"steps": turns}).main(
        rounds=6, steps=30, pairs=250
    )
