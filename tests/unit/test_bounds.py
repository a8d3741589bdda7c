"""Bounds on means: valid on every law tried, sharp on rare differences, and equal to a plain computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from kvroute import InvalidInputError
from kvroute.bounds import (
    betting_p_value,
    betting_upper,
    binomial_lower,
    binomial_p_value,
    binomial_upper,
    hoeffding_bentkus_p_value,
    rows_needed,
)


def differences(runs: int, n: int, worse: float, better: float, seed: int = 0) -> np.ndarray:
    """``[runs, n]`` of 1 (only the baseline is right), -1 (only the candidate is), 0."""
    u = np.random.default_rng(seed).random((runs, n))
    return (u < worse).astype(np.float64) - (u > 1 - better)


def at_most(k: int, n: int, share: float) -> bool:
    """Whether ``k`` of ``n`` is no evidence (1 in 1,000) against a probability of at most ``share``."""
    return bool(binom.sf(k - 1, n, share) > 1e-3)


def by_hand(x: list[float], a: float, low: float, high: float, level: float) -> float:
    """The betting p-value as its definition reads, one row after the other."""
    wealth, best, squares = 1.0, 1.0, ((high - low) / 2) ** 2
    for t, value in enumerate(x):
        variance = squares / (t + 1)
        missing = max(math.log(1 / (level * wealth)), 0.3)
        stake = min(math.sqrt(2 * missing / (variance * (len(x) - t))), 0.9 / (high - a))
        wealth *= 1 + stake * (a - value)
        best = max(best, wealth)
        squares += (a - value) ** 2
    return 1 / best


@pytest.mark.parametrize(("low", "high", "a"), [(-1.0, 1.0, 0.01), (0.0, 1.0, 0.3), (0.0, 60.0, 20.0)])
def test_betting_equals_its_definition(low: float, high: float, a: float) -> None:
    random = np.random.default_rng(3)
    x = low + (high - low) * random.beta(0.4, 1.6, size=(5, 60))
    found = betting_p_value(x, a, low=low, high=high, level=0.05)
    assert found == pytest.approx([by_hand(row.tolist(), a, low, high, 0.05) for row in x])


@pytest.mark.parametrize("level", [0.1, 0.01])
@pytest.mark.parametrize("probabilities", [(0.3, 0.3, 0.4), (0.0, 0.7, 0.3), (0.05, 0.75, 0.2), (0.44, 0.0, 0.56)])
def test_betting_is_valid_over_every_outcome_of_few_rows(probabilities: tuple[float, ...], level: float) -> None:
    outcomes = np.array(list(itertools.product([-1.0, 0.0, 1.0], repeat=9)))
    a = float(np.dot(probabilities, [-1, 0, 1])) - 1e-12  # the mean itself: the hardest law of the null
    chance = np.prod(np.array(probabilities)[(outcomes + 1).astype(int)], axis=1)
    p = betting_p_value(outcomes, a, level=level)
    for alpha in np.unique(np.round(p, 12)):
        assert chance[p <= alpha + 1e-12].sum() <= alpha + 1e-9


@pytest.mark.parametrize(("worse", "better"), [(0.01, 0.0), (0.02, 0.01), (0.06, 0.05), (0.3, 0.29)])
@pytest.mark.parametrize("level", [0.1, 0.05])
def test_betting_holds_its_level_at_the_border(worse: float, better: float, level: float) -> None:
    x = differences(2000, 1000, worse, better, seed=round(1000 * worse))
    for used in (level, 0.02):  # at the level it is made for, and at another
        rejected = int((betting_p_value(x, worse - better, level=level) <= used).sum())
        assert at_most(rejected, 2000, used)


def test_betting_is_sharp_where_it_matters() -> None:
    """A true loss of 0.3 points, a promise of 1 point, 4,000 rows of which 2 in 100 differ."""
    x = differences(500, 4000, 0.0115, 0.0085)
    power = (betting_p_value(x, 0.01) <= 0.1).mean()
    assert power > 0.88
    assert (hoeffding_bentkus_p_value(x, 0.01) <= 0.1).mean() < 0.2
    assert (betting_p_value(np.zeros(400), 0.01) <= 0.1).all()  # no difference at all: a few hundred rows do


def test_valid_under_random_order_of_one_set_of_rows() -> None:
    """Rows drawn without replacement from a pool whose mean is the one tested."""
    pool = np.concatenate([np.ones(300), -np.ones(100), np.zeros(19_600)])
    random = np.random.default_rng(5)
    x = np.stack([random.permutation(pool)[:1500] for _ in range(1500)])
    assert at_most(int((betting_p_value(x, 0.01) <= 0.1).sum()), 1500, 0.1)


def test_limits_cover() -> None:
    x = differences(250, 400, 0.08, 0.05)
    upper = [betting_upper(row, 0.1) for row in x]
    assert at_most(sum(u < 0.03 for u in upper), 250, 0.1)
    assert np.mean(upper) < 0.075  # and are no mere 1
    lower = [-betting_upper(-row, 0.1) for row in x[:100]]
    assert at_most(sum(v > 0.03 for v in lower), 100, 0.1)
    assert np.mean(lower) > -0.02
    tokens = np.random.default_rng(1).uniform(5, 55, size=300)
    assert 30 < betting_upper(tokens, 0.1, low=0, high=60) < 34


def test_a_limit_agrees_with_the_p_value() -> None:
    x = differences(1, 3000, 0.01, 0.006)[0]
    upper = betting_upper(x, 0.1)
    above = upper + np.linspace(1e-4, 0.3, 7)
    assert (betting_p_value(x, above) <= 0.1).all()


def test_binomial_agrees_with_scipy_and_with_its_definition() -> None:
    for k, n, level in itertools.product([0, 1, 7, 20], [20, 50], [0.05, 0.1]):
        interval = binomtest(k, n).proportion_ci(1 - 2 * level, method="exact")
        assert binomial_upper(k, n, level) == pytest.approx(interval.high)
        assert binomial_lower(k, n, level) == pytest.approx(interval.low)
        if k < n:
            assert binomial_p_value(k, n, binomial_upper(k, n, level)) == pytest.approx(level)
    tail = sum(math.comb(12, i) * 0.3**i * 0.7 ** (12 - i) for i in range(3))
    assert binomial_p_value(2, 12, 0.3) == pytest.approx(tail)


def test_hoeffding_bentkus_is_valid_over_every_outcome_of_few_rows() -> None:
    outcomes = np.array(list(itertools.product([0.0, 0.5, 1.0], repeat=7)))
    chance = np.prod(np.array([0.5, 0.2, 0.3])[(outcomes * 2).astype(int)], axis=1)
    p = hoeffding_bentkus_p_value(outcomes, 0.4 - 1e-12, low=0)
    assert (p < 1).any()
    for alpha in np.unique(np.round(p, 12)):
        assert chance[p <= alpha + 1e-12].sum() <= alpha + 1e-9


@pytest.mark.parametrize(
    ("worse", "better", "a", "level"),
    [(0.0, 0.0, 0.01, 0.1), (0.02, 0.017, 0.01, 0.1), (0.008, 0.005, 0.01, 0.1), (0.1, 0.08, 0.05, 0.05)],
)
def test_rows_needed_is_about_right(worse: float, better: float, a: float, level: float) -> None:
    mean = worse - better
    n = rows_needed(mean, worse + better - mean**2, a, level=level)
    assert n is not None
    power = (betting_p_value(differences(400, n, worse, better), a, level=level) <= level).mean()
    assert power > 0.7
    power = (betting_p_value(differences(400, n // 3, worse, better), a, level=level) <= level).mean()
    assert power < 0.65


def test_no_number_of_rows_proves_what_is_not_so() -> None:
    assert rows_needed(0.02, 0.05, 0.01) is None


@pytest.mark.parametrize("x", [[], [0.0, 1.5], [0.0, float("nan")]])
def test_rows_that_cannot_be_are_refused(x: list[float]) -> None:
    with pytest.raises(InvalidInputError):
        betting_p_value(x, 0.01)
    with pytest.raises(InvalidInputError):
        betting_upper(x)


def test_other_bad_arguments_are_refused() -> None:
    for call in (
        lambda: betting_p_value([0.0], 1.0),
        lambda: betting_p_value([0.0], 0.1, level=0.0),
        lambda: betting_p_value([0.0], 0.1, low=1, high=-1),
        lambda: binomial_upper(5, 4),
        lambda: hoeffding_bentkus_p_value([0.0], 1.0),
    ):
        with pytest.raises(InvalidInputError):
            call()
