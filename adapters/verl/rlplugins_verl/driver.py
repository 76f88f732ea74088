"""verl's trainers with a stack: the loop's process, which owns the plugins' state.

`register` derives a trainer from one of verl's. With an empty stack it gives verl's own trainer. Every method here either
overrides one of `PPOTrainer` and calls it, or is called by such a method; the order of a step is

    on_step_begin       the step opens
    _next_train_batch   prompts are chosen, counted, rewritten
    _after_generation   rows are added and dropped, while the engine is still awake
    _compute_reward_colocate    scores, where a reward model on the training devices gives them
    _balance_batch      rows of a prompt are put together for the passes before the update, if `forward` gains by it
    _compute_advantage  credit, when all log-prob passes are there
    _update_actor       columns and shared values go to the workers, their metrics come back
    on_step_end         weights are synchronised, plugins change their state
    _save               the checkpoint, plugin state first: verl's note of the latest one makes it whole
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
import transfer_queue as tq
from omegaconf import open_dict
from torch import Tensor

from rlplugins import logits
from rlplugins.errors import ConfigurationError, StateError
from rlplugins.rollouts import Prompts, Requests, Rollouts, Sampling
from rlplugins.stack import Credit, Stack
from rlplugins.steps import Run
from rlplugins.table import PromptTable
from rlplugins.together import units_of
from rlplugins_verl import columns as rows_of_verl
from rlplugins_verl import settings, together, worker
from rlplugins_verl.columns import DRAWN, KEY, OF_UPDATE, REQUESTS, origin_of, padded, uid_of
from rlplugins_verl.engine import VerlEngine
from rlplugins_verl.pool import Pool
from rlplugins_verl.rollout import AGENT, INNER, bind_agent_loop, requests_of
from rlplugins_verl.rows import added_rows

logger = logging.getLogger("rlplugins.verl")

FOLDER = "rlplugins"
"""Folder of the plugins' state inside a checkpoint of verl."""
NOTES = "run.json"


def register(mode: str, base: type) -> None:
    """Register `rlplugins_<mode>`, derived from verl's trainer of that mode."""
    from verl.trainer.ppo.v1.trainer_base import register_trainer

    def refuse(cls: type, config: Any) -> Any:
        raise ConfigurationError(
            f"rlplugins_{mode}: generation, a part of whose prompts are drawn by other processes, and several updates per "
            "step have no binding yet: set trainer.v1.trainer_mode=rlplugins_sync or rlplugins_colocate_async"
        )

    def make(cls: type, config: Any) -> Any:
        if not settings.read_stack(config).plugins:
            _set_mode(config, mode)
            return base(config)
        return object.__new__(cls)

    body = {"mode": mode, "__new__": make if mode in settings.MODES else refuse, "__module__": __name__}
    register_trainer(f"rlplugins_{mode}")(type(f"{base.__name__}WithPlugins", (WithPlugins, base), body))


def _set_mode(config: Any, mode: str) -> None:
    """verl branches on its own names of the modes."""
    with open_dict(config):
        config.trainer.v1.trainer_mode = mode


