"""Runs two things by turns and compares them; the table of all comparisons becomes docs/performance.md."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import PAGE, Line, Measure, page, table

# CPU time, so that other work on the machine counts little; one thread, so that it is what one waits.
THREADS = 1
LINES = pytest.StashKey[list[Line]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LINES] = []


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.empty(31 * 2**20, dtype=torch.uint8).fill_(0)  # malloc keeps pages from now on, as in any trainer's process
    yield
    torch.set_num_threads(before)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Line], None]:
    return request.config.stash[LINES].append


@pytest.fixture
def by_turns(benchmark: Any) -> Callable[..., Measure]:
    """Runs `ours` and `theirs` alternately; the quotient of each pair is one measurement."""

    def run(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, repeat: int = 1, warm: int = 1) -> Measure:
        measure = Measure()

        def pair() -> None:
            measure.add(ours, theirs, repeat)

        benchmark.pedantic(pair, rounds=rounds, warmup_rounds=warm)
        measure.forget(warm)
        benchmark.extra_info.update(ours=measure.ours, theirs=measure.theirs)
        return measure

    return run


@pytest.fixture
def alone(benchmark: Any) -> Callable[..., Measure]:
    """Runs `ours` against a limit in seconds."""

    def run(ours: Callable[[], Any], limit: float, rounds: int, repeat: int = 1) -> Measure:
        measure = Measure(limit=limit)
        benchmark.pedantic(lambda: measure.add(ours, None, repeat), rounds=rounds, warmup_rounds=1)
        measure.forget(1)
        benchmark.extra_info.update(ours=measure.ours, limit=limit)
        return measure

    return run


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page, if every benchmark ran."""
    complete = exitstatus == 0 and not session.config.option.keyword and not session.config.option.markexpr
    if complete and session.config.stash[LINES]:
        path = Path(session.config.rootpath, PAGE)
        path.write_text(page(session.config.stash[LINES], path.read_text() if path.exists() else ""))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[LINES]:
        terminalreporter.section("comparisons")
        terminalreporter.write_line(table(config.stash[LINES]))
