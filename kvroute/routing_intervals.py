"""Paired bootstrap intervals for accuracies, tokens and whole curves of routing policies.

The same resampled rows serve everything that is compared, so differences and ratios are paired (Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals). Every figure is made of means over rows,
so all resamples are done by one product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from kvroute.confidence_maps import Floats
from kvroute.errors import InvalidInputError
from kvroute.routing_curves import Modes, Outcome, Sweep

Means = Callable[[Floats], Floats]
"""Means over rows of ``[n]`` or ``[k, n]``, for each resample: ``[B]`` or ``[B, k]``."""

_ROUNDING = 1e-9
_CELLS = 2**22
"""Numbers held at once: 32 MiB."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval; None where it is not defined (nothing to gain, say)."""

    value: float | None
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Resamples:
    """Rows drawn with replacement, the same ones for whatever is compared.

    Args:
        n: rows.
        count: how often they are drawn.
        seed: of the drawing.
        level: of the intervals.
    """

    def __init__(self, n: int, count: int = 2000, *, seed: int = 0, level: float = 0.95) -> None:
        if n < 1 or count < 1 or not 0 < level < 1:
            raise InvalidInputError(f"{count} resamples of {n} rows at level {level} can't be drawn.")
        self.n, self.count, self.level = n, count, level
        rng = np.random.default_rng(seed)
        self._times = np.empty((count, n), dtype=np.uint16)
        step = max(1, _CELLS // n)
        for at in range(0, count, step):
            drawn = rng.integers(0, n, (min(step, count - at), n))
            drawn += np.arange(len(drawn))[:, None] * n
            self._times[at : at + step] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)

    def times(self) -> Iterator[Floats]:
        """How often each row was drawn, some resamples at a time: ``[b, n]``."""
        step = max(1, _CELLS // self.n)
        for at in range(0, self.count, step):
            yield self._times[at : at + step].astype(np.float64)

    def means(self, values: Floats) -> Floats:
        """Means of ``[n]`` or ``[k, n]`` over each resample's rows: ``[count]`` or ``[count, k]``."""
        if values.shape[-1] != self.n:
            raise InvalidInputError(f"The resamples are of {self.n} rows, and {values.shape[-1]} were given.")
        return np.concatenate([times @ values.T / self.n for times in self.times()])

    def estimate(self, of: Callable[[Means], Floats]) -> Estimate:
        """A figure that is made of means over rows.

        Args:
            of: takes a function from ``[n]`` or ``[k, n]`` to means (``[B]`` or ``[B, k]``) and gives the figure
                ``[B]``. It is called once for all rows (B = 1) and once for the resamples.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(of(lambda v: np.asarray(v.mean(axis=-1))[None])[0])
            drawn = of(self.means)
        return self.interval(value, drawn)

    def interval(self, value: float, drawn: Floats) -> Estimate:
        """A figure and its percentiles. Resamples in which it is not defined are left out; of more than 5 % no
        interval is given."""
        if not np.isfinite(value):
            return Estimate(None, None, None)
        kept = drawn[np.isfinite(drawn)]
        if len(kept) < 0.95 * self.count:
            return Estimate(value, None, None)
        low, high = np.quantile(kept, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(value, float(low), float(high))

    def band(self, values: Floats) -> tuple[Floats, Floats]:
        """Pointwise percentiles of the means of ``[k, n]``: low and high, ``[k]`` each."""
        low, high = np.quantile(self.means(values), [(1 - self.level) / 2, (1 + self.level) / 2], axis=0)
        return low, high


@dataclass(frozen=True, slots=True)
class PointFigures:
    """One policy, beside always slow and the oracle."""

    accuracy: Estimate
    tokens: Estimate
    accuracy_gain: Estimate
    """Accuracy minus that of always slow."""
    of_slow: Estimate
    """Tokens divided by those of always slow."""
    of_oracle: Estimate
    """Tokens divided by those of the oracle."""

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """For JSON."""
        return asdict(self)


def point_figures(outcome: Outcome, modes: Modes, resamples: Resamples) -> PointFigures:
    """A policy's accuracy and tokens with paired intervals."""
    slow, oracle = modes.slow, modes.oracle()
    return PointFigures(
        accuracy=resamples.estimate(lambda mean: mean(outcome.right)),
        tokens=resamples.estimate(lambda mean: mean(outcome.tokens)),
        accuracy_gain=resamples.estimate(lambda mean: mean(outcome.right - slow.right)),
        of_slow=resamples.estimate(lambda mean: mean(outcome.tokens) / mean(slow.tokens)),
        of_oracle=resamples.estimate(lambda mean: mean(outcome.tokens) / mean(oracle.tokens)),
    )


def difference(a: Outcome, b: Outcome, resamples: Resamples) -> tuple[Estimate, Estimate]:
    """Accuracy of ``a`` minus that of ``b``, and tokens of ``a`` divided by those of ``b``, paired."""
    return (
        resamples.estimate(lambda mean: mean(a.right - b.right)),
        resamples.estimate(lambda mean: mean(a.tokens) / mean(b.tokens)),
    )


def tokens_at(accuracy: Floats, points_accuracy: Floats, points_tokens: Floats) -> Floats:
    """Fewest tokens that reach an accuracy with one point, or a mixture of two: the upper hull, interpolated.

    Args:
        accuracy: ``[B]`` to reach.
        points_accuracy: ``[B, k]`` of the points.
        points_tokens: ``[B, k]`` of the points.

    Returns:
        ``[B]``, NaN where no point reaches it.
    """
    found = np.empty(len(accuracy))
    step = max(1, _CELLS // points_accuracy.shape[1] ** 2)
    for at in range(0, len(found), step):
        a = accuracy[at : at + step, None]
        y, t = points_accuracy[at : at + step], points_tokens[at : at + step]
        enough = y >= a - _ROUNDING
        alone = np.where(enough, t, np.inf).min(axis=1)
        pair = enough[:, None, :] & ~enough[:, :, None]  # [B, i below, j above]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.clip((a - y)[:, :, None] / (y[:, None, :] - y[:, :, None]), 0.0, 1.0)
            mixed = np.where(pair, t[:, :, None] + part * (t[:, None, :] - t[:, :, None]), np.inf).min(axis=(1, 2))
        best = np.minimum(alone, mixed)
        found[at : at + step] = np.where(np.isfinite(best), best, np.nan)
    return found


@dataclass(frozen=True, slots=True)
class EqualAccuracy:
    """Tokens at the accuracy of always slow minus some points."""

    tokens: Estimate
    of_slow: Estimate
    of_oracle: Estimate

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """For JSON."""
        return asdict(self)


def at_equal_accuracy(sweep: Sweep, modes: Modes, resamples: Resamples, points: float = 1.0) -> EqualAccuracy:
    """Tokens a question that a policy needs for the accuracy of always slow minus ``points`` points.

    Its settings, always fast and always slow may be mixed at random (upper hull). Settings should come from other
    rows: :func:`hull_thresholds` of validation rows.
    """
    at = _tokens_at_target(sweep, modes, points)
    oracle = modes.oracle()
    return EqualAccuracy(
        tokens=resamples.estimate(at),
        of_slow=resamples.estimate(lambda mean: at(mean) / mean(modes.slow.tokens)),
        of_oracle=resamples.estimate(lambda mean: at(mean) / mean(oracle.tokens)),
    )


def compare_at_equal_accuracy(
    a: Sweep, b: Sweep, modes: Modes, resamples: Resamples, points: float = 1.0
) -> tuple[Estimate, Estimate]:
    """Tokens of ``a`` minus those of ``b``, and divided by them, both at the accuracy of always slow minus ``points``.

    The difference is below 0 and the ratio below 1 where ``a`` is the better.
    """
    first, second = _tokens_at_target(a, modes, points), _tokens_at_target(b, modes, points)
    return (
        resamples.estimate(lambda mean: first(mean) - second(mean)),
        resamples.estimate(lambda mean: first(mean) / second(mean)),
    )


def gap_recovered(sweep: Sweep, modes: Modes, resamples: Resamples) -> Estimate:
    """Average share of the gap between always fast and always slow that is recovered, over tokens spent.

    The area under the curve with both axes scaled so that always fast is (0, 0) and always slow (1, 1), as the average
    performance gap recovered of RouteLLM (arXiv 2406.18665, section 3.2), with tokens in the place of the share of
    calls. Random routing has 0.5. Not defined where slow mode gains nothing.
    """
    return resamples.estimate(lambda mean: _gap(sweep, modes, mean))


def compare_gaps(a: Sweep, b: Sweep, modes: Modes, resamples: Resamples) -> Estimate:
    """:func:`gap_recovered` of ``a`` minus that of ``b``, paired."""
    return resamples.estimate(lambda mean: _gap(a, modes, mean) - _gap(b, modes, mean))


def _gap(sweep: Sweep, modes: Modes, mean: Means) -> Floats:
    y, t = _with_ends(sweep, modes, mean)
    gap, span = y[:, -1:] - y[:, :1], t[:, -1:] - t[:, :1]
    y = np.where(gap > 0, (y - y[:, :1]) / gap, np.nan)
    x = np.where(span > 0, (t - t[:, :1]) / span, np.nan)
    return np.asarray(((y[:, 1:] + y[:, :-1]) / 2 * np.diff(x, axis=1)).sum(axis=1))


def _tokens_at_target(sweep: Sweep, modes: Modes, points: float) -> Callable[[Means], Floats]:
    def at(mean: Means) -> Floats:
        accuracy, tokens = _with_ends(sweep, modes, mean)
        return tokens_at(accuracy[:, -1] - points / 100, accuracy, tokens)

    return at


def _with_ends(sweep: Sweep, modes: Modes, mean: Means) -> tuple[Floats, Floats]:
    """Accuracy and tokens ``[B, k + 2]`` of always fast, the sweep, always slow."""
    return (
        np.column_stack([mean(modes.fast.right), mean(sweep.right), mean(modes.slow.right)]),
        np.column_stack([mean(modes.fast.tokens), mean(sweep.tokens), mean(modes.slow.tokens)]),
    )
