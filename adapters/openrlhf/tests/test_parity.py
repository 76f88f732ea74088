"""Through OpenRLHF's trainer every plugin gives what it gives in the local trainer, however the rows are cut."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openrlhf_plugins
import openrlhf_side
import pytest
import torch
from openrlhf_side import LEARNING_RATE, OpenRLHFSide, add_segments

from rlplugins.demonstrations import Demonstrations
from rlplugins.errors import DataError, ServiceError
from rlplugins.registry import installed
from rlplugins.rollouts import Prompts, Requests, Rollouts, concatenate
from rlplugins.services import Gradients
from rlplugins.stack import Stack
from rlplugins.testing import parity
from rlplugins.testing.parity import Case, Drawn, LocalSide, Result
from rlplugins_local.engine import row_columns
from rlplugins_local.policy import Sequences
from rlplugins_openrlhf.columns import ROW

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
    "plain-forward": Case({"plugins": ["dr_grpo", "bapo", "plain-forward"]}),
}
REFERENCE = {"algo.kl.use_loss": "", "algo.kl.init_coef": 1e-9}
DEMONSTRATIONS = Path(__file__).with_name("demonstrations.jsonl")
WEIGHTS = {"weights": {"part0": 0.3, "part1": 0.7}, "conciseness": False}
STACKS |= {
    "grpo-d": Case({"plugins": ["grpo-d"]}, reference=True, settings=REFERENCE),
    "p3o": Case({"plugins": ["p3o"]}, reference=True, settings=REFERENCE),
    "p3o_grouped": Case({"plugins": ["p3o", "prefix-grouper"]}, reference=True, settings=REFERENCE),
    "segment-po": Case({"plugins": ["segment-po"]}, reference=True, settings=REFERENCE),
    "segment-po_trees": Case({"plugins": [{"segment-po": {"mode": "tree", "branch": [4], "kl": 0.0}}]}),
    "chord": Case({"plugins": [{"chord": {"demonstrations": str(DEMONSTRATIONS), "mu_peak": 0.3}}]}),
    "critique-grpo": Case({"plugins": [{"critique-grpo": {"critique": "indicative"}}]}),
    "dynamic-reward-weighting": Case(
        {"plugins": [{"dynamic-reward-weighting": WEIGHTS}]},
        components=2,
        settings={"eval.dataset": "{folder}/prompts.jsonl", "eval.steps": 1},
        local={"validation_data": "prompts.jsonl"},
    ),
    "dynamic-reward-weighting_gradients": Case(
        {"plugins": [{"dynamic-reward-weighting": {"mode": "gradient", "target_layers": None, **WEIGHTS}}]},
        components=2,
    ),
}
PREFERENCES = {name for name in installed() if Stack([name]).claims("preference_loss")}
STACKS |= {name: Case({"plugins": [name]}) for name in installed() if name not in {*STACKS, *PREFERENCES}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    torch.set_num_threads(1)
    openrlhf_side.join()
    yield parity.write_inputs(tmp_path_factory.mktemp("parity"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def local_side(folder: Path, case: Case) -> LocalSide:
    """The local trainer, whose credit phase has the engine."""
    local = LocalSide(folder, case, learning_rate=LEARNING_RATE)
    stack, engine, original = local.trainer.stack, local.trainer.engine, local.trainer.stack.credit

    def credit(rollouts: Rollouts, unused: Any) -> Any:
        add_segments(stack, rollouts)
        return original(rollouts, engine)

    stack.credit = credit  # type: ignore[method-assign]
    return local


def both(folder: Path, case: Case, micro: int = 16, scores: Any = None) -> list[tuple[Result, Result]]:
    """Each step through OpenRLHF and through the local trainer, from the same rows and old log-probs."""
    local, mine = local_side(folder, case), OpenRLHFSide(folder, case, micro)
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


@pytest.mark.parametrize("name", [name for name in STACKS if "p3o" not in name])  # whose groups no part of 5 can hold
def test_micro_batches_and_rows_that_fill_the_batch_change_nothing(name: str, folder: Path) -> None:
    for mine, other in both(folder, replace(STACKS[name], dense=True), micro=5):  # 16 rows in 4 parts of 5
        parity.assert_close(mine, other)


def test_whole_groups_in_micro_batches_and_rows_that_fill_one_of_them_change_nothing(folder: Path) -> None:
    for mine, other in both(folder, replace(STACKS["p3o"], dense=True, rows=12), micro=8):
        parity.assert_close(mine, other)


def test_log_probs_and_entropies_are_those_of_the_local_trainer(folder: Path) -> None:
    case = STACKS["dr_grpo"]
    local, mine = local_side(folder, case), OpenRLHFSide(folder, case)
    drawn = parity.draw(case, 0, 259, 24)
    log_probs, entropy = mine.old_log_probs(drawn)
    assert torch.allclose(log_probs, local.old_log_probs(drawn) - drawn.noise * drawn.mask, atol=1e-5)
    spread = entropy[drawn.mask]
    assert float(spread.std()) > 0.1  # a model whose distributions are far from uniform, or the parity says little


def test_prompt_keys_are_those_of_the_local_trainer(folder: Path) -> None:
    mine, local = OpenRLHFSide(folder, STACKS["dr_grpo"]), local_side(folder, STACKS["dr_grpo"])
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
        local = local_side(folder, replace(case, dense=True))
        products = asking(local) if name in GRADIENTS else []
        for number in range(parity.STEPS):
            drawn = parity.draw(replace(case, dense=True), number, 259, 24)
            kept = found[name][number]
            entropy = kept["entropy"] if local.trainer.stack.needs("column", "entropy") else None
            other = local.step(drawn, number, entropy, local.old_log_probs(drawn))
            assert kept["loss"] == pytest.approx(other.loss, rel=1e-5, abs=1e-5), name
            for parameter, gradient in other.gradient.items():
                assert torch.allclose(gradient, kept["gradient"][parameter], rtol=1e-5, atol=1e-5), (name, parameter)
            if products:
                same_gradients(Gradients(*kept["products"], LEARNING_RATE), products[number])


# the services of the engine, and the hook `forward`


def asking(side: LocalSide | OpenRLHFSide, pattern: str | None = None) -> list[Gradients]:
    """What each credit phase of a side is told about three advantages, of which one is per token."""
    found: list[Gradients] = []
    run: Any = side.trainer if isinstance(side, LocalSide) else side.run
    stack, engine, credit = run.stack, run.engine, run.stack.credit
    run.owns_credit = True  # where OpenRLHF's estimator runs, no hook could ask

    def first(rollouts: Rollouts, unused: Any) -> Any:
        source = torch.Generator().manual_seed(len(found))
        advantages = [torch.randn(len(rollouts), width, generator=source) for width in (1, 1, rollouts.mask.shape[1])]
        found.append(engine.gradient_products(rollouts, advantages, parameters=pattern))
        return credit(rollouts, engine)

    stack.credit = first
    return found


def same_gradients(mine: Gradients, other: Gradients) -> None:
    assert float(other.products.diagonal().min()) > 0 and mine.learning_rate == other.learning_rate == LEARNING_RATE
    for name in ("products", "norms"):
        wanted = getattr(other, name)
        torch.testing.assert_close(getattr(mine, name), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


GRADIENTS = ("bapo_twice", "three", "kl", "gtpo", "p3o", "plain-forward")
"""Stacks with a loss, a reference, entropies, whole groups, a forward of their own."""


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize(("micro", "zero", "pattern"), [(16, 0, None), (4, 2, r"layers\.1\.|norm")])
def test_gradient_products_are_those_of_the_local_trainer_and_leave_nothing_behind(
    name: str, micro: int, zero: int, pattern: str | None, folder: Path
) -> None:
    case = replace(STACKS[name], dense=True, settings={**(STACKS[name].settings or {}), "ds.zero_stage": zero})
    local, mine = local_side(folder, case), OpenRLHFSide(folder, case, micro)
    others, found = asking(local, pattern), asking(mine, pattern)
    engine = mine.actor.model
    for number in range(parity.STEPS):
        drawn = parity.draw(case, number, 259, 24)
        old = local.old_log_probs(drawn)
        entropy = mine.old_log_probs(drawn)[1] if local.trainer.stack.needs("column", "entropy") else None
        before = engine.micro_steps
        result = mine.step(drawn, number, old)
        parity.assert_close(result, local.step(drawn, number, entropy, old))  # the update is as if nobody had asked
        same_gradients(found[number], others[number])
        assert engine.micro_steps == before + case.passes * case.rows // micro


@pytest.mark.parametrize("name", ["bapo_twice", "plain-forward"])
def test_asking_for_gradients_changes_no_state(name: str, folder: Path) -> None:
    case = STACKS[name]
    mine = OpenRLHFSide(folder, case, 4)
    engine, seen = mine.actor.model, []

    def state() -> Any:
        gradients = [item.grad is None for item in engine.module.parameters()]
        return torch.get_rng_state().tolist(), gradients, mine.actor.training, engine.micro_steps, engine.global_steps

    credit = mine.run.stack.credit

    def first(rollouts: Rollouts, given: Any) -> Any:
        for training in (True, False):
            mine.actor.train(training)
            before = state()
            given.gradient_products(rollouts, [rollouts.scores, -rollouts.scores])
            seen.append(state() == before)
        with pytest.raises(ServiceError, match="no parameter has 'nothing'"):
            given.gradient_products(rollouts, [rollouts.scores], parameters="nothing")
        return credit(rollouts, given)

    mine.run.stack.credit = first  # type: ignore[method-assign]
    drawn = parity.draw(case, 0, 259, 24)
    mine.step(drawn, 0, local_side(folder, case).old_log_probs(drawn))
    assert seen == [True, True]


@pytest.mark.parametrize("micro", [16, 4, 3])
def test_a_forward_of_a_plugin_serves_every_pass(micro: int, folder: Path) -> None:
    plain = replace(STACKS["bapo_twice"], dense=True, passes=2)
    owned = replace(plain, stack={"plugins": [*plain.stack["plugins"], "plain-forward"]})
    openrlhf_plugins.CALLS.clear()
    results = []
    for case in (plain, owned):
        side = OpenRLHFSide(folder, case, micro)
        drawn = parity.draw(case, 0, 259, 24)
        log_probs, entropy = side.old_log_probs(drawn)
        old = log_probs + drawn.noise * drawn.mask
        results.append((log_probs, entropy, side.step(drawn, 0, old)))
    for without, mine in zip(*(result[:2] for result in results), strict=True):
        assert torch.allclose(without, mine, atol=1e-5)
    parity.assert_close(results[0][2], results[1][2])
    assert {name for name, _, _ in openrlhf_plugins.CALLS} == {"DeepSpeedEngine"}  # through which its own hooks run
    parts = -(-16 // micro)
    assert [grad for _, grad, _ in openrlhf_plugins.CALLS].count(True) == 2 * parts  # two passes of the update
    assert max(rows for _, grad, rows in openrlhf_plugins.CALLS if grad) == micro


@pytest.mark.parametrize("micro", [16, 8, 2])
def test_prompts_that_are_computed_once_change_nothing(micro: int, folder: Path) -> None:
    plain = Case({"plugins": ["dr_grpo", "bapo"]}, dense=True)
    grouped = replace(plain, stack={"plugins": [*plain.stack["plugins"], "prefix-grouper"]})
    local, mine = local_side(folder, plain), OpenRLHFSide(folder, grouped, micro)
    others, found = asking(local), asking(mine)
    sizes: list[int] = []
    mine.actor.model.module.register_forward_pre_hook(
        lambda module, given, named: sizes.append(named["input_ids"].numel()), with_kwargs=True
    )
    for number in range(parity.STEPS):
        drawn = with_shared_prompts(parity.draw(plain, number, 259, 24))
        old = local.old_log_probs(drawn)
        assert torch.allclose(mine.old_log_probs(drawn)[0], old - drawn.noise * drawn.mask, atol=1e-5)
        sizes.clear()
        parity.assert_close(mine.step(drawn, number, old), local.step(drawn, number, None, old))
        same_gradients(found[number], others[number])
        responses = int((drawn.mask.long() * (torch.arange(9) + 1)).amax(1).sum())
        whole = sum(len(prompt) for prompt in drawn.prompts) + responses
        once = (whole - responses) // min(4, micro) + responses
        assert len(sizes) == 4 * 16 // micro  # for three advantages, and in the update
        assert sum(sizes) <= 4 * once < 4 * whole


def with_shared_prompts(drawn: Drawn) -> Drawn:
    """Rows whose prompts are the same tokens where they are of the same prompt."""
    first: dict[int, int] = {}
    rows = [first.setdefault(prompt, row) for row, prompt in enumerate(drawn.prompt.tolist())]
    return replace(drawn, prompts=[drawn.prompts[row] for row in rows])


@pytest.mark.parametrize(("micro", "prompts"), [(2, 1), (3, 2), (4, 1), (8, 2)])
def test_rows_of_a_prompt_lie_side_by_side_where_a_plugin_would_like_it(micro: int, prompts: int, folder: Path) -> None:
    """Also where a micro-batch is smaller than a group; a need that a plugin can do without refuses nothing."""
    case = STACKS["plain-forward"]
    side = OpenRLHFSide(folder, case, micro)
    drawn = parity.draw(case, 0, 259, 24)
    order = torch.randperm(case.rows, generator=torch.Generator().manual_seed(1))
    seen: list[list[int]] = []
    train = side.updater.training_step

    def noting(experience: Any, *given: Any, **named: Any) -> Any:
        real = experience.action_mask.any(1).tolist()
        seen.append([prompt.position for prompt, own in zip(experience.prompts, real, strict=True) if own])
        return train(experience, *given, **named)

    side.updater.training_step = noting
    side.step(drawn, 0, side.old_log_probs(drawn)[0][order], lambda rollouts: rollouts.select(order))
    assert sorted(row for part in seen for row in part) == sorted(drawn.prompt.tolist())
    assert max(len(set(part)) for part in seen) == prompts


def test_what_a_plugin_would_like_does_not_enlarge_what_another_cannot_do_without(folder: Path) -> None:
    """Four groups of one prompt: `p3o` needs groups together, `prefix-grouper` would like the prompt's rows together."""
    for name, units in (("p3o_grouped", 4), ("plain-forward", 1)):
        side = OpenRLHFSide(folder, STACKS[name], 4)
        rollouts = rollouts_of(parity.draw(STACKS[name], 0, 259, 24), side.run.pool.prompts)
        found = side.run.units(replace(rollouts, prompt_rows=torch.zeros_like(rollouts.prompt_rows)))
        assert found is not None and len(found.unique()) == units


