"""A study: which stacks are trained with which seeds, read from a YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rlplugins.errors import ConfigurationError
from rlplugins.files import read_yaml

CELL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")

SET_BY_THE_STUDY = {
    "seed": "`seeds`",
    "stack": "the design",
    "plugins": "the design",
    "config": "the study",
    "output": "the study's folder",
    "resume": "the study",
}
"""Options of `rlplugins train` that a study's `train` may not hold, and what sets them."""


class StudyError(ConfigurationError):
    """A study cannot be run as it stands; the text names the file, the field or the folder."""


@dataclass(frozen=True)
class Cell:
    """A stack with its name in the study.

    Attributes:
        name: how tables and folders call it.
        stack: the stack as in a stack file.
        train: training options that only this cell has.
    """

    name: str
    stack: Mapping[str, Any]
    train: Mapping[str, Any] = field(default_factory=dict)


class StackOptions(BaseModel):
    """A stack of `stacks:` together with training options of its own.

    Attributes:
        stack: the stack as in a stack file.
        train: options of `rlplugins train` for this stack alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stack: dict[str, Any]
    train: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _bare_stack(cls, value: Any) -> Any:
        """A mapping with neither `stack` nor `train` is the stack itself."""
        if isinstance(value, Mapping) and not {"stack", "train"} & value.keys():
            return {"stack": value}
        return value

    @field_validator("train")
    @classmethod
    def _free_options(cls, train: dict[str, Any]) -> dict[str, Any]:
        return _without_what_the_study_sets(train)


class Study(BaseModel):
    """What to compare: a design over plugins, or named stacks, each trained once per seed.

    Attributes:
        name: the study's name.
        trainer: the trainer whose adapter makes the runs.
        train: options of `rlplugins train` for every run. Relative paths are those of the folder in which the
            study is started.
        seeds: a number n (seeds 0 to n - 1) or a list.
        design: `stacks` (those named in `stacks`), `one_at_a_time` (the base and the base with each of
            `plugins`), `leave_one_out` (the base, all of `plugins`, and all but each), `factorial` (every
            subset). The base has no plugin.
        stacks: for the design `stacks`, by name: a stack as in a stack file, or `{stack: ..., train: {...}}`.
        plugins: for the other designs, each as in a stack file.
        owners: `owners` lines for every stack to which they apply: a line that names a plugin of the study is
            left out of the stacks without it. What a stack says itself goes first.
        baseline: the cell that the others are compared with; the first one unless named.
        metrics: the metrics to show first; the usual ones if empty.
        cpus: processor cores of one run.
        gpus: GPUs of one run, parts of one allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    trainer: str = "local"
    train: dict[str, Any] = {}
    seeds: list[int] = Field(min_length=1)
    design: Literal["stacks", "one_at_a_time", "leave_one_out", "factorial"] = "stacks"
    stacks: dict[str, StackOptions] = {}
    plugins: list[Any] = []
    owners: dict[str, Any] = {}
    baseline: str = ""
    metrics: list[str] = []
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0.0, ge=0.0)

    @field_validator("seeds", mode="before")
    @classmethod
    def _numbered_seeds(cls, seeds: Any) -> Any:
        return list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else seeds

    @field_validator("seeds")
    @classmethod
    def _different_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        return seeds

    @field_validator("train")
    @classmethod
    def _free_options(cls, train: dict[str, Any]) -> dict[str, Any]:
        return _without_what_the_study_sets(train)

    @field_validator("plugins")
    @classmethod
    def _one_name_each(cls, plugins: list[Any]) -> list[Any]:
        for entry in plugins:
            if not isinstance(entry, str) and not _is_name_with_options(entry):
                raise ValueError(f"{entry!r} is neither a plugin's name nor one name with its options")
        names = [_plugin_name(entry) for entry in plugins]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is named twice; compare its options with `design: stacks`")
        return plugins

    @model_validator(mode="after")
    def _complete(self) -> Self:
        used, unused = ("stacks", "plugins") if self.design == "stacks" else ("plugins", "stacks")
        if getattr(self, unused):
            raise ValueError(f"design `{self.design}` takes its stacks from `{used}`: leave `{unused}` out")
        if not getattr(self, used):
            raise ValueError(f"design `{self.design}` needs `{used}`")
        names = [cell.name for cell in self.cells]
        for name in names:
            if not CELL_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a folder: use letters, digits and . _ + = , -")
        if self.baseline and self.baseline not in names:
            raise ValueError(f"baseline: there is no cell {self.baseline!r}; the cells are {', '.join(names)}")
        return self

    @property
    def cells(self) -> list[Cell]:
        """The cells of the design, in its order, the baseline first among equals."""
        if self.design == "stacks":
            plain = [Cell(name, entry.stack, entry.train) for name, entry in self.stacks.items()]
        else:
            plain = [Cell(name, {"plugins": list(plugins)}) for name, plugins in self._subsets()]
        known = {name for cell in plain for name in _plugin_names(cell.stack)}
        return [Cell(cell.name, _with_owners(cell.stack, self.owners, known), cell.train) for cell in plain]

    @property
    def baseline_name(self) -> str:
        """The cell that the others are compared with."""
        return self.baseline or self.cells[0].name

    def _subsets(self) -> Iterator[tuple[str, Sequence[Any]]]:
        """Name and plugins of each cell of a design over plugins; equal stacks appear once."""
        everything = self.plugins
        if self.design != "leave_one_out":
            largest = 1 if self.design == "one_at_a_time" else len(everything)
            for size in range(largest + 1):
                for subset in combinations(everything, size):
                    yield "+".join(["base", *map(_plugin_name, subset)]), subset
            return
        yield "base", ()
        yield "all", everything
        if len(everything) > 1:
            for left_out in everything:
                yield (
                    f"all-{_plugin_name(left_out)}",
                    [entry for entry in everything if entry is not left_out],
                )


