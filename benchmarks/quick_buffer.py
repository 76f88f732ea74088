"""verl's replay buffer with a shorter poll, so that its 2 s do not hide what a step costs (`custom_sampler`).

`TurnBuffer` beside it makes a run take turns between verl's own steps and those of the stack. verl makes the buffer in the
trainer's process before the first step, which is the only reason why the turns are begun there.
"""

import random
from collections.abc import Callable
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from rlplugins_verl.driver import WithPlugins

SECONDS = 0.02
TURNS = (
    "on_step_begin", "_next_train_batch", "_balance_batch", "_compute_advantage", "_update_critic", "_update_actor",
    "on_step_end", "_consume_sync_metrics",
)  # fmt: skip
"""Methods of a step that rlplugins overrides."""


class QuickBuffer(ReplayBuffer):  # type: ignore[misc]
    """The same rows in the same order, sooner."""

    def __init__(self, **options: Any) -> None:
        super().__init__(poll_interval=SECONDS, **options)


class TurnBuffer(QuickBuffer):
    """In one step of every two, drawn by chance, the trainer's methods are verl's own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in TURNS:
            setattr(WithPlugins, name, by_turns(name, vars(WithPlugins)[name]))
        sample = WithPlugins._sample

        def sampled(trainer: Any, own: Callable[..., Any], *given: Any, **named: Any) -> Any:
            return (sample if ours(trainer.global_steps) else _own)(trainer, own, *given, **named)

        WithPlugins._sample = sampled  # type: ignore[method-assign]


def _own(trainer: Any, sample: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return sample(*given, **named)


def by_turns(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The method in the stack's steps, that of verl's trainer in the others."""

    def turned(trainer: Any, *given: Any, **named: Any) -> Any:
        if ours(trainer.global_steps):
            return method(trainer, *given, **named)
        return getattr(super(WithPlugins, trainer), name)(*given, **named)

    return turned


def ours(step: int) -> bool:
    """Whether the step (from 1) is the stack's: one of the steps 2k + 1 and 2k + 2."""
    return random.Random((step - 1) // 2).random() < 0.5 if step % 2 else not ours(step - 1)
