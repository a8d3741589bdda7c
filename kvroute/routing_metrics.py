"""How well a difficulty tells questions apart: AUROC, mean absolute error, calibration.

"Fast is right" is told by a low difficulty, "only slow is right" by a high one. With several samples a row, a mode
is right where at least half of its answers are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from kvroute.calibration_metrics import equal_bins, expected_calibration_error
from kvroute.confidence_maps import Bools, Floats, fit_map
from kvroute.errors import InvalidInputError
from kvroute.label_rows import LabelRow
from kvroute.routing_curves import Modes
from kvroute.routing_intervals import Estimate, Resamples

_BINS = 10
_COUNTED = 20
"""Bins of difficulties, to be drawn."""


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows whose probability lies in a range.

    Attributes:
        low, high: the range.
        rows: how many.
        probability: mean of what was said.
        right: share of right fast answers.
        right_low, right_high: Wilson's interval of that share.
    """

    low: float
    high: float
    rows: int
    probability: float
    right: float
    right_low: float
    right_high: float


@dataclass(frozen=True, slots=True)
class DifficultyCounts:
    """How many rows of each kind lie where, by difficulty.

    Attributes:
        edges: ``[bins + 1]``, of bins of equal width over [0, 100]; each holds its lower edge, the last one both.
        fast: ``[bins]`` rows where fast is right.
        only_slow: ``[bins]`` rows where only slow is right.
        neither: ``[bins]`` rows where neither is.
    """

    edges: tuple[float, ...]
    fast: tuple[int, ...]
    only_slow: tuple[int, ...]
    neither: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DifficultyFigures:
    """How good a difficulty is on rows it was not trained on.

    Attributes:
        auroc_fast_right: probability that a row where fast is right has the lower difficulty than one where it is not.
        auroc_only_slow_right: that a row where only slow is right has the higher difficulty than another.
        mae: mean absolute error against the labels, both in [0, 100].
        brier: mean squared error of the probability that fast is right.
        calibration_error: expected calibration error of that probability over 10 bins of equal width.
        reliability: the bins that hold a row.
        counts: how the kinds of rows spread over the difficulty.
    """

    auroc_fast_right: Estimate
    auroc_only_slow_right: Estimate
    mae: Estimate
    brier: Estimate | None
    calibration_error: float | None
    reliability: tuple[ReliabilityBin, ...]
    counts: DifficultyCounts

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def difficulty_figures(
    rows: Sequence[LabelRow], difficulty: Floats, probability: Floats | None, resamples: Resamples
) -> DifficultyFigures:
    """All figures of a difficulty.

    Args:
        rows: labelled rows.
        difficulty: ``[n]`` in [0, 100].
        probability: ``[n]`` that fast is right, or None where there is none.
        resamples: of these rows.
    """
    modes = Modes.of(rows)
    labels = np.array([np.nan if r.label is None else r.label for r in rows])
    if not np.isfinite(labels).all():
        raise InvalidInputError("A row without a label can't be evaluated on.", hint="Take usable(rows).")
    fast, slow = modes.fast.right >= 0.5, modes.slow.right >= 0.5
    right = modes.fast.right
    return DifficultyFigures(
        auroc_fast_right=auroc_interval(-difficulty, fast, level=resamples.level),
        auroc_only_slow_right=auroc_interval(difficulty, slow & ~fast, level=resamples.level),
        mae=resamples.estimate(lambda mean: mean(np.abs(difficulty - labels))),
        brier=None if probability is None else resamples.estimate(lambda mean: mean((probability - right) ** 2)),
        calibration_error=None if probability is None else calibration_error(probability, right),
        reliability=() if probability is None else reliability(probability, right, level=resamples.level),
        counts=_counts(difficulty, fast, slow),
    )


def _counts(difficulty: Floats, fast: Bools, slow: Bools) -> DifficultyCounts:
    edges = np.linspace(0, 100, _COUNTED + 1)
    kinds = (fast, slow & ~fast, ~slow & ~fast)
    told = [tuple(np.histogram(np.clip(difficulty[kind], 0, 100), edges)[0].tolist()) for kind in kinds]
    return DifficultyCounts(tuple(edges.tolist()), *told)


def fast_probability(difficulty: Floats, fast_right: Floats, *, fitted_on: Floats, minimum: int = 20) -> Floats | None:
    """Probability that fast is right, by an isotonic map.

    Args:
        difficulty: ``[n]`` to map.
        fast_right: ``[m]`` in [0, 1], of the rows to fit on (validation rows).
        fitted_on: ``[m]`` difficulties of these rows.
        minimum: rows without which nothing is fitted.

    Returns:
        ``[n]`` in [0, 1], or None: too few rows, or all right or all wrong.
    """
    truth = fast_right >= 0.5
    if len(truth) < minimum or truth.all() or not truth.any():
        return None
    return fit_map(fitted_on[:, None], truth, "isotonic")(difficulty[:, None])


