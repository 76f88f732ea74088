"""Facts about D3S, through the stack."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl, needs
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_d3s import D3s, most_varied, number_of_groups

REWARDS = [1, 0, 0, 0, 1, 1, 0.5, 0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
LENGTHS = [5, 4, 5, 3, 5, 2, 5, 4]
ENTROPY = [
    [0.1, 0.9, 0.2, 0.4, 0.05], [0.3, 0.7, 0.8, 0.1, 0.6], [0.55, 0.15, 0.35, 0.95, 0.25],
    [0.45, 0.05, 0.65, 0.75, 0.85], [0.12, 0.22, 0.92, 0.32, 0.42], [0.52, 0.62, 0.02, 0.82, 0.72],
    [0.38, 0.48, 0.58, 0.18, 0.28], [0.66, 0.44, 0.88, 0.11, 0.33],
]  # fmt: skip
KEPT_TOKENS = [[0, 1, 0, 1, 0], [0] * 5, [0] * 5, [0] * 5, [0] * 5, [0, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 0, 0]]


class Given(Plugin):
    """The advantages are the scores."""

    name = "given"

    @hookimpl
    def compute_advantages(self, rewards):
        return rewards


class GivenPerToken(Plugin):
    """The advantages are a column (B, T)."""

    name = "given_per_token"
    needs = (needs.column("token_advantages"),)

    @hookimpl
    def compute_advantages(self, rollouts):
        return rollouts["token_advantages"]


class OnlyFirst(Plugin):
    """Weight 0 for every response but the first of the step."""

    name = "only_first"

    @hookimpl
    def select_samples(self, advantages):
        return (torch.arange(len(advantages)) == 0)[:, None].float()


def worked_example():
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return make_rollouts(REWARDS, GROUPS, mask=mask, entropy=torch.tensor(ENTROPY) * mask)


def given_rollouts(advantages, groups=None, entropy=None, **fields):
    rollouts = make_rollouts(torch.as_tensor(advantages, dtype=torch.float32), groups, **fields)
    entropy = torch.ones(rollouts.mask.shape) if entropy is None else torch.as_tensor(entropy)
    rollouts.entropy = entropy * rollouts.mask
    return rollouts


def fixed(responses, share=1.0, **options):
    return {"d3s": {"n_init": responses, "n_final": responses, "k_init": share, "k_final": share, **options}}


@functools.cache
def first_step(responses, share=1.0, **options):
    """A stack whose first step is open; credit changes no state, so that one serves many examples."""
    return start([Given(), fixed(responses, share, **options)])


def kept_samples(rollouts, responses, **options):
    return first_step(responses, **options).credit(rollouts).weights.flatten().tolist()


def kept_tokens(rollouts, share, **options):
    return first_step(len(rollouts), share, **options).credit(rollouts).token_weights.int().tolist()


def scanned(advantages, size):
    """The best split, by the scan over k as the paper's reconstruction words it."""
    a = np.asarray(advantages, dtype=np.float64)
    order = np.argsort(a, kind="stable")
    size = min(size, len(a))
    best, choice = -1.0, []
    for k in range(size + 1):
        rows = np.concatenate([order[:k], order[len(a) - (size - k) :]])
        variance = a[rows].var() if len(rows) else 0.0
        if variance > best + 1e-12 * (a**2).max():
            best, choice = variance, rows
    return set(int(row) for row in choice)


# the worked example


def after_one_of_four_steps(rollouts, **options):
    stack = start(["grpo", {"d3s": {"n_init": 1, "n_final": 5, "k_init": 0.2, "k_final": 1.0, **options}}])
    stack.begin_step(0, 4)
    stack.end_step(rollouts, None)
    stack.begin_step(1, 4)
    return stack, stack.credit(rollouts)


def test_the_worked_example_over_the_step():
    stack, made = after_one_of_four_steps(worked_example())
    plugin = stack.plugins[1]
    assert plugin.responses_per_group(stack.step) == 2
    assert plugin.token_share(stack.step) == pytest.approx(0.4)
    a = torch.tensor([1.499997, -0.499999, -0.499999, -0.499999, 0.78334782, 0.78334782, -0.26111594, -1.3055797])
    torch.testing.assert_close(made.advantages.flatten(), a, atol=1e-6, rtol=0)
    assert made.weights.flatten().tolist() == [1, 1, 0, 0, 0, 1, 0, 1]
    chosen = made.advantages.flatten()[made.weights.flatten() > 0]
    assert float(chosen.var(correction=0)) == pytest.approx(1.1902743, abs=1e-6)
    assert int((worked_example().mask * made.weights).sum()) == 15
    assert made.token_weights.int().tolist() == KEPT_TOKENS


