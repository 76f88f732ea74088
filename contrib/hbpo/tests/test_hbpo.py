"""Facts about HBPO, through the stack."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Requests
from rlplugins.stack import Stack
from rlplugins.testing import conformance, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_hbpo import Hbpo

BUDGETS = [512, 1024, 2048, 2560]
LENGTH = [300, 700, 1000, 2000, 1500, 4000, 2600, 4097]
CORRECT = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
F2 = [3.9231411, 3.6955181, 2.8284271, 2.2222809]
R_MIN = [3.921799, 3.8108378, 3.6955181, 0.0, 2.8284271, -0.32933361, 2.1612375, 0.0]
R_PIECEWISE = [3.9231411, 3.8108378, 3.6955181, 0.0, 2.8284271, -0.32933361, 2.1612375, 0.0]
A_INTER = [1.032253, 0.97230761, 0.91000755, -1.086451, 0.44157221, -1.2643695, 0.081131164, -1.086451]
A_INTRA = [-0.056822696, -0.056822696, -1.8477591, -1.8477591, -1.5788804, -1.5788804, -1.1416622, -1.1416622]
A = [0.97543035, 0.91548491, -0.93775151, -2.9342101, -1.1373082, -2.8432499, -1.060531, -2.2281132]


def requests_of(stack, counts, **fields):
    """The requests for so many responses to each prompt, as the stack sends them."""
    requests = Requests.of(make_pool(len(counts)), torch.tensor(counts))
    return stack.rewrite_prompts(replace(requests, **fields))


def drawn(stack, counts, scores, lengths, **fields):
    """Rows as a trainer makes them of the requests; each response has so many tokens."""
    requests = requests_of(stack, counts)
    return make_rollouts(scores, requests.prompt, lengths=lengths, columns=requests.columns, **fields)


def opened(options=None, plugins=("grpo",), **lines):
    return start([*plugins, {"hbpo": options or {}}], **lines)


def credited(options=None, counts=(8,), scores=CORRECT, lengths=LENGTH, **fields):
    """The stack, what it makes of the rows, and the rows."""
    stack = opened(options)
    rollouts = drawn(stack, list(counts), scores, lengths, **fields)
    return stack, stack.credit(rollouts), rollouts


def rewards(options=None, **fields):
    return credited(options, **fields)[1].rewards.flatten().tolist()


def advantages(options=None, **fields):
    return credited(options, **fields)[1].advantages.flatten().tolist()


# the worked example


@pytest.mark.parametrize(("mode", "expected"), [("min", R_MIN), ("piecewise", R_PIECEWISE)])
def test_the_worked_rewards(mode, expected):
    assert rewards({"mode": mode}) == pytest.approx(expected, abs=2e-6)


def test_the_worked_advantages():
    assert advantages({"intra_weight": 0}) == pytest.approx(A_INTER, abs=2e-6)
    assert advantages() == pytest.approx(A, abs=2e-6)
    assert [a - b for a, b in zip(A, A_INTER, strict=True)] == pytest.approx(A_INTRA, abs=2e-6)


def test_the_released_advantages_have_the_intra_term_twice():
    expected = [inter + 2 * intra for inter, intra in zip(A_INTER, A_INTRA, strict=True)]
    assert advantages({"intra_weight": 2}) == pytest.approx(expected, abs=4e-6)


def test_a_response_of_its_budget_earns_f2():
    assert rewards(scores=[1.0] * 4, counts=[4], lengths=BUDGETS) == pytest.approx(F2, abs=2e-6)


# budgets


def test_responses_share_the_budgets_and_begin_with_theirs():
    requests = requests_of(opened(), [8, 4])
    expected = [512, 512, 1024, 1024, 2048, 2048, 2560, 2560, *BUDGETS]
    assert requests.columns["budget"].tolist() == [[budget] for budget in expected]
    assert requests.prefixes == [f"I will answer the question with {budget} tokens" for budget in expected]
    assert requests.texts == ["prompt 0"] * 8 + ["prompt 1"] * 4


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=4), st.integers(1, 6))
def test_the_shares_are_as_equal_as_they_can_be_and_ascend(counts, parts):
    budgets = [16 * place for place in range(1, parts + 1)]
    column = requests_of(opened({"budgets": budgets}), counts).columns["budget"].flatten().tolist()
    for count in counts:
        own, column = column[:count], column[count:]
        sizes = [own.count(budget) for budget in budgets]
        assert own == [budgets[j * parts // count] for j in range(count)] == sorted(own)
        assert max(sizes) - min(sizes) <= 1


def test_a_forced_beginning_that_is_there_stays_in_front():
    requests = requests_of(opened({"prefix": "{budget}!"}), [4], prefixes=["<think> "] * 4)
    assert requests.prefixes == [f"<think> {budget}!" for budget in BUDGETS]


def test_the_requests_that_were_given_stay_as_they_are():
    requests = Requests.of(make_pool(1), torch.tensor([4]))
    opened().rewrite_prompts(requests)
    assert requests.prefixes == [""] * 4 and not requests.columns


# identities


lengths_of_eight = st.lists(st.integers(1, 40), min_size=8, max_size=8)
scores_of_eight = st.lists(st.sampled_from([0.0, 1.0, float("nan")]), min_size=8, max_size=8)
SMALL = {"budgets": [4, 8, 16, 24], "L": 32, "alpha": 1 / 32}


@settings(max_examples=25, deadline=None)
@given(lengths_of_eight, scores_of_eight, st.sampled_from(["min", "piecewise"]))
def test_no_reward_is_above_f2_and_so_no_sub_group_is_above_0(lengths, scores, mode):
    _, made, rollouts = credited(SMALL | {"mode": mode}, scores=scores, lengths=lengths)
    f2 = 4 * torch.cos(math.pi * rollouts["budget"] / 64)
    assert bool((made.rewards <= f2 + 1e-6).all())
    inter = stack_of_grpo(made.rewards, made.groups)
    assert bool((made.advantages - inter <= 1e-6).all())


def stack_of_grpo(values, groups):
    """GRPO's advantages of these rewards."""
    return start(["grpo"]).credit(make_rollouts(values, groups)).advantages


