"""Prompt files, reward functions, model folders and settings: what is wrong is said, with the place."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from rlplugins import Plugin, hookimpl, needs
from rlplugins.errors import ConfigurationError, DataError, ServiceError, StackError
from rlplugins.hookspecs import HOOKS
from rlplugins.rollouts import Requests, prompt_key
from rlplugins.stack import Stack, StackConfig
from rlplugins.table import PromptTable
from rlplugins.trainer import find_adapter
from rlplugins_local import train
from rlplugins_local.adapter import declare, group_size
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import RECORD, PromptFile, Scorer, load_function
from rlplugins_local.output import Trackers, describe, display

EMPTY = StackConfig()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no lines"),
        ('{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ('{"prompt": "a"}\n\n{"question": "b"}', "line 3 is not an object with a `prompt`"),
        ("[1, 2]", "line 1 is not an object"),
        ('{"prompt": ""}', "line 1: `prompt` must be"),
        ('{"prompt": [{"content": "hello"}]}', "line 1: `prompt` must be"),
        ('{"prompt": 5}', "line 1: `prompt` must be"),
        ('{"prompt": "a", "scores": 1}', "rename the field 'scores'"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "lines 1 and 2 have the id 1"),
    ],
)
def test_a_bad_prompt_file_names_the_line(tmp_path, text, problem):
    with pytest.raises(DataError, match=problem):
        PromptFile(write(tmp_path / "prompts.jsonl", text))


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl"):
        PromptFile(tmp_path / "nothing.jsonl")


def test_fields_become_columns_and_ids_become_keys(tmp_path):
    lines = [
        {"prompt": "a", "id": 5, "level": 1, "x": 0.5, "ok": True, "note": "n"},
        {"prompt": "b", "level": 2, "x": 1, "ok": False},
    ]
    path = write(tmp_path / "prompts.jsonl", "\n".join(map(json.dumps, lines)))
    prompts = PromptFile(path).prompts(PromptTable())
    assert prompts.keys.tolist() == [prompt_key("5"), prompt_key('"b"')]
    assert prompts["level"].dtype == torch.int64 and prompts["level"].tolist() == [1, 2]
    assert prompts["x"].dtype == torch.float32 and prompts["x"].tolist() == [0.5, 1.0]
    assert prompts["ok"].tolist() == [True, False]
    assert prompts["note"] == ["n", None]
    assert prompts.rows.tolist() == [0, 1]
    assert PromptFile(path).prompts().rows.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("rewards.py", "neither module:function"),
        ("rewards.py:", "neither module:function"),
        ("nothing.py:score", "there is no file"),
        ("rewards.py:missing", "has no function 'missing'"),
        ("no_such_module:score", "cannot be imported"),
        ("broken.py:score", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_reward_that_cannot_be_found_says_why(files, monkeypatch, name, problem):
    monkeypatch.chdir(files)
    (files / "broken.py").write_text("1 / 0")
    with pytest.raises(DataError, match=problem):
        load_function(name)


def test_a_module_beside_the_user_is_found(files, monkeypatch):
    (files / "my_rewards_module.py").write_text("def score(prompt, response):\n    return 1\n")
    monkeypatch.chdir(files)
    assert load_function("my_rewards_module:score")("a", "b") == 1


def scorer(files: Path, name: str, *columns: str) -> Scorer:
    return Scorer(f"{files / 'rewards.py'}:{name}", columns)


def test_an_exception_in_the_reward_shows_the_prompt(files):
    with pytest.raises(DataError, match=r"KeyError: 'no such unit'\n    prompt: '1\+1='\n    response: '2'"):
        scorer(files, "fails")(["1+1="], ["2"], [{}])


def test_a_reward_that_is_no_number_is_named(files):
    with pytest.raises(DataError, match=r"gave 'good' \(str\) as score, which is not a number, for the prompt 'p'"):
        scorer(files, "text")(["p"], ["2"], [{}])


def test_a_reward_that_takes_what_the_file_lacks_is_refused_at_once(files):
    with pytest.raises(DataError, match="takes level, which the prompt file does not have; its fields: answer"):
        scorer(files, "needs_level", "answer")


def test_a_reward_gets_the_fields_that_it_takes_as_they_stand_in_the_file(files):
    scores, components = scorer(files, "sevens", "answer", "level")(
        ["p", "p"], ["7", "88"], [{"answer": "7"}, {"answer": "8"}]
    )
    assert scores.tolist() == [[0.125], [0.25]]
    assert components is None


def test_none_and_infinity_are_no_score(files):
    (files / "rewards.py").write_text(
        "def score(prompt, response):\n    return {'n': None, 'i': float('inf')}.get(response, 1)"
    )
    scores, _ = scorer(files, "score")(["p"] * 3, ["n", "i", "x"], [{}] * 3)
    assert scores.isnan().flatten().tolist() == [True, True, False]


def test_a_new_component_is_refused(files):
    (files / "rewards.py").write_text("def score(prompt, response):\n    return {'score': 1, response: 2}")
    mine = scorer(files, "score")
    mine(["p"], ["a"], [{}])
    with pytest.raises(DataError, match="gave the component 'b'"):
        mine(["p"], ["b"], [{}])


def test_a_batch_of_another_length_is_refused(files):
    (files / "rewards.py").write_text("def score(prompts, responses, columns):\n    return [1]")
    with pytest.raises(DataError, match="gave 1 scores for 2 responses"):
        scorer(files, "score")(["p", "q"], ["a", "b"], [{}, {}])


def test_a_folder_without_a_model_is_named(config, tmp_path):
    with pytest.raises(DataError, match=r"it has no config\.json"):
        train(config(model=tmp_path), EMPTY, progress=False)


def test_a_folder_without_a_tokenizer_is_named(config, tmp_path, model_folder):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder() / name).read_bytes())
    with pytest.raises(DataError, match="tokenizer"):
        train(config(model=tmp_path), EMPTY, progress=False)


def test_chat_messages_need_a_chat_template(config, tmp_path, model_folder, trainer):
    data = write(tmp_path / "chat.jsonl", json.dumps({"prompt": [{"role": "user", "content": "1+2="}]}))
    with pytest.raises(DataError, match="no chat template"):
        trainer(config(data=data)).step()


def test_chat_messages_go_through_the_chat_template(config, tmp_path, policy):
    mine = policy()
    mine.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}="
    assert mine.encode([[{"role": "user", "content": "1+2"}], "1+2="]) == [[4, 13, 5, 14]] * 2


def test_an_illegal_stack_is_refused_before_anything_is_read(config):
    with pytest.raises(StackError):
        train(config(model="nowhere", data="nowhere"), StackConfig(plugins=["bnpo", "gtpo"]), progress=False)


def test_a_group_size_that_a_plugin_forbids_has_a_remedy(config):
    with pytest.raises(StackError, match="set group_size: 2"):
        train(config(group_size=1), StackConfig(plugins=["bnpo"]), progress=False)


def test_group_advantages_of_single_responses_are_refused(config):
    with pytest.raises(ConfigurationError, match="set group_size to 2 or more"):
        train(config(group_size=1), EMPTY, progress=False)


def test_a_batch_smaller_than_a_group_is_refused(config):
    with pytest.raises(ConfigurationError, match="batch_size 2 is less"):
        train(config(batch_size=2, group_size=4), EMPTY, progress=False)


def test_the_group_size_is_what_the_stack_needs(config):
    free = config(group_size=None, batch_size=256)
    assert group_size(free, Stack([], trainer=declare(free))) == 8
    assert group_size(free, Stack(["bnpo"], trainer=declare(free))) == 8


class NeedsColumn(Plugin):
    """Reads a field of the prompt file."""

    name = "needs_column"
    needs = (needs.column("difficulty"),)

    @hookimpl
    def shape_rewards(self, rewards, rollouts):
        return rewards


def test_a_column_that_the_file_lacks_is_missed_before_the_run(config, trainer):
    with pytest.raises(StackError, match=r"column 'difficulty'.*add the field to the lines of the prompt file"):
        trainer(config(), NeedsColumn())


@pytest.mark.parametrize("name", ["nothing_like_it", "comet_ml"])
def test_an_unknown_or_missing_tracker_is_named(tmp_path, name):
    with pytest.raises(ConfigurationError, match=f"report_to.*{name}.*tensorboard"):
        Trackers([name], tmp_path, {})


def test_tensorboard_gets_the_metrics(config):
    train(config(steps=1, report_to=["tensorboard"]), EMPTY, progress=False)
    assert list(config().output.rglob("events.out.tfevents*"))


def test_settings_are_validated():
    with pytest.raises(ValidationError, match="learning_rat"):
        TrainConfig.model_validate({"model": "m", "data": "d", "reward": "r", "learning_rat": 1})
    for bad in ({"batch_size": 0}, {"temperature": 0}, {"top_p": 0}, {"loss": "sft"}, {"clip_low": 2}):
        with pytest.raises(ValidationError):
            TrainConfig.model_validate({"model": "m", "data": "d", "reward": "r"} | bad)


def test_every_setting_is_documented():
    assert all(field.description for field in TrainConfig.model_fields.values())


def test_a_device_that_is_not_there_is_named(config):
    with pytest.raises(ConfigurationError, match="device 'cuda:7' cannot be used"):
        train(config(device="cuda:7"), EMPTY, progress=False)


def test_the_engine_refuses_what_it_cannot_give(config, trainer):
    mine = trainer(config())
    mine.stack.begin_step(0, 1)
    with pytest.raises(ServiceError, match="no reference policy"):
        mine.engine.log_probs([[3]], torch.tensor([[4]]), torch.tensor([[True]]), policy="reference")
    with pytest.raises(ServiceError, match="no policy 'best'"):
        mine.engine.log_probs([[3]], torch.tensor([[4]]), torch.tensor([[True]]), policy="best")
    chosen = mine.pool.select(torch.arange(2))
    del chosen.columns[RECORD]
    with pytest.raises(ServiceError, match="can be scored"):
        mine.engine.generate(Requests.of(chosen, torch.tensor([1, 1])))


def test_lines_are_shown_where_there_is_no_terminal(capsys):
    with display(40, 0, True) as shown:
        for step in range(1, 41):
            shown.show(step, {"reward": 0.5, "rlplugins/spo/x": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert 15 < len(lines) < 25
    assert lines[-1] == "step 40/40  reward 0.5  spo/x 1"


def test_a_skipped_update_is_said():
    assert describe({"update_skipped": 1.0}) == "update skipped: no response counts"


def test_the_adapter_is_found_and_well():
    adapter = find_adapter("local")
    assert adapter.configured({}).name == "local"
    assert adapter.configured({}).binds == frozenset(HOOKS)  # it may be for either kind of training
    assert "preference_loss" not in adapter.configured({"data": "a", "reward": "b:c"}).binds
    assert "policy_loss" not in adapter.configured({"pairs": "a"}).binds
    assert adapter.command(Path("a"), Path("b"), True)[-3:] == ["--output", "b", "--resume"]
    text, well = adapter.doctor()
    assert well and "agree with transformers" in text


def test_importing_the_adapter_does_not_import_transformers():
    import subprocess
    import sys

    code = (
        "import sys, rlplugins_local; rlplugins_local.adapter.configured({}); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
