"""Gradients in the middle of a step: `engine.gradient_products` of the local trainer, against the bare model and autograd."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs, ops
from rlplugins.errors import ServiceError, StackError
from rlplugins.hookspecs import Log
from rlplugins.registry import Entry
from rlplugins.rollouts import Rollouts
from rlplugins.services import Engine, Gradients
from rlplugins.stack import Stack
from rlplugins.steps import Step
from rlplugins.trainer import Trainer
from rlplugins.update import Batch
from rlplugins_local import arithmetic
from rlplugins_local.adapter import declare
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy
from rlplugins_local.run import LocalTrainer

TEXTS = ["12+34=", "5=", "60+7=", "91+82="]
LIMIT = 5


def digits(prompt: str, response: str, **columns: Any) -> dict[str, float]:
    """Two components: the share of sevens, and whether the response starts with an even digit."""
    sevens, even = response.count("7") / 8, float(response[:1] in tuple("02468"))
    return {"score": sevens + even, "sevens": sevens, "even": even}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model and four prompts."""
    folder = tmp_path_factory.mktemp("gradients")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Callable[..., LocalTrainer]:
    """A trainer of this stack; every step has four responses to each of the four prompts."""

    def make(*plugins: Entry, **settings: Any) -> LocalTrainer:
        config = TrainConfig(
            model=folder / "model", data=folder / "prompts.jsonl", reward=f"{__file__}:digits", output=tmp_path,
            batch_size=16, group_size=4, max_new_tokens=LIMIT, report_to=["none"], threads=1, seed=3,
            **({"learning_rate": 1e-3} | settings),
        )  # fmt: skip
        assert config.data is not None and config.reward is not None
        data = PromptFile(config.data)
        stack = Stack(plugins, trainer=declare(config, data.columns))
        policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
        return LocalTrainer(config, stack, policy, data, None, Scorer(config.reward, list(data.columns)))

    return make


class WithReference(Plugin):
    """Has a reference policy."""

    name = "with-reference"
    needs = (needs.column("ref_log_probs"),)


class PullUp(Plugin):
    """An auxiliary loss: 0.3 times the sum of the log-probs over the number of rows, shared before and in the mini-batch."""

    name = "pull-up"

    @hookimpl
    def prepare_step(self, step: Step) -> None:
        step.share("factor", 0.3)

    @hookimpl
    def prepare_mini_batch(self, batch: Batch) -> None:
        batch.share("rows", batch.sum(torch.tensor(float(len(batch)))))

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, mask: Tensor, batch: Batch, log: Log) -> Tensor:
        log("called", 1.0)
        return batch.shared["factor"] * (log_probs * mask).sum() / batch.shared["rows"]


class Apart(Plugin):
    """An auxiliary loss that compares the responses to one prompt, which must therefore be in one micro-batch."""

    name = "apart"
    needs = (needs.together("prompt"),)

    @hookimpl
    def auxiliary_loss(self, log_probs: Tensor, mask: Tensor, groups: Tensor, batch: Batch) -> Tensor:
        sums = (log_probs * mask).sum(1, keepdim=True)
        return (sums - ops.group_mean(sums, groups)).square().sum() / batch.sample_weight


class FirstHalf(Plugin):
    """Trains on half of the rows."""

    name = "first-half"

    @hookimpl
    def select_samples(self, advantages: Tensor) -> Tensor:
        return (torch.arange(len(advantages)) < len(advantages) // 2).float()[:, None]


def opened(mine: LocalTrainer) -> Rollouts:
    """The rows of a step as the credit phase gets them, under a policy that has left the reference."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for item in mine.policy.model.parameters():
            item += 0.02 * torch.randn(item.shape, generator=source)
    mine.stack.begin_step(0, 1, mine.config.seed)
    mine.engine.begin_step(0)
    rollouts = mine.add_passes(mine.draw())
    mine.stack.credit(rollouts, mine.engine)  # in which hooks share what those of the update read
    return rollouts


def advantages_of(rollouts: Rollouts) -> list[Tensor]:
    """One per response of each sign, one per token, and none at all."""
    source = torch.Generator().manual_seed(1)
    per_token = torch.randn(rollouts.mask.shape, generator=source) * rollouts.mask
    return [torch.randn(len(rollouts), 1, generator=source), per_token, torch.zeros(len(rollouts), 1)]


# by hand


def row_by_row(model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies (B, T) of the responses by one pass of the bare model for each, without padding."""
    found = []
    for prompt, response, mask in zip(rollouts.prompts, rollouts.responses, rollouts.mask, strict=True):
        length = int(mask.sum())
        logits = model(torch.tensor([[*prompt, *response[:length].tolist()]])).logits[0]
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + length], -1)
        rows = torch.stack([log_probs.gather(1, response[:length, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)])
        found.append(torch.nn.functional.pad(rows, (0, len(mask) - length)))
    both = torch.stack(found, 1)
    return both[0], both[1]


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "token_mean": lambda loss, mask: (loss * mask).sum() / mask.sum(),
    "sequence_mean": lambda loss, mask: ((loss * mask).sum(1) / mask.sum(1)).mean(),
    "sequence_sum": lambda loss, mask: (loss * mask).sum(1).mean() / LIMIT,
}

