"""Dynamic reward weighting: Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting.

arXiv 2509.11452 (2025; TACL 2026). Meta reward, influences, weights and the components conciseness and clarity as in the
official code, yining610/dynamic-reward-weighting: `verl/utils/reward_score/dynamic_math/`, `verl/trainer/ppo/`
(`ray_trainer_vanilla.py` is the hypervolume mode, `ray_trainer_optimization.py` the gradient mode) and `compute_gradients`
in `verl/workers/actor/dp_actor.py`.

S (B, K) are the objectives' scores, w (K,) their weights on the simplex.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import Log
from rlplugins.needs import Need
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import POLICY, Rollouts
from rlplugins.services import Engine, Gradients
from rlplugins.steps import Run, Step

SCORE, CONCISENESS = "score", "conciseness"
"""Objectives that are no components of the reward function: its score, and what is computed here."""

Direction = Literal["max", "min"]
Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]

WEIGHTS: dict[str, float] = {"accuracy": 0.334, "conciseness": 0.333, "clarity": 0.333}
VALIDATION: dict[str, Direction] = {
    "validation/reward/accuracy": "max",
    "validation/response_length": "min",
    "validation/reward/clarity": "max",
}


def _by_hypervolume(plugin: DynamicRewardWeighting) -> bool:
    return plugin.mode == "hypervolume"


def _by_gradients(plugin: DynamicRewardWeighting) -> bool:
    return plugin.mode == "gradient"


def _remembers_steps(plugin: DynamicRewardWeighting) -> bool:
    return _by_gradients(plugin) or plugin.computes_conciseness


class DynamicRewardWeighting(Plugin):
    """Weighs several objectives anew in every step, by what the policy adds to the Pareto front or by their gradients.

    Dynamic reward weighting (arXiv 2509.11452), both of its modes.
    """

    name = "dynamic-reward-weighting"

    mode: Literal["hypervolume", "gradient"] = "hypervolume"
    """A meta reward on a fixed weighted sum (`hypervolume`), or weights that follow the objectives (`gradient`)."""
    weights: dict[str, Share] = Field(default_factory=WEIGHTS.copy)
    """w by objective: components of the reward function, its `score`, or `conciseness`. `gradient` starts from them."""
    conciseness: bool = True
    """Compute `conciseness` here: 1 for a response shorter than the mean of the run. False: it is a component."""
    validation: dict[str, Direction] = Field(default_factory=VALIDATION.copy)
    """Metrics of a validation that make the vector v, in the trainer's names, and whether large or small is good."""
    scale: dict[str, Positive] = Field(default_factory=dict)
    """Unit of these metrics, by which they are divided before the volume is taken; 1 where left out."""
    reference: dict[str, Finite] | None = None
    """Metrics of the policy before training, from which the volume is measured; None: the run's first validation."""
    mu: Annotated[float, Field(gt=0)] = 1e-5
    """Regularisation: the step of the weights is the learning rate divided by it (1e-4 in the DeepSeek script)."""
    weight_accumulation_steps: Count = 1
    """Steps whose influences are averaged before the weights move."""
    target_layers: tuple[Layer, ...] | str | None = tuple(range(10, 26))
    """Layers whose gradients are compared, from 0, or a regular expression of parameter names; None: all parameters."""
    grad_clip: Positive | None = 1.0
    """Longest gradient of an objective, over all parameters; longer ones are scaled down. None: no bound."""
    gradient_scale: Positive = 1.0
    """Factor on the gradients before `grad_clip`; the number of micro-batches per rank, 8 in the scripts, as released."""
    clip_ratio: Positive | None = 100.0
    """`gradient`: distance of both bounds of the ratio from 1; 100 is no clipping. None: those of the stack."""

    @property
    def uses(self) -> Mapping[str, BuiltinName]:
        """No division that would cancel the meta reward, or no clipping where weights assume a linear loss."""
        if _by_hypervolume(self):
            return {"advantage_scale": "one"}
        if self.clip_ratio is None:
            return {}
        return {"clip_range": {"fixed": {"low": min(1.0, self.clip_ratio), "high": self.clip_ratio}}}

    @property
    def needs(self) -> tuple[Need, ...]:
        """What the mode measures, and the components that are weighed."""
        components = (needs.column("components"),) if set(self.weights) - self._own else ()
        return (needs.VALIDATION_EVERY_STEP if _by_hypervolume(self) else needs.GRADIENTS, *components)

    @property
    def assumes(self) -> frozenset[str]:
        """The meta reward is a common factor."""
        return frozenset({"reward_scale"} if _by_hypervolume(self) else ())

    @property
    def breaks(self) -> frozenset[str]:
        """The meta reward is up to 2."""
        return frozenset({"unit_rewards"} if _by_hypervolume(self) else ())

    @property
    def computes_conciseness(self) -> bool:
        """Whether the run's mean length is kept."""
        return self.conciseness and CONCISENESS in self.weights

    @property
    def _own(self) -> set[str]:
        return {SCORE, CONCISENESS} if self.conciseness else {SCORE}

    @property
    def _pattern(self) -> str | None:
        """Regular expression of the names of the parameters that are compared."""
        if self.target_layers is None or isinstance(self.target_layers, str):
            return self.target_layers
        return rf"\b(?:layers|h)\.(?:{'|'.join(map(str, self.target_layers))})\."

    @model_validator(mode="after")
    def _check(self) -> DynamicRewardWeighting:
        if abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError(f"weights must name the objectives and add up to 1, not to {sum(self.weights.values()):g}")
        if _by_gradients(self) and 0 in self.weights.values():
            raise ValueError("weights: in the gradient mode an objective of weight 0 never gets another, leave it out")
        if _by_hypervolume(self) and not self.validation:
            raise ValueError("validation must name a metric")
        if unknown := sorted(set(self.scale) - set(self.validation)):
            raise ValueError(f"scale: {unknown[0]!r} is not among the metrics of validation")
        if self.reference is not None and set(self.reference) != set(self.validation):
            raise ValueError("reference must give every metric of validation, and no other")
        if self.target_layers == ():
            raise ValueError("target_layers must name a layer; leave it empty (null) for all parameters")
        if isinstance(self.target_layers, str):
            try:
                re.compile(self.target_layers)
            except re.error as error:
                raise ValueError(f"target_layers: {self.target_layers!r} is no regular expression: {error}") from None
        return self

    def init_state(self, run: Run) -> dict[str, Any]:
        """Hypervolume: reference, points, meta. Gradient: w, sum and number of influences. Conciseness: sum and count."""
        state: dict[str, Any] = {}
        if _by_hypervolume(self):
            state |= {"reference": self._vector(self.reference or {}), "points": [], "meta": 1.0}
        else:
            w = torch.tensor(list(self.weights.values()), dtype=torch.float64)
            state |= {"w": w, "influence": torch.zeros_like(w), "influences": 0}
        return state | ({"tokens": 0.0, "responses": 0} if self.computes_conciseness else {})

    # hypervolume

    @hookimpl(hook="combine_rewards", when=_by_hypervolume)
    def scaled_rewards(self, scores: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
        """meta * (S @ w), (B, 1), with the meta reward of the last validation."""
        S, lengths = self._objectives(scores, rollouts, mask, log)
        step.share("remembered", lengths)
        return self.state.meta * (S @ S.new_tensor(list(self.weights.values()))[:, None])

    @hookimpl(when=_by_hypervolume)
    def on_validation(self, metrics: Mapping[str, float], log: Log) -> None:
        """The meta reward of the next step, from the volume D that the updated policy adds to the front."""
        v = self._vector(metrics)
        if v is None:
            return
        if self.state.reference is None:
            self.state.reference = v
            return
        D = contribution(np.array(v), np.array(self.state.points).reshape(-1, len(v)), np.array(self.state.reference))
        self.state.meta = 0.5 + 1.5 * math.tanh(D)
        if D > 0:
            self.state.points = [*self.state.points, v]
        log("meta", self.state.meta)
        log("contribution", D)

    def _vector(self, metrics: Mapping[str, float]) -> list[float] | None:
        """v (K,) in units of `scale`, larger is better; None without a validation, or where a metric is not finite.

        Raises:
            ConfigurationError: if the validation did not give a metric that is named.
        """
        if not metrics:
            return None
        if missing := [name for name in self.validation if name not in metrics]:
            raise ConfigurationError(
                f"{self.name}.validation: there is no metric {missing[0]!r}; the validation gave: "
                f"{', '.join(sorted(metrics))}"
            )
        v = [
            metrics[name] * (1 if direction == "max" else -1) / self.scale.get(name, 1.0)
            for name, direction in self.validation.items()
        ]
        return v if all(map(math.isfinite, v)) else None

    # gradient

    @hookimpl(hook="combine_rewards", when=_by_gradients)
    def reweighted_rewards(
        self, scores: Tensor, credit: Callable[[Tensor], Tensor], engine: Engine, rollouts: Rollouts, mask: Tensor,
        step: Step, log: Log,
    ) -> Tensor:  # fmt: skip
        """S @ w, (B, 1), with weights that have just followed the gradients of the objectives."""
        S, lengths = self._objectives(scores, rollouts, mask, log)
        gradients = engine.gradient_products(
            rollouts, [credit(part) for part in S.split(1, dim=1)], parameters=self._pattern
        )
        influence = influences(gradients, self.gradient_scale, self.grad_clip)
        w, total, count = self.state.w, self.state.influence + influence, self.state.influences + 1
        if count == self.weight_accumulation_steps:
            w = mirror_step(w, total / count, gradients.learning_rate / self.mu)
            total, count = torch.zeros_like(total), 0
        step.share("remembered", {"w": w, "influence": total, "influences": count, **lengths})
        for place, name in enumerate(self.weights):
            log(f"weight/{name}", w[place])
            log(f"influence/{name}", influence[place])
            log(f"gradient_norm/{name}", gradients.norms[place])
        return S @ w.to(S)[:, None]

    # objectives

    def _objectives(self, scores: Tensor, rollouts: Rollouts, mask: Tensor, log: Log) -> tuple[Tensor, dict[str, Any]]:
        """S (B, K), and the sum and number of lengths to remember. A row that lacks an objective lacks all of them."""
        own: dict[str, Tensor] = {SCORE: scores}
        lengths: dict[str, Any] = {}
        if self.computes_conciseness:
            own[CONCISENESS], lengths = self._conciseness(rollouts, mask)
            log("mean_length", lengths["tokens"] / max(1, lengths["responses"]))
        columns = [own[name] if name in own else self._component(rollouts, name) for name in self.weights]
        S = torch.cat(columns, 1).float()
        return torch.where(S.isfinite().all(1, keepdim=True), S, torch.nan), lengths

    def _conciseness(self, rollouts: Rollouts, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """1 for a response shorter than the mean of the run so far, this step included, else 0, (B, 1)."""
        lengths = ops.lengths(mask).double()
        drawn = rollouts.of_kind(POLICY)
        tokens = self.state.tokens + float(lengths[drawn].sum())
        responses = self.state.responses + int(drawn.sum())
        return (lengths < tokens / max(1, responses)).float(), {"tokens": tokens, "responses": responses}

    def _component(self, rollouts: Rollouts, name: str) -> Tensor:
        """One component of the reward function, (B, 1).

        Raises:
            ConfigurationError: if it gives none of this name.
        """
        components, names = rollouts.components, rollouts.component_names
        if components is None or name not in names:
            raise ConfigurationError(
                f"{self.name}.weights: the reward function gives no component {name!r}; there are: "
                f"{', '.join([*names, *sorted(self._own)])}"
            )
        return components[:, names.index(name), None]

    @hookimpl(when=_remembers_steps)
    def on_step_end(self, step: Step) -> None:
        """Keep what the rewards of this step were made with, if it had any."""
        for name, value in step.shared.get("remembered", {}).items():
            setattr(self.state, name, value)


def contribution(point: np.ndarray, others: np.ndarray, reference: np.ndarray) -> float:
    """HV(others + point) - HV(others): the box of `point` (K,) without what `others` (N, K) cover of it, never below 0."""
    sides = point - reference
    if not (sides > 0).all():
        return 0.0
    return max(0.0, float(sides.prod()) - hypervolume(np.minimum(others, point), reference))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of the union of the boxes between `reference` (K,) and `points` (N, K), larger is better.

    Exact: what each point of the front adds to those before it (While, Bradstreet and Barone, 2012).
    """
    points = front(points)
    return sum((contribution(point, points[:place], reference) for place, point in enumerate(points)), 0.0)


def front(points: np.ndarray) -> np.ndarray:
    """The points (N, K) that no other one reaches in every coordinate, equal ones once, by their first coordinate."""
    points = np.unique(points, axis=0) if len(points) else points
    reached = (points[None] >= points[:, None]).all(2).sum(1) > 1
    return points[~reached]


def influences(gradients: Gradients, scale: float, clip: float | None) -> Tensor:
    """I_k = <g_k, sum_j g_j>, (K,) float64, of the scaled and clipped gradients g_k.

    Args:
        gradients: Gram matrix and norms of the objectives' gradients.
        scale: factor on each before clipping.
        clip: longest norm; None: no bound.
    """
    factor = torch.full_like(gradients.norms, scale)
    if clip is not None:
        factor = torch.minimum(factor, clip / gradients.norms)  # a gradient of 0 stays 0
    return (factor[:, None] * gradients.products * factor).sum(1).cpu()


def mirror_step(w: Tensor, influence: Tensor, rate: float) -> Tensor:
    """softmax(log w + rate * influence), (K,)."""
    return torch.softmax(w.log() + rate * influence, 0)


BOXED = re.compile(r"\\boxed\{\s*[^\s}][^}]*\}")
ENUMERATOR = re.compile(r"(?:^|[\s(])(?:\bstep\s*)?(?:\d+|[ivxlcdm]+|[a-z])[).:-]|(?:^|\s)[-*•]\s+", re.I | re.M)
ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|next|then)\b", re.IGNORECASE
)


def clarity(response: str) -> float:
    """The released component: 1 if a response in steps ends in a boxed answer, else 0; to be called in a reward function.

    Steps are two enumerators (`1.`, `a)`, `iv:`, a bullet, `step 2.`) or two ordinal words; the box must not be empty.
    """
    steps = max(len(pattern.findall(response)) for pattern in (ENUMERATOR, ORDINAL))
    return float(steps >= 2 and BOXED.search(response) is not None)
