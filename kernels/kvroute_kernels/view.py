"""One picture over a KV cache, whether it lies in pages or in one piece.

A cache is a set of *pages*; a page holds N tokens of one layer. A *page table* says, for every
sequence, which pages hold its tokens. vLLM's cache is that already; transformers' cache
``[B, H, T, D]`` is the same picture with one page of T tokens a sequence. So pooling and chains
are written once, over :class:`KVView`.

Layer indices count the layers that keep keys and values ("attention layers"), from 0.
Nothing here copies the cache; strides are free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

from kvroute_kernels.errors import KVViewError, NonFiniteKVError, WindowError


@dataclass(frozen=True, slots=True)
class PageTable:
    """Where the tokens of each sequence lie. Slot ``s`` of a sequence is row ``s % N`` of its page ``s // N``.

    Attributes:
        pages: ``[B, M]`` int64, page index of every column; -1 where there is none (absent).
        offset: ``[B]`` int64, slot of token 0: token t lies in slot ``t + offset``. Left padding makes it
            positive, a window that dropped its first tokens makes it negative.
        first: ``[B]`` int64, first token that is held; 0 unless the layers hold a window only.
        host: the same three in the host's memory, so that nothing waits for a GPU to look at them; None where they are
            not at hand.
    """

    pages: Tensor
    offset: Tensor
    first: Tensor
    host: tuple[Tensor, Tensor, Tensor] | None = None

    def on_host(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pages, offset and first in the host's memory; without :attr:`host` the host waits for them."""
        return (self.pages.cpu(), self.offset.cpu(), self.first.cpu()) if self.host is None else self.host

    def select(self, rows: Tensor) -> PageTable:
        """The table of some sequences."""
        host = self.host
        host = (host[0][rows], host[1][rows], host[2][rows]) if host is not None and rows.device.type == "cpu" else None
        device = self.pages.device
        index = rows.to(device)
        return PageTable(self.pages[index], self.offset[index], self.first[index], host)


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share one geometry, one stacked storage and one page table.

    Attributes:
        layers: the layer indices, ascending, G of them.
        keys: ``[G, P, H, N, D]``, keys after RoPE (layers, pages, KV heads, tokens a page, head size).
        values: ``[G, P, H, N, Dv]``.
        table: where each sequence's tokens lie.
        window: tokens that the layers attend to, or None for all.
        key_scale: a stored key times this is the key; 1 unless float8.
        value_scale: the same of values.
    """

    layers: tuple[int, ...]
    keys: Tensor
    values: Tensor
    table: PageTable
    window: int | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def page_size(self) -> int:
        """Tokens a page, N."""
        return int(self.keys.shape[3])


@dataclass(frozen=True, slots=True)
class LayerKV:
    """Keys and values of one layer, by page: ``keys [P, H, N, D]``, ``values [P, H, N, Dv]``."""

    index: int
    keys: Tensor
    values: Tensor
    table: PageTable
    window: int | None


class KVView:
    """Keys and values of B sequences in all attention layers, by sequence and token.

    Args:
        groups: the layers, grouped by geometry and storage; together they hold every index 0..L-1 or
            those of a run that stopped early.
        lengths: ``[B]`` int64, true tokens of each sequence (padding not counted).
        host_lengths: the same as a list, where they are at hand: else the host waits for them.

    Raises:
        KVViewError: shapes, dtypes or tables that do not fit together.
    """

    __slots__ = ("_by_layer", "groups", "host_lengths", "lengths")

    def __init__(self, groups: Sequence[KVGroup], lengths: Tensor, host_lengths: Sequence[int] | None = None) -> None:
        if lengths.ndim != 1 or lengths.dtype != torch.int64:
            raise KVViewError(f"lengths must be int64 [B], not {lengths.dtype} {list(lengths.shape)}.")
        by_layer: dict[int, tuple[KVGroup, int]] = {}
        batch = lengths.shape[0]
        for group in groups:
            keys, values, table = group.keys, group.values, group.table
            if keys.ndim != 5 or values.ndim != 5 or keys.shape[:4] != values.shape[:4]:
                raise KVViewError(
                    f"keys [G, P, H, N, D] and values [G, P, H, N, Dv] must agree but in the last size: "
                    f"{list(keys.shape)} and {list(values.shape)}."
                )
            if keys.shape[0] != len(group.layers):
                raise KVViewError(f"{len(group.layers)} layer indices for {keys.shape[0]} stacked layers.")
            if table.pages.ndim != 2 or table.pages.shape[0] != batch:
                raise KVViewError(f"The page table has {list(table.pages.shape)} entries for {batch} sequences.")
            if table.offset.shape != (batch,) or table.first.shape != (batch,):
                raise KVViewError("offset and first of a page table must be [B].")
            for place, layer in enumerate(group.layers):
                if layer in by_layer:
                    raise KVViewError(f"Layer {layer} appears twice.")
                by_layer[layer] = (group, place)
        self.groups = tuple(groups)
        self.lengths = lengths
        self.host_lengths: list[int] = lengths.tolist() if host_lengths is None else list(host_lengths)
        if len(self.host_lengths) != batch:
            raise KVViewError(f"{len(self.host_lengths)} lengths on the host for {batch} sequences.")
        self._by_layer = by_layer

    # ------------------------------------------------------------------ constructors

    @classmethod
    def from_contiguous(
        cls,
        keys: Sequence[Tensor] | Tensor,
        values: Sequence[Tensor] | Tensor,
        lengths: Tensor | Sequence[int],
        *,
        padding: Literal["left", "right"] = "right",
        windows: Sequence[int | None] | None = None,
        total: int | None = None,
    ) -> KVView:
        """A view over one piece a layer, as transformers keeps it.

        Args:
            keys: by layer ``[B, H, T, D]``, or stacked ``[L, B, H, T, D]``.
            values: by layer ``[B, H, T, Dv]``, or stacked.
            lengths: true tokens of each sequence.
            padding: on which side of a shorter sequence the padding lies.
            windows: by layer, the sliding window in tokens, or None where the layer attends to all.
            total: padded tokens computed so far, where a layer with a window holds fewer than that; by
                default the T of the layer that holds the most.
        """
        layer_keys = list(keys.unbind(0)) if isinstance(keys, Tensor) else list(keys)
        layer_values = list(values.unbind(0)) if isinstance(values, Tensor) else list(values)
        if not layer_keys or len(layer_keys) != len(layer_values):
            raise KVViewError(f"{len(layer_keys)} layers of keys and {len(layer_values)} of values.")
        windows = [None] * len(layer_keys) if windows is None else list(windows)
        if len(windows) != len(layer_keys):
            raise KVViewError(f"{len(windows)} windows for {len(layer_keys)} layers.")
        device = layer_keys[0].device
        length = torch.as_tensor(lengths, dtype=torch.int64, device=device)
        batch = int(layer_keys[0].shape[0])
        if length.shape != (batch,):
            raise KVViewError(f"{list(length.shape)} lengths for {batch} sequences.")
        for index, (k, v) in enumerate(zip(layer_keys, layer_values, strict=True)):
            if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[0] != batch:
                raise KVViewError(
                    f"Layer {index}: keys [B, H, T, D] and values [B, H, T, Dv] of {batch} sequences expected, not "
                    f"{list(k.shape)} and {list(v.shape)}."
                )
        longest = max(int(k.shape[2]) for k in layer_keys)
        total = longest if total is None else total
        if total < longest:
            raise KVViewError(f"A layer holds {longest} tokens, more than the {total} said to be computed.")
        if bool((length > total).any()) or bool((length < 0).any()):
            raise KVViewError(f"A length is negative or above the {total} tokens in the cache.")
        pages = torch.arange(batch, device=device)[:, None]
        start = total - length if padding == "left" else torch.zeros_like(length)
        stacked = isinstance(keys, Tensor) and isinstance(values, Tensor) and set(windows) == {None}
        groups = []
        if stacked:
            assert isinstance(keys, Tensor)
            assert isinstance(values, Tensor)
            table = PageTable(pages, start, torch.zeros_like(length))
            return cls([KVGroup(tuple(range(len(layer_keys))), keys, values, table)], length)
        tables: dict[int, PageTable] = {}
        for index, (k, v, window) in enumerate(zip(layer_keys, layer_values, windows, strict=True)):
            held = int(k.shape[2])
            if held not in tables:
                dropped = total - held
                first = (dropped - start).clamp_min(0)
                tables[held] = PageTable(pages, start - dropped, torch.minimum(first, length))
            groups.append(KVGroup((index,), k[None], v[None], tables[held], window))
        return cls(groups, length)

    @classmethod
    def from_pages(
        cls,
        keys: Sequence[Tensor] | Tensor,
        values: Sequence[Tensor] | Tensor,
        pages: Tensor,
        lengths: Tensor | Sequence[int],
        *,
        windows: Sequence[int | None] | None = None,
        first: Tensor | None = None,
    ) -> KVView:
        """A view over a paged cache, one page table for all layers.

        Args:
            keys: by layer ``[P, H, N, D]`` (any strides), or stacked ``[L, P, H, N, D]``.
            values: by layer ``[P, H, N, Dv]``, or stacked.
            pages: ``[B, M]`` page of every block of N tokens; -1 where it is absent.
            lengths: true tokens of each sequence.
            windows: by layer, the sliding window, or None.
            first: ``[B]`` first token held (for layers that dropped pages); 0 by default.
        """
        layer_keys = list(keys.unbind(0)) if isinstance(keys, Tensor) else list(keys)
        layer_values = list(values.unbind(0)) if isinstance(values, Tensor) else list(values)
        if not layer_keys or len(layer_keys) != len(layer_values):
            raise KVViewError(f"{len(layer_keys)} layers of keys and {len(layer_values)} of values.")
        windows = [None] * len(layer_keys) if windows is None else list(windows)
        if len(windows) != len(layer_keys):
            raise KVViewError(f"{len(windows)} windows for {len(layer_keys)} layers.")
        device = layer_keys[0].device
        length = torch.as_tensor(lengths, dtype=torch.int64, device=device)
        if length.ndim != 1 or pages.ndim != 2 or pages.shape[0] != length.shape[0]:
            raise KVViewError(f"pages must be [B, M] for {length.numel()} sequences, not {list(pages.shape)}.")
        if {(k.ndim, k.shape[0], k.shape[2]) for k in layer_keys} != {(4, *layer_keys[0].shape[0:3:2])}:
            raise KVViewError(
                f"Layers that share a page table share the number and the size of their pages: "
                f"{sorted({tuple(k.shape) for k in layer_keys})}."
            )
        page_size = int(layer_keys[0].shape[2])
        if bool((length > pages.shape[1] * page_size).any()) or bool((length < 0).any()):
            raise KVViewError("A length is negative, or a sequence is longer than its pages.")
        if bool((pages >= layer_keys[0].shape[0]).any()):
            raise KVViewError("The page table names a page that does not exist.")
        zeros = torch.zeros_like(length)
        table = PageTable(pages.to(device=device, dtype=torch.int64), zeros, zeros if first is None else first)
        if isinstance(keys, Tensor) and isinstance(values, Tensor) and len(set(windows)) == 1:
            return cls([KVGroup(tuple(range(len(layer_keys))), keys, values, table, windows[0])], length)
        groups = [
            KVGroup((i,), k[None], v[None], table, w)
            for i, (k, v, w) in enumerate(zip(layer_keys, layer_values, windows, strict=True))
        ]
        return cls(groups, length)

    # ------------------------------------------------------------------ reading

    @property
    def num_sequences(self) -> int:
        """Sequences in the view, B."""
        return len(self.host_lengths)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers in the view, ascending."""
        return tuple(sorted(self._by_layer))

    @property
    def dtype(self) -> torch.dtype:
        """The cache's dtype (that of its first group)."""
        return self.groups[0].keys.dtype

    def group_of(self, layer: int) -> tuple[KVGroup, int]:
        """The group that holds a layer, and the layer's place in it.

        Raises:
            KVViewError: the view has no such layer.
        """
        try:
            return self._by_layer[layer]
        except KeyError:
            raise KVViewError(f"The view has no layer {layer}; it has {self.layers}.") from None

    def groups_of(self, layers: Sequence[int]) -> list[KVGroup]:
        """The groups that hold any of the layers.

        Raises:
            KVViewError: the view has no such layer.
        """
        wanted = set(layers)
        if not wanted <= self._by_layer.keys():
            self.group_of(min(wanted - self._by_layer.keys()))
        return [group for group in self.groups if not wanted.isdisjoint(group.layers)]

    def layer(self, index: int) -> LayerKV:
        """Keys and values of one layer, by page."""
        group, place = self.group_of(index)
        return LayerKV(index, group.keys[place], group.values[place], group.table, group.window)

    def select_sequences(self, sequences: Sequence[int]) -> KVView:
        """The view of some sequences only; nothing of the cache is copied."""
        index = torch.tensor(list(sequences), dtype=torch.int64)
        tables: dict[int, PageTable] = {}
        groups = []
        for g in self.groups:
            if id(g.table) not in tables:
                tables[id(g.table)] = g.table.select(index)
            groups.append(replace(g, table=tables[id(g.table)]))
        return KVView(
            groups, self.lengths[index.to(self.lengths.device)], [self.host_lengths[i] for i in index.tolist()]
        )

    def split_layers(self, layers: Sequence[int]) -> list[tuple[KVGroup, list[int], list[int]]]:
        """The groups that hold ``layers``: (group, places in the group, places in ``layers``)."""
        parts: dict[int, tuple[KVGroup, list[int], list[int]]] = {}
        for rank, layer in enumerate(layers):
            group, place = self.group_of(layer)
            part = parts.setdefault(id(group), (group, [], []))
            part[1].append(place)
            part[2].append(rank)
        return list(parts.values())

    @overload
    def token_slices(self, group: KVGroup, sequence: int, start: int, stop: int) -> tuple[Tensor, Tensor]: ...
    @overload
    def token_slices(
        self, group: KVGroup, sequence: int, start: int, stop: int, *, part: Literal["k", "v", "kv"]
    ) -> tuple[Tensor | None, Tensor | None]: ...
    def token_slices(
        self, group: KVGroup, sequence: int, start: int, stop: int, *, part: Literal["k", "v", "kv"] = "kv"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys ``[G, H, n, D]`` and values ``[G, H, n, Dv]`` of tokens ``start..stop`` of one sequence.

        No copy where they lie in one page; a gather where they do not. Of what is not in ``part``, None.

        Raises:
            WindowError: a token before the window was asked for.
            KVViewError: the range is not in the sequence, or a page is absent.
        """
        length = self.host_lengths[sequence]
        if not 0 <= start <= stop <= length:
            raise KVViewError(f"Tokens {start}..{stop} were asked of sequence {sequence}, which has {length}.")
        keys = group.keys if "k" in part else None
        values = group.values if "v" in part else None
        if start == stop:
            return _each(lambda x: x.new_empty(x.shape[0], x.shape[2], 0, x.shape[4]), keys, values, group)
        table, size = group.table, group.page_size
        held = int(table.first[sequence])
        if start < held:
            raise WindowError(group.layers[0], sequence, start, held)
        offset = int(table.offset[sequence])
        low, high = start + offset, stop + offset
        if low // size == (high - 1) // size:
            page = int(table.pages[sequence, low // size])
            if page < 0:
                raise KVViewError(f"The page of token {start} of sequence {sequence} is absent.")
            row = low - (low // size) * size
            rows = slice(row, row + stop - start)
            return _each(lambda x: x[:, page, :, rows], keys, values, group)
        columns = table.pages[sequence, low // size : (high - 1) // size + 1]
        if bool((columns < 0).any()):
            raise KVViewError(f"A page of tokens {start}..{stop} of sequence {sequence} is absent.")
        row = low % size
        return _each(
            lambda x: x[:, columns].transpose(1, 2).flatten(2, 3)[:, :, row : row + stop - start], keys, values, group
        )

    def find_non_finite(self, layers: Sequence[int] | None = None) -> NonFiniteKVError | None:
        """The first NaN or infinity among the true tokens, or None. Reads the whole view."""
        for sequence, length in enumerate(self.host_lengths):
            for layer in self.layers if layers is None else layers:
                group, place = self.group_of(layer)
                first = int(group.table.first[sequence])
                for part, name in zip(
                    self.token_slices(group, sequence, first, length), ("keys", "values"), strict=True
                ):
                    bad = (~torch.isfinite(part[place])).any(dim=-1).any(dim=0).nonzero()
                    if bad.numel():
                        return NonFiniteKVError(sequence, layer, first + int(bad[0]), name)
        return None


def _each(
    work: Callable[[Tensor], Tensor], keys: Tensor | None, values: Tensor | None, group: KVGroup
) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if keys is None else read_numbers(keys, group.key_scale, work),
        None if values is None else read_numbers(values, group.value_scale, work),
    )


def read_numbers(cache: Tensor, scale: float, pick: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``pick`` takes of a cache: as it is stored, and of float8 the numbers in float32."""
    if cache.dtype.itemsize > 1:
        return pick(cache)
    return pick(cache.view(torch.uint8)).view(cache.dtype).float() * scale  # bytes can be indexed on every device
