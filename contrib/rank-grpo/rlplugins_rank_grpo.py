"""Rank-GRPO: one reward, one advantage and one ratio per rank of a list (Zhu et al. 2025, arXiv 2510.20150).

Segmentation, rewards, advantages, length terms and ratio as in the official code, yaochenzhu/Rank-GRPO,
`libs/trl/rank_grpo_trainer.py`, `libs/reward_funcs.py` and `libs/metrics_align.py`; the mean over ranks as published.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.defaults import Fraction, NonNegative, clamp
from rlplugins.errors import ConfigurationError, HookError
from rlplugins.hookspecs import Log
from rlplugins.plugin import BuiltinName
from rlplugins.rollouts import Rollouts
from rlplugins.steps import Run
from rlplugins.update import LOG_RATIO_BOUND

EPS = 1e-4
MARKS = " \t\r*_-#\"'"  # what a model puts around a title
NUMBERING = re.compile(r"\d+\s*[.)、—–-]\s*")
YEAR = re.compile(r"(?<=\S)\s+\((\d{4})\)")

Reward = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(le=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class RankGrpo(Plugin):
    """Gives each item of a list its own reward, group advantage and importance ratio, for responses of one item a line.

    Rank-GRPO (ConvRec-R1, arXiv 2510.20150): the unit of action is the rank.
    """

    name = "rank-grpo"
    breaks = frozenset({"response_rewards", "reward_scale", "token_ratio"})
    needs = (needs.group_size(at_least=2), needs.column("components"))

    n_ranks: Annotated[int, Field(ge=1)] = 20
    """N, the wanted number of items; the reward function gives so many components."""
    reward: Literal["exp_inf", "log_decay"] = "exp_inf"
    """What a rank earns: its own hit, or its hit and all later ones discounted as in the DCG."""
    clip_low: Fraction = 0.06
    """Distance of the lower bound of a rank's ratio from 1."""
    clip_high: NonNegative = 0.08
    """Distance of the upper bound of a rank's ratio from 1."""
    length_shaping: bool = True
    """Add small fixed advantages that teach the length of the list."""
    overflow: Penalty = -0.1
    """Advantage of every token after N items."""
    early_stop: Penalty = -0.1
    """Advantage of the end token of a list with fewer than N items."""
    end_bonus: Reward = 0.1
    """Advantage of the end token of a list with N items."""
    aggregation: Literal["rank_mean", "token_mean"] = "rank_mean"
    """The loss is a mean over N ranks (published) or over all tokens (released)."""
    separators: dict[Count, Count] | None = None
    """Number of item separators in each token id that has any; None: newlines in the tokenizer's tokens."""
    end_tokens: list[Count] | None = None
    """Token ids that end a response; None: the tokenizer's end token."""

    @property
    def uses(self) -> dict[str, BuiltinName]:
        """The mean of each rank over the group; the released mean over tokens."""
        released: dict[str, BuiltinName] = {"reduce_loss": "token_mean"} if self.aggregation == "token_mean" else {}
        return {"baseline": "group_mean", **released}

    @property
    def assumes(self) -> frozenset[str]:
        """The length terms are added to normalised advantages."""
        return frozenset({"absolute_advantages"} if self.length_shaping else ())

    def init_state(self, run: Run) -> dict[str, Any]:
        """Separators of every token id, (V + 1,) int32, the last for ids beyond; ids that end a response."""
        counts = self.separators
        if counts is None:
            counts = separator_counts(self.tokenizer(run, "separators"))
        ends = self.end_tokens
        if ends is None:
            ends = [end for end in [self.tokenizer(run, "end_tokens").eos_token_id] if end is not None]
        return {"separators": lookup_table(counts), "end_tokens": torch.tensor(ends, dtype=torch.int64)}

    def tokenizer(self, run: Run, option: str) -> Any:
        """The trainer's tokenizer.

        Raises:
            ConfigurationError: if there is none to take the place of an option that was left out.
        """
        if run.tokenizer is None:
            raise ConfigurationError(f"{self.name}.{option}: the trainer gives no tokenizer; write the token ids down")
        return run.tokenizer

    @hookimpl
    def combine_rewards(self, components: Tensor) -> Tensor:
        if components.shape[1] != self.n_ranks:
            raise HookError(self.name, "combine_rewards", f"needs one component per rank, {self.n_ranks} (n_ranks), but "
                            f"the reward function gives {components.shape[1]}")  # fmt: skip
        return rank_rewards(components, self.reward)

    @hookimpl
    def segment_tokens(self, rollouts: Rollouts, mask: Tensor) -> Tensor:
        table = self.state.separators.to(mask.device)

        def ranks(responses: Tensor, mask: Tensor) -> Tensor:
            separators = table.index_select(0, responses.clamp(max=len(table) - 1).flatten())
            return rank_index(separators.view_as(responses), mask, self.n_ranks)

        return ops.by_blocks(ranks, rollouts.responses, mask)

    @hookimpl
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return rank_scale(rewards, groups)

    @hookimpl
    def shape_advantages(
        self, advantages: Tensor, segments: Tensor, groups: Tensor, rollouts: Rollouts, mask: Tensor, log: Log
    ) -> Tensor:
        self._report(ops.by_blocks(items_emitted, segments)[groups >= 0], log)
        return ops.by_blocks(self.shaped, advantages, segments, rollouts.responses, mask)

    def shaped(self, advantages: Tensor, segments: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        """The advantages on items, and the length terms, (B, T)."""
        eos = first_end(responses, mask, self.state.end_tokens)
        shaped = item_advantages(advantages, segments, eos, self.n_ranks)
        if not self.length_shaping:
            return shaped
        return shaped + length_terms(
            segments, eos, self.n_ranks, overflow=self.overflow, early_stop=self.early_stop, end_bonus=self.end_bonus
        )

    def _report(self, items: Tensor, log: Log) -> None:
        """Lists of the right length, and a warning where a penalty has no effect."""
        count = items.numel()
        too_long = int((items > self.n_ranks).sum())
        log("complete_lists", float((items == self.n_ranks).sum()) / max(1, count), count)
        log("overflowing_lists", too_long / max(1, count), count)
        if too_long and self.length_shaping and self.overflow and self.aggregation == "rank_mean":
            warnings.warn(
                f"{self.name}: {too_long} of {count} lists have more than {self.n_ranks} items, but aggregation: rank_mean "
                "leaves the tokens after them out, their penalty included; aggregation: token_mean trains on it",
                stacklevel=2,
            )

    @hookimpl
    def clip_range(self) -> tuple[float, float]:
        return 1 - self.clip_low, 1 + self.clip_high

    @hookimpl
    def policy_loss(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: tuple[Any, Any], mask: Tensor,
        segments: Tensor,
    ) -> Tensor:  # fmt: skip
        w = rank_ratio(log_probs - old_log_probs, segments, mask, self.n_ranks)
        return torch.maximum(-advantages * w, -advantages * clamp(w, *clip))

    @hookimpl(when=lambda self: self.aggregation == "rank_mean")
    def reduce_loss(
        self, loss: Tensor, weights: Tensor, token_weights: Tensor, mask: Tensor, segments: Tensor, batch: Any
    ) -> Tensor:
        means = rank_means(loss, token_weights * mask, segments, self.n_ranks)
        return (weights * means).sum() / (self.n_ranks * batch.sample_weight)


# segments


def separator_counts(tokenizer: Any) -> dict[int, int]:
    """Newlines in each token decoded alone, by token id; a CR LF pair is one."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return {token: text.count("\n") for token, text in enumerate(texts) if "\n" in text}


def lookup_table(counts: Mapping[int, int]) -> Tensor:
    """Counts by token id as a tensor (largest id + 2,) int32, 0 for ids that are not named; the last stays 0."""
    table = torch.zeros(max(counts, default=-1) + 2, dtype=torch.int32)
    table[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.int32)
    return table


def rank_index(separators: Tensor, mask: Tensor, n_ranks: int) -> Tensor:
    """Rank of every token, (B, T) int64: the separators before it; `n_ranks` after the last item, -1 outside of the mask.

    Args:
        separators: (B, T) integers, item separators in each token.
        mask: (B, T) bool.
        n_ranks: N.
    """
    counts = separators * mask
    before = counts.cumsum(1, dtype=counts.dtype).sub_(counts).clamp_(max=n_ranks)
    return torch.where(mask, before, -1).long()


def items_emitted(segments: Tensor) -> Tensor:
    """n_i, (B, 1): 1 + the largest rank of a token, the end token included; N + 1 stands for more than N."""
    return segments.amax(1, keepdim=True) + 1


def first_end(responses: Tensor, mask: Tensor, end_tokens: Tensor) -> Tensor:
    """eos, (B, T) bool: the first end token of each response."""
    ends = torch.zeros_like(mask)
    for token in end_tokens.tolist():  # one to three, for which this is faster than isin
        ends |= responses == token
    ends &= mask
    return ends & (ends.cumsum(1, dtype=torch.int32) == 1)


# rewards and advantages


def rank_rewards(hits: Tensor, reward: str = "exp_inf") -> Tensor:
    """r, (B, N), from the relevance of each item: what rank k earns does not depend on the items before it."""
    if reward == "exp_inf":
        return hits
    discount = torch.arange(2, hits.shape[1] + 2, dtype=hits.dtype, device=hits.device).log2()
    return (hits / discount).flip(1).cumsum(1).flip(1)


def rank_scale(rank_rewards: Tensor, groups: Tensor) -> Tensor:
    """Sample deviation over the group + 1e-4 of each rank, (B, N).

    0, which makes the advantage 0, where all of the group have the same reward and where one of them is missing (NaN).
    """
    differ = ops.group_extreme(rank_rewards, groups) > ops.group_extreme(rank_rewards, groups, largest=False)
    missing = ops.group_sum(rank_rewards.isnan().to(rank_rewards.dtype), groups) > 0
    return torch.where(differ & ~missing, ops.group_std(rank_rewards, groups) + EPS, 0.0)


def item_advantages(advantages: Tensor, rank_index: Tensor, eos: Tensor, n_ranks: int) -> Tensor:
    """The advantages (B, 1) or (B, T) on the tokens of the items; 0 on tokens after N items and on end tokens, (B, T)."""
    return advantages * ops.as_numbers((rank_index >= 0) & (rank_index < n_ranks) & ~eos, advantages.dtype)


def length_terms(
    rank_index: Tensor, eos: Tensor, n_ranks: int, *, overflow: float = -0.1, early_stop: float = -0.1,
    end_bonus: float = 0.1,
) -> Tensor:  # fmt: skip
    """What teaches the length, (B, T): `overflow` on tokens after N items, on the end token a bonus or a penalty.

    Args:
        rank_index: (B, T).
        eos: (B, T) bool, the end token.
        n_ranks: N.
        overflow: on each token after N items, an end token included.
        early_stop: on the end token after fewer items.
        end_bonus: on the end token in the last rank.
    """
    items = items_emitted(rank_index)
    at_end = end_bonus * (items == n_ranks) + early_stop * (items < n_ranks)
    return overflow * ops.as_numbers(rank_index == n_ranks) + at_end * ops.as_numbers(eos)


# update


def rank_ratio(log_ratio: Tensor, rank_index: Tensor, mask: Tensor, n_ranks: int) -> Tensor:
    """w, (B, T): geometric mean of the ratios of a rank's tokens, all overflow tokens one rank; 0 outside of the mask."""
    means = ops.segment_mean(log_ratio, rank_index, mask, n_ranks + 1)
    return ops.spread_segments(means.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp(), rank_index)


def rank_means(loss: Tensor, token_weights: Tensor, rank_index: Tensor, n_ranks: int) -> Tensor:
    """Sum over the ranks 0..N-1 of the weighted mean of the loss over the rank's tokens, (B, 1).

    Args:
        loss: (B, T).
        token_weights: (B, T), u m.
        rank_index: (B, T); other ranks and -1 are left out.
        n_ranks: N.
    """
    listed = (rank_index >= 0) & (rank_index < n_ranks)
    index = torch.where(listed, rank_index, 0)
    counts = (token_weights * listed).to(loss.dtype).expand_as(loss)
    empty = loss.new_zeros((len(loss), n_ranks))
    means = ops.safe_divide(empty.scatter_add(1, index, loss * counts), empty.scatter_add(1, index, counts))
    return means.sum(1, keepdim=True)


# relevance, for reward functions


def listed_items(response: str) -> list[tuple[str, int] | None]:
    """Title and year of every line, None for a line without a year in brackets; as many as lines."""
    return [_item(line) for line in response.split("\n")]


def _item(line: str) -> tuple[str, int] | None:
    bare = NUMBERING.sub("", line.strip(MARKS), count=1) if NUMBERING.match(line.strip(MARKS)) else line.strip(MARKS)
    found = YEAR.search(bare)
    return (bare[: found.start()].strip(MARKS), int(found[1])) if found else None


def item_hits(
    response: str, relevant: Iterable[tuple[str, int]], catalogue: Collection[tuple[str, int]],
    mentioned: Collection[str] = (), *, n_ranks: int = 20, year_tolerance: int = 2,
) -> list[float]:  # fmt: skip
    """Relevance of the item on each line, N numbers of 0 or 1: the components that a reward function returns.

    An item counts if it is in the catalogue, was not mentioned in the conversation, and is one of the relevant items that
    no earlier line has used up: the same title but for case and spaces, the year within the tolerance, the nearest first.

    Args:
        response: the list, one item a line, `Title (1999)`.
        relevant: title and year of the ground-truth items.
        catalogue: title and year of every item that may be recommended.
        mentioned: titles that the conversation named.
        n_ranks: N.
        year_tolerance: largest difference of the years.
    """
    unused = [(_plain(title), int(year)) for title, year in relevant]
    nearest = [sign * distance for distance in range(year_tolerance + 1) for sign in (1, -1)]
    hits = [0.0] * n_ranks
    for rank, item in enumerate(listed_items(response)[:n_ranks]):
        if item is None or item not in catalogue or item[0] in mentioned:
            continue
        wanted = [(_plain(item[0]), item[1] + offset) for offset in nearest]
        match = next((candidate for candidate in wanted if candidate in unused), None)
        if match is not None:
            unused.remove(match)
            hits[rank] = 1.0
    return hits


def _plain(title: str) -> str:
    """A title without differences of case and spaces."""
    return " ".join(title.split()).casefold()
