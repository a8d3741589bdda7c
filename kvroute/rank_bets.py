"""Bets against "these values come from where the reference came from", safe to watch for ever.

A reference of m values is cut at some of its order statistics into bins. While live values are drawn like the
reference, the bin of the next one has, given all before it, the probabilities ``counts / sum(counts)``, where a bin
counts the reference's spacings in it and the live values that fell into it so far: the spacings of order statistics
are Dirichlet distributed, and this is their Polya urn. The finite reference thus costs nothing, however long the run,
and the state does not grow. So ``p = (counts of lower bins + U * count of its bin) / sum``, U uniform, is uniform and
independent of the past: a conformal p-value (Vovk, Gammerman & Shafer, "Algorithmic Learning in a Random World", 2005,
chapter 8), and a stake ``f(p)`` with integral 1 is a fair bet.

The wealth is a mixture over stakes ``f`` and over the request at which betting on them starts, with weights for all
starts fixed beforehand that sum to 1. It stays a martingale that begins at 1, so it ever passes ``1 / alpha`` with
probability at most alpha (Ville), and a change late in a long quiet run is still found soon: nothing was lost before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_LINEAR = np.array([-0.95, -0.5, 0.5, 0.95])
"""1 + e (2p - 1): values went down, or up."""
_CURVED = np.array([-0.9, 0.9])
"""1 + e (6p^2 - 6p + 1): values went to the middle, or to both ends."""
_POWERS = np.array([0.3, 0.6])
"""k p^(k - 1), and the same of 1 - p: some values lie beyond all that was seen."""
STAKES = len(_LINEAR) + len(_CURVED) + 2 * len(_POWERS)
_SCALE = 100.0
_MOST = 1e250
"""Wealth is cut here, which is safe and keeps it finite."""


def stakes(p: Floats) -> Floats:
    """What each bet returns for p-values, ``[s]`` to ``[s, STAKES]``; each has integral 1 over (0, 1)."""
    p = np.clip(p, 1e-9, 1 - 1e-9)[:, None]
    return np.concatenate(
        [
            1 + _LINEAR * (2 * p - 1),
            1 + _CURVED * (6 * p * p - 6 * p + 1),
            _POWERS * p ** (_POWERS - 1),
            _POWERS * (1 - p) ** (_POWERS - 1),
        ],
        axis=1,
    )


def _waiting(t: int) -> float:
    """The weight of all starts after request ``t``; 1 at 0, to 0 so slowly that a late start still has weight."""
    return 1.0 / (1.0 + float(np.log1p(t / _SCALE)))


class RankBets:
    """Several streams of values, each with a wealth of its own; all are updated together.

    Attributes:
        sizes: ``[s, bins]`` spacings of the reference by bin.
        live: ``[s, bins]`` live values by bin.
        n: values so far.
        started: ``[s, STAKES]`` wealth of the bets that have started.
        wealth: ``[s]``; large means that the values are no longer like the reference.
        largest: ``[s]`` the largest it ever was.
    """

    def __init__(self, sizes: Any) -> None:
        self.sizes: Ints = np.asarray(sizes, dtype=np.int64)
        self._sums = self.sizes.sum(1)
        self.reset()

    def reset(self) -> None:
        """Forget all live values."""
        streams, bins = self.sizes.shape
        self.n = 0
        self.live: Ints = np.zeros((streams, bins), dtype=np.int64)
        self.started: Floats = np.zeros((streams, STAKES))
        self.wealth: Floats = np.ones(streams)
        self.largest: Floats = np.ones(streams)

    def restore(self, n: int, live: Any, started: Any, largest: Any) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: it does not fit the reference.
        """
        live, started, largest = (np.asarray(x) for x in (live, started, largest))
        if live.shape != self.sizes.shape or started.shape != self.started.shape or largest.shape != self.largest.shape:
            raise ValueError("the state's shapes differ from the reference's")
        if (live < 0).any() or (live.sum(1) != n).any() or not (np.isfinite(started).all() and (started >= 0).all()):
            raise ValueError("the state holds values that can't be")
        self.n, self.live = n, live.astype(np.int64)
        self.started, self.largest = started.astype(np.float64), largest.astype(np.float64)
        self.wealth = self._total()

    def _total(self) -> Floats:
        return np.asarray(self.started.mean(1) + _waiting(self.n))

    def p_values(self, bins: Ints, u: Floats) -> Floats:
        """``[s]`` of values in these bins, before they are counted; ``u`` uniform in [0, 1)."""
        counts = self.sizes + self.live
        below = np.einsum("sb,sb->s", counts, np.arange(counts.shape[1]) < bins[:, None])
        own = counts[np.arange(len(bins)), bins]
        return np.asarray((below + u * own) / (self._sums + self.n))

    def update(self, bins: Ints, u: Floats) -> Floats:
        """Take one value a stream, ``[s]`` bins and uniform numbers, and return the wealth, ``[s]``."""
        returns = stakes(self.p_values(bins, u))
        self.live[np.arange(len(bins)), bins] += 1
        start = _waiting(self.n) - _waiting(self.n + 1)
        self.n += 1
        self.started = np.minimum((self.started + start) * returns, _MOST)
        self.wealth = self._total()
        np.maximum(self.largest, self.wealth, out=self.largest)
        return self.wealth


def cut(values: Floats, ties: Floats, bins: int) -> tuple[Floats, Floats, Ints]:
    """Cut a reference into bins of about equally many values.

    Args:
        values: ``[m]`` finite.
        ties: ``[m]`` uniform numbers that order equal values.
        bins: how many, at most m + 1.

    Returns:
        ``[bins - 1]`` order statistics, their tie numbers, and ``[bins]`` spacings by bin.
    """
    order = np.lexsort((ties, values))
    ranks = np.round(np.arange(1, bins) * (len(values) + 1) / bins).astype(np.int64)
    at = order[ranks - 1]
    return values[at], ties[at], np.diff(np.concatenate([[0], ranks, [len(values) + 1]]))


def assign(values: Floats, ties: Floats, edges: Floats, edge_ties: Floats) -> Ints:
    """Bins of values, ``[n]``; equal to an edge, the tie numbers decide."""
    low, high = np.searchsorted(edges, values, "left"), np.searchsorted(edges, values, "right")
    found = low.copy()
    for i in np.flatnonzero(low < high):
        found[i] = low[i] + np.count_nonzero(edge_ties[low[i] : high[i]] < ties[i])
    return np.asarray(found, dtype=np.int64)
