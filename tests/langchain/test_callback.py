"""The callback that collects confidences: what it keeps, and that nothing of it breaks a run."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.language_models import FakeListLLM
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from scripted_chat import ScriptedChat, StreamingChat, said

from kvroute import InvalidInputError, SelfEvaluator, TransformersEngine
from langchain_kvroute import SelfEvaluationCallbackHandler, SelfEvaluationRecord

THINKER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
SECRET = "the vault opens with 4711"


def asked(handler: SelfEvaluationCallbackHandler, **more: Any) -> dict[str, Any]:
    return {"callbacks": [handler], **more}


def test_records_hold_what_the_model_says_of_its_answer() -> None:
    handler = SelfEvaluationCallbackHandler(threshold=0.5)
    model = ScriptedChat(answers=[said("a", 0.25), said("b", 0.75)])
    for _ in range(2):
        model.invoke("q", asked(handler, tags=["mine"], metadata={"user": 3}))
    first, second = handler.records
    assert (first.confidence, first.low, second.confidence, second.low) == (0.25, True, 0.75, False)
    assert (first.difficulty, first.mode, first.model, first.tags) == (12.5, "fast", "scripted", ("mine",))
    assert first.metadata["user"] == 3
    assert first.scores == {"length": {"value": 3.0, "reason": None}}
    assert first.tokens == {"prompt": 7, "cached": 0, "computed": 9, "answer": 3}
    assert (first.parent_run_id, first.root_run_id) == (None, first.run_id)
    assert handler.low == [first]
    assert json.loads(json.dumps(first.to_dict()))["run_id"] == str(first.run_id)
    assert handler.summary() == {
        "answers": 2,
        "with_confidence": 2,
        "mean_confidence": 0.5,
        "threshold": 0.5,
        "low": 1,
        "without": {},
        "forgotten": 0,
        "faults": 0,
    }


@pytest.mark.parametrize(
    "given",
    [{}, {"threshold": 0.5, "on_low_confidence": lambda _: None}, {"evaluator": lambda *_: 0.5}],
    ids=["alone", "hook", "evaluator"],
)
async def test_an_event_loop_is_left_for_what_may_take_long_alone(given: dict[str, Any]) -> None:
    class Watched(SelfEvaluationCallbackHandler):
        threads: set[int]

        def on_llm_end(self, *args: Any, **more: Any) -> None:
            self.threads = {threading.get_ident()}
            super().on_llm_end(*args, **more)

    handler = Watched(**given)
    await ScriptedChat(answers=[said("a", 0.25)]).ainvoke("q", asked(handler))
    assert len(handler.records) == 1
    assert (threading.get_ident() in handler.threads) == (not given)


def test_answers_without_a_confidence_are_counted_by_reason() -> None:
    handler = SelfEvaluationCallbackHandler(threshold=0.5)
    answers = [AIMessage("plain"), said("b", None, reason="no head"), said("c", None), said("d", float("nan"))]
    model = ScriptedChat(answers=list(answers))
    for _ in answers:
        model.invoke("q", asked(handler))
    found = handler.summary()
    assert (found["answers"], found["with_confidence"], found["mean_confidence"], found["low"]) == (4, 0, None, 0)
    assert sorted(found["without"].values()) == [1, 1, 2]
    assert found["without"]["no head"] == 1
    assert handler.records[0].reason == "the model says nothing of kvroute's, and there is no evaluator"


def test_runs_are_found_by_the_run_that_the_user_started() -> None:
    handler = SelfEvaluationCallbackHandler()
    model = ScriptedChat(answers=lambda *_: said("a", 0.5))

    @tool
    def helper(question: str) -> str:
        """Asks a model."""
        return str(model.invoke(question).text)

    chain = RunnableLambda(model.invoke) | RunnableLambda(lambda m: helper.invoke({"question": m.text}))
    first, second = uuid4(), uuid4()
    chain.invoke("q", asked(handler, run_id=first))
    chain.invoke("q", asked(handler, run_id=second))
    assert [len(handler.of_run(r)) for r in (first, str(second), uuid4())] == [2, 2, 0]
    one = handler.of_run(first)[0]
    assert one.root_run_id == first
    assert one.parent_run_id not in (None, first)
    assert handler.of_run(one.run_id) == [one]
    assert not handler._runs, "runs that ended are forgotten"


def test_the_hook_is_called_with_low_answers_alone() -> None:
    seen: list[SelfEvaluationRecord] = []
    handler = SelfEvaluationCallbackHandler(threshold=0.5, on_low_confidence=seen.append)
    model = ScriptedChat(answers=[said("a", 0.49), said("b", 0.5), said("c", None), said("d", 0.0)])
    for _ in range(4):
        model.invoke("q", asked(handler))
    assert [r.confidence for r in seen] == [0.49, 0.0]


def test_a_hook_that_raises_breaks_nothing_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def hook(record: SelfEvaluationRecord) -> None:
        raise RuntimeError(SECRET)

    handler = SelfEvaluationCallbackHandler(threshold=0.5, on_low_confidence=hook)
    model = ScriptedChat(answers=lambda *_: said("a", 0.1))
    with caplog.at_level(logging.DEBUG):
        assert model.invoke(SECRET, asked(handler)).text == "a"
        assert model.invoke(SECRET, asked(handler)).text == "a"
    assert handler.summary()["faults"] == 2
    assert len(handler.records) == 2
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_an_evaluator_that_raises_breaks_nothing_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def evaluator(messages: Any, answer: AIMessage) -> float:
        raise KeyError(messages[-1].text)

    handler = SelfEvaluationCallbackHandler(evaluator=evaluator)
    with caplog.at_level(logging.DEBUG):
        assert ScriptedChat(answers=[AIMessage("a")]).invoke(SECRET, asked(handler)).text == "a"
    assert handler.records[0].reason == "the evaluator failed: KeyError"
    assert handler.records[0].faults
    assert SECRET not in caplog.text + str(handler.records)


def test_metadata_of_an_odd_shape_breaks_nothing() -> None:
    handler = SelfEvaluationCallbackHandler()
    for odd in ("text", {"confidence": "high"}, {"tokens": 3, "confidence": 0.5}, {"scores": [1], "confidence": 2}):
        answer = AIMessage("a", response_metadata={"kvroute": odd})
        assert ScriptedChat(answers=[answer]).invoke("q", asked(handler)).text == "a"
    found = handler.summary()
    assert found["answers"] + found["faults"] == 4
    assert found["with_confidence"] == 0


def test_events_out_of_order_break_nothing() -> None:
    handler = SelfEvaluationCallbackHandler()
    handler.on_llm_end(LLMResult(generations=[]), run_id=uuid4())
    handler.on_llm_error(ValueError("x"), run_id=uuid4())
    handler.on_chain_end({}, run_id=uuid4())
    handler.on_llm_end("no result", run_id=uuid4())  # type: ignore[arg-type]
    assert handler.summary()["faults"] == 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_kvroute.callback._MOST_RUNS", 5)
    monkeypatch.setattr("langchain_kvroute.callback._MOST_REASONS", 3)
    handler = SelfEvaluationCallbackHandler(max_records=4, evaluator=lambda *_: None)
    for place in range(20):  # runs that never end
        handler.on_chat_model_start({}, [[HumanMessage("q")]], run_id=uuid4())
        ScriptedChat(answers=[said("", None, reason=f"reason {place}")]).invoke("q", asked(handler))
    assert len(handler._runs) <= 5
    assert len(handler.records) == 4
    found = handler.summary()
    assert (found["answers"], found["forgotten"]) == (20, 16)
    assert sum(found["without"].values()) == 20
    assert len(found["without"]) <= 4
    handler.clear()
    assert handler.summary()["answers"] == handler.summary()["forgotten"] == 0


def test_prompts_are_not_kept_without_an_evaluator() -> None:
    handler = SelfEvaluationCallbackHandler()
    handler.on_chat_model_start({}, [[HumanMessage(SECRET)]], run_id=uuid4())
    assert SECRET not in str(handler._runs)


def test_one_bad_item_of_a_batch_costs_the_others_nothing() -> None:
    handler = SelfEvaluationCallbackHandler()
    model = ScriptedChat(answers=lambda m, _: ValueError("no") if m[-1].text == "bad" else said(m[-1].text, 0.5))
    found = model.batch(["a", "bad", "c"], asked(handler), return_exceptions=True)
    assert isinstance(found[1], ValueError)
    assert handler.summary()["answers"] == 2
    assert not handler._runs


async def test_async_streams_and_batches_are_collected() -> None:
    handler = SelfEvaluationCallbackHandler(threshold=0.5)
    model = StreamingChat(answers=lambda m, _: said(f"{m[-1].text} it is", 0.4))
    await model.ainvoke("a", asked(handler))
    assert [c.text async for c in model.astream("b", asked(handler))][:2] == ["b ", "it "]
    assert "".join(str(c.text) for c in model.stream("c", asked(handler))).strip() == "c it is"
    await model.abatch(["d", "e"], asked(handler))
    assert [e["event"] async for e in model.astream_events("f", asked(handler))][-1] == "on_chat_model_end"
    assert handler.summary()["low"] == 6


async def test_a_cancelled_task_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """LangChain tells nobody that such a run ended, so what is known of it goes when others need the room."""
    monkeypatch.setattr("langchain_kvroute.callback._MOST_RUNS", 1)
    handler = SelfEvaluationCallbackHandler()
    task = asyncio.create_task(ScriptedChat(answers=[said("a", 0.5)], seconds=30).ainvoke("q", asked(handler)))
    await asyncio.sleep(0.1)
    assert len(handler._runs) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert handler.summary()["answers"] == 0
    await ScriptedChat(answers=[said("a", 0.5)]).ainvoke("q", asked(handler))
    assert handler.summary()["answers"] == 1
    assert not handler._runs


def test_many_threads_lose_nothing() -> None:
    handler = SelfEvaluationCallbackHandler(threshold=0.5, max_records=1000)
    model = ScriptedChat(answers=lambda m, _: said("a", float(m[-1].text)))

    def work(place: int) -> None:
        for _ in range(25):
            model.invoke(str(place / 8), asked(handler))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    found = handler.summary()
    assert (found["answers"], found["low"], len(handler.records)) == (200, 100, 200)
    assert found["mean_confidence"] == pytest.approx(sum(p / 8 for p in range(8)) / 8)


async def test_two_event_loops_share_one_handler() -> None:
    handler = SelfEvaluationCallbackHandler()
    model = ScriptedChat(answers=lambda *_: said("a", 0.5))
    await asyncio.to_thread(lambda: asyncio.run(model.ainvoke("q", asked(handler))))
    await model.ainvoke("q", asked(handler))
    assert handler.summary()["answers"] == 2


async def test_within_a_with_everything_is_collected_once() -> None:
    model = ScriptedChat(answers=lambda *_: said("a", 0.5))
    chain = RunnableLambda(lambda q: q) | model
    handler = SelfEvaluationCallbackHandler()
    with handler as entered:
        assert entered is handler
        chain.invoke("q")
        chain.invoke("q", asked(handler))  # given as well: still once
        await chain.ainvoke("q")
        with SelfEvaluationCallbackHandler() as inner:
            chain.batch(["q", "q"])
    chain.invoke("q")
    assert (handler.summary()["answers"], inner.summary()["answers"]) == (3, 2)


def test_threads_may_be_within_the_same_handler_at_once() -> None:
    model = ScriptedChat(answers=lambda *_: said("a", 0.5))
    handler, both = SelfEvaluationCallbackHandler(), threading.Barrier(2)
    faults: list[Exception] = []

    def work() -> None:
        try:
            with handler:
                both.wait()
                model.invoke("q")
                both.wait()
            model.invoke("q")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not faults
    assert handler.summary()["answers"] == 2


def test_copies_of_a_chain_tell_the_same_handler() -> None:
    handler = SelfEvaluationCallbackHandler()
    chain = ScriptedChat(answers=lambda *_: said("a", 0.5)).with_config(callbacks=[handler])
    assert copy.deepcopy(handler) is handler
    assert copy.copy(handler) is handler
    chain.invoke("q")
    assert handler.summary()["answers"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": 1.5},
        {"threshold": float("nan")},
        {"max_records": 0},
        {"on_low_confidence": print},
        {"threshold": 0.5, "on_low_confidence": asyncio.sleep},
    ],
)
def test_arguments_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        SelfEvaluationCallbackHandler(**wrong)


# ------------------------------------------------------------------ any chat model, read by a real one


@pytest.fixture(scope="module")
def thinker() -> TransformersEngine:
    return TransformersEngine.from_pretrained(THINKER / "model", dtype="float32")


@pytest.fixture(scope="module")
def reader(thinker: TransformersEngine) -> SelfEvaluator:
    return SelfEvaluator(thinker, head=THINKER / "confidence")


def test_answers_of_any_model_are_read_by_an_evaluator(reader: SelfEvaluator) -> None:
    """What it gives is what the evaluator itself gives of prompt and answer, tokens included."""
    question, right, wrong = "top 12,47,31,05,88,23,64,70,19", "it gives 88.", "it gives 05."
    handler = SelfEvaluationCallbackHandler(evaluator=reader)
    model = ScriptedChat(answers=[AIMessage(right), AIMessage(wrong)])
    for _ in range(2):
        model.invoke(question, asked(handler))
    chat = [{"role": "user", "content": question}]
    for record, text in zip(handler.records, (right, wrong), strict=True):
        own = reader.score(chat, text)
        assert record.confidence == own.confidence
        assert record.tokens["evaluated"] == own.usage.computed > 0
        assert record.scores["mean_logprob"]["value"] == own.scores["mean_logprob"].value
    assert handler.records[0].scores["mean_logprob"]["value"] > handler.records[1].scores["mean_logprob"]["value"]


async def test_an_evaluator_reads_in_async_runs(reader: SelfEvaluator) -> None:
    handler = SelfEvaluationCallbackHandler(evaluator=reader)
    await ScriptedChat(answers=[AIMessage("it gives 88.")]).ainvoke("top 12,47,31,05,88,23,64,70,19", asked(handler))
    assert handler.records[0].confidence is not None


def test_an_evaluator_is_not_asked_where_the_model_tells() -> None:
    handler = SelfEvaluationCallbackHandler(evaluator=lambda *_: 0.9)
    ScriptedChat(answers=[said("a", 0.25)]).invoke("q", asked(handler))
    ScriptedChat(answers=[said("a", None)]).invoke("q", asked(handler))
    assert [r.confidence for r in handler.records] == [0.25, 0.9]


def test_models_that_continue_texts_are_read_too(reader: SelfEvaluator) -> None:
    handler = SelfEvaluationCallbackHandler(evaluator=reader)
    assert FakeListLLM(responses=[" 88."]).invoke("it gives", asked(handler)) == " 88."
    assert handler.records[0].confidence == reader.score("it gives", " 88.").confidence


def test_what_can_not_be_read_says_why(reader: SelfEvaluator) -> None:
    handler = SelfEvaluationCallbackHandler(evaluator=reader)
    ScriptedChat(answers=[AIMessage("")]).invoke("q", asked(handler))
    ScriptedChat(answers=[AIMessage("9 " * 600)]).invoke("q", asked(handler))
    assert handler.records[0].reason == "the answer has no text that could be read"
    assert "context" in str(handler.records[1].reason)
    assert handler.summary()["faults"] == 0
