"""The update on a worker of verl: a mini-batch is opened before its first micro-batch, its loss is the stack's.

verl calls `engine.train_batch(data, loss_function)` once per mini-batch with this rank's rows, and the loss function once
per micro-batch. The first has no official door, so the method of this one engine is replaced (`MiniBatchUpdate`), when the
driver shakes hands with the worker (`bind`); the second is handed to it for the time of the mini-batch. In the same way, where
the stack needs it, the cut into micro-batches (`together`) and the pass over one of them (`forward`) are replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.stack import Stack
from rlplugins.steps import Metrics
from rlplugins.update import Loss, MiniBatch, moved
from rlplugins_verl.columns import PREFIX, Packing, padded, real_rows, unpack
from rlplugins_verl.forward import HookedForward
from rlplugins_verl.settings import needs_whole_units
from rlplugins_verl.together import ROW, WholeUnits

FRAME = f"{PREFIX}frame"
"""Key of the mini-batch's data under which its `Frame` travels."""
SUM, WEIGHT = f"{PREFIX}sum/", f"{PREFIX}weight/"
"""Prefixes of a metric's sum and weight. The name behind them is in hexadecimal, since verl reads `max` and `min` in names."""


@dataclass(frozen=True)
class Frame:
    """What a mini-batch needs beside its rows.

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


class MiniBatchUpdate:
    """Stands for `engine.train_batch`: the same step of the optimiser on the stack's loss.

    Args:
        stack: the plugins, built in this process, without state.
        engine: verl's training engine.
        train_batch: the engine's own method.
    """

    def __init__(self, stack: Stack, engine: Any, train_batch: Callable[..., dict[str, Any]]) -> None:
        self.stack = stack
        self.engine = engine
        self.train_batch = train_batch
        self.step = -1
        self.optimiser_steps = 0

    def __call__(self, data: Any, loss_function: Callable[..., Any]) -> dict[str, Any]:
        """One mini-batch; without weight and auxiliary loss no step is made, on any rank."""
        frame = data.get(FRAME, None)
        if frame is None:
            return self.train_batch(data, loss_function)
        metrics = Metrics()
        mini, mask = self.open(data, getattr(frame, "data", frame), metrics)
        if mini.weightless:
            outputs: dict[str, Any] = {"model_output": {}, "loss": [], "metrics": {"grad_norm": 0.0}}
        else:
            outputs = self.train_batch(data, functools.partial(self.loss, mini, mask))
            self.optimiser_steps += 1
        metrics.log("rlplugins/update_skipped", float(mini.weightless))
        outputs["metrics"] |= encoded(self.over_ranks(metrics))
        return outputs

    def backward(self, data: Any, frame: Frame) -> None:
        """The gradient of the stack's loss of a mini-batch, and no step of the optimiser."""
        mini, mask = self.open(data, frame, Metrics())
        self.engine.forward_backward_batch(data, functools.partial(self.loss, mini, mask))

    def open(self, data: Any, frame: Frame, metrics: Metrics) -> tuple[MiniBatch, Tensor]:
        """The mini-batch after `prepare_mini_batch`, and its mask (n, T); numbers the rows of `data`."""
        from verl.utils.device import get_device_id

        if frame.step != self.step:
            self.step, self.optimiser_steps = frame.step, 0
        real = real_rows(data)
        data[ROW] = torch.where(real, real.cumsum(0) - 1, -1)
        rows = real.nonzero().flatten()
        columns = unpack(data, frame.packing, rows, get_device_id())
        mask = columns["mask"]
        assert isinstance(mask, Tensor)
        current = None
        if self.stack.needs_mini_batch_log_probs and self.optimiser_steps:
            current = self.current_log_probs(data, rows, mask)
        mini = self.stack.mini_batch(
            columns, moved(frame.shared, mask.device), kinds=frame.kinds, reduce=self.sum_over_ranks,
            log_probs=current, metrics=metrics,
        )  # fmt: skip
        return mini, mask

    def current_log_probs(self, data: Any, rows: Tensor, mask: Tensor) -> Tensor | None:
        """Log-probs (n, T) of all rows under the present weights."""
        from verl.workers.utils.padding import no_padding_2_padding

        module = self.engine.module
        training = module.training
        module.eval()
        output = self.engine.infer_batch(data)["model_output"]["log_probs"]
        module.train(training)
        log_probs = padded(no_padding_2_padding(output, data), mask.shape[1])[rows.to(output.device)]
        return torch.where(mask, log_probs.to(mask.device).float(), 0.0)

    def loss(
        self, mini: MiniBatch, mask: Tensor, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """A micro-batch's part of the loss, as verl asks for it.

        verl averages gradients over ranks, so each rank's part is multiplied by their number; the parts then add up.
        """
        from verl.workers.utils.padding import no_padding_2_padding

        log_probs = no_padding_2_padding(model_output["log_probs"], data)
        rows = data[ROW].flatten()
        here = rows >= 0
        anchor = log_probs.sum() * 0.0  # ties the loss to the graph, whichever rows count
        if not bool(here.any()):
            nothing = anchor.detach()
            return anchor, self.measured(Loss(nothing, nothing, nothing, nothing), nothing)
        rows, mask = rows[here], mask[rows[here], : log_probs.shape[1]]
        log_probs = torch.where(mask, log_probs[here], 0.0)
        entropy = model_output.get("entropy")
        if entropy is not None and self.stack.takes("entropy", "update"):
            entropy = torch.where(mask, no_padding_2_padding(entropy, data)[here], 0.0)
        else:
            entropy = None
        part = mini.loss(log_probs, rows, entropy=entropy)
        total = part.total * self.ranks + anchor.to(part.total.dtype)
        return total, self.measured(part, torch.zeros_like(part.policy))

    def measured(self, part: Loss, zero: Tensor) -> dict[str, Any]:
        """The parts of the loss as metrics of verl, which adds them over micro-batches and averages them over ranks."""
        from verl.utils.metric import AggregationType, Metric

        parts = {"actor/pg_loss": part.policy, "kl_loss": part.kl, "actor/auxiliary_loss": part.auxiliary}
        return {name: Metric(AggregationType.SUM, (value + zero) * self.ranks) for name, value in parts.items()}

    @property
    def ranks(self) -> int:
        """Processes that share the mini-batch."""
        return int(self.engine.get_data_parallel_size())

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """`values` added over the ranks."""
        if self.ranks == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total, group=self.engine.get_data_parallel_group())
        return total

    def over_ranks(self, metrics: Metrics) -> Metrics:
        """What all ranks logged."""
        if self.ranks == 1:
            return metrics
        everyone: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(everyone, metrics.sums(), group=self.engine.get_data_parallel_group())
        merged = Metrics()
        for sums in everyone:
            for name, (total, weight) in sums.items():
                if weight:
                    merged.log(name, total / weight, weight)
        return merged


