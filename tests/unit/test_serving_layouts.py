"""vLLM's cache tensors as pages.

No vLLM here: the tensors are built as the source of vLLM 0.32 builds them. ``allocate`` follows
``v1/kv_cache_interface.py`` (``create_kv_cache_views``, ``compute_layout_strides``), ``write_gpu`` the way
``flash_attn.py`` takes a cache apart, ``write_latent`` ``concat_and_cache_mla``. No GPU backend was run.
The CPU backend's real op is met in ``tests/serving/test_layouts.py``.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from kvroute.errors import InvalidInputError, UnsupportedLayoutError
from kvroute.serving.cpu_layout import PartStrides, find_area
from kvroute.serving.layouts import CacheFacts, LayerFacts, layer_pages
from kvroute.serving.pages import kernel_pages, stack_pages, view_of
from kvroute_kernels import KVView, KVViewError, WindowError, paged_pool
from kvroute_kernels.chain_step import token_vectors

LAYOUTS = {  # physical order of [L, B, H, N, C] (v1/kv_cache_layout.py)
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
BLOCKS = 23


def allocate(
    layers: int, heads: int, tokens: int, content: int, dtype: torch.dtype, layout: str = "LBNHC", ratio: int = 1
) -> list[Tensor]:
    """Views ``[BLOCKS * ratio, H, tokens / ratio, C]`` of one buffer, a layer each, filled with NaN or ones."""
    shape = (layers, BLOCKS * ratio, heads, tokens // ratio, content)
    strides, step = [0] * 5, 1
    for dim in reversed(LAYOUTS[layout]):
        strides[dim], step = step, step * shape[dim]
    if dtype == torch.uint8:
        buffer = torch.full((prod(shape),), 127, dtype=dtype)  # NaN in float8_e4m3fn
    else:
        buffer = torch.full((prod(shape),), torch.nan, dtype=dtype)
    return list(buffer.as_strided(shape, strides).unbind(0))


def write_gpu(cache: Tensor, size: int, blocks: list[int], keys: Tensor, values: Tensor) -> None:
    """Tokens ``[T, H, D]`` into a cache, as ``reshape_and_cache_flash`` does through its block table."""
    key_cache, value_cache = cache.transpose(1, 2)[..., :size], cache.transpose(1, 2)[..., size:]
    tokens = cache.shape[2]
    for t in range(keys.shape[0]):
        if blocks[t // tokens] >= 0:
            key_cache[blocks[t // tokens], t % tokens] = keys[t]
            value_cache[blocks[t // tokens], t % tokens] = values[t]


def facts_of(layers: int, **changes: object) -> CacheFacts:
    base = LayerFacts(
        name="",
        index=0,
        group=0,
        spec="FullAttentionSpec",
        backend="FLASH_ATTN",
        heads=3,
        key_size=10,
        value_size=10,
        block_size=8,
        dtype=torch.float32,
    )
    made = [replace(base, name=f"model.layers.{i}.self_attn.attn", index=i, **changes) for i in range(layers)]  # type: ignore[arg-type]
    return CacheFacts(layers=tuple(made), num_blocks=BLOCKS)


def named(facts: CacheFacts, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {layer.name: tensor for layer, tensor in zip(facts.layers, tensors, strict=True)}


def assert_same(view: KVView, expected: list[list[tuple[Tensor, Tensor]]], starts: list[int] | None = None) -> None:
    """The view holds ``expected[request][layer] = keys, values [T, H, D]``; sums and chain vectors too."""
    starts = [0] * len(expected) if starts is None else starts
    for number, layers in enumerate(expected):
        start, stop = starts[number], layers[0][0].shape[0]
        for index, (keys, values) in enumerate(layers):
            group, place = view.group_of(index)
            got_keys, got_values = view.token_slices(group, number, start, stop)
            assert torch.equal(got_keys[place].transpose(0, 1).float(), keys[start:].float())
            assert torch.equal(got_values[place].transpose(0, 1).float(), values[start:].float())
    sums = paged_pool(view, start=starts)
    assert sums.keys is not None
    assert sums.values is not None
    for number, layers in enumerate(expected):
        start = starts[number]
        exact = torch.stack([k[start:].double().sum(0) for k, _ in layers])
        torch.testing.assert_close(sums.keys[number].double(), exact, rtol=1e-5, atol=1e-4)
        exact = torch.stack([v[start:].double().sum(0) for _, v in layers])
        torch.testing.assert_close(sums.values[number].double(), exact, rtol=1e-5, atol=1e-4)
        if start < layers[0][0].shape[0]:
            z = token_vectors(view, number, start, layers[0][0].shape[0])
            plain = torch.stack([torch.cat([k.flatten(1), v.flatten(1)], 1).double() for k, v in layers]).mean(0)
            torch.testing.assert_close(z.double(), plain[start:], rtol=1e-5, atol=1e-5)


def random_layers(length: int, layers: int, heads: int, size: int, value_size: int, dtype: torch.dtype, seed: int):
    random = torch.Generator().manual_seed(seed)
    return [
        tuple(torch.randn(length, heads, s, generator=random).to(dtype) for s in (size, value_size))
        for _ in range(layers)
    ]


# ---------------------------------------------------------------- GPU backends


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size", "value_size"), [(1, 6, 6), (3, 10, 10), (5, 7, 4)])
def test_gpu_content_is_keys_then_values(layout, dtype, heads, size, value_size):
    facts = facts_of(4, heads=heads, key_size=size, value_size=value_size, dtype=dtype)
    tensors = allocate(4, heads, 8, size + value_size, dtype, layout)
    pages = layer_pages(facts, named(facts, tensors))
    tables = [[[7, 2, 19]], [[4]], [[22, 0, 11, 5]]]
    lengths = [17, 3, 32]
    expected = []
    for number, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        expected.append(random_layers(length, 4, heads, size, value_size, dtype, number))
        for cache, (keys, values) in zip(tensors, expected[-1], strict=True):
            write_gpu(cache, size, table[0], keys, values)
    assert all(p.keys.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr() for p in pages)
    assert_same(view_of(pages, tables, lengths), expected)
    starts = [16, 3, 9]
    assert_same(view_of(pages, tables, lengths, starts), expected, starts)


def test_layers_of_one_allocation_are_read_as_one():
    facts = facts_of(6)
    for layout in LAYOUTS:
        tensors = allocate(6, 3, 8, 20, torch.float32, layout)
        (stack,) = stack_pages(layer_pages(facts, named(facts, tensors)))
        assert stack.keys.shape == (6, BLOCKS, 3, 8, 10)
        for place, tensor in enumerate(tensors):  # the stack's memory is the layers' own
            tensor.fill_(place)
            assert bool((stack.keys[place] == place).all())
            assert bool((stack.values[place] == place).all())


def test_layers_of_several_allocations_are_read_apart():
    facts = facts_of(5)
    tensors = allocate(3, 3, 8, 20, torch.float32) + allocate(2, 3, 8, 20, torch.float32)
    stacks = stack_pages(layer_pages(facts, named(facts, tensors)))
    assert [[p.index for p in s.layers] for s in stacks] == [[0, 1, 2], [3, 4]]
    subset = layer_pages(facts, named(facts, tensors))
    stacks = stack_pages([subset[i] for i in (0, 2, 4)])
    assert [[p.index for p in s.layers] for s in stacks] == [[0, 2], [4]]
    uneven = allocate(6, 3, 8, 20, torch.float32)
    stacks = stack_pages(layer_pages(facts, named(facts, [uneven[i] for i in (0, 1, 3, 5, 4)])))
    assert [[p.index for p in s.layers] for s in stacks] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC"])
def test_kernel_blocks_are_pages_of_the_engines_blocks(ratio, layout):
    assert kernel_pages([5, 0, 2], 1) == [5, 0, 2]
    assert kernel_pages([5, 0, 2], 3) == [15, 16, 17, 0, 1, 2, 6, 7, 8]
    facts = facts_of(2)
    tensors = allocate(2, 3, 8, 20, torch.float32, layout, ratio)
    pages = layer_pages(facts, named(facts, tensors))
    assert {(p.ratio, p.page_size) for p in pages} == {(ratio, 8 // ratio)}
    table, length = [9, 1, 16], 21
    expected = random_layers(length, 2, 3, 10, 10, torch.float32, 0)
    for cache, (keys, values) in zip(tensors, expected, strict=True):
        write_gpu(cache, 10, kernel_pages(table, ratio), keys, values)
    assert_same(view_of(pages, [[table]], [length]), [expected])
    assert_same(view_of(pages, [[table]], [length], [13]), [expected], [13])


# ---------------------------------------------------------------- windows


def test_a_windowed_group_with_missing_blocks_holds_what_follows_them():
    """Layers 0, 2 slide and lie in group 0, layer 1 attends to all and lies in group 1 over the same bytes."""
    facts = facts_of(3)
    layers = [replace(layer, spec="SlidingWindowSpec", window=9) for layer in facts.layers]
    layers[1] = replace(facts.layers[1], group=1)
    facts = replace(facts, layers=tuple(layers))
    first, second = allocate(2, 3, 8, 20, torch.float32)
    tensors = [first, first, second]  # groups overlay each other
    pages = layer_pages(facts, named(facts, tensors))
    assert [(p.window, p.drops) for p in pages] == [(9, True), (None, False), (9, True)]
    lengths = [29, 6]
    tables = [[[0, 0, 5, 3], [7, 8, 9, 10]], [[2], [0]]]  # block 0 of a full group is a block like any other
    expected = [random_layers(n, 3, 3, 10, 10, torch.float32, n) for n in lengths]
    for by_group, request in zip(tables, expected, strict=True):
        for layer, (keys, values) in enumerate(request):
            group = facts.layers[layer].group
            ids = [-1 if b == 0 and group == 0 else b for b in by_group[group]]
            write_gpu(tensors[layer], 10, ids, keys, values)
    view = view_of(pages, tables, lengths)
    group, _ = view.group_of(0)
    assert group.table.first.tolist() == [16, 0]
    assert view.group_of(1)[0].table.first.tolist() == [0, 0]
    assert view.find_non_finite() is None  # reads what is held only: the rest of the cache is NaN
    with pytest.raises(WindowError):
        paged_pool(view, layers=[0])
    sums = paged_pool(view, layers=[2], start=[16, 0])
    assert sums.values is not None
    for number, start in enumerate([16, 0]):
        torch.testing.assert_close(sums.values[number, 0], expected[number][2][1][start:].sum(0))
    assert_same(view_of(pages, tables, lengths, [20, 2]), expected, [20, 2])
    gone = view_of(pages, [[[0, 0, 5, 0], [7, 8, 9, 10]]], [29])  # not seen in the engine; must not be read as block 0
    assert gone.group_of(0)[0].table.first.tolist() == [29]


def test_windows_with_kernel_blocks():
    facts = facts_of(2, spec="SlidingWindowSpec", window=9)
    tensors = allocate(2, 3, 8, 20, torch.float32, ratio=2)
    pages = layer_pages(facts, named(facts, tensors))
    expected = random_layers(22, 2, 3, 10, 10, torch.float32, 0)
    for cache, (keys, values) in zip(tensors, expected, strict=True):
        write_gpu(cache, 10, [-1, -1, *kernel_pages([6, 3], 2)], keys, values)
    view = view_of(pages, [[[0, 6, 3]]], [22])
    assert view.groups[0].table.first.tolist() == [8]
    assert view.groups[0].table.pages.tolist() == [[-1, -1, 12, 13, 6, 7]]
    assert_same(view_of(pages, [[[0, 6, 3]]], [22], [8]), [expected], [8])


# ---------------------------------------------------------------- MLA


def write_latent(cache: Tensor, blocks: list[int], latent: Tensor, rope: Tensor) -> None:
    """``concat_and_cache_mla``: a token's latent, then its rope key."""
    tokens = cache.shape[2]
    for t in range(latent.shape[0]):
        cache[blocks[t // tokens], 0, t % tokens] = torch.cat([latent[t, 0], rope[t, 0]])


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mla_keys_are_the_latent_and_values_the_rope_key(halves, dtype):
    sizes = {"heads": 1, "key_size": 22, "value_size": 0, "latent": 16, "dtype": dtype}
    facts = facts_of(3, spec="MLAAttentionSpec", backend="TRITON_MLA", rope_halves=halves, **sizes)
    tensors = allocate(3, 1, 8, 22, dtype, "LBNHC")
    pages = layer_pages(facts, named(facts, tensors))
    assert {p.sizes for p in pages} == {(1, 16, 6)}
    assert pages[0].converted is halves
    expected = random_layers(19, 3, 1, 16, 6, dtype, 1)
    for cache, (latent, rope) in zip(tensors, expected, strict=True):
        pairs = rope
        if halves:  # transformers: [x0, x1, x2, y0, y1, y2]; the engine: [x0, y0, x1, y1, x2, y2]
            pairs = torch.stack([rope[..., :3], rope[..., 3:]], dim=-1).flatten(-2)
        write_latent(cache, [3, 8, 1], latent, pairs)
    tables = [[[3, 8, 1]], [[3, 8]]]
    both = [expected, [(k[:16], v[:16]) for k, v in expected]]
    assert_same(view_of(pages, tables, [19, 16]), both)
    assert_same(view_of(pages, tables, [19, 16], [9, 15]), both, [9, 15])


# ---------------------------------------------------------------- FP8


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_read_with_its_scales(stored):
    facts = facts_of(3, dtype=torch.bfloat16, quantization="FP8_PER_TENSOR", stored=stored, scale_k=0.037, scale_v=1.25)
    tensors = allocate(3, 3, 8, 20, torch.uint8)
    pages = layer_pages(facts, named(facts, tensors))
    raw = random_layers(19, 3, 3, 10, 10, torch.float32, 2)
    bits = [tuple((x / s).to(stored) for x, s in zip(kv, (0.037, 1.25), strict=True)) for kv in raw]
    for cache, (keys, values) in zip(tensors, bits, strict=True):
        write_gpu(cache, 10, [21, 4, 13], keys.view(torch.uint8), values.view(torch.uint8))
    expected = [(k.float() * 0.037, v.float() * 1.25) for k, v in bits]
    for (k, v), (rk, rv) in zip(expected, raw, strict=True):  # float8 keeps 2 or 3 bits: within 1/8 of the number
        torch.testing.assert_close(k, rk, rtol=0.13, atol=0.01)
        torch.testing.assert_close(v, rv, rtol=0.13, atol=0.01)
    tables = [[[21, 4, 13]], [[21]]]
    both = [expected, [(k[:7], v[:7]) for k, v in expected]]
    view = view_of(pages, tables, [19, 7])
    group = view.groups[0]
    assert group.keys.dtype == group.values.dtype == stored
    assert (group.key_scale, group.value_scale) == (0.037, 1.25)
    assert group.keys.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()  # nothing was copied
    assert_same(view, both)
    late = view_of(pages, tables, [19, 7], [17, 7])
    assert late.groups[0].table.pages.shape[1] == 1
    assert_same(late, both, [17, 7])


def test_fp8_in_a_window():
    facts = facts_of(
        1, quantization="FP8_PER_TENSOR", stored=torch.float8_e5m2, spec="SlidingWindowSpec", window=9, scale_k=2.0
    )
    (cache,) = allocate(1, 3, 8, 20, torch.uint8)
    pages = layer_pages(facts, named(facts, [cache]))
    ((keys, values),) = random_layers(20, 1, 3, 10, 10, torch.float8_e5m2, 3)
    write_gpu(cache, 10, [-1, 6, 2], keys.view(torch.uint8), values.view(torch.uint8))
    view = view_of(pages, [[[0, 6, 2]]], [20])
    assert view.groups[0].table.pages.tolist() == [[-1, 6, 2]]
    with pytest.raises(WindowError):
        view.token_slices(view.groups[0], 0, 7, 20)
    assert_same(view_of(pages, [[[0, 6, 2]]], [20], [8]), [[(keys.float() * 2, values.float())]], [8])


# ---------------------------------------------------------------- the CPU backend


def vec(key, value, key_cache, value_cache, slots, isa):
    """Keys transposed within their half, values as they come: what vLLM's op does for its instruction sets vec
    and vec16 (seen in ``tests/serving/test_layouts.py``)."""
    tokens, size = value_cache.shape[2:]
    for t, slot in enumerate(slots.tolist()):
        key_cache[slot // tokens].view(-1, size, tokens)[:, :, slot % tokens] = key[t]
        value_cache[slot // tokens, :, slot % tokens] = value[t]


def amx(key, value, key_cache, value_cache, slots, isa):
    """Keys of 16 tokens side by side in words of two elements, as ``cpu_attn_amx.hpp`` packs bfloat16 (read, not
    run): no strides lead there."""
    tokens, size = value_cache.shape[2:]
    for t, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, tokens)
        packed = key_cache[block].view(key.shape[1], tokens // 16, size // 2, 16, 2)
        packed[:, place // 16, :, place % 16] = key[t].view(-1, size // 2, 2)
        value_cache[block, :, place] = value[t]


@pytest.mark.parametrize(("heads", "tokens", "size"), [(1, 16, 6), (3, 8, 10), (2, 32, 64), (5, 1, 3), (2, 4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_layout_is_found_by_writing_numbers(heads, tokens, size, dtype):
    keys, values = find_area(vec, heads=heads, tokens=tokens, size=size, dtype=dtype, isa="vec")
    assert (keys.offset, values) == (0, PartStrides(tokens * size, size, 1))
    assert (keys.token_stride, keys.dim_stride) == (1, tokens) or 1 in (tokens, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [1, 2])
def test_cpu_pages_are_read_by_strides(dtype, ratio):
    facts = facts_of(3, backend="CPU_ATTN", isa="vec", dtype=dtype)
    tensors = allocate(3, 3, 8, 20, dtype, "LBHNC", ratio)
    pages = layer_pages(facts, named(facts, tensors), vec)
    assert len(stack_pages(pages)) == 1
    table = [9, 1, 16]
    expected = random_layers(21, 3, 3, 10, 10, dtype, 4)
    columns = kernel_pages(table, ratio)
    size = 8 // ratio
    slots = torch.tensor([columns[t // size] * size + t % size for t in range(21)])
    for cache, (keys, values) in zip(tensors, expected, strict=True):
        key_cache, value_cache = cache.view(BLOCKS * ratio, 3, 2 * size, 10).chunk(2, dim=2)
        vec(keys, values, key_cache, value_cache, slots, "vec")
    assert_same(view_of(pages, [[table]], [21]), [expected])
    assert_same(view_of(pages, [[table]], [21], [20]), [expected], [20])


def test_cpu_fp8_is_found_with_numbers_that_float8_holds():
    def write(key, value, key_cache, value_cache, slots, isa):
        parts = [c.view(torch.float8_e5m2) for c in (key_cache, value_cache)]
        bits = [x.to(torch.float8_e5m2).view(torch.uint8) for x in (key, value)]
        vec(*bits, *(p.view(torch.uint8) for p in parts), slots, isa)

    sizes = {"heads": 3, "tokens": 8, "size": 10, "isa": "vec", "dtype": torch.bfloat16}
    assert find_area(write, stored=torch.float8_e5m2, **sizes)[0] == PartStrides(0, 1, 8)


def no_op(*_):
    pass


def swapped_heads(key, value, key_cache, value_cache, slots, isa):
    vec(key.flip(1), value, key_cache, value_cache, slots, isa)


def rounding(key, value, key_cache, value_cache, slots, isa):
    vec(key / 3, value, key_cache, value_cache, slots, isa)


@pytest.mark.parametrize(
    ("op", "reason"),
    [(amx, "no strides"), (no_op, "each key once"), (swapped_heads, "no strides"), (rounding, "not hold the numbers")],
)
def test_a_cpu_layout_without_strides_is_refused(op, reason):
    with pytest.raises(UnsupportedLayoutError, match=reason) as caught:
        find_area(op, heads=2, tokens=32, size=16, dtype=torch.bfloat16, isa="some")
    assert "float32" in str(caught.value)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantization": "NVFP4", "head_slots": 6, "content_bytes": 40}, "quantized as NVFP4"),
        ({"quantization": "INT8_PER_TOKEN_HEAD", "content_bytes": 28}, "quantized as INT8_PER_TOKEN_HEAD"),
        ({"quantization": "FP8_PER_TOKEN_HEAD", "content_bytes": 28}, "quantized as FP8_PER_TOKEN_HEAD"),
        ({"quantization": "TURBOQUANT_4BIT_NC", "content_bytes": 28}, "quantized as TURBOQUANT"),
        ({"head_slots": 2, "content_bytes": 120}, "packs the cache"),
        ({"content_bytes": 656, "quantization": "FP8_PER_TENSOR", "stored": torch.float8_e4m3fn}, "packs the cache"),
        ({"tokens_per_state": 4.0}, "share one state"),
        ({"spec": "ChunkedLocalAttentionSpec"}, "ChunkedLocalAttentionSpec"),
        ({"spec": "CrossAttentionSpec"}, "CrossAttentionSpec"),
        ({"backend": "ROCM_AITER_FA"}, "backend ROCM_AITER_FA is not known"),
        ({"backend": "CPU_ATTN", "isa": None}, "is not known"),
        ({"backend": "CPU_ATTN", "isa": "vec", "key_size": 12, "value_size": 8}, "keys of 12"),
        ({"spec": "MLAAttentionSpec"}, "latent None"),
        ({"spec": "MLAAttentionSpec", "latent": 16}, "3 heads"),
        ({"block_size": 16}, "do not make"),
        ({"heads": 2}, "was expected"),
        ({"key_size": 9}, "was expected"),
        ({"dtype": torch.bfloat16}, "was expected"),
        ({"dtype": torch.int8}, "int8"),
        ({"name": "model.layers.9.self_attn.attn"}, "registered no cache"),
        ({"stored": torch.float8_e4m3fn}, "does not go with"),
        ({"quantization": "FP8_PER_TENSOR", "stored": torch.uint8}, "no float8"),
        ({"rope_halves": True}, "rope key"),
    ],
)
def test_what_cant_be_read_is_refused_with_the_reason(changes, reason):
    facts = facts_of(1)
    tensors = named(facts, allocate(1, 3, 8, 20, torch.float32))
    layer_pages(facts, tensors)  # without the change it can
    changed = replace(facts, layers=(replace(facts.layers[0], **changes),))
    with pytest.raises(UnsupportedLayoutError, match=reason):
        layer_pages(changed, tensors, vec if changes.get("isa") else None)


def test_caches_as_a_whole_that_are_refused():
    facts = facts_of(1)
    tensors = named(facts, allocate(1, 3, 8, 20, torch.float32))
    with pytest.raises(UnsupportedLayoutError, match="context parallel"):
        layer_pages(replace(facts, context_ranks=2), tensors)
    with pytest.raises(UnsupportedLayoutError, match="no keys and values"):
        layer_pages(replace(facts, layers=()), tensors)
    with pytest.raises(UnsupportedLayoutError, match="do not make"):
        layer_pages(replace(facts, num_blocks=BLOCKS + 1), tensors)


def test_a_cpu_area_that_is_not_in_one_piece_is_refused():
    facts = facts_of(1, backend="CPU_ATTN", isa="vec")
    tensors = named(facts, allocate(1, 3, 8, 20, torch.float32, "LBNHC"))
    with pytest.raises(UnsupportedLayoutError, match="not in one piece"):
        layer_pages(facts, tensors, vec)


@pytest.mark.parametrize(
    ("tables", "lengths", "starts", "reason"),
    [
        ([[[1]]], [9], None, "need 2"),
        ([[]], [3], None, "0 blocks"),
        ([[[1, BLOCKS]]], [9], None, "does not exist"),
        ([[[-1]]], [3], None, "does not exist"),
        ([[[1]]], [3], [4], "from token 4"),
        ([[[1]]], [3], [-1], "from token -1"),
        ([[[1]]], [3, 4], None, "2 lengths"),
    ],
)
def test_tables_that_make_no_sense(tables, lengths, starts, reason):
    facts = facts_of(1)
    pages = layer_pages(facts, named(facts, allocate(1, 3, 8, 20, torch.float32)))
    with pytest.raises(InvalidInputError, match=reason):
        view_of(pages, tables, lengths, starts)


def test_tokens_before_the_start_are_not_in_the_view():
    facts = facts_of(1)
    pages = layer_pages(facts, named(facts, allocate(1, 3, 8, 20, torch.float32)))
    view = view_of(pages, [[[1, 2, 3]]], [20], [17])
    assert view.groups[0].table.pages.tolist() == [[3]]
    with pytest.raises(WindowError):
        view.token_slices(view.groups[0], 0, 15, 20)
    with pytest.raises(KVViewError):
        view.token_slices(view.groups[0], 0, 17, 21)


def test_requests_of_no_tokens():
    facts = facts_of(2)
    pages = layer_pages(facts, named(facts, allocate(2, 3, 8, 20, torch.float32)))
    sums = paged_pool(view_of(pages, [[[]], [[]]], [0, 0]))
    assert sums.keys is not None
    assert sums.keys.abs().sum() == 0
    assert view_of(pages, [], []).num_sequences == 0
