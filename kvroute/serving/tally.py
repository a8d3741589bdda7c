"""What the scheduler's side counts, and hands over with each step's statistics: for metrics, and results for clients.

Plain dicts of numbers and texts, as they cross processes. Labels come from our own words and from the names of served
policies, never from a request, so there are few of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from kvroute.serving.answers import Result
    from kvroute.serving.asks import Ask

Side = Literal["scheduler", "worker"]
COUNTS: Final[dict[str, tuple[str, ...]]] = {
    "asks": ("asked",),
    "decisions": ("policy", "mode", "why"),
    "switches": ("policy", "to"),
    "faults": ("kind",),
    "seconds": ("side",),
}
"""What is counted, and the labels of each; in a payload a key is the labels' values joined by :data:`SEPARATOR`."""
VALUES: Final = ("difficulty", "confidence")
"""What is listed value by value."""
SEPARATOR: Final = "|"
_EVERY: Final = 1.0
"""Seconds between payloads that hold nothing but time spent."""


class Tally:
    """Counts between two payloads. Not for several threads.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in COUNTS}
        self._seconds: dict[Side, float] = {"scheduler": 0.0, "worker": 0.0}
        self._values: dict[str, list[float]] = {name: [] for name in VALUES}
        self._results: dict[str, dict[str, Any]] = {}
        self._off: bool | None = None
        self._was_off = False
        self._held: dict[Side, int] = {"scheduler": 0, "worker": 0}
        self._held_sent = dict(self._held)
        self._sent = clock()

    def asked(self, ask: Ask) -> None:
        """A request asks for something."""
        asks = self._counts["asks"]
        asks.update(name for name in ("features", "policy", "mode", "confidence", "shadow") if getattr(ask, name))

    def refused(self) -> None:
        """A request asks for what can't be done."""
        self._counts["asks"]["refused"] += 1

    def fault(self, kind: str) -> None:
        """Something went wrong; ``kind`` is one of our own words."""
        self._counts["faults"][kind] += 1

    def spent(self, side: Side, seconds: float) -> None:
        """Time went by in our code."""
        self._seconds[side] += seconds

    def features_off(self, off: bool) -> None:
        """Whether features are turned off; told when it may have changed."""
        if off != self._was_off:
            self._off = self._was_off = off

    def holding(self, scheduler: int, worker: int) -> None:
        """Requests that each side keeps something for."""
        self._held = {"scheduler": scheduler, "worker": worker}

    def answered(self, request: str, result: Result, body: dict[str, Any], policy: str | None = None) -> None:
        """A request ended.

        Args:
            request: the engine's id.
            result: what kvroute says about it.
            body: the same as the client gets it; kept by reference until it is taken.
            policy: name of the policy that was asked for, if it is served.
        """
        self._results[request] = body
        decision = result.decision
        if decision is not None:
            name = policy or ""
            self._counts["decisions"][SEPARATOR.join((name, decision.final_mode, decision.why))] += 1
            if decision.switch is not None and decision.why != "shadow":
                self._counts["switches"][SEPARATOR.join((name, decision.switch.to))] += 1
            self._add("difficulty", decision.difficulty)
        if result.confidence is not None:
            self._add("confidence", result.confidence.value)

    def failed(self, request: str, body: dict[str, Any]) -> None:
        """A request ended of which there is nothing but an error to say."""
        self._results[request] = body

    def take(self) -> dict[str, Any] | None:
        """What came together since the last time, or None where that is nothing to speak of."""
        now = self._clock()
        late = now - self._sent >= _EVERY
        news = self._results or self._off is not None or any(self._counts.values()) or any(self._values.values())
        held = self._held != self._held_sent and (news or late or not any(self._held.values()))
        if not (news or held or (late and any(self._seconds.values()))):
            return None
        payload: dict[str, Any] = {name: dict(counter) for name, counter in self._counts.items() if counter}
        payload |= {name: list(found) for name, found in self._values.items() if found}
        if self._results:
            payload["results"] = self._results
        if self._off is not None:
            payload["off"] = self._off
        if held:
            payload["held"] = self._held_sent = self._held
        seconds = {side: spent for side, spent in self._seconds.items() if spent > 0}
        if seconds:
            payload["seconds"] = seconds
            self._seconds = {"scheduler": 0.0, "worker": 0.0}
        for counter in self._counts.values():
            counter.clear()
        self._values = {name: [] for name in VALUES}
        self._results = {}
        self._off = None
        self._sent = now
        return payload

    def _add(self, name: str, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self._values[name].append(float(value))


def joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two payloads as one, for metrics: results are left out, they go to their clients at once."""
    out: dict[str, Any] = {}
    for name in COUNTS:
        total: dict[str, float] = dict(a.get(name, {}))
        for key, count in b.get(name, {}).items():
            total[key] = total.get(key, 0) + count
        if total:
            out[name] = total
    for name in VALUES:
        values = [*a.get(name, ()), *b.get(name, ())]
        if values:
            out[name] = values
    for part in (a, b):
        for newest in ("off", "held"):
            if newest in part:
                out[newest] = part[newest]
    return out


def summary(payload: Mapping[str, Any]) -> dict[str, int | float]:
    """A payload in a few numbers, for a line of the log."""
    out: dict[str, int | float] = {}
    for name in ("asks", "decisions", "switches", "faults"):
        if payload.get(name):
            out[f"kvroute {name}"] = int(sum(payload[name].values()))
    for name in VALUES:
        if payload.get(name):
            out[f"kvroute mean {name}"] = round(sum(payload[name]) / len(payload[name]), 3)
    if payload.get("seconds"):
        out["kvroute seconds"] = round(sum(payload["seconds"].values()), 4)
    return out
