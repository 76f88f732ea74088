"""The built-ins: what happens where no plugin decides, each with a name that `owners:` and `uses` take.

A built-in is a plugin that implements one hook. The methods at the end (`grpo`, `rloo`, ...) are plugins that name
built-ins; they can be stacked like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from rlplugins import needs, ops
from rlplugins.errors import ConfigurationError
from rlplugins.plugin import Plugin, hookimpl
from rlplugins.rollouts import Prompts
from rlplugins.steps import Step, generator

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


# prompts


class Shuffled(Plugin):
    """Every prompt once per epoch in a new random order; drawn by weight where a plugin gives weights.

    Weighted draws are without replacement in proportion to the weights (exponential keys, Efraimidis and Spirakis 2006),
    with replacement only if fewer prompts than needed have a weight.
    """

    name = "shuffled"

    @hookimpl
    def choose_prompts(self, prompts: Prompts, prompt_weights: Tensor | None, count: int, step: Step) -> Tensor:
        if prompt_weights is not None:
            return weighted_draw(prompt_weights, count, step.generator(self))
        return shuffled(len(prompts), count, step.number, step.seed)


def shuffled(size: int, count: int, step: int, seed: int) -> Tensor:
    """The `count` positions of a step, (count,) int64: all of 0..size-1 once per epoch, in a new random order."""
    wanted = torch.arange(step * count, (step + 1) * count)
    epochs, places = wanted // size, wanted % size
    orders = {
        int(epoch): torch.randperm(size, generator=generator(seed, "epoch", int(epoch))) for epoch in epochs.unique()
    }
    return torch.stack([orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])


def weighted_draw(weights: Tensor, count: int, source: torch.Generator) -> Tensor:
    """`count` positions drawn in proportion to `weights` (P,), without replacement where that is possible."""
    weights = weights.double()
    if int((weights > 0).sum()) < count:
        edges = weights.cumsum(0)
        points = torch.rand(count, generator=source, dtype=torch.float64) * edges[-1]
        return torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)
    keys = torch.rand(len(weights), generator=source, dtype=torch.float64).log() / weights
    return torch.topk(torch.where(weights > 0, keys, -torch.inf), count).indices


class Uniform(Plugin):
    """The same number of responses for every prompt; what remains goes to the first ones."""

    name = "uniform"

    @hookimpl
    def allocate_rollouts(self, prompts: Prompts, budget: int) -> Tensor:
        each, rest = divmod(budget, len(prompts))
        return (torch.full((len(prompts),), each) + (torch.arange(len(prompts)) < rest)).clamp(min=1)


# credit


class Score(Plugin):
    """The reward is the score of the reward function."""

    name = "score"

    @hookimpl
    def combine_rewards(self, scores: Tensor) -> Tensor:
        return scores


class WeightedSum(Plugin):
    """The reward is a weighted sum of the score's components."""

    name = "weighted_sum"
    weights: list[float]
    """One weight per component, in the reward function's order."""

    @hookimpl
    def combine_rewards(self, components: Tensor) -> Tensor:
        return components @ components.new_tensor(self.weights)[:, None]


class Response(Plugin):
    """The whole response is one unit of credit."""

    name = "response"

    @hookimpl
    def segment_tokens(self, mask: Tensor) -> Tensor:
        return mask.long() - 1


class Token(Plugin):
    """Every token is a unit of credit: rewards are (B, T)."""

    name = "token"

    @hookimpl
    def segment_tokens(self, mask: Tensor) -> Tensor:
        return torch.where(mask.bool(), torch.arange(mask.shape[1], device=mask.device), -1)


class Prompt(Plugin):
    """Responses to the same prompt are a group."""

    name = "prompt"

    @hookimpl
    def assign_groups(self, groups: Tensor) -> Tensor:
        return groups


class GroupMean(Plugin):
    """Mean reward of the group (GRPO, arXiv 2402.03300)."""

    name = "group_mean"

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return ops.group_mean(rewards, groups)


