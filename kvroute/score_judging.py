"""Scores judged on answers that are known to be right or wrong: figures, intervals, and who beats whom.

Every score is judged on the same answers: those that have all of them. Where a file has open answers (parts ``train``
and ``validation``), the maps from scores to a probability are fitted on those and judged on the others; where it has
none, each answer's probability comes from a map that was fitted on the other folds, like questions in one fold. No map
is judged on an answer that it was fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvroute.calibration_metrics import cross_fitted
from kvroute.confidence_maps import Bools, Floats, fit_map
from kvroute.errors import InvalidInputError
from kvroute.routing_intervals import Estimate, Resamples
from kvroute.routing_metrics import ReliabilityBin, delong, reliability
from kvroute.score_metrics import Drawn, RiskCoverage
from kvroute.scores import COMBINATIONS, SCORES
from kvroute.self_evaluation import CONFIDENCE

LEAST = 10
"""Right answers, and wrong ones, without which nothing is judged."""
ENOUGH = 50
"""Right answers, and wrong ones, below which a set says little."""
MOST_MISSING = 0.2
"""A score that more of a set's answers miss is left out of it, so that it does not cost the others their rows."""
WITH_CONFIDENCE = "confidence and logits"
BASELINES = (*(s.name for s in SCORES.values() if s.family != "kv-coe"), "logits combined")
"""What needs no keys and values: what the rest has to beat."""


@dataclass(frozen=True)
class JudgedSet:
    """One set's answers and what each score makes of them.

    Attributes:
        name: of the set.
        truth: ``[n]`` which answers are right.
        values: by score ``[n]``, turned so that higher is to mean right.
        probability: by score ``[n]``, the probability that the answer is right.
        drawn: by score its figures, for the rows and for resamples of them.
        left_out: answers that miss a score.
        fitted_on: open answers that the maps were fitted on; 0 where they are cross-fitted.
        missing: scores that are left out, and the share of answers that miss them.
    """

    name: str
    truth: Bools
    values: dict[str, Floats]
    probability: dict[str, Floats]
    drawn: dict[str, Drawn]
    left_out: int
    fitted_on: int
    missing: dict[str, float]

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def right(self) -> float:
        """Share of right answers."""
        return float(self.truth.mean())

    def reliability(self, name: str) -> tuple[ReliabilityBin, ...]:
        """How often answers of about that probability are right."""
        return reliability(self.probability[name], self.truth.astype(np.float64))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "answers": len(self),
            "right": self.right,
            "left_out": self.left_out,
            "fitted_on": self.fitted_on,
            "missing": self.missing,
            "scores": {
                name: {
                    **{figure: e.to_dict() for figure, e in drawn.estimates().items()},
                    "risk_coverage": RiskCoverage.of(self.values[name], self.truth).to_dict(),
                }
                for name, drawn in self.drawn.items()
            },
        }


