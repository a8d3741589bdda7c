"""kvroute's metadata through langchain-openai, against a server of vLLM's JSON; the real one is in tests/serving."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import ValidationError

from kvroute import AnswerPooling, InvalidInputError, PoolingSpec, SpecError
from langchain_kvroute import ChatOpenAIKVRoute, kvroute_ask, kvroute_metadata

TOLD = {
    "features": {"mine": [0.5, 1.0]},
    "scores": {"length": {"value": 3.0, "reason": None}},
    "confidence": {"value": 0.75, "reason": None},
    "decision": {"mode": "slow", "final_mode": "fast", "difficulty": 50.5, "threshold": 10.0, "why": "difficulty"},
    "tokens": {"prompt": 5, "answer": 7, "thought": None},
    "faults": ["a feature was late"],
    "error": None,
}
USAGE = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
HEAD = {"id": "chat-1", "created": 1, "model": "m"}


class _Handler(BaseHTTPRequestHandler):
    """vLLM's chat completions: the JSON of the version that ``docs/serving.md`` shows."""

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)  # type: ignore[attr-defined]
        self.server.keys.append(self.headers["Authorization"])  # type: ignore[attr-defined]
        if not self._client_waits(self.server.delay):  # type: ignore[attr-defined]
            self.server.left += 1  # type: ignore[attr-defined]
            return
        if self.server.refuses:  # type: ignore[attr-defined]
            self._send(500, {"error": {"message": f"can't read {body['messages'][-1]['content']}", "code": 500}})
            return
        asked = (body.get("kv_transfer_params") or {}).get("kvroute")
        told: Any = {"kv_transfer_params": {"kvroute": TOLD}} if asked else {"kv_transfer_params": None}
        if body.get("n", 1) > 1:
            told["kv_transfer_params"]["kvroute"] = {**TOLD, "choices": [{**TOLD, "scores": {}}, TOLD]}
        if body.get("stream"):
            self._stream(told)
            return
        message = {"role": "assistant", "content": "it gives 4.", "reasoning_content": "2+2", "tool_calls": []}
        choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(body.get("n", 1))]
        headers = {"x-kvroute-difficulty": "50.5", "x-kvroute-mode": "fast"} if asked else {}
        self._send(200, {**HEAD, "object": "chat.completion", "choices": choices, "usage": USAGE, **told}, headers)

    def _client_waits(self, seconds: float) -> bool:
        """Let the client wait; False where it has closed the connection meanwhile."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            readable, _, _ = select.select([self.connection], [], [], 0.02)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                return False
        return True

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, told: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        deltas = [
            {"role": "assistant", "content": ""},
            {"reasoning": "2+"},
            {"reasoning": "2"},
            {"content": "it gives 4."},
        ]
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            choice = {"index": 0, "delta": delta, "finish_reason": "stop" if last else None}
            self._event({**HEAD, "object": "chat.completion.chunk", "choices": [choice]})
        self._event({**HEAD, "object": "chat.completion.chunk", "choices": [], "usage": USAGE, **told})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, body: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with serving() as it:
        yield it


@contextmanager
def serving(port: int = 0) -> Iterator[ThreadingHTTPServer]:
    it: Any = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    it.daemon_threads = True
    it.bodies, it.keys, it.refuses, it.delay, it.left = [], [], False, 0.0, 0
    thread = threading.Thread(target=it.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield it
    finally:
        it.shutdown()
        it.server_close()
        thread.join()


def fields(server: ThreadingHTTPServer, **more: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return {"model": "m", "base_url": url, "api_key": "sesame", "max_retries": 0, "stream_usage": True, **more}


@pytest.fixture
def chat(server: ThreadingHTTPServer) -> ChatOpenAIKVRoute:
    return ChatOpenAIKVRoute(**fields(server, extra_body=kvroute_ask(policy="support", features=["length"])))


def test_plain_chat_openai_has_the_headers(server: ThreadingHTTPServer) -> None:
    plain = ChatOpenAI(**fields(server, extra_body=kvroute_ask(policy="support"), include_response_headers=True))
    message = plain.invoke("2+2?")
    headers = message.response_metadata["headers"]
    assert (headers["x-kvroute-difficulty"], headers["x-kvroute-mode"]) == ("50.5", "fast")
    assert kvroute_metadata(message) is None
    assert server.bodies[0]["kv_transfer_params"] == {"kvroute": {"policy": "support"}}  # type: ignore[attr-defined]


async def test_all_of_it_comes_with_every_way_of_asking(chat: ChatOpenAIKVRoute) -> None:
    pieces = list(chat.stream("2+2?"))
    apieces = [piece async for piece in chat.astream("2+2?")]
    assert not any("kvroute" in piece.response_metadata for piece in pieces[:4])
    whole = [chat.invoke("2+2?"), await chat.ainvoke("2+2?"), chat.batch(["2+2?"])[0]]
    for message in (*whole, summed(pieces), summed(apieces)):
        about = kvroute_metadata(message)
        assert about == {
            "difficulty": 50.5,
            "mode": "fast",
            "decision": TOLD["decision"],
            "confidence": 0.75,
            "confidence_reason": None,
            "scores": TOLD["scores"],
            "features": TOLD["features"],
            "tokens": {"prompt": 5, "answer": 7},
            "faults": ["a feature was late"],
        }
        assert message.content == "it gives 4."
        assert message.additional_kwargs["reasoning_content"] == "2+2"
        assert message.usage_metadata["total_tokens"] == 12  # type: ignore[index]


def summed(pieces: list[Any]) -> AIMessageChunk:
    found = pieces[0]
    for piece in pieces[1:]:
        found = found + piece
    return found  # type: ignore[no-any-return]


def test_several_choices_have_each_their_own(server: ThreadingHTTPServer) -> None:
    chat = ChatOpenAIKVRoute(**fields(server, n=2, extra_body=kvroute_ask(features=["length"])))
    first, second = chat.generate([[HumanMessage("hi")]]).generations[0]
    assert kvroute_metadata(first.message)["scores"] == {}  # type: ignore[union-attr,index]
    assert kvroute_metadata(second.message)["scores"] == TOLD["scores"]  # type: ignore[union-attr,index]


def test_nothing_asked_nothing_told(server: ThreadingHTTPServer) -> None:
    message = ChatOpenAIKVRoute(**fields(server)).invoke("hi")
    assert kvroute_metadata(message) is None
    assert message.content


def test_a_call_may_ask_otherwise(server: ThreadingHTTPServer, chat: ChatOpenAIKVRoute) -> None:
    chat.bind(extra_body=kvroute_ask(mode="slow")).invoke("hi")
    assert server.bodies[-1]["kv_transfer_params"] == {"kvroute": {"mode": "slow"}}  # type: ignore[attr-defined]


def test_what_may_be_asked() -> None:
    spec = PoolingSpec(layers="last:2", part="v")
    asked = kvroute_ask(
        policy="p", features={"a": spec, "b": AnswerPooling(spec), "c": "kv-coe"}, confidence="sure", shadow=True
    )["kv_transfer_params"]["kvroute"]
    assert (asked["policy"], asked["confidence"], asked["shadow"]) == ("p", "sure", True)
    assert asked["features"]["c"] == "kv-coe"
    assert asked["features"]["b"]["of"] == "answer"
    assert "of" not in asked["features"]["a"]
    json.dumps(asked)
    assert kvroute_ask() == {"kv_transfer_params": {"kvroute": {}}}
    with pytest.raises(InvalidInputError, match="nonsense"):
        kvroute_ask(features=["nonsense"])
    with pytest.raises(SpecError):
        kvroute_ask(mode="medium")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="polcy"):
        kvroute_ask(polcy="p")  # type: ignore[call-arg]


def test_its_key_is_shown_nowhere(chat: ChatOpenAIKVRoute) -> None:
    from langchain_core.load import dumps

    assert "sesame" not in repr(chat) + dumps(chat)
    wrong: list[dict[str, Any]] = [{"n": 0}, {"n": 2, "streaming": True}, {"api_key": ["sesame"]}]
    for fields in wrong:
        with pytest.raises(ValidationError) as refused:
            ChatOpenAIKVRoute(**{"model": "m", "api_key": "sesame", **fields})
        assert "sesame" not in str(refused.value) + repr(refused.value)


async def test_nothing_of_a_prompt_is_logged(
    server: ThreadingHTTPServer, chat: ChatOpenAIKVRoute, caplog: pytest.LogCaptureFixture
) -> None:
    """By kvroute; what langchain-openai's own client logs for who debugs it is its own."""
    for logger in ("kvroute", "langchain_kvroute"):
        caplog.set_level(logging.DEBUG, logger=logger)
    text = "the word is xyzzy"
    assert chat.invoke(text).content
    assert (await chat.ainvoke(text)).content
    assert list(chat.stream(text))
    assert len(chat.batch([text, text])) == 2
    server.refuses = True  # type: ignore[attr-defined]
    for ask in (chat.invoke, lambda given: list(chat.stream(given)), lambda given: chat.batch([given, given])):
        with pytest.raises(openai.InternalServerError, match="xyzzy"):
            ask(text)
    with pytest.raises(openai.InternalServerError, match="xyzzy"):
        await chat.ainvoke(text)
    assert "xyzzy" not in caplog.text


