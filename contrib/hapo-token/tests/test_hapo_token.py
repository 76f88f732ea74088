"""Facts about HAPO, through the stack."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Requests, Sampling
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_hapo_token import NEUTRAL, NUMBERS, HapoToken, entropy_statistics

ENTROPY = [[0.02, 0.5, 1.4, 0.1, 0.0], [0.3, 0.9, 0.05, 0.0, 0.0], [2.1, 0.01, 0.4, 0.7, 0.2]]
MASK = [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
RATIO = [[1.0, 1.15, 0.92, 1.05, 1.0], [0.85, 1.02, 0.7, 1.0, 1.0], [1.25, 0.99, 1.3, 0.95, 1.08]]
REWARDS = [1.0, 0.0, 1.0]
STATISTICS = [-0.1053605, 2.108902, 2.488973, 0.4686647]
HHAT = [
    [-0.8459608, -0.1306248, 0.521461, -0.4882928, 0.0],
    [-0.2441464, 0.0, -0.642332, 0.0, 0.0],
    [1.0, -1.0, -0.1802143, -0.05585001, -0.3342536],
]
EPS_LOW = [
    [0.3691922, 0.226125, 0.2, 0.2976586, 0.0],
    [0.2488293, 0.2, 0.3284664, 0.0, 0.0],
    [0.2, 0.4, 0.2360429, 0.21117, 0.2668507],
]
EPS_HIGH = [[0.2, 0.2, 0.3042922, 0.2, 0.0], [0.2, 0.2, 0.2, 0.0, 0.0], [0.4, 0.2, 0.2, 0.2, 0.2]]
REDISTRIBUTED = [
    [0.08893438, 0.5773489, 0.5773489, 0.2954336, 0.0],
    [-1.732047, -1.732047, -1.732047, 0.0, 0.0],
    [1.154698, 0.0, 0.5773489, 0.545104, 0.384368],
]
LOSS = [
    [-0.08893438, -0.6639513, -0.531161, -0.3102053, 0.0],
    [1.47224, 1.766688, 1.212433, 0.0, 0.0],
    [-1.443372, 0.0, -0.6928187, -0.5178488, -0.4151174],
]
LOGITS = [[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]]
TEMPERATURE = [1.003037, 1.025492, 0.95]
DAPO = {"policy_loss": {"ppo_clip": {"dual_clip": 10.0}}, "reduce_loss": "token_mean"}
PARTS_OFF = {"tau": 0.0, "token_average": False, "adv_beta": 0.0, "clip_alpha": 0.0}


class Spy(Plugin):
    """Keeps what the update makes on its way."""

    name = "spy"
    seen = SimpleNamespace()

    @hookimpl(wrapper=True)
    def adapt_advantages(self):
        self.seen.advantages = yield
        return self.seen.advantages

    @hookimpl(wrapper=True)
    def clip_range(self):
        self.seen.clip = yield
        return self.seen.clip

    @hookimpl(wrapper=True)
    def policy_loss(self):
        self.seen.loss = yield
        return self.seen.loss


def worked_example(**fields):
    mask = torch.tensor(MASK).bool()
    plain = {"entropy": torch.tensor(ENTROPY), "old_log_probs": torch.zeros((3, 5))}
    return make_rollouts(REWARDS, mask=mask, **(plain | fields))


def log_ratio(ratio=RATIO, mask=MASK):
    return torch.tensor(ratio).double().log() * torch.tensor(mask)


def opened(*others, owners=DAPO, **options):
    return start([{"hapo-token": options}, *others], owners=owners)


@functools.cache
def first_step(*items):
    """A stack whose first step is open; credit changes no state, so that one serves many examples."""
    return opened(**dict(items))


def update(rollouts, log_probs, entropy, micro_batches=1, **options):
    """Loss, gradient, and what the spy saw."""
    loss, gradient = loss_and_gradient(
        opened(Spy(), **options), rollouts, log_probs, micro_batches=micro_batches, entropy=entropy
    )
    return loss, gradient, Spy.seen


def shown(values, mask=MASK):
    return torch.as_tensor(values) * torch.tensor(mask)


def close(one, other, **tolerance):
    torch.testing.assert_close(
        torch.as_tensor(one).double(), torch.as_tensor(other).double(), **({"atol": 2e-6, "rtol": 2e-6} | tolerance)
    )


# the worked example


def test_the_worked_example():
    rollouts = worked_example()
    loss, _, seen = update(rollouts, log_ratio(), torch.tensor(ENTROPY).double())
    close(shown(1 - seen.clip[0]), EPS_LOW)
    close(shown(seen.clip[1] - 1), EPS_HIGH)
    close(seen.advantages, REDISTRIBUTED)
    close(shown(seen.loss.detach()), LOSS)
    assert float(loss) == pytest.approx(-0.01767075, abs=1e-7)


def test_the_worked_examples_statistics_and_group_average():
    stack = opened()
    made = stack.credit(worked_example())
    close(stack.step.shared_by_all()["hapo-token"]["statistics"], STATISTICS)
    close(made.advantages, [[0.5773489], [-1.732047], [0.5773489]])
    close(dict(stack.metrics)["rlplugins/hapo-token/log_entropy_pivot"], STATISTICS[0])
    close(dict(stack.metrics)["rlplugins/hapo-token/log_entropy_spread"], STATISTICS[1])


def test_the_worked_examples_normalised_entropies():
    _, _, seen = update(worked_example(), log_ratio(), torch.tensor(ENTROPY).double(), clip_low=1.0, clip_high=1.0)
    close(shown(seen.clip[1] - 1 - (1 - seen.clip[0])), HHAT)


def test_the_worked_examples_temperatures():
    stack = opened()
    rollouts = worked_example()
    stack.end_step(rollouts, stack.credit(rollouts))
    sampling = stack.sampling_params(requests(3), Sampling.of(3, 0.7, 8))
    close(sampling.numbers[NUMBERS], [STATISTICS] * 3)
    assert sampling.temperature.tolist() == pytest.approx([0.7] * 3), "the trainer divides by T0"
    logits = torch.tensor(LOGITS)
    scaled = stack.process_logits(logits, sampling.numbers)
    close(scaled * torch.tensor(TEMPERATURE)[:, None], logits)
    half = stack.process_logits(logits.bfloat16(), sampling.numbers)
    assert half.dtype == torch.bfloat16
    close(half, scaled.bfloat16(), atol=1e-2, rtol=1e-2)


def requests(rows):
    return Requests.of(make_pool(1), torch.tensor([rows]))


# sampling


def test_the_first_step_and_requests_without_numbers_are_drawn_as_ever():
    stack = opened()
    sampling = stack.sampling_params(requests(3), Sampling.of(3, 1.0, 8))
    logits = torch.randn((3, 7))
    assert torch.equal(stack.process_logits(logits, sampling.numbers), logits)
    assert torch.equal(stack.process_logits(logits, {}), logits)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.001, 0.99), st.integers(0, 2**31))
def test_the_temperature_rises_with_the_entropy_by_at_most_tau(tau, seed):
    stack = opened(tau=tau)
    rollouts = worked_example()
    stack.end_step(rollouts, stack.credit(rollouts))
    logits = torch.randn((1, 6), generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, 9)[:, None]
    numbers = {NUMBERS: torch.tensor([STATISTICS] * 9)}
    temperature = (logits / stack.process_logits(logits, numbers))[:, 0]
    assert bool((temperature.diff() <= 1e-5).all()), "sharper logits are drawn colder"
    assert bool(((temperature - 1).abs() <= tau + 1e-5).all())


def test_excluded_tokens_stay_excluded():
    stack = opened()
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    scaled = stack.process_logits(logits, {NUMBERS: torch.tensor([STATISTICS])})
    assert scaled[0, 2] == -math.inf and bool(scaled[0, :2].isfinite().all())


def test_the_engine_builds_the_rule_from_the_specification():
    stack = Stack.from_specification(opened(tau=0.5).specification())
    logits = torch.tensor(LOGITS)
    factor = (logits / stack.process_logits(logits, {NUMBERS: torch.tensor([STATISTICS] * 3)}))[:, 0]
    close(factor[[0, 2]], 1 + 10 * (torch.tensor(TEMPERATURE)[[0, 2]] - 1), atol=1e-5)


# the group average

responses = st.lists(
    st.tuples(st.integers(-8, 8).map(lambda n: n / 4), st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=12
)


def rollouts_of(rows, **fields):
    rewards, lengths, groups = zip(*rows, strict=True)
    rollouts = make_rollouts(list(rewards), list(groups), lengths=lengths, tokens=10, **fields)
    if "entropy" not in fields:
        rollouts.entropy = 0.5 * rollouts.mask
    return rollouts


def advantages(rollouts, *others):
    return first_step(("adv_beta", 0.0), ("clip_alpha", 0.0)).credit(rollouts).advantages.flatten()


def counted_out(rows):
    """Advantages with every response written down once per token."""
    expected = np.zeros(len(rows))
    for group in {row[2] for row in rows}:
        members = [i for i, row in enumerate(rows) if row[2] == group]
        tokens = np.repeat([rows[i][0] for i in members], [rows[i][1] for i in members])
        rewards = np.array([rows[i][0] for i in members])
        there = np.array([rows[i][1] > 0 for i in members])
        if len(tokens):
            a = (rewards - tokens.mean()) / (tokens.std() + 1e-6)
        if not len(tokens) or (np.abs(a[there]) >= 5).any():
            spread = rewards.std(ddof=1) if len(members) > 1 else 0.0
            a = (rewards - rewards.mean()) / (spread + 1e-6)
        expected[members] = a
    return expected


@settings(max_examples=40, deadline=None)
@given(responses)
def test_mean_and_deviation_are_over_tokens(rows):
    expected = counted_out(rows)
    close(advantages(rollouts_of(rows)), expected, atol=1e-4, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=8), st.integers(1, 9))
def test_equal_lengths_give_grpo_with_the_population_deviation(rewards, length):
    rollouts = make_rollouts(rewards, tokens=length)
    rollouts.entropy = 0.5 * rollouts.mask
    owners = {"advantage_scale": {"group_std": {"ddof": 0}}}
    expected = credit(["grpo"], rollouts, owners=owners).advantages
    close(advantages(rollouts), expected.flatten(), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.floats(-1e3, 1e3, width=32), st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_equal_rewards_and_a_group_of_one_give_exactly_nothing(reward, lengths):
    rows = [(reward, length, 0) for length in lengths] + [(1.7, 3, 1)]
    assert not advantages(rollouts_of(rows)).any()


def test_a_group_with_an_advantage_of_five_is_normalised_over_responses():
    rows = [(1.0, 1, 0)] + [(0.0, 10, 0)] * 3 + [(1.0, 1, 1), (0.0, 9, 1)]
    made = advantages(rollouts_of(rows))
    close(made[:4], [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    close(made[4:], [3.0, -1.0 / 3], atol=1e-4)


def test_an_empty_response_is_in_no_mean_and_makes_no_group_fall_back():
    rows = [(0.0, 5, 0), (0.1, 5, 0), (9.0, 0, 0)]
    close(advantages(rollouts_of(rows))[:2], [-1.0, 1.0], atol=1e-4)


def test_a_response_without_reward_leaves_its_group():
    rows = [(1.0, 4, 0), (math.nan, 9, 0), (0.0, 4, 0)]
    close(advantages(rollouts_of(rows)), [1.0, 0.0, -1.0], atol=1e-5)


def test_without_the_group_average_it_is_grpo():
    rollouts = worked_example()
    made = credit([{"hapo-token": {"token_average": False}}], rollouts).advantages
    assert torch.equal(made, credit(["grpo"], rollouts).advantages)


# statistics

entropies = st.lists(st.floats(0, 5, width=32), min_size=1, max_size=30)


@settings(max_examples=40, deadline=None)
@given(entropies, st.floats(0, 1))
def test_the_statistics_are_those_of_the_sorted_list(values, pivot):
    logs = np.sort(np.log(np.maximum(np.array(values, dtype=np.float32), 1e-8)))
    med = logs[round(pivot * (len(logs) - 1))]
    sd = max(math.sqrt(np.mean((logs - med) ** 2)), 1e-4)
    rollouts = make_rollouts([0.0], tokens=len(values), entropy=torch.tensor([values]))
    stack = opened(pivot=pivot)
    stack.credit(rollouts)
    factors = [1 / max(end, 1e-8) if end > 0 else 0.0 for end in ((logs[-1] - med) / sd, (med - logs[0]) / sd)]
    expected = [med, sd, *factors]
    close(stack.step.shared_by_all()["hapo-token"]["statistics"], expected, rtol=1e-3)


@settings(max_examples=25, deadline=None)
@given(entropies, entropies)
def test_hhat_stays_within_one_also_for_entropies_of_another_pass(of_step, current):
    size = max(len(of_step), len(current))
    of_step, current = (torch.tensor([(values * size)[:size]]) for values in (of_step, current))
    rollouts = make_rollouts([0.0], tokens=size, entropy=of_step, old_log_probs=torch.zeros((1, size)))
    _, _, seen = update(rollouts, torch.zeros((1, size)).double(), current.double())
    low, high = (bound[:, :size] for bound in seen.clip)
    assert bool(((1 - low >= 0.2 - 1e-6) & (1 - low <= 0.4 + 1e-6)).all())
    assert bool(((high - 1 >= 0.2 - 1e-6) & (high - 1 <= 0.4 + 1e-6)).all())
    assert not bool(((1 - low > 0.2 + 1e-6) & (high - 1 > 0.2 + 1e-6)).any()), "one bound at a time"


def test_a_token_of_no_entropy_is_the_lowest_of_all():
    statistics = entropy_statistics(torch.tensor([[0.0, 0.5, 0.6, 0.7, 0.8]]), torch.ones((1, 5)).bool())
    h = (math.log(1e-8) - statistics[0]) / statistics[1]
    assert h * statistics[3] == pytest.approx(-1)


def test_a_missing_entropy_is_left_out_and_gets_the_plain_bounds():
    rollouts = worked_example(entropy=torch.tensor(ENTROPY).masked_fill(torch.tensor(ENTROPY) == 2.1, math.nan))
    stack = opened()
    stack.credit(rollouts)
    kept = torch.tensor(MASK).bool()
    kept[2, 0] = False
    assert stack.step.shared_by_all()["hapo-token"]["statistics"] == entropy_statistics(torch.tensor(ENTROPY), kept)
    loss, gradient, seen = update(rollouts, log_ratio(), rollouts.entropy.double())
    close([1 - seen.clip[0][2, 0], seen.clip[1][2, 0] - 1], [0.2, 0.2])
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_rows_of_no_group_are_not_counted():
    kind = torch.tensor([0, 0, 1], dtype=torch.int8)
    rollouts = worked_example(groups=torch.tensor([0, 0, -1]), kind=kind, kinds=("policy", "expert"))
    stack = opened()
    stack.credit(rollouts)
    expected = entropy_statistics(torch.tensor(ENTROPY)[:2], torch.tensor(MASK).bool()[:2])
    assert stack.step.shared_by_all()["hapo-token"]["statistics"] == expected


# the update


def test_all_parts_off_is_dapo():
    rollouts = worked_example()
    stack = start([{"hapo-token": PARTS_OFF}, "grpo"], owners=DAPO)
    assert not any(stack.takes("entropy", phase) for phase in ("credit", "update"))
    assert not stack.claims("process_logits") and not stack.claims("clip_range")
    one = loss_and_gradient(stack, rollouts, log_ratio())
    other = loss_and_gradient(start(["grpo"], owners=DAPO), rollouts, log_ratio())
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0625, 5, width=32), st.integers(0, 2**31))
def test_equal_entropies_leave_bounds_and_advantages_as_they_are(entropy, seed):
    level = torch.full((3, 5), entropy) * torch.tensor(MASK)
    rollouts = worked_example(entropy=level)
    log_probs = torch.randn((3, 5), generator=torch.Generator().manual_seed(seed)) * torch.tensor(MASK) * 0.3
    hapo = update(rollouts, log_probs.double(), level.double())[:2]
    plain = update(rollouts, log_probs.double(), level.double(), adv_beta=0.0, clip_alpha=0.0)[:2]
    for one, other in zip(hapo, plain, strict=True):
        close(one, other)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([-1.0, 2.0]), st.floats(0.5, 2.0), st.sampled_from([0.01, 2.1]), st.floats(0, 1), st.floats(0, 1)
)
def test_redistribution_and_bounds_at_the_extremes(reward, ratio, entropy, alpha, beta):
    """hhat is -1 at entropy 0.01 and 1 at 2.1; A = 0 inside with b = 1, and doubles outside."""
    low = entropy == 0.01
    rollouts = make_rollouts([reward, 0.0], lengths=[1, 1], tokens=3, old_log_probs=torch.zeros((2, 3)))
    rollouts.entropy = torch.tensor([[entropy, 0, 0], [0.9, 0, 0]])
    stack = opened(Spy(), clip_alpha=alpha, adv_beta=beta)
    stack.begin_step(0, 10)
    made = stack.credit(rollouts)
    stack.step.shared_by_all()["hapo-token"]["statistics"] = STATISTICS
    mini = stack.mini_batch(stack.update_columns(rollouts, made))
    mini.loss(torch.tensor([[math.log(ratio), 0, 0], [0, 0, 0]]), entropy=rollouts.entropy)
    eps_low, eps_high = (0.2 * (1 + alpha), 0.2) if low else (0.2, 0.2 * (1 + alpha))
    inside = 1 - eps_low / 2 < ratio < 1 + eps_high / 2
    factor = (1 - beta if inside else 1) if low else (1 if inside else 1 + beta)
    close(Spy.seen.advantages[0, 0], made.advantages[0, 0] * factor, atol=1e-5, rtol=1e-5)
    if alpha:
        close([Spy.seen.clip[0][0, 0], Spy.seen.clip[1][0, 0]], [1 - eps_low, 1 + eps_high], atol=1e-5)


def test_the_released_sign_treats_low_entropy_like_high():
    entropy = torch.tensor(ENTROPY).double()
    _, _, seen = update(worked_example(), log_ratio(), entropy, released_sign=True)
    close(shown(1 - seen.clip[0]), 0.2 * torch.tensor(MASK))
    close(shown(seen.clip[1] - 1), shown(0.2 * (1 + torch.tensor(HHAT).abs())))
    assert seen.advantages[2, 1] == pytest.approx(0.5773489), "inside of its bounds it keeps its advantage"


def test_bounds_and_advantages_carry_no_gradient():
    entropy = torch.tensor(ENTROPY).double().requires_grad_()
    rollouts = worked_example()
    stack = opened()
    mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)))
    leaf = log_ratio().requires_grad_()
    mini.loss(leaf, entropy=entropy).total.backward()
    assert entropy.grad is None and leaf.grad is not None


def test_each_option_has_its_effect():
    entropy = torch.tensor(ENTROPY).double()
    plain = update(worked_example(), log_ratio(), entropy)[0]
    for option in ({"adv_beta": 0.5}, {"clip_alpha": 0.5}, {"clip_low": 0.1}, {"clip_high": 0.28}, {"pivot": 0.5},
                   {"released_sign": True}, {"token_average": False}):  # fmt: skip
        assert abs(update(worked_example(), log_ratio(), entropy, **option)[0] - plain) > 1e-4, option


# how the batch is cut


def longer_example():
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 3, 0, 4, 1, 5, 2, 5]
    rollouts = make_rollouts([1.0, 0, 0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1], lengths=lengths, tokens=5)
    rollouts.entropy = torch.rand((8, 5), generator=generator) * 2 * rollouts.mask
    rollouts.old_log_probs = torch.zeros((8, 5))
    log_probs = torch.randn((8, 5), generator=generator).double() * 0.3 * rollouts.mask
    entropy = torch.rand((8, 5), generator=generator).double() * 2 * rollouts.mask
    return rollouts, log_probs, entropy


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_do_not_change_the_loss(micro_batches):
    rollouts, log_probs, entropy = longer_example()
    whole = loss_and_gradient(opened(), rollouts, log_probs, entropy=entropy)
    parts = loss_and_gradient(opened(), rollouts, log_probs, entropy=entropy, micro_batches=micro_batches)
    for one, other in zip(whole, parts, strict=True):
        close(one, other, atol=1e-10, rtol=0)


def test_ranks_do_not_change_the_loss():
    rollouts, log_probs, entropy = longer_example()
    stack = opened()
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    whole = stack.mini_batch(columns).loss(log_probs, entropy=entropy).total
    shares = [{name: column[rows] for name, column in columns.items()} for rows in (slice(0, 3), slice(3, None))]
    sums = []
    for share in shares:
        stack.mini_batch(share, reduce=lambda values: sums.append(values) or values)
    parts = []
    for share, rows in zip(shares, (slice(0, 3), slice(3, None)), strict=True):
        mini = stack.mini_batch(share, reduce=lambda _: sum(sums))
        parts.append(mini.loss(log_probs[rows], entropy=entropy[rows]).total)
    torch.testing.assert_close(sum(parts), whole)


def test_statistics_of_the_micro_batch_are_those_of_the_cut():
    rollouts, log_probs, entropy = longer_example()
    whole = update(rollouts, log_probs, entropy, stats="micro")[0]
    parts = update(rollouts, log_probs, entropy, stats="micro", micro_batches=4)[0]
    assert abs(whole - parts) > 1e-4
    by_hand = worked_example(entropy=torch.full((3, 5), 0.5) * torch.tensor(MASK))
    _, _, seen = update(by_hand, log_ratio(), torch.tensor(ENTROPY).double(), stats="micro")
    close(seen.advantages, REDISTRIBUTED)


def test_statistics_of_the_micro_batch_take_one_rank():
    with pytest.raises(StackError, match="one rank only"):
        Stack([{"hapo-token": {"stats": "micro"}}], trainer=able(ranks=2))
    Stack([{"hapo-token": {"stats": "micro"}}], trainer=able(ranks=1))
    Stack(["hapo-token"], trainer=able(ranks=2))


def test_the_same_step_twice_gives_the_same():
    rollouts, log_probs, entropy = longer_example()
    one, other = (loss_and_gradient(opened(), rollouts, log_probs, entropy=entropy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_nothing_that_was_given_is_changed():
    rollouts, log_probs, entropy = longer_example()
    given = [rollouts.entropy, rollouts.mask, rollouts.scores, log_probs, entropy]
    before = [tensor.clone() for tensor in given]
    loss_and_gradient(opened(), rollouts, log_probs, entropy=entropy)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


# state


def test_the_statistics_of_the_last_step_survive_a_restart(tmp_path):
    stack, rollouts = opened(), worked_example()
    stack.end_step(rollouts, stack.credit(rollouts))
    stack.save(tmp_path / "state", 1)
    resumed = opened()
    assert resumed.plugins[0].state.statistics == list(NEUTRAL)
    assert resumed.load(tmp_path / "state") == 1
    close(resumed.plugins[0].state.statistics, STATISTICS)
    assert resumed.plugins[0].state.statistics == stack.plugins[0].state.statistics


def test_a_step_without_tokens_keeps_the_statistics_of_the_one_before():
    stack, rollouts = opened(), worked_example()
    stack.end_step(rollouts, stack.credit(rollouts))
    empty = make_rollouts([1.0, 0.0], lengths=[0, 0], tokens=3, entropy=torch.zeros((2, 3)))
    for made in (stack.credit, lambda _: None):
        stack.begin_step(1, 10)
        stack.end_step(empty, made(empty))
        close(stack.plugins[0].state.statistics, STATISTICS)


def test_a_step_of_empty_responses_gives_no_loss():
    empty = make_rollouts([1.0, 0.0], lengths=[0, 0], tokens=3, entropy=torch.zeros((2, 3)))
    loss, gradient = loss_and_gradient(opened(), empty, torch.zeros((2, 3)), entropy=torch.zeros((2, 3)))
    assert float(loss) == 0 and not gradient.any()


# what it says about itself


def able(**fields):
    provides = frozenset({"current_entropy"})
    return Trainer(name="able", provides=provides, columns=frozenset({"entropy"}), **fields)


@pytest.mark.parametrize(
    ("how", "fact", "harmless"),
    [
        ("breaks", "response_rewards", {"token_average": False}),
        ("breaks", "token_ratio", {"adv_beta": 0.0, "clip_alpha": 0.0}),
        ("assumes", "reward_scale", {"token_average": False}),
    ],
)
def test_the_facts_of_the_parts(how, fact, harmless):
    with pytest.raises(StackError, match=fact):
        Stack(["hapo-token", stand_in(**{how: [fact]})])
    Stack([{"hapo-token": harmless}, stand_in(**{how: [fact]})], owners={"advantage_scale": "one"})


def test_a_trainer_that_lacks_what_a_part_needs_is_refused_unless_it_is_off():
    trainer = able(binds=frozenset(able().binds - {"process_logits"}))
    with pytest.raises(StackError, match="cannot call process_logits"):
        Stack(["hapo-token"], trainer=trainer)
    Stack([{"hapo-token": {"tau": 0.0}}], trainer=trainer)
    with pytest.raises(StackError, match="current entropy"):
        Stack(["hapo-token"], trainer=Trainer(name="t", columns=frozenset({"entropy"})))
    with pytest.raises(StackError, match="column 'entropy'"):
        Stack(["hapo-token"], trainer=Trainer(name="t", provides=frozenset({"current_entropy"}), columns=frozenset()))
    with pytest.raises(StackError, match="2 or more"):
        Stack(["hapo-token"], trainer=able(group_size=1))
    Stack([{"hapo-token": {"token_average": False}}], trainer=able(group_size=1))


def test_bounds_that_nobody_reads_are_refused():
    with pytest.raises(StackError, match=r"hapo-token\.clip_range gives `clip`, but nobody reads it"):
        Stack(["hapo-token"], owners={"policy_loss": "reinforce"}, allow=["token_ratio"])


@pytest.mark.parametrize("hook", ["baseline", "advantage_scale", "clip_range", "process_logits"])
def test_another_owner_is_refused(hook):
    def impl(self):
        raise AssertionError

    impl.__name__ = hook
    other = type("Other", (Plugin,), {"name": "other", hook: hookimpl(impl)})
    with pytest.raises(StackError, match=rf"{hook} has one owner, but is claimed by hapo-token and other"):
        Stack(["hapo-token", other()])
    Stack([{"hapo-token": PARTS_OFF}])


@pytest.mark.parametrize(
    ("field", "value"),
    [("tau", -0.1), ("tau", 1.0), ("token_average", "perhaps"), ("adv_beta", 1.1), ("adv_beta", -0.1),
     ("clip_alpha", -1.0), ("clip_low", 1.5), ("clip_high", -0.1), ("pivot", 1.1), ("pivot", math.nan),
     ("stats", "batch"), ("released_sign", "perhaps"), ("dual_clip", 3.0)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"hapo-token\.{field}"):
        make(HapoToken, {field: value})


# what every plugin must do

test_conformance = conformance(
    "hapo-token",
    [{}, {"tau": 0.0, "adv_beta": 0.0}, {"stats": "micro"}, {"token_average": False, "released_sign": True}],
)