def judge_set(
    name: str,
    table: Mapping[str, Floats],
    truth: Bools,
    *,
    judged: Bools | None = None,
    groups: Sequence[str] | None = None,
    ready: Collection[str] = (CONFIDENCE,),
    folds: int = 5,
    resamples: int = 2000,
    seed: int = 0,
) -> JudgedSet:
    """Judge the scores of one set of answers.

    Args:
        name: of the set.
        table: by score ``[n]``, NaN where an answer has none; names of :data:`kvroute.SCORES`, and those in ``ready``.
        truth: ``[n]`` which answers are right.
        judged: ``[n]`` which answers are judged; the others are fitted on. By default all, cross-fitted.
        groups: ``[n]`` something equal for answers to like questions.
        ready: names that are probabilities as they stand, made without the judged answers.
        folds: of the cross-fitting.
        resamples: of the intervals.
        seed: of folds and resamples.

    Raises:
        InvalidInputError: too few right or wrong answers, or none that has its scores.
    """
    held = np.ones(len(truth), dtype=bool) if judged is None else judged
    finite = {n: np.isfinite(v) for n, v in table.items()}
    gone = {n: float(1 - f[held].mean()) for n, f in finite.items()}
    missing = {n: share for n, share in gone.items() if share > MOST_MISSING}
    names = [n for n in table if n not in missing]
    if not names:
        raise InvalidInputError(f"The answers of {name} have no scores.", hint="Are they all of one token?")
    whole: Bools = np.all([finite[n] for n in names], axis=0)
    at, fit = np.flatnonzero(whole & held), np.flatnonzero(whole & ~held)
    right = int(truth[at].sum())
    if min(right, len(at) - right) < LEAST:
        raise InvalidInputError(
            f"{name} has {right} right and {len(at) - right} wrong answers with scores, and needs {LEAST} of each.",
            hint="Label more questions, or others.",
        )
    own = None if groups is None else [groups[int(i)] for i in at]
    open_fit = min(truth[fit].sum(), (~truth[fit]).sum()) >= LEAST

    def probability(parts: Sequence[str]) -> Floats:
        x = np.stack([table[p] for p in parts], axis=1)
        # A trained confidence has seen the open answers, so what is built on it must not be fitted there.
        if open_fit and not set(parts) & set(ready):
            return fit_map(x[fit], truth[fit], "logistic")(x[at])
        return cross_fitted(x[at], truth[at], "logistic", _kept_apart(own, folds), folds, seed)

    values: dict[str, Floats] = {}
    found: dict[str, Floats] = {}
    for n in names:
        found[n] = table[n][at] if n in ready else probability((n,))
        values[n] = -table[n][at] if n in SCORES and SCORES[n].direction == "lower" else table[n][at]
    for together, members in _combinations(names).items():
        values[together] = found[together] = probability(members)
    drawn = Resamples(len(at), resamples, seed=seed)
    return JudgedSet(
        name=name,
        truth=truth[at],
        values=values,
        probability=found,
        drawn={n: Drawn.of(values[n], found[n], truth[at], drawn) for n in values},
        left_out=int((held & ~whole).sum()),
        fitted_on=len(fit) if open_fit else 0,
        missing=missing,
    )


def _combinations(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Combinations of the scores that are there, of two or more."""
    wanted = dict(COMBINATIONS)
    if CONFIDENCE in names:
        wanted[WITH_CONFIDENCE] = (CONFIDENCE, *COMBINATIONS["logits combined"])
    found = {together: tuple(m for m in members if m in names) for together, members in wanted.items()}
    return {together: members for together, members in found.items() if len(members) > 1}


def _kept_apart(groups: list[str] | None, folds: int) -> list[str] | None:
    """Groups, where some hold several answers; every answer on its own where there are too few groups for folds."""
    if groups is None or len(set(groups)) == len(groups):
        return None
    return groups if len(set(groups)) >= folds else None


# ---------------------------------------------------------------------- who beats whom


@dataclass(frozen=True)
class Comparison:
    """One score against another, on the same answers.

    Attributes:
        a, b: the scores.
        auroc: AUROC of ``a`` minus that of ``b``, mean over sets, with a paired bootstrap interval.
        aurc: the same of the area under the risk-coverage curve (lower is better).
        p: of a two-sided test that both AUROCs are equal on the mean (DeLong's variances, summed over sets); None
            where there is none.
        by_set: difference of the AUROCs by set.
    """

    a: str
    b: str
    auroc: Estimate
    aurc: Estimate
    p: float | None
    by_set: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "auroc_difference": self.auroc.to_dict(),
            "aurc_difference": self.aurc.to_dict(),
            "p": self.p,
            "by_set": {name: e.to_dict() for name, e in self.by_set.items()},
        }


def compare(a: str, b: str, sets: Sequence[JudgedSet]) -> Comparison:
    """Whether one score tells right from wrong better than another, over all sets."""
    pairs = [delong(s.values[a], s.values[b], s.truth) for s in sets]
    variance = sum(v for _, v in pairs) / len(pairs) ** 2
    p = None
    if math.isfinite(variance):
        z = abs(float(np.mean([d for d, _ in pairs]))) / math.sqrt(variance) if variance > 0 else math.inf
        p = math.erfc(z / math.sqrt(2)) if any(d for d, _ in pairs) else 1.0
    first, second = (Drawn.mean({s.name: s.drawn[n] for s in sets}) for n in (a, b))
    return Comparison(
        a=a,
        b=b,
        auroc=first.minus(second, "auroc"),
        aurc=first.minus(second, "aurc"),
        p=p,
        by_set={s.name: s.drawn[a].minus(s.drawn[b], "auroc") for s in sets},
    )
