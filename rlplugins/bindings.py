"""The points at which an adapter binds to a trainer, and whether the installed trainer still has them as they were tested."""

from __future__ import annotations

import ast
import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One function of a trainer.

    Attributes:
        file: inside the trainer's package.
        name: dotted, inside the file.
        signature: the names of its arguments in the tested version, without `self`.
        kind: `official` (a door that the trainer offers), `patched` (replaced) or `called`.
        use: what it is for, and in which process.
    """

    file: str
    name: str
    signature: str
    kind: str
    use: str


def package(name: str) -> Path:
    """The folder of a package, which is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def changed(points: Sequence[Point], root: Path) -> Iterator[tuple[Point, str]]:
    """Each point with its signature in the package at `root`, or `absent`."""
    trees: dict[str, ast.Module | None] = {}
    for point in points:
        if point.file not in trees:
            path = root / point.file
            trees[point.file] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
        tree = trees[point.file]
        node = _find(tree, point.name) if tree is not None else None
        yield point, "absent" if node is None else signature(node)


def report(points: Sequence[Point], root: Path) -> tuple[list[str], bool]:
    """One line per point, and whether all are as they were tested."""
    lines, well = [], True
    for point, now in changed(points, root):
        same = now == point.signature
        well = well and same
        found = "" if same else f": is {now}, tested with {point.signature}"
        lines.append(
            f"  {'ok   ' if same else 'FAIL '} {point.kind:8}  {point.file}:{point.name}  ({point.use}){found}"
        )
    return lines, well


def _find(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    body: list[ast.stmt] = tree.body
    found: ast.stmt | None = None
    for part in name.split("."):
        found = next((node for node in body if getattr(node, "name", None) == part), None)
        body = getattr(found, "body", [])
    return found if isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef) else None


def source(text: str, name: str) -> str:
    """The source of a function in a module's text, without its indentation; empty if there is none."""
    node = _find(ast.parse(text), name)
    return "" if node is None else textwrap.dedent(" " * node.col_offset + (ast.get_source_segment(text, node) or ""))


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The names of the arguments, without `self`."""
    given = node.args
    names = [item.arg for item in (*given.posonlyargs, *given.args) if item.arg not in ("self", "cls")]
    if given.vararg:
        names.append(f"*{given.vararg.arg}")
    elif given.kwonlyargs:
        names.append("*")
    names += [item.arg for item in given.kwonlyargs]
    if given.kwarg:
        names.append(f"**{given.kwarg.arg}")
    return f"({', '.join(names)})"
