from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.rollouts import Prompts, Rollouts
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_knapsack import (
    Knapsack,
    allocate,
    gain,
    info_gain,
    nonzero_probability,
    rollouts_to_both,
    value,
)

MANY = settings(max_examples=120, deadline=None)
FEW = settings(max_examples=20, deadline=None)
UNKNOWN = math.nan
interior = st.integers(1, 15).map(lambda k: k / 16) | st.floats(1e-3, 1 - 1e-3)
any_rate = interior | st.sampled_from([0.0, 1.0, UNKNOWN])


def rates(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def counts(p: list[float], *arguments: float, **options: float) -> list[int]:
    return allocate(rates(*p), *arguments, **options).tolist()


def plugin_of(stack: Stack) -> Knapsack:
    return next(plugin for plugin in stack.plugins if isinstance(plugin, Knapsack))


def started(p: list[float], **options: float) -> tuple[Stack, Prompts]:
    """A stack that remembers the rates p."""
    pool = make_pool(len(p))
    stack = start([{"knapsack": options}], pool=pool)
    plugin_of(stack).table["rate"][:] = rates(*p)
    return stack, pool


def step(stack: Stack, number: int, rollouts: Rollouts) -> None:
    stack.begin_step(number, 10)
    kept = stack.filter_rollouts(rollouts)
    stack.end_step(kept, stack.credit(kept))


# slow solvers to compare with


def one_by_one(p: list[float], N_tot: int, N_lo: int, N_up: int, min_gain: float) -> list[int]:
    """The allocation as a loop over single rollouts."""
    if len(p) * N_lo > N_tot:
        return [max(1, N_tot // len(p))] * len(p)
    given_out = [min(N_up, max(N_lo, N_tot // len(p))) if math.isnan(x) else N_lo for x in p]

    def gain_of(i: int) -> float:
        x, N = p[i], given_out[i]
        return x * (1 - x) ** 2 * (x**N * (1 - x) + (1 - x) ** N * x)

    inside = [i for i, x in enumerate(p) if 0 < x < 1]
    while sum(given_out) < N_tot:
        waiting = [i for i in inside if given_out[i] < N_up]
        if not waiting or gain_of(best := max(waiting, key=gain_of)) <= min_gain:
            break
        given_out[best] += 1
    classes = [[i for i, x in enumerate(p) if x == 0], inside, [i for i, x in enumerate(p) if x == 1],
               [i for i, x in enumerate(p) if math.isnan(x)]]  # fmt: skip
    for members in classes:
        while sum(given_out) < N_tot and any(given_out[i] < N_up for i in members):
            for i in members:
                if given_out[i] < N_up and sum(given_out) < N_tot:
                    given_out[i] += 1
    return given_out


def best_value(p: list[float], N_tot: int, N_lo: int, N_up: int) -> float:
    """Largest total value by dynamic programming over the budget."""
    best = {0: 0.0}
    for x in p:
        worth = {N: (1 - x**N - (1 - x) ** N) * x * (1 - x) ** 2 for N in range(N_lo, N_up + 1)}
        after: dict[int, float] = {}
        for spent, total in best.items():
            for N, v in worth.items():
                if spent + N <= N_tot:
                    after[spent + N] = max(after.get(spent + N, -1.0), total + v)
        best = after
    return max(best.values())


# the worked example


def test_the_allocation_of_the_worked_example():
    stack, pool = started([0.05, 0.25, 0.5, 0.9, 0.0, 1.0], N_up=16)
    given_out = stack.allocate_rollouts(pool, 48)
    assert given_out.tolist() == [16, 15, 8, 5, 2, 2]
    p = plugin_of(stack).table["rate"]
    close = {"rtol": 1e-7, "atol": 0}
    torch.testing.assert_close(
        nonzero_probability(given_out, p), rates(0.55987333, 0.98663654, 0.9921875, 0.4095, 0, 0), **close
    )
    values = value(given_out, p)
    torch.testing.assert_close(values, rates(0.025264284, 0.13874576, 0.12402344, 0.0036855, 0, 0), **close)
    assert float(values.sum()) == pytest.approx(0.29171898, rel=1e-7)
    assert float(value(8, p).sum()) == pytest.approx(0.27088186, rel=1e-7)
    assert stack.metrics.as_dict()["rlplugins/knapsack/value"] == pytest.approx(0.29171898, rel=1e-7)
    torch.testing.assert_close(rollouts_to_both(p[:4]), rates(20.052632, 4.3333333, 3.0, 10.111111), **close)
    assert rollouts_to_both(p[4:]).isinf().all()


def test_the_other_cases_of_the_worked_example():
    stack, pool = started([0.0, 1.0, 0.5, 0.0], N_up=16)
    assert stack.allocate_rollouts(pool, 40).tolist() == [11, 2, 16, 11]
    stack, pool = started([0.5, 0.25, 0.5, 0.5])
    assert stack.allocate_rollouts(pool, 400).tolist() == [91, 128, 91, 90]
    stack, pool = started([0.5, 0.25, 0.5, 0.5], min_gain=1e-6)
    assert stack.allocate_rollouts(pool, 400).tolist() == [95, 115, 95, 95]
    stack, pool = started([UNKNOWN, 0.25, 0.9, UNKNOWN], N_up=16)
    assert stack.allocate_rollouts(pool, 32).tolist() == [8, 14, 2, 8]
    assert float(value(8, rates(1 / 3))) == pytest.approx(0.14234506, rel=1e-7)


# exactness


@MANY
@given(st.lists(any_rate, min_size=1, max_size=9), st.integers(1, 250), st.integers(1, 4), st.integers(0, 30),
       st.sampled_from([0.0, 1e-6, 1e-3]))  # fmt: skip
def test_it_is_what_giving_out_one_rollout_at_a_time_leads_to(
    p: list[float], N_tot: int, N_lo: int, more: int, min_gain: float
):
    assert counts(p, N_tot, N_lo, N_lo + more, min_gain) == one_by_one(p, N_tot, N_lo, N_lo + more, min_gain)


@FEW
@given(st.lists(interior, min_size=1, max_size=5), st.integers(2, 60), st.integers(2, 20))
def test_it_is_the_optimum_of_dynamic_programming(p: list[float], N_tot: int, N_up: int):
    N_tot = max(N_tot, 2 * len(p))
    found = float(value(allocate(rates(*p), N_tot, 2, N_up), rates(*p)).sum())
    assert found == pytest.approx(best_value(p, N_tot, 2, N_up), rel=1e-12)


@FEW
@given(st.lists(interior, min_size=1, max_size=3), st.integers(6, 20))
def test_no_other_allocation_is_worth_more(p: list[float], N_tot: int):
    best = max(
        float(value(torch.tensor(other), rates(*p)).sum())
        for other in itertools.product(range(2, 9), repeat=len(p))
        if sum(other) <= N_tot
    )
    assert float(value(allocate(rates(*p), N_tot, 2, 8), rates(*p)).sum()) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_large_instances_leave_no_profitable_exchange(seed: int):
    source = torch.Generator().manual_seed(seed)
    p = torch.rand(3000, generator=source, dtype=torch.float64)
    p = p if seed % 2 else (p * 16).round() / 16
    N_tot = 3000 * (3 + 2 * seed)
    given_out = allocate(p, N_tot)
    assert int(given_out.sum()) == N_tot and int(given_out.min()) == 2 and int(given_out.max()) <= 128
    inside = (p > 0) & (p < 1)
    next_gain = torch.where(inside & (given_out < 128), gain(given_out, p), 0.0)
    last_gain = torch.where(inside & (given_out > 2), gain(given_out - 1, p), torch.inf)
    assert next_gain.max() <= last_gain.min()
    for rate in p[inside].unique():
        alike = given_out[p == rate]
        assert bool((alike[1:] <= alike[:-1]).all()) and int(alike[0] - alike[-1]) <= 1


def test_gains_are_not_lost_to_rounding():
    p = rates(0.5, 0.5)
    assert float(value(80, p)[0] - value(79, p)[0]) == 0 < float(gain(79, p)[0])
    assert counts([0.5, 0.5, 0.0], 240, 2, 128) == [119, 119, 2]


@FEW
@given(interior, st.integers(1, 30))
def test_the_gain_is_the_next_rollouts_value(p: float, N: int):
    difference = value(N + 1, rates(p)) - value(N, rates(p))
    torch.testing.assert_close(gain(N, rates(p)), difference, rtol=1e-6, atol=1e-15)
    assert 0 < gain(N + 1, rates(p)) < gain(N, rates(p))


# identities


@FEW
@given(interior | st.sampled_from([0.0, UNKNOWN]), st.integers(1, 12), st.integers(2, 200))
def test_equal_rates_share_equally_and_the_first_get_one_more(p: float, M: int, N_tot: int):
    N_tot = max(N_tot, 2 * M)
    each, rest = divmod(N_tot, M)
    assert counts([p] * M, N_tot, 2, 1000) == [each + (i < rest) for i in range(M)]


@FEW
@given(st.lists(any_rate, min_size=1, max_size=9), st.integers(2, 16))
def test_with_both_bounds_equal_it_is_uniform(p: list[float], G: int):
    assert counts(p, G * len(p), G, G) == [G] * len(p)


@FEW
@given(st.lists(any_rate, min_size=1, max_size=9), st.integers(0, 300))
def test_the_whole_budget_is_given_out_if_it_fits(p: list[float], N_tot: int):
    N_tot = max(2 * len(p), min(N_tot, 20 * len(p)))
    assert sum(counts(p, N_tot, 2, 20)) == N_tot
    assert sum(counts(p, 20 * len(p) + 7, 2, 20)) == 20 * len(p)


@FEW
@given(st.lists(interior | st.sampled_from([0.0, 1.0]), min_size=1, max_size=12), st.integers(2, 16))
def test_it_is_never_worth_less_than_uniform(p: list[float], G: int):
    total = value(allocate(rates(*p), G * len(p), 2, 128), rates(*p)).sum()
    assert float(total) >= float(value(G, rates(*p)).sum()) - 1e-12


@FEW
@given(st.floats(0.05, 0.49), st.integers(8, 40))
def test_hard_prompts_get_more_than_easy_ones_as_far_from_one_half(p: float, N_tot: int):
    assert float(nonzero_probability(5, rates(p))) == pytest.approx(float(nonzero_probability(5, rates(1 - p))))
    hard, easy = counts([p, 1 - p], N_tot)
    assert hard >= easy and info_gain(rates(p)) > info_gain(rates(1 - p))


def test_certain_prompts_get_the_fewest_unless_something_is_left():
    assert counts([0.0, 0.4, 1.0], 60) == [2, 56, 2]
    assert counts([0.0, 0.4, 1.0], 60, 2, 16) == [16, 16, 16]
    assert counts([1.0, 0.4, 0.0], 40, 2, 16) == [8, 16, 16]
    assert counts([0.0] * 4, 34) == [9, 9, 8, 8]


def test_what_is_left_goes_to_the_failed_the_open_the_solved_and_the_unknown_in_turn():
    p = [UNKNOWN, 1.0, 0.5, 0.0]
    assert counts(p, 26, 2, 8, min_gain=1.0) == [6, 4, 8, 8]
    assert counts(p, 20, 2, 8, min_gain=1.0) == [5, 2, 5, 8]
    assert counts(p, 30, 2, 8, min_gain=1.0) == [7, 7, 8, 8]
    assert counts(p, 31, 2, 8, min_gain=1.0) == [7, 8, 8, 8]
    assert counts(p, 99, 2, 8) == [8, 8, 8, 8]


def test_a_gain_of_exactly_min_gain_is_not_worth_it():
    assert float(gain(2, rates(0.5))) == 1 / 32
    assert counts([0.5, 0.0], 9, 2, 128, min_gain=1 / 32) == [2, 7]
    assert counts([0.5, 0.0], 9, 2, 128, min_gain=1 / 33) == [3, 6]
    assert counts([1e-300, 0.0], 9) == [2, 7]  # a gain too small for a float is none


def test_a_single_prompt_gets_everything_up_to_the_bound():
    for p in (0.3, 0.0, 1.0, UNKNOWN):
        assert counts([p], 50) == [50]
        assert counts([p], 500) == [128]


@FEW
@given(st.lists(interior, min_size=2, max_size=8, unique=True), st.randoms(use_true_random=False), st.integers(20, 90))
def test_the_order_of_different_prompts_does_not_matter(p: list[float], random, N_tot: int):
    order = list(range(len(p)))
    random.shuffle(order)
    there = counts(p, N_tot)
    assert counts([p[i] for i in order], N_tot) == [there[i] for i in order]


def test_a_small_budget_is_shared_equally_with_a_warning():
    stack, pool = started([0.5, 0.2, UNKNOWN])
    with pytest.warns(UserWarning, match="5 rollouts are too few for 3 prompts"):
        assert stack.allocate_rollouts(pool, 5).tolist() == [1, 1, 1]
    with pytest.warns(UserWarning, match="too few"):
        assert stack.allocate_rollouts(pool, 2).tolist() == [1, 1, 1]
    stack, pool = started([0.5, 0.2, UNKNOWN], N_lo=4)
    with pytest.warns(UserWarning, match="at least 4"):
        assert stack.allocate_rollouts(pool, 11).tolist() == [3, 3, 3]


def test_the_first_epoch_is_uniform():
    stack, pool = start(["knapsack"], pool=(pool := make_pool(5))), pool
    assert stack.allocate_rollouts(pool, 42).tolist() == [9, 9, 8, 8, 8]
    assert stack.metrics.as_dict()["rlplugins/knapsack/known"] == 0


def test_tiny_and_huge_rates_keep_the_sum():
    p = [1e-300, 1e-12, 0.5, 1 - 1e-16, 1 - 1e-12, 5e-324]
    assert sum(counts(p, 120)) == 120
    assert sum(counts(p, 600)) == 600


def test_the_bounds_have_an_effect():
    assert counts([0.5, 0.0], 30, 5, 128) == [25, 5]
    assert counts([0.5, 0.0], 30, 2, 20) == [20, 10]


# size


def test_a_large_batch_is_allocated_exactly():
    p = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert int(allocate(p, 1_600_000).sum()) == 1_600_000


# what is remembered


def test_the_rate_of_the_last_visit_replaces_the_old_one():
    stack, pool = started([UNKNOWN] * 4)
    step(stack, 0, make_rollouts([1.0, 0.0, 0.0, 1.0, 0.6], [0, 0, 0, 2, 2], pool=pool))
    rate = plugin_of(stack).table["rate"]
    assert rate[[0, 2]].tolist() == [1 / 3, 1.0] and rate[[1, 3]].isnan().all()
    assert stack.metrics.as_dict()["rlplugins/knapsack/mixed_groups"] == 0.5
    step(stack, 1, make_rollouts([1.0, 1.0], [0, 0], pool=pool))
    assert rate[[0, 2]].tolist() == [1.0, 1.0]


def test_a_success_is_a_raw_score_above_the_threshold():
    class Shaped(Plugin):
        name = "shaped"

        @hookimpl
        def shape_rewards(self, rewards: Tensor) -> Tensor:
            return rewards - 10

    for threshold, expected in ((0.5, 0.25), (0.2, 0.75), (-1.0, 1.0)):
        pool = make_pool(1)
        stack = start([{"knapsack": {"threshold": threshold}}, Shaped()], pool=pool)
        step(stack, 0, make_rollouts([0.0, 0.3, 0.5, 0.9], [0] * 4, pool=pool))
        assert plugin_of(stack).table["rate"].tolist() == [expected]


def test_filtered_rows_count_and_rows_without_a_score_or_of_another_kind_do_not():
    class Filter(Plugin):
        name = "filter"
        kinds = frozenset({"expert"})

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return (scores > 0.5).float()

    pool = make_pool(3)
    stack = start(["knapsack", Filter()], pool=pool)
    plugin_of(stack).table["rate"][:] = rates(0.1, 0.2, 0.3)
    scores = [1.0, 0.0, 0.0, UNKNOWN, UNKNOWN, 1.0]
    kind = torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int8)
    rollouts = make_rollouts(scores, [0, 0, 0, 0, 1, 2], pool=pool, kind=kind, kinds=("policy", "expert"))
    step(stack, 0, rollouts)
    assert plugin_of(stack).table["rate"].tolist() == [1 / 3, 0.2, 0.3]


def test_a_prompt_outside_of_the_pool_is_not_remembered():
    stack, pool = started([0.5, 0.25])
    rollouts = make_rollouts([1.0, 1.0], [0, 1], pool=pool)
    rollouts.prompt_rows = torch.tensor([0, -1])
    step(stack, 0, rollouts)
    assert plugin_of(stack).table["rate"].tolist() == [1.0, 0.25]


def test_a_step_without_any_score_changes_nothing():
    stack, pool = started([0.5, 0.25])
    step(stack, 0, make_rollouts([UNKNOWN] * 2, [0, 1], pool=pool))
    assert plugin_of(stack).table["rate"].tolist() == [0.5, 0.25]


def test_a_restored_stack_allocates_the_same(tmp_path):
    stack, pool = started([UNKNOWN] * 5)
    step(stack, 0, make_rollouts([1.0, 0.0, 0.0, 1.0, 0.0], [3, 3, 3, 1, 1], pool=pool))
    stack.save(tmp_path / "state", 0)
    other, other_pool = started([0.9] * 5)
    assert other.load(tmp_path / "state") == 0
    other.begin_step(1, 10)
    stack.begin_step(1, 10)
    expected = stack.allocate_rollouts(pool, 50)
    assert torch.equal(other.allocate_rollouts(other_pool, 50), expected)
    assert torch.equal(stack.allocate_rollouts(pool, 50), expected)
    assert len(expected.unique()) > 1


# in a stack


@pytest.mark.parametrize("micro_batches", [2, 3, 7])
def test_unequal_groups_train_with_the_estimator_of_the_stack(micro_batches: int):
    stack = start(["grpo", "knapsack"])
    scores, groups = [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], [0, 0, 0, 0, 0, 1, 1]
    rollouts = make_rollouts(scores, groups, lengths=[3, 1, 2, 4, 0, 2, 2])
    plain = start(["grpo"]).credit(rollouts)
    assert torch.equal(stack.credit(rollouts).advantages, plain.advantages)
    log_probs = -torch.rand((7, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * rollouts.mask
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    parts, same = loss_and_gradient(stack, rollouts, log_probs, micro_batches=micro_batches)
    torch.testing.assert_close(parts, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-12)


class Allocator(Plugin):
    name = "allocator"

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts) -> Tensor:
        return torch.ones(len(prompts), dtype=torch.int64)


def test_conflicts_are_refused():
    with pytest.raises(StackError, match=r"equal_groups.*other assumes it, knapsack breaks it"):
        Stack(["knapsack", stand_in(assumes=["equal_groups"])])
    Stack(["knapsack", stand_in(assumes=["equal_groups"])], allow=["equal_groups"])
    with pytest.raises(StackError, match="allocate_rollouts has one owner"):
        Stack(["knapsack", Allocator()])
    with pytest.raises(StackError, match="knapsack needs 2 or more"):
        Stack(["knapsack"], trainer=Trainer("single", group_size=1))


def test_spo_is_refused_because_it_forbids_the_groups_that_knapsack_needs():
    pytest.importorskip("rlplugins_spo")
    with pytest.raises(StackError) as refused:
        Stack(["spo", "knapsack"])
    text = str(refused.value)
    assert "allocate_rollouts" in text and "spo needs exactly 1" in text and "knapsack needs 2 or more" in text


@pytest.mark.parametrize(
    "options", [{"N_lo": 1}, {"N_lo": 2.5}, {"N_up": 0}, {"min_gain": -0.1}, {"threshold": "high"}, {"N_max": 3}]
)
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigurationError, match=rf"knapsack\.{next(iter(options))}"):
        Stack([{"knapsack": options}])


def test_bounds_that_do_not_fit_together_are_named():
    with pytest.raises(ConfigurationError, match=r"knapsack.*N_lo 9 is above N_up 8"):
        Stack([{"knapsack": {"N_lo": 9, "N_up": 8}}])


# what every plugin must do

test_conformance = conformance("knapsack", [{}, {"min_gain": 0.1, "N_up": 6}])