# ------------------------------------------------------------------ faults


async def fails(chat: ChatOpenAIKVRoute, error: type[Exception]) -> None:
    """Every way of asking raises it."""
    for ask in (chat.invoke, lambda given: list(chat.stream(given)), lambda given: chat.batch([given])):
        with pytest.raises(error):
            ask("2+2?")
    with pytest.raises(error):
        await chat.ainvoke("2+2?")
    with pytest.raises(error):
        _ = [piece async for piece in chat.astream("2+2?")]
    found = await chat.abatch(["2+2?"] * 2, return_exceptions=True)
    assert [isinstance(one, error) for one in found] == [True] * 2


async def test_a_server_that_is_gone_comes_back() -> None:
    with serving() as server:
        chat = ChatOpenAIKVRoute(**fields(server, extra_body=kvroute_ask(policy="support")))
        first = chat.invoke("2+2?")
    await fails(chat, openai.APIConnectionError)
    with serving(server.server_address[1]):
        for again in (chat.invoke("2+2?"), await chat.ainvoke("2+2?")):
            assert kvroute_metadata(again) == kvroute_metadata(first) is not None


async def test_a_server_that_takes_too_long(server: ThreadingHTTPServer) -> None:
    chat = ChatOpenAIKVRoute(**fields(server, timeout=0.5, extra_body=kvroute_ask(policy="support")))
    server.delay = 5.0  # type: ignore[attr-defined]
    await fails(chat, openai.APITimeoutError)
    server.delay = 0.0  # type: ignore[attr-defined]
    assert kvroute_metadata(chat.invoke("2+2?")) is not None


