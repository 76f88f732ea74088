"""Processes of runs: on this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from rlplugins.ablation.study import StudyError
from rlplugins.report.folder import LOG

Command: TypeAlias = Callable[[Path, Path, bool], Sequence[str]]
"""The command line of a run, from its configuration file, its folder, and whether it has a checkpoint."""

GUARD = Path(__file__).with_name("guarded.py")

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

SECONDS_TO_STOP = 5.0


class Process(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit status (minus the signal that ended it); None while it runs or waits for its turn."""

    def stop(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it, after `stop`, if it has not ended yet."""


Start: TypeAlias = Callable[[Sequence[str], Path], Process]
"""Starts a command in the folder of its run."""


def train_command(config: Path, output: Path, resume: bool) -> list[str]:
    """The command line of a run of `rlplugins train`.

    Args:
        config: the run's options.
        output: the run's folder.
        resume: whether it continues from its checkpoint.
    """
    flags = ["--resume"] if resume else []
    return [
        sys.executable,
        "-m",
        "rlplugins",
        "train",
        "--config",
        str(config),
        "--output",
        str(output),
        *flags,
    ]


@contextmanager
def local_processes(threads: int) -> Iterator[Start]:
    """Runs as processes of this machine, in this process group, so that Ctrl-C reaches them too.

    Args:
        threads: how many threads each may use.
    """

    def start(command: Sequence[str], folder: Path) -> Process:
        return LocalProcess(popen(command, folder, threads))

    yield start


class LocalProcess:
    """A run as a process of this machine.

    Args:
        process: the process.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Ask it to end."""
        self._process.terminate()

    def kill(self) -> None:
        """Give it a few seconds to end, then end it."""
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def ray_tasks(cpus: int, gpus: float) -> Iterator[Start]:
    """Runs as tasks of a Ray cluster: that of RAY_ADDRESS, else one that is started on this machine.

    Every node needs the same Python environment and sees the study's folder, the working directory and the
    data under the same paths (shared storage).

    Args:
        cpus: processor cores of one run.
        gpus: GPUs of one run.

    Raises:
        StudyError: if Ray is not installed or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise StudyError('runs on a Ray cluster need Ray: pip install "rlplugins[ray]"') from error
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise StudyError(f"the Ray cluster does not answer: {error}") from error
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_to_end)

    def start(command: Sequence[str], folder: Path) -> Process:
        folder = folder.absolute()
        return RayProcess(ray, task.remote(list(command), folder, Path.cwd(), cpus), folder)

    try:
        yield start
    finally:
        ray.shutdown()


class RayProcess:
    """A run as a task of a Ray cluster.

    Args:
        ray: the module.
        task: the task's reference.
        folder: the run's folder.
    """

    def __init__(self, ray: Any, task: Any, folder: Path) -> None:
        self._ray = ray
        self._task = task
        self._folder = folder

    def poll(self) -> int | None:
        """Its exit status; None while it runs or waits for its turn. Ray's own errors go to the run's log."""
        done, _ = self._ray.wait([self._task], timeout=0)
        if not done:
            return None
        try:
            return int(self._ray.get(self._task))
        except self._ray.exceptions.RayError as error:
            with (self._folder / LOG).open("a", encoding="utf-8") as log:
                log.write(f"{error}\n")
            return 1

    def stop(self) -> None:
        """End the task's worker; the run dies with it."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.cancel(self._task, force=True)

    def kill(self) -> None:
        """Nothing is left to do."""


def run_to_end(command: Sequence[str], folder: Path, directory: Path, threads: int) -> int:
    """Run a command on a node of the cluster; gives its exit status.

    Args:
        command: the command line.
        folder: the run's folder.
        directory: the working directory.
        threads: how many threads it may use.
    """
    os.chdir(directory)
    return popen(command, folder, threads).wait()


def popen(command: Sequence[str], folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start a command that writes to the log of `folder` and does not outlive this process.

    Args:
        command: the command line.
        folder: the run's folder.
        threads: how many threads the numerical libraries may use in it.
    """
    guard = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [*guard, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
