"""RiskPO: facts about the method, each through the stack."""

from __future__ import annotations

import functools
import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins_riskpo import LEVELS, Riskpo, bundles_of, compose

REWARDS = [1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
SECOND = [1, 1, 0, 0, 1.5, 0.5, 0.5, 1.5, 1, 1, 1.5, 0, 0.5, 0.5, 1, 0.5]  # z: 2.5 1.5 .5 1.5, 1.5 1.5 2.5 .5
UNIFORM = [0.0, -0.3265977, -2.857722, -0.3265977] * 2 + [-0.3265977, -0.3265977, 0.0, -2.857722] * 2
STD = [0.0, -0.6531941, -5.715433, -0.6531941] * 2 + [-0.6531941, -0.6531941, 0.0, -5.715433] * 2
SUM_MEAN = [0.4898965, 0.1632988, -0.5511318, 0.1632988, 0.1632988, 0.1632988, -1.653395, 0.1632988,
            0.1632988, 0.1632988, 0.4898965, -0.5511318, 0.1632988, 0.1632988, 0.1632988, -1.653395]  # fmt: skip


def riskpo(**options):
    return {"riskpo": {"bundle_size": 2, **options}}


@functools.cache
def first_step(**options) -> Stack:
    """A stack whose first step is open; credit changes no state, so that one serves many examples."""
    return start([riskpo(**options)], allow=["equal_groups"])


def advantages(rewards, groups, **options) -> Tensor:
    return first_step(**options).credit(make_rollouts(rewards, groups)).advantages.flatten()


def close(values, expected, rel=2e-6, abs=1e-6) -> bool:
    return torch.as_tensor(values).tolist() == pytest.approx(torch.as_tensor(expected).tolist(), rel=rel, abs=abs)


def take_step(stack: Stack, rollouts, number: int = 0) -> Tensor:
    """One whole step; the advantages."""
    stack.begin_step(number, 10)
    made = stack.credit(rollouts)
    stack.end_step(rollouts, made)
    return made.advantages.flatten()


def tracking(tracked: dict[float, float], **options) -> Stack:
    """A stack whose tracker stands at these values."""
    stack = start([riskpo(**options)])
    plugin = stack.plugins[0]
    values = plugin.state.tracked.clone()
    for level, value in tracked.items():
        values[round(20 * level) - 1] = value
    plugin.state._values.update(tracked=values, warm=True)
    return stack


def direct(rewards, groups, M, q=None, a=0.2, b=0.8, w=1.5, baseline=True, std=True, credit="uniform", published=False):
    """A by loops over bundles, papers and questions, in float64."""
    rewards, A = np.array(rewards, dtype=np.float64), np.zeros(len(rewards))
    questions = list(dict.fromkeys(groups))
    for first in range(0, len(questions), M):
        rows = [[i for i, g in enumerate(groups) if g == question] for question in questions[first : first + M]]
        papers = list(zip(*rows, strict=False))
        z = np.array([rewards[list(paper)].sum() for paper in papers])
        down, up = np.quantile(z, [a, b]) if q is None else q
        s = z.std(ddof=1) if len(z) > 1 else 1.0
        s = s if s > 1e-3 else 1.0
        for paper, score in zip(papers, z, strict=True):
            g = max(score - down, 0) - max(score - up, 0) + (down - up if baseline else 0)
            tail = -max(down - score, 0)
            value = w * tail + g if published else (w * tail / (a + 1e-6) + g / (b - a + 1e-6)) / (w + 1)
            value = value / (s + 1e-6) if std else value
            lead = np.array([rewards[i] - rewards[members].mean() for i, members in zip(paper, rows, strict=True)])
            for place, i in enumerate(paper):
                spread = rewards[rows[place]].std(ddof=1) if len(rows[place]) > 1 else 1.0
                A[i] = (
                    value
                    * {
                        "uniform": 1.0,
                        "std": 1 / ((spread if spread > 1e-3 else 1.0) + 1e-6),
                        "score": 0.5 if rewards[i] > 0 else 1.5,
                        "sum-mean": lead[place] / lead.sum() if abs(lead.sum()) > 1e-6 else 1 / len(rows),
                    }[credit]
                )
    return A


@st.composite
def batches(draw, values=(0.0, 1.0), equal=True):
    """Rewards of some prompts with the same number of responses each, or with different ones."""
    size, prompts = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    sizes = [size if equal else draw(st.integers(1, 5)) for _ in range(prompts)]
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return [draw(st.sampled_from(values)) for _ in groups], groups


# the card's numbers


def test_worked_example():
    assert close(advantages(REWARDS, GROUPS), UNIFORM)
    assert close(advantages(REWARDS, GROUPS, quantiles="own"), UNIFORM)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, UNIFORM), ({"credit": "std"}, STD), ({"credit": "sum-mean", "natural_baseline": False}, SUM_MEAN)],
)
def test_worked_example_with_tracked_quantiles(options, expected):
    stack = tracking({0.2: 0.6, 0.8: 1.4}, **options)
    assert close(stack.credit(make_rollouts(REWARDS, GROUPS)).advantages.flatten(), expected)


