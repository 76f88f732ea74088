"""One small plugin per hook: the examples of `hooks.md`, which the tests run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlplugins import Pairs, Plugin, Prompts, Requests, Rollouts, Sampling, Step, hookimpl, needs, ops


class Favour(Plugin):
    """Draws prompts that were not visited yet ten times as often."""

    name = "favour"

    @hookimpl
    def prompt_weights(self, prompts: Prompts) -> Tensor:
        return torch.where(self.table.visits[prompts.rows] == 0, 10.0, 1.0)


class InOrder(Plugin):
    """Takes the prompts in the order of the file."""

    name = "in-order"

    def init_state(self, run: Any) -> dict[str, Any]:
        return {"next": 0}

    @hookimpl
    def choose_prompts(self, prompts: Prompts, count: int) -> Tensor:
        chosen = (self.state.next + torch.arange(count)) % len(prompts)
        self.state.next = (self.state.next + count) % len(prompts)
        return chosen


class FirstGetsMore(Plugin):
    """Two responses for every prompt, what is left of the budget for the first."""

    name = "first-gets-more"

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts, budget: int) -> Tensor:
        counts = torch.full((len(prompts),), 2)
        counts[0] += budget - counts.sum()
        return counts


class ThinkFirst(Plugin):
    """Every response begins with words that we choose, which are trained like its own."""

    name = "think-first"
    needs = (needs.RESPONSE_PREFIX,)

    @hookimpl
    def rewrite_prompts(self, requests: Requests) -> Requests:
        return replace(requests, prefixes=["Let us think. "] * len(requests))


class WarmStart(Plugin):
    """Draws hotter in the first half of the run."""

    name = "warm-start"

    @hookimpl
    def sampling_params(self, sampling: Sampling, step: Step) -> Sampling:
        return replace(sampling, temperature=sampling.temperature * (1.2 if step.progress < 0.5 else 1.0))


class NoRepeat(Plugin):
    """Halves the logits of one token; the number 7.0 travels with every request."""

    name = "no-repeat"

    @hookimpl
    def sampling_params(self, sampling: Sampling) -> Sampling:
        return replace(sampling, numbers=sampling.numbers | {"token": torch.full((len(sampling),), 7.0)})

    @hookimpl
    def process_logits(self, logits: Tensor, numbers: dict[str, Tensor]) -> Tensor:
        chosen = torch.arange(logits.shape[1], device=logits.device) == numbers["token"][:, None]
        return torch.where(chosen, logits / 2, logits)


class DropLast(Plugin):
    """Removes the last row of the step."""

    name = "drop-last"
    breaks = frozenset({"whole_groups", "complete_groups", "equal_groups"})

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts) -> Rollouts:
        return rollouts.select(torch.arange(len(rollouts) - 1))


class MixedGroupsOnly(Plugin):
    """Drops groups in which all scores are equal: they have advantage 0 anyway."""

    name = "mixed-groups-only"
    breaks = frozenset({"whole_groups"})

    @hookimpl
    def filter_rollouts(self, scores: Tensor, groups: Tensor) -> Tensor:
        return (ops.group_std(scores, groups) > 0).float()


class ShareBest(Plugin):
    """Shares the best score of the step with later hooks."""

    name = "share-best"

    @hookimpl
    def prepare_step(self, rollouts: Rollouts, step: Step) -> None:
        step.share("best", float(rollouts.scores.max()))


class MeanOfParts(Plugin):
    """The reward is the mean of the reward function's components."""

    name = "mean-of-parts"

    @hookimpl
    def combine_rewards(self, components: Tensor) -> Tensor:
        return components.mean(1, keepdim=True)


class LengthPenalty(Plugin):
    """Takes 0.01 per token from the reward."""

    name = "length-penalty"
    breaks = frozenset({"unit_rewards"})

    @hookimpl
    def shape_rewards(self, rewards: Tensor, mask: Tensor) -> Tensor:
        return rewards - 0.01 * ops.lengths(mask)


