"""Facts about Critique-GRPO, through the stack."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins import Plugin
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Columns, concatenate
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, loss_and_gradient, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_critique_grpo import TEMPLATE, CritiqueGrpo, read_critique, with_critique

NAN = float("nan")
END = 1
LIMIT = 5  # the run's longest response

INITIAL = [0, 0, 0, 1, 0, 0, 0, 0]
REFINED = {"prompt 0": [0, 1, 1, 0], "prompt 1": [0, 0, 0, 0]}
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]
ADVANTAGES = [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0]
WITH_STD = [0.8660239, -0.8660239, -0.8660239, 0.8660239, 0.0, 0.0, 0.0, 0.0]
LENGTHS = [5, 3, 4, 2, 4, 5, 1, 3]
LOG_PROBS = [
    [-2.36, -1.3, -2.44, -0.25, -1.54], [-0.97, -2.01, -0.48, -2.19, -1.38], [-2.26, -1.22, -1.1, -1.98, -2.46],
    [-0.96, -2.42, -2.33, -0.49, -1.54], [-1.78, -2.36, -1.68, -0.38, -1.27], [-1.26, -1.28, -2.4, -0.91, -0.6],
    [-1.33, -1.62, -2.35, -1.48, -0.71], [-2.33, -1.25, -1.71, -1.22, -0.58],
]  # fmt: skip
OLD = [
    [-2.36, -1.3, -2.44, -0.25, -1.54], [-1.03, -2.09, -0.54, -2.21, -1.39], [-2.05, -1.27, -1.13, -1.93, -2.56],
    [-1.0, -2.42, -2.25, -0.62, -1.4], [-1.78, -2.36, -1.68, -0.38, -1.27], [-1.24, -1.28, -2.37, -1.01, -0.48],
    [-1.41, -1.75, -2.14, -1.49, -0.83], [-2.14, -1.28, -1.6, -1.3, -0.6],
]  # fmt: skip


class Engine:
    """Answers with scripted refinements, and remembers what it was asked for.

    Args:
        scores: per text of a prompt the scores of the refinements of its answers.
        tokens: per text of a prompt their tokens; 100 + draw, 101 + draw, ... three of them, if left out.
        columns: of the rows that are made.
    """

    def __init__(self, scores=None, tokens=None, columns=None):
        self.scores, self.tokens, self.columns = scores or {}, tokens or {}, columns
        self.asked, self.given_texts, self.plain = [], [], []

    def names(self, requests):
        prompts = [requests.prompts.texts[row] for row in requests.prompt.tolist()]
        return [name if isinstance(name, str) else name[-1]["content"] for name in prompts]

    def generate(self, requests, sampling=None, *, score=True, greedy=False):
        assert sampling is None and not score and not greedy  # as the run draws; what counts is scored later
        self.asked += requests.texts
        drawn = [
            self.tokens[name][draw] if name in self.tokens else [100 + draw, 101 + draw, 102 + draw]
            for name, draw in zip(self.names(requests), requests.draw.tolist(), strict=True)
        ]
        return self.rows(requests, drawn, [NAN] * len(drawn))

    def given(self, requests, responses, *, score=True):
        assert score
        self.given_texts += responses
        self.plain += requests.texts
        tokens = [[*map(int, text.split()), END][:LIMIT] for text in responses]
        scores = [
            self.scores.get(name, [0.0] * 99)[draw]
            for name, draw in zip(self.names(requests), requests.draw.tolist(), strict=True)
        ]
        return self.rows(requests, tokens, scores)

    def texts(self, rollouts):
        rows = zip(rollouts.responses.tolist(), rollouts.mask.tolist(), strict=True)
        return [" ".join(str(token) for token, own in zip(*row, strict=True) if own) for row in rows]

    def rows(self, requests, tokens, scores):
        width = max(1, *map(len, tokens))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in tokens], dtype=torch.int64)
        made = make_rollouts(
            scores, requests.prompt, lengths=list(map(len, tokens)), tokens=width, pool=requests.prompts,
            responses=padded, columns=self.columns(len(tokens)) if self.columns else columns_of(len(tokens)),
            version=torch.full((len(tokens),), 7), prompts=[[900 + int(row)] for row in requests.prompts.rows[requests.prompt]],
        )  # fmt: skip
        return replace(made, old_log_probs=None)


def columns_of(rows):
    """Data columns of so many rows."""
    return {"answer": ["42"] * rows, "solution": ["6 times 7 is 42"] * rows}


def sampled(scores=INITIAL, groups=GROUPS, columns=None, **fields):
    """Rows as the run drew them."""
    columns = columns_of(len(scores)) if columns is None else columns
    made = make_rollouts([float(score) for score in scores], groups, columns=columns, **{"tokens": LIMIT, **fields})
    return replace(made, old_log_probs=None, version=torch.zeros(len(scores), dtype=torch.int64))


def extended(options=None, engine=None, rollouts=None, plugins=(), **lines):
    """The stack, the engine, and the rows after the plugin."""
    stack = start([*plugins, {"critique-grpo": options or {}}], **lines)
    engine = engine or Engine(REFINED)
    return stack, engine, stack.extend_rollouts(sampled() if rollouts is None else rollouts, engine)


def refined(rollouts):
    return rollouts.of_kind("refined").nonzero().flatten().tolist()


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def with_passes(rollouts, old=None):
    return replace(rollouts, old_log_probs=-0.5 * rollouts.mask if old is None else double(old) * rollouts.mask)


def metrics_of(stack):
    found = stack.metrics.as_dict()
    return {name.removeprefix("rlplugins/critique-grpo/"): value for name, value in found.items()}


# the worked example


def example(options):
    """The stack and the rows of the card with the log-probs of the update, each row as long as the card's."""
    tokens = {
        f"prompt {place}": [[50 + draw] * (length - 1) for draw in range(4)] for place, length in ((0, 5), (1, 4))
    }
    rows = sampled(lengths=LENGTHS)
    stack, _, rows = extended({"T": 5, **options}, Engine(REFINED, tokens), rows)
    return stack, with_passes(rows, OLD), double(LOG_PROBS) * rows.mask


