"""SPO: Single-stream Policy Optimization (Xu and Ding, 2025; arXiv 2509.13232).

Constants and order of operations as in the official code, verl-project/verl-recipe, `spo/spo_ray_trainer.py`. For a
prompt x with counters alpha and beta: N = alpha + beta, v = alpha / N.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import one_group
from rlplugins.errors import ConfigurationError, HookError
from rlplugins.rollouts import POLICY, Column, Prompts, Rollouts, take
from rlplugins.services import Engine
from rlplugins.steps import Run, generator

STD_EPS = 1e-8
ROUNDING = 1e-6  # a spread of a = r - v that is smaller, relative to r and v, is float32 rounding: all a are equal
UNSEEN = 0.5  # alpha, beta and v of a prompt that nothing is known about

Forgetting = Annotated[float, Field(gt=0, le=1)]


class Spo(Plugin):
    """One response per prompt, with a remembered and slowly forgotten success rate of the prompt as its baseline.

    Single-stream Policy Optimization (arXiv 2509.13232).
    """

    name = "spo"
    breaks = frozenset({"reward_scale"})

    D_half: Annotated[float, Field(gt=0)] = 0.06
    """Drift at which the memory of a prompt is halved, in nats per token."""
    rho_type: Literal["kl", "constant"] = "kl"
    """`kl`: forget by the policy's drift since the prompt's last visit; `constant`: by `rho`, without an engine."""
    rho_min: Forgetting = 0.875
    """Smallest factor on the counters at a visit; 1 / (1 - rho_min) is the weight of the offline scores."""
    rho_max: Forgetting = 0.96
    """Largest factor on the counters at a visit."""
    rho: Forgetting = 0.875
    """The factor if `rho_type` is `constant`."""
    epsilon: Annotated[float, Field(ge=0)] = 0.05
    """Added to every prompt's sampling weight, so that none is given up."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Exponent of N in the sampling weight; above 0 prompts that little is known about come more often."""
    tracker: Literal["beta", "mean"] = "beta"
    """`beta`: counters alpha and beta, for rewards in [0, 1]; `mean`: running mean and variance, for any rewards."""
    offline: str | None = None
    """Scores of the initial policy: a field of the prompt file, a list each, or a `.json` file of lists by prompt."""
    n0: Annotated[int, Field(ge=0)] = 8
    """At most so many offline scores of a prompt are used, drawn at random if there are more."""
    half_counts: bool = True
    """Start from (S + 1/2) / (n0 + 1), as released; False: from the offline success rate S / n0 itself, as in the paper."""

    @model_validator(mode="after")
    def _check_rho(self) -> Spo:
        if self.rho_min > self.rho_max:
            raise ValueError(f"rho_min {self.rho_min:g} is above rho_max {self.rho_max:g}")
        if self.offline is not None and self.rho_min == 1:
            raise ValueError("rho_min must be below 1 with offline scores, whose weight is 1 / (1 - rho_min)")
        return self

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """One response per prompt; an engine to measure drift; the column of the offline scores."""
        engine = (needs.ENGINE,) if self.rho_type == "kl" else ()
        column = (needs.column(self.offline),) if self.offline and not _is_file(self.offline) else ()
        return (needs.group_size(exactly=1), *engine, *column)

    @property
    def assumes(self) -> frozenset[str]:
        """Counters of successes are for rewards in [0, 1] only."""
        unit = {"unit_rewards"} if self.tracker == "beta" else set()
        return frozenset({"response_rewards"} | unit)

    def init_state(self, run: Run) -> dict[str, Any]:
        """Counters (or running mean, variance and N) of each prompt; its last response, to measure drift on."""
        if self.tracker == "beta":
            run.table.add_column("alpha", torch.float32, UNSEEN)
            run.table.add_column("beta", torch.float32, UNSEEN)
        else:
            run.table.add_column("value", torch.float32, UNSEEN)
            run.table.add_column("variance", torch.float32, UNSEEN * (1 - UNSEEN))
            run.table.add_column("N", torch.float32, 2 * UNSEEN)
        if self.rho_type == "kl":
            run.table.add_ragged("response", torch.int32)
            run.table.add_ragged("mask", torch.bool)
            run.table.add_ragged("log_probs", torch.float32)
        if self.offline is not None and self.n0 > 0:
            self._start(run)
        return {}

    # prompts

    @hookimpl
    def prompt_weights(self, prompts: Prompts) -> Tensor:
        _, variance, N = self.estimate(prompts.rows)
        return sampling_weight(variance, N, self.gamma, self.epsilon)

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts) -> Tensor:
        return torch.ones(len(prompts), dtype=torch.int64)

    # credit: A = (a - mean a) / (std a + 1e-8), a = r - v

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor, rollouts: Rollouts) -> Tensor:
        v = self.baseline_value(rewards, rollouts)
        return (v + ops.group_mean(rewards - v, one_group(groups))).to(rewards.dtype)

    @hookimpl
    def advantage_scale(self, rewards: Tensor, groups: Tensor, rollouts: Rollouts) -> Tensor:
        v = self.baseline_value(rewards, rollouts)
        std = ops.group_std(rewards - v, one_group(groups))
        size = torch.maximum(rewards.abs(), v.abs())[groups >= 0]
        alike = std <= ROUNDING * (size.max() if len(size) else 0.0)
        return torch.where(alike, 0.0, std + STD_EPS).to(rewards.dtype)  # a scale of 0 gives advantage 0

    def baseline_value(self, rewards: Tensor, rollouts: Rollouts) -> Tensor:
        """v of each row's prompt before this step's update, (B, 1) float64 on the rewards' device."""
        rows = rollouts.prompt_rows.cpu()
        v = torch.where(rows >= 0, self.estimate(rows.clamp(min=0))[0], UNSEEN)
        return v[:, None].to(rewards.device)

    # life

    @hookimpl
    def on_step_end(
        self, rewards: Tensor, groups: Tensor, rollouts: Rollouts, engine: Engine, log: Callable[..., None]
    ) -> None:
        rows = rollouts.prompt_rows.cpu()
        counted = ((groups >= 0) & rollouts.of_kind(POLICY)).cpu() & (rows >= 0)
        last = last_visits(rows, counted)
        if not len(last):
            return
        visited, rows = rollouts.select(last), rows[last]
        r = take(rewards, last).flatten().cpu().double()
        log("value_error", (r - self.estimate(rows)[0]).square().mean(), len(last))
        rho = self._forgetting(visited, rows, engine, log)
        self._update(rows, rho, r)
        if self.rho_type == "kl":
            self._store(visited, rows, engine)
        log("rho", rho.mean(), len(last))
        log("value", self.estimate(rows)[0].mean(), len(last))
        log("N", self.estimate(rows)[2].mean(), len(last))

    def _forgetting(self, visited: Rollouts, rows: Tensor, engine: Engine, log: Callable[..., None]) -> Tensor:
        """The factor rho of each prompt, (M,) float64; `rho_max` at a first visit."""
        if self.rho_type == "constant":
            return torch.full((len(rows),), self.rho, dtype=torch.float64)
        tokens, extent = self.table.ragged("response").read(rows)
        known = extent.any(1)
        D = torch.zeros(len(rows), dtype=torch.float64)
        if bool(known.any()):
            stored, _ = self.table.ragged("log_probs").read(rows[known])
            mask, _ = self.table.ragged("mask").read(rows[known])
            places = known.nonzero().flatten()
            now = self._log_probs(engine, take(visited.prompts, places), tokens[known].long(), mask)
            D[known] = drift(stored, now.cpu(), mask)
            log("drift", D[known].mean(), len(places))
        return forgetting(D, self.D_half, self.rho_min, self.rho_max)

    def _store(self, visited: Rollouts, rows: Tensor, engine: Engine) -> None:
        """Replace the stored responses by this step's, up to the last token of the policy's own."""
        mask = visited.mask.bool()
        now = self._log_probs(engine, visited.prompts, visited.responses, mask)
        positions = torch.arange(mask.shape[1], device=mask.device)
        extent = (positions <= ops.last_token(mask)) & mask.any(1, keepdim=True)
        self.table.ragged("response").write(rows, visited.responses, extent)
        self.table.ragged("mask").write(rows, mask, extent)
        self.table.ragged("log_probs").write(rows, now.to(extent.device), extent)

    def _log_probs(self, engine: Engine, prompts: Any, responses: Tensor, mask: Tensor) -> Tensor:
        log_probs = engine.log_probs(prompts, responses, mask)
        if not bool(log_probs.isfinite().all()):
            raise HookError(self.name, "on_step_end", "the engine gave NaN or infinite log-probs for a response")
        return log_probs

    # what is remembered

    def estimate(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v, the variance of the reward about it, and N of the prompts `rows` (M,): (M,) float64 each."""
        if self.tracker == "mean":
            v, variance, N = (self.table[name][rows].double() for name in ("value", "variance", "N"))
            return v, variance, N
        alpha, beta = self.table["alpha"][rows].double(), self.table["beta"][rows].double()
        v = alpha / (alpha + beta)
        return v, v * (1 - v), alpha + beta

    def _update(self, rows: Tensor, rho: Tensor, r: Tensor) -> None:
        """Forget by rho and count r; each of `rows` (M,) once."""
        if self.tracker == "beta":
            alpha, beta = self.table["alpha"][rows].double(), self.table["beta"][rows].double()
            self._write(rows, update(alpha, beta, rho, r))
        else:
            self._write(rows, update_mean(*self.estimate(rows), rho, r))

    def _write(self, rows: Tensor, values: Sequence[Tensor]) -> None:
        names = ("alpha", "beta") if self.tracker == "beta" else ("value", "variance", "N")
        for name, column in zip(names, values, strict=True):
            self.table[name][rows] = column.to(torch.float32)

    def _start(self, run: Run) -> None:
        """Counters from the offline scores."""
        assert self.offline is not None
        scores, owner = offline_scores(self.offline, run.pool)
        if self.tracker == "beta":
            scores = (scores > 0).double()
        kept = draw(owner, self.n0, generator(run.seed, self.name, "offline"))
        scores, owner = scores[kept], owner[kept]
        n0 = torch.bincount(owner, minlength=len(run.pool))
        total = torch.bincount(owner, scores, minlength=len(run.pool))
        squares = torch.bincount(owner, scores.square(), minlength=len(run.pool))
        known, half = n0 > 0, 0.5 * self.half_counts
        if self.tracker == "beta":
            self._write(run.pool.rows[known], start(total[known], n0[known], self.rho_min, half))
        else:
            self._write(run.pool.rows[known], start_mean(total[known], squares[known], n0[known], self.rho_min, half))


def sampling_weight(variance: Tensor, N: Tensor, gamma: float = 0.0, epsilon: float = 0.05) -> Tensor:
    """w = sqrt(v (1 - v)) / N^gamma + eps, (P,), from the variance v (1 - v)."""
    return variance.clamp(min=0).sqrt() / N**gamma + epsilon


def drift(stored_log_probs: Tensor, current_log_probs: Tensor, mask: Tensor) -> Tensor:
    """D: mean absolute change of the log-probs (M, T) over each row's mask, (M,) float64; 0 for an empty row."""
    return ops.masked_mean((stored_log_probs.double() - current_log_probs.double()).abs(), mask).flatten()


def forgetting(drift: Tensor, D_half: float = 0.06, rho_min: float = 0.875, rho_max: float = 0.96) -> Tensor:
    """rho = clip(2^(-D / D_half), rho_min, rho_max), (M,)."""
    return torch.exp2(-drift / D_half).clamp(rho_min, rho_max)


def update(alpha: Tensor, beta: Tensor, rho: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """alpha <- rho alpha + r, beta <- rho beta + (1 - r), (M,) each."""
    return rho * alpha + rewards, rho * beta + (1 - rewards)


def update_mean(v: Tensor, variance: Tensor, N: Tensor, rho: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v <- v + eta (r - v) with eta = 1 / (rho N + 1), the variance with the same weights, and N <- rho N + 1."""
    eta = 1 / (rho * N + 1)
    error = rewards - v
    return v + eta * error, (1 - eta) * (variance + eta * error.square()), 1 / eta


def start(successes: Tensor, n0: Tensor | int, rho_min: float = 0.875, half: float = 0.5) -> tuple[Tensor, Tensor]:
    """alpha0 = N0 (S + half) / (n0 + 2 half), beta0 = N0 - alpha0, N0 = 1 / (1 - rho_min), (M,) each."""
    share = 1 / (1 - rho_min) / (n0 + 2 * half)
    return share * (successes + half), share * (n0 - successes + half)


def start_mean(
    total: Tensor, squares: Tensor, n0: Tensor | int, rho_min: float = 0.875, half: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """v0, variance and N0 from the sums of n0 scores and of their squares, (M,) each: `start` for any scores."""
    v = (total + half) / (n0 + 2 * half)
    return v, ((squares + half) / (n0 + 2 * half) - v.square()).clamp(min=0), torch.full_like(v, 1 / (1 - rho_min))


def last_visits(rows: Tensor, counted: Tensor) -> Tensor:
    """Positions of the last counted occurrence of each prompt of `rows` (B,), ascending."""
    places = counted.nonzero().flatten()
    unique, inverse = torch.unique(rows[places], return_inverse=True)
    return places.new_zeros(len(unique)).scatter_reduce(0, inverse, places, "amax").sort().values


def draw(owner: Tensor, count: int, source: torch.Generator) -> Tensor:
    """At most `count` random positions of each owner in `owner` (S,), which is sorted."""
    order = torch.randperm(len(owner), generator=source)
    order = order[torch.argsort(owner[order], stable=True)]
    sizes = torch.bincount(owner)
    rank = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
    return order[rank < count]


def offline_scores(source: str, pool: Prompts) -> tuple[Tensor, Tensor]:
    """The finite scores (S,) float64 of a column of the pool or a JSON file, and each one's position in the pool (S,).

    Raises:
        ConfigurationError: if the file or the column is missing, or holds something else than lists of numbers.
    """
    lists = _from_file(Path(source), pool) if _is_file(source) else _from_column(source, pool)
    lists = [[] if scores is None else scores for scores in (lists.tolist() if isinstance(lists, Tensor) else lists)]
    if not all(isinstance(scores, list) and all(map(_is_score, scores)) for scores in lists):
        raise ConfigurationError(f"spo.offline: {source} must hold one list of scores per prompt")
    flat = torch.tensor(
        [torch.nan if score is None else score for scores in lists for score in scores], dtype=torch.float64
    )
    owner = torch.repeat_interleave(torch.arange(len(lists)), torch.tensor([len(scores) for scores in lists]))
    finite = flat.isfinite()
    return flat[finite], owner[finite]


def _is_score(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _is_file(source: str) -> bool:
    return source.endswith(".json")


def _from_column(name: str, pool: Prompts) -> Column:
    if name not in pool.columns:
        known = ", ".join(pool.columns) or "none"
        raise ConfigurationError(f"spo.offline: the prompts have no field {name!r}; they have: {known}")
    return pool.columns[name]


def _from_file(path: Path, pool: Prompts) -> list[Any]:
    """Scores by the prompt's id, or by its text (of a chat: the first user message) without surrounding blanks."""
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"spo.offline: {path} cannot be read: {error}") from None
    if not isinstance(scores, Mapping):
        raise ConfigurationError(f"spo.offline: {path} must map prompts to lists of scores")
    scores = {name.strip(): values for name, values in scores.items()}
    ids = pool.columns.get("id", [None] * len(pool))
    names = [_text(text) if name is None else str(name) for name, text in zip(ids, pool.texts, strict=True)]
    found = [scores.get(name.strip()) for name in names]
    if all(values is None for values in found):
        raise ConfigurationError(f"spo.offline: {path} names none of the {len(pool)} prompts")
    return found


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(next((message["content"] for message in prompt if message["role"] == "user"), prompt[0]["content"]))
