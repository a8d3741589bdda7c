"""A trained projection: it draws pairs together, holds out what it chooses on, is saved like any post-processing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvroute import KVEmbedder, PoolingSpec, PostProcessor, TransformersEngine
from kvroute.contrastive import TextPair, fit_projection, split_pairs
from kvroute.embedding_evaluation.measures import unit
from kvroute.errors import InvalidInputError


def noisy_labels(labels: int = 8, each: int = 24, dim: int = 24) -> tuple[np.ndarray, list[str], list[TextPair]]:
    """Vectors whose labels lie in four directions, under noise that is larger in the others."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(labels, 4))
    label = np.repeat(np.arange(labels), each)
    vectors = rng.normal(scale=3.0, size=(labels * each, dim))
    vectors[:, :4] = centres[label] + rng.normal(scale=0.4, size=(labels * each, 4))
    texts = [f"text {i}" for i in range(labels * each)]
    pairs = [
        TextPair(texts[i], texts[int(rng.choice(np.flatnonzero(label == label[i])))], f"label {label[i]}", "labels")
        for i in range(len(texts))
        for _ in range(3)
    ]
    return vectors, texts, [p for p in pairs if p.a != p.b]


def neighbours_agree(vectors: np.ndarray, each: int = 24) -> float:
    """Share of vectors whose nearest other one has the same label."""
    similarity = unit(vectors) @ unit(vectors).T
    np.fill_diagonal(similarity, -2)
    return float(np.mean(similarity.argmax(axis=1) // each == np.arange(len(vectors)) // each))


def test_texts_that_belong_together_come_near_also_those_it_never_saw() -> None:
    vectors, texts, pairs = noisy_labels()
    seen = {t for i, t in enumerate(texts) if i % 4}
    known = [p for p in pairs if p.a in seen and p.b in seen]
    place = [i for i, t in enumerate(texts) if t in seen]
    fitted = fit_projection(vectors[place], [texts[i] for i in place], known, dimension=12, batch=32, progress=False)
    plain = PostProcessor.fit(vectors[place], "whiten", 12)
    assert fitted.method == "contrastive"
    assert fitted.facts["loss"] < fitted.facts["loss_before"]
    new = [i for i, t in enumerate(texts) if t not in seen]
    of_new = [fitted.transform(vectors[new]), plain.transform(vectors[new])]
    mine, theirs = (neighbours_agree(v, each=6) for v in of_new)
    assert mine > theirs + 0.2


def test_the_same_pairs_give_the_same_projection() -> None:
    vectors, texts, pairs = noisy_labels(labels=4)
    one, two = (
        fit_projection(vectors, texts, pairs, dimension=6, epochs=2, seed=3, progress=False).components
        for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


def test_pairs_that_cannot_be_learned_leave_the_whitening() -> None:
    rng = np.random.default_rng(0)
    vectors, texts = rng.normal(size=(200, 8)), [f"text {i}" for i in range(200)]
    pairs = [TextPair(texts[i], texts[int(j)]) for i, j in enumerate(rng.permutation(200)) if i != j]
    fitted = fit_projection(vectors, texts, pairs, dimension=4, epochs=3, progress=False)
    assert fitted.facts["loss"] <= fitted.facts["loss_before"]


def test_what_is_chosen_on_has_a_text_that_nothing_was_trained_on() -> None:
    _, _, pairs = noisy_labels()
    train, held = split_pairs(pairs)
    assert len(train) + len(held) == len(pairs)
    trained = {t for p in train for t in (p.a, p.b)}
    assert all(p.a not in trained or p.b not in trained for p in held)
    assert len(train) > 4 * len(held) > 0


def test_vectors_that_vary_in_few_directions() -> None:
    """Some sizes are sums of others, as of many sentence embeddings: what varies is taken."""
    vectors, texts, pairs = noisy_labels(dim=10)
    doubled = np.concatenate([vectors, vectors[:, :3] + vectors[:, 3:6]], axis=1)
    fitted = fit_projection(doubled, texts, pairs, batch=32, epochs=2, progress=False)
    assert (fitted.input_dimension, fitted.dimension) == (13, 10)
    with pytest.raises(InvalidInputError, match="allow 10 dimensions, and 12 were asked for"):
        fit_projection(doubled, texts, pairs, dimension=12, batch=32, progress=False)


def test_what_cannot_be_trained_on_is_refused() -> None:
    vectors, texts, pairs = noisy_labels(labels=4)
    with pytest.raises(InvalidInputError, match="too few"):
        fit_projection(vectors, texts, pairs[:4])
    with pytest.raises(InvalidInputError, match="no vector"):
        fit_projection(vectors[:-1], texts[:-1], pairs)
    with pytest.raises(InvalidInputError, match="dimensions"):
        fit_projection(vectors, texts, pairs, dimension=4000)
    with pytest.raises(InvalidInputError, match="fit_pairs"):
        PostProcessor.fit(vectors, "contrastive")


def test_an_embedder_learns_from_pairs_and_is_loaded_with_what_it_learned(
    tiny_engine: TransformersEngine, tmp_path: Path
) -> None:
    things = ("fox", "dog", "cat", "mat", "key", "value", "token", "answer", "model", "country")
    ways = ("the lazy {}", "a quick {}", "what is the {}?", "{} and {}", "every {} it has", "the {} sat on it")
    pairs = [
        TextPair(one.replace("{}", thing), other.replace("{}", thing), thing)
        for thing in things
        for one, other in zip(ways, (*ways[1:], ways[0]), strict=True)
    ]
    spec = PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="concat")
    embedder = KVEmbedder(tiny_engine, spec).fit_pairs(pairs, texts=["over the mat"], dimension=8, progress=False)
    texts = ["the quick model", "a question"]
    assert embedder.dimension == 8
    assert embedder.postprocess is not None
    assert embedder.postprocess.facts["pairs"] + embedder.postprocess.facts["pairs_held_out"] <= len(pairs)
    embedder.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = KVEmbedder.load(tmp_path, tiny_engine)
    np.testing.assert_array_equal(again.encode(texts), embedder.encode(texts))
    before = embedder.postprocess
    with pytest.raises(InvalidInputError, match="too few"):
        embedder.fit_pairs([("a fox", "the fox")])
    assert embedder.postprocess is before
