"""verl's replay buffer with a shorter poll, so that its 2 s do not hide what a step costs (`custom_sampler`)."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

SECONDS = 0.02


class QuickBuffer(ReplayBuffer):  # type: ignore[misc]
    """The same rows in the same order, sooner."""

    def __init__(self, **options: Any) -> None:
        super().__init__(poll_interval=SECONDS, **options)
