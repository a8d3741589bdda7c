"""Difficulties of rows by heads that never saw them: folds by skeleton, one choice of vectors and penalty within each.

Every feature gets the same folds and the same head. Within a fold's training rows an inner cross-validation chooses
among the feature's vectors and the penalties, and its out-of-fold predictions choose the thresholds; the fold's own
rows are then only judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from kvroute.candidates import best_pairs, slow_rows
from kvroute.heads.fitting import Rows, fit_mlp, ridge_path
from kvroute.routing_curves import Modes, Outcome, Sweep, choose_threshold

Array = np.ndarray[Any, Any]
ALPHAS = [1e-2, 1e-1, 1.0, 10.0]
FOLDS, INNER = 5, 4
SHARES = np.linspace(0.0, 1.0, 33)
"""Shares of slow answers that a curve is drawn at."""


@dataclass(frozen=True)
class Judged:
    """What a feature makes of rows.

    Attributes:
        difficulty: ``[n]``, by the head of the fold that the row was held out of.
        sweep: the policy at :data:`SHARES`, its thresholds from training rows.
        point: the policy of fewest tokens that loses at most one point, chosen on training rows.
        band: the same that also gives up above a second threshold, as `kvroute calibrate` makes it.
        chosen: by fold, the name of the vectors that were chosen.
    """

    difficulty: Array
    sweep: Sweep
    point: Outcome
    band: Outcome
    chosen: list[str]


def folds(strata: Sequence[str], groups: Sequence[str], count: int, seed: int) -> list[tuple[Array, Array]]:
    """(training, held) rows: like questions in one fold, each set spread over all of them."""
    kind = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    return list(kind.split(np.zeros((len(strata), 1)), list(strata), list(groups)))


def choose(
    candidates: Sequence[tuple[str, Array]], y: Array, inner: Sequence[tuple[Array, Array]]
) -> tuple[int, float, Array]:
    """The vectors and the penalty with the least squared error on held rows, and the predictions there ``[n]``."""
    best: tuple[float, int, float, Array] | None = None
    for index, (_, x) in enumerate(candidates):
        found = np.empty((len(ALPHAS), len(y)))
        for train, held in inner:
            for row, model in zip(found, ridge_path(Rows(x[train], y[train]), ALPHAS), strict=True):
                row[held] = predict(model, x[held])
        for alpha, predicted in zip(ALPHAS, found, strict=True):
            error = float(np.mean((predicted - y) ** 2))
            if best is None or error < best[0]:
                best = error, index, alpha, predicted
    assert best is not None
    return best[1], best[2], best[3]


def predict(model: Any, x: Array) -> Array:
    """What a head says before it is cut to [0, 1], so that no two rows are made alike."""
    return np.asarray(model.scores((x - model.mean) * model.inverse), dtype=np.float64)


def fit_and_judge(
    candidates: Sequence[tuple[str, Array]], y: Array, modes: Modes, strata: Sequence[str], groups: Sequence[str],
    *, seed: int, head: str = "ridge",
) -> Judged:  # fmt: skip
    """Cross-fit one feature.

    Args:
        candidates: its vectors ``[n, dim]`` by name.
        y: ``[n]`` what the head shall give, in [0, 1]; higher is harder.
        modes: what each mode gets for each row.
        strata, groups: ``[n]`` set (and outcome) and skeleton of each row; each stratum is spread over all folds.
        seed: of the folds.
        head: ``ridge`` or ``mlp``; the vectors are chosen by ridge in either case.
    """
    n = len(y)
    difficulty, slow_at, slow, band, chosen = np.empty(n), np.empty((len(SHARES), n)), np.empty(n), np.empty(n), []
    for train, held in folds(strata, groups, FOLDS, seed):
        inner = folds([strata[i] for i in train], [groups[i] for i in train], INNER, seed)
        cut = [(name, x[train]) for name, x in candidates]
        index, alpha, seen = choose(cut, y[train], inner)
        name, x = candidates[index]
        chosen.append(name)
        if head == "mlp":
            predictions = np.empty(len(train))
            stops = [fit_mlp(Rows(x[train][a], y[train][a]), Rows(x[train][b], y[train][b]), {"decay": 0.3}, seed=seed)
                     for a, b in inner]  # fmt: skip
            for (_, b), fitted in zip(inner, stops, strict=True):
                predictions[b] = predict(fitted.model, x[train][b])
            seen = predictions
            rounds = int(np.median([f.rounds for f in stops]))
            model: Any = fit_mlp(Rows(x[train], y[train]), None, {"decay": 0.3}, seed=seed, rounds=max(rounds, 1)).model
        else:
            model = ridge_path(Rows(x[train], y[train]), [alpha])[0]
        difficulty[held] = predict(model, x[held])
        known = Modes(*(Outcome(o.right[train], o.tokens[train]) for o in (modes.fast, modes.slow)))
        slow[held] = difficulty[held] > choose_threshold(known, seen, 1.0)
        band[held] = slow_rows(_percent(difficulty[held]), *choose_band(known, _percent(seen), 1.0))
        taus = np.append(np.quantile(seen, 1 - SHARES[:-1]), -np.inf)
        taus[0] = np.inf
        slow_at[:, held] = difficulty[held][None] > taus[:, None]
    right = modes.fast.right + slow_at * (modes.slow.right - modes.fast.right)
    tokens = modes.fast.tokens + slow_at * (modes.slow.tokens - modes.fast.tokens)
    return Judged(
        difficulty, Sweep(SHARES, right, tokens, slow_at.mean(axis=1)), modes.chosen(slow), modes.chosen(band), chosen
    )


def _percent(difficulty: Array) -> Array:
    return np.clip(100 * difficulty, 0, 100)


def choose_band(modes: Modes, difficulty: Array, points: float) -> tuple[float, float | None]:
    """(tau, give_up) of fewest tokens that lose at most ``points`` against always slow, on these rows."""
    for pair in best_pairs(difficulty, modes, 60):
        if pair.lost <= points / 100 + 1e-9:
            return pair.tau, pair.give_up
    return -np.inf, None


def transfer(candidates: Sequence[tuple[str, Array]], y: Array, source: Array, target: Array, groups: Sequence[str],
             seed: int) -> Array:  # fmt: skip
    """Predictions for the rows ``target`` of a head that was chosen and fitted on the rows ``source`` alone."""
    own = [groups[i] for i in source]
    inner = folds(["all"] * len(source), own, INNER, seed)
    index, alpha, _ = choose([(name, x[source]) for name, x in candidates], y[source], inner)
    x = candidates[index][1]
    return predict(ridge_path(Rows(x[source], y[source]), [alpha])[0], x[target])


# ---------------------------------------------------------------------- AUROC within sets


class SetAuroc:
    """Mean over sets of the AUROC within each, and its bootstrap: rows are drawn within sets, alike for all features.

    A set where all rows are alike is left out.

    Args:
        truth: ``[n]`` bool.
        strata: ``[n]`` set of each row.
        draws: resamples.
        seed: of the drawing.
    """

    def __init__(self, truth: Array, strata: Sequence[str], *, draws: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        names = np.asarray(strata)
        self.rows: dict[str, tuple[Array, Array, Array, Array]] = {}
        for name in dict.fromkeys(strata):
            rows = np.flatnonzero(names == name)
            yes, no = rows[truth[rows]], rows[~truth[rows]]
            if len(yes) and len(no):
                times = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws).astype(np.float64)
                self.rows[name] = yes, no, times[:, truth[rows]], times[:, ~truth[rows]]

    def by_set(self, values: Array) -> dict[str, tuple[float, Array]]:
        """AUROC of each set, and of its resamples ``[draws]`` (NaN where one draws rows of one kind alone)."""
        found = {}
        for name, (yes, no, of_yes, of_no) in self.rows.items():
            a, b = values[yes][:, None], values[no][None]
            above = (a > b) + 0.5 * (a == b)
            with np.errstate(invalid="ignore"):
                drawn = ((of_yes @ above) * of_no).sum(axis=1) / (of_yes.sum(axis=1) * of_no.sum(axis=1))
            found[name] = float(above.mean()), drawn
        return found

    def mean(self, values: Array) -> tuple[float, Array]:
        """The mean over sets, and of each resample."""
        found = self.by_set(values).values()
        return float(np.mean([v for v, _ in found])), np.nanmean([d for _, d in found], axis=0)
