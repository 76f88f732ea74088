"""Expert answers: from a column of the prompt file, or from a file of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError, DataError, StateError
from rlplugins.rollouts import POLICY, Prompts, Requests, Rollouts, completed, prompt_key
from rlplugins.services import Engine
from rlplugins.table import PromptTable


@dataclass(frozen=True)
class Demonstrations:
    """n expert answers.

    Attributes:
        prompts: one per answer, (n); of the pool, or with row -1 where they are of a file.
        responses: n texts.
    """

    prompts: Prompts
    responses: list[str]

    def __len__(self) -> int:
        return len(self.responses)

    @classmethod
    def from_file(cls, path: Path | str) -> Demonstrations:
        """A JSON Lines file; every line has `prompt` (text or chat messages) and `response` (text), other fields are left.

        Raises:
            DataError: naming the file and the line.
        """
        records = list(_records(Path(path)))
        if not records:
            raise DataError(f"there is no demonstration in the file {path}")
        texts = [prompt for prompt, _ in records]
        keys = torch.tensor([prompt_key(json.dumps(text)) for text in texts])
        prompts = Prompts(keys, torch.full((len(texts),), -1), PromptTable(), texts)
        return cls(prompts, [response for _, response in records])

    @classmethod
    def from_column(cls, prompts: Prompts, column: str) -> Demonstrations:
        """The answers that a column of the prompt file holds; prompts without one (null or empty) are left out.

        Raises:
            ConfigurationError: if there is no such column, or not a text in it.
        """
        if column not in prompts.columns:
            known = ", ".join(name for name in prompts.columns if not name.startswith("_")) or "none"
            raise ConfigurationError(f"the prompts have no field {column!r} with demonstrations; they have: {known}")
        values = prompts.columns[column]
        found = [place for place, text in enumerate(values) if isinstance(text, str) and text]
        wrong = next((entry for entry in values if entry is not None and not isinstance(entry, str)), None)
        if wrong is not None or not found:
            shown = "no text at all" if wrong is None else repr(wrong)
            raise ConfigurationError(f"the field {column!r} must hold the demonstrations as texts, it has {shown}")
        return cls(prompts.select(torch.tensor(found)), [str(values[place]) for place in found])

    def rows(self, index: Tensor, engine: Engine, like: Rollouts, kind: str) -> Rollouts:
        """Rows of the answers at positions `index`, (n,) int64, ready for `concatenate([like, rows])`.

        Their kind is `kind`, their group -1, their score 0: no baseline counts them, and no filter by score sees a missing one.

        Args:
            index: which answers.
            engine: tokenises them.
            like: the step's rollouts, whose columns the rows get too.
            kind: one that the plugin names in its `kinds`.
        """
        requests = Requests.of(self.prompts.select(index), torch.ones_like(index))
        made = engine.given(requests, [self.responses[row] for row in index.tolist()], score=False)
        made = replace(
            made, kinds=(POLICY, kind), kind=torch.ones_like(made.kind), groups=torch.full_like(made.groups, -1),
            scores=torch.zeros_like(made.scores),
        )  # fmt: skip
        return completed(made, like)


class DemonstrationLoader:
    """Gives demonstrations in epochs: every one once, in an order that is new in each.

    For a plugin's state (`rlplugins.plugin.Stateful`): `init_state` makes one, and what is left of the epoch is saved.

    Args:
        demonstrations: n of them.
    """

    def __init__(self, demonstrations: Demonstrations) -> None:
        self.demonstrations = demonstrations
        self._left = torch.zeros(0, dtype=torch.int64)

    def next(self, count: int, source: torch.Generator) -> Tensor:
        """Positions of those that come next, (count,) int64; the order of an epoch that begins is drawn from `source`."""
        while len(self._left) < count:
            epoch = torch.randperm(len(self.demonstrations), generator=source)
            self._left = torch.cat([self._left, epoch])
        index, self._left = self._left[:count], self._left[count:]
        return index

    def state_dict(self) -> dict[str, Any]:
        """What is left of the epoch, and of how many."""
        return {"left": self._left, "size": len(self.demonstrations)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            StateError: if it is of another number of demonstrations.
        """
        if state_dict["size"] != len(self.demonstrations):
            raise StateError(
                f"the run began with {state_dict['size']} demonstrations, now there are {len(self.demonstrations)}: "
                "resume it with the same ones, or start without plugin state"
            )
        self._left = state_dict["left"]


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """Prompt and response of every line.

    Raises:
        DataError: naming the file and the line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _record(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file of demonstrations {path} cannot be read: {error}") from None


def _record(line: str, where: str) -> tuple[Any, str]:
    try:
        record = json.loads(line)
        prompt, response = record["prompt"], record["response"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where} is not a JSON object with `prompt` and `response`: {error!r}") from None
    if not _is_prompt(prompt) or not isinstance(response, str) or not response:
        raise DataError(
            f"{where}: `prompt` must be a text or a list of chat messages with `role` and `content`, `response` a text, and "
            "neither empty"
        )
    return prompt, response


def _is_prompt(prompt: Any) -> bool:
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(item, dict) and {"role", "content"} <= set(item) for item in prompt)
    return isinstance(prompt, str) and bool(prompt)
