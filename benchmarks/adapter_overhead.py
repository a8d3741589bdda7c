"""The adapters' own time: what they add to an engine, a router or an embedder that answers at once.

One call at a time: percentiles of whole calls. The router renders the prompt by a template, decides and calls a branch
that does nothing; the chat model's engine gives a kept answer (``watched``: with a callback that collects confidences);
the embeddings' embedder gives a kept vector (``index``: LlamaIndex's). ``bare`` is a prompt template alone: its p99 is
what the machine itself does to a call. In parallel: 64 calls through KVRouteRouter and through
RunnableBranch, with the same branches and the same decision: the ratio of calls a second. ``batch`` and ``abatch`` are
those of the runnables; ``threads`` are 64 threads that invoke, ``tasks`` 64 tasks of one event loop.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableBranch, RunnableConfig

from _harness import Figure, Ratio, figure_table, finish, judge, measure, parse_arguments
from kvroute import Decision, KVEmbedder, Policy, Prefilled, TransformersEngine, Usage
from langchain_kvroute import ChatKVRoute, KVRouteEmbeddings, KVRouteRouter, SelfEvaluationCallbackHandler
from llama_index.embeddings.kvroute import KVRouteEmbedding

THINKER = Path(__file__).parents[1] / "examples" / "tiny_thinker" / "model"
PARALLEL = 64
MUST = {50: "<= 1", 99: "<= 5"}


class Echo(Runnable[Any, Any]):
    """A branch that costs nothing."""

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return input

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:  # noqa: ARG002
        return input


class NullRouter:
    """Decides at once: prompts of even length are easy."""

    policy = Policy(kind="one-step")
    engine = SimpleNamespace(tokenizer=object())

    def prefill_many(self, prompts: Sequence[Any], **_: Any) -> list[Prefilled]:
        return [
            Prefilled(Decision(self.mode(p), 40.0, 50.0, 0.7, "difficulty", "one-step"), Usage(32, 0, 32, 0))
            for p in prompts
        ]

    def mode(self, prompt: Sequence[dict[str, str]]) -> str:
        return "slow" if len(prompt[-1]["content"]) % 2 else "fast"


class NullEngine:
    """An engine in all but its answers, which are one that was written before."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self._kept = engine.generate([{"role": "user", "content": "top 11,42"}], max_tokens=24)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[Any], **_: Any) -> Any:
        return [self._kept] * len(prompts)

    async def agenerate(self, prompts: Sequence[Any], **_: Any) -> Any:
        return [self._kept] * len(prompts)


class NullEmbedder(KVEmbedder):
    """An embedder in all but its vectors, which are one that was made before."""

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__(engine)
        self._kept = super().encode(["top 11,42"])

    def encode(self, texts: Any, **_: Any) -> Any:
        return np.repeat(self._kept, len(texts), axis=0)


def percentiles(name: str, taken: Sequence[float], seed: int) -> dict[str, Figure]:
    """p50 and p99 in milliseconds, with bootstrap intervals."""
    values = 1000 * np.asarray(taken)
    picks = np.random.default_rng(seed).integers(0, len(values), (400, len(values)))
    found = {}
    for q, must in (MUST if not name.startswith("bare") else dict.fromkeys(MUST)).items():
        low, high = np.quantile(np.percentile(values[picks], q, axis=1), [0.025, 0.975])
        value = float(np.percentile(values, q))
        ok = judge(float(low), float(high), must)
        found[f"{name}_p{q}_ms"] = Figure(value, float(low), float(high), must, ok, len(values))
    return found


def timed(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each call."""
    taken = []
    for _ in range(count + 20):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return taken[20:]


async def atimed(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each awaited call, in one event loop."""
    taken = []
    for _ in range(count + 20):
        began = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - began)
    return taken[20:]


