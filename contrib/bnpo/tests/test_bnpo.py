"""BNPO: facts about the method, each through the stack."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Stack, ops
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.rollouts import Rollouts
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_bnpo import Bnpo, beta_parameters

REWARDS = [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
EXPECTED = [0.7415411, -0.2471804, -0.2471804, -0.2471804, 0.4691657, 0.4691657, -0.4691657, -0.4691657, 0, 0, 0, 0]
SECOND_PART = [1, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0]
EXPECTED_OF_TWO = [0.4433241, -0.05103664, -0.3412508, -0.05103664, 0.3071364, 0.01692226, -0.1620293, -0.1620293,
                   -0.1646759, 0.1646759, 0.1646759, -0.1646759]  # fmt: skip


def advantages(rewards, groups, options=None, **lines) -> Tensor:
    return credit([{"bnpo": options or {}}], make_rollouts(rewards, groups), **lines).advantages.flatten()


def decomposed(parts, groups, **options) -> Tensor:
    parts = torch.as_tensor(parts, dtype=torch.float32)
    rollouts = make_rollouts(parts.sum(0), groups, components=parts.T)
    return credit([{"bnpo": {"decompose": True, **options}}], rollouts).advantages.flatten()


def close(values, expected, rel=2e-6, abs=1e-7) -> bool:
    return torch.as_tensor(values).tolist() == pytest.approx(torch.as_tensor(expected).tolist(), rel=rel, abs=abs)


@st.composite
def binary_batches(draw, fewest=1, most=6, certain=True):
    """0/1 rewards of some prompts with 2 to 7 responses each; `certain`: also prompts without any or without a miss."""
    rewards, groups = [], []
    for group in range(draw(st.integers(fewest, most))):
        size = draw(st.integers(2, 7))
        right = draw(st.integers(0, size) if certain else st.integers(1, size - 1))
        rewards += draw(st.permutations([1.0] * right + [0.0] * (size - right)))
        groups += [group] * size
    return rewards, groups


# the card's numbers


def test_worked_example():
    assert close(advantages(REWARDS, GROUPS), EXPECTED)


def test_worked_example_of_two_parts():
    assert close(decomposed([REWARDS, SECOND_PART], GROUPS), EXPECTED_OF_TWO)


def test_fitted_parameters_are_logged():
    stack = start(["bnpo"])
    stack.credit(make_rollouts(REWARDS, GROUPS))
    assert dict(stack.metrics)["rlplugins/bnpo/alpha"] == pytest.approx(1.12963, abs=1e-5)
    assert dict(stack.metrics)["rlplugins/bnpo/beta"] == pytest.approx(1.092593, abs=1e-6)


# identities


@given(binary_batches())
@settings(max_examples=60, deadline=None)
def test_agrees_with_a_direct_evaluation(batch):
    rewards, groups = np.array(batch[0]), np.array(batch[1])
    p = np.array([rewards[groups == q].mean() for q in np.unique(groups)])
    a = b = 0.0
    if len(p) > 1 and p.var(ddof=1) > 1e-12:
        m, v = p.mean(), p.var(ddof=1)
        a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    alpha, beta = max(1, 1 + a / 3), max(1, 1 + b / 3)
    norm = math.exp(math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta))
    with np.errstate(divide="ignore"):
        weight = np.minimum(norm * p ** (1 - alpha) * (1 - p) ** (1 - beta), 1e6)
    assert close(advantages(rewards, groups), weight[groups] * (rewards - p[groups]), rel=1e-5, abs=1e-6)


@given(binary_batches(most=1))
@settings(max_examples=25, deadline=None)
def test_one_prompt_is_reinforce_with_a_mean_baseline(batch):
    rewards, groups = batch
    assert close(advantages(rewards, groups), torch.tensor(rewards) - np.mean(rewards))


@given(st.integers(1, 3), st.integers(2, 5))
@settings(max_examples=15, deadline=None)
def test_equal_success_rates_are_reinforce_with_a_mean_baseline(right, prompts):
    rewards = ([1.0] * right + [0.0] * (4 - right)) * prompts
    groups = [group for group in range(prompts) for _ in range(4)]
    assert close(advantages(rewards, groups), torch.tensor(rewards) - right / 4)


def test_fit_of_three_halves_is_grpo_with_the_population_std_times_pi_over_eight():
    right = [1, 3, 1, 3, 2]  # of four: the rates have mean 1/2 and variance 1/16
    rewards = torch.tensor([1.0 if draw < k else 0.0 for k in right for draw in range(4)])
    groups = torch.arange(5).repeat_interleave(4)
    p = ops.group_mean(rewards[:, None], groups).flatten()
    assert torch.tensor(right).div(4).var() == pytest.approx(1 / 16)
    std = ops.group_std(rewards[:, None], groups, ddof=0).flatten()
    assert close(advantages(rewards, groups), math.pi / 8 * (rewards - p) / std)


@given(binary_batches())
@settings(max_examples=30, deadline=None)
def test_prompts_that_are_always_right_or_always_wrong_have_advantage_zero(batch):
    rewards, groups = torch.tensor(batch[0]), torch.tensor(batch[1])
    p = ops.group_mean(rewards[:, None], groups).flatten()
    sure = (p == 0) | (p == 1)
    found = advantages(rewards, groups)
    assert (found[sure] == 0).all()
    assert (found[~sure].sign() == (rewards - p)[~sure].sign()).all()


def test_rounding_of_a_certain_prompt_is_not_multiplied_by_the_largest_weight():
    # ten times 0.1 in float32 has a mean that is not 0.1, and max = 0.1 makes the prompt certain
    rewards = [0.1] * 10 + [0.1, 0.0] + [0.05, 0.02]
    found = advantages(rewards, [0] * 10 + [1, 1, 2, 2], {"reward_max": 0.1})
    assert found[:10].abs().max() < 1e-6


@given(binary_batches(), st.floats(-2, 2), st.floats(0.5, 4))
@settings(max_examples=30, deadline=None)
def test_affine_change_of_rewards_and_range_changes_nothing(batch, low, width):
    rewards, groups = torch.tensor(batch[0]), batch[1]
    options = {"reward_min": low, "reward_max": low + width}
    moved = advantages(low + width * rewards, groups, options, allow=["unit_rewards"])
    expected = advantages(rewards, groups)
    assert close(moved, expected, rel=1e-4, abs=1e-4)


@given(binary_batches(certain=False), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_order_of_rows_and_numbers_of_groups_do_not_matter(batch, random):
    rewards, groups = torch.tensor(batch[0]), torch.tensor(batch[1])
    order = torch.tensor(random.sample(range(len(rewards)), len(rewards)))
    shuffled = advantages(rewards[order], 10**12 + 7 * groups[order])
    assert close(shuffled, advantages(rewards, groups)[order])


@given(binary_batches(fewest=2))
@settings(max_examples=30, deadline=None)
def test_parameters_are_at_least_one_and_each_prompt_counts_once(batch):
    rewards, groups = torch.tensor(batch[0])[:, None], torch.tensor(batch[1])
    alpha, beta = beta_parameters(ops.group_mean(rewards, groups), groups)
    assert alpha >= 1 and beta >= 1
    twice, again = torch.cat([rewards, rewards]), torch.cat([groups, groups])  # same rates from twice the responses
    assert torch.allclose(beta_parameters(ops.group_mean(twice, again), again)[0], alpha)


def test_spread_beyond_a_beta_distribution_clamps_both_parameters_to_one():
    found = advantages([1, 1, 0, 0], [0, 0, 1, 1])  # p = 0 and 1: v = 1/2 is more than m (1 - m) = 1/4
    assert found.tolist() == [0, 0, 0, 0]
    p, groups = torch.tensor([[1.0], [1], [0], [0]]), torch.tensor([0, 0, 1, 1])
    assert [float(x) for x in beta_parameters(p, groups)] == [1, 1]


def test_large_parameters_do_not_overflow():
    size = 1000
    rewards = torch.cat([torch.arange(size) < k for k in (500, 501, 502)]).float()
    groups = torch.arange(3).repeat_interleave(size)
    p = ops.group_mean(rewards[:, None], groups)
    alpha, _ = beta_parameters(p, groups)
    assert alpha > 1e4
    found = advantages(rewards, groups)
    assert found.isfinite().all() and (found != 0).all()


# edge cases


def test_a_group_of_one_has_advantage_zero_and_is_left_out_of_the_fit():
    alone = advantages([*REWARDS, 1], [*GROUPS, 3])
    assert alone[-1] == 0
    assert close(alone[:-1], EXPECTED)


def test_a_row_without_a_finite_reward_is_dropped_before_the_fit():
    for missing in (math.nan, math.inf):
        made = credit(["bnpo"], make_rollouts([*REWARDS, missing, missing], [*GROUPS, 0, 7]))
        assert close(made.advantages.flatten(), [*EXPECTED, 0, 0])
        assert made.weights.flatten().tolist() == [1] * 12 + [0, 0]


def test_rows_without_a_group_neither_count_nor_get_an_advantage():
    assert close(advantages([*REWARDS, 1, 0], [*GROUPS, -1, -1]), [*EXPECTED, 0, 0])


def test_a_part_without_a_value_adds_nothing_for_that_row():
    nan = math.nan
    rollouts = make_rollouts(
        [*REWARDS, 1], [*GROUPS, 0], components=torch.tensor([[*REWARDS, nan], [*SECOND_PART, 1]]).T
    )
    found = credit([{"bnpo": {"decompose": True}}], rollouts).advantages.flatten()
    second = decomposed([[*SECOND_PART, 1]], [*GROUPS, 0])
    assert close(found, (torch.tensor([*EXPECTED, 0.0]) + second) / 2)


def test_nothing_left_after_filtering():
    made = credit(["bnpo"], make_rollouts([math.nan] * 3, [0, 0, 1]))
    assert made.advantages.tolist() == [[0], [0], [0]] and made.weights.sum() == 0
    empty = make_rollouts(REWARDS, GROUPS).select(torch.zeros(0, dtype=torch.int64))
    assert credit(["bnpo"], empty).advantages.shape == (0, 1)


def test_an_empty_response_has_no_part_in_the_loss():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[4, 0, *[3] * 10])
    loss, gradient = loss_and_gradient(start(["bnpo"]), rollouts, rollouts.old_log_probs)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[1] == 0).all()


def test_success_rates_outside_of_the_range_are_an_error():
    with pytest.raises(HookError, match=r"bnpo\.advantage_scale.*reward_max"):
        advantages([3, 0, 2, 2], [0, 0, 1, 1], allow=["unit_rewards"])
    with pytest.raises(HookError, match=r"bnpo\.compute_advantages.*reward_min"):
        decomposed([[1, 0, -3, 0]], [0, 0, 1, 1])


def test_rewards_outside_of_the_unit_interval_are_refused_unless_allowed():
    with pytest.raises(HookError, match="unit_rewards"):
        advantages([1, -1, 1, -1], [0, 0, 1, 1], {"reward_min": -1})


def test_decompose_without_parts_is_an_error():
    with pytest.raises(HookError, match="components"):
        credit([{"bnpo": {"decompose": True}}], make_rollouts(REWARDS, GROUPS))


# options


def test_w_max_bounds_the_weight():
    bounded = advantages(REWARDS, GROUPS, {"w_max": 0.95})
    rate = torch.tensor([0.25] * 4 + [0.5] * 4 + [1.0] * 4)
    weight = torch.tensor([0.95] * 4 + [0.9383315] * 4 + [1.0] * 4)
    assert close(bounded, weight * (torch.tensor(REWARDS) - rate))


def test_decompose_of_one_part_is_the_plain_method():
    assert close(decomposed([REWARDS], GROUPS), EXPECTED)


def test_the_range_belongs_to_each_part():
    parts = 10 * torch.tensor([REWARDS, SECOND_PART]) - 5
    assert close(decomposed(parts, GROUPS, reward_min=-5, reward_max=5), EXPECTED_OF_TWO)


@pytest.mark.parametrize(
    "options",
    [{"w_max": 0}, {"w_max": math.inf}, {"reward_min": math.nan}, {"reward_max": 0}, {"reward_min": 1}, {"w": 1}],
)
def test_options_out_of_range_name_plugin_and_field(options):
    with pytest.raises(ConfigurationError, match=r"bnpo.*" + next(iter(options))):
        Stack([{"bnpo": options}])


# needs, facts and claims


@pytest.mark.parametrize("fact", ["unit_rewards", "response_rewards", "absolute_advantages"])
def test_refused_with_a_plugin_that_breaks_what_it_assumes(fact):
    with pytest.raises(StackError, match=rf"{fact}.*bnpo assumes it, other breaks it"):
        Stack(["bnpo", stand_in(breaks=[fact])])
    Stack(["bnpo", stand_in(breaks=[fact])], allow=[fact])


def test_decompose_assumes_nothing_about_the_total_reward():
    assert Bnpo(decompose=True).assumes == {"absolute_advantages"}
    made = decomposed([[1, 1, 0, 0], [1, 1, 1, 0]], [0, 0, 1, 1])  # totals up to 2
    assert made.isfinite().all()


def test_refused_where_prompts_have_one_response():
    with pytest.raises(StackError, match="2 or more"):
        Stack(["bnpo"], trainer=Trainer(name="single", group_size=1))


def test_refused_beside_another_owner_of_scale_or_baseline():
    with pytest.raises(StackError, match="advantage_scale has one owner"):
        Stack(["bnpo", "grpo"])
    with pytest.raises(StackError, match="baseline has one owner"):
        Stack(["bnpo", "rloo"], owners={"advantage_scale": "bnpo"})


def test_decompose_needs_the_components():
    with pytest.raises(StackError, match="components"):
        Stack([{"bnpo": {"decompose": True}}], trainer=Trainer(name="plain", columns=frozenset()))
    Stack(["bnpo"], trainer=Trainer(name="plain", columns=frozenset()))


def test_half_of_bnpo_and_half_of_grpo():
    rollouts = make_rollouts(REWARDS, GROUPS)
    both = credit(["bnpo", "grpo"], rollouts, owners={"compute_advantages": {"bnpo": 0.5, "grpo": 0.5}}).advantages
    assert torch.allclose(both, (credit(["bnpo"], rollouts).advantages + credit(["grpo"], rollouts).advantages) / 2)


# the frame


@pytest.mark.parametrize("micro_batches", [2, 12])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sequence_sum"])
def test_micro_batches_do_not_change_the_loss(micro_batches, reduction):
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[1, 4, 2, 3] * 3)
    current = (
        rollouts.old_log_probs + 0.3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * rollouts.mask
    )
    stack = start(["bnpo"], owners={"reduce_loss": reduction})
    whole, parts = (loss_and_gradient(stack, rollouts, current, micro_batches=n) for n in (1, micro_batches))
    assert torch.allclose(whole[0], parts[0], atol=1e-6) and torch.allclose(whole[1], parts[1], atol=1e-6)


def test_token_sum_and_mean_over_sequences_of_the_run_script():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[1, 4, 2, 3] * 3)
    loss, _ = loss_and_gradient(
        start(["bnpo"], owners={"reduce_loss": "sequence_sum"}), rollouts, rollouts.old_log_probs
    )
    sums = -torch.tensor(EXPECTED) * rollouts.mask.sum(1)  # ratio 1
    assert loss.item() == pytest.approx(sums.mean().item(), rel=1e-5)


def test_the_same_step_twice_gives_the_same_and_changes_no_input():
    rollouts = make_rollouts(REWARDS, GROUPS)
    before = rollouts.scores.clone()
    stack = start(["bnpo"])
    first, second = stack.credit(rollouts).advantages, stack.credit(rollouts).advantages
    assert torch.equal(first, second) and first.shape == (12, 1)
    assert torch.equal(rollouts.scores, before)


def test_remembers_nothing(tmp_path):
    stack = start(["bnpo"])
    stack.save(tmp_path / "state", 3)
    again = start(["bnpo"])
    assert again.load(tmp_path / "state") == 3
    assert Bnpo().init_state(None) == {}
    assert torch.equal(
        again.credit(make_rollouts(REWARDS, GROUPS)).advantages, stack.credit(make_rollouts(REWARDS, GROUPS)).advantages
    )


# what every plugin must do


def with_components(rollouts: Rollouts) -> Rollouts:
    return replace(rollouts, components=torch.cat([rollouts.scores, 7 * rollouts.scores % 1], dim=1))


test_conformance = conformance("bnpo", [{}, {"decompose": True}], rows=with_components)
