"""The engine of OpenRLHF as a service to hooks: generation through its rollout actors, log-probs and gradients through its
model actors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import Tensor

from rlplugins.errors import ServiceError
from rlplugins.rollouts import Requests, Rollouts, Sampling, take, texts_of
from rlplugins.services import Gradients
from rlplugins_openrlhf import settings
from rlplugins_openrlhf.columns import ROW, to_responses, to_rollouts
from rlplugins_openrlhf.gradients import Asked, Part
from rlplugins_openrlhf.pool import ELSEWHERE, POSITION, PoolPrompt, Request


class OpenRLHFEngine:
    """`rlplugins.services.Engine` on OpenRLHF's actors.

    Args:
        run: the run in the trainer's process.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def sampling(self, rows: int) -> Sampling:
        """The user's own parameters for so many requests."""
        made: Sampling = self._run.sampling(rows)
        return made

    def generate(
        self, requests: Requests, sampling: Sampling | None = None, *, score: bool = True, greedy: bool = False
    ) -> Rollouts:
        """Draw one response per request from the current policy and score it; see `rlplugins.services.Engine`."""
        run = self._run
        sampling = sampling or run.sampling(len(requests))
        if greedy:
            sampling = replace(sampling, temperature=torch.zeros_like(sampling.temperature))
        made = run.requests(requests, sampling, plain(requests))
        with self._awake():
            responses = self._sent(requests, made)
        return self._rollouts(requests, responses, score)

    def given(self, requests: Requests, responses: Sequence[str], *, score: bool = True) -> Rollouts:
        """Rows of responses that something else has written; see `rlplugins.services.Engine`.

        With a reward they go through the executors of the rollout engines, which cut the prompt into tokens and score the
        response in their own way, and are given it where they ask vLLM for one; without, through OpenRLHF's executor here.
        """
        requests = replace(requests, prefixes=[""] * len(requests))
        made = self._run.requests(requests, None, plain(requests))
        answers = iter(in_order(requests, self._run.encoded(requests.texts, responses)))
        made = [[replace(request, answer=next(answers)) for request in own] for own in made]
        return self._rollouts(requests, self._sent(requests, made) if score else self._written(requests, made), score)

    def _sent(self, requests: Requests, made: Sequence[Sequence[Request]]) -> list[Any]:
        """OpenRLHF's responses to the requests, which go to its engines prompt by prompt."""
        run = self._run
        position = requests.prompts.columns.get(POSITION)
        if position is None:
            raise ServiceError(
                "only prompts of the data set can be generated from and scored: take them from `requests.prompts`"
            )
        asked = [number for number, own in enumerate(made) if own]
        places = torch.as_tensor(position)[torch.tensor(asked, dtype=torch.int64)].tolist()
        items = [run.pool.item(place) for place in places]
        prompts = [
            PoolPrompt.of(text, place, number, made[number])
            for number, place, (text, _, _) in zip(asked, places, items, strict=True)
        ]
        refs = run.dispatch(prompts, [item[1] for item in items], [item[2] for item in items])
        return as_asked(requests, [response for group in ray.get(refs) for response in group])

    def _written(self, requests: Requests, made: Sequence[Sequence[Request]]) -> list[Any]:
        """The same of requests that hold their answers, without a reward."""
        position = requests.prompts.columns.get(POSITION)
        places = [ELSEWHERE] * len(made) if position is None else torch.as_tensor(position).tolist()
        prompts = []
        for number, (place, own) in enumerate(zip(places, made, strict=True)):
            text = self._run.templated(requests.prompts.texts[number]) if own else ""
            prompts += [PoolPrompt.of(text, place, number, [request]) for request in own]
        return as_asked(requests, self._run.answered(prompts))

    def _rollouts(self, requests: Requests, responses: Sequence[Any], score: bool) -> Rollouts:
        """Rows of OpenRLHF's responses to the requests."""
        run = self._run
        samples = [run.sample(response) for response in responses]
        known = requests.prompts.select(requests.prompt)
        rollouts = to_rollouts(samples, known, run.done, keep_log_probs=run.keeps_log_probs)
        rollouts.columns[ROW] = torch.full((len(samples),), -1)
        rollouts.columns.written.discard(ROW)
        scores = rollouts.scores if score else torch.full_like(rollouts.scores, torch.nan)
        return replace(rollouts, groups=requests.prompt.clone(), scores=scores)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """The engines of a run that puts them to sleep between its own generations."""
        from openrlhf.trainer.ray.vllm_engine import batch_vllm_engine_call

        engines = self._run.trainer.vllm_engines
        sleeps = bool(settings.at(self._run.args, "vllm.enable_sleep", False))
        if sleeps:
            batch_vllm_engine_call(engines, "wake_up")
        yield
        if sleeps:
            batch_vllm_engine_call(engines, "sleep")

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The responses as texts; see `rlplugins.services.Engine`."""
        return texts_of(rollouts, self._run.tokenizer)

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor, *, policy: str = "current"
    ) -> Tensor:
        """Log-probs (N, T) of given responses; see `rlplugins.services.Engine`."""
        run = self._run
        if policy not in ("current", "reference"):
            raise ServiceError(f"there is no policy {policy!r}: current or reference")
        group = run.trainer.actor_model_group if policy == "current" else run.trainer.reference_model_group
        if group is None:
            raise ServiceError("this run has no reference policy: set --algo.kl.use_loss and --algo.kl.init_coef")
        size = int(settings.at(run.args, "rollout.micro_batch_size", 1))
        share = settings.ranks(run.args)
        parts = list(torch.arange(len(prompts)).split(size))
        parts += [parts[0]] * (-len(parts) % share)  # every rank computes equally often
        batches = [whole([prompts[row] for row in part.tolist()], responses[part], mask[part]) for part in parts]
        refs = group.async_run_method_batch(
            method_name="forward", sequences=[batch[0] for batch in batches],
            action_mask=[batch[1] for batch in batches], attention_mask=[batch[2] for batch in batches],
        )  # fmt: skip
        answers = ray.get(refs)[:: settings.duplicates(run.args)]
        found = [batch for rank in answers for batch in rank]
        log_probs = torch.zeros(mask.shape)
        for part, batch, answer in zip(parts, batches, found, strict=True):
            log_probs[part] = to_responses(answer.float(), batch[3], mask.shape[1])
        return torch.where(mask.bool(), log_probs.to(mask.device), 0.0)

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """How the loss gradients under each of K advantages lie, on the actor's ranks; see `rlplugins.services.Engine`."""
        run, own = self._run, rollouts.unguarded()
        columns = run.stack.gradient_columns(own, torch.zeros_like(own.scores))
        shared = run.stack.step.shared_by_all()
        cuts = run.micro_batches(own)
        asked = []
        for rank in range(settings.ranks(run.args)):
            mine = cuts[rank :: settings.ranks(run.args)]
            rows = torch.tensor([row for part in mine for row in part], dtype=torch.int64)
            parts = [
                Part(*whole([own.prompts[row] for row in part], own.responses[part], own.mask[part])) for part in mine
            ]
            asked.append(
                Asked(
                    columns={name: take(column, rows) for name, column in columns.items()},
                    advantages=[item.detach()[rows] for item in advantages], shared=shared, kinds=own.kinds, parts=parts,
                    width=own.mask.shape[1], parameters=parameters,
                )
            )  # fmt: skip
        found: Gradients = run.gradients(asked)
        return found


