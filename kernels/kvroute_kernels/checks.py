"""What is asked of a view before it is read, checked for all sequences at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from kvroute_kernels.chain_step import ChainTensors
from kvroute_kernels.errors import KVViewError, WindowError
from kvroute_kernels.view import KVView

Ints = np.ndarray[Any, np.dtype[np.int64]]


def check_ranges(view: KVView, low: Ints, high: Ints, weights: Sequence[Tensor] | None = None) -> None:
    """That ranges lie in their sequences and weights fit them; reads nothing of the device.

    Raises:
        KVViewError: naming the first range that does not.
    """
    length = np.asarray(view.host_lengths, dtype=np.int64)
    if not len(low) == len(high) == len(length):
        raise KVViewError(f"{len(low)} starts and {len(high)} stops for {len(length)} sequences.")
    bad = (low < 0) | (low > high) | (high > length)
    if bad.any():
        b = int(bad.argmax())
        raise KVViewError(f"Tokens {low[b]}..{high[b]} were asked of sequence {b}, which has {length[b]}.")
    if weights is not None:
        if len(weights) != len(low):
            raise KVViewError(f"{len(weights)} rows of weights for {len(low)} sequences.")
        for b, w in enumerate(weights):
            if w.shape != (high[b] - low[b],):
                raise KVViewError(f"{list(w.shape)} weights for {high[b] - low[b]} tokens.")


def check_held(view: KVView, layers: Sequence[int], low: Ints, high: Ints) -> None:
    """That every token of the ranges has its page. Where the host has no copy of the page tables, it waits for them.

    Raises:
        WindowError: a token before the first that is held.
        KVViewError: a page is absent.
    """
    some = high > low
    if not some.any():
        return
    seen: set[tuple[int, int]] = set()
    for group in view.groups_of(layers):
        key = (id(group.table), group.page_size)
        if key in seen:
            continue
        seen.add(key)
        pages, offset, first = (x.numpy() for x in group.table.on_host())
        early = some & (low < first)
        if early.any():
            b = int(early.argmax())
            layer = min(set(layers) & set(group.layers))
            raise WindowError(layer, b, int(low[b]), int(first[b]))
        begin, end = (low + offset) // group.page_size, (high - 1 + offset) // group.page_size
        column = np.arange(pages.shape[1])
        wanted = (column >= begin[:, None]) & (column <= end[:, None]) & (pages < 0)
        absent = some & ((begin < 0) | (end >= pages.shape[1]) | wanted.any(axis=1))
        if absent.any():
            b = int(absent.argmax())
            raise KVViewError(f"A page of tokens {low[b]}..{high[b]} of sequence {b} is absent.")


def check_states(state: ChainTensors, rows: Sequence[int], sequences: int, size: int) -> None:
    """That each sequence has a chain of its own, and their vectors have one size.

    Raises:
        KVViewError: saying which does not.
    """
    if len(rows) != sequences or len(set(rows)) != len(rows):
        raise KVViewError(f"{sequences} sequences feed as many chains, each once, not the chains {list(rows)}.")
    if any(not 0 <= row < state.first.shape[0] for row in rows):
        raise KVViewError(f"There are {state.first.shape[0]} chains, and {list(rows)} were to be fed.")
    if state.first.shape[1] != size:
        raise KVViewError(f"The chain's vectors have {state.first.shape[1]} numbers, and these tokens make {size}.")
