"""Exceptions thrown inside kvroute in a running vLLM engine: what they cost.

An engine answers small batches that ask for features, a confidence, a policy's decision, a demanded mode, and nothing.
In each batch one function of ours that runs in the engine (scheduler's side, worker's side, logits processor, head,
statistics) throws once, at its first call, one in the middle or its last; which there are is found by counting calls.
Other batches find NaN in the pages that are read, and a head whose file is torn. Then a function throws until the
breaker turns features off.

Every answer must be delivered, and those into which no token is forced must be those of an engine without kvroute.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

import _vllm
from _harness import Figure, exact, figure_table, finish, table
from _thinker import FOLDER, argument_parser, questions

MODULES = (
    "kvroute.serving.scheduler",
    "kvroute.serving.entries",
    "kvroute.serving.finishing",
    "kvroute.serving.kept_requests",
    "kvroute.serving.worker",
    "kvroute.serving.looking",
    "kvroute.serving.deciding",
    "kvroute.serving.thinking_tokens",
    "kvroute.serving.forcing",
    "kvroute.serving.logits_processor",
    "kvroute.serving.messages",
    "kvroute.serving.answers",
    "kvroute.serving.asks",
    "kvroute.serving.catalog",
    "kvroute.serving.config",
    "kvroute.serving.connector",
    "kvroute.serving.tally",
    "kvroute.serving.metrics",
    "kvroute.serving.mailbox",
    "kvroute.choosing",
    "kvroute.heads.head",
    "kvroute.route_steering",
)
"""Where our code that runs in the engine is, or is called from."""
ENTRIES = ("KVRouteConnector", "KVRouteStats", "KVRouteMetrics", "ForcedTokens")
"""Classes whose public methods vLLM calls itself: an exception is thrown inside them, not in their place."""
KINDS = ("features", "confidence", "policy", "mode", "nothing")
ASKS: dict[str, dict[str, Any] | None] = {
    "features": {"features": ["prompt:paper-mteb", "answer:paper-mteb", "kv-coe", "length"]},
    "confidence": {"confidence": "right", "features": ["kv-coe"]},
    "policy": {"policy": "thinker", "features": ["answer:paper-mteb"]},
    "mode": {"mode": "fast", "features": ["prompt:paper-mteb"]},
    "nothing": None,
}
FORCED = ("policy", "mode")
TOKENS = 24
ENGINE = {"block_size": 32, "max_model_len": 256, "max_num_seqs": 8, "disable_log_stats": False}


class InjectedError(RuntimeError):
    """Thrown by this script."""


@dataclass(frozen=True)
class Point:
    """A function of ours, and who has it.

    Attributes:
        module: a module's name.
        owner: a class in it, or None where the function is the module's own or was imported into it.
        name: the function's.
    """

    module: str
    owner: str | None
    name: str

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module.removeprefix("kvroute."), self.owner, self.name)))

    @contextlib.contextmanager
    def replaced(self, wrap: Callable[[Any], Any]) -> Iterator[None]:
        """With ``wrap(function)`` in its place."""
        holder = importlib.import_module(self.module)
        if self.owner is not None:
            holder = getattr(holder, self.owner)
        there = inspect.getattr_static(holder, self.name)
        function = there.__func__ if isinstance(there, staticmethod) else there
        put = wrap(function)
        setattr(holder, self.name, staticmethod(put) if isinstance(there, staticmethod) else put)
        try:
            yield
        finally:
            setattr(holder, self.name, there)


def points() -> list[Point]:
    """Every function of ours that a batch may call."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__module__.startswith("kvroute"):
                found.append(Point(name, None, key))
            if not inspect.isclass(value) or value.__module__ != name:
                continue
            for method, there in vars(value).items():
                function = there.__func__ if isinstance(there, staticmethod) else there
                inside = key not in ENTRIES or method.startswith("_")
                if isinstance(function, FunctionType) and not method.startswith("__") and inside:
                    found.append(Point(name, key, method))
    return found


@dataclass
class Batch:
    """What a batch gave, by kind of request.

    Attributes:
        tokens: of the answers; None for one that ended in another way than by its tokens.
        results: what kvroute said.
        faults: counted in the metrics meanwhile.
        states: requests that either side still held something for.
    """

    tokens: dict[str, list[int] | None] = field(default_factory=dict)
    results: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    faults: float = 0.0
    states: int = 0


