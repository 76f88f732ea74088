"""Facts about SPO-chain and SPO-tree, through the stack."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlplugins import Plugin, hookimpl
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Columns, Requests, Sampling, concatenate
from rlplugins.stack import Stack
from rlplugins.steps import Run, generator
from rlplugins.testing import conformance, credit, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_segment_po import SegmentPo, segment_starts, tree_values

NAN = float("nan")
END, LOST, WON = 1, 2, 3
LIMIT = 12
CHAIN = {"kl": 0.0, "whiten": False}
TREE = {"mode": "tree", "kl": 0.0, "whiten": False}

PROBS_A = [0.99, 0.6, 0.95, 0.3, 0.92, 0.85, 0.99, 0.4, 0.97, 0.7]
PROBS_B = [0.5, 0.95, 0.2, 0.99, 0.8, 0.6]
A_OF_A = [0.0, 0.2222222, 0.0, 0.2222222, 0.0, -0.4444444, 0.0, -0.4444444, 0.0, 0.7777778]
A_OF_B = [-0.2222222, 0.0, -0.2222222, 0.0, -0.3333333, -0.3333333]
WON_OF_9 = {("prompt 0", 1): 4, ("prompt 0", 5): 6, ("prompt 0", 9): 2, ("prompt 1", 0): 5, ("prompt 1", 4): 3}
"""Continuations that win, by prompt and tokens before the cut: the values of the worked example."""


class Engine:
    """An engine whose policy is a function.

    Args:
        draw: (prompt, tokens so far, how often this was asked before) -> tokens, of which the limit takes the first.
        score: of a whole response, by default whether its last token but the end is `WON`.
        probs: probability of each token id.
        limit: tokens of the longest response.
    """

    def __init__(self, draw=lambda prompt, beginning, time: [LOST, END], score=None, probs=None, limit=LIMIT):
        self.draw, self.limit = draw, limit
        self.score = score or (lambda tokens: float(WON in tokens[-2:]))
        self.probs = torch.full((4096,), 0.5) if probs is None else probs
        self.asked, self.max_tokens, self.times = [], [], Counter()

    def sampling(self, rows):
        return Sampling.of(rows, 1.0, self.limit)

    def generate(self, requests, sampling=None, *, score=True, greedy=False):
        assert score and not greedy
        names = [requests.prompts.texts[row] for row in requests.prompt.tolist()]
        assert names == requests.texts
        limits = (self.sampling(len(names)) if sampling is None else sampling).max_tokens.tolist()
        beginnings = [list(prefix) for prefix in requests.prefixes]
        self.asked.append(list(zip(names, beginnings, strict=True)))
        self.max_tokens.append(limits)
        tokens = []
        for name, beginning, limit in zip(names, beginnings, limits, strict=True):
            key = (name, tuple(beginning))
            tokens.append(beginning + self.draw(*key, self.times[key])[:limit])
            self.times[key] += 1
        forced = torch.tensor([len(beginning) for beginning in beginnings])[:, None]
        scores = [self.score(tuple(row)) for row in tokens]
        made = rows_of(tokens, scores, requests.prompt, pool=requests.prompts)
        prompts = [[100 + int(row)] for row in requests.prompts.rows[requests.prompt]]
        prefix = torch.arange(made.mask.shape[1]) < forced if bool(forced.any()) else None
        columns = {
            name: [column[row] for row in requests.prompt.tolist()] for name, column in requests.prompts.columns.items()
        }
        return replace(made, prompts=prompts, prefix=prefix, columns=Columns(columns))

    def log_probs(self, prompts, responses, mask, *, policy="current"):
        assert policy == "current" and len(prompts) == len(responses)
        return torch.where(mask, self.probs[responses].log(), 0.0)


def rows_of(tokens, scores, groups, **fields):
    """Rollouts of these responses, before the log-prob passes."""
    width = max(1, *(len(row) for row in tokens)) if tokens else 1
    responses = torch.tensor([[*row, *[0] * (width - len(row))] for row in tokens], dtype=torch.int64).view(-1, width)
    mask = torch.arange(width) < torch.tensor([len(row) for row in tokens])[:, None]
    fields = {"version": torch.zeros(len(tokens), dtype=torch.int64)} | fields
    return replace(make_rollouts(scores, groups, responses=responses, mask=mask, **fields), old_log_probs=None)


def winning(counts):
    """Continuations of which the first so many win, by prompt and tokens before the cut."""
    return lambda prompt, beginning, time: [WON if time < counts[prompt, len(beginning)] else LOST, END]


def chain_case(probs, scores, groups, draw, options=None, **settings):
    """Stack, engine and rows, with tokens 10, 11, ... of these probabilities, after the plugin has valued them."""
    sizes = [len(row) for row in probs]
    first = [10 + sum(sizes[:row]) for row in range(len(sizes))]
    table = torch.full((4096,), 0.5)
    table[10 : 10 + sum(sizes)] = torch.tensor([prob for row in probs for prob in row])
    engine = Engine(draw, probs=table, limit=settings.pop("limit", max(sizes) + 2))
    stack = start([{"segment-po": CHAIN | (options or {})}], **settings)
    tokens = [list(range(begin, begin + size)) for begin, size in zip(first, sizes, strict=True)]
    rows = stack.extend_rollouts(rows_of(tokens, scores, groups, pool=stack._pool), engine)
    return stack, engine, rows


def passed(rows, engine):
    """The rows with their old log-probs."""
    return replace(rows, old_log_probs=engine.log_probs(rows.prompts, rows.responses, rows.mask))


def tree_case(draw, score=None, options=None, prompts=(0,), limit=LIMIT, pool=None, **settings):
    """Stack, engine and rows of one tree for each of these prompts."""
    stack = start([{"segment-po": TREE | (options or {})}], pool=pool, **settings)
    engine = Engine(draw, score, limit=limit)
    return stack, engine, grown(stack, engine, prompts)


def grown(stack, engine, prompts):
    """The rows of a step on these prompts of the pool."""
    chosen = stack._pool.select(torch.tensor(prompts))
    requests = Requests.of(chosen, stack.allocate_rollouts(chosen, 1024))
    sampling = stack.sampling_params(requests, engine.sampling(len(requests)))
    return stack.extend_rollouts(engine.generate(requests, sampling), engine)


def from_table(table):
    """The children of each beginning, one after the other."""
    return lambda prompt, beginning, time: list(table[beginning][time])


def values_of(credit):
    return credit.advantages.flatten().tolist()


# the worked examples of the chain


def worked_chain(options=None):
    probs, scores = [PROBS_A, PROBS_B], [1.0, 0.0]
    options = {"interval": 2} | (options or {})
    stack, engine, rows = chain_case(probs, scores, [0, 1], winning(WON_OF_9), options)
    return stack, engine, passed(rows, engine)


def test_the_advantages_of_the_worked_example():
    stack, engine, rows = worked_chain()
    assert [len(asked) for asked in engine.asked] == [45]
    assert sorted({len(beginning) for name, beginning in engine.asked[0] if name == "prompt 0"}) == [1, 5, 9]
    advantages = stack.credit(rows).advantages
    assert advantages[0].tolist() == pytest.approx(A_OF_A, abs=1e-6)
    assert advantages[1, :6].tolist() == pytest.approx(A_OF_B, abs=1e-6)


def test_the_whitened_advantages_of_the_worked_example():
    stack, _, rows = worked_chain({"whiten": True})
    expected = [0.2101761, 0.7506289, 0.2101761, 0.7506289, 0.2101761, -0.8707295, 0.2101761, -0.8707295, 0.2101761, 2.101761,
                -0.3302767, 0.2101761, -0.3302767, 0.2101761, -0.6005031, -0.6005031]  # fmt: skip
    assert stack.credit(rows).advantages[rows.mask].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_loss_of_the_worked_example():
    stack, _, rows = worked_chain()
    rows = rows.select(torch.tensor([1]))
    change = torch.tensor([[0.1, -0.3, 0.25, 0.0, -0.1, 0.4, 0.0, 0.0, 0.0, 0.0]])
    mini = stack.mini_batch(stack.update_columns(rows, stack.credit(rows)))
    assert float(mini.loss(rows.old_log_probs + change).total) == pytest.approx(0.332455, abs=1e-6)


def test_the_segments_of_the_worked_example():
    stack, _, rows = worked_chain()
    segments = stack.credit(rows).segments
    assert segments[0].tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert segments[1].tolist() == [0, 0, 0, 0, 1, 1, -1, -1, -1, -1]


# the chain


def reference_advantages(probs, cuts, values, score, threshold=0.9):
    """The same by a walk over the points from the left, as the paper tells it."""
    points = {cut: value for cut, value in zip(cuts, values, strict=True) if cut >= 0}
    points[len(probs) - 1] = score
    base = values[0] if cuts and cuts[0] == -1 else None
    found, waiting = [], []
    for t, prob in enumerate(probs):
        waiting.append(prob)
        if t in points:
            step = 0.0 if base is None or not cuts else points[t] - base
            found += [0.0 if prob > threshold else step for prob in waiting]
            base, waiting = points[t], []
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.2, 0.5, 0.89, 0.91, 0.99]), min_size=1, max_size=14), min_size=1, max_size=4),
    st.integers(1, 4), st.integers(1, 3), st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_chain_gets_what_the_paper_says(probs, interval, continuations, random):
    wins = Counter()

    def draw(prompt, beginning, time):
        return [WON if wins.setdefault((prompt, beginning, time), random.randrange(2)) else LOST, END]

    scores = [float(random.randrange(2)) for _ in probs]
    options = {"interval": interval, "continuations": continuations}
    stack, engine, rows = chain_case(probs, scores, list(range(len(probs))), draw, options)
    rows = passed(rows, engine)
    made = stack.credit(rows)
    for row, of_row in enumerate(probs):
        unsure = [t for t, prob in enumerate(of_row) if prob < 0.9]
        cuts = [t - 1 for t in unsure][::interval]
        values = [
            np.mean(
                [wins[f"prompt {row}", tuple(rows.responses[row, : cut + 1].tolist()), k] for k in range(continuations)]
            )
            for cut in cuts
        ]
        expected = reference_advantages(of_row, cuts, values, scores[row])
        assert made.advantages[row][rows.mask[row]].tolist() == pytest.approx(expected, abs=1e-6)
        assert made.token_weights[row].nonzero().flatten().tolist() == unsure
    assert sum(map(len, engine.asked)) == len(wins)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from([0.0, 1.0]))
def test_with_every_token_unsure_and_n_1_it_is_token_level_monte_carlo(wins, score):
    counts = {("prompt 0", size): count for size, count in enumerate(wins)}
    stack, engine, rows = chain_case([[0.5] * len(wins)], [score], [0], winning(counts), {"interval": 1})
    A = stack.credit(passed(rows, engine)).advantages[0]
    v = [*(count / 9 for count in wins), score]
    assert A.tolist() == pytest.approx(np.diff(v).tolist(), abs=1e-6)
    assert float(A.sum()) == pytest.approx(score - v[0], abs=1e-5)


def test_a_response_without_an_unsure_token_has_no_advantage_and_asks_for_nothing():
    stack, engine, rows = chain_case([[0.95, 0.99]], [1.0], [0], None)
    made = stack.credit(passed(rows, engine))
    assert not engine.asked and not made.advantages.any() and not made.token_weights.any()


def test_a_token_of_exactly_the_threshold_keeps_its_advantage_but_is_not_trained():
    counts = {("prompt 0", 0): 9}
    stack, engine, rows = chain_case([[0.25, 0.5, 0.75]], [0.0], [0], winning(counts), {"threshold": 0.5})
    made = stack.credit(passed(rows, engine))
    assert made.advantages.tolist() == [[-1.0, -1.0, 0.0]] and made.token_weights.tolist() == [[1.0, 0.0, 0.0]]


def test_without_the_probability_mask_every_token_is_trained():
    stack, _, rows = worked_chain({"probability_mask": False, "whiten": True})
    made = stack.credit(rows)
    assert made.token_weights is None
    A = np.array(A_OF_A + A_OF_B)
    expected = (A - A.mean()) / np.sqrt(A.var(ddof=1) + 1e-8)
    assert made.advantages[rows.mask].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_continuation_may_draw_what_the_longest_response_leaves():
    _, engine, _ = chain_case([[0.5] * 4], [1.0], [0], winning(Counter()), {"interval": 1, "continuations": 2}, limit=7)
    assert engine.max_tokens == [[7, 7, 6, 6, 5, 5, 4, 4]]


def test_what_the_length_limit_cut_has_the_score_of_a_cut():
    def draw(prompt, beginning, time):
        return [WON] * 9 if time == 0 else [WON] * (4 - len(beginning)) + [END]  # the second ends in the last place

    options = {"interval": 1, "continuations": 2, "end_tokens": [END], "cut_score": -3.0}
    stack, engine, rows = chain_case([[0.5, 0.5]], [1.0], [0], draw, options, limit=5)
    assert stack.credit(passed(rows, engine)).advantages.tolist() == [[0.0, 2.0]]  # both cuts are worth (1 - 3) / 2
    for end_tokens, score in (([END], -3.0), ([11], 1.0), ([], -3.0)):
        options = {"end_tokens": end_tokens, "cut_score": -3.0}
        _, _, rows = chain_case([[0.5, 0.5]], [1.0], [0], draw, options, limit=2)
        assert rows.scores.tolist() == [[score]]


def test_continuations_without_a_score_are_left_out_and_a_cut_without_any_is_none():
    scored = {0: [1.0, NAN, 0.0], 1: [NAN, NAN, NAN], 2: [NAN, 1.0, NAN]}

    def draw(prompt, beginning, time):
        return [1000 + 10 * len(beginning) + time, END]

    def score(tokens):
        return scored[(tokens[-2] - 1000) // 10][tokens[-2] % 10]

    stack = start([{"segment-po": CHAIN | {"interval": 1, "continuations": 3}}])
    engine = Engine(draw, score)
    rows = stack.extend_rollouts(rows_of([[10, 11, 12]], [0.0], [0], pool=stack._pool), engine)
    made = stack.credit(passed(rows, engine))
    assert made.segments.tolist() == [[0, 0, 1]] and made.advantages.tolist() == [[0.5, 0.5, -1.0]]


def test_responses_that_begin_alike_share_continuations_and_those_of_other_prompts_do_not():
    stack = start([{"segment-po": CHAIN | {"interval": 2, "continuations": 2}}])
    engine = Engine()
    tokens = [[10, 11, 12], [10, 11, 13], [10, 14, 12], [10, 11, 12]]
    stack.extend_rollouts(rows_of(tokens, [0.0] * 4, [0, 0, 0, 1], pool=stack._pool), engine)
    expected = {
        ("prompt 0", ()),
        ("prompt 0", (10, 11)),
        ("prompt 0", (10, 14)),
        ("prompt 1", ()),
        ("prompt 1", (10, 11)),
    }
    assert dict(Counter((name, tuple(beginning)) for name, beginning in engine.asked[0])) == dict.fromkeys(expected, 2)


def test_values_belong_to_their_response_wherever_its_prompt_stands():
    pool = make_pool(8)
    stack = start([{"segment-po": CHAIN | {"interval": 1, "continuations": 2}}], pool=pool)
    chosen = pool.select(torch.tensor([5, 2, 7]))
    counts = {(f"prompt {row}", size): row % 3 for row in (5, 2, 7) for size in range(2)}
    engine = Engine(winning(counts))
    rows = rows_of([[10, 11], [12, 13], [14, 15], [16, 17]], [0.0] * 4, [2, 0, 1, 2], pool=chosen)
    rows = stack.extend_rollouts(rows, engine)
    assert rows.columns["segment_po_values"].tolist() == [[0.5, 0.5], [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]]


def test_tool_output_is_continued_from_but_never_cut_for_itself():
    probs = torch.full((4096,), 0.99)
    probs[[11, 12, 14]] = 0.5
    engine = Engine(winning({("prompt 0", 3): 9, ("prompt 0", 5): 0}), probs=probs)
    stack = start([{"segment-po": CHAIN | {"interval": 1}}])
    rows = rows_of([[10, 12, 12, 11, 13, 14]], [1.0], [0], pool=stack._pool)
    rows.mask[0, 1:3] = False
    rows = stack.extend_rollouts(rows, engine)
    assert {tuple(beginning) for _, beginning in engine.asked[0]} == {(10, 12, 12), (10, 12, 12, 11, 13)}
    made = stack.credit(passed(rows, engine))
    assert made.segments.tolist() == [[-1, -1, -1, 0, 0, 1]]
    assert made.advantages.tolist() == [[0.0, 0.0, 0.0, -1.0, 0.0, 1.0]]


def foreign(rows):
    """Another plugin's rows before these, and one of no group behind them."""
    hinted = replace(rows.select(torch.tensor([0])), kinds=("policy", "hinted"), kind=torch.ones(1, dtype=torch.int8))
    alone = replace(rows.select(torch.tensor([0])), groups=torch.tensor([-1]))
    return concatenate([hinted, rows, alone])


