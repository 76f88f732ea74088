from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl, needs, ops
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.rollouts import Prompts, Rollouts, concatenate
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in
from rlplugins.testing import start as start_stack
from rlplugins.trainer import Trainer
from rlplugins_spo import Spo, drift, forgetting, sampling_weight, start, start_mean, update, update_mean

CONSTANT = {"spo": {"rho_type": "constant"}}
FEW = settings(max_examples=20, deadline=None)
unit = st.floats(0, 1, allow_subnormal=False, width=32)
binary = st.sampled_from([0.0, 1.0])


class Engine:
    """A policy that gives every token id a log-prob of its own, whatever stands before it."""

    def __init__(self, log_probs: Tensor | None = None) -> None:
        self.by_token = torch.full((100,), -1.0) if log_probs is None else log_probs
        self.calls: list[tuple[Sequence[Sequence[int]], Tensor, Tensor]] = []

    def log_probs(self, prompts: Sequence[Sequence[int]], responses: Tensor, mask: Tensor) -> Tensor:
        assert len(prompts) == len(responses) == len(mask)
        assert responses.dtype == torch.int64
        self.calls.append((prompts, responses.clone(), mask.clone()))
        return self.by_token[responses] * mask


def spo_of(stack: Stack) -> Spo:
    return next(plugin for plugin in stack.plugins if isinstance(plugin, Spo))


def column(stack: Stack, name: str) -> Tensor:
    return spo_of(stack).table[name]


def set_v(stack: Stack, v: Sequence[float], N: float = 8.0) -> None:
    column(stack, "alpha")[: len(v)] = torch.tensor(v) * N
    column(stack, "beta")[: len(v)] = (1 - torch.tensor(v)) * N


def step(stack: Stack, number: int, rollouts: Rollouts, engine: Engine | None = None) -> Tensor:
    """One whole step; the advantages."""
    stack.begin_step(number, 10)
    kept = stack.filter_rollouts(rollouts)
    credit = stack.credit(kept, engine)
    stack.end_step(kept, credit, engine)
    return credit.advantages


def advantages(scores: Sequence[float], v: Sequence[float]) -> Tensor:
    stack = start_stack([CONSTANT])
    set_v(stack, v)
    return stack.credit(make_rollouts(scores, range(len(scores)))).advantages


# the worked example


def pool_with_scores(lists: Sequence[Sequence[float] | None]) -> Prompts:
    return make_pool(len(lists), {"tries": list(lists)})


def worked_stack(**options: object) -> tuple[Stack, Prompts]:
    pool = pool_with_scores([[1.0] * count + [0.0] * (8 - count) for count in (0, 2, 5, 8)])
    return start_stack([{"spo": {"offline": "tries"} | options}], pool=pool, group_size=1), pool


def test_the_offline_start_of_the_worked_example():
    stack, pool = worked_stack()
    torch.testing.assert_close(column(stack, "alpha"), torch.tensor([0.4444444, 2.222222, 4.888889, 7.555556]))
    torch.testing.assert_close(column(stack, "beta"), torch.tensor([7.555556, 5.777778, 3.111111, 0.4444444]))
    w = spo_of(stack).prompt_weights(pool)
    expected = torch.tensor([0.2790614, 0.4979032, 0.537498, 0.2790614], dtype=torch.float64)
    torch.testing.assert_close(w, expected, rtol=1e-6, atol=0)
    p = torch.tensor([0.1751222, 0.3124541, 0.3373015, 0.1751222], dtype=torch.float64)
    torch.testing.assert_close(w / w.sum(), p, rtol=1e-6, atol=0)


