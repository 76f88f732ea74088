"""Facts about Rank-GRPO, through the stack."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, HookError, StackError
from rlplugins.plugin import make
from rlplugins.stack import Stack
from rlplugins.steps import Run
from rlplugins.testing import conformance, credit, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_rank_grpo import RankGrpo, item_hits, listed_items

END, LINE, TWO_LINES = 99, 9, 10
IDS = [
    [7, 8, 1, 9, 3, 5, 6, 99],
    [7, 1, 9, 99, 0, 0, 0, 0],
    [7, 3, 8, 1, 9, 1, 4, 99],
    [7, 8, 3, 9, 9, 1, 4, 99],
]
SEPARATORS = [[0, 0, 1, 0, 1, 0, 0, 0], [0, 1] + [0] * 6, [0, 1, 0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 0, 0]]
MASK = [[1] * 8, [1] * 4 + [0] * 4, [1] * 8, [1] * 8]
RANKS = [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 1, -1, -1, -1, -1], [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1, 1, 2, 2]]
HITS = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
LOG_DECAY = [[1.5, 0.5, 0.5], [0.6309298, 0.6309298, 0.0], [1.63093, 0.6309298, 0.0], [0.0, 0.0, 0.0]]
TOKEN_ADVANTAGES = [
    [0.8658754, 0.8658754, 0.8658754, -0.8658754, -0.8658754, 1.4997, 1.4997, 0.1],
    [-0.8658754, -0.8658754, 0.8658754, -0.1, 0.0, 0.0, 0.0, 0.0],
    [0.8658754, 0.8658754, 0.8658754, 0.8658754, -0.4999, -0.4999, -0.1, -0.1],
    [-0.8658754, -0.8658754, -0.8658754, -0.8658754, -0.8658754, -0.8658754, -0.4999, 0.1],
]
LOG_RATIO = [
    [0.045, 0.062, -0.058, 0.04, 0.098, 0.004, 0.107, 0.092],
    [-0.02, 0.053, 0.047, 0.11, 0.0, 0.0, 0.0, 0.0],
    [0.014, 0.045, -0.09, 0.108, 0.016, -0.093, -0.043, -0.003],
    [0.045, -0.047, 0.157, -0.037, -0.037, -0.07, -0.005, 0.106],
]
RATIO = [
    [1.016467, 1.016467, 1.016467, 1.071436, 1.071436, 1.070009, 1.070009, 1.070009],
    [1.016637, 1.016637, 1.081663, 1.081663, 0.0, 0.0, 0.0, 0.0],
    [1.029939, 1.029939, 1.009041, 1.009041, 0.9622317, 0.9622317, 0.9772625, 0.9772625],
    [1.053025, 1.053025, 1.053025, 0.9531338, 0.9531338, 0.9531338, 1.051797, 1.051797],
]
PLAIN = {"separators": {LINE: 1, TWO_LINES: 2}, "end_tokens": [END]}

pytestmark = pytest.mark.filterwarnings("ignore:rank-grpo")


class Spy(Plugin):
    """Keeps the losses of the update."""

    name = "spy"

    @hookimpl(wrapper=True)
    def policy_loss(self):
        result = yield
        type(self).loss = result.detach()
        return result


def entry(**options):
    return {"rank-grpo": {"n_ranks": 3, **PLAIN, **options}}


@functools.cache
def first_step(*items):
    """A stack whose first step is open; credit changes no state, so that one serves many examples."""
    return start([entry(**dict(items))])


def rollouts_of(tokens, hits, groups=None, **fields):
    """Responses given as lists of token ids."""
    width = max(2, *map(len, tokens))
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in tokens])
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens])
    fields = {"old_log_probs": torch.zeros(mask.shape), **fields}
    hits = torch.tensor(hits)
    scores = hits.nanmean(1) if "scores" not in fields else fields.pop("scores")
    return make_rollouts(scores, groups, mask=mask, responses=ids, components=hits, **fields)


def worked_tokens():
    """The worked example with its separators written as token 9 and its other nines as token 2."""
    pairs = [zip(ids, marks, strict=True) for ids, marks in zip(IDS, SEPARATORS, strict=True)]
    rows = [[LINE if mark else (2 if token == LINE else token) for token, mark in row] for row in pairs]
    return [row[: sum(there)] for row, there in zip(rows, MASK, strict=True)]


def worked_example(**fields):
    return rollouts_of(worked_tokens(), HITS, **fields)


def log_ratio():
    return torch.tensor(LOG_RATIO).double()


def close(one, other, **tolerance):
    one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
    torch.testing.assert_close(one, other, **({"atol": 1e-6, "rtol": 1e-6} | tolerance))


# the worked example


def test_the_worked_example():
    made = start([entry()]).credit(worked_example())
    assert made.segments.tolist() == RANKS
    assert made.rewards.tolist() == HITS
    close(made.advantages, TOKEN_ADVANTAGES)


def test_the_worked_example_under_the_other_reward():
    made = start([entry(reward="log_decay")]).credit(worked_example())
    close(made.rewards, LOG_DECAY)
    first = torch.tensor(LOG_DECAY)[:, 0]
    close(made.advantages[:, 0], (first - first.mean()) / (first.std() + 1e-4))


@pytest.mark.parametrize(("aggregation", "expected"), [("rank_mean", 0.005986073), ("token_mean", 0.003235922)])
def test_the_worked_examples_loss(aggregation, expected):
    loss, _ = loss_and_gradient(start([entry(aggregation=aggregation), Spy()]), worked_example(), log_ratio())
    assert float(loss) == pytest.approx(expected, abs=1e-8)
    a, w = torch.tensor(TOKEN_ADVANTAGES).double(), torch.tensor(RATIO).double()
    close(Spy.loss, torch.maximum(-a * w, -a * w.clamp(0.94, 1.08)))


# ranks

tokens = st.lists(st.sampled_from([2, 3, LINE, TWO_LINES]), max_size=12)
lists = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=6)


def loops(row, n_ranks):
    """Rank of each token, as a reader would count."""
    ranks, rank = [], 0
    for token in row:
        ranks.append(min(rank, n_ranks))
        rank += {LINE: 1, TWO_LINES: 2}.get(token, 0)
    return ranks


@settings(max_examples=40, deadline=None)
@given(lists, st.integers(1, 4))
def test_a_token_has_the_rank_of_the_separators_before_it(rows, n_ranks):
    rows = [row + [END] * ended for row, ended in rows]
    rollouts = rollouts_of(rows, [[0.0] * n_ranks for _ in rows])
    segments = first_step(("n_ranks", n_ranks)).credit(rollouts).segments
    assert [row[: len(rows[i])] for i, row in enumerate(segments.tolist())] == [loops(row, n_ranks) for row in rows]
    assert bool((segments[~rollouts.mask] == -1).all())


def test_a_token_with_two_newlines_leaves_a_rank_empty():
    made = start([entry()]).credit(rollouts_of([[2, TWO_LINES, 3]], [[0.0] * 3]))
    assert made.segments.tolist() == [[0, 0, 2]]


class Tokenizer:
    """Eight tokens."""

    texts = ("a", "b\n", "\r\n", "\n\n", "x\r\n\r\ny", " \n c", "<end>", "\r")
    eos_token_id = 6

    def __len__(self):
        return len(self.texts)

    def batch_decode(self, rows):
        return [self.texts[token] for (token,) in rows]


def run_with(tokenizer, **options):
    stack = Stack([{"rank-grpo": {"n_ranks": 9, **options}}])
    stack.start(Run(10, 4, 64, make_pool(4), tokenizer=tokenizer))
    stack.begin_step(0, 10)
    return stack


def test_separators_and_the_end_token_come_from_the_tokenizer():
    stack = run_with(Tokenizer())
    rollouts = rollouts_of([[0, 1, 2, 3, 4, 5, 7, 500, 6], [0, 6]], [[0.0] * 9] * 2)
    made = stack.credit(rollouts)
    assert made.segments[0].tolist() == [0, 0, 1, 2, 4, 6, 7, 7, 7]
    close(made.advantages.sum(1), [-0.1, -0.1])


def test_options_replace_the_tokenizer():
    stack = run_with(Tokenizer(), separators={0: 1}, end_tokens=[1])
    made = stack.credit(rollouts_of([[3, 0, 6, 1], [3, 3, 3, 3]], [[0.0] * 9] * 2))
    assert made.segments[0].tolist() == [0, 0, 1, 1]
    close(made.advantages, [[0, 0, 0, -0.1], [0, 0, 0, 0]])


@pytest.mark.parametrize("option", ["separators", "end_tokens"])
def test_without_a_tokenizer_the_options_are_wanted(option):
    given = {name: value for name, value in PLAIN.items() if name != option}
    with pytest.raises(ConfigurationError, match=rf"rank-grpo\.{option}: the trainer gives no tokenizer"):
        run_with(None, **given)
    run_with(None, **PLAIN)


# rewards and advantages

binary = st.sampled_from([0.0, 1.0])
hit_rows = st.lists(st.lists(binary, min_size=4, max_size=4), min_size=2, max_size=6)
LIST = [2, LINE, 3, LINE, 4, LINE, 5, END]


def advantages(hits, groups=None, reward="exp_inf", rows=None, **options):
    stack = first_step(("n_ranks", 4), ("reward", reward), *options.items())
    return stack.credit(rollouts_of(rows or [LIST] * len(hits), hits, groups)).advantages


@settings(max_examples=25, deadline=None)
@given(hit_rows, st.integers(1, 3), st.sampled_from(["exp_inf", "log_decay"]), st.randoms(use_true_random=False))
def test_earlier_hits_earn_nothing_for_later_ranks(hits, rank, reward, random):
    changed = [[random.choice([0.0, 1.0]) for _ in row[:rank]] + row[rank:] for row in hits]
    later = slice(2 * rank, None)
    assert torch.equal(advantages(hits, reward=reward)[:, later], advantages(changed, reward=reward)[:, later])


@settings(max_examples=25, deadline=None)
@given(hit_rows, st.sampled_from(["exp_inf", "log_decay"]))
def test_each_rank_is_normalised_by_itself(hits, reward):
    made = advantages(hits, reward=reward)
    h = torch.tensor(hits).double()
    if reward == "log_decay":
        h = torch.stack([(h[:, k:] / torch.arange(k + 2, 6).log2()).sum(1) for k in range(4)], 1)
    expected = (h - h.mean(0)) / (h.std(0) + 1e-4)
    close(made[:, [0, 2, 4, 6]], expected, atol=2e-3 if reward == "log_decay" else 1e-5, rtol=1e-4)
    close(made[:, [0, 2, 4]], made[:, [1, 3, 5]], atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.lists(binary, min_size=4, max_size=4), st.sampled_from(["exp_inf", "log_decay"]))
def test_equal_rewards_and_a_group_of_one_leave_the_length_terms(size, hits, reward):
    made = advantages([hits] * size, reward=reward)
    assert torch.equal(made, torch.tensor([[0.0] * 7 + [0.1]] * size))


def test_groups_do_not_mix():
    hits = [[1.0, 0, 0, 0], [0.0, 0, 0, 0]]
    one = advantages(hits)
    both = advantages([hits[0], [1.0] * 4, hits[1], [1.0] * 4], [0, 1, 0, 1])
    assert torch.equal(both[[0, 2]], one)


def test_a_reward_that_is_missing_takes_its_rank_out_of_the_group():
    hits = [[1.0, math.nan, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    made = advantages(hits, reward="exp_inf")
    plain = advantages([[1.0, 0.0, 1.0, 0.0], *hits[1:]])
    assert not made[:, 2:4].any()
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(made[:, others], plain[:, others])
    tail = advantages(hits, reward="log_decay")
    assert not tail[:, :4].any() and bool(tail[:, 4:7].any()), "what a rank earns counts later hits"
    loss, gradient = loss_and_gradient(
        start([entry(n_ranks=4)]), rollouts_of([LIST] * 3, hits), torch.zeros((3, 8)).double()
    )
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_a_response_without_any_reward_leaves_the_group():
    hits = [[1.0, 0.0, 0, 0], [math.nan] * 4, [0.0, 1.0, 0, 0]]
    made = advantages(hits)
    assert not made[1].any()
    assert torch.equal(made[[0, 2]], advantages([hits[0], hits[2]]))


# length terms

EQUAL = [[0.0] * 3] * 2


def of_lengths(*rows, **options):
    return start([entry(**options)]).credit(rollouts_of(list(rows), EQUAL)).advantages


def test_a_full_list_earns_the_bonus_and_a_short_one_the_penalty():
    made = of_lengths([2, LINE, 2, LINE, 2, END], [2, LINE, 2, END])
    close(made, [[0, 0, 0, 0, 0, 0.1], [0, 0, 0, -0.1, 0, 0]])


def test_every_token_after_the_last_item_is_penalised_the_end_token_too():
    made = of_lengths([2, LINE, 2, LINE, 2, LINE, 3, LINE, END], [2, LINE, 2, LINE, 2, LINE, END])
    close(made, [[0] * 6 + [-0.1] * 3, [0] * 6 + [-0.1, 0, 0]])


def test_a_truncated_list_has_no_end_term():
    close(of_lengths([2, LINE, 2], [2, LINE, 2, LINE, 2]), torch.zeros((2, 5)))


def test_an_empty_response_has_nothing():
    stack = start([entry()])
    rollouts = rollouts_of([[], []], EQUAL)
    assert not stack.credit(rollouts).advantages.any()
    loss, gradient = loss_and_gradient(stack, rollouts, torch.zeros((2, 2)))
    assert float(loss) == 0 and not gradient.any()


def test_the_size_of_each_length_term_is_an_option():
    rows = ([2, LINE, 2, LINE, 2, END], [2, END])
    close(of_lengths(*rows, end_bonus=0.7, early_stop=-0.3), [[0] * 5 + [0.7], [0, -0.3, 0, 0, 0, 0]])
    long = [2, LINE, 2, LINE, 2, LINE, 3]
    close(of_lengths(long, [2], overflow=-0.4), [[0] * 6 + [-0.4], [0] * 7])
    assert not of_lengths(long, rows[0], length_shaping=False).any()


def test_end_tokens_get_no_reward_of_their_rank_whatever_the_length_terms():
    made = advantages([[1.0] * 4, [0.0] * 4], length_shaping=False)
    assert bool((made[:, :7] != 0).all()) and not made[:, 7].any()


def test_only_the_first_end_token_is_one():
    made = of_lengths([2, END, 2, END], [2, END])
    close(made, [[0, -0.1, 0, 0], [0, -0.1, 0, 0]])


def test_a_penalty_without_effect_is_told():
    rows = [[2, LINE, 2, LINE, 2, LINE, 3], [2]]
    with pytest.warns(UserWarning, match="1 of 2 lists have more than 3 items"):
        of_lengths(*rows)
    for options in ({"aggregation": "token_mean"}, {"length_shaping": False}, {"overflow": 0.0}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            of_lengths(*rows, **options)


def test_the_share_of_complete_lists_is_reported():
    stack = start([entry()])
    stack.credit(rollouts_of([[2, LINE, 2, LINE, 2], [2], [2, LINE] * 5, [3]], [[0.0] * 3] * 4))
    metrics = dict(stack.metrics)
    assert metrics["rlplugins/rank-grpo/complete_lists"] == 0.25
    assert metrics["rlplugins/rank-grpo/overflowing_lists"] == 0.25


def test_rows_of_no_group_pass_unchanged_and_take_no_part():
    kind = torch.tensor([1, 0, 0], dtype=torch.int8)
    hits = [[9.0] * 3, [1.0, 0, 0], [0.0, 0, 0]]
    rollouts = rollouts_of([LIST] * 3, hits, [-1, 0, 0], kind=kind, kinds=("policy", "expert"))
    made = start([entry()]).credit(rollouts).advantages
    assert not made[0].any()
    assert torch.equal(made[1:], start([entry()]).credit(rollouts_of([LIST] * 2, hits[1:])).advantages)


# the loss


def random_log_probs(rollouts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rollouts.mask.shape, generator=generator).double() * 0.1 * rollouts.mask


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=5), st.integers(0, 2**31))
def test_one_rank_is_gspo(lengths, seed):
    rows = [[2] * length for length in lengths]
    hits = [[float(place % 2)] for place in range(len(rows))]
    rollouts = rollouts_of(rows, hits)
    log_probs = random_log_probs(rollouts, seed)
    one = loss_and_gradient(start([entry(n_ranks=1)]), rollouts, log_probs)
    owners = {"policy_loss": "gspo", "reduce_loss": "sequence_mean", "clip_range": {"fixed": {"low": 0.06, "high": 0.08}},
              "advantage_scale": {"group_std": {"eps": 1e-4}}}  # fmt: skip
    other = loss_and_gradient(start(["grpo"], owners=owners), rollouts, log_probs)
    for a, b in zip(one, other, strict=True):
        close(a, b)


@settings(max_examples=15, deadline=None)
@given(hit_rows, st.integers(0, 2**31))
def test_one_token_per_rank_is_the_token_ratio(hits, seed):
    rows = [[LINE] * 4] * len(hits)
    rollouts = rollouts_of(rows, hits)
    log_probs = random_log_probs(rollouts, seed)
    options = {"n_ranks": 4, "aggregation": "token_mean"}
    one = loss_and_gradient(start([entry(**options)]), rollouts, log_probs)
    owners = {"policy_loss": "ppo_clip"}
    other = loss_and_gradient(start([entry(**options)], owners=owners), rollouts, log_probs)
    for a, b in zip(one, other, strict=True):
        close(a, b)


def test_the_ratio_is_one_at_the_old_policy():
    rollouts = worked_example()
    loss_and_gradient(start([entry(), Spy()]), rollouts, rollouts.old_log_probs)
    close(Spy.loss, -torch.tensor(TOKEN_ADVANTAGES))


def test_the_gradient_goes_through_the_mean_of_the_rank():
    rollouts, log_probs = worked_example(), random_log_probs(worked_example()) * 0.1
    stack = start([entry()])
    _, gradient = loss_and_gradient(stack, rollouts, log_probs)
    step = 1e-6
    for row, token in ((0, 1), (1, 3), (3, 4)):
        moved = []
        for sign in (1, -1):
            shifted = log_probs.clone()
            shifted[row, token] += sign * step
            moved.append(float(loss_and_gradient(stack, rollouts, shifted)[0]))
        assert float(gradient[row, token]) == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-7)


def test_overflow_tokens_share_a_ratio_and_count_under_the_token_mean_only():
    rollouts = rollouts_of([[2, LINE, 2, LINE, 2, LINE, 3, LINE, 4], [2]], EQUAL)
    for aggregation, trained in (("rank_mean", False), ("token_mean", True)):
        stack = start([entry(aggregation=aggregation), Spy()])
        _, gradient = loss_and_gradient(stack, rollouts, random_log_probs(rollouts))
        assert bool(gradient[0, 6:].any()) is trained
    assert float(Spy.loss[0, 6]) == float(Spy.loss[0, 7]) == float(Spy.loss[0, 8]) != 0


def test_an_absent_rank_is_a_rank_of_loss_nothing():
    rows = [[2, LINE, 3], [4, LINE, 5]]
    hits = [[1.0, 0, 0], [0.0, 1, 0]]
    three = loss_and_gradient(start([entry()]), rollouts_of(rows, hits), torch.full((2, 3), 0.01).double())
    two = loss_and_gradient(
        start([entry(n_ranks=2)]), rollouts_of(rows, [row[:2] for row in hits]), torch.full((2, 3), 0.01).double()
    )
    for a, b in zip(three, two, strict=True):
        close(a * 3, b * 2)


class Weighs(Plugin):
    """Weights of responses and tokens from data."""

    name = "weighs"

    @hookimpl
    def select_samples(self, advantages):
        return (torch.arange(len(advantages)) % 3)[:, None].float()

    @hookimpl
    def select_tokens(self, mask):
        return (torch.arange(mask.shape[1]) % 2 + 0.5 * torch.arange(len(mask))[:, None]).float()


class Penalised(Plugin):
    """A penalty per token."""

    name = "penalised"

    @hookimpl
    def kl_penalty(self, log_probs):
        return 0.1 * log_probs


def test_the_mean_over_ranks_with_weights_and_a_penalty():
    rollouts, log_probs = worked_example(), log_ratio()
    loss, _ = loss_and_gradient(start([entry(), Weighs(), Penalised(), Spy()]), rollouts, log_probs)
    w = [0.0, 1.0, 2.0, 0.0]
    total = 0.0
    for i, ranks in enumerate(RANKS):
        for k in range(3):
            place = [t for t, rank in enumerate(ranks) if rank == k]
            u = [t % 2 + 0.5 * i for t in place]
            x = [float(Spy.loss[i, t] + 0.1 * log_probs[i, t]) for t in place]
            total += w[i] * sum(a * b for a, b in zip(u, x, strict=True)) / sum(u) if sum(u) else 0.0
    assert float(loss) == pytest.approx(total / (3 * sum(w)), abs=1e-7)


@pytest.mark.parametrize("option", [{"clip_low": 0.0}, {"clip_high": 0.0}, {"reward": "log_decay"}])
def test_options_that_reach_the_loss(option):
    plain = loss_and_gradient(start([entry()]), worked_example(), log_ratio())[0]
    assert abs(loss_and_gradient(start([entry(**option)]), worked_example(), log_ratio())[0] - plain) > 1e-5


@pytest.mark.parametrize("aggregation", ["rank_mean", "token_mean"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_do_not_change_the_loss(aggregation, micro_batches):
    stack = start([entry(aggregation=aggregation), Weighs()])
    whole = loss_and_gradient(stack, worked_example(), log_ratio())
    parts = loss_and_gradient(stack, worked_example(), log_ratio(), micro_batches=micro_batches)
    for one, other in zip(whole, parts, strict=True):
        close(one, other, atol=1e-12, rtol=0)


def test_ranks_do_not_change_the_loss():
    rollouts, stack = worked_example(), start([entry()])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    whole = stack.mini_batch(columns).loss(log_ratio()).total
    shares = [{name: column[rows] for name, column in columns.items()} for rows in (slice(0, 1), slice(1, None))]
    sums = []
    for share in shares:
        stack.mini_batch(share, reduce=lambda values: sums.append(values) or values)
    parts = []
    for share, rows in zip(shares, (slice(0, 1), slice(1, None)), strict=True):
        mini = stack.mini_batch(share, reduce=lambda _: sum(sums))
        parts.append(mini.loss(log_ratio()[rows]).total)
    torch.testing.assert_close(sum(parts), whole)


def test_the_same_step_twice_gives_the_same_and_changes_nothing_given():
    rollouts, log_probs = worked_example(), log_ratio()
    given = [rollouts.components, rollouts.responses, rollouts.mask, rollouts.scores, log_probs]
    before = [tensor.clone() for tensor in given]
    one, other = (loss_and_gradient(start([entry()]), rollouts, log_probs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_the_token_tables_survive_a_restart(tmp_path):
    stack = run_with(Tokenizer())
    stack.save(tmp_path / "state", 3)
    resumed = run_with(None, **PLAIN)
    assert resumed.load(tmp_path / "state") == 3
    for name, tensor in stack.plugins[0].state.as_dict().items():
        assert torch.equal(resumed.plugins[0].state.as_dict()[name], tensor)


# what it says about itself


def test_it_names_the_built_ins_that_it_is_made_of():
    assert start([entry()]).plugins[0].uses == {"baseline": "group_mean"}
    assert start([entry(aggregation="token_mean")]).plugins[0].uses["reduce_loss"] == "token_mean"


def test_the_reward_function_must_give_one_component_per_rank():
    with pytest.raises(
        HookError, match=r"needs one component per rank, 4 \(n_ranks\), but the reward function gives 3"
    ):
        credit([entry(n_ranks=4)], worked_example())


def test_a_trainer_without_components_or_groups_is_refused():
    with pytest.raises(StackError, match="column 'components'"):
        Stack([entry()], trainer=Trainer(name="bare", columns=frozenset()))
    with pytest.raises(StackError, match="2 or more"):
        Stack([entry()], trainer=Trainer(name="bare", group_size=1))


@pytest.mark.parametrize("fact", ["response_rewards", "reward_scale", "token_ratio"])
def test_what_it_breaks(fact):
    with pytest.raises(StackError, match=rf"{fact} .*other assumes it, rank-grpo breaks it"):
        Stack([entry(), stand_in(assumes=[fact])])


def test_the_length_terms_assume_that_advantages_stay_as_they_are():
    with pytest.raises(StackError, match=r"absolute_advantages .*rank-grpo assumes it, other breaks it"):
        Stack([entry(), stand_in(breaks=["absolute_advantages"])])
    Stack([entry(length_shaping=False), stand_in(breaks=["absolute_advantages"])])


@pytest.mark.parametrize(
    "hook", ["combine_rewards", "segment_tokens", "advantage_scale", "clip_range", "policy_loss", "reduce_loss"]
)
def test_another_owner_is_refused(hook):
    def impl(self):
        raise AssertionError

    impl.__name__ = hook
    other = type("Other", (Plugin,), {"name": "other", hook: hookimpl(impl)})
    with pytest.raises(StackError, match=f"{hook} has one owner, but is claimed by rank-grpo and other"):
        Stack([entry(), other()])


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_ranks", 0), ("reward", "dcg"), ("clip_low", 1.1), ("clip_high", -0.1), ("length_shaping", "perhaps"),
     ("overflow", 0.1), ("early_stop", 0.1), ("end_bonus", -0.1), ("end_bonus", math.inf), ("aggregation", "mean"),
     ("separators", {-1: 1}), ("end_tokens", [-1]), ("year_tolerance", 2)],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"rank-grpo\.{field}"):
        make(RankGrpo, {field: value})


# relevance

FILMS = [("Alien", 1979), ("Heat", 1995), ("Heat", 1986), ("Cube", 1997), ("Cube", 1999), ("(500) Days", 2009)]


def hits(response, relevant, mentioned=(), **options):
    return item_hits(response, relevant, set(FILMS), mentioned, **({"n_ranks": 4} | options))


def test_lines_are_numbered_as_tokens_are():
    assert listed_items("Alien (1979)\n\nnothing\r\n2. Heat (1995) \n- **Cube** (1997)") == [
        ("Alien", 1979), None, None, ("Heat", 1995), ("Cube", 1997)
    ]  # fmt: skip
    assert hits("Alien (1979)\n\nHeat (1995)", FILMS) == [1, 0, 1, 0]


def test_titles_that_begin_with_digits_or_brackets_are_read():
    assert listed_items('12 Monkeys (1995)\n3) "2012" (2009)\n(500) Days (2009)') == [
        ("12 Monkeys", 1995), ("2012", 2009), ("(500) Days", 2009)
    ]  # fmt: skip


def test_an_item_counts_once():
    assert hits("Alien (1979)\nAlien (1979)", [("Alien", 1979)]) == [1, 0, 0, 0]
    assert hits("Alien (1979)\nAlien (1979)", [("Alien", 1979)] * 2) == [1, 1, 0, 0]


def test_an_item_must_be_in_the_catalogue_and_new_to_the_conversation():
    assert hits("alien (1979)\nSolaris (1972)", [("Alien", 1979), ("Solaris", 1972)]) == [0, 0, 0, 0]
    assert hits("Alien (1979)\nHeat (1995)", FILMS, mentioned={"Alien"}) == [0, 1, 0, 0]


def test_the_year_may_be_two_off_and_the_nearest_is_used_up_first():
    assert hits("Cube (1997)", [("cube ", 1999)]) == [1, 0, 0, 0]
    assert hits("Cube (1997)", [("Cube", 2000)]) == [0, 0, 0, 0]
    assert hits("Cube (1997)", [("Cube", 1998)], year_tolerance=0) == [0, 0, 0, 0]
    assert hits("Cube (1997)\nCube (1999)", [("Cube", 1996), ("Cube", 1998)]) == [1, 0, 0, 0], "1998 goes first"


def test_items_after_the_last_rank_do_not_count():
    assert hits("Alien (1979)\nHeat (1995)", FILMS, n_ranks=1) == [1]


# what every plugin must do


def with_hits(rollouts):
    return replace(rollouts, components=rollouts.scores * torch.tensor([1, 7, 11]) % 1)


KIT = {"n_ranks": 3, "separators": {3: 1, 4: 2}, "end_tokens": [1]}
RELEASED = {**KIT, "reward": "log_decay", "aggregation": "token_mean"}
test_conformance = conformance("rank-grpo", [KIT, RELEASED, {**KIT, "length_shaping": False}], rows=with_hits)
