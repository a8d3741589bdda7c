"""A trained confidence in SelfEvaluator: of answers that exist and of those that are being written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvroute import (
    AnswerPooling,
    ConfidenceCalibrator,
    DifficultyHead,
    InvalidInputError,
    ModelMismatchError,
    PoolingSpec,
    SelfEvaluator,
)
from kvroute.confidence_maps import LogisticMap
from kvroute.features import plan_features
from kvroute.heads.fitting import Rows, ridge_path
from kvroute.pooling import pool

SPEC = PoolingSpec(layers=(1, 2), part="v", heads="concat")
CHAT = [{"role": "user", "content": "what is the capital of the country?"}]
ROWS: list[tuple[Any, str]] = [(CHAT, "the lazy dog"), ("the cat sat on", " the mat and the fox"), (CHAT, "a question")]


def a_head(engine: Any, spec: PoolingSpec = SPEC) -> DifficultyHead:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, spec.dimension(engine.info))).astype(np.float32)
    model = ridge_path(Rows(x, (x[:, 0] > 0).astype(float)), [0.01])[0]
    curve = LogisticMap(means=(0.5,), scales=(0.3,), coefficients=(1.5,), intercept=0.1)
    return DifficultyHead(
        spec=spec, target="correct", predictor=model, map=curve, model=engine.info.name,
        fingerprint=engine.info.fingerprint, data_hash="x",
    )  # fmt: skip


def by_hand(engine: Any, head: DifficultyHead, prompt: Any, answer: str) -> float:
    """One answer alone: prefilled whole, its tokens but the end token pooled."""
    before = engine.tokenize(prompt)
    ids = [*before, *engine.tokenize_texts([answer], special_tokens=False)[0]]
    _, view = next(engine.prefill([ids]))
    return float(head.predict(np.asarray(pool(view, head.spec, start=[len(before)], stop=[len(ids)])))[0])


def test_the_confidence_is_the_heads(tiny_engines: Any) -> None:
    head = a_head(tiny_engines, PoolingSpec(layers="last:1", part="kv"))
    for scores in (None, ["length"], ["kv-coe", "logits"]):
        found = SelfEvaluator(tiny_engines, head=head, scores=scores).score_many(ROWS)
        for (prompt, answer), evaluation in zip(ROWS, found, strict=True):
            assert evaluation.confidence == pytest.approx(by_hand(tiny_engines, head, prompt, answer), abs=1e-4)
            assert evaluation.confidence_reason is None
            assert evaluation.confidences == {"head": evaluation.confidence}
            assert evaluation.to_dict()["confidences"] == evaluation.confidences


def test_scores_are_what_they_are_without_it(tiny_engine: Any) -> None:
    plain = SelfEvaluator(tiny_engine).score_many(ROWS)
    with_head = SelfEvaluator(tiny_engine, head=a_head(tiny_engine)).score_many(ROWS)
    assert [e.scores for e in plain] == [e.scores for e in with_head]
    assert all("confidences" not in e.to_dict() for e in plain)


def test_the_head_alone_runs_no_deeper_than_it_reads(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    read = tiny_engine.read
    monkeypatch.setattr(tiny_engine, "read", lambda *a, **k: asked.append((k["want"], k["layers"])) or read(*a, **k))
    SelfEvaluator(tiny_engine, head=a_head(tiny_engine), scores=["length"]).score_many(ROWS)
    SelfEvaluator(tiny_engine, head=a_head(tiny_engine), scores=["kv-coe"]).score_many(ROWS)
    assert asked == [(["kv"], (1, 2)), (["kv"], None)]


def test_answers_that_are_being_written(tiny_engine: Any) -> None:
    """What generation gives is what reading the same tokens gives."""
    evaluator = SelfEvaluator(tiny_engine, head=a_head(tiny_engine))
    assert evaluator.features["confidence"] == AnswerPooling(SPEC)
    answers = tiny_engine.generate([CHAT, "the quick"], features=evaluator.features, max_tokens=9)
    for prompt, answer in zip([CHAT, "the quick"], answers, strict=True):
        confidence, reason = evaluator.confidence(answer)
        assert reason is None
        assert confidence == pytest.approx(evaluator.score(prompt, answer).confidence, abs=1e-4)
    confidence, reason = evaluator.confidence(tiny_engine.generate(CHAT, max_tokens=3))
    assert confidence is None
    assert "features=evaluator.features" in str(reason)
    one = tiny_engine.generate(CHAT, features=evaluator.features, max_tokens=1)
    confidence, reason = evaluator.confidence(one)
    assert confidence is None
    assert "no token with keys and values" in str(reason)


def test_an_answer_of_one_token_has_none_and_costs_the_others_nothing(tiny_engine: Any) -> None:
    evaluator = SelfEvaluator(tiny_engine, head=a_head(tiny_engine))
    found = evaluator.score_many([(CHAT, [65]), *ROWS])
    assert found[0].confidence is None
    assert "one token" in str(found[0].confidence_reason)
    assert [e.confidence for e in found[1:]] == pytest.approx([e.confidence for e in evaluator.score_many(ROWS)])
    alone = evaluator.score(CHAT, [65])
    assert (alone.confidence, alone.confidence_reason) == (None, found[0].confidence_reason)


def test_the_calibrator_stands_beside_it(tiny_engine: Any) -> None:
    rng = np.random.default_rng(0)
    scores = [{"length": float(v)} for v in rng.uniform(1, 30, 60)]
    calibrator = ConfidenceCalibrator.fit(scores, [s["length"] > 15 for s in scores], info=tiny_engine.info)
    both = SelfEvaluator(tiny_engine, calibrator=calibrator, head=a_head(tiny_engine)).score(*ROWS[0])
    assert both.confidences["head"] == both.confidence
    alone = SelfEvaluator(tiny_engine, calibrator=calibrator).score(*ROWS[0])
    assert both.confidences["calibrator"] == alone.confidence
    assert alone.confidences == {}


def test_from_a_folder_and_what_is_refused(tiny_engine: Any, hybrid_engine: Any, tmp_path: Path) -> None:
    head = a_head(tiny_engine)
    head.save(tmp_path)
    expected = SelfEvaluator(tiny_engine, head=head).score(*ROWS[0]).confidence
    assert SelfEvaluator(tiny_engine, head=tmp_path).score(*ROWS[0]).confidence == expected
    with pytest.raises(ModelMismatchError):
        SelfEvaluator(hybrid_engine, head=head)
    with pytest.raises(ModelMismatchError):
        SelfEvaluator(hybrid_engine, head=str(tmp_path))
    with pytest.raises(InvalidInputError, match="target 'difficulty'"):
        SelfEvaluator(tiny_engine, head=replace(head, target="difficulty"))


def test_an_answers_pooling_is_a_feature_by_name() -> None:
    plan = plan_features({"a": AnswerPooling(SPEC), "p": SPEC})
    assert plan.pooled == {"a": ("answer", SPEC), "p": ("prompt", SPEC)}
    assert plan_features(AnswerPooling(SPEC)).pooled == {"answer": ("answer", SPEC)}
