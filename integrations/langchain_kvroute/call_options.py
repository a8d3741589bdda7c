"""What one call of the chat model asks, checked: its fields, and what was bound or given over them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from kvroute import InvalidInputError, SamplingOptions

if TYPE_CHECKING:
    from langchain_kvroute.chat_model import ChatKVRoute

SAMPLING: Final = ("max_tokens", "temperature", "top_p", "seed", "repetition_penalty")
_KNOWN: Final = (*SAMPLING, "mode", "features", "tools", "tool_choice", "response_format")
_LANGCHAINS: Final = ("stream",)
"""Keywords that LangChain's own code has dealt with by the time they arrive."""


@dataclass(frozen=True, slots=True)
class CallOptions:
    """One call.

    Attributes:
        options: how to write.
        mode: that is demanded, or None.
        features: what else to give.
        tools: in OpenAI's form.
        tool_choice: which of them to call.
        instruction: what a response format comes to, or None.
    """

    options: SamplingOptions
    mode: str | None = None
    features: Any = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    instruction: str | None = None

    @classmethod
    def of(cls, model: ChatKVRoute, stop: Sequence[str] | None, given: Mapping[str, Any]) -> CallOptions:
        """The model's fields, and over them what a call was given.

        Raises:
            InvalidInputError: an unknown keyword, or a value that makes no sense.
        """
        unknown = sorted(set(given) - {*_KNOWN, *_LANGCHAINS})
        if unknown:
            raise InvalidInputError(
                f"A call of ChatKVRoute takes no {', '.join(unknown)}.", hint=f"It takes: stop, {', '.join(_KNOWN)}."
            )
        fields = {name: value for name in SAMPLING if (value := given.get(name, getattr(model, name))) is not None}
        texts = stop if stop is not None else model.stop
        if texts is not None:
            fields["stop"] = (texts,) if isinstance(texts, str) else tuple(texts)
        mode = given["mode"] if given.get("mode") is not None else model.mode
        if mode not in (None, "fast", "slow"):
            raise InvalidInputError(f"A mode is 'fast' or 'slow', not {mode!r}.")
        return cls(
            options=SamplingOptions(**fields),
            mode=mode,
            features=given["features"] if given.get("features") is not None else model.features,
            tools=list(given.get("tools") or ()),
            tool_choice=given.get("tool_choice"),
            instruction=instruction_of(given.get("response_format")),
        )


def instruction_of(response_format: Any) -> str | None:
    """A response format in words: nothing else here makes a model write by a schema.

    Raises:
        InvalidInputError: no form of OpenAI's.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return "Answer with one JSON object, and nothing else."
    if kind == "json_schema":
        schema = (response_format.get("json_schema") or {}).get("schema")
        if isinstance(schema, Mapping):
            return f"Answer with one JSON object of this JSON Schema, and nothing else:\n{json.dumps(schema)}"
    raise InvalidInputError(
        "A response_format has the type text, json_object, or json_schema with a schema.",
        hint="Use with_structured_output, which makes one.",
    )
