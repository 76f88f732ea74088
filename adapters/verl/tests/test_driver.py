"""The trainers that verl is given, as far as they go before any worker is started."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_config import composed

from rlplugins.errors import ConfigurationError, RlpluginsError, StackError, StateError
from rlplugins.table import PromptTable
from rlplugins.testing import make_rollouts
from rlplugins_verl import columns as rows_of_verl
from rlplugins_verl import driver, settings, worker
from rlplugins_verl.columns import KEY
from rlplugins_verl.cpu import launch
from rlplugins_verl.pool import Pool

MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2"


@pytest.fixture(scope="module")
def registry() -> dict[str, Any]:
    import verl.trainer.ppo.v1  # noqa: F401
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    return TRAINER_REGISTRY


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Any]:
    return lambda *overrides: composed(launch.command(tmp_path, overrides)[3:])


@pytest.mark.parametrize("mode", ["sync", "colocate_async"])
def test_an_empty_stack_is_verls_own_trainer(mode: str, registry: dict[str, Any], config: Callable[..., Any]) -> None:
    given = config(f"trainer.v1.trainer_mode=rlplugins_{mode}", "+rlplugins.plugins=[]")
    trainer = registry[f"rlplugins_{mode}"](given)
    assert type(trainer) is registry[mode]
    assert given.trainer.v1.trainer_mode == mode
    assert "sample" not in vars(trainer.replay_buffer)


def test_a_stack_is_a_trainer_derived_from_verls(registry: dict[str, Any], config: Callable[..., Any]) -> None:
    trainer = registry["rlplugins_sync"](config("+rlplugins.plugins=[bapo]"))
    assert isinstance(trainer, registry["sync"]) and isinstance(trainer, driver.WithPlugins)
    assert trainer.trainer_mode == "sync"
    assert trainer.owns_loss and not trainer.owns_credit


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (["+rlplugins.plugins=[nowhere]"], ConfigurationError, "pip install"),
        (["+rlplugins.plugins=[spo]"], StackError, "actor_rollout_ref.rollout.n=1"),
        (["+rlplugins.plugins=[grpo]", "actor_rollout_ref.rollout.n=1"], StackError, "rollout.n=2"),
        (["+rlplugins.plugins=[bnpo,gtpo]"], StackError, "owners"),
        (["+rlplugins.stack=missing.yaml"], ConfigurationError, "missing.yaml"),
        (
            ["+rlplugins.plugins=[p3o]", "actor_rollout_ref.actor.use_kl_loss=True", MICRO],
            StackError,
            "set actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
        ),
        (
            ["+rlplugins.plugins=[bapo]", "algorithm.rollout_correction.rollout_is=token"],
            ConfigurationError,
            "rollout_is",
        ),
    ],
)
def test_what_cannot_run_is_refused_when_the_trainer_is_made(
    overrides: list[str], error: type[RlpluginsError], said: str, registry: dict[str, Any], config: Callable[..., Any]
) -> None:
    with pytest.raises(error) as refused:
        registry["rlplugins_sync"](config(*overrides))
    assert said in str(refused.value)


def test_another_version_of_verl_is_refused_when_the_trainer_is_made(
    registry: dict[str, Any], config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "version", lambda name: "0.10.2")
    with pytest.raises(ConfigurationError, match=r"verl 0\.10\.2 is installed.*>=0\.9,<0\.10"):
        registry["rlplugins_sync"](config("+rlplugins.plugins=[bapo]"))


def test_an_engine_without_a_rule_for_logits_keeps_its_options(
    registry: dict[str, Any], config: Callable[..., Any]
) -> None:
    options = config("+rlplugins.plugins=[bapo]")
    registry["rlplugins_sync"](options)
    assert "light" not in options.actor_rollout_ref.rollout.engine_kwargs
    registry["rlplugins_sync"](options := config("+rlplugins.plugins=[hapo-token]"))
    assert set(options.actor_rollout_ref.rollout.engine_kwargs.light) == {"additional_config", "logits_processors"}


def test_the_separate_mode_is_refused_with_the_reason(registry: dict[str, Any], config: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"rlplugins_separate_async.*rlplugins_sync"):
        registry["rlplugins_separate_async"](config("+rlplugins.plugins=[bapo]"))


def test_rows_of_no_group_have_no_advantage_of_verls() -> None:
    rollouts = make_rollouts([1.0, 0.0, 2.0], [0, 0, 1], lengths=[2, 1, 2])
    rollouts = replace(rollouts, groups=torch.tensor([0, 0, -1]))
    rows = [torch.full((size,), value) for size, value in ((2, 0.5), (1, -0.5), (2, 2.0))]
    credit = driver.credit_of_verl(rollouts, torch.nested.as_nested_tensor(rows, layout=torch.jagged))
    assert credit.advantages.tolist() == [[0.5, 0.5], [-0.5, 0.0], [0.0, 0.0]]
    given = driver.for_verl(rollouts, credit, [2, 1, 2], excluded=True)
    assert [row.tolist() for row in given["advantages"]] == [[0.5, 0.5], [-0.5], [0.0, 0.0]]


class Scored:
    """Stands for verl's trainer with a reward model on the training devices."""

    def _compute_reward_colocate(self, batch: Any, metrics: Any = None) -> Any:
        return batch


