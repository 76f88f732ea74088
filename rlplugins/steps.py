"""Run, Step and Metrics: what hooks know beside their rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError

if TYPE_CHECKING:
    from rlplugins.plugin import Plugin
    from rlplugins.rollouts import Prompts
    from rlplugins.table import PluginTable, PromptTable


@dataclass(frozen=True)
class Run:
    """What is known when a run starts; `init_state` sees it.

    Attributes:
        total_steps: planned number of steps.
        group_size: responses per prompt of the user's configuration.
        budget: responses per step.
        pool: all prompts.
        seed: the run's seed.
        tokenizer: the trainer's tokenizer, or None.
        table: the plugin's own columns of the prompt table.
    """

    total_steps: int
    group_size: int
    budget: int
    pool: Prompts
    seed: int = 0
    tokenizer: Any = None
    table: PluginTable = field(default=None)  # type: ignore[assignment]

    @property
    def prompt_table(self) -> PromptTable:
        """The whole prompt table."""
        return self.pool.table


@dataclass(frozen=True)
class Step:
    """One step of the run, as one plugin sees it.

    Attributes:
        number: 0 for the first step.
        total_steps: planned number of steps.
        seed: the run's seed.
        shared: values that this plugin shared in this step.
    """

    number: int
    total_steps: int
    seed: int = 0
    _everyone: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    _kept: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    plugin: str = ""

    @property
    def shared(self) -> Mapping[str, Any]:
        """What this plugin shared in this step."""
        return self._everyone.get(self.plugin, {})

    @property
    def progress(self) -> float:
        """Fraction of the run before this step: 0 in the first, 1 when the planned steps are over."""
        return min(1.0, self.number / max(1, self.total_steps))

    def share(self, name: str, value: Any) -> None:
        """Hand a number, a tensor or a plain value to this plugin's later hooks of this step, the update's included."""
        self._everyone.setdefault(self.plugin, {})[name] = value

    @property
    def kept(self) -> Mapping[str, Any]:
        """What this plugin kept in this step."""
        return self._kept.get(self.plugin, {})

    def keep(self, name: str, value: Any) -> None:
        """Spare this plugin's later hooks of this step on the driver a computation; unlike `share`, nothing is sent."""
        self._kept.setdefault(self.plugin, {})[name] = value

    def generator(self, plugin: Plugin) -> torch.Generator:
        """Random numbers as a function of seed, step and plugin: the same on every call, rank and resumed run."""
        return generator(self.seed, self.number, plugin.name)

    def of(self, plugin: str) -> Step:
        """The same step for another plugin."""
        return replace(self, plugin=plugin)

    def shared_by_all(self) -> dict[str, dict[str, Any]]:
        """What each plugin shared, to be sent to the processes of the update."""
        return self._everyone


def generator(*identity: int | str) -> torch.Generator:
    """A CPU generator whose seed is a hash of `identity`."""
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Metrics:
    """Weighted means of what was logged; values stay on their device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Any, Any]] = {}

    def log(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        """Add a value with a weight to the mean of `name`."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ConfigurationError(f"log({name!r}) takes one number, got a tensor of shape {tuple(value.shape)}")
            value = value.detach().reshape(())
        total, weights = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (total + value * weight, weights + weight)

    def logger(self, plugin: str) -> Callable[..., None]:
        """The `log` of one plugin."""
        return lambda name, value, weight=1.0: self.log(f"rlplugins/{plugin}/{name}", value, weight)

    def merge(self, other: Metrics) -> None:
        """Add what another rank or micro-batch logged."""
        for name, (total, weights) in other._sums.items():
            mine, my_weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (mine + total, my_weights + weights)

    def sums(self) -> dict[str, tuple[float, float]]:
        """Weighted sum and weight of every metric, to be added over ranks."""
        return {name: (float(total), float(weights)) for name, (total, weights) in self._sums.items()}

    def __iter__(self) -> Iterator[tuple[str, float]]:
        for name, (total, weights) in self.sums().items():
            if weights:
                yield name, total / weights

    def as_dict(self) -> dict[str, float]:
        """The means by name."""
        return dict(self)
