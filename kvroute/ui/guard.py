"""What stands before the page: only its own host, its own origin, small bodies, and a strict policy for the browser.

A page on this machine can be reached by any site that a browser visits. A name that resolves to 127.0.0.1 (DNS
rebinding) is stopped by the host check, a form or a script of another site by the origin check and the body's type.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES: Final = 64 * 1024
"""Of a request's body."""
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Hosts:
    """Which names a request may call the page by.

    Args:
        host: the address it listens at. At a loopback address its names are those of this machine; elsewhere any
            address in digits, which no name can be made to point at, and the given names.
        more: further names.
    """

    def __init__(self, host: str, more: Iterable[str] = ()) -> None:
        self._names = frozenset({*_LOOPBACK, host.lower(), *(m.lower() for m in more)})
        self._any_address = not is_loopback(host)

    def allows(self, header: str) -> bool:
        """Whether a ``Host`` header is one of them, at whatever port."""
        try:
            name = urlsplit(f"//{header}").hostname
        except ValueError:
            return False
        if not name:
            return False
        if name.lower() in self._names:
            return True
        if not self._any_address:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class Guard:
    """ASGI middleware.

    Args:
        app: what it guards.
        hosts: names that requests may use.
    """

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # the page has no socket

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                there = {name for name, _ in given}
                given += [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in there]
                message = {**message, "headers": given}
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], scope["path"], headers)
        if refusal is not None:
            await _refuse(guarded, *refusal)
            return
        if scope["method"] == "POST":
            body = await _body(receive)
            if body is None:
                await _refuse(guarded, 413, f"The request is larger than {MOST_BYTES} bytes.")
                return
            receive = _replayed(body, receive)
        await self._app(scope, receive, guarded)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._hosts.allows(host):
            return 403, "This page is not served under that name."
        origin = headers.get("origin")
        strange = origin is not None and urlsplit(origin).netloc != host
        works = method not in ("GET", "HEAD") or path.startswith("/api/")  # a link to the page may stand anywhere
        if strange or (works and headers.get("sec-fetch-site", "none") not in ("none", "same-origin")):
            return 403, "Another site may not ask this page's server."
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "Requests are application/json."
        return None


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"message": message, "hint": None}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _body(receive: Receive) -> bytes | None:
    """The whole body, or None where it is too large; what is behind the limit is not kept."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        part: bytes = message.get("body", b"")
        body += part
        if len(body) > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A channel that gives a body that was read already, and then what comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