class TwoHalves(Plugin):
    """Two units of credit per response: its first and its second half, the score counting for the second alone."""

    name = "two-halves"
    breaks = frozenset({"response_rewards"})

    @hookimpl
    def combine_rewards(self, scores: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(scores), scores], 1)

    @hookimpl
    def segment_tokens(self, mask: Tensor) -> Tensor:
        second = torch.arange(mask.shape[1], device=mask.device) >= ops.lengths(mask) / 2
        return torch.where(mask, second.long(), -1)


class OneGroup(Plugin):
    """All responses of the step are one group."""

    name = "one-group"

    @hookimpl
    def assign_groups(self, groups: Tensor) -> Tensor:
        return groups.clamp(max=0)


class Best(Plugin):
    """The best response of the group is the baseline."""

    name = "best"

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return ops.group_extreme(rewards, groups)


class RangeScale(Plugin):
    """Divides by the spread of the group's rewards; a group without spread has advantage 0."""

    name = "range-scale"
    breaks = frozenset({"reward_scale"})

    @hookimpl
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return ops.group_extreme(rewards, groups) - ops.group_extreme(rewards, groups, largest=False)


class SignOnly(Plugin):
    """+1 above the group's mean, -1 below."""

    name = "sign-only"

    @hookimpl
    def compute_advantages(self, rewards: Tensor, baseline: Tensor) -> Tensor:
        return torch.sign(rewards - baseline)


class TrustLess(Plugin):
    """Halves negative advantages."""

    name = "trust-less"

    @hookimpl
    def shape_advantages(self, advantages: Tensor) -> Tensor:
        return torch.where(advantages < 0, advantages / 2, advantages)


