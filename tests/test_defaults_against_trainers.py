"""Every built-in gives what verl's (or TRL's) own function gives, on random input, through a stack.

The comparison is skipped only where the trainer is not installed. Where a built-in differs on purpose, the test says so
and compares where both agree: groups of one, responses without tokens, the bound of the k3 penalty.
"""

import importlib
import importlib.util
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlplugins import Plugin, hookimpl, needs
from rlplugins.plugin import BuiltinName
from rlplugins.registry import make_builtin
from rlplugins.rollouts import Rollouts
from rlplugins.stack import Stack
from rlplugins.testing import credit, loss_and_gradient, make_rollouts, start
from rlplugins.trainer import Trainer

pytestmark = pytest.mark.slow  # importing a trainer takes seconds

random_input = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
CONSTANT = 12.5  # of the sequence sum


def installed(package: str, module: str) -> Any:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(module)


@pytest.fixture(scope="module")
def verl() -> Any:
    return installed("verl", "verl.trainer.ppo.core_algos")


@pytest.fixture(scope="module")
def grpo_trainer() -> Any:
    return installed("trl", "trl.trainer.grpo_trainer").GRPOTrainer


@dataclass
class Case:
    """Random rollouts, and the same as a trainer's arrays."""

    rollouts: Rollouts
    token_rewards: Tensor
    mask: Tensor
    groups: Any
    source: torch.Generator

    def normal(self, spread: float = 1.0) -> Tensor:
        """(B, T), also outside of the mask, where no result may depend on it."""
        return spread * torch.randn(self.mask.shape, generator=self.source, dtype=torch.float64)


def make_case(seed: int, *, gaps: bool = False, empty: bool = False, alone: bool = False) -> Case:
    """Two to five groups of two to six rows in random order.

    Args:
        seed: of all random numbers.
        gaps: some tokens inside of a response are not the policy's own.
        empty: the first response has no token.
        alone: one more group, of a single row.
    """
    source = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 7, (int(torch.randint(2, 6, (1,), generator=source)),), generator=source)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    groups = torch.cat([groups, torch.tensor([len(sizes)])]) if alone else groups
    groups = groups[torch.randperm(len(groups), generator=source)]
    rows, tokens = len(groups), int(torch.randint(2, 150, (1,), generator=source))
    lengths = torch.randint(1, tokens + 1, (rows,), generator=source)
    lengths[0] = tokens
    if empty:
        lengths[0], lengths[1] = 0, tokens
    mask = torch.arange(tokens) < lengths[:, None]
    last = (lengths - 1).clamp(min=0)
    if gaps:
        mask &= torch.rand(mask.shape, generator=source) < 0.7
        mask[torch.arange(rows), last] = lengths > 0
    binary = bool(torch.rand((), generator=source) < 0.5)
    scores = torch.randint(0, 2, (rows,), generator=source).float() if binary else torch.randn(rows, generator=source)
    scores = torch.where(groups == len(sizes), 1.0, scores)
    token_rewards = torch.zeros(rows, tokens)
    token_rewards[torch.arange(rows), last] = scores
    columns = {"advantage": torch.randn(mask.shape, generator=source) * mask}
    values = torch.randn(mask.shape, generator=source)
    passes = {
        name: torch.randn(mask.shape, generator=source, dtype=torch.float64)
        for name in ("old_log_probs", "ref_log_probs")
    }
    rollouts = make_rollouts(scores, groups, mask=mask, columns=columns, values=values, **passes)
    return Case(rollouts, token_rewards, mask.float(), groups.numpy(), source)


def trainer(**defaults: BuiltinName) -> Trainer:
    return Trainer("any", provides=frozenset(needs.MEANINGS), defaults=defaults)


def advantages(plugins: list[Any], case: Case, **defaults: BuiltinName) -> Tensor:
    made = credit(plugins, case.rollouts, trainer=trainer(**defaults)).advantages
    return (made * case.mask).float()


def agree(ours: Tensor, theirs: Tensor, precision: float = 1e-5) -> None:
    assert_close(ours.double(), theirs.detach().double(), rtol=precision, atol=precision)


# advantages


@random_input
@given(seed=seeds)
def test_grpo_advantages_are_verls(verl, seed):
    case = make_case(seed)
    theirs, _ = verl.compute_grpo_outcome_advantage(case.token_rewards, case.mask, case.groups)
    agree(advantages(["grpo"], case), theirs, 1e-4)  # 1e-6 beside the deviation of equal rewards magnifies rounding


