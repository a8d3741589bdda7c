"""P-values and confidence limits for the mean of a bounded variable from independent rows, without a distribution.

All are exact for every number of rows; none rests on a normal approximation. The betting kind is the sharpest where
most rows are equal (two policies that mostly answer alike): it adapts to the variance, where Hoeffding's does not.

- Betting: a wealth that starts at 1 and is staked, row by row, on ``x < a`` is a supermartingale while the mean is
  ``>= a``, so it passes ``1 / alpha`` with probability ``<= alpha`` (Ville), and ``1 / (largest wealth)`` is a p-value.
  Waudby-Smith & Ramdas, "Estimating means of bounded random variables by betting", JRSS-B 2024, section 4. The stakes
  are set anew at each row by the wealth that is still missing and the rows that are left: Voracek & Orabona,
  "STaR-Bets: Sequential Target-Recalculating Bets for Tighter Confidence Intervals", NeurIPS 2025.
- Binomial: Clopper & Pearson, Biometrika 1934.
- Hoeffding-Bentkus, for comparison: Bates et al., "Distribution-free, risk-controlling prediction sets", JACM 2021.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kvroute.errors import InvalidInputError

Floats = np.ndarray[Any, np.dtype[np.float64]]

_CAP = 0.9
"""The largest stake as a share of the one that could lose everything."""
_REACHED = 0.3
"""Logarithm of the factor still played for once the wealth has reached its target."""


def betting_p_value(x: Any, a: Any, *, low: float = -1.0, high: float = 1.0, level: float = 0.1) -> Floats:
    """P-value of "the mean is at least ``a``"; a small one says that the mean lies below.

    Args:
        x: ``[..., n]`` independent rows, each in ``[low, high]``; their order must not depend on their values.
        a: ``[...]`` or one number, in ``(low, high)``.
        low: smallest value a row can have.
        high: largest value a row can have.
        level: the level at which the p-value will be used, at which it is sharpest. Valid at every level, as long as
            it is chosen without a look at the rows.

    Returns:
        ``[...]`` in ``(0, 1]``.

    Raises:
        InvalidInputError: a row outside ``[low, high]``, no row, or an ``a`` or a level that can't be.
    """
    rows = _rows(x, low, high)
    _check_level(level)
    shape = np.broadcast_shapes(rows.shape[:-1], np.shape(a))
    means = np.broadcast_to(np.asarray(a, dtype=np.float64), shape).reshape(-1)
    if not ((means > low) & (means < high)).all():
        raise InvalidInputError(f"The mean that is tested must lie between {low:g} and {high:g}.")
    batch = np.broadcast_to(rows, (*shape, rows.shape[-1])).reshape(len(means), -1)
    return np.asarray(np.exp(-_log_wealth(batch, means, low, high, level))).reshape(shape)


def _log_wealth(rows: Floats, a: Floats, low: float, high: float, level: float) -> Floats:
    """Largest logarithm of the wealth on the way, ``[b]``, of bets on ``rows < a``; ``rows`` ``[b, n]``."""
    n = rows.shape[1]
    target, cap = -math.log(level), _CAP / (high - a)
    wealth, best = np.zeros(len(a)), np.zeros(len(a))
    spread = np.full(len(a), ((high - low) / 2) ** 2)  # sum of squared gains, one row of the largest before the first
    for t, column in enumerate(np.ascontiguousarray(rows.T)):
        missing = np.maximum(target - wealth, _REACHED)
        stake = np.minimum(np.sqrt(2 * missing * (t + 1) / (spread * (n - t))), cap)  # from rows before this one alone
        gain = a - column
        wealth += np.log1p(stake * gain)
        np.maximum(best, wealth, out=best)
        spread += gain * gain
    return best


def betting_upper(x: Any, level: float = 0.1, *, low: float = -1.0, high: float = 1.0) -> float:
    """Upper confidence limit of the mean: the mean is above it with probability at most ``level``.

    The p-value is taken on a fixed lattice, finest at 0 and at the ends; the limit is the smallest point from which on
    every one is rejected. If the mean lies between two points, passing it takes a false rejection of the lower one, so
    the lattice costs width, never validity, and nothing has to be monotone.

    Args:
        x: ``[n]`` independent rows in ``[low, high]``.
        level: probability of being wrong.
        low: smallest value a row can have.
        high: largest value a row can have.
    """
    lattice = _lattice(low, high)
    rejected = betting_p_value(np.asarray(x), lattice, low=low, high=high, level=level) <= level
    kept = np.flatnonzero(~rejected)
    first = int(kept[-1]) + 1 if len(kept) else 0
    return float(lattice[first]) if first < len(lattice) else high


def _lattice(low: float, high: float) -> Floats:
    """About 170 points within ``(low, high)``, a tenth apart relative to the nearest of 0, ``low`` and ``high``."""
    width = high - low
    steps = width * 1e-4 * 1.1 ** np.arange(90)
    anchors = [low, high, *([0.0] if low < 0 < high else [])]
    points = {0.0} | {
        float(p + s * d) for p in anchors for d in (-1.0, 1.0) for s in steps if _own(p + s * d, p, anchors)
    }
    return np.array(sorted(p for p in points if low < p < high))


def _own(point: float, anchor: float, anchors: list[float]) -> bool:
    return all(abs(point - anchor) <= abs(point - other) for other in anchors)


# ---------------------------------------------------------------------- binomial


def binomial_p_value(k: Any, n: Any, a: Any) -> Floats:
    """P-value of "the share is at least ``a``" for ``k`` of ``n`` rows: the chance of so few, were it ``a``."""
    from scipy.stats import binom

    return np.asarray(binom.cdf(k, n, a), dtype=np.float64)


def binomial_upper(k: int, n: int, level: float = 0.1) -> float:
    """Clopper and Pearson's one-sided upper limit of a share; 1 for ``k == n``."""
    from scipy.stats import beta

    _check_count(k, n, level)
    return 1.0 if k == n else float(beta.ppf(1 - level, k + 1, n - k))


