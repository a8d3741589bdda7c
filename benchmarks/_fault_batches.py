"""Small batches of mixed requests, answered by a vLLM engine of this process in each way answers are read."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import _vllm

FEATURES = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]
TAIL = {"of": "answer", "layers": "last:2", "tokens": "mean", "window": 4}
ASKS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "mode": {"mode": "fast", "features": ["prompt:paper-mteb"]},
    "stopped": {"features": ["answer:paper-mteb"]},
    "ended": {"features": FEATURES},
    "confidence": {"confidence": "right", "features": ["kv-coe"]},
    "policy": {"policy": "thinker", "features": ["answer:paper-mteb", "prompt:best"]},
    "features": {"features": {**{name: name for name in FEATURES}, "tail": TAIL, "weighed": "answer:best"}},
}
"""By kind of request; the engine takes the cache away from the last ones first."""
KINDS = tuple(ASKS)
FORCED = ("policy", "mode")
TOKENS = 40
CLOSE = 1e-3
"""Of a vector's largest entry: what other batches' rounding may change."""
ENGINE = {
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "num_gpu_blocks_override": 15,
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Way:
    """How answers of a batch are read.

    Attributes:
        name: for the table.
        at_hand: the scheduler's side can ask the worker between two steps.
        waits: the requests' ids say that their clients wait.
    """

    name: str
    at_hand: bool
    waits: bool


AT_HAND = Way("at hand", at_hand=True, waits=False)
LATE = Way("late", at_hand=False, waits=True)
WAYS = (AT_HAND, Way("step by step", at_hand=False, waits=False), LATE)


@dataclass
class Batch:
    """What a batch gave, by kind of request.

    Attributes:
        tokens: of the answers; None for one that was not delivered.
        results: what kvroute said, as it came with the statistics.
        late: answers whose result was not there when they ended.
        faults: counted in the metrics meanwhile.
        preempted: how often the engine took a request's cache away.
        states: requests that either side still held something for.
    """

    tokens: dict[str, list[int] | None] = field(default_factory=dict)
    results: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    late: int = 0
    faults: float = 0.0
    preempted: float = 0.0
    states: int = 0


class Served:
    """An engine in this process that answers batches.

    Args:
        model: its folder.
        prompts: tokens, one a kind.
        ends: at which string the kind ``stopped`` ends and at which token ``ended``.
        kvroute: the connector's settings; None for an engine without it.
    """

    def __init__(
        self, model: str, prompts: Sequence[Sequence[int]], ends: tuple[str, int] | None, kvroute: dict[str, Any] | None
    ) -> None:
        self.engine = _vllm.start_engine(model, kvroute=kvroute, **ENGINE)
        self._prompts = dict(zip(KINDS, prompts, strict=True))
        self.ends = ends
        self._kvroute = kvroute is not None
        self._batches = itertools.count()

    def batch(
        self,
        way: Way = AT_HAND,
        asks: Mapping[str, dict[str, Any] | None] = ASKS,
        within: contextlib.AbstractContextManager[Any] | None = None,
    ) -> Batch:
        """Answer one request of each kind at once.

        Args:
            way: how they are read.
            asks: by kind.
            within: context of all that the engine does.
        """
        from kvroute.serving.answers import PENDING
        from kvroute.serving.mailbox import WAITS

        before = {name: self.counted(name) for name in ("kvroute_faults", "num_preemptions")}
        number, requests = next(self._batches), {}
        for kind, ask in asks.items():
            name = f"{kind}-{number}-{WAITS}" if way.waits else f"{kind}-{number}"
            requests[name] = (self._prompts[kind], self._sampling(kind, ask))
        if self._kvroute:
            self._forget_drift()
        with self._reached(way):
            answers = _vllm.answer(self.engine, requests, within)
        found = Batch()
        for kind, one in zip(asks, answers.values(), strict=True):
            answer = one.output.outputs[0]
            found.tokens[kind] = list(answer.token_ids) if answer.finish_reason in ("stop", "length") else None
            found.results[kind] = one.results.get(0)
            found.late += PENDING in (one.output.kv_transfer_params or {}).get("kvroute", {})
        found.faults = self.counted("kvroute_faults") - before["kvroute_faults"]
        found.preempted = self.counted("num_preemptions") - before["num_preemptions"]
        found.states = self._states() if self._kvroute else 0
        return found

    def _sampling(self, kind: str, ask: dict[str, Any] | None) -> Any:
        options: dict[str, Any] = {}
        if self.ends is not None and kind == "stopped":
            options["stop"] = [self.ends[0]]
        if self.ends is not None and kind == "ended":
            options["stop_token_ids"] = [self.ends[1]]
        return _vllm.sampling(ask if self._kvroute else None, max_tokens=TOKENS, ignore_eos=True, **options)

    def counted(self, name: str) -> float:
        """A metric."""
        return _vllm.metrics(self.engine).get(f"vllm:{name}", 0.0)

    @property
    def _scheduler(self) -> Any:
        return self.engine.llm_engine.engine_core.engine_core.scheduler.connector._scheduler

    @contextlib.contextmanager
    def _reached(self, way: Way) -> Iterator[None]:
        """With the worker at hand or not; it always runs in this process, so that exceptions can be thrown in it."""
        side = self._scheduler if self._kvroute else None
        reader = getattr(side, "_reader", None)
        if side is not None and not way.at_hand:
            side._reader = None
        try:
            yield
        finally:
            if side is not None:
                side._reader = reader

    @property
    def _worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def _forget_drift(self) -> None:
        """The same prompts again and again are drift, of which there is one alarm; it may come in every batch."""
        for policy in self._worker._config.catalog.policies.values():
            if policy.drift is not None:
                policy.drift._alarm_at = None

    def _states(self) -> int:
        from kvroute.serving.forcing import BOARD

        return self._scheduler.num_states + self._worker.num_states + len(BOARD)


def make_settings(folder: Path, model: Path, head: Path, seed: int) -> dict[str, Any]:
    """Heads and policies on disk: the thinker's own, a confidence, and of both a copy that is torn."""
    from dataclasses import replace

    from _heads import costs_head
    from _thinker import engine

    policies, heads = folder / "policies", folder / "heads"
    for name in ("thinker", "torn"):
        shutil.copytree(head.parent / "head", policies / name / "head")
        shutil.copy(head.parent / "policy.json", policies / name / "policy.json")
        shutil.copy(head.parent / "policy.drift.safetensors", policies / name)
    right = replace(costs_head(engine(model), seed), target="correct")
    for name in ("right", "torn"):
        right.save(heads / name)
    for tensors in (policies / "torn" / "head" / "head.safetensors", heads / "torn" / "head.safetensors"):
        tensors.write_bytes(tensors.read_bytes()[:-200])
    return {"policies": str(policies), "heads": str(heads)}