def test_worked_example_of_the_tracker():
    stack = start([riskpo()])
    state = stack.plugins[0].state
    take_step(stack, make_rollouts(REWARDS, GROUPS))
    assert state.tracked[[3, 15]].tolist() == pytest.approx([0.4, 1.6])
    take_step(stack, make_rollouts(SECOND, GROUPS), 1)
    assert state.tracked[[3, 15]].tolist() == pytest.approx([0.42, 1.605])


# the formula


@given(
    batches((0.0, 0.25, 1.0, -0.5), equal=False), st.integers(1, 3),
    st.sampled_from(["uniform", "std", "score", "sum-mean"]), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_agrees_with_a_direct_evaluation(batch, M, credit, baseline, std, published):
    options = {"natural_baseline": baseline, "norm_by_std": std, "credit": credit, "bundle_size": M}
    found = advantages(*batch, weights="published" if published else "released", **options)
    assert close(found, direct(*batch, M, None, 0.2, 0.8, 1.5, baseline, std, credit, published), rel=1e-4, abs=1e-4)


@given(batches((0.0, 0.25, 1.0)), st.floats(0.1, 1.5), st.floats(0, 2))
@settings(max_examples=25, deadline=None)
def test_tracked_quantiles_are_used_for_every_full_bundle(batch, low, width):
    rewards, groups = batch
    rewards, groups = rewards * 2, groups + [group + max(groups) + 1 for group in groups]  # an even number of prompts
    found = tracking({0.2: low, 0.8: low + width}).credit(make_rollouts(rewards, groups)).advantages.flatten()
    assert close(found, direct(rewards, groups, 2, (low, low + width)), rel=1e-4, abs=1e-4)


# identities


@given(batches(), st.sampled_from(["uniform", "std", "score"]), st.sampled_from(["released", "published"]))
@settings(max_examples=25, deadline=None)
def test_with_the_natural_baseline_no_advantage_is_positive(batch, mode, weights):
    assert advantages(*batch, credit=mode, weights=weights).max() <= 0


@given(batches((0.0, 0.25, 1.0)), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_natural_baseline_is_a_constant_shift_of_each_bundle(batch, mixing):
    groups = batch[1]
    options = {"mixing": mixing, "norm_by_std": False}
    shift = advantages(*batch, **options) - advantages(*batch, natural_baseline=False, **options)
    bundle = bundles_of(torch.tensor(groups), 2)
    for k in bundle.unique():
        assert close(shift[bundle == k], shift[bundle == k].mean().expand((bundle == k).sum()), abs=1e-5)


@given(batches((0.0, 0.25, 1.0)))
@settings(max_examples=25, deadline=None)
def test_a_window_around_all_scores_gives_the_score_itself(batch):
    rewards, groups = batch
    window = {0.05: 0.0, 0.95: 2.0}
    options = {
        "quantile_down": 0.05,
        "quantile_up": 0.95,
        "mixing": False,
        "natural_baseline": False,
        "norm_by_std": False,
    }
    found = tracking(window, bundle_size=1, **options).credit(make_rollouts(*batch)).advantages.flatten()
    assert close(found, torch.tensor(rewards) / 0.9, rel=1e-5)
    pairs = [*rewards, *rewards], [*groups, *[max(groups) + 1 + group for group in groups]]
    found = tracking(window, **options).credit(make_rollouts(*pairs)).advantages.flatten()
    index = compose(torch.tensor(pairs[1]), bundles_of(torch.tensor(pairs[1]), 2), torch.ones(len(found)).bool())
    z = index.to_rows(index.total(torch.tensor(pairs[0]).double()[:, None])).flatten()
    assert close(found, z / 0.9, rel=1e-5)


@given(batches((0.0, 0.25, 1.0)))
@settings(max_examples=20, deadline=None)
def test_bundles_of_one_score_each_response_by_its_own_reward(batch):
    rewards, groups = torch.tensor(batch[0]), torch.tensor(batch[1])
    found = advantages(*batch, bundle_size=1)
    for group in groups.unique():
        own = rewards[groups == group]
        alone = advantages(own, [0] * len(own), bundle_size=1)
        assert close(found[groups == group], alone)
        assert bool((alone[own.argsort()].diff() >= -1e-6).all()), "the advantage does not fall with the reward"


@given(st.floats(-1, 1, width=32), st.integers(1, 5), st.integers(1, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_equal_scores_and_own_quantiles_have_advantage_zero(value, size, prompts, baseline):
    groups = [group for group in range(prompts) for _ in range(size)]
    found = advantages([value] * len(groups), groups, natural_baseline=baseline, quantiles="own")
    assert found.abs().max() == 0


def test_equal_scores_and_tracked_quantiles_stay_finite():
    found = tracking({0.2: 2.0, 0.8: 4.0}).credit(make_rollouts([0] * 8, [0] * 4 + [1] * 4)).advantages
    expected = (-1.5 * 2 / 0.200001 - 2 / 0.600001) / 2.5  # not divided by a standard deviation of 0
    assert close(found.flatten(), [expected] * 8)


@given(st.lists(st.floats(0, 9, width=32), min_size=2, max_size=8))
@settings(max_examples=20, deadline=None)
def test_scores_above_the_upper_quantile_have_the_same_advantage_and_it_is_the_largest(z):
    rewards = [*z, 3.0, 7.5]
    found = tracking({0.2: 1.0, 0.8: 3.0}, bundle_size=1).credit(make_rollouts(rewards, [0] * len(rewards))).advantages
    above = torch.tensor(rewards) >= 3
    assert found[above].abs().max() == 0 and bool((found[~above] < 0).all())


@pytest.mark.parametrize("weights", ["released", "published"])
@given(batch=batches((0.0, 0.25, 1.0)))
@settings(max_examples=15, deadline=None)
def test_no_weight_on_the_tail_is_no_mixing(weights, batch):
    without = advantages(*batch, mixing=False, weights=weights)
    assert torch.equal(advantages(*batch, w_mix=0.0, weights=weights), without)


def test_the_published_tail_counts_one_and_a_half_times_the_middle_and_the_released_one_four_and_a_half_times():
    for weights, times in (("published", 1.5), ("released", 4.5)):
        z = [0.0, 1.0, 2.0, 3.0, 4.0]
        stack = tracking({0.2: 1.0, 0.8: 3.0}, bundle_size=1, weights=weights, norm_by_std=False)
        A = stack.credit(make_rollouts(z, [0] * 5)).advantages.flatten()
        assert float((A[1] - A[0]) / (A[2] - A[1])) == pytest.approx(times, rel=1e-5)


@given(batches((0.0, 0.25, 1.0)), st.floats(0.5, 5))
@settings(max_examples=20, deadline=None)
def test_without_a_std_a_common_factor_reaches_the_advantages(batch, factor):
    rewards, groups = torch.tensor(batch[0]), batch[1]
    plain, scaled = (advantages(r, groups, norm_by_std=False) for r in (rewards, rewards * factor))
    assert close(scaled, plain * factor, rel=1e-4, abs=1e-4)


# bundles and papers


def test_bundles_are_prompts_in_the_order_of_their_rows():
    groups = torch.tensor([70, 70, -1, 3, 3, 9, 9])
    assert bundles_of(groups, 2).tolist() == [0, 0, -1, 0, 0, 1, 1]
    mixed = [0.0, 1, 1, 0, 0, 1]
    assert torch.equal(advantages(mixed, [70, 70, 3, 3, 9, 9]), advantages(mixed, [0, 0, 1, 1, 2, 2]))


def test_a_short_last_bundle_has_its_own_quantiles_and_does_not_move_the_tracker():
    rewards, groups = [0, 1, 1, 1, 2, 0, 5, 9, 9, 9], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    stack = tracking({0.2: 1.5, 0.8: 2.0})
    found = take_step(stack, make_rollouts(rewards, groups))
    assert close(found[:8], direct(rewards[:8], groups[:8], 2, (1.5, 2.0)), rel=1e-5)
    assert close(found[8:], direct(rewards[8:], groups[8:], 2), rel=1e-5)
    fresh = start([riskpo()])
    take_step(fresh, make_rollouts(rewards, groups))
    assert fresh.plugins[0].state.tracked[9] == np.quantile([1.0, 2.0, 7.0, 9.0], 0.5)


def test_surplus_responses_of_a_larger_group_have_advantage_zero():
    found = advantages([0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1])
    assert found[3] == 0
    assert close(found[[0, 1, 2, 4, 5, 6]], advantages([0, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1]))


@pytest.mark.parametrize("missing", [math.nan, math.inf])
def test_a_paper_with_a_missing_reward_is_dropped_and_the_others_stay(missing):
    holed = [*REWARDS[:5], missing, *REWARDS[6:]]
    made = credit([riskpo()], make_rollouts(holed, GROUPS))
    rest = [i for i in range(8) if i not in (1, 5)]
    found = made.advantages.flatten()
    assert found[[1, 5]].tolist() == [0, 0]
    assert close(found[rest], direct([REWARDS[i] for i in rest], [GROUPS[i] for i in rest], 2), rel=1e-5)
    assert close(found[8:], UNIFORM[8:])
    assert made.weights.flatten().tolist() == [0.0 if i == 5 else 1.0 for i in range(16)]


def test_a_question_without_any_reward_keeps_its_place_in_its_bundle():
    holed = [*[math.nan] * 4, *REWARDS[4:]]
    found = advantages(holed, GROUPS)
    assert found[:8].tolist() == [0] * 8 and close(found[8:], UNIFORM[8:])


def test_rows_without_a_group_are_in_no_bundle():
    found = advantages([5, 5, *REWARDS, 9], [-1, -1, *GROUPS, -1])
    assert close(found, [0, 0, *UNIFORM, 0])


def test_single_prompt_group_of_one_and_nothing_left():
    assert advantages([1, 0], [0, 0]).tolist() == advantages([1, 0], [0, 0], bundle_size=1).tolist()
    assert advantages([1, 0, 1], [0, 1, 2]).tolist() == [0, 0, 0]
    assert advantages([math.nan] * 4, [0, 0, 1, 1]).tolist() == [0] * 4
    empty = make_rollouts(REWARDS, GROUPS).select(torch.zeros(0, dtype=torch.int64))
    assert credit([riskpo()], empty).advantages.shape == (0, 1)


def test_permuted_responses_make_other_papers_of_the_same_questions():
    torch.manual_seed(0)
    rewards = torch.rand(24)
    groups = torch.arange(4).repeat_interleave(6)
    stack = start([riskpo(permute=True)])
    found = stack.credit(make_rollouts(rewards, groups)).advantages.flatten()
    assert torch.equal(found, stack.credit(make_rollouts(rewards, groups)).advantages.flatten())
    assert not close(found, advantages(rewards, groups))
    for half in (slice(0, 12), slice(12, 24)):  # each advantage belongs to one response of each question
        first, second = found[half].reshape(2, 6).sort().values
        assert torch.equal(first, second)
    stack.begin_step(1, 10)
    assert not torch.equal(found, stack.credit(make_rollouts(rewards, groups)).advantages.flatten())


# the tracker


def test_the_first_step_has_own_quantiles_and_the_next_ones_those_of_the_steps_before():
    stack = start([riskpo()])
    assert close(take_step(stack, make_rollouts(REWARDS, GROUPS)), UNIFORM)
    second = take_step(stack, make_rollouts(SECOND, GROUPS), 1)
    assert close(second, direct(SECOND, GROUPS, 2, (0.4, 1.6)), rel=1e-5)
    third = take_step(stack, make_rollouts(REWARDS, GROUPS), 2)
    assert close(third, direct(REWARDS, GROUPS, 2, (0.42, 1.605)), rel=1e-5)


def test_own_quantiles_need_no_tracker():
    stack = start([riskpo(quantiles="own")])
    for number in range(2):
        assert close(take_step(stack, make_rollouts(REWARDS, GROUPS), number), UNIFORM)
    assert stack.plugins[0].state.as_dict() == {}


def test_mix_is_the_mean_of_tracked_and_own_quantiles():
    found = tracking({0.2: 1.0, 0.8: 2.0}, quantiles="mix").credit(make_rollouts(REWARDS, GROUPS)).advantages
    assert close(found.flatten(), direct(REWARDS, GROUPS, 2, (0.8, 1.7)), rel=1e-5)


def test_lr_q_is_the_size_of_the_trackers_step():
    stack = tracking({0.2: 0.4, 0.8: 1.6}, lr_q=0.5)
    take_step(stack, make_rollouts(SECOND, GROUPS))
    assert stack.plugins[0].state.tracked[[3, 15]].tolist() == pytest.approx([0.4 + 0.5 * 0.2, 1.6 + 0.5 * 0.05])


def test_quantiles_that_have_crossed_are_put_in_order():
    crossed, ordered = tracking({0.2: 1.4, 0.8: 0.6}), tracking({0.2: 0.6, 0.8: 1.4})
    found = [stack.credit(make_rollouts(REWARDS, GROUPS)).advantages for stack in (crossed, ordered)]
    assert torch.equal(*found)


@given(*[st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=6, max_size=6)] * 2, st.floats(0.01, 1))
@settings(max_examples=20, deadline=None)
def test_each_level_moves_by_how_far_the_share_below_it_is_off(first, second, lr_q):
    stack = start([riskpo(bundle_size=1, lr_q=lr_q)])
    take_step(stack, make_rollouts(first, [0] * 6))
    before = stack.plugins[0].state.tracked.clone()
    assert close(before, np.quantile(first, LEVELS.numpy()), abs=1e-12)
    take_step(stack, make_rollouts(second, [0] * 6), 1)
    below = [np.mean([z < q for z in second]) for q in before.tolist()]
    assert close(stack.plugins[0].state.tracked, before + lr_q * (LEVELS - torch.tensor(below)), abs=1e-12)


def test_a_step_without_rewards_or_without_this_advantage_leaves_the_tracker():
    stack = start([riskpo()])
    take_step(stack, make_rollouts([math.nan] * 4, [0, 0, 1, 1]))
    assert not stack.plugins[0].state.warm
    off = start([riskpo()], off=["riskpo.compute_advantages"])
    take_step(off, make_rollouts(REWARDS, GROUPS))
    assert not off.plugins[0].state.warm


def test_state_survives_and_a_resumed_run_goes_on_exactly(tmp_path):
    stack = start([riskpo()])
    take_step(stack, make_rollouts(REWARDS, GROUPS))
    stack.save(tmp_path / "state", 1)
    again = start([riskpo()])
    assert again.load(tmp_path / "state") == 1
    assert torch.equal(again.plugins[0].state.tracked, stack.plugins[0].state.tracked)
    one, other = (take_step(s, make_rollouts(SECOND, GROUPS), 1) for s in (stack, again))
    assert torch.equal(one, other)
    assert torch.equal(again.plugins[0].state.tracked, stack.plugins[0].state.tracked)


# the loss


def current_log_probs(rollouts, seed=0) -> Tensor:
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rollouts.old_log_probs.double() + 0.4 * noise) * rollouts.mask


def test_the_papers_loss_clips_the_geometric_mean_of_the_ratios_and_averages_responses():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[4, 1, 2, 0] * 4)
    log_probs = current_log_probs(rollouts)
    loss, gradient = loss_and_gradient(start([riskpo(sequence_ratio=True)]), rollouts, log_probs)
    A = torch.tensor(UNIFORM).double()
    lengths = rollouts.mask.sum(1).clamp(min=1)
    s = ((log_probs - rollouts.old_log_probs).sum(1) / lengths).exp()
    terms = torch.maximum(-s * A, -s.clamp(0.8, 1.2) * A)
    assert float(loss) == pytest.approx(float(terms.mean()), rel=1e-6)
    moving = (-s * A >= -s.clamp(0.8, 1.2) * A).double()
    expected = (-moving * s * A / lengths / 16)[:, None] * rollouts.mask
    assert torch.allclose(gradient, expected, atol=1e-7)
    assert 0 < int(moving.sum()) < 16, "some ratios are clipped, some are not"


def test_the_papers_loss_takes_the_stacks_clip_range():
    class Wide(Plugin):
        """Bounds far away."""

        name = "wide"

        @hookimpl
        def clip_range(self) -> tuple[float, float]:
            return 0.0, 100.0

    rollouts = make_rollouts(REWARDS, GROUPS)
    log_probs = current_log_probs(rollouts)
    loss, _ = loss_and_gradient(start([riskpo(sequence_ratio=True), Wide()]), rollouts, log_probs)
    s = (log_probs - rollouts.old_log_probs).mean(1).exp()
    assert float(loss) == pytest.approx(float((-s * torch.tensor(UNIFORM)).mean()), rel=1e-6)


def test_as_released_the_loss_is_the_trainers():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[4, 1, 2, 3] * 4)
    log_probs = current_log_probs(rollouts)
    loss, _ = loss_and_gradient(start([riskpo()]), rollouts, log_probs)
    A, ratio = torch.tensor(UNIFORM).double()[:, None], (log_probs - rollouts.old_log_probs).exp()
    terms = torch.maximum(-ratio * A, -ratio.clamp(0.8, 1.2) * A)
    assert float(loss) == pytest.approx(float(terms[rollouts.mask].mean()), rel=1e-6)