class CriticUpdate(MiniBatchUpdate):
    """The critic's step on the stack's targets and weights, clipped as configured.

    Args:
        stack: the plugins, built in this process, without state.
        engine: verl's engine of the critic.
        train_batch: the engine's own method.
        clip: bound of the change against the old values.
    """

    def __init__(
        self, stack: Stack, engine: Any, train_batch: Callable[..., dict[str, Any]], clip: float | None
    ) -> None:
        super().__init__(stack, engine, train_batch)
        self.clip = clip

    def __call__(self, data: Any, loss_function: Callable[..., Any]) -> dict[str, Any]:
        """One mini-batch of the critic."""
        frame = data.get(FRAME, None)
        if frame is None:
            return self.train_batch(data, loss_function)
        mini, mask = self.open(data, getattr(frame, "data", frame), Metrics())
        return self.train_batch(data, functools.partial(self.value_loss, mini, mask.shape[1]))

    def current_log_probs(self, data: Any, rows: Tensor, mask: Tensor) -> Tensor | None:
        """The critic has none."""
        return None

    def value_loss(
        self, mini: MiniBatch, width: int, model_output: Mapping[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """A micro-batch's part of the critic's loss."""
        from verl.utils.metric import AggregationType, Metric
        from verl.workers.utils.padding import no_padding_2_padding

        values = no_padding_2_padding(model_output["values"], data)
        rows = data[ROW].flatten()
        here = rows >= 0
        total = values.sum() * 0.0
        if bool(here.any()):
            given = torch.nn.functional.pad(values[here].float(), (0, max(0, width - values.shape[1])))
            total = total + mini.value_loss(given, rows[here], self.clip) * self.ranks
        return total, {"critic/vf_loss": Metric(AggregationType.SUM, total)}


def encoded(metrics: Metrics) -> dict[str, list[float]]:
    """Sum and weight of each metric as verl's metrics of one micro-batch."""
    found = {}
    for name, (total, weight) in metrics.sums().items():
        code = name.encode().hex()
        found |= {f"{SUM}{code}": [total], f"{WEIGHT}{code}": [weight]}
    return found


def decoded(metrics: dict[str, Any], prefix: str) -> dict[str, Any]:
    """verl's metrics with the weighted means in place of what `encoded` wrote; `prefix` is what verl put before names."""
    found = {}
    for name, value in metrics.items():
        if name.startswith(prefix + SUM):
            code = name.removeprefix(prefix + SUM)
            weight = metrics[f"{prefix}{WEIGHT}{code}"]
            if weight:
                found[bytes.fromhex(code).decode()] = float(value / weight)
        elif not name.startswith(prefix + WEIGHT):
            found[name] = value
    return found


def bind(
    worker: Any, specification: Mapping[str, Any], owns_loss: bool, owns_critic: bool = False, clip: float | None = None
) -> dict[str, Any]:
    """The handshake, run in a worker: build the stack and take over what it has a say in.

    Gives the stack's hash and versions, which the driver compares with its own.
    """
    stack = Stack.from_specification(specification)
    owner = owner_of(worker)
    bind_engine(owner.actor.engine, stack, owns_loss)
    if owner.ref is not None:
        bind_engine(owner.ref.engine, stack, owns_loss=False)
    if owns_critic:
        critic = worker.worker_dict["critic"].engine
        stand_in(critic, "train_batch", CriticUpdate(stack, critic, critic.train_batch, clip))
    return {"fingerprint": stack.fingerprint, **versions()}


def bind_engine(engine: Any, stack: Stack, owns_loss: bool) -> None:
    """Take over the update, the cut into micro-batches and the pass over one of them, as far as the stack needs it.

    Args:
        engine: verl's, of the actor or the reference.
        stack: the plugins, built in this process, without state.
        owns_loss: whether the stack computes the loss that this engine trains on.
    """
    if owns_loss:
        stand_in(engine, "train_batch", MiniBatchUpdate(stack, engine, engine.train_batch))
    if stack.needs("together") or (owns_loss and stack.needs("gradients")):
        whole = WholeUnits(engine, engine.forward_backward_batch, whole=needs_whole_units(stack))
        stand_in(engine, "forward_backward_batch", whole)
    if stack.claims("forward"):
        stand_in(engine, "forward_step", HookedForward(stack, engine))


def stand_in(engine: Any, method: str, replacement: Callable[..., Any]) -> None:
    """Replace a method of this one engine.

    Raises:
        ConfigurationError: if it has been replaced before.
    """
    if method in vars(engine):
        raise ConfigurationError(f"rlplugins is bound to this worker already: {method} of its engine is replaced")
    setattr(engine, method, replacement)


def copy_reference(worker: Any) -> None:
    """Give the reference model of a worker the policy's present weights; both are cut over the ranks alike."""
    owner = owner_of(worker)
    with torch.no_grad():
        source = dict(owner.actor.engine.module.named_parameters())
        for name, target in owner.ref.engine.module.named_parameters():
            _local(target).copy_(_local(source[name]))


def _local(parameter: Any) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.data  # type: ignore[no-any-return]


def versions() -> dict[str, str]:
    """What must be the same in every process."""
    return {name: version(name) for name in ("rlplugins", "rlplugins-verl", "verl")}


def owner_of(worker: Any) -> Any:
    """The part of one of Ray's workers that holds `actor` and, unless it is None, `ref`."""
    for part in [worker, *getattr(worker, "worker_dict", {}).values()]:
        if getattr(part, "actor", None) is not None and hasattr(part, "update_actor"):
            return part
    raise ConfigurationError(
        f"a worker of type {type(worker).__name__} holds no actor that rlplugins knows how to reach"
    )


def actor_of(worker: Any) -> Any:
    """The training worker of the policy inside one of Ray's."""
    return owner_of(worker).actor
