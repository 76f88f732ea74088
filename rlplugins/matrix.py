"""Every pair of plugins: runs together, or refused with the reason."""

from __future__ import annotations

from collections import Counter
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
        found.append(Pair(first, second, tuple(_violations([first, second], trainer))))
    return found


def covering(found: Iterable[Pair], trainer: Trainer | None = None) -> list[list[str]]:
    """Legal stacks, as large as they come, that together hold every pair that runs."""
    left = {(pair.first, pair.second) for pair in found if pair.runs}
    stacks = []
    while left:
        stack = list(min(left))
        partners = Counter(name for pair in left for name in pair)
        for name, _ in sorted(partners.items(), key=lambda item: (-item[1], item[0])):
            new = {(min(name, other), max(name, other)) for other in stack} & left
            if name not in stack and new and not _violations(sorted([*stack, name]), trainer):
                stack.append(name)
        stacks.append(sorted(stack))
        left -= set(combinations(sorted(stack), 2))
    return stacks


def _violations(names: Sequence[str], trainer: Trainer | None) -> list[Violation]:
    return legality.violations(resolve([registry.find(name)() for name in names], trainer, {}, ()), ())


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
