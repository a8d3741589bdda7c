"""What kvroute's endpoints on a server share: JSON, errors in OpenAI's form, calls of the server's own routes.

Pure ASGI, no import of vLLM. An endpoint asks the server's own routes within the same process, with the caller's
headers: so vLLM's key check, its checks of model and prompt, its limits and its metrics hold for ours too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping, MutableMapping, Sequence
from typing import Any, Final, TypeVar

from kvroute.errors import KVRouteError
from kvroute.serving.answers import clean

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
T = TypeVar("T")

MAX_BODY: Final = 32 * 1024 * 1024
"""Bytes of a request."""
IN_FLIGHT: Final = 64
"""Inner calls at a time that one request makes."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: goes to the client.
        status: of HTTP.
        param: the field that is to blame.
        kind: OpenAI's type of error; by default that of the status.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {
            "error": {
                "message": message,
                "type": kind or ("invalid_request_error" if status < 500 else "server_error"),
                "param": param,
                "code": status,
            }
        }

    @classmethod
    def of(cls, error: KVRouteError, *, param: str | None = None) -> ApiError:
        """Bad input, in our own error's words."""
        return cls(clean(str(error)), param=param)

    @classmethod
    def inner(cls, status: int, body: bytes, where: str = "") -> ApiError:
        """What an inner route refused, in its own words."""
        found = _object(body)
        detail = found.get("error") if found else None
        if isinstance(detail, dict) and isinstance(detail.get("message"), str):
            return cls(where + detail["message"], status, param=detail.get("param"), kind=detail.get("type"))
        error = cls(f"{where}The server refused with status {status}.", status)
        if found is not None and not where:
            error.body = found
        return error


class Exchange:
    """One request to an endpoint of ours.

    Args:
        app: the server's own routes.
        scope, receive, send: as ASGI hands them over.
    """

    def __init__(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        self.app = app
        self.scope = scope
        self._receive = receive
        self._send = send

    # ------------------------------------------------------------------ with the client

    async def body(self) -> dict[str, Any]:
        """The request's JSON object.

        Raises:
            ApiError: too large, or none.
        """
        data = bytearray()
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise asyncio.CancelledError
            data += message.get("body", b"")
            if len(data) > MAX_BODY:
                raise ApiError(f"The request is larger than {MAX_BODY} bytes.", 413)
            if not message.get("more_body"):
                break
        found = _object(bytes(data))
        if found is None:
            raise ApiError("The body is no JSON object.")
        return found

    async def answer(self, body: Mapping[str, Any], status: int = 200) -> None:
        """Send JSON."""
        data = json.dumps(body, allow_nan=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": data})

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; ends it where the client goes away.

        Raises:
            asyncio.CancelledError: the client is gone.
            whatever the work raises.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._gone())
        try:
            await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise asyncio.CancelledError
            return task.result()
        finally:
            await _end(task, gone)

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ------------------------------------------------------------------ with the server

    async def admitted(self) -> None:
        """Let the server's own key check look at the request, before anything is done for it.

        Raises:
            ApiError: it refuses.
        """
        status, body = await self.call("GET", "/v1/models")
        if status != 200:
            raise ApiError.inner(status, body)

    async def post(self, path: str, body: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Ask a route of the server's.

        Args:
            path: e.g. ``/v1/completions``.
            body: what it gets.
            where: put before the text of its error.

        Raises:
            ApiError: it refuses, in its words.
        """
        status, data = await self.call("POST", path, json.dumps(body, allow_nan=False).encode())
        found = _object(data) if status == 200 else None
        if found is None:
            raise ApiError.inner(status if status != 200 else 500, data, where)
        return found

    async def each(self, works: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Results in order, :data:`IN_FLIGHT` at a time; the first error ends the others."""
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with slots:
                return await work()

        tasks = [asyncio.ensure_future(one(work)) for work in works]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _end(*tasks)

    async def call(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of a route of the server's, asked with the caller's headers."""
        root = self.scope.get("root_path", "")
        kept = [
            (k, v)
            for k, v in self.scope["headers"]
            if k.lower() not in (b"content-length", b"content-type", b"transfer-encoding", b"accept-encoding")
        ]
        headers = [*kept, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        # Routing writes into its scope, so each call has its own.
        scope = {k: v for k, v in self.scope.items() if k in _KEPT}
        scope |= {
            "method": method,
            "path": root + path,
            "raw_path": (root + path).encode(),
            "query_string": b"",
            "headers": headers,
            "state": dict(self.scope.get("state") or {}),
        }
        sent = False
        status, data = 500, bytearray()

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # the caller's going away cancels the whole call
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                data.extend(message.get("body", b""))

        await self.app(scope, receive, send)
        return status, bytes(data)


_KEPT: Final = frozenset({"type", "asgi", "http_version", "scheme", "root_path", "client", "server", "app"})


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


async def _end(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
