"""OpenRLHF's actor trainer on a real DeepSpeed engine with the adapter's update, in one process and without Ray."""

from __future__ import annotations

import functools
import os
import runpy
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlplugins.stack import StackConfig
from rlplugins.testing.parity import STEPS, Case, Drawn, Result, add_request_columns, reference_of, weights_of
from rlplugins_openrlhf import columns, settings, worker
from rlplugins_openrlhf.columns import to_responses
from rlplugins_openrlhf.engine import OpenRLHFEngine
from rlplugins_openrlhf.pool import PoolPrompt
from rlplugins_openrlhf.trainer import TrainingRun

MODEL = "model"
LEARNING_RATE = 1e-3
WIDTH = 9
"""Tokens of a response at most, as in `rlplugins.testing.parity`."""


class _Read(BaseException):
    """Carries the flags out of OpenRLHF's command."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.given = args


def read_flags(words: Sequence[str]) -> Any:
    """OpenRLHF's own reading of a command line of `train_ppo_ray`, nested."""
    from openrlhf.utils import config

    original = config.hierarchize

    def stop(args: Any) -> Any:
        raise _Read(original(args))

    config.hierarchize = stop
    argv, sys.argv = sys.argv, ["train_ppo_ray", *words]
    try:
        runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
    except _Read as found:
        args = found.given
    finally:
        config.hierarchize, sys.argv = original, argv
    args.actor.eps_clip_low_high = args.actor.eps_clip_low_high or (args.actor.eps_clip, args.actor.eps_clip)
    return args


