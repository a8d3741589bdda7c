"""The middleware that acts on low confidence: what it does in an agent, and that no fault costs the answer."""

from __future__ import annotations

import asyncio
import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import thinker
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.errors import GraphInterrupt
from langgraph.types import Command, interrupt
from pydantic import BaseModel
from scripted_chat import ScriptedChat, said

from kvroute import InvalidInputError, SelfEvaluator
from langchain_kvroute import SelfEvaluationMiddleware, self_evaluation

SECRET = "the vault opens with 4711"
CALL = {"name": "add", "args": {"a": 1, "b": 2}, "id": "c1", "type": "tool_call"}
CONFIG: Any = {"configurable": {"thread_id": "t"}}
Invoke = Callable[..., dict[str, Any]]


@tool
def add(a: int, b: int) -> str:
    """Adds."""
    return str(a + b)


@pytest.fixture(params=["sync", "async"])
def invoke(request: pytest.FixtureRequest) -> Invoke:
    """Runs an agent with one question, or with something else, sync or async."""

    def run(agent: Any, given: Any = "q", config: Any = None) -> dict[str, Any]:
        state = {"messages": given} if isinstance(given, str) else given
        if request.param == "sync":
            found: dict[str, Any] = agent.invoke(state, config)
            return found
        return asyncio.run(agent.ainvoke(state, config))

    return run


def agent_of(answers: Any, checkpointer: Any = None, tools: Any = (add,), **how: Any) -> tuple[Any, ScriptedChat]:
    model = ScriptedChat(answers=answers)
    middleware = SelfEvaluationMiddleware(**{"threshold": 0.5, **how})
    return create_agent(model, tools=list(tools), middleware=[middleware], checkpointer=checkpointer), model


def last(state: dict[str, Any]) -> tuple[str, Any]:
    answer = state["messages"][-1]
    return str(answer.text), self_evaluation(answer)


# ------------------------------------------------------------------ annotate


def test_annotate_changes_nothing_but_metadata(invoke: Invoke) -> None:
    agent, model = agent_of([said("", 0.1, tool_calls=[CALL]), said("3", 0.2)])
    found = invoke(agent)
    text, about = last(found)
    assert text == "3"
    assert len(model.calls) == 2
    assert [m.type for m in found["messages"]] == ["human", "ai", "tool", "ai"]
    assert self_evaluation(found["messages"][1]) is None, "steps that call tools are not looked at by default"
    assert about == {
        "confidence": 0.2,
        "reason": None,
        "threshold": 0.5,
        "low": True,
        "kept": 0,
        "attempts": [
            {
                "action": "first",
                "confidence": 0.2,
                "reason": None,
                "mode": "fast",
                "model": "scripted",
                "tokens": {"prompt": 7, "cached": 0, "computed": 9, "answer": 3},
                "tool_calls": 0,
                "fault": None,
            }
        ],
        "review": None,
    }
    assert found["messages"][-1].response_metadata["kvroute"]["confidence"] == 0.2
    assert set(found) == {"messages"}, "the middleware's own state is private"


# ------------------------------------------------------------------ retry


def test_a_low_answer_is_asked_for_again_with_slow_thinking(invoke: Invoke) -> None:
    agent, model = agent_of([said("a", 0.2), said("b", 0.9)], action="retry")
    found = invoke(agent)
    text, about = last(found)
    assert (text, about["kept"], about["low"]) == ("b", 1, False)
    assert [a["action"] for a in about["attempts"]] == ["first", "retry"]
    assert ["mode" in call for call in model.calls] == [False, True]
    assert model.calls[1]["mode"] == "slow"
    assert len(found["messages"]) == 2, "the answer that was not kept is no message"


def test_a_confident_answer_is_not_asked_for_again(invoke: Invoke) -> None:
    agent, model = agent_of([said("a", 0.5)], action="retry")
    assert last(invoke(agent))[0] == "a"
    assert len(model.calls) == 1


@pytest.mark.parametrize(("keep", "kept"), [("best", "a"), ("last", "c")])
def test_which_answer_is_kept(invoke: Invoke, keep: str, kept: str) -> None:
    answers = [said("a", 0.4), said("b", 0.3), said("c", 0.2)]
    agent, model = agent_of(answers, action="retry", max_retries=2, keep=keep)
    text, about = last(invoke(agent))
    assert (text, len(model.calls)) == (kept, 3)
    assert about["low"]
    assert about["attempts"][about["kept"]]["confidence"] == about["confidence"]


