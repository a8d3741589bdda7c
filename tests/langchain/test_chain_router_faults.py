"""What goes wrong around KVRouteRouter costs a decision, never the answer, and leaves nothing of a prompt in logs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import thinker
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from thinker import MODEL, POLICY, Seen, chat, questions

from kvroute import (
    DifficultyHead,
    Policy,
    Router,
    ServerTimeoutError,
    ServerUnreachableError,
    ThinkingMode,
    TokenIds,
    TransformersEngine,
    VLLMClient,
)
from kvroute.serving import servers
from kvroute.serving.about import About
from langchain_kvroute import ChatKVRoute, KVRouteRouter, branch_choice
from vllm_stand_in import StandIn

SECRET = "the word is xyzzy"
ASK = ChatPromptTemplate.from_messages([("user", "{question}")])
QUESTIONS = questions(6)
INPUTS = [{"question": q} for q in QUESTIONS]


@pytest.fixture(autouse=True)
def _untold() -> None:
    branch_choice._told.clear()


def marked(name: str) -> RunnableLambda:
    return RunnableLambda(lambda _: name)


class Gone:
    """A router whose engine is not there."""

    policy = Policy(tau=12.0)
    engine = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def prefill_many(self, prompts: list[Any], **_: Any) -> list[Any]:
        raise self.error


def routed(router: Any, **fields: Any) -> KVRouteRouter:
    return KVRouteRouter(router, ASK | marked("fast"), ASK | marked("slow"), **fields)


# ------------------------------------------------------------------ the engine


@pytest.mark.parametrize(
    "error",
    [
        ServerUnreachableError("No server answers."),
        ServerTimeoutError("The server took longer than 3 s."),
        RuntimeError(f"CUDA error while reading {SECRET}"),
    ],
    ids=["gone", "timeout", "other"],
)
async def test_a_failing_decision_takes_the_default(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    given = {"question": SECRET}
    for default, expected in ((None, "slow"), ("fast", "fast")):
        router, seen = routed(Gone(error), default=default, include_decision=True), Seen()
        found = [
            router.invoke(given, {"callbacks": [seen]}),
            await router.ainvoke(given),
            *router.batch([given] * 2),
            *(await router.abatch([given] * 2)),
        ]
        assert [f["output"] for f in found] == [expected] * 6
        assert {f["kvroute"]["decision"]["why"] for f in found} == {"fault"}
        assert str(error) in found[0]["kvroute"]["faults"][0]
        assert [p["output"] for p in router.stream(given) if "output" in p] == [expected]
        [child] = seen.tagged(f"branch:{expected}")
        assert child["metadata"]["kvroute_why"] == "fault"
        assert seen.root()["end"] == found[0]
    warned = [r for r in caplog.records if r.levelno == logging.WARNING and r.name == "kvroute.langchain"]
    assert len(warned) == 2  # once for each default
    assert all(type(error).__name__ in r.getMessage() for r in warned)
    assert SECRET not in caplog.text


def test_the_policys_fallback_is_the_default() -> None:
    gone = Gone(RuntimeError())
    gone.policy = Policy(tau=12.0, fallback="fast")
    assert routed(gone).invoke(INPUTS[0]) == "fast"
    assert routed(gone, default="slow").invoke(INPUTS[0]) == "slow"


def test_a_model_that_cannot_be_opened(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    fields = {"fast": ASK | marked("fast"), "slow": ASK | marked("slow"), "include_decision": True}
    router = KVRouteRouter(model=str(tmp_path / "none"), policy="fast", **fields)
    found = router.invoke(INPUTS[0])
    assert found["output"] == "slow"
    assert "none" in found["kvroute"]["faults"][0]
    other = KVRouteRouter(model=MODEL, policy=str(tmp_path / "none.json"), **fields)
    assert "none.json" in other.invoke(INPUTS[0])["kvroute"]["faults"][0]
    unreachable = KVRouteRouter(base_url="http://127.0.0.1:9", policy="default", **fields)
    assert unreachable.invoke(INPUTS[0])["output"] == "slow"


@pytest.mark.parametrize("default", [None, "fast"])
def test_a_failing_head_is_the_routers_fault_and_the_default_is_ours(
    default: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = routed(thinker.router(), default=default, include_decision=True)
    monkeypatch.setattr(DifficultyHead, "predict", lambda *_: 1 / 0)
    for found in (router.invoke(INPUTS[0]), *router.batch(INPUTS[:2])):
        assert found["output"] == found["kvroute"]["mode"] == (default or "slow")
        assert found["kvroute"]["decision"]["why"] == "fault"
        assert "ZeroDivisionError" in found["kvroute"]["faults"][0]


# ------------------------------------------------------------------ a server that decides


def deciding(port: int = 0) -> StandIn:
    """Says what it runs as ``kvroute serve`` does, and decides by the thinker's own policy."""
    server, engine, router = StandIn(port=port), thinker.engine(), thinker.router()
    told = Policy(kind="one-step", tau=12.0)
    server.about = About("1", True, engine.info, thinking=ThinkingMode.of(engine), policies={"mine": told}).to_dict()
    server.result = lambda body, _: {"kvroute": {"decision": router.decide(TokenIds(tuple(body["prompt"]))).to_dict()}}
    return server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(servers, "_PAUSE", 0.01)
    monkeypatch.setattr(servers, "_LONGEST_PAUSE", 0.02)
    with deciding() as it:
        yield it


