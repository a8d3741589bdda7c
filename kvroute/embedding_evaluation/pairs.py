"""Pairs of texts that belong together, out of the rows that anything may be trained on."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kvroute.contrastive import TextPair
from kvroute.embedding_evaluation.tasks import Tasks

_SAME = 0.8
"""STS pairs count as belonging together from this share of the set's largest score on."""


def open_pairs(tasks: Tasks, *, without: Collection[str] = (), partners: int = 2, seed: int = 0) -> list[TextPair]:
    """Texts of one label, STS pairs that mean the same, queries with their documents. No test row is among them.

    Args:
        tasks: the rows; train and dev rows are taken.
        without: names of sets to leave out.
        partners: texts of the same label that each text is paired with.
        seed: which.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for c in (c for c in tasks.classification if c.name not in without):
        by_label: dict[str, list[str]] = {}
        for text, label in c.train + c.dev:
            by_label.setdefault(label, []).append(text)
        for label, texts in by_label.items():
            for _ in range(partners if len(texts) > 1 else 0):
                turned = rng.permutation(len(texts))
                for place, at in enumerate(turned):
                    other = turned[place - 1]
                    if texts[at] != texts[other]:
                        pairs.append(TextPair(texts[at], texts[other], f"{c.name}: {label}", c.name))
    for s in (s for s in tasks.sts if s.name not in without):
        least = _SAME * max(score for _, _, score in s.dev)
        pairs += [TextPair(a, b, None, s.name) for a, b, score in s.dev if score >= least and a != b]
    for r in (r for r in tasks.retrieval if r.name not in without):
        pairs += [TextPair(q, r.documents[d], None, r.name) for q, judged in r.dev for d in judged]
    return pairs
