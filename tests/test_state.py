"""What plugins remember: who may change it, how it is saved, and what a file that does not fit gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlplugins
from rlplugins import Plugin, Prompts, Rollouts, Run, Stack, hookimpl, state
from rlplugins.errors import StateError
from rlplugins.table import PromptTable
from rlplugins.testing import make_pool, make_rollouts, start

NESTED = {
    "tensor": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(2.5), "half": torch.ones(2, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]), "empty": torch.zeros(0, 3), "array": np.arange(4, dtype=np.int32).reshape(2, 2),
    "array0": np.array(3.5), "number": np.float64(1.25), "plain": {"a": [1, 2.5, None, "x", True], "b": {"c": []}},
    "tuple": (1, torch.ones(2), ("y",)), "list": [torch.zeros(1), {"t": torch.ones(1)}], "inf": float("inf"),
    "clash": {"a.b": torch.tensor(1.0), "a": {"b": torch.tensor(2.0)}}, "text": "ünïcode",
}  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Remembers(Plugin):
    name = "remembers"
    where: str = "nowhere"

    def init_state(self, run: Run) -> dict[str, Any]:
        return {"count": 0, "mean": torch.zeros(2)}

    def bump(self, hook: str) -> None:
        if self.where == hook:
            self.state.count += 1

    @hookimpl
    def choose_prompts(self, prompts: Prompts, count: int) -> Tensor:
        self.bump("choose_prompts")
        return torch.arange(count)

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts, budget: int) -> Tensor:
        self.bump("allocate_rollouts")
        return torch.ones(len(prompts), dtype=torch.int64)

    @hookimpl
    def prompt_weights(self, prompts: Prompts) -> Tensor:
        self.bump("prompt_weights")
        return torch.ones(len(prompts))

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts) -> Rollouts:
        self.bump("extend_rollouts")
        return rollouts

    @hookimpl
    def filter_rollouts(self, scores: Tensor) -> Tensor:
        self.bump("filter_rollouts")
        return torch.ones_like(scores)

    @hookimpl
    def prepare_step(self) -> None:
        self.bump("prepare_step")

    @hookimpl
    def combine_rewards(self, scores: Tensor) -> Tensor:
        self.bump("combine_rewards")
        return scores

    @hookimpl
    def baseline(self, rewards: Tensor) -> Tensor:
        self.bump("baseline")
        return rewards * 0

    @hookimpl
    def select_samples(self, rewards: Tensor) -> Tensor:
        self.bump("select_samples")
        return torch.ones_like(rewards)

    @hookimpl
    def prepare_mini_batch(self) -> None:
        self.bump("prepare_mini_batch")

    @hookimpl
    def policy_loss(self, log_probs: Tensor) -> Tensor:
        self.bump("policy_loss")
        return log_probs

    @hookimpl
    def on_step_end(self) -> None:
        self.bump("on_step_end")

    @hookimpl
    def on_validation(self) -> None:
        self.bump("on_validation")


def run_a_step(stack: Stack) -> None:
    pool = make_pool(4)
    chosen = pool.select(stack.choose_prompts(pool, 2))
    stack.allocate_rollouts(chosen, 2)
    rollouts = stack.filter_rollouts(stack.extend_rollouts(make_rollouts([1.0, 0.0], pool=pool), None))
    credit = stack.credit(rollouts)
    stack.mini_batch(stack.update_columns(rollouts, credit)).loss(-0.5 * rollouts.mask.float())
    stack.end_step(rollouts, credit)
    stack.validated({})


OFF = ["remembers.prompt_weights", "remembers.baseline"]


@pytest.mark.parametrize("where", ["choose_prompts", "extend_rollouts", "on_step_end", "on_validation"])
def test_these_hooks_may_change_the_state(where: str) -> None:
    stack = start([Remembers(where=where)], off=OFF)
    run_a_step(stack)
    assert stack.plugins[0].state.count == 1


@pytest.mark.parametrize(
    "where",
    ["allocate_rollouts", "filter_rollouts", "prepare_step", "combine_rewards", "select_samples", "prepare_mini_batch",
     "policy_loss"],
)  # fmt: skip
def test_no_other_hook_may_change_it(where: str) -> None:
    with pytest.raises(
        StateError, match="state 'count' was set outside of choose_prompts, extend_rollouts and the life"
    ):
        run_a_step(start([Remembers(where=where)], off=OFF))


def test_state_has_the_names_that_init_state_gave() -> None:
    class Wrong(Plugin):
        name = "wrong"
        read: bool = False

        def init_state(self, run: Run) -> dict[str, Any]:
            return {"x": 1}

        @hookimpl
        def on_step_end(self) -> None:
            if self.read:
                self.state.y  # noqa: B018
            self.state.y = 1

    rollouts = make_rollouts([1.0])
    with pytest.raises(StateError, match="'y' is not among what init_state gave: x"):
        start([Wrong()]).end_step(rollouts, None)
    with pytest.raises(AttributeError, match="no state 'y'; init_state gives: x"):
        start([Wrong(read=True)]).end_step(rollouts, None)


def test_a_failed_hook_leaves_the_state_closed() -> None:
    class Fails(Plugin):
        name = "fails"

        def init_state(self, run: Run) -> dict[str, Any]:
            return {"x": 1}

        @hookimpl
        def on_step_end(self) -> None:
            raise ZeroDivisionError

    stack = start([Fails()])
    with pytest.raises(ZeroDivisionError):
        stack.end_step(make_rollouts([1.0]), None)
    with pytest.raises(StateError):
        stack.plugins[0].state.x = 2


# saving


def test_a_nested_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state.save(tmp_path / "s", {"p": NESTED, "q": {}}, {"step": 3}, PromptTable())
    states, notes, table = state.load(tmp_path / "s")
    wanted = {**NESTED, "number": 1.25}
    assert same(states["p"], wanted) and states["q"] == {} and notes["step"] == 3 and len(table) == 0


def test_saving_copies(tmp_path: Path) -> None:
    values = {"x": torch.zeros(2)}
    state.save(tmp_path / "s", {"p": values}, {}, PromptTable())
    values["x"] += 1
    assert state.load(tmp_path / "s")[0]["p"]["x"].tolist() == [0, 0]


@pytest.mark.parametrize("value", [object(), {1, 2}, {1: 2}, b"x", np.array(["x"]), lambda: 0])
def test_what_cannot_be_saved_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(StateError, match=r"state p\.deep\.1"):
        state.save(tmp_path / "s", {"p": {"deep": [0, value]}}, {}, PromptTable())
    assert not (tmp_path / "s").exists()


class Resumes(Plugin):
    name = "resumes"
    fields: tuple[str, ...] = ("x",)

    def init_state(self, run: Run) -> dict[str, Any]:
        return {name: torch.zeros(1) for name in self.fields}

    @hookimpl
    def on_step_end(self, step: rlplugins.Step) -> None:
        self.state.x = self.state.x * 2 + torch.rand(1, generator=step.generator(self))


def test_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    rollouts = make_rollouts([1.0])

    def steps(stack: Stack, numbers: range) -> None:
        for number in numbers:
            stack.begin_step(number, 10, 3)
            stack.end_step(rollouts, None)

    whole = start([Resumes(), "grpo"])
    steps(whole, range(6))
    first = start([Resumes(), "grpo"])
    steps(first, range(3))
    first.save(tmp_path / "s", 3)
    second = start([Resumes(), "grpo"])
    assert second.load(tmp_path / "s") == 3
    steps(second, range(3, 6))
    assert torch.equal(second.plugins[0].state.x, whole.plugins[0].state.x)


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    stack = start([Resumes()])
    for step in (1, 2):
        stack.save(tmp_path / "s", step)
    assert start([Resumes()]).load(tmp_path / "s") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


KILLED = """
import os, signal, sys
from pathlib import Path
from rlplugins import state
from rlplugins.table import PromptTable

