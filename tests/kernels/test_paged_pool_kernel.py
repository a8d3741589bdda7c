"""The Triton twin of paged_pool, in the interpreter, against the reference.

What catches what (each was seen to fail on a mutant, see ``mutants.py``):

- mask tail: lengths that are no multiple of a tile, with NaN behind them;
- page crossing: pages of 1 token, and pages that end inside a tile;
- head stride: layouts whose heads, tokens and entries lie apart differently;
- window start: ranges that begin inside a page;
- wrong reduction axis: more tokens than entries, and the reverse.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvroute_kernels import KVGroup, KVView, KVViewError, PageTable, WindowError, paged_pool
from kvroute_kernels import paged_pool_triton as kernels
from kvroute_kernels.paged_pool_triton import PagedPool
from tests.kernels.caches import DTYPES, LAYOUTS, bytes_within, exact_sums, random_view, recorded

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_blocks")
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same(view: KVView, low: list[int], high: list[int], *, layers=None, part="kv", weights=None) -> None:
    """Kernel and reference lie within float32's rounding of the float64 sums."""
    layers = list(view.layers) if layers is None else layers
    asked = {"layers": layers, "start": low, "stop": high, "part": part, "weights": weights}
    found = paged_pool(view, **asked, backend="interpret")
    reference = paged_pool(view, **asked, backend="torch")
    exact = exact_sums(view, layers, low, high, weights)
    for i, letter in enumerate("kv"):
        mine, theirs = ((x.keys, x.values)[i] for x in (found, reference))
        if letter not in part:
            assert mine is None
            continue
        assert mine.shape == theirs.shape
        assert mine.dtype == torch.float32
        bound = 3e-6 * exact[2 * i + 1] + 1e-30
        assert ((mine.double() - exact[2 * i]).abs() <= bound).all()
        assert ((mine.double() - theirs.double()).abs() <= 2 * bound).all()
    torch.testing.assert_close(found.weight, reference.weight.float(), rtol=1e-5, atol=1e-6)


@quick
@given(
    lengths=st.lists(st.integers(0, 41), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 16, 72]),
    extra=st.sampled_from([0, 8, 3]),
    page=st.sampled_from([1, 16, 32, 128]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    part=st.sampled_from(["k", "v", "kv"]),
    shift=st.integers(0, 5),
    data=st.data(),
)
def test_it_is_the_reference(lengths, heads, size, extra, page, layout, dtype, part, shift, data) -> None:
    scales = (0.5, 3.0) if dtype.itemsize == 1 else (1.0, 1.0)
    view = random_view(
        lengths,
        layers=3,
        heads=heads,
        size=size,
        value_size=size + extra,
        page=page,
        layout=layout,
        dtype=dtype,
        scales=scales,
        shift=shift,
    )
    low = [data.draw(st.integers(0, n)) for n in lengths]
    high = [data.draw(st.integers(lo, n)) for lo, n in zip(low, lengths, strict=True)]
    layers = data.draw(st.sampled_from([[0, 1, 2], [2, 0], [1]]))
    g = torch.Generator().manual_seed(1)
    weights = [torch.rand(h - lo, generator=g) for lo, h in zip(low, high, strict=True)]
    assert_same(view, low, high, layers=layers, part=part, weights=data.draw(st.sampled_from([None, weights])))


@pytest.mark.parametrize(
    ("size", "heads"), [(64, 32), (80, 1), (96, 2), (112, 1), (128, 8), (192, 1), (256, 4), (64, 1), (128, 1)]
)
def test_head_sizes_and_gqa(size: int, heads: int) -> None:
    view = random_view([5], layers=1, heads=heads, size=size, layout="keys beside values", dtype=torch.bfloat16)
    assert_same(view, [0], [5])


@pytest.mark.parametrize(("size", "value_size"), [(576, 576), (512, 64)])
def test_mla(size: int, value_size: int) -> None:
    """576 entries a token: as one latent, and as vLLM's latent of 512 beside its rope key of 64."""
    layout = "heads first" if size == value_size else "keys beside values"
    view = random_view([19, 3], layers=2, heads=1, size=size, value_size=value_size, layout=layout)
    assert_same(view, [0, 1], [19, 3])


