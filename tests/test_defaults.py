"""The built-ins against independent plain implementations of their formulas."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rlplugins import Plugin, Rollouts, Stack, hookimpl
from rlplugins.defaults import BUILTINS, METHODS, above_values, lambda_returns, weighted_draw
from rlplugins.errors import ConfigurationError
from rlplugins.hookspecs import HOOKS
from rlplugins.registry import make_builtin
from rlplugins.testing import credit, loss_and_gradient, make_pool, make_rollouts, start

QUICK = settings(max_examples=25, deadline=None, derandomize=True)

reward_lists = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=10)


@st.composite
def scored(draw: st.DrawFn) -> Rollouts:
    scores = draw(reward_lists)
    groups = draw(st.lists(st.integers(0, 2), min_size=len(scores), max_size=len(scores)))
    return make_rollouts(scores, groups, tokens=2)


def by_group(rollouts: Rollouts) -> list[tuple[float, list[float]]]:
    """Each row's reward and the rewards of its group."""
    scores, groups = rollouts.scores.flatten().double().tolist(), rollouts.groups.tolist()
    return [
        (r, [s for s, h in zip(scores, groups, strict=True) if h == g]) for r, g in zip(scores, groups, strict=True)
    ]


def check(actual: Tensor, wanted: list[float], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual.flatten().double(), torch.tensor(wanted, dtype=torch.float64), atol=tolerance, rtol=1e-4
    )


# advantages


@pytest.mark.parametrize("ddof", [0, 1])
@QUICK
@given(rollouts=scored())
def test_grpo(ddof: int, rollouts: Rollouts) -> None:
    eps = 0.25
    line = {"advantage_scale": {"group_std": {"ddof": ddof, "eps": eps}}}
    wanted = []
    for r, g in by_group(rollouts):
        std = (statistics.stdev(g) if ddof else statistics.pstdev(g)) if len(g) > ddof else 0.0
        wanted.append((r - statistics.fmean(g)) / (std + eps))
    check(credit(["grpo"], rollouts, owners=line).advantages, wanted)


@QUICK
@given(rollouts=scored())
def test_dr_grpo_and_rloo(rollouts: Rollouts) -> None:
    groups = by_group(rollouts)
    check(credit(["dr_grpo"], rollouts).advantages, [r - statistics.fmean(g) for r, g in groups])
    rloo = [r - (sum(g) - r) / (len(g) - 1) if len(g) > 1 else 0.0 for r, g in groups]
    check(credit(["rloo"], rollouts).advantages, rloo)


@QUICK
@given(rollouts=scored(), shift=st.floats(-5, 5))
def test_group_baselines_do_not_see_a_constant(rollouts: Rollouts, shift: float) -> None:
    for method in ("dr_grpo", "rloo"):
        before = credit([method], rollouts).advantages
        moved = make_rollouts(rollouts.scores + shift, rollouts.groups, tokens=2)
        torch.testing.assert_close(credit([method], moved).advantages, before, atol=1e-4, rtol=1e-4)


@QUICK
@given(rollouts=scored())
def test_batch_statistics(rollouts: Rollouts) -> None:
    scores = rollouts.scores.flatten().double().tolist()
    mean = statistics.fmean(scores)
    check(credit([], rollouts, owners={"baseline": "batch_mean", "advantage_scale": "one"}).advantages,
          [s - mean for s in scores])  # fmt: skip
    lines = {"baseline": "zero", "advantage_scale": {"batch_std": {"ddof": 0, "eps": 0.5}}}
    check(credit([], rollouts, owners=lines).advantages, [s / (statistics.pstdev(scores) + 0.5) for s in scores])


def test_equal_rewards_give_advantage_zero() -> None:
    rollouts = make_rollouts([0.7] * 4, [0, 0, 1, 1])
    for method in ("grpo", "dr_grpo", "rloo"):
        assert not credit([method], rollouts).advantages.any()


def test_a_scale_of_zero_gives_advantage_zero() -> None:
    class NoScale(Plugin):
        name = "no_scale"

        @hookimpl
        def advantage_scale(self, rewards: Tensor) -> Tensor:
            return torch.zeros_like(rewards)

    assert not credit([NoScale()], make_rollouts([1.0, 0.0])).advantages.any()