def test_of_equals_and_of_those_without_confidence_the_later_is_kept(invoke: Invoke) -> None:
    assert last(invoke(agent_of([said("a", 0.4), said("b", 0.4)], action="retry")[0]))[0] == "b"
    assert last(invoke(agent_of([said("a", 0.4), AIMessage("b")], action="retry")[0]))[0] == "b"


def test_retries_are_bounded_in_a_run_and_begin_anew_with_the_next(invoke: Invoke) -> None:
    """Three steps of which each would be retried; two retries in all."""
    low = [said("", 0.1, tool_calls=[CALL]) for _ in range(4)]
    answers = [*low, said("x", 0.1), said("y", 0.1), said("z", 0.9)]
    agent, model = agent_of(
        answers, InMemorySaver(), action="retry", max_retries=2, evaluate_tool_calls=True
    )  # fmt: skip
    found = invoke(agent, config=CONFIG)
    # Step 1: asked, retried twice; steps 2 and 3: as they come.
    assert last(found)[0] == "x"
    assert sum("mode" in c for c in model.calls) == 2
    assert len(model.calls) == 5
    assert len(invoke(agent, "more", CONFIG)["messages"]) == len(found["messages"]) + 2
    assert ["mode" in c for c in model.calls[5:]] == [False, True]


def test_a_retry_may_call_tools_and_the_agent_goes_on(invoke: Invoke) -> None:
    agent, model = agent_of([said("a", 0.1), said("", 0.05, tool_calls=[CALL]), said("3", 0.9)], action="retry")
    found = invoke(agent)
    assert [m.type for m in found["messages"]] == ["human", "ai", "tool", "ai"]
    step = self_evaluation(found["messages"][1])
    assert step is not None
    assert [(a["action"], a["tool_calls"]) for a in step["attempts"]] == [("first", 0), ("retry", 1)]
    assert last(found)[0] == "3"
    assert len(model.calls) == 3


def test_settings_of_a_retry_are_the_user_s(invoke: Invoke) -> None:
    agent, model = agent_of([said("a", 0.1), said("b", 0.9)], action="retry", retry_settings={"temperature": 0.7})
    invoke(agent)
    assert model.calls[1] == {"temperature": 0.7}


# ------------------------------------------------------------------ escalate, and several actions


def test_a_low_answer_is_asked_of_another_model(invoke: Invoke) -> None:
    bigger = ScriptedChat(answers=[AIMessage("b")])
    agent, _ = agent_of([said("a", 0.1)], action="escalate", escalate_to=bigger)
    text, about = last(invoke(agent))
    assert (text, about["kept"], about["confidence"], about["low"]) == ("b", 1, None, False)
    assert bigger.calls == [{}]


def test_actions_follow_one_another(invoke: Invoke) -> None:
    bigger = ScriptedChat(answers=[said("c", 0.3)])
    agent, model = agent_of(
        [said("a", 0.1), said("b", 0.2)], InMemorySaver(), action=("retry", "escalate", "stop"), escalate_to=bigger
    )
    found = invoke(agent, config=CONFIG)
    [stop] = found["__interrupt__"]
    assert stop.value["answer"] == "c"
    assert [a["action"] for a in stop.value["evaluation"]["attempts"]] == ["first", "retry", "escalate"]
    assert bigger.calls == [{}], "what a retry sets is not set for the other model"
    assert len(model.calls) == 2


# ------------------------------------------------------------------ missing confidences, evaluators


@pytest.mark.parametrize(("missing", "calls"), [("pass", 1), ("act", 2)])
def test_answers_without_a_confidence(invoke: Invoke, missing: str, calls: int) -> None:
    agent, model = agent_of([AIMessage("a"), said("b", 0.9)], action="retry", missing=missing)
    _, about = last(invoke(agent))
    assert len(model.calls) == calls
    assert "nothing of kvroute's" in about["attempts"][0]["reason"]


def test_an_evaluator_reads_what_has_no_confidence(invoke: Invoke) -> None:
    seen: list[Any] = []

    def evaluator(messages: Any, answer: AIMessage) -> float:
        seen.append([m.text for m in messages])
        return 0.1 if answer.text == "a" else 0.9

    model = ScriptedChat(answers=[AIMessage("a"), AIMessage("b")])
    middleware = SelfEvaluationMiddleware(threshold=0.5, action="retry", evaluator=evaluator)
    text, about = last(invoke(create_agent(model, system_prompt="be right", middleware=[middleware])))
    assert (text, about["confidence"]) == ("b", 0.9)
    assert seen == [["be right", "q"]] * 2


