"""What scores of an answer are worth: KV-CoE, hidden-state CoE, logits, P(True), length, combinations, trained
confidences.

Three models answer public questions, once and greedily: SmolLM2-135M on sets that it can do, Qwen2.5-Coder-0.5B, and
the tiny thinker on its own questions. A set counts with at least 50 right and 50 wrong answers. All scores come from
one pass over each answer. What is searched (chains: layers, part, heads, windows, steps; a trained confidence on pooled
keys and values: layers, part, windows, heads, kind) is searched in nested folds: each answer is judged by what was
chosen and fitted without its fold, like questions in one fold. Differences are paired.

Without --data, or with --quick, only the tiny thinker is measured.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import _thinker
from _harness import Figure, add_common_arguments, figure_table, finish, judge, table
from answers.replay import Recorded, Replay, record
from answers.searches import HeadSearch, Items, best_chain, chain_values, chains, hidden_probe
from answers.written import answered
from kvroute import TransformersEngine
from kvroute.confidence_maps import Floats
from kvroute.heads.search import SearchOptions
from kvroute.label_rows import LabelMeta, LabelRow, usable
from kvroute.labelled_answers import LabelledAnswer, label_answers
from kvroute.score_judging import BASELINES, ENOUGH, Comparison, compare, judge_set
from kvroute.score_report import ScoreReport, shown
from kvroute.self_evaluation import CONFIDENCE

MODELS = {
    "smollm2": {"sums": 300, "arc_easy": 300, "commonsenseqa": 300},
    "qwen": {"svamp": 200, "arc_easy": 200, "multiarith": 200, "commonsenseqa": 280},
    "thinker": {"run": 600, "map": 600},
}
"""The sets that each model is asked, and how many of their questions."""
OWN, OTHER, HIDDEN, CHAIN = "confidence, own set", "confidence, other sets", "hidden-state probe", "kv-coe searched"


@dataclass(frozen=True)
class Data:
    """One set of one model."""

    name: str
    answers: list[LabelledAnswer]
    recorded: Recorded


@dataclass(frozen=True)
class Measured:
    """What was found of one model."""

    report: ScoreReport
    pairs: list[Comparison]
    notes: list[str]


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the questions")
    parser.add_argument("--models", default="thinker,smollm2,qwen", help="with commas between")
    parser.add_argument("--cache", type=Path, default=Path(".cache/score_quality"), help="answers, keys and values")
    parser.add_argument("--count", type=int, help="questions a set; by default by model and set")
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples of the intervals")
    parser.add_argument("--out", type=Path, help="a folder for an HTML report of each model")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.count, arguments.bootstrap = "thinker", 160, 200
    return arguments


# ------------------------------------------------------------------ answers


def load_engine(model: str, arguments: argparse.Namespace) -> TransformersEngine:
    """A model by its short name."""
    if model == "thinker":
        return _thinker.engine()
    if model == "qwen":
        from _qwen import qwen_folder

        return TransformersEngine.from_pretrained(str(qwen_folder()), dtype="float32")
    return TransformersEngine.from_pretrained(arguments.model, dtype="float32")


def thinker_rows(engine: TransformersEngine, name: str, count: int) -> tuple[list[LabelRow], LabelMeta]:
    """The thinker's own questions, of some kinds, labelled by ``kvroute label``."""
    drawn = _thinker.questions(count * 4, 577)
    rows, meta = _thinker.labelled(engine, drawn, {"train": 1.0}, checkpoints=None, parts=("train",))  # type: ignore[arg-type]
    return [r for r in usable(rows) if r.extra["kind"] == name][:count], meta


def counts(model: str, arguments: argparse.Namespace) -> dict[str, int]:
    """By set of a model, how many questions are asked."""
    return {name: arguments.count or usual for name, usual in MODELS[model].items()}


