"""SPO: Segment Policy Optimization (Guo et al. 2025, arXiv 2505.23564), as a chain and as a tree.

Cuts, values, masks and the buffer as in the official code, AIFrameResearch/SPO, `src/treetune`: for the chain
`episode_generators/math_episode_generator_with_mc_advantages.py`, for the tree
`inference_strategies/hybrid_inference_strategy.py` and `episode_generators/hybrid_episode_generator.py`, for both
`trainers/ppo_trainer.py`. Not the SPO of arXiv 2509.13232.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import clipped_loss
from rlplugins.hookspecs import Log
from rlplugins.rollouts import (
    POLICY,
    Column,
    Columns,
    Prompts,
    Requests,
    Rollouts,
    Sampling,
    completed,
    concatenate,
    take,
)  # fmt: skip
from rlplugins.services import Engine
from rlplugins.steps import Run, Step
from rlplugins.update import Batch, probability_ratio

KIND = "node"
EPS = 1e-8  # added to the variance in the whitening, and to sd(parent)
ROUNDING = 1e-6  # a V this near to that of its parent, relative to the largest of its siblings, equals it
STARTS, VALUES = "segment_po_starts", "segment_po_values"
PARENT = "segment_po_parent"
ADVANTAGE, LOG_PROBS = "segment_po_advantage", "segment_po_log_probs"
FIELDS = ("prompt_keys", "prompt_rows", "responses", "mask", "scores", "version")

Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0)]

Edges: TypeAlias = dict[str, Tensor]
"""E edges, one entry each: `FIELDS` of their rows, `context` and `context_size`, advantage and old log-probs, the `step` in
which they were drawn, and their `place` among that step's rows (-1: none, or not this step)."""


