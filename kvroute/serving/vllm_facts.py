"""What :mod:`kvroute.serving.layouts` must know, read from vLLM's own objects (0.32).

Only this module knows their names. vLLM is imported inside functions, and its classes are recognised by name, so that
facts can be tested with objects built as its source builds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvroute.errors import UnsupportedLayoutError
from kvroute.serving.cpu_layout import CacheWriter
from kvroute.serving.layouts import FULL, MLA, CacheFacts, LayerFacts

_NO_KEYS = frozenset({"MambaSpec", "HiddenStateCacheSpec"})
"""Caches of something else than a layer's keys and values."""
_HOLDING = frozenset({FULL, MLA})
"""Caches whose blocks hold all tokens of a request."""


def cache_facts(vllm_config: Any, kv_cache_config: Any) -> CacheFacts:
    """The facts about every attention layer of the served model on this rank.

    Left out are caches that hold no keys and values (state space models, an indexer, another connector's hidden
    states) and the layers of a draft model.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
        kv_cache_config: vLLM's ``KVCacheConfig``.

    Raises:
        UnsupportedLayoutError: layers that can't be told apart, or scales that are not one number.
    """
    modules = vllm_config.compilation_config.static_forward_context
    hf_config = vllm_config.model_config.hf_text_config
    total = vllm_config.model_config.get_total_num_hidden_layers()
    read: list[tuple[int, str, int, Any]] = []
    for group, cache_group in enumerate(kv_cache_config.kv_cache_groups):
        for name in cache_group.layer_names:
            spec = cache_group.kv_cache_spec
            spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
            role = getattr(getattr(spec, "cache_role", None), "value", None)
            if type(spec).__name__ in _NO_KEYS or role == "indexer" or not hasattr(modules[name], "get_attn_backend"):
                continue
            number = _layer_number(name)
            if number < total:  # a draft model's layers are counted on from the model's
                read.append((number, name, group, spec))
    read.sort(key=lambda entry: entry[:2])
    numbers = [number for number, *_ in read]
    if len(set(numbers)) != len(numbers):
        twice = next(n for i, n in enumerate(numbers) if n in numbers[:i])
        raise UnsupportedLayoutError(
            f"Layer {twice} of the model has several caches: {[name for n, name, *_ in read if n == twice]}.",
            hint="kvroute reads decoder-only models.",
        )
    parallel = vllm_config.parallel_config
    start = _first_index(numbers, parallel)
    return CacheFacts(
        layers=tuple(
            _layer_facts(start + rank, name, group, spec, modules[name], vllm_config, hf_config)
            for rank, (_, name, group, spec) in enumerate(read)
        ),
        num_blocks=kv_cache_config.num_blocks,
        context_ranks=parallel.decode_context_parallel_size * getattr(parallel, "prefill_context_parallel_size", 1),
        replicas=getattr(kv_cache_config, "kv_tp_replicas", 1),
    )


def holds_pages(kv_cache_config: Any) -> bool:
    """Whether every layer's blocks hold all tokens of a request until it ends: none is given up on the way."""
    specs = [
        spec
        for group in kv_cache_config.kv_cache_groups
        for spec in getattr(group.kv_cache_spec, "kv_cache_specs", {"": group.kv_cache_spec}).values()
    ]
    return all(type(spec).__name__ in _HOLDING for spec in specs)


