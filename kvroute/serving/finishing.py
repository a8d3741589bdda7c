"""From what the workers read of a request to its result: vectors, chain scores, confidence."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from kvroute.chains import (
    NO_TOKEN,
    NOT_FINITE,
    ChainScores,
    named_scores,
    no_score,
    scores_of_steps,
    too_short,
)
from kvroute.errors import KVRouteError
from kvroute.pooling import PoolingSpec, reduced
from kvroute.route_steering import finite
from kvroute.scores import Score
from kvroute.serving.answers import Result, public_text
from kvroute.serving.asks import CONFIDENCE
from kvroute.serving.feeding import feature_key
from kvroute.serving.kept_requests import KeptRequest
from kvroute.serving.messages import Array

Fault = Callable[[Exception | None, str], None]
"""Told of a fault: the exception, if there is one to be logged, and its kind."""
LOST = "The numbers that the workers read of it did not all arrive."
GONE = "The answer was not read to its end: the engine had taken its pages for another one."


def finish(state: KeptRequest, result: Result, answer: int, fault: Fault) -> None:
    """Fill a result with what was read of a request that ended without an error.

    Args:
        state: what is known of it.
        result: takes features, scores, confidence and faults.
        answer: tokens of its answer.
        fault: is told of each fault.
    """
    assert state.plan is not None
    missing = GONE if state.gone else LOST if is_missing(state, answer) else None
    if missing == GONE:
        result.faults.append(GONE)
    elif missing == LOST:
        fault(None, "lost")
    for name, (of, spec) in state.vectors.items():
        found = state.sums.get(feature_key(of, spec))
        if of == "answer" and missing is not None:
            if name == CONFIDENCE:
                result.confidence = Score(None, missing)
            else:
                result.faults.append(f"{name}: {missing}")
            continue
        if name == CONFIDENCE:
            result.confidence = confidence(state, None if found is None else pooled_vector(spec, *found), fault)
            continue
        if found is None:
            what = "prompt was not read to its end" if of == "prompt" else "answer has no token with keys and values"
            result.faults.append(f"{name}: The {what}.")
            continue
        vector = pooled_vector(spec, *found)
        if np.isfinite(vector).all():
            result.features[name] = vector
        else:
            result.faults.append(f"{name}: The cache holds values that are not finite.")
            fault(None, "not finite")
    if state.plan.chain is not None:
        result.scores |= (
            chain_results(state.steps, state.ends)
            if missing is None
            else named_scores(no_score(missing), no_score(missing))
        )
    if state.plan.length:
        result.scores["length"] = Score(float(answer))


def is_missing(state: KeptRequest, answer: int) -> bool:
    """Whether steps of the answer are missing in what the workers read: then it is of other tokens than it says."""
    begin = state.answer_start
    chain = state.plan is not None and state.plan.chain is not None
    if begin is None or not state.reads_answer:
        return False
    end = state.prompt_len + answer - 1  # the last token has no keys and values
    left = state.aborted and answer <= state.given  # before its prompt was through, perhaps
    if not left and begin < end and state.read < end:
        return True
    return chain and sum(map(len, state.steps)) != max(state.read - begin, 0)


def confidence(state: KeptRequest, vector: Array | None, fault: Fault) -> Score:
    """That an answer is right, in [0, 1]; or none and the reason."""
    assert state.confidence is not None
    if vector is None:
        return Score(None, "The answer has no token with keys and values.")
    try:
        return Score(float(finite(state.confidence.predict(vector[None]))[0]))
    except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
        fault(None if isinstance(error, KVRouteError) else error, "confidence")
        return Score(None, public_text(error))


def pooled_vector(spec: PoolingSpec, keys: Array | None, values: Array | None, weight: float) -> Array:
    """A feature ``[dim]`` float32 from its sums ``[n_layers, H, D]``."""
    sums = [None if x is None else torch.from_numpy(np.array(x))[None] for x in (keys, values)]
    found: Array = reduced(spec, sums[0], sums[1], torch.tensor([weight], dtype=torch.float32))[0].numpy()
    return found


def chain_results(steps: list[Array], ends: tuple[float, Array, float] | None) -> dict[str, Score]:
    """The scores of the family ``kv-coe`` from squared lengths (see :class:`~kvroute.serving.messages.Norms`)."""
    if ends is None:
        return named_scores(no_score(too_short(0)), no_score(NO_TOKEN))
    return named_scores(scores_of_lengths(np.concatenate(steps), ends[0]), scores_of_lengths(ends[1], ends[2]))


def scores_of_lengths(steps: Array, span: float) -> ChainScores:
    """Both scores of a chain z_0..z_N.

    Args:
        steps: ``[N + 1, 2]``, |z_i - z_{i-1}|^2 (the first is not looked at) and |z_i|^2.
        span: |z_N - z_0|^2.
    """
    if len(steps) < 3:
        return no_score(too_short(len(steps)))
    if not np.isfinite(steps).all() or not math.isfinite(span):
        return no_score(NOT_FINITE)
    square = torch.from_numpy(np.ascontiguousarray(steps))
    norm = square[:, 1].sqrt()
    angles = _angles(square[1:, 0], norm[1:], norm[:-1])
    turn = _angles(torch.tensor(span, dtype=torch.float64), norm[-1], norm[0])
    # the same two ends in a plane
    first = torch.stack([norm[0], torch.zeros_like(turn)])
    last = torch.stack([norm[-1] * turn.cos(), norm[-1] * turn.sin()])
    return scores_of_steps(square[1:, 0].sqrt(), angles, first, last, bool((norm == 0).any()))


def _angles(square: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles of vectors with norms a and b, a root of ``square`` apart: as exact near 0 as that distance is."""
    low = (square - (a - b) ** 2).clamp_min(0)
    high = ((a + b) ** 2 - square).clamp_min(0)
    return 2 * torch.atan2(low.sqrt(), high.sqrt())
