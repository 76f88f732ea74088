"""The runs of a study in their folders: what is done, what is to do, what would mix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlplugins.ablation.study import Cell, Study, StudyError
from rlplugins.files import yaml_text
from rlplugins.report.folder import CONFIG, FAILURE, is_finished, read_config, run_folder

_MISSING = object()


@dataclass(frozen=True)
class RunSpec:
    """One run of a study.

    Attributes:
        cell: the name of its cell.
        seed: its seed.
        folder: where it reads its configuration and writes everything.
        config: what `config.yaml` holds: the options of `rlplugins train`, with `stack` and `seed`.
    """

    cell: str
    seed: int
    folder: Path
    config: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The run as messages call it."""
        return f"{self.cell}, seed {self.seed}"

    @property
    def steps(self) -> int | None:
        """How many steps it will make, if its configuration says so."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None


def plan_runs(study: Study, cells: Iterable[Cell], folder: Path) -> list[RunSpec]:
    """The runs of `cells`, all cells of a seed before the next seed, so that early results can be compared.

    Args:
        study: the study.
        cells: those of its cells that can be run.
        folder: the study's folder.
    """
    cells = list(cells)
    return [_run(study, cell, seed, folder) for seed in study.seeds for cell in cells]


def outdated_runs(runs: Sequence[RunSpec]) -> dict[RunSpec, list[str]]:
    """The finished runs whose configuration is no longer the study's, each with the options that differ.

    Args:
        runs: the runs of the study.
    """
    changes = {
        run.folder: changed_options(read_config(run.folder), run.config) for run in runs if is_finished(run.folder)
    }
    return {run: changes[run.folder] for run in runs if changes.get(run.folder)}


def prepare(run: RunSpec) -> bool:
    """Make the run's folder ready for a process to begin in.

    Args:
        run: a run that is not finished.

    Returns:
        Whether there is a checkpoint to continue from; else the folder holds nothing but the configuration.

    Raises:
        StudyError: if the folder holds something that is not a run.
    """
    if read_config(run.folder) == run.config and any(run.folder.glob("checkpoint*")):
        (run.folder / FAILURE).unlink(missing_ok=True)
        return True
    discard(run)
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(yaml_text(run.config), encoding="utf-8")
    return False


def discard(run: RunSpec) -> None:
    """Delete the run's folder, if it is there and is a run's.

    Args:
        run: the run.

    Raises:
        StudyError: if the folder holds something that is not a run.
    """
    if not run.folder.exists():
        return
    if not (run.folder / CONFIG).is_file() and any(run.folder.iterdir()):
        raise StudyError(f"{run.folder} is not the folder of a run (it has no {CONFIG}): choose another output folder")
    shutil.rmtree(run.folder)


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The options that differ, as `stack.plugins: [a] -> [b]`.

    Args:
        old: options before.
        new: options now.
        prefix: what to put before their names.
    """
    changes = []
    for option in dict.fromkeys([*old, *new]):
        before, now = old.get(option, _MISSING), new.get(option, _MISSING)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changes += changed_options(before, now, f"{prefix}{option}.")
        elif before != now:
            changes.append(f"{prefix}{option}: {_show(before)} -> {_show(now)}")
    return changes


def _run(study: Study, cell: Cell, seed: int, folder: Path) -> RunSpec:
    config = {**study.train, **cell.train, "stack": dict(cell.stack), "seed": seed}
    return RunSpec(cell.name, seed, run_folder(folder, cell.name, seed), config)


def _show(value: object) -> str:
    return "absent" if value is _MISSING else json.dumps(value, default=str)