class Served:
    """An engine in this process that answers batches.

    Args:
        model: its folder.
        prompts: tokens, one a kind.
        kvroute: the connector's settings; None for an engine without it.
    """

    def __init__(self, model: str, prompts: Sequence[Sequence[int]], kvroute: dict[str, Any] | None) -> None:
        self._engine = _vllm.start_engine(model, kvroute=kvroute, **ENGINE)
        self._prompts = prompts
        self._kvroute = kvroute is not None

    def batch(self, asks: dict[str, dict[str, Any] | None] = ASKS) -> Batch:
        """Answer one request of each kind at once."""
        before = self.counted("faults")
        options = {"max_tokens": TOKENS, "ignore_eos": True}
        params = [_vllm.sampling(ask if self._kvroute else None, **options) for ask in asks.values()]
        prompts = [{"prompt_token_ids": list(p)} for p, _ in zip(self._prompts, asks, strict=False)]
        found = Batch()
        for kind, output in zip(asks, self._engine.generate(prompts, params, use_tqdm=False), strict=True):
            answer = output.outputs[0]
            found.tokens[kind] = list(answer.token_ids) if answer.finish_reason in ("stop", "length") else None
            found.results[kind] = (output.kv_transfer_params or {}).get("kvroute")
        self._engine.llm_engine.step()  # the workers hear of the last end
        found.faults = self.counted("faults") - before
        found.states = self._states() if self._kvroute else 0
        return found

    def counted(self, name: str) -> float:
        """A metric of ours."""
        return _vllm.metrics(self._engine).get(f"vllm:kvroute_{name}", 0.0)

    def _states(self) -> int:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from kvroute.serving.forcing import BOARD

        scheduler = self._engine.llm_engine.engine_core.engine_core.scheduler.connector._scheduler
        return scheduler.num_states + get_kv_transfer_group()._worker.num_states + len(BOARD)


# ---------------------------------------------------------------------- in the engine's process


def without_kvroute(model: str, prompts: list[list[int]]) -> dict[str, list[int] | None]:
    """The answers of an engine that has no connector."""
    return Served(model, prompts, None).batch().tokens