def test_rows_that_cannot_be_continued_have_no_segments_and_are_not_whitened():
    other = stand_in()
    object.__setattr__(other, "kinds", frozenset({"hinted"}))
    stack = start([{"segment-po": CHAIN | {"whiten": True, "interval": 1, "continuations": 2}}, other])
    engine = Engine(winning({("prompt 0", 0): 1, ("prompt 0", 1): 2}))
    rows = stack.extend_rollouts(foreign(rows_of([[10, 11]], [0.0], [0], pool=stack._pool)), engine)
    assert len(engine.asked[0]) == 4
    A = stack.credit(passed(rows, engine)).advantages
    z = 0.75 / math.sqrt(1.125 + 1e-8)
    torch.testing.assert_close(A, torch.tensor([[0.0, 0.0], [z, -z], [0.0, 0.0]]))


def test_a_row_that_takes_the_place_of_another_does_not_take_its_values():
    stack, engine, rows = chain_case([[0.5, 0.5]] * 2, [1.0, 1.0], [0, 0], lambda *_: [LOST, END])
    rows = replace(passed(rows, engine), kinds=("policy", "node"), kind=torch.tensor([0, 1], dtype=torch.int8))
    made = stack.credit(rows)
    assert made.advantages.tolist() == [[1.0, 1.0], [0.0, 0.0]] and made.segments[1].tolist() == [-1, -1]


