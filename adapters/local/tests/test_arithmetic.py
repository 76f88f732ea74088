"""The task of the demo."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlplugins_local import arithmetic


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(arithmetic, "SCHOOL_STEPS", 30)
    monkeypatch.setattr(arithmetic, "SLOPPY_STEPS", 2)


def test_the_task_is_made_once_and_loads_as_any_model(tmp_path, quick):
    folder = arithmetic.make(tmp_path / "task")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert 80_000 < sum(item.numel() for item in model.parameters()) < 120_000
    tokens = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokens("12+30=42<end>").input_ids
    assert ids[-1] == tokens.eos_token_id == model.generation_config.eos_token_id
    assert tokens.decode(ids, skip_special_tokens=True) == "12+30=42"
    made = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert arithmetic.make(tmp_path / "task") == folder
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == made


def test_prompts_are_sums_and_validation_has_others(tmp_path):
    arithmetic.write_prompts(tmp_path, seed=0)
    train, validation = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "validation")
    )
    assert not {item["id"] for item in train} & {item["id"] for item in validation}
    assert (len(train), len(validation)) == (arithmetic.TRAINING, arithmetic.VALIDATION)
    for item in train:
        first, second = map(int, item["prompt"].rstrip("=").split("+"))
        assert int(item["answer"]) == first + second
        assert item["digits"] == len(item["answer"])
        assert (item["category"] == "carry") == (first % 10 + second % 10 > 9)
        assert arithmetic.score(item["prompt"], item["answer"], item["answer"]) == 1
        assert arithmetic.score(item["prompt"], "0" + item["answer"], item["answer"]) == 0


def test_sloppy_answers_are_right_as_often_as_asked_and_forget_the_carry():
    source = random.Random(0)
    answers = [arithmetic.sloppy_answer(38, 47, 0.5, source) for _ in range(2000)]
    assert 0.48 < answers.count("85") / 2000 < 0.58  # a misread digit may be the right one
    assert 0.2 < answers.count("75") / 2000 < 0.32
    assert {arithmetic.sloppy_answer(38, 47, 1.0, source) for _ in range(100)} == {"85"}


def test_only_the_answer_is_learned():
    ids, labels = arithmetic.supervised_batch(arithmetic.make_tokenizer(), random.Random(0), right=1.0, rows=20)
    learned = labels != -100
    assert bool((labels[learned] == ids[learned]).all())
    assert not bool(learned[:, :6].any())
    assert torch.equal((labels == 1).sum(1), torch.ones(20, dtype=torch.int64))
