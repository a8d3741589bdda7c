"""Pages of keys and values over the engine's memory, and which of them belong to which request.

Block ids of the engine and :class:`LayerPages` become a :class:`KVView`.

Layers of one geometry that lie at equal distances in one allocation are stacked by strides, so that one operation
reads them all. Built once (:func:`stack_pages`); a step then only makes page tables, as long as what it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvroute.errors import InvalidInputError
from kvroute_kernels import KVView
from kvroute_kernels.view import KVGroup, PageTable

NULL_BLOCK = 0
"""The engine's block that stands for none, in groups that give up blocks outside their window."""


@dataclass(frozen=True, slots=True)
class LayerPages:
    """Keys and values of one layer by page, over the engine's own memory.

    Attributes:
        index: attention layer, from 0.
        name: the engine's name of it.
        keys: ``[P, H, N, D]``, any strides; P counts kernel blocks.
        values: ``[P, H, N, Dv]``.
        group: KV cache group of its block ids.
        window: tokens the layer attends to, or None for all.
        drops: the engine takes blocks back that left the window; block 0 then stands for a missing one.
        ratio: pages (kernel blocks) in a block that the engine hands out.
        scale_k: a stored key times this is the key; 1 unless float8.
        scale_v: the same of values.
        value_order: ``[Dv]`` int64, order in which the values' entries are read, or None for as they lie.
    """

    index: int
    name: str
    keys: Tensor
    values: Tensor
    group: int
    window: int | None = None
    drops: bool = False
    ratio: int = 1
    scale_k: float = 1.0
    scale_v: float = 1.0
    value_order: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page, N."""
        return int(self.keys.shape[2])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """KV heads of this rank, key size, value size."""
        return int(self.keys.shape[1]), int(self.keys.shape[3]), int(self.values.shape[3])

    @property
    def converted(self) -> bool:
        """Whether pages are converted before they are read, because strides don't lead to the numbers in their
        order."""
        return self.value_order is not None


@dataclass(frozen=True, slots=True)
class PageStack:
    """Layers read as one: ``keys [G, P, H, N, D]`` and ``values [G, P, H, N, Dv]`` over the engine's memory."""

    layers: tuple[LayerPages, ...]
    keys: Tensor
    values: Tensor

    @property
    def first(self) -> LayerPages:
        """Its first layer, which has the geometry, group and scales of all."""
        return self.layers[0]


def kernel_pages(block_ids: Sequence[int], ratio: int) -> list[int]:
    """Pages of the engine's blocks: block b is pages ``b * ratio .. b * ratio + ratio - 1``."""
    if ratio == 1:
        return list(block_ids)
    return [block * ratio + part for block in block_ids for part in range(ratio)]


def stack_pages(pages: Sequence[LayerPages]) -> tuple[PageStack, ...]:
    """Layers grouped as far as strides reach; every layer is in one stack, order is kept within it.

    Layers go together if they share block ids, window, scales and geometry, lie in the same allocation, and
    follow each other at one distance.
    """
    alike: dict[object, list[LayerPages]] = {}
    for page in sorted(pages, key=lambda p: p.index):
        alike.setdefault(_kind(page), []).append(page)
    stacks = []
    for layers in alike.values():
        start = 0
        while start < len(layers):
            stop = start + 1
            if stop < len(layers):
                step = _distance(layers[start], layers[stop])
                while step > 0 and stop < len(layers) and _distance(layers[stop - 1], layers[stop]) == step:
                    stop += 1
            run = layers[start:stop]
            stacks.append(PageStack(tuple(run), *(_stacked(run, part) for part in ("keys", "values"))))
            start = stop
    return tuple(sorted(stacks, key=lambda s: s.first.index))


def view_of(
    pages: Sequence[LayerPages] | Sequence[PageStack],
    block_ids: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    starts: Sequence[int] | None = None,
) -> KVView:
    """A view over some requests' keys and values.

    Args:
        pages: the layers to be read (all, or those a feature needs), or their stacks, which saves building them.
        block_ids: by request, by KV cache group, the engine's block ids from the request's first token on. In a group
            that drops blocks, block 0 is a missing one; tokens up to the last missing one are not held.
        lengths: by request, tokens whose keys and values are written.
        starts: by request, the first token that will be read (0 by default). Earlier pages are left out (asking for
            them raises WindowError), so a step costs what it reads. Reordered pages, which are converted here, are also
            bounded by it.

    Returns:
        the view. It reads the engine's memory, so it is good until the engine's next step.

    Raises:
        InvalidInputError: too few blocks for a request, a block that does not exist, a start outside the request.
    """
    stacks = [p if isinstance(p, PageStack) else None for p in pages]
    whole: Sequence[PageStack] = (
        [s for s in stacks if s is not None]
        if all(s is not None for s in stacks)
        else stack_pages([p for p in pages if isinstance(p, LayerPages)])
    )
    starts = [0] * len(lengths) if starts is None else starts
    if not len(block_ids) == len(lengths) == len(starts):
        raise InvalidInputError(f"{len(block_ids)} tables, {len(lengths)} lengths and {len(starts)} starts.")
    for start, length in zip(starts, lengths, strict=True):
        if not 0 <= start <= length:
            raise InvalidInputError(f"A request of {length} tokens can't be read from token {start}.")
    tables: dict[tuple[int, int, int, bool], PageTable] = {}
    groups = []
    for stack in whole:
        layer = stack.first
        kind = (layer.group, layer.page_size, layer.ratio, layer.drops)
        if kind not in tables:
            tables[kind] = _page_table(layer, block_ids, lengths, starts)
        indices = tuple(p.index for p in stack.layers)
        keys, values, table = stack.keys, stack.values, tables[kind]
        scales = (layer.scale_k, layer.scale_v)
        if layer.converted:
            keys, values, table = _convert(stack, table)
            scales = (1.0, 1.0)
        groups.append(KVGroup(indices, keys, values, table, layer.window, *scales))
    device = whole[0].keys.device if whole else torch.device("cpu")
    return KVView(groups, torch.tensor(list(lengths), dtype=torch.int64, device=device), list(lengths))


