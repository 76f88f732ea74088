"""A task to try things on: two-digit addition, with a small model that can do most of it.

    python -m rlplugins_local.arithmetic runs/arithmetic

makes, once, `model/`, `train.jsonl` and `validation.jsonl`; the reward function is `rlplugins_local.arithmetic:score`.
The model has learned to add, and then for a while to be sloppy: it forgets carries and misreads digits about half of the
time, which reinforcement learning can undo.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALPHABET = "0123456789+="
END = "<end>"
NUMBERS = range(10, 100)
SCHOOL_STEPS, PEAK_RATE = 420, 6e-3
SLOPPY_STEPS, SLOPPY_RATE = 40, 5e-4
TRAINING, VALIDATION = 512, 200  # so few that the prompts come back, and what is remembered of them is of use
VERSION = 2


def score(prompt: str, response: str, answer: str) -> float:
    """1 for the right sum, 0 for anything else."""
    return float(response == answer)


def make(folder: Path | str, seed: int = 0) -> Path:
    """Make model and prompts in `folder`, unless they are there; takes some ten seconds on one core.

    Args:
        folder: where to put them.
        seed: of the model's weights and the split of the prompts.
    """
    folder = Path(folder)
    done = folder / "made.json"
    if done.exists() and json.loads(done.read_text()) == {"version": VERSION, "seed": seed}:
        return folder
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    write_prompts(scratch, seed)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(scratch / "model")
    with one_thread():
        pretrained(tokenizer, seed).save_pretrained(scratch / "model")
    (scratch / done.name).write_text(json.dumps({"version": VERSION, "seed": seed}))
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model gains nothing from more, and loses much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_prompts(folder: Path, seed: int) -> None:
    """Sums of two numbers of two digits."""
    sums = [(first, second) for first in NUMBERS for second in NUMBERS]
    random.Random(seed).shuffle(sums)
    for name, part in (("validation", sums[:VALIDATION]), ("train", sums[VALIDATION : VALIDATION + TRAINING])):
        lines = [json.dumps(problem(first, second)) for first, second in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def problem(first: int, second: int) -> dict[str, Any]:
    """One line of the prompt file."""
    return {
        "prompt": f"{first}+{second}=",
        "id": f"{first}+{second}",
        "answer": str(first + second),
        "category": "carry" if first % 10 + second % 10 >= 10 else "no carry",
        "digits": len(str(first + second)),
    }


def make_tokenizer() -> Any:
    """One token per character, as a tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: place for place, token in enumerate(["<pad>", END, "<unknown>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>", unk_token="<unknown>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: Any, seed: int) -> Any:
    """An untrained Qwen2 model of about 0.1 M parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.125,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def pretrained(tokenizer: Any, seed: int) -> Any:
    """The model after supervised training on right sums, then briefly on sloppy ones, whose habits it takes on."""
    model = make_model(tokenizer, seed)
    source = random.Random(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=SCHOOL_STEPS, pct_start=0.1)
    for _ in range(SCHOOL_STEPS):
        supervised_step(model, optimiser, supervised_batch(tokenizer, source, right=1.0))
        schedule.step()
    optimiser = torch.optim.AdamW(model.parameters(), lr=SLOPPY_RATE, fused=True)
    for _ in range(SLOPPY_STEPS):
        supervised_step(model, optimiser, supervised_batch(tokenizer, source, right=0.5))
    return model.eval()


def supervised_step(model: Any, optimiser: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    """One step on token ids and labels."""
    ids, labels = batch
    loss = model(input_ids=ids, labels=labels).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def sloppy_answer(first: int, second: int, right: float, source: random.Random) -> str:
    """The sum with probability `right`, else with the carry forgotten (if there is one) or a digit misread."""
    answer = str(first + second)
    if source.random() < right:
        return answer
    if source.random() < 0.5:
        return str((first // 10 + second // 10) * 10 + (first + second) % 10)
    place = source.randrange(len(answer))
    return answer[:place] + source.choice("0123456789") + answer[place + 1 :]


def supervised_batch(tokenizer: Any, source: random.Random, right: float, rows: int = 128) -> tuple[Tensor, Tensor]:
    """Token ids and labels (rows, T) of random sums; -100 marks prompt and padding."""
    pairs = [(source.choice(NUMBERS), source.choice(NUMBERS)) for _ in range(rows)]
    problems = [problem(first, second) for first, second in pairs]
    answers = [sloppy_answer(first, second, right, source) for first, second in pairs]
    texts = [item["prompt"] + answer + END for item, answer in zip(problems, answers, strict=True)]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    ids, labels = encoded.input_ids, encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    starts = torch.tensor([len(item["prompt"]) for item in problems])
    return ids, labels.masked_fill(torch.arange(ids.shape[1]) < starts[:, None], -100)


if __name__ == "__main__":
    print(make(sys.argv[1] if len(sys.argv) > 1 else "runs/arithmetic"))
