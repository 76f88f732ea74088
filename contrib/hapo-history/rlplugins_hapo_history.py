"""HAPO: Training Language Models to Reason Concisely via History-Aware Policy Optimization (arXiv 2505.11225).

Rewards, history and constants as in the official code, HCY123902/HAPO, `utils.py` and `grpo_trainer.py`. L: length of a
response; h: what is remembered of the lengths of its prompt's correct responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlplugins import Plugin, hookimpl, ops
from rlplugins.rollouts import POLICY, Rollouts
from rlplugins.steps import Run

CORRECT = 1.0
"""Least score of a correct response."""
NONE = 0.0
"""The history of a prompt without one; every other is above it."""
LOWEST = -1.0
"""Least length reward of a wrong response."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class HapoHistory(Plugin):
    """Rewards correct responses for being shorter than the shortest correct one that their prompt has had so far.

    History-Aware Policy Optimization (arXiv 2505.11225). Wrong responses are never paid for being short.
    """

    name = "hapo-history"
    assumes = frozenset({"response_rewards"})
    breaks = frozenset({"unit_rewards"})

    w: NonNegative = 1.0
    """Factor on the length reward; up to 1 every correct response stays above every wrong one."""
    type: Literal["cosine", "linear"] = "cosine"
    """Shape of the length reward between its bounds."""
    mode: Literal["min", "mean"] = "min"
    """What is remembered of the lengths of a prompt's correct responses: the least, or the running mean."""
    floor: Annotated[float, Field(ge=-1, le=0)] = -0.7
    """Least length reward of a correct response."""
    tolerance: NonNegative = 0.1
    """Share of h by which a response may be longer without a penalty (linear)."""
    rep_penalty: Annotated[float, Field(le=0, allow_inf_nan=False)] = 0.0
    """Reward of a response all of whose tokens repeat earlier ones."""
    rep_ngram: Annotated[int, Field(ge=1)] = 3
    """Number of tokens that make up a repetition."""

    def init_state(self, run: Run) -> dict[str, Any]:
        """h of each prompt, its number of responses in `mean`, and the tokens that do not count in a length."""
        run.table.add_column("h", torch.float32, NONE)
        if self.mode == "mean":
            run.table.add_column("n", torch.int32, 0)
        return {"special": runs([] if run.tokenizer is None else run.tokenizer.all_special_ids)}

    @hookimpl
    def shape_rewards(
        self, rewards: Tensor, scores: Tensor, rollouts: Rollouts, mask: Tensor, log: Callable[..., None]
    ) -> Tensor:
        L, h, correct = self.lengths(rollouts.responses, mask), self.history(rollouts), scores >= CORRECT
        length_reward = self.length_reward(L, h, correct)
        known = (h > NONE).float()
        log("known", known.mean(), len(known))
        log("h", ops.safe_divide((h * known).sum(), known.sum()), known.sum())
        log("length", ops.safe_divide((L * correct).sum(), correct.sum()), correct.sum())
        log("length_reward", length_reward.mean(), len(known))
        rewards = rewards + self.w * length_reward
        if self.rep_penalty == 0:
            return rewards
        marked = repeated(rollouts.responses, self.counted(rollouts.responses, mask), self.rep_ngram)
        return rewards + self.rep_penalty * ops.safe_divide(marked, L)

    @hookimpl
    def on_step_end(self, scores: Tensor, rollouts: Rollouts, mask: Tensor) -> None:
        L = self.lengths(rollouts.responses, mask)
        counted = (scores >= CORRECT) & rollouts.of_kind(POLICY)[:, None] & (L > 0)
        counted = counted.flatten().cpu() & (rollouts.prompt_rows >= 0).cpu()
        rows, inverse = torch.unique(rollouts.prompt_rows.cpu()[counted], return_inverse=True)
        lengths, h = L.flatten().cpu()[counted], self.table["h"]
        if self.mode == "mean":
            before, new = self.table["n"][rows], torch.bincount(inverse, minlength=len(rows))
            total = h[rows].double() * before + torch.bincount(inverse, lengths.double(), len(rows))
            h[rows] = (total / (before + new)).float()
            self.table["n"][rows] = (before + new).int()
        else:
            start = torch.where(h[rows] > NONE, h[rows], torch.inf)
            h[rows] = start.scatter_reduce(0, inverse, lengths, "amin")

    def counted(self, responses: Tensor, mask: Tensor) -> Tensor:
        """(B, T) bool, tokens of the policy's own that are not special (end, padding)."""
        for first, last in self.state.special.tolist():
            mask = mask & ((responses < first) | (responses > last))
        return mask

    def lengths(self, responses: Tensor, mask: Tensor) -> Tensor:
        """L, (B, 1)."""
        return ops.by_blocks(lambda responses, mask: ops.lengths(self.counted(responses, mask)), responses, mask.bool())

    def history(self, rollouts: Rollouts) -> Tensor:
        """h of each row's prompt before this step, (B, 1); 0 without one."""
        rows = rollouts.prompt_rows.cpu()
        h = torch.where(rows >= 0, self.table["h"][rows.clamp(min=0)], NONE)
        return h[:, None].to(rollouts.mask.device)

    def length_reward(self, L: Tensor, h: Tensor, correct: Tensor) -> Tensor:
        """The length reward without its factor, (B, 1), from L, h and a bool (B, 1); 0 without a history."""
        share = L / torch.where(h > NONE, h, 1.0)
        if self.type == "cosine":
            f = torch.cos(math.pi / 2 * share.clamp(max=2))
            reward = torch.where(correct, f.clamp(min=self.floor), f.clamp(max=0))
        else:
            over = (1 + self.tolerance - share).clamp(max=0)
            reward = torch.where(correct, (1 - share).clamp(min=0) + over.clamp(min=self.floor), over.clamp(min=LOWEST))
        return torch.where(h > NONE, reward, 0.0)


def runs(tokens: Iterable[int]) -> Tensor:
    """First and last of each run of consecutive token ids, (K, 2) int64: a comparison is much faster than a search."""
    ids = torch.tensor(list(tokens), dtype=torch.int64).unique()
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids.diff() > 1
    return torch.stack([ids[begins], ids[begins.roll(-1)]], 1)


def repeated(responses: Tensor, counted: Tensor, n: int) -> Tensor:
    """How many counted tokens of each response (B, T) lie in an n-gram that has occurred earlier in it, (B, 1) float.

    Tokens that do not count are left out before n-grams are formed, and no n-gram is compared by a hash.
    """
    row = counted.nonzero()[:, 0]
    whole = row[n - 1 :] == row[: max(0, len(row) - n + 1)]  # n-grams that lie in one response
    number = tokens = torch.unique(responses[counted], return_inverse=True)[1]
    for place in range(1, n):
        pairs = number[:-1] * (len(tokens) + 1) + tokens[place:]
        number = torch.unique(pairs, return_inverse=True)[1]
    keys = (row[: len(whole)] * (len(tokens) + 1) + number)[whole]
    order = torch.argsort(keys, stable=True)
    again = torch.zeros_like(whole[whole])
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    edges = torch.zeros(
        len(row) + 1, dtype=torch.int64, device=row.device
    )  # +1 where a repeated n-gram begins, -1 behind it
    places = whole.nonzero().flatten()[again]
    edges[places] += 1
    edges[places + n] -= 1
    marked = edges.cumsum(0)[:-1] > 0
    return torch.bincount(row[marked], minlength=len(responses))[:, None].float()
