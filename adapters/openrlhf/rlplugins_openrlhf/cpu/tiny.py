"""A model, addition problems and a reward file of a few kilobytes, in the formats that OpenRLHF reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlplugins.testing.tiny import additions, write_model

TRAIN, VALIDATION = 64, 16
"""Problems of each split."""


def write(folder: Path) -> Path:
    """Write `folder/model`, `folder/train.jsonl` and `folder/validation.jsonl`, unless they are there."""
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder / "model")
        for split, pairs in additions(TRAIN, VALIDATION).items():
            lines = "".join(json.dumps(row(a, b)) + "\n" for a, b in pairs)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def row(a: int, b: int) -> dict[str, Any]:
    """One problem; OpenRLHF's data set keeps the first three fields."""
    return {
        "input": [{"role": "user", "content": f"{a}+{b}="}],
        "label": str(a + b),
        "datasource": "addition",
        "difficulty": (a + b) / 18,
    }


def reward_func(queries: list[str], prompts: list[str], labels: list[str], **unused: Any) -> dict[str, Any]:
    """Half a point for the share of digits, half for the right last number: random weights get something to learn from."""
    response = queries[0][len(prompts[0]) :]
    numbers = re.findall(r"\d+", response)
    right = float(bool(numbers) and numbers[-1] == labels[0])
    digits = sum(character.isdigit() for character in response) / max(1, len(response))
    return {"rewards": 0.5 * (right + digits), "scores": right, "extra_logs": {"right": right, "digits": digits}}
