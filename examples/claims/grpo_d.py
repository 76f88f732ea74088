"""GRPO-D on a table with a poor reference: does the KL first grow and then shrink, and what does it cost?

Eight prompts have softmax policies of their own over 10 actions, of which one is right; the reference, from which training
starts, prefers a wrong one. Every step makes one step of SGD on the stack's loss. Success rates and KL are exact.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from claims import Claim, interval, report

from rlplugins.testing import make_rollouts, start

PROMPTS, ACTIONS, GROUP, STEPS = 8, 10, 16, 300
PREFERRED = 2.0
LEARNING_RATE = 4.0
VARIANTS: dict[str, dict[str, Any]] = {
    f"constant {value:g}": {"owners": {"kl_penalty": {"k3": {"coefficient": value}}}} for value in (0.04, 0.01, 0.1)
} | {"GRPO-D": {"plugins": ["grpo-d"]}}
BESIDE: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
CLAIM = Claim(
    plugin="grpo-d",
    found="Qwen2-VL-2B: accuracy of 76.5 on counting and 34.35 on geometry, against 64.5 and 30.24 of GRPO with a constant KL "
    "weight.",
    measured="KL to a poor reference at the end of 300 steps over the largest before, on a table of 8 prompts with 10 actions",
    expected="below",
    note="The schedule does what it says, but the accuracy gained over a constant weight does not show: on this table a "
    "larger weight at the end only costs success, 0.974 against 0.989 with a constant 0.04.",
)


def train(variant: str, seed: int, steps: int) -> dict[str, float]:
    """The KL at the end over its largest value; both, and the success rate at the end."""
    source = torch.Generator().manual_seed(seed)
    reference = 0.5 * torch.randn((PROMPTS, ACTIONS), generator=source)
    reference[:, 1] += PREFERRED
    logits = reference.clone().requires_grad_()
    log_reference = torch.log_softmax(reference, 1)
    optimiser = torch.optim.SGD([logits], lr=LEARNING_RATE)
    options = dict(VARIANTS[variant])
    plugins = ["grpo", *options.pop("plugins", [])]
    stack = start(plugins, total_steps=steps, group_size=GROUP, seed=seed, **options)
    prompts = torch.arange(PROMPTS).repeat_interleave(GROUP)
    divergence = []
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        log_policy = torch.log_softmax(logits, 1)
        actions = torch.multinomial(log_policy.detach().exp(), GROUP, replacement=True, generator=source).flatten()
        log_probs = log_policy[prompts, actions][:, None]
        rollouts = make_rollouts((actions == 0).float(), prompts, tokens=1, old_log_probs=log_probs.detach(),
                                 ref_log_probs=log_reference[prompts, actions][:, None])  # fmt: skip
        credit = stack.credit(rollouts)
        optimiser.zero_grad()
        stack.mini_batch(stack.update_columns(rollouts, credit)).loss(log_probs).total.backward()
        optimiser.step()
        stack.end_step(rollouts, credit)
        log_policy = torch.log_softmax(logits.detach(), 1)
        divergence.append(float((log_policy.exp() * (log_policy - log_reference)).sum(1).mean()))
    late = divergence[-1]
    success = float(log_policy.exp()[:, 0].mean())
    return {"ratio": late / max(divergence), "largest KL": max(divergence), "KL": late, "success rate": success}


def measure(seed: int, smoke: bool) -> dict[str, float]:
    """How far the KL fell back under each variant; the rest is kept beside."""
    found = {}
    for variant in VARIANTS:
        values = train(variant, seed, 10 if smoke else STEPS)
        found[variant] = values.pop("ratio")
        for name, value in values.items():
            BESIDE[name][variant].append(value)
    return found


if __name__ == "__main__":
    report(CLAIM, measure)
    for name, variants in BESIDE.items():
        print(f"{name}:" if name == "largest KL" else f"{name} at the end:")
        for variant, values in variants.items():
            mean, width = interval(np.array(values))
            print(f"  {variant:28} {mean:10.4g} ± {width:.2g}")
