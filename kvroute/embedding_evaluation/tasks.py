"""Rows that embeddings are measured on: deterministic subsets, split before anything is looked at.

A folder holds any of

======================================  =========================================================================
``classification/NAME.train.jsonl``     ``{"id", "text", "label"}``; a quarter of them are the dev rows
``classification/NAME.test.jsonl``      the same; reported on
``sts/NAME.jsonl``                      ``{"id", "sentence1", "sentence2", "score"}``; half are dev rows
``retrieval/NAME/``                     ``corpus.jsonl {"_id", "title", "text"}``, ``queries.jsonl {"_id", "text"}``,
                                        ``qrels.tsv`` (``query-id corpus-id score``); half of the queries are dev rows
======================================  =========================================================================
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvroute.errors import InvalidInputError
from kvroute.rows import parse_jsonl, read_text, text_field


def in_dev(key: str) -> bool:
    """Half of the rows, by a hash of their id: those are tuned on, the others reported on."""
    return hashlib.sha256(key.encode()).digest()[0] < 128


def order(key: str) -> str:
    """What rows are sorted by, so that a subset is a random one and always the same."""
    return hashlib.sha256(f"order:{key}".encode()).hexdigest()


@dataclass
class Classification:
    """Texts with labels: ``train`` is fitted on, ``dev`` chosen on, ``test`` reported on."""

    name: str
    train: list[tuple[str, str]]
    dev: list[tuple[str, str]]
    test: list[tuple[str, str]]


@dataclass
class Sts:
    """Pairs of sentences with a graded similarity."""

    name: str
    dev: list[tuple[str, str, float]]
    test: list[tuple[str, str, float]]


@dataclass
class Retrieval:
    """Queries with the relevance of documents by their index."""

    name: str
    documents: list[str]
    dev: list[tuple[str, dict[int, float]]]
    test: list[tuple[str, dict[int, float]]]


@dataclass
class Tasks:
    """All sets of a folder."""

    classification: list[Classification]
    sts: list[Sts]
    retrieval: list[Retrieval]

    def texts(self) -> tuple[list[str], list[str]]:
        """Unique short texts and unique documents."""
        short: dict[str, None] = {}
        for c in self.classification:
            short.update(dict.fromkeys(t for t, _ in c.train + c.dev + c.test))
        for s in self.sts:
            for a, b, _ in s.dev + s.test:
                short[a] = short[b] = None
        for r in self.retrieval:
            short.update(dict.fromkeys(q for q, _ in r.dev + r.test))
        documents = dict.fromkeys(d for r in self.retrieval for d in r.documents)
        return list(short), list(documents)


def load_tasks(folder: str | Path, rows: int | None = None) -> Tasks:
    """Read the sets of a folder.

    Args:
        folder: laid out as above; what is missing is not measured.
        rows: train rows of a classification set, at most, taken in the order of a hash of their ids; of the other
            sets in proportion (three eighths of it test rows, seven eighths pairs, half documents). All by default.

    Raises:
        InvalidInputError: no set at all, or a row that can't be used, naming file and line.
    """
    root = Path(folder)
    if rows is not None and rows < 8:
        raise InvalidInputError(f"{rows} rows are too few to measure anything.", hint="Take 100 at least.")

    def at_most(part: float) -> int | None:
        return None if rows is None else int(rows * part)

    names = sorted(p.name.removesuffix(".train.jsonl") for p in (root / "classification").glob("*.train.jsonl"))
    tasks = Tasks(
        [_classification(root / "classification", n, at_most(1), at_most(3 / 8)) for n in names],
        [_sts(path, at_most(7 / 8)) for path in sorted((root / "sts").glob("*.jsonl"))],
        [_retrieval(p.parent, at_most(1 / 2)) for p in sorted((root / "retrieval").glob("*/corpus.jsonl"))],
    )
    if not (tasks.classification or tasks.sts or tasks.retrieval):
        raise InvalidInputError(
            f"{root} holds no set to measure embeddings on.",
            hint="It has classification/NAME.train.jsonl and .test.jsonl, sts/NAME.jsonl or "
            "retrieval/NAME/corpus.jsonl: see docs/evaluation.md.",
        )
    return tasks


def _rows(path: Path, fields: tuple[str, ...], key: str = "id") -> list[dict[str, Any]]:
    """Rows with the texts they need, by the order of their ids' hashes."""
    found = []
    for number, row in parse_jsonl(read_text(path, io.BytesIO()), path):
        for field in fields:
            text_field(row, field, path, number)
        found.append({**row, key: str(row.get(key, number))})
    return sorted(found, key=lambda r: order(r[key]))