def main() -> None:
    arguments = parse_arguments(__doc__, seconds=120.0, quick_seconds=16.0)
    count = 200 if arguments.quick else 2000
    ask = ChatPromptTemplate.from_messages([("system", "Answer in one line."), ("user", "{question}")])
    branch, decides = ask | Echo(), NullRouter()
    router: KVRouteRouter[Any, Any] = KVRouteRouter(router=decides, fast=branch, slow=branch)

    def hard(given: dict[str, str]) -> bool:
        messages = [{"role": m.type, "content": m.content} for m in ask.format_prompt(**given).to_messages()]
        return decides.prefill_many([messages])[0].decision.mode == "slow"

    plain: Runnable[Any, Any] = RunnableBranch((hard, branch), branch)
    inputs = [{"question": "x" * (20 + i)} for i in range(PARALLEL)]
    assert router.batch(inputs) == plain.batch(inputs), "both sides must do the same"

    figures: dict[str, Figure] = {}
    engine = TransformersEngine.from_pretrained(THINKER)
    chat = ChatKVRoute(engine=NullEngine(engine))
    watched = chat.with_config(callbacks=[SelfEvaluationCallbackHandler(max_records=100)])
    vectors = KVRouteEmbeddings(embedder=NullEmbedder(engine))
    index = KVRouteEmbedding(embedder=NullEmbedder(engine))
    one = inputs[0]
    alone: KVRouteRouter[Any, Any] = KVRouteRouter(router=decides, fast=Echo(), slow=branch)  # an even length is fast
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "bare": (lambda: ask.invoke(one), lambda: ask.ainvoke(one)),
        "router": (lambda: alone.invoke(one), lambda: alone.ainvoke(one)),
        "chat": (lambda: chat.invoke("top 11,42"), lambda: chat.ainvoke("top 11,42")),
        "watched": (lambda: watched.invoke("top 11,42"), lambda: watched.ainvoke("top 11,42")),
        "embeddings": (lambda: vectors.embed_query("top 11,42"), lambda: vectors.aembed_query("top 11,42")),
        "index": (lambda: index.get_query_embedding("top 11,42"), lambda: index.aget_query_embedding("top 11,42")),
    }
    for name, (call, acall) in calls.items():
        gc.collect()
        figures |= percentiles(f"{name}_sync", timed(call, count), arguments.seed)
        figures |= percentiles(f"{name}_async", asyncio.run(atimed(acall, count)), arguments.seed)

    pool = ThreadPoolExecutor(PARALLEL)
    loop = asyncio.new_event_loop()

    async def tasks(runnable: Runnable[Any, Any]) -> Any:
        return await asyncio.gather(*(runnable.ainvoke(i) for i in inputs))

    ways: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
        "batch": lambda r: r.batch(inputs),
        "abatch": lambda r: loop.run_until_complete(r.abatch(inputs)),
        "threads": lambda r: list(pool.map(r.invoke, inputs)),
        "tasks": lambda r: loop.run_until_complete(tasks(r)),
    }

    def side(way: Callable[[Runnable[Any, Any]], Any], runnable: Runnable[Any, Any]) -> Callable[[], Any]:
        return lambda: way(runnable)

    for name, way in ways.items():
        rounds = measure(
            {"branch": side(way, plain), "router": side(way, router)},
            {f"parallel_throughput_{name}": Ratio("branch", "router", ">= 0.95")},
            seconds=arguments.seconds / len(ways),
            seed=arguments.seed,
        )
        figures |= rounds.figures
        each = {side: 1000 * rounds.median(side) / PARALLEL for side in ("branch", "router")}
        print(
            f"{name}: {each['branch']:.3f} ms a call through RunnableBranch, {each['router']:.3f} ms through the router"
        )
    loop.close()
    pool.shutdown()
    print(figure_table(figures))
    finish(
        arguments,
        name="adapter_overhead",
        figures=figures,
        n={"calls": count, "parallel": PARALLEL},
        baseline="RunnableBranch with the same branches and decision, in parallel; one call at a time: none",
    )


if __name__ == "__main__":
    main()