class SegmentPo(Plugin):
    """Credits each segment of a response with what it changes in the mean reward of continuations from there.

    Segment Policy Optimization (arXiv 2505.23564). SPO-chain continues every response several times from some of its
    tokens; SPO-tree lets responses branch, so that a tree of them values itself. Only tokens that the policy was unsure of
    are trained.
    """

    name = "segment-po"
    kinds = frozenset({KIND})

    mode: Literal["chain", "tree"] = "chain"
    """`chain`: value the cuts of each response by fresh continuations; `tree`: draw trees, whose branches value each other."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """A token is unsure if its probability is below this; cuts are made before such tokens."""
    probability_mask: bool = True
    """Train unsure tokens only; False: all of them."""
    whiten: bool = True
    """Bring the advantages of the step's trained tokens to mean 0 and variance 1."""
    kl: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Factor on the divergence from the reference (k3), a sum over each row; 0: the trainer's own setting holds."""
    end_tokens: list[TokenId] | None = None
    """Token ids that end a response; None: the tokenizer's end token. One that stops at its limit otherwise was cut."""
    interval: Count = 5
    """Chain: n, every so many unsure tokens a new segment begins; 1: with each of them."""
    continuations: Count = 9
    """Chain: K, how often a response is continued from each cut; the authors take 4 where responses are long."""
    cut_score: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Chain: score of a response or continuation that the length limit cut."""
    branch: tuple[Count, ...] = (6, 6, 6)
    """Tree: children of the prompt and of the unfinished nodes of each level."""
    segment_length: Count = 100
    """Tree: M, most tokens of a node above the last level; the authors take 30, 100 or 600."""
    method: Literal["plain", "normalised"] = "plain"
    """Tree: the advantage is the value minus the parent's, or that divided by the deviation of the siblings' values."""
    buffer_steps: Count | None = None
    """Tree: keep edges for so many steps and train some of them in each (released: 8); None: all at once, without a buffer."""
    buffer_edges: Count = 32
    """Tree: most edges of a prompt that are taken from the buffer in a step."""

    @model_validator(mode="after")
    def _check(self) -> SegmentPo:
        if not self.branch or self.branch[0] < 2:
            raise ValueError(f"branch must begin with 2 or more responses to compare, got {list(self.branch)}")
        if self.buffer_steps is not None and self.mode == "chain":
            raise ValueError("buffer_steps is for the tree: leave it out, or write `mode: tree`")
        return self

    @property
    def tree(self) -> bool:
        """Whether responses branch."""
        return self.mode == "tree"

    @property
    def buffered(self) -> bool:
        """Whether edges wait in a buffer."""
        return self.buffer_steps is not None

    @property
    def uses(self) -> dict[str, str]:
        """The mean over trained tokens; no other penalty beside the own; V(parent) as the mean of the siblings."""
        found = {"reduce_loss": "token_mean"}
        if self.kl:
            found |= {"kl_penalty": "none"}
        if self.tree and not self.buffered:
            found |= {"baseline": "group_mean"}
            found |= {"advantage_scale": "one"} if self.method == "plain" else {}
        return found

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """An engine that continues responses; siblings in a tree; the reference's log-probs for the divergence."""
        siblings = (needs.group_size(at_least=self.branch[0]),) if self.tree else ()
        return (needs.ENGINE, needs.RESPONSE_PREFIX, *siblings, *([needs.column("ref_log_probs")] if self.kl else []))

    @property
    def assumes(self) -> frozenset[str]:
        """One reward at the end of a response; V(parent) is the mean of all children."""
        return frozenset({"response_rewards"} | ({"complete_groups"} if self.tree and not self.buffered else set()))

    @property
    def breaks(self) -> frozenset[str]:
        """Whitening; groups of siblings, some of which are not trained or wait."""
        scale = {"absolute_advantages", "reward_scale"} if self.whiten else set()
        scale |= {"reward_scale"} if self.tree and self.method == "normalised" else set()
        groups = {"equal_groups", "whole_groups"} if self.tree else set()
        return frozenset(scale | groups | ({"complete_groups"} if self.buffered else set()))

    def init_state(self, run: Run) -> dict[str, Any]:
        """The tokens that end a response; with `buffer_steps` the edges that wait."""
        ends = self.end_tokens
        if ends is None:
            ends = [] if run.tokenizer is None or run.tokenizer.eos_token_id is None else [run.tokenizer.eos_token_id]
        return {"end_tokens": torch.tensor(ends, dtype=torch.int64), **({"buffer": {}} if self.buffered else {})}

    # responses

    @hookimpl(when=lambda self: self.tree)
    def allocate_rollouts(self, prompts: Prompts) -> Tensor:
        """The prompt's children."""
        return torch.full((len(prompts),), self.branch[0])

    @hookimpl(when=lambda self: self.tree and len(self.branch) > 1)
    def sampling_params(self, sampling: Sampling) -> Sampling:
        """At most M tokens above the last level."""
        return replace(sampling, max_tokens=sampling.max_tokens.clamp(max=self.segment_length))

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, prompts: Prompts, engine: Engine, step: Step, log: Log) -> Rollouts:
        """Values of the cuts, as columns; or the deeper levels of the trees, as rows."""
        if not len(rollouts):
            return rollouts
        if not self.tree:
            return self._with_values(rollouts, prompts, engine, log)
        whole, parent = self._trees(rollouts.unguarded(), prompts, engine)
        log("nodes", len(whole) - len(rollouts))
        if not self.buffered:
            return with_columns(whole, {PARENT: parent})
        return self._from_buffer(rollouts.unguarded(), whole, parent, prompts, engine, step, log)

    # chain

    def _with_values(self, rollouts: Rollouts, prompts: Prompts, engine: Engine, log: Log) -> Rollouts:
        """The rollouts with the segments' starts and the value at each; responses that were cut with their score."""
        own = drawn_from_pool(rollouts, rollouts.groups)
        limits = engine.sampling(len(rollouts)).max_tokens
        cut = own & unfinished(rollouts, limits, self.state.end_tokens)
        scores = torch.where(cut[:, None], self.cut_score, rollouts.scores)
        row, token = self._cuts(rollouts, own, engine)
        values = self._values(rollouts, row, token, prompts, engine, log)
        valued = values.isfinite()
        starts, before = by_row(row[valued], token[valued] + 1, values[valued], len(rollouts))
        columns = {STARTS: starts.to(own.device), VALUES: before.to(own.device)}
        return with_columns(replace(rollouts.unguarded(), scores=scores), columns)

    def _cuts(self, rollouts: Rollouts, own: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
        """Row and place of each unsure token before which a response is cut, (n,) int64 each, on the CPU."""
        rows = own.nonzero().flatten()
        if not len(rows):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        part = rollouts.select(rows)
        token_prob = engine.log_probs(part.prompts, part.responses, part.mask.bool()).exp().cpu()
        row, token = segment_starts(token_prob, part.mask.bool().cpu(), self.threshold, self.interval)
        return rows.cpu()[row], token

    def _values(
        self, rollouts: Rollouts, row: Tensor, token: Tensor, prompts: Prompts, engine: Engine, log: Log
    ) -> Tensor:
        """v of the state before each of these tokens, (n,) float32: the mean score of K continuations; NaN without a score.

        Responses to a prompt that begin alike share their continuations.
        """
        log("cuts", len(row) / max(1, len(rollouts)))
        if not len(row):
            return torch.zeros(0)
        tokens = rollouts.responses.tolist()
        beginnings = [tuple(tokens[place][:size]) for place, size in zip(row.tolist(), token.tolist(), strict=True)]
        of_prompt = rollouts.prompt_rows.cpu()[row].tolist()
        distinct: dict[tuple[int, tuple[int, ...]], int] = {}
        index = [distinct.setdefault(key, len(distinct)) for key in zip(of_prompt, beginnings, strict=True)]
        asked = torch.tensor([prompt for prompt, _ in distinct])
        drawn, limits = continued(
            engine, prompts, asked, [list(beginning) for _, beginning in distinct], self.continuations
        )
        cut = unfinished(drawn, limits, self.state.end_tokens)
        scores = torch.where(cut[:, None], self.cut_score, drawn.scores).view(-1, self.continuations).cpu()
        values = scores.nanmean(1)
        log("continuations", len(drawn))
        log("continuations_cut", cut.float().mean())
        return values[torch.tensor(index)]

    @hookimpl(when=lambda self: not self.tree)
    def segment_tokens(self, rollouts: Rollouts, mask: Tensor) -> Tensor:
        own = drawn_from_pool(rollouts, rollouts.groups)  # others may have the columns of a row whose place they took
        return segments_of(starts_of(rollouts), mask & own[:, None])

    @hookimpl(when=lambda self: not self.tree)
    def compute_advantages(self, rewards: Tensor, segments: Tensor, rollouts: Rollouts, mask: Tensor) -> Tensor:
        """The value after a segment minus the value before it; 0 on tokens that the policy was sure of."""
        values = rollouts[VALUES]
        assert isinstance(values, Tensor)

        def of_block(values: Tensor, rewards: Tensor, segments: Tensor, log_probs: Tensor) -> Tensor:
            advantages = segment_advantages(values, rewards, segments)
            return torch.where(log_probs.exp() > self.threshold, 0.0, advantages)

        return ops.by_blocks(of_block, values, rewards, segments, self.drawn_log_probs(rollouts, mask))

    # tree

    def _trees(self, rollouts: Rollouts, prompts: Prompts, engine: Engine) -> tuple[Rollouts, Tensor]:
        """The rollouts followed by the nodes below them, level by level, with V as scores; parent (N,) of each, or -1."""
        longest = engine.sampling(len(rollouts)).max_tokens
        limits = longest.clamp(max=self.segment_length) if len(self.branch) > 1 else longest
        ends = self.state.end_tokens
        going_on = drawn_from_pool(rollouts, rollouts.groups) & unfinished(rollouts, limits, ends)
        whole, drawn, first = rollouts, rollouts, 0
        level = torch.zeros(len(rollouts), dtype=torch.int64)
        parent = torch.full_like(level, -1)
        for depth, children in enumerate(self.branch[1:], 1):
            rows = (going_on.cpu() & (response_sizes(drawn) < int(longest.max()))).nonzero().flatten()
            if not len(rows):
                break
            beginnings = token_lists(drawn.select(rows))
            most = self.segment_length if depth + 1 < len(self.branch) else None
            drawn, limits = continued(engine, prompts, whole.prompt_rows[first + rows], beginnings, children, most)
            source = (first + rows).repeat_interleave(children)
            nodes = as_nodes(drawn, whole.select(source), rollouts.columns)
            going_on, first = unfinished(drawn, limits, ends), len(whole)
            whole = concatenate([whole, nodes])
            level, parent = torch.cat([level, torch.full_like(source, depth)]), torch.cat([parent, source])
        parent, level = parent.to(whole.mask.device), level.to(whole.mask.device)
        scores = tree_values(whole.scores, parent, level)
        components = whole.components
        return replace(
            whole, scores=scores, components=None if components is None else tree_values(components, parent, level)
        ), parent  # fmt: skip

    @hookimpl(when=lambda self: self.tree and not self.buffered)
    def assign_groups(self, groups: Tensor, rollouts: Rollouts) -> Tensor:
        """Siblings: the children of the same node, or of the same prompt."""
        return sibling_groups(rollouts[PARENT], groups)

    @hookimpl(when=lambda self: self.tree and not self.buffered and self.method == "normalised")
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """sd(parent) + 1e-8; 0 where all siblings have the same value."""
        return sibling_scale(rewards, groups)

    @hookimpl(when=lambda self: self.tree)
    def select_samples(
        self, advantages: Tensor, rewards: Tensor, groups: Tensor, rollouts: Rollouts, log: Log
    ) -> Tensor:
        """Edges that change the value, and have tokens."""
        kept = self.trained(rewards, groups, rollouts)
        log("edges", ops.as_numbers(kept[groups >= 0]).mean() if bool((groups >= 0).any()) else 0.0)
        return kept[:, None].to(advantages.dtype)

    # tree with a buffer

    def _from_buffer(
        self, rollouts: Rollouts, whole: Rollouts, parent: Tensor, prompts: Prompts, engine: Engine, step: Step, log: Log
    ) -> Rollouts:  # fmt: skip
        """The rollouts, of which some count, and the edges of this and earlier steps whose turn it is."""
        A = edge_advantages(whole.scores, sibling_groups(parent, whole.groups), self.method)
        rows = ((A != 0).flatten() & has_tokens(whole.mask)).nonzero().flatten()
        new = whole.select(rows)
        old = engine.log_probs(new.prompts, new.responses, new.mask.bool()) if len(new) else new.mask.float()
        place = torch.where(rows < len(rollouts), rows, -1)
        edges = joined(self._waiting(prompts, step), stored(new, place, A[rows], old, step.number))
        turn = chosen(edges["prompt_rows"], self.buffer_edges, step.generator(self))
        self.state.buffer = picked(edges, ~turn)
        log("buffer", len(turn) - int(turn.sum()))
        return with_edges(rollouts, picked(edges, turn), prompts)

    def _waiting(self, prompts: Prompts, step: Step) -> Edges:
        """The edges of earlier steps that are young enough, of prompts that are still in the pool."""
        edges: Edges = self.state.buffer
        if not edges:
            return {}
        assert self.buffer_steps is not None
        kept = (step.number - edges["step"] < self.buffer_steps) & (prompts.positions(edges["prompt_rows"]) >= 0)
        return picked(edges, kept) | {"place": torch.full((int(kept.sum()),), -1)}

    @hookimpl(hook="compute_advantages", when=lambda self: self.buffered)
    def stored_advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts[ADVANTAGE]  # type: ignore[return-value]

    @hookimpl(hook="policy_loss", kind=KIND, when=lambda self: self.buffered)
    def loss_of_edges(self, log_probs: Tensor, advantages: Tensor, clip: tuple[Any, Any], batch: Batch) -> Tensor:
        """PPO-clip against the policy that drew the edge."""
        old = of_width(batch[LOG_PROBS], log_probs.shape[1])
        return clipped_loss(probability_ratio(log_probs, old), advantages, clip)

    # both

    def drawn_log_probs(self, rollouts: Rollouts, mask: Tensor) -> Tensor:
        """log pi_t, (B, T), under the policy that drew the token: the old log-probs."""
        assert rollouts.old_log_probs is not None
        log_probs = rollouts.old_log_probs.float()
        if self.buffered:
            edges = of_width(rollouts[LOG_PROBS], mask.shape[1])
            log_probs = torch.where(rollouts.of_kind(KIND)[:, None], edges, log_probs)
        return log_probs

    def unsure(self, rollouts: Rollouts, mask: Tensor) -> Tensor:
        """The policy's own tokens with pi_t below the threshold, (B, T) bool."""
        log_probs = self.drawn_log_probs(rollouts, mask)
        return ops.by_blocks(lambda log_probs, mask: mask & (log_probs.exp() < self.threshold), log_probs, mask)

    def trained(self, rewards: Tensor, groups: Tensor, rollouts: Rollouts) -> Tensor:
        """Rows that have an advantage, (B,) bool: in a tree the edges that change the value and have tokens."""
        if self.buffered:
            return (groups >= 0) & (rollouts[ADVANTAGE] != 0).flatten()  # type: ignore[union-attr]
        if self.tree:
            return changes_value(rewards, groups).flatten() & has_tokens(rollouts.mask)
        return drawn_from_pool(rollouts, groups)

    @hookimpl(when=lambda self: self.whiten)
    def shape_advantages(
        self, advantages: Tensor, rewards: Tensor, groups: Tensor, rollouts: Rollouts, mask: Tensor
    ) -> Tensor:
        """Whitening over W: the trained tokens of the step's trained rows; all of their tokens, if none is unsure."""
        rows = self.trained(rewards, groups, rollouts)[:, None]
        W = mask & rows
        if self.probability_mask:
            unsure = W & self.unsure(rollouts, mask)
            W = unsure if bool(unsure.any()) else W
        return torch.where(rows, whitened(advantages, W), advantages)

    @hookimpl(when=lambda self: self.probability_mask)
    def select_tokens(self, rollouts: Rollouts, mask: Tensor, log: Log) -> Tensor:
        """The probability mask."""
        unsure = self.unsure(rollouts, mask)
        log("unsure", unsure.sum() / mask.sum().clamp(min=1))
        return ops.as_numbers(unsure)

    @hookimpl(when=lambda self: self.kl > 0)
    def auxiliary_loss(self, log_probs: Tensor, loss_weights: Tensor, batch: Batch, log: Log) -> Tensor:
        """kl sum W k3 / sum w_i: a sum over the trained tokens of each row, a mean over rows."""
        d = (batch["ref_log_probs"] - log_probs).clamp(-20, 20)
        divergence = (loss_weights * (d.exp() - d - 1)).sum()
        rows = batch.weights.sum()
        log("kl", ops.safe_divide(divergence.detach(), rows), rows)
        return self.kl * divergence / batch.sample_weight


# chain


def segment_starts(token_prob: Tensor, mask: Tensor, threshold: float, interval: int) -> tuple[Tensor, Tensor]:
    """Row and place of every n-th unsure token of each row, starting with the first, (n,) int64 each.

    A cut c lies before such a token t: c = t - 1, and c = -1 is the prompt alone.

    Args:
        token_prob: (N, T).
        mask: (N, T) bool, the policy's own tokens.
        threshold: below it a token is unsure.
        interval: n.
    """
    unsure = mask & (token_prob < threshold)
    row, token = (unsure & ((unsure.cumsum(1) - 1) % interval == 0)).nonzero(as_tuple=True)
    return row, token


def by_row(row: Tensor, numbers: Tensor, values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers and values (n,) of entries in the order of their rows (n,), as (B, C) each, right-padded with 0."""
    sizes = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row]
    shape = rows, max(1, int(sizes.max()))
    index = row, place
    return (
        torch.zeros(shape, dtype=numbers.dtype).index_put(index, numbers),
        torch.zeros(shape, dtype=values.dtype).index_put(index, values),
    )


def starts_of(rollouts: Rollouts) -> Tensor:
    """The places at which segments start, counted from 1, (B, C) int64 ascending; 0: none."""
    starts = rollouts[STARTS]
    assert isinstance(starts, Tensor)
    return starts


def segments_of(starts: Tensor, mask: Tensor) -> Tensor:
    """The segment of each token, (B, T) int64: 0 from the first start on; -1 before it, where no token is unsure.

    Args:
        starts: (B, C) int64, places counted from 1; 0: none.
        mask: (B, T) bool.
    """

    def of_block(starts: Tensor, mask: Tensor) -> Tensor:
        tokens = mask.shape[1]
        begins = torch.zeros((len(mask), tokens + 1), dtype=torch.bool, device=mask.device)
        begins.scatter_(1, torch.where(starts > tokens, 0, starts), True)
        return torch.where(mask, begins[:, 1:].cumsum(1) - 1, -1)

    return ops.by_blocks(of_block, starts, mask)


def segment_advantages(cut_values: Tensor, score: Tensor, segments: Tensor) -> Tensor:
    """Value after the token's segment minus the value before it, (B, T); the score is the value after the last one.

    Args:
        cut_values: v at the start of each segment, (B, C).
        score: R, (B, 1).
        segments: (B, T) int64, -1: none, which has 0.
    """
    last = segments.amax(1, keepdim=True)
    after = pad(cut_values[:, 1:], (0, 1))
    after = torch.where(torch.arange(cut_values.shape[1], device=last.device) == last, score, after)
    return ops.spread_segments(after - cut_values, segments)


# tree


def tree_values(scores: Tensor, parent: Tensor, level: Tensor) -> Tensor:
    """V of every node (N, K): the mean over its children, of a leaf the score; children without a score are left out.

    Args:
        scores: (N, K); NaN: none.
        parent: (N,) int64, position of the parent; -1: the prompt.
        level: (N,) int64, 0 for the prompt's children.
    """
    V = scores.double()
    for depth in range(int(level.max()) if len(level) else 0, 0, -1):
        children = level == depth
        of, values = parent[children], V[children]
        total = torch.zeros_like(V).index_add(0, of, values.nan_to_num())
        count = torch.zeros_like(V).index_add(0, of, (~values.isnan()).to(V.dtype))
        inner = torch.zeros_like(children).index_fill(0, of, True)
        V = torch.where(inner[:, None], total / count, V)
    return V.to(scores.dtype)


def sibling_groups(parent: Column, groups: Tensor) -> Tensor:
    """One number for the children of each node, (B,) int64; the prompt's children keep that of `groups` (B,)."""
    assert isinstance(parent, Tensor)
    return torch.where(parent >= 0, groups.max() + 1 + parent, groups) if len(groups) else groups


def changes_value(values: Tensor, groups: Tensor) -> Tensor:
    """Whether V differs from that of the parent by more than rounding, (B, 1) bool; V (B, 1), siblings share a group (B,)."""
    distance = (values - ops.group_mean(values.double(), groups)).abs()
    return (groups >= 0)[:, None] & (distance > ROUNDING * ops.group_extreme(values.abs(), groups))


def sibling_scale(values: Tensor, groups: Tensor) -> Tensor:
    """sd(parent) + 1e-8 with the population's sd, (B, 1); 0 where all siblings have the same V up to rounding."""
    std = ops.group_std(values.double(), groups, ddof=0)
    alike = std <= ROUNDING * ops.group_extreme(values.abs(), groups)
    return torch.where(alike, 0.0, std + EPS).to(values.dtype)


def edge_advantages(values: Tensor, groups: Tensor, method: str) -> Tensor:
    """V(child) - V(parent), (B, 1), divided by sd(parent) + 1e-8 if normalised; 0 for edges that are dropped.

    Args:
        values: V, (B, 1); NaN: a node that is left out.
        groups: (B,) int64, siblings share a number.
        method: `plain` or `normalised`.
    """
    groups = torch.where(values.flatten().isnan(), -1, groups)
    values = values.nan_to_num()
    difference = (values - ops.group_mean(values.double(), groups)).to(values.dtype)
    if method == "normalised":
        difference = ops.safe_divide(difference, sibling_scale(values, groups))
    return torch.where(changes_value(values, groups), difference, 0.0)


def as_nodes(drawn: Rollouts, parents: Rollouts, columns: Columns) -> Rollouts:
    """Continuations as rows of their own: what they continue is part of the prompt.

    Args:
        drawn: n responses, each with what it continues in front.
        parents: the row of each one's parent.
        columns: of the step's rows; what the engine does not give is the parent's.
    """
    plain, device = drawn.unguarded(), drawn.mask.device
    size = torch.zeros(len(drawn), dtype=torch.int64) if drawn.prefix is None else drawn.prefix.sum(1).cpu()
    lists = zip(drawn.prompts, drawn.responses.tolist(), size.tolist(), strict=True)
    place = torch.arange(max(1, int((response_sizes(drawn) - size).max()))) + size[:, None]
    inside, place = (place < drawn.mask.shape[1]).to(device), place.clamp(max=drawn.mask.shape[1] - 1).to(device)
    own: dict[str, Any] = {
        name: torch.where(inside, column.gather(1, place), 0).to(column.dtype)
        for name in ("responses", "mask", "rollout_log_probs") if (column := getattr(plain, name)) is not None
    }  # fmt: skip
    kept = {name: drawn.columns[name] if name in drawn.columns else parents.columns[name] for name in columns}
    return replace(
        plain, prompts=[prompt + tokens[:size] for prompt, tokens, size in lists], groups=parents.groups,
        kinds=(POLICY, KIND), kind=torch.ones_like(drawn.kind), prefix=None,
        columns=Columns(kept, frozenset(columns.written)), **own,
    )  # fmt: skip


# the buffer


def stored(rows: Rollouts, place: Tensor, advantages: Tensor, log_probs: Tensor, step: int) -> Edges:
    """The rows as edges of the step; place (E,), advantages (E, 1), log_probs (E, T)."""
    sizes = [len(prompt) for prompt in rows.prompts]
    width = max(sizes, default=0)
    contexts = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in rows.prompts], dtype=torch.int64)
    fields = {name: getattr(rows, name) for name in FIELDS if getattr(rows, name) is not None}
    own = {"place": place, ADVANTAGE: advantages, LOG_PROBS: log_probs}
    edges = {name: column.cpu() for name, column in (fields | own).items()}
    size = torch.tensor(sizes, dtype=torch.int64)
    return edges | {
        "context": contexts.view(len(sizes), width),
        "context_size": size,
        "step": torch.full_like(size, step),
    }


