"""The engine of OpenRLHF as a service to hooks: generation through its rollout actors, log-probs through its model actors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
import torch
from torch import Tensor

from rlplugins.errors import ServiceError
from rlplugins.rollouts import Requests, Rollouts, Sampling
from rlplugins_openrlhf import settings
from rlplugins_openrlhf.columns import ROW, to_responses, to_rollouts
from rlplugins_openrlhf.pool import POSITION, PoolPrompt


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
        position = requests.prompts.columns.get(POSITION)
        if position is None:
            raise ServiceError("only prompts of the data set can be generated from: take them from `requests.prompts`")
        places = torch.as_tensor(position)[requests.prompt].tolist()
        single = replace(
            requests,
            prompt=torch.arange(len(requests)),
            prompts=requests.prompts.select(requests.prompt),
        )
        made = run.requests(single, sampling)
        items = [run.pool.item(place) for place in places]
        prompts = [
            PoolPrompt.of(text, place, number, made[number])
            for number, (place, (text, _, _)) in enumerate(zip(places, items, strict=True))
        ]
        with self._awake():
            refs = run.dispatch(prompts, [item[1] for item in items], images=[item[2] for item in items], each=1)
            responses = [response for group in ray.get(refs) for response in group]
        samples = [run.sample(response) for response in responses]
        rollouts = to_rollouts(samples, run.pool, run.done, keep_log_probs=run.keeps_log_probs)
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

    def gradient_products(self, rollouts: Rollouts, advantages: Sequence[Tensor]) -> Tensor:
        """OpenRLHF's actors give no gradient to the trainer's process."""
        raise ServiceError("engine.gradient_products has no binding in OpenRLHF yet; use the local trainer")


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