@pytest.mark.parametrize("micro_batches", [2, 16])
@pytest.mark.parametrize("sequence_ratio", [False, True])
def test_micro_batches_do_not_change_the_loss(micro_batches, sequence_ratio):
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[4, 1, 2, 0] * 4)
    log_probs = current_log_probs(rollouts)
    stack = start([riskpo(sequence_ratio=sequence_ratio)])
    whole, parts = (loss_and_gradient(stack, rollouts, log_probs, micro_batches=n) for n in (1, micro_batches))
    assert torch.allclose(whole[0], parts[0], atol=1e-10) and torch.allclose(whole[1], parts[1], atol=1e-10)


def test_two_ranks_give_the_loss_of_one():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[4, 1, 2, 0] * 4)
    log_probs = current_log_probs(rollouts)
    stack = start([riskpo(sequence_ratio=True)])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    whole = stack.mini_batch(columns).loss(log_probs).total
    barrier, sent, losses = threading.Barrier(2), {}, {}

    def rank(number: int) -> None:
        def reduce(values: Tensor) -> Tensor:
            sent[number] = values
            barrier.wait()
            total = sent[0] + sent[1]
            barrier.wait()
            return total

        rows = slice(0, 5) if number == 0 else slice(5, 16)
        mine = {name: column[rows] for name, column in columns.items()}
        losses[number] = stack.mini_batch(mine, reduce=reduce).loss(log_probs[rows]).total

    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.allclose(losses[0] + losses[1], whole, atol=1e-10)


