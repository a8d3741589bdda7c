"""AUROC with DeLong's interval, reliability and calibration error, against plain loops and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kvroute.errors import InvalidInputError
from kvroute.routing_curves import Modes
from kvroute.routing_intervals import Resamples
from kvroute.routing_metrics import (
    auroc_difference,
    auroc_interval,
    calibration_error,
    difficulty_figures,
    fast_probability,
    reliability,
    wilson,
)
from label_data import label_rows


@settings(max_examples=50, deadline=None)
@given(n=st.integers(4, 30), levels=st.integers(1, 12), seed=st.integers(0, 9999))
def test_auroc_and_its_variance_are_delongs(n: int, levels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2 == 0
    values = rng.integers(0, levels, n).astype(float)
    wins = np.array(
        [[1.0 if p > q else 0.5 if p == q else 0.0 for q in values[~truth]] for p in values[truth]]
    )  # [positives, negatives]
    found = auroc_interval(values, truth)
    assert found.value == pytest.approx(wins.mean())
    variance = wins.mean(axis=1).var(ddof=1) / truth.sum() + wins.mean(axis=0).var(ddof=1) / (~truth).sum()
    if 0 < wins.mean() < 1 and variance > 1e-12:
        area = wins.mean()
        half = 1.959963984540054 * np.sqrt(variance) / (area * (1 - area))
        assert found.low == pytest.approx(1 / (1 + np.exp(-(np.log(area / (1 - area)) - half))))
        assert found.high == pytest.approx(1 / (1 + np.exp(-(np.log(area / (1 - area)) + half))))
    else:
        assert found.low is None


def test_auroc_interval_covers() -> None:
    # Values of positives are N(1, 1), of negatives N(0, 1): the true area is Phi(1 / sqrt(2)) = 0.7602.
    rng = np.random.default_rng(0)
    truth = np.arange(150) < 60
    kept = 0
    for _ in range(400):
        found = auroc_interval(rng.normal(size=150) + truth, truth)
        assert found.low is not None
        assert found.high is not None
        kept += found.low <= 0.7602 <= found.high
    assert 0.92 <= kept / 400 <= 0.98


def test_difference_is_paired() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(300) < 0.4
    a = rng.normal(size=300) + truth
    b = a + 0.2 * rng.normal(size=300)
    paired = auroc_difference(a, b, truth)
    assert paired.value == pytest.approx(roc_auc_score(truth, a) - roc_auc_score(truth, b))
    apart = auroc_difference(a, _shuffled_within(b, truth, rng), truth)
    assert paired.low is not None
    assert paired.high is not None
    assert apart.low is not None
    assert apart.high is not None
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)
    same = auroc_difference(a, a, truth)
    assert (same.value, same.low, same.high) == (0.0, pytest.approx(0.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))


def _shuffled_within(values: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same values and area, no longer tied to the rows."""
    out = values.copy()
    for kind in (truth, ~truth):
        out[kind] = rng.permutation(values[kind])
    return out


def test_rows_of_one_kind_have_no_auroc() -> None:
    assert auroc_interval(np.arange(4.0), np.ones(4, dtype=bool)).value is None
    assert auroc_difference(np.arange(4.0), np.arange(4.0), np.zeros(4, dtype=bool)).value is None
    one = auroc_interval(np.array([1.0, 3.0, 2.0]), np.array([False, True, False]))
    assert (one.value, one.low) == (1.0, None)
    assert auroc_difference(np.arange(3.0), -np.arange(3.0), np.array([False, True, False])).low is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40))
def test_calibration_error_is_that_of_the_bins(pairs: list[tuple[float, float]]) -> None:
    p, right = (np.array(c) for c in zip(*pairs, strict=True))
    expected = 0.0
    for low, high in itertools.pairwise(np.arange(11)):
        inside = [(a, r) for a, r in pairs if low <= a * 10 < high or (high == 10 and a == 1)]
        if inside:
            a, r = (np.array(c) for c in zip(*inside, strict=True))
            expected += len(inside) / len(pairs) * abs(a.mean() - r.mean())
    assert calibration_error(p, right) == pytest.approx(expected)
    bins = reliability(p, right)
    assert sum(b.rows for b in bins) == len(p)
    assert sum(b.rows * abs(b.probability - b.right) for b in bins) / len(p) == pytest.approx(expected)
    assert all(b.right_low <= b.right + 1e-12 and b.right <= b.right_high + 1e-12 for b in bins)


def test_wilson_by_its_table() -> None:
    # 8 of 10: 0.490 to 0.943 by Wilson's formula without continuity correction.
    assert wilson(0.8, 10) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))
    for rows in range(1, 300):  # with 240 rows, the lower end of none right was once 1e-17
        for right in {0, 1, rows // 2, rows}:
            low, high = wilson(right / rows, rows)
            assert 0.0 <= low <= right / rows <= high <= 1.0
        assert wilson(0.0, rows)[0] == 0.0
        assert wilson(1.0, rows)[1] == 1.0


def test_probabilities_outside_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="Probabilities"):
        calibration_error(np.array([1.2]), np.array([1.0]))


def test_figures_of_rows() -> None:
    rows = label_rows(200, seed=3)
    labels = np.array([r.label for r in rows], dtype=float)
    fast = Modes.of(rows).fast.right
    figures = difficulty_figures(rows, labels, 1 - labels / 100, Resamples(200, 100))
    assert figures.auroc_fast_right.value == 1.0
    assert figures.mae.value == 0.0
    only_slow = labels == 75
    assert figures.auroc_only_slow_right.value == pytest.approx(roc_auc_score(only_slow, labels))
    assert figures.calibration_error == pytest.approx(calibration_error(1 - labels / 100, fast))
    assert figures.brier is not None
    assert figures.brier.value == pytest.approx(np.mean((1 - labels / 100 - fast) ** 2))
    bare = difficulty_figures(rows, labels, None, Resamples(200, 100))
    assert bare.calibration_error is None
    assert bare.reliability == ()
    with pytest.raises(InvalidInputError, match="without a label"):
        difficulty_figures([rows[0].model_copy(update={"label": None})], labels[:1], None, Resamples(1, 100))


def test_probability_is_fitted_on_other_rows_and_falls_with_difficulty() -> None:
    rng = np.random.default_rng(0)
    d = rng.random(400) * 100
    right = (rng.random(400) > d / 100).astype(float)
    said = fast_probability(np.array([0.0, 20.0, 50.0, 80.0, 100.0]), right, fitted_on=d)
    assert said is not None
    assert (np.diff(said) <= 0).all()
    assert said[2] == pytest.approx(0.5, abs=0.15)
    assert fast_probability(d, right[:5], fitted_on=d[:5]) is None
    assert fast_probability(d, np.ones(400), fitted_on=d) is None
