"""Finding plugins: by entry point, by name, with their options."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeAlias

from rlplugins.defaults import BUILTINS, EXTRAS, METHODS
from rlplugins.errors import ConfigurationError, UnknownPluginError
from rlplugins.plugin import BuiltinName, Plugin, make

GROUP = "rlplugins"

Entry: TypeAlias = str | Mapping[str, Any] | Plugin
"""One line of `plugins:`: a name, a name with options, or (in Python) a plugin."""


def installed() -> dict[str, EntryPoint]:
    """Entry points of the installed plugins by name."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def find(name: str) -> type[Plugin]:
    """The plugin class of this name.

    Raises:
        UnknownPluginError: with the nearest installed names and the pip line.
        ConfigurationError: if the entry point is broken.
    """
    if known := METHODS.get(name) or EXTRAS.get(name):
        return known
    points = installed()
    if name not in points:
        names = [*METHODS, *points]
        near = difflib.get_close_matches(name, names, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"installed: {', '.join(names)}"
        raise UnknownPluginError(f'no plugin {name!r} is installed; {hint}\n    pip install "rlplugins[{name}]"')
    try:
        plugin = points[name].load()
    except Exception as error:
        raise ConfigurationError(f"plugin {name!r} ({points[name].value}) cannot be imported: {error}") from error
    if not (isinstance(plugin, type) and issubclass(plugin, Plugin)):
        raise ConfigurationError(f"plugin {name!r} ({points[name].value}) is not a class derived from rlplugins.Plugin")
    if plugin.name != name:
        raise ConfigurationError(f"plugin {name!r} ({points[name].value}) calls itself {plugin.name!r}")
    return plugin


def make_entry(entry: Entry) -> Plugin:
    """A plugin from one line of `plugins:`."""
    if isinstance(entry, Plugin):
        return entry
    if isinstance(entry, str):
        return make(find(entry), {})
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigurationError(f"plugins: {entry!r} is neither a name nor one name with its options")
    ((name, options),) = entry.items()
    if not isinstance(options or {}, Mapping):
        raise ConfigurationError(f"plugins: the options of {name!r} are not a mapping: {options!r}")
    return make(find(str(name)), options or {})


def make_builtin(hook: str, wanted: BuiltinName) -> Plugin:
    """A built-in of `hook` from its name, or from `{name: {option: value}}`."""
    name, options = (wanted, {}) if isinstance(wanted, str) else next(iter(wanted.items()))
    known = BUILTINS.get(hook, {})
    if name not in known:
        raise ConfigurationError(f"{hook} has no built-in {name!r}; it has: {', '.join(known) or 'none'}")
    return make(known[name], options)


def parse_plugins(text: str) -> Sequence[str]:
    """The names of a `--plugins a,b` flag."""
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]
