"""What fails or gets lost between the two sides is noticed, said and counted, and costs nobody else anything."""

from __future__ import annotations

from typing import Any

import pytest

from kvroute.serving.messages import StepMeta, StepResults
from kvroute.serving.tally import Tally, joined
from tests.unit.serving_steps import Engine

FEATURES = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]


def raising(*_: Any, **__: Any) -> Any:
    raise RuntimeError("broken")


def run(engine: Engine, name: str, seed: int = 0) -> dict[str, Any]:
    """A request of six tokens, two of them its answer's that have keys and values."""
    engine.add(name, 4, 6, FEATURES, seed=seed)
    engine.step((name, 0, 4))
    engine.step((name, 4, 1))
    engine.step((name, 5, 1), end=(name,))
    engine.step()
    return engine.boxes[name]


def faults(engine: Engine) -> dict[str, int]:
    payload = engine.side.statistics()
    return {} if payload is None else payload.get("faults", {})


@pytest.mark.parametrize("lost", [1, 2])
def test_an_answer_whose_numbers_did_not_all_arrive_says_so(monkeypatch, lost):
    expected = run(Engine(), "a")
    engine = Engine()
    engine.add("a", 4, 6, FEATURES)
    for step, (start, count) in enumerate(((0, 4), (4, 1), (5, 1))):
        with monkeypatch.context() as patch:
            if step == lost:  # what the worker read never comes
                patch.setattr(engine.workers[0], "results", lambda: None)
            engine.step(("a", start, count), end=("a",) if step == 2 else ())
    box = engine.boxes["a"]
    assert box["features"] == {"prompt:paper-mteb": expected["features"]["prompt:paper-mteb"]}
    assert len(box["faults"]) == 1
    assert "did not all arrive" in box["faults"][0]
    assert all("arrive" in s["reason"] for name, s in box["scores"].items() if name != "length")
    assert box["error"] is None
    assert faults(engine) == {"lost": 1}
    engine.step()
    assert engine.states == 0


@pytest.mark.parametrize("lost", [False, True])
def test_numbers_are_missed_in_an_answer_that_ended_from_outside(monkeypatch, lost):
    engine = Engine()
    engine.add("a", 4, 8, ["answer:paper-mteb"])
    engine.step(("a", 0, 4))
    engine.step(("a", 4, 1))
    with monkeypatch.context() as patch:
        if lost:
            patch.setattr(engine.workers[0], "results", lambda: None)
        engine.step(("a", 5, 1))
    engine.step(("a", 6, 1), abort={"a": 3})
    assert list(engine.boxes["a"]["features"]) == ([] if lost else ["answer:paper-mteb"])
    assert faults(engine) == ({"lost": 1} if lost else {})
    engine.add("b", 4, 8, ["answer:paper-mteb"])
    engine.step(("b", 0, 2), abort={"b": 0})
    assert faults(engine) == {}


@pytest.mark.parametrize("method", ["_work", "_guarded", "_read", "_resolve", "_view"])
def test_a_worker_that_fails_costs_the_requests_of_its_step_their_features_alone(monkeypatch, method):
    engine = Engine()
    engine.add("a", 4, 6, FEATURES)
    with monkeypatch.context() as patch:
        patch.setattr(engine.workers[0], method, raising)
        engine.step(("a", 0, 4))
    engine.step(("a", 4, 1))
    engine.step(("a", 5, 1), end=("a",))
    assert engine.boxes["a"]["error"] == "RuntimeError inside kvroute."
    assert sum(faults(engine).values()) >= 1
    assert run(engine, "b", seed=1)["error"] is None
    assert engine.states == 0


def test_a_request_that_could_not_be_forgotten_does_not_stop_the_step(monkeypatch):
    engine = Engine()
    run(engine, "a")
    worker = engine.workers[0]
    with monkeypatch.context() as patch:
        patch.setattr(worker, "drop", raising)
        worker.step(StepMeta(finished=["x"]))
    results = worker.results()
    assert results is not None
    assert results.lost == 1
    engine.side.merge(results)
    assert faults(engine) == {"hook": 1}
    assert run(engine, "b", seed=1)["error"] is None


def losing(engine: Engine, monkeypatch, *, early: bool = False) -> None:
    """From now on, what is to be read in a step is lost on its way; ``early``: before it is known what that is."""
    step = engine.side.step

    def lost(*given: Any) -> StepMeta:
        if not early:
            step(*given)
        engine.side.unsent()  # as the connector does where its hook fails
        return StepMeta()

    monkeypatch.setattr(engine.side, "step", lost)


