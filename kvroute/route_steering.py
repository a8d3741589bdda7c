"""The hand that a router puts on a batch: reads difficulties, chooses modes, switches in mid-answer.

A fault in here costs a request its decision, never its answer: the policy's fallback is taken and the decision says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.decisions import Decision, Switch
from kvroute.errors import InvalidInputError
from kvroute.thinking import Layout, Mode

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.engines.steering import SteeredSession, Vectors
    from kvroute.policy import Policy
    from kvroute.router import Router

logger = logging.getLogger(__name__)

_ROOM = 4
"""Tokens that must be left behind a phrase, or a switch would leave no answer."""


@dataclass(slots=True)
class Request:
    """One prompt on its way.

    Attributes:
        layout: its tokens.
        forced: a mode that the caller demands, or None.
        last: the target of the conversation's last turn, or None.
        decision: as soon as there is one.
        mode: it is in now.
        closed: whether its thought is over.
    """

    layout: Layout
    forced: str | None = None
    last: str | None = None
    decision: Decision = field(default_factory=lambda: Decision(mode=""))
    mode: Mode = "slow"
    closed: bool = False
    seen: int = 0  # tokens that were searched for the closing mark
    looked: int = 0  # checkpoints that are behind it

    def follow(self, tokens: Sequence[int], mark: ClosingMark) -> None:
        """See whether the thought is over by now.

        Args:
            tokens: all that were written behind the mode's.
            mark: what ends a thought.
        """
        length = len(tokens)
        if not self.closed and length > self.seen:
            begin = max(0, self.seen + 1 - mark.width)
            new = tokens[begin:]  # once: the slices of a list that an engine writes to are dear
            ends = range(self.seen + 1 - begin, length + 1 - begin)
            self.closed = mark.stands(new) and any(mark.ends(new[max(0, end - mark.width) : end]) for end in ends)
        self.seen = length

    def may_switch(self) -> bool:
        """Whether a checkpoint could still change anything."""
        decision = self.decision
        if decision.why == "forced" or decision.switch is not None or decision.fault is not None:
            return False
        return self.mode != "slow" or not self.closed

    def is_checkpoint(self, held: int, every: int) -> bool:
        """Whether a look is due with ``held`` tokens behind the mode's in the cache, and was not taken yet."""
        return held % every == 0 and held // every > self.looked

    def observe(
        self, policy: Policy, written: int, difficulty: float, phrases: Mapping[Mode, Sequence[int]], room: int
    ) -> Mode | None:
        """Note a checkpoint's difficulty, and a switch where it asks for one.

        Args:
            policy: its thresholds.
            written: tokens behind the mode's, the newest included.
            difficulty: read of all but the newest, in [0, 100].
            phrases: the tokens that enter a mode.
            room: tokens the answer may still have.

        Returns:
            the mode to be entered now, or None.
        """
        self.decision.checkpoints.append((written - 1, difficulty))
        found = switch_at(policy, self.mode, difficulty)
        if found is None or not fits(phrases[found[0]], room):
            return None
        to, threshold = found
        forced = 0 if policy.shadow else len(phrases[to])
        self.decision.switch = Switch(to, written, difficulty, threshold, forced)
        if policy.shadow:
            return None
        self.mode = to
        return to


def switch_at(policy: Policy, mode: Mode, difficulty: float) -> tuple[Mode, float] | None:
    """The mode that a checkpoint's difficulty asks for and the threshold that decides, or None to go on in ``mode``."""
    if mode == "slow":
        return ("fast", policy.tau_fast) if difficulty < policy.tau_fast else None
    return ("slow", policy.tau_slow) if difficulty > policy.tau_slow else None


def fits(phrase: Sequence[int], room: int) -> bool:
    """Whether a phrase and some answer behind it fit in ``room`` tokens."""
    return len(phrase) + _ROOM <= room


class RouteSteer:
    """A :class:`~kvroute.engines.steering.Steer` for some requests.

    Args:
        router: whose policy, head and counters are used.
        requests: by the index of their prompts.
        explain: whether decisions name the nearest labelled questions.
    """

    def __init__(self, router: Router, requests: Sequence[Request], *, explain: bool = False) -> None:
        self.router = router
        self.requests = requests
        self.explain = explain

    @property
    def reserve(self) -> int:
        """Tokens of the longest mode."""
        return max((max(len(r.layout.fast), len(r.layout.slow)) for r in self.requests), default=0)

    def open(self, indices: Sequence[int]) -> RouteSteering:
        """For one batch."""
        return RouteSteering(self, [self.requests[i] for i in indices])


