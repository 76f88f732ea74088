"""The prompt file and the reward function."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import DataError
from rlplugins.pairs import SIDES, Pairs
from rlplugins.rollouts import Column, Columns, Prompts, Rollouts, as_column, prompt_key
from rlplugins.table import PromptTable

RECORD = "_record"
"""Column of the prompts: the line's fields as they stand in the file, for the reward function."""

TAKEN = frozenset(field.name for field in fields(Rollouts)) | {RECORD}
"""Names that a field of the prompt file cannot have."""


class PromptFile:
    """The prompts of a JSONL file.

    Args:
        path: the file.

    Attributes:
        texts: a string or a list of chat messages each.
        columns: every other field, one entry per prompt; None where a line lacks it.

    Raises:
        DataError: naming file and line, if it is missing, empty, no JSON or has no prompts.
    """

    taken = TAKEN

    def __init__(self, path: Path) -> None:
        self.path = path
        records = list(self._records())
        if not records:
            raise DataError(f"the prompt file {path} has no lines")
        self.texts = [record.pop("prompt") for _, record in records]
        names = dict.fromkeys(name for _, record in records for name in record)
        if reserved := sorted(self.taken & set(names)):
            raise DataError(f"{path}: rename the field {reserved[0]!r}, which is a column of rlplugins' own")
        self.columns = {name: [record.get(name) for _, record in records] for name in names}
        self._fields = [record for _, record in records]
        self._check_ids([line for line, _ in records])

    def __len__(self) -> int:
        return len(self.texts)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        try:
            with self.path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield number, self._record(number, line)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the prompt file {self.path} cannot be read: {error}") from None

    def _record(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.path}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or "prompt" not in record:
            raise DataError(f"{self.path}, line {number} is not an object with a `prompt`")
        if not _is_prompt(record["prompt"]):
            raise DataError(
                f"{self.path}, line {number}: `prompt` must be a text or a list of chat messages with `role` and "
                "`content`, and not empty"
            )
        return record

    def _check_ids(self, lines: Sequence[int]) -> None:
        """An id names one prompt."""
        seen: dict[str, int] = {}
        for place, identity in enumerate(self.columns.get("id", [])):
            first = seen.setdefault(str(identity), place) if identity is not None else place
            if self.texts[first] != self.texts[place]:
                raise DataError(
                    f"{self.path}: lines {lines[first]} and {lines[place]} have the id {identity!r}, but other prompts"
                )

    def keys(self) -> Tensor:
        """(P,) int64 prompt keys: of the id, else of the prompt."""
        ids = self.columns.get("id", [None] * len(self))
        names = [
            str(identity) if identity is not None else json.dumps(text)
            for identity, text in zip(ids, self.texts, strict=True)
        ]
        return torch.tensor([prompt_key(name) for name in names], dtype=torch.int64)

    def prompts(self, table: PromptTable | None = None) -> Prompts:
        """The prompts as hooks see them; without a table they are outside of the pool."""
        keys = self.keys()
        rows = torch.full_like(keys, -1) if table is None else table.resolve(keys)
        columns: dict[str, Column] = {name: as_column(values) for name, values in self.columns.items()}
        columns[RECORD] = self._fields
        return Prompts(keys, rows, PromptTable() if table is None else table, self.texts, Columns(columns))


class PairFile(PromptFile):
    """The pairs of a JSONL file with `prompt`, `chosen` and `rejected` per line.

    Args:
        path: the file.

    Attributes:
        chosen: the preferred response of each line: a text or, after a prompt of chat messages, messages too.
        rejected: the other one.
        columns: every further field, one entry per pair; None where a line lacks it.

    Raises:
        DataError: naming file and line, as for prompts, and if a response is missing or empty.
    """

    taken = (TAKEN | {field.name for field in fields(Pairs)}) - {"chosen", "rejected"}

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.chosen = self.columns.pop("chosen")
        self.rejected = self.columns.pop("rejected")

    def _record(self, number: int, line: str) -> dict[str, Any]:
        record = super()._record(number, line)
        for side in SIDES:
            if side not in record:
                raise DataError(f"{self.path}, line {number} has no `{side}`: a pair has prompt, chosen and rejected")
            if not _is_prompt(record[side]) or isinstance(record[side], list) > isinstance(record["prompt"], list):
                raise DataError(
                    f"{self.path}, line {number}: `{side}` must be a text or, after a prompt of chat messages, a list of "
                    "them, and not empty"
                )
        return record


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in prompt)
    return isinstance(prompt, str) and bool(prompt)