@settings(max_examples=25, deadline=None)
@given(lengths_of_eight, scores_of_eight, st.sampled_from([0.0, 1.0, 2.5]))
def test_the_intra_term_by_its_formula(lengths, scores, weight):
    _, made, rollouts = credited(SMALL | {"intra_weight": weight}, scores=scores, lengths=lengths)
    values, budgets = made.rewards.flatten().tolist(), rollouts["budget"].flatten().tolist()
    kept = [row for row in range(8) if not math.isnan(scores[row])]
    inter = stack_of_grpo(made.rewards, made.groups).flatten().tolist()
    for row in range(8):
        part = [values[other] for other in kept if budgets[other] == budgets[row]]
        expected = inter[row]
        if row in kept and len(kept) > 1:
            expected += weight * (sum(part) / len(part) - 4 * math.cos(math.pi * budgets[row] / 64))
        assert made.advantages[row].item() == pytest.approx(expected if row in kept else 0.0, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(25, 32))
def test_short_answers_favour_small_budgets_and_long_ones_large_budgets(short, long):
    options = SMALL | {"mode": "piecewise"}
    low, high = (rewards(options, scores=[1.0] * 4, counts=[4], lengths=[n] * 4) for n in (short, long))
    assert low == sorted(low, reverse=True) and len(set(low)) == 4
    assert high == sorted(high) and len(set(high)) == 4


@settings(max_examples=25, deadline=None)
@given(lengths_of_eight)
def test_the_modes_agree_beyond_the_budget(lengths):
    one, other = (rewards(SMALL | {"mode": mode}, scores=[1.0] * 8, lengths=lengths) for mode in ("min", "piecewise"))
    budgets = [budget for budget in SMALL["budgets"] for _ in range(2)]
    for row, (n, b) in enumerate(zip(lengths, budgets, strict=True)):
        saved = 4 * (math.cos(math.pi * n / 64) - math.cos(math.pi * b / 64))
        if n > b or (b - n) / 32 < saved - 1e-6:
            assert one[row] == other[row]


def test_without_beta_and_alpha_all_rewards_are_0():
    assert rewards({"alpha": 0, "beta": 0}) == [0.0] * 8


def test_one_budget_of_the_whole_length_pays_nothing():
    assert rewards({"budgets": [4096], "alpha": 0}) == pytest.approx([0.0] * 8, abs=1e-6)


def test_without_the_intra_term_it_is_grpo_on_the_shaped_rewards():
    _, made, rollouts = credited({"intra_weight": 0})
    assert torch.equal(made.advantages, stack_of_grpo(made.rewards, rollouts.groups))


def test_an_all_wrong_group_is_pushed_down_most_at_the_smallest_budget():
    found = advantages(scores=[0.0] * 4, counts=[4], lengths=[100] * 4)
    assert found == pytest.approx([-value for value in F2], abs=2e-6) and found == sorted(found)


