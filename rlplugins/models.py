"""Small trainable models of a plugin's own, which predict a number per prompt.

A plugin makes one in `init_state` and keeps it in its state, with which it is saved: weights and optimiser.

    def init_state(self, run):
        return {"V": LinearModel(features=3, learning_rate=0.05, start=0.5)}

`predict` changes nothing; `fit` makes one step of the optimiser, and belongs into a hook that may change state. A step whose
loss is not finite is left out: it would spoil the weights for good.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from rlplugins.errors import ConfigurationError, StateError

Head: TypeAlias = Literal["linear", "sigmoid"]


class LinearModel:
    """V = w . phi + b, or its sigmoid, trained by plain gradient steps on the sum of squared errors.

    Args:
        features: d, numbers per prompt.
        learning_rate: of `fit`.
        head: `linear`, or `sigmoid` for values in (0, 1).
        start: V before the first step, whatever the features; None: 0, or 1/2 with a sigmoid.

    Attributes:
        w: (d,) float64.
        b: () float64.
    """

    def __init__(
        self, features: int, *, learning_rate: float, head: Head = "linear", start: float | None = None
    ) -> None:
        self.learning_rate = learning_rate
        self.head = head
        self.w = torch.zeros(features, dtype=torch.float64)
        self.b = torch.tensor(before(head, start), dtype=torch.float64)

    def predict(self, phi: Tensor) -> Tensor:
        """Values (K,) of K prompts with features `phi` (K, d)."""
        return after(self.head, phi.double() @ self.w + self.b)

    def fit(self, phi: Tensor, targets: Tensor) -> float:
        """One step towards `targets` (K,); gives the sum of squared errors before it."""
        phi, w, b = phi.double(), self.w.clone().requires_grad_(), self.b.clone().requires_grad_()
        with torch.enable_grad():
            loss = (after(self.head, phi @ w + b) - targets.double()).square().sum()
            slopes = torch.autograd.grad(loss, (w, b))
        if math.isfinite(total := float(loss.detach())):
            self.w, self.b = self.w - self.learning_rate * slopes[0], self.b - self.learning_rate * slopes[1]
        return total

    def state_dict(self) -> dict[str, Any]:
        """The weights."""
        return {"w": self.w, "b": self.b}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back the weights.

        Raises:
            StateError: if they are for another number of features.
        """
        if state_dict["w"].shape != self.w.shape:
            raise StateError(f"the saved linear model has {len(state_dict['w'])} features, this one {len(self.w)}")
        self.w, self.b = state_dict["w"], state_dict["b"]