# ---------------------------------------------------------------------- AUROC


def auroc_interval(values: Floats, truth: Bools, *, level: float = 0.95) -> Estimate:
    """AUROC with DeLong's interval on the logit scale (DeLong et al., Biometrics 44, 1988; Sun and Xu, 2014).

    Args:
        values: ``[n]``, higher means more likely true.
        truth: ``[n]`` bool.
        level: of the interval.

    Returns:
        not defined where all rows are alike; no interval where the two kinds are told apart without fault, or with
        fewer than two rows of a kind.
    """
    found = _components(values[None], truth)
    if found is None:
        return Estimate(None, None, None)
    areas, covariance = found
    area, variance = float(areas[0]), float(covariance[0, 0])
    if not 0 < area < 1 or not variance > 0:
        return Estimate(area, None, None)
    logit = np.log(area / (1 - area))
    half = _normal_quantile(level) * np.sqrt(variance) / (area * (1 - area))
    low, high = (float(0.5 * (1 + np.tanh((logit + side * half) / 2))) for side in (-1, 1))
    return Estimate(area, low, high)


def auroc_difference(a: Floats, b: Floats, truth: Bools, *, level: float = 0.95) -> Estimate:
    """AUROC of ``a`` minus that of ``b`` on the same rows, with DeLong's paired interval."""
    value, variance = delong(a, b, truth)
    if not np.isfinite(value):
        return Estimate(None, None, None)
    if not np.isfinite(variance):
        return Estimate(value, None, None)
    half = _normal_quantile(level) * np.sqrt(variance)
    return Estimate(value, float(value - half), float(value + half))


def delong(a: Floats, b: Floats, truth: Bools) -> tuple[float, float]:
    """AUROC of ``a`` minus that of ``b`` on the same rows, and the variance of that difference (DeLong et al., 1988).

    Args:
        a, b: ``[n]``, higher means more likely true.
        truth: ``[n]`` bool.

    Returns:
        both NaN where all rows are alike; the variance is NaN with fewer than two rows of a kind.
    """
    found = _components(np.stack([a, b]), truth)
    if found is None:
        return np.nan, np.nan
    areas, covariance = found
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    return float(areas[0] - areas[1]), max(variance, 0.0) if np.isfinite(variance) else variance


def _components(values: Floats, truth: Bools) -> tuple[Floats, Floats] | None:
    """Areas ``[k]`` of ``[k, n]`` values and their covariance ``[k, k]``, NaN with fewer than two rows of a kind."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return None
    above, below = [], []
    for row in np.asarray(values, dtype=np.float64):
        ranks = _mean_ranks(row)
        above.append((ranks[truth] - _mean_ranks(row[truth])) / negatives)
        below.append(1 - (ranks[~truth] - _mean_ranks(row[~truth])) / positives)
    areas = np.array([a.mean() for a in above])
    if min(positives, negatives) < 2:
        return areas, np.full((len(areas), len(areas)), np.nan)
    covariance = np.atleast_2d(np.cov(np.stack(above))) / positives + np.atleast_2d(np.cov(np.stack(below))) / negatives
    return areas, np.asarray(covariance)


def _mean_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def _normal_quantile(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf((1 + level) / 2)


# ---------------------------------------------------------------------- calibration


def calibration_error(probability: Floats, right: Floats, bins: int = _BINS) -> float:
    """Mean over bins of equal width, weighted by their rows, of |mean probability - share right|."""
    _check_probability(probability)
    return expected_calibration_error(probability, right, bins)


def reliability(
    probability: Floats, right: Floats, bins: int = _BINS, *, level: float = 0.95
) -> tuple[ReliabilityBin, ...]:
    """The bins of equal width that hold a row, with Wilson's intervals (Wilson, JASA 22, 1927).

    Args:
        probability: ``[n]`` in [0, 1].
        right: ``[n]`` in [0, 1].
        bins: how many.
        level: of the intervals.
    """
    _check_probability(probability)
    place = equal_bins(probability, bins)
    found = []
    for b in np.unique(place):
        inside = place == b
        rows, share = int(inside.sum()), float(right[inside].mean())
        low, high = wilson(share, rows, level)
        said = float(probability[inside].mean())
        found.append(ReliabilityBin(float(b / bins), float((b + 1) / bins), rows, said, share, low, high))
    return tuple(found)


def wilson(share: float, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of ``rows``."""
    z = _normal_quantile(level)
    centre = share + z * z / (2 * rows)
    half = z * np.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    scale = 1 + z * z / rows
    # Rounding may put an end by the width of a bit inside of shares of 0 and 1.
    return float(max(0.0, min(share, (centre - half) / scale))), float(min(1.0, max(share, (centre + half) / scale)))


def _check_probability(probability: Floats) -> None:
    if not ((probability >= 0) & (probability <= 1)).all():
        raise InvalidInputError("Probabilities lie in [0, 1].")
