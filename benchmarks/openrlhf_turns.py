"""`rlplugins openrlhf train_ppo_ray` that takes turns between OpenRLHF's own steps and those of the stack.

    .venv-openrlhf/bin/python benchmarks/openrlhf_turns.py train_ppo_ray --rlplugins grpo.yaml <flags of OpenRLHF>

In one step of every two, drawn by chance, the trainer calls the originals in the place of what the adapter binds, and the
actor has its own methods back. Only two things of the adapter stay then: prompts are strings that know their place, and the
engine's executor is the adapter's, which hands these on. What is defined here travels to the other processes by value, as the
adapter's own `fit` does.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

REPLACED = (
    "generate", "collect", "make_experiences", "make_passes", "give_credit", "train", "measure",
)  # fmt: skip
"""Methods of the adapter that take the one that they stand for first."""
WHOLE = "timing/whole"
"""Metric: seconds of the whole step, the end of which OpenRLHF's own sum leaves out."""
OF_ACTOR = ("actor_loss_fn", "training_step", "ppo_train")


def ours(step: int) -> bool:
    """Whether the step (from 1) is the stack's: one of the steps 2k + 1 and 2k + 2."""
    return random.Random((step - 1) // 2).random() < 0.5 if step % 2 else not ours(step - 1)


def keep(worker: Any) -> None:
    """On an actor, before it is bound: what OpenRLHF gave it."""
    worker.plain = {name: getattr(worker.trainer, name) for name in OF_ACTOR}


def take_turn(worker: Any, stack: bool) -> None:
    """On an actor: the methods of the stack, or OpenRLHF's."""
    if not hasattr(worker, "bound"):
        worker.bound = {name: getattr(worker.trainer, name) for name in OF_ACTOR}
    for name, value in (worker.bound if stack else worker.plain).items():
        setattr(worker.trainer, name, value)


def bind_turns(trainer: Any, given: dict[str, Any], options: dict[str, Any]) -> None:
    """In the trainer's process: bind the stack so that it takes turns."""
    import ray

    from rlplugins.stack import StackConfig
    from rlplugins_openrlhf.trainer import TrainingRun

    def everywhere(run: Any, function: Callable[..., None], *arguments: Any) -> None:
        handles = run.trainer.actor_model_group._actor_handlers
        ray.get([handle.__ray_call__.remote(function, *arguments) for handle in handles])

    class Turns(TrainingRun):
        """The adapter in the stack's steps."""

        turn = 1

        def shake_hands(self) -> None:
            everywhere(self, keep)
            super().shake_hands()
            everywhere(self, take_turn, ours(self.turn))

        def send(self, prompts: Any, labels: Any, *, images: Any = None, **more: Any) -> Any:
            if ours(self.turn):
                return super().send(prompts, labels, images=images, **more)
            return self.dispatch_all(prompts, labels, images=images, **more)

        def restore(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            states = super().restore(original)
            self.began = time.perf_counter()
            return states

        def save(self, original: Callable[..., None], step: int, logs: dict[str, Any], *arguments: Any) -> None:
            logs[WHOLE] = time.perf_counter() - self.began
            original(step, logs, *arguments)
            self.turn += 1
            everywhere(self, take_turn, ours(self.turn))
            self.began = time.perf_counter()

    def turned(method: Callable[..., Any]) -> Callable[..., Any]:
        def either(run: Any, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
            if ours(run.turn):
                return method(run, original, *arguments, **named)
            return original(*arguments, **named)

        return either

    for name in REPLACED:
        setattr(Turns, name, turned(getattr(TrainingRun, name)))
    Turns(trainer, StackConfig.model_validate(given)).bind(options)


def binding(name: str, fit: Callable[..., Any], given: dict[str, Any]) -> Callable[..., Any]:
    """`fit`, after the trainer is bound in its own process; in the place of the adapter's."""

    @functools.wraps(fit)
    def bound(trainer: Any, *arguments: Any, **named: Any) -> Any:
        bind_turns(trainer, given, named)
        return fit(trainer, *arguments, **named)

    return bound


if __name__ == "__main__":
    from rlplugins_openrlhf import install, launch

    install.binding = binding
    launch.main()
