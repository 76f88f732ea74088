"""Write `docs/hooks.md` from the specification, the examples and the plugins."""

from __future__ import annotations

import importlib.util
import inspect
import textwrap
from pathlib import Path
from types import ModuleType

from rlplugins.catalogue import hook_names
from rlplugins.defaults import BUILTINS
from rlplugins.hookspecs import ARGUMENTS, HOOKS, PHASES, VERSION
from rlplugins.plugin import Plugin
from rlplugins.rollouts import DECLARED

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = f"""# The hooks

Specification version {VERSION}. This page is written from `rlplugins/hookspecs.py` by `make docs`; the examples are
those of [hook_examples.py](hook_examples.py), and the tests run them.

B responses in the step, T response tokens (right-padded), P prompts in the pool, M prompts in the step, K components of
the score, N segments with a reward of their own. Hooks run in the order of this page. A hook takes by name only what it
needs of its arguments, so the specification can grow. Taking
{", ".join(f"`{name}`" for name in sorted(DECLARED - {"components"}))} is itself the
declaration that the trainer must provide it; other columns are declared in `needs`.

How several plugins combine:

- **owner**: exactly one implementation decides, else the built-in (or the trainer). Two are an error, unless an `owners:`
  line names one, or a weighted mix where the page says that the hook mixes.
- **chain**: the value passes through each, in stack order (`tryfirst`, `trylast` and pluggy's wrappers work).
- **product**: weights multiply, each computed without sight of the others.
- **sum**: terms add.
- **all**: everyone is called.

"""


def page(plugins: dict[str, list[str]]) -> str:
    """The whole page; `plugins` names, per hook, the contrib plugins that use it."""
    examples = load_examples()
    parts = [INTRODUCTION, "## Arguments\n\n| argument | what it is |\n|---|---|\n"]
    parts += [f"| `{name}` | {meaning} |\n" for name, meaning in sorted(ARGUMENTS.items())]
    for phase in PHASES:
        parts.append(f"\n## Phase: {phase}\n")
        parts += [section(name, examples, plugins.get(name, [])) for name in HOOKS if HOOKS[name].phase == phase]
    return "".join(parts)


def section(name: str, examples: ModuleType, plugins: list[str]) -> str:
    """One hook."""
    hook = HOOKS[name]
    gives = f", gives `{hook.gives}` to later hooks" if hook.gives else ""
    mixes = ", can be mixed with weights" if hook.mixes else ""
    lines = [
        f"\n### `{name}({', '.join(hook.arguments)})`\n",
        f"Combines as **{hook.rule.value}**{gives}{mixes}.\n",
        hook.doc + "\n",
    ]
    if name in BUILTINS:
        lines.append("Built-ins: " + ", ".join(f"`{builtin}`" for builtin in BUILTINS[name]) + ".\n")
    if plugins:
        lines.append(
            "Used by: " + ", ".join(f"[{plugin}](../contrib/{plugin}/README.md)" for plugin in plugins) + ".\n"
        )
    example: type[Plugin] = examples.EXAMPLES[name]
    method = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(example, name))))
    lines.append(f"{inspect.getdoc(example)}\n\n```python\n{method}```\n")
    return "\n".join(lines)


def load_examples() -> ModuleType:
    """The module with one example per hook."""
    specification = importlib.util.spec_from_file_location("hook_examples", ROOT / "docs" / "hook_examples.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def plugins_by_hook() -> dict[str, list[str]]:
    """The contrib plugins that implement each hook or name a built-in for it."""
    from rlplugins import registry

    found: dict[str, list[str]] = {}
    for folder in sorted((ROOT / "contrib").glob("[a-z]*/pyproject.toml")):
        for hook in hook_names(registry.find(folder.parent.name)):
            found.setdefault(hook, []).append(folder.parent.name)
    return found
