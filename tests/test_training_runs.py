"""Every plugin in a real run of twenty steps on the local trainer, alone and with a partner."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlplugins.stack import StackConfig
from rlplugins_local import arithmetic, train
from rlplugins_local.config import TrainConfig

CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
STEPS = 20

PARTNERS: dict[str, list[Any]] = {
    "aepo": ["knapsack"],
    "bapo": ["d3s"],
    "bnpo": ["knapsack"],
    "d3s": ["bapo", "knapsack"],
    "epo": ["bapo"],
    "gtpo": ["knapsack"],
    "hapo-token": ["d3s"],
    "knapsack": ["rloo"],
    "p3o": ["knapsack"],
    "rank-grpo": ["d3s"],
    "rec": ["knapsack"],
    "riskpo": ["bapo"],
    "spo": ["bapo"],
    "stratified-grpo": ["knapsack"],
}
"""A sensible partner of each plugin; several are one larger stack."""

OPTIONS: dict[str, dict[str, Any]] = {
    "rank-grpo": {"n_ranks": 3, "separators": {14: 1}, "aggregation": "token_mean"},  # 14 is the token "="
    "rec": {"clip_mode": "one-side"},
}
"""Options of the plugin that a run on this task needs."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bapo": {"mini_batches": 2},
    "hapo-token": {"mini_batches": 2},
    "p3o": {"mini_batches": 2},
    "rank-grpo": {"reward": f"{Path(__file__)}:parts_start_even", "max_new_tokens": 8},
    "rec": {"mini_batches": 2},
}
"""Settings of the trainer without which the plugin has nothing to do."""

STACKS = [[slug, *partner] for slug, others in PARTNERS.items() for partner in ([], others)]


def test_every_plugin_has_a_partner() -> None:
    assert set(PARTNERS) == {file.parent.name for file in CONTRIB.glob("[a-z]*/pyproject.toml")}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained character model, and prompts."""
    folder = tmp_path_factory.mktemp("task")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    arithmetic.write_prompts(folder, seed=0)
    return folder


def starts_even(prompt: str, response: str, **columns: Any) -> float:
    """1 if the response starts with an even digit: an untrained model does so in about a third of all draws."""
    return float(response[:1] in tuple("02468"))


def parts_start_even(prompt: str, response: str, **columns: Any) -> dict[str, float]:
    """One component per rank: whether that part of the response, between `=`, starts with an even digit."""
    parts = [*response.split("="), "", ""][:3]
    hits = [float(part[:1] in tuple("02468")) for part in parts]
    return {"score": sum(hits) / 3, **{f"rank_{place}": hit for place, hit in enumerate(hits)}}


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_twenty_steps(stack: list[str], task: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": STEPS, "batch_size": 32, "max_new_tokens": 4, "learning_rate": 3e-3}
    settings["reward"] = f"{Path(__file__)}:starts_even"
    for slug in stack:
        settings |= SETTINGS.get(slug, {})
    config = TrainConfig(
        model=task / "model", data=task / "train.jsonl", validation_data=task / "validation.jsonl",
        output=tmp_path, report_to=["none"], threads=1, **settings,
    )  # fmt: skip
    plugins: list[Any] = [{slug: OPTIONS[slug]} if slug in OPTIONS else slug for slug in stack]
    train(config, StackConfig(plugins=plugins), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row.get("loss", 0.0)) for row in rows)
    early, late = (sum(row["reward"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert late > early, f"the reward went from {early:.3f} to {late:.3f}"
