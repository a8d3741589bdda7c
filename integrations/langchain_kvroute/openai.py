"""A vLLM server through ``langchain-openai``: what to ask, and where to read what came back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from pydantic import ConfigDict

from kvroute import MissingExtraError, server_ask
from langchain_kvroute.metadata import KEY, of_served

try:
    from langchain_openai import ChatOpenAI
except ImportError as error:
    raise MissingExtraError("langchain-openai", "langchain-openai") from error

_CLIENTS = ("client", "async_client", "root_client", "root_async_client")
_HTTP_CLIENTS = ("http_client", "http_async_client")
_THOUGHTS = ("reasoning_content", "reasoning")
"""Where a server with a reasoning parser puts the thought, by vLLM's older and newer name."""


class ChatOpenAIKVRoute(ChatOpenAI):
    """``ChatOpenAI`` for vLLM servers that run kvroute: the same fields, and more in its messages.

    ``response_metadata["kvroute"]`` is a :class:`~langchain_kvroute.KVRouteMetadata` (of a stream, in its last chunk),
    and where the server has a reasoning parser ``additional_kwargs["reasoning_content"]`` is the thought.
    ``extra_body=kvroute_ask(policy=...)`` says what to ask of kvroute: see :func:`kvroute_ask`.

    Unlike ``ChatOpenAI`` it can be deep-copied (copies share the connections) and pickled. A pickle leaves the key out:
    where it is loaded, that of the environment variable ``OPENAI_API_KEY`` is taken.
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # a key may be in it

    @property
    def _llm_type(self) -> str:
        return "chat-openai-kvroute"

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """As ``ChatOpenAI``."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where it is found again."""
        return ["langchain_kvroute", "openai"]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        for name in (*_CLIENTS, *_HTTP_CLIENTS):
            memo[id(getattr(self, name))] = getattr(self, name)
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        made = (*_CLIENTS, *_HTTP_CLIENTS) if self.openai_proxy else _CLIENTS  # others were given
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], **dict.fromkeys((*made, "openai_api_key"))}}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self.validate_environment()  # type: ignore[operator]  # makes the clients

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        body = response if isinstance(response, dict) else response.model_dump(warnings=False)
        told = _told(body)
        several = told.get("choices") or [told]
        for place, (generation, choice) in enumerate(zip(result.generations, body.get("choices") or [], strict=False)):
            _note_thought(generation.message, choice.get("message") or {})
            if told:
                about = several[min(place, len(several) - 1)]
                generation.message.response_metadata[KEY] = of_served(about)
        return result

    def _convert_chunk_to_generation_chunk(
        self, chunk: dict[str, Any], default_chunk_class: type, base_generation_info: dict[str, Any] | None
    ) -> ChatGenerationChunk | None:
        found = super()._convert_chunk_to_generation_chunk(chunk, default_chunk_class, base_generation_info)
        if found is None:
            return None
        body = chunk if "choices" in chunk else chunk.get("chunk") or chunk
        told = _told(body)
        if told:
            found.message.response_metadata[KEY] = of_served(told)
        choices = body.get("choices") or []
        if choices:
            _note_thought(found.message, choices[0].get("delta") or {})
        return found


def kvroute_ask(
    *,
    policy: str | None = None,
    features: Any = None,
    mode: Literal["fast", "slow"] | None = None,
    confidence: str | None = None,
    shadow: bool = False,
) -> dict[str, Any]:
    """An ``extra_body`` for ``ChatOpenAI``, or for the stock client.

    Args:
        policy: name of a policy that the server has; it decides how hard to think.
        features: what else to give, as for :meth:`kvroute.TransformersEngine.generate`.
        mode: ``fast`` or ``slow``; then nothing is decided.
        confidence: name of a head that the server has.
        shadow: decide, say so, and change nothing.

    Raises:
        SpecError, InvalidInputError: the server would refuse it.
    """
    asked = server_ask(policy=policy, features=features, mode=mode, confidence=confidence, shadow=shadow)
    return {"kv_transfer_params": asked}


def _told(body: Mapping[str, Any]) -> dict[str, Any]:
    """What kvroute says in a server's JSON; nothing is asked of its form but that it is an object."""
    found = (body.get("kv_transfer_params") or {}).get(KEY)
    return found if isinstance(found, dict) else {}


def _note_thought(message: BaseMessage, written: Mapping[str, Any]) -> None:
    thought = next((t for name in _THOUGHTS if isinstance(t := written.get(name), str) and t), None)
    if thought is not None and isinstance(message, AIMessage):
        message.additional_kwargs["reasoning_content"] = thought
