"""What the core asks of an adapter: the trainer, the command line of a study's run, the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlplugins.hookspecs import HOOKS
from rlplugins.trainer import Trainer
from rlplugins_openrlhf import settings


class OpenRLHFAdapter:
    """The entry point of this adapter; see `rlplugins.trainer.Adapter`."""

    distribution = "openrlhf"

    def configured(self, options: Mapping[str, Any]) -> Trainer:
        """OpenRLHF as the command line of a study sets it.

        As far as that hides, it may be for either command; `train_ppo_ray` then is one without generation ahead.
        """
        from rlplugins_openrlhf import preferences
        from rlplugins_openrlhf.study import shown_flags

        shown = shown_flags(options) if options else None
        if shown is not None:
            command, flags = shown
            return (preferences if command == "train_dpo" else settings).declare(flags)
        return Trainer(
            name="openrlhf",
            binds=(frozenset(HOOKS) - settings.UNBOUND) | preferences.BINDS,
            provides=settings.provides(ahead=False) | {"validation_every_step", "together", "gradients"},
            columns=None,
            remedies=settings.REMEDIES,
        )

    def command(self, config: Path, output: Path, resume: bool) -> list[str]:
        """The command line of one run of a study."""
        from rlplugins_openrlhf.study import command

        return command(config, output)

    def doctor(self) -> tuple[str, bool]:
        """Versions, every bound point, and canaries that need no training."""
        from rlplugins_openrlhf.doctor import report

        return report()


adapter = OpenRLHFAdapter()