@random_input
@given(seed=seeds)
def test_dr_grpo_advantages_are_verls_without_the_standard_deviation(verl, seed):
    case = make_case(seed)
    theirs, _ = verl.compute_grpo_outcome_advantage(
        case.token_rewards, case.mask, case.groups, norm_adv_by_std_in_grpo=False
    )
    agree(advantages(["dr_grpo"], case), theirs)


@random_input
@given(seed=seeds)
def test_rloo_advantages_are_verls(verl, seed):
    case = make_case(seed)
    theirs, _ = verl.compute_rloo_outcome_advantage(case.token_rewards, case.mask, case.groups)
    agree(advantages(["rloo"], case), theirs)


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo"])
def test_a_group_of_one_has_no_advantage_while_verl_gives_it_its_score(verl, method):
    case = make_case(7, alone=True)
    ours = advantages([method], case)
    functions = {"rloo": verl.compute_rloo_outcome_advantage}
    options = {"dr_grpo": {"norm_adv_by_std_in_grpo": False}}.get(method, {})
    theirs, _ = functions.get(method, verl.compute_grpo_outcome_advantage)(
        case.token_rewards, case.mask, case.groups, **options
    )
    alone = torch.from_numpy(case.groups) == case.groups.max()
    agree(ours[~alone], theirs[~alone])
    score = case.rollouts.scores[alone] * case.mask[alone]
    assert score.any()
    agree(ours[alone], torch.zeros_like(score))
    agree(theirs[alone], score)


@random_input
@given(seed=seeds, gaps=st.booleans(), gamma=st.sampled_from([1.0, 0.99, 0.5, 0.0]))
def test_reinforce_plus_plus_advantages_are_verls(verl, seed, gaps, gamma):
    case = make_case(seed, gaps=gaps)
    theirs, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        case.token_rewards, case.mask, config=SimpleNamespace(gamma=gamma)
    )
    agree(advantages([{"reinforce_plus_plus": {"gamma": gamma}}], case), theirs, 1e-4)


@random_input
@given(seed=seeds, gaps=st.booleans(), gamma=st.sampled_from([1.0, 0.99, 0.5]), lam=st.sampled_from([1.0, 0.95, 0.0]))
def test_gae_advantages_and_critic_targets_are_verls(verl, seed, gaps, gamma, lam):
    case = make_case(seed, gaps=gaps)
    whitened, returns = verl.compute_gae_advantage_return(
        case.token_rewards, case.rollouts.values, case.mask, gamma, lam
    )
    options = {"gamma": gamma, "lam": lam}
    made = credit([{"gae": options}], case.rollouts)
    agree(made.advantages, whitened * case.mask, 1e-4)
    plain = credit([{"gae": {**options, "whiten": False}}], case.rollouts).advantages
    agree(plain, (returns - case.rollouts.values) * case.mask, 1e-4)
    targets, counted = made.value_targets
    agree(targets * case.mask, returns * case.mask, 1e-4)
    assert torch.equal(counted.float(), case.mask)


# losses


class Given(Plugin):
    """Advantages per token from the column `advantage`."""

    name = "given"
    needs = (needs.column("advantage"),)

    @hookimpl
    def compute_advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts["advantage"]


def actor(low: float = 0.2, high: float = 0.2, dual: float = 3.0, **sums: Any) -> Any:
    """What verl's losses read from the configuration of the actor."""
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False,
        clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual,
    )  # fmt: skip
    config.global_batch_info.update(sums)
    return config


def with_gradient(loss: Any, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = log_probs.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def same_loss(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], case: Case) -> None:
    assert theirs[1].abs().sum() > 0
    agree(ours[0], theirs[0])
    scale = theirs[1].abs().max()
    agree(ours[1] / scale, theirs[1] * case.mask / scale)


def moved(case: Case, spread: float) -> Tensor:
    """Log-probs (B, T) away from the old ones."""
    return case.rollouts.old_log_probs + case.normal(spread)


def expanded(made: Tensor, case: Case) -> Tensor:
    return (made * case.mask).double()


bounds = st.sampled_from([(0.2, 0.2), (0.2, 0.28), (0.1, 1.0)])
micro_batches = st.sampled_from([1, 2, 3])


