"""Plain float64 twins of what kvroute computes, from transformers' own cache: slow, obvious, independent."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[np.float64]]


@torch.no_grad()
def stock_cache(model: Any, ids: list[int]) -> list[tuple[Array, Array]]:
    """Keys ``[H, T, D]`` and values ``[H, T, Dv]`` of every attention layer, from a plain ``model(ids)``.

    Layers with a sliding window drop tokens from transformers' cache, so what they were given is noted
    as it goes in.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import CacheLayerMixin

    cache = DynamicCache(config=model.config)
    seen: dict[int, tuple[Array, Array]] = {}
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayerMixin):
            continue

        def update(keys: Any, values: Any, *args: Any, _layer: Any = layer, _index: int = index, **kwargs: Any) -> Any:
            seen[_index] = (keys[0].double().numpy(), values[0].double().numpy())
            return type(_layer).update(_layer, keys, values, *args, **kwargs)

        layer.update = update
    model(input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    return [seen[i] for i in sorted(seen)]


def pick_layers(layers: Any, count: int) -> list[int]:
    """What ``PoolingSpec.layers`` says, spelled out."""
    if isinstance(layers, int):
        return [layers % count]
    if isinstance(layers, float):
        return list(range(max(1, int(layers * count + 1e-9))))
    if layers == "all":
        return list(range(count))
    if isinstance(layers, str):
        side, number = layers.split(":")
        return list(range(count))[-int(number) :] if side == "last" else list(range(int(number)))
    return [i % count for i in layers]


def pool(cache: list[tuple[Array, Array]], spec: Any, *, num_layers: int | None = None, sif: Any = None) -> Array:
    """One sequence's vector: tokens, heads, layers, then K and V side by side, then L2."""
    layers = pick_layers(spec.layers, num_layers or len(cache))
    halves = []
    for which, letter in ((0, "k"), (1, "v")):
        if letter not in spec.part:
            continue
        by_layer = []
        for layer in layers:
            x = cache[layer][which]  # [H, T, D]
            length = x.shape[1]
            low = max(0, length - spec.window) if spec.window else 0
            if spec.tokens == "last":
                reduced = x[:, -1]
            elif spec.tokens == "first":
                reduced = x[:, 0]
            else:
                weights = np.ones(length)
                if spec.weights == "position":
                    weights = np.arange(1, length + 1, dtype=np.float64)
                elif spec.weights == "sif":
                    weights = np.asarray(sif, dtype=np.float64)
                reduced = sum(weights[t] * x[:, t] for t in range(low, length))
                if spec.tokens == "mean":
                    reduced = reduced / weights[low:].sum()
            by_layer.append(reduced.mean(axis=0) if spec.heads == "mean" else reduced.reshape(-1))
        stacked = np.stack(by_layer)
        if spec.layer_reduce == "mean":
            halves.append(stacked.mean(axis=0))
        elif spec.layer_reduce == "sum":
            halves.append(stacked.sum(axis=0))
        elif spec.layer_reduce == "last":
            halves.append(stacked[int(np.argmax(layers))])
        else:
            halves.append(stacked.reshape(-1))
    vector = np.concatenate(halves)
    return vector / np.linalg.norm(vector) if spec.normalize else vector


def token_chain(cache: list[tuple[Array, Array]], start: int, stop: int, layers: list[int] | None = None) -> Array:
    """z_t of tokens ``start..stop``: mean over layers of concat over heads of [K; V]."""
    chosen = range(len(cache)) if layers is None else layers
    rows = []
    for t in range(start, stop):
        per_layer = [np.concatenate([cache[i][0][:, t].reshape(-1), cache[i][1][:, t].reshape(-1)]) for i in chosen]
        rows.append(np.mean(per_layer, axis=0))
    return np.array(rows)


def layer_chain(cache: list[tuple[Array, Array]], start: int, stop: int, layers: list[int] | None = None) -> Array:
    """z_l: mean over tokens of concat over heads of [K; V] at layer l."""
    chosen = range(len(cache)) if layers is None else layers
    return np.array(
        [
            np.concatenate(
                [
                    cache[i][0][:, start:stop].mean(axis=1).reshape(-1),
                    cache[i][1][:, start:stop].mean(axis=1).reshape(-1),
                ]
            )
            for i in chosen
        ]
    )


def coe(chain: Array) -> tuple[float, float]:
    """CoE-R and CoE-C of arXiv 2410.13640, straight from the formula."""

    def angle(a: Array, b: Array) -> float:
        return math.acos(max(-1.0, min(1.0, float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))))

    span = float(np.linalg.norm(chain[-1] - chain[0]))
    turn = angle(chain[-1], chain[0])
    m = [float(np.linalg.norm(b - a)) / span for a, b in itertools.pairwise(chain)]
    a = [angle(y, x) / turn for x, y in itertools.pairwise(chain)]
    r = float(np.mean(m) - np.mean(a))
    real = np.mean([x * math.cos(y) for x, y in zip(m, a, strict=True)])
    imaginary = np.mean([x * math.sin(y) for x, y in zip(m, a, strict=True)])
    return r, float(math.hypot(real, imaginary))


def relative_error(found: Any, wanted: Any) -> float:
    """``|found - wanted| / |wanted|`` in the L2 norm."""
    found, wanted = np.asarray(found, dtype=np.float64), np.asarray(wanted, dtype=np.float64)
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-300))
