"""Responses and beginnings that something else has written, through OpenRLHF's own executors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openrlhf.utils.agent import AgentExecutorBase, AgentInstanceBase, MultiTurnAgentExecutor, SingleTurnAgentExecutor
from vllm import SamplingParams
from vllm.outputs import CompletionOutput

from rlplugins.errors import ServiceError
from rlplugins.testing.tiny import make_tokenizer
from rlplugins_openrlhf import rollout
from rlplugins_openrlhf.pool import PoolPrompt, Request
from rlplugins_openrlhf.rollout import ContinuingEngine, RequestExecutor

TOKENIZER = make_tokenizer()
LIMIT = 5
REWARD = """
def reward_func(queries, prompts, labels, **unused):
    response = queries[0][len(prompts[0]):]
    return {"rewards": response.count("7"), "extra_logs": {"right": float(response.startswith(labels[0]))}}
"""


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def executed(executor: Any, answer: list[int], *, log_probs: bool = False) -> dict[str, Any]:
    """OpenRLHF's response to a prompt of which one is known."""
    prompt = PoolPrompt.of("1+6=", 3, 0, [Request(answer=answer)])
    params = SamplingParams(max_tokens=LIMIT, temperature=1.0)
    request = RequestExecutor(executor, log_probs).execute(prompt, "7", params, 64, TOKENIZER, None)
    found = asyncio.run(request)
    assert params.logprobs is None  # those of the other requests are as they were
    return found


@pytest.fixture
def scored(tmp_path: Path) -> SingleTurnAgentExecutor:
    (tmp_path / "reward.py").write_text(REWARD)
    return SingleTurnAgentExecutor(str(tmp_path / "reward.py"))


def test_openrlhf_scores_what_is_left_of_a_given_response(scored: SingleTurnAgentExecutor) -> None:
    end = TOKENIZER.eos_token_id
    found = executed(scored, [*ids("77"), end], log_probs=True)
    assert found["observation_tokens"] == [*ids("1+6="), *ids("77"), end] and found["action_ranges"] == [(4, 7)]
    assert found["reward"] == 2 and found["extra_logs"] == {"right": 1.0} and not found["truncated"]
    assert found["rollout_log_probs"] == [0.0] * 7 and found["prompt"].position == 3
    cut = executed(scored, [*ids("1237777"), end])
    assert cut["observation_tokens"][4:] == ids("12377") and cut["reward"] == 2 and cut["truncated"]
    assert cut["rollout_log_probs"] is None


class Deaf(AgentExecutorBase):
    async def execute(self, *given: Any, **named: Any) -> dict[str, Any]:
        return {}


class Talking(AgentInstanceBase):
    """A conversation of `turns` turns."""

    turns = 1

    def __init__(self) -> None:
        self.turn = 0

    async def step(self, states: dict[str, Any], **unused: Any) -> dict[str, Any]:
        self.turn += 1
        return {"rewards": torch.tensor(float(states["action_text"] == "77")), "environment_feedback": "",
                "done": self.turn == self.turns}  # fmt: skip


class TalkingOn(Talking):
    turns = 2


def test_an_agent_file_is_given_the_response_that_it_asks_for() -> None:
    answer = [*ids("77"), TOKENIZER.eos_token_id]
    found = executed(MultiTurnAgentExecutor(Talking), answer, log_probs=True)
    assert found["reward"] == 1.0 and found["observation_tokens"][4:] == answer
    with pytest.raises(ServiceError, match="several turns cannot be given"):
        executed(MultiTurnAgentExecutor(TalkingOn), answer)
    with pytest.raises(ServiceError, match="has not asked its engine"):
        executed(Deaf(), answer)


def test_a_beginning_is_text_or_tokens() -> None:
    seven, end = ids("7")[0], TOKENIZER.eos_token_id
    assert rollout.beginning("77", TOKENIZER) == ([seven, seven], "77")
    assert rollout.beginning([seven, end], TOKENIZER) == ([seven, end], "7<|end|>")


class Drawing:
    """An engine that keeps what it is asked for."""

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        self.context, self.most = prompt_token_ids, sampling_params.max_tokens
        return SimpleNamespace(outputs=[CompletionOutput(0, "7", [9], None, None)])


@pytest.mark.parametrize(
    ("run", "own", "most"),
    [(LIMIT, LIMIT, LIMIT - 2), (LIMIT, 1, 1), (LIMIT, 4, 3), (2, 2, 1), (None, 4, 4), (None, None, None)],
)
def test_a_forced_beginning_counts_in_the_runs_limit_and_not_in_that_of_the_request(
    run: int | None, own: int | None, most: int | None
) -> None:
    engine = Drawing()
    params = SamplingParams(max_tokens=own)
    drawn = asyncio.run(ContinuingEngine(engine, [3, 4], "12", run).generate([1, 2], params))
    assert engine.context == [1, 2, 3, 4] and engine.most == most
    assert list(drawn.outputs[0].token_ids) == [3, 4, 9] and drawn.outputs[0].text == "127"
