"""Ops over a KV cache, paged or contiguous: the torch references.

Knows torch alone. :class:`KVView` is the picture of a cache, :func:`paged_pool` reduces it over
tokens, :func:`token_vectors` and :func:`chain_step` feed the chains.
"""

from __future__ import annotations

from kvroute_kernels.chain_step import ChainTensors, angle_between, chain_step, token_vectors
from kvroute_kernels.paged_pool import PooledSums, paged_pool
from kvroute_kernels.view import KVGroup, KVView, KVViewError, LayerKV, NonFiniteKVError, PageTable, WindowError

__all__ = [
    "ChainTensors",
    "KVGroup",
    "KVView",
    "KVViewError",
    "LayerKV",
    "NonFiniteKVError",
    "PageTable",
    "PooledSums",
    "WindowError",
    "angle_between",
    "chain_step",
    "paged_pool",
    "token_vectors",
]
