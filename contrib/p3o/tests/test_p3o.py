"""Facts about P3O, through the stack."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl, needs
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.rollouts import POLICY
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_p3o import P3o, number_of_pairs, ordered_pairs, v1, v2

REWARD = [1.2, 0.3, -0.5, 0.8, 0.4, 0.4]
LOG_PROBS = [-10.0, -12.0, -8.0, -9.75, -7.0, -6.0]
OLD_LOG_PROBS = [-10.4, -11.9, -7.9, -9.7, -7.0, -6.0]
REF_LOG_PROBS = [-11.0, -11.5, -8.2, -9.0, -7.5, -6.1]
REGULARISED = [1.17, 0.32, -0.515, 0.835, 0.375, 0.395]
RATIO = [1.4918247, 0.904837418, 0.904837418, 0.951229425, 1.0, 1.0]
UNCLIPPED = [-0.382459995, 0.382459995, 0.387318589, -0.387318589, 0.00666666667, -0.00666666667]
PAIRS = [0, 0, 1, 1, 2, 2]
VERSIONS = ["V1", "V2"]
PARTNERS = ["micro_batch", "mini_batch"]
NO_KL = {"beta": 0.0}

both_versions = pytest.mark.parametrize("version", VERSIONS)
both_partners = pytest.mark.parametrize("partners", PARTNERS)


def example(tokens: int = 1):
    """The worked example with every sequence log-prob spread over so many tokens; and the current log-probs."""

    def spread(values: list[float]) -> Tensor:
        return (torch.tensor(values, dtype=torch.float64)[:, None] / tokens).expand(-1, tokens)

    rollouts = make_rollouts(REWARD, PAIRS, tokens=tokens)
    rollouts.old_log_probs, rollouts.ref_log_probs = spread(OLD_LOG_PROBS), spread(REF_LOG_PROBS)
    return rollouts, spread(LOG_PROBS).contiguous()


def random_batch(seed: int, groups: list[int] | None = None, spread: float = 0.3, tokens: int = 4, **fields):
    """Responses of unequal lengths (0 too) with reference; and current log-probs at some distance."""
    source = torch.Generator().manual_seed(seed)
    groups = [0, 0, 1, 1, 1, 2, 5, 5] if groups is None else groups

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (len(groups), 1), generator=source)
    old = -draw(len(groups), tokens).abs() * mask
    rewards = fields.pop("rewards", draw(len(groups)).float())
    rollouts = make_rollouts(rewards, groups, mask=mask, **fields)
    rollouts.old_log_probs, rollouts.ref_log_probs = old, old + 0.1 * draw(len(groups), tokens) * mask
    return rollouts, old + spread * draw(len(groups), tokens) * mask


def stack_of(options, *others, **lines) -> Stack:
    return start([{"p3o": options}, *others], **lines)


def update(options, rollouts, log_probs, cut=None, weights=None, **lines) -> tuple[Tensor, Tensor]:
    """Loss and its gradient by the sequence log-probs (B,), through these micro-batches."""
    stack = stack_of(options, **lines)
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    if weights is not None:
        columns["weights"] = torch.tensor(weights, dtype=torch.float64)[:, None]
    mini = stack.mini_batch(columns, kinds=rollouts.kinds, log_probs=log_probs)
    leaf = log_probs.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in cut or [range(len(log_probs))]:
        index = torch.tensor(list(rows))
        part = mini.loss(leaf[index], index).total
        part.backward()
        total = total + part.detach()
    return total, per_response(leaf.grad, rollouts.mask)


def per_response(gradient: Tensor, mask: Tensor) -> Tensor:
    """The gradient by the sequence log-prob (B,): the same at every token; NaN where there is no token."""
    first = gradient[:, :1] * mask[:, :1]
    assert torch.allclose(gradient, first * mask, atol=1e-12)
    return torch.where(mask[:, 0], gradient[:, 0], torch.nan)


def reference(options, rollouts, log_probs, weights=None) -> tuple[Tensor, Tensor]:
    """The same by loops over pairs and automatic differentiation of J itself."""
    made = P3o(**options)
    mask, groups = rollouts.mask, rollouts.groups.tolist()
    old = (rollouts.old_log_probs * mask).sum(1)
    r = rollouts.scores.flatten().double() - made.beta * (old - (rollouts.ref_log_probs * mask).sum(1))
    w = torch.ones(len(mask)).double() if weights is None else torch.tensor(weights, dtype=torch.float64)
    leaf = (log_probs * mask).sum(1).requires_grad_()
    rho = (leaf - old).exp()
    total, pairs = leaf.sum() * 0, 0.0
    for i in range(len(mask)):
        for j in range(i + 1, len(mask)):
            if groups[i] != groups[j] or groups[i] < 0 or not (r[i].isfinite() and r[j].isfinite()):
                continue
            pairs += float(w[i] * w[j])
            if made.version == "V1":
                for a, b in ((i, j), (j, i)):
                    c = ((r[a] - r[b]) * rho[b]).detach()
                    total = total - w[i] * w[j] * torch.minimum(
                        c * rho[a], c * rho[a].clamp(1 - made.eps, 1 + made.eps)
                    )
            else:
                c = ((r[i] - r[j]) * rho[i] * rho[j]).detach()
                x, before = leaf[i] - leaf[j], old[i] - old[j]
                clipped = torch.minimum(torch.maximum(x, before - made.delta), before + made.delta)
                total = total - w[i] * w[j] * torch.minimum(c * x, c * clipped)
    total = total / max(pairs, 1e-300)
    total.backward()
    return total.detach(), torch.where(mask[:, 0], leaf.grad, torch.nan)


def same(one, other, atol: float = 1e-6) -> bool:
    return all(
        torch.allclose(mine, theirs, atol=atol, rtol=1e-6, equal_nan=True)
        for mine, theirs in zip(one, other, strict=True)
    )


# the worked example


def test_worked_example_rewards():
    rollouts, _ = example()
    assert stack_of({}).credit(rollouts).rewards.flatten().tolist() == pytest.approx(REGULARISED)


@both_partners
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "options, loss, gradient",
    [
        ({"version": "V1"}, 0.0748152733, [0.0, *UNCLIPPED[1:]]),
        ({"version": "V2"}, 0.0209588725, [0.0, 0.0, *UNCLIPPED[2:]]),
        ({"version": "V1", "eps": math.inf}, None, UNCLIPPED),
        ({"version": "V2", "delta": math.inf}, None, UNCLIPPED),
    ],
)
def test_worked_example(options, loss, gradient, tokens, partners):
    rollouts, log_probs = example(tokens)
    found, slope = update(options | {"partners": partners}, rollouts, log_probs)
    if loss is not None:
        assert found.item() == pytest.approx(loss, abs=1e-6)
    assert slope.tolist() == pytest.approx(gradient, abs=3e-7)


@pytest.mark.parametrize(
    "objective_of, objective, gradient",
    [
        (v1, [-0.22444582, 0.0, 0.0], [0.0, *UNCLIPPED[1:]]),
        (v2, [1.95054598, -2.03342259, 0.02], [0.0, 0.0, *UNCLIPPED[2:]]),
    ],
)
def test_worked_example_to_its_last_digit(objective_of, objective, gradient):
    columns = (torch.tensor(v, dtype=torch.float64)[:, None] for v in (REGULARISED, LOG_PROBS, OLD_LOG_PROBS))
    first, second = ordered_pairs(torch.tensor(PAIRS))
    j, slope, _ = objective_of(*columns, first, second, 0.2)
    assert j.view(3, 2).sum(1).tolist() == pytest.approx(objective, abs=1e-8)
    assert (-slope / 3).flatten().tolist() == pytest.approx(gradient, abs=1e-9)


@both_versions
@pytest.mark.parametrize("partners", PARTNERS)
def test_worked_example_reports_what_it_did(version, partners):
    rollouts, log_probs = example()
    stack = stack_of({"version": version, "partners": partners})
    loss_and_gradient(stack, rollouts, log_probs)
    metrics = stack.metrics.as_dict()
    assert metrics["rlplugins/p3o/clipped"] == pytest.approx(1 / 6 if version == "V1" else 1 / 3)
    assert metrics["rlplugins/p3o/kl"] == pytest.approx(sum(OLD_LOG_PROBS) / 6 - sum(REF_LOG_PROBS) / 6)
    assert metrics["rlplugins/p3o/beta"] == 0.05


# against the objective itself


@both_versions
@both_partners
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.0, 0.1, 0.5, math.inf]))
def test_loss_and_gradient_are_those_of_the_objective(version, partners, seed, width):
    rollouts, log_probs = random_batch(seed)
    options = {"version": version, "eps": width, "delta": width}
    expected = reference(options, rollouts, log_probs)
    assert same(update(options | {"partners": partners}, rollouts, log_probs), expected, atol=1e-5)


@both_versions
@both_partners
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_pair_counts_as_often_as_the_product_of_its_weights(version, partners, seed):
    rollouts, log_probs = random_batch(seed, rewards=torch.arange(8).float())
    weights = [1.0, 2.0, 0.5, 0.0, 3.0, 1.0, 1.0, 1.0]
    options = {"version": version, "partners": partners}
    found = update(options, rollouts, log_probs, weights=weights)
    assert same(found, reference({"version": version}, rollouts, log_probs, weights), atol=1e-5)
    assert same(found, update(options, rollouts, log_probs, weights=[3 * w for w in weights]))


# identities


@both_versions
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_on_policy_it_is_leave_one_out_summed_over_the_two_responses(version, seed):
    groups = [0, 0, 1, 1]
    rollouts, log_probs = random_batch(seed, groups, spread=0.0)
    _, gradient = update({"version": version} | NO_KL, rollouts, log_probs)
    r = rollouts.scores.flatten().double()
    difference = torch.stack([r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]])
    assert same([gradient], [torch.where(rollouts.mask[:, 0], -difference / 2, torch.nan)])
    rloo = credit(["rloo"], rollouts).advantages.flatten().double()
    assert same([gradient], [torch.where(rollouts.mask[:, 0], -rloo / 2, torch.nan)])


@both_versions
@both_partners
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.floats(-20, 20))
def test_what_is_added_to_all_rewards_of_a_prompt_does_not_matter(version, partners, seed, shift):
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    options = {"version": version, "partners": partners}
    rollouts, log_probs = random_batch(seed, rewards=rewards)
    moved, _ = random_batch(seed, rewards=rewards + shift * (1 + rollouts.groups))
    assert same(update(options, moved, log_probs), update(options, rollouts, log_probs), atol=2e-3)


@both_versions
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), random=st.randoms(use_true_random=False))
def test_the_order_of_the_responses_does_not_matter(version, seed, random):
    rollouts, log_probs = random_batch(seed)
    order = list(range(8))
    random.shuffle(order)
    loss, gradient = update({"version": version}, rollouts, log_probs)
    other = update({"version": version}, rollouts.select(torch.tensor(order)), log_probs[order])
    assert same(other, (loss, gradient[order]))


@both_versions
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_equal_rewards_give_no_gradient(version, seed):
    rollouts, log_probs = random_batch(seed, rewards=[0.7] * 8)
    loss, gradient = update({"version": version} | NO_KL, rollouts, log_probs)
    assert loss == 0 and (gradient.nan_to_num() == 0).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_without_clipping_both_versions_have_the_same_gradient(seed):
    rollouts, log_probs = random_batch(seed)
    one = update({"version": "V1", "eps": math.inf}, rollouts, log_probs)
    two = update({"version": "V2", "delta": math.inf}, rollouts, log_probs)
    assert same([one[1]], [two[1]])


@pytest.mark.parametrize("version, moves", [("V1", [True, False]), ("V2", [False, False])])
def test_v1_clips_one_of_a_pair_and_v2_both(version, moves):
    old = torch.tensor([[-3.0], [-3.0]], dtype=torch.float64)
    rollouts = make_rollouts([0.0, 1.0], [0, 0], tokens=1, old_log_probs=old, ref_log_probs=old)
    now = old + torch.tensor([[-0.1], [0.5]])  # the better one left the range
    _, gradient = update({"version": version}, rollouts, now)
    assert (gradient != 0).tolist() == moves
    back = old + torch.tensor([[0.1], [-0.5]])  # in its bad direction: nothing is clipped
    assert (update({"version": version}, rollouts, back)[1] != 0).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_in_v2_the_gradients_of_a_pair_cancel(seed):
    rollouts, log_probs = random_batch(seed, [0, 0, 3, 3], tokens=2)
    rollouts.mask[:] = True
    _, gradient = update({}, rollouts, log_probs)
    assert gradient.view(2, 2).sum(1).abs().max() < 1e-7


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(-1, 3), max_size=9))
def test_pairs_are_those_of_equal_groups(groups):
    tensor = torch.tensor(groups, dtype=torch.int64)
    first, second = ordered_pairs(tensor)
    expected = {
        (i, j) for i, a in enumerate(groups) for j, b in enumerate(groups) if i != j and a == b and a >= 0
    }  # fmt: skip
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == sorted(expected)
    assert number_of_pairs(tensor, torch.ones(len(groups), 1)) == len(expected) / 2


# options


def test_a_wider_range_clips_less():
    rollouts, log_probs = example()
    assert update({"version": "V1", "eps": 0.6}, rollouts, log_probs)[1].tolist() == pytest.approx(UNCLIPPED, abs=3e-7)
    assert update({"version": "V2", "delta": 0.6}, rollouts, log_probs)[1].tolist() == pytest.approx(
        UNCLIPPED, abs=1e-7
    )


def test_beta_moves_the_rewards_towards_the_reference():
    rollouts, _ = example()
    plain = stack_of(NO_KL).credit(rollouts).rewards
    assert plain.flatten().tolist() == pytest.approx(REWARD)
    kl = torch.tensor(OLD_LOG_PROBS) - torch.tensor(REF_LOG_PROBS)
    found = stack_of({"beta": 0.5}).credit(rollouts).rewards
    torch.testing.assert_close(found, plain - 0.5 * kl[:, None])


@pytest.mark.parametrize(
    "options, field",
    [({"version": "V3"}, "version"), ({"beta": -0.1}, "beta"), ({"beta": math.inf}, "beta"), ({"eps": -1}, "eps"),
     ({"delta": math.nan}, "delta"), ({"partners": "step"}, "partners"), ({"kl_target": 0}, "kl_target"),
     ({"kl_horizon": 0}, "kl_horizon"), ({"beta": 0, "kl_target": 1}, "kl_target"), ({"clip": 1}, "clip")],
)  # fmt: skip
def test_options_out_of_range_name_plugin_and_field(options, field):
    with pytest.raises(ConfigurationError, match=rf"p3o: .*{field}|p3o\.{field}"):
        Stack([{"p3o": options}])


# beta and its controller


def test_beta_stays_without_a_target_and_follows_the_kl_with_one():
    rollouts, _ = example()
    kl = float(sum(OLD_LOG_PROBS) - sum(REF_LOG_PROBS)) / 6
    for options, factor in (
        ({}, 1.0),
        ({"kl_target": kl / 1.1, "kl_horizon": 60}, 1.01),
        ({"kl_target": kl / 9, "kl_horizon": 60}, 1.02),
        ({"kl_target": 10 * kl, "kl_horizon": 60}, 0.98),
    ):
        stack = stack_of(options)
        stack.end_step(rollouts, stack.credit(rollouts))
        assert stack.plugins[0].state.beta == pytest.approx(0.05 * factor)
        stack.begin_step(1, 10)
        expected = torch.tensor(REWARD) - 0.05 * factor * (torch.tensor(OLD_LOG_PROBS) - torch.tensor(REF_LOG_PROBS))
        torch.testing.assert_close(stack.credit(rollouts).rewards.flatten(), expected)


def test_beta_survives_saving_and_loading(tmp_path):
    options = {"kl_target": 0.01, "kl_horizon": 60}
    rollouts, _ = example()
    stack = stack_of(options)
    stack.end_step(rollouts, stack.credit(rollouts))
    stack.save(tmp_path / "state", 1)
    again = stack_of(options)
    assert again.load(tmp_path / "state") == 1
    assert again.plugins[0].state.beta == stack.plugins[0].state.beta != 0.05


def test_a_step_without_credit_leaves_beta():
    stack = stack_of({"kl_target": 1.0})
    stack.end_step(example()[0], None)
    assert stack.plugins[0].state.beta == 0.05


# micro-batches and ranks


@both_versions
@both_partners
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_micro_batches_of_whole_groups_do_not_change_the_loss(version, partners, seed):
    rollouts, log_probs = random_batch(seed)
    options = {"version": version, "partners": partners}
    whole = update(options, rollouts, log_probs)
    for cut in (
        [range(5), range(5, 8)],
        [range(2), range(2, 5), range(5, 6), range(6, 8)],
        [[6, 7, 0, 1], range(2, 6)],
    ):
        assert same(update(options, rollouts, log_probs, cut), whole, atol=1e-9)


@both_versions
def test_a_group_in_two_micro_batches_is_refused_or_served_by_the_mini_batch(version):
    rollouts, log_probs = random_batch(3)
    cut = [[0], [3, 1, 7], [2, 4, 5, 6]]
    with pytest.raises(HookError, match="different micro-batches"):
        update({"version": version}, rollouts, log_probs, cut)
    options = {"version": version, "partners": "mini_batch"}
    assert same(update(options, rollouts, log_probs, cut), update(options, rollouts, log_probs), atol=1e-9)


def on_ranks(options, rollouts, log_probs, shares):
    """Every share of the rows in a thread of its own, sums really added: loss, and gradient by the log-probs."""
    barrier = threading.Barrier(len(shares), timeout=30)
    slots = [torch.zeros(())] * len(shares)
    calls = [0] * len(shares)
    stack = stack_of(options)
    columns = stack.update_columns(rollouts, stack.credit(rollouts))

    def run(rank: int):
        def reduce(values: Tensor) -> Tensor:
            calls[rank] += 1
            slots[rank] = values
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        rows = torch.tensor(shares[rank], dtype=torch.int64)
        mine = {name: column[rows] for name, column in columns.items()}
        mini = stack.mini_batch(mine, reduce=reduce, log_probs=log_probs[rows])
        leaf = log_probs[rows].clone().requires_grad_()
        part = mini.loss(leaf).total
        part.backward()
        return part.detach(), leaf.grad

    with ThreadPoolExecutor(len(shares)) as pool:
        parts = list(pool.map(run, range(len(shares))))
    assert len(set(calls)) == 1
    gradient = torch.zeros_like(log_probs)
    for rows, (_, grad) in zip(shares, parts, strict=True):
        gradient[rows] = grad
    return sum(part for part, _ in parts), per_response(gradient, rollouts.mask)


@both_versions
@both_partners
@pytest.mark.parametrize("shares", [[[0, 1, 2, 3, 4], [5, 6, 7]], [list(range(8)), []]])
def test_ranks_with_whole_groups_do_not_change_the_loss(version, partners, shares):
    options = {"version": version, "partners": partners}
    rollouts, log_probs = random_batch(11)
    assert same(on_ranks(options, rollouts, log_probs, shares), update(options, rollouts, log_probs), atol=1e-9)


@both_versions
def test_in_the_mini_batch_partners_may_be_on_other_ranks(version):
    options = {"version": version, "partners": "mini_batch"}
    rollouts, log_probs = random_batch(12)
    shares = [[0, 3, 7], [1, 2, 4, 5, 6]]
    assert same(on_ranks(options, rollouts, log_probs, shares), update(options, rollouts, log_probs), atol=1e-9)


@both_versions
@both_partners
def test_only_partners_of_the_same_mini_batch_count(version, partners):
    rollouts, log_probs = random_batch(13)
    stack = stack_of({"version": version, "partners": partners})
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    rows = torch.tensor([7, 2, 6, 3])
    leaf = log_probs[rows].clone().requires_grad_()
    mini = stack.mini_batch({name: column[rows] for name, column in columns.items()}, log_probs=log_probs[rows])
    loss = mini.loss(leaf).total
    loss.backward()
    expected = reference({"version": version}, rollouts.select(rows), log_probs[rows])
    assert same((loss.detach(), per_response(leaf.grad, rollouts.mask[rows])), expected)


# edge cases


@both_versions
@both_partners
def test_a_group_of_one_has_no_pair_and_does_not_count(version, partners):
    options = {"version": version, "partners": partners}
    rollouts, log_probs = random_batch(5, [0, 0, 1])
    loss, gradient = update(options, rollouts, log_probs)
    less, shorter = update(options, rollouts.select(torch.tensor([0, 1])), log_probs[:2])
    assert same((loss, gradient[:2]), (less, shorter)) and gradient[2].nan_to_num() == 0


@both_versions
@both_partners
def test_a_response_without_a_reward_has_no_pair(version, partners):
    options = {"version": version, "partners": partners}
    rewards = torch.tensor([1.0, 0.0, 3.0, math.nan, 2.0])
    rollouts, log_probs = random_batch(6, [0, 0, 1, 1, 1], rewards=rewards)
    kept = torch.tensor([0, 1, 2, 4])
    loss, gradient = update(options, rollouts, log_probs)
    expected = update(options, rollouts.select(kept), log_probs[kept])
    assert same((loss, gradient[kept]), expected) and gradient[3].nan_to_num() == 0


@both_versions
@both_partners
@pytest.mark.parametrize("groups, rewards", [([0, 1, 2], [1.0, 0.0, 1.0]), ([0, 0, -1], [1.0, math.nan, 0.0])])
def test_without_any_pair_the_loss_is_0(version, partners, groups, rewards):
    rollouts, log_probs = random_batch(7, groups, rewards=rewards)
    loss, gradient = update({"version": version, "partners": partners}, rollouts, log_probs)
    assert loss == 0 and (gradient.nan_to_num() == 0).all()


@both_versions
@both_partners
def test_nothing_to_train_on(version, partners):
    rollouts, log_probs = random_batch(8)
    loss, gradient = update({"version": version, "partners": partners}, rollouts, log_probs, weights=[0.0] * 8)
    assert loss == 0 and (gradient.nan_to_num() == 0).all()


@both_versions
@both_partners
def test_an_empty_response_is_a_partner_with_ratio_one(version, partners):
    old = torch.tensor([[-2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    rollouts = make_rollouts([1.0, 0.0], [0, 0], lengths=[2, 0], old_log_probs=old, ref_log_probs=old)
    now = old + 0.05 * rollouts.mask
    _, gradient = update({"version": version, "partners": partners}, rollouts, now)
    assert gradient[0] == pytest.approx(-math.exp(0.1))


@both_versions
def test_a_single_prompt(version):
    rollouts, log_probs = random_batch(9, [4] * 5)
    options = {"version": version}
    assert same(update(options, rollouts, log_probs), reference(options, rollouts, log_probs), atol=1e-5)


@both_versions
def test_the_ratio_is_capped_and_the_difference_is_not(version):
    old = torch.tensor([[-50.0], [-50.0]])
    rollouts = make_rollouts([0.0, 1.0], [0, 0], tokens=1, old_log_probs=old, ref_log_probs=old)
    loss, gradient = update({"version": version} | NO_KL, rollouts, (old + torch.tensor([[0.0], [-40.0]])).double())
    assert gradient[1] == pytest.approx(-math.exp(-20)), "rho of 20 below, not of 40"
    expected = -math.exp(-20) * -40 if version == "V2" else 0.0
    assert loss.item() == pytest.approx(expected, abs=1e-8)


def test_tool_output_does_not_count():
    rollouts, log_probs = random_batch(10, [0, 0])
    rollouts.mask[:] = True
    rollouts.mask[:, 1] = False
    found = update({}, rollouts, log_probs)
    columns = torch.tensor([0, 2, 3])
    short = make_rollouts(rollouts.scores.flatten(), [0, 0], tokens=3)
    short.old_log_probs, short.ref_log_probs = rollouts.old_log_probs[:, columns], rollouts.ref_log_probs[:, columns]
    assert same(found, update({}, short, log_probs[:, columns]))


@both_versions
@both_partners
def test_rows_that_the_policy_did_not_draw_form_no_pair(version, partners):
    rollouts, log_probs = random_batch(
        14, [0, 0, 0], kinds=(POLICY, "expert"), kind=torch.tensor([0, 0, 1]).to(torch.int8)
    )
    options = {"version": version, "partners": partners}
    loss, gradient = update(options, rollouts, log_probs)
    expected = update(options, rollouts.select(torch.tensor([0, 1])), log_probs[:2])
    assert same((loss, gradient[:2]), expected) and gradient[2].nan_to_num() == 0


@both_partners
def test_the_same_step_twice_gives_the_same_and_changes_no_input(partners):
    rollouts, log_probs = random_batch(15)
    before = [rollouts.scores.clone(), rollouts.old_log_probs.clone(), log_probs.clone()]
    options = {"partners": partners}
    one, two = update(options, rollouts, log_probs), update(options, rollouts, log_probs)
    assert same(one, two, atol=0)
    assert all(
        torch.equal(*pair) for pair in zip([rollouts.scores, rollouts.old_log_probs, log_probs], before, strict=True)
    )


# claims, needs and facts


class Claiming(Plugin):
    """Owns the baseline."""

    name = "claiming"

    @hookimpl
    def baseline(self, rewards: Tensor) -> Tensor:
        return torch.zeros_like(rewards)


class Weighing(Plugin):
    """Weighs tokens."""

    name = "weighing"

    @hookimpl
    def select_tokens(self, mask: Tensor) -> Tensor:
        return mask.float()


@pytest.mark.parametrize("other", [Claiming(), "bapo", "rloo"])
def test_refused_beside_what_it_does_not_read(other):
    with pytest.raises(StackError, match="nobody reads it"):
        Stack(["p3o", other], allow=["token_ratio"])


def test_refused_beside_another_loss_or_kl_penalty():
    with pytest.raises(StackError, match="policy_loss has one owner"):
        Stack(["p3o", "gtpo"])

    class Kl(Plugin):
        name = "kl"

        @hookimpl
        def kl_penalty(self, log_probs: Tensor) -> Tensor:
            return log_probs

    with pytest.raises(StackError, match="kl_penalty has one owner"):
        Stack(["p3o", Kl()])


def test_weights_and_corrections_per_token_are_refused():
    rollouts, log_probs = random_batch(16)
    with pytest.raises(StackError, match=r"weighs tokens, but p3o\.policy_loss gives one loss per response"):
        stack_of({}, Weighing())
    stack = stack_of({})
    columns = stack.update_columns(rollouts, stack.credit(rollouts)) | {"correction": torch.ones_like(log_probs)}
    with pytest.raises(HookError, match="corrects stale rollouts token by token"):
        stack.mini_batch(columns).loss(log_probs)


def test_whatever_reduction_is_configured_the_loss_is_the_mean_over_pairs():
    rollouts, log_probs = example()
    for reduction in ("token_mean", "sequence_mean", "sequence_sum"):
        loss, _ = update({}, rollouts, log_probs, owners={"reduce_loss": reduction})
        assert loss.item() == pytest.approx(0.0209588725, abs=1e-6)


def trainer(**options) -> Trainer:
    return Trainer(**({"name": "plain", "columns": frozenset({"ref_log_probs"})} | options))


def test_refused_where_partners_are_not_to_be_had():
    with pytest.raises(StackError, match=r"rows kept in one micro-batch \(by group\)"):
        Stack(["p3o"], trainer=trainer(provides=frozenset({"mini_batch_log_probs"})))
    Stack([{"p3o": {"partners": "mini_batch"}}], trainer=trainer(provides=frozenset({"mini_batch_log_probs"})))
    with pytest.raises(StackError, match="log-probs of a whole mini-batch"):
        Stack([{"p3o": {"partners": "mini_batch"}}], trainer=trainer(provides=frozenset({"together:group"})))
    Stack(["p3o"], trainer=trainer(provides=frozenset({"together:group"})))


def test_refused_without_a_reference_unless_beta_is_0():
    able = {"provides": frozenset({"together:group"}), "columns": frozenset()}
    with pytest.raises(StackError, match="ref_log_probs"):
        Stack(["p3o"], trainer=trainer(**able))
    Stack([{"p3o": NO_KL}], trainer=trainer(**able))


def test_refused_with_one_response_per_prompt():
    class Single(Plugin):
        name = "single"
        needs = (needs.group_size(exactly=1),)

        @hookimpl
        def prepare_step(self) -> None: ...

    with pytest.raises(StackError, match="p3o needs 2 or more"):
        Stack(["p3o", Single()])


def test_refused_with_rewards_per_segment():
    with pytest.raises(StackError, match=r"response_rewards.*p3o assumes it, other breaks it"):
        Stack(["p3o", stand_in(breaks=["response_rewards"])])


def test_refused_where_the_loss_must_compare_token_by_token():
    with pytest.raises(StackError, match=r"token_ratio.*other assumes it, p3o breaks it"):
        Stack(["p3o", stand_in(assumes=["token_ratio"])])


# what every plugin must do

V1_OF_ALL = {"version": "V1", "partners": "mini_batch", "beta": 0.0}
test_conformance = conformance("p3o", [{}, {"version": "V1"}, {"partners": "mini_batch", "kl_target": 0.1}, V1_OF_ALL])
