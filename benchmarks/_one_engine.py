"""One engine in one process with kvroute plugged in and out in turn, so that no two engines' memory is compared."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import _vllm
from _harness import JUDGED_FROM, Figure, judge, summarise
from _load import Seconds, undisturbed

PLAIN = "without kvroute"
COMPARED = {
    "nothing_asked": (PLAIN, "nothing asked"),
    "every_feature": (PLAIN, "every feature"),
    "asked": ("nothing asked", "every feature"),
}
"""By name, what a server without kvroute, or one of which nothing is asked, is compared with."""
MUST = {"every_feature": ">= 0.98"}
"""Of the throughput of the second / that of the first."""


@dataclass(frozen=True)
class Turn:
    """All requests once.

    Attributes:
        wall: seconds.
        steps: seconds from the end of one step to that of the next, the last one until all is delivered.
    """

    wall: float
    steps: Seconds


@contextlib.contextmanager
def unplugged(engine: Any) -> Iterator[None]:
    """An ``LLM`` of this process as it is without kvroute: vLLM asks at each step whether there is a connector.

    What vLLM decides at its start because of a connector stays decided.
    """
    from vllm.distributed.kv_transfer import kv_transfer_state as state

    core = engine.llm_engine.engine_core.engine_core
    scheduler, batch = core.scheduler, core.model_executor.driver_worker.worker.model_runner.input_batch
    processors = batch.logitsprocs.non_argmax_invariant
    kept = state._KV_CONNECTOR_AGENT, scheduler.connector, scheduler.connector_prefix_cache_stats
    needs, ours = batch.logitsprocs_need_output_token_ids, [p for p in processors if type(p).__name__ == "ForcedTokens"]
    if kept[0] is None or kept[1] is None or len(ours) != 1:
        raise AssertionError("kvroute is not plugged in as it is in vLLM 0.32.")
    state._KV_CONNECTOR_AGENT = scheduler.connector = scheduler.connector_prefix_cache_stats = None
    batch.logitsprocs_need_output_token_ids = False
    processors.remove(ours[0])
    try:
        yield
    finally:
        processors.append(ours[0])
        batch.logitsprocs_need_output_token_ids = needs
        state._KV_CONNECTOR_AGENT, scheduler.connector, scheduler.connector_prefix_cache_stats = kept


def in_turn(
    model: str,
    settings: dict[str, Any],
    prompts: Sequence[Sequence[int]],
    sides: Mapping[str, tuple[bool, dict[str, Any] | None]],
    tokens: int,
    seconds: float,
) -> dict[str, list[Turn]]:
    """Turns by side, as many of each; in a process of its own.

    Args:
        model: folder of the model.
        settings: of the connector.
        prompts: tokens of each request; all go at once.
        sides: by name, whether kvroute is plugged in, and what a request asks.
        tokens: of an answer.
        seconds: that it may take; at least two rounds are run.
    """
    engine = _vllm.start_engine(model, kvroute=settings, max_num_seqs=len(prompts), disable_log_stats=False)
    core = engine.llm_engine.engine_core.engine_core
    step, ends = core.step_fn, []

    def stepped() -> Any:
        found = step()
        ends.append(time.perf_counter())
        return found

    core.step_fn = stepped

    def turn(plugged: bool, ask: dict[str, Any] | None) -> Turn:
        params = _vllm.sampling(ask, max_tokens=tokens, ignore_eos=True)
        with contextlib.nullcontext() if plugged else unplugged(engine):
            ends.clear()
            start = time.perf_counter()
            outputs = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
            end = time.perf_counter()
        for output in outputs:
            result = (output.kv_transfer_params or {}).get("kvroute")
            if len(output.outputs[0].token_ids) != tokens or (ask is not None and (result is None or result["error"])):
                raise AssertionError(f"An answer or its result is not whole: {result}")
            if not plugged and result is not None:
                raise AssertionError("An engine without kvroute has a result of it.")
        return Turn(end - start, np.diff([start, *ends[:-1], end]))

    found: dict[str, list[Turn]] = {name: [] for name in sides}
    for plugged, ask in sides.values():
        turn(plugged, ask)
    began = time.monotonic()
    while len(found[next(iter(sides))]) < 4 or time.monotonic() - began < seconds:
        for order in (list(sides), list(sides)[::-1]):
            for name in order:
                found[name].append(turn(*sides[name]))
    return found


def ratios_of(found: Mapping[str, Sequence[Turn]], one: str, other: str) -> list[float]:
    """What one took / what the other took, by round of two turns each."""
    pairs = [np.array([t.wall for t in found[name]]).reshape(-1, 2).sum(axis=1) for name in (one, other)]
    return [float(a / b) for a, b in zip(*pairs, strict=True)]


def undisturbed_ratio(
    found: Mapping[str, Sequence[Turn]], one: str, other: str, *, draws: int, seed: int
) -> tuple[float, float, float]:
    """The same with each step at the lower quartile of its times, and its 95 % interval by rounds drawn anew."""
    most = max(len(t.steps) for name in (one, other) for t in found[name])
    steps = [np.stack([np.pad(t.steps, (0, most - len(t.steps))) for t in found[name]]) for name in (one, other)]
    rounds = len(steps[0]) // 2

    def ratio(drawn: np.ndarray[Any, Any]) -> float:
        turns = np.concatenate([2 * drawn, 2 * drawn + 1])
        a, b = (undisturbed(side[turns]) for side in steps)
        return a / b

    rng = np.random.default_rng(seed)
    again = [ratio(rng.integers(0, rounds, rounds)) for _ in range(draws)]
    low, high = np.percentile(again, [2.5, 97.5])
    return ratio(np.arange(rounds)), float(low), float(high)


def engine_figures(found: Mapping[str, Sequence[Turn]], seed: int) -> dict[str, Figure]:
    """Throughput of what is compared, as it was and undisturbed."""
    figures: dict[str, Figure] = {}
    for key, (one, other) in COMPARED.items():
        must = MUST.get(key)
        figures[f"engine_{key}"] = summarise(ratios_of(found, one, other), must, seed=seed)
        value, low, high = undisturbed_ratio(found, one, other, draws=1000, seed=seed)
        rounds = len(found[one]) // 2
        ok = judge(low, high, must) if must is not None and rounds >= JUDGED_FROM else None
        figures[f"engine_undisturbed_{key}"] = Figure(value, low, high, must, ok, rounds)
    return figures
