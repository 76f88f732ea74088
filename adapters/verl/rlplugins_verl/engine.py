"""The engine of verl as a service to hooks: generation through its agent loops, log-probs and gradients through its workers."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from torch import Tensor

from rlplugins.errors import RlpluginsError, ServiceError
from rlplugins.rollouts import Columns, Requests, Rollouts, Sampling, take, texts_of
from rlplugins.services import Gradients
from rlplugins_verl import gradients
from rlplugins_verl.columns import KEY, REQUESTS, in_order, no_rows, padded, stored, to_rollouts, uid_of
from rlplugins_verl.pool import POSITION
from rlplugins_verl.rollout import AGENT, GIVEN, INNER, SCORED, requests_of
from rlplugins_verl.settings import ranks

PARTITION = "val"
"""verl's store keeps validation apart from training, and what hooks ask for goes beside it."""
SECONDS = 0.05


class VerlEngine:
    """`rlplugins.services.Engine` on verl's servers and workers.

    Args:
        trainer: the running trainer.
        manager: verl's agent-loop manager.
    """

    def __init__(self, trainer: Any, manager: Any) -> None:
        self._trainer = trainer
        self._manager = manager

    def sampling(self, rows: int) -> Sampling:
        """The user's own parameters for so many requests."""
        made: Sampling = self._trainer.sampling(rows)
        return made

    def generate(
        self, requests: Requests, sampling: Sampling | None = None, *, score: bool = True, greedy: bool = False
    ) -> Rollouts:
        """Draw one response per request from the current policy and score it; see `rlplugins.services.Engine`."""
        if requests.prompts.columns.get(POSITION) is None:
            raise ServiceError("only prompts of the data set can be generated from: take them from `requests.prompts`")
        trainer = self._trainer
        sampling = sampling or trainer.sampling(len(requests))
        if greedy:
            sampling = replace(sampling, temperature=torch.zeros_like(sampling.temperature))
        single = _one_each(requests)
        made = requests_of(_plain(requests), single, sampling, numbers=trainer.stack.claims("process_logits"))
        top_k = int(trainer.config.actor_rollout_ref.rollout.top_k)
        for items in made:
            items[0]["sampling"]["top_k"] = top_k  # validation would set its own
        return self._responses(requests, made, score)

    def given(self, requests: Requests, responses: Sequence[str], *, score: bool = True) -> Rollouts:
        """Rows of responses that something else has written; see `rlplugins.services.Engine`.

        verl's own agent loop makes them: it tokenises the prompt and asks for a response, which is there already. A prompt that
        is not of the data set takes the place of one that is.
        """
        known = requests.prompts.columns.get(POSITION) is not None
        if score and not known:
            raise ServiceError("only prompts of the data set can be scored: take them from `requests.prompts`")
        single = replace(_one_each(requests), prefixes=[""] * len(requests))
        plain = _plain(requests) if known else replace(requests, texts=[None] * len(requests))
        made = requests_of(plain, single, None)
        for items, text in zip(made, responses, strict=True):
            items[0][GIVEN] = text
        return self._responses(requests, made, score)

    def _responses(self, requests: Requests, made: list[list[dict[str, Any]]], score: bool) -> Rollouts:
        """What verl's agent loops make of the requests, one row each."""
        trainer = self._trainer
        keep = trainer.stack.needs("column", "rollout_log_probs")
        if not len(requests):
            return no_rows(keep_log_probs=keep)
        for items in made:
            items[0][SCORED] = score
        batch, uids = self._batch(requests, made)
        tags = [{"is_prompt": True, "status": "pending", "global_steps": trainer.global_steps} for _ in uids]
        tq.kv_batch_put(keys=uids, partition_id=PARTITION, tags=tags)
        self._manager.generate_sequences(batch)
        keys = self._wait(uids)
        there = tq.kv_batch_get(keys=keys, partition_id=PARTITION)
        tq.kv_clear(keys=[*keys, *uids], partition_id=PARTITION)
        rows = to_rollouts(there, keys, trainer.pool.prompts, trainer.global_steps - 1, keep_log_probs=keep)
        return as_asked(rows, requests, score)

    def _batch(self, requests: Requests, made: list[list[dict[str, Any]]]) -> tuple[Any, list[str]]:
        """verl's prompt batch of the requests: a prompt of its own for each, drawn once."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.rl_dataset import collate_fn

        trainer, count = self._trainer, len(requests)
        position = requests.prompts.columns.get(POSITION)
        places = [-1] * count if position is None else torch.as_tensor(position)[requests.prompt].tolist()
        rows = collate_fn([trainer.train_dataset[max(place, 0)] for place in places])
        uids = [uid_of(row, place) for row, place in enumerate(places)]
        rows["uid"] = np.array(uids, dtype=object)
        batch = tu.get_tensordict(rows)
        tu.assign_non_tensor_data(batch, "global_steps", trainer.global_steps)
        tu.assign_non_tensor_data(batch, "validate", True)
        inner = trainer.config.actor_rollout_ref.rollout.agent.default_agent_loop
        columns = {
            REQUESTS: made, INNER: [inner] * count, "agent_name": [AGENT] * count, "__rollout_n__": [1] * count,
        }  # fmt: skip
        for name, values in columns.items():
            tu.assign_non_tensor_stack(batch, name, values)
        return batch, uids

    def _wait(self, uids: Sequence[str]) -> list[str]:
        """verl's keys of the responses, in the order of the requests."""
        wanted = set(uids)
        while True:
            items = (tq.kv_list(PARTITION) or {}).get(PARTITION, {})
            states = {uid: items.get(uid, {}).get("status") for uid in uids}
            if "failure" in states.values():
                raise ServiceError(
                    "verl's agent loop failed on a request of a plugin; its own error is in the log above"
                )
            if all(state == "finished" for state in states.values()):
                return in_order([key for key in items if key.split("_")[0] in wanted and key not in wanted])
            time.sleep(SECONDS)

    def texts(self, rollouts: Rollouts) -> list[str]:
        """The responses as texts; see `rlplugins.services.Engine`."""
        return texts_of(rollouts, self._trainer.tokenizer)

    def log_probs(
        self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor, *, policy: str = "current"
    ) -> Tensor:
        """Log-probs (N, T) of given responses; see `rlplugins.services.Engine`."""
        trainer = self._trainer
        if policy not in ("current", "reference"):
            raise ServiceError(f"there is no policy {policy!r}: current or reference")
        if policy == "reference" and not trainer.use_reference_policy:
            raise ServiceError("this run has no reference policy: set actor_rollout_ref.actor.use_kl_loss=True")
        batch, sizes = self._sequences(prompts, responses, mask)
        compute = trainer._compute_old_log_prob if policy == "current" else trainer._compute_ref_log_prob
        column = "old_log_probs" if policy == "current" else "ref_log_prob"
        count = len(sizes)
        batch.extra_info["temperature"] = trainer.config.actor_rollout_ref.rollout.temperature
        compute(batch, {})
        found = tq.kv_batch_get(keys=batch.keys[:count], partition_id=PARTITION, select_fields=[column])
        tq.kv_clear(keys=batch.keys, partition_id=PARTITION)
        log_probs = padded(found[column], mask.shape[1])[:, : mask.shape[1]].float()
        return torch.where(mask.bool(), log_probs.to(mask.device), 0.0)

    def _sequences(self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor) -> tuple[Any, list[int]]:
        """The sequences in verl's store, filled up to what its workers can divide among them."""
        from transfer_queue import KVBatchMeta

        rollout = self._trainer.config.actor_rollout_ref.rollout
        multiple = ranks(self._trainer.config) * int(rollout.log_prob_micro_batch_size_per_gpu or 1)
        count = len(prompts)
        rows = [*range(count), *[0] * (-count % multiple)]
        widths = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        sizes = (widths * mask.bool()).amax(1).clamp(min=1).tolist()
        fields: dict[str, list[Any]] = {}
        keys, tags = [], []
        for number, row in enumerate(rows):
            prompt, size = torch.tensor(list(prompts[row])), sizes[row]
            response, own = responses[row, :size].cpu(), mask[row, :size].cpu().long()
            ids = torch.cat([prompt, response])
            values = {
                "prompts": prompt, "responses": response, "input_ids": ids, "position_ids": torch.arange(len(ids)),
                "response_mask": own, "loss_mask": own, "rollout_log_probs": torch.zeros(size),
            }  # fmt: skip
            for name, value in values.items():
                fields.setdefault(name, []).append(value)
            keys.append(f"{uuid.uuid4()}_{number}_0")
            tags.append({"seq_len": len(ids), "prompt_len": len(prompt), "response_len": size})
        meta = tq.kv_batch_put(keys=keys, partition_id=PARTITION, fields=stored(fields, len(keys)), tags=tags)
        return KVBatchMeta(keys=keys, tags=tags, partition_id=PARTITION, fields=meta.fields, extra_info={}), sizes

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """How the gradients of the stack's loss under each of K advantages lie; see `rlplugins.services.Engine`."""
        trainer, plain = self._trainer, rollouts.unguarded()
        keys = [str(key) for key in plain.columns[KEY]]
        if plain.old_log_probs is None or not all(keys):
            raise ServiceError(
                "gradient_products takes rows of the step, in the credit phase: their old log-probs are missing"
            )
        there = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=list(gradients.INPUTS))
        workers = trainer.actor_rollout_wg.workers
        rank_of = trainer.actor_rollout_wg._dispatch_info["actor"]
        shares = gradients.shares(
            trainer.stack, plain, advantages, there, max(rank_of) + 1, parameters=parameters,
            temperature=float(trainer.config.actor_rollout_ref.rollout.temperature),
        )  # fmt: skip
        sent = [ray.put(share) for share in shares]
        calls = [
            item.__ray_call__.remote(gradients.on_worker, sent[rank])
            for item, rank in zip(workers, rank_of, strict=True)
        ]
        try:
            found: list[Gradients] = ray.get(calls)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RlpluginsError):
                raise error.cause from None
            raise
        return found[0]


