"""Steps of verl with an empty stack and with `grpo` through the stack, beside unmodified verl; writes docs/performance.md.

    .venv-verl/bin/python benchmarks/verl_step.py [--rounds 6] [--steps 80] [--folder runs/verl-benchmark]

On the same tiny run (light engine, verl's replay buffer with a short poll); a variant's time is the median over its steps but
the first ones. See `steps.py` for the ratios.
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

from benchmarks import quick_buffer, steps  # noqa: E402
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


def run(folder: Path, overrides: Sequence[str], count: int) -> steps.Measured:
    """Seconds per step, with and without generation, and peak memory in bytes of driver and worker."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    metrics = folder / "metrics.jsonl"
    environment = launch.environment() | {"VERL_FILE_LOGGER_PATH": str(metrics)}
    command = launch.command(folder, [*QUICK, *overrides], steps=count)
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            steps.watch(process.pid, PROCESSES, peaks)
            time.sleep(2)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    entries = [json.loads(line)["data"] for line in metrics.read_text().splitlines()][WARM:]
    whole = [entry["timing_s/step"] for entry in entries]
    own = [entry["timing_s/step"] - entry["timing_s/gen"] for entry in entries]
    found = {STEP: statistics.median(whole), OWN: statistics.median(own)}
    return found | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


if __name__ == "__main__":
    steps.Benchmark("verl", STEPS_OF_VERL, INTRODUCTION, VARIANTS, TARGETS, run).main(rounds=6, steps=80)
