"""Pooled vectors of spans: one prefill a text, however many spans and specs are pooled from it.

:class:`SumStore` keeps the sums over tokens of every layer and head, from which any spec's vector is a cheap reduction,
so that a search over hundreds of specs prefills once. :func:`pool_spans` gives the vectors of chosen specs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import torch

from kvroute.errors import SpecError
from kvroute.heads.examples import Examples
from kvroute.heads.models import Array, Vectors
from kvroute.pooling import PoolingSpec, pool, token_range
from kvroute_kernels import paged_pool

if TYPE_CHECKING:
    from kvroute.info import ModelInfo
    from kvroute_kernels import KVView


class PrefillEngine(Protocol):
    """The part of an engine that is needed here: caches of texts, batch by batch."""

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        ...

    def prefill(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        layers: Sequence[int] | None = None,
        padding: Literal["left", "right"] = "right",
        progress: bool | None = None,
    ) -> Iterator[tuple[list[int], KVView]]:
        """Run texts and give their caches."""
        ...


Reach = tuple[str, int | None]
"""Which tokens of a span are summed: ``all``, ``last`` and ``first`` (one token), or ``window`` with its size."""


def reach_of(spec: PoolingSpec) -> Reach:
    """The tokens that a spec reads."""
    if spec.tokens in ("last", "first"):
        return spec.tokens, None
    return ("all", None) if spec.window is None else ("window", spec.window)


_SPEC_OF: dict[str, dict[str, Any]] = {"all": {}, "last": {"tokens": "last"}, "first": {"tokens": "first"}}


def check_spec(spec: PoolingSpec, info: ModelInfo) -> None:
    """Refuse a spec that a head can't have.

    Raises:
        SpecError: it doesn't fit the model, or needs frequencies of tokens.
    """
    spec.dimension(info)
    if spec.weights == "sif":
        raise SpecError(
            "A head's vectors are pooled while the model runs, without the frequencies that weights='sif' needs.",
            hint="Use weights=None or 'position'.",
        )


def pool_spans(
    engine: PrefillEngine, examples: Examples, specs: Sequence[PoolingSpec], *, progress: bool | None = None
) -> list[Vectors]:
    """Vectors of spans by each spec.

    Args:
        engine: the model.
        examples: texts and spans.
        specs: how to pool; layers above the deepest they read are not run.
        progress: whether to show a bar; by default on a terminal.

    Returns:
        for each spec ``[n, dim]`` float32, in the order of the spans.
    """
    info = engine.info
    out = [np.empty((len(examples), spec.dimension(info)), dtype=np.float32) for spec in specs]
    if not len(examples) or not specs:
        return out
    layers = sorted({layer for spec in specs for layer in spec.resolve(info.num_layers)})
    for view, places, start, stop in _rounds(engine, examples, layers, progress):
        for spec, vectors in zip(specs, out, strict=True):
            pooled = pool(view, spec, num_layers=info.num_layers, start=start, stop=stop)
            vectors[places] = pooled.float().cpu().numpy()
    return out


def _rounds(
    engine: PrefillEngine, examples: Examples, layers: Sequence[int], progress: bool | None
) -> Iterator[tuple[KVView, list[int], list[int], list[int]]]:
    """Views that hold one span a sequence: the view, the spans' places, starts and stops."""
    by_text: list[list[int]] = [[] for _ in examples.texts]
    for place, item in enumerate(examples.items):
        by_text[item.text].append(place)
    # Nothing behind a text's last span is run: tokens see only what stands before them.
    ends = [max((examples.items[p].stop for p in places), default=1) for places in by_text]
    cut = [ids[:end] for ids, end in zip(examples.texts, ends, strict=True)]
    for batch, view in engine.prefill(cut, layers=layers, progress=progress):
        for depth in range(max(len(by_text[i]) for i in batch)):
            rows = [n for n, i in enumerate(batch) if depth < len(by_text[i])]
            places = [by_text[batch[n]][depth] for n in rows]
            part = view if len(rows) == len(batch) else view.select_sequences(rows)
            items = [examples.items[p] for p in places]
            yield part, places, [e.start for e in items], [e.stop for e in items]


