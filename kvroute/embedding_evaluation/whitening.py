"""Whitened vectors of many candidates at once.

Whitening by PCA needs inner products with the vectors it is fitted on and nothing else, and the inner products of
vectors side by side are the sums of those of each. So each layer is multiplied out once, and a candidate costs a
sum and an eigenvalue problem, however long its vectors are. It gives what ``PostProcessor.fit(..., "whiten")`` gives
when it is told the parts (blocks) of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.linalg import eigh

from kvroute.embedding_evaluation.candidates import Candidate, Way
from kvroute.embedding_evaluation.measures import Array
from kvroute.embedding_evaluation.states import States


class Whitening:
    """Whitens candidates' vectors of some rows.

    Args:
        forms: what was read.
        fitted_on: rows that the whitening is fitted on, ascending.
        rows: rows that are wanted, ascending, among them those it is fitted on.
        dimension: sizes kept.
        room: inner products that are kept for the next candidate, in bytes.
    """

    def __init__(
        self, forms: Mapping[str, States], fitted_on: Array, rows: Array, dimension: int, *, room: int = 2**30
    ) -> None:
        self.forms, self.rows, self.dimension = forms, rows, dimension
        self.fitted = np.searchsorted(rows, fitted_on)
        self._products: dict[Candidate, Array] = {}
        self._most = max(room // (4 * len(rows) * len(fitted_on)), 1)

    def vectors(self, way: Way) -> Array:
        """``[rows, dimension]`` float32; fewer dimensions where fewer vary."""
        pieces = way.pieces()
        products = self._product(pieces[0]).copy()
        for piece in pieces[1:]:
            products += self._product(piece)
        square = products[self.fitted].astype(np.float64)
        count = len(square)
        kept = (max(count - self.dimension, 0), count - 1)
        values, vectors = eigh((square + square.T) / 2, subset_by_index=kept)
        varies = values > max(values[-1] * 1e-10, 0.0)
        if not varies.any():  # all vectors are the same
            return np.zeros((len(products), 1), dtype=np.float32)
        scale = np.sqrt(count - 1) / values[varies]
        return np.asarray(products @ (vectors[:, varies] * scale).astype(np.float32))

    def _product(self, piece: Candidate) -> Array:
        """Inner products ``[rows, fitted]`` of centred vectors, brought to the same total variance in each part."""
        if piece not in self._products:
            while len(self._products) >= self._most:
                self._products.pop(next(iter(self._products)))
            x = piece.matrix(self.forms)[self.rows]
            x -= x[self.fitted].mean(axis=0)
            product = x @ x[self.fitted].T
            total = float(np.trace(product[self.fitted]))
            self._products[piece] = product * np.float32(len(self.fitted) / total if total > 0 else 1.0)
        return self._products[piece]