class LanguageModel:
    """Any Hugging Face model with a scalar head on the last token of the prompt, trained by AdamW.

    In float32 and without dropout. Of a model with encoder and decoder the encoder is taken.

    Args:
        folder: as `save_pretrained` wrote it, with its tokenizer.
        learning_rate: of `fit`.
        head: `linear`, or `sigmoid` for values in (0, 1).
        start: V before the first step, whatever the prompt; None: 0, or 1/2 with a sigmoid.
        device: where it runs.
        max_tokens: prompts are cut to their last so many tokens, or to what the model can read.
        batch_size: prompts per forward pass; `fit` adds up the gradients.

    Raises:
        ConfigurationError: if transformers is missing, the folder holds no model of texts with its tokenizer, or there is no
            such device.
    """

    def __init__(
        self, folder: Path | str, *, learning_rate: float, head: Head = "linear", start: float | None = None,
        device: str = "cpu", max_tokens: int = 1024, batch_size: int = 32,
    ) -> None:  # fmt: skip
        self.head = head
        self.batch_size = batch_size
        self.device = _device(device)
        with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay what they are
            body, self.tokenizer, width = _load(Path(folder))
            score = nn.Linear(width, 1)
        nn.init.zeros_(score.weight)
        nn.init.constant_(score.bias, before(head, start))
        self.module = nn.ModuleDict({"body": body, "score": score}).to(self.device)
        self.module.eval()
        longest = getattr(body.config.get_text_config(), "max_position_embeddings", None)
        self.max_tokens = min(max_tokens, self.tokenizer.model_max_length, longest or max_tokens)
        self.optimiser = torch.optim.AdamW(self.module.parameters(), lr=learning_rate, weight_decay=0.0)

    def predict(self, prompts: Sequence[Any]) -> Tensor:
        """Values (K,) float64 of K prompts, texts or lists of chat messages each."""
        with torch.no_grad():
            parts = [self._values(part).double().cpu() for part in self._parts(prompts)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    def fit(self, prompts: Sequence[Any], targets: Tensor) -> float:
        """One step towards `targets` (K,); gives the sum of squared errors before it."""
        if not len(prompts):
            return 0.0
        total = 0.0
        self.optimiser.zero_grad()
        with torch.enable_grad():
            for part, wanted in zip(self._parts(prompts), targets.float().split(self.batch_size), strict=True):
                loss = (self._values(part) - wanted.to(self.device)).square().sum()
                loss.backward()
                total += float(loss.detach())
        if math.isfinite(total):
            self.optimiser.step()
        self.optimiser.zero_grad()
        return total

    def _parts(self, prompts: Sequence[Any]) -> Iterator[Sequence[Any]]:
        for first in range(0, len(prompts), self.batch_size):
            yield prompts[first : first + self.batch_size]

    def _values(self, prompts: Sequence[Any]) -> Tensor:
        ids = [self._encoded(prompt) for prompt in prompts]
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        width = int(lengths.max())
        padded = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=self.device)
        attention = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        hidden = self.module["body"](input_ids=padded, attention_mask=attention).last_hidden_state
        last = hidden[torch.arange(len(ids), device=self.device), lengths - 1]
        return after(self.head, self.module["score"](last).squeeze(-1))

    def _encoded(self, prompt: Any) -> list[int]:
        chat = not isinstance(prompt, str) and self.tokenizer.chat_template
        if chat:
            text = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        else:
            text = text_of(prompt)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not chat).input_ids  # the template has its own
        return ids[-self.max_tokens :] or [0]

    def state_dict(self) -> dict[str, Any]:
        """Weights, and the optimiser's moments of each of them."""
        names = [name for name, _ in self.module.named_parameters()]
        moments = self.optimiser.state_dict()["state"]
        return {
            "weights": dict(self.module.state_dict()),
            "optimiser": {names[place]: dict(values) for place, values in moments.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            StateError: if it is of another model.
        """
        mine, saved = ({name: weight.shape for name, weight in weights.items()}
                       for weights in (self.module.state_dict(), state_dict["weights"]))  # fmt: skip
        if wrong := sorted(name for name in {**mine, **saved} if mine.get(name) != saved.get(name)):
            raise StateError(
                f"the saved language model is another one: {len(wrong)} of its weights, {wrong[0]} for one"
            )
        self.module.load_state_dict(state_dict["weights"])
        places = {name: place for place, (name, _) in enumerate(self.module.named_parameters())}
        whole = self.optimiser.state_dict()
        whole["state"] = {
            places[name]: {key: value.clone() for key, value in moments.items()}  # which the optimiser changes in place
            for name, moments in state_dict["optimiser"].items()
        }
        self.optimiser.load_state_dict(whole)


def before(head: Head, value: float | None) -> float:
    """What the head must be given to say `value`; 0 for None.

    Raises:
        ConfigurationError: if it cannot.
    """
    if value is None:
        return 0.0
    if head == "linear":
        return value
    if not 0 < value < 1:
        raise ConfigurationError(f"a sigmoid head gives values between 0 and 1, it cannot start at {value}")
    return float(torch.tensor(value, dtype=torch.float64).logit())


def after(head: Head, value: Tensor) -> Tensor:
    """What the head says."""
    return value.sigmoid() if head == "sigmoid" else value


def text_of(prompt: Any) -> str:
    """A prompt as plain text; of chat messages their contents, a line each."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def _load(folder: Path) -> tuple[Any, Any, int]:
    """Model without head, in float32, its tokenizer, and the width of what it gives for a token."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ConfigurationError(
            "a language model of a plugin's own needs transformers: pip install transformers"
        ) from error
    try:
        body = AutoModel.from_pretrained(folder, local_files_only=True).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        body = body.get_encoder() if body.config.is_encoder_decoder else body
        with torch.no_grad():
            width = body(input_ids=torch.zeros((1, 1), dtype=torch.int64)).last_hidden_state.shape[-1]
    except Exception as error:
        raise ConfigurationError(
            f"{folder} holds no model of texts with its tokenizer that transformers can load: {error}"
        ) from error
    for parameter in body.parameters():
        parameter.data = parameter.data.clone()  # to memory whose alignment does not depend on the file
    return body, tokenizer, width


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"device {name!r} cannot be used here: {error}") from None
    return device
