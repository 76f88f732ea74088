"""The hooks of rlplugins, specification version 1.

B responses in the step, T response tokens (right-padded), P prompts in the pool, M prompts in the step, K reward
components, N segments with a reward of their own, n pairs of preference training. Hooks run in the order of this file. A
hook takes by name only what it needs. Every hook may also take

    step   the `Step`: number, total_steps, shared values, `step.generator(self)`; in the update phase `batch` instead
    log    `log(name, value, weight=1.0)`: a metric `rlplugins/<plugin>/<name>`, averaged over batches and ranks

and hooks of the credit phase `rollouts` (all rows) and `mask` (B, T) bool.

How the implementations of several plugins combine:

    owner    one decides, else the built-in; two are an error unless the user names one, or a weighted mix
    chain    the value passes through each, in stack order
    product  weights multiply, each computed without sight of the others
    sum      terms add
    all      everyone is called
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import Tensor

if TYPE_CHECKING:
    from rlplugins.judge import PluginJudge
    from rlplugins.packed import Packed
    from rlplugins.pairs import Pairs
    from rlplugins.rollouts import Prompts, Requests, Rollouts, Sampling
    from rlplugins.services import Engine
    from rlplugins.steps import Step
    from rlplugins.update import Batch

VERSION = 1
PROJECT = "rlplugins"

Log = Callable[..., None]
_marker = pluggy.HookspecMarker(PROJECT)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Rule(Enum):
    """How several implementations of a hook combine."""

    OWNER = "owner"
    CHAIN = "chain"
    PRODUCT = "product"
    SUM = "sum"
    ALL = "all"


@dataclass(frozen=True)
class Hook:
    """One hook of the specification.

    Attributes:
        name: the function's name.
        phase: prompts, engine, rollouts, credit, update, preferences, models or life.
        rule: how several implementations combine.
        gives: the argument name under which later hooks get the result; empty if none does.
        arguments: what an implementation may take.
        mixes: whether an `owners:` line may mix several owners with weights (owners of arrays).
        doc: the docstring.
    """

    name: str
    phase: str
    rule: Rule
    gives: str
    arguments: tuple[str, ...]
    mixes: bool
    doc: str


_hooks: dict[str, Hook] = {}
HOOKS: Mapping[str, Hook] = MappingProxyType(_hooks)
"""Every hook by name, in the order in which they run."""


def _hook(phase: str, rule: Rule, gives: str = "", mixes: bool = False) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        arguments = tuple(inspect.signature(function).parameters)
        doc = inspect.getdoc(function) or ""
        _hooks[function.__name__] = Hook(function.__name__, phase, rule, gives, arguments, mixes, doc)
        return _marker(function)

    return register


# prompts: which prompts, how many responses each, in which words


@_hook("prompts", Rule.PRODUCT, "prompt_weights")
def prompt_weights(prompts: Prompts, step: Step, log: Log) -> Tensor:
    """Sampling weight of every prompt of the pool, (P,), >= 0. The draw itself is `choose_prompts`."""


@_hook("prompts", Rule.OWNER, "chosen")
def choose_prompts(prompts: Prompts, prompt_weights: Tensor | None, count: int, step: Step, log: Log) -> Tensor:
    """Which prompts this step trains on: (M,) int64 positions in the pool `prompts`, M = `count`.

    `prompt_weights` (P,) is None if no plugin gives any. May change the plugin's state.
    """


@_hook("prompts", Rule.OWNER, "counts")
def allocate_rollouts(prompts: Prompts, budget: int, step: Step, log: Log) -> Tensor:
    """Responses per chosen prompt, (M,) int64: one at least, together at most `budget` (or M, if that is more)."""


@_hook("prompts", Rule.CHAIN, "requests")
def rewrite_prompts(requests: Requests, step: Step, log: Log) -> Requests:
    """The requests with other texts, forced response prefixes, or new columns; same rows in the same order."""


@_hook("prompts", Rule.CHAIN, "sampling")
def sampling_params(sampling: Sampling, requests: Requests, step: Step, log: Log) -> Sampling:
    """Temperature, length limit and numbers for `process_logits` of every request."""


# engine: inside the process that generates, without state


@_hook("engine", Rule.OWNER, "logits")
def process_logits(logits: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
    """Next-token logits (N, V) of N running requests from the model's; `numbers`: (N,) or (N, k) as `sampling_params` set."""


# rollouts: after generation and scoring, before the log-prob passes


@_hook("rollouts", Rule.CHAIN, "rollouts")
def extend_rollouts(
    rollouts: Rollouts, prompts: Prompts, engine: Engine, judge: PluginJudge, step: Step, log: Log
) -> Rollouts:
    """The rollouts with rows (whole groups too) added, replaced or removed. May change the plugin's state.

    Requests to the engine are made of `prompts`, the pool, in which `rollouts.prompt_rows` find each row's prompt.

    An added row carries a kind; group -1 keeps it out of every group statistic.
    """


