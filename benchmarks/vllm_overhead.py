"""What kvroute costs a vLLM server: with everything asked, with nothing asked, and without it.

Two servers run side by side, one with kvroute and one without, each with all its threads on a core of its own, and take
the same streamed requests at the same time: what disturbs one disturbs the other. After each run they change cores, and
after some rounds both are started anew, in the other order, for two servers that are started alike differ too. Both
have one thread: by default vLLM's CPU build reserves a core more where any connector is configured.
``throughput`` is tokens a second with every feature on (or with nothing asked) / without kvroute; ``throughput_asked``
is with every feature / with nothing asked, of one server.

``hooks`` are CPU seconds in our hooks / CPU seconds of the engine's steps, in an engine in one process with one thread,
which is what vLLM gives a server on 2 cores; ``hooks_wall`` the same of the server by its own metric and the clock.
The two methods that vLLM calls once a layer and that are empty are timed apart and added. The last table says what
the hooks' time is made of, feature by feature.

"Every feature": a prompt's and an answer's vector, the chain scores, the length, a confidence read from the answer,
and a two-step policy that reads a difficulty from the prompt and again every 16 tokens.

Runs where vLLM is installed: ``.venv-vllm/bin/python benchmarks/vllm_overhead.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import _vllm
from _harness import JUDGED_FROM, Figure, add_common_arguments, figure_table, finish, judge, summarise, table
from _heads import costs_head
from _load import Streamed, Times, cpu_seconds, metric, processes_below, stream_all
from _texts import text_of
from kvroute import Policy, TransformersEngine
from kvroute.models import BUNDLED, bundled_path
from kvroute.pooling import PRESETS

THINKING = {
    "fast": "<think>\n\n</think>\n\n",
    "slow": "<think>\n",
    "leave": "\n</think>\n\n",
    "enter": "\n<think>\n",
    "close": "</think>",
}
FEATURES = ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]
EVERYTHING = {"features": FEATURES, "confidence": "right", "policy": "costs"}
PARTS: dict[str, dict[str, Any] | None] = {
    "nothing": None,
    "prompt:paper-mteb": {"features": ["prompt:paper-mteb"]},
    "prompt:best": {"features": ["prompt:best"]},
    "answer:paper-mteb": {"features": ["answer:paper-mteb"]},
    "kv-coe": {"features": ["kv-coe"]},
    "confidence": {"confidence": "right"},
    "policy": {"policy": "costs"},
    "everything": EVERYTHING,
}
REQUESTS = 8
"""At once, which is also the most that the server runs at once."""
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


def make_settings(model: str, folder: Path, seed: int) -> dict[str, Any]:
    """Heads and a policy for a model, written to a folder, as the connector's settings.

    The thresholds are in the middle, so that both modes and switches happen; what they read has no meaning here.
    """
    engine = TransformersEngine.from_pretrained(model, dtype="float32")
    head = costs_head(engine, seed)
    windows = costs_head(engine, seed + 1)
    answers = costs_head(engine, seed + 2, spec=PRESETS["paper-mteb"])
    replace(head, windows=windows).save(folder / "policies" / "head")
    replace(answers, target="correct").save(folder / "heads" / "right")
    Policy(kind="two-step", head="head", tau_fast=5, tau_slow=95).save(folder / "policies" / "costs.json")
    return {
        "policies": str(folder / "policies"),
        "heads": str(folder / "heads"),
        "thinking": THINKING,
        "strict": True,
    }


# ---------------------------------------------------------------------- a server


def bodies(prompts: Sequence[Sequence[int]], tokens: int, ask: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Completions of a fixed length, greedy."""
    plain: dict[str, Any] = {"model": "model", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    if ask is not None:
        plain["kv_transfer_params"] = {"kvroute": dict(ask)}
    return [{**plain, "prompt": list(prompt)} for prompt in prompts]


def check(found: Sequence[Streamed], tokens: int, asked: bool) -> None:
    """Every answer has its length, and the result that was asked for."""
    for one in found:
        if one.tokens != tokens:
            raise AssertionError(f"An answer has {one.tokens} tokens instead of {tokens}.")
        if not asked:
            continue
        result = one.result
        if result is None or result["error"] or result["faults"] or result["decision"]["fault"]:
            raise AssertionError(f"An answer's result is not whole: {result}")
        if len(result["features"]) != 2 or result["confidence"]["value"] is None:
            raise AssertionError(f"Something asked for is missing: {sorted(result['features'])}")


@dataclass
class Server:
    """One of the two that run side by side.

    Attributes:
        url: its address.
        processes: all of its own.
    """

    url: str
    processes: list[int]

    def bind(self, core: int) -> None:
        """Keep all its threads on one core."""
        for process in self.processes:
            for task in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), {core})


