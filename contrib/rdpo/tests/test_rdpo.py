"""Facts about rdpo: first the numbers of the paper's loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.pairs import SIDES, Pairs
from rlplugins.testing import conformance, start
from rlplugins.testing.pairs import make_pairs, pair_loss_and_gradient
from rlplugins.trainer import Trainer
from rlplugins_rdpo import Rdpo

few = settings(max_examples=25, deadline=None)
rates = st.floats(0, 0.45)
betas = st.sampled_from([0.01, 0.1, 1.0])
seeds = st.integers(0, 2**31)

EXAMPLE = {
    "chosen": [[-1.024, -1.952, -1.857, -0.643], [-0.791, -0.631, -1.399, -0.961]],
    "rejected": [[-1.523, -0.293, -2.097, -0.932], [-1.476, -0.904, -0.735, -1.324]],
}
REFERENCE = {
    "chosen": [[-0.777, -2.013, -1.903, -0.437], [-1.052, -1.085, -1.281, -1.162]],
    "rejected": [[-2.099, -0.537, -2.237, -1.29], [-1.924, -0.893, -0.466, -1.394]],
}


def columns(values: dict[str, Any]) -> dict[str, Tensor]:
    return {side: torch.tensor(values[side], dtype=torch.float64) for side in SIDES}


def random_case(seed: int, count: int = 5) -> tuple[Pairs, dict[str, Tensor], dict[str, Tensor]]:
    """Pairs with log-probs of policy and reference, which are there outside of the responses too."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (2, count), generator=source).tolist()
    pairs = make_pairs(*lengths)
    shape = pairs.chosen_mask.shape
    made = [{side: torch.randn(shape, generator=source, dtype=torch.float64) for side in SIDES} for _ in range(2)]
    return pairs, made[0], made[1]