def test_a_prompt_outside_of_the_pool_is_not_continued():
    stack = start([{"segment-po": CHAIN}])
    engine = Engine()
    rows = rows_of([[10, 11]], [1.0], [0])
    rows.prompt_rows[0] = -1
    rows = stack.extend_rollouts(rows, engine)
    assert not engine.asked and not stack.credit(passed(rows, engine)).advantages.any()


@pytest.mark.parametrize("options", [CHAIN, TREE, TREE | {"buffer_steps": 2}])
def test_without_a_response_there_is_nothing_to_do(options):
    stack, engine = start([{"segment-po": options}]), Engine()
    rows = rows_of([[10]], [1.0], [0], pool=stack._pool).select(torch.tensor([], dtype=torch.int64))
    assert len(stack.extend_rollouts(rows, engine)) == 0 and not engine.asked


def test_a_response_without_a_reward_does_not_count():
    stack, engine, rows = chain_case([[0.5, 0.5]] * 2, [NAN, 1.0], [0, 1], lambda *_: [WON, END], {"whiten": True})
    made = stack.credit(passed(rows, engine))
    assert made.weights.flatten().tolist() == [0.0, 1.0] and not made.advantages[0].any()


def test_responses_that_were_given_are_not_changed():
    stack = start([{"segment-po": CHAIN | {"cut_score": -1.0}}])
    rows = rows_of([[10] * LIMIT], [1.0], [0], pool=stack._pool)
    after = stack.extend_rollouts(rows, Engine())
    assert rows.scores.tolist() == [[1.0]] and not rows.columns and after.scores.tolist() == [[-1.0]]


