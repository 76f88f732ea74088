"""Saving and restoring what plugins remember: safetensors and JSON, never pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlplugins.errors import StateError
from rlplugins.plugin import Stateful
from rlplugins.table import PromptTable

FORMAT = 2
_INSTEAD = "Resume from another checkpoint, or start without plugin state: delete that folder"
_TENSOR, _ARRAY, _TUPLE = "$tensor", "$array", "$tuple"


def save(folder: Path, states: Mapping[str, Mapping[str, Any]], notes: Mapping[str, Any], table: PromptTable) -> None:
    """Write states, notes about them and the prompt table to `folder`, all or nothing: a kill leaves the old one."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    document = {
        "format": FORMAT,
        **notes,
        "states": {name: _encode(_plain(state), name, tensors) for name, state in states.items()},
    }
    (temporary / "state.json").write_text(json.dumps(document, indent=1))
    save_file(tensors, temporary / "state.safetensors")
    table.save(temporary / "table.safetensors")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(temporary, folder)
        shutil.rmtree(old)
    else:
        os.rename(temporary, folder)


def load(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any], PromptTable]:
    """States by plugin, the notes, and the prompt table.

    Raises:
        StateError: if the folder holds no state, a damaged one, or one of another format.
    """
    folder = _whole(folder)
    try:
        document = json.loads((folder / "state.json").read_text())
        form = document["format"]
    except FileNotFoundError:
        raise StateError(f"{folder} holds no plugin state (state.json is missing). {_INSTEAD}") from None
    except Exception as error:
        raise StateError(f"the plugin state in {folder} is damaged: {error!r}. {_INSTEAD}") from error
    if form != FORMAT:
        raise StateError(
            f"the plugin state in {folder} has format {form}, this version of rlplugins reads {FORMAT}. "
            "Use the version of rlplugins that wrote it, or start without plugin state: delete that folder"
        )
    try:
        tensors = load_file(folder / "state.safetensors")
        states = {name: _decode(state, tensors) for name, state in document.pop("states").items()}
        return states, document, PromptTable.load(folder / "table.safetensors")
    except Exception as error:
        raise StateError(f"the plugin state in {folder} is damaged: {error!r}. {_INSTEAD}") from error


def _whole(folder: Path) -> Path:
    """`folder`, or the one that a kill between two renames left beside it."""
    old = folder.with_name(f".{folder.name}.old")
    return old if not folder.exists() and old.exists() else folder


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with what its models remember in their places."""
    return {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in state.items()}


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return {_TENSOR: _add(value.detach().cpu().contiguous().clone(), path, tensors)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {_ARRAY: _add(torch.from_numpy(np.array(value, order="C")), path, tensors)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise StateError(f"state {path}: keys of a mapping must be strings")
        return {key: _encode(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(item, f"{path}.{place}", tensors) for place, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise StateError(
        f"state {path}: a {type(value).__name__} cannot be saved; use tensors, arrays and plain JSON values"
        + (", and give the state a name of its own for every model" if isinstance(value, Stateful) else "")
    )


def _add(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    """The name under which a tensor is written; the number keeps `a.b` and `b` in `a` apart."""
    name = f"{len(tensors)}:{path}"
    tensors[name] = tensor
    return name


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _ARRAY in value:
        return tensors[value[_ARRAY]].numpy()
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    return {key: _decode(item, tensors) for key, item in value.items()}
