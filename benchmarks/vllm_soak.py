"""Thousands of mixed requests at a real vLLM server with kvroute: is any lost, mixed up, or left behind?

The server serves the tiny thinker from a cache too small for its load, so that requests are preempted. There are some
dozens of different requests: features, a confidence, a policy's decision, a demanded mode, nothing; plain, streamed,
with a stop string, with two prompts, and streams that the client leaves. Prompts share beginnings. Each is first sent
alone; then all are sent again and again in random order, many at once, and each answer and what kvroute says of it is
compared to that of the run alone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import _vllm
from _harness import exact, figure_table, finish, table
from _load import metric, processes_below
from _resident import memory_growth, resident
from _thinker import FOLDER, argument_parser, engine, questions
from tests.serving.http_server import serving

ASKS: dict[str, dict[str, Any] | None] = {
    "features": {"features": ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]},
    "window": {"features": {"tail": {"of": "answer", "layers": "last:2", "tokens": "mean", "window": 4}}},
    "confidence": {"confidence": "right", "features": ["length"]},
    "policy": {"policy": "thinker", "features": ["prompt:paper-mteb"]},
    "mode": {"mode": "fast", "features": ["answer:paper-mteb"]},
    "nothing": None,
}
WAYS = ("plain", "stream", "stop", "two", "left")
SERVER = ("--block-size", "32", "--max-model-len", "256", "--max-num-seqs", "12", "--max-num-batched-tokens", "256")
_WARM = 7500
"""Requests from which on memory is judged: torch's own caches of kernels, one a shape, fill over some thousands."""
CLOSE = 2e-3
"""Of a vector's largest entry: what other batches' rounding may change."""


@dataclasses.dataclass
class Case:
    """One of the different requests.

    Attributes:
        ask: a key of :data:`ASKS`.
        way: one of :data:`WAYS`.
        body: of the request.
        texts: of its choices when it ran alone.
        results: what kvroute said then; for a stop string, by the tokens that were written behind it.
    """

    ask: str
    way: str
    body: dict[str, Any]
    texts: list[str] = dataclasses.field(default_factory=list)
    results: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Answer:
    """What came back: texts and results by choice; ``left`` if the client went away before the end."""

    texts: list[str]
    results: list[dict[str, Any] | None]
    left: bool = False


def make_cases(count: int, ways: Sequence[str], tokenizer_of: Any, seed: int) -> list[Case]:
    """Different requests, every way with every ask."""
    rng = random.Random(seed)
    asked = questions(count, seed + 5)
    kinds = list(itertools.product(ASKS, ways))
    beginnings = [" ".join(q.question for q in questions(4, seed + 100 + i)) for i in range(4)]
    cases = []
    for i in range(count):
        ask, way = kinds[i % len(kinds)]
        text = asked[i].question if rng.random() < 0.5 else f"{rng.choice(beginnings)} {asked[i].question}"
        ids = tokenizer_of([{"role": "user", "content": text}])[-200:]
        prompt = [ids, tokenizer_of([{"role": "user", "content": asked[-1 - i].question}])] if way == "two" else ids
        body: dict[str, Any] = {"model": "model", "prompt": prompt, "temperature": 0, "ignore_eos": True}
        body["max_tokens"] = rng.choice((1, 6, 12, 24, 40)) if way in ("plain", "two") else rng.choice((16, 24, 40))
        if ASKS[ask] is not None:
            body["kv_transfer_params"] = {"kvroute": ASKS[ask]}
        cases.append(Case(ask, way, body))
    return cases


# ---------------------------------------------------------------------- one request


async def send(session: aiohttp.ClientSession, url: str, body: dict[str, Any], way: str) -> Answer:
    """Send one request the given way."""
    choices = 2 if way == "two" else 1
    if way not in ("stream", "left"):
        async with session.post(f"{url}/v1/completions", json=body) as response:
            found = await response.json()
            if response.status != 200:
                raise RuntimeError(json.dumps(found)[:500])
        texts = [c["text"] for c in sorted(found["choices"], key=lambda c: c["index"])]
        return Answer(texts, _results(found, choices))
    texts, results = [""] * choices, [None] * choices
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        if response.status != 200:
            raise RuntimeError((await response.text())[:500])
        pieces = 0
        async for chunk in _events(response):
            for choice in chunk.get("choices", ()):
                texts[choice["index"]] += choice["text"]
            pieces += 1
            if way == "left" and pieces == 3:
                return Answer(texts, results, left=True)
            if "kv_transfer_params" in chunk:
                results = _results(chunk, choices)
    return Answer(texts, results)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[len(b"data: ") :])


def _results(body: dict[str, Any], choices: int) -> list[dict[str, Any] | None]:
    found = (body.get("kv_transfer_params") or {}).get("kvroute")
    if found is None:
        return [None] * choices
    return list(found["choices"]) if choices > 1 else [found]


