"""ConfidenceCalibrator: monotone, its direction found, out-of-fold figures, files that can't be mistaken."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score

from kvroute import (
    CalibrationError,
    ConfidenceCalibrator,
    FileFormatError,
    KVRouteError,
    ModelInfo,
    ModelMismatchError,
    Score,
    SelfEvaluator,
    TransformersEngine,
)
from kvroute.calibration_metrics import expected_calibration_error
from kvroute.confidence_maps import auroc
from tiny_models import build_model, build_tokenizer


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return TransformersEngine(build_model("llama"), build_tokenizer(), name="tiny-llama").info


@pytest.fixture(scope="module")
def other() -> ModelInfo:
    return TransformersEngine(build_model("llama", seed=1), build_tokenizer(), name="another").info


def made_up(n: int = 200, seed: int = 0, sign: float = 1.0) -> tuple[list[dict[str, Any]], list[bool]]:
    """Answers whose ``mean_logprob`` says something of whether they are right; ``length`` says nothing."""
    random = np.random.default_rng(seed)
    correct = random.random(n) < 0.6
    signal = sign * (correct * 1.5 + random.normal(size=n))
    noise = random.normal(50, 10, size=n)
    rows = [{"mean_logprob": float(s), "length": float(z)} for s, z in zip(signal, noise, strict=True)]
    return rows, correct.tolist()


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_confidence_follows_the_score_in_the_direction_of_the_data(info: ModelInfo, method: Any, sign: float) -> None:
    rows, correct = made_up(sign=sign)
    fitted = ConfidenceCalibrator.fit(rows, correct, names=["mean_logprob"], method=method, info=info)
    grid = np.linspace(-6, 6, 101)
    found = [fitted.confidence({"mean_logprob": float(x)})[0] for x in sign * grid]
    assert all(c is not None and 0 <= c <= 1 for c in found)
    steps = np.diff(np.array(found, dtype=np.float64))
    assert (steps >= -1e-12).all()  # flipped data, flipped map: always up along sign * grid
    assert found[-1] > found[0] + 0.5
    assert fitted.metrics.auroc > 0.75
    assert fitted.metrics.brier < 0.2 < fitted.metrics.right * (1 - fitted.metrics.right)
    if method == "isotonic":
        assert fitted.map.direction == ("higher" if sign > 0 else "lower")


def test_a_score_that_says_nothing_gives_chance_and_the_share_of_right_answers(info: ModelInfo) -> None:
    rows, correct = made_up(600)
    fitted = ConfidenceCalibrator.fit(rows, correct, names=["length"], info=info)
    assert abs(fitted.metrics.auroc - 0.5) < 0.1
    confidence, _ = fitted.confidence({"length": 50.0})
    assert confidence == pytest.approx(np.mean(correct), abs=0.05)


def test_metrics_are_out_of_fold(info: ModelInfo) -> None:
    """Isotonic maps interpolate noise: judged on its own rows the AUROC of noise would be far above chance."""
    rows, correct = made_up(100)
    fitted = ConfidenceCalibrator.fit(rows, correct, names=["length"], method="isotonic", info=info)
    own = np.array([fitted.confidence(r)[0] for r in rows], dtype=np.float64)
    assert fitted.metrics.auroc < auroc(own, np.array(correct)) - 0.02
    assert fitted.metrics.n == 100


def test_figures_agree_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    confidence = random.random(300).round(2)  # ties
    truth = random.random(300) < confidence
    assert auroc(confidence, truth) == pytest.approx(roc_auc_score(truth, confidence), abs=1e-12)
    by_hand = 0.0
    for low in range(10):
        inside = (confidence * 10 >= low) & ((confidence * 10 < low + 1) | ((low == 9) & (confidence == 1)))
        if inside.any():
            by_hand += inside.mean() * abs(confidence[inside].mean() - truth[inside].mean())
    assert expected_calibration_error(confidence, truth) == pytest.approx(by_hand, abs=1e-12)


def test_logistic_agrees_with_scikit_learn(info: ModelInfo) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, correct = made_up()
    fitted = ConfidenceCalibrator.fit(rows, correct, info=info)
    assert fitted.names == ("mean_logprob", "length")
    x = np.array([[r["mean_logprob"], r["length"]] for r in rows])
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, correct).predict_proba(x)[:, 1]
    ours = [fitted.confidence(r)[0] for r in rows]
    assert ours == pytest.approx(theirs, abs=1e-9)
    brier = brier_score_loss(correct, ours)
    assert fitted.metrics.brier == pytest.approx(brier, abs=0.02)  # two parameters hardly overfit 200 rows


def test_seed_decides_the_metrics_and_only_them(info: ModelInfo) -> None:
    rows, correct = made_up()
    first, again, third = (ConfidenceCalibrator.fit(rows, correct, info=info, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.metrics != third.metrics
    assert first.map == third.map


def test_answers_to_one_question_share_a_fold(info: ModelInfo) -> None:
    """Each question comes 10 times, its score is noise but the same each time: only a leak could foretell it."""
    random = np.random.default_rng(0)
    score, right = random.normal(size=30), random.random(30) < 0.5
    rows = [{"scores": {"entropy": float(s)}, "correct": bool(r), "prompt": f"{i}"}
            for i, (s, r) in enumerate(zip(score, right, strict=True)) for _ in range(10)]  # fmt: skip
    apart = ConfidenceCalibrator.fit_rows(rows, info=info, method="isotonic")
    assert apart.metrics.grouped
    scores, correct = [r["scores"] for r in rows], [r["correct"] for r in rows]
    leaky = ConfidenceCalibrator.fit(scores, correct, info=info, method="isotonic")
    assert not leaky.metrics.grouped
    assert apart.metrics.auroc < leaky.metrics.auroc


def test_rows_without_a_score_are_left_out_and_said(info: ModelInfo) -> None:
    rows, correct = made_up()
    without = [dict(r) for r in rows]
    without[0]["length"] = None
    without[1]["length"] = Score(None, "why not")
    without[2]["length"] = math.nan
    del without[3]["length"]
    with pytest.warns(RuntimeWarning, match="4 of 200 rows miss a score of mean_logprob, length"):
        fitted = ConfidenceCalibrator.fit(without, correct, info=info)
    assert (fitted.rows, fitted.left_out) == (196, 4)
    assert fitted.map == ConfidenceCalibrator.fit(rows[4:], correct[4:], info=info).map


@pytest.mark.parametrize(
    ("rows", "correct", "message"),
    [
        ([], [], "needed are at least 20 answers, 5 right and 5 wrong"),
        ([{"length": 1.0}] * 19, [True] * 9 + [False] * 10, "9 right and 10 wrong .* at least 20 answers"),
        ([{"length": 1.0}] * 50, [True] * 50, "50 right and 0 wrong .* 5 right and 5 wrong"),
        ([{"length": None}] * 50, [True] * 25 + [False] * 25, r"0 right and 0 wrong answers with scores \(50 more"),
        ([{"length": "a"}] * 50, [True] * 25 + [False] * 25, "length of row 0 is 'a', not a number"),
        ([{"length": 10**400}] * 50, [True] * 25 + [False] * 25, "length of row 0 is 1000.*, not a real number"),
        ([{"length": -1e101}] * 50, [True] * 25 + [False] * 25, "length of row 0 is -1e.101, too large"),
        ([{"lenght": 1.0}] * 50, [True] * 25 + [False] * 25, "No score is named 'lenght'.*length"),
        ([{"length": 1.0}] * 50, [True] * 25 + ["no"] * 25, "'correct' of row 25 is 'no'"),
        ([{"length": 1.0}] * 50, [True] * 25, "50 rows of scores, and 25"),
        ([{"length": 1.0}, 7] * 25, [True, False] * 25, "scores of row 1 are int"),
    ],
)
def test_rows_that_can_not_be_fitted(info: ModelInfo, rows: Any, correct: Any, message: str) -> None:
    names = ["length"] if not rows else None
    with pytest.raises(CalibrationError, match=message):
        ConfidenceCalibrator.fit(rows, correct, names=names, info=info)


def test_isotonic_takes_one_score(info: ModelInfo) -> None:
    rows, correct = made_up()
    with pytest.raises(CalibrationError, match="reads one score, not 2"):
        ConfidenceCalibrator.fit(rows, correct, method="isotonic", info=info)


def test_no_confidence_without_its_scores(info: ModelInfo) -> None:
    fitted = ConfidenceCalibrator.fit(*made_up(), info=info)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"length": 3.0}, "the score mean_logprob is missing"),
        ({"length": 3.0, "mean_logprob": Score(None, "it is short")}, "the answer has no mean_logprob: it is short"),
        ({"length": None, "mean_logprob": -1.0}, "the answer has no length"),
        ({"length": math.inf, "mean_logprob": -1.0}, "length is not finite"),
        ({"length": 10**400, "mean_logprob": -1.0}, "length is not finite"),
        ({"length": 1j, "mean_logprob": -1.0}, "length is not a number"),
        ({"length": "long", "mean_logprob": -1.0}, "length is not a number"),
    ]
    for scores, reason in cases:
        confidence, why = fitted.confidence(scores)
        assert confidence is None
        assert reason in str(why)
    confidence, why = fitted.confidence({"length": Score(3.0), "mean_logprob": -1, "entropy": 1.0})
    assert confidence is not None
    assert why is None


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
def test_roundtrip(info: ModelInfo, tmp_path: Path, method: Any) -> None:
    rows, correct = made_up()
    fitted = ConfidenceCalibrator.fit(rows, correct, names=["mean_logprob"], method=method, info=info)
    path = tmp_path / "folder" / "mine.json"
    fitted.save(path)
    loaded = ConfidenceCalibrator.load(path, info)
    assert loaded == fitted
    assert [loaded.confidence(r) for r in rows] == [fitted.confidence(r) for r in rows]
    assert ConfidenceCalibrator.load(path) == fitted
    body = json.loads(path.read_text())
    assert body["body"]["fingerprint"] == info.fingerprint
    assert set(body) == {"kind", "format", "kvroute", "checksum", "body"}
    assert body["body"]["metrics"]["n"] == 200


def test_another_model_is_refused_and_both_are_named(info: ModelInfo, other: ModelInfo, tmp_path: Path) -> None:
    fitted = ConfidenceCalibrator.fit(*made_up(), info=info)
    fitted.save(tmp_path / "x.json")
    with pytest.raises(ModelMismatchError, match=r"tiny-llama.*another"):
        ConfidenceCalibrator.load(tmp_path / "x.json", other)
    engine = TransformersEngine(build_model("llama", seed=1), build_tokenizer(), name="another")
    with pytest.raises(ModelMismatchError, match=r"tiny-llama.*another"):
        SelfEvaluator(engine, calibrator=fitted)


def _changed(path: Path, change: Any) -> None:
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))


def test_files_that_are_not_whole(info: ModelInfo, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    fitted = ConfidenceCalibrator.fit(*made_up(), info=info)

    def check(message: str) -> None:
        with pytest.raises(FileFormatError, match=message):
            ConfidenceCalibrator.load(path, info)

    check("can't be read")
    fitted.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    check("can't be read")
    fitted.save(path)
    _changed(path, lambda w: w["body"]["map"].update(intercept=5.0))
    check("has changed")
    fitted.save(path)
    _changed(path, lambda w: w.update(format="2"))
    check("newer kvroute")
    fitted.save(path)
    _changed(path, lambda w: w.update(kind="kvroute.embedder"))
    check("holds kvroute.embedder")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b["map"].update(scales=[0.0, 1.0]),
        lambda b: b["map"].update(coefficients=[1.0]),
        lambda b: b["map"].update(method="pickle"),
        lambda b: b.update(names=["length"]),
        lambda b: b.update(more=1),
        lambda b: b.pop("metrics"),
        lambda b: b["map"].update(intercept=math.nan),
    ],
)
def test_a_body_that_makes_no_sense_is_refused_even_with_a_checksum(
    info: ModelInfo, tmp_path: Path, change: Any
) -> None:
    import hashlib

    path = tmp_path / "x.json"
    ConfidenceCalibrator.fit(*made_up(), info=info).save(path)
    whole = json.loads(path.read_text())
    change(whole["body"])
    text = json.dumps(whole["body"], sort_keys=True)
    whole["checksum"] = hashlib.sha256(f"kvroute.confidence\n{text}".encode()).hexdigest()
    path.write_text(json.dumps(whole))
    with pytest.raises(FileFormatError, match="not whole"):
        ConfidenceCalibrator.load(path, info)


def test_by_name(info: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = ConfidenceCalibrator.fit(*made_up(), info=info)
    fitted.save(tmp_path / "in" / "mine.v1.json")
    fitted.save(tmp_path / "secret.json")
    monkeypatch.delenv("KVROUTE_CALIBRATORS", raising=False)
    with pytest.raises(CalibrationError, match="KVROUTE_CALIBRATORS"):
        ConfidenceCalibrator.by_name("mine.v1", info)
    assert ConfidenceCalibrator.by_name("mine.v1", info, tmp_path / "in") == fitted
    monkeypatch.setenv("KVROUTE_CALIBRATORS", str(tmp_path / "in"))
    assert ConfidenceCalibrator.by_name("mine.v1", info) == fitted
    with pytest.raises(CalibrationError, match=r"No calibrator is named 'yours'.*There are: mine\.v1"):
        ConfidenceCalibrator.by_name("yours", info)
    for name in ("../secret", "/etc/passwd", "..", "", "a/b", "a\\b", "mine.v1\n", ".hidden", "a\0b", 7):
        with pytest.raises(CalibrationError, match="not a calibrator's name"):
            ConfidenceCalibrator.by_name(name, info)  # type: ignore[arg-type]


def test_applying_needs_no_scikit_learn(info: ModelInfo, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    ConfidenceCalibrator.fit(*made_up(), info=info).save(path)
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from kvroute import ConfidenceCalibrator\n"
        f"print(ConfidenceCalibrator.load({str(path)!r}).confidence({{'mean_logprob': 0.0, 'length': 50}})[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < 1


# ---------------------------------------------------------------------- rows


def test_fit_rows_scores_what_has_no_scores(info: ModelInfo) -> None:
    engine = TransformersEngine(build_model("llama"), build_tokenizer(), name="tiny-llama")
    rows: list[dict[str, Any]] = [
        {"prompt": f"what is {i}?", "answer": f"it is {i % 7}, I think", "correct": i % 3 == 0} for i in range(30)
    ]
    fitted = ConfidenceCalibrator.fit_rows(rows, engine=engine, names=["logits"])
    assert fitted.names == ("mean_logprob", "entropy", "max_probability")
    scored = SelfEvaluator(engine).score_many([(r["prompt"], r["answer"]) for r in rows])
    flat = [{**e.to_dict(), "correct": r["correct"], "prompt": r["prompt"]} for e, r in zip(scored, rows, strict=True)]
    again = ConfidenceCalibrator.fit_rows(flat, info=engine.info, names=["logits"])
    some = [{**r, "prompt": q["prompt"], "answer": q["answer"]} for r, q in zip(flat, rows, strict=True)]
    for row in some[:5]:
        row["scores"] = {"length": 3.0}  # of the asked ones none: scored anew
    mixed = ConfidenceCalibrator.fit_rows(some, engine=engine, names=["logits"])
    assert (mixed.rows, mixed.left_out) == (30, 0)
    ours = fitted.confidence(scored[0].scores)[0]
    for calibrator in (again, mixed):
        assert calibrator.confidence(scored[0].scores)[0] == pytest.approx(ours, abs=1e-3)
    evaluation = SelfEvaluator(engine, calibrator=fitted, scores=["length"]).score(rows[0]["prompt"], rows[0]["answer"])
    assert evaluation.confidence == pytest.approx(ours, abs=1e-4)
    assert evaluation.confidence_reason is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"scores": {"length": 1.0}}, "Row 0 does not say whether"),
        ({"correct": True}, "Row 0 has neither scores nor prompt and answer"),
        ({"correct": True, "prompt": "a", "answer": "b"}, "1 rows have no scores, and there is no engine"),
        ({"correct": True, "prompt": "a", "answer": "b", "scores": [1.0]}, "1 rows have no scores"),
        ({"correct": True, "scores": {1: 2}}, "No score is named 1"),
        ({"correct": "yes", "scores": {}}, "'correct' of row 0 is 'yes'"),
        (3, "Row 0 does not say"),
    ],
)
def test_rows_that_lack_something(info: ModelInfo, row: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        ConfidenceCalibrator.fit_rows([row], info=info)


_VALUE = st.one_of(st.none(), st.floats(), st.integers(), st.text(max_size=3), st.booleans(), st.just(Score(1.0)))
_NUMBER = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 1e308, -1e308, 5e-324]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), method=st.sampled_from(["logistic", "isotonic"]), numbers=st.booleans())
def test_any_input_gives_a_confidence_or_our_error(info: ModelInfo, data: Any, method: Any, numbers: bool) -> None:
    value = _NUMBER if numbers else _VALUE
    rows = data.draw(st.lists(st.fixed_dictionaries({"entropy": value}), min_size=20, max_size=40))
    correct = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* rows miss a score", category=RuntimeWarning)
            fitted = ConfidenceCalibrator.fit(rows, correct, method=method, info=info)
    except KVRouteError:
        return
    confidence, reason = fitted.confidence({"entropy": data.draw(value)})
    assert (confidence is None) != (reason is None)
    assert confidence is None or 0 <= confidence <= 1
