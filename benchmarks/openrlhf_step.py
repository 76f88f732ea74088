"""Steps of OpenRLHF with an empty stack and with `grpo` through the stack, beside plain OpenRLHF; writes docs/performance.md.

    .venv-openrlhf/bin/python benchmarks/openrlhf_step.py [--rounds 6] [--steps 80] [--pairs 500] [--folder FOLDER]

Both numbers of steps are rounded up to whole episodes of 16. See `steps.py` for the ratios.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import openrlhf_turns, steps  # noqa: E402
from benchmarks.report import STEPS_OF_OPENRLHF  # noqa: E402
from rlplugins_openrlhf.cpu import launch, tiny  # noqa: E402
from rlplugins_openrlhf.study import LOGS, metrics  # noqa: E402

BASE = "plain OpenRLHF"
VARIANTS = {BASE: None, "empty stack": "[]", "grpo through the stack": "{stack}"}
GRPO = "plugins: [grpo]\nowners: {policy_loss: ppo_clip}\n"
PARTS = {
    steps.STEP: "step_total", "of it generation": "generation", "of it passes and credit": "make_experience",
    "of it the update": "ppo_train",
}  # fmt: skip
PROCESSES = {"driver": "PPOTrainer", "worker": "PolicyModelActor"}
WARM = 3
EPISODE = tiny.TRAIN // launch.PROMPTS
MANY = [
    "--rollout.batch_size", str(tiny.TRAIN), "--rollout.micro_batch_size", "32", "--train.batch_size", "128",
    "--train.micro_batch_size", "32", "--data.max_samples", str(tiny.TRAIN),
]  # fmt: skip
"""Flags of a step of 256 responses, which is an episode."""
INTRODUCTION = """Written by `benchmarks/openrlhf_step.py`: a tiny model, 16 responses of 16 tokens per step (256, where it
says so), and vLLM, on {cores} cores. A larger model brings the ratios closer to 1: what a stack costs is the same for every
model."""


def run(folder: Path, stack: str | None, count: int) -> steps.Measured:
    """Medians of the seconds per step and of its parts, and peak memory in bytes of driver and worker."""
    times, peaks = trained(folder, stack, count)
    found = {name: statistics.median(step[name] for step in times[WARM:]) for name in PARTS}
    return found | {f"peak memory of the {name}": float(peak) for name, peak in peaks.items()}


def turns(folder: Path, pairs: int, *, many: bool) -> list[steps.Pair]:
    """The seconds of OpenRLHF's own and of the stack's step, of every pair but the first ones.

    Args:
        folder: of the run.
        pairs: how many.
        many: a quarter of them, of steps of 256 responses.
    """
    pairs = pairs // 4 if many else pairs
    times, _ = trained(folder, VARIANTS["grpo through the stack"], 2 * (pairs + WARM), by_turns=True, many=many)
    ours = openrlhf_turns.ours
    first = range(2 * WARM, 2 * (pairs + WARM), 2)
    return [(times[step + ours(step + 1)], times[step + (not ours(step + 1))]) for step in first]


def trained(
    folder: Path, stack: str | None, count: int, *, by_turns: bool = False, many: bool = False
) -> tuple[list[steps.Measured], dict[str, int]]:
    """The seconds of each step and of its parts, and the peak memory in bytes of each process."""
    shutil.rmtree(folder, ignore_errors=True)
    count = count if many else EPISODE * -(-count // EPISODE)
    tiny.write(folder)
    (folder / "grpo.yaml").write_text(GRPO)
    named = stack.format(stack=folder / "grpo.yaml") if stack else None
    further = ["--logger.tensorboard_dir", str(folder / LOGS)]
    if many:
        further += [*MANY, "--train.num_episodes", str(count)]
    words = launch.command(folder, named, further, steps=EPISODE if many else count)
    if by_turns:
        words[1:3] = [openrlhf_turns.__file__]
    peaks = dict.fromkeys(PROCESSES, 0)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(words, cwd=folder, env=launch.environment(), stdout=log, stderr=log)
        while process.poll() is None:
            steps.watch(process.pid, PROCESSES, peaks)
            time.sleep(2)
    if process.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    found = metrics(folder)
    if sorted(found) != list(range(1, count + 1)):
        raise SystemExit(f"a run made {len(found)} steps and not {count}: {folder / 'log.txt'}")
    parts = PARTS | ({steps.STEP: openrlhf_turns.WHOLE.removeprefix("timing/")} if by_turns else {})
    return [{name: found[step][f"timing/{part}"] for name, part in parts.items()} for step in sorted(found)], peaks


TURNS = {
    "steps of 16 responses": functools.partial(turns, many=False),
    "steps of 256 responses": functools.partial(turns, many=True),
}  # fmt: skip


if __name__ == "__main__":
    steps.Benchmark("openrlhf", STEPS_OF_OPENRLHF, INTRODUCTION, VARIANTS, run, TURNS).main(
        rounds=6, steps=80, pairs=500
    )