# ---------------------------------------------------------------------- alone


async def run_alone(session: aiohttp.ClientSession, url: str, case: Case) -> None:
    """Fill in what a case gives when nothing else runs."""
    if case.way != "stop":
        answer = await send(session, url, case.body, "two" if case.way == "two" else "plain")
        case.texts, case.results = answer.texts, answer.results
        return
    whole = (await send(session, url, case.body, "plain")).texts[0]
    middle = len(whole) // 2
    case.body["stop"] = whole[middle : middle + 2]
    async with session.post(f"{url}/v1/completions", json=case.body) as response:
        found = await response.json()
    case.texts = [found["choices"][0]["text"]]
    written = found["usage"]["completion_tokens"]
    plain = {k: v for k, v in case.body.items() if k != "stop"}
    # what is read reaches as far as the engine had written when it heard of the stop; on a busy machine that is far
    for most in range(written, case.body["max_tokens"] + 1):
        case.results.append((await send(session, url, {**plain, "max_tokens": most}, "plain")).results[0])


def difference(case: Case, answer: Answer) -> str | None:
    """What is not as in the run alone, in a word; None where all is."""
    if answer.left:
        return None if case.texts[0].startswith(answer.texts[0]) else "text"
    if answer.texts != case.texts:
        return "text"
    if case.ask == "nothing":
        return None if not any(answer.results) else "a result nobody asked for"
    for i, result in enumerate(answer.results):
        if result is None or result["error"] is not None:
            return "no result" if result is None else f"no result: {result['error']}"
        place = (result["tokens"].get("behind_stop") or 0) if case.way == "stop" else i
        if place >= len(case.results):
            return "tokens behind a stop string"
        expected = case.results[place]
        assert expected is not None
        found = _different(expected, result)
        if found is not None:
            return found
    return None


def _different(expected: dict[str, Any], result: dict[str, Any]) -> str | None:
    if {k: v for k, v in result["tokens"].items() if k != "behind_stop"} != expected["tokens"]:
        return "tokens"
    if set(result["features"]) != set(expected["features"]):
        return "features"
    for name, vector in expected["features"].items():
        scale = float(np.abs(vector).max())
        if float(np.abs(np.subtract(result["features"][name], vector)).max()) > CLOSE * scale:
            return f"features {name}"
    for name, score in expected["scores"].items():
        if not _near(score["value"], result["scores"][name]["value"]):
            return f"scores {name}"
    for name in ("confidence", "decision"):
        if (expected[name] is None) != (result[name] is None):
            return name
    if expected["confidence"] and not _near(expected["confidence"]["value"], result["confidence"]["value"]):
        return "confidence"
    if expected["decision"]:
        for name in ("mode", "final_mode", "why", "fault"):
            if expected["decision"][name] != result["decision"][name]:
                return f"decision {name}"
        if not _near(expected["decision"]["difficulty"], result["decision"]["difficulty"]):
            return "decision difficulty"
    return None


def _near(a: float | None, b: float | None) -> bool:
    return a is b or (a is not None and b is not None and abs(a - b) <= 1e-3 + 5e-3 * max(abs(a), abs(b)))


# ---------------------------------------------------------------------- the load


@dataclasses.dataclass
class Soaked:
    """What the load gave.

    Attributes:
        sent, delivered, left: by ask and way.
        wrong: by ask, way and what differed.
        errors: texts of the requests that failed.
        memory: (requests that had ended, bytes of all server processes) each second.
        seconds: it took.
    """

    sent: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    delivered: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    left: int = 0
    wrong: Counter[tuple[str, str, str]] = dataclasses.field(default_factory=Counter)
    errors: list[str] = dataclasses.field(default_factory=list)
    memory: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