@contextlib.contextmanager
def two_servers(
    model: Path, connector: Mapping[str, Any], folder: Path, *, kvroute_first: bool
) -> Iterator[tuple[Server, Server]]:
    """One without kvroute and one with it, in this order, started in either."""
    from tests.serving.http_server import serving

    # Left alone, vLLM's CPU build keeps one core more free from its threads where a connector is configured.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        found = {}
        for ours in (True, False) if kvroute_first else (False, True):
            before = set(processes_below(os.getpid()))
            log = folder / ("kvroute.log" if ours else "plain.log")
            transfer = connector if ours else None
            url = stack.enter_context(serving(model, log, "--max-num-seqs", str(REQUESTS), transfer=transfer))
            found[ours] = Server(url, [p for p in processes_below(os.getpid()) if p not in before])
        yield found[False], found[True]


SIDES = {"nothing asked": None, "every feature": EVERYTHING}
ROUNDS = 2
"""Of one pair of servers, before another is started."""


def overhead(
    arguments: argparse.Namespace, settings: dict[str, Any], prompts: list[list[int]], tokens: int, folder: Path
) -> tuple[dict[str, Figure], str]:
    """The server's figures, and the table of its times."""
    from tests.serving.http_server import CONNECTOR

    model = Path(model_folder(arguments.model))
    connector = {**CONNECTOR, "kv_connector_extra_config": settings}
    times = {name: Times() for name in ("without kvroute", *SIDES)}
    by_pair: dict[str, list[list[float]]] = {name: [] for name in (*SIDES, *(f"{name}, CPU" for name in SIDES))}
    hooks: dict[str, list[float]] = {name: [] for name in SIDES}
    rates: dict[str, list[float]] = {name: [] for name in times}
    began = time.monotonic()
    cores = sorted(os.sched_getaffinity(0))[:2]
    pairs = 0
    while pairs < (1 if arguments.quick else 3) or time.monotonic() - began < arguments.seconds * (1 - 0.5 / pairs):
        for found in by_pair.values():
            found.append([])
        with two_servers(model, connector, folder, kvroute_first=pairs % 2 == 1) as (plain, ours):

            def run(server: Server, name: str, ask: Mapping[str, Any] | None) -> tuple[float, float]:
                cpu, start = cpu_seconds(server.processes), time.perf_counter()
                check(stream_all(server.url, bodies(prompts, tokens, ask), times[name]), tokens, ask is not None)
                wall = time.perf_counter() - start
                return wall, cpu_seconds(server.processes) - cpu

            def both(name: str, turn: int) -> tuple[tuple[float, float], tuple[float, float]]:
                """Both servers at the same time, each on a core of its own."""
                plain.bind(cores[turn])
                ours.bind(cores[1 - turn])
                with ThreadPoolExecutor(2) as threads:
                    theirs = threads.submit(run, plain, "without kvroute", None)
                    mine = threads.submit(run, ours, name, SIDES[name])
                    return theirs.result(), mine.result()

            for name in SIDES:  # untimed
                both(name, 0)
            for found in times.values():
                if pairs == 0:
                    found.first.clear()
                    found.between.clear()
            for number in range(1 if arguments.quick else ROUNDS):
                for name in list(SIDES)[:: 1 if number % 2 else -1]:
                    before = metric(ours.url, "vllm:kvroute_hook_seconds_total")
                    ran = [both(name, turn) for turn in (0, 1)]
                    (theirs, their_cpu), (mine, my_cpu) = np.sum(ran, axis=0)
                    by_pair[name][-1].append(theirs / mine)
                    by_pair[f"{name}, CPU"][-1].append(their_cpu / my_cpu)
                    spent = metric(ours.url, "vllm:kvroute_hook_seconds_total") - before
                    hooks[name].append(spent / mine)
                    rates["without kvroute"].append(2 * REQUESTS * tokens / theirs)
                    rates[name].append(2 * REQUESTS * tokens / mine)
        pairs += 1
    figures: dict[str, Figure] = {}
    for name in SIDES:
        key = name.replace(" ", "_")
        must = ">= 0.98" if name == "every feature" else None
        cpu = [x for pair in by_pair[f"{name}, CPU"] for x in pair]
        figures[f"throughput_{key}"] = over_pairs(by_pair[name], must, arguments.seed, cpu)
    asked = [
        [a / b for a, b in zip(*rows, strict=True)]
        for rows in zip(by_pair["every feature"], by_pair["nothing asked"], strict=True)
    ]
    figures["throughput_asked"] = over_pairs(asked, None, arguments.seed, ())
    for name, found in hooks.items():
        figures[f"hooks_wall_{name.replace(' ', '_')}"] = summarise(found, None, seed=arguments.seed)
    return figures, _times_table(times, {name: float(np.median(found)) for name, found in rates.items()})


