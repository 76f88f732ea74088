"""Facts about EPO, through the stack."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.defaults import EntropyBonus
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack
from rlplugins.testing import conformance, loss_and_gradient, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_epo import Epo, beta, epoch_weight, token_weights

ENTROPY = [[1.2, 0.4, 2.9, 0.1], [0.8, 0.9, 0.0, 0.0], [1.5, 0.05, 0.6, 0.0]]
MASK = [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
HISTORY = [1.0, 1.2, 0.8]
GRADIENT = [
    [-6.25e-05, -6.83966264e-05, -5.66033736e-05, -6.83966264e-05], [-0.000125, -0.000125, 0.0, 0.0],
    [-0.000166666667, -0.000182391004, -0.000166666667, 0.0],
]  # fmt: skip
PAPER = {"kappa_l": 0.5, "trajectory": "trajectory"}


class NoReward(Plugin):
    """A policy loss of 0, so that the loss is EPO's."""

    name = "no_reward"

    @hookimpl
    def policy_loss(self, log_probs):
        return log_probs * 0


def turns(entropy=ENTROPY, mask=MASK, trajectory=(0, 0, 1), turn=(0, 1, 2), **fields):
    """Rollouts of which each row is a turn."""
    mask = torch.tensor(mask, dtype=torch.bool)
    columns = {"trajectory": torch.tensor(trajectory), "turn": torch.tensor(turn)}
    fields = {"scores": torch.zeros(len(mask))} | fields
    return make_rollouts(mask=mask, entropy=torch.tensor(entropy) * mask, columns=columns, **fields)


def uniform(value, rows=2, tokens=3):
    """Rollouts whose average entropy is this, by whatever weights."""
    rows_of = [[1] * tokens] * rows
    return turns([[value] * tokens] * rows, rows_of, range(rows), range(rows))


def after(history, options, number=None, total=150, others=()):
    """A stack in the step after ones with these average entropies."""
    stack = start([NoReward(), {"epo": options}, *others], total_steps=total)
    for k, value in enumerate(history):
        stack.begin_step(k, total)
        rollouts = uniform(value)
        stack.end_step(rollouts, stack.credit(rollouts))
    stack.begin_step(len(history) if number is None else number, total)
    return stack


def epo_of(stack):
    return next(plugin for plugin in stack.plugins if plugin.name == "epo")


def auxiliary(stack, rollouts, entropy=None, micro_batches=1):
    """EPO's loss and its gradient by the current entropy, which is the old one unless given."""
    made = stack.credit(rollouts)
    leaf = (rollouts.entropy if entropy is None else entropy).double().clone().requires_grad_()
    mini = stack.mini_batch(stack.update_columns(rollouts, made), kinds=rollouts.kinds)
    total = 0.0
    for rows in torch.arange(len(rollouts)).chunk(micro_batches):
        part = mini.loss(rollouts.old_log_probs[rows].double(), rows, entropy=leaf[rows])
        part.total.backward()
        total += float(part.auxiliary)
    return total, leaf.grad


def random_turns(seed, rows=6, width=4):
    source = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=source)
    entropy = 3 * torch.rand((rows, width), generator=source)
    trajectory = torch.randint(0, 3, (rows,), generator=source)
    return turns(entropy.tolist(), (torch.arange(width) < lengths[:, None]).tolist(), trajectory.tolist(), range(rows))


# the worked example


def test_the_worked_example():
    stack, rollouts = after(HISTORY, PAPER), turns()
    loss, gradient = auxiliary(stack, rollouts)
    shared = stack.step.of("epo").shared
    assert shared["Hbar"] == pytest.approx(1.0, abs=1e-7)
    assert shared["beta"] == pytest.approx(1.88692044, abs=1e-8)
    assert loss == pytest.approx(-0.000843002105, abs=1e-10)
    torch.testing.assert_close(gradient, torch.tensor(GRADIENT).double(), atol=1e-11, rtol=0)
    smooth = (loss / -0.001 - 0.858333333) / -shared["beta"]
    assert smooth == pytest.approx(0.008125, abs=1e-7)
    stack.end_step(rollouts, stack.credit(rollouts))
    assert epo_of(stack).state.history.tolist() == pytest.approx([1.0, 1.2, 0.8, 0.858333333], abs=1e-7)


def test_the_worked_schedule():
    assert [beta(k, 150) for k in (0, 37, 75, 150)] == pytest.approx([2.0, 1.22763769, 1.04978707, 1.00247875])


