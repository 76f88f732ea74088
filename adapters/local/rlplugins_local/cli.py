"""The command `rlplugins train`; its flags are the fields of `TrainConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from rlplugins.cli import read_stack
from rlplugins.errors import ConfigurationError
from rlplugins.files import read_yaml
from rlplugins.stack import read_config
from rlplugins_local.adapter import train
from rlplugins_local.config import TrainConfig, read_settings


def _option(name: str) -> click.Option:
    """The flag of one field; its value is validated with the others, not by click."""
    field = TrainConfig.model_fields[name]
    flag = "--" + name.replace("_", "-")
    default = field.get_default()
    known = "" if field.is_required() or default in (None, False) else f" [default: {_shown(default)}]"
    text = f"{' '.join((field.description or '').split())}{known}"
    if field.annotation is bool:
        return click.Option([flag], is_flag=True, default=None, help=text)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    kind = click.Choice(choices) if choices else click.STRING
    return click.Option([flag], type=kind, help=text, metavar=None if choices else "VALUE")


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _run(config: Path | None, plugins: str | None, stack: str | None, **flags: Any) -> None:
    options = _read_options(config) if config else {}
    lines = options.pop("stack", {})
    given = {name: value for name, value in flags.items() if value is not None}
    if "report_to" in given:
        given["report_to"] = [name.strip() for name in given["report_to"].split(",")]
    settings = read_settings({**options, **given}, str(config) if config else "flags")
    if plugins is not None and stack is not None:
        raise ConfigurationError("give --plugins or --stack, not both")
    named = stack if stack is not None else plugins
    chosen = read_stack(named) if named else read_config(lines, f"{config}: stack")
    train(settings, chosen)


def _read_options(path: Path) -> dict[str, Any]:
    options = read_yaml(path)
    if not isinstance(options, dict):
        raise ConfigurationError(f"{path} holds no settings: write `name: value` lines")
    return options


command = click.Command(
    "train",
    callback=_run,
    short_help="Train a model on your own prompts and reward.",
    help="Train a Hugging Face causal language model on your own prompts and reward function, in one process.\n\n"
    "Needs --model, --data and --reward, here or in the file of --config.",
    params=[
        click.Option(["--config"], type=click.Path(path_type=Path), help="YAML file with these options, and `stack:`."),
        click.Option(["--plugins"], help="Plugins, separated by commas."),
        click.Option(["--stack"], help="Stack file, instead of --plugins."),
        *(_option(name) for name in TrainConfig.model_fields),
    ],
)
