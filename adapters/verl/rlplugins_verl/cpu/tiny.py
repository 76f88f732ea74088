"""A model, a tokenizer and addition problems of a few kilobytes, in the formats that verl reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlplugins.testing.tiny import additions, write_model


def write(folder: Path, train: int = 64, validation: int = 16) -> Path:
    """Write `folder/model`, `folder/train.parquet` and `folder/validation.parquet`, unless they are there."""
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder / "model")
        write_data(folder, train, validation)
    return folder


def write_data(folder: Path, train: int, validation: int, seed: int = 1) -> None:
    """Different addition problems, each with the columns of verl's own data sets."""
    import pandas

    for split, chosen in additions(train, validation, seed).items():
        rows = [row(number, split, a, b) for number, (a, b) in enumerate(chosen)]
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


def row(number: int, split: str, a: int, b: int) -> dict[str, Any]:
    """One problem."""
    return {
        "data_source": "addition",
        "prompt": [{"role": "user", "content": f"{a}+{b}="}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"index": number, "split": split, "difficulty": (a + b) / 18},
    }


def score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any
) -> dict[str, float]:
    """Half a point for the share of digits, half for the right last number: random weights get something to learn from."""
    numbers = re.findall(r"\d+", solution_str)
    right = float(bool(numbers) and numbers[-1] == ground_truth)
    digits = sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
    return {"score": 0.5 * (right + digits), "acc": right, "digits": digits}


def succeed(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any) -> float:
    """1 if the codes of the response's characters add up to an even number, else 0: about half of the time."""
    return float(sum(map(ord, solution_str)) % 2 == 0)
