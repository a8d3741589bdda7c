"""From a call of the chat model to the engine or its router, and back."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

from kvroute import (
    AnswerPooling,
    CancelToken,
    Decide,
    Decision,
    DifficultyHead,
    Generation,
    GenerationChunk,
    KVRouteError,
    Routed,
    RoutedChunk,
    Router,
    SamplingOptions,
    ThinkingMode,
    TokenIds,
)

CONFIDENCE = "kvroute:confidence"
Answer = Routed | Generation
Chunk = RoutedChunk | GenerationChunk
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, ready for the engine.

    Attributes:
        prompt: messages or tokens.
        options: how to write.
        features: what else to give.
        router: that decides, or None.
        mode: that is demanded of it.
        template: variables of the chat template, where the router writes the prompt.
        prefix: a cache to go on from, or None.
        opening: text that stands in the prompt already and belongs to the answer.
        thinking: how the model thinks, or None where thought and answer are not told apart.
        inside: whether the answer begins inside a thought, where no router says.
        reads_calls: whether tool calls are read.
        taken: the decision of a router before this model, whose mode this is.
        head: tells a confidence where no router does; or the name of the engine's that does.
    """

    engine: Any
    prompt: Any
    options: SamplingOptions
    features: Any = None
    router: Router | None = None
    mode: str | None = None
    template: Mapping[str, Any] | None = None
    prefix: Any = None
    opening: str = ""
    thinking: ThinkingMode | None = None
    inside: bool = False
    hold: bool = False
    reads_calls: bool = False
    taken: Decision | None = None
    head: DifficultyHead | str | None = None

    def fits(self, other: Asked) -> bool:
        """Whether both can be asked in one call of the engine."""
        return (
            self.engine is other.engine
            and self.router is other.router
            and self.prefix is other.prefix
            and self.options == other.options
            and self.features == other.features
            and self.template == other.template
            and (self.head is other.head or (isinstance(self.head, str) and self.head == other.head))
        )

    def _how(self, asked: Sequence[Asked], cancel: CancelToken) -> dict[str, Any]:
        how: dict[str, Any] = {"options": self.options, "features": self.features, "cancel": cancel}
        if self.prefix is not None:
            how["prefix"] = self.prefix
        if self.router is not None:
            return {**how, "mode": [a.mode for a in asked], "template": self.template}
        if isinstance(self.head, str):
            how["decide"] = Decide(confidence=self.head)
        elif self.head is not None:
            how["features"] = {**_by_name(self.features), CONFIDENCE: AnswerPooling(self.head.spec)}
        return how

    @property
    def _asks(self) -> Any:
        return self.engine if self.router is None else self.router


def _by_name(features: Any) -> dict[str, Any]:
    if features is None:
        return {}
    if isinstance(features, Mapping):
        return dict(features)
    listed = [features] if isinstance(features, str) or not isinstance(features, Sequence) else features
    return {f if isinstance(f, str) else f"feature {i}": f for i, f in enumerate(listed)}


# ---------------------------------------------------------------------- whole answers


def generate(asked: Sequence[Asked], cancel: CancelToken | None = None) -> list[Answer]:
    """Answers to prompts that fit together, in one call.

    Raises:
        As the engine's or the router's ``generate``.
    """
    first = asked[0]
    how = first._how(asked, cancel or CancelToken())
    found: list[Answer] = first._asks.generate([a.prompt for a in asked], progress=False, **how)
    return found


async def agenerate(asked: Asked) -> Answer:
    """:func:`generate` for one, without blocking the event loop. Cancelling the task ends the work."""
    cancel = CancelToken()
    if asked.router is None:
        [found] = await asked.engine.agenerate([asked.prompt], **asked._how([asked], cancel))
        answer: Answer = found
        return answer
    try:
        return (await in_pool(lambda: generate([asked], cancel), wide=bool(asked.router.served)))[0]
    except asyncio.CancelledError:
        cancel.cancel()
        raise


async def in_pool(work: Callable[[], T], *, wide: bool) -> T:
    """Work in a thread. A server's answers are waited for in as many threads as it may have requests (``wide``); what
    computes here, in the few of asyncio's own."""
    pool = _waiting() if wide else None
    context = copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work))


@cache
def _waiting() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(128, thread_name_prefix="kvroute-langchain")


# ---------------------------------------------------------------------- piece by piece


def stream(asked: Asked) -> Generator[Chunk]:
    """An answer piece by piece. Closing the iterator ends the work."""
    with contextlib.closing(asked._asks.stream([asked.prompt], **asked._how([asked], CancelToken()))) as chunks:
        yield from chunks


async def astream(asked: Asked) -> AsyncGenerator[Chunk]:
    """:func:`stream` without blocking the event loop. Leaving it or cancelling the task ends the work."""
    cancel = CancelToken()
    async with contextlib.aclosing(asked._asks.astream([asked.prompt], **asked._how([asked], cancel))) as chunks:
        async for chunk in chunks:
            yield chunk


# ---------------------------------------------------------------------- what came back


def confidence_of(
    head: DifficultyHead | str | None, generation: Generation
) -> tuple[Generation, float | None, str | None]:
    """An answer without the vector that its confidence was read from; the confidence in [0, 1], or None and why."""
    if head is None:
        return generation, None, "no confidence head was given"
    if isinstance(head, str):
        told = None if generation.served is None else generation.served.confidence
        return (generation, None, "the engine told none") if told is None else (generation, told.value, told.reason)
    features, errors = dict(generation.features), dict(generation.feature_errors)
    vector, reason = features.pop(CONFIDENCE, None), errors.pop(CONFIDENCE, "the answer has no features")
    plain = replace(generation, features=features, feature_errors=errors)
    if vector is None:
        return plain, None, reason
    try:
        confidence = float(head.predict(vector[None])[0])
    except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
        return plain, None, str(error) if isinstance(error, KVRouteError) else type(error).__name__
    return (plain, confidence, None) if math.isfinite(confidence) else (plain, None, "the head gave NaN or infinity")


def prompt_of(engine: Any, text: str) -> TokenIds:
    """A rendered chat as tokens."""
    return TokenIds(tuple(engine.tokenize_texts([text], special_tokens=False)[0]))
