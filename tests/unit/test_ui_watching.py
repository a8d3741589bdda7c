"""Events of an answer that is being written: they say what the router gives, and colours are the head's own numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from kvroute import CancelToken, Policy, Router, SamplingOptions, SelfEvaluator, TokenIds, TransformersEngine
from kvroute.ui import watching
from kvroute.ui.sentences import Sentences
from kvroute.ui.watching import Watcher
from tests.unit.test_heads_confidence import a_head
from tests.unit.test_router import LABELS, PAIR, PROMPTS, an_engine, constant, trained, two_step
from tests.unit.test_served_routing import Deciding

OPTIONS = SamplingOptions(max_tokens=40)


class EveryFifth(Sentences):
    """A random model ends no sentences: they are cut after every fifth piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = 0

    def push(self, piece: str) -> bool:
        begins = self.pieces > 0 and self.pieces % 5 == 0
        self.pieces += 1
        self._number += begins
        return begins

    def close(self) -> bool:
        return False


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return an_engine()


def by_kind(events: list[dict[str, Any]], lane: int = 0) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["lane"] == lane:
            found[event["type"]].append(event)
    return found


def text(pieces: list[dict[str, Any]]) -> str:
    return "".join(p["text"] for p in pieces)


@pytest.mark.parametrize("windows", [20.0, 80.0], ids=["closes", "opens"])
def test_events_say_what_the_router_gives(engine: TransformersEngine, windows: float) -> None:
    router = two_step(engine, LABELS, windows)
    switched = 0
    for prompt in PROMPTS[:3]:
        whole = router.generate(prompt, options=OPTIONS)
        slow = router.generate(prompt, mode="slow", options=OPTIONS)
        events = list(Watcher(engine, router).watch(prompt, OPTIONS, modes=[None, "slow"]))
        for lane, routed in ((0, whole), (1, slow)):
            found = by_kind(events, lane)
            decision = found["decision"][0]
            assert decision["mode"] == routed.decision.mode
            if lane == 0:  # one that is demanded is read beside the other
                assert decision["difficulty"] == pytest.approx(routed.decision.difficulty)
            assert text(found["piece"]) == routed.text
            assert [p["token"] for p in found["piece"] if p["token"] is not None] == list(range(40))
            told = [(c["token"], c["difficulty"]) for c in found["checkpoint"]]
            np.testing.assert_allclose(told, routed.decision.checkpoints, atol=1e-6)
            assert len(found["end"]) == 1
            assert found["end"][0]["tokens"] == routed.usage.generated
            assert found["end"][0]["answer"] == routed.answer
            switch = routed.decision.switch
            assert len(found["switch"]) == (switch is not None)
            if switch is None:
                continue
            switched += 1
            told_switch = found["switch"][0]
            assert (told_switch["to"], told_switch["token"]) == (switch.to, switch.token)
            # It is told in its place: behind the token before it, in front of the forced ones.
            place = events.index(told_switch)
            before = [e["token"] for e in events[:place] if e["type"] == "piece" and e["lane"] == lane]
            assert max(before) == switch.token - 1
            forced = [p["token"] for p in found["piece"] if p["forced"]]
            assert forced == list(range(switch.token, switch.token + switch.forced))
    assert switched