def test_the_refined_rows_and_rewards_of_the_worked_example():
    _, rows, _ = example({})
    assert refined(rows) == [0, 4] and rows.mask.sum(1).tolist() == LENGTHS
    assert rows.responses[0].tolist() == [51] * 4 + [END]  # the second refinement, the first that is correct
    assert rows.responses[4].tolist() == [50] * 3 + [END, 0]  # all of them wrong: the first
    assert rows.scores.flatten().tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert rows.groups.tolist() == GROUPS and rows.prompt_rows.tolist() == GROUPS
    assert rows.version.tolist() == [7, 0, 0, 0, 7, 0, 0, 0]


@pytest.mark.parametrize(("options", "expected"), [({}, ADVANTAGES), ({"norm_std": True}, WITH_STD)])
def test_the_advantages_of_the_worked_example(options, expected):
    stack, rows, _ = example(options)
    assert stack.credit(rows).advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("norm", "expected"), [("constant", 0.17586484), ("token_mean", 0.032567563)])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_the_loss_of_the_worked_example(norm, expected, parts):
    stack, rows, log_probs = example({"norm": norm})
    total, _ = loss_and_gradient(stack, rows, log_probs, micro_batches=parts)
    assert float(total) == pytest.approx(expected, abs=1e-8)


def test_the_token_losses_of_the_worked_example():
    stack, rows, log_probs = example({})
    made = stack.credit(rows)
    found = []
    for row in (0, 1):  # the loss of one token at a time, each alone in its mini-batch
        for token in range(LENGTHS[row]):
            mask = torch.zeros_like(rows.mask)
            mask[row, token] = True
            columns = stack.update_columns(rows, made) | {"mask": mask}
            found.append(5 * float(stack.mini_batch(columns, kinds=rows.kinds).loss(log_probs * mask).total))
    assert found == pytest.approx(
        [-0.24282511, -0.36578327, -0.23285011, -0.44310428, -0.34095736, 0.53091827, 0.54164353, 0.53091827], abs=1e-8
    )


# the prompts for refinements


def test_the_prompts_that_are_sent():
    _, engine, _ = extended(rollouts=sampled([1, 0], [0, 0], tokens=2, responses=torch.tensor([[8, 9], [5, 6]])))
    assert engine.asked == [
        TEMPLATE.format(question="prompt 0", solution=solution, critique=critique)
        for solution, critique in (
            ("8 9", "The proposed solution is correct. The right answer is 42."),
            ("5 6", "The proposed solution is wrong. The right answer is 42."),
        )
    ]
    assert engine.plain == ["prompt 0", "prompt 0"]  # the rows themselves stand under the plain prompt


def test_an_indicative_critique_tells_no_answer_and_reads_none():
    rows = sampled([1, 0, NAN], [0, 0, 0], columns={})
    options = {"critique": "indicative", "template": "{question}{solution}{critique}"}
    _, engine, _ = extended(options, Engine(columns=lambda rows: {}), rows)
    ends = [text.partition("The proposed")[2] for text in engine.asked]
    assert ends == [" solution is correct.", " solution is wrong.", " solution is wrong."]


