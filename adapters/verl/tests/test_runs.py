"""verl itself: Ray, FSDP2 on gloo, agent loops, rewards, validation, checkpoints. Few starts, since one takes minutes."""

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from verl_runs import VerlRun, end_all, install_probe, with_stack

TIMES = ("timing_s/", "timing_per_token_ms/", "perf/", "actor/mfu", "actor/perf", "critic/mfu")
STACK = ("knapsack", "bapo", "d3s")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    end_all()


def measured(run: VerlRun) -> list[dict[str, Any]]:
    """All metrics but those that say how long something took or how much memory there was."""
    return [
        {name: value for name, value in step.items() if not name.startswith(TIMES) and "/perf/" not in name}
        for step in run.metrics
    ]


def weights(run: VerlRun, step: int) -> dict[str, str]:
    """Hashes of the tensors of the actor in a checkpoint; the rest of the file names its processes."""
    with zipfile.ZipFile(
        run.folder / "checkpoints" / f"global_step_{step}" / "actor" / "model_world_size_1_rank_0.pt"
    ) as file:
        found = {name.partition("/")[2]: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}
    tensors = {name: digest for name, digest in found.items() if name.startswith("data/")}
    assert len(tensors) > 10
    return tensors


def plugin_state(run: VerlRun, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of the plugins, and the prompt table, in a checkpoint."""
    folder = run.state(step)
    return json.loads((folder / "state.json").read_text()), load_file(folder / "table.safetensors")


def test_an_empty_stack_is_plain_verl_bit_for_bit(tmp_path: Path) -> None:
    saving = ["trainer.save_freq=5"]
    plain = VerlRun(tmp_path / "plain", saving, steps=5).wait()
    empty = VerlRun(tmp_path / "empty", [*saving, *with_stack()], steps=5).wait()
    mine, theirs = measured(empty), measured(plain)
    assert len(theirs) == 5 and len(theirs[0]) > 30
    assert all(math.isfinite(step["actor/pg_loss"]) for step in theirs)
    assert len({step["critic/score/mean"] for step in theirs}) == 5  # it learns from responses that differ
    assert mine == theirs
    assert weights(empty, 5) == weights(plain, 5)
    assert not empty.state(5).exists()


def test_every_hook_is_called_where_it_belongs(tmp_path: Path) -> None:
    probe = install_probe(tmp_path / "probe")
    notes = tmp_path / "notes.jsonl"
    demonstrations = Path(__file__).with_name("demonstrations.jsonl")
    overrides = [
        "trainer.v1.trainer_mode=rlplugins_sync",
        f"+rlplugins.plugins=[{{probe:{{log_file:{notes},demonstrations:{demonstrations}}}}}]",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=9",  # in which verl's own order would tear prompts
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=9",
        "trainer.test_freq=1",
        "trainer.val_before_train=True",
        "trainer.save_freq=2",
    ]
    run = VerlRun(tmp_path / "run", overrides, steps=2, probe=probe).wait()
    said = [json.loads(line) for line in notes.read_text().splitlines()]
    seen: Callable[[str], list[dict[str, Any]]] = lambda hook: [entry for entry in said if entry["hook"] == hook]  # noqa: E731

    allocated, extended, ended = seen("allocate_rollouts"), seen("extend_rollouts"), seen("on_step_end")
    assert [len(entry["keys"]) for entry in allocated] == [8, 8] and allocated[0]["budget"] == 32
    both = set(allocated[0]["keys"]) | set(allocated[1]["keys"])
    assert len(both) <= 16  # prompt_weights leaves half of the pool
    drawn_twice = set(allocated[0]["keys"]) & set(allocated[1]["keys"])
    known = dict(zip(allocated[1]["keys"], allocated[1]["seen"], strict=True))
    assert all(known[key] == (1 if key in drawn_twice else 0) for key in known)  # keys are stable, state is kept

    first = extended[0]
    sizes = [first["groups"].count(group) for group in dict.fromkeys(first["groups"])]
    assert sizes == [2, 6] * 4  # allocate_rollouts, and rows in the order of the prompts
    assert first["drawn"] == [draw for size in sizes for draw in range(size)]  # ... and of the draws
    order = list(dict.fromkeys(first["keys"]))
    assert order == allocated[0]["keys"]
    short = [length for length, draw in zip(first["lengths"], first["drawn"], strict=True) if draw == 0]
    assert max(short) <= 3  # sampling_params
    hinted = [length for length, draw in zip(first["hinted"], first["drawn"], strict=True) if draw == 0]
    plain = [length for length, draw in zip(first["hinted"], first["drawn"], strict=True) if draw != 0]
    assert min(hinted) > max(plain)  # rewrite_prompts
    prefixed = [size for size, draw in zip(first["prefix"], first["drawn"], strict=True) if draw == 1]
    assert prefixed == [2] * 8 and sum(first["prefix"]) == 28
    starts = [tokens for tokens, draw in zip(first["start"], first["drawn"], strict=True) if draw == 1]
    assert len({tuple(tokens[:2]) for tokens in starts}) == 1  # all of them begin with the same forced text
    starts = [tokens for tokens, draw in zip(first["start"], first["drawn"], strict=True) if draw == 3]
    assert starts == [[20, 21, 22]] * 4  # and these with the same forced tokens
    assert [draw == 2 for draw in first["drawn"]] == first["steered"]  # process_logits, with each request's numbers
    assert first["names"] == ["acc", "digits"] and min(first["difficulty"]) >= 0
    assert [set(entry["version"]) for entry in extended] == [{0}, {1}]

    assert all(entry["difference"] < 1e-4 for entry in seen("engine.log_probs"))  # the engine and the actor agree
    for entry in seen("engine.given"):  # a right answer to a prompt of the pool, and one to a prompt that nobody has
        assert entry["scores"] == [[1.0]] and entry["tokens"] == [len(entry["answer"]) + 1]
        assert entry["lengths"] == [16] and entry["rows"] == [-1] and entry["log_probs"] == 0
    credit = seen("shape_advantages")[0]
    assert credit["rows"] == 32 and credit["kind"].count(1) == 2  # two expert rows came, two rows went
    assert credit["groups"].count(-1) == 2 and credit["entropy"] > 0
    asked = seen("engine.gradient_products")
    assert [entry["rate"] for entry in asked] == [1e-3] * 2
    assert all(entry["bend"] < 1e-6 and entry["norms"] < 1e-6 and entry["longest"] > 1e-3 for entry in asked)
    assert all(0 < entry["part"] < 1 for entry in asked)
    check_forward(seen("forward"))
    distances = [entry["reference"] for entry in seen("shape_advantages")]
    assert (
        max(distances) < 1e-4 < min(entry["moved"] for entry in ended)
    )  # reference_policy: `current` in the second step
    assert [entry["rows"] for entry in ended] == [34, 34] and [entry["missing"] for entry in ended] == [2, 2]
    assert ended[1]["loss"] < ended[0]["loss"]  # the plugin's own model learns
    assert [entry["step"] for entry in ended] == [0, 1] and [entry["steps"] for entry in ended] == [1, 2]
    assert [entry["validations"] for entry in seen("on_validation")] == [1, 2]  # not the one before the first step

    metrics = run.metrics[-1]
    assert metrics["rlplugins/probe/rows"] == 34 and metrics["rlplugins/probe/expert_rows"] > 0
    assert metrics["rollouts/kept"] == pytest.approx(32 / 34)
    state, _ = plugin_state(run, 2)
    assert state["states"]["probe"].keys() == {"steps", "validations", "V"}
    assert [state["states"]["probe"][name] for name in ("steps", "validations")] == [2, 2]  # saved after the life hooks


def check_forward(calls: list[dict[str, Any]]) -> None:
    """What `probe` saw of its own forward: every pass of two steps, with the rows of a prompt together."""
    assert {call["model"] for call in calls} == {"FSDPQwen2ForCausalLM"}
    of_prompt = {backward: [size for call in calls if call["backward"] == backward for size in call["largest"]]
                 for backward in (False, True)}  # fmt: skip
    # two groups have 5 plain rows left and two have 4: old and reference log-probs of two steps, and twice three gradients
    # and the update
    assert [of_prompt[False].count(size) for size in (5, 4)] == [2 * 2 * 2] * 2
    assert [of_prompt[True].count(size) for size in (5, 4)] == [2 * 7 * 2] * 2
    assert max(call["rows"] for call in calls if call["backward"]) <= 16
    assert max(call["rows"] for call in calls if not call["backward"]) <= 9


def test_a_killed_run_with_vllm_goes_on_with_the_state_of_its_checkpoint(tmp_path: Path) -> None:
    probe, notes = install_probe(tmp_path / "probe"), tmp_path / "notes.jsonl"
    overrides = [*with_stack(*STACK, f"{{steer:{{log_file:{notes}}}}}"), "trainer.save_freq=1", "trainer.test_freq=3"]
    run = VerlRun(tmp_path / "run", overrides, engine="vllm", steps=3, probe=probe)
    run.wait_for(lambda: run.saved() >= 2)
    run.kill()
    at = run.saved()
    state, table = plugin_state(run, at)
    assert state["step"] == at and state["states"]["d3s"]["progress_step"] == at
    assert int(table["column/visits"].sum()) == 8 * at
    for metrics in run.metrics:
        assert math.isfinite(metrics["actor/pg_loss"]) and "rlplugins/knapsack/known" in metrics

    resumed = VerlRun(tmp_path / "run", overrides, engine="vllm", steps=3, probe=probe).wait()
    assert [entry["step"] for entry in resumed.metrics] == list(range(at + 1, 4))
    assert any(name.startswith("val-core/") for name in resumed.metrics[-1])
    state, table = plugin_state(resumed, 3)
    assert state["states"]["d3s"]["progress_step"] == 3
    assert int(table["column/visits"].sum()) == 24  # nothing lost, nothing twice
    check_vllm([json.loads(line) for line in notes.read_text().splitlines()])


def check_vllm(notes: list[dict[str, Any]]) -> None:
    """What `steer` saw: its rule of logits in vLLM, and the responses that it asked for."""
    hooks = ("extend_rollouts", "engine.generate", "engine.given")
    drawn, asked, given = ([note for note in notes if note["hook"] == hook] for hook in hooks)
    assert len(drawn) == len(asked) == len(given) >= 3
    for note in given:
        assert note["start"][0] == [20, 21] and note["start"][2][0] == 5 and note["prefix"] == [2, 0, 1]
        assert note["lengths"][0] <= 6 and note["lengths"][2] <= 8 and min(note["lengths"]) >= 1
        assert note["given"] == [2, 1, 16] and note["same"] and note["log_probs"] == 0
        assert (
            note["scores"][0] >= 0.5 and note["scores"][1] == 0 and note["scores"][2] >= 0.5
        )  # digits are half a point
    for note in drawn:
        assert note["forced"] == [draw == 1 for draw in draws(note["groups"])]
        assert note["difference"] < 1e-2  # the engine has the trained weights
    for note in asked:
        assert note["keys"] == note["wanted"] and note["forced"] == [True, False, True]
        assert note["lengths"][0] == 4 and note["lengths"][2] == 7 and note["lengths"][1] <= 4
        assert all(math.isfinite(score) for score in note["scores"]) and set(note["kinds"]) == {0}
        assert note["greedy"][0] == note["greedy"][1] and note["unscored"]


def draws(groups: list[int]) -> list[int]:
    """The number of each row among those of its group."""
    return [groups[:row].count(group) for row, group in enumerate(groups)]
