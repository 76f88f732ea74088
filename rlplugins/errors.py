"""Every error that rlplugins raises on purpose, in one hierarchy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class RlpluginsError(Exception):
    """Base of all errors that a user can meet; its text says what to do."""


class ConfigurationError(RlpluginsError):
    """A file, flag or plugin option is wrong; the text names the place and the field."""


class UnknownPluginError(ConfigurationError):
    """No installed plugin has this name; the text gives the nearest names and the pip line."""


class DataError(RlpluginsError):
    """A prompt file, a reward function or a model folder cannot be used."""


class StateError(RlpluginsError):
    """Saved plugin state does not fit this stack, or state was changed where it may not be."""


class ServiceError(RlpluginsError):
    """A service (engine, judge) was asked for something that it cannot give."""


class HookError(RlpluginsError):
    """A hook returned, or was given, something outside its specification."""

    def __init__(self, plugin: str, hook: str, problem: str) -> None:
        super().__init__(f"{plugin}.{hook}: {problem}")
        self.plugin = plugin
        self.hook = hook
        self.problem = problem


@dataclass(frozen=True)
class Violation:
    """One reason why a stack is illegal.

    Attributes:
        rule: which of the four rules is broken: `claims`, `flow`, `needs` or `facts`.
        problem: what is wrong, naming hooks and plugins.
        settled_by: lines of a stack file that would settle it, any one of them; empty if none would.
    """

    rule: str
    problem: str
    settled_by: Sequence[str] = ()

    def __str__(self) -> str:
        """The problem, then the lines that settle it."""
        if not self.settled_by:
            return f"[{self.rule}] {self.problem}\n    no line of the stack file settles this"
        lines = "".join(f"\n        {line}" for line in self.settled_by)
        return f"[{self.rule}] {self.problem}\n    settled by one of:{lines}"


class StackError(ConfigurationError):
    """The stack is illegal; all violations are reported at once."""

    def __init__(self, violations: Sequence[Violation], names: Sequence[str] = ()) -> None:
        self.violations = tuple(violations)
        title = f"the stack [{', '.join(names)}] cannot run:"
        super().__init__("\n".join([title, *(f"  {violation}" for violation in self.violations)]))
