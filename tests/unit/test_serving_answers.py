"""What a request gets back: JSON whatever went wrong, nothing that a client must not see, and the same when read."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvroute import Decision, FileFormatError, InvalidInputError, Neighbour, NonFiniteCacheError, Score, Switch
from kvroute.errors import AskError
from kvroute.serving.answers import Result, Tokens, clean, public_text


def a_decision(**changes: Any) -> Decision:
    fields: dict[str, Any] = {
        "mode": "slow",
        "difficulty": 71.5,
        "threshold": 50.0,
        "probability": 0.25,
        "why": "difficulty",
        "policy": "two-step",
        "switch": Switch(to="fast", token=16, difficulty=12.0, threshold=30.0, forced=4),
        "checkpoints": [(8, 40.0), (16, 12.0)],
        "seconds": 0.001,
    }
    return Decision(**{**fields, **changes})


def a_result() -> Result:
    return Result(
        features={"prompt:fast": np.array([0.1, -2.5], dtype=np.float32)},
        scores={"kv_coe_r_token": Score(0.5), "kv_coe_c_token": Score(None, "the chain has 2 vectors")},
        confidence=Score(0.75),
        decision=a_decision(),
        tokens=Tokens(prompt=9, answer=20, thought=12),
        faults=["one thing failed"],
    )


def test_it_comes_back_as_it_went() -> None:
    result = a_result()
    back = Result.from_json(result.to_json())
    assert back.features["prompt:fast"].dtype == np.float32
    assert np.array_equal(back.features["prompt:fast"], result.features["prompt:fast"])
    assert (back.scores, back.confidence, back.decision) == (result.scores, result.confidence, result.decision)
    assert (back.tokens, back.faults, back.error) == (result.tokens, result.faults, None)
    assert Result.from_json(Result().to_json()) == Result()


def test_the_schema() -> None:
    body = a_result().to_dict()
    assert list(body) == ["features", "scores", "confidence", "decision", "tokens", "faults", "error"]
    assert body["scores"]["kv_coe_c_token"] == {"value": None, "reason": "the chain has 2 vectors"}
    assert body["tokens"] == {"prompt": 9, "answer": 20, "thought": 12}
    assert body["decision"]["final_mode"] == "fast"
    assert body["decision"]["checkpoints"] == [[8, 40.0], [16, 12.0]]
    assert body["decision"]["switch"]["token"] == 16
    later = {**body, "new": 1, "decision": {**body["decision"], "new": 2}}
    assert Result.from_dict(later).decision == a_decision()


def test_training_questions_stay_inside() -> None:
    near = Neighbour(id="q1", question="a secret question", label=3.0, distance=0.1)
    assert "secret" not in Result(decision=a_decision(nearest=[near])).to_json()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_none(bad: float) -> None:
    switch = Switch(to="fast", token=1, difficulty=bad, threshold=bad, forced=0)
    decision = a_decision(
        difficulty=bad, threshold=bad, probability=bad, switch=switch, checkpoints=[(1, bad)], seconds=bad
    )
    result = Result(features={"bad": np.array([1, bad], np.float32), "good": np.ones(1, np.float32)}, decision=decision)
    body = json.loads(result.to_json())
    assert list(body["features"]) == ["good"]
    assert body["faults"] == ["The feature 'bad' is not finite."]
    assert [body["decision"][k] for k in ("difficulty", "threshold", "probability", "seconds")] == [None] * 4
    assert body["decision"]["checkpoints"] == [[1, None]]
    back = Result.from_dict(body).decision
    assert back is not None
    assert back.switch is not None
    assert math.isnan(back.switch.difficulty)
    assert result.faults == []  # asking twice adds nothing


def test_numpy_numbers_are_json() -> None:
    decision = a_decision(difficulty=np.float32(1.5), checkpoints=[(np.int64(3), np.float32(2.5))])
    body = json.loads(Result(decision=decision, scores={"length": Score(np.float32(2.0))}).to_json())
    assert body["decision"]["difficulty"] == 1.5
    assert body["decision"]["checkpoints"] == [[3, 2.5]]
    assert body["scores"]["length"]["value"] == 2.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/kv/head.json can't be read", "<path> can't be read"),
        ("No such file: '/srv/my models/head.json'", "No such file: <path>"),
        ("see ../heads/a and ~/b, file:///c/d", "see <path> and <path>, <path>"),
        (r"C:\models\head is torn", "<path> is torn"),
        ("3/4 of keys and/or values, 5 tokens/s", "3/4 of keys and/or values, 5 tokens/s"),
    ],
)
def test_paths_stay_inside(text: str, expected: str) -> None:
    assert clean(text) == expected
    body = Result(faults=[text], error=text, decision=a_decision(fault=text), scores={"x": Score(None, text)}).to_dict()
    assert body["faults"] == [expected]
    assert body["error"] == body["decision"]["fault"] == body["scores"]["x"]["reason"] == expected


def test_errors_in_public() -> None:
    assert public_text(AskError("No.", hint="Yes.")) == "No. Yes."
    assert public_text(FileFormatError("/srv/x.json is torn.")) == "<path> is torn."
    assert "layer 2" in public_text(NonFiniteCacheError(0, 2, 3, "keys"))
    assert public_text(OSError(2, "No such file", "/srv/secret")) == "FileNotFoundError inside kvroute."
    failed = Result.failed(AskError("No.", hint="Yes."), Tokens(prompt=3)).to_dict()
    assert (failed["error"], failed["tokens"]["prompt"], failed["features"]) == ("No. Yes.", 3, {})


@given(st.text(max_size=2000))
def test_any_text_is_cut(text: str) -> None:
    assert len(clean(text)) <= 300


def test_cleaning_takes_no_time() -> None:
    for text in ("/" * 10**6, "'/" * 500_000, "a/" * 500_000, ".." * 500_000):
        assert len(clean(text)) <= 300


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["features", "scores", "confidence", "decision", "tokens", "faults", "error"]),
        JSONISH
        | st.dictionaries(
            st.sampled_from(["mode", "why", "switch", "checkpoints", "value", "reason", "prompt"]), JSONISH
        ),
        max_size=4,
    )
    | JSONISH
)
def test_a_strange_body_is_refused_or_read(body: Any) -> None:
    try:
        result = Result.from_dict(body)
    except InvalidInputError:
        return
    json.loads(result.to_json())


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "3", "[]", '{"features": {"a": [1e308]}}', b"\xff", '{"scores": {"a": {}}}']
)
def test_a_torn_text_is_refused(text: Any) -> None:
    with pytest.raises(InvalidInputError):
        Result.from_json(text)
