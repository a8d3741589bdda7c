"""How good a confidence is: AUROC, Brier score and calibration error, by cross-validation."""

from __future__ import annotations

import warnings

import numpy as np

from kvroute.confidence_maps import Bools, Floats, Frozen, Share, auroc, fit_map
from kvroute.errors import CalibrationError

_BINS = 10


class CalibrationMetrics(Frozen):
    """How good the confidence is on rows it was not fitted on: each fold is judged by a map fitted on the others.

    Attributes:
        auroc: probability that a right answer has the higher confidence than a wrong one, in [0, 1]; higher is
            better, 0.5 is chance.
        brier: mean squared difference of confidence and truth, in [0, 1]; lower is better.
        ece: expected calibration error over 10 bins of equal width, in [0, 1]; lower is better.
        n: rows they are taken from.
        right: share of right answers; a confidence that is always this has a Brier score of right (1 - right).
        folds: folds of the cross-validation.
        seed: of its shuffling.
        grouped: whether answers to one question were kept in one fold.
    """

    auroc: Share
    brier: Share
    ece: Share
    n: int
    right: Share
    folds: int
    seed: int
    grouped: bool


def cross_validate(
    x: Floats, truth: Bools, method: str, groups: list[str] | None, folds: int, seed: int
) -> CalibrationMetrics:
    """Metrics of maps that are fitted on all folds but one and judged on that one.

    Arguments as for :func:`cross_fitted`.

    Raises:
        CalibrationError: too few groups.
    """
    confidence = cross_fitted(x, truth, method, groups, folds, seed)
    return CalibrationMetrics(
        auroc=auroc(confidence, truth),
        brier=float(np.mean((confidence - truth) ** 2)),
        ece=expected_calibration_error(confidence, truth),
        n=len(x),
        right=float(truth.mean()),
        folds=folds,
        seed=seed,
        grouped=groups is not None,
    )


def cross_fitted(x: Floats, truth: Bools, method: str, groups: list[str] | None, folds: int, seed: int) -> Floats:
    """Confidences ``[n]``, each by a map that is fitted on all folds but its own.

    Args:
        x: ``[n, size]`` scores.
        truth: ``[n]`` whether the answer is right.
        method: ``logistic`` or ``isotonic``.
        groups: answers of one group share a fold.
        folds: how many.
        seed: of the shuffling.

    Raises:
        CalibrationError: too few groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is not None and len(set(groups)) < folds:
        raise CalibrationError(
            f"The rows belong to {len(set(groups))} questions; needed are at least {folds}, one for each fold."
        )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # uneven folds, where groups do not allow even ones
        split = list(kind(n_splits=folds, shuffle=True, random_state=seed).split(x, truth, groups))
    confidence = np.empty(len(x))
    for train, test in split:
        if truth[train].all() or not truth[train].any():
            raise CalibrationError(
                "Without the answers to some questions, the rest are all right or all wrong.",
                hint="Add labelled answers to more questions.",
            )
        confidence[test] = fit_map(x[train], truth[train], method)(x[test])
    return confidence


def equal_bins(confidence: Floats, bins: int = _BINS) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Which of some bins of equal width each of ``[n]`` confidences in [0, 1] falls into."""
    return np.minimum((confidence * bins).astype(np.int64), bins - 1)


def expected_calibration_error(confidence: Floats, truth: Bools | Floats, bins: int = _BINS) -> float:
    """Mean over bins of equal width, weighted by their rows, of |mean confidence - share of right answers|.

    Args:
        confidence: ``[n]`` in [0, 1].
        truth: ``[n]`` bool, or shares in [0, 1].
        bins: how many.
    """
    place = equal_bins(confidence, bins)
    gaps = np.bincount(place, weights=confidence - truth.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(truth))
