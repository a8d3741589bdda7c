"""Scores of one candidate on the rows it is chosen on, or by row on the rows it is reported on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvroute import PostProcessor
from quality.candidates import Candidate
from quality.data import Tasks
from quality.extract import Store
from quality.measures import Array, cosines, linear_head, ndcg_at_10, rank_correlation_of

Part = Literal["dev", "test"]
GROUPS = ("classification", "sts", "retrieval")


@dataclass
class Rows:
    """Results by row: right or wrong, (similarity, gold), nDCG."""

    classification: dict[str, Array] = field(default_factory=dict)
    sts: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    retrieval: dict[str, Array] = field(default_factory=dict)

    def value(self, task: str, rows: Array | None = None) -> float:
        """A task's measure, of all rows or of some (with repeats)."""
        for results in (self.classification, self.retrieval):
            if task in results:
                return float((results[task] if rows is None else results[task][rows]).mean())
        similarity, gold = self.sts[task]
        return rank_correlation_of(np.arange(len(gold)) if rows is None else rows, similarity, gold)

    def count(self, task: str) -> int:
        if task in self.sts:
            return len(self.sts[task][1])
        return len(self.classification.get(task, self.retrieval.get(task, np.zeros(0))))

    def tasks(self) -> dict[str, list[str]]:
        return {g: list(getattr(self, g)) for g in GROUPS if getattr(self, g)}

    def average(self, picks: dict[str, Array] | None = None) -> float:
        """Mean over the groups of the mean over a group's tasks."""
        groups = [
            np.mean([self.value(t, None if picks is None else picks[t]) for t in tasks])
            for tasks in self.tasks().values()
        ]
        return float(np.mean(groups))


class Evaluator:
    """Fits post-processing for a candidate on unlabelled texts of the train and dev rows, and measures.

    Args:
        tasks: the rows.
        short: store of the short texts.
        documents: store of the documents.
        dimension: sizes kept by the post-processing, the same for every candidate; 0 for raw vectors.
        fit_texts: at most so many texts of each store are fitted on.
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
        rows = np.array(short.rows(texts))
        self.fit_short = np.sort(rng.permutation(rows)[:fit_texts])
        self.fit_documents = np.sort(rng.permutation(len(documents.texts))[: fit_texts // 2])

    def run(self, candidate: Candidate, part: Part) -> Rows:
        short, documents = candidate.matrix(self.short), candidate.matrix(self.documents)
        if self.dimension:
            fitted_on = np.concatenate([short[self.fit_short], documents[self.fit_documents]])
            size = min(self.dimension, fitted_on.shape[1])
            post = PostProcessor.fit(fitted_on, "whiten", size)
            short, documents = post.transform(short), post.transform(documents)
        out = Rows()
        for c in self.tasks.classification if self.dimension else []:
            held = c.dev if part == "dev" else c.test
            # What is reported is fitted on all train rows; what is chosen on dev can't be.
            train = c.train if part == "dev" else c.train + c.dev
            out.classification[c.name] = linear_head(
                short[self.short.rows([t for t, _ in train])],
                [y for _, y in train],
                short[self.short.rows([t for t, _ in held])],
                [y for _, y in held],
            )
        for s in self.tasks.sts:
            pairs = s.dev if part == "dev" else s.test
            left, right = ([p[i] for p in pairs] for i in (0, 1))
            similarity = cosines(short[self.short.rows(left)], short[self.short.rows(right)])
            out.sts[s.name] = (similarity, np.array([p[2] for p in pairs]))
        for r in self.tasks.retrieval:
            queries = r.dev if part == "dev" else r.test
            out.retrieval[r.name] = ndcg_at_10(
                short[self.short.rows([q for q, _ in queries])],
                documents[self.documents.rows(r.documents)],
                [judged for _, judged in queries],
            )
        return out
