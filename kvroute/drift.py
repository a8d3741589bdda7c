"""Whether live requests still look like the calibration rows, on which a policy's guarantee rests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from kvroute.confidence_maps import Frozen, Share
from kvroute.errors import FileFormatError, InvalidInputError, ModelMismatchError
from kvroute.files import read_tensors, write_tensors
from kvroute.rank_bets import Floats, Ints, RankBets, assign, cut

_KIND = "kvroute.drift"
_LEAST = 200
"""Calibration rows that a monitor needs."""
_FIT_ROWS, _AXES, _WATCHED, _BINS = 2000, 16, 4, 100
_log = logging.getLogger(__name__)


class StreamHealth(Frozen):
    """One watched number."""

    evidence: float
    """Wealth of the bets against it; 1 at the start."""
    expected: tuple[Share, ...]
    """Shares of the calibration rows in bins from its lowest to its highest values: about a tenth each."""
    seen: tuple[Share, ...]
    """Shares of the live requests in the same bins; zeros before the first."""


class DriftHealth(Frozen):
    """What a monitor has seen."""

    status: Literal["quiet", "drifted"]
    """``drifted`` from the first alarm on, until a reset."""
    e_value: float
    """Largest evidence of a stream now, over the number of streams; the alarm is at ``1 / alpha``."""
    alpha: float
    """Probability that a run of requests like the calibration rows ever gives an alarm, however long it is."""
    n: int
    """Requests so far."""
    alarm_at: int | None
    """The request that gave the alarm, from 1."""
    streams: dict[str, StreamHealth]
    """``difficulty``; with vectors also ``distance`` (from the calibration vectors' mean) and ``axis-i``, their
    coordinates along the main axes."""


class _Axes:
    """A few numbers of a vector: coordinates along main axes, and its distance from the mean.

    Fitted on rows of their own: on rows it was fitted to, the distance would be smaller than on new ones.
    """

    def __init__(self, mean: Floats, axes: Floats, rest: float) -> None:
        self.mean, self.axes, self.rest = mean, axes, rest

    @classmethod
    def fit(cls, vectors: Floats) -> Self:
        mean = vectors.mean(0)
        _, singular, directions = np.linalg.svd(vectors - mean, full_matrices=False)
        variances = singular**2 / len(vectors)
        kept = max(1, min(_AXES, vectors.shape[1], len(vectors) // 10, int((variances > 1e-12 * variances[0]).sum())))
        if variances[0] <= 0:
            raise InvalidInputError("All calibration vectors are equal, so nothing can be watched in them.")
        left = vectors.shape[1] - kept
        rest = float(variances[kept:].sum() / left) if left else 0.0
        return cls(mean, directions[:kept] / np.sqrt(variances[:kept])[:, None], rest)

    def __call__(self, vectors: Floats) -> Floats:
        """``[n, dim]`` to ``[1 + watched, n]``: distance, then coordinates in standard deviations."""
        centred = vectors - self.mean
        z = centred @ self.axes.T
        squared = (z * z).sum(1)
        if self.rest > 0:
            lengths = 1 / (self.axes * self.axes).sum(1)  # variances: axes are directions over their deviations
            outside = (centred * centred).sum(1) - (z * z * lengths).sum(1)
            squared = squared + np.maximum(outside, 0.0) / self.rest
        return np.concatenate([np.sqrt(squared)[None], z[:, :_WATCHED].T])


class DriftMonitor:
    """Watches difficulties and vectors of requests and gives an alarm when they have left the calibration rows.

    Anytime-valid: while requests are drawn like the calibration rows, the probability that there is ever an alarm, over
    a run without end, is at most ``alpha`` (:mod:`kvroute.rank_bets`; the streams share it evenly, by the union
    bound). Requests must be independent of each other: a user who sends the same one a hundred times is drift.
    Thread-safe.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        edges: Floats,
        ties: Floats,
        sizes: Ints,
        axes: _Axes | None,
        *,
        alpha: float,
        seed: int,
        fingerprint: str | None,
    ) -> None:
        self.names = names
        self.alpha = alpha
        self.fingerprint = fingerprint
        self._edges, self._ties, self._axes, self._seed = edges, ties, axes, seed
        self._bets = RankBets(sizes)
        self._alarm_at: int | None = None
        self._random = np.random.default_rng((seed, 0))
        self._lock = threading.Lock()

    @classmethod
    def fit(
        cls,
        difficulty: Any,
        vectors: Any = None,
        *,
        alpha: float = 0.01,
        seed: int = 0,
        fingerprint: str | None = None,
    ) -> Self:
        """From calibration rows, which the head was not trained on.

        Args:
            difficulty: ``[m]``, at least 200.
            vectors: ``[m, dim]`` pooled vectors of the same rows, or None to watch the difficulty alone. Half of them
                find the axes, the other half is the reference.
            alpha: probability of ever giving a false alarm.
            seed: of that split and of the numbers that order equal values.
            fingerprint: of the model.

        Raises:
            InvalidInputError: too few rows, shapes that differ, or values that are not finite.
        """
        d = np.asarray(difficulty, dtype=np.float64)
        if d.ndim != 1 or len(d) < _LEAST:
            raise InvalidInputError(f"A drift reference needs at least {_LEAST} rows, and has shape {d.shape}.")
        if not 0 < alpha < 1:
            raise InvalidInputError(f"alpha must lie between 0 and 1, and is {alpha!r}.")
        _check_finite(d, "difficulty")
        random = np.random.default_rng((seed, 1))
        streams, axes = [("difficulty", d)], None
        if vectors is not None:
            v = np.asarray(vectors, dtype=np.float64)
            if v.ndim != 2 or len(v) != len(d):
                raise InvalidInputError(f"{len(d)} difficulties have vectors of shape {v.shape}.")
            _check_finite(v, "vector")
            order = random.permutation(len(d))
            half = min(len(d) // 2, _FIT_ROWS)
            axes = _Axes.fit(v[order[:half]])
            numbers = axes(v[order[half:]])
            streams += [("distance", numbers[0]), *((f"axis-{i}", z) for i, z in enumerate(numbers[1:]))]
        bins = min(_BINS, (min(len(values) for _, values in streams) + 1) // 5)
        cuts = [cut(values, random.random(len(values)), bins) for _, values in streams]
        edges, ties, sizes = (np.stack(part) for part in zip(*cuts, strict=True))
        names = tuple(name for name, _ in streams)
        return cls(names, edges, ties, sizes, axes, alpha=alpha, seed=seed, fingerprint=fingerprint)

    # ------------------------------------------------------------------ live

    @property
    def threshold(self) -> float:
        """Evidence of one stream that gives the alarm."""
        return len(self.names) / self.alpha

    @property
    def drifted(self) -> bool:
        """Whether there was an alarm."""
        return self._alarm_at is not None

    def update(self, difficulty: float, vector: Any = None) -> bool:
        """Take one request.

        Args:
            difficulty: the head's.
            vector: ``[dim]``, if the monitor was fitted with vectors.

        Returns:
            True for the request that gives the alarm, which is logged once; False for all others.

        Raises:
            InvalidInputError: no vector where one is needed, another size, or a value that is not finite.
        """
        return self.update_many([difficulty], None if vector is None else np.asarray(vector)[None])

    def update_many(self, difficulty: Any, vectors: Any = None) -> bool:
        """Take requests, ``[n]`` and ``[n, dim]``, one after the other; True if one of them gave the alarm."""
        numbers = self.numbers(difficulty, vectors)
        with self._lock:
            before = self._alarm_at
            bins = self._assign(numbers, self._random)
            for at in bins.T:
                wealth = self._bets.update(at, self._random.random(len(at)))
                if self._alarm_at is None and wealth.max() >= self.threshold:
                    self._alarm_at = self._bets.n
            alarm = before is None and self._alarm_at is not None
        if alarm:
            worst = self.names[int(self._bets.wealth.argmax())]
            _log.warning(
                "Requests have left the calibration rows (%s, at request %s): the policy's guarantee no longer speaks "
                "of them. Label some of them and calibrate anew.",
                worst,
                self._alarm_at,
            )
        return alarm

    def numbers(self, difficulty: Any, vectors: Any = None) -> Floats:
        """The watched numbers, ``[streams, n]``.

        Raises:
            InvalidInputError: as :meth:`update`.
        """
        d = np.asarray(difficulty, dtype=np.float64)
        if d.ndim != 1:
            raise InvalidInputError(f"Difficulties have shape {d.shape}, not [n].")
        _check_finite(d, "difficulty")
        if self._axes is None:
            return d[None]
        v = np.asarray(vectors, dtype=np.float64) if vectors is not None else np.zeros((0, 0))
        if v.shape != (len(d), len(self._axes.mean)):
            raise InvalidInputError(
                f"The drift monitor takes vectors [{len(d)}, {len(self._axes.mean)}], not {list(v.shape)}.",
                hint="Give the vectors that the head was given.",
            )
        _check_finite(v, "vector")
        return np.concatenate([d[None], self._axes(v)])

    def _assign(self, numbers: Floats, random: np.random.Generator) -> Ints:
        ties = np.asarray(random.random(numbers.shape))
        return np.stack([assign(*of) for of in zip(numbers, ties, self._edges, self._ties, strict=True)])

    def reset(self) -> None:
        """Forget all requests and the alarm; the reference stays."""
        with self._lock:
            self._random = np.random.default_rng((self._seed, self._bets.n + 2))
            self._bets.reset()
            self._alarm_at = None

    def health(self) -> DriftHealth:
        """What it has seen so far."""
        with self._lock:
            bets = self._bets
            expected, seen = _tenths(bets.sizes), _tenths(bets.live)
            return DriftHealth(
                status="drifted" if self._alarm_at is not None else "quiet",
                e_value=float(bets.wealth.max() / len(self.names)),
                alpha=self.alpha,
                n=bets.n,
                alarm_at=self._alarm_at,
                streams={
                    name: StreamHealth(
                        evidence=float(bets.wealth[i]),
                        expected=tuple(expected[i].tolist()),
                        seen=tuple(seen[i].tolist()),
                    )
                    for i, name in enumerate(self.names)
                },
            )

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write reference and state to a .safetensors file."""
        with self._lock:
            bets = self._bets
            tensors = {
                "edges": self._edges,
                "ties": self._ties,
                "sizes": bets.sizes,
                "live": bets.live.copy(),
                "started": bets.started.copy(),
                "largest": bets.largest.copy(),
            }
            if self._axes is not None:
                tensors |= {"mean": self._axes.mean, "axes": self._axes.axes}
            meta = {
                "names": list(self.names),
                "alpha": self.alpha,
                "seed": self._seed,
                "fingerprint": self.fingerprint,
                "n": bets.n,
                "alarm_at": self._alarm_at,
                "rest": self._axes.rest if self._axes is not None else None,
            }
        write_tensors(path, _KIND, tensors, meta)

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> Self:
        """Read what :meth:`save` wrote and go on from there.

        Args:
            path: the file.
            fingerprint: of the model it shall serve; without it any.

        Raises:
            FileFormatError: missing, torn, changed, or of a newer format.
            ModelMismatchError: made with another model.
        """
        tensors, meta = read_tensors(path, _KIND)
        try:
            made = cls._restore(tensors, meta)
        except (KeyError, ValueError, TypeError) as error:
            raise FileFormatError(f"{path} is not whole: {error}") from error
        if fingerprint is not None and made.fingerprint is not None and made.fingerprint != fingerprint:
            raise ModelMismatchError(
                f"The drift reference {path} is of the model {made.fingerprint[:12]}, and this is {fingerprint[:12]}.",
                hint="Calibrate with this model.",
            )
        return made

    @classmethod
    def _restore(cls, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> Self:
        axes = _Axes(tensors["mean"], tensors["axes"], float(meta["rest"])) if "axes" in tensors else None
        made = cls(
            tuple(meta["names"]),
            tensors["edges"],
            tensors["ties"],
            tensors["sizes"],
            axes,
            alpha=float(meta["alpha"]),
            seed=int(meta["seed"]),
            fingerprint=meta["fingerprint"],
        )
        made._bets.restore(int(meta["n"]), tensors["live"], tensors["started"], tensors["largest"])
        made._alarm_at = meta["alarm_at"]
        made._random = np.random.default_rng((made._seed, made._bets.n + 2))
        return made


def _tenths(counts: Ints) -> Floats:
    """``[s, bins]`` counts to ``[s, 10]`` shares of neighbouring bins taken together."""
    starts = np.arange(10) * counts.shape[1] // 10
    sums = np.add.reduceat(counts, starts, axis=1).astype(np.float64)
    return np.asarray(sums / np.maximum(sums.sum(1, keepdims=True), 1.0))


def _check_finite(values: Floats, name: str) -> None:
    if not np.isfinite(values).all():
        raise InvalidInputError(f"A {name} is not finite.")