def plain_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """The recursion over each row's own tokens, the gaps skipped."""
    result = torch.zeros_like(values)
    for i in range(len(values)):
        running, following = 0.0, 0.0
        for t in reversed([t for t in range(values.shape[1]) if mask[i, t]]):
            delta = float(rewards[i, t]) + gamma * following - float(values[i, t])
            running = delta + gamma * lam * running
            following = float(values[i, t])
            result[i, t] = running
    return result


@st.composite
def valued(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    rows, tokens = draw(st.integers(1, 4)), draw(st.sampled_from([2, 5, 70, 131]))
    source = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (rows, 1), generator=source)
    if draw(st.booleans()):  # tool output in the middle
        mask &= torch.rand(rows, tokens, generator=source) < 0.6
    return (*torch.randn(2, rows, tokens, generator=source).double().unbind(), mask)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.0, 0.5), (0.9, 0.0)])
@QUICK
@given(data=valued())
def test_gae(gamma: float, lam: float, data: tuple[Tensor, Tensor, Tensor]) -> None:
    rewards, values, mask = data
    before = rewards.clone(), values.clone()
    result = above_values(lambda_returns(rewards, values, mask, gamma, lam), values, mask)
    torch.testing.assert_close(result, plain_gae(rewards, values, mask, gamma, lam), atol=1e-9, rtol=1e-9)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


def rollouts_with_values(gaps: bool = False) -> Rollouts:
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    if gaps:
        mask[0, 1] = mask[2, 3] = False
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)) * mask
    return make_rollouts([1.0, 0.0, 0.5, 1.0], [0, 0, 1, 1], mask=mask, values=values)


@pytest.mark.parametrize("gaps", [False, True])
def test_gae_through_the_stack_with_its_targets(gaps: bool) -> None:
    rollouts = rollouts_with_values(gaps)
    result = credit([{"gae": {"gamma": 0.9, "lam": 0.7, "whiten": False}}], rollouts)
    placed = torch.zeros(4, 5)
    placed[0, 3], placed[1, 1], placed[2, 4] = 1.0, 0.0, 0.5
    wanted = plain_gae(placed, rollouts.values, rollouts.mask, 0.9, 0.7)
    torch.testing.assert_close(result.advantages, wanted)
    targets, counted = result.value_targets
    torch.testing.assert_close(targets, wanted + rollouts.values)
    assert torch.equal(counted.bool(), rollouts.mask)


def plain_whitened(values: Tensor, mask: Tensor) -> Tensor:
    own = [float(v) for v, m in zip(values.flatten(), mask.flatten(), strict=True) if m]
    mean, variance = statistics.fmean(own), statistics.variance(own)
    return torch.where(mask, (values - mean) / math.sqrt(variance + 1e-8), 0.0)


def test_gae_is_whitened_over_the_tokens_of_rows_in_a_group_unless_told_otherwise() -> None:
    rollouts = rollouts_with_values()
    rollouts.groups[1] = -1
    raw = credit([{"gae": {"whiten": False}}], rollouts).advantages
    grouped = rollouts.mask & (rollouts.groups >= 0)[:, None]
    torch.testing.assert_close(credit(["gae"], rollouts).advantages, plain_whitened(raw, grouped))


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_reinforce_plus_plus(gamma: float) -> None:
    rollouts = rollouts_with_values()
    returns = torch.zeros(4, 5)
    for i, size in enumerate([4, 2, 5, 0]):
        for t in range(size):
            returns[i, t] = float(rollouts.scores[i]) * gamma ** (size - 1 - t)
    result = credit([{"reinforce_plus_plus": {"gamma": gamma}}], rollouts).advantages
    torch.testing.assert_close(result * rollouts.mask, plain_whitened(returns, rollouts.mask))
    assert result.shape == ((4, 1) if gamma == 1 else (4, 5))


def test_segments_and_tokens() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    token = make_builtin("segment_tokens", "token").segment_tokens(mask)
    assert token.tolist() == [[0, 1, -1], [0, -1, -1]]
    assert make_builtin("segment_tokens", "response").segment_tokens(mask).tolist() == [[0, 0, -1], [0, -1, -1]]


# prompts


