"""ChatKVRoute on the tiny thinker: thoughts, modes, tools, structured output, batches, copies, faults."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps, load
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import ConfigurableField, RunnableBinding
from langchain_core.tools import tool
from pydantic import BaseModel, Field, ValidationError

import questions as made
from kvroute import (
    ChatTemplateError,
    InvalidInputError,
    Policy,
    Router,
    ServerTimeoutError,
    ServerUnreachableError,
    TextTooLongError,
    TransformersEngine,
    UnsupportedModelError,
    VLLMClient,
)
from langchain_kvroute import ChatKVRoute, kvroute_metadata
from langchain_kvroute.handover import Handover, hand_over
from tests.unit.test_router import constant
from tests.vllm_stand_in import StandIn

FOLDER = Path(made.__file__).parent
POLICY = FOLDER / "policy.json"
QUESTIONS = [made.make_question(random.Random(seed), kind) for seed in range(3) for kind in ("run", "map", "top")]


@tool
def calculator(expression: str) -> str:
    """Multiplies and adds whole numbers."""
    left, sign, right = expression.partition("+") if "+" in expression else expression.partition("*")
    return str(int(left) + int(right) if sign == "+" else int(left) * int(right))


def chat_of(engine: Any, **fields: Any) -> ChatKVRoute:
    return ChatKVRoute(engine=engine, **{"max_tokens": 160, **fields})


def summed(pieces: list[AIMessageChunk]) -> AIMessageChunk:
    found = pieces[0]
    for piece in pieces[1:]:
        found = found + piece  # type: ignore[assignment]
    return found


def same(streamed: AIMessageChunk, whole: AIMessage) -> None:
    """All that a message says but its ids and the seconds that a decision took."""

    def plain(message: AIMessage) -> dict[str, Any]:
        about = copy.deepcopy(message.response_metadata)
        if about["kvroute"]["decision"] is not None:
            del about["kvroute"]["decision"]["seconds"]
        return {
            "content": message.content,
            "more": message.additional_kwargs,
            "about": about,
            "usage": message.usage_metadata,
            "calls": [(c["name"], c["args"]) for c in message.tool_calls],
            "invalid": [c["args"] for c in message.invalid_tool_calls],
        }

    assert plain(streamed) == plain(whole)


# ---------------------------------------------------------------------- thoughts and decisions


@pytest.mark.parametrize("fields", [{"mode": "fast"}, {"mode": "slow"}, {"policy": POLICY}], ids=str)
def test_it_says_what_the_router_says(thinker: TransformersEngine, fields: dict[str, Any]) -> None:
    router = Router(thinker, fields.get("policy", "slow"))
    modes = set()
    for question in QUESTIONS:
        asked = [{"role": "user", "content": question.question}]
        routed = router.generate(asked, max_tokens=160, mode=fields.get("mode"))
        message = chat_of(thinker, **fields).invoke(question.question)
        assert message.content == routed.answer
        assert message.additional_kwargs.get("reasoning_content", "") == routed.thought
        about = kvroute_metadata(message)
        assert about is not None
        assert about["mode"] == routed.decision.final_mode
        assert about["difficulty"] == routed.decision.difficulty
        usage = message.usage_metadata
        assert usage is not None
        assert (usage["input_tokens"], usage["output_tokens"]) == (routed.usage.prompt, routed.usage.generated)
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        thought = usage["output_token_details"]["reasoning"]
        assert (thought > 0) == bool(routed.thought)
        assert thought < usage["output_tokens"]
        json.dumps(message.response_metadata)
        modes.add(routed.decision.mode)
    assert len(modes) == (2 if "policy" in fields else 1)


def test_thought_tokens_are_counted_one_by_one(thinker: TransformersEngine) -> None:
    [question] = QUESTIONS[:1]
    message = chat_of(thinker, mode="slow").invoke(question.question)
    assert message.usage_metadata is not None
    written = f"{message.additional_kwargs['reasoning_content']}\n</think>"
    told = message.usage_metadata["output_token_details"]["reasoning"]
    assert told == len(thinker.tokenize_texts([written], special_tokens=False)[0])


def test_without_a_policy_it_thinks_where_it_likes(thinker: TransformersEngine) -> None:
    """The model opens its thoughts itself, and they stand apart all the same."""
    chat = chat_of(thinker)
    thought = 0
    for question in QUESTIONS:
        message = chat.invoke(question.question)
        plain = thinker.generate([{"role": "user", "content": question.question}], max_tokens=160)
        assert "think" not in message.text
        reasoning = message.additional_kwargs.get("reasoning_content")
        assert ("</think>" in plain.text) == (reasoning is not None)
        assert plain.text.endswith(message.text)
        thought += reasoning is not None
        about = kvroute_metadata(message)
        assert about is not None
        assert about["decision"] is None
    assert 0 < thought < len(QUESTIONS)


def test_standard_blocks_name_the_thought(thinker: TransformersEngine) -> None:
    message = chat_of(thinker, mode="slow").invoke(QUESTIONS[0].question)
    assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
    v1 = chat_of(thinker, mode="slow", output_version="v1").invoke(QUESTIONS[0].question)
    assert [block["type"] for block in v1.content] == ["reasoning", "text"]  # type: ignore[index]


def test_a_confidence_comes_with_and_without_a_router(thinker: TransformersEngine) -> None:
    sure = constant(thinker, 73.0, target="correct")
    wanted = float(sure.predict(thinker.pool([[1, 2, 3]], [sure.spec])[0])[0])
    for fields in ({}, {"mode": "slow"}, {"policy": POLICY}):
        about = kvroute_metadata(chat_of(thinker, confidence=sure, **fields).invoke(QUESTIONS[0].question))
        assert about is not None
        assert about["confidence"] == pytest.approx(wanted)
        assert about["confidence_reason"] is None
        assert about["features"] == {}
    [message] = chat_of(thinker, confidence=sure, features="kv-coe").batch([QUESTIONS[0].question])
    about = kvroute_metadata(message)
    assert about is not None
    assert about["confidence"] is not None
    assert about["scores"]["kv_coe_r_token"]["value"] is not None


def test_a_broken_confidence_costs_no_answer(thinker: TransformersEngine) -> None:
    sure = constant(thinker, 73.0, target="correct")
    broken = replace(sure, spec=sure.spec.model_copy(update={"layer_reduce": "concat"}))  # vectors of another size
    message = chat_of(thinker, confidence=broken).invoke(QUESTIONS[2].question)
    about = kvroute_metadata(message)
    assert message.text
    assert about is not None
    assert about["confidence"] is None
    assert about["confidence_reason"]


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize(
    "fields",
    [{}, {"mode": "fast"}, {"mode": "slow"}, {"policy": POLICY}, {"mode": "slow", "max_tokens": 9}, {"stop": ["so"]}],
    ids=str,
)
async def test_pieces_add_up_to_the_message(thinker: TransformersEngine, fields: dict[str, Any]) -> None:
    chat = chat_of(thinker, **fields)
    for question in QUESTIONS[:3]:
        whole = chat.invoke(question.question)
        pieces = list(chat.stream(question.question))
        same(summed(pieces), whole)
        assert pieces[-1].chunk_position == "last"
        assert pieces[-1].usage_metadata is not None
        assert [p for p in pieces if "kvroute" in p.response_metadata] == [pieces[-1]]
        same(summed([piece async for piece in chat.astream(question.question)]), whole)
        same(AIMessageChunk(**(await chat.ainvoke(question.question)).model_dump(exclude={"type"})), whole)


def test_a_thought_is_streamed_apart_and_in_time(thinker: TransformersEngine) -> None:
    pieces = list(chat_of(thinker, mode="slow").stream(QUESTIONS[0].question))
    kinds = [
        "thought" if p.additional_kwargs.get("reasoning_content") else "answer" if p.content else "" for p in pieces
    ]
    assert kinds.count("thought") > 20
    assert kinds.count("answer") >= 3
    assert kinds.index("answer") > max(i for i, kind in enumerate(kinds) if kind == "thought")


def switching(thinker: TransformersEngine, **fields: Any) -> ChatKVRoute:
    """Begins every answer fast and breaks it off at the first checkpoint to think."""
    head = constant(thinker, 10.0, windows=constant(thinker, 90.0))
    return chat_of(thinker, policy=Policy(kind="two-step", every=4), head=head, **fields)


def test_an_answer_that_was_broken_off_is_not_streamed(thinker: TransformersEngine) -> None:
    chat = switching(thinker)
    question = QUESTIONS[0].question
    whole = chat.invoke(question)
    about = kvroute_metadata(whole)
    assert about is not None
    assert about["decision"] is not None
    assert about["decision"]["switch"]["to"] == "slow"
    router = Router(thinker, chat.policy, head=chat.head)  # type: ignore[arg-type]
    routed = router.generate([{"role": "user", "content": question}], max_tokens=160)
    assert (whole.content, whole.additional_kwargs["reasoning_content"]) == (routed.answer, routed.thought)
    pieces = list(chat.stream(question))
    same(summed(pieces), whole)
    assert pieces[0].additional_kwargs  # nothing of the draft came before the thought


def test_a_draft_that_is_not_held_back_stays_before_the_answer(thinker: TransformersEngine) -> None:
    held, shown = switching(thinker), switching(thinker, hold_back=False)
    question = QUESTIONS[0].question
    pieces = list(shown.stream(question))
    assert pieces[0].content
    same(summed(pieces), shown.invoke(question))
    draft, _, answer = summed(pieces).text.partition("\n\n")
    assert draft
    assert answer == held.invoke(question).text


def test_a_stream_that_is_left_ends_the_work(thinker: TransformersEngine) -> None:
    before = threading.active_count()
    stream = chat_of(thinker, mode="slow").stream(QUESTIONS[0].question)
    next(stream)
    stream.close()
    assert threading.active_count() == before


# ---------------------------------------------------------------------- calls


def test_a_call_gives_other_options_than_the_fields(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, mode="fast")
    question = QUESTIONS[1].question
    assert kvroute_metadata(chat.bind(mode="slow").invoke(question))["mode"] == "slow"  # type: ignore[index]
    short = chat.invoke(question, max_tokens=3)
    assert short.usage_metadata["output_tokens"] == 3  # type: ignore[index]
    assert short.response_metadata["finish_reason"] == "length"
    assert chat.invoke(question, stop=["map"]).text == "the"
    assert kvroute_metadata(chat.invoke(question, features=["length"]))["scores"]["length"]["value"]  # type: ignore[index]
    warm = {"temperature": 2.0, "mode": "slow"}
    assert chat.invoke(question, seed=1, **warm) != chat.invoke(question, seed=2, **warm)
    first, second = (chat.invoke(question, seed=1, **warm) for _ in range(2))
    assert first.content == second.content


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_token": 3}, "takes no max_token"),
        ({"mode": "medium"}, "'fast' or 'slow'"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"features": "nonsense"}, "nonsense"),
        ({"max_tokens": 10_000}, "context"),
        ({"tools": [], "tool_choice": "any"}, "no tools"),
    ],
    ids=str,
)
def test_a_call_that_makes_no_sense_is_refused(thinker: TransformersEngine, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        chat_of(thinker).invoke("hi", **given)
    with pytest.raises(InvalidInputError, match=says):
        list(chat_of(thinker, mode="slow").stream("hi", **given))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"engine": object(), "model": "x"},
        {"model": "x", "modell": "y"},
        {"model": "x", "mode": "medium"},
        {"base_url": []},
    ],
    ids=lambda fields: " ".join(fields) or "none",
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ChatKVRoute(**fields)


def test_prompts_that_cannot_be_answered(thinker: TransformersEngine, tiny_engine: TransformersEngine) -> None:
    chat = chat_of(thinker)
    with pytest.raises(InvalidInputError, match="image_url"):
        chat.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}])])
    with pytest.raises(TextTooLongError):
        chat.invoke("a b c " * 400)
    template = copy.deepcopy(tiny_engine.tokenizer)
    template.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(ChatTemplateError, match="no such role"):
        chat_of(TransformersEngine(tiny_engine.model, template, name="x")).invoke("hi")
    template.chat_template = None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        chat_of(TransformersEngine(tiny_engine.model, template, name="x")).invoke("hi")
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        chat_of(TransformersEngine(tiny_engine.model, template, name="x"), mode="slow").invoke("hi")


def test_tokens_are_the_models_own(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker)
    assert chat.get_num_tokens("map so") == len(thinker.tokenize_texts(["map so"], special_tokens=False)[0])
    asked = [HumanMessage(QUESTIONS[0].question)]
    assert chat.get_num_tokens_from_messages(asked) == chat.invoke(asked).usage_metadata["input_tokens"]  # type: ignore[index]
    with_tools = chat.bind_tools([calculator]).invoke(asked).usage_metadata["input_tokens"]  # type: ignore[index]
    assert chat.get_num_tokens_from_messages(asked, tools=[calculator]) == with_tools


# ---------------------------------------------------------------------- tools


def sums(count: int) -> list[tuple[str, str]]:
    rng = random.Random(5)
    return [(chat[0]["content"], result) for chat, result in (made.make_tool_chat(rng) for _ in range(count))]


@pytest.mark.parametrize("fields", [{}, {"mode": "fast"}, {"mode": "slow"}, {"policy": POLICY}], ids=str)
def test_a_tool_loop(thinker: TransformersEngine, fields: dict[str, Any]) -> None:
    chat = chat_of(thinker, **fields).bind_tools([calculator])
    right = 0
    for question, result in sums(6):
        messages: list[Any] = [HumanMessage(question)]
        called = chat.invoke(messages)
        assert called.content == ""
        streamed = summed(list(chat.stream(messages)))
        same(streamed, called)
        assert len(streamed.tool_call_chunks) == 1
        if called.invalid_tool_calls:  # broken off in mid-call to think, the model loses the thread now and then
            assert kvroute_metadata(called)["decision"]["switch"]  # type: ignore[index]
            continue
        [call] = called.tool_calls
        assert call["name"] == "calculator"
        said = calculator.invoke(call)
        assert isinstance(said, ToolMessage)
        assert said.content == result
        answer = chat.invoke([*messages, called, said])
        assert not answer.tool_calls
        right += result in answer.text
    assert right >= 4  # and it repeats a result wrongly now and then


def test_a_call_may_be_demanded_or_ruled_out(thinker: TransformersEngine) -> None:
    unfit = QUESTIONS[2].question  # nobody would calculate here
    [(fit, _)] = sums(1)
    named = {"type": "function", "function": {"name": "calculator"}}
    for fields in ({}, {"policy": POLICY}, {"mode": "slow"}):
        chat = chat_of(thinker, **fields)
        free = chat.bind_tools([calculator]).invoke(unfit)
        assert not free.tool_calls + free.invalid_tool_calls  # type: ignore[operator]
        for choice in ("any", "calculator", named):
            demanded = chat.bind_tools([calculator], tool_choice=choice)
            called = demanded.invoke(fit)
            assert [c["name"] for c in called.tool_calls] == ["calculator"]
            assert not called.additional_kwargs  # at once, without a thought
            same(summed(list(demanded.stream(fit))), called)
        begun = demanded.invoke(unfit)  # which the model has never seen: what it calls makes no sense, but it calls
        assert len(begun.tool_calls) + len(begun.invalid_tool_calls) == 1
        assert not begun.content
    message = chat_of(thinker, mode="fast").bind_tools([calculator], tool_choice="none").invoke(fit)
    assert not message.tool_calls


def test_an_unfinished_call_is_no_call(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, mode="fast", max_tokens=12).bind_tools([calculator])
    message = chat.invoke(sums(1)[0][0])
    assert not message.tool_calls
    [call] = message.invalid_tool_calls
    assert call["args"].startswith('<tool_call>\n{"name": "calculator"')
    same(summed(list(chat.stream(sums(1)[0][0]))), message)


def test_a_template_without_tools_is_refused(tiny_engine: TransformersEngine) -> None:
    bound = chat_of(tiny_engine, max_tokens=4).bind_tools([calculator])
    with pytest.raises(UnsupportedModelError, match="takes no tools"):
        bound.invoke("hi")
    assert isinstance(bound, RunnableBinding)
    assert bound.bind(tool_choice="none").invoke("hi").response_metadata


# ---------------------------------------------------------------------- structured output


class Calculator(BaseModel):
    """Multiplies and adds whole numbers."""

    expression: str = Field(description="such as 3*4")


Calculator.__name__ = "calculator"


def test_structured_output_by_a_tool(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker)
    for question, _ in sums(3):
        for schema in (Calculator, made.CALCULATOR):
            found = chat.with_structured_output(schema).invoke(question)
            said = found.expression if isinstance(found, Calculator) else found["expression"]  # type: ignore[index]
            assert said in question
        raw = chat.with_structured_output(Calculator, include_raw=True).invoke(question)
        assert raw["parsed"].expression in question  # type: ignore[index]
        assert raw["parsing_error"] is None  # type: ignore[index]
        assert raw["raw"].response_metadata["kvroute"]  # type: ignore[index]


def test_structured_output_by_instruction(thinker: TransformersEngine, tiny_engine: TransformersEngine) -> None:
    """The schema goes into the prompt; what is no JSON is said to be none."""
    for engine, method in ((tiny_engine, None), (thinker, "json_schema"), (thinker, "json_mode")):
        chat = chat_of(engine, max_tokens=8)
        found = chat.with_structured_output(Calculator, include_raw=True, method=method).invoke("hi")  # type: ignore[arg-type]
        assert found["parsed"] is None  # type: ignore[index]
        assert found["parsing_error"] is not None  # type: ignore[index]
        spent = found["raw"].usage_metadata["input_tokens"]  # type: ignore[index]
        assert spent > chat.invoke("hi").usage_metadata["input_tokens"] + 10  # type: ignore[index]
    with pytest.raises(InvalidInputError, match="method"):
        chat_of(thinker).with_structured_output(Calculator, method="xml")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="takes no color"):
        chat_of(thinker).with_structured_output(Calculator, color="red")


# ---------------------------------------------------------------------- batches


class Counted:
    """Counts the calls of an engine."""

    def __init__(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.threads: set[int] = set()
        real = engine.generate

        def generate(prompts: Any, **how: Any) -> Any:
            self.sizes.append(len(prompts))
            return real(prompts, **how)

        monkeypatch.setattr(engine, "generate", generate)


@pytest.fixture
def counted(thinker: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(thinker, monkeypatch)


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.started: list[Any] = []
        self.ended: dict[Any, str] = {}
        self.failed: dict[Any, BaseException] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.started.append(run_id)

    def on_llm_end(self, response: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.ended[run_id] = response.generations[0][0].text

    def on_llm_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.failed[run_id] = error


@pytest.mark.parametrize("fields", [{}, {"policy": POLICY}, {"mode": "slow"}], ids=str)
async def test_a_batch_is_one_call_and_many_runs(
    thinker: TransformersEngine, counted: Counted, fields: dict[str, Any]
) -> None:
    chat = chat_of(thinker, **fields)
    asked = [q.question for q in QUESTIONS]
    alone = [chat.invoke(question) for question in asked]
    for found in (chat.batch, chat.abatch):
        counted.sizes.clear()
        seen = Recorder()
        answers = found(asked, {"callbacks": [seen]})
        together = answers if isinstance(answers, list) else await answers
        assert counted.sizes == [len(asked)]
        assert [m.content for m in together] == [m.content for m in alone]
        assert [m.additional_kwargs for m in together] == [m.additional_kwargs for m in alone]
        assert len(set(seen.started)) == len(seen.ended) == len(asked)
        assert sorted(seen.ended.values()) == sorted(m.text for m in alone)
        assert len({m.id for m in together}) == len(asked)


async def test_one_bad_input_fails_alone(thinker: TransformersEngine, counted: Counted) -> None:
    chat = chat_of(thinker, policy=POLICY)
    asked: list[Any] = [q.question for q in QUESTIONS[:3]]
    asked[1] = "a b c " * 400
    mixed = [*asked, [HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])]]
    for found in (chat.batch(mixed, return_exceptions=True), await chat.abatch(mixed, return_exceptions=True)):
        assert [type(one) for one in found] == [AIMessage, TextTooLongError, AIMessage, InvalidInputError]
        assert found[2].text == chat.invoke(asked[2]).text
    with pytest.raises(TextTooLongError):
        chat.batch(asked)
    with pytest.raises(TextTooLongError):
        await chat.abatch(asked)


def test_inputs_that_differ_are_asked_apart_and_concurrency_is_kept(
    thinker: TransformersEngine, counted: Counted
) -> None:
    chat = chat_of(thinker, mode="fast")
    asked = [q.question for q in QUESTIONS[:5]]
    chat.batch(asked, {"max_concurrency": 2})
    assert counted.sizes == [2, 2, 1]
    counted.sizes.clear()
    limits = (8, 16, 8, 8, 16)
    configs: list[Any] = [{"configurable": {"most": most}} for most in limits]
    configurable = chat.configurable_fields(max_tokens=ConfigurableField("most"))
    found = configurable.batch(asked, configs)
    assert all(m.usage_metadata["output_tokens"] <= most for m, most in zip(found, limits, strict=True))
    assert {m.usage_metadata["output_tokens"] for m in found} > {8}
    counted.sizes.clear()
    assert chat.batch([]) == []
    assert (chat | (lambda m: m.text)).batch(asked) == [m.text for m in chat.batch(asked)]
    assert counted.sizes == [5, 5]


async def test_a_batch_that_is_cancelled_ends(tiny_engine: TransformersEngine) -> None:
    chat = chat_of(tiny_engine, max_tokens=3500)  # seconds
    running = asyncio.create_task(chat.abatch(["the quick brown fox", "a language model"]))
    while not working():
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    end = time.monotonic() + 10
    while working():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def working() -> bool:
    return any(t.name == "kvroute-batch" for t in threading.enumerate())


# ---------------------------------------------------------------------- async, threads, loops


async def test_a_cancelled_task_ends_the_work(tiny_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = threading.Event(), threading.Event()
    real = tiny_engine.generate

    def generate(*args: Any, **how: Any) -> Any:
        begun.set()
        found = real(*args, **how)
        if found[0].finish_reason == "cancelled":
            ended.set()
        return found

    monkeypatch.setattr(tiny_engine, "generate", generate)
    for fields in ({}, {"mode": "slow"}):
        begun.clear()
        ended.clear()
        chat = chat_of(tiny_engine, max_tokens=3500, **fields)  # seconds
        running = asyncio.create_task(chat.ainvoke("the quick brown fox"))
        assert await asyncio.to_thread(begun.wait, 10)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert await asyncio.to_thread(ended.wait, 10)


def test_threads_and_event_loops_share_a_model(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, policy=POLICY)
    asked = [q.question for q in QUESTIONS]
    alone = [chat.invoke(question).content for question in asked]
    with ThreadPoolExecutor(4) as pool:
        assert [m.content for m in pool.map(chat.invoke, asked)] == alone

        def loop(question: str) -> Any:
            async def pieces() -> str:
                return "".join([p.text async for p in chat.astream(question)])

            return asyncio.run(pieces())

        assert list(pool.map(loop, asked)) == alone
    assert [asyncio.run(chat.ainvoke(question)).content for question in asked[:2]] == alone[:2]


def test_a_callback_that_raises_breaks_nothing(thinker: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(BaseCallbackHandler):
        def on_chat_model_start(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("start")

        def on_llm_new_token(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("token")

        def on_llm_end(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("end")

    chat = chat_of(thinker, mode="fast")
    plain = chat.invoke(QUESTIONS[0].question).content
    config: Any = {"callbacks": [Broken()]}
    assert chat.invoke(QUESTIONS[0].question, config).content == plain
    assert summed(list(chat.stream(QUESTIONS[0].question, config))).content == plain
    assert [m.content for m in chat.batch([QUESTIONS[0].question] * 2, config)] == [plain] * 2


async def test_events(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, mode="slow")
    events = [e async for e in chat.astream_events(QUESTIONS[0].question, version="v2")]
    assert events[0]["event"] == "on_chat_model_start"
    assert events[-1]["event"] == "on_chat_model_end"
    assert events[-1]["data"]["output"].additional_kwargs["reasoning_content"]
    assert events[0]["metadata"]["ls_provider"] == "kvroute"
    assert events[0]["metadata"]["ls_max_tokens"] == 160


# ---------------------------------------------------------------------- handover


def test_a_decided_prompt_is_computed_once(thinker: TransformersEngine) -> None:
    router = Router(thinker, POLICY)
    for question in QUESTIONS[:3]:
        asked = [{"role": "user", "content": question.question}]
        made_once = router.prefill(asked)
        assert made_once.prefix is not None
        for chat in (chat_of(thinker), chat_of(thinker, mode="slow")):
            cold = chat.invoke(question.question, mode=chat.mode or made_once.decision.mode)
            with hand_over(Handover(thinker, made_once.prefix, made_once.decision)):
                warm = chat.invoke(question.question)
                [batched] = chat.batch([question.question])
            assert warm.content == cold.content == batched.content
            about = kvroute_metadata(warm)
            assert about is not None
            assert about["tokens"]["cached"] >= len(made_once.prefix.token_ids) - 1  # its last token gives the next one
            assert warm.usage_metadata["input_token_details"]["cache_read"] == about["tokens"]["cached"]  # type: ignore[index]
            if chat.mode is None:  # in the mode that was decided
                assert about["mode"] == made_once.decision.mode
                assert about["difficulty"] == made_once.decision.difficulty


def test_a_handover_to_another_engine_is_left_alone(
    thinker: TransformersEngine, tiny_engine: TransformersEngine
) -> None:
    found = Router(thinker, POLICY).prefill([{"role": "user", "content": QUESTIONS[0].question}])
    with hand_over(Handover(thinker, found.prefix, found.decision)):
        about = kvroute_metadata(chat_of(tiny_engine, max_tokens=4).invoke("hi"))
    assert about is not None
    assert (about["tokens"]["cached"], about["mode"]) == (0, None)


# ---------------------------------------------------------------------- copies, names, secrets


def named(**fields: Any) -> ChatKVRoute:
    return ChatKVRoute(**{"model": str(FOLDER / "model"), "max_tokens": 160, "mode": "slow", **fields})


def test_a_named_model_is_opened_at_its_first_use_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    chat, other = named(), named(mode="fast")
    assert not chat._state.handle.opened
    assert chat.invoke(QUESTIONS[0].question).text.startswith("it gives")
    other.invoke("hi")
    assert chat.opened() is other.opened()
    for copied in (copy.deepcopy(chat), copy.copy(chat), pickle.loads(pickle.dumps(chat)), chat.model_copy()):  # noqa: S301
        assert copied == chat
        assert copied.invoke(QUESTIONS[0].question).content == chat.invoke(QUESTIONS[0].question).content
        assert copied.opened() is chat.opened()


def test_a_copy_with_another_policy_asks_that_one(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, policy="slow")
    assert kvroute_metadata(chat.invoke("hi"))["mode"] == "slow"  # type: ignore[index]
    assert kvroute_metadata(chat.model_copy(update={"policy": "fast"}).invoke("hi"))["mode"] == "fast"  # type: ignore[index]
    assert kvroute_metadata(chat.invoke("hi"))["mode"] == "slow"  # type: ignore[index]


def test_a_live_engine_is_shared_by_copies_and_in_no_pickle(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, policy=POLICY)
    chat.invoke("hi")
    copied = copy.deepcopy({"chat": chat})["chat"]
    assert copied.engine is thinker
    assert copied.invoke(QUESTIONS[0].question).content == chat.invoke(QUESTIONS[0].question).content
    with pytest.raises(InvalidInputError, match="can't be pickled"):
        pickle.dumps(chat)
    assert dumpd(chat)["type"] == "not_implemented"


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": POLICY, "stop": ["x"], "temperature": 0.5},
        {"policy": Policy(kind="two-step", head=str(FOLDER / "head"), tau=11.0), "features": ["kv-coe"]},
        {"base_url": ("http://a:1", "http://b:2"), "served_model_name": "m", "confidence": "sure", "policy": "support"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The function `load` is in beta")
def test_it_is_serialised_and_loaded_again(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = named(api_key="sesame", **fields)
    text = dumps(chat)
    assert "sesame" not in text
    assert "sesame" not in repr(chat) + str(chat) + str(chat.asdict()) + str(chat.model_dump())
    monkeypatch.setenv("KVROUTE_API_KEY", "sesame")
    found = load(
        json.loads(text), allowed_objects=[ChatKVRoute], valid_namespaces=["langchain_kvroute"], secrets_from_env=True
    )
    assert isinstance(found, ChatKVRoute)
    assert found.asdict() == chat.asdict()
    assert found.api_key == chat.api_key
    assert found._state.handle.name == chat._state.handle.name


def test_a_key_is_in_no_pickle_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = named(base_url="http://a:1", api_key="sesame")
    assert b"sesame" not in pickle.dumps(chat)
    assert copy.deepcopy(chat).api_key is not None
    with pytest.raises(ValidationError) as refused:
        named(base_url="http://a:1", api_key="sesame", mode="medium")
    assert "sesame" not in str(refused.value)
    monkeypatch.setenv("KVROUTE_API_KEY", "open")
    assert named(base_url="http://a:1").api_key.get_secret_value() == "open"  # type: ignore[union-attr]


def test_fields_can_be_configured_and_a_cache_tells_models_apart(thinker: TransformersEngine) -> None:
    chat = chat_of(thinker, mode="slow").configurable_fields(mode=ConfigurableField("mode"))
    found = chat.invoke(QUESTIONS[0].question, {"configurable": {"mode": "fast"}})
    assert kvroute_metadata(found)["mode"] == "fast"  # type: ignore[index,arg-type]
    cache = InMemoryCache()
    fast, slow = (chat_of(thinker, mode=mode, cache=cache) for mode in ("fast", "slow"))
    first = fast.invoke(QUESTIONS[0].question)
    assert slow.invoke(QUESTIONS[0].question).content != first.content
    assert fast.invoke(QUESTIONS[0].question).content == first.content
    assert len(cache._cache) == 2


def test_nothing_of_a_prompt_is_logged(thinker: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    chat = chat_of(thinker, policy=POLICY, confidence=constant(thinker, 50.0, target="correct"))
    for ask in (chat.invoke, lambda q: list(chat.stream(q)), lambda q: chat.batch([q, q])):
        ask("sesame opens the door")
    assert "sesame" not in caplog.text


# ---------------------------------------------------------------------- servers


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as it:
        yield it


def test_a_server_that_tokenizes_is_asked(server: StandIn) -> None:
    """No tokenizer is here: no policies and tools, and all else works."""
    with VLLMClient(server.url) as client:
        chat = ChatKVRoute(engine=client, max_tokens=3, features=["kv-coe"])
        message = chat.invoke([SystemMessage("be brief"), HumanMessage("hi")])
        assert message.content == " w0 w1 w2"
        assert message.response_metadata["model_name"] == server.models[0]
        about = kvroute_metadata(message)
        assert about is not None
        assert about["scores"]["kv_coe_r_token"] == {"value": 0.25, "reason": None}
        same(summed(list(chat.stream([SystemMessage("be brief"), HumanMessage("hi")]))), message)
        with pytest.raises(InvalidInputError, match="tokenizer"):
            chat.bind_tools([calculator]).invoke("hi")
        with pytest.raises(InvalidInputError, match="does not say what its model is"):
            chat.invoke("hi", mode="slow")


def test_a_servers_head_is_named(server: StandIn) -> None:
    def result(body: dict[str, Any], ask: dict[str, Any] | None) -> dict[str, Any]:
        assert ask is not None
        sure = {"value": 0.75, "reason": None}
        return {"kvroute": {"confidence": sure if ask.get("confidence") == "sure" else None}}

    server.result = result
    with VLLMClient(server.url) as client:
        chat = ChatKVRoute(engine=client, max_tokens=3, confidence="sure")
        assert kvroute_metadata(chat.invoke("hi"))["confidence"] == 0.75  # type: ignore[index]


def test_a_named_server_and_its_key() -> None:
    with StandIn(token="sesame") as it:
        chat = ChatKVRoute(base_url=it.url, api_key="sesame", max_tokens=2)  # type: ignore[arg-type]
        assert chat.invoke("hi").content == " w0 w1"
        chat.opened().close()
        unknown = ChatKVRoute(base_url=it.url, max_tokens=2)
        with pytest.raises(Exception, match=r"401|[Uu]nauthorized"):
            unknown.invoke("hi")
        unknown.opened().close()


async def test_servers_are_asked_many_at_a_time() -> None:
    with StandIn(delay=0.2) as it, VLLMClient(it.url) as client:
        chat = ChatKVRoute(engine=client, max_tokens=1)
        assert len(chat.batch(["hi"] * 40)) == 40
        assert it.most_busy > 8
        it.most_busy = 0
        assert len(await chat.abatch(["hi"] * 40)) == 40
        assert it.most_busy > 8
        it.most_busy = 0
        await chat.abatch(["hi"] * 8, {"max_concurrency": 2})
        assert it.most_busy <= 2


async def test_a_server_that_is_gone_comes_back(server: StandIn) -> None:
    with VLLMClient(server.url, retries=0, connect_timeout=0.5) as client:
        chat = ChatKVRoute(engine=client, max_tokens=2)
        assert chat.invoke("hi").text == " w0 w1"
        server.die()
        with pytest.raises(ServerUnreachableError):
            chat.invoke("hi")
        with pytest.raises(ServerUnreachableError):
            await chat.ainvoke("hi")
        with pytest.raises(ServerUnreachableError):
            list(chat.stream("hi"))
        found = chat.batch(["hi", "ho"], return_exceptions=True)
        assert all(isinstance(one, ServerUnreachableError) for one in found)
        backup = chat.with_fallbacks([ChatKVRoute(model=str(FOLDER / "model"), mode="fast", max_tokens=9)])
        assert backup.invoke("hi").response_metadata["kvroute"]["mode"] == "fast"
        with StandIn(port=server.port):
            end = time.monotonic() + 20
            while True:
                try:
                    assert chat.invoke("hi").text == " w0 w1"
                    break
                except ServerUnreachableError:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.2)


async def test_a_server_that_takes_too_long() -> None:
    with StandIn(delay=5.0) as it, VLLMClient(it.url, timeout=0.3, retries=0) as client:
        chat = ChatKVRoute(engine=client, max_tokens=2)
        with pytest.raises(ServerTimeoutError):
            chat.invoke("hi")
        with pytest.raises(ServerTimeoutError):
            await chat.ainvoke("hi")
        with pytest.raises(ServerTimeoutError):
            list(chat.stream("hi"))


def test_a_closed_client_says_so(server: StandIn) -> None:
    client = VLLMClient(server.url)
    chat = ChatKVRoute(engine=client, max_tokens=2)
    client.close()
    with pytest.raises(InvalidInputError, match="closed"):
        chat.invoke("hi")
