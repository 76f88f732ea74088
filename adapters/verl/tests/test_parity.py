"""Through verl's engine every plugin gives what it gives in the local trainer, however the rows are cut."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import parity_plugins
import pytest
import torch
from parity import POOL, VerlSide

from rlplugins import hookimpl
from rlplugins.demonstrations import Demonstrations
from rlplugins.errors import ConfigurationError, ServiceError, StackError
from rlplugins.registry import installed
from rlplugins.rollouts import Columns, Prompts, Rollouts, concatenate
from rlplugins.services import Gradients
from rlplugins.stack import Stack, StackConfig
from rlplugins.testing.parity import STEPS, Case, Drawn, Result, assert_close, draw, weights_of, write_inputs
from rlplugins_local.policy import Sequences
from rlplugins_verl import settings
from rlplugins_verl.forward import HookedForward

STACKS: dict[str, Case] = {
    "grpo": Case({"plugins": ["grpo"], "owners": {"policy_loss": "ppo_clip"}}),
    "dr_grpo": Case({"plugins": ["dr_grpo"]}),
    "bapo_twice": Case({"plugins": ["dr_grpo", "bapo"]}, passes=2),
    "three": Case({"plugins": ["bnpo", "bapo", "knapsack"]}),
    "entropy_bonus": Case(
        {"plugins": ["dr_grpo"], "owners": {"policy_loss": "cispo"}},
        settings={"actor_rollout_ref.actor.entropy_coeff": 0.01},
        local={"entropy_coefficient": 0.01},
    ),
    "sequence_mean": Case(
        {"plugins": ["rloo", "bapo"]},
        settings={"actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-mean"},
        local={"reduction": "sequence_mean"},
    ),
}
STACKS["kl"] = Case(
    {"plugins": ["bapo"]},
    reference=True,
    settings={"actor_rollout_ref.actor.kl_loss_type": "mse", "actor_rollout_ref.actor.kl_loss_coef": 0.1},
    local={"kl": "k2", "kl_coefficient": 0.1},
)
STACKS["rank-grpo"] = Case({"plugins": [{"rank-grpo": {"n_ranks": 3}}]}, components=3)
RATE = {"learning_rate": 1e-3}
WEIGHTS = {"weights": {"part0": 0.3, "part1": 0.7}, "conciseness": False}
STACKS |= {
    "dynamic-reward-weighting": Case(
        {"plugins": [{"dynamic-reward-weighting": WEIGHTS}]}, components=2, settings={"trainer.test_freq": 1},
        local={"validation_data": "prompts.jsonl"},
    ),
    "dynamic-reward-weighting, gradients": Case(
        {"plugins": [{"dynamic-reward-weighting": {"mode": "gradient", "target_layers": None, **WEIGHTS}}]}, components=2,
        local=RATE,
    ),
    "segment-po, trees": Case({"plugins": [{"segment-po": {"mode": "tree", "branch": [4], "kl": 0.0}}]}),
    "plain-forward": Case({"plugins": ["dr_grpo", "bapo", "plain-forward"]}, passes=2),
    "plain-forward, verl's loss": Case({"plugins": ["plain-forward"]}),
    "prefix-grouper, groups in the update": Case({"plugins": ["p3o", "prefix-grouper"]}, reference=True),
}  # fmt: skip
ASKING = {
    "asking": Case({"plugins": ["dr_grpo", "bapo", "asking"]}, local=RATE),
    "asking, layer 1": Case({"plugins": ["dr_grpo", {"asking": {"pattern": r"layers\.1\."}}]}, local=RATE),
    "asking, one prompt": Case({"plugins": ["dr_grpo", "plain-forward", {"asking": {"rows": 4}}]}, local=RATE),
    "asking, verl's loss": Case({"plugins": ["asking"]}, local=RATE),
    "asking, whole groups": Case({"plugins": ["p3o", "asking"]}, reference=True, local=RATE),
    "asking, forward": Case({"plugins": ["bapo", "plain-forward", "asking"]}, local=RATE),
    "asking, entropy": Case(
        {"plugins": ["dr_grpo", "asking"]}, settings={"actor_rollout_ref.actor.entropy_coeff": 0.01},
        local={"entropy_coefficient": 0.01, **RATE},
    ),
}  # fmt: skip
STACKS |= ASKING
IDLE_SUFFIX = ", one rank idle"
IDLE = ("p3o", "plain-forward, verl's loss")
"""Stacks that are tried again on ranks of which one has fewer micro-batches than the other."""
OTHERWISE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    ", FSDP1": (
        {"strategy": "fsdp"},
        ("asking", "asking, layer 1", "asking, one prompt", "bapo_twice", "prefix-grouper, groups in the update"),
    ),
    ", replicas": ({"shards": 1}, ("asking", "bapo_twice")),
}
"""How else the weights may lie on two ranks, and the stacks that are tried with it."""
DEMONSTRATIONS = Path(__file__).with_name("demonstrations.jsonl")
OPTIONS: dict[str, Any] = {
    "chord": {"demonstrations": str(DEMONSTRATIONS), "mu_peak": 0.3},
    "critique-grpo": {"critique": "indicative"},
}
"""Of plugins that ask for more than the rows of these tests have."""


def case_of(name: str) -> Case:
    """A plugin alone, with what it needs."""
    entry = {name: OPTIONS[name]} if name in OPTIONS else name
    stack = Stack([entry])
    low, high = stack.group_sizes
    size = int(min(max(4, low), high))
    return Case({"plugins": [entry]}, group_size=size, reference="ref_log_probs" in stack.needed_columns)


PREFERENCES = {name for name in installed() if Stack([name]).claims("preference_loss")}
STACKS |= {name: case_of(name) for name in installed() if name not in STACKS and name not in PREFERENCES}


def test_methods_of_preferences_are_refused() -> None:
    assert PREFERENCES
    for name in PREFERENCES:
        with pytest.raises(StackError, match="preference"):
            settings.build_stack(parity.verl_settings(Case({})), StackConfig(plugins=[name]), "sync")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def verl_side(folder: Path) -> Iterator[VerlSide]:
    torch.set_num_threads(1)
    yield VerlSide(folder)
    torch.distributed.destroy_process_group()


def both(
    folder: Path, verl_side: VerlSide, case: Case, micro: int = 16, padding: int = 0, scores: Any = None
) -> list[tuple[Result, Result]]:
    """Each step through verl and through the local trainer, from the same rows and old log-probs."""
    local = parity.local_side(folder, case)
    verl_side.begin(case)
    results = []
    for number in range(STEPS):
        drawn = draw(case, number, 259, POOL)
        if scores is not None:
            drawn = scores(drawn)
        old = local.old_log_probs(drawn)
        _, entropy = verl_side.old_log_probs(drawn)
        mine = verl_side.step(drawn, number, entropy, old, micro, padding)
        needed = entropy if local.trainer.stack.needs("column", "entropy") else None
        results.append((mine, local.step(drawn, number, needed, old)))
    return results


@pytest.mark.parametrize("dense", [False, True], ids=["zero_or_one", "dense"])
@pytest.mark.parametrize("name", STACKS)
def test_every_plugin_gives_what_the_local_trainer_gives(
    name: str, dense: bool, folder: Path, verl_side: VerlSide
) -> None:
    case = replace(STACKS[name], dense=dense)
    for mine, other in both(folder, verl_side, case):
        assert_close(mine, other)
        assert mine.gradient and any(bool(value.abs().max() > 1e-6) for value in mine.gradient.values())


@pytest.mark.parametrize("name", STACKS)
def test_micro_batches_and_rows_that_fill_the_batch_change_nothing(
    name: str, folder: Path, verl_side: VerlSide
) -> None:
    for mine, other in both(folder, verl_side, replace(STACKS[name], dense=True), micro=5, padding=4):
        assert_close(mine, other)


@pytest.mark.parametrize("name", ["bapo_twice", "gtpo", "d3s", "p3o"])
def test_micro_batches_that_are_cut_by_tokens_change_nothing(
    name: str, folder: Path, verl_side: VerlSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verl_side, "tokens", 60)
    for mine, other in both(folder, verl_side, replace(STACKS[name], dense=True), padding=4):
        assert_close(mine, other)


def test_log_probs_and_entropies_are_those_of_the_local_trainer(folder: Path, verl_side: VerlSide) -> None:
    case = STACKS["dr_grpo"]
    local = parity.local_side(folder, case)
    verl_side.begin(case)
    drawn = draw(case, 0, 259, POOL)
    log_probs, entropy = verl_side.old_log_probs(drawn)
    assert torch.allclose(log_probs, local.old_log_probs(drawn) - drawn.noise * drawn.mask, atol=1e-5)
    spread = entropy[drawn.mask]
    assert float(spread.std()) > 0.1  # a model whose distributions are far from uniform, or the parity says little


def test_prompt_keys_are_those_of_the_local_trainer(folder: Path, verl_side: VerlSide) -> None:
    verl_side.begin(STACKS["dr_grpo"])
    assert verl_side.pool.prompts.keys.tolist() == parity.local_side(folder, STACKS["dr_grpo"]).pool.keys.tolist()


def test_a_row_without_a_finite_reward_counts_nowhere(folder: Path, verl_side: VerlSide) -> None:
    def spoiled(drawn: Drawn) -> Drawn:
        scores = drawn.scores.clone()
        scores[5] = float("nan")
        return replace(drawn, scores=scores)

    for name in ("dr_grpo", "gtpo"):
        for mine, other in both(folder, verl_side, STACKS[name], scores=spoiled):
            assert_close(mine, other)
            assert float(mine.weights[5].sum()) == 0


def test_without_any_weight_the_optimiser_makes_no_step(folder: Path, verl_side: VerlSide) -> None:
    def worthless(drawn: Drawn) -> Drawn:
        return replace(drawn, scores=torch.full_like(drawn.scores, torch.nan))

    for mine, other in both(folder, verl_side, STACKS["gtpo"], scores=worthless):
        assert not mine.gradient and not other.gradient
        assert mine.metrics["rlplugins/update_skipped"] == 1


# services and the hook `forward`


def same_gradients(mine: Gradients, other: Gradients) -> None:
    """Products, norms and rate agree, relative to the longest gradients."""
    longest = float(other.norms.max())
    assert torch.allclose(mine.products, other.products, rtol=1e-5, atol=1e-5 * longest**2)
    assert torch.allclose(mine.norms, other.norms, rtol=1e-5, atol=1e-5 * longest)
    assert mine.learning_rate == pytest.approx(other.learning_rate) and longest > 1e-3


@pytest.mark.parametrize("cut", [(16, None), (5, None), (16, 60)], ids=["whole", "by_rows", "by_tokens"])
@pytest.mark.parametrize("name", ASKING)
def test_gradient_products_are_those_of_the_local_trainer(
    name: str, cut: tuple[int, int | None], folder: Path, verl_side: VerlSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity_plugins.FOUND.clear()
    micro, tokens = cut
    monkeypatch.setattr(verl_side, "tokens", tokens)
    both(folder, verl_side, replace(STACKS[name], dense=True), micro, padding=-16 % micro)
    found = parity_plugins.FOUND
    assert len(found) == 2 * STEPS
    for mine, other in zip(found[::2], found[1::2], strict=True):
        same_gradients(mine, other)
        assert (mine.norms.square() - mine.products.diagonal() > 1e-6).all() == ("layer" in name)


def test_gradient_products_leave_nothing_behind(folder: Path, verl_side: VerlSide) -> None:
    case = STACKS["asking"]
    verl_side.begin(case)
    engine = verl_side.engine
    drawn = draw(case, 0, 259, POOL)
    _, entropy = verl_side.old_log_probs(drawn)
    old = parity.local_side(folder, case).old_log_probs(drawn)
    weights = {name: parity.whole(value).clone() for name, value in engine.module.named_parameters()}
    moments, numbers = str(engine.optimizer.state_dict()), torch.get_rng_state()
    asked = verl_side.gradient_products
    drawing: list[float] = []
    hook = engine.module.register_forward_hook(lambda *given: drawing.append(float(torch.rand(()))))
    for number, training in enumerate((True, False)):
        engine.module.train(training)
        drawing.clear()
        seen: list[bool] = []

        def watched(*given: Any, seen: list[bool] = seen, training: bool = training, **named: Any) -> Gradients:
            torch.set_rng_state(numbers)
            found = asked(*given, **named)
            assert len(drawing) == 3 and len(set(drawing)) == 1  # dropout would be the same for every advantage
            seen.append(all(item.grad is None for item in engine.module.parameters()))
            assert all(part.training == training for part in engine.module.modules()) and engine.mode is None
            assert torch.equal(torch.get_rng_state(), numbers) and str(engine.optimizer.state_dict()) == moments
            return found

        verl_side.gradient_products = watched  # type: ignore[method-assign]
        try:
            verl_side.step(drawn, number, entropy, old, 16)
        finally:
            verl_side.gradient_products = asked  # type: ignore[method-assign]
        assert seen == [True]
    hook.remove()
    for name, value in engine.module.named_parameters():
        assert torch.equal(parity.whole(value), weights[name]), name


def test_parameters_that_nobody_has_are_an_error_that_says_so(folder: Path, verl_side: VerlSide) -> None:
    case = Case({"plugins": [{"asking": {"pattern": "nowhere"}}]})
    verl_side.begin(case)
    drawn = draw(case, 0, 259, POOL)
    log_probs, entropy = verl_side.old_log_probs(drawn)
    with pytest.raises(ServiceError, match=r"nowhere.*embed_tokens"):
        verl_side.step(drawn, 0, entropy, log_probs, 16)


def shared(drawn: Drawn) -> Drawn:
    """The same, in which responses to one prompt have its tokens before them."""
    same = {int(prompt): tokens for prompt, tokens in zip(drawn.prompt, drawn.prompts, strict=True)}
    return replace(drawn, prompts=[same[int(prompt)] for prompt in drawn.prompt])


def shuffled(drawn: Drawn) -> Drawn:
    """The rows in another order."""
    order = torch.randperm(len(drawn.prompt), generator=torch.Generator().manual_seed(0))
    rows = {name: value[order] for name, value in vars(drawn).items() if isinstance(value, torch.Tensor)}
    return replace(drawn, **rows, prompts=[drawn.prompts[row] for row in order.tolist()])


@pytest.mark.parametrize("micro", [16, 5, 2])
@pytest.mark.parametrize("name", ["prefix-grouper", "plain-forward"])
def test_prompts_that_rows_share_are_trained_as_in_the_local_trainer(
    name: str, micro: int, folder: Path, verl_side: VerlSide
) -> None:
    """Together in a micro-batch, as far as its limit allows."""
    parity_plugins.CALLS.clear()
    case = replace(STACKS[name], dense=True)
    for mine, other in both(
        folder, verl_side, case, micro, padding=-16 % micro, scores=lambda drawn: shuffled(shared(drawn))
    ):
        assert_close(mine, other)
    if name == "plain-forward":
        calls = [call for call in parity_plugins.CALLS if call.model.startswith("FSDP") and call.backward]
        assert max(call.prompts for call in calls) == {16: 4, 5: 2, 2: 1}[micro]
        assert max(call.rows for call in calls) == micro


@pytest.mark.parametrize("name", ["plain-forward", "prefix-grouper"])
@pytest.mark.parametrize(("micro", "tokens", "prompts"), [(16, None, 4), (4, None, 1), (3, None, 3), (16, 45, 1)])
def test_a_plugins_forward_gives_what_verls_gives_in_the_order_of_the_rows(
    name: str, micro: int, tokens: int | None, prompts: int, folder: Path, verl_side: VerlSide,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawn = shuffled(shared(draw(STACKS["dr_grpo"], 1, 259, POOL)))
    verl_side.begin(STACKS["dr_grpo"])
    theirs = verl_side.old_log_probs(drawn)
    verl_side.begin(Case({"plugins": [name]}))
    monkeypatch.setattr(verl_side, "tokens", tokens)
    parity_plugins.CALLS.clear()
    mine = verl_side.old_log_probs(drawn, micro, drawn.prompt)
    for found, other in zip(mine, theirs, strict=True):
        assert torch.allclose(found, other, rtol=1e-5, atol=1e-5)
    if name == "plain-forward":
        calls = parity_plugins.CALLS
        assert {call.model for call in calls} == {"FSDPQwen2ForCausalLM"}  # whose hooks gather the weights
        assert not any(call.backward for call in calls)
        assert max(call.prompts for call in calls) == prompts and max(call.rows for call in calls) <= micro


def test_what_a_forward_cannot_take_or_leaves_out_is_an_error(folder: Path, verl_side: VerlSide) -> None:
    class Silent(parity_plugins.PlainForward):
        """Gives no entropies."""

        name = "silent"

        @hookimpl
        def forward(self, model: Any, batch: Any, temperature: float) -> tuple[torch.Tensor, None]:
            return torch.zeros(batch.mask.shape), None

    stack = Stack([Silent()])
    stack.begin_step(0, 1)
    drawn = draw(STACKS["dr_grpo"], 0, 259, POOL)
    columns = parity.sequences(drawn)
    verl_side.begin(STACKS["dr_grpo"])
    for more, entropy, said in (
        ({}, True, "gave no entropies"),
        ({"multi_modal_inputs": [{"pixels": 1}, *[{}] * 15]}, False, "images"),
    ):
        data = verl_side._data(columns | more, 16, calculate_entropy=entropy, micro=16)
        with pytest.raises(ConfigurationError, match=said):
            HookedForward(stack, verl_side.engine)(data, None, True)
    plain = verl_side._data(columns | {"multi_modal_inputs": [{}] * 16}, 16, calculate_entropy=False, micro=16)
    loss, output = HookedForward(stack, verl_side.engine)(plain, None, True)
    assert float(loss) == output["loss"] == 1 and set(output["model_output"]) == {"log_probs"}


def test_answers_of_experts_are_trained_as_in_the_local_trainer(folder: Path, verl_side: VerlSide) -> None:
    """Two of prompts outside of the pool and one of a prompt of the step, in no group and under a loss of their own."""
    case = Case({"plugins": ["dr_grpo", "bapo", "taught"]}, dense=True)
    local = parity.local_side(folder, case)
    drawn = draw(case, 0, 259, POOL)
    trainer = local.trainer
    trainer.stack.begin_step(0, STEPS, seed=1)
    foreign = Demonstrations.from_file(DEMONSTRATIONS)
    chosen = local.pool.select(drawn.prompt[5:6])
    own = Demonstrations(replace(chosen, columns=Columns()), ["5"])  # of its columns verl's side has few

    def extended(rollouts: Rollouts) -> Rollouts:
        for source in (foreign, own):
            made = source.rows(torch.arange(len(source)), trainer.engine, rollouts, "expert")
            rollouts = concatenate([rollouts, made])
        return rollouts

    rows = extended(rollouts_of(drawn, local.pool))
    assert len(rows) == 20 and rows.groups[16:].tolist() == [-1] * 4 and int(rows.of_kind("expert").sum()) == 4
    sequences = Sequences.of(rows.prompts, rows.responses, rows.mask)
    old = trainer.policy.passes(sequences, 1.0, None).log_probs
    old[:16, :9] += drawn.noise * drawn.mask
    rows = replace(rows, old_log_probs=old * rows.mask)
    credit = trainer.stack.credit(rows, trainer.engine)
    metrics = trainer.update(rows, credit).as_dict()
    weights = weights_of(credit, rows.mask)
    other = Result(credit.advantages * rows.mask, weights, metrics["loss"], local.gradient, {})
    assert not bool(other.advantages[16:].any()) and bool(weights[16:].any(1).all())

    verl_side.begin(case)
    result = verl_side.step(drawn, 0, torch.zeros_like(old), old, 5, extended=extended)
    assert_close(result, other)


def rollouts_of(drawn: Drawn, pool: Prompts) -> Rollouts:
    """The rows as the local trainer would have drawn them."""
    return Rollouts(
        prompt_keys=pool.keys[drawn.prompt], prompt_rows=pool.rows[drawn.prompt], groups=drawn.prompt.clone(),
        prompts=drawn.prompts, responses=drawn.responses, mask=drawn.mask, scores=drawn.scores,
        kind=torch.zeros(len(drawn.prompt), dtype=torch.int8), version=torch.zeros(len(drawn.prompt), dtype=torch.int64),
    )  # fmt: skip


SUFFIXES = (IDLE_SUFFIX, *OTHERWISE)


def test_two_ranks_give_what_one_gives(folder: Path, verl_side: VerlSide, tmp_path: Path) -> None:
    port = str(parity.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank), port, str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(600) for process in ranks] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, case in STACKS.items():
        parity_plugins.FOUND.clear()
        for number, (mine, _) in enumerate(both(folder, verl_side, replace(case, dense=True))):
            runs = [found[run][number] for run in (name, *(name + suffix for suffix in SUFFIXES)) if run in found]
            for kept in runs:
                assert kept["loss"] == pytest.approx(mine.loss, rel=1e-5, abs=1e-5), name
                if name in ASKING:
                    asked = parity_plugins.FOUND[2 * number]
                    same_gradients(Gradients(*kept["products"], asked.learning_rate), asked)
            for parameter, gradient in mine.gradient.items():
                for kept in runs:
                    if parameter in kept["gradient"]:  # FSDP has others
                        there = kept["gradient"][parameter]
                        assert torch.allclose(gradient, there, rtol=1e-5, atol=1e-5), (name, parameter)
                assert parameter in runs[0]["gradient"]