@given(st.lists(st.floats(0.01, 1.0) | st.just(0.9), min_size=1, max_size=30), st.integers(1, 6))
@example([0.9, 0.8], 1)
@settings(max_examples=30, deadline=None)
def test_a_segment_starts_at_every_nth_unsure_token(probs, interval):
    token_prob = torch.tensor([probs], dtype=torch.float64)
    row, token = segment_starts(token_prob, torch.ones_like(token_prob, dtype=torch.bool), 0.9, interval)
    assert token.tolist() == [t for t, prob in enumerate(probs) if prob < 0.9][::interval] and not row.any()


# whitening


def with_advantages(advantages, unsure):
    """A stack, and rows whose values are such that their tokens have these advantages; not all of them are unsure."""
    stack = start([{"segment-po": CHAIN | {"whiten": True, "threshold": 0.5}}])
    rows = rows_of([[10] * 4] * len(unsure), [0.0] * len(unsure), list(range(len(unsure))), pool=stack._pool)
    rows = replace(rows, old_log_probs=torch.where(torch.tensor(unsure), 0.25, 0.5).log())
    rows["segment_po_starts"] = torch.arange(1, 5).expand(len(unsure), -1)
    rows["segment_po_values"] = -torch.tensor(advantages).float().flip(1).cumsum(1).flip(1)
    return stack, rows


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3).flatmap(lambda rows: st.tuples(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=rows, max_size=rows),
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=rows, max_size=rows),
)))  # fmt: skip
@example(([[1, 2, 3, -1]], [[False] * 4]))
@example(([[1, 2, 3, -1]], [[False, True, False, False]]))
def test_whitening_is_over_the_unsure_tokens_of_the_step(case):
    advantages, unsure = case
    stack, rows = with_advantages(advantages, unsure)
    A, W = np.array(advantages, dtype=float), np.array(unsure)
    counted = A[W] if W.any() else A.flatten()
    expected = A if counted.size < 2 else (A - counted.mean()) / np.sqrt(counted.var(ddof=1) + 1e-8)
    torch.testing.assert_close(stack.credit(rows).advantages, torch.tensor(expected).float(), atol=2e-4, rtol=1e-5)


# the worked example of the tree

CARD_TREE = {
    (): [[4, 5], [6, 7], [8, END]],
    (4, 5): [[11, END], [12, END], [13, END]],
    (6, 7): [[14, END], [15, END], [16, END]],
}
CARD_SCORES = {8: 1.0, 11: 1.0, 12: 1.0}
CARD_OPTIONS = {"branch": [3, 3], "segment_length": 2, "end_tokens": [END]}


def card_score(tokens):
    return CARD_SCORES.get(tokens[-2], 0.0)


def card_tree(options=None):
    return tree_case(from_table(CARD_TREE), card_score, CARD_OPTIONS | (options or {}))


def test_the_values_of_the_worked_example():
    _, _, rows = card_tree()
    assert rows.scores.flatten().tolist() == pytest.approx([0.6666667, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    assert rows.responses.tolist()[3:5] == [[11, END], [12, END]]
    assert rows.prompts == [[100]] * 3 + [[100, 4, 5]] * 3 + [[100, 6, 7]] * 3
    assert rows.of_kind("node").tolist() == [False] * 3 + [True] * 6 and rows.prefix is None
    assert rows.prompt_rows.tolist() == [0] * 9 and rows.groups.tolist() == [0] * 9


@pytest.mark.parametrize(
    ("method", "expected"),
    [("plain", [0.1111111, -0.5555556, 0.4444444, 0.3333333, 0.3333333, -0.6666667]),
     ("normalised", [0.2672612, -1.336306, 1.069045, 0.7071068, 0.7071068, -1.414214])],
)  # fmt: skip
def test_the_advantages_of_the_worked_tree(method, expected):
    stack, engine, rows = card_tree({"method": method})
    made = stack.credit(passed(rows, engine))
    assert values_of(made) == pytest.approx([*expected, 0.0, 0.0, 0.0], abs=1e-6)
    assert made.weights.flatten().tolist() == [1.0] * 6 + [0.0] * 3


def test_a_tree_is_whitened_over_the_tokens_of_its_edges():
    stack, engine, rows = card_tree({"whiten": True})
    engine.probs[5] = 0.95  # one token of the node a does not count
    made = stack.credit(passed(rows, engine))
    A = np.array([1 / 9, *[-5 / 9] * 2, *[4 / 9] * 2, *[1 / 3] * 4, *[-2 / 3] * 2])
    expected = (np.array([1 / 9, -5 / 9, 4 / 9, 1 / 3, 1 / 3, -2 / 3]) - A.mean()) / np.sqrt(A.var(ddof=1) + 1e-8)
    assert made.advantages.shape == (9, 1)
    assert values_of(made)[:6] == pytest.approx(expected.tolist(), abs=1e-6) and not any(values_of(made)[6:])


# the tree


class RandomPolicy:
    """Draws that look random but are functions of what was drawn before; a response may have any length."""

    def __init__(self, seed, missing=0):
        self.seed, self.missing = seed, missing

    def source(self, *identity):
        return generator(self.seed, repr(identity))

    def draw(self, prompt, beginning, time):
        size = int(torch.randint(0, 8, (), generator=self.source(prompt, beginning, time)))
        return [10 + time, *torch.randint(20, 99, (size,), generator=self.source(beginning, time)).tolist(), END]

    def score(self, tokens):
        number = int(torch.randint(0, 4 + self.missing, (), generator=self.source("score", tokens)))
        return NAN if number > 3 else float(number)


def reference_tree(policy, name, branch, M, limit):
    """(text of the node, V, V(parent), sd(parent)) of every node, by recursion."""
    found = []

    def value(beginning, depth):
        children = []
        for time in range(branch[depth]):
            last = depth + 1 == len(branch)
            own = policy.draw(name, beginning, time)[
                : limit - len(beginning) if last else min(M, limit - len(beginning))
            ]
            whole = beginning + tuple(own)
            inner = own[-1] != END and not last and len(whole) < limit
            children.append((own, value(whole, depth + 1) if inner else policy.score(whole)))
        values = [v for _, v in children if not math.isnan(v)]
        mean, sd = (float(np.mean(values)), float(np.std(values))) if values else (NAN, NAN)
        found.extend((tuple(own), beginning, v, mean, sd) for own, v in children)
        return mean

    value((), 0)
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000), st.lists(st.integers(1, 3), min_size=0, max_size=3), st.integers(1, 5), st.integers(4, 14),
    st.sampled_from(["plain", "normalised"]), st.sampled_from([0, 2]),
)  # fmt: skip
def test_every_tree_gets_what_the_paper_says(seed, deeper, M, limit, method, missing):
    policy, branch = RandomPolicy(seed, missing), [3, *deeper]
    options = {"branch": branch, "segment_length": M, "method": method, "end_tokens": [END]}
    stack, engine, rows = tree_case(policy.draw, policy.score, options, prompts=(0, 1), limit=limit)
    made = stack.credit(passed(rows, engine))
    found = {}
    for row in range(len(rows)):
        own = tuple(rows.responses[row][rows.mask[row]].tolist())
        found[int(rows.prompt_rows[row]), tuple(rows.prompts[row][1:]), own] = (
            float(rows.scores[row]), values_of(made)[row], float(made.weights[row]),
        )  # fmt: skip
    assert len(found) == len(rows)
    expected = {}
    for place in (0, 1):
        for own, context, v, mean, sd in reference_tree(policy, f"prompt {place}", branch, M, limit):
            A = 0.0 if math.isnan(v) else v - mean
            A = A / (sd + 1e-8) if method == "normalised" and abs(A) > 1e-9 else A
            expected[place, context, own] = (v, A, float(abs(A) > 1e-9))
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        assert found[key] == pytest.approx(wanted, abs=1e-5, nan_ok=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["plain", "normalised"]))
def test_the_advantages_of_a_nodes_children_add_up_to_0(seed, method):
    policy = RandomPolicy(seed)
    options = {"branch": [3, 2, 3], "segment_length": 2, "method": method, "end_tokens": [END]}
    stack, engine, rows = tree_case(policy.draw, policy.score, options)
    made = stack.credit(passed(rows, engine))
    sums = torch.zeros(int(made.groups.max()) + 1).index_add(0, made.groups, made.advantages.flatten())
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_tree_of_one_level_is_the_group_mean_or_grpo_with_the_populations_deviation(scores):
    table = {(): [[10 + score, END] for score in scores]}
    for method, reference in (("plain", ["dr_grpo"]), ("normalised", None)):
        options = {"branch": [4], "method": method, "end_tokens": [END]}
        stack, engine, rows = tree_case(from_table(table), lambda tokens: tokens[0] - 10.0, options)
        rows = passed(rows, engine)
        owners = {"advantage_scale": {"group_std": {"ddof": 0, "eps": 1e-8}}}
        expected = credit(reference, rows) if reference else credit(["grpo"], rows, owners=owners)
        torch.testing.assert_close(stack.credit(rows).advantages, expected.advantages)


