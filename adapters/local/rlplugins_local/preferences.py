"""Training on pairs of responses: the preference hooks, in the order of the specification."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplugins.defaults import over_tokens, shuffled
from rlplugins.errors import ConfigurationError, DataError
from rlplugins.needs import Need
from rlplugins.pairs import SIDES, Pairs
from rlplugins.preferences import PairLoss, PairMiniBatch
from rlplugins.rollouts import DECLARED, Column, take
from rlplugins.stack import Stack, StackConfig
from rlplugins.steps import Metrics, Run, generator
from rlplugins.table import PromptTable
from rlplugins.update import moved
from rlplugins_local import output
from rlplugins_local.adapter import build_stack
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import RECORD, PairFile
from rlplugins_local.engine import widened
from rlplugins_local.policy import Policy, Sequences, cut
from rlplugins_local.run import clipped_step, due, make_optimiser

logger = logging.getLogger("rlplugins.local")


class PreferenceTrainer:
    """One run on a pairs file.

    Args:
        config: the settings.
        stack: the plugins, checked.
        policy: the model.
        data: the pairs to train on.
        validation: the pairs to validate on.

    Attributes:
        done: steps made so far.
        seconds: time spent in steps so far.
        updates: optimiser steps made so far.
    """

    def __init__(
        self, config: TrainConfig, stack: Stack, policy: Policy, data: PairFile, validation: PairFile | None
    ) -> None:
        self.config = config
        self.stack = stack
        self.policy = policy
        self.data = PairReader(data, policy, config.max_length)
        self.validation = PairReader(validation, policy, config.max_length) if validation else None
        self.done = self.updates = 0
        self.seconds = 0.0
        pool = data.prompts(PromptTable())
        stack.start(Run(config.steps, 2, 2 * config.batch_size, pool, config.seed, policy.tokenizer))
        if stack.claims("forward"):
            policy.owner = stack.forward
        if stack.needs("column", "ref_log_probs"):
            policy.copy_reference()
        self.optimiser = make_optimiser(config, policy)

    @classmethod
    def prepare(cls, config: TrainConfig, stack_config: StackConfig) -> Callable[[Policy], PreferenceTrainer]:
        """Read the data, and check everything that can be checked without the model."""
        assert config.pairs is not None
        data = PairFile(config.pairs)
        validation = PairFile(config.validation_data) if config.validation_data else None
        stack = build_stack(config, stack_config, data.columns)
        if validation is not None:
            _check_columns(stack.plan.needs(), validation)
        return lambda policy: cls(config, stack, policy, data, validation)

    # one step

    def step(self) -> dict[str, float]:
        """Make one step; gives its metrics."""
        started = time.monotonic()
        config, stack = self.config, self.stack
        stack.begin_step(self.done, config.steps, config.seed)
        if self.policy.reference is not None and stack.reference_policy() == "current":
            self.policy.copy_reference()
        drawn = self.data.read(shuffled(len(self.data), config.batch_size, self.done, config.seed))
        pairs = stack.build_preferences(drawn)
        measured = Metrics()
        before = self.updates
        if len(pairs):
            self.update(pairs, measured)
        metrics = pair_metrics(pairs) | measured.as_dict()
        if self.updates == before:
            logger.warning("step %d: no pair counts, the update is skipped", self.done + 1)
            metrics["update_skipped"] = 1.0
        metrics["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        self.done += 1
        if self.validation is not None and self._validates():
            metrics |= self.validate(self.validation)
        metrics |= stack.metrics.as_dict()
        self.seconds += time.monotonic() - started
        return {"step": self.done, **{name: value for name, value in metrics.items() if math.isfinite(value)}}

    def update(self, pairs: Pairs, measured: Metrics) -> None:
        """Every pass over the pairs, cut into mini-batches."""
        sequences = both_sides(pairs)
        columns = self.columns(pairs, sequences)
        for epoch in range(self.config.epochs):
            for rows in self.mini_batches(len(pairs), epoch):
                self.mini_batch(columns, sequences, rows, measured)

    def columns(self, pairs: Pairs, sequences: Sequences) -> dict[str, Column]:
        """The columns of the update, with the reference's log-probs if there is a reference."""
        columns = self.stack.pair_columns(pairs)
        if self.policy.reference is not None:
            config = self.config
            passes = self.policy.passes(sequences, config.temperature, config.micro_batch_size, reference=True)
            columns |= _by_side("ref_log_probs", passes.log_probs)
        return columns

    def mini_batches(self, count: int, epoch: int) -> Iterator[Tensor]:
        """The pairs of each mini-batch, in a new order in every pass."""
        wanted = min(self.config.mini_batches, count)
        if wanted == 1:
            yield torch.arange(count)
            return
        source = generator(self.config.seed, self.done, "mini_batches", epoch)
        yield from torch.randperm(count, generator=source).tensor_split(wanted)

    def mini_batch(self, columns: Mapping[str, Column], sequences: Sequences, rows: Tensor, measured: Metrics) -> None:
        """One optimiser step, unless no pair counts; pairs with a log-prob that is not finite are left out."""
        asked = len(rows)
        while len(rows):
            metrics, logged = Metrics(), Metrics()
            self.optimiser.zero_grad()
            left_out = self.gradient(columns, sequences, rows, metrics, logged)
            if not bool(left_out.any()):
                break
            rows = rows[~left_out]
        measured.log("dropped", float(asked - len(rows)))
        if not len(rows) or "loss" not in metrics.as_dict():
            return
        measured.merge(metrics)
        self.stack.metrics.merge(logged)
        measured.log("grad_norm", clipped_step(self.config, self.policy, self.optimiser, self.updates))
        self.updates += 1

    def gradient(
        self, columns: Mapping[str, Column], sequences: Sequences, rows: Tensor, metrics: Metrics, logged: Metrics
    ) -> Tensor:
        """The loss of a mini-batch and its gradient; gives the pairs (n,) that have to be left out."""
        mini, mine = self.open(columns, sequences, rows, logged)
        if mini.weightless or bool(mini.dropped.any()):
            return mini.dropped.cpu()
        left_out = torch.zeros(len(rows), dtype=torch.bool)
        totals = {"loss": 0.0, "preference_loss": 0.0, "auxiliary_loss": 0.0}
        for part, loss in self.micro_batches(mini, mine, metrics):
            if loss.total.requires_grad:
                loss.total.backward()
            left_out[part] = loss.broken.cpu()
            for name, value in zip(totals, (loss.total.detach(), loss.preference, loss.auxiliary), strict=True):
                totals[name] += float(value)
        for name, total in totals.items():
            metrics.log(name, total)
        return left_out

    def open(
        self, columns: Mapping[str, Column], sequences: Sequences, rows: Tensor, logged: Metrics
    ) -> tuple[PairMiniBatch, Sequences]:
        """The mini-batch of some pairs, and both sides of them."""
        config, device = self.config, self.policy.device
        mine = sequences.take(_of_both(rows, len(sequences) // 2))
        chosen = {name: take(column, rows) for name, column in columns.items()}
        if self.stack.needs_mini_batch_log_probs:
            current = self.policy.passes(mine, config.temperature, config.micro_batch_size).log_probs
            chosen |= _by_side("log_probs", current)
        shared = moved(self.stack.step.shared_by_all(), device)
        return self.stack.pair_mini_batch(moved(chosen, device), shared, metrics=logged), mine

    def micro_batches(
        self, mini: PairMiniBatch, sequences: Sequences, metrics: Metrics
    ) -> Iterator[tuple[Tensor, PairLoss]]:
        """The rows and the loss of each forward pass, both sides of a pair in the same one."""
        lengths = sequences.lengths.view(2, -1)
        mask = mini.column("chosen_mask")
        assert mask is not None
        for rows in cut(2 * lengths.amax(0), self.config.micro_batch_size):
            part = sequences.take(_of_both(rows, len(mini)))
            made = widened(self.policy.forward(part, self.config.temperature).log_probs, mask.shape[1])
            chosen, rejected = made.chunk(2)
            loss = mini.loss(chosen, rejected, rows)
            measure(mini, rows, chosen.detach(), rejected.detach(), ~loss.broken, metrics)
            yield rows, loss

    # validation

    def _validates(self) -> bool:
        every = 1 if self.stack.needs("validation_every_step") else self.config.validate_every
        return due(self.done, every, self.config.steps)

    def validate(self, reader: PairReader) -> dict[str, float]:
        """Loss and accuracy on all validation pairs, as they stand in the file; plugins see the metrics."""
        pairs = reader.read(torch.arange(len(reader)))
        sequences, metrics = both_sides(pairs), Metrics()
        with torch.no_grad():
            columns = self.columns(pairs, sequences)
            mini, mine = self.open(columns, sequences, torch.arange(len(pairs)), Metrics())
            total = sum(float(loss.preference) for _, loss in self.micro_batches(mini, mine, metrics))
        found = {f"validation/{name}": value for name, value in ({"loss": total} | metrics.as_dict()).items()}
        self.stack.validated(found)
        return found

    # checkpoints

    def save(self, folder: Any) -> None:
        """Write everything that a resumed run needs."""
        notes = {"step": self.done, "version": self.updates, "seconds": self.seconds,
                 "settings": output.settings_of(self.config)}  # fmt: skip
        output.save_checkpoint(folder, self.policy, self.optimiser, self.stack, notes)

    def restore(self, folder: Any, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        output.load_checkpoint(folder, self.policy, self.optimiser, self.stack, notes)
        self.done, self.seconds, self.updates = int(notes["step"]), float(notes["seconds"]), int(notes["version"])


class PairReader:
    """The pairs of a file as tokens.

    Args:
        file: the file.
        policy: whose tokenizer is used.
        max_length: of prompt and response together; longer responses are cut.

    Raises:
        DataError: if a prompt alone is longer.
    """

    def __init__(self, file: PairFile, policy: Policy, max_length: int) -> None:
        self._file = file
        self._policy = policy
        self._max_length = max_length
        self._prompts = file.prompts()

    def __len__(self) -> int:
        return len(self._file)

    def read(self, rows: Tensor) -> Pairs:
        """The pairs at these positions."""
        chosen = self._prompts.select(rows)
        prompts = self._policy.encode(chosen.texts)
        for prompt, text in zip(prompts, chosen.texts, strict=True):
            if len(prompt) >= self._max_length:
                raise DataError(f"{self._file.path}: a prompt has {len(prompt)} tokens, which leaves no room for a response "
                                f"within max_length {self._max_length}: {str(text)[:80]!r}")  # fmt: skip
        sides = {}
        for side in SIDES:
            responses = [getattr(self._file, side)[row] for row in rows.tolist()]
            encoded = self._policy.encode_responses(chosen.texts, responses)
            sides[side] = [
                tokens[: self._max_length - len(prompt)] for prompt, tokens in zip(prompts, encoded, strict=True)
            ]
        width = max(len(tokens) for side in sides.values() for tokens in side)
        fields: dict[str, Any] = {}
        for side, tokens in sides.items():
            fields[side], fields[f"{side}_mask"] = right_padded(tokens, width)
        columns = chosen.columns.take(torch.arange(len(rows)))
        del columns[RECORD]
        return Pairs(prompt_keys=chosen.keys, prompts=prompts, columns=columns, **fields)


def right_padded(rows: Sequence[Sequence[int]], width: int) -> tuple[Tensor, Tensor]:
    """(N, width) token ids, padded on the right with 0, and their mask."""
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
    return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def both_sides(pairs: Pairs) -> Sequences:
    """2 N sequences: the chosen responses, then the rejected ones."""
    responses, mask = torch.cat([pairs.chosen, pairs.rejected]), torch.cat([pairs.chosen_mask, pairs.rejected_mask])
    return Sequences.of([*pairs.prompts, *pairs.prompts], responses, mask)


def measure(
    mini: PairMiniBatch, rows: Tensor, chosen: Tensor, rejected: Tensor, counted: Tensor, metrics: Metrics
) -> None:
    """How policy and reference order the pairs of a micro-batch.

    With a reference a response is worth its log-ratio, without one its mean log-prob (nats).
    """
    worth, reference = {}, False
    for side, log_probs in (("chosen", chosen), ("rejected", rejected)):
        mask, behind = mini.column(f"{side}_mask"), mini.column(f"{side}_ref_log_probs")
        assert mask is not None
        reference, mask = behind is not None, mask[rows.to(mask.device)]
        values = log_probs if behind is None else log_probs - behind[rows.to(mask.device)]
        values = torch.where(mask, values, 0.0)
        worth[side] = over_tokens(values, mask.to(values.dtype), mean=not reference)[counted]
    count = int(counted.sum())
    if count:
        margin = worth["chosen"] - worth["rejected"]
        metrics.log("accuracy", (margin > 0).float().mean(), count)
        metrics.log("margin", margin.mean(), count)
        for side, values in worth.items():
            metrics.log(f"{side}_log_ratio" if reference else f"{side}_log_prob", values.mean(), count)


def pair_metrics(pairs: Pairs) -> dict[str, float]:
    """How many pairs there are, and how long their responses."""
    if not len(pairs):
        return {"pairs": 0.0}
    lengths = {side: float(getattr(pairs, f"{side}_mask").sum(1).float().mean()) for side in SIDES}
    return {"pairs": float(len(pairs)), **{f"{side}_length": length for side, length in lengths.items()}}


def _check_columns(needs: Mapping[Need, Sequence[str]], file: PairFile) -> None:
    """What plugins need of the pairs, those for validation must have too."""
    for need, who in needs.items():
        if need.kind == "column" and need.required and need.value not in DECLARED | set(file.columns):
            raise ConfigurationError(f"{file.path} has no field {need.value!r}, which {', '.join(who)} needs")


def _by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    """Columns (n, T) of the two sides from (2 n, T)."""
    return {f"{side}_{name}": part for side, part in zip(SIDES, values.chunk(2), strict=True)}


def _of_both(rows: Tensor, count: int) -> Tensor:
    """The rows of both sides of some of `count` pairs."""
    return torch.cat([rows, rows + count])
