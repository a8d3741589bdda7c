"""ASGI middleware of a vLLM server that puts kvroute's results into every answer: ``--middleware`` loads it.

vLLM 0.32 itself brings a connector's result to the client only in an answer that is not streamed, has one choice, and
ends by its tokens. What is missing is filled in here: streams (their last chunk), stop strings, several choices and
several prompts. Requests that ask nothing of kvroute pass through as they are. Pure ASGI, no import of vLLM.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any, Final

from kvroute.serving.answers import PENDING
from kvroute.serving.asks import KEY
from kvroute.serving.bodies import Call, Kind, dumped, headers_of, ids_of, read_call, stops_of, with_results
from kvroute.serving.mailbox import MAILBOX, WAITS, Mailbox, Slot

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger(__name__)
_PATHS: Final[dict[str, Kind]] = {"/v1/chat/completions": "chat", "/v1/completions": "completion"}
_ID: Final = b"x-request-id"
_SECONDS: Final = 5.0
"""How long a finished answer waits for its result. It comes with the same engine step, or the next after a stop
string."""
_END: Final = b"data: [DONE]"
_FINISH: Final = b'"finish_reason":"'
_USAGE: Final = b'"choices":[]'
_ENDS: Final = (_END, _FINISH, _USAGE)
_NO_STATS: Final = (
    "vLLM's statistics bring this result, and they are off. Start the server without --disable-log-stats."
)
_PARTIAL: Final = (
    "Several API servers share the engine's statistics, and this result went to another one. "
    "Start the server with --api-server-count 1."
)
_BEAMS: Final = "vLLM tells connectors nothing of a beam search."


class KVRouteMiddleware:
    """Puts results into the answers of ``/v1/chat/completions`` and ``/v1/completions``.

    Args:
        app: what answers.
        mailbox: where the results arrive.
        seconds: how long an answer waits for them.
    """

    def __init__(self, app: App, mailbox: Mailbox = MAILBOX, seconds: float = _SECONDS) -> None:
        self._app = app
        self._mailbox = mailbox
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = _kind(scope)
        settings = None if kind is None else _settings(scope)
        if kind is None or settings is None:
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(kind, bool(settings.get("default")), receive, send, self._mailbox, self._seconds)
        try:
            await self._app(exchange.scope(scope), exchange.receive, exchange.send)
        finally:
            exchange.close()


class _Exchange:
    """One request and its answer on the way through."""

    def __init__(
        self, kind: Kind, always: bool, receive: Receive, send: Send, mailbox: Mailbox, seconds: float
    ) -> None:
        self._kind = kind
        self._always = always
        self._receive = receive
        self._send = send
        self._mailbox = mailbox
        self._seconds = seconds
        self._id = ""
        self._theirs: bytes | None = None
        self._body: list[bytes] | None = []
        self._call: Call | None = None
        self._slot: Slot | None = None
        self._answer: _Whole | _Stream | None = None

    def scope(self, scope: Scope) -> Scope:
        """With a request id that nobody else has: results are found by it. It begins with the client's, if any."""
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != _ID]
        self._theirs = next((value for name, value in scope["headers"] if name.lower() == _ID), None)
        mine = secrets.token_hex(16)
        if self._mailbox.connected and not self._mailbox.partial:
            mine = f"{mine}-{WAITS}"
        self._id = mine if self._theirs is None else f"{self._theirs.decode('latin-1')}-{mine}"
        return {**scope, "headers": [*headers, (_ID, self._id.encode("latin-1"))]}

    def close(self) -> None:
        if self._slot is not None:
            self._slot.close()

    # ------------------------------------------------------------------ the request

    async def receive(self) -> Message:
        message = await self._receive()
        if self._body is not None and message["type"] == "http.request":
            self._body.append(message.get("body", b""))
            if not message.get("more_body", False):
                body, self._body = b"".join(self._body), None
                self._look(body)
        return message

    def _look(self, body: bytes) -> None:
        try:
            call = read_call(body, self._kind, always=self._always)
            if call is not None:
                self._slot = self._mailbox.expect(ids_of(self._kind, self._id, call.prompts), call.each)
                self._call = call
        except Exception:  # noqa: BLE001 - the request goes on without
            self._failed("read what a request asks")

    def _failed(self, what: str) -> None:
        """Called where an exception ends: what the client sends and gets is left as it is."""
        _log.warning("kvroute could not %s.", what, exc_info=True)
        self._mailbox.fault("middleware")

    # ------------------------------------------------------------------ the answer

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": self._restored(message.get("headers", ()))}
            if self._call is not None and message["status"] == 200:
                self._answer = _Stream(self._failed) if _is_stream(message["headers"]) else _Whole(message)
                if isinstance(self._answer, _Whole):
                    return  # its headers are known with its body
        elif message["type"] == "http.response.body" and self._answer is not None:
            if isinstance(self._answer, _Stream):
                await self._send_events(self._answer, message)
            else:
                await self._send_whole(self._answer, message)
            return
        await self._send(message)

    def _restored(self, headers: Any) -> list[tuple[bytes, bytes]]:
        """Where the server echoes the request's id, it is the client's own."""
        if self._theirs is None:
            return list(headers)
        return [(name, self._theirs if name.lower() == _ID else value) for name, value in headers]

    async def _send_whole(self, answer: _Whole, message: Message) -> None:
        answer.body.append(message.get("body", b""))
        if message.get("more_body", False):
            return
        body, headers = b"".join(answer.body), answer.start["headers"]
        try:
            found = json.loads(body)
            if isinstance(found, dict) and "choices" in found:
                extra = headers_of((await self._filled(found, stops_of(found)))["kv_transfer_params"][KEY])
                body = dumped(found)
                headers = [(n, v) for n, v in headers if n.lower() != b"content-length"]
                headers += [(b"content-length", str(len(body)).encode()), *extra]
        except Exception:  # noqa: BLE001 - the answer goes out as it is
            self._failed("put a result into an answer")
        await self._send({**answer.start, "headers": headers})
        await self._send({**message, "body": body, "more_body": False})

    async def _send_events(self, answer: _Stream, message: Message) -> None:
        if message.get("more_body", False) and answer.passes(message.get("body", b"")):
            await self._send(message)
            return
        out = b""
        for event in answer.events(message.get("body", b"")):
            if not event.startswith(_END):
                out += answer.exchange(event)
                continue
            if out:
                await self._send({"type": message["type"], "body": out, "more_body": True})
            out = await self._last(answer) + event
        more = message.get("more_body", False)
        if not more:
            out += answer.rest()
        if out or not more:
            await self._send({**message, "body": out})

    async def _last(self, answer: _Stream) -> bytes:
        """The last chunk of a stream, with the result."""
        event, answer.held = answer.held, b""
        try:
            found = json.loads(event[len(b"data:") :]) if event else None
            if isinstance(found, dict) and "choices" in found:
                return b"data: " + dumped(await self._filled(found, answer.stopped)) + b"\n\n"
        except Exception:  # noqa: BLE001 - the chunk goes out as it is
            self._failed("put a result into a stream")
        return event

    async def _filled(self, body: dict[str, Any], stopped: set[int]) -> dict[str, Any]:
        assert self._call is not None
        assert self._slot is not None
        params = body.get("kv_transfer_params")
        own = params.get(KEY) if isinstance(params, dict) else None
        brought = len(self._call.choices) == 1 and isinstance(own, dict) and PENDING not in own
        why = _BEAMS if self._call.beams else "" if self._mailbox.connected else _NO_STATS
        if not why and not brought and not await self._slot.wait(self._seconds):
            why = _PARTIAL if self._mailbox.partial else f"No result came within {self._seconds:g} seconds."
        return with_results(body, self._call, self._slot.results, why, stopped)


