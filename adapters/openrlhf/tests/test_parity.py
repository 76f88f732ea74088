"""Through OpenRLHF's trainer every plugin gives what it gives in the local trainer, however the rows are cut."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openrlhf_side
import pytest
import torch
from openrlhf_side import OpenRLHFSide

from rlplugins.registry import installed
from rlplugins.stack import Stack
from rlplugins.testing import parity
from rlplugins.testing.parity import Case, Drawn, LocalSide, Result

STACKS: dict[str, Case] = {
    "grpo": Case({"plugins": ["grpo"], "owners": {"policy_loss": "ppo_clip"}}),
    "dr_grpo": Case({"plugins": ["dr_grpo"]}),
    "bapo_twice": Case({"plugins": ["dr_grpo", "bapo"]}, passes=2),
    "spo": Case({"plugins": ["spo"]}, group_size=1),
    "three": Case({"plugins": ["bnpo", "bapo", "knapsack"]}),
    "entropy_bonus": Case(
        {"plugins": ["dr_grpo"], "owners": {"policy_loss": "cispo"}},
        settings={"actor.entropy_coef": 0.01},
        local={"entropy_coefficient": 0.01},
    ),
    "sequence_mean": Case(
        {"plugins": ["rloo", "bapo"]},
        settings={"actor.loss_agg_mode": "seq-mean-token-mean"},
        local={"reduction": "sequence_mean"},
    ),
    "dual_clip": Case({"plugins": ["dr_grpo", "bapo"]}, settings={"actor.dual_clip": 3.0}, local={"dual_clip": 3.0}),
    "kl": Case(
        {"plugins": ["bapo"]},
        reference=True,
        settings={"algo.kl.use_loss": "", "algo.kl.init_coef": 0.1, "algo.kl.estimator": "k2"},
        local={"kl": "k2", "kl_coefficient": 0.1},
    ),
    "rank-grpo": Case({"plugins": [{"rank-grpo": {"n_ranks": 3}}]}, components=3),
}
REFERENCE = {"algo.kl.use_loss": "", "algo.kl.init_coef": 1e-9}
STACKS |= {name: Case({"plugins": [name]}, reference=True, settings=REFERENCE) for name in ("grpo-d", "p3o")}
PREFERENCES = {name for name in installed() if Stack([name]).claims("preference_loss")}
STACKS |= {name: Case({"plugins": [name]}) for name in installed() if name not in {*STACKS, *PREFERENCES}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    openrlhf_side.join()
    yield parity.write_inputs(tmp_path_factory.mktemp("parity"))
    torch.distributed.destroy_process_group()


def both(folder: Path, case: Case, micro: int = 16, scores: Any = None) -> list[tuple[Result, Result]]:
    """Each step through OpenRLHF and through the local trainer, from the same rows and old log-probs."""
    local, mine = LocalSide(folder, case), OpenRLHFSide(folder, case, micro)
    if case.rows % micro and not mine.run.owns_loss:  # OpenRLHF's own loss takes no rows that fill
        mine = OpenRLHFSide(folder, case, 4)
    results = []
    for number in range(parity.STEPS):
        drawn = parity.draw(case, number, 259, 24)
        if scores is not None:
            drawn = scores(drawn)
        old = local.old_log_probs(drawn)
        entropy = mine.old_log_probs(drawn)[1] if local.trainer.stack.needs("column", "entropy") else None
        results.append((mine.step(drawn, number, old), local.step(drawn, number, entropy, old)))
    return results


@pytest.mark.parametrize("dense", [False, True], ids=["zero_or_one", "dense"])
@pytest.mark.parametrize("name", STACKS)
def test_every_plugin_gives_what_the_local_trainer_gives(name: str, dense: bool, folder: Path) -> None:
    for mine, other in both(folder, replace(STACKS[name], dense=dense)):
        parity.assert_close(mine, other)
        assert mine.gradient and any(bool(value.abs().max() > 1e-6) for value in mine.gradient.values())


@pytest.mark.parametrize("name", [name for name in STACKS if name != "p3o"])  # whose groups no part of 5 can hold
def test_micro_batches_and_rows_that_fill_the_batch_change_nothing(name: str, folder: Path) -> None:
    for mine, other in both(folder, replace(STACKS[name], dense=True), micro=5):  # 16 rows in 4 parts of 5
        parity.assert_close(mine, other)


def test_whole_groups_in_micro_batches_and_rows_that_fill_one_of_them_change_nothing(folder: Path) -> None:
    for mine, other in both(folder, replace(STACKS["p3o"], dense=True, rows=12), micro=8):
        parity.assert_close(mine, other)


def test_log_probs_and_entropies_are_those_of_the_local_trainer(folder: Path) -> None:
    case = STACKS["dr_grpo"]
    local, mine = LocalSide(folder, case), OpenRLHFSide(folder, case)
    drawn = parity.draw(case, 0, 259, 24)
    log_probs, entropy = mine.old_log_probs(drawn)
    assert torch.allclose(log_probs, local.old_log_probs(drawn) - drawn.noise * drawn.mask, atol=1e-5)
    spread = entropy[drawn.mask]
    assert float(spread.std()) > 0.1  # a model whose distributions are far from uniform, or the parity says little


def test_prompt_keys_are_those_of_the_local_trainer(folder: Path) -> None:
    mine, local = OpenRLHFSide(folder, STACKS["dr_grpo"]), LocalSide(folder, STACKS["dr_grpo"])
    assert mine.run.pool.prompts.keys.tolist() == local.pool.keys.tolist()
    assert torch.equal(torch.as_tensor(mine.run.pool.prompts["difficulty"]), torch.as_tensor(local.pool["difficulty"]))


def test_a_row_without_a_finite_reward_counts_nowhere(folder: Path) -> None:
    def spoiled(drawn: Drawn) -> Drawn:
        scores = drawn.scores.clone()
        scores[5] = float("nan")
        return replace(drawn, scores=scores)

    for name in ("dr_grpo", "gtpo"):
        for mine, other in both(folder, STACKS[name], scores=spoiled):
            parity.assert_close(mine, other)
            assert float(mine.weights[5].sum()) == 0


def test_without_any_weight_the_optimiser_makes_no_step(folder: Path) -> None:
    def worthless(drawn: Drawn) -> Drawn:
        return replace(drawn, scores=torch.full_like(drawn.scores, torch.nan))

    for mine, other in both(folder, STACKS["gtpo"], scores=worthless):
        assert not mine.gradient and not other.gradient
        assert mine.metrics["rlplugins/update_skipped"] == 1


def test_two_ranks_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    port = str(openrlhf_side.free_port())
    script = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(folder), str(rank), port, str(tmp_path)])
        for rank in range(2)
    ]
    assert [process.wait(900) for process in ranks] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, case in STACKS.items():
        local = LocalSide(folder, replace(case, dense=True))
        for number in range(parity.STEPS):
            drawn = parity.draw(replace(case, dense=True), number, 259, 24)
            kept = found[name][number]
            entropy = kept["entropy"] if local.trainer.stack.needs("column", "entropy") else None
            other = local.step(drawn, number, entropy, local.old_log_probs(drawn))
            assert kept["loss"] == pytest.approx(other.loss, rel=1e-5, abs=1e-5), name
            for parameter, gradient in other.gradient.items():
                assert torch.allclose(gradient, kept["gradient"][parameter], rtol=1e-5, atol=1e-5), (name, parameter)