class Scorer:
    """The user's reward function.

    It is called once per response, `score(prompt, response, **columns)`, with the prompt as it stands in the file and as
    many of its other fields as it takes; or, if its first parameters are called `prompts` and `responses`, once per
    batch, `score(prompts, responses, columns)`, with lists and a mapping of lists. It gives a number, None, or a mapping
    with `score` and named components.

    Args:
        name: `module:function` or `file.py:function`.
        columns: fields of the prompt file.

    Attributes:
        component_names: in the order of the first mapping that the function gave.

    Raises:
        DataError: if there is no such function, or it takes what the prompt file does not have.
    """

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        self.name = name
        self.component_names: tuple[str, ...] = ()
        self._function = load_function(name)
        parameters = list(inspect.signature(self._function).parameters.values())
        self._batched = [item.name for item in parameters[:2]] == ["prompts", "responses"]
        self._columns = list(columns) if self._batched else self._taken(parameters[2:], columns)

    def _taken(self, parameters: Sequence[inspect.Parameter], columns: Sequence[str]) -> list[str]:
        if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
            return list(columns)
        named = [item for item in parameters if item.kind is not inspect.Parameter.VAR_POSITIONAL]
        missing = [item.name for item in named if item.default is item.empty and item.name not in columns]
        if missing:
            raise DataError(
                f"the reward function {self.name} takes {', '.join(missing)}, which the prompt file does not have; "
                f"its fields: {', '.join(columns) or 'none besides prompt'}"
            )
        return [item.name for item in named if item.name in columns]

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (B, 1), NaN where there is none, and components (B, K) if the function gives any."""
        given = {name: [record.get(name) for record in records] for name in self._columns}
        results = (self._batch if self._batched else self._each)(prompts, responses, given)
        scores, parts = [], []
        for prompt, result in zip(prompts, results, strict=True):
            scores.append(self._number(result.get("score") if isinstance(result, Mapping) else result, prompt, "score"))
            if isinstance(result, Mapping):
                parts.append(self._components(result, prompt))
            elif self.component_names:
                parts.append([math.nan] * len(self.component_names))
        components = torch.tensor(parts, dtype=torch.float32) if self.component_names else None
        return torch.tensor(scores, dtype=torch.float32)[:, None], components

    def _each(
        self, prompts: Sequence[Any], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[Any]:
        results = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                results.append(self._function(prompt, response, **{name: columns[name][row] for name in columns}))
            except Exception as error:
                raise DataError(self._failed(error, prompt, response)) from error
        return results

    def _batch(
        self, prompts: Sequence[Any], responses: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[Any]:
        try:
            results = list(self._function(list(prompts), list(responses), dict(columns)))
        except Exception as error:
            raise DataError(self._failed(error, prompts[0], responses[0]) + " (first of the batch)") from error
        if len(results) != len(responses):
            raise DataError(
                f"the reward function {self.name} gave {len(results)} scores for {len(responses)} responses"
            )
        return results

    def _failed(self, error: Exception, prompt: Any, response: str) -> str:
        return (
            f"the reward function {self.name} failed with {type(error).__name__}: {error}\n"
            f"    prompt: {_short(prompt)}\n    response: {_short(response)}"
        )

    def _number(self, value: Any, prompt: Any, what: str) -> float:
        if value is None:
            return math.nan
        try:
            if isinstance(value, str):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"the reward function {self.name} gave {_short(value)} ({type(value).__name__}) as {what}, which is not a "
                f"number, for the prompt {_short(prompt)}"
            ) from None
        return number if math.isfinite(number) else math.nan

    def _components(self, result: Mapping[str, Any], prompt: Any) -> list[float]:
        names = tuple(name for name in result if name != "score")
        if "score" not in result:
            raise DataError(f"the reward function {self.name} gave a mapping without `score`: {_short(dict(result))}")
        self.component_names = self.component_names or names
        if unknown := sorted(set(names) - set(self.component_names)):
            raise DataError(
                f"the reward function {self.name} gave the component {unknown[0]!r} for the prompt {_short(prompt)}; "
                f"its first result had: {', '.join(self.component_names)}"
            )
        return [self._number(result.get(name), prompt, name) for name in self.component_names]


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names.

    Raises:
        DataError: if there is none.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise DataError(f"reward: {name!r} is neither module:function nor file.py:function")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"reward: {place} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(f"reward: {place} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


def _load_module(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"reward: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
