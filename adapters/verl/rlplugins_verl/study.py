"""Runs of a study (`rlplugins ablate` with `trainer: verl`): the user's own command line, with one cell's stack.

The study's `train` holds

    base: python -m verl.trainer.main_ppo data.train_files=... trainer.total_training_steps=100
    overrides: [actor_rollout_ref.actor.optim.lr=1e-6]      # further settings; a cell's go last
    steps: 100                                              # shown as the run's length, and given to verl
    environment: {CUDA_VISIBLE_DEVICES: "0"}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlplugins.ablation.external import CHECKPOINT, STACK, ExternalRun, Steps, TrainerCommand, validated, value_of

MAIN = "verl.trainer.main_ppo"

SHORT = {
    "critic/score/mean": "reward",
    "response_length/mean": "response_length",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad_norm",
    "actor/pg_loss": "policy_loss",
}
"""Metrics of verl that the local trainer has too, under its names, so that a report shows both."""


def command(config: Path, output: Path) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "rlplugins_verl.study", str(config), str(output)]


def shown_settings(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """verl's settings as the command line shows them, nested; None if a script hides them.

    Raises:
        ConfigurationError: if an option of the study is unknown or wrong.
    """
    run = validated(dict(options), "train")
    base = run.words
    if MAIN not in base:
        return None
    found: dict[str, Any] = {}
    for word in [*base[base.index(MAIN) + 1 :], *run.overrides]:
        path, equals, text = word.lstrip("+").partition("=")
        if equals:
            *parents, name = path.split(".")
            node = found
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = value_of(text)
    return found


def arguments(run: ExternalRun, output: Path) -> list[str]:
    """verl's command line: the base, then what the study decides, then overrides."""
    base = run.words
    mode = next((word for word in base if word.startswith("trainer.v1.trainer_mode=")), "=sync").partition("=")[2]
    decided = [
        f"trainer.v1.trainer_mode=rlplugins_{mode.removeprefix('rlplugins_')}",
        f"+rlplugins.stack={output / STACK}",
        f"trainer.default_local_dir={output / CHECKPOINT}",
        "trainer.resume_mode=auto",
        f"hydra.run.dir={output / 'hydra'}",
        'trainer.logger=["console","file"]',
        f"data.seed={run.seed}",
        f"actor_rollout_ref.rollout.seed={run.seed}",
        f"actor_rollout_ref.actor.data_loader_seed={run.seed}",
    ]
    if run.steps is not None:
        decided.append(f"trainer.total_training_steps={run.steps}")
    return [*base, *decided, *run.overrides]


def environment(output: Path) -> dict[str, str]:
    """Where verl writes its metrics: a file of its own for each start."""
    return {"VERL_FILE_LOGGER_PATH": str(output / f"verl-{len(list(output.glob('verl-*.jsonl')))}.jsonl")}


def metrics(output: Path) -> Steps:
    """What verl has logged so far."""
    steps: Steps = {}
    for log in sorted(output.glob("verl-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # half a line, still being written
                continue
            if int(entry["step"]) > 0:
                steps[int(entry["step"])] = renamed(int(entry["step"]), entry["data"])
    return steps


def renamed(step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One line of `metrics.jsonl`."""
    found = {"step": step, **{name: value for name, value in metrics.items() if isinstance(value, int | float)}}
    found |= {short: metrics[name] for name, short in SHORT.items() if name in metrics}
    rewards = [
        value for name, value in metrics.items()
        if name.startswith(("val-core/", "val-aux/")) and "/reward/mean@" in name
    ]  # fmt: skip
    if rewards:
        found["validation/reward"] = sum(rewards) / len(rewards)
    return found


TRAINER = TrainerCommand(arguments, environment, metrics)


def main(words: Sequence[str]) -> int:
    """`python -m rlplugins_verl.study CONFIG FOLDER`."""
    return TRAINER.make(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
