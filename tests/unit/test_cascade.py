"""Cascades: answers that are not trusted are asked for again, and only those."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvroute import (
    CancelToken,
    Cascade,
    Cascaded,
    ConfidenceCalibrator,
    DifficultyHead,
    InvalidInputError,
    PoolingSpec,
    Routed,
    Router,
    SelfEvaluator,
    ThinkingMode,
    TransformersEngine,
)
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.fitting import Rows, ridge_path
from tiny_models import build_model, build_tokenizer

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("what is the capital?", "the dog sat on the mat", "a lazy fox", "keys and values of every token")
]
HOW: dict[str, Any] = {"max_tokens": 8}


def a_head(engine: TransformersEngine) -> DifficultyHead:
    spec = PoolingSpec(layers=(1, 2), part="v", heads="concat")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, spec.dimension(engine.info))).astype(np.float32)
    return DifficultyHead(
        spec=spec, target="correct", predictor=ridge_path(Rows(x, (x[:, 0] > 0).astype(float)), [0.01])[0],
        map=LogisticMap(means=(0.5,), scales=(0.3,), coefficients=(1.5,), intercept=0.1),
        model=engine.info.name, fingerprint=engine.info.fingerprint, data_hash="x",
    )  # fmt: skip


@pytest.fixture(scope="module")
def big() -> TransformersEngine:
    return TransformersEngine(build_model("llama", seed=5), build_tokenizer(), name="big")


def a_router(engine: TransformersEngine, **kwargs: Any) -> Router:
    return Router(engine, "fast", thinking=ThinkingMode.instructions(), **kwargs)


def judge_of(answers: list[Routed], values: list[float | None]) -> Callable[[Routed], float | None]:
    table = {tuple(a.generation.token_ids): v for a, v in zip(answers, values, strict=True)}
    return lambda routed: table[tuple(routed.generation.token_ids)]


def test_only_what_is_not_trusted_is_asked_again(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    router = a_router(tiny_engine)
    first = router.generate(CHATS, **HOW)
    asked: list[list[Any]] = []
    counted = big.generate

    def note(prompts: Any, **kwargs: Any) -> Any:
        asked.append(list(prompts))
        return counted(prompts, **kwargs)

    cascade = Cascade([("small", router), ("big", big)], confidence=0.5, judge=judge_of(first, [0.9, 0.1, None, 0.5]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(big, "generate", note)
        found = cascade.generate(CHATS, **HOW)
    assert asked == [[CHATS[1], CHATS[2]]]  # together
    assert [c.step for c in found] == ["small", "big", "big", "small"]
    assert [[a.why for a in c.attempts] for c in found] == [
        ["confident"], ["unsure", "last"], ["no confidence", "last"], ["confident"],
    ]  # fmt: skip
    plain = big.generate(CHATS, **HOW)
    for i, c in enumerate(found):
        assert c.attempts[0].routed.text == first[i].text
        assert c.routed.text == (plain[i].text if c.step == "big" else first[i].text)
        assert c.usage.computed == sum(a.routed.usage.computed for a in c.attempts)
        assert c.attempts[0].threshold == 0.5
        assert c.attempts[-1].threshold == (None if c.step == "big" else 0.5)
    assert found[1].attempts[0].confidence == 0.1
    assert found[2].attempts[0].reason == "the judge can't tell"


def test_a_missing_confidence_may_stop(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    cascade = Cascade(
        [("small", a_router(tiny_engine)), ("big", big)], confidence=0.5, judge=lambda r: None, missing="stop"
    )
    found = cascade.generate(CHATS[0], **HOW)
    assert (found.step, found.confidence, [a.why for a in found.attempts]) == ("small", None, ["no confidence"])


@pytest.mark.parametrize("wrong", [lambda r: 1 / 0, lambda r: float("nan")])
def test_a_judge_that_fails_can_not_tell(tiny_engine: TransformersEngine, big: TransformersEngine, wrong: Any) -> None:
    found = Cascade([("small", a_router(tiny_engine)), ("big", big)], confidence=0.0, judge=wrong).generate(
        CHATS[0], **HOW
    )
    assert found.step == "big"
    assert found.attempts[0].reason
    assert found.routed.text == big.generate(CHATS[0], **HOW).text


def test_the_routers_own_confidence(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    router = a_router(tiny_engine, confidence=a_head(tiny_engine))
    confidences = [r.confidence for r in router.generate(CHATS, **HOW)]
    assert all(c is not None for c in confidences)
    cut = sorted(c for c in confidences if c is not None)[2]
    found = Cascade([("small", router), ("big", big)], confidence=cut).generate(CHATS, **HOW)
    assert [c.step for c in found] == ["small" if c is not None and c >= cut else "big" for c in confidences]
    assert [c.attempts[0].confidence for c in found] == pytest.approx(confidences)


def test_one_router_first_fast_then_slow(tiny_engine: TransformersEngine) -> None:
    """The prompt is computed once: the second step goes on from the first one's cache."""
    router = a_router(tiny_engine)
    cascade = Cascade([("at once", router, "fast"), ("thinking", router, "slow")], confidence=0.5, judge=lambda r: 0.0)
    found = cascade.generate(CHATS[3], **HOW)
    fast, slow = router.generate([CHATS[3]] * 2, mode=["fast", "slow"], **HOW)
    assert [a.routed.generation.token_ids for a in found.attempts] == [
        fast.generation.token_ids, slow.generation.token_ids,
    ]  # fmt: skip
    assert [a.routed.decision.mode for a in found.attempts] == ["fast", "slow"]
    base = len(router.thinking.layout(tiny_engine, CHATS[3]).base)
    assert found.attempts[0].routed.usage.cached == 0
    assert found.attempts[1].routed.usage.cached == base - 1  # its last token is run again, for the next one's logits
    assert all(a.routed.generation.prefix is None for a in found.attempts)
    many = cascade.generate(CHATS, **HOW)
    assert many[3].routed.generation.token_ids == slow.generation.token_ids