Extra = Callable[[Rollouts, Tensor, Tensor], Tensor]
"""From rows, log-probs and entropies to a term of the loss."""


def by_hand(
    mine: LocalTrainer, rollouts: Rollouts, advantages: Sequence[Tensor], extras: Sequence[Extra] = ()
) -> dict[str, Tensor]:
    """The gradients (K, ...) of every parameter: of -A ratio, reduced as configured, plus further terms."""
    mask = rollouts.mask.float()
    named = dict(mine.policy.model.named_parameters())
    rows = []
    for values in advantages:
        log_probs, entropy = row_by_row(mine.policy.model, rollouts)
        loss = REDUCTIONS[mine.config.reduction](-values * (log_probs - log_probs.detach()).exp(), mask)
        loss = loss + sum(extra(rollouts, log_probs, entropy) for extra in extras)
        rows.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True))
    return {name: torch.stack(parts) for name, parts in zip(named, zip(*rows, strict=True), strict=True)}


def gram(gradients: dict[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """The products (K, K) of the gradients over the named parameters."""
    flat = torch.cat([gradients[name].flatten(1) for name in names or gradients], 1).double()
    return flat @ flat.T


def assert_same(found: Gradients, gradients: dict[str, Tensor], names: Sequence[str] | None = None) -> None:
    """The products over these parameters, and the norms over all, up to rounding of float32."""
    expected, whole = gram(gradients, names), gram(gradients).diagonal().sqrt()
    assert found.products.dtype == found.norms.dtype == torch.float64
    torch.testing.assert_close(found.norms, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.products, expected, rtol=1e-3, atol=1e-4 * float(whole.max()) ** 2)


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("loss", ["ppo_clip", "cispo", "reinforce"])
def test_they_are_those_of_the_bare_model(trainer: Any, loss: str, reduction: str) -> None:
    mine = trainer("grpo", reduction=reduction, loss=loss)
    rollouts = opened(mine)
    advantages = advantages_of(rollouts)
    found = mine.engine.gradient_products(rollouts, advantages)
    gradients = by_hand(mine, rollouts, advantages)
    assert_same(found, gradients)
    assert found.norms[0] > 0 and found.norms[1] > 0 and found.norms[2] == 0
    assert 0 < abs(found.products[0, 1]) < found.norms[0] * found.norms[1]


def kl(rollouts: Rollouts, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """0.7 times k3, over tokens."""
    assert rollouts.ref_log_probs is not None
    difference = rollouts.ref_log_probs - log_probs
    return 0.7 * REDUCTIONS["token_mean"](difference.exp() - difference - 1, rollouts.mask.float())


def bonus(rollouts: Rollouts, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """-0.4 times the entropy."""
    return -0.4 * REDUCTIONS["token_mean"](entropy, rollouts.mask.float())


def pull_up(rollouts: Rollouts, log_probs: Tensor, entropy: Tensor) -> Tensor:
    """What `PullUp` adds."""
    return 0.3 * (log_probs * rollouts.mask).sum() / len(rollouts)


TERMS: dict[str, tuple[list[Plugin], dict[str, Any], list[Extra]]] = {
    "kl": ([WithReference()], {"kl": "k3", "kl_coefficient": 0.7}, [kl]),
    "entropy": ([], {"entropy_coefficient": 0.4}, [bonus]),
    "auxiliary": ([PullUp()], {}, [pull_up]),
    "all": ([WithReference(), PullUp()], {"kl": "k3", "kl_coefficient": 0.7, "entropy_coefficient": 0.4},
            [kl, bonus, pull_up]),
}  # fmt: skip


@pytest.mark.parametrize("term", list(TERMS))
def test_the_whole_loss_of_the_stack_is_meant(trainer: Any, term: str) -> None:
    plugins, settings, extras = TERMS[term]
    mine = trainer("grpo", *plugins, **settings, micro_batch_size=3)
    rollouts = opened(mine)
    advantages = advantages_of(rollouts)
    gradients = by_hand(mine, rollouts, advantages, extras)
    found = mine.engine.gradient_products(rollouts, advantages)
    assert_same(found, gradients)
    assert found.norms[2] > 0.01  # without advantages only these terms are left


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_cut_into_micro_batches_does_not_matter(trainer: Any, size: int) -> None:
    plugins, settings, _ = TERMS["all"]
    found = []
    for micro_batch_size in (None, size):
        mine = trainer("grpo", *plugins, **settings, micro_batch_size=micro_batch_size, reduction="sequence_mean")
        rollouts = opened(mine)
        found.append(mine.engine.gradient_products(rollouts, advantages_of(rollouts)))
    torch.testing.assert_close(found[1].products, found[0].products, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[1].norms, found[0].norms, rtol=1e-4, atol=1e-6)


def test_rows_that_belong_together_stay_together(trainer: Any) -> None:
    found = []
    for micro_batch_size in (None, 1):
        mine = trainer("grpo", Apart(), micro_batch_size=micro_batch_size)
        rollouts = opened(mine)
        found.append(mine.engine.gradient_products(rollouts, advantages_of(rollouts)))
    torch.testing.assert_close(found[1].products, found[0].products, rtol=1e-4, atol=1e-6)
    assert found[0].norms[2] > 0.01


def test_every_row_counts_once_whichever_are_trained(trainer: Any) -> None:
    mine = trainer("grpo", FirstHalf())
    rollouts = opened(mine)
    advantages = advantages_of(rollouts)
    assert_same(mine.engine.gradient_products(rollouts, advantages), by_hand(mine, rollouts, advantages))


# which parameters


def test_products_are_over_the_named_parameters_and_norms_over_all(trainer: Any) -> None:
    mine = trainer("grpo")
    rollouts = opened(mine)
    advantages = advantages_of(rollouts)[:2]
    gradients = by_hand(mine, rollouts, advantages)
    inner = [name for name in gradients if ".layers.1." in name]
    assert 0 < len(inner) < len(gradients)
    assert_same(mine.engine.gradient_products(rollouts, advantages, parameters=r"\.layers\.1\."), gradients, inner)
    parts = [mine.engine.gradient_products(rollouts, advantages, parameters=pattern).products
             for pattern in (r"\.layers\.", r"^(?!.*\.layers\.)")]  # fmt: skip
    torch.testing.assert_close(sum(parts), gram(gradients), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("pattern", "said"), [(r"\.layers\.99\.", "no parameter has"), ("((", "no regular expression")]
)
def test_an_unknown_parameter_is_an_error(trainer: Any, pattern: str, said: str) -> None:
    mine = trainer("grpo")
    rollouts = opened(mine)
    with pytest.raises(ServiceError, match=said):
        mine.engine.gradient_products(rollouts, advantages_of(rollouts), parameters=pattern)


def test_parameters_that_are_not_trained_do_not_count(trainer: Any) -> None:
    mine = trainer("grpo")
    frozen = next(name for name, _ in mine.policy.model.named_parameters() if ".layers.0." in name)
    rollouts = opened(mine)
    advantages = advantages_of(rollouts)[:2]
    gradients = by_hand(mine, rollouts, advantages)
    mine.policy.model.get_parameter(frozen).requires_grad_(False)
    del gradients[frozen]
    assert_same(mine.engine.gradient_products(rollouts, advantages), gradients)
    with pytest.raises(ServiceError, match="no parameter has"):
        mine.engine.gradient_products(rollouts, advantages, parameters=f"^{frozen}$")


# what they leave behind


def test_no_gradient_stays_and_no_weight_moves(trainer: Any) -> None:
    mine = trainer("grpo", PullUp(), entropy_coefficient=0.4)
    rollouts = opened(mine)
    before = [item.detach().clone() for item in mine.policy.model.parameters()]
    columns, shared = rollouts.names(), json.dumps(mine.stack.step.shared_by_all())
    found = mine.engine.gradient_products(rollouts, advantages_of(rollouts))
    assert all(item.grad is None for item in mine.policy.model.parameters())
    assert all(torch.equal(item, old) for item, old in zip(mine.policy.model.parameters(), before, strict=True))
    assert rollouts.names() == columns and json.dumps(mine.stack.step.shared_by_all()) == shared
    assert not found.products.requires_grad
    assert not any("pull-up" in name for name in mine.stack.metrics.as_dict())  # of the update, which is to come
    with torch.no_grad():
        again = mine.engine.gradient_products(rollouts, advantages_of(rollouts))
    assert torch.equal(again.products, found.products) and torch.equal(again.norms, found.norms)


def test_a_batch_without_a_token_has_no_gradient(trainer: Any) -> None:
    mine = trainer("grpo")
    rollouts = opened(mine)
    nothing = torch.zeros_like(rollouts.mask)
    empty = replace(rollouts, mask=nothing, old_log_probs=nothing.float())
    found = mine.engine.gradient_products(empty, [torch.ones(len(empty), 1)] * 2)
    assert not found.products.any() and not found.norms.any()


class Constant(Plugin):
    """A loss that does not depend on the policy."""

    name = "constant"

    @hookimpl
    def policy_loss(self, advantages: Tensor, mask: Tensor) -> Tensor:
        return -advantages * mask


def test_a_loss_that_does_not_depend_on_the_policy_has_no_gradient(trainer: Any) -> None:
    mine = trainer("grpo", Constant())
    rollouts = opened(mine)
    assert not mine.engine.gradient_products(rollouts, advantages_of(rollouts)).norms.any()


class Asks(Plugin):
    """Asks for the gradients of both components in the credit phase; the reward stays the score."""

    name = "asks"
    needs = (needs.GRADIENTS, needs.column("components"))

    parameters: str | None = None
    """Which parameters."""

    def init_state(self, run: Any) -> dict[str, Any]:
        return {"found": []}

    @hookimpl
    def combine_rewards(
        self, scores: Tensor, credit: Callable[[Tensor], Tensor], engine: Engine, rollouts: Rollouts
    ) -> Tensor:
        assert rollouts.components is not None
        advantages = [credit(part) for part in rollouts.components.split(1, dim=1)]
        found = engine.gradient_products(rollouts, advantages, parameters=self.parameters)
        self.state.found.append((rollouts.unguarded(), advantages, found))
        return scores


def weights_of(mine: LocalTrainer) -> Tensor:
    return torch.cat([item.detach().flatten() for item in mine.policy.model.parameters()])


def test_a_run_is_the_same_with_and_without_a_look_at_its_gradients(trainer: Any) -> None:
    plain, asking = trainer("grpo", mini_batches=2), trainer("grpo", Asks(), mini_batches=2)
    for mine in (plain, asking):
        for _ in range(3):
            assert mine.step()["grad_norm"] > 0
    assert torch.equal(weights_of(plain), weights_of(asking))
    assert len(asking.stack.plugins[-1].state.found) == 3


def test_in_a_step_they_are_taken_at_the_weights_before_its_update(trainer: Any) -> None:
    mine = trainer("grpo", Asks())
    mine.step()
    before = {name: item.detach().clone() for name, item in mine.policy.model.named_parameters()}
    mine.step()
    mine.policy.model.load_state_dict(before, strict=False)
    rollouts, advantages, found = mine.stack.plugins[-1].state.found[1]
    gradients = by_hand(mine, rollouts, advantages)
    assert_same(found, gradients)
    assert bool((found.norms > 0).all())


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_learning_rate_is_that_of_the_next_optimiser_step(trainer: Any, mini_batches: int) -> None:
    mine = trainer("grpo", Asks(), warmup_steps=5, learning_rate=1e-3, mini_batches=mini_batches)
    used = [mine.step()["learning_rate"] for _ in range(4)]
    found = [gradients.learning_rate for _, _, gradients in mine.stack.plugins[-1].state.found]
    assert found == pytest.approx([1e-3 * min(1, (1 + mini_batches * step) / 5) for step in range(4)])
    if mini_batches == 1:
        assert found == pytest.approx(used)


def test_a_trainer_that_cannot_give_them_is_refused() -> None:
    with pytest.raises(StackError, match="asks needs loss gradients before the update"):
        Stack([Asks()], trainer=Trainer("bare", binds=frozenset({"combine_rewards"})))


# the method that needs this


def test_the_weights_of_objectives_follow_their_gradients(trainer: Any) -> None:
    options = {
        "mode": "gradient", "weights": {"sevens": 0.5, "even": 0.5}, "target_layers": [1], "mu": 1e-3, "grad_clip": 0.05,
    }  # fmt: skip
    seen = Asks(parameters=r"\.layers\.1\.")
    mine = trainer("rloo", {"dynamic-reward-weighting": options}, learning_rate=1e-3)
    looking = trainer("rloo", seen, learning_rate=1e-3)
    mine.step(), looking.step()
    _, _, found = seen.state.found[0]
    factors = (0.05 / found.norms).clamp(max=1)
    assert bool((factors < 1).any())
    influence = (factors[:, None] * found.products * factors).sum(1)
    expected = torch.softmax(torch.tensor([0.5, 0.5], dtype=torch.float64).log() + influence, 0)
    torch.testing.assert_close(mine.stack.plugins[-1].state.w, expected, rtol=1e-5, atol=0)
    assert expected[0] != 0.5