@pytest.mark.parametrize(
    ("column", "answers"),
    [([None, "7"], [None, "7"]), (torch.tensor([3, 4]), ["3", "4"]), (torch.tensor([0.1, 2.5]), ["0.1", "2.5"])],
)
def test_the_column_of_the_answer_may_hold_numbers_or_nothing(column, answers):
    rows = sampled([0, 0], [0, 0], columns={"gold": column})
    options = {"answer": "gold", "template": "{question}|{solution}|{critique}"}
    _, engine, _ = extended(options, Engine(columns=lambda rows: {"gold": column}), rows)
    said = ["" if answer is None else f" The right answer is {answer}." for answer in answers]
    assert [text.rpartition("wrong.")[2] for text in engine.asked] == said


def test_the_last_message_of_the_user_is_rewritten():
    pool = make_pool(1)
    before = [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "?"},
    ]
    pool.texts = [[*before, {"role": "user", "content": "Why {x}?"}]]
    rows = sampled([0, 0], [0, 0], pool=pool)
    _, engine, _ = extended({"template": "{question}+{solution}+{critique}"}, Engine(), rows, pool=pool)
    assert engine.asked[0][:3] == before and len(engine.asked[0]) == 4
    assert engine.asked[0][3]["content"].startswith("Why {x}?+") and engine.asked[0][3]["role"] == "user"
    assert engine.plain == pool.texts * 2 and pool.texts[0][3]["content"] == "Why {x}?"


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "Think."}], [{"role": "user", "content": ["Why?"]}], []]
)
def test_messages_without_a_text_of_the_user_are_refused(messages):
    with pytest.raises(ConfigurationError, match="message by the user"):
        with_critique(messages, "solution", "critique", TEMPLATE)


# which refinements are taken, and what becomes of them


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5, NAN]), min_size=9, max_size=9),
    st.lists(st.booleans(), min_size=9, max_size=9), st.integers(1, 5), st.permutations(range(9)),
)  # fmt: skip
def test_the_best_refinements_take_the_first_places(scores, empty, k, order):
    groups = [0, 0, 0, 0, 1, 2, 2, 2, 2]
    groups = [groups[place] for place in order]  # rows of a prompt need not stand together
    own = {group: [row for row in range(9) if groups[row] == group] for group in range(3)}
    values = {group: [scores[row] for row in rows] for group, rows in own.items()}
    engine = Engine(
        {f"prompt {group}": part for group, part in values.items()},
        {f"prompt {group}": [[] if empty[row] else [60 + row] for row in rows] for group, rows in own.items()},
    )
    before = sampled([0.25] * 9, groups, tokens=3)
    _, _, after = extended({"k": k}, engine, before)
    expected, kinds, first = [0.25] * 9, [False] * 9, before.responses[:, 0].tolist()
    for group, rows in own.items():
        finite = [0.0 if math.isnan(score) else score for score in values[group]]
        ranked = sorted(range(len(rows)), key=lambda draw, s=finite: (s[draw] != 1, -s[draw]))
        for place, draw in zip(rows, ranked[:k], strict=False):
            if not empty[rows[draw]]:
                expected[place], kinds[place], first[place] = finite[draw], True, 60 + rows[draw]
    assert refined(after) == [row for row in range(9) if kinds[row]]
    assert after.scores.flatten().tolist() == pytest.approx(expected)
    assert after.responses[:, 0].tolist() == first
    assert after.groups.tolist() == groups and after.prompt_rows.tolist() == groups


def test_the_row_is_tokenised_anew_with_an_end_and_cut():
    tokens = {"prompt 0": [[11, 12], [21, 22, 23, 24, 25, 26, 27]]}
    _, engine, rows = extended({"k": 2}, Engine({"prompt 0": [1, 1]}, tokens), sampled([0, 0], [0, 0]))
    assert engine.given_texts == ["11 12", "21 22 23 24 25 26 27"]
    assert rows.responses.tolist() == [[11, 12, END, 0, 0], [21, 22, 23, 24, 25]]
    assert rows.mask.sum(1).tolist() == [3, 5] and rows.prompts == [[900], [900]]


def test_a_correct_answer_can_be_lost():
    stack, _, rows = extended(engine=Engine({"prompt 0": [0, 0, 0]}), rollouts=sampled([1, 0, 1], [0, 0, 0]))
    assert rows.scores.flatten().tolist() == [0, 0, 1]
    made = stack.credit(with_passes(rows))  # and a wrong refinement is penalised
    assert made.advantages.flatten().tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])