def test_the_step_of_the_worked_example():
    stack, pool = worked_stack()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]])
    before = torch.tensor([[-0.5, -1.2, -0.3], [-0.9, -0.4, -0.2], [-0.1, -0.2, -0.7], [-0.6, -0.8, -0.5]])
    now = torch.tensor([[-0.49, -1.22, -0.3], [-0.896, -0.401, -0.2], [-0.2, -0.15, -0.68], [-0.6, -0.8, -0.5]])
    stored, current = torch.arange(12).view(4, 3), torch.arange(12, 24).view(4, 3)
    engine = Engine(torch.cat([before.flatten(), torch.full((12,), -2.0)]))
    counters = column(stack, "alpha").clone(), column(stack, "beta").clone()
    step(stack, 0, make_rollouts([0.0] * 4, range(4), pool=pool, responses=stored, mask=mask), engine)
    column(stack, "alpha")[:], column(stack, "beta")[:] = counters  # the example starts with stored responses

    engine.by_token[:12] = now.flatten()
    rollouts = make_rollouts([0.0, 1.0, 0.0, 1.0], range(4), pool=pool, responses=current, mask=mask)
    made = step(stack, 1, rollouts, engine)
    expected = torch.tensor([-0.1523019, 1.269183, -1.167648, 0.05076731])
    torch.testing.assert_close(made.flatten(), expected, rtol=1e-5, atol=1e-7)

    D = drift(before, now, mask)
    torch.testing.assert_close(D, torch.tensor([0.01, 0.0025, 0.05666667, 0.0]).double(), rtol=1e-5, atol=1e-7)
    rho = torch.tensor([0.8908987, 0.96, 0.875, 0.96], dtype=torch.float64)
    torch.testing.assert_close(forgetting(D), rho, rtol=1e-6, atol=0)
    alpha, beta = column(stack, "alpha"), column(stack, "beta")
    torch.testing.assert_close(alpha, torch.tensor([0.395955, 3.133333, 4.277778, 8.253333]), rtol=1e-6, atol=0)
    torch.testing.assert_close(beta, torch.tensor([7.731235, 5.546667, 3.722222, 0.4266667]), rtol=1e-6, atol=0)
    v = torch.tensor([0.04871979, 0.3609831, 0.5347222, 0.9508449])
    torch.testing.assert_close(alpha / (alpha + beta), v, rtol=1e-6, atol=0)
    assert stack.metrics.as_dict()["rlplugins/spo/rho"] == pytest.approx(float(rho.mean()), rel=1e-6)
    assert stack.metrics.as_dict()["rlplugins/spo/drift"] == pytest.approx(float(D.mean()), rel=1e-5)


def test_after_a_step_its_own_responses_are_stored_with_the_updated_policys_log_probs():
    stack = start_stack(["spo"], group_size=1)
    engine = Engine(torch.linspace(-3, -0.1, 100))
    rollouts = make_rollouts([1.0, 0.0], [3, 5], lengths=[3, 1], responses=[[7, 8, 9], [4, 0, 0]])
    step(stack, 0, rollouts, engine)
    assert len(engine.calls) == 1  # nothing was stored before
    tokens, extent = spo_of(stack).table.ragged("response").read(torch.tensor([3, 5]))
    assert tokens.tolist() == [[7, 8, 9], [4, 0, 0]]
    assert extent.tolist() == [[True] * 3, [True, False, False]]
    stored, _ = spo_of(stack).table.ragged("log_probs").read(torch.tensor([3, 5]))
    torch.testing.assert_close(stored, engine.by_token[tokens] * extent)


def test_drift_is_measured_on_the_old_response_before_it_is_replaced():
    stack = start_stack(["spo"], group_size=1)
    engine = Engine()
    step(stack, 0, make_rollouts([1.0], [2], responses=[[7, 8]], mask=[[1, 1]]), engine)
    engine.by_token[7] -= 0.02
    engine.by_token[9] -= 5.0  # in this step's response, not in the old one
    step(stack, 1, make_rollouts([1.0], [2], responses=[[9, 9]], mask=[[1, 1]]), engine)
    assert [call[1].tolist() for call in engine.calls[1:]] == [[[7, 8]], [[9, 9]]]
    assert stack.metrics.as_dict()["rlplugins/spo/drift"] == pytest.approx(0.01, rel=1e-4)


def test_tool_output_stays_in_the_stored_response_and_out_of_the_drift():
    stack = start_stack(["spo"], group_size=1)
    engine = Engine()
    mask = [[1, 0, 1, 0], [0, 0, 0, 0]]
    step(stack, 0, make_rollouts([1.0, 1.0], [0, 1], responses=[[5, 6, 7, 8], [9, 9, 9, 9]], mask=mask), engine)
    engine.by_token[5:9] -= torch.tensor([0.02, 3.0, 0.04, 3.0])
    step(stack, 1, make_rollouts([1.0, 1.0], [0, 1], responses=[[5, 6, 7, 8], [9, 9, 9, 9]], mask=mask), engine)
    prompts, responses, wanted = engine.calls[1]
    assert (list(prompts), responses.tolist(), wanted.tolist()) == ([[1]], [[5, 6, 7]], [[True, False, True]])
    assert stack.metrics.as_dict()["rlplugins/spo/drift"] == pytest.approx(0.03, rel=1e-4)


# identities


@FEW
@given(st.lists(binary, min_size=2, max_size=12), st.floats(0.01, 0.99))
def test_with_equal_v_the_advantage_is_the_whitened_reward(scores: list[float], v: float):
    made = advantages(scores, [v] * len(scores)).flatten()
    r = torch.tensor(scores)
    expected = (r - r.mean()) / (r.std() + 1e-8) if r.std() > 0 else torch.zeros(len(r))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)


