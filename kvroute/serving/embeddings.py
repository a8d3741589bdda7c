"""``POST /v1/embeddings`` on the server that generates, as OpenAI defines it.

    {"model": "qwen3", "input": ["one text", "another"]}
    {"model": "qwen3:paper-mteb", "input": [[1, 2, 3]], "encoding_format": "base64"}
    {"model": "qwen3", "input": "a text", "kvroute": {"spec": {"layers": "last:2", "part": "v"}}}

How to pool stands behind the model's name (a preset) or in ``kvroute.spec`` (a preset or a
:class:`~kvroute.PoolingSpec`); by default it is ``best``. A text is read once, through the prefix cache.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from kvroute.errors import SpecError
from kvroute.pooling import PRESETS, PoolingSpec
from kvroute.serving.answers import Vector
from kvroute.serving.asgi import ApiError, Exchange
from kvroute.serving.completions import Read, read_prompt

MAX_INPUTS: Final = 2048
"""Texts of one request, as OpenAI has it."""
_DEFAULT, _NAME = "best", "embedding"


class _Wanted(BaseModel):
    model_config = ConfigDict(extra="forbid")

    spec: StrictStr | dict[str, Any] | None = None


class _Request(BaseModel):
    """Fields of OpenAI's that change nothing here are passed over."""

    model_config = ConfigDict(extra="ignore")

    model: StrictStr | None = None
    input: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    encoding_format: str = "float"
    dimensions: StrictInt | None = Field(default=None, ge=1)
    kvroute: _Wanted = Field(default_factory=_Wanted)

    @property
    def texts(self) -> list[str | list[int]]:
        """One entry a text."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [list(self.input)]
        return list(self.input)  # type: ignore[arg-type]


async def embeddings(exchange: Exchange) -> dict[str, Any]:
    """The answer's JSON.

    Raises:
        ApiError: anything that can't be done, naming the text.
    """
    request = _read(await exchange.body())
    model, spec = _spec(request)
    texts = request.texts
    if not texts or len(texts) > MAX_INPUTS:
        raise ApiError(f"Give 1 to {MAX_INPUTS} texts, not {len(texts)}.", param="input")
    for index, text in enumerate(texts):
        if not text:
            raise ApiError(f"Text {index} is empty: it has no token to read.", param="input")
    ask = {"features": {_NAME: {"of": "prompt", **spec.model_dump(mode="json", exclude_defaults=True)}}}
    where = [f"Text {i}: " if len(texts) > 1 else "" for i in range(len(texts))]
    works = [partial(read_prompt, exchange, t, ask, model=model, where=w) for t, w in zip(texts, where, strict=True)]
    reads: list[Read] = await exchange.unless_gone(exchange.each(works))
    vectors = [read.vector(_NAME, w) for read, w in zip(reads, where, strict=True)]
    if request.dimensions not in (None, len(vectors[0])):
        raise ApiError(
            f"The vectors have {len(vectors[0])} dimensions, and these can't be cut to {request.dimensions}. "
            "Choose another spec.",
            param="dimensions",
        )
    tokens = sum(read.prompt for read in reads)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _encoded(vector, request.encoding_format)}
            for i, vector in enumerate(vectors)
        ],
        "model": reads[0].model,
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": sum(read.cached for read in reads)},
        },
    }


def _read(body: dict[str, Any]) -> _Request:
    try:
        request = _Request.model_validate(body)
    except ValidationError as error:
        raise wrong(error, body) from error
    if request.encoding_format not in ("float", "base64"):
        raise ApiError("encoding_format is 'float' or 'base64'.", param="encoding_format")
    return request


def wrong(error: ValidationError, body: dict[str, Any]) -> ApiError:
    """What is wrong with a body, by its first fault; nothing of its values is repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else None
    if field is not None and field not in body:
        return ApiError(f"{field!r} is missing.", param=field)
    if field == "input":
        return ApiError("'input' is a text, a list of texts, or token ids of one or of several.", param=field)
    return ApiError(f"{'.'.join(map(str, first['loc'])) or 'The body'}: {first['msg']}.", param=field)


def _spec(request: _Request) -> tuple[str | None, PoolingSpec]:
    """The model's name for the server, and how to pool."""
    model, wanted = request.model, request.kvroute.spec
    name, colon, suffix = (model or "").rpartition(":")
    if colon and suffix in PRESETS:
        model = name or None
        if wanted is not None:
            raise ApiError("The model's name ends in a preset, and kvroute.spec is given too.", param="kvroute")
        wanted = suffix
    try:
        if wanted is None or isinstance(wanted, str):
            return model, PoolingSpec.preset(_DEFAULT if wanted is None else wanted)
        return model, PoolingSpec(**{str(k): v for k, v in wanted.items()})
    except SpecError as error:
        raise ApiError.of(error, param="kvroute") from error


def _encoded(vector: Vector, form: str) -> str | Sequence[float]:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    floats: list[float] = vector.tolist()
    return floats