def gather(model: str, arguments: argparse.Namespace, cache: Path) -> tuple[TransformersEngine, LabelMeta, list[Data]]:
    """The answers of a model to its sets, and what was seen of them."""
    engine = load_engine(model, arguments)
    found: list[Data] = []
    for name, count in counts(model, arguments).items():
        if model == "thinker":
            rows, meta = thinker_rows(engine, name, count)
        else:
            rows, meta = answered(engine, name, arguments.data, cache / model, count=count)
        # A chain needs three vectors: answers of fewer tokens have no KV-CoE, and are left out for all scores.
        answers = [a for a in label_answers(engine, rows, meta, "fast") if len(a.answer) > 3]
        right = sum(a.correct for a in answers)
        print(f"{model}, {name}: {right} right and {len(answers) - right} wrong answers", file=sys.stderr, flush=True)
        if not arguments.quick and min(right, len(answers) - right) < ENOUGH:
            print(f"{model}, {name}: left out, {right} of {len(answers)} are right", flush=True)
            continue
        key = f"{name}-{len(answers)}-{engine.info.dtype}"
        found.append(Data(name, answers, record(engine, answers, cache / model, key)))
    return engine, meta, found


# ------------------------------------------------------------------ one model


def measure(model: str, arguments: argparse.Namespace, cache: Path) -> Measured:
    """All scores of one model's answers."""
    engine, meta, data = gather(model, arguments, cache)
    items = Items(
        np.concatenate([np.full(len(d.answers), n) for n, d in enumerate(data)]),
        np.array([a.correct for d in data for a in d.answers], dtype=bool),
        tuple(a.group for d in data for a in d.answers),
    )
    replay = Replay(engine.info, [d.recorded for d in data])
    options = SearchOptions(rows=600, finalists=1, settings=2, kinds=("ridge", "logistic"))
    if arguments.quick:
        options = SearchOptions.quick(rows=200, kinds=("ridge",))
    heads = HeadSearch(replay, meta, items, options, arguments.seed)
    extra: dict[str, Floats] = {}
    extra[CONFIDENCE], chosen = heads.nested()
    notes = [f"Chosen for the trained confidence, by fold: {'; '.join(chosen)}."]
    small = replace(heads, options=SearchOptions.quick(rows=400, kinds=("ridge",)))
    extra[OWN] = np.nansum([small.nested(items.sets == n)[0] for n in range(len(data))], axis=0)
    if len(data) > 1:
        extra[OTHER] = small.from_other_sets()
    hidden = np.concatenate([d.recorded.hidden for d in data])
    extra[HIDDEN] = hidden_probe(hidden, items, range(0, hidden.shape[1], 2 if hidden.shape[1] > 8 else 1))
    made = chains(engine.info.layers[0].kv_heads)[:: 12 if arguments.quick else 1]
    values = np.concatenate([chain_values(d.recorded, made, sentence_ends(engine, d.answers)) for d in data])
    names = [f"CoE-{letter}, {chain}" for chain in made for letter in "RC"]
    extra[CHAIN], chosen = best_chain(values, items, names)
    notes.append(f"Chosen among {len(names)} chains and scores, by fold: {'; '.join(chosen)}.")
    judged = []
    for n, d in enumerate(data):
        own = items.sets == n
        scores = d.recorded.scores | {name: column[own] for name, column in extra.items()}
        ready = [name for name in extra if name != CHAIN]
        judged.append(
            judge_set(
                d.name, scores, items.truth[own], groups=[a.group for a in d.answers], ready=ready,
                resamples=arguments.bootstrap, seed=arguments.seed + n,
            )
        )  # fmt: skip
    about = {
        "model": engine.info.name,
        "dtype": engine.info.dtype,
        "questions": counts(model, arguments),
        "searched": "in nested folds",
        "seed": arguments.seed,
    }
    report = ScoreReport(judged, about=about, baselines=(*BASELINES, HIDDEN))
    pairs = [compare(CONFIDENCE, b, report.sets) for b in (*report.baselines, CHAIN)]
    return Measured(report, pairs, notes)


