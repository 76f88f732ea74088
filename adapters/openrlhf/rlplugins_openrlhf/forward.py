"""The hook `forward` in the place of OpenRLHF's own pass: of the update, and of the old and the reference log-probs."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlplugins.packed import Packed
from rlplugins.stack import Stack
from rlplugins_openrlhf.columns import to_responses, to_sequences


def packed(sequences: Tensor, action_mask: Tensor, attention_mask: Tensor, entropy: bool) -> tuple[Packed, Tensor]:
    """The rectangle, and (b,) int64 tokens of each row's prompt; a row without a wanted token keeps its first alone.

    Args:
        sequences: (b, S) int64, prompts and responses, right-padded.
        action_mask: (b, S - 1), 1 where the next token's log-prob is wanted.
        attention_mask: (b, S), 0 on padding.
        entropy: whether the entropies are wanted too.
    """
    wanted = action_mask.bool().any(1)
    starts = torch.where(wanted, action_mask.bool().int().argmax(1) + 1, 1)
    lengths = torch.where(wanted, attention_mask.long().sum(1), 1)
    left, right = int(starts.max()), max(1, int((lengths - starts).max()))
    place = torch.arange(left + right, device=sequences.device) - (left - starts)[:, None]
    there = (place >= 0) & (place < lengths[:, None])
    ids = torch.where(there, sequences.gather(1, place.clamp(0, sequences.shape[1] - 1)), 0)
    mask = to_responses(action_mask, starts, right).bool()
    return Packed(ids, there.long(), place.clamp(min=0), ids[:, left:], mask, entropy), starts


def bind(stack: Stack, actor: Any) -> None:
    """Let an `Actor` of OpenRLHF give what the stack's `forward` computes."""
    actor.forward = functools.partial(forward, stack, actor)


def forward(
    stack: Stack, actor: Any, sequences: Tensor, action_mask: Tensor, attention_mask: Tensor,
    return_output: bool = False, return_entropy: bool = False, **unused: Any,
) -> Any:  # fmt: skip
    """What `Actor.forward` gives: log-probs (b, A), and with `return_output` an object that has the entropies (b, A).

    Args:
        stack: the plugins.
        actor: whose `model` is called: DeepSpeed's engine, through which its own hooks run.
        sequences: see `packed`.
        action_mask: the same.
        attention_mask: the same.
        return_output: whether more than the log-probs is wanted.
        return_entropy: whether the entropies are.
        unused: further words of OpenRLHF's, about what the flags exclude.
    """
    batch, starts = packed(sequences, action_mask, attention_mask, return_entropy)
    log_probs, entropy = stack.forward(actor.model, batch, actor.temperature)
    width = action_mask.shape[1]
    found = to_sequences(log_probs.float(), starts, width) * action_mask
    if not return_output:
        return found
    return found, SimpleNamespace(entropy=None if entropy is None else to_sequences(entropy.float(), starts, width))