def test_a_right_answer_that_is_very_long_is_worth_less_than_a_wrong_one():
    assert rewards()[5] < 0 == rewards()[3]


# edges


def test_a_prompts_only_row_has_no_intra_term():
    found = advantages(scores=[1.0, 1.0, 1.0], counts=[1, 2], lengths=[600, 600, 600])
    alone = rewards(scores=[1.0], counts=[1], lengths=[600])
    assert found[0] == 0.0 != alone[0] - F2[0] and 0.0 not in found[1:]


def test_sub_groups_may_be_missing():
    found = advantages(scores=[1.0, 0.0, 1.0], counts=[3], lengths=[512, 600, 2048])
    assert len(found) == 3 and all(map(math.isfinite, found))


def test_an_answer_longer_than_L_is_wrong_and_the_beginning_counts():
    options = SMALL | {"wrong_reward": -9}
    found = rewards(options, scores=[1.0] * 4, counts=[4], lengths=[32, 33, 33, 32])
    assert found[1] == found[2] == -9 < min(found[0], found[3])
    prefix = torch.arange(33) < torch.tensor([0, 3, 0, 3])[:, None]
    assert rewards(options, scores=[1.0] * 4, counts=[4], lengths=[32, 33, 33, 32], prefix=prefix) == found


def test_a_response_with_nothing_behind_its_beginning_is_wrong():
    prefix = torch.arange(8) < torch.tensor([3, 2, 3, 8])[:, None]
    found = rewards(SMALL, scores=[1.0] * 4, counts=[4], lengths=[3, 3, 8, 8], prefix=prefix)
    assert found[0] == found[3] == 0.0 and min(found[1:3]) > 0
    assert rewards(SMALL, scores=[1.0] * 4, counts=[4], lengths=[0, 1, 1, 1])[0] == 0.0


def test_a_row_without_a_score_leaves_its_group():
    _, made, _ = credited(scores=[*CORRECT[:7], float("nan")])
    assert made.groups.tolist() == [0] * 7 + [-1]
    assert made.weights.flatten().tolist() == [1.0] * 7 + [0.0]
    others = advantages(scores=[*CORRECT[:7], float("nan")])
    assert others[6] == pytest.approx(inter_of(R_MIN[:7])[6] + R_MIN[6] - F2[3], abs=1e-5)


def inter_of(values):
    return stack_of_grpo(values, torch.zeros(len(values), dtype=torch.int64)).flatten().tolist()


def test_rows_of_no_group_keep_what_they_have():
    stack = opened()
    rollouts = drawn(stack, [8], CORRECT, LENGTH)
    rollouts = replace(rollouts, groups=torch.tensor([0] * 7 + [-1]))
    assert stack.credit(rollouts).advantages[7].item() == 0.0


# components


def with_parts(**parts):
    names = tuple(parts)
    return {"components": torch.tensor(list(zip(*parts.values(), strict=True))), "component_names": names}


def test_a_component_may_say_what_is_right():
    parts = with_parts(style=[0.2] * 8, right=CORRECT)
    assert rewards({"correct_component": "right"}, scores=[0.1] * 8, **parts) == pytest.approx(R_MIN, abs=2e-6)


def test_a_response_without_the_form_gets_the_released_penalty():
    options = {"format_component": "form", "format_reward": -1}
    parts = with_parts(form=[0.0, *[1.0] * 6, 0.0])
    assert rewards(options, **parts) == pytest.approx([-1.0, *R_MIN[1:7], -1.0], abs=2e-6)


def test_a_row_without_a_component_leaves_its_group():
    for options in ({"format_component": "form", "format_reward": -1}, {"correct_component": "form"}):
        _, made, _ = credited(options, **with_parts(form=[float("nan"), *[1.0] * 7]))
        assert made.groups.tolist() == [-1] + [0] * 7


@pytest.mark.parametrize("option", ["format_component", "correct_component"])
def test_a_component_that_is_not_there_is_named(option):
    with pytest.raises(HookError, match=r"no component 'right'; it gives: form"):
        credited({option: "right"}, **with_parts(form=[1.0] * 8))


def test_the_threshold_of_a_right_answer_is_strict():
    found = rewards({"correct_above": 0.7}, scores=[0.7, 0.8, 1.0, -1.0], counts=[4], lengths=[500] * 4)
    assert [value > 0 for value in found] == [False, True, True, False]


# the update


