"""The judge: questions to a language model behind any OpenAI-compatible endpoint.

A whole batch of questions is asked at once and comes back when every answer is there or given up: concurrency, retries, time
limits, the budget and the cache are matters of this module. A judge that is down, slow or talks nonsense gives None for
the questions that it did not answer, and a metric; never an exception.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from rlplugins.errors import ConfigurationError

logger = logging.getLogger("rlplugins.judge")

Question: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A question as text, or as chat messages."""
_Answer = TypeVar("_Answer")

OUTCOMES = ("answered", "cached", "nonsense", "failed", "late", "over_budget")
"""What can become of a question; `cached` ones are answered too."""
_TABLE, _COLUMNS = "replies", {"key": str, "request": str, "reply": str}


class JudgeConfig(BaseModel):
    """`judge:` of a stack file."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Name of the model, as the endpoint knows it."""
    url: Annotated[str, Field(pattern="^https?://")] | None = None
    """Base address of the endpoint, such as http://localhost:8000/v1; None: that of the `openai` client."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; an endpoint without keys needs none."""
    parameters: dict[str, JsonValue] = {"temperature": 0.0}
    """Further fields of every request (max_tokens, ...), those that only some servers know included."""
    concurrency: Annotated[int, Field(ge=1)] = 16
    """Questions under way at once."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Further tries of a request that failed."""
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds for one try, from the connection to the last byte."""
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """Seconds for a batch of questions, retries included; what is not answered by then is given up."""
    budget: Annotated[int, Field(ge=0)] | None = None
    """Requests that may be sent in the whole run, retries included; None: no limit. What is cached is free."""
    cache: Path | None = None
    """SQLite file in which replies are kept, across runs too."""


class Judge:
    """The service of one run.

    Args:
        config: where and how to ask; None: nobody answers.

    Attributes:
        requests: sent so far in this run; saved with the state.
        trouble: why the last request that failed did so.
    """

    def __init__(self, config: JudgeConfig | None = None) -> None:
        self.config = config
        self.requests = 0
        self.trouble = "" if config is not None else "there is no `judge:` in the stack file"
        if config is not None:
            _library("openai")
            if config.cache is not None:
                _library("sqlite_utils")
                _check(config.cache)

    def logging(self, log: Callable[..., None]) -> PluginJudge:
        """The judge as one plugin sees it."""
        return PluginJudge(self, log)

    def answers(
        self, questions: Sequence[Question], read: Callable[[str], _Answer | None]
    ) -> list[tuple[_Answer | None, str]]:
        """What `read` makes of each question's reply, and what became of the question (one of `OUTCOMES`)."""
        if self.config is None or not questions:
            return [(None, "failed")] * len(questions)
        with ThreadPoolExecutor(1) as thread:  # this one may run an event loop of its own
            return thread.submit(asyncio.run, self._all(self.config, questions, read)).result()

    async def _all(
        self, config: JudgeConfig, questions: Sequence[Question], read: Callable[[str], _Answer | None]
    ) -> list[tuple[_Answer | None, str]]:
        """Equal questions are asked once; nonsense is not kept."""
        import openai

        bodies = [_body(config, question) for question in questions]
        keys = [hashlib.sha256(json.dumps([config.url, body], sort_keys=True).encode()).hexdigest() for body in bodies]
        distinct = dict(zip(keys, bodies, strict=True))
        found: dict[str, tuple[_Answer | None, str]] = {}
        with _Cache(config.cache) as cache:
            for key in distinct:
                if (kept := cache.get(key)) is not None and (answer := read(kept)) is not None:
                    found[key] = answer, "cached"
            room = asyncio.Semaphore(config.concurrency)
            async with openai.AsyncOpenAI(
                base_url=config.url, api_key=os.environ.get(config.key_variable) or "none", timeout=config.timeout,
                max_retries=0,
            ) as client:  # fmt: skip

                async def ask(key: str) -> None:
                    async with room:
                        reply, outcome = await self._one(client, config, distinct[key])
                    answer = None if reply is None else read(reply)
                    if reply is not None and answer is not None:
                        cache.put(key, distinct[key], reply)
                    found[key] = answer, outcome if reply is None or answer is not None else "nonsense"

                tasks = [asyncio.create_task(ask(key)) for key in distinct if key not in found]
                if tasks:
                    done, late = await asyncio.wait(tasks, timeout=config.time_limit)
                    for task in late:
                        task.cancel()
                        self.trouble = f"not done within {config.time_limit:g} seconds"
                    await asyncio.gather(*late, return_exceptions=True)
                    for task in done:
                        task.result()  # what `read` raises is the plugin's fault
        return [found.get(key, (None, "late")) for key in keys]

    async def _one(self, client: Any, config: JudgeConfig, body: Mapping[str, Any]) -> tuple[str | None, str]:
        """One question, tried again where that may help."""
        import openai

        for attempt in range(config.retries + 1):
            if attempt:
                await asyncio.sleep(min(0.25 * 2**attempt, 8.0))
            if config.budget is not None and self.requests >= config.budget:
                return None, "over_budget"
            self.requests += 1
            try:
                async with asyncio.timeout(config.timeout):  # the client's own begins anew with every byte
                    made = await client.chat.completions.create(
                        model=body["model"], messages=body["messages"], extra_body=config.parameters
                    )
                text = made.choices[0].message.content
            except (TimeoutError, openai.APITimeoutError):
                outcome = "late"
                self.trouble = f"no answer within {config.timeout:g} seconds"
            except Exception as error:  # a status, a refused connection, a reply that is no completion
                outcome = "failed"
                self.trouble = _said(error, os.environ.get(config.key_variable))
                status = error.status_code if isinstance(error, openai.APIStatusError) else 500
                if status < 500 and status not in (408, 409, 429):
                    break
            else:
                if isinstance(text, str):
                    return text.encode(errors="replace").decode(), "answered"  # half a surrogate pair is no text
                self.trouble = "a reply without text"
                return None, "failed"
        return None, outcome


