"""Faults in the process that answers clients are counted with those of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvroute.serving.mailbox import MAILBOX

pytestmark = pytest.mark.vllm


@pytest.fixture
def metrics(monkeypatch) -> Iterator[Any]:
    """Of a process with two engines."""
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from kvroute.serving.metrics import KVRouteMetrics

    for name in ("connected", "partial", "on_fault"):
        monkeypatch.setattr(MAILBOX, name, getattr(MAILBOX, name))
    config = SimpleNamespace(kv_transfer_config=None, parallel_config=SimpleNamespace())
    types = {Counter: Counter, Gauge: Gauge, Histogram: Histogram}
    KVRouteMetrics(config, types, ["model_name", "engine"], {1: ["m", "1"], 2: ["m", "2"]})
    yield lambda kind, engine: REGISTRY.get_sample_value(
        "vllm:kvroute_faults_total", {"model_name": "m", "engine": engine, "kind": kind}
    )
    unregister_vllm_metrics()


def test_what_fails_where_clients_are_answered_is_counted(metrics):
    assert metrics("middleware", "1") is None
    MAILBOX.fault("middleware")
    MAILBOX.fault("middleware")
    assert metrics("middleware", "1") == 2
    assert metrics("middleware", "2") is None
