"""One step of the online chains, in Triton: the twin of ``paged_chain_step`` in ``chain_step.py``.

Maths: ``z_t`` = mean over layers of the concatenation over heads of keys, then values, at token t. For every new token
``m_t = |z_t - z_{t-1}|``, ``a_t = angle(z_t, z_{t-1})``; the state takes z_0, the newest z and the sums of m and a
(arXiv 2601.20326; arXiv 2410.13640, section 3). The squared lengths are added up in float64 from z in float32, and the
angle follows from the three sides of the triangle (0, z_{t-1}, z_t) by Kahan's formula, which keeps its digits
where an arc cosine loses them; so z is read once and never divided by its length.

Grid: one program an item, a run of at most RUN new tokens of one sequence, counted from the call's own start. It goes
through the vector in pieces of BLOCK_D numbers: a tile ``[BLOCK_L, BLOCK_D]`` holds the layers of one token, so that
one launch reads the newest keys and values of all layers and requests, each number once, and updates all states.

More than RUN new tokens (a prompt's chunk): each run leaves its first and its last z, and a second launch takes the
steps between runs and sums in the runs' order. No atomics; the same bits on every run and in every batch.

Memory: 32 bytes a new token; for runs that are joined 2 F float32 each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvroute_kernels.buffers import Buffers
from kvroute_kernels.chain_step import ChainSteps, ChainTensors
from kvroute_kernels.checks import check_held, check_ranges, check_states
from kvroute_kernels.errors import KVViewError
from kvroute_kernels.paged_pool_triton import paged_pool_triton
from kvroute_kernels.planes import KnownPlanes, Planes, planes_of
from kvroute_kernels.reading_triton import TRITON_DTYPES, at_most, load_numbers, needs_e4m3_bits
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


@triton.jit
def reciprocal(x):
    """1 / x in float64 for x in float32's range, without the call that a float64 division is (it spills registers)."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def square_root(x):
    """Of x >= 0 in float64; 0 below float32's range, infinity above it."""
    narrow = x.to(tl.float32)
    usable = (narrow > 1e-37) & (narrow < float("inf"))
    safe = tl.where(usable, x, 1.0)
    y = tl.rsqrt(safe.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * safe * y * y)
    y = y * (1.5 - 0.5 * safe * y * y)
    return tl.where(usable, safe * y, tl.where(narrow <= 1e-37, 0.0, narrow.to(tl.float64)))


@triton.jit
def atan_of_unit(x):
    """Arc tangent of x in [0, 1] in float64 (Cephes: a rational function after reduction to [-0.21, 0.66])."""
    large = x > 0.66
    reduced = tl.where(large, (x - 1.0) * reciprocal(x + 1.0), x)
    z = reduced * reduced
    p = -8.750608600031904122785e-1 * z - 1.615753718733365076637e1
    p = p * z - 7.500855792314704667340e1
    p = p * z - 1.228866684490136173410e2
    p = p * z - 6.485021904942025371773e1
    q = z + 2.485846490142306297962e1
    q = q * z + 1.650270098316988542046e2
    q = q * z + 4.328810604912902668951e2
    q = q * z + 4.853903996359136964868e2
    q = q * z + 1.945506571482613964425e2
    return tl.where(large, 0.785398163397448309616, 0.0) + (reduced * (z * p * reciprocal(q)) + reduced)


@triton.jit
def angle_of_sides(before, after, between):
    """Angle at 0 of the triangle with the sides |z_{t-1}|, |z_t|, |z_t - z_{t-1}|, by Kahan's formula for
    tan^2(angle / 2); the first two are > 0."""
    longest = tl.maximum(before, after)
    scale = reciprocal(tl.where(longest > 0.0, longest, 1.0))  # an angle has no size
    a = longest * scale
    b = tl.minimum(before, after) * scale
    c = tl.minimum(between * scale, a + b)
    inner = tl.maximum(tl.where(b >= c, c - (a - b), b - (a - c)), 0.0)
    sine = tl.maximum((a - b) + c, 0.0) * inner  # together they are 4 a b
    cosine = (a + (b + c)) * tl.maximum((a - c) + b, 0.0)
    wide = sine > cosine
    below = tl.where(wide, sine, cosine)
    tangent = square_root(tl.where(wide, cosine, sine) * reciprocal(tl.where(below > 1e-37, below, 1.0)))
    half = atan_of_unit(tl.minimum(tangent, 1.0))
    return 2.0 * tl.where(wide, 1.57079632679489661923 - half, half)


