"""What a run writes: metrics, checkpoints, the result, and what a user sees while it runs."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlplugins.errors import ConfigurationError, StateError
from rlplugins.report.folder import CONFIG, METRICS, RESULT, write_json
from rlplugins.stack import Stack, StackConfig
from rlplugins_local.config import TrainConfig
from rlplugins_local.policy import Policy

KEPT_CHECKPOINTS = 2
HEADLINES = ("reward", "accuracy", "loss", "validation/reward", "validation/accuracy")
PLACE = {"output", "resume"}
"""Settings that say where a run is, not what it is."""
FREE = PLACE | {
    "model",
    "data",
    "pairs",
    "reward",
    "validation_data",
    "steps",
    "report_to",
    "checkpoint_every",
    "threads",
    "device",
}
"""Settings that may differ when a run is resumed."""


class RunFolder:
    """The folder of a run.

    Args:
        config: the settings.
        stack: the stack file.

    Raises:
        ConfigurationError: if the folder holds another run, or this one and `resume` is not set.
    """

    def __init__(self, config: TrainConfig, stack: StackConfig) -> None:
        self.path = config.output
        self._config = config
        self._stack = stack
        self.path.mkdir(parents=True, exist_ok=True)
        if not config.resume and ((self.path / METRICS).exists() or self.checkpoint() is not None):
            raise ConfigurationError(
                f"{self.path} already holds a run: --resume continues it, --output names another folder"
            )
        self._write_config()

    def _write_config(self) -> None:
        """The settings of the whole run, unless a study has written them."""
        path = self.path / CONFIG
        settings = self._config.model_dump(mode="json", exclude=PLACE) | {"stack": self._stack.model_dump(mode="json")}
        if not path.exists() or not self._says_the_same(path):
            path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")

    def _says_the_same(self, path: Path) -> bool:
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
            stack = StackConfig.model_validate(written.pop("stack", {}))
            place = {name: getattr(self._config, name) for name in PLACE}
            return stack == self._stack and TrainConfig.model_validate(written | place) == self._config
        except (AttributeError, ValidationError, yaml.YAMLError):
            return False

    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_checkpoint(self.path)

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write into, which becomes checkpoint-<step> when all is there; only the last two are kept."""
        writing, final = self.path / f".checkpoint-{step}.writing", self.path / f"checkpoint-{step}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        yield writing
        os.rename(writing, final)
        for old in _checkpoints(self.path)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def truncate_metrics(self, step: int) -> dict[str, Any]:
        """Forget what was measured after `step`; gives that step's metrics."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _line_step(line) <= step]
        scratch = path.with_name(f".{path.name}.writing")
        scratch.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        scratch.replace(path)
        return json.loads(kept[-1]) if kept else {}  # type: ignore[no-any-return]

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """One line, which a reader sees at once."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def finish(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Write the result."""
        write_json(self.path / RESULT, {"status": "finished", "seconds": round(seconds, 3), "metrics": dict(metrics)})


def newest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint in a run's folder."""
    return next(reversed(_checkpoints(run)), None)


