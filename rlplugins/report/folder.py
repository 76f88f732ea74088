"""The files of a study: what `rlplugins ablate` and the trainers write, and what a report reads.

<study>/plan.json                   the cells of the study, the refused ones with the reason
<study>/<cell>/seed-<k>/            one run:
    config.yaml                     the options of `rlplugins train`, with `stack` and `seed`
    metrics.jsonl                   one JSON object per step: {"step": 1, "reward": 0.5, ...}
    checkpoint*                     what the trainer resumes from
    result.json                     written at the end, at once: {"status": "finished", ...}
    failure.json                    written by the study when the run's process ended otherwise
    log.txt                         the run's standard output and error
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlplugins.errors import ConfigurationError, RlpluginsError
from rlplugins.files import read_yaml

PLAN = "plan.json"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
RESULT = "result.json"
FAILURE = "failure.json"
LOG = "log.txt"

LOG_TAIL_BYTES = 16_384


class ReportError(RlpluginsError):
    """A folder holds nothing that can be reported; the text names it."""


class PlannedCell(BaseModel):
    """One cell of a study: a stack, trained once per seed.

    Attributes:
        name: the cell's name and the name of its folder.
        stack: the stack as in a stack file.
        train: training options that only this cell has.
        refused: why the stack is illegal; None if it is run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    stack: dict[str, Any]
    train: dict[str, Any] = {}
    refused: str | None = None


class Plan(BaseModel):
    """What a study consists of, as its folder remembers it.

    Attributes:
        name: the study's name.
        trainer: the trainer that makes the runs.
        baseline: the cell that the others are compared with.
        metrics: the metrics that the summary shows, in this order; empty: the usual ones.
        seeds: one run of every cell for each of them.
        cells: all cells, in the order of the study.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    trainer: str
    baseline: str
    metrics: list[str]
    seeds: list[int]
    cells: list[PlannedCell]

    def write(self, folder: Path) -> None:
        """Put the plan into the study's folder."""
        write_json(folder / PLAN, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of the study in `folder`.

        Raises:
            ReportError: if the folder's plan is not one.
        """
        path = folder / PLAN
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ReportError(f"{path} is not the plan of a study: {error}") from error


def run_folder(study: Path, cell: str, seed: int) -> Path:
    """Where the run of `cell` with `seed` lives."""
    return study / cell / f"seed-{seed}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an empty one if there is none (no file, or half a file)."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that the run was started with; empty if it has none that can be read."""
    try:
        config = read_yaml(run / CONFIG)
    except ConfigurationError:
        return {}
    return config if isinstance(config, dict) else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that a reader sees the old file or the new one, never half of it."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    scratch.replace(path)


def is_finished(run: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return read_json(run / RESULT).get("status") == "finished"


def log_tail(run: Path, lines: int = 20) -> str:
    """The last lines of the run's log; empty if it wrote none."""
    try:
        with (run / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])
