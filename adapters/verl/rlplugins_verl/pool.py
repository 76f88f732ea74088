"""verl's data set as the pool of prompts, and where each of its rows stands in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlplugins.rollouts import Columns, Prompts, as_column, prompt_key
from rlplugins.table import PromptTable
from rlplugins_verl.columns import OF_VERL, as_list, flattened

POSITION = "_verl_position"
"""Column of the pool: position of the prompt in verl's data set."""


@dataclass(frozen=True)
class Pool:
    """The prompts of a run.

    Attributes:
        prompts: in the order of verl's data set.
        order: (P,) positions by ascending key.
    """

    prompts: Prompts
    order: Tensor

    @classmethod
    def of(cls, dataset: Any, table: PromptTable) -> Pool:
        """The pool of verl's own data set, or of another one whose rows have `raw_prompt`."""
        names, texts, columns = _read(dataset)
        keys = keys_of(names, texts)
        kept: dict[str, Any] = {name: as_column(values) for name, values in columns.items()}
        kept[POSITION] = torch.arange(len(keys))
        return cls(Prompts(keys, table.resolve(keys), table, texts, Columns(kept)), torch.argsort(keys, stable=True))

    def positions(self, batch: Any) -> list[int]:
        """Position in the pool of each row of verl's prompt batch; -1 for a prompt that is not in it."""
        texts = as_list(batch["raw_prompt"])
        ids = as_list(batch["id"]) if "id" in batch else [None] * len(texts)
        keys = keys_of(ids, texts)
        ordered = self.prompts.keys[self.order]
        place = torch.searchsorted(ordered, keys).clamp(max=len(ordered) - 1)
        return torch.where(ordered[place] == keys, self.order[place], -1).tolist()  # type: ignore[no-any-return]


def keys_of(ids: Sequence[Any], texts: Sequence[Any]) -> Tensor:
    """(P,) int64, of the user's id, else of the prompt before any rewriting."""
    names = [str(name) if name is not None else json.dumps(text) for name, text in zip(ids, texts, strict=True)]
    return torch.tensor([prompt_key(name) for name in names], dtype=torch.int64)


def _read(dataset: Any) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
    """Ids, prompts and data columns; from the table behind verl's own data set where there is one."""
    table = getattr(dataset, "dataframe", None)
    key = getattr(dataset, "prompt_key", "prompt")
    if table is not None and key in table.column_names:
        rows: list[Mapping[str, Any]] = table.to_list()
        texts = [_plain(row[key]) for row in rows]
    else:
        rows = [dataset[place] for place in range(len(dataset))]
        key, texts = "raw_prompt", [_plain(row["raw_prompt"]) for row in rows]
    own = (OF_VERL - {"index"}) | {key}
    records = [flattened({name: value for name, value in row.items() if name not in own}) for row in rows]
    names = dict.fromkeys(name for record in records for name in record)
    return [row.get("id") for row in rows], texts, {name: [item.get(name) for item in records] for name in names}


def _plain(text: Any) -> Any:
    """Messages as a list of dicts, whatever array they came in."""
    return list(text) if isinstance(text, list | tuple | np.ndarray) else text
