"""From scores to a number in [0, 1]: a logistic map of several scores, or a monotone curve of one."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

_LIMIT = 1e3
"""Standardised scores are cut here, so that no input overflows."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """A part of a file: unchangeable, and no field that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LogisticMap(Frozen):
    """``1 / (1 + exp(-(intercept + sum_i coefficient_i (x_i - mean_i) / scale_i)))``."""

    method: Literal["logistic"] = "logistic"
    means: tuple[Finite, ...]
    scales: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]
    coefficients: tuple[Finite, ...]
    intercept: Finite

    @property
    def size(self) -> int:
        """Scores it takes."""
        return len(self.means)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if not len(self.means) == len(self.scales) == len(self.coefficients) > 0:
            raise ValueError("means, scales and coefficients differ in number")
        return self

    def __call__(self, x: Floats) -> Floats:
        """``[n, size]`` scores to ``[n]`` in [0, 1]."""
        z = _standardized(x, np.array(self.means), np.array(self.scales)) @ np.array(self.coefficients)
        return np.asarray(0.5 * (1 + np.tanh((z + self.intercept) / 2)))


class IsotonicMap(Frozen):
    """A monotone curve through points, straight between them and flat outside."""

    method: Literal["isotonic"] = "isotonic"
    direction: Literal["higher", "lower"]
    """Whether a higher or a lower score means more likely right, as found from the labelled answers."""
    scores: tuple[Finite, ...] = Field(min_length=1)
    """Ascending."""
    confidences: tuple[Share, ...]

    @property
    def size(self) -> int:
        """Scores it takes."""
        return 1

    @model_validator(mode="after")
    def _is_monotone(self) -> Self:
        if len(self.scores) != len(self.confidences):
            raise ValueError("scores and confidences differ in number")
        if any(a >= b for a, b in itertools.pairwise(self.scores)):
            raise ValueError("scores do not ascend")
        ordered = self.confidences if self.direction == "higher" else self.confidences[::-1]
        if any(a > b for a, b in itertools.pairwise(ordered)):
            raise ValueError("confidences are not monotone")
        return self

    def __call__(self, x: Floats) -> Floats:
        """``[n, 1]`` scores to ``[n]`` in [0, 1]."""
        with np.errstate(over="ignore"):
            found = np.interp(x[:, 0], self.scores, self.confidences)
        return np.asarray(np.clip(found, 0.0, 1.0))


def _standardized(x: Floats, means: Floats, scales: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(np.clip((x - means) / scales, -_LIMIT, _LIMIT))


def fit_map(x: Floats, truth: Bools, method: str) -> LogisticMap | IsotonicMap:
    """Fit ``[n, size]`` scores to ``[n]`` whether the answer is right."""
    return _fit_isotonic(x[:, 0], truth) if method == "isotonic" else _fit_logistic(x, truth)


def _fit_logistic(x: Floats, truth: Bools) -> LogisticMap:
    from sklearn.linear_model import LogisticRegression

    means, scales = x.mean(axis=0), x.std(axis=0)
    scales = np.where(scales > 0, scales, 1.0)  # a score that is always the same says nothing
    fitted = LogisticRegression(max_iter=1000).fit(_standardized(x, means, scales), truth)
    return LogisticMap(
        means=tuple(means.tolist()),
        scales=tuple(scales.tolist()),
        coefficients=tuple(fitted.coef_[0].tolist()),
        intercept=float(fitted.intercept_[0]),
    )


def _fit_isotonic(x: Floats, truth: Bools) -> IsotonicMap:
    from sklearn.isotonic import IsotonicRegression

    higher = auroc(x, truth) >= 0.5
    fitted = IsotonicRegression(y_min=0.0, y_max=1.0, increasing=bool(higher), out_of_bounds="clip").fit(
        x, truth.astype(np.float64)
    )
    ordered = np.maximum.accumulate if higher else np.minimum.accumulate  # rounding must not break the order
    confidences = ordered(np.clip(np.asarray(fitted.y_thresholds_, dtype=np.float64), 0.0, 1.0))
    return IsotonicMap(
        direction="higher" if higher else "lower",
        scores=tuple(np.asarray(fitted.X_thresholds_, dtype=np.float64).tolist()),
        confidences=tuple(confidences.tolist()),
    )


def auroc(values: Floats, truth: Bools) -> float:
    """Probability that a right answer has a higher value than a wrong one, ties counted half.

    Args:
        values: ``[n]``.
        truth: ``[n]`` bool, at least one of each.
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # mean rank of equal values
    right = int(truth.sum())
    return float((ranks[truth].sum() - right * (right + 1) / 2) / (right * (len(truth) - right)))
