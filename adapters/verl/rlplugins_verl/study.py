"""Runs of a study (`rlplugins ablate` with `trainer: verl`): the user's own command line, with one cell's stack.

The study's `train` holds

    base: python -m verl.trainer.main_ppo data.train_files=... trainer.total_training_steps=100
    overrides: [actor_rollout_ref.actor.optim.lr=1e-6]      # further settings; a cell's go last
    steps: 100                                              # shown as the run's length, and given to verl
    environment: {CUDA_VISIBLE_DEVICES: "0"}

A run is `python -m rlplugins_verl.study CONFIG FOLDER`: it writes the stack file, starts verl in this process group, turns
verl's metrics into the run's while they come, and writes the result. Started again, verl resumes from its checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlplugins.errors import ConfigurationError
from rlplugins.files import read_yaml, yaml_text

RESULT, METRICS, CHECKPOINT = "result.json", "metrics.jsonl", "checkpoint"
SECONDS = 1.0
MAIN = "verl.trainer.main_ppo"

SHORT = {
    "critic/score/mean": "reward",
    "response_length/mean": "response_length",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad_norm",
    "actor/pg_loss": "policy_loss",
}
"""Metrics of verl that the local trainer has too, under its names, so that a report shows both."""


class VerlRun(BaseModel):
    """Configuration of one run."""

    model_config = ConfigDict(extra="forbid")

    base: str | list[str]
    """The command line that starts verl."""
    overrides: list[str] = []
    """Further settings of verl."""
    environment: dict[str, str] = {}
    """Variables of the process."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Training steps; as the base says if left out."""
    stack: dict[str, Any] = {}
    """The cell's stack, as in a stack file."""
    seed: int = 0
    """Seed of the data's order and of the rollouts."""


def command(config: Path, output: Path) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "rlplugins_verl.study", str(config), str(output)]


def read(config: Path) -> VerlRun:
    """The configuration of a run.

    Raises:
        ConfigurationError: naming the fields that are wrong.
    """
    return validated(read_yaml(config, "configuration"), str(config))


def validated(options: Any, where: str) -> VerlRun:
    """The options of a run; `where` names them in errors."""
    try:
        return VerlRun.model_validate(options)
    except ValidationError as error:
        problems = "; ".join(f"train.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"{where}: {problems}") from None


def shown_settings(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """verl's settings as the command line shows them, nested; None if a script hides them.

    Raises:
        ConfigurationError: if an option of the study is unknown or wrong.
    """
    run = validated(dict(options), "train")
    base = shlex.split(run.base) if isinstance(run.base, str) else list(run.base)
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
            node[name] = _value(text)
    return found


def _value(text: str) -> Any:
    """A setting's value, as far as the adapter reads it."""
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def arguments(run: VerlRun, output: Path) -> list[str]:
    """verl's command line: the base, then what the study decides, then overrides."""
    base = shlex.split(run.base) if isinstance(run.base, str) else list(run.base)
    mode = next((word for word in base if word.startswith("trainer.v1.trainer_mode=")), "=sync").partition("=")[2]
    decided = [
        f"trainer.v1.trainer_mode=rlplugins_{mode.removeprefix('rlplugins_')}",
        f"+rlplugins.stack={output / 'stack.yaml'}",
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


def make(config: Path, output: Path) -> int:
    """Make the run; gives verl's exit status."""
    run = read(config)
    started = time.monotonic()
    output = output.absolute()
    (output / "stack.yaml").write_text(yaml_text(run.stack), encoding="utf-8")
    log = output / f"verl-{len(list(output.glob('verl-*.jsonl')))}.jsonl"
    environment = {**os.environ, **run.environment, "VERL_FILE_LOGGER_PATH": str(log)}
    process = subprocess.Popen(arguments(run, output), env=environment)
    steps: dict[int, dict[str, Any]] = {}
    while (status := process.poll()) is None:
        steps = write_metrics(output)
        time.sleep(SECONDS)
    steps = write_metrics(output)
    if status == 0:
        result = {"status": "finished", "seconds": round(time.monotonic() - started, 3),
                  "metrics": steps[max(steps)] if steps else {}}  # fmt: skip
        _replace(output / RESULT, json.dumps(result))
    return status


def write_metrics(output: Path) -> dict[int, dict[str, Any]]:
    """`metrics.jsonl` from what verl has logged so far; of a step that was made twice, the later one."""
    steps: dict[int, dict[str, Any]] = {}
    for log in sorted(output.glob("verl-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # half a line, still being written
                continue
            if int(entry["step"]) > 0:
                steps[int(entry["step"])] = renamed(int(entry["step"]), entry["data"])
    text = "".join(json.dumps(steps[step]) + "\n" for step in sorted(steps))
    _replace(output / METRICS, text)
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


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def main(words: Sequence[str]) -> int:
    """`python -m rlplugins_verl.study CONFIG FOLDER`."""
    return make(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
