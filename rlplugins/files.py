"""Reading and writing YAML, version 1.2: `off` is a word there, and `1e-6` a number."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rlplugins.errors import ConfigurationError


def read_yaml(path: Path, what: str = "file") -> Any:
    """What a YAML file holds.

    Args:
        path: the file.
        what: what it should be, for the error text.

    Raises:
        ConfigurationError: if it is missing, unreadable or no YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {what} {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigurationError(f"{path} is not a YAML file: {error}") from None


def yaml_text(value: Any) -> str:
    """A plain value as YAML."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = StringIO()
    writer.dump(value, stream)
    return stream.getvalue()
