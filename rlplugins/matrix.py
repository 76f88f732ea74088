"""Every pair of plugins: runs together, or refused with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from rlplugins import legality, registry
from rlplugins.errors import ConfigurationError, Violation
from rlplugins.plan import resolve
from rlplugins.plugin import Plugin, option_names
from rlplugins.trainer import Trainer


@dataclass(frozen=True)
class Pair:
    """Two plugins with their default configuration, in this order.

    Attributes:
        first: name of the first.
        second: name of the second.
        violations: why they are refused together; empty if they run.
    """

    first: str
    second: str
    violations: tuple[Violation, ...]

    @property
    def runs(self) -> bool:
        """Whether the pair is legal without further lines."""
        return not self.violations

    @property
    def settled(self) -> bool:
        """Whether lines of a stack file can settle all that is wrong."""
        return all(violation.settled_by for violation in self.violations)


def pairs(names: Iterable[str], trainer: Trainer | None = None) -> list[Pair]:
    """Every pair of the named plugins, each with its defaults; those with required options are left out."""
    usable = [name for name in names if all(not _required(registry.find(name), option) for option in _options(name))]
    found = []
    for first, second in combinations(usable, 2):
        plan = resolve([registry.find(first)(), registry.find(second)()], trainer, {}, ())
        found.append(Pair(first, second, tuple(legality.violations(plan, ()))))
    return found


def _options(name: str) -> list[str]:
    return option_names(registry.find(name))


def _required(plugin: type[Plugin], option: str) -> bool:
    return bool(plugin.__pydantic_fields__[option].is_required())  # type: ignore[attr-defined]


def markdown(found: Sequence[Pair]) -> str:
    """The matrix as a page: a table of marks, then every refusal with its reason."""
    names = list(dict.fromkeys(name for pair in found for name in (pair.first, pair.second)))
    if not names:
        raise ConfigurationError("there are fewer than two plugins to compare")
    by_name = {(pair.first, pair.second): pair for pair in found}
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in names:
        cells = [_mark(by_name.get((row, column)) or by_name.get((column, row))) for column in names]
        lines.append(f"| **{row}** | " + " | ".join(cells) + " |")
    lines += ["", "✓ runs together; ○ refused, but lines of the stack file settle it; ✗ refused.", ""]
    for pair in found:
        if not pair.runs:
            lines.append(f"- **{pair.first} + {pair.second}** ({_mark(pair)})")
            lines += [f"    - {violation.problem}" for violation in pair.violations]
    return "\n".join(lines) + "\n"


def _mark(pair: Pair | None) -> str:
    if pair is None:
        return ""
    return "✓" if pair.runs else "○" if pair.settled else "✗"
