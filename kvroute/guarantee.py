"""Promises about a routing policy that hold with confidence 1 - delta, whatever the questions' distribution.

Learn-then-test (Angelopoulos et al., "Learn then Test: Calibrating predictive algorithms to achieve risk control",
2021, section 3): candidates stand in an order that was fixed before the calibration rows were looked at, from the
safest to the boldest; each is tested at level delta on those rows until the first that fails (fixed-sequence testing).
With probability at least 1 - delta no candidate that breaks a promise is certified, so any of the certified ones may
be picked, by any rule. Several promises are tested each at level delta, and a candidate has to pass all of them: its
p-value is the largest of theirs (an intersection-union test), so they hold together with confidence 1 - delta.

It holds for questions drawn like the calibration rows (:mod:`kvroute.drift` says when they no longer are) and for the
engine, model and sampling that the rows were made with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from kvroute.bounds import betting_p_value, betting_upper, binomial_p_value, binomial_upper, rows_needed
from kvroute.candidates import Candidate
from kvroute.confidence_maps import Finite, Floats, Frozen, Share
from kvroute.errors import InvalidInputError
from kvroute.routing_curves import Outcome

# ---------------------------------------------------------------------- promises


@dataclass(frozen=True)
class AtMostLoss:
    """On the mean at most ``points`` percentage points fewer right answers than always-slow."""

    points: float
    kind: Literal["loss"] = "loss"

    def __post_init__(self) -> None:
        _between(self.points, 0, 100, "points of accuracy")

    def __str__(self) -> str:
        return f"at most {self.points:g} points of accuracy below always slow"

    def rows(self, c: Candidate, base: Outcome) -> Floats:
        """The paired differences, in [-1, 1]; their mean is the loss."""
        return base.right - c.right

    @property
    def limits(self) -> tuple[float, float, float]:
        """Smallest and largest value of a row, and what the mean is promised to be at most."""
        return -1.0, 1.0, self.points / 100


@dataclass(frozen=True)
class AtMostTokens:
    """On the mean at most ``tokens`` tokens a question."""

    tokens: float
    ceiling: float
    """Tokens that no answer can exceed (the limit that answers are written under)."""
    kind: Literal["tokens"] = "tokens"

    def __post_init__(self) -> None:
        _between(self.tokens, 0, self.ceiling, "tokens a question")

    def __str__(self) -> str:
        return f"at most {self.tokens:g} tokens a question"

    def rows(self, c: Candidate, base: Outcome) -> Floats:  # noqa: ARG002
        """Tokens, in [0, ceiling]."""
        return c.tokens

    @property
    def limits(self) -> tuple[float, float, float]:
        """Smallest and largest value of a row, and what the mean is promised to be at most."""
        return 0.0, self.ceiling, self.tokens


@dataclass(frozen=True)
class AtMostSlow:
    """A share of at most ``share`` of the questions is thought about slowly."""

    share: float
    kind: Literal["slow"] = "slow"

    def __post_init__(self) -> None:
        _between(self.share, 0, 1, "share of slow questions")

    def __str__(self) -> str:
        return f"at most {100 * self.share:g} % of the questions slow"

    def rows(self, c: Candidate, base: Outcome) -> Floats:  # noqa: ARG002
        """Whether slow, in [0, 1]."""
        return c.slow

    @property
    def limits(self) -> tuple[float, float, float]:
        """Smallest and largest value of a row, and what the mean is promised to be at most."""
        return 0.0, 1.0, self.share


AnyPromise = AtMostLoss | AtMostTokens | AtMostSlow


def _between(value: float, low: float, high: float, name: str) -> None:
    if not low < value < high:
        raise InvalidInputError(f"The {name} that are promised must lie between {low:g} and {high:g}, not {value!r}.")


def p_values(promise: AnyPromise, rows: Floats, delta: float) -> Floats:
    """P-values, ``[k]``, of "it is broken" for ``[k, n]`` rows: exact binomial for a slow of 0 or 1, else betting."""
    low, high, a = promise.limits
    if promise.kind == "slow" and np.isin(rows, (0.0, 1.0)).all():
        return binomial_p_value(rows.sum(-1), rows.shape[-1], a)
    return betting_p_value(rows, a, low=low, high=high, level=delta)


def order_candidates(candidates: Sequence[Candidate], baseline: Outcome, promises: Sequence[AnyPromise]) -> list[int]:
    """The order to test in, from runs of the candidates on **validation** rows: the surest to keep all promises first.

    Surest is who has the largest distance to the promise, in standard deviations of a row, at the promise nearest to
    being broken. For :class:`AtMostLoss` alone, ascending thresholds are as good an order and need no runs.
    """
    slack = np.full(len(candidates), np.inf)
    for promise in promises:
        low, high, a = promise.limits
        for i, candidate in enumerate(candidates):
            x = promise.rows(candidate, baseline)
            spread = np.sqrt(x.var() + ((high - low) / 2) ** 2 / len(x))
            slack[i] = min(slack[i], (a - x.mean()) / spread)
    return [int(i) for i in np.argsort(-slack, kind="stable")]


# ---------------------------------------------------------------------- certificate


class CandidateReport(Frozen):
    """What the calibration rows say about one candidate. Losses are in percentage points."""

    policy: dict[str, Any] | str
    p_values: dict[str, Share]
    """By promise (``loss``, ``tokens``, ``slow``): the chance of such rows if it were broken."""
    p_value: Share
    """The largest of them."""
    certified: bool
    """It and all before it in the order passed."""
    accuracy: Share
    loss: Finite
    """Accuracy of always-slow minus its own, as measured."""
    loss_upper: Finite | None = None
    """Upper confidence limit of the loss at level delta, for the candidate alone; None where it was not computed."""
    harm: Share
    """Share of rows where always-slow was right (or more often right) and the candidate was not."""
    harm_upper: Share
    """Its exact binomial upper limit at level delta, for the candidate alone."""
    tokens: Finite
    """Tokens a question."""
    saved: Finite
    """Share of always-slow's tokens that it saves."""
    slow: Share
    rows_needed: int | None
    """About how many rows would certify it four times in five, were it first in the order and as good as it looks;
    None where it looks as if it broke a promise."""


