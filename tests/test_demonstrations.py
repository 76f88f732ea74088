"""Expert answers: read, made into rows, and trained by the local trainer beside what the policy draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.demonstrations import DemonstrationLoader, Demonstrations
from rlplugins.errors import ConfigurationError, DataError, StateError
from rlplugins.registry import Entry
from rlplugins.rollouts import Columns, Rollouts, completed, concatenate
from rlplugins.services import Engine
from rlplugins.stack import Stack, StackConfig
from rlplugins.steps import Run, Step
from rlplugins.testing import credit, make_pool, make_rollouts
from rlplugins.testing.tiny import write_model
from rlplugins_local import arithmetic, train
from rlplugins_local.adapter import declare
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy
from rlplugins_local.run import LocalTrainer

TEXTS = ["12+34=", "5=", "60+7=", "91+82="]
ANSWERS = ["46", None, "67", ""]
ELSEWHERE = [("1+1=", "2"), ("70+7=", "77"), ("9+4+2=", "15")]
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]


def sevens(prompt: str, response: str, **columns: Any) -> float:
    """Share of sevens in the response."""
    return response.count("7") / 8


def write(path: Path, *records: Any) -> Path:
    """A JSON Lines file; texts are lines as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def shown(prompt: Any, response: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A character model, prompts of which two have an answer, and answers to other prompts."""
    folder = tmp_path_factory.mktemp("demonstrations")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    lines = [{"prompt": text, "id": text, "answer": answer} for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    write(folder / "prompts.jsonl", *lines)
    write(folder / "experts.jsonl", *(shown(*pair) for pair in ELSEWHERE))
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": folder / "model", "data": folder / "prompts.jsonl", "reward": f"{__file__}:sevens", "output": tmp_path,
        "batch_size": 8, "group_size": 4, "max_new_tokens": 5, "report_to": ["none"], "threads": 1, "seed": 3,
        "learning_rate": 1e-3, "max_grad_norm": 1e9,
    }  # fmt: skip


@pytest.fixture
def trainer(settings: dict[str, Any]) -> Callable[..., LocalTrainer]:
    """A trainer of this stack; every step has four responses to each of two of the four prompts."""

    def make(*plugins: Entry, **changes: Any) -> LocalTrainer:
        config = TrainConfig(**(settings | changes))
        assert config.data is not None and config.reward is not None
        data = PromptFile(config.data)
        stack = Stack(plugins, trainer=declare(config, data.columns))
        policy = Policy.load(config.model, torch.device("cpu"), torch.float32)
        return LocalTrainer(config, stack, policy, data, None, Scorer(config.reward, list(data.columns)))

    return make


class Imitates(Plugin):
    """Adds every demonstration to every step, with a loss of its own."""

    name = "imitates"
    kinds = frozenset({"expert"})
    needs = (needs.ENGINE, needs.column("answer"))
    file: Path | None = None

    def init_state(self, run: Run) -> dict[str, Any]:
        if self.file:
            return {"loader": DemonstrationLoader(Demonstrations.from_file(self.file)), "step": None}
        return {"loader": DemonstrationLoader(Demonstrations.from_column(run.pool, "answer")), "step": None}

    @hookimpl
    def extend_rollouts(self, rollouts: Rollouts, engine: Engine, step: Step) -> Rollouts:
        rollouts["drawn"] = torch.ones(len(rollouts), 1)
        loader = self.state.loader
        index = loader.next(len(loader.demonstrations), step.generator(self))
        rows = loader.demonstrations.rows(index.sort().values, engine, rollouts, "expert")
        return concatenate([rollouts, rows])

    @hookimpl(kind="expert")
    def policy_loss(self, log_probs: Tensor) -> Tensor:
        return -log_probs

    @hookimpl
    def on_step_end(self, rollouts: Rollouts, advantages: Tensor, groups: Tensor) -> None:
        self.state.step = (rollouts, advantages, groups)


def stepped(mine: LocalTrainer) -> tuple[Rollouts, Tensor, Tensor]:
    """A step, and what the last plugin saw of it."""
    mine.step()
    found: tuple[Rollouts, Tensor, Tensor] = mine.stack.plugins[-1].state.step
    return found


def row_by_row(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Log-probs (B, T) of the responses by one pass of the bare model for each, without padding."""
    rows = []
    for prompt, response, mask in zip(rollouts.prompts, rollouts.responses, rollouts.mask, strict=True):
        length = int(mask.sum())
        logits = policy.model(torch.tensor([[*prompt, *response[:length].tolist()]])).logits[0]
        log_probs = torch.log_softmax(logits[len(prompt) - 1 : len(prompt) - 1 + length].float(), -1)
        log_probs = log_probs.gather(1, response[:length, None]).flatten()
        rows.append(torch.nn.functional.pad(log_probs, (0, len(mask) - length)))
    return torch.stack(rows)


def gradient_of(policy: Policy) -> Tensor:
    return torch.cat([item.grad.flatten() for item in policy.model.parameters() if item.grad is not None])


# reading


def test_a_file_of_texts_and_chats(tmp_path: Path) -> None:
    path = write(tmp_path / "experts.jsonl", shown("1+1=", "2"), "", shown(CHAT, "two\u2028lines") | {"source": "x"})
    found = Demonstrations.from_file(path)
    assert len(found) == 2 and found.responses == ["2", "two\u2028lines"]
    assert found.prompts.texts == ["1+1=", CHAT]
    assert found.prompts.rows.tolist() == [-1, -1]


def test_a_prompt_of_the_file_has_the_key_that_it_has_among_the_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "experts.jsonl", shown("1+1=", "2"), shown(CHAT, "2"))
    assert Demonstrations.from_file(path).prompts.keys.tolist() == PromptFile(path).keys().tolist()


