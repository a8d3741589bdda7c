"""The labelled questions nearest to a vector, kept with a head so that a decision can be explained."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kvroute.errors import FileFormatError

Array = np.ndarray[Any, Any]
_KEPT = 4096
_SIZE = 32


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A labelled training question.

    Attributes:
        id, question, label: as in its row; label in [0, 100] (for a head with target ``correct``, 0 or 1).
        distance: Euclidean, between standardised vectors reduced to their main directions; 0 is the same vector.
    """

    id: str
    question: str
    label: float
    distance: float


@dataclass(frozen=True)
class Neighbours:
    """Reduced vectors of training questions.

    Attributes:
        components: ``[k, dim]`` float32.
        vectors: ``[m, k]`` float32.
        labels: ``[m]`` float64.
        texts: id and question of each.
    """

    components: Array
    vectors: Array
    labels: Array
    texts: list[tuple[str, str]]

    @classmethod
    def fit(cls, z: Array, labels: Array, texts: Sequence[tuple[str, str]], *, seed: int = 0) -> Self:
        """Keep some thousand questions.

        Args:
            z: ``[n, dim]`` standardised vectors.
            labels: ``[n]``.
            texts: id and question of each.
            seed: of the choice where there are more.
        """
        rng = np.random.default_rng(seed)
        kept = np.sort(rng.choice(len(z), min(len(z), _KEPT), replace=False))
        x = np.asarray(z[kept], dtype=np.float64)
        size = min(_SIZE, *x.shape)
        values, vectors = np.linalg.eigh(x.T @ x) if x.shape[1] <= 4096 else _by_rows(x)
        components = np.ascontiguousarray(vectors[:, np.argsort(-values)[:size]].T, dtype=np.float32)
        reduced = np.asarray(z[kept], dtype=np.float32) @ components.T
        return cls(components, reduced, np.asarray(labels, dtype=np.float64)[kept], [texts[int(i)] for i in kept])

    def nearest(self, z: Array, k: int) -> list[list[Neighbour]]:
        """The k nearest to each of ``[n, dim]`` standardised vectors, nearest first."""
        found = []
        for row in np.asarray(z, dtype=np.float32) @ self.components.T:
            distance = np.sqrt(((self.vectors - row) ** 2).sum(axis=1, dtype=np.float64))
            order = np.argsort(distance, kind="stable")[:k]
            found.append(
                [
                    Neighbour(self.texts[i][0], self.texts[i][1], float(self.labels[i]), float(distance[i]))
                    for i in order
                ]
            )
        return found

    def tensors(self) -> dict[str, Array]:
        """Arrays by name, the texts among them as UTF-8 JSON."""
        text = json.dumps(self.texts, ensure_ascii=False).encode("utf-8", "replace")
        return {
            "neighbours.components": self.components,
            "neighbours.vectors": self.vectors,
            "neighbours.labels": self.labels,
            "neighbours.texts": np.frombuffer(text, dtype=np.uint8),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> Self | None:
        """What :meth:`tensors` gave, or None.

        Raises:
            FileFormatError: they don't fit together.
        """
        if "neighbours.vectors" not in tensors:
            return None
        try:
            texts = [(str(i), str(q)) for i, q in json.loads(tensors["neighbours.texts"].tobytes())]
            components, vectors, labels = (tensors[f"neighbours.{n}"] for n in ("components", "vectors", "labels"))
        except (KeyError, ValueError, TypeError) as error:
            raise FileFormatError(f"A head's nearest questions can't be read: {error}.") from error
        if not len(vectors) == len(labels) == len(texts):
            raise FileFormatError("A head's nearest questions differ in number from their vectors.")
        return cls(components, vectors, labels, texts)


def _by_rows(x: Array) -> tuple[Array, Array]:
    _, values, vectors = np.linalg.svd(x, full_matrices=False)
    return values**2, vectors.T
