"""Facts about CHORD, through the stack."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, DataError, StackError, StateError
from rlplugins.plugin import make
from rlplugins.rollouts import concatenate
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_chord import Chord, experts_beside, schedule, token_losses

NAN = float("nan")
FILE = Path(__file__).with_name("demonstrations.jsonl")
ANSWERS = ["abc", "d", "efgabc", "ga", "bcdef", "fedc"]
SFT = {"mu_peak": 1.0, "mu_valley": 1.0}
GRPO = {"mu_peak": 0.0, "mu_valley": 0.0}
HALF = {"mu_peak": 0.5, "mu_valley": 0.5}
REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum"]


class Engine:
    """The letters a to g are the tokens 1 to 7; the prompt `expert 3` is the token 103."""

    def given(self, requests, responses, *, score=True):
        assert not score  # an expert's answer needs no reward
        width = max(map(len, responses))
        ids = torch.tensor([[ord(letter) - 96 for letter in text] + [0] * (width - len(text)) for text in responses])
        made = make_rollouts(
            [NAN] * len(responses), requests.prompt, mask=ids > 0, responses=ids, pool=requests.prompts,
            prompts=[[100 + int(text.split()[-1])] for text in requests.texts],
        )  # fmt: skip
        return replace(made, old_log_probs=None)


class Given(Plugin):
    """Advantages as they are given; NaN where a row is in no group."""

    name = "given"
    values: list[list[float]]
    """One list of advantages per row."""

    @hookimpl
    def compute_advantages(self, groups):
        return torch.where(groups[:, None] < 0, NAN, torch.tensor(self.values))


def opened(options=None, step=0, plugins=("grpo",), total=1000, **settings):
    options = {"demonstrations": str(FILE)} | (options or {})
    stack = start([*plugins, {"chord": options}], total_steps=total, **settings)
    stack.begin_step(step, total, settings.get("seed", 0))
    return stack


def first_rows(rows=8, **fields):
    scores = [float(row % 3 == 0) for row in range(rows)]
    return replace(make_rollouts(scores, [row // 4 for row in range(rows)], tokens=3, **fields), old_log_probs=None)


def extended(options=None, rows=None, **settings):
    """The stack, and the rows after the plugin."""
    stack = opened(options, **settings)
    return stack, stack.extend_rollouts(first_rows() if rows is None else rows, Engine())


def experts_of(rows):
    return rows.select(rows.of_kind("expert"))


def made_up(seed, policy=6, expert=3, tokens=5, lengths=None):
    """Rows of both kinds with their old log-probs, in a mixed order, and log-probs of now (B, T) in float64."""
    source = torch.Generator().manual_seed(seed)
    total = policy + expert
    lengths = torch.randint(0, tokens + 1, (total,), generator=source).tolist() if lengths is None else lengths
    kind = torch.tensor([0] * policy + [1] * expert, dtype=torch.int8)
    groups = torch.tensor([row // 3 for row in range(policy)] + [-1] * expert)
    scores = torch.randint(0, 2, (total,), generator=source) * (kind == 0)
    now = -3 * torch.rand(total, tokens, generator=source, dtype=torch.float64)
    old = (now + torch.rand(total, tokens, generator=source) - 0.5).clamp(max=0).float()
    order = torch.randperm(total, generator=source)
    rows = make_rollouts(
        scores, groups, lengths=lengths, tokens=tokens, kind=kind, kinds=("policy", "expert"), old_log_probs=old
    )
    rows = replace(rows, old_log_probs=old * rows.mask).select(order)
    return rows, now[order] * rows.mask


def sft_loss(rows, log_probs, weight="phi"):
    """L_SFT of the expert rows, token by token as in the paper."""
    total, count = torch.zeros((), dtype=log_probs.dtype), 0
    for row in rows.of_kind("expert").nonzero().flatten():
        for logp in log_probs[row][rows.mask[row]]:
            p = logp.detach().exp()
            total, count = total - logp * {"phi": p * (1 - p), "none": 1.0, "is": p}[weight], count + 1
    return total / max(count, 1)


def gradient_of(loss, leaf):
    return torch.autograd.grad(loss, leaf, materialize_grads=True, allow_unused=True)[0]


def policy_rows(rows, log_probs):
    kept = rows.of_kind("policy")
    return replace(rows.select(kept), kinds=("policy",)), log_probs[kept]


def cut_loss(stack, rows, log_probs, parts):
    """The parts of the loss added up, and its gradient, for micro-batches of these rows."""
    leaf = log_probs.clone().requires_grad_()
    mini = stack.mini_batch(stack.update_columns(rows, stack.credit(rows)), kinds=rows.kinds)
    total = sum(mini.loss(leaf[part], part).total for part in parts)
    return total.detach(), gradient_of(total, leaf)


# the worked example

LOGP = [[-0.5, -1.2, -0.1, -2.0, -0.7], [-0.9, -0.3, -1.1, 0.0, 0.0], [-0.05, -3.0, -0.69314718, -1.5, 0.0]]
OLD = [[-0.4, -1.5, -0.1, -1.6, -0.7], [-1.2, -0.3, -0.8, 0.0, 0.0], [0.0] * 5]
EXAMPLE = {"mu_warmup": 100, "mu_decay": 400, "mu_peak": 0.5, "mu_valley": 0.02}
MU, RL = 0.429705627, -0.203162332


def example(options):
    """The parts of the loss at step 200 and the gradient of their sum; the rows are those of the card."""
    rows = make_rollouts(
        [1.0, 0.0, 0.0], [0, 0, -1], lengths=[5, 3, 4], kind=torch.tensor([0, 0, 1], dtype=torch.int8),
        kinds=("policy", "expert"), old_log_probs=OLD,
    )  # fmt: skip
    advantages = [[1.0] * 5, [-1.0] * 5, [1.0] * 5]
    stack = opened(EXAMPLE | options, 199, [Given(values=advantages)])
    leaf = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    loss = stack.mini_batch(stack.update_columns(rows, stack.credit(rows)), kinds=rows.kinds).loss(leaf)
    return loss, gradient_of(loss.total, leaf)


@pytest.mark.parametrize("global_tokens", [True, False])
@pytest.mark.parametrize(("weight", "sft"), [("phi", 0.144386495), ("none", 1.31078679), ("is", 0.219547876)])
def test_the_worked_example(weight, sft, global_tokens):
    loss, _ = example({"weight": weight, "global_tokens": global_tokens})
    assert float(loss.policy) == pytest.approx((1 - MU) * RL, rel=1e-6)
    assert float(loss.auxiliary) == pytest.approx(MU * sft, rel=1e-6)
    assert float(loss.total.detach()) == pytest.approx((1 - MU) * RL + MU * sft, rel=1e-6)


@pytest.mark.parametrize("global_tokens", [True, False])
def test_the_gradient_of_the_worked_example(global_tokens):
    _, gradient = example({"global_tokens": global_tokens})
    expected = [
        [-0.0645029609, 0.0, -0.0712867965, -0.0477849687, -0.0712867965],
        [0.0962271101, 0.0712867965, 0.0, 0.0, 0.0],
        [-0.00498372655, -0.00508216241, -0.0268566017, -0.0186216255, 0.0],
    ]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-6)


def test_the_token_losses_of_the_worked_example():
    found = token_losses(torch.tensor(LOGP[2]), "phi")
    torch.testing.assert_close(found, torch.tensor([0.00231960032, 0.141924949, 0.173286795, 0.260014638, 0.0]))


# mu


def test_the_schedule_of_the_worked_example():
    found = [schedule(s, 100, 400, 0.5, 0.02) for s in (0, 50, 100, 300, 500, 900)]
    assert found == pytest.approx([0.0, 0.25, 0.5, 0.26, 0.02, 0.02])
    assert schedule(200, 100, 400, 0.5, 0.02) == pytest.approx(MU)


@given(st.integers(0, 50), st.integers(1, 50), st.floats(0, 1), st.floats(0, 1), st.integers(0, 200))
def test_mu_runs_from_zero_over_the_peak_to_the_valley(warmup, decay, peak, valley, s):
    mu = [schedule(place, warmup, decay, peak, valley) for place in (s, warmup, warmup + decay, warmup + decay + s)]
    assert mu[1] == pytest.approx(peak) and mu[2] == mu[3] == valley
    assert 0 <= mu[0] <= max(peak, valley) + 1e-12
    assert schedule(warmup + decay // 2, warmup, decay // 2 * 2, peak, valley) == pytest.approx(
        (peak + valley) / 2 if decay > 1 else valley
    )
    if s < warmup:
        assert mu[0] == pytest.approx(peak * s / warmup)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 200))
def test_without_warm_up_and_decay_mu_is_the_valley(peak, valley, s):
    assert schedule(s, 0, 0, peak, valley) == valley


@pytest.mark.parametrize(("step", "mu"), [(0, 0.25), (1, 0.5), (3, 0.3), (5, 0.1), (99, 0.1)])
def test_the_first_step_is_number_one(step, mu):
    options = {"mu_warmup": 2, "mu_decay": 4, "mu_peak": 0.5, "mu_valley": 0.1}
    rows, log_probs = made_up(0)
    stack = opened(options, step)
    plain = credit(["grpo"], rows).advantages
    torch.testing.assert_close(stack.credit(rows).advantages, (1 - mu) * plain)
    loss = stack.mini_batch(stack.update_columns(rows, stack.credit(rows)), kinds=rows.kinds).loss(log_probs)
    torch.testing.assert_close(loss.auxiliary, mu * sft_loss(rows, log_probs))
    assert stack.metrics.as_dict()["rlplugins/chord/mu"] == pytest.approx(mu)


# the two losses


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from(["phi", "none", "is"]))
def test_the_loss_is_one_minus_mu_of_grpo_and_mu_of_sft(seed, mu, weight):
    rows, log_probs = made_up(seed)
    mine, gradient = loss_and_gradient(opened({"mu_valley": mu, "weight": weight}), rows, log_probs)
    alone, own = policy_rows(rows, log_probs)
    grpo, grpo_gradient = loss_and_gradient(start(["grpo"]), alone, own)
    leaf = log_probs.clone().requires_grad_()
    sft = sft_loss(rows, leaf, weight)
    torch.testing.assert_close(mine, (1 - mu) * grpo + mu * sft.detach(), atol=1e-6, rtol=1e-5)
    expected = mu * (gradient_of(sft, leaf) if sft.requires_grad else torch.zeros_like(leaf))
    expected[rows.of_kind("policy")] += (1 - mu) * grpo_gradient
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_with_mu_zero_it_is_grpo():
    rows, log_probs = made_up(1)
    loss, gradient = loss_and_gradient(opened(GRPO), rows, log_probs)
    alone, own = policy_rows(rows, log_probs)
    expected, expected_gradient = loss_and_gradient(start(["grpo"]), alone, own)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[rows.of_kind("policy")], expected_gradient)
    assert not gradient[rows.of_kind("expert")].any()


def test_with_mu_one_it_is_supervised():
    rows, log_probs = made_up(2)
    loss, gradient = loss_and_gradient(opened(SFT | {"weight": "none"}), rows, log_probs)
    expert = rows.of_kind("expert")
    torch.testing.assert_close(loss, -log_probs[expert].sum() / rows.mask[expert].sum())
    assert not gradient[~expert].any()


@pytest.mark.parametrize("global_tokens", [True, False])
def test_without_expert_rows_it_is_one_minus_mu_of_grpo(global_tokens):
    rows, log_probs = policy_rows(*made_up(3))
    loss, gradient = loss_and_gradient(opened(HALF | {"global_tokens": global_tokens}), rows, log_probs)
    expected, expected_gradient = loss_and_gradient(start(["grpo"]), rows, log_probs)
    assert expected_gradient.any()
    torch.testing.assert_close(loss, 0.5 * expected)
    torch.testing.assert_close(gradient, 0.5 * expected_gradient)


@pytest.mark.parametrize("global_tokens", [True, False])
def test_with_expert_rows_alone_it_is_mu_of_sft(global_tokens):
    rows, log_probs = made_up(4, policy=0, expert=4)
    loss, _ = loss_and_gradient(opened(HALF | {"global_tokens": global_tokens}), rows, log_probs)
    torch.testing.assert_close(loss, 0.5 * sft_loss(rows, log_probs))


@pytest.mark.parametrize("options", [{}, {"global_tokens": False}, {"sft_reduction": "sequence_mean"}])
def test_a_part_without_tokens_is_zero(options):
    for lengths in ([0] * 6 + [2] * 3, [2] * 6 + [0] * 3, [0] * 9):
        rows, log_probs = made_up(5, lengths=lengths)
        loss, gradient = loss_and_gradient(opened(options), rows, log_probs)
        assert bool(loss.isfinite()) and bool(gradient.isfinite().all())
    assert float(loss) == 0  # of the last: no token at all


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", ["ppo_clip", "gspo", "cispo", "reinforce"])
def test_the_parts_add_up_under_every_loss_and_reduction(loss, reduction):
    owners = {"policy_loss": loss, "reduce_loss": reduction}
    rows, log_probs = made_up(6)
    mine, _ = loss_and_gradient(opened(HALF, owners=owners), rows, log_probs)
    alone, own = policy_rows(rows, log_probs)
    expected, _ = loss_and_gradient(start(["grpo"], owners=owners), alone, own)
    torch.testing.assert_close(mine, 0.5 * expected + 0.5 * sft_loss(rows, log_probs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("global_tokens", [True, False])
def test_the_kl_penalty_is_neither_scaled_nor_taken_on_expert_rows(global_tokens):
    owners = {"kl_penalty": {"k3": {"coefficient": 1.0}}}
    rows, log_probs = made_up(7)
    rows = replace(rows, ref_log_probs=rows.old_log_probs)

    def kl_of(stack, rows, log_probs):
        return stack.mini_batch(stack.update_columns(rows, stack.credit(rows)), kinds=rows.kinds).loss(log_probs).kl

    expected = kl_of(start(["grpo"], owners=owners), *policy_rows(rows, log_probs))
    found = kl_of(opened({"global_tokens": global_tokens}, owners=owners), rows, log_probs)
    assert bool(expected > 0)
    torch.testing.assert_close(found, expected)


def test_the_mean_of_each_answer_counts_once():
    rows, log_probs = made_up(8, lengths=[3] * 6 + [1, 4, 5])
    stack = opened(SFT | {"weight": "none", "sft_reduction": "sequence_mean"})
    loss, _ = loss_and_gradient(stack, rows, log_probs)
    expert = rows.of_kind("expert")
    means = -log_probs[expert].sum(1) / rows.mask[expert].sum(1)
    torch.testing.assert_close(loss, means.mean())
    parts = [torch.tensor([row]) for row in range(9)]
    torch.testing.assert_close(cut_loss(stack, rows, log_probs, parts)[0], means.mean())


def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage():
    rows = make_rollouts([1.0, 0.0], lengths=[1, 1], tokens=2, old_log_probs=[[-3.0, 0.0], [-3.0, 0.0]])
    log_probs = torch.tensor([[-3.0, 0.0], [-0.5, 0.0]])  # a ratio of e^2.5
    advantage = float(credit(["grpo"], rows).advantages[0])
    for dual_clip, bound in ((None, math.exp(2.5)), (3.0, 3.0), (5.0, 5.0)):
        loss, _ = loss_and_gradient(opened(GRPO | {"dual_clip": dual_clip}), rows, log_probs)
        assert float(loss) == pytest.approx(advantage * (bound - 1) / 2, rel=1e-4)


# token weights


@given(st.floats(-30, 0))
def test_phi_is_largest_where_the_policy_is_undecided(logp):
    leaf = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    phi = -float(gradient_of(token_losses(leaf, "phi"), leaf))
    assert 0 <= phi <= 0.25 and phi <= math.exp(logp) + 1e-12 and phi <= -math.expm1(logp) + 1e-12
    assert float(gradient_of(token_losses(leaf, "none"), leaf)) == -1
    probability = gradient_of(-leaf.exp(), leaf)  # `is` maximises the probability itself
    torch.testing.assert_close(gradient_of(token_losses(leaf, "is"), leaf), probability)


def test_phi_is_a_quarter_at_one_half():
    leaf = torch.tensor(math.log(0.5), requires_grad=True)
    assert float(gradient_of(token_losses(leaf, "phi"), leaf)) == pytest.approx(-0.25)


def test_above_the_cutoff_there_is_no_gradient():
    rows, log_probs = made_up(9, lengths=[5] * 9)
    log_probs = log_probs / 3  # probabilities between 0.37 and 1
    _, whole = loss_and_gradient(opened(SFT), rows, log_probs)
    loss, gradient = loss_and_gradient(opened(SFT | {"cutoff": 0.6}), rows, log_probs)
    expert = rows.of_kind("expert")[:, None] & rows.mask
    above = expert & (log_probs.exp() > 0.6)
    assert bool(above.any()) and not gradient[above].any()
    torch.testing.assert_close(gradient[~above], whole[~above])  # with the weight of the uncut probability
    p = log_probs.exp()
    expected = -(log_probs.clamp(max=math.log(0.6)) * p * (1 - p))[expert].mean()
    torch.testing.assert_close(loss, expected)


# the cut into micro-batches


def shuffled_parts(seed, rows, count):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return [part for part in order.tensor_split(count) if len(part)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.sampled_from(["token_mean", "sequence_mean"]))
def test_the_cut_changes_nothing(seed, count, reduction):
    rows, log_probs = made_up(seed)
    stack = opened(HALF | {"sft_reduction": reduction})
    whole = cut_loss(stack, rows, log_probs, [torch.arange(9)])
    for mine, expected in zip(cut_loss(stack, rows, log_probs, shuffled_parts(seed, 9, count)), whole, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-5)


def test_micro_batches_may_hold_one_kind_alone():
    rows, log_probs = made_up(10)
    stack, expert = opened(HALF), rows.of_kind("expert")
    parts = [expert.nonzero().flatten(), (~expert).nonzero().flatten()]
    whole = cut_loss(stack, rows, log_probs, [torch.arange(9)])[0]
    torch.testing.assert_close(cut_loss(stack, rows, log_probs, parts)[0], whole)


def released(rows, log_probs, parts, advantages, mu):
    """The released loss: a token mean of each kind in each micro-batch, weighted by its rows."""
    total = 0.0
    for part in parts:
        for kind, factor in (("policy", 1 - mu), ("expert", mu)):
            mine = [row for row in part.tolist() if rows.of_kind(kind)[row]]
            losses = []
            for row in mine:
                for token in rows.mask[row].nonzero().flatten():
                    logp, A = float(log_probs[row, token]), float(advantages[row])
                    ratio = math.exp(logp - float(rows.old_log_probs[row, token]))
                    clip = max(-A * ratio, -A * min(max(ratio, 0.8), 1.2))
                    losses.append(clip if kind == "policy" else -logp * math.exp(logp) * (1 - math.exp(logp)))
            share = len(mine) / int(rows.of_kind(kind).sum())
            total += factor * share * sum(losses) / (len(losses) + 1e-8)
    return total


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_the_released_reduction_weighs_micro_batches_by_rows(seed, count):
    rows, log_probs = made_up(seed)
    parts = shuffled_parts(seed, 9, count)
    loss, _ = cut_loss(opened(HALF | {"global_tokens": False}), rows, log_probs, parts)
    advantages = credit(["grpo"], rows).advantages
    assert float(loss) == pytest.approx(released(rows, log_probs, parts, advantages, 0.5), abs=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 5))
def test_the_released_reduction_agrees_where_lengths_do(seed, count, length):
    rows, log_probs = made_up(seed, lengths=[length] * 9)
    parts = shuffled_parts(seed, 9, count)
    found = [cut_loss(opened(HALF | {"global_tokens": form}), rows, log_probs, parts)[0] for form in (True, False)]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


# the expert rows


def test_experts_are_rows_of_no_group_under_their_own_prompt():
    stack, rows = extended()
    assert rows.of_kind("expert").tolist() == [False] * 8 + [True] * 2
    experts = experts_of(rows)
    for prompt, tokens, mask in zip(experts.prompts, experts.responses, experts.mask, strict=True):
        assert "".join(chr(96 + int(token)) for token in tokens[mask]) == ANSWERS[prompt[0] - 100]
    assert experts.groups.tolist() == [-1, -1] and experts.prompt_rows.tolist() == [-1, -1]
    assert experts.scores.flatten().tolist() == [0.0, 0.0]
    made = stack.credit(replace(rows, old_log_probs=-0.5 * rows.mask))
    assert made.weights.flatten().tolist() == [1.0] * 8 + [0.0] * 2


@pytest.mark.parametrize(("share", "rows", "count"), [(0.2, 256, 64), (0.2, 32, 8), (0.2, 30, 8), (0.5, 7, 7),
                                                      (0.2, 1, 1), (0.2, 0, 0), (0.9, 1, 9)])  # fmt: skip
def test_the_number_of_experts(share, rows, count):
    assert experts_beside(rows, share) == count


@given(st.integers(1, 10_000), st.floats(0.01, 0.95))
def test_the_share_of_the_experts_is_rounded_up(rows, share):
    count = experts_beside(rows, share)
    assert share - 1e-9 <= count / (rows + count) and count == math.ceil(share * (rows + count) - 1e-6)


def test_a_step_without_rows_has_no_experts():
    nothing = first_rows().select(torch.tensor([], dtype=torch.int64))
    _, rows = extended(rows=nothing)
    assert not len(rows)


@pytest.mark.parametrize(("column", "named"), [(None, "demonstration"), ("solution", "solution")])
def test_experts_from_the_prompt_file(column, named):
    pool = make_pool(4, {named: ["ab", None, "", "c"]})
    options = {"demonstrations": None, "column": column, "expert_share": 0.5}
    _, rows = extended(options, first_rows(4, pool=pool), pool=pool)
    experts = experts_of(rows)
    texts = ["".join(chr(96 + int(token)) for token in row[row > 0]) for row in experts.responses]
    assert [pool.keys.tolist().index(key) for key in experts.prompt_keys.tolist()] == [
        {"ab": 0, "c": 3}[text] for text in texts
    ]
    assert sorted(texts) == ["ab", "ab", "c", "c"]  # two epochs of two answers


def test_a_missing_file_or_field_is_said_when_the_run_starts(tmp_path):
    with pytest.raises(DataError, match="none"):
        opened({"demonstrations": str(tmp_path / "none.jsonl")})
    with pytest.raises(ConfigurationError, match="solution"):
        opened({"demonstrations": None, "column": "solution"}, pool=make_pool(2, {"answer": ["a", "b"]}))


def drawn(stack, steps, first=0):
    """Which demonstrations come in each step."""
    found = []
    for step in range(first, first + steps):
        stack.begin_step(step, 1000)
        rows = stack.extend_rollouts(first_rows(), Engine())
        found += [prompt[0] - 100 for prompt in experts_of(rows).prompts]
    return found


def test_every_answer_comes_once_per_epoch_in_a_new_order():
    found = drawn(opened(), 12)
    epochs = [found[first : first + 6] for first in range(0, 24, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(6))] * 4
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert found == drawn(opened(), 12)


def test_a_resumed_run_goes_on_in_the_epoch(tmp_path):
    stack = opened()
    found = drawn(stack, 2)
    stack.save(tmp_path / "state", 2)
    resumed = opened()
    resumed.load(tmp_path / "state")
    after = drawn(resumed, 4, first=2)
    assert sorted(found + after[:2]) == list(range(6))
    assert after == drawn(stack, 4, first=2)


def test_a_run_is_not_resumed_with_other_demonstrations(tmp_path):
    opened().save(tmp_path / "state", 1)
    (tmp_path / "fewer.jsonl").write_text(FILE.read_text().split("\n", 1)[1])
    with pytest.raises(StateError, match="began with 6 demonstrations, now there are 5"):
        opened({"demonstrations": str(tmp_path / "fewer.jsonl")}).load(tmp_path / "state")


# beside other plugins


class Others(Plugin):
    """Drops, weighs and shapes every row, and adds one to all advantages."""

    name = "others"
    kinds = frozenset({"copied"})

    @hookimpl
    def extend_rollouts(self, rollouts):
        copies = rollouts.select(torch.arange(4)).unguarded()
        return concatenate([rollouts, replace(copies, kinds=("policy", "copied"), kind=copies.kind + 1)])

    @hookimpl
    def filter_rollouts(self, scores):
        return (scores > 0).float()

    @hookimpl
    def shape_advantages(self, advantages):
        return advantages + 1

    @hookimpl
    def select_samples(self, advantages):
        return 0 * advantages + 2


def test_it_comes_last_and_others_do_not_touch_its_rows():
    options = {"demonstrations": str(FILE)} | HALF
    stack = start([{"chord": options}, "grpo", Others()])
    rows = stack.filter_rollouts(stack.extend_rollouts(first_rows(), Engine()))
    expert = rows.of_kind("expert")
    assert int(expert.sum()) == 3  # a fifth of fifteen rows: it counts those that the other has added
    assert bool((rows.scores[~expert] > 0).all())
    made = stack.credit(replace(rows, old_log_probs=-0.5 * rows.mask))
    assert made.advantages[expert].eq(0).all() and made.weights[expert].eq(0).all()
    assert made.advantages[~expert].flatten().tolist() == pytest.approx([0.5] * int((~expert).sum()), abs=1e-6)
    assert made.weights[~expert].eq(2).all()


def test_the_groups_are_those_without_experts():
    stack, rows = extended(GRPO)
    made = stack.credit(replace(rows, old_log_probs=-0.5 * rows.mask))
    alone = credit(["grpo"], replace(first_rows(), old_log_probs=-0.5 * first_rows().mask))
    assert torch.equal(made.advantages[:8], alone.advantages) and torch.equal(made.groups[:8], alone.groups)
    assert made.groups.tolist()[8:] == [-1, -1]


def test_metrics():
    stack, rows = extended()
    rows = replace(rows, old_log_probs=-0.5 * rows.mask)
    made = stack.credit(rows)
    mini = stack.mini_batch(stack.update_columns(rows, made), kinds=rows.kinds)
    log_probs = -rows.mask.float()
    for part in torch.arange(10).split(3):
        mini.loss(log_probs[part], part)
    own = "rlplugins/chord/"
    found = {name[len(own) :]: value for name, value in stack.metrics.as_dict().items() if name.startswith(own)}
    p = math.exp(-1)
    assert found == pytest.approx({"experts": 2, "mu": 0.1, "sft_loss": p * (1 - p), "expert_probability": p})


# what it says about itself


@pytest.mark.parametrize(
    ("options", "message"),
    [({"demonstrations": "a.jsonl", "column": "answer"}, "not both"), ({"expert_share": 0}, "expert_share"),
     ({"expert_share": 1}, "expert_share"), ({"mu_warmup": -1}, "mu_warmup"), ({"mu_decay": -1}, "mu_decay"),
     ({"mu_peak": 1.1}, "mu_peak"), ({"mu_valley": -0.1}, "mu_valley"), ({"mu_peak": NAN}, "mu_peak"),
     ({"weight": "psi"}, "weight"), ({"cutoff": 0}, "cutoff"), ({"cutoff": 1.5}, "cutoff"),
     ({"cutoff": 0.5, "weight": "none"}, "cutoff belongs to the weight phi"), ({"sft_reduction": "sum"}, "sft_reduction"),
     ({"dual_clip": 1}, "dual_clip")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(Chord, options)


def test_facts_that_clash_are_refused():
    with pytest.raises(StackError, match="absolute_advantages"):
        Stack(["grpo", "chord", stand_in(breaks=["absolute_advantages"])])
    Stack(["grpo", "chord", stand_in(breaks=["absolute_advantages"])], allow=["absolute_advantages"])


def test_a_trainer_that_cannot_give_what_it_needs_is_refused():
    able = {"provides": frozenset({"engine"})}
    file = {"chord": {"demonstrations": str(FILE)}}
    with pytest.raises(StackError, match="an engine"):
        Stack([file], trainer=Trainer(name="bare"))
    with pytest.raises(StackError, match="2 or more"):
        Stack([file], trainer=Trainer(name="single", group_size=1, **able))
    with pytest.raises(StackError, match="column 'demonstration'"):
        Stack(["chord"], trainer=Trainer(name="plain", columns=frozenset({"answer"}), **able))
    Stack([file], trainer=Trainer(name="plain", columns=frozenset({"answer"}), **able))
    Stack([{"chord": {"column": "answer"}}], trainer=Trainer(name="plain", columns=frozenset({"answer"}), **able))


def test_the_released_form_needs_one_rank():
    for ranks, ok in ((1, True), (2, False)):
        trainer = Trainer(name="several", ranks=ranks, provides=frozenset({"engine"}))
        Stack(["chord"], trainer=trainer)
        if ok:
            Stack([{"chord": {"global_tokens": False}}], trainer=trainer)
        else:
            with pytest.raises(StackError, match="one rank"):
                Stack([{"chord": {"global_tokens": False}}], trainer=trainer)


def test_it_claims_the_mean_over_tokens():
    other = type("Other", (Plugin,), {"name": "other", "uses": {"reduce_loss": "sequence_mean"}})()
    for options in ({}, {"global_tokens": False}):
        with pytest.raises(StackError, match="reduce_loss has one owner"):
            Stack(["grpo", {"chord": options}, other])


def test_a_row_of_a_kind_that_was_not_declared_would_be_refused(monkeypatch):
    monkeypatch.setattr(Chord, "kinds", frozenset())
    with pytest.raises(Exception, match="expert"):
        extended()


# what every plugin must do

test_conformance = conformance(
    "chord",
    [
        {"demonstrations": str(FILE)},
        {"mu_peak": 0.9, "mu_valley": 0.05, "mu_decay": 200, "weight": "none", "sft_reduction": "sequence_mean"},
        {"column": "demonstration", "weight": "is", "global_tokens": False, "dual_clip": 3.0},
        {"demonstrations": str(FILE), "mu_warmup": 2, "mu_peak": 1.0, "cutoff": 0.5, "expert_share": 0.5},
    ],
    prompts=lambda count: {"demonstration": ["a word", None, "more"] * (count // 3)},
)
