"""What makes a stack legal: claims, flow, needs and facts, sentence by sentence of the design."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from rlplugins import Plugin, Rollouts, Stack, hookimpl, needs
from rlplugins.errors import ConfigurationError, HookError, StackError, Violation
from rlplugins.hookspecs import HOOKS
from rlplugins.legality import FACTS, LINES
from rlplugins.needs import MEANINGS
from rlplugins.stack import StackConfig
from rlplugins.testing import credit, loss_and_gradient, make_rollouts, start
from rlplugins.trainer import Trainer


def made(plugin: str, body: Mapping[str, Any] | None = None, **methods: Callable[..., Any]) -> Plugin:
    marked = {
        hook: method if hasattr(method, "rlplugins_when") else hookimpl(method) for hook, method in methods.items()
    }
    return type(plugin.title(), (Plugin,), {"name": plugin, **(body or {}), **marked})()


def using(plugin: str, **uses: Any) -> Plugin:
    return made(plugin, {"uses": uses})


def violations(plugins: Sequence[Any], **lines: Any) -> tuple[Violation, ...]:
    try:
        Stack(plugins, **lines)
    except StackError as error:
        return error.violations
    return ()


def with_line(line: str, lines: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of a stack file after the user has added one that an error suggested."""
    ((field, value),) = YAML(typ="safe", pure=True).load(line).items()
    if field == "owners":
        return {**lines, "owners": {**lines.get("owners", {}), **value}}
    return {**lines, field: [*lines.get(field, []), *value]}


def settle_each(plugins: Sequence[Any], **lines: Any) -> int:
    """Apply every suggested line by itself: the violation that suggested it is gone. Returns how many were tried."""
    tried = 0
    for violation in violations(plugins, **lines):
        subject = violation.problem.split(" ")[0]
        for line in violation.settled_by:
            rest = violations(plugins, **with_line(line, lines))
            same = [v for v in rest if v.rule == violation.rule and v.problem.split(" ")[0] == subject]
            assert not same, f"{line} does not settle: {same}"
            tried += 1
    return tried


def constant(name: str = "a", hook: str = "baseline", body: Mapping[str, Any] | None = None) -> Plugin:
    return made(name, body, **{hook: lambda self, rewards: torch.ones_like(rewards)})


ALL = frozenset(MEANINGS)


# claims


@pytest.mark.parametrize(
    "plugins",
    [
        [constant("a"), constant("b")],
        [constant("a"), constant("b"), constant("c")],
        [constant("a", "advantage_scale"), "grpo"],
        [
            using("a", reduce_loss="token_mean"),
            using("b", reduce_loss="sequence_sum"),
            using("c", reduce_loss="token_mean"),
        ],
        [made("a", policy_loss=lambda self, log_probs: log_probs), using("b", policy_loss="cispo")],
        [made("a", choose_prompts=lambda self: None), made("b", choose_prompts=lambda self: None)],
        ["grpo", "rloo", "dr_grpo"],
        ["gae", "reinforce_plus_plus"],
    ],
    ids=str,
)
def test_each_line_that_is_suggested_for_two_claims_settles_them(plugins: list[Any]) -> None:
    found = violations(plugins)
    assert [v.rule for v in found] and all(v.settled_by for v in found)
    assert settle_each(plugins) >= 4 - (len(found) > 2)


def test_a_hook_without_arrays_offers_no_mix() -> None:
    plugins = [made(name, choose_prompts=lambda self: None) for name in "ab"]
    (violation,) = violations(plugins)
    assert set(violation.settled_by) == {
        "owners: {choose_prompts: a}", "owners: {choose_prompts: b}",
        "off: [a.choose_prompts]", "off: [b.choose_prompts]",
    }  # fmt: skip


# flow


def test_a_clip_range_under_a_loss_that_takes_no_clip() -> None:
    plugins = [made("a", clip_range=lambda self: (0.8, 1.2)), using("b", policy_loss="reinforce")]
    (violation,) = violations(plugins)
    assert violation.rule == "flow" and "a.clip_range gives `clip`, but nobody reads it" in violation.problem
    assert "policy_loss (reinforce)" in violation.problem
    assert {"off: [a.clip_range]", "owners: {policy_loss: ppo_clip}"} <= set(violation.settled_by)
    assert settle_each(plugins) == 4


