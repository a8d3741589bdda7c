"""A chat model that says what it is told to, for paths that no real model takes on demand: faults, odd metadata."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import PrivateAttr

Says = Callable[[Sequence[BaseMessage], dict[str, Any]], AIMessage]


def said(text: str, confidence: float | None = None, *, reason: str | None = None, **more: Any) -> AIMessage:
    """An answer with kvroute's metadata."""
    about = {
        "difficulty": 12.5,
        "mode": "fast",
        "decision": None,
        "confidence": confidence,
        "confidence_reason": reason,
        "scores": {"length": {"value": 3.0, "reason": None}},
        "features": {},
        "tokens": {"prompt": 7, "cached": 0, "computed": 9, "answer": 3},
        "faults": [],
    }
    return AIMessage(text, response_metadata={"kvroute": about, "model_name": "scripted"}, **more)


class ScriptedChat(BaseChatModel):
    """Answers by a function of messages and bound keywords, or from a list; what is an exception is raised."""

    answers: Any
    seconds: float = 0.0
    _calls: list[dict[str, Any]] = PrivateAttr(default_factory=list)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The keywords of every call."""
        return self._calls

    @property
    def _llm_type(self) -> str:
        return "scripted"

    def bind_tools(self, tools: Any, *, tool_choice: Any = None, **kwargs: Any) -> Any:
        return self.bind(**kwargs)

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        with self._lock:
            self._calls.append(kwargs)
            found = self.answers(messages, kwargs) if callable(self.answers) else self.answers.pop(0)
        if isinstance(found, BaseException):
            raise found
        return ChatResult(generations=[ChatGeneration(message=found)])

    async def _agenerate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        await asyncio.sleep(self.seconds)
        return self._generate(messages, stop, **kwargs)


class StreamingChat(ScriptedChat):
    """The same, in pieces; the last one carries the metadata."""

    def _stream(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        found = self._generate(messages, **kwargs).generations[0].message
        for word in str(found.text).split(" "):
            yield ChatGenerationChunk(message=AIMessageChunk(word + " "))
        yield ChatGenerationChunk(message=AIMessageChunk("", response_metadata=found.response_metadata))
