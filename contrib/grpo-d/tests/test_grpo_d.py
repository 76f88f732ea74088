"""Facts about GRPO-D, through the stack."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins.defaults import K3
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack
from rlplugins.testing import conformance, loss_and_gradient, make_rollouts, start
from rlplugins.trainer import Trainer
from rlplugins_grpo_d import GrpoD, beta

LOG_PROBS = [[-1.0, -0.5, -2.0], [-0.3, -0.9, -0.1]]
REF_LOG_PROBS = [[-1.1, -0.4, -2.0], [-0.2, -1.4, -0.1]]
MASK = [[1, 1, 1], [1, 1, 0]]
STEPS = [0, 10, 20, 30, 31, 50, 65, 100, 120]
SEQUENCE_MEAN = {"owners": {"reduce_loss": "sequence_mean"}}


def example(rewards=(0.0, 0.0), mask=MASK):
    """The worked example's rollouts and current log-probs; equal rewards leave only the penalty."""
    mask = torch.tensor(mask, dtype=torch.bool)
    old = torch.tensor(LOG_PROBS) * mask
    rollouts = make_rollouts(rewards, mask=mask, old_log_probs=old, ref_log_probs=torch.tensor(REF_LOG_PROBS) * mask)
    return rollouts, old


def at(number, options=None, total=100, plugins=("grpo",), **lines):
    """A stack in step `number` of `total`."""
    stack = start([*plugins, {"grpo-d": options or {}}], total_steps=total, **lines)
    stack.begin_step(number, total)
    return stack


def shared_beta(stack):
    stack.credit(example()[0])
    return stack.step.of("grpo-d").shared["beta"]


def random_batch(seed, rows=6, tokens=5):
    source = torch.Generator().manual_seed(seed)
    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (rows, 1), generator=source)
    current, old, ref = -torch.rand((3, rows, tokens), generator=source, dtype=torch.float64) * mask
    rewards = torch.rand(rows, generator=source)
    return make_rollouts(rewards, [0, 0, 0, 1, 1, 1], mask=mask, old_log_probs=old, ref_log_probs=ref), current


# the worked example


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [0.07, 0.06, 0.05, 0.04, 0.04085714, 0.05714286, 0.07, 0.1, 0.1]),
     ({"beta_min": 0, "beta_max": 0.02},
      [0.01, 0.006666667, 0.003333333, 0.0, 0.0002857143, 0.005714286, 0.01, 0.02, 0.02])],
)  # fmt: skip
def test_the_worked_schedule(options, expected):
    stack = at(0, options)
    found = []
    for number in STEPS:
        stack.begin_step(number, 100)
        found.append(shared_beta(stack))
    assert found == pytest.approx(expected, abs=5e-9)


def test_the_worked_penalty():
    rollouts, log_probs = example()
    loss, _ = loss_and_gradient(at(50, **SEQUENCE_MEAN), rollouts, log_probs)
    assert float(loss) == pytest.approx(0.001691054, abs=1e-9)


def test_the_worked_penalty_per_token():
    rollouts, log_probs = example()
    kl = torch.tensor([[0.004837418, 0.005170918, 0.0], [0.005170918, 0.1065307, 0.0]])
    for row, token in rollouts.mask.nonzero().tolist():
        alone = torch.zeros(2, 3)
        alone[row, token] = 1
        stack = at(50)
        columns = stack.update_columns(rollouts, stack.credit(rollouts)) | {"mask": alone.bool()}
        assert float(stack.mini_batch(columns).loss(log_probs).kl) == pytest.approx(
            0.05714286 * float(kl[row, token]), abs=1e-8
        )


# identities

seeds = st.integers(0, 2**31)
coefficients = st.floats(0, 1)
fractions = st.floats(0, 1)


@settings(max_examples=25, deadline=None)
@given(
    coefficients, coefficients, fractions, st.integers(1, 500), st.integers(0, 700), st.sampled_from(["paper", "ramp"])
)
def test_beta_stays_in_its_range(a, b, fraction, total, step, shape):
    low, high = sorted((a, b))
    assert low - 1e-12 <= beta(step, total, low, high, fraction, shape) <= high + 1e-12


@settings(max_examples=25, deadline=None)
@given(coefficients, coefficients, st.integers(1, 49), st.integers(1, 10))
def test_beta_starts_in_the_middle_touches_its_minimum_and_ends_at_its_maximum(a, b, percent, times):
    low, high = sorted((a, b))
    total = 100 * times
    ends = [beta(s, total, low, high, percent / 100) for s in (0, percent * times, total, 2 * total)]
    assert ends == pytest.approx([(low + high) / 2, low, high, high], abs=1e-9)
    around = [beta(percent * times + s, total, low, high, percent / 100) for s in (-1, 0, 1)]
    assert around[1] <= min(around) + 1e-9  # from both sides, without a jump


@settings(max_examples=25, deadline=None)
@given(coefficients, coefficients, fractions, st.integers(1, 99))
def test_beta_falls_and_then_rises(a, b, fraction, total):
    low, high = sorted((a, b))
    curve = [beta(s, total, low, high, fraction) for s in range(total + 1)]
    changes = [after - before for before, after in itertools.pairwise(curve)]
    turn = int(fraction * total)
    assert all(change <= 1e-12 for change in changes[:turn])
    assert all(change >= -1e-12 for change in changes[turn + 1 :])


def test_the_ends_of_the_explored_share():
    assert [beta(s, 10, 0.1, 0.3, 0.0) for s in (0, 5, 10, 11)] == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert [beta(s, 10, 0.1, 0.3, 1.0) for s in (0, 5, 10, 11)] == pytest.approx([0.2, 0.15, 0.1, 0.1])
    assert [beta(s, 1, 0.1, 0.3) for s in (0, 1)] == pytest.approx([0.2, 0.3])


