"""The engine's KV cache: one stacked storage for all layers of a kind, growing in place.

transformers' ``DynamicCache`` keeps a tensor a layer and copies all of it at every token. A
:class:`Slab` keeps the layers of one geometry in one tensor ``[L, B, H, C, D]`` with spare
capacity C: a step writes one token, and pooling or a chain step reads all layers in one op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvroute.errors import UnsupportedModelError
from kvroute_kernels import KVGroup, KVView, PageTable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class StopForwardError(Exception):
    """Leaves the model's forward once the deepest layer that is asked for has its keys and values.

    Nothing in the model is changed, so there is nothing to put back, whatever thread or exception.
    """


class Slab:
    """Keys ``[L, B, H, C, D]`` and values ``[L, B, H, C, Dv]`` of some layers; capacity C grows."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.num_layers = num_layers
        self.capacity = capacity
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def reserve(self, like_keys: Tensor, like_values: Tensor, length: int) -> None:
        """Make room for ``length`` tokens."""
        if self.keys is not None and length <= self.keys.shape[3]:
            return
        grown = self.capacity if self.keys is None else max(length, self.keys.shape[3] * 3 // 2)
        capacity = max(length, grown)
        batch, heads = like_keys.shape[:2]
        old = (self.keys, self.values)
        fresh = []
        for like, previous in zip((like_keys, like_values), old, strict=True):
            new = like.new_empty(self.num_layers, batch, heads, capacity, like.shape[3])
            if previous is not None:
                new[:, :, :, : previous.shape[3]] = previous
            fresh.append(new)
        self.keys, self.values = fresh

    def select(self, rows: Tensor) -> None:
        """Keep only some sequences."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys[:, rows]
            self.values = self.values[:, rows]


class SlabLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's place in a slab, as transformers' models see it.

    A layer with a sliding window keeps all its tokens here: the model's mask hides the old ones, and
    features may still read them.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, slab: Slab | None, place: int, window: int | None, *, stop: bool) -> None:
        super().__init__()
        self.slab = slab
        self.place = place
        self.window = window
        self.stop = stop
        self.length = 0
        self.is_sliding = window is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is made at the first update."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write new keys and values ``[B, H, n, D]``; returns all of them so far."""
        before, self.length = self.length, self.length + key_states.shape[2]
        self.is_initialized = True
        if self.slab is None:  # a prefill that reads other layers only: nothing to keep
            return key_states, value_states
        slab = self.slab
        slab.reserve(key_states, value_states, self.length)
        assert slab.keys is not None
        assert slab.values is not None
        keys, values = slab.keys[self.place], slab.values[self.place]
        keys[:, :, before : self.length] = key_states
        values[:, :, before : self.length] = value_states
        if self.stop:
            raise StopForwardError
        if before == 0:
            return key_states, value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that :meth:`update` will return."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class SlabCache(Cache):  # type: ignore[misc]
    """A transformers cache over slabs, made for one run of one model.

    Args:
        config: the model's config; says which layers keep keys and values.
        keep: attention layers to keep (all by default; a run that will be continued needs all).
        stop_after: attention layer after whose keys and values the forward is left, or None.
        capacity: tokens to make room for at first.

    Raises:
        UnsupportedModelError: a kind of cache layer kvroute can't read.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        keep: frozenset[int] | None = None,
        stop_after: int | None = None,
        capacity: int = 0,
    ) -> None:
        template = DynamicCache(config=config)
        text_config = config.get_text_config(decoder=True)
        geometry = _layer_geometry(text_config, len(template.layers))
        layers: list[Any] = []
        members: dict[Any, list[int]] = {}
        attention = -1
        self.attention_layers: list[SlabLayer] = []
        self.model_layers: list[int] = []
        for index, layer in enumerate(template.layers):
            kind = type(layer)
            if kind is not DynamicLayer and kind is not DynamicSlidingWindowLayer:
                if isinstance(layer, LinearAttentionCacheLayerMixin) and isinstance(layer, CacheLayerMixin):
                    raise UnsupportedModelError(
                        f"Layer {index} keeps a {kind.__name__}, whose keys and values kvroute can't read.",
                        hint="Layers that mix attention and a recurrent state are not supported.",
                    )
                layers.append(layer)
                continue
            attention += 1
            window = int(layer.sliding_window) if kind is DynamicSlidingWindowLayer else None
            keeps = keep is None or attention in keep
            made = SlabLayer(None, 0, window, stop=attention == stop_after)
            if keeps or made.stop:
                members.setdefault((window, geometry[index]), []).append(attention)
            self.attention_layers.append(made)
            self.model_layers.append(index)
            layers.append(made)
        self.slabs: list[tuple[Slab, tuple[int, ...], int | None]] = []
        for (window, _), indices in members.items():
            slab = Slab(len(indices), capacity)
            for place, a in enumerate(indices):
                self.attention_layers[a].slab = slab
                self.attention_layers[a].place = place
            self.slabs.append((slab, tuple(indices), window))
        super().__init__(layers=layers)

    def view(self, lengths: Tensor, padding: Tensor | None = None) -> KVView:
        """The picture that pooling and chains take.

        Args:
            lengths: ``[B]`` int64, true tokens of each sequence.
            padding: ``[B]`` int64, padding tokens on the left of each, or None for none.
        """
        batch = lengths.shape[0]
        zeros = torch.zeros_like(lengths)
        pages = torch.arange(batch, device=lengths.device)[:, None]
        table = PageTable(pages, zeros if padding is None else padding, zeros)
        groups = [
            KVGroup(layers, slab.keys, slab.values, table, window)
            for slab, layers, window in self.slabs
            if slab.keys is not None and slab.values is not None
        ]
        return KVView(groups, lengths)

    def select_sequences(self, rows: Tensor) -> None:
        """Keep only some sequences, in all layers."""
        for slab, _, _ in self.slabs:
            slab.select(rows)
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(rows)

    def copy_sequence(self, config: PreTrainedConfig, lane: int, begin: int, count: int) -> SlabCache:
        """A cache that holds ``count`` tokens of one sequence, from slot ``begin``; nothing is shared with this one."""
        made = SlabCache(config)
        for (slab, _, _), (source, _, _) in zip(made.slabs, self.slabs, strict=True):
            assert source.keys is not None
            assert source.values is not None
            slab.keys = source.keys[:, lane : lane + 1, :, begin : begin + count].clone()
            slab.values = source.values[:, lane : lane + 1, :, begin : begin + count].clone()
        for layer in made.attention_layers:
            layer.length = count
            layer.is_initialized = True
        return made

    def continue_from(self, other: SlabCache, kept: list[int], width: int) -> None:
        """Begin with the first tokens of another cache of one sequence.

        Args:
            other: the cache to copy from.
            kept: by sequence of this cache, how many of the other's tokens it begins with; those of the
                longest prompt end in the same slot for all.
            width: tokens of the longest prompt.

        Raises:
            UnsupportedModelError: the model has layers with a recurrent state, which can't be copied by token.
        """
        if len(self.attention_layers) != len(self.layers):
            raise UnsupportedModelError(
                "A prefix can be continued only where every layer keeps keys and values.",
                hint="Generate without a prefix for this model.",
            )
        end = max(kept)
        for (slab, _, _), (source, _, _) in zip(self.slabs, other.slabs, strict=True):
            assert source.keys is not None
            assert source.values is not None
            shape = (len(kept), *source.keys.shape[2:3], 1)
            slab.capacity = max(slab.capacity, width)
            slab.reserve(
                source.keys.new_empty(*shape, source.keys.shape[4]),
                source.values.new_empty(*shape, source.values.shape[4]),
                width,
            )
            assert slab.keys is not None
            assert slab.values is not None
            for b, count in enumerate(kept):
                if count > 0:
                    slab.keys[:, b, :, end - count : end] = source.keys[:, 0, :, :count]
                    slab.values[:, b, :, end - count : end] = source.values[:, 0, :, :count]
                slab.keys[:, b, :, : end - max(count, 0)] = 0  # padding is masked, but must be finite
                slab.values[:, b, :, : end - max(count, 0)] = 0
        for layer in self.attention_layers:
            layer.length = end
            layer.is_initialized = True


def _layer_geometry(config: Any, count: int) -> list[Any]:
    """Something equal for layers whose keys and values have equal sizes."""
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is None:
        return [None] * count
    fields = ("num_key_value_heads", "num_attention_heads", "head_dim", "global_head_dim")
    return [tuple(str(getattr(layer, f, None)) for f in fields) for layer in per_layer]
