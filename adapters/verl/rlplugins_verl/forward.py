"""The hook `forward` on a worker of verl: log-probs and entropies of every micro-batch, in the update and the passes before.

verl's engine computes them in `forward_step`, for a micro-batch whose rows lie one after the other without padding. That
method of the engines of actor and reference is replaced where a plugin claims the hook: the rows become a rectangle in
which every response begins in the same column, the stack computes on it with the engine's own module (whose sharding hooks
fire), and verl gets the result in its own layout.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from rlplugins.errors import ConfigurationError
from rlplugins.packed import Packed
from rlplugins.stack import Stack
from rlplugins_verl.columns import as_list


class Rectangle:
    """Where the tokens of a micro-batch of verl stand when its prompts are padded on the left and its responses on the right.

    Args:
        micro_batch: with jagged `input_ids` and `responses`; every row has a prompt.
    """

    def __init__(self, micro_batch: Any) -> None:
        self.offsets = micro_batch["input_ids"].offsets()
        lengths, sizes = self.offsets.diff(), micro_batch["responses"].offsets().diff()
        self.prompts = lengths - sizes
        self.width, self.tokens = int(self.prompts.max()), int(sizes.max())
        self.row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        within = torch.arange(len(self.row), device=lengths.device) - self.offsets[self.row]
        self.column = within + (self.width - self.prompts)[self.row]
        self.inside = (self.column >= self.width).nonzero().flatten()  # the responses' tokens among all

    def whole(self, jagged: Tensor) -> Tensor:
        """(b, P + T) from a value per token of prompt and response; 0 at padding."""
        made = jagged.values().new_zeros((len(self.prompts), self.width + self.tokens))
        made[self.row, self.column] = jagged.values()
        return made

    def responses(self, jagged: Tensor) -> Tensor:
        """(b, T) from a value per token of the response; 0 at padding."""
        made = jagged.values().new_zeros((len(self.prompts), self.tokens))
        made[self.row[self.inside], self.column[self.inside] - self.width] = jagged.values()
        return made

    def jagged(self, values: Tensor) -> Tensor:
        """Values (b, T) of the responses' tokens in verl's layout: at the place of the token before, 0 elsewhere."""
        chosen = values[self.row[self.inside], self.column[self.inside] - self.width]
        flat = values.new_zeros(len(self.row)).index_put((self.inside - 1,), chosen)
        return torch.nested.nested_tensor_from_jagged(flat, self.offsets)

    def batch(self, micro_batch: Any, entropy: bool) -> Packed:
        """The micro-batch as the hook takes it."""
        ids = self.whole(micro_batch["input_ids"])
        attention = positions = None
        if int(self.prompts.min()) < self.width:
            columns = torch.arange(ids.shape[1], device=ids.device)
            attention = (columns >= (self.width - self.prompts)[:, None]).long()
            positions = self.whole(micro_batch["position_ids"])
        mask = self.responses(micro_batch["response_mask"]).bool()
        return Packed(ids, attention, positions, ids[:, self.width :], mask, entropy)


class HookedForward:
    """Stands for `engine.forward_step`: the stack computes log-probs and entropies, verl (or the stack) the loss.

    Args:
        stack: the plugins, built in this process, without state.
        engine: verl's, of the actor or the reference.
    """

    def __init__(self, stack: Stack, engine: Any) -> None:
        self.stack = stack
        self.engine = engine

    def __call__(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> tuple[Tensor, dict[str, Any]]:
        """Loss of a micro-batch, and what verl keeps of it."""
        from verl.utils.device import get_device_id, get_device_name
        from verl.workers.engine.utils import detach_tree

        micro_batch = micro_batch.to(get_device_id())
        with self._autocast(get_device_name()):
            output = self._output(micro_batch)
            loss, metrics = torch.ones((), device=micro_batch["input_ids"].device), {}
            if loss_function is not None:
                group = self.engine.get_data_parallel_group()
                loss, metrics = loss_function(model_output=output, data=micro_batch, dp_group=group)
        return loss, {"model_output": detach_tree(output), "loss": loss.detach().item(), "metrics": metrics}

    def _output(self, micro_batch: Any) -> dict[str, Tensor]:
        """Log-probs, and entropies where verl asks for them, in its layout."""
        from verl.utils import tensordict_utils as tu

        temperature = tu.get_non_tensor_data(micro_batch, "temperature", default=1.0)
        images = "multi_modal_inputs" in micro_batch and any(as_list(micro_batch["multi_modal_inputs"]))
        if images or micro_batch["position_ids"].dim() == 3 or isinstance(temperature, Tensor):
            raise ConfigurationError(
                "the hook `forward` takes rows of text, all at one temperature: leave the plugin that claims it out of runs "
                "with images or videos"
            )
        rectangle = Rectangle(micro_batch)
        wanted = bool(tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False))
        batch = rectangle.batch(micro_batch, wanted)
        log_probs, entropy = self.stack.forward(self.engine.module, batch, float(temperature))
        found = {"log_probs": rectangle.jagged(log_probs)}
        if wanted:
            if entropy is None:
                raise ConfigurationError(
                    "the plugin that claims `forward` gave no entropies, though `batch.entropy` was set"
                )
            found["entropy"] = rectangle.jagged(entropy)
        return found

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        """As verl calls its module."""
        floating = getattr(self.engine, "_autocast_dtype", torch.bfloat16)
        if floating == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type=device, dtype=floating)
