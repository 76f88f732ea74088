"""The judge against a scripted OpenAI-compatible endpoint, over real HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import re
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from rlplugins import Plugin, hookimpl, needs
from rlplugins.cli import app
from rlplugins.errors import ConfigurationError, StackError
from rlplugins.judge import OUTCOMES, Judge, JudgeConfig, PluginJudge
from rlplugins.rollouts import Rollouts
from rlplugins.stack import Stack, StackConfig
from rlplugins.steps import Metrics
from rlplugins.testing import make_rollouts, start
from rlplugins.trainer import find_adapter
from rlplugins_local import arithmetic, train
from rlplugins_local.config import TrainConfig

KEY = "sk-0123456789-of-nobody"


@dataclass(frozen=True)
class Reply:
    """What the endpoint does with a request.

    Attributes:
        text: the answer; None: a message without text.
        status: of the response.
        body: sent as it is, instead of a completion.
        silence: seconds before the response begins.
        pause: seconds between its bytes.
    """

    text: str | None = "yes"
    status: int = 200
    body: bytes | None = None
    silence: float = 0.0
    pause: float = 0.0

    def encoded(self) -> bytes:
        """The body of the response."""
        if self.body is not None:
            return self.body
        message = {"role": "assistant", "content": self.text}
        made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}]}  # fmt: skip
        return json.dumps(made if self.status == 200 else {"error": {"message": self.text}}).encode()


class Endpoint(ThreadingHTTPServer):
    """The server.

    Attributes:
        script: makes the reply from a question and the number of times that it was asked before.
        bodies: of the requests, in the order in which they came.
        keys: that came with them.
        most: requests under way at once.
    """

    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Callable[[str, int], Reply] = lambda question, before: Reply(f"answer to {question}")
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.most = self.running = 0
        self.changed = threading.Condition()
        self.closed = False

    @property
    def url(self) -> str:
        """For the configuration."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def asked(self) -> list[str]:
        """The questions, in the order in which they came."""
        return [body["messages"][-1]["content"] for body in self.bodies]

    def die(self) -> None:
        """Refuse every connection from now on."""
        if not self.closed:
            self.closed = True
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error of the test."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Endpoint

    def do_POST(self) -> None:
        """Follow the script."""
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.changed:
            before = server.asked.count(body["messages"][-1]["content"])
            server.bodies.append(body | {"path": self.path})
            server.keys.add(self.headers["authorization"])
            server.running += 1
            server.most = max(server.most, server.running)
            server.changed.notify_all()
        reply = server.script(body["messages"][-1]["content"], before)
        time.sleep(reply.silence)
        with (
            server.changed
        ):  # before the answer is sent: the client's next question may come before this thread goes on
            server.running -= 1
        self.reply(reply)

    def reply(self, reply: Reply) -> None:
        """Send it."""
        data = reply.encoded()
        self.send_response(reply.status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        for byte in [data[place : place + 1] for place in range(len(data))] if reply.pause else [data]:
            self.wfile.write(byte)
            self.wfile.flush()
            time.sleep(reply.pause)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.die()
    thread.join()


@dataclass
class Asked:
    """What came of a batch of questions."""

    answers: list[Any]
    metrics: dict[str, float]
    seconds: float

    @property
    def outcomes(self) -> dict[str, float]:
        """Number of questions of each outcome that there was."""
        counts = {name: round(self.metrics[f"judge/{name}"] * self.metrics["judge/asked"]) for name in OUTCOMES}
        return {name: count for name, count in counts.items() if count}


def ask(judge: Judge, questions: list[Any], read: Callable[[str], Any] = str) -> Asked:
    """Ask as a plugin does."""
    metrics, began = Metrics(), time.monotonic()
    answers = PluginJudge(judge, metrics.log).ask(questions, read)
    return Asked(answers, metrics.as_dict(), time.monotonic() - began)


def judge_of(endpoint: Endpoint, **options: Any) -> Judge:
    return Judge(JudgeConfig(**({"model": "m", "url": endpoint.url, "retries": 0} | options)))


# questions and answers


def test_answers_come_in_the_order_of_the_questions(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply(f"answer to {question}", silence=0.05 * (9 - int(question)))
    questions = [str(number) for number in (3, 9, 1, 7, 5)]
    found = ask(judge_of(endpoint), questions)
    assert found.answers == [f"answer to {question}" for question in questions]
    assert found.outcomes == {"answered": 5} and found.metrics["judge/seconds"] == pytest.approx(found.seconds, abs=0.2)


def test_equal_questions_are_asked_once(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint)
    found = ask(judge, ["a", "b", "a", "a"])
    assert found.answers == [f"answer to {question}" for question in "abaa"]
    assert sorted(endpoint.asked) == ["a", "b"] and judge.requests == 2 and found.metrics["judge/asked"] == 4


def test_what_is_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    parameters = {"temperature": 0.5, "max_tokens": 7, "top_k": 3, "chat_template_kwargs": {"enable_thinking": False}}
    ask(judge_of(endpoint, parameters=parameters, key_variable="MY_KEY", concurrency=1), ["Who?", chat])
    fixed = {"model": "m", "path": "/v1/chat/completions", **parameters}
    assert endpoint.bodies == [fixed | {"messages": [{"role": "user", "content": "Who?"}]}, fixed | {"messages": chat}]
    assert endpoint.keys == {f"Bearer {KEY}"}


def test_what_the_reader_takes_for_nonsense_is_none(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply(question)
    found = ask(judge_of(endpoint), ["1", "two", "3", ""], lambda text: int(text) if text.isdigit() else None)
    assert found.answers == [1, None, 3, None] and found.outcomes == {"answered": 2, "nonsense": 2}


def test_an_error_of_the_reader_is_the_plugins(endpoint: Endpoint) -> None:
    with pytest.raises(ZeroDivisionError):
        ask(judge_of(endpoint), ["a"], lambda text: 1 // 0)


def test_no_question_is_no_request_and_no_metric(endpoint: Endpoint) -> None:
    found = ask(judge_of(endpoint), [])
    assert not found.answers and not found.metrics and not endpoint.bodies


@pytest.mark.parametrize("concurrency", [1, 3, 4])
def test_so_many_questions_are_under_way_at_once(endpoint: Endpoint, concurrency: int) -> None:
    def together(question: str, before: int) -> Reply:
        """Waits until as many are under way as may be; 12 can be cut into threes and fours."""
        with endpoint.changed:
            number = len(endpoint.bodies)
            wanted = -(-number // concurrency) * concurrency
            endpoint.changed.wait_for(lambda: len(endpoint.bodies) >= wanted, timeout=10)
        return Reply()

    endpoint.script = together
    found = ask(judge_of(endpoint, concurrency=concurrency), [str(number) for number in range(12)])
    assert found.outcomes == {"answered": 12} and endpoint.most == concurrency


# what goes wrong


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply("at last") if before else Reply("no", status=int(question))
    passing, staying = ["408", "409", "429", "500", "502", "503"], ["400", "401", "403", "404", "422"]
    judge = judge_of(endpoint, retries=1)
    found = ask(judge, passing + staying)
    assert found.answers == ["at last"] * 6 + [None] * 5 and found.outcomes == {"answered": 6, "failed": 5}
    assert Counter(endpoint.asked) == {question: 2 for question in passing} | {question: 1 for question in staying}
    assert judge.requests == 17


def test_so_many_further_tries(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply("?", status=500)
    found = ask(judge_of(endpoint, retries=2), ["a"])
    assert found.answers == [None] and found.outcomes == {"failed": 1} and len(endpoint.asked) == 3


@pytest.mark.parametrize(
    "reply",
    [Reply(body=b"<html>Welcome</html>"), Reply(body=b"{}"), Reply(body=b'{"choices": []}'), Reply(body=b""), Reply(None),
     Reply(body=b'{"choices": [{"message": {"content": {"text": 1}}}]}'), Reply(body=b"\xff\xfe"), Reply(body=b"[1]")],
)  # fmt: skip
def test_a_reply_that_is_no_completion_is_no_answer(endpoint: Endpoint, reply: Reply) -> None:
    endpoint.script = lambda question, before: reply
    found = ask(judge_of(endpoint), ["a"])
    assert found.answers == [None] and found.outcomes == {"failed": 1}


def test_half_a_surrogate_pair_in_a_reply_is_replaced(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda question, before: Reply("so \ud83d so")
    for _ in range(2):
        assert ask(judge_of(endpoint, cache=tmp_path / "cache.db"), ["a"]).answers == ["so ? so"]
    assert len(endpoint.asked) == 1


def test_a_question_that_cannot_be_sent_is_no_answer(endpoint: Endpoint) -> None:
    assert ask(judge_of(endpoint), ["\ud83d", "b"]).answers == [None, "answer to b"]


def test_a_try_that_takes_too_long_is_given_up_and_tried_again(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply(silence=0.0 if before else 5.0)
    found = ask(judge_of(endpoint, timeout=0.3, retries=1), ["a"])
    assert found.answers == ["yes"] and len(endpoint.asked) == 2 and found.seconds < 4


@pytest.mark.parametrize("reply", [Reply(silence=5.0), Reply(pause=0.1)], ids=["silent", "byte by byte"])
def test_a_try_ends_in_time_whatever_the_server_sends(endpoint: Endpoint, reply: Reply) -> None:
    endpoint.script = lambda question, before: reply
    found = ask(judge_of(endpoint, timeout=0.5), ["a"])
    assert found.answers == [None] and found.outcomes == {"late": 1} and found.seconds < 4


def test_what_is_not_answered_within_the_time_limit_is_given_up(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply(question, silence=8.0 if question == "slow" else 0.0)
    found = ask(judge_of(endpoint, concurrency=2, time_limit=1.0), ["a", "slow", "b", "slow"])
    assert found.answers == ["a", None, "b", None] and found.outcomes == {"answered": 2, "late": 2}
    found = ask(judge_of(endpoint, concurrency=1, time_limit=0.5), ["slow", "never sent"])
    assert found.answers == [None, None] and found.outcomes == {"late": 2} and found.seconds < 6
    assert "never sent" not in endpoint.asked


def test_a_judge_that_is_down_ends_in_none_metrics_and_a_reason(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    judge = judge_of(endpoint)
    endpoint.die()
    found = ask(judge, ["a", "b"])
    assert found.answers == [None, None] and found.outcomes == {"failed": 2} and found.metrics["judge/answered"] == 0
    assert "2 of 2 questions" in caplog.text and re.search(r"failed 2; APIConnectionError: .+ failed\)", caplog.text)


def test_the_reason_is_told_without_the_key(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint.script = lambda question, before: Reply(f"nobody has the key {KEY}", status=401)
    ask(judge_of(endpoint, key_variable="MY_KEY"), ["a"])
    assert "nobody has the key ..." in caplog.text and KEY not in caplog.text


def test_where_no_judge_is_configured_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    found = ask(Judge(), ["a"])
    assert found.answers == [None] and found.outcomes == {"failed": 1} and "no `judge:`" in caplog.text


def test_it_can_be_asked_where_an_event_loop_runs(endpoint: Endpoint) -> None:
    async def hook() -> list[Any]:
        return ask(judge_of(endpoint), ["a"]).answers  # as in an actor of Ray, whose methods run in a loop

    assert asyncio.run(hook()) == ["answer to a"]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(hook())))
    thread.start()
    thread.join()
    assert found == [["answer to a"]]


# budget


def test_no_more_requests_than_the_budget_are_sent(endpoint: Endpoint) -> None:
    judge = judge_of(endpoint, budget=3, concurrency=2)
    found = ask(judge, list("abcde"))
    assert found.outcomes == {"answered": 3, "over_budget": 2} and judge.requests == len(endpoint.asked) == 3
    assert found.answers.count(None) == 2
    assert ask(judge, ["f"]).outcomes == {"over_budget": 1} and len(endpoint.asked) == 3


def test_further_tries_count_and_what_is_cached_is_free(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda question, before: Reply(status=500) if question == "bad" else Reply()
    judge = judge_of(endpoint, budget=3, retries=5, cache=tmp_path / "cache.db", concurrency=1)
    found = ask(judge, ["good", "bad"])
    assert found.outcomes == {"answered": 1, "over_budget": 1} and endpoint.asked == ["good", "bad", "bad"]
    assert ask(judge, ["good", "bad"]).outcomes == {"answered": 1, "cached": 1, "over_budget": 1}
    assert not ask(judge_of(endpoint, budget=0), ["new"]).answers[0] and len(endpoint.asked) == 3


class Graded(Plugin):
    """The judge's number is the reward."""

    name = "graded"
    needs = (needs.JUDGE,)

    @hookimpl
    def combine_rewards(self, scores: Tensor, judge: PluginJudge, rollouts: Rollouts) -> Tensor:
        found = judge.ask([str(row) for row in rollouts.responses[:, 0].tolist()], number)
        return torch.tensor([math.nan if grade is None else grade for grade in found])[:, None]


def number(reply: str) -> float | None:
    """The number in a reply."""
    try:
        return float(reply)
    except ValueError:
        return None


def test_a_reward_may_be_the_judges_and_a_row_without_one_leaves_its_group(endpoint: Endpoint) -> None:
    endpoint.script = lambda question, before: Reply({"5": "0.25", "6": "0.75"}.get(question, "no idea"))
    stack = start([Graded(), "dr_grpo"], judge={"model": "m", "url": endpoint.url})
    made = stack.credit(make_rollouts([0.0] * 3, tokens=1, responses=torch.tensor([[5], [6], [7]])))
    assert made.rewards.flatten().tolist() == [0.25, 0.75, 0.0] and made.groups.tolist() == [0, 0, -1]
    assert made.advantages.flatten().tolist() == [-0.25, 0.25, 0.0]
    metrics = stack.metrics.as_dict()
    assert metrics["rlplugins/graded/judge/asked"] == 3 and metrics["rlplugins/graded/judge/nonsense"] == pytest.approx(
        1 / 3
    )


def test_a_resumed_run_keeps_to_the_budget(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda question, before: Reply("1")
    lines = {"judge": {"model": "m", "url": endpoint.url, "budget": 5}}
    before, after = (start([Graded()], **lines) for _ in range(2))
    before.credit(make_rollouts([0.0] * 3, tokens=1, responses=torch.tensor([[5], [6], [7]])))
    before.save(tmp_path / "state", 1)
    after.load(tmp_path / "state")
    made = after.credit(make_rollouts([0.0] * 4, tokens=1, responses=torch.tensor([[8], [9], [10], [11]])))
    assert len(endpoint.asked) == 5 and made.groups.tolist().count(-1) == 2


# cache


def test_a_second_run_asks_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "new" / "cache.db"
    questions = ["a", "ü\n'\"\0;", "a", [{"role": "user", "content": "chat"}]]
    first = ask(judge_of(endpoint, cache=cache), questions)
    again = judge_of(endpoint, cache=cache)
    second = ask(again, questions)
    assert second.answers == first.answers and None not in first.answers
    assert len(endpoint.bodies) == 3 and again.requests == 0
    assert first.outcomes == {"answered": 4} and second.outcomes == {"answered": 4, "cached": 4}


@pytest.mark.parametrize("other", [{"model": "n"}, {"parameters": {"temperature": 0.5}}])
def test_another_model_or_parameter_is_another_question(endpoint: Endpoint, tmp_path: Path, other: Any) -> None:
    for options in ({}, other):
        ask(judge_of(endpoint, cache=tmp_path / "cache.db", **options), ["a"])
    assert endpoint.asked == ["a", "a"]


def test_another_endpoint_is_another_question(endpoint: Endpoint, tmp_path: Path) -> None:
    for url in (endpoint.url, endpoint.url.replace("/v1", "/v2")):
        ask(judge_of(endpoint, cache=tmp_path / "cache.db", url=url), ["a"])
    assert [body["path"] for body in endpoint.bodies] == ["/v1/chat/completions", "/v2/chat/completions"]


def test_nonsense_and_failures_are_not_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.script = lambda question, before: Reply("1", status=200 if before or question != "fails" else 400)
    cache = tmp_path / "cache.db"
    assert ask(judge_of(endpoint, cache=cache), ["a", "fails"], lambda text: None).answers == [None, None]
    assert ask(judge_of(endpoint, cache=cache), ["a", "fails"], number).answers == [1.0, 1.0]
    assert ask(judge_of(endpoint, cache=cache), ["a"], number).outcomes == {"answered": 1, "cached": 1}
    assert ask(judge_of(endpoint, cache=cache), ["a"], lambda text: None).answers == [None]  # another plugin's reader
    assert Counter(endpoint.asked) == {"a": 3, "fails": 2}


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough to be taken for one " * 100)


def folder(path: Path) -> None:
    path.mkdir()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table replies (question text)")
    database.close()


@pytest.mark.parametrize("damage", [garbage, folder, foreign])
def test_a_cache_that_cannot_be_used_is_an_error_at_the_start(
    endpoint: Endpoint, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache.db"
    damage(cache)
    with pytest.raises(ConfigurationError, match=rf"judge\.cache: {cache}"):
        judge_of(endpoint, cache=cache)
    with pytest.raises(ConfigurationError, match=r"judge\.cache"):
        Stack(["critique-grpo"], judge={"model": "m", "cache": str(cache)})


def test_a_cache_that_cannot_be_made_is_an_error_at_the_start(endpoint: Endpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"judge\.cache"):
        judge_of(endpoint, cache=tmp_path / "file" / "cache.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write every file")
def test_a_cache_that_may_only_be_read_is_an_error_at_the_start(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "cache.db"
    ask(judge_of(endpoint, cache=cache), ["a"])
    cache.chmod(0o444)
    with pytest.raises(ConfigurationError, match=r"judge\.cache"):
        judge_of(endpoint, cache=cache)


@pytest.mark.parametrize("damage", [garbage, folder, foreign])
def test_a_cache_that_breaks_later_costs_requests_and_no_step(
    endpoint: Endpoint, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache.db"
    judge = judge_of(endpoint, cache=cache)
    ask(judge, ["a"])
    cache.unlink()
    damage(cache)
    found = ask(judge, ["a", "b", "c"])
    assert found.answers == [f"answer to {question}" for question in "abc"] and found.outcomes == {"answered": 3}
    assert caplog.text.count(str(cache)) == 1  # one warning for the batch


def test_a_folder_that_goes_away_costs_no_step(endpoint: Endpoint, tmp_path: Path) -> None:
    cache = tmp_path / "folder" / "cache.db"
    judge = judge_of(endpoint, cache=cache)
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("")
    assert ask(judge, ["a"]).answers == ["answer to a"]


def test_two_runs_share_a_cache(endpoint: Endpoint, tmp_path: Path) -> None:
    judges = [judge_of(endpoint, cache=tmp_path / "cache.db", concurrency=4) for _ in range(2)]
    questions = [[f"{run} {number}" for number in range(20)] for run in range(2)]
    found: list[Any] = [None, None]

    def work(run: int) -> None:
        found[run] = ask(judges[run], questions[run]).answers

    threads = [threading.Thread(target=work, args=[run]) for run in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"answer to {question}" for question in part] for part in questions]
    asked = len(endpoint.asked)
    assert ask(judges[0], questions[0] + questions[1]).metrics["judge/cached"] == 1 and len(endpoint.asked) == asked


# configuration


@pytest.mark.parametrize(
    ("lines", "message"),
    [({"model": "m", "modell": "n"}, r"judge\.modell"), ({"url": "http://localhost:1/v1"}, r"judge\.model: Field required"),
     ({"model": "m", "url": "localhost:8000"}, r"judge\.url"), ({"model": "m", "concurrency": 0}, r"judge\.concurrency"),
     ({"model": "m", "retries": -1}, r"judge\.retries"), ({"model": "m", "timeout": 0}, r"judge\.timeout"),
     ({"model": "m", "time_limit": math.inf}, r"judge\.time_limit"), ({"model": "m", "budget": -1}, r"judge\.budget"),
     ({"model": "m", "parameters": {"stop": {1}}}, r"judge\.parameters"), ("gpt", r"judge: ")],
)  # fmt: skip
def test_what_is_wrong_in_the_section_is_named(lines: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Stack.from_mapping({"plugins": ["grpo"], "judge": lines})


@pytest.mark.parametrize("library", ["openai", "sqlite_utils"])
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigurationError, match=rf'{library}: pip install "rlplugins\[judge\]"'):
        Judge(JudgeConfig(model="m", cache=tmp_path / "cache.db"))
    Judge()


LINE = "judge: {url: ..., model: ...}"
JUDGED = {"critique-grpo": {"critique": "CoT", "solution": "answer"}}


def test_a_plugin_that_needs_a_judge_is_refused_without_one() -> None:
    local = find_adapter("local").configured({})
    with pytest.raises(StackError) as refused:
        Stack([JUDGED], trainer=local)
    assert "critique-grpo needs a judge" in str(refused.value) and LINE in str(refused.value)
    Stack([JUDGED], trainer=local, judge={"model": "m"})
    Stack(["critique-grpo"], trainer=local)


def test_explain_of_a_stack_file_with_a_judge(endpoint: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    lines = f"plugins:\n  - critique-grpo: {{critique: CoT, solution: answer}}\njudge: {{model: m, url: '{endpoint.url}'}}\n"

    def explained() -> tuple[int, str]:
        done = CliRunner().invoke(app, ["explain", str(file)], catch_exceptions=False, env={"COLUMNS": "140"})
        return done.exit_code, " ".join(done.output.split())

    file.write_text(lines)
    status, text = explained()
    assert status == 0 and "a judge │ critique-grpo │ yes" in text and not endpoint.bodies
    file.write_text(lines.partition("judge:")[0])
    status, text = explained()
    assert status == 2 and "a judge │ critique-grpo │ no" in text and LINE in text


# real runs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained character model, and prompts."""
    folder = tmp_path_factory.mktemp("task")
    tokenizer = arithmetic.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    arithmetic.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    arithmetic.write_prompts(folder, seed=0)
    return folder


def starts_even(prompt: str, response: str, **columns: Any) -> float:
    """1 if the response starts with an even digit."""
    return float(response[:1] in tuple("02468"))


CRITIQUE = "The first digit is odd and must not be.\nConclusion: wrong"


def run(task: Path, output: Path, judge: dict[str, Any], steps: int, **settings: Any) -> list[dict[str, float]]:
    """The metrics of a run's steps with judged critiques."""
    options = {"critique": "CoT", "solution": "answer", "template": "{question}{solution}{critique}", "T": 4}
    config = TrainConfig(
        model=task / "model", data=task / "train.jsonl", reward=f"{__file__}:starts_even", steps=steps, batch_size=16,
        group_size=4, max_new_tokens=4, learning_rate=1e-4, output=output, report_to=["none"], threads=1, **settings,
    )  # fmt: skip
    train(config, StackConfig(plugins=[{"critique-grpo": options}], judge=JudgeConfig(**judge)), progress=False)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1)) and any(
        row.get("grad_norm", 0) > 0 for row in rows
    )
    return rows


def of_plugin(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[f"rlplugins/critique-grpo/{name}"] for row in rows]


def test_a_run_with_judged_critiques(endpoint: Endpoint, task: Path, tmp_path: Path) -> None:
    endpoint.script = lambda question, before: Reply(CRITIQUE)
    rows = run(task, tmp_path, {"model": "m", "url": endpoint.url}, steps=4)
    assert of_plugin(rows, "judge/answered") == [1.0] * 4 and of_plugin(rows, "fallback") == [0.0] * 4
    prompts = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    for question in endpoint.asked:
        problem, reference = (
            question.split(f"{part}:\n")[1].split("\n")[0] for part in ("Problem", "Reference solution")
        )
        assert {"prompt": problem, "answer": reference}.items() <= next(
            line.items() for line in prompts if line["prompt"] == problem
        )


def test_a_run_whose_judge_dies_goes_on_by_the_rule(endpoint: Endpoint, task: Path, tmp_path: Path) -> None:
    deaths: list[threading.Thread] = []

    def script(question: str, before: int) -> Reply:
        if len(endpoint.bodies) >= 20 and not deaths:
            deaths.append(threading.Thread(target=endpoint.die))
            deaths[0].start()
        return Reply(CRITIQUE)

    endpoint.script = script
    rows = run(task, tmp_path, {"model": "m", "url": endpoint.url, "retries": 0, "concurrency": 2}, steps=5)
    deaths[0].join()
    fallback, failed = of_plugin(rows, "fallback"), of_plugin(rows, "judge/failed")
    assert fallback[0] == 0 and fallback[-2:] == [1.0, 1.0] and failed == pytest.approx(fallback)


def test_a_resumed_run_keeps_to_its_budget_and_no_file_holds_the_key(
    endpoint: Endpoint, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG, "rlplugins")
    endpoint.script = lambda question, before: (
        Reply(CRITIQUE) if len(endpoint.bodies) % 2 else Reply(f"wrong key: {KEY}", status=401)
    )
    judge = {"model": "m", "url": endpoint.url, "key_variable": "MY_KEY", "budget": 40, "cache": tmp_path / "cache.db"}
    run(task, tmp_path / "run", judge, steps=2)
    first = len(endpoint.bodies)
    rows = run(task, tmp_path / "run", judge, steps=6, resume=True)
    assert 0 < first < 40 == len(endpoint.bodies)
    assert of_plugin(rows, "judge/over_budget")[-1] == of_plugin(rows, "fallback")[-1] == 1.0
    assert endpoint.keys == {f"Bearer {KEY}"} and "wrong key" in caplog.text and KEY not in caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "cache.db" for path in files) and len(files) > 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
