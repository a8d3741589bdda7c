"""KVRouteRouter as a Runnable: decides as the router does, and is in all else what RunnableBranch is."""

from __future__ import annotations

import asyncio
import copy
import pickle
import time
from typing import Any

import pytest
import thinker
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import ConfigurableField, RunnableBranch, RunnableLambda, RunnablePassthrough
from pydantic import ValidationError
from thinker import MODEL, POLICY, Seen, chat, questions

from kvroute import InvalidInputError, Policy, Router
from langchain_kvroute import ChatKVRoute, KVRouteRouter

ASK = ChatPromptTemplate.from_messages([("user", "{question}")])
QUESTIONS = questions(10)
INPUTS = [{"question": q} for q in QUESTIONS]


def marked(name: str) -> RunnableLambda:
    return RunnableLambda(lambda _: name, name=f"{name} chain")


def plain(**fields: Any) -> KVRouteRouter:
    return KVRouteRouter(thinker.router(), ASK | marked("fast"), ASK | marked("slow"), **fields)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    modes = [d.mode for d in thinker.router().decide_many([chat(q) for q in QUESTIONS])]
    assert set(modes) == {"fast", "slow"}
    return modes


# ------------------------------------------------------------------ which branch


def test_invoke_decides_as_the_router_does(expected: list[str]) -> None:
    router = plain()
    assert [router.invoke(i) for i in INPUTS] == expected


async def test_ainvoke(expected: list[str]) -> None:
    router = plain()
    assert [await router.ainvoke(i) for i in INPUTS] == expected
    assert await asyncio.gather(*(router.ainvoke(i) for i in INPUTS)) == expected


