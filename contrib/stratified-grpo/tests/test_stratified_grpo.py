"""Stratified GRPO: facts about the method, each through the stack."""

from __future__ import annotations

import functools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Stack
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_stratified_grpo import StratifiedGrpo, blended, variances

REWARDS = [1, 0, 0, 1, 0.5, 0, 0, 1]
GROUPS = [0, 0, 0, 0, 0, 0, 1, 1]
STRATA = [0, 0, 1, 1, 1, 2, 1, 1]
SAN = [0.999998, -0.999998, -1.224742, 1.224742, 0.0, 0.0, -0.999998, 0.999998]
GLOBAL_NORM = [1.299864, -0.9284746, -0.9284746, 1.299864, 0.1856949, -0.9284746, -0.999998, 0.999998]
ADVANTAGE = [1.059971, -0.9856933, -1.165488, 1.239766, 0.03713898, -0.1856949, -0.999998, 0.999998]


@functools.cache
def first_step(**options) -> Stack:
    """A stack whose first step is open; nothing is remembered, so that one serves many examples."""
    return start([{"stratified-grpo": options}])


def made(rewards, groups, strata, **options):
    return first_step(**options).credit(make_rollouts(rewards, groups, columns={"strata": strata}))


def advantages(rewards, groups, strata, **options) -> Tensor:
    return made(rewards, groups, strata, **options).advantages.flatten()


def close(values, expected, rel=2e-6, abs=1e-6) -> bool:
    return torch.as_tensor(values).tolist() == pytest.approx(torch.as_tensor(expected).tolist(), rel=rel, abs=abs)


def direct(rewards, groups, strata, alpha, eps=1e-6, ddof=0):
    """A by loops over groups and strata, in float64."""

    def norm(labels):
        result = np.zeros(len(rewards))
        for label in set(labels):
            rows = [i for i, other in enumerate(labels) if other == label]
            r = np.array([rewards[i] for i in rows], dtype=np.float64)
            sigma = r.std(ddof=ddof) if len(r) > ddof else 0.0
            result[rows] = (r - r.mean()) / (sigma + eps)
        return result

    return alpha * norm(list(zip(groups, strata, strict=True))) + (1 - alpha) * norm(groups)


@st.composite
def batches(draw, values=(0.0, 0.5, 1.0), names=(0, 1, 2)):
    """Rewards of some prompts with 1 to 6 responses each, and their strata."""
    groups = [group for group in range(draw(st.integers(1, 4))) for _ in range(draw(st.integers(1, 6)))]
    return [draw(st.sampled_from(values)) for _ in groups], groups, [draw(st.sampled_from(names)) for _ in groups]


alphas = st.sampled_from([0.0, 0.25, 0.6, 1.0])


# the card's numbers


def test_worked_example():
    assert close(advantages(REWARDS, GROUPS, STRATA, alpha=0.8), ADVANTAGE)


def test_worked_example_of_both_parts():
    assert close(advantages(REWARDS, GROUPS, STRATA, alpha=1.0), SAN)
    assert close(advantages(REWARDS, GROUPS, STRATA, alpha=0.0), GLOBAL_NORM)
    rewards = torch.tensor(REWARDS).double()[:, None]
    parts = blended(rewards, torch.tensor(GROUPS), torch.tensor(STRATA), 0.8)
    for part, expected in zip(parts, (ADVANTAGE, SAN, GLOBAL_NORM), strict=True):
        assert close(part.flatten(), expected)


def test_worked_example_of_the_variances():
    rewards = torch.tensor(REWARDS).double()[:, None]
    total, within, between = variances(rewards, torch.tensor(GROUPS), torch.tensor(STRATA))
    assert [float(part[0]) for part in (total, within, between)] == pytest.approx([0.2013889, 0.1666667, 0.03472222])


# identities


@given(batches((0.0, 0.1, 0.7, 1.0)), alphas, st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.3]))
@settings(max_examples=60, deadline=None)
def test_agrees_with_a_direct_evaluation(batch, alpha, ddof, eps):
    found = advantages(*batch, alpha=alpha, ddof=ddof, eps=eps)
    expected = direct(np.float32(batch[0]).tolist(), *batch[1:], alpha, eps, ddof)
    assert close(found, expected, rel=1e-5, abs=1e-5)


