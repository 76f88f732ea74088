"""Plugin, hookimpl: what a method is written with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Protocol,
    TypeAlias,
    TypeVar,
    dataclass_transform,
    overload,
    runtime_checkable,
)  # fmt: skip

import pluggy
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from rlplugins.errors import ConfigurationError, StateError
from rlplugins.hookspecs import PROJECT
from rlplugins.needs import Need
from rlplugins.rollouts import POLICY

if TYPE_CHECKING:
    from rlplugins.steps import Run
    from rlplugins.table import PluginTable

BuiltinName: TypeAlias = str | Mapping[str, Mapping[str, Any]]
"""A built-in by name, or by name with options: `"group_std"`, `{"group_std": {"ddof": 0}}`."""

_marker = pluggy.HookimplMarker(PROJECT)
_Function = TypeVar("_Function", bound=Callable[..., Any])


@overload
def hookimpl(function: _Function) -> _Function: ...
@overload
def hookimpl(
    function: None = None, *, hook: str | None = None, when: Callable[[Any], bool] | None = None, kind: str = POLICY,
    per_response: bool = False, wrapper: bool = False, tryfirst: bool = False, trylast: bool = False,
) -> Callable[[_Function], _Function]: ...  # fmt: skip
def hookimpl(
    function: Any = None, *, hook: str | None = None, when: Callable[[Any], bool] | None = None, kind: str = POLICY,
    per_response: bool = False, wrapper: bool = False, tryfirst: bool = False, trylast: bool = False,
) -> Any:  # fmt: skip
    """Mark a method as the implementation of the hook of its name.

    Args:
        function: the method (when used without parentheses).
        hook: the hook, where the method has another name: one method for each `when` with arguments of its own.
        when: claims the hook only in the configurations for which this is true of the plugin.
        kind: for `policy_loss`: the kind of rows that this implementation is for.
        per_response: for `policy_loss`: the loss is one per response, so weights of tokens have no place in it.
        wrapper: a generator around the combined value, as in pluggy.
        tryfirst: before the others of a chain.
        trylast: after the others of a chain.
    """

    def mark(method: _Function) -> _Function:
        method.rlplugins_hook = hook or method.__name__  # type: ignore[attr-defined]
        method.rlplugins_when = when  # type: ignore[attr-defined]
        method.rlplugins_kind = kind  # type: ignore[attr-defined]
        method.rlplugins_per_response = per_response  # type: ignore[attr-defined]
        return _marker(wrapper=wrapper, tryfirst=tryfirst, trylast=trylast, specname=hook)(method)

    return mark(function) if function is not None else mark


@runtime_checkable
class Stateful(Protocol):
    """An object that a plugin's state may hold beside plain values: a model of its own (`rlplugins.models`)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that it remembers, as tensors, arrays and plain values under names."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take back what `state_dict` gave."""


class State:
    """What a plugin remembers: attributes that hold tensors, arrays, plain JSON values, lists and dicts of them, or `Stateful`.

    Made from what `init_state` returned; saved and restored by the stack. Attributes can be set only while a hook that
    may change state runs.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_values", dict(values))
        object.__setattr__(self, "_open", False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return object.__getattribute__(self, "_values")[name]
        except KeyError:
            raise AttributeError(
                f"no state {name!r}; init_state gives: {', '.join(self._values) or 'nothing'}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._open:
            raise StateError(
                f"state {name!r} was set outside of choose_prompts, extend_rollouts and the life hooks; "
                "every other hook is a pure function"
            )
        if name not in self._values:
            raise StateError(
                f"state {name!r} is not among what init_state gave: {', '.join(self._values) or 'nothing'}"
            )
        self._values[name] = value

    def as_dict(self) -> dict[str, Any]:
        """The values by name."""
        return dict(self._values)


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(Field,))
class Plugin:
    """Base of every plugin and every built-in.

    A subclass is a frozen, keyword-only dataclass that compares by identity. Its annotated fields are its configuration,
    validated when it is made; the string below a field is its documentation.

    Attributes:
        name: what users write; for a distribution `rlplugins-<name>` the name of its entry point.
        uses: hooks that are claimed by naming a built-in.
        needs: what no hook produces (`rlplugins.needs`).
        assumes: facts that must hold (`rlplugins.legality.FACTS`).
        breaks: facts that no longer hold with this plugin.
        kinds: row kinds that this plugin adds.
        corrects_staleness: the trainer's own correction for stale rollouts is to be left out.
        state_version: raised when the meaning of the saved state changes.
    """

    name: ClassVar[str] = ""
    state_version: ClassVar[int] = 1

    if TYPE_CHECKING:  # plain class attributes or properties, as a plugin likes
        state: ClassVar[Any]
        table: ClassVar[PluginTable]

        @property
        def uses(self) -> Mapping[str, BuiltinName]: ...  # noqa: D102
        @property
        def needs(self) -> Iterable[Need]: ...  # noqa: D102
        @property
        def assumes(self) -> Iterable[str]: ...  # noqa: D102
        @property
        def breaks(self) -> Iterable[str]: ...  # noqa: D102
        @property
        def kinds(self) -> Iterable[str]: ...  # noqa: D102
        @property
        def corrects_staleness(self) -> bool: ...  # noqa: D102
    else:
        uses = {}
        needs = ()
        assumes = breaks = kinds = frozenset()
        corrects_staleness = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = ConfigDict(extra="forbid", use_attribute_docstrings=True, arbitrary_types_allowed=True)
        pydantic_dataclass(cls, config=config, frozen=True, kw_only=True, eq=False, repr=False)

    def init_state(self, run: Run) -> dict[str, Any]:
        """The state at the start of a run, and the place to register columns of `self.table`."""
        return {}

    def configuration(self) -> dict[str, Any]:
        """The values of the configuration fields."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def __repr__(self) -> str:
        """Name and configuration."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.configuration().items())
        return f"{self.name}({options})"


def option_names(plugin: type[Plugin]) -> list[str]:
    """Names of the configuration fields of a plugin class, in order."""
    return list(getattr(plugin, "__pydantic_fields__", {}))


def make(plugin: type[Plugin], options: Mapping[str, Any]) -> Plugin:
    """A validated plugin.

    Raises:
        ConfigurationError: naming the plugin and every field that is wrong.
    """
    try:
        return plugin(**options)
    except ValidationError as error:
        problems = [_problem(plugin, item) for item in error.errors()]
        raise ConfigurationError("; ".join(problems)) from None


def _problem(plugin: type[Plugin], item: Any) -> str:
    """One validation error of pydantic, in our words."""
    text = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return f"{plugin.name}: {text}"
    if item["type"] == "unexpected_keyword_argument":
        text += f" (options: {', '.join(option_names(plugin)) or 'none'})"
    elif item["type"] != "missing":
        text += f", got {item['input']!r}"
    return f"{plugin.name}.{'.'.join(map(str, item['loc']))}: {text}"


def summary(plugin: type[Plugin]) -> str:
    """First line of the docstring."""
    return (inspect.getdoc(plugin) or "").partition("\n")[0]
