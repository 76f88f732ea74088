"""An agent loop around the user's own: it carries out, request by request, what hooks decided.

It changes the messages, the sampling parameters and the beginning of the response, or gives the whole response, and lets the
user's loop do the rest. The driver registers it in the agent-loop workers when it shakes hands with them.
"""

from __future__ import annotations

from typing import Any

import torch

from rlplugins.errors import ServiceError
from rlplugins.logits import request_args
from rlplugins.rollouts import Requests, Sampling
from rlplugins_verl.columns import PREFIX, REQUESTS
from rlplugins_verl.worker import versions

AGENT = "rlplugins"
"""Name under which the loop is registered."""
INNER = f"{PREFIX}agent"
"""Column of a prompt: the user's own agent loop."""
GIVEN, SCORED = "given", "scored"
"""Of a request: the text of its whole response; whether the reward function is asked."""


def requests_of(
    plain: Requests, requests: Requests, sampling: Sampling | None, *, numbers: bool = False
) -> list[list[dict[str, Any]]]:
    """Per prompt, per response what differs from verl's own request.

    Args:
        plain: the requests before any hook.
        requests: after them, in the same order.
        sampling: how each is drawn, where a plugin has a say in it.
        numbers: whether the engine has a rule that reads the numbers of `sampling`.
    """
    written = {name: _items(requests.columns[name]) for name in requests.columns}
    made: list[list[dict[str, Any]]] = [[] for _ in range(len(requests.prompts))]
    for row, prompt in enumerate(requests.prompt.tolist()):
        request: dict[str, Any] = {"columns": {name: values[row] for name, values in written.items()}}
        if requests.texts[row] != plain.texts[row]:
            request["text"] = requests.texts[row]
        if requests.prefixes[row]:
            request["prefix"] = requests.prefixes[row]
        if sampling is not None:
            request["sampling"] = parameters(sampling, row)
            if numbers:
                request["sampling"] |= request_args(sampling, row)
        made[prompt].append(request)
    return made


def parameters(sampling: Sampling, row: int) -> dict[str, Any]:
    """One request's parameters in verl's words."""
    return {
        "temperature": float(sampling.temperature[row]),
        "top_p": float(sampling.top_p[row]),
        "max_tokens": int(sampling.max_tokens[row]),
    }


def _items(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, torch.Tensor) else list(column)


class RewritingAgentLoop:
    """Made by verl for every request, from the same parts as the loop inside."""

    def __init__(self, **parts: Any) -> None:
        self.parts = parts

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> Any:
        """One response of the inner loop to the rewritten request."""
        import hydra
        from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

        request = row[REQUESTS][int(row["session_id"])]
        parts = dict(self.parts)
        prefix: list[int] = []
        if GIVEN in request:
            parts["server_manager"] = GivenServer(self._given(request[GIVEN]))
        elif "prefix" in request:
            prefix = self._tokens(request["prefix"])
            parts["server_manager"] = ContinuingServer(parts["server_manager"], prefix)
        if "text" in request:
            text = request["text"]
            row = {**row, "raw_prompt": [{"role": "user", "content": text}] if isinstance(text, str) else text}
        inner = hydra.utils.instantiate(config=_agent_loop_registry[row[INNER]], **parts)
        output = await inner.run({**sampling_params, **request.get("sampling", {})}, **row)
        output.extra_fields[f"{PREFIX}columns"] = request["columns"]
        output.extra_fields[f"{PREFIX}prefix"] = min(len(prefix), len(output.response_ids))
        if not request.get(SCORED, True):
            output.reward_score = 0.0  # what has a score is not given to the reward function
        return output

    def _tokens(self, text: str | list[int]) -> list[int]:
        """Token ids of a part of a response, which may be some already."""
        if not isinstance(text, str):
            return [int(token) for token in text]
        return self.parts["tokenizer"](text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    def _given(self, text: str) -> list[int]:
        """Token ids of a given response with its end, as many as a response may have."""
        tokens, end = self._tokens(text), self.parts["tokenizer"].eos_token_id
        if end is not None and tokens[-1:] != [end]:
            tokens = [*tokens, end]
        return tokens[: int(self.parts["trainer_config"].config.actor_rollout_ref.rollout.response_length)]


class ContinuingServer:
    """verl's client of the servers; the first response of a request begins with given tokens."""

    def __init__(self, server: Any, prefix: list[int]) -> None:
        self._server = server
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

    async def generate(self, request_id: str, *, prompt_ids: list[int], **request: Any) -> Any:
        """The response with the prefix in front; the engine drew none of its tokens, so their log-probs are 0."""
        prefix, self._prefix = self._prefix, []
        output = await self._server.generate(request_id, prompt_ids=[*prompt_ids, *prefix], **request)
        log_probs = [*[0.0] * len(prefix), *output.log_probs] if output.log_probs else output.log_probs
        return output.model_copy(update={"token_ids": [*prefix, *output.token_ids], "log_probs": log_probs})


class GivenServer:
    """In the place of verl's client of the servers: gives the tokens of a response that something else has written."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    async def generate(self, request_id: str, *, sampling_params: dict[str, Any], **request: Any) -> Any:
        """The response; no engine drew it, so its log-probs are 0.

        Raises:
            ServiceError: if the loop asks for a second one.
        """
        from verl.workers.rollout.replica import TokenOutput

        tokens, self._tokens = self._tokens, []
        if not tokens:
            raise ServiceError(
                "the agent loop went on after a response that was given to it (a tool call in its text?): engine.given takes "
                "responses of one turn; leave such texts out, or choose an agent loop of one turn for these prompts"
            )
        log_probs = [0.0] * len(tokens) if sampling_params.get("logprobs") else None
        return TokenOutput(token_ids=tokens, log_probs=log_probs, stop_reason="completed")


def bind_agent_loop(worker: Any) -> dict[str, str]:
    """The handshake with an agent-loop worker, run there: register the loop, and say which versions are installed."""
    from verl.experimental.agent_loop.agent_loop import register

    register(AGENT)(RewritingAgentLoop)
    return versions()
