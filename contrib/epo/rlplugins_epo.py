"""EPO: Entropy-regularized Policy Optimization for LLM agents (arXiv 2509.22576).

The paper's form is equations 2 to 6 and algorithm 1 of its second version; `variant: code` is what the official code
does, WujiangXu/EPO, `verl/workers/actor/dp_actor.py` and `verl/trainer/ppo/ray_trainer.py`. H is the entropy of a token,
m the mask, w the weight of a token in the averages, k the number of finished steps and K that of planned ones.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError
from rlplugins.rollouts import POLICY, Column, Rollouts
from rlplugins.steps import Run, Step

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Epo(Plugin):
    """Entropy bonus for agents, with a penalty on tokens whose entropy leaves a band around that of earlier steps.

    Entropy-regularized Policy Optimization (arXiv 2509.22576); the penalty's coefficient falls during the run.
    """

    name = "epo"
    assumes = frozenset({"single_entropy"})
    breaks = frozenset({"single_entropy"})

    lam: NonNegative = 0.001
    """lambda, the factor on the whole term; 0 leaves the base method alone."""
    alpha: NonNegative = 0.05
    """Factor on the penalty; the paper has 0.05 (ScienceWorld) and 0.1 (ALFWorld)."""
    kappa_l: NonNegative = 0.0
    """Lower end of the band, in units of the average entropy of earlier steps."""
    kappa_r: NonNegative = 2.0
    """Upper end of the band, in the same units."""
    gamma: NonNegative = 3.0
    """How fast the penalty's coefficient falls from 2 to about 1."""
    trajectory: str | None = None
    """Data column that tells which responses are turns of one trajectory; None: each is a trajectory of one turn."""
    variant: Literal["paper", "code"] = "paper"
    """The paper's penalty, or the official code's, which has no gradient and a band for each turn; the rest is for it."""
    turn: str | None = None
    """Data column with the number of the turn, 0 for the first; None: every response is a first turn."""
    min_ratio: NonNegative = 0.8
    """Lower end of the code's band, in units of the turn's average entropy."""
    max_ratio: NonNegative = 1.2
    """Upper end of the code's band, in the same units."""
    penalty: NonNegative = 0.1
    """What the code takes from the entropy of a token outside of the band."""
    coef: NonNegative = 1.0
    """Factor on the code's penalty."""
    level: Literal["token", "seq"] = "token"
    """Whether the code compares each token's entropy, or a row's mean over all columns, padding included."""
    max_steps: Count = 50
    """Turns that the code's history has; it penalises where some turn has reached half of them."""
    smooth_weights: bool = False
    """Lower the code's penalty during the run, to 4 % at the end."""
    max_epochs: Count = 150
    """Steps until that end."""

    @model_validator(mode="after")
    def _check_bands(self) -> Epo:
        if self.kappa_l > self.kappa_r:
            raise ValueError(f"kappa_l {self.kappa_l:g} is above kappa_r {self.kappa_r:g}")
        if self.min_ratio > self.max_ratio:
            raise ValueError(f"min_ratio {self.min_ratio:g} is above max_ratio {self.max_ratio:g}")
        return self

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """The old policy's entropy for the history; columns that tell the turns; the code's penalty depends on the cut."""
        names = [self.trajectory] if self.variant == "paper" else [self.turn]
        columns = tuple(needs.column(name) for name in ["entropy", *names] if name is not None)
        return (*columns, needs.ONE_RANK) if self.variant == "code" else columns

    def init_state(self, run: Run) -> dict[str, Any]:
        """One entry per step: the average entropy (k,), or in the code's variant the averages by turn (k, max_steps).

        Raises:
            ConfigurationError: if the schedule has no middle.
        """
        if self.variant == "paper" and run.total_steps < 2:
            raise ConfigurationError(f"{self.name} needs 2 planned steps or more, this run has {run.total_steps}")
        shape = (0,) if self.variant == "paper" else (0, self.max_steps)
        return {"history": torch.zeros(shape, dtype=torch.float64)}

    # credit

    @hookimpl
    def prepare_step(self, rollouts: Rollouts, mask: Tensor, step: Step, log: Any) -> None:
        """The weights w, constant over a response, as column `epo_weight` (B, 1); the band's centre and beta_k."""
        drawn = rollouts.of_kind(POLICY)
        own = mask if bool(drawn.all()) else mask & drawn[:, None]
        tokens = ops.lengths(own)
        if self.variant == "paper":
            w = token_weights(own, self._ids(rollouts, self.trajectory))
        else:
            w = (tokens > 0) / tokens.double().sum().clamp(min=1)
        rollouts["epo_weight"] = w
        entropy = rollouts["entropy"]
        assert isinstance(entropy, Tensor)
        L_H = (ops.masked_sum(entropy, own) * w).sum()
        log("entropy", L_H)
        if self.variant == "paper":
            self._share_paper(L_H, tokens, step, log)
        else:
            rollouts["epo_turn"] = turn = torch.where(tokens > 0, self._turns(rollouts)[:, None], -1)
            averages = turn_averages(entropy, own, turn, self.max_steps).cpu()
            step.share("average", averages)
            step.share("columns", mask.shape[1])
            step.share("h", torch.cat([self.state.history, averages[None]]).mean(0))
            step.share("weight", epoch_weight(step.number, self.max_epochs) if self.smooth_weights else 1.0)

    def _share_paper(self, L_H: Tensor, tokens: Tensor, step: Step, log: Any) -> None:
        history = self.state.history
        beta_k = beta(step.number, step.total_steps, self.gamma)
        log("beta", beta_k)
        step.share("beta", beta_k)
        if len(history):
            log("history", history.mean())
        step.share("Hbar", float(history.mean()) if len(history) else None)
        if bool(tokens.any()):
            step.share("average", L_H.cpu())

    def _ids(self, rollouts: Rollouts, name: str | None) -> Tensor:
        """Numbers (B,) that are equal where the column's entries are; without a column all are different."""
        if name is None:
            return torch.arange(len(rollouts), device=rollouts.mask.device)
        return numbered(rollouts[name], rollouts.mask)

    def _turns(self, rollouts: Rollouts) -> Tensor:
        """Number of each response's turn, (B,) int64."""
        if self.turn is None:
            return torch.zeros(len(rollouts), dtype=torch.int64, device=rollouts.mask.device)
        return torch.as_tensor(rollouts[self.turn], device=rollouts.mask.device).long().flatten()

    # update

    @hookimpl(when=lambda self: self.lam > 0)
    def prepare_mini_batch(self, batch: Any) -> None:
        """S, the sum of w over the mini-batch."""
        S = batch.sum((batch["epo_weight"] * batch["mask"].sum(1, keepdim=True)).sum())
        batch.share("S", torch.where(S == 0, 1.0, S))

    @hookimpl(when=lambda self: self.lam > 0)
    def auxiliary_loss(self, entropy: Tensor, mask: Tensor, batch: Any, log: Any) -> Tensor:
        """L_aux = - lambda sum w (H - beta_k alpha P) / S; the code's - lambda sum w (H - coef c) / S."""
        w = batch["epo_weight"].to(entropy.dtype)
        if self.variant == "paper":
            lower = self._paper_penalty(entropy, batch.shared["Hbar"]) * (batch.shared["beta"] * self.alpha)
        else:
            lower = self._code_penalty(entropy, batch) * self.coef
        share = (w * mask.sum(1, keepdim=True)).sum()
        outside = (((lower > 0) * mask).sum(1, keepdim=True) * w).sum()
        log("outside", outside / torch.where(share == 0, 1.0, share), share)
        return -self.lam * (((entropy - lower) * mask).sum(1, keepdim=True) * w).sum() / batch.shared["S"].to(w)

    def _paper_penalty(self, entropy: Tensor, history_mean: float | None) -> Tensor:
        if history_mean is None:
            return torch.zeros_like(entropy)
        return band_penalty(entropy, history_mean, self.kappa_l, self.kappa_r)

    def _code_penalty(self, entropy: Tensor, batch: Any) -> Tensor:
        """c on every row of a micro-batch in which some turn is late; rows whose turn has no history have none."""
        turn = batch["epo_turn"]
        known = (turn >= 0) & (turn < self.max_steps) & (turn >= self.max_steps // 2).any()
        h = batch.shared["h"].to(entropy)[torch.where(known, turn, 0)]
        x = entropy.detach()
        if self.level == "seq":
            x = x.sum(1, keepdim=True) / batch.shared["columns"]
        c = code_penalty(x, h, self.min_ratio, self.max_ratio, self.penalty)
        return known * c * batch.shared["weight"]

    # life

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Add this step's average to the history, after the update."""
        if "average" in step.shared:
            self.state.history = torch.cat([self.state.history, step.shared["average"][None]])


def numbered(column: Column, like: Tensor) -> Tensor:
    """Numbers (B,) int64 that are equal where the entries of a column, tensor or list, are."""
    if isinstance(column, Tensor):
        return torch.unique(column.flatten(), return_inverse=True)[1].to(like.device)
    numbers = np.unique(np.asarray(column, dtype=str), return_inverse=True)[1]
    return torch.from_numpy(numbers.reshape(-1)).to(like.device)


def token_weights(mask: Tensor, traj_id: Tensor) -> Tensor:
    """w of each token of a row, (B, 1) float64: 1 / tokens of the turn / turns of its trajectory / trajectories.

    Turns without tokens and trajectories without turns are not counted and have 0.

    Args:
        mask: (B, T) bool; a row is a turn.
        traj_id: (B,) int64, equal for the turns of one trajectory.
    """
    tokens = ops.lengths(mask).double()
    present = torch.where(tokens > 0, 1.0, torch.nan).double()
    turns = ops.group_count(present, traj_id)
    trajectories = (1 / turns).masked_fill(tokens == 0, 0).sum()
    return ops.safe_divide((tokens > 0).double(), tokens * turns * trajectories)


def beta(k: int, K: int, gamma: float = 3.0) -> float:
    """beta_k = 1 + exp(- gamma k / floor(K / 2)), from 2 to about 1."""
    return 1 + math.exp(-gamma * k / (K // 2))


def band_penalty(entropy: Tensor, history_mean: float, kappa_l: float = 0.0, kappa_r: float = 2.0) -> Tensor:
    """P = max(kappa_l Hbar - H, 0) + max(H - kappa_r Hbar, 0), (B, T)."""
    return torch.relu(kappa_l * history_mean - entropy) + torch.relu(entropy - kappa_r * history_mean)


def code_penalty(x: Tensor, h: Tensor, min_ratio: float = 0.8, max_ratio: float = 1.2, penalty: float = 0.1) -> Tensor:
    """c, like x: 0 for entropies x (B, T) or (B, 1) strictly inside of the band around h (B, 1), else the penalty."""
    inside = (x > min_ratio * h) & (x < max_ratio * h)
    return torch.where(inside, 0.0, penalty).to(x.dtype)


def turn_averages(entropy: Tensor, mask: Tensor, turn: Tensor, max_steps: int) -> Tensor:
    """The row that the code adds to its history, (max_steps,) float64: token means by turn at the end, zeros before.

    With more turns than columns the last ones stay.

    Args:
        entropy: (B, T).
        mask: (B, T) bool.
        turn: (B, 1) int64; -1: not counted.
        max_steps: columns of the history.
    """
    turns = int(turn.max()) + 1 if len(turn) else 0
    bucket = turn.flatten() + 1
    sums = torch.stack([ops.masked_sum(entropy, mask).flatten(), ops.lengths(mask).flatten()]).double()
    sums = sums.new_zeros((2, turns + 1)).index_add_(1, bucket, sums)[:, 1:]
    return torch.nn.functional.pad(ops.safe_divide(*sums), (max_steps - turns, 0))


def epoch_weight(e: int, E: int = 150) -> float:
    """Factor on the code's penalty at training step e of E: 1 to 0.83 in the first half, 0.8 to 0.04 in the second."""
    e, h = min(e, E), E // 2
    if h == 0:
        return 1.0
    if e <= h:
        return 1 - 0.2 * (1 - math.exp(-2 * e / h))
    return 0.8 * math.exp(-3 * (e - h) / (E - h))
