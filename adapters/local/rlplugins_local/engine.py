"""The engine: generation, scoring and log-probs for the trainer and for hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlplugins.errors import ServiceError
from rlplugins.rollouts import Columns, Requests, Rollouts, Sampling, take, texts_of
from rlplugins.services import Gradients, chosen_parameters
from rlplugins.stack import Stack
from rlplugins.steps import Metrics, generator
from rlplugins.together import units_of
from rlplugins.update import moved
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import RECORD, Scorer
from rlplugins_local.policy import Policy, ProcessLogits, Sequences, cut


class LocalEngine:
    """`rlplugins.services.Engine` on the trainer's own model.

    Args:
        config: the settings.
        policy: the model.
        stack: whose `process_logits` is called.
        scorer: the reward function.

    Attributes:
        version: number of optimiser steps that the model has made.
    """

    def __init__(self, config: TrainConfig, policy: Policy, stack: Stack, scorer: Scorer) -> None:
        self.version = 0
        self._config = config
        self._policy = policy
        self._stack = stack
        self._scorer = scorer
        self._process: ProcessLogits | None = stack.process_logits if stack.claims("process_logits") else None
        self._keeps_log_probs = stack.needs("column", "rollout_log_probs")
        self._step = self._calls = 0

    def begin_step(self, number: int) -> None:
        """Random numbers depend on the step and on the number of calls in it."""
        self._step, self._calls = number, 0

    def sampling(self, rows: int) -> Sampling:
        """The run's own parameters for so many rows."""
        return Sampling.of(rows, self._config.temperature, self._config.max_new_tokens, self._config.top_p)

    def generate(
        self, requests: Requests, sampling: Sampling | None = None, *, score: bool = True, greedy: bool = False
    ) -> Rollouts:
        """Draw one response per request from the current policy and score it; see `rlplugins.services.Engine`."""
        sampling = sampling or self.sampling(len(requests))
        prompts = self._policy.encode(requests.texts)
        prefixes = self._policy.encode_prefixes(requests.prefixes)
        size = self._config.generation_batch_size or max(1, len(requests))
        drawn = []
        for rows in torch.arange(len(requests)).split(size):
            self._calls += 1
            seed = generator(self._config.seed, self._step, "engine", self._calls).initial_seed()
            drawn.append(
                self._policy.generate(
                    _pick(prompts, rows), _pick(prefixes, rows), sampling_rows(sampling, rows), seed,
                    greedy=greedy, process=self._process,
                )
            )  # fmt: skip
        width = max(part.responses.shape[1] for part in drawn)
        columns = {name: _joined([getattr(part, name) for part in drawn], width)
                   for name in ("responses", "mask", "log_probs")}  # fmt: skip
        prefix = None
        if any(part.prefix is not None for part in drawn):
            prefix = _joined([_or_false(part.prefix, part.mask) for part in drawn], width)
        rollouts = self._rollouts(requests, prompts, columns, prefix)
        return self.score(rollouts, requests) if score else rollouts

    def given(self, requests: Requests, responses: Sequence[str], *, score: bool = True) -> Rollouts:
        """Rows of responses that something else has written; see `rlplugins.services.Engine`."""
        prompts = self._policy.encode(requests.texts)
        encoded = self._policy.encode_responses(requests.texts, responses)
        encoded = [row[: self._config.max_new_tokens] for row in encoded]
        width = max(map(len, encoded), default=1)
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in encoded], dtype=torch.int64)
        mask = torch.arange(width) < torch.tensor([len(row) for row in encoded])[:, None]
        columns = {"responses": tokens.view(mask.shape), "mask": mask, "log_probs": torch.zeros(mask.shape)}
        rollouts = self._rollouts(requests, prompts, columns, None)
        return self.score(rollouts, requests) if score else rollouts

    def _rollouts(
        self, requests: Requests, prompts: list[list[int]], columns: Mapping[str, Tensor], prefix: Tensor | None
    ) -> Rollouts:
        rows = len(requests)
        return Rollouts(
            prompt_keys=requests.prompts.keys[requests.prompt],
            prompt_rows=requests.prompts.rows[requests.prompt],
            groups=requests.prompt.clone(),
            prompts=prompts,
            responses=columns["responses"],
            mask=columns["mask"],
            scores=torch.full((rows, 1), torch.nan),
            kind=torch.zeros(rows, dtype=torch.int8),
            version=torch.full((rows,), self.version),
            rollout_log_probs=columns["log_probs"] if self._keeps_log_probs else None,
            prefix=prefix,
            columns=row_columns(requests),
        )

    def score(self, rollouts: Rollouts, requests: Requests) -> Rollouts:
        """The rollouts with the reward function's scores and components."""
        records = requests.prompts.columns.get(RECORD)
        if records is None:
            raise ServiceError("only prompts of the prompt file can be scored: take them from `requests.prompts`")
        responses = self.texts(rollouts)
        place = requests.prompt.tolist()
        texts = [requests.prompts.texts[row] for row in place]
        scores, components = self._scorer(texts, responses, [records[row] for row in place])
        return replace(rollouts, scores=scores, components=components, component_names=self._scorer.component_names)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The responses as texts; see `rlplugins.services.Engine`."""
        return texts_of(rollouts, self._policy.tokenizer)

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor, *, policy: str = "current"
    ) -> Tensor:
        """Log-probs (N, T) of given responses; see `rlplugins.services.Engine`."""
        if policy not in ("current", "reference"):
            raise ServiceError(f"there is no policy {policy!r}: current or reference")
        if policy == "reference" and self._policy.reference is None:
            raise ServiceError(
                'this run has no reference policy: add needs.column("ref_log_probs") to the plugin\'s needs'
            )
        sequences = Sequences.of(prompts, responses, mask)
        config = self._config
        return self._policy.passes(
            sequences, config.temperature, config.micro_batch_size, reference=policy == "reference"
        ).log_probs

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """How the gradients of the stack's loss under each of K advantages lie; see `rlplugins.services.Engine`."""
        named = {name: item for name, item in self._policy.model.named_parameters() if item.requires_grad}
        chosen = chosen_parameters(named, parameters)
        found = [self._gradient(rollouts, values, list(named.values())) for values in advantages]
        products = torch.zeros(len(found), len(found), dtype=torch.float64, device=self._policy.device)
        squares = torch.zeros_like(products)
        for name, parts in zip(named, zip(*found, strict=True), strict=True):
            flat = torch.stack(parts).reshape(len(found), -1).double()
            squares += flat @ flat.T
            if name in chosen:
                products += flat @ flat.T
        rate = self._config.learning_rate * warmth(self._config, self.version)
        return Gradients(products.cpu(), squares.diagonal().sqrt().cpu(), rate)

    def _gradient(self, rollouts: Rollouts, advantages: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The loss gradient of every parameter."""
        device = self._policy.device
        columns = moved(self._stack.gradient_columns(rollouts, advantages), device)
        shared = moved(self._stack.step.shared_by_all(), device)
        mini = self._stack.mini_batch(columns, shared, kinds=rollouts.kinds, metrics=Metrics())
        sequences = Sequences.of(rollouts.prompts, rollouts.responses, rollouts.mask)
        total = [torch.zeros_like(item, dtype=torch.float32) for item in parameters]
        entropy = self._stack.takes("entropy", "update")
        width = rollouts.mask.shape[1]
        together = units_of(self._stack, rollouts, rollouts.groups) if self._stack.needs("together") else None
        with torch.enable_grad():
            for rows in cut(sequences.lengths, self._config.micro_batch_size, together):
                output = self._policy.forward(sequences.take(rows), self._config.temperature, entropy=entropy)
                current = widened(output.entropy, width) if output.entropy is not None else None
                loss = mini.loss(widened(output.log_probs, width), rows, entropy=current).total
                if loss.requires_grad:
                    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                    for sum_, part in zip(total, parts, strict=True):
                        sum_ += part
        return total


def row_columns(requests: Requests) -> Columns:
    """The columns of the rows: the prompt's, and what hooks added to the requests."""
    data = {name: take(column, requests.prompt) for name, column in requests.prompts.columns.items() if name != RECORD}
    return Columns(data | dict(requests.columns), frozenset(requests.columns.written))


def sampling_rows(sampling: Sampling, rows: Tensor) -> Sampling:
    """The rows `rows` of the parameters."""
    numbers = {name: column[rows] for name, column in sampling.numbers.items()}
    return Sampling(sampling.temperature[rows], sampling.max_tokens[rows], sampling.top_p[rows], numbers)


def warmth(config: TrainConfig, made: int) -> float:
    """Share of the learning rate that the optimiser step after so many has."""
    return min(1.0, (made + 1) / config.warmup_steps) if config.warmup_steps else 1.0


def widened(column: Tensor, width: int) -> Tensor:
    """A (b, T) column with zeros up to the width."""
    return torch.nn.functional.pad(column, (0, width - column.shape[1]))


def _pick(items: Sequence[Any], rows: Tensor) -> list[Any]:
    return [items[row] for row in rows.tolist()]


def _joined(parts: Iterable[Tensor], width: int) -> Tensor:
    return torch.cat([widened(part, width) for part in parts])


def _or_false(prefix: Tensor | None, mask: Tensor) -> Tensor:
    return torch.zeros_like(mask) if prefix is None else prefix
