"""Facts about GTPO, through the stack."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack, StackConfig
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_gtpo import Gtpo

TOKENS = [[5, 6, 7, 8, 9], [5, 6, 1, 9, 0], [5, 2, 8, 9, 0], [5, 6, 7, 9, 0]]
ENTROPY = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.9, 0.8, 0.6, 0.0], [0.1, 0.1, 0.3, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2, 0.0]]
LAMBDA = [[2.0, 1.0, 1.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]]
SHAPED = [[9.97], [0.0], [-10.025], [-0.02]]


def worked_example():
    return make_rollouts([20.0, 10.0, 0.0, 10.0], lengths=[5, 4, 4, 4], responses=TOKENS, entropy=ENTROPY)


def rollouts_of(tokens, rewards, groups=None, entropy=0.0, lengths=None, **fields):
    """Token ids of unequal lengths; `entropy` per response or one for all."""
    lengths = [len(row) for row in tokens] if lengths is None else lengths
    width = max([2, *(len(row) for row in tokens)])
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens])
    rollouts = make_rollouts(rewards, groups, lengths=lengths, tokens=width, responses=padded, **fields)
    level = torch.as_tensor(entropy, dtype=torch.float32).reshape(-1, 1)
    rollouts.entropy = (level * rollouts.mask).expand(rollouts.mask.shape)
    return rollouts


@functools.cache
def first_step(**options):
    """A stack whose first step is open; credit changes no state, so that one serves many examples."""
    return start([{"gtpo": options}])


@functools.cache
def centred():
    return start(["dr_grpo"])


def advantages(rollouts, **options):
    return first_step(**options).credit(rollouts).advantages


def factors(rollouts, **options):
    """lambda: with gamma 0 and no filter advantages are (reward - mean) lambda; NaN where the reward is the mean."""
    shaped = advantages(rollouts, gamma=0.0, entropy_threshold=math.inf, **options)
    mean = centred().credit(rollouts).advantages
    return torch.where(mean == 0, torch.nan, shaped / mean)


def reference_factors(tokens, rewards, groups, w_pos=2.0, combine="product"):
    """lambda by loops, one group, one response, one token at a time."""
    result = [[1.0] * len(row) for row in tokens]
    for group in set(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        mean = np.mean([rewards[i] for i in members])
        pos = [i for i in members if rewards[i] - mean > 1e-6]
        neg = [i for i in members if rewards[i] - mean < -1e-6]
        for i in pos + neg:
            ends = []
            for step in (1, -1):
                run = [False] * len(tokens[i])
                for t in range(len(tokens[i])):
                    ours = tokens[i][::step][t]
                    if not all(any(len(tokens[j]) > t and tokens[j][::step][t] == ours for j in side)
                               for side in (pos, neg)):  # fmt: skip
                        break
                    run[t] = True
                ends.append(run[::step])
            for t, (forward, backward) in enumerate(zip(*ends, strict=True)):
                times = forward + backward if combine == "product" else forward or backward
                result[i][t] = (w_pos if i in pos else 0.0) ** times
    return result


# the worked example


def test_the_worked_example():
    rollouts = worked_example()
    stack = start(["gtpo"])
    made = stack.credit(rollouts)
    expected = torch.tensor(SHAPED) * torch.tensor(LAMBDA)
    torch.testing.assert_close(made.advantages, expected, atol=2e-6, rtol=0)
    assert made.weights is None and made.token_weights is None
    log_probs = torch.randn((4, 5), dtype=torch.float64) * rollouts.mask
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    assert float(loss) == pytest.approx(-3.356438, abs=1e-6)
    lengths = torch.tensor([[5.0], [4.0], [4.0], [4.0]])
    torch.testing.assert_close(gradient, (-expected / lengths / 4).double(), atol=1e-6, rtol=0)


def test_the_worked_example_reports_what_it_did():
    stack = start(["gtpo"])
    stack.credit(worked_example())
    metrics = stack.metrics.as_dict()
    assert metrics["rlplugins/gtpo/entropy"] == pytest.approx(0.3875)
    assert metrics["rlplugins/gtpo/filtered"] == 0.25
    assert metrics["rlplugins/gtpo/conflict_tokens"] == pytest.approx(6 / 17)


# conflict tokens


@st.composite
def groups_of_responses(draw):
    rows = draw(st.integers(1, 10))
    groups = [draw(st.sampled_from([0, 3, 4])) for _ in range(rows)]
    rewards = [float(draw(st.integers(0, 3))) for _ in range(rows)]
    tokens = [draw(st.lists(st.integers(1, 2), max_size=6)) for _ in range(rows)]
    return tokens, rewards, groups


@settings(max_examples=80, deadline=None)
@given(groups_of_responses(), st.sampled_from([1.0, 2.0, 3.0]), st.sampled_from(["product", "max"]))
def test_conflict_tokens_are_those_that_loops_find(case, w_pos, combine):
    tokens, rewards, groups = case
    found = factors(rollouts_of(tokens, rewards, groups), w_pos=w_pos, combine=combine)
    expected = reference_factors(tokens, rewards, groups, w_pos, combine)
    for mine, theirs in zip(found.tolist(), expected, strict=True):
        if not math.isnan(mine[0]):  # the reward is the mean: no factor can be read off
            assert mine[: len(theirs)] == pytest.approx(theirs)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 200, 300])
@pytest.mark.parametrize("miss", [0, 63, 64, 150])
def test_long_runs_are_followed_to_their_end(length, miss):
    source = torch.Generator().manual_seed(length)
    same = torch.randint(1, 9, (length,), generator=source).tolist()
    other = [token + 20 * (place == miss) for place, token in enumerate(same)]
    shorter = same[: length // 2]
    case = [same, other, shorter, same[5:]], [1.0, 0.0, 0.0, 1.0], [0] * 4
    found = factors(rollouts_of(*case)).tolist()
    for mine, theirs in zip(found, reference_factors(*case), strict=True):
        assert mine[: len(theirs)] == pytest.approx(theirs)


def test_a_token_outside_of_a_run_is_still_matched_by_others():
    # the third response leaves its own run at once, but supplies the rewarded side of position 1
    tokens = [[5, 6], [9, 6], [5, 7]]
    found = factors(rollouts_of(tokens, [0.0, 1.0, 1.0]))
    assert found.tolist() == [[0, 0], [1, 2], [2, 1]]


def test_identical_responses_of_opposite_reward_have_factors_four_and_nothing():
    tokens = [[3, 4, 5], [3, 4, 5]]
    assert factors(rollouts_of(tokens, [1.0, 0.0])).tolist() == [[4, 4, 4], [0, 0, 0]]
    assert factors(rollouts_of(tokens, [1.0, 0.0]), combine="max").tolist() == [[2, 2, 2], [0, 0, 0]]
    assert factors(rollouts_of(tokens, [1.0, 0.0]), w_pos=1.0).tolist() == [[1, 1, 1], [0, 0, 0]]
    assert factors(rollouts_of(tokens, [1.0, 0.0]), w_pos=3.0).tolist() == [[9, 9, 9], [0, 0, 0]]


def test_tokens_shared_by_one_class_only_are_no_conflict():
    tokens = [[3, 4, 5], [3, 4, 5], [6, 7, 8]]
    assert factors(rollouts_of(tokens, [1.0, 1.0, 0.0])).tolist() == [[1] * 3] * 3


def test_a_response_of_mean_reward_neither_has_nor_makes_conflicts():
    tokens = [[3, 4], [5, 6], [3, 4]]
    shaped = advantages(rollouts_of(tokens, [1.0, 0.0, 0.5], entropy=0.2))
    torch.testing.assert_close(shaped, torch.tensor([[0.48] * 2, [-0.52] * 2, [-0.02] * 2]))


def test_rewards_that_differ_by_rounding_only_are_the_mean():
    rollouts = rollouts_of([[3, 4]] * 3, torch.tensor([20.0, 20.0, 20.0]) * (1 + torch.tensor([1e-7, 0, -1e-7])))
    plain = centred().credit(rollouts).advantages
    assert bool((plain != 0).any())
    assert torch.equal(advantages(rollouts, gamma=0.0), plain * rollouts.mask), "the factor is 1, not 0 or 4"


def test_conflicts_stay_in_their_group():
    tokens = [[3, 4], [5, 6], [5, 6], [3, 4]]
    assert factors(rollouts_of(tokens, [1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1])).tolist() == [[1, 1]] * 4


@settings(max_examples=20, deadline=None)
@given(groups_of_responses(), st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_matter(case, random):
    tokens, rewards, groups = case
    order = list(range(len(tokens)))
    random.shuffle(order)
    one = advantages(rollouts_of(tokens, rewards, groups))
    other = advantages(rollouts_of(*([column[i] for i in order] for column in case)))
    torch.testing.assert_close(other, one[order])


def test_tool_output_is_skipped_when_positions_are_counted():
    mask = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 1, 0]]).bool()
    rollouts = make_rollouts([1.0, 0.0], mask=mask, responses=[[3, 8, 8, 4, 5], [3, 4, 9, 6, 0]])
    rollouts.entropy = torch.zeros((2, 5))
    shaped = advantages(rollouts, gamma=0.0)
    assert shaped.tolist() == [[1, 0, 0, 1, 0.5], [0, 0, 0, -0.5, 0]]


# entropy


def test_without_penalty_filter_and_shared_tokens_it_is_the_centred_reward():
    rollouts = rollouts_of([[2, 3], [4, 5, 6], [7]], [1.0, 0.0, 0.5], entropy=9.0)
    shaped = advantages(rollouts, gamma=0.0, entropy_threshold=math.inf)
    plain = credit(["dr_grpo"], rollouts).advantages
    torch.testing.assert_close(shaped, plain * rollouts.mask)
    log_probs = rollouts.old_log_probs.double()
    _, gradient = loss_and_gradient(first_step(gamma=0.0, entropy_threshold=math.inf), rollouts, log_probs)
    _, expected = loss_and_gradient(
        start(["dr_grpo"], owners={"policy_loss": "reinforce", "reduce_loss": "sequence_mean"}), rollouts, log_probs
    )
    torch.testing.assert_close(gradient, expected)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.0, 0.1, 5.0]), st.lists(st.floats(0, 0.6), min_size=2, max_size=6))
def test_with_equal_rewards_only_the_penalty_is_left(gamma, entropy):
    rollouts = rollouts_of([[3, 4]] * len(entropy), [0.7] * len(entropy), entropy=entropy)
    shaped = advantages(rollouts, gamma=gamma)
    torch.testing.assert_close(shaped, -gamma * torch.tensor(entropy)[:, None].expand(-1, 2), atol=1e-6, rtol=1e-5)


def test_the_mean_entropy_is_over_the_tokens_of_the_response():
    rollouts = worked_example()
    rollouts.entropy = torch.tensor(ENTROPY) * 0.5
    quarter = advantages(rollouts)[3, 0] - advantages(worked_example())[3, 0]
    assert float(quarter) == pytest.approx(0.1 * 0.2 * 0.5)


@pytest.mark.parametrize(("h", "kept"), [(0.69, True), (0.7, False)])
def test_a_response_above_ln_2_is_dropped_but_keeps_its_place(h, kept):
    rollouts = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=[h, 0.1])
    made = credit(["gtpo"], rollouts)
    assert bool((made.advantages[0] != 0).all()) == kept
    assert made.weights is None
    loss, _ = loss_and_gradient(start(["gtpo"]), rollouts, rollouts.old_log_probs.double())
    first = -(0.5 - 0.1 * h) if kept else 0.0
    assert float(loss) == pytest.approx((first + 0.51) / 2, abs=1e-6)


def test_a_response_at_the_threshold_is_kept():
    rollouts = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=[0.5, 0.1])
    assert bool((advantages(rollouts, entropy_threshold=0.5)[0] != 0).all())
    assert not bool((advantages(rollouts, entropy_threshold=0.4999)[0] != 0).any())


def test_a_model_that_started_above_the_threshold_is_not_filtered_unless_asked():
    rollouts = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=[0.6, 0.9])  # mean 0.75
    assert bool((advantages(rollouts) != 0).all())
    filtered = advantages(rollouts, always_filter=True)
    assert bool((filtered[0] != 0).all()) and not filtered[1].any()
    at_threshold = advantages(rollouts, entropy_threshold=float(torch.tensor([0.6, 0.9]).mean()))
    assert not at_threshold[1].any(), "only a start above the threshold lifts the filter"


def test_when_all_are_dropped_there_is_no_gradient():
    rollouts = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=2.0)
    loss, gradient = loss_and_gradient(first_step(always_filter=True), rollouts, rollouts.old_log_probs)
    assert float(loss) == 0 and not gradient.any()


def one_step(stack, rollouts, number):
    stack.begin_step(number, 10)
    made = stack.credit(rollouts)
    stack.end_step(rollouts, made)
    return made.advantages


def test_the_first_step_decides_whether_there_is_a_filter():
    certain = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=0.1)
    wild = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=2.0)
    low, high = start(["gtpo"]), start(["gtpo"])
    one_step(low, certain, 0)
    one_step(high, wild, 0)
    assert low.plugins[0].state.initial_entropy == pytest.approx(0.1)
    assert not one_step(low, wild, 1).any()
    assert bool((one_step(high, wild, 1) != 0).all())
    one_step(high, certain, 2)
    assert high.plugins[0].state.initial_entropy == 2.0, "written once"
    high.begin_step(3, 10)
    high.end_step(wild, None)
    assert high.plugins[0].state.initial_entropy == 2.0, "a step in which all was filtered out does not unset it"


def test_credit_itself_remembers_nothing():
    stack = start(["gtpo"])
    first = stack.credit(worked_example()).advantages
    assert stack.plugins[0].state.initial_entropy is None
    assert torch.equal(first, stack.credit(worked_example()).advantages)


def test_the_initial_entropy_survives_a_restart(tmp_path):
    wild = rollouts_of([[2, 3], [4, 5]], [1.0, 0.0], entropy=2.0)
    stack = start(["gtpo"])
    stack.save(tmp_path / "before", 0)
    one_step(stack, rollouts_of([[2], [4]], [1.0, 0.0], entropy=0.1), 0)
    stack.save(tmp_path / "after", 1)
    before, after = start(["gtpo"]), start(["gtpo"])
    assert (before.load(tmp_path / "before"), after.load(tmp_path / "after")) == (0, 1)
    assert bool((one_step(before, wild, 1) != 0).all())
    assert not one_step(after, wild, 1).any()


def test_a_first_step_without_rewards_leaves_the_decision_to_the_next():
    stack = start(["gtpo"])
    one_step(stack, rollouts_of([[2], [4]], [math.nan, math.nan], entropy=2.0), 0)
    assert stack.plugins[0].state.initial_entropy is None
    one_step(stack, rollouts_of([[2], [4]], [1.0, 0.0], entropy=0.1), 1)
    assert stack.plugins[0].state.initial_entropy == pytest.approx(0.1)


# the loss


def test_the_old_policy_does_not_matter():
    rollouts = worked_example()
    log_probs = torch.randn((4, 5)) * rollouts.mask
    one = loss_and_gradient(start(["gtpo"]), rollouts, log_probs)
    rollouts.old_log_probs = torch.randn((4, 5)) * rollouts.mask
    other = loss_and_gradient(start(["gtpo"]), rollouts, log_probs)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"divide_by_conflicts": True}])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_loss(options, micro_batches):
    rollouts = worked_example()
    log_probs = rollouts.old_log_probs.double()
    whole = loss_and_gradient(first_step(**options), rollouts, log_probs)
    parts = loss_and_gradient(first_step(**options), rollouts, log_probs, micro_batches=micro_batches)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_released_division_counts_each_conflict_token_once_and_sums_over_responses():
    rollouts = worked_example()
    loss, _ = loss_and_gradient(first_step(divide_by_conflicts=True), rollouts, rollouts.old_log_probs.double())
    means = (torch.tensor(SHAPED) * torch.tensor(LAMBDA)).sum(1) / torch.tensor([5.0, 4.0, 4.0, 4.0])
    assert float(loss) == pytest.approx(float(-(means / torch.tensor([3.0, 1.0, 3.0, 1.0])).sum()), abs=1e-5)
    both = rollouts_of([[3, 4, 5], [3, 4, 5]], [1.0, 0.0])
    loss, _ = loss_and_gradient(first_step(divide_by_conflicts=True), both, both.old_log_probs.double())
    assert float(loss) == pytest.approx(-0.5 * 4 / 3)


@pytest.mark.parametrize("options", [{}, {"divide_by_conflicts": True}])
def test_ranks_do_not_change_the_loss(options):
    rollouts = worked_example()
    stack = first_step(**options)
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    whole = stack.mini_batch(columns).loss(rollouts.old_log_probs.double()).total
    sums = torch.tensor([float(rollouts.mask.sum()), 4.0, 0.0], dtype=torch.float64)  # tokens, responses, critic
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        mini = stack.mini_batch({name: column[rows] for name, column in columns.items()}, reduce=lambda _: sums)
        parts.append(mini.loss(rollouts.old_log_probs[rows].double()).total)
    torch.testing.assert_close(sum(parts), whole)


def test_a_shared_prefix_is_kept_alive_while_most_responses_fail():
    """The claim of the paper on a tabular policy: one prefix token before every answer, one answer in eight right."""
    tokens = [[1, 2]] + [[1, 3 + i] for i in range(7)]
    rollouts = rollouts_of(tokens, [1.0] + [0.0] * 7)
    log_probs = rollouts.old_log_probs
    _, spared = loss_and_gradient(first_step(), rollouts, log_probs)
    _, plain = loss_and_gradient(start(["grpo"]), rollouts, log_probs)
    assert float(spared[:, 0].sum()) < -1e-3, "the update makes the prefix more likely"
    assert abs(float(plain[:, 0].sum())) < 1e-6, "which GRPO, whose advantages add up to nothing, does not"
    assert torch.equal(spared[1:, 0], torch.zeros(7))


# edges


def test_an_empty_response_counts_in_the_means_and_gives_nothing():
    rollouts = rollouts_of([[2, 3], []], [1.0, 0.0], entropy=0.4)
    stack = start(["gtpo"])
    shaped = one_step(stack, rollouts, 0)
    torch.testing.assert_close(shaped, torch.tensor([[0.46, 0.46], [0.0, 0.0]]))
    assert stack.plugins[0].state.initial_entropy == pytest.approx(0.2)
    loss, _ = loss_and_gradient(start(["gtpo"]), rollouts, rollouts.old_log_probs.double())
    assert float(loss) == pytest.approx(-0.46 / 2, abs=1e-6)


def test_a_response_without_reward_leaves_its_group():
    tokens = [[3, 4], [3, 5], [3, 4]]
    rollouts = rollouts_of(tokens, [1.0, math.nan, 0.0], entropy=[0.2, 5.0, 0.2])
    stack = start(["gtpo"])
    shaped = one_step(stack, rollouts, 0)
    torch.testing.assert_close(shaped[[0, 2]], torch.tensor([[0.48 * 4] * 2, [0.0] * 2]))
    assert not shaped[1].any()
    assert stack.plugins[0].state.initial_entropy == pytest.approx(0.2)


def test_rows_of_no_group_pass_unchanged_and_take_no_part():
    kind = torch.tensor([1, 0, 0], dtype=torch.int8)
    rollouts = rollouts_of([[3, 4]] * 3, [9.0, 1.0, 1.0], [-1, 0, 0], kind=kind, kinds=("policy", "expert"))
    shaped = advantages(rollouts)
    assert not shaped.any()


def test_a_group_of_one_has_only_the_penalty():
    shaped = advantages(rollouts_of([[3, 4]], [1.0], entropy=0.5))
    torch.testing.assert_close(shaped, torch.tensor([[-0.05, -0.05]]))


def test_a_step_of_empty_responses_gives_no_loss():
    rollouts = rollouts_of([[], []], [1.0, 0.0])
    loss, gradient = loss_and_gradient(start(["gtpo"]), rollouts, rollouts.old_log_probs)
    assert float(loss) == 0 and not gradient.any()


def test_nothing_that_was_given_is_changed():
    rollouts = worked_example()
    before = [rollouts.entropy.clone(), rollouts.responses.clone(), rollouts.mask.clone(), rollouts.scores.clone()]
    credit(["gtpo"], rollouts)
    after = [rollouts.entropy, rollouts.responses, rollouts.mask, rollouts.scores]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


# what it says about itself


def test_it_names_the_built_ins_that_it_is_made_of():
    text, legal = Stack.explain(StackConfig(plugins=["gtpo"]))
    assert legal
    for line in ("group_mean, used by gtpo", "one, used by gtpo", "sequence_mean, used by gtpo", "none, used by gtpo"):
        assert line in text
    assert not start(["gtpo"]).takes("clip") and not start(["gtpo"]).takes("ref_log_probs")
    assert start(["gtpo"]).needed_columns == {"entropy"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("gamma", -0.1), ("gamma", math.inf), ("entropy_threshold", 0.0), ("entropy_threshold", math.nan), ("w_pos", 0.0),
     ("w_pos", math.inf), ("combine", "sum"), ("always_filter", "perhaps"), ("initial_entropy", 0.1)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"gtpo\.{field}"):
        make(Gtpo, {field: value})


class Clipping(Plugin):
    """Gives bounds that GTPO's loss does not read."""

    name = "clipping"

    @hookimpl
    def clip_range(self):
        return 0.8, 1.2


