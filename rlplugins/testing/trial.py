"""A short run of one plugin on made-up rows, without a model: what the conformance kit looks at.

Nothing is drawn at random: every token, score, log-prob and entropy is a function of what it belongs to (prompt, draw,
place, token, step), so that the same rows have the same values in another order, with more padding, in another process
and on another device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.hookspecs import HOOKS
from rlplugins.pairs import Pairs
from rlplugins.plan import PREFERENCES
from rlplugins.plugin import Plugin, Stateful, make
from rlplugins.rollouts import Column, Columns, Requests, Rollouts, Sampling, take
from rlplugins.services import Gradients
from rlplugins.stack import Credit, Stack
from rlplugins.steps import Metrics, Run
from rlplugins.testing.rows import make_pool, make_rollouts
from rlplugins.update import Reducer

SEED = 7
STEPS = 4
POOL = 12
PROMPTS = 6
GROUP_SIZE = 5
TOKENS = 7
END = 1
VOCABULARY = 12
PLACE = "conformance_place"
PASSES = ("old_log_probs", "ref_log_probs", "entropy", "values")
PER_TOKEN = (*PASSES, "rollout_log_probs")

Outcome: TypeAlias = dict[str, Any]
"""What a trial gave, by name: tensors, and lists of plain values."""


@dataclass(frozen=True)
class Subject:
    """A plugin in one configuration.

    Attributes:
        plugin: its class.
        options: the configuration.
        rows: changes the made-up rows where the plugin needs other ones (columns, components, scores, tokens).
        prompts: columns of the prompts, from their number.
    """

    plugin: type[Plugin]
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: Callable[[Any], Any] | None = None
    prompts: Callable[[int], Mapping[str, Column]] | None = None

    def stack(self) -> Stack:
        """A new stack of the plugin alone."""
        return Stack([make(self.plugin, self.options)])

    def trial(self, **settings: Any) -> Trial:
        """A new trial, of responses or of pairs."""
        from rlplugins.testing.pair_trial import PairTrial

        kind = PairTrial if self.stack().plan.objective == PREFERENCES else Trial
        return kind(self, **settings)

    @cached_property
    def phases(self) -> frozenset[str]:
        """The phases in which the plugin has a hook or names a built-in; every phase if it cannot be made."""
        try:
            plan = self.stack().plan
        except Exception:
            return frozenset(hook.phase for hook in HOOKS.values())
        own = {item.hook for item in plan.everything_running() if item.plugin is plan.plugins[0]}
        return frozenset(HOOKS[hook].phase for hook in own | set(plan.plugins[0].uses))

    @cached_property
    def plain(self) -> Outcome | Exception:
        """What a warm trial gives as it is, or the error that ends it."""
        try:
            trial = self.trial().warm()
            return trial.outcome(trial.rows())
        except Exception as error:
            return error

    @property
    def options_text(self) -> str:
        """The configuration as part of a test's name; empty for the defaults."""
        return ",".join(f"{name}={value}" for name, value in self.options.items())


