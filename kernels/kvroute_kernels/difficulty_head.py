"""A difficulty head's MLP, and whether its difficulty lies above a threshold: the torch reference.

Maths: with ``z = (x - mean) * inverse``, ``s = clip(w2 . relu(W1 z + b1) + b2, 0, 1)``; the difficulty is ``100 s``,
and the flag is ``difficulty > threshold`` (arXiv 2601.20326, section 4.2). Each request is computed alone, whatever
stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvroute_kernels.dispatch import Backend, run
from kvroute_kernels.errors import KVViewError

SLOW, FAST, UNREAD = 1, 0, -1
"""Flags: above the threshold; not above it; the vector holds NaN or infinity, so there is no difficulty."""


@dataclass(frozen=True, slots=True)
class MLPHead:
    """Linear -> ReLU -> Linear on a standardised vector.

    Attributes:
        mean: ``[dim]`` float32.
        inverse: ``[dim]`` float32, one over the standard deviation; 0 where a number does not vary.
        hidden_weight: ``[hidden, dim]`` float32.
        hidden_bias: ``[hidden]`` float32.
        weight: ``[hidden]`` float32.
        bias: the output unit's.
    """

    mean: Tensor
    inverse: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    weight: Tensor
    bias: float

    @property
    def dim(self) -> int:
        """Size of the vectors it takes."""
        return int(self.mean.shape[0])

    @property
    def hidden(self) -> int:
        """Hidden units."""
        return int(self.weight.shape[0])


@dataclass(frozen=True, slots=True)
class Difficulties:
    """What heads say of R requests.

    Attributes:
        difficulty: ``[R]`` float32 in [0, 100], higher is harder; NaN where the vector is not finite.
        flags: ``[R]`` int8: SLOW, FAST or UNREAD.
    """

    difficulty: Tensor
    flags: Tensor


def difficulty_head(
    vectors: Tensor,
    heads: Sequence[MLPHead],
    which: Sequence[int],
    thresholds: Sequence[float],
    *,
    backend: Backend | None = None,
) -> Difficulties:
    """Difficulties of R requests and whether each lies above its threshold, on the vectors' device.

    Args:
        vectors: ``[R, width]``, pooled vectors, each at the beginning of its row.
        heads: on the same device; they may differ in their sizes.
        which: R indices, the head of each request.
        thresholds: R difficulties in [0, 100]; above it is slow.
        backend: see :func:`kvroute_kernels.choose`.

    Raises:
        KVViewError: the arguments don't fit each other.
    """
    if vectors.ndim != 2 or not vectors.shape[0] == len(which) == len(thresholds):
        raise KVViewError(f"{list(vectors.shape)} vectors, {len(which)} heads and {len(thresholds)} thresholds.")
    for index in which:
        if not 0 <= index < len(heads):
            raise KVViewError(f"There are {len(heads)} heads, and number {index} was asked for.")
        if heads[index].dim > vectors.shape[1]:
            raise KVViewError(f"Head {index} takes {heads[index].dim} numbers, and a row has {vectors.shape[1]}.")

    def triton() -> Difficulties:
        from kvroute_kernels.difficulty_head_triton import difficulty_head_triton

        return difficulty_head_triton(vectors, heads, which, thresholds)

    def torch_() -> Difficulties:
        return difficulty_head_reference(vectors, heads, which, thresholds)

    return run("difficulty_head", vectors.device, torch.float32, backend, triton=triton, torch_=torch_)


def difficulty_head_reference(
    vectors: Tensor, heads: Sequence[MLPHead], which: Sequence[int], thresholds: Sequence[float]
) -> Difficulties:
    """:func:`difficulty_head` in plain torch."""
    rows = []
    for vector, index in zip(vectors, which, strict=True):
        head = heads[index]
        z = (vector[: head.dim].float() - head.mean) * head.inverse
        hidden = torch.relu(head.hidden_weight @ z + head.hidden_bias)
        score = (hidden @ head.weight + head.bias).clamp(0.0, 1.0)
        rows.append(torch.where(torch.isfinite(vector[: head.dim]).all(), score * 100.0, torch.nan))
    difficulty = torch.stack(rows) if rows else vectors.new_zeros(0)
    above = difficulty > torch.tensor(list(thresholds), dtype=torch.float32, device=difficulty.device)
    flags = torch.where(torch.isnan(difficulty), UNREAD, above.to(torch.int8)).to(torch.int8)
    return Difficulties(difficulty, flags)
