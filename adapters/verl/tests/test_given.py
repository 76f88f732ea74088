"""Responses and beginnings that something else has written, through verl's own agent loop."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parity
import pytest
import torch
from test_config import composed
from test_parity import STACKS
from verl.experimental.agent_loop import single_turn_agent_loop
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, register
from verl.utils.dataset.rl_dataset import RLHFDataset

from rlplugins.demonstrations import Demonstrations
from rlplugins.errors import ServiceError
from rlplugins.rollouts import Prompts, Requests
from rlplugins.testing.parity import STEPS, write_inputs
from rlplugins.testing.tiny import make_tokenizer
from rlplugins_verl.columns import PREFIX, REQUESTS
from rlplugins_verl.cpu import launch
from rlplugins_verl.cpu.rollout import LightServer
from rlplugins_verl.rollout import GIVEN, INNER, SCORED, RewritingAgentLoop, requests_of

TOKENIZER = make_tokenizer()
LIMIT = 9
END = TOKENIZER.eos_token_id


@register("twice")
class Twice(single_turn_agent_loop.SingleTurnAgentLoop):
    """Asks for a second response after the first one."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> Any:
        await super().run(sampling_params, **row)
        return await super().run(sampling_params, **row)


@register("long")
class Long(single_turn_agent_loop.SingleTurnAgentLoop):
    """Trusts the engine to give no more than it may."""

    def __init__(self, *parts: Any, **named: Any) -> None:
        super().__init__(*parts, **named)
        self.response_length = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("given"))


@functools.cache
def settings() -> Any:
    """verl's configuration of the loops."""
    return composed(launch.command(Path("x"), [f"data.max_response_length={LIMIT}"])[3:])


def answered(
    request: dict[str, Any], server: Any = None, *, prompt: str = "7+1=", inner: str = "single_turn_agent"
) -> Any:
    """What verl's agent loop makes of a request to the prompt of a data set, before it is scored."""
    config = settings()
    loop = {
        "trainer_config": DictConfigWrap(config), "server_manager": server, "tokenizer": TOKENIZER, "processor": None,
        "dataset_cls": RLHFDataset, "data_config": DictConfigWrap(config.data), "hf_model_type": None,
    }  # fmt: skip
    row = {
        "raw_prompt": [{"role": "user", "content": prompt}], "session_id": 0, INNER: inner, "uid": "u",
        REQUESTS: [{"columns": {}, **request}],
    }  # fmt: skip

    async def run() -> Any:
        return await RewritingAgentLoop(**loop).run({"temperature": 1.0, "logprobs": True}, **row)

    return asyncio.run(run())


def given_by_verl(requests: Requests, responses: list[str], plain: list[Any]) -> list[Any]:
    """The rows of given responses as `engine.given` asks for them."""
    before = SimpleNamespace(texts=plain)
    made = requests_of(before, requests, None)  # type: ignore[arg-type]
    return [answered({**items[0], GIVEN: text, SCORED: False}) for items, text in zip(made, responses, strict=True)]


@pytest.mark.parametrize("where", ["pool", "file"])
def test_given_responses_are_the_tokens_of_the_local_trainer(where: str, folder: Path) -> None:
    local = parity.local_side(folder, STACKS["dr_grpo"])
    local.trainer.stack.begin_step(0, STEPS, 1)
    foreign = Demonstrations.from_file(Path(__file__).with_name("demonstrations.jsonl"))
    prompts: Prompts = local.pool.select(torch.tensor([4, 2, 4])) if where == "pool" else foreign.prompts
    texts = ["77", "12345678901234567890", ""] if where == "pool" else foreign.responses
    requests = Requests.of(prompts, torch.ones(3, dtype=torch.int64))
    rows = local.trainer.engine.given(requests, texts, score=False)
    found = given_by_verl(requests, texts, [None] * 3)
    assert [item.prompt_ids for item in found] == rows.prompts
    for row, item in enumerate(found):
        assert item.response_ids == rows.responses[row][rows.mask[row]].tolist()
        assert item.response_mask == [1] * len(item.response_ids)
        assert item.response_logprobs == [0.0] * len(item.response_ids)
        assert item.reward_score == 0.0 and item.extra_fields[f"{PREFIX}prefix"] == 0
    assert [len(item.response_ids) for item in found][1] == LIMIT


def test_verl_scores_a_given_response_unless_told_otherwise() -> None:
    assert answered({GIVEN: "7"}).reward_score is None
    assert answered({GIVEN: "7", SCORED: False}).reward_score == 0.0


def test_an_end_that_the_text_has_is_not_added_again() -> None:
    assert answered({GIVEN: "7<|end|>"}).response_ids == [*TOKENIZER("7").input_ids, END]
    assert answered({GIVEN: ""}).response_ids == [END]


def test_no_loop_gets_more_than_a_response_may_have() -> None:
    assert len(answered({GIVEN: "7" * 20}, inner="long").response_ids) == LIMIT


def test_a_loop_that_goes_on_after_a_given_response_is_an_error() -> None:
    with pytest.raises(ServiceError, match="one turn"):
        answered({GIVEN: "7"}, inner="twice")


@pytest.mark.parametrize("prefix", ["12", [20, 21, 5, 1]], ids=["text", "tokens"])
def test_a_beginning_is_text_or_tokens_that_the_server_goes_on_from(prefix: Any, folder: Path) -> None:
    tokens = TOKENIZER(prefix, add_special_tokens=False).input_ids if isinstance(prefix, str) else prefix
    seen: list[Any] = []

    class Server(LightServer):
        async def generate(self, request_id: str, *, prompt_ids: Any, sampling_params: Any, **unused: Any) -> Any:
            seen.append(list(prompt_ids))
            return await super().generate(prompt_ids, sampling_params, request_id)

    found = answered({"prefix": prefix, "sampling": {"max_tokens": 3}}, Server(str(folder / "model"), LIMIT, 64, 0, {}))
    assert seen == [[*found.prompt_ids, *tokens]]
    assert found.response_ids[: len(tokens)] == tokens and len(tokens) < len(found.response_ids) <= len(tokens) + 3
    assert found.response_logprobs[: len(tokens)] == [0.0] * len(tokens) and found.response_logprobs[len(tokens)] < 0
    assert found.extra_fields[f"{PREFIX}prefix"] == len(tokens)