def binomial_lower(k: int, n: int, level: float = 0.1) -> float:
    """Clopper and Pearson's one-sided lower limit of a share; 0 for ``k == 0``."""
    from scipy.stats import beta

    _check_count(k, n, level)
    return 0.0 if k == 0 else float(beta.ppf(level, k, n - k + 1))


# ---------------------------------------------------------------------- Hoeffding and Bentkus


def hoeffding_bentkus_p_value(x: Any, a: float, *, low: float = -1.0, high: float = 1.0) -> Floats:
    """P-value of "the mean is at least ``a``" by the smaller of Hoeffding's and Bentkus' bounds; ``[..., n]`` rows."""
    from scipy.stats import binom

    rows = _rows(x, low, high)
    n = rows.shape[-1]
    mean = (rows.mean(-1) - low) / (high - low)
    null = (a - low) / (high - low)
    if not 0 < null < 1:
        raise InvalidInputError(f"The mean that is tested must lie between {low:g} and {high:g}.")
    m = np.minimum(mean, null)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(m > 0, m * np.log(m / null), 0.0) + np.where(
            m < 1, (1 - m) * np.log((1 - m) / (1 - null)), 0.0
        )
    hoeffding = np.exp(-n * entropy)
    bentkus = math.e * binom.cdf(np.ceil(n * mean - 1e-9), n, null)
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0), dtype=np.float64)


# ---------------------------------------------------------------------- how many rows


def rows_needed(mean: float, variance: float, a: float, *, high: float = 1.0, level: float = 0.1) -> int | None:
    """About how many rows :func:`betting_p_value` needs to reach ``level`` four times in five.

    The normal test's number of rows, a twentieth more, and what the stakes' cap and the learning of the variance cost
    (constants taken from simulation).

    Args:
        mean: of the variable, as far as is known.
        variance: of the variable, as far as is known.
        a: the mean that is tested.
        high: largest value a row can have.
        level: of the test.

    Returns:
        None where no number of rows would do: the mean is not below ``a``.
    """
    from scipy.stats import norm

    gap = a - mean
    if gap <= 0:
        return None
    z = float(norm.isf(level) + norm.isf(0.2))
    return math.ceil(1.05 * z * z * variance / gap**2 + 2 * -math.log(level) * (high - mean) / gap)


# ---------------------------------------------------------------------- checks


def _rows(x: Any, low: float, high: float) -> Floats:
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim == 0 or rows.shape[-1] == 0:
        raise InvalidInputError("There is no row.")
    if not low < high:
        raise InvalidInputError(f"The smallest value, {low:g}, is not below the largest, {high:g}.")
    if not (np.isfinite(rows).all() and (rows >= low).all() and (rows <= high).all()):
        raise InvalidInputError(f"A row lies outside [{low:g}, {high:g}].")
    return rows


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InvalidInputError(f"The level must lie between 0 and 1, and is {level!r}.")


def _check_count(k: int, n: int, level: float) -> None:
    _check_level(level)
    if not 0 <= k <= n or n < 1:
        raise InvalidInputError(f"{k} of {n} is no share.")