folder, moment = Path(sys.argv[1]), sys.argv[2]
state.save(folder, {"p": {"x": 1}}, {"step": 1}, PromptTable())
if moment == "table":
    PromptTable.save = lambda self, path: os.kill(os.getpid(), signal.SIGKILL)
else:
    rename, calls = os.rename, [0]
    def killing(*paths):
        calls[0] += 1
        if calls[0] == int(moment):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)
    os.rename = killing
state.save(folder, {"p": {"x": 2}}, {"step": 2}, PromptTable())
"""


@pytest.mark.parametrize("moment", ["table", "1", "2"])
def test_a_kill_while_saving_leaves_the_old_state(tmp_path: Path, moment: str) -> None:
    folder = tmp_path / "s"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    states, notes, _ = state.load(folder)
    assert states == {"p": {"x": 1}} and notes["step"] == 1
    state.save(folder, {"p": {"x": 3}}, {"step": 3}, PromptTable())  # and the next save works
    assert state.load(folder)[0] == {"p": {"x": 3}}


# what does not fit


def saved(tmp_path: Path, plugins: list[Any]) -> Path:
    start(plugins).save(tmp_path / "s", 1)
    return tmp_path / "s"


def test_the_state_of_another_stack_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = saved(tmp_path, [Resumes(), "grpo"])
    with pytest.raises(StateError, match=r"has the state of grpo, which this stack lacks.*delete that folder"):
        start([Resumes()]).load(folder)
    with pytest.raises(StateError, match=r"this stack has reinforce_plus_plus, which it lacks"):
        start([Resumes(), "grpo", "reinforce_plus_plus"], owners={"compute_advantages": "difference"}).load(folder)


def test_another_version_of_a_plugins_state_is_refused(tmp_path: Path) -> None:
    class Newer(Resumes):
        name = "resumes"
        state_version = 2

    folder = saved(tmp_path, [Resumes()])
    with pytest.raises(
        StateError, match=r"state of resumes has version 1, this plugin reads 2.*Use the stack that wrote"
    ):
        start([Newer()]).load(folder)


def test_other_names_in_a_plugins_state_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, [Resumes()])
    with pytest.raises(StateError, match=r"resumes has \['x'\], this version has \['x', 'y'\]"):
        start([Resumes(fields=("x", "y"))]).load(folder)


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, [Resumes()])
    document = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(StateError, match=r"has format 99, this version of rlplugins reads 2.*delete that folder"):
        start([Resumes()]).load(folder)


@pytest.mark.parametrize("file", ["state.json", "state.safetensors", "table.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_a_damaged_state_is_an_error_that_says_what_to_do(tmp_path: Path, file: str, damage: str) -> None:
    folder = saved(tmp_path, [Resumes()])
    path = folder / file
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        path.write_text("[1]")
    with pytest.raises(StateError, match=r"(holds no plugin state|is damaged).*delete that folder"):
        start([Resumes()]).load(folder)


def test_a_state_of_another_save_is_damaged(tmp_path: Path) -> None:
    folder = saved(tmp_path, [Resumes()])
    state.save(tmp_path / "other", {}, {}, PromptTable())
    os.replace(tmp_path / "other" / "state.safetensors", folder / "state.safetensors")
    with pytest.raises(StateError, match="is damaged"):
        start([Resumes()]).load(folder)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no plugin state"):
        start([Resumes()]).load(tmp_path / "nothing")


def test_a_failed_load_leaves_the_running_state(tmp_path: Path) -> None:
    folder = saved(tmp_path, [Resumes()])
    stack = start([Resumes(fields=("x", "y"))])
    before = stack.plugins[0].state
    with pytest.raises(StateError):
        stack.load(folder)
    assert stack.plugins[0].state is before


def test_nothing_is_pickled_anywhere() -> None:
    root = Path(rlplugins.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text()
        for word in (
            "import pickle",
            "from pickle",
            "cloudpickle",
            "allow_pickle=True",
            "torch.save(",
            "shelve",
            "marshal",
        ):
            assert word not in text, f"{path.name} uses {word}"
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.partition(")")[0], path.name