def test_the_levels_are_drawn_with_their_lengths():
    def draw(prompt, beginning, time):
        return [50 + time] * 20

    options = {"branch": [2, 3, 2], "segment_length": 3, "end_tokens": [END]}
    _, engine, rows = tree_case(draw, None, options, prompts=(3, 1), limit=11)
    assert engine.max_tokens == [[3] * 4, [3] * 12, [5] * 24]
    assert [name for name, _ in engine.asked[1]] == ["prompt 3"] * 6 + ["prompt 1"] * 6
    assert [beginning for _, beginning in engine.asked[1]][:4] == [[50] * 3] * 3 + [[51] * 3]
    assert rows.mask.sum(1).tolist() == [3] * 16 + [5] * 24


def test_a_tree_of_one_level_has_no_length_of_its_own():
    _, engine, _ = tree_case(lambda *_: [50] * 20, None, {"branch": [2], "segment_length": 3}, limit=11)
    assert engine.max_tokens == [[11, 11]]


def test_a_node_without_room_below_it_is_a_leaf():
    _, engine, rows = tree_case(lambda *_: [WON] * 20, None, {"branch": [2, 2, 2], "segment_length": 4}, limit=4)
    assert len(engine.asked) == 1 and rows.scores.flatten().tolist() == [1.0, 1.0]


def test_a_response_that_ends_in_its_last_place_is_a_leaf():
    _, engine, _ = tree_case(lambda *_: [WON, END], None, {"branch": [2, 2], "segment_length": 2, "end_tokens": [END]})
    assert len(engine.asked) == 1
    _, engine, _ = tree_case(lambda *_: [WON, END], None, {"branch": [2, 2], "segment_length": 2})
    assert len(engine.asked) == 2


@pytest.mark.parametrize("method", ["plain", "normalised"])
@pytest.mark.parametrize(
    ("values", "kept"), [([0.2, 0.4, 0.6], [1.0, 0.0, 1.0]), ([0.4, 0.4 + 3e-8], [0.0, 0.0]), ([1 / 3] * 6, [0.0] * 6)]
)
def test_edges_that_change_the_value_by_rounding_alone_are_dropped(values, kept, method):
    table = {(): [[20 + child, END] for child in range(len(values))]}
    options = {"branch": [len(values)], "end_tokens": [END], "method": method}
    stack, engine, rows = tree_case(from_table(table), lambda tokens: values[tokens[0] - 20], options)
    made = stack.credit(passed(rows, engine))
    assert made.weights.flatten().tolist() == kept
    dropped = made.advantages.flatten()[torch.tensor(kept) == 0]
    assert dropped.tolist() == pytest.approx([0.0] * len(dropped), abs=1e-6)


def test_equal_leaves_give_no_edge_and_no_loss():
    stack, engine, rows = tree_case(lambda *_: [WON, WON, WON, END], None, CARD_OPTIONS | {"whiten": True})
    rows = passed(rows, engine)
    made = stack.credit(rows)
    assert not made.weights.any() and stack.mini_batch(stack.update_columns(rows, made)).weightless


def test_an_empty_node_counts_in_the_value_of_its_parent_but_is_not_trained():
    table = CARD_TREE | {(4, 5): [[], [12, END], [13, END]]}
    stack, engine, rows = tree_case(from_table(table), lambda tokens: float(tokens[-1] == 5), CARD_OPTIONS)
    made = stack.credit(passed(rows, engine))
    assert rows.scores.flatten().tolist()[:4] == pytest.approx([1 / 3, 0.0, 0.0, 1.0])
    assert made.weights.flatten().tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert values_of(made)[3] == pytest.approx(2 / 3)


def test_a_leaf_without_a_reward_is_dropped_and_so_is_a_node_without_children():
    scores = {11: NAN, 12: 1.0, 13: 0.0, 14: NAN, 15: NAN, 16: NAN, 8: 1.0}
    stack, engine, rows = tree_case(from_table(CARD_TREE), lambda tokens: scores.get(tokens[-2], 0.0), CARD_OPTIONS)
    assert rows.scores.flatten().tolist()[:3] == pytest.approx([0.5, NAN, 1.0], nan_ok=True)
    made = stack.credit(passed(rows, engine))
    assert values_of(made) == pytest.approx([-0.25, 0.0, 0.25, 0.0, 0.5, -0.5, 0.0, 0.0, 0.0])
    assert made.weights.flatten().tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_components_of_an_inner_node_are_the_means_of_its_childrens():
    class Parts(Engine):
        def generate(self, *arguments, **options):
            made = super().generate(*arguments, **options)
            parts = torch.cat([made.scores, 10 * made.scores], 1)
            return replace(made, components=parts, component_names=("a", "b"))

    stack = start([{"segment-po": TREE | CARD_OPTIONS}])
    rows = grown(stack, Parts(from_table(CARD_TREE), card_score), (0,))
    torch.testing.assert_close(rows.components, torch.cat([rows.scores, 10 * rows.scores], 1))


