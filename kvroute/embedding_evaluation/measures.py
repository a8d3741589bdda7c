"""How good vectors are: accuracy of a linear head, Spearman's rho, nDCG@10, v-measure. Values by row, for paired
intervals. Each is in [0, 1] but rho, which is in [-1, 1]; higher is better."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, Any]
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1000.0)


def linear_head(train: Array, labels: Sequence[str], held: Array, held_labels: Sequence[str]) -> Array:
    """Right (1) or wrong (0) by held row, of a ridge classifier on standardised vectors; its penalty is chosen on the
    train rows by leave-one-out."""
    from sklearn.linear_model import RidgeClassifierCV

    mean, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = RidgeClassifierCV(alphas=ALPHAS).fit((train - mean) / scale, labels)
        found = head.predict((held - mean) / scale)
    return np.asarray(found == np.asarray(held_labels), dtype=np.float64)


def unit(vectors: Array) -> Array:
    """Rows of length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12))


def cosines(a: Array, b: Array) -> Array:
    """Row by row, ``[n]``."""
    return np.asarray((unit(a) * unit(b)).sum(axis=1))


def ndcg_at_10(similarity: Array, relevant: Sequence[dict[int, float]]) -> Array:
    """nDCG@10 by query, gains as judged (as trec_eval's ndcg_cut).

    Args:
        similarity: ``[queries, documents]``.
        relevant: by query, the gain of documents by their index; the others have none.
    """
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
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def clusters(vectors: Array, count: int, seed: int = 0) -> Array:
    """Cluster of each row by k-means on vectors of unit length."""
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct vectors than clusters
        made = KMeans(n_clusters=min(count, len(vectors)), n_init=4, random_state=seed).fit(unit(vectors))
    return np.asarray(made.labels_)


def v_measure(labels: Array, found: Array) -> float:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, EMNLP 2007), of whole numbers."""
    table = np.zeros((int(labels.max()) + 1, int(found.max()) + 1))
    np.add.at(table, (labels, found), 1.0)
    joint, of_label, of_cluster = (_entropy(t) for t in (table.ravel(), table.sum(axis=1), table.sum(axis=0)))
    if of_label + of_cluster == 0:
        return 1.0
    return float(2 * (of_label + of_cluster - joint) / (of_label + of_cluster))


def _entropy(counts: Array) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
