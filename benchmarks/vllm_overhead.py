"""What kvroute costs a vLLM server: with everything asked, with nothing asked, and without it.

Two servers stand side by side, one with kvroute and one without, and take the same streamed requests in turn. The
worker of the one that runs has a core of its own, with one thread; the rest (its other processes, which wait busily,
and the client) has the other core. After each turn the cores and the order change, and after some rounds both servers
are started anew, in the other order, for two servers that are started alike differ too. By default vLLM's CPU build
would reserve a core more where any connector is configured, so neither is left to it.
``throughput`` is tokens a second with every feature on (or with nothing asked) / without kvroute (by CPU time: of the
worker alone); ``throughput_asked`` is with every feature / with nothing asked, of one server. ``undisturbed`` is the
same with what other machines take away left out as far as possible: every run has the same steps, of each step the
lower quartile of its times over the runs of one pair of servers counts, and these are added. The second table says
what each process took; the engine's core waits busily, so most of its time is none of its work.

``engine`` is the same of one engine in one process, with which no server's start interferes: kvroute is plugged in and
out between runs (vLLM asks at each step whether there is a connector). What vLLM decides at its start, because there is
one, stays, and processes beside the engine's are not in it.

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import _vllm
from _harness import JUDGED_FROM, Figure, add_common_arguments, figure_table, finish, judge, summarise, table
from _heads import costs_settings
from _hook_meter import Asked, hook_shares, made_of, shares_of
from _load import Seconds, Streamed, cpu_seconds, metric, processes_below, step_seconds, stream_all, undisturbed
from _one_engine import COMPARED, MUST, PLAIN, engine_figures, in_turn
from _texts import text_of
from kvroute.models import BUNDLED, bundled_path

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


@dataclass(frozen=True)
class Run:
    """All requests once, on one server.

    Attributes:
        wall: seconds.
        cpu: CPU seconds by role, in the order of ROLES.
        steps: seconds of each step.
        requests: what they gave, without kvroute's results.
    """

    wall: float
    cpu: Seconds
    steps: Seconds
    requests: list[Streamed]


ROLES = ("worker", "engine core", "API server")
"""Of a server's processes."""


@dataclass
class Server:
    """One of the two that run side by side.

    Attributes:
        url: its address.
        processes: all of its own.
    """

    url: str
    processes: list[int]

    def bind(self, worker: int, rest: int) -> None:
        """Keep the process that runs the model on one core and all others on another."""
        for process in self.processes:
            core = worker if _role(process) == "worker" else rest
            for task in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):
                    os.sched_setaffinity(int(task.name), {core})

    def cpu(self) -> Seconds:
        """CPU seconds so far, in the order of ROLES."""
        found = dict.fromkeys(ROLES, 0.0)
        for process in self.processes:
            found[_role(process)] += cpu_seconds([process])
        return np.array(list(found.values()))


def _role(process: int) -> str:
    name = Path(f"/proc/{process}/comm").read_text()
    return "worker" if name.startswith("VLLM::Worker") else "engine core" if name.startswith("VLLM::") else "API server"


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


SIDES = {PLAIN: None, "nothing asked": None, "every feature": EVERYTHING}
ROUNDS = 4
"""Of one pair of servers, before another is started."""


def overhead(
    arguments: argparse.Namespace, settings: dict[str, Any], prompts: list[list[int]], tokens: int, folder: Path
) -> tuple[dict[str, Figure], str]:
    """The server's figures, and the table of its times."""
    from tests.serving.http_server import CONNECTOR

    model = Path(model_folder(arguments.model))
    connector = {**CONNECTOR, "kv_connector_extra_config": settings}
    times: dict[str, list[Streamed]] = {name: [] for name in SIDES}
    spent: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    cpu: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    by_role: dict[str, list[Seconds]] = {name: [] for name in SIDES}
    by_step: dict[str, list[list[Seconds]]] = {name: [] for name in SIDES}
    hooks: dict[str, list[float]] = {name: [] for name in SIDES if name != PLAIN}
    began = time.monotonic()
    cores = sorted(os.sched_getaffinity(0))[:2]
    pairs = 0
    while pairs < (1 if arguments.quick else 3) or time.monotonic() - began < arguments.seconds * (1 - 0.5 / pairs):
        with two_servers(model, connector, folder, kvroute_first=pairs % 2 == 1) as (plain, ours):

            def run(name: str, turn: int) -> Run:
                server = plain if name == PLAIN else ours
                worker, rest = cores[turn], cores[turn - 1]
                server.bind(worker, rest)
                os.sched_setaffinity(0, {rest})  # of this thread and of those that it starts
                used, start = server.cpu(), time.perf_counter()
                found = stream_all(server.url, bodies(prompts, tokens, SIDES[name]))
                wall = time.perf_counter() - start
                check(found, tokens, SIDES[name] is not None)
                steps = step_seconds(found)
                if len(steps) != tokens + 1:
                    raise AssertionError(f"No answer came token by token: at most {len(steps) - 1} chunks of {tokens}.")
                return Run(wall, server.cpu() - used, steps, [replace(one, result=None) for one in found])

            def counted(name: str, turn: int) -> Run:
                """The same, with the hooks' own time kept."""
                if name == PLAIN:
                    return run(name, turn)
                before = metric(ours.url, "vllm:kvroute_hook_seconds_total")
                found = run(name, turn)
                hooks[name].append((metric(ours.url, "vllm:kvroute_hook_seconds_total") - before) / found.wall)
                return found

            with ThreadPoolExecutor(1) as thread:
                for name in SIDES:  # untimed
                    thread.submit(run, name, 0).result()
                for found_by_pair in (spent, cpu):
                    for rounds in found_by_pair.values():
                        rounds.append([])
                for by_pair in by_step.values():
                    by_pair.append([])
                for number in range(1 if arguments.quick else ROUNDS):
                    both: dict[str, list[Run]] = {name: [] for name in SIDES}
                    for turn in (0, 1):
                        for name in list(SIDES)[:: 1 if (number + turn) % 2 else -1]:
                            both[name].append(thread.submit(counted, name, turn).result())
                    for name, found_both in both.items():
                        spent[name][-1].append(sum(one.wall for one in found_both))
                        by_role[name] += [one.cpu for one in found_both]
                        cpu[name][-1].append(float(sum(one.cpu[0] for one in found_both)))
                        by_step[name][-1] += [one.steps for one in found_both]
                        times[name] += [request for one in found_both for request in one.requests]
        pairs += 1
    figures: dict[str, Figure] = {}
    quiet = {name: [[undisturbed(runs)] for runs in found] for name, found in by_step.items()}
    for key, (one, other) in COMPARED.items():
        used = [x for pair in ratios(cpu, one, other) for x in pair]
        figures[f"throughput_{key}"] = over_pairs(ratios(spent, one, other), MUST.get(key), arguments.seed, used)
        figures[f"undisturbed_{key}"] = over_pairs(ratios(quiet, one, other), None, arguments.seed, ())
    for name, shares in hooks.items():
        figures[f"hooks_wall_{name.replace(' ', '_')}"] = summarise(shares, None, seed=arguments.seed)
    written = 2 * REQUESTS * tokens
    rates = {name: written / float(np.median(np.concatenate(found))) for name, found in spent.items()}
    return figures, _times_table(times, rates) + "\n\n" + _cpu_table(by_role)


