"""The splits behind ``benchmarks/calibration_guarantee.py``, on rows made here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from calibration_guarantee import HARD_CANDIDATES, cached, hard_case, hard_pool, share_figures, splits
from kvroute.guarantee import AtMostLoss


def test_the_hard_law_has_the_loss_it_is_given() -> None:
    pool, grid = hard_pool(2_000_000, 1.02, 0)
    loss = [100 * float((pool.slow_correct - pool.candidate(pair).right).mean()) for pair in grid]
    assert loss[9] == pytest.approx(0.3, abs=0.02)
    assert loss[10:] == pytest.approx([1.02] * (HARD_CANDIDATES - 10), abs=0.04)
    assert pool.candidate(grid[-1]).slow.sum() == 0
    with pytest.raises(ValueError, match="30"):
        hard_pool(10, 30.0, 0)


def test_promises_hold_on_the_hard_law_and_tokens_are_saved() -> None:
    broken, slow = hard_case(1.01, AtMostLoss(1.0), 0.1, rows=2500, count=60, seed=1)
    assert binom.sf(broken - 1, 60, 0.1) > 1e-3
    assert slow <= 12
    below, _ = hard_case(0.98, AtMostLoss(1.0), 0.1, rows=2500, count=3, seed=1)
    assert below == 0  # nothing there can break it


def test_splits_look_at_the_rest_of_the_pool() -> None:
    pool, grid = hard_pool(12_000, 3.0, 2)
    found = list(splits(pool, grid, AtMostLoss(1.0), 0.1, rows=4000, count=12, seed=0))
    assert len(found) == 12
    chosen = [s for s in found if s.pair is not None]
    assert len(chosen) >= 10
    assert all(s.pair in grid[:10] for s in chosen)  # the bolder ones lose 3 points
    assert np.mean([s.saved for s in chosen]) > 0.25
    assert all(abs(s.loss - 0.3) < 0.3 for s in chosen)
    again = list(splits(pool, grid, AtMostLoss(1.0), 0.1, rows=4000, count=12, seed=0))
    assert again == found


def test_the_lower_limit_is_what_is_judged() -> None:
    figures = share_figures("x", 24, 200, "<= 0.1")
    assert figures["x"].value == 0.12
    assert figures["x_lower_limit"].ok is True  # 24 of 200 is no evidence against 0.1
    assert share_figures("x", 50, 200, "<= 0.1")["x_lower_limit"].ok is False


def test_a_pool_is_kept(tmp_path: Path) -> None:
    pool, _ = hard_pool(50, 1.0, 3)
    path = tmp_path / "pool.safetensors"
    assert cached(path, lambda: pool) is pool
    kept = cached(path, lambda: pytest.fail("made twice"))
    assert (kept.difficulty == pool.difficulty).all()
    assert (kept.fast_correct == pool.fast_correct).all()