class _Whole:
    """An answer in one piece."""

    def __init__(self, start: Message) -> None:
        self.start = start
        self.body: list[bytes] = []


class _Stream:
    """Events of a stream, of which one that may be the last before the end is held back until the next comes.

    Args:
        failed: is told what could not be done.
    """

    def __init__(self, failed: Callable[[str], None]) -> None:
        self._failed = failed
        self.held = b""
        self.stopped: set[int] = set()
        self._rest = b""

    def passes(self, piece: bytes) -> bool:
        """Whether a piece goes out as it is: whole events, none of which may be the last; as nearly all are."""
        return not (self.held or self._rest) and piece.endswith(b"\n\n") and not any(end in piece for end in _ENDS)

    def events(self, piece: bytes) -> Iterator[bytes]:
        """Whole events, each with the blank line that ends it."""
        *events, self._rest = (self._rest + piece).split(b"\n\n")
        yield from (event + b"\n\n" for event in events)

    def exchange(self, event: bytes) -> bytes:
        """What may go out when this event has come."""
        out, self.held = self.held, b""
        # In a text of the model's these quotes would be escaped.
        ends = _FINISH in event
        if ends and b'"stop_reason":"' in event:
            try:
                self.stopped |= stops_of(json.loads(event[len(b"data:") :]))
            except Exception:  # noqa: BLE001 - the chunk goes out as it is
                self._failed("read which choices ended at a stop string")
        if ends or _USAGE in event:
            self.held = event
            return out
        return out + event

    def rest(self) -> bytes:
        """What is left where a stream ends without a word."""
        out, self.held, self._rest = self.held + self._rest, b"", b""
        return out


def _kind(scope: Scope) -> Kind | None:
    if scope["type"] != "http" or scope["method"] != "POST":
        return None
    return next((kind for path, kind in _PATHS.items() if scope["path"].endswith(path)), None)


def _is_stream(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(n.lower() == b"content-type" and v.lower().startswith(b"text/event-stream") for n, v in headers)


def _settings(scope: Scope) -> Mapping[str, Any] | None:
    """The settings of the connector that the server's engine runs; None where it runs none of ours."""
    config = getattr(getattr(getattr(scope.get("app"), "state", None), "vllm_config", None), "kv_transfer_config", None)
    name = getattr(config, "kv_connector", None)
    extra = getattr(config, "kv_connector_extra_config", None) or {}
    return connector_settings(name, extra)


def connector_settings(name: str | None, extra: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Settings of ``KVRouteConnector``, alone or among the children of vLLM's ``MultiConnector``; None without it."""
    if name == "KVRouteConnector":
        return extra
    children = extra.get("connectors") if name == "MultiConnector" else None
    for child in children if isinstance(children, list) else ():
        if isinstance(child, Mapping) and child.get("kv_connector") == "KVRouteConnector":
            return child.get("kv_connector_extra_config") or {}
    return None