@FEW
@given(st.lists(unit, min_size=1, max_size=12), st.floats(-0.5, 0.5, width=32))
def test_equal_raw_advantages_become_zero(scores: list[float], a: float):
    v = (torch.tensor(scores) - a).tolist()
    stack = start_stack([CONSTANT])
    set_v(stack, v)
    assert stack.credit(make_rollouts(scores, range(len(scores)))).advantages.abs().max() == 0


def test_a_batch_of_one_has_advantage_zero():
    assert advantages([1.0], [0.3]).tolist() == [[0.0]]


@FEW
@given(st.lists(st.tuples(binary, st.floats(0.02, 0.98)), min_size=3, max_size=12))
def test_advantages_are_whitened_over_responses_whatever_their_length(rows: list[tuple[float, float]]):
    scores, v = [score for score, _ in rows], [value for _, value in rows]
    stack = start_stack([CONSTANT])
    set_v(stack, v)
    short = stack.credit(make_rollouts(scores, range(len(rows)), lengths=[1] * len(rows))).advantages
    mixed = stack.credit(make_rollouts(scores, range(len(rows)), lengths=[*range(1, len(rows) + 1)])).advantages
    assert torch.equal(short, mixed)
    a = torch.tensor(scores) - torch.tensor(v)
    torch.testing.assert_close(short.flatten(), (a - a.mean()) / (a.std() + 1e-8), rtol=1e-4, atol=1e-5)


@FEW
@given(st.lists(binary, min_size=1, max_size=8))
def test_without_forgetting_v_is_the_success_rate_with_the_start_counts(rewards: list[float]):
    stack = start_stack([{"spo": {"rho_min": 1.0, "rho_max": 1.0}}], group_size=1)
    engine = Engine()
    for number, reward in enumerate(rewards):
        step(stack, number, make_rollouts([reward], [4]), engine)
    assert float(column(stack, "alpha")[4]) == 0.5 + sum(rewards)
    assert float((column(stack, "alpha") + column(stack, "beta"))[4]) == 1 + len(rewards)


@FEW
@given(st.floats(0.01, 50), st.floats(0.01, 50), st.floats(0.1, 1), binary)
def test_the_update_is_a_running_mean(alpha: float, beta: float, rho: float, r: float):
    a, b, forget, reward = (torch.tensor([x], dtype=torch.float64) for x in (alpha, beta, rho, r))
    new_alpha, new_beta = update(a, b, forget, reward)
    v, N = a / (a + b), a + b
    eta = 1 / (forget * N + 1)
    torch.testing.assert_close(new_alpha / (new_alpha + new_beta), v + eta * (reward - v))
    mean, variance, count = update_mean(v, v * (1 - v), N, forget, reward)
    torch.testing.assert_close(mean, new_alpha / (new_alpha + new_beta))
    torch.testing.assert_close(variance, mean * (1 - mean))
    torch.testing.assert_close(count, new_alpha + new_beta)


@FEW
@given(st.lists(st.lists(binary, min_size=3, max_size=3), min_size=1, max_size=6))
def test_on_binary_rewards_both_trackers_are_the_same_method(steps: list[list[float]]):
    pools = [pool_with_scores([[1, 1, 0], [0, 0], None]) for _ in range(2)]
    stacks = [
        start_stack([{"spo": {"rho_type": "constant", "offline": "tries", "tracker": tracker}}], pool=pool)
        for tracker, pool in zip(("beta", "mean"), pools, strict=True)
    ]
    for number, scores in enumerate(steps):
        first, second = (step(stack, number, make_rollouts(scores, range(3))) for stack in stacks)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    first, second = (spo_of(stack).prompt_weights(pool) for stack, pool in zip(stacks, pools, strict=True))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_the_running_mean_takes_any_reward_and_the_counters_do_not():
    scores = [-3.0, 40.0, 7.5]
    with pytest.raises(HookError, match=r"spo.*unit_rewards"):
        start_stack([CONSTANT]).credit(make_rollouts(scores, range(3)))
    stack = start_stack([{"spo": {"rho_type": "constant", "rho": 0.5, "tracker": "mean"}}])
    step(stack, 0, make_rollouts(scores, range(3)))
    # weights 0.5 for the start (mean 1/2, variance 1/4) and 1 for the reward
    expected = torch.tensor([(0.25 + score) / 1.5 for score in scores])
    torch.testing.assert_close(column(stack, "value")[:3], expected)
    spread = [(0.5 * (0.25 + (0.5 - v) ** 2) + (s - v) ** 2) / 1.5 for s, v in zip(scores, expected, strict=True)]
    torch.testing.assert_close(column(stack, "variance")[:3], torch.stack(spread))
    assert column(stack, "N")[:3].tolist() == [1.5] * 3


