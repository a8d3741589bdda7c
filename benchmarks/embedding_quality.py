"""Which vectors are best: keys and values against hidden states, at equal dimensions and with equal post-processing.

It is ``kvroute evaluate embeddings`` with everything on: all forms of putting a text to the model, the search over ways
to pool keys and values, and trained projections; and it judges the presets. Ways are chosen on dev rows (a quarter of
the train rows of classification sets; STS and retrieval: rows split by a hash of their ids), keys and values in the
same way as hidden states; what is reported is measured on other rows, with 95 % bootstrap intervals, in pairs where two
methods are compared.

Vectors are whitened to --dimension sizes by PCA fitted on unlabelled train and dev texts, the same for all; a second
table has raw cosines, with nothing fitted. The presets are measured as they are in kvroute, and the script says whether
this run would choose the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _harness import Figure, add_common_arguments, figure_table, finish, judge
from _made_up_tasks import made_up_tasks
from _qwen import qwen_folder
from kvroute import TransformersEngine
from kvroute.embedding_evaluation import EvaluationOptions, OutOfTimeError, Tasks, evaluate_embeddings, load_tasks
from kvroute.embedding_evaluation.report import EmbeddingReport
from kvroute.embedding_evaluation.results import Judge, Picks, Rows
from kvroute.embedding_evaluation.run import BEST_HIDDEN, CHOSEN


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the sets")
    parser.add_argument("--rows", type=int, default=400, help="train rows a classification set; the rest in proportion")
    parser.add_argument("--cache", type=Path, default=Path(".cache/embedding_quality"), help="states, resumable")
    parser.add_argument("--forms", default="plain,prompt,twice", help="ways to put a text to the model")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument("--document-tokens", type=int, default=128, help="documents are cut here")
    parser.add_argument("--dimension", type=int, default=256, help="sizes kept by the whitening")
    parser.add_argument("--fit-texts", type=int, default=800, help="short texts that the whitening is fitted on")
    parser.add_argument("--rounds", type=int, default=500, help="bootstrap rounds")
    parser.add_argument("--minutes", type=float, default=600, help="stop after so long; a later run goes on from there")
    parser.add_argument("--report", type=Path, help="a folder for report.json and report.html")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds = min(arguments.rows, 16), min(arguments.rounds, 50)
        arguments.document_tokens, arguments.dimension, arguments.fit_texts = 32, 16, 60
    return arguments


def read(arguments: argparse.Namespace) -> Tasks:
    """The rows."""
    if arguments.quick or not arguments.data.is_dir():
        print("A few made-up rows, which show that the script runs, no more.\n")
        return made_up_tasks()
    return load_tasks(arguments.data, arguments.rows)


def figures(report: EmbeddingReport) -> dict[str, Figure]:
    """What is asked for: ``best`` at least the best hidden state, ``fast`` at least 97 % of ``best``; and how far
    MiniLM is, on which nothing is asked."""
    best, fast, hidden = (report.methods[n].rows for n in ("`best`", "`fast`", BEST_HIDDEN))
    found = compared_figures(best, fast, hidden, report.judge)
    if "MiniLM" in report.methods:
        minilm = report.methods["MiniLM"].rows
        apart = report.judge.estimate(lambda p: minilm.average(p) - best.average(p))
        found["minilm_minus_best"] = Figure(apart.value or 0.0, apart.low or 0.0, apart.high or 0.0, None, None)
    return found


def compared_figures(best: Rows, fast: Rows, hidden: Rows, judged: Judge) -> dict[str, Figure]:
    """The figures that have to be something."""
    sets = max(len(best.classification) - 1, 1)

    def won(p: Picks | None) -> float:
        return float(sum(best.value(t, p) >= hidden.value(t, p) for t in best.classification))

    def figure(of, must: str) -> Figure:
        e = judged.estimate(of)
        low, high = min(e.low, e.value), max(e.high, e.value)
        return Figure(e.value, low, high, must, judge(low, high, must))

    return {
        "classification_sets_at_least_hidden": figure(won, f">= {sets}"),
        "sts_best_minus_hidden": figure(lambda p: best.group("sts", p) - hidden.group("sts", p), ">= 0"),
        "retrieval_best_minus_hidden": figure(
            lambda p: best.group("retrieval", p) - hidden.group("retrieval", p), ">= 0"
        ),
        "fast_over_best": figure(lambda p: fast.average(p) / best.average(p), ">= 0.97"),
    }


def main() -> None:
    """Run."""
    arguments = parse()
    tasks = read(arguments)
    source = str(qwen_folder()) if arguments.model == "qwen" else arguments.model
    engine = TransformersEngine.from_pretrained(source, dtype=arguments.dtype)
    options = EvaluationOptions(
        forms=tuple(arguments.forms.split(",")),
        search=True,
        train=True,
        dimension=arguments.dimension,
        fit_texts=arguments.fit_texts,
        limits=(256, arguments.document_tokens),
        rounds=arguments.rounds,
        seed=arguments.seed,
        seconds=60 * arguments.minutes,
        every=12 if arguments.quick else 1,
    )
    folder = Path(tempfile.mkdtemp()) if arguments.quick else arguments.cache
    try:
        report = evaluate_embeddings(engine, tasks, options, folder=folder)
    except OutOfTimeError:
        print("The time is up; run it again to go on from here.")
        return
    best, chosen = (report.methods[n].how for n in ("`best`", CHOSEN))
    same = "is what this run chooses on its dev rows" if best == chosen else f"is not what this run chooses: {chosen}"
    report.notes.insert(0, f"`best` {same}.")
    print(report.markdown())
    for name, why in report.left_out.items():
        print(f"- Left out: {name} ({why})")
    if arguments.report is not None:
        print(f"\nWritten: {', '.join(map(str, report.save(arguments.report)))}")
    measured = figures(report)
    print("\n" + figure_table(measured))
    finish(
        arguments,
        name="embedding_quality",
        figures=measured,
        n=report.methods["`best`"].rows.counts(),
        baseline="the best hidden state, chosen the same way",
    )


if __name__ == "__main__":
    main()
