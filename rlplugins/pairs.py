"""Pairs: what preference training sees of its data before the update."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.rollouts import Column, Columns, ReadGuard, take

SIDES = ("chosen", "rejected")


@dataclass
class Pairs:
    """N pairs of responses to the same prompt, the first of which is preferred; T tokens each, right-padded.

    Attributes:
        prompt_keys: (N,) int64, stable across steps and epochs (`rlplugins.rollouts.prompt_key`).
        prompts: N lists of token ids.
        chosen: (N, T) int64, token ids of the preferred responses.
        chosen_mask: (N, T) bool, their tokens; none at all is an empty response.
        rejected: (N, T) int64, token ids of the other responses.
        rejected_mask: (N, T) bool, their tokens.
        weights: (N, 1) float, how often each pair counts; None: once.
        chosen_token_weights: (N, T) float, how often each token of the preferred responses counts; None: once.
        rejected_token_weights: (N, T) float, of the other responses.
        columns: data columns, (N,) or lists, and what plugins wrote.
    """

    prompt_keys: Tensor
    prompts: list[list[int]]
    chosen: Tensor
    chosen_mask: Tensor
    rejected: Tensor
    rejected_mask: Tensor
    weights: Tensor | None = None
    chosen_token_weights: Tensor | None = None
    rejected_token_weights: Tensor | None = None
    columns: Columns = field(default_factory=Columns)
    guard: ReadGuard | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.prompt_keys)

    def __getitem__(self, name: str) -> Column:
        """The column `name`; raises if this plugin did not declare that it reads it.

        What a plugin wrote in this step needs no declaration.
        """
        if self.guard is not None and name not in self.columns.written:
            self.guard.check(name)
        if name not in self.columns:
            there = ", ".join(self.columns) or "none"
            raise ConfigurationError(f"these pairs have no column {name!r}; they have: {there}")
        return self.columns[name]

    def __setitem__(self, name: str, column: Column) -> None:
        """Add a column, which travels with its pairs to every later hook, the update's included."""
        if len(column) != len(self):
            raise ConfigurationError(f"column {name!r} has {len(column)} rows, there are {len(self)} pairs")
        self.columns[name] = column

    def get(self, name: str, default: Any = None) -> Any:
        """The column `name` (see `[]`), or `default` if these pairs do not have it."""
        return self[name] if name in self.columns else default

    def select(self, index: Tensor) -> Pairs:
        """The pairs `index` (int64 or bool), in that order."""
        changed: dict[str, Any] = {"columns": self.columns.take(index)}
        for name in _ROW_FIELDS:
            column = getattr(self, name)
            if column is not None:
                changed[name] = take(column, index)
        return replace(self, **changed)

    def swapped(self, rows: Tensor) -> Pairs:
        """The pairs with the two sides of `rows` (N,) bool exchanged."""
        changed: dict[str, Any] = {}
        for name in ("{}", "{}_mask", "{}_token_weights"):
            chosen, rejected = (getattr(self, name.format(side)) for side in SIDES)
            if chosen is not None:
                changed[name.format("chosen")] = torch.where(rows[:, None], rejected, chosen)
                changed[name.format("rejected")] = torch.where(rows[:, None], chosen, rejected)
        return replace(self, **changed)

    def guarded(self, guard: ReadGuard | None) -> Pairs:
        """The same pairs for one plugin: shares every tensor, checks what is read; None: for the trainer."""
        return replace(self, guard=guard)


_ROW_FIELDS = tuple(item.name for item in fields(Pairs) if item.name not in {"columns", "guard"})
