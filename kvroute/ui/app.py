"""The page's server: what :class:`~kvroute.ui.desk.Desk` gives, as routes. One piece of work at a time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from pydantic import BaseModel, ValidationError

from kvroute.engines.threads import in_thread
from kvroute.errors import KVRouteError, MissingExtraError
from kvroute.generation import CancelToken
from kvroute.ui.desk import Desk, Pair, Question
from kvroute.ui.guard import Guard, Hosts

try:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError("starlette", "ui") from error

if TYPE_CHECKING:
    from starlette.types import Send

logger = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)

WAITING: Final = 3
"""Requests that may wait while one is worked on; a further one is told that the page is busy."""
_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE: Final = "index.html"


class BusyError(KVRouteError):
    """Too many requests wait already."""

    def __init__(self) -> None:
        super().__init__(
            f"The model is busy, and {WAITING} questions wait already.", hint="Try again when an answer is done."
        )


class Turn:
    """Lets one piece of work run and a few wait, in the order they came."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._inside = 0

    @property
    def ahead(self) -> int:
        """How many would have to be done first."""
        return self._inside

    def check(self) -> None:
        """Raise BusyError where nobody may wait any more."""
        if self._inside > WAITING:
            raise BusyError

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for one's turn.

        Raises:
            BusyError: too many wait.
        """
        self.check()
        self._inside += 1
        try:
            async with self._lock:
                yield
        finally:
            self._inside -= 1


def build_app(desk: Desk, hosts: Hosts) -> Starlette:
    """The server of one page.

    Args:
        desk: what answers.
        hosts: names that requests may call it by.
    """
    turn = Turn()
    static = {f.name: f.read_bytes() for f in files("kvroute.ui").joinpath("static").iterdir() if f.is_file()}

    async def file(request: Request) -> Response:
        name = request.path_params.get("name", PAGE)
        if name not in static:  # a name of those that were read when the server started, never a path
            return JSONResponse({"message": "There is no such page.", "hint": None}, status_code=404)
        kind = _TYPES.get(name.rpartition(".")[2], "application/octet-stream")
        return Response(static[name], media_type=kind, headers={"cache-control": "no-cache"})

    async def about(_: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(desk.about))

    async def ask(request: Request) -> Response:
        wanted = await _wanted(request, Question)
        turn.check()
        return _Stream(_lines(desk, turn, wanted), media_type="application/x-ndjson")

    async def compare(request: Request) -> Response:
        wanted = await _wanted(request, Pair)
        return JSONResponse(await _in_turn(turn, lambda: desk.compare(wanted)))

    async def curve(_: Request) -> Response:
        return JSONResponse(await _in_turn(turn, desk.curve))

    return Starlette(
        routes=[
            Route("/", file),
            Route("/static/{name}", file),
            Route("/api/about", about),
            Route("/api/curve", curve),
            Route("/api/ask", ask, methods=["POST"]),
            Route("/api/compare", compare, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={KVRouteError: _refused, Exception: _failed},
    )


class _Stream(StreamingResponse):
    """Closes its iterator at once when the reader has left, wherever it stands then."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast("AsyncGenerator[bytes, None]", self.body_iterator)):
            await super().stream_response(send)


async def _in_turn(turn: Turn, work: Callable[[], T]) -> T:
    async with turn.take():
        return await asyncio.to_thread(work)


async def _lines(desk: Desk, turn: Turn, wanted: Question) -> AsyncGenerator[bytes, None]:
    """Events as JSON Lines. When the reader leaves, the generation ends."""
    cancel = CancelToken()
    try:
        if turn.ahead:
            yield _line({"type": "waiting", "ahead": turn.ahead})
        async with turn.take(), aclosing(in_thread(desk.ask(wanted, cancel), cancel)) as events:
            async for event in events:
                yield _line(event)
    except Exception as error:  # noqa: BLE001 - the answer has begun: a fault is told in its stream
        yield _line({"type": "error", **_said(error)})
    finally:
        cancel.cancel()


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False, allow_nan=False).encode() + b"\n"


async def _wanted(request: Request, kind: type[B]) -> B:
    try:
        return kind.model_validate_json(await request.body())
    except ValidationError as error:
        raise RequestError(error) from error


class RequestError(KVRouteError):
    """A request that is none, in the words of the page."""

    def __init__(self, error: ValidationError) -> None:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(p) for p in first["loc"]) or "the request"
        said = {"string_pattern_mismatch": "there is no text in it", "string_too_short": "it is empty"}
        super().__init__(f"{field}: {said.get(first['type'], first['msg'])}.")


async def _refused(_: Request, error: Exception) -> Response:
    status = 503 if isinstance(error, BusyError) else 400
    return JSONResponse(_said(error), status_code=status)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse(_said(error), status_code=500)


def _said(error: Exception) -> dict[str, str | None]:
    if isinstance(error, KVRouteError):
        return {"message": error.message, "hint": error.hint}
    logger.error("The page's server failed.", exc_info=error)
    return {
        "message": f"Something went wrong here: {type(error).__name__}.",
        "hint": "The terminal that runs kvroute ui says more.",
    }
