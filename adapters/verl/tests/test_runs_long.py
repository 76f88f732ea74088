"""What takes too long for every test run: `make test-long`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_runs import STACK, measured, plugin_state, weights
from verl_runs import VerlRun, end_all, with_stack

from rlplugins_verl.cpu import launch, tiny

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end_all()


def test_a_killed_and_resumed_run_ends_as_one_that_was_not_killed(tmp_path: Path) -> None:
    overrides = [*with_stack(*STACK), "trainer.save_freq=2"]
    whole = VerlRun(tmp_path / "whole", overrides, steps=4).wait()
    killed = VerlRun(tmp_path / "killed", overrides, steps=4)
    killed.wait_for(lambda: killed.saved() == 2)
    killed.kill()
    resumed = VerlRun(tmp_path / "killed", overrides, steps=4).wait()
    assert measured(resumed) == measured(whole)[2:]
    assert weights(resumed, 4) == weights(whole, 4)
    mine, theirs = plugin_state(resumed, 4), plugin_state(whole, 4)
    assert mine[0] == theirs[0]
    assert set(mine[1]) == set(theirs[1])
    assert all(torch.equal(mine[1][name].nan_to_num(-1), column.nan_to_num(-1)) for name, column in theirs[1].items())


def test_a_run_whose_worker_was_killed_resumes(tmp_path: Path) -> None:
    overrides = [*with_stack(*STACK), "trainer.save_freq=1"]
    run = VerlRun(tmp_path / "run", overrides, steps=4)
    run.wait_for(lambda: run.saved() >= 2)
    for worker in training_workers(run.process.pid):
        os.kill(worker, signal.SIGKILL)
    run.fails()
    resumed = VerlRun(tmp_path / "run", overrides, steps=4).wait()
    state, table = plugin_state(resumed, 4)
    assert state["states"]["d3s"]["progress_step"] == 4
    assert int(table["column/visits"].sum()) == 32


def training_workers(driver: int) -> list[int]:
    """The processes of a run that train."""
    import psutil

    children = psutil.Process(driver).children(recursive=True)
    found = [child.pid for child in children if "WorkerDict" in " ".join(child.cmdline())]
    assert found
    return found


def test_prompts_ahead_of_the_updates_and_two_ranks_that_keep_groups_whole(tmp_path: Path) -> None:
    """Prompts are chosen ahead of the updates; `p3o` raises if a micro-batch of either rank has less than a whole group."""
    overrides = [
        *with_stack("p3o", mode="colocate_async"), "trainer.save_freq=2", "trainer.test_freq=2",
        "actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    ]  # fmt: skip
    folder = tiny.write(tmp_path / "run")
    command = launch.command(folder, overrides, ranks=2, steps=3)
    done = subprocess.run(command, cwd=folder, env=launch.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (folder / "checkpoints" / "global_step_2" / "rlplugins" / "stack" / "state.json").exists()


def test_a_critic_learns_the_targets_of_the_stack(tmp_path: Path) -> None:
    overrides = [*with_stack("gae"), "algorithm.adv_estimator=gae", "critic.enable=True"]
    run = VerlRun(tmp_path / "run", overrides, steps=3).wait()
    assert all("critic/vf_loss" in step for step in run.metrics)


def test_a_study_runs_through_verl(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "tiny")
    base = launch.command(folder, steps=2)
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({
        "name": "tiny", "trainer": "verl", "seeds": [0], "design": "one_at_a_time", "plugins": ["bnpo"],
        "train": {"base": base, "steps": 2, "overrides": ["trainer.save_freq=1"]},
    }))  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "rlplugins",
        "ablate",
        str(study),
        "--output",
        str(tmp_path / "out"),
        "--jobs",
        "1",
    ]
    environment = launch.environment()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "bnpo" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()