def _checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted((path for path in run.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


# checkpoints


def save_checkpoint(
    folder: Path, policy: Policy, optimiser: torch.optim.Optimizer, stack: Stack, notes: Mapping[str, Any]
) -> None:
    """Model, optimiser, random numbers and plugin state.

    Args:
        folder: an empty folder.
        policy: the model.
        optimiser: its optimiser.
        stack: the plugins.
        notes: what else to remember; must hold `step`.
    """
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    tensors = {"random/torch": torch.get_rng_state()}
    if policy.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(policy.device)
    name, keys, *rest = np.random.get_state(legacy=True)
    tensors["random/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    for place, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{place}/{key}": value.contiguous() for key, value in state.items()}
    if policy.value_head is not None:
        tensors |= {f"value_head/{key}": value for key, value in policy.value_head.state_dict().items()}
    save_file(tensors, folder / "trainer.safetensors")
    if policy.reference is not None:
        save_file(_without_shared(policy.reference.state_dict()), folder / "reference.safetensors")
    stack.save(folder / "plugins", int(notes["step"]))
    write_json(
        folder / "trainer.json",
        {**notes, "stack": stack.specification(), "random": {"python": random.getstate(), "numpy": [name, *rest]}},
    )


def read_notes(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """What the checkpoint remembers beside tensors.

    Raises:
        ConfigurationError: if the run was started with other settings.
        StateError: if the checkpoint is damaged.
    """
    try:
        notes: dict[str, Any] = json.loads((checkpoint / "trainer.json").read_text())
        saved = notes["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise StateError(f"the checkpoint {checkpoint} is damaged: {error}") from error
    mine = settings_of(config)
    changed = [f"{name}: {saved.get(name)!r} -> {mine[name]!r}" for name in mine if saved.get(name) != mine[name]]
    if changed:
        raise ConfigurationError(
            f"the run in {checkpoint.parent} was started with other settings ({'; '.join(changed)}): resume it with its "
            "own, or name another output folder"
        )
    return notes


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share."""
    return config.model_dump(mode="json", exclude=FREE)


def load_checkpoint(
    checkpoint: Path, policy: Policy, optimiser: torch.optim.Optimizer, stack: Stack, notes: Mapping[str, Any]
) -> None:
    """Restore everything but the model's weights, which were loaded from the checkpoint.

    Raises:
        StateError: if it belongs to another stack, or is damaged.
    """
    stack.load(checkpoint / "plugins")
    if notes["stack"] != stack.specification():
        raise StateError(
            f"the run in {checkpoint.parent} was started with other options of its plugins: resume it with its own stack, "
            "or name another output folder"
        )
    tensors = load_file(checkpoint / "trainer.safetensors")
    torch.set_rng_state(tensors["random/torch"].clone())
    if policy.device.type == "cuda" and "random/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random/cuda"].clone(), policy.device)
    version, internal, gauss = notes["random"]["python"]
    random.setstate((version, tuple(internal), gauss))
    name, *rest = notes["random"]["numpy"]
    np.random.set_state((name, tensors["random/numpy"].numpy().astype(np.uint32), *rest))
    states: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith("optimiser/"):
            _, place, key = path.split("/")
            states.setdefault(int(place), {})[key] = value.clone()
    optimiser.load_state_dict(optimiser.state_dict() | {"state": states})
    if policy.value_head is not None:
        policy.value_head.load_state_dict({key: tensors[f"value_head/{key}"].clone() for key in ("weight", "bias")})
    if policy.reference is not None:
        _load_reference(policy.reference, load_file(checkpoint / "reference.safetensors"))


def _without_shared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every storage once: tied weights are saved under their first name."""
    first: dict[int, str] = {}
    for name, value in state.items():
        first.setdefault(value.data_ptr(), name)
    return {name: state[name].contiguous() for name in first.values()}


def _load_reference(reference: nn.Module, state: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in reference.state_dict().items():
            if name in state:
                value.copy_(state[name])


# trackers and progress


class Trackers:
    """Trackers of accelerate that get every step's metrics.

    Args:
        names: their names; `none` for none.
        folder: where those that write files do.
        settings: the run's settings.

    Raises:
        ConfigurationError: if one is unknown or its library is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        wanted = [name for name in names if name != "none"]
        if not wanted:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers

        known = {str(getattr(name, "value", name)): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}
        installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
        for name in wanted:
            if name not in known:
                raise ConfigurationError(
                    f"report_to: there is no tracker {name!r}; there are: {', '.join(known)}, none"
                )
            if name not in installed:
                raise ConfigurationError(
                    f"report_to: the library of the tracker {name!r} is not installed; pip install {name}, or choose "
                    f"from: {', '.join(sorted(installed)) or 'none'}"
                )
        for name in filter_trackers(wanted, str(folder)):
            tracker = known[str(getattr(name, "value", name))]
            arguments = {"logging_dir": str(folder)} if tracker.requires_logging_directory else {}
            self._trackers.append(tracker("rlplugins", **arguments))
        for started in self._trackers:
            if hasattr(started, "start"):
                started.start()
            started.store_init_configuration(dict(settings))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One step."""
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Close them."""
        for tracker in self._trackers:
            tracker.finish()


class Display(Protocol):
    """Shows the steps to the user."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step."""


@contextmanager
def display(steps: int, done: int, wanted: bool) -> Iterator[Display]:
    """A progress bar on a terminal, lines elsewhere, nothing if not wanted.

    Args:
        steps: of the run.
        done: those of them that were made before.
        wanted: whether to show anything.
    """
    console = Console()
    if not wanted:
        yield _Silent()
    elif not console.is_terminal:
        yield _Lines(steps)
    else:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[text]}"), console=console) as progress:
            yield _Bar(progress, steps, done)


class _Silent:
    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""


class _Lines:
    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._every = max(1, steps // 20)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Some 20 lines in all, and every validation and skipped update."""
        notable = any(name.startswith("validation/") for name in metrics) or metrics.get("update_skipped", 0) > 0
        if notable or step % self._every == 0 or step in (1, self._steps):
            print(f"step {step}/{self._steps}  {describe(metrics)}", flush=True)


class _Bar:
    def __init__(self, progress: Progress, steps: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task("training", total=steps, completed=done, text="")

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=step, text=describe(metrics))


def describe(metrics: Mapping[str, float], plugin_metrics: int = 3) -> str:
    """The metrics that fit into a line: reward or accuracy, loss, validation, and a few of the plugins'."""
    own = [name for name in HEADLINES if name in metrics]
    others = [name for name in metrics if name.startswith("rlplugins/")][:plugin_metrics]
    parts = [f"{name.removeprefix('rlplugins/')} {metrics[name]:.4g}" for name in [*own, *others]]
    if metrics.get("update_skipped"):
        parts.append("update skipped: no response counts")
    return "  ".join(parts)