def test_a_baseline_under_advantages_that_take_none() -> None:
    plugins = [constant(), "gae"]
    (violation,) = violations(plugins)
    assert violation.rule == "flow" and "a.baseline gives `baseline`" in violation.problem
    assert set(violation.settled_by) == {"off: [a.baseline]", "owners: {compute_advantages: difference}"}
    assert settle_each(plugins) == 2


def test_a_scale_that_is_read_only_if_the_advantages_take_it() -> None:
    plugins = [using("a", baseline="zero", advantage_scale="batch_std"), "reinforce_plus_plus"]
    found = violations(plugins)
    assert [v.problem.split()[0] for v in found] == ["a.baseline", "a.advantage_scale"]  # the chain of reading
    assert settle_each(plugins) >= 3


def test_prompt_weights_under_a_choice_that_takes_none() -> None:
    chooser = made("chooser", choose_prompts=lambda self, count: torch.arange(count))
    plugins = [made("a", prompt_weights=lambda self, prompts: torch.ones(len(prompts))), chooser]
    (violation,) = violations(plugins)
    assert "a.prompt_weights" in violation.problem and "choose_prompts (chooser)" in violation.problem
    assert settle_each(plugins) == 2


def test_agreeing_claims_that_nobody_reads_are_all_reported() -> None:
    found = violations([using("a", baseline="zero"), using("b", baseline="zero"), "gae"])
    assert [v.problem.split()[0] for v in found] == ["a.baseline", "b.baseline"]


def test_adapted_advantages_under_a_loss_that_takes_none() -> None:
    adapts = made("a", adapt_advantages=lambda self, advantages: advantages)
    loss = made("l", policy_loss=lambda self, log_probs: log_probs)
    (violation,) = violations([adapts, loss])
    assert "a.adapt_advantages" in violation.problem
    assert settle_each([adapts, loss]) >= 4


def test_a_wrapper_of_what_nobody_reads_is_an_unread_claim_too() -> None:
    def clip_range(self: Plugin) -> Any:
        return (yield)

    plugins = [made("w", clip_range=hookimpl(wrapper=True)(clip_range)), using("b", policy_loss="reinforce")]
    (violation,) = violations(plugins)
    assert "w.clip_range" in violation.problem
    assert settle_each(plugins) == 4


def test_rewards_that_only_a_life_hook_reads_are_read() -> None:
    sees = made("sees", on_step_end=lambda self, rewards: None)
    loss = made("l", policy_loss=lambda self, log_probs: log_probs)
    assert not violations([made("a", shape_rewards=lambda self, rewards: rewards), loss, sees])
    assert violations([made("a", shape_rewards=lambda self, rewards: rewards), loss])


def test_a_claim_that_loses_to_an_owners_line_is_settled_not_unread() -> None:
    assert not violations([constant("a"), constant("b")], owners={"baseline": "a"})


@pytest.mark.parametrize(
    "owner", ["gae", "reinforce_plus_plus", "difference", {"gae": 0.5, "reinforce_plus_plus": 0.5}]
)
def test_an_owners_line_for_the_advantages_settles_who_computes_them(owner: Any) -> None:
    plugins = [{"gae": {"whiten": False}}, "reinforce_plus_plus"]
    assert not violations(plugins, owners={"compute_advantages": owner})
    grpo = violations(["grpo", *plugins], owners={"compute_advantages": owner})
    assert bool(grpo) == (owner != "difference")  # its baseline and scale are read by that one only


def test_a_claim_that_no_method_of_a_mix_reads_is_unread() -> None:
    lines = {"owners": {"compute_advantages": {"grpo": 0.5, "rloo": 0.5}}}
    plugins = [constant("a", "advantage_scale")]
    (violation,) = violations(plugins, **lines)
    assert "a.advantage_scale" in violation.problem
    assert settle_each(plugins, **lines) >= 1


def test_unread_builtins_are_no_violation() -> None:
    assert not violations(["gae", using("b", policy_loss="reinforce")])


# needs


NEEDS = [
    needs.column("difficulty"), needs.column("entropy"), needs.together("group"), needs.together("prompt"),
    needs.MINI_BATCH_LOG_PROBS, needs.PROMPTS_AFTER_UPDATE, needs.CURRENT_ENTROPY, needs.RESPONSE_PREFIX,
    needs.VALIDATION_EVERY_STEP, needs.TRAINABLE_MODEL, needs.ENGINE, needs.GRADIENTS, needs.JUDGE, needs.ONE_RANK,
]  # fmt: skip


