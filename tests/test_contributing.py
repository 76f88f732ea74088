"""The plugin of CONTRIBUTING.md, built from its text alone, is installed, found, explained and passes its own test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The example's folder, and an environment in which it is installed."""
    source, target = tmp_path_factory.mktemp("median"), tmp_path_factory.mktemp("site")
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert [name for name, _ in files] == ["pyproject.toml", "rlplugins_median.py", "test_median.py"]
    for name, body in files:
        (source / name).write_text(body)
    command = [ROOT / "tools" / "uv", "pip", "install", "--quiet", "--no-deps", "--target", target, source]
    subprocess.run([*command, "--python", sys.executable], check=True)
    return source, os.environ | {"PYTHONPATH": str(target)}


def run(*command: str, folder: Path, environment: dict[str, str]) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_found_by_entry_point(installed: tuple[Path, dict[str, str]]) -> None:
    folder, environment = installed
    assert "median" in run("rlplugins", "list", folder=folder, environment=environment)
    shown = run("rlplugins", "show", "median", folder=folder, environment=environment)
    assert "Added to the median." in shown and "advantage_scale" in shown


def test_it_is_explained_in_a_stack(installed: tuple[Path, dict[str, str]]) -> None:
    folder, environment = installed
    text = run("rlplugins", "explain", "median,bapo", folder=folder, environment=environment)
    assert "legal: this stack can run" in text


def test_its_own_tests_pass(installed: tuple[Path, dict[str, str]]) -> None:
    folder, environment = installed
    text = run("pytest", "-v", "test_median.py", folder=folder, environment=environment)
    assert "test_the_median_has_advantage_zero PASSED" in text
    assert "test_conformance::permutation PASSED" in text and "test_conformance::state PASSED" in text
