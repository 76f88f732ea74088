"""What a step says about its prompts: which, how many responses each, of which category, with which weights."""

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl
from rlplugins.rollouts import Prompts
from rlplugins.testing import make_pool, make_rollouts, start


class Even(Plugin):
    """All weight on the prompts of the category `even`, three times as much on the first."""

    name = "even"

    @hookimpl
    def prompt_weights(self, prompts: Prompts) -> Tensor:
        weights = torch.tensor([float(category == "even") for category in prompts["category"]])
        weights[0] = 3
        return weights


@pytest.fixture
def pool() -> Prompts:
    return make_pool(8, {"category": ["even", "odd"] * 4})


def end(stack, pool: Prompts, prompts: list[int], scores: list[float]) -> dict[str, float]:
    groups = torch.tensor(prompts)
    rollouts = make_rollouts(
        scores, groups, pool=pool, columns={"category": [pool["category"][place] for place in prompts]}
    )
    stack.end_step(rollouts, stack.credit(rollouts))
    return stack.metrics.as_dict()


def test_weights(pool: Prompts) -> None:
    stack = start([Even()], pool=pool)
    stack.choose_prompts(pool, 4)
    metrics = stack.metrics.as_dict()
    assert metrics["prompts/effective"] == pytest.approx(
        36 / 12 / 8
    )  # (3 + 1 + 1 + 1)^2 / (9 + 1 + 1 + 1) of 8 prompts
    assert metrics["category/even/weight"] == pytest.approx(1)
    assert metrics["category/odd/weight"] == 0


def test_prompts_and_budget(pool: Prompts) -> None:
    stack = start([], pool=pool)
    first = end(stack, pool, [0, 0, 0, 1], [1, 1, 1, 0])
    assert first["prompts/seen"] == 2 / 8 and first["prompts/repeated"] == 0
    assert first["group_size"] == 2 and first["group_size/min"] == 1 and first["group_size/max"] == 3
    assert first["groups/zero_std"] == 1
    stack.begin_step(1, 10)
    second = end(stack, pool, [0, 0, 2, 2], [1, 0, 1, 1])
    assert second["prompts/seen"] == 3 / 8 and second["prompts/repeated"] == 0.5
    assert second["groups/zero_std"] == 0.5


def test_categories(pool: Prompts) -> None:
    metrics = end(start([], pool=pool), pool, [0, 0, 2, 1], [1, 0, float("nan"), 1])
    assert metrics["category/even/share"] == 0.75 and metrics["category/odd/share"] == 0.25
    assert metrics["category/even/reward"] == 0.5 and metrics["category/odd/reward"] == 1


def test_seen_prompts_survive_a_checkpoint(pool: Prompts, tmp_path) -> None:
    stack = start([], pool=pool)
    end(stack, pool, [0, 1, 1, 2], [1, 0, 1, 0])
    stack.save(tmp_path / "state", 1)
    resumed = start([], pool=make_pool(8, {"category": ["even", "odd"] * 4}))
    resumed.load(tmp_path / "state")
    resumed.begin_step(1, 10)
    assert end(resumed, pool, [2, 2, 3, 3], [1, 0, 1, 0])["prompts/seen"] == 4 / 8


def test_many_categories_are_not_told_apart() -> None:
    pool = make_pool(40, {"category": [f"c{place}" for place in range(40)]})
    metrics = end(start([], pool=pool), pool, list(range(40)), [1.0] * 40)
    assert not any(name.startswith("category/") for name in metrics)