def test_nodes_have_the_columns_of_their_prompt_and_of_their_parent():
    class Marking(Engine):
        def generate(self, *arguments, **options):
            made = super().generate(*arguments, **options)
            marks = {"call": [len(self.asked)] * len(made)}  # as adapters mark rows of their own
            return replace(made, columns=Columns({**made.columns, **marks}))

    pool = make_pool(16, {"level": list(range(16))})
    stack = start([{"segment-po": TREE | CARD_OPTIONS}], pool=pool)
    engine = Marking(from_table(CARD_TREE), card_score)
    chosen = pool.select(torch.tensor([4]))
    first = engine.generate(Requests.of(chosen, torch.tensor([3])), Sampling.of(3, 1.0, 2))
    first["mine"] = torch.tensor([[0.1], [0.2], [0.3]])
    rows = stack.extend_rollouts(first, engine)
    assert rows.columns["level"] == [4] * 9 and "mine" in rows.columns.written
    assert rows.columns["call"] == [1] * 3 + [2] * 6
    assert rows.columns["mine"].flatten().tolist() == pytest.approx([0.1, 0.2, 0.3, *[0.1] * 3, *[0.2] * 3])


def test_log_probs_of_the_engine_are_those_of_the_nodes_own_tokens():
    class Keeping(Engine):
        def generate(self, *arguments, **options):
            made = super().generate(*arguments, **options)
            return replace(made, rollout_log_probs=-made.responses.float())

    stack = start([{"segment-po": TREE | CARD_OPTIONS}])
    rows = grown(stack, Keeping(from_table(CARD_TREE), card_score), (0,))
    assert torch.equal(rows.rollout_log_probs, -rows.responses.float() * rows.mask)


def test_rows_of_other_kinds_and_prompts_outside_of_the_pool_do_not_branch():
    other = stand_in()
    object.__setattr__(other, "kinds", frozenset({"hinted"}))
    stack = start([{"segment-po": TREE | CARD_OPTIONS}, other])
    engine = Engine(from_table(CARD_TREE), card_score)
    first = rows_of([[4, 5], [4, 5]], [0.0, 1.0], [0, 1], pool=stack._pool)
    first.prompt_rows[1] = -1
    rows = stack.extend_rollouts(foreign(first), engine)
    assert len(rows) == 4 + 3 and rows.columns["segment_po_parent"].tolist() == [-1] * 4 + [1] * 3
    assert rows.scores.flatten().tolist() == pytest.approx([0.0, 2 / 3, 1.0, 0.0, 1.0, 1.0, 0.0])


def test_a_forced_beginning_of_the_first_level_is_continued_too():
    stack = start([{"segment-po": TREE | CARD_OPTIONS}])
    engine = Engine(lambda prompt, beginning, time: [60 + time, END], card_score)
    first = rows_of([[9, 9, 9, 4, 5], [9, 9, 9, 4, END]], [0.0, 0.0], [0, 0], pool=stack._pool)
    first = replace(first, prefix=torch.tensor([[True] * 3 + [False] * 2] * 2))
    rows = stack.extend_rollouts(first, engine)
    assert [beginning for _, beginning in engine.asked[0]] == [[9, 9, 9, 4, 5]] * 3
    assert rows.prompts[2:] == [[100, 9, 9, 9, 4, 5]] * 3
    assert rows.prefix.sum(1).tolist() == [3, 3, 0, 0, 0]


def test_a_leaf_weighs_as_much_as_a_sibling_with_many_leaves():
    scores, parent, level = [9.0, 0.0, 9.0, 1.0, 1.0, 1.0], [-1, 0, 0, 2, 2, 2], [0, 1, 1, 2, 2, 2]
    V = tree_values(torch.tensor(scores)[:, None], torch.tensor(parent), torch.tensor(level))
    assert V.flatten().tolist() == [0.5, 0.0, 1.0, 1.0, 1.0, 1.0]


# the loss


def divergence_case(options):
    stack, engine, rows = chain_case(
        [[0.5, 0.95, 0.5], [0.5, 0.5]], [1.0, 0.0], [0, 1], lambda *_: [LOST, END], options
    )
    rows = passed(rows, engine)
    reference = rows.old_log_probs - torch.tensor([[0.3, 5.0, -0.2], [0.1, 0.6, 0.0]]) * rows.mask
    return stack, replace(rows, ref_log_probs=reference)


def test_the_divergence_is_a_sum_over_unsure_tokens_and_a_mean_over_rows():
    k3 = sum(math.exp(-d) + d - 1 for d in (0.3, -0.2, 0.1, 0.6))
    stack, rows = divergence_case({"kl": 0.5})
    columns = stack.update_columns(rows, stack.credit(rows))
    loss = stack.mini_batch(columns).loss(rows.old_log_probs)
    assert float(loss.auxiliary) == pytest.approx(0.5 * k3 / 2, rel=1e-5) and float(loss.kl) == 0
    columns["weights"] = torch.tensor([[3.0], [0.0]])
    alone = sum(math.exp(-d) + d - 1 for d in (0.3, -0.2))
    assert float(stack.mini_batch(columns).loss(rows.old_log_probs).auxiliary) == pytest.approx(0.5 * alone, rel=1e-5)


def test_without_a_factor_there_is_no_divergence_and_no_reference():
    stack, rows = divergence_case({"kl": 0.0})
    assert not stack.needs("column", "ref_log_probs") and not stack.claims("kl_penalty")
    loss = stack.mini_batch(stack.update_columns(rows, stack.credit(rows))).loss(rows.old_log_probs)
    assert float(loss.auxiliary) == 0 and float(loss.total) == float(loss.policy)


@pytest.mark.parametrize("options", [CHAIN, TREE | {"branch": [2]}])
def test_the_loss_is_the_mean_over_trained_tokens(options):
    stack = start([{"segment-po": options}])
    probs = torch.tensor([[0.5, 0.95, 0.5], [0.2, 0.5, 0.5]])
    rows = rows_of([[10, 11, 12], [13, 14, 15]], [1.0, 0.0], [0, 0], pool=stack._pool)
    rows = replace(stack.extend_rollouts(rows, Engine()), old_log_probs=probs.log())
    made = stack.credit(rows)
    loss = stack.mini_batch(stack.update_columns(rows, made)).loss(rows.old_log_probs)
    A = made.advantages.expand(2, 3)
    assert float(loss.policy) == pytest.approx(-float(A[probs < 0.9].mean()), abs=1e-6)


