"""The router: every policy, switches in flight, faults, and pieces that join to the whole."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvroute import (
    CancelToken,
    ChatTemplateError,
    DifficultyHead,
    EmptyTextError,
    FileFormatError,
    InvalidInputError,
    ModelMismatchError,
    Policy,
    PoolingSpec,
    Routed,
    Router,
    ThinkingMode,
    TokenIds,
    TransformersEngine,
)
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.models import RidgeModel
from kvroute.heads.neighbours import Neighbours
from kvroute.policy import named_policy, policy_path
from tiny_models import build_model, build_tokenizer

SPEC = PoolingSpec(layers="all", part="v", heads="concat", tokens="mean")
WINDOW = PoolingSpec(layers="last:2", part="v", heads="concat", window=4)
FALLING = LogisticMap(means=(50.0,), scales=(20.0,), coefficients=(-2.0,), intercept=0.0)
PAIR = ThinkingMode(
    fast="<think>\n\n</think>\n\n", slow="<think>\n", leave="\n</think>\n\n", enter="\n<think>\n", close="</think>"
)
PROMPTS = [
    "the quick brown fox jumps over the lazy dog",
    "what?",
    "a language model keeps the keys and values of every token it has read",
    "cat",
    "is the capital of the country the answer?",
    "question and answer, question and answer",
]
COUNT = 40
Values = np.ndarray[Any, np.dtype[np.float64]]


def an_engine() -> TransformersEngine:
    """In float64, with answers that never end by themselves."""
    model = build_model("qwen3", dtype=torch.float64)
    model.generation_config.eos_token_id = None
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    return TransformersEngine(model, tokenizer, name="tiny")


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return an_engine()


def vectors(engine: TransformersEngine, prompts: list[str], spec: PoolingSpec = SPEC) -> Any:
    return engine.pool([engine.tokenize(p) for p in prompts], [spec], progress=False)[0]


def trained(
    engine: TransformersEngine, labels: list[float], spec: PoolingSpec = SPEC, **changes: Any
) -> DifficultyHead:
    """A ridge head that says exactly these labels of the prompts above."""
    x = vectors(engine, PROMPTS, spec).astype(np.float64)
    mean = x.mean(axis=0)
    y = np.array(labels) / 100
    weight, *_ = np.linalg.lstsq(x - mean, y - y.mean(), rcond=None)
    ones = np.ones_like(mean, dtype=np.float32)
    model = RidgeModel(mean.astype(np.float32), ones, weight.astype(np.float32), np.array([y.mean()]))
    z = (x - mean).astype(np.float32)
    near = Neighbours.fit(z, np.array(labels), [(f"q{i}", p) for i, p in enumerate(PROMPTS)])
    head = DifficultyHead(
        spec=spec, target="difficulty", predictor=model, map=FALLING, model=engine.info.name,
        fingerprint=engine.info.fingerprint, data_hash="abc", neighbours=near,
    )  # fmt: skip
    return replace(head, **changes)


def constant(
    engine: TransformersEngine, difficulty: float, spec: PoolingSpec = WINDOW, **changes: Any
) -> DifficultyHead:
    """A ridge head that says the same of everything."""
    dim = spec.dimension(engine.info)
    zeros = np.zeros(dim, dtype=np.float32)
    model = RidgeModel(zeros, zeros, zeros, np.array([difficulty / 100]))
    head = DifficultyHead(
        spec=spec, target="difficulty", predictor=model, map=FALLING, model=engine.info.name,
        fingerprint=engine.info.fingerprint, data_hash="abc",
    )  # fmt: skip
    return replace(head, **changes)


LABELS = [10.0, 90.0, 30.0, 70.0, 45.0, 55.0]


@pytest.fixture(scope="module")
def head(engine: TransformersEngine) -> DifficultyHead:
    return trained(engine, LABELS)


class Stub:
    """A head in which a fault is simulated: ``change`` is done to what the real one says."""

    def __init__(self, head: DifficultyHead, change: Callable[[Any, Values], Any]) -> None:
        self._head, self._change = head, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)

    def predict(self, x: Any) -> Any:
        return self._change(x, self._head.predict(x))


def router(engine: TransformersEngine, policy: Any, **kwargs: Any) -> Router:
    return Router(engine, policy, thinking=kwargs.pop("thinking", PAIR), **kwargs)


def two_step(
    engine: TransformersEngine, labels: list[float], windows: float, *, shadow: bool = False, **kwargs: Any
) -> Router:
    """Looks again after every fourth token, where it always reads ``windows``."""
    head = trained(engine, labels, windows=constant(engine, windows))
    return router(engine, Policy(kind="two-step", every=4, shadow=shadow), head=head, **kwargs)


def plain(engine: TransformersEngine, ids: list[int], count: int) -> list[int]:
    """By hand: a prefill of these tokens, and what follows (token for token the model's own: test_generation)."""
    return engine.generate(TokenIds(tuple(ids)), max_tokens=count).token_ids


# ------------------------------------------------------------------ at the start


def test_one_step(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(kind="one-step"), head=head)
    decisions = r.decide_many(PROMPTS)
    assert [d.mode for d in decisions] == ["fast", "slow", "fast", "slow", "fast", "slow"]
    for d, label in zip(decisions, LABELS, strict=True):
        assert d.difficulty == pytest.approx(label, abs=0.1)
        assert d.probability == pytest.approx(float(FALLING(np.array([[label]]))[0]), abs=1e-3)
        assert (d.why, d.policy, d.threshold, d.switch, d.fault, d.nearest) == (
            "difficulty",
            "one-step",
            50.0,
            None,
            None,
            [],
        )
        assert d.seconds > 0
    for prompt, d in zip(PROMPTS, decisions, strict=True):
        alone = r.decide(prompt)
        assert alone.mode == d.mode
        assert alone.difficulty == pytest.approx(d.difficulty, abs=1e-4)


def test_every_row_of_a_batch_gets_its_own_mode(engine: TransformersEngine, head: DifficultyHead) -> None:
    """And the answers are those of the model after base and suffix."""
    r = router(engine, Policy(kind="one-step"), head=head)
    for prompt, routed in zip(PROMPTS, r.generate(PROMPTS, max_tokens=10), strict=True):
        layout = PAIR.layout(engine, prompt)
        decision = r.decide(prompt)
        assert routed.decision.mode == decision.mode
        assert routed.decision.difficulty == pytest.approx(decision.difficulty, abs=1e-4)
        asked = layout.base + (layout.slow if decision.mode == "slow" else layout.fast)
        assert routed.generation.prompt_token_ids == asked
        assert routed.generation.token_ids == plain(engine, asked, 10)
        assert routed.usage.computed == len(asked) + 9
        assert routed.text == routed.generation.text
        assert (routed.confidence, routed.confidence_reason) == (None, "no confidence head was given")
    assert r.counts == {"mode:fast": 3 + 3, "mode:slow": 3 + 3}


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_fixed_modes_need_no_head_and_read_nothing(engine: TransformersEngine, kind: Any) -> None:
    r = router(engine, kind)
    for routed in r.generate(PROMPTS[:2], max_tokens=3):
        assert routed.decision.mode == kind
        assert (routed.decision.why, routed.decision.difficulty) == ("policy", None)
    assert r.decide(PROMPTS[0]).mode == kind


def test_a_random_share(engine: TransformersEngine) -> None:
    many = [f"question {i}" for i in range(300)]
    modes = [d.mode for d in router(engine, Policy(kind="random", share=0.3)).decide_many(many)]
    assert 0.2 < modes.count("slow") / len(modes) < 0.4
    assert modes == [d.mode for d in router(engine, Policy(kind="random", share=0.3)).decide_many(many)]
    assert modes != [d.mode for d in router(engine, Policy(kind="random", share=0.3, seed=1)).decide_many(many)]
    for share, mode in ((0.0, "fast"), (1.0, "slow")):
        assert {d.mode for d in router(engine, Policy(kind="random", share=share)).decide_many(many)} == {mode}


def test_length(engine: TransformersEngine) -> None:
    lengths = [len(engine.tokenize(p)) for p in PROMPTS]
    cut = sorted(lengths)[3]
    decisions = router(engine, Policy(kind="length", length=cut)).decide_many(PROMPTS)
    assert [d.mode for d in decisions] == ["slow" if n > cut else "fast" for n in lengths]
    assert {d.threshold for d in decisions} == {float(cut)}


@pytest.mark.parametrize(("difficulty", "give_up", "mode", "threshold"), [
    (95.0, 90.0, "fast", 90.0), (80.0, 90.0, "slow", 50.0), (20.0, 90.0, "fast", 50.0), (95.0, None, "slow", 50.0),
])  # fmt: skip
def test_give_up(engine: TransformersEngine, difficulty: float, give_up: Any, mode: str, threshold: float) -> None:
    d = router(engine, Policy(give_up=give_up), head=constant(engine, difficulty)).decide("what?")
    assert (d.mode, d.threshold) == (mode, threshold)


def test_a_third_target_is_answered_there(engine: TransformersEngine, head: DifficultyHead) -> None:
    policy = Policy(thresholds=(40.0, 80.0), targets=("fast", "slow", "big"))
    big = TransformersEngine(build_model("llama"), build_tokenizer(), name="big")
    r = router(engine, policy, head=head, targets={"big": big})
    found = r.generate(PROMPTS, max_tokens=6)
    assert [x.decision.mode for x in found] == ["fast", "big", "fast", "slow", "slow", "slow"]
    assert [x.decision.threshold for x in found] == [40.0, 80.0, 40.0, 40.0, 40.0, 40.0]
    assert found[1].text == found[1].answer == big.generate(PROMPTS[1], max_tokens=6).text
    assert (
        found[0].generation.token_ids == router(engine, "fast").generate(PROMPTS[0], max_tokens=6).generation.token_ids
    )
    chunks = list(r.stream(PROMPTS, max_tokens=6))
    assert [c.text for c in chunks if c.index == 1] == [found[1].text]
    assert {c.index for c in chunks if c.routed} == set(range(6))
    # Another router as a target, every prompt sent there, and one that is demanded.
    inner = router(engine, "slow")
    all_there = router(engine, policy, head=constant(engine, 99.0), targets={"big": inner}).generate(
        PROMPTS[:3], max_tokens=6
    )
    assert [x.decision.mode for x in all_there] == ["big"] * 3
    assert [x.text for x in all_there] == [x.text for x in inner.generate(PROMPTS[:3], max_tokens=6)]
    assert r.generate(PROMPTS[0], mode="big", max_tokens=6).decision.why == "forced"
    with pytest.raises(InvalidInputError, match="big"):
        router(engine, policy, head=head)


def test_forced_per_request(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(kind="one-step"), head=head)
    found = r.generate(PROMPTS[:3], mode=["slow", None, "fast"], max_tokens=4)
    assert [(x.decision.mode, x.decision.why) for x in found] == [
        ("slow", "forced"), ("slow", "difficulty"), ("fast", "forced"),
    ]  # fmt: skip
    assert r.decide(PROMPTS[0], mode="slow").mode == "slow"
    with pytest.raises(InvalidInputError, match="A mode is one of"):
        r.generate(PROMPTS[0], mode="medium")
    with pytest.raises(InvalidInputError, match="2 modes"):
        r.generate(PROMPTS[:3], mode=["fast", "slow"])


def test_a_demanded_mode_is_not_switched(engine: TransformersEngine) -> None:
    found = two_step(engine, LABELS, 0.0).generate(PROMPTS[:2], mode="slow", max_tokens=COUNT)
    assert [x.decision.switch for x in found] == [None, None]
    assert [x.decision.checkpoints for x in found] == [[], []]


@pytest.mark.parametrize(("share", "window"), [(0.3, 50), (0.0, 50), (1.0, 50), (0.5, 1), (0.25, 8)])
def test_a_budget_over_a_moving_window(engine: TransformersEngine, share: float, window: int) -> None:
    rng = np.random.default_rng(0)
    r = router(engine, Policy(kind="budget", share=share, window=window), head=constant(engine, 50.0))
    asked = np.concatenate([rng.uniform(0, 60, 100), rng.uniform(40, 100, 100)])  # and traffic gets harder
    slow = np.array([r._within_budget(float(d))[0] == "slow" for d in asked])
    for end in range(1, len(asked) + 1):
        seen = min(end, window)
        assert slow[end - seen : end].sum() <= np.ceil(share * seen)
    if window == 50:
        assert slow[50:].mean() == pytest.approx(share, abs=0.1)
    if share == 0.3:  # the hardest of them
        assert asked[:100][slow[:100]].mean() > asked[:100][~slow[:100]].mean() + 20


def test_a_budget_is_used_where_many_are_as_hard(engine: TransformersEngine) -> None:
    r = router(engine, Policy(kind="budget", share=0.4, window=20), head=constant(engine, 100.0))
    decisions = r.decide_many(["what?"] * 100)
    assert {d.why for d in decisions} == {"budget"}
    assert sum(d.mode == "slow" for d in decisions[20:]) == pytest.approx(32, abs=1)


def test_shadow_decides_and_changes_nothing(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    slow = router(engine, "slow").generate(PROMPTS, max_tokens=COUNT)
    r = two_step(engine, LABELS, 0.0, shadow=True)
    with caplog.at_level(logging.INFO, "kvroute.router"):
        found = r.generate(PROMPTS, max_tokens=COUNT)
    assert [x.generation.token_ids for x in found] == [x.generation.token_ids for x in slow]
    assert {x.decision.mode for x in found} == {x.decision.final_mode for x in found} == {"slow"}
    assert {x.decision.why for x in found} == {"shadow"}
    assert [x.decision.proposed for x in found] == ["fast", "slow", "fast", "slow", "fast", "slow"]
    assert sum("shadow:" in record.message for record in caplog.records) == 6
    for x in found:  # what would have been switched is told, once
        assert x.decision.switch is not None
        assert (x.decision.switch.to, x.decision.switch.forced, len(x.decision.checkpoints)) == ("fast", 0, 1)
    assert r.health()["counts"].get("switches", 0) == 0
    assert not any(c.forced for c in r.stream(PROMPTS, max_tokens=COUNT))


@pytest.mark.parametrize(("difficulty", "last", "mode", "why"), [
    (53.0, "fast", "fast", "margin"), (56.0, "fast", "slow", "difficulty"), (47.0, "slow", "slow", "margin"),
    (44.0, "slow", "fast", "difficulty"), (53.0, "slow", "slow", "difficulty"), (53.0, None, "slow", "difficulty"),
])  # fmt: skip
def test_a_margin_between_turns(engine: TransformersEngine, difficulty: float, last: Any, mode: str, why: str) -> None:
    r = router(engine, Policy(margin=5.0), head=constant(engine, difficulty))
    d = r.decide("what?", last=last)
    assert (d.mode, d.why) == (mode, why)
    assert r.generate("what?", last=last, max_tokens=2).decision.mode == mode
    assert router(engine, Policy(margin=0.0), head=r.head).decide("what?", last=last).why == "difficulty"


def test_a_wide_margin_reaches_targets_in_the_middle() -> None:
    three = Policy(thresholds=(30.0, 60.0), targets=("fast", "slow", "big"), margin=60.0)
    assert three.targets_near(10.0) == {"fast", "slow", "big"}
    assert Policy(tau=50.0, give_up=55.0, margin=10.0).targets_near(60.0) == {"slow", "fast"}
    assert Policy(margin=5.0).targets_near(44.0) == {"fast"}


def test_explained_with_the_nearest_questions(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(), head=head)
    for i, d in enumerate(r.decide_many(PROMPTS, explain=True)):
        assert len(d.nearest) == 3
        assert (d.nearest[0].id, d.nearest[0].question) == (f"q{i}", PROMPTS[i])
        assert d.nearest[0].label == LABELS[i]
        assert d.nearest[0].distance < d.nearest[1].distance
    routed = r.generate(PROMPTS[2], explain=True, max_tokens=2)
    assert routed.decision.nearest[0].id == "q2"
    assert json.loads(json.dumps(routed.to_dict(), allow_nan=False))["decision"]["nearest"][0]["question"] == PROMPTS[2]
    assert r.generate(PROMPTS[2], max_tokens=2).decision.nearest == []


# ------------------------------------------------------------------ in flight


@pytest.mark.parametrize(("windows", "to"), [(0.0, "fast"), (100.0, "slow")])
def test_switched_answers_are_those_of_a_run_by_hand(engine: TransformersEngine, windows: float, to: Any) -> None:
    """At most one switch, at a checkpoint; the phrase is in, the cache goes on, nothing is computed twice."""
    r = two_step(engine, LABELS, windows)
    phrase = PAIR.phrase(engine, to)
    switched = 0
    for prompt, routed in zip(PROMPTS, r.generate(PROMPTS, max_tokens=COUNT), strict=True):
        d = routed.decision
        layout = PAIR.layout(engine, prompt)
        asked = layout.base + layout.suffix(d.mode)  # type: ignore[arg-type]
        if d.mode == to:
            assert d.switch is None
            assert [t for t, _ in d.checkpoints] == [4 * k for k in range(1, 10)]
            assert routed.generation.token_ids == plain(engine, asked, COUNT)
            assert d.final_mode == d.mode
        else:
            switched += 1
            assert d.switch is not None
            assert (d.switch.to, d.switch.token, d.switch.forced) == (to, 5, len(phrase))
            assert (d.switch.difficulty, d.switch.threshold) == (windows, 30.0 if to == "fast" else 70.0)
            assert d.checkpoints == [(4, windows)]
            assert d.final_mode == to
            before = plain(engine, asked, 5)
            after = plain(engine, asked + before + phrase, COUNT - 5 - len(phrase))
            assert routed.generation.token_ids == before + phrase + after
        assert routed.usage.computed == len(asked) + COUNT - 1
    assert switched == 3
    assert r.health()["counts"]["switches"] == 3


def test_rows_switch_at_their_own_checkpoints(engine: TransformersEngine) -> None:
    """With a head that looks at the window: each row as if it were alone."""
    base = trained(engine, [99.0] * 6)
    wanted = {}
    x = vectors(engine, PROMPTS, WINDOW)
    direction = np.random.default_rng(3).normal(size=x.shape[1]).astype(np.float32)
    scale = np.float32(1 / np.abs(x @ direction).max())
    zeros = np.zeros_like(direction)
    line = RidgeModel(zeros, np.ones_like(direction), direction * scale, np.array([0.5]))
    windows = replace(constant(engine, 0), predictor=line)
    policy = Policy(kind="two-step", every=3, tau_fast=35)
    r = router(engine, policy, head=replace(base, windows=windows))
    for prompt in PROMPTS:
        wanted[prompt] = r.generate(prompt, max_tokens=COUNT)
    steps = set()
    for prompt, routed in zip(PROMPTS, r.generate(PROMPTS, max_tokens=COUNT), strict=True):
        assert routed.generation.token_ids == wanted[prompt].generation.token_ids
        assert [t for t, _ in routed.decision.checkpoints] == [t for t, _ in wanted[prompt].decision.checkpoints]
        steps.add(routed.decision.switch.token if routed.decision.switch else None)
        layout, tokens = PAIR.layout(engine, prompt), routed.generation.token_ids
        held = [layout.base + layout.slow + tokens[:t] for t, _ in routed.decision.checkpoints]
        found = [d for _, d in routed.decision.checkpoints]
        assert found == pytest.approx(line(engine.pool(held, [WINDOW])[0]) * 100, abs=1e-2)
    assert len(steps) > 1, "all rows switch at the same step: take another direction"


def test_no_switch_where_too_little_room_is_left(engine: TransformersEngine) -> None:
    phrase = len(PAIR.phrase(engine, "fast"))
    hard = [99.0] * 6
    for room, switches in ((phrase + 3, False), (phrase + 4, True)):
        d = two_step(engine, hard, 0.0).generate(PROMPTS[0], max_tokens=5 + room).decision
        assert (d.switch is not None) == switches
        assert d.checkpoints[0] == (4, 0.0)  # it was looked, all the same


def test_a_thought_that_closed_itself_is_not_closed_again(engine: TransformersEngine) -> None:
    """The mark is found in the text, however it is cut into tokens."""
    plain_answer = router(engine, "slow").generate(PROMPTS[0], max_tokens=COUNT)
    mark = engine.tokenizer.decode(plain_answer.generation.token_ids[1:3])
    assert mark.strip()
    pair = PAIR.model_copy(update={"close": mark})
    for windows in (0.0, 50.0):
        r = two_step(engine, [99.0] * 6, windows, thinking=pair)
        routed = r.generate(PROMPTS[0], max_tokens=COUNT)
        assert routed.decision.switch is None
        assert routed.decision.checkpoints == []
        assert routed.answer == plain_answer.text.rpartition(mark.strip())[2].strip()


# ------------------------------------------------------------------ faults


def _nan(_x: Any, found: Values) -> Values:
    return found * np.nan


def _raises(_x: Any, _found: Values) -> Values:
    raise RuntimeError("the head fell over")


def _too_few(_x: Any, found: Values) -> Values:
    return found[:0]


@pytest.mark.parametrize("change", [_nan, _raises, _too_few])
@pytest.mark.parametrize("fallback", ["slow", "fast"])
def test_a_fault_of_the_head_takes_the_fallback(
    engine: TransformersEngine, head: DifficultyHead, change: Any, fallback: Any, caplog: pytest.LogCaptureFixture
) -> None:
    r = router(engine, Policy(kind="one-step", fallback=fallback), head=head)
    r.head = Stub(head, change)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING):
        found = r.generate(PROMPTS, max_tokens=5, explain=True)
    assert [(x.decision.mode, x.decision.why) for x in found] == [(fallback, "fault")] * 6
    assert all(x.decision.fault for x in found)
    assert [x.generation.token_ids for x in found] == [
        x.generation.token_ids for x in router(engine, fallback).generate(PROMPTS, max_tokens=5)
    ]
    assert r.health()["faults"] == 6
    assert f" requests ({found[0].decision.fault}): {fallback} thinking is used" in caplog.text
    told = [int(n) for n in re.findall(r"of (\d+) requests", caplog.text)]  # a line a batch, not one a request
    assert (sum(told), len(told)) == (6, len(caplog.records))
    assert len(told) < 6
    json.dumps(found[0].to_dict(), allow_nan=False)
    d = r.decide(PROMPTS[0])
    assert (d.mode, d.why) == (fallback, "fault")
    assert r.health()["faults"] == 7


def test_a_fault_stays_with_its_row(engine: TransformersEngine, head: DifficultyHead) -> None:
    bad = vectors(engine, PROMPTS)[1]

    def one_bad(x: Any, found: Values) -> Values:
        if len(x) and np.abs(x - bad).max(axis=1).min() < 1e-4:
            raise RuntimeError("this one")
        return found

    r = router(engine, Policy(kind="one-step"), head=head)
    r.head = Stub(head, one_bad)  # type: ignore[assignment]
    for decisions in (r.decide_many(PROMPTS), [x.decision for x in r.generate(PROMPTS, max_tokens=3)]):
        assert [d.why for d in decisions] == ["difficulty", "fault", *["difficulty"] * 4]
        assert [d.mode for d in decisions] == ["fast", "slow", "fast", "slow", "fast", "slow"]
        assert decisions[1].fault == "RuntimeError: this one"
    assert r.health()["faults"] == 2


def test_features_that_are_not_finite(head: DifficultyHead, caplog: pytest.LogCaptureFixture) -> None:
    """A token whose values are NaN faults the prompts that hold it, and no others."""
    broken = an_engine()
    token = broken.tokenize(PROMPTS[1])[0]
    assert all(token not in broken.tokenize(p) for p in PROMPTS[2:3])
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[token] = float("nan")
    r = router(broken, Policy(kind="one-step"), head=replace(head, fingerprint=broken.info.fingerprint))
    with caplog.at_level(logging.WARNING):
        first, second = r.generate([PROMPTS[1], PROMPTS[2]], max_tokens=3)
    assert (first.decision.mode, first.decision.why) == ("slow", "fault")
    assert "NaN" in str(first.decision.fault) or "finite" in str(first.decision.fault)
    assert (second.decision.mode, second.decision.why) == ("fast", "difficulty")
    assert len(caplog.records) == 1
    assert [d.why for d in r.decide_many([PROMPTS[1], PROMPTS[2]])] == ["fault", "difficulty"]


def test_vectors_of_a_wrong_size(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(
        engine, Policy(kind="one-step"), head=replace(head, spec=PoolingSpec(layers="all", layer_reduce="concat"))
    )
    for d in (r.decide("what?"), r.generate("what?", max_tokens=2).decision):
        assert (d.mode, d.why) == ("slow", "fault")
        assert "The head takes vectors" in str(d.fault)


def test_a_fault_at_a_checkpoint_keeps_the_mode(engine: TransformersEngine, caplog: pytest.LogCaptureFixture) -> None:
    r = two_step(engine, LABELS, 0.0)
    assert r.head is not None
    assert r.head.windows is not None
    r.head = replace(r.head, windows=Stub(r.head.windows, _nan))  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        routed = r.generate(PROMPTS[1], max_tokens=COUNT)
    assert (routed.decision.mode, routed.decision.why, routed.decision.switch) == ("slow", "difficulty", None)
    assert routed.decision.fault
    assert (
        routed.generation.token_ids
        == router(engine, "slow").generate(PROMPTS[1], max_tokens=COUNT).generation.token_ids
    )
    assert len(caplog.records) == 1  # and not one a checkpoint
    assert "the mode is kept" in caplog.text
    assert r.health()["faults"] == 1


def test_after_a_fault_at_the_start_the_fallback_stays(engine: TransformersEngine) -> None:
    r = two_step(engine, LABELS, 0.0)
    assert r.head is not None
    r.head = Stub(r.head, _raises)  # type: ignore[assignment]
    d = r.generate(PROMPTS[0], max_tokens=COUNT).decision
    assert (d.mode, d.final_mode, d.checkpoints) == ("slow", "slow", [])


def test_explaining_and_watching_cost_no_answer(engine: TransformersEngine, head: DifficultyHead) -> None:
    class Broken:
        def update_many(self, *_: Any) -> None:
            raise RuntimeError("no drift today")

    r = router(engine, Policy(), head=head, drift=Broken())
    assert head.neighbours is not None
    r.head = replace(head, neighbours=replace(head.neighbours, components=head.neighbours.components[:, :2]))
    d = r.generate(PROMPTS[0], explain=True, max_tokens=2).decision
    assert (d.mode, d.why, d.nearest, d.fault) == ("fast", "difficulty", [], None)
    assert r.counts["faults"] == 2


def test_bad_input_is_no_fault(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(), head=head)
    with pytest.raises(EmptyTextError):
        r.decide("")
    with pytest.raises(EmptyTextError):
        r.generate("")
    with pytest.raises(EmptyTextError):
        r.stream("")
    with pytest.raises(ChatTemplateError):
        r.decide([{"role": "user"}])
    with pytest.raises(InvalidInputError, match="not both"):
        r.generate("what?", max_tokens=3, options=r.options or _options())
    nothing: list[str] = []
    assert r.generate(nothing) == []
    assert r.decide_many([]) == []
    assert r.counts["faults"] == 0


def _options() -> Any:
    from kvroute import SamplingOptions

    return SamplingOptions(max_tokens=4)


def test_memory_that_runs_out_counts_nothing_twice(head: DifficultyHead) -> None:
    small = an_engine()
    small.token_budget = 128
    r = two_step(small, [99.0] * 6, 0.0)
    wanted = r.generate(PROMPTS, max_tokens=COUNT)
    before = dict(r.counts)
    steps = 0

    def check(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal steps
        rows, new = kwargs["input_ids"].shape
        steps += new == 1
        if rows > 2 and steps > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    handle = small.model.register_forward_pre_hook(check, with_kwargs=True)
    with pytest.warns(RuntimeWarning, match="budget is halved"):
        found = r.generate(PROMPTS, max_tokens=COUNT)
    handle.remove()
    assert [x.generation.token_ids for x in found] == [x.generation.token_ids for x in wanted]
    assert [x.decision.switch for x in found] == [x.decision.switch for x in wanted]
    assert [x.decision.checkpoints for x in found] == [x.decision.checkpoints for x in wanted]
    assert dict(r.counts) == {k: 2 * v for k, v in before.items()}


# ------------------------------------------------------------------ streams, threads, cancelling


@pytest.mark.parametrize("windows", [0.0, 100.0, 50.0])
def test_pieces_join_to_the_whole(engine: TransformersEngine, windows: float) -> None:
    r = two_step(engine, LABELS, windows)
    wanted = r.generate(PROMPTS, max_tokens=COUNT)
    pieces: list[list[Any]] = [[] for _ in PROMPTS]
    for chunk in r.stream(PROMPTS, max_tokens=COUNT):
        pieces[chunk.index].append(chunk)
    for mine, whole in zip(pieces, wanted, strict=True):
        assert "".join(c.text for c in mine) == whole.text
        assert [c.token_id for c in mine if c.token_id is not None] == whole.generation.token_ids
        assert [c.routed is not None for c in mine] == [False] * (len(mine) - 1) + [True]
        last = mine[-1].routed
        assert (last.text, last.thought, last.answer) == (whole.text, whole.thought, whole.answer)
        assert last.decision.switch == whole.decision.switch
        flags = [c.forced for c in mine]
        phases = [c.phase for c in mine]
        switch = whole.decision.switch
        if switch is None:
            assert not any(flags)
            assert set(phases) == {"thought" if whole.decision.mode == "slow" else "answer"}
            continue
        assert [i for i, f in enumerate(flags) if f] == list(range(switch.token, switch.token + switch.forced))
        first, then = ("thought", "answer") if switch.to == "fast" else ("answer", "thought")
        assert set(phases[: switch.token]) == {first}
        assert set(phases[switch.token + switch.forced :]) == {then}
        # The closing mark belongs to the thought, the opening one too.
        forced = mine[switch.token : switch.token + switch.forced]
        assert forced[0].phase == "thought"
        assert (
            "".join(c.text for c in mine[switch.token :]).count("</think>" if switch.to == "fast" else "<think>") == 1
        )


def test_thought_and_answer_of_a_closed_thought(engine: TransformersEngine) -> None:
    routed = two_step(engine, [99.0] * 6, 0.0).generate(PROMPTS[0], max_tokens=COUNT)
    assert routed.text.count("</think>") == 1
    thought, _, answer = routed.text.partition("</think>")
    assert (routed.thought, routed.answer) == (thought.strip(), answer.strip())
    open_still = router(engine, "slow").generate(PROMPTS[0], max_tokens=COUNT)
    assert (open_still.thought, open_still.answer) == (open_still.text.strip(), "")
    at_once = router(engine, "fast").generate(PROMPTS[0], max_tokens=COUNT)
    assert (at_once.thought, at_once.answer) == ("", at_once.text.strip())


def test_async_twins(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(), head=head)

    async def work() -> tuple[Any, Any, list[Any]]:
        return (
            await r.adecide(PROMPTS[0], explain=True),
            await r.agenerate(PROMPTS[:2], max_tokens=5),
            [c async for c in r.astream(PROMPTS[:2], max_tokens=5)],
        )

    decision, found, chunks = asyncio.run(work())
    assert decision.mode == "fast"
    assert decision.nearest[0].id == "q0"
    assert [x.text for x in found] == [x.text for x in r.generate(PROMPTS[:2], max_tokens=5)]
    for i in range(2):
        assert "".join(c.text for c in chunks if c.index == i) == found[i].text


def test_cancelling_a_task_ends_the_work(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(), head=head)

    async def work() -> None:
        task = asyncio.create_task(r.agenerate(PROMPTS, max_tokens=2000))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(work())


@pytest.mark.parametrize("targets", [{}, {"big": "big"}])
def test_cancelled_before_it_began(engine: TransformersEngine, head: DifficultyHead, targets: Any) -> None:
    cancel = CancelToken()
    cancel.cancel()
    r = router(engine, Policy(), head=head, targets={k: router(engine, "slow") for k in targets})
    for routed in r.generate(PROMPTS[:2], cancel=cancel, mode=list(targets) * 2 or None):
        assert routed.generation.finish_reason == "cancelled"
        assert (routed.text, routed.usage.computed) == ("", 0)
        assert (routed.decision.mode, routed.decision.why) == ("slow", "fault")
    assert [c.routed is not None for c in r.stream(PROMPTS[0], cancel=cancel)] == [True]
    assert r.counts["faults"] == 0


def test_cancelled_on_the_way(engine: TransformersEngine) -> None:
    cancel = CancelToken()
    seen: list[Any] = []
    for chunk in two_step(engine, [99.0] * 6, 0.0).stream(PROMPTS[0], max_tokens=COUNT, cancel=cancel):
        seen.append(chunk)
        if len(seen) == 9:
            cancel.cancel()
    assert seen[-1].routed.generation.finish_reason == "cancelled"
    assert "".join(c.text for c in seen) == seen[-1].routed.text


# ------------------------------------------------------------------ messages, options, confidence


def test_messages_and_template_variables(engine: TransformersEngine) -> None:
    system = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    template = system + engine.tokenizer.chat_template
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    chat = TransformersEngine(engine.model, tokenizer, name="chat")
    r = router(chat, Policy(kind="length", length=40))
    asked = [{"role": "user", "content": "what?"}]
    tools = {"tools": [{"type": "function", "function": {"name": "x" * 60, "parameters": {}}}]}
    assert r.decide(asked).mode == "fast"
    assert r.decide(asked, template=tools).mode == "slow"
    routed = r.generate(asked, template=tools, max_tokens=2)
    assert routed.decision.mode == "slow"
    assert "x" * 60 in chat.tokenizer.decode(routed.generation.prompt_token_ids)
    assert isinstance(r.generate([asked, "what?"], max_tokens=2), list)


def test_options_are_the_routers_unless_a_call_says(engine: TransformersEngine) -> None:
    r = router(engine, "fast", options=_options())
    assert r.generate("what?").usage.generated == 4
    assert r.generate("what?", max_tokens=2).usage.generated == 2
    assert r.generate("what?", stop="zzz").usage.generated == 4
    assert router(engine, "fast").generate("what?", options=_options()).usage.generated == 4


def test_every_answer_carries_its_confidence(engine: TransformersEngine, head: DifficultyHead) -> None:
    curve = LogisticMap(means=(0.0,), scales=(1.0,), coefficients=(1.0,), intercept=0.0)
    sure = constant(engine, 100.0, spec=SPEC, target="correct", map=curve)
    r = router(engine, Policy(), head=head, confidence=sure)
    for features in (None, "logits", ["kv-coe", SPEC], {"mine": SPEC}):
        found = r.generate(PROMPTS[:2], max_tokens=4, features=features)
        for routed in found:
            assert routed.confidence == pytest.approx(1 / (1 + np.exp(-1)))
            assert routed.confidence_reason is None
            assert not [n for n in routed.generation.features if "confidence" in n]
        if isinstance(features, list):  # named as the engine names them
            assert set(found[0].generation.features) == {"prompt"}
            assert found[0].generation.scores["kv_coe_r_token"].value is not None
    short = r.generate("what?", max_tokens=1)  # no token of it has keys and values
    assert short.confidence is None
    assert "no token" in str(short.confidence_reason)
    assert not short.generation.feature_errors
    r.confidence = Stub(sure, _nan)  # type: ignore[assignment]
    broken = r.generate("what?", max_tokens=4)
    assert (broken.confidence, r.counts["faults"]) == (None, 1)
    with pytest.raises(InvalidInputError, match="target"):
        router(engine, Policy(), head=sure)


# ------------------------------------------------------------------ policies and files


def test_policies_come_back_from_their_files(tmp_path: Path) -> None:
    policy = Policy(
        kind="two-step", tau=40.0, tau_fast=20, every=8, give_up=95.0, guarantee={"delta": 0.05}, head="head"
    )
    policy.save(tmp_path / "p.json")
    assert Policy.load(tmp_path / "p.json") == policy
    (tmp_path / "torn.json").write_bytes((tmp_path / "p.json").read_bytes()[:-9])
    body = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "odd.json").write_text(json.dumps({**body, "body": {"kind": "sometimes"}}))
    for name in ("torn.json", "odd.json", "none.json"):
        with pytest.raises(FileFormatError):
            Policy.load(tmp_path / name)


@pytest.mark.parametrize("wrong", [
    {"kind": "sometimes"}, {"tau": float("nan")}, {"tau": 200.0}, {"share": 1.5}, {"every": 0}, {"fallback": "medium"},
    {"thresholds": (60.0, 40.0), "targets": ("fast", "slow", "x")}, {"thresholds": (40.0,), "targets": ("fast",)},
    {"targets": ("slow", "fast")}, {"thresholds": (float("nan"),)}, {"unknown": 1},
])  # fmt: skip
def test_policies_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises((InvalidInputError, ValueError)):
        Policy(**wrong)


def test_a_router_from_a_file_takes_the_head_beside_it(
    engine: TransformersEngine, head: DifficultyHead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.save(tmp_path / "my-head")
    Policy(kind="one-step", tau=60.0, head="my-head").save(tmp_path / "careful.json")
    wanted = [d.mode for d in router(engine, Policy(tau=60.0), head=head).decide_many(PROMPTS)]
    monkeypatch.setenv("KVROUTE_POLICIES", str(tmp_path))
    for name in ("careful", str(tmp_path / "careful.json"), tmp_path / "careful.json"):
        r = Router.load(engine, name, thinking=PAIR)
        assert r.policy.tau == 60.0
        assert [d.mode for d in r.decide_many(PROMPTS)] == wanted
    with pytest.raises(ModelMismatchError):
        Router(TransformersEngine(build_model("llama"), build_tokenizer()), "careful", thinking=PAIR)
    (tmp_path / "my-head" / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(FileFormatError):
        Router(engine, "careful", thinking=PAIR)


def test_names_hold_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    Policy(kind="slow").save(tmp_path / "outside.json")
    Policy(kind="slow").save(folder / "inside.json")
    assert named_policy(folder, "inside") == folder / "inside.json"
    for name in ("../outside", "..", "", "a/b", "/etc/passwd", ".hidden", "inside\n", "a\\b", "inside\0", "~root"):
        with pytest.raises(InvalidInputError, match="not a name"):
            named_policy(folder, name)
    with pytest.raises(InvalidInputError, match="inside"):
        named_policy(folder, "outside")
    monkeypatch.delenv("KVROUTE_POLICIES", raising=False)
    with pytest.raises(InvalidInputError, match="KVROUTE_POLICIES"):
        policy_path("inside")
    monkeypatch.setenv("KVROUTE_POLICIES", str(folder))
    assert policy_path("inside") == folder / "inside.json"
    with pytest.raises(InvalidInputError, match="not a name"):
        policy_path("../outside")


def test_what_a_router_refuses(engine: TransformersEngine, head: DifficultyHead) -> None:
    for kind in ("one-step", "two-step", "budget"):
        with pytest.raises(InvalidInputError, match="no head"):
            router(engine, kind)
    with pytest.raises(InvalidInputError, match="mid-answer"):
        router(engine, "two-step", head=head)
    with pytest.raises(ModelMismatchError):
        router(engine, Policy(), head=replace(head, fingerprint="0" * 16))
    assert router(engine, "one-step", head=head).policy.kind == "one-step"
    assert router(engine, "random").policy.kind == "random"


def test_health(engine: TransformersEngine, head: DifficultyHead) -> None:
    r = router(engine, Policy(), head=head)
    assert r.health() == {"counts": {}, "faults": 0, "drift": None}
    found: Routed = r.generate(PROMPTS[0], max_tokens=2)
    assert r.health()["counts"] == {f"mode:{found.decision.mode}": 1}


# ---------------------------------------------------------------------- a decision that keeps its prefill


def test_prefill_decides_as_decide_and_the_answer_goes_on_from_it(engine):
    r = router(engine, Policy(tau=50.0), head=trained(engine, [10, 90, 20, 80, 30, 70]))
    for prompt in PROMPTS:
        kept = r.prefill(prompt)
        alone = r.decide(prompt)
        assert (kept.decision.mode, kept.decision.why) == (alone.mode, "difficulty")
        assert kept.decision.difficulty == pytest.approx(alone.difficulty, abs=1e-4)
        size = len(engine.tokenize(prompt))
        assert (kept.usage.prompt, kept.usage.computed, kept.usage.generated) == (size, size, 0)
        plain = r.generate(prompt, max_tokens=6, mode=kept.decision.mode)
        on = r.generate(prompt, max_tokens=6, mode=kept.decision.mode, prefix=kept.prefix)
        assert on.generation.token_ids == plain.generation.token_ids
        assert on.usage.cached == size - 1  # the last token's logits are not kept, so it is run again
        assert on.usage.computed == plain.usage.computed - on.usage.cached


def test_prefill_runs_nothing_where_no_difficulty_is_read(engine):
    for r, mode in ((router(engine, Policy(kind="fast")), None), (router(engine, Policy(kind="slow")), "fast")):
        kept = r.prefill(PROMPTS[0], mode=mode)
        assert kept.prefix is None
        assert kept.usage.computed == 0
        assert kept.decision.mode == "fast"


def test_prefill_of_a_failing_head_takes_the_fallback_and_keeps_the_cache(engine):
    head = trained(engine, [10, 90, 20, 80, 30, 70])
    r = router(engine, Policy(tau=50.0, fallback="slow"), head=head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(head), "predict", lambda *_: 1 / 0)
        kept = r.prefill(PROMPTS[0])
    assert (kept.decision.mode, kept.decision.why) == ("slow", "fault")
    assert "ZeroDivisionError" in kept.decision.fault
    assert kept.prefix is not None
    assert asyncio.run(r.aprefill(PROMPTS[0])).decision.why == "difficulty"


@pytest.mark.parametrize("keep", [True, False])
def test_prefill_many_is_prefill_for_each_in_one_run(engine, keep):
    r = router(engine, Policy(tau=50.0), head=trained(engine, [10, 90, 20, 80, 30, 70]))
    modes = [None, "fast", *[None] * 4]
    found = r.prefill_many(PROMPTS, mode=modes, keep=keep)
    for prompt, mode, one in zip(PROMPTS, modes, found, strict=True):
        alone = r.prefill(prompt, mode=mode)
        assert (one.decision.mode, one.decision.why) == (alone.decision.mode, alone.decision.why)
        assert one.usage == alone.usage
        assert (one.prefix is not None) == (keep and mode is None)
        if mode is None:
            assert one.decision.difficulty == pytest.approx(alone.decision.difficulty, abs=1e-3)
        if one.prefix is not None:
            on = r.generate(prompt, max_tokens=6, mode=one.decision.mode, prefix=one.prefix)
            plain = r.generate(prompt, max_tokens=6, mode=one.decision.mode)
            assert on.generation.token_ids == plain.generation.token_ids
            assert on.usage.cached == one.usage.prompt - 1
    assert r.prefill_many([], keep=keep) == []