@given(prompts=st.integers(1, 17), count=st.integers(1, 23), seed=st.integers(0, 99))
@QUICK
def test_shuffled_visits_every_prompt_once_per_epoch(prompts: int, count: int, seed: int) -> None:
    pool = make_pool(prompts)
    stack, drawn = start([], pool=pool, seed=seed), []
    for step in range(-(-2 * prompts // count)):
        stack.begin_step(step, 100, seed)
        drawn += stack.choose_prompts(pool, count).tolist()
    for epoch in (0, 1):
        assert sorted(drawn[epoch * prompts : (epoch + 1) * prompts]) == list(range(prompts))


def test_epochs_and_seeds_have_other_orders() -> None:
    pool = make_pool(50)

    def order(step: int, seed: int) -> tuple[int, ...]:
        stack = start([], pool=pool, seed=seed)
        stack.begin_step(step, 9, seed)
        return tuple(stack.choose_prompts(pool, 50).tolist())

    assert order(0, 0) == order(0, 0) and len({order(0, 0), order(1, 0), order(0, 1)}) == 3


def test_weighted_draws_are_without_replacement_and_in_proportion() -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0, 1.0])
    source = torch.Generator().manual_seed(0)
    first, pairs = Counter(), Counter()
    for _ in range(8000):
        one, two = weighted_draw(weights, 2, source).tolist()
        assert one != two
        first[one] += 1
        pairs[one, two] += 1
    for place, weight in enumerate(weights.tolist()):
        assert first[place] / 8000 == pytest.approx(weight / 8, abs=0.02)
    assert pairs[3, 1] / 8000 == pytest.approx(4 / 8 * 2 / 4, abs=0.02)  # then in proportion to what is left
    assert 2 not in first


def test_a_weighted_draw_is_with_replacement_where_too_few_have_a_weight() -> None:
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    drawn = Counter(weighted_draw(weights, 4000, torch.Generator().manual_seed(0)).tolist())
    assert set(drawn) == {1, 3} and drawn[1] / 4000 == pytest.approx(0.75, abs=0.03)


@given(prompts=st.integers(1, 20), budget=st.integers(1, 100))
@QUICK
def test_uniform_gives_everyone_the_same_and_spends_the_budget(prompts: int, budget: int) -> None:
    counts = start([]).allocate_rollouts(make_pool(prompts), budget)
    assert int(counts.max() - counts.min()) <= 1 and int(counts.min()) >= 1
    assert int(counts.sum()) == max(budget, prompts)
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


# losses


class Fixed(Plugin):
    """Advantages that the test sets."""

    name = "fixed_advantages"
    value: float = 1.0

    @hookimpl
    def compute_advantages(self, rewards: Tensor) -> Tensor:
        return torch.full_like(rewards, self.value)


def loss_at(ratio: float, advantage: float, loss: Any = "ppo_clip", clip: Any = "fixed") -> tuple[float, float]:
    """Loss and gradient by the log-prob of a single token with this ratio."""
    rollouts = make_rollouts([0.0], tokens=1, old_log_probs=torch.tensor([[-1.0]]))
    stack = start([Fixed(value=advantage)], owners={"policy_loss": loss, "clip_range": clip} if loss != "reinforce"
                  else {"policy_loss": loss})  # fmt: skip
    value, gradient = loss_and_gradient(stack, rollouts, torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.float64))
    return float(value), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0), (1.1, 2.0, -2.2, -2.2), (1.5, 2.0, -2.4, 0.0), (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0), (0.5, -2.0, 1.6, 0.0), (0.9, -2.0, 1.8, 1.8),
    ],
)  # fmt: skip
def test_ppo_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert loss_at(ratio, advantage) == (pytest.approx(loss), pytest.approx(gradient))