@triton.jit
def step_of_squares(before, after, between):
    """Length and angle of a step from squared sides, and whether the angle is undefined (then it is 0)."""
    magnitude = square_root(between)
    side = square_root(before)
    other = square_root(after)
    angle = angle_of_sides(side, other, magnitude)
    undefined = (side == 0.0) | (other == 0.0) | (angle != angle)
    return magnitude, tl.where(undefined, 0.0, angle), undefined


@triton.jit(
    do_not_specialize=["layers", "heads", "key_chunks", "value_chunks", "width"],
    do_not_specialize_on_alignment=[
        "planes",
        "scales",
        "items",
        "first",
        "last",
        "count",
        "magnitudes",
        "angles",
        "degenerate",
        "steps",
        "ends",
        "partial",
        "sums",
    ],
)
def chain_step_kernel(
    planes,  # [2 * layers, 16] int64, keys of all layers, then values; see planes.py
    scales,  # [2 * layers] float32
    items,  # [items, 7] int64: sequence, state, first token, tokens, first step, run of its sequence, row of ends or -1
    first,  # [states, width] float32, z_0
    last,  # [states, width] float32, the newest z
    count,  # [states] int64
    magnitudes,  # [states] float64
    angles,  # [states] float64
    degenerate,  # [states] bool
    steps,  # [tokens, 4] float64: magnitude, angle, squared magnitude, squared norm
    ends,  # [rows, 2, width] float32: first and last z of a run that is joined
    partial,  # [rows, 3] float64: sums of its magnitudes and angles, undefined angles
    sums,  # [sequences, layers, width] float32: by layer the sums over the new tokens of sequences of one run
    layers,
    heads,
    key_chunks,  # of BLOCK_D entries a head of keys
    value_chunks,
    width,  # numbers of z: heads * (key size + value size)
    DTYPE: tl.constexpr,
    E4M3_BITS: tl.constexpr,
    VECTOR: tl.constexpr,
    SUMS: tl.constexpr,  # whether sums are wanted
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
):
    item = items + tl.program_id(0).to(tl.int64) * 7
    sequence = tl.load(item)
    if sequence >= 0:
        state = tl.load(item + 1)
        begin = tl.load(item + 2)
        tokens = tl.load(item + 3)
        run = tl.load(item + 5)
        joined = tl.load(item + 6)
        seen = tl.load(count + state)
        fresh = (seen == 0) & (run == 0)  # the first token begins the chain
        known = (seen != 0) & (run == 0)  # the state holds the token before
        place = tl.arange(0, RUN)
        moved = tl.zeros([RUN], tl.float64)
        norms = tl.zeros([RUN], tl.float64)
        norms_before = tl.zeros([RUN], tl.float64)
        if VECTOR:
            width = tl.multiple_of(width, 128 // DTYPE.primitive_bitwidth)
            sums = tl.multiple_of(sums, 16)
        key_size = tl.load(planes + 5)
        value_size = tl.load(planes + layers * 16 + 5)
        for piece in range(0, heads * (key_chunks + value_chunks)):
            is_values = piece >= heads * key_chunks
            at = tl.where(is_values, piece - heads * key_chunks, piece)
            chunks = tl.where(is_values, value_chunks, key_chunks)
            size = tl.where(is_values, value_size, key_size)
            head = at // chunks
            if VECTOR:
                step: tl.constexpr = 128 // DTYPE.primitive_bitwidth
                size = tl.multiple_of(size, step)
            entry = (at % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
            inside = entry < size
            end_size = tl.where(joined >= 0, size, 0)
            number = tl.where(is_values, heads * key_size, 0) + head * size + entry
            old = tl.load(last + state * width + number, mask=entry < tl.where(known, size, 0), other=0.0)
            for j in range(0, tokens):
                total = tl.zeros([BLOCK_D], tl.float32)
                for low in range(0, layers, BLOCK_L):
                    layer = low + tl.arange(0, BLOCK_L)
                    real = layer < layers
                    plane_at = tl.where(is_values, layers, 0) + layer
                    plane = planes + plane_at * 16
                    base = tl.load(plane, mask=real, other=0).to(tl.pointer_type(DTYPE))
                    page_stride = tl.load(plane + 1, mask=real, other=0)
                    head_stride = tl.load(plane + 2, mask=real, other=0)
                    token_stride = tl.load(plane + 3, mask=real, other=0)
                    entry_stride = tl.load(plane + 4, mask=real, other=0)
                    page_size = tl.load(plane + 6, mask=real, other=1).to(tl.int32)
                    num_pages = tl.load(plane + 7, mask=real, other=0)
                    table = tl.load(plane + 8, mask=real, other=0).to(tl.pointer_type(tl.int64))
                    table += sequence * tl.load(plane + 9, mask=real, other=0)
                    table_columns = tl.load(plane + 10, mask=real, other=0)
                    offsets = tl.load(plane + 11, mask=real, other=0).to(tl.pointer_type(tl.int64))
                    scale = tl.load(scales + plane_at, mask=real, other=0.0)
                    slot = (begin + j + tl.load(offsets + sequence, mask=real, other=0)).to(tl.int32)
                    column = slot // page_size
                    held = real & (slot >= 0) & (column < table_columns)
                    page = tl.load(table + column, mask=held, other=-1)
                    held = held & (page >= 0) & (page < num_pages)
                    token_in_page = (slot - column * page_size).to(tl.int64)
                    start = page * page_stride + head * head_stride + token_in_page * token_stride
                    if VECTOR:
                        rows = tl.multiple_of(base, [16]) + tl.multiple_of(start, [step])
                        pointers = rows[:, None] + entry[None, :]
                    else:
                        pointers = (base + start)[:, None] + entry[None, :] * entry_stride[:, None]
                    x = load_numbers(pointers, held[:, None] & inside[None, :], E4M3_BITS)
                    x = tl.where((real & (held == 0))[:, None], float("nan"), x * scale[:, None])
                    total += tl.sum(x, axis=0)
                    if SUMS:
                        summed = tl.where(joined < 0, layers, 0)
                        at_sum = sums + (sequence * layers + layer)[:, None] * width + number[None, :]
                        again = (layer < tl.where(j > 0, summed, 0))[:, None] & inside[None, :]
                        tl.debug_barrier()  # what the token before wrote
                        x += tl.load(at_sum, mask=again, other=0.0)
                        tl.store(at_sum, x, mask=(layer < summed)[:, None] & inside[None, :])
                z = tl.where(inside, total / layers.to(tl.float32), 0.0)
                wide = z.to(tl.float64)
                wide_old = old.to(tl.float64)
                move = wide - wide_old
                here = place == j
                norms += tl.where(here, tl.sum(wide * wide, axis=0), 0.0)
                norms_before += tl.where(here, tl.sum(wide_old * wide_old, axis=0), 0.0)
                moved += tl.where(here, tl.sum(move * move, axis=0), 0.0)
                if j == 0:
                    tl.store(first + state * width + number, z, mask=entry < tl.where(fresh, size, 0))
                    tl.store(ends + joined * 2 * width + number, z, mask=entry < end_size)
                old = z
            tl.debug_barrier()  # all have read the old z before anyone writes the new one
            tl.store(last + state * width + number, old, mask=entry < size - end_size)
            tl.store(ends + (joined * 2 + 1) * width + number, old, mask=entry < end_size)
        real_step = (place < tokens) & (place >= tl.where(known, 0, 1))
        moved = tl.where(real_step, moved, 0.0)
        magnitude, angle, undefined = step_of_squares(norms_before, norms, moved)
        angle = tl.where(real_step, angle, 0.0)
        undefined = (undefined & real_step).to(tl.int32)
        row = steps + (tl.load(item + 4) + place) * 4
        live = place < tokens
        tl.store(row, magnitude, mask=live)
        tl.store(row + 1, angle, mask=live)
        tl.store(row + 2, moved, mask=live)
        tl.store(row + 3, norms, mask=live)
        magnitude_sum = tl.sum(magnitude, axis=0)
        angle_sum = tl.sum(angle, axis=0)
        faults = tl.sum(undefined, axis=0)
        if joined < 0:
            old_count = tl.load(count + state)
            old_magnitude = tl.load(magnitudes + state)
            old_angle = tl.load(angles + state)
            old_fault = tl.load(degenerate + state).to(tl.int32)
            tl.debug_barrier()
            tl.store(count + state, old_count + tokens)
            tl.store(magnitudes + state, old_magnitude + magnitude_sum)
            tl.store(angles + state, old_angle + angle_sum)
            tl.store(degenerate + state, (old_fault + faults) > 0)
        else:
            tl.store(partial + joined * 3, magnitude_sum)
            tl.store(partial + joined * 3 + 1, angle_sum)
            tl.store(partial + joined * 3 + 2, faults.to(tl.float64))


@triton.jit(
    do_not_specialize=["width"],
    do_not_specialize_on_alignment=[
        "joins",
        "last",
        "count",
        "magnitudes",
        "angles",
        "degenerate",
        "steps",
        "ends",
        "partial",
    ],
)
def chain_step_join_kernel(
    joins,  # [joins, 5] int64: state, first row of ends, runs, tokens, first step; 0 runs: nothing to do
    last,  # [states, width] float32
    count,  # [states] int64
    magnitudes,  # [states] float64
    angles,  # [states] float64
    degenerate,  # [states] bool
    steps,  # [tokens, 4] float64
    ends,  # [rows, 2, width] float32
    partial,  # [rows, 3] float64
    width,
    BLOCK_F: tl.constexpr,
    RUN: tl.constexpr,
):
    join = joins + tl.program_id(0).to(tl.int64) * 5
    state = tl.load(join)
    row = tl.load(join + 1)
    runs = tl.load(join + 2)
    if runs > 0:
        step = tl.load(join + 4)
        magnitude_sum = tl.load(partial + row * 3)
        angle_sum = tl.load(partial + row * 3 + 1)
        faults = tl.load(partial + row * 3 + 2)
        for run in range(1, runs):
            before = ends + ((row + run - 1) * 2 + 1) * width
            after = ends + (row + run) * 2 * width
            moved = tl.zeros([BLOCK_F], tl.float64)
            norms_before = tl.zeros([BLOCK_F], tl.float64)
            norms = tl.zeros([BLOCK_F], tl.float64)
            for low in range(0, width, BLOCK_F):
                number = low + tl.arange(0, BLOCK_F)
                inside = number < width
                x = tl.load(before + number, mask=inside, other=0.0).to(tl.float64)
                y = tl.load(after + number, mask=inside, other=0.0).to(tl.float64)
                moved += (y - x) * (y - x)
                norms_before += x * x
                norms += y * y
            square = tl.sum(moved, axis=0)
            magnitude, angle, undefined = step_of_squares(tl.sum(norms_before, axis=0), tl.sum(norms, axis=0), square)
            at = steps + (step + run * RUN) * 4
            tl.store(at, magnitude)
            tl.store(at + 1, angle)
            tl.store(at + 2, square)
            magnitude_sum += magnitude + tl.load(partial + (row + run) * 3)
            angle_sum += angle + tl.load(partial + (row + run) * 3 + 1)
            faults += undefined.to(tl.float64) + tl.load(partial + (row + run) * 3 + 2)
        for low in range(0, width, BLOCK_F):
            number = low + tl.arange(0, BLOCK_F)
            inside = number < width
            newest = tl.load(ends + ((row + runs - 1) * 2 + 1) * width + number, mask=inside, other=0.0)
            tl.store(last + state * width + number, newest, mask=inside)
        old_count = tl.load(count + state)
        old_magnitude = tl.load(magnitudes + state)
        old_angle = tl.load(angles + state)
        old_fault = tl.load(degenerate + state).to(tl.int32)
        tl.debug_barrier()
        tl.store(count + state, old_count + tl.load(join + 3))
        tl.store(magnitudes + state, old_magnitude + magnitude_sum)
        tl.store(angles + state, old_angle + angle_sum)
        tl.store(degenerate + state, (old_fault > 0) | (faults > 0.0))


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