class Trial:
    """One run: `warm` takes a whole step, so that the plugin remembers something, and opens the next.

    Args:
        subject: the plugin and its configuration.
        device: where the rows are.
        dtype: of what a model computes: log-probs, entropies, values.
    """

    def __init__(self, subject: Subject, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.subject, self.device, self.dtype = subject, torch.device(device), dtype
        self.stack = subject.stack()
        self.pool = make_pool(POOL, subject.prompts(POOL) if subject.prompts else None)
        smallest, largest = self.stack.group_sizes
        self.group_size = int(min(max(smallest, GROUP_SIZE), largest))
        budget = PROMPTS * self.group_size
        self.stack.start(Run(STEPS, self.group_size, budget, self.pool, SEED))
        self.number = 0

    @property
    def plugin(self) -> Plugin:
        """The plugin under test."""
        return self.stack.plugins[0]

    def warm(self) -> Trial:
        """A whole step; the next one is open."""
        self.begin(0)
        self.outcome(self.rows())
        self.begin(1)
        return self

    def begin(self, number: int) -> None:
        """Open a step."""
        self.number = number
        self.stack.begin_step(number, STEPS, SEED)
        self.stack.reference_policy()

    def rows(self, seen: Outcome | None = None) -> Rollouts:
        """The rows of the step before any is filtered out; `seen` gets what the hooks of prompts and engine gave."""
        stack = self.stack
        chosen = stack.choose_prompts(self.pool, PROMPTS)
        counts = stack.allocate_rollouts(self.pool.select(chosen), PROMPTS * self.group_size)
        requests = stack.rewrite_prompts(Requests.of(self.pool.select(chosen), counts))
        sampling = stack.sampling_params(requests, self.sampling(len(requests)))
        logits = 3 * made_up(torch.arange(len(requests))[:, None], torch.arange(VOCABULARY)).float().to(self.device)
        numbers = {name: value.to(self.device) for name, value in sampling.numbers.items()}
        processed = stack.process_logits(logits, numbers) if stack.claims("process_logits") else logits
        rollouts = stack.extend_rollouts(self.drawn(requests, self.number), self)
        if seen is not None:
            seen |= {"chosen": chosen, "counts": counts, "texts": list(requests.texts), "logits": processed}
            seen |= {f"numbers.{name}": value for name, value in sampling.numbers.items()}
            seen |= {"temperature": sampling.temperature, "responses": rollouts.responses, "scores": rollouts.scores}
        places = torch.arange(len(rollouts), device=self.device)
        columns = Columns({**rollouts.columns, PLACE: places}, frozenset(rollouts.columns.written))
        return replace(rollouts, columns=columns)

    def drawn(self, requests: Requests, salt: int) -> Rollouts:
        """One response for each request, scored."""
        row = requests.prompts.rows[requests.prompt]
        place = torch.arange(TOKENS)
        length = made_up(row, requests.draw, salt).mul(TOKENS + 1).long()[:, None]
        variant = requests.draw[:, None] % (place + 1)  # beginnings that responses to one prompt share
        tokens = 2 + made_up(row[:, None], variant, place, salt).mul(VOCABULARY - 2).long()
        tokens = torch.where(place == length - 1, END, tokens) * (place < length)
        tool_output = (place == 2) & (length > 4) & (requests.draw[:, None] == 1)
        scores = made_up(requests.draw, salt, row)
        scores[(row % 5 == 0) & (requests.draw == 1)] = torch.nan
        rollouts = make_rollouts(
            scores, requests.prompt, mask=(place < length) & ~tool_output, responses=tokens, pool=requests.prompts,
            columns=requests.columns, version=torch.full_like(row, self.number), old_log_probs=tokens,
        )  # fmt: skip
        rollouts = replace(rollouts, old_log_probs=None)
        rollouts = on_device(self.subject.rows(rollouts) if self.subject.rows else rollouts, self.device)
        return replace(rollouts, rollout_log_probs=self.per_token(rollouts, 9))

    def passes(self, rollouts: Rollouts) -> Rollouts:
        """The rows with what the log-prob passes give them."""
        made: dict[str, Any] = {name: self.per_token(rollouts, 10 + place) for place, name in enumerate(PASSES)}
        made["entropy"] = made["entropy"].neg()
        return replace(rollouts, **made)

    def current(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (B, T) under the updated policy."""
        old = self.per_token(rollouts, 10).double()
        change = (made_up(rollouts.responses, rollouts.prompt_rows[:, None], 20) - 0.5) * rollouts.mask
        return (old + change).clamp(max=0).bfloat16().to(self.dtype), -self.per_token(rollouts, 21)

    def per_token(self, rollouts: Rollouts, salt: int) -> Tensor:
        """Negative numbers (B, T), 0 outside of the mask, that bfloat16 can hold exactly."""
        places = torch.arange(rollouts.mask.shape[1], device=self.device)
        values = -0.05 - 2 * made_up(rollouts.responses, rollouts.prompt_rows[:, None], places, salt)
        return (values * rollouts.mask).bfloat16().to(self.dtype)

    def outcome(
        self, rollouts: Rollouts, edit: Callable[[Rollouts], Rollouts] | None = None, parts: int = 1, ranks: int = 1
    ) -> Outcome:  # fmt: skip
        """What becomes of the rows from the filter to the end of the step, in the order of their places.

        Args:
            rollouts: rows as `rows` gives them.
            edit: changes the rows after the log-prob passes.
            parts: micro-batches of the update on each rank.
            ranks: processes of the update.
        """
        kept = self.stack.filter_rollouts(rollouts) if len(rollouts) else rollouts
        found: Outcome = {"kept": kept.columns[PLACE]}
        credit = None
        if len(kept):
            kept = self.passes(kept)
            kept = edit(kept) if edit else kept
            credit = self.stack.credit(kept, self)
            found |= {name: getattr(credit, name) for name in ("rewards", "advantages", "weights", "token_weights",
                                                              "segments", "value_targets")}  # fmt: skip
            found |= self.update(kept, credit, parts, ranks)
        self.stack.end_step(kept, credit, self)
        self.stack.validated({"reward": 0.5, "entropy": 0.8}, self)
        return self.in_places(found, kept, credit) | self.remembered()

    def in_places(self, found: Outcome, kept: Rollouts, credit: Credit | None) -> Outcome:
        """Values of rows in the order of the rows' places, 0 outside of the mask; groups as the first place in them."""
        places = kept.columns[PLACE]
        assert isinstance(places, Tensor)
        order, mask = torch.argsort(places), kept.mask
        arranged: Outcome = {}
        for name, value in found.items():
            for part, item in enumerate(value if isinstance(value, tuple) else (value,)):
                if isinstance(item, Tensor) and item.dim():
                    item = torch.where(mask, item, 0)[order] if item.shape == mask.shape else item[order]
                if item is not None:
                    arranged[name + "'" * part] = item
        if credit is not None:
            groups = ops.dense_groups(credit.groups)[0][order]
            first = torch.full((len(groups) + 1,), len(groups), device=groups.device)
            firsts = first.scatter_reduce(0, groups + 1, torch.arange(len(groups), device=groups.device), "amin")
            arranged["groups"] = torch.where(groups >= 0, firsts[groups + 1], -1)
        return arranged

    def remembered(self) -> Outcome:
        """The plugin's state and its columns of the prompt table."""
        found = dict(flattened("state", self.plugin.state.as_dict()))
        prefix = f"{self.plugin.name}/"
        for name in (name for name in self.pool.table if name.startswith(prefix)):
            try:
                found[f"table.{name}"] = self.pool.table[name].clone()
            except KeyError:
                found[f"table.{name}"] = self.pool.table.ragged(name).read(self.pool.rows)[0]
        return found

    # changes of the rows

    def padded(self, rollouts: Rollouts, more: int = 3) -> Rollouts:
        """The rows with more columns of padding."""
        changed = {name: wider(getattr(rollouts, name), more) for name in ("responses", "mask", *PER_TOKEN)}
        return replace(rollouts, **changed)

    def with_rubbish(self, rollouts: Rollouts) -> Rollouts:
        """The rows with numbers in the padding that nobody may read; an `edit` of `outcome`."""
        after = padding_of(rollouts.mask)
        changed: dict[str, Any] = {name: torch.where(after, 3.0, getattr(rollouts, name)) for name in PER_TOKEN}
        changed["responses"] = torch.where(after, VOCABULARY + 1, rollouts.responses)
        return replace(rollouts, **changed)

    def smallest(self, rollouts: Rollouts) -> dict[str, Rollouts]:
        """The least that there can be, by name."""
        parts = rollouts.components
        missing: dict[str, Any] = {
            "scores": torch.full_like(rollouts.scores, torch.nan),
            "components": None if parts is None else torch.full_like(parts, torch.nan),
        }
        return {
            "one response": rollouts.select(torch.tensor([0])),
            "responses of one token": replace(
                rollouts,
                **{name: getattr(rollouts, name)[:, :1] for name in ("responses", "mask", "rollout_log_probs")},
            ),
            "empty responses": replace(rollouts, mask=torch.zeros_like(rollouts.mask)),
            "responses without a reward": replace(rollouts, **missing),
            "no response": rollouts.select(torch.tensor([], dtype=torch.int64)),
        }

    # the update

    def update(self, rollouts: Rollouts, credit: Credit, parts: int = 1, ranks: int = 1) -> Outcome:
        """Loss of the step as one mini-batch, and its gradients.

        Args:
            rollouts: rows with their passes.
            credit: theirs.
            parts: micro-batches on each rank.
            ranks: processes of the update. More than one: each has a plugin of its own, without state.
        """
        columns = self.stack.update_columns(rollouts, credit)
        leaves = [values.detach().clone().requires_grad_() for values in self.current(rollouts)]
        stacks = [self.stack if ranks == 1 else self.subject.stack() for _ in range(ranks)]

        def opened(rank: int, rows: Tensor, reduce: Reducer | None) -> Callable[[Tensor], Tensor]:
            mini = stacks[rank].mini_batch(
                {name: take(column, rows) for name, column in columns.items()}, self.shared(), kinds=rollouts.kinds,
                reduce=reduce, log_probs=leaves[0].detach()[rows], metrics=self.metrics(ranks),
            )  # fmt: skip
            with_entropy = stacks[rank].takes("entropy", "update")
            return lambda part: (
                mini.loss(leaves[0][rows[part]], part, entropy=leaves[1][rows[part]] if with_entropy else None).total
            )

        total = summed(self.units(rollouts, credit), parts, ranks, opened)
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return {"loss": total, "gradient": gradients[0], "entropy_gradient": gradients[1]}

    def shared(self) -> dict[str, dict[str, Any]]:
        """What a process of the update gets of the shared values."""
        return {name: dict(values) for name, values in self.stack.step.shared_by_all().items()}

    def metrics(self, ranks: int) -> Metrics:
        """Where the update of one rank logs."""
        return self.stack.metrics if ranks == 1 else Metrics()

    def units(self, rollouts: Rollouts, credit: Credit) -> Tensor:
        """(B,) rows of the same number must share a micro-batch."""
        alone = torch.arange(len(rollouts), device=self.device)
        units = alone
        for by, numbers in (("prompt", rollouts.groups), ("group", credit.groups)):
            if self.stack.needs("together", by):
                units = ops.joined(units, torch.where(numbers >= 0, numbers, -1))
        return units

    # the engine

    def sampling(self, rows: int) -> Sampling:
        """See `rlplugins.services.Engine`, as the following."""
        return Sampling.of(rows, 1.0, TOKENS)

    def generate(
        self, requests: Requests, sampling: Sampling | None = None, *, score: bool = True, greedy: bool = False
    ) -> Rollouts:
        """Other responses than the step's own."""
        drawn = self.drawn(requests, 100 + self.number)
        return drawn if score else replace(drawn, scores=torch.full_like(drawn.scores, torch.nan))

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor, *, policy: str = "current"
    ) -> Tensor:
        """A function of prompt, token and policy."""
        prompt = torch.tensor([sum(ids) for ids in prompts], device=responses.device)[:, None]
        salt = 30 if policy == "reference" else 31 + self.number
        return ((-0.05 - 2 * made_up(responses, prompt, salt)) * mask).float()

    def given(self, requests: Requests, responses: Sequence[str], *, score: bool = True) -> Rollouts:
        """Tokens that are functions of the letters."""
        drawn = self.generate(requests, score=score)
        codes = [[2 + ord(letter) % (VOCABULARY - 2) for letter in text[: TOKENS - 1]] + [END] for text in responses]
        tokens = torch.tensor([row + [0] * (TOKENS - len(row)) for row in codes], device=self.device)
        mask = tokens != 0
        return replace(drawn, responses=tokens, mask=mask, rollout_log_probs=0.0 * mask, prefix=None)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The tokens as numbers."""
        rows = zip(rollouts.responses.tolist(), rollouts.mask.tolist(), strict=True)
        return [" ".join(str(token) for token, own in zip(*row, strict=True) if own) for row in rows]

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """Gram matrix of the advantages themselves."""
        flat = torch.stack([(item * rollouts.mask).flatten() for item in advantages]).double()
        return Gradients(flat @ flat.T, flat.norm(dim=1), 1e-3)


class _Ranks:
    """Threads in the place of processes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count, timeout=10)
        self.lock = threading.Lock()
        self.given: list[Tensor] = [torch.zeros(())] * count

    def reducer(self, rank: int) -> Callable[[Tensor], Tensor]:
        """Adds over all ranks."""

        def reduce(values: Tensor) -> Tensor:
            self.given[rank] = values
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            self.barrier.wait()
            return total

        return reduce

    def results(self, work: Callable[[int], Tensor]) -> list[Tensor]:
        """What each rank returns; the first error that is not about another rank's is raised."""
        if self.count == 1:
            return [work(0)]
        with ThreadPoolExecutor(self.count) as pool:
            running = [pool.submit(work, rank) for rank in range(self.count)]
        errors = [task.exception() for task in running if task.exception()]
        errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if errors and errors[0] is not None:
            raise errors[0]
        return [task.result() for task in running]


