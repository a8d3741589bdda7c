"""The middleware around an app that sends what vLLM 0.32 sends: every kind of answer gets its result or a reason."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from kvroute.serving.answers import Result, Tokens
from kvroute.serving.bodies import Call, dumped, headers_of, read_call, with_results
from kvroute.serving.mailbox import WAITS, Mailbox
from kvroute.serving.middleware import KVRouteMiddleware, connector_settings

ASK = {"kv_transfer_params": {"kvroute": {"features": ["length"]}}}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def result(answer: int) -> dict[str, Any]:
    return Result(tokens=Tokens(3, answer)).to_dict()


@dataclass
class Server:
    """vLLM behind the middleware, and a client. ``late`` results come only after the answer is written."""

    answer: Any  # a dict, or a list of events
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id with X for the request's
    status: int = 200
    late: bool = False
    settings: dict[str, Any] | None = field(default_factory=dict)
    seconds: float = 0.05
    echo: bool = False
    pieces: int = 1
    mailbox: Mailbox = field(default_factory=Mailbox)
    seen: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mailbox.connected = True
        self.mailbox.on_fault = self.faults.append

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        headers = dict(scope["headers"])
        id = headers[b"x-request-id"].decode()
        self.seen = {"body": body, "id": id, "waiting": self.mailbox.waiting}

        def put() -> None:
            for key, value in self.results.items():
                self.mailbox.put(key.replace("X", id) + "-0123abcd", value)

        if self.late:
            asyncio.get_running_loop().call_later(0.01, put)
        else:
            put()
        streams = isinstance(self.answer, list)
        kind = b"text/event-stream; charset=utf-8" if streams else b"application/json"
        out = [(b"content-type", kind)]
        if self.echo:
            out.append((b"X-Request-Id", id.encode()))
        if streams:
            text = b"".join(e if isinstance(e, bytes) else b"data: " + dumped(e) + b"\n\n" for e in self.answer)
            size = max(1, len(text) // self.pieces)
            chunks = [text[i : i + size] for i in range(0, len(text), size)] if self.pieces > 1 else [text]
        else:
            chunks = [self.answer if isinstance(self.answer, bytes) else dumped(self.answer)]
            out.append((b"content-length", str(len(chunks[0])).encode()))
        await send({"type": "http.response.start", "status": self.status, "headers": out})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def call(
        self, body: Any, path: str = CHAT, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent: list[Any] = []
        half = len(raw) // 2
        parts = [
            {"type": "http.request", "body": raw[:half], "more_body": True},
            {"type": "http.request", "body": raw[half:], "more_body": False},
        ]

        async def receive() -> Any:
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        transfer = None
        if self.settings is not None:
            transfer = SimpleNamespace(kv_connector="KVRouteConnector", kv_connector_extra_config=self.settings)
        app = SimpleNamespace(state=SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer)))
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "app": app,
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {"X-Request-Id": "x"}).items()],
        }
        await KVRouteMiddleware(self.app, self.mailbox, self.seconds)(scope, receive, send)
        assert self.mailbox.waiting == 0
        assert [m["type"] for m in sent[:1]] == ["http.response.start"]
        assert all(m["type"] == "http.response.body" for m in sent[1:])
        assert [m["more_body"] for m in sent[1:]][-1:] == [False]
        assert all(m["more_body"] for m in sent[1:-1])
        heads = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
        whole = b"".join(m["body"] for m in sent[1:])
        if "content-length" in heads:
            assert int(heads["content-length"]) == len(whole)
        return sent[0]["status"], heads, whole


def chat(**more: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"content": "hé"}, "finish_reason": "length", "stop_reason": None}
    return {"id": "chatcmpl-1", "choices": [choice], "usage": {"completion_tokens": 5}, **more}


def chunk(text: str, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish, **more}
    return {"id": "chatcmpl-1", "choices": [choice]}


USAGE = {"id": "chatcmpl-1", "choices": [], "usage": {"completion_tokens": 4}}
DONE = b"data: [DONE]\n\n"


def events(body: bytes) -> list[Any]:
    parts = body.split(b"\n\n")
    assert parts[-1] == b""
    return [p if p == b"data: [DONE]" else json.loads(p[5:]) for p in parts[:-1]]


@pytest.mark.parametrize("late", [False, True])
async def test_an_answer_gets_what_vllm_leaves_out(late):
    server = Server(chat(kv_transfer_params={"other": 1}), {"chatcmpl-X": result(5)}, late=late)
    status, _, body = await server.call({"n": 1, **ASK})
    assert status == 200
    assert json.loads(body) == chat(kv_transfer_params={"other": 1, "kvroute": result(5)})


async def test_what_vllm_brings_itself_is_kept_without_waiting():
    own = chat(kv_transfer_params={"kvroute": result(9)})
    server = Server(own, seconds=3600.0)
    assert json.loads((await server.call(ASK))[2]) == own


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: None, "within 0.05 seconds"),
        (lambda s: setattr(s.mailbox, "partial", True), "--api-server-count 1"),
        (lambda s: setattr(s.mailbox, "connected", False), "--disable-log-stats"),
    ],
)
async def test_an_answer_without_its_result_says_why(change: Callable[[Server], None], reason: str):
    server = Server(chat())
    change(server)
    found = json.loads((await server.call(ASK))[2])
    assert reason in Result.from_dict(found["kv_transfer_params"]["kvroute"]).error
    assert found["choices"] == chat()["choices"]


async def test_beams_have_a_reason_and_nobody_waits():
    server = Server(chat(), seconds=3600.0)
    found = json.loads((await server.call({"use_beam_search": True, **ASK}))[2])
    assert "beam" in found["kv_transfer_params"]["kvroute"]["error"]


async def test_every_choice_has_its_own():
    answer = {"choices": [{"index": i, "text": str(i), "finish_reason": "length"} for i in range(4)]}
    results = {f"{s}_cmpl-X-{p}": result(10 * p + s) for p in (0, 1) for s in (0, 1)}
    server = Server(answer, results)
    body = (await server.call({"prompt": ["a", [1, 2]], "n": 2, **ASK}, COMPLETION))[2]
    found = json.loads(body)["kv_transfer_params"]["kvroute"]
    assert [c["tokens"]["answer"] for c in found["choices"]] == [0, 1, 10, 11]
    assert found["tokens"]["answer"] == 0
    del results["0_cmpl-X-1"]
    body = (await Server(answer, results).call({"prompt": ["a", [1, 2]], "n": 2, **ASK}, COMPLETION))[2]
    found = json.loads(body)["kv_transfer_params"]["kvroute"]
    assert [bool(c["error"]) for c in found["choices"]] == [False, False, True, False]


async def test_tokens_behind_a_stop_string_are_told():
    choice = {"index": 0, "text": "a", "finish_reason": "stop", "stop_reason": "STOP"}
    server = Server({"choices": [choice], "usage": {"completion_tokens": 5}}, {"cmpl-X-0": result(7)})
    body = (await server.call({"prompt": "a", **ASK}, COMPLETION))[2]
    assert json.loads(body)["kv_transfer_params"]["kvroute"]["tokens"]["behind_stop"] == 2
    given = {"kv_transfer_params": {"kvroute": {"features": ["length"], "answer_from": 1}}}
    body = (await server.call({"prompt": "a", **given}, COMPLETION))[2]
    assert json.loads(body)["kv_transfer_params"]["kvroute"]["tokens"]["behind_stop"] is None
    body = (await Server(server.answer).call({"prompt": "a", **ASK}, COMPLETION))[2]
    assert "behind_stop" not in json.loads(body)["kv_transfer_params"]["kvroute"]["tokens"]
    by_token = {"choices": [{**choice, "stop_reason": 17}], "usage": {"completion_tokens": 5}}
    body = (await Server(by_token, {"cmpl-X-0": result(5)}).call({"prompt": "a", **ASK}, COMPLETION))[2]
    assert "behind_stop" not in json.loads(body)["kv_transfer_params"]["kvroute"]["tokens"]


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, 50, 10_000])
@pytest.mark.parametrize("usage", [False, True])
async def test_a_streams_last_chunk_has_it_however_it_is_cut(pieces, usage):
    told = [chunk('"finish_reason":"stop"'), chunk("b"), chunk("c", "stop", stop_reason="c"), *([USAGE] * usage), DONE]
    server = Server(told, {"chatcmpl-X": result(5)}, pieces=pieces, late=True)
    _, headers, body = await server.call({"stream": True, **ASK})
    found = events(body)
    last = found[-2]
    params = last.pop("kv_transfer_params")
    assert found == events(b"".join(e if isinstance(e, bytes) else b"data: " + dumped(e) + b"\n\n" for e in told))
    assert params["kvroute"]["tokens"] == {
        "prompt": 3,
        "answer": 5,
        "thought": None,
        "behind_stop": 1 if usage else None,
    }
    assert not any(name.startswith("x-kvroute") for name in headers)


async def test_streams_of_several_choices_keep_their_order():
    told = [chunk("a"), chunk("b", index=1), chunk("", "length"), chunk("c", index=1), chunk("", "stop", 1), DONE]
    server = Server(told, {f"{s}_chatcmpl-X": result(s) for s in (0, 1)}, pieces=7)
    found = events((await server.call({"stream": True, "n": 2, **ASK}))[2])
    params = found[-2].pop("kv_transfer_params")
    assert found == [*told[:-1], b"data: [DONE]"]
    assert [c["tokens"]["answer"] for c in params["kvroute"]["choices"]] == [0, 1]


@pytest.mark.parametrize(
    "told", [[{"error": {"message": "died"}}, DONE], [chunk("a"), b"data: {torn"], [chunk("a", "stop")], [DONE]]
)
async def test_streams_that_break_off_go_out_as_they_are(told):
    plain = b"".join(e if isinstance(e, bytes) else b"data: " + dumped(e) + b"\n\n" for e in told)
    assert (await Server(told, pieces=4).call({"stream": True, **ASK}))[2] == plain


@pytest.mark.parametrize("answer", [b"no JSON", b"[1]", b'{"a": 1}', b""])
async def test_answers_that_are_none_go_out_as_they_are(answer):
    assert (await Server(answer, {"chatcmpl-X": result(1)}).call(ASK))[2] == answer


async def test_a_refusal_goes_out_as_it_is_and_at_once():
    server = Server({"error": {"message": "no"}}, status=400, seconds=3600.0)
    status, _, body = await server.call(ASK)
    assert (status, json.loads(body)) == (400, server.answer)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "what is kvroute?"},
        {"kv_transfer_params": {"kvroute": {}}},
        {"kv_transfer_params": {"kvroute": {"features": [], "policy": None, "shadow": False}}},
        {"kv_transfer_params": {"kvroute": None}},
        {"kv_transfer_params": ["kvroute"]},
        ["kvroute"],
        b"kvroute, but no JSON",
        b'{"kvroute": ' + b"[" * 100_000,
        b'{"kvroute": ' + b"9" * 5000 + b"}",
    ],
)
async def test_who_asks_nothing_gets_the_answer_as_it_is(body):
    server = Server(chat(), seconds=3600.0)
    assert (await server.call(body))[2] == dumped(chat())
    assert server.seen["waiting"] == 0


async def test_a_default_ask_is_everybodys():
    server = Server(chat(), {"chatcmpl-X": result(5)}, settings={"default": {"features": ["length"]}})
    assert "kvroute" in json.loads((await server.call({}))[2])["kv_transfer_params"]
    assert (await server.call({"kv_transfer_params": {"kvroute": {}}}))[2] == dumped(chat())


async def test_other_paths_methods_and_servers_are_left_alone():
    server = Server(chat(), {"chatcmpl-X": result(5)}, settings=None)
    assert (await server.call(ASK))[2] == dumped(chat())
    assert server.seen["id"] == "x"
    server = Server(chat(), {"chatcmpl-X": result(5)})
    assert (await server.call(ASK, "/v1/responses"))[2] == dumped(chat())
    assert server.seen["id"] == "x"


async def test_a_request_id_begins_with_the_clients_and_is_nobody_elses():
    server = Server(chat(), echo=True)
    ids = set()
    for _ in range(3):
        _, headers, _ = await server.call({}, headers={"X-Request-Id": "mine"})
        assert headers["x-request-id"] == "mine"
        ids.add(server.seen["id"])
    assert len(ids) == 3
    assert all(id.startswith("mine-") and len(id) == 5 + 32 + 1 + len(WAITS) for id in ids)


async def test_an_id_says_that_its_result_is_waited_for_where_it_will_come():
    for connected, partial, waits in ((True, False, True), (False, False, False), (True, True, False)):
        server = Server(chat())
        server.mailbox.connected, server.mailbox.partial = connected, partial
        await server.call({})
        assert (WAITS in server.seen["id"]) is waits


async def test_a_result_that_the_engine_still_owes_is_waited_for():
    owed = {"kv_transfer_params": {"kvroute": {"error": "?", "pending": True}, "other": 1}}
    server = Server(
        chat(**owed), results={"chatcmpl-X": {"error": None, "features": {"f": [1.0]}}}, late=True, seconds=5
    )
    found = json.loads((await server.call(ASK))[2])["kv_transfer_params"]
    assert found == {"kvroute": {"error": None, "features": {"f": [1.0]}}, "other": 1}
    server = Server(chat(**owed))
    found = json.loads((await server.call(ASK))[2])["kv_transfer_params"]["kvroute"]
    assert "No result came" in found["error"]
    assert "pending" not in found


async def test_a_client_that_leaves_is_forgotten():
    mailbox = Mailbox()

    async def app(scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        await receive()
        assert mailbox.waiting == 1
        raise asyncio.CancelledError

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(ASK).encode()}

    transfer = SimpleNamespace(kv_connector="KVRouteConnector", kv_connector_extra_config={})
    state = SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer))
    scope = {"type": "http", "method": "POST", "path": CHAT, "app": SimpleNamespace(state=state), "headers": []}
    with pytest.raises(asyncio.CancelledError):
        await KVRouteMiddleware(app, mailbox)(scope, receive, None)  # type: ignore[arg-type]
    assert mailbox.waiting == 0


async def test_headers_say_what_is_known():
    decided = {**result(5), "decision": {"difficulty": 41.23456, "final_mode": "slow"}, "confidence": {"value": 0.5}}
    _, headers, _ = await Server(chat(), {"chatcmpl-X": decided}).call(ASK)
    assert {k: v for k, v in headers.items() if k.startswith("x-kvroute")} == {
        "x-kvroute-difficulty": "41.23",
        "x-kvroute-mode": "slow",
        "x-kvroute-confidence": "0.5",
    }
    unknown = {"decision": {"difficulty": None, "final_mode": "a\r\nb"}, "confidence": {"value": None}}
    assert headers_of(unknown) == headers_of({}) == headers_of({"decision": None}) == []


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", ["read_call", "ids_of", "with_results", "dumped", "headers_of", "stops_of"])
async def test_what_fails_in_the_middleware_is_counted_and_changes_no_answer(monkeypatch, broken, stream):
    told = [chunk("a"), chunk("b", "stop", stop_reason="b"), DONE]
    server = Server(told if stream else chat(), {"chatcmpl-X": result(5)}, pieces=3)
    ask = {"stream": stream, **ASK}
    expected = b"".join(e if isinstance(e, bytes) else b"data: " + dumped(e) + b"\n\n" for e in told)
    expected = expected if stream else dumped(chat())
    good = (await server.call(ask))[2]
    assert good != expected
    assert server.faults == []
    monkeypatch.setattr(f"kvroute.serving.middleware.{broken}", raising)
    body = (await server.call(ask))[2]
    if broken == "headers_of" and stream:  # streams have none
        assert (body, server.faults) == (good, [])
        return
    assert server.faults == ["middleware"]
    if broken == "stops_of" and stream:  # all it costs is what is said of the tokens behind the stop string
        assert events(body)[-2]["kv_transfer_params"]["kvroute"] == result(5)
        assert b'"behind_stop":null' in good
        return
    assert body == expected


async def test_a_fault_that_can_not_be_counted_changes_no_answer(monkeypatch):
    server = Server(chat(), {"chatcmpl-X": result(5)})
    monkeypatch.setattr("kvroute.serving.middleware.with_results", raising)
    for count in (raising, None):
        server.mailbox.on_fault = count
        assert (await server.call(ASK))[2] == dumped(chat())


def test_calls():
    body = json.dumps({"prompt": ["a", "b"], "n": 3, **ASK}).encode()
    assert read_call(body, "completion", always=False) == Call(2, 3)
    assert read_call(body, "chat", always=False) == Call(1, 3)
    for prompt, count in (("a", 1), ([1, 2], 1), ([[1], [2]], 2), ([], 1), (None, 1), (["a"], 1)):
        body = json.dumps({"prompt": prompt, "n": True, **ASK}).encode()
        assert read_call(body, "completion", always=False) == Call(count, 1)


def test_halves_of_surrogate_pairs_survive():
    body = with_results(json.loads('{"choices": [{"text": "\\ud83d"}]}'), Call(), {(0, 0): result(1)}, "")
    assert json.loads(dumped(body)) == body


def test_settings_alone_and_among_others():
    own = {"kv_connector": "KVRouteConnector", "kv_connector_extra_config": {"strict": True}}
    assert connector_settings("KVRouteConnector", {"a": 1}) == {"a": 1}
    assert connector_settings("MultiConnector", {"connectors": [{"kv_connector": "Other"}, own]}) == {"strict": True}
    assert connector_settings("MultiConnector", {"connectors": [{"kv_connector": "Other"}]}) is None
    assert connector_settings("MultiConnector", {"connectors": 5}) is None
    assert connector_settings("Other", {}) is None
    assert connector_settings(None, {}) is None