@pytest.mark.parametrize(
    "line",
    ["{", '"prompt"', "[1]", "null", '{"prompt": "1+1="}', '{"response": "2"}', shown("", "2"), shown("1+1=", ""),
     shown(3, "2"), shown("1+1=", 2), shown("1+1=", None), shown("1+1=", [CHAT[0]]), shown([], "2"),
     shown([{"role": "user"}], "2"), shown(["1+1="], "2")],
)  # fmt: skip
def test_a_line_that_is_no_demonstration_is_named(line: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "experts.jsonl", shown("1+1=", "2"), "", line)
    with pytest.raises(DataError, match=r"experts\.jsonl, line 3.*`prompt`.*`response`"):
        Demonstrations.from_file(path)


def test_a_file_that_cannot_be_read_or_holds_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read"):
        Demonstrations.from_file(tmp_path / "missing.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "response": "2"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl cannot be read"):
        Demonstrations.from_file(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match=r"no demonstration in the file .*empty\.jsonl"):
        Demonstrations.from_file(write(tmp_path / "empty.jsonl", ""))


def test_a_column_of_the_prompts() -> None:
    pool = make_pool(5, {"answer": ["a", None, "c", "", "e"]})
    pool = pool.select(torch.tensor([4, 1, 0, 3, 2]))
    found = Demonstrations.from_column(pool, "answer")
    assert found.responses == ["e", "a", "c"]
    assert found.prompts.texts == ["prompt 4", "prompt 0", "prompt 2"]
    assert found.prompts.rows.tolist() == pool.rows[torch.tensor([0, 2, 4])].tolist()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [("solution", ["a", "b"], "no field 'solution' .* they have: answer$"), ("answer", [None, ""], "no text at all"),
     ("answer", ["a", ["b"]], r"\['b'\]"), ("answer", torch.tensor([1, 2]), r"tensor\(1\)"),
     ("answer", torch.tensor([1.5, 0.0]), "tensor")],
)  # fmt: skip
def test_a_column_that_holds_no_demonstrations_is_named(column: str, values: Any, message: str) -> None:
    pool = make_pool(2, {"answer": values, "_record": [{}, {}]})
    with pytest.raises(ConfigurationError, match=message):
        Demonstrations.from_column(pool, column)


# one after the other


