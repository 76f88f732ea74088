"""OpenRLHF itself: Ray, DeepSpeed, vLLM, a reward file, evaluation, checkpoints. One run, killed, and its resume; a run with
an empty stack and one of plain OpenRLHF."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openrlhf_runs import REPRODUCIBLE, SCRIPTED, OpenRLHFRun, end_all, imports, install_probe, notes_of, ours
from safetensors.torch import load_file

from rlplugins.testing.tiny import make_tokenizer
from rlplugins_openrlhf.cpu import launch

STACK = ("bnpo", "bapo", "d3s")
STEPS = 4
PROCESSES = 5  # that import OpenRLHF: the command, the trainer, the actor, the engine and its worker
MODULES = {"__main__", "launch", "settings"}  # of the adapter, in that command: nothing that binds


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
    expert = {"prompt": [{"role": "user", "content": "70+1="}], "response": "71"}  # to a prompt that is not of the pool
    (folder / "experts.jsonl").write_text(json.dumps(expert) + "\n")
    options = {"log_file": str(notes), "demonstrations": str(folder / "experts.jsonl")}
    plugins = [*STACK, {"openrlhf-probe": options}]
    file.write_text(json.dumps({"plugins": plugins}))
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
    check_asked(first)
    check_given(first)
    check_gradients(first, [metrics["train/actor_lr"] for metrics in run.metrics])
    check_forward(first)
    state, table = plugin_state(run, 2)
    kept = state["states"]["openrlhf-probe"]
    assert state["step"] == 2 and (kept["steps"], kept["validations"]) == (2, 1)
    assert state["states"]["d3s"]["progress_step"] == 2  # saved after the life hooks, and after the validation
    assert int(table["column/visits"].sum()) == 8
    assert [entry["step"] for entry in run.metrics if "train/policy_loss" in entry] == [1, 2]
    for metrics in run.metrics[:2]:
        assert math.isfinite(metrics["train/policy_loss"]) and metrics["train/actor_grad_norm"] > 0
        assert metrics["train/rlplugins/bapo/high"] > 1 > metrics["train/rlplugins/bapo/low"]
        assert metrics["train/rlplugins/openrlhf-probe/rows"] == 18
        assert metrics["train/rollouts/kept"] == pytest.approx(16 / 18)

    resumed = OpenRLHFRun(tmp_path / "run", str(stack), flags, steps=STEPS, paths=[probe]).wait()
    assert [entry["step"] for entry in resumed.metrics if "train/policy_loss" in entry] == [3, 4]
    both = notes_of(notes)
    assert [entry["step"] for entry in both("on_step_end")] == [0, 1, 2, 3]
    assert [entry["steps"] for entry in both("on_step_end")] == [1, 2, 3, 4]  # nothing lost, nothing twice
    state, table = plugin_state(resumed, STEPS)
    kept = state["states"]["openrlhf-probe"]
    assert (kept["steps"], kept["validations"]) == (4, 2) and set(kept["model"]) == {"w", "b"}
    assert len({entry["missed"] for entry in both("on_step_end")}) == 4  # the plugin's model went on from where it was
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
    starts: dict[int, list[list[int]]] = {}
    for draw, size, tokens in zip(first["drawn"], first["prefix"], first["start"], strict=True):
        assert size == (2 if draw in (1, 3) else 0)
        starts.setdefault(draw, []).append(tokens)
    assert len(starts[1]) == 4 and len({tuple(tokens) for tokens in starts[1]}) == 1  # the same forced text
    assert starts[3] == [[30, 31]] * 2  # forced tokens
    assert [draw == 2 for draw in first["drawn"]] == first["steered"]  # process_logits, with each request's numbers
    assert first["names"] == ["right", "digits"] and min(first["difficulty"]) >= 0
    assert [set(entry["version"]) for entry in extended[:2]] == [{0}, {1}]
    assert all(entry["difference"] < 0.1 for entry in seen("engine.log_probs"))  # bfloat16 in two implementations


def check_credit_and_update(seen: Any) -> None:
    """What the hooks after the rollouts saw, and in which processes."""
    credit, ended = seen("shape_advantages")[0], seen("on_step_end")
    assert credit["rows"] == 16 and credit["kind"].count(1) == 2  # two expert rows came, two rows went
    assert credit["groups"].count(-1) == 2 and credit["entropy"] > 0
    assert [entry["reference"] for entry in seen("shape_advantages")[:2]] == [0.0, 0.0]  # reference_policy: renewed
    assert [entry["rows"] for entry in ended] == [18, 18] and [entry["missing"] for entry in ended] == [2, 2]
    assert all(entry["moved"] > 0 for entry in ended)  # after the update
    assert ended[0]["missed"] > ended[1]["missed"] > 0  # by the plugin's own model
    assert [entry["validations"] for entry in seen("on_validation")] == [1]
    prepared, adapted, added = seen("prepare_mini_batch"), seen("adapt_advantages"), seen("auxiliary_loss")
    # in each step first the gradients of three advantages, then two optimiser steps of 8 rows
    assert [entry["rows"] for entry in prepared] == [16, 16, 16, 8, 8] * 2
    assert len(adapted) == 32 and all(entry["entropy"] > 0 for entry in adapted)  # micro-batches of 4
    assert [entry["rows"] for entry in added] == [*[16] * 12, *[8] * 4] * 2 and {entry["part"] for entry in added} == {
        4
    }
    loop = {entry["pid"] for entry in ended + seen("extend_rollouts") + seen("allocate_rollouts")}
    update = {entry["pid"] for entry in prepared + adapted + added}
    assert len(loop) == 1 and len(update) == 1 and not loop & update


def check_asked(seen: Any) -> None:
    """The responses that the probe asked for itself, one time in each step."""
    asked = seen("engine.generate")
    assert len(asked) == 2 and [set(entry["version"]) for entry in asked] == [{0}, {1}]
    for entry in asked:
        assert entry["keys"] == entry["wanted"] and entry["groups"] == [0, 0, 1] and set(entry["kind"]) == {0}
        assert all(0 < length <= most for length, most in zip(entry["lengths"], [4, 5, 2 + 7], strict=True))
        assert entry["prefix"] == [0, 0, 2] and entry["beginning"] == [30, 31]  # continued from the given tokens
        assert all(math.isfinite(score) for score in entry["scores"]) and entry["unscored"]
        assert entry["difference"] < 0.1  # drawn with the policy's present weights
        assert entry["greedy"][0] == entry["greedy"][1]


def check_given(seen: Any) -> None:
    """The responses that the probe brought, one of them longer than a response may be."""
    tokenizer, given = make_tokenizer(), seen("engine.given")
    assert len(given) == 2
    for entry in given:
        label, sevens = (tokenizer(text, add_special_tokens=False).input_ids for text in (entry["label"], "7" * 16))
        assert entry["keys"] == entry["wanted"] and entry["drawn"] == 0 and entry["lengths"] == [len(label) + 1, 16]
        assert entry["responses"][0][: len(label) + 1] == [*label, tokenizer.eos_token_id]
        assert entry["responses"][1] == sevens
        digits = len(label) / len(f"{entry['label']}<|end|>")  # as the reward function sees the response
        assert entry["components"] == [pytest.approx([1.0, digits]), [0.0, 1.0]]
        assert entry["scores"] == pytest.approx([0.5 * (1 + digits), 0.5])
        assert entry["unscored"] and entry["tokens"] == [2, 2]


def check_gradients(seen: Any, rates: list[float]) -> None:
    """What the engine said of the gradients of two advantages."""
    asked = seen("engine.gradient_products")
    assert len(asked) == 2 and asked[1]["learning_rate"] == pytest.approx(rates[0])  # logged after the last step
    assert asked[0]["learning_rate"] == pytest.approx(1e-4)
    for entry in asked:
        (first, mixed), (other, second) = entry["products"]
        assert mixed == other and mixed**2 < first * second
        assert [first, second] == pytest.approx([norm**2 for norm in entry["norms"]])
        assert 0 < entry["part"] < first and entry["length"] == pytest.approx(entry["norms"][0])


def check_forward(seen: Any) -> None:
    """Which passes the probe's `forward` served."""
    passes, update = seen("forward"), {entry["pid"] for entry in seen("prepare_mini_batch")}
    served = {(entry["pid"] in update, entry["model"], entry["backward"], entry["training"]) for entry in passes}
    assert served == {
        (True, "DeepSpeedEngine", False, False),  # old log-probs, and those that the engine gives
        (True, "DeepSpeedEngine", True, True),  # the update
        (True, "Qwen2ForCausalLM", True, True),  # products of gradients
        (False, "DeepSpeedEngine", False, False),  # the reference
    }
    assert len({entry["pid"] for entry in passes}) == 2


