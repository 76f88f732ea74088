"""Loaded by every process of a run, so that two runs are the same.

It seeds torch: where prompts are ordered, which OpenRLHF does not, and before each update, whose order of rows else depends on
the updates of that process before. It orders the responses of a step, which else lie as they came back. And it notes which
process imports what of OpenRLHF and rlplugins."""

import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import rlplugins_openrlhf.cpu

SEEN = os.environ.get("RLPLUGINS_OPENRLHF_SEEN")


class Notes:
    """Asked first for every module that is imported, however it is; finds none."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.startswith(("openrlhf.", "rlplugins")) and not name.startswith("rlplugins_openrlhf.cpu"):
            with open(f"{SEEN}/{os.getpid()}", "a") as file:
                file.write(f"{name}\n")


def seed(module: Any) -> None:
    import torch

    torch.manual_seed(1)


def seed_updates(module: Any) -> None:
    original = module.ActorPPOTrainer.ppo_train

    @functools.wraps(original)
    def ppo_train(self: Any, coefficient: float) -> Any:
        seed(module)
        return original(self, coefficient)

    module.ActorPPOTrainer.ppo_train = ppo_train


def in_order(module: Any) -> None:
    original = module.SamplesGenerator.generate_samples

    @functools.wraps(original)
    def generate_samples(self: Any, **options: Any) -> Any:
        samples, *rest = original(self, **options)
        return sorted(samples, key=lambda sample: sample.prompts[0]), *rest

    module.SamplesGenerator.generate_samples = generate_samples


site = Path(rlplugins_openrlhf.cpu.__file__).parent / "site" / "sitecustomize.py"
runpy.run_path(str(site))

from rlplugins_openrlhf.cpu import platform  # noqa: E402

after_import = platform.light("imports").after_import
after_import("openrlhf.trainer.ppo_trainer", seed)
after_import("openrlhf.trainer.ray.ppo_actor", seed_updates)
after_import("openrlhf.trainer.ppo_utils.samples_generator", in_order)
if SEEN:
    sys.meta_path.insert(0, Notes())
