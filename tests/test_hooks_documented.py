"""`docs/hooks.md` documents every hook with its exact signature and says what each argument is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlplugins.hookspecs import ARGUMENTS, HOOKS

PAGE = Path(__file__).parent.parent / "docs" / "hooks.md"
HEADING = re.compile(r"^### `(\w+)\(([^)]*)\)`$", re.MULTILINE)


def documented() -> dict[str, list[str]]:
    return {name: re.split(r",\s*", arguments) for name, arguments in HEADING.findall(PAGE.read_text())}


def section(hook: str) -> str:
    """The text below the heading of a hook."""
    text = PAGE.read_text()
    start = re.search(rf"^### `{hook}\(", text, re.MULTILINE)
    assert start is not None, f"docs/hooks.md has no heading for {hook}"
    return re.split(r"^#{2,3} ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]


def test_hooks_are_documented_once_each_in_the_order_in_which_they_run() -> None:
    assert [name for name, _ in HEADING.findall(PAGE.read_text())] == list(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_with_its_exact_signature(hook: str) -> None:
    assert documented().get(hook) == list(HOOKS[hook].arguments)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_argument_of_a_hook_is_described(hook: str) -> None:
    text = PAGE.read_text()
    for argument in HOOKS[hook].arguments:
        described = f"`{argument}`" in section(hook).partition("\n")[2] or re.search(
            rf"^[-|*].*`{argument}`", text, re.M
        )
        assert described, f"docs/hooks.md does not say what {hook}'s argument {argument} is"


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_is_documented_with_its_rule(hook: str) -> None:
    assert re.search(rf"\b{HOOKS[hook].rule.value}\b", section(hook)), (
        f"docs/hooks.md: {hook} is {HOOKS[hook].rule.value}"
    )


def test_every_argument_of_the_specification_has_a_meaning_and_none_is_left_over() -> None:
    assert {argument for hook in HOOKS.values() for argument in hook.arguments} == set(ARGUMENTS)
    assert all(hook.doc for hook in HOOKS.values())
