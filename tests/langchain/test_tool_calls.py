"""Tool calls and thoughts read from text that comes in pieces, and what is demanded of a model."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk

from kvroute import InvalidInputError, TransformersEngine
from langchain_kvroute.templates import knows_tools
from langchain_kvroute.thoughts import ThoughtReader
from langchain_kvroute.tool_calls import ToolCallReader, ToolChoice, parsed_call, template_tools


def cut(text: str, rng: random.Random) -> list[str]:
    """A text in random pieces."""
    places = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 12))))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def thoughts(pieces: list[str], **how: Any) -> tuple[str, str]:
    reader = ThoughtReader("<think>", "</think>", **how)
    told = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    return tuple("".join(text for phase, text in told if phase == wanted) for wanted in ("thought", "answer"))


@pytest.mark.parametrize(
    ("text", "how", "thought", "answer"),
    [
        ("a\n</think>\n\nb c. ", {"thinking": True}, "a", "b c."),
        ("<think>\n a  b\n</think>\n\n b\n\nc\n", {"thinking": False}, "a  b", "b\n\nc"),
        (" b < c </thin", {"thinking": False}, "", "b < c </thin"),
        ("never closed <think", {"thinking": True}, "never closed <think", ""),
        ("</think>x", {"thinking": True}, "", "x"),
        ("<think>\n\n</think>\n\nx", {"thinking": False}, "", "x"),
        ("draft\n<think>\nno\n</think>\n\nit", {"thinking": False, "hold": True}, "no", "it"),
        ("draft\n<think>\nno\n</think>\n\nit", {"thinking": False}, "no", "draft\n\nit"),
        ("one</think>x<think>two</think>y", {"thinking": True}, "one\n\ntwo", "x\n\ny"),
        ("", {"thinking": False}, "", ""),
    ],
)  # fmt: skip
def test_thoughts_do_not_depend_on_the_cuts(text: str, how: dict[str, Any], thought: str, answer: str) -> None:
    assert thoughts([text], **how) == (thought, answer)
    assert thoughts(list(text), **how) == (thought, answer)
    rng = random.Random(1)
    for _ in range(50):
        assert thoughts(cut(text, rng), **how) == (thought, answer)


def test_a_held_answer_comes_at_its_end_and_a_thought_at_once() -> None:
    reader = ThoughtReader("<think>", "</think>", thinking=False, hold=True)
    assert reader.push("the answer is") == []
    assert reader.push(" <think> wait") == [("thought", "wait")]
    assert reader.push(" so</think>") == [("thought", " so")]
    assert reader.push("4.") == []
    assert reader.finish() == [("answer", "4.")]


def calls(pieces: list[str]) -> AIMessageChunk:
    reader = ToolCallReader()
    found = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    message = AIMessageChunk("")
    for part in found:
        message += (  # type: ignore[assignment]
            AIMessageChunk(part) if isinstance(part, str) else AIMessageChunk("", tool_call_chunks=[part])
        )
    return message


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "text": "</tool> é \\u00e9"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "names", "invalid"),
    [
        (CALL, "", ["add"], 0),
        (f"I add.\n{CALL}\n{CALL}", "I add.", ["add", "add"], 0),
        (f"{CALL}\nDone.", "Done.", ["add"], 0),
        (f"One \n{CALL}\n two.", "One\ntwo.", ["add"], 0),
        ('<tool_call>{"name": "now"}</tool_call>', "", ["now"], 0),
        ('<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", ["now"], 0),
        ('<tool_call>{"name": "now", "arguments": {}}', "", ["now"], 0),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "", [], 1),
        ("<tool_call>{'name': 'add'}</tool_call>", "", [], 1),
        ('<tool_call>{"arguments": {}}</tool_call>', "", [], 1),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "", [], 1),
        ("<tool_call>[]</tool_call>", "", [], 1),
        ("a <tool_ b </tool_call> ", "a <tool_ b </tool_call> ", [], 0),
        ("  plain \n", "  plain \n", [], 0),
    ],
)  # fmt: skip
def test_calls_do_not_depend_on_the_cuts(text: str, content: str, names: list[str], invalid: int) -> None:
    rng = random.Random(2)
    for pieces in ([text], list(text), *(cut(text, rng) for _ in range(50))):
        message = calls(pieces)
        assert message.content == content
        assert [call["name"] for call in message.tool_calls] == names
        assert len(message.invalid_tool_calls) == invalid
        assert len({call["id"] for call in message.tool_calls}) == len(names)


def test_a_malformed_call_keeps_its_text() -> None:
    [call] = calls(['<tool_call>{"name": "add", "arguments": {"a": 1']).invalid_tool_calls
    assert call["args"] == '<tool_call>{"name": "add", "arguments": {"a": 1'
    assert call["name"] is None


def test_arguments_come_through() -> None:
    name, arguments = parsed_call('{"name": "f", "arguments": {"x": "é", "n": [1, {"y": null}]}}')
    assert (name, json.loads(arguments)) == ("f", {"x": "é", "n": [1, {"y": None}]})


def test_tool_choice() -> None:
    def add(a: int) -> int:
        """Add."""
        return a

    def take(a: int) -> int:
        """Take."""
        return a

    one, two = template_tools([add]), template_tools([add, take])
    assert ToolChoice(None, two).shown
    assert not ToolChoice("none", two).shown
    assert ToolChoice("auto", two).opening == ""
    assert ToolChoice("any", one).opening == '<tool_call>\n{"name": "add", "arguments":'
    assert ToolChoice("any", two).opening == '<tool_call>\n{"name": "'
    assert ToolChoice(True, two).opening == '<tool_call>\n{"name": "'
    assert ToolChoice("take", two).opening == '<tool_call>\n{"name": "take", "arguments":'
    named = {"type": "function", "function": {"name": "take"}}
    assert ToolChoice(named, two).opening == ToolChoice("take", two).opening
    with pytest.raises(InvalidInputError, match="names no tool"):
        ToolChoice("divide", two)
    with pytest.raises(InvalidInputError, match="no tools"):
        ToolChoice("any", [])


def test_a_template_knows_tools_or_not(thinker: TransformersEngine, tiny_engine: TransformersEngine) -> None:
    assert knows_tools(thinker)
    assert not knows_tools(tiny_engine)