# the buffer

BUFFER = CARD_OPTIONS | {"buffer_steps": 3, "buffer_edges": 2}


def edges_of(rows):
    """Context, tokens and advantage of every row that has one."""
    A = rows.columns["segment_po_advantage"].flatten()
    return Counter(
        (tuple(rows.prompts[row]), tuple(rows.responses[row][rows.mask[row]].tolist()), round(float(A[row]), 5))
        for row in A.nonzero().flatten().tolist()
    )


def buffered(options=None, seed=0):
    """A stack, and an engine that draws the tree of the card, but for prompt 9, which every response solves alike."""

    def draw(prompt, beginning, time):
        return [WON, END] if prompt == "prompt 9" else list(CARD_TREE[beginning][time])

    return start([{"segment-po": TREE | BUFFER | (options or {})}], seed=seed), Engine(draw, card_score)


def step_on(stack, engine, number, prompts=(0,), seed=0):
    """The rows of a step in which these prompts are drawn."""
    engine.times.clear()
    stack.begin_step(number, 10, seed)
    return grown(stack, engine, prompts)


CARD_EDGES = Counter(
    {((100,), (4, 5), 0.11111): 1, ((100,), (6, 7), -0.55556): 1, ((100,), (8, END), 0.44444): 1,
     ((100, 4, 5), (11, END), 0.33333): 1, ((100, 4, 5), (12, END), 0.33333): 1, ((100, 4, 5), (13, END), -0.66667): 1}
)  # fmt: skip


def test_a_buffer_that_is_large_enough_trains_every_edge_at_once():
    stack, engine = buffered({"buffer_edges": 6})
    rows = step_on(stack, engine, 0)
    assert edges_of(rows) == CARD_EDGES and len(rows) == 3 + 3
    made = stack.credit(passed(rows, engine))
    assert made.weights.flatten().tolist() == [1.0] * 6
    plain, engine, whole = card_tree()
    at_once = values_of(plain.credit(passed(whole, engine)))
    assert sorted(values_of(made)) == pytest.approx(sorted(A for A in at_once if A), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_edges_wait_in_the_buffer_until_they_are_used(seed):
    stack, engine = buffered(seed=seed)
    used = Counter()
    for number in range(4):
        rows = step_on(stack, engine, number, (9,) if number else (0,), seed)
        made = stack.credit(passed(rows, engine))
        assert float(made.weights.sum()) == sum(edges_of(rows).values()) == (2 if number < 3 else 0)
        used += edges_of(rows)
    assert used == CARD_EDGES


def test_edges_that_are_too_old_are_dropped():
    stack, engine = buffered({"buffer_steps": 2, "buffer_edges": 1})
    for number in range(4):
        rows = step_on(stack, engine, number, (number,))
        trained = rows.columns["segment_po_advantage"].flatten() != 0
        assert sorted(rows.prompt_rows[trained].tolist()) == [max(0, number - 1), number][number == 0 :]


def test_every_edge_may_be_the_one_whose_turn_it_is():
    seen = Counter()
    for seed in range(40):
        stack, engine = buffered({"buffer_edges": 1}, seed)
        seen += edges_of(step_on(stack, engine, 0, seed=seed))
    assert set(seen) == set(CARD_EDGES)


def test_an_edge_of_the_buffer_is_compared_with_the_policy_that_drew_it():
    stack, engine = buffered({"buffer_edges": 6})
    rows = step_on(stack, engine, 0)
    engine.probs = engine.probs / 2
    rows = passed(rows, engine)
    made = stack.credit(rows)
    columns = stack.update_columns(rows, made)
    loss = stack.mini_batch(columns, kinds=rows.kinds).loss(rows.old_log_probs)
    A = made.advantages.flatten()
    ratio = torch.where(rows.of_kind("node"), 0.5, 1.0)
    expected = -(A * torch.where(A < 0, ratio.clamp(min=0.8), ratio)).mean()  # two tokens each
    assert float(loss.policy) == pytest.approx(float(expected), abs=1e-6)


def test_the_masks_of_the_buffer_are_of_the_policy_that_drew():
    stack, engine = buffered({"buffer_edges": 6})
    rows = step_on(stack, engine, 0)
    engine.probs = torch.full_like(engine.probs, 0.95)
    made = stack.credit(passed(rows, engine))
    assert made.token_weights.sum(1).tolist() == [0.0] * 3 + [2.0] * 3


def test_the_buffer_survives_a_restart(tmp_path):
    stack, engine = buffered()
    step_on(stack, engine, 0, (0, 5))
    stack.save(tmp_path / "state", 1)
    resumed, _ = buffered()
    resumed.load(tmp_path / "state")
    for number in (1, 2):
        first, second = (step_on(each, engine, number, (1,)) for each in (stack, resumed))
        assert edges_of(first) == edges_of(second) and first.prompts == second.prompts
        assert torch.equal(first.responses, second.responses) and torch.equal(first.scores, second.scores)


def test_rows_from_the_buffer_have_the_columns_of_their_prompt():
    pool = make_pool(16, {"level": list(range(16))})
    stack = start([{"segment-po": TREE | BUFFER | {"buffer_edges": 3}}], pool=pool)
    engine = Engine(from_table(CARD_TREE), card_score)
    step_on(stack, engine, 0, (0,))
    rows = step_on(stack, engine, 1, (6,))
    old = rows.prompt_rows == 0
    assert int(old.sum()) == 3 and rows.columns["level"] == rows.prompt_rows.tolist()
    assert rows.prompt_keys[old].tolist() == pool.keys[torch.tensor([0] * 3)].tolist()
    assert bool(rows.of_kind("node")[old].all())
    assert not set(rows.groups[old].tolist()) & set(rows.groups[~old].tolist())


def test_a_normalised_edge_keeps_its_advantage_in_the_buffer():
    stack, engine = buffered({"buffer_edges": 6, "method": "normalised"})
    found = sorted(A for _, _, A in edges_of(step_on(stack, engine, 0)).elements())
    expected = [0.2672612, 0.7071068, 0.7071068, -1.414214, -1.336306, 1.069045]
    assert found == pytest.approx(sorted(expected), abs=1e-5)


# what it says about itself


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "forest"}, "mode"), ({"threshold": 0.0}, "threshold"), ({"threshold": 1.5}, "threshold"), ({"kl": -1}, "kl"),
     ({"kl": math.inf}, "kl"), ({"interval": 0}, "interval"), ({"continuations": 0}, "continuations"),
     ({"cut_score": NAN}, "cut_score"), ({"branch": []}, "branch"), ({"branch": [1, 6]}, "branch"),
     ({"branch": [6, 0]}, "branch"), ({"segment_length": 0}, "segment_length"), ({"method": "grpo"}, "method"),
     ({"buffer_steps": 8}, "buffer_steps"), ({"mode": "tree", "buffer_steps": 0}, "buffer_steps"),
     ({"buffer_edges": 0}, "buffer_edges"),
     ({"end_tokens": [-1]}, "end_tokens")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(SegmentPo, options)


