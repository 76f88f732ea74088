"""REC: Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm (arXiv 2509.24203).

Advantages, clip rules, weights and regularisers as in the official code, modelscope/Trinity-RFT,
`trinity/algorithm/advantage_fn/rec_advantage.py` and `trinity/algorithm/policy_loss_fn/rec_policy_loss.py`; OPMD and the
shift of AsymRE as in its `opmd` and `asymre` functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.hookspecs import Log
from rlplugins.plugin import BuiltinName
from rlplugins.steps import Step
from rlplugins.update import LOG_RATIO_BOUND, probability_ratio

ROUNDING = 1e-6  # a reward this little below the mean of its group, relative to it, is not below it: float32 rounding

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Lower = Annotated[float, Field(ge=0, le=1)]
Upper = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Rec(Plugin):
    """Group-relative REINFORCE as an off-policy method: a clip rule, a weight and a regulariser on -A log pi.

    The family REC of arXiv 2509.24203; REINFORCE, GRPO, OPMD, AsymRE, RED-Drop and RED-Weight are members.
    """

    name = "rec"
    needs = (needs.group_size(at_least=2),)

    clip_mode: Literal["none", "one-side", "two-side", "ring"] = "none"
    """Which tokens keep their policy gradient: all, or by their ratio to the old policy."""
    eps_low: Lower = 0.2
    """Distance of the lower bound of the ratio from 1."""
    eps_high: Upper = 0.2
    """Distance of the upper bound of the ratio from 1."""
    eps_low_prime: Lower = 0.6
    """Ring: with A >= 0, a ratio this far or further below 1 keeps its gradient again."""
    eps_high_prime: Upper = 2.0
    """Ring: with A <= 0, a ratio this far or further above 1 keeps its gradient again."""
    weight: Literal["none", "importance_sampling", "advantage", "opmd"] = "none"
    """Factor on the policy gradient: 1, the ratio, exp(A / temp) (RED-Weight), or 1 / (1 + tau) (OPMD)."""
    temp: Positive = 1.0
    """Temperature of the weight `advantage`; infinity: no weight."""
    regularizer: Literal["none", "forward-kl", "k2"] = "none"
    """Added to the loss of every token: -coef log pi (as AsymRE), or coef (log pi - log pi_old)^2 (Kimi's OPMD)."""
    coef: NonNegative = 0.0
    """Factor on the regulariser; 0.1 in the published examples."""
    ratio: Literal["token", "sequence"] = "token"
    """Ratio per token, or the geometric mean of a response's ratios, with the mean over responses (experimental)."""
    std_normalize: bool = False
    """Divide advantages by the population standard deviation of the group plus 1e-6."""
    drop: Literal["balance"] | None = None
    """`balance` (RED-Drop): leave out random responses below the mean until no more are left than at or above it."""
    shift: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Added to the baseline; -0.1 in AsymRE."""
    opmd_baseline: Literal["mean", "logavgexp"] = "mean"
    """Baseline: mean of the group's rewards, or tau log mean exp(r / tau)."""
    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Temperature of OPMD, in its weight and in its baseline."""

    @model_validator(mode="after")
    def _fit_together(self) -> Rec:
        if self.ratio == "sequence" and self.clip_mode != "one-side":
            raise ValueError("ratio: sequence is defined for clip_mode: one-side")
        if self.ratio == "sequence" and self.weight not in ("none", "importance_sampling"):
            raise ValueError("ratio: sequence is defined for the weights none and importance_sampling")
        if self.clip_mode == "ring" and (self.eps_low_prime < self.eps_low or self.eps_high_prime < self.eps_high):
            raise ValueError("eps_low_prime and eps_high_prime of a ring must not be below eps_low and eps_high")
        if self.regularizer != "none" and self.coef == 0:
            raise ValueError("coef is 0, so that the regularizer has no effect; 0.1 is the value of the examples")
        if self.regularizer == "none" and self.coef > 0:
            raise ValueError("coef has no effect without a regularizer")
        if self.regularizer == "forward-kl" and self.shift != 0:
            raise ValueError("shift and the regularizer forward-kl are two forms of AsymRE; use one of them")
        return self

    @property
    def uses(self) -> Mapping[str, BuiltinName]:
        """The sequence form is reduced response by response."""
        reduction = {"reduce_loss": "sequence_mean" if self.ratio == "sequence" else "token_mean"}
        return reduction if self.std_normalize else reduction | {"advantage_scale": "one"}

    @property
    def assumes(self) -> frozenset[str]:
        """Where the size of an advantage means something beside that of others, nothing may normalise it afterwards."""
        absolute = self.shift != 0 or self.weight == "advantage" or self.regularizer != "none" or self.drop
        return frozenset({"response_rewards", *(["absolute_advantages"] if absolute else [])})

    @property
    def breaks(self) -> frozenset[str]:
        """What RED-Drop, the standard deviation, and a loss that does not compare token by token break."""
        compares = self.clip_mode != "none" or self.weight == "importance_sampling" or self.regularizer == "k2"
        broken = {"whole_groups": self.drop is not None, "reward_scale": self.std_normalize,
                  "token_ratio": self.ratio == "sequence" or not compares}  # fmt: skip
        return frozenset(fact for fact, breaks in broken.items() if breaks)

    @property
    def corrects_staleness(self) -> bool:
        """The clip rule is the method's own answer to stale rollouts."""
        return self.clip_mode != "none"

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor, step: Step) -> Tensor:
        """b of the responses that RED-Drop leaves, plus the shift; 0 if that is one response."""
        kept = self.kept(rewards, groups, step)
        found = group_mean(rewards, groups, kept)
        if self.opmd_baseline == "logavgexp":
            found = group_logavgexp(rewards, groups, kept, self.tau)
        return torch.where(ops.group_sum(kept, groups) > 1, found + self.shift, 0)

    @hookimpl(when=lambda self: self.std_normalize)
    def advantage_scale(self, rewards: Tensor, groups: Tensor, step: Step) -> Tensor:
        """Population standard deviation of the same responses, plus 1e-6; 1 if that is one response."""
        kept = self.kept(rewards, groups, step)
        variance = group_mean((rewards - group_mean(rewards, groups, kept)).square(), groups, kept)
        return torch.where(ops.group_sum(kept, groups) > 1, variance.sqrt() + 1e-6, 1)

    @hookimpl(when=lambda self: self.drop is not None, trylast=True)
    def shape_advantages(self, advantages: Tensor, rewards: Tensor, groups: Tensor, step: Step, log: Log) -> Tensor:
        """0 for the responses that RED-Drop leaves out; they stay in the lower sum of the loss."""
        kept = self.kept(rewards, groups, step)
        log("dropped", 1 - kept.mean() if len(kept) else 0.0)
        return advantages * kept

    @hookimpl(when=lambda self: self.clip_mode != "none")
    def clip_range(self) -> tuple[float, float]:
        return 1 - self.eps_low, 1 + self.eps_high

    @hookimpl(when=lambda self: self.clip_mode == "none")
    def policy_loss(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return self.token_loss(log_probs, old_log_probs, advantages, self.weights(advantages, log_probs, old_log_probs))

    @hookimpl(hook="policy_loss", when=lambda self: self.clip_mode != "none")
    def clipped_policy_loss(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        clip: tuple[Any, Any],
        mask: Tensor,
        log: Log,
    ) -> Tensor:
        rho = self.rho(log_probs, old_log_probs, mask)
        prime = (1 - self.eps_low_prime, 1 + self.eps_high_prime)
        kept = kept_tokens(self.clip_mode, rho, advantages, clip, prime)
        log("kept", (kept & mask).sum() / mask.sum().clamp(min=1), mask.sum())
        weights = rho if self.weight == "importance_sampling" else self.weights(advantages, log_probs, old_log_probs)
        return self.token_loss(log_probs, old_log_probs, advantages, weights * kept)

    def token_loss(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor | float
    ) -> Tensor:
        """-A w k l plus the regulariser, (B, T); `weights` is w k, (B, 1), (B, T) or a number."""
        loss = -(advantages * weights) * log_probs
        if self.regularizer == "forward-kl":
            return loss - self.coef * log_probs
        if self.regularizer == "k2":
            return loss + self.coef * (log_probs - old_log_probs).square()
        return loss

    def weights(self, advantages: Tensor, log_probs: Tensor, old_log_probs: Tensor) -> Tensor | float:
        """w of each token: (B, 1), (B, T) or a number."""
        if self.weight == "importance_sampling":
            return probability_ratio(log_probs.detach(), old_log_probs)
        if self.weight == "advantage":
            return (advantages / self.temp).exp()
        return 1 / (1 + self.tau) if self.weight == "opmd" else 1.0

    def rho(self, log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
        """The ratio without gradient, per token (B, T), or the geometric mean over each response (B, 1)."""
        if self.ratio == "token":
            return probability_ratio(log_probs.detach(), old_log_probs)
        mean = ops.masked_mean(log_probs.detach() - old_log_probs, mask)
        return mean.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()

    def kept(self, rewards: Tensor, groups: Tensor, step: Step) -> Tensor:
        """(B, 1), 0 for the responses that RED-Drop leaves out and 1 for the others; the same in every hook of a step."""
        if self.drop is None:
            return torch.ones_like(rewards)
        draws = torch.rand(len(rewards), generator=step.generator(self), dtype=torch.float64).to(rewards.device)
        return (~red_drop(rewards, groups, draws)).to(rewards.dtype)


def red_drop(rewards: Tensor, groups: Tensor, draws: Tensor) -> Tensor:
    """The |N| - |P| responses of N with the smallest draws in each group, (B, 1) bool; none where |N| <= |P|.

    P are the responses whose reward is at least the mean of their group, N the others.

    Args:
        rewards: (B, 1).
        groups: (B,) int64, -1: none.
        draws: (B,) random numbers.
    """
    b = ops.group_mean(rewards, groups)
    grouped = (groups >= 0)[:, None]
    below = grouped & (rewards < b - ROUNDING * b.abs().clamp(min=1))
    surplus = ops.group_sum(below.double(), groups) - ops.group_sum((grouped & ~below).double(), groups)
    return below & (place_in_group(draws, torch.where(below.flatten(), groups, -1))[:, None] < surplus)


def place_in_group(keys: Tensor, groups: Tensor) -> Tensor:
    """How many rows of its group come before each row by `keys` (B,), (B,) int64; equal keys in the order of the rows."""
    ids = ops.dense_groups(groups)[0] + 1
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(ids[order], stable=True)]
    sizes = torch.bincount(ids)
    starts = sizes.cumsum(0) - sizes
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device) - starts[ids[order]]
    return places


