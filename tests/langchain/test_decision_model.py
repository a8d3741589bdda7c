"""KVRouteDecisionModel: LangChain's questions answered by the difficulty, and an agent whose model it picks."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import thinker
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.load import dumps, loads
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from pydantic import ValidationError
from thinker import HEAD, MODEL, POLICY, Seen, chat, questions

from kvroute import DifficultyHead, InvalidInputError, KVRouteError, Policy, Router, ServerTimeoutError

decisions = pytest.importorskip("langchain_core.decisions", reason="langchain-core 1.8 has it")
from langchain_core.decisions import Box, Choice, Noul, Score  # noqa: E402

from langchain_kvroute import ChatKVRoute, KVRouteDecisionModel  # noqa: E402

QUESTIONS = questions(8, seed=5)
WHICH = Choice(instructions="Which model?", criteria={"fast": "easy", "slow": "hard"})
SIZES = Choice(instructions="Which model?", criteria={"large": None, "small": None})
HARD = Noul(instructions="Is this hard?")
RUBRIC = Score(instructions="How hard?", criteria=["trivial", "easy", "hard", "impossible"])


def ask(model: KVRouteDecisionModel, state: Any, **asked: Any) -> Any:
    return model.invoke({"state": state, "questions": asked})


def test_a_choice_is_the_routers_mode() -> None:
    router = thinker.router()
    model = KVRouteDecisionModel(router=router)
    seen = set()
    for question in QUESTIONS:
        decision = router.decide(chat(question))
        response = ask(model, question, which=WHICH)
        answer = response.choices["which"]
        assert answer.choice == decision.mode
        assert answer.probabilities == pytest.approx(
            {"fast": decision.probability, "slow": 1 - decision.probability}, abs=1e-4
        )
        assert answer.confidence == answer.probabilities[answer.choice]
        size = len(thinker.engine().tokenize(chat(question)))
        assert response.usage == {
            "input_tokens": size,
            "output_tokens": 0,
            "total_tokens": size,
            "input_token_details": {"cache_read": 0},
        }
        assert response.model == thinker.engine().info.name
        seen.add(answer.choice)
    assert seen == {"fast", "slow"}


def test_labels_stand_for_modes() -> None:
    model = KVRouteDecisionModel(router=thinker.router(), labels={"small": "fast", "large": "slow"})
    plain = KVRouteDecisionModel(router=thinker.router())
    for question in QUESTIONS:
        answer = ask(model, question, size=SIZES).choices["size"]
        reference = ask(plain, question, which=WHICH).choices["which"]
        assert answer.choice == {"fast": "small", "slow": "large"}[reference.choice]
        assert answer.confidence == pytest.approx(reference.confidence)
        assert list(answer.probabilities) == ["large", "small"]
    with pytest.raises(InvalidInputError, match="label 'large' stands for 'large'"):
        ask(plain, "top 11,12", size=SIZES)
    with pytest.raises(InvalidInputError, match="no label for"):
        ask(plain, "top 11,12", size=Choice(instructions="?", criteria={"fast": None}))


def test_three_targets() -> None:
    policy = Policy(thresholds=(10.0, 60.0), targets=("fast", "slow", "expert"), head=HEAD)
    model = KVRouteDecisionModel(model=MODEL, policy=policy, labels={"big": "expert"})
    question = Choice(instructions="?", criteria={"fast": None, "slow": None, "big": None})
    chosen = set()
    for text in QUESTIONS:
        answer = ask(model, text, which=question).choices["which"]
        chosen.add(answer.choice)
        assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert "big" in chosen


def test_noul_and_score_in_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    router = thinker.router()
    model, calls = KVRouteDecisionModel(router=router), []
    decide = Router.prefill_many
    monkeypatch.setattr(Router, "prefill_many", lambda self, p, **how: calls.append(p) or decide(self, p, **how))
    for question in QUESTIONS:
        decision = router.decide(chat(question))
        response = ask(model, question, hard=HARD, level=RUBRIC, which=WHICH)
        assert response.nouls["hard"].noul == pytest.approx(1 - decision.probability, abs=1e-4)
        level = response.scores["level"]
        assert level.score == pytest.approx(decision.difficulty * 3 / 100, abs=1e-3)
        assert sum(level.probabilities.values()) == pytest.approx(1)
        assert sum(n * p for n, p in level.probabilities.items()) == pytest.approx(level.score)
        assert level.legend == dict(enumerate(RUBRIC.criteria))
        assert level.confidence == max(level.probabilities.values()) >= 0.5
    assert len(calls) == len(QUESTIONS)


@pytest.mark.parametrize("difficulty", [0.0, 100.0])
def test_the_ends_of_a_rubric(difficulty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    monkeypatch.setattr(DifficultyHead, "predict", lambda self, x: np.full(len(x), difficulty))
    monkeypatch.setattr(DifficultyHead, "probability", lambda self, d: 1 / 0)
    response = ask(KVRouteDecisionModel(router=thinker.router()), "top 11,12", hard=HARD, level=RUBRIC)
    assert response.scores["level"].score == (3 if difficulty else 0)
    assert response.nouls["hard"].noul == difficulty / 100  # without a calibrated probability


def test_states() -> None:
    model = KVRouteDecisionModel(router=thinker.router())
    alone = ask(model, QUESTIONS[0], hard=HARD)
    for state in (HumanMessage(QUESTIONS[0]), [HumanMessage(QUESTIONS[0])]):
        assert ask(model, state, hard=HARD) == alone
    longer = ask(model, [SystemMessage("Be brief."), HumanMessage(QUESTIONS[0])], hard=HARD)
    assert longer.usage["input_tokens"] > alone.usage["input_tokens"]
    for state in ({"ticket": 1, "log": [HumanMessage("hi")]}, ["a", "b"], []):
        assert 0 <= ask(model, state, hard=HARD).nouls["hard"].noul <= 1


def test_a_box_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router, "prefill_many", lambda *_, **__: pytest.fail("nothing is run"))
    with pytest.raises(InvalidInputError, match="Question 'where' is a Box"):
        ask(KVRouteDecisionModel(router=thinker.router()), "hi", which=WHICH, where=Box(instructions="the cat"))


class Gone:
    policy = Policy(fallback="slow")
    engine = thinker.engine()

    def prefill_many(self, *_: Any, **__: Any) -> Any:
        raise ServerTimeoutError("The server took longer than 3 s.")


def test_where_nothing_can_be_read_a_choice_falls_back_and_the_rest_raises(caplog: pytest.LogCaptureFixture) -> None:
    model = KVRouteDecisionModel(router=Gone())
    response = ask(model, "the word is xyzzy", which=WHICH)
    assert response.choices["which"].choice == "slow"
    assert response.choices["which"].confidence == 0.5
    assert response.usage is None
    for question in (HARD, RUBRIC):
        with pytest.raises(KVRouteError, match="took longer"):
            ask(model, "hi", it=question)
    fixed = KVRouteDecisionModel(router=thinker.router(kind="fast"))
    assert ask(fixed, "hi", which=WHICH).choices["which"].confidence == 1.0
    with pytest.raises(KVRouteError, match="reads no difficulty"):
        ask(fixed, "hi", it=HARD)
    assert "xyzzy" not in caplog.text


async def test_async_batch_and_traces() -> None:
    model, seen = KVRouteDecisionModel(router=thinker.router()), Seen()
    asked = [{"state": q, "questions": {"which": WHICH}} for q in QUESTIONS[:4]]
    alone = [model.invoke(a) for a in asked]
    assert await model.ainvoke(asked[0], {"callbacks": [seen]}) == alone[0]
    assert model.batch(asked) == await model.abatch(asked) == alone
    assert seen.root()["metadata"]["ls_provider"] == "kvroute"
    assert seen.root()["metadata"]["ls_model_name"] == thinker.engine().info.name


async def test_one_bad_item_of_a_batch_costs_the_others_nothing() -> None:
    model = KVRouteDecisionModel(router=thinker.router())
    asked: list[Any] = [{"state": q, "questions": {"which": WHICH, "hard": HARD}} for q in QUESTIONS[:3]]
    alone = [model.invoke(a) for a in asked]
    for bad, error in (
        ({"state": "hi", "questions": {"where": Box(instructions="the cat")}}, InvalidInputError),
        ({"state": "top " + "11," * 4000, "questions": {"hard": HARD}}, KVRouteError),
        ({"state": object(), "questions": {"hard": HARD}}, KVRouteError),
    ):
        given: Any = [*asked[:2], bad, asked[2]]
        for found in (
            model.batch(given, return_exceptions=True),
            await model.abatch(given, return_exceptions=True),
        ):
            assert isinstance(found[2], error)
            assert [*found[:2], found[3]] == alone


def test_threads_and_two_event_loops() -> None:
    asked: list[Any] = [{"state": q, "questions": {"which": WHICH, "hard": HARD}} for q in QUESTIONS]
    alone = [KVRouteDecisionModel(router=Router(thinker.engine(), POLICY)).invoke(a) for a in asked]
    named = KVRouteDecisionModel(model=MODEL, policy=POLICY)  # opened by the first of them

    async def gathered() -> list[Any]:
        return await asyncio.gather(*(named.ainvoke(a) for a in asked))

    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(asyncio.run, gathered()) for _ in range(2)]
        calls = list(pool.map(named.invoke, asked * 2))
        for found in (calls[: len(asked)], calls[len(asked) :], *(loop.result() for loop in loops)):
            assert [f.choices["which"].choice for f in found] == [a.choices["which"].choice for a in alone]
            nouls = [a.nouls["hard"].noul for a in alone]
            assert [f.nouls["hard"].noul for f in found] == pytest.approx(nouls, abs=1e-4)


async def test_a_cancelled_task_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    decide = Router.prefill_many

    def held(self: Router, prompts: Any, **how: Any) -> Any:
        begun.set()
        assert goes_on.wait(10)
        return decide(self, prompts, **how)

    model, seen = KVRouteDecisionModel(router=thinker.router()), Seen()
    asked: Any = {"state": QUESTIONS[0], "questions": {"which": WHICH}}
    alone = model.invoke(asked)
    monkeypatch.setattr(Router, "prefill_many", held)
    task = asyncio.create_task(model.ainvoke(asked, {"callbacks": [seen]}))
    assert await asyncio.to_thread(begun.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(seen.root()["end"], asyncio.CancelledError)
    goes_on.set()
    assert await model.ainvoke(asked) == alone


async def test_a_callback_that_raises_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Raising(BaseCallbackHandler):
        def on_chain_start(self, *_: Any, **__: Any) -> None:
            raise ValueError("a handler's own fault")

        on_chain_end = on_chain_start

    model, config = KVRouteDecisionModel(router=thinker.router()), {"callbacks": [Raising()]}
    asked: Any = {"state": QUESTIONS[0], "questions": {"which": WHICH}}
    alone = model.invoke(asked)
    assert model.invoke(asked, config) == await model.ainvoke(asked, config) == alone
    assert model.batch([asked] * 2, config) == [alone] * 2
    assert "a handler's own fault" in caplog.text


def test_copies_pickles_and_fields() -> None:
    named = KVRouteDecisionModel(
        model=MODEL, policy=POLICY, labels={"small": "fast", "large": "slow"}, api_key="s3kr3t"
    )
    first = ask(named, QUESTIONS[0], size=SIZES)
    packed = pickle.dumps(named)
    assert b"s3kr3t" not in packed
    for other in (pickle.loads(packed), copy.deepcopy(named)):  # noqa: S301
        assert ask(other, QUESTIONS[0], size=SIZES) == first
    live = KVRouteDecisionModel(router=thinker.router())
    assert copy.deepcopy(live).router is live.router
    with pytest.raises(InvalidInputError, match="can't be pickled"):
        pickle.dumps(live)
    for fields in ({}, {"model": MODEL}, {"router": live.router, "policy": "slow"}, {"router": "x"}):
        with pytest.raises(ValidationError):
            KVRouteDecisionModel(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"policy": None, "api_key": "s3kr3t"}, {"api_key": ["s3kr3t"]}],
    ids=["no policy", "no key"],
)
def test_a_key_is_in_no_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        KVRouteDecisionModel(**{"model": MODEL, "policy": POLICY, **fields})
    assert "s3kr3t" not in str(refused.value) + repr(refused.value)


@pytest.mark.filterwarnings("ignore:The function `loads` is in beta")
def test_serialised_by_name_and_loaded() -> None:
    named = KVRouteDecisionModel(
        model=MODEL, policy=POLICY, labels={"small": "fast", "large": "slow"}, api_key="s3kr3t"
    )
    text = dumps(named)
    assert "s3kr3t" not in text
    allowed = {"valid_namespaces": ["langchain_kvroute"], "allowed_objects": [KVRouteDecisionModel]}
    found = loads(text, secrets_map={"KVROUTE_API_KEY": "other"}, **allowed)
    assert isinstance(found, KVRouteDecisionModel)
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "other"
    assert (found.model, found.policy, found.labels) == (MODEL, POLICY, named.labels)
    assert ask(found, QUESTIONS[0], size=SIZES) == ask(named, QUESTIONS[0], size=SIZES)
    live = dumps(KVRouteDecisionModel(router=thinker.router()))
    with pytest.raises(NotImplementedError):
        loads(live, **allowed)


@pytest.mark.filterwarnings("ignore:.*ModelRouterMiddleware.*beta")
async def test_it_picks_an_agents_model() -> None:
    """With LangChain's own middleware: easy tasks go to the small model, hard ones to the thinking one."""
    from langchain.agents import create_agent
    from langchain.agents.middleware import ModelChoice, ModelRouterMiddleware

    router = thinker.router()
    model = ChatKVRoute(engine=thinker.engine(), mode="slow", max_tokens=160)
    small = GenericFakeChatModel(messages=iter(AIMessage("small") for _ in range(20)))
    middleware = ModelRouterMiddleware(
        choices={"small": ModelChoice(small, "easy tasks"), "large": ModelChoice(model, "hard tasks")},
        instructions="Choose the least costly model suited to the task.",
        classifier=KVRouteDecisionModel(router=router, labels={"small": "fast", "large": "slow"}),
    )
    agent = create_agent(model, middleware=[middleware])
    answered = {"fast": 0, "slow": 0}
    for question in QUESTIONS:
        mode = router.decide(chat(question)).mode
        state = agent.invoke({"messages": [("user", question)]})
        assert (state["messages"][-1].content == "small") == (mode == "fast")
        assert state["model_route"].choice == {"fast": "small", "slow": "large"}[mode]
        answered[mode] += 1
        if mode == "slow":
            assert state["messages"][-1].response_metadata["kvroute"]["mode"] == "slow"
            again = await agent.ainvoke({"messages": [("user", question)]})
            assert again["messages"][-1].content == state["messages"][-1].content
    assert min(answered.values()) > 0