def over_pairs(by_pair: Sequence[Sequence[float]], must: str | None, seed: int, cpu: Sequence[float]) -> Figure:
    """Mean of the rounds' ratios. Its interval comes from pairs of servers drawn anew, for two servers that are
    started alike differ by more than the rounds of one pair."""
    means = np.array([np.mean(pair) for pair in by_pair])
    picks = np.random.default_rng(seed).integers(0, len(means), (4000, len(means)))
    low, high = np.percentile(means[picks].mean(axis=1), [2.5, 97.5])
    ok = judge(float(low), float(high), must) if len(means) >= JUDGED_FROM else None
    rounds = sum(map(len, by_pair))
    return Figure(
        float(means.mean()), float(low), float(high), must, ok, rounds, float(np.mean(cpu)) if len(cpu) else None
    )


def _times_table(times: Mapping[str, Times], rates: Mapping[str, float]) -> str:
    rows = []
    for name, found in times.items():
        first, between = (np.percentile(np.array(x) * 1e3, [50, 99]) for x in (found.first, found.between))
        cells = [f"{x:.0f}" for x in (*first, *between)]
        rows.append((name, f"{rates[name]:.1f}", *cells, len(found.first)))
    header = ("server", "tokens/s", "first p50 ms", "first p99", "between p50 ms", "between p99", "requests")
    return table(header, rows)


