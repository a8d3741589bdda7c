"""The rows that embedding_quality.py measures on: deterministic subsets, split before anything is looked at."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLASSIFICATION = ("banking77", "clinc150", "amazon_counterfactual_en", "tweeteval_emotion", "trec6")
STS = ("stsb_en_test", "sts13")
RETRIEVAL = ("cranfield", "scifact_small", "limit_small")


def in_dev(key: str) -> bool:
    """Half of the rows, by a hash of their id: those are tuned on, the others reported on."""
    return hashlib.sha256(key.encode()).digest()[0] < 128


def _order(key: str) -> str:
    return hashlib.sha256(f"order:{key}".encode()).hexdigest()


@dataclass
class Classification:
    name: str
    train: list[tuple[str, str]]  # text, label: fitted on
    dev: list[tuple[str, str]]  # chosen on
    test: list[tuple[str, str]]  # reported on


@dataclass
class Sts:
    name: str
    dev: list[tuple[str, str, float]]
    test: list[tuple[str, str, float]]


@dataclass
class Retrieval:
    name: str
    documents: list[str]
    dev: list[tuple[str, dict[int, float]]]  # query, {document index: relevance}
    test: list[tuple[str, dict[int, float]]]


@dataclass
class Tasks:
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


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def load(folder: Path, *, train: int, test: int, pairs: int, documents: int) -> Tasks:
    """Read the sets; at most so many rows of each, taken in the order of a hash of their ids."""
    classification = []
    for name in CLASSIFICATION:
        rows = sorted(_rows(folder / f"classification/{name}.train.jsonl"), key=lambda r: _order(r["id"]))[:train]
        held = sorted(_rows(folder / f"classification/{name}.test.jsonl"), key=lambda r: _order(r["id"]))[:test]
        cut = len(rows) * 3 // 4
        pair = [(r["text"], r["label"]) for r in rows]
        classification.append(Classification(name, pair[:cut], pair[cut:], [(r["text"], r["label"]) for r in held]))
    sts = []
    for name in STS:
        rows = sorted(_rows(folder / f"sts/{name}.jsonl"), key=lambda r: _order(r["id"]))[:pairs]
        split: dict[bool, list[tuple[str, str, float]]] = {True: [], False: []}
        for r in rows:
            split[in_dev(r["id"])].append((r["sentence1"], r["sentence2"], float(r["score"])))
        sts.append(Sts(name, split[True], split[False]))
    return Tasks(classification, sts, [_retrieval(folder / "retrieval" / n, n, documents) for n in RETRIEVAL])


def _retrieval(folder: Path, name: str, limit: int) -> Retrieval:
    with (folder / "qrels.tsv").open(encoding="utf-8") as file:
        judged = [(r["query-id"], r["corpus-id"], float(r["score"])) for r in csv.DictReader(file, delimiter="\t")]
    corpus = {r["_id"]: f"{r['title']}. {r['text']}".strip(". ") for r in _rows(folder / "corpus.jsonl")}
    queries = {r["_id"]: r["text"] for r in _rows(folder / "queries.jsonl")}
    # Whole queries are kept, with all their relevant documents; the rest of the room is filled with others.
    relevant: dict[str, dict[str, float]] = {}
    for query, document, score in judged:
        if score > 0 and query in queries and corpus.get(document, "").strip():
            relevant.setdefault(query, {})[document] = score
    chosen: dict[str, None] = {}
    kept = []
    for query in sorted(relevant, key=_order):
        extra = [d for d in relevant[query] if d not in chosen]
        if len(chosen) + len(extra) <= limit * 3 // 4:
            chosen.update(dict.fromkeys(extra))
            kept.append(query)
    for document in sorted((d for d in corpus if corpus[d].strip()), key=_order):
        if len(chosen) >= limit:
            break
        chosen[document] = None
    place = {d: i for i, d in enumerate(chosen)}
    split: dict[bool, list[tuple[str, dict[int, float]]]] = {True: [], False: []}
    for query in kept:
        split[in_dev(f"{name}:{query}")].append((queries[query], {place[d]: s for d, s in relevant[query].items()}))
    return Retrieval(name, [corpus[d] for d in chosen], split[True], split[False])


def made_up() -> Tasks:
    """A handful of rows that show that the script runs, where the sets are not there."""
    animals = ["cat", "dog", "horse", "whale", "mouse", "eagle", "shark", "sheep"]
    money = ["bank", "loan", "price", "tax", "salary", "market", "debt", "bill"]
    pairs = [(f"The {a} is in the garden today.", "animal") for a in animals]
    pairs += [(f"The {m} is higher than last year.", "money") for m in money]
    pairs += [(f"I saw a {a} near the river.", "animal") for a in animals]
    pairs += [(f"They talked about the {m} again.", "money") for m in money]
    pairs = sorted(pairs, key=lambda p: _order(p[0]))
    classification = Classification("made_up_topics", pairs[:16], pairs[16:24], pairs[24:])
    graded = []
    for i, a in enumerate(animals):
        graded.append((f"A {a} sleeps.", f"The {a} is sleeping.", 5.0 - i / 10))
        graded.append((f"A {a} sleeps.", f"A {animals[i - 1]} runs.", 2.0 + i / 10))
        graded.append((f"A {a} sleeps.", f"The {money[i]} rises.", i / 10))
    documents = [f"Facts about the {x}: what a {x} is and where one finds it." for x in animals + money]
    queries = [(f"Where do I find a {x}?", {i: 1.0}) for i, x in enumerate(animals + money)]
    return Tasks(
        [classification],
        [Sts("made_up_pairs", graded[::2], graded[1::2])],
        [Retrieval("made_up_facts", documents, queries[::2], queries[1::2])],
    )
