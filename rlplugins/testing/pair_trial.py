"""The same short run for a method that trains on pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlplugins.pairs import SIDES, Pairs
from rlplugins.rollouts import Column, Columns, take
from rlplugins.testing.trial import (
    PLACE,
    TOKENS,
    VOCABULARY,
    Outcome,
    Trial,
    made_up,
    padding_of,
    summed,
    wider,
)  # fmt: skip
from rlplugins.update import Reducer

PAIRS = 9


class PairTrial(Trial):
    """A trial whose rows are pairs: `build_preferences`, and what acts on the update of pairs."""

    def rows(self, seen: Outcome | None = None) -> Any:
        """The pairs of the step as the trainer read them."""
        row = (torch.arange(PAIRS) + 5 * self.number) % len(self.pool)
        sides: dict[str, Any] = {}
        for salt, side in enumerate(SIDES):
            mask = torch.arange(TOKENS) < made_up(row, salt, 40).mul(TOKENS + 1).long()[:, None]
            tokens = 2 + made_up(row[:, None], torch.arange(TOKENS), salt, 41).mul(VOCABULARY - 2).long()
            sides |= {side: (tokens * mask).to(self.device), f"{side}_mask": mask.to(self.device)}
        prompts = [[1 + place] for place in row.tolist()]
        pairs: Any = Pairs(prompt_keys=self.pool.keys[row].to(self.device), prompts=prompts, **sides)
        pairs = self.subject.rows(pairs) if self.subject.rows else pairs
        columns = {
            name: column.to(self.device) if isinstance(column, Tensor) else column
            for name, column in {**pairs.columns, PLACE: torch.arange(PAIRS)}.items()
        }
        return replace(pairs, columns=Columns(columns, frozenset(pairs.columns.written)))

    def outcome(
        self, pairs: Any, edit: Callable[[Any], Any] | None = None, parts: int = 1, ranks: int = 1
    ) -> Outcome:  # fmt: skip
        """What becomes of the pairs, in the order of their places; `edit` changes the columns of the update."""
        found: Outcome = {}
        if len(pairs):
            built = self.stack.build_preferences(pairs)
            columns = self.stack.pair_columns(built)
            columns |= {f"{side}_ref_log_probs": self.of_side(built, side, 50) for side in SIDES}
            columns = edit(columns) if edit else columns
            found = {"kept": built.columns[PLACE], "weights": built.weights}
            found |= {name: value for name, value in columns.items() if name.endswith("token_weights")}
            found |= self.update_of(built, columns, parts, ranks)
            order = torch.argsort(found["kept"])
            found = {
                name: value[order] if isinstance(value, Tensor) and value.dim() else value
                for name, value in found.items() if value is not None
            }  # fmt: skip
        self.stack.validated({"loss": 0.5, "accuracy": 0.8}, self)
        return found | self.remembered()

    def of_side(self, pairs: Pairs, side: str, salt: int) -> Tensor:
        """Log-probs (n, T) of the responses of one side."""
        prompt = pairs.prompt_keys[:, None] % 1000
        places = torch.arange(pairs.chosen.shape[1], device=self.device)
        values = -0.05 - 2 * made_up(getattr(pairs, side), prompt, places, salt)
        return (values * getattr(pairs, f"{side}_mask")).bfloat16().to(self.dtype)

    def update_of(self, pairs: Pairs, columns: dict[str, Column], parts: int, ranks: int) -> Outcome:
        """Loss of the step as one mini-batch, and its gradients by the log-probs of each side."""
        leaves = {side: self.of_side(pairs, side, 51).requires_grad_() for side in SIDES}
        if self.stack.needs_mini_batch_log_probs:
            columns = columns | {f"{side}_log_probs": leaf.detach() for side, leaf in leaves.items()}
        stacks = [self.stack if ranks == 1 else self.subject.stack() for _ in range(ranks)]

        def opened(rank: int, rows: Tensor, reduce: Reducer | None) -> Callable[[Tensor], Tensor]:
            mine = {name: take(column, rows) for name, column in columns.items()}
            mini = stacks[rank].pair_mini_batch(mine, self.shared(), reduce=reduce, metrics=self.metrics(ranks))
            return lambda part: mini.loss(leaves["chosen"][rows[part]], leaves["rejected"][rows[part]], part).total

        total = summed(torch.arange(len(pairs), device=self.device), parts, ranks, opened)
        empty = {side: torch.zeros_like(leaf) for side, leaf in leaves.items()}
        gradients = {
            f"{side}_gradient": leaf.grad if leaf.grad is not None else empty[side] for side, leaf in leaves.items()
        }
        return {"loss": total, **gradients}

    def padded(self, pairs: Any, more: int = 3) -> Any:
        """The pairs with more columns of padding."""
        names = [name for side in SIDES for name in (side, f"{side}_mask", f"{side}_token_weights")]
        return replace(pairs, **{name: wider(getattr(pairs, name), more) for name in names})

    def with_rubbish(self, columns: Any) -> Any:
        """Columns with numbers in the padding that nobody may read."""
        changed = {}
        for side in SIDES:
            name = f"{side}_ref_log_probs"
            changed[name] = torch.where(padding_of(columns[f"{side}_mask"]), 3.0, columns[name])
        return columns | changed

    def smallest(self, pairs: Any) -> dict[str, Any]:
        """The least that there can be, by name."""
        names = [name for side in SIDES for name in (side, f"{side}_mask")]
        empty = {f"{side}_mask": torch.zeros_like(getattr(pairs, f"{side}_mask")) for side in SIDES}
        return {
            "one pair": pairs.select(torch.tensor([0])),
            "responses of one token": replace(pairs, **{name: getattr(pairs, name)[:, :1] for name in names}),
            "empty responses": replace(pairs, **empty),
        }