def test_scores_of_a_reward_model_on_the_training_devices_come_when_it_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        asked.append((keys, partition_id, select_fields))
        return rows_of_verl.stored({"rm_scores": [torch.tensor([0.0, 2.0]), torch.tensor([-1.0])]}, 2)

    monkeypatch.setattr(driver, "tq", SimpleNamespace(kv_batch_get=get))
    trainer = object.__new__(type("Trainer", (driver.WithPlugins, Scored), {}))
    none = make_rollouts([torch.nan, torch.nan], lengths=[2, 1])
    none.columns[KEY] = ["b", "a"]
    trainer.rollouts = none
    trainer._compute_reward_colocate(SimpleNamespace(partition_id="train"), metrics={})
    assert asked == [(["b", "a"], "train", ["rm_scores"])] and trainer.rollouts.scores.tolist() == [[2.0], [-1.0]]
    trainer.rollouts = None  # every row was dropped
    trainer._compute_reward_colocate(SimpleNamespace(partition_id="train"), metrics={})
    assert trainer.rollouts is None and len(asked) == 1


def test_rows_that_fill_a_batch_are_units_of_their_own() -> None:
    rollouts = SimpleNamespace(columns={KEY: ["a", "b", "c"]})
    batch = SimpleNamespace(keys=["b", "pad1", "c", "a", "pad2"])
    units = driver.WithPlugins._units(SimpleNamespace(rollouts=rollouts), batch, torch.tensor([0, 0, 1]))
    assert units.tolist() == [0, -2, 1, 0, -5]


# handshake


class Worker:
    """Stands for a Ray actor."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.__ray_call__ = SimpleNamespace(remote=lambda function: answer)


@pytest.fixture
def shaking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(driver.ray, "get", lambda call: call())
    trainer = SimpleNamespace(stack=SimpleNamespace(fingerprint="f1"))
    return lambda *workers: driver.WithPlugins._shake_hands(trainer, workers, None, "training worker")


def test_workers_that_answer_with_the_same_stack_and_versions_are_accepted(shaking: Callable[..., None]) -> None:
    shaking(Worker(lambda: {"fingerprint": "f1", **worker.versions()}), Worker(worker.versions))


def test_a_worker_with_another_installation_is_named(shaking: Callable[..., None]) -> None:
    other = {"fingerprint": "f2", **worker.versions(), "verl": "0.9.0"}
    with pytest.raises(
        ConfigurationError, match=r"training worker 1 .*fingerprint: f2 there, f1 here; verl: 0\.9\.0 there"
    ):
        shaking(Worker(worker.versions), Worker(lambda: other))


def test_a_worker_without_the_adapter_is_named(shaking: Callable[..., None]) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'rlplugins_verl'")

    with pytest.raises(
        ConfigurationError, match=r"training worker 0 cannot load rlplugins.*every node.*rlplugins_verl"
    ):
        shaking(Worker(missing))


# state


@pytest.fixture
def started(registry: dict[str, Any], config: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer whose plugins have their state, without data and workers of verl."""

    def make(*overrides: str) -> Any:
        from rlplugins.steps import Run

        trainer = registry["rlplugins_sync"](config(*overrides))
        rows = [{"raw_prompt": [{"role": "user", "content": f"{row}?"}]} for row in range(4)]
        trainer.pool = Pool.of(rows, PromptTable())
        trainer.stack.start(Run(10, 4, 32, trainer.pool.prompts))
        trainer.global_steps = 3
        return trainer

    return make


def save(trainer: Any) -> Path:
    checkpoint = trainer._checkpoint_folder(3)
    folder = checkpoint / driver.FOLDER
    folder.mkdir(parents=True)
    trainer.stack.save(folder / "stack", 3)
    (folder / driver.NOTES).write_text(json.dumps({"places": 24, "draws": 3}))
    (checkpoint.parent / "latest_checkpointed_iteration.txt").write_text("3")
    return checkpoint


def test_state_comes_back_from_the_checkpoint_that_verl_resumes(started: Callable[..., Any]) -> None:
    first = started("+rlplugins.plugins=[knapsack,d3s]")
    first.pool.prompts.table.visit(torch.tensor([2]), 1)
    checkpoint = save(first)
    second = started("+rlplugins.plugins=[knapsack,d3s]")
    assert second._resumed_folder() == checkpoint
    second._restore(checkpoint)
    assert (second.places, second.draws) == (24, 3)
    assert second.stack._table["visits"].tolist() == [0, 0, 1, 0]
    assert started("+rlplugins.plugins=[d3s]", "trainer.resume_mode=disable")._resumed_folder() is None


def test_the_state_of_another_stack_is_refused_with_what_to_do(started: Callable[..., Any]) -> None:
    checkpoint = save(started("+rlplugins.plugins=[knapsack,d3s]"))
    with pytest.raises(StateError, match=r"knapsack.*which this stack lacks.*delete that folder"):
        started("+rlplugins.plugins=[d3s]")._restore(checkpoint)


def test_a_checkpoint_without_plugin_state_is_continued(started: Callable[..., Any], tmp_path: Path) -> None:
    trainer = started("+rlplugins.plugins=[d3s]")
    trainer._restore(tmp_path / "global_step_3")
    assert trainer.places == 0