class LeaveOneOut(Plugin):
    """Mean reward of the other members of the group (RLOO, arXiv 2402.14740); a group of one is its own baseline."""

    name = "leave_one_out"

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor) -> Tensor:
        others = ops.group_count(rewards, groups) - 1
        mean = (ops.group_sum(rewards, groups) - rewards) / others.clamp(min=1)
        return torch.where(others > 0, mean, rewards)


class Zero(Plugin):
    """No baseline."""

    name = "zero"

    @hookimpl
    def baseline(self, rewards: Tensor) -> Tensor:
        return torch.zeros_like(rewards)


class BatchMean(Plugin):
    """Mean reward over the step's rows that are in a group."""

    name = "batch_mean"

    @hookimpl
    def baseline(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return ops.group_mean(rewards, one_group(groups))


class GroupStd(Plugin):
    """Standard deviation of the rewards in the group plus eps (GRPO, arXiv 2402.03300)."""

    name = "group_std"
    breaks = frozenset({"reward_scale"})
    ddof: Literal[0, 1] = 1
    """1: divide by the group size minus one; 0: by the group size."""
    eps: NonNegative = 1e-6
    """Added to the standard deviation."""

    @hookimpl
    def advantage_scale(self, rewards: Tensor, groups: Tensor) -> Tensor:
        return ops.group_std(rewards, groups, self.ddof) + self.eps


class One(Plugin):
    """No division (Dr. GRPO, arXiv 2503.20783)."""

    name = "one"

    @hookimpl
    def advantage_scale(self, rewards: Tensor) -> Tensor:
        return rewards.new_ones((rewards.shape[0], 1))


class BatchStd(Plugin):
    """Standard deviation of reward minus baseline over the step's rows that are in a group, plus eps."""

    name = "batch_std"
    breaks = frozenset({"reward_scale"})
    ddof: Literal[0, 1] = 1
    """1: divide by the number of rows minus one; 0: by the number of rows."""
    eps: NonNegative = 1e-8
    """Added to the standard deviation."""

    @hookimpl
    def advantage_scale(self, rewards: Tensor, baseline: Tensor, groups: Tensor) -> Tensor:
        return ops.group_std(rewards - baseline, one_group(groups), self.ddof) + self.eps


def one_group(groups: Tensor) -> Tensor:
    """All rows that are in a group, as one group."""
    return groups.clamp(max=0)


class Difference(Plugin):
    """(reward - baseline) / scale; what belongs to a segment goes to each of its tokens."""

    name = "difference"

    @hookimpl
    def compute_advantages(self, rewards: Tensor, baseline: Tensor, scale: Tensor, segments: Tensor) -> Tensor:
        advantages = ops.safe_divide(rewards - baseline, scale.to(rewards.dtype).expand_as(rewards))
        if rewards.shape[1] == 1:
            return advantages
        return ops.by_blocks(ops.spread_segments, advantages, segments)


class Gae(Plugin):
    """Generalised advantage estimation (arXiv 1506.02438), whitened over the step's tokens as PPO does by default.

    Tokens outside of the mask (tool output) are skipped: the next token is the next one of the policy's own.
    """

    name = "gae"
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Decay of the estimator."""
    whiten: bool = True
    """Subtract the mean and divide by the standard deviation over the step's tokens."""

    @property
    def breaks(self) -> frozenset[str]:
        """Whitening undoes what is absolute in the advantages."""
        return frozenset({"absolute_advantages", "reward_scale"}) if self.whiten else frozenset()

    @hookimpl
    def compute_advantages(self, rewards: Tensor, values: Tensor, groups: Tensor, mask: Tensor, step: Step) -> Tensor:
        returns = lambda_returns(rewards, values, mask, self.gamma, self.lam)
        step.keep(self._returns, (rewards, returns))
        advantages = above_values(returns, values, mask)
        return whiten_(advantages, mask, groups) if self.whiten else advantages

    @hookimpl
    def value_targets(self, rewards: Tensor, values: Tensor, mask: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        made_from, returns = step.kept.get(self._returns, (None, None))
        if made_from is not rewards:  # of another estimator, or of other rewards
            returns = lambda_returns(rewards, values, mask, self.gamma, self.lam)
        return returns, mask

    @property
    def _returns(self) -> str:
        return f"returns {self.gamma} {self.lam}"


def lambda_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t + V_t = r_t + gamma ((1 - lam) V_t+1 + lam (A_t+1 + V_t+1)) over each row's masked tokens, (B, T); 0 elsewhere."""

    def compute(rewards: Tensor, own: Tensor, values: Tensor) -> Tensor:
        rewards[:, :-1].add_((values * own)[:, 1:], alpha=gamma * (1 - lam))
        return ops.discounted_sum(rewards, gamma * lam)

    return over_own_tokens(compute, rewards, mask, values)


def above_values(returns: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A_t = (A_t + V_t) - V_t, which is delta_t + gamma lam A_t+1, on the masked tokens, (B, T); 0 elsewhere."""
    return ops.by_blocks(
        lambda returns, values, mask: (returns - values).mul_(ops.as_numbers(mask, returns.dtype)),
        returns,
        values,
        mask,
    )


def over_own_tokens(compute: Callable[..., Tensor], rewards: Tensor, mask: Tensor, *columns: Tensor) -> Tensor:
    """`compute(rewards, own, *columns)`, (B, T), as if each row's own tokens stood one after the other at its start.

    Args:
        compute: a function of each row alone; takes rewards (B, T), which it may change, and `own` (B, T), the own tokens
            as 1. Behind them rewards are 0, and so must the result be.
        rewards: (B, 1), which stand at the last own token, or (B, T).
        mask: (B, T), the own tokens.
        *columns: further (B, T).
    """

    def block(rewards: Tensor, mask: Tensor, *columns: Tensor) -> Tensor:
        order = None
        if bool((mask[:, 1:] > mask[:, :-1]).sum()):
            order = torch.argsort(~mask, dim=1, stable=True)
            mask = mask.gather(1, order)
            columns = tuple(column.gather(1, order) for column in columns)
            rewards = rewards.gather(1, order) if rewards.shape[1] > 1 else rewards
        own = ops.as_numbers(mask, rewards.dtype)
        result = compute(token_rewards(rewards, own), own, *columns)
        return result if order is None else torch.zeros_like(result).scatter(1, order, result)

    return ops.by_blocks(block, torch.nan_to_num(rewards), mask.bool(), *columns)


class ReinforcePlusPlus(Plugin):
    """REINFORCE++ (arXiv 2501.03262): discounted return of every token, whitened over the step's tokens.

    Tokens outside of the mask (tool output) are skipped, as in `gae`.
    """

    name = "reinforce_plus_plus"
    breaks = frozenset({"absolute_advantages", "reward_scale"})
    gamma: Fraction = 1.0
    """Discount per token; with 1 and a reward per response every token of a response has the same return."""

    @hookimpl
    def compute_advantages(self, rewards: Tensor, groups: Tensor, mask: Tensor) -> Tensor:
        if self.gamma == 1 and rewards.shape[1] == 1:
            return whiten_(rewards * (ops.lengths(mask) > 0), mask, groups)
        returns = over_own_tokens(lambda rewards, own: ops.discounted_sum(rewards, self.gamma), rewards, mask)
        return whiten_(returns, mask, groups)


def token_rewards(rewards: Tensor, own: Tensor) -> Tensor:
    """Rewards per token (B, T), a reward per response at its last own token; `own` (B, T) begins with the own ones.

    Raises:
        ConfigurationError: if rewards are per segment.
    """
    if rewards.shape[1] == own.shape[1] > 1:
        return rewards * own
    if rewards.shape[1] > 1:
        raise ConfigurationError(
            f"these advantages take a reward per response or per token, not {rewards.shape[1]} per response; "
            "write `owners: {compute_advantages: difference}`"
        )
    count = own.sum(1, keepdim=True)
    return torch.zeros_like(own).scatter_(1, (count.long() - 1).clamp(min=0), rewards * (count > 0))


def whiten_(values: Tensor, mask: Tensor, groups: Tensor, eps: float = 1e-8) -> Tensor:
    """In place (values - mean) / sqrt(variance + eps), mean and unbiased variance over the tokens of rows in a group.

    Args:
        values: (B, T), 0 outside of the mask, or (B, 1), which stands for each token of its row, 0 without any.
        mask: (B, T).
        groups: (B,).
        eps: added to the variance.
    """
    lengths = ops.lengths(mask)
    per_token, inside = values.shape[1] > 1, (groups >= 0)[:, None]
    kept = mask if per_token else lengths > 0
    times = inside if per_token else inside * lengths
    count = (inside * lengths).sum()
    mean = float((values.sum(1, keepdim=True) * times).sum() / count.clamp(min=1))

    def centred(values: Tensor, kept: Tensor) -> Tensor:
        return values.sub(ops.as_numbers(kept, values.dtype), alpha=mean)

    squares = ops.by_blocks(lambda *columns: centred(*columns).square_().sum(1, keepdim=True), values, kept)
    factor = torch.rsqrt((squares * times).sum() / (count - 1).clamp(min=1) + eps)
    return ops.by_blocks(lambda *columns: centred(*columns).mul_(factor), values, kept, out=values)


# update


class FixedClip(Plugin):
    """Constant bounds of the ratio, 1 - low and 1 + high; high > low is DAPO's clip-higher (arXiv 2503.14476)."""

    name = "fixed"
    low: Fraction = 0.2
    """Distance of the lower bound from 1."""
    high: NonNegative = 0.2
    """Distance of the upper bound from 1."""

    @hookimpl
    def clip_range(self) -> tuple[float, float]:
        return 1 - self.low, 1 + self.high


class PpoClip(Plugin):
    """max(-A ratio, -A clip(ratio, low, high)), and for A < 0 at most -c A (PPO, arXiv 1707.06347; dual clip, 1912.09729)."""

    name = "ppo_clip"
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """c, the bound of the loss of a negative advantage in units of the advantage; None: no bound."""

    @hookimpl
    def policy_loss(self, ratio: Tensor, advantages: Tensor, clip: tuple[Any, Any]) -> Tensor:
        return clipped_loss(ratio, advantages, clip, self.dual_clip)


def clipped_loss(ratio: Tensor, advantages: Tensor, clip: tuple[Any, Any], dual_clip: float | None = None) -> Tensor:
    """max(-A ratio, -A clip(ratio, low, high)), (B, T), and for A < 0 at most -dual_clip A.

    That is -A times the ratio, clipped at the upper bound only where A >= 0, at the lower one only where A < 0.
    """
    negative = advantages < 0
    low, high = (torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device) for bound in clip)
    lowest = torch.where(negative, low, 0.0)
    highest = torch.where(negative, torch.inf if dual_clip is None else dual_clip, high)
    return -advantages * ratio.clamp(lowest, highest)


def clamp(ratio: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """`ratio` between bounds that may be numbers or tensors."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.minimum(torch.maximum(ratio, torch.as_tensor(low).to(ratio)), torch.as_tensor(high).to(ratio))
    return ratio.clamp(low, high)


class Gspo(Plugin):
    """GSPO (arXiv 2507.18071): PPO-clip with the geometric mean of a response's ratios, its gradient per token."""

    name = "gspo"
    breaks = frozenset({"token_ratio"})

    @hookimpl
    def policy_loss(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: tuple[Any, Any], mask: Tensor
    ) -> Tensor:
        sequence = ops.masked_mean((log_probs - old_log_probs).detach(), mask)
        ratio = (sequence + log_probs - log_probs.detach()).clamp(max=10).exp()
        return clipped_loss(ratio, advantages, clip)


class Cispo(Plugin):
    """CISPO (MiniMax-M1, arXiv 2506.13585): REINFORCE weighted by the clipped ratio, which carries no gradient."""

    name = "cispo"

    @hookimpl
    def policy_loss(self, log_probs: Tensor, ratio: Tensor, advantages: Tensor, clip: tuple[Any, Any]) -> Tensor:
        return -clamp(ratio.detach(), *clip) * advantages * log_probs


class Reinforce(Plugin):
    """-A log_probs (Williams 1992); does not compare with the old policy."""

    name = "reinforce"
    breaks = frozenset({"token_ratio"})

    @hookimpl
    def policy_loss(self, log_probs: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * log_probs


class _Kl(Plugin):
    coefficient: NonNegative = 0.001
    """Factor on the penalty."""


class K1(_Kl):
    """log_probs - ref_log_probs (Schulman 2020, http://joschu.net/blog/kl-approx.html)."""

    name = "k1"

    @hookimpl
    def kl_penalty(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        return self.coefficient * (log_probs - ref_log_probs)


class K2(_Kl):
    """(log_probs - ref_log_probs)^2 / 2 (Schulman 2020)."""

    name = "k2"

    @hookimpl
    def kl_penalty(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        return self.coefficient * 0.5 * (log_probs - ref_log_probs).square()


class K3(_Kl):
    """exp(d) - d - 1 with d = ref_log_probs - log_probs, clamped at 20 (Schulman 2020)."""

    name = "k3"

    cut: Positive | None = None
    """Largest value of a token, where it has no gradient; None: none."""

    @hookimpl
    def kl_penalty(self, log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
        difference = (ref_log_probs - log_probs).clamp(-20, 20)
        penalty = difference.exp() - difference - 1
        return self.coefficient * (penalty if self.cut is None else penalty.clamp(max=self.cut))


class NoKl(Plugin):
    """No penalty and no reference model."""

    name = "none"

    @hookimpl
    def kl_penalty(self) -> None:
        return None


class TokenMean(Plugin):
    """Mean over the mini-batch's tokens: sum W x / sum W."""

    name = "token_mean"

    @hookimpl
    def reduce_loss(self, loss: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
        return (loss * loss_weights).sum() / batch.token_weight


class SequenceMean(Plugin):
    """Mean over each response's tokens, then over responses: sum_i w_i (sum_t u m x / sum_t u m) / sum_i w_i."""

    name = "sequence_mean"

    @hookimpl
    def reduce_loss(self, loss: Tensor, weights: Tensor, token_weights: Tensor, mask: Tensor, batch: Any) -> Tensor:
        tokens = (mask * token_weights).to(loss.dtype).expand_as(loss)
        means = ops.safe_divide((loss * tokens).sum(1, keepdim=True), tokens.sum(1, keepdim=True))
        return (means * weights).sum() / batch.sample_weight


class SequenceSum(Plugin):
    """Sum over each response's tokens divided by a constant, mean over responses: sum W x / (C sum_i w_i)."""

    name = "sequence_sum"
    constant: Positive = 1.0
    """C, for instance the length limit (Dr. GRPO, arXiv 2503.20783)."""

    @hookimpl
    def reduce_loss(self, loss: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
        return (loss * loss_weights).sum() / (self.constant * batch.sample_weight)


# preferences


class _Pairwise(Plugin):
    """Base of the losses on the difference of the implicit rewards, which are logged."""

    beta: Positive = 0.1
    """Factor on the log-ratios of policy and reference."""


class Dpo(_Pairwise):
    """-log sigmoid(z), z = beta (chosen - rejected log-ratio) (DPO, arXiv 2305.18290, equation 7)."""

    name = "dpo"

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, chosen_ref_log_probs: Tensor, chosen_token_weights: Tensor,
        rejected_log_probs: Tensor, rejected_ref_log_probs: Tensor, rejected_token_weights: Tensor, batch: Any, log: Any,
    ) -> Tensor:  # fmt: skip
        chosen = self.beta * log_ratio(chosen_log_probs, chosen_ref_log_probs, chosen_token_weights)
        rejected = self.beta * log_ratio(rejected_log_probs, rejected_ref_log_probs, rejected_token_weights)
        log_implicit_rewards(log, chosen, rejected, batch.weights)
        return softplus(rejected - chosen)


class Cdpo(_Pairwise):
    """DPO whose labels are wrong with a known probability: (1 - eps) A + eps B, A and B the losses of the two orders.

    Conservative DPO (Mitchell, 2023, "A note on DPO with noisy preferences", equation 3).
    """

    name = "cdpo"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """eps, how often a label is wrong."""

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, chosen_ref_log_probs: Tensor, chosen_token_weights: Tensor,
        rejected_log_probs: Tensor, rejected_ref_log_probs: Tensor, rejected_token_weights: Tensor, batch: Any, log: Any,
    ) -> Tensor:  # fmt: skip
        chosen = self.beta * log_ratio(chosen_log_probs, chosen_ref_log_probs, chosen_token_weights)
        rejected = self.beta * log_ratio(rejected_log_probs, rejected_ref_log_probs, rejected_token_weights)
        log_implicit_rewards(log, chosen, rejected, batch.weights)
        return torch.lerp(softplus(rejected - chosen), softplus(chosen - rejected), self.label_smoothing)


class Ipo(_Pairwise):
    """(h - 1 / (2 beta))^2, h the difference of the log-ratios (IPO, arXiv 2310.12036, equation 17)."""

    name = "ipo"
    per_token: bool = True
    """Divide each log-ratio by its number of tokens, as the authors and TRL do; OpenRLHF does not."""

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, chosen_ref_log_probs: Tensor, chosen_token_weights: Tensor,
        rejected_log_probs: Tensor, rejected_ref_log_probs: Tensor, rejected_token_weights: Tensor, batch: Any, log: Any,
    ) -> Tensor:  # fmt: skip
        chosen = log_ratio(chosen_log_probs, chosen_ref_log_probs, chosen_token_weights, mean=self.per_token)
        rejected = log_ratio(rejected_log_probs, rejected_ref_log_probs, rejected_token_weights, mean=self.per_token)
        log_implicit_rewards(log, self.beta * chosen, self.beta * rejected, batch.weights)
        return (chosen - rejected - 1 / (2 * self.beta)).square()


class Simpo(Plugin):
    """-log sigmoid(beta (chosen - rejected mean log-prob) - gamma), without a reference (SimPO, arXiv 2405.14734)."""

    name = "simpo"
    beta: Positive = 2.0
    """Factor on the mean log-probs."""
    gamma: NonNegative = 1.0
    """Margin that the difference must exceed."""

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, chosen_token_weights: Tensor, rejected_log_probs: Tensor,
        rejected_token_weights: Tensor, batch: Any, log: Any,
    ) -> Tensor:  # fmt: skip
        chosen = self.beta * over_tokens(chosen_log_probs, chosen_token_weights, mean=True)
        rejected = self.beta * over_tokens(rejected_log_probs, rejected_token_weights, mean=True)
        log_implicit_rewards(log, chosen, rejected, batch.weights)
        return softplus(rejected - chosen + self.gamma)


def over_tokens(values: Tensor, token_weights: Tensor, mean: bool = False) -> Tensor:
    """sum_t u x of each response (n,), or its mean sum_t u x / sum_t u (0 without tokens).

    Args:
        values: (n, T), 0 outside of the response.
        token_weights: (n, T), u.
        mean: divide by the sum of the weights.
    """
    total = (values * token_weights).sum(1)
    return ops.safe_divide(total, token_weights.sum(1)) if mean else total


def log_ratio(log_probs: Tensor, ref_log_probs: Tensor, token_weights: Tensor, mean: bool = False) -> Tensor:
    """Log of policy over reference of each response, (n,): the sum over its tokens, or the mean."""
    return over_tokens(log_probs - ref_log_probs, token_weights, mean)


def log_implicit_rewards(log: Callable[..., None], chosen: Tensor, rejected: Tensor, weights: Tensor) -> None:
    """Log what the two sides are worth to the policy, (n,) each, averaged over pairs with weights (n, 1)."""
    total = weights.sum()
    for name, rewards in (("chosen_reward", chosen), ("rejected_reward", rejected)):
        log(name, ops.safe_divide((rewards.detach() * weights[:, 0]).sum(), total), total)


class NllOnChosen(Plugin):
    """Adds the negative log-likelihood of the chosen responses, a mean over tokens and then over pairs.

    The term of "Iterative reasoning preference optimization" (arXiv 2404.19733) and of Llama 3.1.
    """

    name = "nll"
    coefficient: NonNegative
    """Factor on it."""

    @hookimpl
    def auxiliary_loss(
        self, chosen_log_probs: Tensor, chosen_token_weights: Tensor, weights: Tensor, batch: Any, log: Any
    ) -> Tensor:
        nll = -over_tokens(chosen_log_probs, chosen_token_weights, mean=True)
        total = weights.sum()
        log("nll", ops.safe_divide((nll.detach() * weights[:, 0]).sum(), total), total)
        return self.coefficient * (nll * weights[:, 0]).sum() / batch.sample_weight


class Initial(Plugin):
    """The reference is the policy that the run started with."""

    name = "initial"

    @hookimpl
    def reference_policy(self) -> str:
        return "initial"


BUILTINS: dict[str, dict[str, type[Plugin]]] = {
    "choose_prompts": {"shuffled": Shuffled},
    "allocate_rollouts": {"uniform": Uniform},
    "combine_rewards": {"score": Score, "weighted_sum": WeightedSum},
    "segment_tokens": {"response": Response, "token": Token},
    "assign_groups": {"prompt": Prompt},
    "baseline": {"group_mean": GroupMean, "leave_one_out": LeaveOneOut, "zero": Zero, "batch_mean": BatchMean},
    "advantage_scale": {"group_std": GroupStd, "one": One, "batch_std": BatchStd},
    "compute_advantages": {"difference": Difference, "gae": Gae, "reinforce_plus_plus": ReinforcePlusPlus},
    "value_targets": {"gae": Gae},
    "clip_range": {"fixed": FixedClip},
    "policy_loss": {"ppo_clip": PpoClip, "gspo": Gspo, "cispo": Cispo, "reinforce": Reinforce},
    "kl_penalty": {"none": NoKl, "k1": K1, "k2": K2, "k3": K3},
    "reduce_loss": {"token_mean": TokenMean, "sequence_mean": SequenceMean, "sequence_sum": SequenceSum},
    "preference_loss": {"dpo": Dpo, "cdpo": Cdpo, "ipo": Ipo, "simpo": Simpo},
    "reference_policy": {"initial": Initial},
}
"""Built-ins by hook and name. The first of a hook decides where neither a plugin nor the trainer says another."""


# additions that a trainer's settings ask for


class EntropyBonus(Plugin):
    """Subtracts coefficient times the token-mean entropy from the loss."""

    name = "entropy_bonus"
    breaks = frozenset({"single_entropy"})
    coefficient: float
    """Factor on the entropy, in nats."""

    @hookimpl
    def auxiliary_loss(self, entropy: Tensor, loss_weights: Tensor, batch: Any) -> Tensor:
        return -self.coefficient * (entropy * loss_weights).sum() / batch.token_weight


# methods


class Grpo(Plugin):
    """Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300): advantages of GRPO."""

    name = "grpo"
    uses = {"baseline": "group_mean", "advantage_scale": "group_std"}
    needs = (needs.group_size(at_least=2),)


class DrGrpo(Plugin):
    """GRPO without division by the standard deviation (Dr. GRPO, arXiv 2503.20783)."""

    name = "dr_grpo"
    uses = {"baseline": "group_mean", "advantage_scale": "one"}
    needs = (needs.group_size(at_least=2),)


class Rloo(Plugin):
    """REINFORCE leave-one-out (arXiv 2402.14740)."""

    name = "rloo"
    uses = {"baseline": "leave_one_out", "advantage_scale": "one"}
    needs = (needs.group_size(at_least=2),)


EXTRAS: dict[str, type[Plugin]] = {"entropy_bonus": EntropyBonus, "nll": NllOnChosen}
"""What a trainer's settings add to a stack, by name."""

METHODS: dict[str, type[Plugin]] = {
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "rloo": Rloo,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "gae": Gae,
}
"""Methods of the field that are part of the core, by the name under which a stack lists them."""
