"""Facts about dynamic reward weighting: first the card's numbers, then each mode through the stack."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.hookspecs import HOOKS
from rlplugins.plugin import make
from rlplugins.services import Gradients
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_dynamic_reward_weighting import (
    DynamicRewardWeighting,
    clarity,
    contribution,
    front,
    hypervolume,
    influences,
    mirror_step,
)

NAME = "dynamic-reward-weighting"
NAN = float("nan")
VECTOR = {"accuracy": "max", "length": "min", "format": "max"}
REFERENCE = {"accuracy": 0.5, "length": 600.0, "format": 0.4}
VALIDATIONS = [[0.55, 580.0, 0.5], [0.54, 590.0, 0.45], [0.6, 610.0, 0.6], [0.58, 560.0, 0.42]]
PARTS = [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0]]
W = {"accuracy": 0.334, "concise": 0.333, "clarity": 0.333}
G = [[0.6, -0.2, 0.1, 0.4], [-0.1, 0.3, 0.0, -0.2], [0.2, 0.1, -0.5, 0.3]]


def with_parts(rollouts, parts, names=tuple(W)):
    """The rows with these components (B, K)."""
    return replace(rollouts, components=torch.tensor(parts, dtype=torch.float32), component_names=tuple(names))


def rows(parts=PARTS, groups=None, names=tuple(W), **fields):
    return with_parts(make_rollouts([0.0] * len(parts), groups, **fields), parts, names)


def metrics_of(stack):
    """What the plugin has logged, by the short names."""
    return {name.split("/", 2)[2]: value for name, value in stack.metrics.as_dict().items() if f"/{NAME}/" in name}


def state_of(stack):
    return next(plugin for plugin in stack.plugins if plugin.name == NAME).state


# hypervolume mode


def by_hypervolume(*others, lines=None, **options):
    """A started stack with the card's weights and metrics."""
    options = {"weights": W, "validation": VECTOR, "reference": REFERENCE} | options
    return start([{NAME: options}, *others], **(lines or {}))


def validated(stack, vector):
    """Tell the stack of a validation; D and the meta reward that were logged."""
    stack.begin_step(stack.step.number + 1, 10)
    stack.validated(dict(zip(VECTOR, vector, strict=True)))
    found = metrics_of(stack)
    return found["meta"], found["contribution"]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ({}, [[0.649501992, 0.1], [0.5, 0.0], [0.5, 0.0], [0.565957441, 0.044]]),
        ({"length": 100.0}, [[0.5015, 0.001], [0.5, 0.0], [0.5, 0.0], [0.50066, 0.00044]]),
    ],
)
def test_the_worked_example_of_the_hypervolume_mode(scale, expected):
    stack = by_hypervolume(scale=scale)
    for vector, (meta, added) in zip(VALIDATIONS, expected, strict=True):
        assert validated(stack, vector) == pytest.approx((meta, added), abs=1e-6 if scale else 1e-9)
        assert state_of(stack).meta == pytest.approx(meta, abs=1e-6)
    assert len(state_of(stack).points) == 2


def test_the_worked_example_of_the_rewards():
    stack = by_hypervolume(scale={"length": 100.0})
    validated(stack, VALIDATIONS[0])
    rewards = stack.credit(rows()).rewards.flatten()
    assert rewards.tolist() == pytest.approx([0.3345005, 0.333999, 0.3345005, 0.0], abs=1e-7)


def test_grpo_cannot_see_the_meta_reward():
    lines = {"owners": {"advantage_scale": "group_std"}, "allow": ["reward_scale"]}
    stack = by_hypervolume(lines=lines, scale={"length": 100.0})
    before = stack.credit(rows()).advantages.flatten().tolist()
    assert before == pytest.approx([0.500997996, 0.497998008, 0.500997996, -1.499994], abs=1e-6)
    validated(stack, VALIDATIONS[0])
    after = stack.credit(rows()).advantages.flatten().tolist()
    assert after == pytest.approx([0.500996502, 0.497996523, 0.500996502, -1.49998953], abs=1e-6)


def test_the_first_step_has_the_plain_weighted_sum():
    plain = credit(["rloo"], rows(), owners={"combine_rewards": {"weighted_sum": {"weights": list(W.values())}}})
    found = by_hypervolume("rloo").credit(rows())
    assert torch.equal(found.rewards, plain.rewards) and torch.equal(found.advantages, plain.advantages)


