"""The same rollouts through the local trainer and through verl's engine with the adapter, in one process and without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins.rollouts import Rollouts
from rlplugins.services import Gradients
from rlplugins.stack import Credit, Stack, StackConfig
from rlplugins.steps import Run
from rlplugins.table import PromptTable
from rlplugins.testing.parity import (
    STEPS,
    Case,
    Drawn,
    LocalSide,
    Result,
    add_request_columns,
    problem,
    reference_of,
    weights_of,
)
from rlplugins.testing.tiny import make_tokenizer
from rlplugins.together import units_of
from rlplugins_verl import columns as rows_of_verl
from rlplugins_verl import gradients, settings, together
from rlplugins_verl.cpu import tiny
from rlplugins_verl.driver import credit_of_verl, for_verl, with_passes
from rlplugins_verl.pool import Pool
from rlplugins_verl.worker import FRAME, Frame, bind_engine, decoded

POOL = 24


def local_side(folder: Path, case: Case) -> LocalSide:
    """The local trainer with verl's bound of the loss of a negative advantage, whose credit phase has the engine."""
    local = {name: folder / value if name == "validation_data" else value for name, value in (case.local or {}).items()}
    side = LocalSide(folder, replace(case, local=local), dual_clip=3.0)
    stack = side.trainer.stack
    credit = stack.credit

    def with_engine(rollouts: Rollouts, unused: Any) -> Credit:
        add_columns_of_extended_rows(stack, rollouts)
        return credit(rollouts, side.trainer.engine)

    stack.credit = with_engine  # type: ignore[method-assign]
    return side


def add_columns_of_extended_rows(stack: Stack, rollouts: Rollouts) -> None:
    """Give the rows what `segment-po` writes on them in `extend_rollouts`: three segments, or no parents."""
    if any(plugin.name == "segment-po" for plugin in stack.plugins) and "segment_po_parent" not in rollouts.columns:
        rows = torch.arange(len(rollouts))
        rollouts["segment_po_starts"] = torch.tensor([1, 3, 6]).repeat(len(rollouts), 1)
        rollouts["segment_po_values"] = (rows[:, None] * 0.37 + torch.arange(3) * 0.21) % 1
        rollouts["segment_po_parent"] = torch.full_like(rows, -1)