# ---------------------------------------------------------------------- two batches


def says_something(batch: dict[str, Any]) -> bool:
    results = [r for r in batch["results"].values() if r is not None]
    return any(r["error"] or r["faults"] or (r["decision"] or {}).get("fault") or _no_score(r) for r in results)


def _no_score(result: dict[str, Any]) -> bool:
    confidence = result["confidence"]
    return any(s["value"] is None for s in [*result["scores"].values(), *([confidence] if confidence else [])])


def unlike(batch: dict[str, Any], clean: dict[str, Any]) -> list[str]:
    """What of a batch is not as before all faults."""
    found = []
    for kind, result in clean["results"].items():
        other = batch["results"][kind]
        if batch["tokens"][kind] != clean["tokens"][kind]:
            found.append(f"{kind}: other tokens")
        if result is None or other is None:
            found += [f"{kind}: a result or none"] * (result is not other)
        elif set(result["features"]) != set(other["features"]) or other["error"] or other["faults"]:
            found.append(f"{kind}: {other['error']} {other['faults']} {sorted(other['features'])}")
    return found


def wrong(batch: dict[str, Any], clean: dict[str, Any]) -> list[str]:
    """What a batch says of the same tokens and does not say as a batch without faults."""
    found = []
    for kind, result in batch["results"].items():
        expected = clean["results"][kind]
        if result is None or batch["tokens"][kind] != clean["tokens"][kind]:
            continue
        for name, vector in result["features"].items():
            right = expected["features"].get(name)
            if right is None or not np.allclose(vector, right, rtol=0, atol=CLOSE * float(np.abs(right).max())):
                found.append(f"{kind}: {name}")
        for name, score in result["scores"].items():
            right = expected["scores"].get(name, {}).get("value")
            if score["value"] is not None and not np.isclose(score["value"], right or 0.0, rtol=CLOSE, atol=CLOSE):
                found.append(f"{kind}: {name}")
    return found
