"""One step of the online chains on a CPU, compiled: the twin of the reference in ``chain_step.py``.

Maths: there. ``chain_step_native.cpp`` says how it adds. One call reads all sequences' new tokens where they lie, each
number once, for the chains and for the sums by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.chain_step import ChainSteps, ChainTensors
from kvroute_kernels.checks import check_held, check_ranges, check_states
from kvroute_kernels.native_library import KINDS, float8_numbers, library, run_spans, shares
from kvroute_kernels.planes import planes_of
from kvroute_kernels.view import KVView
from kvroute_kernels.workspace import Workspace


def paged_chain_step_native(
    view: KVView,
    state: ChainTensors,
    rows: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    layers: Sequence[int],
    layer_sums: bool,
    workspace: Workspace | None = None,
) -> ChainSteps:
    """:func:`~kvroute_kernels.paged_chain_step` on a CPU, compiled."""
    planes = planes_of(view, layers, "kv", None if workspace is None else workspace.planes)
    low, high = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    width = planes.heads * sum(planes.sizes)
    check_ranges(view, low, high)
    check_states(state, rows, len(low), width)
    check_held(view, layers, low, high)
    size = high - low
    ranges = np.stack([low, size, np.asarray(rows, dtype=np.int64), np.cumsum(size) - size], axis=1)
    ranges = np.ascontiguousarray(ranges, dtype=np.int64)
    steps = torch.empty(int(size.sum()), 4, dtype=torch.float64)
    sums = torch.empty(len(low), planes.layers, width, dtype=torch.float32) if layer_sums else None
    table = float8_numbers(planes.dtype)
    held = (state.first, state.last, state.count, state.sum_magnitude, state.sum_angle, state.degenerate)
    assert all(x.is_contiguous() for x in held)
    found = library()
    assert found is not None

    def work(begin: int, end: int) -> int:
        return int(
            found.kvroute_chain_step(
                planes.rows.ctypes.data,
                planes.scales.ctypes.data,
                planes.layers,
                planes.heads,
                ranges.ctypes.data,
                *(x.data_ptr() for x in held),
                width,
                steps.data_ptr(),
                None if sums is None else sums.data_ptr(),
                KINDS[planes.dtype],
                None if table is None else table.data_ptr(),
                begin,
                end,
            )
        )

    run_spans(work, shares(size, 1, int(size.sum()) * planes.width * planes.dtype.itemsize))
    return ChainSteps(size.tolist(), steps, sums)


def feed_layers_native(states: Tensor, rows: Sequence[int], sums: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`~kvroute_kernels.chain_step.feed_layers` on a CPU, compiled."""
    count, layers, width = sums.shape
    index = np.asarray(rows, dtype=np.int64)
    norms = torch.empty(count, layers, 2, dtype=torch.float64)
    spans = torch.empty(count, dtype=torch.float64)
    sums = sums.contiguous()
    assert states.is_contiguous()
    found = library()
    assert found is not None
    found.kvroute_feed_layers(
        states.data_ptr(),
        index.ctypes.data,
        sums.data_ptr(),
        count,
        layers,
        width,
        norms.data_ptr(),
        spans.data_ptr(),
    )
    return norms, spans