def run(
    pairs: Pairs,
    policy: dict[str, Tensor],
    reference: dict[str, Tensor],
    parts: int = 1,
    owner: Any = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the stack of rdpo, or of a built-in."""
    stack = start([] if owner else [{"rdpo": options}], trainer=Trainer("any", defaults=default(owner), binds=BINDS))
    return pair_loss_and_gradient(stack, pairs, policy, reference, micro_batches=parts)


BINDS = frozenset({"build_preferences", "preference_loss", "prepare_mini_batch", "auxiliary_loss"})


def default(owner: Any) -> dict[str, Any]:
    return {"preference_loss": owner} if owner else {}


def swapped(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"chosen": values["rejected"], "rejected": values["chosen"]}


# numbers


@pytest.mark.parametrize(
    ("options", "losses", "slopes"),
    [
        ({"beta": 0.1, "eps": 0.1}, [0.78692704, 0.67074757], [-0.66138557, -0.61597598]),
        ({"beta": 0.5, "eps": 0.3}, [1.66940642, 0.47158920], [-1.42458579, -1.20499712]),
    ],
)
def test_the_worked_example(options: dict[str, float], losses: list[float], slopes: list[float]) -> None:
    pairs = make_pairs([3, 4], [4, 2])
    loss, gradient = run(pairs, columns(EXAMPLE), columns(REFERENCE), **options)
    assert float(loss) == pytest.approx(sum(losses) / 2, abs=1e-8)
    for row, slope in enumerate(slopes):  # d loss / d log-prob = beta d loss / d z, once per token, halved by the mean
        one, alone = pairs.select(torch.tensor([row])), torch.tensor([row])
        alone_loss, _ = run(
            one, {s: v[alone] for s, v in columns(EXAMPLE).items()}, {s: v[alone] for s, v in columns(REFERENCE).items()},
            **options,
        )  # fmt: skip
        assert float(alone_loss) == pytest.approx(losses[row], abs=1e-8)
        assert float(gradient["chosen"][row, 0]) == pytest.approx(slope * options["beta"] / 2, abs=1e-8)
        assert float(gradient["rejected"][row, 0]) == pytest.approx(-slope * options["beta"] / 2, abs=1e-8)
    assert not gradient["chosen"][0, 3] and not gradient["rejected"][1, 2:].any()


# identities


@few
@given(seed=seeds, beta=betas)
def test_without_flips_it_is_dpo(seed: int, beta: float) -> None:
    pairs, policy, reference = random_case(seed)
    loss, gradient = run(pairs, policy, reference, eps=0.0, beta=beta)
    dpo, dpo_gradient = run(pairs, policy, reference, owner={"dpo": {"beta": beta}})
    assert float(loss) == pytest.approx(float(dpo), rel=1e-12)
    for side in SIDES:
        torch.testing.assert_close(gradient[side], dpo_gradient[side])


@few
@given(seed=seeds, eps=rates, beta=betas)
def test_the_mean_over_flips_is_the_clean_dpo_loss_and_gradient(seed: int, eps: float, beta: float) -> None:
    pairs, policy, reference = random_case(seed)
    clean, clean_gradient = run(pairs, policy, reference, owner={"dpo": {"beta": beta}})
    kept, gradient = run(pairs, policy, reference, eps=eps, beta=beta)
    every = torch.ones(len(pairs), dtype=torch.bool)
    flipped, other = run(pairs.swapped(every), swapped(policy), swapped(reference), eps=eps, beta=beta)
    assert float((1 - eps) * kept + eps * flipped) == pytest.approx(float(clean), rel=1e-9)
    for side, opposite in (("chosen", "rejected"), ("rejected", "chosen")):
        mean = (1 - eps) * gradient[side] + eps * other[opposite]
        torch.testing.assert_close(mean, clean_gradient[side], rtol=1e-7, atol=1e-10)


@few
@given(eps=rates)
def test_where_policy_and_reference_agree_the_loss_is_log_two_for_every_rate(eps: float) -> None:
    pairs, policy, _ = random_case(3)
    loss, gradient = run(pairs, policy, policy, eps=eps, beta=1.0)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-9)
    expected = -pairs.chosen_mask.double() / (2 * (1 - 2 * eps)) / len(pairs)
    torch.testing.assert_close(gradient["chosen"], expected)


@few
@given(z=st.floats(-30, 30), eps=rates)
def test_the_slope_never_vanishes_unlike_that_of_cdpo(z: float, eps: float) -> None:
    pairs, nothing = make_pairs([1], [1]), {side: torch.zeros(1, 1, dtype=torch.float64) for side in SIDES}
    policy = nothing | {"chosen": torch.tensor([[z]], dtype=torch.float64)}
    _, gradient = run(pairs, policy, nothing, eps=eps, beta=1.0)
    slope = -float(gradient["chosen"][0, 0])
    assert eps / (1 - 2 * eps) - 1e-9 <= slope <= (1 - eps) / (1 - 2 * eps) + 1e-9
    if z > 5 and eps > 0.05:
        _, smoothed = run(pairs, policy, nothing, owner={"cdpo": {"beta": 1.0, "label_smoothing": eps}})
        assert float(smoothed["chosen"][0, 0]) > 0


@few
@given(seed=seeds, eps=rates, beta=betas)
def test_it_is_trls_expression(seed: int, eps: float, beta: float) -> None:
    pairs, policy, reference = random_case(seed)
    masks = {"chosen": pairs.chosen_mask, "rejected": pairs.rejected_mask}
    ratios = {side: ((policy[side] - reference[side]) * masks[side]).sum(1) for side in SIDES}
    score = ratios["chosen"] - ratios["rejected"]
    clean, flipped = -(1 - eps) * logsigmoid(beta * score), -eps * logsigmoid(-beta * score)
    loss, _ = run(pairs, policy, reference, eps=eps, beta=beta)
    assert float(loss) == pytest.approx(float(((clean - flipped) / (1 - 2 * eps)).mean()), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("distance", [300.0, -300.0])
def test_far_from_the_reference_nothing_overflows(distance: float) -> None:
    pairs, nothing = make_pairs([1], [1]), {side: torch.zeros(1, 1) for side in SIDES}
    loss, gradient = run(pairs, nothing | {"chosen": torch.tensor([[distance]])}, nothing, eps=0.2, beta=1.0)
    expected = -0.2 * distance / 0.6 if distance > 0 else -0.8 * distance / 0.6
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert bool(gradient["chosen"].isfinite().all())


# rates per pair


def test_rates_of_the_pairs_take_the_place_of_eps() -> None:
    pairs, policy, reference = random_case(5, count=4)
    pairs.columns = type(pairs.columns)({"flip_rate": torch.tensor([0.0, 0.1, 0.3, 0.45])})
    loss, _ = run(pairs, policy, reference, per_pair=True, beta=0.7)
    alone = []
    for row, eps in enumerate([0.0, 0.1, 0.3, 0.45]):
        index = torch.tensor([row])
        one = [{side: values[side][index] for side in SIDES} for values in (policy, reference)]
        alone.append(float(run(pairs.select(index), *one, eps=eps, beta=0.7)[0]))
    assert float(loss) == pytest.approx(sum(alone) / 4, rel=1e-5)


@pytest.mark.parametrize("rate", [0.5, 0.9, -0.1, math.nan])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    pairs = make_pairs([2, 2], [2, 2], columns={"flip_rate": torch.tensor([0.1, rate])})
    stack = start([{"rdpo": {"per_pair": True}}])
    with pytest.raises(HookError, match=r"rdpo\.build_preferences: a flip_rate must be 0 or more and less than 0\.5"):
        stack.build_preferences(pairs)


def test_a_rate_that_is_missing_for_some_pair_is_refused() -> None:
    pairs = make_pairs([2, 2], [2, 2], columns={"flip_rate": [0.1, None]})
    with pytest.raises(HookError, match="one number for each pair"):
        start([{"rdpo": {"per_pair": True}}]).build_preferences(pairs)


def test_the_column_is_needed_where_it_is_asked_for() -> None:
    trainer = Trainer("local", binds=BINDS, columns=frozenset({"ref_log_probs"}))
    start(["rdpo"], trainer=trainer)
    with pytest.raises(StackError, match="flip_rate"):
        start([{"rdpo": {"per_pair": True}}], trainer=trainer)


# edges


@pytest.mark.parametrize(
    "options", [{"eps": 0.5}, {"eps": -0.1}, {"eps": 0.7}, {"beta": 0.0}, {"beta": math.inf}, {"gamma": 1}]
)
def test_values_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="rdpo"):
        start([{"rdpo": options}])


def test_an_empty_response_has_a_log_ratio_of_zero() -> None:
    pairs = make_pairs([2, 0], [0, 2])
    policy = {side: torch.full((2, 2), -1.0) for side in SIDES}
    reference = {side: torch.full((2, 2), -3.0) for side in SIDES}
    loss, _ = run(pairs, policy, reference, eps=0.0, beta=1.0)
    expected = (math.log1p(math.exp(-4)) + math.log1p(math.exp(4))) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("where", ["policy", "reference"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_pair_with_a_log_prob_that_is_not_finite_is_left_out(where: str, value: float) -> None:
    pairs, policy, reference = random_case(11)
    pairs = make_pairs([3] * 5, [4] * 5)
    for values in (policy, reference):
        values |= {side: torch.randn(5, 4, dtype=torch.float64) for side in SIDES}
    rest = torch.tensor([0, 1, 3, 4])
    alone, _ = run(pairs.select(rest), *({s: v[rest] for s, v in x.items()} for x in (policy, reference)), eps=0.2)
    broken = policy if where == "policy" else reference
    broken["rejected"][2, 1] = value
    loss, gradient = run(pairs, policy, reference, eps=0.2)
    counted = 5 if where == "policy" else 4  # a trainer that can makes the mini-batch again without the pair
    assert float(loss) * counted == pytest.approx(float(alone) * 4, rel=1e-9)
    assert not gradient["chosen"][2].any() and bool(torch.isfinite(gradient["rejected"]).all())


def test_what_is_outside_of_a_response_is_not_read() -> None:
    pairs, policy, reference = random_case(2)
    loss, _ = run(pairs, policy, reference)
    for values in (policy, reference):
        values["chosen"] = torch.where(pairs.chosen_mask, values["chosen"], math.nan)
    again, gradient = run(pairs, policy, reference)
    assert float(again) == float(loss)
    assert bool(gradient["chosen"].isfinite().all())


@few
@given(seed=seeds, parts=st.sampled_from([2, 3, 5]))
def test_micro_batches_change_nothing(seed: int, parts: int) -> None:
    pairs, policy, reference = random_case(seed)
    whole, gradient = run(pairs, policy, reference, eps=0.3)
    cut, parted = run(pairs, policy, reference, parts, eps=0.3)
    assert float(whole) == pytest.approx(float(cut), rel=1e-9)
    for side in SIDES:
        torch.testing.assert_close(gradient[side], parted[side])


def test_it_counts_the_pairs_with_a_negative_loss() -> None:
    pairs, nothing = make_pairs([1, 1], [1, 1]), {side: torch.zeros(2, 1) for side in SIDES}
    stack = start(["rdpo"])
    pair_loss_and_gradient(stack, pairs, nothing | {"chosen": torch.tensor([[100.0], [0.0]])}, nothing)
    metrics = stack.metrics.as_dict()
    assert metrics["rlplugins/rdpo/negative_loss"] == 0.5
    assert metrics["rlplugins/rdpo/chosen_reward"] == pytest.approx(5.0)


def test_weights_of_tokens_count_in_the_log_ratios() -> None:
    pairs, policy, reference = random_case(4)
    plain, _ = run(pairs, policy, reference)
    for side in SIDES:
        setattr(pairs, f"{side}_token_weights", torch.full(pairs.chosen_mask.shape, 2.0))
    twice, _ = run(pairs, policy, reference)
    stronger, _ = run(random_case(4)[0], policy, reference, beta=0.2)
    assert float(twice) == pytest.approx(float(stronger), rel=1e-9) and float(twice) != float(plain)


def test_it_has_no_place_beside_a_method_that_draws_its_responses() -> None:
    with pytest.raises(StackError, match="trains on preferences"):
        start(["rdpo", "grpo"])
    assert Rdpo(eps=0.2).configuration() == {"eps": 0.2, "beta": 0.1, "per_pair": False}


# what every plugin must do


def with_rates(pairs: Pairs) -> Pairs:
    """The kit's pairs with a flip rate each."""
    pairs.columns["flip_rate"] = pairs.prompt_keys.remainder(5) / 11
    pairs.columns.written.discard("flip_rate")  # it is one of the data
    return pairs


test_conformance = conformance("rdpo", [{}, {"eps": 0.3}, {"per_pair": True}], rows=with_rates)