@FEW
@given(st.floats(1e-9, 1, exclude_max=True), st.floats(0, 1), st.floats(1, 50))
def test_a_sampling_weight_lies_between_epsilon_and_one_half_more(v: float, gamma: float, N: float):
    variance = torch.tensor([v * (1 - v)], dtype=torch.float64)
    w = float(sampling_weight(variance, torch.tensor([N]), gamma))
    assert 0.05 <= w <= 0.55 + 1e-9


def test_an_unseen_prompt_has_v_one_half():
    stack = start_stack(["spo"])
    pool = make_pool(3)
    torch.testing.assert_close(spo_of(stack).prompt_weights(pool), torch.full((3,), 0.55, dtype=torch.float64))
    rollouts = make_rollouts([1.0, 0.0, 1.0], [0, 1, 2])
    rollouts.prompt_rows = torch.tensor([0, 1, -1])  # outside of the pool
    set_v(stack, [0.5] * 15 + [0.9])
    made = stack.credit(rollouts).advantages.flatten()
    assert made[0] == made[2]
    before = column(stack, "alpha").clone()
    step(stack, 0, rollouts, Engine())
    assert torch.equal(column(stack, "alpha")[2:], before[2:])


# prompts


def test_one_response_per_prompt_within_the_budget():
    stack = start_stack(["spo"])
    assert stack.allocate_rollouts(make_pool(5), 40).tolist() == [1] * 5


def test_prompts_are_drawn_without_replacement_and_prefer_medium_difficulty():
    pool = make_pool(40)
    stack = start_stack(["spo"], pool=pool)
    set_v(stack, [0.5] * 20 + [1e-6] * 20)
    drawn = torch.zeros(40)
    for number in range(60):
        stack.begin_step(number, 60)
        chosen = stack.choose_prompts(pool, 10)
        assert len(chosen.unique()) == 10
        drawn[chosen] += 1
    assert drawn[:20].sum() > 4 * drawn[20:].sum() > 0


def test_prompts_are_drawn_with_replacement_only_from_a_pool_that_is_too_small():
    pool = make_pool(3)
    stack = start_stack(["spo"], pool=pool)
    assert sorted(stack.choose_prompts(pool, 3).tolist()) == [0, 1, 2]
    assert len(stack.choose_prompts(pool, 7)) == 7


def test_epsilon_and_gamma_change_the_weights():
    pool = make_pool(2)

    def weights(**options: float) -> list[float]:
        stack = start_stack([{"spo": options}], pool=make_pool(2))
        column(stack, "alpha")[:] = torch.tensor([2.0, 8.0])
        column(stack, "beta")[:] = torch.tensor([2.0, 8.0])
        return spo_of(stack).prompt_weights(pool).tolist()

    assert weights(epsilon=0.0) == pytest.approx([0.5, 0.5])
    assert weights(epsilon=0.2) == pytest.approx([0.7, 0.7])
    assert weights(epsilon=0.0, gamma=0.5) == pytest.approx([0.25, 0.125])


def test_the_weights_can_be_switched_off():
    pool = make_pool(8)
    stack = start_stack(["spo"], pool=pool, off=["spo.prompt_weights"])
    plain = start_stack([], pool=pool)
    assert stack.choose_prompts(pool, 8).tolist() == plain.choose_prompts(pool, 8).tolist()


# forgetting


def visit_twice(change: float, **options: object) -> float:
    """N after two visits, the policy's log-probs of every token having changed by so much in between."""
    stack = start_stack([{"spo": options}], group_size=1)
    engine = Engine()
    step(stack, 0, make_rollouts([1.0], [0]), engine)
    before = float((column(stack, "alpha") + column(stack, "beta"))[0])
    engine.by_token = engine.by_token + change
    step(stack, 1, make_rollouts([1.0], [0]), engine)
    return (float((column(stack, "alpha") + column(stack, "beta"))[0]) - 1) / before