def test_the_worked_example_in_each_group():
    _, made = after_one_of_four_steps(worked_example(), scope="group")
    assert made.weights.flatten().tolist() == [1, 0, 0, 1, 0, 1, 0, 1]
    assert made.token_weights.int().tolist() == KEPT_TOKENS


def test_the_loss_is_the_mean_over_the_kept_tokens():
    rollouts = worked_example()
    stack, made = after_one_of_four_steps(rollouts)
    loss, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs.double())
    kept = torch.tensor(KEPT_TOKENS).double()
    assert float(loss) == pytest.approx(float(-(made.advantages * kept).sum() / 6), abs=1e-6)
    torch.testing.assert_close(gradient, -(made.advantages * kept) / 6, atol=1e-6, rtol=0)


# which responses

eighths = st.integers(-16, 16).map(lambda number: number / 8)  # exact in float32, often equal


@settings(max_examples=60, deadline=None)
@given(st.lists(eighths, min_size=1, max_size=9), st.integers(1, 9))
def test_no_subset_of_that_size_varies_more(advantages, size):
    kept = [a for a, keep in zip(advantages, kept_samples(given_rollouts(advantages), size), strict=True) if keep]
    size = min(size, len(advantages))
    assert len(kept) == size
    best = max(np.var(subset) for subset in itertools.combinations(advantages, size))
    assert np.var(kept) == pytest.approx(best, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(eighths, st.integers(0, 3)), min_size=1, max_size=24), st.integers(1, 6))
def test_ties_go_to_the_first_k_of_the_scan_in_both_scopes(rows, size):
    advantages, groups = [a for a, _ in rows], [group for _, group in rows]
    in_step = kept_samples(given_rollouts(advantages, groups), size)
    assert {i for i, keep in enumerate(in_step) if keep} == scanned(advantages, size * len(set(groups)))
    in_group = kept_samples(given_rollouts(advantages, groups), size, scope="group")
    expected = set()
    for group in set(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        expected |= {members[i] for i in scanned([advantages[i] for i in members], size)}
    assert {i for i, keep in enumerate(in_group) if keep} == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 300), st.sampled_from([0.0, 100.0]))
def test_the_scan_is_followed_on_many_real_numbers(seed, rows, size, shift):
    a = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) + shift
    kept = most_varied(a, torch.zeros(rows, dtype=torch.int64), size)
    assert set(kept.nonzero().flatten().tolist()) == scanned(a.numpy(), size)


@settings(max_examples=30, deadline=None)
@given(st.lists(eighths, min_size=2, max_size=16), st.integers(1, 8), eighths, st.sampled_from([0.25, 2.0, 64.0]))
def test_the_choice_ignores_a_shift_and_a_positive_factor(advantages, size, shift, factor):
    kept = kept_samples(given_rollouts(advantages), size)
    assert kept_samples(given_rollouts([a + shift for a in advantages]), size) == kept
    assert kept_samples(given_rollouts([a * factor for a in advantages]), size) == kept


def test_equal_advantages_keep_the_last_rows():
    assert kept_samples(given_rollouts([0.5] * 5), 2) == [0, 0, 0, 1, 1]


def test_variances_within_rounding_are_tied():
    tiny = 1e-7  # squared, it is below 1e-12 times the largest square
    assert kept_samples(given_rollouts([1.0, 1.0, 1.0 + tiny]), 2) == [0, 1, 1]


def test_groups_without_spread_are_dropped_while_others_fill_the_budget():
    rollouts = given_rollouts([1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0], [0] * 4 + [1] * 4 + [2] * 4)
    made = credit(["grpo", fixed(1)], rollouts)
    assert made.weights.flatten().tolist()[:4] + made.weights.flatten().tolist()[8:] == [0] * 8
    assert int(made.weights.sum()) == 3


