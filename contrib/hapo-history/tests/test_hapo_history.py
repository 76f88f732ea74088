"""Facts about hapo-history: first the numbers of the worked example, made through the stack."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Rollouts, concatenate
from rlplugins.stack import Credit
from rlplugins.steps import Run
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins_hapo_history import HapoHistory, repeated, runs

FEW = settings(max_examples=25, deadline=None)
NAN = float("nan")
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
L = [[120, 200, 80, 300, 150, 90, 400, 60], [60, 120, 240, 90, 150, 90, 400, 60], [60, 66, 30, 150, 300, 75, 120, 20]]
CORRECT = [[1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 0, 1]]
LINEAR = {"hapo-history": {"type": "linear"}}
MEAN = {"hapo-history": {"mode": "mean"}}


def plugin_of(stack: Stack) -> HapoHistory:
    return next(plugin for plugin in stack.plugins if isinstance(plugin, HapoHistory))


def history(stack: Stack, prompts: int = 2) -> list[float]:
    return [float(h) for h in plugin_of(stack).table["h"][:prompts]]


def step(stack: Stack, number: int, rollouts: Rollouts) -> Credit:
    """A whole step."""
    stack.begin_step(number, 10)
    kept = stack.filter_rollouts(rollouts)
    made = stack.credit(kept)
    stack.end_step(kept, made)
    return made


def batch(scores: Sequence[float], lengths: Sequence[int], groups: Sequence[int], **fields: Any) -> Rollouts:
    width = max(1, *lengths)
    return make_rollouts([float(score) for score in scores], groups, lengths=lengths, tokens=width, **fields)


def run(*plugins: Any, steps: int = 3, **lines: Any) -> tuple[Stack, list[list[float]], Credit]:
    """The stack after the steps of the worked example, the rewards of each, and the credit of the last."""
    stack, rewards = start(plugins or ["hapo-history"], **lines), []
    for number in range(steps):
        made = step(stack, number, batch(CORRECT[number], L[number], GROUPS))
        rewards.append(made.rewards.flatten().tolist())
    return stack, rewards, made


def known(h: Sequence[float], **options: Any) -> Stack:
    """A stack with this history of the first prompts; 0 is none."""
    stack = start([{"hapo-history": options}])
    plugin_of(stack).table["h"][: len(h)] = torch.tensor(h, dtype=torch.float32)
    return stack


def length_rewards(
    lengths: Sequence[int], correct: Sequence[float], h: float, groups: Sequence[int] | None = None, **options: Any
) -> list[float]:
    """Rewards minus scores, with the same history for every prompt."""
    rollouts = batch(correct, lengths, groups or [0] * len(lengths))
    made = known([h] * 16, **options).credit(rollouts)
    return (made.rewards - rollouts.scores).flatten().tolist()


# the worked example


def test_rewards_of_the_worked_example() -> None:
    _, rewards, _ = run()
    assert rewards[0] == CORRECT[0]
    assert rewards[1] == pytest.approx([1.70710678, 1.0, 0.3, 0.0, 1.0, 0.0, 1.0, 0.0], abs=1e-6)
    expected = [1.0, 0.843565535, 1.70710678, -1.0, 0.3, 0.0, 0.0, 1.9781476]
    assert rewards[2] == pytest.approx(expected, abs=1e-6)


def test_history_of_the_worked_example() -> None:
    assert [history(run(steps=steps)[0]) for steps in (1, 2, 3)] == [[120, 0], [60, 150], [30, 20]]


def test_advantages_of_the_worked_example() -> None:
    _, _, made = run({"grpo": {}}, "hapo-history", owners={"advantage_scale": {"group_std": {"eps": 1e-4}}})
    expected = [0.313787595, 0.178311829, 0.926157975, -1.4182574, -0.283793885, -0.599662197, -0.599662197, 1.48311828]
    torch.testing.assert_close(made.advantages.flatten(), torch.tensor(expected), rtol=2e-6, atol=1e-6)


def test_the_linear_variant_of_the_worked_example() -> None:
    _, rewards, _ = run(LINEAR)
    found = [reward - correct for reward, correct in zip(rewards[2], CORRECT[2], strict=True)]
    assert found == pytest.approx([0.0, 0.0, 0.5, -1.0, -0.7, 0.0, 0.0, 0.866666667], abs=1e-6)


def test_the_running_mean_of_the_worked_example() -> None:
    assert history(run(MEAN, steps=1)[0]) == pytest.approx([206.666667, 0])
    stack, _, _ = run(MEAN, steps=2)
    assert history(stack) == pytest.approx([173.333333, 275.0])
    assert plugin_of(stack).table["n"][:2].tolist() == [6, 2]


# the length reward, against the equations written out for one response


def cosine(length: float, h: float, correct: bool) -> float:
    f = math.cos(math.pi / 2 * min(length / h, 2))
    return max(-0.7, f) if correct else min(0.0, f)


def linear(length: float, h: float, correct: bool, d: float = 0.1) -> float:
    over = -(length - (1 + d) * h) / h
    if correct and length < h:
        return 1 - length / h
    if length < (1 + d) * h:
        return 0.0
    return max(-0.7 if correct else -1.0, over)


@FEW
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=8), st.integers(1, 40))
def test_the_length_reward_is_the_equation(rows: list[tuple[int, bool]], h: int) -> None:
    lengths, correct = [length for length, _ in rows], [float(right) for _, right in rows]
    for kind, equation in (("cosine", cosine), ("linear", linear)):
        expected = [equation(length, h, right) for length, right in rows]
        assert length_rewards(lengths, correct, h, type=kind) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_at_the_history_nothing_is_added(kind: str) -> None:
    assert length_rewards([20, 20], [1, 0], 20, type=kind) == pytest.approx([0, 0], abs=1e-6)


def test_where_the_bounds_are_reached() -> None:
    assert length_rewards([40, 40, 100, 100], [1, 0, 1, 0], 20) == pytest.approx([-0.7, -1, -0.7, -1])
    found = length_rewards([35, 36, 41, 42, 80], [1, 1, 0, 0, 0], 20, type="linear")
    assert found == pytest.approx([-0.65, -0.7, -0.95, -1, -1], abs=1e-6)
    assert length_rewards([0, 0], [1, 0], 20) == pytest.approx([1, 0])
    assert length_rewards([40, 40], [1, 0], 20, floor=-0.2) == pytest.approx([-0.2, -1], abs=1e-6)
    assert length_rewards([29, 31], [1, 1], 20, type="linear", tolerance=0.5) == pytest.approx([0, -0.05], abs=1e-6)


@FEW
@given(st.lists(st.integers(0, 60), min_size=2, max_size=8), st.integers(1, 40), st.floats(0, 1))
def test_every_correct_response_is_above_every_wrong_one(lengths: list[int], h: int, w: float) -> None:
    for kind in ("cosine", "linear"):
        extra = length_rewards(lengths * 2, [1.0] * len(lengths) + [0.0] * len(lengths), h, type=kind, w=w)
        right, wrong = [1 + value for value in extra[: len(lengths)]], extra[len(lengths) :]
        assert min(right) >= 0.3 - 1e-5 and max(wrong) <= 0


def test_without_weight_or_history_it_is_the_score() -> None:
    assert length_rewards([10, 30], [1, 0], 20, w=0.0) == [0, 0]
    assert length_rewards([10, 30], [1, 0], 0) == [0, 0]
    assert length_rewards([10], [1], 20, w=0.5) == pytest.approx([0.5 * math.cos(math.pi / 4)], abs=1e-6)


def test_the_length_reward_is_added_to_what_comes_in_and_looks_at_the_raw_score() -> None:
    class Doubled(Plugin):
        name = "doubled"

        @hookimpl
        def shape_rewards(self, rewards: Tensor) -> Tensor:
            return rewards * 2 - 3

    stack = start([Doubled(), "hapo-history"])
    plugin_of(stack).table["h"][0] = 20
    made = stack.credit(batch([1, 0.9, 0], [10, 10, 30], [0, 0, 0]))
    half = math.cos(math.pi / 4)
    assert made.rewards.flatten().tolist() == pytest.approx([-1 + half, -1.2, -3 - half], abs=1e-6)


# the length


def special_stack(*special: int, **options: Any) -> Stack:
    stack = Stack([{"hapo-history": options}])
    tokenizer = SimpleNamespace(all_special_ids=list(special))
    stack.start(Run(10, 4, 64, make_pool(4), tokenizer=tokenizer))
    stack.begin_step(0, 10)
    return stack


def test_special_tokens_and_tool_output_do_not_count() -> None:
    responses = [[5, 6, 7, 1, 0], [5, 1, 6, 7, 1], [5, 6, 7, 8, 9]]
    mask = [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 1, 1]]
    rollouts = make_rollouts([1.0, 1.0, 1.0], [0, 1, 2], responses=responses, mask=mask)
    stack = special_stack(0, 1)
    step(stack, 0, rollouts)
    assert history(stack, 3) == [3, 3, 3]
    plain = start(["hapo-history"])
    step(plain, 0, rollouts)
    assert history(plain, 3) == [4, 5, 3]


@FEW
@given(st.lists(st.integers(0, 12)))
def test_runs_hold_the_tokens_and_no_others(tokens: list[int]) -> None:
    found = [token for first, last in runs(tokens).tolist() for token in range(first, last + 1)]
    assert found == sorted(set(tokens))


def test_special_tokens_break_no_repetition() -> None:
    stack = special_stack(1, rep_penalty=-0.6, rep_ngram=2)
    rollouts = make_rollouts([0.0, 0.0], [0, 0], responses=[[5, 6, 1, 5, 6, 1], [5, 1, 5, 1, 5, 1]], mask=[[1] * 6] * 2)
    expected = [-0.6 * 2 / 4, -0.6 * 2 / 3]  # 5 6 5 6 and 5 5 5, in which the last two tokens repeat
    assert stack.credit(rollouts).rewards.flatten().tolist() == pytest.approx(expected)


# the history


@FEW
@given(st.data())
def test_the_history_is_the_least_or_the_mean_of_all_correct_lengths(data: st.DataObject) -> None:
    stacks, seen = {mode: start([{"hapo-history": {"mode": mode}}]) for mode in ("min", "mean")}, {}
    for number in range(3):
        rows = data.draw(
            st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 9)), min_size=1, max_size=8)
        )
        rollouts = batch([right for _, right, _ in rows], [length for *_, length in rows], [row for row, *_ in rows])
        before = {mode: history(stack, 3) for mode, stack in stacks.items()}
        for stack in stacks.values():
            step(stack, number, rollouts)
        for row, right, length in rows:
            if right and length:
                seen.setdefault(row, []).append(length)
        for mode, combine in (("min", min), ("mean", lambda lengths: sum(lengths) / len(lengths))):
            expected = [float(combine(seen[row])) if row in seen else 0.0 for row in range(3)]
            assert history(stacks[mode], 3) == pytest.approx(expected, rel=1e-6)
        least = history(stacks["min"], 3)
        assert all(now <= was or was == 0 for now, was in zip(least, before["min"], strict=True))


@FEW
@given(st.permutations(range(8)))
def test_the_order_of_responses_changes_nothing(order: list[int]) -> None:
    index = torch.tensor(order)
    for mode in ("min", "mean"):
        one, other = (start([{"hapo-history": {"mode": mode}}]) for _ in range(2))
        for number in range(3):
            rollouts = batch(CORRECT[number], L[number], GROUPS)
            first, second = step(one, number, rollouts), step(other, number, rollouts.select(index))
            assert torch.equal(first.rewards[index], second.rewards)
        assert history(one) == pytest.approx(history(other))


def test_prompts_do_not_influence_one_another() -> None:
    both, alone = start(["hapo-history"]), start(["hapo-history"])
    for number in range(3):
        rollouts = batch(CORRECT[number], L[number], GROUPS)
        made = step(both, number, rollouts)
        single = step(alone, number, rollouts.select(torch.arange(4, 8)))
        assert torch.equal(made.rewards[4:], single.rewards)
    assert history(both)[1] == history(alone)[1]


def test_credit_reads_what_was_there_before_the_step_and_changes_nothing() -> None:
    stack = known([20])
    rollouts = batch([1, 1], [5, 10], [0, 0])
    first, second = stack.credit(rollouts), stack.credit(rollouts)
    assert torch.equal(first.rewards, second.rewards) and history(stack, 1) == [20]
    stack.end_step(rollouts, first)
    assert history(stack, 1) == [5]


@pytest.mark.parametrize("mode", ["min", "mean"])
def test_an_empty_correct_response_is_paid_and_not_remembered(mode: str) -> None:
    stack = start([{"hapo-history": {"mode": mode}}])
    step(stack, 0, batch([1, 1], [0, 0], [0, 1]))
    assert history(stack) == [0, 0]
    plugin_of(stack).table["h"][0] = 4
    assert step(stack, 1, batch([1, 0], [0, 0], [0, 0])).rewards.flatten().tolist() == [2, 0]
    assert history(stack, 1) == [4]


def test_a_step_without_a_correct_response_changes_nothing() -> None:
    for mode in ("min", "mean"):
        stack = known([30, 0], mode=mode)
        step(stack, 0, batch([0, 0.99, NAN], [3, 4, 5], [0, 0, 1]))
        assert history(stack) == [30, 0]


def test_a_nan_score_is_left_to_the_stack() -> None:
    stack = known([20])
    made = step(stack, 0, batch([NAN, 1, 0], [5, 10, 30], [0, 0, 0]))
    assert made.groups.tolist() == [-1, 0, 0]
    assert made.weights is not None and made.weights.flatten().tolist() == [0, 1, 1]
    assert made.advantages[0] == 0 and history(stack, 1) == [10]


def test_rows_that_were_filtered_out_are_remembered_and_rows_of_other_kinds_are_not() -> None:
    class Extra(Plugin):
        name = "extra"
        kinds = frozenset({"expert"})

        @hookimpl
        def filter_rollouts(self, scores: Tensor) -> Tensor:
            return (scores < 1).float()

    stack = start(["hapo-history", Extra()])
    drawn = batch([1, 0], [7, 9], [0, 0])
    expert = batch([0.5, 1.0], [1, 2], [-1, -1], kind=torch.ones(2, dtype=torch.int8), kinds=("policy", "expert"))
    step(stack, 0, concatenate([drawn, expert]))
    assert history(stack, 1) == [7]
    every = start(["hapo-history", Extra()], off=["extra.filter_rollouts"])
    made = step(every, 0, concatenate([drawn, expert]))
    assert history(every, 1) == [7]
    assert made.rewards.flatten().tolist() == [1, 0, 0.5, 1]


def test_prompts_outside_of_the_pool_have_no_history() -> None:
    stack = known([20] * 16)
    rollouts = replace(batch([1, 1], [5, 10], [0, 0]), prompt_rows=torch.tensor([-1, -1]))
    assert step(stack, 0, rollouts).rewards.flatten().tolist() == [1, 1]
    assert history(stack, 16) == [20] * 16


def test_a_group_of_one_and_a_group_of_equal_rewards() -> None:
    stack = known([20, 20])
    made = step(stack, 0, batch([1, 1, 1], [10, 15, 15], [0, 1, 1]))
    assert made.advantages.flatten().tolist() == [0, 0, 0]
    assert history(stack) == [10, 15]


@pytest.mark.parametrize("mode", ["min", "mean"])
def test_a_restored_run_goes_on_exactly(mode: str, tmp_path: Any) -> None:
    stack, _, _ = run({"hapo-history": {"mode": mode}}, steps=2)
    stack.save(tmp_path / "state", 2)
    other = start([{"hapo-history": {"mode": mode}}])
    assert other.load(tmp_path / "state") == 2
    rollouts = batch(CORRECT[2], L[2], GROUPS)
    assert torch.equal(step(stack, 2, rollouts).rewards, step(other, 2, rollouts).rewards)
    assert history(stack) == history(other)


# repetitions


def marked_by_hand(tokens: list[int], n: int) -> int:
    seen, marked = set(), set()
    for place in range(len(tokens) - n + 1):
        gram = tuple(tokens[place : place + n])
        if gram in seen:
            marked |= set(range(place, place + n))
        seen.add(gram)
    return len(marked)


@FEW
@given(st.lists(st.lists(st.integers(2, 4), max_size=12), min_size=1, max_size=5), st.integers(1, 5))
def test_repeated_tokens_are_those_found_one_by_one(rows: list[list[int]], n: int) -> None:
    width = max(1, *map(len, rows))
    responses = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    counted = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
    assert repeated(responses, counted, n).flatten().tolist() == [marked_by_hand(row, n) for row in rows]


def test_the_repetition_reward() -> None:
    responses = [[5, 6, 7, 5, 6, 7, 8, 9], [5, 5, 5, 5, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0, 0, 0], [0] * 8]
    rollouts = make_rollouts([1.0, 0.0, 0.0, 0.0], [0] * 4, responses=responses, mask=torch.tensor(responses) > 0)
    options = {"rep_penalty": -0.5, "w": 0.0}
    made = start([{"hapo-history": options}]).credit(rollouts)
    assert made.groups.tolist() == [0] * 4  # the empty response has a reward
    rewards = made.rewards.flatten().tolist()
    assert rewards == pytest.approx([1 - 0.5 * 3 / 8, -0.5 * 3 / 4, 0, 0])
    rewards = start([{"hapo-history": {**options, "rep_ngram": 1}}]).credit(rollouts).rewards.flatten().tolist()
    assert rewards == pytest.approx([1 - 0.5 * 3 / 8, -0.5 * 3 / 4, 0, 0])


# the update


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_micro_batches_do_not_change_the_loss(micro_batches: int) -> None:
    lengths = [length // 20 for length in L[2]]
    rollouts = batch(CORRECT[2], lengths, GROUPS)
    log_probs = -torch.rand(rollouts.mask.shape, generator=torch.Generator().manual_seed(0)).double() * rollouts.mask
    stack = known([3, 6])
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    parts, same = loss_and_gradient(stack, rollouts, log_probs, micro_batches=micro_batches)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(parts, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, gradient, rtol=1e-12, atol=1e-12)


def test_metrics() -> None:
    stack = known([20, 0])
    stack.credit(batch([1, 0, 1, 1], [10, 30, 8, 12], [0, 0, 1, 1]))
    found = {name.rpartition("/")[2]: value for name, value in stack.metrics.as_dict().items() if "hapo" in name}
    assert found == pytest.approx({"known": 0.5, "h": 20, "length": 10, "length_reward": 0}, abs=1e-6)


# the stack


def test_rewards_leave_the_unit_interval_and_must_be_one_per_response() -> None:
    with pytest.raises(StackError, match=r"unit_rewards.*other assumes it, hapo-history breaks it"):
        Stack(["hapo-history", stand_in(assumes=["unit_rewards"])])
    with pytest.raises(StackError, match=r"response_rewards.*hapo-history assumes it, other breaks it"):
        Stack(["hapo-history", stand_in(breaks=["response_rewards"])])

    class Unit(Plugin):
        name = "unit"
        assumes = frozenset({"unit_rewards"})

    stack = start(["hapo-history", Unit()], allow=["unit_rewards"])
    plugin_of(stack).table["h"][0] = 20
    made = stack.credit(batch([1, 0], [5, 40], [0, 0]))
    assert float(made.rewards.max()) > 1 and float(made.rewards.min()) < 0

    class Parts(Plugin):
        name = "parts"

        @hookimpl
        def combine_rewards(self, scores: Tensor) -> Tensor:
            return scores.expand(-1, 2)

    with pytest.raises(HookError, match="response_rewards"):
        start(["hapo-history", Parts()], owners={"segment_tokens": "token"}).credit(batch([1, 0], [1, 2], [0, 0]))


@pytest.mark.parametrize(
    "options",
    [{"w": -0.1}, {"w": float("inf")}, {"type": "quadratic"}, {"mode": "median"}, {"floor": 0.1}, {"floor": -1.1},
     {"tolerance": -0.1}, {"rep_penalty": 0.1}, {"rep_ngram": 0}, {"halflife": 3}],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"hapo-history\.{next(iter(options))}"):
        make(HapoHistory, options)


# what every plugin must do


def scored(rollouts: Rollouts) -> Rollouts:
    """Half of the made-up rows are correct."""
    scores = torch.where(rollouts.scores.isnan(), torch.nan, (rollouts.scores > 0.5).float())
    return replace(rollouts, scores=scores)


test_conformance = conformance(
    "hapo-history",
    [{}, {"type": "linear", "mode": "mean"}, {"rep_penalty": -0.5, "rep_ngram": 2}],
    rows=scored,
)
