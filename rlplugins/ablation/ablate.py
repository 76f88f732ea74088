"""Run a study: every legal stack with every seed, several at a time, kept and continued after a kill."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from rich.console import Console

from rlplugins.ablation.launch import Command, Process, Start, local_processes, ray_tasks
from rlplugins.ablation.progress import Display
from rlplugins.ablation.runs import RunSpec, discard, outdated_runs, plan_runs, prepare
from rlplugins.ablation.study import Cell, Study, StudyError
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.report import Results, load
from rlplugins.report.folder import CONFIG, FAILURE, Plan, PlannedCell, is_finished, log_tail, write_json

Check: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], str | None]
"""Says why a stack is illegal under the options of its runs; None if it is not."""

SECONDS_BETWEEN_LOOKS = 0.2

LOCK = ".lock"


def run_study(
    study: Study,
    folder: Path | str,
    *,
    jobs: int | None = None,
    ray: bool = False,
    fresh: bool = False,
    console: Console | None = None,
    check: Check | None = None,
    command: Command | None = None,
) -> Results:
    """Make every run of a study that is not finished yet, and read the results.

    Finished runs are kept. Interrupted and failed ones continue from their checkpoint, or start again if they
    have none. A run that fails does not stop the others; it is in `Results.failed`.

    Args:
        study: the study.
        folder: where everything goes; made if it is not there. On a cluster it must be shared storage.
        jobs: how many runs at a time; as many as there are cores for them if None, one if they use a GPU;
            with `ray`, as many as the cluster takes.
        ray: make the runs as tasks of a Ray cluster.
        fresh: where a finished run has another configuration than the study now asks for, throw it away and
            make it again, instead of refusing to start.
        console: where to show progress.
        check: says why a stack is illegal; rlplugins' own rules if None.
        command: makes the command line of a run; that of the trainer's adapter if None.

    Raises:
        StudyError: if a stack is not merely illegal but cannot be read (an unknown plugin or option), if the
            folder has runs of another configuration, is in use or holds something else, or if Ray is missing.
        ConfigurationError: if the trainer has no adapter here.
    """
    folder = Path(folder)
    command = command or adapter_command(study.trainer)
    plan = make_plan(study, check or stack_check(study.trainer))
    refused = {cell.name for cell in plan.cells if cell.refused is not None}
    runs = plan_runs(study, [cell for cell in study.cells if cell.name not in refused], folder)
    jobs = jobs or default_jobs(study, len(runs), ray)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone_in(folder):
        _settle_outdated(runs, fresh)
        plan.write(folder)
        _run_all(runs, plan, command, jobs, _launcher(study, jobs, ray), console or Console())
        return load(folder)


def make_plan(study: Study, check: Check) -> Plan:
    """The study's cells with the verdict on each stack.

    Args:
        study: the study.
        check: says why a stack is illegal.

    Raises:
        StudyError: if a stack cannot be read.
    """
    return Plan(
        name=study.name,
        trainer=study.trainer,
        baseline=study.baseline_name,
        metrics=study.metrics,
        seeds=study.seeds,
        cells=[_planned(cell, {**study.train, **cell.train}, check) for cell in study.cells],
    )


def _planned(cell: Cell, options: Mapping[str, Any], check: Check) -> PlannedCell:
    try:
        refused = check(cell.stack, options)
    except ConfigurationError as error:
        raise StudyError(f"stack {cell.name}: {error}") from error
    return PlannedCell(name=cell.name, stack=dict(cell.stack), train=dict(cell.train), refused=refused)


def stack_check(trainer: str) -> Check:
    """The rules of rlplugins for stacks under a trainer.

    Args:
        trainer: the trainer's name.
    """
    from rlplugins.stack import Stack
    from rlplugins.trainer import find_adapter

    def check(stack: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        try:
            Stack.from_mapping(stack, trainer=find_adapter(trainer).configured(options))
        except StackError as error:
            return str(error)
        return None

    return check


def adapter_command(trainer: str) -> Command:
    """What the trainer's adapter starts a run with.

    Args:
        trainer: the trainer's name.
    """
    from rlplugins.trainer import find_adapter

    return find_adapter(trainer).command


def default_jobs(study: Study, runs: int, ray: bool) -> int:
    """How many runs to make at a time: as many as there are cores for; one if they use a GPU; with Ray, all.

    Args:
        study: the study.
        runs: how many runs it has.
        ray: whether a Ray cluster makes them.
    """
    if ray:
        return max(1, runs)
    return 1 if study.gpus else max(1, min(runs, cores() // study.cpus))


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher(study: Study, jobs: int, ray: bool) -> AbstractContextManager[Start]:
    return ray_tasks(study.cpus, study.gpus) if ray else local_processes(max(1, cores() // jobs))


def _settle_outdated(runs: Sequence[RunSpec], fresh: bool) -> None:
    """Refuse to mix results of two configurations, or throw the old ones away.

    Raises:
        StudyError: if there are any, and not `fresh`.
    """
    outdated = outdated_runs(runs)
    if outdated and not fresh:
        runs_of: dict[str, list[str]] = {}
        for run, changes in outdated.items():
            runs_of.setdefault("; ".join(changes), []).append(run.name)
        raise StudyError(
            f"{len(outdated)} finished runs do not have the configuration that the study now asks for:\n"
            + "".join(f"  {changes}\n    in {' / '.join(names)}\n" for changes, names in runs_of.items())
            + "Choose another output folder to keep them, or give --fresh to make these runs again."
        )
    for run in outdated:
        discard(run)


def _run_all(
    runs: Sequence[RunSpec],
    plan: Plan,
    command: Command,
    jobs: int,
    launcher: AbstractContextManager[Start],
    console: Console,
) -> None:
    """Make the runs that are not finished, `jobs` at a time; whatever happens, no process stays behind."""
    waiting = [run for run in runs if not is_finished(run.folder)]
    running: dict[RunSpec, Process] = {}
    with ExitStack() as stack:
        display = stack.enter_context(Display(console, len(runs), len(runs) - len(waiting)))
        _announce(display, plan, len(runs), len(waiting))
        if not waiting:
            return
        start = stack.enter_context(launcher)
        stack.enter_context(_signals_as_exceptions())  # after Ray, which has handlers of its own
        stack.callback(_stop_all, running)
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = start(command(run.folder / CONFIG, run.folder, prepare(run)), run.folder)
                display.started(run)
            _collect(running, display)
            display.refresh()
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _announce(display: Display, plan: Plan, total: int, waiting: int) -> None:
    for cell in plan.cells:
        if cell.refused is not None:
            display.say(f"{cell.name}: refused, for the reason that follows the table", "yellow")
    if waiting < total:
        display.say(f"{total - waiting} of {total} runs were finished before.")


def _collect(running: dict[RunSpec, Process], display: Display) -> None:
    """Take the processes that have ended out of `running`, and note how they ended."""
    for run, process in list(running.items()):
        status = process.poll()
        if status is None:
            continue
        del running[run]
        if is_finished(run.folder):
            display.ended(run, "finished", failed=False)
            continue
        reason = describe_exit(status)
        write_json(run.folder / FAILURE, {"reason": reason, "exit_status": status})
        last_line = log_tail(run.folder, lines=1)
        display.ended(run, f"failed ({reason}) {last_line}".rstrip(), failed=True)


def describe_exit(status: int) -> str:
    """How a process that wrote no result ended.

    Args:
        status: its exit status; minus the signal that ended it.
    """
    if status == 0:
        return "ended without a result"
    if status > 0:
        return f"exit status {status}"
    name = signal.Signals(-status).name
    return f"ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def _stop_all(running: Mapping[RunSpec, Process]) -> None:
    for process in running.values():
        process.stop()
    for process in running.values():
        process.kill()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that no two processes make the same runs.

    Raises:
        StudyError: if another process holds it.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StudyError(f"another process is running the study in {folder}") from error
        yield


@contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """End by exception on SIGTERM and SIGHUP (but under nohup) as on Ctrl-C, so that the runs are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
