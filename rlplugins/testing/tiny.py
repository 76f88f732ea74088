"""A model and a tokenizer of a few kilobytes, for runs of real trainers on a CPU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }} {{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)


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


def additions(train: int, validation: int, seed: int = 1) -> dict[str, list[tuple[int, int]]]:
    """Different pairs of digits to add, by split."""
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(seed).shuffle(pairs)
    return {"train": pairs[:train], "validation": pairs[train : train + validation]}
