"""Facts read from vLLM's configs; no vLLM here: the objects have the fields that its source (0.32) gives them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvroute.errors import UnsupportedLayoutError
from kvroute.serving.vllm_facts import cache_facts

BLOCKS = 23


def engine_spec(kind: str, **changes):
    """A cache spec with the fields of ``AttentionSpec`` (``v1/kv_cache_interface.py``)."""
    fields = {
        "num_kv_heads": 3,
        "head_size": 10,
        "head_size_v": 10,
        "block_size": 8,
        "dtype": torch.bfloat16,
        "kv_quant_mode": SimpleNamespace(name="NONE"),
        "num_head_slots": None,
        "state_content_bytes": None,
        "tokens_per_state": 1,
    }
    return type(kind, (SimpleNamespace,), {})(**(fields | changes))


def engine_module(backend: str = "FLASH_ATTN", **changes):
    backend_class = SimpleNamespace(get_name=lambda: backend)
    fields = {"kv_cache_dtype": "auto", "sliding_window": None, "get_attn_backend": lambda: backend_class}
    return SimpleNamespace(**(fields | changes))


def engine(groups, modules, *, layers=4, pipeline=1, context=1, **text_config):
    """vLLM's two configs, as far as they are read: groups of (spec, names), modules by name."""
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=modules),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            hf_text_config=SimpleNamespace(**text_config),
            get_total_num_hidden_layers=lambda: layers,
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=pipeline, decode_context_parallel_size=context, prefill_context_parallel_size=1
        ),
    )
    cache = SimpleNamespace(
        num_blocks=BLOCKS,
        kv_tp_replicas=2,
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=names) for spec, names in groups],
    )
    return config, cache


def layer_name(number: int, what: str = "self_attn.attn") -> str:
    return f"model.layers.{number}.{what}"


def test_facts_are_read_in_the_order_of_the_models_layers():
    """Groups as a hybrid of sliding, full and state space layers has them, and a draft model's layer behind them."""
    groups = [
        (engine_spec("SlidingWindowSpec"), [layer_name(3), layer_name(0)]),
        (type("MambaSpec", (), {})(), [layer_name(1, "mixer")]),
        (engine_spec("FullAttentionSpec"), [layer_name(2), layer_name(4)]),
    ]
    modules = {layer_name(i): engine_module(sliding_window=7 if i in (0, 3) else None) for i in (0, 2, 3, 4)}
    facts = cache_facts(*engine(groups, modules | {layer_name(1, "mixer"): object()}))
    assert [(x.index, x.name, x.group, x.window) for x in facts.layers] == [
        (0, layer_name(0), 0, 7),
        (1, layer_name(2), 2, None),
        (2, layer_name(3), 0, 7),
    ]
    assert (facts.num_blocks, facts.context_ranks, facts.replicas) == (BLOCKS, 1, 2)
    assert {x.dtype for x in facts.layers} == {torch.bfloat16}


def test_facts_of_layers_that_differ_in_one_group():
    specs = {
        layer_name(0): engine_spec("FullAttentionSpec"),
        layer_name(1): engine_spec("FullAttentionSpec", head_size=12),
    }
    group = type("UniformTypeKVCacheSpecs", (SimpleNamespace,), {})(kv_cache_specs=specs, block_size=8)
    facts = cache_facts(*engine([(group, list(specs))], {name: engine_module() for name in specs}))
    assert [x.key_size for x in facts.layers] == [10, 12]


def test_facts_of_fp8_and_its_scales():
    spec = engine_spec("FullAttentionSpec", dtype=torch.uint8, kv_quant_mode=SimpleNamespace(name="FP8_PER_TENSOR"))
    module = engine_module(kv_cache_dtype="fp8_e5m2", _k_scale=torch.ones(1), _k_scale_float=0.5, _v_scale_float=3.0)
    (layer,) = cache_facts(*engine([(spec, [layer_name(0)])], {layer_name(0): module})).layers
    assert (layer.dtype, layer.stored) == (torch.bfloat16, torch.float8_e5m2)
    assert (layer.scale_k, layer.scale_v) == (0.5, 3.0)
    module._k_scale = torch.ones(3)
    with pytest.raises(UnsupportedLayoutError, match="3 scales"):
        cache_facts(*engine([(spec, [layer_name(0)])], {layer_name(0): module}))


def test_facts_of_mla():
    spec = engine_spec("MLAAttentionSpec", num_kv_heads=1, head_size=22, head_size_v=0)
    indexer = engine_spec("MLAAttentionSpec", cache_role=SimpleNamespace(value="indexer"))
    modules = {
        layer_name(0): engine_module("FLASHMLA", kv_lora_rank=16),
        layer_name(0, "indexer.k_cache"): engine_module("INDEXER"),
    }
    groups = [(spec, [layer_name(0)]), (indexer, [layer_name(0, "indexer.k_cache")])]
    (layer,) = cache_facts(*engine(groups, modules)).layers
    assert (layer.latent, layer.heads, layer.rope_halves) == (16, 1, False)
    (layer,) = cache_facts(*engine(groups, modules, rope_interleave=True)).layers
    assert layer.rope_halves


def test_facts_that_are_refused():
    spec = engine_spec("FullAttentionSpec")
    names = [layer_name(1), layer_name(1, "cross_attn.attn")]
    with pytest.raises(UnsupportedLayoutError, match="several caches"):
        cache_facts(*engine([(spec, names)], {name: engine_module() for name in names}))
    with pytest.raises(UnsupportedLayoutError, match="can't be placed"):
        cache_facts(*engine([(spec, ["attn"])], {"attn": engine_module()}))


def test_facts_of_a_pipelines_rank_are_numbered_over_the_model():
    spec = engine_spec("FullAttentionSpec")
    names = [layer_name(2), layer_name(3)]
    modules = {name: engine_module() for name in [*names, layer_name(0)]}
    assert [x.index for x in cache_facts(*engine([(spec, names)], modules, pipeline=2)).layers] == [2, 3]
    with pytest.raises(UnsupportedLayoutError, match="pipeline"):
        cache_facts(*engine([(spec, [layer_name(0), layer_name(3)])], modules, pipeline=2))