def test_an_empty_response_is_safe():
    rollouts = make_rollouts(REWARDS, GROUPS, lengths=[0, *[3] * 15])
    for sequence_ratio in (False, True):
        stack = start([riskpo(sequence_ratio=sequence_ratio)])
        loss, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs)
        assert loss.isfinite() and gradient.isfinite().all() and (gradient[0] == 0).all()


# configuration, facts and claims


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"bundle_size": 0}, "bundle_size"), ({"quantile_down": -0.1}, "quantile_down"),
        ({"quantile_up": 1.1}, "quantile_up"), ({"quantile_down": 0.8}, "quantile_down"),
        ({"quantile_down": 0.0}, "quantile_down"), ({"quantile_down": 0.79}, "quantile_up"), ({"w_mix": -1}, "w_mix"),
        ({"w_mix": math.inf}, "w_mix"), ({"lr_q": 0}, "lr_q"), ({"credit": "mean"}, "credit"),
        ({"weights": "paper"}, "weights"), ({"quantiles": "none"}, "quantiles"), ({"omega": 0.5}, "omega"),
    ],
)  # fmt: skip
def test_options_out_of_range_name_plugin_and_field(options, field):
    with pytest.raises(ConfigurationError, match=rf"riskpo.*{field}"):
        Stack([{"riskpo": options}])