def test_the_meta_reward_is_a_factor_on_the_advantages():
    stack = by_hypervolume("rloo")
    before = stack.credit(rows()).advantages
    meta, _ = validated(stack, VALIDATIONS[0])
    assert meta != 1
    torch.testing.assert_close(stack.credit(rows()).advantages, meta * before)


def test_the_rewards_have_the_meta_reward_of_the_last_validation():
    stack = by_hypervolume()
    for vector in VALIDATIONS:
        meta, _ = validated(stack, vector)
        torch.testing.assert_close(stack.credit(rows()).rewards[0, 0], torch.tensor(meta * 0.667))


def test_without_a_reference_the_first_validation_is_one():
    given, found = by_hypervolume(), by_hypervolume(reference=None)
    found.validated(REFERENCE)
    assert state_of(found).meta == 1 and metrics_of(found) == {} and state_of(found).points == []
    for vector in VALIDATIONS:
        assert validated(found, vector) == validated(given, vector)


@pytest.mark.parametrize("metrics", [{}, REFERENCE | {"format": NAN}, REFERENCE | {"length": -math.inf}])
def test_a_validation_that_says_nothing_keeps_the_meta_reward(metrics):
    stack = by_hypervolume()
    validated(stack, VALIDATIONS[0])
    before = state_of(stack).as_dict()
    stack.validated(metrics)
    assert state_of(stack).as_dict() == before
    fresh = by_hypervolume(reference=None)
    fresh.validated(metrics)
    assert state_of(fresh).reference is None


def test_a_metric_that_the_validation_lacks_is_named_beside_those_that_are_there():
    stack = by_hypervolume(validation={"accuracy": "max", "lengths": "min"}, reference=None)
    text = rf"{NAME}\.validation: there is no metric 'lengths'; the validation gave: accuracy, format, length"
    with pytest.raises(ConfigurationError, match=text):
        stack.validated(REFERENCE)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-2, 2)] * 3), min_size=1, max_size=6))
def test_the_meta_reward_lies_between_a_half_and_two(vectors):
    stack = by_hypervolume()
    for vector in vectors:
        meta, added = validated(stack, vector)
        assert 0.5 <= meta <= 2 and added >= 0 and (meta == 0.5 or added > 0)


def test_a_large_contribution_saturates():
    assert validated(by_hypervolume(), [0.9, 100.0, 0.9])[0] == pytest.approx(2, abs=1e-9)


def test_division_by_a_deviation_is_refused():
    Stack([by_hypervolume().plugins[0], "rloo"])
    with pytest.raises(StackError, match=rf"advantage_scale.*{NAME}.*grpo"):
        Stack([NAME, "grpo"])
    with pytest.raises(StackError, match=rf"reward_scale.*{NAME} assumes it, other breaks it"):
        Stack([NAME, stand_in(breaks=["reward_scale"])])
    Stack([{NAME: {"mode": "gradient"}}, "grpo", stand_in(breaks=["reward_scale"])])


def test_rewards_up_to_two_are_no_unit_rewards():
    with pytest.raises(StackError, match=rf"unit_rewards.*other assumes it, {NAME} breaks it"):
        Stack([NAME, stand_in(assumes=["unit_rewards"])])
    Stack([{NAME: {"mode": "gradient"}}, stand_in(assumes=["unit_rewards"])])


def test_what_the_trainer_must_give():
    bare = Trainer("bare", binds=frozenset(HOOKS), columns=frozenset())
    with pytest.raises(StackError, match=rf"{NAME} needs validation after every step"):
        Stack([NAME], trainer=bare)
    with pytest.raises(StackError, match=rf"{NAME} needs loss gradients before the update"):
        Stack([{NAME: {"mode": "gradient", "clip_ratio": None}}], trainer=bare)
    with pytest.raises(StackError, match=rf"{NAME} needs column 'components'"):
        Stack([NAME], trainer=bare)
    able = replace(bare, provides=frozenset({"validation_every_step"}))
    Stack([{NAME: {"weights": {"score": 0.5, "conciseness": 0.5}}}], trainer=able)


def test_another_owner_of_the_rewards_is_refused():
    class Owner(Plugin):
        name = "owner"

        @hookimpl
        def combine_rewards(self, scores):
            return scores

    for mode in ("hypervolume", "gradient"):
        with pytest.raises(StackError, match="combine_rewards has one owner"):
            Stack([{NAME: {"mode": mode}}, Owner()])


