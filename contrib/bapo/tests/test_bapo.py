"""BAPO: facts about the search, each through the stack."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Plugin, Stack, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.rollouts import POLICY
from rlplugins.testing import conformance, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_bapo import Bapo, negative_part, positive_part

LOG_PROBS = [[-1.59453489, -1.62453126, -0.405360516, -0.4], [-1.19314718, -0.956674944, -1.23763574, 0.0],
             [-1.23078292, -0.9, -0.805360516, -0.719066155]]  # fmt: skip
OLD_LOG_PROBS = [[-2.0, -2.5, -0.3, -0.4], [-0.5, -0.6, -1.5, 0.0], [-0.8, -0.9, -0.7, -2.0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
ADVANTAGES = [[0.9], [-1.1], [-0.8]]
RATIOS_ON_THE_WAY = [
    0.497429305, 0.493937459, 0.488020176, 0.478960395, 0.470230862, 0.481166464, 0.492102065, 0.503037666, 0.513973268,
    0.524908869, 0.535844471, 0.541312272, 0.546780072, 0.552247873, 0.557715674, 0.563183474, 0.568651275, 0.574119076,
    0.579586877, 0.585054677, 0.590522478,
]  # fmt: skip
DUAL_CLIP = {"policy_loss": {"ppo_clip": {"dual_clip": 3.0}}}


def example() -> dict[str, Tensor]:
    """The worked example's columns, and the current log-probs as `log_probs`; float64."""
    tensors = {"log_probs": LOG_PROBS, "old_log_probs": OLD_LOG_PROBS, "mask": MASK, "advantages": ADVANTAGES}
    columns = {name: torch.tensor(value, dtype=torch.float64) for name, value in tensors.items()}
    return columns | {"mask": columns["mask"].bool()}


def random_columns(seed: int, rows: int = 6, tokens: int = 5, per_token: bool = False) -> dict[str, Tensor]:
    """Off-policy log-probs, advantages of both signs and 0, unequal lengths (0 too), weights of which some are 0."""
    source = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    mask = torch.arange(tokens) < torch.randint(0, tokens + 1, (rows, 1), generator=source)
    old = -draw(rows, tokens).abs() * mask
    advantages = draw(rows, tokens if per_token else 1)
    advantages[0] = 0
    return {
        "log_probs": old + 0.5 * draw(rows, tokens) * mask,
        "old_log_probs": old,
        "mask": mask,
        "advantages": advantages * mask if per_token else advantages,
        "weights": torch.randint(0, 3, (rows, 1), generator=source).double(),
        "token_weights": draw(rows, tokens).abs() * mask,
    }


def opened(options, columns, reduce=None, stack=None):
    """The stack, its mini-batch of these columns (with the current log-probs), and the log-probs."""
    stack = stack or start([{"bapo": options}], owners=DUAL_CLIP)
    columns = dict(columns)
    current = columns.pop("log_probs")
    return stack, stack.mini_batch(columns, reduce=reduce, log_probs=current), current


def search(options, columns, **lines) -> dict[str, float]:
    """What one search found: low, high, share, moves, and the ratio where it is finite."""
    stack, mini, current = opened(options, columns, **lines)
    if options.get("scope") == "micro_batch":
        mini.loss(current)
    return {name.removeprefix("rlplugins/bapo/"): value for name, value in stack.metrics if "/bapo/" in name}


def update(options, columns, micro_batches=1, reduce=None) -> tuple[Tensor, Tensor]:
    """Loss of the mini-batch and its gradient by the log-probs."""
    _, mini, current = opened(options, columns, reduce)
    leaf = current.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(current)).chunk(micro_batches):
        part = mini.loss(leaf[rows], rows).total
        part.backward()
        total = total + part.detach()
    return total, leaf.grad


def bounds_of(found) -> tuple[float, float]:
    return pytest.approx((found["low"], found["high"]), abs=1e-12)


# the card's numbers


def test_worked_example_in_the_official_order():
    found = search({}, example())
    assert (found["low"], found["high"]) == pytest.approx((0.8, 2.0))
    assert found["ratio"] == pytest.approx(0.590522478, abs=1e-9)
    assert found["moves"] == 20


def test_worked_example_loss_and_gradient():
    loss, gradient = update({}, example())
    assert loss.item() == pytest.approx(0.262727273, abs=1e-8)
    expected = [[-0.122727273, 0, -0.0736363636, -0.0818181818], [0, 0, 0.13, 0], [0, 0.0727272727, 0.0654545455, 0]]
    assert gradient.flatten().tolist() == pytest.approx([x for row in expected for x in row], abs=1e-8)