def _classification(folder: Path, name: str, train: int | None, test: int | None) -> Classification:
    def pairs(part: str, limit: int | None) -> list[tuple[str, str]]:
        rows = _rows(folder / f"{name}.{part}.jsonl", ("text",))
        for row in rows:
            if not isinstance(row.get("label"), str | int) or not row["text"]:
                raise InvalidInputError(f"{name}.{part}.jsonl: row {row['id']} has no label or no text.")
        return [(r["text"], str(r["label"])) for r in rows[:limit]]

    rows, held = pairs("train", train), pairs("test", test)
    cut = len(rows) * 3 // 4
    if len({label for _, label in rows[:cut]}) < 2 or not rows[cut:] or not held:
        raise InvalidInputError(f"{folder / name}: too few rows or labels to train a classifier.")
    return Classification(name, rows[:cut], rows[cut:], held)


def _sts(path: Path, limit: int | None) -> Sts:
    split: dict[bool, list[tuple[str, str, float]]] = {True: [], False: []}
    for row in _rows(path, ("sentence1", "sentence2"))[:limit]:
        try:
            score = float(row["score"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInputError(f"{path}: row {row['id']} has no score.") from error
        split[in_dev(row["id"])].append((row["sentence1"], row["sentence2"], score))
    if min(len(split[True]), len(split[False])) < 2:
        raise InvalidInputError(f"{path} holds too few pairs.")
    return Sts(path.stem, split[True], split[False])


def _retrieval(folder: Path, limit: int | None) -> Retrieval:
    judged = list(csv.DictReader(read_text(folder / "qrels.tsv", io.BytesIO()).splitlines(), delimiter="\t"))
    corpus = {
        r["_id"]: f"{r.get('title') or ''}. {r['text']}".strip(". ")
        for r in _rows(folder / "corpus.jsonl", ("text",), "_id")
    }
    queries = {r["_id"]: r["text"] for r in _rows(folder / "queries.jsonl", ("text",), "_id")}
    relevant: dict[str, dict[str, float]] = {}
    try:
        for row in judged:
            query, document, score = row["query-id"], row["corpus-id"], float(row["score"])
            if score > 0 and queries.get(query) and corpus.get(document, "").strip():
                relevant.setdefault(query, {})[document] = score
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{folder / 'qrels.tsv'} is no table of query-id, corpus-id and score.") from error
    chosen, kept = _documents(corpus, relevant, len(corpus) if limit is None else limit)
    place = {d: i for i, d in enumerate(chosen)}
    split: dict[bool, list[tuple[str, dict[int, float]]]] = {True: [], False: []}
    for query in kept:
        found = {place[d]: s for d, s in relevant[query].items()}
        split[in_dev(f"{folder.name}:{query}")].append((queries[query], found))
    if not split[True] or not split[False]:
        raise InvalidInputError(f"{folder} holds too few queries.")
    return Retrieval(folder.name, [corpus[d] for d in chosen], split[True], split[False])


def _documents(
    corpus: dict[str, str], relevant: dict[str, dict[str, float]], limit: int
) -> tuple[list[str], list[str]]:
    """Documents and queries of a subset: whole queries are kept, with all their relevant documents, until they take
    three quarters of the room; the rest is filled with others."""
    chosen: dict[str, None] = {}
    kept = []
    room = limit if limit >= len(corpus) else limit * 3 // 4
    for query in sorted(relevant, key=order):
        extra = [d for d in relevant[query] if d not in chosen]
        if len(chosen) + len(extra) <= room:
            chosen.update(dict.fromkeys(extra))
            kept.append(query)
    for document in sorted((d for d in corpus if corpus[d].strip()), key=order):
        if len(chosen) >= limit:
            break
        chosen[document] = None
    return list(chosen), kept
