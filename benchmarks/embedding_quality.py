"""Which vectors are best: keys and values against hidden states, at equal dimensions and with equal post-processing.

Every candidate is pooled from one pass of the model over each text. Candidates are chosen on dev rows (a quarter of the
train rows of classification sets; STS and retrieval: rows split by a hash of their ids) by the mean over the three
groups of tasks, keys and values in the same way as hidden states; what is reported is measured on other rows, with 95 %
bootstrap intervals, in pairs where two methods are compared.

Vectors are whitened to --dimension sizes by PCA fitted on unlabelled train and dev texts, the same for all; a second
table has raw cosines, with nothing fitted. The presets are measured as they are in kvroute, and the script says whether
this run would choose the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from _harness import add_common_arguments, figure_table, finish
from kvroute import PRESETS, TransformersEngine
from kvroute.progress import progress_bar
from quality.candidates import Candidate, hidden_candidates, kv_candidates
from quality.data import Tasks, load, made_up
from quality.evaluate import Evaluator, Rows
from quality.extract import extract, store_for
from quality.report import Results, differences, figures, resample, table

BEFORE, AFTER = 'This sentence: "', '" means in one word: "'
"""The prompt of PromptEOL (arXiv 2307.16645): the last token gathers the meaning."""


_NEAR = 0.975
"""``fast`` is the shallowest candidate that keeps this share of the best one's mean on dev rows."""


class OutOfTimeError(Exception):
    """--minutes are over; what was done is kept."""