def layer_sizes(vllm_config: Any, kv_cache_config: Any) -> list[tuple[int, int, int, int]]:
    """Layer number, KV heads of all ranks, key and value size of every attention layer, without the running model.

    Raises:
        UnsupportedLayoutError: layers that can't be told apart.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    total = model.get_total_num_hidden_layers()
    ranks = parallel.tensor_parallel_size // getattr(kv_cache_config, "kv_tp_replicas", 1)
    found = []
    for group in kv_cache_config.kv_cache_groups:
        for name in group.layer_names:
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            role = getattr(getattr(spec, "cache_role", None), "value", None)
            if type(spec).__name__ in _NO_KEYS or role == "indexer" or not hasattr(spec, "num_kv_heads"):
                continue
            number = _layer_number(name)
            if number >= total:
                continue
            if type(spec).__name__ == "MLAAttentionSpec":
                rope = int(model.hf_text_config.qk_rope_head_dim)
                found.append((number, 1, spec.head_size - rope, rope))
            else:
                found.append((number, spec.num_kv_heads * ranks, spec.head_size, spec.head_size_v))
    return sorted(found)


def cpu_writer(cache_dtype: str = "auto") -> CacheWriter:
    """The engine's op that writes the CPU backend's cache (``cpu_attn.py``, ``do_kv_cache_update``), scales 1."""
    from vllm import _custom_ops as ops

    op: Callable[..., None] = ops.cpu_attn_reshape_and_cache

    def write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, isa: str) -> None:
        op(key, value, key_cache, value_cache, slots, isa, kv_cache_dtype=cache_dtype)

    return write


def _layer_facts(
    index: int, name: str, group: int, spec: Any, module: Any, vllm_config: Any, hf_config: Any
) -> LayerFacts:
    quantization = spec.kv_quant_mode.name
    latent = getattr(module, "kv_lora_rank", None) if type(spec).__name__ == "MLAAttentionSpec" else None
    stored: torch.dtype | None = None
    scales = (1.0, 1.0)
    if quantization == "FP8_PER_TENSOR":
        stored = _float8(module.kv_cache_dtype)
        scales = (_scale(module, "_k_scale", name), _scale(module, "_v_scale", name))
    return LayerFacts(
        name=name,
        index=index,
        group=group,
        spec=type(spec).__name__,
        backend=module.get_attn_backend().get_name(),
        heads=spec.num_kv_heads,
        key_size=spec.head_size,
        value_size=spec.head_size_v,
        block_size=spec.block_size,
        dtype=vllm_config.model_config.dtype if stored is not None else spec.dtype,
        quantization=quantization,
        stored=stored,
        window=getattr(module, "sliding_window", None),
        head_slots=spec.num_head_slots,
        content_bytes=spec.state_content_bytes,
        tokens_per_state=float(spec.tokens_per_state),
        isa=getattr(module, "isa", None),
        scale_k=scales[0],
        scale_v=scales[1],
        latent=latent,
        rope_halves=latent is not None and bool(getattr(hf_config, "rope_interleave", False)),
    )


def _layer_number(name: str) -> int:
    """The model's layer number in a name such as ``model.layers.3.self_attn.attn``."""
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1:
        raise UnsupportedLayoutError(
            f"The attention layer {name} can't be placed: its name should hold one number.",
            hint="kvroute reads decoder-only models whose layers are numbered.",
        )
    return numbers[0]


def _first_index(numbers: list[int], parallel: Any) -> int:
    """Index of this rank's first attention layer, counted over the whole model."""
    if parallel.pipeline_parallel_size == 1 or not numbers:
        return 0
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UnsupportedLayoutError(
            "The model has layers without keys and values and runs in a pipeline, so a rank can't number its own.",
            hint="Serve it with a pipeline parallel size of 1.",
        )
    return numbers[0]


def _float8(cache_dtype: str) -> torch.dtype:
    if cache_dtype == "fp8_e5m2":
        return torch.float8_e5m2
    from vllm.platforms import current_platform

    dtype: torch.dtype = current_platform.fp8_dtype()  # ROCm has an e4m3 of its own on some GPUs
    return dtype


def _scale(module: Any, part: str, name: str) -> float:
    tensor = getattr(module, part, None)
    if isinstance(tensor, Tensor) and tensor.numel() != 1:
        raise UnsupportedLayoutError(
            f"The FP8 cache of layer {name} has {tensor.numel()} scales.",
            hint="Use a checkpoint with one KV scale a tensor.",
        )
    return float(getattr(module, part + "_float", 1.0))
