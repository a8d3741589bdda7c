"""Where a cache lies, as numbers that a kernel reads: one row of int64 for the keys or the values of one layer.

A kernel gets addresses and strides from a table in memory, not as arguments. So one launch reads layers of any
number of allocations, and neither a stride nor a length can ask for another compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.view import KVGroup, KVView, KVViewError

FIELDS = 16
"""Numbers a plane."""
ADDRESS, PAGE_STRIDE, HEAD_STRIDE, TOKEN_STRIDE, ENTRY_STRIDE, SIZE, PAGE_SIZE, PAGES = range(8)
"""Of the first entry, in bytes; strides in elements; entries a head; tokens a page; pages there are."""
TABLE, TABLE_STRIDE, COLUMNS, OFFSET, PLACE = range(8, 13)
"""Address of the page table and elements from one sequence's row to the next; its columns; address of the offsets;
where the plane's sums begin in a row of sums."""


@dataclass(frozen=True, slots=True)
class Planes:
    """The keys and values that are read: for each part, for each layer, one plane.

    Attributes:
        rows: ``[planes, FIELDS]`` int64.
        scales: ``[planes]`` float32; a stored number times this is the number.
        dtype: of the cache.
        heads: KV heads, H.
        sizes: entries of a head of keys, of values; 0 for a part that is not read.
        layers: how many layers.
        vector: whether every row of entries begins at a multiple of 16 bytes and is whole 16 bytes long.
        keep: tensors that the addresses point into.
    """

    rows: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    scales: np.ndarray[tuple[int], np.dtype[np.float32]]
    dtype: torch.dtype
    heads: int
    sizes: tuple[int, int]
    layers: int
    vector: bool
    keep: tuple[Tensor, ...]

    @property
    def width(self) -> int:
        """Numbers that one token has in all planes."""
        return self.layers * self.heads * sum(self.sizes)


def planes_of(view: KVView, layers: Sequence[int], part: str) -> Planes:
    """The planes of some layers of a view, keys of all layers before values.

    Raises:
        KVViewError: layers that differ in heads, head size or dtype.
    """
    found = [view.group_of(layer) for layer in layers]
    tables = {id(g.table): (g.table.pages.contiguous(), g.table.offset.contiguous()) for g, _ in found}
    rows, scales, keep, vector, place = [], [], [x for pair in tables.values() for x in pair], True, 0
    shapes, dtypes, sizes = set(), set(), [0, 0]
    for which, letter in enumerate("kv"):
        if letter not in part:
            continue
        for group, at in found:
            tensor = group.values if which else group.keys
            row = _row(tensor, at, group, tables[id(group.table)], place)
            rows.append(row)
            scales.append(group.value_scale if which else group.key_scale)
            keep.append(tensor)
            vector = vector and _whole(row, tensor.element_size())
            place += tensor.shape[2] * tensor.shape[4]
            sizes[which] = tensor.shape[4]
            shapes.add((letter, tensor.shape[2], tensor.shape[4]))
            dtypes.add(tensor.dtype)
    if len({letter for letter, *_ in shapes}) != len(shapes) or len({heads for _, heads, _ in shapes}) > 1:
        wanted = sorted(shape[1:] for shape in shapes)
        raise KVViewError(f"Layers {list(layers)} differ in heads or head size ({wanted}): pool them apart.")
    if len(dtypes) > 1:
        raise KVViewError(f"Layers {list(layers)} differ in dtype ({sorted(map(str, dtypes))}): pool them apart.")
    return Planes(
        rows=np.array(rows, dtype=np.int64).reshape(len(rows), FIELDS),
        scales=np.array(scales, dtype=np.float32),
        dtype=dtypes.pop() if dtypes else view.dtype,
        heads=next(iter(shapes))[1] if shapes else 0,
        sizes=(sizes[0], sizes[1]),
        layers=len(layers),
        vector=vector,
        keep=tuple(keep),
    )


def _row(tensor: Tensor, at: int, group: KVGroup, table: tuple[Tensor, Tensor], place: int) -> list[int]:
    pages, offset = table
    layer, *strides = tensor.stride()
    row = [0] * FIELDS
    row[ADDRESS] = tensor.data_ptr() + at * layer * tensor.element_size()
    row[PAGE_STRIDE : ENTRY_STRIDE + 1] = strides
    row[SIZE], row[PAGE_SIZE], row[PAGES] = tensor.shape[4], group.page_size, tensor.shape[1]
    row[TABLE], row[TABLE_STRIDE], row[COLUMNS] = pages.data_ptr(), pages.shape[1], pages.shape[1]
    row[OFFSET], row[PLACE] = offset.data_ptr(), place
    return row


def _whole(row: list[int], itemsize: int) -> bool:
    """Whether a kernel may read it 16 bytes at a time."""
    lengths = [row[PAGE_STRIDE], row[HEAD_STRIDE], row[TOKEN_STRIDE], row[SIZE]]
    return row[ENTRY_STRIDE] == 1 and row[ADDRESS] % 16 == 0 and all(n * itemsize % 16 == 0 for n in lengths)
