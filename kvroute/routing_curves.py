"""What a router gets for its tokens: accuracy-tokens curves and the references beside them.

Rows are labelled questions. A :class:`Modes` holds what each mode gets for each row, an :class:`Outcome` what one
policy gets, a :class:`Sweep` what a policy gets at each of several settings (thresholds, shares). Means over rows are
accuracies in [0, 1] and tokens a question. Intervals are in :mod:`kvroute.routing_intervals`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvroute.confidence_maps import Floats
from kvroute.errors import InvalidInputError
from kvroute.label_rows import LabelRow
from kvroute.thinking import Mode

_GRID = 101
_VERTICES = 32
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy gets.

    Attributes:
        right: ``[n]`` in [0, 1]: whether the answer to each row is right, or how likely it is.
        tokens: ``[n]`` tokens written for each row.
    """

    right: Floats
    tokens: Floats

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())

    @property
    def mean_tokens(self) -> float:
        """Tokens a question."""
        return float(self.tokens.mean())


@dataclass(frozen=True, slots=True)
class Modes:
    """What each mode gets for each row."""

    fast: Outcome
    slow: Outcome

    @classmethod
    def of(cls, rows: Sequence[LabelRow]) -> Self:
        """From labelled rows; with several samples a row, their means.

        Raises:
            InvalidInputError: no row, or one without answers in both modes, naming it.
        """
        if not rows:
            raise InvalidInputError("There is no labelled row to evaluate on.")
        for row in rows:
            if not row.fast or not row.slow:
                raise InvalidInputError(f"Row {row.id} has no answer in one of the modes.")
        return cls(
            Outcome(_array([r.fast_right for r in rows]), _array([r.fast_tokens for r in rows])),
            Outcome(_array([r.slow_right for r in rows]), _array([r.slow_tokens for r in rows])),
        )

    def __len__(self) -> int:
        return len(self.fast.right)

    # ------------------------------------------------------------------ references

    def always(self, mode: Mode) -> Outcome:
        """One mode for every row."""
        return self.fast if mode == "fast" else self.slow

    def oracle(self) -> Outcome:
        """For each row the cheapest mode that is right, else fast.

        With several samples a row: the mode that is right more often, the cheaper of two that are so alike.
        """
        better = self.slow.right > self.fast.right
        cheaper = (self.slow.right == self.fast.right) & (self.fast.right > 0) & (self.slow.tokens < self.fast.tokens)
        return self.chosen((better | cheaper).astype(np.float64))

    def chosen(self, slow: Floats) -> Outcome:
        """Expectation where ``slow`` ``[n]`` in [0, 1] is the probability of slow mode, by row."""
        return Outcome(*_mixed(self, slow))

    def one_step(self, difficulty: Floats, tau: float) -> Outcome:
        """Slow where the difficulty ``[n]`` is above ``tau``."""
        return self.chosen((difficulty > tau).astype(np.float64))

    # ------------------------------------------------------------------ sweeps

    def random(self, shares: Floats | None = None) -> Sweep:
        """Slow for a random share of the rows: the exact expectation at each share."""
        shares = np.linspace(0.0, 1.0, 11) if shares is None else np.asarray(shares, dtype=np.float64)
        slow = np.broadcast_to(shares[:, None], (len(shares), len(self)))
        return Sweep(shares, *_mixed(self, slow), slow=shares)

    def sweep(self, difficulty: Floats, thresholds: Floats | None = None) -> Sweep:
        """One step at each of several thresholds, from always fast to always slow.

        Args:
            difficulty: ``[n]``, higher is harder; any scale.
            thresholds: slow where the difficulty is above; by default :func:`threshold_grid` of these difficulties,
                which picks points of the curve and so favours none.
        """
        d = _finite(difficulty, len(self))
        taus = threshold_grid(d) if thresholds is None else np.sort(np.asarray(thresholds, dtype=np.float64))[::-1]
        slow = (d[None] > taus[:, None]).astype(np.float64)
        return Sweep(taus, *_mixed(self, slow), slow=slow.mean(axis=1))


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a policy gets at each of k settings, ordered from the fewest slow answers to the most.

    Attributes:
        settings: ``[k]`` thresholds, shares, or whatever is swept.
        right: ``[k, n]`` in [0, 1].
        tokens: ``[k, n]``.
        slow: ``[k]`` share of slow answers, where it is known.
    """

    settings: Floats
    right: Floats
    tokens: Floats
    slow: Floats | None = None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], settings: Sequence[float] | None = None) -> Self:
        """From outcomes that were run, such as those of a two-step policy at several thresholds."""
        if not outcomes:
            raise InvalidInputError("A sweep has one outcome at least.")
        return cls(
            np.arange(len(outcomes), dtype=np.float64) if settings is None else _array(settings),
            np.stack([o.right for o in outcomes]).astype(np.float64),
            np.stack([o.tokens for o in outcomes]).astype(np.float64),
        )

    @property
    def accuracy(self) -> Floats:
        """``[k]``."""
        return np.asarray(self.right.mean(axis=1))

    @property
    def mean_tokens(self) -> Floats:
        """``[k]`` tokens a question."""
        return np.asarray(self.tokens.mean(axis=1))


def threshold_grid(difficulty: Floats, size: int = _GRID) -> Floats:
    """At most ``size`` thresholds, descending: the first makes no row slow, the last every row.

    They are difficulties that occur, at even shares of the rows.
    """
    values = np.unique(difficulty)
    taus = np.append(values[0] - 1, values)
    if len(taus) > size:
        even = np.quantile(difficulty, np.linspace(0.0, 1.0, size - 1), method="inverted_cdf")
        taus = np.unique(np.append(even, taus[0]))
    return np.asarray(taus[::-1])


def hull_thresholds(modes: Modes, difficulty: Floats, most: int = _VERTICES) -> Floats:
    """Thresholds at the vertices of the curve's upper hull: those worth using, alone or mixed.

    Take them from validation rows and evaluate them on test rows: chosen and evaluated on the same rows they flatter.

    Args:
        modes: of the rows to choose on.
        difficulty: ``[n]`` of these rows.
        most: how many; of more, evenly spread ones are kept.

    Returns:
        descending thresholds, at most ``most``.
    """
    d = _finite(difficulty, len(modes))
    order = np.argsort(-d, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(d[order])), len(d) - 1)  # last row of each group of equal difficulties
    gain = np.cumsum((modes.slow.right - modes.fast.right)[order])[ends]
    cost = np.cumsum((modes.slow.tokens - modes.fast.tokens)[order])[ends]
    # Behind the i-th group all rows up to it are slow: the threshold is the next group's difficulty.
    below = np.append(d[order][ends][1:], d.min() - 1)
    taus = np.append(d.max(), below)
    kept = upper_hull(np.append(0.0, cost), np.append(0.0, gain))
    if len(kept) > most:
        kept = kept[np.unique(np.linspace(0, len(kept) - 1, most).round().astype(np.int64))]
    return np.asarray(np.sort(taus[kept])[::-1])


def upper_hull(x: Floats, y: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices of the upper hull's vertices of points ``[k]``, by ascending x."""
    found: list[int] = []
    for i in np.lexsort((y, x)):
        while len(found) >= 2:
            a, b = found[-2], found[-1]
            if (x[b] - x[a]) * (y[i] - y[a]) < (y[b] - y[a]) * (x[i] - x[a]):
                break
            found.pop()
        if len(found) == 1 and x[found[0]] == x[i]:
            found.pop()
        found.append(int(i))
    return np.array(found, dtype=np.int64)


def choose_threshold(modes: Modes, difficulty: Floats, points: float = 1.0) -> float:
    """The threshold of fewest tokens that loses at most ``points`` points of accuracy against always slow.

    A point estimate on these rows; it promises nothing about others.
    """
    sweep = modes.sweep(difficulty)
    enough = sweep.accuracy >= modes.slow.accuracy - points / 100 - _ROUNDING
    return float(sweep.settings[np.argmin(np.where(enough, sweep.mean_tokens, np.inf))])


def _mixed(modes: Modes, slow: Floats) -> tuple[Floats, Floats]:
    fast, late = modes.fast, modes.slow
    return fast.right + slow * (late.right - fast.right), fast.tokens + slow * (late.tokens - fast.tokens)


def _array(values: Sequence[float]) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _finite(difficulty: Floats, n: int) -> Floats:
    d = np.asarray(difficulty, dtype=np.float64)
    if d.shape != (n,) or not np.isfinite(d).all():
        raise InvalidInputError(f"Difficulties are one finite number for each of the {n} rows.")
    return d
