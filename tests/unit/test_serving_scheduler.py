"""Whatever the schedule, a request gets what its cache gives in one piece."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvroute.chains import ChainState
from kvroute.pooling import PoolingSpec, pool
from kvroute.serving.config import ServingConfig
from kvroute.serving.entries import PIECE
from kvroute.serving.finishing import scores_of_lengths
from kvroute.serving.scheduler import SchedulerSide
from tests.unit.serving_steps import BLOCK, SIF, Engine

SPECS = {
    "p1": {"of": "prompt", "layers": "all", "weights": "sif", "heads": "concat", "layer_reduce": "concat"},
    "p2": {"of": "prompt", "layers": "last:2", "window": 3, "normalize": True},
    "p3": {"of": "prompt", "tokens": "last", "layer_reduce": "last"},
    "a1": {"of": "answer", "layers": [3, 1], "weights": "sif", "sif_a": 1e-4, "part": "v", "layer_reduce": "concat"},
    "a2": {"of": "answer", "layers": "last:2", "window": 3, "tokens": "sum", "heads": "concat"},
    "a3": {"of": "answer", "tokens": "last"},
    "a4": {"of": "answer", "tokens": "first"},
    "a5": {"of": "answer", "weights": "position", "window": 4, "normalize": True},
    "chain": "kv-coe",
}


def check(engine: Engine, name: str) -> None:
    _, ids, prompt = engine.data[name]
    view, box = engine.view(name), engine.boxes[name]
    assert box["error"] is None
    length = view.host_lengths[0]
    for key, body in SPECS.items():
        if body == "kv-coe":
            continue
        spec = PoolingSpec(**{k: v for k, v in body.items() if k != "of"})
        start, stop = (0, prompt) if body["of"] == "prompt" else (prompt, length)
        if start == stop:
            assert key not in box["features"]
            continue
        sif = [torch.from_numpy(SIF / (1 + spec.sif_a))[ids[:length]]]
        expected = pool(view, spec, start=[start], stop=[stop], sif_weights=sif)[0].numpy()
        np.testing.assert_allclose(box["features"][key], expected, rtol=1e-5, atol=2e-6, err_msg=key)
    chain = ChainState(1)
    chain.update_view(view, [0], [prompt], [length])
    for key, score in chain.scores().items():
        assert box["scores"][key]["reason"] == score.reason
        # a difference of two means near 1, so its rounding is that of 1
        expected = None if score.value is None else pytest.approx(score.value, rel=1e-5, abs=1e-6)
        assert box["scores"][key]["value"] == expected


@pytest.mark.parametrize(("ranks", "near"), [(1, False), (2, False), (1, True)])
def test_any_schedule_gives_what_one_piece_gives(ranks, near):
    engine = Engine(ranks, near, max_features=16)
    engine.add("a", 10, 15, SPECS, seed=1)
    engine.add("b", 3, 12, SPECS, seed=2)
    engine.step(("a", 0, 4), ("b", 0, 3))  # a in chunks
    engine.step(("a", 4, 4), ("b", 3, 1))
    engine.step(("a", 8, 2), ("b", 4, 1))
    engine.add("c", 10, 12, SPECS, like="a")
    engine.share("c", "a", 10 // BLOCK)
    engine.step(("c", 8, 2), ("a", 10, 1), ("b", 5, 1))
    engine.step()  # empty
    engine.preempt("b")
    engine.step(("c", 10, 1), ("a", 11, 1))
    engine.step(("c", 11, 1), ("a", 12, 1), ("b", 0, 4), end=("c",))  # resumed, in chunks
    engine.step(("b", 4, 5), ("a", 13, 1))
    engine.step(("b", 9, 2), ("a", 14, 1), end=("a",))
    engine.step(("b", 11, 1), end=("b",))
    for name in "abc":
        check(engine, name)
    engine.step()
    assert engine.states == 0


def test_where_answers_can_wait_they_are_read_in_pieces():
    engine, every = Engine(near=True, max_features=16), Engine(max_features=16)
    for one in (engine, every):
        one.add("a", 6, 60, SPECS, seed=3)
        one.add("b", 4, 17, SPECS, seed=4)
        one.step(("a", 0, 6), ("b", 0, 4))
        for t in range(13):
            end = ("b",) if t == 12 else ()
            one.step(("a", 6 + t, 1), ("b", 4 + t, 1), end=end)
        for t in range(19, 60):
            one.step(("a", t, 1), end=("a",) if t == 59 else ())
        check(one, "a")
        check(one, "b")
        one.step()
        assert one.states == 0
    assert engine.read == 2 + 54 // PIECE  # the prompts and a's pieces; the rests are read when they end
    assert every.read == 2 + 54 + 13


def test_what_waited_is_read_when_a_request_is_aborted_unless_its_pages_are_gone():
    engine = Engine(near=True, max_features=16)
    engine.add("a", 6, 12, SPECS, seed=5)
    engine.add("b", 6, 12, SPECS, seed=6)
    engine.step(("a", 0, 6), ("b", 0, 6))
    for t in range(6, 12):
        engine.step(("a", t, 1), ("b", t, 1))
    engine.end("a", 7, aborted=True)
    check(engine, "a")
    engine.preempt("b")
    engine.end("b", 7, aborted=True)
    assert {"p1", "p2", "p3"} == set(engine.boxes["b"]["features"])
    assert any("not read to its end" in fault for fault in engine.boxes["b"]["faults"])
    engine.step()
    assert engine.states == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rest_that_can_wait_is_read_before_the_next_step_writes(ranks):
    engine = Engine(ranks, late=True, max_features=16)
    engine.add("a", 6, 12, SPECS, seed=5, more=20)  # ends by itself
    engine.add("b", 4, 10, SPECS, seed=6)  # as long as it may become
    engine.add("c", 5, 11, SPECS, seed=7, more=3)  # a stop string
    engine.add("d", 3, 30, SPECS, seed=8, more=3)
    engine.step(("a", 0, 6), ("b", 0, 4), ("c", 0, 5), ("d", 0, 3))
    for t in range(6):
        end = (("a",) if t == 5 else ()) + (("b",) if t == 5 else ())
        engine.step(("a", 6 + t, 1), ("b", 4 + t, 1), ("c", 5 + t, 1), ("d", 3 + t, 1), end=end)
    engine.end("c", 7, aborted=True)
    assert engine.read == 4 + 1  # the prompts, and b's answer at once, for it could not become longer
    check(engine, "b")
    for name in "ac":
        assert engine.boxes[name]["pending"]
        assert engine.boxes[name]["features"] == {}
    engine.step(("d", 9, 1))  # the pages of what ended are written before the step is read
    for name in "ac":
        assert "pending" not in engine.boxes[name]
        check(engine, name)
    for t in range(10, 30):
        engine.step(("d", t, 1), end=("d",) if t == 29 else ())
    assert engine.boxes["d"]["pending"]
    engine.step()  # nothing runs any more
    check(engine, "d")
    assert engine.states == 0
    assert engine.side.faults == 0


def test_a_rest_that_nobody_reads_in_time_is_said_to_be_lost(monkeypatch):
    engine = Engine(late=True, max_features=16)
    engine.add("a", 6, 12, SPECS, more=20)
    engine.step(("a", 0, 6))
    for t in range(6, 12):
        engine.step(("a", t, 1), end=("a",) if t == 11 else ())
    monkeypatch.setattr(engine.workers[0], "begin", lambda meta: None)
    engine.step()
    assert "in time" in engine.boxes["a"]["error"]
    engine.step()
    assert engine.states == 0


def test_who_does_not_wait_has_the_result_when_the_answer_ends():
    engine = Engine(late=True, max_features=16)
    engine.id = lambda name: name
    engine.add("a", 6, 12, SPECS, more=20)
    engine.step(("a", 0, 6))
    for t in range(6, 12):
        engine.step(("a", t, 1), end=("a",) if t == 11 else ())
    check(engine, "a")


@pytest.mark.parametrize("length", range(15, 19))
def test_a_step_in_flight_counts_no_more_for_what_is_aborted(length):
    engine = Engine(late=True, max_features=16)
    engine.add("a", 6, 6 + length, SPECS, seed=5, more=20)
    cache, ids, prompt = engine.data["a"]
    engine.data["a"] = (torch.cat([cache, torch.randn_like(cache[:, :, :1])], dim=2), ids, prompt)
    engine.step(("a", 0, 6))
    for t in range(6, 6 + length):
        engine.step(("a", t, 1))
    engine.step(("a", 6 + length, 1), abort={"a": length + 1})
    engine.step()
    engine.data["a"] = (cache, ids, prompt)
    check(engine, "a")
    engine.step()
    assert engine.states == 0


@pytest.mark.parametrize("length", range(14, 19))
@pytest.mark.parametrize("ended", ["aborted behind it", "aborted in it", "later"])
def test_what_waits_is_read_before_a_preempted_requests_pages_are_written(length, ended):
    engine = Engine(late=True, max_features=16)
    total = 6 + length + (5 if ended == "later" else 0)
    engine.add("a", 6, total, SPECS, seed=5, more=20)
    engine.add("b", 4, 9, SPECS, seed=6)
    engine.step(("a", 0, 6))
    for t in range(6, 6 + length):
        engine.step(("a", t, 1))
    engine.step(("b", 0, 4), preempt=("a",), abort={"a": length + 1} if ended == "aborted in it" else {})
    if ended == "later":
        engine.step(("a", 0, 10), ("b", 4, 1))
        engine.step(("a", 10, length - 3))
        for t in range(7 + length, total):
            engine.step(("a", t, 1), end=("a",) if t == total - 1 else ())
    elif ended == "aborted behind it":
        engine.end("a", length + 1, aborted=True)
    engine.step()
    check(engine, "a")
    assert engine.side.faults == 0


@pytest.mark.parametrize("near", [True, False])
def test_an_answer_that_is_aborted_while_its_tokens_are_computed_again_says_so(near):
    engine = Engine(near=near, late=not near, max_features=16)
    engine.add("a", 6, 30, SPECS, seed=5, more=20)
    engine.step(("a", 0, 6))
    for t in range(6, 30):
        engine.step(("a", t, 1))
    engine.preempt("a")
    engine.step(("a", 0, 8))
    engine.end("a", 25, aborted=True)
    engine.step()
    assert any("not read to its end" in fault for fault in engine.boxes["a"]["faults"])
    assert {"p1", "p2", "p3"} == set(engine.boxes["a"]["features"])


def test_an_answer_of_one_token_has_the_prompts_features_and_reasons_for_the_rest():
    engine = Engine(max_features=16)
    engine.add("a", 6, 6, SPECS)
    engine.step(("a", 0, 6), end=("a",))
    check(engine, "a")
    assert any(fault.startswith("a1: The answer has no token") for fault in engine.boxes["a"]["faults"])


def test_an_answer_that_exists_is_read_within_the_prompt():
    engine = Engine(max_features=16)
    for name, cached in (("a", 0), ("b", 8)):
        engine.add(name, 12, 12, SPECS)
        cache, ids, _ = engine.data[name]
        engine.side.on_request(name, {"kvroute": {"features": SPECS, "answer_from": 7}}, 12, ids)
        if cached:  # of the whole prompt but its last block, the answer's beginning included
            engine.share("b", "a", cached // BLOCK)
        else:
            engine.step(("a", 0, 9))
        engine.step((name, cached or 9, 12 - (cached or 9)), end=(name,))
        assert engine.boxes[name]["tokens"] == {"prompt": 7, "answer": 6, "thought": None}
        engine.data[name] = (cache, ids, 7)
        check(engine, name)
    engine.side.on_request("c", {"kvroute": {"features": SPECS, "answer_from": 13}}, 12, ())
    assert "answer_from" in engine.side.finished("c")["error"]
    engine.step()
    assert engine.states == 0


def test_an_abort_leaves_nothing_and_slots_are_clean_for_the_next():
    engine = Engine(max_features=16)
    for round_ in range(40):
        name = f"r{round_}"
        engine.add(name, 5, 9, SPECS, seed=round_)
        engine.step((name, 0, 5))
        engine.step((name, 5, 2))
        if round_ % 2:
            engine.side.finished(name)  # aborted
        else:
            engine.step((name, 7, 2), end=(name,))
            check(engine, name)
        engine.preempt(name)
    engine.step()
    assert engine.states == 0
    assert all(t.shape[0] <= 16 for t in engine.workers[0]._rows.tensors.values())


def test_nan_in_pages_costs_its_own_request_alone():
    engine = Engine(max_features=16)
    engine.add("a", 5, 8, SPECS, seed=1)
    engine.add("b", 5, 8, SPECS, seed=2)
    engine.data["a"][0][2, 0, 6, 1] = torch.nan
    engine.step(("a", 0, 5), ("b", 0, 5))
    engine.step(("a", 5, 3), ("b", 5, 3), end=("a", "b"))
    check(engine, "b")
    box = engine.boxes["a"]
    # a1 reads layers 3 and 1; a3 the newest token and a4 the first: the fault lies in layer 2, token 6
    assert {"p1", "p2", "p3", "a1", "a4"} <= set(box["features"])
    assert "a5" not in box["features"]
    assert "not finite" in box["scores"]["kv_coe_r_token"]["reason"]
    assert any("not finite" in fault for fault in box["faults"])
    assert engine.side.faults > 0


def test_an_exception_costs_features_and_a_breaker_turns_them_off(monkeypatch):
    engine = Engine(faults_before_off=3)

    def broken(*_):
        raise RuntimeError("boom /secret/path")

    monkeypatch.setattr(engine.workers[0], "_pool_prompts", broken)
    for i in range(4):
        engine.add(f"r{i}", 4, 5, ["prompt:paper-mteb"])
        engine.step((f"r{i}", 0, 4), end=(f"r{i}",))
    assert engine.boxes["r0"]["error"] == "RuntimeError inside kvroute."
    assert engine.side.faults == 3
    assert "turned" in engine.boxes["r3"]["error"]
    engine.step()
    assert engine.states == 0


def test_a_wrong_ask_is_answered_and_no_ask_costs_nothing():
    engine = Engine()
    engine.add("bad", 4, 5, ["nonsense"])
    assert not engine.side.asked("bad")
    engine.step(("bad", 0, 4), end=("bad",))
    assert "nonsense" in engine.boxes["bad"]["error"]
    engine.side.on_request("none", None, 4)
    assert engine.side.finished("none") is None
    assert engine.states == 0


def test_a_demand_that_is_not_met_is_refused_aloud():
    side = SchedulerSide(ServingConfig(), [4])
    side.on_request("a", {"kvroute": {"mode": "fast"}}, 4)
    assert not side.asked("a")
    assert "does not decide" in side.finished("a", 5)["error"]
    side.on_request("b", {"kvroute": {"features": ["length"], "mode": "fast"}}, 4)
    box = side.finished("b", 5)
    side.merge(None)
    assert (box["error"], box["scores"]["length"]["value"]) == (None, 5)
    assert "does not decide" in box["faults"][0]


def test_the_plane_picture_of_a_chain_keeps_small_angles():
    z = torch.tensor([[1.0, 0.0], [1.0, 1e-5], [1.0, 3e-5]], dtype=torch.float64)
    steps = torch.stack([torch.zeros(3), torch.zeros(3)], 1).double()
    steps[1:, 0] = (z[1:] - z[:-1]).square().sum(1)
    steps[:, 1] = z.square().sum(1)
    got = scores_of_lengths(steps.numpy(), float((z[2] - z[0]).square().sum()))
    assert got.r.value == pytest.approx(0.5 - 0.5, abs=1e-6)  # steps of 1/3 and 2/3 in both measures
