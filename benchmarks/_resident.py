"""Memory of a server's processes over a long run: how much there is, and whether it grows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from _harness import Figure, judge


def resident(processes: list[int]) -> int:
    """Bytes in memory of processes that are still there."""
    total = 0
    for process in processes:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    return total


def memory_growth(samples: list[tuple[int, int]], must: str | None) -> Figure:
    """Growth in memory by 1,000 requests, as a share of it, behind the first third; interval: resampled stretches."""
    start = samples[-1][0] / 3
    some = np.array([s for s in samples if s[0] >= start], dtype=np.float64)
    pieces = np.array_split(some, min(12, max(len(some) // 3, 1)))
    points = np.array([p.mean(axis=0) for p in pieces if len(p)])
    if len(points) < 4:
        return Figure(float("nan"), float("nan"), float("nan"), must, None, len(points))
    rng = np.random.default_rng(0)

    def slope(rows: np.ndarray[Any, Any]) -> float:
        x = rows[:, 0] - rows[:, 0].mean()
        return float((x * rows[:, 1]).sum() / max((x * x).sum(), 1e-9) * 1000 / rows[:, 1].mean())

    drawn = [slope(points[rng.integers(0, len(points), len(points))]) for _ in range(1000)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Figure(slope(points), float(low), float(high), must, judge(float(low), float(high), must), len(points))