def test_batch_decides_in_one_run_and_keeps_order(expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    router, calls = plain(), []
    decide = Router.prefill_many
    monkeypatch.setattr(
        Router, "prefill_many", lambda self, prompts, **how: calls.append(len(prompts)) or decide(self, prompts, **how)
    )
    assert router.batch(INPUTS) == expected
    assert router.batch(INPUTS, {"max_concurrency": 2}) == expected
    assert router.batch([]) == []
    assert calls == [len(INPUTS)] * 2


async def test_abatch(expected: list[str]) -> None:
    assert await plain().abatch(INPUTS) == expected
    assert await plain().abatch(INPUTS, {"max_concurrency": 1}) == expected
    assert await plain().abatch([]) == []


async def test_batch_as_completed(expected: list[str]) -> None:
    assert [mode for _, mode in sorted(plain().batch_as_completed(INPUTS))] == expected


def test_max_concurrency_holds_over_all_branches() -> None:
    now, most = [0], [0]

    def work(_: Any) -> str:
        now[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.02)
        now[0] -= 1
        return ""

    router = KVRouteRouter(thinker.router(), ASK | RunnableLambda(work), ASK | RunnableLambda(work))
    router.batch(INPUTS, {"max_concurrency": 2})
    assert most[0] <= 2


def test_more_targets_by_name() -> None:
    policy = Policy(thresholds=(10.0, 60.0), targets=("fast", "slow", "expert"))
    given = Router(thinker.engine(), policy, head=thinker.HEAD, targets={"expert": thinker.router()})
    chains = {name: ASK | marked(name) for name in ("fast", "slow", "expert")}
    router = KVRouteRouter(given, targets=chains)
    found = [router.invoke(i) for i in INPUTS]
    assert found == [d.mode for d in given.decide_many([chat(q) for q in QUESTIONS])]
    assert "expert" in found
    named = KVRouteRouter(model=MODEL, policy=policy.model_copy(update={"head": thinker.HEAD}), targets=chains)
    assert named.batch(INPUTS) == found
    with pytest.raises(ValidationError, match=r"missing: .*expert"):
        KVRouteRouter(given, fast=chains["fast"], slow=chains["slow"])


def test_shadow_takes_the_fallback_and_tells_what_it_would_have_taken(expected: list[str]) -> None:
    seen = []
    router = KVRouteRouter(
        thinker.router(shadow=True), ASK | marked("fast"), ASK | marked("slow"), on_decision=lambda _, m: seen.append(m)
    )
    assert router.batch(INPUTS) == ["slow"] * len(INPUTS)
    assert [m["decision"]["proposed"] for m in seen] == expected


def test_a_call_may_demand_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    router = plain()
    monkeypatch.setattr(Router, "prefill_many", lambda *_, **__: pytest.fail("nothing is run"))
    for mode in ("fast", "slow"):
        assert router.invoke(INPUTS[0], {"configurable": {"kvroute_mode": mode}}) == mode
        assert router.with_config(configurable={"kvroute_mode": mode}).batch(INPUTS[:3]) == [mode] * 3
    with pytest.raises(InvalidInputError, match="kvroute_mode is one of"):
        router.invoke(INPUTS[0], {"configurable": {"kvroute_mode": "deep"}})
    configs = [{"configurable": {"kvroute_mode": mode}} for mode in ("slow", "deep", "fast")]
    slow, error, fast = router.batch(INPUTS[:3], configs, return_exceptions=True)
    assert (slow, fast) == ("slow", "fast")
    assert isinstance(error, InvalidInputError)


# ------------------------------------------------------------------ what is rendered


@pytest.mark.parametrize("form", ["text", "message", "messages", "tuples", "value", "state"])
def test_inputs_that_are_prompts(form: str, expected: list[str]) -> None:
    router = KVRouteRouter(thinker.router(), marked("fast"), marked("slow"))
    forms: dict[str, Any] = {
        "text": lambda q: q,
        "message": HumanMessage,
        "messages": lambda q: [HumanMessage(q)],
        "tuples": lambda q: [("user", q)],
        "value": lambda q: ASK.invoke({"question": q}),
        "state": lambda q: {"messages": [HumanMessage(q)], "other": 1},
    }
    assert [router.invoke(forms[form](q)) for q in QUESTIONS] == expected


def test_a_prompt_of_ones_own_runs_as_a_child(expected: list[str]) -> None:
    seen = Seen()
    for prompt in (ASK, lambda given: given["question"], lambda given: [("user", given["question"])]):
        router = KVRouteRouter(thinker.router(), marked("fast"), marked("slow"), prompt=prompt)
        assert [router.invoke(i) for i in INPUTS] == expected
        assert router.batch(INPUTS) == expected
    assert asyncio.run(router.ainvoke(INPUTS[0])) == expected[0]
    assert asyncio.run(router.abatch(INPUTS)) == expected
    router.invoke(INPUTS[0], {"callbacks": [seen]})
    assert [run["kind"] for run in seen.tagged("prompt")] == ["chain"]


def test_the_template_of_the_default_branch_is_the_prompt() -> None:
    """The slow branch's, or that of ``default``; a single variable takes an input that is no dict."""
    asked = []
    shout = ChatPromptTemplate.from_messages([("system", "shout"), ("user", "{question}")])

    class Noting:
        policy, engine = Policy(kind="slow"), thinker.engine()

        def prefill_many(self, prompts: list[Any], **_: Any) -> list[Any]:
            asked.extend(prompts)
            return thinker.router().prefill_many(prompts)

    for default in (None, "slow", "fast"):
        router = KVRouteRouter(Noting(), shout | marked("fast"), ASK | marked("slow"), default=default)
        router.invoke({"question": "top 11,12"})
        router.invoke("top 11,12")
    assert [len(p) for p in asked] == [1, 1, 1, 1, 2, 2]
    assert asked[0] == asked[1] == chat("top 11,12")


def test_a_text_stays_a_text_for_models_that_continue_texts() -> None:
    from langchain_core.language_models import FakeListLLM

    from langchain_kvroute.branch_choice import Chooser
    from langchain_kvroute.router_handle import RouterHandle

    template = PromptTemplate.from_template("{q}")
    handle = RouterHandle(thinker.router())
    texts = Chooser(handle, {"slow": template | FakeListLLM(responses=["x"])}, None)
    assert texts.prompt({"q": "hi"}, rendered=False) == "hi"
    chats = Chooser(handle, {"slow": template | ChatKVRoute(engine=thinker.engine())}, None)
    assert chats.prompt({"q": "hi"}, rendered=False) == [HumanMessage("hi")]


# ------------------------------------------------------------------ as a Runnable


def test_streams_what_the_branch_streams() -> None:
    def pieces(given: Any) -> Any:
        yield from ("a", "b", "c")

    async def apieces(given: Any) -> Any:
        for piece in pieces(given):
            yield piece

    branch = ASK | RunnableLambda(pieces, afunc=apieces)
    router = KVRouteRouter(thinker.router(), branch, branch)
    seen = Seen()
    assert list(router.stream(INPUTS[0], {"callbacks": [seen]})) == ["a", "b", "c"]
    assert seen.root()["end"] == "abc"
    assert list((router | StrOutputParser()).stream(INPUTS[0])) == ["a", "b", "c"]  # transform

    async def collected() -> list[Any]:
        return [piece async for piece in (RunnablePassthrough() | router).astream(INPUTS[0])]

    assert asyncio.run(collected()) == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["invoke", "stream", "batch", "ainvoke", "astream", "abatch"])