class PluginJudge:
    """What a hook gets as `judge`.

    Args:
        judge: the run's.
        log: the plugin's.
    """

    def __init__(self, judge: Judge, log: Callable[..., None]) -> None:
        self._judge = judge
        self._log = log

    def ask(self, questions: Sequence[Question], read: Callable[[str], _Answer | None]) -> list[_Answer | None]:
        """What `read` makes of each question's reply; None where there is no reply or `read` gives None (nonsense).

        Logs `judge/asked`, `judge/seconds` and the share of the questions that were answered, cached, nonsense, failed, late
        and over the budget.
        """
        began = time.monotonic()
        found = self._judge.answers(questions, read)
        counts = Counter(outcome for _, outcome in found)
        counts["answered"] += counts["cached"]
        if questions:
            self._log("judge/asked", len(questions))
            self._log("judge/seconds", time.monotonic() - began)
            for outcome in OUTCOMES:
                self._log(f"judge/{outcome}", counts[outcome] / len(questions), len(questions))
            lost = len(questions) - counts["answered"]
            if lost:
                told = ", ".join(f"{name} {counts[name]}" for name in OUTCOMES[2:] if counts[name])
                if counts["failed"] or counts["late"]:
                    told += f"; {self._judge.trouble}"
                logger.warning("the judge left %d of %d questions without an answer (%s)", lost, len(questions), told)
        return [answer for answer, _ in found]


class _Cache:
    """Replies by question, in an SQLite file; nothing without a file.

    A file that can no longer be read or written costs requests, not the step: the rest of the batch goes without it.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._table: Any = None

    def __enter__(self) -> _Cache:
        if self._path is not None:
            self._table = self._guarded(lambda: _open(self._path))
        return self

    def __exit__(self, *error: Any) -> None:
        table, self._table = self._table, None
        if table is not None:
            table.db.close()

    def get(self, key: str) -> str | None:
        """The reply that is kept."""
        if self._table is None:
            return None
        rows = self._guarded(lambda: list(self._table.rows_where("key = ?", [key])))
        return str(rows[0]["reply"]) if rows else None

    def put(self, key: str, body: Mapping[str, Any], reply: str) -> None:
        """Keep a reply."""
        if self._table is not None:
            row = {"key": key, "request": json.dumps(body, ensure_ascii=False), "reply": reply}
            self._guarded(lambda: self._table.insert(row, pk="key", replace=True))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            logger.warning("the judge's cache %s cannot be used: %s", self._path, error)
            self.__exit__()
            return None


def _open(path: Any) -> Any:
    """The table of replies."""
    import sqlite_utils

    path.parent.mkdir(parents=True, exist_ok=True)
    database = sqlite_utils.Database(path)
    database.conn.execute("pragma busy_timeout = 10000")
    table = database.table(_TABLE)
    if not table.exists():
        table.create(_COLUMNS, pk="key", if_not_exists=True)
    return table


def _check(path: Path) -> None:
    """Raise if the file is no cache that can be read and written."""
    try:
        table = _open(path)
        # A file that may only be read shows at a write, not at the beginning of a transaction.
        table.db.conn.execute(f"insert into {_TABLE} ({', '.join(_COLUMNS)}) values ('', '', '')")
        table.db.conn.rollback()
        table.db.close()
    except (sqlite3.Error, OSError) as error:
        raise ConfigurationError(f"judge.cache: {path} cannot be used: {error}; name another file") from None


def _body(config: JudgeConfig, question: Question) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(map(dict, question))
    return {**config.parameters, "model": config.model, "messages": messages}


def _said(error: Exception, key: str | None) -> str:
    """What went wrong, in a line without the key."""
    text = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
    return (text.replace(key, "...") if key else text)[:200]


def _library(name: str) -> None:
    try:
        __import__(name)
    except ImportError as error:
        raise ConfigurationError(f'a judge needs {name}: pip install "rlplugins[judge]"') from error
