"""Runs of a study (`rlplugins ablate` with `trainer: openrlhf`): the user's own command line, with one cell's stack.

The study's `train` holds

    base: python -m openrlhf.cli.train_ppo_ray --data.prompt_dataset ... --rollout.batch_size 128
    overrides: [--actor.adam.lr, "1e-6"]     # further flags; a cell's go last
    environment: {CUDA_VISIBLE_DEVICES: "0,1,2,3"}

where the base names the module `openrlhf.cli.train_ppo_ray` or `openrlhf.cli.train_dpo`, or is `rlplugins openrlhf
train_ppo_ray ...`, or a script that passes further words on to it. OpenRLHF has no flag for a number of steps:
`--data.max_samples` and, of `train_ppo_ray`, `--train.num_episodes` say how long a run is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlplugins.ablation.external import CHECKPOINT, STACK, ExternalRun, Steps, TrainerCommand, validated, value_of
from rlplugins.errors import ConfigurationError
from rlplugins_openrlhf.launch import COMMANDS, FLAG

MODULES = {f"openrlhf.cli.{name}": name for name in COMMANDS}
LOGS = "tensorboard"

SHORT = {
    "train/rollout/reward_mean": "reward",
    "train/rollout/response_length_mean": "response_length",
    "train/entropy_loss": "entropy",
    "train/actor_grad_norm": "grad_norm",
    "train/policy_loss": "policy_loss",
    "train/loss_mean": "preference_loss",
    "train/acc_mean": "accuracy",
}
"""Metrics of OpenRLHF that the local trainer has too, under its names, so that a report shows both."""


def command(config: Path, output: Path) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "rlplugins_openrlhf.study", str(config), str(output)]


def shown_flags(options: Mapping[str, Any]) -> tuple[str, SimpleNamespace] | None:
    """OpenRLHF's command and its flags as the command line shows them, nested; None if a script hides them.

    Raises:
        ConfigurationError: if an option of the study is unknown or wrong.
    """
    run = validated(dict(options), "train")
    words = run.words
    place = next((number for number, word in enumerate(words) if word in MODULES or word in COMMANDS), None)
    if place is None:
        return None
    nested: dict[str, Any] = {}
    for name, values in _flags([*words[place + 1 :], *run.overrides]):
        *parents, last = name.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        made = [value_of(value) for value in values]
        node[last] = made[0] if len(made) == 1 else made or True
    return MODULES.get(words[place], words[place]), _namespace(nested)


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Flags with the words that follow them."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
    return found


def _namespace(node: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(
        **{name: _namespace(value) if isinstance(value, Mapping) else value for name, value in node.items()}
    )


def arguments(run: ExternalRun, output: Path) -> list[str]:
    """OpenRLHF's command line: the base, then what the study decides, then overrides.

    Raises:
        ConfigurationError: if the study asks for a number of steps.
    """
    if run.steps is not None:
        raise ConfigurationError(
            "train.steps: OpenRLHF has no flag for it; set --data.max_samples and --train.num_episodes"
        )
    decided = [
        FLAG, str(output / STACK),
        "--train.seed", str(run.seed),
        "--ckpt.path", str(output / CHECKPOINT),
        "--ckpt.output_dir", str(output / "model"),
        "--ckpt.load_enable",
        "--logger.tensorboard_dir", str(output / LOGS),
    ]  # fmt: skip
    return [*with_launcher(run.words), *decided, *run.overrides]


def with_launcher(words: Sequence[str]) -> list[str]:
    """The base, started by rlplugins where it starts OpenRLHF's module itself."""
    place = next((number for number, word in enumerate(words) if word in MODULES), None)
    if place is None:
        return list(words)
    return [*words[:place], "rlplugins_openrlhf", MODULES[words[place]], *words[place + 1 :]]


def metrics(output: Path) -> Steps:
    """What OpenRLHF has written for TensorBoard so far."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: Steps = {}
    for file in sorted((output / LOGS).rglob("events.*"), key=lambda path: path.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                step = steps.setdefault(int(event.step), {"step": int(event.step)})
                step |= renamed(name, event.value)
    return {number: step for number, step in steps.items() if number > 0}


def renamed(name: str, value: float) -> dict[str, float]:
    """One metric under OpenRLHF's name, and under that of the local trainer where it has one."""
    own = name.removeprefix("train/")
    found = {own: value}
    if name in SHORT:
        found[SHORT[name]] = value
    if name.startswith("eval/") and name.endswith("_pass1"):
        found["validation/reward"] = value
    return found


TRAINER = TrainerCommand(arguments, lambda output: {}, metrics)


def main(words: Sequence[str]) -> int:
    """`python -m rlplugins_openrlhf.study CONFIG FOLDER`."""
    return TRAINER.make(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