def load_study(path: Path | str) -> Study:
    """Read a study from a YAML file.

    Args:
        path: the file.

    Raises:
        ConfigurationError: if it is not a YAML file.
        StudyError: if a field is wrong; names the file and every such field.
    """
    path = Path(path)
    content = read_yaml(path, "study")
    if not isinstance(content, dict):
        raise StudyError(f"{path} is not a study: it should be a mapping with name, train, seeds and stacks or plugins")
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        problems = [f"{path}: {_describe(problem)}" for problem in error.errors()]
        raise StudyError("\n".join(problems)) from error


def _describe(problem: Mapping[str, Any]) -> str:
    """A pydantic error as `field: what is wrong`."""
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        model = Study if len(problem["loc"]) == 1 else StackOptions
        name, known = str(problem["loc"][-1]), list(model.model_fields)
        near = difflib.get_close_matches(name, known, 1)
        return f"{place}: unknown field; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def _without_what_the_study_sets(train: dict[str, Any]) -> dict[str, Any]:
    for option, setter in SET_BY_THE_STUDY.items():
        if option in train:
            raise ValueError(f"`{option}` is set by {setter}, not here")
    return train


def _is_name_with_options(entry: object) -> bool:
    return isinstance(entry, dict) and len(entry) == 1 and all(isinstance(name, str) for name in entry)


def _plugin_name(entry: str | Mapping[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def _plugin_names(stack: Mapping[str, Any]) -> list[str]:
    """The names of the stack's plugins, as far as they can be read."""
    entries = stack.get("plugins")
    entries = entries if isinstance(entries, list) else []
    return [_plugin_name(entry) for entry in entries if isinstance(entry, str) or _is_name_with_options(entry)]


def _with_owners(stack: Mapping[str, Any], owners: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The stack with the study's `owners`, but for lines that name a `known` plugin that it lacks."""
    own = stack.get("owners") or {}
    if not isinstance(own, Mapping):
        return dict(stack)
    absent = known - set(_plugin_names(stack))
    applicable = {hook: owner for hook, owner in owners.items() if not absent & set(_words(owner))}
    both = {**applicable, **own}
    return {**stack, "owners": both} if both else dict(stack)


def _words(value: Any) -> Iterable[str]:
    """Every string in an owner: a name, the names of a mix, the options of a built-in."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _words(inner)
