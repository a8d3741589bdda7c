"""What the scheduler's side counts, hands over, and what metrics are made of."""

from __future__ import annotations

import json

import numpy as np

from kvroute.decisions import Decision, Switch
from kvroute.scores import Score
from kvroute.serving.answers import Result
from kvroute.serving.asks import Ask
from kvroute.serving.tally import Tally, joined, summary
from tests.unit.serving_steps import Engine


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_everything_is_handed_over_once():
    tally = Tally(Clock())
    tally.asked(Ask(features={"kv-coe": "kv-coe"}, policy="p", shadow=True))
    tally.refused()
    tally.fault("reading")
    switch = Switch("slow", 5, 70.0, 50.0, 3)
    decided = Result(decision=Decision("fast", 40.0, 50.0, why="difficulty", switch=switch), confidence=Score(0.25))
    tally.answered("a-1", decided, body := decided.to_dict(), "p")
    shadow = Result(decision=Decision("fast", 60.0, why="shadow", switch=switch))
    tally.answered("a-2", shadow, shadow.to_dict(), "p")
    tally.failed("a-3", {"error": "?"})
    tally.spent("worker", 0.5)
    tally.spent("scheduler", 0.25)
    payload = tally.take()
    assert payload is not None
    assert payload.pop("results") == {"a-1": body, "a-2": shadow.to_dict(), "a-3": {"error": "?"}}
    assert payload == {
        "asks": {"features": 1, "policy": 1, "shadow": 1, "refused": 1},
        "decisions": {"p|slow|difficulty": 1, "p|fast|shadow": 1},
        "switches": {"p|slow": 1},  # in shadow nothing is switched
        "faults": {"reading": 1},
        "difficulty": [40.0, 60.0],
        "confidence": [0.25],
        "seconds": {"worker": 0.5, "scheduler": 0.25},
    }
    json.dumps(payload)
    assert tally.take() is None


def test_time_alone_is_handed_over_once_a_second():
    clock = Clock()
    tally = Tally(clock)
    tally.spent("scheduler", 0.1)
    assert tally.take() is None
    clock.now = 1.5
    tally.spent("scheduler", 0.1)
    assert tally.take() == {"seconds": {"scheduler": 0.2}}
    clock.now = 3.0
    assert tally.take() is None


def test_features_off_is_told_when_it_changes():
    tally = Tally(Clock())
    tally.features_off(False)
    assert tally.take() is None
    tally.features_off(True)
    tally.features_off(True)
    assert tally.take() == {"off": True}
    tally.features_off(True)
    assert tally.take() is None


def test_payloads_join_without_results():
    a = {"asks": {"features": 2}, "difficulty": [1.0], "results": {"x": {}}, "off": False}
    b = {"asks": {"features": 1, "mode": 1}, "difficulty": [3.0], "seconds": {"worker": 0.5}, "off": True}
    both = joined(a, b)
    assert both == {
        "asks": {"features": 3, "mode": 1},
        "difficulty": [1.0, 3.0],
        "seconds": {"worker": 0.5},
        "off": True,
    }
    assert summary(both) == {"kvroute asks": 4, "kvroute mean difficulty": 2.0, "kvroute seconds": 0.5}
    assert a["asks"] == {"features": 2}


def test_a_value_that_is_not_finite_is_not_observed():
    tally = Tally(Clock())
    result = Result(decision=Decision("fast", float("nan")), confidence=Score(None, "not read"))
    tally.answered("a", result, {})
    payload = tally.take()
    assert payload is not None
    assert "difficulty" not in payload
    assert "confidence" not in payload


def test_the_schedulers_side_counts_asks_faults_and_results():
    engine = Engine()
    engine.add("good", 3, 5, ["length"])
    engine.add("wrong", 3, 5, ["no such"])
    engine.add("nan", 3, 5, ["answer:paper-mteb"])
    engine.data["nan"][0].fill_(np.nan)
    for name in ("good", "wrong", "nan"):
        engine.step((name, 0, 3))
        engine.step((name, 3, 2), end=(name,))
    payload = engine.side.tally.take()
    assert payload is not None
    assert payload["asks"] == {"features": 2, "refused": 1}
    assert payload["faults"] == {"not finite": 1}
    assert set(payload["results"]) == {"good", "wrong", "nan"}
    assert all(payload["results"][name] is engine.boxes[name] for name in payload["results"])
    assert payload["seconds"]["worker"] > 0
    assert "off" not in payload


def test_repeated_faults_turn_features_off_and_the_metrics_say_so():
    engine = Engine(faults_before_off=1)
    engine.add("nan", 3, 5, ["answer:paper-mteb"])
    engine.data["nan"][0].fill_(np.nan)
    engine.step(("nan", 0, 3))
    engine.step(("nan", 3, 1), end=("nan",))
    payload = engine.side.tally.take()
    assert payload is not None
    assert payload["off"] is True


def test_an_aborted_answer_has_what_was_read_before_the_step_in_flight():
    engine = Engine(max_features=16)
    engine.add("cut", 4, 9, ["answer:paper-mteb", "length"])
    engine.add("whole", 4, 6, ["answer:paper-mteb", "length"], like="cut")
    engine.step(("whole", 0, 4), ("cut", 0, 4))
    engine.step(("whole", 4, 1), ("cut", 4, 1))
    engine.step(("whole", 5, 1), end=("whole",))  # two answer tokens have keys and values, a third is written
    engine.step(("cut", 5, 1))
    box = engine.side.finished("cut", 3, aborted=True)
    assert box is not None
    assert box["features"] == engine.boxes["whole"]["features"] != {}
    before = dict(box)
    engine.step()
    assert box == before
    assert engine.states == 0
