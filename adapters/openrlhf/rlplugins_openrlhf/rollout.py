"""An executor around the engine's own: it carries out, request by request, what the prompt hooks decided.

It changes the text, the sampling parameters and the beginning of the response, or gives a whole response that something else
has written, and lets OpenRLHF's executor, or the user's agent file, do the rest: cut the prompt into tokens, score. The
trainer's process puts it in place when it shakes hands with the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

from rlplugins.errors import ServiceError
from rlplugins.logits import request_args
from rlplugins.rollouts import Requests, Sampling
from rlplugins_openrlhf.pool import PoolPrompt, Request
from rlplugins_openrlhf.worker import versions


def requests_of(
    requests: Requests, sampling: Sampling | None, texts: Mapping[int, str], *, numbers: bool = False
) -> list[list[Request]]:
    """Per prompt, per response what differs from OpenRLHF's own request.

    Args:
        requests: after every hook.
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
        if request is not None or self.log_probs:
            sampling_params = deepcopy(sampling_params)
        if self.log_probs:
            sampling_params.logprobs = 1
        text, limit = str(prompt), sampling_params.max_tokens
        prefix: list[int] = []
        if request is not None:
            text = request.text if request.text is not None else text
            for name, value in (request.sampling or {}).items():
                setattr(sampling_params, name, value)
            if request.prefix:
                prefix, words = beginning(request.prefix, hf_tokenizer)
                llm_engine = ContinuingEngine(llm_engine, prefix, words, limit)
            if request.answer is not None:
                llm_engine = AnsweringEngine(llm_engine, request.answer, hf_tokenizer)
        response = await self.executor.execute(
            prompt=text, sampling_params=sampling_params, llm_engine=llm_engine, **same
        )
        if isinstance(llm_engine, AnsweringEngine) and not llm_engine.asked:
            raise ServiceError(
                "engine.given: the agent file has not asked its engine for a response, so it was given none"
            )
        return {**response, "prompt": prompt.answered(text, request, len(prefix))}


def beginning(prefix: str | Sequence[int], tokenizer: Any) -> tuple[list[int], str]:
    """A forced beginning as token ids and as text."""
    if isinstance(prefix, str):
        return tokenizer(text=prefix, add_special_tokens=False)["input_ids"], prefix
    return list(prefix), tokenizer.decode(list(prefix), skip_special_tokens=False)


class ContinuingEngine:
    """OpenRLHF's engine; the first response of a request begins with given tokens.

    Args:
        engine: OpenRLHF's.
        prefix: the tokens.
        text: theirs.
        limit: tokens that a response of the run may have, its beginning included.
    """

    def __init__(self, engine: Any, prefix: list[int], text: str, limit: int | None) -> None:
        self._engine = engine
        self._prefix = prefix
        self._text = text
        self._limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        """The response with the prefix in front; the engine drew none of its tokens, so their log-probs are 0."""
        prefix, text = self._prefix, self._text
        self._prefix, self._text = [], ""
        if prefix and self._limit is not None:
            most = sampling_params.max_tokens or self._limit  # of what is drawn, where a hook has set it
            sampling_params.max_tokens = max(1, min(most, self._limit - len(prefix)))
        result = await self._engine.generate([*prompt_token_ids, *prefix], sampling_params, multi_modal_data)
        drawn = result.outputs[0]
        log_probs = drawn.logprobs
        if log_probs is not None:
            log_probs = [*({token: SimpleNamespace(logprob=0.0)} for token in prefix), *log_probs]
        result.outputs[0] = dataclasses.replace(
            drawn, token_ids=[*prefix, *drawn.token_ids], text=text + drawn.text, logprobs=log_probs
        )
        return result


class AnsweringEngine:
    """OpenRLHF's engine, of which one response is known: as much of it as there is room for, with log-probs of 0.

    Attributes:
        asked: whether it has been given.
    """

    def __init__(self, engine: Any, answer: Sequence[int], tokenizer: Any) -> None:
        self._engine = engine
        self._answer = answer
        self._tokenizer = tokenizer
        self.asked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        """The response, as vLLM would give it.

        Raises:
            ServiceError: if a further one is asked for.
        """
        from vllm.outputs import CompletionOutput, RequestOutput

        if self.asked:
            raise ServiceError("engine.given gives one response, and the agent file asks its engine for a further one: a "
                               "conversation of several turns cannot be given")  # fmt: skip
        self.asked = True
        tokens = list(self._answer[: sampling_params.max_tokens])
        drawn = CompletionOutput(
            index=0, text=self._tokenizer.decode(tokens, skip_special_tokens=True), token_ids=tokens,
            cumulative_logprob=0.0, logprobs=[{token: SimpleNamespace(logprob=0.0)} for token in tokens],  # type: ignore[misc]
            finish_reason="stop" if len(tokens) == len(self._answer) else "length",
        )  # fmt: skip
        return RequestOutput(
            request_id="", prompt=None, prompt_token_ids=prompt_token_ids, prompt_logprobs=None, outputs=[drawn],
            finished=True,
        )  # fmt: skip


def bind(engine: Any, log_probs: bool) -> dict[str, str]:
    """The handshake with an engine, run there: put the executor in place, and say which versions are installed."""
    if not isinstance(engine.executor, RequestExecutor):
        engine.executor = RequestExecutor(engine.executor, log_probs)
    return versions()