def test_structured_answers_are_final_ones(invoke: Invoke) -> None:
    class Sum(BaseModel):
        """A sum."""

        total: int

    def call(total: int, confidence: float) -> AIMessage:
        return said("", confidence, tool_calls=[{"name": "Sum", "args": {"total": total}, "id": f"s{total}"}])

    model = ScriptedChat(answers=[call(1, 0.1), call(3, 0.9)])
    middleware = SelfEvaluationMiddleware(threshold=0.5, action="retry")
    found = invoke(create_agent(model, response_format=ToolStrategy(Sum), middleware=[middleware]))
    assert found["structured_response"] == Sum(total=3)
    [answer] = [m for m in found["messages"] if isinstance(m, AIMessage)]
    assert self_evaluation(answer)["kept"] == 1  # type: ignore[index]


# ------------------------------------------------------------------ faults


def test_a_failing_retry_costs_nothing(invoke: Invoke, caplog: pytest.LogCaptureFixture) -> None:
    agent, _ = agent_of([said("a", 0.1), RuntimeError(SECRET), said("b", 0.9)], action="retry", max_retries=2)
    with caplog.at_level(logging.DEBUG, logger="langchain_kvroute"):
        text, about = last(invoke(agent, SECRET))
    assert (text, about["kept"]) == ("b", 2)
    assert [a["fault"] for a in about["attempts"]] == [None, "RuntimeError", None]
    assert "RuntimeError" in caplog.text
    assert SECRET not in caplog.text


def test_where_all_retries_fail_the_first_answer_stands(invoke: Invoke) -> None:
    agent, _ = agent_of([said("a", 0.1), ConnectionError(), OSError()], action="retry", max_retries=2)
    text, about = last(invoke(agent))
    assert (text, about["kept"], about["low"]) == ("a", 0, True)


def test_an_evaluator_that_raises_costs_nothing(invoke: Invoke, caplog: pytest.LogCaptureFixture) -> None:
    def evaluator(messages: Any, answer: AIMessage) -> float:
        raise KeyError(messages[-1].text)

    agent, _ = agent_of([AIMessage("a")], action="retry", evaluator=evaluator)
    with caplog.at_level(logging.DEBUG, logger="langchain_kvroute"):
        text, about = last(invoke(agent, SECRET))
    assert (text, about["reason"]) == ("a", "the evaluator failed: KeyError")
    assert SECRET not in caplog.text + str(about)


def test_the_model_s_own_fault_is_the_user_s_to_see(invoke: Invoke) -> None:
    agent, _ = agent_of([ValueError("gone")], action="retry")
    with pytest.raises(ValueError, match="gone"):
        invoke(agent)


def test_an_interrupt_within_a_retry_goes_through(invoke: Invoke) -> None:
    """LangGraph's own exceptions are no faults."""

    class Asks(AgentMiddleware[Any, Any]):
        def wrap_model_call(self, request: Any, handler: Any) -> Any:
            if request.model_settings.get("mode") == "slow":
                interrupt("may I?")
            return handler(request)

        async def awrap_model_call(self, request: Any, handler: Any) -> Any:
            if request.model_settings.get("mode") == "slow":
                interrupt("may I?")
            return await handler(request)

    model = ScriptedChat(answers=[said("a", 0.1), said("a", 0.1), said("b", 0.9)])
    middleware = [SelfEvaluationMiddleware(threshold=0.5, action="retry"), Asks()]
    agent = create_agent(model, middleware=middleware, checkpointer=InMemorySaver())
    assert invoke(agent, config=CONFIG)["__interrupt__"][0].value == "may I?"
    assert last(invoke(agent, Command(resume=True), CONFIG))[0] == "b"
    assert issubclass(GraphInterrupt, Exception), "which is why it has to be let through"


