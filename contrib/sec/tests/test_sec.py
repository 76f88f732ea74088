"""Facts about sec: first the numbers of the worked example."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Column, Prompts, Rollouts, concatenate
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_sec import Sec, categories, draw, mean_size, ranks, update

FEW = settings(max_examples=20, deadline=None)
NAN = float("nan")
FOUR = ["a", "b", "c", "d"]
REWARDS = [1.0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0]
LENGTHS = [3, 2, 4, 1, 4, 4, 2, 3, 1, 2, 3, 4]
GROUPS = [0] * 4 + [2] * 4 + [1] * 4
U = [1.499997, 0.499999, 0.499999, 0.499999, 0.499999, 0.499999, 1.499997, 0.499999, 0.0, 0.0, 0.0, 0.0]
values = st.floats(0, 3, width=32)


def sec_of(stack: Stack) -> Sec:
    return next(plugin for plugin in stack.plugins if isinstance(plugin, Sec))


def pool_of(names: Sequence[Any], **more: Column) -> Prompts:
    column = torch.tensor(names) if isinstance(names[0], int) else list(names)
    return make_pool(len(names), {"category": column, **more})


def opened(pool: Prompts, *plugins: Any, Q: Sequence[float] | None = None, **options: Any) -> Stack:
    """A stack that has chosen its first prompts, with these values of the categories."""
    stack = start([{"sec": options}, *plugins], pool=pool)
    stack.choose_prompts(pool, 1)
    if Q is not None:
        set_values(stack, Q=torch.tensor(Q, dtype=torch.float64))
    return stack


def set_values(stack: Stack, **state: Tensor) -> None:
    sec = sec_of(stack)
    with stack._open_state(sec):
        for name, value in state.items():
            setattr(sec.state, name, value)


def step(stack: Stack, number: int, rollouts: Rollouts) -> None:
    """A whole step from the filter on."""
    stack.begin_step(number, 10)
    kept = stack.filter_rollouts(rollouts)
    stack.end_step(kept, stack.credit(kept) if len(kept) else None)


def Q_of(stack: Stack) -> list[float]:
    return sec_of(stack).state.Q.tolist()


def chosen(stack: Stack, pool: Prompts, count: int, steps: int) -> Tensor:
    """The prompts of these steps, (steps, count), without any learning."""
    found = []
    for number in range(steps):
        stack.begin_step(number, steps)
        found.append(stack.choose_prompts(pool, count))
    return torch.stack(found)


# the worked example: four prompts, each of its own category


def test_the_probabilities_of_the_worked_example() -> None:
    Q = torch.tensor([0.2, 0.6, 0.1, 0.4], dtype=torch.float64)
    p = make(Sec, {"tau": 0.4}).probabilities(Q)
    assert p.tolist() == pytest.approx([0.16271264, 0.44229882, 0.12672073, 0.2682678], abs=1e-8)
    uniform = torch.tensor([0.03, 0.41, 0.77, 0.99, 0.25, 0.62], dtype=torch.float64)
    assert draw(p, uniform).tolist() == [0, 1, 3, 3, 1, 2]


@pytest.mark.parametrize(
    ("decay", "expected", "p"),
    [
        (True, [0.47499925, 0.3, 0.42499925, 0.2], [0.32992639, 0.21301688, 0.29115901, 0.16589772]),
        (False, [0.47499925, 0.3, 0.42499925, 0.4], None),
    ],
)
def test_the_update_of_the_worked_example(decay: bool, expected: list[float], p: list[float] | None) -> None:
    stack = opened(pool_of(FOUR), "grpo", Q=[0.2, 0.6, 0.1, 0.4], tau=0.4, decay_unseen=decay)
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=LENGTHS)
    advantages = stack.credit(rollouts).advantages
    sec = sec_of(stack)
    u = sec.utility(rollouts.scores, advantages, rollouts.groups, rollouts.mask)
    assert u.flatten().tolist() == pytest.approx(U, abs=2e-6)
    step(stack, 1, rollouts)
    assert Q_of(stack) == pytest.approx(expected, abs=1e-6)
    r = {name: value for name, value in stack.metrics.as_dict().items() if "/r/" in name}
    assert r == pytest.approx(
        {f"rlplugins/sec/r/{c}": v for c, v in zip("abc", [0.7499985, 0, 0.7499985], strict=True)}
    )
    if p is not None:
        assert sec.probabilities(sec.state.Q).tolist() == pytest.approx(p, abs=1e-6)


def test_advantages_per_token_are_averaged_in_size_and_over_the_mask() -> None:
    class PerToken(Plugin):
        name = "per_token"

        @hookimpl
        def compute_advantages(self, mask: Tensor) -> Tensor:
            return torch.tensor([[1.0, -3.0, 2.0, 9.0], [-1.0, 0.0, 7.0, 7.0]]) * mask

    stack = opened(pool_of(FOUR), PerToken(), alpha=1.0)
    step(stack, 1, make_rollouts([1.0, 0.0], [1, 1], lengths=[3, 2], tokens=4))
    assert Q_of(stack) == pytest.approx([0, (2 + 0.5) / 2, 0, 0])


@FEW
@given(st.data())
def test_the_size_of_the_advantage_is_taken_before_the_mean(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=4), min_size=1, max_size=4))
    width = max(map(len, rows))
    advantages = torch.tensor([row + [0.0] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    expected = [sum(map(abs, row)) / len(row) for row in rows]
    assert mean_size(advantages, mask).flatten().tolist() == pytest.approx(expected, abs=1e-5)


# how categories are drawn


@FEW
@given(st.lists(values, min_size=1, max_size=6), st.floats(-2, 2), st.floats(0.1, 5), st.randoms())
def test_the_softmax_knows_no_constant_and_no_order(Q: list[float], constant: float, tau: float, random: Any) -> None:
    sec, given_Q = make(Sec, {"tau": tau}), torch.tensor(Q, dtype=torch.float64)
    p = sec.probabilities(given_Q)
    assert float(p.sum()) == pytest.approx(1)
    torch.testing.assert_close(sec.probabilities(given_Q + constant), p)
    order = list(range(len(Q)))
    random.shuffle(order)
    torch.testing.assert_close(sec.probabilities(given_Q[order]), p[order])


def test_the_limits_of_the_temperature() -> None:
    Q = torch.tensor([0.3, 0.9, 0.9, 0.1], dtype=torch.float64)
    assert make(Sec, {"tau": 1e9}).probabilities(Q).tolist() == pytest.approx([0.25] * 4)
    assert make(Sec, {"tau": 1e-6}).probabilities(Q).tolist() == pytest.approx([0, 0.5, 0.5, 0])
    assert make(Sec, {}).probabilities(torch.zeros(4)).tolist() == [0.25] * 4


def test_the_other_policies() -> None:
    Q = torch.tensor([0.3, -1.0, 0.0, 0.3], dtype=torch.float64)
    total = 0.3 + 0.01 + 0.01 + 0.3
    p = make(Sec, {"policy": "normalized_q"}).probabilities(Q)
    assert p.tolist() == pytest.approx([0.3 / total, 0.01 / total, 0.01 / total, 0.3 / total])
    p = make(Sec, {"policy": "greedy"}).probabilities(Q)
    assert p.tolist() == pytest.approx([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert make(Sec, {"policy": "greedy", "epsilon": 0.0}).probabilities(Q).tolist() == [1, 0, 0, 0]
    assert make(Sec, {"policy": "greedy"}).probabilities(Q[:1]).tolist() == [1]


@FEW
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.lists(st.floats(0, 1, exclude_max=True), min_size=1))
def test_the_drawn_category_is_the_number_of_cumulative_sums_at_most_the_number(p: list[float], u: list[float]) -> None:
    share = torch.tensor(p, dtype=torch.float64)
    share = share / share.sum()
    sums = share.cumsum(0).tolist()
    expected = [min(sum(edge <= x for edge in sums), len(p) - 1) for x in u]
    assert draw(share, torch.tensor(u, dtype=torch.float64)).tolist() == expected


def test_prompts_are_drawn_by_category_and_not_by_their_number() -> None:
    pool = pool_of(["many"] * 90 + ["few"] * 10)
    drawn = chosen(opened(pool), pool, 10, 40)
    assert float((drawn >= 90).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_a_large_value_attracts_the_slots() -> None:
    pool = pool_of(["a", "b"] * 20)
    drawn = chosen(opened(pool, Q=[0.0, 2.0], tau=0.5), pool, 10, 40)
    assert float((drawn % 2).double().mean()) == pytest.approx(1 / (1 + math.exp(-4)), abs=0.03)


# queues


@FEW
@given(st.lists(st.sampled_from(FOUR), min_size=3, max_size=20), st.integers(1, 7), st.integers(0, 5))
def test_no_prompt_of_a_category_comes_again_before_all_others(names: list[str], count: int, seed: int) -> None:
    pool = pool_of(names)
    stack = start(["sec"], pool=pool, seed=seed)
    drawn = []
    for number in range(6):
        stack.begin_step(number, 6, seed)
        drawn += stack.choose_prompts(pool, count).tolist()
    for name in set(names):
        members = [place for place, other in enumerate(names) if other == name]
        mine = [place for place in drawn if names[place] == name]
        for first in range(0, len(mine), len(members)):
            passed = mine[first : first + len(members)]
            assert len(set(passed)) == len(passed)
        times = Counter(mine)
        assert max(times[place] for place in members) - min(times[place] for place in members) <= 1


def test_one_category_is_random_prompts_without_replacement() -> None:
    pool = pool_of(["only"] * 12)
    drawn = chosen(start(["sec"], pool=pool), pool, 4, 6).flatten().tolist()
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))
    assert drawn[:12] != drawn[12:]


def test_a_category_smaller_than_the_step_is_repeated_within_it() -> None:
    pool = pool_of(["a", "b", "b"])
    drawn = chosen(opened(pool, Q=[9.0, 0.0], tau=0.1), pool, 5, 1)
    assert drawn.tolist() == [[0] * 5]


def test_queues_stay_as_short_as_a_category_and_a_step() -> None:
    pool = pool_of(["a", "b"] * 8)
    stack = opened(pool, Q=[9.0, 0.0], tau=0.5)
    chosen(stack, pool, 4, 30)
    assert max(map(len, sec_of(stack).state.queues)) < 4 + 8


@FEW
@given(st.lists(st.sampled_from(FOUR), min_size=6, max_size=20), st.integers(1, 6), st.integers(0, 5))
def test_one_pass_takes_every_prompt_once_and_then_ends(names: list[str], count: int, seed: int) -> None:
    pool = pool_of(names)
    stack = start([{"sec": {"endless": False}}], pool=pool, seed=seed)
    drawn = []
    for number in range(len(names) // count):
        stack.begin_step(number, 20, seed)
        drawn += stack.choose_prompts(pool, count).tolist()
    assert len(set(drawn)) == len(drawn)
    stack.begin_step(19, 20, seed)
    with pytest.raises(HookError, match=rf"sec\.choose_prompts.*{len(names) % count} prompts are left"):
        stack.choose_prompts(pool, count)


def test_in_one_pass_random_categories_that_still_have_prompts_stand_in_for_empty_ones() -> None:
    pool, seen = pool_of(["a"] * 2 + ["b"] * 20 + ["c"] * 20), Counter()
    for seed in range(60):
        stack = start([{"sec": {"endless": False, "tau": 0.01}}], pool=pool, seed=seed)
        stack.choose_prompts(pool, 1)
        set_values(stack, Q=torch.tensor([9.0, 0.0, 0.0], dtype=torch.float64))
        stack.begin_step(1, 10, seed)
        seen.update(pool["category"][place] for place in stack.choose_prompts(pool, 6).tolist())
    assert 60 <= seen["a"] <= 120 and seen["b"] / (seen["b"] + seen["c"]) == pytest.approx(0.5, abs=0.1)


@FEW
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_ranks_count_what_stands_before(arms: list[int]) -> None:
    assert ranks(torch.tensor(arms)).tolist() == [arms[:place].count(arm) for place, arm in enumerate(arms)]


# what is learnt


@FEW
@given(st.integers(2, 9), st.data())
def test_binary_rewards_pay_most_at_a_half(G: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, G))
    p = successes / G
    rollouts = make_rollouts([1.0] * successes + [0.0] * (G - successes), [0] * G)
    for ddof, factor in ((0, 1.0), (1, math.sqrt((G - 1) / G))):
        method = {"advantage_scale": {"group_std": {"ddof": ddof, "eps": 1e-9}}}
        stack = opened(pool_of(FOUR), "grpo", alpha=1.0)
        stack = start([{"sec": {"alpha": 1.0}}, "grpo"], pool=pool_of(FOUR), owners=method)
        stack.choose_prompts(pool_of(FOUR), 1)
        step(stack, 1, rollouts)
        assert Q_of(stack)[0] == pytest.approx(factor * 2 * math.sqrt(p * (1 - p)), abs=1e-4)


def test_solved_and_hopeless_categories_fade() -> None:
    stack = opened(pool_of(FOUR), "grpo", Q=[0.8, 0.8, 0.8, 0.8])
    step(stack, 1, make_rollouts([1.0, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]))
    assert Q_of(stack)[:2] == pytest.approx([0.4, 0.4]) and Q_of(stack)[2] > 0.7


def test_rows_count_and_not_prompts() -> None:
    pool = pool_of(["a", "a", "b", "b"])
    stack = opened(pool, "dr_grpo", alpha=1.0)
    step(stack, 1, make_rollouts([1.0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]))
    assert Q_of(stack)[0] == pytest.approx((0.75 + 3 * 0.25) / 6)  # and not (0.375 + 0) / 2


def test_nothing_is_learnt_with_alpha_0() -> None:
    stack = opened(pool_of(FOUR), "grpo", alpha=0.0)
    step(stack, 1, make_rollouts(REWARDS, GROUPS))
    assert Q_of(stack) == [0, 0, 0, 0]


@FEW
@given(st.lists(st.tuples(values, values, st.booleans()), min_size=1, max_size=5), st.floats(0, 1))
def test_the_update_is_a_running_mean(arms: list[tuple[float, float, bool]], alpha: float) -> None:
    Q, r, seen = (torch.tensor(column, dtype=torch.float64) for column in zip(*arms, strict=True))
    new = update(Q, r, alpha)
    torch.testing.assert_close(new, Q + alpha * (r - Q))
    kept = update(Q, r, alpha, seen.bool())
    torch.testing.assert_close(kept, torch.where(seen.bool(), new, Q))


def test_unnormalised_advantages_do_not_depend_on_the_scale() -> None:
    rollouts = make_rollouts([3.0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 2, 2])
    for method in ("grpo", "dr_grpo", "rloo"):
        stack = opened(pool_of(FOUR), method, alpha=1.0, objective="unnormalized_adv")
        step(stack, 1, rollouts)
        assert Q_of(stack) == pytest.approx([0, (2.25 + 3 * 0.75) / 4, 0, 0])


def test_progress_is_the_gain_since_the_last_visit() -> None:
    stack = opened(pool_of(FOUR), alpha=1.0, objective="progress")
    expected = [[0.5, 0, 0, 0], [0.25, 0, 0, 0], [0, 1, 0, 0], [-0.75, -1, 0, 0]]
    steps = [([1.0, 0], [0, 0]), ([1.0, 1, 1, 0], [0] * 4), ([1.0, 1], [1, 1]), ([0.0, 0, 0, 0], [0, 0, 1, 1])]
    for number, ((scores, groups), values) in enumerate(zip(steps, expected, strict=True)):
        step(stack, number, make_rollouts(scores, groups))
        assert Q_of(stack) == pytest.approx(values)


def test_with_progress_unseen_categories_decay_or_stay() -> None:
    for decay, expected in ((True, [0.25, 0.5, 0, 0]), (False, [0.5, 0.5, 0, 0])):
        stack = opened(pool_of(FOUR), objective="progress", decay_unseen=decay)
        step(stack, 0, make_rollouts([1.0, 1], [0, 0]))
        step(stack, 1, make_rollouts([1.0, 1], [1, 1]))
        assert Q_of(stack) == pytest.approx(expected)


# rows that say nothing


def test_empty_responses_missing_rewards_dropped_rows_and_rows_from_elsewhere_are_left_out() -> None:
    class Extra(Plugin):
        name = "extra"
        kinds = frozenset({"expert"})

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return (scores.nan_to_num() < 9).float()

    drawn = make_rollouts([3.0, 0, 0, 0, NAN, 9], [1] * 6, lengths=[2, 0, 3, 1, 4, 4])
    kinds = {"kind": torch.ones(2, dtype=torch.int8), "kinds": ("policy", "expert")}
    expert = make_rollouts([1.0, 0.75], [-1, 1], **kinds)  # the second leaves the mean of its group as it is
    stack = opened(pool_of(FOUR), Extra(), "dr_grpo", alpha=1.0)
    step(stack, 1, concatenate([drawn, expert]))
    assert Q_of(stack) == pytest.approx([0, (2.25 + 0.75 + 0.75) / 3, 0, 0])
    outside = replace(make_rollouts([1.0, 0], [1, 1]), prompt_rows=torch.tensor([-1, -1]))
    step(stack, 2, outside)
    assert Q_of(stack) == [0, 0, 0, 0]


@pytest.mark.parametrize("decay", [True, False])
def test_a_category_all_of_whose_rows_are_dropped_is_as_unseen(decay: bool) -> None:
    class Nothing(Plugin):
        name = "nothing"

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return torch.zeros_like(scores)

    stack = opened(pool_of(FOUR), Nothing(), Q=[0.8, 0.4, 0, 0], decay_unseen=decay)
    step(stack, 1, make_rollouts([1.0, 0], [0, 0]))
    assert Q_of(stack) == pytest.approx([0.4, 0.2, 0, 0] if decay else [0.8, 0.4, 0, 0])


def test_a_category_of_a_single_row_has_its_own_utility() -> None:
    class Raw(Plugin):
        name = "raw"
        uses = {"baseline": "zero", "advantage_scale": "one"}

    stack = opened(pool_of(FOUR), Raw(), alpha=1.0)
    step(stack, 1, make_rollouts([-2.0, 0.5], [2, 3]))
    assert Q_of(stack) == pytest.approx([0, 0, 2.0, 0.5])


def test_a_step_before_any_prompt_was_chosen_changes_nothing() -> None:
    stack = start(["sec"], pool=pool_of(FOUR))
    step(stack, 0, make_rollouts([1.0, 0], [0, 0]))
    assert Q_of(stack) == []


# categories


def test_several_features_and_numbers_make_one_category() -> None:
    pool = make_pool(6, {"level": torch.tensor([10, 2, 2, 10, 2, 2]), "kind": ["x", "x", "y", "x", "y", "x"]})
    names, arms = categories(pool, ["level", "kind"])
    assert names == ["2-x", "2-y", "10-x"]
    assert [names[arm] for arm in arms.tolist()] == ["10-x", "2-x", "2-y", "10-x", "2-y", "2-x"]
    assert categories(pool, ["kind"])[0] == ["x", "y"]


def test_a_missing_field_is_named() -> None:
    pool = make_pool(4, {"level": [1, 2, 3, 4]})
    with pytest.raises(ConfigurationError, match=r"sec\.features.*no field 'category'.*level"):
        start(["sec"], pool=pool).choose_prompts(pool, 2)
    with pytest.raises(StackError, match="sec needs column 'kind'"):
        Stack([{"sec": {"features": ["level", "kind"]}}],
              trainer=Trainer("t", columns=frozenset({"level"}), provides=frozenset({"prompts_after_update"})))  # fmt: skip


def test_curves_per_category_unless_there_are_too_many() -> None:
    def curves(pool: Prompts) -> Mapping[str, float]:
        stack = start(["sec"], pool=pool)
        stack.choose_prompts(pool, 2)
        return stack.metrics.as_dict()

    assert curves(pool_of(["a", "b"])) == {f"rlplugins/sec/{k}": v for k, v in
                                           {"p/a": 0.5, "p/b": 0.5, "Q/a": 0, "Q/b": 0}.items()}  # fmt: skip
    assert curves(pool_of(list(range(40)))) == {}


# state


def test_a_restored_run_goes_on_exactly(tmp_path: Any) -> None:
    for objective in ("adv", "progress"):
        stacks = []
        for _ in range(2):
            pool = pool_of(FOUR * 3)
            stacks.append((start([{"sec": {"objective": objective}}, "grpo"], pool=pool), pool))
        (first, pool), (second, other) = stacks
        first.choose_prompts(pool, 4)
        step(first, 0, make_rollouts(REWARDS, GROUPS))
        first.save(tmp_path / objective, 1)
        assert second.load(tmp_path / objective) == 1
        for stack in (first, second):
            stack.begin_step(1, 10)
        assert torch.equal(first.choose_prompts(pool, 4), second.choose_prompts(other, 4))
        for stack in (first, second):
            step(stack, 3, make_rollouts([1.0, 0, 0], [2, 2, 2]))
        assert Q_of(first) == Q_of(second) != [0, 0, 0, 0]


def test_a_run_resumed_with_other_prompts_keeps_what_it_knows_of_categories(tmp_path: Any) -> None:
    stack = opened(pool_of(["a", "b", "c"]), Q=[0.1, 0.2, 0.3])
    stack.save(tmp_path / "state", 1)
    pool = make_pool(5, {"category": ["c", "new", "b", "c", "new"]})
    other = start(["sec"], pool=pool)
    other.load(tmp_path / "state")
    drawn = chosen(other, pool, 5, 4)
    state = sec_of(other).state
    assert state.categories == ["b", "c", "new"] and state.Q.tolist() == [0.2, 0.3, 0]
    assert set(drawn.flatten().tolist()) == set(range(5))
    step(other, 5, make_rollouts([1.0, 0], [3, 3], pool=pool))
    assert Q_of(other)[1] > 0.3 and Q_of(other)[0] == pytest.approx(0.1)


def test_seeds_and_steps_give_other_prompts_and_a_repetition_the_same() -> None:
    pool = pool_of(FOUR * 8)

    def first(seed: int) -> list[int]:
        stack = start(["sec"], pool=pool, seed=seed)
        return stack.choose_prompts(pool, 8).tolist()

    assert first(0) == first(0) != first(1)


# the stack


def test_other_ways_to_choose_prompts_are_refused() -> None:
    class Weights(Plugin):
        name = "weights"

        @hookimpl
        def prompt_weights(self, prompts: Prompts) -> Tensor:
            return torch.ones(len(prompts))

    with pytest.raises(StackError, match=r"weights\.prompt_weights gives `prompt_weights`, but nobody reads it"):
        Stack(["sec", Weights()])

    class Owner(Plugin):
        name = "owner"

        @hookimpl
        def choose_prompts(self, count: int) -> Tensor:
            return torch.arange(count)

    with pytest.raises(StackError, match="choose_prompts has one owner"):
        Stack(["sec", Owner()])
    with pytest.raises(StackError, match="sec needs prompts chosen after the previous update"):
        Stack(["sec"], trainer=Trainer("ahead", columns=frozenset({"category"})))


def test_objectives_of_rewards_take_one_per_response() -> None:
    Stack(["sec", stand_in(breaks=["response_rewards"])])
    for objective in ("unnormalized_adv", "progress"):
        with pytest.raises(StackError, match=r"response_rewards.*sec assumes it, other breaks it"):
            Stack([{"sec": {"objective": objective}}, stand_in(breaks=["response_rewards"])])


def test_credit_and_loss_are_untouched() -> None:
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=LENGTHS)
    log_probs = -0.4 * rollouts.mask
    plain, with_sec = start(["grpo"]), opened(pool_of(FOUR), "grpo")
    for one, other in zip(loss_and_gradient(plain, rollouts, log_probs),
                          loss_and_gradient(with_sec, rollouts, log_probs, micro_batches=3), strict=True):  # fmt: skip
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize(
    "options",
    [{"alpha": -0.1}, {"alpha": 1.1}, {"tau": 0}, {"tau": float("inf")}, {"objective": "regret"}, {"policy": "ucb"},
     {"epsilon": 1.5}, {"features": []}, {"decay_unseen": "often"}, {"halflife": 3}],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"sec\.{next(iter(options))}"):
        make(Sec, options)


# what every plugin must do

test_conformance = conformance(
    "sec",
    [{}, {"objective": "unnormalized_adv", "policy": "normalized_q", "decay_unseen": False},
     {"objective": "progress", "policy": "greedy"}, {"endless": False}],
    prompts=lambda count: {"category": [FOUR[place % 3] for place in range(count)]},
)  # fmt: skip
