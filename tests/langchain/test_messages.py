"""LangChain's messages as chat templates take them."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from kvroute import InvalidInputError
from langchain_kvroute.messages import template_messages, with_instruction

CALL: dict[str, Any] = {"name": "add", "args": {"a": 1}, "id": "call_1", "type": "tool_call"}


def test_each_kind() -> None:
    found = template_messages(
        [
            SystemMessage("be brief"),
            HumanMessage("hi", name="ann"),
            AIMessage("let me see", tool_calls=[CALL], additional_kwargs={"reasoning_content": "hm"}),
            ToolMessage("2", tool_call_id="call_1", name="add"),
            ChatMessage(role="developer", content="x"),
        ]
    )
    function = {"name": "add", "arguments": {"a": 1}}
    assert found == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi", "name": "ann"},
        {
            "role": "assistant",
            "content": "let me see",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "id": "call_1", "function": function}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1", "name": "add"},
        {"role": "developer", "content": "x"},
    ]


def test_servers_get_arguments_as_text() -> None:
    [found] = template_messages([AIMessage("", tool_calls=[CALL])], arguments_as_text=True)
    assert found["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


def test_blocks_of_text_are_joined_and_what_is_said_twice_is_left_out() -> None:
    blocks: list[Any] = [
        {"type": "reasoning", "reasoning": "first think"},
        {"type": "text", "text": "one "},
        "two",
        {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
    ]
    [found] = template_messages([AIMessage(blocks, tool_calls=[CALL])])
    assert found["content"] == "one two"
    assert found["reasoning_content"] == "first think"
    assert len(found["tool_calls"]) == 1


def test_a_malformed_call_is_shown_as_it_was_written() -> None:
    call = {"name": None, "args": "<tool_call>{oh", "id": "x", "error": None, "type": "invalid_tool_call"}
    [found] = template_messages([AIMessage("so:", invalid_tool_calls=[call])])
    assert found["content"] == "so:\n<tool_call>{oh"


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (HumanMessage([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]), "image_url"),
        (HumanMessage([{"type": "image", "url": "http://x"}]), "'image'"),
        (ToolMessage([{"type": "file", "base64": "QQ=="}], tool_call_id="1"), "'file'"),
        (FunctionMessage("x", name="f"), "FunctionMessage"),
    ],
)  # fmt: skip
def test_what_no_text_model_reads_is_refused(message: BaseMessage, says: str) -> None:
    with pytest.raises(InvalidInputError, match=f"Message 1.*{says}"):
        template_messages([HumanMessage("hi"), message])


def test_no_message_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no message"):
        template_messages([])


def test_an_instruction_joins_the_system_message() -> None:
    asked = [HumanMessage("hi")]
    assert with_instruction(asked, "JSON.") == [SystemMessage("JSON."), *asked]
    assert with_instruction([SystemMessage("A."), *asked], "JSON.") == [SystemMessage("A.\n\nJSON."), *asked]
