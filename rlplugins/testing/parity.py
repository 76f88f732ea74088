"""The same rollouts through the local trainer and through another one: what both sides of a parity test share.

An adapter's test brings the other side. The rows are drawn from a fixed source, old log-probs are moved by noise, and no
optimiser moves the weights, so that advantages, weights, loss and gradient of one step can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplugins.rollouts import Prompts, Requests, Rollouts
from rlplugins.stack import Credit, Stack, StackConfig
from rlplugins.testing.tiny import write_model

STEPS = 2


@dataclass(frozen=True)
class Case:
    """Rollouts of two steps.

    Attributes:
        stack: as in a stack file.
        group_size: responses per prompt.
        dense: rewards anywhere in [0, 1], not only at its ends.
        settings: of the trainer, by dotted path, beside the defaults.
        local: the same settings of the local trainer.
        rows: responses per step.
        reference: whether a reference policy runs.
        passes: over each step's rows; the second sees the present log-probs before its mini-batch.
        components: numbers that the reward function gives beside the score.
    """

    stack: Mapping[str, Any]
    group_size: int = 4
    dense: bool = False
    settings: Mapping[str, Any] | None = None
    local: Mapping[str, Any] | None = None
    rows: int = 16
    reference: bool = False
    passes: int = 1
    components: int = 0


@dataclass
class Result:
    """What one side made of a step.

    Attributes:
        advantages: (B, T).
        weights: (B, T), W = w u m.
        loss: of the mini-batch.
        gradient: per parameter.
    """

    advantages: Tensor
    weights: Tensor
    loss: float
    gradient: dict[str, Tensor]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """A step's rows as nested lists and tensors, of neither trainer."""

    prompt: Tensor
    prompts: list[list[int]]
    responses: Tensor
    mask: Tensor
    scores: Tensor
    noise: Tensor
    components: Tensor


def draw(case: Case, step: int, vocabulary: int, pool_size: int, width: int = 9) -> Drawn:
    """Rows of unequal length, one with tokens of a tool in the middle, and old log-probs that differ from the present."""
    source = torch.Generator().manual_seed(100 + step)
    rows = case.rows
    prompt = torch.arange(rows) // case.group_size
    prompt = (prompt + 3 * step) % pool_size
    sizes = torch.randint(1, width + 1, (rows,), generator=source)
    sizes[0], sizes[1] = width, max(4, int(sizes[1]))
    mask = torch.arange(width) < sizes[:, None]
    mask[1, 1:3] = False
    tokens = torch.randint(3, vocabulary, (rows, width), generator=source)
    chances = torch.rand((rows, 1), generator=source)
    scores = chances if case.dense else (chances > 0.5).float()
    whole = torch.arange(width) < sizes[:, None]
    prompts = [torch.randint(3, vocabulary, (5 + int(place) % 3,), generator=source).tolist() for place in prompt]
    noise = 0.4 * torch.randn(rows, width, generator=source)
    components = torch.rand((rows, case.components), generator=source)
    return Drawn(prompt, prompts, tokens * whole, mask, scores, noise, components)