def sentence_ends(engine: TransformersEngine, answers: Sequence[LabelledAnswer]) -> list[list[int]]:
    """Of each answer, one past the token that ends each sentence or line."""
    known: dict[int, bool] = {}
    found = []
    for answer in answers:
        ends = []
        for place, token in enumerate(answer.answer[:-1], 1):
            if token not in known:
                text = str(engine.tokenizer.decode([token]))
                known[int(token)] = text.rstrip(" ")[-1:] in (".", "!", "?", "\n", ";")
            if known[int(token)]:
                ends.append(place)
        found.append(ends)
    return found


# ------------------------------------------------------------------ output


def show(found: Measured) -> None:
    """Tables in markdown."""
    report = found.report
    print(f"\n## {report.about['model']}\n\n{report.summary}\n")
    for heads, rows in (report.answers_rows(), report.mean_rows(), report.set_rows()):
        print(table(heads, rows), "\n")
    print(f"`{CONFIDENCE}` against what it has to beat, mean over sets:\n")
    rows = [
        [c.b, shown(c.auroc, sign=True), "-" if c.p is None else f"{c.p:.1g}", *map(_by_set, c.by_set.values())]
        for c in found.pairs
    ]
    print(table(["against", "AUROC gained", "p", *(s.name for s in report.sets)], rows), "\n")
    print("\n".join(f"- {note}" for note in found.notes), flush=True)


def _by_set(estimate: Any) -> str:
    return shown(estimate, 2, sign=True)


def figures(model: str, found: Measured) -> dict[str, Figure]:
    """For the JSON line."""
    report = found.report
    rows = sum(map(len, report.sets))
    made: dict[str, Figure] = {}

    def add(name: str, estimate: Any, must: str | None = None) -> None:
        value, low, high = (
            float(estimate.value if v is None else v) for v in (estimate.value, estimate.low, estimate.high)
        )
        made[f"{model}_{name}"] = Figure(value, low, high, must, judge(low, high, must), rows)

    for name in (CONFIDENCE, "confidence and logits", "all combined", CHAIN, HIDDEN, report.baselines[0]):
        if name in report.names:
            add(f"auroc_{name.replace(' ', '_').replace(',', '')}", report.mean(name).estimates()["auroc"])
    by_name = {c.b: c for c in found.pairs}
    logits = [n for n in report.baselines if not n.startswith("hidden")]
    hidden = [n for n in report.baselines if n.startswith("hidden_coe")]
    for name, among in (("best_logit_baseline", logits), ("hidden_coe", hidden)):
        if among:
            add(f"auroc_gained_on_{name}", by_name[among[0]].auroc, ">= 0")
    return made


def main() -> None:
    """Run."""
    arguments = parse()
    models = [m for m in arguments.models.split(",") if m]
    if not arguments.data.is_dir() and models != ["thinker"]:
        print(f"No questions in {arguments.data}: only the tiny thinker's own are measured.\n")
        models = ["thinker"]
    if arguments.quick:
        print("A few of the tiny thinker's answers, which shows that the script runs, no more.\n")
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch) if arguments.quick else arguments.cache
        measured = {model: measure(model, arguments, cache) for model in models}
    every: dict[str, Figure] = {}
    for model, found in measured.items():
        show(found)
        every |= figures(model, found)
        if arguments.out is not None:
            command = "python benchmarks/score_quality.py"
            print("Written:", *found.report.save(arguments.out / model, command=command))
    print(f"\n{figure_table(every)}")
    finish(
        arguments,
        name="score_quality",
        figures=every,
        n={f"{m}, {s.name}": len(s) for m, found in measured.items() for s in found.report.sets},
        baseline="the best score that needs no keys and values, and hidden-state CoE",
    )


if __name__ == "__main__":
    main()