def test_worked_example_from_scores_to_loss():
    columns = example()
    rollouts = make_rollouts([0.9, -1.1, -0.8], mask=MASK, old_log_probs=columns["old_log_probs"])
    owners = {"baseline": "zero", "advantage_scale": "one", **DUAL_CLIP}
    stack = start(["bapo"], owners=owners)
    loss, gradient = loss_and_gradient(stack, rollouts, columns["log_probs"], micro_batches=3)
    assert loss.item() == pytest.approx(0.262727273, abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([-0.122727273, 0, -0.0736363636, -0.0818181818], abs=1e-6)
    assert dict(stack.metrics)["rlplugins/bapo/high"] == pytest.approx(2)


@pytest.mark.parametrize("move", [0, *range(7, 21)])
def test_every_new_maximum_of_the_official_way_is_where_a_search_with_that_target_ends(move):
    found = search({"target": RATIOS_ON_THE_WAY[move] - 1e-8}, example())
    assert found["moves"] == move
    assert found["ratio"] == pytest.approx(RATIOS_ON_THE_WAY[move], abs=3e-9)
    assert (found["low"], found["high"]) == pytest.approx((0.8, 1 + 0.05 * move) if move else (0.6, 1.2))


def test_ratios_while_the_lower_bound_moves():
    for moves in range(5):
        found = search({"lo_max": 0.6 + 0.05 * moves, "step_hi": 0}, example())
        assert found["ratio"] == pytest.approx(RATIOS_ON_THE_WAY[moves], abs=3e-9)


def test_worked_example_in_the_order_of_the_paper():
    found = search({"preset": "paper"}, example())
    assert (found["low"], found["high"]) == pytest.approx((0.6, 2.4))
    assert found["share"] == pytest.approx(0.401538462, abs=1e-9)
    assert found["moves"] == 24
    for move, share in enumerate([0.332188841, 0.337308348, 0.342349958]):
        found = search({"preset": "paper", "target": share - 1e-8}, example())
        assert (found["moves"], found["share"]) == (move, pytest.approx(share, abs=1e-9))


# the search, step by step as the card writes it


def searched(options, columns) -> tuple[float, float]:
    """The bounds by loops and repeated addition."""
    o = Bapo(**options)
    weights = columns["mask"].double() * columns.get("weights", 1) * columns.get("token_weights", 1)
    if o.token_weight:
        weights = weights * columns["old_log_probs"].exp()
    rho = (columns["log_probs"] - columns["old_log_probs"]).clamp(-20, 20).exp()
    advantages = columns["advantages"].expand_as(rho)

    def value(lo: float, hi: float) -> float:
        if o.measure == "active":
            e = torch.where(advantages >= 0, rho * (rho <= hi), rho * (rho >= lo)) * advantages * weights
        else:
            e = torch.where(advantages >= 0, rho.clamp(max=hi), rho.clamp(min=lo)) * advantages * weights
        positive, negative = float(e.clamp(min=0).sum()), float((-e).clamp(min=0).sum())
        if o.order == "paper":
            return positive / (positive + negative) if negative else 1.0
        return positive / (negative + 1e-8) if negative else math.inf

    lo, hi = o.lo_start, o.hi_start
    if o.order == "official":
        while value(lo, hi) < o.target and o.step_lo and lo < o.lo_max - 1e-9:
            lo = min(lo + o.step_lo, o.lo_max)
        while value(lo, hi) < o.target and o.step_hi and hi < o.hi_max - 1e-9:
            hi = min(hi + o.step_hi, o.hi_max)
        return lo, hi
    while value(lo, hi) < o.target and o.step_lo and lo + o.step_lo <= o.lo_max + 1e-9:
        if o.step_hi and hi + o.step_hi <= o.hi_max + 1e-9:
            hi += o.step_hi
        else:
            lo += o.step_lo
    return lo, hi


STEPS = st.sampled_from([0.0, 0.013, 0.05, 0.1, 0.3])


@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from(["official", "paper"]),
    measure=st.sampled_from(["official", "active"]),
    token_weight=st.booleans(),
    per_token=st.booleans(),
    target=st.floats(0.05, 0.95),
    step_lo=STEPS,
    step_hi=STEPS,
)
@settings(max_examples=70, deadline=None)
def test_ends_where_the_step_by_step_search_ends(
    seed, order, measure, token_weight, per_token, target, step_lo, step_hi
):
    options = {"order": order, "measure": measure, "token_weight": token_weight, "target": target, "step_lo": step_lo,
               "step_hi": step_hi, "hi_max": 1.9}  # fmt: skip
    columns = random_columns(seed, per_token=per_token)
    assert searched(options, columns) == bounds_of(search(options, columns))


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_sums_of_all_bounds_are_the_sums_of_each(seed, active):
    source = torch.Generator().manual_seed(seed)
    ratio = torch.randn(30, generator=source, dtype=torch.float64).exp()
    weight = torch.rand(30, generator=source, dtype=torch.float64)
    ratio[:3] = torch.tensor([0.6, 1.2, 1.7], dtype=torch.float64)  # exactly on a bound: not clipped
    lower, upper = [0.6, 0.7, 0.9], [1.2, 1.7, 3.0]
    for found, hi in zip(positive_part(ratio, weight, upper, active), upper, strict=True):
        each = ratio * (ratio <= hi) if active else ratio.clamp(max=hi)
        assert found.item() == pytest.approx((weight * each).sum().item())
    for found, lo in zip(negative_part(ratio, weight, lower, active), lower, strict=True):
        each = ratio * (ratio >= lo) if active else ratio.clamp(min=lo)
        assert found.item() == pytest.approx((weight * each).sum().item())