class OtherLoss(Plugin):
    """Claims the loss as well."""

    name = "other_loss"

    @hookimpl
    def policy_loss(self, log_probs, advantages):
        return -advantages * log_probs


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Clipping(), "clip_range"),
        (OtherLoss(), "policy_loss"),
        (stand_in(breaks=["absolute_advantages"]), "absolute_advantages"),
        (stand_in(breaks=["response_rewards"]), "response_rewards"),
        (stand_in(assumes=["token_ratio"]), "token_ratio"),
    ],
)
def test_what_does_not_go_with_it_is_refused(other, message):
    with pytest.raises(StackError, match=message):
        Stack(["gtpo", other])


def test_a_trainer_without_entropies_or_groups_is_refused():
    with pytest.raises(StackError, match="entropy"):
        Stack(["gtpo"], trainer=Trainer(name="bare", columns=frozenset()))
    with pytest.raises(StackError, match="2 or more"):
        Stack(["gtpo"], trainer=Trainer(name="single", group_size=1))


def test_another_scale_may_be_put_in_by_the_owners_line():
    rollouts = worked_example()
    stack = start(["gtpo", "grpo"], owners={"advantage_scale": "group_std"})
    assert not torch.equal(stack.credit(rollouts).advantages, advantages(rollouts))


# what every plugin must do

test_conformance = conformance("gtpo", [{}, {"combine": "max", "always_filter": True, "divide_by_conflicts": True}])