async def test_a_cancelled_run_ends_in_the_middle_of_a_retry() -> None:
    model = ScriptedChat(answers=lambda _, how: said("a", 0.1), seconds=0.0)
    slow = ScriptedChat(answers=[said("b", 0.9)], seconds=30)
    middleware = SelfEvaluationMiddleware(threshold=0.5, action="escalate", escalate_to=slow)
    task = asyncio.create_task(create_agent(model, middleware=[middleware]).ainvoke({"messages": "q"}))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_one_bad_item_of_a_batch_costs_the_others_nothing() -> None:
    def answer(messages: Any, how: Any) -> Any:
        if messages[-1].text == "bad":
            return ValueError("no")
        return said("slow" if "mode" in how else "fast", 0.9 if "mode" in how else 0.1)

    agent, _ = agent_of(answer, action="retry")
    found = agent.batch([{"messages": t} for t in ("a", "bad", "c")], return_exceptions=True)
    assert isinstance(found[1], ValueError)
    assert [last(found[i])[0] for i in (0, 2)] == ["slow", "slow"]


# ------------------------------------------------------------------ threads, copies


def test_threads_share_a_middleware() -> None:
    """Each run has its answers and retries to itself, in threads and in event loops of their own."""

    def answer(messages: Any, how: Any) -> AIMessage:
        question = messages[-1].text
        return said(f"{how.get('mode', 'fast')} {question}", 0.9 if "mode" in how or question == "easy" else 0.1)

    agent, model = agent_of(answer, action="retry")
    asked = ["easy" if i % 3 == 0 else f"q{i}" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: agent.invoke({"messages": q}), asked))
        found += pool.map(lambda q: asyncio.run(agent.ainvoke({"messages": q})), asked)
    for question, state in zip(asked * 2, found, strict=True):
        text, about = last(state)
        assert text == ("fast easy" if question == "easy" else f"slow {question}")
        assert [a["action"] for a in about["attempts"]] == (["first"] if question == "easy" else ["first", "retry"])
    assert len(model.calls) == 2 * (8 + 2 * 16)


def test_a_deep_copy_shares_models_and_no_settings(invoke: Invoke) -> None:
    evaluator = SelfEvaluator(thinker.engine())
    bigger = ScriptedChat(answers=lambda *_: AIMessage("b"))
    middleware: Any = SelfEvaluationMiddleware(
        threshold=0.5, action=("retry", "escalate"), escalate_to=bigger, evaluator=evaluator, missing="act"
    )
    copied = copy.deepcopy({"middleware": middleware})["middleware"]
    assert copied.evaluator is evaluator
    assert copied.escalate_to is bigger
    middleware.retry_settings["mode"] = "fast"
    model = ScriptedChat(answers=[said("a", 0.1), said("a", 0.1)])
    text, about = last(invoke(create_agent(model, middleware=[copied])))
    assert (text, [a["action"] for a in about["attempts"]]) == ("b", ["first", "retry", "escalate"])
    assert model.calls[1] == {"mode": "slow"}


# ------------------------------------------------------------------ stop for a human


def stopped(invoke: Invoke, answers: Any, **how: Any) -> tuple[Any, Any, ScriptedChat]:
    agent, model = agent_of(answers, InMemorySaver(), action="stop", **how)
    [stop] = invoke(agent, config=CONFIG)["__interrupt__"]
    return agent, stop.value, model


def test_a_human_approves(invoke: Invoke) -> None:
    agent, shown, model = stopped(invoke, [said("a", 0.1)])
    assert (shown["type"], shown["answer"], shown["allowed"]) == ("low_confidence", "a", ["approve", "edit", "reject"])
    assert shown["evaluation"]["confidence"] == 0.1
    text, about = last(invoke(agent, Command(resume={"type": "approve"}), CONFIG))
    assert (text, about["review"]) == ("a", "approve")
    assert len(model.calls) == 1, "going on computes nothing again"


def test_a_human_edits(invoke: Invoke) -> None:
    agent, _, _ = stopped(invoke, [said("a", 0.1)])
    found = invoke(agent, Command(resume={"type": "edit", "answer": "mine"}), CONFIG)
    text, about = last(found)
    assert (text, about["review"], len(found["messages"])) == ("mine", "edit", 2)


@pytest.mark.parametrize("message", [None, "look at b"])
def test_a_human_rejects_and_the_model_answers_again(invoke: Invoke, message: str | None) -> None:
    agent, _, model = stopped(invoke, [said("a", 0.1), said("b", 0.9)])
    review = {"type": "reject"} if message is None else {"type": "reject", "message": message}
    found = invoke(agent, Command(resume=review), CONFIG)
    assert last(found)[0] == "b"
    told = found["messages"][-2]
    assert isinstance(told, HumanMessage)
    assert told.text == (message or "A reviewer rejected this answer. Answer again.")
    assert len(model.calls) == 2