@pytest.mark.parametrize(("ratio", "wanted"), [(1.27, -1.27), (1.3, -1.28), (0.7, -0.7), (0.95, -0.95)])
def test_the_bounds_may_be_asymmetric(ratio: float, wanted: float) -> None:
    assert loss_at(ratio, 1.0, clip={"fixed": {"low": 0.2, "high": 0.28}})[0] == pytest.approx(wanted)
    low = loss_at(0.7, -1.0, clip={"fixed": {"low": 0.1, "high": 0.28}})[0]
    assert low == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [(5.0, -2.0, 6.0, 0.0), (2.0, -2.0, 4.0, 4.0), (5.0, 2.0, -2.4, 0.0), (0.5, -2.0, 1.6, 0.0)],
)
def test_the_dual_clip_bounds_the_loss_of_negative_advantages(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    assert loss_at(ratio, advantage, {"ppo_clip": {"dual_clip": 3.0}}) == (pytest.approx(loss), pytest.approx(gradient))


@pytest.mark.parametrize(("ratio", "clipped"), [(0.5, 0.8), (1.1, 1.1), (3.0, 1.2)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_keeps_the_gradient_of_every_token(ratio: float, clipped: float, advantage: float) -> None:
    loss, gradient = loss_at(ratio, advantage, "cispo")
    assert gradient == pytest.approx(-clipped * advantage)
    assert loss == pytest.approx(-clipped * advantage * (-1 + math.log(ratio)))


def test_reinforce() -> None:
    loss, gradient = loss_at(3.0, 2.0, "reinforce")
    assert gradient == pytest.approx(-2.0) and loss == pytest.approx(-2 * (-1 + math.log(3)))


def test_gspo_clips_the_geometric_mean_and_weighs_all_tokens_of_a_response_alike() -> None:
    old = torch.full((2, 3), -1.0)
    rollouts = make_rollouts([0.0, 0.0], lengths=[3, 2], old_log_probs=old * torch.tensor([[1, 1, 1], [1, 1, 0]]))
    change = torch.tensor([[0.3, -0.3, 0.12], [0.5, 0.4, 0.0]], dtype=torch.float64)
    stack = start([Fixed()], owners={"policy_loss": "gspo", "reduce_loss": "sequence_mean"})
    loss, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs + change)
    ratio = math.exp(0.04)
    assert float(loss) == pytest.approx(-(ratio + 1.2) / 2)
    assert gradient[0].tolist() == pytest.approx([-ratio / 6] * 3) and gradient[1].tolist() == [0, 0, 0]


@QUICK
@given(difference=st.floats(-3, 3), coefficient=st.floats(0, 2))
def test_kl_estimators(difference: float, coefficient: float) -> None:
    formulas = {
        "k1": -difference, "k2": difference**2 / 2, "k3": math.exp(difference) - difference - 1,
    }  # fmt: skip
    slopes = {"k1": 1.0, "k2": -difference, "k3": 1 - math.exp(difference)}
    for name, wanted in formulas.items():
        rollouts = make_rollouts([0.0], tokens=1, ref_log_probs=torch.tensor([[-1.0 + difference]]))
        stack = start([Fixed(value=0.0)], owners={"kl_penalty": {name: {"coefficient": coefficient}}})
        loss, gradient = loss_and_gradient(stack, rollouts, torch.tensor([[-1.0]], dtype=torch.float64))
        assert float(loss) == pytest.approx(coefficient * wanted, abs=1e-5)
        assert float(gradient) == pytest.approx(coefficient * slopes[name], abs=1e-5)


def test_no_kl_needs_no_reference() -> None:
    assert "ref_log_probs" not in Stack([]).needed_columns
    assert "ref_log_probs" in Stack([], owners={"kl_penalty": "k3"}).needed_columns
    assert start([]).reference_policy() == "initial"


# names and options


def test_every_builtin_is_named_as_it_calls_itself_and_claims_its_hook() -> None:
    options = {"weighted_sum": {"weights": [1.0]}}
    for hook, named in BUILTINS.items():
        for name in named:
            plugin = make_builtin(hook, {name: options.get(name, {})})
            assert plugin.name == name and hasattr(plugin, hook) and hook in HOOKS and type(plugin).__doc__
    assert all(method.name == name and method.__doc__ for name, method in METHODS.items())


@pytest.mark.parametrize(
    ("hook", "name", "options"),
    [
        ("advantage_scale", "group_std", {"ddof": 2}), ("advantage_scale", "group_std", {"eps": -1.0}),
        ("advantage_scale", "batch_std", {"eps": "x"}), ("compute_advantages", "gae", {"gamma": 1.5}),
        ("compute_advantages", "gae", {"lam": -0.1}), ("compute_advantages", "reinforce_plus_plus", {"gamma": 2}),
        ("clip_range", "fixed", {"low": 1.5}), ("clip_range", "fixed", {"high": -0.1}),
        ("policy_loss", "ppo_clip", {"dual_clip": 1.0}), ("kl_penalty", "k1", {"coefficient": -1.0}),
        ("reduce_loss", "sequence_sum", {"constant": 0.0}), ("combine_rewards", "weighted_sum", {}),
        ("policy_loss", "cispo", {"nothing": 1}),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_with_their_name(hook: str, name: str, options: dict[str, Any]) -> None:
    field = next(iter(options), "weights")
    with pytest.raises(ConfigurationError, match=rf"{name}\.{field}"):
        Stack([], owners={hook: {name: options}})
    with pytest.raises(ValidationError):
        BUILTINS[hook][name](**options)