@random_input
@given(
    seed=seeds,
    bounds=bounds,
    dual=st.sampled_from([1.5, 3.0, None]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    per_token=st.booleans(),
    parts=micro_batches,
)
def test_ppo_clip_is_verls(verl, seed, bounds, dual, spread, per_token, parts):
    case, (low, high) = make_case(seed), bounds
    plugins = [Given()] if per_token else ["grpo"]
    stack = start(plugins, trainer=trainer(policy_loss={"ppo_clip": {"dual_clip": dual}}, clip_range=clip(low, high)))
    log_probs = moved(case, spread)
    theirs = with_gradient(
        lambda leaf: verl.compute_policy_loss_vanilla(
            case.rollouts.old_log_probs, leaf, expanded(stack.credit(case.rollouts).advantages, case), case.mask,
            config=actor(low, high, dual or 1e12),
        )[0],
        log_probs,
    )  # fmt: skip
    same_loss(loss_and_gradient(stack, case.rollouts, log_probs, micro_batches=parts), theirs, case)


@random_input
@given(
    seed=seeds,
    bounds=bounds,
    spread=st.sampled_from([0.1, 1.0]),
    loss=st.sampled_from(["gspo", "cispo"]),
    per_token=st.booleans(),
    parts=micro_batches,
)
def test_gspo_and_cispo_are_verls(verl, seed, bounds, spread, loss, per_token, parts):
    case, (low, high) = make_case(seed), bounds
    plugins = [Given()] if per_token else ["grpo"]
    stack = start(plugins, trainer=trainer(policy_loss=loss, clip_range=clip(low, high), reduce_loss="sequence_mean"))
    log_probs = moved(case, spread)
    theirs = with_gradient(
        lambda leaf: verl.get_policy_loss_fn(loss)(
            case.rollouts.old_log_probs, leaf, expanded(stack.credit(case.rollouts).advantages, case), case.mask,
            loss_agg_mode="seq-mean-token-mean", config=actor(low, high),
        )[0],
        log_probs,
    )  # fmt: skip
    same_loss(loss_and_gradient(stack, case.rollouts, log_probs, micro_batches=parts), theirs, case)


def clip(low: float, high: float) -> BuiltinName:
    return {"fixed": {"low": low, "high": high}}


# reductions and the KL penalty

REDUCTIONS = {
    "token_mean": ("token-mean", "token_mean"),
    "sequence_mean": ("seq-mean-token-mean", "sequence_mean"),
    "sequence_sum": ("seq-mean-token-sum-norm", {"sequence_sum": {"constant": CONSTANT}}),
}


@random_input
@given(
    seed=seeds,
    reduction=st.sampled_from(sorted(REDUCTIONS)),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    gaps=st.booleans(),
    empty=st.booleans(),
    parts=micro_batches,
)
def test_kl_estimators_and_reductions_are_verls(verl, seed, reduction, estimator, gaps, empty, parts):
    """A response without tokens counts in means over responses; in verl too, if it is told the size of the batch."""
    case = make_case(seed, gaps=gaps, empty=empty)
    mode, builtin = REDUCTIONS[reduction]
    rows = len(case.rollouts)
    stack = start(["grpo"], trainer=trainer(kl_penalty={estimator: {"coefficient": 0.3}}, reduce_loss=builtin))
    difference = (case.normal(0.5)).clamp(-2, 2)  # verl cuts k3 off at 10
    log_probs = case.rollouts.ref_log_probs + difference

    def theirs(leaf: Tensor) -> Tensor:
        sums = {"global_batch_size": rows} if reduction != "token_mean" else {}
        sums |= {"loss_scale_factor": CONSTANT} if reduction == "sequence_sum" else {}
        policy, _ = verl.compute_policy_loss_vanilla(
            case.rollouts.old_log_probs, leaf, expanded(stack.credit(case.rollouts).advantages, case), case.mask,
            loss_agg_mode=mode, config=actor(dual=1e12, **sums),
        )  # fmt: skip
        penalty = verl.kl_penalty(leaf, case.rollouts.ref_log_probs, estimator)
        return policy + 0.3 * verl.agg_loss(penalty, case.mask, mode, **sums)

    ours = loss_and_gradient(stack, case.rollouts, log_probs, micro_batches=parts)
    same_loss(ours, with_gradient(theirs, log_probs), case)


@pytest.mark.parametrize(("cut", "value"), [(10.0, 10.0), (None, math.exp(4) - 5)])
def test_k3_is_cut_off_as_in_verl_only_if_asked(verl, cut, value):
    case = make_case(3)
    given = trainer(kl_penalty={"k3": {"coefficient": 1.0, "cut": cut}})
    mini = start([Given()], trainer=given, off=["given.compute_advantages"])
    mini = mini.mini_batch(mini.update_columns(case.rollouts, mini.credit(case.rollouts)))
    far = (case.rollouts.ref_log_probs - 4).requires_grad_()
    ours = mini.loss(far).kl
    agree(ours, torch.tensor(value, dtype=torch.float64))
    theirs = verl.agg_loss(verl.kl_penalty(far, case.rollouts.ref_log_probs, "k3"), case.mask, "token-mean")
    agree(theirs, torch.tensor(10.0))
    own = make_builtin("kl_penalty", {"k3": {"cut": cut}}).kl_penalty(far, case.rollouts.ref_log_probs).sum()
    slopes = [torch.autograd.grad(loss, far)[0].abs().max() for loss in (theirs, own)]
    assert slopes[0] == 0 and (slopes[1] == 0) == (cut is not None)


@random_input
@given(seed=seeds, clip=st.sampled_from([0.2, 0.5, None]), gaps=st.booleans())
def test_the_critics_loss_is_verls(verl, seed, clip, gaps):
    case = make_case(seed, gaps=gaps)
    stack = start(["gae"])
    made = stack.credit(case.rollouts)
    mini = stack.mini_batch(stack.update_columns(case.rollouts, made))
    values = case.rollouts.values + case.normal().float()
    theirs, _ = verl.compute_value_loss(
        values, made.value_targets[0], case.rollouts.values, case.mask, cliprange_value=clip or 1e6
    )
    agree(mini.value_loss(values, clip=clip), theirs)


# TRL


class TrlLoss:
    """`GRPOTrainer._compute_loss` with given log-probs in place of a model."""

    def __init__(self, trainer_class: Any, loss_type: str, low: float, high: float, length: int, beta: float) -> None:
        self._loss = trainer_class._compute_loss
        self.trainer = MagicMock(
            loss_type=loss_type, epsilon_low=low, epsilon_high=high, max_completion_length=length, beta=beta,
            importance_sampling_level="token", top_entropy_quantile=1.0, off_policy_mask_threshold=None,
            aux_loss_enabled=False, use_vllm=False, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        )  # fmt: skip
        self.trainer.accelerator.num_processes = 1
        self.trainer.accelerator.reduce = lambda values, reduction: values
        self.trainer.accelerator.gather = lambda values: values

    def __call__(self, leaf: Tensor, made: Tensor, case: Case) -> Tensor:
        self.trainer._get_per_token_logps_and_entropies.return_value = (leaf, torch.zeros_like(leaf.detach()), None)
        tokens = torch.ones(leaf.shape, dtype=torch.int64)
        inputs = {
            "prompt_ids": tokens[:, :1], "prompt_mask": tokens[:, :1], "completion_ids": tokens,
            "completion_mask": case.mask.double(), "advantages": made, "old_per_token_logps": case.rollouts.old_log_probs,
            "ref_per_token_logps": case.rollouts.ref_log_probs, "num_items_in_batch": case.mask.sum(),
        }  # fmt: skip
        return self._loss(self.trainer, MagicMock(), inputs)


TRL_LOSSES = {
    "grpo": ("ppo_clip", "sequence_mean"),
    "dapo": ("ppo_clip", "token_mean"),
    "dr_grpo": ("ppo_clip", {"sequence_sum": {"constant": 200}}),
    "cispo": ("cispo", "token_mean"),
}


@random_input
@given(
    seed=seeds, loss_type=st.sampled_from(sorted(TRL_LOSSES)), spread=st.sampled_from([0.1, 1.0]), parts=micro_batches
)
def test_losses_with_a_kl_penalty_are_trls(grpo_trainer, seed, loss_type, spread, parts):
    """TRL's CISPO has no lower bound, and takes the upper one itself, not its distance from 1."""
    case = make_case(seed)
    loss, reduction = TRL_LOSSES[loss_type]
    low, high = (1.0, 0.28) if loss == "cispo" else (0.2, 0.28)
    stack: Stack = start(
        ["dr_grpo"],
        trainer=trainer(
            policy_loss=loss,
            reduce_loss=reduction,
            clip_range=clip(low, high),
            kl_penalty={"k3": {"coefficient": 0.05}},
        ),
    )
    made = stack.credit(case.rollouts).advantages.flatten().double()
    log_probs = moved(case, spread)
    reference = TrlLoss(grpo_trainer, loss_type, low, 1 + high if loss == "cispo" else high, 200, 0.05)
    ours = loss_and_gradient(stack, case.rollouts, log_probs, micro_batches=parts)
    same_loss(ours, with_gradient(lambda leaf: reference(leaf, made, case), log_probs), case)
