"""Scaf-GRPO: Scaffolded Group Relative Policy Optimization (arXiv 2510.19807).

Trigger, levels, choice of the row and its place as in the official code, dvlab-research/Scaf-GRPO,
`hint_mix_grpo/trainer/ray_trainer.py`; the third tier and the sequential search from the paper. Level e = 1, 2, ... shows
the first ((e - 1) mod 4) + 1 parts of the ceil(e / 4)-th tier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError
from rlplugins.needs import Need
from rlplugins.rollouts import POLICY, Column, Prompts, Requests, Rollouts, concatenate, exchanged, take
from rlplugins.services import Engine
from rlplugins.steps import Run, Step

KIND = "hinted"
PARTS = 4
TIERS = {
    "knowledge": ("knowledge_components_parts", "Knowledge Hints"),
    "planning": ("planning_skeleton_parts", "Planning Hints"),
    "solution": ("solution_breakdown_parts", "Solution Hints"),
}
"""Column of the prompt file and label in the prompt of each tier."""

Tier = Literal["knowledge", "planning", "solution"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ScafGrpo(Plugin):
    """Retries prompts that every response failed with hints, and trains on the success that took the least help.

    Scaf-GRPO (arXiv 2510.19807): the hinted response takes the place of a failed one, under the prompt it was drawn for.
    """

    name = "scaf-grpo"
    kinds = frozenset({KIND})
    breaks = frozenset({"whole_groups", "complete_groups"})

    tiers: tuple[Tier, ...] = ("knowledge", "planning", "solution")
    """Kinds of hints, from the least help to the most; the released code has no planning."""
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps at the start without help (authors' script)."""
    warmup_share: Fraction | None = None
    """The same as a share of the run's steps, instead of `warmup`; the paper has 0.15."""
    plateau_window: Annotated[int, Field(ge=1)] | None = None
    """Instead of a warm-up, help begins when progress without it has stalled for so many steps (see `plateau_rate`)."""
    plateau_rate: Fraction = 0.02
    """Progress has stalled if less than this share of the prompts that failed at their last visit is solved now."""
    fail_threshold: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """A response has failed if its score is not above this."""
    search: Literal["parallel", "sequential"] = "parallel"
    """Draw all levels of hints at once (released), or the next only if the one before has failed (paper)."""
    replace: Literal["first", "random"] = "first"
    """Which response of the group makes room: the first (released), or one at random (paper)."""
    replace_num: Literal[1, 2] = 1
    """2: the hinted response enters twice, first after the bare prompt, then after the hinted one (6+1+1 at 8)."""
    replace_hint_prompt: bool = False
    """Put the hinted response after the bare prompt, for which it was not drawn (ablation)."""
    template: str = "Question: {question}\n{label}: {hint}"
    """Text of the hinted prompt, or of its last message by the user."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """An engine, groups, and the hints of every tier."""
        return (needs.ENGINE, needs.group_size(at_least=2), *(needs.column(TIERS[tier][0]) for tier in self.tiers))

    @model_validator(mode="after")
    def _check(self) -> ScafGrpo:
        if not self.tiers or len(set(self.tiers)) < len(self.tiers):
            raise ValueError("tiers must name at least one tier, and none twice")
        if self.warmup_share is not None and self.plateau_window is not None:
            raise ValueError("give warmup_share or plateau_window, not both")
        if self.replace_num == 2 and self.replace_hint_prompt:
            raise ValueError("replace_num 2 has a row after either prompt: leave out replace_hint_prompt")
        try:
            without = self.template.format(question="", label="", hint="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"template takes {{question}}, {{label}} and {{hint}} only: {error!r}") from None
        if len(self.template.format(question="q", label="", hint="h")) < len(without) + 2:
            raise ValueError("template must hold {question} and {hint}")
        return self

    def init_state(self, run: Run) -> dict[str, Any]:
        """With `plateau_window`: prompts solved and tried in the last steps; per prompt whether it failed last."""
        if self.plateau_window is None:
            return {}
        run.table.add_column("failed", torch.bool)
        return {"recent": [], "stalled": False}

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine, step: Step, log: Any) -> Rollouts:
        """Exchange a row of every group that failed for the success with the least help."""
        drawn, failed = attempts(rollouts, self.fail_threshold)
        helping = self._helps(rollouts.prompt_rows[drawn].cpu(), failed[drawn].cpu(), step)
        log("failed", failed.sum() / drawn.sum().clamp(min=1))
        log("helping", float(helping))
        if not helping or not bool(failed.any()):
            return rollouts
        number, count = ops.dense_groups(torch.where(failed, rollouts.groups, -1))
        first = (failed & (places(number) == 0)).nonzero().flatten()
        hints = Hints.of([take(rollouts[TIERS[tier][0]], first) for tier in self.tiers], self.tiers)
        tried = self._search(hints, prompts.select(prompts.positions(rollouts.prompt_rows[first])), engine)
        self._log(tried, count, log)
        found = [part for part in tried if len(part.prompt)]
        return self._exchanged(rollouts, failed, number, Found.of(found), step) if found else rollouts

    def _helps(self, rows: Tensor, failed: Tensor, step: Step) -> bool:
        """Whether the time without help is over; `rows` (N,) of the prompt table and which of them have failed."""
        if self.plateau_window is not None:
            return self._stalled(rows[rows >= 0], failed[rows >= 0], self.plateau_window)
        return step.progress >= self.warmup_share if self.warmup_share is not None else step.number >= self.warmup

    def _stalled(self, rows: Tensor, failed: Tensor, window: int) -> bool:
        """Whether, now or before, too few were solved of the prompts that had failed; notes which of them fail now."""
        again = self.table["failed"][rows]
        solved, tried = len(rows[again & ~failed].unique()), len(rows[again].unique())
        self.state.recent = [*self.state.recent, [solved, tried]][-window:]
        self.table["failed"][rows] = failed
        solved, tried = (sum(column) for column in zip(*self.state.recent, strict=True))
        if len(self.state.recent) == window and solved < self.plateau_rate * tried:
            self.state.stalled = True
        return bool(self.state.stalled)

    def _search(self, hints: Hints, prompts: Prompts, engine: Engine) -> list[Found]:
        """For each of the failed prompts that can be solved with a hint the success with the least of it."""
        every = torch.arange(1, PARTS * len(self.tiers) + 1)
        solved = torch.zeros(len(prompts), dtype=torch.bool)
        parts = []
        for levels in [every] if self.search == "parallel" else every.split(1):
            asked = (torch.isin(hints.level, levels) & ~solved[hints.prompt]).nonzero().flatten()
            if len(asked):
                parts.append(self._drawn(hints.take(asked), prompts, engine))
                solved[parts[-1].prompt] = True
        return parts

    def _drawn(self, hints: Hints, prompts: Prompts, engine: Engine) -> Found:
        """One response with each hint; the first success of each prompt is kept."""
        asked, counts = torch.unique_consecutive(hints.prompt, return_counts=True)
        requests = Requests.of(prompts.select(asked), counts)
        texts = [with_hint(text, *hint, self.template) for text, hint in zip(requests.texts, hints.texts, strict=True)]
        drawn = engine.generate(replace(requests, texts=texts))
        successes = (drawn.scores.flatten() > self.fail_threshold).cpu().nonzero().flatten()
        none = torch.full((len(asked),), len(hints.texts))
        best = none.scatter_reduce(0, requests.prompt[successes], successes, "amin")
        best = best[best < len(hints.texts)]
        return Found(drawn.select(best), hints.prompt[best], hints.level[best], len(hints.texts))

    def _exchanged(self, rollouts: Rollouts, failed: Tensor, number: Tensor, found: Found, step: Step) -> Rollouts:
        """The rollouts with what was found in the place of `replace_num` failed rows of its group."""
        keys = torch.rand(len(number), generator=step.generator(self)) if self.replace == "random" else None
        place = places(number, keys)
        of_prompt = torch.full((int(number.max()) + 1,), -1)
        of_prompt[found.prompt] = torch.arange(len(found.prompt))
        source = torch.where(failed & (place < self.replace_num), of_prompt.to(number.device)[number], -1)
        rows = (source >= 0).nonzero().flatten()
        bare = (place[rows] == 0) & (self.replace_hint_prompt or self.replace_num == 2)
        hinted = after_bare_prompts(rollouts, rows, found.rollouts.select(source[rows]), bare)
        return exchanged(rollouts, rows, hinted, KIND)

    def _log(self, tried: Sequence[Found], failed: int, log: Any) -> None:
        """Where help was given and which tier it took."""
        levels = torch.cat([part.level for part in tried]) if tried else torch.zeros(0)
        log("drawn", sum(part.drawn for part in tried))
        log("helped", len(levels) / failed)
        for place, tier in enumerate(self.tiers):
            if len(levels):
                log(f"helped_by/{tier}", ((levels - 1) // PARTS == place).float().mean())


@dataclass(frozen=True)
class Hints:
    """The hints for some prompts, in the order of prompt and level.

    Attributes:
        prompt: (n,) int64, which of the prompts.
        level: (n,) int64, from 1.
        texts: label and text of each.
    """

    prompt: Tensor
    level: Tensor
    texts: list[tuple[str, str]]

    @classmethod
    def of(cls, columns: Sequence[Column], tiers: Sequence[str]) -> Hints:
        """All levels that the parts of each tier (one column per tier, one entry per prompt) can give."""
        found = [
            (prompt, PARTS * place + shown, (TIERS[tier][1], " ".join(parts[:shown])))
            for prompt, entries in enumerate(zip(*columns, strict=True))
            for place, tier in enumerate(tiers)
            for parts in [parts_of(entries[place], TIERS[tier][0])]
            for shown in range(1, len(parts) + 1)
        ]
        numbers = torch.tensor([item[:2] for item in found], dtype=torch.int64).view(-1, 2)
        return cls(numbers[:, 0], numbers[:, 1], [item[2] for item in found])

    def take(self, index: Tensor) -> Hints:
        """Those at positions `index` (int64)."""
        return Hints(self.prompt[index], self.level[index], [self.texts[row] for row in index.tolist()])


@dataclass(frozen=True)
class Found:
    """Successes with the least help.

    Attributes:
        rollouts: n responses, each under its hinted prompt.
        prompt: (n,) int64, which of the failed prompts.
        level: (n,) int64, of the hint.
        drawn: responses that were drawn to find them.
    """

    rollouts: Rollouts
    prompt: Tensor
    level: Tensor
    drawn: int

    @classmethod
    def of(cls, parts: Sequence[Found]) -> Found:
        """All of them."""
        prompt, level = (torch.cat([getattr(part, name) for part in parts]) for name in ("prompt", "level"))
        return cls(concatenate([part.rollouts for part in parts]), prompt, level, sum(part.drawn for part in parts))


def attempts(rollouts: Rollouts, threshold: float) -> tuple[Tensor, Tensor]:
    """The rows that the policy drew for a prompt of the step, and those of them whose whole group failed, (B,) bool each.

    A row without a score has failed. Prompts outside of the pool cannot be asked again and are left out of the second.
    """
    drawn = rollouts.of_kind(POLICY) & (rollouts.groups >= 0)
    solved = ops.group_extreme((rollouts.scores > threshold).float(), rollouts.groups).flatten() > 0
    return drawn, drawn & ~solved & (rollouts.prompt_rows >= 0)


def places(groups: Tensor, keys: Tensor | None = None) -> Tensor:
    """Place of each row in its group, 0, 1, ..., (B,) int64: by the keys (B,), else in the order of the rows."""
    rows = torch.arange(len(groups), device=groups.device)
    order = rows if keys is None else torch.argsort(keys.to(groups.device))
    order = order[torch.argsort(groups[order], stable=True)]
    ordered = groups[order]
    return torch.empty_like(groups).scatter_(0, order, rows - torch.searchsorted(ordered, ordered))


def after_bare_prompts(rollouts: Rollouts, rows: Tensor, hinted: Rollouts, bare: Tensor) -> Rollouts:
    """The hinted rows (n), of which those in `bare` (n,) bool stand after the prompt of the row that they replace."""
    prompts = [
        rollouts.prompts[row] if kept else own
        for row, kept, own in zip(rows.tolist(), bare.tolist(), hinted.prompts, strict=True)
    ]
    return replace(hinted.unguarded(), prompts=prompts)


def parts_of(entry: Any, column: str) -> list[str]:
    """The parts of a tier's hint; none where the prompt has none.

    Raises:
        ConfigurationError: if it is not a list of at most four texts.
    """
    if entry is None:
        return []
    parts: list[Any] = [entry] if isinstance(entry, Tensor) else list(entry)
    if isinstance(entry, str) or len(parts) > PARTS or not all(isinstance(part, str) for part in parts):
        raise ConfigurationError(
            f"scaf-grpo: the column {column!r} must hold at most {PARTS} texts per prompt, got {entry!r}"
        )
    return parts


def with_hint(text: Any, label: str, hint: str, template: str) -> Any:
    """The prompt with a hint: a text, or chat messages of which the last one by the user is changed.

    Raises:
        ConfigurationError: if there is no message by the user that is a text.
    """
    if isinstance(text, str):
        return template.format(question=text, label=label, hint=hint)
    messages = list(text)
    asked = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not asked or not isinstance(messages[asked[-1]]["content"], str):
        raise ConfigurationError(f"scaf-grpo: a hint needs a message by the user that is a text, got {text!r}")
    last = messages[asked[-1]]
    messages[asked[-1]] = {**last, "content": with_hint(last["content"], label, hint, template)}
    return messages