def summed(
    units: Tensor, parts: int, ranks: int,
    opened: Callable[[int, Tensor, Reducer | None], Callable[[Tensor], Tensor]],
) -> Tensor:  # fmt: skip
    """The loss over ranks and micro-batches, after the backward pass of each.

    Args:
        units: (B,) rows of the same number share a micro-batch.
        parts: micro-batches on each rank.
        ranks: threads in the place of processes.
        opened: opens the mini-batch of a rank, from its number, its rows and its reduction, and returns the loss of some of
            these rows.
    """
    everywhere = _Ranks(ranks)
    shares = cut(units, ranks)

    def on_rank(rank: int) -> Tensor:
        try:
            loss_of = opened(rank, shares[rank], everywhere.reducer(rank) if ranks > 1 else None)
        except BaseException:
            everywhere.barrier.abort()
            raise
        total = torch.zeros((), device=units.device)
        for part in cut(units[shares[rank]], parts):
            loss = loss_of(part)
            if loss.requires_grad:
                with everywhere.lock:
                    loss.backward()
            total = total + loss.detach()
        return total

    return torch.stack(everywhere.results(on_rank)).sum(0)


def made_up(*keys: Tensor | int) -> Tensor:
    """Numbers in [0, 1), float64, that look random: a function of integers, broadcast together."""
    mixed: Any = 0.5
    for place, key in enumerate(keys):
        value = key.double() if isinstance(key, Tensor) else float(key)
        mixed = mixed + (value + 1) * (12.9898 + 65.2439 * place)
    scaled = torch.as_tensor(mixed).sin() * 43758.5453
    return scaled - scaled.floor()