class Certificate(Frozen):
    """What is promised, of which policy, and all that it rests on."""

    promises: tuple[Annotated[AnyPromise, Field(discriminator="kind")], ...]
    delta: Annotated[float, Field(gt=0, lt=1)]
    n: Annotated[int, Field(gt=0)]
    """Calibration rows."""
    baseline_accuracy: Share
    baseline_tokens: Finite
    candidates: tuple[CandidateReport, ...]
    """In the order they were tested in."""
    chosen: int | None
    """Index of the policy that was picked among ``candidates``; None for always slow."""
    rows_needed: int | None
    """Where the way out was taken: about how many rows would certify the first candidate; None where none would."""
    reason: str
    """Why this policy."""
    skeletons: int | None = None
    """Different skeletons of the calibration rows, where known: rows that share one are alike."""
    questions_digest: str | None = None
    """Of the file of questions that the rows came from, where known."""
    method: str = (
        "learn-then-test, fixed sequence; betting p-values (shares that are 0 or 1 a row: exact binomial); "
        "several promises: the largest p-value"
    )

    @property
    def policy(self) -> dict[str, Any] | str:
        """Settings of the policy that was picked; ``"slow"`` where none was certified."""
        return "slow" if self.chosen is None else self.candidates[self.chosen].policy

    @property
    def holds(self) -> bool:
        """Whether the promises are given. Always slow loses nothing against itself, and keeps no other promise."""
        return self.chosen is not None or all(p.kind == "loss" for p in self.promises)

    def __str__(self) -> str:
        promise = " and ".join(str(p) for p in self.promises)
        given = f"{promise}, with confidence {1 - self.delta:g} ({self.n} rows)"
        return f"{given}. {self.reason}" if self.holds else f"Not promised: {given}. {self.reason}"


