"""Facts about PF-PPO, through the stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, start
from rlplugins.trainer import Trainer
from rlplugins_pf_ppo import PfPpo, extremes, r_squared, random_others, rank_weights

REWARD = [0.3, 2.1, -1.2, 0.9, 0.9, 1.5, -0.4, -0.4, 2.0, 2.0]
TRUTH = [0.2, 0.9, 0, 0.3, 0.6, 0.7, 0.1, 0.2, 0.8, 1.0]
GROUPS = [0] * 5 + [1] * 5
BON = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
BW = [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
BR = [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
BR_EXPECTED = [0.25, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 1.0]
NAN = float("nan")


def example(**fields):
    """The worked example, true scores as the component `tests`."""
    parts = torch.tensor(TRUTH)[:, None]
    return make_rollouts(REWARD, GROUPS, components=parts, component_names=("tests",), **fields)


def weights_of(options, rollouts, seed=0):
    made = credit([{"pf-ppo": options}], rollouts, seed=seed)
    return made.weights.flatten()


def random_rollouts(seed, ties=False):
    """Twelve rows of three groups of unequal size and two prompts apart, with lengths from 0."""
    source = torch.Generator().manual_seed(seed)
    scores = torch.randn(12, generator=source)
    scores = scores.round() if ties else scores
    lengths = torch.randint(0, 5, (12,), generator=source)
    groups = torch.randint(0, 3, (12,), generator=source)
    return make_rollouts(scores, groups, lengths=lengths.tolist(), tokens=4)


# the worked example


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"mode": "bon"}, BON), ({}, BW), ({"mode": "br", "br": "expected"}, BR_EXPECTED), ({"mode": "none"}, [1.0] * 10)],
)  # fmt: skip
def test_the_worked_weights(options, expected):
    assert weights_of(options, example()).tolist() == expected


def test_the_worked_weights_of_best_and_random():
    companion = torch.zeros(10, dtype=torch.bool)
    companion[[3, 5]] = True
    scores, groups = torch.tensor(REWARD)[:, None], torch.tensor(GROUPS)
    assert rank_weights(scores, groups, "br", companion).flatten().tolist() == BR


def test_the_worked_fits():
    stack = start([{"pf-ppo": {"true_scores": "tests"}}])
    stack.credit(example())
    found = {name.rpartition("/")[2]: value for name, value in stack.metrics if "/pf-ppo/" in name}
    expected = {"r2_none": 0.90022982, "r2_bw": 0.97589848, "r2_br": 0.91831583, "r2_bon": 1.0, "kept": 0.4}
    assert found == pytest.approx(expected, abs=5e-8)
    stack = start([{"pf-ppo": {"true_scores": "tests", "bins": 3, "mode": "none"}}])
    stack.credit(example())
    assert dict(stack.metrics)["rlplugins/pf-ppo/r2_none"] == pytest.approx(0.98858592, abs=5e-8)


def test_the_choice_is_the_released_one():
    # the released rule in its own words: sort a prompt's (reward, row) by reward, take the first and the last
    for seed in range(50):
        rollouts = random_rollouts(seed, ties=True)
        expected = torch.zeros(12)
        for group in rollouts.groups.unique():
            rows = (rollouts.groups == group).nonzero().flatten().tolist()
            ranked = sorted(rows, key=lambda row: float(rollouts.scores[row]))
            expected[[ranked[0], ranked[-1]]] = 1
        assert torch.equal(weights_of({}, rollouts), expected)


# identities

seeds = st.integers(0, 2**31)
modes = st.sampled_from(
    [{"mode": "bon"}, {"mode": "bw"}, {"mode": "br"}, {"mode": "br", "br": "expected"}, {"mode": "bw", "resample": True}]
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_all_ranks_are_the_base_method(seed):
    rollouts = random_rollouts(seed)
    log_probs = rollouts.old_log_probs.double() + 0.1 * torch.randn(12, 4).double() * rollouts.mask
    loss, gradient = loss_and_gradient(start(["grpo", {"pf-ppo": {"mode": "none"}}]), rollouts, log_probs)
    base, base_gradient = loss_and_gradient(start(["grpo"]), rollouts, log_probs)
    assert torch.equal(loss, base) and torch.equal(gradient, base_gradient)


@settings(max_examples=20, deadline=None)
@given(seeds, st.booleans())
def test_the_weights_of_a_group_add_up_to_a_constant(seed, ties):
    rollouts = random_rollouts(seed, ties)
    sizes = torch.bincount(rollouts.groups, minlength=3)
    for options, expected in (
        ({"mode": "bon"}, 1),
        ({}, 2),
        ({"mode": "br"}, 2),
        ({"mode": "br", "br": "expected"}, 2),
    ):
        sums = torch.bincount(rollouts.groups, weights_of(options, rollouts), minlength=3)
        torch.testing.assert_close(sums, torch.where(sizes > 1, expected, sizes).to(sums))


@settings(max_examples=20, deadline=None)
@given(seeds, modes, st.booleans())
def test_only_the_order_of_the_rewards_counts(seed, options, ties):
    rollouts = random_rollouts(seed, ties)
    weights = weights_of(options, rollouts)
    rollouts.scores = rollouts.scores.double().exp() * 3 - 7 * rollouts.groups[:, None]
    assert torch.equal(weights_of(options, rollouts), weights)


def test_of_two_responses_both_are_kept():
    rollouts = make_rollouts([0.5, 0.1, 0.7, 0.7], [0, 0, 1, 1])
    assert weights_of({}, rollouts).tolist() == weights_of({"mode": "br"}, rollouts).tolist() == [1.0] * 4


def test_the_random_other_is_uniform_and_never_the_best():
    scores, groups = torch.tensor(REWARD)[:, None], torch.tensor(GROUPS)
    counts = torch.zeros(10)
    for seed in range(800):
        chosen = random_others(scores, groups, torch.Generator().manual_seed(seed))
        assert int(chosen[:5].sum()) == int(chosen[5:].sum()) == 1
        counts += chosen
    assert counts[[1, 9]].tolist() == [0, 0]
    others = counts[torch.tensor(BON) == 0]
    assert float((others - 200).abs().max()) < 5 * (800 * 0.25 * 0.75) ** 0.5


def test_the_random_other_is_a_function_of_seed_and_step():
    rollouts = example()
    stack = start([{"pf-ppo": {"mode": "br"}}])
    first, again = stack.credit(rollouts).weights, stack.credit(rollouts).weights
    assert torch.equal(first, again)
    others = []
    for number in range(1, 6):
        stack.begin_step(number, 10)
        others.append(stack.credit(rollouts).weights)
    assert any(not torch.equal(first, other) for other in others)


def test_rows_that_are_drawn_anew_come_in_proportion_to_their_weights():
    total = torch.zeros(10)
    for seed in range(200):
        drawn = weights_of({"mode": "br", "resample": True}, example(), seed)
        assert float(drawn.sum()) == 10 and bool((drawn == drawn.round()).all())
        total += drawn
    expected = torch.tensor(BR_EXPECTED) / sum(BR_EXPECTED)
    assert float((total / 2000 - expected).abs().max()) < 5 * (0.25 * 0.75 / 2000) ** 0.5


@settings(max_examples=15, deadline=None)
@given(seeds, modes)
def test_the_cut_into_micro_batches_changes_nothing(seed, options):
    rollouts = random_rollouts(seed)
    log_probs = rollouts.old_log_probs.double() - 0.1 * rollouts.mask
    whole, gradient = loss_and_gradient(start(["rloo", {"pf-ppo": options}]), rollouts, log_probs)
    for cuts in (3, 12):
        loss, cut_gradient = loss_and_gradient(
            start(["rloo", {"pf-ppo": options}]), rollouts, log_probs, micro_batches=cuts
        )
        torch.testing.assert_close(loss, whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(cut_gradient, gradient, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_the_loss_is_the_mean_over_the_rows_that_are_kept(seed):
    rollouts = random_rollouts(seed)
    log_probs = rollouts.old_log_probs.double() - 0.1 * rollouts.mask
    loss, gradient = loss_and_gradient(start(["rloo", "pf-ppo"]), rollouts, log_probs)
    made = credit(["rloo"], rollouts)
    _, best = extremes(rollouts.scores, rollouts.groups)
    worst, _ = extremes(rollouts.scores, rollouts.groups)
    counted = rollouts.mask & (best | worst)[:, None]
    ratio = (log_probs - rollouts.old_log_probs).exp()
    expected = (-made.advantages * ratio * counted).sum() / counted.sum().clamp(min=1)  # no ratio is clipped: A < 0 too
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert not gradient[~counted].any()


def test_a_perfectly_linear_reward_explains_everything():
    scores = torch.tensor(REWARD).double()[:, None]
    for mode in ("none", "bon", "br", "bw"):
        weights = rank_weights(scores, torch.tensor(GROUPS), mode)
        assert float(r_squared(scores, 3 - 2 * scores, weights)) == pytest.approx(1)
        assert float(r_squared(scores, 3 - 2 * scores, weights, bins=2)) == pytest.approx(1)


def test_constant_rewards_or_scores_explain_nothing():
    ones, values = torch.full((5, 1), 0.1), torch.tensor([[0.1], [0.5], [0.2], [0.9], [0.3]])
    for bins in (None, 1, 2, 9):
        assert float(r_squared(ones, values, ones, bins)) == float(r_squared(values, ones, ones, bins)) == 0
    assert float(r_squared(values, values, torch.zeros(5, 1))) == 0


# edges


def test_a_response_without_a_score_is_not_ranked():
    rollouts = make_rollouts([0.5, NAN, 0.1, 0.3, NAN, 0.2], [0, 0, 0, 0, 1, 1])
    assert weights_of({}, rollouts).tolist() == [1, 0, 1, 0, 0, 1]
    expected = weights_of({"mode": "br", "br": "expected"}, rollouts).tolist()
    assert expected == [1, 0, 0.5, 0.5, 0, 1]  # N counts the ones that have a score
    assert weights_of({"mode": "bw", "resample": True}, rollouts).sum() == 4


class NoRewardForTheBest(Plugin):
    """A reward hook that fails on the response with the largest raw score."""

    name = "no_reward"

    @hookimpl
    def shape_rewards(self, rewards, scores):
        return torch.where(scores == scores.max(), NAN, rewards)


def test_a_response_without_a_reward_is_not_ranked():
    made = credit([NoRewardForTheBest(), {"pf-ppo": {"mode": "bon"}}], make_rollouts([0.5, 0.9, 0.1]))
    assert made.weights.flatten().tolist() == [1, 0, 0]


class Negative(Plugin):
    """A reward hook that turns the order around."""

    name = "negative"

    @hookimpl
    def shape_rewards(self, rewards):
        return -rewards


def test_ranks_are_of_the_raw_scores():
    made = credit([Negative(), {"pf-ppo": {"mode": "bon"}}], make_rollouts([0.5, 0.9, 0.1]))
    assert made.weights.flatten().tolist() == [0, 1, 0]


def test_equal_rewards_keep_the_last_row_and_the_first():
    rollouts = make_rollouts([1.0] * 4)
    assert weights_of({}, rollouts).tolist() == [1, 0, 0, 1]
    assert weights_of({"mode": "bon"}, rollouts).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("mode", ["none", "bon", "bw", "br"])
def test_a_single_response_is_kept(mode):
    assert weights_of({"mode": mode}, make_rollouts([0.3, 0.1, 0.2], [0, 1, 1]))[0] == 1


def test_an_empty_response_is_ranked_and_rows_of_no_group_are_left_alone():
    rollouts = make_rollouts([0.5, 0.9, 0.7, 0.1], [0, 0, 0, -1], lengths=[4, 0, 4, 4])
    assert weights_of({"mode": "bon"}, rollouts).tolist() == [0, 1, 0, 1]


def test_nothing_left():
    rollouts = make_rollouts([NAN, NAN])
    loss, gradient = loss_and_gradient(
        start(["grpo", {"pf-ppo": {"resample": True}}]), rollouts, rollouts.old_log_probs
    )
    assert float(loss) == 0 and not gradient.any()


# dropping


@pytest.mark.parametrize("options", [{"mode": "bw"}, {"mode": "bon"}, {"mode": "br"}])
def test_dropping_keeps_the_rows_that_count(options):
    rollouts = example(values=torch.zeros(10, 4))
    weights = weights_of(options, rollouts)
    stack = start([{"pf-ppo": options | {"drop": True, "true_scores": "tests"}}])
    kept = stack.filter_rollouts(rollouts)
    assert torch.equal(kept.scores, rollouts.scores[weights > 0])
    assert dict(stack.metrics)["rlplugins/pf-ppo/r2_bw"] == pytest.approx(0.97589848, abs=5e-8)
    made = stack.credit(kept)
    assert made.weights is None and made.advantages.shape == (len(kept), 4)
    stack.end_step(kept, made)


def test_dropping_drops_what_has_no_score():
    kept = start([{"pf-ppo": {"drop": True}}]).filter_rollouts(make_rollouts([0.5, NAN, 0.1, 0.3, NAN]))
    assert kept.scores.flatten().tolist() == pytest.approx([0.5, 0.1])


def test_dropping_takes_the_advantages_of_gae():
    with pytest.raises(StackError, match="grpo"):
        Stack(["grpo", {"pf-ppo": {"drop": True}}])
    with pytest.raises(StackError, match="values"):
        Stack([{"pf-ppo": {"drop": True}}], trainer=Trainer(name="critic-free", columns=frozenset()))
    Stack(["grpo", "pf-ppo"])


@pytest.mark.parametrize("options", [{"mode": "none"}, {"mode": "br", "br": "expected"}, {"resample": True}])
def test_dropping_is_for_weights_of_0_and_1(options):
    with pytest.raises(ConfigurationError, match="drop is for weights of 0 and 1"):
        make(PfPpo, options | {"drop": True})


def test_the_critic_has_the_same_weights():
    rollouts = example(values=torch.zeros(10, 4))
    stack = start(["gae", "pf-ppo"])
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    values = torch.zeros(10, 4, requires_grad=True)
    mini.value_loss(values).backward()
    assert (values.grad.abs().sum(1) > 0).float().tolist() == BW


# what it says about itself


def with_fact(**facts):
    """A plugin that says this of itself and does nothing."""

    class Other(Plugin):
        name = "other"
        breaks = frozenset(facts.get("breaks", ()))
        assumes = frozenset(facts.get("assumes", ()))

        @hookimpl
        def prepare_step(self):
            pass

    return Other()


@pytest.mark.parametrize(
    ("options", "other", "fact"),
    [({}, {"assumes": ["whole_groups"]}, "whole_groups"),
     ({"mode": "br", "br": "expected", "resample": True}, {"assumes": ["whole_groups"]}, "whole_groups"),
     ({}, {"breaks": ["complete_groups"]}, "complete_groups"),
     ({"drop": True}, {"assumes": ["complete_groups"]}, "complete_groups")],
)  # fmt: skip
def test_facts_that_clash_are_refused(options, other, fact):
    with pytest.raises(StackError, match=fact):
        Stack([{"pf-ppo": options}, with_fact(**other)])
    Stack([{"pf-ppo": options}, with_fact(**other)], allow=[fact])


@pytest.mark.parametrize("options", [{"mode": "none"}, {"mode": "br", "br": "expected"}])
def test_groups_stay_whole_where_every_row_has_a_weight(options):
    Stack([{"pf-ppo": options}, with_fact(assumes=["whole_groups"])])


@pytest.mark.parametrize(
    ("field", "value"), [("mode", "best"), ("br", "mean"), ("bins", 0), ("bins", 1.5), ("drop", 3)]
)
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"pf-ppo\.{field}"):
        make(PfPpo, {field: value})


def test_one_response_per_prompt_is_refused():
    with pytest.raises(StackError, match="2 or more"):
        Stack(["pf-ppo"], trainer=Trainer(name="single", group_size=1))


def test_a_component_that_is_not_there_is_named():
    with pytest.raises(HookError, match=r"no component 'units'.*it gives: tests"):
        credit([{"pf-ppo": {"true_scores": "units"}}], example())


def test_it_remembers_nothing(tmp_path):
    stack = start([{"pf-ppo": {"mode": "br"}}])
    stack.begin_step(3, 10)
    made = stack.credit(example()).weights
    stack.save(tmp_path / "state", step=3)
    resumed = start([{"pf-ppo": {"mode": "br"}}])
    resumed.load(tmp_path / "state")
    resumed.begin_step(3, 10)
    assert torch.equal(resumed.credit(example()).weights, made)


# what every plugin must do


def with_truth(rollouts):
    """A component `truth`, near to the score."""
    return replace(rollouts, components=rollouts.scores.square(), component_names=("truth",))


test_conformance = conformance(
    "pf-ppo",
    [{}, {"mode": "bon", "true_scores": "truth", "bins": 3}, {"mode": "br", "br": "expected"}, {"drop": True}],
    rows=with_truth,
    unless={"permutation": "of equal scores the last row is the best"},
)
test_conformance_of_random_choices = conformance(
    "pf-ppo", [{"mode": "br"}, {"resample": True}], unless={"permutation": "random numbers are drawn in row order"}
)
