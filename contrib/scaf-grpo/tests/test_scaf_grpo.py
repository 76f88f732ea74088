"""Facts about Scaf-GRPO, through the stack."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins.errors import ConfigurationError, StackError
from rlplugins.plugin import make
from rlplugins.rollouts import Sampling, concatenate
from rlplugins.stack import Stack
from rlplugins.testing import conformance, credit, make_pool, make_rollouts, stand_in, start
from rlplugins.trainer import Trainer
from rlplugins_scaf_grpo import ScafGrpo

NAN = float("nan")
NAMES = ("knowledge_components_parts", "planning_skeleton_parts", "solution_breakdown_parts")
FIRST = [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
GROUPS = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
LEVELS_OF_A = [0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1]
ADVANTAGES = [
    1.499997, -0.499999, -0.499999, -0.499999, -0.499999, 1.499997, -0.499999, -0.499999, *[0.0] * 8,
]  # fmt: skip
EXEMPT = [0.0, 0.0, 0.0, 0.0, *ADVANTAGES[4:]]


def parts_of(letter, count=4):
    return [f"{letter}{place}" for place in range(1, count + 1)]


def hint_columns(rows, counts=(4, 4, 4)):
    """The three columns, the same hints in every row."""
    return {name: [parts_of(name[0], count)] * rows for name, count in zip(NAMES, counts, strict=True)}


class Engine:
    """Scores each request by the level of its hint and its prompt, and remembers what it was asked for.

    Args:
        scores: per text of a prompt the scores of its levels 1, 2, ...
    """

    def __init__(self, scores=None):
        self.scores = scores or {}
        self.asked = []

    def sampling(self, rows):
        return Sampling.of(rows, 1.0, 16)

    def generate(self, requests, sampling=None, *, score=True, greedy=False):
        assert sampling is None and score and not greedy  # as the run draws, and scored
        self.asked.append(list(requests.texts))
        levels = [level_of(text) for text in requests.texts]
        names = [requests.prompts.texts[row] for row in requests.prompt.tolist()]
        scores = [self.scores.get(name, [0] * 12)[level - 1] for name, level in zip(names, levels, strict=True)]
        made = make_rollouts(
            scores,
            requests.prompt,
            tokens=3,
            pool=requests.prompts,
            responses=torch.tensor(levels)[:, None].expand(-1, 3),
        )
        return replace(made, prompts=[[100, level] for level in levels], old_log_probs=None)


def level_of(text):
    hint = text.rsplit(": ", 1)[1].split()
    return 4 * "kps".index(hint[0][0]) + len(hint)


def first_rows(scores=FIRST, groups=GROUPS, columns=None, **fields):
    columns = hint_columns(len(scores)) if columns is None else columns
    made = make_rollouts([float(score) for score in scores], groups, tokens=3, columns=columns, **fields)
    return replace(made, old_log_probs=None)


def opened(options=None, step=59, plugins=("grpo",), total=100, **settings):
    stack = start([*plugins, {"scaf-grpo": options or {}}], total_steps=total, **settings)
    stack.begin_step(step, total)
    return stack


def extended(options=None, engine=None, rollouts=None, **settings):
    """The stack, the engine, and the rows after the plugin."""
    stack, engine = opened(options, **settings), engine or Engine({"prompt 0": LEVELS_OF_A})
    return stack, engine, stack.extend_rollouts(first_rows() if rollouts is None else rollouts, engine)


def hinted(rollouts):
    return rollouts.of_kind("hinted").nonzero().flatten().tolist()


def with_passes(rollouts):
    return replace(rollouts, old_log_probs=-0.5 * rollouts.mask)


# the worked example


def test_the_worked_example():
    stack, engine, rows = extended()
    assert hinted(rows) == [0] and rows.prompts[0] == [100, 3] and rows.responses[0].tolist() == [3, 3, 3]
    assert rows.scores.flatten().tolist() == [1.0, 0.0, 0.0, 0.0, *map(float, FIRST[4:])]
    assert rows.groups.tolist() == GROUPS and len(rows) == 16
    assert stack.credit(with_passes(rows)).advantages.flatten().tolist() == pytest.approx(ADVANTAGES, abs=1e-6)
    assert [len(asked) for asked in engine.asked] == [24]  # twelve levels of each prompt that failed


@pytest.mark.parametrize(("step", "helped"), [(49, False), (50, True)])
def test_the_first_steps_are_without_help(step, helped):
    stack, engine, rows = extended(step=step)
    assert bool(engine.asked) == bool(hinted(rows)) == helped
    expected = ADVANTAGES if helped else EXEMPT
    assert stack.credit(with_passes(rows)).advantages.flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_the_ratio_is_between_log_probs_of_the_hinted_response():
    stack, _, rows = extended()
    old = rows.mask * -0.5
    old[0] = torch.tensor([-0.8, -0.25, -1.0])
    new = old.clone()
    new[0] = torch.tensor([-0.7, -0.2, -1.1])
    rows = replace(rows, old_log_probs=old)
    mini = stack.mini_batch(stack.update_columns(rows, stack.credit(rows)), kinds=rows.kinds)
    loss = mini.loss(new.requires_grad_()).total
    loss.backward()
    expected = [1.1051709, 1.0512711, 0.90483742]
    assert (new.grad[0] * -48 / ADVANTAGES[0]).tolist() == pytest.approx(expected, abs=1e-5)


# the hints


def test_the_prompts_that_are_sent():
    _, engine, _ = extended(rollouts=first_rows([0, 0], [0, 0]))
    assert engine.asked[0] == [
        f"Question: prompt 0\n{label}: {' '.join(parts_of(letter, shown))}"
        for label, letter in (("Knowledge Hints", "k"), ("Planning Hints", "p"), ("Solution Hints", "s"))
        for shown in range(1, 5)
    ]


def test_the_last_message_of_the_user_gets_the_hint():
    pool = make_pool(1)
    system = {"role": "system", "content": "Think."}
    pool.texts = [[system, {"role": "user", "content": "Why?"}]]

    class Chat(Engine):
        def generate(self, requests, **_):
            self.asked.append(list(requests.texts))
            return make_rollouts([0.0] * len(requests), requests.prompt, tokens=3, pool=requests.prompts)

    _, engine, _ = extended(engine=Chat(), rollouts=first_rows([0, 0], [0, 0], pool=pool), pool=pool)
    assert engine.asked[0][5] == [system, {"role": "user", "content": "Question: Why?\nPlanning Hints: p1 p2"}]
    assert pool.texts[0][1]["content"] == "Why?"


@pytest.mark.parametrize(
    "messages", [[{"role": "system", "content": "Think."}], [{"role": "user", "content": ["Why?"]}]]
)
def test_messages_without_a_text_of_the_user_are_refused(messages):
    pool = make_pool(1)
    pool.texts = [messages]
    with pytest.raises(ConfigurationError, match="message by the user"):
        extended(rollouts=first_rows([0, 0], [0, 0], pool=pool), pool=pool)


def test_the_template_can_be_changed():
    _, engine, _ = extended({"template": "{hint} {question} ({label}): {hint}"}, rollouts=first_rows([0, 0], [0, 0]))
    assert engine.asked[0][0] == "k1 prompt 0 (Knowledge Hints): k1"


def test_the_released_tiers_have_eight_levels():
    options = {"tiers": ["knowledge", "solution"]}
    _, engine, rows = extended(options, Engine({"prompt 0": [0] * 8 + [1] * 4}), first_rows([0] * 4, [0] * 4))
    assert len(engine.asked[0]) == 8 and rows.responses[0, 0] == 9  # the level of the engine counts three tiers
    assert rows.columns[NAMES[1]][0] == parts_of("p")


def test_a_tier_with_fewer_parts_lacks_its_last_levels():
    columns = hint_columns(4, (2, 0, 3))
    _, engine, rows = extended(rollouts=first_rows([0] * 4, [0] * 4, columns))
    assert [level_of(text) for text in engine.asked[0]] == [1, 2, 9, 10, 11]
    assert hinted(rows) == [0] and rows.responses[0, 0] == 9


def test_prompts_without_hints_are_as_in_grpo():
    columns = {name: [None] * 16 for name in NAMES}
    _, engine, rows = extended(rollouts=first_rows(columns=columns))
    assert not engine.asked and not hinted(rows)
    mixed = {name: [None] * 4 + column[4:] for name, column in hint_columns(16).items()}
    _, engine, rows = extended(rollouts=first_rows(columns=mixed), engine=Engine({"prompt 2": [1] * 12}))
    assert hinted(rows) == [8] and len(engine.asked[0]) == 12


@pytest.mark.parametrize("entry", ["a text", ["a", 1], ["a"] * 5, torch.tensor(1)])
def test_hints_that_are_no_list_of_texts_are_refused(entry):
    columns = hint_columns(2) | {NAMES[1]: [entry, entry]}
    with pytest.raises(ConfigurationError, match=NAMES[1]):
        extended(rollouts=first_rows([0, 0], [0, 0], columns))


# which groups and which rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.3, 1.0, NAN]), min_size=12, max_size=12),
    st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0, NAN]), min_size=12, max_size=12), min_size=4, max_size=4),
    st.sampled_from(["parallel", "sequential"]), st.sampled_from([0.0, 0.5]), st.sampled_from([1, 2]),
)  # fmt: skip
def test_the_success_with_the_least_help_takes_the_first_place(scores, levels, search, threshold, number):
    groups = [0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    options = {"search": search, "fail_threshold": threshold, "replace_num": number}
    engine = Engine({f"prompt {place}": row for place, row in enumerate(levels)})
    before = first_rows(scores, groups)
    _, _, after = extended(options, engine, before)
    expected, rows, prompts = list(scores), [], list(before.prompts)
    for group in range(4):
        own = [row for row in range(12) if groups[row] == group]
        best = [level for level, score in enumerate(levels[group], 1) if score > threshold]
        if any(scores[row] > threshold for row in own) or not best:
            continue
        for place, row in enumerate(own[:number]):
            rows.append(row)
            expected[row] = levels[group][best[0] - 1]
            prompts[row] = [100, best[0]] if number == 1 or place else prompts[row]
    assert hinted(after) == rows
    assert after.scores.flatten().tolist() == pytest.approx(expected, nan_ok=True)
    assert after.prompts == prompts
    assert after.groups.tolist() == groups and after.prompt_rows.tolist() == groups


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0, 1]), min_size=12, max_size=12))
def test_both_searches_find_the_same_and_the_sequential_one_stops(levels):
    engines = [Engine({"prompt 0": levels}) for _ in range(2)]
    rows = [
        extended({"search": search}, engine, first_rows([0] * 4, [0] * 4))[2]
        for search, engine in zip(("parallel", "sequential"), engines, strict=True)
    ]
    assert rows[0].prompts == rows[1].prompts and torch.equal(rows[0].scores, rows[1].scores)
    best = levels.index(1) + 1 if 1 in levels else 12
    assert [len(asked) for asked in engines[1].asked] == [1] * best
    assert [len(asked) for asked in engines[0].asked] == [12]


def test_in_the_sequential_search_only_unsolved_prompts_are_asked_again():
    engine = Engine({"prompt 0": [0, 1] + [0] * 10, "prompt 2": [0] * 4 + [1] * 8})
    _, _, rows = extended({"search": "sequential"}, engine)
    assert [len(asked) for asked in engine.asked] == [2, 2, 1, 1, 1]
    assert hinted(rows) == [0, 8]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2]))
def test_random_rows_are_failed_rows_of_their_group(seed, number):
    engine = Engine({"prompt 0": [1] * 12, "prompt 2": [1] * 12})
    stack = start(["grpo", {"scaf-grpo": {"replace": "random", "replace_num": number, "warmup": 0}}], seed=seed)
    rows = stack.extend_rollouts(first_rows(), engine)
    found = hinted(rows)
    assert [GROUPS[row] for row in found] == [0] * number + [2] * number
    again = start(["grpo", {"scaf-grpo": {"replace": "random", "replace_num": number, "warmup": 0}}], seed=seed)
    assert hinted(again.extend_rollouts(first_rows(), engine)) == found


def test_every_row_may_be_the_random_one():
    seen = set()
    for seed in range(40):
        stack = start(["grpo", {"scaf-grpo": {"replace": "random", "warmup": 0}}], seed=seed)
        seen |= set(hinted(stack.extend_rollouts(first_rows([0] * 4, [0] * 4), Engine({"prompt 0": [1] * 12}))))
    assert seen == {0, 1, 2, 3}


def test_the_ablation_puts_the_response_after_the_bare_prompt():
    _, _, rows = extended({"replace_hint_prompt": True})
    assert hinted(rows) == [0] and rows.prompts[0] == first_rows().prompts[0]
    assert rows.responses[0].tolist() == [3, 3, 3]


def test_six_and_one_and_one():
    engine = Engine({"prompt 0": LEVELS_OF_A})
    stack, _, rows = extended({"replace_num": 2}, engine, first_rows([0] * 8, [0] * 8))
    assert hinted(rows) == [0, 1]
    assert rows.prompts[:2] == [[1], [100, 3]] and rows.responses[:2, 0].tolist() == [3, 3]
    assert stack.credit(with_passes(rows)).rewards.flatten().tolist() == [1.0, 1.0, *[0.0] * 6]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_advantages_after_a_replacement(size):
    stack, _, rows = extended(rollouts=first_rows([0] * size, [0] * size))
    std = size**-0.5
    expected = [(1 - 1 / size) / (std + 1e-6), *[-1 / size / (std + 1e-6)] * (size - 1)]
    assert stack.credit(with_passes(rows)).advantages.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_a_group_with_a_success_is_grpo():
    before = first_rows([0, 1, 1, 0] * 4)
    stack, engine, rows = extended(rollouts=before)
    assert not engine.asked and rows.kinds == ("policy",)
    base = credit(["grpo"], with_passes(before)).advantages
    assert torch.equal(stack.credit(with_passes(rows)).advantages, base)


def test_if_every_level_fails_the_group_has_no_gradient():
    stack, engine, rows = extended(engine=Engine())
    assert len(engine.asked) == 1 and not hinted(rows)
    assert not stack.credit(with_passes(rows)).advantages[:4].any()


def test_a_group_of_one_becomes_the_hinted_row():
    _, _, rows = extended(rollouts=first_rows([0, 1, 1], [0, 1, 1]))
    assert hinted(rows) == [0] and rows.groups.tolist() == [0, 1, 1]


def test_no_score_is_a_failure_whatever_the_threshold():
    engine = Engine({"prompt 0": [NAN, -1.0, 0.0] + [1.0] * 9})
    stack, _, rows = extended({"fail_threshold": -1}, engine, first_rows([NAN, -1.0, NAN, -1.0], [0] * 4))
    assert rows.scores.flatten().tolist() == pytest.approx([0.0, -1.0, NAN, -1.0], nan_ok=True)
    made = stack.credit(with_passes(rows))
    assert made.groups.tolist() == [0, 0, -1, 0] and made.weights.flatten().tolist() == [1, 1, 0, 1]


def test_a_prompt_outside_of_the_pool_cannot_be_asked_again():
    rows = first_rows()
    rows.prompt_rows[:4] = -1
    _, engine, after = extended(rollouts=rows, engine=Engine({"prompt 0": [1] * 12}))
    assert not hinted(after) and len(engine.asked[0]) == 12


def test_a_prompt_is_found_wherever_it_stands_in_the_pool():
    pool = make_pool(8)
    shuffled = pool.select(torch.tensor([5, 2, 7, 0]))
    rows = first_rows([0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3], pool=shuffled)
    stack, engine = opened(pool=pool), Engine({"prompt 7": [1] * 12})
    after = stack.extend_rollouts(rows, engine)
    assert hinted(after) == [4] and after.prompt_keys[4] == pool.keys[7]


def test_rows_of_other_kinds_are_not_replaced_but_their_success_counts():
    rows = first_rows([0] * 8, [0] * 4 + [1] * 4)
    expert = replace(first_rows([1.0, 0.0], [0, 1]), kinds=("policy", "expert"), kind=torch.ones(2, dtype=torch.int8))
    both = concatenate([expert, rows])
    engine = Engine({"prompt 0": [1] * 12, "prompt 1": [1] * 12})
    _, _, after = extended(engine=engine, rollouts=both)
    assert hinted(after) == [6]


# what travels with the row


def test_the_row_keeps_what_other_plugins_wrote_about_the_one_that_goes():
    rows = first_rows(columns=hint_columns(16) | {"level": torch.arange(16)})
    rows["mine"] = torch.arange(16.0)[:, None]
    _, _, after = extended(rollouts=rows)
    assert after.columns["mine"].flatten().tolist() == list(range(16)) and "mine" in after.columns.written


def test_longer_responses_widen_the_batch_and_nothing_given_is_changed():
    rows = first_rows()
    rows = replace(rows, responses=rows.responses[:, :2], mask=rows.mask[:, :2])
    before = rows.responses.clone()
    _, _, after = extended(rollouts=rows)
    assert after.mask.shape == (16, 3) and after.mask.sum(1).tolist() == [3, *[2] * 15]
    assert torch.equal(rows.responses, before) and rows.kinds == ("policy",)


# when help begins


@pytest.mark.parametrize(
    ("share", "step", "helped"), [(0.15, 14, False), (0.15, 15, True), (0.0, 0, True), (1.0, 99, False)]
)
def test_the_warmup_may_be_a_share_of_the_run(share, step, helped):
    assert bool(extended({"warmup_share": share}, step=step)[1].asked) == helped


def visited(stack, step, failing, prompts=4):
    """A step in which these prompts fail; whether help was given."""
    stack.begin_step(step, 100)
    groups = [prompt for prompt in range(prompts) for _ in range(2)]
    engine = Engine()
    stack.extend_rollouts(first_rows([float(group not in failing) for group in groups], groups), engine)
    return bool(engine.asked)


def test_help_begins_when_no_failed_prompt_is_solved_any_more():
    # solved of those that had failed: 0/0, 1/4, 1/3, 1/2, 0/1, 0/1; of two steps: 1/4, 2/7, 2/5, 1/3, 0/2
    failing = [{0, 1, 2, 3}, {1, 2, 3}, {2, 3}, {3}, {3}, {3}]
    for rate, begins in ((0.5, 1), (0.27, 1), (0.25, 5), (0.0, 6)):
        stack = opened({"plateau_window": 2, "plateau_rate": rate}, step=0)
        helped = [visited(stack, step, prompts) for step, prompts in enumerate(failing)]
        assert helped == [False] * begins + [True] * (6 - begins)


def test_help_stays_once_it_has_begun_and_survives_a_restart(tmp_path):
    options = {"plateau_window": 1, "plateau_rate": 1.0}
    stack = opened(options, step=0)
    assert [visited(stack, step, failing) for step, failing in enumerate([{0, 1}, {1}])] == [False, True]
    stack.save(tmp_path / "state", 2)
    resumed = start(["grpo", {"scaf-grpo": options}])
    resumed.load(tmp_path / "state")
    assert visited(resumed, 2, {3})  # nothing that had failed before is visited in vain
    assert not visited(start(["grpo", {"scaf-grpo": options}]), 2, {3})


# metrics


def test_metrics():
    engine = Engine({"prompt 0": LEVELS_OF_A, "prompt 2": [0] * 9 + [1] * 3})
    metrics = extended(engine=engine)[0].metrics.as_dict()
    found = {name.removeprefix("rlplugins/scaf-grpo/"): value for name, value in metrics.items()}
    assert found == {
        "failed": 0.5, "helping": 1.0, "drawn": 24, "helped": 1.0,
        "helped_by/knowledge": 0.5, "helped_by/planning": 0.0, "helped_by/solution": 0.5,
    }  # fmt: skip


# what it says about itself


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tiers": []}, "tiers"), ({"tiers": ["solution", "solution"]}, "tiers"), ({"tiers": ["answer"]}, "tiers"),
     ({"warmup": -1}, "warmup"), ({"warmup_share": 1.5}, "warmup_share"), ({"fail_threshold": NAN}, "fail_threshold"),
     ({"warmup_share": 0.1, "plateau_window": 5}, "not both"), ({"plateau_window": 0}, "plateau_window"),
     ({"plateau_rate": 2}, "plateau_rate"), ({"search": "both"}, "search"), ({"replace": "last"}, "replace"),
     ({"replace_num": 3}, "replace_num"), ({"replace_num": 2, "replace_hint_prompt": True}, "replace_hint_prompt"),
     ({"template": "{question}"}, "hint"), ({"template": "{hint}"}, "question"), ({"template": "{question}{hint}{x}"}, "x"),
     ({"template": "{question} {hint} {"}, "template")],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigurationError, match=message):
        make(ScafGrpo, options)


@pytest.mark.parametrize("fact", ["whole_groups", "complete_groups"])
def test_facts_that_clash_are_refused(fact):
    with pytest.raises(StackError, match=fact):
        Stack(["grpo", "scaf-grpo", stand_in(assumes=[fact])])
    Stack(["grpo", "scaf-grpo", stand_in(assumes=[fact])], allow=[fact])


def test_a_trainer_without_engine_groups_or_hints_is_refused():
    able = {"provides": frozenset({"engine"})}
    with pytest.raises(StackError, match="an engine"):
        Stack(["scaf-grpo"], trainer=Trainer(name="bare"))
    with pytest.raises(StackError, match="2 or more"):
        Stack(["scaf-grpo"], trainer=Trainer(name="single", group_size=1, **able))
    columns = frozenset({NAMES[0], NAMES[2]})
    with pytest.raises(StackError, match=NAMES[1]):
        Stack(["grpo", "scaf-grpo"], trainer=Trainer(name="two", columns=columns, **able))
    Stack(
        ["grpo", {"scaf-grpo": {"tiers": ["knowledge", "solution"]}}],
        trainer=Trainer(name="two", columns=columns, **able),
    )


def test_a_row_of_a_kind_that_was_not_declared_would_be_refused(monkeypatch):
    monkeypatch.setattr(ScafGrpo, "kinds", frozenset())
    with pytest.raises(Exception, match="hinted"):
        extended()


# what every plugin must do


def with_hints(rollouts):
    """Hints for every prompt but some."""
    rows = rollouts.prompt_rows.tolist()
    columns = {name: [None if row % 5 == 4 else parts_of(name[0], 1 + row % 4) for row in rows] for name in NAMES}
    rollouts = replace(rollouts, columns=type(rollouts.columns)({**rollouts.columns, **columns}))
    return rollouts


test_conformance = conformance(
    "scaf-grpo",
    [
        {"warmup": 0, "fail_threshold": 0.8},
        {"warmup": 0, "fail_threshold": 0.8, "search": "sequential", "replace": "random", "replace_num": 2},
        {
            "plateau_window": 1,
            "plateau_rate": 1.0,
            "fail_threshold": 0.8,
            "tiers": ["solution"],
            "replace_hint_prompt": True,
        },
    ],
    rows=with_hints,
)