def plain(requests: Requests) -> Requests:
    """The requests as they would be sent if no hook had written other texts."""
    return replace(requests, texts=[requests.prompts.texts[place] for place in requests.prompt.tolist()])


def in_order(requests: Requests, values: Sequence[Any]) -> list[Any]:
    """One value per request, in the order of the prompts."""
    return [values[row] for row in torch.argsort(requests.prompt, stable=True).tolist()]


def as_asked(requests: Requests, values: Sequence[Any]) -> list[Any]:
    """The inverse of `in_order`."""
    return [values[row] for row in torch.argsort(torch.argsort(requests.prompt, stable=True)).tolist()]


def whole(prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sequences as OpenRLHF's models take them: ids (b, S), action mask (b, A), attention mask (b, S), starts (b,)."""
    starts = torch.tensor([len(prompt) for prompt in prompts])
    own = mask.bool().cpu()
    there = own | (responses.cpu() != 0)
    sizes = ((torch.arange(own.shape[1]) + 1) * there).amax(1)
    width = int((starts + sizes).max())
    sequences, actions = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width)
    for row, (prompt, size) in enumerate(zip(prompts, sizes.tolist(), strict=True)):
        start = len(prompt)
        sequences[row, :start] = torch.tensor(list(prompt))
        sequences[row, start : start + size] = responses[row, :size].cpu()
        actions[row, start : start + size] = own[row, :size].float()
    attention = (torch.arange(width) < (starts + sizes)[:, None]).long()
    return sequences, actions[:, 1:].long(), attention, starts
