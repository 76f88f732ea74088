"""Every pair of plugins that the matrix says runs together, on one batch that the local trainer recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import matrix, stack, update
from rlplugins.hookspecs import HOOKS
from rlplugins.plan import REWARDS
from rlplugins.registry import Entry
from rlplugins.rollouts import POLICY, Prompts, Requests, Rollouts
from rlplugins.stack import Stack, StackConfig
from rlplugins.testing import start
from rlplugins_local import arithmetic
from rlplugins_local.adapter import build_stack
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy
from rlplugins_local.run import LocalTrainer

CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
PLUGINS = sorted(file.parent.name for file in CONTRIB.glob("[a-z]*/pyproject.toml"))
PAIRS = [
    pair for pair in matrix.pairs(PLUGINS)
    if pair.runs and Stack([pair.first, pair.second]).plan.objective == REWARDS  # others have a run on pairs of responses
]  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic-reward-weighting": {"weights": {"rank_0": 0.5, "rank_1": 0.5}},
    "rank-grpo": {"n_ranks": 3, "separators": {14: 1}, "end_tokens": [1]},  # 14 is the token "="
}
"""Options without which a plugin cannot read this batch."""


@dataclass
class Recorded:
    """A batch of the local trainer, and log-probs and entropies of a policy that has moved since."""

    pool: Prompts
    rollouts: Rollouts
    log_probs: Tensor
    entropy: Tensor


def score(prompt: str, response: str, **columns: Any) -> dict[str, float]:
    """A score in {0, 1} that an untrained model gets in some of its draws, with three components."""
    parts = [float(response[place : place + 1] in tuple("02468")) for place in range(3)]
    return {"score": parts[0], **{f"rank_{place}": part for place, part in enumerate(parts)}}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Eight responses to each of eight prompts by an untrained model, with every column that costs a pass."""
    folder = tmp_path_factory.mktemp("task")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    arithmetic.write_prompts(folder, seed=0)
    config = TrainConfig(
        model=folder / "model", data=folder / "train.jsonl", reward=f"{Path(__file__)}:score", advantage="gae", kl="k3",
        batch_size=64, group_size=8, max_new_tokens=8, output=folder / "run",
    )  # fmt: skip
    assert config.data is not None
    lines = [json.loads(line) | {"demonstration": "2468"} for line in config.data.read_text().splitlines()]
    config.data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = PromptFile(config.data)
    policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
    scorer = Scorer(config.reward, list(data.columns))
    trainer = LocalTrainer(config, build_stack(config, StackConfig(), data.columns), policy, data, None, scorer)
    trainer.needs_entropy = True
    trainer.stack.begin_step(0, config.steps)
    trainer.engine.begin_step(0)
    rollouts = trainer.add_passes(trainer.draw())
    rollouts = replace(rollouts, rollout_log_probs=rollouts.old_log_probs)
    noise = torch.randn(rollouts.mask.shape, generator=torch.Generator().manual_seed(0))
    old, entropy = rollouts["old_log_probs"], rollouts["entropy"]
    assert isinstance(old, Tensor) and isinstance(entropy, Tensor)
    return Recorded(trainer.pool, rollouts, (old + 0.3 * noise * rollouts.mask).clamp(max=0), entropy)


def made(names: tuple[str, ...], recorded: Recorded) -> tuple[Stack, Rollouts]:
    """The stack of these plugins in its first step, and the rows that fit its group size and that it keeps."""
    plugins: list[Entry] = [{name: OPTIONS[name]} if name in OPTIONS else name for name in names]
    size = 1 if Stack(plugins).group_sizes[1] == 1 else 8
    opened = start(plugins, pool=recorded.pool, group_size=size)
    rollouts = recorded.rollouts.select(torch.arange(0, 64, 8 // size))
    chosen = recorded.pool.select(recorded.pool.positions(rollouts.prompt_rows[::size]))
    requests = opened.rewrite_prompts(Requests.of(chosen, torch.full((len(chosen),), size)))
    for name in requests.columns.written:  # the texts were drawn without the hooks, but their columns are there
        rollouts[name] = requests.columns[name]
    if "segment-po" in names:  # what its `extend_rollouts` writes: two segments, and the values before them
        rollouts["segment_po_starts"] = torch.tensor([[1, 3]]).repeat(len(rollouts), 1)
        rollouts["segment_po_values"] = torch.tensor([[0.25, 0.5]]).repeat(len(rollouts), 1)
    rollouts["place"] = torch.arange(0, 64, 8 // size)
    return opened, opened.filter_rollouts(rollouts)


def loss_and_gradient(names: tuple[str, ...], recorded: Recorded, micro_batches: int) -> tuple[Tensor, Tensor]:
    opened, rollouts = made(names, recorded)
    credit = opened.credit(rollouts)
    log_probs, entropy = recorded.log_probs[rollouts["place"]], recorded.entropy[rollouts["place"]]
    mini = opened.mini_batch(opened.update_columns(rollouts, credit), kinds=rollouts.kinds, log_probs=log_probs)
    leaf, total = log_probs.clone().requires_grad_(), torch.zeros(())
    for part in torch.arange(len(rollouts)).chunk(micro_batches):
        loss = mini.loss(leaf[part], part, entropy=entropy[part]).total
        if loss.requires_grad:
            loss.backward()
        total = total + loss.detach()
    return total, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@pytest.mark.parametrize("names", [(pair.first, pair.second) for pair in PAIRS], ids="+".join)
def test_pair(names: tuple[str, str], recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[str] = set()
    for module in (stack, update):
        original = module.call

        def spy(item: Any, scope: Any, original: Any = original) -> Any:
            called.add(str(item))
            return original(item, scope)

        monkeypatch.setattr(module, "call", spy)
    whole, gradient = loss_and_gradient(names, recorded, micro_batches=1)
    assert whole.isfinite() and gradient.isfinite().all()
    assert gradient.any(), "nothing is learnt from this batch"
    opened, _ = made(names, recorded)
    wrappers = {item for items in opened.plan.wrappers.values() for item in items}  # run around a value, not by a call
    said = {
        str(item) for item in opened.plan.everything_running()
        if HOOKS[item.hook].phase in ("credit", "update") and item.plugin.name in names and item not in wrappers
        and item.kind == POLICY and item.hook != "forward"  # the batch has rows of one kind, and no model
    }  # fmt: skip
    assert said <= called, f"said to run, but never called: {said - called}"
    parts, gradient_of_parts = loss_and_gradient(names, recorded, micro_batches=4)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of_parts, gradient, rtol=1e-4, atol=1e-7)