@pytest.mark.parametrize(("when", "asked"), [("always", [0, 1, 2]), ("all_failed", [1, 2])])
def test_prompts_with_a_correct_answer_are_left_alone_if_one_says_so(when, asked):
    rows = sampled([0, 1, 0, 0.5, NAN, NAN], [0, 0, 1, 1, 2, 2])
    _, engine, after = extended({"refine_when": when}, rollouts=rows, engine=Engine())
    assert [text.split()[2] for text in engine.asked] == [str(group) for group in asked for _ in range(2)]
    assert refined(after) == [2 * group for group in asked]


def test_without_a_correct_refinement_failures_stay_without_gradient():
    stack, _, rows = extended(engine=Engine())
    made = stack.credit(with_passes(rows))
    assert not made.advantages[4:].any() and made.weights is None


def test_a_sampled_answer_without_a_score_leaves_its_group():
    stack, _, rows = extended(engine=Engine({"prompt 0": [NAN, 1, 0]}), rollouts=sampled([0, NAN, 1], [0, 0, 0]))
    made = stack.credit(with_passes(rows))
    assert rows.scores[0] == 1 and made.groups.tolist() == [0, -1, 0]
    assert made.weights.flatten().tolist() == [1, 0, 1] and not made.advantages.any()


def test_only_what_the_policy_drew_for_prompts_of_the_pool_is_refined():
    rows = sampled([0] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    rows.groups[2:4] = -1
    rows.prompt_rows[4:6] = -1
    rows = replace(rows, kinds=("policy", "expert"), kind=torch.tensor([1, 0] + [0] * 6, dtype=torch.int8))
    pool = make_pool(16)
    outside = rows.select(torch.tensor([6, 7]))
    outside.prompt_rows[:] = 16  # in the table, not in the pool
    pool.table.resolve(torch.tensor([12345]))
    outside.groups[:] = 9
    _, engine, after = extended(engine=Engine(), rollouts=concatenate([rows, outside]), pool=pool)
    assert [text.split()[2] for text in engine.asked] == ["0", "3", "3"]
    assert refined(after) == [1, 6]


def test_a_success_of_another_kind_does_not_spare_a_prompt():
    rows = replace(
        sampled([1, 0, 0], [0] * 3), kinds=("policy", "expert"), kind=torch.tensor([1, 0, 0], dtype=torch.int8)
    )
    assert len(extended({"refine_when": "all_failed"}, Engine(), rows)[1].asked) == 2


def test_nothing_to_refine():
    rows = sampled()
    for none in (rows.select(torch.tensor([], dtype=torch.int64)), replace(rows, groups=torch.full((8,), -1))):
        _, engine, after = extended(rollouts=none)
        assert not engine.asked and after.kinds == ("policy",) and len(after) == len(none)


def test_prompts_are_found_wherever_they_stand_in_the_pool():
    pool = make_pool(8)
    shuffled = pool.select(torch.tensor([5, 2]))
    rows = sampled([0] * 4, [0, 0, 1, 1], pool=shuffled)
    _, engine, after = extended(engine=Engine({"prompt 2": [0, 1]}), rollouts=rows, pool=pool)
    assert [text.split()[2] for text in engine.asked] == ["5", "5", "2", "2"]
    assert after.scores.flatten().tolist() == [0, 0, 1, 0] and after.prompt_keys[2] == pool.keys[2]


def test_the_row_keeps_what_other_plugins_wrote_about_the_one_that_goes():
    rows = sampled()
    rows["mine"] = torch.arange(8.0)[:, None]
    made = {**columns_of(8), "calls": list(range(70, 78))}
    rows.columns["calls"] = [0] * 8
    rows.columns.written.discard("calls")
    _, _, after = extended(engine=Engine(REFINED, columns=lambda rows: Columns(made)), rollouts=rows)
    assert after.columns["mine"].flatten().tolist() == list(range(8)) and after.columns.written == {"mine"}
    assert after.columns["calls"] == [71, 0, 0, 0, 74, 0, 0, 0]  # what its own response has, it keeps


def test_wider_refinements_widen_the_batch_and_nothing_given_is_changed():
    rows = sampled(tokens=2)
    before = rows.responses.clone()
    _, _, after = extended(rollouts=rows)
    assert after.mask.sum(1).tolist() == [4, 2, 2, 2, 4, 2, 2, 2]
    assert torch.equal(rows.responses, before) and rows.kinds == ("policy",)


# advantages and loss


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=6), st.booleans())
def test_advantages_compare_with_the_whole_group(rewards, norm_std):
    made = credit([{"critique-grpo": {"norm_std": norm_std}}], make_rollouts(rewards, [0] * len(rewards)))
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = values - values.mean()
    if norm_std:
        expected = expected / ((values.std() if len(values) > 1 else 0.0) + 1e-6)
    if len(values) == 1:
        expected = values
    assert made.advantages.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_groups_of_one_keep_their_reward():
    for norm_std in (False, True):
        made = credit([{"critique-grpo": {"norm_std": norm_std}}], make_rollouts([0.5, 1.0, 1.0], [0, 1, 1]))
        assert made.advantages.flatten().tolist() == pytest.approx([0.5, 0, 0], abs=1e-6)


