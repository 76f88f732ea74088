"""Steps, their random numbers and shared values, and metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import Metrics, Plugin, Step, hookimpl
from rlplugins.errors import ConfigurationError
from rlplugins.testing import make_rollouts, start


class A(Plugin):
    name = "a"


class B(Plugin):
    name = "b"


def draw(seed: int, number: int, plugin: Plugin) -> list[float]:
    return torch.rand(4, generator=Step(number, 10, seed).generator(plugin)).tolist()


def test_random_numbers_are_a_function_of_seed_step_and_plugin() -> None:
    assert draw(0, 3, A()) == draw(0, 3, A())
    others = [draw(0, 3, A()), draw(1, 3, A()), draw(0, 4, A()), draw(0, 3, B())]
    assert len({tuple(numbers) for numbers in others}) == 4
    step = Step(3, 10)
    assert torch.rand(2, generator=step.generator(A())).equal(torch.rand(2, generator=step.generator(A())))


def test_random_numbers_do_not_touch_the_global_generator() -> None:
    state = torch.random.get_rng_state()
    draw(0, 0, A())
    start(["grpo"]).credit(make_rollouts([1.0, 0.0]))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_progress_goes_from_0_to_1() -> None:
    assert [Step(number, 4).progress for number in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert Step(0, 0).progress == 0


def test_what_one_plugin_shares_no_other_sees() -> None:
    step = Step(0, 1)
    step.of("a").share("x", 1)
    step.of("b").share("x", 2)
    assert step.of("a").shared == {"x": 1} and step.of("b").shared == {"x": 2} and step.of("c").shared == {}
    assert step.shared_by_all() == {"a": {"x": 1}, "b": {"x": 2}}


class Sharing(Plugin):
    value: float = 1.0

    @hookimpl
    def prepare_step(self, step: Step) -> None:
        step.share("value", self.value)

    @hookimpl
    def shape_advantages(self, advantages: Tensor, step: Step) -> Tensor:
        return advantages + step.shared["value"]

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        batch.share("doubled", 2 * batch.shared["value"])

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, batch: Any) -> Tensor:
        assert set(batch.shared) == {"value", "doubled"}
        return log_probs.sum() * batch.shared["doubled"]


class SharingA(Sharing):
    name = "sharing_a"


class SharingB(Sharing):
    name = "sharing_b"


def test_shared_values_reach_the_plugins_own_later_hooks_and_a_step_forgets_them() -> None:
    stack = start([SharingA(value=1.0), SharingB(value=10.0)])
    rollouts = make_rollouts([0.0, 0.0])
    result = stack.credit(rollouts)
    assert result.advantages.flatten().tolist() == [11, 11]
    columns = stack.update_columns(rollouts, result)
    log_probs = torch.full((2, 4), -0.5)
    for _ in range(2):  # another mini-batch starts from what the credit phase shared
        assert float(stack.mini_batch(columns).loss(log_probs).auxiliary) == pytest.approx(-4 * 22)
    assert stack.step.shared_by_all() == {"sharing_a": {"value": 1.0}, "sharing_b": {"value": 10.0}}
    sent = {name: dict(values) for name, values in stack.step.shared_by_all().items()}
    stack.begin_step(1, 10)
    assert stack.step.shared_by_all() == {}
    assert float(stack.mini_batch(columns, sent).loss(log_probs).auxiliary) == pytest.approx(-4 * 22)


# metrics


def test_a_metric_is_the_weighted_mean_of_what_was_logged() -> None:
    metrics = Metrics()
    metrics.log("x", 1.0)
    metrics.log("x", torch.tensor([4.0]), 3)
    metrics.log("y", torch.tensor(2.0, requires_grad=True), torch.tensor(2.0))
    metrics.log("never", 5.0, 0)
    assert metrics.as_dict() == {"x": 3.25, "y": 2.0}


def test_metrics_of_ranks_and_micro_batches_merge_into_the_mean_of_all() -> None:
    whole, one, two = Metrics(), Metrics(), Metrics()
    for place, (value, weight) in enumerate([(1.0, 1.0), (2.0, 5.0), (7.0, 0.5)]):
        whole.log("x", value, weight)
        (one, two)[place % 2].log("x", value, weight)
    two.log("z", 3.0)
    one.merge(two)
    assert one.as_dict()["x"] == pytest.approx(whole.as_dict()["x"]) and one.as_dict()["z"] == 3
    assert two.sums() == {"x": (10.0, 5.0), "z": (3.0, 1.0)}


def test_a_plugins_metrics_carry_its_name() -> None:
    class Logs(Plugin):
        name = "logs"

        @hookimpl
        def shape_rewards(self, rewards: Tensor, log: Any) -> Tensor:
            log("mean", rewards.mean(), len(rewards))
            return rewards

    stack = start([Logs()])
    stack.credit(make_rollouts([1.0, 2.0]))
    assert stack.metrics.as_dict()["rlplugins/logs/mean"] == 1.5
    stack.begin_step(1, 10)
    assert stack.metrics.as_dict() == {}


def test_a_metric_is_one_number() -> None:
    with pytest.raises(ConfigurationError, match=r"log\('x'\) takes one number, got a tensor of shape \(2, 1\)"):
        Metrics().log("x", torch.zeros(2, 1))


def test_what_is_kept_stays_with_the_plugin_and_is_not_sent() -> None:
    step = Step(0, 10)
    mine, other = step.of("mine"), step.of("other")
    mine.keep("returns", 3.0)
    assert step.of("mine").kept == {"returns": 3.0}
    assert other.kept == {}
    assert step.shared_by_all() == {}