def with_faults(
    model: str, prompts: list[list[int]], settings: dict[str, Any], wanted: int, seed: int
) -> dict[str, Any]:
    """Batches with faults, and what came of each."""
    served = Served(model, prompts, settings)
    served.batch()
    clean = served.batch()  # the first one had no prefix to find
    all_points = points()
    calls: Counter[Point] = Counter()
    with contextlib.ExitStack() as stack:
        for point in all_points:
            stack.enter_context(point.replaced(lambda f, point=point: _counting(f, calls, point)))
        served.batch()
    places = [(p, at) for p in all_points if calls[p] for at in sorted({0, calls[p] // 2, calls[p] - 1})]
    random.Random(seed).shuffle(places)
    places = list(itertools.islice(itertools.cycle(places), wanted)) if wanted < len(places) else places
    while len(places) < wanted:
        places += places[: wanted - len(places)]
    rows = []
    for point, at in places:
        thrown: list[int] = []
        with point.replaced(lambda f, at=at, thrown=thrown: _throwing(f, at, thrown)):
            batch = served.batch()
        row = {"point": str(point), "module": point.module, "thrown": len(thrown), **vars(batch)}
        # a good one, so that the breaker sees no row of faults; what failed last is told with the next step
        rows.append(row | {"faults": batch.faults + served.batch().faults})
    nan = [_nan_batch(served, kind) for kind in KINDS if ASKS[kind] is not None]
    torn = served.batch({"features": {"confidence": "torn"}, "policy": {"policy": "torn"}, "nothing": None})
    again = served.batch()
    off = _until_off(served)
    return {
        "clean": vars(clean),
        "rows": rows,
        "nan": [vars(b) for b in nan],
        "torn": vars(torn),
        "again": vars(again),
        "off": off,
        "reached": sum(1 for p in all_points if calls[p]),
    }


def _counting(function: Callable[..., Any], calls: Counter[Point], point: Point) -> Callable[..., Any]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[point] += 1
        return function(*args, **kwargs)

    return counting


def _throwing(function: Callable[..., Any], at: int, thrown: list[int]) -> Callable[..., Any]:
    calls = itertools.count()

    def throwing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            thrown.append(at)
            raise InjectedError("thrown by the benchmark")
        return function(*args, **kwargs)

    return throwing


def _nan_batch(served: Served, kind: str) -> Batch:
    """A batch in which the pages of one request hold NaN whenever kvroute reads them; the engine never sees it."""
    place = list(ASKS).index(kind)

    def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
        def reading(side: Any, given: Any) -> Any:
            requests = getattr(given, "requests", given)  # of a step, or of answers that end
            mine = [r for r in requests if int(r.id.split("-")[0]) % len(ASKS) == place]
            blocks = sorted({b for r in mine for b in r.blocks[0]})
            kept = [(s, s.keys[:, blocks].clone(), s.values[:, blocks].clone()) for s in side._stacks]
            for stack, _, _ in kept:
                stack.keys[:, blocks] = float("nan")
                stack.values[:, blocks] = float("nan")
            try:
                return function(side, given)
            finally:
                for stack, keys, values in kept:
                    stack.keys[:, blocks], stack.values[:, blocks] = keys, values

        return reading

    with contextlib.ExitStack() as stack:
        for name in ("step", "read"):
            stack.enter_context(Point("kvroute.serving.worker", "WorkerSide", name).replaced(poisoned))
        return served.batch()


def _until_off(served: Served) -> dict[str, Any]:
    """Throw at every read until features are off; then what a request is told, and what the metric says."""
    point = Point("kvroute.serving.worker", "WorkerSide", "_read")

    def broken(_: Callable[..., Any]) -> Callable[..., Any]:
        def read(*_: Any) -> Any:
            raise InjectedError("thrown by the benchmark")

        return read

    before = served.counted("faults")
    batches = []
    with point.replaced(broken):
        while not served.counted("features_off") and len(batches) < 100:
            batches.append(served.batch())
    faults = served.counted("faults") - before
    last = served.batch()
    return {
        "batches": [vars(b) for b in batches],
        "faults": faults,
        "gauge": served.counted("features_off"),
        "last": vars(last),
    }


# ---------------------------------------------------------------------- what it must be


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


def judged(plain: dict[str, list[int] | None], found: dict[str, Any]) -> dict[str, Figure]:
    """The figures."""
    clean, rows, off = found["clean"], found["rows"], found["off"]
    everything = [*rows, *found["nan"], found["again"], *off["batches"], off["last"]]
    delivered = [b["tokens"][k] is not None and len(b["tokens"][k]) == TOKENS for b in everything for k in KINDS]
    equal = [b["tokens"][k] == plain[k] for b in everything for k in KINDS if k not in FORCED]
    hit = [r for r in rows if r["thrown"]]
    counted = [r["faults"] >= 1 for r in hit]
    silent = sum(not _says_something(batch) for batch in found["nan"])
    torn = found["torn"]
    off_texts = [off["last"]["results"][k]["error"] or "" for k in KINDS if ASKS[k] is not None]
    return {
        "exceptions_thrown": exact(len(hit), None),
        "functions_thrown_in": exact(len({r["point"] for r in hit}), None),
        "answers_delivered": exact(sum(delivered) / len(delivered), ">= 1"),
        "answers_equal_to_vllm_alone": exact(sum(equal) / len(equal), ">= 1"),
        "faults_before_the_first": exact(len(unlike(clean, clean)), "<= 0"),
        "engine_alive_at_the_end": exact(float(not unlike(found["again"], clean)), ">= 1"),
        "exceptions_counted_in_metrics": exact(sum(counted) / len(counted), ">= 1"),
        "states_left": exact(sum(b["states"] for b in everything), "<= 0"),
        "nan_batches_that_say_nothing": exact(silent, "<= 0"),
        "torn_heads_that_are_off": exact(
            sum("off" in (torn["results"][k]["error"] or "") for k in ("features", "policy")), ">= 2"
        ),
        "torn_head_answers": exact(sum(t is not None for t in torn["tokens"].values()), ">= 3"),
        "faults_until_off": exact(off["faults"], None),
        "breaker_gauge": exact(off["gauge"], ">= 1"),
        "requests_told_off": exact(sum("turned its features off" in t for t in off_texts) / len(off_texts), ">= 1"),
    }  # fmt: skip


def _says_something(batch: dict[str, Any]) -> bool:
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


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--faults", type=int, default=0, help="exceptions to throw; by default 200, with --quick 40")
    parser.add_argument("--log", type=Path, help="file for what the engines print")
    arguments = parser.parse_args()
    wanted = arguments.faults or (40 if arguments.quick else 200)
    _vllm.prepare(log_level="WARNING")
    thinker = arguments.thinker or FOLDER / "model"
    from _thinker import engine

    reader = engine(thinker)
    asked = questions(len(KINDS), arguments.seed + 71)
    prompts = [reader.tokenize([{"role": "user", "content": q.question}]) for q in asked]
    with _vllm.scratch() as folder:
        settings = make_settings(Path(folder), thinker, thinker.parent / "head", arguments.seed)
        plain = _vllm.apart(without_kvroute, str(thinker), prompts, log=arguments.log)
        found = _vllm.apart(with_faults, str(thinker), prompts, settings, wanted, arguments.seed, log=arguments.log)
    rows = []
    for module in MODULES:
        mine = [r for r in found["rows"] if r["module"] == module and r["thrown"]]
        if mine:
            answers = [r["tokens"][k] is not None for r in mine for k in KINDS]
            equal = [r["tokens"][k] == plain[k] for r in mine for k in KINDS if k not in FORCED]
            counted = sum(r["faults"] >= 1 for r in mine)
            functions = len({r["point"] for r in mine})
            rows.append(
                (
                    module,
                    functions,
                    len(mine),
                    f"{sum(answers)} of {len(answers)}",
                    f"{sum(equal)} of {len(equal)}",
                    counted,
                )
            )
    print(table(("thrown in", "functions", "exceptions", "answers", "equal to vLLM alone", "counted"), rows))
    figures = judged(plain, found)
    print("\n" + figure_table(figures))
    for line in unlike(found["again"], found["clean"]):
        print(f"after the faults {line}", file=sys.stderr)
    for row in found["rows"]:
        if row["thrown"] and (row["states"] or row["faults"] < 1):
            print(f"{row['point']}: {row['faults']:g} counted, {row['states']} states left", file=sys.stderr)
    finish(
        arguments,
        name="vllm_faults",
        figures=figures,
        baseline="the same engine without kvroute",
        n={"exceptions": len(found["rows"]), "answers": len(found["rows"]) * len(KINDS)},
    )


if __name__ == "__main__":
    main()
