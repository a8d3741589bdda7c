"""How likely an answer is right: what its metadata says, or what reading it gives. Callback and middleware share it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from kvroute import Evaluation, InvalidInputError, KVRouteError, SelfEvaluator
from langchain_kvroute.messages import template_messages
from langchain_kvroute.metadata import ScoreValue, kvroute_metadata

logger = logging.getLogger(__name__)

Judge = Callable[[Sequence[BaseMessage], AIMessage], float | None]
"""Messages and their answer in, the probability that it is right out; None where that can't be told."""
Evaluator = SelfEvaluator | Judge
Asked = Sequence[BaseMessage] | str

NOT_TOLD = "the model says nothing of kvroute's, and there is no evaluator"
_USAGE = (("prompt", "input_tokens"), ("answer", "output_tokens"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one answer.

    Attributes:
        confidence: probability in [0, 1] that it is right, or None.
        reason: why there is none.
        difficulty: of the prompt, in [0, 100], higher is harder, or None.
        mode: ``fast`` or ``slow``, as it ended, or None.
        scores: by the names in :data:`kvroute.SCORES`.
        tokens: of the answer as its model counted them; ``evaluated``: those that an evaluator ran to read it.
        faults: what went wrong on the way.
    """

    confidence: float | None
    reason: str | None
    difficulty: float | None = None
    mode: str | None = None
    scores: dict[str, ScoreValue] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


KEY = "kvroute_self_evaluation"


class Attempt(TypedDict):
    """One of the answers that were given to a step of an agent."""

    action: str
    """``first``, or what was done about the one before: ``retry`` or ``escalate``."""
    confidence: float | None
    reason: str | None
    """Why there is no confidence."""
    mode: str | None
    """``fast`` or ``slow``, as it ended; None where the model does not say."""
    model: str | None
    """By name, where the model says it."""
    tokens: dict[str, int]
    """As its model counted them; ``evaluated``: those that an evaluator ran to read it."""
    tool_calls: int
    fault: str | None
    """Where no answer came: the kind of the exception."""


class SelfEvaluation(TypedDict):
    """What the middleware did about an answer: ``message.response_metadata["kvroute_self_evaluation"]``. JSON-able."""

    confidence: float | None
    """In the answer that was kept."""
    reason: str | None
    """Why there is none."""
    threshold: float
    low: bool
    """Whether something is to be done about it still: it is below the threshold, or missing where that counts."""
    kept: int
    """Which of the attempts it is."""
    attempts: list[Attempt]
    """All answers that were given, and what they cost."""
    review: str | None
    """``approve`` or ``edit``, where a human looked at it."""


def self_evaluation(message: BaseMessage) -> SelfEvaluation | None:
    """What :class:`~langchain_kvroute.SelfEvaluationMiddleware` says of a message, or None."""
    found: SelfEvaluation | None = message.response_metadata.get(KEY)
    return found


def check_threshold(threshold: float) -> float:
    """It, if it is a probability.

    Raises:
        InvalidInputError: it is none.
    """
    if not 0 <= threshold <= 1:
        raise InvalidInputError(f"A threshold of confidence is in [0, 1], not {threshold}.")
    return float(threshold)


def judge(answer: AIMessage, asked: Asked, evaluator: Evaluator | None = None) -> Verdict:
    """What the answer's metadata says; without a confidence there, what the evaluator finds. Never raises.

    Args:
        answer: the message.
        asked: what it answers.
        evaluator: a :class:`~kvroute.SelfEvaluator` runs the answer's text once, behind what was asked. Thoughts and
            the declarations of tools are not part of what it reads.
    """
    told = _told(answer)
    if evaluator is None or told.confidence is not None:
        return told
    if not answer.text:
        return replace(told, reason="the answer has no text that could be read")
    try:
        if isinstance(evaluator, SelfEvaluator):
            return _read(told, evaluator.score(*_row(answer, asked), finish_reason=_finish(answer)))
        return _judged(told, evaluator([HumanMessage(asked)] if isinstance(asked, str) else asked, answer))
    except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
        return _failed(told, error)


async def ajudge(answer: AIMessage, asked: Asked, evaluator: Evaluator | None = None) -> Verdict:
    """:func:`judge`, without holding the loop up. Cancelling the task ends the work."""
    told = _told(answer)
    if evaluator is None or told.confidence is not None or not answer.text:
        return judge(answer, asked, evaluator)
    if not isinstance(evaluator, SelfEvaluator):
        return await asyncio.to_thread(judge, answer, asked, evaluator)
    try:
        return _read(told, await evaluator.ascore(*_row(answer, asked), finish_reason=_finish(answer)))
    except Exception as error:  # noqa: BLE001 - as above
        return _failed(told, error)


# ------------------------------------------------------------------ parts


def _told(answer: BaseMessage) -> Verdict:
    found = kvroute_metadata(answer)
    usage = getattr(answer, "usage_metadata", None) or {}
    tokens = {name: usage[key] for name, key in _USAGE if key in usage}
    if not isinstance(found, Mapping):
        return Verdict(None, NOT_TOLD, tokens=tokens)
    confidence = _probability(found.get("confidence"))
    reason = found.get("confidence_reason") or "the model gives no confidence"
    return Verdict(
        confidence,
        None if confidence is not None else reason,
        found.get("difficulty"),
        found.get("mode"),
        dict(found.get("scores") or {}),
        dict(found.get("tokens") or tokens),
        tuple(found.get("faults") or ()),
    )


def _read(told: Verdict, found: Evaluation) -> Verdict:
    scores: dict[str, ScoreValue] = {n: {"value": s.value, "reason": s.reason} for n, s in found.scores.items()}
    return replace(
        told,
        confidence=found.confidence,
        reason=found.confidence_reason,
        scores={**told.scores, **scores},
        tokens={**told.tokens, "evaluated": found.usage.computed},
    )


def _judged(told: Verdict, found: float | None) -> Verdict:
    if found is None:
        return replace(told, reason="the evaluator can't tell")
    confidence = _probability(found)
    if confidence is None:
        return replace(told, reason="the evaluator gave no number in [0, 1]")
    return replace(told, confidence=confidence, reason=None)


def _failed(told: Verdict, error: Exception) -> Verdict:
    # The words of other people's exceptions may hold the prompt: of those the kind alone is told, in logs of all.
    logger.warning("An answer could not be evaluated (%s).", type(error).__name__)
    reason = f"the evaluator failed: {error if isinstance(error, KVRouteError) else type(error).__name__}"
    return replace(told, reason=reason, faults=(*told.faults, reason))


def _probability(found: Any) -> float | None:
    try:
        value = float(found)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and 0 <= value <= 1 else None


def _row(answer: AIMessage, asked: Asked) -> tuple[Any, str]:
    return asked if isinstance(asked, str) else template_messages(asked), str(answer.text)


def _finish(answer: AIMessage) -> Any:
    return "length" if answer.response_metadata.get("finish_reason") == "length" else "stop"