# ---------------------------------------------------------------------- hooks, in one process


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
    model: str, settings: dict[str, Any], prompts: list[list[int]], tokens: int, seconds: float, quick: bool
) -> dict[str, list[dict[str, list[float]]]]:
    """By what is asked, the meter of each run; in a process of its own."""
    from kvroute.serving.connector import KVRouteConnector
    from kvroute.serving.logits_processor import ForcedTokens

    meter = Meter()
    for hook in HOOKS:
        setattr(KVRouteConnector, hook, meter.wrap(hook, getattr(KVRouteConnector, hook)))
    for hook in ("update_state", "apply"):
        setattr(ForcedTokens, hook, meter.wrap(f"logits processor: {hook}", getattr(ForcedTokens, hook)))
    engine = _vllm.start_engine(model, kvroute=settings, max_num_seqs=REQUESTS, disable_log_stats=False)
    core = engine.llm_engine.engine_core.engine_core
    core.step_fn = meter.wrap("step", core.step_fn, nested=False)
    layers = engine.llm_engine.model_config.get_num_layers(engine.llm_engine.vllm_config.parallel_config)
    per_step = layers * _seconds_of_empty(core.scheduler.connector)

    def run(ask: Mapping[str, Any] | None) -> dict[str, list[float]]:
        meter.spent.clear()
        params = _vllm.sampling(ask, max_tokens=tokens, ignore_eos=True)
        for output in engine.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
            result = (output.kv_transfer_params or {}).get("kvroute")
            if ask is not None and (result is None or result["error"] or result["faults"]):
                raise AssertionError(f"An answer's result is not whole: {result}")
        steps = meter.spent["step"][0]
        meter.spent["empty, once a layer"] = [steps, steps * per_step, steps * per_step]
        return {name: list(found) for name, found in meter.spent.items()}

    found: dict[str, list[dict[str, list[float]]]] = {name: [] for name in PARTS}
    for ask in (None, EVERYTHING):
        run(ask)
    began = time.monotonic()
    for name, ask in PARTS.items():
        if not quick and name not in ("nothing", "everything"):
            found[name].append(run(ask))
    while len(found["everything"]) < 2 or (time.monotonic() - began < seconds and len(found["everything"]) < 12):
        for name in ("nothing", "everything", "everything", "nothing"):
            found[name].append(run(PARTS[name]))
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


# ----------------------------------------------------------------------


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with _vllm.scratch() as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, seconds=420.0)
    parser.add_argument("--tokens", type=int, help="tokens an answer, by default 64; 24 with --quick")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; by default they are thrown away")
    parser.add_argument("--only", choices=("server", "hooks"), help="one half of it")
    arguments = parser.parse_args()
    if arguments.quick and arguments.seconds == 420.0:
        arguments.seconds = 40.0
    _vllm.prepare()
    tokens = arguments.tokens or (24 if arguments.quick else 64)
    rng = random.Random(arguments.seed)
    texts = [text_of(40 + 10 * i, rng) for i in range(REQUESTS)]
    figures: dict[str, Figure] = {}
    with _folder(arguments.logs) as folder:
        settings = make_settings(arguments.model, folder, arguments.seed)
        prompts = tokenized(arguments.model, texts)
        if arguments.only != "server":
            log = None if arguments.logs is None else folder / "hooks.log"
            seconds = arguments.seconds / 3
            model = model_folder(arguments.model)
            found = _vllm.apart(hook_shares, model, settings, prompts, tokens, seconds, arguments.quick, log=log)
            for name, bound in (("everything", "<= 0.02"), ("nothing", "<= 0.002")):
                label = "every_feature" if name == "everything" else "nothing_asked"
                figures[f"hooks_{label}"] = summarise(shares_of(found[name], 2), bound, seed=arguments.seed)
            print(made_of(found) + "\n")
        if arguments.only != "hooks":
            more, times = overhead(arguments, settings, prompts, tokens, folder)
            figures |= more
            print(times + "\n")
    print(figure_table(figures))
    finish(
        arguments,
        name="vllm_overhead",
        figures=figures,
        baseline="the same vLLM server without kvroute; the engine's own steps",
        n={"requests_at_once": REQUESTS, "tokens": tokens, "prompt_tokens": sum(map(len, prompts)) // len(prompts)},
    )


def model_folder(name: str) -> str:
    """Of a model that kvroute brings; any other name is vLLM's to resolve."""
    return str(bundled_path(name)) if name in BUNDLED else name


def tokenized(model: str, texts: Sequence[str]) -> list[list[int]]:
    """The texts' tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]]


if __name__ == "__main__":
    main()
