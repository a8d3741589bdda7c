"""What the scripts of this folder share: arguments, paired timings, tables, the JSON line.

Both sides of a ratio are timed in the same run, in both orders: a round runs all sides forwards, then backwards
(A B B A), and gives one ratio, so drift and neighbours hit both sides alike. The value is the interquartile mean
of the rounds' ratios, its 95 % interval a bootstrap over rounds. Rounds are added until each interval lies on
one side of what its figure must be, or the time is up. Garbage is collected between timings, never within.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvroute.installed import machine, versions

Side = Callable[[], object]
Clock = Callable[[], float]

JUDGED_FROM = 6
"""Rounds an interval needs to be judged: with fewer, even all rounds on one side are no 95 % evidence."""

# ---------------------------------------------------------------------- arguments


def add_common_arguments(parser: argparse.ArgumentParser, *, seconds: float = 160.0) -> None:
    """``--quick``, ``--json``, ``--model``, ``--seconds``, ``--seed``."""
    parser.add_argument("--quick", action="store_true", help="under a minute; shows that it runs, measures roughly")
    parser.add_argument("--json", action="store_true", help="the last line printed is one JSON object")
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or a model kvroute brings")
    parser.add_argument("--seconds", type=float, default=seconds, help="time for the measurements, without loading")
    parser.add_argument("--seed", type=int, default=0)


def parse_arguments(
    description: str | None, *, seconds: float = 160.0, quick_seconds: float = 24.0, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """The shared arguments alone; ``--quick`` lowers ``seconds`` to ``quick_seconds`` unless they are given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, seconds=seconds)
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.seconds == seconds:
        arguments.seconds = quick_seconds
    return arguments


# ---------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        value: what was measured.
        low, high: its interval; both the value itself where there is nothing to vary.
        must: what it must be, such as ``"<= 1.02"``, or None where nothing is asked.
        ok: whether the whole interval meets ``must``; False when all of it misses, None between.
        rounds: how many rounds it was taken from.
        cpu: the same ratio of CPU seconds of the process, where it is one of times.
    """

    value: float
    low: float
    high: float
    must: str | None
    ok: bool | None
    rounds: int = 1
    cpu: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high, "must": self.must, "ok": self.ok}


def judge(low: float, high: float, must: str | None) -> bool | None:
    """True when the whole interval meets ``must``, False when all of it misses, None between or unasked."""
    if must is None:
        return None
    match = re.fullmatch(r"(<=|>=)\s*(-?\d+(?:\.\d+)?)", must)
    if match is None:
        raise ValueError(f"must is '<= x' or '>= x', not {must!r}")
    bound = float(match[2])
    if match[1] == "<=":
        return True if high <= bound else (False if low > bound else None)
    return True if low >= bound else (False if high < bound else None)


def exact(value: float, must: str | None) -> Figure:
    """A figure that does not vary between runs (bytes, counts)."""
    return Figure(value, value, value, must, judge(value, value, must))


def interquartile_mean(values: np.ndarray[Any, Any]) -> Any:
    """Mean of the middle half along the last axis: nearly as sharp as the mean, nearly as robust as the median."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)


def summarise(ratios: Sequence[float], must: str | None, *, seed: int = 0, cpu: Sequence[float] = ()) -> Figure:
    """Value, interval and judgement of the rounds' ratios."""
    values = np.asarray(ratios, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (2000, len(values)))
    low, high = np.percentile(interquartile_mean(values[picks]), [2.5, 97.5])
    ok = judge(low, high, must) if len(values) >= JUDGED_FROM else None
    cpu_value = float(interquartile_mean(np.asarray(cpu))) if len(cpu) else None
    return Figure(float(interquartile_mean(values)), float(low), float(high), must, ok, len(values), cpu_value)


# ---------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Ratio:
    """Seconds of side ``top`` / seconds of side ``bottom``."""

    top: str
    bottom: str
    must: str | None = None


