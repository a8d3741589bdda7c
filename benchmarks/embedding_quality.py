"""Which vectors are best: keys and values against hidden states, at equal dimensions, with equal post-processing.

Every candidate is pooled from one pass of the model over each text. Candidates are chosen on dev rows
(classification: a part of the train rows; STS and retrieval: rows split by a hash of their ids), and what is
reported is measured on other rows, with 95 % bootstrap intervals. Both sides are chosen in the same way, from the
same rows, by the
mean over the three groups of tasks.

Vectors are whitened to --dimension sizes by PCA fitted on unlabelled train and dev texts, the same for both sides;
the second table has raw cosines, with nothing fitted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from _harness import add_common_arguments, finish
from quality.candidates import Candidate, hidden_candidates, kv_candidates, paper_candidate
from quality.data import CLASSIFICATION, Tasks, load, made_up
from quality.evaluate import Evaluator, Rows
from quality.extract import extract, store_for

from kvroute import TransformersEngine
from kvroute.progress import progress_bar

BEFORE, AFTER = 'This sentence: "', '" means in one word: "'
"""The prompt of PromptEOL (arXiv 2307.16645): the last token gathers the meaning."""


class Bench:
    """Stores, evaluators and results of one run."""

    def __init__(self, arguments: argparse.Namespace, engine: TransformersEngine, tasks: Tasks, cache: Path) -> None:
        self.engine, self.tasks, self.dimension = engine, tasks, arguments.dimension
        short, documents = tasks.texts()
        self.evaluators: dict[tuple[str, bool], Evaluator] = {}
        for form, before, after, last in (("plain", "", "", False), ("prompted", BEFORE, AFTER, True)):
            stores = []
            for texts, limit in ((short, 256), (documents, arguments.document_tokens)):
                store = store_for(cache, engine, texts, limit=limit, before=before, after=after, last=last)
                extract(store, engine, limit=limit, before=before, after=after, last=last)
                store.load()
                stores.append(store)
            for fitted in (True, False):
                self.evaluators[form, fitted] = Evaluator(
                    tasks, *stores, dimension=self.dimension if fitted else 0, fit_texts=arguments.fit_texts,
                    seed=arguments.seed,
                )  # fmt: skip

    def run(self, candidate: Candidate, part: str, *, fitted: bool) -> Rows:
        form = "prompted" if candidate.weights == "last" else "plain"
        return self.evaluators[form, fitted].run(candidate, part)  # type: ignore[arg-type]

    def choose(self, candidates: list[Candidate], *, fitted: bool) -> list[tuple[float, Candidate]]:
        """Candidates by their mean on the dev rows, best first."""
        found = []
        with progress_bar("Choosing", len(candidates)) as advance:
            for candidate in candidates:
                found.append((self.run(candidate, "dev", fitted=fitted).average(), candidate))
                advance(1)
        return sorted(found, key=lambda pair: -pair[0])


def bootstrap(rows: dict[str, Rows], rounds: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Resampled row indices by task, the same for every method, so that methods are compared in pairs."""
    rng = np.random.default_rng(seed)
    one = next(iter(rows.values()))
    counts = {t: one.count(t) for tasks in one.tasks().values() for t in tasks}
    return [{t: rng.integers(0, n, n) for t, n in counts.items()} for _ in range(rounds)]


