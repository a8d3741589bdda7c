"""What is compared: ways to pool keys and values, and ways to pool hidden states, at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from quality.extract import WEIGHTS, Store


@dataclass(frozen=True)
class Candidate:
    """A way from the store to one raw vector a text.

    Attributes:
        side: ``kv`` or ``hidden``.
        layers: attention layers, or the one hidden state (0 is the embedding).
        part: ``k``, ``v`` or ``kv``.
        weights: of the mean over tokens; ``last`` for the last token of the prompted texts.
        first: whether the first token counts.
        reduce: ``concat``, ``mean`` over layers, or ``paper`` (mean over layers and heads, unit length).
    """

    side: Literal["kv", "hidden"]
    layers: tuple[int, ...]
    part: str = "kv"
    weights: str = "mean"
    first: bool = True
    reduce: str = "concat"

    @property
    def depth(self) -> int:
        """Layers that have to run."""
        return max(self.layers) + (1 if self.side == "kv" else 0)

    @property
    def name(self) -> str:
        if self.side == "hidden":
            return f"hidden {self.layers[0]}, {self.weights}{'' if self.first else ', no first token'}"
        low, high = min(self.layers), max(self.layers)
        return f"{self.part.upper()} {low}-{high} {self.reduce}, {self.weights}"

    def matrix(self, store: Store) -> np.ndarray:
        """``[n, dim]`` float32 for all texts of the store."""
        if self.weights == "last":
            x = store.arrays["kv_last" if self.side == "kv" else "hidden_last"]
        else:
            w = WEIGHTS.index(self.weights)
            hidden = store.arrays.get("hidden")
            x = store.arrays["kv"][:, w] if self.side == "kv" else hidden[:, 0 if self.first else 1, w]
        if self.side == "hidden":
            return np.asarray(x[:, self.layers[0]], dtype=np.float32)
        parts = {"k": slice(0, 1), "v": slice(1, 2), "kv": slice(0, 2)}[self.part]
        x = x[:, list(self.layers)][:, :, parts]  # [n, L, parts, F]
        if self.reduce == "concat":
            return np.ascontiguousarray(x).reshape(len(x), -1).astype(np.float32)
        x = x.astype(np.float32).mean(axis=1)  # [n, parts, F]
        if self.reduce == "paper":
            heads = 3
            x = x.reshape(len(x), x.shape[1], heads, -1).mean(axis=2)
            x = x.reshape(len(x), -1)
            return x / np.linalg.norm(x, axis=1, keepdims=True)
        return x.reshape(len(x), -1)


def kv_candidates(num_layers: int, *, prompted: bool = False) -> list[Candidate]:
    """Ranges of layers from a coarse grid, values alone or with keys; keys alone only at a few depths."""
    bounds = sorted({round(num_layers * f) for f in (0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)} | {num_layers - 4})
    ranges = [tuple(range(low, high)) for low in bounds for high in bounds if low < high]
    weights = ("last",) if prompted else WEIGHTS
    out = []
    for layers in ranges:
        for part in ("v", "kv", "k"):
            if part == "k" and layers[0] != 0:
                continue
            for w in weights:
                if part != "v" and w == "position":
                    continue
                for reduce in ("concat", "mean"):
                    out.append(Candidate("kv", layers, part, w, True, reduce))
    return out


def hidden_candidates(num_layers: int, *, prompted: bool = False) -> list[Candidate]:
    weights = ("last",) if prompted else WEIGHTS
    return [
        Candidate("hidden", (layer,), "h", w, first)
        for layer in range(num_layers + 1)
        for w in weights
        for first in ((True,) if prompted else (True, False))
    ]


def paper_candidate(num_layers: int) -> Candidate:
    """The preset ``paper-mteb``."""
    return Candidate("kv", tuple(range(num_layers - 4, num_layers)), "kv", "mean", True, "paper")
