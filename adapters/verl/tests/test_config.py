"""The adapter reads verl's own configuration: its keys are there, and the examples compose."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlplugins.bindings import package
from rlplugins.stack import StackConfig
from rlplugins_verl import settings
from rlplugins_verl.cpu import launch

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = ROOT / "examples" / "verl"


def composed(overrides: Sequence[str]) -> Any:
    """verl's configuration as its command line makes it."""
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_dir(str(package("verl") / "trainer" / "config"), version_base=None):
        return hydra.compose("ppo_trainer", list(overrides))


def test_every_setting_that_the_adapter_reads_exists() -> None:
    text = Path(settings.__file__).read_text()
    paths = set(re.findall(r'at\(\s*config, "([a-z0-9_.]+)"', text))
    paths |= {
        path.replace("{actor}", "actor_rollout_ref.actor") for path in re.findall(r'f"(\{actor\}\.[a-z_.]+)"', text)
    }
    paths -= {"rlplugins"}
    assert len(paths) > 20
    config = composed(["actor_rollout_ref.rollout.name=vllm"])
    for path in paths:
        node = config
        for name in path.split("."):
            assert name in node, path
            node = node[name]


def test_the_defaults_of_verl_mean_builtins() -> None:
    found, missing = settings.builtins(composed(["algorithm.adv_estimator=grpo"]))
    assert not missing
    assert found["policy_loss"] == {"ppo_clip": {"dual_clip": 3.0}}


def test_the_flag_of_the_readme_is_read() -> None:
    flags = ["trainer.v1.trainer_mode=rlplugins_sync", "+rlplugins.plugins=[knapsack,{bapo:{target:0.5}}]"]
    config = composed([*flags, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8"])
    wanted = settings.read_stack(config)
    assert wanted == StackConfig(plugins=["knapsack", {"bapo": {"target": 0.5}}])
    stack = settings.build_stack(config, wanted, "sync")
    assert settings.owns_loss(stack) and not settings.owns_credit(stack)


def test_the_example_for_one_node_composes_and_its_stack_is_legal(tmp_path: Path) -> None:
    recorder = tmp_path / "python"
    recorder.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    recorder.chmod(0o755)
    done = subprocess.run(
        ["bash", str(EXAMPLES / "one_node.sh"), "model", "train.parquet", "validation.parquet", "out", "data.seed=1"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = done.stdout.split("\n")[:-1]
    assert words[:2] == ["-m", "verl.trainer.main_ppo"] and words[-1] == "data.seed=1"
    config = composed(words[2:])
    assert config.trainer.v1.trainer_mode == "rlplugins_sync"
    stack = settings.build_stack(config, settings.read_stack(config), "sync")
    assert [plugin.name for plugin in stack.plugins] == ["knapsack", "bapo", "d3s"]


def test_the_settings_of_the_tiny_run_compose(tmp_path: Path) -> None:
    config = composed(launch.command(tmp_path, ["+rlplugins.plugins=[bnpo]"])[3:])
    assert settings.group_size(config) == 4 and settings.ranks(config) == 1
    assert not settings.has_critic(config) and not settings.has_reference(config)
