"""LangChain on a real vLLM server on CPU with the tiny thinker: the chat model, and langchain-openai."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_openai")

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from kvroute import Router, ServerUnreachableError, TransformersEngine, VLLMClient
from langchain_kvroute import ChatKVRoute, ChatOpenAIKVRoute, KVRouteRouter, kvroute_ask, kvroute_metadata
from tests.serving.http_server import Running, free_port, running
from tests.serving.processes import ROOT
from tests.unit.test_router import constant

sys.path[:0] = [str(ROOT / "examples" / "tiny_thinker"), str(ROOT / "tests" / "langchain")]

from standard_tests import TOOLS, WEAK, expected_to_fail  # noqa: E402

import questions as made  # noqa: E402

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples" / "tiny_thinker"
MODEL = THINKER / "model"
KEY = "sesame"
SURE = 73.0
"""What the server's confidence head is made to say, before its map."""
QUESTIONS = [row["question"] for row in made.make_questions(12, 5)]


@tool
def calculator(expression: str) -> str:
    """Multiplies and adds whole numbers."""
    left, sign, right = expression.partition("+") if "+" in expression else expression.partition("*")
    return str(int(left) + int(right) if sign == "+" else int(left) * int(right))


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def command(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Starts a server with a policy and a confidence head."""
    policies, heads = tmp_path_factory.mktemp("policies"), tmp_path_factory.mktemp("heads")
    for name in ("policy.json", "policy.drift.safetensors"):
        shutil.copy(THINKER / name, policies)
    shutil.copytree(THINKER / "head", policies / "head")
    constant(engine, SURE, target="correct").save(heads / "sure")
    found = [sys.executable, "-m", "kvroute.cli", "serve", str(MODEL), "--policy", str(policies), "--heads", str(heads)]
    found += ["--name", "thinker", "--enforce-eager", "--max-model-len", "384", "--dtype", "float32"]
    return [*found, "--max-num-seqs", "16", "--api-key", KEY]


@pytest.fixture(scope="module")
def server(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    log = tmp_path_factory.mktemp("log") / "log"
    with running([*command, "--port", str(port)], port, log, patience=400) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[VLLMClient]:
    with VLLMClient(server.url, tokenizer=MODEL, api_key=KEY) as it:
        yield it


def summed(pieces: list[Any]) -> Any:
    found = pieces[0]
    for piece in pieces[1:]:
        found = found + piece
    return found


# ---------------------------------------------------------------------- the chat model


@pytest.mark.parametrize("fields", [{}, {"mode": "fast"}, {"mode": "slow"}, {"policy": "policy"}], ids=str)
async def test_it_says_what_it_says_on_transformers(client, engine, fields: dict[str, Any]) -> None:
    policy = {"policy": THINKER / "policy.json"} if "policy" in fields else {}
    here = ChatKVRoute(engine=engine, max_tokens=120, **{**fields, **policy})
    there = ChatKVRoute(engine=client, max_tokens=120, **fields)
    mine = here.batch(QUESTIONS)
    for found in (there.batch(QUESTIONS), await there.abatch(QUESTIONS)):
        same = sum(
            (a.content, a.additional_kwargs) == (b.content, b.additional_kwargs)
            for a, b in zip(found, mine, strict=True)
        )
        assert same >= len(QUESTIONS) - 1  # two tokens may be as likely, and rounding decides
    whole = there.invoke(QUESTIONS[0])
    about = kvroute_metadata(whole)
    assert about is not None
    assert whole.response_metadata["model_name"] == "thinker"
    assert about["faults"] == []
    if "policy" in fields:
        assert about["difficulty"] == pytest.approx(kvroute_metadata(mine[0])["difficulty"], abs=0.5)  # type: ignore[index]
    for pieces in (list(there.stream(QUESTIONS[0])), [p async for p in there.astream(QUESTIONS[0])]):
        streamed = summed(pieces)
        assert streamed.content == whole.content
        assert streamed.additional_kwargs == whole.additional_kwargs
        assert streamed.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
        assert len(pieces) > 3 or about["mode"] == "fast"


def test_a_tool_loop(client) -> None:
    import random

    rng = random.Random(5)
    for fields in ({}, {"policy": "policy"}):
        chat = ChatKVRoute(engine=client, max_tokens=100, **fields).bind_tools([calculator])
        right = 0
        for _ in range(4):
            [question, *_], result = made.make_tool_chat(rng)
            asked = HumanMessage(question["content"])
            called = chat.invoke([asked])
            [call] = called.tool_calls
            said = calculator.invoke(call)
            right += result in chat.invoke([asked, called, said]).text
            assert summed(list(chat.stream([asked]))).tool_calls[0]["args"] == call["args"]
        assert right >= 3
    [question, *_], _ = made.make_tool_chat(rng)
    demanded = ChatKVRoute(engine=client, max_tokens=100).bind_tools([calculator], tool_choice="any")
    assert [c["name"] for c in demanded.invoke(question["content"]).tool_calls] == ["calculator"]


@pytest.mark.parametrize("fields", [{}, {"mode": "slow"}, {"policy": "policy"}], ids=str)
def test_a_head_of_the_servers_tells_a_confidence(client, engine, fields: dict[str, Any]) -> None:
    head = constant(engine, SURE, target="correct")
    wanted = float(head.predict(engine.pool([[1, 2, 3]], [head.spec])[0])[0])
    chat = ChatKVRoute(engine=client, max_tokens=100, confidence="sure", features=["length"], **fields)
    for message in (chat.invoke(QUESTIONS[1]), summed(list(chat.stream(QUESTIONS[1])))):
        about = kvroute_metadata(message)
        assert about is not None
        assert about["confidence"] == pytest.approx(wanted, abs=1e-4)
        assert about["confidence_reason"] is None
        assert about["scores"]["length"]["value"] == message.usage_metadata["output_tokens"]


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "batch", "abatch"])
async def test_a_router_of_chains_decides_on_the_server(client, engine, how: str) -> None:
    """The server's policy decides, as the same policy does on transformers; a branch on the same engine tells the
    decision."""
    branches = {mode: ChatKVRoute(engine=client, max_tokens=8).with_config(tags=[mode]) for mode in ("fast", "slow")}
    routed = KVRouteRouter(router=Router(client, "policy"), include_decision=True, **branches)
    few = QUESTIONS[:4]
    if how in ("invoke", "batch"):
        found = routed.batch(few) if how == "batch" else [routed.invoke(q) for q in few]
    else:
        found = await routed.abatch(few) if how == "abatch" else [await routed.ainvoke(q) for q in few]
    chats = [[{"role": "user", "content": q}] for q in few]
    expected = Router(engine, THINKER / "policy.json").decide_many(chats)
    for one, here in zip(found, expected, strict=True):
        told = one["kvroute"]
        assert told["faults"] == []
        assert told["mode"] == here.mode
        assert told["difficulty"] == pytest.approx(here.difficulty, abs=0.5)
        about = kvroute_metadata(one["output"])
        assert about is not None
        assert about["faults"] == []
        assert about["mode"] == here.mode


async def test_a_named_model(server: Running) -> None:
    chat = ChatKVRoute(model=str(MODEL), base_url=server.url, api_key=KEY, policy="policy", max_tokens=100)  # type: ignore[arg-type]
    assert kvroute_metadata(await chat.ainvoke(QUESTIONS[0]))["decision"]["policy"] == "two-step"  # type: ignore[index]
    chat.opened().close()


async def test_a_cancelled_task_ends_the_work_there(client, server: Running) -> None:
    chat = ChatKVRoute(engine=client, mode="slow", max_tokens=300, temperature=2.0, seed=1)
    running_call = asyncio.create_task(chat.ainvoke(QUESTIONS[0]))
    await asyncio.sleep(0.3)
    running_call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running_call
    assert chat.invoke(QUESTIONS[0], temperature=0).text


@expected_to_fail(WEAK, *TOOLS)
class TestStandard(ChatModelIntegrationTests):
    """LangChain's standard tests."""

    @pytest.fixture(autouse=True)
    def _asks(self, client: VLLMClient) -> None:
        self._engine = client

    @property
    def chat_model_class(self) -> type[ChatKVRoute]:
        return ChatKVRoute

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self._engine, "policy": "policy", "max_tokens": 64}