def test_every_kind_of_need_is_tried_here() -> None:
    assert {need.kind for need in NEEDS} | {"group_size"} == set(MEANINGS)


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_a_need_that_the_trainer_does_not_meet_is_refused_and_an_optional_one_is_not(need: needs.Need) -> None:
    plugin = made("a", {"needs": (need,)})
    poor = Trainer("poor", columns=frozenset(), ranks=2)
    (violation,) = violations([plugin], trainer=poor)
    assert violation.rule == "needs" and violation.settled_by == LINES.get(need.kind, ())
    assert (
        "a needs " in violation.problem and str(need) in violation.problem and "poor does not give" in violation.problem
    )
    assert ("no line of the stack file settles this" in str(violation)) == (need is not needs.JUDGE)
    assert not violations([made("a", {"needs": (need.optional(),)})], trainer=poor)
    rich = Trainer("rich", provides=ALL, columns=frozenset({need.value}), ranks=1)
    assert not violations([plugin], trainer=rich)
    assert not violations([plugin])  # no trainer, nothing to check against


def test_a_trainer_may_give_one_value_of_a_need_only() -> None:
    trainer = Trainer("t", provides=frozenset({"together:group"}))
    assert not violations([made("a", {"needs": (needs.together("group"),)})], trainer=trainer)
    assert violations([made("a", {"needs": (needs.together("prompt"),)})], trainer=trainer)


def test_the_setting_that_would_meet_a_need_is_named() -> None:
    trainer = Trainer("t", remedies={"engine": "set engine.keep=true"})
    (violation,) = violations([made("a", {"needs": (needs.ENGINE,)})], trainer=trainer)
    assert "set engine.keep=true" in violation.problem


@pytest.mark.parametrize(
    ("hook", "column"),
    [("shape_advantages", "entropy"), ("kl_penalty", "ref_log_probs"), ("compute_advantages", "values")],
)
def test_taking_a_column_as_an_argument_is_a_need_and_off_settles_it(hook: str, column: str) -> None:
    arguments = f"self, {'advantages, ' if hook == 'shape_advantages' else ''}{column}"
    function = eval(f"lambda {arguments}: {column}")
    plugins = [made("a", **{hook: function}), constant("b", "shape_rewards")]
    (violation,) = violations(plugins, trainer=Trainer("t", columns=frozenset()))
    assert violation.problem.startswith("a") and f"needs column {column!r}" in violation.problem
    assert violation.settled_by == (f"off: [a.{hook}]",)
    assert settle_each(plugins, trainer=Trainer("t", columns=frozenset())) == 1


def test_taking_the_entropy_in_the_update_needs_the_current_one() -> None:
    plugin = made("a", auxiliary_loss=lambda self, entropy: entropy.sum())
    (violation,) = violations([plugin], trainer=Trainer("t"))
    assert "current entropy" in violation.problem
    assert Stack([plugin]).takes("entropy", "update") and not Stack([plugin]).takes("entropy", "credit")
    assert not Stack([plugin]).needed_columns


def test_a_hook_that_the_trainer_cannot_call_is_refused_with_the_line_that_drops_it() -> None:
    trainer = Trainer("t", binds=frozenset(HOOKS) - {"baseline", "select_tokens", "process_logits"})
    plugins = [constant("a"), made("b", select_tokens=lambda self, mask: mask.float()),
               made("c", select_tokens=lambda self, mask: mask.float())]  # fmt: skip
    found = violations(plugins, trainer=trainer)
    assert [v.problem for v in found] == [
        "t cannot call baseline, which a implements", "t cannot call select_tokens, which b, c implements",
    ]  # fmt: skip
    assert [v.settled_by for v in found] == [("off: [a.baseline]",), ("off: [b.select_tokens, c.select_tokens]",)]
    for violation in found:
        rest = violations(plugins, **with_line(violation.settled_by[0], {"trainer": trainer}))
        assert violation.problem not in [v.problem for v in rest]
    assert not violations([], trainer=trainer)


def sized(name: str, **size: int) -> Plugin:
    return made(name, {"needs": (needs.group_size(**size),)})