async def test_the_branch_is_a_child_run_with_the_decision(how: str, expected: list[str]) -> None:
    router, seen, told = plain(), Seen(), []
    router = plain(on_decision=lambda run_id, metadata: told.append((run_id, metadata)))
    config = {"callbacks": [seen], "tags": ["mine"], "metadata": {"who": "me"}}
    if how == "invoke":
        router.invoke(INPUTS[0], config)
    elif how == "stream":
        list(router.stream(INPUTS[0], config))
    elif how == "batch":
        router.batch(INPUTS[:1], config)
    elif how == "ainvoke":
        await router.ainvoke(INPUTS[0], config)
    elif how == "astream":
        _ = [piece async for piece in router.astream(INPUTS[0], config)]
    else:
        await router.abatch(INPUTS[:1], config)
    mode = expected[0]
    root = seen.root()
    assert (root["name"], root["end"]) == ("KVRouteRouter", mode)
    [child] = seen.tagged(f"branch:{mode}")
    assert seen.runs[child["parent"]] is root
    assert {f"kvroute:{mode}", "mine"} <= set(child["tags"])
    [(run_id, metadata)] = told
    assert seen.runs[run_id] is root
    assert child["metadata"]["who"] == "me"
    assert child["metadata"]["kvroute"] == metadata
    assert child["metadata"]["kvroute_branch"] == metadata["mode"] == mode
    assert child["metadata"]["kvroute_why"] == "difficulty"
    assert child["metadata"]["kvroute_difficulty"] == metadata["difficulty"]
    [deep] = [run for run in seen.runs.values() if run["name"] == f"{mode} chain"]
    assert deep["metadata"]["kvroute_branch"] == mode  # what runs below carries it too
    size = len(thinker.engine().tokenize(chat(QUESTIONS[0])))
    assert metadata["tokens"] == {"prompt": size, "cached": 0, "computed": size, "answer": 0}
    assert metadata["decision"]["seconds"] > 0


async def test_astream_events_name_the_branch(expected: list[str]) -> None:
    events = [e async for e in plain().astream_events(INPUTS[0], version="v2")]
    [begun] = [e for e in events if e["event"] == "on_chain_start" and f"branch:{expected[0]}" in e["tags"]]
    assert begun["metadata"]["kvroute"]["mode"] == expected[0]
    assert events[-1]["data"]["output"] == expected[0]


@pytest.mark.parametrize("how", ["invoke", "batch", "stream", "ainvoke", "abatch", "astream"])
async def test_the_decision_beside_the_output(how: str, expected: list[str]) -> None:
    router = plain(include_decision=True)
    if how == "invoke":
        found = router.invoke(INPUTS[0])
    elif how == "batch":
        found = router.batch(INPUTS[:1])[0]
    elif how == "ainvoke":
        found = await router.ainvoke(INPUTS[0])
    elif how == "abatch":
        found = (await router.abatch(INPUTS[:1]))[0]
    else:
        if how == "stream":
            pieces = list(router.stream(INPUTS[0]))
        else:
            pieces = [piece async for piece in router.astream(INPUTS[0])]
        assert list(pieces[0]) == ["kvroute"]
        found = pieces[0] + pieces[1]
    assert found["output"] == expected[0]
    assert found["kvroute"]["mode"] == expected[0]


def test_the_graph_draws_the_branches() -> None:
    graph = plain().get_graph()
    conditional = {e.data: graph.nodes[e.target].name for e in graph.edges if e.conditional}
    assert conditional == {"fast": "ChatPromptTemplate", "slow": "ChatPromptTemplate"}
    assert len([n for n in graph.nodes.values() if n.name == "KVRouteRouter"]) == 1
    assert graph.first_node() is not None
    assert graph.last_node() is not None
    drawn = (RunnablePassthrough() | plain() | StrOutputParser()).get_graph().draw_mermaid()
    assert "fast&nbsp;" in drawn
    assert "slow chain" in drawn