CODE_HISTORY = [[0.9, 1.1, 0.7], [1.1, 0.9, 0.5]]
CODE = {"variant": "code", "turn": "turn", "max_steps": 3}


def code_stack(options=()):
    """A stack in the second step, whose first left the first line of the history."""
    stack = after([], CODE | dict(options))
    first = turns([[value] * 4 for value in CODE_HISTORY[0]], [[1] * 4] * 3)
    stack.end_step(first, stack.credit(first))
    stack.begin_step(1, 150)
    return stack


def penalties(options=(), micro_batches=1):
    """The code's penalty on each row's tokens, from losses of EPO with and without it: lambda agg(c) of one row each."""
    found = []
    for token in range(4):
        for row in range(3):
            mask = [[int((row, token) == (i, t)) for t in range(4)] for i in range(3)]
            stack = code_stack(options)
            lone = turns(ENTROPY, [[1] * 4] * 3)
            current = torch.tensor(ENTROPY)
            lone.entropy = torch.tensor([[value] * 4 for value in CODE_HISTORY[1]])  # the old policy's: the second line
            made = stack.credit(lone)
            columns = stack.update_columns(lone, made) | {"mask": torch.tensor(mask, dtype=torch.bool)}
            part = stack.mini_batch(columns).loss(lone.old_log_probs, entropy=current)
            found.append(float(ENTROPY[row][token] - part.auxiliary / -0.001))
    return torch.tensor(found).view(4, 3).T


def test_the_worked_penalties_of_the_code():
    torch.testing.assert_close(
        penalties(), torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.1, 0.0, 0.1, 0.1], [0.1, 0.1, 0.0, 0.1]]), atol=2e-6, rtol=0
    )
    torch.testing.assert_close(
        penalties({"level": "seq"}), torch.tensor([[0.0] * 4, [0.1] * 4, [0.0] * 4]), atol=2e-6, rtol=0
    )


def test_the_worked_weights_of_the_code_by_step():
    expected = [1.0, 0.868830757, 0.827067057, 0.294303553, 0.0398296547]
    assert [epoch_weight(e) for e in (0, 40, 75, 100, 150)] == pytest.approx(expected, abs=1e-9)
    assert epoch_weight(900) == epoch_weight(150)
    assert epoch_weight(1, 1) == 1.0


# identities

seeds = st.integers(0, 2**31)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([{"alpha": 0.0}, {}]))
def test_without_penalty_or_history_it_is_a_plain_entropy_bonus(seed, options):
    rollouts = random_turns(seed)
    history = HISTORY if options else []
    loss, gradient = auxiliary(after(history, PAPER | options), rollouts)
    w = token_weights(rollouts.mask, rollouts.columns["trajectory"]) * rollouts.mask
    assert loss == pytest.approx(float(-0.001 * (w * rollouts.entropy).sum()), abs=1e-9)
    torch.testing.assert_close(gradient, -0.001 * w, atol=1e-12, rtol=0)


def test_with_lambda_0_it_is_the_base_method():
    rollouts = turns(scores=torch.tensor([1.0, 0.0, 0.5]))
    log_probs = rollouts.old_log_probs.double() + 0.1 * rollouts.mask
    stack = start(["grpo", {"epo": {"lam": 0}}])
    loss, gradient = loss_and_gradient(stack, rollouts, log_probs)
    base_loss, base_gradient = loss_and_gradient(start(["grpo"]), rollouts, log_probs)
    assert float(loss) == float(base_loss) and torch.equal(gradient, base_gradient)
    assert not stack.takes("entropy", "update")


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, 2.0]), st.integers(0, 9))
def test_the_gradient_is_the_bonus_and_a_share_of_it_outside_of_the_band(seed, kappa_l, kappa_r, number):
    rollouts = random_turns(seed)
    options = {"kappa_l": kappa_l, "kappa_r": kappa_r, "trajectory": "trajectory", "alpha": 0.1}
    _, gradient = auxiliary(after(HISTORY, options, number), rollouts)
    w = token_weights(rollouts.mask, rollouts.columns["trajectory"]) * rollouts.mask
    H, smoothing = rollouts.entropy.double(), 0.1 * beta(number, 150)
    below, above = kappa_l * 1.0 > H, kappa_r * 1.0 < H
    expected = -0.001 * w * (1 + smoothing * (below.double() - above.double()))
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    assert bool((gradient <= 0).all())  # a share below 1 never turns the bonus around
    assert kappa_l > 0 or not below.any()


