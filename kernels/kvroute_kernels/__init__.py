"""Ops over a KV cache, paged or contiguous, in torch and in Triton.

Knows torch alone; Triton is used where there is a GPU and triton is installed (:func:`choose`). :class:`KVView` is the
picture of a cache, :func:`paged_pool` reduces it over tokens, :func:`paged_chain_step` feeds the chains, and
:func:`difficulty_head` decides on pooled vectors. Each op is a torch reference beside a Triton twin of the same stem;
pooling and chains have a third one in C++ for a CPU, which is compiled where there is a compiler.
"""

from __future__ import annotations

from kvroute_kernels.chain_step import (
    ChainSteps,
    ChainTensors,
    angle_between,
    chain_step,
    feed_layers,
    paged_chain_step,
    token_vectors,
)
from kvroute_kernels.difficulty_head import Difficulties, MLPHead, difficulty_head
from kvroute_kernels.dispatch import Backend, KernelsUnavailableError, choose, explain, prepare
from kvroute_kernels.errors import KVViewError, NonFiniteKVError, WindowError
from kvroute_kernels.paged_pool import PooledSums, paged_pool
from kvroute_kernels.view import KVGroup, KVView, LayerKV, PageTable
from kvroute_kernels.workspace import Workspace

__all__ = [
    "Backend",
    "ChainSteps",
    "ChainTensors",
    "Difficulties",
    "KVGroup",
    "KVView",
    "KVViewError",
    "KernelsUnavailableError",
    "LayerKV",
    "MLPHead",
    "NonFiniteKVError",
    "PageTable",
    "PooledSums",
    "WindowError",
    "Workspace",
    "angle_between",
    "chain_step",
    "choose",
    "difficulty_head",
    "explain",
    "feed_layers",
    "paged_chain_step",
    "paged_pool",
    "prepare",
    "token_vectors",
]
