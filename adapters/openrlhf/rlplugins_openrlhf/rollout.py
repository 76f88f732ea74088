"""An executor around the engine's own: it carries out, request by request, what the prompt hooks decided.

It changes the text, the sampling parameters and the beginning of the response, and lets OpenRLHF's executor, or the user's
agent file, do the rest. The trainer's process puts it in place when it shakes hands with the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from rlplugins.logits import request_args
from rlplugins.rollouts import Requests, Sampling
from rlplugins_openrlhf.pool import PoolPrompt, Request
from rlplugins_openrlhf.worker import versions


def requests_of(
    plain: Requests, requests: Requests, sampling: Sampling | None, texts: Mapping[int, str], *, numbers: bool = False
) -> list[list[Request]]:
    """Per prompt, per response what differs from OpenRLHF's own request.

    Args:
        plain: the requests before any hook.
        requests: after them, in the same order.
        sampling: how each is drawn, where a plugin has a say in it.
        texts: by row the rewritten prompts, as OpenRLHF's template makes them.
        numbers: whether the engine has a rule that reads the numbers of `sampling`.
    """
    written = {name: _items(requests.columns[name]) for name in requests.columns}
    made: list[list[Request]] = [[] for _ in range(len(requests.prompts))]
    for row, prompt in enumerate(requests.prompt.tolist()):
        made[prompt].append(
            Request(
                draw=int(requests.draw[row]),
                text=texts.get(row),
                prefix=requests.prefixes[row],
                sampling=None if sampling is None else parameters(sampling, row, numbers=numbers),
                columns={name: values[row] for name, values in written.items()},
            )
        )
    return made


def rewritten(plain: Requests, requests: Requests) -> list[int]:
    """The rows whose prompt a hook has changed."""
    return [row for row in range(len(requests)) if requests.texts[row] != plain.texts[row]]


def parameters(sampling: Sampling, row: int, *, numbers: bool) -> dict[str, Any]:
    """One request's parameters in vLLM's words."""
    return (request_args(sampling, row) if numbers else {}) | {
        "temperature": float(sampling.temperature[row]),
        "top_p": float(sampling.top_p[row]),
        "max_tokens": int(sampling.max_tokens[row]),
    }


def _items(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


class RequestExecutor:
    """Stands for the engine's executor.

    Args:
        executor: OpenRLHF's, or the user's.
        log_probs: whether the stack reads the engine's log-probs.
    """

    def __init__(self, executor: Any, log_probs: bool) -> None:
        self.executor = executor
        self.log_probs = log_probs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    async def execute(
        self, prompt: str, label: Any, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One response to one request of a prompt; a prompt that is not of the pool (evaluation) goes on as it is."""
        same = {"label": label, "max_length": max_length, "hf_tokenizer": hf_tokenizer, "images": images}
        if not isinstance(prompt, PoolPrompt):
            return await self.executor.execute(  # type: ignore[no-any-return]
                prompt=prompt, sampling_params=sampling_params, llm_engine=llm_engine, **same
            )
        request = prompt.requests[0] if prompt.requests else None
        prompt.requests = prompt.requests[1:]  # the next response of this prompt, begun after this one, takes the next
        sampling_params = deepcopy(sampling_params)
        if self.log_probs:
            sampling_params.logprobs = 1
        text, prefix = str(prompt), []
        if request is not None:
            text = request.text if request.text is not None else text
            for name, value in (request.sampling or {}).items():
                setattr(sampling_params, name, value)
            if request.prefix:
                prefix = hf_tokenizer(text=request.prefix, add_special_tokens=False)["input_ids"]
                llm_engine = ContinuingEngine(llm_engine, prefix, request.prefix)
        response = await self.executor.execute(
            prompt=text, sampling_params=sampling_params, llm_engine=llm_engine, **same
        )
        return {**response, "prompt": prompt.answered(text, request, len(prefix))}


class ContinuingEngine:
    """OpenRLHF's engine; the first response of a request begins with given tokens, which count as part of it."""

    def __init__(self, engine: Any, prefix: list[int], text: str) -> None:
        self._engine = engine
        self._prefix = prefix
        self._text = text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        """The response with the prefix in front; the engine drew none of its tokens, so their log-probs are 0."""
        prefix, text = self._prefix, self._text
        self._prefix, self._text = [], ""
        if sampling_params.max_tokens is not None:
            sampling_params.max_tokens = max(1, sampling_params.max_tokens - len(prefix))
        result = await self._engine.generate([*prompt_token_ids, *prefix], sampling_params, multi_modal_data)
        drawn = result.outputs[0]
        log_probs = drawn.logprobs
        if log_probs is not None:
            log_probs = [*({token: SimpleNamespace(logprob=0.0)} for token in prefix), *log_probs]
        result.outputs[0] = dataclasses.replace(
            drawn, token_ids=[*prefix, *drawn.token_ids], text=text + drawn.text, logprobs=log_probs
        )
        return result


def bind(engine: Any, log_probs: bool) -> dict[str, str]:
    """The handshake with an engine, run there: put the executor in place, and say which versions are installed."""
    if not isinstance(engine.executor, RequestExecutor):
        engine.executor = RequestExecutor(engine.executor, log_probs)
    return versions()