def test_a_contiguous_cache_is_one_page_a_sequence() -> None:
    keys, values = torch.randn(2, 3, 2, 40, 8), torch.randn(2, 3, 2, 40, 8)
    for padding in ("right", "left"):
        view = KVView.from_contiguous(keys, values, [40, 0, 23], padding=padding)
        assert_same(view, [0, 0, 3], [40, 0, 23])


def test_layers_of_several_allocations_and_tables_are_one_launch() -> None:
    """Windowed layers beside full ones: other pages, another page size, another allocation."""
    full = random_view([21, 9], layers=2, page=16, layout="keys beside values", seed=1).groups[0]
    other = random_view([21, 9], layers=1, page=8, layout="with gaps", seed=2).groups[0]
    view = KVView([full, KVGroup((2,), other.keys, other.values, other.table, 8)], torch.tensor([21, 9]))
    assert_same(view, [13, 2], [21, 9], layers=[2, 0, 1])
    pool = PagedPool(CPU)
    pool.stage(view, [2, 0, 1], [13, 2], [21, 9])
    pool.launch()
    assert pool.launches == 1


def test_a_batch_of_1024() -> None:
    lengths = [i % 3 for i in range(1024)]
    keys = torch.randn(1, 1024, 1, 2, 2)
    found = paged_pool(KVView.from_contiguous(keys, keys, lengths), part="k", backend="interpret")
    held = torch.arange(2) < torch.tensor(lengths)[:, None]
    torch.testing.assert_close(found.keys[:, 0, 0], (keys[0, :, 0] * held[..., None]).sum(1))
    assert found.weight.tolist() == lengths


