"""The training loop: every hook, in the order of the specification."""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rlplugins import ops
from rlplugins.errors import ConfigurationError
from rlplugins.rollouts import POLICY, Column, Prompts, Requests, Rollouts, take
from rlplugins.stack import Credit, Stack, StackConfig
from rlplugins.steps import Run, generator
from rlplugins.table import PromptTable
from rlplugins.update import MiniBatch, moved, probability_ratio
from rlplugins_local import output
from rlplugins_local.adapter import build_stack, group_size
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.engine import LocalEngine, warmth, widened
from rlplugins_local.policy import Policy, Sequences, cut

logger = logging.getLogger("rlplugins.local")


class Training(Protocol):
    """A run that makes one step at a time."""

    done: int
    seconds: float

    def step(self) -> dict[str, float]:
        """Make one step; gives its metrics."""

    def save(self, folder: Any) -> None:
        """Write everything that a resumed run needs."""

    def restore(self, folder: Any, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""


Prepare: TypeAlias = Callable[[TrainConfig, StackConfig], Callable[[Policy], Training]]
"""Reads the data and checks what can be checked before the model is loaded."""


def run(config: TrainConfig, stack_config: StackConfig, prepare: Prepare, progress: bool) -> dict[str, Any]:
    """Train from the first step or the newest checkpoint to the last step; see `rlplugins_local.train`."""
    device = prepare_torch(config)
    start = prepare(config, stack_config)
    folder = output.RunFolder(config, stack_config)
    checkpoint = folder.checkpoint() if config.resume else None
    notes = output.read_notes(checkpoint, config) if checkpoint else None
    settings = config.model_dump(mode="json")
    trackers = output.Trackers(config.report_to, folder.path, _flat(settings))
    policy = Policy.load(checkpoint or config.model, device, getattr(torch, config.dtype))
    trainer = start(policy)
    if checkpoint and notes:
        trainer.restore(checkpoint, notes)
    metrics = folder.truncate_metrics(trainer.done)
    with output.display(config.steps, trainer.done, progress) as display:
        while trainer.done < config.steps:
            metrics = trainer.step()
            folder.add_metrics(metrics)
            trackers.log({name: value for name, value in metrics.items() if name != "step"}, trainer.done)
            display.show(trainer.done, metrics)
            if due(trainer.done, config.checkpoint_every, config.steps):
                with folder.new_checkpoint(trainer.done) as writing:
                    trainer.save(writing)
    trackers.finish()
    folder.finish(metrics, trainer.seconds)
    return metrics


def prepare_torch(config: TrainConfig) -> torch.device:
    """Seeds, threads, and the device.

    Raises:
        ConfigurationError: if there is no such device.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name!r} cannot be used here: {error}") from None
    return device


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in settings.items()
    }


class LocalTrainer:
    """One run.

    Args:
        config: the settings.
        stack: the plugins, checked.
        policy: the model.
        data: the prompts to train on.
        validation: the prompts to validate on.
        scorer: the reward function.

    Attributes:
        done: steps made so far.
        seconds: time spent in steps so far.
    """

    def __init__(
        self, config: TrainConfig, stack: Stack, policy: Policy, data: PromptFile, validation: PromptFile | None,
        scorer: Scorer,
    ) -> None:  # fmt: skip
        self.config = config
        self.stack = stack
        self.policy = policy
        self.scorer = scorer
        self.engine = LocalEngine(config, policy, stack, scorer)
        self.done = 0
        self.seconds = 0.0
        self.pool: Prompts = data.prompts(PromptTable())
        self.validation = validation.prompts() if validation else None
        size = group_size(config, stack)
        self.prompts_per_step = max(1, config.batch_size // size)
        stack.start(Run(config.steps, size, config.batch_size, self.pool, config.seed, policy.tokenizer))
        if stack.claims("forward"):
            policy.owner = stack.forward
        if stack.takes("ref_log_probs") or stack.needs("column", "ref_log_probs"):
            policy.copy_reference()
        self.has_critic = stack.takes("values") or stack.needs("column", "values")
        if self.has_critic:
            policy.add_value_head()
        self.optimiser = make_optimiser(config, policy)
        self.updates_need_entropy = stack.takes("entropy", "update")
        self.needs_entropy = stack.needs("column", "entropy")
        self.needs_together = stack.needs("together")
        self.needs_groups_together = stack.needs("together", "group")
        self.needs_mini_batch_log_probs = stack.needs_mini_batch_log_probs

    @classmethod
    def prepare(cls, config: TrainConfig, stack_config: StackConfig) -> Callable[[Policy], LocalTrainer]:
        """Read the data, and check everything that can be checked without the model."""
        assert config.data is not None and config.reward is not None
        data = PromptFile(config.data)
        validation = PromptFile(config.validation_data) if config.validation_data else None
        stack = build_stack(config, stack_config, data.columns)
        size = group_size(config, stack)
        if config.batch_size < size:
            raise ConfigurationError(f"batch_size {config.batch_size} is less than one prompt's {size} responses")
        scorer = Scorer(config.reward, list(data.columns))
        return lambda policy: cls(config, stack, policy, data, validation, scorer)

    # one step

    def step(self) -> dict[str, float]:
        """Make one step; gives its metrics."""
        started = time.monotonic()
        config, stack = self.config, self.stack
        number = self.done
        stack.begin_step(number, config.steps, config.seed)
        self.engine.begin_step(number)
        if self.policy.reference is not None and stack.reference_policy() == "current":
            self.policy.copy_reference()
        drawn = self.draw()
        extended = stack.extend_rollouts(drawn, self.engine)
        rollouts = stack.filter_rollouts(extended) if len(extended) else extended
        credit, update = None, UpdateMetrics(self.policy.device)
        if len(rollouts):
            rollouts = self.add_passes(rollouts)
            credit = stack.credit(rollouts, self.engine)
            update = self.update(rollouts, credit)
        self.engine.version += update.optimiser_steps
        stack.end_step(rollouts, credit, self.engine)
        metrics = rollout_metrics(extended, rollouts, credit) | update.as_dict()
        if not update.optimiser_steps:
            logger.warning("step %d: no response counts, the update is skipped", number + 1)
        metrics["learning_rate"] = self.optimiser.param_groups[0]["lr"]
        self.done += 1
        if self.validation is not None and self._validates():
            metrics |= self.validate()
        metrics |= stack.metrics.as_dict()
        self.seconds += time.monotonic() - started
        return {"step": self.done, **{name: value for name, value in metrics.items() if math.isfinite(value)}}

    def draw(self) -> Rollouts:
        """Choose prompts, draw responses and score them."""
        stack = self.stack
        chosen = self.pool.select(stack.choose_prompts(self.pool, self.prompts_per_step))
        counts = stack.allocate_rollouts(chosen, self.config.batch_size)
        requests = stack.rewrite_prompts(Requests.of(chosen, counts))
        sampling = stack.sampling_params(requests, self.engine.sampling(len(requests)))
        return self.engine.generate(requests, sampling)

    def add_passes(self, rollouts: Rollouts) -> Rollouts:
        """Old and reference log-probs, values and entropies, as far as the stack takes them."""
        config, stack = self.config, self.stack
        sequences = Sequences.of(rollouts.prompts, rollouts.responses, rollouts.mask)
        units = torch.unique(rollouts.prompt_keys, return_inverse=True)[1] if self.needs_together else None
        arguments = (sequences, config.temperature, config.micro_batch_size, units)
        old = self.policy.passes(*arguments, entropy=True, values=self.has_critic)
        stack.metrics.log("entropy", _mean(old.entropy, rollouts.mask))
        columns: dict[str, Any] = {"old_log_probs": old.log_probs, "values": old.values}
        if self.needs_entropy:
            columns["entropy"] = old.entropy
        if self.policy.reference is not None:
            columns["ref_log_probs"] = self.policy.passes(*arguments, reference=True).log_probs
            difference = (columns["ref_log_probs"] - old.log_probs).clamp(-20, 20)
            stack.metrics.log("kl", _mean(difference.exp() - difference - 1, rollouts.mask))
        return replace(rollouts, **columns)

    # update

    def update(self, rollouts: Rollouts, credit: Credit) -> UpdateMetrics:
        """Every pass over the batch, cut into mini-batches."""
        columns = self.stack.update_columns(rollouts, credit)
        sequences = Sequences.of(rollouts.prompts, rollouts.responses, rollouts.mask)
        units = self.units(rollouts, credit.groups)
        metrics = UpdateMetrics(self.policy.device)
        for epoch in range(self.config.epochs):
            for rows in self.mini_batches(units, epoch):
                self.mini_batch(rollouts, columns, sequences, units, rows, metrics)
        return metrics

    def mini_batch(
        self, rollouts: Rollouts, columns: Mapping[str, Column], sequences: Sequences, units: Tensor, rows: Tensor,
        metrics: UpdateMetrics,
    ) -> None:  # fmt: skip
        """One optimiser step, unless no row counts."""
        config, stack, device = self.config, self.stack, self.policy.device
        whole = len(rows) == len(rollouts)
        mine = sequences if whole else sequences.take(rows)
        width = rollouts.mask.shape[1]
        current = None
        if self.needs_mini_batch_log_probs and metrics.optimiser_steps:
            passes = self.policy.passes(mine, config.temperature, config.micro_batch_size)
            current = widened(passes.log_probs, width).to(device)
        if not whole:
            columns = {name: take(column, rows) for name, column in columns.items()}
        columns = moved(columns, device)
        shared = moved(stack.step.shared_by_all(), device)
        mini = stack.mini_batch(columns, shared, kinds=rollouts.kinds, log_probs=current)
        if mini.weightless:
            return
        self.optimiser.zero_grad()
        together = units[rows] if self.needs_together else None
        old = columns["old_log_probs"]
        assert isinstance(old, Tensor)
        for part in cut(mine.lengths, config.micro_batch_size, together):
            self.micro_batch(mini, mine, old, part, "value_targets" in columns, metrics)
        self.optimiser_step(metrics)

    def micro_batch(
        self, mini: MiniBatch, sequences: Sequences, old_log_probs: Tensor, rows: Tensor, critic: bool,
        metrics: UpdateMetrics,
    ) -> None:  # fmt: skip
        """Forward and backward of some rows of the mini-batch."""
        width = old_log_probs.shape[1]
        whole = len(rows) == len(sequences)
        part = sequences if whole else sequences.take(rows)
        output = self.policy.forward(part, self.config.temperature, entropy=self.updates_need_entropy, values=critic)
        entropy = widened(output.entropy, width) if output.entropy is not None else None
        index = None if whole else rows
        log_probs = widened(output.log_probs, width)
        loss = mini.loss(log_probs, index, entropy=entropy)
        total = loss.total
        if critic and output.values is not None:
            value_loss = mini.value_loss(widened(output.values, width), index)
            metrics.add(value_loss=value_loss)
            total = total + value_loss
        if total.requires_grad:
            total.backward()
        metrics.add(loss=loss.total, policy_loss=loss.policy, kl_loss=loss.kl, auxiliary_loss=loss.auxiliary)
        old = old_log_probs if whole else old_log_probs[rows.to(old_log_probs.device)]
        metrics.add_ratio(log_probs.detach(), old, part.mask)

    def optimiser_step(self, metrics: UpdateMetrics) -> None:
        """Clip the gradient and step."""
        norm = clipped_step(self.config, self.policy, self.optimiser, self.engine.version + metrics.optimiser_steps)
        metrics.optimiser_steps += 1
        metrics.add(grad_norm=norm)

    def units(self, rollouts: Rollouts, groups: Tensor) -> Tensor:
        """(B,) rows of the same number stay in one mini-batch: those of a prompt; of a group too, if a plugin says so."""
        prompts = torch.unique(rollouts.prompt_keys, return_inverse=True)[1]
        return ops.joined(prompts, groups) if self.needs_groups_together else prompts

    def mini_batches(self, units: Tensor, epoch: int) -> Iterator[Tensor]:
        """The rows of each mini-batch, in their order: whole units, in a new order in every pass."""
        wanted = self.config.mini_batches
        if wanted == 1:
            yield torch.arange(len(units))
            return
        dense = torch.unique(units, return_inverse=True)[1]
        sizes = torch.bincount(dense)
        source = generator(self.config.seed, self.done, "mini_batches", epoch)
        order = torch.randperm(len(sizes), generator=source)
        ends = sizes[order].cumsum(0)
        middle = ends - sizes[order] / 2
        batch = torch.empty(len(sizes), dtype=torch.int64)
        batch[order] = (middle * wanted / len(units)).long().clamp(max=wanted - 1)
        for place in range(wanted):
            rows = (batch[dense] == place).nonzero().flatten()
            if len(rows):
                yield rows

    # validation

    def _validates(self) -> bool:
        every = 1 if self.stack.needs("validation_every_step") else self.config.validate_every
        return due(self.done, every, self.config.steps)

    def validate(self) -> dict[str, float]:
        """Greedy responses to every validation prompt; plugins see the metrics."""
        assert self.validation is not None
        prompts = self.validation
        requests = Requests.of(prompts, torch.ones(len(prompts), dtype=torch.int64))
        rollouts = self.engine.generate(requests, greedy=True)
        metrics = {f"validation/{name}": value for name, value in score_metrics(rollouts).items()}
        self.stack.validated(metrics, self.engine)
        return metrics

    # checkpoints

    def save(self, folder: Any) -> None:
        """Write everything that a resumed run needs."""
        notes = {
            "step": self.done, "version": self.engine.version, "seconds": self.seconds,
            "components": list(self.scorer.component_names), "settings": output.settings_of(self.config),
        }  # fmt: skip
        output.save_checkpoint(folder, self.policy, self.optimiser, self.stack, notes)

    def restore(self, folder: Any, notes: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        output.load_checkpoint(folder, self.policy, self.optimiser, self.stack, notes)
        self.done, self.seconds = int(notes["step"]), float(notes["seconds"])
        self.engine.version = int(notes["version"])
        self.scorer.component_names = tuple(notes["components"])


def make_optimiser(config: TrainConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW on the model and, with its own learning rate, on the value head."""
    groups: list[dict[str, Any]] = [
        {"params": list(policy.model.parameters()), "lr": config.learning_rate, "weight_decay": config.weight_decay}
    ]
    if policy.value_head is not None:
        groups.append(
            {"params": list(policy.value_head.parameters()), "lr": config.value_learning_rate, "weight_decay": 0.0}
        )
    for group in groups:
        group["initial_lr"] = group["lr"]
    return torch.optim.AdamW(groups, fused=True)


def clipped_step(config: TrainConfig, policy: Policy, optimiser: torch.optim.Optimizer, made: int) -> Tensor:
    """Clip the gradient, set the learning rate and step; gives the gradient's length before.

    Args:
        config: the settings.
        policy: the model.
        optimiser: its optimiser.
        made: optimiser steps so far.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), config.max_grad_norm)
    if policy.value_head is not None:
        torch.nn.utils.clip_grad_norm_(policy.value_head.parameters(), config.max_grad_norm)
    warm = warmth(config, made)
    for group in optimiser.param_groups:
        group["lr"] = group["initial_lr"] * warm
    optimiser.step()
    return norm


class UpdateMetrics:
    """What the update measured."""

    def __init__(self, device: torch.device) -> None:
        self.optimiser_steps = 0
        self._sums: dict[str, Any] = {}
        self._ratio = torch.zeros(2, device=device)
        self._largest = torch.zeros((), device=device)

    def add(self, **values: Tensor) -> None:
        """Add to the sums; their means are taken over optimiser steps."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()

    def add_ratio(self, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> None:
        """Mean and largest ratio of the policies over the tokens."""
        mask = widened(mask, log_probs.shape[1]).to(log_probs.device)
        ratio = probability_ratio(log_probs, old_log_probs) * mask
        self._ratio = self._ratio + torch.stack([ratio.sum(), mask.sum()])
        self._largest = torch.maximum(self._largest, ratio.max())

    def as_dict(self) -> dict[str, float]:
        """The means, and whether the update was skipped."""
        means = {name: float(total) / max(1, self.optimiser_steps) for name, total in self._sums.items()}
        if not self.optimiser_steps:
            return {"update_skipped": 1.0}
        total, count = self._ratio.tolist()
        return means | {"ratio": total / max(1.0, count), "ratio/max": float(self._largest)}


def score_metrics(rollouts: Rollouts) -> dict[str, float]:
    """Mean score and components, and the length of the responses."""
    metrics = {"reward": float(rollouts.scores.nanmean())}
    if rollouts.components is not None:
        means = rollouts.components.nanmean(0).tolist()
        metrics |= {f"reward/{name}": mean for name, mean in zip(rollouts.component_names, means, strict=True)}
    metrics["response_length"] = float(rollouts.mask.sum(1).float().mean())
    return metrics


def rollout_metrics(everything: Rollouts, rollouts: Rollouts, credit: Credit | None) -> dict[str, float]:
    """Scores and lengths of all rows of the kind `policy`, and the share of advantages that are 0."""
    drawn = everything.select(everything.of_kind(POLICY))
    if not len(drawn):
        return {}
    metrics = score_metrics(drawn)
    finite = drawn.scores[drawn.scores.isfinite()]
    metrics["reward_std"] = float(finite.std()) if len(finite) > 1 else 0.0
    metrics["tokens"] = float(everything.mask.sum())
    if credit is not None:
        metrics["zero_advantage"] = float((credit.advantages == 0).all(1).float().mean())
    return metrics


def _mean(values: Tensor | None, mask: Tensor) -> Tensor:
    assert values is not None
    return (values * mask).sum() / mask.sum().clamp(min=1)
