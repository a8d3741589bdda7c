"""How good vectors are: accuracy of a linear head, Spearman's rho, nDCG@10. Values by row, for paired intervals."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def linear_head(train: Array, labels: list[str], held: Array, held_labels: list[str]) -> Array:
    """Right (1) or wrong (0) by held row, of a ridge classifier on standardised vectors."""
    from sklearn.linear_model import RidgeClassifierCV

    mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = RidgeClassifierCV(alphas=ALPHAS).fit((train - mean) / scale, labels)
        found = head.predict((held - mean) / scale)
    return (found == np.asarray(held_labels)).astype(np.float64)


def unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def cosines(a: Array, b: Array) -> Array:
    return (unit(a) * unit(b)).sum(axis=1)


def ndcg_at_10(queries: Array, documents: Array, relevant: list[dict[int, float]]) -> Array:
    """nDCG@10 by query, gains as judged (as trec_eval's ndcg_cut)."""
    similarity = unit(queries) @ unit(documents).T
    out = np.zeros(len(relevant))
    discount = 1 / np.log2(np.arange(2, 12))
    for i, judged in enumerate(relevant):
        top = np.argsort(-similarity[i], kind="stable")[:10]
        gain = np.array([judged.get(int(d), 0.0) for d in top])
        ideal = np.sort(np.array(list(judged.values())))[::-1][:10]
        out[i] = (gain * discount[: len(gain)]).sum() / (ideal * discount[: len(ideal)]).sum()
    return out


def rank_correlation_of(rows: Array, similarity: Array, gold: Array) -> float:
    """Spearman's rho of some rows (with repeats)."""
    a, b = rankdata(similarity[rows]), rankdata(gold[rows])
    return float(np.corrcoef(a, b)[0, 1])
