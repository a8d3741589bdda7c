"""Whether a branch's chat model goes on from a decision's cache, and the prompt as that model will see it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable

from kvroute import EngineName
from langchain_kvroute.call_options import CallOptions
from langchain_kvroute.chat_model import ChatKVRoute
from langchain_kvroute.messages import template_messages, with_instruction
from langchain_kvroute.rendering import held
from langchain_kvroute.templates import has_tokenizer
from langchain_kvroute.tool_calls import ToolChoice


@dataclass(frozen=True, slots=True)
class View:
    """A prompt as a chat model sees it: the same tokens, so that the model can go on from them.

    Attributes:
        keep: whether a branch holds such a model, which a cache is to be kept for.
        instruction: what the model adds to the system message.
        template: variables of the chat template, such as ``tools``.
        arguments_as_text: how tool calls are written.
    """

    keep: bool = False
    instruction: str | None = None
    template: Mapping[str, Any] | None = None
    arguments_as_text: bool = False

    @classmethod
    def of(cls, branches: Iterable[Runnable[Any, Any]], engine: Any, name: EngineName | None) -> View:
        """The view of the first model in branches that runs on an engine.

        Args:
            branches: the default one first.
            engine: of the router.
            name: of that engine, where it was opened by name.
        """
        texts = not has_tokenizer(engine)
        for branch in branches:
            for node, bound in held(branch):
                if not isinstance(node, ChatKVRoute) or not _runs_on(node, engine, name):
                    continue
                rest = {key: value for key, value in bound.items() if key != "stop"}
                call = CallOptions.of(node, bound.get("stop"), rest)
                shown = call.tools if ToolChoice(call.tool_choice, call.tools).shown else None
                return cls(True, call.instruction, {"tools": shown} if shown else None, texts)
        return cls(arguments_as_text=texts)

    def prompt(self, given: str | Sequence[BaseMessage]) -> str | list[dict[str, Any]]:
        """A text, or messages in the form that the engine takes.

        Raises:
            InvalidInputError: a message holds what a text model can't read.
        """
        if isinstance(given, str):
            return given
        messages = given if self.instruction is None else with_instruction(given, self.instruction)
        return template_messages(messages, arguments_as_text=self.arguments_as_text)


def holds_chats(branches: Iterable[Runnable[Any, Any]]) -> bool:
    """Whether there is a chat model of kvroute's in branches, on whatever engine."""
    return any(isinstance(node, ChatKVRoute) for branch in branches for node, _ in held(branch))


def _runs_on(model: ChatKVRoute, engine: Any, name: EngineName | None) -> bool:
    """Whether it is on this engine. No other engine is opened to find out."""
    handle = model._state.handle
    known = handle.opened or (name is not None and handle.name == name)
    return known and handle.get() is engine