# identities


@given(st.integers(0, 10**6), st.sampled_from(["official", "paper"]))
@settings(max_examples=12, deadline=None)
def test_target_zero_is_ppo_clip(seed, order):
    columns = random_columns(seed)
    options = {"target": 0, "lo_start": 0.8, "order": order}
    found = search(options, columns)
    assert (found["low"], found["high"], found["moves"]) == (0.8, 1.2, 0)
    plain = start([], owners={**DUAL_CLIP, "clip_range": {"fixed": {"low": 0.2, "high": 0.2}}})
    _, mini, current = opened({}, columns, stack=plain)
    assert torch.allclose(mini.loss(current).total, update(options, columns)[0], rtol=1e-12)


@pytest.mark.parametrize("order", ["official", "paper"])
@pytest.mark.parametrize("still", [{"step_lo": 0, "step_hi": 0}, {"lo_max": 0.6, "hi_max": 1.2}])
def test_bounds_that_cannot_move_stay(order, still):
    found = search({"target": 0.9, "order": order, **still}, example())
    assert (found["low"], found["high"], found["moves"]) == (0.6, 1.2, 0)


def test_a_fixed_lower_bound_ends_the_order_of_the_paper_at_once_but_not_the_official_one():
    assert search({"order": "paper", "target": 0.9, "step_lo": 0}, example())["moves"] == 0
    assert search({"target": 0.9, "step_lo": 0}, example())["moves"] == 16


@given(st.integers(0, 10**6))
@settings(max_examples=12, deadline=None)
def test_on_policy_the_search_exhausts_the_bounds_and_changes_nothing(seed):
    columns = random_columns(seed)
    columns["log_probs"] = columns["old_log_probs"]
    columns["advantages"] = columns["advantages"].abs().neg()  # below every target
    ends, starts = update({}, columns), update({"target": 0}, columns)
    assert torch.allclose(ends[0], starts[0], atol=1e-12) and torch.allclose(ends[1], starts[1], atol=1e-12)


@pytest.mark.parametrize("preset", ["configuration", "paper"])
def test_without_negative_tokens_there_is_no_search(preset):
    for advantages in (ADVANTAGES, [[0], [0], [0]]):
        columns = example() | {"advantages": torch.tensor(advantages, dtype=torch.float64).clamp(min=0)}
        found = search({"preset": preset}, columns)
        assert found["moves"] == 0 and found["share"] == 1 and "ratio" not in found


def test_without_positive_tokens_the_search_exhausts_both_bounds():
    columns = example() | {"advantages": torch.tensor([[0.0], [-1], [-1]], dtype=torch.float64)}
    found = search({"preset": "paper"}, columns)
    assert (found["low"], found["high"]) == pytest.approx((0.9, 3.0))
    assert found["moves"] == 36 + 15 and found["share"] == 0
    assert search({}, columns)["moves"] == 4 + 16