async def every_way(router: KVRouteRouter) -> list[Any]:
    """What each way of calling gives for the first inputs."""
    given = INPUTS[:3]
    streamed = [p async for p in router.astream(given[0])]
    return [
        router.invoke(given[0]),
        await router.ainvoke(given[0]),
        *router.batch(given),
        *(await router.abatch(given)),
        {"output": streamed[-1]["output"], "kvroute": streamed[0]["kvroute"]},
    ]


@pytest.mark.parametrize(("default", "expected"), [(None, "slow"), ("fast", "fast")])
async def test_a_server_that_is_gone_and_comes_back(server: StandIn, default: str | None, expected: str) -> None:
    alone = [routed(thinker.router()).invoke(i) for i in INPUTS]
    assert set(alone) == {"fast", "slow"}
    with VLLMClient(server.url, tokenizer=MODEL, retries=0, connect_timeout=0.5) as client:
        router = routed(Router(client, "mine"), default=default, include_decision=True)
        for found in (router.batch(INPUTS), [await router.ainvoke(i) for i in INPUTS]):
            assert [f["output"] for f in found] == alone
            assert not any(f["kvroute"]["faults"] for f in found)
        server.die()
        seen = Seen()
        assert router.invoke(INPUTS[0], {"callbacks": [seen]})["output"] == expected
        assert seen.tagged(f"branch:{expected}")[0]["metadata"]["kvroute_why"] == "fault"
        for one in await every_way(router):
            assert one["output"] == expected
            assert one["kvroute"]["decision"]["why"] == "fault"
            assert f"{server.url} can't be reached" in one["kvroute"]["faults"][0]
        with deciding(server.port):
            again = router.batch(INPUTS)
            assert [f["output"] for f in again] == alone
            assert not any(f["kvroute"]["faults"] for f in again)


async def test_a_server_that_is_too_slow(server: StandIn) -> None:
    hard = next(i for i in INPUTS if routed(thinker.router()).invoke(i) == "slow")
    with VLLMClient(server.url, tokenizer=MODEL, timeout=1.0, retries=0) as client:
        router = routed(Router(client, "mine"), default="fast", include_decision=True)
        assert router.invoke(hard)["output"] == "slow"
        server.delay = 4.0
        for one in (router.invoke(hard), *(await router.abatch([hard] * 3))):
            assert one["output"] == "fast"
            assert one["kvroute"]["decision"]["why"] == "fault"
            assert "gave no answer for 1 seconds" in one["kvroute"]["faults"][0]
        server.delay = 0.0
        assert router.invoke(hard)["output"] == "slow"


def test_a_batch_asks_a_slow_server_once(server: StandIn) -> None:
    """Prompts are not tried one by one where it is the server that fails: each would wait as long as all."""
    with VLLMClient(server.url, tokenizer=MODEL, timeout=0.5, retries=0) as client:
        router = routed(Router(client, "mine"), include_decision=True)
        server.delay = 2.0
        found = router.batch(INPUTS)
        assert [f["kvroute"]["decision"]["why"] for f in found] == ["fault"] * len(INPUTS)
        assert len(server.requests) == len(INPUTS)


