"""The doctor finds every bound point in the OpenRLHF that is installed here, and says which one has changed."""

import shutil
from pathlib import Path

import pytest

from rlplugins import bindings
from rlplugins_openrlhf import doctor
from rlplugins_openrlhf.points import POINTS


def test_the_installed_version_has_every_point() -> None:
    text, well = doctor.report()
    assert well, text
    assert all(f"{point.file}:{point.name}" in text for point in POINTS)
    assert {point.kind for point in POINTS} == {"patched", "called", "official"}


def test_a_changed_point_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "openrlhf"
    shutil.copytree(bindings.package("openrlhf"), root, ignore=shutil.ignore_patterns("__pycache__"))
    trainer = root / "trainer" / "ppo_trainer.py"
    text = trainer.read_text()
    trainer.write_text(
        text.replace("def train_step(self, rollout_samples, global_step", "def train_step(self, rollouts, step")
    )
    actor = root / "trainer" / "ray" / "ppo_actor.py"
    actor.write_text(
        actor.read_text().replace("clip_ratio, ppo_kl, vllm_kl, is_filter_ratio = self", "clip_ratio, ppo_kl = self")
    )
    monkeypatch.setattr(doctor.bindings, "package", lambda name: root)
    text, well = doctor.report()
    wrong = [line for line in text.splitlines() if "FAIL" in line]
    assert not well and len(wrong) == 2
    assert "BasePPOTrainer.train_step" in wrong[0] and "is (rollouts, step)" in wrong[0]
    assert "loss" in wrong[1] and "[3]" in wrong[1]
