"""Runs of OpenRLHF itself, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from openrlhf_side import free_port

from rlplugins_openrlhf.cpu import launch, tiny

SECONDS = 1500
STARTED: list[subprocess.Popen[bytes]] = []
HERE = Path(__file__).parent
SCRIPTED = ("--train.agent_func_path", str(HERE / "scripted_agent.py"))
REPRODUCIBLE = HERE / "reproducible"
TIMES = "train/timing/"
PROBE = HERE / "rlplugins_openrlhf_probe.py"
ENTRY = """[rlplugins]
openrlhf-probe = rlplugins_openrlhf_probe:OpenRLHFProbe
"""


class OpenRLHFRun:
    """A run on the tiny model.

    Args:
        folder: of its checkpoints, metrics and log; made if missing, so that a second run there may resume.
        stack: as `--rlplugins` takes it; None: plain OpenRLHF.
        further: flags.
        steps: training steps.
        paths: folders for PYTHONPATH.
    """

    def __init__(
        self, folder: Path, stack: str | None, further: Sequence[str] = (), *, steps: int = 3, ranks: int = 1,
        paths: Sequence[Path] = (),
    ) -> None:  # fmt: skip
        self.folder = tiny.write(folder)
        number = len(list(folder.glob("*.log")))
        self.log, self.board = folder / f"{number}.log", folder / f"board{number}"
        environment = launch.environment()
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], *map(str, paths)])
        flags = ["--logger.tensorboard_dir", str(self.board), *further]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                launch.command(folder, stack, flags, ranks=ranks, steps=steps), cwd=folder, env=environment, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        STARTED.append(self.process)

    def wait(self) -> OpenRLHFRun:
        """Until it has come to a good end."""
        self.wait_for(lambda: self.process.poll() is not None, running=False)
        assert self.process.returncode == 0, self.tail()
        return self

    def fails(self) -> str:
        """Its log, once it has failed."""
        self.wait_for(lambda: self.process.poll() is not None, running=False)
        assert self.process.returncode != 0
        return self.log.read_text()

    def wait_for(self, happened: Callable[[], bool], running: bool = True) -> None:
        """Until something has happened, while it runs."""
        started = time.monotonic()
        while not happened():
            assert not running or self.process.poll() is None, self.tail()
            assert time.monotonic() - started < SECONDS, self.tail()
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to the process that the user started; Ray's processes share its fate."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def tail(self, lines: int = 80) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """What OpenRLHF logged, one entry per step."""
        return metrics_of(self.board)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """All metrics but those that say how long something took."""
        return [{name: value for name, value in step.items() if not name.startswith(TIMES)} for step in self.metrics]

    def saved(self) -> int:
        """The step of the latest whole checkpoint; 0 if there is none."""
        note = self.folder / "checkpoints" / "_actor" / "latest"
        return int(note.read_text().rpartition("step")[2]) if note.exists() else 0

    def state(self, step: int) -> Path:
        """The folder of the plugin state of a step."""
        return self.folder / "checkpoints" / "rlplugins" / f"global_step{step}"


def metrics_of(board: Path) -> list[dict[str, Any]]:
    """What OpenRLHF logged for TensorBoard, one entry per step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: dict[int, dict[str, Any]] = {}
    for file in sorted(board.rglob("events.*")):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                steps.setdefault(int(event.step), {"step": int(event.step)})[name] = event.value
    return [steps[number] for number in sorted(steps)]


@contextlib.contextmanager
def cluster(log: Path) -> Iterator[str]:
    """A Ray cluster of this machine, as `ray start` makes one; gives the address that jobs are submitted to.

    Its folder is its own, so that no other run on this machine finds the cluster and joins it.
    """
    folder = tempfile.mkdtemp(prefix="rlplugins")  # short: paths of sockets are
    ports = {name: str(free_port()) for name in ("port", "dashboard-port", "ray-client-server-port",
                                                 "dashboard-agent-listen-port")}  # fmt: skip
    flags = [word for name, port in ports.items() for word in (f"--{name}", port)]
    command = [
        beside_python("ray"),
        "start",
        "--head",
        "--block",
        "--include-dashboard",
        "true",
        "--temp-dir",
        folder,
        *flags,
    ]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=launch.environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    STARTED.append(process)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    started = time.monotonic()
    while not answers(f"{address}/api/jobs/"):
        assert process.poll() is None and time.monotonic() - started < SECONDS, log.read_text()
        time.sleep(0.5)
    try:
        yield address
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, 60)
        shutil.rmtree(folder, ignore_errors=True)


def answers(address: str) -> bool:
    """Whether something answers there."""
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except OSError:
        return False


def beside_python(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).with_name(name))


def imports(folder: Path) -> dict[int, set[str]]:
    """What each process has imported of OpenRLHF and rlplugins, by the notes that `REPRODUCIBLE` takes."""
    return {int(file.name): set(file.read_text().split()) for file in folder.iterdir()}


def ours(names: Iterable[str]) -> set[str]:
    """Those of rlplugins."""
    return {name for name in names if name.startswith("rlplugins")}


def end_all() -> None:
    """End the processes that a failed test has left behind."""
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.wait(60)


def install_probe(folder: Path) -> Path:
    """The plugin `openrlhf-probe` as an installed distribution inside `folder`."""
    information = folder / "rlplugins_openrlhf_probe-0.1.dist-info"
    information.mkdir(parents=True)
    shutil.copy(PROBE, folder)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: rlplugins-openrlhf-probe\nVersion: 0.1\n")
    (information / "entry_points.txt").write_text(ENTRY)
    return folder


def notes_of(file: Path) -> Callable[[str], list[dict[str, Any]]]:
    """What the probe wrote down, by hook."""
    said = [json.loads(line) for line in file.read_text().splitlines()]
    return lambda hook: [entry for entry in said if entry["hook"] == hook]