def test_schemas() -> None:
    text, number = (marked("x").with_types(output_type=kind) for kind in (str, int))
    router = KVRouteRouter(thinker.router(), text, number)
    assert router.OutputType == str | int
    assert router.get_output_schema().model_validate("x")
    assert {"type": "integer"} in router.get_output_jsonschema()["anyOf"]
    assert plain().get_input_jsonschema()["required"] == ["question"]
    assert {spec.id for spec in plain().config_specs} == {"kvroute_mode"}
    assert plain().config_schema().model_json_schema()["$defs"]["Configurable"]["properties"]["kvroute_mode"]


def test_configurable_fields_and_config(expected: list[str]) -> None:
    named = KVRouteRouter(model=MODEL, policy="slow", fast=ASK | marked("fast"), slow=ASK | marked("slow"))
    router = named.configurable_fields(policy=ConfigurableField(id="policy"), default=ConfigurableField(id="default"))
    assert router.invoke(INPUTS[0]) == "slow"
    assert router.with_config(configurable={"policy": "fast"}).invoke(INPUTS[0]) == "fast"
    routed = router.with_config(configurable={"policy": POLICY}, run_name="mine")
    seen = Seen()
    assert [routed.invoke(i, {"callbacks": [seen]}) for i in INPUTS[:1]] == expected[:1]
    assert seen.root()["name"] == "mine"
    group = named._chooser.handle._group
    assert len(group.routers) == 3  # each was opened once, on one engine
    assert len({id(r.engine) for r in group.routers.values()}) == 1


def test_it_composes_with_retries_fallbacks_and_binds() -> None:
    tried = []

    def flaky(_: Any, **given: Any) -> str:
        tried.append(given)
        if len(tried) == 1:
            raise ValueError("once")
        return "done"

    router = KVRouteRouter(thinker.router(), ASK | RunnableLambda(flaky), ASK | RunnableLambda(flaky))
    assert router.with_retry(stop_after_attempt=2, wait_exponential_jitter=False).invoke(INPUTS[0]) == "done"
    broken = KVRouteRouter(thinker.router(), RunnableLambda(lambda _: 1 / 0), RunnableLambda(lambda _: 1 / 0))
    assert broken.with_fallbacks([marked("instead")]).invoke("hi") == "instead"
    bare = KVRouteRouter(thinker.router(), RunnableLambda(flaky), RunnableLambda(flaky))
    assert bare.bind(more=1).invoke("hi") == "done"
    assert tried[-1]["more"] == 1


def test_a_router_in_a_router(expected: list[str]) -> None:
    inner = plain()
    outer = KVRouteRouter(thinker.router(), inner, inner)
    seen = Seen()
    assert outer.invoke(INPUTS[0], {"callbacks": [seen]}) == expected[0]
    assert len(seen.tagged(f"branch:{expected[0]}")) == 2


def test_it_does_what_a_branch_does(expected: list[str]) -> None:
    router = thinker.router()

    def hard(given: dict[str, str]) -> bool:
        return router.decide(chat(given["question"])).mode == "slow"

    branch = RunnableBranch((hard, ASK | marked("slow")), ASK | marked("fast"))
    assert branch.batch(INPUTS) == plain().batch(INPUTS) == expected


# ------------------------------------------------------------------ copies and serialisation


def by_name(**fields: Any) -> KVRouteRouter:
    model = ChatKVRoute(model=MODEL, max_tokens=64)
    return KVRouteRouter(model=MODEL, policy=POLICY, fast=ASK | model, slow=ASK | model, **fields)


def test_pickled_and_deep_copied_by_name() -> None:
    router = by_name(api_key="s3kr3t", include_decision=True)
    answer = router.invoke(INPUTS[0])
    packed = pickle.dumps(router)
    assert b"s3kr3t" not in packed
    for other in (pickle.loads(packed), copy.deepcopy(router), copy.copy(router)):  # noqa: S301
        assert other._chooser.handle.get().engine is router._chooser.handle.get().engine
        found = other.invoke(INPUTS[0])
        assert found["output"].content == answer["output"].content
        assert found["output"].usage_metadata == answer["output"].usage_metadata


