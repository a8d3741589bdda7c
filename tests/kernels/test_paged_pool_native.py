"""The CPU's compiled pooling: float64's sums, and the same bits wherever the tokens lie and whatever stands beside
them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute_kernels import paged_pool, prepare
from kvroute_kernels.native_library import library
from tests.kernels.caches import DTYPES, LAYOUTS, exact_sums, random_view

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 16, 40, 72]),
    extra=st.sampled_from([0, 8, 3]),
    page=st.sampled_from([1, 16, 32, 128]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    part=st.sampled_from(["k", "v", "kv"]),
    shift=st.integers(0, 20),
    data=st.data(),
)
def test_sums_and_their_bits(lengths, heads, size, extra, page, layout, dtype, part, shift, data) -> None:
    made = {"layers": 3, "heads": heads, "size": size, "value_size": size + extra, "dtype": dtype}
    made["scales"] = (0.5, 3.0) if dtype.itemsize == 1 else (1.0, 1.0)
    view = random_view(lengths, page=page, layout=layout, shift=shift, **made)
    low = [data.draw(st.integers(0, n)) for n in lengths]
    high = [data.draw(st.integers(lo, n)) for lo, n in zip(low, lengths, strict=True)]
    layers = data.draw(st.sampled_from([[0, 1, 2], [2, 0], [1]]))
    g = torch.Generator().manual_seed(1)
    weights = data.draw(
        st.sampled_from([None, [torch.rand(h - lo, generator=g) for lo, h in zip(low, high, strict=True)]])
    )
    asked = {"layers": layers, "part": part, "backend": "native"}
    found = paged_pool(view, start=low, stop=high, weights=weights, **asked)
    exact = exact_sums(view, layers, low, high, weights)
    for i, letter in enumerate("kv"):
        mine = (found.keys, found.values)[i]
        assert (mine is not None) == (letter in part)
        if mine is not None:
            assert ((mine.double() - exact[2 * i]).abs() <= 3e-6 * exact[2 * i + 1] + 1e-30).all()
    plain = random_view(lengths, page=128, layout="heads first", **made)  # the same numbers elsewhere
    for b in range(len(lengths)):
        alone = paged_pool(
            plain.select_sequences([b]),
            start=low[b : b + 1],
            stop=high[b : b + 1],
            weights=None if weights is None else weights[b : b + 1],
            **asked,
        )
        for mine, theirs in ((found.keys, alone.keys), (found.values, alone.values)):
            assert mine is None or torch.equal(mine[b], theirs[0])


def test_threads_change_nothing() -> None:
    view = random_view([2000, 1, 900], layers=4, heads=3, size=40, page=32, layout="transposed keys")
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(paged_pool(view, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(f.keys, found[0].keys) and torch.equal(f.values, found[0].values) for f in found)


def test_128k_tokens_in_bfloat16() -> None:
    x = (torch.randn(1, 1, 1, 131072, 8, generator=torch.Generator().manual_seed(0)) + 0.01).bfloat16()
    from kvroute_kernels import KVView

    sums = paged_pool(KVView.from_contiguous(x, x, [131072]), part="k", backend="native")
    exact = x.double().sum(3)[0, 0]
    assert float((sums.keys[0, 0].double() - exact).norm() / exact.norm()) < 1e-5


def test_prepare_builds_it_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("kvroute_kernels.native_library.library", lambda: asked.append(1))
    monkeypatch.delenv("KVROUTE_KERNELS", raising=False)
    prepare(torch.device("cpu"))
    prepare(torch.device("meta"))
    monkeypatch.setenv("KVROUTE_KERNELS", "torch")
    prepare(torch.device("cpu"))
    assert asked == [1]
