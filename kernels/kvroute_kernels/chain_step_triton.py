"""One step of the online chains on a device: the twin of ``paged_chain_step`` in ``chain_step.py``.

What is staged and launched; the maths, grid and memory are in ``chain_kernels_triton.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from kvroute_kernels.buffers import Buffers
from kvroute_kernels.chain_kernels_triton import chain_step_join_kernel, chain_step_kernel
from kvroute_kernels.chain_step import ChainSteps, ChainTensors
from kvroute_kernels.checks import check_held, check_ranges, check_states
from kvroute_kernels.errors import KVViewError
from kvroute_kernels.paged_pool_triton import paged_pool_triton
from kvroute_kernels.planes import KnownPlanes, Planes, planes_of
from kvroute_kernels.reading_triton import TRITON_DTYPES, at_most, needs_e4m3_bits
from kvroute_kernels.view import KVView
from kvroute_kernels.workspace import Workspace

RUN = 32
"""New tokens that one program takes."""
BLOCK_F = 256
"""Numbers of a tile of the second launch."""
TILE_BYTES, BLOCK_L_STRIDED = 8192, 8
"""Bytes of a tile of some layers of one token; layers of a tile where entries are read one by one."""
WARPS, REGISTERS = 8, 128
"""Of a program, for there are as few programs as requests (fewer where a tile has no 16 bytes for each thread); of a
thread.
"""


def paged_chain_step_triton(
    view: KVView,
    state: ChainTensors,
    rows: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    layers: Sequence[int],
    layer_sums: bool,
    workspace: Workspace | None = None,
) -> ChainSteps:
    """:func:`~kvroute_kernels.paged_chain_step` by the kernels. Checks the page tables: where the view has no copy of
    them on the host, the host waits for them once. A step in a CUDA graph uses :class:`PagedChain`."""
    chain = PagedChain(view.lengths.device) if workspace is None else workspace.chain(view.lengths.device)
    chain.stage(view, rows, start, stop, layers, state, sums=layer_sums)
    check_held(view, layers, np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64))
    chain.launch(state)
    steps = chain.steps()
    if not layer_sums:
        return steps
    sums = chain.sums()
    none = [i for i, count in enumerate(steps.counts) if count == 0]
    many = [i for i, count in enumerate(steps.counts) if count > RUN]
    if none:
        sums[none] = 0.0
    if many:  # chunks: their sums are split over many programs
        low, high = [start[i] for i in many], [stop[i] for i in many]
        pooled = paged_pool_triton(view.select_sequences(many), layers, low, high, "kv", None, workspace)
        assert pooled.keys is not None
        assert pooled.values is not None
        sums[many] = torch.cat([pooled.keys.flatten(2), pooled.values.flatten(2)], dim=2)
    return replace(steps, layer_sums=sums)


class PagedChain:
    """Feeds chains step after step on one device: :meth:`stage` takes a step's ranges to it, :meth:`launch` updates the
    states. As :class:`~kvroute_kernels.paged_pool_triton.PagedPool`, also in what it promises.

    Args:
        device: where the cache lies.
        room: items that every launch has a program for, in use or not; None for as many as a step has.
    """

    def __init__(self, device: torch.device, room: int | None = None) -> None:
        self.buffers = Buffers(device)
        self._known = KnownPlanes()
        self._room = room
        self._planes: Planes | None = None
        self._e4m3_bits = needs_e4m3_bits(device)
        self._threads = 64 if torch.version.hip else 32  # of a warp
        self._counts: list[int] = []
        self._items = self._joins = self._layers = 0
        self._sums = False
        self.launches = 0

    def stage(
        self,
        view: KVView,
        rows: Sequence[int],
        start: Sequence[int],
        stop: Sequence[int],
        layers: Sequence[int],
        state: ChainTensors,
        *,
        sums: bool = False,
    ) -> None:
        """Say what is fed next. Arguments are those of :func:`~kvroute_kernels.paged_chain_step`. With ``sums``,
        :meth:`sums` gives the sums by layer of sequences with at most RUN new tokens.

        Raises:
            KVViewError: layers that differ, a range outside its sequence, vectors of another size than the states',
                more items than there is room for.
        """
        planes = planes_of(view, layers, "kv", self._known)
        low, high = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
        check_ranges(view, low, high)
        check_states(state, rows, len(low), planes.heads * sum(planes.sizes))
        items, joins, ends = chain_items(np.asarray(rows, dtype=np.int64), low, high)
        if self._room is not None:
            if len(items) > self._room:
                raise KVViewError(f"The step has {len(items)} items, and there is room for {self._room}.")
            items = np.concatenate([items, np.full((self._room - len(items), 7), -1, dtype=np.int64)])
            joins = np.concatenate([joins, np.zeros((self._room - len(joins), 5), dtype=np.int64)])
        self._planes, self._counts = planes, (high - low).tolist()
        self._items, self._joins, self._sums = len(items), len(joins), sums
        self._layers = len(layers)
        self.buffers.get("sums", len(low) * len(layers) * self.width if sums else 0, torch.float32)
        self.buffers.send("planes", planes.rows)
        self.buffers.send("scales", planes.scales)
        self.buffers.send("items", items)
        self.buffers.send("joins", joins)
        self.buffers.get("steps", sum(self._counts) * 4, torch.float64)
        self.buffers.get("ends", ends * 2 * self.width, torch.float32)
        self.buffers.get("partial", ends * 3, torch.float64)

    @property
    def width(self) -> int:
        """Numbers of a z."""
        assert self._planes is not None
        return self._planes.heads * sum(self._planes.sizes)

    @property
    def grid(self) -> int:
        """Programs of the first launch."""
        return self._items

    def constants(self) -> dict[str, Any]:
        """The constexpr arguments of :func:`chain_step_kernel`: for a device at most 5 dtypes * 2 * 2 * 2 = 40
        variants."""
        assert self._planes is not None
        p = self._planes
        bits = self._e4m3_bits and p.dtype == torch.float8_e4m3fn
        block = 64 if max(p.sizes) <= 64 else 128
        return {
            "DTYPE": tl.uint8 if bits else TRITON_DTYPES[p.dtype],
            "E4M3_BITS": bits,
            "VECTOR": p.vector,
            "SUMS": self._sums,
            "BLOCK_L": min(TILE_BYTES // (block * p.dtype.itemsize), 32) if p.vector else BLOCK_L_STRIDED,
            "BLOCK_D": block,
            "RUN": RUN,
        }

    def launch(self, state: ChainTensors) -> None:
        """Update the states: one launch, and a second one where a sequence has more than RUN new tokens."""
        if self._planes is None or self._items == 0:
            return
        get, constants, p = self.buffers.get, self.constants(), self._planes
        held = (state.last, state.count, state.sum_magnitude, state.sum_angle, state.degenerate)
        outs = get("steps", 0, torch.float64), get("ends", 0, torch.float32), get("partial", 0, torch.float64)
        chunks = [-(-size // constants["BLOCK_D"]) for size in p.sizes]
        chain_step_kernel[(self._items,)](
            get("planes", 0, torch.int64),
            get("scales", 0, torch.float32),
            get("items", 0, torch.int64),
            state.first,
            *held,
            *outs,
            get("sums", 0, torch.float32),
            p.layers,
            p.heads,
            *chunks,
            self.width,
            **constants,
            num_warps=warps_of(constants, self._threads),
            **at_most(REGISTERS),
            enable_fp_fusion=False,
        )
        self.launches += 1
        if self._joins:
            chain_step_join_kernel[(self._joins,)](
                get("joins", 0, torch.int64),
                *held,
                *outs,
                self.width,
                BLOCK_F=BLOCK_F,
                RUN=RUN,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            self.launches += 1

    def rows(self) -> Tensor:
        """``[tokens, 4]`` float64 of the last launch, in the buffer itself: magnitude, angle, squared magnitude,
        squared norm, the tokens of each sequence behind one another."""
        total = sum(self._counts)
        return self.buffers.get("steps", 0, torch.float64)[: total * 4].view(total, 4)

    def sums(self) -> Tensor:
        """``[sequences, layers, width]`` float32 of the last launch, in the buffer itself; not written where a
        sequence has no new token or more than RUN."""
        shape = (len(self._counts), self._layers, self.width)
        return self.buffers.get("sums", 0, torch.float32)[: math.prod(shape)].view(shape)

    def steps(self) -> ChainSteps:
        """The last launch's steps, copied."""
        return ChainSteps(list(self._counts), self.rows().clone())