def test_a_ramp_explores_at_the_minimum():
    assert [beta(s, 10, 0.1, 0.3, 0.5, "ramp") for s in (0, 3, 5, 10)] == pytest.approx([0.1, 0.1, 0.1, 0.3])
    assert shared_beta(at(0, {"shape": "ramp"})) == pytest.approx(0.04)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.02]), st.integers(0, 12))
def test_a_range_of_one_value_is_a_constant_coefficient(seed, value, number):
    rollouts, log_probs = random_batch(seed)
    stack = at(number, {"beta_min": value, "beta_max": value}, total=10)
    constant = {"kl_penalty": {"k3": {"coefficient": value}}}
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    base, base_gradient = loss_and_gradient(start(["grpo"], owners=constant), rollouts, log_probs)
    torch.testing.assert_close(loss, base, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, base_gradient, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_at_the_reference_only_the_policy_loss_is_left(seed):
    rollouts, _ = random_batch(seed)
    at_reference = rollouts.ref_log_probs
    loss, gradient = loss_and_gradient(at(5), rollouts, at_reference)
    base, base_gradient = loss_and_gradient(start(["grpo"]), rollouts, at_reference)
    torch.testing.assert_close(loss, base, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, base_gradient, rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from(["token_mean", "sequence_mean"]))
def test_the_cut_into_micro_batches_changes_nothing(seed, reduction):
    rollouts, log_probs = random_batch(seed)
    lines = {"owners": {"reduce_loss": reduction}}
    whole, gradient = loss_and_gradient(at(7, **lines), rollouts, log_probs)
    for cuts in (2, 6):
        loss, cut_gradient = loss_and_gradient(at(7, **lines), rollouts, log_probs, micro_batches=cuts)
        torch.testing.assert_close(loss, whole, rtol=0, atol=1e-12)
        torch.testing.assert_close(cut_gradient, gradient, rtol=0, atol=1e-12)


def test_ranks_add_up_to_one():
    rollouts, log_probs = random_batch(3)
    stack = at(7)
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    whole = stack.mini_batch(columns)
    weights = torch.stack([whole.token_weight, whole.sample_weight, whole.value_weight])
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        mine = {name: column[rows] for name, column in columns.items()}
        parts.append(stack.mini_batch(mine, reduce=lambda _: weights).loss(log_probs[rows]).kl)
    assert float(sum(parts)) == pytest.approx(float(whole.loss(log_probs).kl), abs=1e-12)
    assert float(sum(parts)) > 0


# edges


def test_an_empty_response_counts_with_0():
    rollouts, log_probs = example(mask=[[1, 1, 1], [0, 0, 0]])
    loss, gradient = loss_and_gradient(at(50, **SEQUENCE_MEAN), rollouts, log_probs)
    kl = torch.tensor([0.004837418, 0.005170918, 0.0]).mean()
    assert float(loss) == pytest.approx(0.05714286 * float(kl) / 2, abs=1e-9)
    assert not gradient[1].any()


def test_a_row_without_a_finite_reward_is_not_penalised():
    rollouts, log_probs = example((0.0, float("nan")))
    _, gradient = loss_and_gradient(at(50), rollouts, log_probs)
    assert gradient[0].any() and not gradient[1].any()


def test_a_policy_far_from_the_reference_has_a_finite_penalty():
    rollouts, _ = example()
    loss, gradient = loss_and_gradient(at(50), rollouts, torch.full((2, 3), -1000.0))
    assert loss.isfinite() and gradient.isfinite().all()


# state


def test_a_resumed_run_keeps_its_curve(tmp_path):
    stack = at(0, total=100)
    stack.save(tmp_path / "state", step=50)
    longer = at(50, total=1000)
    assert shared_beta(longer) != pytest.approx(beta(50, 100))
    longer.load(tmp_path / "state")
    assert shared_beta(longer) == pytest.approx(beta(50, 100))


def test_the_configured_length_wins(tmp_path):
    stack = at(0, {"total_steps": 60}, total=100)
    stack.save(tmp_path / "state", step=50)
    resumed = at(50, {"total_steps": 60}, total=1000)
    resumed.load(tmp_path / "state")
    assert shared_beta(resumed) == pytest.approx(beta(50, 60))


# what it says about itself


@pytest.mark.parametrize(
    ("field", "value"),
    [("beta_min", -0.1), ("beta_max", float("inf")), ("beta_max", float("nan")), ("explore_fraction", 1.1),
     ("explore_fraction", -0.1), ("explore_fraction", float("nan")), ("shape", "cosine"), ("total_steps", 0)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"grpo-d\.{field}"):
        make(GrpoD, {field: value})


def test_a_range_upside_down_is_refused():
    with pytest.raises(ConfigurationError, match=r"beta_min 0\.2 is above beta_max 0\.1"):
        make(GrpoD, {"beta_min": 0.2})


def test_another_owner_of_the_penalty_is_refused():
    with pytest.raises(StackError, match="kl_penalty"):
        Stack(["grpo-d", K3()])


def test_a_trainer_without_a_reference_is_refused():
    with pytest.raises(StackError, match="ref_log_probs"):
        Stack(["grpo-d"], trainer=Trainer(name="bare", columns=frozenset()))


def test_a_beta_of_0_keeps_the_reference():
    assert Stack([{"grpo-d": {"beta_min": 0, "beta_max": 0.02}}]).takes("ref_log_probs", "update")


# what every plugin must do

test_conformance = conformance("grpo-d", [{}, {"shape": "ramp", "beta_min": 0, "total_steps": 3}])