@given(st.integers(0, 10**6), st.sampled_from(["configuration", "paper"]))
@settings(max_examples=12, deadline=None)
def test_rows_without_advantage_or_weight_and_padding_do_not_count(seed, preset):
    columns = random_columns(seed)
    expected = search({"preset": preset}, columns)
    more = {name: torch.cat([column, column]) for name, column in columns.items()}
    rows = len(columns["mask"])
    more["log_probs"][rows:] += 1
    more["advantages"][rows : rows + 2] = 0
    more["weights"][rows + 2 : rows + 4] = 0
    more["mask"][rows + 4 :] = False
    assert search({"preset": preset}, more) == pytest.approx(expected)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(max_examples=12, deadline=None)
def test_a_common_factor_on_advantages_or_weights_changes_nothing(seed, factor):
    columns = random_columns(seed)
    for name in ("advantages", "weights", "token_weights"):
        assert search({}, columns | {name: factor * columns[name]})["moves"] == search({}, columns)["moves"]


@given(st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_a_weight_of_two_is_the_row_twice(seed):
    columns = random_columns(seed) | {"weights": torch.tensor([1.0, 2, 1, 1, 0, 1], dtype=torch.float64)[:, None]}
    index = torch.tensor([0, 1, 1, 2, 3, 5])
    copied = {name: column[index] for name, column in columns.items()}
    copied["weights"] = torch.ones_like(copied["weights"])
    assert search({}, columns) == pytest.approx(search({}, copied))


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_sums_rise_with_the_bounds_and_fall_with_the_lower_one_if_only_active_tokens_count(seed, active):
    ratio = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    upper = positive_part(ratio, torch.ones_like(ratio), [1.0, 1.2, 1.5, 2.0], active).diff()
    lower = negative_part(ratio, torch.ones_like(ratio), [0.5, 0.6, 0.8, 1.0], active).diff()
    assert (upper >= -1e-12).all()
    assert ((lower <= 1e-12) if active else (lower >= -1e-12)).all()


def test_the_official_measure_always_exhausts_the_lower_bound_and_the_active_one_need_not():
    columns = example()  # its start ratio is 0.497
    assert search({"target": 0.5}, columns)["low"] == pytest.approx(0.8)
    active = search({"measure": "active", "target": 0.28}, columns)  # from 0.24
    assert 0.6 < active["low"] < 0.8 and active["high"] == 1.2


# options


def test_presets_give_way_to_what_is_written():
    assert Bapo(preset="paper").target == 0.4 and Bapo(preset="paper", target=0.3).target == 0.3
    script = Bapo(preset="script")
    assert (script.target, script.lo_start, script.lo_max, script.step_hi) == (0.5, 0.8, 0.95, 0.1)
    assert Bapo(preset="configuration").configuration() == Bapo().configuration()


def test_a_share_is_the_ratio_that_it_stands_for():
    columns = example()
    for share in (0.33, 0.35, 0.365):
        as_ratio = search({"target": share / (1 - share)}, columns)
        assert search({"target": share, "criterion": "share"}, columns) == pytest.approx(as_ratio, abs=1e-6)
    assert Bapo(preset="paper").compared == "share" and Bapo().compared == "ratio"
    assert search({"preset": "paper", "criterion": "ratio"}, columns)["moves"] == 0


def test_token_weights_count_likely_tokens_more():
    columns = example()
    weight = columns["old_log_probs"].exp()
    rho, mask = (columns["log_probs"] - columns["old_log_probs"]).exp(), columns["mask"]
    positive = (weight * 0.9 * rho.clamp(max=1.2))[0].sum()
    negative = (weight * mask * columns["advantages"].abs() * rho.clamp(min=0.6))[1:].sum()
    found = search({"token_weight": True, "target": 0}, columns)
    assert found["ratio"] == pytest.approx(float(positive / negative), rel=1e-6)


def test_a_search_per_micro_batch_depends_on_the_cut_and_per_mini_batch_does_not():
    columns = example()
    per_micro = {"scope": "micro_batch"}
    assert torch.allclose(update({}, columns, 1)[0], update({}, columns, 3)[0], atol=1e-12)
    assert torch.allclose(update(per_micro, columns, 1)[0], update({}, columns, 1)[0], atol=1e-12)
    assert not torch.allclose(update(per_micro, columns, 1)[0], update(per_micro, columns, 3)[0], atol=1e-3)


@pytest.mark.parametrize(
    "options, field",
    [({"lo_start": 0.9}, "lo_start"), ({"hi_start": 3}, "hi_start"), ({"lo_max": 1.1}, "lo_max"),
     ({"hi_start": 0.9}, "hi_start"), ({"step_lo": -0.1}, "step_lo"), ({"step_hi": math.inf}, "step_hi"),
     ({"step_hi": 1e-12}, "step_hi"), ({"target": -1}, "target"), ({"target": math.nan}, "target"),
     ({"order": "paper"}, "target"), ({"preset": "released"}, "preset"), ({"preset": ["paper"]}, "preset"),
     ({"order": "first"}, "order"), ({"measure": "all"}, "measure"), ({"scope": "step"}, "scope"), ({"low": 1}, "low")],
)  # fmt: skip
def test_options_out_of_range_name_plugin_and_field(options, field):
    with pytest.raises(ConfigurationError, match=rf"bapo: .*{field}|bapo\.{field}"):
        Stack([{"bapo": options}])


# ranks and micro-batches


@given(st.integers(0, 10**6), st.sampled_from([2, 6]), st.sampled_from(["configuration", "paper"]))
@settings(max_examples=12, deadline=None)
def test_micro_batches_do_not_change_the_loss(seed, micro_batches, preset):
    columns = random_columns(seed)
    whole, parts = update({"preset": preset}, columns), update({"preset": preset}, columns, micro_batches)
    assert torch.allclose(whole[0], parts[0], atol=1e-10) and torch.allclose(whole[1], parts[1], atol=1e-10)


def on_ranks(options, shares):
    """The update of every share of the rows in a thread of its own, sums really added; and the calls of each rank."""
    barrier = threading.Barrier(len(shares), timeout=30)
    slots = [torch.zeros(())] * len(shares)
    calls = [0] * len(shares)

    def run(rank: int):
        def reduce(values: Tensor) -> Tensor:
            calls[rank] += 1
            slots[rank] = values
            barrier.wait()
            total = torch.stack(slots).sum(0)
            barrier.wait()
            return total

        stack, mini, current = opened(options, shares[rank], reduce)
        leaf = current.clone().requires_grad_()
        part = mini.loss(leaf).total
        part.backward()
        return part.detach(), leaf.grad, dict(stack.metrics)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(run, range(len(shares)))), calls