async def test_a_cancelled_task_leaves_the_server_and_the_model_usable(
    server: ThreadingHTTPServer, chat: ChatOpenAIKVRoute
) -> None:
    it: Any = server

    async def until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not true():
            assert time.monotonic() < end
            await asyncio.sleep(0.02)

    async def streamed() -> Any:
        return [piece async for piece in chat.astream("2+2?")]

    for count, call in enumerate((lambda: chat.ainvoke("2+2?"), streamed), 1):
        it.delay = 30.0
        task = asyncio.create_task(call())
        await until(lambda count=count: len(it.bodies) == 2 * count - 1)  # type: ignore[misc]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda count=count: it.left == count)  # type: ignore[misc]
        it.delay = 0.0
        assert kvroute_metadata(await chat.ainvoke("2+2?")) is not None


def test_deep_copies_share_the_connections(chat: ChatOpenAIKVRoute) -> None:
    copied = copy.deepcopy({"chat": chat})["chat"]
    assert copied.root_client is chat.root_client
    assert copied.root_async_client is chat.root_async_client
    assert copied.extra_body == chat.extra_body
    assert copied.extra_body is not chat.extra_body
    assert copied.invoke("2+2?").response_metadata["kvroute"] == chat.invoke("2+2?").response_metadata["kvroute"]


def test_a_pickle_has_no_key_and_takes_it_from_the_environment(
    chat: ChatOpenAIKVRoute, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pickle.dumps(chat)
    assert b"sesame" not in packed
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(openai.OpenAIError, match="OPENAI_API_KEY"):
        pickle.loads(packed)  # noqa: S301 - our own
    monkeypatch.setenv("OPENAI_API_KEY", "open")
    found = pickle.loads(packed)  # noqa: S301 - our own
    assert found.openai_api_key.get_secret_value() == "open"
    assert found.model_dump(exclude={"openai_api_key"}) == chat.model_dump(exclude={"openai_api_key"})
    first, again = chat.invoke("2+2?"), asyncio.run(found.ainvoke("2+2?"))
    assert kvroute_metadata(again) == kvroute_metadata(first) is not None
    assert server.keys == ["Bearer sesame", "Bearer open"]  # type: ignore[attr-defined]
    assert chat.openai_api_key.get_secret_value() == "sesame"  # type: ignore[union-attr]
