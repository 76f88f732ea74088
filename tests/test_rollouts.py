"""Rollouts, prompts and requests: selecting, joining, reading; and what becomes of rows without group or reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, Prompts, Requests, Rollouts, Sampling, hookimpl, needs
from rlplugins.errors import ConfigurationError, HookError
from rlplugins.rollouts import Columns, ReadGuard, concatenate, prompt_key, written_column
from rlplugins.testing import credit, loss_and_gradient, make_pool, make_rollouts, start

TOKEN_FIELDS = (
    "responses",
    "mask",
    "old_log_probs",
    "rollout_log_probs",
    "ref_log_probs",
    "entropy",
    "values",
    "prefix",
)


def made(plugin: str, body: dict[str, Any] | None = None, **methods: Callable[..., Any]) -> Plugin:
    return type(
        plugin.title(), (Plugin,), {"name": plugin, **(body or {}), **{k: hookimpl(m) for k, m in methods.items()}}
    )()


def full(scores: list[float], lengths: list[int], **fields: Any) -> Rollouts:
    """Rollouts that have every field."""
    rows, width = len(scores), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.rand(rows, width) * mask
    return make_rollouts(
        scores, list(range(rows)), lengths=lengths, rollout_log_probs=tokens, ref_log_probs=tokens + mask,
        entropy=tokens, values=-tokens, prefix=mask & False, components=torch.rand(rows, 2), version=torch.arange(rows),
        component_names=("x", "y"), columns={"c": torch.rand(rows, 1), "text": [f"{s}" for s in scores]}, **fields,
    )  # fmt: skip


# select and concatenate


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 0]), torch.tensor([True, False, True]), torch.tensor([], dtype=torch.int64)]
)
def test_selecting_rows_takes_every_field_and_column(index: Tensor) -> None:
    rollouts = full([1.0, 2.0, 3.0], [1, 3, 2])
    chosen = rollouts.select(index)
    rows = index.nonzero().flatten() if index.dtype == torch.bool else index
    assert len(chosen) == len(rows)
    for name in rollouts.names():
        before, after = rollouts[name], chosen[name]
        if isinstance(before, list):
            assert after == [before[row] for row in rows.tolist()]
        else:
            assert torch.equal(after, before[rows])
    assert chosen.kinds == rollouts.kinds and chosen.component_names == ("x", "y")


def test_joining_parts_undoes_selecting() -> None:
    rollouts = full([1.0, 2.0, 3.0, 4.0], [1, 3, 2, 3])
    joined = concatenate([rollouts.select(torch.tensor([0, 1])), rollouts.select(torch.tensor([2, 3]))])
    for name in rollouts.names():
        before, after = rollouts[name], joined[name]
        assert after == before if isinstance(before, list) else torch.equal(after, before)


def test_joining_pads_to_the_longest_response_with_exact_zeros() -> None:
    joined = concatenate([full([1.0], [2]), full([2.0], [5])])
    assert joined.mask.tolist() == [[True, True, False, False, False], [True] * 5]
    for name in TOKEN_FIELDS:
        field = joined[name]
        assert field.shape == (2, 5) and not field[~joined.mask].any(), name


def test_joining_merges_kinds_by_name() -> None:
    expert = full([1.0, 2.0], [1, 1], kind=torch.tensor([1, 0], dtype=torch.int8), kinds=("policy", "expert"))
    hinted = full([3.0, 4.0], [1, 1], kind=torch.tensor([1, 2], dtype=torch.int8), kinds=("policy", "hinted", "expert"))
    joined = concatenate([full([0.0], [1]), expert, hinted])
    assert joined.kinds == ("policy", "expert", "hinted")
    assert joined.of_kind("expert").tolist() == [False, True, False, False, True]
    assert joined.of_kind("hinted").tolist() == [False, False, False, True, False]
    assert joined.of_kind("policy").tolist() == [True, False, True, False, False]
    assert not joined.of_kind("refined").any()
    assert joined.kind.dtype == torch.int8


@pytest.mark.parametrize("missing", ["entropy", "c", "text"])
def test_rows_without_a_column_cannot_join_rows_that_have_it(missing: str) -> None:
    less = full([1.0], [2])
    if missing == "entropy":
        less.entropy = None
    else:
        del less.columns[missing]
    with pytest.raises(ConfigurationError, match=rf"rows without a column '{missing}' cannot be added"):
        concatenate([full([1.0], [2]), less])


def test_columns_that_were_written_are_still_known_as_written() -> None:
    one, two = make_rollouts([0.0]), make_rollouts([1.0])
    for part in (one, two):
        part["mine"] = torch.ones(1, 1)
    assert concatenate([one, two]).columns.written == {"mine"}
    assert one.select(torch.tensor([0])).columns.written == {"mine"}
    del one.columns["mine"]
    assert not one.columns.written


def test_a_column_has_one_entry_per_row() -> None:
    with pytest.raises(ConfigurationError, match="'x' has 3 rows, the rollouts have 2"):
        make_rollouts([0.0, 1.0])["x"] = torch.zeros(3)


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"no column 'entropy'; they have: .*scores.*difficulty"):
        make_rollouts([0.0], columns={"difficulty": [1]})["entropy"]
    assert make_rollouts([0.0]).get("entropy", 3) == 3


# the guard


def test_guarded_rollouts_share_tensors_and_check_what_is_read() -> None:
    rollouts = full([1.0], [2])
    guarded = rollouts.guarded(ReadGuard("p", frozenset({"entropy"})))
    assert guarded.entropy is rollouts.entropy and guarded.scores is rollouts.scores
    for read in (lambda: guarded.values, lambda: guarded["values"], lambda: guarded["c"]):
        with pytest.raises(ConfigurationError, match="p reads the column"):
            read()
    guarded["mine"] = torch.zeros(1, 1)
    assert "mine" in rollouts.columns and guarded["mine"] is rollouts.columns["mine"]
    assert guarded.select(torch.tensor([0])).guard is guarded.guard
    assert guarded.unguarded().values is rollouts.values


# prompts and requests


def test_the_key_of_a_prompt_is_stable() -> None:
    assert prompt_key("2 + 2 = ?") == 8487084148984385335
    assert len({prompt_key(f"prompt {place}") for place in range(10_000)}) == 10_000
    assert all(-(2**63) <= prompt_key(str(place)) < 2**63 for place in range(100))


def test_selecting_prompts_takes_texts_keys_rows_and_columns() -> None:
    pool = make_pool(4, {"level": torch.arange(4), "answer": ["a", "b", "c", "d"]})
    chosen = pool.select(torch.tensor([3, 1, 3]))
    assert chosen.texts == ["prompt 3", "prompt 1", "prompt 3"] and chosen["answer"] == ["d", "b", "d"]
    assert torch.equal(chosen.keys, pool.keys[[3, 1, 3]]) and torch.equal(chosen.rows, pool.rows[[3, 1, 3]])
    assert chosen["level"].tolist() == [3, 1, 3]


def test_requests_are_in_the_order_of_prompt_and_draw() -> None:
    requests = Requests.of(make_pool(3), torch.tensor([2, 1, 3]))
    assert requests.prompt.tolist() == [0, 0, 1, 2, 2, 2] and requests.draw.tolist() == [0, 1, 0, 0, 1, 2]
    assert requests.texts == [f"prompt {place}" for place in [0, 0, 1, 2, 2, 2]] and set(requests.prefixes) == {""}
    sampling = Sampling.of(6, 0.7, 32)
    assert len(sampling) == len(requests) == 6 and sampling.temperature.tolist() == pytest.approx([0.7] * 6)


def test_a_columns_object_is_a_mapping() -> None:
    columns = Columns({"a": [1, 2]})
    assert dict(columns) == {"a": [1, 2]} and len(columns) == 1 and "a" in columns


# rows without a finite reward


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_a_finite_reward_leaves_its_group_and_weighs_nothing(value: float) -> None:
    rollouts = make_rollouts([1.0, 0.0, value, 3.0], [0, 0, 0, 0])
    result = credit([], rollouts)
    rest = credit([], make_rollouts([1.0, 0.0, 3.0], [0, 0, 0]))
    assert result.groups.tolist() == [0, 0, -1, 0] and result.weights.flatten().tolist() == [1, 1, 0, 1]
    torch.testing.assert_close(result.advantages[[0, 1, 3]], rest.advantages)
    assert float(result.advantages[2]) == 0 and bool(result.rewards.isfinite().all())


@pytest.mark.parametrize("method", ["grpo", "rloo", "dr_grpo", "reinforce_plus_plus", "gae"])
def test_rows_without_a_reward_change_no_other_row_under_any_method(method: str) -> None:
    rollouts = make_rollouts([1.0, torch.nan, 0.0, 3.0], [0, 0, 0, 1], lengths=[3, 2, 1, 4], values=torch.ones(4, 4))
    kept = torch.tensor([0, 2, 3])
    result, rest = credit([method], rollouts), credit([method], rollouts.select(kept))
    torch.testing.assert_close(result.advantages[kept], rest.advantages)
    assert not result.advantages[1].any()
    assert bool(result.advantages.isfinite().all())


def test_weights_of_plugins_and_of_missing_rewards_multiply() -> None:
    plugin = made("a", select_samples=lambda self, rewards: torch.full_like(rewards, 2.0))
    assert credit([plugin], make_rollouts([1.0, torch.nan])).weights.flatten().tolist() == [2, 0]


def segmented(rewards: Tensor, segments: Tensor) -> list[Plugin]:
    return [
        made("r", combine_rewards=lambda self: rewards, segment_tokens=lambda self: segments),
        made("plain", {"uses": {"baseline": "zero", "advantage_scale": "one"}}),
    ]


def test_rewards_per_segment_go_to_the_tokens_of_their_segment() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    segments = torch.tensor([[0, 0, 1, -1], [1, 0, 0, 1]])
    result = credit(segmented(rewards, segments), make_rollouts([0.0, 0.0]))
    assert result.advantages.tolist() == [[1, 1, 2, 0], [4, 3, 3, 4]]
    assert result.token_weights is None and result.weights is None


def test_a_segment_without_a_reward_leaves_its_group_and_its_tokens_weigh_nothing() -> None:
    rewards = torch.tensor([[1.0, torch.nan], [3.0, 4.0], [torch.nan, torch.nan]])
    segments = torch.tensor([[0, 0, 1, -1], [0, 0, 1, 1], [0, 1, 1, 1]])
    result = credit(segmented(rewards, segments), make_rollouts([0.0] * 3, [0, 0, 0]))
    assert result.advantages.tolist() == [[1, 1, 0, 0], [3, 3, 4, 4], [0, 0, 0, 0]]
    assert result.weights.flatten().tolist() == [1, 1, 0] and result.groups.tolist() == [0, 0, -1]
    assert result.token_weights[:2].tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    centred = credit([segmented(rewards, segments)[0], made("plain", {"uses": {"advantage_scale": "one"}})],
                     make_rollouts([0.0] * 3, [0, 0, 0]))  # fmt: skip
    assert centred.advantages[:2].tolist() == [[-1, -1, 0, 0], [1, 1, 0, 0]]  # alone in its column: its own mean


def test_rewards_per_token_and_missing_ones() -> None:
    rewards = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan] * 3])
    plugins = [
        made("r", {"uses": {"segment_tokens": "token", "baseline": "zero", "advantage_scale": "one"}},
             combine_rewards=lambda self: rewards)
    ]  # fmt: skip
    result = credit(plugins, make_rollouts([0.0, 0.0], lengths=[3, 2]))
    assert result.advantages.tolist() == [[1, 0, 2], [0, 0, 0]]
    assert result.weights.flatten().tolist() == [1, 0] and result.token_weights[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("method", [{"gae": {"whiten": False}}, {"gae": {}}, {"reinforce_plus_plus": {"gamma": 0.5}}])
def test_missing_rewards_per_token_spoil_no_other_row(method: Any) -> None:
    rewards = torch.tensor([[1.0, 0.5, 2.0], [torch.nan] * 3, [0.0, 1.0, 0.0]])
    per_token = made("r", combine_rewards=lambda self, scores: rewards[[int(s) for s in scores.flatten()]])
    rollouts = make_rollouts(
        [0.0, 1.0, 2.0], values=torch.rand(3, 3, generator=torch.Generator().manual_seed(1)), tokens=3
    )
    kept = torch.tensor([0, 2])
    result, rest = credit([per_token, method], rollouts), credit([per_token, method], rollouts.select(kept))
    torch.testing.assert_close(result.advantages[kept], rest.advantages)
    assert not result.advantages[1].any()


def test_rewards_per_segment_need_segments() -> None:
    plugin = made("r", combine_rewards=lambda self, scores: torch.cat([scores, scores], 1))
    with pytest.raises(HookError, match=r"r\.combine_rewards: returned 2 rewards per response, but the whole response"):
        credit([plugin], make_rollouts([0.0, 1.0]))
    with pytest.raises(ConfigurationError, match="a reward per response or per token, not 2 per response"):
        credit([plugin, "reinforce_plus_plus"], make_rollouts([0.0, 1.0]))


# rows of no group


def experts(scores: list[float], name: str = "expert") -> Rollouts:
    """Two policy rows in a group, and one row of another kind in none."""
    kind = torch.tensor([0, 0, 1], dtype=torch.int8)
    return make_rollouts(scores, [0, 0, -1], kind=kind, kinds=("policy", name), lengths=[2, 3, 4])


@pytest.mark.parametrize("score", [5.0, float("nan")])
def test_a_row_of_no_group_starts_with_advantage_0_and_weight_1_reward_or_not(score: float) -> None:
    result = credit([], experts([1.0, 0.0, score]))
    assert float(result.advantages[2]) == 0 and result.weights is None
    torch.testing.assert_close(result.advantages[:2], credit([], make_rollouts([1.0, 0.0])).advantages)


def test_other_plugins_hooks_do_not_change_a_row_of_no_group() -> None:
    meddling = made(
        "meddling", shape_rewards=lambda self, rewards: rewards + 1,
        shape_advantages=lambda self, advantages: advantages + 1,
        select_samples=lambda self, advantages: advantages * 0, select_tokens=lambda self, mask: mask * 0.5,
        filter_rollouts=lambda self, scores: scores * 0,
        compute_advantages=lambda self, rewards: rewards + 7,
    )  # fmt: skip
    rollouts = experts([1.0, 0.0, 3.0])
    stack = start([meddling])
    kept = stack.filter_rollouts(rollouts)
    assert kept.scores.flatten().tolist() == [3.0]
    result = stack.credit(rollouts)
    assert float(result.advantages[2]) == 0 and float(result.rewards[2]) == 3
    assert result.weights.flatten().tolist() == [0, 0, 1]
    assert result.token_weights[2].tolist() == [1, 1, 1, 1] and result.token_weights[0].tolist() == [0.5, 0.5, 0, 0]


def test_the_plugin_that_adds_a_kind_may_change_its_rows() -> None:
    own = made(
        "own", {"kinds": frozenset({"expert"})},
        shape_advantages=lambda self, advantages, rollouts: advantages + 2 * rollouts.of_kind("expert")[:, None],
        select_samples=lambda self, rollouts: 1 + 2 * rollouts.of_kind("expert").float()[:, None],
    )  # fmt: skip
    other = made("other", shape_advantages=lambda self, advantages: advantages * 10)
    result = credit([own, other], experts([1.0, 0.0, 3.0]))
    assert float(result.advantages[2]) == 2 and result.weights.flatten().tolist() == [1, 1, 3]


def test_a_row_that_a_plugin_puts_into_a_group_counts_there() -> None:
    plugin = made(
        "g",
        assign_groups=lambda self, groups: groups * 0,
    )
    result = credit([plugin, made("p", {"uses": {"advantage_scale": "one"}})], experts([1.0, 0.0, 2.0]))
    assert result.advantages.flatten().tolist() == [0, -1, 1] and result.weights is None
    missing = credit([plugin], experts([1.0, 0.0, torch.nan]))
    assert missing.weights.flatten().tolist() == [1, 1, 0]


# edges


@pytest.mark.parametrize("method", ["grpo", "rloo", "dr_grpo", "reinforce_plus_plus"])
def test_a_group_of_one_has_advantage_0_or_its_reward_and_is_counted(method: str) -> None:
    stack = start([method])
    result = stack.credit(make_rollouts([1.0, 0.0, 5.0], [0, 0, 1]))
    assert bool(result.advantages.isfinite().all())
    if method != "reinforce_plus_plus":
        assert float(result.advantages[2]) == 0
        assert stack.metrics.as_dict()["rollouts/groups_of_one"] == pytest.approx(1 / 3)


def test_an_empty_response_has_no_tokens_and_breaks_nothing() -> None:
    rollouts = make_rollouts([1.0, 0.0, 3.0], [0, 0, 0], lengths=[2, 0, 3], values=torch.zeros(3, 3))
    for method in ("grpo", "reinforce_plus_plus", "gae"):
        stack = start([method])
        loss, gradient = loss_and_gradient(stack, rollouts, -0.5 * rollouts.mask.float())
        assert bool(loss.isfinite()) and gradient[1].count_nonzero() == 0


def test_a_batch_in_which_everything_was_filtered_out() -> None:
    stack = start(["grpo", made("none", filter_rollouts=lambda self, scores: scores * 0)])
    rollouts = make_rollouts([1.0, 0.0])
    kept = stack.filter_rollouts(rollouts)
    assert len(kept) == 0
    stack.end_step(kept, None)


def test_dropped_rows_come_back_at_the_end_of_the_step() -> None:
    seen: dict[str, Tensor] = {}

    def on_step_end(
        self: Plugin, rewards: Tensor, groups: Tensor, weights: Tensor, scores: Tensor, rollouts: Rollouts
    ) -> None:
        seen.update(rewards=rewards, groups=groups, weights=weights, scores=scores, keys=rollouts.prompt_keys)

    stack = start([made("a", filter_rollouts=lambda self, scores: (scores > 0).float(), on_step_end=on_step_end)])
    pool = make_pool(3)
    rollouts = make_rollouts([1.0, 0.0, 2.0], [0, 1, 2], pool=pool)
    kept = stack.filter_rollouts(rollouts)
    stack.end_step(kept, stack.credit(kept))
    assert seen["scores"].flatten().tolist() == [1, 2, 0]
    assert seen["weights"].flatten().tolist() == [1, 1, 0] and seen["groups"].tolist() == [0, 2, -1]
    assert seen["rewards"].flatten().isnan().tolist() == [False, False, True]
    assert torch.equal(seen["keys"], rollouts.prompt_keys[[0, 2, 1]])


@pytest.mark.parametrize("hook", ["compute_advantages", "shape_advantages", "adapt_advantages"])
def test_padding_is_exactly_zero_after_every_phase_whatever_a_hook_leaves_there(hook: str) -> None:
    rollouts = make_rollouts([1.0, 0.0], lengths=[2, 4])

    def leaves(self: Plugin, mask: Tensor) -> Tensor:
        return torch.where(mask, 1.0, torch.nan)

    stack = start([made("a", **{hook: leaves})])
    if hook != "adapt_advantages":
        result = stack.credit(rollouts)
        assert result.advantages[~rollouts.mask].tolist() == [0, 0]
    loss, gradient = loss_and_gradient(stack, rollouts, -0.5 * rollouts.mask.float())
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all()) and gradient[0, 2:].tolist() == [0, 0]


def test_what_is_constant_over_a_response_is_never_expanded() -> None:
    rollouts = make_rollouts(torch.rand(6), [0, 0, 0, 1, 1, 1], tokens=64)
    for method in ("grpo", "rloo", "dr_grpo", "reinforce_plus_plus"):
        assert credit([method], rollouts).advantages.shape == (6, 1)


def test_credit_changes_none_of_its_inputs_and_may_be_called_twice() -> None:
    rollouts = full([1.0, 0.0, 3.0], [1, 3, 2])
    rollouts.groups[:] = 0
    before = {name: rollouts[name].clone() for name in rollouts.names() if isinstance(rollouts[name], Tensor)}
    for method in ("grpo", "gae", "reinforce_plus_plus"):
        stack = start([method])
        first, second = stack.credit(rollouts), stack.credit(rollouts)
        assert torch.equal(first.advantages, second.advantages)
    assert all(torch.equal(rollouts[name], value) for name, value in before.items())


def test_the_credit_service_gives_the_advantages_of_other_rewards() -> None:
    seen: list[Tensor] = []

    def combine_rewards(self: Plugin, scores: Tensor, credit: Callable[[Tensor], Tensor]) -> Tensor:
        seen.append(credit(scores * 100 + 3))
        return scores

    rollouts = make_rollouts([1.0, 0.0, 3.0, 1.0], [0, 0, 1, 1])
    plugin = made("a", {"uses": {"advantage_scale": "one"}}, combine_rewards=combine_rewards)
    result = credit([plugin, made("double", shape_advantages=lambda self, advantages: advantages * 2)], rollouts)
    torch.testing.assert_close(seen[0], 100 * result.advantages)


def test_components_are_the_score_where_the_reward_function_gives_one_number() -> None:
    plugin = made("a", combine_rewards=lambda self, components: components.sum(1, keepdim=True))
    assert credit([plugin], make_rollouts([1.0, 2.0])).rewards.flatten().tolist() == [1, 2]
    parts = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert credit([plugin], make_rollouts([0.0, 0.0], components=parts)).rewards.flatten().tolist() == [3, 7]
    weighted = credit([], make_rollouts([0.0, 0.0], components=parts),
                      owners={"combine_rewards": {"weighted_sum": {"weights": [2.0, -1.0]}}})  # fmt: skip
    assert weighted.rewards.flatten().tolist() == [0, 2]


def test_columns_of_the_update_are_those_that_its_hooks_declared() -> None:
    reads = made(
        "a", {"needs": (needs.column("difficulty"),)}, kl_penalty=lambda self, log_probs, ref_log_probs: log_probs
    )
    rollouts = full([1.0, 0.0], [2, 2])
    rollouts.columns["difficulty"] = torch.zeros(2, 1)
    rollouts.columns.written.clear()
    stack = start([reads])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    assert {"difficulty", "ref_log_probs"} <= set(columns) and not {"entropy", "values", "c", "text"} & set(columns)
    assert isinstance(rollouts.prompts, list) and "prompts" not in columns


def test_prompts_are_a_pool_or_a_choice() -> None:
    pool = make_pool(3)
    assert isinstance(pool, Prompts) and len(pool) == 3 and pool.table.size == 3


def test_prompts_are_found_by_their_row_in_the_table() -> None:
    chosen = make_pool(5).select(torch.tensor([4, 0, 2]))
    assert chosen.positions(torch.tensor([2, 4, 3, -1, 0, 2])).tolist() == [2, 0, -1, -1, 1, 2]
    outside = Prompts(chosen.keys, torch.full((3,), -1), chosen.table, chosen.texts)
    assert outside.positions(torch.tensor([-1, 0])).tolist() == [-1, -1]


@pytest.mark.parametrize(
    "column", [torch.arange(3), torch.rand(3), torch.arange(3)[:, None], torch.rand(3, 2), torch.tensor([True, False, True]),
               ["a", "b", "c"], [[1], [1, 2], [3]], [None, 1, 2], [["a"], ["b"], ["c"]]],
)  # fmt: skip
def test_a_column_that_was_written_on_the_requests_survives_the_way_through_a_trainer(column: Any) -> None:
    found = written_column(column.tolist() if isinstance(column, Tensor) else column)
    assert torch.equal(found, column) if isinstance(column, Tensor) else found == column
