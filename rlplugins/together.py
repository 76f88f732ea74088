"""Rows that a plugin needs in one micro-batch (`needs.together`), for adapters of trainers that cut rows wherever they are."""

from __future__ import annotations

import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.rollouts import Rollouts
from rlplugins.stack import Stack


def units_of(stack: Stack, rollouts: Rollouts, groups: Tensor) -> Tensor:
    """(B,) int64, equal for rows that stay together: those of a prompt or of a group, as the stack needs it."""
    alone = torch.full_like(groups, -1)
    prompts = rollouts.prompt_rows if stack.needs("together", "prompt") else alone
    return ops.joined(prompts, groups if stack.needs("together", "group") else alone)


def packed(units: Tensor, costs: Tensor, limit: int) -> list[list[int]]:
    """The rows of each part: whole units, together at most `limit`, or a unit that exceeds it alone. First fit, large first.

    Args:
        units: (n,) int64, rows of the same number stay together.
        costs: (n,) int64 of each row.
        limit: of the costs of a part.
    """
    numbers = torch.unique(units, return_inverse=True)[1]
    rows = torch.argsort(numbers, stable=True).split(torch.bincount(numbers).tolist())
    sizes = torch.bincount(numbers, weights=costs.double()).long()
    parts: list[list[int]] = []
    room: list[int] = []
    for unit in torch.argsort(sizes, descending=True, stable=True).tolist():
        size = int(sizes[unit])
        place = next((place for place, left in enumerate(room) if left >= size), len(parts))
        if place == len(parts):
            parts.append([])
            room.append(limit)
        parts[place] += rows[unit].tolist()
        room[place] -= size
    return parts
