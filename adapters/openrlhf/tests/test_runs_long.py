"""What takes too long for every test run: `make test-long`."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openrlhf_runs import REPRODUCIBLE, SCRIPTED, OpenRLHFRun, beside_python, cluster, end_all, metrics_of

from rlplugins_openrlhf.cpu import launch, tiny

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end_all()


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setattr(launch, "SITE", REPRODUCIBLE)
    monkeypatch.setenv("RLPLUGINS_OPENRLHF_GATE", str(gate))
    flags = [*SCRIPTED, "--ckpt.save_steps", "2", "--ckpt.load_enable"]
    whole = OpenRLHFRun(tmp_path / "whole", "bapo,d3s", flags, steps=4).wait()
    gate.touch()
    killed = OpenRLHFRun(tmp_path / "killed", "bapo,d3s", flags, steps=4)
    killed.wait_for(lambda: killed.saved() == 2)
    killed.kill()
    gate.unlink()
    resumed = OpenRLHFRun(tmp_path / "killed", "bapo,d3s", flags, steps=4).wait()
    assert [step["step"] for step in resumed.measured] == [3, 4]
    assert resumed.measured == whole.measured[2:]
    assert (resumed.state(4) / "state.json").read_text() == (whole.state(4) / "state.json").read_text()


def test_generation_ahead_of_the_updates(tmp_path: Path) -> None:
    flags = ["--train.async_enable", "--eval.dataset", str(tmp_path / "run" / "validation.jsonl"), "--eval.steps", "2",
             "--eval.n_samples_per_prompt", "1", "--ckpt.save_steps", "2"]  # fmt: skip
    run = OpenRLHFRun(tmp_path / "run", "bnpo,bapo", flags, steps=4).wait()
    steps = [entry for entry in run.metrics if "train/policy_loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all(any(name.startswith("train/rlplugins/bapo/") for name in entry) for entry in steps)
    assert run.state(4).exists()


def test_a_critic_learns_what_the_stack_says(tmp_path: Path) -> None:
    run = OpenRLHFRun(tmp_path / "run", "pf-ppo,knapsack", ["--algo.advantage.estimator", "gae"], steps=2).wait()
    steps = [entry for entry in run.metrics if "train/policy_loss" in entry]
    assert len(steps) == 2 and all(math.isfinite(entry["train/critic_loss"]) for entry in steps)


def test_two_ranks_and_unequal_groups_whose_prompts_are_computed_once(tmp_path: Path) -> None:
    run = OpenRLHFRun(tmp_path / "run", "knapsack,bapo,prefix-grouper", steps=3, ranks=2).wait()
    assert len([entry for entry in run.metrics if "train/policy_loss" in entry]) == 3


def test_a_study_through_openrlhf(tmp_path: Path) -> None:
    tiny.write(tmp_path / "inputs")
    study = {
        "name": "tiny", "trainer": "openrlhf", "design": "one_at_a_time", "plugins": ["bapo"], "seeds": [0],
        "train": {"base": launch.command(tmp_path / "inputs", None, steps=2), "environment": {"HF_HUB_OFFLINE": "1"}},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "-m", "rlplugins", "ablate", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "runs"),
               "--jobs", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | launch.environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "runs").rglob("result.json"))) == 2


def test_a_job_of_a_ray_cluster(tmp_path: Path) -> None:
    """As OpenRLHF's own examples start it: the stack file travels with the working directory. The loss is OpenRLHF's own."""
    folder, working = tiny.write(tmp_path / "run"), tmp_path / "working"
    working.mkdir()
    (working / "stack.yaml").write_text("plugins: [bnpo, prefix-grouper]\n")
    words = launch.command(folder, "./stack.yaml", ["--logger.tensorboard_dir", str(folder / "board")], steps=2)
    entry = [beside_python("rlplugins"), "openrlhf", *words[words.index("train_ppo_ray") :]]
    with cluster(tmp_path / "cluster.log") as address:
        submit = [
            beside_python("ray"),
            "job",
            "submit",
            "--address",
            address,
            "--working-dir",
            str(working),
            "--",
            *entry,
        ]
        done = subprocess.run(submit, capture_output=True, text=True, env=launch.environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [entry for entry in metrics_of(folder / "board") if "train/policy_loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(math.isfinite(entry["train/policy_loss"]) and entry["train/actor_grad_norm"] > 0 for entry in steps)
    assert "rlplugins: bnpo(" in done.stdout and "prefix-grouper(" in done.stdout
