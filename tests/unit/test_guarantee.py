"""Certificates: promises are kept as often as said, not by doing nothing, and what is tested is what was asked."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from kvroute import InvalidInputError
from kvroute.candidates import Candidate, one_step_candidate, one_step_grid, quantile_thresholds
from kvroute.guarantee import AtMostLoss, AtMostSlow, AtMostTokens, Certificate, certify, order_candidates
from kvroute.label_rows import Attempt, LabelRow
from kvroute.routing_curves import Modes, Outcome


class World:
    """Questions with a difficulty that says something, but not all, of whether the fast answer is right."""

    def __init__(self, n: int, seed: int, *, noise: float = 12.0) -> None:
        random = np.random.default_rng(seed)
        hard = random.random(n) < 0.4
        self.slow = (random.random(n) < 0.97).astype(float)
        self.fast = (random.random(n) < np.where(hard, 0.1, 0.975)).astype(float)
        self.difficulty = np.clip(np.where(hard, 75.0, 20.0) + noise * random.normal(size=n), 0, 100)
        self.slow_tokens = random.integers(30, 60, n).astype(float)
        self.fast_tokens = random.integers(4, 12, n).astype(float)

    def baseline(self, rows: slice | np.ndarray = slice(None)) -> Outcome:
        return Outcome(self.slow[rows], self.slow_tokens[rows])

    def candidate(self, tau: float, rows: slice | np.ndarray = slice(None)) -> Candidate:
        slow = self.difficulty > tau
        return Candidate(
            np.where(slow, self.slow, self.fast)[rows],
            np.where(slow, self.slow_tokens, self.fast_tokens)[rows],
            slow[rows].astype(float),
            {"kind": "one-step", "tau": tau},
        )


def paired(worse: int, better: int, n: int, name: str = "x") -> tuple[Candidate, Outcome]:
    """Rows of which ``worse`` are right by always-slow alone and ``better`` by the candidate alone."""
    slow, own = np.ones(n), np.ones(n)
    own[:worse] = 0
    slow[worse : worse + better] = 0
    order = np.random.default_rng(0).permutation(n)
    return Candidate(own[order], np.full(n, 10.0), np.zeros(n), name), Outcome(slow[order], np.full(n, 50.0))


def at_most(k: int, n: int, share: float) -> bool:
    return bool(binom.sf(k - 1, n, share) > 1e-3)


def test_promises_are_kept_and_tokens_saved() -> None:
    """Over many draws of calibration rows, the policy that is picked breaks its promise in at most delta of them."""
    world = World(60_000, 1)
    grid = quantile_thresholds(World(2000, 2).difficulty, 12)
    truth = {t: 100 * float((world.slow - world.candidate(t).right).mean()) for t in grid}
    assert min(truth.values()) < 1 < max(truth.values())
    broken = slow = 0
    saved = []
    for seed in range(60):
        rows = np.random.default_rng(seed).choice(60_000, 3000, replace=False)
        found = certify(
            [world.candidate(t, rows) for t in grid], world.baseline(rows), AtMostLoss(1), 0.1, limits=False
        )
        slow += found.chosen is None
        if found.chosen is not None:
            saved.append(found.candidates[found.chosen].saved)
            assert isinstance(found.policy, dict)
            broken += truth[found.policy["tau"]] > 1
    assert at_most(broken, 60, 0.1)
    assert slow <= 6
    assert np.mean(saved) > 0.3


def test_a_candidate_at_the_border_is_certified_in_at_most_delta() -> None:
    random = np.random.default_rng(4)
    certified = 0
    for _ in range(400):
        u = random.random(800)
        base = Outcome((u > 0.005).astype(float), np.full(800, 50.0))  # right alone on 0.015, wrong alone on 0.005
        own = Candidate((u < 0.985).astype(float), np.full(800, 9.0), np.zeros(800), "x")
        certified += certify([own], base, AtMostLoss(1), 0.1, limits=False).chosen == 0
    assert at_most(certified, 400, 0.1)
    assert certified > 0


def test_the_first_failure_ends_the_sequence_and_the_cheapest_certified_is_picked() -> None:
    n = 3000
    good, base = paired(3, 2, n, "good")
    bad, _ = paired(200, 2, n, "bad")
    bold = Candidate(base.right, np.full(n, 1.0), np.zeros(n), "bold")
    dear = Candidate(base.right, np.full(n, 20.0), np.zeros(n), "dear")
    found = certify([good, dear, bad, bold], base, AtMostLoss(1))
    assert [r.certified for r in found.candidates] == [True, True, False, False]
    assert found.candidates[3].p_value < 0.1  # it would have passed, had the one before it
    assert found.policy == "good"
    chosen = found.candidates[0]
    assert chosen.loss == pytest.approx(100 / n)
    assert chosen.harm == 3 / n
    assert chosen.harm < chosen.harm_upper < 0.005
    assert chosen.loss_upper is not None
    assert chosen.loss < chosen.loss_upper <= 1.0
    assert chosen.saved == pytest.approx(0.8)
    assert found.candidates[1].loss_upper is None
    assert "0.9" in str(found)


def test_too_few_rows_give_always_slow_and_say_how_many_would_do() -> None:
    few, base = paired(1, 0, 100)
    found = certify([few], base, AtMostLoss(2))
    assert found.policy == "slow"
    assert found.holds  # always slow loses nothing against itself
    assert found.rows_needed is not None
    assert found.rows_needed > 100
    assert str(found.rows_needed) in str(found)
    random = np.random.default_rng(0)
    passed = 0
    for _ in range(100):  # rows like these, as many as it says
        own = (random.random(found.rows_needed) > 0.01).astype(float)
        c = Candidate(own, own, own, "x")
        passed += certify([c], Outcome(np.ones_like(own), own + 40), AtMostLoss(2), limits=False).chosen == 0
    assert passed > 65


def test_a_candidate_that_looks_worse_than_promised_needs_no_number() -> None:
    worse, base = paired(50, 0, 1000)
    found = certify([worse], base, AtMostLoss(2))
    assert found.policy == "slow"
    assert found.rows_needed is None


def test_what_saves_nothing_is_not_picked() -> None:
    same, base = paired(0, 0, 2000)
    dear = Candidate(same.right, base.tokens + 1, same.slow, "dear")
    found = certify([dear], base, AtMostLoss(1))
    assert found.candidates[0].certified
    assert found.policy == "slow"


def test_several_promises_are_kept_together() -> None:
    world, validation = World(6000, 3), World(3000, 4)
    promises = [AtMostLoss(2.0), AtMostTokens(32, ceiling=64), AtMostSlow(0.6)]
    grid = quantile_thresholds(validation.difficulty, 10)
    order = order_candidates([validation.candidate(t) for t in grid], validation.baseline(), promises)
    found = certify([world.candidate(grid[i]) for i in order], world.baseline(), promises)
    assert found.chosen is not None
    chosen = found.candidates[found.chosen]
    assert set(chosen.p_values) == {"loss", "tokens", "slow"}
    assert chosen.p_value == max(chosen.p_values.values()) <= 0.1
    assert chosen.loss < 2
    assert chosen.tokens < 32
    assert chosen.slow < 0.6
    assert any(not r.certified for r in found.candidates)


def test_without_a_promised_loss_the_most_accurate_is_picked() -> None:
    world, validation = World(4000, 5), World(2000, 6)
    promises = [AtMostSlow(0.5)]
    grid = quantile_thresholds(validation.difficulty, 10)
    order = order_candidates([validation.candidate(t) for t in grid], validation.baseline(), promises)
    assert grid[order[0]] == 100.0  # never slow: the surest
    found = certify([world.candidate(grid[i]) for i in order], world.baseline(), promises)
    assert found.chosen is not None
    best = max(r.accuracy for r in found.candidates if r.certified)
    assert found.candidates[found.chosen].accuracy == best
    assert 0.3 < found.candidates[found.chosen].slow < 0.5


def test_always_slow_keeps_no_promise_on_tokens() -> None:
    c, base = paired(0, 0, 500)
    found = certify([Candidate(c.right, np.full(500, 40.0), c.slow, "x")], base, AtMostTokens(20, ceiling=60))
    assert found.policy == "slow"
    assert not found.holds
    assert str(found).startswith("Not promised")


def test_certificate_is_json_and_back() -> None:
    c, base = paired(3, 1, 4000)
    found = certify([c], base, [AtMostLoss(1), AtMostTokens(30, ceiling=60), AtMostSlow(0.2)])
    assert Certificate.model_validate_json(found.model_dump_json()) == found
    assert found.promises == (AtMostLoss(1), AtMostTokens(30, ceiling=60), AtMostSlow(0.2))


def labelled(i: int, fast: bool, slow: bool) -> LabelRow:
    def attempt(mode: str, correct: bool, tokens: int) -> Attempt:
        return Attempt(
            mode=mode,  # type: ignore[arg-type]
            text="",
            token_ids=tuple(range(tokens)),
            thought_tokens=0,
            answer="1",
            correct=correct,
            readable=True,
            finish_reason="stop",
        )

    return LabelRow(
        id=str(i),
        question="q",
        answer="1",
        answer_type="number",
        part="calibration",
        skeleton="s",
        fast=(attempt("fast", fast, 3),),
        slow=(attempt("slow", slow, 30),),
        label=0,
    )


def test_one_step_takes_the_fast_answer_up_to_the_threshold() -> None:
    rows = [labelled(0, True, False), labelled(1, False, True), labelled(2, False, True)]
    found = one_step_candidate([10, 50, 50.5], rows, 50.0, policy={"head": "h"})
    assert found.policy == {"kind": "one-step", "head": "h", "tau": 50.0, "give_up": None}
    assert found.right.tolist() == [1, 0, 1]
    assert found.tokens.tolist() == [3, 3, 30]
    assert found.slow.tolist() == [0, 0, 1]
    assert Modes.of(rows).slow.right.tolist() == [0, 1, 1]
    with pytest.raises(InvalidInputError):
        one_step_candidate([10.0], rows, 50.0)


def test_pairs_give_up_where_thinking_does_not_help() -> None:
    rows, difficulty = [], []
    for i in range(300):
        kind = i % 3  # easy, worth a thought, hopeless
        rows.append(labelled(i, kind == 0, kind < 2))
        difficulty.append([10.0, 50.0, 90.0][kind] + (i % 9))
    pairs = one_step_grid(difficulty, rows, 8)
    candidates = [one_step_candidate(difficulty, rows, *pair) for pair in pairs]
    losses = [float((Modes.of(rows).slow.right - c.right).mean()) for c in candidates]
    tokens = [float(c.tokens.mean()) for c in candidates]
    assert losses == sorted(losses)
    assert tokens == sorted(tokens, reverse=True)
    assert losses[0] == 0
    assert tokens[0] < 20  # an easy and a hopeless third at 3 tokens, a third at 30
    assert any(give_up is not None for _, give_up in pairs)
    assert len(pairs) <= 8


def test_grid_ascends_and_ends_with_always_fast() -> None:
    grid = quantile_thresholds(np.random.default_rng(0).uniform(0, 100, 500), 10)
    assert len(grid) == 10
    assert grid == sorted(set(grid))
    assert grid[-1] == 100.0
    assert quantile_thresholds([40.0] * 9, 5) == [40.0, 100.0]
    for bad in ([], [float("nan")]):
        with pytest.raises(InvalidInputError):
            quantile_thresholds(bad)


def test_what_cannot_be_tested_is_refused() -> None:
    c, base = paired(0, 0, 50)
    for candidates, promises, delta in [
        ([], AtMostLoss(1), 0.1),
        ([c], [], 0.1),
        ([c], [AtMostLoss(1), AtMostLoss(2)], 0.1),
        ([c], AtMostLoss(1), 1.0),
        ([Candidate(c.right[:-1], c.tokens, c.slow, "x")], AtMostLoss(1), 0.1),
        ([Candidate(c.right + 1, c.tokens, c.slow, "x")], AtMostLoss(1), 0.1),
        ([c], AtMostTokens(5, ceiling=8), 0.1),  # a row of 10 tokens
    ]:
        with pytest.raises(InvalidInputError):
            certify(candidates, base, promises, delta)  # type: ignore[arg-type]
    for promise in (lambda: AtMostTokens(80, ceiling=60), lambda: AtMostLoss(0), lambda: AtMostSlow(1)):
        with pytest.raises(InvalidInputError):
            promise()
