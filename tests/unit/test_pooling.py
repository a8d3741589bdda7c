"""PoolingSpec and pool: every option against float64, JSON both ways, nonsense refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import reference
from kvroute import (
    PRESETS,
    ChainSpec,
    InvalidInputError,
    KVRouteError,
    LayerInfo,
    ModelInfo,
    NonFiniteCacheError,
    PoolingSpec,
    SpecError,
    WindowedLayerError,
    pool,
)
from kvroute_kernels import KVView


def model_of(layers: int, sizes: tuple[int, int, int] = (3, 5, 7)) -> ModelInfo:
    heads, key, value = sizes
    layer = {"kv_heads": heads, "key_size": key, "value_size": value}
    return ModelInfo(
        name="made-up", architecture="X", hidden_size=8, vocab_size=9, context=99, model_layers=layers, rope="{}",
        layers=tuple(LayerInfo(model_layer=i, **layer) for i in range(layers)), weights_digest="", dtype="float32",
    )  # fmt: skip


def random_cache(layers: int, lengths: list[int], seed: int = 0) -> tuple[KVView, list[Any]]:
    """A view, and by sequence what the reference takes. Padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.full((layers, len(lengths), 3, max(lengths), 5), float("nan"))
    values = torch.full((layers, len(lengths), 3, max(lengths), 7), float("nan"))
    for b, n in enumerate(lengths):
        keys[:, b, :, :n] = torch.randn(layers, 3, n, 5, generator=generator)
        values[:, b, :, :n] = torch.randn(layers, 3, n, 7, generator=generator)
    caches = [
        [(keys[i, b, :, :n].double().numpy(), values[i, b, :, :n].double().numpy()) for i in range(layers)]
        for b, n in enumerate(lengths)
    ]
    return KVView.from_contiguous(keys, values, lengths), caches


def every_spec() -> list[PoolingSpec]:
    specs = []
    for part, heads, layers, normalize in itertools.product(
        ["k", "v", "kv"], ["mean", "concat"], ["mean", "sum", "last", "concat"], [False, True]
    ):
        for tokens in (
            {"tokens": "mean"},
            {"tokens": "sum"},
            {"tokens": "last"},
            {"tokens": "first"},
            {"tokens": "mean", "window": 4},
            {"tokens": "sum", "window": 100},
            {"tokens": "mean", "weights": "position"},
            {"tokens": "mean", "weights": "position", "window": 3},
            {"tokens": "mean", "weights": "sif"},
            {"tokens": "mean", "weights": "sif", "window": 2},
        ):
            specs.append(PoolingSpec(part=part, heads=heads, layer_reduce=layers, normalize=normalize, **tokens))
    return specs


LAYERS = ["all", "last:1", "last:3", "first:2", [2], [-1, 0], [3, 1, 2], 0.5, 0.01, 1.0, 4]


def test_every_combination_of_options_equals_float64() -> None:
    lengths = [9, 1, 4]
    view, caches = random_cache(5, lengths)
    info = model_of(5)
    sif = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    for spec, layers in zip(every_spec(), itertools.cycle(LAYERS), strict=False):
        spec = spec.model_copy(update={"layers": PoolingSpec(layers=layers).layers})
        found = pool(view, spec, sif_weights=sif)
        assert found.dtype == torch.float32
        for b in range(3):
            wanted = reference.pool(caches[b], spec, sif=sif[b])
            assert found.shape[1] == len(wanted) == spec.dimension(info)
            assert reference.relative_error(found[b], wanted) < 1e-5, spec


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_spec_on_any_cache(layers: int, lengths: list[int], data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(every_spec()))
    chosen = data.draw(
        st.one_of(
            st.just("all"),
            st.integers(1, layers).map(lambda n: f"last:{n}"),
            st.integers(1, layers).map(lambda n: f"first:{n}"),
            st.floats(0.01, 1.0),
            st.lists(st.integers(0, layers - 1), min_size=1, unique=True),
        )
    )
    spec = PoolingSpec(**(spec.model_dump() | {"layers": chosen}))
    view, caches = random_cache(layers, lengths, seed=sum(lengths))
    sif = [torch.rand(n) + 0.1 for n in lengths]
    found = pool(view, spec, sif_weights=sif)
    for b, cache in enumerate(caches):
        assert reference.relative_error(found[b], reference.pool(cache, spec, sif=sif[b])) < 1e-5
    assert PoolingSpec.from_json(spec.to_json()) == spec


