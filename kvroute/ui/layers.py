"""How alike two texts are to a model, layer by layer: cosines of their pooled keys and of their pooled values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvroute.engines.base import Engine, Vectors, decides_inside
from kvroute.errors import EmptyTextError, KVRouteError, TextTooLongError
from kvroute.pooling import PoolingSpec

if TYPE_CHECKING:
    from kvroute.info import ModelInfo

REFERENCE: Final = (
    "The train to the coast leaves at nine.",
    "She planted tomatoes behind the house.",
    "What is the capital of Norway?",
    "The committee rejected the proposal.",
    "Add two eggs and a cup of flour.",
    "He forgot his umbrella again.",
    "def add(a, b): return a + b",
    "The river floods almost every spring.",
    "Prices rose faster than wages last year.",
    "Please send me the report by Friday.",
    "Light travels faster than sound.",
    "The cat slept on the warm engine.",
    "How do I reset my password?",
    "The old theatre was torn down in March.",
    "Most birds fly south before winter.",
    "Seven times eight is fifty-six.",
)
"""Plain sentences whose mean is taken off: keys and values have so much in common that raw cosines are always high."""
_WIDEST: Final = 32_768
_MOST: Final = 8


class LayerComparison:
    """Compares texts on one engine; the reference sentences are read once.

    Args:
        engine: the model.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reference: dict[str, list[Vectors]] | None = None

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Cosines in [-1, 1], higher is more alike, of means over tokens, heads side by side.

        Args:
            first, second: two texts.

        Returns:
            JSON-able: ``layers``, ``tokens`` of both texts, and by layer ``k``, ``v`` (raw) and ``k_free``, ``v_free``
            (without the mean of :data:`REFERENCE`); None where a vector is zero. ``embedding`` is the cosine by the
            preset that :class:`~kvroute.KVEmbedder` uses by default, or None and a ``reason``.

        Raises:
            EmptyTextError, TextTooLongError: naming the text, 0 or 1.
            WindowedLayerError: of an engine whose layers hold no longer what they have read.
        """
        ids = self.engine.tokenize_texts([first, second])
        for index, tokens in enumerate(ids):
            if not tokens:
                raise EmptyTextError(index)
            if len(tokens) > self.engine.info.context:
                raise TextTooLongError(index, len(tokens), self.engine.info.context, hint="Shorten it.")
        found: dict[str, Any] = {"layers": list(range(self.engine.info.num_layers)), "tokens": [len(i) for i in ids]}
        vectors = self._by_layer(ids)
        if self._reference is None:
            self._reference = self._by_layer(self.engine.tokenize_texts(list(REFERENCE)))
        for part, layers in vectors.items():
            means = [v.mean(axis=0) for v in self._reference[part]]
            found[part] = [_cosine(x[0], x[1]) for x in layers]
            found[f"{part}_free"] = [_cosine(x[0] - m, x[1] - m) for x, m in zip(layers, means, strict=True)]
        return found | {"embedding": self._embedding(first, second)}

    def _by_layer(self, ids: Sequence[Sequence[int]]) -> dict[str, list[Vectors]]:
        """By part and layer the texts' vectors ``[n, heads * size]``, out of as few pooled vectors as can be."""
        info = self.engine.info
        groups = _groups(info)
        specs = [
            PoolingSpec(layers=tuple(group), part=part, heads="concat", layer_reduce="concat")
            for part in ("k", "v")
            for group in groups
        ]
        pooled: list[Vectors] = []
        step = _MOST if decides_inside(self.engine) else len(specs)  # a request to a server asks for a few at most
        for at in range(0, len(specs), step):
            pooled += self.engine.pool(ids, specs[at : at + step], progress=False)
        found: dict[str, list[Vectors]] = {}
        for spec, vectors in zip(specs, pooled, strict=True):
            count = len(spec.resolve(info.num_layers))
            found.setdefault(spec.part, []).extend(np.split(vectors, count, axis=1))
        return found

    def _embedding(self, first: str, second: str) -> dict[str, Any]:
        from kvroute.embedder import KVEmbedder

        try:
            embedder = KVEmbedder(self.engine, "best")
            vectors = embedder.encode([first, second], progress=False)
            return {"preset": "best", "cosine": _cosine(vectors[0], vectors[1]), "reason": None}
        except KVRouteError as error:
            return {"preset": "best", "cosine": None, "reason": str(error)}


def _groups(info: ModelInfo) -> list[list[int]]:
    """Runs of layers that are alike and whose vectors together are no wider than one feature may be."""
    groups: list[list[int]] = []
    for i, layer in enumerate(info.layers):
        width = layer.kv_heads * max(layer.key_size, layer.value_size)
        last = groups[-1] if groups else None
        if last is not None and info.layers[last[0]].sizes == layer.sizes and (len(last) + 1) * width <= _WIDEST:
            last.append(i)
        else:
            groups.append([i])
    return groups


def _cosine(a: Any, b: Any) -> float | None:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
    return None if lengths < 1e-12 else float(np.clip(x @ y / lengths, -1.0, 1.0))