def test_almost_all_kept_responses_of_a_bandit_have_an_advantage():
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor([0.0] * 5 + [1.0] * 5 + [0.3, 0.5, 0.5, 0.6, 0.4, 0.5])
    rewards = torch.bernoulli(rates[:, None].expand(-1, 16), generator=generator).flatten()
    rollouts = given_rollouts(rewards, torch.arange(16).repeat_interleave(16))
    stack = start(["grpo", "d3s"], group_size=16)
    made = stack.credit(rollouts)
    useful = made.advantages.flatten() != 0
    assert float(useful.float().mean()) < 0.5
    assert bool(useful[made.weights.flatten() > 0].all())
    assert stack.metrics.as_dict()["rlplugins/d3s/useful_samples"] == 1
    assert stack.metrics.as_dict()["rlplugins/d3s/samples"] == 0.25


# which tokens


def reference_tokens(advantages, entropy, valid, share, per_row):
    kept = np.zeros(valid.shape, dtype=int)
    keys = (np.abs(advantages) * entropy).astype(np.float32)
    for rows in [[i] for i in range(len(valid))] if per_row else [list(range(len(valid)))]:
        places = [(i, t) for i in rows for t in range(valid.shape[1]) if valid[i, t]]
        count = int(np.floor(share * len(places) + 0.5 + 1e-9))
        for i, t in sorted(places, key=lambda place: -keys[place])[: max(1, count)]:
            kept[i, t] = 1
    return kept.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.integers(1, 5), st.integers(2, 5), st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.7, 0.99]), st.booleans()
)
def test_tokens_with_the_largest_keys_are_kept_and_ties_go_by_position(data, rows, width, share, per_row):
    advantages = np.array([[data.draw(eighths)] for _ in range(rows)], dtype=np.float32)
    entropy = np.array([[data.draw(st.integers(0, 3)) for _ in range(width)] for _ in range(rows)], dtype=np.float32)
    lengths = [data.draw(st.integers(0, width)) for _ in range(rows)]
    rollouts = given_rollouts(advantages.flatten(), lengths=lengths, tokens=width, entropy=entropy)
    expected = reference_tokens(advantages, entropy, rollouts.mask.numpy(), share, per_row)
    scope = "response" if per_row else "batch"
    assert kept_tokens(rollouts, share, token_scope=scope) == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.25, 2.0, 1024.0]), st.sampled_from(["batch", "response"]))
def test_the_token_choice_ignores_a_positive_factor(seed, factor, scope):
    source = torch.Generator().manual_seed(seed)
    a, entropy = torch.randn(6, generator=source), torch.rand((6, 7), generator=source)
    kept = kept_tokens(given_rollouts(a, entropy=entropy, tokens=7), 0.3, token_scope=scope)
    assert kept_tokens(given_rollouts(a * factor, entropy=entropy, tokens=7), 0.3, token_scope=scope) == kept


def test_only_tokens_of_kept_responses_are_counted():
    rollouts = given_rollouts([4.0, 1.0, 1.0, -4.0], entropy=[[1.0, 2, 3, 4]] * 4)
    made = credit([Given(), fixed(2, 0.5)], rollouts)
    assert made.weights.flatten().tolist() == [1, 0, 0, 1]
    assert made.token_weights.int().tolist() == [[0, 0, 1, 1], [0] * 4, [0] * 4, [0, 0, 1, 1]]


def test_responses_that_another_plugin_drops_are_not_counted_either():
    rollouts = given_rollouts([4.0, 1.0, 1.0, -4.0], entropy=[[1.0, 2, 3, 4]] * 4)
    made = credit([Given(), fixed(2, 0.25), OnlyFirst()], rollouts)
    assert made.token_weights.int().tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4, [0] * 4]


def test_advantages_per_token_are_averaged_for_the_response_and_used_for_the_token():
    advantages = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 0.5], [-9.0, 9.0, 0.0]])
    rollouts = given_rollouts([0.0] * 3, lengths=[2, 3, 2], tokens=3, columns={"token_advantages": advantages})
    made = credit([GivenPerToken(), fixed(2, 0.5)], rollouts)  # means 2, 1/6, 0
    assert made.weights.flatten().tolist() == [1, 0, 1]
    assert made.token_weights.int().tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0]]


# identities


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_with_all_responses_and_tokens_it_is_the_base_method(scope):
    rollouts = worked_example()
    log_probs = rollouts.old_log_probs.double() + 0.1 * torch.randn(8, 5, dtype=torch.float64) * rollouts.mask
    loss, gradient = loss_and_gradient(start(["grpo", fixed(4, scope=scope)]), rollouts, log_probs)
    base_loss, base_gradient = loss_and_gradient(start(["grpo"]), rollouts, log_probs)
    assert float(loss) == float(base_loss)
    assert torch.equal(gradient, base_gradient)