class WithPlugins:
    """What a stack adds to a `PPOTrainer`, which stands behind it among the bases."""

    mode = ""

    def __init__(self, config: Any) -> None:
        settings.check_version()
        self.stack_config = settings.read_stack(config)
        self.stack = settings.build_stack(config, self.stack_config, self.mode)
        self._take_over(config)
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.mode
            if self.stack.takes("entropy", "update"):
                config.actor_rollout_ref.actor.calculate_entropy = True
            if self.stack.claims("process_logits"):
                rollout = config.actor_rollout_ref.rollout
                options = (rollout.get("engine_kwargs") or {}).get(rollout.name) or {}
                rollout.engine_kwargs[rollout.name] = logits.with_rule(options, self.stack)
        self.rollouts: Rollouts | None = None
        self.credit: Credit | None = None
        self.engine: VerlEngine | None = None
        self.stepping = self.save_due = False
        self.places = self.draws = 0
        super().__init__(config)

    def _take_over(self, config: Any) -> None:
        """Which parts the stack decides; the others are verl's."""
        stack = self.stack
        self.owns_credit, self.owns_loss = settings.owns_credit(stack), settings.owns_loss(stack)
        self.owns_critic = False
        self.chooses = stack.claims("choose_prompts") or stack.claims("prompt_weights")
        self.rewrites = stack.claims("rewrite_prompts") or stack.claims("sampling_params")
        self.keeps_units = stack.needs("together")
        self.ahead = self.mode != "sync"

    # making

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()  # type: ignore[misc]
        buffer.sample = functools.partial(self._sample, buffer.sample)
        return buffer

    def _init_dataloader(self) -> None:
        super()._init_dataloader()  # type: ignore[misc]
        config = self.config
        self.pool = Pool.of(self.train_dataset, PromptTable())
        self.stack = settings.build_stack(config, self.stack_config, self.mode, self.pool.prompts.columns)
        self.owns_critic = settings.owns_critic(config, self.stack)
        self.total_steps = int(self.total_training_steps)
        size = settings.group_size(config)
        budget = int(config.data.train_batch_size) * size
        self.seed = int(settings.at(config, "data.seed", 1) or 0)
        self.stack.start(Run(self.total_steps, size, budget, self.pool.prompts, self.seed, self.tokenizer))
        self._restore(self._resumed_folder())
        print(f"rlplugins: {', '.join(map(repr, self.stack.plugins))}", flush=True)

    def on_init_end(self) -> None:
        """Shake hands with every worker that trains, then let verl synchronise the weights."""
        function = functools.partial(
            worker.bind, specification=self.stack.specification(), owns_loss=self.owns_loss, owns_critic=self.owns_critic,
            clip=settings.at(self.config, "critic.cliprange_value"),
        )  # fmt: skip
        self._shake_hands(self.actor_rollout_wg.workers, function, "training worker")
        super().on_init_end()  # type: ignore[misc]

    def fit(self, agent_loop_manager: Any) -> None:
        """Shake hands with every worker that generates, then train."""
        workers = getattr(agent_loop_manager, "agent_loop_workers", [])
        self._shake_hands(workers, bind_agent_loop, "agent-loop worker")
        self.engine = VerlEngine(self, agent_loop_manager)
        super().fit(agent_loop_manager)  # type: ignore[misc]

    def _shake_hands(self, workers: Sequence[Any], function: Any, who: str) -> None:
        expected = {"fingerprint": self.stack.fingerprint, **worker.versions()}
        calls = [item.__ray_call__.remote(function) for item in workers]
        for number, call in enumerate(calls):
            try:
                answer = ray.get(call)
            except Exception as error:
                raise ConfigurationError(
                    f"{who} {number} cannot load rlplugins as this process does; install the same distributions of rlplugins "
                    f"and of the stack's plugins on every node: {error}"
                ) from error
            different = {name for name in answer if answer[name] != expected[name]}
            if different:
                text = "; ".join(f"{name}: {answer[name]} there, {expected[name]} here" for name in sorted(different))
                raise ConfigurationError(f"{who} {number} runs another installation: {text}")

    # prompts

    @contextlib.contextmanager
    def _prompt_step(self) -> Iterator[None]:
        """The step whose prompts are chosen: the one that runs, or in an asynchronous mode one to come."""
        if not self.ahead:
            yield
            return
        with self.stack.step_ahead(self.draws, self.total_steps, self.seed):
            yield

    def _next_train_batch(self, num_prompts: int | None = None) -> Any:
        count = num_prompts or int(self.config.data.train_batch_size)
        with self._prompt_step():
            if self.chooses:
                batch = self._chosen(self.stack.choose_prompts(self.pool.prompts, count))
            else:
                batch = super()._next_train_batch(num_prompts)  # type: ignore[misc]
            self._add_requests(batch)
        self.draws += 1
        return batch

    def _chosen(self, positions: Tensor) -> Any:
        """verl's batch of the prompts at these positions."""
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.rl_dataset import collate_fn

        batch = tu.get_tensordict(collate_fn([self.train_dataset[place] for place in positions.tolist()]))
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        return batch

    def _add_requests(self, batch: Any) -> None:
        """The names by which its rows are known afterwards, and the columns that tell the agent loop what hooks made of it."""
        from verl.utils import tensordict_utils as tu

        positions = self.pool.positions(batch)
        count = len(positions)
        prompts = self.pool.prompts.select(torch.tensor(positions))
        each = settings.group_size(self.config)
        counts = torch.full((count,), each)
        if self.stack.claims("allocate_rollouts"):
            counts = self.stack.allocate_rollouts(prompts, count * each)
            tu.assign_non_tensor_stack(batch, "__rollout_n__", counts.tolist())
        if self.rewrites:
            made = self._requests(prompts, counts)
            tu.assign_non_tensor_stack(batch, REQUESTS, made)
            inner = self.config.actor_rollout_ref.rollout.agent.default_agent_loop
            names = rows_of_verl.as_list(batch["agent_name"]) if "agent_name" in batch else [inner] * count
            tu.assign_non_tensor_stack(batch, INNER, names)
            tu.assign_non_tensor_stack(batch, "agent_name", [AGENT] * count)
        uids = [uid_of(place, prompt) for place, prompt in enumerate(positions, start=self.places)]
        tu.assign_non_tensor_stack(batch, "uid", uids)
        self.places += count

    def _requests(self, prompts: Prompts, counts: Tensor) -> list[list[dict[str, Any]]]:
        """Per prompt what its agent loops are to do differently."""
        plain = Requests.of(prompts, counts)
        requests = self.stack.rewrite_prompts(Requests.of(prompts, counts))
        sampling = self.stack.sampling_params(requests, self.sampling(len(requests)))
        drawn = sampling if self.stack.claims("sampling_params") else None
        return requests_of(plain, requests, drawn, numbers=self.stack.claims("process_logits"))

    def sampling(self, rows: int) -> Sampling:
        """The user's own parameters for so many requests."""
        rollout = self.config.actor_rollout_ref.rollout
        limit = int(self.config.data.max_response_length)
        return Sampling.of(rows, float(rollout.temperature), limit, float(rollout.top_p))

    # rollouts

    def _sample(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """What verl's replay buffer gives; training rows pass the hooks of the rollouts before the engine sleeps."""
        batch, metrics = sample(*args, **kwargs)
        partition = kwargs.get("partition_id", args[1] if len(args) > 1 else None)
        return (self._after_generation(batch) if partition == "train" else batch), metrics

    def _after_generation(self, batch: Any) -> Any:
        """The batch without dropped rows and with added ones; `self.rollouts` are its rows in the order of prompt and draw."""
        keys = rows_of_verl.in_order(batch.keys)
        keep = self.stack.needs("column", "rollout_log_probs")
        # all columns, if rows will be made like those that are there, or the pool has not the data of one
        whole = self.stack.claims("extend_rollouts") or any(origin_of(key)[1] < 0 for key in keys)
        wanted = None if whole else [*DRAWN, *(["rollout_log_probs"] if keep else [])]
        stored = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=wanted)
        drawn = rows_of_verl.to_rollouts(stored, keys, self.pool.prompts, self.global_steps - 1, keep_log_probs=keep)
        rollouts = drawn
        if self.stack.claims("extend_rollouts"):
            rollouts = self.stack.extend_rollouts(drawn, self.engine)
            batch, rollouts = added_rows(batch, stored, drawn, rollouts)
        rollouts = self.stack.filter_rollouts(rollouts) if len(rollouts) else rollouts
        self.rollouts, self.credit = rollouts, None
        return self._only(batch, rollouts.columns[KEY] if len(rollouts) else [])

    def _only(self, batch: Any, keys: Any) -> Any:
        """The batch with these rows; one that only fills it, if there are none."""
        tags = dict(zip(batch.keys, batch.tags, strict=True))
        chosen = list(keys)
        if not chosen:
            chosen = batch.keys[:1]
            tags[chosen[0]] = {**tags[chosen[0]], "is_padding": True}
            logger.warning("step %d: every response was dropped, the update is skipped", self.global_steps)
        gone = [key for key in batch.keys if key not in set(chosen)]
        if gone:
            tq.kv_clear(keys=gone, partition_id=batch.partition_id)
        return type(batch)(
            keys=chosen, tags=[tags[key] for key in chosen], partition_id=batch.partition_id, fields=batch.fields,
            extra_info=batch.extra_info,
        )  # fmt: skip

    def _compute_reward_colocate(self, batch: Any, metrics: dict[str, Any] | None = None) -> Any:
        """The scores of a reward model on the training devices, which come when the engine sleeps."""
        batch = super()._compute_reward_colocate(batch, metrics=metrics)  # type: ignore[misc]
        if self.rollouts is not None and len(self.rollouts):
            keys = list(self.rollouts.columns[KEY])
            stored = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
            self.rollouts = replace(self.rollouts, scores=rows_of_verl.scores_of(stored, len(keys)))
        return batch

    # passes

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The batch, filled up; in the order of its prompts where a plugin's `forward` computes what they share."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)  # type: ignore[misc]
        rollouts = self.rollouts
        if not (self.keeps_units and self.stack.claims("forward") and rollouts is not None and len(rollouts)):
            return batch
        units = self._units(batch, units_of(self.stack, rollouts, rollouts.groups))
        fields = rows_of_verl.stored({together.UNIT: list(units[:, None].unbind())}, len(units))
        there = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)
        there.extra_info = batch.extra_info
        self._deal(there, units, mini_batches=1)
        return there

    def _units(self, batch: Any, units: Tensor) -> Tensor:
        """(N,) int64 of all rows of the batch, from those of the rollouts; a row that fills the batch is alone."""
        assert self.rollouts is not None
        numbers = dict(zip(self.rollouts.columns[KEY], units.tolist(), strict=True))
        return torch.tensor([numbers.get(key, -1 - row) for row, key in enumerate(batch.keys)])

    def _deal(self, batch: Any, units: Tensor, mini_batches: int) -> None:
        """Put the batch in an order in which every rank gets whole units (N,) in every mini-batch."""
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        whole = settings.needs_whole_units(self.stack)
        batch.reorder(together.dealt(units, ranks, mini_batches, whole=whole))

    # credit

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        assert self.rollouts is not None
        if not self.owns_credit or not len(self.rollouts):
            batch = super()._compute_advantage(batch, metrics)  # type: ignore[misc]
        if not len(self.rollouts):
            return batch
        keys = list(self.rollouts.columns[KEY])
        wanted = ["old_log_probs", "entropy", "ref_log_prob", "values", "advantages"]
        stored = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=wanted)
        self.rollouts = with_passes(self.rollouts, stored, self.stack)
        if self.owns_credit:
            self.credit = self.stack.credit(self.rollouts, self.engine)
        else:
            self.credit = credit_of_verl(self.rollouts, stored["advantages"])
        fields = self._fields(batch, keys)
        if fields is None:
            return batch
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _fields(self, batch: Any, keys: Sequence[str]) -> Any:
        """What the workers need of the credit, for all rows of the batch, those that fill it included."""
        assert self.rollouts is not None and self.credit is not None
        found: dict[str, list[Any]] = {}
        alone = bool((self.rollouts.groups < 0).any())
        if self.owns_credit or alone:
            lengths = dict(zip(batch.keys, [int(tag["response_len"]) for tag in batch.tags], strict=True))
            sizes = [lengths[key] for key in keys]
            given = for_verl(self.rollouts, self.credit, sizes, excluded=not self.owns_loss)
            found |= given if self.owns_credit else {"advantages": given["advantages"]}
        if self.owns_loss or self.owns_critic:
            columns = self.stack.update_columns(self.rollouts, self.credit)
            # verl's own mask leaves out what its own loss must not see
            packed, self.packing = rows_of_verl.pack(columns, OF_UPDATE if self.owns_loss else None)
            found |= packed
        place = {key: row for row, key in enumerate(keys)}
        fill = {name: rows_of_verl.filler(values) for name, values in found.items()}
        complete = {
            name: [values[place[key]] if key in place else fill[name] for key in batch.keys]
            for name, values in found.items()
        }
        if self.keeps_units:
            complete[together.UNIT] = list(self._update_units(batch)[:, None].unbind())
        return rows_of_verl.stored(complete, len(batch.keys)) if complete else None

    # update

    @contextlib.contextmanager
    def _framed(self, batch: Any, owned: bool) -> Iterator[None]:
        """The mini-batches of the batch with what the stack needs in them."""
        assert self.rollouts is not None
        if owned and len(self.rollouts):
            step = self.stack.step
            batch.extra_info[worker.FRAME] = worker.Frame(
                step.number, self.rollouts.kinds, step.shared_by_all(), self.packing
            )
        yield
        batch.extra_info.pop(worker.FRAME, None)

    def _update_units(self, batch: Any) -> Tensor:
        """(N,) int64, equal for rows that stay together in the update."""
        assert self.rollouts is not None and self.credit is not None
        return self._units(batch, units_of(self.stack, self.rollouts, self.credit.groups))

    def _update_critic(self, batch: Any, metrics: dict[str, Any]) -> Any:
        with self._framed(batch, self.owns_critic):
            return super()._update_critic(batch, metrics)  # type: ignore[misc]

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        if self.keeps_units and len(self.rollouts or ()):
            size = int(self.config.actor_rollout_ref.actor.ppo_mini_batch_size) * settings.group_size(self.config)
            self._deal(batch, self._update_units(batch), len(batch.keys) // size)
        with self._framed(batch, self.owns_loss):
            batch = super()._update_actor(batch, metrics)  # type: ignore[misc]
        found = worker.decoded(metrics, "actor/")
        metrics.clear()
        metrics.update(found)
        if found.get("rlplugins/update_skipped") == 1.0:
            logger.warning("step %d: no response counts, the update is skipped", self.global_steps)
        return batch

    # life

    def on_step_begin(self) -> None:
        """Open the step."""
        super().on_step_begin()  # type: ignore[misc]
        self.stack.begin_step(self.global_steps - 1, self.total_steps, self.seed)
        self.stepping = True
        self.rollouts = self.credit = None
        if (
            self.stack.claims("reference_policy")
            and self.use_reference_policy
            and self.stack.reference_policy() == "current"
        ):
            ray.get([item.__ray_call__.remote(worker.copy_reference) for item in self.actor_rollout_wg.workers])

    def on_step_end(self) -> None:
        """Plugins see the updated engine; the checkpoint follows them (asynchronous modes save before: `_save_checkpoint`)."""
        super().on_step_end()  # type: ignore[misc]
        self._end_step()
        if self.save_due and not self._validates():
            self._save()

    def _end_step(self) -> None:
        """The plugins' end of step, once."""
        if self.rollouts is None:
            return
        self.stack.end_step(self.rollouts, self.credit, self.engine)
        self.rollouts = self.credit = None

    def _consume_sync_metrics(self) -> dict[str, Any]:
        return {**super()._consume_sync_metrics(), **self.stack.metrics.as_dict()}  # type: ignore[misc]

    def _validates(self) -> bool:
        """Whether verl validates after this step and a plugin changes its state then."""
        every = int(self.config.trainer.test_freq)
        last = self.global_steps >= self.total_steps
        return self.stack.claims("on_validation") and every > 0 and (last or self.global_steps % every == 0)

    def _validate(self) -> dict[str, float]:
        metrics = super()._validate()  # type: ignore[misc]
        if self.stepping:  # verl also validates before the first step
            self.stack.validated({name: float(value) for name, value in metrics.items()}, self.engine)
            metrics = {**metrics, **self.stack.metrics.as_dict()}
            if self.save_due:
                self._save()
        return metrics  # type: ignore[no-any-return]

    # checkpoints

    def _save_checkpoint(self) -> None:
        """Synchronous: wait for the life hooks. Asynchronous: generation must still be halted, so they come first."""
        self.save_due = True
        if self.ahead:
            self._end_step()
            self._save()

    def _save(self) -> None:
        from verl.utils.debug import marked_timer

        with marked_timer("save_checkpoint", self.timing_raw, color="green"):
            folder = self._checkpoint_folder(self.global_steps) / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            self.stack.save(folder / "stack", self.global_steps)
            (folder / NOTES).write_text(json.dumps({"places": self.places, "draws": self.draws}))
            super()._save_checkpoint()  # type: ignore[misc]
        self.save_due = False

    def _checkpoint_folder(self, step: int) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{step}"

    def _resumed_folder(self) -> Path | None:
        """The checkpoint that verl will resume from."""
        from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path

        trainer = self.config.trainer
        if trainer.resume_mode == "auto":
            found = find_latest_ckpt_path(os.path.abspath(trainer.default_local_dir))
        else:
            found = trainer.resume_from_path if trainer.resume_mode == "resume_path" else None
        return Path(found).absolute() if found else None

    def _restore(self, checkpoint: Path | None) -> None:
        """The plugins' state of a checkpoint; none, if it was written without rlplugins."""
        if checkpoint is None:
            return
        folder = checkpoint / FOLDER
        if not (folder / "stack").exists():
            logger.warning("%s holds no plugin state: the plugins start anew from this checkpoint", checkpoint)
            return
        step = self.stack.load(folder / "stack")
        if not checkpoint.name.endswith(f"_{step}"):
            raise StateError(
                f"{folder} holds the plugin state of step {step}: it was moved; delete it to start without"
            )
        notes = json.loads((folder / NOTES).read_text())
        self.places, self.draws = int(notes["places"]), int(notes["draws"])


def with_passes(rollouts: Rollouts, stored: Mapping[str, Any], stack: Stack) -> Rollouts:
    """The rollouts with what verl's passes over them gave, as far as the stack reads it."""
    width, mask = rollouts.mask.shape[1], rollouts.mask

    def column(name: str) -> Tensor | None:
        return padded(stored[name], width).float() * mask if name in stored.keys() else None  # noqa: SIM118

    found: dict[str, Tensor | None] = {"old_log_probs": column("old_log_probs")}
    for name, source in (("entropy", "entropy"), ("ref_log_probs", "ref_log_prob"), ("values", "values")):
        if stack.needs("column", name) or stack.takes(name):
            found[name] = column(source)
    return replace(rollouts, **found)


def credit_of_verl(rollouts: Rollouts, advantages: Any) -> Credit:
    """What verl's own estimator made of the rows; none of those without a group, which it takes for groups of one."""
    dense = padded(advantages, rollouts.mask.shape[1]) * rollouts.mask
    own = torch.where((rollouts.groups < 0)[:, None], 0.0, dense)
    return Credit(rollouts.scores, rollouts.groups, None, own, None, None, None)


def for_verl(rollouts: Rollouts, credit: Credit, sizes: Sequence[int], *, excluded: bool) -> dict[str, list[Any]]:
    """Advantages and returns as verl's own estimators give them, one entry per row.

    Args:
        rollouts: the rows.
        credit: what the stack made of them.
        sizes: tokens of each response, tool output included.
        excluded: take rows of weight 0 (no finite reward) out of the masks, for verl's own loss.
    """
    mask = rollouts.mask
    targets = credit.value_targets[0] if credit.value_targets is not None else credit.advantages
    advantages = [(row * own)[:size] for row, own, size in zip(credit.advantages.float(), mask, sizes, strict=True)]
    returns = [(row * own)[:size] for row, own, size in zip(targets.float(), mask, sizes, strict=True)]
    found: dict[str, list[Any]] = {"advantages": advantages, "returns": returns}
    if excluded and credit.weights is not None:
        kept = mask & (credit.weights > 0)
        masks = [row[:size].long() for row, size in zip(kept, sizes, strict=True)]
        found |= {"response_mask": masks, "loss_mask": masks}
    return found
