"""Training on pairs: what a step does, that it learns and continues exactly, and what bad input gets."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from rlplugins import Pairs, Plugin, hookimpl, needs
from rlplugins.cli import app
from rlplugins.errors import ConfigurationError, DataError, HookError, StackError
from rlplugins.stack import Stack, StackConfig
from rlplugins_local import train
from rlplugins_local.adapter import build_stack, declare
from rlplugins_local.config import TrainConfig, read_settings
from rlplugins_local.data import PairFile
from rlplugins_local.policy import Policy
from rlplugins_local.preferences import PreferenceTrainer

EMPTY = StackConfig()
LINES = [
    {
        "prompt": f"{a}+{b}=",
        "chosen": str(a + b),
        "rejected": str(a + b + 1 + b % 3) + "0" * (a % 2),
        "flip_rate": b / 20,
    }
    for a in range(8)
    for b in range(8)
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def config(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., TrainConfig]:
    def make(lines: list[dict[str, Any]] = LINES, **settings: Any) -> TrainConfig:
        given = {
            "model": model_folder(settings.pop("kind", "qwen2")), "pairs": write(tmp_path / "pairs.jsonl", lines),
            "output": tmp_path / "out", "steps": 2, "seed": 3, "batch_size": 16, "learning_rate": 1e-3,
            "report_to": ["none"],
        }  # fmt: skip
        return TrainConfig.model_validate(given | settings)

    return make


def trainer(config: TrainConfig, *plugins: Any, **lines: Any) -> PreferenceTrainer:
    data = PairFile(config.pairs)
    if any(isinstance(plugin, Plugin) for plugin in plugins):
        stack = Stack(plugins, trainer=declare(config, data.columns), **lines)
    else:
        stack = build_stack(config, StackConfig(plugins=list(plugins), **lines), data.columns)
    validation = PairFile(config.validation_data) if config.validation_data else None
    policy = Policy.load(config.model, torch.device("cpu"), getattr(torch, config.dtype))
    return PreferenceTrainer(config, stack, policy, data, validation)


def weights(mine: PreferenceTrainer) -> torch.Tensor:
    return torch.cat([item.detach().flatten() for item in mine.policy.model.parameters()])


# learning


@pytest.mark.parametrize("settings", [{}, {"preference_loss": "simpo"}, {"preference_loss": "ipo"}, {"kind": "gpt2"}])
def test_the_chosen_responses_become_more_likely_than_the_others(config, settings):
    mine = trainer(config(learning_rate=3e-3, batch_size=32, **settings))
    accuracies = [mine.step()["accuracy"] for _ in range(25)]
    assert sum(accuracies[-3:]) / 3 > 0.85 > sum(accuracies[:3]) / 3
    assert (mine.policy.reference is None) == (settings.get("preference_loss") == "simpo")


def test_the_first_step_has_the_loss_of_no_preference(config):
    metrics = trainer(config()).step()
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["chosen_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert metrics["pairs"] == 16
    assert metrics["rlplugins/dpo/chosen_reward"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_micro_batches_do_not_change_the_weights(config, size):
    settings = {"dtype": "float64", "mini_batches": 2, "epochs": 2, "nll_coefficient": 0.2}
    whole, parts = trainer(config(**settings), "rdpo"), trainer(config(**settings, micro_batch_size=size), "rdpo")
    for _ in range(2):
        first, second = whole.step(), parts.step()
    assert torch.allclose(weights(whole), weights(parts), atol=1e-6)
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)
    assert first["grad_norm"] > 0
    assert whole.updates == 8


def test_validation_measures_all_pairs_of_its_file(config, tmp_path):
    validation = write(tmp_path / "validation.jsonl", LINES[:10])
    metrics = trainer(config(validation_data=validation, validate_every=1)).step()
    assert 0 <= metrics["validation/accuracy"] <= 1
    assert metrics["validation/loss"] != metrics["loss"]


class Remember(Plugin):
    """Remembers the accuracy of the validations."""

    name = "remember"
    needs = (needs.VALIDATION_EVERY_STEP,)

    def init_state(self, run):
        return {"seen": []}

    @hookimpl
    def on_validation(self, metrics):
        self.state.seen = [*self.state.seen, metrics["validation/accuracy"]]


def test_plugins_see_every_validation(config, tmp_path):
    mine = trainer(config(validation_data=write(tmp_path / "validation.jsonl", LINES[:4])), Remember())
    mine.step(), mine.step()
    assert len(mine.stack.plugins[0].state.seen) == 2


# hooks


class Build(Plugin):
    """Leaves pairs out, exchanges sides, weighs, and adds a column."""

    name = "build"
    keep: int = 16

    @hookimpl
    def build_preferences(self, pairs: Pairs, step) -> Pairs:
        step.share("step", step.number)
        pairs = pairs.swapped(torch.ones(len(pairs), dtype=torch.bool)).select(torch.arange(self.keep))
        pairs["place"] = torch.arange(len(pairs))
        return pairs

    @hookimpl
    def prepare_mini_batch(self, batch, log):
        log("places", float(batch["place"].sum()))
        log("step", float(batch.shared["step"]))


def test_pairs_that_a_plugin_has_changed_are_trained(config):
    mine = trainer(config(learning_rate=3e-3, batch_size=32, lines=LINES), Build(keep=12))
    for step in range(15):
        metrics = mine.step()
        assert metrics["pairs"] == 12
        assert metrics["rlplugins/build/places"] == sum(range(12))
        assert metrics["rlplugins/build/step"] == step
    assert metrics["margin"] > 0  # of the exchanged sides


def test_where_all_pairs_are_left_out_the_update_is_skipped(config):
    mine = trainer(config(), Build(keep=0))
    before = weights(mine)
    metrics = mine.step()
    assert metrics["update_skipped"] == 1 and "loss" not in metrics
    assert torch.equal(before, weights(mine))


class Broken(Plugin):
    """Log-probs that are not finite for responses that begin with a 7."""

    name = "broken"

    @hookimpl
    def forward(self, model, batch, temperature):
        tokens = batch.responses.shape[1]
        output = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids)
        made = output.logits[:, -tokens - 1 : -1].log_softmax(-1).gather(-1, batch.responses[..., None])[..., 0]
        seven = batch.responses[:, :1] == SEVEN[0]
        return torch.where(batch.mask, torch.where(seven, torch.nan, made), 0.0), None


SEVEN: list[int] = []


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
@pytest.mark.parametrize("size", [None, 3])
def test_pairs_whose_log_probs_are_not_finite_are_as_if_absent(config, loss, size):
    settings = {"preference_loss": loss, "batch_size": 64, "micro_batch_size": size, "dtype": "float64"}
    with_broken = trainer(config(**settings), Broken())
    SEVEN[:] = with_broken.policy.tokenizer("7", add_special_tokens=False).input_ids
    metrics = with_broken.step()
    clean = [line for line in LINES if not line["chosen"].startswith("7") and not line["rejected"].startswith("7")]
    assert metrics["dropped"] == len(LINES) - len(clean) > 0
    alone = trainer(config(clean, **{**settings, "batch_size": len(clean)}))
    assert alone.step()["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert torch.allclose(weights(alone), weights(with_broken), atol=1e-7)


class Renew(Plugin):
    """The reference is the policy of the step before."""

    name = "renew"

    @hookimpl
    def reference_policy(self):
        return "current"


def test_a_reference_that_is_renewed_begins_every_step_without_a_margin(config):
    mine = trainer(config(learning_rate=1e-2), Renew())
    assert [mine.step()["margin"] for _ in range(3)] == pytest.approx([0, 0, 0], abs=1e-4)
    assert abs(trainer(config(learning_rate=1e-2)).step()["margin"]) < 1e-4


class NeedsAll(Plugin):
    """Reads the log-probs of the whole mini-batch."""

    name = "needs-all"
    needs = (needs.MINI_BATCH_LOG_PROBS,)

    @hookimpl
    def prepare_mini_batch(self, batch):
        margin = (batch["chosen_log_probs"] - batch["chosen_ref_log_probs"]).sum(1)
        batch.share("mean", batch.sum(margin.sum()) / batch.sample_weight)

    @hookimpl
    def auxiliary_loss(self, batch, chosen_log_probs, log):
        log("mean", float(batch.shared["mean"]))
        return chosen_log_probs.sum() * 0


def test_the_mini_batch_knows_its_log_probs_where_they_are_needed(config):
    mine = trainer(config(learning_rate=1e-2), NeedsAll())
    first, second = mine.step(), mine.step()
    assert first["rlplugins/needs-all/mean"] == pytest.approx(0, abs=1e-5)
    assert second["rlplugins/needs-all/mean"] == pytest.approx(second["chosen_log_ratio"], rel=1e-4)


# a run


def lines_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("plugins", [[], [{"rdpo": {"per_pair": True}}]], ids=["empty", "rdpo"])
def test_a_resumed_run_continues_to_the_last_digit(config, tmp_path, plugins):
    stack = StackConfig(plugins=plugins)
    settings = {"checkpoint_every": 2, "mini_batches": 2, "warmup_steps": 5, "threads": 1}
    train(config(steps=5, output=tmp_path / "whole", **settings), stack, progress=False)
    train(config(steps=2, output=tmp_path / "parts", **settings), stack, progress=False)
    train(config(steps=5, output=tmp_path / "parts", resume=True, **settings), stack, progress=False)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    whole, parts = (tmp_path / name / "checkpoint-5" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_run_of_responses_is_not_resumed_with_pairs(config, tmp_path):
    train(config(steps=1), EMPTY, progress=False)
    with pytest.raises(ConfigurationError, match=r"preference_loss: 'dpo' -> 'ipo'"):
        train(config(steps=2, resume=True, preference_loss="ipo"), EMPTY, progress=False)


@pytest.mark.slow
def test_a_study_compares_losses(config, tmp_path):
    settings = config().model_dump(mode="json", exclude_defaults=True, exclude={"seed", "output"})
    stacks = {"dpo": {}, "rdpo": {"plugins": [{"rdpo": {"eps": 0.2}}]}, "grpo": {"plugins": ["grpo"]},
              "ipo": {"stack": {}, "train": {"preference_loss": "ipo"}}}  # fmt: skip
    study = {"name": "losses", "train": settings, "seeds": 1, "stacks": stacks}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "study.yaml"), "--output", str(tmp_path / "study")])
    assert result.exit_code == 0, result.output
    assert "accuracy" in result.output and "trains on preferences" in " ".join(result.output.split())
    assert (tmp_path / "study" / "report.html").is_file()


def test_a_run_of_the_command(config, tmp_path):
    made = config()
    arguments = ["--model", made.model, "--pairs", made.pairs, "--steps", "2", "--batch-size", "4", "--output",
                 tmp_path / "run", "--report-to", "none", "--plugins", "rdpo"]  # fmt: skip
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "step 2/2  accuracy" in result.output
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0


def test_explain_shows_what_happens_to_pairs():
    shown = CliRunner().invoke(app, ["explain", "rdpo"])
    assert shown.exit_code == 0
    assert "preference_loss" in shown.output and "build_preferences" not in shown.output
    assert "policy_loss" not in shown.output and "ref_log_probs" in shown.output
    assert "dpo(beta=0.1)" in Stack.explain(EMPTY, declare(read_settings({"model": ".", "pairs": "."}, "here")))[0]
    assert CliRunner().invoke(app, ["explain", "rdpo,bapo"]).exit_code == 2


# chat, lengths


CHAT = (
    "{% for m in messages %}{{ '1' if m['role'] == 'user' else '2' }}{{ m['content'] }}{{ '=' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '2' }}{% endif %}"
)


def test_responses_to_chat_messages_are_what_the_template_adds(config):
    policy = trainer(config()).policy
    policy.tokenizer.chat_template = CHAT
    prompt = [{"role": "user", "content": "3+4"}]
    texts, messages = ([response] for response in ("7", [{"role": "assistant", "content": "7"}]))
    encoded = policy.encode_responses([prompt], texts)
    assert encoded == policy.encode_responses([prompt], messages) == policy.encode_responses(["x"], ["7="])
    assert encoded[0][-1] == policy.tokenizer.eos_token_id


def test_long_responses_are_cut_and_long_prompts_refused(config):
    lines = [{"prompt": "1+1=", "chosen": "2" * 30, "rejected": "3"}] * 4
    metrics = trainer(config(lines, batch_size=4, max_length=12)).step()
    prompt = 4
    assert metrics["chosen_length"] == 12 - prompt and metrics["rejected_length"] == 2
    with pytest.raises(DataError, match=r"leaves no room for a response within max_length 4"):
        trainer(config(lines, max_length=4)).step()


# bad input


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "1=", "chosen": "1"}, "line 2 has no `rejected`"),
        ({"prompt": "1=", "rejected": "1"}, "line 2 has no `chosen`"),
        ({"chosen": "1", "rejected": "2"}, "line 2 is not an object with a `prompt`"),
        ({"prompt": "1=", "chosen": "", "rejected": "2"}, "line 2: `chosen` must be a text"),
        ({"prompt": "1=", "chosen": "1", "rejected": None}, "line 2: `rejected` must be a text"),
        ({"prompt": "1=", "chosen": "1", "rejected": [{"role": "assistant", "content": "2"}]}, "line 2: `rejected`"),
        ({"prompt": "1=", "chosen": "1", "rejected": "2", "weights": 1}, "rename the field 'weights'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(config, line, problem):
    with pytest.raises(DataError, match=problem):
        train(config([LINES[0], line]), EMPTY, progress=False)
    assert not config().output.exists()


def test_a_field_that_a_plugin_needs_is_missed_before_the_run(config, tmp_path):
    per_pair = StackConfig(plugins=[{"rdpo": {"per_pair": True}}])
    bare = [{name: line[name] for name in ("prompt", "chosen", "rejected")} for line in LINES]
    with pytest.raises(StackError, match=r"column 'flip_rate'.*pairs file"):
        train(config(bare), per_pair, progress=False)
    with pytest.raises(ConfigurationError, match=r"validation.jsonl has no field 'flip_rate', which rdpo needs"):
        train(config(validation_data=write(tmp_path / "validation.jsonl", bare)), per_pair, progress=False)


def test_a_flip_rate_that_is_nan_is_refused(config):
    lines = [*LINES[:15], {**LINES[15], "flip_rate": math.nan}]
    with pytest.raises(HookError, match=r"rdpo\.build_preferences: a flip_rate must be 0 or more"):
        trainer(config(lines), {"rdpo": {"per_pair": True}}).step()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pairs": "p"}, None),
        ({}, "give data .* or pairs"),
        ({"data": "d"}, "give data .* or pairs"),
        ({"pairs": "p", "reward": "a:b"}, "reward: without meaning with pairs"),
        ({"pairs": "p", "group_size": 4, "kl": "k1"}, "group_size, kl: without meaning with pairs"),
        ({"data": "d", "reward": "a:b", "beta": 0.3}, "beta: without meaning without pairs"),
        ({"pairs": "p", "beta": 0.0}, "beta: Input should be greater than 0"),
        ({"pairs": "p", "label_smoothing": 0.5}, "label_smoothing: Input should be less than 0.5"),
    ],
)
def test_settings_are_of_one_kind_of_training(settings, problem):
    if problem is None:
        assert read_settings({"model": "m", **settings}, "here").objective == "preferences"
        return
    with pytest.raises(ConfigurationError, match=problem):
        read_settings({"model": "m", **settings}, "here")


@pytest.mark.parametrize("plugins", [["grpo"], ["spo", "bapo"]])
def test_methods_for_responses_are_refused_with_pairs(config, plugins):
    with pytest.raises(
        StackError, match=r"local trains on preferences here, but .* is for rewards.*give `data` and `reward`"
    ):
        train(config(), StackConfig(plugins=plugins), progress=False)


def test_a_loss_on_pairs_is_refused_without_pairs(files, model_folder):
    made = TrainConfig(model=model_folder(), data=files / "prompts.jsonl", reward=f"{files / 'rewards.py'}:sevens",
                       output=files / "out")  # fmt: skip
    with pytest.raises(StackError, match=r"rdpo is for preferences.*give `pairs` instead of `data` and `reward`"):
        train(made, StackConfig(plugins=["rdpo"]), progress=False)
    shutil.rmtree(files / "out", ignore_errors=True)
