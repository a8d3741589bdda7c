"""What is known about one answer: scores, a confidence, and what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvroute.generation import Usage
from kvroute.scores import Score


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What is known about one answer.

    Attributes:
        scores: by their names in :data:`kvroute.SCORES`, in the order they were asked for.
        confidence: how likely the answer is right, in [0, 1]: the head's where there is a head, else the calibrator's.
            None without either, or where what it reads is missing. Never an uncalibrated number.
        confidence_reason: why there is no confidence.
        usage: tokens; ``computed`` are those that went through the model for the scores.
        seconds: of the batches it was computed in.
        confidences: where there is a head, its confidence (``head``) and the calibrator's (``calibrator``) side by
            side, as far as there are.
    """

    scores: dict[str, Score]
    confidence: float | None
    confidence_reason: str | None
    usage: Usage
    seconds: float
    confidences: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: values and reasons apart. With ``correct`` beside it, a row to calibrate on."""
        return {
            "scores": {name: score.value for name, score in self.scores.items()},
            "reasons": {name: score.reason for name, score in self.scores.items() if score.reason is not None},
            "confidence": self.confidence,
            "confidence_reason": self.confidence_reason,
            "usage": asdict(self.usage),
            "seconds": self.seconds,
            **({"confidences": self.confidences} if self.confidences else {}),
        }