@pytest.mark.parametrize(
    ("sizes", "low", "high"),
    [
        ([], 1, float("inf")),
        ([{"at_least": 2}, {"at_least": 4}], 4, float("inf")),
        ([{"at_least": 2}, {"exactly": 2}], 2, 2),
        ([{"exactly": 1}], 1, 1),
    ],
)
def test_group_sizes_that_go_together(sizes: list[dict[str, int]], low: int, high: float) -> None:
    assert Stack([sized(f"p{place}", **size) for place, size in enumerate(sizes)]).group_sizes == (low, high)


@pytest.mark.parametrize(
    "sizes", [({"at_least": 2}, {"exactly": 1}), ({"exactly": 3}, {"exactly": 4}), ({"at_least": 9}, {"exactly": 8})]
)
def test_group_sizes_that_clash_are_named_and_nothing_settles_them(
    sizes: tuple[dict[str, int], dict[str, int]],
) -> None:
    (violation,) = violations([sized("a", **sizes[0]), sized("b", **sizes[1])])
    text = str(violation)
    for name, size in zip("ab", sizes, strict=True):
        words = f"{size['at_least']} or more" if "at_least" in size else f"exactly {size['exactly']}"
        assert f"{name} needs {words}" in text
    assert "no line of the stack file settles this" in text


@pytest.mark.parametrize(
    ("size", "given", "legal"),
    [
        ({"at_least": 2}, 1, False),
        ({"at_least": 2}, 2, True),
        ({"at_least": 2}, None, True),
        ({"exactly": 1}, 8, False),
        ({"exactly": 1}, 1, True),
        ({"exactly": 8}, 4, False),
    ],
)
def test_the_group_size_of_the_trainer(size: dict[str, int], given: int | None, legal: bool) -> None:
    trainer = Trainer("t", group_size=given, remedies={"group_size": "set n={low}"})
    found = violations([sized("a", **size)], trainer=trainer)
    assert not found if legal else f"set n={next(iter(size.values()))}" in found[0].problem
    optional = made("a", {"needs": (needs.group_size(**size).optional(),)})
    assert not violations([optional], trainer=trainer)


def test_a_group_size_is_at_least_or_exactly() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        needs.group_size()
    with pytest.raises(ValueError, match="exactly one"):
        needs.group_size(at_least=1, exactly=1)


# reading what was not declared


@pytest.mark.parametrize(
    "column", ["entropy", "values", "ref_log_probs", "rollout_log_probs", "components", "difficulty"]
)
@pytest.mark.parametrize("how", ["item", "attribute", "get"])
def test_reading_an_undeclared_column_raises_with_the_line_to_add(column: str, how: str) -> None:
    if column == "difficulty" and how == "attribute":
        return

    def shape_rewards(self: Plugin, rewards: Tensor, rollouts: Rollouts) -> Tensor:
        if how == "item":
            rollouts[column]
        elif how == "get":
            rollouts.get(column)
        else:
            getattr(rollouts, column)
        return rewards

    fields = {} if column == "difficulty" else {column: torch.zeros(2, 4)}
    rows = make_rollouts([0.0, 1.0], columns={"difficulty": torch.zeros(2, 1)}, **fields)
    with pytest.raises(ConfigurationError, match=rf'a reads the column \'{column}\' .*add needs.column\("{column}"\)'):
        credit([made("a", shape_rewards=shape_rewards)], rows)
    credit([made("a", {"needs": (needs.column(column),)}, shape_rewards=shape_rewards)], rows)


def test_reading_an_undeclared_column_in_the_update_raises_too() -> None:
    def auxiliary_loss(self: Plugin, log_probs: Tensor, batch: Any) -> Tensor:
        return log_probs.sum() * batch["difficulty"].sum()

    rows = make_rollouts([0.0, 1.0], columns={"difficulty": torch.ones(2, 1)})
    log_probs = -0.5 * rows.mask.float()
    with pytest.raises(ConfigurationError, match=r'add needs.column\("difficulty"\)'):
        loss_and_gradient(start([made("a", auxiliary_loss=auxiliary_loss)]), rows, log_probs)
    reads = made("a", {"needs": (needs.column("difficulty"),)}, auxiliary_loss=auxiliary_loss)
    loss_and_gradient(start([reads]), rows, log_probs)


