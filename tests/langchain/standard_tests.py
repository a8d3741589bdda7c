"""Marks for LangChain's standard tests that a small model can't pass, with the reasons."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

C = TypeVar("C", bound=type)
TOOLS = (
    "test_tool_calling",
    "test_tool_calling_async",
    "test_bind_runnables_as_tools",
    "test_tool_choice",
    "test_tool_calling_with_no_arguments",
    "test_structured_output",
    "test_structured_output_async",
    "test_structured_output_pydantic_2_v1",
    "test_structured_output_optional_param",
    "test_agent_loop",
    "test_unicode_tool_call_integration",
)
"""Standard tests in which a model has to call a tool, or write JSON, that it was never shown."""
WEAK = (
    "The tiny thinker's 0.87 M parameters call the calculator that they were trained on and no other tool; "
    "test_chat_model has its tool loop, demanded calls and structured output."
)
NO_JSON = "SmolLM2-135M seldom writes JSON by a schema, and nothing but the prompt tells it to."
ALLOWED = (
    "langchain-core loads classes of the packages that it lists, and others by allowed_objects=[class] alone: "
    "test_chat_model does that."
)


def expected_to_fail(reason: str, *names: str) -> Callable[[C], C]:
    """Mark standard tests of a class, as copies: other classes have theirs unmarked."""

    def mark(cls: C) -> C:
        for name in names:
            base: Any = getattr(cls, name)
            copy = types.FunctionType(base.__code__, base.__globals__, name, base.__defaults__, base.__closure__)
            copy.__kwdefaults__ = base.__kwdefaults__
            copy.__dict__.update(base.__dict__)
            setattr(cls, name, pytest.mark.xfail(reason=reason)(copy))
        return cls

    return mark
