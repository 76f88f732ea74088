"""`rlplugins doctor verl`: versions, every bound point, and canaries that need neither training nor a device."""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from rlplugins import bindings
from rlplugins.errors import ConfigurationError
from rlplugins_verl import settings
from rlplugins_verl.bindings import CALLS, POINTS, VLLM_POINTS


def report() -> tuple[str, bool]:
    """The report, and whether all is well."""
    try:
        found = settings.check_version()
    except ConfigurationError as error:
        return f"  FAIL  {error}", False
    lines = [f"  verl {found}; tested range >=0.9,<0.10, tested {settings.TESTED}"]
    lines += [
        f"  {name} {_version(name)}" for name in ("TransferQueue", "tensordict", "ray", "torch", "transformers", "vllm")
    ]
    well = True
    for name, points in (("verl", POINTS), ("vllm", VLLM_POINTS)):
        if importlib.util.find_spec(name) is not None:
            found_points, same = bindings.report(points, bindings.package(name))
            lines += found_points
            well = well and same
    canaries = {
        "verl.plugins": entry_point(), "TransferQueue": queue(), "trainers": registered(),
        "calls": missing_calls(bindings.package("verl")),
    }  # fmt: skip
    for name, problem in canaries.items():
        well = well and not problem
        lines.append(f"  {'FAIL ' if problem else 'ok   '} canary    {name}{f': {problem}' if problem else ''}")
    return "\n".join(lines), well


def _version(name: str) -> str:
    for candidate in (name, f"{name}-cpu"):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return "not installed"


def entry_point() -> str:
    """Why verl would not load rlplugins."""
    names = [point.name for point in entry_points(group="verl.plugins")]
    if "rlplugins" not in names:
        return "the distribution rlplugins-verl has no entry point here: install it anew"
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "rlplugins" not in policy.split(","):
        return f"VERL_USE_EXTERNAL_PLUGINS={policy} leaves rlplugins out: add it, or unset the variable"
    return ""


def queue() -> str:
    """What verl's default trainer needs and does not require."""
    return "not installed: pip install TransferQueue" if _version("TransferQueue") == "not installed" else ""


def missing_calls(root: Path) -> str:
    """Calls that verl's own functions no longer make."""
    missing = []
    for file, name, call in CALLS:
        path = root / file
        if call not in bindings.source(path.read_text(encoding="utf-8") if path.is_file() else "", name):
            missing.append(f"{file}:{name} no longer has {call.rstrip('(')}")
    return "; ".join(missing)


def registered() -> str:
    """Whether verl, when it is imported, knows our trainers: it skips a plugin that fails without a word.

    In this process, which has torch already: importing verl a second time elsewhere would take seconds more.
    """
    try:
        importlib.import_module("verl.trainer.ppo.v1")
        trainers = importlib.import_module("verl.trainer.ppo.v1.trainer_base").TRAINER_REGISTRY
    except Exception as error:
        return f"importing verl failed: {type(error).__name__}: {error}"
    missing = [name for name in (f"rlplugins_{mode}" for mode in settings.MODES) if name not in trainers]
    return f"not registered: {', '.join(missing)}" if missing else ""