def joined(first: Edges, second: Edges) -> Edges:
    """The edges of both, padded to the longest."""
    if not first:
        return second
    parts = {name: (first[name], column) for name, column in second.items()}
    return {
        name: torch.cat([of_width(part, max(one.shape[1], other.shape[1])) for part in (one, other)])
        if one.dim() == 2 else torch.cat([one, other])
        for name, (one, other) in parts.items()
    }  # fmt: skip


def picked(edges: Edges, index: Tensor) -> Edges:
    """Those at `index` (int64 or bool)."""
    return {name: column[index] for name, column in edges.items()}


def chosen(prompt_rows: Tensor, most: int, source: torch.Generator) -> Tensor:
    """At most so many edges of each prompt of `prompt_rows` (E,), at random, (E,) bool."""
    order = torch.argsort(torch.rand(len(prompt_rows), generator=source))
    order = order[torch.argsort(prompt_rows[order], stable=True)]
    ordered = prompt_rows[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return torch.zeros(len(order), dtype=torch.bool).scatter(0, order, rank < most)


def with_edges(rollouts: Rollouts, edges: Edges, prompts: Prompts) -> Rollouts:
    """The rows of the step, with an advantage where they are among the edges, and the other edges as rows after them."""
    device = rollouts.mask.device
    here = edges["place"] >= 0
    advantages = torch.zeros((len(rollouts), 1)).index_put((edges["place"][here],), edges[ADVANTAGE][here])
    columns = {ADVANTAGE: advantages.to(device), LOG_PROBS: torch.zeros(rollouts.mask.shape, device=device)}
    rows, others = with_columns(rollouts, columns), picked(edges, ~here)
    return concatenate([rows, restored(others, rows, prompts)]) if len(others["step"]) else rows


def restored(edges: Edges, like: Rollouts, prompts: Prompts) -> Rollouts:
    """Edges as rows, with the columns of the pool and whatever else the step's rows `like` have."""
    device = like.mask.device
    width = int(edges["mask"].any(0).nonzero().max()) + 1
    trimmed = {name: of_width(edges[name], width) for name in ("responses", "mask", LOG_PROBS)}
    there = {name: column.to(device) for name, column in (edges | trimmed).items()}
    positions = prompts.positions(edges["prompt_rows"])
    known = {name: take(prompts.columns[name], positions) for name in like.columns if name in prompts.columns}
    own = {name: there[name] for name in (ADVANTAGE, LOG_PROBS)}
    contexts = zip(edges["context"].tolist(), edges["context_size"].tolist(), strict=True)
    fields: dict[str, Any] = {name: there[name] for name in FIELDS if name in edges}
    rows = Rollouts(
        **fields, prompts=[tokens[:size] for tokens, size in contexts], groups=like.groups.max() + 1 + there["prompt_rows"],
        kind=torch.ones(len(positions), dtype=torch.int8, device=device), kinds=(POLICY, KIND),
        rollout_log_probs=None if like.rollout_log_probs is None else there[LOG_PROBS],
        columns=Columns(known | own, frozenset(own)),
    )  # fmt: skip
    return completed(rows, like)


# both


def drawn_from_pool(rollouts: Rollouts, groups: Tensor) -> Tensor:
    """Rows that the policy drew for a prompt of the pool, which it can be asked to continue, (B,) bool."""
    return rollouts.of_kind(POLICY) & (groups >= 0) & (rollouts.prompt_rows >= 0).to(groups.device)


def continued(
    engine: Engine, prompts: Prompts, rows: Tensor, beginnings: Sequence[list[int]], times: int, most: int | None = None
) -> tuple[Rollouts, Tensor]:
    """So many continuations of each of n beginnings of responses, one after the other, and the tokens each could draw.

    Args:
        engine: scores what it draws together with what it continues.
        prompts: the pool.
        rows: (n,) int64, of the prompts in the prompt table.
        beginnings: token ids.
        times: continuations of each.
        most: tokens of a continuation; None: as many as the run's longest response leaves.
    """
    dense, count = ops.dense_groups(rows.cpu())
    order = torch.argsort(dense, stable=True)
    table_rows = torch.zeros(count, dtype=torch.int64).scatter(0, dense, rows.cpu())
    requests = Requests.of(
        prompts.select(prompts.positions(table_rows)), torch.bincount(dense, minlength=count) * times
    )
    asked = order.repeat_interleave(times)
    requests = replace(requests, prefixes=[beginnings[place] for place in asked.tolist()])
    sampling = engine.sampling(len(requests))
    left = sampling.max_tokens - torch.tensor([len(prefix) for prefix in requests.prefixes])
    limits = left.clamp(min=1, max=most)
    drawn = engine.generate(requests, replace(sampling, max_tokens=limits))
    back = torch.argsort(asked, stable=True)
    return drawn.unguarded().select(back), limits[back]


def unfinished(rollouts: Rollouts, limits: Tensor, end_tokens: Tensor) -> Tensor:
    """Responses that drew as many tokens as they could, (B,) int64, and did not end with the last, (B,) bool."""
    own = rollouts.mask.bool() if rollouts.prefix is None else rollouts.mask.bool() & ~rollouts.prefix
    last = rollouts.responses.gather(1, ops.last_token(own)).flatten()
    ended = torch.isin(last, end_tokens.to(last.device))
    return (ops.lengths(own).flatten() >= limits.to(last.device)) & ~ended


def response_sizes(rollouts: Rollouts) -> Tensor:
    """Tokens of each response up to the last of the policy's own, (B,) int64 on the CPU."""
    mask = rollouts.mask.bool()
    return torch.where(has_tokens(mask), ops.last_token(mask).flatten() + 1, 0).cpu()


def token_lists(rollouts: Rollouts) -> list[list[int]]:
    """The tokens of each response up to the last of the policy's own."""
    sizes = response_sizes(rollouts).tolist()
    return [row[:size] for row, size in zip(rollouts.responses.tolist(), sizes, strict=True)]


def has_tokens(mask: Tensor) -> Tensor:
    """(B,) bool."""
    return mask.bool().any(1)


def of_width(column: Column, width: int) -> Tensor:
    """A column (B, t) with zeros up to the width, or without what lies beyond."""
    assert isinstance(column, Tensor)
    return pad(column, (0, width - column.shape[1]))


def with_columns(rollouts: Rollouts, columns: Mapping[str, Column]) -> Rollouts:
    """The rollouts with more columns, which travel with their rows."""
    made = Columns({**rollouts.columns, **columns}, frozenset({*rollouts.columns.written, *columns}))
    return replace(rollouts, columns=made)


def whitened(values: Tensor, counted: Tensor) -> Tensor:
    """(A - mean) / sqrt(var + 1e-8), mean and unbiased variance over the counted tokens; unchanged with fewer than two.

    Args:
        values: A, (B, 1), which stands for each token of its row, or (B, T).
        counted: (B, T) bool.
    """

    def moments(A: Tensor, counted: Tensor, centre: Tensor) -> Tensor:
        """Per row how many tokens count, and the sums of A - centre and of its square over them, (b, 3)."""
        times = ops.as_numbers(counted, torch.float64)
        times = times.sum(1, keepdim=True) if A.shape[1] == 1 else times
        A = A.double() - centre
        return torch.stack([times.sum(1), (A * times).sum(1), (A.square() * times).sum(1)], 1)

    def of_rows(centre: Tensor) -> Tensor:
        each = centre.expand(len(values), 1)
        return ops.by_blocks(moments, values, counted, each).sum(0)

    zero = torch.zeros((1, 1), dtype=torch.float64, device=values.device)
    count, total, _ = of_rows(zero)
    if count < 2:
        return values
    mean = total / count
    spread = torch.rsqrt(of_rows(mean.view(1, 1))[2] / (count - 1) + EPS)
    return ops.by_blocks(lambda A: ((A.double() - mean) * spread).to(values.dtype), values)