@given(batches())
@settings(max_examples=25, deadline=None)
def test_alpha_zero_is_grpo_with_the_population_std(batch):
    rollouts = make_rollouts(*batch[:2])
    grpo = start([], owners={"advantage_scale": {"group_std": {"ddof": 0}}}).credit(rollouts)
    assert close(advantages(*batch, alpha=0.0), grpo.advantages.flatten(), rel=1e-4, abs=1e-5)


@given(batches(names=(4,)), alphas)
@settings(max_examples=25, deadline=None)
def test_with_one_stratum_alpha_does_not_matter(batch, alpha):
    assert close(advantages(*batch, alpha=alpha), advantages(*batch, alpha=0.0), rel=1e-4, abs=1e-5)


@given(batches(), st.lists(st.sampled_from([-2.0, -0.5, 1.0, 4.0]), min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_pure_san_does_not_see_a_constant_per_stratum(batch, constants):
    rewards, groups, strata = batch
    moved = [reward + constants[stratum] for reward, stratum in zip(rewards, strata, strict=True)]
    assert close(advantages(moved, groups, strata, alpha=1.0), advantages(*batch, alpha=1.0), rel=1e-4, abs=1e-5)


def test_the_blend_sees_a_constant_per_stratum():
    moved = [reward + stratum for reward, stratum in zip(REWARDS, STRATA, strict=True)]
    assert not close(advantages(moved, GROUPS, STRATA), advantages(REWARDS, GROUPS, STRATA), abs=0.1)


@given(batches(), alphas, st.floats(0.5, 8), st.floats(-4, 4))
@settings(max_examples=25, deadline=None)
def test_a_positive_factor_and_a_constant_change_nothing(batch, alpha, factor, constant):
    rewards = torch.tensor(batch[0]).double() * factor + constant
    assert close(advantages(rewards, *batch[1:], alpha=alpha), advantages(*batch, alpha=alpha), rel=1e-4, abs=1e-4)


@given(batches(), alphas)
@settings(max_examples=25, deadline=None)
def test_a_stratum_of_one_or_of_equal_rewards_has_no_part_of_its_own(batch, alpha):
    rewards, groups, strata = batch
    found, san = advantages(*batch, alpha=alpha), advantages(*batch, alpha=1.0)
    rest = (1 - alpha) * advantages(*batch, alpha=0.0)
    pairs = list(zip(groups, strata, strict=True))
    for i, pair in enumerate(pairs):
        if len({reward for reward, other in zip(rewards, pairs, strict=True) if other == pair}) == 1:
            assert san[i] == 0
            assert float(found[i]) == pytest.approx(float(rest[i]), rel=1e-5, abs=1e-6)


@given(batches(), st.sampled_from([0.25, 0.6]))
@settings(max_examples=20, deadline=None)
def test_if_every_response_is_alone_only_the_global_part_is_left(batch, alpha):
    rewards, groups, _ = batch
    alone = list(range(len(rewards)))
    expected = (1 - alpha) * advantages(rewards, groups, alone, alpha=0.0)
    assert close(advantages(rewards, groups, alone, alpha=alpha), expected)
    assert advantages(rewards, groups, alone, alpha=1.0).abs().max() == 0


@pytest.mark.parametrize("alpha", [0.6, 1.0])
@given(value=st.floats(-3, 3, width=32), size=st.integers(1, 11))
@settings(max_examples=15, deadline=None)
def test_equal_rewards_in_the_group_have_advantage_exactly_zero(alpha, value, size):
    found = advantages([value] * size, [0] * size, [place % 2 for place in range(size)], alpha=alpha)
    assert found.abs().max() == 0


@given(batches((0.0, 0.3, 1.0)))
@settings(max_examples=25, deadline=None)
def test_pure_san_has_mean_zero_and_variance_one_in_each_stratum(batch):
    rewards, groups, strata = batch
    san = advantages(*batch, alpha=1.0).double()
    pairs = list(zip(groups, strata, strict=True))
    for pair in set(pairs):
        rows = [i for i, other in enumerate(pairs) if other == pair]
        assert float(san[rows].mean()) == pytest.approx(0, abs=1e-5)
        if len({rewards[i] for i in rows}) > 1:
            assert float(san[rows].square().mean()) == pytest.approx(1, rel=1e-4)


@given(batches((0.0, 0.3, 1.0)))
@settings(max_examples=25, deadline=None)
def test_the_cross_stratum_bias_is_what_the_variance_loses(batch):
    rewards, groups, strata = (torch.tensor(column) for column in batch)
    total, within, between = variances(rewards.double()[:, None], groups, strata)
    assert torch.allclose(total - within, between, atol=1e-12)
    assert bool((between >= 0).all())
    stack = start(["stratified-grpo"])
    stack.credit(make_rollouts(*batch[:2], columns={"strata": strata}))
    logged = dict(stack.metrics)["rlplugins/stratified-grpo/cross_stratum_bias"]
    assert logged == pytest.approx(float(between.mean()), abs=1e-6)


@given(batches(), alphas, st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_order_of_rows_and_numbers_of_groups_do_not_matter(batch, alpha, random):
    order = random.sample(range(len(batch[0])), len(batch[0]))
    rewards, groups, strata = ([column[i] for i in order] for column in batch)
    shuffled = advantages(rewards, [10**12 + 7 * group for group in groups], strata, alpha=alpha)
    assert close(shuffled, advantages(*batch, alpha=alpha)[order], rel=1e-4, abs=1e-5)


def test_strata_never_cross_prompts():
    together = advantages(REWARDS, GROUPS, STRATA)
    assert close(together[:6], advantages(REWARDS[:6], GROUPS[:6], STRATA[:6]))
    assert close(together[6:], advantages(REWARDS[6:], GROUPS[6:], STRATA[6:]))


# where the strata come from


@pytest.mark.parametrize(
    "column",
    [
        torch.tensor(STRATA), torch.tensor(STRATA)[:, None], torch.tensor(STRATA).float() - 0.5, STRATA,
        [f"{stratum} searches" for stratum in STRATA], np.array(["a", "b", "c"], dtype=object)[STRATA],
        [10**15 + stratum for stratum in STRATA], torch.tensor(STRATA) - 9,
    ],
)  # fmt: skip
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_strata_are_numbers_or_strings(column, alpha):
    assert close(advantages(REWARDS, GROUPS, column, alpha=alpha), ADVANTAGE if alpha == 0.8 else SAN)


def test_two_valued_strata():
    column = torch.tensor(STRATA) > 0
    assert close(advantages(REWARDS, GROUPS, column), advantages(REWARDS, GROUPS, column.long()))


@pytest.mark.parametrize(
    "column",
    [
        torch.where(torch.tensor(STRATA) == 1, torch.nan, torch.tensor(STRATA).float()),
        [None if stratum == 1 else stratum for stratum in STRATA],
        [math.nan if stratum == 1 else float(stratum) for stratum in STRATA],
        [(None if i % 2 else math.nan) if stratum == 1 else f"s{stratum}" for i, stratum in enumerate(STRATA)],
    ],
)
def test_missing_strata_are_one_stratum_of_their_own(column):
    assert close(advantages(REWARDS, GROUPS, column, alpha=0.8), ADVANTAGE)


def test_another_column_may_hold_the_strata():
    rollouts = make_rollouts(REWARDS, GROUPS, columns={"searches": STRATA})
    found = credit([{"stratified-grpo": {"alpha": 0.8, "strata": "searches"}}], rollouts).advantages
    assert close(found.flatten(), ADVANTAGE)


def test_without_a_column_the_tool_outputs_are_counted():
    mask = torch.tensor([
        [1, 1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 1], [1, 0, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0, 0],
    ])  # fmt: skip
    found = start([{"stratified-grpo": {"alpha": 0.8}}]).credit(make_rollouts(REWARDS, GROUPS, mask=mask))
    assert close(found.advantages.flatten(), ADVANTAGE)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_without_any_structure_it_is_grpo_and_says_so(alpha):
    rollouts = make_rollouts(REWARDS, GROUPS)
    with pytest.warns(UserWarning, match="no column 'strata'.*one stratum"):
        found = credit([{"stratified-grpo": {"alpha": alpha}}], rollouts).advantages.flatten()
    assert close(found, GLOBAL_NORM)


def test_it_says_so_once():
    stack = start(["stratified-grpo"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            stack.credit(make_rollouts(REWARDS, GROUPS))
    assert len(seen) == 1


def by_length(rollouts) -> Tensor:
    """Strata for `stratum_of`."""
    return rollouts.mask.sum(1)


def too_few(rollouts) -> list[int]:
    """No strata."""
    return [0]


@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_a_function_may_give_the_strata(alpha, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[stratum + 1 for stratum in STRATA], columns={"strata": [0] * 8})
    options = {"alpha": alpha, "stratum_of": "test_stratified_grpo:by_length"}
    found = credit([{"stratified-grpo": options}], rollouts).advantages.flatten()
    assert close(found, ADVANTAGE if alpha == 0.8 else SAN)
    with pytest.raises(HookError, match="too_few has shape"):
        credit([{"stratified-grpo": options | {"stratum_of": "test_stratified_grpo:too_few"}}], rollouts)


@pytest.mark.parametrize("path", ["no_such_module:f", "math:no_such_function"])
def test_a_function_that_is_not_there_is_an_error_before_the_first_step(path):
    with pytest.raises(ConfigurationError, match=r"stratified-grpo\.stratum_of.*cannot be imported"):
        start([{"stratified-grpo": {"stratum_of": path}}])


def test_more_than_one_stratum_per_response_is_an_error():
    with pytest.raises(HookError, match="not one stratum for each"):
        advantages(REWARDS, GROUPS, torch.zeros(8, 2))


# edge cases


@pytest.mark.parametrize("alpha", [0.6, 1.0])
@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_response_without_a_finite_reward_is_dropped_before_the_means(alpha, missing):
    result = made([*REWARDS, missing, missing], [*GROUPS, 0, 5], [*STRATA, 1, 1], alpha=alpha)
    assert close(result.advantages.flatten(), [*advantages(REWARDS, GROUPS, STRATA, alpha=alpha), 0, 0])
    assert result.weights.flatten().tolist() == [1] * 8 + [0, 0]


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_rows_without_a_group_pass_unchanged(alpha):
    result = made([9, *REWARDS, 7], [-1, *GROUPS, -1], [0, *STRATA, 1], alpha=alpha)
    assert close(result.advantages.flatten(), [0, *advantages(REWARDS, GROUPS, STRATA, alpha=alpha), 0])
    assert result.groups[[0, -1]].tolist() == [-1, -1]


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_group_of_one_single_prompt_and_nothing_left(alpha):
    assert advantages([1, 0, 1], [0, 1, 1], [0, 0, 0], alpha=alpha)[0] == 0
    assert close(advantages([0, 1], [3, 3], ["a", "a"], alpha=alpha), [-1, 1], abs=1e-5)
    assert advantages([math.nan] * 3, [0, 0, 1], [0, 1, 0], alpha=alpha).tolist() == [0] * 3
    rollouts = make_rollouts(REWARDS, GROUPS, columns={"strata": STRATA}).select(torch.zeros(0, dtype=torch.int64))
    assert first_step(alpha=alpha).credit(rollouts).advantages.shape == (0, 1)


def test_a_sample_std_of_one_response_is_not_nan():
    found = advantages(REWARDS, GROUPS, STRATA, ddof=1)
    assert close(found, direct(REWARDS, GROUPS, STRATA, 0.6, ddof=1))


# needs, facts and claims


def test_refused_with_a_plugin_that_breaks_what_it_assumes():
    with pytest.raises(StackError, match=r"response_rewards.*stratified-grpo assumes it, other breaks it"):
        Stack(["stratified-grpo", stand_in(breaks=["response_rewards"])])


@pytest.mark.parametrize(("alpha", "fact"), [(0.6, "reward_scale"), (1.0, "reward_scale"), (1.0, "equal_groups")])
def test_refused_with_a_plugin_that_assumes_what_it_breaks(alpha, fact):
    with pytest.raises(StackError, match=rf"{fact}.*other assumes it, stratified-grpo breaks it"):
        Stack([{"stratified-grpo": {"alpha": alpha}}, stand_in(assumes=[fact])])


def test_the_blend_keeps_the_groups_of_the_prompts():
    Stack(["stratified-grpo", stand_in(assumes=["equal_groups"])])
    assert made(REWARDS, GROUPS, STRATA).groups.tolist() == GROUPS
    assert len(made(REWARDS, GROUPS, STRATA, alpha=1.0).groups.unique()) == 4


def test_refused_where_prompts_have_one_response():
    with pytest.raises(StackError, match="2 or more"):
        Stack(["stratified-grpo"], trainer=Trainer(name="single", group_size=1))


def test_the_column_is_declared_and_optional():
    (need,) = [need for need in StratifiedGrpo(strata="calls").needs if need.kind == "column"]
    assert need.value == "calls" and not need.required
    Stack(["stratified-grpo"], trainer=Trainer(name="plain", columns=frozenset()))
    assert all(need.kind != "column" for need in StratifiedGrpo(stratum_of="math:floor").needs)


def test_refused_beside_other_owners():
    with pytest.raises(StackError, match="compute_advantages"):
        Stack(["stratified-grpo", "riskpo"])
    with pytest.raises(StackError, match="nobody reads it"):
        Stack(["stratified-grpo", "bnpo"])
    with pytest.raises(StackError, match="advantage_scale has one owner"):
        Stack([{"stratified-grpo": {"alpha": 1}}, "bnpo"])
    Stack(["stratified-grpo", "knapsack", "bapo"])


def test_pure_san_takes_another_scale():
    stack = start([{"stratified-grpo": {"alpha": 1}}], owners={"advantage_scale": "one"})
    found = stack.credit(make_rollouts(REWARDS, GROUPS, columns={"strata": STRATA})).advantages.flatten()
    assert close(found, [0.5, -0.5, -0.5, 0.5, 0, 0, -0.5, 0.5])


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": -0.1}, {"alpha": 1.1}, {"eps": -1e-6}, {"eps": math.inf}, {"ddof": 2},
        {"stratum_of": "a function"}, {"column": "strata"},
    ],
)  # fmt: skip
def test_options_out_of_range_name_plugin_and_field(options):
    with pytest.raises(ConfigurationError, match=r"stratified-grpo.*" + next(iter(options))):
        Stack([{"stratified-grpo": options}])


def test_options_change_the_advantages():
    plain = advantages(REWARDS, GROUPS, STRATA)
    for options in ({"alpha": 0.5}, {"eps": 0.1}, {"ddof": 1}):
        assert not close(plain, advantages(REWARDS, GROUPS, STRATA, **options), abs=1e-3)
    assert advantages(REWARDS, GROUPS, STRATA, eps=0.0).isfinite().all()


# the frame


@pytest.mark.parametrize("micro_batches", [2, 8])
@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_micro_batches_do_not_change_the_loss(micro_batches, alpha):
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[1, 4, 2, 0] * 2, columns={"strata": STRATA})
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(0)).double()
    log_probs = (rollouts.old_log_probs + 0.3 * noise) * rollouts.mask
    stack = start([{"stratified-grpo": {"alpha": alpha}}])
    whole, parts = (loss_and_gradient(stack, rollouts, log_probs, micro_batches=n) for n in (1, micro_batches))
    assert torch.allclose(whole[0], parts[0], atol=1e-10) and torch.allclose(whole[1], parts[1], atol=1e-10)
    assert (whole[1][3] == 0).all(), "an empty response has no gradient"


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_same_step_twice_gives_the_same_and_changes_no_input(alpha):
    rollouts = make_rollouts(REWARDS, GROUPS, columns={"strata": torch.tensor(STRATA)})
    scores, groups, strata = rollouts.scores.clone(), rollouts.groups.clone(), torch.tensor(STRATA)
    stack = start([{"stratified-grpo": {"alpha": alpha}}])
    first, second = stack.credit(rollouts).advantages, stack.credit(rollouts).advantages
    assert torch.equal(first, second) and first.shape == (8, 1) and first.dtype == torch.float32
    assert torch.equal(rollouts.scores, scores) and torch.equal(rollouts.groups, groups)
    assert torch.equal(rollouts.columns["strata"], strata)


def test_remembers_nothing(tmp_path):
    stack = start(["stratified-grpo"])
    stack.save(tmp_path / "state", 3)
    again = start(["stratified-grpo"])
    assert again.load(tmp_path / "state") == 3
    assert again.plugins[0].state.as_dict() == {}


def test_strata_are_reported():
    stack = start(["stratified-grpo"])
    stack.credit(make_rollouts(REWARDS, GROUPS, columns={"strata": STRATA}))
    metrics = {name.rpartition("/")[2]: value for name, value in stack.metrics}
    assert metrics["strata"] == pytest.approx(2) and metrics["alone"] == pytest.approx(1 / 8)
    assert metrics["cross_stratum_bias"] == pytest.approx(0.03472222 * 6 / 8)


# what every plugin must do


def with_strata(rollouts):
    rollouts["strata"] = rollouts.responses[:, 1] % 3
    return rollouts


test_conformance = conformance("stratified-grpo", [{}, {"alpha": 1.0}, {"ddof": 1}], rows=with_strata)