@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from(["configuration", "paper"]))
@settings(max_examples=12, deadline=None)
def test_ranks_do_not_change_the_loss_and_call_equally_often(seed, cut, preset):
    columns = random_columns(seed)
    options = {"preset": preset}
    shares = [{name: column[:cut] for name, column in columns.items()}]
    shares += [{name: column[cut:] for name, column in columns.items()}]  # one may be empty
    parts, calls = on_ranks(options, shares)
    loss, gradient = update(options, columns)
    assert calls[0] == calls[1]
    assert parts[0][2] == parts[1][2]  # the same bounds
    assert torch.allclose(parts[0][0] + parts[1][0], loss, atol=1e-10)
    assert torch.allclose(torch.cat([parts[0][1], parts[1][1]]), gradient, atol=1e-10)


def test_one_reduction_for_the_search():
    calls = []

    def reduce(values: Tensor) -> Tensor:
        calls.append(values.shape)
        return values

    opened({"preset": "paper"}, example(), reduce)
    plain = len(calls)
    calls.clear()
    opened({}, example(), reduce, stack=start([]))
    assert plain == len(calls) + 1


# edge cases


def test_nothing_to_train_on():
    columns = example()
    for nothing in (columns | {"mask": torch.zeros_like(columns["mask"])}, columns | {"weights": torch.zeros(3, 1)}):
        found = search({}, nothing)
        assert (found["low"], found["high"]) == (0.6, 1.2)
        loss, gradient = update({}, nothing)
        assert loss == 0 and (gradient == 0).all()
    empty = {name: column[:0] for name, column in columns.items()}
    assert search({}, empty)["moves"] == 0


def test_extreme_ratios_stay_finite():
    columns = example()
    columns["log_probs"] = columns["log_probs"] - torch.tensor([[500.0], [-500.0], [0.0]])
    assert all(math.isfinite(value) for value in search({}, columns).values())


