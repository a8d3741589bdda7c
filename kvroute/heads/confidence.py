"""A trained confidence applied to answers: one that can't be judged has none and a reason, and costs others nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvroute.errors import KVRouteError
from kvroute.pooling import pool

if TYPE_CHECKING:
    from kvroute.heads.head import DifficultyHead
    from kvroute.heads.models import Vectors
    from kvroute_kernels import KVView

Confidence = tuple[float | None, str | None]
"""A probability in [0, 1] and None, or None and the reason why there is none."""


def vector_confidence(head: DifficultyHead, vector: Vectors) -> Confidence:
    """Of one answer's pooled vector ``[dim]``."""
    try:
        return float(head.predict(vector[None])[0]), None
    except KVRouteError as error:
        return None, str(error)


def pooled_confidences(
    head: DifficultyHead, view: KVView, spans: Sequence[tuple[int, int]], num_layers: int
) -> list[Confidence]:
    """Of answers in a cache.

    Args:
        head: a head with target ``correct``.
        view: the cache.
        spans: of each answer its first token and one past the last that has keys and values.
        num_layers: attention layers of the model.
    """
    whole = [b for b, (start, stop) in enumerate(spans) if start < stop]
    found: list[Confidence] = [(None, "the answer has one token, and its last token has no keys and values")] * len(
        spans
    )
    if not whole:
        return found
    part = view if len(whole) == len(spans) else view.select_sequences(whole)
    start, stop = [spans[b][0] for b in whole], [spans[b][1] for b in whole]
    try:
        vectors = pool(part, head.spec, num_layers=num_layers, start=start, stop=stop).float().cpu().numpy()
    except KVRouteError as error:
        if len(whole) > 1:  # the fault of one answer: the others have a confidence
            for b in whole:
                found[b] = pooled_confidences(head, view.select_sequences([b]), [spans[b]], num_layers)[0]
        else:
            found[whole[0]] = None, str(error)
        return found
    for b, vector in zip(whole, vectors, strict=True):
        found[b] = vector_confidence(head, vector)
    return found
