"""Steps of OpenRLHF with an empty stack and with `grpo` through the stack, beside plain OpenRLHF; writes docs/performance.md.

    .venv-openrlhf/bin/python benchmarks/openrlhf_step.py [--rounds 5] [--steps 16] [--folder runs/openrlhf-benchmark]

A variant's time is the median over its steps but the first two. See `steps.py` for the ratios.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import steps  # noqa: E402
from benchmarks.report import STEPS_OF_OPENRLHF  # noqa: E402
from rlplugins_openrlhf.cpu import launch, tiny  # noqa: E402
from rlplugins_openrlhf.study import LOGS, metrics  # noqa: E402

BASE = "plain OpenRLHF"
VARIANTS = {BASE: None, "empty stack": "[]", "grpo through the stack": "{stack}"}
GRPO = "plugins: [grpo]\nowners: {policy_loss: ppo_clip}\n"
PARTS = {
    "time of a step": "step_total", "of it generation": "generation", "of it passes and credit": "make_experience",
    "of it the update": "ppo_train",
}  # fmt: skip
PROCESSES = {"driver": "PPOTrainer", "worker": "PolicyModelActor"}
TARGETS = {"time of a step": 1.01}
WARM = 2
INTRODUCTION = """Written by `benchmarks/openrlhf_step.py`: {rounds} rounds of one start each, {steps} steps per start, a tiny
model and vLLM on {cores} cores. The geometric mean of the ratios of neighbouring starts and its 95 % interval; memory is the
largest resident size of the process. With so small a model a step costs little beside what is the same for every model, so
this is an upper bound."""


def run(folder: Path, stack: str | None, count: int) -> steps.Measured:
    """Seconds per step and of its parts, and peak memory in bytes of driver and worker."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    (folder / "grpo.yaml").write_text(GRPO)
    named = stack.format(stack=folder / "grpo.yaml") if stack else None
    words = launch.command(folder, named, ["--logger.tensorboard_dir", str(folder / LOGS)], steps=count)
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=launch.environment(), stdout=log, stderr=log)
        while process.poll() is None:
            steps.watch(process.pid, PROCESSES, peaks)
            time.sleep(2)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    found = metrics(folder)
    later = [found[step] for step in sorted(found)][WARM:]
    times = {name: statistics.median(step[f"timing/{part}"] for step in later) for name, part in PARTS.items()}
    return times | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


if __name__ == "__main__":
    steps.Benchmark("openrlhf", STEPS_OF_OPENRLHF, INTRODUCTION, VARIANTS, TARGETS, run).main(rounds=5, steps=16)
