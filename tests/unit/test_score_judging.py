"""Judging of scores: the same answers for all, maps that never saw them, tests that find nothing in nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from kvroute.confidence_maps import auroc
from kvroute.errors import InvalidInputError
from kvroute.routing_metrics import auroc_difference, delong
from kvroute.score_judging import BASELINES, LEAST, compare, judge_set
from kvroute.score_report import ScoreReport, shown
from kvroute.scores import SCORES


def made(n: int, seed: int = 0, strength: float = 1.0) -> tuple[dict[str, Any], Any]:
    """A table of every score; those of the logits tell right from wrong, by their own directions."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    table = {name: rng.normal(size=n) for name in SCORES}
    signal = strength * (truth - 0.5)
    table["mean_logprob"] = table["mean_logprob"] + signal
    table["entropy"] = table["entropy"] - signal  # lower means right
    return table, truth


def test_values_are_turned_and_judged() -> None:
    table, truth = made(300)
    s = judge_set("a", table, truth, resamples=100)
    assert s.values["entropy"].tolist() == (-table["entropy"]).tolist()
    assert s.drawn["entropy"].value["auroc"] == pytest.approx(auroc(-table["entropy"], truth))
    assert s.drawn["mean_logprob"].value["auroc"] > 0.6
    assert set(s.drawn) == {*SCORES, "logits combined", "kv-coe combined", "all combined"}
    assert s.drawn["logits combined"].value["auroc"] > s.drawn["mean_logprob"].value["auroc"]
    assert s.fitted_on == 0
    assert len(s) == 300


def test_no_map_has_seen_what_it_judges() -> None:
    table, truth = made(200, strength=0)
    s = judge_set("noise", table, truth, resamples=100)
    # Fitted and judged on the same rows, eleven scores of noise would look good.
    assert s.drawn["all combined"].value["auroc"] < 0.6
    judged = np.arange(200) >= 100
    open_ = judge_set("open", table, truth, judged=judged, resamples=100)
    assert open_.fitted_on == 100
    assert len(open_) == 100
    turned = truth.copy()
    turned[judged] = ~turned[judged]
    other = judge_set("open", table, turned, judged=judged, resamples=100)
    for name, p in open_.probability.items():
        assert other.probability[name].tolist() == p.tolist(), name


