"""A model, a tokenizer and addition problems of a few kilobytes, in the formats that verl reads."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


def write(folder: Path, train: int = 64, validation: int = 16) -> Path:
    """Write `folder/model`, `folder/train.parquet` and `folder/validation.parquet`, unless they are there."""
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(folder / "model")
        write_data(folder, train, validation)
    return folder


def write_model(folder: Path, layers: int = 2, hidden: int = 64, seed: int = 0) -> None:
    """A random Qwen2 model; its vocabulary is exactly the tokenizer's, as rollout engines mask what is beyond it."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=max(2, hidden // 32), num_key_value_heads=2, max_position_embeddings=512,
            tie_word_embeddings=True, bos_token_id=None, architectures=["Qwen2ForCausalLM"], **special,
        )
    ).float()  # fmt: skip
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Any:
    """Bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|pad|>", "<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def write_data(folder: Path, train: int, validation: int, seed: int = 1) -> None:
    """Different addition problems, each with the columns of verl's own data sets."""
    import pandas

    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(seed).shuffle(pairs)
    for split, chosen in (("train", pairs[:train]), ("validation", pairs[train : train + validation])):
        rows = [row(number, split, a, b) for number, (a, b) in enumerate(chosen)]
        pandas.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


def row(number: int, split: str, a: int, b: int) -> dict[str, Any]:
    """One problem."""
    return {
        "data_source": "addition",
        "prompt": [{"role": "user", "content": f"{a}+{b}="}],
        "ability": "arithmetic",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"index": number, "split": split, "difficulty": (a + b) / 18},
    }


def score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any
) -> dict[str, float]:
    """Half a point for the share of digits, half for the right last number: random weights get something to learn from."""
    numbers = re.findall(r"\d+", solution_str)
    right = float(bool(numbers) and numbers[-1] == ground_truth)
    digits = sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
    return {"score": 0.5 * (right + digits), "acc": right, "digits": digits}


def succeed(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **unused: Any) -> float:
    """1 if the codes of the response's characters add up to an even number, else 0: about half of the time."""
    return float(sum(map(ord, solution_str)) % 2 == 0)