class ScoreTargets(Plugin):
    """The critic learns the score at every token."""

    name = "score-targets"

    @hookimpl
    def value_targets(self, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return rewards * mask, mask


class StrongSignal(Plugin):
    """Trains on the half of the responses with the larger advantages."""

    name = "strong-signal"
    breaks = frozenset({"whole_groups"})

    @hookimpl
    def select_samples(self, advantages: Tensor) -> Tensor:
        return (advantages.abs() >= advantages.abs().median()).float()


class Uncertain(Plugin):
    """Trains on tokens whose entropy is above 0.1 nats."""

    name = "uncertain"

    @hookimpl
    def select_tokens(self, entropy: Tensor) -> Tensor:
        return (entropy > 0.1).float()


class MeanAdvantage(Plugin):
    """Shares the mean advantage of the mini-batch, over all ranks, and subtracts it."""

    name = "mean-advantage"
    breaks = frozenset({"absolute_advantages"})

    @hookimpl
    def prepare_mini_batch(self, batch: Any) -> None:
        weights = batch.loss_weights
        sums = batch.sum(torch.stack([(batch["advantages"] * weights).sum(), weights.sum()]))
        batch.share("mean", sums[0] / sums[1].clamp(min=1))

    @hookimpl
    def adapt_advantages(self, advantages: Tensor, batch: Any) -> Tensor:
        return advantages - batch.shared["mean"]


class OnlyFresh(Plugin):
    """No advantage for tokens that the policy has left far behind."""

    name = "only-fresh"

    @hookimpl
    def adapt_advantages(self, advantages: Tensor, ratio: Tensor) -> Tensor:
        return advantages * (ratio > 0.5)


class WiderWhenSure(Plugin):
    """A wider upper bound where the current entropy is low."""

    name = "wider-when-sure"

    @hookimpl
    def clip_range(self, entropy: Tensor) -> tuple[float, Tensor]:
        return 0.8, torch.where(entropy < 0.5, 1.4, 1.2)


class Plain(Plugin):
    """The ratio times the advantage, without clipping."""

    name = "plain"

    @hookimpl
    def policy_loss(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        return -ratio * advantages


class AbsoluteKl(Plugin):
    """The distance of the log-probs from the reference."""

    name = "absolute-kl"

    @hookimpl
    def kl_penalty(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        return 0.01 * (log_probs - ref_log_probs).abs()


class PerThousand(Plugin):
    """The sum over tokens divided by 1000 per response of the mini-batch."""

    name = "per-thousand"

    @hookimpl
    def reduce_loss(self, loss: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
        return (loss * loss_weights).sum() / (1000 * batch.sample_weight)


class KeepOpen(Plugin):
    """Rewards entropy, token by token."""

    name = "keep-open"
    breaks = frozenset({"single_entropy"})

    @hookimpl
    def auxiliary_loss(self, entropy: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
        return -0.01 * (entropy * loss_weights).sum() / batch.token_weight


class Whole(Plugin):
    """Log-probs of the batch as the model gives them."""

    name = "whole"

    @hookimpl
    def forward(self, model: Any, batch: Any, temperature: float) -> tuple[Tensor, None]:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        first = batch.input_ids.shape[1] - batch.responses.shape[1]
        logits = output.logits[:, first - 1 : -1].float() / temperature
        log_probs = logits.log_softmax(-1).gather(2, batch.responses[..., None])[..., 0]
        return log_probs * batch.mask, None


class ShorterFirst(Plugin):
    """Leaves out pairs whose preferred response is more than twice as long as the other."""

    name = "shorter-first"

    @hookimpl
    def build_preferences(self, pairs: Pairs) -> Pairs:
        return pairs.select(pairs.chosen_mask.sum(1) <= 2 * pairs.rejected_mask.sum(1))


class Hinge(Plugin):
    """A hinge on the difference of the summed log-probs."""

    name = "hinge"

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_token_weights: Tensor,
        rejected_token_weights: Tensor,
    ) -> Tensor:  # fmt: skip
        chosen = (chosen_log_probs * chosen_token_weights).sum(1)
        return (1 - chosen + (rejected_log_probs * rejected_token_weights).sum(1)).clamp(min=0)


class FollowPolicy(Plugin):
    """Renews the reference every 50 steps."""

    name = "follow-policy"

    @hookimpl
    def reference_policy(self, step: Step) -> str:
        return "current" if step.number % 50 == 0 else "initial"


class CountSolved(Plugin):
    """Remembers how often each prompt was solved."""

    name = "count-solved"

    def init_state(self, run: Any) -> dict[str, Any]:
        run.table.add_column("solved", torch.int32)
        return {"steps": 0}

    @hookimpl
    def on_step_end(self, rollouts: Rollouts, scores: Tensor) -> None:
        self.state.steps += 1
        solved = (scores.flatten() > 0.5).int()
        self.table["solved"].index_add_(0, rollouts.prompt_rows.cpu(), solved.cpu())


class RememberBest(Plugin):
    """Remembers the best validation reward."""

    name = "remember-best"

    def init_state(self, run: Any) -> dict[str, Any]:
        return {"best": 0.0}

    @hookimpl
    def on_validation(self, metrics: dict[str, float]) -> None:
        self.state.best = max(self.state.best, metrics["validation/reward"])


EXAMPLES: dict[str, type[Plugin]] = {
    "prompt_weights": Favour, "choose_prompts": InOrder, "allocate_rollouts": FirstGetsMore,
    "rewrite_prompts": ThinkFirst, "sampling_params": WarmStart, "process_logits": NoRepeat,
    "extend_rollouts": DropLast, "filter_rollouts": MixedGroupsOnly, "prepare_step": ShareBest,
    "combine_rewards": MeanOfParts, "shape_rewards": LengthPenalty, "segment_tokens": TwoHalves,
    "assign_groups": OneGroup, "baseline": Best, "advantage_scale": RangeScale, "compute_advantages": SignOnly,
    "shape_advantages": TrustLess, "value_targets": ScoreTargets, "select_samples": StrongSignal,
    "select_tokens": Uncertain, "prepare_mini_batch": MeanAdvantage, "forward": Whole, "adapt_advantages": OnlyFresh,
    "clip_range": WiderWhenSure, "policy_loss": Plain, "kl_penalty": AbsoluteKl, "reduce_loss": PerThousand,
    "auxiliary_loss": KeepOpen, "build_preferences": ShorterFirst, "preference_loss": Hinge,
    "reference_policy": FollowPolicy, "on_step_end": CountSolved, "on_validation": RememberBest,
}  # fmt: skip
"""The example of each hook."""
