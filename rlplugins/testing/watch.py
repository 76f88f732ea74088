"""Observing the hooks of one plugin: what they change, what they draw, whether they are pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from rlplugins.hookspecs import STATEFUL
from rlplugins.pairs import Pairs
from rlplugins.plan import Implementation
from rlplugins.rollouts import Prompts, Requests, Rollouts, Sampling
from rlplugins.steps import generator
from rlplugins.testing.trial import SEED, Trial, flattened
from rlplugins.update import Batch

RANDOM = frozenset(
    {"bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "multinomial", "normal", "normal_",
     "poisson", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_"}
)  # fmt: skip


class Watcher:
    """Notes of what the hooks of a trial's plugin did.

    Attributes:
        called: hooks that ran.
        changed: inputs that were changed in place, each with its hook.
        draws: random functions that were called without this step's generator, each with its hook.
        impure: hooks that gave something else when called a second time, and must not.
    """

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.called: set[str] = set()
        self.changed: set[str] = set()
        self.draws: set[str] = set()
        self.impure: set[str] = set()

    def watch(self, items: Iterable[Implementation]) -> None:
        """Observe these implementations from now on."""
        for item in items:
            object.__setattr__(item, "function", self._observed(item))

    def _observed(self, item: Implementation) -> Callable[..., Any]:
        function = item.function

        def observed(**arguments: Any) -> Any:
            self.called.add(item.hook)
            if inspect.isgeneratorfunction(function):
                return function(**arguments)
            before = [(name, tensor, tensor._version, tensor.clone()) for name, tensor in inputs(arguments)]
            with _Draws(generator(SEED, self.trial.number, item.plugin.name).initial_seed()) as draws:
                result = function(**arguments)
            self.draws |= {f"{name} in {item.hook}" for name in draws.found}
            for name, tensor, version, copy in before:
                if tensor._version != version or not _equal(tensor, copy):
                    self.changed.add(f"{name} in {item.hook}")
            if item.hook not in STATEFUL and not _same(result, function(**arguments)):
                self.impure.add(item.hook)
            return result

        return observed


class _Draws(TorchFunctionMode):
    """Random functions of torch that are called without the generator of this seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        source = kwargs.get("generator")
        if name in RANDOM and (source is None or source.initial_seed() != self.seed):
            self.found.add(name)
        return func(*args, **kwargs)


def inputs(arguments: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor that the arguments of a hook hold, with its name."""
    return [pair for name, value in arguments.items() for pair in _tensors(name, value)]


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _tensors(f"{name}[{key!r}]", item)]
    if isinstance(value, tuple):
        return [pair for place, item in enumerate(value) for pair in _tensors(f"{name}[{place}]", item)]
    if isinstance(value, Rollouts | Requests | Prompts | Sampling | Pairs):
        parts = {item.name: object.__getattribute__(value, item.name) for item in fields(value)}
        return [pair for key, item in parts.items() for pair in _tensors(f"{name}.{key}", item)]
    if isinstance(value, Batch):
        return _tensors(name, value._columns)
    return []


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _same(one: Any, other: Any) -> bool:
    """Whether two results of a hook are equal, bit for bit."""
    first, second = flattened("", one), flattened("", other)
    return len(first) == len(second) and all(
        _equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for (_, a), (_, b) in zip(first, second, strict=True)
    )