def test_calls_of_tools_are_stopped_before_they_run(invoke: Invoke) -> None:
    ran: list[int] = []

    @tool
    def pay(amount: int) -> str:
        """Pays."""
        ran.append(amount)
        return "paid"

    call = {"name": "pay", "args": {"amount": 9}, "id": "p1"}
    answers = [said("", 0.1, tool_calls=[call]), said("not paid", 0.9)]
    agent, shown, _ = stopped(invoke, answers, tools=[pay], evaluate_tool_calls=True)
    assert (shown["tool_calls"], shown["allowed"]) == ([{"name": "pay", "args": {"amount": 9}}], ["approve", "reject"])
    found = invoke(agent, Command(resume={"type": "reject", "message": "no"}), CONFIG)
    told = found["messages"][2]
    assert isinstance(told, ToolMessage)
    assert (told.content, told.tool_call_id, told.status) == ("no", "p1", "error")
    assert last(found)[0] == "not paid"
    assert not ran


def test_a_review_that_is_not_understood_is_asked_for_again(invoke: Invoke) -> None:
    agent, _, model = stopped(invoke, [said("a", 0.1)])
    wrong: list[Any] = ["yes", {"type": "accept"}, {"type": "edit"}, {"type": "approve", "answer": "b"}]
    for review in wrong:
        [stop] = invoke(agent, Command(resume=review), CONFIG)["__interrupt__"]
        assert stop.value["error"]
        assert stop.value["answer"] == "a"
    assert last(invoke(agent, Command(resume={"type": "approve"}), CONFIG))[0] == "a"
    assert len(model.calls) == 1


def test_a_confident_answer_does_not_stop(invoke: Invoke) -> None:
    agent, _ = agent_of([said("a", 0.9)], InMemorySaver(), action="stop")
    assert "__interrupt__" not in invoke(agent, config=CONFIG)


# ------------------------------------------------------------------ state that survives


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    return str(tmp_path / "runs.sqlite")


def test_a_stopped_run_is_resumed_elsewhere_and_its_retries_are_spent(database: str) -> None:
    """Stopped, loaded from SQLite into another graph object with another model, and gone on."""
    with SqliteSaver.from_conn_string(database) as saver:
        agent, _ = agent_of([said("a", 0.1), said("b", 0.2)], saver, action=("retry", "stop"))
        [stop] = agent.invoke({"messages": "q"}, CONFIG)["__interrupt__"]
    with SqliteSaver.from_conn_string(database) as saver:
        agent, model = agent_of([said("c", 0.1)], saver, action=("retry", "stop"))
        assert agent.get_state(CONFIG).interrupts[0].value == stop.value
        [stop] = agent.invoke(Command(resume={"type": "reject"}), CONFIG)["__interrupt__"]
        assert (stop.value["answer"], len(model.calls)) == ("c", 1), "the run had its one retry before it was stopped"
    with SqliteSaver.from_conn_string(database) as saver:
        agent, model = agent_of([said("d", 0.1), said("e", 0.9)], saver, action=("retry", "stop"))
        text, about = last(agent.invoke(Command(resume={"type": "approve"}), CONFIG))
        assert (text, about["review"], len(model.calls)) == ("c", "approve", 0)
        found = agent.invoke({"messages": "next"}, CONFIG)  # a run of its own has a retry of its own
        assert (last(found)[0], len(model.calls)) == ("e", 2)
        assert self_evaluation(found["messages"][-3])["review"] == "approve"  # type: ignore[index]


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": -0.1},
        {"action": "think"},
        {"action": ()},
        {"action": ("retry", "retry")},
        {"action": "escalate"},
        {"escalate_to": ScriptedChat(answers=[])},
        {"retry_settings": {"mode": "slow"}},
        {"max_retries": 2},
        {"action": "retry", "max_retries": 0},
        {"keep": "first"},
        {"missing": "ignore"},
    ],
)
def test_arguments_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        SelfEvaluationMiddleware(**{"threshold": 0.5, **wrong})


def test_without_langchain_it_says_what_to_install() -> None:
    """In a process of its own, where the package can't be found."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "langchain" else find(name, *a)
from langchain_kvroute import SelfEvaluationCallbackHandler
try:
    from langchain_kvroute import SelfEvaluationMiddleware
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'kvroute[langchain-agents]'" in ran.stdout
