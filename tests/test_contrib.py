"""What every plugin of contrib/ has in common: README, docstrings, entry point, vectorised imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from rlplugins import registry
from rlplugins.catalogue import configuration, hook_names
from rlplugins.legality import FACTS
from rlplugins.plugin import summary

CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
SLUGS = sorted(file.parent.name for file in CONTRIB.glob("[a-z]*/pyproject.toml"))
SECTIONS = ["Use", "Equations", "Configuration", "Needs and facts", "Combines with", "Source and fidelity"]
TRAINERS = {"verl", "openrlhf", "trl", "vllm", "ray", "rlplugins_local"}

pytestmark = pytest.mark.parametrize("slug", SLUGS)


def module_of(slug: str) -> Path:
    """The plugin's one module."""
    return CONTRIB / slug / f"rlplugins_{slug.replace('-', '_')}.py"


def test_the_entry_point_gives_a_plugin_of_that_name(slug: str) -> None:
    plugin = registry.find(slug)
    assert plugin.name == slug
    assert hook_names(plugin), "implements no hook"


def test_it_runs_the_conformance_kit(slug: str) -> None:
    tests = "".join(file.read_text() for file in (CONTRIB / slug / "tests").glob("test_*.py"))
    assert re.search(rf'^test_\w+ = conformance\(\s*"{slug}"', tests, flags=re.MULTILINE)


def test_the_readme_has_its_sections_and_the_summary(slug: str) -> None:
    text = (CONTRIB / slug / "README.md").read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert summary(registry.find(slug)) in " ".join(text.split())


def test_the_readme_documents_the_configuration(slug: str) -> None:
    text = (CONTRIB / slug / "README.md").read_text()
    table = text.partition("## Configuration")[2].partition("\n## ")[0].partition("| option |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]
    expected = [
        [f"`{name}`", f"`{default}`", meaning.replace("|", "\\|")]
        for name, _, default, meaning in configuration(registry.find(slug))
    ]
    assert rows == expected


def test_the_facts_are_known(slug: str) -> None:
    plugin = registry.find(slug)()
    assert set(plugin.assumes) | set(plugin.breaks) <= set(FACTS)


def test_the_module_imports_no_trainer(slug: str) -> None:
    tree = ast.parse(module_of(slug).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & TRAINERS
