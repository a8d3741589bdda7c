"""Figures of scores: against scikit-learn and against references that follow the definitions row by row."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score, roc_curve

from kvroute.calibration_metrics import expected_calibration_error
from kvroute.errors import InvalidInputError
from kvroute.routing_intervals import Resamples
from kvroute.score_metrics import Drawn, RiskCoverage, map_figures, rank_figures


def drawn(n: int, seed: int, distinct: int | None) -> tuple[Any, Any]:
    """Values that tell something, with ties where only so many are distinct."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.6
    truth[:2] = True, False
    values = rng.normal(size=n) + truth
    if distinct is not None:
        values = np.round(values * distinct / 4)
    return values, truth


@pytest.mark.parametrize(("n", "distinct"), [(2, None), (40, None), (41, 3), (300, 8), (25, 0)])
def test_auroc_aupr_and_fpr95_are_those_of_scikit_learn(n: int, distinct: int | None) -> None:
    values, truth = drawn(n, 1, distinct)
    found = rank_figures(values, truth)
    assert found["auroc"][0] == pytest.approx(roc_auc_score(truth, values))
    assert found["aupr"][0] == pytest.approx(average_precision_score(truth, values))
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    assert found["fpr95"][0] == pytest.approx(fpr[tpr >= 0.95].min())


def risk_by_hand(truth: Any) -> float:
    """Mean over k of the errors among the first k."""
    return float(np.mean([np.mean(~truth[:k]) for k in range(1, len(truth) + 1)]))


def test_aurc_is_the_mean_risk_over_coverages() -> None:
    values, truth = drawn(60, 2, None)
    assert rank_figures(values, truth)["aurc"][0] == pytest.approx(risk_by_hand(truth[np.argsort(-values)]))


def test_aurc_of_equal_values_is_the_mean_over_their_orders() -> None:
    truth = np.array([True, False, False, True, False, True])
    values = np.array([2.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    orders = [risk_by_hand(truth[[0, *middle, 5]]) for middle in itertools.permutations([1, 2, 3, 4])]
    assert rank_figures(values, truth)["aurc"][0] == pytest.approx(np.mean(orders))
    constant = rank_figures(np.zeros(6), truth)
    assert constant["aurc"][0] == pytest.approx(0.5)  # the share of wrong answers
    assert constant["auroc"][0] == pytest.approx(0.5)
    assert constant["fpr95"][0] == 1.0


@pytest.mark.parametrize("distinct", [None, 4])
def test_weights_are_rows_that_stand_there_several_times(distinct: int | None) -> None:
    values, truth = drawn(30, 3, distinct)
    probability = 1 / (1 + np.exp(-values))
    rng = np.random.default_rng(4)
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=5).astype(float)
    ranks, maps = rank_figures(values, truth, weights), map_figures(probability, truth, weights)
    for b, times in enumerate(weights.astype(int)):
        at = np.repeat(np.arange(30), times)
        for name, value in (rank_figures(values[at], truth[at]) | map_figures(probability[at], truth[at])).items():
            assert (ranks | maps)[name][b] == pytest.approx(value[0]), name


def test_brier_and_ece() -> None:
    values, truth = drawn(200, 5, None)
    probability = 1 / (1 + np.exp(-values))
    found = map_figures(probability, truth)
    assert found["brier"][0] == pytest.approx(brier_score_loss(truth, probability))
    assert found["ece"][0] == pytest.approx(expected_calibration_error(probability, truth))
    with pytest.raises(InvalidInputError, match=r"\[0, 1\]"):
        map_figures(values * 5, truth)


def test_resamples_of_one_kind_have_no_figures() -> None:
    truth = np.array([True, True, False])
    weights = np.array([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    found = rank_figures(np.array([1.0, 2.0, 0.0]), truth, weights)
    for name in ("auroc", "aupr", "fpr95", "aurc"):
        assert np.isnan(found[name]).tolist() == [True, True, False], name


def test_a_curve_ends_with_all_answers() -> None:
    values, truth = drawn(50, 6, 3)
    curve = RiskCoverage.of(values, truth)
    assert curve.coverage[-1] == 1
    assert curve.risk[-1] == pytest.approx(np.mean(~truth))
    assert len(curve.coverage) == len(set(values))
    top = values == values.max()
    assert curve.risk[0] == pytest.approx(np.mean(~truth[top]))


def test_intervals_and_paired_differences() -> None:
    values, truth = drawn(400, 7, None)
    worse = values + np.random.default_rng(8).normal(size=400)
    resamples = Resamples(400, 500, seed=0)
    a, b = (Drawn.of(v, None, truth, resamples) for v in (values, worse))
    for e in a.estimates().values():
        assert e.value is not None
        assert e.low is not None
        assert e.high is not None
        assert e.low < e.value < e.high
    paired = a.minus(b, "auroc")
    assert paired.value == pytest.approx(a.value["auroc"] - b.value["auroc"])
    assert paired.low is not None
    assert paired.high is not None
    apart = a.estimates()["auroc"]
    assert apart.high is not None
    assert apart.low is not None
    assert paired.high - paired.low < apart.high - apart.low  # the same answers are drawn for both
    assert a.minus(a, "auroc").to_dict() == {"value": 0.0, "low": 0.0, "high": 0.0}
    mean = Drawn.mean({"one": a, "two": b})
    assert mean.value["auroc"] == pytest.approx((a.value["auroc"] + b.value["auroc"]) / 2)
    assert set(mean.value) == {"auroc", "aupr", "fpr95", "aurc"}  # there is no probability to judge
