"""rDPO: Provably Robust DPO (Ray Chowdhury, Kini and Natarajan, 2024; arXiv 2403.00409), section 3.

The authors published no code. The loss is compared with `loss_type="robust"` of TRL's `trl/trainer/dpo_trainer.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from rlplugins import Pairs, Plugin, hookimpl, needs, ops
from rlplugins.defaults import log_implicit_rewards, log_ratio
from rlplugins.errors import HookError
from rlplugins.hookspecs import Log
from rlplugins.update import Batch


class Rdpo(Plugin):
    """Estimates without bias the DPO loss of the clean labels, where each is flipped with a known probability.

    Provably Robust DPO (arXiv 2403.00409), section 3.
    """

    name = "rdpo"

    eps: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Probability that a pair's label is flipped."""
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    """Factor on the log-ratios of policy and reference, as in DPO."""
    per_pair: bool = False
    """Take the probability of each pair from the data column `flip_rate` instead of `eps`."""

    @property
    def needs(self) -> tuple[needs.Need, ...]:
        """With `per_pair` the column."""
        return (needs.column("flip_rate"),) if self.per_pair else ()

    @hookimpl(when=lambda self: self.per_pair)
    def build_preferences(self, pairs: Pairs) -> Pairs:
        """The pairs as they are, if every flip rate is a number in [0, 0.5)."""
        rates = pairs["flip_rate"]
        if not isinstance(rates, Tensor) or rates.dim() != 1:
            raise HookError(self.name, "build_preferences", "the column flip_rate must hold one number for each pair")
        wrong = ~((rates >= 0) & (rates < 0.5))  # NaN too
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise HookError(self.name, "build_preferences", "a flip_rate must be 0 or more and less than 0.5, got "
                            f"{float(rates[row]):g}: leave such pairs out of the file, or exchange their sides")  # fmt: skip
        return pairs

    @hookimpl
    def preference_loss(
        self, chosen_log_probs: Tensor, chosen_ref_log_probs: Tensor, chosen_token_weights: Tensor,
        rejected_log_probs: Tensor, rejected_ref_log_probs: Tensor, rejected_token_weights: Tensor,
        batch: Batch, log: Log,
    ) -> Tensor:  # fmt: skip
        """((1 - eps) A - eps B) / (1 - 2 eps), (n,): A and B are the DPO losses of the given and the swapped order."""
        chosen = self.beta * log_ratio(chosen_log_probs, chosen_ref_log_probs, chosen_token_weights)
        rejected = self.beta * log_ratio(rejected_log_probs, rejected_ref_log_probs, rejected_token_weights)
        log_implicit_rewards(log, chosen, rejected, batch.weights)
        eps = batch["flip_rate"].to(chosen) if self.per_pair else self.eps
        given, swapped = softplus(rejected - chosen), softplus(chosen - rejected)
        loss = ((1 - eps) * given - eps * swapped) / (1 - 2 * eps)
        counted = batch.weights[:, 0]
        log("negative_loss", ops.safe_divide(((loss < 0) * counted).sum(), counted.sum()), counted.sum())
        return loss