def update_of(options, kinds, scores=(1.0, 0.0, 0.0, 1.0), tokens=3, **fields):
    """A stack, and rows of which some are refined, as if they had been extended."""
    kind = torch.tensor([int(name == "refined") for name in kinds], dtype=torch.int8)
    rows = make_rollouts(
        list(scores), [0] * len(kinds), tokens=tokens, kinds=("policy", "refined"), kind=kind, **fields
    )
    return start([{"critique-grpo": {"T": tokens, **options}}]), rows


probabilities = st.lists(st.floats(1e-4, 1.0), min_size=12, max_size=12)


@settings(max_examples=30, deadline=None)
@given(probabilities, probabilities, st.floats(0.01, 10), st.integers(0, 15))
def test_the_loss_and_its_gradient(new, old, gamma, marked):
    kinds = ["refined" if marked >> row & 1 else "policy" for row in range(4)]
    stack, rows = update_of({"gamma": gamma}, kinds)
    p, q = (torch.tensor(values, dtype=torch.float64).view(4, 3) for values in (new, old))
    rows = replace(rows, old_log_probs=q.log())
    total, gradient = loss_and_gradient(stack, rows, p.log())
    a = torch.tensor([0.5, -0.5, -0.5, 0.5], dtype=torch.float64)[:, None]
    which = torch.tensor([kind == "refined" for kind in kinds])[:, None]
    value = torch.where(which, p / (p + gamma), p / q)
    slope = torch.where(which, gamma * p / (p + gamma) ** 2, p / q)  # by log p
    torch.testing.assert_close(total, (-a * value).sum() / 3, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, -a * slope / 3, rtol=1e-6, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(probabilities)
def test_a_refined_row_does_not_know_the_old_policy(old):
    stack, rows = update_of({}, ["refined"] * 4)
    log_probs = -torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) - 0.1
    other = replace(rows, old_log_probs=torch.tensor(old).view(4, 3).log())
    assert torch.equal(loss_and_gradient(stack, rows, log_probs)[1], loss_and_gradient(stack, other, log_probs)[1])


def slopes(p, gamma):
    """d f / d log p of one refined token for each probability (N,), by the loss's gradient."""
    plugin = make(CritiqueGrpo, {"gamma": gamma})
    log_probs = p.log().requires_grad_()
    (-plugin.refined_loss(log_probs, torch.ones_like(p))).sum().backward()
    return log_probs.grad


def test_the_gradient_is_largest_where_p_is_gamma_and_at_most_a_quarter():
    p = torch.logspace(-4, 0, 401, dtype=torch.float64)
    found = slopes(p, 0.1)
    assert float(p[found.argmax()]) == pytest.approx(0.1, rel=1e-2)
    assert (
        float(found.max()) == pytest.approx(0.25, abs=1e-5) and float(slopes(p, 1e-4)[-1]) < 1.1e-4
    )  # p >> gamma: learnt


def test_without_shaping_a_refined_token_weighs_its_probability():
    p = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(slopes(p, None), p)
    torch.testing.assert_close(1e6 * slopes(p, 1e6), p, rtol=1e-5, atol=0)  # the limit of large gamma, times gamma


