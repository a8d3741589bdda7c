"""From a chain's input to the prompt that is decided about: the one that the chain's model will see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from langchain_core.language_models import BaseLanguageModel, BaseLLM
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages
from langchain_core.prompt_values import PromptValue, StringPromptValue
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableBinding, RunnableLambda, RunnableSequence

from kvroute import InvalidInputError

_DEPTH = 3
"""Of lists, tuples and dicts in which a runnable keeps others."""


def template_of(runnable: Runnable[Any, Any]) -> BasePromptTemplate[Any] | None:
    """The prompt template that a chain begins with, or None."""
    seen: Any = runnable
    while True:
        if isinstance(seen, BasePromptTemplate):
            return seen
        if isinstance(seen, RunnableSequence):
            seen = seen.first
        elif isinstance(seen, RunnableBinding):
            seen = seen.bound
        elif isinstance(getattr(seen, "runnable", None), Runnable):  # with fallbacks
            seen = seen.runnable
        elif isinstance(getattr(seen, "branches", None), Mapping):  # a router in a router
            seen = seen.branches.get("slow")
        else:
            return None


def fill(template: BasePromptTemplate[Any], given: Any) -> PromptValue:
    """What a template makes of a chain's input, without a run of its own in the trace.

    Raises:
        KeyError: a variable is missing.
        InvalidInputError: no dict, and the template has not one variable.
    """
    if isinstance(given, Mapping):
        return template.format_prompt(**given)
    if len(template.input_variables) != 1:
        raise InvalidInputError(f"The prompt template takes a dict, not {type(given).__name__}.")
    return template.format_prompt(**{template.input_variables[0]: given})


def as_messages(given: Any, *, text: bool) -> str | list[BaseMessage]:
    """A prompt as a text or messages.

    Args:
        given: a text, a prompt value, one message, messages, or a dict with ``messages``.
        text: leave a text as it stands, as for a model that continues texts; else it is what the user says in a chat.

    Raises:
        InvalidInputError: nothing of these.
    """
    if isinstance(given, Mapping) and "messages" in given:
        given = given["messages"]
    if text and isinstance(given, StringPromptValue):
        given = given.text
    if isinstance(given, str):
        return given if text else [HumanMessage(given)]
    if isinstance(given, PromptValue):
        return given.to_messages()
    if isinstance(given, BaseMessage):
        return [given]
    if isinstance(given, Sequence):
        return convert_to_messages(given)
    raise InvalidInputError(
        f"An input of type {type(given).__name__} is no prompt, and no branch begins with a prompt template.",
        hint="Pass prompt=: a template, or a function from the input to a text or messages.",
    )


def continues_texts(branches: Sequence[Runnable[Any, Any]]) -> bool:
    """Whether the models in chains continue texts and none of them chats."""
    models = [node for branch in branches for node, _ in held(branch) if isinstance(node, BaseLanguageModel)]
    return any(isinstance(m, BaseLLM) for m in models) and not any(isinstance(m, BaseChatModel) for m in models)


def held(runnable: Runnable[Any, Any]) -> Iterator[tuple[Runnable[Any, Any], Mapping[str, Any]]]:
    """Every runnable within one, itself included, with the arguments that are bound to it."""
    seen: set[int] = set()
    waiting: list[tuple[Runnable[Any, Any], Mapping[str, Any]]] = [(runnable, {})]
    while waiting:
        node, bound = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node, bound
        if isinstance(node, BaseLanguageModel | BasePromptTemplate):
            continue
        if isinstance(node, RunnableBinding):
            waiting.append((node.bound, {**node.kwargs, **bound}))
            continue
        parts = list(getattr(node, "__dict__", {}).values())
        if isinstance(node, RunnableLambda):
            parts.append(node.deps)
        waiting.extend((part, {}) for part in _runnables(parts, _DEPTH))


def _runnables(found: Any, depth: int) -> Iterator[Runnable[Any, Any]]:
    if isinstance(found, Runnable):
        yield found
    elif depth and isinstance(found, list | tuple | dict):
        for part in found.values() if isinstance(found, dict) else found:
            yield from _runnables(part, depth - 1)