@dataclass
class Rounds:
    """Timings of some sides.

    Attributes:
        seconds, cpu: by side, its mean wall-clock and CPU seconds in each round.
        figures: by name, what was asked.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)

    def median(self, side: str) -> float:
        """Median wall-clock seconds of a side."""
        return float(np.median(self.seconds[side]))


def measure(
    sides: Mapping[str, Side],
    ratios: Mapping[str, Ratio],
    *,
    seconds: float,
    seed: int = 0,
    min_rounds: int = 3,
    max_rounds: int = 400,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> Rounds:
    """Time the sides in rounds and take the ratios.

    Args:
        sides: what to run, by name.
        ratios: the figures asked for, by name.
        seconds: stop adding rounds when the next one would pass this, warm-up not counted.
        seed: of the bootstrap.
        min_rounds: rounds that are run whatever the time.
        max_rounds: rounds at most.
        warmup: runs of each side before, untimed.
        clock: wall clock.
        cpu_clock: CPU seconds of the process.
    """
    names = list(sides)
    for _ in range(warmup):
        for name in names:
            sides[name]()
    found = Rounds({n: [] for n in names}, {n: [] for n in names})
    began = clock()
    look = JUDGED_FROM
    for done in range(1, max_rounds + 1):
        start = clock()
        turn = (done - 1) % len(names)  # each side comes first in its turn
        forwards = names[turn:] + names[:turn]
        spent = {n: [0.0, 0.0] for n in names}
        for name in forwards + forwards[::-1]:
            wall, cpu = _timed(sides[name], clock, cpu_clock)
            spent[name][0] += wall / 2
            spent[name][1] += cpu / 2
        for name in names:
            found.seconds[name].append(spent[name][0])
            found.cpu[name].append(spent[name][1])
        now = clock()
        last = done >= max_rounds or (done >= min_rounds and now - began + (now - start) > seconds)
        if last or done == look:  # few looks, each later than the one before: a look is a chance to be wrong
            look = max(look + 1, look * 4 // 3)
            found.figures = {n: _ratio(found, r, seed) for n, r in ratios.items()}
            asked = [f for f in found.figures.values() if f.must is not None]
            if last or (asked and all(f.ok is not None for f in asked)):
                break
    return found


def _timed(side: Side, clock: Clock, cpu_clock: Clock) -> tuple[float, float]:
    gc.collect()
    gc.disable()
    try:
        cpu, wall = cpu_clock(), clock()
        side()
        return clock() - wall, cpu_clock() - cpu
    finally:
        gc.enable()


def _ratio(rounds: Rounds, ratio: Ratio, seed: int) -> Figure:
    wall = np.asarray(rounds.seconds[ratio.top]) / np.asarray(rounds.seconds[ratio.bottom])
    top, bottom = np.asarray(rounds.cpu[ratio.top]), np.asarray(rounds.cpu[ratio.bottom])
    return summarise(wall.tolist(), ratio.must, seed=seed, cpu=(top / bottom).tolist() if (bottom > 0).all() else ())


# ---------------------------------------------------------------------- output

_OK = {True: "yes", False: "**no**", None: "undecided"}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def figure_table(figures: Mapping[str, Figure]) -> str:
    """One row a figure: value, interval, what it must be, whether it is, CPU time's ratio, rounds."""
    rows = []
    for name, f in figures.items():
        interval = f"{f.low:.4g} to {f.high:.4g}" if f.high > f.low else "exact"
        ok = _OK[f.ok] if f.must else ""
        cpu = "" if f.cpu is None else f"{f.cpu:.3f}"
        rows.append((name, f"{f.value:.4g}", interval, f.must or "", ok, cpu, f.rounds))
    return table(("figure", "value", "95 % interval", "must", "ok", "by CPU time", "rounds"), rows)


def finish(
    arguments: argparse.Namespace,
    *,
    name: str,
    figures: Mapping[str, Figure | Mapping[str, Any]],
    baseline: str,
    n: object,
) -> None:
    """With ``--json``, print the JSON object as the last line.

    Args:
        arguments: the script's.
        name: the script's name.
        figures: by the words of the task they answer.
        baseline: what the other side is.
        n: how much was measured: a number, or numbers by name.
    """
    listed = {k: f.as_json() if isinstance(f, Figure) else dict(f) for k, f in figures.items()}
    judged = [f["ok"] for f in listed.values() if f["must"] is not None]
    result = {
        "name": name,
        "figures": listed,
        "ok": False if False in judged else (None if None in judged or not judged else True),
        "baseline": baseline,
        "n": n,
        "versions": versions("python", "kvroute", "torch", "transformers", "sentence-transformers", "numpy"),
        "machine": machine(),
        "seed": arguments.seed,
    }
    sys.stdout.flush()
    if arguments.json:
        print(json.dumps(result, allow_nan=False), flush=True)