def certify(
    candidates: Sequence[Candidate],
    baseline: Outcome,
    promises: Sequence[AnyPromise] | AnyPromise,
    delta: float = 0.1,
    *,
    limits: bool = True,
) -> Certificate:
    """Test candidates in their order on calibration rows and pick the best of those certified.

    Picked is who computes the fewest tokens where a loss is promised, else who is right most often.

    Args:
        candidates: in an order fixed from other rows, the surest first.
        baseline: always-slow on the same rows.
        promises: one or several, of different kinds.
        delta: probability, over the calibration rows, that the policy breaks a promise.
        limits: also the upper limit of the loss of the policy that is picked (part of a second).

    Raises:
        InvalidInputError: no candidate, no row, lengths that differ, values that can't be, or two promises of one kind.
    """
    given = [promises] if isinstance(promises, AnyPromise) else list(promises)
    _check(candidates, baseline, given, delta)
    found = {p.kind: p_values(p, np.stack([p.rows(c, baseline) for c in candidates]), delta) for p in given}
    worst = np.max(np.stack(list(found.values())), axis=0)
    passed = np.logical_and.accumulate(worst <= delta)
    reports = [
        _report(c, baseline, given, delta, {kind: float(p[i]) for kind, p in found.items()}, bool(passed[i]))
        for i, c in enumerate(candidates)
    ]
    chosen, reason = _pick(reports, baseline, given)
    if chosen is not None and limits:
        upper = betting_upper(baseline.right - candidates[chosen].right, delta)
        reports[chosen] = reports[chosen].model_copy(update={"loss_upper": 100 * upper})
    return Certificate(
        promises=tuple(given),
        delta=delta,
        n=len(baseline.right),
        baseline_accuracy=float(baseline.right.mean()),
        baseline_tokens=float(baseline.tokens.mean()),
        candidates=tuple(reports),
        chosen=chosen,
        rows_needed=reports[0].rows_needed if not passed[0] else None,
        reason=reason,
    )


def _report(
    c: Candidate,
    base: Outcome,
    promises: Sequence[AnyPromise],
    delta: float,
    found: dict[str, float],
    certified: bool,
) -> CandidateReport:
    harmed, n = int((c.right < base.right).sum()), len(base.right)
    needed: list[int | None] = []
    for promise in promises:
        x = promise.rows(c, base)
        _, high, a = promise.limits
        needed.append(rows_needed(float(x.mean()), float(x.var()), a, high=high, level=delta))
    possible = [rows for rows in needed if rows is not None]
    return CandidateReport(
        policy=c.policy,
        p_values=found,
        p_value=max(found.values()),
        certified=certified,
        accuracy=float(c.right.mean()),
        loss=100 * float((base.right - c.right).mean()),
        harm=harmed / n,
        harm_upper=binomial_upper(harmed, n, delta),
        tokens=float(c.tokens.mean()),
        saved=1 - float(c.tokens.sum() / max(base.tokens.sum(), 1e-9)),
        slow=float(c.slow.mean()),
        rows_needed=max(possible) if len(possible) == len(needed) else None,
    )


def _pick(reports: Sequence[CandidateReport], base: Outcome, promises: Sequence[AnyPromise]) -> tuple[int | None, str]:
    certified = [i for i, r in enumerate(reports) if r.certified]
    if not certified:
        needed = reports[0].rows_needed
        if needed is None:
            return None, "Always slow: even the surest candidate looks as if it broke the promise."
        return (
            None,
            f"Always slow: {len(base.right)} rows do not suffice, about {needed} would for the first candidate.",
        )
    if any(p.kind == "loss" for p in promises):
        best = min(certified, key=lambda i: reports[i].tokens)
        if len(promises) == 1 and reports[best].saved <= 0:
            return None, "Always slow: what is certified saves no token."
        return best, f"It computes the fewest tokens of {len(certified)} certified candidates."
    best = max(certified, key=lambda i: (reports[i].accuracy, -reports[i].tokens))
    return best, f"It is right most often of {len(certified)} certified candidates."


def _check(
    candidates: Sequence[Candidate],
    base: Outcome,
    promises: Sequence[AnyPromise],
    delta: float,
) -> None:
    if not 0 < delta < 1:
        raise InvalidInputError(f"delta must lie between 0 and 1, and is {delta!r}.")
    if not candidates or not promises:
        raise InvalidInputError("There is no candidate or no promise to test.")
    if len({p.kind for p in promises}) < len(promises):
        raise InvalidInputError("Two promises are of one kind.", hint="Keep the stricter one.")
    n = len(base.right)
    if n == 0:
        raise InvalidInputError("There is no calibration row.")
    both: list[tuple[str, Outcome | Candidate]] = [("baseline", base)]
    for name, x in [*both, *((f"candidate {i}", c) for i, c in enumerate(candidates))]:
        arrays = {"right": x.right, "tokens": x.tokens, **({"slow": x.slow} if isinstance(x, Candidate) else {})}
        for key, array in arrays.items():
            if array.shape != (n,):
                raise InvalidInputError(f"{key} of {name} has shape {array.shape}, and there are {n} rows.")
            top = np.inf if key == "tokens" else 1.0
            if not (np.isfinite(array).all() and (array >= 0).all() and (array <= top).all()):
                raise InvalidInputError(f"{key} of {name} holds a value that can't be.")
