"""`engine.gradient_products`: the loss gradients of several advantages, without a step of the optimiser.

The driver deals the rows to the ranks (`shares`). Every worker runs verl's own forward and backward of its share once per
advantage, as in an update whose loss is the stack's, keeps its shard of each gradient, and gives their products (`products`).
Afterwards nothing has changed: no gradient is left, no weight or moment has moved, the modules are in the mode in which they
were, and random numbers go on as if nothing had been.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlplugins.rollouts import Rollouts
from rlplugins.services import Gradients, chosen_parameters
from rlplugins.stack import Stack
from rlplugins.together import units_of
from rlplugins_verl.columns import NUMBERS, Packing, pack, stored, values_of
from rlplugins_verl.together import UNIT, spread
from rlplugins_verl.worker import Frame, MiniBatchUpdate, actor_of

INPUTS = ("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", "multi_modal_inputs")
"""The columns that verl's engine reads of a row."""
ADVANTAGES = "advantages"
CHUNK = 1 << 22
"""Numbers of each gradient that are multiplied at once, in float64."""


@dataclass(frozen=True)
class Share:
    """What one rank computes.

    Attributes:
        rows: per column of verl or of the update one entry per row of this rank; the advantages in K columns.
        frames: K, what goes with the rows for each of the advantages.
        parameters: regular expression; the products are over parameters in whose name it is found. None: over all.
        options: how verl makes its micro-batches, beside what its configuration says.
    """

    rows: Mapping[str, list[Any]]
    frames: Sequence[Frame]
    parameters: str | None
    options: Mapping[str, Any]


def shares(
    stack: Stack, rollouts: Rollouts, advantages: Sequence[Tensor], there: Any, ranks: int, *,
    parameters: str | None = None, temperature: float = 1.0,
) -> list[Share]:  # fmt: skip
    """What each rank is to compute.

    Args:
        stack: in its credit phase.
        rollouts: B rows with their old log-probs.
        advantages: K of shape (B, 1) or (B, T).
        there: what is stored of the rows, in their order.
        ranks: how many share a mini-batch.
        parameters: see `Share`.
        temperature: of the log-probs.
    """
    plain = rollouts.unguarded()
    columns = stack.gradient_columns(plain, advantages[0])
    del columns[ADVANTAGES]
    packed, packing = pack(columns | {_numbered(k): values.detach() for k, values in enumerate(advantages)})
    together = stack.needs("together")
    units = units_of(stack, plain, plain.groups) if together else torch.arange(len(plain))
    rows = {name: values_of(there[name]) for name in INPUTS if name in there.keys()} | packed  # noqa: SIM118
    rows[UNIT] = list(units[:, None].unbind())
    shared, number = stack.step.shared_by_all(), stack.step.number
    places = {name: packing.places[name] for name in columns}
    own = [{**places, ADVANTAGES: packing.places[_numbered(k)]} for k in range(len(advantages))]
    frames = [Frame(number, plain.kinds, shared, Packing(layout, packing.width)) for layout in own]
    options = {"temperature": temperature, "calculate_entropy": stack.takes("entropy", "update")}
    parts = spread(units, torch.tensor([len(ids) for ids in rows["input_ids"]]), ranks)
    return [Share(_rows(rows, part), frames, parameters, options) for part in parts]


def _numbered(k: int) -> str:
    return f"{ADVANTAGES}_{k}"


def _rows(rows: Mapping[str, list[Any]], part: Sequence[int]) -> dict[str, list[Any]]:
    """The rows of one rank; one that counts nowhere, if it has none."""
    if part:
        return {name: [values[row] for row in part] for name, values in rows.items()}
    return {name: [torch.zeros_like(values[0]) if name == NUMBERS else values[0]] for name, values in rows.items()}


def on_worker(worker: Any, share: Share) -> Gradients:
    """Run in every training worker."""
    actor = actor_of(worker)
    return products(actor, actor.engine.train_batch, share)


