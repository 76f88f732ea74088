"""Masked and per-group reductions, shared by the built-ins and the plugins.

`groups` is always an int64 tensor (B,) of group ids, any non-negative numbers, with -1 for "no group". Values are
(B, N) with one column per segment (N = 1 for a reward per response). NaN marks a missing value and is left out of
every statistic. Results are broadcast back to the rows, so they have the shape of the values; rows of group -1 get 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

CHUNK = 32  # tokens per block of `discounted_sum`; a block is one small matrix product
CACHED = 1 << 18  # numbers per block of `by_blocks`: what stays in the cache of one core


def group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Sum over each row's group, (B, N)."""
    bucket = _buckets(groups)
    totals = values.new_zeros((int(bucket.max()) + 1 if len(bucket) else 1, values.shape[1]))
    totals.index_add_(0, bucket, torch.nan_to_num(values))
    totals[0] = 0
    return totals[bucket]


def group_count(values: Tensor, groups: Tensor) -> Tensor:
    """Number of present (not NaN) values in each row's group, (B, N)."""
    return group_sum((~torch.isnan(values)).to(values.dtype), groups)


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Mean over each row's group, (B, N); 0 where the group has no value."""
    return group_sum(values, groups) / group_count(values, groups).clamp(min=1)


def group_std(values: Tensor, groups: Tensor, ddof: int = 1) -> Tensor:
    """Standard deviation over each row's group, (B, N); 0 where the group has at most `ddof` values."""
    count = group_count(values, groups)
    squares = group_sum((values - group_mean(values, groups)).square(), groups)
    return (squares / (count - ddof).clamp(min=1)).sqrt() * (count > ddof)


def group_extreme(values: Tensor, groups: Tensor, largest: bool = True) -> Tensor:
    """Largest (or smallest) value of each row's group, (B, N); 0 where the group has no value."""
    bucket = _buckets(groups)
    filler = float("-inf") if largest else float("inf")
    present = torch.where(torch.isnan(values), filler, values)
    size = int(bucket.max()) + 1 if len(bucket) else 1
    best = values.new_full((size, values.shape[1]), filler)
    index = bucket[:, None].expand_as(present)
    best.scatter_reduce_(0, index, present, "amax" if largest else "amin")
    rows = best[bucket]
    return torch.where((groups[:, None] >= 0) & rows.isfinite(), rows, torch.zeros_like(rows))


def dense_groups(groups: Tensor) -> tuple[Tensor, int]:
    """The group ids renumbered 0..G-1 in order of first appearance, -1 kept; and G."""
    named = groups >= 0
    if not bool(named.any()):
        return groups.clone(), 0
    ids, inverse = torch.unique(groups[named], return_inverse=True)
    order = torch.arange(inverse.numel(), device=groups.device)
    first = torch.full((ids.numel(),), inverse.numel(), device=groups.device)
    first.scatter_reduce_(0, inverse, order, "amin")
    rank = torch.empty_like(first)
    rank[torch.argsort(first)] = torch.arange(ids.numel(), device=groups.device)
    dense = torch.full_like(groups, -1)
    dense[named] = rank[inverse]
    return dense, int(ids.numel())


def group_sizes(groups: Tensor) -> Tensor:
    """Number of rows of each row's group, (B,) int64; 0 for rows of group -1."""
    bucket = _buckets(groups)
    counts = torch.bincount(bucket)
    sizes = counts[bucket] if len(bucket) else counts.new_zeros(0)
    return torch.where(groups >= 0, sizes, torch.zeros_like(sizes))


def joined(first: Tensor, second: Tensor) -> Tensor:
    """(B,) int64: the first of the rows that share a number of `first` or of `second` (B,), directly or through others.

    -1 is shared with nobody.
    """
    label = torch.arange(len(first), device=first.device)
    numbers = [
        torch.unique(torch.where(part >= 0, part, -1 - label), return_inverse=True)[1] for part in (first, second)
    ]
    while True:
        lower = label
        for part in numbers:
            lower = torch.full_like(lower, len(lower)).scatter_reduce_(0, part, lower, "amin")[part]
        if torch.equal(lower, label):
            return label
        label = lower


def _buckets(groups: Tensor) -> Tensor:
    """Positions in a table of totals: 0 for group -1, small numbers for the others."""
    if len(groups) and int(groups.max()) > 4 * len(groups):
        groups = dense_groups(groups)[0]
    return groups + 1


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row over its masked tokens, (B, 1); 0 for a row without tokens."""
    weights = as_numbers(mask, values.dtype)
    return (values * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row over its masked tokens, (B, 1)."""
    return by_blocks(lambda values, mask: (values * as_numbers(mask, values.dtype)).sum(1, keepdim=True), values, mask)


