"""PCL: Prompt Curriculum Learning for Efficient LLM Post-Training (arXiv 2510.01135).

Selection, value loss and objective as in the paper, of which there is no public code; the linear value model, what it reads
and both learning rates are reconstructed. V(x): reward that the policy is expected to get for the prompt x. Of k m
candidates the m with the smallest |V(x) - tau| are trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import weighted_draw
from rlplugins.errors import ConfigurationError
from rlplugins.models import Head, LanguageModel, LinearModel, text_of
from rlplugins.needs import Need
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import POLICY, Prompts, Rollouts
from rlplugins.steps import Run, Step

LINEAR = "linear"
RATES = {"linear": 0.5, "sigmoid": 8.0}
"""Share of the way to the targets in a step of the linear model; a sigmoid is a quarter as steep, its squares a sixteenth."""
LANGUAGE_MODEL_RATE = 1e-5
EDGE = 0.05  # a sigmoid begins at least so far from 0 and 1
DIGITS = 12  # to which distances are rounded before they are compared
ROUNDING = 1e-12  # a smaller spread of equal numbers is rounding
FAR = 3.0  # standard deviations; what lies further out would take too large a step

COUNTS: Mapping[str, Callable[[str], int]] = {
    "length": len,
    "digits": lambda text: len(re.findall(r"\d", text)),
    "symbols": lambda text: len(re.findall(r"[^\w\s]", text)),
    "lines": lambda text: text.count("\n"),
}
"""What is counted in a prompt."""

TextFeature = Literal["length", "digits", "symbols", "lines"]
Count = Annotated[int, Field(ge=1)]


class Pcl(Plugin):
    """Trains on the prompts that a value model expects the policy to solve about half of the time.

    Prompt Curriculum Learning (arXiv 2510.01135): the value model reads the prompt only, so that candidates cost no
    responses, and takes one step per training step, to the mean rewards just seen.
    """

    name = "pcl"
    assumes = frozenset({"unit_rewards", "response_rewards"})

    tau: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """Expected reward that prompts should have; 0 takes the hardest, 1 the easiest."""
    k: Count = 4
    """Candidates per prompt of the step; 1 takes prompts at random."""
    mean_only: bool = True
    """Advantages are r - mean r, without a division by the spread; False: whatever the rest of the stack says."""
    model: Annotated[str, Field(min_length=1)] = LINEAR
    """The value model: `linear`, or the folder of a Hugging Face model with its tokenizer, which gets a head."""
    features: tuple[str, ...] = ()
    """Fields of the prompt file, numbers each, that the linear model reads."""
    text_features: tuple[TextFeature, ...] = ("length", "digits", "symbols", "lines")
    """What the linear model reads in the text of the prompt: log(1 + count) of characters, digits, symbols, line breaks."""
    head: Head = "linear"
    """`linear`: values as they come; `sigmoid`: values in (0, 1)."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Of the value model. None: 0.5 / (m (d + 1)) with d features (8 instead of 0.5 with a sigmoid); 1e-5 with a folder."""
    device: str = "cpu"
    """Where the model of the folder runs."""
    max_tokens: Count = 1024
    """The model of the folder reads at most so many tokens of a prompt, the last ones."""
    batch_size: Count = 32
    """Prompts that the model of the folder reads at once."""

    @model_validator(mode="after")
    def _check(self) -> Pcl:
        if self.head == "sigmoid" and not 0 <= self.tau <= 1:
            raise ValueError(f"with head sigmoid values lie between 0 and 1, and so must tau, got {self.tau:g}")
        if self.model != LINEAR and self.features:
            raise ValueError(f"features are for model linear; {self.model} reads the text of the prompt")
        if self.model == LINEAR and not (self.features or self.text_features):
            raise ValueError("model linear has nothing to read: name features or text_features")
        return self

    @property
    def uses(self) -> Mapping[str, BuiltinName]:
        """A = r - mean r, if `mean_only`."""
        return {"baseline": "group_mean", "advantage_scale": "one"} if self.mean_only else {}

    @property
    def needs(self) -> tuple[Need, ...]:
        """V as it is after the last step; groups, without which A = 0; the fields that it reads."""
        columns = (needs.column(name) for name in self.features)
        return (needs.PROMPTS_AFTER_UPDATE, needs.TRAINABLE_MODEL, needs.group_size(at_least=2), *columns)

    def init_state(self, run: Run) -> dict[str, Any]:
        """The value model; mean and spread of what the linear one reads, over the pool."""
        start = self.tau if self.head == "linear" else min(max(self.tau, EDGE), 1 - EDGE)
        if self.model != LINEAR:
            return {"V": self._language_model(start)}
        phi = self._features(run.pool)
        m, d = max(1, run.budget // run.group_size), phi.shape[1]
        rate = self.learning_rate or RATES[self.head] / (m * (d + 1))
        mean, spread = scale(phi)
        return {"V": LinearModel(d, learning_rate=rate, head=self.head, start=start), "mean": mean, "spread": spread}

    def _language_model(self, start: float) -> LanguageModel:
        rate = self.learning_rate or LANGUAGE_MODEL_RATE
        try:
            return LanguageModel(
                self.model, learning_rate=rate, head=self.head, start=start, device=self.device,
                max_tokens=self.max_tokens, batch_size=self.batch_size,
            )  # fmt: skip
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.name}.model: {error}") from error

    def _features(self, prompts: Prompts) -> Tensor:
        numbers = [numeric(prompts, name) for name in self.features]
        return torch.stack(numbers + [log_count(prompts.texts, name) for name in self.text_features], 1)

    def _read(self, prompts: Prompts) -> Any:
        """The prompts as V takes them."""
        if self.model != LINEAR:
            return prompts.texts
        return standardised(self._features(prompts), self.state.mean, self.state.spread)

    # prompts

    @hookimpl
    def choose_prompts(
        self, prompts: Prompts, prompt_weights: Tensor | None, count: int, step: Step, log: Callable[..., None]
    ) -> Tensor:
        weights = torch.ones(len(prompts)) if prompt_weights is None else prompt_weights.cpu()
        drawn = candidates(weights, count, self.k, step.generator(self))
        V = self.state.V.predict(self._read(prompts.select(drawn)))
        best = select(V, count, self.tau)
        chosen = prompts.select(drawn[best])
        step.keep("chosen", chosen)
        step.keep("V", V[best])
        log("V", V[best].mean())
        log("V/candidates", V.mean())
        return drawn[best]

    # life

    @hookimpl
    def on_step_end(
        self, rewards: Tensor, scores: Tensor, groups: Tensor, rollouts: Rollouts, step: Step, log: Callable[..., None]
    ) -> None:
        chosen: Prompts | None = step.kept.get("chosen")
        if chosen is None:
            return
        prompt = chosen.positions(rollouts.prompt_rows)
        r = outcomes(rewards, scores, groups).cpu()
        counted = rollouts.of_kind(POLICY).cpu() & (prompt >= 0) & r.isfinite()
        prompt, r = prompt[counted], r[counted]
        n = torch.bincount(prompt, minlength=len(chosen))
        R = torch.bincount(prompt, r, len(chosen)) / n.clamp(min=1)
        mixed = torch.bincount(prompt, (r - R[prompt]).square(), len(chosen)) > ROUNDING
        seen = (n > 0).nonzero().flatten()
        if not len(seen):
            return
        V, R, n = step.kept["V"][seen], R[seen], n[seen]
        loss = self.state.V.fit(self._read(chosen.select(seen)), R)
        log("value_error", loss / len(seen), len(seen))
        if float(R.max()) > float(R.min()):
            log("explained_variance", explained_variance(V, R))
        log("effective_ratio", mixed[seen].double().mean(), len(seen))
        log("effective_ratio/expected", effective_ratio(V.clamp(0, 1), n).mean(), len(seen))