def test_the_ratio_is_clipped_at_1_28_and_0_8():
    def gradients(change, scores, options=None):
        stack = opened(options)
        rollouts = drawn(stack, [2], scores, [512, 512])
        return loss_and_gradient(stack, rollouts, rollouts.old_log_probs + change * rollouts.mask)[1].abs().sum(1) > 0

    good = [1.0, 0.0]  # the first row is above, the second below
    off = {"intra_weight": 0}
    assert gradients(math.log(1.27), good, off).tolist() == [True, True]
    assert gradients(math.log(1.29), good, off).tolist() == [False, True]
    assert gradients(math.log(0.79), good, off).tolist() == [True, False]
    assert gradients(math.log(1.29), good, off | {"clip_high": 0.3}).tolist() == [True, True]
    assert gradients(math.log(0.79), good, off | {"clip_low": 0.3}).tolist() == [True, True]


def test_the_forced_beginning_is_trained():
    stack = opened()
    prefix = torch.arange(6) < 3
    rollouts = drawn(stack, [4], [1.0, 0.0, 1.0, 0.0], [6] * 4, prefix=prefix.expand(4, 6))
    _, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs)
    assert bool((gradient[:, :3] != 0).all())


# what it says about itself


@pytest.mark.parametrize(
    ("options", "message"),
    [({"budgets": []}, "ascend"), ({"budgets": [512, 512]}, "ascend"), ({"budgets": [1024, 512]}, "ascend"),
     ({"budgets": [0, 512]}, "budgets"), ({"L": 2000}, "2560 is above L 2000"), ({"beta": -1}, "beta"),
     ({"alpha": float("nan")}, "alpha"), ({"mode": "max"}, "mode"), ({"intra_weight": -1}, "intra_weight"),
     ({"format_reward": -1}, "format_component"), ({"prefix": "so many tokens"}, "prefix"),
     ({"prefix": "{budget} {more}"}, "prefix"), ({"clip_low": 1.5}, "clip_low"), ({"clip_high": -0.1}, "clip_high"),
     ({"wrong_reward": float("inf")}, "wrong_reward"), ({"correct_above": float("nan")}, "correct_above")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(Hbpo, options)


def test_facts_that_clash_are_refused():
    with pytest.raises(StackError, match="absolute_advantages"):
        Stack(["grpo", "hbpo", stand_in(breaks=["absolute_advantages"])])
    with pytest.raises(StackError, match="response_rewards"):
        Stack(["grpo", "hbpo", stand_in(breaks=["response_rewards"])])
    with pytest.raises(StackError, match="unit_rewards"):
        Stack(["grpo", "hbpo", stand_in(assumes=["unit_rewards"])])


def test_a_trainer_without_prefixes_or_components_is_refused():
    with pytest.raises(StackError, match="forced response prefixes"):
        Stack(["grpo", "hbpo"], trainer=Trainer(name="bare"))
    trainer = Trainer(name="plain", provides=frozenset({"response_prefix"}), columns=frozenset())
    Stack(["grpo", "hbpo"], trainer=trainer)
    with pytest.raises(StackError, match="components"):
        Stack(["grpo", {"hbpo": {"correct_component": "right"}}], trainer=trainer)


def test_one_response_per_prompt_is_refused():
    with pytest.raises(StackError, match="2 or more"):
        Stack(["hbpo"], trainer=Trainer(name="one", provides=frozenset({"response_prefix"}), group_size=1))


class OtherRewards(Plugin):
    """Owns the rewards too."""

    name = "other_rewards"

    @hookimpl
    def combine_rewards(self, scores):
        return scores


def test_another_owner_of_the_rewards_is_a_conflict():
    with pytest.raises(StackError, match="combine_rewards"):
        Stack(["hbpo", OtherRewards()])


def test_lengths_are_logged_by_budget():
    stack, _, _ = credited()
    metrics = stack.metrics.as_dict()
    assert metrics["rlplugins/hbpo/length/512"] == 500 and metrics["rlplugins/hbpo/right/1024"] == 0.5


# what every plugin must do


def with_components(rollouts):
    """Two components that are functions of the row."""
    right = (rollouts.scores > 0.3).float()
    form = torch.where(rollouts.scores.isnan(), torch.nan, (rollouts.mask.sum(1, keepdim=True) % 3 > 0).float())
    return replace(rollouts, components=torch.cat([right, form], 1), component_names=("right", "form"))


test_conformance = conformance(
    "hbpo",
    [
        {"budgets": [2, 4, 6], "L": 7},
        {"budgets": [2, 5], "L": 6, "mode": "piecewise", "intra_weight": 2.0, "correct_component": "right",
         "format_component": "form", "format_reward": -1.0},
    ],
    rows=with_components,
)  # fmt: skip
