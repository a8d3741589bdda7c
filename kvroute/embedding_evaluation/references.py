"""What stands beside a model's own vectors: sentence encoders trained for the purpose, and BM25 for retrieval."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvroute.embedding_evaluation.evaluator import Evaluator
from kvroute.embedding_evaluation.measures import Array, ndcg_at_10
from kvroute.embedding_evaluation.results import Rows
from kvroute.embedding_evaluation.tasks import Tasks
from kvroute.errors import InvalidInputError, MissingExtraError, ModelLoadError

REFERENCES = ("minilm", "bm25")
"""Those known by name; a folder with a sentence-transformers model (model2vec's too) is taken as well."""


@dataclass
class Reference:
    """What a reference gives.

    Attributes:
        name: of the row.
        how: what it is.
        rows: its vectors whitened like all others; of BM25 its own scores.
        raw: with its own cosines, nothing fitted; None for BM25.
        dimension: of its vectors.
        ms: a text, or None.
        vectors: of all texts, or None for BM25.
    """

    name: str
    how: str
    rows: Rows
    raw: Rows | None
    dimension: int | None
    ms: float | None
    vectors: Array | None


def check_references(names: Sequence[str]) -> None:
    """Refuse a reference that is neither known nor a folder.

    Raises:
        InvalidInputError: naming it.
    """
    for name in names:
        if name not in REFERENCES and not Path(name).is_dir():
            raise InvalidInputError(
                f"No reference is named {name!r}, and it is no folder.", hint=f"There are: {', '.join(REFERENCES)}."
            )


def reference(
    name: str, evaluator: Evaluator, texts: Sequence[str], timed: Sequence[str], *, progress: bool | None = None
) -> Reference:
    """Measure one.

    Args:
        name: one of :data:`REFERENCES`, or a folder with a sentence-transformers model.
        evaluator: of the model that it stands beside.
        texts: all of its texts, in order.
        timed: texts to take the time of.
        progress: whether to show a bar; by default on a terminal.

    Raises:
        ModelLoadError, MissingExtraError: its package is missing; the message has the pip line.
    """
    if name == "bm25":
        return Reference(
            "BM25", "Lucene's, k1 1.5, b 0.75, English stop words", bm25(evaluator.tasks), None, None, None, None
        )
    encode, label, how = _encoder(name, progress)
    vectors = encode(texts)
    encode(timed[:8])
    began = time.perf_counter()
    encode(timed)
    ms = 1000 * (time.perf_counter() - began) / max(len(timed), 1)
    rows = evaluator.run_vectors(vectors, "test")
    raw = evaluator.run_vectors(vectors, "test", whitened=False, heads=True)
    return Reference(label, how, rows, raw, vectors.shape[1], ms, vectors)


def _encoder(name: str, progress: bool | None) -> tuple[Any, str, str]:
    if name == "minilm":
        from kvroute.minilm import MiniLM

        model = MiniLM()
        return (
            lambda texts: model.encode(texts, progress=progress),
            "MiniLM",
            "all-MiniLM-L6-v2, trained on a billion pairs",
        )
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "eval") from error
    try:
        loaded = SentenceTransformer(name, device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{name} holds no sentence-transformers model: {error}") from error

    def encode(texts: Sequence[str]) -> Array:
        return np.asarray(loaded.encode(list(texts), show_progress_bar=False), dtype=np.float32)

    return encode, Path(name).resolve().name, "a sentence-transformers model"


def bm25(tasks: Tasks) -> Rows:
    """BM25's nDCG@10 on the test queries.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("bm25s", "eval") from error
    out = Rows()
    for r in tasks.retrieval:
        index = bm25s.BM25()
        index.index(bm25s.tokenize(r.documents, stopwords="en", show_progress=False), show_progress=False)
        queries = [q for q, _ in r.test]
        scores = [index.get_scores(words) for words in _words(bm25s, queries)]
        out.retrieval[r.name] = ndcg_at_10(np.stack(scores), [judged for _, judged in r.test])
    return out


def _words(bm25s: Any, queries: list[str]) -> list[list[str]]:
    found: list[list[str]] = bm25s.tokenize(queries, stopwords="en", return_ids=False, show_progress=False)
    return found