class Bench:
    """Stores, evaluators and dev scores of one run."""

    def __init__(self, arguments: argparse.Namespace, engine: TransformersEngine, tasks: Tasks, cache: Path) -> None:
        self.ends = time.monotonic() + 60 * arguments.minutes
        short, documents = tasks.texts()
        self.evaluators: dict[bool, Evaluator] = {}
        names = []
        for prompted in (False, True):
            before, after = (BEFORE, AFTER) if prompted else ("", "")
            stores = []
            for texts, limit in ((short, 256), (documents, arguments.document_tokens)):
                store = store_for(cache, engine, texts, limit=limit, before=before, after=after, last=prompted)
                left = self.ends - time.monotonic()
                if not extract(store, engine, limit=limit, before=before, after=after, last=prompted, seconds=left):
                    raise OutOfTimeError
                store.load()
                names.append(store.folder.name)
                stores.append(store)
            self.evaluators[prompted] = Evaluator(
                tasks, *stores, dimension=arguments.dimension, fit_texts=arguments.fit_texts, seed=arguments.seed
            )
        settings = [arguments.dimension, arguments.fit_texts, arguments.seed, arguments.rows]
        self.scores_file = cache / f"dev-{'-'.join(map(str, settings))}-{'-'.join(n[:4] for n in names)}.json"
        self.scores: dict[str, dict[str, float]] = {}
        if self.scores_file.is_file():
            self.scores = json.loads(self.scores_file.read_text())

    def run(self, candidate: Candidate, part: str, *, whitened: bool) -> Rows:
        """Results by row."""
        return self.evaluators[candidate.weights == "last"].run(candidate, part, whitened=whitened)  # type: ignore[arg-type]

    def rank(self, candidates: list[Candidate], *, whitened: bool = True) -> list[tuple[float, Candidate]]:
        """Candidates by their mean over the groups on the dev rows, best first."""
        found = []
        with progress_bar("Choosing", len(candidates)) as advance:
            for candidate in candidates:
                key = json.dumps([whitened, candidate.parts, asdict(candidate)])
                if key not in self.scores:
                    if time.monotonic() > self.ends:
                        raise OutOfTimeError
                    rows = self.run(candidate, "dev", whitened=whitened)
                    self.scores[key] = {t: rows.value(t) for t in rows.counts()} | {"mean": rows.average()}
                found.append((self.scores[key]["mean"], candidate))
                advance(1)
        return sorted(found, key=lambda pair: -pair[0])

    def keep(self) -> None:
        """Write the dev scores, so that a later run goes on from here."""
        self.scores_file.write_text(json.dumps(self.scores, indent=1))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the sets")
    parser.add_argument("--rows", type=int, default=800, help="train rows a classification set; the rest in proportion")
    parser.add_argument("--cache", type=Path, default=Path(".cache/embedding_quality"), help="pooled states, resumable")
    parser.add_argument("--document-tokens", type=int, default=128, help="documents are cut here")
    parser.add_argument("--dimension", type=int, default=256, help="sizes kept by the whitening")
    parser.add_argument("--fit-texts", type=int, default=1000, help="short texts that the whitening is fitted on")
    parser.add_argument("--rounds", type=int, default=500, help="bootstrap rounds")
    parser.add_argument("--minutes", type=float, default=600, help="stop after so long; a later run goes on from there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.rounds = min(arguments.rows, 16), min(arguments.rounds, 50)
        arguments.document_tokens, arguments.dimension, arguments.fit_texts = 32, 16, 60
    return arguments


def read(arguments: argparse.Namespace) -> Tasks:
    """The rows."""
    n = arguments.rows
    if not arguments.data.is_dir():
        print(f"No data in {arguments.data}: these are a few made-up rows, which show that the script runs, no more.\n")
        return made_up()
    if arguments.quick:
        print("A handful of rows, which shows that the script runs, no more.\n")
    return load(arguments.data, train=n, test=n * 3 // 8, pairs=n * 7 // 8, documents=n // 2)


def pick(bench: Bench, layers: int, quick: bool) -> tuple[dict[str, Candidate], str]:
    """Methods to report, by label, and what was chosen as text."""
    kv, hidden = kv_candidates(layers), hidden_candidates(layers)
    kv_prompted, hidden_prompted = kv_candidates(layers, prompted=True), hidden_candidates(layers, prompted=True)
    if quick:
        kv, hidden, kv_prompted, hidden_prompted = kv[::60], hidden[::60], kv_prompted[::40], hidden_prompted[::15]
    ranked = {"keys and values": bench.rank(kv), "hidden states": bench.rank(hidden)}
    prompted = {"keys and values": bench.rank(kv_prompted), "hidden states": bench.rank(hidden_prompted)}
    best, fast = (Candidate.of(PRESETS[name], layers) for name in ("best", "fast"))
    top, chosen_best = ranked["keys and values"][0]
    near = [c for score, c in ranked["keys and values"] if score >= _NEAR * top and c.depth <= layers // 2]
    chosen_fast = min(near, key=lambda c: c.depth, default=chosen_best)
    methods = {
        "`best`": best,
        "`fast`": fast,
        "hidden state chosen the same way": ranked["hidden states"][0][1],
        "hidden state, half the depth": next(c for _, c in ranked["hidden states"] if c.depth <= layers // 2),
        "last hidden state, mean": Candidate("hidden", (layers,), "h", "mean"),
        "`paper-mteb`": Candidate.of(PRESETS["paper-mteb"], layers),
        "keys and values, prompted": prompted["keys and values"][0][1],
        "hidden state, prompted": prompted["hidden states"][0][1],
    }
    lines = []
    for name, chosen in (("best", chosen_best), ("fast", chosen_fast)):
        if chosen == methods[f"`{name}`"]:
            lines.append(f"`{name}` is what this run chooses on its dev rows.")
        else:
            lines.append(f"For `{name}` this run would choose on its dev rows: {chosen.name}.")
            methods[f"chosen here for `{name}`"] = chosen
    for form, both in (("plain", ranked), ("prompted", prompted)):
        for side, order in both.items():
            top = "; ".join(f"{c.name} {score:.3f}" for score, c in order[:5])
            lines.append(f"On dev rows, {form}, {len(order)} candidates of {side}: {top}.")
    return methods, "\n".join(f"- {line}" for line in lines)


def main() -> None:
    """Run."""
    arguments = parse()
    tasks = read(arguments)
    engine = TransformersEngine.from_pretrained(arguments.model, dtype="float32")
    layers = engine.info.num_layers
    cache = Path(tempfile.mkdtemp()) if arguments.quick else arguments.cache
    try:
        bench = Bench(arguments, engine, tasks, cache)
        try:
            methods, chosen = pick(bench, layers, arguments.quick)
            raw_hidden = bench.rank(hidden_candidates(layers)[:: 60 if arguments.quick else 1], whitened=False)[0][1]
        finally:
            bench.keep()
    except OutOfTimeError:
        print("The time is up; run it again to go on from here.")
        return
    results: Results = {label: (c, bench.run(c, "test", whitened=True)) for label, c in methods.items()}
    best, fast, hidden = (results[k][1] for k in ("`best`", "`fast`", "hidden state chosen the same way"))
    picks = resample(best.counts(), arguments.rounds, arguments.seed)
    print(f"Whitened to {arguments.dimension} dimensions (fewer where a method has fewer), test rows:\n")
    print(table(results, picks))
    print(f"\n`best` minus the hidden state chosen the same way:\n\n{differences(best, hidden, picks)}\n")
    raw: Results = {label: (c, bench.run(c, "test", whitened=False)) for label, c in methods.items()}
    raw["hidden state chosen the same way"] = (raw_hidden, bench.run(raw_hidden, "test", whitened=False))
    print("Raw cosines, nothing fitted, test rows (the hidden state is chosen by its raw cosines on dev rows):\n")
    print(table(raw, picks))
    print(f"\n{chosen}\n")
    measured = figures(best, fast, hidden, picks)
    print(figure_table(measured))
    finish(
        arguments,
        name="embedding_quality",
        figures=measured,
        n=best.counts(),
        baseline="the best hidden state, chosen the same way",
    )


if __name__ == "__main__":
    main()
