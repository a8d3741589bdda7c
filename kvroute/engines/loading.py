"""Loading a model for :class:`~kvroute.TransformersEngine`, and describing it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from kvroute.engines.slab import SlabCache
from kvroute.errors import InvalidInputError, KVRouteError, ModelLoadError, UnsupportedModelError
from kvroute.info import LayerInfo, ModelInfo, canonical_rope, sign_digest


def default_device() -> str:
    """Where a model goes that no device is named for: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(
    id_or_path: str | Path,
    *,
    device: str | None,
    dtype: torch.dtype | str,
    revision: str | None,
    trust_remote_code: bool,
    **model_kwargs: Any,
) -> tuple[Any, Any]:
    """A model in evaluation mode on its device, and its tokenizer.

    Raises:
        ModelLoadError: it can't be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvroute.models import BUNDLED, bundled_path

    source: str | Path = bundled_path(str(id_or_path)) if str(id_or_path) in BUNDLED else id_or_path
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise InvalidInputError(f"{dtype!r} is not a dtype.", hint="Use float32, bfloat16, float16 or auto.")
        dtype = found
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, **model_kwargs
        )
    except KVRouteError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"The model {id_or_path} can't be loaded: {error}",
            hint="Give a local folder with config.json and safetensors, a hub id that this machine can reach, "
            f"or one of {sorted(BUNDLED)}.",
        ) from error
    if device is None and "device_map" not in model_kwargs:
        device = default_device()
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ModelLoadError(f"The model does not go to the device {device!r}: {error}") from error
    return model.eval(), tokenizer


@torch.inference_mode()
def describe(
    model: Any, *, name: str | None, revision: str | None, weights: Iterable[tuple[str, torch.Tensor]] | None = None
) -> ModelInfo:
    """What a model is; runs one token through it to see the sizes of its keys and values.

    Args:
        model: a transformers causal model.
        name, revision: what to call it; by default what its config says.
        weights: names and tensors for the fingerprint, where the model itself holds none; by default its parameters.

    Raises:
        UnsupportedModelError: it keeps no KV cache that can be read.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    cache = SlabCache(config, capacity=1)
    try:
        model.get_decoder()(
            input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True
        )
    except KVRouteError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't run with kvroute's cache: {error}",
            hint="kvroute reads causal models with a standard KV cache, such as Llama, Qwen, Mistral, Gemma or Phi.",
        ) from error
    sizes: dict[int, tuple[int, int, int]] = {}
    for slab, indices, _ in cache.slabs:
        if slab.keys is None or slab.values is None:
            continue
        for index in indices:
            sizes[index] = (int(slab.keys.shape[2]), int(slab.keys.shape[4]), int(slab.values.shape[4]))
    layers = tuple(
        LayerInfo(
            model_layer=model_layer,
            kv_heads=sizes[i][0],
            key_size=sizes[i][1],
            value_size=sizes[i][2],
            window=cache.attention_layers[i].window,
        )
        for i, model_layer in enumerate(cache.model_layers)
        if i in sizes
    )
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no layer that keeps keys and values.")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return ModelInfo(
        name=name or config.name_or_path or type(model).__name__,
        revision=revision,
        architecture=type(model).__name__,
        hidden_size=int(text.hidden_size),
        vocab_size=int(text.vocab_size),
        context=int(getattr(text, "max_position_embeddings", None) or 2**31),
        layers=layers,
        model_layers=int(text.num_hidden_layers),
        rope=canonical_rope(text.to_dict()),
        quantization=str(quantization["quant_method"]) if quantization else None,
        weights_digest=sign_digest(model.named_parameters() if weights is None else weights),
        dtype=str(model.dtype).removeprefix("torch."),
    )