def test_a_policy_that_moved_more_forgets_more_within_the_bounds():
    assert visit_twice(0.0) == pytest.approx(0.96, abs=1e-5)
    assert visit_twice(0.006) == pytest.approx(2**-0.1, abs=1e-5)
    assert visit_twice(-0.006) == pytest.approx(2**-0.1, abs=1e-5)
    assert visit_twice(3.0) == pytest.approx(0.875, abs=1e-5)
    assert visit_twice(0.006, D_half=0.03) == pytest.approx(0.875, abs=1e-5)
    assert visit_twice(0.006, D_half=0.05) == pytest.approx(2**-0.12, abs=1e-5)
    assert visit_twice(3.0, rho_min=0.6) == pytest.approx(0.6, abs=1e-5)
    assert visit_twice(0.0, rho_max=0.9) == pytest.approx(0.9, abs=1e-5)


def test_a_first_visit_forgets_least():
    stack = start_stack(["spo"], group_size=1)
    step(stack, 0, make_rollouts([1.0], [0]), Engine())
    assert float(column(stack, "alpha")[0]) == pytest.approx(0.96 * 0.5 + 1)


def test_an_empty_stored_response_has_no_drift():
    assert drift(torch.zeros(1, 3), torch.full((1, 3), -5.0), torch.zeros(1, 3)).tolist() == [0.0]
    stack = start_stack(["spo"], group_size=1)
    engine = Engine()
    step(stack, 0, make_rollouts([1.0, 0.0], [0, 1], lengths=[0, 2]), engine)
    engine.by_token = engine.by_token - 3
    before = column(stack, "alpha").clone()
    step(stack, 1, make_rollouts([0.0, 0.0], [0, 1]), engine)
    torch.testing.assert_close(column(stack, "alpha")[:2], before[:2] * torch.tensor([0.96, 0.875]))


def test_constant_forgetting_asks_no_engine():
    pool = make_pool(4)
    stack = start_stack([{"spo": {"rho_type": "constant", "rho": 0.7}}], group_size=1, pool=pool)
    for number in range(2):
        step(stack, number, make_rollouts([1.0], [0]), None)
    assert float(column(stack, "alpha")[0]) == pytest.approx(0.7 * (0.7 * 0.5 + 1) + 1)
    assert "spo/alpha" in pool.table and "spo/response" not in pool.table


def test_an_engine_that_gives_nan_is_named():
    stack = start_stack(["spo"])
    with pytest.raises(HookError, match=r"spo\.on_step_end.*NaN"):
        step(stack, 0, make_rollouts([1.0], [0]), Engine(torch.full((100,), torch.nan)))


# which rows count


def test_a_nan_reward_is_left_out_of_the_mean_the_std_and_the_counters():
    stack = start_stack(["spo"], group_size=1)
    set_v(stack, [0.2, 0.4, 0.6, 0.8])
    rollouts = make_rollouts([1.0, 0.0, float("nan"), 1.0], range(4))
    credit = stack.credit(rollouts)
    without = stack.credit(rollouts.select(torch.tensor([0, 1, 3])))
    assert torch.equal(credit.advantages[[0, 1, 3]], without.advantages)
    assert credit.advantages[2] == 0 and credit.weights is not None and credit.weights[2] == 0
    before = column(stack, "alpha").clone()
    step(stack, 0, rollouts, Engine())
    changed = column(stack, "alpha") != before
    assert changed[:4].tolist() == [True, True, False, True]
    _, extent = spo_of(stack).table.ragged("response").read(torch.tensor([2]))
    assert not extent.any()


def test_rows_that_another_plugin_added_or_dropped_do_not_count():
    class Extra(Plugin):
        name = "extra"
        kinds = frozenset({"expert"})

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return (scores < 0.9).float()

    stack = start_stack(["spo", Extra()], group_size=1)
    set_v(stack, [0.2, 0.4, 0.6, 0.8])
    drawn = make_rollouts([0.5, 0.25, 1.0], [0, 1, 2])
    expert = make_rollouts([0.5], [-1], kind=torch.tensor([1], dtype=torch.int8), kinds=("policy", "expert"))
    expert.prompt_rows = torch.tensor([3])
    alone = stack.credit(drawn.select(torch.tensor([0, 1]))).advantages
    before = column(stack, "alpha").clone()
    made = step(stack, 0, concatenate([drawn, expert]), Engine())
    assert torch.equal(made[:2], alone)
    assert (column(stack, "alpha") != before)[:4].tolist() == [True, True, False, False]
    expert.groups = torch.tensor([3])  # it may count in the whitening, but what is remembered is the policy's own
    step(stack, 1, expert, Engine())
    assert column(stack, "alpha")[3] == before[3]


