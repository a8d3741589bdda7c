"""What a router gives for one prompt: thought and answer apart, a confidence; or another target's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvroute.decisions import Decision, Routed
from kvroute.errors import InvalidInputError
from kvroute.features import AnswerPooling, named_features
from kvroute.generation import CancelToken, Generation, Prompt, SamplingOptions
from kvroute.route_steering import Request, finite
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.router import Router

_CONFIDENCE = "kvroute:confidence"


def with_confidence(router: Router, features: Any) -> Any:
    """The features that a caller asks for and, with a confidence head, what that reads of an answer."""
    if router.confidence is None:
        return features
    named = named_features(features)
    return {**named, _CONFIDENCE: AnswerPooling(router.confidence.spec)}


def routed_answer(router: Router, request: Request, generation: Generation) -> Routed:
    """What the router's own model wrote, with its decision.

    A fault of the confidence head costs the answer its confidence, in [0, 1] and higher for likelier right; the reason
    is beside it then.
    """
    if not request.decision.mode:
        undecided = "The work was cancelled before it was decided."
        request.decision = Decision(router.policy.fallback, why="fault", policy=router.policy.kind, fault=undecided)
    decision = request.decision
    confidence: float | None = None
    reason: str | None = None if router.confidence else "no confidence head was given"
    if router.served_confidence is not None:
        told = None if generation.served is None else generation.served.confidence
        confidence, reason = (None, "the engine told none") if told is None else (told.value, told.reason)
    if router.confidence is not None:
        features, errors = dict(generation.features), dict(generation.feature_errors)
        vector, reason = features.pop(_CONFIDENCE, None), errors.pop(_CONFIDENCE, "the answer has no features")
        if vector is not None:
            try:
                confidence, reason = float(finite(router.confidence.predict(vector[None]))[0]), None
            except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
                reason = router.note_fault("an answer's confidence", error, then="it has none")
        generation = replace(generation, features=features, feature_errors=errors)
    ended: Mode = "slow" if request.mode == "slow" and not request.closed else "fast"
    thought, answer = router.thinking.split(generation.text, mode=ended)
    return Routed(generation.text, thought, answer, decision, generation, confidence, reason)


def target_answer(
    router: Router, request: Request, prompt: Prompt, options: SamplingOptions, cancel: CancelToken | None
) -> Routed:
    """Another target's answer to a prompt that was sent there.

    Raises:
        InvalidInputError: the target gives neither a Generation nor a Routed. What it raises itself goes through.
    """
    more = {} if cancel is None else {"cancel": cancel}
    found = router.targets[request.decision.mode].generate(prompt, options=options, **more)
    return _from_target(found, request.decision)


def target_answers(
    router: Router, request: Request, prompts: Sequence[Prompt], options: SamplingOptions, cancel: CancelToken | None
) -> list[Routed]:
    """Another target's answers to prompts that share a decision. Raises as :func:`target_answer`."""
    more = {} if cancel is None else {"cancel": cancel}
    found = router.targets[request.decision.mode].generate(list(prompts), options=options, **more)
    return [_from_target(one, request.decision) for one in found]


def _from_target(found: Any, decision: Decision) -> Routed:
    """What another target answered, with the decision that sent the prompt there."""
    if isinstance(found, Routed):
        return replace(found, decision=decision)
    if isinstance(found, Generation):
        return Routed(found.text, "", found.text, decision, found, None, "another model wrote the answer")
    raise InvalidInputError(f"A target answers with a Generation or a Routed, not {type(found).__name__}.")