def products(actor: Any, update: MiniBatchUpdate, share: Share) -> Gradients:
    """How the gradients lie to each other, the same on every rank.

    Args:
        actor: verl's training worker of the policy.
        update: the stack's, on its engine.
        share: of this rank.

    Raises:
        ServiceError: if no parameter has a name that was asked for.
    """
    engine, module = actor.engine, actor.engine.module
    chosen = chosen_parameters([name for name, _ in shards(module)], share.parameters)
    data = _data(actor, share)
    training = module.training
    kept: list[Tensor] = []
    squares: list[Tensor] = []
    try:
        with engine.train_mode():
            for frame in share.frames:
                engine.optimizer_zero_grad()
                with _random_numbers_kept():
                    update.backward(data, frame)
                lengths = [torch.linalg.vector_norm(shard, dtype=torch.float64) for _, shard in shards(module)]
                squares.append(torch.stack(lengths).square().sum())
                kept.append(torch.cat([shard for name, shard in shards(module) if name in chosen]))
            return _over_ranks(engine, kept, torch.stack(squares))
    finally:
        module.train(training)


def _data(actor: Any, share: Share) -> Any:
    """The rows as verl's engine takes them."""
    from verl.utils import tensordict_utils as tu

    data = stored(share.rows, len(share.rows[NUMBERS]))
    config = actor.engine_config
    options = {
        "use_remove_padding": actor.model_config.get("use_remove_padding", False),
        "use_dynamic_bsz": config.use_dynamic_bsz,
        "max_token_len_per_gpu": config.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": config.micro_batch_size_per_gpu,
        "use_fused_kernels": config.use_fused_kernels,
        **share.options,
    }
    for name, value in options.items():
        tu.assign_non_tensor_data(data, name, value)
    tu.maybe_fix_3d_position_ids(data)
    return data


def shards(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each trainable parameter's name in the model, and this rank's part of its gradient, (n,); 0 where there is none."""
    for label, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        name = label.replace("_fsdp_wrapped_module.", "")
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        flat = (gradient.to_local() if hasattr(gradient, "to_local") else gradient).detach().flatten()
        parts = getattr(parameter, "_shard_param_infos", None)
        if parts is None:
            yield name, flat
            continue
        owner = name.removesuffix("_flat_param")  # FSDP1: one parameter holds those of a module
        for inner, part in zip(parameter._fqns, parts, strict=True):  # type: ignore[attr-defined]
            start, size = (part.offset_in_shard, part.numel_in_shard) if part.in_shard else (0, 0)
            yield owner + inner, flat[start : start + size]


def _over_ranks(engine: Any, kept: Sequence[Tensor], squares: Tensor) -> Gradients:
    """The products of whole gradients from those of their shards."""
    count = len(kept)
    sums = torch.cat([squares.new_zeros(count, count), squares[:, None]], 1)
    for start in range(0, len(kept[0]), CHUNK):
        part = torch.stack([flat[start : start + CHUNK] for flat in kept]).double()
        sums[:, :count] += part @ part.T
    torch.distributed.all_reduce(sums)
    copies = torch.distributed.get_world_size() // engine.device_mesh["fsdp"].size()
    scaler = getattr(engine, "scaler", None)
    scale = scaler.get_scale() if scaler is not None else 1.0  # of the losses, in float16
    sums = (sums / (copies * scale**2)).cpu()
    rate = float(engine.optimizer.param_groups[0]["lr"])
    return Gradients(sums[:, :count], sums[:, count].sqrt(), rate)


def _random_numbers_kept() -> contextlib.AbstractContextManager[None]:
    """Every advantage sees the same dropout, and what comes later draws as if nothing had been."""
    from verl.utils.device import get_device_name, get_torch_device

    device = get_device_name()
    devices = [] if device == "cpu" else [get_torch_device().current_device()]
    return torch.random.fork_rng(devices, device_type=device)