def test_one_plugins_declaration_is_not_anothers() -> None:
    reads = made("a", shape_rewards=lambda self, rewards, rollouts: rewards + rollouts["difficulty"])
    declares = made("b", {"needs": (needs.column("difficulty"),)})
    with pytest.raises(ConfigurationError, match="a reads the column"):
        credit([reads, declares], make_rollouts([0.0, 1.0], columns={"difficulty": torch.zeros(2, 1)}))


def test_what_a_plugin_wrote_in_the_step_needs_no_declaration_and_travels_to_the_update() -> None:
    def prepare_step(self: Plugin, rollouts: Rollouts) -> None:
        rollouts["mine"] = torch.arange(2.0)[:, None]

    def auxiliary_loss(self: Plugin, log_probs: Tensor, batch: Any) -> Tensor:
        return (log_probs.sum(1, keepdim=True) * batch["mine"]).sum()

    rows = make_rollouts([0.0, 0.0])
    plugin = made("a", prepare_step=prepare_step, auxiliary_loss=auxiliary_loss)
    for cuts in (1, 2):
        loss, _ = loss_and_gradient(start([plugin]), rows, -0.5 * rows.mask.float(), micro_batches=cuts)
        assert float(loss) == -2.0


# facts


@pytest.mark.parametrize("fact", FACTS)
def test_one_assumes_what_another_breaks_is_refused_unless_allowed(fact: str) -> None:
    a, b = made("a", {"assumes": frozenset({fact})}), made("b", {"breaks": frozenset({fact})})
    (violation,) = violations([a, b])
    assert violation.rule == "facts" and fact in violation.problem and FACTS[fact] in violation.problem
    assert "a assumes it, b breaks it" in violation.problem
    assert violation.settled_by == (f"allow: [{fact}]",)
    assert settle_each([a, b]) == 1
    itself = made("c", {"assumes": {fact}, "breaks": {fact}, "uses": {"advantage_scale": "one"}})
    assert not violations([b]) and not violations([itself])


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_that_the_trainers_configuration_breaks(fact: str) -> None:
    a = made("a", {"assumes": frozenset({fact}), "uses": {"advantage_scale": "one"}})
    (violation,) = violations([a], trainer=Trainer("t", breaks={fact: "some.setting=true"}))
    assert "a assumes it, t (some.setting=true) breaks it" in violation.problem


@pytest.mark.parametrize(
    ("fact", "plugins", "lines", "who"),
    [
        ("reward_scale", [], {}, "group_std"),
        ("reward_scale", [], {"owners": {"advantage_scale": "batch_std"}}, "batch_std"),
        ("reward_scale", ["reinforce_plus_plus"], {}, "reinforce_plus_plus"),
        ("reward_scale", ["gae"], {}, "gae"),
        ("absolute_advantages", ["gae"], {}, "gae"),
        ("absolute_advantages", ["reinforce_plus_plus"], {}, "reinforce_plus_plus"),
        ("token_ratio", [], {"owners": {"policy_loss": "gspo"}}, "gspo"),
        ("token_ratio", [], {"owners": {"policy_loss": "reinforce"}}, "reinforce"),
        ("single_entropy", [{"entropy_bonus": {"coefficient": 0.1}}], {}, "entropy_bonus"),
    ],
)
def test_builtins_declare_their_facts(fact: str, plugins: list[Any], lines: dict[str, Any], who: str) -> None:
    assuming = made("a", {"assumes": frozenset({fact})})
    (violation,) = violations([assuming, *plugins], **lines)
    assert f"{who} breaks it" in violation.problem
    if who == "gae":
        assert not violations([assuming, {"gae": {"whiten": False}}])


@pytest.mark.parametrize(
    ("plugins", "lines"),
    [
        ([using("b", advantage_scale="one")], {}),
        ([{"gae": {"whiten": False}}], {}),  # the default scale is not read
        ([constant("b", "advantage_scale")], {}),
        (["grpo"], {"owners": {"advantage_scale": "one"}}),  # claimed by grpo, decided otherwise
        ([], {"owners": {"compute_advantages": "rloo"}}),
    ],
)
def test_builtins_that_do_not_run_break_nothing(plugins: list[Any], lines: dict[str, Any]) -> None:
    assert not violations([made("a", {"assumes": frozenset({"reward_scale"})}), *plugins], **lines)


