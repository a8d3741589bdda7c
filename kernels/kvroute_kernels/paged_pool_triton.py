"""Sums of keys and values over tokens, in Triton: the twin of the reference in ``paged_pool.py``.

Maths: ``S[b, l, h, :] = scale_l * sum_t w_{b,t} X[l, b, h, t, :]`` over the tokens ``start_b..stop_b``, X keys and
values, w = 1 unless given.

Grid: one dimension of (items x columns). An *item* is a run of at most SPLIT tokens of one sequence, counted from the
sequence's own start; a *column* is BLOCK_D entries of one head of one plane (keys or values of one layer). A program
adds up its tokens in a tile ``[BLOCK_T, BLOCK_D]`` of float32 and folds the tile at the end, so a sum is split over
BLOCK_T * (splits) partial sums. One launch reads all sequences, layers, heads, keys and values, each number once.

A sequence of more than SPLIT tokens leaves one row of partial sums an item; a second launch adds them up in their
order. No atomics. Where runs begin depends on the sequence alone, so its sums have the same bits on every run and in
every batch.

Memory: out ``[sequences + partial rows, width]`` float32; a partial row is 4 bytes an entry for SPLIT * 2 bytes read
(0.8 % in bfloat16). Buffers are kept and grow rarely: a step that fits allocates nothing and waits for nothing.

A page that is absent (-1), or a token outside the table, makes the sums NaN: never another sequence's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvroute_kernels.buffers import Buffers
from kvroute_kernels.checks import check_held, check_ranges
from kvroute_kernels.errors import KVViewError
from kvroute_kernels.paged_pool import PooledSums
from kvroute_kernels.planes import KnownPlanes, Planes, planes_of
from kvroute_kernels.reading_triton import TRITON_DTYPES, at_most, load_numbers, needs_e4m3_bits
from kvroute_kernels.view import KVView
from kvroute_kernels.workspace import Workspace

SPLIT = 256
"""Tokens of a sequence that one program adds up. Part of what decides a sum's bits."""
JOIN_T, JOIN_D = 16, 256
"""Partial rows and numbers of a tile of the second launch."""


