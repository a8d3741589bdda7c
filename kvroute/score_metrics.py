"""How well a score tells right answers from wrong ones, for the rows as they are and for any resample of them.

All figures are of *ranks*: AUROC, AUPR and FPR95 as in arXiv 2410.13640 (section 4), and the area under the
risk-coverage curve (AURC; Geifman and El-Yaniv, arXiv 1705.08500). Rows that share a value are never put in an order of
their own: AUROC counts them half, AUPR and FPR95 take them together, AURC gives the mean over their orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvroute.calibration_metrics import equal_bins
from kvroute.confidence_maps import Bools, Floats
from kvroute.errors import InvalidInputError
from kvroute.routing_intervals import Estimate, Resamples

RANK_FIGURES = ("auroc", "aupr", "fpr95", "aurc")
"""Figures of a score; see :func:`rank_figures`."""
MAP_FIGURES = ("brier", "ece")
"""Figures of a probability; see :func:`map_figures`."""

_BINS = 10
_TPR = 0.95


def rank_figures(values: Floats, truth: Bools, weights: Floats | None = None) -> dict[str, Floats]:
    """Figures of a score whose higher values are to mean right answers.

    Args:
        values: ``[n]``.
        truth: ``[n]`` whether the answer is right.
        weights: ``[b, n]`` whole numbers, how often each row counts; by default once (b = 1).

    Returns:
        each ``[b]`` in [0, 1], NaN where a resample has one kind of answers alone. ``auroc``: probability that a right
        answer has the higher value (higher is better, 0.5 is chance). ``aupr``: average precision for right answers
        (higher is better; chance is their share). ``fpr95``: share of wrong answers that pass where 95 % of the right
        ones do (lower is better). ``aurc``: error among the answers kept, averaged over how many are kept, the highest
        values first (lower is better; chance is the share of wrong answers).
    """
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    taken = np.ones((1, len(values))) if weights is None else np.asarray(weights, dtype=np.float64)
    taken, right = taken[:, order], truth[order]
    zero = np.zeros((len(taken), 1))
    hits = np.hstack([zero, np.cumsum(taken * right, axis=1)[:, ends]])  # right answers down to each distinct value
    misses = np.hstack([zero, np.cumsum(taken * ~right, axis=1)[:, ends]])
    rights, wrongs, kept = hits[:, -1], misses[:, -1], hits + misses
    with np.errstate(divide="ignore", invalid="ignore"):
        area = (np.diff(misses) * (hits[:, 1:] + hits[:, :-1]) / 2).sum(axis=1) / (rights * wrongs)
        precision = np.where(kept[:, 1:] > 0, hits[:, 1:] / kept[:, 1:], 0.0)
        average = (np.diff(hits) * precision).sum(axis=1) / rights
        enough = hits >= _TPR * rights[:, None] - 1e-9
        passed = np.where(enough, misses, np.inf).min(axis=1) / wrongs
    both = (rights > 0) & (wrongs > 0)
    return {
        "auroc": np.where(both, area, np.nan),
        "aupr": np.where(both, average, np.nan),
        "fpr95": np.where(both, passed, np.nan),
        "aurc": np.where(both, _risk_area(misses, kept), np.nan),
    }


def _risk_area(misses: Floats, kept: Floats) -> Floats:
    """Mean over k = 1..n of the errors among the first k, the mean over orders within equal values.

    In a group of g rows with e errors behind W rows with E errors, the expected risk at the j-th is
    (E + j e/g) / (W + j) = e/g + (E - W e/g) / (W + j), so its sum needs harmonic numbers alone.
    """
    total = kept[:, -1]
    harmonic = np.append(0.0, np.cumsum(1 / np.arange(1, int(total.max()) + 1)))
    errors, rows, before = np.diff(misses), np.diff(kept), kept[:, :-1]
    share = np.where(rows > 0, errors / np.maximum(rows, 1), 0.0)
    steps = harmonic[np.rint(kept[:, 1:]).astype(np.int64)] - harmonic[np.rint(before).astype(np.int64)]
    found: Floats = (errors + (misses[:, :-1] - before * share) * steps).sum(axis=1) / np.maximum(total, 1)
    return found


def map_figures(probability: Floats, truth: Bools, weights: Floats | None = None) -> dict[str, Floats]:
    """Figures of a probability that the answer is right.

    Args:
        probability: ``[n]`` in [0, 1].
        truth: ``[n]`` whether it is.
        weights: as in :func:`rank_figures`.

    Returns:
        each ``[b]`` in [0, 1], lower is better. ``brier``: mean squared difference of probability and truth.
        ``ece``: mean over 10 bins of equal width, weighted by their rows, of |mean probability - share right|.
    """
    if not ((probability >= 0) & (probability <= 1)).all():
        raise InvalidInputError("Probabilities lie in [0, 1].")
    taken = np.ones((1, len(truth))) if weights is None else np.asarray(weights, dtype=np.float64)
    total = taken.sum(axis=1)
    gap = probability - truth
    bins = np.eye(_BINS)[equal_bins(probability, _BINS)]
    return {
        "brier": taken @ gap**2 / total,
        "ece": np.abs(taken @ (bins * gap[:, None])).sum(axis=1) / total,
    }


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """Answers kept, the highest values first, and the errors among them.

    Attributes:
        coverage: ``[k]`` share of answers kept, ascending to 1; a point for each distinct value.
        risk: ``[k]`` share of wrong answers among them.
    """

    coverage: Floats
    risk: Floats

    @classmethod
    def of(cls, values: Floats, truth: Bools) -> RiskCoverage:
        """The curve of a score ``[n]``."""
        order = np.argsort(-values, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
        wrong = np.cumsum(~truth[order])[ends]
        return cls((ends + 1) / len(values), wrong / (ends + 1))

    def to_dict(self) -> dict[str, list[float]]:
        """For JSON."""
        return {"coverage": self.coverage.tolist(), "risk": self.risk.tolist()}


@dataclass(frozen=True)
class Drawn:
    """Figures of the rows, and of each resample.

    Attributes:
        value: by figure.
        draws: by figure ``[count]``.
        resamples: which rows were drawn.
    """

    value: dict[str, float]
    draws: dict[str, Floats]
    resamples: Resamples

    @classmethod
    def of(cls, values: Floats, probability: Floats | None, truth: Bools, resamples: Resamples) -> Drawn:
        """All figures of a score, and of the probability that was made of it.

        Args:
            values: ``[n]``, higher shall mean right.
            probability: ``[n]`` in [0, 1], or None.
            truth: ``[n]``.
            resamples: of these rows.
        """

        def figures(weights: Floats | None) -> dict[str, Floats]:
            found = rank_figures(values, truth, weights)
            return found if probability is None else found | map_figures(probability, truth, weights)

        blocks = [figures(times) for times in resamples.times()]
        return cls(
            {name: float(found[0]) for name, found in figures(None).items()},
            {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]},
            resamples,
        )

    @classmethod
    def mean(cls, parts: Mapping[Any, Drawn]) -> Drawn:
        """The mean over sets of rows, each resampled on its own; figures that all of them have."""
        every = list(parts.values())
        names = [n for n in every[0].value if all(n in d.value for d in every)]
        return cls(
            {n: float(np.mean([d.value[n] for d in every])) for n in names},
            {n: np.mean([d.draws[n] for d in every], axis=0) for n in names},
            every[0].resamples,
        )

    def estimates(self) -> dict[str, Estimate]:
        """By figure, its value and interval; ``ece`` has none, since it grows where rows are drawn twice."""
        return {
            name: Estimate(value, None, None) if name == "ece" else self.resamples.interval(value, self.draws[name])
            for name, value in self.value.items()
        }

    def minus(self, other: Drawn, name: str) -> Estimate:
        """The difference of a figure, paired: both were drawn from the same rows."""
        return self.resamples.interval(self.value[name] - other.value[name], self.draws[name] - other.draws[name])
