"""Runs of verl itself, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlplugins_verl.cpu import launch, tiny

SECONDS = 1500
STARTS = 4
STARTED: list[subprocess.Popen[bytes]] = []
SLOW = "The current node timed out during startup"
"""What Ray says if its node takes more than 30 s."""
PROBE = """[rlplugins]
asking = rlplugins_probe:Asking
probe = rlplugins_probe:Probe
steer = rlplugins_probe:Steer
"""


class VerlRun:
    """A run on the tiny model.

    Args:
        folder: of its checkpoints, metrics and log; made if missing, so that a second run there resumes.
        overrides: of verl.
        engine: `light` or `vllm`.
        steps: training steps.
        probe: a folder with the plugins `asking`, `probe` and `steer`, if the stack has one of them.
        ranks: processes of the update.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str] = (),
        *,
        engine: str = "light",
        steps: int = 3,
        probe: Path | None = None,
        ranks: int = 1,
    ) -> None:
        self.folder = tiny.write(folder)
        count = len(list(folder.glob("*.jsonl")))
        self.metrics_file, self.log = folder / f"{count}.jsonl", folder / f"{count}.log"
        environment = launch.environment() | {"VERL_FILE_LOGGER_PATH": str(self.metrics_file)}
        if probe is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(probe), os.environ.get("PYTHONPATH", "")]))
        self.command = launch.command(folder, overrides, engine=engine, steps=steps, ranks=ranks)
        self.environment, self.starts = environment, 0
        self._start()

    def _start(self) -> None:
        self.starts += 1
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        STARTED.append(self.process)

    def poll(self) -> int | None:
        """Its exit status; None while it runs, and when it is started again since a busy machine did not start Ray in time."""
        status = self.process.poll()
        if status and self.starts < STARTS and SLOW in self.log.read_text(errors="replace"):
            self._start()
            return None
        return status

    def _end(self) -> int:
        self.wait_for(lambda: self.poll() is not None, running=False)
        return int(self.process.returncode)

    def wait(self) -> VerlRun:
        """Until it has come to a good end."""
        assert self._end() == 0, self.tail()
        return self

    def fails(self) -> str:
        """Its log, once it has failed."""
        assert self._end() != 0
        return self.log.read_text()

    def wait_for(self, happened: Callable[[], bool], running: bool = True) -> None:
        """Until something has happened, while it runs."""
        started = time.monotonic()
        while not happened():
            assert not running or self.poll() is None, self.tail()
            assert time.monotonic() - started < SECONDS, self.tail()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the driver; Ray's processes share its fate."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def tail(self, lines: int = 60) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What verl logged, one entry per step."""
        entries = [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
        return [{"step": entry["step"], **entry["data"]} for entry in entries]

    def saved(self) -> int:
        """The step of the latest whole checkpoint; 0 if there is none."""
        note = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        return int(note.read_text() or 0) if note.exists() else 0

    def state(self, step: int) -> Path:
        """The folder of the plugin state in the checkpoint of a step."""
        return self.folder / "checkpoints" / f"global_step_{step}" / "rlplugins" / "stack"


def end_all() -> None:
    """End the drivers that a failed test has left behind."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait(60)


def with_stack(*plugins: str, mode: str = "sync") -> list[str]:
    """The overrides that add a stack."""
    return [f"trainer.v1.trainer_mode=rlplugins_{mode}", f"+rlplugins.plugins=[{','.join(plugins)}]"]


def install_probe(folder: Path) -> Path:
    """The plugins `asking`, `probe` and `steer` as an installed distribution inside `folder`."""
    information = folder / "rlplugins_probe-0.1.dist-info"
    information.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("rlplugins_probe.py"), folder)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rlplugins-probe\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(PROBE)
    return folder
