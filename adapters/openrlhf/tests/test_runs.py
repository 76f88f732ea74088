"""OpenRLHF itself: Ray, DeepSpeed, vLLM, a reward file, evaluation, checkpoints. One run, killed, and its resume."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openrlhf_runs import OpenRLHFRun, end_all, install_probe, notes_of
from safetensors.torch import load_file

STACK = ("bnpo", "bapo", "d3s")
STEPS = 4


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end_all()


def plugin_state(run: OpenRLHFRun, step: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state of the plugins, and the prompt table, of a checkpoint."""
    folder = run.state(step)
    return json.loads((folder / "state.json").read_text()), load_file(folder / "table.safetensors")


def with_probe(folder: Path) -> tuple[Path, Path, Path]:
    """A stack file of three plugins of the repository and the probe, its notes, and where the probe is installed."""
    notes = folder / "notes.jsonl"
    file = folder / "stack.yaml"
    plugins = [*STACK, {"openrlhf-probe": {"log_file": str(notes)}}]
    file.write_text(json.dumps({"plugins": plugins, "off": ["openrlhf-probe.process_logits"]}))
    return file, notes, install_probe(folder / "probe")


def test_every_hook_is_called_where_it_belongs_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    stack, notes, probe = with_probe(tmp_path)
    flags = [
        "--algo.kl.use_loss", "--algo.kl.init_coef", "0.01", "--algo.kl.estimator", "k3",
        "--eval.dataset", str(tmp_path / "run" / "validation.jsonl"), "--eval.steps", "2", "--eval.n_samples_per_prompt", "1",
        "--ckpt.save_steps", "2", "--ckpt.load_enable",
    ]  # fmt: skip
    gate = tmp_path / "gate"
    gate.touch()
    run = OpenRLHFRun(tmp_path / "run", str(stack), flags, steps=STEPS, paths=[probe])
    run.wait_for(lambda: notes.exists() and bool(notes_of(notes)("gate")))
    assert run.saved() == 2
    run.kill()
    gate.unlink()
    first = notes_of(notes)
    check_prompts_and_rollouts(first)
    check_credit_and_update(first)
    state, table = plugin_state(run, 2)
    assert state["step"] == 2 and state["states"]["openrlhf-probe"] == {"steps": 2, "validations": 1}
    assert state["states"]["d3s"]["progress_step"] == 2  # saved after the life hooks, and after the validation
    assert int(table["column/visits"].sum()) == 8
    assert [entry["step"] for entry in run.metrics if "train/policy_loss" in entry] == [1, 2]
    for metrics in run.metrics[:2]:
        assert math.isfinite(metrics["train/policy_loss"]) and metrics["train/actor_grad_norm"] > 0
        assert metrics["train/rlplugins/bapo/high"] > 1 > metrics["train/rlplugins/bapo/low"]
        assert metrics["train/rlplugins/openrlhf-probe/rows"] == 17
        assert metrics["train/rollouts/kept"] == pytest.approx(16 / 17)

    resumed = OpenRLHFRun(tmp_path / "run", str(stack), flags, steps=STEPS, paths=[probe]).wait()
    assert [entry["step"] for entry in resumed.metrics if "train/policy_loss" in entry] == [3, 4]
    both = notes_of(notes)
    assert [entry["step"] for entry in both("on_step_end")] == [0, 1, 2, 3]
    assert [entry["steps"] for entry in both("on_step_end")] == [1, 2, 3, 4]  # nothing lost, nothing twice
    state, table = plugin_state(resumed, STEPS)
    assert state["states"]["openrlhf-probe"] == {"steps": 4, "validations": 2}
    assert state["states"]["d3s"]["progress_step"] == 4
    assert int(table["column/visits"].sum()) == 16


