"""SEC: Self-Evolving Curriculum for LLM Reasoning (arXiv 2505.14970).

Sampling, update and queues as in a public copy of the authors' code, `verl/utils/auto_curriculum/priority.py` and
`dataloader.py`. Category c of C has the value Q_c; slot: one prompt of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, curriculum, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError, HookError
from rlplugins.needs import Need
from rlplugins.rollouts import POLICY, Prompts, Rollouts
from rlplugins.steps import Run, Step

SMALLEST = 0.01
"""Least value that counts under the policy `normalized_q`."""

Share = Annotated[float, Field(ge=0, le=1)]


class Sec(Plugin):
    """Learns during the run from which categories of prompts to draw.

    Self-Evolving Curriculum (arXiv 2505.14970): each category is an arm of a bandit, and its reward is the mean absolute
    advantage of the step's responses to its prompts.
    """

    name = "sec"

    features: Annotated[tuple[str, ...], Field(min_length=1)] = ("category",)
    """Fields of the prompt file that make up the category; several are joined by "-"."""
    alpha: Share = 0.5
    """Share of a step's reward in the new value of a category."""
    tau: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Temperature of the softmax over the values."""
    objective: Literal["adv", "unnormalized_adv", "progress"] = "adv"
    """A category's reward: mean |advantage|, mean |reward - group mean|, or the gain in mean reward since its last visit."""
    policy: Literal["boltzmann", "normalized_q", "greedy"] = "boltzmann"
    """Draw by softmax(Q / tau), in proportion to max(Q, 0.01), or the largest Q."""
    epsilon: Share = 0.1
    """Probability that `greedy` draws one of the other categories."""
    decay_unseen: bool = True
    """A category without responses in a step has reward 0 (released); False: its value stays (paper)."""
    endless: bool = True
    """Shuffle a category anew when its prompts run out; False: draw every prompt once."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """The category of every prompt, and prompts chosen when the last step's advantages are known."""
        return (needs.PROMPTS_AFTER_UPDATE, *(needs.column(name) for name in self.features))

    @property
    def assumes(self) -> frozenset[str]:
        """Objectives that look at rewards take one per response."""
        return frozenset() if self.objective == "adv" else frozenset({"response_rewards"})

    def init_state(self, run: Run) -> dict[str, Any]:
        """Per category: name, Q, mean reward of the last visit, and the positions of the prompts to come."""
        run.table.add_column("arm", torch.int32, -1)
        values = torch.zeros(0, dtype=torch.float64)
        return {"pool": None, "categories": [], "Q": values, "last_reward": values.clone(), "queues": []}

    # prompts

    @hookimpl
    def choose_prompts(self, prompts: Prompts, count: int, step: Step, log: Callable[..., None]) -> Tensor:
        source = step.generator(self)
        if self.state.pool != fingerprint(prompts):  # the first step, or a resumed run with another prompt file
            self._sort(prompts, source)
        p = self.probabilities(self.state.Q)
        self._log(log, p=p, Q=self.state.Q)
        arms = draw(p, torch.rand(count, generator=source, dtype=torch.float64))
        if self.endless:
            self._refill(prompts, count, source)
        else:
            arms = self._instead_of_empty(arms, source)
        return self._take(arms)

    def probabilities(self, Q: Tensor) -> Tensor:
        """Chance of each category to get a slot, (C,), from its value (C,)."""
        if self.policy == "boltzmann":
            return torch.softmax(Q / self.tau, 0)
        if self.policy == "normalized_q":
            kept = Q.clamp(min=SMALLEST)
            return kept / kept.sum()
        others = len(Q) - 1
        p = torch.full_like(Q, self.epsilon / max(others, 1))
        p[int(Q.argmax())] = 1 - self.epsilon if others else 1.0
        return p

    def _sort(self, prompts: Prompts, source: torch.Generator) -> None:
        """Find the categories and fill their queues; what is known of a category by its name stays."""
        names, arms = categories(prompts, self.features)
        self.table["arm"][:] = -1
        self.table["arm"][prompts.rows] = arms
        before = torch.tensor([self.state.categories.index(n) if n in self.state.categories else -1 for n in names])
        for name in ("Q", "last_reward"):
            values = torch.cat([getattr(self.state, name), torch.zeros(1, dtype=torch.float64)])
            setattr(self.state, name, values[before])
        self.state.pool, self.state.categories = fingerprint(prompts), names
        self.state.queues = [shuffled(arms == arm, source) for arm in range(len(names))]

    def _refill(self, prompts: Prompts, count: int, source: torch.Generator) -> None:
        """Append shuffles of a category to its queue until it could serve every slot."""
        queues = list(self.state.queues)
        short = [arm for arm, queue in enumerate(queues) if len(queue) < count]
        if short:
            arms = self.table["arm"][prompts.rows]
            for arm in short:
                while len(queues[arm]) < count:
                    queues[arm] = torch.cat([queues[arm], shuffled(arms == arm, source)])
        self.state.queues = queues

    def _instead_of_empty(self, arms: Tensor, source: torch.Generator) -> Tensor:
        """`arms` (M,) with random categories that still have prompts in the place of those that have run out."""
        left = torch.tensor([len(queue) for queue in self.state.queues])
        if int(left.sum()) < len(arms):
            raise HookError(self.name, "choose_prompts", f"{int(left.sum())} prompts are left of the one pass, the step takes "
                            f"{len(arms)}: plan fewer steps, or write endless: true")  # fmt: skip
        while bool((over := ranks(arms) >= left[arms]).any()):  # every round serves one slot more at least
            served = torch.bincount(arms[~over], minlength=len(left))
            there = (left > served).nonzero().flatten()
            arms = arms.masked_scatter(over, there[torch.randint(len(there), (int(over.sum()),), generator=source)])
        return arms

    def _take(self, arms: Tensor) -> Tensor:
        """The next prompt of each slot's category, (M,) positions."""
        chosen, queues = torch.empty_like(arms), list(self.state.queues)
        for arm in arms.unique().tolist():
            slots = (arms == arm).nonzero().flatten()
            chosen[slots], queues[arm] = queues[arm][: len(slots)], queues[arm][len(slots) :]
        self.state.queues = queues
        return chosen

    # life

    @hookimpl
    def on_step_end(
        self, rewards: Tensor, advantages: Tensor, groups: Tensor, mask: Tensor, rollouts: Rollouts,
        log: Callable[..., None],
    ) -> None:  # fmt: skip
        rows = rollouts.prompt_rows.cpu()
        arms = torch.where(rows >= 0, self.table["arm"][rows.clamp(min=0)].long(), -1)
        u = self.utility(rewards, advantages, groups, mask).flatten().double().cpu()
        counted = (rollouts.of_kind(POLICY) & (groups >= 0)).cpu() & (arms >= 0) & u.isfinite()
        count = torch.bincount(arms[counted], minlength=len(self.state.Q))
        seen = count > 0
        r = torch.bincount(arms[counted], u[counted], len(count)) / count.clamp(min=1)
        if self.objective == "progress":
            gain = torch.where(seen, r - self.state.last_reward, 0.0)
            self.state.last_reward = torch.where(seen, r, self.state.last_reward)
            r = gain
        self._log(log, r=torch.where(seen, r, torch.nan))
        self.state.Q = update(self.state.Q, r, self.alpha, None if self.decay_unseen else seen)

    def utility(self, rewards: Tensor, advantages: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
        """What each response says about its category, (B, 1); NaN: nothing."""
        if self.objective == "progress":
            return rewards[:, :1]
        if self.objective == "unnormalized_adv":
            u = (rewards[:, :1] - ops.group_mean(rewards[:, :1], groups)).abs()
        else:
            u = advantages.abs() if advantages.shape[1] == 1 else ops.by_blocks(mean_size, advantages, mask)
        return torch.where(ops.lengths(mask) > 0, u, torch.nan)

    def _log(self, log: Callable[..., None], **values: Tensor) -> None:
        """One curve per category, unless these are too many, for what is known (C,)."""
        names: Sequence[str] = self.state.categories
        for what, column in values.items() if len(names) <= curriculum.MOST else ():
            for name, value in zip(names, column.tolist(), strict=True):
                if value == value:
                    log(f"{what}/{name}", value)


def categories(prompts: Prompts, features: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names of the categories that the features make, in the order of their values, and that of each prompt, (P,) int32.

    Raises:
        ConfigurationError: if the prompts have no such field.
    """
    names: list[tuple[str, ...]] = [()]
    codes = np.zeros(len(prompts), dtype=np.int64)
    for feature in features:
        if feature not in prompts.columns:
            known = ", ".join(prompts.columns) or "none"
            raise ConfigurationError(f"sec.features: the prompts have no field {feature!r}; they have: {known}")
        column = prompts.columns[feature]
        values = column.cpu().numpy() if isinstance(column, Tensor) else np.asarray([str(value) for value in column])
        own, inverse = np.unique(values, return_inverse=True)
        used, codes = np.unique(codes * len(own) + inverse, return_inverse=True)
        names = [(*names[code // len(own)], str(own[code % len(own)])) for code in used.tolist()]
    return ["-".join(parts) for parts in names], torch.from_numpy(codes).int()


def fingerprint(prompts: Prompts) -> int:
    """A number that changes with the prompts and their order."""
    return int((prompts.keys * torch.arange(1, len(prompts) + 1)).sum())


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """The category of each slot, (M,) int64: how many cumulative sums of p (C,) are at most its number in [0, 1) (M,)."""
    return torch.searchsorted(p.cumsum(0), uniform, right=True).clamp(max=len(p) - 1)


def shuffled(members: Tensor, source: torch.Generator) -> Tensor:
    """The positions at which `members` (P,) is true, in random order."""
    places = members.nonzero().flatten()
    return places[torch.randperm(len(places), generator=source)]


def ranks(arms: Tensor) -> Tensor:
    """How many slots of the same category stand before each slot, (M,) int64."""
    order = torch.argsort(arms, stable=True)
    counts = torch.bincount(arms)
    rank = torch.empty_like(arms)
    rank[order] = torch.arange(len(arms)) - (counts.cumsum(0) - counts)[arms[order]]
    return rank


def mean_size(advantages: Tensor, mask: Tensor) -> Tensor:
    """u = sum_t m_t |A_t| / sum_t m_t, (B, 1)."""
    return ops.masked_mean(advantages.abs(), mask)


def update(Q: Tensor, r: Tensor, alpha: float, seen: Tensor | None = None) -> Tensor:
    """Q <- (1 - alpha) Q + alpha r, (C,); where `seen` (C,) is false, Q stays."""
    new = (1 - alpha) * Q + alpha * r
    return new if seen is None else torch.where(seen, new, Q)