def test_facts_may_depend_on_the_configuration() -> None:
    class Depends(Plugin):
        name = "depends"
        strict: bool = True

        @property
        def assumes(self) -> Iterable[str]:
            return {"reward_scale"} if self.strict else set()

    assert violations([Depends()]) and not violations([Depends(strict=False)])


def test_unknown_facts_are_refused() -> None:
    assert "unknown facts: nonsense" in violations([made("a", {"assumes": {"nonsense"}})])[0].problem
    assert "unknown facts: nonsense" in violations([made("a", {"breaks": {"nonsense"}})])[0].problem
    assert "'nonsense' is not a fact" in violations([], allow=["nonsense"])[0].problem


def assuming(*facts: str) -> Plugin:
    return made("a", {"assumes": frozenset(facts)})


def test_unit_rewards_are_measured_in_every_step() -> None:
    credit([assuming("unit_rewards")], make_rollouts([0.0, 1.0]))
    for wrong in ([0.0, 1.5], [-0.1, 1.0]):
        with pytest.raises(HookError, match=r"a\.combine_rewards: assumes .*rewards in \[0, 1\]"):
            credit([assuming("unit_rewards")], make_rollouts(wrong))
        credit([assuming("unit_rewards")], make_rollouts(wrong), allow=["unit_rewards"])
    outside = make_rollouts([0.0, 1.0, 7.0], [0, 0, -1])
    credit([assuming("unit_rewards")], outside)  # a row of no group does not count


def test_rewards_are_measured_after_they_were_shaped() -> None:
    tens = made("b", shape_rewards=lambda self, rewards: rewards * 10)
    with pytest.raises(HookError, match="got 0 to 10"):
        credit([assuming("unit_rewards"), tens], make_rollouts([0.0, 1.0]))


def test_one_reward_per_response_is_measured() -> None:
    per_token = made("b", {"uses": {"segment_tokens": "token"}}, combine_rewards=lambda self, mask: mask.float())
    with pytest.raises(HookError, match="one reward per response"):
        credit([assuming("response_rewards"), per_token], make_rollouts([0.0, 1.0]))
    credit([assuming("response_rewards"), per_token], make_rollouts([0.0, 1.0]), allow=["response_rewards"])


def test_equal_groups_are_measured() -> None:
    credit([assuming("equal_groups")], make_rollouts([0.0] * 5, [0, 0, 1, 1, -1]))
    with pytest.raises(HookError, match="got 1 to 2 responses"):
        credit([assuming("equal_groups")], make_rollouts([0.0] * 3, [0, 0, 1]))
    credit([assuming("equal_groups")], make_rollouts([0.0, 0.0, 1.0, torch.nan], [0, 0, 1, 1]))  # drawn equal


# all at once


def broken() -> tuple[list[Plugin], dict[str, Any]]:
    """A stack that breaks every rule."""
    plugins = [
        made("a", {"needs": (needs.group_size(at_least=2), needs.ENGINE), "assumes": {"token_ratio"}},
             reduce_loss=lambda self, loss: loss.sum()),
        made("b", {"needs": (needs.group_size(exactly=1),)}, reduce_loss=lambda self, loss: loss.mean(),
             clip_range=lambda self: (0.8, 1.2)),
        made("c", {"uses": {"policy_loss": "reinforce"}}),
    ]  # fmt: skip
    return plugins, {"trainer": Trainer("t"), "off": ["c.baseline"]}


def test_all_violations_are_reported_at_once_each_with_what_settles_it() -> None:
    plugins, lines = broken()
    with pytest.raises(StackError) as error:
        Stack(plugins, **lines)
    found = error.value.violations
    assert [v.rule for v in found] == ["claims", "claims", "flow", "needs", "needs", "facts"]
    text = str(error.value)
    assert text.startswith("the stack [a, b, c] cannot run:")
    for part in ("[claims] reduce_loss", "off: 'c.baseline'", "[flow] b.clip_range", "[needs] the numbers of responses",
                 "a needs an engine", "[facts] token_ratio"):  # fmt: skip
        assert part in text
    for violation in found:
        for line in violation.settled_by:
            assert f"        {line}" in text
    assert text.count("no line of the stack file settles this") == 3