def test_answers_to_one_question_share_a_fold() -> None:
    rng = np.random.default_rng(1)
    groups = [str(i // 4) for i in range(200)]
    truth = np.repeat(rng.random(50) < 0.5, 4)
    # Each question has a value of its own, which says nothing about other questions.
    table = {"length": np.repeat(rng.normal(size=50), 4), "mean_logprob": np.repeat(rng.normal(size=50), 4)}
    s = judge_set("g", table, truth, groups=groups, resamples=100)
    assert s.drawn["length"].value["auroc"] < 0.7


def test_a_confidence_is_taken_as_it_is_and_joined_without_its_open_answers() -> None:
    table, truth = made(300)
    table["confidence"] = np.where(truth, 0.7, 0.4) + np.random.default_rng(2).uniform(-0.3, 0.3, 300)
    judged = np.arange(300) >= 150
    table["confidence"][~judged] = truth[~judged]  # it has learned the open answers by heart
    s = judge_set("c", table, truth, judged=judged, resamples=100)
    assert s.probability["confidence"].tolist() == table["confidence"][judged].tolist()
    assert s.drawn["confidence and logits"].value["auroc"] > 0.75
    assert s.drawn["confidence and logits"].value["brier"] < 0.2  # not as sure as on what it knows by heart


def test_all_scores_are_judged_on_the_same_answers() -> None:
    table, truth = made(200)
    table["p_true"][:10] = np.nan
    table["kv_coe_r_token"][5:15] = np.nan
    table["hidden_coe_r"][:150] = np.nan
    s = judge_set("m", table, truth, resamples=100)
    assert s.left_out == 15
    assert len(s) == 185
    assert s.missing == {"hidden_coe_r": 0.75}
    assert "hidden_coe_r" not in s.drawn
    assert {len(v) for v in s.values.values()} == {185}


def test_too_few_answers_are_refused() -> None:
    table, truth = made(60)
    truth[:] = True
    truth[: LEAST - 1] = False
    with pytest.raises(InvalidInputError, match=f"51 right and {LEAST - 1} wrong"):
        judge_set("few", table, truth)
    with pytest.raises(InvalidInputError, match="have no scores"):
        judge_set("none", {"length": np.full(60, np.nan)}, truth)


def test_delong_is_that_of_its_interval_and_of_the_definition() -> None:
    table, truth = made(150)
    a, b = table["mean_logprob"], -table["entropy"]
    value, variance = delong(a, b, truth)
    estimate = auroc_difference(a, b, truth)
    assert estimate.high == pytest.approx(value + norm.ppf(0.975) * math.sqrt(variance))
    # DeLong's structural components, pair by pair.
    parts = []
    for x in (a, b):
        wins = (x[truth][:, None] > x[~truth][None]) + 0.5 * (x[truth][:, None] == x[~truth][None])
        parts.append((wins.mean(axis=1), wins.mean(axis=0)))
    over = [np.cov(parts[0][side], parts[1][side]) / len(parts[0][side]) for side in (0, 1)]
    expected = sum(c[0, 0] + c[1, 1] - 2 * c[0, 1] for c in over)
    assert variance == pytest.approx(expected)


def test_comparisons_are_paired_and_level_where_nothing_differs() -> None:
    sets = [judge_set(f"s{i}", *made(150, seed=i), resamples=200, seed=i) for i in range(3)]
    c = compare("mean_logprob", "length", sets)
    assert c.auroc.low is not None
    assert c.auroc.low > 0
    assert c.p is not None
    assert c.p < 0.001
    assert c.auroc.value == pytest.approx(np.mean([e.value for e in c.by_set.values()]))
    same = compare("length", "length", sets)
    assert (same.auroc.value, same.p) == (0.0, 1.0)
    # Two scores of noise: p is uniform, so about one in ten lies below a tenth.
    ps = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        table = {n: rng.normal(size=80) for n in ("length", "p_true")}
        ps.append(compare("length", "p_true", [judge_set("n", table, rng.random(80) < 0.5, resamples=2)]).p)
    assert 0.02 <= np.mean([p is not None and p < 0.1 for p in ps]) <= 0.2


def test_a_report_orders_and_says_what_it_found() -> None:
    sets = [judge_set(f"s{i}", *made(150, seed=i), resamples=200, seed=i) for i in range(2)]
    report = ScoreReport(sets, about={"model": "none"})
    means = [report.mean(n).value["auroc"] for n in report.names]
    assert means == sorted(means, reverse=True)
    assert set(report.baselines) == set(report.names) & set(BASELINES)
    found = report.to_dict()
    assert found["sets"]["s0"]["answers"] == 150
    assert len(found["compared"]) == len(report.baselines) * len(report.others)
    assert found["mean"]["entropy"]["auroc"]["low"] < found["mean"]["entropy"]["auroc"]["value"]
    assert report.names[0] in report.summary
    for heads, rows in (report.mean_rows(), report.set_rows(), report.compared_rows(), report.answers_rows()):
        assert all(len(row) == len(heads) for row in rows)
    assert next(t.title for t in report.tables()) == "Answers"
    with pytest.raises(InvalidInputError, match="different names"):
        ScoreReport([sets[0], sets[0]])


def test_figures_as_they_are_printed() -> None:
    from kvroute.routing_intervals import Estimate

    assert shown(Estimate(0.5, 0.25, 1.0)) == ".500 [.250, 1.000]"
    assert shown(Estimate(-0.05, -0.1, 0.02), sign=True) == "-.050 [-.100, +.020]"
    assert shown(Estimate(0.123, None, None), 2) == ".12"
    assert shown(Estimate(None, None, None)) == "-"
