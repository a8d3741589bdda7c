"""Where a cache lies, as numbers that a kernel reads: one row of int64 for the keys or the values of one layer.

A kernel gets addresses and strides from a table in memory, not as arguments. So one launch reads layers of any
number of allocations, and neither a stride nor a length can ask for another compilation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels.errors import KVViewError
from kvroute_kernels.view import KVGroup, KVView

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


@dataclass(frozen=True, slots=True)
class _Lasting:
    """Planes without their page tables, which alone change from step to step.

    Attributes:
        planes: with zeros where the tables would be.
        spans: by run of planes that share a group, its place in the view and the planes.
    """

    planes: Planes
    spans: list[tuple[int, slice]]


class KnownPlanes:
    """Planes of caches that were seen before, so that a step fills in its page tables alone."""

    def __init__(self) -> None:
        self._seen: dict[object, _Lasting] = {}

    def lasting(self, view: KVView, layers: Sequence[int], part: str) -> _Lasting:
        """The lasting half of :func:`planes_of`."""
        caches = tuple((id(g.keys), id(g.values), g.layers, g.key_scale, g.value_scale) for g in view.groups)
        key = (part, tuple(layers), caches)  # tensors that are kept keep their ids
        if key not in self._seen:
            if len(self._seen) >= _MOST_KNOWN:
                self._seen.clear()
            self._seen[key] = _lasting_of(view, layers, part)
        return self._seen[key]


_MOST_KNOWN = 64


def planes_of(view: KVView, layers: Sequence[int], part: str, known: KnownPlanes | None = None) -> Planes:
    """The planes of some layers of a view, keys of all layers before values.

    Args:
        view: the cache.
        layers: which.
        part: "k", "v" or "kv".
        known: remembers what does not change from call to call.

    Raises:
        KVViewError: layers that differ in heads, head size or dtype.
    """
    lasting = _lasting_of(view, layers, part) if known is None else known.lasting(view, layers, part)
    rows = lasting.planes.rows.copy()
    keep: list[Tensor] = []
    for place, span in lasting.spans:
        table = view.groups[place].table
        pages, offset = table.pages.contiguous(), table.offset.contiguous()
        columns = pages.shape[1]
        rows[span, TABLE : OFFSET + 1] = (pages.data_ptr(), columns, columns, offset.data_ptr())
        keep += [pages, offset]
    return replace(lasting.planes, rows=rows, keep=(*lasting.planes.keep, *keep))


def _lasting_of(view: KVView, layers: Sequence[int], part: str) -> _Lasting:
    found = [view.group_of(layer) for layer in layers]
    where = {id(group): place for place, group in enumerate(view.groups)}
    runs = [list(run) for _, run in itertools.groupby(found, key=lambda x: id(x[0]))]
    parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    scales: list[float] = []
    keep: list[Tensor] = []
    spans: list[tuple[int, slice]] = []
    vector, place = True, 0
    shapes, dtypes, sizes = set(), set(), [0, 0]
    for which, letter in enumerate("kv"):
        if letter not in part:
            continue
        for run in runs:  # layers of one group differ in their address and their place alone
            group = run[0][0]
            tensor = group.values if which else group.keys
            numbers = np.tile(np.array(_row(tensor, group), dtype=np.int64), (len(run), 1))
            width = tensor.shape[2] * tensor.shape[4]
            at = np.array([at for _, at in run], dtype=np.int64)
            numbers[:, ADDRESS] += at * (tensor.stride(0) * tensor.element_size())
            numbers[:, PLACE] = place + width * np.arange(len(run))
            spans.append((where[id(group)], slice(len(scales), len(scales) + len(run))))
            parts.append(numbers)
            scales += [group.value_scale if which else group.key_scale] * len(run)
            keep.append(tensor)
            vector = vector and _whole(numbers[0].tolist(), tensor.element_size())
            vector = vector and not (numbers[:, ADDRESS] % 16).any()
            place += width * len(run)
            sizes[which] = tensor.shape[4]
            shapes.add((letter, tensor.shape[2], tensor.shape[4]))
            dtypes.add(tensor.dtype)
    if len({letter for letter, *_ in shapes}) != len(shapes) or len({heads for _, heads, _ in shapes}) > 1:
        wanted = sorted(shape[1:] for shape in shapes)
        raise KVViewError(f"Layers {list(layers)} differ in heads or head size ({wanted}): pool them apart.")
    if len(dtypes) > 1:
        raise KVViewError(f"Layers {list(layers)} differ in dtype ({sorted(map(str, dtypes))}): pool them apart.")
    planes = Planes(
        rows=np.concatenate(parts) if parts else np.empty((0, FIELDS), dtype=np.int64),
        scales=np.array(scales, dtype=np.float32),
        dtype=dtypes.pop() if dtypes else view.dtype,
        heads=next(iter(shapes))[1] if shapes else 0,
        sizes=(sizes[0], sizes[1]),
        layers=len(layers),
        vector=vector,
        keep=tuple(keep),
    )
    return _Lasting(planes, spans)


def _row(tensor: Tensor, group: KVGroup) -> list[int]:
    """Of the first layer of a group."""
    row = [0] * FIELDS
    row[ADDRESS] = tensor.data_ptr()
    row[PAGE_STRIDE : ENTRY_STRIDE + 1] = tensor.stride()[1:]
    row[SIZE], row[PAGE_SIZE], row[PAGES] = tensor.shape[4], group.page_size, tensor.shape[1]
    return row


def _whole(row: list[int], itemsize: int) -> bool:
    """Whether a kernel may read it 16 bytes at a time."""
    lengths = [row[PAGE_STRIDE], row[HEAD_STRIDE], row[TOKEN_STRIDE], row[SIZE]]
    return row[ENTRY_STRIDE] == 1 and row[ADDRESS] % 16 == 0 and all(n * itemsize % 16 == 0 for n in lengths)
