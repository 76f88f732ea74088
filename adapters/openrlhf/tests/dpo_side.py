"""OpenRLHF's DPOTrainer on a tiny model in float32, without DeepSpeed: `dpo_side.py FOLDER RANK RANKS PORT OUTPUT`.

Rank 0 writes, per case of `CASES`, loss and gradient of every optimiser step.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlplugins import Pairs, Plugin, hookimpl, needs
from rlplugins.defaults import METHODS
from rlplugins.stack import StackConfig

STEPS, PAIRS, RATE = 3, 16, 1e-2


class ProbePairs(Plugin):
    """Exchanges the sides of one pair, leaves two out, weighs pairs and tokens, and adds a term over the mini-batch."""

    name = "probe-pairs"

    @hookimpl
    def build_preferences(self, pairs: Pairs) -> Pairs:
        number = pairs.prompt_keys.remainder(5)
        pairs = pairs.swapped(number == 0).select(number != 1)
        pairs.weights = 1 + pairs.prompt_keys.remainder(3).float()[:, None]
        pairs.chosen_token_weights = 1 + pairs.chosen.remainder(2).float()
        pairs.rejected_token_weights = 1 + pairs.rejected.remainder(2).float()
        pairs["size"] = pairs.chosen_mask.sum(1)
        return pairs

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        batch.share("tokens", batch.sum(batch["size"].sum()))

    @hookimpl
    def auxiliary_loss(self, chosen_log_probs: Tensor, weights: Tensor, batch: Any) -> Tensor:
        return -0.1 * (chosen_log_probs.sum(1) * (weights[:, 0] > 0)).sum() / batch.shared["tokens"]


class ProbeIdle(Plugin):
    """Changes nothing, so that the loss is what the flags mean."""

    name = "probe-idle"

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        return None


class ProbeRenew(Plugin):
    """The reference is the policy at the beginning of each step."""

    name = "probe-renew"

    @hookimpl
    def reference_policy(self) -> str:
        return "current"


class ProbeSimpo(Plugin):
    """A loss without a reference."""

    name = "probe-simpo"
    uses: ClassVar[dict[str, Any]] = {"preference_loss": {"simpo": {"beta": 1.0, "gamma": 0.5}}}


class ProbeMargin(Plugin):
    """A factor from the log-probs of the whole mini-batch before its first backward."""

    name = "probe-margin"
    needs = (needs.MINI_BATCH_LOG_PROBS,)

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        batch.share("mean", batch.sum(batch["rejected_log_probs"].sum()) / batch.token_weight)

    @hookimpl
    def auxiliary_loss(self, rejected_log_probs: Tensor, batch: Any) -> Tensor:
        return -0.1 * batch.shared["mean"] * rejected_log_probs.sum() / batch.token_weight


METHODS |= {plugin.name: plugin for plugin in (ProbePairs, ProbeIdle, ProbeRenew, ProbeSimpo, ProbeMargin)}


@dataclass(frozen=True)
class Case:
    """A stack with flags of `train_dpo`; the local trainer's settings that mean the same."""

    plugins: tuple[Any, ...] | None = ()
    flags: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "rdpo": Case(({"rdpo": {"eps": 0.2, "beta": 0.3}},)),
    "rdpo+nll": Case(({"rdpo": {"per_pair": True}},), {"nll_loss_coef": 0.3}, {"nll_coefficient": 0.3}),
    "pairs": Case(("probe-pairs",), {"beta": 0.5}, {"beta": 0.5}),
    "renew": Case(("probe-renew",)),
    "simpo": Case(("probe-simpo",)),
    "margin": Case(("probe-margin",)),
    "pairs+ipo": Case(("probe-pairs",), {"ipo_enable": True}, {"preference_loss": "ipo"}),
}
"""Stacks in both trainers."""

FLAGS: dict[str, dict[str, Any]] = {
    "dpo": {}, "beta": {"beta": 0.7}, "cdpo": {"label_smoothing": 0.2}, "ipo": {"ipo_enable": True},
    "nll": {"nll_loss_coef": 0.4},
}  # fmt: skip
"""Flags whose loss is OpenRLHF's own under a stack that changes nothing."""


def lines() -> list[dict[str, Any]]:
    """Pairs of responses that end with the tokenizer's end token, so that both trainers see the same tokens."""
    end = "<|end|>"
    return [{"prompt": f"{a}+{a % 4}=", "chosen": "1" * (1 + a % 5) + end, "rejected": str(a * 37) + end,
             "flip_rate": (a % 4) / 10} for a in range(PAIRS)]  # fmt: skip