def check_prompts_and_rollouts(seen: Any) -> None:
    """What the hooks before the credit phase saw."""
    allocated, extended = seen("allocate_rollouts"), seen("extend_rollouts")
    assert [len(entry["keys"]) for entry in allocated[:2]] == [4, 4] and allocated[0]["budget"] == 16
    both = set(allocated[0]["keys"]) | set(allocated[1]["keys"])
    assert len(both) <= 8  # prompt_weights leaves half of the pool
    drawn_twice = set(allocated[0]["keys"]) & set(allocated[1]["keys"])
    known = dict(zip(allocated[1]["keys"], allocated[1]["seen"], strict=True))
    assert all(known[key] == (1 if key in drawn_twice else 0) for key in known)  # keys are stable, state is kept

    first = extended[0]
    sizes = [first["groups"].count(group) for group in dict.fromkeys(first["groups"])]
    assert sizes == [2, 6] * 2  # allocate_rollouts, and rows in the order of the prompts
    assert first["drawn"] == [draw for size in sizes for draw in range(size)]  # ... and of the draws
    assert list(dict.fromkeys(first["keys"])) == list(dict.fromkeys(allocated[0]["keys"]))
    short = [length for length, draw in zip(first["lengths"], first["drawn"], strict=True) if draw == 0]
    assert max(short) <= 3  # sampling_params
    hinted = [length for length, draw in zip(first["hinted"], first["drawn"], strict=True) if draw == 0]
    plain = [length for length, draw in zip(first["hinted"], first["drawn"], strict=True) if draw != 0]
    assert min(hinted) > max(plain)  # rewrite_prompts
    prefixed = [size for size, draw in zip(first["prefix"], first["drawn"], strict=True) if draw == 1]
    assert prefixed == [2] * 4 and sum(first["prefix"]) == 8
    starts = [tokens for tokens, draw in zip(first["start"], first["drawn"], strict=True) if draw == 1]
    assert len({tuple(tokens) for tokens in starts}) == 1  # all of them begin with the same forced text
    assert first["names"] == ["right", "digits"] and min(first["difficulty"]) >= 0
    assert [set(entry["version"]) for entry in extended[:2]] == [{0}, {1}]
    assert all(entry["difference"] < 0.1 for entry in seen("engine.log_probs"))  # bfloat16 in two implementations


def check_credit_and_update(seen: Any) -> None:
    """What the hooks after the rollouts saw, and in which processes."""
    credit, ended = seen("shape_advantages")[0], seen("on_step_end")
    assert credit["rows"] == 16 and credit["kind"].count(1) == 1  # an expert row came, one row went
    assert credit["groups"].count(-1) == 1 and credit["entropy"] > 0
    assert [entry["reference"] for entry in seen("shape_advantages")[:2]] == [0.0, 0.0]  # reference_policy: renewed
    assert [entry["rows"] for entry in ended] == [17, 17] and [entry["missing"] for entry in ended] == [1, 1]
    assert all(entry["moved"] > 0 for entry in ended)  # after the update
    assert [entry["validations"] for entry in seen("on_validation")] == [1]
    prepared, adapted, added = seen("prepare_mini_batch"), seen("adapt_advantages"), seen("auxiliary_loss")
    assert [entry["rows"] for entry in prepared] == [8, 8, 8, 8]  # two optimiser steps of 8 rows in each step
    assert len(adapted) == 8 and all(entry["entropy"] > 0 for entry in adapted)  # micro-batches of 4
    assert {entry["rows"] for entry in added} == {8} and {entry["part"] for entry in added} == {4}
    loop = {entry["pid"] for entry in ended + seen("extend_rollouts") + seen("allocate_rollouts")}
    update = {entry["pid"] for entry in prepared + adapted + added}
    assert len(loop) == 1 and len(update) == 1 and not loop & update


def test_a_stack_that_cannot_run_ends_before_ray_starts(tmp_path: Path) -> None:
    log = OpenRLHFRun(tmp_path / "run", "spo").fails()
    assert "error: " in log and "set --rollout.n_samples_per_prompt 1" in log
    assert "Traceback" not in log and "Started a local Ray instance" not in log
