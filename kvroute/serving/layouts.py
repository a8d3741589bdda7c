"""vLLM's cache tensors as pages of keys and values, without a copy.

In vLLM 0.32 every layer's cache has the logical shape ``[B, H, N, C]``: blocks, KV heads of this rank, tokens a
block, content; strides depend on the physical layout and are never assumed. What C holds depends on the backend:

- GPU backends: keys ``C[:D]`` and values ``C[D:D + Dv]`` (``flash_attn.py``, ``triton_attn.py``, ``flashinfer.py``).
- CPU attention: an area of ``2 * N * D`` elements a block and head, packed as :mod:`kvroute.serving.cpu_layout` finds.
- MLA: one head; C is the latent (after its norm), then the shared rope key. transformers' cache keeps the same two
  as "keys" and "values" of one head, so those are the keys and values here too, and a pooled vector means the
  same in both engines. Models whose transformers code stores the rope key in halves (DeepSeek-V3) rather than in
  pairs, as vLLM does, get it reordered.

Per-tensor FP8 and reordered rope keys can't be had by strides: :func:`view_of` converts the pages that are read.
All else is refused with the reason. Nothing here imports vLLM; :mod:`kvroute.serving.vllm_facts` reads the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvroute.errors import UnsupportedLayoutError
from kvroute.serving.cpu_layout import CacheWriter, PartStrides, find_area
from kvroute.serving.pages import LayerPages, kernel_pages, view_of

__all__ = ["CacheFacts", "LayerFacts", "LayerPages", "kernel_pages", "layer_pages", "view_of"]

KEYS_THEN_VALUES = frozenset(
    {
        "FLASH_ATTN",
        "FLASH_ATTN_DIFFKV",
        "FLASHINFER",
        "FLEX_ATTENTION",
        "HPC_ATTN",
        "ROCM_AITER_UNIFIED_ATTN",
        "TRITON_ATTN",
        "TRITON_ATTN_DIFFKV",
    }
)
"""Backends whose content is a token's key, then its value, as read in their source (vLLM 0.32)."""
LATENT = frozenset(
    {
        "AMX_MLA",
        "CPU_MLA",
        "CUTLASS_MLA",
        "FLASHINFER_MLA",
        "FLASHMLA",
        "FLASH_ATTN_MLA",
        "ROCM_AITER_MLA",
        "ROCM_AITER_TRITON_MLA",
        "TOKENSPEED_MLA",
        "TRITON_MLA",
    }
)
"""Backends whose content is a token's latent, then its rope key."""
CPU = "CPU_ATTN"
FULL, WINDOWED, MLA = "FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What the engine says of one attention layer.

    Attributes:
        name: the engine's name of it.
        index: attention layer, from 0.
        group: its KV cache group; block ids come by group.
        spec: class name of its cache spec.
        backend: the attention backend's name.
        heads: KV heads on this rank.
        key_size: size of a key; of latent and rope key together for MLA.
        value_size: size of a value; 0 for MLA.
        block_size: tokens of a block that the engine hands out.
        dtype: of the model's keys and values.
        quantization: name of the engine's KV quantization mode.
        stored: what the cache's bytes are where quantized: a float8.
        window: tokens the layer attends to, or None for all.
        head_slots: heads of the page where they are not the KV heads, or None.
        content_bytes: bytes of a packed content, or None.
        tokens_per_state: tokens that share a stored state; 1 for plain attention.
        isa: the CPU backend's instruction set, or None.
        scale_k: a stored key times this is the key.
        scale_v: the same of values.
        latent: size of the latent, for MLA.
        rope_halves: transformers keeps this model's rope key in halves where the engine keeps pairs.
    """

    name: str
    index: int
    group: int
    spec: str
    backend: str
    heads: int
    key_size: int
    value_size: int
    block_size: int
    dtype: torch.dtype
    quantization: str = "NONE"
    stored: torch.dtype | None = None
    window: int | None = None
    head_slots: int | None = None
    content_bytes: int | None = None
    tokens_per_state: float = 1
    isa: str | None = None
    scale_k: float = 1.0
    scale_v: float = 1.0
    latent: int | None = None
    rope_halves: bool = False


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """What the engine says of its KV cache on one rank.

    Attributes:
        layers: the attention layers, in order of their index.
        num_blocks: blocks that the engine hands out.
        context_ranks: ranks that share a sequence's tokens (context parallel); only 1 can be read.
        replicas: consecutive tensor parallel ranks that hold the same heads (1: each has its own).
    """

    layers: tuple[LayerFacts, ...]
    num_blocks: int
    context_ranks: int = 1
    replicas: int = 1


def layer_pages(facts: CacheFacts, tensors: Mapping[str, Tensor], write: CacheWriter | None = None) -> list[LayerPages]:
    """The pages of every attention layer, in order of the layers' index.

    Args:
        facts: what the engine says of its cache.
        tensors: the engine's cache of every layer by name, ``[B, H, N, C]``.
        write: the engine's op that writes the CPU backend's cache; only needed where that backend runs.

    Raises:
        UnsupportedLayoutError: a layer's cache can't be read, with the reason.
    """
    if facts.context_ranks != 1:
        raise UnsupportedLayoutError(
            f"{facts.context_ranks} ranks share the tokens of a sequence (context parallel).",
            hint="Serve with decode and prefill context parallel sizes of 1; tensor parallel works.",
        )
    if not facts.layers:
        raise UnsupportedLayoutError("The model keeps no keys and values.", hint="Serve a model with attention layers.")
    found: dict[object, tuple[PartStrides, PartStrides]] = {}
    return [_pages_of(layer, facts.num_blocks, tensors, write, found) for layer in facts.layers]


def _pages_of(
    layer: LayerFacts,
    num_blocks: int,
    tensors: Mapping[str, Tensor],
    write: CacheWriter | None,
    found: dict[object, tuple[PartStrides, PartStrides]],
) -> LayerPages:
    _check_facts(layer)
    if layer.name not in tensors:
        raise _refuse(layer, "the engine registered no cache tensor for it", "Ask the kvroute project with the model.")
    tensor = tensors[layer.name]
    quantized = layer.stored is not None
    expected = torch.uint8 if quantized else layer.dtype
    if tensor.dtype != expected and tensor.dtype != layer.stored:
        raise _refuse(layer, f"its cache holds {tensor.dtype}, and {expected} was expected")
    content = layer.key_size + layer.value_size
    if tensor.ndim != 4 or tensor.shape[1] != layer.heads or tensor.shape[3] != content:
        raise _refuse(layer, f"its cache is {list(tensor.shape)}, and [B, {layer.heads}, N, {content}] was expected")
    ratio = tensor.shape[0] // num_blocks
    if ratio < 1 or tensor.shape[0] != ratio * num_blocks or tensor.shape[2] * ratio != layer.block_size:
        raise _refuse(
            layer,
            f"{tensor.shape[0]} pages of {tensor.shape[2]} tokens do not make {num_blocks} blocks of "
            f"{layer.block_size}",
        )
    if layer.stored is not None:
        tensor = tensor.view(layer.stored)  # same size, so any strides will do
    split = layer.key_size if layer.latent is None else layer.latent
    keys, values = tensor[..., :split], tensor[..., split:]
    if layer.backend == CPU:
        keys, values = _cpu_parts(layer, tensor, write, found)
    order = None
    if layer.rope_halves:
        size = values.shape[3]
        order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)]).to(tensor.device)
    return LayerPages(
        index=layer.index,
        name=layer.name,
        keys=keys,
        values=values,
        group=layer.group,
        window=layer.window,
        drops=layer.spec == WINDOWED,
        ratio=ratio,
        scale_k=layer.scale_k if quantized else 1.0,
        # a latent and its rope key are stored with one scale, the keys'
        scale_v=(layer.scale_v if layer.latent is None else layer.scale_k) if quantized else 1.0,
        value_order=order,
    )


def _check_facts(layer: LayerFacts) -> None:
    """Refuse what the facts alone forbid."""
    if layer.spec not in (FULL, WINDOWED, MLA):
        raise _refuse(layer, f"its cache is a {layer.spec}", "Full, sliding window and MLA caches can be read.")
    if layer.quantization not in ("NONE", "FP8_PER_TENSOR"):
        raise _refuse(
            layer,
            f"its cache is quantized as {layer.quantization}",
            "Use --kv-cache-dtype auto, or fp8 with one scale a tensor.",
        )
    if (layer.quantization == "NONE") != (layer.stored is None):
        raise _refuse(layer, f"quantization {layer.quantization} does not go with stored {layer.stored}")
    if layer.stored is not None and (layer.stored.itemsize != 1 or not layer.stored.is_floating_point):
        raise _refuse(layer, f"its cache stores {layer.stored}, which is no float8")
    if layer.dtype not in _FLOATS:
        raise _refuse(layer, f"its keys and values are {layer.dtype}")
    if layer.content_bytes is not None or layer.head_slots is not None:
        raise _refuse(
            layer,
            f"its backend {layer.backend} packs the cache in a way of its own "
            f"(head slots {layer.head_slots}, content bytes {layer.content_bytes})",
            "Choose another attention backend or KV cache dtype.",
        )
    if layer.tokens_per_state != 1:
        raise _refuse(layer, f"{layer.tokens_per_state} tokens share one state of its cache")
    latent = layer.spec == MLA
    if latent != (layer.latent is not None) or (latent and (layer.heads != 1 or layer.value_size != 0)):
        raise _refuse(layer, f"a {layer.spec} with latent {layer.latent} and {layer.heads} heads")
    known = LATENT if latent else KEYS_THEN_VALUES | {CPU}
    if layer.backend not in known:
        raise _refuse(
            layer,
            f"the layout of the backend {layer.backend or 'unnamed'} is not known",
            f"Use one of {sorted(known)}.",
        )
    if layer.rope_halves and not latent:
        raise _refuse(layer, "only a latent cache keeps its rope key apart")


def _cpu_parts(
    layer: LayerFacts,
    tensor: Tensor,
    write: CacheWriter | None,
    found: dict[object, tuple[PartStrides, PartStrides]],
) -> tuple[Tensor, Tensor]:
    """Keys and values of the CPU backend's cache, by the strides that its own op shows."""
    if write is None or layer.isa is None:
        raise _refuse(layer, "the engine's op that writes the CPU cache, or its instruction set, is not known")
    pages, heads, tokens, content = tensor.shape
    if layer.key_size != layer.value_size:
        raise _refuse(layer, f"keys of {layer.key_size} and values of {layer.value_size} on the CPU backend")
    if tensor.stride()[2:] != (content, 1):
        raise _refuse(layer, f"a block's area is not in one piece (strides {tensor.stride()})")
    kind = (heads, tokens, layer.key_size, layer.dtype, layer.isa, layer.stored)
    if kind not in found:
        found[kind] = find_area(
            write,
            heads=heads,
            tokens=tokens,
            size=layer.key_size,
            dtype=layer.dtype,
            isa=layer.isa,
            stored=layer.stored,
        )
    keys, values = (
        tensor.as_strided(
            (pages, heads, tokens, layer.key_size),
            (tensor.stride(0), tensor.stride(1), part.token_stride, part.dim_stride),
            tensor.storage_offset() + part.offset,
        )
        for part in found[kind]
    )
    return keys, values


def _refuse(layer: LayerFacts, reason: str, hint: str | None = None) -> UnsupportedLayoutError:
    return UnsupportedLayoutError(f"kvroute can't read the cache of layer {layer.name}: {reason}.", hint=hint)