def test_kappas_of_1_are_the_distance_from_the_average():
    rollouts = turns()
    loss, _ = auxiliary(after(HISTORY, PAPER | {"kappa_l": 1.0, "kappa_r": 1.0, "alpha": 1.0}), rollouts)
    w = token_weights(rollouts.mask, rollouts.columns["trajectory"]) * rollouts.mask
    expected = (w * rollouts.entropy).sum() - beta(3, 150) * (w * (rollouts.entropy - 1).abs()).sum()
    assert loss == pytest.approx(-0.001 * float(expected), abs=1e-8)


def test_beta_starts_at_2_stays_there_without_gamma_and_ends_near_1():
    assert beta(0, 150) == beta(0, 7, 1.0) == beta(99, 150, 0.0) == 2
    assert beta(150, 150) == pytest.approx(1 + float(torch.tensor(-6.0).exp()))
    stack = after(HISTORY, PAPER | {"gamma": 0.0})
    stack.credit(turns())
    assert stack.step.of("epo").shared["beta"] == 2


def test_kappa_r_moves_the_upper_end_of_the_band():
    losses = [auxiliary(after(HISTORY, {"kappa_r": kappa_r}), turns())[0] for kappa_r in (0.5, 1.0, 5.0)]
    assert losses[0] > losses[1] > losses[2]


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_the_whole_batch_twice_under_new_names_is_the_same(seed):
    rollouts = random_turns(seed)
    twice = rollouts.select(torch.arange(12) % 6)
    twice.columns._columns["trajectory"] = torch.cat(
        [rollouts.columns["trajectory"], rollouts.columns["trajectory"] + 9]
    )
    once, again = (auxiliary(after(HISTORY, PAPER), item)[0] for item in (rollouts, twice))
    assert once == pytest.approx(again, abs=1e-9)


def test_one_turn_of_one_trajectory_is_a_mean_over_its_tokens():
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    assert token_weights(mask, torch.tensor([5])).tolist() == [[pytest.approx(1 / 3)]]


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_weights_add_up_to_one_over_the_step_and_to_equal_shares_over_its_trajectories(seed):
    rollouts = random_turns(seed)
    per_row = token_weights(rollouts.mask, rollouts.columns["trajectory"]).flatten() * rollouts.mask.sum(1)
    present = rollouts.mask.any(1)
    if present.any():
        assert float(per_row.sum()) == pytest.approx(1)
        ids = rollouts.columns["trajectory"]
        shares = [float(per_row[ids == i].sum()) for i in ids[present].unique()]
        assert shares == pytest.approx([1 / len(shares)] * len(shares))
    assert not per_row[~present].any()


def test_an_empty_turn_counts_as_absent():
    full = turns()
    padded = turns([*ENTROPY, [0.0] * 4], [*MASK, [0] * 4], (0, 0, 1, 1), (0, 1, 2, 3))
    for rollouts in (padded, turns([*ENTROPY, [0.0] * 4], [*MASK, [0] * 4], (0, 0, 1, 2), (0, 1, 2, 3))):
        assert auxiliary(after(HISTORY, PAPER), rollouts)[0] == pytest.approx(
            auxiliary(after(HISTORY, PAPER), full)[0], abs=1e-12
        )


def test_without_a_column_every_response_is_a_trajectory():
    lone, named = (after(HISTORY, {"trajectory": name} if name else {}) for name in ("", "trajectory"))
    rollouts = turns(trajectory=(4, 8, 6))
    assert auxiliary(lone, rollouts)[0] == auxiliary(named, rollouts)[0]
    together = auxiliary(after(HISTORY, {"trajectory": "trajectory"}), turns())[0]
    assert together != pytest.approx(auxiliary(lone, turns())[0], abs=1e-7)


def test_trajectories_may_be_named_by_text():
    rollouts = turns()
    rollouts.columns._columns["trajectory"] = ["a", "a", "b"]
    assert auxiliary(after(HISTORY, PAPER), rollouts)[0] == auxiliary(after(HISTORY, PAPER), turns())[0]


# mini-batches, micro-batches, ranks


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_micro_batches_do_not_change_loss_or_gradient(micro_batches):
    whole = auxiliary(after(HISTORY, PAPER), turns())
    parts = auxiliary(after(HISTORY, PAPER), turns(), micro_batches=micro_batches)
    assert parts[0] == pytest.approx(whole[0], abs=1e-15)
    torch.testing.assert_close(parts[1], whole[1], atol=1e-15, rtol=0)


