"""OpenAI's JSON with kvroute's results in it: what a request's body asks, and the result put into an answer's.

Pure functions on bytes and dicts, for :mod:`kvroute.serving.middleware`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvroute.serving.answers import PENDING, Result
from kvroute.serving.asks import KEY

Kind = Literal["chat", "completion"]
CHOICES: Final = "choices"
"""In a result of several: one result a choice, in the choices' order."""
_NOTHING: Final[tuple[object, ...]] = (None, False, [], {})


@dataclass(frozen=True, slots=True)
class Call:
    """A request that asks something of kvroute.

    Attributes:
        prompts: in it.
        each: samples of each prompt (``n``).
        beams: whether it is a beam search, of which vLLM tells connectors nothing.
        given: whether the prompt ends with an answer, whose tokens are counted with those that are written.
    """

    prompts: int = 1
    each: int = 1
    beams: bool = False
    given: bool = False

    @property
    def choices(self) -> list[tuple[int, int]]:
        """(prompt, sample) of every choice, in the order of their indexes."""
        return [(prompt, sample) for prompt in range(self.prompts) for sample in range(self.each)]


def read_call(body: bytes, kind: Kind, *, always: bool) -> Call | None:
    """What a request's body asks; None where that is nothing, or the body is none that the server takes.

    Args:
        body: as it came.
        kind: which of OpenAI's requests.
        always: requests that say nothing get the server's default ask.
    """
    if not always and KEY.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    params = request.get("kv_transfer_params")
    asked = params.get(KEY) if isinstance(params, dict) else None
    if not always and asked is None:
        return None
    if isinstance(asked, dict) and all(value in _NOTHING for value in asked.values()):
        return None
    each = request.get("n")
    return Call(
        prompts=_prompts(request.get("prompt")) if kind == "completion" else 1,
        each=each if type(each) is int and each > 0 else 1,
        beams=bool(request.get("use_beam_search")),
        given=isinstance(asked, dict) and asked.get("answer_from") is not None,
    )


def _prompts(prompt: object) -> int:
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    return len(prompt) if isinstance(prompt, list) and several else 1


def ids_of(kind: Kind, request: str, prompts: int) -> list[str]:
    """The ids that vLLM gives to the prompts of a request with this ``X-Request-Id``."""
    return [f"chatcmpl-{request}"] if kind == "chat" else [f"cmpl-{request}-{i}" for i in range(prompts)]


def stops_of(body: Mapping[str, Any]) -> set[int]:
    """Indexes of an answer's choices that ended at a stop string: only then ``stop_reason`` is a text."""
    choices = body.get("choices")
    return {
        choice.get("index", 0)
        for choice in (choices if isinstance(choices, list) else ())
        if isinstance(choice, dict) and isinstance(choice.get("stop_reason"), str)
    }


def with_results(
    body: dict[str, Any],
    call: Call,
    results: Mapping[tuple[int, int], Mapping[str, Any]],
    why: str,
    stopped: frozenset[int] | set[int] = frozenset(),
) -> dict[str, Any]:
    """An answer, or the last chunk of a stream, with the results of its choices.

    ``kv_transfer_params["kvroute"]`` is the result of choice 0. Where there are several choices, it also has
    ``"choices"``: all results, in the choices' order. Keys of other connectors stay.

    Args:
        body: the answer's JSON; changed in place.
        call: what was asked.
        results: by (prompt, sample).
        why: the reason given where one is missing.
        stopped: indexes of choices that ended at a stop string.
    """
    params = body.get("kv_transfer_params")
    params = dict(params) if isinstance(params, dict) else {}
    own = params.get(KEY)
    several = len(call.choices) > 1
    known = not several and not call.given
    found: list[dict[str, Any]] = []
    for index, place in enumerate(call.choices):
        result = results.get(place)
        if result is None and not several and isinstance(own, dict) and PENDING not in own:
            result = own  # vLLM brought it itself
        if result is None:
            found.append(Result(error=why).to_dict())
            continue
        result = dict(result)
        if index in stopped and isinstance(result.get("tokens"), dict):
            result["tokens"] = {**result["tokens"], "behind_stop": _behind(body, result["tokens"], known)}
        found.append(result)
    params[KEY] = {**found[0], CHOICES: found} if several else found[0]
    body["kv_transfer_params"] = params
    return body


def _behind(body: Mapping[str, Any], tokens: Mapping[str, Any], known: bool) -> int | None:
    """Tokens of an answer behind its stop string; None where they can't be told apart."""
    usage = body.get("usage")
    written = usage.get("completion_tokens") if isinstance(usage, dict) else None
    answer = tokens.get("answer")
    if not known or not isinstance(written, int) or not isinstance(answer, int):
        return None
    return max(0, answer - written)


def headers_of(result: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """``x-kvroute-*`` headers: what is known of difficulty, mode and confidence."""
    decision, confidence = result.get("decision"), result.get("confidence")
    found: dict[str, Any] = {}
    if isinstance(decision, dict):
        found = {"difficulty": decision.get("difficulty"), "mode": decision.get("final_mode")}
    if isinstance(confidence, dict):
        found["confidence"] = confidence.get("value")
    headers = []
    for name, value in found.items():
        text = f"{value:.4g}" if isinstance(value, int | float) else value
        if isinstance(text, str) and text.isascii() and text.isprintable():
            headers.append((f"x-kvroute-{name}".encode(), text.encode()))
    return headers


def dumped(body: Mapping[str, Any]) -> bytes:
    """JSON as OpenAI's servers write it."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which can only be written as an escape
        return json.dumps(body, separators=(",", ":")).encode()