async def soak(url: str, cases: list[Case], arguments: argparse.Namespace, total: int, processes: list[int]) -> Soaked:
    """Send the requests alone, then all of the load."""
    found = Soaked()
    order = random.Random(arguments.seed)
    waiting = iter([order.choice(cases) for _ in range(total)])
    timeout = aiohttp.ClientTimeout(total=900)
    async with AsyncExitStack() as stack:
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        for case in cases:
            await run_alone(session, url, case)
        began = time.monotonic()

        async def client() -> None:
            for case in waiting:
                key = (case.ask, case.way)
                found.sent[key] += 1
                try:
                    answer = await send(session, url, case.body, case.way)
                except Exception as error:  # noqa: BLE001 - a request that fails is what is counted here
                    found.errors.append(f"{key}: {type(error).__name__}: {error}")
                    continue
                found.delivered[key] += 1
                found.left += answer.left
                wrong = difference(case, answer)
                if wrong is not None:
                    found.wrong[(*key, wrong)] += 1

        async def watch() -> None:
            told = 0
            while True:
                ended = sum(found.delivered.values()) + len(found.errors)
                found.memory.append((ended, resident(processes)))
                if ended // 1000 > told:
                    told = ended // 1000
                    print(f"{ended} of {total}", file=sys.stderr)
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(arguments.at_once)))
        watching.cancel()
        found.seconds = time.monotonic() - began
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=0, help="by default 10,000, with --quick 300")
    parser.add_argument("--cases", type=int, default=0, help="different ones; by default 120, with --quick 60")
    parser.add_argument("--ways", default=",".join(WAYS), help="with commas between; by default all")
    parser.add_argument("--at-once", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=28, help="blocks of 32 tokens in the cache")
    parser.add_argument("--log", type=Path, help="file for what the server prints")
    arguments = parser.parse_args()
    total = arguments.requests or (300 if arguments.quick else 10_000)
    thinker = (arguments.thinker or FOLDER / "model").resolve()
    _vllm.prepare(log_level="WARNING")
    with _vllm.scratch() as scratch:
        folder = Path(scratch)
        settings = _settings(folder, thinker, arguments.seed)
        transfer = {"kv_connector": _vllm.CONNECTOR, "kv_role": "kv_producer", "kv_connector_extra_config": settings}
        count = arguments.cases or (60 if arguments.quick else 120)
        cases = make_cases(count, arguments.ways.split(","), engine(thinker).tokenize, arguments.seed)
        before = set(processes_below(os.getpid()))
        log = arguments.log or folder / "log"
        options = (*SERVER, "--num-gpu-blocks-override", str(arguments.blocks))
        with serving(thinker, log, *options, transfer=transfer, patience=900) as url:
            processes = sorted(set(processes_below(os.getpid())) - before)
            found = asyncio.run(soak(url, cases, arguments, total, processes))
            states = _states_left(url)
            counts = {
                "preempted": metric(url, "vllm:num_preemptions_total"),
                "hits": metric(url, "vllm:prefix_cache_hits_total"),
                "faults": metric(url, "vllm:kvroute_faults_total"),
            }
    _report(arguments, found, states, counts, total, len(cases))


def _settings(folder: Path, thinker: Path, seed: int) -> dict[str, Any]:
    from _heads import costs_head

    policy = folder / "policies" / "thinker"
    shutil.copytree(thinker.parent / "head", policy / "head")
    for name in ("policy.json", "policy.drift.safetensors"):
        shutil.copy(thinker.parent / name, policy)
    right = dataclasses.replace(costs_head(engine(thinker), seed), target="correct")
    right.save(folder / "heads" / "right")
    return {"policies": str(folder / "policies"), "heads": str(folder / "heads")}


def _states_left(url: str) -> float:
    end = time.monotonic() + 20
    while (left := metric(url, "vllm:kvroute_held")) > 0 and time.monotonic() < end:
        time.sleep(0.5)
    return left


def _report(
    arguments: argparse.Namespace, found: Soaked, states: float, counts: dict[str, float], total: int, different: int
) -> None:
    rows = []
    for way in WAYS:
        sent = sum(n for (_, w), n in found.sent.items() if w == way)
        got = sum(n for (_, w), n in found.delivered.items() if w == way)
        wrong = sum(n for (_, w, _), n in found.wrong.items() if w == way)
        rows.append((way, sent, got, wrong))
    print(table(("way", "sent", "delivered", "not as alone"), rows))
    for key, count in found.wrong.most_common():
        print(f"not as alone: {' / '.join(key)}: {count}", file=sys.stderr)
    for text in found.errors[:10]:
        print(text, file=sys.stderr)
    figures = {
        "requests_lost": exact(total - sum(found.delivered.values()), "<= 0"),
        "requests_mixed_up": exact(sum(found.wrong.values()), "<= 0"),
        "states_left": exact(states, "<= 0"),
        "faults": exact(counts["faults"], "<= 0"),
        "preemptions": exact(counts["preempted"], ">= 1"),
        "prompt_tokens_found_in_cache": exact(counts["hits"], ">= 1"),
        "clients_that_left": exact(found.left, ">= 1"),
        "memory_growth_by_1000_requests": memory_growth(found.memory, "<= 0.002" if total >= _WARM else None),
    }
    figures = {k: f for k, f in figures.items() if np.isfinite(f.value)}
    print("\n" + figure_table(figures))
    rate = total / found.seconds
    print(f"\n{total} requests of {different} kinds in {found.seconds / 60:.1f} minutes, {rate:.1f} a second.")
    finish(
        arguments,
        name="vllm_soak",
        figures=figures,
        baseline="each request alone on the same server",
        n={"requests": total, "different": different, "seconds": round(found.seconds, 1)},
    )


if __name__ == "__main__":
    main()