def on_two_ranks(rollouts):
    """The sum over two ranks, one with the first row, of losses whose sums are really added."""
    barrier, waiting, parts = threading.Barrier(2, timeout=30), {}, {}

    def rank(number, rows):
        def reduce(values):
            waiting[number] = values
            barrier.wait()
            total = waiting[0] + waiting[1]
            barrier.wait()
            return total

        stack = after(HISTORY, PAPER)
        made = stack.credit(rollouts)
        columns = {name: column[rows] for name, column in stack.update_columns(rollouts, made).items()}
        mini = stack.mini_batch(columns, reduce=reduce)
        parts[number] = float(mini.loss(rollouts.old_log_probs[rows], entropy=rollouts.entropy[rows]).total)

    threads = [
        threading.Thread(target=rank, args=(0, slice(0, 1))),
        threading.Thread(target=rank, args=(1, slice(1, 3))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(parts.values())


def test_ranks_do_not_change_the_loss():
    assert on_two_ranks(turns()) == pytest.approx(-0.000843002105, abs=1e-9)


def test_each_mini_batch_is_a_weighted_mean_of_its_own():
    stack, rollouts = after([], PAPER), turns()
    made = stack.credit(rollouts)
    columns = {name: column[2:] for name, column in stack.update_columns(rollouts, made).items()}
    part = stack.mini_batch(columns).loss(rollouts.old_log_probs[2:], entropy=rollouts.entropy[2:])
    assert float(part.auxiliary) == pytest.approx(-0.001 * (1.5 + 0.05 + 0.6) / 3, abs=1e-9)


def test_weights_of_other_plugins_do_not_change_the_averages():
    class First(Plugin):
        """Trains on the first row alone."""

        name = "first"

        @hookimpl
        def select_samples(self, mask):
            return torch.tensor([[1.0]] + [[0.0]] * (len(mask) - 1))

    assert auxiliary(after(HISTORY, PAPER, others=[First()]), turns())[0] == pytest.approx(-0.000843002105, abs=1e-10)


# the history


def test_the_history_is_appended_after_the_update_and_credit_does_not_change_it():
    stack = after(HISTORY, PAPER)
    first, second = stack.credit(turns()), stack.credit(turns())
    assert len(epo_of(stack).state.history) == 3
    assert torch.equal(first.advantages, second.advantages)
    assert auxiliary(stack, turns())[0] == auxiliary(stack, turns())[0]


def test_the_band_stands_around_the_old_policys_entropy_and_the_loss_is_about_the_current():
    stack = after([1.0], {"kappa_l": 1.0, "kappa_r": 1.0})
    old = uniform(0.3)
    loss, _ = auxiliary(stack, old, entropy=torch.full((2, 3), 1.0))
    assert loss == pytest.approx(-0.001, abs=1e-9)  # on the centre of the band: no penalty
    stack.end_step(old, stack.credit(old))
    assert epo_of(stack).state.history.tolist() == pytest.approx([1.0, 0.3])


@pytest.mark.parametrize("options", [PAPER, CODE])
def test_the_history_survives_a_restart(options, tmp_path):
    stack = after(HISTORY, options)
    stack.save(tmp_path / "state", 3)
    resumed = after([], options)
    assert resumed.load(tmp_path / "state") == 3
    resumed.begin_step(3, 150)
    assert auxiliary(resumed, turns())[0] == auxiliary(stack, turns())[0]
    assert auxiliary(resumed, turns())[0] != auxiliary(after([], options, 3), turns())[0]


def test_a_step_without_tokens_or_rows_leaves_no_entry():
    stack = after(HISTORY, PAPER)
    empty = turns(ENTROPY, [[0] * 4] * 3)
    loss, gradient = auxiliary(stack, empty)
    assert loss == 0 and not gradient.any()
    stack.end_step(empty, stack.credit(empty))
    stack.begin_step(4, 150)
    stack.end_step(turns(), None)
    assert len(epo_of(stack).state.history) == 3


def test_rows_that_a_filter_drops_are_not_counted():
    class Positive(Plugin):
        """Keeps responses with a positive score."""

        name = "positive"

        @hookimpl
        def filter_rollouts(self, scores):
            return (scores > 0).float()

    stack = after(HISTORY, {}, others=[Positive()])
    drawn = turns([[1.0] * 4, [3.0] * 4], [[1] * 4] * 2, (0, 1), (0, 0), scores=torch.tensor([1.0, 0.0]))
    kept = stack.filter_rollouts(drawn)
    made = stack.credit(kept)
    stack.end_step(kept, made)
    assert epo_of(stack).state.history.tolist()[-1] == pytest.approx(1.0)


def test_rows_that_the_policy_did_not_draw_are_not_counted():
    rollouts = turns(kind=torch.tensor([0, 0, 1], dtype=torch.int8), kinds=("policy", "expert"),
                     groups=torch.tensor([0, 0, -1]))  # fmt: skip
    _, gradient = auxiliary(after(HISTORY, PAPER), rollouts)
    assert bool((gradient[:2] != 0).any()) and not gradient[2].any()


def test_a_response_without_reward_or_with_an_equal_one_has_an_entropy_all_the_same():
    rollouts = turns(scores=torch.tensor([1.0, 1.0, float("nan")]))
    stack = after(HISTORY, PAPER)
    assert auxiliary(stack, rollouts)[0] == pytest.approx(-0.000843002105, abs=1e-10)


def test_responses_of_one_token_have_their_own_weight():
    rollouts = turns([[1.2], [0.4]], [[1], [1]], (0, 1), (0, 0))
    assert auxiliary(after(HISTORY, {"kappa_l": 1.0}), rollouts)[0] == pytest.approx(
        -0.001 * (0.8 - beta(3, 150) * 0.05 * 0.3), abs=1e-9
    )


def test_columns_are_constant_over_a_response_and_nothing_given_is_changed():
    rollouts = turns()
    before = [rollouts.entropy.clone(), rollouts.mask.clone(), rollouts.scores.clone()]
    after(HISTORY, PAPER).credit(rollouts)
    assert rollouts.columns["epo_weight"].shape == (3, 1)
    for one, other in zip(before, [rollouts.entropy, rollouts.mask, rollouts.scores], strict=True):
        assert torch.equal(one, other)


# the code's variant


def code_loss(options, rollouts, history=(), micro_batches=1):
    return auxiliary(after(history, CODE | options), rollouts, micro_batches=micro_batches)


def test_the_codes_penalty_has_no_gradient_and_averages_are_over_tokens():
    loss, gradient = code_loss({}, turns())
    torch.testing.assert_close(gradient, -0.001 * torch.tensor(MASK).double() / 9, atol=1e-12, rtol=0)
    assert loss > -0.001 * sum(map(sum, ENTROPY)) / 9
    assert code_loss({"coef": 0.0}, turns())[0] == pytest.approx(-0.001 * sum(map(sum, ENTROPY)) / 9, abs=1e-9)


def test_the_codes_options_change_the_loss():
    options = {"min_ratio": 0.0, "max_ratio": 9.0, "penalty": 0.2, "coef": 2.0}
    losses = {name: code_loss({name: value}, turns())[0] for name, value in options.items()}
    assert all(loss != pytest.approx(code_loss({}, turns())[0], abs=1e-9) for loss in losses.values())
    assert losses["penalty"] == pytest.approx(losses["coef"])


def test_the_code_penalises_where_a_turn_has_reached_half_of_the_history():
    early = turns(turn=(0, 1, 1))
    plain = -0.001 * sum(map(sum, ENTROPY)) / 9
    assert code_loss({"max_steps": 4}, early)[0] == pytest.approx(plain, abs=1e-9)
    assert code_loss({"max_steps": 2}, early)[0] > plain + 1e-6
    cut, whole = (code_loss({"max_steps": 4}, turns(), micro_batches=parts)[0] for parts in (3, 1))
    assert plain < cut < whole  # as released: only the micro-batch with the late turn


def test_the_codes_history_has_turns_at_its_end_and_zeros_before():
    stack = after([], CODE | {"max_steps": 5})
    stack.end_step(turns(), stack.credit(turns()))
    expected = [0, 0, (1.2 + 0.4 + 2.9 + 0.1) / 4, 0.85, (1.5 + 0.05 + 0.6) / 3]
    assert epo_of(stack).state.history.tolist() == [pytest.approx(expected, abs=1e-6)]
    short = after([], CODE | {"max_steps": 2})
    short.end_step(turns(), short.credit(turns()))
    assert epo_of(short).state.history.tolist() == [pytest.approx(expected[3:], abs=1e-6)]


def test_the_codes_penalty_falls_during_the_run_if_asked():
    steps = [0.5] * 4
    plain, less = (code_loss({"smooth_weights": on, "max_epochs": 4}, turns(), steps)[0] for on in (False, True))
    bonus = -0.001 * sum(map(sum, ENTROPY)) / 9
    assert (less - bonus) / (plain - bonus) == pytest.approx(0.8 * float(torch.tensor(-3.0).exp()), abs=1e-4)


def test_a_mean_over_a_row_counts_its_padding():
    bonus = -0.001 * sum(map(sum, ENTROPY)) / 9
    wide = turns([row + [0.0] * 4 for row in ENTROPY], [row + [0] * 4 for row in MASK])
    assert code_loss({"level": "seq"}, turns())[0] == pytest.approx(bonus + 0.0001 * 5 / 9, abs=1e-9)
    assert code_loss({"level": "seq"}, wide)[0] == pytest.approx(bonus + 0.0001, abs=1e-9)
    one = turns([[1.0], [1.0]], [[1], [1]], (0, 1), (0, 1))
    assert code_loss({"level": "seq", "max_steps": 2}, one)[0] == pytest.approx(-0.001, abs=1e-9)


# what it says about itself


@pytest.mark.parametrize(
    ("field", "value"),
    [("lam", -0.1), ("alpha", -1), ("alpha", float("nan")), ("kappa_l", -1), ("kappa_r", -0.5), ("gamma", -3),
     ("gamma", float("inf")), ("variant", "v1"), ("min_ratio", -1), ("max_ratio", -1), ("penalty", -0.1), ("coef", -1),
     ("level", "row"), ("max_steps", 0), ("max_epochs", 0), ("trajectory", 3), ("turn", 3), ("smooth_weights", "x")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"epo\.{field}"):
        make(Epo, {field: value})


def test_bands_that_are_upside_down_are_refused():
    with pytest.raises(ConfigurationError, match="epo: kappa_l 3 is above kappa_r 2"):
        make(Epo, {"kappa_l": 3})
    with pytest.raises(ConfigurationError, match=r"epo: min_ratio 2 is above max_ratio 1\.2"):
        make(Epo, {"min_ratio": 2})


def test_a_run_of_one_step_is_refused():
    with pytest.raises(ConfigurationError, match="epo needs 2 planned steps"):
        start(["epo"], total_steps=1)
    start([{"epo": {"variant": "code"}}], total_steps=1)


def test_a_second_entropy_term_is_refused():
    trainer = Trainer(
        name="with_bonus", extras=(EntropyBonus(coefficient=0.01),), provides=frozenset({"current_entropy"})
    )
    with pytest.raises(StackError, match=r"single_entropy.*epo assumes it, entropy_bonus breaks it"):
        Stack(["epo"], trainer=trainer)
    Stack(["epo"], trainer=trainer, allow=["single_entropy"])

    with pytest.raises(StackError, match=r"single_entropy.*other assumes it, epo breaks it"):
        Stack(["epo", stand_in(assumes=["single_entropy"])])


def test_a_trainer_without_what_it_needs_is_refused():
    given = frozenset({"current_entropy"})
    with pytest.raises(StackError, match="column 'entropy'"):
        Stack(["epo"], trainer=Trainer(name="bare", columns=frozenset(), provides=given))
    with pytest.raises(StackError, match="current entropy"):
        Stack(["epo"], trainer=Trainer(name="bare"))
    with pytest.raises(StackError, match="column 'episode'"):
        trainer = Trainer(name="bare", columns=frozenset({"entropy"}), provides=given)
        Stack([{"epo": {"trajectory": "episode"}}], trainer=trainer)
    with pytest.raises(StackError, match="one rank"):
        Stack([{"epo": {"variant": "code"}}], trainer=Trainer(name="many", ranks=2, provides=given))
    Stack(["epo"], trainer=Trainer(name="many", ranks=2, provides=given))


# what every plugin must do


def with_turns(rollouts):
    rollouts["trajectory"] = 2 * rollouts.prompt_rows + rollouts.responses[:, 1] % 2
    rollouts["turn"] = rollouts.responses[:, 1] % 3
    return rollouts


KIT_CODE = {"variant": "code", "turn": "turn", "max_steps": 4}
test_conformance = conformance(
    "epo",
    [{}, {"trajectory": "trajectory"}, {"lam": 0.0}, KIT_CODE, {**KIT_CODE, "smooth_weights": True}],
    rows=with_turns,
)
test_conformance_by_response = conformance(
    "epo",
    [{**KIT_CODE, "level": "seq"}],
    rows=with_turns,
    unless={"padding": "the code takes the mean over all columns, padding included"},
)