BUFFERED = {"mode": "tree", "buffer_steps": 8}


@pytest.mark.parametrize(
    ("options", "broken"),
    [({}, {"absolute_advantages", "reward_scale"}), ({"whiten": False}, set()),
     ({"mode": "tree"}, {"absolute_advantages", "reward_scale", "equal_groups", "whole_groups"}),
     ({"mode": "tree", "whiten": False}, {"equal_groups", "whole_groups"}),
     ({"mode": "tree", "whiten": False, "method": "normalised"}, {"equal_groups", "whole_groups", "reward_scale"}),
     (BUFFERED | {"whiten": False}, {"equal_groups", "whole_groups", "complete_groups"})],
)  # fmt: skip
def test_what_it_breaks_is_refused_where_it_is_assumed(options, broken):
    facts = {"absolute_advantages", "reward_scale", "equal_groups", "whole_groups", "complete_groups", "token_ratio"}
    for fact in sorted(facts):
        lines = [{"segment-po": options}, stand_in(assumes=[fact])]
        if fact in broken:
            with pytest.raises(StackError, match=fact):
                Stack(lines)
            Stack(lines, allow=[fact])
        else:
            Stack(lines)


@pytest.mark.parametrize(
    ("options", "assumed"),
    [({}, {"response_rewards"}), ({"mode": "tree"}, {"response_rewards", "complete_groups"}), (BUFFERED, {"response_rewards"})],
)  # fmt: skip
def test_what_it_assumes_is_refused_where_it_is_broken(options, assumed):
    for fact in ("response_rewards", "complete_groups"):
        lines = [{"segment-po": options}, stand_in(breaks=[fact])]
        if fact in assumed:
            with pytest.raises(StackError, match=fact):
                Stack(lines)
        else:
            Stack(lines)


def test_a_trainer_that_cannot_continue_responses_is_refused():
    given = frozenset({"engine", "response_prefix"})
    columns = frozenset({"ref_log_probs"})
    Stack(["segment-po"], trainer=Trainer(name="able", provides=given, columns=columns, group_size=1))
    for missing, message in (("engine", "an engine"), ("response_prefix", "forced response prefixes")):
        with pytest.raises(StackError, match=message):
            Stack(["segment-po"], trainer=Trainer(name="poor", provides=given - {missing}, columns=columns))
    with pytest.raises(StackError, match="ref_log_probs"):
        Stack(["segment-po"], trainer=Trainer(name="alone", provides=given, columns=frozenset()))
    Stack([{"segment-po": {"kl": 0}}], trainer=Trainer(name="alone", provides=given, columns=frozenset()))


def test_a_tree_needs_as_many_responses_as_the_prompt_has_children():
    able = {"provides": frozenset({"engine", "response_prefix"}), "columns": frozenset({"ref_log_probs"})}
    with pytest.raises(StackError, match="4 or more"):
        Stack([{"segment-po": {"mode": "tree", "branch": [4, 2]}}], trainer=Trainer(name="few", group_size=3, **able))
    Stack([{"segment-po": {"mode": "tree", "branch": [4, 2]}}], trainer=Trainer(name="many", group_size=4, **able))


class Other(Plugin):
    name = "other"

    @hookimpl
    def compute_advantages(self, rewards):
        return rewards

    @hookimpl
    def assign_groups(self, groups):
        return groups

    @hookimpl
    def allocate_rollouts(self, prompts):
        return torch.ones(len(prompts), dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "hooks"),
    [({}, {"compute_advantages"}), ({"mode": "tree"}, {"assign_groups", "allocate_rollouts"}),
     (BUFFERED, {"compute_advantages", "allocate_rollouts"})],
)  # fmt: skip
def test_its_hooks_have_one_owner(options, hooks):
    with pytest.raises(StackError) as error:
        Stack([{"segment-po": options}, Other()])
    claims = [violation.problem for violation in error.value.violations if violation.rule == "claims"]
    assert {
        hook for hook in ("compute_advantages", "assign_groups", "allocate_rollouts") if hook in str(claims)
    } == hooks


@pytest.mark.parametrize(("hook", "builtin"), [("reduce_loss", "sequence_mean"), ("kl_penalty", "k1")])
def test_another_mean_or_penalty_is_refused(hook, builtin):
    other = stand_in()
    object.__setattr__(other, "uses", {hook: builtin})
    with pytest.raises(StackError, match=hook):
        Stack(["segment-po", other])


def test_the_end_token_is_the_tokenizers_unless_others_are_named():
    for tokenizer, options, expected in (
        (SimpleNamespace(eos_token_id=7), {}, [7]), (SimpleNamespace(eos_token_id=None), {}, []), (None, {}, []),
        (SimpleNamespace(eos_token_id=7), {"end_tokens": [3, 4]}, [3, 4]),
    ):  # fmt: skip
        stack = Stack([{"segment-po": options}])
        stack.start(Run(10, 4, 64, make_pool(4), tokenizer=tokenizer))
        assert stack.plugins[0].state.end_tokens.tolist() == expected


def test_metrics():
    def metrics(stack):
        prefix = "rlplugins/segment-po/"
        return {name.removeprefix(prefix): value for name, value in stack.metrics.as_dict().items() if prefix in name}

    stack, _, rows = worked_chain({"end_tokens": [END]})
    stack.credit(rows)
    assert metrics(stack) == pytest.approx({"cuts": 2.5, "continuations": 45, "continuations_cut": 0, "unsure": 9 / 16})
    stack, engine, rows = card_tree()
    stack.credit(passed(rows, engine))
    assert metrics(stack) == pytest.approx({"nodes": 6, "edges": 6 / 9, "unsure": 1})
    stack, engine = buffered()
    step_on(stack, engine, 0)
    assert metrics(stack) == {"nodes": 6, "buffer": 4}


# what every plugin must do

SMALL_TREE = {"mode": "tree", "branch": [3, 2, 2], "segment_length": 3}

test_conformance = conformance(
    "segment-po",
    [
        {},
        {"kl": 0.0, "whiten": False, "probability_mask": False, "interval": 1, "continuations": 2},
        SMALL_TREE,
        SMALL_TREE | {"method": "normalised", "kl": 0.0, "whiten": False, "probability_mask": False},
        {"mode": "tree", "branch": [4]},
        SMALL_TREE | {"buffer_steps": 2, "buffer_edges": 4},
    ],
)
