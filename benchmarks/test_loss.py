"""The loss through the stack, beside the same loss written by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.report import Line, allocations, seeded
from rlplugins.testing import make_rollouts, start

PART = "Loss: PPO-clip, token mean; opening the mini-batch included"


def textbook(ratio: Tensor, advantages: Tensor) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))


def same_formula(ratio: Tensor, advantages: Tensor) -> Tensor:
    """As the built-in computes it, so that what remains is what the stack costs."""
    negative = advantages < 0
    return -advantages * ratio.clamp(torch.where(negative, 0.8, 0.0), torch.where(negative, torch.inf, 1.2))


BY_HAND = {"as in the paper": textbook, "the built-in's formula": same_formula}


def by_hand(formula: str, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    ratio = (log_probs - old_log_probs).clamp(-20, 20).exp()
    weights = mask.float()
    return (BY_HAND[formula](ratio, advantages) * weights).sum() / weights.sum()


def losses(rows: int, tokens: int, backward: bool, formula: str) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The stack's loss and the one by hand, as functions that compute them once more."""
    source = seeded()
    mask = torch.arange(tokens) < torch.randint(tokens // 4, tokens + 1, (rows, 1), generator=source)
    old = torch.randn(rows, tokens, generator=source) * mask
    scores = torch.randint(0, 2, (rows,), generator=source).float()
    rollouts = make_rollouts(scores, torch.arange(rows) // 8, mask=mask, old_log_probs=old)
    stack = start(["grpo"])
    columns = stack.update_columns(rollouts, stack.credit(rollouts))
    leaf = (old + 0.1 * torch.randn(rows, tokens, generator=source) * mask).requires_grad_()

    def run(loss: Callable[[], Tensor]) -> Tensor:
        value = loss()
        if backward:
            value.backward()
            leaf.grad = None
        return value.detach()

    return (
        lambda: run(lambda: stack.mini_batch(columns).loss(leaf).total),
        lambda: run(lambda: by_hand(formula, leaf, old, columns["advantages"], mask)),
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("formula", BY_HAND)
@pytest.mark.parametrize(("rows", "tokens"), [(64, 4_096), (8, 1_024)])
def test_loss(rows, tokens, backward, formula, by_turns, record):
    ours, theirs = losses(rows, tokens, backward, formula)
    torch.testing.assert_close(ours(), theirs())
    what = f"{rows} x {tokens:,}, {'forward and backward' if backward else 'forward'}"
    measure = by_turns(ours, theirs, rounds=60, repeat=4)
    record(Line(PART, what, f"by hand, {formula}", measure.shares, 1.03))


@pytest.mark.parametrize("formula", BY_HAND)
@pytest.mark.parametrize(("rows", "tokens"), [(64, 4_096), (8, 1_024)])
def test_peak_memory(rows, tokens, formula, benchmark, record):
    ours, theirs = losses(rows, tokens, True, formula)
    peaks = benchmark.pedantic(lambda: (allocations(ours)[0], allocations(theirs)[0]))
    record(Line(PART, f"{rows} x {tokens:,}, peak memory", f"by hand, {formula}", [peaks[0] / peaks[1]], 1))
