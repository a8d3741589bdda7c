"""What a head computes, in numpy: standardise, then a line, a softmax, an MLP or trees. No training here.

Every model maps ``[n, dim]`` float32 to ``[n]`` float64 in [0, 1]. A row is computed alone, whatever stands beside it,
so its result has the same bits in every batch, and one row costs a few numpy calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from kvroute.errors import FileFormatError

Array = np.ndarray[Any, Any]
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

GRADES: Vectors = np.array([0.0, 0.25, 0.75, 1.0], dtype=np.float32)
"""The four labels over 100 (docs/concepts.md)."""


@dataclass(frozen=True)
class HeadModel(ABC):
    """The part that all kinds share.

    Attributes:
        mean: ``[dim]`` float32, mean of the training vectors.
        inverse: ``[dim]`` float32, one over their standard deviation; 0 where they don't vary.
    """

    kind: ClassVar[str]
    mean: Array
    inverse: Array

    def __post_init__(self) -> None:
        for f in fields(self):  # another layout in memory would be added up in another order
            object.__setattr__(self, f.name, np.ascontiguousarray(getattr(self, f.name)))

    @property
    def dim(self) -> int:
        """Size of the vectors it takes."""
        return int(self.mean.shape[0])

    @abstractmethod
    def scores(self, z: Vectors) -> Floats:
        """``[n, dim]`` standardised vectors to ``[n]``, not yet clipped."""

    def __call__(self, x: Vectors) -> Floats:
        """``[n, dim]`` to ``[n]`` in [0, 1], each row by itself."""
        out = np.empty(len(x), dtype=np.float64)
        for i in range(len(x)):
            out[i] = self.scores((x[i : i + 1] - self.mean) * self.inverse)[0]
        return np.minimum(np.maximum(out, 0.0), 1.0)

    def together(self, x: Vectors) -> Floats:
        """The same for many rows at once: faster, and equal up to rounding."""
        return np.clip(self.scores((x - self.mean) * self.inverse), 0.0, 1.0)

    def tensors(self) -> dict[str, Array]:
        """Its parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> Self:
        """What :meth:`tensors` gave.

        Raises:
            FileFormatError: a parameter is missing or does not fit the others.
        """
        names = [f.name for f in fields(cls)]
        missing = [n for n in names if n not in tensors]
        if missing:
            raise FileFormatError(f"A {cls.kind} head lacks its tensor {missing[0]!r}.", hint="Train it anew.")
        made = cls(**{n: tensors[n] for n in names})
        try:
            if made.mean.ndim != 1 or made.mean.shape != made.inverse.shape:
                raise ValueError(f"mean {made.mean.shape}, inverse {made.inverse.shape}")
            found = made.scores(np.zeros((1, made.dim), dtype=np.float32))
            if found.shape != (1,) or not np.isfinite(found).all():
                raise ValueError("it gives no number")
        except (ValueError, IndexError) as error:
            raise FileFormatError(f"The tensors of a {cls.kind} head don't fit together: {error}.") from error
        return made


@dataclass(frozen=True)
class RidgeModel(HeadModel):
    """A line.

    Attributes:
        weight: ``[dim]`` float32.
        bias: ``[1]`` float64.
    """

    kind: ClassVar[str] = "ridge"
    weight: Array
    bias: Array

    def scores(self, z: Vectors) -> Floats:
        """``z . weight + bias``."""
        return np.asarray((z @ self.weight).astype(np.float64) + self.bias[0])


@dataclass(frozen=True)
class LogisticModel(HeadModel):
    """Probabilities of the grades by a softmax; the score is their expected grade.

    Attributes:
        weight: ``[grades, dim]`` float32.
        bias: ``[grades]`` float32.
        grades: ``[grades]`` float32 in [0, 1].
    """

    kind: ClassVar[str] = "logistic"
    weight: Array
    bias: Array
    grades: Array

    def scores(self, z: Vectors) -> Floats:
        """Expected grade."""
        logits = (z @ self.weight.T + self.bias).astype(np.float64)
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(e @ self.grades.astype(np.float64) / e.sum(axis=1))


@dataclass(frozen=True)
class MLPModel(HeadModel):
    """Linear(hidden) -> ReLU -> Linear(1) (arXiv 2601.20326, section 4.2).

    Attributes:
        hidden_weight: ``[hidden, dim]`` float32.
        hidden_bias: ``[hidden]`` float32.
        weight: ``[hidden]`` float32.
        bias: ``[1]`` float64.
    """

    kind: ClassVar[str] = "mlp"
    hidden_weight: Array
    hidden_bias: Array
    weight: Array
    bias: Array

    def scores(self, z: Vectors) -> Floats:
        """The output unit."""
        hidden = np.maximum(z @ self.hidden_weight.T + self.hidden_bias, 0)
        return np.asarray((hidden @ self.weight).astype(np.float64) + self.bias[0])


@dataclass(frozen=True)
class TreesModel(HeadModel):
    """Gradient-boosted trees on principal components, as plain arrays.

    All nodes of all trees lie in one list; a leaf's children are itself, so every tree is walked for as many steps as
    the deepest has.

    Attributes:
        components: ``[k, dim]`` float32, directions that the standardised vectors are reduced to.
        feature: ``[nodes]`` int32, component that a node compares.
        threshold: ``[nodes]`` float64; at most this goes left.
        left, right: ``[nodes]`` int32, indices of the children.
        value: ``[nodes]`` float64, what a leaf adds.
        roots: ``[trees]`` int32.
        depth: ``[1]`` int32, steps to the deepest leaf.
        base: ``[1]`` float64, what the trees add to.
        link: ``[1]`` int8, 1 where the sum is a log-odds.
    """

    kind: ClassVar[str] = "trees"
    components: Array
    feature: Array
    threshold: Array
    left: Array
    right: Array
    value: Array
    roots: Array
    depth: Array
    base: Array
    link: Array

    def scores(self, z: Vectors) -> Floats:
        """Sum of the leaves."""
        reduced = (z @ self.components.T).astype(np.float64)
        rows = np.arange(len(z))[:, None]
        node = np.broadcast_to(self.roots, (len(z), len(self.roots)))
        for _ in range(int(self.depth[0])):
            goes_left = reduced[rows, self.feature[node]] <= self.threshold[node]
            node = np.where(goes_left, self.left[node], self.right[node])
        total = self.base[0] + self.value[node].sum(axis=1)
        return np.asarray(0.5 * (1 + np.tanh(total / 2)) if self.link[0] else total)


MODELS: dict[str, type[HeadModel]] = {m.kind: m for m in (MLPModel, RidgeModel, LogisticModel, TreesModel)}
"""By kind."""
