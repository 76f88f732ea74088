"""Services that an adapter gives to hooks. All take whole batches and return when all is there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from rlplugins.errors import ServiceError

if TYPE_CHECKING:
    from rlplugins.rollouts import Requests, Rollouts, Sampling


@dataclass(frozen=True)
class Gradients:
    """How the loss gradients of K advantages lie to each other, at the present weights.

    Attributes:
        products: (K, K) float64, their Gram matrix over the parameters that were asked for.
        norms: (K,) float64, their lengths over all parameters.
        learning_rate: of the optimiser's next step.
    """

    products: Tensor
    norms: Tensor
    learning_rate: float


def chosen_parameters(names: Iterable[str], pattern: str | None) -> set[str]:
    """The names in which the regular expression is found; all without one.

    Raises:
        ServiceError: if it is none, or found in no name.
    """
    there = list(names)
    try:
        chosen = {name for name in there if pattern is None or re.search(pattern, name)}
    except re.error as error:
        raise ServiceError(f"gradient_products: {pattern!r} is no regular expression: {error}") from None
    if not chosen:
        raise ServiceError(f"gradient_products: no parameter has {pattern!r} in its name; the first are {there[:3]}")
    return chosen


class Engine(Protocol):
    """Generation and log-probs in the middle of a step and after the update."""

    def sampling(self, rows: int) -> Sampling:
        """The run's own parameters for so many requests, to be changed and given to `generate`."""

    def generate(
        self, requests: Requests, sampling: Sampling | None = None, *, score: bool = True, greedy: bool = False
    ) -> Rollouts:
        """Draw one response per request from the current policy and score it.

        Args:
            requests: prompts, with forced response prefixes to continue from where wanted.
            sampling: how to draw; the run's own parameters if None.
            score: whether to call the reward function; else scores are NaN.
            greedy: take the most likely token.

        Returns:
            Rollouts of kind `policy` in the requests' order. They are probes unless a hook adds them to its rollouts.
        """

    def given(self, requests: Requests, responses: Sequence[str], *, score: bool = True) -> Rollouts:
        """Rows of responses that something else has written, as `generate` gives those that it draws.

        Each is tokenised as the trainer does, with an end token, and cut at the run's limit.

        Args:
            requests: prompts; with `score=False` they need not be of the pool. Forced prefixes are left out.
            responses: one text per request.
            score: whether to call the reward function, on what is left of the text; else scores are NaN.

        Returns:
            Rollouts of kind `policy` in the requests' order, to be given a kind of their own before they are trained.
        """

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The B responses up to their last token, tool output included, without special tokens."""

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor, *, policy: str = "current"
    ) -> Tensor:
        """Log-probs (N, T) float32 of given responses after given prompts, at the trainer's temperature, no gradient.

        Args:
            prompts: N lists of token ids.
            responses: (N, T) int64 token ids, right-padded.
            mask: (N, T) bool, tokens wanted; the result is 0 elsewhere.
            policy: `current` or `reference`.
        """

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """The loss gradients that K advantages would give on these rollouts as one mini-batch; the plugin needs `GRADIENTS`.

        Every row and token counts once, and the loss is the stack's whole loss. No gradient stays and no weight moves.

        Args:
            rollouts: B rows of the step, in the credit phase: their old log-probs are there.
            advantages: K of shape (B, 1) or (B, T).
            parameters: regular expression; the products are over parameters in whose name it is found. None: over all.

        Raises:
            ServiceError: if no parameter has such a name.
        """
