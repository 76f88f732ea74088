"""The credit phase, from rewards to advantages and weights, beside verl's own functions on the same arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.report import Line, allocations, cpu_seconds, seeded
from rlplugins import Plugin, hookimpl
from rlplugins.registry import Entry
from rlplugins.rollouts import Rollouts
from rlplugins.stack import Stack
from rlplugins.testing import make_pool, make_rollouts, start

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos")

RESPONSES, GROUPS, TOKENS = 16_384, 1_024, 4_096
SHAPE = f"{RESPONSES:,} responses, {GROUPS:,} groups, {TOKENS:,} tokens"
PART = f"Credit phase: {SHAPE}"
MEMORY = f"Memory of the credit phase: {SHAPE}"


@dataclass
class Arrays:
    """The same step as our rollouts and as verl's arrays."""

    rollouts: Rollouts
    single: Rollouts
    token_rewards: Tensor
    mask: Tensor
    index: Any


@pytest.fixture(scope="module")
def arrays() -> Arrays:
    source = seeded()
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (RESPONSES,), generator=source)
    groups = torch.arange(RESPONSES) // (RESPONSES // GROUPS)
    scores = torch.randint(0, 2, (RESPONSES,), generator=source).float()
    mask = torch.arange(TOKENS) < lengths[:, None]
    values = torch.randn(mask.shape, generator=source).mul_(mask)
    token_rewards = torch.zeros(mask.shape)
    token_rewards[torch.arange(RESPONSES), lengths - 1] = scores
    unread = torch.zeros(1, 1).expand(mask.shape)  # no credit hook reads tokens or log-probs
    columns = {"mask": mask, "responses": unread, "old_log_probs": unread, "values": values}
    return Arrays(
        make_rollouts(scores, groups, **columns),
        make_rollouts(scores, torch.arange(RESPONSES), **columns),
        token_rewards,
        mask.float(),
        np.array([f"prompt {group}" for group in groups.tolist()], dtype=object),
    )


def make_stack(plugins: list[Entry]) -> Stack:
    return start(plugins, pool=make_pool(RESPONSES), group_size=RESPONSES // GROUPS)


STACKS: dict[str, list[Entry]] = {
    "grpo": ["grpo"],
    "bnpo": ["bnpo"],
    "spo": ["spo"],
    "knapsack, bnpo, d3s": ["knapsack", "bnpo", {"d3s": {"k_init": 1.0}}],
}


def outcome(function: Callable[..., Any], arrays: Arrays) -> Callable[[], Any]:
    return lambda: function(arrays.token_rewards, arrays.mask, arrays.index)


@pytest.mark.parametrize("name", STACKS)
def test_sequence_level_methods(name, arrays, by_turns, record):
    stack, rollouts = make_stack(STACKS[name]), arrays.single if name == "spo" else arrays.rollouts
    theirs = outcome(core_algos.compute_grpo_outcome_advantage, arrays)
    measure = by_turns(lambda: stack.credit(rollouts), theirs, rounds=7)
    record(Line(PART, name, "verl's `grpo`", measure.speedups, 20, faster=True))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_beside_the_vectorised_functions(name, arrays, by_turns, record):
    stack = make_stack([name])
    theirs = outcome(getattr(core_algos, f"compute_{name}_vectorized_outcome_advantage"), arrays)
    measure = by_turns(lambda: stack.credit(arrays.rollouts), theirs, rounds=7)
    record(Line(PART, name, f"verl's `{name}_vectorized`", measure.speedups, faster=True))


def test_gae(arrays, by_turns, record):
    stack = make_stack(["gae"])
    values = arrays.rollouts.values
    measure = by_turns(
        lambda: stack.credit(arrays.rollouts),
        lambda: core_algos.compute_gae_advantage_return(arrays.token_rewards, values, arrays.mask, 1.0, 0.95),
        rounds=3,
        warm=0,
    )
    record(Line(PART, "gae, advantages and critic targets", "verl's `gae`", measure.speedups, 10, faster=True))


@pytest.mark.parametrize("gamma", [0.99, 1.0])
def test_reinforce_plus_plus(gamma, arrays, by_turns, record):
    stack = make_stack([{"reinforce_plus_plus": {"gamma": gamma}}])
    theirs = core_algos.compute_reinforce_plus_plus_outcome_advantage
    measure = by_turns(
        lambda: stack.credit(arrays.rollouts),
        lambda: theirs(arrays.token_rewards, arrays.mask, config=SimpleNamespace(gamma=gamma)),
        rounds=3,
        warm=0,
    )
    what = f"reinforce_plus_plus, gamma {gamma:g}"
    record(Line(PART, what, "verl's `reinforce_plus_plus`", measure.speedups, 10, faster=True))


@pytest.mark.parametrize("name", STACKS)
def test_no_copy_of_one_number_per_token(name, arrays, benchmark, record):
    stack, rollouts = make_stack(STACKS[name]), arrays.single if name == "spo" else arrays.rollouts
    _, largest = benchmark.pedantic(lambda: allocations(lambda: stack.credit(rollouts)))
    share = largest / (RESPONSES * TOKENS)
    record(Line(MEMORY, f"{name}, largest tensor", "one byte per token", [share], 1))


class Passing(Plugin):
    """A hook that does nothing, to time the call."""

    name = "passing"

    @hookimpl
    def shape_advantages(self, advantages: Tensor) -> Tensor:
        return advantages


def test_hook_dispatch(benchmark, record):
    hooks, rollouts = 40, make_rollouts(torch.tensor([0.0, 1.0]))
    kinds = [type(f"Passing{place}", (Passing,), {"name": f"passing_{place}"}) for place in range(hooks)]
    with_hooks, without = start([kind() for kind in kinds]), start([])
    times: list[float] = []

    def pair() -> None:
        spent = [cpu_seconds(lambda stack=stack: stack.credit(rollouts), repeat=50) for stack in (with_hooks, without)]
        times.append((spent[0] - spent[1]) / hooks)

    benchmark.pedantic(pair, rounds=15, warmup_rounds=1)
    record(Line("Calls", "one hook of a chain, checks of its result included", "50 microseconds",
                [seconds / 50e-6 for seconds in times[1:]], 1))  # fmt: skip
