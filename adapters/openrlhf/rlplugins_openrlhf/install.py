"""What is bound in the process that the user starts, for `train_ppo_ray`.

Nothing is computed there, but it makes the Ray actors, and Ray sends an actor class by value. So a `fit` that binds its own
trainer travels to the trainer's process with the class: no process can miss it, and none but the trainer's gets it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from rlplugins import logits
from rlplugins.imports import after_import
from rlplugins.stack import Stack, StackConfig

FLAGS = "openrlhf.utils.config"
SYNC = "openrlhf.trainer.ppo_trainer"
ASYNC = "openrlhf.trainer.ppo_trainer_async"
ENGINE = "openrlhf.trainer.ray.vllm_engine"


def install(config: StackConfig) -> None:
    """Check the stack when the flags are read, and bind the trainers when they are made."""
    after_import(FLAGS, functools.partial(check_flags, config=config))
    after_import(SYNC, functools.partial(bind_fit, names=("PPOTrainer",), config=config))
    after_import(ASYNC, functools.partial(bind_fit, names=("TrainingActor", "GenerateSamplesActor"), config=config))


def check_flags(module: ModuleType, config: StackConfig) -> None:
    """OpenRLHF nests its flags right after it has parsed them, before Ray is started: the place to refuse."""
    original = module.hierarchize

    @functools.wraps(original)
    def hierarchize(args: Any) -> Any:
        from rlplugins_openrlhf.settings import build_stack, check_state

        nested = original(args)
        stack = build_stack(nested, config)
        check_state(nested, stack)
        if stack.claims("process_logits"):
            bind_engines(importlib.import_module(ENGINE), stack)
        return nested

    module.hierarchize = hierarchize  # type: ignore[attr-defined]


def bind_engines(module: ModuleType, stack: Stack) -> None:
    """Let every rollout engine be made with the stack's rule among the options that are handed on to vLLM."""
    actor = module.RolloutRayActor
    actor.options = functools.partial(options_with_rule, actor.options, stack)


def options_with_rule(original: Callable[..., Any], stack: Stack, **options: Any) -> Any:
    """Ray's options of an engine, which then is made with the rule."""
    made = original(**options)
    make = made.remote
    made.remote = lambda **given: make(**logits.with_rule(given, stack))
    return made


def bind_fit(module: ModuleType, names: tuple[str, ...], config: StackConfig) -> None:
    """Let the `fit` of these Ray actor classes begin by binding the trainer."""
    given = config.model_dump()
    for name in names:
        actor = getattr(module, name).__ray_metadata__.modified_class
        actor.fit = binding(name, actor.fit, given)


def binding(name: str, fit: Callable[..., Any], given: dict[str, Any]) -> Callable[..., Any]:
    """`fit`, after the trainer is bound in its own process."""

    @functools.wraps(fit)
    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        from rlplugins_openrlhf.trainer import bind

        bind(name, self, given, kwargs)
        return fit(self, *args, **kwargs)

    return bound
