"""GRPO-D: GRPO with a dynamic KL coefficient (OThink-MR1, Liu et al. 2025; arXiv 2503.16081).

Equation 3 of the paper's second version; there is no official code. s is the step, 0 for the first, t the number of
planned steps, and w = explore_fraction t the end of the exploration.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl
from rlplugins.defaults import K3
from rlplugins.steps import Run, Step

Coefficient = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class GrpoD(Plugin):
    """Lowers the weight of the KL penalty while the policy explores, then raises it to the end of the run.

    GRPO-D (arXiv 2503.16081): nothing else differs from GRPO.
    """

    name = "grpo-d"

    beta_min: Coefficient = 0.04
    """Weight at the end of the exploration; the paper has 0.04 (counting) and 0 (geometry)."""
    beta_max: Coefficient = 0.1
    """Weight at the end of the run; the paper has 0.1 (counting) and 0.02 (geometry)."""
    explore_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the steps that explore."""
    shape: Literal["paper", "ramp"] = "paper"
    """While exploring: `paper` falls from the middle of the range to `beta_min`, `ramp` stays at `beta_min`."""
    total_steps: Annotated[int, Field(ge=1)] | None = None
    """Length of the schedule; None: the planned steps of the run, as they were when it began."""

    @model_validator(mode="after")
    def _check_range(self) -> GrpoD:
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min {self.beta_min:g} is above beta_max {self.beta_max:g}")
        return self

    def init_state(self, run: Run) -> dict[str, Any]:
        """Planned steps of the run: a resumed run goes on along the same curve, whatever it is planned to be then."""
        return {"total_steps": run.total_steps}

    @hookimpl
    def prepare_step(self, step: Step, log: Any) -> None:
        """Share this step's beta: the update knows neither the state nor the run's length."""
        weight = beta(step.number, self.total_steps or self.state.total_steps, self.beta_min, self.beta_max,
                      self.explore_fraction, self.shape)  # fmt: skip
        step.share("beta", weight)
        log("beta", weight)

    @hookimpl
    def kl_penalty(self, log_probs: Tensor, ref_log_probs: Tensor, batch: Any) -> Tensor:
        return K3(coefficient=batch.shared["beta"]).kl_penalty(log_probs, ref_log_probs)


def beta(
    step: int, total_steps: int, beta_min: float = 0.04, beta_max: float = 0.1, explore_fraction: float = 0.3,
    shape: str = "paper",
) -> float:  # fmt: skip
    """beta(s): from the middle (`ramp`: `beta_min`) to beta_min at s = w, then to beta_max at s = t, where it stays."""
    s, w = min(step, total_steps), explore_fraction * total_steps
    if s > w or w == 0:
        return beta_min + (beta_max - beta_min) * (s - w) / (total_steps - w)
    return beta_min + (beta_max - beta_min) / 2 * (1 - s / w) * (shape == "paper")
