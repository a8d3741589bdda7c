"""What the scripts on vLLM judge with: exceptions thrown anywhere, and features held to exact ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from _load import Streamed, step_seconds, undisturbed
from _parity_reference import Compared, compare
from _throwing import Calls, InjectedError, Point, broken, points, throwing
from kvroute.pooling import PoolingSpec
from kvroute.serving import answers, asks, kept_requests, state_rows, token_runs

SPEC = PoolingSpec(tokens="last")
WINDOW = Point("kvroute.serving.token_runs", None, "window_of")


def test_the_call_that_is_meant_throws_and_no_other():
    thrown: list[int] = []
    with throwing(WINDOW, 1, thrown):
        assert token_runs.window_of(SPEC) == 1
        with pytest.raises(InjectedError):
            token_runs.window_of(SPEC)
        assert token_runs.window_of(SPEC) == 1
    assert thrown == [1]
    with broken(WINDOW), pytest.raises(InjectedError):
        token_runs.window_of(SPEC)
    assert token_runs.window_of(SPEC) == 1


@pytest.mark.parametrize(
    ("point", "call"),
    [
        (Point("kvroute.serving.asks", "Ask", "from_dict"), lambda: asks.Ask.from_dict({"mode": "fast"})),
        (Point("kvroute.serving.answers", "Result", "to_dict"), lambda: answers.Result().to_dict()),
        (
            Point("kvroute.serving.kept_requests", "KeptRequest", "reads_answer"),
            lambda: kept_requests.KeptRequest(1, None, ()).reads_answer,
        ),
        (Point("kvroute.serving.state_rows", "StateRows", "__init__"), state_rows.StateRows),
    ],
)
def test_methods_properties_and_constructors_are_found_and_throw(point, call):
    assert point in points()
    expected = call()
    thrown: list[int] = []
    with throwing(point, 0, thrown), pytest.raises(InjectedError):
        call()
    assert thrown == [0]
    assert type(call()) is type(expected)


def test_what_vllm_calls_and_what_python_makes_is_no_place_to_throw():
    found = points()
    assert len(found) == len(set(found)) > 200
    assert Point("kvroute.serving.kept_requests", "KeptRequest", "__init__") not in found
    assert not [p for p in found if p.owner == "KVRouteConnector" and not p.name.startswith("_")]


def test_calls_are_counted_and_looked_into_where_that_is_meant():
    inner, outer = Point("kvroute.serving.asks", "Ask", "to_dict"), Point("kvroute.serving.token_runs", None, "runs_of")

    calls = Calls()
    with calls.counted([WINDOW, inner], {WINDOW: lambda spec: spec.tokens == "first"}):
        for tokens in ("last", "last", "first"):
            token_runs.window_of(PoolingSpec(tokens=tokens))
    assert calls.count == {WINDOW: 3}
    assert calls.inside == {WINDOW: 2}
    assert outer not in calls.count


class Exact:
    """A reference that knows one answer."""

    def exact(self, prompt: list[int], answer: list[int]) -> dict[str, Any]:
        return {"vector": np.array([2.0, -4.0]), "score": np.array(0.5), "length": np.array(float(len(answer)))}


def said(vector: list[float], score: float | None, length: float = 2.0, **more: Any) -> dict[str, Any]:
    scores = {"score": {"value": score}, "length": {"value": length}}
    return {"features": {"vector": vector}, "scores": scores, "confidence": None, "error": None, "faults": [], **more}


def asked(*results: Any) -> list[dict[str, Any]]:
    return [{"prompt": [1], "answers": [[5, 6]] * len(results), "results": list(results), "cached": 3}]


def test_every_answer_is_compared_and_the_worst_counts():
    found = compare(asked(said([2.0, -4.0], 0.5), said([2.0, -4.4], 0.4)), Exact())  # type: ignore[arg-type]
    assert (found.answers, found.cached, found.absent) == (2, 3, [])
    assert found.worst == pytest.approx({"vector": 0.1, "score": 0.1, "length": 0.0})
    assert found.times({"vector": 0.05, "score": 0.01, "length": 0.0}) == (pytest.approx(10.0), "score")


def test_what_is_missing_or_counts_other_tokens_is_found():
    results = [None, {"error": "off"}, said([2.0, -4.0], None), said([2.0, -4.0], 0.5, faults=["score: gone"])]
    found = compare(asked(*results), Exact())  # type: ignore[arg-type]
    assert found.absent == ["no result", "off", "score: missing", "score: gone"]
    found = compare(asked(said([2.0, -4.0], 0.5, length=1.0)), Exact())  # type: ignore[arg-type]
    assert found.times(dict.fromkeys(found.worst, 0.0))[0] > 1e6
    assert Compared().times({})[0] == np.inf


def test_steps_are_told_from_requests_and_what_disturbs_single_runs_is_left_out():
    requests = [Streamed(3, None, [1.0 + late, 1.5 + late, 2.25 + late]) for late in (0.0, 0.0, 0.25)]
    quiet = step_seconds([*requests, Streamed(3, None, [5.0, 6.0])])  # the last one got two tokens in one chunk
    assert quiet.tolist() == [1.0, 0.5, 0.75]
    runs = [quiet.copy() for _ in range(9)]
    for number, run in enumerate(runs[:6]):
        run[number % 3] += 10  # another step of each is held up
    assert undisturbed(runs) == 2.25
    assert undisturbed([2 * run for run in runs]) == 4.5
