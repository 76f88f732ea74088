"""`process_logits` inside a rollout engine: the stack's rule, the numbers of each request, and how both get there.

The engine is given the stack's specification with its own options, a request its numbers among the sampling parameters. vLLM
calls the rule by the processor of `rlplugins.vllm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.rollouts import Sampling
from rlplugins.stack import Stack

KEY = "rlplugins"
"""Name of what is ours in an engine's `additional_config`, and in a request's `extra_args`."""
PROCESSOR = "rlplugins.vllm:StackLogits"

Numbers = Mapping[str, Sequence[float] | float]
"""What `sampling_params` set for one request, by name."""


def with_rule(options: Mapping[str, Any], stack: Stack) -> dict[str, Any]:
    """An engine's options, with the stack and its rule beside the user's own."""
    given = {"specification": stack.specification(), "fingerprint": stack.fingerprint}
    return {
        **options,
        "additional_config": {**(options.get("additional_config") or {}), KEY: given},
        "logits_processors": [*(options.get("logits_processors") or []), PROCESSOR],
    }


def request_args(sampling: Sampling, row: int) -> dict[str, Any]:
    """One request's numbers, as its `extra_args`; nothing where it has none."""
    if not sampling.numbers:
        return {}
    return {"extra_args": {KEY: {name: column[row].tolist() for name, column in sampling.numbers.items()}}}


class Rule:
    """The stack's `process_logits` in the process of an engine.

    Args:
        given: what `with_rule` wrote.

    Raises:
        ConfigurationError: if this process would build another stack.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.stack = Stack.from_specification(given["specification"])
        if self.stack.fingerprint != given["fingerprint"]:
            raise ConfigurationError(
                f"the rollout engine builds the stack {self.stack.fingerprint}, the run's is {given['fingerprint']}: install "
                "the same distributions of rlplugins and of the stack's plugins on every node"
            )

    def __call__(self, logits: Tensor, parts: Sequence[Part]) -> Tensor:
        """Next-token logits (N, V) of N requests from the model's, given the numbers of each."""
        if len(parts) == 1:
            return self.stack.process_logits(logits, parts[0].numbers)
        result = logits.clone()
        for part in parts:
            result[part.rows] = self.stack.process_logits(logits[part.rows], part.numbers)
        return result


@dataclass(frozen=True)
class Part:
    """Requests whose numbers have the same names.

    Attributes:
        rows: (n,) int64, of the running batch.
        numbers: per name (n,) or (n, k); empty for requests without.
    """

    rows: Tensor
    numbers: Mapping[str, Tensor]


def parts_of(numbers: Sequence[Numbers], device: Any) -> list[Part]:
    """The parts of a running batch with these numbers."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for row, given in enumerate(numbers):
        alike.setdefault(tuple(given), []).append(row)
    return [
        Part(torch.tensor(rows, device=device),
             {name: torch.tensor([numbers[row][name] for row in rows], device=device) for name in names})
        for names, rows in alike.items()
    ]  # fmt: skip


def numbers_of(params: Mapping[str, Any]) -> Numbers:
    """The numbers of a request, from its sampling parameters."""
    found: Numbers = (params.get("extra_args") or {}).get(KEY, {})
    return found