# ---------------------------------------------------------------------- langchain-openai


def fields(server: Running, **more: Any) -> dict[str, Any]:
    return {
        "model": "thinker",
        "base_url": f"{server.url}/v1",
        "api_key": KEY,
        "max_tokens": 120,
        "temperature": 0,
        **more,
    }


def test_plain_chat_openai_has_the_headers(server: Running) -> None:
    asked = kvroute_ask(policy="policy", confidence="sure")
    message = ChatOpenAI(**fields(server, extra_body=asked, include_response_headers=True)).invoke(QUESTIONS[0])
    headers = message.response_metadata["headers"]
    assert 0 <= float(headers["x-kvroute-difficulty"]) <= 100
    assert headers["x-kvroute-mode"] in ("fast", "slow")
    assert 0 <= float(headers["x-kvroute-confidence"]) <= 1


async def test_all_of_it_through_langchain_openai(client, server: Running) -> None:
    """In one event loop: langchain-openai shares its connections among models, and they stay with the first loop."""
    asked = kvroute_ask(policy="policy", confidence="sure", features=["length", "prompt:paper-mteb"])
    chat = ChatOpenAIKVRoute(**fields(server, extra_body=asked))
    routed = kvroute_metadata(ChatKVRoute(engine=client, policy="policy", max_tokens=120).invoke(QUESTIONS[0]))
    whole = chat.invoke(QUESTIONS[0])
    messages = [whole, await chat.ainvoke(QUESTIONS[0]), summed(list(chat.stream(QUESTIONS[0])))]
    messages.append(summed([p async for p in chat.astream(QUESTIONS[0])]))
    for usage in (True, False):  # the last chunk is that of the usage, or that of the finish reason
        with_usage = chat.model_copy(update={"stream_usage": usage})
        messages.append(summed(list(with_usage.stream(QUESTIONS[0]))))
    for message in messages:
        about = kvroute_metadata(message)
        assert about is not None
        assert routed is not None
        assert about["difficulty"] == pytest.approx(routed["difficulty"], abs=0.5)
        assert about["mode"] == routed["mode"]
        assert about["confidence"] is not None
        assert len(about["features"]["prompt:paper-mteb"]) > 10
        assert about["tokens"]["answer"] > 0
        assert about["faults"] == []
        assert message.content == whole.content
    forced = chat.bind(extra_body=kvroute_ask(mode="fast")).invoke(QUESTIONS[0])
    assert kvroute_metadata(forced)["mode"] == "fast"  # type: ignore[index]


def test_an_ask_that_cannot_be_done_costs_itself_alone(server: Running) -> None:
    message = ChatOpenAIKVRoute(**fields(server, extra_body=kvroute_ask(policy="none-such"))).invoke(QUESTIONS[0])
    about = kvroute_metadata(message)
    assert message.content
    assert about is not None
    assert "none-such" in about["faults"][0]


# ---------------------------------------------------------------------- the last one: it ends the server


def test_a_server_that_restarts(server: Running, command: list[str], tmp_path: Path) -> None:
    port = server.url.rpartition(":")[2]
    with VLLMClient(server.url, tokenizer=MODEL, api_key=KEY, retries=0) as client:
        chat = ChatKVRoute(engine=client, policy="policy", max_tokens=100)
        first = chat.invoke(QUESTIONS[0])
        server.end()
        with pytest.raises(ServerUnreachableError):
            chat.invoke(QUESTIONS[0])
        with running([*command, "--port", port], int(port), tmp_path / "log", patience=400):
            end = time.monotonic() + 60
            while True:
                try:
                    again = chat.invoke(QUESTIONS[0])
                    break
                except ServerUnreachableError:
                    assert time.monotonic() < end
                    time.sleep(0.5)
        assert again.content == first.content
