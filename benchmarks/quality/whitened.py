"""Whitened vectors of many candidates at once.

Whitening by PCA needs inner products with the vectors it is fitted on and nothing else, and the inner products of
concatenated layers are the sums of those of each layer. So each layer is multiplied out once, and a candidate costs a
sum and an eigenvalue problem, however long its vectors are. It gives what ``PostProcessor.fit(..., "whiten")`` gives
when it is told the parts (blocks) of a vector.
"""

from __future__ import annotations

import numpy as np

from quality.candidates import Candidate
from quality.extract import Store
from quality.measures import Array


class Whitening:
    """Whitens candidates' vectors of some rows.

    Args:
        short: store of the short texts.
        documents: store of the documents; their rows count on behind those of the short texts.
        fitted_on: rows that the whitening is fitted on.
        rows: rows that are wanted, among them those it is fitted on.
        dimension: sizes kept.
    """

    def __init__(self, short: Store, documents: Store, fitted_on: Array, rows: Array, dimension: int) -> None:
        self.short, self.documents, self.rows, self.dimension = short, documents, rows, dimension
        self.fitted = np.searchsorted(rows, fitted_on)
        self._products: dict[tuple[object, ...], Array] = {}

    def vectors(self, candidate: Candidate) -> Array:
        """``[rows, dimension]`` float32."""
        products = np.sum([self._product(piece) for piece in candidate.pieces()], axis=0)
        square = products[self.fitted].astype(np.float64)
        values, vectors = np.linalg.eigh((square + square.T) / 2)
        values, vectors = values[::-1][: self.dimension], vectors[:, ::-1][:, : self.dimension]
        kept = values > values[0] * 1e-10
        scale = np.sqrt(len(self.fitted) - 1) / values[kept]
        return products @ (vectors[:, kept] * scale).astype(np.float32)

    def _product(self, piece: Candidate) -> Array:
        """Inner products ``[rows, fitted]`` of centred vectors, brought to the same total variance in each part."""
        key = (piece.side, piece.layers, piece.part, piece.weights, piece.first, piece.reduce)
        if key not in self._products:
            if self._products and next(iter(self._products))[3] != piece.weights:
                self._products.clear()  # room: candidates come grouped by their weights
            x = np.concatenate([piece.matrix(self.short), piece.matrix(self.documents)])[self.rows]
            x -= x[self.fitted].mean(axis=0)
            product = x @ x[self.fitted].T
            total = float(np.trace(product[self.fitted]))
            self._products[key] = product * (len(self.fitted) / total if total > 0 else 1.0)
        return self._products[key]