def percentiles(values: list[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def table(title: str, methods: dict[str, tuple[Candidate, Rows]], picks: list[dict[str, np.ndarray]]) -> str:
    """Markdown: one row a method, one column a task, and the mean over groups with its interval."""
    tasks = [t for ts in next(iter(methods.values()))[1].tasks().values() for t in ts]
    lines = [f"**{title}**", "", "| | layers run | " + " | ".join(tasks) + " | mean over groups |"]
    lines.append("| --- " * (len(tasks) + 3) + "|")
    for label, (candidate, rows) in methods.items():
        low, high = percentiles([rows.average(p) for p in picks])
        values = " | ".join(f"{rows.value(t):.3f}" for t in tasks)
        mean = f"{rows.average():.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {label}: {candidate.name} | {candidate.depth} | {values} | {mean} |")
    return "\n".join(lines)


def compare(a: Rows, b: Rows, picks: list[dict[str, np.ndarray]]) -> list[str]:
    """Paired differences a - b by task and over all, with intervals."""
    lines = ["| task | difference |", "| --- | --- |"]
    for task in [t for ts in a.tasks().values() for t in ts]:
        low, high = percentiles([a.value(task, p[task]) - b.value(task, p[task]) for p in picks])
        lines.append(f"| {task} | {a.value(task) - b.value(task):+.3f} [{low:+.3f}, {high:+.3f}] |")
    low, high = percentiles([a.average(p) - b.average(p) for p in picks])
    lines.append(f"| mean over groups | {a.average() - b.average():+.3f} [{low:+.3f}, {high:+.3f}] |")
    return lines


def group_mean(rows: Rows, group: str, pick: dict[str, np.ndarray] | None = None) -> float:
    return float(np.mean([rows.value(t, None if pick is None else pick[t]) for t in rows.tasks()[group]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the sets")
    parser.add_argument("--cache", type=Path, default=Path(".cache/embedding_quality"), help="pooled states, resumable")
    parser.add_argument("--train", type=int, default=800, help="train rows a classification set")
    parser.add_argument("--test", type=int, default=300, help="test rows a classification set")
    parser.add_argument("--pairs", type=int, default=700, help="pairs an STS set")
    parser.add_argument("--documents", type=int, default=400, help="documents a retrieval set")
    parser.add_argument("--document-tokens", type=int, default=128, help="documents are cut here")
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--fit-texts", type=int, default=1200, help="short texts that post-processing is fitted on")
    parser.add_argument("--rounds", type=int, default=500, help="bootstrap rounds")
    arguments = parser.parse_args()
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    layers = engine.info.num_layers
    if arguments.quick:
        arguments.dimension, arguments.rounds, arguments.fit_texts = 16, 100, 60
        tasks, cache = made_up(), Path(tempfile.mkdtemp())
        print("Quick: a handful of made-up rows, which shows that the script runs and nothing else.\n")
    elif not arguments.data.is_dir():
        sys.exit(f"No data in {arguments.data}: give --data, or --quick for a run on made-up rows.")
    else:
        tasks = load(
            arguments.data,
            train=arguments.train,
            test=arguments.test,
            pairs=arguments.pairs,
            documents=arguments.documents,
        )
        cache = arguments.cache
    bench = Bench(arguments, engine, tasks, cache)
    kv = kv_candidates(layers) + kv_candidates(layers, prompted=True)
    hidden = hidden_candidates(layers) + hidden_candidates(layers, prompted=True)
    if arguments.quick:
        kv, hidden = kv[::40] + kv[-1:], hidden[::40] + hidden[-1:]
    output: list[str] = []
    figures: dict[str, dict[str, object]] = {}
    for fitted in (True, False):
        chosen_kv, chosen_hidden = bench.choose(kv, fitted=fitted), bench.choose(hidden, fitted=fitted)
        half = [(s, c) for s, c in chosen_kv if c.depth <= layers // 2]
        plain = [(s, c) for s, c in chosen_kv if c.weights != "last"]
        picked = {
            "best": chosen_kv[0][1],
            "fast": half[0][1],
            "best without a prompt": plain[0][1],
            "hidden state": chosen_hidden[0][1],
            "hidden state without a prompt": next(c for _, c in chosen_hidden if c.weights != "last"),
            "hidden state, half depth": next(c for _, c in chosen_hidden if c.depth <= layers // 2),
            "last hidden state, mean": Candidate("hidden", (layers,), "h", "mean", True),
            "paper-mteb": paper_candidate(layers),
        }
        results = {label: (c, bench.run(c, "test", fitted=fitted)) for label, c in picked.items()}
        picks = bootstrap({k: r for k, (_, r) in results.items()}, arguments.rounds, arguments.seed)
        form = f"whitened to {arguments.dimension} dimensions" if fitted else "raw cosines, nothing fitted"
        output.append(table(f"Test rows, {form}", results, picks))
        best, fast, other = (results[k][1] for k in ("best", "fast", "hidden state"))
        output.append("Paired differences, best minus hidden state:\n\n" + "\n".join(compare(best, other, picks)))
        output.append("Ten best on the dev rows: " + "; ".join(f"{c.name} {s:.3f}" for s, c in chosen_kv[:10]) + ".")
        output.append("Hidden states: " + "; ".join(f"{c.name} {s:.3f}" for s, c in chosen_hidden[:5]) + ".")
        tag = "" if fitted else "raw_"
        ratio = [fast.average(p) / best.average(p) for p in picks]
        figures[f"{tag}fast_over_best"] = figure(fast.average() / best.average(), ratio, ">= 0.97", 0.97)
        for group in best.tasks():
            difference = [group_mean(best, group, p) - group_mean(other, group, p) for p in picks]
            value = group_mean(best, group) - group_mean(other, group)
            figures[f"{tag}{group}_best_minus_hidden"] = figure(value, difference, ">= 0", 0.0)
        if fitted:
            wins = [best.value(t) >= other.value(t) for t in CLASSIFICATION if t in best.classification]
            figures["classification_sets_won"] = {
                "value": sum(wins), "low": None, "high": None, "must": ">= 4", "ok": sum(wins) >= 4
            }  # fmt: skip
    print("\n\n".join(output))
    rows = {t: len(x.test) for x in [*tasks.classification, *tasks.sts, *tasks.retrieval] for t in [x.name]}
    finish(
        arguments, name="embedding_quality", figures=figures, n=rows, baseline="best hidden state, chosen the same way"
    )


def figure(value: float, values: list[float], must: str, bound: float) -> dict[str, object]:
    low, high = percentiles(values)
    ok = True if low >= bound else (False if high < bound else None)
    return {"value": value, "low": low, "high": high, "must": must, "ok": ok}


if __name__ == "__main__":
    main()
