"""Labelled questions made of random tokens, with a signal that the prompt's tokens give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvroute import PoolingSpec, TransformersEngine
from kvroute.confidence_maps import fit_map
from kvroute.heads import DifficultyHead
from kvroute.heads.fitting import Rows, fit_ridge
from kvroute.label_rows import PARTS, Attempt, Checkpoint, LabelMeta, LabelRow, Part, usable
from kvroute.thinking import Mode, ThinkingMode

_SHARES = {"train": 0.5, "validation": 0.25, "calibration": 0.05, "test": 0.2}
EASY, HARD = (60, 90), (200, 230)
"""Tokens that easy and hard questions hold more of."""


def label_rows(n: int, *, seed: int = 0, shuffle: bool = False) -> list[LabelRow]:
    """Rows whose difficulty is seen in their tokens, and whose right answers are.

    Args:
        n: how many.
        seed: of everything random.
        shuffle: give each row the difficulty of another one, so that there is nothing to learn.
    """
    rng = np.random.default_rng(seed)
    hardness = rng.uniform(size=n)
    said = rng.permutation(hardness) if shuffle else hardness
    rows = []
    for i in range(n):
        part: Part = PARTS[int(np.searchsorted(np.cumsum(list(_SHARES.values())), (i * 0.618) % 1))]
        fast_right, slow_right = bool(said[i] < 0.5), bool(said[i] < 0.85)
        fast = _attempt(rng, "fast", fast_right, shuffle)
        slow = _attempt(rng, "slow", slow_right, shuffle)
        label = (0.0 if said[i] < 0.25 else 25.0) if fast_right else 75.0 if slow_right else 100.0
        rows.append(
            LabelRow(
                id=f"q{i}", question=f"question {i} of {rng.integers(1000)}?", answer="1",
                answer_type="number", part=part, skeleton=f"s{i // 2}",
                prompt_ids=_tokens(rng, int(rng.integers(6, 14)), hardness[i]),
                fast=(fast,), slow=(slow,), label=label,
            )
        )  # fmt: skip
    parts: dict[str, Part] = {}
    return [r.model_copy(update={"part": parts.setdefault(r.skeleton, r.part)}) for r in rows]


def label_meta(engine: Any, **changes: Any) -> LabelMeta:
    """A header for them."""
    return LabelMeta(
        **{
            "model": engine.info.name, "fingerprint": engine.info.fingerprint, "thinking": ThinkingMode.instructions(),
            "max_tokens": {"fast": 16, "slow": 64}, "checkpoints": 5, "shares": _SHARES, "questions_digest": "d",
            "versions": {},
        } | changes
    )  # fmt: skip


def _tokens(rng: Any, n: int, hardness: float) -> tuple[int, ...]:
    low, high = np.where(rng.uniform(size=(n, 1)) < hardness, HARD, EASY).T
    return tuple(int(t) for t in rng.integers(low, high))


def _attempt(rng: Any, mode: Mode, correct: bool, shuffle: bool) -> Attempt:
    n = int(rng.integers(7, 12) if mode == "fast" else rng.integers(16, 30))
    seen = bool(rng.integers(2)) if shuffle else correct
    ids = _tokens(rng, n, 0.25 if seen else 0.75)
    points: tuple[Checkpoint, ...] = ()
    if mode == "slow":
        closes = int(rng.integers(5, 25))
        points = tuple(
            Checkpoint(at=at, answer="1", correct=correct and at >= closes, tokens=at + 5) for at in range(5, n, 5)
        )
    return Attempt(
        mode=mode, text="text", token_ids=ids, thought_tokens=0, answer="1", correct=correct, readable=True,
        finish_reason="stop", checkpoints=points,
    )  # fmt: skip


def ridge_head(engine: TransformersEngine, rows: Sequence[LabelRow], spec: PoolingSpec) -> DifficultyHead:
    """A ridge on the train rows' prompts, with its probability from validation rows."""
    parts = [usable(rows, "train"), usable(rows, "validation")]
    x, held = (engine.pool([list(r.prompt_ids) for r in part], [spec], progress=False)[0] for part in parts)
    labels = np.array([r.label for r in parts[0]], dtype=float)
    predictor = fit_ridge(Rows(x, labels / 100), None, {"alpha": 0.1}).model
    right = np.array([r.fast_right for r in parts[1]]) > 0.5
    return DifficultyHead(
        spec=spec, target="difficulty", predictor=predictor,
        map=fit_map(predictor(held)[:, None] * 100, right, "isotonic"), model=engine.info.name,
        fingerprint=engine.info.fingerprint, data_hash="abc",
    )  # fmt: skip