def flags_of(case: Case, folder: Path, micro: int, ranks: int = 1) -> list[str]:
    """The command line of a case, whose rows are one mini-batch."""
    words = {
        "actor.model_name_or_path": str(folder / MODEL), "reward.remote_url": "reward.py",
        "data.prompt_dataset": str(folder / "prompts.jsonl"), "data.input_key": "prompt", "data.max_len": "64",
        "rollout.batch_size": str(case.rows // case.group_size), "rollout.n_samples_per_prompt": str(case.group_size),
        "rollout.micro_batch_size": str(micro), "train.batch_size": str(-(-case.rows // micro) * micro),
        "train.micro_batch_size": str(micro),
        "train.max_epochs": str(case.passes), "train.num_episodes": "1", "train.seed": "1",
        "actor.num_gpus_per_node": str(ranks), "ds.zero_stage": "0", "ds.attn_implementation": "sdpa",
        "algo.advantage.estimator": "group_norm" if case.group_size > 1 else "flash_reinforce", "algo.kl.init_coef": "0",
        "vllm.num_engines": "1",
    } | {name: str(value) for name, value in (case.settings or {}).items()}  # fmt: skip
    given = [word for name, value in words.items() for word in (f"--{name}", value.format(folder=folder)) if word]
    return [*given, "--data.apply_chat_template"]


class OpenRLHFSide:
    """One rank's actor, whose optimiser does not move the weights.

    Args:
        folder: with the inputs of `rlplugins.testing.parity`.
        case: the stack and its rows.
        micro: rows of a micro-batch.
        rank: of this process.
        ranks: processes of the update.
    """

    def __init__(self, folder: Path, case: Case, micro: int = 16, rank: int = 0, ranks: int = 1) -> None:
        from openrlhf.trainer.ppo_trainer import prepare_datasets
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
        from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
        from openrlhf.utils import get_strategy, get_tokenizer

        self.case, self.rank, self.ranks = case, rank, ranks
        self.args = read_flags(flags_of(case, folder, micro, ranks))
        self.strategy = get_strategy(self.args)
        self.strategy.param_dtype = "fp32"
        self.strategy.setup_distributed()
        self.tokenizer = get_tokenizer(str(folder / MODEL), None, "left", self.strategy)
        self.actor = make_actor(self.args, self.strategy)
        self.updater = make_trainer(self.strategy, self.actor)
        self.updater.strategy.optimizer_step = functools.partial(self._keep, self.updater.strategy.optimizer_step)
        self.gradient: dict[str, Tensor] = {}
        maker = RemoteExperienceMaker.__new__(RemoteExperienceMaker)
        maker.args, maker.strategy, maker.tokenizer = self.args, self.strategy, self.tokenizer
        maker.advantage_estimator, maker.kl_ctl = self.args.algo.advantage.estimator, SimpleNamespace(value=0.0)
        maker.make_experience = self._passes
        loader = prepare_datasets(self.strategy, self.tokenizer)[0]
        trainer = SimpleNamespace(
            samples_generator=SamplesGenerator(self.strategy, loader, None, self.tokenizer, []),
            experience_maker=maker, prompts_dataloader=loader, generate_kwargs={"max_new_tokens": WIDTH, "max_len": 64},
            vllm_engines=[], actor_model_group=None, critic_model_group=None, reference_model_group=None,
        )  # fmt: skip
        self.run = Run(trainer, StackConfig.model_validate(dict(case.stack)))
        self.run.engine = Engine(self.run, self)
        self.run.worker, self.run.rank = bind_worker(self.run, self.updater), rank
        if not self.run.owns_loss:
            self.updater.actor_loss_fn = functools.partial(self._keep_loss, self.updater.actor_loss_fn)
        self.maker = maker
        maker.make_experience = functools.partial(self.run.make_passes, maker.make_experience)
        maker.compute_advantages_and_returns = functools.partial(
            self.run.give_credit, maker.compute_advantages_and_returns
        )

    def _keep(self, original: Any, optimizer: Any, model: Any, scheduler: Any, **named: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        engine = model.model
        if engine.is_gradient_accumulation_boundary():
            self.gradient = {name: safe_get_full_grad(item).clone() for name, item in engine.module.named_parameters()}
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0  # of this step; OpenRLHF's schedule goes on
        original(optimizer, model, scheduler, **named)

    def _keep_loss(self, original: Any, *given: Any, dp_size: int, **named: Any) -> Any:
        """OpenRLHF's own loss, scaled so that DeepSpeed's means over micro-batches and ranks give that of the mini-batch."""
        found = original(*given, dp_size=dp_size, **named)
        self.losses.append(float(found[0].detach()) / self.strategy.accumulated_gradient / dp_size)
        return found

    def _summed(self) -> float:
        total = torch.tensor(sum(self.losses) / self.case.passes)
        torch.distributed.all_reduce(total)
        return float(total)

    def _passes(self, samples: list[Any]) -> list[Any]:
        """In the place of the passes on Ray actors: the step's old log-probs, and those of the reference."""
        from rlplugins_openrlhf.columns import to_sequences

        assert self.run.rollouts is not None
        for sample in samples:
            rows = torch.tensor(sample.index)
            own = rows.clamp(max=len(self.old) - 1)
            starts = torch.tensor([len(prompt) for prompt in self.run.rollouts.prompts])[own]
            wide = sample.action_mask.shape[1]
            sample.action_log_probs = to_sequences(self.old[own], starts, wide) * sample.action_mask
            if self.case.reference:
                reference = reference_of(self.drawn, self.old)
                sample.base_action_log_probs = to_sequences(reference[own], starts, wide) * sample.action_mask
            sample.kl = torch.zeros_like(sample.action_log_probs)
        if self.run.keeps_entropy:
            self.run.worker.rlplugins_entropies.kept = []
            for sample in samples:
                self._forward(sample)
            self.run.entropies = dict(zip(map(id, samples), worker.take_entropies(self.run.worker), strict=True))
        return samples

    def _forward(self, sample: Any) -> Tensor:
        self.actor.eval()
        with torch.no_grad():
            found = self.actor(sample.sequences, sample.action_mask, sample.attention_mask)
        self.actor.train()
        return found

    def old_log_probs(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """OpenRLHF's own pass: log-probs and entropies (B, T)."""
        from rlplugins_openrlhf.engine import whole

        sequences, actions, attention, starts = whole(drawn.prompts, drawn.responses, drawn.mask)
        self.actor.eval()
        with torch.no_grad():
            log_probs, output = self.actor(sequences, actions, attention, return_output=True, return_entropy=True)
        self.actor.train()
        width = drawn.mask.shape[1]
        found = [to_responses(column, starts, width) * drawn.mask for column in (log_probs, output.entropy)]
        return found[0], found[1]

    def step(self, drawn: Drawn, number: int, old: Tensor, extended: Any = None) -> Result:
        """Credit, update and end of one step, as the trainer's process and the ranks make it.

        Args:
            drawn: the rows.
            number: of the step.
            old: their old log-probs, and those of rows that are added.
            extended: what `extend_rollouts` would make of rollouts.
        """
        run, trainer = self.run, self.updater
        self.drawn, self.old, self.gradient, self.losses = drawn, old, {}, []
        run.done = number
        run.begin()
        run.drawn, run.extended = drawn, extended
        samples = run.after_generation(samples_of(drawn, run))
        original = type(self.maker).make_experience_batch.__get__(self.maker)
        experiences = run.make_experiences(original, samples)
        credit = run.credit
        assert credit is not None
        mine = experiences[
            self.rank * len(experiences) // self.ranks : (self.rank + 1) * len(experiences) // self.ranks
        ]
        for experience in mine:
            trainer.replay_buffer.append(experience)
        status = trainer.ppo_train(0.0)
        trainer.replay_buffer.clear()
        rollouts = run.rollouts
        assert rollouts is not None
        run.end(credit)
        mask = rollouts.mask
        found = {**run.stack.metrics.as_dict(), **status}
        loss = sum(status.get(name, 0.0) for name in worker.PARTS) if run.owns_loss else self._summed()
        return Result(
            credit.advantages * mask, weights_of(credit, mask), float(loss), self.gradient,
            {name: value for name, value in found.items() if name.startswith("rlplugins/")},
        )  # fmt: skip


class Run(TrainingRun):
    """The trainer's process, whose ranks are this process."""

    worker: Any
    rank: int
    drawn: Drawn
    extended: Any = None
    entropies: dict[int, Tensor]

    def planned_steps(self) -> int:
        """As the local trainer plans them."""
        return STEPS

    def after_generation(self, samples: list[Any]) -> list[Any]:
        """The rows as they were drawn, or what a test makes of them in the place of `extend_rollouts`."""
        columns.complete(samples)
        drawn = columns.to_rollouts(samples, self.pool.known([sample.prompts[0] for sample in samples]), self.done)
        add_request_columns(self.stack, drawn, self.pool.prompts, self.drawn)
        add_segments(self.stack, drawn)
        self.rollouts = drawn
        if self.extended is not None:
            self.rollouts = self.extended(drawn)
            return columns.samples_of(self.rollouts, drawn, samples)
        return samples

    def gradients(self, asked: Any) -> Any:
        """Of this rank, beside which the others run."""
        return worker.gradient_products(self.worker, asked[self.rank])

    def make_passes(self, original: Any, samples_list: list[Any]) -> list[Any]:
        """The passes, whose entropies are there already."""
        return original(samples_list)  # type: ignore[no-any-return]


class Engine(OpenRLHFEngine):
    """The services of the engine, as far as they need no Ray."""

    def __init__(self, run: Run, side: OpenRLHFSide) -> None:
        super().__init__(run)
        self.side = side

    def log_probs(self, prompts: Any, responses: Tensor, mask: Tensor, *, policy: str = "current") -> Tensor:
        """By this process alone."""
        nothing = torch.zeros(len(prompts), dtype=torch.int64)
        drawn = Drawn(nothing, [list(prompt) for prompt in prompts], responses, mask, nothing, nothing, nothing)
        return self.side.old_log_probs(drawn)[0]


def add_segments(stack: Any, rollouts: Any) -> None:
    """Give the rows what `segment-po` writes on them in `extend_rollouts`: three segments with values, and no parents."""
    if any(plugin.name == "segment-po" for plugin in stack.plugins):
        rows = torch.arange(len(rollouts))
        rollouts["segment_po_starts"] = torch.tensor([1, 3, 6]).repeat(len(rows), 1)
        rollouts["segment_po_values"] = (0.37 * rows[:, None] + 0.21 * torch.arange(3)) % 1
        rollouts["segment_po_parent"] = torch.full_like(rows, -1)


def bind_worker(run: Run, trainer: Any) -> Any:
    """What the handshake binds in an actor of the policy."""
    module = sys.modules[worker.ACTOR]
    original = getattr(module, worker.WINDOWS)
    if isinstance(original, functools.partial):  # of the side before
        setattr(module, worker.WINDOWS, original.args[0])
    stub = SimpleNamespace(trainer=trainer, actor=trainer.actor)
    size = settings.micro_batch(run.args) if run.keeps_together else 0
    forward = run.stack.claims("forward")
    binding = worker.Binding(
        run.stack.specification(), loss=run.owns_loss, entropy=run.keeps_entropy, forward=forward, whole=size
    )
    answer = worker.bind(stub, binding)
    assert answer["fingerprint"] == run.stack.fingerprint
    return stub


def make_actor(args: Any, strategy: Any) -> Any:
    """OpenRLHF's actor in float32 on a DeepSpeed engine."""
    from openrlhf.models import Actor

    actor = Actor(
        args.actor.model_name_or_path, attn_implementation="sdpa", ds_config=strategy.get_ds_train_config(),
        temperature=args.rollout.temperature,
    )  # fmt: skip
    actor.model.float()
    return actor


def make_trainer(strategy: Any, actor: Any) -> Any:
    """OpenRLHF's trainer of the actor."""
    from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

    adam = {"lr": LEARNING_RATE, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    plan = {
        "optim": "adam",
        "adam": adam,
        "muon": {},
        "lr_scheduler": "constant",
        "max_norm": 0.0,
        "scheduler_steps": 100,
    }
    actor, optimizer, scheduler = strategy.prepare((actor, plan))
    return ActorPPOTrainer(
        strategy, actor, None, optimizer, scheduler, micro_train_batch_size=strategy.args.train.micro_batch_size,
        dataloader_pin_memory=False, vllm_engines=None,
    )  # fmt: skip


def samples_of(drawn: Drawn, run: Run) -> list[Any]:
    """Rows as OpenRLHF's samples generator gives them."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    sizes = ((torch.arange(drawn.mask.shape[1]) + 1) * (drawn.responses != 0)).amax(1).tolist()
    generator = SamplesGenerator.__new__(SamplesGenerator)
    made = []
    for row, (prompt, size) in enumerate(zip(drawn.prompts, sizes, strict=True)):
        own = [place for place in range(size) if drawn.mask[row, place]]
        score = float(drawn.scores[row])
        made.append(
            generator._process_response_into_experience(
                {
                    "prompt": PoolPrompt.of("", int(drawn.prompt[row]), int(drawn.prompt[row])), "label": "",
                    "observation_tokens": [*prompt, *drawn.responses[row, :size].tolist()],
                    "action_ranges": [(len(prompt) + place, len(prompt) + place + 1) for place in own],
                    "rollout_log_probs": None, "reward": score, "scores": score, "truncated": False,
                    "extra_logs": {f"part{place}": value for place, value in enumerate(drawn.components[row].tolist())},
                }
            )
        )  # fmt: skip
    return made


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def join(rank: int = 0, ranks: int = 1, port: int = 0) -> None:
    """What the launcher of a rank sets."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port or free_port()),
    )
