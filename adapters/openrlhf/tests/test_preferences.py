"""`train_dpo`: the same numbers as in the local trainer, OpenRLHF's own where no plugin changes them, and a real run."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("openrlhf")

import dpo_side

from rlplugins.errors import ConfigurationError, StackError
from rlplugins.stack import StackConfig
from rlplugins_local.adapter import build_stack as build_local_stack
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PairFile
from rlplugins_local.policy import Policy
from rlplugins_local.preferences import PreferenceTrainer
from rlplugins_openrlhf import launch, preferences
from rlplugins_openrlhf.cpu.launch import environment

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dpo_side.write(tmp_path_factory.mktemp("dpo"))


def on_ranks(folder: Path, ranks: int) -> dict[str, Any]:
    output, port = folder / f"{ranks}.pt", free_port()
    script = str(HERE / "dpo_side.py")
    processes = [
        subprocess.Popen([sys.executable, script, *map(str, (folder, rank, ranks, port, output))], env=environment())
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(600) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return torch.load(output, weights_only=True)


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Any]:
    return on_ranks(folder, 1)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Any]:
    return on_ranks(folder, 2)


def local(folder: Path, case: dpo_side.Case) -> dict[str, Any]:
    """The same steps in the local trainer."""
    config = TrainConfig(
        model=folder / "model", pairs=folder / "pairs.jsonl", steps=dpo_side.STEPS, batch_size=dpo_side.PAIRS,
        learning_rate=dpo_side.RATE, max_grad_norm=1e9, report_to=["none"], **case.settings,
    )  # fmt: skip
    if config.preference_loss == "ipo":  # OpenRLHF's is not divided by the number of tokens
        owners = {"preference_loss": {"ipo": {"per_token": False}}}
    else:
        owners = {}
    data = PairFile(folder / "pairs.jsonl")
    stack = build_local_stack(config, StackConfig(plugins=list(case.plugins or ()), owners=owners), data.columns)
    policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
    trainer = PreferenceTrainer(config, stack, policy, data, None)
    losses, gradients = [], []
    for _ in range(dpo_side.STEPS):
        losses.append(trainer.step()["loss"])
        gradients.append(torch.cat([item.grad.flatten() for item in policy.model.parameters()]))
    return {"loss": losses, "gradient": torch.stack(gradients)}


def same(ours: dict[str, Any], theirs: dict[str, Any], *, losses: bool = True) -> None:
    """Loss and gradient of every step, each after the steps before."""
    scale = theirs["gradient"].abs().amax(1, keepdim=True)
    assert float(scale.min()) > 0
    assert float(((ours["gradient"] - theirs["gradient"]).abs() / scale).max()) < 1e-4
    if losses:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@pytest.mark.parametrize("name", dpo_side.CASES)
def test_the_numbers_are_those_of_the_local_trainer(folder: Path, one_rank: dict[str, Any], name: str) -> None:
    same(one_rank[name], local(folder, dpo_side.CASES[name]))


@pytest.mark.parametrize("name", dpo_side.CASES)
def test_two_ranks_with_four_micro_batches_are_one(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], name: str
) -> None:
    same(two_ranks[name], one_rank[name])


@pytest.mark.parametrize("name", dpo_side.FLAGS)
def test_what_the_flags_mean_is_openrlhfs_own_loss(one_rank: dict[str, Any], name: str) -> None:
    """With a likelihood term OpenRLHF logs the loss without it."""
    same(one_rank[f"{name} in a stack"], one_rank[f"{name} alone"], losses=name != "nll")


# what is bound


def waiting() -> set[str]:
    """The modules that something is to be done to when they are imported."""
    return {finder.name for finder in sys.meta_path if type(finder).__module__ == "rlplugins.imports"}


@pytest.mark.parametrize(
    ("words", "bound"), [([], False), (["--rlplugins", "[]"], False), (["--rlplugins", "rdpo"], True)]
)
def test_with_an_empty_stack_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, words: list[str], bound: bool
) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "argv", ["x"])
    for name in [preferences.FLAGS, preferences.DATA, preferences.TRAINING]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    started = []
    monkeypatch.setattr(launch.runpy, "run_module", lambda name, **options: started.append((name, sys.argv[1:])))
    before = waiting()
    launch.run("train_dpo", [*words, "--model.beta", "0.2"])
    assert started == [("openrlhf.cli.train_dpo", ["--model.beta", "0.2"])]
    new = waiting() - before
    assert new == ({preferences.FLAGS, preferences.DATA, preferences.TRAINING} if bound else set())


def flags(**given: Any) -> Namespace:
    groups: dict[str, Any] = {"model": {}, "ds": {}}
    for name, value in given.items():
        group, _, flag = name.partition("__")
        groups[group][flag] = value
    return Namespace(**{name: Namespace(**values) for name, values in groups.items()})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, "dpo(beta=0.1)"),
        ({"model__beta": 0.3}, "dpo(beta=0.3)"),
        ({"model__label_smoothing": 0.2}, "cdpo(beta=0.1, label_smoothing=0.2)"),
        ({"model__ipo_enable": True, "model__label_smoothing": 0.2}, "ipo(beta=0.1, per_token=False)"),
    ],
)
def test_the_flags_name_a_built_in(given: dict[str, Any], meant: str) -> None:
    stack = preferences.build_stack(flags(**given), StackConfig(plugins=[{"nll": {"coefficient": 0.1}}]))
    assert repr(stack.plan.running("preference_loss")[0].plugin) == meant


def test_a_stack_that_cannot_run_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(StackError, match="trains on preferences here, but grpo is for rewards"):
        preferences.build_stack(flags(), StackConfig(plugins=["grpo"]))
    with pytest.raises(ConfigurationError, match="label_smoothing"):
        preferences.build_stack(flags(model__label_smoothing=0.7), StackConfig(plugins=["probe-idle"]))
    with pytest.raises(StackError, match=r"column 'flip_rate'.*add the column to the data set of pairs"):
        preferences.build_stack(flags(), StackConfig(plugins=[{"rdpo": {"per_pair": True}}]), ["level"])


# a real run


def command(folder: Path, name: str, *further: str) -> list[str]:
    given = {
        "model.model_name_or_path": folder / "model", "data.dataset": folder / "pairs.jsonl", "data.prompt_key": "prompt",
        "data.max_len": 64, "ds.zero_stage": 2, "ds.attn_implementation": "sdpa", "train.batch_size": 4,
        "train.micro_batch_size": 1, "adam.lr": 1e-3, "lr_warmup_ratio": 0.0, "ckpt.output_dir": folder / name,
        "ckpt.path": folder / "checkpoints", "ckpt.save_steps": 2, "logger.tensorboard_dir": folder / "logs" / name,
        "logger.wandb.run_name": "run", "eval.dataset": folder / "pairs.jsonl", "eval.split": "train", "eval.steps": 4,
    }  # fmt: skip
    words = [word for flag, value in given.items() for word in (f"--{flag}", str(value))]
    return [sys.executable, "-m", "rlplugins_openrlhf", "train_dpo", "--rlplugins", str(folder / "stack.yaml"), *words,
            *further]  # fmt: skip


def train(folder: Path, name: str, *further: str) -> str:
    ranks = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        command(folder, name, *further), env=environment() | ranks, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def logged(folder: Path, name: str) -> dict[str, dict[int, float]]:
    """Every logged number by its name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "logs" / name / "run"))
    reader.Reload()
    return {tag: {item.step: item.value for item in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def test_a_real_run_with_a_column_is_resumed_exactly(folder: Path) -> None:
    (folder / "stack.yaml").write_text(json.dumps({"plugins": [{"rdpo": {"per_pair": True}}]}))
    train(folder, "whole")
    whole = logged(folder, "whole")
    assert sorted(whole["train/rlplugins/rdpo/chosen_reward"]) == [1, 2, 3, 4]
    assert whole["train/loss_mean"][4] < whole["train/loss_mean"][1]
    assert whole["eval/eval_loss"][4] < 0.7
    states = folder / "checkpoints_rlplugins"
    assert sorted(path.name for path in states.iterdir()) == ["global_step2", "global_step4"]
    (folder / "checkpoints" / "latest").write_text("global_step2")
    train(folder, "resumed", "--ckpt.load_enable")
    resumed = logged(folder, "resumed")
    for step in (3, 4):
        for name in ("train/loss_mean", "train/rlplugins/rdpo/chosen_reward", "train/rlplugins/rdpo/negative_loss"):
            assert resumed[name][step] == pytest.approx(whole[name][step], abs=1e-6)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    other = json.dumps({"plugins": [{"rdpo": {"per_pair": True}}, {"nll": {"coefficient": 0.1}}]})
    (folder / "stack.yaml").write_text(other)
    with pytest.raises(AssertionError, match="belongs to another stack"):
        train(folder, "other", "--ckpt.load_enable")
