"""What the credit phase and the loss allocate."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlplugins import Plugin, hookimpl
from rlplugins.testing import make_rollouts, start

ROWS, TOKENS = 32, 8192


class Weighing(Plugin):
    """Weights per response, which stay (B, 1)."""

    name = "weighing"

    @hookimpl
    def select_samples(self, advantages):
        return advantages.abs() + 1


def rollouts(**fields):
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (ROWS, 1), generator=torch.Generator().manual_seed(0))
    scores = torch.arange(ROWS) % 3 / 2
    return make_rollouts(scores, torch.arange(ROWS) // 8, mask=mask, **fields)


def held(run):
    """Bytes that torch holds during `run`, beyond those before, at every allocation; and the largest allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return sizes.cumsum(0), int(sizes.max())


@pytest.mark.parametrize("plugins", [[], ["grpo"], ["dr_grpo"], ["rloo"], [Weighing(), "rloo"]])
def test_methods_of_one_number_per_response_make_none_per_token(plugins):
    stack, step = start(plugins), rollouts()
    _, largest = held(lambda: stack.credit(step))
    assert largest < ROWS * TOKENS  # not even one byte per token


def test_a_method_per_token_is_seen_by_this_measure():
    stack, step = start(["gae"]), rollouts(values=torch.zeros(ROWS, TOKENS))
    _, largest = held(lambda: stack.credit(step))
    assert largest >= 4 * ROWS * TOKENS


def test_a_micro_batch_is_freed_before_the_next_one():
    stack, step = start(["grpo"]), rollouts()
    mini = stack.mini_batch(stack.update_columns(step, stack.credit(step)))
    log_probs = torch.zeros(ROWS, TOKENS, requires_grad=True)

    def peak(micro_batches):
        def run():
            for _ in range(micro_batches):
                mini.loss(log_probs).total.detach()

        return int(held(run)[0].max())

    peak(1)
    gc.collect()
    gc.disable()  # nothing may wait for it
    try:
        assert peak(5) < 1.1 * peak(1)
    finally:
        gc.enable()