def one_engine(
    arguments: argparse.Namespace, settings: dict[str, Any], prompts: list[list[int]], tokens: int, folder: Path
) -> dict[str, Figure]:
    """The figures of one engine that kvroute is plugged into and out of."""
    sides = {name: (name != PLAIN, ask) for name, ask in SIDES.items()}
    log = None if arguments.logs is None else folder / "engine.log"
    limit = 0.0 if arguments.quick else arguments.seconds / (1 if arguments.only else 2)
    found = _vllm.apart(in_turn, model_folder(arguments.model), settings, prompts, sides, tokens, limit, log=log)
    return engine_figures(found, arguments.seed)


def _cpu_table(by_role: Mapping[str, Sequence[Seconds]]) -> str:
    rows = []
    for name, found in by_role.items():
        median = np.median(found, axis=0)
        rows.append((name, *(f"{x:.2f}" for x in median)))
    return table(("CPU seconds a run", *ROLES), rows)


def ratios(found: Mapping[str, Sequence[Sequence[float]]], one: str, other: str) -> list[list[float]]:
    """What one took / what the other took, by pair of servers and round."""
    return [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(found[one], found[other], strict=True)]


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


def _times_table(times: Mapping[str, Sequence[Streamed]], rates: Mapping[str, float]) -> str:
    rows = []
    for name, found in times.items():
        first = [one.first() for one in found]
        between = np.concatenate([one.between() for one in found])
        cells = [f"{x:.0f}" for seconds in (first, between) for x in np.percentile(seconds, [50, 99]) * 1e3]
        rows.append((name, f"{rates[name]:.1f}", *cells, len(found)))
    header = ("server", "tokens/s", "first p50 ms", "first p99", "between p50 ms", "between p99", "requests")
    return table(header, rows)


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
    parser.add_argument("--only", choices=("server", "engine", "hooks"), help="one part of it")
    arguments = parser.parse_args()
    if arguments.quick and arguments.seconds == 420.0:
        arguments.seconds = 40.0
    _vllm.prepare()
    tokens = arguments.tokens or (24 if arguments.quick else 64)
    rng = random.Random(arguments.seed)
    texts = [text_of(40 + 10 * i, rng) for i in range(REQUESTS)]
    figures: dict[str, Figure] = {}
    with _folder(arguments.logs) as folder:
        settings = costs_settings(arguments.model, folder, arguments.seed)
        prompts = tokenized(arguments.model, texts)
        if arguments.only in (None, "engine"):
            figures |= one_engine(arguments, settings, prompts, tokens, folder)
        if arguments.only in (None, "hooks"):
            log = None if arguments.logs is None else folder / "hooks.log"
            options = Asked(PARTS, REQUESTS, tokens, arguments.seconds / 3, arguments.quick)
            model = model_folder(arguments.model)
            found = _vllm.apart(hook_shares, model, settings, prompts, options, log=log)
            for name, bound in (("everything", "<= 0.02"), ("nothing", "<= 0.002")):
                label = "every_feature" if name == "everything" else "nothing_asked"
                figures[f"hooks_{label}"] = summarise(shares_of(found[name], 2), bound, seed=arguments.seed)
            print(made_of(found) + "\n")
        if arguments.only in (None, "server"):
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
