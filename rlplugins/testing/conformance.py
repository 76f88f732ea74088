"""The conformance kit: what every plugin must do, whatever its method is.

    from rlplugins.testing import conformance

    test_conformance = conformance("bnpo", [{}, {"decompose": True}])

is collected by pytest as one test for each check and configuration (`test_conformance::padding[decompose=True]`).
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlplugins import registry
from rlplugins.catalogue import configuration
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import STATEFUL
from rlplugins.plan import Implementation
from rlplugins.plugin import Plugin, make, option_names, summary
from rlplugins.rollouts import Column
from rlplugins.testing.trial import Outcome, Subject, Trial
from rlplugins.testing.watch import Watcher

UNCALLED = frozenset({"forward"})
"""The hook that takes a model, which the kit has not."""

SOURCE = re.compile(r"arXiv[: ]\s?\d{4}\.\d{4,5}|\b10\.\d{4,}/\S+")


class NonConforming(AssertionError):
    """A check failed; the text says what to do."""


@dataclass(frozen=True)
class Check:
    """One thing that every plugin must do.

    Attributes:
        name: part of the test's name.
        run: raises `NonConforming`.
        concerns: the phases of hooks that it is about; a plugin without any of them is not checked.
        once: for the plugin, not for each of its configurations.
        optional: whether a method may be defined otherwise (`unless`).
    """

    name: str
    run: Callable[[Subject], None]
    concerns: frozenset[str]
    once: bool
    optional: bool


CHECKS: dict[str, Check] = {}


def check(
    *phases: str, once: bool = False, optional: bool = False
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a check of the function's name; about every plugin if no phase is named."""

    def register(function: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[function.__name__] = Check(function.__name__, function, frozenset(phases), once, optional)
        return function

    return register


@dataclass(frozen=True)
class Conformance:
    """What `conformance` makes and the pytest plugin collects.

    Attributes:
        subjects: the plugin in each configuration.
        unless: per check why this method is defined otherwise.
    """

    subjects: Sequence[Subject]
    unless: Mapping[str, str] = field(default_factory=dict)

    def tests(self) -> Iterable[tuple[str, Check, Subject]]:
        """Name, check and subject of every test that concerns the plugin."""
        for item in CHECKS.values():
            for subject in self.subjects[:1] if item.once else self.subjects:
                if not item.concerns or item.concerns & subject.phases:
                    options = "" if item.once else subject.options_text
                    yield item.name + (f"[{options}]" if options else ""), item, subject


def conformance(
    plugin: str | type[Plugin],
    options: Sequence[Mapping[str, Any]] = ({},),
    *,
    rows: Callable[[Any], Any] | None = None,
    prompts: Callable[[int], Mapping[str, Column]] | None = None,
    unless: Mapping[str, str] | None = None,
) -> Conformance:
    """The checks of one plugin; bind it to any name of a test module.

    Args:
        plugin: the name of an installed plugin, or its class.
        options: the configurations to check it in: name every one that turns a hook on or off.
        rows: gives the kit's rollouts or pairs what the plugin needs beside the fields of a trainer (data columns, components,
            other scores or tokens). Called before the log-prob passes; a row's values must not depend on other rows.
        prompts: gives the columns of the kit's prompts, from their number: what the plugin reads in hooks about prompts.
        unless: the reason per check (`permutation`, `padding`) for which the published method is defined otherwise; the
            check is then skipped with that reason.

    Raises:
        ConfigurationError: if the plugin is not installed, or a check must hold for every method.
    """
    allowed = [name for name, item in CHECKS.items() if item.optional]
    if wrong := sorted(set(unless or {}) - set(allowed)):
        raise ConfigurationError(f"unless: {', '.join(wrong)} must hold; only these can differ: {', '.join(allowed)}")
    made = registry.find(plugin) if isinstance(plugin, str) else plugin
    return Conformance([Subject(made, item, rows, prompts) for item in options], dict(unless or {}))


def implementations(trial: Trial) -> list[Implementation]:
    """What the plugin itself implements in this configuration."""
    return [item for item in trial.stack.plan.everything_running() if item.plugin is trial.plugin]


def watched(subject: Subject) -> tuple[Watcher, Outcome]:
    """A step of a warm run, every hook under observation, and what it gave."""
    trial = subject.trial()
    watcher = Watcher(trial)
    watcher.watch(implementations(trial))
    trial.warm()
    seen: Outcome = {}
    found = trial.outcome(trial.rows(seen))
    return watcher, seen | found


def difference(one: Outcome, other: Outcome, rtol: float = 1e-4, atol: float = 1e-6) -> str | None:
    """The first value that differs, in the order in which hooks make them; None if none does."""
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            return f"{name} is there only once"
        first, second = one[name], other[name]
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            if not _close(first, second, rtol, atol):
                return f"{name} is {second!r} instead of {first!r}"
        elif text := _tensors_differ(first, second.to(first.device), rtol, atol):
            return f"{name} {text}"
    return None


def _close(first: Any, second: Any, rtol: float, atol: float) -> bool:
    if isinstance(first, float) and isinstance(second, float | int):
        return bool(np.isclose(first, second, rtol=rtol, atol=atol, equal_nan=True))
    if isinstance(first, np.ndarray):
        return first.shape == np.shape(second) and bool(
            np.allclose(first, second, rtol=rtol, atol=atol, equal_nan=True)
        )
    return bool(first == second)


def _tensors_differ(first: Tensor, second: Tensor, rtol: float, atol: float) -> str | None:
    if first.shape != second.shape:
        wide = min(first.shape[-1:], second.shape[-1:])  # more padding: the rest must be empty
        longer = first if first.numel() > second.numel() else second
        if (
            first.dim() != 2
            or first.shape[0] != second.shape[0]
            or bool((longer[:, wide[0] :].nan_to_num() != 0).any())
        ):
            return f"has shape {tuple(second.shape)} instead of {tuple(first.shape)}"
        first, second = first[:, : wide[0]], second[:, : wide[0]]
    if not first.numel():
        return None
    first, second = first.detach().double(), second.detach().double()
    largest = float(first.nan_to_num().abs().max())
    gap = (first - second).abs().nan_to_num(0.0, torch.inf, torch.inf)
    gap[first.isnan() != second.isnan()] = torch.inf
    gap[first == second] = 0
    if float(gap.max()) <= atol + rtol * largest:
        return None
    worst = int(gap.flatten().argmax())
    return f"is {float(second.flatten()[worst]):g} instead of {float(first.flatten()[worst]):g} (entry {worst})"


def demand(holds: bool, message: str) -> None:
    """Raise with the message unless it holds."""
    if not holds:
        raise NonConforming(message)


def demand_same(one: Outcome, other: Outcome, message: str, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Raise with the first difference and the message, if there is one."""
    found = difference(one, other, rtol, atol)
    demand(found is None, f"{found}: {message}")


# about the plugin


@check(once=True)
def documentation(subject: Subject) -> None:
    """Summary, source and the meaning of every option."""
    plugin = subject.plugin
    demand(
        summary(plugin).endswith("."),
        "the docstring of the class must begin with one line that says what it does and ends with a full stop",
    )
    source = f"{sys.modules[plugin.__module__].__doc__ or ''}\n{plugin.__doc__}"
    demand(
        SOURCE.search(source) is not None,
        "the docstring of the class or of its module must name the source: arXiv 2501.00001, or a DOI",
    )
    bare = [name for name, _, _, meaning in configuration(plugin) if not meaning]
    demand(not bare, f"write a string below each option that says what it means: {', '.join(bare)}")


@check(once=True)
def configuration_errors(subject: Subject) -> None:
    """What is wrong in a configuration is an error that names the option."""
    for name, value in [("no_such_option", 1), *((name, object()) for name in option_names(subject.plugin))]:
        try:
            make(subject.plugin, {**subject.options, name: value})
        except ConfigurationError as error:
            demand(name in str(error), f"the error about the option {name!r} does not name it: {error}")
        else:
            kind = "an option that it does not have" if name == "no_such_option" else f"{type(value)} for {name!r}"
            raise NonConforming(f"accepts {kind}: give every option a type narrower than Any or object")


# about every hook


@check()
def hooks(subject: Subject) -> None:
    """Every hook runs, fits the specification, and gives finite values of its shape, also on the smallest batches."""
    if isinstance(subject.plain, Exception):
        message = "If it needs other rows than the kit makes up (a data column, components), give them with rows=..."
        raise NonConforming(f"cannot take a step: {subject.plain}. {message}") from subject.plain
    watcher, found = watched(subject)
    uncalled = [str(item) for item in implementations(watcher.trial) if item.hook not in UNCALLED | watcher.called]
    demand(
        not uncalled,
        f"never called in two steps: {', '.join(uncalled)}. Give the rows that they need (rows=...), or the configuration "
        "in which they run",
    )
    for name in ("advantages", "weights", "token_weights", "loss", "gradient", "entropy_gradient"):
        values = found.get(name)
        demand(
            values is None or (values.is_floating_point() and bool(values.isfinite().all())),
            f"{name} must be finite floating-point numbers, got {values}",
        )
    trial = subject.trial().warm()
    for what, rows in trial.smallest(trial.rows()).items():
        try:
            subject.trial().warm().outcome(rows, parts=2)
        except Exception as error:
            raise NonConforming(f"fails on a batch of {what}: {error}") from error


@check()
def inputs_unchanged(subject: Subject) -> None:
    """No hook changes in place what it was given."""
    watcher, _ = watched(subject)
    demand(
        not watcher.changed,
        f"changed in place: {'; '.join(sorted(watcher.changed))}. Make new tensors (x + 1, torch.where, clone), or "
        "rollouts['name'] = tensor for a column of its own",
    )


@check()
def determinism(subject: Subject) -> None:
    """The same seed and step give the same values; random numbers come from `step.generator(self)` alone."""
    outcomes = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            state, arrays = random.getstate(), np.random.get_state()
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
            try:
                watcher, found = watched(subject)
            finally:
                random.setstate(state), np.random.set_state(arrays)
        outcomes.append(found)
        demand(
            not watcher.draws,
            f"draws random numbers that do not come from this step's generator: {', '.join(sorted(watcher.draws))}. Use "
            "generator=step.generator(self), made anew in every hook; the hooks of the update draw none",
        )
        demand(
            not watcher.impure,
            f"gives something else when it is called a second time: {', '.join(sorted(watcher.impure))}. Every hook but "
            f"{', '.join(sorted(STATEFUL))} is a pure function",
        )
    demand_same(
        outcomes[0], outcomes[1], "two runs with the same seed differ; use step.generator(self)", rtol=0, atol=0
    )


# about the numbers


def _one_rank(subject: Subject) -> bool:
    return subject.stack().needs("one_rank")


@check("update", "preferences")
def micro_batches(subject: Subject) -> None:
    """Loss and gradient do not depend on the cut into micro-batches."""
    if _one_rank(subject):
        raise Skip("needs.ONE_RANK says that the result depends on how the batch is cut")
    for parts in (2, 7, 1000):
        trial = subject.trial().warm()
        demand_same(
            _plain(subject), trial.outcome(trial.rows(), parts=parts),
            f"after a cut into {parts} micro-batches. Divide by sums over the mini-batch (batch.sum(x) in "
            "prepare_mini_batch, batch.token_weight, batch.sample_weight), and take no statistics of a micro-batch; "
            "needs.together keeps rows in one micro-batch",
        )  # fmt: skip


@check("update", "preferences")
def ranks(subject: Subject) -> None:
    """Loss and gradient do not depend on the number of processes, which share nothing but columns and shared values."""
    if _one_rank(subject):
        raise Skip("needs.ONE_RANK says that the result depends on how the batch is cut")
    message = (
        "with two processes for the update. What prepare_mini_batch shares must be a sum over ranks (batch.sum(x)), and "
        "update hooks know only columns, batch.shared and the configuration, not self.state"
    )
    try:
        trial = subject.trial().warm()
        found = trial.outcome(trial.rows(), ranks=2)
    except Exception as error:
        raise NonConforming(f"{error!r}: {message}") from error
    demand_same(_plain(subject), found, message)


@check("rollouts", "credit", "update", "preferences", "life", optional=True)
def permutation(subject: Subject) -> None:
    """Rows in another order get the same values."""
    trial = subject.trial().warm()
    rows = trial.rows()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    demand_same(
        _plain(subject), trial.outcome(rows.select(order)),
        "after the rows changed places. If the published method goes by the order of rows, write "
        'unless={"permutation": "<why>"}',
    )  # fmt: skip


@check("rollouts", "credit", "update", "preferences", "life", optional=True)
def padding(subject: Subject) -> None:
    """More columns of padding, and what stands in them, change nothing."""
    plain = _plain(subject)
    trial = subject.trial().warm()
    wider = trial.outcome(trial.padded(trial.rows()))
    demand_same(plain, wider, "with three more columns of padding; count tokens by the mask, not by the shape")
    trial = subject.trial().warm()
    found = trial.outcome(trial.padded(trial.rows()), edit=trial.with_rubbish)
    demand_same(plain, found, "with numbers in the padding; multiply by the mask before a sum, a mean or a sort")


@check("credit", "update", "preferences", "life")
def bfloat16(subject: Subject) -> None:
    """Log-probs and entropies in bfloat16 give nearly what the same numbers give in float32."""
    low = subject.trial(dtype=torch.bfloat16).warm()
    demand_same(
        _plain(subject), low.outcome(low.rows()),
        "with log-probs, entropies and values in bfloat16; sum and compare in float32 (x.float())", rtol=0.02,
    )  # fmt: skip


@check()
def gpu(subject: Subject) -> None:
    """Rows on a GPU give what they give on the CPU."""
    if not torch.cuda.is_available():
        raise Skip("this machine has no GPU")
    trial = subject.trial(device="cuda").warm()
    seen: Outcome = {}
    try:
        found = trial.outcome(trial.rows(seen))
    except Exception as error:
        raise NonConforming(f"{error}: make new tensors on the device of those that are given") from error
    plain = subject.trial().warm()
    expected: Outcome = {}
    expected |= plain.outcome(plain.rows(expected))
    demand_same(expected, seen | found, "on a GPU", rtol=1e-3, atol=1e-5)


@check()
def state(subject: Subject) -> None:
    """A run that is saved and loaded goes on as if it had not stopped."""
    before, after = subject.trial().warm(), subject.trial()
    with tempfile.TemporaryDirectory() as folder:
        before.stack.save(f"{folder}/state", 1)
        after.stack.load(f"{folder}/state")
    after.begin(1)
    outcomes = []
    for trial in (before, after):
        seen: Outcome = {}
        found = trial.outcome(trial.rows(seen))
        outcomes.append(seen | found)
    demand_same(
        outcomes[0], outcomes[1],
        "in the step after a restart. What a plugin remembers goes into self.state (init_state names it) or "
        "self.table, never into attributes, module variables or closures", rtol=0, atol=0,
    )  # fmt: skip


def _plain(subject: Subject) -> Outcome:
    assert not isinstance(subject.plain, Exception)
    return subject.plain


class Skip(Exception):
    """The check does not apply; the text says why."""


def run(item: Check, subject: Subject) -> None:
    """One check of one subject; warnings about the made-up rows are left out.

    Raises:
        NonConforming: with what to do.
        Skip: with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not item.once and item.name != "hooks" and isinstance(subject.plain, Exception):
            raise Skip("the plugin cannot take a step; see the check `hooks`")
        try:
            item.run(subject)
        except NonConforming as error:
            options = f" ({subject.options_text})" if subject.options_text and not item.once else ""
            raise NonConforming(
                f"{subject.plugin.name}{options} does not conform, {item.name}: {error}"
            ) from error.__cause__