class Strategy:
    """What DPOTrainer asks of DeepSpeed's strategy, with plain gradients that are averaged over ranks."""

    ring_attn_group = None

    def __init__(self, args: Namespace, ranks: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.args = args
        self.ranks = ranks
        self.accumulated_gradient = args.train.batch_size // args.train.micro_batch_size // ranks
        self.ds_device_mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp",))
        self.gradients: list[Tensor] = []
        self._calls = 0

    def is_rank_0(self) -> bool:
        return torch.distributed.get_rank() == 0

    def print(self, *words: Any) -> None:
        pass

    def get_grad_norm(self, model: Any) -> float:
        return 0.0

    def backward(self, loss: Tensor, model: Any, optimizer: Any) -> None:
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, optimizer: Any, model: Any, scheduler: Any) -> None:
        self._calls += 1
        if self._calls % self.accumulated_gradient:
            return
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self.ranks
        self.gradients.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()

    def all_reduce(self, values: dict[str, Any]) -> dict[str, float]:
        found = {}
        for name, value in values.items():
            total = torch.tensor(float(value))
            torch.distributed.all_reduce(total)
            found[name] = float(total) / self.ranks
        return found


def arguments(folder: Path, micro: int, flags: dict[str, Any]) -> Namespace:
    """The flags that the trainer and its data read."""
    model = {
        "beta": 0.1,
        "label_smoothing": 0.0,
        "ipo_enable": False,
        "nll_loss_coef": 0.0,
        "aux_loss_coef": 0.0,
        **flags,
    }
    return Namespace(
        model=Namespace(**model), ds=Namespace(packing_samples=False, zero_stage=2),
        logger=Namespace(wandb=Namespace(key=None), tensorboard_dir=None, logging_steps=1),
        train=Namespace(batch_size=PAIRS, micro_batch_size=micro, seed=0), eval=Namespace(steps=-1),
        ckpt=Namespace(save_steps=-1, path=str(folder / "checkpoints")),
        data=Namespace(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=False),
    )  # fmt: skip


def run(folder: Path, case: Case, micro: int, ranks: int) -> dict[str, Any]:
    """Losses and gradients of a few optimiser steps on all pairs; `plugins` None: without rlplugins."""
    from datasets import Dataset
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import Actor
    from openrlhf.trainer.dpo_trainer import DPOTrainer
    from openrlhf.utils.distributed_sampler import DistributedSampler
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlplugins_openrlhf.preferences import DpoRun

    args = arguments(folder, micro, case.flags)
    strategy = Strategy(args, ranks)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = RewardDataset(Dataset.from_list(lines()), tokenizer, 64, strategy, is_dpo=True, num_processors=1)
    sampler = DistributedSampler(data, num_replicas=ranks, rank=torch.distributed.get_rank(), shuffle=True, seed=0)
    loader = DataLoader(data, batch_size=micro, sampler=sampler, collate_fn=data.collate_fn, drop_last=True)
    model = Actor(str(folder / "model"), attn_implementation="sdpa")
    model.model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)  # it loads half precision
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses: list[float] = []

    class Recording(DPOTrainer):
        def save_logs_and_checkpoints(
            self, args: Any, step: int, bar: Any, logs: Any = None, states: Any = None
        ) -> None:
            losses.append(strategy.all_reduce({"loss": logs["loss_mean"]})["loss"])

    trainer = Recording(
        model=model, ref_model=copy.deepcopy(model).requires_grad_(False), strategy=strategy, tokenizer=tokenizer,
        optim=optimizer, train_dataloader=loader, eval_dataloader=None,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), beta=args.model.beta, max_epochs=STEPS,
    )  # fmt: skip
    if case.plugins is not None:
        DpoRun(trainer, StackConfig(plugins=list(case.plugins))).bind()
    trainer.fit(args)
    return {"loss": losses, "gradient": torch.stack(strategy.gradients)}


def cases(ranks: int) -> Iterator[tuple[str, Case, int]]:
    """Name, case and size of a micro-batch: on one rank also what the flags mean without a stack."""
    if ranks == 1:
        for name, flags in FLAGS.items():
            yield f"{name} alone", Case(None, flags), 4
            yield f"{name} in a stack", Case(("probe-idle",), flags), 4
    for name, case in CASES.items():
        yield name, case, PAIRS if ranks == 1 else 2


def main() -> None:
    from rlplugins_openrlhf.cpu.launch import environment

    os.environ.update(environment())
    folder, rank, ranks, port, output = Path(sys.argv[1]), *map(int, sys.argv[2:5]), Path(sys.argv[5])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    import openrlhf.datasets.reward_dataset as data

    from rlplugins_openrlhf.preferences import keep_places

    keep_places(data)
    found = {name: run(folder, case, micro, ranks) for name, case, micro in cases(ranks)}
    if rank == 0:
        torch.save(found, output)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def write(folder: Path) -> Path:
    """Model and pairs."""
    from rlplugins.testing.tiny import write_model

    write_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines()))
    return folder


if __name__ == "__main__":
    main()
