"""Sums of keys and values over tokens on a CPU, compiled: the twin of the reference in ``paged_pool.py``.

Maths: there. ``paged_pool_native.cpp`` says how it adds. One call reads all sequences and layers where they lie, each
number once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.checks import check_held, check_ranges
from kvroute_kernels.native_library import KINDS, float8_numbers, library, run_spans, shares
from kvroute_kernels.paged_pool import PooledSums
from kvroute_kernels.planes import planes_of
from kvroute_kernels.view import KVView
from kvroute_kernels.workspace import Workspace


def paged_pool_native(
    view: KVView,
    layers: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    part: Literal["k", "v", "kv"],
    weights: Sequence[Tensor] | None,
    workspace: Workspace | None = None,
) -> PooledSums:
    """:func:`~kvroute_kernels.paged_pool` on a CPU, compiled."""
    planes = planes_of(view, layers, part, None if workspace is None else workspace.planes)
    low, high = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    check_ranges(view, low, high, weights)
    check_held(view, layers, low, high)
    size = high - low
    ranges = np.ascontiguousarray(np.stack([low, size, np.cumsum(size) - size], axis=1))
    flat, weight = None, torch.from_numpy(size).float()
    if weights is not None:
        flat = torch.cat([w.detach().float() for w in weights] + [torch.zeros(1)]).contiguous()
        weight = torch.stack([w.sum(dtype=torch.float32) for w in weights]) if len(weights) else weight
    out = torch.empty(len(low), planes.width, dtype=torch.float32)
    table = float8_numbers(planes.dtype)
    found = library()
    assert found is not None

    def work(begin: int, end: int) -> int:
        return int(
            found.kvroute_paged_pool(
                planes.rows.ctypes.data,
                planes.scales.ctypes.data,
                len(planes.rows),
                planes.heads,
                ranges.ctypes.data,
                None if flat is None else flat.data_ptr(),
                out.data_ptr(),
                planes.width,
                KINDS[planes.dtype],
                None if table is None else table.data_ptr(),
                begin,
                end,
            )
        )

    share = shares(size, len(planes.rows) * planes.heads, int(size.sum()) * planes.width * planes.dtype.itemsize)
    run_spans(work, share)
    parts: list[Tensor | None] = []
    at = 0
    for entries in planes.sizes:
        end = at + planes.layers * planes.heads * entries
        parts.append(out[:, at:end].view(len(low), planes.layers, planes.heads, entries) if entries else None)
        at = end
    return PooledSums(parts[0], parts[1], weight)