def test_a_named_server_that_is_gone_at_first(server: StandIn) -> None:
    server.die()
    router = KVRouteRouter(
        base_url=server.url, model=MODEL, policy="mine",
        fast=ASK | marked("fast"), slow=ASK | marked("slow"), include_decision=True,
    )  # fmt: skip
    found = router.invoke(INPUTS[0])
    assert found["output"] == "slow"
    assert "can't be reached" in found["kvroute"]["faults"][0]
    with deciding(server.port):
        alone = routed(thinker.router()).batch(INPUTS)
        assert [f["output"] for f in router.batch(INPUTS)] == alone
    router._chooser.handle.get().engine.close()


# ------------------------------------------------------------------ the input


def test_one_bad_input_in_a_batch_costs_its_own_decision(caplog: pytest.LogCaptureFixture) -> None:
    """Too long for the model, without the template's variable, of a type that is no prompt: the others are decided."""
    long = {"question": "top " + "11," * 4000}
    router = routed(thinker.router(), include_decision=True)
    alone = [router.invoke(i)["output"] for i in INPUTS]
    found = router.batch([*INPUTS, long, *INPUTS])
    assert [f["output"] for f in found] == [*alone, "slow", *alone]
    assert [bool(f["kvroute"]["faults"]) for f in found] == [False] * 6 + [True] + [False] * 6
    bare = KVRouteRouter(thinker.router(), marked("fast"), marked("slow"), include_decision=True)
    fine, odd = bare.batch([QUESTIONS[0], 3])
    assert not fine["kvroute"]["faults"]
    assert odd["output"] == "slow"
    assert "Pass prompt=" in odd["kvroute"]["faults"][0]
    assert asyncio.run(bare.abatch([QUESTIONS[0], 3]))[1]["output"] == "slow"


def test_a_missing_variable_is_the_branchs_error_not_ours() -> None:
    router = routed(thinker.router())
    with pytest.raises(KeyError, match="question"):
        router.invoke({"other": 1})
    fine, error = router.batch([INPUTS[0], {"other": 1}], return_exceptions=True)
    assert fine in ("fast", "slow")
    assert isinstance(error, KeyError)


def test_a_prompt_function_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    def prompt(given: Any) -> str:
        raise ValueError(given)

    router = KVRouteRouter(
        thinker.router(), marked("fast"), marked("slow"), prompt=prompt, include_decision=True, default="fast"
    )
    found = [router.invoke(SECRET), *router.batch([SECRET]), asyncio.run(router.ainvoke(SECRET))]
    assert [f["output"] for f in found] == ["fast"] * 3
    assert all("ValueError" in f["kvroute"]["faults"][0] for f in found)
    assert SECRET not in caplog.text


# ------------------------------------------------------------------ the branch


@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream"])
async def test_a_branchs_error_is_the_callers(how: str) -> None:
    broken = RunnableLambda(lambda _: 1 / 0)
    router, seen = KVRouteRouter(thinker.router(), broken, broken), Seen()
    config: Any = {"callbacks": [seen]}

    async def call() -> None:
        if how == "invoke":
            router.invoke(QUESTIONS[0], config)
        elif how == "ainvoke":
            await router.ainvoke(QUESTIONS[0], config)
        elif how == "stream":
            list(router.stream(QUESTIONS[0], config))
        else:
            _ = [p async for p in router.astream(QUESTIONS[0], config)]

    with pytest.raises(ZeroDivisionError):
        await call()
    assert isinstance(seen.root()["end"], ZeroDivisionError)


async def test_return_exceptions() -> None:
    def picky(given: Any) -> str:
        if given.to_messages()[0].content == QUESTIONS[1]:
            raise ValueError("not this one")
        return "ok"

    branch = ASK | RunnableLambda(picky)
    router, seen = KVRouteRouter(thinker.router(), branch, branch), Seen()
    for found in (
        router.batch(INPUTS, {"callbacks": [seen]}, return_exceptions=True),
        await router.abatch(INPUTS, return_exceptions=True),
    ):
        assert [str(f) for f in found] == ["ok", "not this one", *["ok"] * 4]
    ends = [run["end"] for run in seen.runs.values() if run["parent"] is None]
    assert [isinstance(end, ValueError) for end in ends].count(True) == 1
    with pytest.raises(ValueError, match="not this one"):
        router.batch(INPUTS)
    with pytest.raises(ValueError, match="not this one"):
        await router.abatch(INPUTS)


