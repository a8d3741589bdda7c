"""kvroute's metadata through langchain-openai, against a server of vLLM's JSON; the real one is in tests/serving."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
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
    it = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    it.daemon_threads = True
    it.bodies, it.refuses = [], False  # type: ignore[attr-defined]
    thread = threading.Thread(target=it.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield it
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


def test_without_the_package_the_pip_line_is_said() -> None:
    code = (
        "import sys; sys.modules['langchain_openai'] = None\n"
        "import langchain_kvroute\n"
        "langchain_kvroute.ChatKVRoute\n"
        "try:\n    langchain_kvroute.ChatOpenAIKVRoute\n"
        "except ImportError as error:\n    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'kvroute[langchain-openai]'" in printed
