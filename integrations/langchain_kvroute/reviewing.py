"""A human looks at an answer of low confidence: what is shown, what may be said, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langgraph.types import interrupt

from langchain_kvroute.evaluating import KEY, SelfEvaluation, self_evaluation

REJECTED = "A reviewer rejected this answer. Answer again."


class LowConfidence(TypedDict):
    """What a stopped agent shows: the value of its interrupt. JSON-able."""

    type: Literal["low_confidence"]
    answer: str
    """The answer's text."""
    tool_calls: list[dict[str, Any]]
    """The tools it would call, as ``{"name", "args"}``."""
    evaluation: SelfEvaluation
    """Its confidence, and what was done about it before."""
    allowed: list[str]
    """Kinds of reviews that it takes."""
    error: NotRequired[str]
    """Why the review before this was not understood."""


class Approve(TypedDict):
    """The answer stands."""

    type: Literal["approve"]


class Edit(TypedDict):
    """Another answer takes its place; only for answers that call no tools."""

    type: Literal["edit"]
    answer: str


class Reject(TypedDict):
    """The model is told so, and answers again."""

    type: Literal["reject"]
    message: NotRequired[str]
    """What it is told; by default, that a reviewer rejected its answer."""


Review = Approve | Edit | Reject


def ask_human(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """Stop if the last answer is low and nobody has looked at it; then what the review changes in the state."""
    answer = next((m for m in reversed(state["messages"]) if isinstance(m, AIMessage)), None)
    found = None if answer is None else self_evaluation(answer)
    if answer is None or found is None or not found["low"] or found["review"] is not None:
        return None
    structured = state.get("structured_response") is not None
    shown: LowConfidence = {
        "type": "low_confidence",
        "answer": str(answer.text),
        "tool_calls": [{"name": c["name"], "args": c["args"]} for c in answer.tool_calls],
        "evaluation": found,
        "allowed": ["approve", "reject"] if structured or answer.tool_calls else ["approve", "edit", "reject"],
    }
    review = interrupt(shown)
    while (error := _fault(review, shown["allowed"])) is not None:  # asked again, or the run could not be resumed
        review = interrupt({**shown, "error": error})
    if review["type"] == "reject":
        return _rejected(answer, review.get("message") or REJECTED, answered=structured)
    edited = {"content": review["answer"]} if review["type"] == "edit" else {}
    reviewed: SelfEvaluation = {**found, "review": review["type"]}
    metadata = {**answer.response_metadata, KEY: reviewed}
    return {"messages": [answer.model_copy(update={**edited, "response_metadata": metadata})]}


def _fault(review: Any, allowed: list[str]) -> str | None:
    """Why a review can't be followed, or None."""
    kind = review.get("type") if isinstance(review, Mapping) else None
    if kind not in allowed:
        return f"A review is a dict whose type is one of {allowed}, not {kind!r}."
    text = review.get("answer" if kind == "edit" else "message", None if kind == "edit" else "")
    unknown = set(review) - {"type", *({"answer"} if kind == "edit" else {"message"} if kind == "reject" else ())}
    if unknown:
        return f"A review of the type {kind!r} has no {sorted(map(str, unknown))}."
    if not isinstance(text, str):
        return "An edit has the new text in 'answer'." if kind == "edit" else "A rejection's 'message' is a text."
    return None


def _rejected(answer: AIMessage, told: str, *, answered: bool) -> dict[str, Any]:
    """Calls of tools are answered by the rejection, as models expect of each call; else the user says it."""
    if answer.tool_calls and not answered:
        calls = [ToolMessage(told, name=c["name"], tool_call_id=c["id"], status="error") for c in answer.tool_calls]
        return {"messages": calls, "jump_to": "model"}
    return {"messages": [HumanMessage(told)], "jump_to": "model"}
