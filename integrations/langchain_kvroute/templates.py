"""What an engine's chat template can do: write tools, open a thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvroute import ChatTemplateError, KVRouteError, ThinkingMode

_PROBE = "kvroute_probe"


def knows_tools(engine: Any) -> bool:
    """Whether an engine's chat template writes tools into the prompt.

    Raises:
        InvalidInputError: a client without a tokenizer.
    """
    function = {"name": _PROBE, "description": _PROBE, "parameters": {"type": "object", "properties": {}}}
    try:
        written = render(engine, [{"role": "user", "content": "?"}], [{"type": "function", "function": function}])
    except ChatTemplateError:
        return False
    return _PROBE in written


def render(engine: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """The text of a chat, with tools, and the turn opened for the model.

    Raises:
        InvalidInputError: a client without a tokenizer.
        ChatTemplateError: there is no chat template, or it refuses the messages.
    """
    more = {} if tools is None else {"tools": list(tools)}
    try:
        return str(
            engine.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **more
            )
        )
    except KVRouteError:
        raise
    except Exception as error:
        raise ChatTemplateError(
            f"The chat template refused the messages: {error}",
            hint="Messages have roles that the template knows, and tools need one that takes them.",
        ) from error


def opens_thought(engine: Any, thinking: ThinkingMode | None) -> bool:
    """Whether the chat template itself opens a thought at the end of a prompt."""
    if thinking is None or not thinking.slow or not thinking.close or not has_tokenizer(engine):
        return False
    return render(engine, [{"role": "user", "content": "?"}], None).endswith(thinking.slow)


def has_tokenizer(engine: Any) -> bool:
    """Whether an engine tokenizes here."""
    try:
        return engine.tokenizer is not None
    except KVRouteError:
        return False
