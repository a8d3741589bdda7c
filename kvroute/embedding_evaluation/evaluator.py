"""Measures of one way to pool: on the rows it is chosen on, or by row on the rows it is reported on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from kvroute.embedding_evaluation.candidates import SomeWay, Way
from kvroute.embedding_evaluation.measures import Array, clusters, cosines, linear_head, ndcg_at_10, unit
from kvroute.embedding_evaluation.results import CLUSTERS, Rows
from kvroute.embedding_evaluation.states import States
from kvroute.embedding_evaluation.tasks import Tasks
from kvroute.embedding_evaluation.whitening import Whitening
from kvroute.files import write_whole
from kvroute.postprocess import PostProcessor
from kvroute.progress import progress_bar

Part = Literal["dev", "test"]
Lookup = Callable[[list[str]], Array]
"""Texts to their vectors ``[n, dim]``."""


class OutOfTimeError(Exception):
    """The time that was given is over; what was done is kept."""


class Evaluator:
    """Fits post-processing on unlabelled texts of the train and dev rows, the same for every way, and measures.

    Args:
        tasks: the rows.
        forms: what was read, by form; all of the same texts.
        dimension: sizes kept by the whitening.
        fit_texts: short texts it is fitted on, at most; and a third as many documents.
        seed: which.
        kept: a file of dev scores, for :meth:`rank`; they depend on what the evaluator is made of, so its name has to.
    """

    def __init__(
        self,
        tasks: Tasks,
        forms: Mapping[str, States],
        *,
        dimension: int = 256,
        fit_texts: int = 1000,
        seed: int = 0,
        kept: Path | None = None,
    ) -> None:
        self.tasks, self.forms, self.dimension = tasks, forms, dimension
        states = next(iter(forms.values()))
        self.short, self.document = states.short, states.document
        rng = np.random.default_rng(seed)
        seen = np.unique(self._rows(self.short, open_texts(tasks)))
        documents = np.array(sorted(self.document.values()), dtype=int)
        fitted = [rng.permutation(seen)[:fit_texts], rng.permutation(documents)[: max(fit_texts // 3, 2)]]
        self.fitted = np.sort(np.concatenate(fitted))
        held = np.unique(self._rows(self.short, [x for c in tasks.classification for x, _ in c.dev]))
        rows = np.concatenate([np.union1d(seen, held), documents]).astype(int)
        self._dev = Whitening(forms, self.fitted, rows, dimension)
        self._kept = kept
        self._scores: dict[str, float] = {}
        if kept is not None and kept.is_file():
            self._scores = json.loads(kept.read_text())

    def rank(
        self,
        ways: Sequence[SomeWay],
        *,
        whitened: bool = True,
        seconds_left: Callable[[], float] | None = None,
        progress: bool | None = None,
    ) -> list[tuple[float, SomeWay]]:
        """Ways by their mean over the groups on the dev rows, best first.

        Raises:
            OutOfTimeError: the time is over; what was measured is kept for the next call.
        """
        found = []
        try:
            with progress_bar("Choosing", len(ways), show=progress) as advance:
                for way in ways:
                    key = json.dumps([whitened, asdict(way)])
                    if key not in self._scores:
                        if seconds_left is not None and seconds_left() <= 0:
                            raise OutOfTimeError
                        self._scores[key] = self.run(way, "dev", whitened=whitened).average()
                    found.append((self._scores[key], way))
                    advance(1)
        finally:
            if self._kept is not None:
                write_whole(self._kept, json.dumps(self._scores, indent=1).encode())
        return sorted(found, key=lambda pair: -pair[0])

    def run(self, way: Way, part: Part, *, whitened: bool = True) -> Rows:
        """Measure a way to pool."""
        if part == "dev" and whitened:
            return self._measured(self._dev.vectors(way), self._dev.rows, part, heads=True)
        raw = way.matrix(self.forms)
        blocks = [raw.shape[1] // way.parts] * way.parts
        return self.run_vectors(raw, part, whitened=whitened, blocks=blocks)

    def run_vectors(
        self, vectors: Array, part: Part, *, whitened: bool = True, heads: bool | None = None,
        blocks: list[int] | None = None,
    ) -> Rows:  # fmt: skip
        """Measure vectors ``[n, dim]`` of all texts.

        Args:
            vectors: of short texts and then documents.
            part: rows to measure on.
            whitened: whether to whiten them like all others.
            heads: whether classification and clustering are measured too; by default as ``whitened``.
            blocks: sizes of the parts that lie side by side.
        """
        if whitened:
            size = min(self.dimension, vectors.shape[1], len(self.fitted) - 1)
            vectors = PostProcessor.fit(vectors[self.fitted], "whiten", size, blocks=blocks).transform(vectors)
        return self._measured(vectors, np.arange(len(vectors)), part, heads=whitened if heads is None else heads)

    def _measured(self, vectors: Array, rows: Array, part: Part, *, heads: bool) -> Rows:
        def look(index: Mapping[str, int]) -> Lookup:
            return lambda texts: vectors[np.searchsorted(rows, self._rows(index, texts))]

        return measure(self.tasks, part, look(self.short), look(self.document), heads=heads)

    @staticmethod
    def _rows(index: Mapping[str, int], texts: Sequence[str]) -> Array:
        return np.array([index[t] for t in texts], dtype=int)


def open_texts(tasks: Tasks) -> list[str]:
    """Short texts that anything may be fitted on: of train rows, and of the dev rows of STS and retrieval."""
    texts = [x for c in tasks.classification for x, _ in c.train]
    texts += [x for s in tasks.sts for a, b, _ in s.dev for x in (a, b)]
    return texts + [q for r in tasks.retrieval for q, _ in r.dev]


def measure(tasks: Tasks, part: Part, short: Lookup, document: Lookup, *, heads: bool = True) -> Rows:
    """Results by row. Heads that are reported are fitted on train and dev rows, those to choose by on train rows.

    Args:
        tasks: the rows.
        part: which of them.
        short, document: vectors of short texts and of documents.
        heads: whether classification is measured, and on test rows clustering.
    """
    out = Rows()
    for c in tasks.classification if heads else []:
        train, held = (c.train, c.dev) if part == "dev" else (c.train + c.dev, c.test)
        vectors = short([t for t, _ in held])
        out.classification[c.name] = linear_head(
            short([t for t, _ in train]), [y for _, y in train], vectors, [y for _, y in held]
        )
        if part == "test":
            names, labels = np.unique([y for _, y in held], return_inverse=True)
            out.clustering[c.name + CLUSTERS] = (labels, clusters(vectors, len(names)))
    for s in tasks.sts:
        pairs = s.dev if part == "dev" else s.test
        similarity = cosines(short([a for a, _, _ in pairs]), short([b for _, b, _ in pairs]))
        out.sts[s.name] = (similarity, np.array([gold for _, _, gold in pairs]))
    for r in tasks.retrieval:
        queries = r.dev if part == "dev" else r.test
        similarity = unit(short([q for q, _ in queries])) @ unit(document(r.documents)).T
        out.retrieval[r.name] = ndcg_at_10(similarity, [judged for _, judged in queries])
    return out
