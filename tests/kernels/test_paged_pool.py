"""paged_pool: pages equal one piece bit for bit, whatever the layout; sums equal float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute_kernels import KVView, KVViewError, WindowError, paged_pool, token_vectors
from kvroute_kernels.ordered_sum import ordered_sum

LAYOUTS = ("heads first", "tokens first", "transposed keys", "with gaps")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def empty_pages(shape: tuple[int, ...], layout: str, dtype: torch.dtype, *, keys: bool) -> torch.Tensor:
    """``[L, P, H, N, D]`` full of NaN, with the strides of a layout."""
    L, P, H, N, D = shape
    full = {"fill_value": float("nan"), "dtype": dtype}
    if layout == "tokens first":  # vLLM on GPU: [P, N, H, D]
        return torch.full((L, P, N, H, D), **full).transpose(2, 3)
    if layout == "transposed keys" and keys:  # vLLM on CPU: [P, H, D, N]
        return torch.full((L, P, H, D, N), **full).transpose(3, 4)
    if layout == "with gaps":
        return torch.full((L, P, H, N, 2 * D + 1), **full)[..., ::2][..., :D]
    return torch.full(shape, **full)


def page_out(keys: torch.Tensor, values: torch.Tensor, lengths: list[int], size: int, layout: str, seed: int) -> KVView:
    """The contiguous cache ``[L, B, H, T, D]`` as shuffled pages; unused slots hold NaN, unused columns -1."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // size) for n in lengths]
    columns = max(*counts, 1) + 1
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    table = torch.full((len(lengths), columns), -1, dtype=torch.int64)
    L, _, H, _, D = keys.shape
    paged_k = empty_pages((L, len(order), H, size, D), layout, keys.dtype, keys=True)
    paged_v = empty_pages((L, len(order), H, size, values.shape[-1]), layout, keys.dtype, keys=False)
    for b, length in enumerate(lengths):
        for column in range(counts[b]):
            page = table[b, column] = order.pop()
            low, high = column * size, min((column + 1) * size, length)
            paged_k[:, page, :, : high - low] = keys[:, b, :, low:high]
            paged_v[:, page, :, : high - low] = values[:, b, :, low:high]
    return KVView.from_pages(paged_k, paged_v, table, lengths)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    layers=st.integers(1, 4),
    heads=st.integers(1, 5),
    size=st.integers(1, 19),
    extra=st.integers(0, 3),
    page=st.sampled_from([1, 16, 32, 128]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pages_equal_one_piece_bit_for_bit(
    lengths: list[int],
    layers: int,
    heads: int,
    size: int,
    extra: int,
    page: int,
    layout: str,
    dtype: torch.dtype,
    weighted: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = max(*lengths, 1)
    keys = torch.randn(layers, len(lengths), heads, longest, size, generator=generator).to(dtype)
    values = torch.randn(layers, len(lengths), heads, longest, size + extra, generator=generator).to(dtype)
    weights = [torch.rand(n, generator=generator) for n in lengths] if weighted else None
    whole = paged_pool(KVView.from_contiguous(keys, values, lengths), weights=weights)
    paged_view = page_out(keys, values, lengths, page, layout, seed)
    paged = paged_pool(paged_view, weights=weights)
    for a, b in ((whole.keys, paged.keys), (whole.values, paged.values), (whole.weight, paged.weight)):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    assert whole.keys is not None
    assert whole.keys.dtype == accumulate
    for b, n in enumerate(lengths):
        w = np.ones(n) if weights is None else weights[b].double().numpy()
        wanted = np.einsum("lhtd,t->lhd", keys[:, b, :, :n].double().numpy(), w)
        scale = np.einsum("lhtd,t->lhd", keys[:, b, :, :n].abs().double().numpy(), w)
        assert np.all(np.abs(whole.keys[b].double().numpy() - wanted) <= 1e-5 * scale + 1e-30)
        assert torch.equal(
            token_vectors(paged_view, b, 0, n), token_vectors(KVView.from_contiguous(keys, values, lengths), b, 0, n)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_side_and_batch_do_not_change_a_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [17, 1, 40, 23, 40]
    keys = torch.full((3, 5, 2, 40, 7), float("nan"), dtype=dtype)
    left_keys = keys.clone()
    for b, n in enumerate(lengths):
        keys[:, b, :, :n] = torch.randn(3, 2, n, 7, generator=generator).to(dtype)
        left_keys[:, b, :, 40 - n :] = keys[:, b, :, :n]
    right = paged_pool(KVView.from_contiguous(keys, keys, lengths)).keys
    left = paged_pool(KVView.from_contiguous(left_keys, left_keys, lengths, padding="left")).keys
    layerwise = paged_pool(KVView.from_contiguous(list(keys), list(keys), lengths)).keys
    assert right is not None
    assert torch.isfinite(right).all()
    assert torch.equal(right, left)
    assert torch.equal(right, layerwise)
    for b, n in enumerate(lengths):
        alone = keys[:, b : b + 1, :, :n]
        assert torch.equal(right[b], paged_pool(KVView.from_contiguous(alone, alone, [n])).keys[0])


def test_ranges_parts_and_layer_order() -> None:
    keys, values = torch.randn(4, 2, 2, 9, 3), torch.randn(4, 2, 2, 9, 5)
    view = KVView.from_contiguous(keys, values, [9, 6])
    sums = paged_pool(view, layers=[3, 0], start=[2, 6], stop=[5, 6], part="v")
    assert sums.keys is None
    assert sums.values is not None
    assert sums.values.shape == (2, 2, 2, 5)
    torch.testing.assert_close(sums.values[0, 0], values[3, 0, :, 2:5].sum(dim=1))
    torch.testing.assert_close(sums.values[0, 1], values[0, 0, :, 2:5].sum(dim=1))
    assert not sums.values[1].any()  # an empty range
    assert sums.weight.tolist() == [3, 0]
    only_keys = paged_pool(view, part="k")
    assert only_keys.values is None
    assert only_keys.keys is not None


def test_bfloat16_is_summed_in_float32() -> None:
    ones = torch.ones(1, 1, 1, 1000, 2, dtype=torch.bfloat16)  # a bfloat16 sum of ones sticks at 256
    sums = paged_pool(KVView.from_contiguous(ones, ones, [1000]))
    assert sums.keys is not None
    assert sums.keys.flatten().tolist() == [1000, 1000]


def test_layers_of_several_groups_come_in_the_order_asked() -> None:
    keys = torch.randn(4, 2, 2, 9, 3)
    whole = paged_pool(KVView.from_contiguous(keys, keys, [9, 6]), layers=[2, 1, 3]).keys
    split = KVView.from_contiguous(list(keys), list(keys), [9, 6], windows=[None, 4, None, 4])
    assert whole is not None
    assert torch.equal(whole, paged_pool(split, layers=[2, 1, 3]).keys)
    assert torch.equal(
        token_vectors(split, 0, 2, 7, [2, 1, 3]),
        token_vectors(KVView.from_contiguous(keys, keys, [9, 6]), 0, 2, 7, [2, 1, 3]),
    )


def test_windows_and_sizes_that_can_not_be_pooled_are_refused() -> None:
    keys = torch.randn(1, 2, 9, 3)
    view = KVView.from_contiguous([keys, keys[:, :, -3:]], [keys, keys[:, :, -3:]], [9], windows=[None, 4])
    with pytest.raises(WindowError):
        paged_pool(view)
    assert paged_pool(view, start=[6]).keys is not None
    mixed = KVView.from_contiguous([keys, keys[..., :2]], [keys, keys], [9])
    with pytest.raises(KVViewError, match="pool them apart"):
        paged_pool(mixed)
    assert paged_pool(mixed, part="v").values is not None
    with pytest.raises(KVViewError, match="alike"):
        token_vectors(mixed, 0, 0, 9)
    with pytest.raises(KVViewError, match="weights for 9 tokens"):
        paged_pool(mixed, layers=[0], weights=[torch.ones(4)])


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_ordered_sum_depends_on_nothing_but_the_numbers(data: Any) -> None:
    count, width = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(dtype)
    whole = ordered_sum(x, 0, torch.float32)
    assert whole.dtype == torch.float32
    assert torch.equal(whole, ordered_sum(x.t().contiguous(), 1, torch.float32))
    column = data.draw(st.integers(0, width - 1))
    assert torch.equal(whole[column : column + 1], ordered_sum(x[:, column : column + 1], 0, torch.float32))
    torch.testing.assert_close(whole.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