def test_kernel_blocks_are_half_an_engines_block() -> None:
    from kvroute.serving.pages import LayerPages, view_of

    memory = torch.randn(8, 2, 8, 16)  # four blocks of 16 tokens as eight pages of 8
    pages = [LayerPages(0, "l0", memory[..., :8], memory[..., 8:], 0, ratio=2)]
    view = view_of(pages, [[[3, 1]], [[2]]], [29, 7])
    assert_same(view, [5, 0], [29, 7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_run_and_in_every_batch(dtype: torch.dtype) -> None:
    lengths = [18, 0, 5]
    view = random_view(lengths, layers=1, heads=1, dtype=dtype, page=16)
    whole, again = (paged_pool(view, backend="interpret") for _ in range(2))
    assert torch.equal(whole.keys, again.keys)
    for b in range(len(lengths)):
        alone = paged_pool(view.select_sequences([b]), backend="interpret")
        assert torch.equal(alone.keys[0], whole.keys[b])
        assert torch.equal(alone.values[0], whole.values[b])
    bits = view.groups[0].keys.dtype.itemsize > 1
    moved = (
        random_view(lengths, layers=1, heads=1, dtype=dtype, page=8, shift=3) if bits else view
    )  # the same tokens, elsewhere
    assert torch.equal(paged_pool(moved, backend="interpret").keys, whole.keys)


def test_128k_tokens_in_bfloat16_stay_near_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the blocks that a GPU runs with. A mean that is small beside what is added makes rounding show."""
    for name, value in (("SPLIT", 256), ("BLOCK_ELEMENTS", 4096), ("JOIN_T", 16)):
        monkeypatch.setattr(kernels, name, value)
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 1, 1, 131072, 8, generator=g) + 0.01).bfloat16()
    sums = paged_pool(KVView.from_contiguous(x, x, [131072]), part="k", backend="interpret")
    exact = x.double().sum(3)[0, 0]
    assert float((sums.keys[0, 0].double() - exact).norm() / exact.norm()) < 1e-3 / 10


def test_what_is_not_held_is_nan_in_a_step_and_an_error_in_a_call() -> None:
    view = random_view([20, 20], page=8)
    group = view.groups[0]
    pages = group.table.pages.clone()
    pages[1, 0] = -1
    holed = KVView([KVGroup(group.layers, group.keys, group.values, PageTable(pages, *_rest(group)))], view.lengths)
    pool = PagedPool(CPU)
    pool.stage(holed, [0, 1], [0, 0], [20, 20])
    pool.launch()
    assert torch.isfinite(pool.sums().keys[0]).all()
    assert torch.isnan(pool.sums().keys[1]).all()
    assert torch.isnan(pool.sums().values[1]).all()
    with pytest.raises(KVViewError, match="sequence 1 is absent"):
        paged_pool(holed, backend="interpret")
    assert_same(holed, [0, 8], [20, 20])  # the hole is not asked for
    beyond = PageTable(torch.full_like(pages, group.keys.shape[1]), *_rest(group))
    pool.stage(KVView([KVGroup(group.layers, group.keys, group.values, beyond)], view.lengths), [0], [0, 0], [20, 20])
    pool.launch()
    assert torch.isnan(pool.sums().keys).all()  # and no memory beyond the cache was read
    late = PageTable(group.table.pages, group.table.offset, torch.tensor([0, 9]))
    windowed = KVView([KVGroup(group.layers, group.keys, group.values, late, 8)], view.lengths)
    with pytest.raises(WindowError, match="the first one held is 9"):
        paged_pool(windowed, backend="interpret")


def _rest(group: KVGroup) -> tuple[torch.Tensor, torch.Tensor]:
    return group.table.offset, group.table.first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [3], "stop": [2]}, "Tokens 3..2 were asked"),
        ({"stop": [21]}, "which has 20"),
        ({"start": [-1]}, "Tokens -1..20"),
        ({"weights": [torch.ones(4)]}, "weights for 20 tokens"),
        ({"layers": [5]}, "no layer 5"),
    ],
)
@pytest.mark.parametrize("backend", ["interpret", "torch"])
def test_nonsense_is_refused_alike(change: dict, message: str, backend: str) -> None:
    with pytest.raises(KVViewError, match=message):
        paged_pool(random_view([20]), backend=backend, **change)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_that_is_asked_for_is_read_once_and_no_other(layout: str) -> None:
    view = random_view([21, 3, 0], heads=2, size=8, page=8, layout=layout, dtype=torch.bfloat16)
    group, low, high, layers = view.groups[0], [4, 0, 0], [21, 3, 0], [1]
    pool = PagedPool(CPU)
    pool.stage(view, layers, low, high)
    with recorded() as seen:
        pool.launch()
    wanted = []
    for b, (lo, hi) in enumerate(zip(low, high, strict=True)):
        for t, head, entry, x in itertools.product(range(lo, hi), range(2), range(8), (group.keys, group.values)):
            page = int(group.table.pages[b, t // 8])
            at = sum(i * s for i, s in zip((1, page, head, t % 8, entry), x.stride(), strict=True))
            wanted += [x.data_ptr() + 2 * at, x.data_ptr() + 2 * at + 1]
    assert sorted(bytes_within(seen, [group.keys, group.values])) == sorted(wanted)


def test_offsets_of_a_cache_over_2_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Index arithmetic alone: strides and pages as of a cache of 2^40 elements, whose memory is not touched."""
    view = random_view([9], layers=1, heads=3, size=8, page=4, dtype=torch.bfloat16)
    pool = PagedPool(CPU)
    pool.stage(view, [0], [0], [9])
    planes = pool.buffers.get("planes", 0, torch.int64)
    base, page_stride, head_stride, token_stride = 1 << 44, 3_000_000_008, 2_200_000_000, 2_147_483_656
    for plane in range(2):
        planes[plane * 16 : plane * 16 + 4] = torch.tensor([base, page_stride, head_stride, token_stride])
        planes[plane * 16 + 7] = 1 << 40  # pages there are
    pages = view.groups[0].table.pages
    pages[0, :3] = torch.tensor([(1 << 31) + 5, 7, 1 << 30])
    with recorded(fake=True) as seen:
        pool.launch()
    found = {int(a) for addresses, width in seen if width == 2 for a in addresses}
    wanted = {
        base + 2 * (int(pages[0, t // 4]) * page_stride + h * head_stride + t % 4 * token_stride + d)
        for t, h, d in itertools.product(range(9), range(3), range(8))
    }
    assert found == wanted
    assert max(wanted) - base > 1 << 63


# ---------------------------------------------------------------- the step


class NoTensorOps(TorchDispatchMode):
    """Fails on any op of torch: making a tensor, copying, reading a number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allowed = ("aten.view.", "aten.slice.", "aten.detach.", "aten.as_strided.", "aten.alias.")
        assert str(func).startswith(allowed), f"{func} in a step"
        return func(*args, **(kwargs or {}))


def test_a_step_allocates_nothing_waits_for_nothing_and_keeps_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append((self.name, grid, args))

    monkeypatch.setattr(kernels, "paged_pool_kernel", Launch("pool"))
    monkeypatch.setattr(kernels, "paged_pool_join_kernel", Launch("join"))
    view = random_view([40, 9, 33], page=8)
    pool = PagedPool(CPU, room=12)
    grown = None
    for low, high in (([0, 0, 0], [40, 9, 33]), ([0, 3, 1], [16, 4, 1]), ([39, 0, 0], [40, 9, 33])):
        pool.stage(view, [0, 1], low, high)
        grown = pool.buffers.grown if grown is None else grown
        with NoTensorOps():
            pool.launch()
    assert pool.buffers.grown == grown
    for name in ("pool", "join"):
        steps = [
            (grid, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args])
            for n, grid, args in launched
            if n == name
        ]
        assert len(steps) == 3
        assert steps[0] == steps[1] == steps[2]  # a captured graph stays good


def test_a_fixed_room_gives_the_same_sums_and_refuses_what_does_not_fit() -> None:
    view = random_view([40, 9], page=8)
    pool = PagedPool(CPU, room=6)
    for low, high in (([0, 0], [40, 9]), ([3, 4], [5, 4]), ([0, 0], [33, 9])):
        pool.stage(view, [1], low, high)
        pool.launch()
        wanted = paged_pool(view, layers=[1], start=low, stop=high, backend="interpret")
        assert torch.equal(pool.sums().keys, wanted.keys)
        assert torch.equal(pool.sums().weight, wanted.weight)
    with pytest.raises(KVViewError, match="room for 2"):
        PagedPool(CPU, room=2).stage(view, [0], [0, 0], [40, 9])


def test_launches_are_one_and_a_second_for_long_prompts() -> None:
    view = random_view([16, 17])
    for high, launches in (([16, 16], 1), ([16, 17], 2)):
        pool = PagedPool(CPU)
        pool.stage(view, [0, 1], [0, 0], high)
        pool.launch()
        assert pool.launches == launches


def test_variants_depend_on_dtype_alignment_weights_and_size_alone() -> None:
    seen = set()
    for seed in range(60):
        r = np.random.default_rng(seed)
        size = int(r.choice([8, 64, 80, 128, 192]))
        view = random_view(
            [int(n) for n in r.integers(1, 20, int(r.integers(1, 4)))],
            layers=int(r.integers(1, 4)),
            heads=int(r.integers(1, 5)),
            size=size,
            page=int(r.choice([1, 16, 32])),
            layout=str(r.choice(LAYOUTS)),
            dtype=DTYPES[int(r.integers(len(DTYPES)))],
        )
        pool = PagedPool(CPU)
        weights = [torch.ones(n) for n in view.host_lengths] if r.integers(2) else None
        pool.stage(view, view.layers, [0] * view.num_sequences, view.host_lengths, weights=weights)
        seen.add(pool.variant)
        assert pool.variant.vector == (size * pool.variant.dtype.itemsize % 16 == 0 and _rows_begin_at_16(view))
    assert len(seen) <= 40


def _rows_begin_at_16(view: KVView) -> bool:
    group = view.groups[0]
    return all(
        x.stride(4) == 1
        and x.data_ptr() % 16 == 0
        and all(x.stride(i) * x.element_size() % 16 == 0 for i in (0, 1, 2, 3))
        for x in (group.keys, group.values)
    )