def data_rows(prompts: int) -> list[dict[str, Any]]:
    """The prompt file's lines as verl's data set gives them."""
    lines = [problem(place) for place in range(prompts)]
    rows = [tiny.row(place, "train", place // 10, place % 10) for place in range(prompts)]
    return [
        {**row, "raw_prompt": row["prompt"], "extra_info": {**row["extra_info"], **fields}}
        for row, fields in zip(rows, ({k: v for k, v in line.items() if k != "prompt"} for line in lines), strict=True)
    ]


class VerlSide:
    """verl's FSDP engine with the adapter's update, whose optimiser does not move the weights."""

    def __init__(self, folder: Path, rank: int = 0, ranks: int = 1, port: int = 0, **engine: Any) -> None:
        self.tokenizer = make_tokenizer()
        self.worker = make_worker(folder / "model", rank, ranks, port, **engine)
        self.engine = self.worker.engine
        self.engine.optimizer_step = self._keep_gradient
        self.micro = 16
        self.rank, self.ranks = rank, ranks
        self.tokens: int | None = None  # per micro-batch, if verl is to cut them by tokens
        self.gradient: dict[str, Tensor] = {}

    def _keep_gradient(self) -> float:
        self.gradient = {name: whole(parameter.grad) for name, parameter in self.engine.module.named_parameters()}
        return 0.0

    def begin(self, case: Case, prompts: int = POOL) -> None:
        """A run with another stack."""
        self.passes = case.passes
        config = verl_settings(case)
        self.pool = Pool.of(data_rows(prompts), PromptTable())
        wanted = StackConfig.model_validate(dict(case.stack))
        self.stack = settings.build_stack(config, wanted, "sync", self.pool.prompts.columns)
        self.stack.start(Run(STEPS, case.group_size, case.rows, self.pool.prompts, 1, self.tokenizer))
        on_worker = Stack.from_specification(self.stack.specification())
        assert on_worker.fingerprint == self.stack.fingerprint
        for replaced in set(vars(self.engine)) & {"train_batch", "forward_backward_batch", "forward_step"}:
            delattr(self.engine, replaced)
        bind_engine(self.engine, on_worker, settings.owns_loss(self.stack))

    def old_log_probs(
        self, drawn: Drawn | Rollouts, micro: int = 0, units: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """verl's own pass: log-probs and entropies (B, T)."""
        from verl.workers.utils.padding import response_from_nested

        rows = len(drawn.prompts)
        fields = sequences(drawn) | ({} if units is None else {together.UNIT: list(units[:, None].unbind())})
        data = self._data(fields, rows, calculate_entropy=True, micro=micro or rows)
        with self.engine.eval_mode():
            output = self.engine.infer_batch(data)["model_output"]
        mask = data["response_mask"]
        found = [response_from_nested(output[name], mask).to_padded_tensor(0.0) for name in ("log_probs", "entropy")]
        return found[0] * drawn.mask, found[1] * drawn.mask

    def step(
        self, drawn: Drawn, number: int, entropy: Tensor, old: Tensor, micro: int, padding: int = 0,
        extended: Callable[[Rollouts], Rollouts] | None = None,
    ) -> Result:  # fmt: skip
        """Credit, update and end of one step, as the driver and the workers make it.

        Args:
            drawn: the rows.
            number: of the step.
            entropy: of the old policy.
            old: log-probs of all rows, those that are added too.
            micro: rows of a micro-batch.
            padding: rows that fill the batch.
            extended: what is made of the rows in the place of `extend_rollouts`.
        """
        stack = self.stack
        stack.begin_step(number, STEPS, seed=1)
        self.micro = micro
        keys = [f"u.{place}.{place}_{row}_0" for row, place in enumerate(drawn.prompt.tolist())]
        rollouts = rows_of_verl.to_rollouts(generated(drawn), keys, self.pool.prompts, number)
        add_request_columns(stack, rollouts, self.pool.prompts, drawn)
        add_columns_of_extended_rows(stack, rollouts)
        rollouts = extended(rollouts) if extended is not None else rollouts
        rows = len(rollouts)
        passes = {"old_log_probs": jagged(old, rollouts)}
        if rows == len(drawn.prompt):
            passes |= {"entropy": jagged(entropy, drawn), "ref_log_prob": jagged(reference_of(drawn, old), drawn)}
        rollouts = with_passes(rollouts, passes, stack)
        if settings.owns_credit(stack):
            credit = stack.credit(rollouts, self)  # type: ignore[arg-type]
        else:  # as verl's own estimator gives them
            advantages = verl_advantages(drawn)
            credit = credit_of_verl(rollouts, advantages)
        sizes = response_lengths(rollouts)
        fields = sequences(rollouts) | for_verl(rollouts, credit, sizes, excluded=not settings.owns_loss(stack))
        fields["old_log_probs"] = [row[:size] for row, size in zip(old, sizes, strict=True)]
        if "ref_log_prob" in passes:
            fields["ref_log_prob"] = list(passes["ref_log_prob"].unbind())
        frame = None
        if settings.owns_loss(stack):
            packed, packing = rows_of_verl.pack(stack.update_columns(rollouts, credit), rows_of_verl.OF_UPDATE)
            fields |= packed
            frame = Frame(number, rollouts.kinds, stack.step.shared_by_all(), packing)
        if stack.needs("together"):
            units = torch.cat([units_of(stack, rollouts, credit.groups), -1 - torch.arange(padding)])
        for name, values in fields.items():
            filler = _padding_row(name, values)
            fields[name] = [*values, *[filler] * padding]
        if stack.needs("together"):
            fields[together.UNIT] = list(units[:, None].unbind())
            order = together.dealt(units, self.ranks, 1, whole=settings.needs_whole_units(stack))
            fields = {name: [values[row] for row in order] for name, values in fields.items()}
        parts = [self._train(fields, rows + padding, frame, micro) for _ in range(self.passes)]
        metrics = {name: sum(part[name] for part in parts) / self.passes for name in parts[0]}
        stack.end_step(rollouts, credit, self)  # type: ignore[arg-type]
        found = {**stack.metrics.as_dict(), **metrics}
        return Result(
            credit.advantages * rollouts.mask, weights_of(credit, rollouts.mask), metrics["loss"], self.gradient,
            {name: value for name, value in found.items() if name.startswith("rlplugins/")},
        )  # fmt: skip

    def log_probs(self, prompts: Any, responses: Tensor, mask: Tensor, *, policy: str = "current") -> Tensor:
        """The engine's service, for hooks at the end of a step."""
        rows = len(prompts)
        nothing = torch.zeros(rows, dtype=torch.int64)
        drawn = Drawn(nothing, [list(prompt) for prompt in prompts], responses, mask, nothing, nothing, nothing)
        return self.old_log_probs(drawn)[0]

    def gradient_products(
        self, rollouts: Rollouts, advantages: Sequence[Tensor], *, parameters: str | None = None
    ) -> Gradients:
        """The engine's service, of this rank beside which the others run."""
        there = rows_of_verl.stored(sequences(rollouts), len(rollouts))
        found = gradients.shares(self.stack, rollouts, advantages, there, self.ranks, parameters=parameters)[self.rank]
        cut = {"use_dynamic_bsz": self.tokens is not None, "max_token_len_per_gpu": self.tokens or 0,
               "micro_batch_size_per_gpu": self.micro}  # fmt: skip
        share = replace(found, options={**found.options, **cut})
        return gradients.products(self.worker, self.engine.train_batch, share)

    def _train(self, fields: dict[str, list[Any]], rows: int, frame: Frame | None, micro: int) -> dict[str, float]:
        """One mini-batch on this rank's share of the rows."""
        from functools import partial

        from verl.utils.metric import reduce_metrics
        from verl.workers.config import FSDPActorConfig
        from verl.workers.utils.losses import ppo_loss

        share = rows // self.ranks
        mine = {name: values[self.rank * share : (self.rank + 1) * share] for name, values in fields.items()}
        entropy = frame is not None and self.stack.takes("entropy", "update")
        data = self._data(mine, share, calculate_entropy=entropy, micro=micro, frame=frame, whole=rows)
        config = FSDPActorConfig(
            strategy="fsdp2",
            rollout_n=1,
            ppo_mini_batch_size=rows,
            ppo_micro_batch_size_per_gpu=micro,
            use_dynamic_bsz=False,
        )
        self.gradient = {}
        with self.engine.train_mode():
            outputs = self.engine.train_batch(data, partial(ppo_loss, config=config))
        metrics = {
            name: list(value) if isinstance(value, list) else value for name, value in outputs["metrics"].items()
        }
        found = decoded(reduce_metrics({name: value for name, value in metrics.items() if name != "grad_norm"}), "")
        loss = torch.tensor(sum(outputs["loss"]))
        if self.ranks > 1:
            torch.distributed.all_reduce(loss)
        return {**found, "loss": float(loss) / self.ranks}

    def _data(
        self, fields: Mapping[str, list[Any]], rows: int, *, calculate_entropy: bool, micro: int,
        frame: Frame | None = None, whole: int = 0,
    ) -> Any:  # fmt: skip
        from verl.utils import tensordict_utils as tu

        data = rows_of_verl.stored(fields, rows)
        tu.assign_non_tensor(
            data, temperature=1.0, calculate_entropy=calculate_entropy, use_remove_padding=False,
            use_dynamic_bsz=self.tokens is not None, max_token_len_per_gpu=self.tokens or 0,
            micro_batch_size_per_gpu=micro, use_fused_kernels=False, global_batch_size=whole or rows,
        )  # fmt: skip
        if frame is not None:
            tu.assign_non_tensor_data(data, FRAME, frame)
        return data


def verl_settings(case: Case) -> dict[str, Any]:
    """verl's configuration, as far as the adapter reads it."""
    config: dict[str, Any] = {
        "algorithm": {"adv_estimator": "grpo"},
        "actor_rollout_ref": {"rollout": {"n": case.group_size}, "actor": {"strategy": "fsdp2"}},
    }
    actor = "actor_rollout_ref.actor"
    given = {f"{actor}.use_kl_loss": True, f"{actor}.kl_loss_coef": 0.0} if case.reference else {}
    for path, value in (given | dict(case.settings or {})).items():
        node = config
        *parents, name = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return config


def sequences(drawn: Drawn | Rollouts) -> dict[str, list[Any]]:
    """The columns that verl's engine reads."""
    sizes = response_lengths(drawn)
    found: dict[str, list[Any]] = {}
    for row, prompt in enumerate(drawn.prompts):
        first, rest = torch.tensor(prompt), drawn.responses[row, : sizes[row]]
        own = drawn.mask[row, : sizes[row]].long()
        ids = torch.cat([first, rest])
        values = {"prompts": first, "responses": rest, "input_ids": ids, "position_ids": torch.arange(len(ids)),
                  "response_mask": own, "loss_mask": own}  # fmt: skip
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def generated(drawn: Drawn) -> Any:
    """Rows as TransferQueue has them after generation."""
    rows, sizes = len(drawn.prompt), response_lengths(drawn)
    scores = [torch.cat([torch.zeros(size - 1), score]) for size, score in zip(sizes, drawn.scores, strict=True)]
    objects = {
        "extra_fields": [
            {"reward_extra_info": {f"part{place}": value for place, value in enumerate(row)}}
            for row in drawn.components.tolist()
        ],
        "extra_info": [{"difficulty": (int(place) // 10 + int(place) % 10) / 18} for place in drawn.prompt],
    }  # fmt: skip
    return rows_of_verl.stored(sequences(drawn) | {"rm_scores": scores} | objects, rows)


def response_lengths(drawn: Drawn | Rollouts) -> list[int]:
    """Tokens of each response, tool output included."""
    return ((torch.arange(drawn.mask.shape[1]) + 1) * (drawn.responses != 0)).amax(1).tolist()


def jagged(column: Tensor, drawn: Drawn | Rollouts) -> Tensor:
    """A response column as verl's passes give it."""
    rows = [row[:size] for row, size in zip(column, response_lengths(drawn), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def verl_advantages(drawn: Drawn) -> Tensor:
    """verl's own GRPO on these rows, (B, T)."""
    import numpy as np
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    last = drawn.mask.long().cumsum(1).argmax(1, keepdim=True)
    rewards = torch.zeros(drawn.mask.shape).scatter(1, last, drawn.scores)
    return compute_grpo_outcome_advantage(rewards, drawn.mask, np.array(drawn.prompt.tolist()))[0]  # type: ignore[no-any-return]


def _padding_row(name: str, values: Sequence[Any]) -> Any:
    """What verl fills a batch with: a response of one token, in no mask."""
    if name in ("prompts", "responses"):
        return torch.full((4 if name == "prompts" else 1,), 2)
    if name in ("input_ids", "position_ids"):
        return torch.full((5,), 2) if name == "input_ids" else torch.arange(5)
    return rows_of_verl.filler(list(values))


def whole(gradient: Any) -> Tensor:
    """A parameter or gradient from its shards."""
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def make_worker(model: Path, rank: int, ranks: int, port: int, strategy: str = "fsdp2", shards: int = -1) -> Any:
    """verl's training worker on its FSDP engine, in this process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port or free_port()))  # fmt: skip
    from verl.trainer.config import CheckpointConfig
    from verl.utils.distributed import initialize_global_process_group
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine_workers import TrainingWorker, TrainingWorkerConfig

    if not torch.distributed.is_initialized():
        initialize_global_process_group()
    if strategy == "fsdp":  # torch would have a model on an accelerator before it lets rank 0 send it to the others
        from torch.distributed.fsdp import _init_utils

        _init_utils._check_module_states_for_sync_module_states = lambda states: None
    engine = FSDPEngineConfig(
        strategy=strategy, use_torch_compile=False, mixed_precision={"param_dtype": "fp32"}, use_dynamic_bsz=False,
        micro_batch_size_per_gpu=16, infer_micro_batch_size_per_gpu=16, fsdp_size=shards,
    )  # fmt: skip
    config = HFModelConfig(
        path=str(model), use_remove_padding=False, enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=config, engine_config=engine,
            optimizer_config=FSDPOptimizerConfig(lr=1e-3), checkpoint_config=CheckpointConfig(),
        )
    )  # fmt: skip
    worker.reset()
    return worker


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