def test_a_live_router_is_shared_by_copies_and_refuses_a_pickle() -> None:
    hook = [].append
    router = plain(on_decision=lambda *_: hook)
    other = copy.deepcopy(router)
    assert other.router is router.router
    assert other.fast is not router.fast
    assert other.invoke(INPUTS[0]) == router.invoke(INPUTS[0])
    assert copy.deepcopy(other)._chooser.handle.get() is router.router
    with pytest.raises(InvalidInputError, match="Give model= and policy= by name"):
        pickle.dumps(router)


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_serialised_by_name_and_loaded() -> None:
    router = by_name(api_key="s3kr3t", default="fast")
    text = dumps(router)
    assert "s3kr3t" not in text
    found = loads(
        text,
        allowed_objects=[KVRouteRouter, ChatKVRoute, *_TEMPLATES],
        valid_namespaces=["langchain_kvroute"],
        secrets_map={"KVROUTE_API_KEY": "other"},
    )
    assert isinstance(found, KVRouteRouter)
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "other"
    assert (found.model, found.policy, found.default) == (MODEL, POLICY, "fast")
    answers = [r.invoke(INPUTS[1]).content for r in (router, found)]
    assert answers[0] == answers[1]


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_a_live_router_is_dumped_without_its_engine() -> None:
    text = dumps(plain())
    assert '"type": "not_implemented"' in text
    with pytest.raises(NotImplementedError):
        loads(text, valid_namespaces=["langchain_kvroute"], allowed_objects=[KVRouteRouter])


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": None, "api_key": "s3kr3t"},
        {"default": "x", "api_key": "s3kr3t"},
        {"api_key": ["s3kr3t"]},
    ],
    ids=["no policy", "no such branch", "no key"],
)
def test_a_key_is_in_no_error(fields: dict[str, Any]) -> None:
    branches = {"fast": marked("fast"), "slow": marked("slow")}
    with pytest.raises(ValidationError) as refused:
        KVRouteRouter(**{"model": MODEL, "policy": POLICY, **branches, **fields})
    assert "s3kr3t" not in str(refused.value) + repr(refused.value)


_TEMPLATES: list[type] = [type(ASK), type(ASK.messages[0]), type(ASK.messages[0].prompt), type(ASK | marked("x"))]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"fast": marked("a"), "slow": marked("b")}, "Give a router"),
        ({"model": MODEL, "fast": marked("a"), "slow": marked("b")}, "Give a router"),
        ({"router": "r", "fast": marked("a"), "slow": marked("b")}, "A kvroute.Router decides, not a str"),
        ({"model": MODEL, "policy": "slow", "slow": marked("b")}, "at least two"),
        (
            {"model": MODEL, "policy": "slow", "fast": marked("a"), "slow": marked("b"), "default": "x"},
            "default is one",
        ),
        ({"model": MODEL, "policy": "slow", "fast": marked("a"), "targets": {"fast": marked("b")}}, "given twice"),
        ({"model": MODEL, "policy": "slow", "fast": marked("a"), "slow": marked("b"), "polcy": 1}, "Extra inputs"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        KVRouteRouter(**fields)


def test_a_branch_may_be_a_function_or_a_dict() -> None:
    router = KVRouteRouter(thinker.router(), lambda _: "f", {"a": lambda _: 1})
    assert router.invoke("top 11,12", {"configurable": {"kvroute_mode": "fast"}}) == "f"
    assert router.invoke("top 11,12", {"configurable": {"kvroute_mode": "slow"}}) == {"a": 1}


# ------------------------------------------------------------------ the prompt is computed once


def test_a_branch_on_the_same_engine_goes_on_from_the_decision() -> None:
    """The model runs the prompt's tokens once; the answer is the router's own, token for token."""
    router = thinker.router()
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=160)
    routed = KVRouteRouter(router, ASK | model, ASK | model)
    for question in QUESTIONS[:4]:
        alone = router.generate(chat(question), max_tokens=160)
        size = len(thinker.engine().tokenize(chat(question)))
        shapes: list[tuple[int, int]] = []
        with thinker.counted(shapes):
            message = routed.invoke({"question": question})
        assert isinstance(message, AIMessage)
        assert message.content == alone.answer
        metadata = message.response_metadata["kvroute"]
        assert metadata["mode"] == alone.decision.mode
        assert metadata["difficulty"] == pytest.approx(alone.decision.difficulty, abs=1e-3)
        assert metadata["tokens"]["cached"] == size - 1  # the last token's logits are not kept: it is run again
        assert message.usage_metadata["input_token_details"]["cache_read"] == size - 1
        tokens = sum(count for _, count in shapes)
        assert tokens == alone.usage.computed + 1