def masked_values(values: Tensor, mask: Tensor) -> Tensor:
    """The values (B, T) of the masked tokens in a row, (N,), in float32. NumPy picks them many times as fast as torch."""
    values = values.detach().float()
    return values[mask] if values.device.type != "cpu" else torch.from_numpy(values.numpy()[mask.numpy()])


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest of the values (N,), a scalar; 1 is the smallest, NaN is larger than all numbers."""
    if values.device.type != "cpu":
        return values.kthvalue(k).values
    return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1 : k])[0]


def lengths(mask: Tensor) -> Tensor:
    """Number of masked tokens of each row, (B, 1), in float."""
    words, rest = divmod(mask.shape[1], 8)
    aligned = not (rest or mask.stride(0) % 8 or mask.storage_offset() % 8)
    if mask.dtype == torch.bool and mask.numel() and mask.is_contiguous() and aligned:
        run = max(size for size in range(1, 256) if words % size == 0)
        if run >= 8:
            return _lengths_by_words(mask, run)
    return by_blocks(lambda mask: as_numbers(mask).sum(-1, keepdim=True), mask)


def _lengths_by_words(mask: Tensor, run: int) -> Tensor:
    """Eight tokens at a time: each byte of a sum of up to 255 words of a bool is a count, which does not overflow."""
    counts = mask.view(torch.int64).view(-1, run).sum(1)
    return counts.view(torch.uint8).view(len(mask), -1).sum(1, keepdim=True, dtype=torch.float32)


def as_numbers(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The mask as 0 and 1. A bool is read as a byte, which torch converts eight times as fast."""
    return (mask.view(torch.uint8) if mask.dtype == torch.bool else mask).to(dtype)


def by_blocks(compute: Callable[..., Tensor], *columns: Tensor, out: Tensor | None = None) -> Tensor:
    """`compute(*columns)`, a function of each row alone, on blocks of rows: what it makes on the way stays in the cache.

    On a CPU this is several times faster for (B, T) than whole tensors, whose pages are new each time.

    Args:
        compute: takes as many tensors as there are columns.
        *columns: (B, 1) or (B, T) each.
        out: where the result is written; may be one of the columns.
    """
    size = max(1, CACHED // max(1, *(column.shape[1] for column in columns)))
    if len(columns[0]) <= size or columns[0].device.type != "cpu":
        result = compute(*columns)
        return result if out is None else out.copy_(result)
    parts = zip(*(column.split(size) for column in columns), strict=True)
    for place, part in enumerate(parts):
        result = compute(*part)
        if out is None:
            out = result.new_empty((len(columns[0]), *result.shape[1:]))
        out[place * size : (place + 1) * size] = result
    assert out is not None
    return out


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (B, T) with 0 outside of the mask; the same tensor if it is so already."""

    def astray(values: Tensor, mask: Tensor) -> Tensor:
        return (values * as_numbers(~mask, values.dtype)).abs_().sum(1, keepdim=True)

    return torch.where(mask, values, 0) if bool((by_blocks(astray, values, mask) != 0).any()) else values


def gaps(mask: Tensor) -> Tensor:
    """Number of gaps of each row, (B, 1), in float: places at which masked tokens follow others."""
    return by_blocks(lambda mask: lengths(mask[:, 1:] > mask[:, :-1]), mask)


def last_token(mask: Tensor) -> Tensor:
    """Index of each row's last masked token, (B, 1) int64; 0 for a row without tokens."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (mask.bool() * positions).amax(-1, keepdim=True)


def spread_segments(values: Tensor, segments: Tensor) -> Tensor:
    """Values per segment (B, N) to the tokens (B, T) of each segment; 0 for tokens of no segment or of one >= N."""
    padded = torch.nn.functional.pad(torch.nan_to_num(values), (1, 1))  # zeros before the first and behind the last
    return padded.gather(1, segments.clamp(-1, values.shape[1]) + 1)


def segment_mean(values: Tensor, segments: Tensor, mask: Tensor, count: int) -> Tensor:
    """Mean over the masked tokens of each segment 0..count-1: (B, T) -> (B, count); 0 for an absent segment."""
    known = mask.bool() & (segments >= 0) & (segments < count)
    index = torch.where(known, segments, 0)
    weights = known.to(values.dtype)
    totals = values.new_zeros((values.shape[0], count)).scatter_add(1, index, values * weights)
    sizes = values.new_zeros((values.shape[0], count)).scatter_add(1, index, weights)
    return totals / sizes.clamp(min=1)


def discounted_sum(values: Tensor, discount: float) -> Tensor:
    """sum_{k >= 0} discount^k values[:, t + k], (B, T), without a loop over tokens.

    The tokens are cut into blocks of `CHUNK`, and the sum inside a block is a product with a triangular matrix of powers.
    What comes from behind a block is one number per row, found in the same way from the blocks' own sums, and counts as
    if it stood at the block's last token.
    """
    rows, tokens = values.shape
    if discount == 0:
        return values.clone()
    if discount == 1:
        return values.flip(1).cumsum(1).flip(1)
    powers = _powers(min(tokens, CHUNK), discount, values)
    if tokens <= CHUNK:
        return values @ powers
    blocks = torch.nn.functional.pad(values, (0, -tokens % CHUNK)).view(rows, -(-tokens // CHUNK), CHUNK)
    behind = discounted_sum(blocks @ powers[:, 0], discount**CHUNK)
    blocks[:, :-1, -1] += discount * behind[:, 1:]
    return (blocks @ powers).flatten(1)[:, :tokens]


def _powers(size: int, discount: float, like: Tensor) -> Tensor:
    """Matrix M with M[s, t] = discount^(s - t) for s >= t, else 0."""
    steps = torch.arange(size, device=like.device)
    distance = steps[:, None] - steps[None, :]
    powers = torch.pow(torch.tensor(discount, dtype=like.dtype, device=like.device), distance.clamp(min=0))
    return powers * (distance >= 0)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, and 0 where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, torch.zeros_like(numerator), numerator / torch.where(empty, 1, denominator))
