"""What a trainer can do for a stack: the declaration that every adapter makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.plugin import BuiltinName

if TYPE_CHECKING:
    from rlplugins.plugin import Plugin

GROUP = "rlplugins.adapters"


@dataclass(frozen=True)
class Trainer:
    """One trainer in one configuration.

    Attributes:
        name: as in `trainer:` of a study.
        binds: hooks that it can call.
        provides: kinds of needs that it can meet (`rlplugins.needs.MEANINGS`).
        columns: columns that it can give; None: not known before the data is read.
        group_size: responses per prompt of the user's configuration; None: whatever the stack needs.
        ranks: processes of the update; 0: not known yet.
        defaults: built-in per hook that the user's configuration means.
        extras: built-ins that the configuration adds (an entropy bonus).
        breaks: facts that the configuration breaks, with the setting that does.
        remedies: per kind of need the setting that would meet it.
    """

    name: str
    binds: frozenset[str] = frozenset(HOOKS)
    provides: frozenset[str] = frozenset()
    columns: frozenset[str] | None = None
    group_size: int | None = None
    ranks: int = 0
    defaults: Mapping[str, BuiltinName] = field(default_factory=dict)
    extras: Sequence[Plugin] = ()
    breaks: Mapping[str, str] = field(default_factory=dict)
    remedies: Mapping[str, str] = field(default_factory=dict)


class Adapter(Protocol):
    """What the entry point of an adapter gives.

    Attributes:
        distribution: name of the trainer's own distribution; None: the adapter is the trainer.
    """

    distribution: str | None

    def configured(self, options: Mapping[str, Any]) -> Trainer:
        """The trainer with these options of a run (`train:` of a study); with none, as it is without further flags.

        Raises:
            ConfigurationError: if an option is unknown or wrong.
        """

    def command(self, config: Path, output: Path, resume: bool) -> list[str]:
        """The command line of one run of a study; see `rlplugins.ablation`."""

    def doctor(self) -> tuple[str, bool]:
        """A report on this machine's installation, and whether all is well."""


def installed_adapters() -> dict[str, Any]:
    """Entry points of the installed adapters by name."""
    return {point.name: point for point in entry_points(group=GROUP)}


def find_adapter(name: str) -> Adapter:
    """The adapter of a trainer.

    Raises:
        ConfigurationError: if it is not installed; with the pip line.
    """
    found = installed_adapters()
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigurationError(
            f'no adapter for the trainer {name!r} is installed (installed: {known}); pip install "rlplugins[{name}]"'
        )
    adapter: Adapter = found[name].load()
    return adapter
