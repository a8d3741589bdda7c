"""Is a difficulty read from the KV cache worth anything on real questions? Beside length, MiniLM and hidden states.

A model answers the rows of several sets at once (fast) and step by step (slow); both answers are kept in .cache, so
that whatever is tried afterwards generates nothing. A set counts where slow beats fast by five points or more.
On the sets that count every feature gets the same head, the same folds (by skeleton) and the same two targets:

- ``label``: the 0/25/75/100 of `kvroute label`, as published;
- ``gain``: what slow is worth for the row (slow right minus fast right), which is what a router spends tokens for.

``policy`` thinks above one threshold; ``band``, as `kvroute calibrate` makes it, also gives up above a second one,
where the label says that slow mode is wrong too.

Choices (layers, part, penalty, thresholds) are made within training rows; every figure is of rows that were held out.
AUROC is taken within each set and averaged, so that telling the sets apart earns nothing. ``transfer`` trains on one
set and judges another. With --quick, or without the data, the tiny thinker's kinds of questions stand in for the sets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import _thinker
from _harness import Figure, add_common_arguments, figure_table, finish, judge, table
from kvroute import TransformersEngine
from kvroute.label_rows import LabelRow
from kvroute.routing_curves import Modes
from kvroute.routing_intervals import Estimate, Resamples, at_equal_accuracy, compare_gaps, gap_recovered, point_figures
from quality.answers import SETS, Prompts, both_answers, questions, read_prompts
from quality.crossfit import Judged, SetAuroc, fit_and_judge, transfer

COUNTS_FROM = 5.0
"""Points of accuracy that slow must be ahead by."""
KV, HIDDEN, SET = "keys and values", "hidden state, layer chosen", "the set alone"
MODELS = {"qwen": "Qwen2.5-Coder-0.5B-Instruct"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.set_defaults(model="qwen")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the sets")
    parser.add_argument("--sets", default=",".join(SETS), help="names with commas between")
    parser.add_argument("--rows", type=int, default=160, help="rows a set")
    parser.add_argument("--dtype", default="float32", help="that answers are written in; prompts are read in it too")
    parser.add_argument("--cache", type=Path, default=Path(".cache/routing_quality"), help="answers, resumable")
    parser.add_argument("--draws", type=int, default=2000, help="of the intervals")
    parser.add_argument("--answers-only", action="store_true", help="write the answers and stop")
    return parser.parse_args()


def rows_and_prompts(arguments: argparse.Namespace) -> tuple[str, dict[str, list[LabelRow]], Prompts | None]:
    """Name of the model, answered rows by set, and what it holds of their prompts."""
    if arguments.quick or not arguments.data.is_dir():
        print("The tiny thinker's kinds of questions: this shows that the script runs, no more.\n")
        engine = _thinker.engine()
        rows, _ = _thinker.labelled(
            engine, _thinker.questions(400, arguments.seed + 5), {"test": 1.0}, checkpoints=None, parts=("test",)
        )
        kinds = sorted({str(r.extra["kind"]) for r in rows})
        sets = {kind: [r for r in rows if r.extra["kind"] == kind] for kind in kinds}
    else:
        source: Any = arguments.model
        if arguments.model == "qwen":
            from _qwen import qwen_folder

            source = qwen_folder()
        engine = TransformersEngine.from_pretrained(str(source), dtype=arguments.dtype, token_budget=8192)
        asked = {name: questions(arguments.data, name, arguments.rows) for name in arguments.sets.split(",")}
        sets = both_answers(engine, asked, arguments.cache)
    name = MODELS.get(arguments.model, engine.info.name)
    if arguments.answers_only:
        return name, sets, None
    counted = [r for name in counts(sets, arguments)[1] for r in sets[name]]
    prompts = read_prompts(engine, counted, arguments.cache) if counted else None
    return name, sets, prompts


def counts(sets: dict[str, list[LabelRow]], arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """A table of both modes by set, and the sets that count."""
    lines, names = [], []
    for name, rows in sets.items():
        modes = Modes.of(rows)
        drawn = Resamples(len(rows), arguments.draws, seed=arguments.seed)
        gain = drawn.estimate(lambda mean, m=modes: 100 * mean(m.slow.right - m.fast.right))  # type: ignore[misc]
        enough = gain.value is not None and gain.value >= COUNTS_FROM
        names += [name] if enough else []
        unread = sum(not a.readable for r in rows for a in (*r.fast, *r.slow)) / (2 * len(rows))
        cut = sum(a.finish_reason == "length" for r in rows for a in r.slow) / len(rows)
        lines.append(
            (name, len(rows), f"{modes.fast.accuracy:.3f}", f"{modes.slow.accuracy:.3f}", shown(gain, 1),
             f"{modes.fast.mean_tokens:.0f}", f"{modes.slow.mean_tokens:.0f}", f"{100 * unread:.0f} %",
             f"{100 * cut:.0f} %", "yes" if enough else "no")
        )  # fmt: skip
    header = ("set", "rows", "fast right", "slow right", "slow ahead, points", "tokens fast", "tokens slow",
              "unreadable", "slow cut off", "counts")  # fmt: skip
    return table(header, lines), names


def shown(estimate: Estimate, digits: int = 3) -> str:
    if estimate.value is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def interval(value: float, drawn: np.ndarray[Any, Any]) -> Estimate:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def in_points(share: Estimate) -> Estimate:
    return Estimate(*(None if v is None else 100 * v for v in (share.value, share.low, share.high)))


def features_table(
    judged: dict[str, Judged], modes: Modes, drawn: Resamples, fast_wrong: SetAuroc, only_slow: SetAuroc
) -> str:
    """A row a feature."""
    lines = []
    for name, found in judged.items():
        policies = [point_figures(policy, modes, drawn) for policy in (found.point, found.band)]
        cells = [
            *(interval(*of.mean(found.difficulty)) for of in (fast_wrong, only_slow)),
            gap_recovered(found.sweep, modes, drawn),
            at_equal_accuracy(found.sweep, modes, drawn).of_slow,
        ]
        told = ["-", "-"] if name == SET else [shown(c) for c in cells[:2]]  # alike for all rows of a set
        got = [x for p in policies for x in (shown(in_points(p.accuracy_gain), 1), shown(p.of_slow))]
        lines.append((name, *told, *map(shown, cells[2:]), *got))
    line = modes.random()
    lines.append(
        ("at random", "0.500", "0.500", "0.500", shown(at_equal_accuracy(line, modes, drawn).of_slow), *"----")
    )
    header = ("feature", "AUROC fast is wrong", "AUROC only slow is right", "gap recovered",
              "tokens at slow - 1 pt, of slow's", "policy: points against slow", "its tokens, of slow's",
              "giving up too: points", "its tokens, of slow's")  # fmt: skip
    return table(header, lines)


def transfers(
    vectors: Sequence[tuple[str, np.ndarray[Any, Any]]], y: np.ndarray[Any, Any], own: np.ndarray[Any, Any],
    truth: np.ndarray[Any, Any], strata: Sequence[str], groups: Sequence[str], seed: int,
) -> tuple[str, float, float]:  # fmt: skip
    """AUROC of "fast is wrong" by the set that was trained on (rows) and judged (columns), and the means on and off
    the diagonal; the diagonal is the cross-fitted head of all sets.

    Args:
        vectors: the feature's candidates.
        y: targets.
        own: cross-fitted difficulties, of all sets.
        truth: whether fast is wrong.
        strata, groups: set and skeleton of each row.
        seed: of the folds.
    """
    names, of = list(dict.fromkeys(strata)), np.asarray(strata)
    places = {name: np.flatnonzero(of == name) for name in names}

    def told(values: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> float:
        a, b = values[truth[rows]][:, None], values[~truth[rows]][None]
        return float(np.mean((a > b) + 0.5 * (a == b)))

    lines, off, on = [], [], []
    for source in names:
        line: list[object] = [source]
        for target in names:
            if source == target:
                value = told(own[places[target]], places[target])
                on.append(value)
            else:
                predicted = transfer(vectors, y, places[source], places[target], groups, seed)
                value = told(predicted, places[target])
                off.append(value)
            line.append(f"({value:.3f})" if source == target else f"{value:.3f}")
        lines.append(line)
    return table(("trained on", *names), lines), float(np.mean(on)), float(np.mean(off)) if off else float("nan")


def figure(estimate: Estimate, must: str | None, rows: int) -> Figure:
    value, low, high = (float("nan") if v is None else v for v in (estimate.value, estimate.low, estimate.high))
    return Figure(value, low, high, must, judge(low, high, must), rows)


def main() -> None:
    arguments = parse()
    model, sets, prompts = rows_and_prompts(arguments)
    text, names = counts(sets, arguments)
    print(f"{model}\n\n{text}\n")
    figures: dict[str, Figure] = {}
    counted = [r for name in names for r in sets[name]]
    if prompts is not None:
        figures = report(arguments, prompts, counted, [name for name in names for _ in sets[name]])
    elif not arguments.answers_only:
        print("No set counts: slow is nowhere ahead by five points, so there is nothing to route.")
    finish(
        arguments, name="routing_quality", figures=figures, n={name: len(rows) for name, rows in sets.items()},
        baseline="question length, MiniLM and hidden states, with the same head and folds",
    )  # fmt: skip


def report(
    arguments: argparse.Namespace, prompts: Prompts, rows: list[LabelRow], strata: list[str]
) -> dict[str, Figure]:
    """All tables, and the figures."""
    seed, n = arguments.seed, len(rows)
    modes, groups = Modes.of(rows), [r.skeleton for r in rows]
    drawn = Resamples(n, arguments.draws, seed=seed)
    fast, slow = modes.fast.right >= 0.5, modes.slow.right >= 0.5
    fast_wrong = SetAuroc(~fast, strata, draws=arguments.draws, seed=seed)
    only_slow = SetAuroc(slow & ~fast, strata, draws=arguments.draws, seed=seed)
    vectors = prompts.candidates()
    names = list(dict.fromkeys(strata))
    # As many of each outcome in all folds: else a fold's mean, which training rows lack, drags useless features down.
    kinds = [f"{s} {a:d} {b:d}" for s, a, b in zip(strata, fast, slow, strict=True)]
    if len(names) > 1:
        known = np.array([[s == name for name in names] for s in strata], dtype=np.float32)
        vectors[SET] = [("set", known)]
    targets = {
        "label": np.array([r.label for r in rows], dtype=np.float64) / 100,
        "gain": 0.5 + (modes.slow.right - modes.fast.right) / 2,
    }
    runs = [("label", "ridge"), ("gain", "ridge"), ("label", "mlp")]
    by_run: dict[tuple[str, str], dict[str, Judged]] = {}
    for target, head in runs[: 2 if arguments.quick else 3]:
        judged = {
            name: fit_and_judge(candidates, targets[target], modes, kinds, groups, seed=seed, head=head)
            for name, candidates in vectors.items()
        }
        by_run[target, head] = judged
        print(f"Target {target}, head {head}, {n} rows of {', '.join(names)}:\n")
        print(features_table(judged, modes, drawn, fast_wrong, only_slow) + "\n")
        for name in (KV, HIDDEN):
            print(f"- {name}: chosen by fold: {'; '.join(judged[name].chosen)}")
        print()
    main_run, gain_run = by_run["label", "ridge"], by_run["gain", "ridge"]
    per_set = {name: fast_wrong.by_set(j.difficulty) for name, j in main_run.items() if name != SET}
    shown_sets = list(per_set[KV])
    lines = [(name, *(shown(interval(*found[s])) for s in shown_sets)) for name, found in per_set.items()]
    print("AUROC of fast is wrong by set, target label, head ridge:\n")
    print(table(("feature", *shown_sets), lines) + "\n")
    figures: dict[str, Figure] = {}
    for feature in (KV, "MiniLM") if len(names) > 1 else ():
        text, on, off = transfers(
            vectors[feature], targets["label"], main_run[feature].difficulty, ~fast, strata, groups, seed
        )
        print(f"Transfer, {feature}, AUROC of fast is wrong (in brackets: trained on all sets, rows held out):\n")
        print(f"{text}\n\nmean on the diagonal {on:.3f}, off it {off:.3f}\n")
        figures[f"transfer_auroc_{feature.replace(' ', '_').lower()}"] = Figure(off, off, off, None, None, n)
    figures |= compared(main_run, gain_run, modes, drawn, fast_wrong, n)
    print(figure_table(figures))
    return figures


def compared(
    label: dict[str, Judged], gain: dict[str, Judged], modes: Modes, drawn: Resamples, fast_wrong: SetAuroc, n: int
) -> dict[str, Figure]:
    """Keys and values beside each other feature, paired."""
    figures = {}
    mine, mine_drawn = fast_wrong.mean(label[KV].difficulty)
    figures["kv_auroc_fast_is_wrong"] = figure(interval(mine, mine_drawn), None, n)
    for name, other in label.items():
        if name in (KV, SET):
            continue
        value, values = fast_wrong.mean(other.difficulty)
        short = name.replace(" ", "_").replace(",", "").replace("'", "").lower()
        must = ">= 0.0" if name in ("question length", "MiniLM") else None
        figures[f"kv_auroc_minus_{short}"] = figure(interval(mine - value, mine_drawn - values), must, n)
        gaps = compare_gaps(gain[KV].sweep, gain[name].sweep, modes, drawn)
        figures[f"kv_gap_minus_{short}"] = figure(gaps, None, n)
    gap = gap_recovered(gain[KV].sweep, modes, drawn)
    figures["kv_gap_recovered"] = figure(gap, ">= 0.5", n)
    for name, outcome in (("policy", gain[KV].point), ("band", label[KV].band)):
        point = point_figures(outcome, modes, drawn)
        figures[f"kv_{name}_points_against_slow"] = figure(in_points(point.accuracy_gain), ">= -1.0", n)
        figures[f"kv_{name}_tokens_of_slow"] = figure(point.of_slow, None, n)
    return figures


if __name__ == "__main__":
    main()