def test_a_stack_that_cannot_run_ends_before_ray_starts(tmp_path: Path) -> None:
    log = OpenRLHFRun(tmp_path / "run", "spo").fails()
    assert "error: " in log and "set --rollout.n_samples_per_prompt 1" in log
    assert "Traceback" not in log and "Started a local Ray instance" not in log


def test_an_empty_stack_is_plain_openrlhf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SITE", REPRODUCIBLE)
    runs, loaded = [], []
    for name, stack in {"plain": None, "empty": "[]"}.items():
        seen = tmp_path / f"seen-{name}"
        seen.mkdir()
        monkeypatch.setenv("RLPLUGINS_OPENRLHF_SEEN", str(seen))
        runs.append(OpenRLHFRun(tmp_path / name, stack, SCRIPTED, steps=5).wait())
        loaded.append(imports(seen))
        assert len(loaded[-1]) >= PROCESSES
    plain, empty = (run.measured for run in runs)
    started = ours(loaded[1].pop(runs[1].process.pid))
    others = [ours(names) for run in loaded for names in run.values()]
    assert not any(others)  # no other process has loaded anything to patch with
    adapter = {name for name in started if name.startswith("rlplugins_openrlhf.")}
    assert adapter <= {f"rlplugins_openrlhf.{name}" for name in MODULES}
    assert len(plain) == 5 and all(math.isfinite(step["train/policy_loss"]) for step in plain)
    assert len({step["train/rollout/reward_mean"] for step in plain}) > 1
    assert empty == plain