# the volume


def by_inclusion_and_exclusion(points, reference):
    """The volume of a union from those of all intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            sides = np.clip(np.min(chosen, axis=0) - reference, 0, None)
            total -= (-1) ** size * float(sides.prod())
    return total


def clouds(values):
    """Points (N, K), K = 1 to 4, and a reference."""
    return st.integers(1, 4).flatmap(
        lambda k: st.tuples(
            st.lists(st.tuples(*[values] * k), max_size=6).map(lambda rows: np.array(rows, dtype=float).reshape(-1, k)),
            st.tuples(*[values] * k).map(lambda row: np.array(row, dtype=float)),
        )
    )


COORDINATES = st.one_of(st.integers(-2, 3).map(float), st.floats(-2, 3, width=32))


@settings(max_examples=100, deadline=None)
@given(clouds(COORDINATES))
def test_the_volume_is_that_of_inclusion_and_exclusion(cloud):
    points, reference = cloud
    expected = by_inclusion_and_exclusion(list(points), reference)
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-9, rel=1e-9)
    assert hypervolume(points[::-1], reference) == pytest.approx(expected, abs=1e-9, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(clouds(COORDINATES))
def test_what_a_point_adds_is_the_difference_of_two_volumes(cloud):
    points, reference = cloud
    if len(points):
        added = contribution(points[0], points[1:], reference)
        difference = hypervolume(points, reference) - hypervolume(points[1:], reference)
        assert added == pytest.approx(difference, abs=1e-9, rel=1e-9) and added >= 0
        assert contribution(points[0], points, reference) == 0  # it is there already


@settings(max_examples=60, deadline=None)
@given(clouds(st.integers(-2, 3)))
def test_the_front_is_what_no_other_point_reaches(cloud):
    points, _ = cloud
    found = front(points)
    for point in points:
        others = [other for other in points if (other >= point).all() and (other > point).any()]
        assert any((point == kept).all() for kept in found) == (not others)
    assert len(found) == len({tuple(point) for point in found})


def test_a_point_below_the_reference_in_one_objective_adds_nothing():
    assert contribution(np.array([5.0, 1.0, 5.0]), np.zeros((0, 3)), np.array([0.0, 1.0, 0.0])) == 0
    assert contribution(np.array([5.0, -1.0, -5.0]), np.zeros((0, 3)), np.zeros(3)) == 0


# gradient mode


class Engine:
    """Gives the Gram matrix of these vectors, one per objective, and remembers what it was asked for.

    Args:
        vectors: (K, N) gradients over the parameters that are compared.
        norms: over all parameters; by default those of the vectors.
        learning_rates: of the steps, the last one for all that follow.
    """

    def __init__(self, vectors, norms=None, learning_rates=(1e-6,)):
        self.vectors = torch.tensor(vectors, dtype=torch.float64)
        self.norms = self.vectors.norm(dim=1) if norms is None else torch.tensor(norms, dtype=torch.float64)
        self.learning_rates = list(learning_rates)
        self.asked = []

    def gradient_products(self, rollouts, advantages, *, parameters=None):
        self.asked.append((advantages, parameters))
        rate = self.learning_rates[min(len(self.asked), len(self.learning_rates)) - 1]
        return Gradients(self.vectors @ self.vectors.T, self.norms, rate)


def by_gradients(*others, lines=None, **options):
    return start([{NAME: {"mode": "gradient", "weights": W} | options}, *others], **(lines or {}))


def stepped(stack, engine, rollouts=None):
    """A step, whose credit is returned."""
    rollouts = rows() if rollouts is None else rollouts
    stack.begin_step(stack.step.number + 1, 10)
    made = stack.credit(rollouts, engine)
    stack.end_step(rollouts, made, engine)
    return made


def test_the_worked_example_of_the_gradient_mode():
    stack, engine = by_gradients(), Engine(G)
    for expected in ([0.341497243, 0.319047854, 0.339454903], [0.348856486, 0.305412133, 0.345731381]):
        made = stepped(stack, engine)
        assert state_of(stack).w.tolist() == pytest.approx(expected, abs=1e-9)
        rewards = torch.tensor(PARTS).float() @ torch.tensor(expected)  # of this step's weights, not the last one's
        torch.testing.assert_close(made.rewards[:, 0], rewards)
        found = metrics_of(stack)
        assert [found[f"influence/{name}"] for name in W] == pytest.approx([0.54, -0.11, 0.51], abs=1e-9)
        assert [found[f"weight/{name}"] for name in W] == pytest.approx(expected, abs=1e-9)
        assert [found[f"gradient_norm/{name}"] for name in W] == pytest.approx(engine.norms.tolist())


def test_the_engine_is_asked_for_the_advantages_of_each_objective_alone():
    stack, engine = by_gradients("grpo"), Engine(G)
    stepped(stack, engine)
    (asked, parameters) = engine.asked[0]
    for k, advantages in enumerate(asked):
        alone = credit(["grpo"], make_rollouts([row[k] for row in PARTS])).advantages
        torch.testing.assert_close(advantages, alone)
    assert re.search(parameters, "model.layers.10.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("layers", "yes", "no"),
    [
        ([10, 2], ["model.layers.10.mlp.w", "model.layers.2.w", "transformer.h.2.attn.w"],
         ["model.layers.1.w", "model.layers.102.w", "model.layers.12.w", "model.sublayers.10.w", "lm_head.w"]),
        (None, ["lm_head.w", "model.layers.0.w"], []),
        ("lora_A", ["model.layers.3.q_proj.lora_A.weight"], ["model.layers.3.q_proj.weight"]),
    ],
)  # fmt: skip
def test_the_parameters_that_are_compared(layers, yes, no):
    stack, engine = by_gradients(target_layers=layers), Engine(G)
    stepped(stack, engine)
    parameters = engine.asked[0][1]
    assert all(parameters is None or re.search(parameters, name) for name in yes)
    assert not any(re.search(parameters or "", name) for name in no)


def test_influences_are_averaged_before_the_weights_move():
    stack, other = by_gradients(weight_accumulation_steps=2), np.array(G)[::-1] / 2
    first, second = Engine(G), Engine(other, learning_rates=[3e-6])
    before = state_of(stack).w
    stepped(stack, first)
    assert torch.equal(state_of(stack).w, before) and state_of(stack).influences == 1
    stepped(stack, second)
    mean = sum(influences(engine.gradient_products(None, []), 1, 1) for engine in (first, second)) / 2
    torch.testing.assert_close(state_of(stack).w, mirror_step(before, mean, 0.3))  # the learning rate of this step
    assert state_of(stack).influences == 0 and not state_of(stack).influence.any()


def test_the_step_of_the_weights_follows_the_learning_rate():
    stack, engine = by_gradients(mu=2e-5), Engine(G, learning_rates=[0.0, 4e-6])
    before = state_of(stack).w
    stepped(stack, engine)
    torch.testing.assert_close(state_of(stack).w, before)
    stepped(stack, engine)
    influence = influences(engine.gradient_products(None, []), 1, 1)
    torch.testing.assert_close(state_of(stack).w, mirror_step(before, influence, 0.2))


VECTORS = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 5), min_size=k, max_size=k)
)
FACTORS = st.sampled_from([0.25, 1.0, 8.0])
CLIPS = st.sampled_from([None, 0.5, 1.0, 20.0])


@settings(max_examples=50, deadline=None)
@given(VECTORS, FACTORS, CLIPS)
def test_influences_are_those_of_scaled_and_clipped_gradients(vectors, scale, clip):
    g = scale * torch.tensor(vectors, dtype=torch.float64)
    whole = g.norm(dim=1, keepdim=True)  # over all five parameters, of which three are compared
    clipped = g if clip is None else g * (clip / whole.clamp(min=1e-300)).clamp(max=1)
    compared = torch.tensor(vectors, dtype=torch.float64)[:, :3]
    given = Gradients(compared @ compared.T, whole.flatten() / scale, 1e-6)
    expected = clipped[:, :3] @ clipped[:, :3].sum(0)
    torch.testing.assert_close(influences(given, scale, clip), expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "scale", "clip"),
    [({}, 1, 1), ({"gradient_scale": 8.0, "grad_clip": 0.5}, 8, 0.5), ({"grad_clip": None}, 1, None)],
)
def test_gradients_are_scaled_and_clipped_as_configured(options, scale, clip):
    stack, engine = by_gradients(**options), Engine([[3.0, 0.0], [0.1, 0.2], [0.0, -0.9]], norms=[4.0, 0.3, 0.9])
    stepped(stack, engine)
    expected = influences(engine.gradient_products(None, []), scale, clip)
    found = metrics_of(stack)
    assert [found[f"influence/{name}"] for name in W] == pytest.approx(expected.tolist())


@settings(max_examples=40, deadline=None)
@given(VECTORS, st.floats(1e-3, 0.2), st.data())
def test_weights_stay_on_the_simplex_and_move_boundedly(vectors, rate, data):
    K = len(vectors)
    w = torch.tensor(data.draw(st.lists(st.floats(0.01, 1), min_size=K, max_size=K)), dtype=torch.float64)
    w = w / w.sum()
    influence = influences(Engine(vectors).gradient_products(None, []), 1, 1)
    assert bool((influence.abs() <= K + 1e-9).all())
    new = mirror_step(w, influence, rate)
    assert bool((new > 0).all()) and float(new.sum()) == pytest.approx(1)
    moved = (new.log() - w.log())[:, None] - (new.log() - w.log())
    assert float(moved.abs().max()) <= 2 * K * rate + 1e-9


@pytest.mark.parametrize("vectors", [[[0.0, 0.0]] * 3, [[0.3, -0.2]] * 3, [[5.0, -2.0]] * 3])
def test_zero_and_identical_gradients_leave_the_weights(vectors):
    stack = by_gradients()
    before = state_of(stack).w
    stepped(stack, Engine(vectors))
    torch.testing.assert_close(state_of(stack).w, before)


def test_of_orthogonal_gradients_the_steepest_gains():
    vectors = [[0.1, 0, 0], [0, 0.5, 0], [0, 0, 0.3]]
    influence = influences(Engine(vectors).gradient_products(None, []), 1, 1)
    assert influence.tolist() == pytest.approx([0.01, 0.25, 0.09])
    stack = by_gradients()
    stepped(stack, Engine(vectors))
    gained = state_of(stack).w / torch.tensor(list(W.values()), dtype=torch.float64)
    assert gained.argmax() == 1 and gained.argmin() == 0


def test_an_infinite_mu_keeps_the_weights():
    stack = by_gradients(mu=math.inf)
    before = state_of(stack).w
    stepped(stack, Engine(G))
    torch.testing.assert_close(state_of(stack).w, before)


def test_a_single_objective_is_the_plain_trainer():
    rollouts = make_rollouts([1.0, 0.5, 0.0, 0.0])
    found = stepped(by_gradients("grpo", weights={"score": 1.0}), Engine([[0.4, 0.2]]), rollouts)
    plain = credit(["grpo"], rollouts)
    assert torch.equal(found.rewards, plain.rewards) and torch.equal(found.advantages, plain.advantages)


def test_ratios_are_not_clipped_unless_the_stack_says_so():
    def slope(*others, **options):
        stack = by_gradients(*others, **options)
        rollouts = rows()
        mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts, Engine(G))))
        log_probs = (rollouts.old_log_probs + math.log(60.0)).requires_grad_()
        mini.loss(log_probs).total.backward()
        return float(log_probs.grad[0].abs().sum())  # of a row with a positive advantage

    assert slope() > 0 and slope(clip_ratio=50.0) == 0 and slope(clip_ratio=None) == 0
    with pytest.raises(StackError, match="clip_range has one owner"):
        by_gradients("bapo")
    by_gradients("bapo", clip_ratio=None)


# the objectives


def lengths_of(*sizes, **fields):
    return make_rollouts([0.0] * len(sizes), lengths=list(sizes), **fields)


def concise(**options):
    return by_hypervolume(weights={"conciseness": 1.0}, **options)


def test_the_worked_example_of_conciseness():
    stack = concise()
    rollouts = lengths_of(*[125] * 8)
    stack.end_step(rollouts, stack.credit(rollouts))
    assert (state_of(stack).tokens, state_of(stack).responses) == (1000.0, 8)
    rollouts = lengths_of(100, 220, 180, 60)
    stack.begin_step(1, 10)
    for _ in range(2):  # the mean is a function of the step, however often it is asked for
        assert stack.credit(rollouts).rewards.flatten().tolist() == [1.0, 0.0, 0.0, 1.0]
    assert metrics_of(stack)["mean_length"] == 130.0
    stack.end_step(rollouts, stack.credit(rollouts))
    assert (state_of(stack).tokens, state_of(stack).responses) == (1560.0, 12)


@pytest.mark.parametrize(
    ("sizes", "expected"), [([5], [0]), ([4, 4, 4], [0, 0, 0]), ([0, 4], [1, 0]), ([0, 0], [0, 0])]
)
def test_a_response_as_long_as_the_mean_is_not_concise(sizes, expected):
    assert concise().credit(lengths_of(*sizes, tokens=6)).rewards.flatten().tolist() == expected


def test_only_the_policys_own_rows_make_the_mean():
    kinds = {"kinds": ("policy", "elsewhere"), "kind": torch.tensor([0, 0, 1], dtype=torch.int8)}
    stack = concise()
    rollouts = lengths_of(2, 4, 90, **kinds)
    made = stack.credit(rollouts)
    assert made.rewards.flatten().tolist() == [1.0, 0.0, 0.0]
    stack.end_step(rollouts, made)
    assert (state_of(stack).tokens, state_of(stack).responses) == (6.0, 2)


def test_a_step_without_rewards_is_not_remembered():
    stack = by_gradients(weights={"conciseness": 1.0})
    before = {name: value for name, value in state_of(stack).as_dict().items() if name != "w"}
    stack.end_step(lengths_of(2, 4), None)
    after = state_of(stack).as_dict()
    assert {name: after[name] for name in before} == before


def test_conciseness_can_be_a_component():
    names = ("conciseness", "accuracy")
    stack = by_hypervolume(weights=dict.fromkeys(names, 0.5), conciseness=False)
    rollouts = rows([[0.25, 1.0], [0.75, 0.0]], names=names, lengths=[1, 4])
    assert stack.credit(rollouts).rewards.flatten().tolist() == [0.625, 0.375]
    assert "tokens" not in state_of(stack).as_dict()


def test_the_score_is_an_objective_too_and_the_order_of_components_is_free():
    stack = by_hypervolume(weights={"clarity": 0.25, "score": 0.25, "accuracy": 0.5})
    rollouts = with_parts(make_rollouts([3.0, 0.0]), [[1, 9, 0], [0, 9, 1]])
    assert stack.credit(rollouts).rewards.flatten().tolist() == [1.25, 0.25]


@pytest.mark.parametrize("rollouts", [make_rollouts([0.0, 1.0]), rows(names=("accuracy", "concise", "format"))])
def test_a_component_that_is_missing_is_named_beside_those_that_are_there(rollouts):
    there = "accuracy, concise, format, conciseness, score" if rollouts.component_names else "conciseness, score"
    text = rf"no component '(accuracy|clarity)'; there are: {there}$"
    with pytest.raises(ConfigurationError, match=text):
        by_hypervolume().credit(rollouts)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_row_that_lacks_an_objective_is_out(bad):
    parts, whole = [*PARTS[:2], [1, bad, 1], PARTS[3]], [*PARTS[:2], PARTS[3]]
    for stack, engine in ((by_hypervolume("rloo"), None), (by_gradients("rloo"), Engine(G))):
        made = stack.credit(rows(parts), engine)
        assert made.weights.flatten().tolist() == [1, 1, 0, 1] and made.groups.tolist() == [0, 0, -1, 0]
        others = stack.credit(rows(whole), engine).advantages
        torch.testing.assert_close(made.advantages[[0, 1, 3]], others)
    for advantages in engine.asked[0][0]:  # of every objective, also those that the row has
        assert advantages[2] == 0


def test_a_group_of_one_and_equal_rewards_have_no_advantage():
    for parts, groups in (([[1, 1, 1]], [0]), ([[1, 0, 1]] * 3, [0, 0, 0])):
        for stack, engine in ((by_hypervolume("rloo"), None), (by_gradients("rloo"), Engine(G))):
            assert stack.credit(rows(parts, groups), engine).advantages.abs().max() < 1e-6


BOX = r" so \boxed{42}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. add\n2. carry" + BOX, 1), ("a) add b) carry" + BOX, 1), ("(i) add\n(ii) carry" + BOX, 1),
        ("- add\n* carry" + BOX, 1), ("Step 1: add. Step 2: carry." + BOX, 1), ("First add, then carry." + BOX, 1),
        ("1. add" + BOX, 0), ("1. add and then carry" + BOX, 0), ("add and carry" + BOX, 0),
        ("1. add\n2. carry so 42", 0), (r"1. add 2. carry \boxed{ }", 0), (r"1. add 2. carry \boxed{42", 0),
        ("firsts and thence" + BOX, 0), ("strengthen a heathen" + BOX, 0), ("A) add B) carry" + BOX, 1),
        ("1.5 and 2.5" + BOX, 1), ("12) 13)" + BOX, 1), ("x1. y2." + BOX, 0),
        ("NEXT add\nNEXT carry" + BOX, 1), ("", 0),
    ],
)  # fmt: skip
def test_clarity(text, expected):
    assert clarity(text) == expected


# state


def test_a_restored_run_goes_on_exactly(tmp_path):
    stacks = [by_hypervolume("rloo", weights={"clarity": 0.5, "conciseness": 0.5}, reference=None) for _ in range(2)]
    rollouts = rows(lengths=[1, 2, 3, 4])
    stepped(stacks[0], None, rollouts)
    for vector in (list(REFERENCE.values()), VALIDATIONS[0]):
        stacks[0].validated(dict(zip(VECTOR, vector, strict=True)))
    stacks[0].save(tmp_path / "hypervolume", 1)
    assert stacks[1].load(tmp_path / "hypervolume") == 1
    later = rows(lengths=[4, 4, 1, 2])
    made = [stepped(stack, None, later).rewards for stack in stacks]
    assert torch.equal(*made) and made[0].max() != 1
    assert validated(stacks[0], VALIDATIONS[3]) == validated(stacks[1], VALIDATIONS[3])
    assert state_of(stacks[0]).as_dict() == state_of(stacks[1]).as_dict()

    stacks = [by_gradients(weight_accumulation_steps=2) for _ in range(2)]
    for _ in range(3):
        stepped(stacks[0], Engine(G))
    stacks[0].save(tmp_path / "gradient", 3)
    stacks[1].load(tmp_path / "gradient")
    for stack in stacks:
        stepped(stack, Engine(G))
    assert torch.equal(state_of(stacks[0]).w, state_of(stacks[1]).w)


# configuration


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "pareto"}, "mode"), ({"weights": {"a": 0.5}}, "weights"), ({"weights": {}}, "weights"),
        ({"weights": {"a": 1.5, "b": -0.5}}, r"weights\.a"), ({"weights": {"a": NAN}}, "weights"),
        ({"mode": "gradient", "weights": {"a": 1.0, "b": 0.0}}, "weights"),
        ({"validation": {}}, "validation"), ({"validation": {"a": "up"}}, r"validation\.a"),
        ({"scale": {"validation/response_length": 0}}, "scale"), ({"scale": {"length": 100}}, "scale: 'length'"),
        ({"reference": {"length": 1.0}}, "reference"),
        ({"validation": {"a": "max"}, "reference": {"a": math.inf}}, "reference"),
        ({"mu": 0}, "mu"), ({"weight_accumulation_steps": 0}, "weight_accumulation_steps"),
        ({"target_layers": []}, "target_layers"), ({"target_layers": [-1]}, "target_layers"),
        ({"target_layers": "(("}, "target_layers"), ({"grad_clip": 0}, "grad_clip"),
        ({"gradient_scale": -1}, "gradient_scale"), ({"clip_ratio": 0}, "clip_ratio"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options, named):
    with pytest.raises(ConfigurationError, match=rf"{NAME}[.:] ?{named}"):
        make(DynamicRewardWeighting, options)


def test_a_weight_of_zero_is_allowed_where_weights_are_fixed():
    make(DynamicRewardWeighting, {"weights": {"a": 1.0, "b": 0.0}})


# what every plugin must do


def kit_rows(rollouts):
    """Three components that are functions of the row's own score and first token."""
    score, first = rollouts.scores, rollouts.responses[:, :1]
    parts = [torch.where(score.isnan(), NAN, score > 0.5), 1.0 * (first % 2), score]
    return replace(rollouts, components=torch.cat(parts, 1), component_names=("accuracy", "clarity", "length"))


KIT = {"validation": {"reward": "max", "entropy": "min"}, "reference": {"reward": 0.1, "entropy": 0.9}}

test_conformance = conformance(
    "dynamic-reward-weighting",
    [KIT, {**KIT, "weights": {"accuracy": 0.5, "score": 0.5}, "reference": None}, {"mode": "gradient"},
     {"mode": "gradient", "weights": {"clarity": 0.5, "length": 0.5}, "weight_accumulation_steps": 2, "clip_ratio": None},
     {"mode": "gradient", "weights": {"accuracy": 0.5, "conciseness": 0.5}, "grad_clip": None}],
    rows=kit_rows,
)  # fmt: skip
