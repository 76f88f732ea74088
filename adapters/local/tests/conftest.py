"""Small models and prompt files, made here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlplugins.plugin import Plugin
from rlplugins.stack import Stack, StackConfig
from rlplugins_local import arithmetic
from rlplugins_local.adapter import build_stack, declare
from rlplugins_local.config import TrainConfig
from rlplugins_local.data import PromptFile, Scorer
from rlplugins_local.policy import Policy
from rlplugins_local.run import LocalTrainer


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(kind: str, vocabulary: int) -> Any:
    """An untrained model; weights large enough that its distributions are far from uniform."""
    import transformers

    shape = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(7)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **shape)
        return transformers.GPT2LMHeadModel(config)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **shape))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size, **shape))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str = "qwen2") -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            tokenizer = arithmetic.make_tokenizer()
            tokenizer.save_pretrained(folder)
            small_model(kind, len(tokenizer)).save_pretrained(folder)
            made[kind] = folder
        return made[kind]

    return make


@pytest.fixture
def policy(model_folder: Callable[[str], Path]) -> Callable[[str], Policy]:
    return lambda kind="qwen2": Policy.load(model_folder(kind), torch.device("cpu"), torch.float32)


REWARDS = """
import math

def first_is_seven(prompt, response):
    return float(response.startswith("7"))

def sevens(prompt, response, answer="7"):
    return response.count(answer) / 8

def parts(prompt, response):
    return {"score": response.count("7") / 8, "length": len(response), "first": response.startswith("7")}

def always(prompt, response):
    return 1

def nothing(prompt, response):
    return None

def some_nan(prompt, response):
    return math.nan if response.startswith(("0", "1", "2")) else float("7" in response)

def batched(prompts, responses, columns):
    return [response.count(answer) / 8 for response, answer in zip(responses, columns["answer"])]

def fails(prompt, response):
    raise KeyError("no such unit")

def text(prompt, response):
    return "good"

def needs_level(prompt, response, level):
    return 0.0
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `prompts.jsonl`, `rewards.py`."""
    lines = [
        {"prompt": text, "id": f"p{place}", "answer": "7", "category": "even" if place % 2 else "odd", "level": place}
        for place, text in enumerate(["1+2=", "34+5=", "60+7=", "8=", "91+82=", "0+0=", "5+50=", "77+7="])
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def config(files: Path, model_folder: Callable[[str], Path]) -> Callable[..., TrainConfig]:
    def make(reward: str = "sevens", **settings: Any) -> TrainConfig:
        given = {
            "model": model_folder(settings.pop("kind", "qwen2")), "data": files / "prompts.jsonl", "steps": 2, "seed": 3,
            "reward": reward if ":" in reward else f"{files / 'rewards.py'}:{reward}",
            "output": files / "out", "batch_size": 16, "group_size": 4,
            "max_new_tokens": 6, "learning_rate": 1e-3, "report_to": ["none"],
        }  # fmt: skip
        return TrainConfig.model_validate(given | settings)

    return make


@pytest.fixture
def trainer() -> Callable[..., LocalTrainer]:
    """A trainer whose stack may hold plugin objects; its step is not open yet."""

    def make(config: TrainConfig, *plugins: str | dict[str, Any] | Plugin, **lines: Any) -> LocalTrainer:
        data = PromptFile(config.data)
        if any(isinstance(plugin, Plugin) for plugin in plugins):
            stack = Stack(plugins, trainer=declare(config, data.columns), **lines)
        else:
            stack = build_stack(config, StackConfig(plugins=list(plugins), **lines), data.columns)
        validation = PromptFile(config.validation_data) if config.validation_data else None
        policy = Policy.load(config.model, torch.device("cpu"), getattr(torch, config.dtype))
        return LocalTrainer(config, stack, policy, data, validation, Scorer(config.reward, list(data.columns)))

    return make
