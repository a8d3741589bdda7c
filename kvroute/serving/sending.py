"""Requests to servers, in the event loop that holds the connections: sent again where none answered, and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from kvroute.errors import (
    ConnectorMissingError,
    InvalidInputError,
    ServerError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from kvroute.generation import Generation, Prompt, TokenIds
from kvroute.info import ModelInfo
from kvroute.serving.about import PATH, About
from kvroute.serving.jobs import Job
from kvroute.serving.link import Link, Writing
from kvroute.serving.servers import LostConnectionError, Server, Servers
from kvroute.serving.waiting import together
from kvroute.serving.wire import read_choices, read_completion, read_tokens, request_body

T = TypeVar("T")
_COMPLETIONS = "/v1/completions"
_CHECK = 30.0
"""Seconds for a server to say which models it has; then it counts as dead."""


class Sender(Link):
    """Sends jobs to servers. All methods are called in one event loop.

    Args:
        servers: who may take them.
        model: as the servers name it; None takes the first that one of them has, from then on.
        info: the model, if known: features must have its sizes.
        timeout: seconds until an answer, or the next piece of a stream.
        attempts: how often a request is sent at most.
        in_flight: requests at a time.
    """

    def __init__(
        self,
        servers: Servers,
        *,
        model: str | None,
        info: ModelInfo | None,
        timeout: float,
        attempts: int,
        in_flight: int,
    ) -> None:
        self.servers = servers
        self.model = model
        self._info = info
        self._timeout = timeout
        self._attempts = attempts
        self._slots = asyncio.Semaphore(in_flight)
        self._checking = asyncio.Lock()

    async def write(self, writing: Writing) -> Generation:
        """Write one answer."""

        async def send(server: Server, model: str) -> Generation:
            writing.again()
            body = request_body(writing.job, model=model, stream=writing.streamed)
            try:
                if writing.streamed:
                    await self._stream(writing, server, body)
                else:
                    writing.take(read_completion(await server.ask(_COMPLETIONS, body, within=self._timeout)))
                return self._whole(writing, server)
            except LostConnectionError as error:
                if writing.first is None:
                    raise
                server.failed()
                raise ServerUnreachableError(
                    f"{server.url} was lost in the middle of a stream: {error}",
                    hint="Ask again; generate() does so by itself.",
                ) from error

        return await self.send(send)

    async def _stream(self, writing: Writing, server: Server, body: dict[str, Any]) -> None:
        events = server.events(_COMPLETIONS, body, within=self._timeout)
        try:
            async for event in events:
                writing.take(read_completion(event))
        finally:
            await events.aclose()

    async def choose(self, job: Job) -> list[float]:
        """Log-probability that each of the job's ``choices`` comes next."""

        async def send(server: Server, model: str) -> list[float]:
            body = request_body(job, model=model, stream=False)
            return read_choices(await server.ask(_COMPLETIONS, body, within=self._timeout), job.choices)

        return await self.send(send)

    async def tokens(self, prompts: Sequence[Prompt], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts, and of chats with the turn opened, by a server."""
        return await together([self._tokens(prompt, special_tokens) for prompt in prompts])

    async def _tokens(self, prompt: Prompt, special_tokens: bool) -> list[int]:
        if isinstance(prompt, TokenIds):
            return list(prompt.ids)
        body: dict[str, Any]
        if isinstance(prompt, str):
            body = {"prompt": prompt, "add_special_tokens": special_tokens}
        else:
            body = {"messages": [dict(m) for m in prompt], "add_generation_prompt": True}

        async def send(server: Server, model: str) -> list[int]:
            return read_tokens(await server.ask("/tokenize", {"model": model, **body}, within=self._timeout))

        return await self.send(send)

    async def about(self) -> About:
        """What a server runs.

        Raises:
            InvalidInputError: it has no route for that.
        """

        async def send(server: Server, _: str) -> About:
            try:
                return About.from_dict(await server.ask(PATH, None, within=self._timeout))
            except ServerError as error:
                if error.status != 404:
                    raise
                raise InvalidInputError(
                    f"{server.url} does not say what its model is (layers, heads, fingerprint).",
                    hint="Start it with `kvroute serve`, or with --middleware "
                    "kvroute.serving.endpoints.KVRouteEndpoints; or pass "
                    "info=TransformersEngine.from_pretrained(MODEL).info.",
                ) from error

        return await self.send(send)

    async def named(self) -> str:
        """The model's name."""

        async def send(_: Server, model: str) -> str:
            return model

        return await self.send(send)

    async def send(self, work: Callable[[Server, str], Coroutine[Any, Any, T]]) -> T:
        """Do a request's work with a server and the model's name, again and elsewhere while it gets no answer.

        Raises:
            ServerUnreachableError: it never got one.
            whatever the work raises.
        """
        lost: LostConnectionError | None = None
        server: Server | None = None
        async with self._slots:
            for _ in range(self._attempts):
                server = await self.servers.next(avoid=server)
                with self.servers.taking(server):
                    try:
                        return await work(server, await self._checked(server))
                    except LostConnectionError as error:
                        lost = error
                        server.failed()
        assert server is not None
        others = f" and {len(self.servers.all) - 1} more" if len(self.servers.all) > 1 else ""
        raise ServerUnreachableError(
            f"{server.url}{others} can't be reached ({self._attempts} attempts; the last: {lost}).",
            hint="Is the server running, and is the address right? `curl URL/v1/models` shows it.",
        ) from lost

    async def leave(self) -> None:
        """Close all connections."""
        await self.servers.close()

    async def _checked(self, server: Server) -> str:
        if self.model is None or not server.checked:
            async with self._checking:
                if self.model is None or not server.checked:
                    try:
                        self.model = await server.check(self.model, within=min(self._timeout, _CHECK))
                    except ServerTimeoutError as error:
                        raise LostConnectionError("it does not say which models it has") from error
        return self.model

    def _whole(self, writing: Writing, server: Server) -> Generation:
        answer = writing.answer
        if answer.finish is None or answer.aborted:
            raise LostConnectionError("it gave the request up" if answer.aborted else "the answer has no end")
        if answer.extra is not None:
            server.connector = True
        elif writing.job.ask is not None and not server.connector:
            raise ConnectorMissingError(
                f"{server.url} gave an answer, and no features: kvroute does not run in it.",
                hint="Install kvroute in the server's environment and start it with --kv-transfer-config "
                '\'{"kv_connector":"KVRouteConnector","kv_role":"kv_producer"}\'.',
            )
        return writing.generation(info=self._info)
