"""The choice: from a prompt's pooled vector to a difficulty, by the policy to a mode, and what is counted on the way.

A fault in here costs a request its decision, never its answer: the policy's fallback is taken and the decision says so.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.decisions import Decision
from kvroute.errors import InvalidInputError, fault_text
from kvroute.route_steering import Request, finite
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.drift import DriftMonitor
    from kvroute.engines.steering import Vectors
    from kvroute.heads.head import DifficultyHead
    from kvroute.heads.neighbours import Neighbour
    from kvroute.policy import Policy

logger = logging.getLogger("kvroute.router")  # a user of the router looks for its lines there


@dataclass(slots=True)
class Reading:
    """What is read off a prompt.

    Attributes:
        vector: its pooled vector ``[dim]``, or None where there is none.
        difficulty: in [0, 100], higher is harder; None where it could not be read.
        fault: why it could not.
        probability: that the fast answer is right, in [0, 1]; None where it could not be read.
        nearest: labelled questions, where they were asked for.
    """

    vector: Vectors | None
    difficulty: float | None = None
    fault: str | None = None
    probability: float | None = None
    nearest: list[Neighbour] = field(default_factory=list)


def unmet_need(policy: Policy, head: DifficultyHead | None) -> tuple[str, str] | None:
    """What a policy needs and a head does not give, and a hint; None where all is there.

    Args:
        policy: to be used.
        head: that would read its difficulties, or None.
    """
    if not policy.reads_difficulty:
        return None
    if head is None:
        return (
            f"A {policy.kind} policy reads a difficulty, and there is no head.",
            "Pass head=, or train one: kvroute train.",
        )
    if head.target != "difficulty":
        return (
            f"A {policy.kind} policy reads a difficulty, and its head has the target {head.target!r}.",
            "Train one with the target 'difficulty'.",
        )
    if policy.kind == "two-step" and head.windows is None:
        return (
            "A two-step policy looks again in mid-answer, and the head has no part for that.",
            "Label with --checkpoints and train again, or use a one-step policy.",
        )
    return None


class Chooser:
    """The part of a :class:`~kvroute.Router` that decides. It knows no model: vectors are handed to it. Thread-safe.

    Args:
        policy: what is done with a difficulty.
        head: reads the difficulty, in [0, 100] and higher for harder, from a vector ``[dim]``; None where the policy
            reads none.
        drift: watches the requests that are decided, or None.
    """

    def __init__(self, policy: Policy, head: DifficultyHead | None, drift: DriftMonitor | None) -> None:
        self.policy = policy
        self.head = head
        self.drift = drift
        self.counts: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=policy.window)
        self._recent_slow: deque[bool] = deque(maxlen=policy.window)
        self._lock = threading.Lock()

    def choose(
        self,
        requests: Sequence[Request],
        vectors: Sequence[Vectors | None] | None,
        *,
        faults: Sequence[str | None] = (),
        explain: bool,
        began: float,
    ) -> None:
        """Fill in the decisions of requests.

        Args:
            requests: those to decide.
            vectors: by request its prompt's pooled vector ``[dim]``, or None where there is none; None altogether where
                the policy reads no difficulty.
            faults: by request why it has no vector.
            explain: name the nearest labelled questions.
            began: when the work on them did.
        """
        given = vectors if vectors is not None else [None] * len(requests)
        readings = [Reading(v, fault=f) for v, f in zip(given, faults or [None] * len(requests), strict=True)]
        if self.head is not None:
            self._read(self.head, [r for r in readings if r.vector is not None], explain=explain)
        for request, reading in zip(requests, readings, strict=True):
            request.decision = self._decide(request, reading.difficulty, reading.fault)
            request.decision.probability = reading.probability
            request.decision.nearest = reading.nearest
        seconds = (time.perf_counter() - began) / max(len(requests), 1)
        for request in requests:
            request.decision.seconds = seconds
            with self._lock:
                self.counts[f"mode:{request.decision.mode}"] += 1
            if request.decision.why == "shadow":
                d = request.decision
                logger.info("shadow: %s would be taken at difficulty %s", d.proposed, d.difficulty)

    def _read(self, head: DifficultyHead, readings: list[Reading], *, explain: bool) -> None:
        """Fill in what the head says of vectors. What can't be read of one stays away from it, and from no other."""
        if not readings:
            return
        read, faults = self.each(
            "the head", len(readings), lambda rows: finite(head.predict(_stacked(readings[i] for i in rows)))
        )
        for reading, difficulty, fault in zip(readings, read, faults, strict=True):
            reading.difficulty, reading.fault = None if difficulty is None else float(difficulty), fault
        readings = [r for r in readings if r.difficulty is not None]
        if not readings:
            return
        self._watch(readings)
        values = np.array([r.difficulty for r in readings])
        probabilities, _ = self.each(
            "the probability of a difficulty",
            len(readings),
            lambda rows: finite(head.probability(values[rows])),
            then="the decision has none",
        )
        for reading, probability in zip(readings, probabilities, strict=True):
            reading.probability = None if probability is None else float(probability)
        if explain:
            near, _ = self.each(
                "the nearest questions",
                len(readings),
                lambda rows: head.nearest(_stacked(readings[i] for i in rows)),
                then="the decision names none",
            )
            for reading, neighbours in zip(readings, near, strict=True):
                reading.nearest = neighbours or []

    def _decide(self, request: Request, difficulty: float | None, fault: str | None) -> Decision:
        policy = self.policy
        decision = Decision(mode=policy.fallback, difficulty=difficulty, policy=policy.kind)
        if request.forced is not None:
            decision.mode, decision.why = request.forced, "forced"
            return decision
        if policy.kind in ("fast", "slow"):
            decision.mode = policy.kind
        elif policy.kind == "random":
            decision.mode = "slow" if _uniform(request.layout.base, policy.seed) < policy.share else "fast"
        elif policy.kind == "length":
            decision.mode = "slow" if len(request.layout.base) > policy.length else "fast"
            decision.threshold = float(policy.length)
        elif difficulty is None:
            decision.why, decision.fault = "fault", fault or "no difficulty"
            return decision
        elif policy.kind == "budget":
            decision.mode, decision.threshold = self._within_budget(difficulty)
            decision.why = "budget"
        else:
            decision.mode, decision.threshold = policy.target_of(difficulty)
            decision.why = "difficulty"
            if request.last not in (None, decision.mode) and request.last in policy.targets_near(difficulty):
                decision.mode, decision.why = request.last, "margin"
        if policy.shadow:
            decision.proposed, decision.mode, decision.why = decision.mode, policy.fallback, "shadow"
        return decision

    def _within_budget(self, difficulty: float) -> tuple[Mode, float]:
        """Slow for the hardest ``share`` of the last ``window`` requests, and never for more than that."""
        policy = self.policy
        with self._lock:
            self._recent.append(difficulty)
            threshold = float(np.quantile(np.array(self._recent), 1 - policy.share))
            seen = len(self._recent)
            older = list(self._recent_slow)[-(policy.window - 1) :] if policy.window > 1 else []
            # Many may have the same difficulty: those at the threshold count, as far as the share goes.
            slow = difficulty >= threshold and sum(older) + 1 <= np.ceil(policy.share * seen)
            self._recent_slow.append(slow)
        return ("slow" if slow else "fast"), threshold

    # ------------------------------------------------------------------ faults and counts

    def each(
        self, what: str, count: int, work: Callable[[list[int]], Any], *, then: str | None = None
    ) -> tuple[list[Any], list[str | None]]:
        """What ``work`` gives for each of some rows: for all at once or, where that fails, for each alone.

        So a fault stays with its row; it is counted and logged.

        Returns:
            by row the result or None, and the fault in words or None.
        """
        rows = list(range(count))
        try:
            return _one_each(work(rows), count), [None] * count
        except Exception as error:  # noqa: BLE001 - an answer is worth more than a decision
            if count == 1:
                return [None], [self.note_fault(what, error, then=then)]
        found: list[Any] = [None] * count
        faults: list[str | None] = [None] * count
        last: Exception | None = None
        for i in rows:
            try:
                found[i] = _one_each(work([i]), 1)[0]
            except Exception as error:  # noqa: BLE001
                faults[i], last = fault_text(error), error
        if last is not None:
            self.note_fault(what, last, then=then, count=sum(f is not None for f in faults))
        return found, faults

    def note_fault(self, what: str, error: Exception, *, then: str | None = None, count: int = 1) -> str:
        """Count a fault and log it in one line; returns it in words.

        Args:
            what: what could not be read.
            error: why.
            then: what is done about it; by default the fallback is taken.
            count: requests that it befell.
        """
        text = fault_text(error)
        with self._lock:
            self.counts["faults"] += count
        logger.warning(
            "kvroute could not read %s%s (%s): %s.",
            what,
            f" of {count} requests" if count > 1 else "",
            text,
            then or f"{self.policy.fallback} thinking is used",
        )
        return text

    def note_switch(self, by: int = 1) -> None:
        """Count a switch; or take it back, where its answer is written again."""
        with self._lock:
            self.counts["switches"] += by

    def _watch(self, readings: Sequence[Reading]) -> None:
        if self.drift is None:
            return
        try:
            self.drift.update_many(np.array([r.difficulty for r in readings]), _stacked(readings))
        except Exception as error:  # noqa: BLE001 - watching must not cost an answer
            self.note_fault("the drift reference", error, then="these requests are not watched")


def _stacked(readings: Iterable[Reading]) -> Vectors:
    return np.stack([r.vector for r in readings if r.vector is not None])


def _one_each(found: Any, count: int) -> list[Any]:
    listed = list(found)
    if len(listed) != count:
        raise InvalidInputError(f"{count} rows gave {len(listed)} results.")
    return listed


def _uniform(ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that depends on a prompt's tokens and a seed alone."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56
