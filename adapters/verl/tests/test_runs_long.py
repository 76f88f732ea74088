"""What takes too long for every test run: `make test-long`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import free_port
from test_runs import STACK, measured, plugin_state, weights
from verl_runs import SECONDS, VerlRun, end_all, install_probe, with_stack

from rlplugins.judge import Judge, JudgeConfig
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
    """Prompts are chosen ahead of the updates; `p3o` raises if a micro-batch of either rank has less than a whole group.

    On the same ranks prompts that responses share are computed once, and gradients are asked for.
    """
    notes = tmp_path / "notes.jsonl"
    overrides = [
        *with_stack("p3o", "prefix-grouper", f"{{asking:{{log_file:{notes}}}}}", mode="colocate_async"),
        "trainer.save_freq=2", "trainer.test_freq=2", "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
    ]  # fmt: skip
    run = VerlRun(tmp_path / "run", overrides, ranks=2, steps=3, probe=install_probe(tmp_path / "probe")).wait()
    assert (run.state(2) / "state.json").exists()
    asked = [json.loads(line) for line in notes.read_text().splitlines()]
    assert len(asked) == 3 and all(entry["bend"] < 1e-6 and entry["longest"] > 1e-3 for entry in asked)
    differences = [step["training/rollout_probs_diff_mean"] for step in run.metrics]
    assert max(differences) < 0.05


@pytest.fixture
def judging(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """vLLM's own server with an interface like OpenAI's, on the tiny model; and its address."""
    model, log, port = tiny.write(tmp_path / "judge") / "model", tmp_path / "judge.log", free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "judge",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-model-len", "128",
        "--max-num-seqs", "8", "--max-num-batched-tokens", "512",
    ]  # fmt: skip
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=launch.environment(), stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        started = time.monotonic()
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() - started < SECONDS, log.read_text()[-4000:]
            time.sleep(0.5)
        yield server, f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(60)


def answers(url: str) -> bool:
    """Whether somebody is there."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def test_a_judge_on_a_real_server_answers_until_it_is_gone(
    judging: tuple[subprocess.Popen[bytes], str], tmp_path: Path
) -> None:
    server, url = judging
    logged: list[tuple[str, float]] = []
    config = JudgeConfig(
        url=url, model="judge", parameters={"temperature": 0.0, "max_tokens": 8}, retries=1, timeout=30,
        cache=tmp_path / "replies.db",
    )  # fmt: skip

    def ask(config: JudgeConfig, *questions: Any) -> list[str | None]:
        logged.clear()
        judge = Judge(config).logging(lambda name, value, weight=1.0: logged.append((name, float(value))))
        return judge.ask(questions, str)

    questions = ["1+2=", "3+4=", [{"role": "user", "content": "5+6="}], "1+2="]
    first = ask(config, *questions)
    assert None not in first and first[0] == first[3] and len("".join(map(str, first))) > 4
    assert dict(logged)["judge/answered"] == 1 and dict(logged)["judge/cached"] == 0
    assert ask(config.model_copy(update={"cache": None}), *questions) == first  # of the model, not of the cache
    wrong = config.model_copy(update={"model": "nobody", "cache": None})
    assert ask(wrong, "1+2=") == [None] and dict(logged)["judge/failed"] == 1

    os.killpg(server.pid, signal.SIGKILL)
    server.wait(60)
    began = time.monotonic()
    assert ask(config, *questions, "7+8=") == [*first, None]  # what was answered before is kept
    assert dict(logged)["judge/failed"] == pytest.approx(1 / 5) and dict(logged)["judge/cached"] == pytest.approx(4 / 5)
    assert time.monotonic() - began < 30


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
