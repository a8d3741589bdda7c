"""kvroute's statistics as vLLM carries them, and the Prometheus metrics ``vllm:kvroute_*`` made of them.

vLLM moves a connector's statistics from the engine's core to the process that answers clients, with the outputs of
the same step, and hands them to the class below. So results reach :data:`~kvroute.serving.mailbox.MAILBOX` the same
way; it needs nothing but statistics being on, which they are unless ``--disable-log-stats`` is given.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvroute.serving.mailbox import MAILBOX, deliver
from kvroute.serving.tally import COUNTS, SEPARATOR, joined, summary

_log = logging.getLogger(__name__)

PREFIX: Final = "vllm:kvroute_"
_COUNTERS: Final = {
    "asks": ("requests", "Requests by what they ask of kvroute; one that asks for several things counts for each."),
    "decisions": ("decisions", "Decisions how to think, by the policy's name, the mode the answer ended in, and why."),
    "switches": ("switches", "Changes of mode in mid-answer."),
    "faults": ("faults", "What went wrong inside kvroute, by kind; every one of these answers was delivered."),
    "seconds": ("hook_seconds", "Time spent in kvroute's hooks in the engine, by side."),
}
_HISTOGRAMS: Final = {
    "difficulty": ("Difficulty of prompts, 0 to 100, that policies read.", [*range(5, 101, 5)]),
    "confidence": ("Probability that an answer is right, where it was asked for.", [i / 20 for i in range(1, 21)]),
}


class KVRouteStats(KVConnectorStats):  # type: ignore[misc]
    """One step's payload of :class:`~kvroute.serving.tally.Tally`, or several joined."""

    def reset(self) -> None:
        """Forget it."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """With another one's, without results."""
        try:
            return KVRouteStats(data=joined(self.data, other.data))
        except Exception:  # noqa: BLE001 - it runs in the loop that hands out everybody's answers
            _log.warning("kvroute could not join its statistics.", exc_info=True)
            return KVRouteStats(data=dict(other.data))

    def reduce(self) -> dict[str, int | float]:
        """For the log."""
        try:
            return summary(self.data)
        except Exception:  # noqa: BLE001 - see above
            _log.warning("kvroute could not sum its statistics up.", exc_info=True)
            return {}

    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not self.data


class KVRouteMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The metrics of this process, and the place where results arrive in it."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Mapping[type, type],
        labelnames: list[str],
        per_engine_labelvalues: Mapping[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=PREFIX + metric, documentation=text, labelnames=[*labelnames, *COUNTS[name]])
            for name, (metric, text) in _COUNTERS.items()
        }
        self._histograms = {
            name: self._histogram_cls(name=PREFIX + name, documentation=text, buckets=buckets, labelnames=labelnames)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._off = self._gauge_cls(
            name=PREFIX + "features_off",
            documentation="1 where kvroute turned its features off after repeated faults, or can't read this engine.",
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )
        self._held = self._gauge_cls(
            name=PREFIX + "held",
            documentation="Requests that kvroute keeps something for in the engine, by side; 0 when all have ended.",
            multiprocess_mode="mostrecent",
            labelnames=[*labelnames, "side"],
        )
        for values in per_engine_labelvalues.values():
            self._off.labels(*values).set(0)
        # Who brings results to clients does not know which engine they are from: the first one's label stands for all.
        first = next(iter(per_engine_labelvalues), 0)
        MAILBOX.on_fault = lambda kind: self._fault(kind, first)
        MAILBOX.connected = True
        MAILBOX.partial = getattr(vllm_config.parallel_config, "_api_process_count", 1) > 1

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take one step's payload. Raises nothing: it runs in the loop that hands out everybody's answers."""
        try:
            failed = deliver(transfer_stats_data.get("results", {}))
            if failed:
                self._fault("mailbox", engine_idx, failed)
            self._count(transfer_stats_data, self.per_engine_labelvalues[engine_idx])
        except Exception:  # noqa: BLE001 - see above
            _log.warning("kvroute could not count a step.", exc_info=True)
            with contextlib.suppress(Exception):
                self._fault("metrics", engine_idx)

    def _fault(self, kind: str, engine_idx: int, count: int = 1) -> None:
        self._counters["faults"].labels(*self.per_engine_labelvalues[engine_idx], kind).inc(count)

    def _count(self, payload: Mapping[str, Any], engine: list[object]) -> None:
        for name, counter in self._counters.items():
            for key, count in payload.get(name, {}).items():
                counter.labels(*engine, *key.split(SEPARATOR)).inc(count)
        for name, histogram in self._histograms.items():
            for value in payload.get(name, ()):
                histogram.labels(*engine).observe(value)
        if "off" in payload:
            self._off.labels(*engine).set(int(payload["off"]))
        for side, held in payload.get("held", {}).items():
            self._held.labels(*engine, side).set(held)