def _page_table(
    layer: LayerPages,
    block_ids: Sequence[Sequence[Sequence[int]]],
    lengths: Sequence[int],
    starts: Sequence[int],
) -> PageTable:
    """The table of one group's requests, from the page of each request's first token that is read."""
    size, ratio = layer.page_size, layer.ratio
    rows: list[list[int]] = []
    offset: list[int] = []
    first: list[int] = []
    for number, (by_group, length, start) in enumerate(zip(block_ids, lengths, starts, strict=True)):
        block = size * ratio
        low = start // block
        high = -(-length // block) if start < length else low
        if layer.group >= len(by_group) or len(by_group[layer.group]) < high:
            have = len(by_group[layer.group]) if layer.group < len(by_group) else 0
            raise InvalidInputError(
                f"Request {number} has {have} blocks in group {layer.group}, and its {length} tokens need {high}."
            )
        blocks = list(by_group[layer.group][low:high])
        if blocks and not 0 <= min(blocks) <= max(blocks) < layer.keys.shape[0] // ratio:
            raise InvalidInputError(
                f"Request {number} names a block that does not exist: {min(blocks)}..{max(blocks)}."
            )
        held = low * block
        if layer.drops:
            missing = [i for i, b in enumerate(blocks) if b == NULL_BLOCK]
            if missing:
                held = min((low + missing[-1] + 1) * block, length)
        columns = kernel_pages(blocks, ratio)
        if layer.drops:
            columns = [-1 if page < ratio else page for page in columns]  # block 0 is the pages 0..ratio-1
        rows.append(columns)
        offset.append(-low * block)
        first.append(held)
    width = max((len(r) for r in rows), default=0)
    device = layer.keys.device
    pages = np.full((len(rows), width), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        pages[number, : len(row)] = row
    # numpy is quicker than torch with so few numbers
    numbers = (pages, np.array(offset, dtype=np.int64), np.array(first, dtype=np.int64))
    host = (torch.from_numpy(numbers[0]), torch.from_numpy(numbers[1]), torch.from_numpy(numbers[2]))
    if device.type == "cpu":
        return PageTable(*host, host)
    there = [x.to(device, non_blocking=True) for x in host]
    return PageTable(there[0], there[1], there[2], host)


def _convert(stack: PageStack, table: PageTable) -> tuple[Tensor, Tensor, PageTable]:
    """The pages that a table names, as numbers: float8 times its scale in float32, rope keys in their order.

    Each page is converted once, however many requests share it; the table then counts the converted pages.
    """
    layer = stack.first
    used, place = torch.unique(table.pages, return_inverse=True)
    absent = int(used.numel() > 0 and int(used[0]) < 0)  # -1 sorts first
    used = used[absent:]
    parts = []
    for part, scale in ((stack.keys, layer.scale_k), (stack.values, layer.scale_v)):
        if part.dtype.itemsize == 1:  # indexing bytes works on every device; float8 does not
            parts.append(part.view(torch.uint8)[:, used].view(part.dtype).float() * scale)
        else:
            parts.append(part[:, used])
    keys, values = parts
    if layer.value_order is not None:
        values = values[..., layer.value_order]
    return keys, values, PageTable(place.view(table.pages.shape) - absent, table.offset, table.first)


def _kind(page: LayerPages) -> object:
    """What layers must share to be read as one."""
    order = None if page.value_order is None else tuple(page.value_order.tolist())
    geometry = tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.untyped_storage().data_ptr()) for t in (page.keys, page.values)
    )
    return (page.group, page.window, page.drops, page.ratio, page.scale_k, page.scale_v, order, geometry)


def _distance(a: LayerPages, b: LayerPages) -> int:
    """Elements from one layer's keys to the next one's; 0 if the values are at another distance."""
    keys, values = (
        getattr(b, part).storage_offset() - getattr(a, part).storage_offset() for part in ("keys", "values")
    )
    return int(keys) if keys == values else 0


def _stacked(run: Sequence[LayerPages], part: str) -> Tensor:
    first: Tensor = getattr(run[0], part)
    if len(run) == 1:
        return first[None]
    return first.as_strided(
        (len(run), *first.shape), (_distance(run[0], run[1]), *first.stride()), first.storage_offset()
    )
