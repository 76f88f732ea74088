"""What verl loads in every process (entry-point group `verl.plugins`): trainers of its own, once its trainers are there.

verl is half imported when this runs and skips, without a word, a plugin that fails; so nothing of verl is touched here.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from rlplugins.imports import after_import

TRAINERS = {
    "sync": ("verl.trainer.ppo.v1.trainer_sync", "PPOTrainerSync"),
    "colocate_async": ("verl.trainer.ppo.v1.trainer_colocate_async", "PPOTrainerColocateAsync"),
    "separate_async": ("verl.trainer.ppo.v1.trainer_separate_async", "PPOTrainerSeparateAsync"),
}
"""Per trainer mode of verl the module and the class that a trainer of rlplugins is derived from."""

V0 = "verl.trainer.main_ppo_v0"


def install() -> bool:
    """Register `rlplugins_<mode>` when verl has imported the trainer of that mode."""
    for mode, (module, trainer) in TRAINERS.items():
        after_import(module, lambda found, mode=mode, trainer=trainer: _register(mode, getattr(found, trainer)))
    after_import(V0, guard_v0)
    return True


def _register(mode: str, base: type) -> None:
    from rlplugins_verl.driver import register

    register(mode, base)


def guard_v0(module: ModuleType) -> None:
    """Refuse a stack under verl's deprecated trainer, which would leave it out without a word."""
    module.TaskRunner = _GuardedRunner(module.TaskRunner)  # type: ignore[attr-defined]


class _GuardedRunner:
    """verl's task runner, which looks at the configuration first."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def options(self, **options: Any) -> _GuardedRunner:
        return _GuardedRunner(self._runner.options(**options))

    def remote(self, *arguments: Any) -> Any:
        handle = self._runner.remote(*arguments)
        return _GuardedHandle(handle)


class _GuardedHandle:
    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.run = self

    def remote(self, config: Any) -> Any:
        """Start the run, unless it has a stack."""
        from rlplugins.errors import ConfigurationError

        mode = str(config.trainer.v1.trainer_mode)
        if config.get("rlplugins") or mode.startswith("rlplugins_"):
            raise ConfigurationError(
                "trainer.use_v1=False runs verl's deprecated trainer, which rlplugins does not bind: leave it out, and set "
                "trainer.v1.trainer_mode=rlplugins_sync"
            )
        return self._handle.run.remote(config)


installed = install()
