"""A run that was killed and resumed is the run that was not killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rlplugins.errors import ConfigurationError, StateError
from rlplugins.report.folder import is_finished
from rlplugins.stack import StackConfig
from rlplugins_local import train
from rlplugins_local.config import TrainConfig

KILLS_ITSELF = """
import os, signal, random

left = int(os.environ.get("CALLS_TO_LIVE", "1000"))

def score(prompts, responses, columns):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return [response.count("7") / 8 + 0.01 * random.random() for response in responses]
"""

SCRIPT = """
import json, sys
from rlplugins.stack import StackConfig
from rlplugins_local import train
from rlplugins_local.config import TrainConfig

config, stack = json.loads(sys.argv[1])
train(TrainConfig.model_validate(config), StackConfig.model_validate(stack), progress=False)
"""


def run_process(config: TrainConfig, stack: StackConfig, calls_to_live: int | None = None) -> int:
    arguments = json.dumps([config.model_dump(mode="json"), stack.model_dump(mode="json")])
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    if calls_to_live is not None:
        environment["CALLS_TO_LIVE"] = str(calls_to_live)
    return subprocess.run([sys.executable, "-c", SCRIPT, arguments], env=environment, timeout=120).returncode


def metrics_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.fixture
def killing(files: Path) -> Path:
    (files / "killing.py").write_text(KILLS_ITSELF)
    return files


SETTINGS = {"steps": 6, "checkpoint_every": 2, "mini_batches": 2, "epochs": 2, "warmup_steps": 10, "threads": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugins", "settings"),
    [([], {"kl": "k3", "advantage": "gae"}), (["spo", "bapo"], {"group_size": None})],
    ids=["empty", "spo+bapo"],
)
def test_a_killed_run_continues_to_the_last_digit(config, killing, plugins, settings):
    settings = SETTINGS | {"reward": f"{killing / 'killing.py'}:score"} | settings
    stack = StackConfig(plugins=plugins)
    whole = config(**settings, output=killing / "whole")
    killed = config(**settings, output=killing / "killed")
    train(whole, stack, progress=False)
    assert run_process(killed, stack, calls_to_live=5) == -signal.SIGKILL
    assert len(metrics_of(killed.output)) == 5
    assert not is_finished(killed.output)
    assert sorted(path.name for path in killed.output.glob("checkpoint*")) == ["checkpoint-2", "checkpoint-4"]
    assert run_process(killed.model_copy(update={"resume": True}), stack) == 0
    assert metrics_of(killed.output) == metrics_of(whole.output)
    assert len(metrics_of(whole.output)) == 6
    assert is_finished(killed.output)
    ours, theirs = (folder / "checkpoint-6" / "model.safetensors" for folder in (whole.output, killed.output))
    assert ours.read_bytes() == theirs.read_bytes()


EMPTY = StackConfig()


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(config):
    first = config(steps=1, output=config().output / "a")
    train(first, EMPTY, progress=False)
    (config().output / "b").mkdir(parents=True)
    (config().output / "b" / "metrics.jsonl").write_text('{"step": 1, "reward": 5}\n{"step": 2, "rew')
    again = config(steps=1, output=config().output / "b", resume=True)
    train(again, EMPTY, progress=False)
    assert metrics_of(again.output) == metrics_of(first.output)


def test_resuming_a_finished_run_gives_its_result(config):
    done = train(config(), EMPTY, progress=False)
    assert train(config(resume=True), EMPTY, progress=False) == done
    longer = train(config(resume=True, steps=3), EMPTY, progress=False)
    assert longer["step"] == 3


def test_a_folder_with_a_run_is_not_overwritten(config):
    train(config(steps=1), EMPTY, progress=False)
    before = metrics_of(config().output)
    with pytest.raises(ConfigurationError, match="--resume continues it"):
        train(config(steps=1), EMPTY, progress=False)
    assert metrics_of(config().output) == before


def test_other_settings_are_refused_on_resuming(config):
    train(config(steps=1), EMPTY, progress=False)
    with pytest.raises(ConfigurationError, match=r"learning_rate: 0.001 -> 0.5"):
        train(config(steps=2, learning_rate=0.5, resume=True), EMPTY, progress=False)


def test_another_stack_is_refused_on_resuming(config):
    train(config(steps=1), StackConfig(plugins=["bnpo"]), progress=False)
    with pytest.raises(StateError, match="rloo"):
        train(config(steps=2, resume=True), StackConfig(plugins=["rloo"]), progress=False)
    with pytest.raises(StateError, match="other options"):
        train(config(steps=2, resume=True), StackConfig(plugins=[{"bnpo": {"w_max": 5.0}}]), progress=False)


def test_a_damaged_checkpoint_says_so(config):
    train(config(steps=1), EMPTY, progress=False)
    (config().output / "checkpoint-1" / "trainer.json").write_text("{")
    with pytest.raises(StateError, match="damaged"):
        train(config(steps=2, resume=True), EMPTY, progress=False)


def test_nothing_in_a_checkpoint_needs_pickle(config):
    train(config(steps=1), EMPTY, progress=False)
    names = {path.suffix for path in (config().output / "checkpoint-1").rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".jinja"}


def test_only_the_last_two_checkpoints_are_kept(config):
    train(config(steps=5, checkpoint_every=1), EMPTY, progress=False)
    assert sorted(path.name for path in config().output.glob("checkpoint*")) == ["checkpoint-4", "checkpoint-5"]


def test_a_checkpoint_is_a_model_folder(config):
    train(config(steps=1), EMPTY, progress=False)
    checkpoint = config().output / "checkpoint-1"
    metrics = train(config(steps=1, model=checkpoint, output=config().output / "more"), EMPTY, progress=False)
    assert metrics["step"] == 1


def test_the_settings_of_the_whole_run_are_written(config):
    train(config(steps=1), StackConfig(plugins=["bnpo"]), progress=False)
    written = yaml.safe_load((config().output / "config.yaml").read_text())
    stack = StackConfig.model_validate(written.pop("stack"))
    assert stack.plugins == ["bnpo"]
    place = {"output": config().output, "resume": False}
    assert TrainConfig.model_validate(written | place) == config(steps=1)


def test_a_configuration_that_a_study_wrote_is_left_as_it_is(config):
    settings = config(steps=1).model_dump(mode="json", exclude_defaults=True, exclude={"output", "resume"})
    folder = config().output
    folder.mkdir()
    text = yaml.safe_dump(settings | {"stack": {"plugins": ["bnpo"]}})
    (folder / "config.yaml").write_text(text)
    train(config(steps=1), StackConfig(plugins=["bnpo"]), progress=False)
    assert (folder / "config.yaml").read_text() == text


def test_the_random_numbers_of_python_and_torch_are_restored(config):
    train(config(steps=1), EMPTY, progress=False)
    expected = torch.rand(3)
    torch.manual_seed(99)
    train(config(steps=1, resume=True), EMPTY, progress=False)
    assert torch.equal(torch.rand(3), expected)
