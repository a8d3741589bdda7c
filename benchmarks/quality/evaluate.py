"""Measures of one candidate: on the rows it is chosen on, or by row on the rows it is reported on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvroute import PostProcessor
from quality.candidates import Candidate
from quality.data import Tasks
from quality.extract import Store
from quality.measures import Array, cosines, linear_head, ndcg_at_10, rank_correlation_of
from quality.whitened import Whitening

Part = Literal["dev", "test"]
GROUPS = ("classification", "sts", "retrieval")
Picks = dict[str, Array]
"""Resampled row indices by task."""


@dataclass
class Rows:
    """Results by row: right or wrong, (similarity, gold), nDCG."""

    classification: dict[str, Array] = field(default_factory=dict)
    sts: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    retrieval: dict[str, Array] = field(default_factory=dict)

    def value(self, task: str, picks: Picks | None = None) -> float:
        """A task's measure, of all rows or of some (with repeats)."""
        for results in (self.classification, self.retrieval):
            if task in results:
                return float((results[task] if picks is None else results[task][picks[task]]).mean())
        similarity, gold = self.sts[task]
        return rank_correlation_of(np.arange(len(gold)) if picks is None else picks[task], similarity, gold)

    def counts(self) -> dict[str, int]:
        """Rows by task."""
        sts = {task: len(gold) for task, (_, gold) in self.sts.items()}
        return (
            {t: len(v) for t, v in self.classification.items()} | sts | {t: len(v) for t, v in self.retrieval.items()}
        )

    def tasks(self) -> dict[str, list[str]]:
        """Tasks by group, without groups that were not measured."""
        return {g: list(getattr(self, g)) for g in GROUPS if getattr(self, g)}

    def group(self, group: str, picks: Picks | None = None) -> float:
        """Mean over a group's tasks."""
        return float(np.mean([self.value(t, picks) for t in self.tasks()[group]]))

    def average(self, picks: Picks | None = None) -> float:
        """Mean over the groups."""
        return float(np.mean([self.group(g, picks) for g in self.tasks()]))


class Evaluator:
    """Fits post-processing on unlabelled texts of the train and dev rows, the same for every candidate, and measures.

    Args:
        tasks: the rows.
        short: store of the short texts.
        documents: store of the documents.
        dimension: sizes kept by the whitening.
        fit_texts: short texts it is fitted on, at most; and a third as many documents.
        seed: which.
    """

    def __init__(
        self, tasks: Tasks, short: Store, documents: Store, *, dimension: int, fit_texts: int, seed: int
    ) -> None:
        self.tasks, self.short, self.documents, self.dimension = tasks, short, documents, dimension
        rng = np.random.default_rng(seed)
        texts = [x for c in tasks.classification for x, _ in c.train]
        texts += [x for s in tasks.sts for a, b, _ in s.dev for x in (a, b)]
        texts += [q for r in tasks.retrieval for q, _ in r.dev]
        seen = np.unique(short.rows(texts))
        count, behind = len(documents.texts), len(short.texts)
        fitted = [rng.permutation(seen)[:fit_texts], behind + rng.permutation(count)[: max(fit_texts // 3, 2)]]
        self.fitted = np.sort(np.concatenate(fitted))
        held = np.unique(short.rows([x for c in tasks.classification for x, _ in c.dev]))
        dev_rows = np.concatenate([np.union1d(seen, held), behind + np.arange(count)])
        self.dev = Whitening(short, documents, self.fitted, dev_rows, dimension)

    def run(self, candidate: Candidate, part: Part, *, whitened: bool = True) -> Rows:
        """Measure a candidate."""
        if part == "dev" and whitened and len(candidate.pieces()) > 1:
            rows, vectors = self.dev.rows, self.dev.vectors(candidate)
        else:
            vectors = np.concatenate([candidate.matrix(self.short), candidate.matrix(self.documents)])
            rows = np.arange(len(vectors))
            if whitened:
                size = min(self.dimension, vectors.shape[1])
                blocks = [vectors.shape[1] // candidate.parts] * candidate.parts
                vectors = PostProcessor.fit(vectors[self.fitted], "whiten", size, blocks=blocks).transform(vectors)

        def short(texts: list[str]) -> Array:
            return vectors[np.searchsorted(rows, self.short.rows(texts))]

        def documents(texts: list[str]) -> Array:
            return vectors[np.searchsorted(rows, len(self.short.texts) + np.array(self.documents.rows(texts)))]

        return measure(self.tasks, part, short, documents, heads=whitened)


def measure(
    tasks: Tasks,
    part: Part,
    short: Callable[[list[str]], Array],
    documents: Callable[[list[str]], Array],
    *,
    heads: bool,
) -> Rows:
    """Results by row. Heads that are reported are fitted on train and dev rows, those to choose by on train rows."""
    out = Rows()
    for c in tasks.classification if heads else []:
        train, held = (c.train, c.dev) if part == "dev" else (c.train + c.dev, c.test)
        out.classification[c.name] = linear_head(
            short([t for t, _ in train]), [y for _, y in train], short([t for t, _ in held]), [y for _, y in held]
        )
    for s in tasks.sts:
        pairs = s.dev if part == "dev" else s.test
        similarity = cosines(short([a for a, _, _ in pairs]), short([b for _, b, _ in pairs]))
        out.sts[s.name] = (similarity, np.array([gold for _, _, gold in pairs]))
    for r in tasks.retrieval:
        queries = r.dev if part == "dev" else r.test
        found = short([q for q, _ in queries]), documents(r.documents)
        out.retrieval[r.name] = ndcg_at_10(*found, [judged for _, judged in queries])
    return out
