"""How several implementations of one hook combine: one test per rule, and the ways to settle a conflict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, Prompts, Requests, Rollouts, Sampling, Stack, hookimpl, needs
from rlplugins.defaults import EntropyBonus
from rlplugins.errors import ConfigurationError, HookError, StackError, StateError
from rlplugins.hookspecs import HOOKS, Rule
from rlplugins.rollouts import concatenate
from rlplugins.stack import StackConfig
from rlplugins.testing import credit, loss_and_gradient, make_pool, make_rollouts, start
from rlplugins.trainer import Trainer

SCORES = [1.0, 0.0, 0.0, 3.0]


def rollouts(**fields: Any) -> Rollouts:
    return make_rollouts(SCORES, [0, 0, 1, 1], lengths=[1, 2, 3, 3], **fields)


def made(plugin: str, **methods: Callable[..., Any]) -> Plugin:
    """A plugin with these hooks; a function that is not marked yet becomes a plain `@hookimpl`."""
    marked = {
        hook: method if hasattr(method, "rlplugins_when") else hookimpl(method) for hook, method in methods.items()
    }
    return type(plugin.title(), (Plugin,), {"name": plugin, **marked})()


def using(plugin: str, **uses: Any) -> Plugin:
    return type(plugin.title(), (Plugin,), {"name": plugin, "uses": uses})()


# owner


def test_an_owner_hook_without_claimants_is_the_builtin() -> None:
    rewards = torch.tensor(SCORES)[:, None]
    result = credit([], rollouts()).advantages
    centred = rewards - torch.tensor([0.5, 0.5, 1.5, 1.5])[:, None]
    torch.testing.assert_close(result, centred / (torch.tensor([0.5, 0.5, 4.5, 4.5])[:, None].sqrt() + 1e-6))


def test_the_only_claimant_owns() -> None:
    plugin = made("one_baseline", baseline=lambda self, rewards: torch.ones_like(rewards))
    result = credit([plugin, using("plain", advantage_scale="one")], rollouts()).advantages
    assert result.flatten().tolist() == [0, -1, -1, 2]


def test_two_claimants_are_refused_and_an_owners_line_settles() -> None:
    a = made("a", baseline=lambda self, rewards: torch.ones_like(rewards))
    b = made("b", baseline=lambda self, rewards: 2 * torch.ones_like(rewards))
    plain = using("plain", advantage_scale="one")
    with pytest.raises(StackError, match=r"baseline has one owner, but is claimed by a and b") as error:
        Stack([a, b, plain])
    assert "owners: {baseline: a}" in str(error.value) and "owners: {baseline: {a: 0.5, b: 0.5}}" in str(error.value)
    for lines, wanted in [
        ({"owners": {"baseline": "a"}}, [0, -1, -1, 2]),
        ({"owners": {"baseline": "b"}}, [-1, -2, -2, 1]),
        ({"owners": {"baseline": {"a": 0.25, "b": 0.75}}}, [-0.75, -1.75, -1.75, 1.25]),
        ({"owners": {"baseline": "zero"}}, SCORES),
        ({"off": ["a.baseline"]}, [-1, -2, -2, 1]),
    ]:
        assert credit([a, b, plain], rollouts(), **lines).advantages.flatten().tolist() == wanted


def test_three_claimants_are_settled_by_dropping_two() -> None:
    plugins = [made(name, baseline=lambda self, rewards: rewards * 0) for name in "abc"]
    with pytest.raises(StackError) as error:
        Stack(plugins)
    assert "off: [b.baseline, c.baseline]" in error.value.violations[0].settled_by
    Stack(plugins, off=["b.baseline", "c.baseline"])


def test_plugins_that_name_the_same_builtin_agree() -> None:
    a, b = using("a", baseline="zero", advantage_scale="one"), using("b", baseline="zero")
    assert credit([a, b], rollouts()).advantages.flatten().tolist() == SCORES


def test_the_same_builtin_with_other_options_is_a_conflict() -> None:
    a, b = using("a", advantage_scale={"group_std": {"ddof": 0}}), using("b", advantage_scale="group_std")
    with pytest.raises(StackError, match="advantage_scale has one owner"):
        Stack([a, b])
    Stack([a, using("c", advantage_scale={"group_std": {"ddof": 0, "eps": 1e-6}})])


def test_uses_and_owners_take_options_of_builtins() -> None:
    a = using("a", advantage_scale={"group_std": {"ddof": 0, "eps": 0.0}}, baseline="zero")
    wanted = torch.tensor(SCORES) / torch.tensor([0.5, 0.5, 1.5, 1.5])
    torch.testing.assert_close(credit([a], rollouts()).advantages.flatten(), wanted)
    other = credit([a], rollouts(), owners={"advantage_scale": {"batch_std": {"ddof": 0, "eps": 1.0}}}).advantages
    wanted = torch.tensor(SCORES) / (torch.tensor(SCORES).std(correction=0) + 1)
    torch.testing.assert_close(other.flatten(), wanted)


def test_a_builtin_named_without_options_takes_those_of_the_trainer() -> None:
    trainer = Trainer("t", defaults={"clip_range": {"fixed": {"low": 0.5, "high": 0.6}}})
    stack = Stack([using("a", clip_range="fixed")], trainer=trainer)
    ((_, claim),) = stack.plan.owners["clip_range"]["policy"]
    assert claim.implementation.plugin.configuration() == {"low": 0.5, "high": 0.6}


@pytest.mark.parametrize("wanted", ["no_such", {"group_std": {"ddof": 7}}, {"group_std": {"nope": 1}}])
def test_a_wrong_builtin_is_refused_with_its_name(wanted: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"no_such|group_std\.(ddof|nope)"):
        Stack([using("a", advantage_scale=wanted)])


def test_uses_cannot_name_another_plugin() -> None:
    other = made("other", baseline=lambda self, rewards: rewards)
    with pytest.raises(ConfigurationError, match="baseline has no built-in 'other'"):
        Stack([other, using("a", baseline="other")])


@pytest.mark.parametrize(
    "lines",
    [
        {"owners": {"baseline": "nobody"}},
        {"owners": {"shape_rewards": "a"}},
        {"owners": {"no_such_hook": "a"}},
        {"owners": {"baseline": {"a": 0.5, "zero": -1}}},
        {"owners": {"baseline": {"a": 0.5, "zero": True}}},
        {"owners": {"baseline": []}},
        {"owners": {"choose_prompts": {"shuffled": 0.5, "a": 0.5}}},
        {"owners": {"compute_advantages": "nobody"}},
        {"off": ["a.advantage_scale"]},
        {"off": ["baseline"]},
    ],
)
def test_lines_that_name_nothing_are_refused(lines: dict[str, Any]) -> None:
    a = made("a", baseline=lambda self, rewards: rewards)
    with pytest.raises(StackError):
        Stack([a], **lines)


def test_a_plugin_listed_twice_is_refused() -> None:
    with pytest.raises(StackError, match="'grpo' is listed more than once"):
        Stack(["grpo", "grpo"])


def test_when_claims_a_hook_only_in_some_configurations() -> None:
    class Sometimes(Plugin):
        name = "sometimes"
        alpha: float = 1.0

        @hookimpl(when=lambda self: self.alpha != 1)
        def baseline(self, rewards: Tensor) -> Tensor:
            return rewards * self.alpha

    assert not Stack([Sometimes()]).claims("baseline")
    assert Stack([Sometimes(alpha=2.0)]).claims("baseline")
    Stack([Sometimes(), made("a", baseline=lambda self, rewards: rewards)])  # no conflict when not claimed


def test_uses_may_depend_on_the_configuration() -> None:
    class Depends(Plugin):
        name = "depends"
        plain: bool = False

        @property
        def uses(self) -> dict[str, str]:
            return {"advantage_scale": "one"} if self.plain else {}

    assert not Stack([Depends()]).claims("advantage_scale")
    assert Stack([Depends(plain=True)]).claims("advantage_scale")


# owner per row kind


def expert_plugin(value: float = 10.0, name: str = "expert_loss") -> Plugin:
    class Expert(Plugin):
        kinds = frozenset({"expert"})

        @hookimpl(kind="expert")
        def policy_loss(self, log_probs: Tensor) -> Tensor:
            return value * log_probs

    Expert.name = name
    return Expert()


def with_experts() -> Rollouts:
    return make_rollouts(
        [1.0, 0.0, 0.0, 0.0], [0, 0, -1, -1], lengths=[2, 3, 1, 2], kind=torch.tensor([0, 0, 1, 1], dtype=torch.int8),
        kinds=("policy", "expert"),
    )  # fmt: skip


def test_policy_loss_has_one_owner_per_row_kind() -> None:
    stack = start([expert_plugin(), using("r", policy_loss="reinforce", baseline="zero", advantage_scale="one")])
    rows = with_experts()
    log_probs = torch.randn(4, 3, dtype=torch.float64) * rows.mask
    loss, gradient = loss_and_gradient(stack, rows, log_probs)
    wanted = -log_probs[0].sum() + 10 * log_probs[2:].sum()
    torch.testing.assert_close(loss, wanted / 8)
    assert gradient[2:].count_nonzero() == 3 and gradient[1].count_nonzero() == 0


def test_rows_of_a_kind_that_nobody_claims_are_under_the_stacks_loss() -> None:
    stack = start([using("r", policy_loss="reinforce", baseline="zero", advantage_scale="one")])
    rows = with_experts()
    log_probs = torch.randn(4, 3, dtype=torch.float64) * rows.mask
    _, gradient = loss_and_gradient(stack, rows, log_probs)
    assert gradient[2:].count_nonzero() == 0  # advantage 0


def test_two_owners_of_a_kind_are_refused_and_off_settles() -> None:
    a, b = expert_plugin(1.0, "a"), expert_plugin(2.0, "b")
    with pytest.raises(StackError, match="for rows of kind 'expert'") as error:
        Stack([a, b])
    assert set(error.value.violations[0].settled_by) == {"off: [a.policy_loss]", "off: [b.policy_loss]"}
    Stack([a, b], off=["a.policy_loss"])


def test_a_kind_and_the_policy_rows_do_not_conflict() -> None:
    Stack([expert_plugin(), made("a", policy_loss=lambda self, log_probs: log_probs)])


# chain, product, sum, all


def appending(name: str, **marks: Any) -> Plugin:
    def shape_rewards(self: Plugin, rewards: Tensor) -> Tensor:
        return rewards * 10 + {"a": 1, "b": 2, "c": 3, "d": 4}[name]

    return made(name, shape_rewards=hookimpl(**marks)(shape_rewards) if marks else shape_rewards)


def rewards_of(plugins: list[Plugin], **lines: Any) -> float:
    return float(credit(plugins, make_rollouts([0.0, 0.0], [0, 0]), **lines).rewards[0])


def test_a_chain_runs_in_stack_order() -> None:
    assert rewards_of([appending("a"), appending("b"), appending("c")]) == 123
    assert rewards_of([appending("c"), appending("a"), appending("b")]) == 312


def test_tryfirst_and_trylast_override_the_stack_order() -> None:
    assert rewards_of([appending("a"), appending("b", tryfirst=True), appending("c")]) == 213
    assert rewards_of([appending("a", trylast=True), appending("b"), appending("c")]) == 231
    first = [appending("a"), appending("b", tryfirst=True), appending("c", tryfirst=True)]
    assert rewards_of(first) == 231  # among equals: stack order


def test_a_chain_sees_what_the_one_before_made_and_off_drops_a_link() -> None:
    plugins = [appending("a"), appending("b"), appending("c")]
    assert rewards_of(plugins, off=["b.shape_rewards"]) == 13


def test_weights_multiply_and_none_sees_another() -> None:
    seen: list[Tensor] = []

    def select(factor: float) -> Callable[..., Tensor]:
        def select_samples(self: Plugin, advantages: Tensor) -> Tensor:
            seen.append(advantages.clone())
            return torch.full_like(advantages, factor)

        return select_samples

    result = credit([made("a", select_samples=select(2.0)), made("b", select_samples=select(3.0))], rollouts())
    assert result.weights is not None and result.weights.flatten().tolist() == [6.0] * 4
    assert torch.equal(seen[0], seen[1])


def test_token_weights_multiply_and_see_the_sample_weights() -> None:
    a = made("a", select_tokens=lambda self, weights, mask: weights.expand(mask.shape) * 1.0)
    b = made("b", select_tokens=lambda self, mask: torch.full(mask.shape, 5.0))
    c = made("c", select_samples=lambda self, rewards: torch.full_like(rewards, 2.0))
    rows = rollouts()
    result = credit([a, b, c], rows)
    assert torch.equal(result.token_weights, 10.0 * rows.mask)


def test_prompt_weights_multiply_into_the_draw() -> None:
    pool = make_pool(4)
    a = made("a", prompt_weights=lambda self, prompts: torch.tensor([1.0, 1.0, 0.0, 1.0]))
    b = made("b", prompt_weights=lambda self, prompts: torch.tensor([0.0, 1.0, 1.0, 2.0]))
    stack = start([a, b], pool=pool)
    assert set(stack.choose_prompts(pool, 2).tolist()) == {1, 3}


def test_prompt_weights_that_are_all_zero_are_an_error() -> None:
    a = made("a", prompt_weights=lambda self, prompts: torch.zeros(len(prompts)))
    with pytest.raises(HookError, match=r"a\.prompt_weights: no prompt of the pool has a weight above 0"):
        start([a]).choose_prompts(make_pool(4), 2)


def test_a_row_is_dropped_if_one_filter_drops_it() -> None:
    a = made("a", filter_rollouts=lambda self, scores: (scores > 0).float())
    b = made("b", filter_rollouts=lambda self, scores: (scores < 2).float())
    assert start([a, b]).filter_rollouts(rollouts()).scores.flatten().tolist() == [1.0]


def test_auxiliary_losses_add() -> None:
    def bonus(value: float) -> Callable[..., Tensor]:
        return lambda self, log_probs, loss_weights, batch: (
            value * (log_probs * loss_weights).sum() / batch.token_weight
        )

    rows = rollouts()
    log_probs = torch.randn(4, 3, dtype=torch.float64) * rows.mask
    base, _ = loss_and_gradient(start([]), rows, log_probs)
    both = [made("a", auxiliary_loss=bonus(2.0)), made("b", auxiliary_loss=bonus(3.0))]
    loss, _ = loss_and_gradient(start(both), rows, log_probs)
    torch.testing.assert_close(loss - base, 5 * log_probs.sum() / rows.mask.sum())


def test_everyone_is_called_once_in_stack_order() -> None:
    called: list[str] = []

    def caller(name: str) -> Plugin:
        def note(hook: str) -> Callable[..., None]:
            def function(self: Plugin) -> None:
                called.append(f"{name}.{hook}")

            return function

        hooks = [hook for hook, spec in HOOKS.items() if spec.rule is Rule.ALL]
        return made(name, **{hook: note(hook) for hook in hooks})

    stack, rows = start([caller("a"), caller("b")]), rollouts()
    made_credit = stack.credit(rows)
    stack.mini_batch(stack.update_columns(rows, made_credit))
    stack.end_step(rows, made_credit)
    stack.validated({"accuracy": 1.0})
    hooks = ("prepare_step", "prepare_mini_batch", "on_step_end", "on_validation")
    assert called == [f"{name}.{hook}" for hook in hooks for name in "ab"]


# wrappers


def doubling(hook: str, name: str = "w", **marks: Any) -> Plugin:
    """Doubles the combined value of any hook whose value is a tensor, or a pair of numbers."""

    def wrap(self: Plugin) -> Any:
        result = yield
        return tuple(2 * part for part in result) if isinstance(result, tuple) else result * 2

    wrap.__name__ = hook
    return made(name, **{hook: hookimpl(wrapper=True, **marks)(wrap)})


def test_a_wrapper_sees_the_combined_value_of_a_chain_and_of_a_product() -> None:
    assert rewards_of([doubling("shape_rewards"), appending("a"), appending("b")]) == 24
    ones = made("a", select_samples=lambda self, rewards: rewards * 0 + 3)
    assert credit([ones, doubling("select_samples")], rollouts()).weights.flatten().tolist() == [6.0] * 4


@pytest.mark.parametrize("hook", ["select_samples", "select_tokens"])
def test_a_wrapper_of_a_product_that_nobody_gives_wraps_ones(hook: str) -> None:
    rows = rollouts()
    result = credit([doubling(hook)], rows)
    if hook == "select_samples":
        assert result.weights.flatten().tolist() == [2.0] * 4
    else:
        assert torch.equal(result.token_weights, 2.0 * rows.mask)


def test_wrappers_of_prompt_hooks() -> None:
    pool = make_pool(4)
    stack = start([doubling("prompt_weights")], pool=pool)
    assert len(stack.choose_prompts(pool, 3).unique()) == 3
    chosen = pool.select(torch.tensor([0, 1]))
    assert start([doubling("allocate_rollouts")]).plan.wrappers["allocate_rollouts"]
    with pytest.raises(HookError, match=r"w\.allocate_rollouts: gave out 16 of 8"):
        start([doubling("allocate_rollouts")]).allocate_rollouts(chosen, 8)


def test_a_wrapper_around_an_owner() -> None:
    base = credit(["grpo"], rollouts()).advantages
    torch.testing.assert_close(credit(["grpo", doubling("advantage_scale")], rollouts()).advantages, base / 2)
    torch.testing.assert_close(credit(["grpo", doubling("compute_advantages")], rollouts()).advantages, base * 2)
    torch.testing.assert_close(credit(["grpo", doubling("combine_rewards")], rollouts()).rewards.flatten(),
                               2 * torch.tensor(SCORES))  # fmt: skip


def test_a_wrapper_around_advantages_may_take_baseline_and_scale() -> None:
    def compute_advantages(self: Plugin, baseline: Tensor, scale: Tensor) -> Any:
        result = yield
        return result * scale + baseline

    wrapper = made("w", compute_advantages=hookimpl(wrapper=True)(compute_advantages))
    result = credit(["grpo", wrapper], rollouts()).advantages
    torch.testing.assert_close(result.flatten(), torch.tensor(SCORES))


def test_a_wrapper_around_a_mix_of_methods_sees_the_mix() -> None:
    lines = {"owners": {"compute_advantages": {"grpo": 0.5, "rloo": 0.5}}}
    base = credit([], rollouts(), **lines).advantages
    torch.testing.assert_close(credit([doubling("compute_advantages")], rollouts(), **lines).advantages, base * 2)
    halved = credit([doubling("advantage_scale")], rollouts(), **lines).advantages
    torch.testing.assert_close(halved, base / 2)  # around the scale of each method


def test_a_wrapper_that_takes_the_baseline_of_a_mix_is_refused() -> None:
    def compute_advantages(self: Plugin, baseline: Tensor) -> Any:
        return (yield)

    wrapper = made("w", compute_advantages=hookimpl(wrapper=True)(compute_advantages))
    with pytest.raises(StackError, match="each has its own"):
        Stack([wrapper], owners={"compute_advantages": {"grpo": 0.5, "rloo": 0.5}})


def test_wrappers_nest_and_the_first_is_outermost() -> None:
    order: list[str] = []

    def noting(name: str, **marks: Any) -> Plugin:
        def shape_rewards(self: Plugin, rewards: Tensor) -> Any:
            order.append(f"{name}>")
            result = yield
            order.append(f"<{name}")
            return result

        return made(name, shape_rewards=hookimpl(wrapper=True, **marks)(shape_rewards))

    credit([noting("a"), noting("b"), appending("c")], rollouts())
    assert order == ["a>", "b>", "<b", "<a"]
    order.clear()
    credit([noting("a"), noting("b", tryfirst=True)], rollouts())
    assert order == ["b>", "a>", "<a", "<b"]


@pytest.mark.parametrize(("hook", "factor"), [("policy_loss", 2.0), ("reduce_loss", 2.0), ("adapt_advantages", 2.0)])
def test_wrappers_of_update_hooks(hook: str, factor: float) -> None:
    rows = rollouts()
    log_probs = -0.5 * rows.mask.double()
    base, _ = loss_and_gradient(start(["grpo"]), rows, log_probs)
    loss, _ = loss_and_gradient(start(["grpo", doubling(hook)]), rows, log_probs)
    assert abs(float(base)) > 0.01
    torch.testing.assert_close(loss, base * factor)


def test_wrappers_of_clip_range_kl_and_auxiliary_loss() -> None:
    rows = rollouts(ref_log_probs=-torch.ones(4, 3) * make_rollouts(SCORES, lengths=[1, 2, 3, 3]).mask)
    log_probs = -0.25 * rows.mask.double()  # ratio exp(0.25) = 1.28 is above 1.2, and below 2.4
    _, clipped = loss_and_gradient(start(["grpo"]), rows, log_probs)
    _, unclipped = loss_and_gradient(start(["grpo", doubling("clip_range")]), rows, log_probs)
    assert clipped[0].count_nonzero() == 0 and unclipped[0].count_nonzero() == 1

    kl = using("kl", kl_penalty="k1", policy_loss="reinforce", baseline="zero")
    aux = made("aux", auxiliary_loss=lambda self, log_probs, batch: log_probs.sum() / batch.token_weight)
    flat = make_rollouts([0.0] * 4, [0, 0, 1, 1], lengths=[1, 2, 3, 3], ref_log_probs=rows.ref_log_probs)
    for hook in ("kl_penalty", "auxiliary_loss"):
        once, _ = loss_and_gradient(
            start([kl, aux], off=["aux.auxiliary_loss"] * (hook == "kl_penalty")), flat, log_probs
        )
        rest, _ = loss_and_gradient(start([kl], off=[]), flat, log_probs)
        twice, _ = loss_and_gradient(
            start([kl, aux, doubling(hook)], off=["aux.auxiliary_loss"] * (hook == "kl_penalty")), flat, log_probs
        )
        part = once if hook == "kl_penalty" else once - rest
        torch.testing.assert_close(twice - once, part)
        assert abs(float(part)) > 1e-5


def test_a_wrapper_of_extend_rollouts_is_around_the_whole_chain() -> None:
    seen: list[int] = []

    def extend_rollouts(self: Plugin, rollouts: Rollouts) -> Any:
        seen.append(len(rollouts))
        result = yield
        seen.append(len(result))
        return result.select(torch.arange(len(result) - 1))

    wrapper = made("w", extend_rollouts=hookimpl(wrapper=True)(extend_rollouts))
    twice = made("twice", extend_rollouts=lambda self, rollouts: concatenate([rollouts, rollouts]))
    assert len(start([wrapper, twice]).extend_rollouts(rollouts(), None)) == 7
    assert seen == [4, 8]


@pytest.mark.parametrize("hook", ["prepare_step", "prepare_mini_batch", "on_step_end", "on_validation"])
def test_wrappers_of_hooks_that_give_nothing(hook: str) -> None:
    order: list[str] = []

    def wrap(self: Plugin) -> Any:
        order.append("before")
        yield
        order.append("after")

    stack = start([
        made("w", **{hook: hookimpl(wrapper=True)(wrap)}), made("a", **{hook: lambda self: order.append("a")})
    ])  # fmt: skip
    rows = rollouts()
    made_credit = stack.credit(rows)
    stack.mini_batch(stack.update_columns(rows, made_credit))
    stack.end_step(rows, made_credit)
    stack.validated({})
    assert order == ["before", "a", "after"]


def test_a_wrapper_of_a_stateful_hook_may_set_its_state_and_no_other_may() -> None:
    class Counter(Plugin):
        name = "counter"
        hooks: ClassVar[int] = 0

        def init_state(self, run: Any) -> dict[str, Any]:
            return {"seen": 0}

        @hookimpl(wrapper=True)
        def on_step_end(self) -> Any:
            self.state.seen += 1
            yield
            self.state.seen += 1

        @hookimpl(wrapper=True)
        def shape_rewards(self) -> Any:
            result = yield
            self.state.seen += 1
            return result

    stack, rows = start([Counter()], off=["counter.shape_rewards"]), rollouts()
    stack.end_step(rows, stack.credit(rows))
    assert stack.plugins[0].state.seen == 2
    with pytest.raises(StateError, match="set outside of"):
        start([Counter()]).credit(rows)


@pytest.mark.parametrize(
    "hook", ["shape_rewards", "compute_advantages", "select_samples", "combine_rewards", "baseline"]
)
def test_a_wrapper_that_returns_the_wrong_thing_is_named(hook: str) -> None:
    def wrap(self: Plugin) -> Any:
        yield

    wrapper = made("w", **{hook: hookimpl(wrapper=True)(wrap)})
    with pytest.raises(HookError, match=rf"w\.{hook}: returned"):
        credit([wrapper], rollouts())


def test_a_wrapper_must_yield_exactly_once() -> None:
    def never(self: Plugin) -> Any:
        if self.name == "":
            yield
        return torch.zeros(4, 1)

    def twice(self: Plugin) -> Any:
        yield
        yield

    for function in (never, twice):
        with pytest.raises(HookError, match=r"w\.shape_rewards: the wrapper must yield exactly once"):
            credit([made("w", shape_rewards=hookimpl(wrapper=True)(function))], rollouts())


def test_a_wrapper_may_handle_an_exception_of_what_it_wraps() -> None:
    def shape_rewards(self: Plugin, rewards: Tensor) -> Any:
        try:
            return (yield)
        except ZeroDivisionError:
            return rewards + 7

    def fails(self: Plugin, rewards: Tensor) -> Tensor:
        raise ZeroDivisionError

    assert (
        rewards_of([made("w", shape_rewards=hookimpl(wrapper=True)(shape_rewards)), made("a", shape_rewards=fails)])
        == 7
    )


def test_an_exception_of_a_hook_names_plugin_and_hook() -> None:
    def fails(self: Plugin, rewards: Tensor) -> Tensor:
        raise ZeroDivisionError("oh")

    with pytest.raises(ZeroDivisionError) as error:
        credit([made("a", shape_rewards=fails)], rollouts())
    assert any("a.shape_rewards" in note for note in error.value.__notes__)


# mixes


def test_a_mix_of_methods_evaluates_baseline_scale_and_advantages_once_per_method() -> None:
    grpo, rloo = credit(["grpo"], rollouts()).advantages, credit(["rloo"], rollouts()).advantages
    line = {"compute_advantages": {"grpo": 0.3, "rloo": 0.7}}
    for plugins in ([], ["grpo", "rloo"]):
        torch.testing.assert_close(credit(plugins, rollouts(), owners=line).advantages, 0.3 * grpo + 0.7 * rloo)


def test_a_mix_with_a_plugin_of_ones_own_and_with_builtins() -> None:
    a = made("a", advantage_scale=lambda self, rewards: torch.full_like(rewards, 4.0))
    alone = credit([a], rollouts()).advantages
    rloo = credit(["rloo"], rollouts()).advantages
    line = {"compute_advantages": {"a": 0.5, "rloo": 0.5}}
    torch.testing.assert_close(credit([a, "rloo"], rollouts(), owners=line).advantages, 0.5 * (alone + rloo))
    reinforce = credit(["reinforce_plus_plus"], rollouts()).advantages
    line = {"compute_advantages": {"reinforce_plus_plus": 2, "rloo": 1}}
    torch.testing.assert_close(credit([], rollouts(), owners=line).advantages, 2 * reinforce + rloo)


def test_the_methods_of_a_mix_bring_their_needs() -> None:
    trainer = Trainer("t", group_size=1)
    with pytest.raises(StackError, match="grpo needs 2 or more"):
        Stack([], owners={"compute_advantages": {"grpo": 0.5, "reinforce_plus_plus": 0.5}}, trainer=trainer)


def test_a_mix_whose_members_need_different_group_sizes_is_refused_without_a_remedy() -> None:
    class Single(Plugin):
        name = "single"
        needs = (needs.group_size(exactly=1),)
        uses = {"baseline": "zero", "advantage_scale": "one"}

    with pytest.raises(StackError, match="numbers of responses per prompt clash") as error:
        Stack(["grpo", Single()], owners={"compute_advantages": {"grpo": 0.5, "single": 0.5}})
    assert error.value.violations[0].settled_by == ()
    assert "no line of the stack file settles this" in str(error.value)


def test_a_claim_outside_of_the_mix_applies_to_the_methods_that_do_not_make_their_own() -> None:
    a = made("a", baseline=lambda self, rewards: torch.ones_like(rewards))
    b = made("b", advantage_scale=lambda self, rewards: torch.full_like(rewards, 2.0))
    c = made("c", advantage_scale=lambda self, rewards: torch.full_like(rewards, 4.0))
    result = credit([a, b, c], rollouts(), owners={"compute_advantages": {"b": 1, "c": 1}}).advantages
    assert result.flatten().tolist() == [0, -0.75, -0.75, 1.5]


def test_mixes_of_losses_bounds_penalties_and_reductions() -> None:
    rows = rollouts(ref_log_probs=-torch.ones(4, 3) * rollouts().mask)
    log_probs = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * rows.mask

    def loss(**owners: Any) -> Tensor:
        return loss_and_gradient(start(["grpo"], owners=owners), rows, log_probs)[0]

    mixed_hooks = {
        "policy_loss": ("ppo_clip", "reinforce"),
        "kl_penalty": ("k1", "k3"),
        "reduce_loss": ("token_mean", "sequence_mean"),
    }
    for hook, names in mixed_hooks.items():
        first, second = (loss(**{hook: name}) for name in names)
        assert abs(float(first - second)) > 1e-6
        mixed = loss(**{hook: {names[0]: 0.25, names[1]: 0.75}})
        torch.testing.assert_close(mixed, 0.25 * first + 0.75 * second)
    near = -0.25 * rows.mask.double()
    a = made("a", clip_range=lambda self: (0.0, 1.0))
    b = made("b", clip_range=lambda self: (0.0, 2.0))
    mixed = start(["grpo", a, b], owners={"clip_range": {"a": 0.75, "b": 0.25}})  # upper bound 1.25 < 1.284
    assert loss_and_gradient(mixed, rows, near)[1][0].count_nonzero() == 0
    mixed = start(["grpo", a, b], owners={"clip_range": {"a": 0.5, "b": 0.5}})  # upper bound 1.5
    assert loss_and_gradient(mixed, rows, near)[1][0].count_nonzero() == 1


def test_losses_per_token_and_per_response_cannot_be_mixed() -> None:
    a = made("a", policy_loss=lambda self, log_probs: log_probs.sum(1, keepdim=True))
    b = made("b", policy_loss=lambda self, log_probs: log_probs)
    rows = rollouts()
    with pytest.raises(HookError, match="cannot be mixed"):
        loss_and_gradient(start([a, b], owners={"policy_loss": {"a": 0.5, "b": 0.5}}), rows, -0.5 * rows.mask.float())


# what comes back


@pytest.mark.parametrize(
    ("hook", "value", "problem"),
    [
        ("combine_rewards", torch.zeros(4), r"returned \(4,\), not \(4, 1\)"),
        ("combine_rewards", 3.0, r"returned float"),
        ("shape_rewards", torch.zeros(4, 2), r"shape \(4, 2\), not \(4, 1\)"),
        ("assign_groups", torch.zeros(4), "int64"),
        ("assign_groups", torch.zeros(4, 1, dtype=torch.int64), r"shape \(4, 1\), not \(4,\)"),
        ("segment_tokens", torch.zeros(4, 2, dtype=torch.int64), r"shape \(4, 2\), not \(4, 3\)"),
        ("baseline", torch.zeros(4, 3), r"shape \(4, 3\), not \(4, 1\)"),
        ("baseline", torch.full((4, 1), torch.nan), "NaN or infinity"),
        ("advantage_scale", torch.full((4, 1), torch.inf), "NaN or infinity"),
        ("compute_advantages", None, "returned NoneType, not a tensor"),
        ("compute_advantages", torch.full((4, 1), torch.nan), "NaN or infinity"),
        ("compute_advantages", torch.full((4, 3), torch.nan), "NaN or infinity"),
        ("shape_advantages", torch.full((4, 1), torch.inf), "NaN or infinity"),
        ("shape_advantages", torch.zeros(3, 1), r"shape \(3, 1\), not \(4, 1\) or \(4, 3\)"),
        ("select_samples", -torch.ones(4, 1), "finite and >= 0"),
        ("select_samples", torch.full((4, 1), torch.nan), "finite and >= 0"),
        ("select_tokens", torch.ones(4, 1), r"shape \(4, 1\), not \(4, 3\)"),
    ],
)
def test_what_a_credit_hook_returns_outside_of_its_specification_is_an_error_that_names_it(
    hook: str, value: Any, problem: str
) -> None:
    with pytest.raises(HookError, match=rf"bad\.{hook}: .*{problem}") as error:
        credit([made("bad", **{hook: lambda self: value})], rollouts())
    assert (error.value.plugin, error.value.hook) == ("bad", hook)


@pytest.mark.parametrize(
    ("hook", "value", "problem"),
    [
        ("adapt_advantages", torch.zeros(4, 7), r"shape \(4, 7\)"),
        ("clip_range", 0.2, "lower and the upper bound"),
        ("policy_loss", torch.zeros(4), r"shape \(4,\)"),
        ("kl_penalty", torch.zeros(2, 3), r"shape \(2, 3\)"),
        ("reduce_loss", torch.zeros(1), r"shape \(1,\), not \(\)"),
        ("auxiliary_loss", torch.zeros(4, 3), r"shape \(4, 3\), not \(\)"),
    ],
)
def test_what_an_update_hook_returns_outside_of_its_specification_is_an_error_that_names_it(
    hook: str, value: Any, problem: str
) -> None:
    rows = rollouts()
    with pytest.raises(HookError, match=rf"bad\.{hook}: .*{problem}"):
        loss_and_gradient(start([made("bad", **{hook: lambda self: value})]), rows, -0.5 * rows.mask.float())


@pytest.mark.parametrize(
    ("hook", "value", "problem"),
    [
        ("choose_prompts", torch.tensor([0.0, 1.0]), "int64"),
        ("choose_prompts", torch.tensor([0, 99]), r"0\.\.3"),
        ("choose_prompts", torch.tensor([0]), r"shape \(1,\), not \(2,\)"),
        ("prompt_weights", torch.full((4,), -1.0), "finite and >= 0"),
    ],
)
def test_what_a_prompt_hook_returns_is_checked(hook: str, value: Tensor, problem: str) -> None:
    with pytest.raises(HookError, match=rf"bad\.{hook}: .*{problem}"):
        start([made("bad", **{hook: lambda self: value})]).choose_prompts(make_pool(4), 2)


@pytest.mark.parametrize(("value", "problem"), [([0, 4], "at least 1"), ([3, 3], "gave out 6 of 4"), ([1], "shape")])
def test_an_allocation_is_checked(value: list[int], problem: str) -> None:
    bad = made("bad", allocate_rollouts=lambda self: torch.tensor(value))
    with pytest.raises(HookError, match=rf"bad\.allocate_rollouts: .*{problem}"):
        start([bad]).allocate_rollouts(make_pool(2), 4)


def test_requests_sampling_and_rollouts_that_come_back_are_checked() -> None:
    pool = make_pool(2)
    requests = Requests.of(pool, torch.tensor([2, 1]))
    with pytest.raises(HookError, match=r"bad\.rewrite_prompts: must return Requests of 3 rows"):
        start([made("bad", rewrite_prompts=lambda self: None)]).rewrite_prompts(requests)
    with pytest.raises(HookError, match=r"bad\.sampling_params: must return Sampling of 3 rows"):
        bad = made("bad", sampling_params=lambda self: Sampling.of(2, 1.0, 8))
        start([bad]).sampling_params(requests, Sampling.of(3, 1.0, 8))
    with pytest.raises(HookError, match=r"bad\.extend_rollouts: returned NoneType"):
        start([made("bad", extend_rollouts=lambda self: None)]).extend_rollouts(rollouts(), None)
    with pytest.raises(HookError, match=r"bad\.filter_rollouts: must return 0"):
        start([made("bad", filter_rollouts=lambda self, scores: scores * 0 + 0.5)]).filter_rollouts(rollouts())
    with pytest.raises(HookError, match=r"bad\.reference_policy: returned 'best'"):
        start([made("bad", reference_policy=lambda self: "best")]).reference_policy()


def test_rows_of_a_kind_that_no_plugin_names_are_refused() -> None:
    def extend_rollouts(self: Plugin, rollouts: Rollouts) -> Rollouts:
        return concatenate([rollouts, with_experts()])

    with pytest.raises(HookError, match="kinds expert, which no plugin names"):
        start([made("bad", extend_rollouts=extend_rollouts)]).extend_rollouts(rollouts(), None)
    assert (
        len(start([made("ok", extend_rollouts=extend_rollouts), expert_plugin()]).extend_rollouts(rollouts(), None))
        == 8
    )


def test_a_hook_takes_only_arguments_of_its_specification() -> None:
    with pytest.raises(ConfigurationError, match=r"'bad' does not fit the hook specification.*nonsense"):
        Stack([made("bad", baseline=lambda self, nonsense: nonsense)])


# a stack that travels


def test_a_specification_round_trip_gives_the_same_stack_and_hash() -> None:
    defaults = {"clip_range": {"fixed": {"low": 0.1, "high": 0.3}}, "reduce_loss": "sequence_mean"}
    extras = (EntropyBonus(coefficient=0.01),)
    trainer = Trainer("t", provides=frozenset({"current_entropy"}), defaults=defaults, extras=extras)
    stack = Stack(
        ["grpo", {"reinforce_plus_plus": {"gamma": 0.9}}], trainer=trainer,
        owners={"compute_advantages": {"grpo": 0.5, "reinforce_plus_plus": 0.5}}, allow=["reward_scale"],
    )  # fmt: skip
    again = Stack.from_specification(stack.specification())
    assert again.fingerprint == stack.fingerprint
    assert again.specification() == stack.specification()
    assert [plugin.name for plugin in again.plugins] == ["grpo", "reinforce_plus_plus", "entropy_bonus"]


@pytest.mark.parametrize(
    "other",
    [
        {"plugins": ["rloo", "entropy_bonus"]},
        {"plugins": ["grpo"], "off": ["grpo.baseline"]},
        {"plugins": ["grpo"], "owners": {"baseline": "zero"}},
        {"plugins": ["grpo"], "allow": ["reward_scale"]},
    ],
)
def test_another_stack_has_another_hash(other: dict[str, Any]) -> None:
    plugins = [
        {"entropy_bonus": {"coefficient": 1.0}} if name == "entropy_bonus" else name for name in other.pop("plugins")
    ]
    assert Stack(plugins, **other).fingerprint != Stack(["grpo"]).fingerprint


def test_another_version_is_refused() -> None:
    specification = Stack(["grpo"]).specification()
    with pytest.raises(ConfigurationError, match="specification 99 is not"):
        Stack.from_specification(specification | {"specification": 99})
    plugins = [item | {"version": "99"} for item in specification["plugins"]]
    with pytest.raises(ConfigurationError, match="the run uses 99"):
        Stack.from_specification(specification | {"plugins": plugins})


def test_the_empty_stack_claims_nothing() -> None:
    stack = Stack([])
    assert not any(stack.claims(hook) for hook in HOOKS)
    rows = rollouts()
    pool = Prompts.select(make_pool(4), torch.arange(4))
    running = start([])
    assert running.filter_rollouts(rows) is rows
    assert running.rewrite_prompts(requests := Requests.of(pool, torch.ones(4, dtype=torch.int64))) is requests
    made_credit = running.credit(rows)
    assert made_credit.weights is None and made_credit.token_weights is None and made_credit.advantages.shape == (4, 1)


def test_a_stack_file_is_checked() -> None:
    assert StackConfig().plugins == []
    with pytest.raises(ConfigurationError, match="plugin"):
        Stack.from_mapping({"plugin": ["grpo"]})