def test_applying_every_suggestion_settles_everything_that_can_be() -> None:
    plugins, lines = broken()
    lines["off"] = []
    assert settle_each(plugins, **lines) >= 8
    for _ in range(10):
        rest = [v for v in violations(plugins, **lines) if v.settled_by]
        if not rest:
            break
        lines = with_line(rest[0].settled_by[0], lines)
    assert [v.rule for v in violations(plugins, **lines)] == ["needs", "needs"]


# the table


def explained(
    plugins: Sequence[str | dict[str, Any]], trainer: Trainer | None = None, **lines: Any
) -> tuple[str, bool]:
    return Stack.explain(StackConfig(plugins=list(plugins), **lines), trainer, width=160)


def row_of(text: str, name: str) -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    return row


def test_the_table_names_who_decides_by_which_rule_and_with_which_options() -> None:
    text, legal = explained(["grpo", {"reinforce_plus_plus": {"gamma": 0.5}}],
                            owners={"compute_advantages": {"grpo": 0.25, "reinforce_plus_plus": 0.75}})  # fmt: skip
    assert legal and text.endswith("legal: this stack can run")
    assert "group_std(ddof=1, eps=1e-06), used by grpo" in row_of(text, "advantage_scale")
    advantages = row_of(text, "compute_advantages")
    assert "0.25 x grpo (difference)" in advantages and "0.75 x reinforce_plus_plus (reinforce_plus_plus" in advantages
    assert "owner" in advantages
    assert "ppo_clip" in row_of(text, "policy_loss") and "(default)" in row_of(text, "policy_loss")
    assert "responses per prompt: 2 or more" in text and "reward_scale" in text


def test_the_table_leaves_out_builtins_that_nobody_reads() -> None:
    text, _ = explained(["gae"])
    assert "│ baseline" not in text and "│ advantage_scale" not in text and "column 'values'" in text


def test_the_table_says_what_the_trainer_gives_and_breaks() -> None:
    trainer = Trainer("small", columns=frozenset(), breaks={"single_entropy": "entropy_coeff=0.1"}, group_size=1)
    text, legal = explained(["grpo", "gae"], trainer)
    assert not legal and "on small" in text
    assert " no " in row_of(text, "column 'values'")
    assert "4 violation(s):" in text  # unread baseline, unread scale, groups of one, no values
    assert "small" in row_of(text, "single_entropy")
    again, _ = explained(["gae"], replace(trainer, columns=frozenset({"values"})))
    assert " yes " in row_of(again, "column 'values'")


def test_the_table_of_an_illegal_stack_says_what_its_error_says() -> None:
    text, legal = explained(["grpo", "rloo"])
    assert not legal
    with pytest.raises(StackError) as error:
        Stack(["grpo", "rloo"])
    for violation in error.value.violations:
        assert violation.problem in text
        assert all(line in text for line in violation.settled_by)


def test_the_order_of_a_chain_is_the_order_of_the_table() -> None:
    a, b = (made(name, shape_rewards=lambda self, rewards: rewards) for name in "ab")
    first = made("c", shape_rewards=hookimpl(tryfirst=True)(lambda self, rewards: rewards))

    def shape_rewards(self: Plugin, rewards: Tensor) -> Any:
        return (yield)

    wrapper = made("w", shape_rewards=hookimpl(wrapper=True)(shape_rewards))
    from rlplugins.legality import explain

    text = explain(Stack([b, a, first, wrapper]).plan, [], 120)
    assert "c -> b -> a, wrapped by w" in row_of(text, "shape_rewards")


def test_weights_of_tokens_have_no_place_in_a_loss_per_response() -> None:
    class Whole(Plugin):
        """One loss per response."""

        name = "whole"

        @hookimpl(per_response=True)
        def policy_loss(self, advantages: Tensor) -> Tensor:
            return -advantages

    class Some(Plugin):
        """Weighs tokens."""

        name = "some"

        @hookimpl
        def select_tokens(self, mask: Tensor) -> Tensor:
            return mask.float()

    with pytest.raises(StackError) as caught:
        Stack([Whole(), Some()])
    (violation,) = caught.value.violations
    assert violation.rule == "flow" and violation.settled_by == ("off: [some.select_tokens]",)
    assert "some.select_tokens weighs tokens, but whole.policy_loss gives one loss per response" in violation.problem
    Stack([Whole(), Some()], off=["some.select_tokens"])
