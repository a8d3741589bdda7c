"""What benchmarks/routing_quality.py counts with: cross-fitted difficulties, thresholds, AUROC by set."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kvroute.candidates import slow_rows
from kvroute.confidence_maps import auroc
from kvroute.routing_curves import Modes, Outcome
from quality.crossfit import SetAuroc, choose_band, fit_and_judge, folds, transfer

N = 120
RNG = np.random.default_rng(0)
HARD = RNG.random(N) < 0.5
MODES = Modes(
    Outcome((~HARD).astype(np.float64), np.full(N, 5.0)), Outcome(np.ones(N), np.full(N, 50.0)),
)  # fmt: skip
STRATA = ["a", "b"] * (N // 2)
GROUPS = [f"g{i // 2}" for i in range(N)]
Y = np.where(HARD, 0.75, 0.0)
TELLING = (Y[:, None] + RNG.normal(0, 0.1, (N, 3))).astype(np.float32)
NOISE = RNG.normal(0, 1, (N, 3)).astype(np.float32)


def test_like_questions_share_a_fold_and_every_row_is_held_once() -> None:
    found = folds(STRATA, GROUPS, 5, 0)
    assert sorted(np.concatenate([held for _, held in found]).tolist()) == list(range(N))
    for train, held in found:
        assert not {GROUPS[i] for i in train} & {GROUPS[i] for i in held}


def test_what_tells_is_chosen_and_saves_tokens() -> None:
    judged = fit_and_judge([("noise", NOISE), ("telling", TELLING)], Y, MODES, STRATA, GROUPS, seed=0)
    assert judged.chosen == ["telling"] * 5
    assert auroc(judged.difficulty, HARD) > 0.98
    assert judged.point.accuracy > 0.97
    assert judged.point.mean_tokens < 35
    assert judged.sweep.accuracy[0] == MODES.fast.accuracy
    assert judged.sweep.accuracy[-1] == 1.0
    assert (np.diff(judged.sweep.mean_tokens) >= 0).all()
    mlp = fit_and_judge([("telling", TELLING)], Y, MODES, STRATA, GROUPS, seed=0, head="mlp")
    assert auroc(mlp.difficulty, HARD) > 0.95


def test_where_neither_mode_is_right_it_gives_up() -> None:
    """A quarter of the rows is beyond both modes: one threshold thinks about them, a band does not."""
    beyond = np.arange(N) % 4 == 0
    difficulty = np.clip(np.where(beyond, 97.0, 100 * Y) + RNG.normal(0, 2, N), 0, 100)
    modes = Modes(Outcome(MODES.fast.right * ~beyond, MODES.fast.tokens), Outcome(1.0 * ~beyond, MODES.slow.tokens))
    tau, give_up = choose_band(modes, difficulty, 1.0)
    assert give_up is not None
    assert 5 < tau < 75 < give_up < 100
    judged = fit_and_judge(
        [("telling", difficulty[:, None].astype(np.float32))], difficulty / 100, modes, STRATA, GROUPS, seed=0
    )
    assert judged.band.accuracy >= modes.slow.accuracy - 0.03
    assert judged.band.mean_tokens < judged.point.mean_tokens - 5
    useless = Modes(modes.fast, Outcome(modes.fast.right, modes.slow.tokens))
    assert useless.chosen(slow_rows(difficulty, *choose_band(useless, difficulty, 1.0))).mean_tokens == 5


def test_a_row_does_not_judge_itself() -> None:
    """Vectors that name the row tell nothing of the others."""
    judged = fit_and_judge([("rows", np.eye(N, dtype=np.float32))], Y, MODES, STRATA, GROUPS, seed=0)
    assert auroc(judged.difficulty, HARD) < 0.65


def test_transfer_and_auroc_within_sets() -> None:
    of = np.array(STRATA)
    a, b = np.flatnonzero(of == "a"), np.flatnonzero(of == "b")
    assert auroc(transfer([("telling", TELLING)], Y, a, b, GROUPS, 0), HARD[b]) > 0.98
    known = SetAuroc(HARD, STRATA, draws=200, seed=0)
    value, drawn = known.mean(TELLING[:, 0].astype(np.float64))
    assert value == np.mean([auroc(TELLING[rows, 0].astype(np.float64), HARD[rows]) for rows in (a, b)])
    assert np.quantile(drawn, 0.05) <= value <= np.quantile(drawn, 0.99)
    assert known.mean((of == "a").astype(np.float64))[0] == 0.5  # telling the sets apart earns nothing