def loader_of(count: int) -> DemonstrationLoader:
    pool = make_pool(count, {"answer": ["a"] * count})
    return DemonstrationLoader(Demonstrations.from_column(pool, "answer"))


@pytest.mark.parametrize("each", [1, 3, 5, 12])
def test_every_epoch_holds_every_demonstration_once(each: int) -> None:
    loader, source = loader_of(5), torch.Generator().manual_seed(0)
    found = torch.cat([loader.next(each, source) for _ in range(5)]).tolist()
    epochs = [found[first : first + 5] for first in range(0, len(found), 5)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(5))] * each
    assert each == 1 or len({tuple(epoch) for epoch in epochs}) > 1


def test_nothing_is_drawn_before_an_epoch_begins() -> None:
    loader, source = loader_of(4), torch.Generator().manual_seed(0)
    assert loader.next(0, source).tolist() == []
    loader.next(2, source)
    before = source.get_state()
    loader.next(2, source)
    assert torch.equal(source.get_state(), before)


def test_a_loader_goes_on_where_it_was() -> None:
    loader, again, source = loader_of(5), loader_of(5), torch.Generator().manual_seed(0)
    first = loader.next(3, source).tolist()
    again.load_state_dict(loader.state_dict())
    rest = again.next(2, source).tolist()
    assert sorted(first + rest) == list(range(5))
    with pytest.raises(StateError, match="5 demonstrations, now there are 4"):
        loader_of(4).load_state_dict(loader.state_dict())


# rows of prompts outside of the pool


def test_completed_adds_zeros_and_none_for_what_is_missing() -> None:
    like = make_rollouts([1.0, 2.0], columns=Columns({"level": torch.tensor([[1, 2], [3, 4]]), "hint": ["a", "b"]}))
    like = replace(like, components=torch.ones(2, 3), component_names=("x", "y", "z"), version=torch.tensor([5, 5]))
    like["mine"] = torch.ones(2, 1)
    rows = make_rollouts([0.0], columns={"hint": ["own"], "more": ["only here"]}, tokens=7)
    made = completed(replace(rows, old_log_probs=None), replace(like, old_log_probs=None))
    assert made.columns["level"].tolist() == [[0, 0]] and made.columns["mine"].tolist() == [[0.0]]
    assert made.columns["hint"] == ["own"] and made.columns["more"] == ["only here"]
    assert made.components is not None and made.components.tolist() == [[0.0] * 3]
    assert made.version is not None and made.version.tolist() == [0] and made.old_log_probs is None
    assert "mine" in made.columns.written and "level" not in made.columns.written
    assert rows.columns.keys() == {"hint", "more"}  # the rows that were given stay as they are
    del made.columns["more"]
    both = concatenate([replace(like, old_log_probs=None), made])
    assert both.columns["hint"] == ["a", "b", "own"] and both.component_names == ("x", "y", "z")


# trained


def test_rows_from_a_file_are_tokenised_as_the_trainer_does(folder: Path, trainer: Any) -> None:
    mine = trainer("grpo", Imitates(file=folder / "experts.jsonl"))
    rollouts, _, groups = stepped(mine)
    experts = rollouts.select(rollouts.of_kind("expert"))
    assert len(experts) == 3 and len(rollouts) == 11
    encode, end = mine.policy.tokenizer, mine.policy.tokenizer.eos_token_id
    for place, (prompt, response) in enumerate(ELSEWHERE):
        assert experts.prompts[place] == encode(prompt).input_ids
        tokens = experts.responses[place][experts.mask[place]].tolist()
        assert tokens == [*encode(response, add_special_tokens=False).input_ids, end]
    assert experts.prompt_rows.tolist() == [-1] * 3 and groups[-3:].tolist() == [-1] * 3
    assert experts.columns["drawn"].flatten().tolist() == [0.0] * 3 and experts.columns["answer"] == [None] * 3


