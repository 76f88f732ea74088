"""Every contrib plugin's credit phase and loss, beside the memory traffic that their inputs and outputs force.

The bound reads every tensor of one number per token that the phase must see, block by block into a buffer that stays in
the cache, and writes every such tensor that it must make, once. What has one number per response costs nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.report import Line, seeded
from rlplugins.registry import Entry
from rlplugins.rollouts import Requests, Rollouts
from rlplugins.stack import Stack
from rlplugins.testing import make_pool, make_rollouts, start

RESPONSES, GROUPS, TOKENS = 16_384, 1_024, 4_096
MICRO_BATCH = 64
BLOCK = 2**18
SHAPE = f"{RESPONSES:,} x {TOKENS:,}"
CREDIT = f"Credit phase of every method, {SHAPE}, beside its memory traffic"
LOSS = f"Loss of every method, {SHAPE}, forward and backward in micro-batches of {MICRO_BATCH} rows, beside its memory traffic"


@dataclass(frozen=True)
class Method:
    """What a method must read and write, one number per token each.

    Attributes:
        credit: columns that its credit phase reads beside the mask.
        advantages: whether it makes one advantage or weight per token, which is written and then read by the loss.
        update: columns that its loss reads beside the mask, the log-probs and the old log-probs.
        entropy_gradient: whether a gradient goes to the current entropy.
        options: of the plugin.
        columns: what its `extend_rollouts` writes of each row, the same for all.
        group_size: responses per prompt.
    """

    credit: tuple[str, ...] = ()
    advantages: bool = False
    update: tuple[str, ...] = ()
    entropy_gradient: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    group_size: int = RESPONSES // GROUPS


METHODS: dict[str, Method] = {
    "aepo": Method(),
    "bapo": Method(),
    "bnpo": Method(),
    "chord": Method(),
    "critique-grpo": Method(),
    "d3s": Method(credit=("entropy",), advantages=True),
    "dynamic-reward-weighting": Method(options={"weights": {"first": 0.5, "second": 0.5}}),
    "epo": Method(credit=("entropy",), update=("entropy",), entropy_gradient=True),
    "grpo-d": Method(update=("ref_log_probs",)),
    "gtpo": Method(credit=("entropy",), advantages=True),
    "hapo-history": Method(credit=("responses",)),
    "hapo-token": Method(credit=("entropy",), advantages=True, update=("entropy",)),
    "hbpo": Method(),
    "knapsack": Method(),
    "p3o": Method(credit=("old_log_probs", "ref_log_probs")),
    "pcl": Method(),
    "pf-ppo": Method(),
    "prefix-grouper": Method(),
    "rank-grpo": Method(
        credit=("responses",), advantages=True, options={"n_ranks": 3, "separators": {5: 1}, "end_tokens": [1]}
    ),
    "rec": Method(),
    "riskpo": Method(),
    "scaf-grpo": Method(),
    "sec": Method(),
    "segment-po": Method(
        credit=("old_log_probs",),
        advantages=True,
        update=("ref_log_probs",),
        columns={"segment_po_starts": [1, 512], "segment_po_values": [0.25, 0.5]},
    ),
    "spo": Method(group_size=1),
    "stratified-grpo": Method(),
}
CONTRIB = Path(__file__).resolve().parent.parent / "contrib"
PREFERENCES = {"rdpo"}
"""Methods of pairs, whose loss is a few numbers per pair."""
SLUGS = sorted({file.parent.name for file in CONTRIB.glob("[a-z]*/pyproject.toml")} - PREFERENCES)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """Sixteen responses to each of 1,024 prompts, a quarter of 4,096 tokens long at least."""
    source = seeded()
    lengths = torch.randint(TOKENS // 4, TOKENS + 1, (RESPONSES,), generator=source)
    mask = torch.arange(TOKENS) < lengths[:, None]
    per_token = {
        name: torch.rand(mask.shape, generator=source).mul_(mask)
        for name in ("old_log_probs", "ref_log_probs", "entropy")
    }
    for name in ("old_log_probs", "ref_log_probs"):
        per_token[name].neg_()
    components = torch.randint(0, 2, (RESPONSES, 3), generator=source).float()
    tokens = torch.randint(2, 32, mask.shape, generator=source, dtype=torch.int32).mul_(mask)
    return make_rollouts(
        components[:, 0], torch.arange(RESPONSES) // (RESPONSES // GROUPS), mask=mask, responses=tokens,
        components=components, component_names=("first", "second", "third"), **per_token,
    )  # fmt: skip


def traffic(reads: Iterable[Tensor], writes: int) -> Callable[[], None]:
    """Reads these tensors once, and writes so many tensors of float32 of their size once."""
    read = [tensor.reshape(-1).view(torch.uint8) for tensor in reads]
    written = torch.empty(RESPONSES * TOKENS * 4, dtype=torch.uint8)
    buffer = torch.empty(BLOCK, dtype=torch.uint8)

    def run() -> None:
        for tensor in read:
            for block in tensor.split(BLOCK):
                buffer[: len(block)].copy_(block)
        for _ in range(writes):
            for block in written.split(BLOCK):
                block.fill_(0)

    return run


def opened(slug: str, rollouts: Rollouts) -> tuple[Stack, Rollouts]:
    method = METHODS[slug]
    plugins: list[Entry] = [{slug: method.options}]
    pool = make_pool(RESPONSES, {"demonstration": ["an answer"] * RESPONSES})
    stack = start(plugins, pool=pool, group_size=method.group_size, trainer=None)
    if method.group_size == 1:
        rollouts = rollouts.select(torch.arange(RESPONSES))
        rollouts.groups = torch.arange(RESPONSES)
    each = RESPONSES // GROUPS
    requests = stack.rewrite_prompts(Requests.of(make_pool(GROUPS), torch.full((GROUPS,), each)))
    rows = replace(rollouts, columns=requests.columns)
    for name, values in method.columns.items():
        rows[name] = torch.tensor([values]).repeat(RESPONSES, 1)
    return stack, rows


@pytest.mark.parametrize("slug", SLUGS)
def test_credit(slug: str, rollouts: Rollouts, by_turns, record) -> None:
    stack, rows = opened(slug, rollouts)
    method = METHODS[slug]
    reads = [rollouts.mask, *(getattr(rollouts, name) for name in method.credit)]
    measure = by_turns(lambda: stack.credit(rows), traffic(reads, int(method.advantages)), rounds=5)
    record(Line(CREDIT, slug, "its memory traffic", measure.shares, 1.5))


@pytest.mark.parametrize("slug", SLUGS)
def test_loss(slug: str, rollouts: Rollouts, by_turns, record) -> None:
    stack, rows = opened(slug, rollouts)
    method = METHODS[slug]
    columns = stack.update_columns(rows, stack.credit(rows))
    old = rollouts.old_log_probs
    log_probs = old * 1.01
    leaves = [part.requires_grad_() for part in log_probs.split(MICRO_BATCH)]
    entropies = [part.clone().requires_grad_(method.entropy_gradient) for part in rollouts.entropy.split(MICRO_BATCH)]
    takes_entropy = stack.takes("entropy", "update")

    def update() -> None:
        mini = stack.mini_batch(columns, log_probs=log_probs)
        for place, (leaf, entropy) in enumerate(zip(leaves, entropies, strict=True)):
            part = slice(place * MICRO_BATCH, (place + 1) * MICRO_BATCH)
            loss = mini.loss(leaf, part, entropy=entropy if takes_entropy else None).total
            if loss.requires_grad:
                loss.backward()
            leaf.grad = entropy.grad = None

    reads = [rollouts.mask, log_probs, old, *(getattr(rollouts, name) for name in method.update)]
    reads += [rollouts.entropy] * method.advantages  # stands for the advantages
    measure = by_turns(update, traffic(reads, 1 + method.entropy_gradient), rounds=3)
    record(Line(LOSS, slug, "its memory traffic", measure.shares, 1.5))
