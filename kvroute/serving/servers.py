"""Servers of one model behind one client: who takes the next request, and which are dead. Lives in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from kvroute.errors import (
    InvalidInputError,
    MissingExtraError,
    ModelMismatchError,
    ServerError,
    ServerTimeoutError,
)
from kvroute.serving.wire import read_models

if TYPE_CHECKING:
    import openai

_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds a dead server is left alone: at first, and at most."""
_SHOWN = 300


class LostConnectionError(Exception):
    """A request got no answer: it may be sent again. Never leaves the client."""


@dataclass(eq=False)
class Server:
    """One of them.

    Attributes:
        url: as it is shown, without user and password.
        client: talks to it.
        busy: requests in flight.
        checked: it has the model that is asked for.
        connector: kvroute was seen in an answer of it.
    """

    url: str
    client: openai.AsyncOpenAI
    secret: str | None = None
    busy: int = 0
    checked: bool = False
    connector: bool = False
    _pause: float = 0.0
    _until: float = 0.0

    @property
    def wait(self) -> float:
        """Seconds until it may be tried; 0 for one that is alive."""
        return max(0.0, self._until - time.monotonic())

    def failed(self) -> None:
        """It could not be reached: leave it alone for a while, longer each time."""
        if self.wait:
            return  # many requests lose the same connection
        self._pause = min(_LONGEST_PAUSE, self._pause * 2 or _PAUSE)
        self._until = time.monotonic() + self._pause
        self.checked = False  # another model may be behind the address when it is back

    def alive(self) -> None:
        """It answered."""
        self._pause = self._until = 0.0

    # ------------------------------------------------------------------ talk

    async def ask(self, path: str, body: dict[str, Any] | None, *, within: float) -> Any:
        """JSON for JSON: GET without a body, else POST.

        Args:
            path: from the server's root, e.g. ``/v1/models``.
            body: what is sent.
            within: seconds until the answer must be there.

        Raises:
            LostConnectionError: no answer came, or half of one.
            ServerError: the server refused, or took too long.
        """
        call = self.client.get if body is None else self.client.post
        how: dict[str, Any] = {} if body is None else {"body": body}
        try:
            async with asyncio.timeout(within):
                answer = await call(self._at(path), cast_to=object, **how)
        except TimeoutError as error:
            raise self._slow(within) from error
        except Exception as error:  # noqa: BLE001 - sorted there
            self._raise(error, within)
        self.alive()
        return answer

    async def events(self, path: str, body: dict[str, Any], *, within: float) -> AsyncGenerator[Any, None]:
        """JSON for a stream of JSON; closing the iterator closes the connection.

        Raises:
            as :meth:`ask`; ``within`` holds from one event to the next.
        """
        import openai

        try:
            stream: Any = await self.client.post(
                self._at(path), cast_to=object, body=body, stream=True, stream_cls=openai.AsyncStream[object]
            )
            try:
                async for event in stream:
                    self.alive()
                    yield event
            finally:
                await stream.close()
        except Exception as error:  # noqa: BLE001 - sorted there
            self._raise(error, within)

    async def check(self, model: str | None, within: float) -> str:
        """Ask which models it has; returns the one that is wanted, by default its first.

        Raises:
            ModelMismatchError: it has not that one.
            as :meth:`ask`.
        """
        models = read_models(await self.ask("/v1/models", None, within=within))
        chosen = next(iter(models)) if model is None else model
        if chosen not in models:
            listed = ", ".join(list(models)[:5])
            raise ModelMismatchError(
                f"{self.url} serves {listed}, not {chosen}.",
                hint="Start it with that model (or --served-model-name), or ask for one that it has with model=.",
            )
        self.checked = True
        return chosen

    def _at(self, path: str) -> str:
        return f"{str(self.client.base_url).rstrip('/').removesuffix('/v1')}{path}"

    def _slow(self, within: float) -> ServerTimeoutError:
        return ServerTimeoutError(
            f"{self.url} gave no answer for {within:g} seconds.",
            hint="Raise timeout=, lower max_tokens, or ask for fewer answers at a time.",
        )

    def _raise(self, error: Exception, within: float) -> NoReturn:
        """What went wrong, in our errors."""
        import openai

        if isinstance(error, openai.APITimeoutError) and type(error.__cause__).__name__ != "ConnectTimeout":
            raise self._slow(within) from error
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            raise LostConnectionError(self._clean(f"{type(cause).__name__}: {cause}")) from error
        if isinstance(error, openai.APIStatusError):
            self.alive()
            raise self._refused(error) from error
        if isinstance(error, openai.APIError):
            raise ServerError(f"{self.url} broke an answer off: {self._clean(error.message)}") from error
        if isinstance(error, ValueError):  # no JSON in the answer, or in an event of it
            raise ServerError(
                f"{self.url} answered with something that is no JSON.",
                hint="Give the address of a vLLM server, such as http://host:8000/v1.",
            ) from error
        raise error

    def _refused(self, error: openai.APIStatusError) -> Exception:
        status = error.status_code
        body = error.body if isinstance(error.body, dict) else {}
        text = self._clean(str(body.get("message") or error.message))
        what = f"{self.url} answered {status}: {text}"
        if status in (401, 403):
            return ServerError(what, hint="Give the server's key as api_key=.", status=status)
        if status == 404:
            return ServerError(what, hint="Is this a vLLM server, and does it still serve that model?", status=status)
        if status in (400, 422):
            return RefusedError(what, status=status)
        return ServerError(what, hint="The server's log says more. It was not asked again.", status=status)

    def _clean(self, text: str) -> str:
        """An error text of somebody else's, short and without the key."""
        bare = text.replace(self.secret, "***") if self.secret else text
        return bare if len(bare) <= _SHOWN else f"{bare[: _SHOWN - 3]}..."


