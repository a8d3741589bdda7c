"""Where vLLM's CPU attention puts a number, found by asking its own op.

The CPU backend sees a block of one head as one area of ``2 * N * D`` elements, keys first, and packs each half as its
instruction set likes it. Nothing here assumes how: known integers go through the engine's op into a scratch cache of
two blocks, and where each of them landed is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvroute.errors import UnsupportedLayoutError

CacheWriter = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], None]
"""The engine's op: keys ``[T, H, D]``, values ``[T, H, D]``, key cache ``[B, H, N, D]``, value cache, slots ``[T]``
int64, instruction set; it writes into the caches."""

_HINT = "Serve in float32 (--dtype float32), whose layout is plain, or on a GPU."


@dataclass(frozen=True, slots=True)
class PartStrides:
    """Keys or values within the area of one block and head: element (token, dim) lies at
    ``offset + token * token_stride + dim * dim_stride``. All in elements."""

    offset: int
    token_stride: int
    dim_stride: int


def find_area(
    write: CacheWriter,
    *,
    heads: int,
    tokens: int,
    size: int,
    dtype: torch.dtype,
    isa: str,
    stored: torch.dtype | None = None,
) -> tuple[PartStrides, PartStrides]:
    """Strides of keys and of values within the area of one block and head.

    Args:
        write: the engine's op.
        heads: KV heads of the layer, H.
        tokens: tokens a block, N.
        size: head size of keys and values, D.
        dtype: of the keys and values that the op takes.
        isa: the engine's name of the instruction set.
        stored: what the cache holds, where it is not ``dtype`` (a float8; the cache is then given as bytes).

    Raises:
        UnsupportedLayoutError: the numbers can't be found again, or no strides lead to them.
    """
    count = heads * tokens * size
    # small enough to be exact in the cache's dtype: 8 in float8_e5m2, 128 in bfloat16
    base = 128 if stored is None else 8
    ids = torch.arange(count).view(heads, tokens, size).transpose(0, 1)
    found = [torch.zeros(2 * 2 * count, dtype=torch.int64) for _ in range(2)]
    place = 1
    while True:
        digits = (ids // place % base).to(dtype)
        for part in range(2):
            digit = _round_trip(write, digits, part, tokens, isa, stored)
            found[part] += digit * place
        place *= base
        if place >= count:
            break
    # what was never written, or not by this part, holds -1 in every digit and so stays below zero
    return tuple(_fit(f, heads, tokens, size, isa, name) for f, name in zip(found, ("keys", "values"), strict=True))  # type: ignore[return-value]


def _round_trip(
    write: CacheWriter, digits: Tensor, part: int, tokens: int, isa: str, stored: torch.dtype | None
) -> Tensor:
    """The scratch cache as flat integers after the op wrote ``digits`` as one part into its second block; the rest
    of it, and the other part, is negative."""
    heads, size = digits.shape[1:]
    scratch = torch.full((2, heads, tokens, 2 * size), -1.0, dtype=stored or digits.dtype)
    raw = scratch if stored is None else scratch.view(torch.uint8)
    key_cache, value_cache = raw.view(2, heads, 2 * tokens, size).chunk(2, dim=2)  # as cpu_attn.py takes it apart
    other = torch.full_like(digits, -1.0)
    slots = torch.arange(tokens, 2 * tokens)
    key, value = (digits, other) if part == 0 else (other, digits)
    write(key.contiguous(), value.contiguous(), key_cache, value_cache, slots, isa)
    numbers = scratch.float()
    if not bool(torch.isfinite(numbers).all()) or bool((numbers != numbers.round()).any()):
        raise UnsupportedLayoutError(
            f"vLLM's CPU cache for {isa!r} does not hold the numbers that were written.", hint=_HINT
        )
    return numbers.flatten().to(torch.int64)


def _fit(found: Tensor, heads: int, tokens: int, size: int, isa: str, name: str) -> PartStrides:
    """Strides from where the ids landed: ``found [2 * H * 2 * N * D]``, an id or a negative number."""
    count, area = heads * tokens * size, 2 * tokens * size
    held = (found >= 0).nonzero().flatten()
    if held.numel() != count or not torch.equal(found[held].sort().values, torch.arange(count)):
        raise UnsupportedLayoutError(f"vLLM's CPU cache for {isa!r} does not hold each {name[:-1]} once.", hint=_HINT)
    where = torch.empty(count, dtype=torch.int64)
    where[found[held]] = held
    where = where.view(heads, tokens, size) - heads * area  # within the second block
    first = where[0, 0, 0]
    step_token = where[0, 1, 0] - first if tokens > 1 else torch.tensor(size)
    step_dim = where[0, 0, 1] - first if size > 1 else torch.tensor(1)
    expected = (
        first
        + torch.arange(heads)[:, None, None] * area
        + torch.arange(tokens)[:, None] * step_token
        + torch.arange(size) * step_dim
    )
    if not torch.equal(where, expected):
        raise UnsupportedLayoutError(
            f"vLLM packs the {name} of its CPU cache for {isa!r} in a way that no strides can follow.", hint=_HINT
        )
    return PartStrides(int(first), int(step_token), int(step_dim))
