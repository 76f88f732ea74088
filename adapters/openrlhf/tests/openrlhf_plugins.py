"""Plugins of the parity tests, found by name like a method of the core: in this process and in that of a second rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.defaults import EXTRAS

CALLS: list[tuple[str, bool, int]] = []
"""Of every forward: the class of the model, whether it is for a backward, and the rows."""


class PlainForward(Plugin):
    """Gives what the trainer's own forward gives."""

    name = "plain-forward"
    needs = (needs.together("prompt").optional(),)

    @hookimpl
    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, Tensor | None]:
        CALLS.append((type(model).__name__, torch.is_grad_enabled(), len(batch.mask)))
        torch.rand(1)  # as dropout would
        tokens = batch.mask.shape[1]
        given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        output = model(input_ids=batch.input_ids, use_cache=False, **given)
        log_probs = torch.log_softmax(output.logits[:, -tokens - 1 : -1].float() / temperature, -1)
        chosen = log_probs.gather(-1, batch.responses[..., None])[..., 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1) if batch.entropy else None
        return torch.where(batch.mask, chosen, 0.0), None if entropy is None else torch.where(batch.mask, entropy, 0.0)


class Taught(Plugin):
    """Rows of a kind of their own have a loss of their own."""

    name = "taught"
    kinds = frozenset({"expert"})
    needs = (needs.ENGINE,)

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs: Tensor) -> Tensor:
        return -0.5 * log_probs


EXTRAS.update({plugin.name: plugin for plugin in (PlainForward, Taught)})
