"""Facts about pcl: first the numbers of the worked example."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.models import LanguageModel, LinearModel
from rlplugins.plugin import make
from rlplugins.rollouts import Column, Prompts, Rollouts, concatenate
from rlplugins.steps import generator
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.testing.conformance import Skip
from rlplugins.testing.conformance import run as run_check
from rlplugins.testing.tiny import write_model
from rlplugins.trainer import Trainer
from rlplugins_pcl import (
    FAR,
    Pcl,
    candidates,
    effective_ratio,
    explained_variance,
    log_count,
    numeric,
    scale,
    select,
    standardised,
)

FEW = settings(max_examples=25, deadline=None)
NAN, INF = float("nan"), float("inf")
V = [0.95, 0.4, 0.62, 0.05, 0.5, 0.38, 0.71, 0.2]
PHI = {"x": [1.0, 0.4, -0.3], "y": [0.2, -0.5, 0.8]}
REWARDS = [1.0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0]
GROUPS = [0] * 4 + [1] * 4 + [2] * 4
A = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75, -0.5, 0.5, 0.5, -0.5]
values = st.lists(st.floats(-1, 2) | st.sampled_from([0.3, 0.5, 0.7]), min_size=1, max_size=12)


def numbers(*items: float) -> Tensor:
    return torch.tensor(items, dtype=torch.float64)


def pcl_of(stack: Stack) -> Pcl:
    return next(plugin for plugin in stack.plugins if isinstance(plugin, Pcl))


def opened(pool: Prompts, *plugins: Any, group_size: int = 4, budget: int = 64, **options: Any) -> Stack:
    """A stack that reads the field `x` alone unless the options say otherwise."""
    given_options = {"features": ["x"], "text_features": []} | options
    return start([{"pcl": given_options}, *plugins], pool=pool, group_size=group_size, budget=budget)


def pool_of(x: Sequence[Any], **more: Column) -> Prompts:
    return make_pool(len(x), {"x": list(x), **more})


def knowing(stack: Stack, w: Sequence[float], b: float, *, unscaled: bool = False) -> LinearModel:
    """The value model with these weights; `unscaled`: which reads the fields as they are."""
    model: LinearModel = pcl_of(stack).state.V
    model.w, model.b = numbers(*w), torch.tensor(b, dtype=torch.float64)
    if unscaled:
        with stack._open_state(pcl_of(stack)):
            pcl_of(stack).state.mean, pcl_of(stack).state.spread = torch.zeros(len(w)), torch.ones(len(w))
    return model


def finish(stack: Stack, rollouts: Rollouts) -> Mapping[str, float]:
    """The rest of a step after its prompts were chosen; gives its metrics."""
    kept = stack.filter_rollouts(rollouts)
    stack.end_step(kept, stack.credit(kept) if len(kept) else None)
    found = stack.metrics.as_dict()
    return {name.removeprefix("rlplugins/pcl/"): value for name, value in found.items() if "/pcl/" in name}


def whole_step(stack: Stack, pool: Prompts, rollouts: Rollouts, count: int | None = None) -> Mapping[str, float]:
    stack.choose_prompts(pool, len(pool) if count is None else count)
    return finish(stack, rollouts)


def remembered(stack: Stack) -> list[float]:
    model: LinearModel = pcl_of(stack).state.V
    return [*model.w.tolist(), float(model.b)]


# the worked example


def test_the_selection_of_the_worked_example() -> None:
    assert select(numbers(*V), 3, 0.5).tolist() == [1, 2, 4]


def test_the_advantages_of_the_worked_example() -> None:
    pool = pool_of([0.0] * 3)
    credit = opened(pool).credit(make_rollouts(REWARDS, GROUPS, pool=pool))
    assert credit.advantages.flatten().tolist() == A


@pytest.mark.parametrize(
    ("head", "predicted", "loss", "expected"),
    [
        ("linear", [0.51, 0.59, 0.26], 0.1508, [0.0732, -0.194, 0.464]),
        ("sigmoid", [0.62480647, 0.64336515, 0.56463629], 0.15602874, [0.092669012, -0.20425174, 0.44207146]),
    ],
)
def test_the_value_update_of_the_worked_example(
    head: str, predicted: list[float], loss: float, expected: list[float]
) -> None:
    pool = make_pool(3, PHI)
    stack = opened(pool, features=["x", "y"], learning_rate=0.05, head=head)
    model = knowing(stack, [0.1, -0.2], 0.45, unscaled=True)
    phi = torch.tensor(list(zip(*PHI.values(), strict=True)), dtype=torch.float64)
    assert model.predict(phi).tolist() == pytest.approx(predicted, abs=1e-8)
    metrics = whole_step(stack, pool, make_rollouts(REWARDS, GROUPS, pool=pool))
    assert metrics["value_error"] == pytest.approx(loss / 3, abs=1e-8)
    assert remembered(stack) == pytest.approx(expected, abs=1e-8)


def test_the_diagnostics_of_the_worked_example() -> None:
    found = effective_ratio(numbers(0.5, 0.9, 0.99), 16).tolist()
    assert found == pytest.approx([0.99996948, 0.81469798, 0.14854223], abs=1e-8)
    assert float(effective_ratio(numbers(0.99), 128)) == pytest.approx(0.72374833, abs=1e-8)
    found = float(explained_variance(numbers(0.2, 0.45, 0.8, 0.4), numbers(0.1, 0.5, 0.9, 0.3)))
    assert found == pytest.approx(0.90714286, abs=1e-8)


# which candidates are taken


@FEW
@given(values, st.integers(1, 12), st.floats(-0.5, 1.5))
def test_no_candidate_left_out_is_nearer_to_tau(V: list[float], m: int, tau: float) -> None:
    chosen = select(numbers(*V), m, tau).tolist()
    assert chosen == sorted(set(chosen)) and len(chosen) == min(m, len(V))
    rest = [abs(v - tau) for place, v in enumerate(V) if place not in chosen]
    assert max(abs(V[place] - tau) for place in chosen) <= min(rest, default=INF) + 1e-12


@FEW
@given(values, st.integers(1, 12), st.floats(-0.5, 1.5))
def test_easy_and_hard_are_treated_alike(V: list[float], m: int, tau: float) -> None:
    mirrored = 2 * tau - numbers(*V)
    assert select(mirrored, m, tau).tolist() == select(numbers(*V), m, tau).tolist()


@FEW
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 12))
def test_tau_0_takes_the_hardest_and_tau_1_the_easiest(V: list[float], m: int) -> None:
    ordered = sorted(V)
    hardest = sorted(V[place] for place in select(numbers(*V), m, 0.0).tolist())
    easiest = sorted(V[place] for place in select(numbers(*V), m, 1.0).tolist())
    assert hardest == pytest.approx(ordered[:m], abs=1e-11)
    assert easiest == pytest.approx(ordered[-m:], abs=1e-11)


def test_of_equal_distances_the_first_candidates_are_taken() -> None:
    assert select(numbers(0.9, 0.1, 0.7, 0.3, 0.7), 3, 0.5).tolist() == [2, 3, 4]
    assert select(numbers(0.7, 0.3, 0.7, 0.3), 2, 0.5).tolist() == [0, 1]
    assert select(torch.full((6,), 0.2), 3).tolist() == [0, 1, 2]


def test_a_prediction_that_is_no_number_comes_last() -> None:
    assert select(numbers(NAN, 9.0, 0.5, INF), 2).tolist() == [1, 2]
    assert select(numbers(NAN, 0.5, NAN), 2).tolist() == [0, 1]
    assert select(numbers(NAN, NAN, NAN), 2).tolist() == [0, 1]


# candidates


@FEW
@given(
    st.lists(st.sampled_from([0.0, 0.5, 3.0]), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 4), st.data()
)
def test_candidates_are_different_prompts_that_have_a_weight(
    weights: list[float], m: int, k: int, data: st.DataObject
) -> None:
    weights[data.draw(st.integers(0, len(weights) - 1))] = 1.0
    possible = {place for place, weight in enumerate(weights) if weight > 0}
    drawn = candidates(torch.tensor(weights), m, k, generator(data.draw(st.integers(0, 9)))).tolist()
    assert set(drawn) <= possible
    if len(possible) >= m:
        assert len(set(drawn)) == len(drawn) == min(k * m, len(possible))
    else:  # all of them, as often as it takes
        times = Counter(drawn)
        assert set(times) == possible and len(drawn) == m and max(times.values()) - min(times.values()) <= 1


def test_with_k_1_prompts_are_drawn_at_random_whatever_V_says() -> None:
    pool, seen = pool_of(range(20)), Counter()
    stack = opened(pool, k=1)
    knowing(stack, [3.0], 0.1)
    for number in range(400):
        stack.begin_step(number, 400)
        seen.update(stack.choose_prompts(pool, 5).tolist())
    assert set(seen) == set(range(20)) and max(seen.values()) < 140  # 100 expected, deviation 9


def test_the_first_step_takes_the_first_candidates() -> None:
    pool = pool_of(range(40))
    for head in ("linear", "sigmoid"):
        stack = opened(pool, head=head, tau=0.3)
        drawn = candidates(torch.ones(40), 6, 4, stack.step.generator(pcl_of(stack)))
        assert stack.choose_prompts(pool, 6).tolist() == drawn[:6].tolist()
        assert float(pcl_of(stack).state.V.predict(torch.tensor([[0.7]]))) == pytest.approx(0.3)


def test_candidates_follow_the_prompt_weights() -> None:
    class Weights(Plugin):
        name = "weights"

        @hookimpl
        def prompt_weights(self, prompts: Prompts) -> Tensor:
            return torch.tensor([0.0, 1.0, 4.0]).repeat_interleave(10)

    pool, seen = pool_of([0.0] * 30), Counter()
    stack = opened(pool, Weights())
    for number in range(300):
        stack.begin_step(number, 300)
        seen.update(place // 10 for place in stack.choose_prompts(pool, 1).tolist())
    assert seen[0] == 0 and seen[2] / 300 == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize(("tau", "nearest"), [(0.5, [3, 4, 5, 6]), (0.0, [0, 1, 2, 3]), (1.0, [6, 7, 8, 9])])
def test_where_all_prompts_are_candidates_the_nearest_of_the_pool_are_chosen_again_and_again(
    tau: float, nearest: list[int]
) -> None:
    pool = pool_of(range(10))
    stack = opened(pool, tau=tau)
    knowing(stack, [0.2], 0.5)  # from 0.19 to 0.81; 0.5 lies between prompts 4 and 5
    for number in range(3):
        stack.begin_step(number, 3)
        assert sorted(stack.choose_prompts(pool, 4).tolist()) == nearest


def test_a_pool_smaller_than_the_step_is_taken_whole() -> None:
    pool = pool_of(range(3))
    chosen = opened(pool).choose_prompts(pool, 7).tolist()
    assert sorted(Counter(chosen).values()) == [2, 2, 3]


def test_seeds_and_steps_give_other_prompts_and_a_repetition_the_same() -> None:
    pool = pool_of([0.0] * 50)

    def first(seed: int, number: int = 0) -> list[int]:
        stack = opened(pool)
        stack.begin_step(number, 10, seed)
        return stack.choose_prompts(pool, 8).tolist()

    assert first(0) == first(0) != first(1)
    assert first(0) != first(0, 1)


# what the value model learns


def test_an_equal_group_teaches_the_value_model_and_not_the_policy() -> None:
    pool = pool_of([0.0, 1.0])
    stack = opened(pool)
    rollouts = make_rollouts([1.0, 1, 1, 1, 0, 0, 0, 0], [0] * 4 + [1] * 4, pool=pool)
    assert not stack.credit(rollouts).advantages.any()
    whole_step(stack, pool, rollouts)
    assert remembered(stack)[0] < 0


@FEW
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4), st.randoms())
def test_every_prompt_counts_once_with_its_mean_reward(groups: list[list[bool]], random: Any) -> None:
    pool = pool_of(range(len(groups)))
    stack, hand = opened(pool, learning_rate=0.1), LinearModel(1, learning_rate=0.1, start=0.5)
    rows = [(float(hit), prompt) for prompt, hits in enumerate(groups) for hit in hits]
    random.shuffle(rows)
    whole_step(stack, pool, make_rollouts(*zip(*rows, strict=True), pool=pool))
    phi = numeric(pool, "x")[:, None]
    hand.fit(standardised(phi, *scale(phi)), numbers(*(sum(hits) / len(hits) for hits in groups)))
    assert remembered(stack) == pytest.approx([*hand.w.tolist(), float(hand.b)])


def test_a_missing_reward_is_left_out_of_the_mean_and_a_prompt_without_rewards_out_of_the_loss() -> None:
    pool = pool_of([0.0, 1.0])
    one, other, neither = (opened(pool) for _ in range(3))
    whole_step(one, pool, make_rollouts([1.0, 0, 0, NAN, NAN, NAN], [0, 0, 0, 0, 1, 1], pool=pool))
    whole_step(other, pool, make_rollouts([1.0, 0, 0], [0, 0, 0], pool=pool))
    assert remembered(one) == remembered(other) != remembered(neither)
    metrics = whole_step(neither, pool, make_rollouts([NAN, NAN], [0, 1], pool=pool))
    assert remembered(neither) == [0, 0.5] and "value_error" not in metrics


def test_a_response_alone_in_its_group_teaches_the_value_model_only() -> None:
    pool = pool_of([0.0, 1.0])
    stack = opened(pool)
    rollouts = make_rollouts([1.0, NAN], [0, 0], pool=pool)
    assert not stack.credit(rollouts).advantages.any()
    whole_step(stack, pool, rollouts)
    assert remembered(stack)[1] > 0.5


def test_responses_that_a_filter_dropped_count_with_their_score() -> None:
    class OnlyMixed(Plugin):
        name = "only-mixed"

        @hookimpl
        def filter_rollouts(self, groups: Tensor) -> Tensor:
            return (groups == 1).float()[:, None]

    class All(Plugin):
        name = "only-mixed"

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return torch.zeros_like(scores)

    pool = pool_of([0.0, 1.0])
    rollouts = make_rollouts([1.0, 1, 1, 0], [0, 0, 1, 1], pool=pool)
    plain = opened(pool)
    whole_step(plain, pool, rollouts)
    for other in (OnlyMixed(), All()):
        stack = opened(pool, other)
        whole_step(stack, pool, rollouts)
        assert remembered(stack) == remembered(plain)


def test_the_reward_counts_and_not_the_score() -> None:
    class Halves(Plugin):
        name = "halves"

        @hookimpl
        def shape_rewards(self, rewards: Tensor) -> Tensor:
            return rewards / 2

    pool = pool_of([0.0])
    stack, plain = opened(pool, Halves()), opened(pool)
    for each in (stack, plain):
        whole_step(each, pool, make_rollouts([1.0, 1.0], pool=pool))
    assert remembered(stack) == [0, 0.5] != remembered(plain)


def test_a_response_whose_reward_is_missing_does_not_count_with_its_score() -> None:
    class Unsure(Plugin):
        name = "unsure"

        @hookimpl
        def combine_rewards(self, scores: Tensor) -> Tensor:
            return torch.where(scores == 1, torch.nan, scores)

    pool = pool_of([0.0, 1.0])
    stack, plain = opened(pool, Unsure()), opened(pool)
    whole_step(stack, pool, make_rollouts([1.0, 0, 1, 1], [0, 0, 1, 1], pool=pool))
    whole_step(plain, pool, make_rollouts([0.0], [0], pool=pool))
    assert remembered(stack) == remembered(plain) != [0, 0.5]


def test_rows_of_other_kinds_and_of_prompts_that_were_not_chosen_do_not_count() -> None:
    class Extra(Plugin):
        name = "extra"
        kinds = frozenset({"expert"})

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return torch.ones_like(scores)

    pool = pool_of(range(8))
    plain, stack = opened(pool, k=1), opened(pool, Extra(), k=1)
    chosen = plain.choose_prompts(pool, 2).tolist()
    other = next(place for place in range(8) if place not in chosen)
    drawn = make_rollouts([1.0, 0, 1, 1], [chosen[0]] * 2 + [chosen[1]] * 2, pool=pool)
    kinds = {"kind": torch.ones(2, dtype=torch.int8), "kinds": ("policy", "expert")}
    expert = make_rollouts([1.0, 1.0], [-1, chosen[0]], pool=pool, **kinds)
    outside = make_rollouts([0.0, 0.0], [other, 99], pool=make_pool(100))
    outside = replace(outside, prompt_rows=torch.tensor([other, -1]))
    finish(plain, drawn)
    assert stack.choose_prompts(pool, 2).tolist() == chosen
    finish(stack, concatenate([drawn, expert, outside]))
    assert remembered(stack) == remembered(plain) != [0, 0.5]


def test_a_step_before_any_prompt_was_chosen_changes_nothing() -> None:
    pool = pool_of(range(4))
    stack = opened(pool)
    finish(stack, make_rollouts([1.0, 0], pool=pool))
    assert remembered(stack) == [0, 0.5]


def test_the_value_model_is_one_step_behind() -> None:
    pool = pool_of(range(10))
    stack = opened(pool, budget=4, learning_rate=0.4)
    for number, rewards in enumerate(([1.0, 0, 1, 1], [0.0, 0, 1, 0], [1.0, 1, 1, 1])):
        stack.begin_step(number, 3)
        before = LinearModel(1, learning_rate=0.4)
        before.load_state_dict(pcl_of(stack).state.V.state_dict())
        chosen = stack.choose_prompts(pool, 1)
        metrics = finish(stack, make_rollouts(rewards, chosen.repeat(4), pool=pool))
        predicted = float(
            before.predict(standardised(numeric(pool, "x")[chosen, None], *scale(numeric(pool, "x")[:, None])))
        )
        assert metrics["V"] == pytest.approx(predicted)
        assert metrics["value_error"] == pytest.approx((predicted - sum(rewards) / 4) ** 2)


@pytest.mark.parametrize("head", ["linear", "sigmoid"])
@pytest.mark.parametrize("m", [4, 512])
def test_the_rate_of_the_linear_model_suits_the_size_of_the_step(head: str, m: int) -> None:
    source = generator(m)
    x = torch.randn(m, 2, generator=source, dtype=torch.float64)
    pool = make_pool(m, {"x": x[:, 0].tolist(), "y": x[:, 1].tolist()})
    stack = opened(pool, features=["x", "y"], head=head, group_size=2, budget=2 * m)
    model, phi = pcl_of(stack).state.V, standardised(x, *scale(x))
    R = (2 * x[:, 0] - 0.5).sigmoid()
    losses = [model.fit(phi, R) for _ in range(30)]
    assert all(after < before for before, after in pairwise(losses))
    assert float(explained_variance(model.predict(phi), R)) > 0.85


def test_a_curriculum_finds_the_prompts_of_medium_difficulty() -> None:
    source = generator("curriculum")
    pool = make_pool(400, {"x": torch.linspace(-6, 6, 400)})
    p = pool["x"].neg().sigmoid().double()  # type: ignore[union-attr]
    stack = opened(pool, group_size=8, budget=64)
    for number in range(60):
        stack.begin_step(number, 60)
        chosen = stack.choose_prompts(pool, 8)
        successes = torch.bernoulli(p[chosen].repeat_interleave(8), generator=source)
        metrics = finish(stack, make_rollouts(successes, chosen.repeat_interleave(8), pool=pool))
    assert float((p[chosen] - 0.5).abs().mean()) < 0.2 < float((p - 0.5).abs().mean())
    assert metrics["effective_ratio"] > 0.8 and metrics["effective_ratio/expected"] > 0.9


# what the linear model reads


def test_fields_are_standardised_over_the_pool() -> None:
    pool = pool_of([1, 2, 3, None, 6], y=torch.tensor([True, False, True, True, False]))
    stack = opened(pool, features=["x", "y"])
    phi = pcl_of(stack)._read(pool)
    torch.testing.assert_close(phi[[0, 1, 2, 4], 0].mean(), numbers(0.0)[0])
    torch.testing.assert_close(phi[[0, 1, 2, 4], 0].square().mean(), numbers(1.0)[0])
    assert phi[3, 0] == 0 and float(phi[0, 1]) == pytest.approx(math.sqrt(2 / 3))


@pytest.mark.parametrize("x", [[0.1] * 7, [None] * 7, [NAN, INF, None, -INF, NAN, NAN, NAN], [5, None, 5, 5, 5, 5, 5]])
def test_a_field_that_says_nothing_is_0(x: list[Any]) -> None:
    pool = pool_of(x)
    assert pcl_of(opened(pool))._read(pool).tolist() == [[0.0]] * 7


@pytest.mark.parametrize("far", [1e9, INF, -INF])
def test_a_number_far_out_is_held_back(far: float) -> None:
    pool = pool_of([0.0, 1.0] * 50 + [far])
    assert float(pcl_of(opened(pool))._read(pool)[100]) == math.copysign(FAR, far)


def test_what_is_counted_in_a_text() -> None:
    texts = ["Sum 12+34 = ?\nthen 5.", [{"role": "user", "content": "a1"}, {"role": "user", "content": "b_2!"}], ""]
    expected = {"length": [21, 7, 0], "digits": [5, 2, 0], "symbols": [4, 1, 0], "lines": [1, 1, 0]}
    for name, counts in expected.items():
        assert log_count(texts, name).tolist() == pytest.approx([math.log1p(count) for count in counts])


def test_texts_and_fields_stand_side_by_side() -> None:
    pool = replace(pool_of([1, 2]), texts=["a", "bb7"])
    stack = opened(pool, text_features=["digits", "length"])
    torch.testing.assert_close(pcl_of(stack)._read(pool), numbers(-1.0, 1.0)[:, None].expand(2, 3))
    assert len(pcl_of(start(["pcl"], pool=pool)).state.V.w) == 4


def test_fields_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ConfigurationError, match=r"pcl\.features: the prompts have no field 'level'; they have: x"):
        opened(pool_of([1, 2]), features=["level"])
    with pytest.raises(ConfigurationError, match=r"pcl\.features: the field 'x' must hold numbers, got 'hard'"):
        opened(pool_of([1, "hard"]))
    with pytest.raises(ConfigurationError, match=r"pcl\.features: the field 'x' must hold one number per prompt"):
        opened(make_pool(2, {"x": torch.ones(2, 3)}))


# the language model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("value-model")
    write_model(made, layers=1, hidden=32)
    return made


def with_model(folder: Path, pool: Prompts, **options: Any) -> Stack:
    return start([{"pcl": {"model": str(folder), **options}}], pool=pool, budget=16)


def test_a_language_model_reads_the_prompt_and_learns(folder: Path) -> None:
    pool = replace(make_pool(6), texts=["easy 1", "easy 2", "easy 3", "hard 1", "hard 2", "hard 3"])
    stack = with_model(folder, pool, learning_rate=1e-2, k=1)
    model = pcl_of(stack).state.V
    assert isinstance(model, LanguageModel) and model.predict(pool.texts).tolist() == [0.5] * 6
    rollouts = make_rollouts([1.0, 1, 1, 0, 0, 0], range(6), pool=pool)
    errors = []
    for number in range(12):
        stack.begin_step(number, 12)
        errors.append(whole_step(stack, pool, rollouts)["value_error"])
    assert errors[-1] < 0.3 * errors[0]
    predicted = model.predict(pool.texts)
    assert float(predicted[:3].min()) > float(predicted[3:].max())
    stack = with_model(folder, pool, head="sigmoid", tau=0.0)
    assert pcl_of(stack).state.V.predict(pool.texts).tolist() == pytest.approx([0.05] * 6)


def test_options_reach_the_language_model(folder: Path) -> None:
    stack = with_model(folder, make_pool(3), max_tokens=7, batch_size=2, head="sigmoid")
    model = pcl_of(stack).state.V
    assert (model.max_tokens, model.batch_size, model.device.type, model.head) == (7, 2, "cpu", "sigmoid")
    assert model.optimiser.param_groups[0]["lr"] == 1e-5


def test_a_wrong_folder_or_device_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"pcl\.model: {tmp_path} holds no model"):
        with_model(tmp_path, make_pool(3))
    with pytest.raises(ConfigurationError, match=r"pcl\.model: device 'abacus'"):
        with_model(folder, make_pool(3), device="abacus")


def test_conformance_with_a_language_model(folder: Path) -> None:
    ran = []
    for name, check, subject in conformance("pcl", [{"model": str(folder), "learning_rate": 1e-3}]).tests():
        try:
            run_check(check, subject)
            ran.append(name.partition("[")[0])
        except Skip:
            continue
    assert {"hooks", "determinism", "permutation", "state"} <= set(ran)


# the stack


def test_a_restored_run_goes_on_exactly(folder: Path, tmp_path: Path) -> None:
    for place, options in enumerate([{"features": ["x"]}, {"model": str(folder), "learning_rate": 1e-3}]):
        pool = pool_of(range(12))
        first, second = (start([{"pcl": options}], pool=pool_of(range(12))) for _ in range(2))
        chosen = first.choose_prompts(pool, 3)
        finish(first, make_rollouts([1.0, 0, 1], chosen, pool=pool))
        first.save(tmp_path / str(place), 1)
        assert second.load(tmp_path / str(place)) == 1
        outcomes = []
        for stack in (first, second):
            stack.begin_step(1, 10)
            chosen = stack.choose_prompts(pool, 3)
            outcomes.append((chosen.tolist(), finish(stack, make_rollouts([0.0, 1, 1], chosen, pool=pool))))
            outcomes[-1] += (pcl_of(stack).state.V.predict(pcl_of(stack)._read(pool)).tolist(),)
        assert outcomes[0] == outcomes[1]


def test_a_run_resumed_with_other_prompts_reads_them_on_the_old_scale(tmp_path: Path) -> None:
    stack = opened(pool_of([0.0, 2.0]))
    knowing(stack, [0.25], 0.5)
    stack.save(tmp_path / "state", 1)
    pool = pool_of([4.0, 10.0, -2.0, 1.0])
    other = opened(pool)
    other.load(tmp_path / "state")
    assert pcl_of(other)._read(pool).flatten().tolist() == [3.0, 3.0, -3.0, 0.0]
    assert other.choose_prompts(pool, 1).tolist() == [3]


def test_without_mean_only_the_advantages_are_those_of_the_stack() -> None:
    pool = pool_of([0.0] * 3)
    rollouts = make_rollouts(REWARDS, GROUPS, pool=pool)
    found = opened(pool, "grpo", mean_only=False).credit(rollouts).advantages
    assert torch.equal(found, start(["grpo"]).credit(rollouts).advantages)
    with pytest.raises(StackError, match="advantage_scale has one owner"):
        opened(pool, "grpo")
    opened(pool, "dr_grpo")


def test_credit_and_loss_are_those_of_group_means() -> None:
    pool = pool_of([0.0] * 3)
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[3, 2, 4, 1, 4, 4, 2, 3, 1, 2, 3, 4], pool=pool)
    log_probs = -0.4 * rollouts.mask
    plain = loss_and_gradient(start(["dr_grpo"]), rollouts, log_probs)
    for one, other in zip(plain, loss_and_gradient(opened(pool), rollouts, log_probs, micro_batches=3), strict=True):
        torch.testing.assert_close(other, one)


@FEW
@given(st.integers(2, 9), st.floats(0.01, 0.99))
def test_the_gradient_is_strongest_at_a_half(n: int, p: float) -> None:
    """E[A^2] = p (1 - p) (1 - 1/n), and a mixed group has probability 1 - p^n - (1 - p)^n."""
    chance = [math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) for hits in range(n + 1)]
    rows = [float(place < hits) for hits in range(n + 1) for place in range(n)]
    groups = torch.arange(n + 1).repeat_interleave(n)
    advantages = opened(pool_of([0.0] * 16)).credit(make_rollouts(rows, groups)).advantages.double().view(n + 1, n)
    assert float(numbers(*chance) @ advantages.square().mean(1)) == pytest.approx(p * (1 - p) * (1 - 1 / n), abs=1e-6)
    assert float(effective_ratio(numbers(p), n)) == pytest.approx(sum(chance[1:-1]))
    assert float(effective_ratio(numbers(0.5), n)) == pytest.approx(1 - 2 ** (1 - n))


def test_the_effective_ratio_counts_prompts_with_both_outcomes() -> None:
    pool = pool_of([0.0] * 5)
    rewards = [0.1] * 3 + [1.0, 0.0] + [0.0] * 4 + [0.25, 0.75] + [NAN] * 2
    groups = [0] * 3 + [1] * 2 + [2] * 4 + [3] * 2 + [4] * 2
    metrics = whole_step(opened(pool), pool, make_rollouts(rewards, groups, pool=pool))
    assert metrics["effective_ratio"] == 0.5
    assert metrics["effective_ratio/expected"] == pytest.approx((0.75 + 0.5 + 0.875 + 0.5) / 4)
    assert metrics["V"] == metrics["V/candidates"] == 0.5
    assert metrics["explained_variance"] == pytest.approx(1 - 0.41 / 0.2075)
    equal = make_rollouts([1.0, 0, 0, 1], [0, 0, 1, 1], pool=pool)
    assert "explained_variance" not in whole_step(opened(pool), pool, equal)


class Owner(Plugin):
    name = "owner"

    @hookimpl
    def choose_prompts(self, count: int) -> Tensor:
        return torch.arange(count)


GIVES = frozenset({"prompts_after_update", "trainable_model"})


def trainer(**settings: Any) -> Trainer:
    return Trainer("t", **{"provides": GIVES, "columns": frozenset({"level"}), "group_size": 2} | settings)


@pytest.mark.parametrize(
    ("problem", "build"),
    [
        ("choose_prompts has one owner", lambda: Stack(["pcl", Owner()])),
        ("needs prompts chosen after the previous update",
         lambda: Stack(["pcl"], trainer=trainer(provides=GIVES - {"prompts_after_update"}))),
        ("needs a small trainable model", lambda: Stack(["pcl"], trainer=trainer(provides=GIVES - {"trainable_model"}))),
        ("needs 2 or more", lambda: Stack(["pcl"], trainer=trainer(group_size=1))),
        ("needs column 'age'", lambda: Stack([{"pcl": {"features": ["level", "age"]}}], trainer=trainer())),
        ("unit_rewards.*pcl assumes it", lambda: Stack(["pcl", stand_in(breaks=["unit_rewards"])])),
        ("response_rewards.*pcl assumes it", lambda: Stack(["pcl", stand_in(breaks=["response_rewards"])])),
        ("baseline has one owner", lambda: Stack(["pcl", "rloo"])),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_the_rest_is_not(problem: str, build: Callable[[], Stack]) -> None:
    with pytest.raises(StackError, match=problem):
        build()
    Stack([{"pcl": {"features": ["level"]}}, "dr_grpo"], trainer=trainer())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tau": INF}, r"pcl\.tau"),
        ({"k": 0}, r"pcl\.k"),
        ({"text_features": ["rhymes"]}, r"pcl\.text_features"),
        ({"head": "cubic"}, r"pcl\.head"),
        ({"learning_rate": 0.0}, r"pcl\.learning_rate"),
        ({"max_tokens": 0}, r"pcl\.max_tokens"),
        ({"batch_size": 0}, r"pcl\.batch_size"),
        ({"model": ""}, r"pcl\.model"),
        ({"m": 512}, r"pcl\.m"),
        ({"head": "sigmoid", "tau": 1.5}, "pcl: with head sigmoid"),
        ({"model": "some/folder", "features": ["x"]}, "pcl: features are for model linear"),
        ({"text_features": []}, "pcl: model linear has nothing to read"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        make(Pcl, options)


def test_tau_may_lie_outside_of_0_and_1_with_a_linear_head() -> None:
    pool = pool_of([0.0] * 4)
    stack = opened(pool, tau=-3.0)
    assert pcl_of(stack).state.V.predict(torch.zeros(1, 1)).tolist() == [-3.0]


# what every plugin must do

test_conformance = conformance(
    "pcl",
    [{}, {"mean_only": False}, {"features": ["level"], "text_features": ["length"], "head": "sigmoid", "k": 1}],
    prompts=lambda count: {"level": torch.arange(count) % 5},
)
