"""A LangChain chat model that thinks as hard as it must, over any of kvroute's engines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from pydantic import BaseModel, ConfigDict

from kvroute import DifficultyHead, KVRouteError, Policy, Router, ThinkingMode, TokenIds, UnsupportedModelError
from langchain_kvroute import asking, batching
from langchain_kvroute.asking import Asked
from langchain_kvroute.call_options import CallOptions
from langchain_kvroute.engine_fields import EngineFields, decides_inside
from langchain_kvroute.handover import handed_over
from langchain_kvroute.message_writer import MessageWriter
from langchain_kvroute.messages import template_messages, with_instruction
from langchain_kvroute.structured_output import Method, structured
from langchain_kvroute.templates import has_tokenizer, knows_tools, opens_thought, render
from langchain_kvroute.tool_calls import Tool, ToolChoice, template_tools


class ChatKVRoute(EngineFields, BaseChatModel):
    """A chat model over :class:`kvroute.TransformersEngine`, :class:`kvroute.VLLMEngine` or a vLLM server.

    ``content`` is the answer, ``additional_kwargs["reasoning_content"]`` the thought, and
    ``response_metadata["kvroute"]`` a :class:`~langchain_kvroute.KVRouteMetadata`: difficulty, decision, confidence.

    A call (or ``bind``) may give ``mode``, ``max_tokens``, ``temperature``, ``top_p``, ``seed``,
    ``repetition_penalty``, ``features``, ``stop``, ``tools``, ``tool_choice`` and ``response_format`` in place of the
    fields; other keywords are refused. In a branch of a :class:`~langchain_kvroute.KVRouteRouter` on the same engine a
    model goes on from the decision's cache and, where it has neither a policy nor a mode of its own, in the mode that
    was decided.

    Raises:
        pydantic.ValidationError: fields that don't go together. Engines are opened at their first use.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    policy: Policy | str | Path | None = None
    """Decides how hard to think: a :class:`kvroute.Policy`, the path of its file, or its name; over vLLM, that of one
    the engine has loaded. None decides nothing: the model thinks or not, as it likes."""
    head: DifficultyHead | str | Path | None = None
    """What the policy reads a difficulty with; by default the head that its file names."""
    mode: Literal["fast", "slow"] | None = None
    """Demand a mode; then nothing is decided."""
    confidence: DifficultyHead | str | Path | None = None
    """Tells how likely an answer is right: a head trained with ``target="correct"``, or its folder; over vLLM also the
    name of one that the engine has loaded."""
    features: Any = None
    """What else of the KV cache to give with every answer, as for :meth:`kvroute.TransformersEngine.generate`; such as
    ``"kv-coe"``."""
    thinking: ThinkingMode | None = None
    """How the model thinks; by default read from its chat template."""
    hold_back: bool = True
    """Whether a stream holds back an answer that a two-step policy may still break off to think. Otherwise it comes at
    once, and what was broken off stands before the answer."""
    streaming: bool = False
    """Whether calls that are not streamed come by way of a stream all the same, for handlers of new tokens."""
    max_tokens: int | None = None
    """At most so many tokens, thought and answer together; None takes kvroute's 256."""
    temperature: float | None = None
    """0, which is the default, takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that hold this much probability together."""
    seed: int | None = None
    """Fixes the sampling."""
    repetition_penalty: float | None = None
    """As in transformers; by default what the model's own generation config says."""
    stop: Sequence[str] | None = None
    """The answer ends before the first of these texts."""

    # ------------------------------------------------------------------ what LangChain asks

    @property
    def _llm_type(self) -> str:
        return "chat-kvroute"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        shown = ("policy", "mode", "features", "thinking", "hold_back", "max_tokens", "temperature", "top_p", "seed")
        found = {name: plain(getattr(self, name)) for name in (*shown, "repetition_penalty", "stop")}
        found |= {name: None if (v := getattr(self, name)) is None else str(v) for name in ("head", "confidence")}
        found["model_name"] = self.known_name()
        found["engine"] = (
            "server" if self.base_url else self.kind if self.engine is None else type(self.engine).__name__
        )
        return found

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """A model that is given by name can be serialised."""
        return True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        """Where it is found again."""
        return ["langchain_kvroute", "chat_model"]

    @property
    def lc_attributes(self) -> dict[str, Any]:
        """Fields as JSON has them."""
        names = ("policy", "head", "thinking", "confidence", "base_url", "stop")
        return {n: plain(v) for n in names if (v := getattr(self, n)) is not None}

    def to_json(self) -> Any:
        """As LangChain serialises it; a live engine, head or feature spec can't be."""
        if self.engine is not None or any(isinstance(h, DifficultyHead) for h in (self.head, self.confidence)):
            return self.to_json_not_implemented()
        return super().to_json()

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """What a cache of answers goes by: live engines, too, are told apart."""
        which = (self.base_url, self.model, self.dtype, None if self.engine is None else id(self.engine))
        given = sorted(({**kwargs, "stop": stop}).items())
        return f"{sorted(self.asdict().items())}---{which}---{given}"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or (list(self.stop) if self.stop else None), **kwargs)
        params["ls_provider"] = "kvroute"
        params["ls_model_name"] = kwargs.get("model") or self.known_name()
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Tokens of a text by the model's own tokenizer."""
        found: list[int] = self.opened().tokenize_texts([text], special_tokens=False)[0]
        return found

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a chat as the model gets it: with its template, tools and the turn opened."""
        engine = self.opened()
        chat = template_messages(messages)
        if not tools:
            return len(engine.tokenize(chat))
        return len(asking.prompt_of(engine, render(engine, chat, template_tools(tools))).ids)

    # ------------------------------------------------------------------ answers

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        asked = self._asked(messages, stop, kwargs)
        together = batching.current()
        answer = asking.generate([asked])[0] if together is None else together.answer(asked)
        return self._result(asked, answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> ChatResult:
        asked = await self._aasked(messages, stop, kwargs)
        together = batching.current()
        answer = await (asking.agenerate(asked) if together is None else together.aanswer(asked))
        return self._result(asked, answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        asked = self._asked(messages, stop, kwargs)
        writer = MessageWriter(asked, self.answering_name())
        with contextlib.closing(asking.stream(asked)) as chunks:
            for chunk in chunks:
                for piece in writer.pieces(chunk):
                    yield ChatGenerationChunk(message=piece)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        asked = await self._aasked(messages, stop, kwargs)
        writer = MessageWriter(asked, self.answering_name())
        async with contextlib.aclosing(asking.astream(asked)) as chunks:
            async for chunk in chunks:
                for piece in writer.pieces(chunk):
                    yield ChatGenerationChunk(message=piece)

    def _result(self, asked: Asked, answer: asking.Answer) -> ChatResult:
        message = MessageWriter(asked, self.answering_name()).whole(answer)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer many, each in a run of its own; a model in this process is called once for all that fit together.

        An input that can't be answered fails alone. vLLM gets as many requests at a time as ``max_concurrency`` says
        (64), and batches by itself.
        """
        if self.batches_inside():
            configs = batching.many(config, len(inputs))
            return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)
        return batching.batch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """:meth:`batch` without blocking the event loop."""
        if self.batches_inside():
            configs = batching.many(config, len(inputs))
            return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)
        return await batching.abatch(self, inputs, config, return_exceptions=return_exceptions, **kwargs)

    # ------------------------------------------------------------------ tools, structured output

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Show the model tools, by its chat template.

        Args:
            tools: functions, LangChain tools, pydantic classes, or OpenAI's objects.
            tool_choice: ``auto`` (the default) leaves it to the model; ``none`` shows it no tools; ``any`` or a tool's
                name makes it call one: its answer is begun for it, at once and without a thought.
            kwargs: other keywords of a call.

        Raises:
            UnsupportedModelError: (at the call) the chat template knows no tools.
        """
        formatted = template_tools(tools)
        ToolChoice(tool_choice, formatted)
        choice = {} if tool_choice is None else {"tool_choice": tool_choice}
        return self.bind(tools=formatted, **choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Method | None = None,
        strict: bool | None = None,  # noqa: ARG002 - part of the interface
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The answer as an object.

        Args:
            schema: JSON Schema, OpenAI's function, TypedDict or pydantic class.
            include_raw: give ``raw``, ``parsed`` and ``parsing_error`` instead of raising.
            method: ``function_calling`` makes the model call a tool of this schema; ``json_schema`` tells it the schema
                in the system message, ``json_mode`` only that JSON is wanted. None calls a tool where the chat template
                knows tools (the engine is opened to see) and tells the schema elsewhere.
            strict: accepted and without effect: an answer is checked when it is there, not while it is written.

        Raises:
            InvalidInputError: another keyword, or no such method.
        """
        return structured(self, schema, include_raw=include_raw, method=method, more=kwargs)

    def knows_tools(self) -> bool:
        """Whether the model's chat template takes tools; opens the engine."""
        engine = self.opened()
        return self._state.kept("tools", None, lambda: knows_tools(engine))

    # ------------------------------------------------------------------ parts

    async def _aasked(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]) -> Asked:
        """In this thread once all is there; opening models and asking servers is done in another."""
        if self._state.handle.opened and not decides_inside(self.opened()):
            return self._asked(messages, stop, kwargs)
        return await asking.in_pool(lambda: self._asked(messages, stop, kwargs), wide=True)

    def _asked(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: Mapping[str, Any]) -> Asked:
        call = CallOptions.of(self, stop, kwargs)
        engine = self.opened()
        found = handed_over(engine)
        mode, taken = call.mode, None
        decided = None if found is None or self.policy is not None else found.decision
        if decided is not None and decided.mode in ("fast", "slow") and mode in (None, decided.mode):
            mode, taken = decided.mode, decided
        if call.instruction is not None:
            messages = with_instruction(messages, call.instruction)
        choice = ToolChoice(call.tool_choice, call.tools)
        tools = call.tools if choice.shown else None
        if tools and not self.knows_tools():
            raise UnsupportedModelError(
                "The model's chat template takes no tools.",
                hint="Use a model whose template does, such as Qwen's, or tool_choice='none'.",
            )
        asked = Asked(
            engine,
            template_messages(messages, arguments_as_text=not has_tokenizer(engine)),
            call.options,
            features=call.features,
            prefix=None if found is None else found.prefix,
            reads_calls=bool(tools),
            taken=taken,
        )
        routed = (self.policy is not None or mode is not None) and not choice.opening
        return self._routed(asked, mode, tools) if routed else self._plain(asked, tools, choice.opening)

    def _routed(self, asked: Asked, mode: str | None, tools: list[dict[str, Any]] | None) -> Asked:
        router = self._router(asked.engine)
        policy = router.policy
        return replace(
            asked,
            router=router,
            mode=mode,
            template={"tools": tools} if tools else None,
            thinking=router.thinking,
            hold=self.hold_back and mode is None and policy.kind == "two-step" and not policy.shadow,
        )

    def _plain(self, asked: Asked, tools: list[dict[str, Any]] | None, opening: str) -> Asked:
        """Without a router: the model thinks or not. A demanded call is begun in the prompt, in fast mode."""
        engine, thinking = asked.engine, self._thinking(asked.engine)
        prompt, inside = asked.prompt, False
        if opening:
            [begun] = engine.tokenize_texts([opening], special_tokens=False)
            if thinking is not None and not thinking.in_question:
                layout = thinking.layout(engine, prompt, template={"tools": tools})
                prompt = TokenIds((*layout.base, *layout.fast, *begun))
            else:
                prompt = TokenIds((*asking.prompt_of(engine, render(engine, prompt, tools)).ids, *begun))
        else:
            inside = self._state.kept("inside", self.thinking, lambda: opens_thought(engine, thinking))
            if tools:
                prompt = asking.prompt_of(engine, render(engine, prompt, tools))
        return replace(
            asked, prompt=prompt, opening=opening, thinking=thinking, inside=inside, head=self._judge(engine)
        )

    def _router(self, engine: Any) -> Router:
        def make() -> Router:
            policy = self.policy if self.policy is not None else "slow"
            head = self.head if self.policy is not None else None
            return Router(engine, policy, head=head, thinking=self.thinking, confidence=self._judge(engine))

        heads = [id(h) if isinstance(h, DifficultyHead) else h for h in (self.head, self.confidence)]
        return self._state.kept("router", (self.policy, self.thinking, *heads), make)

    def _judge(self, engine: Any) -> DifficultyHead | str | None:
        """What tells a confidence: a head, or the name of one of the engine's."""
        given = self.confidence
        if given is None or isinstance(given, DifficultyHead):
            return given
        if isinstance(given, str) and decides_inside(engine) and not Path(given).is_dir():
            return given
        return self._state.kept("head", given, lambda: DifficultyHead.load(given, engine.info))

    def _thinking(self, engine: Any) -> ThinkingMode | None:
        """How the model thinks, or None where that is not known or nothing marks it."""

        def find() -> ThinkingMode | None:
            try:
                return self.thinking or ThinkingMode.of(engine)
            except KVRouteError:
                return None

        return self._state.kept("thinking", self.thinking, find)


def plain(value: Any) -> Any:
    """A field's value as JSON has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value if isinstance(value, str) or not isinstance(value, Sequence) else [plain(v) for v in value]