def test_without_current_log_probs_the_ratio_is_one():
    stack = start(["bapo"], owners=DUAL_CLIP)
    columns = example()
    del columns["log_probs"]
    stack.mini_batch(columns)
    metrics = dict(stack.metrics)
    weights = columns["mask"] * columns["advantages"]
    expected = weights.clamp(min=0).sum() / weights.clamp(max=0).sum().neg()
    assert metrics["rlplugins/bapo/ratio"] == pytest.approx(expected.item(), rel=1e-6)


def test_rows_of_no_group_and_rows_without_a_finite_reward_do_not_count():
    old = torch.tensor(OLD_LOG_PROBS + OLD_LOG_PROBS[:2])
    now = torch.tensor([*LOG_PROBS, [-5.0] * 4, [-0.1] * 4])
    mask = MASK + [[1] * 4] * 2
    owners = {"baseline": "zero", "advantage_scale": "one", **DUAL_CLIP}
    stack = start(["bapo"], owners=owners)
    rollouts = make_rollouts([0.9, -1.1, -0.8, 5, math.nan], [0, 0, 0, -1, 0], mask=mask, old_log_probs=old)
    loss_and_gradient(stack, rollouts, now)
    assert dict(stack.metrics)["rlplugins/bapo/ratio"] == pytest.approx(0.590522478, abs=1e-6)


# needs, facts and claims


class OtherClip(Plugin):
    """Another owner of the clip range."""

    name = "other_clip"

    @hookimpl
    def clip_range(self) -> tuple[float, float]:
        return 0.5, 2.0


def test_refused_where_the_loss_does_not_compare_token_by_token():
    with pytest.raises(StackError, match=r"token_ratio.*bapo assumes it, other breaks it"):
        Stack(["bapo", stand_in(breaks=["token_ratio"])])
    with pytest.raises(StackError, match=r"token_ratio.*bapo assumes it, gspo breaks it"):
        Stack(["bapo"], owners={"policy_loss": "gspo"})


def test_refused_under_a_loss_that_takes_no_clip():
    with pytest.raises(StackError, match=r"bapo\.clip_range gives `clip`, but nobody reads it"):
        Stack(["bapo"], owners={"policy_loss": "reinforce"}, allow=["token_ratio"])


def test_refused_beside_another_clip_range():
    with pytest.raises(StackError, match="clip_range has one owner, but is claimed by bapo and other_clip"):
        Stack(["bapo", OtherClip()])


def test_refused_where_log_probs_of_the_mini_batch_are_not_to_be_had():
    with pytest.raises(StackError, match="log-probs of a whole mini-batch"):
        Stack(["bapo"], trainer=Trainer(name="plain"))
    Stack([{"bapo": {"scope": "micro_batch"}}], trainer=Trainer(name="plain", ranks=1))
    Stack(["bapo"], trainer=Trainer(name="able", provides=frozenset({"mini_batch_log_probs"})))


def test_a_search_per_micro_batch_is_refused_on_two_ranks():
    with pytest.raises(StackError, match="one rank only"):
        Stack([{"bapo": {"scope": "micro_batch"}}], trainer=Trainer(name="two", ranks=2))


def test_bounds_are_plain_ratio_bounds():
    stack, mini, _ = opened({"target": 0}, example())
    assert mini.shared["bapo"]["clip"] == (0.6, 1.2)
    assert stack.plan.owners["clip_range"][POLICY][0][1].by == "bapo"


# the frame


def test_the_same_mini_batch_twice_gives_the_same_and_changes_no_input():
    columns = random_columns(3)
    before = {name: column.clone() for name, column in columns.items()}
    assert search({}, columns) == search({}, columns)
    assert all(torch.equal(columns[name], before[name]) for name in columns)


def test_a_stack_from_the_specification_searches_alike():
    stack = start([{"bapo": {"preset": "paper", "target": 0.35}}], owners=DUAL_CLIP)
    again = Stack.from_specification(stack.specification())
    assert again.plugins[0].configuration() == stack.plugins[0].configuration()
    assert again.fingerprint == stack.fingerprint


def test_remembers_nothing(tmp_path):
    stack = start(["bapo"])
    stack.save(tmp_path / "state", 2)
    assert start(["bapo"]).load(tmp_path / "state") == 2
    for _ in range(2):  # every search starts anew
        _, mini, _ = opened({}, example(), stack=stack)
        assert mini.shared["bapo"]["clip"] == pytest.approx((0.8, 2.0))


# what every plugin must do

test_conformance = conformance(
    "bapo",
    [{}, {"preset": "paper"}, {"measure": "active", "token_weight": True}, {"scope": "micro_batch"}],
)
