"""The update on a rank of OpenRLHF: mini-batches are opened before their first micro-batch, their loss is the stack's.

`ppo_train` cuts its rows into micro-batches and groups them into the windows between two optimiser steps with
`iter_grad_accum_global_norm`; `training_step` asks `actor_loss_fn` for the loss of each. Both are replaced when the trainer's
process shakes hands with this one: the first in the module that calls it, since it takes no trainer, the second on the rank's
own trainer. What the loss function is not told (the entropy) comes from forward hooks on the model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.services import Gradients
from rlplugins.stack import Stack
from rlplugins.steps import Metrics
from rlplugins.update import Loss, MiniBatch, moved
from rlplugins_openrlhf import columns as rows_of_openrlhf
from rlplugins_openrlhf import forward, gradients
from rlplugins_openrlhf.columns import FRAME, REAL, START, Packing, to_responses
from rlplugins_openrlhf.settings import loss_values

WINDOWS = "iter_grad_accum_global_norm"
PARTS = ("policy_loss", "kl_loss", "auxiliary_loss")
ACTOR, CRITIC = "openrlhf.trainer.ray.ppo_actor", "openrlhf.trainer.ray.ppo_critic"


@dataclass(frozen=True)
class Binding:
    """What a process of the run is told in the handshake.

    Attributes:
        specification: of the stack.
        loss: whether the stack computes the actor's loss.
        critic: whether the critic learns what the stack says.
        entropy: whether the pass over the step's rows is to keep their entropies.
        clip: bound of the change of the critic's values.
        forward: whether the stack's `forward` stands for the model's.
        whole: rows of a micro-batch, where these lie in the buffer as they are to be trained; 0: OpenRLHF draws them.
    """

    specification: Mapping[str, Any]
    loss: bool = False
    critic: bool = False
    entropy: bool = False
    clip: float | None = None
    forward: bool = False
    whole: int = 0


@dataclass(frozen=True)
class Frame:
    """What the mini-batches of a step need beside their rows.

    Attributes:
        step: number of the step.
        kinds: names of the row kinds.
        shared: per plugin what it shared in the credit phase.
        packing: how the columns travel.
    """

    step: int
    kinds: tuple[str, ...]
    shared: Mapping[str, Mapping[str, Any]]
    packing: Packing


@dataclass
class Micro:
    """One micro-batch of a mini-batch.

    Attributes:
        rows: (b,) int64, place of each row in the mini-batch; -1: it only fills.
        starts: (b,) tokens of each row's prompt.
        mini: the mini-batch.
        width: T of the step.
    """

    rows: Tensor
    starts: Tensor
    mini: MiniBatch
    width: int


class Update:
    """Mini-batches of the stack in one trainer of a rank.

    Args:
        stack: the plugins, built in this process, without state.
        trainer: OpenRLHF's `ActorPPOTrainer` or `CriticPPOTrainer`.
    """

    def __init__(self, stack: Stack, trainer: Any) -> None:
        self.stack = stack
        self.trainer = trainer
        self.strategy = trainer.strategy
        self.micro: Micro | None = None
        self.metrics = Metrics()
        self.optimiser_steps = 0

    def bind(self, module: str) -> None:
        """Take over the windows of micro-batches in the module that asks for them."""
        owner: Any = sys.modules[module]
        original = getattr(owner, WINDOWS)
        if isinstance(original, functools.partial):
            raise ConfigurationError("rlplugins is bound to this process already")
        setattr(owner, WINDOWS, functools.partial(self.windows, original))

    def windows(
        self, original: Callable[..., Any], items: Iterable[Any], strategy: Any, size: int, mask_of: Callable[..., Any]
    ) -> Iterator[tuple[Any, Any]]:
        """OpenRLHF's micro-batches with its normalisers; those of a mini-batch that counts nowhere are left out."""
        for window in in_parts(items, max(1, int(size))):
            if FRAME not in window[0].info:  # rows on which the stack has no say
                yield from original(iter(window), strategy, size, mask_of)
                continue
            micros, weightless = self.open(window)
            self.metrics.log("rlplugins/update_skipped", float(weightless))
            if weightless:
                continue
            for item, norm in original(iter(window), strategy, size, mask_of):
                self.micro = micros[id(item)]
                yield item, norm
            self.optimiser_steps += 1
        self.micro = None

    def open(self, window: Sequence[Any]) -> tuple[dict[int, Micro], bool]:
        """The mini-batch of these micro-batches after `prepare_mini_batch`, and whether it counts nowhere."""
        infos = [rows_of_openrlhf.taken(item.info) for item in window]
        frame: Frame = infos[0][FRAME][0][0]
        device = device_of(self.strategy)
        columns = rows_of_openrlhf.unpacked(infos, frame.packing, device)
        parts, last = [], 0
        for info in infos:
            real = torch.tensor([bool(kept) for kept in info[REAL]])
            rows = torch.where(real, real.cumsum(0) - 1 + last, -1).to(device)
            starts = torch.tensor([int(start) for start in info[START]]).to(device)
            parts.append((rows, starts))
            last += int(real.sum())
        log_probs = None
        if self.stack.needs_mini_batch_log_probs and self.optimiser_steps:
            log_probs = self.current_log_probs(window, parts, columns["mask"], device)
        mini = self.stack.mini_batch(
            columns, moved(frame.shared, device), kinds=frame.kinds, reduce=self.sum_over_ranks,
            log_probs=log_probs, metrics=self.metrics,
        )  # fmt: skip
        width = frame.packing.width
        micros = {id(item): Micro(*part, mini, width) for item, part in zip(window, parts, strict=True)}
        return micros, self.counts_nowhere(mini)

    def counts_nowhere(self, mini: MiniBatch) -> bool:
        """Whether no step is to be made, on any rank."""
        return mini.weightless

    def current_log_probs(
        self, window: Sequence[Any], parts: Sequence[tuple[Tensor, Tensor]], mask: Any, device: Any
    ) -> Tensor | None:
        """Log-probs (n, T) of all rows under the present weights."""
        actor = self.trainer.actor
        found = []
        actor.eval()
        for item, (rows, starts) in zip(window, parts, strict=True):
            item.to_device(device)
            with torch.no_grad():
                log_probs = actor(
                    item.sequences, item.action_mask, attention_mask=item.attention_mask,
                    ring_attn_group=self.strategy.ring_attn_group,
                )  # fmt: skip
            if isinstance(log_probs, tuple):
                log_probs = log_probs[0]
            found.append(to_responses(log_probs.float(), starts, mask.shape[1])[rows >= 0])
        actor.train()
        return torch.where(mask, torch.cat(found), 0.0)

    @functools.cached_property
    def ranks(self) -> int:
        """Processes that share the mini-batch."""
        return int(torch.distributed.get_world_size(self.group))

    @functools.cached_property
    def group(self) -> Any:
        """Their group."""
        return self.strategy.ds_device_mesh["dp"].get_group()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added over the ranks."""
        if self.ranks == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.group)
        return total

    def over_ranks(self, metrics: Metrics) -> Metrics:
        """What all ranks logged."""
        if self.ranks == 1:
            return metrics
        everyone: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(everyone, metrics.sums(), group=self.group)
        merged = Metrics()
        for sums in everyone:
            for name, (total, weight) in sums.items():
                if weight:
                    merged.log(name, total / weight, weight)
        return merged

    def factor(self, dp_size: int) -> float:
        """DeepSpeed averages gradients over ranks and micro-batches; the parts of the loss are to add up."""
        return float(dp_size * max(1, int(self.strategy.accumulated_gradient)))


class ActorUpdate(Update):
    """The actor's step on the stack's loss."""

    def __init__(self, stack: Stack, trainer: Any) -> None:
        super().__init__(stack, trainer)
        self.takes_entropy = stack.takes("entropy", "update")
        self.entropy: Tensor | None = None
        self.values = loss_values()
        trainer.actor_loss_fn = self.loss
        trainer.training_step = functools.partial(self.step, trainer.training_step)
        trainer.ppo_train = functools.partial(self.train, trainer.ppo_train)
        actor = trainer.args.actor
        if self.takes_entropy or actor.entropy_coef is not None:
            actor.entropy_coef = 0.0  # computed; the bonus itself is the stack's
        if self.takes_entropy:
            trainer.actor.register_forward_hook(self.keep_entropy)
        self.bind(ACTOR)

    def keep_entropy(self, model: Any, given: Any, output: Any) -> None:
        """What the model computed beside the log-probs."""
        if model.training and isinstance(output, tuple):
            self.entropy = output[1].entropy

    def train(self, original: Callable[[float], dict[str, Any]], coefficient: float) -> dict[str, Any]:
        """The whole update of a step; adds what hooks and losses logged to OpenRLHF's own metrics."""
        self.metrics, self.optimiser_steps = Metrics(), 0
        status = original(coefficient)
        status.pop("ppo_clip_ratio", None)  # what is clipped, only the loss knows
        found = self.over_ranks(self.metrics)
        sums = found.sums()
        parts = {f"rlplugins/{name}": name for name in PARTS if f"rlplugins/{name}" in sums}
        summed = {name: sums[key][0] / self.optimiser_steps for key, name in parts.items()}
        return status | {name: value for name, value in found if name not in parts} | summed

    def step(self, original: Callable[..., Any], experience: Any, coefficient: float, *rest: Any, **named: Any) -> Any:
        """One micro-batch; the KL term is in the stack's loss."""
        return original(experience, 0.0, *rest, **named)

    def loss(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor,
        rollout_log_probs: Tensor | None = None, dp_size: int = 1, **norm: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """A micro-batch's part of the loss, in the place of OpenRLHF's `PolicyLoss`."""
        micro, entropy = self.micro, self.entropy
        self.entropy = None
        assert micro is not None
        total = log_probs.sum() * 0.0  # ties the loss to the graph, whichever rows count
        here = micro.rows >= 0
        if bool(here.any()):
            real = Micro(micro.rows[here], micro.starts[here], micro.mini, micro.width)
            part = self.part(real, log_probs[here], action_mask[here], None if entropy is None else entropy[here])
            total = total + part.total * self.factor(dp_size)
            for name, value in zip(PARTS, (part.policy, part.kl, part.auxiliary), strict=True):
                self.metrics.log(f"rlplugins/{name}", value)
        drift = (old_log_probs - log_probs.detach()) * action_mask
        kl = drift.sum() / action_mask.sum().clamp(min=1)
        return (total, torch.zeros_like(kl), kl, None, None)[: self.values]

    def part(self, micro: Micro, log_probs: Tensor, action_mask: Tensor, entropy: Tensor | None) -> Loss:
        """The stack's loss of these rows, from what the model gives for whole sequences, (b, A)."""
        mine = to_responses(log_probs, micro.starts, micro.width)
        mask = to_responses(action_mask, micro.starts, micro.width).bool()
        spread = None
        if self.takes_entropy and entropy is not None:
            spread = to_responses(entropy[:, -log_probs.shape[1] :], micro.starts, micro.width)
            spread = torch.where(mask, spread, 0.0)
        return micro.mini.loss(torch.where(mask, mine, 0.0), micro.rows, entropy=spread)


def train_whole(trainer: Any, size: int, original: Callable[[float], dict[str, Any]], coefficient: float) -> Any:
    """OpenRLHF's update on the rows as they lie in the buffer, so many in a micro-batch."""
    keep_whole(trainer.replay_buffer, size)
    return original(coefficient)


def keep_whole(buffer: Any, size: int) -> None:
    """Let the buffer give its rows in whole micro-batches, so many in a row; OpenRLHF's loader then shuffles these."""
    buffer.dynamic_batch, buffer.sample_batch_size = True, 1
    parts = in_parts(range(len(buffer.items)), size)
    buffer.dynamic_indices = [part for part in parts if len(part) == size]


class CriticUpdate(Update):
    """The critic's step on the stack's targets and weights, clipped as configured.

    Args:
        stack: the plugins, built in this process, without state.
        trainer: OpenRLHF's `CriticPPOTrainer`.
        clip: bound of the change against the old values.
    """

    def __init__(self, stack: Stack, trainer: Any, clip: float | None) -> None:
        super().__init__(stack, trainer)
        self.clip = clip
        trainer.critic_loss_fn = self.loss
        self.bind(CRITIC)

    def counts_nowhere(self, mini: MiniBatch) -> bool:
        """The critic learns even where no token of the policy counts."""
        return False

    def current_log_probs(self, *parts: Any) -> Tensor | None:
        """The critic has none."""
        return None

    def loss(
        self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor, dp_size: int = 1, **norm: Any
    ) -> Tensor:
        """A micro-batch's part of the critic's loss, in the place of OpenRLHF's `ValueLoss`."""
        assert self.micro is not None
        here = self.micro.rows >= 0
        total = values.sum() * 0.0
        if bool(here.any()):
            given = to_responses(values[here].float(), self.micro.starts[here], self.micro.width)
            part = self.micro.mini.value_loss(given, self.micro.rows[here], self.clip)
            total = total + part * self.factor(dp_size)
        return total


@dataclass
class Entropies:
    """The entropies of a step's rows, from the pass that gives their log-probs.

    Attributes:
        kept: (b, A) per micro-batch, in the order of the passes.
        asked: whether the call that runs was changed.
    """

    kept: list[Tensor] = field(default_factory=list)
    asked: bool = False

    def bind(self, actor: Any) -> None:
        """Ask the model for them whenever it is not training."""
        actor.register_forward_pre_hook(self.before, with_kwargs=True)
        actor.register_forward_hook(self.after, with_kwargs=True)

    def before(self, model: Any, args: Any, named: dict[str, Any]) -> Any:
        """Two more words in the call."""
        self.asked = not model.training and not named.get("return_output")
        if self.asked:
            return args, {**named, "return_output": True, "return_entropy": True}
        return None

    def after(self, model: Any, args: Any, named: dict[str, Any], output: Any) -> Any:
        """Keep the entropies, and give the log-probs as if nobody had asked."""
        if self.asked:
            self.kept.append(output[1].entropy[:, -output[0].shape[1] :].float().cpu())
            return output[0]
        return None


def in_parts(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The items, so many at a time."""
    part = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def device_of(strategy: Any) -> Any:
    """Where OpenRLHF computes in this process."""
    return torch.cuda.current_device()


# what the trainer's process asks of this one


def bind(worker: Any, binding: Binding) -> dict[str, Any]:
    """The handshake, run in an actor of the policy, the critic or the reference: build the stack, and take over its part.

    Gives the stack's hash and versions, which the trainer compares with its own.
    """
    stack = Stack.from_specification(binding.specification)
    if binding.forward:
        forward.bind(stack, worker.actor if hasattr(worker, "actor") else worker.model)
    if binding.whole:
        trainer = worker.trainer
        trainer.ppo_train = functools.partial(train_whole, trainer, binding.whole, trainer.ppo_train)
    if binding.loss:
        worker.rlplugins_update = ActorUpdate(stack, worker.trainer)
    if binding.critic:
        worker.rlplugins_update = CriticUpdate(stack, worker.trainer, binding.clip)
    if binding.entropy:
        worker.rlplugins_entropies = Entropies()
        worker.rlplugins_entropies.bind(worker.actor)
    return {"fingerprint": stack.fingerprint, **versions()}


def gradient_products(worker: Any, asked: gradients.Asked) -> Gradients:
    """How loss gradients on the rows of all ranks lie to each other."""
    return gradients.products(worker.rlplugins_update, asked)


def take_entropies(worker: Any) -> list[Tensor]:
    """The entropies of the passes since the last call."""
    kept: list[Tensor] = worker.rlplugins_entropies.kept
    worker.rlplugins_entropies.kept = []
    return kept


def weights_of(worker: Any) -> dict[str, Tensor]:
    """The policy's present weights."""
    module = worker.actor.model.module
    return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}


def copy_reference(worker: Any, weights: Mapping[str, Tensor]) -> None:
    """Give the reference model other weights."""
    engine = worker.model.model
    module = getattr(engine, "module", engine)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])


def versions() -> dict[str, str]:
    """What must be the same in every process."""
    return {name: version(name) for name in ("rlplugins", "rlplugins-openrlhf", "openrlhf")}