def test_pure_sample_selection_needs_no_entropy():
    rollouts = worked_example()
    rollouts.entropy = None
    made = credit(["grpo", fixed(2)], rollouts)
    assert made.token_weights is None
    assert int(made.weights.sum()) == 4
    assert not start([fixed(2)]).needed_columns
    assert start(["d3s"]).needed_columns == {"entropy"}


def test_pure_token_selection_keeps_every_response():
    made = credit(["grpo", fixed(4, 0.5)], worked_example())
    assert made.weights.flatten().tolist() == [1] * 8
    assert int(made.token_weights.sum()) == 17  # 0.5 * 33, half up


def test_a_step_without_advantages_keeps_responses_and_gives_no_gradient():
    rollouts = given_rollouts([1.0] * 8, GROUPS)
    stack = start(["grpo", fixed(2, 0.5)])
    assert int(stack.credit(rollouts).weights.sum()) == 4
    loss, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs)
    assert float(loss) == 0 and not gradient.any()


# the schedule


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 16), st.integers(1, 16), st.integers(1, 12), st.integers(0, 15))
def test_the_number_of_responses_moves_linearly_and_halves_round_up(first, last, total, done):
    stack = start([{"d3s": {"n_init": first, "n_final": last}}], total_steps=total)
    advance(stack, total, done)
    p = min(Fraction(1), Fraction(done, total))
    exact = (1 - p) * first + p * last
    assert stack.plugins[0].responses_per_group(stack.step) == int(exact + Fraction(1, 2))
    assert stack.plugins[0].token_share(stack.step) == pytest.approx(float(0.2 * (1 - p) + p))


def advance(stack, total, done):
    rollouts = given_rollouts([0.0, 1.0])
    for number in range(done):
        stack.begin_step(number, total)
        stack.end_step(rollouts, None)
    stack.begin_step(done, total)


@pytest.mark.parametrize(("group_size", "first"), [(2, 1), (4, 1), (6, 2), (8, 2), (16, 4)])
def test_by_default_a_quarter_of_the_group_is_kept_first_and_all_at_the_end(group_size, first):
    stack = start(["d3s"], group_size=group_size, total_steps=3)
    assert stack.plugins[0].responses_per_group(stack.step) == first
    assert stack.plugins[0].token_share(stack.step) == 0.2
    advance(stack, 3, 3)
    assert stack.plugins[0].responses_per_group(stack.step) == group_size
    assert stack.plugins[0].token_share(stack.step) == 1


def test_progress_survives_a_restart(tmp_path):
    stack = start(["grpo", "d3s"], total_steps=4)
    advance(stack, 4, 2)
    stack.save(tmp_path / "state", 2)
    resumed = start(["grpo", "d3s"], total_steps=4)
    assert resumed.load(tmp_path / "state") == 2
    resumed.begin_step(2, 4)
    one, other = stack.credit(worked_example()), resumed.credit(worked_example())
    assert resumed.plugins[1].state.progress_step == 2
    assert torch.equal(one.weights, other.weights) and torch.equal(one.token_weights, other.token_weights)
    assert not torch.equal(one.token_weights, credit(["grpo", "d3s"], worked_example()).token_weights)


def test_credit_does_not_advance_the_schedule():
    stack = start(["grpo", "d3s"])
    first, second = stack.credit(worked_example()), stack.credit(worked_example())
    assert stack.plugins[1].state.progress_step == 0
    assert torch.equal(first.weights, second.weights) and torch.equal(first.token_weights, second.token_weights)


# edges


def test_a_response_without_reward_weighs_nothing_and_its_place_goes_to_another():
    rollouts = given_rollouts([4.0, float("nan"), 1.0, -4.0, 0.0, 0.0], [0, 0, 0, 1, 1, 1])
    assert kept_samples(rollouts, 2) == [1, 0, 1, 1, 0, 1]
    assert kept_samples(rollouts, 3) == [1, 0, 1, 1, 1, 1]


def test_a_group_without_any_reward_leaves_its_places_to_the_others():
    rollouts = given_rollouts([float("nan"), float("nan"), 1.0, 0.0, 0.0, -1.0], [0, 0, 1, 1, 1, 1])
    assert kept_samples(rollouts, 1) == [0, 0, 1, 0, 0, 1]
    assert kept_samples(rollouts, 1, scope="group") == [0, 0, 1, 0, 0, 0]
    groups = torch.tensor([-1, -1, 1, 1, 1, 1])
    assert number_of_groups(groups, torch.tensor([0, 0, 1, 1, 1, 1])) == 2
    assert number_of_groups(groups, torch.tensor([-1, -1, 1, 1, 1, 1])) == 1


