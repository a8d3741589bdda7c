"""The worker's side by itself: once a step, and a fault stays with its request."""

from __future__ import annotations

import pickle

import torch

from kvroute.serving.messages import StepMeta, StepResults
from tests.unit.serving_steps import Engine


def prepared(names: str) -> tuple[Engine, StepMeta]:
    engine = Engine()
    for seed, name in enumerate(names):
        engine.add(name, 4, 6, ["prompt:paper-mteb", "kv-coe"], seed=seed)
        engine.blocks[name] = [engine.free.pop(), engine.free.pop()]
        for t in range(6):
            engine.memory[:, engine.blocks[name][t // 4], :, t % 4] = engine.data[name][0][:, :, t]
    meta = engine.side.step([(name, 0, 6, [engine.blocks[name]]) for name in names])
    return engine, meta


def test_a_step_is_read_once_whatever_hook_comes_first():
    engine, meta = prepared("a")
    worker = engine.workers[0]
    worker.step(meta)
    first = worker.results()
    worker.step(meta)
    assert first is not None
    assert worker.results() is None
    worker.step(StepMeta(finished=["a"]))
    assert worker.num_states == 0


def test_messages_survive_pickling():
    engine, meta = prepared("ab")
    worker = engine.workers[0]
    worker.step(pickle.loads(pickle.dumps(meta)))  # noqa: S301 - our own
    results = pickle.loads(pickle.dumps(worker.results()))  # noqa: S301 - our own
    assert isinstance(results, StepResults)
    assert results.norms is not None
    assert results.norms.ids == ["a", "b"]
    assert results.norms.steps.shape == (4, 2)


def test_a_request_with_wrong_blocks_does_not_spoil_its_neighbours():
    engine, meta = prepared("ab")
    alone, alone_meta = prepared("ab")
    meta.requests[0].blocks = ([10**6, 10**6],)
    worker = engine.workers[0]
    worker.step(meta)
    results = worker.results()
    assert results is not None
    assert list(results.faults) == ["a"]
    alone.workers[0].step(alone_meta)
    expected = alone.workers[0].results()
    assert expected is not None
    for key, sums in expected.sums.items():
        assert results.sums[key].ids == ["b"]
        assert torch.equal(torch.from_numpy(results.sums[key].keys[0]), torch.from_numpy(sums.keys[1]))
    assert worker.num_states == 1


def test_ranks_that_read_different_things_are_a_fault_of_those_requests():
    engine, meta = prepared("ab")
    engine.workers[0].step(meta)
    got = engine.workers[0].results()
    assert got is not None
    merged = got.merge(StepResults(faults={"a": "why"}))
    assert merged.sums == {}
    assert merged.norms is None
    assert merged.faults["a"] == "why"
    assert "ranks" in merged.faults["b"]


def test_state_that_was_made_in_the_engines_inference_mode_is_fed_outside_it():
    engine = Engine()
    engine.add("a", 4, 9, ["answer:paper-mteb", "kv-coe"])
    with torch.inference_mode():
        engine.step(("a", 0, 6))
    engine.step(("a", 6, 3), end=("a",))
    assert engine.boxes["a"]["error"] is None
    assert len(engine.boxes["a"]["features"]["answer:paper-mteb"]) > 0
    assert engine.boxes["a"]["scores"]["kv_coe_r_token"]["value"] is not None
