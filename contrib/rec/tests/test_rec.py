"""Facts about REC, through the stack."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl, needs
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.testing import conformance, credit, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_rec import kept_tokens, place_in_group, red_drop

REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
SEED_OF_THE_EXAMPLE = 3  # whose first step drops rows 1 and 3
LOG_PROBS = [[-0.5, -1.2, -0.1, -2.0], [-0.9, -0.3, -2.2, 0.0]]
OLD_LOG_PROBS = [[-0.8, -1.1, -0.4, -0.8], [-0.5, -0.9, -1.0, 0.0]]
RATIO = [[1.34985881, 0.904837418, 1.34985881, 0.301194212], [0.670320046, 1.8221188, 0.301194212, 0.0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]
ADVANTAGES = [[0.75], [-0.25]]
CLIP_MODES = ["one-side", "two-side", "ring"]
GSPO = {"ratio": "sequence", "clip_mode": "one-side", "weight": "importance_sampling"}
IS = {"weight": "importance_sampling"}


def example() -> dict[str, Tensor]:
    """The worked example's columns, and the current log-probs as `log_probs`; float64."""
    tensors = {"log_probs": LOG_PROBS, "old_log_probs": OLD_LOG_PROBS, "mask": MASK, "advantages": ADVANTAGES}
    columns = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    return columns | {"mask": columns["mask"].bool()}