def cut(units: Tensor, parts: int) -> list[Tensor]:
    """Positions of the rows in so many parts, (n,) int64 each, in an order of their own; whole units, no part empty."""
    dense = torch.unique(units, return_inverse=True)[1]
    if parts == 1:
        return [torch.arange(len(units), device=units.device)]
    found = [(dense % parts == part).nonzero().flatten().flip(0) for part in range(parts)]
    return [rows for rows in found if len(rows)]


def on_device(rollouts: Rollouts, device: torch.device) -> Rollouts:
    """The rows with every tensor on this device."""
    moved: dict[str, Any] = {
        item.name: value.to(device)
        for item in fields(rollouts) if isinstance(value := getattr(rollouts, item.name), Tensor)
    }  # fmt: skip
    columns = {
        name: column.to(device) if isinstance(column, Tensor) else column for name, column in rollouts.columns.items()
    }
    return replace(rollouts, columns=Columns(columns, frozenset(rollouts.columns.written)), **moved)


def wider(column: Tensor | None, more: int) -> Any:
    """A column (B, T) with more columns of padding."""
    return None if column is None else torch.nn.functional.pad(column, (0, more))


def padding_of(mask: Tensor) -> Tensor:
    """What comes after the last token of each row, (B, T) bool."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return places > torch.where(mask, places, -1).amax(1, keepdim=True)


def flattened(name: str, value: Any) -> list[tuple[str, Any]]:
    """Tensors and plain values inside of a nested value, with their names."""
    if isinstance(value, Stateful):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flattened(f"{name}.{key}", item)]
    if isinstance(value, list | tuple):
        return [pair for key, item in enumerate(value) for pair in flattened(f"{name}.{key}", item)]
    if isinstance(value, Rollouts):
        parts = {item.name: object.__getattribute__(value, item.name) for item in fields(value)}
        return flattened(name, {key: part for key, part in parts.items() if key not in ("columns", "guard")})
    if isinstance(value, Requests | Sampling | Pairs):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
        return flattened(name, {key: part for key, part in parts.items() if key not in ("prompts", "columns", "guard")})
    return [(name, value.clone() if isinstance(value, Tensor) else value)]
