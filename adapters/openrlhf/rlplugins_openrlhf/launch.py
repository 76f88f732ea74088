"""`rlplugins openrlhf COMMAND --rlplugins STACK <flags of OpenRLHF>`: the command that one runs anyway, with a stack.

The module `openrlhf.cli.COMMAND` is run as it is. Without plugins that is all. With some, the points of `points.py` that lie
in this process are bound before it starts (`COMMANDS`); all others are bound by these, and shake hands.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rlplugins import registry
from rlplugins.errors import ConfigurationError, RlpluginsError
from rlplugins.stack import StackConfig
from rlplugins_openrlhf import settings

FLAG = "--rlplugins"
COMMANDS = {"train_ppo_ray": "rlplugins_openrlhf.install", "train_dpo": "rlplugins_openrlhf.preferences"}
"""Per command of OpenRLHF that takes a stack the module whose `install(config)` binds it."""


def split(words: Sequence[str]) -> tuple[StackConfig, list[str]]:
    """The stack that `--rlplugins` names, and the flags of OpenRLHF.

    Raises:
        ConfigurationError: if the flag is given twice, has no value, or names no stack.
    """
    given: list[str] = []
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name != FLAG:
            rest.append(word)
        elif equals:
            given.append(value)
        elif words:
            given.append(words.pop(0))
        else:
            given.append("")
    if len(given) > 1:
        raise ConfigurationError(f"{FLAG} is given {len(given)} times: name all plugins at once, separated by commas")
    return (read(given[0]) if given else StackConfig()), rest


def read(text: str) -> StackConfig:
    """A stack from names separated by commas, or from a file; `[]` and `{}` are the empty one."""
    from rlplugins.cli import read_stack

    if text.strip() in ("[]", "{}"):
        return StackConfig()
    if not text:
        raise ConfigurationError(f"{FLAG} takes names of plugins, separated by commas, or a stack file")
    if "/" in text and not Path(text).is_file():
        raise ConfigurationError(f"{FLAG}: there is no stack file {text}")
    return read_stack(text)


def run(name: str, words: Sequence[str]) -> None:
    """Run a command of OpenRLHF in this process.

    Raises:
        ConfigurationError: if a plugin is unknown, the command takes no stack, or the adapter does not know this OpenRLHF.
        StackError: if the stack cannot run with these flags.
    """
    config, flags = split(words)
    if config.plugins:
        if name not in COMMANDS:
            raise ConfigurationError(f"{name} takes no stack; those that do: {', '.join(COMMANDS)}")
        for entry in config.plugins:
            registry.make_entry(entry)
        settings.check_version()
        importlib.import_module(COMMANDS[name]).install(config)
    module = f"openrlhf.cli.{name}"
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@click.command("openrlhf", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name", metavar="COMMAND")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
def command(name: str, flags: tuple[str, ...]) -> None:
    """Run a command of OpenRLHF (train_ppo_ray, ...) with a stack: --rlplugins NAMES or --rlplugins stack.yaml."""
    run(name, flags)


def main() -> None:
    """`python -m rlplugins_openrlhf COMMAND ...`."""
    try:
        command.main(standalone_mode=False)
    except RlpluginsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except click.UsageError as error:
        error.show()
        raise SystemExit(2) from None
