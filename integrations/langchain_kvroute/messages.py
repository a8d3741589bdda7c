"""LangChain's messages to those of chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from kvroute import InvalidInputError

_ELSEWHERE = ("tool_use", "tool_call", "tool_call_chunk", "invalid_tool_call", "input_json_delta", "function_call")
"""Blocks of an answer that say again what its tool calls say."""
_THOUGHTS = ("reasoning", "thinking", "redacted_thinking", "reasoning_content")


def template_messages(messages: Sequence[BaseMessage], *, arguments_as_text: bool = False) -> list[dict[str, Any]]:
    """A chat in the form that templates take: OpenAI's, with tool calls' arguments as objects.

    Args:
        messages: the chat.
        arguments_as_text: write the arguments as JSON texts, as OpenAI's servers want them.

    Raises:
        InvalidInputError: there is none, or one holds what a text model can't read.
    """
    if not messages:
        raise InvalidInputError("There is no message to answer.")
    return [_message(i, message, arguments_as_text) for i, message in enumerate(messages)]


def with_instruction(messages: Sequence[BaseMessage], instruction: str) -> list[BaseMessage]:
    """A chat with something more in its system message."""
    if messages and isinstance(messages[0], SystemMessage):
        text = _text(0, messages[0])
        return [SystemMessage(f"{text}\n\n{instruction}" if text else instruction), *messages[1:]]
    return [SystemMessage(instruction), *messages]


def _message(index: int, message: BaseMessage, arguments_as_text: bool) -> dict[str, Any]:
    text = _text(index, message)
    if isinstance(message, SystemMessage):
        return {"role": "system", "content": text}
    if isinstance(message, HumanMessage):
        return {"role": "user", "content": text} | ({"name": message.name} if message.name else {})
    if isinstance(message, ToolMessage):
        found = {"role": "tool", "content": text, "tool_call_id": message.tool_call_id}
        return found | ({"name": message.name} if message.name else {})
    if isinstance(message, AIMessage):
        return _answer(message, text, arguments_as_text)
    if isinstance(message, ChatMessage):
        return {"role": message.role, "content": text}
    raise InvalidInputError(
        f"Message {index} is a {type(message).__name__}, which no chat template takes.",
        hint="Use system, human, AI and tool messages.",
    )


def _answer(message: AIMessage, text: str, arguments_as_text: bool) -> dict[str, Any]:
    for call in message.invalid_tool_calls:  # as it was written
        text = "\n".join(part for part in (text, call["args"]) if part)
    found: dict[str, Any] = {"role": "assistant", "content": text}
    thought = message.additional_kwargs.get("reasoning_content") or _thought(message)
    if thought:
        found["reasoning_content"] = thought
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                "id": call["id"],
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["args"], ensure_ascii=False) if arguments_as_text else call["args"],
                },
            }
            for call in message.tool_calls
        ]
    return found


def _thought(message: AIMessage) -> str:
    """A thought among the blocks of an answer."""
    blocks = message.content if isinstance(message.content, list) else []
    return "\n\n".join(
        block["reasoning"]
        for block in blocks
        if isinstance(block, dict) and block.get("type") == "reasoning" and isinstance(block.get("reasoning"), str)
    )


def _text(index: int, message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    parts = []
    for block in message.content:
        if isinstance(block, str):
            parts.append(block)
        elif isinstance(block, Mapping) and isinstance(block.get("text"), str):
            parts.append(block["text"])
        else:
            kind = block.get("type") if isinstance(block, Mapping) else type(block).__name__
            if isinstance(message, AIMessage) and kind in (*_ELSEWHERE, *_THOUGHTS):
                continue
            raise InvalidInputError(
                f"Message {index} holds {kind!r}, and kvroute's models read text alone.",
                hint="Put what it says into words, or leave it out.",
            )
    return "".join(parts)
