"""Services that an adapter gives to hooks. All take whole batches and return when all is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from rlplugins.rollouts import Requests, Rollouts, Sampling


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

    def gradient_products(self, rollouts: Rollouts, advantages: Sequence[Tensor]) -> Tensor:
        """Gram matrix (K, K) of the loss gradients that K advantages, (B, 1) or (B, T) each, would give on these rollouts."""
