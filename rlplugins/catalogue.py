"""What plugins say of themselves: the tables of `rlplugins list` and `rlplugins show`."""

from __future__ import annotations

import inspect
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlplugins import registry
from rlplugins.defaults import METHODS
from rlplugins.errors import RlpluginsError
from rlplugins.hookspecs import HOOKS
from rlplugins.legality import FACTS
from rlplugins.plugin import Plugin, summary
from rlplugins.trainer import installed_adapters


def table() -> RenderableType:
    """Installed plugins, the core's methods and the adapters."""
    plugins = Table(title="plugins", title_justify="left")
    for header in ("name", "what it is", "hooks", "from"):
        plugins.add_column(header, overflow="fold")
    for name, point in registry.installed().items():
        origin = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        try:
            plugin = registry.find(name)
        except RlpluginsError as error:
            plugins.add_row(name, Text(f"broken: {error}"), "", origin)
        else:
            plugins.add_row(name, Text(summary(plugin)), ", ".join(hook_names(plugin)), origin)
    for name, plugin in METHODS.items():
        plugins.add_row(name, Text(summary(plugin)), ", ".join(hook_names(plugin)), "rlplugins")
    adapters = ", ".join(sorted(installed_adapters())) or "none"
    return Group(plugins, Text(f"trainers: {adapters}"))


def hook_names(plugin: type[Plugin]) -> list[str]:
    """The hooks that a plugin implements or names a built-in for, in some configuration."""
    found = {getattr(getattr(plugin, name, None), "rlplugins_hook", "") for name in dir(plugin)}
    uses = _static(plugin, "uses")
    return [name for name in HOOKS if name in found or (uses and name in uses)]


def description(plugin: type[Plugin]) -> RenderableType:
    """Everything that a user of the plugin wants to know."""
    options = Table(title="configuration", title_justify="left")
    for header in ("option", "type", "default", "meaning"):
        options.add_column(header, overflow="fold")
    for name, kind, default, meaning in configuration(plugin):
        options.add_row(name, Text(kind), Text(default), Text(meaning))
    hooks = Table(title="hooks", title_justify="left")
    for header in ("hook", "combines", "what the hook is"):
        hooks.add_column(header, overflow="fold")
    uses = _static(plugin, "uses") or {}
    for name in hook_names(plugin):
        what = f"uses the built-in {uses[name]}" if name in uses else HOOKS[name].doc.partition("\n")[0]
        hooks.add_row(name, HOOKS[name].rule.value, Text(what))
    parts: list[RenderableType] = [Text(plugin.name, style="bold"), Text(inspect.getdoc(plugin) or "")]
    if paper := _distribution_summary(plugin):
        parts.append(Text(f"paper: {paper}"))
    parts += [hooks, options] if options.row_count else [hooks]
    needs = _static(plugin, "needs")
    parts.append(Text("needs: " + (", ".join(map(str, needs or ())) or "nothing")))
    for word, facts in (("assumes", _static(plugin, "assumes")), ("breaks", _static(plugin, "breaks"))):
        parts += [Text(f"{word}: {fact} ({FACTS.get(fact, 'unknown')})") for fact in sorted(facts or ())]
    parts.append(Text(conflicts(plugin)))
    return Group(*parts)


def configuration(plugin: type[Plugin]) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of every option."""
    rows = []
    for name, info in getattr(plugin, "__pydantic_fields__", {}).items():
        kind = plugin.__annotations__.get(name, info.annotation)
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        rows.append((name, kind, default, " ".join((info.description or "").split())))
    return rows


def conflicts(plugin: type[Plugin]) -> str:
    """The installed plugins that a stack with this one refuses, each checked with its defaults."""
    from rlplugins.legality import violations
    from rlplugins.plan import resolve

    if any(default == "required" for _, _, default, _ in configuration(plugin)):
        return "conflicts: depend on the configuration; see `rlplugins explain`"
    found = []
    for name in [*registry.installed(), *METHODS]:
        if name == plugin.name:
            continue
        try:
            plan = resolve([plugin(), registry.find(name)()], None, {}, ())
            problems = violations(plan, ())
        except Exception:  # a plugin that cannot be made here is not a conflict of this one
            continue
        if problems:
            settled = all(problem.settled_by for problem in problems)
            found.append(name + (" (an `owners:`, `off:` or `allow:` line settles it)" if settled else ""))
    return "conflicts: " + ("; ".join(found) or "none with what is installed")


def _static(plugin: type[Plugin], name: str) -> Any:
    """`uses`, `needs`, `assumes` or `breaks` in the default configuration."""
    value = getattr(plugin, name)
    if not isinstance(value, property):
        return value
    try:
        return getattr(plugin(), name)
    except Exception:  # it has required options: nothing can be said without them
        return None


def _distribution_summary(plugin: type[Plugin]) -> str:
    """The one-line description of the plugin's distribution, which names the paper."""
    module = plugin.__module__.partition(".")[0]
    if module == "rlplugins":
        return ""
    try:
        return str(metadata(module.replace("_", "-"))["Summary"] or "")
    except PackageNotFoundError:
        return ""