def test_rows_from_a_column_belong_to_their_prompts(trainer: Any) -> None:
    mine = trainer("grpo", Imitates())
    rollouts, _, _ = stepped(mine)
    experts = rollouts.select(rollouts.of_kind("expert"))
    assert experts.prompt_keys.tolist() == mine.pool.keys[torch.tensor([0, 2])].tolist()
    assert experts.prompt_rows.tolist() == mine.pool.rows[torch.tensor([0, 2])].tolist()
    assert mine.engine.texts(experts) == ["46", "67"]
    assert experts.columns["answer"] == ["46", "67"]


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_they_are_trained_under_their_own_prompt_with_the_loss_of_their_kind(
    folder: Path, trainer: Any, micro_batch_size: int | None
) -> None:
    imitates = Imitates(file=folder / "experts.jsonl")
    mine = trainer("grpo", imitates, learning_rate=0, micro_batch_size=micro_batch_size)
    rollouts, advantages, _ = stepped(mine)
    found = gradient_of(mine.policy)
    mine.policy.model.zero_grad()
    log_probs = row_by_row(mine.policy, rollouts)
    assert rollouts.old_log_probs is not None
    torch.testing.assert_close(rollouts.old_log_probs, log_probs.detach(), atol=1e-5, rtol=0)
    policy_loss = -advantages * (log_probs - log_probs.detach()).exp()
    losses = torch.where(rollouts.of_kind("expert")[:, None], -log_probs, policy_loss) * rollouts.mask
    (losses.sum() / rollouts.mask.sum()).backward()
    torch.testing.assert_close(found, gradient_of(mine.policy), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("from_file", [True, False])
def test_they_count_in_no_group_and_in_no_statistic_of_prompts(folder: Path, trainer: Any, from_file: bool) -> None:
    mine = trainer("grpo", Imitates(file=folder / "experts.jsonl" if from_file else None))
    rollouts, advantages, _ = stepped(mine)
    drawn = rollouts.of_kind("policy")
    alone = credit(["grpo"], rollouts.unguarded().select(drawn)).advantages
    torch.testing.assert_close(advantages[drawn], alone)
    assert not advantages[~drawn].any()
    visits = torch.zeros(4, dtype=torch.int32)
    visits[rollouts.prompt_rows[drawn].unique()] += 1
    assert mine.pool.table["visits"].tolist() == visits.tolist()


def test_a_chat_is_answered_in_the_words_of_the_template(tmp_path: Path, trainer: Any) -> None:
    write_model(tmp_path / "chat", layers=1, hidden=32)
    file = write(tmp_path / "experts.jsonl", shown(CHAT, "2"), shown("1+1=", "two"))
    mine = trainer("grpo", Imitates(file=file), model=tmp_path / "chat")
    rollouts, _, _ = stepped(mine)
    experts = rollouts.select(rollouts.of_kind("expert"))
    decode = mine.policy.tokenizer.decode
    assert decode(experts.prompts[0]) == "<|start|>system Add.<|end|><|start|>user 1 + 1<|end|><|start|>assistant "
    assert [decode(row[mask]) for row, mask in zip(experts.responses, experts.mask, strict=True)] == [
        "2<|end|>", "two<|end|>",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{"column": "answer"}, {"demonstrations": "experts.jsonl"}], ids="-".join)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    folder: Path, settings: dict[str, Any], tmp_path: Path, options: dict[str, str]
) -> None:
    if "demonstrations" in options:
        options = {"demonstrations": str(folder / options["demonstrations"])}
    chord = {"mu_warmup": 1, "mu_decay": 4, "mu_peak": 0.9, "mu_valley": 0.1, "expert_share": 0.3} | options
    stack = StackConfig(plugins=["grpo", {"chord": chord}])

    def run(name: str, **changes: Any) -> list[dict[str, float]]:
        config = TrainConfig(**(settings | {"steps": 6, "checkpoint_every": 3, "output": tmp_path / name} | changes))
        train(config, stack, progress=False)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if "seconds" not in key} for line in lines]

    whole = run("whole")
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "later")
    resumed = run("whole", resume=True)
    assert whole == resumed
    assert [row["rlplugins/chord/mu"] for row in whole] == pytest.approx(
        [0.9, 0.9 - 0.8 * 0.1464466, 0.5, 0.2171573, 0.1, 0.1]
    )
