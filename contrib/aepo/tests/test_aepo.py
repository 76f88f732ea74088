"""Facts about AEPO, through the stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.defaults import EntropyBonus
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Sampling
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_aepo import Aepo, controller_advantages

MAIN_REWARDS = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
MAIN_GROUP = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]
MAIN_ADVANTAGE = [
    0.866023904, -0.866023904, -0.866023904, 0.866023904, 0.0, 0.0, 0.0, 0.0, -0.499999, -0.499999, -0.499999, 1.499997,
    -0.499999, 1.499997, -0.499999, -0.499999,
]  # fmt: skip
CONTROLLER_REWARDS = [1.0, 0.0, 1.0, 1.0]
PREV_LOGP = [[-0.2, -0.6, -1.1], [-0.05, -0.4, 0.0]]
PREV_MASK = [[1, 1, 1], [1, 1, 0]]


class Engine:
    """Gives these scores to whatever it is asked for, again and again, and remembers what it was asked for."""

    def __init__(self, scores=CONTROLLER_REWARDS, **fields):
        self.scores = list(scores)
        self.fields = fields
        self.asked = []

    def sampling(self, rows):
        return Sampling.of(rows, 1.0, 16, 0.99)

    def generate(self, requests, sampling=None, *, score=True, greedy=False):
        self.asked.append((requests, sampling))
        times = -(-len(requests) // len(self.scores))
        scores = (self.scores * times)[: len(requests)]
        made = make_rollouts(scores, requests.prompt, tokens=3, pool=requests.prompts, **self.fields)
        return replace(made, prompts=[[9]] * len(made))  # as only the controller's rows have


def main_rows(rewards=MAIN_REWARDS, group=MAIN_GROUP, **fields):
    return make_rollouts(rewards, group, tokens=3, **fields)


def opened(options=None, entropy=None, plugins=("grpo",), **settings):
    """A stack in its second step; the first left this entropy, or the one of the worked example."""
    stack = start([*plugins, {"aepo": options or {}}], pool=make_pool(64), **settings)
    log_probs = torch.tensor(PREV_LOGP) if entropy is None else torch.full((2, 3), -entropy)
    trained = make_rollouts([1.0, 0.0], mask=PREV_MASK, old_log_probs=log_probs * torch.tensor(PREV_MASK))
    stack.end_step(trained, stack.credit(trained))
    stack.begin_step(1, 10)
    return stack


def aepo_of(stack):
    return next(plugin for plugin in stack.plugins if plugin.name == "aepo")


def trained_rows(stack, rollouts, engine):
    """The batch as the update counts it, controller rows first: names of rows, and their advantages."""
    extended = stack.extend_rollouts(rollouts, engine)
    made = stack.credit(extended)
    added = extended.of_kind("controller")
    weights = torch.ones(len(extended)) if made.weights is None else made.weights.flatten()
    order = torch.cat([added.nonzero().flatten(), (~added & (weights > 0)).nonzero().flatten()])
    names = [("ctl" if added[row] else "main", row) for row in order.tolist()]
    return names, made.advantages.flatten()[order].tolist(), extended


# the worked example


def test_the_worked_example():
    stack, engine = opened(), Engine()
    assert aepo_of(stack).state.entropy == pytest.approx(0.47, abs=1e-7)
    names, advantages, extended = trained_rows(stack, main_rows(), engine)
    requests, sampling = engine.asked[0]
    assert len(engine.asked) == 1 and requests.texts == ["prompt 0"] * 4
    assert sampling.temperature.tolist() == [pytest.approx(1.2)] * 4
    assert sampling.top_p.tolist() == [pytest.approx(0.99)] * 4 and sampling.max_tokens.tolist() == [16] * 4
    assert names == [("ctl", 16), ("ctl", 17), ("ctl", 18), *(("main", row) for row in range(3, 16))]
    assert advantages == pytest.approx([1.0, 1.0, 1.0, *MAIN_ADVANTAGE[3:]], abs=1e-6)
    assert extended.scores[16:].flatten().tolist() == [1.0, 1.0, 1.0]
    assert extended.groups[16:].tolist() == [-1, -1, -1]
    assert stack.metrics.as_dict()["rlplugins/aepo/replaced"] == 3


def test_the_worked_advantages():
    assert credit(["grpo"], main_rows()).advantages.flatten().tolist() == pytest.approx(MAIN_ADVANTAGE, abs=1e-6)
    C = controller_advantages(torch.tensor(CONTROLLER_REWARDS)[:, None], torch.zeros(4, dtype=torch.int64))
    assert C.flatten().tolist() == pytest.approx([0.499999, -1.499997, 0.499999, 0.499999], abs=1e-6)


def test_the_worked_example_above_the_target():
    stack, engine = opened(entropy=0.7), Engine()
    names, advantages, _ = trained_rows(stack, main_rows(), engine)
    assert engine.asked[0][1].temperature.tolist() == [pytest.approx(0.8)] * 4
    assert names == [("ctl", 16), *(("main", row) for row in range(1, 16))]
    assert advantages == pytest.approx([1.0, *MAIN_ADVANTAGE[1:]], abs=1e-6)


# what is drawn


@pytest.mark.parametrize(("options", "entropy", "temperature"), [
    ({}, 0.49, 1.2), ({}, 0.5, 1.2), ({}, 0.51, 0.8), ({"H": 0.75}, 0.7, 1.2), ({"H": 0.25}, 0.3, 0.8),
    ({"T_hi": 1.5}, 0.0, 1.5), ({"T_lo": 0.5}, 0.9, 0.5), ({"H": -1.0}, 0.0, 0.8),
])  # fmt: skip
def test_the_temperature_pushes_towards_the_target(options, entropy, temperature):
    engine = Engine()
    opened(options, entropy=entropy).extend_rollouts(main_rows(), engine)
    assert engine.asked[0][1].temperature.tolist() == [pytest.approx(temperature)] * 4


@pytest.mark.parametrize(("H", "temperature"), [(0.5, 1.2), (0.0, 1.2), (-0.1, 0.8)])
def test_the_first_step_counts_as_too_low_unless_the_target_is_negative(H, temperature):
    engine = Engine()
    start(["grpo", {"aepo": {"H": H}}]).extend_rollouts(main_rows(), engine)
    assert engine.asked[0][1].temperature.tolist() == [pytest.approx(temperature)] * 4


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 13), st.integers(2, 4))
def test_a_quarter_of_the_prompts_rounded_down_is_drawn_again(prompts, size):
    engine = Engine([0.0])
    group = torch.arange(prompts).repeat_interleave(size)
    stack = opened()
    rollouts = make_rollouts(torch.zeros(len(group)), group, tokens=3)
    extended = stack.extend_rollouts(rollouts, engine)
    asked = [text for requests, _ in engine.asked for text in requests.texts]
    assert asked == [f"prompt {place}" for place in range(prompts // 4) for _ in range(size)]
    assert len(extended) == len(group)  # all alike: nothing is good


def test_a_prompt_is_found_wherever_it_stands_in_the_pool():
    engine, pool = Engine(), make_pool(8)
    stack = start(["grpo", "aepo"], pool=pool)
    shuffled = pool.select(torch.tensor([5, 2, 7, 0]))
    stack.extend_rollouts(main_rows([1.0, 0.0] * 4, [0, 0, 1, 1, 2, 2, 3, 3], pool=shuffled), engine)
    assert engine.asked[0][0].texts == ["prompt 5"] * 2


def test_as_many_responses_are_drawn_as_the_prompt_has():
    engine = Engine()
    group = [0] * 3 + [1] + [2] * 2 + [3] * 5 + [4] + [5] + [6] + [7] * 2
    opened().extend_rollouts(main_rows([0.0] * 16, group), engine)
    assert engine.asked[0][0].prompt.tolist() == [0, 0, 0, 1]


def test_prompts_outside_of_the_pool_cannot_be_drawn_again():
    engine = Engine()
    rows = main_rows(prompt_rows=torch.full((16,), -1))
    assert len(opened().extend_rollouts(rows, engine)) == 16 and not engine.asked


# what is selected

scores = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, float("nan"), float("inf")]), min_size=8, max_size=8)


def good_rows(values, group, threshold=0.05):
    """S by the formula, row by row."""
    found = []
    for row, value in enumerate(values):
        members = [v for v, g in zip(values, group, strict=True) if g == group[row] and v - v == 0]
        if value - value != 0 or len(members) < 2:
            continue
        mean = sum(members) / len(members)
        std = (sum((v - mean) ** 2 for v in members) / (len(members) - 1)) ** 0.5
        if (value - mean) / (std + 1e-6) > threshold:
            found.append(row)
    return found


@settings(max_examples=25, deadline=None)
@given(scores, st.sampled_from([0, 1, 2, 3, 60]), st.sampled_from([0.2, 0.5, 0.9]))
def test_good_samples_are_trained_in_their_order_up_to_the_limit(values, N, entropy):
    group = torch.arange(8).repeat_interleave(4)
    stack, engine = opened({"N": N}, entropy=entropy), Engine(values)
    main = make_rollouts([1.0, 0.0, 0.0, 1.0] * 8, group, tokens=3)
    names, advantages, extended = trained_rows(stack, main, engine)
    good = good_rows(values, [0] * 4 + [1] * 4)
    k = min(N, len(good)) // (1 if entropy <= 0.5 else 2)
    assert extended.scores[32:].flatten().tolist() == [values[row] for row in good[:k]]
    assert extended.prompt_rows[32:].tolist() == [row // 4 for row in good[:k]]
    assert [row for name, row in names if name == "main"] == list(range(k, 32))  # the batch keeps its size
    base = credit(["grpo"], main).advantages.flatten().tolist()
    assert advantages == [1.0] * k + base[k:]  # groups of replaced rows keep what all their members gave


def test_the_threshold_is_strict_and_can_be_raised():
    scores = [1.0, 0.0, 1.0, 1.0]
    for threshold, count in ((0.4, 3), (0.6, 0)):
        extended = opened({"threshold": threshold}).extend_rollouts(main_rows(), Engine(scores))
        assert len(extended) - 16 == count
    C = float(controller_advantages(torch.tensor(scores)[:, None], torch.zeros(4, dtype=torch.int64))[0])
    assert len(opened({"threshold": C}).extend_rollouts(main_rows(), Engine(scores))) == 16


# identities


@pytest.mark.parametrize(
    ("options", "controller", "entropy", "group"),
    [
        ({"N": 0}, CONTROLLER_REWARDS, 0.4, MAIN_GROUP),
        ({}, [1.0] * 4, 0.4, MAIN_GROUP),
        ({}, [1.0, float("nan"), float("nan"), float("nan")], 0.4, MAIN_GROUP),
        ({}, [float("nan")] * 4, 0.4, MAIN_GROUP),
        ({}, [1.0, 0.0, 0.0, 0.0], 0.6, MAIN_GROUP),
        ({}, CONTROLLER_REWARDS, 0.4, [0] * 8 + [1] * 8),
    ],
    ids=["no samples wanted", "all alike", "one reward", "no reward", "half of one", "three prompts or fewer"],
)
def test_without_a_controller_row_it_is_grpo(options, controller, entropy, group):
    main, engine = main_rows(group=group), Engine(controller)
    stack = opened(options, entropy=entropy)
    extended = stack.extend_rollouts(main, engine)
    made, base = stack.credit(extended), credit(["grpo"], main)
    assert len(extended) == 16 and not extended.of_kind("controller").any()
    assert torch.equal(made.advantages, base.advantages)
    assert bool((made.weights == 1).all())
    assert bool(engine.asked) == (options == {} and len(set(group)) == 4)


def updated(stack, extended, micro_batches=1, reduce=None, rows=None):
    """Loss and gradient of the update of these rows."""
    made = stack.credit(extended)
    leaf = (extended.old_log_probs + 0.2 * extended.mask).double().requires_grad_()
    columns = stack.update_columns(extended, made)
    if rows is not None:
        columns = {name: column[rows] for name, column in columns.items()}
    part = leaf if rows is None else leaf[rows]
    mini = stack.mini_batch(columns, kinds=extended.kinds, reduce=reduce)
    total = 0.0
    for piece in torch.arange(len(part)).chunk(micro_batches):
        loss = mini.loss(part[piece], piece)
        loss.total.backward()
        total += float(loss.total.detach())
    return total, leaf.grad


def test_the_loss_is_that_of_the_batch_with_rows_exchanged():
    stack = opened()
    extended = stack.extend_rollouts(main_rows(), Engine())
    loss, gradient = updated(stack, extended)
    ratio = torch.tensor(0.2).exp().item()
    advantages = [1.0] * 3 + MAIN_ADVANTAGE[3:]
    expected = sum(max(-a * ratio, -a * min(ratio, 1.2)) for a in advantages) / 16
    assert loss == pytest.approx(expected, abs=1e-6)
    assert not gradient[:3].any()


@pytest.mark.parametrize("micro_batches", [2, 19])
def test_micro_batches_do_not_change_the_loss(micro_batches):
    stack = opened()
    extended = stack.extend_rollouts(main_rows(), Engine())
    whole, parts = updated(stack, extended), updated(stack, extended, micro_batches)
    assert parts[0] == pytest.approx(whole[0], abs=1e-14)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-14, rtol=0)


def test_ranks_do_not_change_the_loss():
    stack = opened()
    extended = stack.extend_rollouts(main_rows(), Engine())
    shares, sums = [slice(0, 7), slice(7, 19)], []
    for rows in shares:  # what each rank has to add
        updated(stack, extended, rows=rows, reduce=lambda values: sums.append(values) or values)
    both = sum(updated(stack, extended, rows=rows, reduce=lambda _: sum(sums))[0] for rows in shares)
    assert both == pytest.approx(updated(stack, extended)[0], abs=1e-14)


def test_a_step_is_the_same_when_it_is_made_again():
    one, other = (opened() for _ in range(2))
    first, second = (trained_rows(stack, main_rows(), Engine()) for stack in (one, other))
    assert first[:2] == second[:2]
    assert trained_rows(one, main_rows(), Engine())[:2] == first[:2]


# rows and columns


def test_nothing_that_was_given_is_changed():
    main = main_rows(columns={"level": torch.arange(16)})
    opened().extend_rollouts(main, Engine())
    assert list(main.columns) == ["level"] and len(main) == 16 and main.kinds == ("policy",)


def test_added_rows_have_their_own_prompt_and_what_was_written_about_it():
    main = main_rows(columns={"level": torch.arange(16), "hint": [f"hint {row}" for row in range(16)]})
    extended = opened().extend_rollouts(main, Engine(columns={"level": torch.full((4,), 7), "more": torch.ones(4)}))
    assert extended.columns["level"].tolist() == [*range(16), 7, 7, 7]
    assert extended.columns["hint"][16:] == ["hint 0"] * 3
    assert "more" not in extended.columns
    assert extended.prompts[16:] == [[9]] * 3


def test_forced_beginnings_of_the_main_rows_do_not_stand_in_the_way():
    main = main_rows(prefix=torch.zeros(16, 3, dtype=torch.bool))
    assert opened().extend_rollouts(main, Engine()).prefix.shape == (19, 3)


class Extra(Plugin):
    """Adds a row of its own in front, of no group."""

    name = "extra"
    kinds = frozenset({"expert"})

    @hookimpl
    def extend_rollouts(self, rollouts):
        one = rollouts.select(torch.tensor([0]))
        added = replace(one.unguarded(), kinds=("policy", "expert"), kind=one.kind + 1, groups=one.groups * 0 - 1)
        from rlplugins.rollouts import concatenate

        return concatenate([added, rollouts])


class Halved(Plugin):
    """Halves every advantage."""

    name = "halved"

    @hookimpl
    def shape_advantages(self, advantages):
        return advantages / 2


def test_rows_of_other_kinds_are_neither_replaced_nor_counted():
    stack = opened(plugins=("grpo", Extra()))
    extended = stack.extend_rollouts(main_rows(), Engine())
    made = stack.credit(extended)
    assert len(extended) == 20
    assert made.weights.flatten().tolist() == [1, 0, 0, 0, *[1] * 16]


def test_other_plugins_do_not_change_the_controllers_advantage():
    for plugins in (("grpo", Halved()), ("grpo",)):
        stack = start([*plugins, "aepo", *([] if len(plugins) > 1 else [Halved()])])
        made = stack.credit(stack.extend_rollouts(main_rows(), Engine()))
        assert made.advantages.flatten()[16:].tolist() == [1.0, 1.0, 1.0]
        assert float(made.advantages[3]) == pytest.approx(0.433012, abs=1e-6)


def test_advantages_per_token_are_1_on_the_controllers_tokens():
    class PerToken(Plugin):
        """The score at every token."""

        name = "per_token"

        @hookimpl
        def compute_advantages(self, rewards, mask):
            return rewards * mask

    stack = start([PerToken(), "aepo"])
    made = stack.credit(stack.extend_rollouts(main_rows(), Engine(mask=[[1, 1, 0]] * 4)))
    assert made.advantages[16:].tolist() == [[1.0, 1.0, 0.0]] * 3


# the entropy


def test_the_entropy_is_that_of_the_trained_rows_the_controllers_included():
    stack = opened()
    extended = stack.extend_rollouts(main_rows(), Engine())
    log_probs = torch.tensor([-9.0] * 3 + [-1.0] * 13 + [-5.0] * 3)[:, None].expand(19, 3)
    extended = replace(extended, old_log_probs=log_probs * extended.mask)
    stack.end_step(extended, stack.credit(extended))
    assert aepo_of(stack).state.entropy == pytest.approx((13 * 1 + 3 * 5) / 16)


def test_a_step_in_which_nothing_was_trained_leaves_the_entropy():
    stack = opened()
    for rollouts in (main_rows([float("nan")] * 16), main_rows(mask=torch.zeros(16, 3))):
        stack.end_step(rollouts, stack.credit(rollouts))
    stack.end_step(main_rows(), None)
    assert aepo_of(stack).state.entropy == pytest.approx(0.47, abs=1e-7)


def test_a_filter_leaves_as_many_rows_as_it_would_alone():
    class Positive(Plugin):
        """Keeps responses with a positive score."""

        name = "positive"

        @hookimpl
        def filter_rollouts(self, scores):
            return (scores > 0).float()

    stack = opened(plugins=("grpo", Positive()))
    drawn = main_rows(old_log_probs=-2.0 * torch.ones(16, 3))
    kept = stack.filter_rollouts(stack.extend_rollouts(drawn, Engine()))
    made = stack.credit(kept)
    assert int(made.weights.sum()) == sum(MAIN_REWARDS) == 8
    stack.end_step(kept, made)
    assert aepo_of(stack).state.entropy == pytest.approx((5 * 2.0 + 3 * 0.5) / 8)


def test_the_entropy_survives_a_restart(tmp_path):
    stack = opened(entropy=0.7)
    stack.save(tmp_path / "state", 1)
    resumed = start(["grpo", "aepo"], pool=make_pool(64))
    assert resumed.load(tmp_path / "state") == 1
    resumed.begin_step(1, 10)
    assert trained_rows(resumed, main_rows(), Engine())[:2] == trained_rows(stack, main_rows(), Engine())[:2]
    assert (
        trained_rows(start(["grpo", "aepo"]), main_rows(), Engine())[0] != trained_rows(stack, main_rows(), Engine())[0]
    )


# what it says about itself


@pytest.mark.parametrize(
    ("field", "value"),
    [("H", float("nan")), ("H", float("inf")), ("T_hi", 0), ("T_hi", -1), ("T_lo", 0), ("T_lo", float("inf")),
     ("N", -1), ("N", 1.5), ("threshold", -0.1), ("threshold", float("nan"))],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"aepo\.{field}"):
        make(Aepo, {field: value})


def test_temperatures_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigurationError, match=r"aepo: T_lo 1\.3 is above T_hi 1\.2"):
        make(Aepo, {"T_lo": 1.3})


@pytest.mark.parametrize(
    ("other", "fact"),
    [({"breaks": ["absolute_advantages"]}, "absolute_advantages"), ({"breaks": ["single_entropy"]}, "single_entropy"),
     ({"assumes": ["whole_groups"]}, "whole_groups")],
)  # fmt: skip
def test_facts_that_clash_are_refused(other, fact):
    with pytest.raises(StackError, match=fact):
        Stack(["grpo", "aepo", stand_in(**other)])
    Stack(["grpo", "aepo", stand_in(**other)], allow=[fact])


def test_an_entropy_bonus_is_refused():
    trainer = Trainer(name="with_bonus", extras=(EntropyBonus(coefficient=0.01),),
                      provides=frozenset({"current_entropy", "engine"}))  # fmt: skip
    with pytest.raises(StackError, match=r"aepo assumes it, entropy_bonus breaks it"):
        Stack(["grpo", "aepo"], trainer=trainer)


def test_a_trainer_without_engine_or_groups_is_refused():
    with pytest.raises(StackError, match="an engine"):
        Stack(["aepo"], trainer=Trainer(name="bare"))
    with pytest.raises(StackError, match="2 or more"):
        Stack(["aepo"], trainer=Trainer(name="single", provides=frozenset({"engine"}), group_size=1))


def test_a_row_of_its_kind_that_it_did_not_declare_would_be_refused(monkeypatch):
    monkeypatch.setattr(Aepo, "kinds", frozenset())
    with pytest.raises(Exception, match="controller"):
        opened().extend_rollouts(main_rows(), Engine())


# what every plugin must do

test_conformance = conformance(
    "aepo", unless={"permutation": "the first rows of the step make room for the added ones"}
)
