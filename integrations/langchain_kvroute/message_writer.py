"""Writes an AI message from an engine's text, in pieces or at once: both give the same message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from langchain_core.messages import AIMessage, AIMessageChunk, UsageMetadata
from langchain_core.messages.ai import InputTokenDetails, OutputTokenDetails

from kvroute import Generation, KVRouteError, Routed
from langchain_kvroute.asking import Answer, Asked, Chunk, confidence_of
from langchain_kvroute.metadata import KEY, KVRouteMetadata, of_generation, of_routed
from langchain_kvroute.thoughts import ThoughtReader
from langchain_kvroute.tool_calls import ToolCallReader

if TYPE_CHECKING:
    from langchain_core.messages import ToolCallChunk

PROVIDER = "kvroute"
_marks: WeakKeyDictionary[Any, dict[tuple[str, str], tuple[list[int], list[int]]]] = WeakKeyDictionary()
"""By engine the tokens that open and close a thought."""


class MessageWriter:
    """One message.

    Args:
        asked: what was asked.
        model_name: for ``response_metadata``.
    """

    def __init__(self, asked: Asked, model_name: str) -> None:
        self._asked = asked
        self._model_name = model_name
        self._thoughts: ThoughtReader | None = None
        self._calls = ToolCallReader() if asked.reads_calls else None
        self._begun = False
        self._inside = False

    # ------------------------------------------------------------------ at once, in pieces

    def whole(self, answer: Answer) -> AIMessage:
        """The message of an answer that is there."""
        inside = self._asked.inside
        if isinstance(answer, Routed):
            inside = answer.decision.mode == "slow"
        pieces = [*self._push(answer.text, inside=inside), *self._finish(answer)]
        chunk = pieces[0]
        for piece in pieces[1:]:
            chunk = chunk + piece
        return AIMessage(
            content=chunk.content,
            additional_kwargs=chunk.additional_kwargs,
            response_metadata=chunk.response_metadata,
            tool_calls=chunk.tool_calls,
            invalid_tool_calls=chunk.invalid_tool_calls,
            usage_metadata=chunk.usage_metadata,
        )

    def pieces(self, chunk: Chunk) -> list[AIMessageChunk]:
        """What a piece of the engine's adds to the message."""
        phase = getattr(chunk, "phase", None)
        found = self._push(chunk.text, inside=self._asked.inside if phase is None else phase == "thought")
        answer: Answer | None = getattr(chunk, "routed", None) or getattr(chunk, "generation", None)
        return found if answer is None else [*found, *self._finish(answer)]

    # ------------------------------------------------------------------ parts

    def _begin(self, inside: bool) -> list[AIMessageChunk]:
        asked = self._asked
        self._begun = True
        thinking = asked.thinking
        if thinking is not None and thinking.close:
            self._inside = inside and not asked.opening
            opening = thinking.enter.strip()
            self._thoughts = ThoughtReader(opening, thinking.close.strip(), thinking=self._inside, hold=asked.hold)
        return self._told(asked.opening) if asked.opening else []

    def _push(self, text: str, *, inside: bool) -> list[AIMessageChunk]:
        begun = [] if self._begun else self._begin(inside)
        return [*begun, *self._told(text)]

    def _told(self, text: str) -> list[AIMessageChunk]:
        if self._thoughts is None:
            return self._answered([text])
        told = self._thoughts.push(text)
        return [
            *_thought("".join(t for p, t in told if p == "thought")),
            *self._answered([t for p, t in told if p == "answer"]),
        ]

    def _answered(self, texts: list[str], *, last: bool = False) -> list[AIMessageChunk]:
        if self._calls is None:
            text = "".join(texts)
            return [AIMessageChunk(content=text)] if text else []
        found: list[str | ToolCallChunk] = [part for text in texts for part in self._calls.push(text)]
        if last:
            found += self._calls.finish()
        text = "".join(part for part in found if isinstance(part, str))
        calls = [part for part in found if not isinstance(part, str)]
        return [AIMessageChunk(content=text, tool_call_chunks=calls)] if text or calls else []

    def _finish(self, answer: Answer) -> list[AIMessageChunk]:
        told = [] if self._thoughts is None else self._thoughts.finish()
        pieces = _thought("".join(t for p, t in told if p == "thought"))
        pieces += self._answered([t for p, t in told if p == "answer"], last=True)
        return [*pieces, self._last(answer)]

    def _last(self, answer: Answer) -> AIMessageChunk:
        generation = answer.generation if isinstance(answer, Routed) else answer
        thought = thought_tokens(self._asked, generation, inside=self._inside) if self._thoughts is not None else None
        usage = generation.usage
        counted = UsageMetadata(
            input_tokens=usage.prompt,
            output_tokens=usage.generated,
            total_tokens=usage.prompt + usage.generated,
            input_token_details=InputTokenDetails(cache_read=usage.cached),
        )
        if thought is not None:
            counted["output_token_details"] = OutputTokenDetails(reasoning=thought)
        return AIMessageChunk(
            content="",
            response_metadata={
                "model_name": self._model_name,
                "model_provider": PROVIDER,
                "finish_reason": generation.finish_reason,
                KEY: self._metadata(answer, thought),
            },
            usage_metadata=counted,
            chunk_position="last",
        )

    def _metadata(self, answer: Answer, thought: int | None) -> KVRouteMetadata:
        asked = self._asked
        if isinstance(answer, Routed):
            found = of_routed(answer)
        else:
            plain, confidence, reason = confidence_of(asked.head, answer)
            found = of_generation(plain)
            found["confidence"], found["confidence_reason"] = confidence, reason
        if asked.taken is not None:
            found["difficulty"], found["decision"] = asked.taken.difficulty, asked.taken.to_dict()
        if thought is not None:
            found["tokens"]["thought"] = thought
        return found


def _thought(text: str) -> list[AIMessageChunk]:
    return [AIMessageChunk(content="", additional_kwargs={"reasoning_content": text})] if text else []


def thought_tokens(asked: Asked, generation: Generation, *, inside: bool) -> int | None:
    """How many of an answer's tokens belong to thoughts, with the marks that end them; None where it can't be told."""
    thinking = asked.thinking
    if thinking is None or not thinking.close:
        return None
    marks = (thinking.enter.strip(), thinking.close.strip())
    known = _marks.setdefault(asked.engine, {})
    if marks not in known:  # tokenizing them takes longer than all else here
        try:
            opening, closing = asked.engine.tokenize_texts(list(marks), special_tokens=False)
        except KVRouteError:
            return None
        known[marks] = (opening, closing)
    opening, closing = known[marks]
    if len(opening) != 1 or len(closing) != 1:
        return None
    count = 0
    for token in generation.token_ids:
        if not inside and token == opening[0]:
            inside = True
        count += inside
        if inside and token == closing[0]:
            inside = False
    return count