def test_of_two_visits_of_a_prompt_in_one_step_the_last_counts():
    stack = start_stack(["spo"], group_size=1)
    engine = Engine()
    rollouts = make_rollouts([1.0, 0.0, 0.0], [0, 1, 2], responses=[[5, 5], [6, 6], [7, 7]], mask=[[1, 1]] * 3)
    rollouts.prompt_rows = torch.tensor([0, 1, 0])
    step(stack, 0, rollouts, engine)
    assert float(column(stack, "alpha")[0]) == pytest.approx(0.48)
    assert float(column(stack, "beta")[0]) == pytest.approx(1.48)
    assert spo_of(stack).table.ragged("response").read(torch.tensor([0]))[0].tolist() == [[7, 7]]


def test_a_step_without_a_usable_row_changes_nothing():
    stack = start_stack(["spo"])
    before = column(stack, "alpha").clone()
    rollouts = make_rollouts([float("nan")] * 3, range(3))
    credit = stack.credit(rollouts)
    assert credit.advantages.abs().max() == 0
    stack.end_step(rollouts, credit, Engine())
    stack.end_step(rollouts, None, Engine())
    assert torch.equal(column(stack, "alpha"), before)


# the offline start


def offline_alpha(tries: Sequence[Sequence[float] | None], seed: int) -> Tensor:
    pool = pool_with_scores(tries)
    return column(start_stack([{"spo": {"offline": "tries"}}], pool=pool, seed=seed), "alpha")


def test_at_most_n0_scores_are_drawn_and_fewer_count_as_what_they_are():
    pool = pool_with_scores([[1, 0] * 50, [1, 1], [0.2, -1, None, float("nan")], None, []])
    stack = start_stack([{"spo": {"offline": "tries", "n0": 10}}], pool=pool)
    alpha, beta = column(stack, "alpha"), column(stack, "beta")
    successes = float(alpha[0]) / 8 * 11 - 0.5
    assert successes == pytest.approx(round(successes), abs=1e-4) and 0 < successes < 10
    assert float(alpha[1]) == pytest.approx(8 * 2.5 / 3) and float(beta[1]) == pytest.approx(8 * 0.5 / 3)
    assert float(alpha[2]) == pytest.approx(4) and float(beta[2]) == pytest.approx(4)
    assert alpha[3:].tolist() == beta[3:].tolist() == [0.5, 0.5]
    again = start_stack([{"spo": {"offline": "tries", "n0": 10}}], pool=pool_with_scores(pool["tries"]))
    assert torch.equal(column(again, "alpha"), alpha)
    draws = {float(offline_alpha(pool["tries"], seed)[0]) for seed in range(8)}
    assert len(draws) > 1


def test_n0_of_zero_starts_without_the_offline_scores():
    stack = start_stack([{"spo": {"offline": "tries", "n0": 0}}], pool=pool_with_scores([[1, 1], [0]]))
    assert column(stack, "alpha").tolist() == [0.5, 0.5]


@pytest.mark.parametrize("tracker", ["beta", "mean"])
def test_the_papers_start_is_the_offline_success_rate(tracker: str):
    stack, pool = worked_stack(half_counts=False, tracker=tracker)
    v, variance, N = spo_of(stack).estimate(pool.rows)
    expected = torch.tensor([0, 2, 5, 8]).double() / 8
    torch.testing.assert_close(v, expected)
    torch.testing.assert_close(variance, expected * (1 - expected))
    assert N.tolist() == [8.0] * 4
    assert spo_of(stack).prompt_weights(pool)[[0, 3]].tolist() == [0.05, 0.05]  # certain, and still not given up


@FEW
@given(st.integers(1, 20), st.data(), st.floats(0.1, 0.99))
def test_the_start_weighs_as_much_as_a_visit_would_leave(n0: int, data: st.DataObject, rho_min: float):
    S = torch.tensor([data.draw(st.integers(0, n0))])
    alpha, beta = start(S, n0, rho_min)
    assert float(alpha + beta) == pytest.approx(1 / (1 - rho_min), rel=1e-5)
    assert float(alpha / (alpha + beta)) == pytest.approx((float(S) + 0.5) / (n0 + 1), rel=1e-5)
    v, variance, N = start_mean(S.double(), S.double(), n0, rho_min)
    torch.testing.assert_close(variance, v * (1 - v))
    assert float(N) == pytest.approx(1 / (1 - rho_min), rel=1e-5)


