"""Through verl's engine every plugin gives what it gives in the local trainer, however the rows are cut."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import POOL, VerlSide

from rlplugins.errors import StackError
from rlplugins.registry import installed
from rlplugins.stack import Stack, StackConfig
from rlplugins.testing.parity import STEPS, Case, Drawn, Result, assert_close, draw, write_inputs
from rlplugins_verl import settings

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
IDLE_SUFFIX = ", one rank idle"
IDLE = f"p3o{IDLE_SUFFIX}"
"""`p3o` again, on ranks of which one has fewer micro-batches than the other."""


def case_of(name: str) -> Case:
    """A plugin alone, with what it needs."""
    stack = Stack([name])
    low, high = stack.group_sizes
    size = int(min(max(4, low), high))
    return Case({"plugins": [name]}, group_size=size, reference="ref_log_probs" in stack.needed_columns)


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


def test_two_ranks_give_what_one_gives(folder: Path, verl_side: VerlSide, tmp_path: Path) -> None:
    port = str(parity.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank), port, str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(600) for process in ranks] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name in (*STACKS, IDLE):
        case = replace(STACKS[name.removesuffix(IDLE_SUFFIX)], dense=True)
        for number, (mine, _) in enumerate(both(folder, verl_side, case)):
            kept = found[name][number]
            assert kept["loss"] == pytest.approx(mine.loss, rel=1e-5, abs=1e-5), name
            for parameter, gradient in mine.gradient.items():
                assert torch.allclose(gradient, kept["gradient"][parameter], rtol=1e-5, atol=1e-5), (name, parameter)