def group_mean(values: Tensor, groups: Tensor, kept: Tensor) -> Tensor:
    """Mean of the kept rows, (B, 1) 0 or 1, of each row's group, (B, 1)."""
    return ops.group_sum(values * kept, groups) / ops.group_sum(kept, groups).clamp(min=1)


def group_logavgexp(rewards: Tensor, groups: Tensor, kept: Tensor, tau: float) -> Tensor:
    """tau log of the mean of exp(r / tau) over the kept rows of each row's group, (B, 1)."""
    largest = ops.group_extreme(rewards, groups)
    return largest + tau * group_mean(((rewards - largest) / tau).exp(), groups, kept).log()


def kept_tokens(
    clip_mode: str, rho: Tensor, advantages: Tensor, clip: tuple[Any, Any], prime: tuple[float, float]
) -> Tensor:
    """k: which tokens keep their policy gradient, bool, (B, 1) or (B, T); bounds included.

    Args:
        clip_mode: `one-side`, `two-side` or `ring`.
        rho: ratio, (B, 1) or (B, T).
        advantages: (B, 1) or (B, T).
        clip: lower and upper bound of the ratio.
        prime: below the first (A >= 0) and above the second (A <= 0) a ring keeps tokens again.
    """
    above, below = rho >= clip[0], rho <= clip[1]
    if clip_mode == "one-side":
        return (below & (advantages >= 0)) | (above & (advantages <= 0))
    if clip_mode == "two-side":
        return above & below
    return (above & below) | ((advantages >= 0) & (rho <= prime[0])) | ((advantages <= 0) & (rho >= prime[1]))