def test_offline_scores_come_from_a_file_by_id_or_text(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"prompt 1 ": [1, 1, 1], "seven": [0, 0, 0], "what is 2+2?": [1, 0]}))
    pool = make_pool(4, {"id": [None, None, "seven", None]})
    pool.texts = [
        *pool.texts[:3],
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": " what is 2+2? "}],
    ]
    stack = start_stack([{"spo": {"offline": str(path)}}], pool=pool)
    v = column(stack, "alpha") / (column(stack, "alpha") + column(stack, "beta"))
    assert v.tolist() == pytest.approx([0.5, 3.5 / 4, 0.5 / 4, 0.5])
    assert float(column(stack, "alpha")[0]) == 0.5


def test_a_tensor_column_of_scores_is_taken_too():
    pool = make_pool(2, {"tries": torch.tensor([[1.0, 0.0], [1.0, float("nan")]])})
    stack = start_stack([{"spo": {"offline": "tries"}}], pool=pool)
    assert (column(stack, "alpha") / 8).tolist() == pytest.approx([0.5, 0.75])


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), ("[1]", "must map"), ("{", "cannot be read"), ('{"other": [1]}', "names none"),
     ('{"prompt 0": 3}', "one list of scores"), ('{"prompt 0": ["yes"]}', "one list of scores")],
)  # fmt: skip
def test_a_bad_offline_file_is_named(tmp_path, content, problem):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigurationError, match=rf"spo\.offline.*{problem}"):
        start_stack([{"spo": {"offline": str(path)}}], pool=make_pool(2))


def test_a_bad_offline_column_is_named():
    with pytest.raises(ConfigurationError, match=r"spo\.offline.*no field 'tries'.*answer"):
        start_stack([{"spo": {"offline": "tries"}}], pool=make_pool(2, {"answer": ["1", "2"]}))
    for bad in (torch.tensor([0.5, 1.0]), [["1"], ["0"]], ["12", "1"]):
        with pytest.raises(ConfigurationError, match=r"spo\.offline.*one list of scores"):
            start_stack([{"spo": {"offline": "tries"}}], pool=make_pool(2, {"tries": bad}))


# the update


@pytest.mark.parametrize("micro_batches", [2, 3, 5])
def test_micro_batches_do_not_change_the_loss(micro_batches: int):
    source = torch.Generator().manual_seed(0)
    rollouts = make_rollouts([0.0, 1.0, 1.0, float("nan"), 1.0], range(5), lengths=[4, 0, 2, 3, 1])
    log_probs = -torch.rand((5, 4), generator=source, dtype=torch.float64) * rollouts.mask
    stack = start_stack(["spo"])
    set_v(stack, [0.3, 0.9, 0.4, 0.5, 0.2])
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    parts, same = loss_and_gradient(stack, rollouts, log_probs, micro_batches=micro_batches)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(parts, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-12)


def test_hooks_are_pure_and_repeatable():
    stack = start_stack(["spo"])
    set_v(stack, [0.3, 0.9, 0.4])
    rollouts = make_rollouts([0.0, 1.0, 1.0], range(3))
    scores, before = rollouts.scores.clone(), column(stack, "alpha").clone()
    first, second = stack.credit(rollouts), stack.credit(rollouts)
    assert torch.equal(first.advantages, second.advantages)
    assert torch.equal(rollouts.scores, scores) and torch.equal(column(stack, "alpha"), before)


# state


@pytest.mark.parametrize("tracker", ["beta", "mean"])
def test_a_restored_stack_continues_exactly(tmp_path, tracker: str):
    def new() -> tuple[Stack, Prompts]:
        pool = pool_with_scores([[1, 0, 0], [1, 1], None, [0]])
        return start_stack([{"spo": {"offline": "tries", "tracker": tracker}}], pool=pool, group_size=1), pool

    stack, pool = new()
    engine = Engine(torch.linspace(-2, -0.5, 100))
    step(stack, 0, make_rollouts([1.0, 0.0], [0, 2], pool=pool), engine)
    stack.save(tmp_path / "state", 0)
    other, other_pool = new()
    assert other.load(tmp_path / "state") == 0
    engine.by_token = engine.by_token * 1.02
    for one, its_pool in ((stack, pool), (other, other_pool)):
        step(one, 1, make_rollouts([1.0, 1.0, 0.0], [2, 0, 3], pool=its_pool), engine)
    assert stack.metrics.as_dict() == other.metrics.as_dict()
    first, second = spo_of(stack).estimate(pool.rows), spo_of(other).estimate(other_pool.rows)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# the stack


class Groups(Plugin):
    name = "groups"
    needs = (needs.group_size(at_least=2),)


class Allocator(Plugin):
    name = "allocator"

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts) -> Tensor:
        return torch.ones(len(prompts), dtype=torch.int64)


