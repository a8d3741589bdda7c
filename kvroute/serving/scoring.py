"""``POST /v1/kvroute/score``: what the model's own cache says of answers that exist already.

    {"model": "qwen3", "items": [{"messages": [...], "answer": "Paris."}], "confidence": "right"}

A prompt is a text (``prompt``), token ids, or ``messages``; an answer is a text or its token ids as they stand.
``finish_reason`` of an item says whether a text was ended by the model (``stop``, the default) or cut (``length``).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from kvroute.scores import SCORES, family
from kvroute.serving.asgi import ApiError, Exchange
from kvroute.serving.completions import Read, read_prompt
from kvroute.serving.embeddings import wrong

MAX_ITEMS: Final = 256
_SERVED: Final = (*family("kv-coe"), *family("length"))
_FAMILIES: Final = {"kv-coe": family("kv-coe"), "length": family("length")}


class _Item(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: StrictStr | list[StrictInt] | None = None
    messages: list[dict[str, Any]] | None = None
    answer: StrictStr | list[StrictInt]
    finish_reason: Literal["stop", "length", "cancelled"] = "stop"


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: StrictStr | None = None
    items: list[_Item] = Field(min_length=1, max_length=MAX_ITEMS)
    scores: list[StrictStr] = Field(default_factory=lambda: ["kv-coe", "length"])
    confidence: StrictStr | None = None


async def scoring(exchange: Exchange) -> dict[str, Any]:
    """The answer's JSON: for each item ``scores`` by name and, where a head is named, ``confidence``; each with a value
    or the reason why there is none.

    Raises:
        ApiError: anything that can't be done, naming the item.
    """
    body = await exchange.body()
    try:
        request = _Request.model_validate(body)
    except ValidationError as error:
        raise wrong(error, body) from error
    names = _names(request.scores)
    works = [partial(_score, exchange, request, i) for i in range(len(request.items))]
    found: list[tuple[Read, int]] = await exchange.unless_gone(exchange.each(works))
    data = []
    for index, (read, length) in enumerate(found):
        said = read.result.to_dict()
        said["scores"]["length"] = {"value": float(length), "reason": None}
        missing = {"value": None, "reason": " ".join(said["faults"]) or "The server left it out."}
        scored: dict[str, Any] = {"object": "score", "index": index}
        scored["scores"] = {name: said["scores"].get(name, missing) for name in names}
        if request.confidence is not None:
            scored["confidence"] = said["confidence"] or missing
        data.append(scored)
    tokens = sum(read.prompt for read, _ in found)
    usage = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": sum(read.cached for read, _ in found)},
    }
    return {"object": "list", "data": data, "model": found[0][0].model, "usage": usage}


async def _score(exchange: Exchange, request: _Request, index: int) -> tuple[Read, int]:
    """What the engine says of an item, and the tokens of its answer."""
    item, where = request.items[index], f"Item {index}: "
    if (item.prompt is None) == (item.messages is None):
        raise ApiError(f"{where}Give 'prompt' or 'messages', one of the two.", param="items")
    model = {} if request.model is None else {"model": request.model}
    if item.messages is not None:
        asked: dict[str, Any] = {"messages": item.messages, "add_generation_prompt": True}
    else:
        asked = {"prompt": item.prompt, "add_special_tokens": True}
    if isinstance(item.prompt, list):
        prompt = item.prompt
    else:
        prompt = await _tokens(exchange, {**model, **asked}, where)
    if isinstance(item.answer, list):
        answer = item.answer
    else:
        answer = []
        if item.answer:
            answer = await _tokens(exchange, {**model, "prompt": item.answer, "add_special_tokens": False}, where)
    if not prompt or not answer:
        raise ApiError(f"{where}The {'answer' if prompt else 'prompt'} holds no token.", param="items")
    # An answer's last token has no keys and values while it is written: where the model ended a text, that is the end
    # token, which is not in the text.
    closed = isinstance(item.answer, str) and item.finish_reason == "stop"
    length = len(answer) + closed
    ask: dict[str, Any] = {"answer_from": len(prompt), "features": ["kv-coe"]}
    if request.confidence is not None:
        ask["confidence"] = request.confidence
    ids = [*prompt, *answer][: len(prompt) + length - 1]
    return await read_prompt(exchange, ids, ask, model=request.model, where=where), length


async def _tokens(exchange: Exchange, body: dict[str, Any], where: str) -> list[int]:
    found = (await exchange.post("/tokenize", body, where)).get("tokens")
    if not isinstance(found, list):
        raise ApiError(f"{where}The server gave no tokens.", 500)
    return found


def _names(scores: list[str]) -> tuple[str, ...]:
    names: list[str] = []
    for name in scores:
        if name in _FAMILIES:
            names += _FAMILIES[name]
        elif name in _SERVED:
            names.append(name)
        else:
            known = name in SCORES or name in {s.family for s in SCORES.values()}
            served = ", ".join((*_FAMILIES, *_SERVED))
            why = "needs more than a server's cache" if known else "is not known"
            raise ApiError(f"A score that was asked for {why}. Served are: {served}.", param="scores")
    return tuple(dict.fromkeys(names))
