"""Small rollouts and shortcuts for testing a plugin without a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplugins.plugin import Plugin
from rlplugins.registry import Entry
from rlplugins.rollouts import Column, Columns, Prompts, Rollouts, prompt_key
from rlplugins.services import Engine
from rlplugins.stack import Credit, Stack
from rlplugins.steps import Run
from rlplugins.table import PromptTable
from rlplugins.trainer import Trainer


def make_pool(count: int, columns: Mapping[str, Column] | None = None) -> Prompts:
    """`count` prompts with texts `prompt 0`, `prompt 1`, ... and a prompt table of their own."""
    texts = [f"prompt {place}" for place in range(count)]
    keys = torch.tensor([prompt_key(text) for text in texts], dtype=torch.int64)
    table = PromptTable()
    return Prompts(keys, table.resolve(keys), table, texts, Columns(columns))


def make_rollouts(
    scores: Sequence[float] | Tensor,
    groups: Sequence[int] | Tensor | None = None,
    *,
    lengths: Sequence[int] | None = None,
    tokens: int | None = None,
    pool: Prompts | None = None,
    columns: Mapping[str, Column] | None = None,
    **fields: Any,
) -> Rollouts:
    """Rollouts with these scores (B,); group g belongs to prompt g of the pool.

    Args:
        scores: (B,) raw scores.
        groups: (B,) prompt of each row; one group by default.
        lengths: tokens of each response; all `tokens` by default.
        tokens: T; the longest length by default, or 4.
        pool: prompts; row numbers equal group numbers without one.
        columns: free data columns.
        **fields: further fields of `Rollouts` (`entropy`, `old_log_probs`, `responses`, `mask`, `kind`, ...).
    """
    score = torch.as_tensor(scores, dtype=torch.float32).reshape(-1, 1)
    rows = len(score)
    group = torch.zeros(rows, dtype=torch.int64) if groups is None else torch.as_tensor(groups, dtype=torch.int64)
    if "mask" in fields:
        mask = torch.as_tensor(fields.pop("mask")).bool()
    else:
        width = tokens or (max(lengths, default=1) if lengths is not None else 4)
        size = torch.as_tensor(lengths) if lengths is not None else torch.full((rows,), width)
        mask = torch.arange(width) < size[:, None]
    tensors = {name: torch.as_tensor(value) for name, value in fields.items() if name not in _NAMES}
    names = {name: value for name, value in fields.items() if name in _NAMES}
    prompt = group.clamp(min=0)
    defaults: dict[str, Any] = {
        "prompt_keys": pool.keys[prompt] if pool else prompt,
        "prompt_rows": pool.rows[prompt] if pool else prompt,
        "groups": group,
        "prompts": [[1 + int(place)] for place in prompt],
        "responses": (torch.arange(mask.numel()).view(mask.shape) % 7 + 2) * mask,
        "mask": mask,
        "scores": score,
        "kind": torch.zeros(rows, dtype=torch.int8),
        "old_log_probs": -0.5 * mask.float(),
        "columns": Columns(columns, frozenset(columns.written if isinstance(columns, Columns) else ())),
    }
    return Rollouts(**(defaults | tensors | names))


_NAMES = frozenset({"kinds", "component_names", "prompts"})


def start(
    plugins: Sequence[Entry],
    *,
    pool: Prompts | None = None,
    total_steps: int = 10,
    group_size: int = 4,
    budget: int = 64,
    seed: int = 0,
    trainer: Trainer | str | None = None,
    **lines: Any,
) -> Stack:
    """A stack whose run has started and whose step 0 is open; `lines` are `owners`, `off`, `allow`."""
    stack = Stack(plugins, trainer=trainer, **lines)
    stack.start(Run(total_steps, group_size, budget, pool or make_pool(16), seed))
    stack.begin_step(0, total_steps, seed)
    return stack


def credit(plugins: Sequence[Entry], rollouts: Rollouts, engine: Engine | None = None, **options: Any) -> Credit:
    """What a new stack of these plugins makes of the rollouts in its first step; options as for `start`."""
    return start(plugins, **options).credit(rollouts, engine)


def loss_and_gradient(
    stack: Stack, rollouts: Rollouts, log_probs: Tensor, *, micro_batches: int = 1, entropy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss of one mini-batch of all rows, and its gradient by `log_probs` (B, T), through so many micro-batches."""
    made = stack.credit(rollouts)
    leaf = log_probs.detach().clone().requires_grad_()
    mini = stack.mini_batch(stack.update_columns(rollouts, made), kinds=rollouts.kinds, log_probs=log_probs)
    total = torch.zeros((), dtype=log_probs.dtype)
    for rows in torch.arange(len(rollouts)).chunk(micro_batches):
        part = mini.loss(leaf[rows], rows, entropy=entropy[rows] if entropy is not None else None)
        if part.total.requires_grad:
            part.total.backward()
        total = total + part.total.detach()
    return total, leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)


def stand_in(*, assumes: Iterable[str] = (), breaks: Iterable[str] = ()) -> Plugin:
    """A plugin `other` that says this of itself and does nothing, for tests of what a stack refuses.

    Args:
        assumes: facts (`rlplugins.legality.FACTS`) that it assumes.
        breaks: facts that it breaks.
    """
    facts = {"assumes": frozenset(assumes), "breaks": frozenset(breaks)}
    made: Plugin = type("StandIn", (Plugin,), {"name": "other", **facts})()
    return made
