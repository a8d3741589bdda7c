"""Pooling: one vector a sequence out of its keys and values.

Order of reduction: tokens, heads, layers, then K and V side by side, then L2 normalisation
(arXiv 2601.20326, section 3; docs/concepts.md). All sums are float32 whatever the cache's dtype.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from kvroute.errors import InvalidInputError, NonFiniteCacheError, SpecError, WindowedLayerError
from kvroute_kernels import KVView, KVViewError, PooledSums, WindowError, Workspace, paged_pool

if TYPE_CHECKING:
    from kvroute.info import ModelInfo

_LAYER_WORD = re.compile(r"(?P<all>all)|(?P<side>last|first):(?P<count>[1-9]\d*)")


def resolve_layers(layers: tuple[int, ...] | float | str, num_layers: int) -> tuple[int, ...]:
    """Layer indices that a spec's ``layers`` means for a model with ``num_layers`` attention layers.

    Raises:
        SpecError: a layer that the model does not have; the message says which there are.
    """
    if num_layers < 1:
        raise SpecError("The model has no attention layer, so there are no keys and values to pool.")
    if isinstance(layers, float):
        return tuple(range(max(1, math.floor(layers * num_layers + 1e-9))))
    if isinstance(layers, str):
        match = _LAYER_WORD.fullmatch(layers)
        assert match is not None  # the spec's validator let it in
        if match["all"]:
            return tuple(range(num_layers))
        count = int(match["count"])
        if count > num_layers:
            raise SpecError(
                f"{layers!r} asks for {count} layers, and the model has {num_layers}.",
                hint=f"Use at most '{match['side']}:{num_layers}', or 'all'.",
            )
        return tuple(range(num_layers - count, num_layers) if match["side"] == "last" else range(count))
    resolved = []
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise SpecError(
                f"Layer {layer} was asked for, and the model has {num_layers} attention layers.",
                hint=f"Use 0 to {num_layers - 1}, or -{num_layers} to -1 from the end.",
            )
        resolved.append(layer % num_layers)
    if len(set(resolved)) != len(resolved):
        raise SpecError(f"Layers {list(layers)} name a layer twice.", hint="Name each layer once.")
    return tuple(resolved)


def check_layers(value: Any) -> Any:
    """Pydantic 'before' validator of a ``layers`` field."""
    if isinstance(value, bool):
        raise ValueError("layers must be indices, 'all', 'last:4', 'first:8' or a fraction such as 0.5")
    if isinstance(value, int):
        return (value,)
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise ValueError(
                f"a fraction of the depth lies above 0 and at most at 1, not {value}; 0.5 is the first half"
            )
        return value
    if isinstance(value, str):
        if not _LAYER_WORD.fullmatch(value):
            raise ValueError(f"{value!r} is none of 'all', 'last:4', 'first:8', indices such as [3, 4], or 0.5")
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        if len(value) == 0:
            raise ValueError("name at least one layer")
        if any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise ValueError("layer indices are whole numbers")
        return tuple(value)
    raise ValueError("layers must be indices, 'all', 'last:4', 'first:8' or a fraction such as 0.5")


class Spec(BaseModel):
    """What specs share: frozen, no unknown fields, our own exception on nonsense."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SpecError(_what_was_wrong(type(self).__name__, error)) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a spec back from its JSON (``spec.model_dump_json()``).

        Raises:
            SpecError: it is not JSON, or not a spec.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise SpecError(_what_was_wrong(cls.__name__, error)) from error

    def to_json(self) -> str:
        """The spec as JSON."""
        return self.model_dump_json()


def _what_was_wrong(name: str, error: ValidationError) -> str:
    faults = "; ".join(
        f"{'.'.join(str(p) for p in e['loc'] if isinstance(p, str) and p.isidentifier()) or 'spec'}: {e['msg']}"
        for e in error.errors(include_url=False, include_context=False, include_input=False)
    )
    return f"Not a {name}: {faults}."