def requests_to(prompts: Prompts, rows: list[int]) -> Requests:
    return Requests.of(prompts.select(torch.tensor(rows, dtype=torch.int64)), torch.ones(len(rows), dtype=torch.int64))


@pytest.fixture
def foreign() -> Demonstrations:
    """Two expert answers to prompts that are not of the pool; the second is longer than a response may be."""
    return Demonstrations.from_file(DEMONSTRATIONS)


def test_given_responses_are_tokens_as_in_the_local_trainer(folder: Path, foreign: Demonstrations) -> None:
    case = STACKS["dr_grpo"]
    local, mine = local_side(folder, case), OpenRLHFSide(folder, case)
    for side in (local.trainer.stack, mine.run.stack):
        side.begin_step(0, parity.STEPS, 1)
    pools = local.pool, mine.run.pool.prompts
    for prompts, texts in (
        (tuple(pool.select(torch.tensor([4, 2, 4])) for pool in pools), ["77", "123456789012", ""]),
        ((foreign.prompts, foreign.prompts), foreign.responses),
    ):
        other, found = (
            engine.given(requests_to(own, list(range(len(texts)))), texts, score=False)
            for engine, own in zip((local.trainer.engine, mine.run.engine), prompts, strict=True)
        )
        assert found.prompts == other.prompts
        for name in ("responses", "mask", "prompt_keys", "groups", "kind", "version"):
            assert torch.equal(getattr(found, name), getattr(other, name)), name
        assert found.scores.isnan().all() and other.scores.isnan().all() and found.prefix is None
        assert bool((found.prompt_rows == other.prompt_rows).all())
        assert bool((torch.as_tensor(found.columns[ROW]) == -1).all())
    mixed = requests_to(mine.run.pool.prompts, [4, 2])
    mixed = replace(mixed, prompt=torch.tensor([1, 0]), texts=[mixed.texts[0], mixed.texts[1]])  # the other way round
    rows = mine.run.engine.given(mixed, ["1", "22"], score=False)
    assert rows.mask.sum(1).tolist() == [2, 3] and rows.prompt_keys.tolist() == mixed.prompts.keys.flip(0).tolist()
    assert len(mine.run.engine.given(requests_to(mine.run.pool.prompts, []), [], score=False)) == 0
    with pytest.raises(ServiceError, match="only prompts of the data set"):
        mine.run.engine.given(requests_to(foreign.prompts, [0]), ["1"])


