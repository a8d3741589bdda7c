"""What is compared: ways to pool keys and values, and ways to pool hidden states, at every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from kvroute import PoolingSpec
from quality.extract import WEIGHTS, Store, sif_name
from quality.measures import Array


@dataclass(frozen=True)
class Candidate:
    """A way from the store to one raw vector a text.

    Attributes:
        side: ``kv`` or ``hidden``.
        layers: attention layers, or the one hidden state (0 is the embedding).
        part: ``k``, ``v`` or ``kv``.
        weights: of the mean over tokens; ``last`` for the last token of the prompted texts.
        first: whether the first token counts.
        reduce: ``concat`` or ``mean`` over layers (heads side by side), or ``paper`` (mean over layers and heads).
    """

    side: Literal["kv", "hidden"]
    layers: tuple[int, ...]
    part: str = "kv"
    weights: str = "mean"
    first: bool = True
    reduce: str = "concat"

    @classmethod
    def of(cls, spec: PoolingSpec, num_layers: int) -> Candidate:
        """A preset as a candidate. Its length does not matter: vectors are compared by their cosines."""
        weights = {None: "mean", "position": "position", "sif": sif_name(spec.sif_a)}[spec.weights]
        reduce = spec.layer_reduce if spec.heads == "concat" else "paper"
        return cls("kv", spec.resolve(num_layers), spec.part, weights, True, reduce)

    @property
    def depth(self) -> int:
        """Layers that have to run."""
        return max(self.layers) + (1 if self.side == "kv" else 0)

    @property
    def name(self) -> str:
        """What a table says."""
        weights = "last token, prompted" if self.weights == "last" else self.weights
        if self.side == "hidden":
            return f"hidden {self.layers[0]}, {weights}{'' if self.first else ', no first token'}"
        reduce = {"concat": "side by side", "mean": "mean of layers", "paper": "mean of layers and heads"}[self.reduce]
        return f"{self.part.upper()} {_spans(self.layers)}, {reduce if len(self.layers) > 1 else '1 layer'}, {weights}"

    @property
    def parts(self) -> int:
        """Parts of equal size that lie side by side in its vector."""
        if self.side == "hidden":
            return 1
        return len(self.part) * (len(self.layers) if self.reduce == "concat" else 1)

    def pieces(self) -> list[Candidate]:
        """Candidates whose vectors side by side are this one's, up to the order of dimensions."""
        if self.side == "hidden" or self.reduce != "concat":
            return [self]
        return [replace(self, layers=(layer,), part=part) for layer in self.layers for part in self.part]

    def matrix(self, store: Store) -> Array:
        """``[n, dim]`` float32 for all texts of the store."""
        if self.weights == "last":
            x = store.arrays["kv_last" if self.side == "kv" else "hidden_last"]
        elif self.side == "kv":
            x = store.arrays["kv"][:, WEIGHTS.index(self.weights)]
        else:
            x = store.arrays["hidden"][:, 0 if self.first else 1, WEIGHTS.index(self.weights)]
        if self.side == "hidden":
            return np.asarray(x[:, self.layers[0]], dtype=np.float32)
        halves = []
        for part in self.part:
            half = x[:, list(self.layers), "kv".index(part)]  # [n, L, H * D]
            if self.reduce != "concat":
                half = half.astype(np.float32).mean(axis=1, keepdims=True)
            if self.reduce == "paper":
                half = half.reshape(len(x), store.heads, -1).mean(axis=1)
            halves.append(half.reshape(len(x), -1).astype(np.float32))
        return np.concatenate(halves, axis=1)


def kv_candidates(num_layers: int, *, prompted: bool = False) -> list[Candidate]:
    """Prefixes of the depth, bands, a shallow part with the last layers, every second layer, and single layers."""

    def at(fraction: float) -> int:
        return round(num_layers * fraction)

    whole = range(num_layers)
    sets = [tuple(range(at(f))) for f in (1 / 8, 1 / 5, 7 / 30, 4 / 15, 1 / 3, 2 / 5, 1 / 2, 2 / 3, 1)]
    sets += [tuple(range(at(low), at(high))) for low, high in ((1 / 8, 1 / 3), (1 / 4, 1 / 2), (1 / 2, 1), (2 / 3, 1))]
    sets += [tuple(range(num_layers - 4, num_layers)), tuple(whole[::2]), tuple(range(0, at(1 / 2), 2))]
    sets += [tuple(range(at(4 / 15))) + tuple(range(num_layers - n, num_layers)) for n in (2, 4, 8)]
    sets += [(*range(at(1 / 5)), *range(at(2 / 5), at(2 / 5) + 2))]
    sets += [(*range(at(4 / 15)), at(1 / 2) - 1, *range(at(3 / 4), at(7 / 8)))]
    sets = [tuple(dict.fromkeys(layer for layer in s if layer < num_layers)) for s in sets if s]
    out = []
    for weights in ("last",) if prompted else WEIGHTS:
        for layers in list(dict.fromkeys(sets))[:: 1 if weights.startswith(("sif", "last")) else 3]:  # a coarser look
            out += [Candidate("kv", layers, "v", weights), Candidate("kv", layers, "v", weights, reduce="mean")]
            if weights != "position":
                out += [Candidate("kv", layers, "kv", weights)]
            if weights in ("mean", "last"):
                out += [Candidate("kv", layers, "k", weights)]
        if weights not in ("mean", "position", "last"):
            out += [Candidate("kv", (layer,), "v", weights) for layer in whole]
    return list(dict.fromkeys(out))


def hidden_candidates(num_layers: int, *, prompted: bool = False) -> list[Candidate]:
    """Every hidden state; the mean with and without the first token."""
    return [
        Candidate("hidden", (layer,), "h", weights, first)
        for weights in (("last",) if prompted else WEIGHTS)
        for layer in range(1 if prompted else 0, num_layers + 1)  # the last token of a prompt is always the same one
        for first in ((True,) if prompted else (True, False))
    ]


def _spans(layers: tuple[int, ...]) -> str:
    """``0-7, 26-29``, or ``0, 2, ... 28``."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and layer == spans[-1][-1] + 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    if len(spans) > 4:
        return f"{layers[0]}, {layers[1]}, ... {layers[-1]}"
    return " and ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)
