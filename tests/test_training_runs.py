"""Every plugin in a real run of twenty steps on the local trainer, alone and with a partner."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlplugins import matrix
from rlplugins.stack import StackConfig
from rlplugins_local import arithmetic, train
from rlplugins_local.config import TrainConfig

CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
MATRIX = CONTRIB.parent / "docs" / "matrix.md"

PARTNERS: dict[str, list[Any]] = {
    "aepo": ["knapsack"],
    "bapo": ["d3s"],
    "bnpo": ["knapsack"],
    "chord": ["knapsack"],
    "critique-grpo": ["knapsack"],
    "d3s": ["bapo", "knapsack"],
    "dynamic-reward-weighting": ["knapsack"],
    "epo": ["bapo"],
    "grpo-d": ["d3s"],
    "gtpo": ["knapsack"],
    "hapo-history": ["sec"],
    "hapo-token": ["d3s"],
    "hbpo": ["knapsack"],
    "knapsack": ["rloo"],
    "p3o": ["knapsack"],
    "pcl": ["knapsack"],
    "pf-ppo": ["knapsack"],
    "prefix-grouper": ["bapo"],
    "rank-grpo": ["d3s"],
    "rdpo": ["nll"],
    "rec": ["knapsack"],
    "riskpo": ["bapo"],
    "scaf-grpo": ["hbpo"],
    "sec": ["knapsack"],
    "segment-po": ["bapo"],
    "spo": ["bapo"],
    "stratified-grpo": ["knapsack"],
}
"""A sensible partner of each plugin; several are one larger stack."""

OPTIONS: dict[str, dict[str, Any]] = {
    "critique-grpo": {"T": 4, "template": "{question}{solution}{critique}"},
    "dynamic-reward-weighting": {
        "weights": {"score": 0.8, "conciseness": 0.2},
        "validation": {"validation/reward": "max", "validation/response_length": "min"},
    },
    "nll": {"coefficient": 0.2},
    "pcl": {"features": ["digits"]},
    "hbpo": {"budgets": [3, 4, 5], "L": 6, "alpha": 0.02, "beta": 0.5, "prefix": "{budget}="},
    "rank-grpo": {"n_ranks": 3, "separators": {14: 1}, "aggregation": "token_mean"},  # 14 is the token "="
    "rec": {"clip_mode": "one-side"},
    "scaf-grpo": {"warmup": 0, "template": "{question}{hint}"},
    "segment-po": {"interval": 2, "continuations": 4},
}
"""Options of the plugin that a run on this task needs."""

SETTINGS: dict[str, dict[str, Any]] = {
    "bapo": {"mini_batches": 2},
    "hapo-history": {"data": "few.jsonl"},
    "hapo-token": {"mini_batches": 2},
    "hbpo": {"reward": f"{Path(__file__)}:even_after_the_budget"},
    "p3o": {"mini_batches": 2},
    "rank-grpo": {"reward": f"{Path(__file__)}:parts_start_even", "max_new_tokens": 8},
    "rdpo": {"pairs": "pairs.jsonl"},
    "rec": {"mini_batches": 2},
    "scaf-grpo": {"group_size": 4},
}
"""Settings of the trainer without which the plugin has nothing to do."""

LARGER = [
    line[2:].split(", ") for line in MATRIX.read_text().split("## Larger stacks")[1].splitlines() if line[:2] == "- "
]

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
    lines = [json.loads(line) | HINTS for line in (folder / "train.jsonl").read_text().splitlines()]
    lines = [line | {"category": len(line["answer"]), "demonstration": "2468"} for line in lines]
    for name, part in (("train", lines), ("few", lines[:16])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    pairs = [line | {"chosen": "2", "rejected": "3"} for line in lines]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in pairs))
    return folder


HINTS = {f"{tier}_parts": ["2", "4"] for tier in ("knowledge_components", "planning_skeleton", "solution_breakdown")}
"""Fields of every prompt for scaf-grpo."""


def starts_even(prompt: str, response: str, **columns: Any) -> float:
    """1 if the response starts with an even digit: an untrained model does so in about a third of all draws."""
    return float(response[:1] in tuple("02468"))


def even_after_the_budget(prompt: str, response: str, **columns: Any) -> float:
    """1 if an even digit follows the forced beginning of hbpo."""
    return starts_even(prompt, response.partition("=")[2])


def parts_start_even(prompt: str, response: str, **columns: Any) -> dict[str, float]:
    """One component per rank: whether that part of the response, between `=`, starts with an even digit."""
    parts = [*response.split("="), "", ""][:3]
    hits = [float(part[:1] in tuple("02468")) for part in parts]
    return {"score": sum(hits) / 3, **{f"rank_{place}": hit for place, hit in enumerate(hits)}}


def run(stack: list[str], steps: int, task: Path, output: Path) -> list[dict[str, float]]:
    """The metrics of a run's steps."""
    settings: dict[str, Any] = {"reward": f"{Path(__file__)}:starts_even", "max_new_tokens": 4}
    settings |= {"data": "train.jsonl", "validation_data": task / "validation.jsonl"}
    for slug in stack:
        settings |= SETTINGS.get(slug, {})
    settings["data"] = task / settings["data"]
    if "pairs" in settings:
        settings = {"pairs": task / settings["pairs"], "validation_data": task / settings["pairs"]}
    config = TrainConfig(
        model=task / "model", steps=steps, batch_size=32, learning_rate=3e-3, output=output, report_to=["none"], threads=1,
        **settings,
    )  # fmt: skip
    plugins: list[Any] = [{slug: OPTIONS[slug]} if slug in OPTIONS else slug for slug in stack]
    train(config, StackConfig(plugins=plugins), progress=False)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row.get("loss", 0.0)) for row in rows)
    return rows


@pytest.mark.parametrize("stack", STACKS, ids="+".join)
def test_twenty_steps(stack: list[str], task: Path, tmp_path: Path) -> None:
    rows = run(stack, 20, task, tmp_path)
    goal = "reward" if "reward" in rows[0] else "accuracy"
    early, late = (sum(row[goal] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert late > early, f"the {goal} went from {early:.3f} to {late:.3f}"


@pytest.mark.parametrize("stack", LARGER, ids="+".join)
def test_steps_of_a_larger_stack(stack: list[str], task: Path, tmp_path: Path) -> None:
    rows = run(stack, 3, task, tmp_path)
    assert any(row.get("grad_norm", 0) > 0 for row in rows), "no step has learnt anything"


def test_the_larger_stacks_hold_every_pair_that_runs() -> None:
    pairs = {(pair.first, pair.second) for pair in matrix.pairs(sorted(PARTNERS)) if pair.runs}
    assert pairs <= {
        pair for stack in LARGER for pair in combinations(stack, 2)
    }  # a third plugin may make others legal