class PoolingSpec(Spec):
    """How keys and values become one vector (arXiv 2601.20326, section 3)."""

    layers: tuple[int, ...] | float | str = "last:4"
    """Attention layers: indices (negative from the end), ``all``, ``last:4``, ``first:8``, or a fraction of the
    depth: 0.5 is the first half."""
    part: Literal["k", "v", "kv"] = "kv"
    """Keys, values, or keys and then values side by side."""
    tokens: Literal["mean", "sum", "last", "first"] = "mean"
    """How tokens are reduced; ``last`` and ``first`` take one token."""
    window: int | None = Field(default=None, ge=1, strict=True)
    """Only the last N tokens, for ``mean`` and ``sum``."""
    weights: Literal["position", "sif"] | None = None
    """Weights of a ``mean``: ``position`` weighs token t (from 0) by t + 1, as SGPT does (arXiv 2202.08904, section
    4.1); ``sif`` by a / (a + p(token)) (Arora et al., ICLR 2017)."""
    sif_a: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """The a of ``sif``."""
    heads: Literal["mean", "concat"] = "mean"
    """How KV heads are reduced."""
    layer_reduce: Literal["mean", "sum", "last", "concat"] = "mean"
    """How layers are reduced; ``last`` takes the deepest."""
    normalize: bool = False
    """Divide by the L2 norm."""

    _check_layers = field_validator("layers", mode="before")(check_layers)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.window is not None and self.tokens in ("last", "first"):
            raise ValueError(
                f"window means nothing for tokens='{self.tokens}', which takes one token; drop it or use 'mean'"
            )
        if self.weights is not None and self.tokens != "mean":
            raise ValueError(f"weights go with tokens='mean', not '{self.tokens}'")
        return self

    @classmethod
    def preset(cls, name: str) -> PoolingSpec:
        """A published or measured preset by name: see :data:`PRESETS`.

        Raises:
            SpecError: no preset has that name; the message lists them.
        """
        try:
            return PRESETS[name]
        except KeyError:
            raise SpecError(f"No preset is named {name!r}.", hint=f"There are: {', '.join(PRESETS)}.") from None

    def resolve(self, num_layers: int) -> tuple[int, ...]:
        """The layer indices for a model with that many attention layers, ascending where reduced by ``last``."""
        return resolve_layers(self.layers, num_layers)

    def read_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose tokens are summed, in order: those of :meth:`resolve`, or the deepest alone."""
        layers = self.resolve(num_layers)
        return (max(layers),) if self.layer_reduce == "last" else layers

    def deepest_layer(self, info: ModelInfo) -> int:
        """Index of the deepest attention layer it reads: no deeper layer has to run."""
        return max(self.resolve(info.num_layers))

    def dimension(self, info: ModelInfo) -> int:
        """Size of the vector for a model.

        Raises:
            SpecError: the layers don't exist, or differ in their sizes.
        """
        layers = self.resolve(info.num_layers)
        sizes = {info.layers[i].sizes for i in layers}
        if len(sizes) > 1:
            raise SpecError(
                f"Layers {list(layers)} of {info.name} differ in heads or head size: {sorted(sizes)}.",
                hint="Choose layers that are alike.",
            )
        heads, key_size, value_size = sizes.pop()
        size = (key_size if "k" in self.part else 0) + (value_size if "v" in self.part else 0)
        if self.heads == "concat":
            size *= heads
        return size * (len(layers) if self.layer_reduce == "concat" else 1)


PRESETS: dict[str, PoolingSpec] = {
    "best": PoolingSpec(layers=0.24, part="v", weights="sif", sif_a=1e-4, heads="concat", layer_reduce="concat"),
    "fast": PoolingSpec(layers=0.14, part="v", weights="sif", sif_a=1e-4, heads="concat", layer_reduce="concat"),
    "paper-mteb": PoolingSpec(
        layers="last:4", part="kv", tokens="mean", heads="mean", layer_reduce="mean", normalize=True
    ),
    "paper-classifier": PoolingSpec(
        layers="last:4", part="kv", tokens="sum", window=64, heads="concat", layer_reduce="mean"
    ),
}
"""``best`` and ``fast`` come out of ``benchmarks/embedding_quality.py`` with SmolLM2-135M-Instruct: the values of the
first 7 and of the first 4 of 30 layers. On its dev rows ``best`` has the highest mean over classification, STS and
retrieval, and ``fast`` is the shallowest that keeps 97.5 % of it. They were chosen whitened to 256 dimensions, which is
worth doing where some hundreds of texts are at hand: ``KVEmbedder(engine).fit(texts, dimension=256)``. For a trained
classifier alone, deeper layers did better there (first half, .693 against .677 by accuracy).