def test_a_tail_at_level_zero_is_allowed_where_nothing_is_divided_by_it():
    for options in ({"mixing": False}, {"weights": "published"}, {"w_mix": 0.0}):
        Stack([riskpo(quantile_down=0.0, **options)])
    Stack([riskpo(quantile_down=0.79, quantiles="own")])


@pytest.mark.parametrize("fact", ["response_rewards", "equal_groups", "complete_groups", "whole_groups"])
def test_refused_with_a_plugin_that_breaks_what_it_assumes(fact):
    with pytest.raises(StackError, match=rf"{fact}.*riskpo assumes it, other breaks it"):
        Stack(["riskpo", stand_in(breaks=[fact])])
    Stack(["riskpo", stand_in(breaks=[fact])], allow=[fact])


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({}, "reward_scale"),
        ({"norm_by_std": False, "credit": "std"}, "reward_scale"),
        ({"sequence_ratio": True}, "token_ratio"),
    ],
)
def test_refused_with_a_plugin_that_assumes_what_it_breaks(options, fact):
    with pytest.raises(StackError, match=rf"{fact}.*other assumes it, riskpo breaks it"):
        Stack([riskpo(**options), stand_in(assumes=[fact])])


def test_what_is_not_divided_and_not_compared_by_response_breaks_nothing():
    assert Riskpo(norm_by_std=False).breaks == frozenset()


