"""What the local trainer can do, as the core asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlplugins.defaults import METHODS, EntropyBonus, NllOnChosen
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.plan import ADVANTAGE_HOOKS, PREFERENCES, REWARDS, objective_of
from rlplugins.plugin import BuiltinName, Plugin
from rlplugins.rollouts import DECLARED
from rlplugins.stack import Stack, StackConfig
from rlplugins.trainer import Trainer
from rlplugins_local.config import TrainConfig, read_settings

PROVIDES = frozenset(
    {"together:group", "together:prompt", "mini_batch_log_probs", "prompts_after_update", "current_entropy",
     "response_prefix", "engine", "gradients", "trainable_model"}
)  # fmt: skip
PROVIDES_ON_PAIRS = frozenset({"mini_batch_log_probs"})
GROUP_SIZE = 8


def declare(config: TrainConfig, columns: Iterable[str] | None = None) -> Trainer:
    """The trainer in this configuration.

    Args:
        config: the settings.
        columns: fields of the prompt file; None: not read yet.
    """
    validates = {"validation_every_step"} if config.validation_data else set()
    extras: list[Plugin] = []
    if config.entropy_coefficient:
        extras.append(EntropyBonus(coefficient=config.entropy_coefficient))
    if config.nll_coefficient:
        extras.append(NllOnChosen(coefficient=config.nll_coefficient))
    return Trainer(
        name="local",
        binds=frozenset(hook for hook in HOOKS if objective_of(hook) in (None, config.objective)),
        provides=(PROVIDES if config.objective == REWARDS else PROVIDES_ON_PAIRS) | validates,
        columns=None if columns is None else DECLARED | set(columns),
        group_size=config.group_size,
        ranks=1,
        defaults=defaults(config),
        extras=extras,
        remedies={
            "group_size": "set group_size: {low}",
            "validation_every_step": "give validation_data",
            "column": f"add the field to the lines of the {'prompt' if config.objective == REWARDS else 'pairs'} file",
            PREFERENCES: "give `pairs` instead of `data` and `reward`",
            REWARDS: "give `data` and `reward` instead of `pairs`",
        },
    )


def defaults(config: TrainConfig) -> dict[str, BuiltinName]:
    """The built-in per hook that the settings mean."""
    method = METHODS[config.advantage]
    advantage: dict[str, BuiltinName] = (
        {"compute_advantages": config.advantage} if not method.uses else dict(method.uses)
    )
    loss = {"dual_clip": config.dual_clip} if config.loss == "ppo_clip" else {}
    return {
        **advantage,
        "clip_range": {"fixed": {"low": config.clip_low, "high": config.clip_high}},
        "policy_loss": {config.loss: loss},
        "kl_penalty": {config.kl: {} if config.kl == "none" else {"coefficient": config.kl_coefficient}},
        "reduce_loss": {
            config.reduction: {"constant": config.max_new_tokens} if config.reduction == "sequence_sum" else {}
        },
        "preference_loss": {config.preference_loss: preference_options(config)},
    }


def preference_options(config: TrainConfig) -> dict[str, Any]:
    """The options of the loss on pairs that the settings mean."""
    beta = {} if config.beta is None else {"beta": config.beta}
    own = {"cdpo": {"label_smoothing": config.label_smoothing}, "simpo": {"gamma": config.gamma}}
    return {**beta, **own.get(config.preference_loss, {})}


def build_stack(config: TrainConfig, stack: StackConfig, columns: Iterable[str] | None = None) -> Stack:
    """The checked stack.

    Raises:
        StackError: if it cannot run here.
        ConfigurationError: if a setting makes no sense with it.
    """
    made = Stack.from_config(stack, declare(config, columns))
    grouped = "baseline" in METHODS[config.advantage].uses
    if (
        config.objective == REWARDS
        and config.group_size == 1
        and grouped
        and not any(made.claims(hook) for hook in ADVANTAGE_HOOKS)
    ):
        raise ConfigurationError(
            f"advantage {config.advantage!r} compares the responses to one prompt, but group_size is 1: "
            "set group_size to 2 or more, or leave it out"
        )
    return made


def group_size(config: TrainConfig, stack: Stack) -> int:
    """Responses per prompt: the configured number, or the nearest to 8 that every plugin admits."""
    low, high = stack.group_sizes
    return config.group_size or min(config.batch_size, int(min(max(GROUP_SIZE, low), high)))


class LocalAdapter:
    """The entry point of this adapter; see `rlplugins.trainer.Adapter`."""

    distribution = None
    config = TrainConfig
    """The settings of a run."""

    def configured(self, options: Mapping[str, Any]) -> Trainer:
        """The trainer with these settings; model, data and reward may be left out.

        Without data and pairs it may be for either.
        """
        files = {} if options.get("pairs") else {"data": ".", "reward": "module:function"}
        trainer = declare(read_settings({"model": ".", **files, **options}, "train"))
        return trainer if {"data", "pairs"} & set(options) else replace(trainer, binds=frozenset(HOOKS))

    def command(self, config: Path, output: Path, resume: bool) -> list[str]:
        """The command line of one run of a study."""
        from rlplugins.ablation.launch import train_command

        return train_command(config, output, resume)

    def doctor(self) -> tuple[str, bool]:
        """Versions, device, and whether generation here is that of transformers."""
        from rlplugins_local.doctor import report

        return report()


adapter = LocalAdapter()


def train(config: TrainConfig, stack: StackConfig, *, progress: bool = True) -> dict[str, Any]:
    """Train; gives the metrics of the last step.

    Args:
        config: the settings.
        stack: the plugins.
        progress: whether to show a progress bar (lines, if the output is not a terminal).

    Raises:
        RlpluginsError: if the stack is illegal, or a file, the reward function, the model or a setting cannot be used.
    """
    build_stack(config, stack)  # what is wrong is said before torch and the model are loaded
    from rlplugins_local.preferences import PreferenceTrainer
    from rlplugins_local.run import LocalTrainer, run

    return run(config, stack, PreferenceTrainer.prepare if config.pairs else LocalTrainer.prepare, progress)
