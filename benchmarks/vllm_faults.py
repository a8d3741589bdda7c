"""Exceptions thrown inside kvroute in a running vLLM engine: what they cost.

An engine answers small batches that ask for features (some end at a stop string or token), a confidence, a policy's
decision, a demanded mode, and nothing. Its cache is too small for them, so that requests are preempted. Batches differ
in the way in which answers are read: at once by a worker at hand; step by step, as where the worker is out of reach;
or late, behind the last step, as for a client that waits for its result, whose request's id says so.

In each batch one function of ours that the engine calls throws once, at its first call, one in the middle or its last.
Which there are is found by counting calls: every function of the modules that are loaded, the kernels' too, throws at
least once, and once more where it has a part in reading an answer behind its last step. Other batches find NaN in the
pages that are read, and a head whose file is torn. Then a function throws until the breaker turns features off.

Every answer must be delivered, and those into which no token is forced must be those of an engine without kvroute.
What kvroute says of an answer must be right, or be missing.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import _vllm
from _fault_batches import (
    ASKS,
    AT_HAND,
    FORCED,
    KINDS,
    LATE,
    TOKENS,
    WAYS,
    Batch,
    Served,
    Way,
    make_settings,
    says_something,
    unlike,
    wrong,
)
from _harness import Figure, exact, figure_table, finish, table
from _thinker import FOLDER, argument_parser, engine, questions
from _throwing import Calls, Point, broken, points, throwing

DEFAULT = 200
"""Exceptions, if there are not more functions."""
RESTS: dict[Point, Callable[..., bool]] = {
    Point("kvroute.serving.scheduler", "SchedulerSide", "_rest"): lambda *_: True,
    Point("kvroute.serving.scheduler", "SchedulerSide", "_kept_rest"): lambda *_: True,
    Point("kvroute.serving.scheduler", "SchedulerSide", "_send_rests"): lambda side: bool(side._closing),
    Point("kvroute.serving.worker", "WorkerSide", "begin"): lambda _, meta: bool(meta.rests),
}
"""Calls in which what is left of an answer is named, sent and read, behind its last step."""


# ---------------------------------------------------------------------- in the engine's process


def without_kvroute(model: str, prompts: list[list[int]]) -> tuple[tuple[str, int], dict[str, list[int] | None]]:
    """Where some answers are to end, and all answers of an engine that has no connector."""
    served = Served(model, prompts, None, None)
    whole = served.batch().tokens
    middle = {kind: (whole[kind] or [])[TOKENS // 2 :] for kind in ("stopped", "ended")}
    served.ends = served.engine.get_tokenizer().decode(middle["stopped"][:3]), middle["ended"][0]
    return served.ends, served.batch().tokens


def with_faults(
    model: str, prompts: list[list[int]], ends: tuple[str, int], settings: dict[str, Any], wanted: int | None, seed: int
) -> dict[str, Any]:
    """Batches with faults, and what came of each."""
    served = Served(model, prompts, ends, settings)
    served.batch()  # the first one has no prefix to find
    clean = {way.name: served.batch(way) for way in WAYS}
    calls = {way: Calls() for way in WAYS}
    for way in WAYS:
        served.batch(way, within=calls[way].counted(points(), RESTS))
    rows = [_fault(served, *place) for place in _places(calls, wanted, random.Random(seed))]
    reached = {point for found in calls.values() for point in found.count}
    for point in reached - {r["point"] for r in rows if r["thrown"]}:
        if wanted is None:  # batches differ a little: where the call that was meant did not come, the first will do
            rows += [_fault(served, way, point, 0) for way in WAYS if calls[way].count[point]]
    nan = [vars(_nan_batch(served, way, kind)) for way in WAYS for kind in KINDS if ASKS[kind] is not None]
    torn = served.batch(asks={"features": {"confidence": "torn"}, "policy": {"policy": "torn"}, "nothing": None})
    again = [served.batch(way) for way in WAYS]
    off = _until_off(served)
    return {
        "clean": {name: vars(batch) for name, batch in clean.items()},
        "rows": [row | {"point": str(row["point"])} for row in rows],
        "nan": nan,
        "torn": vars(torn),
        "again": [vars(batch) for batch in again],
        "off": off,
        "reached": {str(point) for point in reached},
    }


def _places(calls: Mapping[Way, Calls], wanted: int | None, rng: random.Random) -> Iterable[tuple[Way, Point, int]]:
    """Where to throw: in each function once, in one of the ways; in all that make and read a rest while they do; then
    at other calls and in other ways."""
    every = [
        (way, point, at)
        for way, found in calls.items()
        for point, count in found.count.items()
        for at in sorted({0, count // 2, count - 1})
    ]
    rests = [(LATE, point, at) for point, at in calls[LATE].inside.items()]
    rng.shuffle(every)
    rng.shuffle(rests)
    first = list({point: (way, point, at) for way, point, at in every}.values())
    least = list(dict.fromkeys([*first, *rests]))
    others = [place for place in every if place not in set(least)]
    count = max(len(least), DEFAULT) if wanted is None else wanted
    return itertools.islice(itertools.cycle([*least, *others]), count)


def _fault(served: Served, way: Way, point: Point, at: int) -> dict[str, Any]:
    """A batch in which one call throws."""
    thrown: list[int] = []
    try:
        batch = served.batch(way, within=throwing(point, at, thrown))
    except Exception as error:
        raise RuntimeError(f"{point}, call {at}, {way.name}: the engine died of it: {error}") from error
    # a good one, so that the breaker sees no row of faults; what failed last is told with the next step
    after = served.batch(way)
    row = {"point": point, "way": way.name, "module": point.module, "thrown": len(thrown), **vars(batch)}
    return row | {"faults": batch.faults + after.faults}


def _nan_batch(served: Served, way: Way, kind: str) -> Batch:
    """A batch in which the pages of one request hold NaN whenever kvroute reads them; the engine never sees it."""

    def poisoned(function: Callable[..., Any]) -> Callable[..., Any]:
        def reading(side: Any, given: Any) -> Any:
            requests = getattr(given, "requests", given)  # of a step, or of answers that end
            blocks = sorted({b for r in requests if r.id.split("-")[0] == kind for b in r.blocks[0]})
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
        return served.batch(way)


def _until_off(served: Served) -> dict[str, Any]:
    """Throw at every read until features are off; then what a request is told, and what the metric says."""
    before = served.counted("kvroute_faults")
    batches = []
    with broken(Point("kvroute.serving.worker", "WorkerSide", "_read")):
        while not served.counted("kvroute_features_off") and len(batches) < 100:
            batches.append(served.batch())
    faults = served.counted("kvroute_faults") - before
    last = served.batch()
    return {
        "batches": [vars(b) for b in batches],
        "faults": faults,
        "gauge": served.counted("kvroute_features_off"),
        "last": vars(last),
    }


# ---------------------------------------------------------------------- what it must be


def judged(plain: dict[str, list[int] | None], found: dict[str, Any], *, all_functions: bool) -> dict[str, Figure]:
    """The figures."""
    clean, rows, off, torn = found["clean"], found["rows"], found["off"], found["torn"]
    at_hand = clean[AT_HAND.name]
    faulty = [*rows, *found["nan"]]
    everything = [*faulty, *found["again"], *off["batches"], off["last"]]
    delivered = [_delivered(b, plain, k) for b in everything for k in KINDS]
    equal = [b["tokens"][k] == plain[k] for b in everything for k in KINDS if k not in FORCED]
    hit = [r for r in rows if r["thrown"]]
    late = [r for r in hit if r["way"] == LATE.name]
    counted = [r["faults"] >= 1 for r in hit]
    before = [text for batch in clean.values() for text in unlike(batch, at_hand) + wrong(batch, at_hand)]
    after = [text for batch in found["again"] for text in unlike(batch, at_hand) + wrong(batch, at_hand)]
    asking = [k for k in KINDS if ASKS[k] is not None]
    off_texts = [off["last"]["results"][k]["error"] or "" for k in asking]
    missed = found["reached"] - {r["point"] for r in hit}
    for text in sorted(missed) if all_functions else ():
        print(f"never thrown in: {text}", file=sys.stderr)
    return {
        "exceptions_thrown": exact(len(hit), None),
        "functions_thrown_in": exact(len({r["point"] for r in hit}), None),
        "functions_reached_and_not_thrown_in": exact(len(missed), "<= 0" if all_functions else None),
        "exceptions_with_late_results": exact(len(late), ">= 1"),
        "late_results_without_a_fault": exact(clean[LATE.name]["late"], ">= 1"),
        "preemptions_without_a_fault": exact(min(batch["preempted"] for batch in clean.values()), ">= 1"),
        "answers_delivered": exact(sum(delivered) / len(delivered), ">= 1"),
        "answers_equal_to_vllm_alone": exact(sum(equal) / len(equal), ">= 1"),
        "faults_before_the_first": exact(len(before) + sum(map(says_something, clean.values())), "<= 0"),
        "engine_alive_at_the_end": exact(float(not after), ">= 1"),
        "exceptions_counted_in_metrics": exact(sum(counted) / len(counted), ">= 1"),
        "wrong_features_and_scores": exact(sum(len(wrong(b, at_hand)) for b in faulty), "<= 0"),
        "states_left": exact(sum(b["states"] for b in everything), "<= 0"),
        "nan_batches_that_say_nothing": exact(sum(not says_something(b) for b in found["nan"]), "<= 0"),
        "torn_heads_that_are_off": exact(
            sum("off" in (torn["results"][k]["error"] or "") for k in ("features", "policy")), ">= 2"
        ),
        "torn_head_answers": exact(sum(t is not None for t in torn["tokens"].values()), ">= 3"),
        "faults_until_off": exact(off["faults"], None),
        "breaker_gauge": exact(off["gauge"], ">= 1"),
        "requests_told_off": exact(sum("turned its features off" in t for t in off_texts) / len(off_texts), ">= 1"),
    }


def _delivered(batch: dict[str, Any], plain: dict[str, list[int] | None], kind: str) -> bool:
    tokens, expected = batch["tokens"][kind], plain[kind]
    return tokens is not None and expected is not None and len(tokens) == len(expected)


def by_module(rows: list[dict[str, Any]], plain: dict[str, list[int] | None]) -> str:
    """The table."""
    out = []
    for module in sorted({r["module"] for r in rows}):
        mine = [r for r in rows if r["module"] == module and r["thrown"]]
        answers = [_delivered(r, plain, k) for r in mine for k in KINDS]
        equal = [r["tokens"][k] == plain[k] for r in mine for k in KINDS if k not in FORCED]
        ways = [sum(r["way"] == way.name for r in mine) for way in WAYS]
        functions = len({r["point"] for r in mine})
        told = (f"{sum(answers)} of {len(answers)}", f"{sum(equal)} of {len(equal)}")
        out.append((module, functions, len(mine), *ways, *told, sum(r["faults"] >= 1 for r in mine)))
    ways_read = [way.name for way in WAYS]
    header = ("thrown in", "functions", "exceptions", *ways_read, "answers", "equal to vLLM alone", "counted")
    return table(header, [row for row in out if row[2]])


def main() -> None:
    parser = argument_parser(__doc__)
    text = "exceptions to throw; by default 200, or as many as there are functions; with --quick 40"
    parser.add_argument("--faults", type=int, default=0, help=text)
    parser.add_argument("--log", type=Path, help="file for what the engines print")
    arguments = parser.parse_args()
    wanted = arguments.faults or (40 if arguments.quick else None)
    _vllm.prepare(log_level="WARNING")
    thinker = arguments.thinker or FOLDER / "model"
    reader = engine(thinker)
    asked = questions(len(KINDS), arguments.seed + 71)
    prompts = [reader.tokenize([{"role": "user", "content": q.question}]) for q in asked]
    with _vllm.scratch() as folder:
        settings = make_settings(Path(folder), thinker, thinker.parent / "head", arguments.seed)
        ends, plain = _vllm.apart(without_kvroute, str(thinker), prompts, log=arguments.log)
        work = (with_faults, str(thinker), prompts, ends, settings, wanted, arguments.seed)
        found = _vllm.apart(*work, log=arguments.log)
    rows = found["rows"]
    print(by_module(rows, plain))
    figures = judged(plain, found, all_functions=wanted is None)
    print("\n" + figure_table(figures))
    at_hand = found["clean"][AT_HAND.name]
    for batch in found["again"]:
        for line in unlike(batch, at_hand) + wrong(batch, at_hand):
            print(f"after the faults {line}", file=sys.stderr)
    for row in rows:
        bad = wrong(row, at_hand)
        if row["thrown"] and (row["states"] or row["faults"] < 1 or bad):
            told = f"{row['faults']:g} counted, {row['states']} states left"
            print(f"{row['point']}, {row['way']}: {told}, wrong: {', '.join(bad) or 'nothing'}", file=sys.stderr)
    finish(
        arguments,
        name="vllm_faults",
        figures=figures,
        baseline="the same engine without kvroute",
        n={"exceptions": len(rows), "answers": len(rows) * len(KINDS)},
    )


if __name__ == "__main__":
    main()
