"""Tools: what a chat template is given of them, and the calls that a model writes.

Calls are read in the form that Qwen's and Hermes' templates teach: ``<tool_call>{"name": ..., "arguments":
{...}}</tool_call>``, one or several, beside text or alone. Other forms are not read: such calls stay text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from langchain_core.messages import ToolCallChunk
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from kvroute import InvalidInputError
from langchain_kvroute.thoughts import begun_mark

OPENING, CLOSING = "<tool_call>", "</tool_call>"

Tool = dict[str, Any] | type | Callable[..., Any] | BaseTool


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates take them, in OpenAI's form."""
    return [convert_to_openai_tool(tool) for tool in tools]


class ToolChoice:
    """Which call is demanded.

    Args:
        choice: ``auto`` or None leaves it to the model, ``none`` shows it no tools, ``any``, ``required`` or True
            demands a call, a tool's name (or OpenAI's object with it) one of that tool.
        tools: that there are.

    Attributes:
        shown: whether the model is shown the tools.
        opening: what the answer has to begin with, or an empty text.

    Raises:
        InvalidInputError: a tool that there is not.
    """

    def __init__(self, choice: Any, tools: Sequence[Mapping[str, Any]]) -> None:
        names = [tool["function"]["name"] for tool in tools]
        if isinstance(choice, Mapping):
            choice = (choice.get("function") or {}).get("name", choice.get("type"))
        self.shown = bool(tools) and choice != "none"
        self.opening = ""
        if choice in (None, "auto", "none", False):
            return
        if choice in ("any", "required", True):
            choice = names[0] if len(names) == 1 else None
        elif choice not in names:
            raise InvalidInputError(
                f"tool_choice={choice!r} names no tool.", hint=f"There are auto, none, any, and {names}."
            )
        if not names:
            raise InvalidInputError("A tool call is demanded, and there are no tools.", hint="Bind tools first.")
        named = "" if choice is None else f'{choice}", "arguments":'
        self.opening = f'{OPENING}\n{{"name": "{named}'


class ToolCallReader:
    """Finds tool calls in an answer that comes in pieces. White space around a call is left out."""

    def __init__(self) -> None:
        self._text = ""
        self._blank = ""
        self._inside = False
        self._behind = False
        self._told = False
        self._count = 0

    def push(self, text: str) -> list[str | ToolCallChunk]:
        """Text and whole calls, as far as they can be told."""
        self._text += text
        found: list[str | ToolCallChunk] = []
        while True:
            mark = CLOSING if self._inside else OPENING
            at = self._text.find(mark)
            if at < 0:
                if not self._inside:
                    end = len(self._text) - begun_mark(self._text, mark)
                    self._tell(self._text[:end], found)
                    self._text = self._text[end:]
                return found
            written, self._text = self._text[:at], self._text[at + len(mark) :]
            if self._inside:
                found.append(self._call(written))
                self._behind = True
            else:
                self._tell(written, found)
                self._blank = ""
            self._inside = not self._inside

    def finish(self) -> list[str | ToolCallChunk]:
        """The answer has ended: its rest. A call that was not closed is none unless it is whole."""
        found: list[str | ToolCallChunk] = []
        if self._inside:
            found.append(self._call(self._text))
        else:
            self._tell(self._text, found)
            if self._blank and self._told and not self._behind:
                found.append(self._blank)
        self._text = ""
        return found

    def _tell(self, text: str, found: list[str | ToolCallChunk]) -> None:
        text = self._blank + text
        if self._behind:
            text = text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if shown:
            found.append(f"\n{shown}" if self._behind and self._told else shown)
            self._behind, self._told = False, True

    def _call(self, written: str) -> ToolCallChunk:
        name, arguments = parsed_call(written)
        self._count += 1
        return tool_call_chunk(name=name, args=arguments, id=f"call_{uuid4().hex}", index=self._count - 1)


def parsed_call(written: str) -> tuple[str | None, str]:
    """Name and arguments (as JSON) of a call; where it is malformed no name, and the text as it was written."""
    try:
        call = json.loads(written)
        name, arguments = call["name"], call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if isinstance(name, str) and name and isinstance(arguments, dict):
            return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    # With its mark it is no JSON at all: nobody completes it to a call that was not written.
    return None, f"{OPENING}{written}"