def test_groups_clash_with_one_response_per_prompt():
    with pytest.raises(StackError, match="spo needs exactly 1") as refused:
        Stack(["spo", Groups()])
    assert "no line of the stack file settles this" in str(refused.value)
    with pytest.raises(StackError, match="spo needs exactly 1"):
        Stack(["spo"], trainer=Trainer("fixed", group_size=8, provides=frozenset({"engine"})))


def test_broken_facts_are_refused():
    with pytest.raises(StackError) as refused:
        Stack(["spo", stand_in(breaks=["unit_rewards", "response_rewards"])])
    assert "unit_rewards" in str(refused.value) and "response_rewards" in str(refused.value)
    with pytest.raises(StackError) as refused:
        Stack([{"spo": {"tracker": "mean"}}, stand_in(breaks=["unit_rewards", "response_rewards"])])
    assert "unit_rewards" not in str(refused.value) and "response_rewards" in str(refused.value)
    with pytest.raises(StackError, match=r"reward_scale.*other assumes it, spo breaks it"):
        Stack(["spo", stand_in(assumes=["reward_scale"])])


def test_other_owners_conflict():
    with pytest.raises(StackError, match="allocate_rollouts has one owner"):
        Stack(["spo", Allocator()])
    with pytest.raises(StackError, match="baseline has one owner"):
        Stack(["spo", "grpo"])


def test_drift_needs_an_engine_and_offline_scores_their_column():
    bare = Trainer("bare", columns=frozenset({"answer"}))
    with pytest.raises(StackError, match="spo needs an engine"):
        Stack(["spo"], trainer=bare)
    Stack([CONSTANT], trainer=bare)
    with pytest.raises(StackError, match="spo needs column 'tries'"):
        Stack([{"spo": {"rho_type": "constant", "offline": "tries"}}], trainer=bare)
    Stack([{"spo": {"rho_type": "constant", "offline": "tries.json"}}], trainer=bare)


@pytest.mark.parametrize(
    "options",
    [{"D_half": 0}, {"rho_type": "mean"}, {"rho_min": 0}, {"rho_min": 1.1}, {"rho_max": 0}, {"rho": 0}, {"rho": 1.5},
     {"epsilon": -0.1}, {"gamma": 1.5}, {"gamma": -1}, {"tracker": "ema"}, {"n0": -1}, {"n0": 2.5}, {"halflife": 3}],
)  # fmt: skip
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigurationError, match=rf"spo\.{next(iter(options))}"):
        Stack([{"spo": options}])


def test_options_that_do_not_fit_together_are_named():
    with pytest.raises(ConfigurationError, match=r"spo.*rho_min 0\.9 is above rho_max 0\.8"):
        Stack([{"spo": {"rho_min": 0.9, "rho_max": 0.8}}])
    with pytest.raises(ConfigurationError, match=r"spo.*rho_min must be below 1 with offline scores"):
        Stack([{"spo": {"rho_min": 1.0, "rho_max": 1.0, "offline": "tries"}}])


# the claim


def test_on_drifting_prompts_v_errs_less_than_a_group_of_eight_at_equal_cost_and_wastes_fewer_samples():
    source = torch.Generator().manual_seed(0)
    prompts, steps = 200, 80
    pool = make_pool(prompts)
    stack = start_stack([{"spo": {"rho_type": "constant", "rho": 0.93}}], pool=pool)
    logit = torch.randn(prompts, generator=source) * 2
    errors, wasted, group_errors, group_wasted = [], [], [], []
    for number in range(steps):
        logit = logit + 0.02 + 0.03 * torch.randn(prompts, generator=source)
        p = torch.sigmoid(logit)
        v = spo_of(stack).estimate(pool.rows)[0]
        made = step(
            stack, number, make_rollouts((torch.rand(prompts, generator=source) < p).float(), range(prompts), pool=pool)
        )
        groups = torch.arange(prompts // 8).repeat_interleave(8)  # as many responses, of 25 of the prompts
        drawn = (torch.rand(prompts, generator=source) < p[groups]).float()[:, None]
        if number >= 40:
            errors.append((v - p).square().mean())
            wasted.append((made.abs() < 1e-6).float().mean())
            group_errors.append((ops.group_mean(drawn, groups) - p[groups][:, None]).square().mean())
            group_wasted.append((ops.group_std(drawn, groups) == 0).float().mean())
    assert torch.stack(errors).mean() < torch.stack(group_errors).mean()
    assert torch.stack(wasted).mean() < 0.01 < torch.stack(group_wasted).mean()


# what every plugin must do

test_conformance = conformance("spo", [{}, {"rho_type": "constant"}, {"tracker": "mean", "gamma": 0.5}])