``paper-mteb`` and ``paper-classifier`` are the settings of arXiv 2601.20326."""


def token_range(spec: PoolingSpec, start: int, stop: int) -> tuple[int, int]:
    """Tokens of ``start..stop`` that the spec reads."""
    if spec.tokens == "last":
        return stop - 1, stop
    if spec.tokens == "first":
        return start, start + 1
    if spec.window is not None:
        return max(start, stop - spec.window), stop
    return start, stop


def pool(
    view: KVView,
    spec: PoolingSpec,
    *,
    num_layers: int | None = None,
    start: Sequence[int] | None = None,
    stop: Sequence[int] | None = None,
    sif_weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Pool a cache into one vector a sequence.

    Args:
        view: the cache of B sequences.
        spec: how.
        num_layers: attention layers of the model, where the view holds fewer (a run that stopped early).
        start: first token of each sequence; 0 by default.
        stop: one past the last; the sequence's length by default.
        sif_weights: by sequence, the SIF weight of each of its tokens (all of them, not of the range), for a spec
            with ``weights="sif"``.

    Returns:
        ``[B, dim]`` float32 (float64 for a float64 cache).

    Raises:
        SpecError: the spec does not fit the model or needs weights that are not given.
        InvalidInputError: a range holds no token.
        WindowedLayerError: a layer with a window holds the tokens no more.
        NonFiniteCacheError: NaN or infinity in the cache, with layer and position.
    """
    sums = token_sums(view, spec, num_layers=num_layers, start=start, stop=stop, sif_weights=sif_weights)
    vector = reduced(spec, sums.keys, sums.values, sums.weight)
    if not bool(torch.isfinite(vector).all()):
        fault = view.find_non_finite(spec.read_layers(len(view.layers) if num_layers is None else num_layers))
        if fault is not None:
            raise NonFiniteCacheError(fault.sequence, fault.layer, fault.position, fault.part)
        raise InvalidInputError("The pooled vector overflows, though the cache is finite.", hint="Use tokens='mean'.")
    return vector


def token_sums(
    view: KVView,
    spec: PoolingSpec,
    *,
    num_layers: int | None = None,
    start: Sequence[int] | None = None,
    stop: Sequence[int] | None = None,
    sif_weights: Sequence[Tensor] | None = None,
    workspace: Workspace | None = None,
) -> PooledSums:
    """The first half of :func:`pool`: sums over the spec's tokens. Arguments and errors are those of :func:`pool`; with
    a workspace the sums hold until the next call with it."""
    layers = spec.read_layers(len(view.layers) if num_layers is None else num_layers)
    first = [0] * view.num_sequences if start is None else list(start)
    last = view.host_lengths if stop is None else list(stop)
    for index, (low, high) in enumerate(zip(first, last, strict=True)):
        if low >= high:
            raise InvalidInputError(f"Sequence {index} has no token in {low}..{high} to pool.")
    ranges = [token_range(spec, low, high) for low, high in zip(first, last, strict=True)]
    weights = _weights(spec, ranges, sif_weights, view.lengths.device)
    try:
        return paged_pool(
            view,
            layers=layers,
            start=[r[0] for r in ranges],
            stop=[r[1] for r in ranges],
            part=spec.part,
            weights=weights,
            workspace=workspace,
        )
    except WindowError as error:
        raise WindowedLayerError(
            str(error), hint="Pool a window that fits (window=N), or layers that attend to everything."
        ) from error
    except KVViewError as error:
        raise SpecError(str(error)) from error


def reduced(spec: PoolingSpec, keys: Tensor | None, values: Tensor | None, weight: Tensor) -> Tensor:
    """The second half of :func:`pool`: heads, layers, K beside V, L2 norm.

    Args:
        spec: how.
        keys: ``[B, n_layers, H, D]`` sums over tokens, or None.
        values: ``[B, n_layers, H, Dv]``, or None.
        weight: ``[B]`` sum of the weights.

    Returns:
        ``[B, dim]``.
    """
    halves = [_reduce(s, weight, spec) for s in (keys, values) if s is not None]
    vector = torch.cat(halves, dim=1)
    if spec.normalize:
        vector = torch.nn.functional.normalize(vector, dim=1)
    return vector


def _weights(
    spec: PoolingSpec, ranges: list[tuple[int, int]], sif: Sequence[Tensor] | None, device: torch.device
) -> list[Tensor] | None:
    if spec.weights is None:
        return None
    if spec.weights == "position":
        return [torch.arange(low + 1, high + 1, dtype=torch.float32, device=device) for low, high in ranges]
    if sif is None:
        raise SpecError(
            "weights='sif' needs the frequency of every token.",
            hint="Use KVEmbedder, which brings a frequency table, or pass sif_weights.",
        )
    return [w[low:high] for w, (low, high) in zip(sif, ranges, strict=True)]


def _reduce(sums: Tensor, weight: Tensor, spec: PoolingSpec) -> Tensor:
    """``[B, L, H, D]`` -> ``[B, dim]``."""
    x = sums / weight[:, None, None, None] if spec.tokens == "mean" else sums
    x = x.mean(dim=2) if spec.heads == "mean" else x.flatten(2)
    if spec.layer_reduce == "concat":
        return x.flatten(1)
    if spec.layer_reduce == "sum":
        return x.sum(dim=1)
    return x.mean(dim=1)