def write_inputs(folder: Path, prompts: int = 24) -> Path:
    """A model whose distributions are far from uniform, a prompt file, a reward function that is never asked.

    The weights are numbers of 16 bits, so that a trainer which loads them so has the same.
    """
    if (folder / "prompts.jsonl").exists():
        return folder
    write_model(folder / "model", hidden=32)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model" / "model.safetensors")
    scaled = {name: value * (1.0 if "norm" in name else 16.0) for name, value in weights.items()}
    rounded = {name: value.bfloat16().float() for name, value in scaled.items()}
    save_file(rounded, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    lines = [problem(place) for place in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "reward.py").write_text("def score(prompt, response):\n    return 0.0\n")
    return folder


def problem(place: int) -> dict[str, Any]:
    """A line of the prompt file."""
    a, b = place // 10, place % 10
    hints = {
        name: [f"{name} of {a}+{b}"]
        for name in ("knowledge_components_parts", "planning_skeleton_parts", "solution_breakdown_parts")
    }
    return {
        "prompt": [{"role": "user", "content": f"{a}+{b}="}], "difficulty": (a + b) / 18,
        "category": "carry" if a + b >= 10 else "none", **hints,
    }  # fmt: skip


class LocalSide:
    """The local trainer, whose optimiser does not move the weights.

    Args:
        folder: with the inputs.
        case: the stack and its rows.
        **settings: of the local trainer, which stand for the other one's defaults.
    """

    def __init__(self, folder: Path, case: Case, **settings: Any) -> None:
        from rlplugins_local.adapter import build_stack
        from rlplugins_local.config import TrainConfig
        from rlplugins_local.data import PromptFile, Scorer
        from rlplugins_local.policy import Policy
        from rlplugins_local.run import LocalTrainer

        given = {
            "model": folder / "model", "data": folder / "prompts.jsonl", "reward": f"{folder / 'reward.py'}:score",
            "batch_size": case.rows, "group_size": case.group_size, "steps": STEPS, "device": "cpu",
            "report_to": ["none"], "max_new_tokens": 9, "epochs": case.passes,
        }  # fmt: skip
        config = TrainConfig.model_validate(given | settings | dict(case.local or {}))
        data = PromptFile(config.data)
        stack = build_stack(config, StackConfig.model_validate(dict(case.stack)), data.columns)
        policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
        self.trainer = LocalTrainer(config, stack, policy, data, None, Scorer(config.reward, list(data.columns)))
        self.trainer.optimiser_step = self._keep_gradient
        self.gradient: dict[str, Tensor] = {}
        self.reference = case.reference
        self.pool = self.trainer.pool

    def _keep_gradient(self, metrics: Any) -> None:
        named = self.trainer.policy.model.named_parameters()
        self.gradient = {name: parameter.grad.clone() for name, parameter in named}
        metrics.optimiser_steps += 1

    def old_log_probs(self, drawn: Drawn) -> Tensor:
        """Of the present weights, moved by the noise."""
        from rlplugins_local.policy import Sequences

        outputs = self.trainer.policy.passes(Sequences.of(drawn.prompts, drawn.responses, drawn.mask), 1.0, None)
        return (outputs.log_probs + drawn.noise) * drawn.mask

    def step(self, drawn: Drawn, number: int, entropy: Tensor | None, old: Tensor) -> Result:
        """Credit, update and end of one step."""
        trainer, stack = self.trainer, self.trainer.stack
        stack.begin_step(number, STEPS, seed=1)
        table = self.pool
        rollouts = Rollouts(
            prompt_keys=table.keys[drawn.prompt], prompt_rows=table.rows[drawn.prompt], groups=drawn.prompt.clone(),
            prompts=drawn.prompts, responses=drawn.responses, mask=drawn.mask, scores=drawn.scores,
            kind=torch.zeros(len(drawn.prompt), dtype=torch.int8), old_log_probs=old, entropy=entropy,
            components=drawn.components if drawn.components.numel() else None,
            component_names=tuple(f"part{place}" for place in range(drawn.components.shape[1])),
        )  # fmt: skip
        if self.reference:
            rollouts.ref_log_probs = reference_of(drawn, old)
        rollouts.columns["difficulty"] = torch.as_tensor(table["difficulty"])[drawn.prompt]
        rollouts.columns.written.discard("difficulty")
        add_request_columns(stack, rollouts, table, drawn)
        credit = stack.credit(rollouts, None)
        self.gradient = {}
        metrics = trainer.update(rollouts, credit).as_dict()
        stack.end_step(rollouts, credit, trainer.engine)
        trainer.done += 1
        return Result(
            credit.advantages * drawn.mask, weights_of(credit, drawn.mask), metrics.get("loss", 0.0), self.gradient,
            {name: value for name, value in stack.metrics.as_dict().items() if name.startswith("rlplugins/")},
        )  # fmt: skip


def add_request_columns(stack: Stack, rollouts: Rollouts, pool: Prompts, drawn: Drawn) -> None:
    """Give the rows the columns that hooks write on their requests, although their texts were drawn without."""
    positions, counts = torch.unique_consecutive(drawn.prompt, return_counts=True)
    requests = stack.rewrite_prompts(Requests.of(pool.select(positions), counts))
    for name in requests.columns.written:
        rollouts[name] = requests.columns[name]


def reference_of(drawn: Drawn, old: Tensor) -> Tensor:
    """Log-probs (B, T) of a reference policy that is near, and on some tokens far from the old one."""
    return (old + 0.5 * drawn.noise.roll(1, 0) ** 3 - 2.5 * (drawn.noise > 0.8)) * drawn.mask


def weights_of(credit: Credit, mask: Tensor) -> Tensor:
    """W = w u m, (B, T)."""
    w = credit.weights if credit.weights is not None else 1.0
    u = credit.token_weights if credit.token_weights is not None else 1.0
    return mask * w * u


def assert_close(mine: Result, other: Result, tolerance: float = 1e-5) -> None:
    """Advantages, weights, loss and gradient agree, relative to the largest of each where that is above 1."""
    for name in ("advantages", "weights"):
        assert torch.allclose(getattr(mine, name), getattr(other, name), rtol=tolerance, atol=tolerance), name
    assert abs(mine.loss - other.loss) <= tolerance * max(1.0, abs(other.loss)), (mine.loss, other.loss)
    for name, value in other.metrics.items():  # searches and sums over the mini-batch show here first
        found = mine.metrics[name]
        assert (found != found and value != value) or abs(found - value) <= max(1e-5, 1e-4 * abs(value)), name
    assert set(mine.gradient) == set(other.gradient)
    for name, gradient in mine.gradient.items():
        assert torch.allclose(gradient, other.gradient[name], rtol=tolerance, atol=tolerance), name
