"""What a router decided for one request, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kvroute.generation import Generation, Usage
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.heads.neighbours import Neighbour


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of mode in mid-answer.

    Attributes:
        to: the mode that was entered.
        token: how many tokens had been written.
        difficulty: read there, in [0, 100].
        threshold: that decided.
        forced: tokens of the phrase that was put in; they are among the answer's tokens.
    """

    to: Mode
    token: int
    difficulty: float
    threshold: float
    forced: int


@dataclass(slots=True)
class Decision:
    """The choice of one request.

    Attributes:
        mode: ``fast`` or ``slow`` as it began, or the name of another target.
        difficulty: of the prompt, in [0, 100], higher is harder; None where none was read.
        threshold: that decided, or None.
        probability: calibrated probability that the fast answer is right, or None.
        why: ``difficulty``, ``forced``, ``policy`` (fixed, random, length), ``budget``, ``margin``, ``shadow`` or
            ``fault``.
        policy: the policy's kind.
        proposed: in shadow, what would have been taken.
        switch: the change in mid-answer, or None. In shadow the one that would have been.
        checkpoints: (tokens written, difficulty) at every look in mid-answer.
        fault: what went wrong where ``why`` is ``fault``, or where a checkpoint could not be read.
        nearest: with ``explain``, the nearest labelled questions.
        seconds: spent on deciding; a batch's are shared by its requests.
    """

    mode: str
    difficulty: float | None = None
    threshold: float | None = None
    probability: float | None = None
    why: Literal["difficulty", "forced", "policy", "budget", "margin", "shadow", "fault"] = "policy"
    policy: str = ""
    proposed: str | None = None
    switch: Switch | None = None
    checkpoints: list[tuple[int, float]] = field(default_factory=list)
    fault: str | None = None
    nearest: list[Neighbour] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def final_mode(self) -> str:
        """The mode the answer ended in."""
        return self.switch.to if self.switch is not None and self.why != "shadow" else self.mode

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "final_mode": self.final_mode}


@dataclass(frozen=True, slots=True)
class Routed:
    """An answer and the decision behind it.

    Attributes:
        text: all that was written behind the mode's tokens, thought included.
        thought: the thought, without marks; empty in fast mode.
        answer: what stands behind it.
        decision: which mode, and why.
        generation: the engine's own account, with tokens, features and timings.
        confidence: probability that the answer is right, from a trained head; None without one.
        confidence_reason: why there is none.
    """

    text: str
    thought: str
    answer: str
    decision: Decision
    generation: Generation
    confidence: float | None = None
    confidence_reason: str | None = None

    @property
    def usage(self) -> Usage:
        """Tokens: ``computed`` are those that went through the model, each once."""
        return self.generation.usage

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without features."""
        return {
            "text": self.text,
            "thought": self.thought,
            "answer": self.answer,
            "decision": self.decision.to_dict(),
            "finish_reason": self.generation.finish_reason,
            "usage": asdict(self.usage),
            "confidence": self.confidence,
            "confidence_reason": self.confidence_reason,
        }


@dataclass(frozen=True, slots=True)
class RoutedChunk:
    """A piece of an answer that is being written.

    Attributes:
        index: which prompt it belongs to.
        text: new text; may be empty.
        token_id: the new token, or None in a piece that only flushes text.
        phase: whether it belongs to the thought or to the answer.
        forced: whether the router put it in.
        routed: in the last piece of each answer, the whole of it.
    """

    index: int
    text: str
    token_id: int | None
    phase: Literal["thought", "answer"]
    forced: bool = False
    routed: Routed | None = None