@pytest.mark.parametrize("how", ["ainvoke", "stream", "astream", "batch", "abatch"])
async def test_in_every_call(how: str) -> None:
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=160)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    given = INPUTS[:4]
    if how == "ainvoke":
        found = [await router.ainvoke(i) for i in given]
    elif how == "batch":
        found = router.batch(given)
    elif how == "abatch":
        found = await router.abatch(given)
    else:
        found = []
        for i in given:
            pieces = list(router.stream(i)) if how == "stream" else [p async for p in router.astream(i)]
            assert len(pieces) > 3
            whole = pieces[0]
            for piece in pieces[1:]:
                whole += piece
            found.append(whole)
    for message, question, reference in zip(found, QUESTIONS, [router.invoke(i) for i in given], strict=False):
        size = len(thinker.engine().tokenize(chat(question)))
        assert message.response_metadata["kvroute"]["tokens"]["cached"] == size - 1
        assert message.content == reference.content
        assert message.response_metadata["kvroute"]["difficulty"] == pytest.approx(
            reference.response_metadata["kvroute"]["difficulty"], abs=1e-3
        )


def test_with_tools_and_a_system_message() -> None:
    """The decision reads what the model will see: tools and instructions stand in the prompt."""

    def calculator(expression: str) -> str:
        """Multiplies and adds whole numbers."""
        return expression

    ask = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{question}")])
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=8).bind_tools([calculator])
    router = KVRouteRouter(thinker.router(), ask | model, ask | model, include_decision=True)
    found = router.invoke(INPUTS[0])
    tokens = found["output"].response_metadata["kvroute"]["tokens"]
    assert tokens["cached"] == found["kvroute"]["tokens"]["prompt"] - 1
    bare = KVRouteRouter(thinker.router(), ASK | marked("fast"), ASK | marked("slow"), include_decision=True)
    assert found["kvroute"]["tokens"]["prompt"] > bare.invoke(INPUTS[0])["kvroute"]["tokens"]["prompt"] + 10


def test_a_stream_hands_nothing_to_its_reader() -> None:
    """What the reader asks the same model between two pieces is another prompt."""
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=40)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    alone = model.invoke(QUESTIONS[3])
    pieces = router.stream(INPUTS[0])
    next(pieces)
    between = model.invoke(QUESTIONS[3])
    assert between.content == alone.content
    assert between.response_metadata["kvroute"]["decision"] is None
    pieces.close()


def test_the_cache_is_kept_only_for_a_model_on_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    decide = Router.prefill_many
    monkeypatch.setattr(
        Router, "prefill_many", lambda self, p, **how: kept.append(how["keep"]) or decide(self, p, **how)
    )
    elsewhere = ChatKVRoute(model="nowhere")  # opening it would fail
    plain().invoke(INPUTS[0])
    KVRouteRouter(thinker.router(), ASK | marked("fast"), ASK | marked("slow") | elsewhere).invoke(
        INPUTS[0], {"configurable": {"kvroute_mode": "fast"}}
    )
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=4)
    KVRouteRouter(thinker.router(), ASK | model, ASK | model.with_retry().with_config(tags=["x"])).invoke(INPUTS[0])
    assert kept == [False, True]


def test_a_demanded_branch_tells_its_model_the_mode() -> None:
    """Without a prefill: the model computes the prompt itself, in the mode that was demanded."""
    model = ChatKVRoute(engine=thinker.engine(), max_tokens=160)
    router = KVRouteRouter(thinker.router(), ASK | model, ASK | model)
    for mode in ("fast", "slow"):
        message = router.invoke(INPUTS[0], {"configurable": {"kvroute_mode": mode}})
        assert message.response_metadata["kvroute"]["mode"] == mode
        assert message.response_metadata["kvroute"]["decision"]["why"] == "forced"
        assert message.response_metadata["kvroute"]["tokens"]["cached"] == 0
        assert ("reasoning_content" in message.additional_kwargs) == (mode == "slow")


def test_a_model_in_its_branchs_mode_tells_the_decision() -> None:
    """Its own mode is the one that was decided, so the decision is the answer's; in another mode it is not."""
    fast, slow = (ChatKVRoute(engine=thinker.engine(), mode=mode, max_tokens=8) for mode in ("fast", "slow"))
    for given in INPUTS[:4]:
        decision = thinker.router().decide([{"role": "user", "content": given["question"]}])
        told = KVRouteRouter(thinker.router(), ASK | fast, ASK | slow).invoke(given).response_metadata["kvroute"]
        assert told["mode"] == decision.mode
        assert told["difficulty"] == pytest.approx(decision.difficulty, abs=1e-3)
        other = fast if decision.mode == "slow" else slow
        told = KVRouteRouter(thinker.router(), ASK | other, ASK | other).invoke(given).response_metadata["kvroute"]
        assert (told["mode"], told["difficulty"]) == (other.mode, None)
