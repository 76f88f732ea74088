"""Runs of a study that are a trainer's own command line, with one cell's stack in it.

A run is `python -m <the adapter's module> CONFIG FOLDER`: it writes the stack file, starts the trainer in this process group,
turns the trainer's metrics into the run's while they come, and writes the result. Started again, the trainer resumes from its
checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlplugins.errors import ConfigurationError
from rlplugins.files import read_yaml, yaml_text

RESULT, METRICS, CHECKPOINT, STACK = "result.json", "metrics.jsonl", "checkpoint", "stack.yaml"
SECONDS = 1.0

Steps: TypeAlias = dict[int, dict[str, Any]]
"""Metrics by step."""


class ExternalRun(BaseModel):
    """Configuration of one run."""

    model_config = ConfigDict(extra="forbid")

    base: str | list[str]
    """The command line that starts the trainer."""
    overrides: list[str] = []
    """Further settings of the trainer."""
    environment: dict[str, str] = {}
    """Variables of the process."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Training steps; as the base says if left out."""
    stack: dict[str, Any] = {}
    """The cell's stack, as in a stack file."""
    seed: int = 0
    """Seed of the data's order and of the rollouts."""

    @property
    def words(self) -> list[str]:
        """The base as a list of words."""
        return shlex.split(self.base) if isinstance(self.base, str) else list(self.base)


@dataclass(frozen=True)
class TrainerCommand:
    """What an adapter says of its trainer's command line.

    Attributes:
        arguments: the whole command line of a run in a folder.
        environment: further variables, beside those of the run.
        metrics: what the trainer has logged so far; of a step that was made twice, the later one.
    """

    arguments: Callable[[ExternalRun, Path], Sequence[str]]
    environment: Callable[[Path], Mapping[str, str]]
    metrics: Callable[[Path], Steps]

    def make(self, config: Path, output: Path) -> int:
        """Make the run of a configuration file; gives the trainer's exit status."""
        run = read(config)
        started = time.monotonic()
        output = output.absolute()
        (output / STACK).write_text(yaml_text(run.stack), encoding="utf-8")
        environment = {**os.environ, **run.environment, **self.environment(output)}
        process = subprocess.Popen(self.arguments(run, output), env=environment)
        while (status := process.poll()) is None:
            self.write_metrics(output)
            time.sleep(SECONDS)
        steps = self.write_metrics(output)
        if status == 0:
            result = {"status": "finished", "seconds": round(time.monotonic() - started, 3),
                      "metrics": steps[max(steps)] if steps else {}}  # fmt: skip
            _replace(output / RESULT, json.dumps(result))
        return status

    def write_metrics(self, output: Path) -> Steps:
        """`metrics.jsonl` from what the trainer has logged so far."""
        steps = self.metrics(output)
        _replace(output / METRICS, "".join(json.dumps(steps[step]) + "\n" for step in sorted(steps)))
        return steps


def read(config: Path) -> ExternalRun:
    """The configuration of a run.

    Raises:
        ConfigurationError: naming the fields that are wrong.
    """
    return validated(read_yaml(config, "configuration"), str(config))


def validated(options: Any, where: str) -> ExternalRun:
    """The options of a run; `where` names them in errors."""
    try:
        return ExternalRun.model_validate(options)
    except ValidationError as error:
        problems = "; ".join(f"train.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"{where}: {problems}") from None


def value_of(text: str) -> Any:
    """A setting's value, as far as an adapter reads it."""
    words = {"true": True, "false": False, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
