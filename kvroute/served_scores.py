"""Scores of answers that exist, read inside vLLM: what :mod:`kvroute.reading_scores` is for caches at hand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Final

from kvroute.features import AnswerPooling
from kvroute.heads.confidence import Confidence, vector_confidence
from kvroute.scores import Score, family

if TYPE_CHECKING:
    from kvroute.heads.head import DifficultyHead
    from kvroute.serving.vllm_base import VLLMBase

_HEAD, _CHAIN = "confidence", "kv-coe"
_ELSEWHERE: Final = "vLLM gives no {} of an answer that exists; TransformersEngine does"
_WHAT: Final = {"logits": "logits", "hidden-coe": "hidden states"}


def served_scores(
    engine: VLLMBase,
    token_ids: Sequence[Sequence[int]],
    start: Sequence[int],
    *,
    families: Collection[str],
    head: DifficultyHead | None,
    progress: bool | None,
) -> list[tuple[dict[str, Score], Confidence]]:
    """Of each answer its scores, and its confidence by a head.

    Args:
        engine: where it is read.
        token_ids: prompt and answer of each.
        start: where each answer begins.
        families: families of scores; what vLLM can't give is None with a reason.
        head: a head with target ``correct``, or None.
        progress: whether to show a bar; by default on a terminal.

    Raises:
        as ``engine.answer_features``.
    """
    asked: dict[str, Any] = {_CHAIN: "kv-coe"} if "kv-coe" in families else {}
    if head is not None:
        asked[_HEAD] = AnswerPooling(head.spec)
    read = engine.answer_features(token_ids, start, asked, progress=progress) if asked else [None] * len(token_ids)
    missing = {n: Score(None, _ELSEWHERE.format(w)) for f, w in _WHAT.items() if f in families for n in family(f)}
    out: list[tuple[dict[str, Score], Confidence]] = []
    for answer in read:
        scores, confidence = dict(missing), (None, None)
        if answer is not None and "kv-coe" in families:
            why = answer.feature_errors.get(_CHAIN, "vLLM left it out")
            scores |= {n: answer.scores.get(n, Score(None, why)) for n in family("kv-coe")}
        if answer is not None and head is not None:
            vector = answer.features.get(_HEAD)
            why = answer.feature_errors.get(_HEAD, "vLLM left the answer's vector out")
            confidence = (None, why) if vector is None else vector_confidence(head, vector)  # type: ignore[assignment]
        out.append((scores, confidence))
    return out