@pytest.mark.parametrize("features", [["answer:paper-mteb"], FEATURES])
@pytest.mark.parametrize("lost", range(5))
def test_what_was_to_be_read_in_a_step_and_was_not_is_missed(monkeypatch, features, lost):
    expected, engine = Engine(), Engine()
    for one in (expected, engine):
        one.add("a", 4, 8, features)
        for step, (start, count) in enumerate(((0, 4), (4, 1), (5, 1), (6, 1), (7, 1))):
            with monkeypatch.context() as patch:
                if step == lost and one is engine:
                    losing(one, patch)
                one.step(("a", start, count), end=("a",) if step == 4 else ())
        one.step()
    good, box = expected.boxes["a"], engine.boxes["a"]
    if lost == 0 and features != FEATURES:  # nothing is asked of the prompt
        assert box == good
        return
    assert "answer:paper-mteb" not in box["features"]
    assert all(vector == good["features"][name] for name, vector in box["features"].items())
    assert all(s["value"] is None for name, s in box["scores"].items() if name != "length")
    assert box["error"] or box["faults"]
    assert sum(faults(engine).values()) == 1
    assert engine.states == 0


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_pages_that_were_not_read_in_time_are_not_read(monkeypatch, aborted, early):
    engine = Engine(late=True)
    engine.add("a", 4, 28, ["answer:paper-mteb"], more=9)
    engine.step(("a", 0, 4))
    for start in range(4, 27):
        engine.step(("a", start, 1))
    assert engine.side._running[engine.id("a")].read > 4  # a piece
    engine.step(("a", 27, 1), **({"abort": {"a": 25}} if aborted else {"end": ("a",)}))
    with monkeypatch.context() as patch:
        losing(engine, patch, early=early)
        engine.step()
    engine.memory[:] = 7.0  # somebody else's
    engine.step()
    engine.step()
    box = engine.boxes["a"]
    assert box["tokens"]["answer"] == 25
    assert box["features"] == {}
    assert len(box["faults"]) >= 1
    assert engine.states == 0


def test_a_step_that_only_ends_requests_counts_what_fails_in_it(monkeypatch):
    engine = Engine()
    run(engine, "a")
    worker = engine.workers[0]
    with monkeypatch.context() as patch:
        patch.setattr(worker._looker, "take", raising)
        worker.step(StepMeta(finished=["a"]))
    results = worker.results()
    assert results is not None
    assert (results.lost, results.faults) == (1, {})
    engine.side.merge(results)
    assert faults(engine) == {"hook": 1}


def test_a_scheduler_that_fails_in_the_middle_fills_the_result_later(monkeypatch):
    engine = Engine()
    engine.add("a", 4, 6, FEATURES)
    engine.step(("a", 0, 4))
    engine.step(("a", 4, 1))
    with monkeypatch.context() as patch:
        patch.setattr("kvroute.serving.scheduler.take_numbers", raising)
        engine.step(("a", 5, 1), end=("a",))
    box = engine.boxes["a"]
    assert "did not all arrive" in " ".join(box["faults"])
    assert faults(engine) == {"merge": 1, "lost": 1}


def test_a_hook_in_which_a_request_ended_leaves_nothing_of_it():
    engine = Engine()
    engine.add("a", 4, 6, FEATURES)
    engine.step(("a", 0, 4))
    engine.side.failed(RuntimeError("broken"), "a")
    assert engine.side.num_states == 0
    engine.step()
    assert engine.states == 0
    assert faults(engine) == {"hook": 1}


def test_the_breaker_counts_faulted_requests_until_one_gets_all_it_asked_for(monkeypatch):
    engine = Engine(faults_before_off=3)
    for i, works in enumerate((False, False, True, False, False)):
        with monkeypatch.context() as patch:
            if not works:
                patch.setattr(engine.workers[0], "_read", raising)
            assert (run(engine, str(i), seed=i)["error"] is None) == works
    assert engine.side.off is None
    with monkeypatch.context() as patch:
        patch.setattr(engine.workers[0], "_read", raising)
        run(engine, "last")
    assert engine.side.off is not None
    assert run(engine, "off")["error"] == engine.side.off


def test_what_each_side_keeps_is_told_when_it_is_nothing_again():
    seconds = [0.0]
    tally = Tally(lambda: seconds[0])
    tally.holding(3, 2)
    assert tally.take() is None  # alone it can wait
    seconds[0] = 5.0
    assert tally.take() == {"held": {"scheduler": 3, "worker": 2}}
    tally.holding(0, 0)
    payload = tally.take()
    assert payload == {"held": {"scheduler": 0, "worker": 0}}
    assert tally.take() is None
    assert joined({"held": {"scheduler": 3}}, payload)["held"] == {"scheduler": 0, "worker": 0}


def test_results_of_two_ranks_keep_the_least_that_both_read():
    first, second = StepResults(read={"a": 7, "b": 3}, lost=1, held=2), StepResults(read={"a": 6}, lost=1, held=3)
    merged = first.merge(second)
    assert merged.read == {"a": 6, "b": 3}
    assert (merged.lost, merged.held) == (2, 3)
