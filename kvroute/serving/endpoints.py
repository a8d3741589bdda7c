"""kvroute's own routes on a vLLM server: an ASGI middleware that ``--middleware`` loads.

    POST /v1/embeddings      embeddings from the instance that generates, as OpenAI defines them
    POST /v1/kvroute/score   scores of answers that exist
    GET  /v1/kvroute/info    what the server runs

Everything else passes through. vLLM's endpoint plugins would do the same; but they need ``VLLM_PLUGINS``, which turns
all other plugins off that it does not name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Any

from kvroute.errors import KVRouteError
from kvroute.serving.about import PATH, ServerAbout
from kvroute.serving.asgi import ApiError, App, Exchange, Receive, Scope, Send
from kvroute.serving.embeddings import embeddings
from kvroute.serving.scoring import scoring

_log = logging.getLogger(__name__)


class KVRouteEndpoints:
    """Answers kvroute's routes; all others go to the server.

    Args:
        app: the server's own routes.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._about = ServerAbout()
        self._routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[dict[str, Any]]]] = {
            ("POST", "/v1/embeddings"): embeddings,
            ("POST", "/v1/kvroute/score"): scoring,
            ("GET", PATH): self._info,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = self._routes.get((scope["method"], path))
        if route is None or _pools(scope):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(self._app, scope, receive, send)
        try:
            await exchange.admitted()
            body, status = await route(exchange), 200
        except ApiError as error:
            body, status = error.body, error.status
        except KVRouteError as error:
            refused = ApiError.of(error)
            body, status = refused.body, refused.status
        except Exception:  # noqa: BLE001 - the client is told, and the server goes on
            _log.exception("kvroute's route %s failed.", path)
            failed = ApiError("kvroute failed at this request; the server's log says more.", 500)
            body, status = failed.body, failed.status
        await exchange.answer(body, status)

    async def _info(self, exchange: Exchange) -> dict[str, Any]:
        state = _state(exchange.scope)
        served = getattr(getattr(state, "args", None), "served_model_name", None)
        name = served[0] if isinstance(served, list | tuple) and served else served
        # Without a name of its own a model is called by its folder, of which a client is told no path.
        name = name or PurePath(state.vllm_config.model_config.model).name
        found = await asyncio.to_thread(self._about.of, state.vllm_config, name)
        return found.to_dict()


def _state(scope: Scope) -> Any:
    return getattr(scope.get("app"), "state", None)


def _pools(scope: Scope) -> bool:
    """Whether the server is one for pooling models, which has embeddings of its own."""
    config = getattr(_state(scope), "vllm_config", None)
    return getattr(getattr(config, "model_config", None), "runner_type", "generate") == "pooling"
