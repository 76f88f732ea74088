"""Loaded by every process of a run: seeds torch, which OpenRLHF does not in the process that orders the prompts, and notes
which process imports what of the adapter."""

import os
import runpy
import sys
from pathlib import Path

import rlplugins_openrlhf.cpu

SEEN = os.environ.get("RLPLUGINS_OPENRLHF_SEEN")


def note(event: str, given: tuple[object, ...]) -> None:
    name = str(given[0]) if event == "import" else ""
    if name.startswith("rlplugins_openrlhf") and not name.startswith("rlplugins_openrlhf.cpu"):
        with open(f"{SEEN}/{os.getpid()}", "a") as file:
            file.write(f"{name}\n")


if SEEN:
    sys.addaudithook(note)
site = Path(rlplugins_openrlhf.cpu.__file__).parent / "site" / "sitecustomize.py"
runpy.run_path(str(site))

from rlplugins_openrlhf.cpu import platform  # noqa: E402

platform.light("imports").after_import(
    "openrlhf.trainer.ppo_trainer", lambda module: __import__("torch").manual_seed(1)
)
