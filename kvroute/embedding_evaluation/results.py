"""Results by row, and what is made of them: a task's measure, means over groups, intervals, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvroute.embedding_evaluation.measures import Array, rank_correlation_of, v_measure
from kvroute.routing_intervals import Estimate

GROUPS = ("classification", "sts", "retrieval")
"""What the mean is over. Clustering is of the classification sets' texts once more, so it stands beside it."""
MEASURES = {
    "classification": "accuracy of a linear head",
    "sts": "Spearman's rho",
    "retrieval": "nDCG@10",
    "clustering": "v-measure",
}
CLUSTERS = ", clusters"
"""What the name of a clustering ends in; before it stands the classification set."""
Picks = Mapping[str, Array]
"""Resampled row indices by task."""


@dataclass
class Rows:
    """Results by row: right or wrong; (similarity, gold); nDCG; (label, cluster)."""

    classification: dict[str, Array] = field(default_factory=dict)
    sts: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    retrieval: dict[str, Array] = field(default_factory=dict)
    clustering: dict[str, tuple[Array, Array]] = field(default_factory=dict)

    def value(self, task: str, picks: Picks | None = None) -> float:
        """A task's measure, of all rows or of some (with repeats). Clusterings end in :data:`CLUSTERS`."""
        for results in (self.classification, self.retrieval):
            if task in results:
                return float((results[task] if picks is None else results[task][picks[task]]).mean())
        if task in self.clustering:
            labels, found = self.clustering[task]
            rows = slice(None) if picks is None else picks[task]
            return v_measure(labels[rows], found[rows])
        similarity, gold = self.sts[task]
        return rank_correlation_of(np.arange(len(gold)) if picks is None else picks[task], similarity, gold)

    def counts(self) -> dict[str, int]:
        """Rows by task."""
        single = {t: len(v) for results in (self.classification, self.retrieval) for t, v in results.items()}
        paired = {t: len(v[0]) for results in (self.sts, self.clustering) for t, v in results.items()}
        order = [t for tasks in self.tasks(*MEASURES).values() for t in tasks]
        return {t: (single | paired)[t] for t in order}

    def tasks(self, *groups: str) -> dict[str, list[str]]:
        """Tasks by group (by default those of the mean), without groups that were not measured."""
        return {g: list(getattr(self, g)) for g in groups or GROUPS if getattr(self, g)}

    def group(self, group: str, picks: Picks | None = None) -> float:
        """Mean over a group's tasks."""
        return float(np.mean([self.value(t, picks) for t in getattr(self, group)]))

    def average(self, picks: Picks | None = None) -> float:
        """Mean over the groups."""
        return float(np.mean([self.group(g, picks) for g in self.tasks()]))


def resample(counts: Mapping[str, int], rounds: int, seed: int) -> list[Picks]:
    """Bootstrap rows by task, the same for every method, so that methods are compared in pairs."""
    rng = np.random.default_rng(seed)
    return [{task: rng.integers(0, n, n) for task, n in counts.items()} for _ in range(rounds)]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """95 % of bootstrap values."""
    low, high = np.percentile(list(values), [2.5, 97.5])
    return float(low), float(high)


class Judge:
    """Estimates over one set of resamples.

    Args:
        counts: rows by task.
        rounds: how often they are drawn.
        seed: of the drawing.
    """

    def __init__(self, counts: Mapping[str, int], rounds: int = 500, seed: int = 0) -> None:
        self.picks = resample(counts, rounds, seed)

    def estimate(self, of: Callable[[Picks | None], float], *, centred: bool = False) -> Estimate:
        """A figure with its interval.

        Args:
            of: the figure on resampled rows, or on all for None.
            centred: whether the interval is moved so that the resamples' mean is the figure. A v-measure of rows drawn
                with repeats is larger than that of the rows; the others are not biased.
        """
        value, drawn = of(None), np.array([of(p) for p in self.picks])
        low, high = interval(drawn + (value - drawn.mean() if centred else 0.0))
        return Estimate(value, low, high)

    def method(self, rows: Rows) -> dict[str, dict[str, Estimate]]:
        """By task, by group, and over the groups (``mean``)."""
        found: dict[str, dict[str, Estimate]] = {"tasks": {}, "groups": {}}
        for group, tasks in rows.tasks(*MEASURES).items():
            centred = group == "clustering"
            for task in tasks:
                found["tasks"][task] = self.estimate(partial(_value, task, rows), centred=centred)
            found["groups"][group] = self.estimate(partial(_group, group, rows), centred=centred)
        found["mean"] = {"mean": self.estimate(rows.average)} if len(rows.tasks()) == len(GROUPS) else {}
        return found

    def differences(self, one: Rows, other: Rows) -> dict[str, Estimate]:
        """``one`` minus ``other`` by task, by group (named ``all GROUP``) and over the groups (``mean``), of what both
        were measured on."""
        found: dict[str, Estimate] = {}
        mine, theirs = one.tasks(*MEASURES), other.tasks(*MEASURES)

        def apart(of: Callable[[Rows, Picks | None], float], group: str) -> Estimate:
            return self.estimate(lambda p: of(one, p) - of(other, p), centred=group == "clustering")

        for group in (g for g in mine if g in theirs):
            for task in (t for t in mine[group] if t in theirs[group]):
                found[task] = apart(partial(_value, task), group)
            if mine[group] == theirs[group]:
                found[f"all {group}"] = apart(partial(_group, group), group)
        if one.tasks() == other.tasks():
            found["mean"] = self.estimate(lambda p: one.average(p) - other.average(p))
        return found


def _value(task: str, rows: Rows, picks: Picks | None) -> float:
    return rows.value(task, picks)


def _group(group: str, rows: Rows, picks: Picks | None) -> float:
    return rows.group(group, picks)


def as_json(value: Any) -> Any:
    """Estimates to objects, all the way down."""
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {k: as_json(v) for k, v in value.items()}
    return value