def test_ranges_of_tokens() -> None:
    view, caches = random_cache(3, [9, 6])
    for spec in (
        PoolingSpec(layers="all"),
        PoolingSpec(layers="all", window=2),
        PoolingSpec(layers="all", tokens="last"),
        PoolingSpec(layers="all", tokens="first"),
    ):
        found = pool(view, spec, start=[2, 3], stop=[7, 6])
        for b, (low, high) in enumerate([(2, 7), (3, 6)]):
            part = [(k[:, low:high], v[:, low:high]) for k, v in caches[b]]
            assert reference.relative_error(found[b], reference.pool(part, spec)) < 1e-5
    # position weights count from the text's first token, not from the range's
    weighted = pool(view, PoolingSpec(layers=[0], part="k", heads="concat", weights="position"), start=[2, 3])
    k = caches[0][0][0]
    wanted = sum((t + 1) * k[:, t] for t in range(2, 9)).reshape(-1) / sum(range(3, 10))
    assert reference.relative_error(weighted[0], wanted) < 1e-5


def test_a_float64_cache_is_pooled_in_float64() -> None:
    keys = torch.randn(2, 1, 3, 50, 4, dtype=torch.float64)
    found = pool(KVView.from_contiguous(keys, keys, [50]), PoolingSpec(layers="all", part="k"))
    assert found.dtype == torch.float64
    assert reference.relative_error(found[0], keys[:, 0].mean(dim=(0, 1, 2))) < 1e-14


def test_json_both_ways() -> None:
    for layers in LAYERS:
        for spec in every_spec()[::37]:
            spec = PoolingSpec(**(spec.model_dump() | {"layers": layers}))
            assert PoolingSpec.from_json(spec.to_json()) == spec
            assert PoolingSpec(**json.loads(spec.to_json())) == spec
            assert hash(PoolingSpec.from_json(spec.to_json())) == hash(spec)
    assert ChainSpec.from_json(ChainSpec(layers=[1, 2]).to_json()) == ChainSpec(layers=(1, 2))


def test_specs_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PoolingSpec().window = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"window": 0},
        {"window": -1},
        {"window": 1.5},
        {"window": True},
        {"window": "many"},
        {"colour": "red"},
        {"part": "vk"},
        {"part": ""},
        {"tokens": "max"},
        {"tokens": "last", "window": 3},
        {"tokens": "first", "window": 3},
        {"tokens": "sum", "weights": "position"},
        {"weights": "idf"},
        {"sif_a": 0},
        {"sif_a": -1},
        {"sif_a": float("nan")},
        {"sif_a": float("inf")},
        {"heads": "sum"},
        {"layer_reduce": "max"},
        {"layers": []},
        {"layers": [True]},
        {"layers": True},
        {"layers": [1.5]},
        {"layers": ["1"]},
        {"layers": None},
        {"layers": "last:0"},
        {"layers": "last:-1"},
        {"layers": "last:"},
        {"layers": "last:04"},
        {"layers": "middle:2"},
        {"layers": " all"},
        {"layers": "0.5"},
        {"layers": 0.0},
        {"layers": -0.5},
        {"layers": 1.5},
        {"layers": float("nan")},
        {"layers": float("inf")},
        {"layers": b"\x01"},
        {"layers": {"a": 1}},
    ],
    ids=str,
)
def test_nonsense_is_refused(nonsense: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="Not a PoolingSpec"):
        PoolingSpec(**nonsense)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"window": 0}', '{"nope": 1}', '{"layers": NaN}', "\ud800", b"\xff", "{}x"]
)
def test_json_that_is_no_spec_is_refused(text: Any) -> None:
    with pytest.raises(SpecError):
        PoolingSpec.from_json(text)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([40], "Layer 40 was asked for, and the model has 30 attention layers. Use 0 to 29"),
        ([-31], "Layer -31"),
        ("last:31", "asks for 31 layers, and the model has 30. Use at most 'last:30'"),
        ("first:99", "'first:30'"),
        ([1, 1], "name a layer twice"),
        ([0, -30], "name a layer twice"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused_with_the_mend(layers: Any, message: str) -> None:
    info = model_of(30)
    for what in (PoolingSpec(layers=layers).dimension, PoolingSpec(layers=layers).deepest_layer):
        with pytest.raises(SpecError) as caught:
            what(info)
        assert message in str(caught.value)
    with pytest.raises(SpecError):
        ChainSpec(layers=layers).resolve(30)


@pytest.mark.parametrize(
    ("layers", "resolved"),
    [
        ("all", tuple(range(30))),
        ("last:4", (26, 27, 28, 29)),
        ("first:2", (0, 1)),
        ([5, -1], (5, 29)),
        (3, (3,)),
        (0.5, tuple(range(15))),
        (0.1, (0, 1, 2)),
        (0.7, tuple(range(21))),
        (0.001, (0,)),
        (1.0, tuple(range(30))),
    ],
)
def test_what_layers_mean(layers: Any, resolved: tuple[int, ...]) -> None:
    spec = PoolingSpec(layers=layers)
    assert spec.resolve(30) == resolved
    assert spec.deepest_layer(model_of(30)) == max(resolved)
    with pytest.raises(SpecError, match="no attention layer"):
        spec.resolve(0)


@pytest.mark.parametrize(
    ("options", "dimension"),
    [
        ({}, 5 + 7),
        ({"part": "k"}, 5),
        ({"part": "v", "heads": "concat"}, 21),
        ({"heads": "concat"}, 36),
        ({"heads": "concat", "layer_reduce": "concat"}, 144),
        ({"layer_reduce": "concat", "part": "v"}, 28),
        ({"layer_reduce": "last"}, 12),
    ],
)
def test_the_size_of_a_vector(options: dict[str, Any], dimension: int) -> None:
    assert PoolingSpec(**options).dimension(model_of(30)) == dimension


def test_layers_that_differ_in_size_are_refused() -> None:
    info = model_of(4)
    odd = LayerInfo(model_layer=3, kv_heads=1, key_size=5, value_size=7)
    info = info.model_copy(update={"layers": (*info.layers[:3], odd)})
    assert PoolingSpec(layers=[0, 2]).dimension(info) == 12
    with pytest.raises(SpecError, match="differ in heads or head size"):
        PoolingSpec(layers="all").dimension(info)


def test_presets() -> None:
    assert PRESETS["paper-mteb"] == PoolingSpec(
        layers="last:4", part="kv", tokens="mean", heads="mean", layer_reduce="mean", normalize=True
    )
    assert PRESETS["paper-classifier"] == PoolingSpec(
        layers="last:4", part="kv", tokens="sum", window=64, heads="concat", layer_reduce="mean"
    )
    assert PoolingSpec.preset("paper-mteb") is PRESETS["paper-mteb"]
    with pytest.raises(SpecError, match="There are: "):
        PoolingSpec.preset("paper")
    unit = pool(random_cache(5, [9, 2])[0], PRESETS["paper-mteb"])
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=1), torch.ones(2))


