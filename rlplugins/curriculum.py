"""What one wants to know of a curriculum: which prompts and categories were trained on, and where the budget went.

All are metrics of the step, so every trainer logs them and every report plots them:

    prompts/seen             share of the pool that was trained on so far
    prompts/repeated         share of the step's prompts that had been trained on before
    prompts/effective        effective number of prompts of the weights, 1 / sum p^2, as a share of the pool
    group_size               responses per prompt, their mean; `/min` and `/max`
    reward/missing           share of the responses without a finite score
    groups/zero_std          share of the responses in groups whose scores are all equal
    category/<c>/share       share of the responses; `/reward` their mean score; `/weight` share of the prompt weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.rollouts import POLICY, Prompts, Rollouts
from rlplugins.steps import Metrics
from rlplugins.table import PromptTable

COLUMN = "category"
MOST = 32
"""More categories than this are not told apart: they would be as many curves."""


class Categories:
    """The category of every prompt of the pool, as a number; made once, when weights are first given."""

    def __init__(self, pool: Prompts) -> None:
        self.names, self.codes = _coded(pool.columns.get(COLUMN))


def log_weights(metrics: Metrics, weights: Tensor, categories: Categories) -> None:
    """How the weights (P,) of the pool lie."""
    shares = weights.double() / weights.double().sum()
    metrics.log("prompts/effective", 1 / (shares.square().sum() * len(shares)))
    if categories.codes is not None:
        sums = shares.new_zeros(len(categories.names)).index_add_(0, categories.codes.to(shares.device), shares)
        for name, share in zip(categories.names, sums.tolist(), strict=True):
            metrics.log(f"category/{name}/weight", share)


def log_rollouts(metrics: Metrics, rollouts: Rollouts, table: PromptTable, pool: int) -> None:
    """Which prompts the step's rows belong to, before their visits are counted."""
    drawn = rollouts.of_kind(POLICY)
    rows = rollouts.prompt_rows[drawn].cpu()
    rows = rows[rows >= 0].unique()
    if not len(rows):
        return
    new = int((table["visits"][rows] == 0).sum())
    metrics.log("prompts/seen", (table.seen + new) / max(pool, 1))
    metrics.log("prompts/repeated", 1 - new / len(rows))
    scores, groups = rollouts.scores[drawn], rollouts.groups[drawn]
    metrics.log("reward/missing", 1 - scores.isfinite().float().mean())
    if bool((groups >= 0).any()):
        sizes = ops.group_sizes(groups)
        equal = ops.group_extreme(scores, groups) == ops.group_extreme(scores, groups, largest=False)
        metrics.log("group_size", sizes[groups >= 0].double().reciprocal().mean().reciprocal())
        metrics.log("group_size/min", sizes[groups >= 0].min())
        metrics.log("group_size/max", sizes.max())
        metrics.log("groups/zero_std", equal[groups >= 0].float().mean())
    names, codes = _coded(rollouts.columns.get(COLUMN))
    if codes is not None:
        _log_categories(metrics, names, codes.to(scores.device)[drawn], scores)


def _log_categories(metrics: Metrics, names: Sequence[str], codes: Tensor, scores: Tensor) -> None:
    count = torch.bincount(codes, minlength=len(names))
    known = scores[:, 0].isfinite()
    scored = torch.bincount(codes[known], minlength=len(names))
    sums = torch.bincount(codes[known], scores[known, 0].double(), len(names))
    for place, name in enumerate(names):
        metrics.log(f"category/{name}/share", count[place] / len(codes))
        if scored[place]:
            metrics.log(f"category/{name}/reward", sums[place] / scored[place])


def _coded(column: Any) -> tuple[Sequence[str], Tensor | None]:
    """The names of a column's categories and the number of each row's; None without a column, or with too many."""
    if column is None or not len(column):
        return (), None
    values = column.cpu().numpy() if isinstance(column, Tensor) else np.asarray([str(value) for value in column])
    if values.ndim != 1:
        return (), None
    names, codes = np.unique(values, return_inverse=True)
    if len(names) > MOST:
        return (), None
    return [str(name) for name in names.tolist()], torch.from_numpy(codes)
