"""P3O (arXiv 2310.00212): a reward model's own offset for every prompt does not matter to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from claims import Claim, report

from rlplugins.testing import make_rollouts, start

PROMPTS, ARMS, DRAWS = 8, 5, 2
OFFSET = 5.0  # standard deviation over prompts; the rewards themselves have 1
EPOCHS = 3

CLAIM = Claim(
    plugin="p3o",
    found="P3O reaches a better trade-off of reward and KL than PPO, and rewards that differ by prompt do not disturb it.",
    measured="expected reward of a softmax bandit with 8 prompts of 5 arms, with an offset N(0, 5^2) on all rewards of a "
    "prompt (arms: N(0, 1)), after 150 steps of 2 draws per prompt, in units of an arm's standard deviation",
    expected="above",
)

PPO: dict[str, Any] = {"owners": {"baseline": "zero", "advantage_scale": "one"}}
V1 = {"p3o": {"version": "V1", "beta": 0.0}}
V2 = {"p3o": {"version": "V2", "beta": 0.0}}


def train(plugins: list[Any], lines: dict[str, Any], offset: float, seed: int, steps: int) -> float:
    """Mean over prompts of the trained policy's expected reward, without the offset."""
    source = torch.Generator().manual_seed(seed)
    rewards = torch.randn(PROMPTS, ARMS, generator=source)
    shift = offset * torch.randn(PROMPTS, 1, generator=source)
    logits = torch.zeros(PROMPTS, ARMS, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    stack = start(plugins, group_size=DRAWS, **lines)
    prompts = torch.arange(PROMPTS).repeat_interleave(DRAWS)
    for number in range(steps):
        stack.begin_step(number, steps, seed)
        old = logits.detach().log_softmax(1)
        arms = torch.multinomial(old.exp(), DRAWS, replacement=True, generator=source).flatten()
        scores = (rewards + shift)[prompts, arms]
        rollouts = make_rollouts(scores, prompts, tokens=1, old_log_probs=old[prompts, arms][:, None])
        columns = stack.update_columns(rollouts, stack.credit(rollouts))
        for _ in range(EPOCHS):
            log_probs = logits.log_softmax(1)[prompts, arms][:, None]
            loss = stack.mini_batch(columns, log_probs=log_probs.detach()).loss(log_probs).total
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return float((logits.detach().softmax(1) * rewards).sum(1).mean())


def measure(seed: int, smoke: bool) -> Mapping[str, float]:
    """One run of each on the same bandit."""
    steps = 5 if smoke else 150
    return {
        "PPO without baseline": train([], PPO, OFFSET, seed, steps),
        "PPO, no offsets": train([], PPO, 0.0, seed, steps),
        "P3O V1": train([V1], {}, OFFSET, seed, steps),
        "P3O V2": train([V2], {}, OFFSET, seed, steps),
        "P3O V2, no offsets": train([V2], {}, 0.0, seed, steps),
    }


if __name__ == "__main__":
    report(CLAIM, measure)
