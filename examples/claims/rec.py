"""REC (arXiv 2509.24203): with stale rollouts it is clipping that matters, not importance weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from claims import Claim, report

from rlplugins.testing import make_rollouts, start

PROMPTS, ARMS, DRAWS = 16, 3, 8
SYNC = 20  # steps between two copies of the policy to the sampler

CLAIM = Claim(
    plugin="rec",
    found="Off-policy without clipping training collapses; one-side clipping with and without importance weights learns "
    "alike, and a wide range (0.6, 2.0) learns faster.",
    measured="expected reward of a softmax bandit with 16 prompts of 3 arms (success probabilities uniform in [0, 1]) over "
    "the last 100 of 200 steps, 8 draws per prompt and step from a policy that is renewed every 20 steps",
    expected="above",
)

ONE_SIDE = {"clip_mode": "one-side"}
VARIANTS: Mapping[str, dict[str, Any]] = {
    "no clip": {},
    "one-side": ONE_SIDE,
    "one-side, weighted": ONE_SIDE | {"weight": "importance_sampling"},
    "one-side, (0.6, 2.0)": ONE_SIDE | {"eps_low": 0.6, "eps_high": 2.0},
    "RED-Drop, one-side": ONE_SIDE | {"drop": "balance"},
    "RED-Weight, one-side": ONE_SIDE | {"weight": "advantage"},
}


def train(options: dict[str, Any], seed: int, steps: int) -> float:
    """Mean expected reward over prompts and the second half of the steps."""
    source = torch.Generator().manual_seed(seed)
    chances = torch.rand(PROMPTS, ARMS, generator=source)
    logits = torch.zeros(PROMPTS, ARMS, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    stack = start([{"rec": options}], group_size=DRAWS)
    prompts = torch.arange(PROMPTS).repeat_interleave(DRAWS)
    found = []
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        if number % SYNC == 0:
            old = logits.detach().log_softmax(1)
        arms = torch.multinomial(old.exp(), DRAWS, replacement=True, generator=source).flatten()
        scores = (torch.rand(len(arms), generator=source) < chances[prompts, arms]).float()
        rollouts = make_rollouts(scores, prompts, tokens=1, old_log_probs=old[prompts, arms][:, None])
        log_probs = logits.log_softmax(1)[prompts, arms][:, None]
        mini = stack.mini_batch(stack.update_columns(rollouts, stack.credit(rollouts)), log_probs=log_probs.detach())
        optimiser.zero_grad()
        mini.loss(log_probs).total.backward()
        optimiser.step()
        found.append(float((logits.detach().softmax(1) * chances).sum(1).mean()))
    return sum(found[steps // 2 :]) / (steps - steps // 2)


def measure(seed: int, smoke: bool) -> Mapping[str, float]:
    """One run of each variant on the same bandit."""
    return {variant: train(options, seed, 5 if smoke else 200) for variant, options in VARIANTS.items()}


if __name__ == "__main__":
    report(CLAIM, measure)
