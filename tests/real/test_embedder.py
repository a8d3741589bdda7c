"""KVEmbedder on the real SmolLM2: neighbours make sense, batches don't matter, SIF is what its formula says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvroute import FrequencyTable, KVEmbedder, PoolingSpec, TransformersEngine

pytestmark = pytest.mark.real

PAIRS = [
    ("A man is playing a guitar on the stage.", "Someone performs music with a guitar."),
    ("The cat sleeps on the warm sofa.", "A kitten is napping on the couch."),
    ("How do I reset the password of my account?", "I forgot my login password, what can I do?"),
    ("The stock market fell sharply on Monday.", "Share prices dropped a lot at the start of the week."),
    ("Add two eggs and a cup of flour, then stir.", "Mix the flour with the eggs to make the dough."),
    ("The spacecraft landed on the surface of Mars.", "A probe touched down on the red planet Mars."),
]


def nearest(vectors: np.ndarray, embedder: KVEmbedder) -> list[int]:
    similarity = embedder.similarity(vectors, vectors)
    np.fill_diagonal(similarity, -np.inf)
    return [int(i) for i in similarity.argmax(axis=1)]


@pytest.mark.parametrize("preset", ["best", "fast"])
def test_the_nearest_neighbour_of_a_sentence_is_its_paraphrase(smollm2: TransformersEngine, preset: str) -> None:
    embedder = KVEmbedder(smollm2, preset)
    texts = [text for pair in PAIRS for text in pair]
    found = nearest(embedder.encode(texts), embedder)
    right = sum(place == (i ^ 1) for i, place in enumerate(found))  # partners lie side by side
    assert right >= 10, [texts[i] for i in found]


def test_a_vector_does_not_depend_on_its_batch(smollm2: TransformersEngine) -> None:
    embedder = KVEmbedder(smollm2)
    rng = np.random.default_rng(0)
    words = " ".join(text for pair in PAIRS for text in pair).split()
    texts = [" ".join(rng.choice(words, size=int(n))) for n in rng.integers(1, 40, size=64)]
    together = embedder.encode(texts)
    order = rng.permutation(64)
    np.testing.assert_allclose(embedder.encode([texts[i] for i in order]), together[order], rtol=1e-5, atol=1e-5)
    scale = np.abs(together).max(axis=1)
    for index in range(0, 64, 5):
        alone = embedder.encode(texts[index])
        assert np.abs(alone - together[index]).max() <= 1e-5 * scale[index]


@torch.inference_mode()
def test_sif_is_the_formula_in_float64_over_the_models_own_cache(smollm2: TransformersEngine) -> None:
    text = PAIRS[3][0]
    table = FrequencyTable.fit([t for pair in PAIRS for t in pair], smollm2.tokenizer)
    spec = PoolingSpec(layers=(0, 7, 20), part="kv", weights="sif", sif_a=1e-2, heads="concat", layer_reduce="concat")
    found = KVEmbedder(smollm2, spec, frequencies=table).encode(text)

    ids = smollm2.tokenizer(text, return_tensors="pt")["input_ids"]
    cache = smollm2.model(ids, use_cache=True).past_key_values
    weights = 1e-2 / (1e-2 + table.frequencies[ids[0].numpy()])
    parts = []
    for side in ("keys", "values"):
        for layer in (0, 7, 20):
            states = getattr(cache.layers[layer], side)[0].double().numpy()  # [H, T, D]
            parts.append(np.einsum("htd,t->hd", states, weights).reshape(-1) / weights.sum())
    wanted = np.concatenate(parts)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_common_words_weigh_less_than_rare_ones(smollm2: TransformersEngine) -> None:
    weights = FrequencyTable.from_vocabulary(smollm2.tokenizer).weights()
    of = {word: weights[smollm2.tokenizer(word)["input_ids"]] for word in (" the", " of", " guitar", " Mars")}
    assert all(len(w) == 1 for w in of.values())
    assert max(of[" the"], of[" of"]) < 0.5 * min(of[" guitar"], of[" Mars"])


def test_a_few_hundred_texts_are_enough_to_whiten(smollm2: TransformersEngine) -> None:
    rng = np.random.default_rng(1)
    words = " ".join(text for pair in PAIRS for text in pair).split()
    embedder = KVEmbedder(smollm2, "fast").fit([" ".join(rng.choice(words, size=8)) for _ in range(96)], dimension=32)
    vectors = embedder.encode([text for pair in PAIRS for text in pair])
    assert vectors.shape == (12, 32)
    right = sum(place == (i ^ 1) for i, place in enumerate(nearest(vectors, embedder)))
    assert right >= 9
