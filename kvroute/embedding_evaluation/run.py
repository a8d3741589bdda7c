"""Measures a model's embeddings beside its hidden states and outside references: :func:`evaluate_embeddings`."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvroute.contrastive import fit_projection
from kvroute.embedding_evaluation.candidates import Candidate, Joined, SomeWay, Way, hidden_candidates, kv_candidates
from kvroute.embedding_evaluation.costs import Costs
from kvroute.embedding_evaluation.evaluator import Evaluator, OutOfTimeError, open_texts
from kvroute.embedding_evaluation.measures import Array
from kvroute.embedding_evaluation.pairs import open_pairs
from kvroute.embedding_evaluation.references import REFERENCES, Reference, check_references, reference
from kvroute.embedding_evaluation.report import EmbeddingReport, Method
from kvroute.embedding_evaluation.results import CLUSTERS, MEASURES, Judge, Rows
from kvroute.embedding_evaluation.states import FORMS, Reader, States
from kvroute.embedding_evaluation.tasks import Tasks
from kvroute.errors import InvalidInputError, MissingExtraError, ModelLoadError
from kvroute.pooling import PRESETS, PoolingSpec

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine

_TIMED = 48
"""Texts that times are taken of."""
BEST_HIDDEN = "hidden state, best layer and weights"
CHOSEN, CHOSEN_HALF = "keys and values, chosen on dev rows", "the same, at most half the depth"
_KINDS = {
    "mean": "hidden state, mean, best layer",
    "last": "hidden state, last token, best layer",
    "position": "hidden state, weighted by position, best layer",
    "sif": "hidden state, weighted by SIF, best layer",
}


@dataclass(frozen=True)
class EvaluationOptions:
    """What to measure, and how.

    Attributes:
        presets: names of presets.
        specs: further pooling specs by name.
        forms: ways to put a text to the model, of :data:`~kvroute.embedding_evaluation.states.FORMS`; ``plain`` is
            always among them. Of the others the best hidden states are measured, with ``search`` keys and values too.
        search: whether to choose among some hundred ways to pool keys and values on the dev rows.
        train: whether to train projections on pairs of the open rows.
        references: names or folders, see :mod:`~kvroute.embedding_evaluation.references`; by default what can run here.
        dimension: sizes kept by the whitening, the same for all.
        fit_texts: texts the whitening is fitted on.
        limits: tokens that short texts and documents are cut to.
        rounds: of the bootstrap.
        seed: of all that is drawn.
        seconds: stop after so long (:class:`OutOfTimeError`); a later call goes on from there.
        every: look at every so many-th way only, to try things out.
    """

    presets: tuple[str, ...] = ("best", "fast", "paper-mteb")
    specs: Mapping[str, PoolingSpec] = field(default_factory=dict)
    forms: tuple[str, ...] = ("plain",)
    search: bool = False
    train: bool = False
    references: tuple[str, ...] | None = None
    dimension: int = 256
    fit_texts: int = 1000
    limits: tuple[int, int] = (256, 128)
    rounds: int = 500
    seed: int = 0
    seconds: float | None = None
    every: int = 1

    def __post_init__(self) -> None:
        for name in self.forms:
            if name not in FORMS:
                raise InvalidInputError(f"No form is named {name!r}.", hint=f"There are: {', '.join(FORMS)}.")
        for name in self.presets:
            PoolingSpec.preset(name)
        check_references(self.references or ())
        if self.dimension < 1 or self.fit_texts < 8 or self.rounds < 20 or min(self.limits) < 1:
            raise InvalidInputError("Dimensions, texts, rounds and limits are positive, and not too few.")


def evaluate_embeddings(
    engine: TransformersEngine,
    tasks: Tasks,
    options: EvaluationOptions | None = None,
    *,
    folder: Path,
    progress: bool | None = None,
) -> EmbeddingReport:
    """Measure keys and values beside hidden states of the same model and outside references.

    Each text runs once in each form. Layers and weights are chosen on dev rows, for hidden states as for keys and
    values; what is reported is measured on test rows.

    Args:
        engine: the model; its layers have to be alike.
        tasks: the rows, see :func:`~kvroute.embedding_evaluation.tasks.load_tasks`.
        options: what to measure.
        folder: where states and dev scores are kept; a later call with the same rows goes on from there.
        progress: whether to show bars; by default on a terminal.

    Raises:
        UnsupportedModelError: layers that differ.
        OutOfTimeError: ``options.seconds`` are over; call again to go on.
        ModelLoadError, MissingExtraError: a reference that was asked for can't run.
    """
    return _Run(engine, tasks, options or EvaluationOptions(), folder, progress).report()


class _Run:
    def __init__(
        self, engine: TransformersEngine, tasks: Tasks, options: EvaluationOptions, folder: Path, progress: bool | None
    ) -> None:
        self.engine, self.tasks, self.options, self.progress = engine, tasks, options, progress
        self.ends = None if options.seconds is None else time.monotonic() + options.seconds
        self.layers = engine.info.num_layers
        short, documents = tasks.texts()
        self.texts = [*short, *documents]
        reader = Reader(engine, short, documents, limits=options.limits, folder=folder)
        forms: dict[str, States] = {}
        for name in dict.fromkeys(("plain", *options.forms)):
            states = reader.read(FORMS[name], seconds=self._left(), progress=progress)
            if states is None:
                raise OutOfTimeError
            forms[name] = states
        facts = [engine.info.fingerprint, engine.info.dtype, asdict(tasks), options.dimension, options.fit_texts]
        digest = hashlib.sha256(json.dumps([*facts, options.limits, options.seed]).encode()).hexdigest()[:16]
        self.evaluator = Evaluator(
            tasks, forms, dimension=options.dimension, fit_texts=options.fit_texts, seed=options.seed,
            kept=folder / f"dev-{digest}.json",
        )  # fmt: skip
        self.timed = _spread(short, _TIMED)
        self.costs = Costs(engine, self.timed)
        self.notes: list[str] = []

    def _left(self) -> float | None:
        return None if self.ends is None else max(self.ends - time.monotonic(), 0.0)

    # ------------------------------------------------------------------ choosing

    def report(self) -> EmbeddingReport:
        ways = self._ways()
        measured = {name: self.evaluator.run(way, "test") for name, way in ways.items()}
        counts = next(iter(measured.values())).counts()
        report = EmbeddingReport(Judge(counts, self.options.rounds, self.options.seed), self._about(counts))
        for name, way in ways.items():
            report.add(self._method(name, way, measured[name], self.evaluator.run(way, "test", whitened=False)))
        outside = self._references(report)
        if self.options.train:
            self._trained(report, ways, outside)
        report.notes = self.notes
        for name in (*(f"`{p}`" for p in self.options.presets), CHOSEN_HALF):
            if name in report.methods:
                report.compare(name, BEST_HIDDEN)
        return report

    def _ways(self) -> dict[str, Way]:
        """What to report, by label."""
        ways: dict[str, Way] = {f"`{n}`": Candidate.of(PRESETS[n], self.layers) for n in self.options.presets}
        ways |= {n: Candidate.of(spec, self.layers) for n, spec in self.options.specs.items()}
        for name, share in (("half", 0.5), ("quarter", 0.25)):
            way = Candidate.of(PRESETS["best"].model_copy(update={"layers": share}), self.layers)
            if way not in ways.values():
                ways[f"as `best`, a {name} of the depth" if name == "quarter" else f"as `best`, {name} the depth"] = way
        hidden = self._rank(hidden_candidates(self.layers), "hidden states")
        for start, label in _KINDS.items():
            ways |= _named(label, next((c for _, c in hidden if c.weights.startswith(start)), None))
        ways["last hidden state, mean"] = Candidate("hidden", (self.layers,), "h", "mean")
        ways[BEST_HIDDEN] = hidden[0][1]
        if self.options.search:
            ranked = self._rank(kv_candidates(self.layers), "keys and values")
            ways[CHOSEN] = ranked[0][1]
            ways |= _named(CHOSEN_HALF, self._shallow(ranked))
        for form in (f for f in self.options.forms if f != "plain"):
            ways |= self._of_form(form)
        return ways

    def _of_form(self, form: str) -> dict[str, Way]:
        told = {"prompt": "in a prompt", "twice": "text twice"}[form]
        hidden = self._rank(hidden_candidates(self.layers, form), f"hidden states, {told}")
        found: dict[str, Way] = {f"hidden state, {told}, best layer and weights": hidden[0][1]}
        if not self.options.search:
            return found
        kv = self._rank(kv_candidates(self.layers, form), f"keys and values, {told}")
        found[f"keys and values, {told}, chosen on dev rows"] = kv[0][1]
        found |= _named(f"keys and values, {told}, at most half the depth", self._shallow(kv))
        if form == "prompt":  # one pass gives both the text's own tokens and the last one
            for side, ranked in (("hidden states", hidden), ("keys and values", kv)):
                text, last = ([c for _, c in ranked if (c.weights == "last") == wanted] for wanted in (False, True))
                shallow = [c for c in last if c.depth <= self.layers // 2][:1]
                joined = [Joined((t, e)) for t in text[:3] for e in dict.fromkeys((*last[:3], *shallow))]
                if not joined:
                    continue
                best = self._rank(joined, f"text's tokens beside the last one, {told}, {side}")
                found[f"{side}, {told}, tokens beside the last"] = best[0][1]
                if side == "keys and values":
                    found |= _named(f"{side}, {told}, tokens beside the last, half the depth", self._shallow(best))
        return found

    def _rank(self, ways: Sequence[SomeWay], what: str) -> list[tuple[float, SomeWay]]:
        left = None if self.ends is None else (lambda: self._left() or 0.0)
        ways = ways[:: self.options.every]
        ranked = self.evaluator.rank(ways, seconds_left=left, progress=self.progress)
        top = "; ".join(f"{way.name} {score:.3f}" for score, way in ranked[:3])
        self.notes.append(f"On dev rows, {len(ranked)} ways of {what}: {top}.")
        return ranked

    def _shallow(self, ranked: Sequence[tuple[float, Way]]) -> Way | None:
        return next((way for _, way in ranked if way.depth <= self.layers // 2), None)

    # ------------------------------------------------------------------ measuring

    def _method(self, name: str, way: Way, rows: Rows, raw: Rows | None, *, trained: bool = False) -> Method:
        size = sum(
            self.engine.info.hidden_size if piece.side == "hidden" else _size(piece, self.engine)
            for piece in way.pieces()
        )
        side = "hidden" if any(p.side == "hidden" for p in way.pieces()) else "kv"
        cost = self.costs.milliseconds(way)
        return Method(name, way.name, side, way.depth, way.depth / self.layers, cost, size, rows, raw, trained)

    def _references(self, report: EmbeddingReport) -> dict[str, Reference]:
        found = {}
        for name in REFERENCES if self.options.references is None else self.options.references:
            try:
                made = reference(name, self.evaluator, self.texts, self.timed, progress=self.progress)
            except (ModelLoadError, MissingExtraError) as error:
                if self.options.references is not None:
                    raise
                warnings.warn(f"{name} is left out: {error}", RuntimeWarning, stacklevel=2)
                report.left_out[name] = str(error)
                continue
            found[made.name] = made
            cost = (None, None, made.ms, made.dimension)
            if made.raw is None:
                report.add(Method(made.name, made.how, "reference", *cost, made.rows))
                continue
            report.add(Method(made.name, f"{made.how}; nothing fitted", "reference", *cost, made.raw))
            report.add(
                Method(f"{made.name}, whitened", "the same, whitened like all others", "reference", *cost, made.rows)
            )
        return found

    def _trained(self, report: EmbeddingReport, ways: Mapping[str, Way], outside: Mapping[str, Reference]) -> None:
        """Projections of some methods and of references, all trained on the same pairs."""
        joined = [n for n in ways if n.endswith("tokens beside the last")]
        asked = ["`best`", "as `best`, half the depth", BEST_HIDDEN, CHOSEN_HALF, *joined]
        for name in (n for n in asked if n in ways):
            way = ways[name]
            vectors = way.matrix(self.evaluator.forms)
            blocks = [vectors.shape[1] // way.parts] * way.parts
            rows = self._projected(vectors, blocks)
            report.add(self._method(f"{name}, trained projection", way, rows, None, trained=True))
            if name == "`best`":
                try:
                    rows = self._others(vectors, blocks)
                except InvalidInputError as error:
                    report.left_out["projection trained on the other sets"] = str(error)
                    continue
                report.add(self._method(f"{name}, projection trained on the other sets", way, rows, None, trained=True))
        for name, made in outside.items():
            if made.vectors is not None:
                rows = self._projected(made.vectors, None)
                cost = (None, None, made.ms, made.dimension)
                report.add(Method(f"{name}, trained projection", made.how, "reference", *cost, rows, trained=True))
        if "`best`, trained projection" in report.methods:
            for other in (n for n in ("MiniLM", f"{BEST_HIDDEN}, trained projection") if n in report.methods):
                report.compare("`best`, trained projection", other)

    def _projected(self, vectors: Array, blocks: list[int] | None, without: Sequence[str] = ()) -> Rows:
        pairs = open_pairs(self.tasks, without=without, seed=self.options.seed)
        index = self.evaluator
        documents = {d for r in self.tasks.retrieval if r.name not in without for d in r.documents}
        # A text may be a query and a document; the pair's other half is the document then, and vectors are the same.
        place = {t: index.document[t] for t in documents} | {t: index.short[t] for t in open_texts(self.tasks)}
        place |= {t: index.short[t] for p in pairs for t in (p.a, p.b) if t in index.short}
        texts = list(place)
        fitted = fit_projection(
            vectors[[place[t] for t in texts]], texts, pairs, dimension=min(self.options.dimension, vectors.shape[1]),
            blocks=blocks, seed=self.options.seed, progress=self.progress,
        )  # fmt: skip
        if not without:
            told = {k: round(v, 3) if isinstance(v, float) else v for k, v in fitted.facts.items()}
            self.notes.append(f"A projection was trained: {json.dumps(told)}.")
        return index.run_vectors(fitted.transform(vectors), "test", whitened=False, heads=True)

    def _others(self, vectors: Array, blocks: list[int] | None) -> Rows:
        """Every set by a projection that was trained on pairs of other sets: half of them, and then the other half."""
        out = Rows()
        names = [t.name for sets in (self.tasks.classification, self.tasks.sts, self.tasks.retrieval) for t in sets]
        for held in (names[::2], names[1::2]):
            rows = self._projected(vectors, blocks, held)
            for group in MEASURES:
                kept = {t: v for t, v in getattr(rows, group).items() if t.removesuffix(CLUSTERS) in held}
                getattr(out, group).update(kept)
        return out

    def _about(self, counts: Mapping[str, int]) -> dict[str, object]:
        info, options = self.engine.info, self.options
        return {
            "model": info.name,
            "fingerprint": info.fingerprint,
            "dtype": info.dtype,
            "layers": info.num_layers,
            "hidden_size": info.hidden_size,
            "texts": len(self.texts),
            "test_rows": sum(n for t, n in counts.items() if not t.endswith(CLUSTERS)),
            "forms": list(self.evaluator.forms),
            "whitened_to": options.dimension,
            "whitening_fitted_on": len(self.evaluator.fitted),
            "token_limits": list(options.limits),
            "bootstrap": options.rounds,
            "seed": options.seed,
        }


def _named(label: str, way: Way | None) -> dict[str, Way]:
    return {} if way is None else {label: way}


def _size(piece: Candidate, engine: TransformersEngine) -> int:
    layer = engine.info.layers[0]
    return len(piece.part) * layer.key_size * (1 if piece.reduce == "paper" else layer.kv_heads)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """Some texts, evenly out of all."""
    return [texts[int(i)] for i in np.unique(np.linspace(0, len(texts) - 1, min(count, len(texts))))]
