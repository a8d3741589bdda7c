"""Self-evaluation in a real agent loop: the tiny thinker with its calculator, its answers and its confidence."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command

from kvroute import TransformersEngine, VLLMClient
from kvroute.checkers import check
from langchain_kvroute import ChatKVRoute, SelfEvaluationCallbackHandler, SelfEvaluationMiddleware, self_evaluation

THINKER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
CONFIG: Any = {"configurable": {"thread_id": "t"}}
HARD = "run a=7 b=7;1b=7;2a=8;3a*3;4b*a;5b+2;6a*b"
"""Answered at once, this is a guess."""


@tool
def calculator(expression: str) -> str:
    """Multiplies and adds whole numbers."""
    sign = "+" if "+" in expression else "*"
    left, right = map(int, expression.split(sign))
    return str(left + right if sign == "+" else left * right)


@pytest.fixture(scope="module")
def model(thinker: TransformersEngine) -> ChatKVRoute:
    return ChatKVRoute(engine=thinker, mode="fast", confidence=THINKER / "confidence", max_tokens=192)


@pytest.fixture(scope="module")
def asked() -> list[tuple[str, str]]:
    """Questions that nothing was trained on, and their answers; every fourth needs the calculator."""
    from questions import make_question, make_tool_chat

    rng = random.Random("an agent's")
    found = []
    for place in range(32):
        made, (chat, result) = make_question(rng), make_tool_chat(rng)
        found.append((chat[0]["content"], result) if place % 4 == 3 else (made.question, made.answer))
    return found


def agent_of(model: ChatKVRoute, *middleware: Any, **more: Any) -> Any:
    return create_agent(model, tools=[calculator], middleware=list(middleware), **more)


def test_the_agent_calls_its_tool_and_says_the_result(model: ChatKVRoute) -> None:
    agent = agent_of(model, SelfEvaluationMiddleware(threshold=0.5, evaluate_tool_calls=True))
    asked, call, told, answer = agent.invoke({"messages": "sum 17*23"})["messages"]
    assert isinstance(asked, HumanMessage)
    assert [(c["name"], c["args"]) for c in call.tool_calls] == [("calculator", {"expression": "17*23"})]
    assert isinstance(told, ToolMessage)
    assert told.content == "391"
    assert answer.text == "it gives 391."
    for message in (call, answer):
        about = self_evaluation(message)
        assert about is not None
        assert 0 <= about["confidence"] <= 1  # type: ignore[operator]
        assert about["confidence"] == message.response_metadata["kvroute"]["confidence"]


def test_answers_of_low_confidence_are_thought_about_and_become_right(
    model: ChatKVRoute, asked: list[tuple[str, str]]
) -> None:
    """With and without the middleware: answers right, tokens, and that both ways of counting them agree."""
    right, tokens = {"plain": 0, "slow": 0, "doubting": 0}, {}
    agents = {
        "plain": agent_of(model),
        "slow": agent_of(model.model_copy(update={"mode": "slow"})),
        "doubting": agent_of(model, SelfEvaluationMiddleware(threshold=0.5, action="retry")),
    }
    retried = 0
    for name, agent in agents.items():
        watch = SelfEvaluationCallbackHandler(threshold=0.5)
        for question, expected in asked:
            answer = agent.invoke({"messages": question}, {"callbacks": [watch]})["messages"][-1]
            right[name] += check(str(answer.text), expected, "number").correct
            if name == "doubting":
                about = self_evaluation(answer)
                assert about is not None
                modes = [a["mode"] for a in about["attempts"]]
                first = about["attempts"][0]["confidence"]
                assert first is not None
                assert modes == (["fast", "slow"] if first < 0.5 else ["fast"])
                retried += len(modes) > 1
        tokens[name] = sum(r.tokens["answer"] for r in watch.records)
        assert watch.summary()["without"] == {}
    assert right["doubting"] >= right["plain"] + 5
    assert 5 < retried < 26
    assert tokens["plain"] < tokens["doubting"] < 1.2 * tokens["slow"]


async def test_an_async_agent_does_the_same(model: ChatKVRoute, asked: list[tuple[str, str]]) -> None:
    agent = agent_of(model, SelfEvaluationMiddleware(threshold=0.5, action="retry"))
    for question, _ in asked[:8]:
        one = agent.invoke({"messages": question})["messages"][-1]
        two = (await agent.ainvoke({"messages": question}))["messages"][-1]
        assert one.text == two.text
        assert [a["confidence"] for a in self_evaluation(one)["attempts"]] == pytest.approx(  # type: ignore[index]
            [a["confidence"] for a in self_evaluation(two)["attempts"]],
            abs=1e-5,  # type: ignore[index]
        )


def test_a_stopped_agent_goes_on_from_its_database(model: ChatKVRoute, tmp_path: Path) -> None:
    """A threshold above its confidence, so that it stops; resumed by another agent from the file."""
    database = str(tmp_path / "runs.sqlite")
    how: dict[str, Any] = {"threshold": 1.0, "action": ("retry", "stop")}
    with SqliteSaver.from_conn_string(database) as saver:
        agent = agent_of(model, SelfEvaluationMiddleware(**how), checkpointer=saver)
        [stop] = agent.invoke({"messages": HARD}, CONFIG)["__interrupt__"]
        assert [a["mode"] for a in stop.value["evaluation"]["attempts"]] == ["fast", "slow"]
    with SqliteSaver.from_conn_string(database) as saver:
        agent = agent_of(model, SelfEvaluationMiddleware(**how), checkpointer=saver)
        watch = SelfEvaluationCallbackHandler()
        found = agent.invoke(Command(resume={"type": "approve"}), {**CONFIG, "callbacks": [watch]})
        assert found["messages"][-1].text == stop.value["answer"]
        assert self_evaluation(found["messages"][-1])["review"] == "approve"  # type: ignore[index]
        assert watch.summary()["answers"] == 0, "no model was asked again"


def test_a_server_that_is_gone_costs_only_the_escalation(model: ChatKVRoute) -> None:
    with VLLMClient("http://127.0.0.1:9", tokenizer=str(THINKER / "model"), retries=0) as gone:
        doubt = SelfEvaluationMiddleware(threshold=1.0, action="escalate", escalate_to=ChatKVRoute(engine=gone))
        answer = agent_of(model, doubt).invoke({"messages": HARD})["messages"][-1]
    about = self_evaluation(answer)
    assert isinstance(answer, AIMessage)
    assert about is not None
    assert about["kept"] == 0
    assert about["attempts"][1]["fault"] == "ServerUnreachableError"
    assert answer.text


def test_without_a_head_the_agent_goes_on_and_says_why(thinker: TransformersEngine) -> None:
    bare = ChatKVRoute(engine=thinker, mode="fast", max_tokens=192)
    answer = agent_of(bare, SelfEvaluationMiddleware(threshold=0.5, action="retry")).invoke({"messages": HARD})
    about = self_evaluation(answer["messages"][-1])
    assert about is not None
    assert (about["confidence"], len(about["attempts"])) == (None, 1)
    assert "head" in str(about["reason"])
