"""The distributions: one shape, fresh extras, and what a user gets who installs them from wheels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / "tools" / "uv"
CONTRIB = sorted(file.parent for file in (ROOT / "contrib").glob("[a-z]*/pyproject.toml"))
MEMBERS = [ROOT, *sorted(file.parent for file in (ROOT / "adapters").glob("*/pyproject.toml")), *CONTRIB]


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """The standard output of a command that must succeed."""
    outside = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=outside | variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def read(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_generated_parts_are_fresh():
    run(sys.executable, ROOT / "tools" / "generate.py", "--check")


def test_every_adapter_and_plugin_is_an_extra():
    extras = read(ROOT)["project"]["optional-dependencies"]
    expected = {folder.name: [read(folder)["project"]["name"]] for folder in MEMBERS[1:]}
    assert {name: extras[name] for name in extras if name not in ("judge", "ray")} == expected


@pytest.mark.parametrize("folder", CONTRIB, ids=lambda folder: folder.name)
def test_contrib_distributions_have_one_shape(folder):
    """A contrib plugin is one module, one entry point and the tables of the template."""
    slug, module = folder.name, f"rlplugins_{folder.name.replace('-', '_')}"
    table = read(folder)
    template = (ROOT / "contrib" / "_template" / "pyproject.toml").read_text()
    expected = tomllib.loads(template.replace("{slug}", slug))
    assert table.keys() == expected.keys()
    assert table["project"].keys() == expected["project"].keys()
    assert table["project"]["name"] == f"rlplugins-{slug}"
    assert re.search(r"\(arXiv \d{4}\.\d{4,5}\)$", table["project"]["description"])
    assert table["project"]["entry-points"]["rlplugins"][slug].split(":")[0] == module
    assert [file.stem for file in folder.glob("*.py")] == [module]
    assert (folder / "tests" / f"test_{module.removeprefix('rlplugins_')}.py").exists()


def test_constraints_name_no_host():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9._-]+==[a-z0-9.]+", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_every_distribution_has_the_same_version_and_licence():
    projects = [read(folder)["project"] for folder in MEMBERS]
    assert {(project["version"], project["license"]) for project in projects} == {
        (projects[0]["version"], "Apache-2.0")
    }


@pytest.mark.slow
def test_extras_install_exactly_the_plugins_they_name(tmp_path):
    """In an empty environment, what the extras name is installed and found by entry point, and no more."""
    wheels, python = tmp_path / "dist", tmp_path / "venv" / "bin" / "python"
    run(ROOT / "tools" / "wheels", wheels)
    run(UV, "venv", "--python", sys.executable, tmp_path / "venv")
    run(
        *(UV, "pip", "install", "--python", python, "--constraint", ROOT / "constraints.txt"),
        "rlplugins[local,spo,knapsack]",
        UV_FIND_LINKS=str(wheels),
    )
    listing = run(python.with_name("rlplugins"), "list", cwd=tmp_path, NO_COLOR="1", COLUMNS="200")
    words = set(re.findall(r"[\w-]+", listing))
    assert {"spo", "knapsack"} <= words
    assert not {"bnpo", "bapo", "d3s", "gtpo"} & words