def warps_of(constants: dict[str, Any], threads: int) -> int:
    """Warps of ``threads`` threads for a program, so that each thread has 16 bytes of a tile or more."""
    if not constants["VECTOR"]:
        return WARPS
    tile = constants["BLOCK_L"] * constants["BLOCK_D"] * constants["DTYPE"].primitive_bitwidth // 8
    return int(max(1, min(WARPS, tile // 16 // threads)))


def chain_items(
    rows: np.ndarray[Any, Any], low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Items ``[W, 7]`` and joins ``[J, 5]`` (fields as the kernels take them), and rows of ends. A sequence without a
    new token has no item."""
    size = high - low
    runs = -(-size // RUN)
    sequence = np.repeat(np.arange(len(low)), runs)
    run = np.arange(len(sequence)) - np.repeat(np.cumsum(runs) - runs, runs)
    joined = np.where(runs > 1, runs, 0)
    first_end = np.cumsum(joined) - joined
    first_step = np.cumsum(size) - size
    items = np.empty((len(sequence), 7), dtype=np.int64)
    items[:, 0] = sequence
    items[:, 1] = rows[sequence]
    items[:, 2] = low[sequence] + run * RUN
    items[:, 3] = np.minimum(size[sequence] - run * RUN, RUN)
    items[:, 4] = first_step[sequence] + run * RUN
    items[:, 5] = run
    items[:, 6] = np.where(runs[sequence] > 1, first_end[sequence] + run, -1)
    several = np.flatnonzero(runs > 1)
    joins = np.stack([rows[several], first_end[several], runs[several], size[several], first_step[several]], axis=1)
    return items, joins.astype(np.int64), int(joined.sum())
