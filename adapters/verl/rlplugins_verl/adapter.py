"""What the core asks of an adapter: the trainer, the command line of a study's run, the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlplugins.hookspecs import HOOKS
from rlplugins.trainer import Trainer
from rlplugins_verl import settings


class VerlAdapter:
    """The entry point of this adapter; see `rlplugins.trainer.Adapter`."""

    distribution = "verl"

    def configured(self, options: Mapping[str, Any]) -> Trainer:
        """verl as the command line of a study sets it; its synchronous trainer as far as that does not show."""
        from rlplugins_verl.study import shown_settings

        shown = shown_settings(options) if options else None
        if shown is not None:
            mode = str(settings.at(shown, "trainer.v1.trainer_mode", "sync")).removeprefix("rlplugins_")
            return settings.declare(shown, mode)
        return Trainer(
            name="verl",
            binds=frozenset(HOOKS) - settings.UNBOUND,
            provides=frozenset(settings.provides("sync")) | {"validation_every_step", "together", "gradients"},
            columns=None,
            remedies=settings.REMEDIES,
        )

    def command(self, config: Path, output: Path, resume: bool) -> list[str]:
        """The command line of one run of a study."""
        from rlplugins_verl.study import command

        return command(config, output)

    def doctor(self) -> tuple[str, bool]:
        """Versions, every bound point, and canaries that need no training."""
        from rlplugins_verl.doctor import report

        return report()


adapter = VerlAdapter()