class RouteSteering:
    """Steers one batch."""

    def __init__(self, steer: RouteSteer, requests: list[Request]) -> None:
        self.router, self.explain = steer.router, steer.explain
        self.policy = steer.router.policy
        self.requests = requests
        for request in requests:  # a batch that was given up begins anew, with the decision it had
            decision = request.decision
            if decision.switch is not None and decision.switch.forced:
                self.router.note_switch(-1)
            decision.switch, decision.checkpoints = None, []
            if decision.why != "fault":
                decision.fault = None
            request.closed, request.seen, request.looked = False, 0, 0

    def begin(self, session: SteeredSession, rows: Sequence[int]) -> list[list[int]]:
        """Choose every row's mode from its prompt's keys and values."""
        fresh = [r for r in rows if not self.requests[r].decision.mode]
        asked = [self.requests[r] for r in fresh]
        head = self.router.head
        vectors: list[Vectors | None] | None = None
        faults: list[str | None] = []
        began = time.perf_counter()
        if self.policy.reads_difficulty and head is not None and any(r.forced is None for r in asked):
            vectors, faults = self.router.each(
                "a prompt's features", len(fresh), lambda some: session.pooled([fresh[i] for i in some], head.spec)
            )
        self.router.choose(asked, vectors, faults=faults, explain=self.explain, began=began)
        suffixes = []
        for row in rows:
            request = self.requests[row]
            target = request.decision.mode
            if target in ("fast", "slow"):
                request.mode = "fast" if target == "fast" else "slow"
                suffixes.append(request.layout.suffix(request.mode))
            else:  # another model's: nothing is written here
                suffixes.append([])
                session.end([row])
        return suffixes

    # ------------------------------------------------------------------ in flight

    def after(self, session: SteeredSession, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """At a checkpoint, look again, and switch at most once."""
        if self.policy.kind != "two-step" or self.router.head is None or self.router.head.windows is None:
            return {}
        due = [r for r in rows if self._due(session, r)]
        if not due:
            return {}
        began = time.perf_counter()
        windows = self.router.head.windows
        found, faults = self.router.each(
            "a checkpoint's features",
            len(due),
            lambda some: finite(windows.predict(session.pooled([due[i] for i in some], windows.spec))),
            then="the mode is kept",
        )
        forced: dict[int, Sequence[int]] = {}
        for r, difficulty, fault in zip(due, found, faults, strict=True):
            self.requests[r].decision.fault = fault
            phrase = None if difficulty is None else self._look(session, r, float(difficulty))
            if phrase is not None:
                forced[r] = phrase
        seconds = (time.perf_counter() - began) / len(due)
        for r in due:
            self.requests[r].decision.seconds += seconds
        return forced

    def _due(self, session: SteeredSession, row: int) -> bool:
        request = self.requests[row]
        tokens = session.tokens_of(row)
        request.follow(tokens, self.router.closing)
        # The token that was just chosen has no keys and values yet: the look covers those before it.
        held = len(tokens) - 1
        if not request.may_switch() or not request.is_checkpoint(held, self.policy.every):
            return False
        request.looked = held // self.policy.every
        return True

    def _look(self, session: SteeredSession, row: int, difficulty: float) -> Sequence[int] | None:
        written, phrases = len(session.tokens_of(row)), self.router.phrases
        to = self.requests[row].observe(self.policy, written, difficulty, phrases, session.room(row))
        if to is None:
            return None
        self.router.note_switch()
        return phrases[to]


class ClosingMark:
    """Finds the end of a thought among tokens.

    Args:
        engine: the model.
        text: what ends every thought, or None where nothing does.
    """

    def __init__(self, engine: Engine, text: str | None) -> None:
        self._tokenizer = engine.tokenizer
        self._text = (text or "").strip()
        self._ids = engine.tokenize_texts([self._text], special_tokens=False)[0] if self._text else []
        self.width = 1 if len(self._ids) <= 1 else len(self._text.encode()) + 1
        """Tokens that are enough to see it."""

    @property
    def exists(self) -> bool:
        """Whether anything ends a thought."""
        return bool(self._ids)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether it stands in the last tokens. One of several tokens may be cut in other places: its text counts."""
        if len(self._ids) <= 1:
            return bool(self._ids) and list(tokens[-1:]) == self._ids
        return self._text in str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def stands(self, tokens: Sequence[int]) -> bool:
        """Whether it stands anywhere in some tokens."""
        return self._ids[0] in tokens if len(self._ids) == 1 else self.exists and self.ends(tokens)

    def find(self, tokens: Sequence[int]) -> int | None:
        """How many tokens there are up to the end of the first one, or None where there is none."""
        if not self.stands(tokens):
            return None
        if len(self._ids) == 1:
            return tokens.index(self._ids[0]) + 1
        low, high = 0, len(tokens)  # it is in the first `high`, and not in the first `low`
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.ends(tokens[:middle]) else (middle, high)
        return high


def finite(numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The numbers of a head.

    Raises:
        InvalidInputError: one is NaN or infinite.
    """
    found = np.asarray(numbers, dtype=np.float64)
    if not np.isfinite(found).all():
        raise InvalidInputError("The head gave NaN or infinity.")
    return found
