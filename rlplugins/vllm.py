"""vLLM's door for `process_logits`; imported in the processes of vLLM only."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

from rlplugins.logits import KEY, Numbers, Part, Rule, numbers_of, parts_of


class StackLogits(LogitsProcessor):
    """The stack's rule on the rows of vLLM's running batch, before the temperature."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rule = Rule(vllm_config.additional_config[KEY])
        self.numbers: dict[int, Numbers] = {}
        self.parts: list[Part] = []

    def is_argmax_invariant(self) -> bool:
        """A rule may change which token is the most likely one."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the requests to their rows."""
        if batch_update is not None:
            process_dict_updates(
                self.numbers, batch_update, lambda params, *_: numbers_of({"extra_args": params.extra_args})
            )
            self.parts = []

    def apply(self, logits: Tensor) -> Tensor:
        """Logits (N, V) as the stack wants them."""
        if not self.parts:
            self.parts = parts_of([self.numbers.get(row, {}) for row in range(len(logits))], logits.device)
        return self.rule(logits, self.parts)
