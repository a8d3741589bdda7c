"""Sums of keys and values over a range of tokens, by sequence, layer and head.

Maths: ``S[b, l, h, :] = sum_{t = start_b}^{stop_b - 1} w_{b,t} X[l, b, h, t, :]`` for X = keys and
values, w = 1 unless given. Sums are taken in float32 (float64 for a float64 cache) whatever the
cache's dtype, in an order that the number of tokens alone decides. A sequence's sum depends on its own
tokens alone: padding is never read, and the result has the same bits in every batch and every layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvroute_kernels.dispatch import Backend, run
from kvroute_kernels.errors import KVViewError
from kvroute_kernels.ordered_sum import ordered_sum
from kvroute_kernels.view import KVGroup, KVView
from kvroute_kernels.workspace import Workspace


@dataclass(frozen=True, slots=True)
class PooledSums:
    """Sums over tokens, in float32 or float64.

    Attributes:
        keys: ``[B, n_layers, H, D]``, or None if only values were asked for.
        values: ``[B, n_layers, H, Dv]``, or None if only keys were asked for.
        weight: ``[B]``, sum of the weights (the number of tokens, unweighted).
    """

    keys: Tensor | None
    values: Tensor | None
    weight: Tensor


def paged_pool(
    view: KVView,
    *,
    layers: Sequence[int] | None = None,
    start: Sequence[int] | None = None,
    stop: Sequence[int] | None = None,
    part: Literal["k", "v", "kv"] = "kv",
    weights: Sequence[Tensor] | None = None,
    backend: Backend | None = None,
    workspace: Workspace | None = None,
) -> PooledSums:
    """Sum keys and values over tokens ``start..stop`` of every sequence.

    Args:
        view: the cache.
        layers: which layers, in which order; all by default. They must share H, D and Dv.
        start: first token of each sequence; 0 by default.
        stop: one past the last; the sequence's length by default.
        part: which of keys and values.
        weights: by sequence ``[stop - start]``, a weight for every token of the range.
        backend: see :func:`kvroute_kernels.choose`.
        workspace: buffers to use again; then the sums may lie in them until the next call.

    Returns:
        the sums. An empty range sums to zero with weight 0.

    Raises:
        KVViewError: layers of different sizes, a range outside the sequence, an absent page.
        WindowError: tokens a windowed layer holds no more.
    """
    chosen = list(view.layers if layers is None else layers)
    low = [0] * view.num_sequences if start is None else list(start)
    high = view.host_lengths if stop is None else list(stop)

    def triton() -> PooledSums:
        from kvroute_kernels.paged_pool_triton import paged_pool_triton

        return paged_pool_triton(view, chosen, low, high, part, weights, workspace)

    def native() -> PooledSums | None:
        from kvroute_kernels.native_library import can_read
        from kvroute_kernels.paged_pool_native import paged_pool_native

        return paged_pool_native(view, chosen, low, high, part, weights, workspace) if can_read(view, chosen) else None

    def torch_() -> PooledSums:
        return paged_pool_reference(view, chosen, low, high, part, weights)

    return run("paged_pool", view.lengths.device, view.dtype, backend, triton=triton, native=native, torch_=torch_)


def paged_pool_reference(
    view: KVView,
    chosen: list[int],
    low: list[int],
    high: list[int],
    part: Literal["k", "v", "kv"],
    weights: Sequence[Tensor] | None,
) -> PooledSums:
    """:func:`paged_pool` in plain torch."""
    count = view.num_sequences
    device = view.lengths.device
    split = view.split_layers(chosen)
    accumulate = torch.float64 if view.dtype == torch.float64 else torch.float32
    sums: list[Tensor | None] = []
    for is_values, letter in enumerate("kv"):
        if letter not in part:
            sums.append(None)
            continue
        shapes = {(g.values if is_values else g.keys).shape[2::2] for g, _, _ in split}
        if len(shapes) != 1:
            raise KVViewError(f"Layers {chosen} differ in heads or head size ({sorted(shapes)}): pool them apart.")
        heads, size = shapes.pop()
        sums.append(torch.empty(count, len(chosen), heads, size, dtype=accumulate, device=device))
    for spread, spots, ranks in split:
        group, places = _narrowed(spread, spots)
        whole = len(places) == len(group.layers) and places == list(range(len(places)))
        for b in range(count):
            pieces = view.token_slices(group, b, low[b], high[b], part=part)
            for piece, out in zip(pieces, sums, strict=True):
                if out is None or piece is None:
                    continue
                rows = piece if whole else piece[places]
                total = _sum_tokens(rows, None if weights is None else weights[b], accumulate)
                if whole and len(split) == 1 and ranks == places:
                    out[b] = total
                else:
                    out[b, ranks] = total
    if weights is None:
        weight = torch.tensor([h - lo for h, lo in zip(high, low, strict=True)], dtype=accumulate, device=device)
    else:
        weight = torch.stack([w.sum(dtype=accumulate) for w in weights]).to(device)
    return PooledSums(sums[0], sums[1], weight)


def _narrowed(group: KVGroup, places: list[int]) -> tuple[KVGroup, list[int]]:
    """The layers between the first and the last of some places, and the places in them: pages that are gathered are
    copied, so layers that nobody reads are left out before."""
    low, high = min(places), max(places) + 1
    if high - low == len(group.layers):
        return group, places
    layers = slice(low, high)
    some = replace(group, layers=group.layers[layers], keys=group.keys[layers], values=group.values[layers])
    return some, [place - low for place in places]


def _sum_tokens(rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``[G, H, n, D]`` -> ``[G, H, D]``, accumulated in ``dtype``."""
    if weights is None:
        return ordered_sum(rows, 2, dtype)
    if weights.shape != (rows.shape[2],):
        raise KVViewError(f"{list(weights.shape)} weights for {rows.shape[2]} tokens.")
    scaled = rows.to(dtype) * weights.to(dtype=dtype, device=rows.device)[:, None]
    return ordered_sum(scaled, 2, dtype)