@triton.jit(
    do_not_specialize=["columns", "heads", "chunks", "width"],
    do_not_specialize_on_alignment=["planes", "scales", "items", "weights", "out"],
)
def paged_pool_kernel(
    planes,  # [planes, 16] int64, see planes.py
    scales,  # [planes] float32
    items,  # [items, 5] int64: sequence, first token, tokens, row of out, first weight; sequence < 0: nothing to do
    weights,  # [tokens] float32, those of each sequence behind one another
    out,  # [rows, width] float32: sums of all planes, then the sum of the weights
    columns,  # planes * heads * chunks
    heads,
    chunks,  # of BLOCK_D entries a head
    width,
    DTYPE: tl.constexpr,  # of the cache
    E4M3_BITS: tl.constexpr,  # the cache is e4m3, read as bytes
    VECTOR: tl.constexpr,  # rows of entries lie at multiples of 16 bytes
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    item = items + (program // columns) * 5
    column = program % columns
    sequence = tl.load(item)
    if sequence >= 0:
        first = tl.load(item + 1)
        count = tl.load(item + 2)
        row = tl.load(item + 3)
        plane_at = column // (heads * chunks)
        head = (column // chunks) % heads
        plane = planes + plane_at * 16
        base = tl.load(plane).to(tl.pointer_type(DTYPE))
        page_stride = tl.load(plane + 1)
        head_stride = tl.load(plane + 2)
        token_stride = tl.load(plane + 3)
        entry_stride = tl.load(plane + 4)
        size = tl.load(plane + 5)
        page_size = tl.load(plane + 6)
        num_pages = tl.load(plane + 7)
        table = tl.load(plane + 8).to(tl.pointer_type(tl.int64)) + sequence * tl.load(plane + 9)
        table_columns = tl.load(plane + 10)
        offset = tl.load(tl.load(plane + 11).to(tl.pointer_type(tl.int64)) + sequence)
        if VECTOR:
            step: tl.constexpr = 128 // DTYPE.primitive_bitwidth
            base = tl.multiple_of(base, 16)
            page_stride = tl.multiple_of(page_stride, step)
            head_stride = tl.multiple_of(head_stride, step)
            token_stride = tl.multiple_of(token_stride, step)
            size = tl.multiple_of(size, step)
        entry = (column % chunks) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = entry < size
        if VECTOR:
            entries = base + head * head_stride + entry
        else:
            entries = base + head * head_stride + entry * entry_stride
        sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        weight_sums = tl.zeros([BLOCK_T], tl.float32)
        absent = tl.zeros([BLOCK_T], tl.int32)
        for begin in range(0, count, BLOCK_T):
            token = begin + tl.arange(0, BLOCK_T)
            live = token < count
            slot = (first + token + offset).to(tl.int32)  # a sequence has fewer than 2^31 tokens, a cache more entries
            place = slot // page_size.to(tl.int32)
            held = live & (slot >= 0) & (place < table_columns)
            page = tl.load(table + place, mask=held, other=-1)
            held = held & (page >= 0) & (page < num_pages)
            absent += (live & (held == 0)).to(tl.int32)
            token_in_page = (slot - place * page_size.to(tl.int32)).to(tl.int64)
            start = page * page_stride + token_in_page * token_stride
            x = load_numbers(entries[None, :] + start[:, None], held[:, None] & inside[None, :], E4M3_BITS)
            if WEIGHTED:
                weight = tl.load(weights + tl.load(item + 4) + token, mask=live, other=0.0)
                x = x * weight[:, None]
                weight_sums += weight
            else:
                weight_sums += live.to(tl.float32)
            sums += x
        total = tl.sum(sums, axis=0) * tl.load(scales + plane_at)
        total = tl.where(tl.sum(absent, axis=0) > 0, float("nan"), total)
        row_start = out + row * width
        tl.store(row_start + tl.load(plane + 12) + head * size + entry, total, mask=inside)
        if column == 0:
            tl.store(row_start + width - 1, tl.sum(weight_sums, axis=0))


@triton.jit(do_not_specialize=["blocks", "width"], do_not_specialize_on_alignment=["joins", "out"])
def paged_pool_join_kernel(
    joins,  # [joins, 3] int64: row to write, first partial row, partial rows; 0 rows: nothing to do
    out,  # [rows, width] float32
    blocks,  # of BLOCK_D numbers a row
    width,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    join = joins + (program // blocks) * 3
    row = tl.load(join)
    first = tl.load(join + 1)
    count = tl.load(join + 2)
    if count > 0:
        width = tl.multiple_of(width, 4)  # as rows are made
        out = tl.multiple_of(out, 16)
        place = (program % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = place < width
        sums = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for begin in range(0, count, BLOCK_T):
            partial = begin + tl.arange(0, BLOCK_T)
            where = out + (first + partial)[:, None] * width + place[None, :]
            sums += tl.load(where, mask=(partial < count)[:, None] & inside[None, :], other=0.0)
        tl.store(out + row * width + place, tl.sum(sums, axis=0), mask=inside)


BLOCK_ELEMENTS = 4096
"""Numbers of a program's tile; a quarter where entries are read one by one and each has its address."""
WARPS, REGISTERS = 4, 112
"""Of a program; of a thread, where the compiler would spill to have more programs."""


def paged_pool_triton(
    view: KVView,
    layers: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    part: Literal["k", "v", "kv"],
    weights: Sequence[Tensor] | None,
    workspace: Workspace | None = None,
) -> PooledSums:
    """:func:`~kvroute_kernels.paged_pool` by the kernels. Checks the page tables: where the view has no copy of them on
    the host, the host waits for them once. A step in a CUDA graph uses :class:`PagedPool`."""
    pool = PagedPool(view.lengths.device) if workspace is None else workspace.pool(view.lengths.device)
    pool.stage(view, layers, start, stop, part=part, weights=weights)
    check_held(view, layers, np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64))
    pool.launch()
    return pool.sums()


@dataclass(frozen=True, slots=True)
class Variant:
    """What one compilation of :func:`paged_pool_kernel` is for; nothing else leads to another.

    For a device there are at most 5 dtypes * 2 * 2 * 2 = 40, and a model needs one or two.
    """

    dtype: torch.dtype
    vector: bool
    weighted: bool
    block_d: int

    def constants(self, e4m3_bits: bool) -> dict[str, Any]:
        """The kernel's constexpr arguments."""
        bits = e4m3_bits and self.dtype == torch.float8_e4m3fn
        return {
            "DTYPE": tl.uint8 if bits else TRITON_DTYPES[self.dtype],
            "E4M3_BITS": bits,
            "VECTOR": self.vector,
            "WEIGHTED": self.weighted,
            "BLOCK_T": (BLOCK_ELEMENTS if self.vector else BLOCK_ELEMENTS // 4) // self.block_d,
            "BLOCK_D": self.block_d,
        }


class PagedPool:
    """Pools step after step on one device: :meth:`stage` takes a step's ranges to it, :meth:`launch` sums.

    Between them nothing waits for the device. Where no buffer has to grow, nothing is allocated and all addresses stay,
    so :meth:`launch` may be captured in a CUDA graph and replayed after each :meth:`stage` of a step with
    ``room`` items or fewer.

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
        self._count = self._items = self._joins = 0
        self._weighted = False
        self.launches = 0
        self.buffers.get("weights", 0, torch.float32)

    def stage(
        self,
        view: KVView,
        layers: Sequence[int],
        start: Sequence[int],
        stop: Sequence[int],
        *,
        part: Literal["k", "v", "kv"] = "kv",
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        """Say what is summed next. Arguments are those of :func:`~kvroute_kernels.paged_pool`, all given.

        Raises:
            KVViewError: layers that differ, a range outside its sequence, more items than there is room for.
        """
        planes = planes_of(view, layers, part, self._known)
        low, high = np.asarray(start, dtype=np.int64), np.asarray(stop, dtype=np.int64)
        check_ranges(view, low, high, weights)
        items, joins, rows = split_items(low, high)
        if self._room is not None:
            if len(items) > self._room:
                raise KVViewError(f"The step has {len(items)} items, and there is room for {self._room}.")
            items = np.concatenate([items, np.full((self._room - len(items), 5), -1, dtype=np.int64)])
            joins = np.concatenate([joins, np.zeros((max(self._room - len(joins), 0), 3), dtype=np.int64)])
        self._planes, self._count, self._items, self._joins = planes, len(low), len(items), len(joins)
        self._weighted = weights is not None
        send = self.buffers.send
        send("planes", planes.rows)
        send("scales", planes.scales)
        send("items", items)
        send("joins", joins)
        if weights is not None:
            flat = [w.detach().to("cpu", torch.float32).numpy() for w in weights]
            send("weights", np.concatenate([*flat, np.zeros(1, np.float32)]))
        self.buffers.get("out", rows * self.width, torch.float32)

    @property
    def width(self) -> int:
        """Numbers of a row: the sums, the sum of the weights, and room so that rows begin at multiples of 16 bytes."""
        assert self._planes is not None
        return -(-(self._planes.width + 1) // 4) * 4

    @property
    def variant(self) -> Variant:
        """Which compilation the staged step uses."""
        assert self._planes is not None
        p = self._planes
        return Variant(p.dtype, p.vector, self._weighted, 64 if max(p.sizes) <= 64 else 128)

    @property
    def grid(self) -> int:
        """Programs of the first launch."""
        return self._items * self._columns[0]

    @property
    def _columns(self) -> tuple[int, int]:
        """Columns, and those of one head."""
        assert self._planes is not None
        chunks = -(-max(self._planes.sizes) // self.variant.block_d)
        return len(self._planes.rows) * self._planes.heads * chunks, chunks

    def launch(self) -> None:
        """Sum: one launch, and a second one where a sequence was split."""
        if self._planes is None or self._items == 0:
            return
        get, variant, (columns, chunks) = self.buffers.get, self.variant, self._columns
        out = get("out", 0, torch.float32)
        paged_pool_kernel[(self.grid,)](
            get("planes", 0, torch.int64),
            get("scales", 0, torch.float32),
            get("items", 0, torch.int64),
            get("weights", 0, torch.float32),
            out,
            columns,
            self._planes.heads,
            chunks,
            self.width,
            **variant.constants(self._e4m3_bits),
            **(at_most(REGISTERS) if variant.weighted or not variant.vector else {}),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        self.launches += 1
        if self._joins:
            blocks = -(-self.width // JOIN_D)
            paged_pool_join_kernel[(self._joins * blocks,)](
                get("joins", 0, torch.int64),
                out,
                blocks,
                self.width,
                BLOCK_T=JOIN_T,
                BLOCK_D=JOIN_D,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
            self.launches += 1

    def rows(self) -> Tensor:
        """``[sequences, width]`` float32 of the last launch, in the buffer itself: the next launch overwrites it."""
        out = self.buffers.get("out", 0, torch.float32)
        return out[: self._count * self.width].view(self._count, self.width)

    def sums(self) -> PooledSums:
        """The last launch's sums, as views of :meth:`rows`."""
        assert self._planes is not None
        p, rows = self._planes, self.rows()
        parts: list[Tensor | None] = []
        low = 0
        for size in p.sizes:
            high = low + p.layers * p.heads * size
            parts.append(rows[:, low:high].view(self._count, p.layers, p.heads, size) if size else None)
            low = high
        return PooledSums(parts[0], parts[1], rows[:, -1])


def split_items(
    low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """Items ``[W, 5]`` and joins ``[J, 3]`` of the ranges (fields as the kernels take them), and rows of out.

    A range that fits in one item (an empty one too) writes its sequence's row; the others write a partial row an item,
    behind the rows of all sequences.
    """
    count = len(low)
    size = high - low
    runs = np.maximum(-(-size // SPLIT), 1)
    sequence = np.repeat(np.arange(count), runs)
    run = np.arange(len(sequence)) - np.repeat(np.cumsum(runs) - runs, runs)
    partial = np.where(runs > 1, runs, 0)
    first_row = count + np.cumsum(partial) - partial
    first_weight = np.cumsum(size) - size
    items = np.empty((len(sequence), 5), dtype=np.int64)
    items[:, 0] = sequence
    items[:, 1] = low[sequence] + run * SPLIT
    items[:, 2] = np.minimum(size[sequence] - run * SPLIT, SPLIT)
    items[:, 3] = np.where(runs[sequence] > 1, first_row[sequence] + run, sequence)
    items[:, 4] = first_weight[sequence] + run * SPLIT
    split = np.flatnonzero(runs > 1)
    joins = np.stack([split, first_row[split], runs[split]], axis=1).astype(np.int64)
    return items, joins, count + int(partial.sum())