class SumStore:
    """Sums over tokens of spans, by layer and head.

    Attributes:
        layers: the layers that are kept: those of the commonest geometry that hold every token of the texts.
        keys, values: by reach ``[n, layers, heads, size]`` float32.
        counts: by reach ``[n]`` float32, tokens summed.
    """

    def __init__(self, layers: Sequence[int], num_layers: int) -> None:
        self.layers = list(layers)
        self.num_layers = num_layers
        self.keys: dict[Reach, Array] = {}
        self.values: dict[Reach, Array] = {}
        self.counts: dict[Reach, Array] = {}

    @staticmethod
    def usable_layers(info: ModelInfo, longest: int) -> list[int]:
        """Layers that are alike and hold all of ``longest`` tokens."""
        whole = [i for i, layer in enumerate(info.layers) if layer.window is None or layer.window >= longest]
        sizes = [info.layers[i].sizes for i in whole]
        if not sizes:
            raise SpecError(
                f"Every layer of {info.name} holds fewer than the {longest} tokens of the longest text.",
                hint="Give a spec with a window that fits.",
            )
        commonest = max(dict.fromkeys(sizes), key=sizes.count)
        return [i for i, s in zip(whole, sizes, strict=True) if s == commonest]

    @staticmethod
    def row_bytes(info: ModelInfo, layers: Sequence[int], reaches: int) -> int:
        """Bytes that one span takes."""
        heads, key_size, value_size = info.layers[layers[0]].sizes
        return 4 * len(layers) * heads * (key_size + value_size) * reaches

    @classmethod
    def fill(
        cls,
        engine: PrefillEngine,
        examples: Examples,
        layers: Sequence[int],
        reaches: Sequence[Reach],
        *,
        progress: bool | None = None,
    ) -> Self:
        """Prefill the texts once and keep the sums of each reach."""
        store = cls(layers, engine.info.num_layers)
        heads, key_size, value_size = engine.info.layers[layers[0]].sizes
        n = len(examples)
        for reach in dict.fromkeys(reaches):
            store.keys[reach] = np.empty((n, len(layers), heads, key_size), dtype=np.float32)
            store.values[reach] = np.empty((n, len(layers), heads, value_size), dtype=np.float32)
            store.counts[reach] = np.empty(n, dtype=np.float32)
        for view, places, start, stop in _rounds(engine, examples, layers, progress):
            for reach in store.keys:
                kind, size = reach
                like = PoolingSpec(**_SPEC_OF.get(kind, {"window": size}))
                spans = [token_range(like, a, b) for a, b in zip(start, stop, strict=True)]
                low, high = [a for a, _ in spans], [b for _, b in spans]
                sums = paged_pool(view, layers=layers, start=low, stop=high)
                assert sums.keys is not None
                assert sums.values is not None
                store.keys[reach][places] = sums.keys.float().cpu().numpy()
                store.values[reach][places] = sums.values.float().cpu().numpy()
                store.counts[reach][places] = sums.weight.float().cpu().numpy()
        return store

    def holds(self, spec: PoolingSpec) -> bool:
        """Whether a spec's vectors can be had from here."""
        return (
            spec.weights is None
            and reach_of(spec) in self.keys
            and set(spec.resolve(self.num_layers)) <= set(self.layers)
        )

    def vectors(self, spec: PoolingSpec, rows: Any = slice(None)) -> Vectors:
        """``[n, dim]`` by a spec, up to rounding those of :func:`pool_spans`.

        Args:
            spec: one that :meth:`holds`.
            rows: which spans; all by default.
        """
        reach = reach_of(spec)
        layers = spec.resolve(self.num_layers)
        if spec.layer_reduce == "last":
            layers = (max(layers),)
        chosen = [self.layers.index(layer) for layer in layers]
        halves = []
        for letter, sums in (("k", self.keys[reach]), ("v", self.values[reach])):
            if letter not in spec.part:
                continue
            x = sums[rows][:, chosen]
            if spec.tokens == "mean":
                x = x / self.counts[reach][rows][:, None, None, None]
            x = x.mean(axis=2) if spec.heads == "mean" else x.reshape(*x.shape[:2], -1)
            if spec.layer_reduce == "concat":
                x = x.reshape(len(x), -1)
            else:
                x = x.sum(axis=1) if spec.layer_reduce == "sum" else x.mean(axis=1)
            halves.append(x)
        vector = np.concatenate(halves, axis=1)
        if spec.normalize:
            vector = torch.nn.functional.normalize(torch.from_numpy(vector), dim=1).numpy()
        return np.ascontiguousarray(vector, dtype=np.float32)
