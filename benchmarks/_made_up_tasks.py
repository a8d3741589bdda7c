"""A handful of rows that show that a measurement of embeddings runs, where the sets are not there."""

from __future__ import annotations

from kvroute.embedding_evaluation.tasks import Classification, Retrieval, Sts, Tasks, order


def made_up_tasks() -> Tasks:
    """Animals and money."""
    animals = ["cat", "dog", "horse", "whale", "mouse", "eagle", "shark", "sheep"]
    money = ["bank", "loan", "price", "tax", "salary", "market", "debt", "bill"]
    pairs = [(f"The {a} is in the garden today.", "animal") for a in animals]
    pairs += [(f"The {m} is higher than last year.", "money") for m in money]
    pairs += [(f"I saw a {a} near the river.", "animal") for a in animals]
    pairs += [(f"They talked about the {m} again.", "money") for m in money]
    pairs = sorted(pairs, key=lambda p: order(p[0]))
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