@_hook("rollouts", Rule.PRODUCT, "kept")
def filter_rollouts(scores: Tensor, groups: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
    """1 keeps and 0 drops a response, (B, 1), by its raw score (B, 1); dropped rows save their log-prob passes."""


# credit: on the driver, once per step, on the whole batch


@_hook("credit", Rule.ALL)
def prepare_step(rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> None:
    """Compute what several later hooks need and `step.share` it. Changes nothing else."""


@_hook("credit", Rule.OWNER, "rewards", mixes=True)
def combine_rewards(
    scores: Tensor,
    components: Tensor,
    credit: Callable[[Tensor], Tensor],
    engine: Engine,
    judge: PluginJudge,
    rollouts: Rollouts,
    mask: Tensor,
    step: Step,
    log: Log,
) -> Tensor:
    """Rewards per response (B, 1), per segment (B, N) or per token (B, T) from the score (B, 1) and its parts (B, K).

    `credit(rewards)` gives the advantages that this stack would make of other rewards.
    """


@_hook("credit", Rule.CHAIN, "rewards")
def shape_rewards(rewards: Tensor, scores: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
    """Rewards of the same shape."""


@_hook("credit", Rule.OWNER, "segments")
def segment_tokens(rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
    """The credit unit of every token, (B, T) int64: token, rank, turn, ...; -1: none. Segment k has reward column k."""


@_hook("credit", Rule.OWNER, "groups")
def assign_groups(groups: Tensor, rewards: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log) -> Tensor:
    """The group of each response, (B,) int64, from that of its prompt; -1: none. Numbers need not be dense."""


@_hook("credit", Rule.OWNER, "baseline", mixes=True)
def baseline(
    rewards: Tensor, groups: Tensor, segments: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log
) -> Tensor:
    """What is subtracted from the rewards: (B, 1), or (B, N) like them."""


@_hook("credit", Rule.OWNER, "scale", mixes=True)
def advantage_scale(
    rewards: Tensor, baseline: Tensor, groups: Tensor, segments: Tensor, rollouts: Rollouts, mask: Tensor,
    step: Step, log: Log,
) -> Tensor:  # fmt: skip
    """What the difference is divided by: (B, 1), or (B, N) like the rewards. A scale of 0 gives advantage 0."""


@_hook("credit", Rule.OWNER, "advantages", mixes=True)
def compute_advantages(
    rewards: Tensor, baseline: Tensor, scale: Tensor, groups: Tensor, segments: Tensor, values: Tensor,
    components: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log,
) -> Tensor:  # fmt: skip
    """Advantages per response (B, 1) or per token (B, T); rows of group -1 get 0 whatever is returned for them."""


@_hook("credit", Rule.CHAIN, "advantages")
def shape_advantages(
    advantages: Tensor, rewards: Tensor, groups: Tensor, segments: Tensor, entropy: Tensor, rollouts: Rollouts,
    mask: Tensor, step: Step, log: Log,
) -> Tensor:  # fmt: skip
    """Advantages, (B, 1) or (B, T); also any factor on the loss that should not count in its mean."""


@_hook("credit", Rule.OWNER, "value_targets")
def value_targets(
    rewards: Tensor, values: Tensor, advantages: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log
) -> tuple[Tensor, Tensor]:
    """Targets of the critic (B, T) and the tokens that count in its loss (B, T)."""


@_hook("credit", Rule.PRODUCT, "weights")
def select_samples(
    advantages: Tensor, rewards: Tensor, groups: Tensor, rollouts: Rollouts, mask: Tensor, step: Step, log: Log
) -> Tensor:
    """How often each response counts in the update, (B, 1), >= 0."""


@_hook("credit", Rule.PRODUCT, "token_weights")
def select_tokens(
    advantages: Tensor, weights: Tensor, groups: Tensor, segments: Tensor, entropy: Tensor, rollouts: Rollouts,
    mask: Tensor, step: Step, log: Log,
) -> Tensor:  # fmt: skip
    """How often each token counts in the update, (B, T), >= 0; `weights` (B, 1) are those of the responses."""


# update: on every rank; pure functions of a micro-batch except the first


@_hook("update", Rule.ALL)
def prepare_mini_batch(batch: Batch, log: Log) -> None:
    """Once per mini-batch: `batch.sum(x)` over all ranks, `batch.share(name, value)`, `batch.add_column(name, x)`.

    Sees this rank's columns, and the current log-probs without gradient where the plugin needs them. The only hook that
    may communicate; called equally often on every rank.
    """


@_hook("update", Rule.OWNER, "log_probs")
def forward(model: Any, batch: Packed, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Log-probs (b, T) and, if `batch.entropy`, entropies of a packed batch: the same numbers for less work.

    `batch` is `rlplugins.packed.Packed`. The result is 0 outside of the mask.
    """


@_hook("update", Rule.CHAIN, "advantages")
def adapt_advantages(
    advantages: Tensor, ratio: Tensor, entropy: Tensor, mask: Tensor, batch: Batch, log: Log
) -> Tensor:
    """Advantages, ratio (B, T) and current entropy (B, T) known; no gradient goes through any of them."""


@_hook("update", Rule.OWNER, "clip", mixes=True)
def clip_range(
    ratio: Tensor, entropy: Tensor, advantages: Tensor, mask: Tensor, batch: Batch, log: Log
) -> tuple[Tensor | float, Tensor | float]:
    """Lower and upper bound of the ratio (not epsilons): numbers, (B, 1) or (B, T). No gradient."""


@_hook("update", Rule.OWNER, "loss", mixes=True)
def policy_loss(
    log_probs: Tensor, old_log_probs: Tensor, ratio: Tensor, advantages: Tensor, clip: tuple[Any, Any], mask: Tensor,
    rewards: Tensor, groups: Tensor, segments: Tensor, weights: Tensor, token_weights: Tensor, entropy: Tensor,
    batch: Batch, log: Log,
) -> Tensor:  # fmt: skip
    """Loss per token (B, T) or per response (B, 1), to be minimised. `@hookimpl(kind=...)` claims the rows of one kind."""


@_hook("update", Rule.OWNER, "kl", mixes=True)
def kl_penalty(
    log_probs: Tensor, ref_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, batch: Batch, log: Log
) -> Tensor:
    """Penalty per token (B, T), its coefficient included."""


@_hook("update", Rule.OWNER, "reduced", mixes=True)
def reduce_loss(
    loss: Tensor, loss_weights: Tensor, weights: Tensor, token_weights: Tensor, mask: Tensor, segments: Tensor,
    batch: Batch,
) -> Tensor:  # fmt: skip
    """This micro-batch's part of the scalar loss, from a loss (B, T): parts add up to the mini-batch's.

    `loss_weights` is W = w u m (B, T), its factors are `weights` w (B, 1), `token_weights` u (B, T) or (B, 1), and
    `mask` m. Lower sums over all ranks come from `batch`.
    """


@_hook("update", Rule.SUM, "auxiliary")
def auxiliary_loss(
    log_probs: Tensor, old_log_probs: Tensor, ratio: Tensor, entropy: Tensor, advantages: Tensor, mask: Tensor,
    groups: Tensor, segments: Tensor, loss_weights: Tensor, weights: Tensor, token_weights: Tensor,
    chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_ref_log_probs: Tensor, rejected_ref_log_probs: Tensor,
    chosen_mask: Tensor, rejected_mask: Tensor, chosen_token_weights: Tensor, rejected_token_weights: Tensor,
    batch: Batch, log: Log,
) -> Tensor:  # fmt: skip
    """This micro-batch's part of a further scalar loss, divided by a sum over the mini-batch (SFT, entropy, ...).

    In preference training it takes what `preference_loss` does, and `weights` (n, 1) of the pairs.
    """


# preferences: training on pairs of responses from a file, instead of all of the above but what acts on the update


@_hook("preferences", Rule.CHAIN, "pairs")
def build_preferences(pairs: Pairs, step: Step, log: Log) -> Pairs:
    """The step's pairs with some left out, sides exchanged, weights of pairs (n, 1) or tokens (n, T), or new columns.

    Before the reference's log-probs are computed. A weight says how often a pair or token counts.
    """


@_hook("preferences", Rule.OWNER, "preference_loss", mixes=True)
def preference_loss(
    chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_ref_log_probs: Tensor, rejected_ref_log_probs: Tensor,
    chosen_mask: Tensor, rejected_mask: Tensor, chosen_token_weights: Tensor, rejected_token_weights: Tensor,
    batch: Batch, log: Log,
) -> Tensor:  # fmt: skip
    """Loss per pair, (n,), from the per-token columns (n, T) of both sides; its weighted mean over the mini-batch is taken.

    Without `*_ref_log_probs` among the arguments of a stack's hooks there is no reference and no pass of it.
    """


# models


@_hook("models", Rule.OWNER, "reference")
def reference_policy(step: Step) -> str:
    """Which weights the reference has: `initial`, or `current` to copy the policy's at this moment; asked before a step."""


# life: on the driver, after the update


@_hook("life", Rule.ALL)
def on_step_end(
    rollouts: Rollouts, rewards: Tensor, advantages: Tensor, groups: Tensor, weights: Tensor, token_weights: Tensor,
    mask: Tensor, scores: Tensor, engine: Engine, step: Step, log: Log,
) -> None:  # fmt: skip
    """Change the plugin's state. Sees all rows of the step, dropped and weightless ones too, and the updated engine.

    Rows that were dropped before the credit phase have NaN in `rewards` and `advantages`, group -1, weight 0, and 0 in
    what the log-prob passes gave the others.
    """


@_hook("life", Rule.ALL)
def on_validation(metrics: Mapping[str, float], engine: Engine, step: Step, log: Log) -> None:
    """Change the plugin's state; sees the validation metrics of the updated policy."""


PHASES = tuple(dict.fromkeys(hook.phase for hook in _hooks.values()))
STATEFUL = frozenset({"choose_prompts", "extend_rollouts", "on_step_end", "on_validation"})
"""The hooks that may change a plugin's state."""

ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "advantages": "(B, 1) or (B, T) float, what `compute_advantages` and the chains after it made",
        "baseline": "(B, 1) or (B, N) float, what the owner of `baseline` gave",
        "batch": "`Batch`: `batch[column]`, `batch.shared[name]`, `batch.sum(x)` (in `prepare_mini_batch` only)",
        "budget": "int, responses of the step together",
        "chosen_log_probs": "(n, T) float32 with gradient, of the chosen responses; 0 outside of their tokens",
        "chosen_mask": "(n, T) bool, tokens of the chosen responses",
        "chosen_ref_log_probs": "(n, T) float32, of the chosen responses under the reference; 0 outside of their tokens",
        "chosen_token_weights": "(n, T) float, u m: how often each token of the chosen responses counts; 1 unless weighed",
        "clip": "pair of lower and upper bound of the ratio: numbers, (B, 1) or (B, T)",
        "components": "(B, K) float, parts of the score; the score itself where the reward function gives one number",
        "count": "int M, how many prompts the step trains on",
        "credit": "`credit(rewards) -> advantages`, what this stack would make of other rewards",
        "engine": "`Engine`: `generate`, `given`, `texts`, `log_probs`, `gradient_products`; with new weights after the update",
        "entropy": "(B, T) float, in nats: the column of the old policy in the credit phase, the current one in the update",
        "groups": "(B,) int64, equal numbers are a group; -1: none",
        "judge": "`judge.ask(questions, read) -> answers`, None where there is none; configured by `judge:` of the stack file",
        "log": "`log(name, value, weight=1.0)`, a metric `rlplugins/<plugin>/<name>`",
        "log_probs": "(B, T) float32 with gradient, under the current weights",
        "logits": "(N, V) float, next-token logits of N running requests",
        "loss": "(B, T) or (B, 1) float, to be reduced",
        "loss_weights": "(B, T) float, W = w u m: weight of the response, of the token, and mask",
        "mask": "(B, T) bool, the policy's own tokens",
        "metrics": "validation metrics by name",
        "model": "the trainer's model",
        "numbers": "per name (N,) or (N, k), as `sampling_params` set them for each request",
        "old_log_probs": "(B, T) float32, under the weights at the start of the step's update",
        "pairs": "`Pairs`, the step's pairs with their data columns, as the plugins before made them",
        "prompt_weights": "(P,) float, product of what the plugins gave; None if none did",
        "prompts": "`Prompts`: the pool (P), or the chosen ones (M) in `allocate_rollouts`",
        "ratio": "(B, T) float, exp(clamp(log_probs - old_log_probs, -20, 20))",
        "ref_log_probs": "(B, T) float32, under the reference policy",
        "rejected_log_probs": "(n, T) float32 with gradient, of the rejected responses; 0 outside of their tokens",
        "rejected_mask": "(n, T) bool, tokens of the rejected responses",
        "rejected_ref_log_probs": "(n, T) float32, of the rejected responses under the reference; 0 outside of their tokens",
        "rejected_token_weights": "(n, T) float, u m: how often each token of the rejected responses counts; 1 unless weighed",
        "requests": "`Requests`, one row per response to draw",
        "rewards": "(B, 1), (B, N) or (B, T) float, what `combine_rewards` and the chain after it made",
        "rollouts": "`Rollouts`, all rows; a column that costs a pass must be declared",
        "sampling": "`Sampling`, how each request is drawn",
        "scale": "(B, 1) or (B, N) float, what the owner of `advantage_scale` gave",
        "scores": "(B, 1) float, raw scores of the reward function; NaN where it gave nothing finite",
        "segments": "(B, T) int64, credit unit of every token; -1: none; None where rewards are per response",
        "step": "`Step`: `number`, `total_steps`, `share` and `shared`, `keep` and `kept`, `generator(self)`",
        "temperature": "float, of the trainer",
        "token_weights": "(B, T) float, u; (B, 1) of ones where no plugin weighs tokens",
        "values": "(B, T) float32, of the critic",
        "weights": "(B, 1) float, w, ones where no plugin weighs responses; (n, 1) of pairs",
    }
)
"""What every argument of a hook is."""