def test_refused_beside_other_owners():
    with pytest.raises(StackError, match="nobody reads it"):
        Stack(["riskpo", "grpo"])
    with pytest.raises(StackError, match="equal_groups"):
        Stack(["riskpo", "knapsack"])
    Stack(["riskpo", "bapo"])
    with pytest.raises(StackError, match="token_ratio"):
        Stack([riskpo(sequence_ratio=True), "bapo"])


def test_refused_where_another_plugin_makes_the_groups():
    class OneGroup(Plugin):
        """All rows in one group."""

        name = "one-group"

        @hookimpl
        def assign_groups(self, groups: Tensor) -> Tensor:
            return groups.clamp(max=0)

    with pytest.raises(StackError, match="assign_groups has one owner"):
        Stack(["riskpo", OneGroup()])


def test_rewards_per_token_are_refused():
    class PerToken(Plugin):
        """A reward per token."""

        name = "per-token"

        @hookimpl
        def combine_rewards(self, mask: Tensor) -> Tensor:
            return mask.float()

    with pytest.raises(HookError, match="response_rewards"):
        credit(["riskpo", PerToken()], make_rollouts(REWARDS, GROUPS))


def test_the_same_step_twice_gives_the_same_and_changes_no_input():
    rollouts = make_rollouts(REWARDS, GROUPS)
    before = rollouts.scores.clone()
    stack = start([riskpo()])
    first, second = stack.credit(rollouts).advantages, stack.credit(rollouts).advantages
    assert torch.equal(first, second) and first.shape == (16, 1) and first.dtype == torch.float32
    assert torch.equal(rollouts.scores, before)


def test_quantiles_and_tail_are_reported():
    stack = start([riskpo()])
    stack.credit(make_rollouts(REWARDS, GROUPS))
    metrics = {name.rpartition("/")[2]: value for name, value in stack.metrics}
    assert metrics["score"] == pytest.approx(1) and metrics["tail"] == pytest.approx(0.25)
    assert metrics["quantile_down"] == pytest.approx(0.6) and metrics["quantile_up"] == pytest.approx(1.4)


# what every plugin must do

test_conformance = conformance(
    "riskpo",
    [
        {"bundle_size": 2},
        {"bundle_size": 2, "quantiles": "own", "credit": "sum-mean"},
        {"bundle_size": 2, "permute": True, "sequence_ratio": True},
    ],
    unless={"permutation": "prompts fill bundles, and responses papers, in the order of the rows"},
)