def test_rows_of_no_group_keep_their_weight_and_are_not_counted():
    rollouts = given_rollouts(
        [9.0, 1.0, 0.0, 0.0, -1.0], [-1, 0, 0, 0, 0], kind=torch.tensor([1, 0, 0, 0, 0], dtype=torch.int8),
        kinds=("policy", "expert"), entropy=[[9.0] * 4] + [[1.0, 2, 3, 4]] * 4,
    )  # fmt: skip
    made = credit([Given(), fixed(2, 0.25)], rollouts)
    assert made.weights.flatten().tolist() == [1, 1, 0, 0, 1]
    assert made.token_weights[0].tolist() == [1] * 4
    assert int(made.token_weights[1:].sum()) == 2


def test_an_empty_response_may_be_kept_and_has_no_tokens():
    rollouts = given_rollouts([4.0, 1.0, -4.0], lengths=[0, 4, 4])
    made = credit([Given(), fixed(2, 0.5)], rollouts)
    assert made.weights.flatten().tolist() == [1, 0, 1]
    assert made.token_weights.int().tolist() == [[0] * 4, [0] * 4, [1, 1, 0, 0]]


@pytest.mark.parametrize("scope", ["batch", "response"])
def test_a_step_without_tokens_or_without_rewards_gives_no_loss(scope):
    empty = given_rollouts([1.0, 0.0], lengths=[0, 0], tokens=3)
    nothing = given_rollouts([float("nan")] * 2)
    for rollouts in (empty, nothing):
        stack = start(["grpo", fixed(1, 0.5, token_scope=scope)])
        loss, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs)
        assert float(loss) == 0 and not gradient.any()


def test_a_group_of_one_is_a_response_like_others():
    assert kept_samples(given_rollouts([5.0, 1.0, 0.0, -5.0], [0, 1, 1, 1]), 1) == [1, 0, 0, 1]
    assert kept_samples(given_rollouts([5.0]), 1) == [1]


def test_groups_smaller_than_the_number_to_keep_are_kept_whole():
    assert kept_samples(given_rollouts([1.0, 2.0, 3.0, 9.0, 4.0], [7, 7, 7, 7, 2]), 2, scope="group") == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_micro_batches_do_not_change_the_loss(micro_batches):
    rollouts = worked_example()
    log_probs = rollouts.old_log_probs.double() + 0.1 * rollouts.mask
    whole = loss_and_gradient(start(["grpo", fixed(2, 0.4)]), rollouts, log_probs)
    parts = loss_and_gradient(start(["grpo", fixed(2, 0.4)]), rollouts, log_probs, micro_batches=micro_batches)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_nothing_that_was_given_is_changed():
    rollouts = worked_example()
    before = [rollouts.entropy.clone(), rollouts.mask.clone(), rollouts.groups.clone(), rollouts.scores.clone()]
    credit(["grpo", "d3s"], rollouts)
    after = [rollouts.entropy, rollouts.mask, rollouts.groups, rollouts.scores]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# what it says about itself


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_init", 0), ("n_init", float("inf")), ("n_final", -1), ("n_final", 0.5), ("k_init", 0), ("k_init", 1.1),
     ("k_final", float("nan")), ("scope", "step"), ("token_scope", "group"), ("eps", 1e-6)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"d3s\.{field}"):
        make(D3s, {field: value})


@pytest.mark.parametrize(("how", "fact"), [("breaks", "absolute_advantages"), ("assumes", "whole_groups")])
def test_facts_that_clash_are_refused(how, fact):
    with pytest.raises(StackError, match=fact):
        Stack(["grpo", "d3s", stand_in(**{how: [fact]})])
    Stack(["grpo", "d3s", stand_in(**{how: [fact]})], allow=[fact])


def test_a_trainer_without_entropies_or_groups_is_refused():
    with pytest.raises(StackError, match="entropy"):
        Stack(["d3s"], trainer=Trainer(name="bare", columns=frozenset()))
    with pytest.raises(StackError, match="2 or more"):
        Stack(["d3s"], trainer=Trainer(name="single", group_size=1))


# what every plugin must do

test_conformance = conformance("d3s", [{}, {"scope": "group", "token_scope": "response"}, {"k_init": 1.0}])