class Reference(Plugin):
    """Dr. GRPO or GRPO with bounds of the ratio that never bind, or PPO's."""

    name = "reference"
    uses = {
        "clip_range": {"fixed": {"low": 1.0, "high": 1e9}}, "reduce_loss": {"sequence_sum": {"constant": 3 / 4}},
        "policy_loss": "ppo_clip",
    }  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(probabilities, probabilities, st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_without_refinements_it_is_dr_grpo_without_clipping_or_grpo(new, old, scores):
    rows = make_rollouts(scores, [0] * 4, tokens=3, old_log_probs=torch.tensor(old).view(4, 3).log())
    log_probs = torch.tensor(new).view(4, 3).log()
    clipped = {"k": 0, "T": 3, "clip": True, "norm_std": True, "norm": "token_mean"}
    for mine, theirs in (
        ([{"critique-grpo": {"k": 0, "T": 3}}], ["dr_grpo", Reference()]),
        ([{"critique-grpo": clipped}], ["grpo"]),
    ):
        found, expected = (loss_and_gradient(start(plugins), rows, log_probs) for plugins in (mine, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_refinements_nothing_is_asked():
    _, engine, rows = extended({"k": 0})
    assert not engine.asked and rows.kinds == ("policy",)


@pytest.mark.parametrize("clip", [False, True])
def test_clipping_is_for_sampled_rows_only(clip):
    stack, rows = update_of({"clip": clip, "gamma": None}, ["policy", "policy", "refined", "refined"], tokens=2)
    rows = replace(rows, old_log_probs=torch.full((4, 2), -2.0))
    _, gradient = loss_and_gradient(stack, rows, torch.tensor([[-1.0, -1.9], [-3.0, -2.1], [-1.0, -1.9], [-1.0, -1.9]]))
    assert (gradient != 0).tolist() == [[not clip, True], [not clip, True], [True, True], [True, True]]


@pytest.mark.parametrize("options", [{}, {"clip": True, "norm": "token_mean"}, {"norm_std": True}])
def test_what_it_names_stands_above_the_trainers_settings(options):
    others = {
        "baseline": "zero",
        "advantage_scale": "batch_std",
        "policy_loss": "reinforce",
        "reduce_loss": "sequence_mean",
    }
    rows = make_rollouts([1.0, 0.0, 0.0, 1.0, 1.0], [0] * 5, lengths=[1, 2, 3, 1, 2])
    log_probs = -torch.linspace(0.1, 1.5, 15).view(5, 3) * rows.mask
    plain = {"baseline": "group_mean", "advantage_scale": "one", "policy_loss": "ppo_clip", "reduce_loss": "token_mean"}
    found = [
        loss_and_gradient(start([{"critique-grpo": options}], trainer=trainer), rows, log_probs)
        for trainer in (
            Trainer(name=str(defaults), defaults=defaults, provides=frozenset({"engine"}))
            for defaults in (plain, others)
        )
    ]
    torch.testing.assert_close(found[0], found[1])


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=4, max_size=4), st.sampled_from([1, 2, 4]), st.floats(0.1, 3)
)
def test_weights_count_by_their_ratios_only(weights, parts, factor):
    stack, rows = update_of({"T": 7}, ["refined", "policy", "refined", "policy"])
    log_probs = -0.3 * torch.arange(1.0, 13).view(4, 3) / 12
    made, w = stack.credit(rows), torch.tensor(weights)[:, None]
    loss = torch.where(
        torch.tensor([[True], [False]] * 2), log_probs.exp() / (log_probs.exp() + 0.1), (log_probs + 0.5).exp()
    )
    present = float((w > 0).sum())
    expected = present * float((w * -made.advantages * loss).sum()) / (7 * max(float(w.sum()), 1e-9))
    for scaled in (w, factor * w):
        columns = stack.update_columns(rows, replace(made, weights=scaled))
        mini = stack.mini_batch(columns, kinds=rows.kinds)
        total = sum(float(mini.loss(log_probs[part], part).total) for part in torch.arange(4).chunk(parts))
        assert total == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_trainers_correction_is_for_sampled_rows_only():
    stack, rows = update_of({}, ["policy", "refined"], scores=(1.0, 0.0), tokens=2)
    log_probs = torch.full((2, 2), -0.7)
    losses = []
    for c in (1.0, 3.0):
        columns = stack.update_columns(rows, stack.credit(rows)) | {"correction": torch.full((2, 2), c)}
        leaf = log_probs.clone().requires_grad_()
        stack.mini_batch(columns, kinds=rows.kinds).loss(leaf).total.backward()
        losses.append(leaf.grad)
    torch.testing.assert_close(losses[1], losses[0] * torch.tensor([[3.0], [1.0]]))


# the judge


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server; `say` makes a reply of a question, None is a broken server."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["content-length"])))["messages"][-1]["content"]
            server.asked.append(question)
            said = server.say(question)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            data = b"" if said is None else json.dumps(body).encode()
            self.send_response(500 if said is None else 200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.say = [], lambda question: None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def judged(endpoint, say, scores=(1, 0, 0), **columns):
    """The stack, and the critique in each prompt for a refinement."""
    endpoint.say = say
    rows = sampled(scores, [0] * len(scores), tokens=1, columns=columns_of(len(scores)) | columns,
                   responses=torch.arange(70, 70 + len(scores))[:, None])  # fmt: skip
    options = {"critique": "CoT", "template": "{question}~{solution}~{critique}"}
    url = f"http://127.0.0.1:{endpoint.server_port}/v1"
    stack, engine, _ = extended(options, Engine(), rows, judge={"model": "m", "url": url, "retries": 0})
    return stack, [text.split("~") for text in engine.asked]


GOOD = "Step 2 multiplies six by eight. It should be seven."
RIGHT = "The proposed solution is correct. The right answer is 42."
WRONG = "The proposed solution is wrong. The right answer is 42."


def test_the_judge_is_asked_about_wrong_answers_only(endpoint):
    stack, asked = judged(endpoint, lambda question: f"{GOOD}\nConclusion: wrong")
    assert asked == [
        ["prompt 0", "70", RIGHT],
        *(["prompt 0", answer, f"{GOOD}\nConclusion: wrong"] for answer in ("71", "72")),
    ]
    assert len(endpoint.asked) == 2
    for answer, question in zip(("71", "72"), sorted(endpoint.asked), strict=True):
        for part in (
            "Problem:\nprompt 0\n",
            "Reference solution:\n6 times 7 is 42\n",
            f"Student's solution:\n{answer}\n",
        ):
            assert part in question
    assert metrics_of(stack)["fallback"] == 0 and metrics_of(stack)["judge/answered"] == 1


def test_every_failure_of_the_judge_ends_in_the_rule(endpoint):
    replies = {"70": None, "71": "it is wrong wrong wrong", "72": f"{GOOD}\nConclusion: wrong"}
    stack, asked = judged(
        endpoint, lambda question: replies[question.split("Student's solution:\n")[1][:2]], (0, 0, 0, 1)
    )
    assert [critique for _, _, critique in asked] == [WRONG, WRONG, replies["72"], RIGHT]
    found = metrics_of(stack)
    shares = {name: found[name] for name in ("fallback", "judge/answered", "judge/failed", "judge/nonsense")}
    assert shares == pytest.approx(dict(zip(shares, (2 / 3, 1 / 3, 1 / 3, 1 / 3), strict=True)))


def test_a_judge_is_not_asked_where_all_is_right(endpoint):
    stack, asked = judged(endpoint, lambda question: "?", (1, 1))
    assert not endpoint.asked and [critique for _, _, critique in asked] == [RIGHT, RIGHT]
    assert "fallback" not in metrics_of(stack)


def test_without_a_reference_solution_the_judge_sees_the_answer(endpoint):
    judged(endpoint, lambda question: "?", (0, 0), solution=[None, ""])
    assert all("Reference solution:\n42\n" in question for question in endpoint.asked) and endpoint.asked
    endpoint.asked.clear()
    _, asked = judged(endpoint, lambda question: "?", (0, 0), solution=[None] * 2, answer=[None] * 2)
    assert all("Reference solution:\n(there is none)\n" in question for question in endpoint.asked)
    assert [critique for _, _, critique in asked] == ["The proposed solution is wrong."] * 2


REASONS = "The sum in line two forgets the carry."


@pytest.mark.parametrize(
    "reply",
    [
        f"{REASONS}\nConclusion: wrong",
        f"{REASONS}\n\n**Conclusion:** Wrong [END]",
        f"\n {REASONS}\nCONCLUSION - incorrect.\n",
        f"{REASONS}\nConclusion: wrong\n\nProblem:\nWhat is 2?\nConclusion: right",
        f"<think>Conclusion: right</think>{REASONS}\nConclusion: wrong",
        f"so far</think>\n{REASONS}\n### Conclusion\nwrong",
        f"{REASONS}\nConclusion: the student's solution is wrong",
    ],
)
def test_a_critique_is_read_up_to_its_conclusion(reply):
    assert read_critique(reply) == f"{REASONS}\nConclusion: wrong"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   ",
        "\n\nConclusion: wrong",
        "wrong wrong wrong wrong wrong wrong\nConclusion: wrong",
        REASONS,
        f"{REASONS} In conclusion it is wrong",
        f"{REASONS}\nConclusion: right",
        f"{REASONS}\nConclusion: correct",
        f"{REASONS}\nConclusion:",
        f"{REASONS}\nConclusion: wro",
        f"<think>{REASONS}\nConclusion: wrong",
        "!" * 5000,
        "\ufffd\ufffd\0",
    ],
)
def test_what_is_no_critique_of_a_wrong_answer_is_nonsense(reply):
    assert read_critique(reply) is None


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_no_reply_breaks_the_reader(reply):
    found = read_critique(reply)
    assert found is None or found.endswith("Conclusion: wrong")