# which prompts


def candidates(weights: Tensor, m: int, k: int, source: torch.Generator) -> Tensor:
    """Up to k m positions drawn by `weights` (P,) without replacement, in random order.

    All that have a weight, as often as it takes to have m, where they are fewer than m.
    """
    drawn = weighted_draw(weights, min(k * m, int((weights > 0).sum())), source)
    return drawn if len(drawn) >= m else drawn.repeat(-(-m // len(drawn)))[:m]


def select(V: Tensor, m: int, tau: float = 0.5) -> Tensor:
    """The m candidates with the smallest |V - tau|, (m,) int64 positions in V, ascending; the first of equal ones."""
    distance = torch.round((V - tau).abs(), decimals=DIGITS).nan_to_num(nan=torch.inf)
    return torch.argsort(distance, stable=True)[:m].sort().values


# what the linear model reads


def numeric(prompts: Prompts, name: str) -> Tensor:
    """A field of the prompts as numbers (P,) float64; NaN where a prompt lacks it.

    Raises:
        ConfigurationError: if there is no such field, or it holds something else than numbers.
    """
    if name not in prompts.columns:
        known = ", ".join(prompts.columns) or "none"
        raise ConfigurationError(f"pcl.features: the prompts have no field {name!r}; they have: {known}")
    column = prompts.columns[name]
    if not isinstance(column, Tensor):
        wrong = next((value for value in column if not isinstance(value, int | float | None)), None)
        if wrong is not None:
            raise ConfigurationError(f"pcl.features: the field {name!r} must hold numbers, got {wrong!r}")
        column = torch.tensor([torch.nan if value is None else value for value in column], dtype=torch.float64)
    if column.dim() != 1:
        raise ConfigurationError(f"pcl.features: the field {name!r} must hold one number per prompt")
    return column.double()


def log_count(texts: Sequence[Any], name: str) -> Tensor:
    """log(1 + count) of one of `COUNTS` in every prompt, (P,) float64."""
    return torch.tensor([COUNTS[name](text_of(text)) for text in texts], dtype=torch.float64).log1p()


def scale(phi: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every feature, (d,), over the prompts that have it; 0, 0 where none has."""
    phi = torch.where(phi.isfinite(), phi, torch.nan)
    mean = phi.nanmean(0)
    spread = (phi - mean).square().nanmean(0).sqrt()
    spread = torch.where(spread > ROUNDING * mean.abs(), spread, 0.0)  # of a constant: rounding
    return mean.nan_to_num(), spread.nan_to_num()


def standardised(phi: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """(phi - mean) / spread, (K, d), at most `FAR` from 0; 0 where a number is missing or a feature is constant."""
    return ops.safe_divide(phi - mean, spread.expand_as(phi)).nan_to_num(0, torch.inf, -torch.inf).clamp(-FAR, FAR)


# what is learnt from the step


def outcomes(rewards: Tensor, scores: Tensor, groups: Tensor) -> Tensor:
    """The reward of each response, (B,) float64; of one that was dropped before it got any, the score. NaN: none."""
    dropped = rewards[:, 0].isnan()
    return torch.where(groups >= 0, rewards[:, 0], torch.where(dropped, scores[:, 0], torch.nan)).double()


def effective_ratio(p: Tensor, n: Tensor | int) -> Tensor:
    """1 - p^n - (1 - p)^n: how likely n responses with success rates p (M,) are not all equal."""
    return 1 - p**n - (1 - p) ** n


def explained_variance(V: Tensor, p: Tensor) -> Tensor:
    """1 - sum (p - V)^2 / sum (p - mean p)^2 of predictions V (M,) for p (M,)."""
    return 1 - (p - V).square().sum() / (p - p.mean()).square().sum()
