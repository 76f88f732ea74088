"""Rows that stay together are dealt as whole units, whatever their sizes; settings that would tear them apart are refused."""

import parity_plugins  # noqa: F401
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplugins.errors import ConfigurationError, RlpluginsError, StackError
from rlplugins.stack import Stack, StackConfig
from rlplugins_verl import settings as verl_settings
from rlplugins_verl import together


@settings(max_examples=25, deadline=None)
@given(ranks=st.integers(1, 3), mini_batches=st.integers(1, 3), each=st.integers(1, 3), size=st.integers(1, 4),
       seed=st.integers(0, 9), alone=st.integers(0, 3))  # fmt: skip
def test_every_rank_gets_whole_groups_in_every_mini_batch(
    ranks: int, mini_batches: int, each: int, size: int, seed: int, alone: int
) -> None:
    groups = torch.arange(ranks * mini_batches * each).repeat_interleave(size)
    groups = torch.cat([groups[alone:], -1 - torch.arange(min(alone, len(groups)))])  # rows that left, and fillers
    groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    order = together.dealt(groups, ranks, mini_batches)
    assert sorted(order) == list(range(len(groups)))
    parts = groups[order].view(ranks * mini_batches, each * size)
    seen = [set(part.tolist()) for part in parts]
    assert sum(map(len, seen)) == len(groups.unique())


def test_equal_groups_stay_in_their_order() -> None:
    assert together.dealt(torch.arange(4).repeat_interleave(2), 1, 2) == list(range(8))
    assert together.dealt(torch.arange(4).repeat_interleave(2), 2, 2) == [
        0,
        1,
        4,
        5,
        2,
        3,
        6,
        7,
    ]  # first rank, second rank


def test_no_unit_is_cut_that_need_not_be() -> None:
    units = torch.tensor([0, 1, 1, 2])
    for whole in (True, False):
        assert units[together.dealt(units, 2, 1, whole=whole)].tolist() == [1, 1, 0, 2]


def test_groups_that_do_not_fill_the_parts_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match=r"2 rank\(s\).*ppo_mini_batch_size"):
        together.dealt(torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), 2, 1)


@settings(max_examples=40, deadline=None)
@given(units=st.lists(st.integers(0, 3), min_size=1, max_size=12), ranks=st.integers(1, 3), seed=st.integers(0, 9))
def test_units_that_may_be_cut_are_dealt_side_by_side(units: list[int], ranks: int, seed: int) -> None:
    rows = torch.tensor(units * ranks)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    order = together.dealt(rows, ranks, 1, whole=False)
    assert sorted(order) == list(range(len(rows)))
    dealt = rows[order].tolist()
    parts = [dealt[place : place + len(units)] for place in range(0, len(dealt), len(units))]
    assert sum(len(set(part)) for part in parts) <= len(set(units)) + ranks - 1  # at most one is cut at each border


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=20), ranks=st.integers(1, 4))
def test_rows_are_spread_over_ranks_in_whole_units(rows: list[tuple[int, int]], ranks: int) -> None:
    units, costs = torch.tensor(rows).unbind(1)
    parts = together.spread(units, costs, ranks)
    assert sorted(row for part in parts for row in part) == list(range(len(rows))) and len(parts) == ranks
    seen = [set(units[part].tolist()) for part in parts]
    assert sum(map(len, seen)) == len(units.unique())
    loads = [int(costs[part].sum()) for part in parts]
    largest = max(int(costs[units == unit].sum()) for unit in units.unique())
    assert max(loads) - min(loads) <= largest


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-2, 3), st.integers(1, 9)), min_size=1, max_size=20), limit=st.integers(1, 20)
)
def test_a_unit_that_exceeds_the_limit_is_cut_into_pieces_that_do_not(rows: list[tuple[int, int]], limit: int) -> None:
    units, costs = torch.tensor(rows).unbind(1)
    pieces = together.fitting(units, costs, limit)
    for piece in pieces.unique():
        inside = pieces == piece
        assert len(units[inside].unique()) == 1
        assert int(costs[inside].sum()) <= limit or int(inside.sum()) == 1
    for unit in units.unique():
        total = int(costs[units == unit].sum())
        count = len(pieces[units == unit].unique())
        assert count == 1 if total <= limit else count <= 2 * total / limit + 1


ACTOR = {"ppo_mini_batch_size": 8, "ppo_micro_batch_size_per_gpu": 4, "use_kl_loss": True}


def build(*plugins: str, ranks: int = 1, batch: int = 8, **actor: object) -> Stack:
    config = {
        "algorithm": {"adv_estimator": "grpo"},
        "data": {"train_batch_size": batch, "max_prompt_length": 10, "max_response_length": 20},
        "trainer": {"nnodes": 1, "n_gpus_per_node": ranks},
        "actor_rollout_ref": {"rollout": {"n": 4}, "actor": {"strategy": "fsdp2", **ACTOR, **actor}},
    }
    return verl_settings.build_stack(config, StackConfig(plugins=list(plugins)), "sync")


@pytest.mark.parametrize(
    ("given_settings", "said"),
    [
        ({"ppo_micro_batch_size_per_gpu": 3}, "ppo_micro_batch_size_per_gpu=4"),
        ({"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 100}, "ppo_max_token_len_per_gpu=120"),
        ({"ranks": 3}, "ppo_mini_batch_size to a multiple of 3"),
        ({"shuffle": True}, "shuffle=False"),
    ],
)
def test_settings_that_tear_groups_apart_are_refused_with_what_to_do(given_settings: dict, said: str) -> None:
    with pytest.raises(StackError, match="p3o needs rows kept in one micro-batch") as refused:
        build("p3o", **given_settings)
    assert said in str(refused.value)
    build("bnpo", **given_settings)


def test_settings_that_keep_groups_are_accepted() -> None:
    build("p3o", ranks=2, batch=32)
    build("p3o", use_dynamic_bsz=True, ppo_max_token_len_per_gpu=120, ppo_micro_batch_size_per_gpu=1)


def test_a_plugin_that_can_do_without_is_refused_nowhere() -> None:
    for given_settings in ({"ppo_micro_batch_size_per_gpu": 3}, {"shuffle": True}, {"ranks": 3}):
        stack = build("plain-forward", "knapsack", **given_settings)
        assert stack.needs("together") and not verl_settings.needs_whole_units(stack)
    assert verl_settings.needs_whole_units(build("plain-forward", "p3o"))


def test_groups_whose_sizes_change_are_refused_where_verl_deals_out_equal_parts() -> None:
    build("p3o", "knapsack")
    for parts in ({"ranks": 2}, {"batch": 16}):
        with pytest.raises(RlpluginsError, match=r"allocate_rollouts may change the sizes.*one rank"):
            build("p3o", "knapsack", **parts)