# metrics and state


def test_metrics():
    rows = sampled([0, 0, 0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    found = metrics_of(extended(engine=Engine(REFINED | {"prompt 2": [1, 0]}), rollouts=rows)[0])
    assert found == pytest.approx({"refined": 1.0, "correct": 0.3, "rescued": 1 / 3})
    found = metrics_of(extended({"refine_when": "all_failed"}, Engine(), rows)[0])
    assert found == pytest.approx({"refined": 2 / 3, "correct": 0.0, "rescued": 0.0})


# what it says about itself


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": -1}, "k"), ({"gamma": 0}, "gamma"), ({"gamma": -0.1}, "gamma"), ({"gamma": math.inf}, "gamma"),
     ({"gamma": NAN}, "gamma"), ({"critique": "text"}, "critique"), ({"refine_when": "never"}, "refine_when"),
     ({"norm": "std"}, "norm"), ({"T": 0}, "T"), ({"template": "{question}{solution}"}, "critique"),
     ({"template": "{critique}{solution}"}, "question"), ({"template": "{question}{critique}"}, "solution"),
     ({"template": TEMPLATE + "{answer}"}, "answer"), ({"template": TEMPLATE + "{"}, "template"),
     ({"template": TEMPLATE + "{}"}, "template"), ({"template": TEMPLATE + "{question.x}"}, "template")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(CritiqueGrpo, options)


@pytest.mark.parametrize(
    ("fact", "options", "without"),
    [("whole_groups", {}, {"k": 0}), ("complete_groups", {}, {"k": 0}), ("token_ratio", {}, {"k": 0}),
     ("reward_scale", {"norm_std": True}, {})],
)  # fmt: skip
def test_facts_that_clash_are_refused(fact, options, without):
    with pytest.raises(StackError, match=fact):
        Stack([{"critique-grpo": options}, stand_in(assumes=[fact])])
    Stack([{"critique-grpo": options}, stand_in(assumes=[fact])], allow=[fact])
    Stack([{"critique-grpo": without}, stand_in(assumes=[fact])])


@pytest.mark.parametrize(
    ("options", "missing", "message"),
    [({}, "engine", "an engine"), ({}, "answer", "'answer'"), ({"answer": "gold"}, "gold", "'gold'"),
     ({"critique": "CoT"}, "judge", "a judge"), ({"critique": "CoT"}, "solution", "'solution'"),
     ({"critique": "CoT", "solution": "steps"}, "steps", "'steps'")],
)  # fmt: skip
def test_a_trainer_that_lacks_something_is_refused(options, missing, message):
    provides, columns = {"engine", "judge"}, {"answer", "solution", "gold", "steps"}
    able = {"name": "able", "provides": frozenset(provides), "columns": frozenset(columns)}
    Stack([{"critique-grpo": options}], trainer=Trainer(**able))
    less = able | {"provides": frozenset(provides - {missing}), "columns": frozenset(columns - {missing})}
    with pytest.raises(StackError, match=message):
        Stack([{"critique-grpo": options}], trainer=Trainer(**less))


def test_what_is_not_read_is_not_needed():
    for options in ({"critique": "indicative"}, {"k": 0}, {"k": 0, "critique": "CoT"}):
        provides = frozenset() if "k" in options else frozenset({"engine"})
        Stack([{"critique-grpo": options}], trainer=Trainer(name="poor", provides=provides, columns=frozenset()))
    with pytest.raises(StackError, match="2 or more"):
        Stack([{"critique-grpo": {"k": 0}}], trainer=Trainer(name="single", group_size=1))


def test_a_second_owner_of_its_loss_is_refused_and_clipping_makes_room_for_a_clip_range():
    for other in ("gtpo", "p3o"):
        with pytest.raises(StackError, match="policy_loss has one owner"):
            Stack(["critique-grpo", other])
    with pytest.raises(StackError, match="clip_range gives"):
        Stack(["critique-grpo", "bapo"], allow=["token_ratio"])
    Stack([{"critique-grpo": {"clip": True}}, "bapo"], allow=["token_ratio"])
    Stack(["dr_grpo", "critique-grpo"])  # agree on baseline and scale


def test_a_row_of_a_kind_that_was_not_declared_would_be_refused(monkeypatch):
    monkeypatch.setattr(CritiqueGrpo, "kinds", frozenset())
    with pytest.raises(Exception, match="refined"):
        extended()


# what every plugin must do


def with_answers(rollouts):
    """An answer for most prompts."""
    rows = rollouts.prompt_rows.tolist()
    columns = {
        "answer": [None if row % 5 == 4 else str(row) for row in rows],
        "solution": [f"it is {row}" for row in rows],
    }
    return replace(rollouts, columns=Columns({**rollouts.columns, **columns}))


test_conformance = conformance(
    "critique-grpo",
    [
        {},
        {"k": 0},
        {"k": 0, "clip": True, "norm_std": True, "norm": "token_mean"},
        {"k": 2, "clip": True, "norm_std": True, "critique": "indicative", "refine_when": "all_failed"},
        {"norm": "token_mean", "critique": "CoT", "gamma": None},
    ],
    rows=with_answers,
)
