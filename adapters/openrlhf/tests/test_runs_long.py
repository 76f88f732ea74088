"""What takes too long for every test run: `make test-long`."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openrlhf_runs import HERE, OpenRLHFRun, end_all

from rlplugins_openrlhf.cpu import launch, tiny

pytestmark = pytest.mark.long
SCRIPTED = ["--train.agent_func_path", str(HERE / "scripted_agent.py")]
TIMES = ("train/timing/",)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end_all()


def measured(run: OpenRLHFRun) -> list[dict[str, Any]]:
    """All metrics but those that say how long something took."""
    return [{name: value for name, value in step.items() if not name.startswith(TIMES)} for step in run.metrics]


def test_an_empty_stack_is_plain_openrlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("RLPLUGINS_OPENRLHF_SEEN", str(seen))
    monkeypatch.setenv("PYTHONPATH", str(HERE / "reproducible"))
    monkeypatch.setattr(launch, "SITE", HERE / "reproducible")
    plain = OpenRLHFRun(tmp_path / "plain", None, SCRIPTED, steps=5).wait()
    assert not list(seen.iterdir())
    empty = OpenRLHFRun(tmp_path / "empty", "[]", SCRIPTED, steps=5).wait()
    mine, theirs = measured(empty), measured(plain)
    assert len(theirs) == 5 and all(math.isfinite(step["train/policy_loss"]) for step in theirs)
    assert len({step["train/rollout/reward_mean"] for step in theirs}) > 1
    assert mine == theirs
    started = {file.name for file in seen.iterdir()}
    assert started == {str(empty.process.pid)}  # no other process has loaded anything of the adapter
    loaded = {name for file in seen.iterdir() for name in file.read_text().split()}
    assert loaded <= {"rlplugins_openrlhf.launch", "rlplugins_openrlhf.settings"}


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


def test_two_ranks_and_unequal_groups(tmp_path: Path) -> None:
    run = OpenRLHFRun(tmp_path / "run", "knapsack,bapo", steps=3, ranks=2).wait()
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
