"""What a request gets back: the value of ``kv_transfer_params["kvroute"]`` in its output, typed.

{"features": {name: [numbers]}, "scores": {name: {"value": number | null, "reason": text | null}},
 "confidence": {"value": ..., "reason": ...} | null, "decision": {...} | null,
 "tokens": {"prompt": n, "answer": n, "thought": n | null}, "faults": [text], "error": text | null}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvroute.decisions import Decision, Switch
from kvroute.errors import InvalidInputError, KVRouteError, fault_text
from kvroute.scores import Score

Vector = np.ndarray[Any, np.dtype[np.float32]]

PENDING: Final = "pending"
"""In a result that vLLM itself brings: it comes a step later, by the mailbox."""
_LONGEST: Final = 300
_LARGEST: Final = float(np.finfo(np.float32).max)
_PATHS = re.compile(
    r"""(?P<quote>["'])(?:file:/|~?/|\.{1,2}/|[A-Za-z]:\\).*?(?P=quote)"""  # quoted ones may hold spaces
    r"""|(?<![\w/])(?:file:/|~|\.{1,2})?/[^\s"',;)]+|\b[A-Za-z]:\\[^\s"',;)]+"""
)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens by phase.

    Attributes:
        prompt: of the prompt.
        answer: written behind it, thought, forced tokens and end token included.
        thought: of these, those of the thought; None where thought and answer can't be told apart.
    """

    prompt: int = 0
    answer: int = 0
    thought: int | None = None


@dataclass(slots=True)
class Result:
    """What kvroute has to say about one request. A fault costs it what it befell, never the answer.

    Attributes:
        features: pooled vectors ``[dim]`` by the request's names.
        scores: by their names in :data:`kvroute.SCORES`.
        confidence: probability in [0, 1] that the answer is right; None where it was not asked for.
        decision: how the request was to think; None where no policy was asked and no mode demanded.
        tokens: by phase.
        faults: what went wrong on the way, in words.
        error: why nothing was done at all, or None.
    """

    features: dict[str, Vector] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    confidence: Score | None = None
    decision: Decision | None = None
    tokens: Tokens = field(default_factory=Tokens)
    faults: list[str] = field(default_factory=list)
    error: str | None = None

    @classmethod
    def failed(cls, error: Exception, tokens: Tokens | None = None) -> Self:
        """Of a request that nothing was done for."""
        return cls(error=public_text(error), tokens=tokens or Tokens())

    @property
    def undecided(self) -> bool:
        """Whether a fault cost the request its decision."""
        return self.decision is not None and self.decision.fault is not None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for a client: no NaN, no infinity, no path, and of a decision not the training questions."""
        faults = [clean(fault) for fault in self.faults]
        features = {}
        for name, vector in self.features.items():
            if np.isfinite(vector).all():
                features[name] = np.asarray(vector, dtype=np.float32).tolist()
            else:
                faults.append(f"The feature {name!r} is not finite.")
        return {
            "features": features,
            "scores": {name: _score(score) for name, score in self.scores.items()},
            "confidence": None if self.confidence is None else _score(self.confidence),
            "decision": None if self.decision is None else _decision(self.decision),
            "tokens": asdict(self.tokens),
            "faults": faults,
            "error": None if self.error is None else clean(self.error),
        }

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` gave, on the client's side. Keys of a newer server are passed over.

        Raises:
            InvalidInputError: it is no such result.
        """
        try:
            wire = _Wire.model_validate(body)
            scores = {name: Score(**dict(score)) for name, score in wire.scores.items()}
            confidence = None if wire.confidence is None else Score(**dict(wire.confidence))
        except (ValidationError, ValueError) as error:
            raise InvalidInputError(
                f"This is no result of kvroute: {str(error)[:_LONGEST]}", hint="Does the server run this kvroute?"
            ) from error
        features = {name: np.asarray(vector, dtype=np.float32) for name, vector in wire.features.items()}
        decision = None if wire.decision is None else wire.decision.typed()
        return cls(features, scores, confidence, decision, Tokens(**dict(wire.tokens)), wire.faults, wire.error)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            InvalidInputError: it is no JSON, or no such result.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"This is no JSON: {str(error)[:_LONGEST]}") from error
        return cls.from_dict(body)


def public_text(error: Exception) -> str:
    """An error in words that may leave the server: those of our own without paths; of others the kind alone."""
    return clean(fault_text(error)) if isinstance(error, KVRouteError) else f"{type(error).__name__} inside kvroute."


def clean(text: str) -> str:
    """A text without what looks like a path, at most 300 characters."""
    bare = _PATHS.sub("<path>", text[: 4 * _LONGEST])
    return bare if len(bare) <= _LONGEST else f"{bare[: _LONGEST - 3]}..."


def _score(score: Score) -> dict[str, Any]:
    return {
        "value": None if score.value is None else float(score.value),
        "reason": None if score.reason is None else clean(score.reason),
    }


def _decision(decision: Decision) -> dict[str, Any]:
    switch = decision.switch
    return {
        "mode": decision.mode,
        "final_mode": decision.final_mode,
        "difficulty": _number(decision.difficulty),
        "threshold": _number(decision.threshold),
        "probability": _number(decision.probability),
        "why": decision.why,
        "policy": decision.policy,
        "proposed": decision.proposed,
        "switch": None
        if switch is None
        else {
            "to": switch.to,
            "token": int(switch.token),
            "difficulty": _number(switch.difficulty),
            "threshold": _number(switch.threshold),
            "forced": int(switch.forced),
        },
        "checkpoints": [[int(token), _number(difficulty)] for token, difficulty in decision.checkpoints],
        "fault": None if decision.fault is None else clean(decision.fault),
        "seconds": _number(decision.seconds),
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


# ---------------------------------------------------------------------- reading it back


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _ScoreWire(_Part):
    value: float | None = None
    reason: str | None = None


class _TokensWire(_Part):
    prompt: int = Field(default=0, ge=0)
    answer: int = Field(default=0, ge=0)
    thought: int | None = Field(default=None, ge=0)


class _SwitchWire(_Part):
    to: Literal["fast", "slow"]
    token: int
    difficulty: float | None
    threshold: float | None
    forced: int

    def typed(self) -> Switch:
        return Switch(self.to, self.token, _or_nan(self.difficulty), _or_nan(self.threshold), self.forced)


class _DecisionWire(_Part):
    mode: str
    difficulty: float | None = None
    threshold: float | None = None
    probability: float | None = None
    why: Literal["difficulty", "forced", "policy", "budget", "margin", "shadow", "fault"] = "policy"
    policy: str = ""
    proposed: str | None = None
    switch: _SwitchWire | None = None
    checkpoints: list[tuple[int, float | None]] = Field(default_factory=list)
    fault: str | None = None
    seconds: float | None = None

    def typed(self) -> Decision:
        plain = {name: getattr(self, name) for name in ("mode", "difficulty", "threshold", "probability", "why")}
        return Decision(
            **plain,
            policy=self.policy,
            proposed=self.proposed,
            switch=None if self.switch is None else self.switch.typed(),
            checkpoints=[(token, _or_nan(difficulty)) for token, difficulty in self.checkpoints],
            fault=self.fault,
            seconds=self.seconds or 0.0,
        )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


class _Wire(_Part):
    features: dict[str, list[Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]]] = Field(default_factory=dict)
    scores: dict[str, _ScoreWire] = Field(default_factory=dict)
    confidence: _ScoreWire | None = None
    decision: _DecisionWire | None = None
    tokens: _TokensWire = Field(default_factory=_TokensWire)
    faults: list[str] = Field(default_factory=list)
    error: str | None = None
