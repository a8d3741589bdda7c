"""best_of: one prefill, samples that vote, and an end as soon as the vote can't turn."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute import (
    CancelToken,
    DifficultyHead,
    InvalidInputError,
    Policy,
    PoolingSpec,
    Router,
    ThinkingMode,
    TransformersEngine,
    Voted,
)
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.fitting import Rows, ridge_path
from kvroute.voting import UNKNOWN, Tally, read_answer
from tiny_models import build_model, build_tokenizer

CHAT = [{"role": "user", "content": "what is the capital of the country?"}]
OTHER = [{"role": "user", "content": "and the dog sat on the mat with the lazy fox"}]
N = 7
HOW = {"temperature": 1.0, "seed": 3, "max_tokens": 24}


def a_head(engine: TransformersEngine, target: Any = "correct", **changes: Any) -> DifficultyHead:
    spec = PoolingSpec(layers=(1, 2), part="v", heads="concat")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, spec.dimension(engine.info))).astype(np.float32)
    curve = LogisticMap(means=(0.5,), scales=(0.3,), coefficients=(1.5,), intercept=0.1)
    return DifficultyHead(
        spec=spec, target=target, predictor=ridge_path(Rows(x, (x[:, 0] > 0).astype(float)), [0.01])[0], map=curve,
        model=engine.info.name, fingerprint=engine.info.fingerprint, data_hash="x",
    )  # fmt: skip


def an_engine(**kwargs: Any) -> TransformersEngine:
    """A model with many end tokens, so that samples end at different steps."""
    model = build_model("llama")
    model.generation_config.eos_token_id = list(range(100, 130))
    return TransformersEngine(model, build_tokenizer(), name="tiny-llama", **kwargs)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return an_engine()


def a_router(engine: TransformersEngine, policy: Any = "fast", **kwargs: Any) -> Router:
    return Router(engine, policy, thinking=ThinkingMode.instructions(), **kwargs)


def first_letter(text: str) -> str | None:
    return text.strip()[:1] or None


def parity(text: str) -> str:
    return "even" if len(text) % 2 == 0 else "odd"


# ---------------------------------------------------------------------- counting

votes = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.floats(0, 1, allow_nan=False)), min_size=1, max_size=9
)


def ballot(rows: list[tuple[str | None, float]], n: int) -> Tally:
    tally = Tally(n)
    for i, (vote, weight) in enumerate(rows):
        tally.add(i, vote, weight)
    return tally


@settings(max_examples=200, deadline=None)
@given(votes, st.randoms(use_true_random=False))
def test_a_settled_vote_has_the_winner_of_the_whole(rows: list[tuple[str | None, float]], rng: Any) -> None:
    n = len(rows)
    whole = ballot(rows, n).ranking()
    order = list(range(n))
    rng.shuffle(order)
    tally = Tally(n)
    for i in order:
        tally.add(i, *rows[i])
        if tally.settled:
            assert tally.ranking()[0][0] == whole[0][0]
    assert tally.ranking() == whole


@settings(max_examples=200, deadline=None)
@given(votes, st.integers(0, 6))
def test_a_vote_is_settled_as_soon_as_it_can_be(rows: list[tuple[str | None, float]], missing: int) -> None:
    """Where it is not settled, there is a rest that turns it or brings it level."""
    tally = ballot(rows, len(rows) + missing)
    ranking = tally.ranking()
    if not ranking or tally.settled:
        return
    rival = ranking[1][0] if len(ranking) > 1 else "z"
    for i in range(missing):
        tally.add(len(rows) + i, rival, 1.0)
    totals = {vote: weight for vote, weight, _ in tally.ranking()}
    assert totals.get(rival, 0.0) >= totals[ranking[0][0]] - 1e-6


def test_three_of_five_settle_a_plain_vote() -> None:
    assert not ballot([("a", 1.0), ("a", 1.0)], 5).settled
    assert ballot([("a", 1.0)] * 3, 5).settled
    assert not ballot([("a", 1.0), ("a", 1.0), ("b", 1.0)], 5).settled
    assert ballot([("a", 1.0), (None, 0.0), ("a", 1.0), (None, 0.0)], 5).settled
    assert not ballot([(None, 0.0)] * 4, 5).settled


def test_weights_and_ties() -> None:
    tally = ballot([("a", 0.2), ("a", 0.2), ("b", 0.9)], 3)
    assert [v for v, _, _ in tally.ranking()] == ["b", "a"]
    assert [v for v, _, _ in tally.ranking(weighted=False)] == ["a", "b"]
    assert ballot([("b", 0.5), ("a", 0.25), ("a", 0.25)], 3).ranking()[0][0] == "a"  # as heavy, more votes
    assert ballot([("b", 0.5), ("a", 0.5)], 2).ranking()[0][0] == "b"  # the earlier
    with pytest.raises(InvalidInputError):
        tally.add(3, "a", 1.5)


@pytest.mark.parametrize(
    ("text", "read"),
    [("The answer is 05.", "5"), ("so 1,000", "1000"), ("1/2", "1/2"), ("0.50", "1/2"), ("50%", "50%"),
     (" Paris\n", "Paris"), ("  ", None), ("", None)],
)  # fmt: skip
def test_reading(text: str, read: str | None) -> None:
    assert read_answer(text) == read


# ---------------------------------------------------------------------- samples


def test_the_samples_are_those_of_generate(engine: TransformersEngine) -> None:
    router = a_router(engine)
    voted = router.best_of(CHAT, N, early=False, read=first_letter, **HOW)
    plain = router.generate([CHAT] * N, **HOW)
    assert [s.routed.generation.token_ids for s in voted.samples] == [r.generation.token_ids for r in plain]
    assert len({tuple(r.generation.token_ids) for r in plain}) > 1
    assert [s.vote for s in voted.samples] == [first_letter(r.answer) for r in plain]
    counted = {v: [s.vote for s in voted.samples].count(v) for v in {s.vote for s in voted.samples} - {None}}
    assert voted.votes == counted
    assert voted.weights == {v: float(c) for v, c in counted.items()}
    assert voted.winner == voted.majority
    assert voted.votes[str(voted.winner)] == max(counted.values())
    assert (voted.finished, voted.stopped, voted.settled) == (N, 0, False)
    assert voted.agreement == pytest.approx(voted.votes[str(voted.winner)] / sum(counted.values()))
    assert voted.best is not None
    assert first_letter(voted.best.answer) == voted.winner


def test_the_prompt_is_computed_once(engine: TransformersEngine) -> None:
    router = a_router(engine)
    voted = router.best_of(CHAT, N, early=False, **HOW)
    layout = router.thinking.layout(engine, CHAT)
    base, suffix = len(layout.base), len(layout.fast)
    written = sum(s.routed.usage.generated - 1 for s in voted.samples)
    assert voted.usage.cached == (N - 1) * base
    assert voted.usage.computed == base + N * suffix + written
    assert voted.usage.prompt == N * (base + suffix)
    assert [s.routed.usage.cached for s in voted.samples] == [0] + [base] * (N - 1)


def test_it_stops_when_the_vote_can_not_turn(engine: TransformersEngine) -> None:
    router = a_router(engine)
    whole = router.best_of(CHAT, N, early=False, read=lambda text: "same", **HOW)
    lengths = sorted(s.routed.usage.generated for s in whole.samples)
    assert lengths[3] < lengths[-1], "all samples end together: choose another seed"
    voted = router.best_of(CHAT, N, read=lambda text: "same", **HOW)
    assert voted.settled
    assert voted.stopped > 0
    assert voted.winner == whole.winner == "same"
    assert voted.votes == {"same": voted.finished}
    assert voted.finished >= 4
    assert voted.usage.generated < whole.usage.generated
    assert voted.usage.computed < whole.usage.computed
    for mine, full in zip(voted.samples, whole.samples, strict=True):
        tokens = mine.routed.generation.token_ids
        assert tokens == full.routed.generation.token_ids[: len(tokens)]
        assert mine.stopped == (mine.routed.generation.finish_reason == "cancelled")
        assert len(tokens) <= lengths[3] + 1  # the fourth one settled it
        assert (mine.vote is None) == mine.stopped


@pytest.mark.parametrize("seed", range(6))
def test_stopping_does_not_change_the_winner(engine: TransformersEngine, seed: int) -> None:
    router = a_router(engine, confidence=a_head(engine))
    how = {**HOW, "seed": seed}
    whole = router.best_of([CHAT, OTHER], N, early=False, read=parity, **how)
    early = router.best_of([CHAT, OTHER], N, read=parity, **how)
    assert [v.winner for v in early] == [v.winner for v in whole]


def test_votes_weigh_their_confidence(engine: TransformersEngine) -> None:
    router = a_router(engine, confidence=a_head(engine))
    voted = router.best_of(CHAT, N, early=False, read=parity, **HOW)
    plain = router.generate([CHAT] * N, **HOW)
    for sample, alone in zip(voted.samples, plain, strict=True):
        wanted = UNKNOWN if alone.confidence is None else alone.confidence
        assert sample.weight == pytest.approx(wanted, abs=1e-5)
    for answer, weight in voted.weights.items():
        assert weight == pytest.approx(math.fsum(s.weight for s in voted.samples if s.vote == answer))
    assert voted.winner == max(voted.weights, key=lambda a: voted.weights[a])
    assert voted.majority == max(voted.votes, key=lambda a: voted.votes[a])
    flat = router.best_of(CHAT, N, early=False, weighted=False, read=parity, **HOW)
    assert {s.weight for s in flat.samples} == {1.0}
    assert flat.winner == flat.majority == voted.majority
    best = max((s for s in voted.samples if s.vote == voted.winner), key=lambda s: s.weight)
    assert voted.best is best.routed


def test_an_answer_that_the_head_can_not_judge_weighs_a_half(engine: TransformersEngine) -> None:
    router = a_router(engine, confidence=a_head(engine))
    voted = router.best_of(CHAT, 3, temperature=1.0, seed=0, max_tokens=1)  # one token has no keys and values
    assert [s.routed.confidence for s in voted.samples] == [None] * 3
    assert all(s.weight == (UNKNOWN if s.vote is not None else 0) for s in voted.samples)


def test_many_prompts_vote_as_each_alone(engine: TransformersEngine) -> None:
    router = a_router(engine)
    together = router.best_of([CHAT, OTHER], N, early=False, read=first_letter, **HOW)
    for prompt, voted in zip([CHAT, OTHER], together, strict=True):
        alone = router.best_of(prompt, N, early=False, read=first_letter, **HOW)
        assert [s.routed.text for s in voted.samples] == [s.routed.text for s in alone.samples]
        assert (voted.winner, voted.votes, voted.usage) == (alone.winner, alone.votes, alone.usage)


def test_one_vote_may_be_over_before_another(engine: TransformersEngine) -> None:
    router = a_router(engine)
    asked = iter(range(1000))
    voted = router.best_of([CHAT, OTHER], N, read=lambda text: f"answer no. {next(asked)}", **HOW)
    assert all(v.stopped == 0 for v in voted)  # all differ: never settled
    assert all(len(v.votes) == N for v in voted)
    lengths = [sorted(s.routed.usage.generated for s in v.samples) for v in voted]
    mixed = router.best_of([CHAT, OTHER], N, read=lambda text: "same", **HOW)
    assert [v.winner for v in mixed] == ["same", "same"]
    for v, whole in zip(mixed, lengths, strict=True):
        assert sum(s.routed.usage.generated for s in v.samples) < sum(whole)


def test_it_is_one_decision(engine: TransformersEngine) -> None:
    head = a_head(engine, "difficulty")
    router = a_router(engine, Policy(kind="one-step", tau=50.0), head=head)
    voted = router.best_of(CHAT, N, **HOW)
    wanted = router.decide(CHAT)
    assert voted.decision.mode == wanted.mode
    assert voted.decision.difficulty == pytest.approx(wanted.difficulty, abs=1e-3)
    assert {s.routed.decision.mode for s in voted.samples} == {wanted.mode}
    assert sum(c for name, c in router.health()["counts"].items() if name.startswith("mode:")) == 2


def test_samples_in_several_batches() -> None:
    """A token budget that holds two samples at once: the decision is shared all the same."""
    small = an_engine(token_budget=30)
    router = a_router(small, Policy(kind="one-step", tau=50.0), head=a_head(small, "difficulty"))
    voted = router.best_of(CHAT, N, early=False, read=first_letter, **HOW)
    assert sum(s.routed.usage.cached == 0 for s in voted.samples) > 1, "all fit one batch"
    large = an_engine()
    whole = a_router(large, Policy(kind="one-step", tau=50.0), head=a_head(large, "difficulty"))
    wanted = whole.best_of(CHAT, N, early=False, read=first_letter, **HOW)
    assert [s.routed.text for s in voted.samples] == [s.routed.text for s in wanted.samples]
    assert voted.votes == wanted.votes
    assert sum(c for name, c in router.health()["counts"].items() if name.startswith("mode:")) == 1
    stopped = router.best_of(CHAT, N, read=lambda text: "same", **HOW)
    assert stopped.settled
    assert any(s.routed.usage.computed == 0 for s in stopped.samples)  # a batch that was never begun


def test_another_target_gives_the_samples(engine: TransformersEngine) -> None:
    big = TransformersEngine(build_model("llama", seed=5), build_tokenizer(), name="big")
    policy = Policy(kind="one-step", thresholds=(20.0, 60.0), targets=("fast", "slow", "big"))
    router = a_router(engine, policy, head=a_head(engine, "difficulty"), targets={"big": big})
    voted = router.best_of(CHAT, 3, mode="big", read=first_letter, **HOW)
    wanted = big.generate([CHAT] * 3, **HOW)
    assert [s.routed.text for s in voted.samples] == [g.text for g in wanted]
    assert voted.decision.mode == "big"
    assert (voted.finished, voted.stopped) == (3, 0)
    base = len(router.thinking.layout(engine, CHAT).base)
    assert voted.usage.computed == base + sum(g.usage.computed for g in wanted)


def test_hybrid_models_vote_too(hybrid_engine: TransformersEngine) -> None:
    voted = a_router(hybrid_engine).best_of(CHAT, 3, early=False, temperature=1.0, seed=1, max_tokens=6)
    plain = a_router(hybrid_engine).generate([CHAT] * 3, temperature=1.0, seed=1, max_tokens=6)
    assert [s.routed.text for s in voted.samples] == [r.text for r in plain]


def test_async_and_cancelling(engine: TransformersEngine) -> None:
    router = a_router(engine)
    plain = router.best_of(CHAT, 3, **HOW)
    found = asyncio.run(router.abest_of(CHAT, 3, **HOW))
    assert isinstance(found, Voted)
    assert found.votes == plain.votes
    cancel = CancelToken()
    cancel.cancel()
    none = router.best_of(CHAT, 3, cancel=cancel, **HOW)
    assert (none.winner, none.best, none.finished, none.settled) == (None, None, 0, False)
    assert none.usage.computed == 0
    assert none.agreement == 0.0


def test_to_dict_is_json(engine: TransformersEngine) -> None:
    import json

    found = json.loads(json.dumps(a_router(engine).best_of(CHAT, 2, **HOW).to_dict()))
    assert len(found["samples"]) == 2
    assert found["usage"]["computed"] > 0


def test_what_is_refused(engine: TransformersEngine) -> None:
    router = a_router(engine)
    with pytest.raises(InvalidInputError, match="temperature 0"):
        router.best_of(CHAT, 3, temperature=0.0)
    with pytest.raises(InvalidInputError, match="at least 1"):
        router.best_of(CHAT, 0)
    assert router.best_of(CHAT, 1, temperature=0.0, max_tokens=4).finished == 1
    assert len(router.best_of(CHAT, 2, max_tokens=4).samples) == 2  # with a temperature of its own