async def test_a_cancelled_task_cancels_the_branch() -> None:
    begun, ended = asyncio.Event(), []

    async def slow(_: Any) -> str:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "never"

    def never(_: Any) -> str:
        raise AssertionError

    branch = RunnableLambda(never, afunc=slow)
    router, seen = KVRouteRouter(thinker.router(), branch, branch), Seen()
    for call in (lambda: router.ainvoke(QUESTIONS[0], {"callbacks": [seen]}), lambda: router.abatch(QUESTIONS[:2])):
        begun.clear()
        task = asyncio.create_task(call())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["cancelled"] * 3
    assert isinstance(seen.root()["end"], asyncio.CancelledError)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(router.ainvoke(QUESTIONS[0]), 0.3)


async def test_leaving_a_stream_ends_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's answer would be 150 tokens; only some are written."""
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=150)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    hard = {"question": next(q for q in QUESTIONS if thinker.router().decide(chat(q)).mode == "slow")}
    shapes: list[tuple[int, int]] = []
    with thinker.counted(shapes):
        whole = [p async for p in router.astream(hard)]
    steps = len(shapes)
    assert len(whole) > 10
    shapes.clear()
    with thinker.counted(shapes):
        pieces = router.astream(hard)
        await anext(pieces)
        await pieces.aclose()
        await asyncio.sleep(0.2)
    assert len(shapes) < steps
    assert not [t for t in threading.enumerate() if t.name == "kvroute-stream"]
    shapes.clear()
    with thinker.counted(shapes):
        reading = router.stream(hard)
        next(reading)
        reading.close()
    assert len(shapes) < steps


# ------------------------------------------------------------------ callbacks and hooks


class Raising(BaseCallbackHandler):
    def on_chain_start(self, *_: Any, **__: Any) -> None:
        raise ValueError("a handler's own fault")

    on_chain_end = on_chain_start


async def test_a_callback_or_hook_that_raises_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def hook(*_: Any) -> None:
        raise ValueError(SECRET)

    config: Any = {"callbacks": [Raising()]}
    router = routed(thinker.router(), on_decision=hook)
    alone = [routed(thinker.router()).invoke(i) for i in INPUTS]
    assert [router.invoke(i, config) for i in INPUTS] == alone
    assert [await router.ainvoke(i, config) for i in INPUTS] == alone
    assert router.batch(INPUTS, config) == alone
    assert await router.abatch(INPUTS, config) == alone
    assert [r.getMessage() for r in caplog.records if "on_decision" in r.getMessage()] == [
        "kvroute: on_decision failed: ValueError. Logged once of each kind."
    ]
    assert SECRET not in caplog.text


# ------------------------------------------------------------------ loops, threads, logs


def test_two_event_loops_and_threads() -> None:
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=24)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    alone = [router.invoke(i).content for i in INPUTS]

    def in_a_loop(_: int) -> list[str]:
        async def run() -> list[str]:
            return [m.content for m in await asyncio.gather(*(router.ainvoke(i) for i in INPUTS))]

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(in_a_loop, i) for i in range(2)]
        calls = [pool.submit(lambda i: router.invoke(i).content, i) for i in INPUTS]
        assert [loop.result() for loop in loops] == [alone] * 2
        assert [call.result() for call in calls] == alone


def test_a_router_by_name_is_opened_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    load = TransformersEngine.from_pretrained
    monkeypatch.setattr(
        TransformersEngine, "from_pretrained", lambda *a, **k: opened.append(1) or load(*a, **k), raising=True
    )
    router = KVRouteRouter(
        model=MODEL, policy=POLICY, dtype="bfloat16", fast=ASK | marked("fast"), slow=ASK | marked("slow")
    )
    assert not opened
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(router.invoke, INPUTS))
    assert len(opened) == 1
    assert set(found) <= {"fast", "slow"}


def test_nothing_of_the_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=8)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    router.invoke({"question": SECRET})
    router.batch([{"question": SECRET}] * 2)
    assert isinstance(router.router, Router)
    assert "xyzzy" not in caplog.text
    assert "xyzzy" not in repr(router)