def test_sentences_are_read_from_the_cache_that_writes_them(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live numbers are those of a reading of the same tokens afterwards, and come before the answer's end."""
    monkeypatch.setattr(watching, "Sentences", EveryFifth)
    head = a_head(engine)
    router = two_step(engine, LABELS, 20.0, confidence=head)
    reader = SelfEvaluator(engine, head=head, scores=())
    for prompt in PROMPTS[:2]:
        routed = router.generate(prompt, options=OPTIONS)
        events = list(Watcher(engine, router, head).watch(prompt, OPTIONS))
        told = {e["sentence"]: (i, e["confidence"]) for i, e in enumerate(events) if e["type"] == "sentence"}
        count = max(told)
        assert sorted(told) == list(range(count + 1))
        assert told[count][1] == pytest.approx(routed.confidence)
        last_piece = max(i for i, e in enumerate(events) if e["type"] == "piece")
        assert sum(i < last_piece for i, _ in told.values()) >= count - 1
        ids = routed.generation.token_ids
        asked = TokenIds(tuple(routed.generation.prompt_token_ids))
        first = {p["sentence"]: p["token"] for p in reversed(events) if p["type"] == "piece"}
        for sentence in range(count):
            alone = reader.score(asked, ids[: first[sentence + 1] + 1], finish_reason="length")
            assert told[sentence][1] == pytest.approx(alone.confidence, abs=1e-5), sentence


def test_without_a_router_the_engine_answers(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "Sentences", EveryFifth)
    head = a_head(engine)
    events = by_kind(list(Watcher(engine, None, head).watch(PROMPTS[0], OPTIONS, modes=[None, "slow"])))
    whole = engine.generate(PROMPTS[0], options=OPTIONS)
    assert text(events["piece"]) == whole.text
    assert not events["decision"]
    assert {p["phase"] for p in events["piece"]} == {"answer"}
    assert all(0 <= s["confidence"] <= 1 for s in events["sentence"])
    assert len(events["sentence"]) == 8
    plain = by_kind(list(Watcher(engine, None).watch(PROMPTS[0], OPTIONS)))
    assert {s["reason"] for s in plain["sentence"]} == {"no confidence head was given"}


def test_a_forced_phrase_at_a_sentences_end_is_read_later(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are not in the cache when they are shown."""

    class EveryPiece(Sentences):
        def push(self, piece: str) -> bool:
            self._text = "x" if self._text else ""
            begins = self.close()
            self._text = "x"
            return begins

    monkeypatch.setattr(watching, "Sentences", EveryPiece)
    head = a_head(engine)
    router = two_step(engine, LABELS, 20.0, confidence=head)
    slow = next(p for p in PROMPTS if router.decide(p).mode == "slow")
    events = by_kind(list(Watcher(engine, router, head).watch(slow, OPTIONS)))
    assert events["switch"]
    told = {s["sentence"]: s["confidence"] for s in events["sentence"]}
    assert sorted(told) == list(range(40 - events["switch"][0]["forced"]))
    assert all(c is not None for c in told.values())


def test_an_engine_that_decides_inside_tells_at_the_end(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "Sentences", EveryFifth)
    both = trained(engine, LABELS, windows=constant(engine, 20.0))
    mine = Router(engine, Policy(kind="two-step", every=4), head=both, thinking=PAIR)
    deciding: Any = Deciding(engine, {"out": mine})
    router = Router(deciding, "out")
    prompt = next(p for p in PROMPTS if mine.decide(p).mode == "slow")
    events = list(Watcher(deciding, router).watch(prompt, OPTIONS))
    found, routed = by_kind(events), mine.generate(prompt, options=OPTIONS)
    assert text(found["piece"]) == routed.text
    told = [(c["token"], c["difficulty"]) for c in found["checkpoint"]]
    np.testing.assert_allclose(told, routed.decision.checkpoints, atol=1e-6)
    assert found["switch"][0]["token"] == routed.decision.switch.token  # type: ignore[union-attr]
    assert {p["phase"] for p in found["piece"]} == {"thought", "answer"}
    assert all(s["confidence"] is None and s["reason"] for s in found["sentence"])


def test_cancelling_ends_it(engine: TransformersEngine) -> None:
    cancel = CancelToken()
    events = []
    for event in Watcher(engine, two_step(engine, LABELS, 20.0)).watch(PROMPTS[0], OPTIONS, cancel=cancel):
        events.append(event)
        if event["type"] == "piece" and event["token"] == 5:
            cancel.cancel()
    assert events[-1]["type"] == "end"
    assert events[-1]["finish_reason"] == "cancelled"
    assert events[-1]["tokens"] == 6


@pytest.mark.parametrize(
    ("pieces", "cuts"),
    [
        (["One", ".", " Two", "?", " Three"], [2, 4]),
        (["Pi is 3", ".", "14 here", "."], []),
        (["first line\n", "second"], [1]),
        (['"Yes."', " he said"], [1]),
        (["你好。", "再见"], [1]),
        (["a=1;", "b=2;", "c=3;", "d=4;", "e=5;", "f=6;", "g=7;", "h=8"], [6]),
        (["\n", "\n", "text"], []),
        (["Done. ", "Next"], [1]),
    ],
)
def test_sentences(pieces: list[str], cuts: list[int]) -> None:
    found = Sentences()
    assert [i for i, piece in enumerate(pieces) if found.push(piece)] == cuts
    assert found.number == len(cuts)


def test_a_new_phase_begins_a_sentence() -> None:
    found = Sentences()
    assert [found.push("thinking"), found.push(" on"), found.close(), found.push("answer")] == [
        False,
        False,
        True,
        False,
    ]
    assert found.number == 1
    assert [found.close(), found.close()] == [True, False]
