"""Plugins of the parity tests, found by name like a method of the core: in this process and in that of a second rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.defaults import EXTRAS
from rlplugins.rollouts import Rollouts
from rlplugins.services import Gradients


@dataclass(frozen=True)
class Call:
    """One forward: the class of the model, whether it is for a backward, and how many prompts and rows are in it."""

    model: str
    backward: bool
    prompts: int
    rows: int


CALLS: list[Call] = []
FOUND: list[Gradients] = []
"""What `asking` was told."""


class PlainForward(Plugin):
    """Gives what the trainer's own forward gives."""

    name = "plain-forward"
    needs = (needs.together("prompt").optional(),)

    @hookimpl
    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, Tensor | None]:
        tokens = batch.mask.shape[1]
        prompts = {tuple(row) for row in batch.input_ids[:, :-tokens].tolist()}
        CALLS.append(Call(type(model).__name__, torch.is_grad_enabled(), len(prompts), len(batch.mask)))
        given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        output = model(input_ids=batch.input_ids, use_cache=False, **given)
        log_probs = torch.log_softmax(output.logits[:, -tokens - 1 : -1].float() / temperature, -1)
        chosen = log_probs.gather(-1, batch.responses[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1) if batch.entropy else None
        return torch.where(batch.mask, chosen, 0.0), None if entropy is None else torch.where(batch.mask, entropy, 0.0)


class Asking(Plugin):
    """Asks in every credit phase for the gradients of three advantages, of which one is per token."""

    name = "asking"
    needs = (needs.GRADIENTS,)

    pattern: str | None = None
    """Over which parameters the products are."""
    rows: int | None = None
    """How many of the rows; None: all."""

    @hookimpl
    def combine_rewards(self, scores: Tensor, rollouts: Rollouts, engine: Any) -> Tensor:
        source = torch.Generator().manual_seed(0)
        part = rollouts if self.rows is None else rollouts.select(torch.arange(self.rows))
        advantages = [torch.randn(len(part), width, generator=source) for width in (1, 1, part.mask.shape[1])]
        FOUND.append(engine.gradient_products(part, advantages, parameters=self.pattern))
        return scores


class Taught(Plugin):
    """Rows of a kind of their own have a loss of their own."""

    name = "taught"
    kinds = frozenset({"expert"})
    needs = (needs.ENGINE,)

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs: Tensor) -> Tensor:
        return -0.5 * log_probs


EXTRAS.update({plugin.name: plugin for plugin in (PlainForward, Asking, Taught)})
