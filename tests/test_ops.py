"""The shared reductions against loops over plain Python numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import ops

QUICK = settings(max_examples=40, deadline=None, derandomize=True)
number = st.one_of(st.floats(-100, 100, width=32), st.just(math.nan))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    ids = draw(st.sampled_from([st.integers(-1, 3), st.sampled_from([-1, 7, 10**12, 5 * 10**9])]))
    groups = draw(st.lists(ids, min_size=rows, max_size=rows))
    values = draw(st.lists(st.lists(number, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(groups, dtype=torch.int64)


def by_loop(values: Tensor, groups: Tensor, statistic: Callable[[list[float]], float]) -> Tensor:
    result = torch.zeros_like(values)
    for i in range(len(values)):
        for n in range(values.shape[1]):
            mine = [float(values[j, n]) for j in range(len(values)) if groups[j] == groups[i] and groups[i] >= 0]
            result[i, n] = statistic([value for value in mine if not math.isnan(value)])
    return result


STATISTICS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[list[float]], float]]] = {
    "sum": (ops.group_sum, math.fsum),
    "count": (ops.group_count, len),
    "mean": (ops.group_mean, lambda v: statistics.fmean(v) if v else 0.0),
    "std": (ops.group_std, lambda v: statistics.stdev(v) if len(v) > 1 else 0.0),
    "std of ddof 0": (lambda v, g: ops.group_std(v, g, 0), lambda v: statistics.pstdev(v) if v else 0.0),
    "largest": (ops.group_extreme, lambda v: max(v, default=0.0)),
    "smallest": (lambda v, g: ops.group_extreme(v, g, False), lambda v: min(v, default=0.0)),
}


@pytest.mark.parametrize("name", STATISTICS)
@QUICK
@given(data=grouped())
def test_group_statistics(name: str, data: tuple[Tensor, Tensor]) -> None:
    fast, slow = STATISTICS[name]
    values, groups = data
    torch.testing.assert_close(fast(values, groups), by_loop(values, groups, slow), atol=1e-6, rtol=1e-9)


@QUICK
@given(data=grouped())
def test_group_sizes_and_dense_groups(data: tuple[Tensor, Tensor]) -> None:
    _, groups = data
    listed = groups.tolist()
    assert ops.group_sizes(groups).tolist() == [listed.count(g) if g >= 0 else 0 for g in listed]
    names = list(dict.fromkeys(g for g in listed if g >= 0))
    dense, count = ops.dense_groups(groups)
    assert dense.tolist() == [names.index(g) if g >= 0 else -1 for g in listed] and count == len(names)


def test_group_statistics_of_nothing() -> None:
    none = torch.zeros((0, 1)), torch.zeros(0, dtype=torch.int64)
    for fast, _ in STATISTICS.values():
        assert fast(*none).shape == (0, 1)
    assert ops.group_sizes(none[1]).shape == (0,)


@st.composite
def masked(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 150))
    source = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.randn(rows, tokens, generator=source, dtype=torch.float64)
    return values, torch.rand(rows, tokens, generator=source) < draw(st.sampled_from([0.0, 0.5, 1.0]))


@QUICK
@given(data=masked())
def test_reductions_over_a_rows_tokens(data: tuple[Tensor, Tensor]) -> None:
    values, mask = data
    for i in range(len(values)):
        own = [t for t in range(values.shape[1]) if mask[i, t]]
        mean = sum(float(values[i, t]) for t in own) / len(own) if own else 0.0
        assert float(ops.masked_mean(values, mask)[i, 0]) == pytest.approx(mean, abs=1e-12)
        assert float(ops.lengths(mask)[i, 0]) == len(own)
        assert int(ops.last_token(mask)[i, 0]) == (own[-1] if own else 0)


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.99, 1.0])
@QUICK
@given(data=masked())
def test_discounted_sums(discount: float, data: tuple[Tensor, Tensor]) -> None:
    values, _ = data
    before, expected = values.clone(), torch.zeros_like(values)
    running = torch.zeros(len(values), dtype=values.dtype)
    for t in reversed(range(values.shape[1])):
        running = values[:, t] + discount * running
        expected[:, t] = running
    torch.testing.assert_close(ops.discounted_sum(values, discount), expected, atol=1e-9, rtol=1e-9)
    assert torch.equal(values, before)


@pytest.mark.parametrize("tokens", [ops.CHUNK - 1, ops.CHUNK, ops.CHUNK + 1, ops.CHUNK**2 + 3])
def test_discounted_sums_over_the_edges_of_blocks(tokens: int) -> None:
    ones = torch.ones(1, tokens, dtype=torch.float64)
    expected = (1 - 0.999 ** torch.arange(tokens, 0, -1, dtype=torch.float64)) / 0.001
    torch.testing.assert_close(ops.discounted_sum(ones, 0.999)[0], expected)


@st.composite
def segmented(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    units = st.lists(st.integers(-1, 4), min_size=tokens, max_size=tokens)
    segments = torch.tensor(draw(st.lists(units, min_size=rows, max_size=rows)), dtype=torch.int64)
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))), segments


@QUICK
@given(data=segmented())
def test_values_of_segments_go_to_their_tokens_and_back(data: tuple[Tensor, Tensor]) -> None:
    values, segments = data
    values[0, 0] = math.nan
    spread = ops.spread_segments(values, segments)
    mask = torch.ones_like(segments, dtype=torch.bool)
    mask[:, -1] = False
    means = ops.segment_mean(spread, segments, mask, 3)
    for i in range(len(values)):
        for t, k in enumerate(segments[i].tolist()):
            wanted = float(values[i, k]) if 0 <= k < 3 else 0.0
            assert float(spread[i, t]) == (0.0 if math.isnan(wanted) else wanted)
        for k in range(3):
            own = [float(spread[i, t]) for t in range(segments.shape[1]) if mask[i, t] and segments[i, t] == k]
            assert float(means[i, k]) == pytest.approx(statistics.fmean(own) if own else 0.0, abs=1e-6)


def test_division_by_zero_is_zero() -> None:
    result = ops.safe_divide(torch.tensor([1.0, 0.0, -3.0]), torch.tensor([0.0, 0.0, 2.0]))
    assert result.tolist() == [0, 0, -1.5]
    upper = torch.ones(2, requires_grad=True)
    ops.safe_divide(upper, torch.tensor([0.0, 4.0])).sum().backward()
    assert upper.grad.tolist() == [0, 0.25]


@QUICK
@given(first=st.lists(st.integers(-1, 4), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_rows_are_joined_by_either_number_and_through_others(first: list[int], seed: int) -> None:
    one = torch.tensor(first)
    two = torch.randint(-1, 5, (len(first),), generator=torch.Generator().manual_seed(seed))
    near = torch.eye(len(first), dtype=torch.bool)
    for part in (one, two):
        near |= (part[:, None] == part) & (part >= 0)
    reached = torch.matrix_power(near.double(), len(first)) > 0  # in at most so many steps from row to row
    assert ops.joined(one, two).tolist() == reached.int().argmax(1).tolist()


@pytest.mark.parametrize("width", [1, 7, 8, 16, 64, 1000, 2040, 2048, 2056, 4096, 4104])
@pytest.mark.parametrize("offset", [0, 3, 8])
def test_tokens_are_counted_whatever_the_width_and_where_the_rows_stand(width: int, offset: int) -> None:
    flat = torch.ones(8 + offset + 3 * width, dtype=torch.bool)
    flat[offset : offset + width : 3] = False
    mask = flat[offset:-8].view(3, width)
    counts = ops.lengths(mask)
    assert counts.dtype == torch.float32 and counts.shape == (3, 1)
    assert counts.flatten().tolist() == [sum(row) for row in mask.tolist()] == [width - -(-width // 3), width, width]
    assert ops.lengths(mask[:0]).shape == (0, 1)
    assert ops.lengths(flat.view(1, -1)[:, :8]).item() == sum(flat[:8].tolist())


@pytest.mark.parametrize("width", [1, 2, 9, 64])
def test_masked_tokens_are_summed_picked_and_their_gaps_counted(width: int) -> None:
    source = torch.Generator().manual_seed(width)
    values, mask = torch.randn(5, width, generator=source), torch.rand(5, width, generator=source) < 0.5
    rows = [[(float(v), m) for v, m in zip(*row, strict=True)] for row in zip(values, mask.tolist(), strict=True)]
    sums = [sum(value for value, there in row if there) for row in rows]
    assert ops.masked_sum(values, mask).flatten().tolist() == pytest.approx(sums, abs=1e-5)
    assert ops.masked_values(values.bfloat16(), mask).tolist() == values.bfloat16()[mask].tolist()
    starts = [sum(later > earlier for earlier, later in itertools.pairwise(row)) for row in mask.tolist()]
    assert ops.gaps(mask).flatten().tolist() == starts


@given(values=st.lists(number, min_size=1, max_size=30), place=st.floats(0, 1))
@QUICK
def test_the_kth_smallest_is_that_of_the_sorted_values_with_nan_last(values: list[float], place: float) -> None:
    k = 1 + round(place * (len(values) - 1))
    expected = sorted(values, key=lambda value: (math.isnan(value), value))[k - 1]
    assert float(ops.kth_smallest(torch.tensor(values), k)) == pytest.approx(expected, nan_ok=True)
