"""What hooks take of an engine's steps: a meter around every method of kvroute's that vLLM calls, in one process."""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import _vllm
from _harness import table

HOOKS = (
    "handle_preemptions",
    "finish_forward",
    "wait_for_save",
    "get_finished",
    "build_connector_worker_meta",
    "get_kv_connector_stats",
    "start_load_kv",
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
)
"""Methods that vLLM calls. ``wait_for_layer_load`` and ``save_kv_layer`` are not among them: they do nothing, once a
layer, and a clock around them would cost more than they do."""


@dataclass(frozen=True)
class Asked:
    """Of what runs.

    Attributes:
        parts: by name, what a request asks; ``nothing`` and ``everything`` are among them, and are run several times.
        at_once: requests.
        tokens: of an answer.
        seconds: that all runs may take.
        quick: leave the others out.
    """

    parts: Mapping[str, dict[str, Any] | None]
    at_once: int
    tokens: int
    seconds: float
    quick: bool


class Meter:
    """Counts calls, wall-clock and CPU seconds by name; of calls within calls the outer one."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._inside = False

    def wrap(self, name: str, function: Callable[..., Any], *, nested: bool = True) -> Callable[..., Any]:
        """The function, counted; one that is not ``nested`` may hold others."""

        def metered(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = nested
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                found = self.spent.setdefault(name, [0.0, 0.0, 0.0])
                found[0] += 1
                found[1] += time.perf_counter() - wall
                found[2] += time.thread_time() - cpu
                self._inside = False

        return metered


def hook_shares(
    model: str, settings: dict[str, Any], prompts: list[list[int]], asked: Asked
) -> dict[str, list[dict[str, list[float]]]]:
    """By what is asked, the meter of each run; in a process of its own."""
    from kvroute.serving.connector import KVRouteConnector
    from kvroute.serving.logits_processor import ForcedTokens

    meter = Meter()
    for hook in HOOKS:
        setattr(KVRouteConnector, hook, meter.wrap(hook, getattr(KVRouteConnector, hook)))
    for hook in ("update_state", "apply"):
        setattr(ForcedTokens, hook, meter.wrap(f"logits processor: {hook}", getattr(ForcedTokens, hook)))
    engine = _vllm.start_engine(model, kvroute=settings, max_num_seqs=asked.at_once, disable_log_stats=False)
    core = engine.llm_engine.engine_core.engine_core
    core.step_fn = meter.wrap("step", core.step_fn, nested=False)
    layers = engine.llm_engine.model_config.get_num_layers(engine.llm_engine.vllm_config.parallel_config)
    per_step = layers * _seconds_of_empty(core.scheduler.connector)

    def run(ask: Mapping[str, Any] | None) -> dict[str, list[float]]:
        meter.spent.clear()
        params = _vllm.sampling(ask, max_tokens=asked.tokens, ignore_eos=True)
        for output in engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
            result = (output.kv_transfer_params or {}).get("kvroute")
            if ask is not None and (result is None or result["error"] or result["faults"]):
                raise AssertionError(f"An answer's result is not whole: {result}")
        steps = meter.spent["step"][0]
        meter.spent["empty, once a layer"] = [steps, steps * per_step, steps * per_step]
        return {name: list(found) for name, found in meter.spent.items()}

    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in asked.parts}
    for name in ("nothing", "everything"):
        run(asked.parts[name])
    began = time.monotonic()
    for name, ask in asked.parts.items():
        if not asked.quick and name not in ("nothing", "everything"):
            found[name].append(run(ask))
    while len(found["everything"]) < 2 or (time.monotonic() - began < asked.seconds and len(found["everything"]) < 12):
        for name in ("nothing", "everything", "everything", "nothing"):
            found[name].append(run(asked.parts[name]))
    return found


def _seconds_of_empty(connector: Any) -> float:
    """Of one call each of the methods that do nothing."""
    waits = timeit.timeit(lambda: connector.wait_for_layer_load(""), number=10_000)
    return (waits + timeit.timeit(lambda: connector.save_kv_layer("", None, None), number=10_000)) / 10_000


def shares_of(runs: Sequence[Mapping[str, list[float]]], place: int) -> list[float]:
    """By run, seconds in hooks / seconds of steps; by the clock (1) or by CPU time (2)."""
    return [sum(x[place] for name, x in run.items() if name != "step") / run["step"][place] for run in runs]


def made_of(found: Mapping[str, Sequence[Mapping[str, list[float]]]]) -> str:
    """CPU microseconds a step, by hook and by what is asked."""
    asked = [name for name, runs in found.items() if runs]
    hooks = sorted({hook for runs in found.values() for run in runs for hook in run if hook != "step"})
    per_step = {
        name: {h: np.mean([run.get(h, [0, 0, 0])[2] / run["step"][0] for run in found[name]]) * 1e6 for h in hooks}
        for name in asked
    }
    hooks = [h for h in hooks if max(per_step[name][h] for name in asked) >= 1]
    hooks.sort(key=lambda h: -per_step["everything"][h])
    rows: list[list[object]] = [[h, *(f"{per_step[name][h]:.0f}" for name in asked)] for h in hooks]
    rows.append(["all hooks", *(f"{sum(per_step[name].values()):.0f}" for name in asked)])
    steps = [np.mean([run["step"][2] / run["step"][0] for run in found[name]]) * 1e6 for name in asked]
    rows.append(["step", *(f"{step:.0f}" for step in steps)])
    return table(("CPU µs a step", *asked), rows)
