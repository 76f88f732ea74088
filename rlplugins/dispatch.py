"""Calling hooks: arguments by name, chains and wrappers, checks of what comes back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlplugins.errors import ConfigurationError, HookError, RlpluginsError
from rlplugins.plan import Implementation


class Scope(dict[str, Any]):
    """Arguments by name. What is costly is computed when first taken; some arguments differ from plugin to plugin.

    Args:
        values: arguments that are the same for every plugin.
        lazy: arguments that are computed when first taken, from the scope. (A closure over it would be a cycle, which
            keeps tensors until the garbage collector comes.)
        personal: arguments made anew for each plugin, from its name.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        lazy: Mapping[str, Callable[[Scope], Any]] | None = None,
        personal: Mapping[str, Callable[[str], Any]] | None = None,
    ) -> None:
        super().__init__(values)
        self._lazy = dict(lazy or {})
        self._personal = dict(personal or {})
        self._made: dict[tuple[str, str], Any] = {}

    def __missing__(self, name: str) -> Any:
        if name not in self._lazy:
            raise ConfigurationError(f"the argument {name!r} is not available here")
        self[name] = self._lazy[name](self)
        return self[name]

    def renew(self, name: str, make: Callable[[str], Any]) -> None:
        """Replace a personal argument."""
        self._personal[name] = make
        self._made = {key: value for key, value in self._made.items() if key[0] != name}

    def arguments(self, item: Implementation) -> dict[str, Any]:
        """What the implementation takes."""
        taken = {}
        for name in item.arguments:
            if name in self._personal:
                key = (name, item.plugin.name)
                if key not in self._made:
                    self._made[key] = self._personal[name](item.plugin.name)
                taken[name] = self._made[key]
            else:
                taken[name] = self[name]
        return taken


def call(item: Implementation, scope: Scope) -> Any:
    """One implementation; an exception of its own gets a note that names it."""
    try:
        return item.function(**scope.arguments(item))
    except RlpluginsError:
        raise
    except Exception as error:
        error.add_note(f"in the hook {item} of rlplugins")
        raise


def wrapped(
    wrappers: Sequence[Implementation],
    scope: Scope,
    combine: Callable[[], Any],
    check: Callable[[Implementation, Any, Any], Any] | None = None,
) -> Any:
    """The combined value with pluggy's wrappers around it: outermost first, each sees and may replace the result.

    Args:
        wrappers: outermost first.
        scope: their arguments.
        combine: computes the value.
        check: called with a wrapper, the value that it was given (None: an exception) and the one that it returned;
            returns or refuses it.
    """
    if not wrappers:
        return combine()
    running: list[tuple[Implementation, Generator[None, Any, Any]]] = []
    for item in wrappers:
        generator: Generator[None, Any, Any] = item.function(**scope.arguments(item))
        if next(generator, generator) is generator:
            raise HookError(item.plugin.name, item.hook, "the wrapper must yield exactly once")
        running.append((item, generator))
    result: Any = None
    failure: BaseException | None = None
    try:
        result = combine()
    except BaseException as error:  # handed to the wrappers, which may handle it, as in pluggy
        failure = error
    for item, generator in reversed(running):
        try:
            if failure is None:
                generator.send(result)
            else:
                generator.throw(failure)
        except StopIteration as stop:
            try:
                result, failure = check(item, result, stop.value) if check else stop.value, None
            except RlpluginsError as error:
                failure = error
            continue
        except BaseException as error:
            failure = error
            continue
        generator.close()
        failure = HookError(item.plugin.name, item.hook, "the wrapper must yield exactly once")
    if failure is not None:
        raise failure
    return result


def expect(item: Implementation, value: Any, shapes: Sequence[tuple[int, ...]]) -> Tensor:
    """`value`, if it is a tensor of one of the shapes.

    Raises:
        HookError: naming plugin, hook, and both shapes.
    """
    wanted = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
    if not isinstance(value, Tensor):
        raise HookError(item.plugin.name, item.hook, f"returned {type(value).__name__}, not a tensor of shape {wanted}")
    if tuple(value.shape) not in shapes:
        raise HookError(item.plugin.name, item.hook, f"returned shape {tuple(value.shape)}, not {wanted}")
    return value


def expect_finite(item: Implementation, value: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN or infinity."""
    if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):  # the sum is the faster of the two
        raise HookError(item.plugin.name, item.hook, f"returned NaN or infinity in {what}")
