"""The examples of docs/hooks.md run, and each changes what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from rlplugins import Requests, Sampling, Stack
from rlplugins.hookspecs import HOOKS
from rlplugins.pairs import SIDES
from rlplugins.stack import Credit
from rlplugins.testing import make_pool, make_rollouts, start
from rlplugins.testing.pairs import make_pairs

DOCS = Path(__file__).resolve().parent.parent / "docs"
_specification = importlib.util.spec_from_file_location("hook_examples", DOCS / "hook_examples.py")
assert _specification is not None and _specification.loader is not None
examples = importlib.util.module_from_spec(_specification)
_specification.loader.exec_module(examples)

LINES = {  # what a stack file must say beside the plugin
    "value_targets": {"owners": {"compute_advantages": "gae"}},
    "segment_tokens": {"owners": {"compute_advantages": "difference"}},
}
GENERATED = ("prompt_weights", "choose_prompts", "allocate_rollouts", "rewrite_prompts", "sampling_params")


def test_every_hook_has_an_example_that_implements_it() -> None:
    assert list(examples.EXAMPLES) == list(HOOKS)
    for hook, example in examples.EXAMPLES.items():
        assert hook in vars(example)


def one_step(stack: Stack) -> tuple[Credit, torch.Tensor, list[object]]:
    """Everything that a trainer calls, on twelve rows of three prompts; what the engine would be asked comes last."""
    pool = stack._pool
    assert pool is not None
    chosen = pool.select(stack.choose_prompts(pool, 3))
    counts = stack.allocate_rollouts(chosen, 12)
    requests = stack.rewrite_prompts(Requests.of(chosen, counts))
    sampling = stack.sampling_params(requests, Sampling.of(len(requests), 1.0, 6))
    if stack.claims("process_logits"):
        stack.process_logits(torch.ones(len(requests), 11), sampling.numbers)
    assert stack.reference_policy() in ("initial", "current")
    torch.manual_seed(0)
    rows = make_rollouts(
        [0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1],
        requests.prompt,
        lengths=[6, 5, 4, 3, 2, 6, 6, 1, 4, 4, 4, 4],
        pool=chosen,
        components=torch.rand(12, 2),
        entropy=torch.rand(12, 6),
        values=torch.rand(12, 6),
        ref_log_probs=-torch.rand(12, 6),
    )
    rows = stack.filter_rollouts(stack.extend_rollouts(rows, None))  # type: ignore[arg-type]
    credit = stack.credit(rows)
    mini = stack.mini_batch(stack.update_columns(rows, credit))
    moved = torch.randn(12, 6)[: len(rows)] * rows.mask
    log_probs = (rows.old_log_probs + moved).requires_grad_()
    loss = mini.loss(log_probs, entropy=rows.entropy).total
    stack.end_step(rows, credit)
    stack.validated({"validation/reward": 0.5})
    shared = sorted(stack.step.shared_by_all().items())
    asked = [*requests.prefixes, sampling.temperature.tolist(), counts.tolist(), chosen.texts, len(rows), shared]
    return credit, loss.detach(), asked


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if HOOKS[hook].phase != "preferences" and hook != "forward"])
def test_the_example_runs_and_has_an_effect(hook: str) -> None:
    lines = LINES.get(hook, {})
    stack = start([examples.EXAMPLES[hook]()], pool=make_pool(8), **lines)
    plain = start([], pool=make_pool(8), **lines)
    credit, loss, asked = one_step(stack)
    credit_plain, loss_plain, asked_plain = one_step(plain)
    same_shape = credit.advantages.shape == credit_plain.advantages.shape
    changed = [
        not same_shape or not torch.equal(credit.advantages, credit_plain.advantages),
        credit.value_targets is not None and not torch.equal(credit.value_targets[0], credit_plain.value_targets[0]),
        not torch.equal(loss, loss_plain),
        asked != asked_plain,
        any(plugin.state.as_dict() for plugin in stack.plugins),
        hook in ("process_logits", "reference_policy"),  # seen by the engine and by the next reference only
    ]
    assert any(changed), "the example does nothing"


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if HOOKS[hook].phase == "preferences"])
def test_the_example_changes_the_loss_on_pairs(hook: str) -> None:
    pairs = make_pairs([4, 1, 3], [1, 2, 3])
    torch.manual_seed(0)
    log_probs, reference = ({side: -torch.rand(3, 4) for side in SIDES} for _ in range(2))
    losses = []
    for plugins in ([examples.EXAMPLES[hook]()], []):
        stack = start(plugins, owners={"preference_loss": "dpo"} if hook == "build_preferences" or not plugins else {})
        columns = stack.pair_columns(stack.build_preferences(pairs))
        rows = torch.arange(3) if len(columns["chosen_mask"]) == 3 else torch.tensor([1, 2])
        columns |= {f"{side}_ref_log_probs": reference[side][rows] for side in SIDES}
        losses.append(stack.pair_mini_batch(columns).loss(*(log_probs[side][rows] for side in SIDES)).total)
    assert not torch.equal(*losses)
