"""What kvroute says of an answer, in one form for every way it came: ``message.response_metadata["kvroute"]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

from langchain_core.messages import BaseMessage

from kvroute import Decision, Generation, Routed, Score, Usage

KEY = "kvroute"


class ScoreValue(TypedDict):
    """A score, or None and why there is none."""

    value: float | None
    reason: str | None


class KVRouteMetadata(TypedDict):
    """Of one answer; JSON-able."""

    difficulty: float | None
    """Of the prompt, in [0, 100], higher is harder; None where none was read."""
    mode: str | None
    """``fast`` or ``slow``, as it ended; None where nothing was decided."""
    decision: dict[str, Any] | None
    """As :meth:`kvroute.Decision.to_dict`: why, threshold, switch, checkpoints, fault."""
    confidence: float | None
    """Probability in [0, 1] that the answer is right; None without a trained head or calibrator."""
    confidence_reason: str | None
    """Why there is none."""
    scores: dict[str, ScoreValue]
    """By the names in :data:`kvroute.SCORES`."""
    features: dict[str, list[float]]
    """Pooled vectors that were asked for, by name."""
    tokens: dict[str, int]
    """``prompt``, of these ``cached``, ``computed`` (run through the model) and ``answer``; where they are told apart,
    of the answer ``thought``."""
    faults: list[str]
    """What went wrong on the way. No fault costs the answer."""


def kvroute_metadata(message: BaseMessage) -> KVRouteMetadata | None:
    """What kvroute says of a message, or None."""
    found: KVRouteMetadata | None = message.response_metadata.get(KEY)
    return found


def _scores(scores: Mapping[str, Score]) -> dict[str, ScoreValue]:
    return {name: {"value": score.value, "reason": score.reason} for name, score in scores.items()}


def of_generation(generation: Generation) -> KVRouteMetadata:
    """Of an answer that nothing was decided about."""
    usage = asdict(generation.usage)
    return {
        "difficulty": None,
        "mode": None,
        "decision": None,
        "confidence": None,
        "confidence_reason": None,
        "scores": _scores(generation.scores),
        "features": {name: vector.tolist() for name, vector in generation.features.items()},
        "tokens": {"answer": usage.pop("generated"), **usage},
        "faults": [f"{name}: {why}" for name, why in generation.feature_errors.items()],
    }


def of_routed(routed: Routed) -> KVRouteMetadata:
    """Of a router's answer."""
    found = of_generation(routed.generation)
    decision = routed.decision
    found["difficulty"] = decision.difficulty
    found["mode"] = decision.final_mode
    found["decision"] = decision.to_dict()
    found["confidence"] = routed.confidence
    found["confidence_reason"] = routed.confidence_reason
    if decision.fault is not None:
        found["faults"].append(decision.fault)
    return found


def of_served(result: Mapping[str, Any]) -> KVRouteMetadata:
    """Of ``kv_transfer_params["kvroute"]`` in a vLLM server's answer."""
    decision = result.get("decision")
    confidence = result.get("confidence")
    faults = list(result.get("faults") or [])
    if result.get("error"):
        faults.append(result["error"])
    tokens = {name: count for name, count in (result.get("tokens") or {}).items() if isinstance(count, int)}
    return {
        "difficulty": None if decision is None else decision.get("difficulty"),
        "mode": None if decision is None else decision.get("final_mode"),
        "decision": decision,
        "confidence": None if confidence is None else confidence.get("value"),
        "confidence_reason": None if confidence is None else confidence.get("reason"),
        "scores": dict(result.get("scores") or {}),
        "features": dict(result.get("features") or {}),
        "tokens": tokens,
        "faults": faults,
    }


def of_decision(decision: Decision, usage: Usage | None) -> KVRouteMetadata:
    """Of a decision that something else answers; ``tokens`` are those that deciding cost."""
    return {
        "difficulty": decision.difficulty,
        "mode": decision.mode,
        "decision": decision.to_dict(),
        "confidence": None,
        "confidence_reason": None,
        "scores": {},
        "features": {},
        "tokens": {}
        if usage is None
        else {"prompt": usage.prompt, "cached": usage.cached, "computed": usage.computed, "answer": usage.generated},
        "faults": [] if decision.fault is None else [decision.fault],
    }