def random_columns(seed: int, rows: int = 6, tokens: int = 5, spread: float = 0.5) -> dict[str, Tensor]:
    """Off-policy log-probs, advantages of both signs and 0, unequal lengths (0 too), weights of which some are 0."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (rows, 1), generator=source)
    old = -draw(rows, tokens).abs() * mask
    advantages = draw(rows, 1)
    advantages[0] = 0
    return {
        "log_probs": old + spread * draw(rows, tokens) * mask,
        "old_log_probs": old,
        "mask": mask,
        "advantages": advantages,
        "weights": torch.randint(0, 3, (rows, 1), generator=source).double(),
    }


def update(stack, columns, micro_batches: int = 1) -> tuple[Tensor, Tensor]:
    """Loss of the mini-batch of these columns and its gradient by the log-probs; a stack, or options of rec."""
    stack = stack if isinstance(stack, Stack) else start([{"rec": stack}])
    columns = dict(columns)
    current = columns.pop("log_probs")
    mini = stack.mini_batch(columns, log_probs=current)
    leaf = current.clone().requires_grad_()
    total = torch.zeros((), dtype=current.dtype)
    for rows in torch.arange(len(current)).chunk(micro_batches):
        part = mini.loss(leaf[rows], rows).total
        part.backward()
        total = total + part.detach()
    return total, leaf.grad


def same(one, other, atol: float = 1e-10) -> bool:
    return all(torch.allclose(mine, theirs, atol=atol, rtol=1e-9) for mine, theirs in zip(one, other, strict=True))


def advantages(rewards=REWARDS, groups=GROUPS, seed: int = 0, **options) -> list[float]:
    return credit([{"rec": options}], make_rollouts(rewards, groups), seed=seed).advantages.flatten().tolist()


# the worked example


def test_worked_example_advantages():
    assert advantages() == pytest.approx([0.75, -0.25, -0.25, -0.25, 0.25, 0.25, -0.75, 0.25])
    low, high = -0.577348936, 0.577348936
    assert advantages(std_normalize=True) == pytest.approx(
        [1.73204681, low, low, low, high, high, -1.73204681, high], abs=1e-6
    )


def test_worked_example_red_drop():
    found = advantages(drop="balance", seed=SEED_OF_THE_EXAMPLE)
    assert found == pytest.approx([0.5, 0.0, -0.5, 0.0, 0.25, 0.25, -0.75, 0.25])
    rewards, groups = torch.tensor(REWARDS)[:, None], torch.tensor(GROUPS)
    draws = torch.tensor([0.0, 0.1, 0.9, 0.2, 0.0, 0.0, 0.0, 0.0])
    assert red_drop(rewards, groups, draws).flatten().nonzero().flatten().tolist() == [1, 3]


@pytest.mark.parametrize(
    "options, loss, gradient",
    [
        ({"clip_mode": "one-side", **IS}, 0.161355155,
         [[0, -0.0969468661, 0, -0.0322708084], [0, 0.0650756713, 0, 0]]),
        ({"clip_mode": "one-side"}, 0.332142857, [[0, -0.107142857, 0, -0.107142857], [0, 0.0357142857, 0, 0]]),
        ({"clip_mode": "two-side", **IS}, 0.116336239, [[0, -0.0969468661, 0, 0], [0, 0, 0, 0]]),
        ({"clip_mode": "ring"}, 0.342857142, [[0, -0.107142857, 0, -0.107142857], [0, 0, 0, 0]]),
        ({}, 0.285714285, [[-0.107142857] * 4, [0.0357142857] * 3 + [0]]),
        ({"weight": "advantage"}, 0.767352768, [[-0.22682143] * 4, [0.0278143136] * 3 + [0]]),
        ({"regularizer": "forward-kl", "coef": 0.1}, 0.388571428, [[-0.121428571] * 4, [0.0214285714] * 3 + [0]]),
        ({"regularizer": "k2", "coef": 0.1}, 0.337,
         [[-0.0985714284, -0.11, -0.0985714284, -0.141428571], [0.0242857143, 0.0528571428, 0.00142857143, 0]]),
        ({"weight": "opmd"}, 0.142857143, [[-0.0535714285] * 4, [0.0178571429] * 3 + [0]]),
        (GSPO | {"eps_low": 0.4}, 0.197547961, [[-0.0786990957] * 4, [0.0298554713] * 3 + [0]]),
        (GSPO, 0.299056564, [[-0.0786990957] * 4, [0] * 4]),
    ],
)  # fmt: skip
def test_worked_example_losses(options, loss, gradient):
    found, slope = update(options, example())
    assert found.item() == pytest.approx(loss, abs=2e-9)
    assert slope.tolist() == [pytest.approx(row, abs=2e-9) for row in gradient]


@pytest.mark.parametrize("mode, kept", [("one-side", 3), ("two-side", 1), ("ring", 2)])
def test_worked_example_reports_the_share_of_kept_tokens(mode, kept):
    stack = start([{"rec": {"clip_mode": mode}}])
    update(stack, example())
    assert stack.metrics.as_dict()["rlplugins/rec/kept"] == pytest.approx(kept / 7)


def test_worked_example_sequence_ratio():
    stack = start([{"rec": GSPO}])
    columns = example()
    found = stack.plugins[0].rho(columns["log_probs"], columns["old_log_probs"], columns["mask"])
    assert found.flatten().tolist() == pytest.approx([0.839457021, 0.716531311], abs=1e-9)


# members of the family


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_without_clip_and_weight_it_is_reinforce_with_the_mean_of_the_group(seed):
    plain = start(["dr_grpo"], owners={"policy_loss": "reinforce"})
    columns = random_columns(seed)
    assert same(update({}, columns), update(plain, columns))
    rewards = columns["advantages"].flatten().tolist()
    expected = credit(["dr_grpo"], make_rollouts(rewards, [0, 0, 0, 1, 1, 1])).advantages.flatten().tolist()
    assert advantages(rewards, [0, 0, 0, 1, 1, 1]) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_one_side_with_importance_weights_has_the_gradient_of_grpo_and_another_value(seed):
    columns = random_columns(seed)
    clip = {"clip_range": {"fixed": {"low": 0.2, "high": 0.2}}}
    grpo = update(start(["dr_grpo"], owners=clip), columns)
    loss, gradient = update({"clip_mode": "one-side", **IS}, columns)
    assert same([gradient], [grpo[1]])
    if bool((gradient != 0).any()):
        assert not torch.allclose(loss, grpo[0])


def test_normalised_advantages_are_those_of_grpo_with_the_population_standard_deviation():
    rewards = [0.1, 0.5, 0.4, 0.7, 0.2]
    plain = start([], owners={"advantage_scale": {"group_std": {"ddof": 0}}}).credit(make_rollouts(rewards, [0] * 5))
    assert advantages(rewards, [0] * 5, std_normalize=True) == pytest.approx(plain.advantages.flatten().tolist())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_on_policy_every_clip_rule_keeps_all_and_the_importance_weight_is_one(seed):
    columns = random_columns(seed, spread=0.0)
    plain = update({}, columns)
    for mode in CLIP_MODES:
        assert same(update({"clip_mode": mode}, columns), plain)
        assert same(update({"clip_mode": mode, **IS}, columns), plain)
    assert same(update(IS, columns), plain)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 1))
def test_forward_kl_has_the_gradient_of_a_shifted_baseline(seed, coef):
    columns = random_columns(seed)
    shifted = columns | {"advantages": columns["advantages"] + coef}
    assert same(update({"regularizer": "forward-kl", "coef": coef}, columns), update({}, shifted))


def test_asymre_shifts_every_advantage_up_and_divides_what_it_shifted():
    assert advantages(shift=-0.1) == pytest.approx([a + 0.1 for a in advantages()])
    std = math.sqrt(3) / 4 + 1e-6
    assert advantages(shift=-0.1, std_normalize=True) == pytest.approx([(a + 0.1) / std for a in advantages()])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_red_weight_at_infinite_temperature_is_plain(seed):
    columns = random_columns(seed)
    assert same(update({"weight": "advantage", "temp": math.inf}, columns), update({}, columns))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_red_weight_multiplies_by_the_exponential_of_the_advantage(seed, temp):
    columns = random_columns(seed)
    a = columns["advantages"]
    weighted = columns | {"advantages": a * (a / temp).exp()}
    assert same(update({"weight": "advantage", "temp": temp}, columns), update({}, weighted))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(0.1, 5))
def test_opmd_divides_the_loss_and_its_baseline_is_a_soft_maximum(rewards, tau):
    columns = random_columns(1)
    divided = columns | {"advantages": columns["advantages"] / (1 + tau)}
    assert same(update({"weight": "opmd", "tau": tau}, columns), update({}, divided))
    soft = tau * math.log(sum(math.exp(r / tau) for r in rewards) / len(rewards))
    found = advantages(rewards, [0] * len(rewards), opmd_baseline="logavgexp", tau=tau)
    assert found == pytest.approx([r - soft for r in rewards], abs=1e-4)
    assert min(rewards) - 1e-6 <= soft <= max(rewards) + 1e-6


def test_the_soft_maximum_is_finite_for_large_rewards():
    found = advantages([1000.0, 0.0], [0, 0], opmd_baseline="logavgexp")
    assert found == pytest.approx([math.log(2), math.log(2) - 1000], abs=1e-3)


# clip rules


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 2))
def test_ring_and_one_side_contain_two_side(seed, low, high):
    columns = random_columns(seed)
    rho = (columns["log_probs"] - columns["old_log_probs"]).exp()
    clip = (1 - low, 1 + high)
    two, ring, one = (
        kept_tokens(mode, rho, columns["advantages"], clip, (0.0, 2.5)) for mode in ("two-side", "ring", "one-side")
    )
    assert bool((ring | ~two).all()) and bool((one | ~two).all())
    widest = {"clip_mode": "ring", "eps_low_prime": 1.0, "eps_high_prime": math.inf}
    assert same(update(widest, columns), update({"clip_mode": "two-side"}, columns))


def test_each_rule_by_hand():
    rho = torch.tensor([[0.1, 0.6, 1.0, 1.4, 9.0]])
    expected = {
        ("one-side", 1.0): [1, 1, 1, 0, 0],
        ("one-side", -1.0): [0, 0, 1, 1, 1],
        ("one-side", 0.0): [1, 1, 1, 1, 1],
        ("two-side", 1.0): [0, 0, 1, 0, 0],
        ("two-side", -1.0): [0, 0, 1, 0, 0],
        ("ring", 1.0): [1, 0, 1, 0, 0],
        ("ring", -1.0): [0, 0, 1, 0, 1],
    }
    for (mode, advantage), wanted in expected.items():
        columns = {"log_probs": rho.log(), "old_log_probs": 0 * rho, "mask": torch.ones(1, 5, dtype=torch.bool),
                   "advantages": torch.tensor([[advantage]])}  # fmt: skip
        _, gradient = update({"clip_mode": mode}, columns)
        assert gradient[0].tolist() == pytest.approx([-advantage / 5 * k for k in wanted]), (mode, advantage)


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_bounds_are_included(mode):
    bounds = torch.tensor([[0.5, 1.5]], dtype=torch.float64)
    for advantage in (1.0, -1.0):
        assert kept_tokens(mode, bounds, torch.tensor([[advantage]]), (0.5, 1.5), (0.0, 9.0)).all()


def test_one_side_keeps_every_token_without_advantage():
    stack = start([{"rec": {"clip_mode": "one-side"}}])
    loss, _ = update(stack, example() | {"advantages": torch.zeros(2, 1)})
    assert loss == 0 and stack.metrics.as_dict()["rlplugins/rec/kept"] == 1


def test_wider_bounds_keep_more():
    columns = example()
    narrow = update({"clip_mode": "one-side"}, columns)[1]
    assert (narrow != 0).sum() == 3
    assert (update({"clip_mode": "one-side", "eps_high": 0.4}, columns)[1] != 0).sum() == 5
    assert (update({"clip_mode": "one-side", "eps_low": 0.6}, columns)[1] != 0).sum() == 4
    assert (update({"clip_mode": "ring", "eps_low_prime": 0.8}, columns)[1] != 0).sum() == 1
    assert (update({"clip_mode": "ring", "eps_high_prime": 0.8}, columns)[1] != 0).sum() == 3


def test_clipped_tokens_keep_their_regulariser_and_their_place_in_the_mean():
    columns = example()
    clipped = update({"clip_mode": "two-side", "regularizer": "forward-kl", "coef": 0.1}, columns)[1]
    assert clipped[0].tolist() == pytest.approx([-0.1 / 7, -0.85 / 7, -0.1 / 7, -0.1 / 7])


def test_the_ratio_carries_no_gradient():
    columns = example()
    weights = torch.tensor(RATIO)
    _, gradient = update(IS, columns)
    expected = -columns["advantages"] * weights * columns["mask"] / 7
    assert torch.allclose(gradient, expected, atol=1e-8)


# baseline, scale, RED-Drop


@st.composite
def scored_groups(draw):
    groups = draw(st.lists(st.sampled_from([0, 2, 7]), min_size=1, max_size=12))
    return [float(draw(st.integers(0, 2))) for _ in groups], groups


@settings(max_examples=25, deadline=None)
@given(scored_groups(), st.integers(0, 10**6), st.booleans())
def test_red_drop_balances_every_group_and_centres_what_it_leaves(case, seed, std):
    rewards, groups = case
    found = advantages(rewards, groups, seed=seed, drop="balance", std_normalize=std)
    stack = start([{"rec": {"drop": "balance"}}], seed=seed)
    kept = stack.plugins[0].kept(torch.tensor(rewards)[:, None], torch.tensor(groups), stack.step).flatten().bool()
    for group in set(groups):
        members = [i for i, other in enumerate(groups) if other == group]
        mean = sum(rewards[i] for i in members) / len(members)
        pos = [i for i in members if rewards[i] >= mean - 1e-6]
        neg = [i for i in members if i not in pos]
        left = [i for i in members if kept[i]]
        assert set(pos) <= set(left)
        assert len(left) == len(pos) + min(len(pos), len(neg))
        assert [found[i] for i in members if i not in left] == pytest.approx([0.0] * (len(members) - len(left)))
        if len(members) == 1:
            assert found[members[0]] == pytest.approx(rewards[members[0]])
        else:
            b = sum(rewards[i] for i in left) / len(left)
            spread = math.sqrt(sum((rewards[i] - b) ** 2 for i in left) / len(left)) + 1e-6 if std else 1.0
            assert [found[i] for i in left] == pytest.approx([(rewards[i] - b) / spread for i in left], abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 5)), max_size=12))
def test_places_in_a_group_are_those_that_sorting_gives(rows):
    groups, keys = torch.tensor([row[0] for row in rows]).long(), torch.tensor([row[1] for row in rows]).double()
    found = place_in_group(keys, groups).tolist()
    for i, (group, key) in enumerate(rows):
        assert found[i] == sum(g == group and (k, j) < (key, i) for j, (g, k) in enumerate(rows))


def test_red_drop_draws_anew_in_every_step_and_alike_in_a_resumed_run():
    rollouts = make_rollouts([1.0] * 6 + [0.0] * 26, [0] * 32)
    stack = start([{"rec": {"drop": "balance"}}])
    first = stack.credit(rollouts).advantages
    stack.begin_step(1, 10)
    assert not torch.equal(stack.credit(rollouts).advantages, first)
    assert torch.equal(start([{"rec": {"drop": "balance"}}]).credit(rollouts).advantages, first)
    assert not torch.equal(start([{"rec": {"drop": "balance"}}], seed=1).credit(rollouts).advantages, first)
    assert stack.metrics.as_dict()["rlplugins/rec/dropped"] == pytest.approx(20 / 32)


def test_dropped_responses_stay_in_the_lower_sum():
    rollouts = make_rollouts([1.0, 0.0, 0.0, 0.0], [0] * 4, tokens=3)
    stack = start([{"rec": {"drop": "balance"}}])
    made = stack.credit(rollouts)
    assert made.weights is None
    _, gradient = loss_and_gradient(stack, rollouts, rollouts.old_log_probs.double())
    torch.testing.assert_close(gradient, -made.advantages.double().expand(-1, 3) / 12)


class Lifted(Plugin):
    """Adds 1 to every advantage."""

    name = "lifted"

    @hookimpl
    def shape_advantages(self, advantages: Tensor) -> Tensor:
        return advantages + 1


def test_what_was_dropped_stays_dropped_whatever_shapes_the_advantages():
    rollouts = make_rollouts(REWARDS, GROUPS)
    made = start([{"rec": {"drop": "balance"}}, Lifted()], seed=SEED_OF_THE_EXAMPLE).credit(rollouts)
    assert made.advantages.flatten().tolist() == pytest.approx([1.5, 0, 0.5, 0, 1.25, 1.25, 0.25, 1.25])


def test_rewards_that_differ_by_rounding_only_are_all_at_the_mean():
    rewards = [0.1 + 1e-8 * k for k in range(7)]
    assert advantages(rewards, [0] * 7, drop="balance") == pytest.approx([0.0] * 7, abs=1e-6)
    large = torch.tensor([1e4, 1e4, 1e4 + 1e-3, 1e4], dtype=torch.float64)[:, None]
    assert not red_drop(large, torch.zeros(4, dtype=torch.int64), torch.rand(4)).any()


@pytest.mark.parametrize("options", [{}, {"std_normalize": True}, {"drop": "balance"}, {"shift": -0.1},
                                     {"opmd_baseline": "logavgexp"}])  # fmt: skip
def test_a_group_of_one_keeps_its_reward_as_its_advantage(options):
    assert advantages([0.7, 0.0, 1.0], [0, 1, 1], **options)[0] == pytest.approx(0.7)


@pytest.mark.parametrize("drop", [None, "balance"])
def test_equal_rewards_give_nothing(drop):
    assert advantages([0.3] * 4, [0] * 4, drop=drop, std_normalize=True) == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"drop": "balance"}, {"std_normalize": True, "shift": -0.1}])
def test_a_response_without_a_reward_leaves_its_group(options):
    whole = advantages([1.0, 0.0, 0.0, 0.5], [0] * 4, **options)
    rollouts = make_rollouts([1.0, 0.0, 0.0, 0.5, math.nan], [0] * 5)
    made = credit([{"rec": options}], rollouts)
    assert made.advantages.flatten().tolist() == pytest.approx([*whole, 0.0])
    assert made.weights.flatten().tolist() == [1, 1, 1, 1, 0]


# the update


@pytest.mark.parametrize("options", [{}, {"clip_mode": "ring", **IS}, GSPO, {"regularizer": "k2", "coef": 0.1}])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_micro_batches_do_not_change_the_loss(options, seed):
    columns = random_columns(seed)
    whole = update(options, columns)
    assert same(update(options, columns, 2), whole) and same(update(options, columns, 6), whole)


@pytest.mark.parametrize("options", [{}, {"clip_mode": "one-side", **IS}, GSPO])
def test_two_ranks_give_the_loss_of_one(options):
    columns = random_columns(5)
    whole = update(options, columns)
    current = columns.pop("log_probs")
    totals: list[Tensor] = []
    start([{"rec": options}]).mini_batch(columns, reduce=lambda values: totals.append(values) or values)
    gradients, losses = [], []
    for rows in (slice(0, 2), slice(2, 6)):
        leaf = current[rows].clone().requires_grad_()
        share = {name: column[rows] for name, column in columns.items()}
        part = start([{"rec": options}]).mini_batch(share, reduce=lambda _: totals[0]).loss(leaf).total
        part.backward()
        losses.append(part.detach())
        gradients.append(leaf.grad)
    assert same([sum(losses), torch.cat(gradients)], whole)


@pytest.mark.parametrize("options", [{}, {"clip_mode": "two-side"}, GSPO, {"weight": "advantage"}])
def test_nothing_to_train_on(options):
    columns = random_columns(2)
    for nothing in ({"mask": torch.zeros_like(columns["mask"])}, {"weights": torch.zeros(6, 1)}):
        loss, gradient = update(options, columns | nothing)
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("options", [{"clip_mode": mode, **IS} for mode in CLIP_MODES] + [GSPO, IS])
def test_extreme_ratios_stay_finite(options):
    columns = example()
    columns["log_probs"] = columns["log_probs"] + torch.tensor([[500.0], [-500.0]])
    loss, gradient = update(options, columns)
    assert loss.isfinite() and gradient.isfinite().all()


def test_an_empty_response_and_a_single_prompt():
    rollouts = make_rollouts([1.0, 0.0, 1.0], [0] * 3, lengths=[2, 0, 3])
    for options in ({"clip_mode": "ring"}, GSPO):
        loss, gradient = loss_and_gradient(start([{"rec": options}]), rollouts, rollouts.old_log_probs)
        assert loss.isfinite() and (gradient[1] == 0).all() and (gradient[0] != 0).any()


def test_the_correction_of_stale_rollouts_is_left_out_under_a_clip_rule_only():
    columns = random_columns(4)
    corrected = columns | {"correction": torch.full_like(columns["old_log_probs"], 0.5)}
    for mode in CLIP_MODES:
        assert same(update({"clip_mode": mode}, corrected), update({"clip_mode": mode}, columns))
    assert same([2 * update({}, corrected)[1]], [update({}, columns)[1]])


def test_the_same_step_twice_gives_the_same_and_changes_no_input():
    columns = random_columns(3)
    before = {name: column.clone() for name, column in columns.items()}
    for options in (GSPO, {"clip_mode": "ring", "weight": "advantage", "regularizer": "k2", "coef": 0.1}):
        assert all(torch.equal(*pair) for pair in zip(update(options, columns), update(options, columns), strict=True))
    assert all(torch.equal(columns[name], before[name]) for name in columns)
    rollouts = make_rollouts(REWARDS, GROUPS)
    scores = rollouts.scores.clone()
    credit([{"rec": {"drop": "balance", "std_normalize": True}}], rollouts)
    assert torch.equal(rollouts.scores, scores)


def test_remembers_nothing(tmp_path):
    stack = start([{"rec": {"drop": "balance"}}])
    stack.save(tmp_path / "state", 2)
    assert start([{"rec": {"drop": "balance"}}]).load(tmp_path / "state") == 2


# claims, needs and facts


class OtherClip(Plugin):
    """Another owner of the clip range."""

    name = "other_clip"

    @hookimpl
    def clip_range(self) -> tuple[float, float]:
        return 0.2, 3.0


def test_another_plugin_may_set_the_bounds():
    line = {"clip_range": "other_clip"}
    stack = start([{"rec": {"clip_mode": "one-side", **IS}}, OtherClip()], owners=line)
    assert same(update(stack, example()), update({**IS}, example()))
    with pytest.raises(StackError, match="clip_range has one owner"):
        Stack([{"rec": {"clip_mode": "one-side"}}, OtherClip()])


def test_bounds_are_refused_without_a_clip_rule():
    with pytest.raises(StackError, match=r"other_clip\.clip_range gives `clip`, but nobody reads it"):
        Stack(["rec", OtherClip()])


def test_another_owner_of_loss_or_reduction_is_refused():
    for hook in ("policy_loss", "reduce_loss", "baseline"):
        with pytest.raises(StackError, match=f"{hook} has one owner"):
            Stack(["rec", "gtpo"])
    with pytest.raises(StackError) as refused:  # both are means over responses
        Stack([{"rec": GSPO}, "gtpo"])
    assert "reduce_loss" not in str(refused.value)


@pytest.mark.parametrize(
    "fact, options",
    [("response_rewards", {}), ("absolute_advantages", {"shift": -0.1}), ("absolute_advantages", {"weight": "advantage"}),
     ("absolute_advantages", {"regularizer": "k2", "coef": 0.1}), ("absolute_advantages", {"drop": "balance"})],
)  # fmt: skip
def test_refused_where_what_it_assumes_is_broken(fact, options):
    with pytest.raises(StackError, match=rf"{fact}.*rec assumes it, other breaks it"):
        Stack([{"rec": options}, stand_in(breaks=[fact])])


def test_the_size_of_advantages_does_not_matter_where_only_their_proportions_do():
    Stack([{"rec": {"clip_mode": "one-side", **IS}}, stand_in(breaks=["absolute_advantages"])])


@pytest.mark.parametrize(
    "fact, options, without",
    [("whole_groups", {"drop": "balance"}, {}), ("reward_scale", {"std_normalize": True}, {}),
     ("token_ratio", GSPO, GSPO | {"ratio": "token"}), ("token_ratio", {}, IS),
     ("token_ratio", {"weight": "advantage"}, {"regularizer": "k2", "coef": 0.1})],
)  # fmt: skip
def test_refused_where_it_breaks_what_is_assumed(fact, options, without):
    with pytest.raises(StackError, match=rf"{fact}.*other assumes it, rec breaks it"):
        Stack([{"rec": options}, stand_in(assumes=[fact])])
    Stack([{"rec": without}, stand_in(assumes=[fact])])


def test_refused_with_one_response_per_prompt():
    class Single(Plugin):
        name = "single"
        needs = (needs.group_size(exactly=1),)

        @hookimpl
        def prepare_step(self) -> None: ...

    with pytest.raises(StackError, match="rec needs 2 or more"):
        Stack(["rec", Single()])
    with pytest.raises(StackError, match="rec needs 2 or more"):
        Stack(["rec"], trainer=Trainer(name="plain", group_size=1))


@pytest.mark.parametrize(
    "options, field",
    [({"eps_low": 1.5}, "eps_low"), ({"eps_low": -0.1}, "eps_low"), ({"eps_high": -1}, "eps_high"),
     ({"eps_low_prime": 1.1}, "eps_low_prime"), ({"eps_high_prime": -0.1}, "eps_high_prime"), ({"temp": 0}, "temp"),
     ({"tau": 0}, "tau"), ({"tau": math.inf}, "tau"), ({"coef": -1}, "coef"), ({"coef": 0.1}, "coef"),
     ({"regularizer": "k2"}, "coef"), ({"regularizer": "k1"}, "regularizer"), ({"clip_mode": "both"}, "clip_mode"),
     ({"weight": "ratio"}, "weight"), ({"drop": "all"}, "drop"), ({"shift": math.nan}, "shift"),
     ({"opmd_baseline": "max"}, "opmd_baseline"), ({"ratio": "sequence"}, "ratio"),
     (GSPO | {"weight": "advantage"}, "ratio"), ({"clip_mode": "ring", "eps_low_prime": 0.1}, "eps_low_prime"),
     ({"clip_mode": "ring", "eps_high": 3}, "eps_high_prime"),
     ({"regularizer": "forward-kl", "coef": 0.1, "shift": -0.1}, "shift"), ({"low": 1}, "low")],
)  # fmt: skip
def test_options_out_of_range_name_plugin_and_field(options, field):
    with pytest.raises(ConfigurationError, match=rf"rec: .*{field}|rec\.{field}"):
        Stack([{"rec": options}])


# what every plugin must do

test_conformance = conformance(
    "rec",
    [
        {},
        {"clip_mode": "two-side", "weight": "importance_sampling", "std_normalize": True},
        {"clip_mode": "ring"},
        {"clip_mode": "one-side", "ratio": "sequence"},
        {"weight": "advantage", "regularizer": "forward-kl", "coef": 0.1},
        {"weight": "opmd", "opmd_baseline": "logavgexp", "regularizer": "k2", "coef": 0.1},
    ],
)
test_conformance_of_red_drop = conformance(
    "rec", [{"drop": "balance"}], unless={"permutation": "what is left out is drawn row by row"}
)
