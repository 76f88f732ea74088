"""Every built-in loss on pairs, and rdpo, gives what TRL's own trainer computes, value and gradient."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlplugins import Pairs, needs
from rlplugins.pairs import SIDES
from rlplugins.testing import start
from rlplugins.testing.pairs import make_pairs, pair_loss_and_gradient
from rlplugins.trainer import Trainer

pytestmark = [
    pytest.mark.slow,  # importing a trainer takes seconds
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]
few = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**31)
betas = st.sampled_from([0.05, 0.1, 1.0])


@pytest.fixture(scope="module")
def dpo_trainer() -> Any:
    return importlib.import_module("trl.trainer.dpo_trainer").DPOTrainer


@pytest.fixture(scope="module")
def cpo_trainer() -> Any:
    return importlib.import_module("trl.experimental.cpo.cpo_trainer").CPOTrainer


def random_case(seed: int, count: int = 5) -> tuple[Pairs, dict[str, Tensor], dict[str, Tensor]]:
    source = torch.Generator().manual_seed(seed)
    pairs = make_pairs(*torch.randint(1, 8, (2, count), generator=source).tolist())
    policy, reference = (
        {side: torch.randn(pairs.chosen_mask.shape, generator=source, dtype=torch.float64) for side in SIDES}
        for _ in range(2)
    )
    return pairs, policy, reference


def ours(case: Any, loss: Any, plugins: Any = ()) -> tuple[Tensor, dict[str, Tensor]]:
    pairs, policy, reference = case
    binds = frozenset({"build_preferences", "preference_loss", "prepare_mini_batch", "auxiliary_loss"})
    trainer = Trainer("any", binds=binds, provides=frozenset(needs.MEANINGS), defaults={"preference_loss": loss})
    return pair_loss_and_gradient(start(list(plugins), trainer=trainer), pairs, policy, reference, micro_batches=2)


def theirs(case: Any, compute: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of `compute(policy, reference)`, both 0 outside of the responses."""
    pairs, policy, reference = case
    leaves = {side: policy[side].clone().requires_grad_() for side in SIDES}
    masks = {"chosen": pairs.chosen_mask, "rejected": pairs.rejected_mask}
    inside = [{side: values[side] * masks[side] for side in SIDES} for values in (leaves, reference)]
    loss = compute(*inside)
    loss.backward()
    return loss.detach(), {side: leaf.grad for side, leaf in leaves.items()}


def same(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6, abs=1e-9)
    for side in SIDES:
        assert wanted[1][side].any()
        torch.testing.assert_close(found[1][side], wanted[1][side], rtol=1e-5, atol=1e-8)


class Dpo:
    """`DPOTrainer._compute_loss` on given log-probs in place of a model."""

    def __init__(self, trainer: Any, pairs: Pairs, loss_type: str, beta: float, label_smoothing: float) -> None:
        self._loss = trainer._compute_loss
        self._mask = torch.cat([pairs.chosen_mask, pairs.rejected_mask])
        self._trainer = MagicMock(
            beta=beta, label_smoothing=label_smoothing, loss_types=[loss_type], loss_weights=[1.0], ld_alpha=None,
            precompute_ref_logps=False, f_divergence_type="reverse_kl", use_weighting=False, aux_loss_enabled=False,
            args=SimpleNamespace(gradient_checkpointing_kwargs={}), _tp_size=1, _total_train_tokens=0,
        )  # fmt: skip
        self._trainer.accelerator.gather = self._trainer.accelerator.gather_for_metrics = lambda values: values

    def _outputs(self, values: dict[str, Tensor]) -> Any:
        per_token = torch.cat([values["chosen"], values["rejected"]])
        nothing = torch.zeros_like(per_token.detach())
        return SimpleNamespace(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())

    def __call__(self, policy: dict[str, Tensor], reference: dict[str, Tensor]) -> Tensor:
        trainer = self._trainer
        trainer.ref_model = MagicMock(return_value=self._outputs(reference))
        trainer.model = MagicMock(return_value=self._outputs(policy), training=True)
        mask = torch.nn.functional.pad(self._mask.long(), (1, 0))
        inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
        return self._loss(trainer, trainer.model, inputs, False)


@few
@given(seed=seeds, beta=betas, kind=st.sampled_from(["dpo", "ipo", "rdpo"]))
def test_dpo_ipo_and_rdpo_are_those_of_the_dpo_trainer(dpo_trainer: Any, seed: int, beta: float, kind: str) -> None:
    case = random_case(seed)
    loss_type = {"dpo": "sigmoid", "ipo": "ipo", "rdpo": "robust"}[kind]
    wanted = theirs(case, Dpo(dpo_trainer, case[0], loss_type, beta, 0.2))
    if kind == "rdpo":
        same(ours(case, "dpo", [{"rdpo": {"beta": beta, "eps": 0.2}}]), wanted)
    else:
        same(ours(case, {kind: {"beta": beta}}), wanted)


def cpo(trainer: Any, **options: Any) -> Any:
    device = MagicMock(device="cpu")
    settled = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0, "accelerator": device, **options}
    return lambda chosen, rejected: trainer.cpo_loss(MagicMock(**settled), chosen, rejected)[0].mean()


@few
@given(seed=seeds, beta=betas, smoothing=st.sampled_from([0.0, 0.1, 0.4]))
def test_cdpo_is_the_smoothed_loss_on_log_ratios(cpo_trainer: Any, seed: int, beta: float, smoothing: float) -> None:
    case = random_case(seed)
    loss = cpo(cpo_trainer, loss_type="sigmoid", beta=beta, label_smoothing=smoothing)
    wanted = theirs(case, lambda policy, reference: loss(*((policy[s] - reference[s]).sum(1) for s in SIDES)))
    same(ours(case, {"cdpo": {"beta": beta, "label_smoothing": smoothing}}), wanted)


@few
@given(seed=seeds, beta=st.sampled_from([0.5, 2.0]), gamma=st.sampled_from([0.0, 0.5, 1.6]))
def test_simpo_is_that_of_the_cpo_trainer(cpo_trainer: Any, seed: int, beta: float, gamma: float) -> None:
    case = random_case(seed)
    loss = cpo(cpo_trainer, loss_type="simpo", beta=beta, simpo_gamma=gamma)
    lengths = [case[0].chosen_mask.sum(1), case[0].rejected_mask.sum(1)]
    wanted = theirs(case, lambda policy, _: loss(*(policy[s].sum(1) / n for s, n in zip(SIDES, lengths, strict=True))))
    same(ours(case, {"simpo": {"beta": beta, "gamma": gamma}}), wanted)
