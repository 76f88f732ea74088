"""`engine.gradient_products` on the ranks of the actor: loss gradients that leave nothing behind.

They are taken by `torch.autograd.grad` of the bare model, not through DeepSpeed's engine: no bucket is filled, no counter of
accumulated micro-batches moves, and no parameter has a gradient afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlplugins.rollouts import Column
from rlplugins.services import Gradients, chosen_parameters
from rlplugins.steps import Metrics
from rlplugins.update import moved
from rlplugins_openrlhf import forward

if TYPE_CHECKING:
    from rlplugins_openrlhf.worker import ActorUpdate


@dataclass(frozen=True)
class Part:
    """The sequences of one micro-batch, as OpenRLHF's models take them.

    Attributes:
        sequences: (b, S) int64.
        actions: (b, S - 1) int64, 1 where the next token is the policy's own.
        attention: (b, S) int64.
        starts: (b,) int64, tokens of each row's prompt.
    """

    sequences: Tensor
    actions: Tensor
    attention: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Asked:
    """One rank's rows of a mini-batch whose loss gradients are wanted.

    Attributes:
        columns: of the update, but for the advantages.
        advantages: K of shape (n, 1) or (n, T).
        shared: per plugin what it shared in the credit phase.
        kinds: names of the row kinds.
        parts: the rows in their order, cut into micro-batches.
        width: T.
        parameters: regular expression; the products are over parameters in whose name it is found. None: over all.
    """

    columns: Mapping[str, Column]
    advantages: Sequence[Tensor]
    shared: Mapping[str, Mapping[str, Any]]
    kinds: tuple[str, ...]
    parts: Sequence[Part]
    width: int
    parameters: str | None


class Bare:
    """OpenRLHF's `Actor` around the bare model."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.model = actor.model.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.actor, name)


def products(update: ActorUpdate, asked: Asked) -> Gradients:
    """The products over the rows of all ranks, the same on each of them; random numbers and the model's mode stay as they are.

    Every rank sums the products of its own share of the parameters, so that none holds all K gradients.
    """
    actor = update.trainer.actor
    bare = Bare(actor)
    named = {name: item for name, item in bare.model.named_parameters() if item.requires_grad}
    chosen = chosen_parameters(named, asked.parameters)
    places = [place for place, name in enumerate(named) if name in chosen]
    mine = places[torch.distributed.get_rank(update.group) :: update.ranks]
    kept: list[list[Tensor]] = []
    norms = []
    training, device = actor.training, torch.cuda.current_device()
    actor.train()
    with torch.random.fork_rng([device] if torch.cuda.is_available() else []), torch.enable_grad():
        for advantages in asked.advantages:
            parts = _gradient(update, bare, asked, advantages, [*named.values()])
            norms.append(torch.stack([part.double().norm() for part in parts]).norm())
            kept.append([parts[place].flatten() for place in mine])
    actor.train(training)
    found = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=device)
    for same in zip(*kept, strict=True):
        rows = torch.stack(same).double()
        found += rows @ rows.T
    rate = float(update.trainer.actor_scheduler.get_last_lr()[0])
    return Gradients(update.sum_over_ranks(found).cpu(), torch.stack(norms).cpu(), rate)


def _gradient(
    update: ActorUpdate, bare: Bare, asked: Asked, advantages: Tensor, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """The loss gradient of every parameter over the rows of all ranks, float32."""
    from rlplugins_openrlhf.worker import Micro

    device = torch.cuda.current_device()
    columns = moved({**asked.columns, "advantages": advantages}, device)
    mini = update.stack.mini_batch(
        columns, moved(asked.shared, device), kinds=asked.kinds, reduce=update.sum_over_ranks, metrics=Metrics()
    )
    owned = update.stack.claims("forward")
    model = functools.partial(forward.forward, update.stack, bare) if owned else functools.partial(_plain, bare)
    total = [torch.zeros_like(item, dtype=torch.float32) for item in parameters]
    last = 0
    for part in asked.parts:
        sequences, actions, attention, starts = (item.to(device) for item in vars(part).values())
        rows = torch.arange(last, last + len(starts), device=device)
        last += len(starts)
        log_probs, output = model(
            sequences, actions, attention, return_output=True, return_entropy=update.takes_entropy
        )
        entropy = output.entropy if update.takes_entropy else None
        loss = update.part(Micro(rows, starts, mini, asked.width), log_probs, actions, entropy).total
        if loss.requires_grad:
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            for sum_, own in zip(total, found, strict=True):
                sum_ += own
    if update.ranks > 1:
        for sum_ in total:
            torch.distributed.all_reduce(sum_, group=update.group)
    return total


def _plain(bare: Bare, *given: Any, **named: Any) -> Any:
    """OpenRLHF's own forward, whose hooks are not called."""
    return type(bare.actor).forward(bare, *given, **named)