def _one_each(requests: Requests) -> Requests:
    """The same requests, each with a prompt of its own."""
    return replace(requests, prompt=torch.arange(len(requests)), prompts=requests.prompts.select(requests.prompt))


def _plain(requests: Requests) -> Requests:
    """The requests as they were before any hook."""
    texts = [requests.prompts.texts[row] for row in requests.prompt.tolist()]
    return replace(requests, texts=texts, prefixes=[""] * len(requests))


def as_asked(rows: Rollouts, requests: Requests, score: bool) -> Rollouts:
    """The rows with what the requests say of them: prompts, groups, and the columns of prompts that are not of the data set."""
    prompts = requests.prompts
    columns = rows.columns
    if POSITION not in prompts.columns:  # the row's data are of another prompt
        own = {name: take(column, requests.prompt) for name, column in prompts.columns.items()}
        asked = {name: columns[name] for name in columns.written}
        columns = Columns(own | asked, frozenset(columns.written))
    columns[KEY] = [""] * len(rows)
    columns.written.discard(KEY)
    return replace(
        rows, prompt_keys=prompts.keys[requests.prompt], prompt_rows=prompts.rows[requests.prompt],
        groups=requests.prompt.clone(), columns=columns,
        scores=rows.scores if score else torch.full_like(rows.scores, torch.nan),
    )  # fmt: skip
