"""`rlplugins doctor verl`: versions, every bound point, and canaries that need neither training nor a device."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, entry_points, version

from rlplugins.errors import ConfigurationError
from rlplugins_verl import bindings, settings

SECONDS = 300
REGISTERED = """
from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
import verl.trainer.ppo.v1
missing = {name for name in ("rlplugins_sync", "rlplugins_colocate_async") if name not in TRAINER_REGISTRY}
raise SystemExit(f"not registered: {', '.join(sorted(missing))}" if missing else 0)
"""


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
    for point, now in bindings.changed(bindings.package()):
        same = now == point.signature
        well = well and same
        place = f"{point.file}:{point.name}"
        lines.append(f"  {'ok   ' if same else 'FAIL '} {point.kind:8}  {place}  ({point.use})"
                     + ("" if same else f": is {now}, tested with {point.signature}"))  # fmt: skip
    for name, problem in (("verl.plugins", entry_point()), ("TransferQueue", queue()), ("trainers", registered())):
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


def registered() -> str:
    """Whether verl, imported in a fresh process, knows our trainers: it skips a plugin that fails without a word."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", REGISTERED], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing verl took more than {SECONDS} s"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["importing verl failed"])[-1]