class RefusedError(ServerError, InvalidInputError):
    """The server won't take the request as it is."""


class Servers:
    """All of them.

    Args:
        urls: their addresses, with or without ``/v1``.
        api_key: for all of them; None sends a key that means nothing.
        timeout: seconds between two pieces of an answer.
        connect_timeout: seconds until a connection is there.

    Raises:
        MissingExtraError: openai is not installed.
        InvalidInputError: an address is none.
    """

    def __init__(self, urls: Sequence[str], *, api_key: str | None, timeout: float, connect_timeout: float) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "vllm-client") from error
        self.all = [
            Server(
                shown_url(url),
                openai.AsyncOpenAI(
                    base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
                    # Without one given, openai would send the key of its own environment variable to whoever this is.
                    api_key=api_key or "EMPTY",
                    max_retries=0,
                    timeout=openai.Timeout(timeout, connect=connect_timeout),
                ),
                api_key,
            )
            for url in urls
        ]
        self._last = 0

    async def next(self, avoid: Server | None = None) -> Server:
        """The server with the fewest in flight; waits for the first that may be tried again where all are dead.

        Args:
            avoid: the one that just lost the request, taken only where there is no other.
        """
        others = [s for s in self.all if s is not avoid] or self.all
        ready = [s for s in others if not s.wait] or [s for s in self.all if not s.wait]
        if not ready:
            first = min(self.all, key=lambda s: s.wait)
            await asyncio.sleep(first.wait)
            ready = [first]
        self._last += 1  # equals take turns
        place = {id(s): (i - self._last) % len(self.all) for i, s in enumerate(self.all)}
        return min(ready, key=lambda s: (s.busy, place[id(s)]))

    @contextmanager
    def taking(self, server: Server) -> Iterator[None]:
        """Count a request as in flight."""
        server.busy += 1
        try:
            yield
        finally:
            server.busy -= 1

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(s.client.close() for s in self.all), return_exceptions=True)


def shown_url(url: str) -> str:
    """An address as it may be shown.

    Raises:
        InvalidInputError: it is none, or it holds a password.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except (ValueError, AttributeError) as error:
        raise InvalidInputError("A server's address can't be read.", hint=_ADDRESS) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidInputError("A server's address starts with http:// or https:// and names a host.", hint=_ADDRESS)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidInputError("A server's address holds no user, password or query.", hint="Give a key as api_key=.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


_ADDRESS = "It looks like http://host:8000/v1."
