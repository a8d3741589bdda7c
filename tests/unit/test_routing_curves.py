"""Curves, references and intervals, against plain loops over the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute.errors import InvalidInputError
from kvroute.label_rows import Attempt, LabelRow
from kvroute.routing_curves import Modes, Outcome, Sweep, choose_threshold, hull_thresholds, threshold_grid, upper_hull
from kvroute.routing_intervals import (
    Resamples,
    at_equal_accuracy,
    compare_at_equal_accuracy,
    compare_gaps,
    difference,
    gap_recovered,
    point_figures,
    tokens_at,
)


def attempt(mode: str, correct: bool, tokens: int) -> Attempt:
    return Attempt(
        mode=mode, text="", token_ids=(1,) * tokens, thought_tokens=0, answer=None, correct=correct, readable=True,
        finish_reason="stop",
    )  # fmt: skip


def label_row(index: int, fast: list[tuple[bool, int]], slow: list[tuple[bool, int]], **more: object) -> LabelRow:
    given = {"id": str(index), "question": "q", "answer": "a", "answer_type": "number", "part": "test", "skeleton": "s"}
    return LabelRow.model_validate(
        {
            **given,
            "fast": tuple(attempt("fast", *a) for a in fast),
            "slow": tuple(attempt("slow", *a) for a in slow),
            "label": 0.0,
            **more,
        }
    )


def random_modes(n: int, seed: int, *, soft: bool = False) -> Modes:
    rng = np.random.default_rng(seed)
    draw = (lambda p: rng.binomial(4, p, n) / 4) if soft else (lambda p: (rng.random(n) < p).astype(float))
    return Modes(
        Outcome(draw(0.5), rng.integers(2, 10, n).astype(float)), Outcome(draw(0.8), rng.integers(5, 60, n) * 1.0)
    )


def test_rows_become_means_over_their_samples() -> None:
    rows = [label_row(0, [(True, 2), (False, 4)], [(True, 10)]), label_row(1, [(False, 5)], [(True, 7), (True, 9)])]
    modes = Modes.of(rows)
    assert modes.fast.right.tolist() == [0.5, 0.0]
    assert modes.fast.tokens.tolist() == [3.0, 5.0]
    assert modes.slow.right.tolist() == [1.0, 1.0]
    assert modes.slow.tokens.tolist() == [10.0, 8.0]
    with pytest.raises(InvalidInputError, match="Row 7"):
        Modes.of([label_row(7, [], [(True, 1)])])
    with pytest.raises(InvalidInputError, match="no labelled row"):
        Modes.of([])


def test_oracle_takes_the_cheapest_mode_that_is_right_else_fast() -> None:
    cases = list(itertools.product([0.0, 1.0], [0.0, 1.0], [3.0, 8.0], [4.0, 8.0]))
    fast_right, slow_right, fast_tokens, slow_tokens = (np.array(c) for c in zip(*cases, strict=True))
    oracle = Modes(Outcome(fast_right, fast_tokens), Outcome(slow_right, slow_tokens)).oracle()
    for i, (f, s, ft, stk) in enumerate(cases):
        right = [tokens for is_right, tokens in ((f, ft), (s, stk)) if is_right]
        assert oracle.tokens[i] == (min(right) if right else ft)
        assert oracle.right[i] == float(bool(right))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 25), seed=st.integers(0, 10_000), levels=st.integers(1, 30))
def test_sweep_is_the_policy_at_each_threshold(n: int, seed: int, levels: int) -> None:
    modes = random_modes(n, seed)
    difficulty = np.random.default_rng(seed + 1).integers(0, levels, n).astype(float)
    sweep = modes.sweep(difficulty)
    assert sweep.slow is not None
    assert sweep.slow[0] == 0
    assert sweep.slow[-1] == 1
    assert len(sweep.settings) == len(set(difficulty)) + 1  # every threshold that makes a difference
    for k, tau in enumerate(sweep.settings):
        right = [modes.slow.right[i] if difficulty[i] > tau else modes.fast.right[i] for i in range(n)]
        tokens = [modes.slow.tokens[i] if difficulty[i] > tau else modes.fast.tokens[i] for i in range(n)]
        assert sweep.accuracy[k] == pytest.approx(np.mean(right))
        assert sweep.mean_tokens[k] == pytest.approx(np.mean(tokens))
        assert modes.one_step(difficulty, tau).right.tolist() == right


def test_random_share_is_the_exact_expectation() -> None:
    modes = random_modes(6, 3)
    share = 0.3
    expected = 0.0
    for choice in itertools.product([0, 1], repeat=6):
        chance = np.prod([share if c else 1 - share for c in choice])
        expected += chance * modes.chosen(np.array(choice, dtype=float)).accuracy
    assert modes.random(np.array([share])).accuracy[0] == pytest.approx(expected)
    line = modes.random()
    assert line.accuracy[0] == modes.always("fast").accuracy
    assert line.mean_tokens[-1] == modes.always("slow").mean_tokens


def test_grid_is_thinned_at_even_shares() -> None:
    grid = threshold_grid(np.random.default_rng(0).random(5000) * 100)
    assert len(grid) == 101
    assert (np.diff(grid) < 0).all()
    shares = random_modes(5000, 0).sweep(np.random.default_rng(0).random(5000) * 100).slow
    assert shares is not None
    assert np.abs(np.diff(shares)).max() < 0.0103


def test_difficulties_must_be_finite_and_one_a_row() -> None:
    modes = random_modes(4, 0)
    for wrong in (np.zeros(3), np.array([0, 1, np.nan, 2.0]), np.zeros((4, 1))):
        with pytest.raises(InvalidInputError, match="one finite number"):
            modes.sweep(wrong)


# ---------------------------------------------------------------------- hulls and thresholds


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=12))
def test_upper_hull_lies_above_every_point(points: list[tuple[int, int]]) -> None:
    x, y = (np.array(c, dtype=float) for c in zip(*points, strict=True))
    kept = upper_hull(x, y)
    assert (np.diff(x[kept]) > 0).all()
    assert (y <= np.interp(x, x[kept], y[kept]) + 1e-9).all()
    slopes = np.diff(y[kept]) / np.diff(x[kept])
    assert (np.diff(slopes) < 0).all()  # no vertex could be left out


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 20), seed=st.integers(0, 10_000))
def test_hull_thresholds_reach_the_hull_of_the_whole_curve(n: int, seed: int) -> None:
    modes = random_modes(n, seed)
    difficulty = np.random.default_rng(seed).integers(0, 8, n).astype(float)
    whole = modes.sweep(difficulty)
    few = modes.sweep(difficulty, hull_thresholds(modes, difficulty))
    assert len(few.settings) <= len(whole.settings)
    for target in np.linspace(whole.accuracy.min(), whole.accuracy.max(), 7):
        found = [tokens_at(np.array([target]), s.accuracy[None], s.mean_tokens[None])[0] for s in (few, whole)]
        assert found[0] == pytest.approx(found[1])
    assert len(hull_thresholds(modes, difficulty, most=2)) <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 50)), min_size=1, max_size=8),
    st.integers(0, 11),
)
def test_tokens_at_is_the_cheapest_mixture(points: list[tuple[int, int]], target: int) -> None:
    y, t = (np.array(c, dtype=float) for c in zip(*points, strict=True))
    best = np.inf
    for i, j in itertools.product(range(len(y)), repeat=2):
        for part in (0.0, 1.0, *([(target - y[i]) / (y[j] - y[i])] if y[i] != y[j] else [])):
            if 0 <= part <= 1 and y[i] + part * (y[j] - y[i]) >= target - 1e-12:
                best = min(best, t[i] + part * (t[j] - t[i]))
    found = tokens_at(np.array([float(target)]), y[None], t[None])[0]
    assert found == pytest.approx(best) if np.isfinite(best) else np.isnan(found)


def test_chosen_threshold_is_the_cheapest_that_loses_no_more() -> None:
    modes = random_modes(300, 5)
    difficulty = np.random.default_rng(6).random(300) + 2 * (modes.slow.right - modes.fast.right)
    for points in (0.0, 1.0, 10.0, 100.0):
        tau = choose_threshold(modes, difficulty, points)
        allowed = modes.slow.accuracy - points / 100 - 1e-9
        costs = [
            modes.one_step(difficulty, s).mean_tokens
            for s in threshold_grid(difficulty)
            if modes.one_step(difficulty, s).accuracy >= allowed
        ]
        assert modes.one_step(difficulty, tau).mean_tokens == pytest.approx(min(costs))
        assert modes.one_step(difficulty, tau).accuracy >= allowed


# ---------------------------------------------------------------------- intervals


def drawn_rows(n: int, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n, (count, n))


def test_resampled_figures_equal_a_loop_over_the_same_rows() -> None:
    n, count, seed = 60, 200, 4
    modes = random_modes(n, 1, soft=True)
    difficulty = np.random.default_rng(2).random(n) * 100
    sweep, other = modes.sweep(difficulty), modes.sweep(100 - difficulty)
    resamples = Resamples(n, count, seed=seed)
    oracle = modes.oracle()
    loops: dict[str, list[float]] = {key: [] for key in ("accuracy", "gain", "of_oracle", "equal", "ratio", "gap")}
    for rows in drawn_rows(n, count, seed):
        slow, fast = modes.slow.right[rows].mean(), modes.fast.right[rows].mean()
        slow_tokens, fast_tokens = modes.slow.tokens[rows].mean(), modes.fast.tokens[rows].mean()
        y, t = sweep.right[:, rows].mean(axis=1), sweep.tokens[:, rows].mean(axis=1)
        need = tokens_at(np.array([slow - 0.05]), y[None], t[None])[0]
        y2, t2 = other.right[:, rows].mean(axis=1), other.tokens[:, rows].mean(axis=1)
        loops["accuracy"].append(oracle.right[rows].mean())
        loops["gain"].append(oracle.right[rows].mean() - slow)
        loops["of_oracle"].append(slow_tokens / oracle.tokens[rows].mean())
        loops["equal"].append(need)
        loops["ratio"].append(need / tokens_at(np.array([slow - 0.05]), y2[None], t2[None])[0])
        scaled, spent = (y - fast) / (slow - fast), (t - fast_tokens) / (slow_tokens - fast_tokens)
        area = sum((scaled[i] + scaled[i + 1]) / 2 * (spent[i + 1] - spent[i]) for i in range(len(y) - 1))
        loops["gap"].append(area if slow > fast and slow_tokens > fast_tokens else np.nan)
    figures = point_figures(oracle, modes, resamples)
    found = {
        "accuracy": figures.accuracy,
        "gain": figures.accuracy_gain,
        "of_oracle": point_figures(modes.slow, modes, resamples).of_oracle,
        "equal": at_equal_accuracy(sweep, modes, resamples, 5.0).tokens,
        "ratio": compare_at_equal_accuracy(sweep, other, modes, resamples, 5.0)[1],
        "gap": gap_recovered(sweep, modes, resamples),
    }
    for key, estimate in found.items():
        assert estimate.low == pytest.approx(np.nanquantile(loops[key], 0.025)), key
        assert estimate.high == pytest.approx(np.nanquantile(loops[key], 0.975)), key


def test_intervals_are_paired_and_seeded() -> None:
    modes = random_modes(400, 0)
    same = difference(modes.slow, modes.slow, Resamples(400, 300))
    assert [(e.value, e.low, e.high) for e in same] == [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0)]
    first, again, other = (point_figures(modes.fast, modes, Resamples(400, 300, seed=s)) for s in (1, 1, 2))
    assert first == again
    assert first.accuracy_gain != other.accuracy_gain


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    kept = 0
    for trial in range(300):
        right = (rng.random(200) < 0.7).astype(float)
        estimate = Resamples(200, 200, seed=trial).estimate(lambda mean, right=right: mean(right))
        assert estimate.low is not None
        assert estimate.high is not None
        kept += estimate.low <= 0.7 <= estimate.high
    assert 0.90 <= kept / 300 <= 0.98


def test_random_recovers_half_the_gap_and_a_perfect_difficulty_more() -> None:
    modes = random_modes(2000, 7)
    resamples = Resamples(2000, 200)
    line = gap_recovered(modes.random(), modes, resamples)
    assert line.value == pytest.approx(0.5)
    assert line.low == pytest.approx(0.5)
    informed = modes.sweep(modes.slow.right - modes.fast.right)
    better = compare_gaps(informed, modes.random(), modes, resamples)
    assert better.low is not None
    assert better.low > 0.2
    tokens, ratio = compare_at_equal_accuracy(informed, modes.random(), modes, resamples)
    assert tokens.high is not None
    assert tokens.high < 0
    assert ratio.high is not None
    assert ratio.high < 1


def test_random_needs_nearly_all_tokens_for_nearly_all_accuracy() -> None:
    modes = random_modes(3000, 8)
    gap = 100 * (modes.slow.accuracy - modes.fast.accuracy)
    found = at_equal_accuracy(modes.random(), modes, Resamples(3000, 50), points=gap / 4).tokens
    expected = modes.fast.mean_tokens + 0.75 * (modes.slow.mean_tokens - modes.fast.mean_tokens)
    assert found.value == pytest.approx(expected)


def test_equal_accuracy_is_that_of_always_slow_whatever_the_sweep_ends_in() -> None:
    modes = random_modes(500, 11)
    for outcome in (modes.oracle(), modes.chosen(np.full(500, 0.2))):
        found = at_equal_accuracy(Sweep.of([outcome]), modes, Resamples(500, 50), points=1.0).tokens.value
        y, t = (
            np.array([[getattr(o, key) for o in (modes.fast, outcome, modes.slow)]])
            for key in ("accuracy", "mean_tokens")
        )
        assert found == pytest.approx(tokens_at(np.array([modes.slow.accuracy - 0.01]), y, t)[0])


def test_without_a_gap_there_is_no_figure_and_no_nan() -> None:
    modes = random_modes(50, 9)
    flat = Modes(modes.fast, modes.fast)
    resamples = Resamples(50, 50)
    assert gap_recovered(flat.random(), flat, resamples).to_dict() == {"value": None, "low": None, "high": None}
    assert str(gap_recovered(flat.random(), flat, resamples)) == "-"
    assert at_equal_accuracy(flat.random(), flat, resamples).of_slow.value is not None


def test_outcomes_that_were_run_make_a_sweep() -> None:
    modes = random_modes(30, 2)
    sweep = Sweep.of([modes.fast, modes.oracle(), modes.slow], [70, 30, 10])
    assert sweep.settings.tolist() == [70, 30, 10]
    assert sweep.accuracy[1] == modes.oracle().accuracy
    with pytest.raises(InvalidInputError):
        Sweep.of([])


def test_resamples_refuse_other_rows() -> None:
    with pytest.raises(InvalidInputError, match="of 5 rows"):
        Resamples(5, 10).means(np.zeros(6))
    with pytest.raises(InvalidInputError):
        Resamples(0)
