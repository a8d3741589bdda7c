"""What an endpoint of ours asks of ``/v1/completions``: one token behind a prompt, for the sake of its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from kvroute.errors import InvalidInputError
from kvroute.serving.answers import Result, Vector
from kvroute.serving.asgi import ApiError, Exchange
from kvroute.serving.asks import KEY

_MISSING: Final = (
    "kvroute does not run in this server's engine. Start it with --kv-transfer-config "
    '\'{"kv_connector":"KVRouteConnector","kv_role":"kv_producer"}\'.'
)


@dataclass(frozen=True, slots=True)
class Read:
    """What one prompt gave.

    Attributes:
        result: kvroute's.
        prompt: its tokens.
        cached: of those, taken from the prefix cache.
        model: as the server names it.
    """

    result: Result
    prompt: int
    cached: int
    model: str

    def vector(self, name: str, where: str = "") -> Vector:
        """A feature ``[dim]`` float32.

        Raises:
            ApiError: it is missing, with the reason.
        """
        found = self.result.features.get(name)
        if found is None:
            raise ApiError(f"{where}{' '.join(self.result.faults) or 'The vector is missing.'}", 500)
        return np.asarray(found, dtype=np.float32)


async def read_prompt(
    exchange: Exchange, prompt: str | Sequence[int], ask: Mapping[str, Any], *, model: object, where: str = ""
) -> Read:
    """Have the engine read a prompt; one token is written, which vLLM can't do without.

    Args:
        exchange: the request that this is for.
        prompt: a text, or tokens.
        ask: what is asked of kvroute.
        model: as the client named it, checked by the server; None takes its own.
        where: put before an error's text.

    Raises:
        ApiError: the server refuses the prompt, or kvroute the ask.
    """
    body: dict[str, Any] = {
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": 1,
        "temperature": 0.0,
        "kv_transfer_params": {KEY: dict(ask)},
    }
    if model is not None:
        body["model"] = model
    found = await exchange.post("/v1/completions", body, where)
    said = (found.get("kv_transfer_params") or {}).get(KEY)
    if not isinstance(said, Mapping):
        raise ApiError(_MISSING, 501)
    try:
        result = Result.from_dict(said)
    except InvalidInputError as error:
        raise ApiError(f"{where}{error.message}", 500) from error
    if result.error is not None:
        raise ApiError(where + result.error)
    usage = found.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Read(
        result, int(usage.get("prompt_tokens") or 0), int(details.get("cached_tokens") or 0), str(found.get("model"))
    )
