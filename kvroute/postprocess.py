"""Post-processing fitted on vectors: mean removal, standardising, whitening, projection to fewer dimensions.

Mean vectors of a language model lie in a narrow cone; removing their mean and evening out their variances makes
cosines tell texts apart (Mu and Viswanath, All-but-the-Top, ICLR 2018; Su et al., Whitening Sentence Representations,
arXiv 2103.15316). Nothing here needs labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.files import read_tensors, write_tensors

Method = Literal["center", "standardize", "whiten", "project", "contrastive"]
Array = np.ndarray[Any, np.dtype[np.float32]]

_KIND = "kvroute.postprocess"
_LARGEST_FIT = 4096
"""Vectors a principal-component fit looks at; more are thinned evenly, which keeps it to seconds."""


class PostProcessor:
    """An affine map of vectors: ``(x - mean) * scale``, or ``(x - mean) @ components``.

    Args:
        method: how it was fitted.
        mean: ``[dim]``.
        scale: ``[dim]``, for ``standardize``.
        components: ``[dim, out]``, for ``whiten``, ``project`` and ``contrastive``.
        fitted_on: how many vectors it was fitted on.
        facts: what else is saved with it: the model, the spec and a digest of the texts, where they are known.

    Raises:
        InvalidInputError: parts of different sizes.
    """

    def __init__(
        self,
        method: Method,
        mean: np.ndarray[Any, Any],
        *,
        scale: np.ndarray[Any, Any] | None = None,
        components: np.ndarray[Any, Any] | None = None,
        fitted_on: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.method: Method = method
        self.mean = np.asarray(mean, dtype=np.float32)
        self.scale = None if scale is None else np.asarray(scale, dtype=np.float32)
        self.components = None if components is None else np.asarray(components, dtype=np.float32)
        if method not in get_args(Method) or any(
            part is not None and len(part) != len(self.mean) for part in (self.scale, self.components)
        ):
            raise InvalidInputError("The parts of the post-processing don't fit together.")
        self.fitted_on = fitted_on
        self.facts = dict(facts or {})

    def __repr__(self) -> str:
        return f"PostProcessor({self.method!r}, {self.input_dimension} -> {self.dimension})"

    @property
    def input_dimension(self) -> int:
        """Size of the vectors it takes."""
        return len(self.mean)

    @property
    def dimension(self) -> int:
        """Size of the vectors it gives."""
        return self.input_dimension if self.components is None else int(self.components.shape[1])

    @classmethod
    def fit(
        cls,
        vectors: np.ndarray[Any, Any],
        method: Method = "whiten",
        dimension: int | None = None,
        *,
        power: float = 1.0,
        blocks: Sequence[int] | None = None,
        fewer: bool = False,
    ) -> Self:
        """Fit on vectors of texts like those it is for.

        Args:
            vectors: ``[n, dim]``, finite.
            method: ``center`` removes the mean; ``standardize`` also divides by the standard deviation of each
                dimension; ``project`` rotates to the principal components and keeps the first ``dimension``;
                ``whiten`` also divides them by their standard deviation.
            dimension: sizes kept by ``whiten`` and ``project``; by default as many as the vectors allow, at most 256.
            power: for ``whiten``, how far variances are evened out: 1 wholly, 0 is ``project``.
            blocks: sizes of the parts that lie side by side in a vector (layers, keys and values). Before the
                components are taken, ``whiten`` and ``project`` bring each to the same total variance, so that a layer
                with large values doesn't drown the others.
            fewer: where the vectors vary in fewer directions than ``dimension``, keep those instead of an error.

        Raises:
            InvalidInputError: too few vectors for the dimension, not finite, or an unknown method.
        """
        x = np.asarray(vectors)
        if method not in get_args(Method):
            raise InvalidInputError(
                f"No method is named {method!r}.", hint=f"There are: {', '.join(get_args(Method))}."
            )
        if method == "contrastive":
            raise InvalidInputError("A contrastive projection is trained on pairs.", hint="Use KVEmbedder.fit_pairs.")
        if x.ndim != 2 or len(x) < 2:
            raise InvalidInputError(f"Post-processing is fitted on at least 2 vectors, not on {list(x.shape)}.")
        if not np.isfinite(x).all():
            raise InvalidInputError("The vectors hold NaN or infinity.")
        count = len(x)
        if method in ("center", "standardize"):
            if dimension is not None:
                raise InvalidInputError(f"{method} keeps the dimension.", hint="Use whiten or project to change it.")
            mean = x.mean(axis=0, dtype=np.float64)
            if method == "center":
                return cls(method, mean, fitted_on=count)
            deviation = x.std(axis=0, dtype=np.float64)
            return cls(
                method, mean, scale=1 / np.maximum(deviation, 1e-6 * max(deviation.max(), 1e-30)), fitted_on=count
            )
        if blocks is not None and (min(blocks, default=0) < 1 or sum(blocks) != x.shape[1]):
            raise InvalidInputError(f"Blocks of {list(blocks)} don't make up vectors of size {x.shape[1]}.")
        if len(x) > _LARGEST_FIT:
            x = x[np.linspace(0, len(x) - 1, _LARGEST_FIT).astype(int)]
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x.astype(np.float64) - mean
        balance = _balance(centred, blocks) if blocks else np.ones(x.shape[1])
        centred *= balance
        values, vectors = _gram_eigenvectors(centred)
        wanted = min(256, len(values)) if dimension is None else dimension
        if fewer:
            wanted = min(wanted, len(values))
        if not 1 <= wanted <= len(values):
            raise InvalidInputError(
                f"{count} vectors of size {x.shape[1]} have {len(values)} directions that vary, and {wanted} were "
                "asked for.",
                hint=f"Fit on more than {wanted} texts, or ask for at most {len(values)} dimensions.",
            )
        values, vectors = values[:wanted], vectors[:, :wanted]
        axes = vectors if len(x) > x.shape[1] else centred.T @ (vectors / np.sqrt(values))
        axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(wanted)])  # eigh leaves signs open
        variances = values / (len(x) - 1)
        if method == "whiten":
            axes = axes * (variances ** (-power / 2))
        return cls(method, mean, components=balance[:, None] * axes, fitted_on=count)

    def transform(self, vectors: np.ndarray[Any, Any]) -> Array:
        """``[n, input_dimension]`` -> ``[n, dimension]`` float32.

        Raises:
            InvalidInputError: vectors of another size.
        """
        x = np.asarray(vectors, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.input_dimension:
            raise InvalidInputError(
                f"The post-processing takes vectors of size {self.input_dimension}, not {list(x.shape)}.",
                hint="It was fitted with another pooling spec.",
            )
        x = x - self.mean
        if self.scale is not None:
            x = x * self.scale
        return x if self.components is None else x @ self.components

    def save(self, path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write to a safetensors file, with ``facts`` added to its own."""
        tensors = {"mean": self.mean, "scale": self.scale, "components": self.components}
        meta = {"method": self.method, "fitted_on": self.fitted_on, "facts": {**self.facts, **(facts or {})}}
        write_tensors(path, _KIND, {k: v for k, v in tensors.items() if v is not None}, meta)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: torn, changed, another kind of file, or of a newer format.
        """
        tensors, meta = read_tensors(path, _KIND)
        try:
            found = cls(
                meta["method"],
                tensors["mean"],
                scale=tensors.get("scale"),
                components=tensors.get("components"),
                fitted_on=int(meta["fitted_on"]),
                facts=meta["facts"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"{path} is not whole: {error}") from error
        return found


def _balance(centred: np.ndarray[Any, Any], blocks: Sequence[int]) -> np.ndarray[Any, Any]:
    """Factor of each dimension ``[dim]`` that gives every block the same total variance."""
    ends = np.cumsum(blocks)
    totals = [float((centred[:, end - size : end] ** 2).sum()) for size, end in zip(blocks, ends, strict=True)]
    return np.repeat([1 / np.sqrt(t / len(centred)) if t > 0 else 1.0 for t in totals], list(blocks))


def _gram_eigenvectors(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Eigenvalues ``[k]``, largest first, and eigenvectors of the smaller of the two Gram matrices of ``x [n, dim]``.

    Vectors are often longer than texts are many: then the vectors are ``[n, k]``, else they are the axes ``[dim, k]``.
    k counts the directions that vary.
    """
    n, dim = x.shape
    values, vectors = np.linalg.eigh(x.T @ x if n > dim else x @ x.T)
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    keep = values > max(values[0], 0.0) * 1e-10
    return values[keep], vectors[:, keep]
