"""Small pairs and shortcuts for testing a preference method without a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplugins.pairs import SIDES, Pairs
from rlplugins.rollouts import Column, Columns
from rlplugins.stack import Stack


def make_pairs(
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    *,
    columns: Mapping[str, Column] | None = None,
    **fields: Any,
) -> Pairs:
    """Pairs whose responses have so many tokens; pair i belongs to prompt i.

    Args:
        chosen_lengths: tokens of each preferred response.
        rejected_lengths: tokens of each other response.
        columns: data columns.
        **fields: further fields of `Pairs`.
    """
    width = max(1, *chosen_lengths, *rejected_lengths)
    place = torch.arange(width)
    made: dict[str, Any] = {}
    for side, lengths in zip(SIDES, (chosen_lengths, rejected_lengths), strict=True):
        mask = place < torch.tensor(lengths)[:, None]
        made |= {f"{side}_mask": mask, side: (torch.arange(mask.numel()).view(mask.shape) % 7 + 2) * mask}
    count = len(chosen_lengths)
    prompts = [[1 + row] for row in range(count)]
    return Pairs(prompt_keys=torch.arange(count), prompts=prompts, columns=Columns(columns), **(made | fields))


def pair_loss_and_gradient(
    stack: Stack,
    pairs: Pairs,
    log_probs: Mapping[str, Tensor],
    ref_log_probs: Mapping[str, Tensor] | None = None,
    *,
    micro_batches: int = 1,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one mini-batch of all pairs, and its gradient by the log-probs (n, T) of each side.

    Args:
        stack: a stack whose step is open.
        pairs: what `build_preferences` gets; it must not change which pairs there are.
        log_probs: (n, T) of the sides `chosen` and `rejected`.
        ref_log_probs: of the reference, likewise; None: there is none.
        micro_batches: into how many the pairs are cut.
    """
    columns = stack.pair_columns(stack.build_preferences(pairs))
    columns |= {f"{side}_ref_log_probs": values for side, values in (ref_log_probs or {}).items()}
    mini = stack.pair_mini_batch(columns)
    leaves = {side: log_probs[side].detach().clone().requires_grad_() for side in SIDES}
    total = torch.zeros((), dtype=log_probs["chosen"].dtype)
    for rows in torch.arange(len(pairs)).chunk(micro_batches):
        part = mini.loss(leaves["chosen"][rows], leaves["rejected"][rows], rows)
        if part.total.requires_grad:
            part.total.backward()
        total = total + part.total.detach()
    gradients = {side: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for side, leaf in leaves.items()}
    return total, gradients
