"""A server decides as an engine of one's own does, token for token, whatever its scheduler does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvroute import Policy
from kvroute.confidence_maps import LogisticMap
from kvroute.pooling import PoolingSpec, pool
from kvroute.serving.deciding import NOT_FORCED
from kvroute_kernels import KVView
from tests.serving_files import a_head
from tests.unit.thinking_steps import (
    BLOCK,
    CLOSE,
    FAST,
    HEAD,
    PHRASES,
    SIZE,
    SLOW,
    Own,
    OwnRouter,
    Server,
    a_reader,
    states,
)

POLICIES = {
    "one": Policy(kind="one-step", tau=52.0),
    "two": Policy(kind="two-step", tau=52.0, tau_fast=47.0, tau_slow=58.0, every=3),
    "budget": Policy(kind="budget", share=0.4, window=8),
    "random": Policy(kind="random", seed=3),
    "length": Policy(kind="length", length=12),
    "slow": Policy(kind="slow"),
    "fast": Policy(kind="fast"),
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 40, random.integers(5, 21)).tolist() for _ in range(count)]


def own(policy: Policy, prompt: list[int], limit: int, router: OwnRouter | None = None, forced: str | None = None):
    loop = Own(prompt, limit)
    request = loop.run(router or OwnRouter(policy, HEAD if policy.reads_difficulty else None), forced)
    return request, loop.prompt[len(prompt) :] + loop.tokens


def same(server: Server, name: str, policy: Policy, prompt: list[int], limit: int, **more) -> dict:
    """A server's answer and decision are those of one's own engine; returns the decision."""
    request, expected = own(policy, prompt, limit - len(FAST), **more)
    # a mode's tokens count on a server: the shorter mode leaves room for more
    assert server.answer(name)[: len(expected)] == expected
    box = server.boxes[name]
    assert box is not None
    assert box["error"] is None
    found, decision = box["decision"], request.decision
    assert (found["mode"], found["why"], found["fault"]) == (decision.mode, decision.why, None)
    if decision.difficulty is not None:
        assert found["difficulty"] == pytest.approx(decision.difficulty, abs=1e-3)
    shared = len(decision.checkpoints)
    assert [c[0] for c in found["checkpoints"]][:shared] == [c[0] for c in decision.checkpoints]
    np.testing.assert_allclose(
        [c[1] for c in found["checkpoints"]][:shared], [c[1] for c in decision.checkpoints], atol=1e-3
    )
    if decision.switch is not None:
        assert found["switch"]["to"] == decision.switch.to
        assert found["switch"]["token"] == decision.switch.token
        assert found["switch"]["forced"] == decision.switch.forced
    return found


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("most", [1000, 3])
def test_the_same_tokens_as_an_engine_of_ones_own(kind, most):
    policy = POLICIES[kind]
    asked = prompts(12, seed=1)
    server = Server(POLICIES)
    router = OwnRouter(policy, HEAD if policy.reads_difficulty else None)  # a budget looks back on all
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": kind}, limit=60)
        if kind == "budget":  # one after the other, as the other engine decides them
            server.run(most)
    server.run(most)
    seen: Counter[str] = Counter()
    for i, prompt in enumerate(asked):
        decision = same(server, f"r{i}", policy, prompt, 60, router=router)
        seen[decision["mode"]] += 1
        seen["switch"] += decision["switch"] is not None
    if kind not in ("slow", "fast"):
        assert seen["fast"] > 0
        assert seen["slow"] > 0
    if kind == "two":
        assert seen["switch"] >= 3
    assert server.states == 0


@pytest.mark.parametrize(("ranks", "replicas"), [(2, 1), (2, 2)])
def test_ranks_decide_alike_and_as_one(ranks, replicas):
    asked = prompts(8, seed=2)
    server = Server(POLICIES, ranks=ranks, replicas=replicas)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "two", "features": ["answer:paper-mteb", "kv-coe"]}, limit=50)
    server.run()
    alone = Server(POLICIES)
    for i, prompt in enumerate(asked):
        alone.add(f"r{i}", prompt, {"policy": "two", "features": ["answer:paper-mteb", "kv-coe"]}, limit=50)
    alone.run()
    for i, prompt in enumerate(asked):
        same(server, f"r{i}", POLICIES["two"], prompt, 50)
        for part in ("features", "scores"):
            assert server.boxes[f"r{i}"][part].keys() == alone.boxes[f"r{i}"][part].keys()
        vector = server.boxes[f"r{i}"]["features"]["answer:paper-mteb"]
        np.testing.assert_allclose(vector, alone.boxes[f"r{i}"]["features"]["answer:paper-mteb"], rtol=1e-4, atol=1e-6)
    assert server.states == 0


def test_a_rank_that_cannot_read_takes_the_others_along_to_the_fallback(monkeypatch):
    server = Server({"one": Policy(kind="one-step", fallback="fast")}, ranks=2)
    monkeypatch.setattr(server.workers[1]._looker, "_read", lambda *_: 1 / 0)
    server.add("a", prompts(1)[0], {"policy": "one"}, limit=20)
    server.run()
    assert server.answer("a")[: len(FAST)] == FAST
    decision = server.boxes["a"]["decision"]
    assert (decision["mode"], decision["why"]) == ("fast", "fault")
    assert decision["fault"] is not None


def test_preemption_changes_nothing():
    asked = prompts(6, seed=3)
    server = Server(POLICIES)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "two"}, limit=50)
    for step in range(40):
        server.step(most=7)
        name = f"r{step % 6}"
        if step % 5 == 0 and name not in server.boxes:
            server.preempt(name)
    server.run(most=7)
    for i, prompt in enumerate(asked):
        same(server, f"r{i}", POLICIES["two"], prompt, 50)
    assert server.states == 0


def test_a_checkpoint_is_sent_its_window_alone():
    policy = Policy(kind="two-step", tau=-1, tau_fast=-1, every=3)
    long = [p * 2 for p in prompts(40, seed=14) if len(p) == 16]
    prompt = next(p for p in long if len(own(policy, p, 34)[0].decision.checkpoints) > 3)
    server = Server({"two": policy})
    server.add("a", prompt, {"policy": "two"}, limit=40)
    server.step()
    assert len(server.sent_blocks["a"]) == 8  # the prompt's look reads all of it
    most = 0
    while "a" not in server.boxes:
        server.step()
        most = max(most, len(server.sent_blocks.get("a", [])))
    assert 0 < most <= 6 // BLOCK + 2
    assert len(server.boxes["a"]["decision"]["checkpoints"]) > 3


@pytest.mark.parametrize("mode", ["fast", "slow"])
@pytest.mark.parametrize("policy", [None, "two"])
def test_a_demanded_mode(mode, policy):
    ask = {"mode": mode} | ({} if policy is None else {"policy": policy})
    server = Server(POLICIES)
    prompt = prompts(1, seed=4)[0]
    server.add("a", prompt, ask, limit=30)
    server.run()
    found = same(server, "a", POLICIES["two" if policy else mode], prompt, 30, forced=mode)
    assert (found["why"], found["checkpoints"]) == ("forced", [])
    answer = server.answer("a")
    thought = server.boxes["a"]["tokens"]["thought"]
    if mode == "fast":
        assert thought == 0
    else:
        assert thought == (answer.index(CLOSE) + 1 if CLOSE in answer else len(answer))


@pytest.mark.parametrize("how", ["ask", "policy"])
def test_in_shadow_nothing_is_forced_and_the_decision_says_what_would_have_been(how):
    policy = POLICIES["two"]
    served = policy.model_copy(update={"shadow": True}) if how == "policy" else policy
    server = Server({"two": served})
    asked = prompts(10, seed=5)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "two", "shadow": how == "ask"}, limit=40)
        server.add(f"plain{i}", prompt, {"features": ["length"]}, limit=40)
    server.run()
    for i, prompt in enumerate(asked):
        assert server.answer(f"r{i}") == server.answer(f"plain{i}")
        found = server.boxes[f"r{i}"]["decision"]
        difficulty = own(policy, prompt, 2)[0].decision
        assert (found["why"], found["proposed"]) == ("shadow", difficulty.mode)
        assert found["mode"] == "fast"  # this model opens no thought by itself
        assert found["checkpoints"]
        if found["switch"] is not None:
            assert (found["switch"]["to"], found["switch"]["forced"]) == ("slow", 0)
    assert any(server.boxes[f"r{i}"]["decision"]["switch"] for i in range(10))


def test_a_prompt_that_sets_or_opens_the_mode_itself():
    asked = prompts(8, seed=6)
    server = Server(POLICIES)
    for i, prompt in enumerate(asked):
        server.add(f"set{i}", prompt + FAST, {"policy": "two"}, limit=30)
        server.add(f"open{i}", prompt + SLOW, {"policy": "one"}, limit=30)
    server.add("against", asked[0] + FAST, {"mode": "slow"}, limit=30)
    server.run()
    for i, prompt in enumerate(asked):
        found = server.boxes[f"set{i}"]["decision"]
        assert (found["mode"], found["why"]) == ("fast", "forced")
        expected, tokens = own(POLICIES["one"], prompt, 25)
        found = server.boxes[f"open{i}"]["decision"]
        assert found["mode"] == expected.decision.mode
        assert found["difficulty"] == pytest.approx(expected.decision.difficulty, abs=1e-3)
        written = SLOW + server.answer(f"open{i}")
        assert written[: len(tokens)] == tokens
    assert {server.boxes[f"open{i}"]["decision"]["mode"] for i in range(8)} == {"fast", "slow"}
    against = server.boxes["against"]["decision"]
    assert (against["mode"], against["why"]) == ("fast", "fault")


def test_an_answers_features_begin_behind_the_modes_tokens():
    server = Server(POLICIES)
    asked = prompts(6, seed=7)
    features = {"a": {"of": "answer", "weights": "sif"}, "first": {"of": "answer", "tokens": "first"}, "c": "kv-coe"}
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "one", "features": features}, limit=30)
    server.run(most=6)
    for i, prompt in enumerate(asked):
        box = server.boxes[f"r{i}"]
        suffix = FAST if box["decision"]["mode"] == "fast" else SLOW
        tokens = server.tokens[f"r{i}"][:-1]
        start = len(prompt) + len(suffix)
        x = states(tokens).permute(1, 2, 0, 3)[:, None]
        view = KVView.from_contiguous(x[..., :SIZE], x[..., SIZE:], [len(tokens)])
        for name, spec in (("a", PoolingSpec(weights="sif")), ("first", PoolingSpec(tokens="first"))):
            sif = [torch.from_numpy(np.linspace(0.2, 1.0, 40, dtype=np.float32)[tokens])]
            expected = pool(view, spec, start=[start], sif_weights=sif)[0].numpy()
            np.testing.assert_allclose(box["features"][name], expected, rtol=1e-4, atol=1e-6)
        assert box["scores"]["kv_coe_r_token"]["value"] is not None


def test_a_trained_confidence_is_read_from_the_answer():
    spec = PoolingSpec(layers="last:2", part="v", heads="concat")
    head = replace(
        a_reader(spec, 5),
        target="correct",
        map=LogisticMap(means=(0.5,), scales=(0.3,), coefficients=(2.0,), intercept=0.1),
    )
    server = Server(POLICIES, confidence=head)
    prompt = prompts(1, seed=8)[0]
    server.add("a", prompt, {"policy": "fast", "confidence": "right"}, limit=20)
    server.add("one", prompt, {"confidence": "right"}, limit=1)
    server.run()
    tokens = server.tokens["a"][:-1]
    x = states(tokens).permute(1, 2, 0, 3)[:, None]
    view = KVView.from_contiguous(x[..., :SIZE], x[..., SIZE:], [len(tokens)])
    expected = head.predict(pool(view, spec, start=[len(prompt) + len(FAST)]).numpy())[0]
    assert server.boxes["a"]["confidence"]["value"] == pytest.approx(expected, abs=1e-5)
    assert server.boxes["a"]["features"] == {}
    assert server.boxes["one"]["confidence"] == {
        "value": None,
        "reason": "The answer has no token with keys and values.",
    }


# ---------------------------------------------------------------------- faults


def test_nan_in_a_prompt_costs_its_own_decision_alone():
    server = Server({"one": Policy(kind="one-step", tau=52.0, fallback="slow")})
    asked = prompts(3, seed=9)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "one"}, limit=30)
    spoiled = server.workers[0]._looker

    def read(group, rows, real=spoiled._read):
        found = real(group, rows)
        for place, row in enumerate(rows):
            if group.requests[row].id == "r1":
                found[place, 0] = torch.nan
        return found

    spoiled._read = read
    server.run()
    for i in (0, 2):
        same(server, f"r{i}", POLICIES["one"], asked[i], 30)
    decision = server.boxes["r1"]["decision"]
    assert (decision["mode"], decision["why"]) == ("slow", "fault")
    assert "not finite" in decision["fault"]
    assert server.answer("r1")[: len(SLOW)] == SLOW


def test_a_fault_at_a_checkpoint_keeps_the_mode():
    broken = replace(HEAD, windows=replace(HEAD.windows, spec=PoolingSpec(layers=[9])))
    server = Server(POLICIES, head=broken)
    asked = prompts(4, seed=10)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "two"}, limit=30)
    server.add("whole", asked[0], {"policy": "one"}, limit=30)  # its look is taken in the same steps
    server.run()
    same(server, "whole", POLICIES["one"], asked[0], 30)
    decisions = [server.boxes[f"r{i}"]["decision"] for i in range(4)]
    assert all(d["why"] == "difficulty" and d["switch"] is None for d in decisions)
    assert any("Layer 9" in d["fault"] for d in decisions if d["fault"] is not None)


def test_repeated_faults_turn_it_off(monkeypatch):
    server = Server({"one": Policy(kind="one-step")}, faults_before_off=2)
    monkeypatch.setattr(server.workers[0]._looker, "_read", lambda *_: 1 / 0)
    for i in range(3):
        server.add(f"r{i}", prompts(1)[0], {"policy": "one"}, limit=10)
        server.run()
    assert server.boxes["r1"]["decision"]["why"] == "fault"
    assert server.boxes["r2"]["decision"] is None
    assert "turned its features off" in server.boxes["r2"]["error"]
    assert server.side.faults == 2


def test_a_processor_that_is_not_loaded_is_found_out():
    server = Server(POLICIES)
    server.loaded = False
    server.add("a", prompts(1)[0], {"mode": "slow"}, limit=20)
    server.run()
    assert server.boxes["a"]["decision"]["fault"] == NOT_FORCED


def test_an_exception_in_the_looks_ends_in_the_fallback(monkeypatch):
    server = Server({"one": Policy(kind="one-step", fallback="fast")})
    monkeypatch.setattr(server.workers[0]._looker, "_vectors", lambda *_: 1 / 0)
    server.add("a", prompts(1)[0], {"policy": "one"}, limit=20)
    server.run()
    decision = server.boxes["a"]["decision"]
    assert (decision["mode"], decision["fault"]) == ("fast", "ZeroDivisionError inside kvroute.")
    assert server.answer("a")[: len(FAST)] == FAST


def test_one_token_and_aborts_leave_nothing_behind():
    server = Server(POLICIES)
    asked = prompts(4, seed=11)
    for i, prompt in enumerate(asked):
        server.add(f"r{i}", prompt, {"policy": "two"}, limit=1 if i < 2 else 40)
    server.step(most=4)
    server.abort("r3")
    for _ in range(8):
        server.step(most=4)
    server.run()
    for i in range(2):
        box = server.boxes[f"r{i}"]
        assert box["decision"]["mode"] in ("fast", "slow")
        assert box["decision"]["fault"] is None
        assert len(server.answer(f"r{i}")) == 1
    assert server.boxes["r3"]["decision"]["why"] in ("fault", "difficulty")
    assert server.states == 0


@pytest.mark.parametrize(
    ("settings", "ask", "more", "words"),
    [
        ({"runs_ahead": True}, {"policy": "two"}, {}, "schedules ahead"),
        ({}, {"policy": "one"}, {"structured": True}, "grammar"),
        ({}, {"mode": "fast"}, {"structured": True}, "grammar"),
        ({}, {"policy": "nope"}, {}, "No policy is named"),
    ],
)
def test_what_cannot_be_decided_is_refused_with_the_reason(settings, ask, more, words):
    server = Server(POLICIES, **settings)
    server.add("a", prompts(1)[0], ask, limit=20, **more)
    assert not server.side.asked("a")
    server.run()
    assert words in server.boxes["a"]["error"]
    assert server.boxes["a"]["decision"] is None


@pytest.mark.parametrize(
    ("settings", "ask", "more", "words"),
    [
        ({"runs_ahead": True}, {"policy": "two"}, {}, "schedules ahead"),
        ({}, {"policy": "one"}, {"structured": True}, "grammar"),
        ({}, {"mode": "fast"}, {"structured": True}, "grammar"),
    ],
)
def test_a_refused_decision_costs_no_feature(settings, ask, more, words):
    server = Server(POLICIES, confidence=replace(HEAD, target="correct"), **settings)
    prompt, features = prompts(1)[0], ["prompt:best", "answer:paper-mteb", "kv-coe", "length"]
    server.add("plain", prompt, {"features": features, "confidence": "right"}, limit=20)
    server.add("a", prompt, {**ask, "features": features, "confidence": "right"}, limit=20, **more)
    server.add("b", prompt, {**ask, "confidence": "right"}, limit=20, **more)
    server.run()
    plain, a, b = (server.boxes[name] for name in ("plain", "a", "b"))
    assert server.answer("a") == server.answer("plain")
    for name in ("features", "scores", "confidence", "tokens", "error"):
        assert a[name] == plain[name]
    assert len(plain["features"]) == 2
    assert (b["confidence"], b["error"]) == (plain["confidence"], None)
    for box in (a, b):
        assert box["decision"] is None
        assert len(box["faults"]) == 1
        assert words in box["faults"][0]
    assert server.side.tally.take()["asks"]["refused"] == 2


def test_one_step_under_a_schedule_that_runs_ahead():
    server = Server(POLICIES, runs_ahead=True)
    prompt = prompts(1, seed=12)[0]
    server.add("a", prompt, {"policy": "one"}, limit=30)
    server.run()
    same(server, "a", POLICIES["one"], prompt, 30)


def test_a_model_whose_thinking_is_not_known_has_features_and_no_decisions():
    server = Server(POLICIES)
    server.side._decisions._make = None
    server.add("a", prompts(1)[0], {"policy": "one"}, limit=10)
    server.add("b", prompts(1)[0], {"features": ["prompt:paper-mteb"]}, limit=10)
    server.run()
    assert "does not decide how to think" in server.boxes["a"]["error"]
    assert server.boxes["b"]["error"] is None
    assert "prompt:paper-mteb" in server.boxes["b"]["features"]


def test_a_switch_that_leaves_no_room_is_not_made():
    policy = Policy(kind="two-step", tau=-1, tau_fast=101, every=3)  # closes every thought at its first checkpoint
    server = Server({"two": policy})
    prompt = prompts(1, seed=13)[0]
    enough = len(SLOW) + 4 + len(PHRASES["fast"]) + 4
    server.add("fits", prompt, {"policy": "two"}, limit=enough)
    server.add("not", prompt, {"policy": "two"}, limit=enough - 1)
    server.run()
    assert server.boxes["fits"]["decision"]["switch"]["token"] == 4
    place = len(SLOW) + 4
    assert server.answer("fits")[place : place + len(PHRASES["fast"])] == PHRASES["fast"]
    assert server.boxes["not"]["decision"]["switch"] is None


def test_a_head_without_its_name_in_the_catalog_is_no_fault_of_a_features_request():
    server = Server(POLICIES, confidence=a_head(spec=PoolingSpec()))
    server.add("a", prompts(1)[0], {"confidence": "right"}, limit=5)
    server.run()
    assert "reads a difficulty" in server.boxes["a"]["error"]
