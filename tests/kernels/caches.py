"""Caches for the kernels' tests: any layout, dtype and page size, with NaN wherever nobody may read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from kvroute_kernels import KVGroup, KVView, PageTable

LAYOUTS = ("heads first", "tokens first", "transposed keys", "with gaps", "keys beside values")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def pages_of(
    shape: tuple[int, int, int, int, int], value_size: int, layout: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys ``[L, P, H, N, D]`` and values, full of NaN, with the strides of a layout."""
    L, P, H, N, D = shape

    def full(*sizes: int) -> torch.Tensor:
        return torch.full(sizes, float("nan"), dtype=torch.float32).to(dtype)

    if layout == "keys beside values":  # vLLM on a GPU, content last
        both = full(L, P, N, H, D + value_size).transpose(2, 3)
        return both[..., :D], both[..., D:]
    if layout == "tokens first":
        return full(L, P, N, H, D).transpose(2, 3), full(L, P, N, H, value_size).transpose(2, 3)
    if layout == "transposed keys":  # vLLM on a CPU
        return full(L, P, H, D, N).transpose(3, 4), full(L, P, H, N, value_size)
    if layout == "with gaps":
        return tuple(full(L, P, H, N, 2 * size + 1)[..., ::2][..., :size] for size in (D, value_size))  # type: ignore[return-value]
    return full(*shape), full(L, P, H, N, value_size)


def stored(x: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes, where a dtype can't be indexed."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def random_view(
    lengths: list[int],
    *,
    layers: int = 2,
    heads: int = 2,
    size: int = 8,
    value_size: int | None = None,
    page: int = 16,
    layout: str = "heads first",
    dtype: torch.dtype = torch.float32,
    scales: tuple[float, float] = (1.0, 1.0),
    seed: int = 0,
    shift: int = 0,
) -> KVView:
    """Sequences in shuffled pages. ``shift``: token 0 lies in that slot, as behind left padding."""
    g = torch.Generator().manual_seed(seed)
    value_size = size if value_size is None else value_size
    counts = [-(-(n + shift) // page) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=g).tolist()
    table = torch.full((len(lengths), max(*counts, 1) + 1), -1, dtype=torch.int64)
    g = torch.Generator().manual_seed(seed + 1)  # the same numbers wherever they lie
    parts = pages_of((layers, len(order), heads, page, size), value_size, layout, dtype)
    for b, length in enumerate(lengths):
        for column in range(counts[b]):
            table[b, column] = order.pop()
        for part in parts:
            numbers = torch.randn(layers, heads, length, part.shape[-1], generator=g).to(dtype)
            for t in range(length):
                slot = t + shift
                stored(part)[:, table[b, slot // page], :, slot % page] = stored(numbers)[:, :, t]
    device = torch.zeros(len(lengths), dtype=torch.int64)
    pages = PageTable(table, device + shift, device.clone())
    group = KVGroup(tuple(range(layers)), *parts, pages, None, *scales)
    return KVView([group], torch.tensor(lengths, dtype=torch.int64))


def exact_sums(view: KVView, layers: list[int], low: list[int], high: list[int], weights=None):
    """float64 sums of keys and of values, and of their absolute values, from the view's own tokens."""
    found = []
    for b, (lo, hi) in enumerate(zip(low, high, strict=True)):
        w = torch.ones(hi - lo, dtype=torch.float64) if weights is None else weights[b].double()
        parts = []
        for layer in layers:
            group, place = view.group_of(layer)
            k, v = view.token_slices(group, b, lo, hi)
            parts.append(
                [torch.einsum("htd,t->hd", f(x[place].double()), f(w)) for x in (k, v) for f in (_same, torch.abs)]
            )
        found.append(parts)
    return [torch.stack([torch.stack([layer[i] for layer in row]) for row in found]) for i in range(4)]


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@contextlib.contextmanager
def recorded(fake: bool = False) -> Iterator[list[tuple[np.ndarray, int]]]:
    """Addresses of every number that a kernel loads, with its size in bytes. ``fake``: what lies beyond the process's
    memory is not touched; a load of a float gives 0."""
    from triton.runtime import interpreter

    real = interpreter.InterpreterBuilder.create_masked_load
    seen: list[tuple[np.ndarray, int]] = []

    def load(self, ptrs, mask, other, *rest):
        dtype = ptrs.get_element_ty()
        touched = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        seen.append((ptrs.data[touched].copy(), dtype.primitive_bitwidth // 8))
        if fake and dtype.is_floating():
            return interpreter.TensorHandle(np.zeros(ptrs.data.shape, interpreter._get_np_dtype(dtype)), dtype)
        return real(self, ptrs, mask, other, *rest)

    interpreter.InterpreterBuilder.create_masked_load = load
    try:
        yield seen
    finally:
        interpreter.InterpreterBuilder.create_masked_load = real


def bytes_within(seen: list[tuple[np.ndarray, int]], tensors: list[torch.Tensor]) -> list[int]:
    """Every byte that was loaded out of the tensors' memory, as often as it was."""
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
    found: list[int] = []
    for addresses, width in seen:
        for low, size in dict.fromkeys(spans):
            inside = addresses[(addresses >= low) & (addresses < low + size)]
            for byte in range(width):
                found.extend((inside + byte).tolist())
    return found