def test_tokens_that_a_window_dropped_can_not_be_pooled() -> None:
    keys = torch.randn(1, 2, 3, 4)
    full = torch.randn(1, 2, 9, 4)
    view = KVView.from_contiguous([full, keys], [full, keys], [9], windows=[None, 4])
    with pytest.raises(WindowedLayerError, match="Layer 1 holds only a window"):
        pool(view, PoolingSpec(layers="all"))
    assert pool(view, PoolingSpec(layers=[0])).shape == (1, 8)
    inside = pool(view, PoolingSpec(layers=[1], part="k", window=3, heads="concat"))
    assert reference.relative_error(inside[0], keys[0].mean(dim=1).flatten()) < 1e-6


def test_faults_have_our_names() -> None:
    view, _ = random_cache(3, [4, 2])
    with pytest.raises(InvalidInputError, match="Sequence 1 has no token"):
        pool(view, PoolingSpec(layers="all"), start=[0, 2])
    with pytest.raises(SpecError, match="has 4"):
        pool(view, PoolingSpec(layers="all"), stop=[5, 2])
    with pytest.raises(SpecError, match="frequency of every token"):
        pool(view, PoolingSpec(layers="all", weights="sif"))
    with pytest.raises(SpecError, match="no layer 3"):
        pool(view, PoolingSpec(layers=[3]), num_layers=5)
    for error in (InvalidInputError, SpecError, WindowedLayerError, NonFiniteCacheError):
        assert issubclass(error, KVRouteError)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_reported_where_it_is(bad: float) -> None:
    keys = torch.randn(4, 2, 3, 6, 5)
    keys[2, 1, 0, 3, 4] = bad
    view = KVView.from_contiguous(keys, keys, [6, 5])
    with pytest.raises(NonFiniteCacheError) as caught:
        pool(view, PoolingSpec(layers="all"))
    assert (caught.value.sequence, caught.value.layer, caught.value.position) == (1, 2, 3)
    assert caught.value.hint
    assert np.isfinite(pool(view, PoolingSpec(layers=[0, 1, 3])).numpy()).all()
    assert np.isfinite(pool(view, PoolingSpec(layers="all", window=1)).numpy()).all()  # it is not read


def test_a_sum_that_overflows_is_no_fault_of_the_cache() -> None:
    keys = torch.full((1, 1, 1, 40, 2), 3e38)
    with pytest.raises(InvalidInputError, match="overflows"):
        pool(KVView.from_contiguous(keys, keys, [40]), PoolingSpec(layers="all", tokens="sum"))
