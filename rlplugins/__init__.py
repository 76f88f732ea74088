"""rlplugins: reinforcement-learning methods as plugins for the trainers that people already run."""

from importlib.metadata import version

from rlplugins import needs, ops
from rlplugins.pairs import Pairs
from rlplugins.plugin import Plugin, hookimpl
from rlplugins.rollouts import Prompts, Requests, Rollouts, Sampling
from rlplugins.stack import Stack
from rlplugins.steps import Metrics, Run, Step
from rlplugins.trainer import Trainer

__version__ = version("rlplugins")

__all__ = [
    "Metrics", "Pairs", "Plugin", "Prompts", "Requests", "Rollouts", "Run", "Sampling", "Stack", "Step", "Trainer", "hookimpl",
    "needs", "ops",
]  # fmt: skip
