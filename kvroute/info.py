"""What a model is: sizes, and a fingerprint that fitted things are bound to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from kvroute.errors import ModelMismatchError


class LayerInfo(BaseModel):
    """One attention layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_layer: int
    """Its index among all the model's layers, those without keys and values included."""
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None = None
    """Tokens it attends to, or None for all."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """KV heads, key head size, value head size."""
        return self.kv_heads, self.key_size, self.value_size


class ModelInfo(BaseModel):
    """A model as kvroute sees it. ``fingerprint`` names the checkpoint, not its dtype or its engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str | None = None
    architecture: str
    hidden_size: int
    vocab_size: int
    context: int
    """Tokens the model can take."""
    layers: tuple[LayerInfo, ...]
    """The attention layers, in order; layers without keys and values are not counted."""
    model_layers: int
    """All layers."""
    rope: str
    """RoPE parameters as canonical JSON."""
    quantization: str | None = None
    weights_digest: str
    """:func:`sign_digest` of the checkpoint."""
    dtype: str
    """Of the loaded model; not part of the fingerprint."""

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self.layers)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over architecture, sizes, RoPE, quantization and the weights' digest."""
        facts = self.model_dump(mode="json", exclude={"name", "revision", "dtype", "context"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def require(self, fingerprint: str, what: str, name: str | None = None) -> None:
        """Refuse something fitted on another model.

        Raises:
            ModelMismatchError: naming both models.
        """
        if fingerprint != self.fingerprint:
            raise ModelMismatchError(
                f"{what} was made for {name or 'a model'} ({fingerprint}), and the engine runs "
                f"{self.name} ({self.fingerprint}).",
                hint="Load it with the model it was made for, or make it anew for this one.",
            )


_DIGESTED = (
    "embed_tokens.weight",
    "embed_in.weight",
    "wte.weight",
    "o_proj.weight",
    "attention.dense.weight",
    "self_attn.dense.weight",
    "down_proj.weight",
    "mlp.dense_4h_to_h.weight",
    "q_proj.weight",
    "qkv_proj.weight",
    "query_key_value.weight",
)
_FUSED = {"qkv_proj.weight": "q_proj.weight"}
"""Where an engine fuses matrices by rows, the first rows are still those of the first one."""
DIGEST_ROWS, DIGEST_COLUMNS = 256, 64
"""The corner of a matrix that the digest reads."""


def is_digested(name: str) -> bool:
    """Whether the digest may read a weight of that name."""
    return _ending(name) is not None


def _ending(name: str) -> str | None:
    return next((e for e in _DIGESTED if name.endswith("." + e) or name == e), None)


def sign_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of the signs of a few weights: the same for a checkpoint in any dtype and in any engine.

    Rounding to bfloat16 or float16 changes values but never a sign bit (a value that underflows
    keeps it), while fine-tuning flips some signs of near-zero weights. Read are the first 256 x 64
    entries (of the query projection, which engines fuse with others, the first 64 x 64) of matrices that engines do
    not transpose: the embedding, and of the first, middle and last layer the query projection and the output
    projections of attention and MLP. They lie on the first rank under tensor parallelism too.

    Args:
        parameters: names and tensors, as ``model.named_parameters()`` gives them.

    Returns:
        16 hex digits.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in parameters:
        ending = _ending(name)
        if ending is None or tensor.ndim != 2 or not tensor.is_floating_point():
            continue
        numbers = [int(p) for p in name.split(".") if p.isdigit()]
        found.setdefault(_FUSED.get(ending, ending), {})[numbers[0] if numbers else 0] = tensor
    digest = hashlib.sha256()
    for ending in sorted(found):
        layers = sorted(found[ending])
        for place in sorted({0, len(layers) // 2, len(layers) - 1}):
            tensor = found[ending][layers[place]]
            rows = DIGEST_COLUMNS if ending == "q_proj.weight" else DIGEST_ROWS
            signs = torch.signbit(tensor.detach()[:rows, :DIGEST_COLUMNS].cpu()).to(torch.uint8)
            digest.update(f"{ending}:{layers[place]}:{list(signs.shape)}".encode())
            digest.update(signs.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def canonical_rope(config: Mapping[str, Any]) -> str:
    """RoPE parameters of a transformers config, as canonical JSON."""
    kept = {
        k: config[k]
        for k in ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
        if config.get(k)
    }
    return json.dumps(kept, sort_keys=True, default=str)
