"""Which of a step's tokens a feature counts, and how much: runs of tokens that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvroute.pooling import PoolingSpec
from kvroute.serving.messages import Array, StepRequest

Ints = np.ndarray[Any, np.dtype[np.int64]]


def window_of(spec: PoolingSpec) -> int | None:
    """Tokens of an answer that count, or None for all."""
    return 1 if spec.tokens == "last" else spec.window


class Runs(NamedTuple):
    """Tokens of one request each that follow each other and all count.

    Attributes:
        sequence: whose, by place among all requests of the step.
        start, stop: which, from the prompt's start.
        weights: of all runs, one behind the other, ``[sum of stop - start]`` float32; None where all are 1.
        row: whose, by place among the feature's requests; rising.
        total: ``[rows]`` float64, sum of each request's weights.
    """

    sequence: list[int]
    start: list[int]
    stop: list[int]
    weights: Array | None
    row: list[int]
    total: Array


def whole_runs(rows: Sequence[int], requests: Sequence[StepRequest]) -> Runs:
    """All new tokens of some requests, each with weight 1."""
    low, high = [requests[i].low for i in rows], [requests[i].high for i in rows]
    total = np.array(high, dtype=np.float64) - np.array(low, dtype=np.float64)
    return Runs(list(rows), low, high, None, list(range(len(rows))), total)


def runs_of(rows: Sequence[int], requests: Sequence[StepRequest], spec: PoolingSpec) -> Runs:
    """New tokens of some requests by a spec's weights, and those that leave its window, with negative weights."""
    some = [requests[i] for i in rows]
    low = np.array([r.low for r in some], dtype=np.int64)
    high = np.array([r.high for r in some], dtype=np.int64)
    size = high - low + np.array([r.window for r in some], dtype=np.int64)
    row = np.repeat(np.arange(len(some)), size)
    position = np.arange(len(row)) - (size.cumsum() - size)[row] + (high - size)[row]
    weights = _weights(spec, some, row, position, low, high)
    kept = np.flatnonzero(weights)
    whose, where = row[kept], position[kept]
    begins = np.flatnonzero(np.r_[True, (np.diff(whose) != 0) | (np.diff(where) != 1)]) if len(kept) else kept
    ends = np.r_[begins[1:], len(kept)].astype(np.int64) - 1 if len(kept) else kept
    total = np.bincount(row, weights=weights, minlength=len(some))
    of = whose[begins].tolist()
    return Runs(
        [rows[i] for i in of],
        where[begins].tolist(),
        (where[ends] + 1).tolist(),
        weights[kept].astype(np.float32),
        of,
        total,
    )


def _weights(spec: PoolingSpec, some: Sequence[StepRequest], row: Ints, position: Ints, low: Ints, high: Ints) -> Array:
    """``[T]`` float64, how much each token is added: negative where it leaves the window."""
    new = position >= low[row]
    window = window_of(spec)
    begin = np.array([r.answer_start for r in some], dtype=np.int64)[row]
    if spec.tokens == "first":
        sign: Array = (new & (position == begin)).astype(np.float64)
    elif window is None:
        sign = new.astype(np.float64)
    else:
        inside = position >= high[row] - window
        was = ~new & (position >= np.maximum(low[row] - window, begin))
        sign = (new & inside).astype(np.float64) - (was & ~inside)
    if spec.weights == "position":
        sign *= position + 1
    if spec.weights == "sif":
        sign *= np.concatenate([_sif(r, spec.sif_a) for r in some])
    return sign


def _sif(request: StepRequest, a: float) -> Array:
    """Weights of the tokens ``low - window..high``, which come last."""
    size = request.high - request.low + request.window
    found = request.weights[a]
    return found[len(found) - size :]
