"""Steps of OpenRLHF with an empty stack and with `grpo` through the stack, beside plain OpenRLHF: ratios of alternating runs.

    .venv-openrlhf/bin/python benchmarks/openrlhf_step.py [--pairs 5] [--steps 16] [--folder runs/openrlhf-benchmark]

Every pair starts all variants one after the other, in an order that changes from pair to pair, on the same tiny run. A
variant's time is the median over its steps but the first two; its ratio is taken within a pair, and the interval is that of
the mean of log ratios (Student's t, 95 %).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

from scipy.stats import t as student

from rlplugins_openrlhf.cpu import launch, tiny
from rlplugins_openrlhf.study import LOGS, metrics

VARIANTS = {"plain OpenRLHF": None, "empty stack": "[]", "grpo": "{stack}"}
GRPO = "plugins: [grpo]\nowners: {policy_loss: ppo_clip}\n"
PARTS = ("step_total", "generation", "make_experience", "ppo_train")
WARM = 2


def run(folder: Path, stack: str | None, steps: int) -> dict[str, float]:
    """Seconds per step, and of its parts."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.write(folder)
    (folder / "grpo.yaml").write_text(GRPO)
    named = stack.format(stack=folder / "grpo.yaml") if stack else None
    words = launch.command(folder, named, ["--logger.tensorboard_dir", str(folder / LOGS)], steps=steps)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(words, cwd=folder, env=launch.environment(), stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"a run failed: {folder / 'log.txt'}")
    found = metrics(folder)
    later = [found[step] for step in sorted(found)][WARM:]
    return {part: statistics.median(step[f"timing/{part}"] for step in later) for part in PARTS}


def interval(ratios: list[float]) -> str:
    """Geometric mean of ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return f"{math.exp(middle):.3f}"
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return f"{math.exp(middle):.3f} ({math.exp(middle - half):.3f} to {math.exp(middle + half):.3f})"


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("runs/openrlhf-benchmark"))
    options = parser.parse_args()
    folder = options.folder.absolute()
    pairs = []
    for pair in range(options.pairs):
        names = list(VARIANTS)
        names = names[pair % len(names) :] + names[: pair % len(names)]
        found = {name: run(folder / name.replace(" ", "-"), VARIANTS[name], options.steps) for name in names}
        pairs.append(found)
        print(f"pair {pair + 1} of {options.pairs}: {json.dumps(found)}", flush=True)
    base, *others = VARIANTS
    print(f"\n| | {' | '.join(others)} |\n|---|{'---|' * len(others)}")
    for part in PARTS:
        cells = [interval([pair[name][part] / pair[base][part] for pair in pairs]) for name in others]
        print(f"| {part} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
