"""A difficulty head's MLP and its threshold in Triton: the twin of the reference in ``difficulty_head.py``.

Maths: there. Grid: the first launch has a program for BLOCK_H hidden units of one request; it reads their rows of W1
in tiles ``[BLOCK_H, BLOCK_K]``, standardises the vector as it goes, and leaves one number, its units' share of the
output. The second has a program a request, which adds the shares in their order and compares. So difficulty and flag
are on the device, and what decides on them there waits for no host. Requests of different heads, of different sizes,
go in one call.

Memory: 4 bytes for every BLOCK_H hidden units of a request. Weights are read once a request; those of the same head
meet in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvroute_kernels.buffers import Buffers
from kvroute_kernels.difficulty_head import Difficulties, MLPHead
from kvroute_kernels.errors import KVViewError

BLOCK_H, BLOCK_K = 16, 256
"""Hidden units, and numbers of the vector, of a tile."""
BLOCK_SHARES = 64
WARPS = 4


@triton.jit(
    do_not_specialize=["blocks", "width"],
    do_not_specialize_on_alignment=["vectors", "heads", "requests", "shares"],
)
def difficulty_head_kernel(
    vectors,  # [requests, width] float32
    heads,  # [heads, 8] int64: addresses of mean, inverse, W1, b1, w2; dim, hidden, b2 (float32 bits)
    requests,  # [requests, 2] int64: head, threshold (float32 bits)
    shares,  # [requests, blocks] float32
    blocks,  # of BLOCK_H hidden units, of the largest head
    width,
    VECTOR: tl.constexpr,  # rows of W1 lie at multiples of 16 bytes
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    request = program // blocks
    block = program % blocks
    head = heads + tl.load(requests + request * 2) * 8
    mean = tl.load(head).to(tl.pointer_type(tl.float32))
    inverse = tl.load(head + 1).to(tl.pointer_type(tl.float32))
    matrix = tl.load(head + 2).to(tl.pointer_type(tl.float32))
    bias = tl.load(head + 3).to(tl.pointer_type(tl.float32))
    weight = tl.load(head + 4).to(tl.pointer_type(tl.float32))
    dim = tl.load(head + 5)
    hidden = tl.load(head + 6)
    if VECTOR:
        mean = tl.multiple_of(mean, 16)
        inverse = tl.multiple_of(inverse, 16)
        matrix = tl.multiple_of(matrix, 16)
        dim = tl.multiple_of(dim, 4)
    unit = block * BLOCK_H + tl.arange(0, BLOCK_H)
    real = unit < hidden
    sums = tl.zeros([BLOCK_H, BLOCK_K], tl.float32)
    for low in range(0, dim, BLOCK_K):
        number = low + tl.arange(0, BLOCK_K)
        inside = number < dim
        x = tl.load(vectors + request * width + number, mask=inside, other=0.0)
        x = tl.where(tl.abs(x) < float("inf"), x, float("nan"))  # also where a zero would hide it
        z = (x - tl.load(mean + number, mask=inside, other=0.0)) * tl.load(inverse + number, mask=inside, other=0.0)
        rows = tl.load(matrix + unit[:, None] * dim + number[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        sums += rows * z[None, :]
    before = tl.sum(sums, axis=1) + tl.load(bias + unit, mask=real, other=0.0)
    active = tl.where(before > 0.0, before, before * 0.0)  # NaN stays
    share = tl.sum(tl.where(real, active * tl.load(weight + unit, mask=real, other=0.0), 0.0), axis=0)
    tl.store(shares + program, share)


@triton.jit(
    do_not_specialize=["blocks"],
    do_not_specialize_on_alignment=["heads", "requests", "shares", "difficulty", "flags"],
)
def difficulty_head_join_kernel(
    heads,  # [heads, 8] int64
    requests,  # [requests, 2] int64
    shares,  # [requests, blocks] float32
    difficulty,  # [requests] float32
    flags,  # [requests] int8: 1 above the threshold, 0 not, -1 no difficulty
    blocks,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    head = heads + tl.load(requests + request * 2) * 8
    used = (tl.load(head + 6) + BLOCK_H - 1) // BLOCK_H
    sums = tl.zeros([BLOCK_S], tl.float32)
    for low in range(0, used, BLOCK_S):
        block = low + tl.arange(0, BLOCK_S)
        sums += tl.load(shares + request * blocks + block, mask=block < used, other=0.0)
    score = tl.sum(sums, axis=0) + tl.load(head + 7).to(tl.int32).to(tl.float32, bitcast=True)
    threshold = tl.load(requests + request * 2 + 1).to(tl.int32).to(tl.float32, bitcast=True)
    score = tl.where(score < 0.0, 0.0, tl.where(score > 1.0, 1.0, score)) * 100.0
    tl.store(difficulty + request, score)
    tl.store(flags + request, tl.where(score != score, -1, tl.where(score > threshold, 1, 0)).to(tl.int8))


def difficulty_head_triton(
    vectors: Tensor, heads: Sequence[MLPHead], which: Sequence[int], thresholds: Sequence[float]
) -> Difficulties:
    """:func:`~kvroute_kernels.difficulty_head` by the kernels. A step uses a :class:`HeadStack` that it keeps."""
    stack = HeadStack(heads, vectors.device)
    stack.stage(which, thresholds)
    stack.launch(vectors.float().contiguous())
    return stack.results()


class HeadStack:
    """Heads on one device, and the buffers of :func:`~kvroute_kernels.difficulty_head`. Nothing waits for the device,
    and where no buffer has to grow, :meth:`launch` allocates nothing.

    Args:
        heads: the heads; their tensors are taken to the device as float32 once.
        device: which.
    """

    def __init__(self, heads: Sequence[MLPHead], device: torch.device) -> None:
        if not heads:
            raise KVViewError("No head was given.")
        self.buffers = Buffers(device)
        self.dims = [head.dim for head in heads]
        self._blocks = max(-(-head.hidden // BLOCK_H) for head in heads)
        self._keep: list[Tensor] = []
        rows = []
        for head in heads:
            tensors = (head.mean, head.inverse, head.hidden_weight, head.hidden_bias, head.weight)
            held = [t.detach().to(device, torch.float32).contiguous() for t in tensors]
            self._keep.extend(held)
            bits = int(np.float32(head.bias).view(np.int32))
            rows.append([*(t.data_ptr() for t in held), head.dim, head.hidden, bits])
        self._vector = all(row[at] % 16 == 0 for row in rows for at in (0, 1, 2)) and all(d % 4 == 0 for d in self.dims)
        self.buffers.send("heads", np.array(rows, dtype=np.int64))
        self._count = 0
        self.launches = 0

    def stage(self, which: Sequence[int], thresholds: Sequence[float]) -> None:
        """Say which head reads which row, and the threshold of each."""
        bits = np.asarray(list(thresholds), dtype=np.float32).view(np.int32).astype(np.int64)
        self._count = len(which)
        self.buffers.send("requests", np.stack([np.asarray(list(which), dtype=np.int64), bits], axis=1))
        self.buffers.get("shares", self._count * self._blocks, torch.float32)
        self.buffers.get("difficulty", self._count, torch.float32)
        self.buffers.get("flags", self._count, torch.int8)

    def launch(self, vectors: Tensor) -> None:
        """Two launches for all requests: ``vectors`` is ``[requests, width]`` float32, rows in one piece."""
        if self._count == 0:
            return
        get = self.buffers.get
        heads, requests = get("heads", 0, torch.int64), get("requests", 0, torch.int64)
        shares = get("shares", 0, torch.float32)
        difficulty_head_kernel[(self._count * self._blocks,)](
            vectors,
            heads,
            requests,
            shares,
            self._blocks,
            vectors.stride(0),
            VECTOR=self._vector,
            BLOCK_H=BLOCK_H,
            BLOCK_K=BLOCK_K,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        difficulty_head_join_kernel[(self._count,)](
            heads,
            requests,
            shares,
            get("difficulty", 0, torch.float32),
            get("flags", 0, torch.int8),
            self._blocks,
            BLOCK_H=BLOCK_H,
            BLOCK_S=BLOCK_SHARES,
            num_warps=1,
            enable_fp_fusion=False,
        )
        self.launches += 2

    def results(self) -> Difficulties:
        """Of the last launch, in the buffers themselves: the next launch overwrites them."""
        get = self.buffers.get
        return Difficulties(
            get("difficulty", 0, torch.float32)[: self._count], get("flags", 0, torch.int8)[: self._count]
        )
