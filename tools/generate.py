"""Write what is generated: the extras, the versions, the plugin gallery of README.md, docs/.

With `--check`, only say what is stale.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import claims_page
import hooks_page
from hooks_page import plugins_by_hook

from rlplugins import matrix

ROOT = Path(__file__).resolve().parent.parent
MATRIX = """# Which plugins run together

Every pair of contrib plugins with their defaults. Written by `make docs`.

{matrix}
## Larger stacks

Together they hold every pair that runs. The tests take a few real steps with each.

{stacks}
"""
ARXIV = re.compile(r"\(arXiv (\d{4}\.\d{4,5})\)")


def project(folder: Path) -> dict:
    """The `[project]` table of a distribution."""
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def members(kind: str) -> list[Path]:
    """The folders of one kind of distribution, `adapters` or `contrib`, without the template."""
    return sorted(file.parent for file in (ROOT / kind).glob("[a-z]*/pyproject.toml"))


def between_markers(text: str, name: str, comment: tuple[str, str], body: str) -> str:
    """The text with what stands between the two markers of that name replaced by the body."""
    first, last = (f"{comment[0]}<{slash}generated: {name}>{comment[1]}" for slash in ("", "/"))
    if first not in text or last not in text:
        raise SystemExit(f"the markers of {name!r} are missing")
    head, rest = text.split(first, 1)
    return f"{head}{first}\n{body}{last}{rest.split(last, 1)[1]}"


def extras() -> str:
    """One extra per adapter and per contrib plugin."""
    folders = members("adapters") + members("contrib")
    return "".join(f'{folder.name} = ["{project(folder)["name"]}"]\n' for folder in folders)


def gallery() -> str:
    """The table of the contrib plugins: name, paper, hooks."""
    rows = ["| plugin | paper | hooks |", "|---|---|---|"]
    used = plugins_by_hook()
    for folder in members("contrib"):
        paper = ARXIV.sub(r"([\1](https://arxiv.org/abs/\1))", project(folder)["description"])
        hooks = ", ".join(f"`{hook}`" for hook, names in used.items() if folder.name in names)
        rows.append(f"| [{folder.name}](contrib/{folder.name}/README.md) | {paper} | {hooks} |")
    return "\n".join(rows) + "\n"


def matrix_page() -> str:
    """Every pair of contrib plugins, and stacks that hold all pairs that run."""
    pairs = matrix.pairs(sorted(folder.name for folder in members("contrib")))
    stacks = "\n".join(f"- {', '.join(stack)}" for stack in matrix.covering(pairs))
    return MATRIX.format(matrix=matrix.markdown(pairs), stacks=stacks)


def generated() -> Iterator[tuple[Path, str]]:
    """Every file with a generated part, and the text that it should have."""
    root = ROOT / "pyproject.toml"
    yield root, between_markers(root.read_text(), "extras", ("# ", ""), extras())
    version = project(ROOT)["version"]
    for folder in members("adapters") + members("contrib"):
        file = folder / "pyproject.toml"
        yield file, re.sub(r'(?m)^version = ".*"$', f'version = "{version}"', file.read_text())
    readme = ROOT / "README.md"
    if readme.exists():
        yield readme, between_markers(readme.read_text(), "gallery", ("<!-- ", " -->"), gallery())
    yield ROOT / "docs" / "hooks.md", hooks_page.page(plugins_by_hook())
    yield ROOT / "docs" / "claims.md", claims_page.page()
    yield ROOT / "docs" / "matrix.md", matrix_page()


def main() -> None:
    """Rewrite the stale files, or with `--check` name them and exit with status 1."""
    stale = [(file, text) for file, text in generated() if not file.exists() or file.read_text() != text]
    if "--check" in sys.argv[1:]:
        if stale:
            names = ", ".join(str(file.relative_to(ROOT)) for file, _ in stale)
            raise SystemExit(f"stale: {names}; run `make docs`")
        return
    for file, text in stale:
        file.write_text(text)
        print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
