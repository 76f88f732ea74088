"""What the hook `forward` computes on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Rows of a micro-batch as one rectangle, on the model's device.

    Attributes:
        input_ids: (b, P + T) int64, left-padded prompts followed by right-padded responses.
        attention_mask: (b, P + T) int64, 0 on the padding of the prompts; None if there is none.
        position_ids: (b, P + T) int64; None where they are 0, 1, 2, ...
        responses: (b, T) int64.
        mask: (b, T) bool, tokens whose log-probs are wanted; 0 elsewhere.
        entropy: whether the entropies are wanted too.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    responses: Tensor
    mask: Tensor
    entropy: bool = False