def test_given_responses_to_texts_are_texts_with_an_end(folder: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "1+1=", "response": "2"}, {"prompt": "5=", "response": "123456789"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = Demonstrations.from_file(tmp_path / "texts.jsonl")
    local, mine = local_side(folder, STACKS["dr_grpo"]), OpenRLHFSide(folder, STACKS["dr_grpo"])
    mine.run.args.data.apply_chat_template = False
    mine.run.args.data.input_template = "{}"
    requests = requests_to(texts.prompts, [0, 1])
    found, other = (
        engine.given(requests, texts.responses, score=False) for engine in (mine.run.engine, local.trainer.engine)
    )
    assert found.prompts == other.prompts and torch.equal(found.responses, other.responses)
    assert found.mask.sum(1).tolist() == [2, 9] and int(found.responses[0, 1]) == mine.tokenizer.eos_token_id
    mine.run.args.data.apply_chat_template = True
    mine.tokenizer.chat_template = (
        "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="changes the prompt when a response follows"):
        mine.run.engine.given(requests, texts.responses, score=False)


def test_answers_of_experts_are_trained_as_in_the_local_trainer(folder: Path, foreign: Demonstrations) -> None:
    """Two of prompts outside of the pool and one of a prompt of the step, in groups of none."""
    case = Case({"plugins": ["dr_grpo", "bapo", "taught"]}, dense=True, settings={"train.batch_size": 20})  # of 19 rows
    local, mine = local_side(folder, case), OpenRLHFSide(folder, case, 4)
    drawn = parity.draw(case, 0, 259, 24)

    def extended(rollouts: Rollouts, engine: Any, pool: Prompts) -> Rollouts:
        both = Demonstrations(foreign.prompts, foreign.responses), Demonstrations(pool.select(drawn.prompt[5:6]), ["5"])
        for source in both:
            rollouts = concatenate([rollouts, source.rows(torch.arange(len(source)), engine, rollouts, "expert")])
        return rollouts

    trainer = local.trainer
    trainer.stack.begin_step(0, parity.STEPS, seed=1)
    rows = extended(rollouts_of(drawn, local.pool), trainer.engine, local.pool)
    assert len(rows) == 19 and rows.groups[16:].tolist() == [-1] * 3 and rows.of_kind("expert").sum() == 3
    sequences = Sequences.of(rows.prompts, rows.responses, rows.mask)
    old = trainer.policy.passes(sequences, 1.0, None).log_probs
    old[:16, :9] += drawn.noise * drawn.mask
    old = old * rows.mask
    rows = replace(rows, old_log_probs=old)
    credit = trainer.stack.credit(rows, trainer.engine)
    metrics = trainer.update(rows, credit).as_dict()
    other = Result(
        credit.advantages * rows.mask, parity.weights_of(credit, rows.mask), metrics["loss"], local.gradient, {}
    )
    assert not bool(other.advantages[16:].any()) and bool(other.weights[16:].any(1).all())

    result = mine.step(drawn, 0, old, lambda own: extended(own, mine.run.engine, mine.run.pool.prompts))
    parity.assert_close(result, other)


def rollouts_of(drawn: Drawn, pool: Prompts) -> Rollouts:
    """The rows as the local trainer would have drawn them."""
    return Rollouts(
        prompt_keys=pool.keys[drawn.prompt], prompt_rows=pool.rows[drawn.prompt], groups=drawn.prompt.clone(),
        prompts=drawn.prompts, responses=drawn.responses, mask=drawn.mask, scores=drawn.scores,
        kind=torch.zeros(len(drawn.prompt), dtype=torch.int8), version=torch.zeros(len(drawn.prompt), dtype=torch.int64),
        columns=row_columns(requests_to(pool, drawn.prompt.tolist())),
    )  # fmt: skip
