"""An answer as an object: by a tool's call, or by telling the model the schema."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from langchain_core.language_models import LanguageModelInput
from langchain_core.output_parsers import (
    BaseOutputParser,
    JsonOutputKeyToolsParser,
    JsonOutputParser,
    PydanticOutputParser,
    PydanticToolsParser,
)
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel

from kvroute import InvalidInputError

if TYPE_CHECKING:
    from langchain_kvroute.chat_model import ChatKVRoute

Method = Literal["function_calling", "json_schema", "json_mode"]


def structured(
    model: ChatKVRoute,
    schema: dict[str, Any] | type,
    *,
    include_raw: bool,
    method: Method | None,
    more: Mapping[str, Any],
) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
    """As :meth:`~langchain_kvroute.ChatKVRoute.with_structured_output`."""
    if more:
        raise InvalidInputError(f"with_structured_output takes no {', '.join(sorted(more))}.")
    if method is not None and method not in get_args(Method):
        raise InvalidInputError(f"A method is one of {list(get_args(Method))}, not {method!r}.")
    chosen = method or ("function_calling" if model.knows_tools() else "json_schema")
    shown = {"kwargs": {"method": chosen}, "schema": schema}
    parser: Any
    if chosen == "function_calling":
        name = convert_to_openai_tool(schema)["function"]["name"]
        llm = model.bind_tools([schema], tool_choice=name, ls_structured_output_format=shown)
        if _is_pydantic(schema):
            parser = PydanticToolsParser(tools=[cast(Any, schema)], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        wanted: dict[str, Any] = {"type": "json_object"}
        if chosen == "json_schema":
            tool = convert_to_json_schema(schema)
            wanted = {"type": "json_schema", "json_schema": {"name": tool.get("title", "answer"), "schema": tool}}
        llm = cast(Any, model.bind(response_format=wanted, ls_structured_output_format=shown))
        parser = PydanticOutputParser(pydantic_object=cast(Any, schema)) if _is_pydantic(schema) else JsonOutputParser()
    return _raw(llm, parser) if include_raw else cast(Any, llm | parser)


def _is_pydantic(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, BaseModel)


def _raw(llm: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    nothing = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | parsed.with_fallbacks([nothing], exception_key="parsing_error")