def test_three_steps_with_thresholds_of_their_own(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    router = a_router(tiny_engine)
    steps: list[Any] = [("fast", router, "fast"), ("slow", router, "slow"), ("big", big)]

    def judge(routed: Routed) -> float:
        return 0.6

    assert Cascade(steps, confidence=[0.6, 0.9], judge=judge).generate(CHATS[0], **HOW).step == "fast"
    assert Cascade(steps, confidence=[0.7, 0.6], judge=judge).generate(CHATS[0], **HOW).step == "slow"
    assert Cascade(steps, confidence=[0.7, 0.9], judge=judge).generate(CHATS[0], **HOW).step == "big"
    by_name = {"fast": judge, "slow": lambda r: 0.95}
    found = Cascade(steps, confidence=[0.7, 0.9], judge=by_name).generate(CHATS[0], **HOW)
    assert [a.confidence for a in found.attempts] == [0.6, 0.95]


@pytest.fixture(scope="module")
def calibrator(_engines: Any) -> ConfidenceCalibrator:
    engine = _engines("llama")
    scored = SelfEvaluator(engine).score_many([(CHATS[i % 4], f"answer {'a' * i} ends") for i in range(40)])
    rows = [{n: s.value for n, s in e.scores.items()} for e in scored]
    return ConfidenceCalibrator.fit(rows, [i % 3 > 0 for i in range(40)], info=engine.info, names=["mean_logprob"])


def test_a_self_evaluator_reads_along(
    tiny_engine: TransformersEngine, big: TransformersEngine, calibrator: ConfidenceCalibrator
) -> None:
    evaluator = SelfEvaluator(tiny_engine, calibrator=calibrator)
    router = a_router(tiny_engine)
    cascade = Cascade([("small", router), ("big", big)], confidence=1.0, judge=evaluator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "score_many", lambda *a, **k: pytest.fail("the answers were run again"))
        found = cascade.generate(CHATS, **HOW)
    written = router.generate(CHATS, features=evaluator.features, **HOW)
    wanted = [evaluator.confidence(r.generation)[0] for r in written]
    assert [c.attempts[0].confidence for c in found] == pytest.approx(wanted)
    assert None not in wanted


def test_a_self_evaluator_of_another_model_reads_the_text(
    tiny_engine: TransformersEngine, big: TransformersEngine, calibrator: ConfidenceCalibrator
) -> None:
    evaluator = SelfEvaluator(tiny_engine, calibrator=calibrator)
    found = Cascade([("big", big), ("again", big)], confidence=1.0, judge=evaluator).generate(CHATS, **HOW)
    texts = [g.text for g in big.generate(CHATS, **HOW)]
    wanted = [e.confidence for e in evaluator.score_many(list(zip(CHATS, texts, strict=True)))]
    assert [c.attempts[0].confidence for c in found] == pytest.approx(wanted)


def test_cancelled_answers_are_not_asked_again(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    cancel = CancelToken()
    cancel.cancel()
    cascade = Cascade([("small", a_router(tiny_engine)), ("big", big)], confidence=0.5, judge=lambda r: 0.0)
    found = cascade.generate(CHATS, cancel=cancel, **HOW)
    assert [[a.why for a in c.attempts] for c in found] == [["cancelled"]] * 4


def test_async_and_json(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    cascade = Cascade([("small", a_router(tiny_engine)), ("big", big)], confidence=0.5, judge=lambda r: 0.0)
    found = asyncio.run(cascade.agenerate(CHATS[0], **HOW))
    assert isinstance(found, Cascaded)
    assert found.answer == cascade.generate(CHATS[0], **HOW).answer
    read = json.loads(json.dumps(found.to_dict()))
    assert [a["why"] for a in read["attempts"]] == ["unsure", "last"]
    assert cascade.generate([], **HOW) == []


def test_what_is_refused(tiny_engine: TransformersEngine, big: TransformersEngine) -> None:
    router = a_router(tiny_engine)
    two: list[Any] = [("small", router), ("big", big)]
    for steps, changes in [
        (two[:1], {}),
        ([two[0], two[0]], {}),
        (two, {"confidence": 1.5}),
        (two, {"confidence": [0.5, 0.5]}),
        (two, {"missing": "fail"}),
        (two, {"judge": None}),
        (two, {"judge": {"other": lambda r: 1.0}}),
        ([two[0], ("big", big, "slow")], {}),
    ]:
        with pytest.raises(InvalidInputError):
            Cascade(steps, **({"confidence": 0.5, "judge": lambda r: 1.0} | changes))
    with pytest.raises(InvalidInputError, match="no confidence"):
        Cascade([replace(Cascade(two, confidence=0.5, judge=lambda r: 1.0).steps[1], name="x"), two[0]], confidence=0.5)
