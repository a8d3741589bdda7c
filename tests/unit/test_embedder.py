"""KVEmbedder on tiny random models: what goes in, what comes out, what is refused, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvroute import (
    EmptyTextError,
    FileFormatError,
    FrequencyTable,
    InvalidInputError,
    KVEmbedder,
    KVRouteError,
    ModelMismatchError,
    PoolingSpec,
    PostProcessor,
    SpecError,
    TextTooLongError,
    TransformersEngine,
)

TEXTS = [
    "the quick brown fox",
    "a",
    "question and answer: what is the capital of the country?",
    "keys and values of every token it has read, " * 4,
    "Zwölf Boxkämpfer jagen Viktor — 漢字 🙂",
]


@pytest.fixture(scope="module")
def embedder(tiny_engine: TransformersEngine) -> KVEmbedder:
    return KVEmbedder(tiny_engine, prompts={"query": "question: ", "document": "answer: "})


def test_one_text_gives_a_vector_and_many_a_matrix_in_their_order(embedder: KVEmbedder) -> None:
    matrix = embedder.encode(TEXTS)
    assert matrix.shape == (len(TEXTS), embedder.dimension)
    assert matrix.dtype == np.float32
    for row, text in zip(matrix, TEXTS, strict=True):
        one = embedder.encode(text)
        assert one.shape == (embedder.dimension,)
        np.testing.assert_allclose(one, row, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(TEXTS[::-1])[::-1], matrix, rtol=1e-5, atol=1e-6)
    assert embedder.encode([]).shape == (0, embedder.dimension)


def test_it_is_the_pooling_of_the_models_own_cache(tiny_engine: TransformersEngine) -> None:
    spec = PoolingSpec(layers=(0, 2), part="v", weights="sif", heads="concat", layer_reduce="concat")
    embedder = KVEmbedder(tiny_engine, spec)
    ids = tiny_engine.tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        cache = tiny_engine.model(ids, use_cache=True).past_key_values
    assert embedder.frequencies is not None
    weights = 1e-3 / (1e-3 + embedder.frequencies.frequencies[ids[0].numpy()])
    parts = []
    for layer in (0, 2):
        values = cache.layers[layer].values[0].double().numpy()  # [H, T, D]
        parts.append((values * weights[None, :, None]).sum(axis=1).reshape(-1) / weights.sum())
    np.testing.assert_allclose(embedder.encode(TEXTS[2]), np.concatenate(parts), rtol=1e-4, atol=1e-6)


def test_a_frequency_table_of_the_users_is_used(tiny_engine: TransformersEngine) -> None:
    table = FrequencyTable.fit([TEXTS[2]] * 50, tiny_engine.tokenizer)
    mine = KVEmbedder(tiny_engine, frequencies=table).encode(TEXTS[2])
    assert np.abs(mine - KVEmbedder(tiny_engine).encode(TEXTS[2])).max() > 1e-4


def test_torch_comes_out_where_asked(embedder: KVEmbedder) -> None:
    found = embedder.encode(TEXTS, convert_to="torch")
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), embedder.encode(TEXTS))
    with pytest.raises(InvalidInputError, match="convert_to"):
        embedder.encode(TEXTS, convert_to="jax")  # type: ignore[call-overload]


def test_prompts_are_put_before_the_text(embedder: KVEmbedder) -> None:
    plain = embedder.encode(TEXTS)
    query = embedder.encode(["question: " + t for t in TEXTS])
    document = embedder.encode(["answer: " + t for t in TEXTS])
    assert np.abs(query - plain).max() > 1e-3
    np.testing.assert_array_equal(embedder.encode_query(TEXTS), query)
    np.testing.assert_array_equal(embedder.encode(TEXTS, prompt_name="query"), query)
    np.testing.assert_array_equal(embedder.encode(TEXTS, prompt="question: "), query)
    np.testing.assert_array_equal(embedder.encode_document(TEXTS), document)
    np.testing.assert_array_equal(embedder.encode_query(TEXTS, prompt="answer: "), document)


def test_without_prompts_queries_and_documents_are_plain_texts(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine)
    np.testing.assert_array_equal(embedder.encode_query(TEXTS), embedder.encode_document(TEXTS))
    with pytest.raises(InvalidInputError, match="none"):
        embedder.encode(TEXTS, prompt_name="query")


def test_an_unknown_prompt_and_two_prompts_are_refused(embedder: KVEmbedder) -> None:
    with pytest.raises(InvalidInputError, match="query, document"):
        embedder.encode("a", prompt_name="passage")
    with pytest.raises(InvalidInputError, match="not both"):
        embedder.encode("a", prompt_name="query", prompt="x")


def test_unit_length_where_asked_and_where_the_spec_says(tiny_engine: TransformersEngine) -> None:
    plain = KVEmbedder(tiny_engine, PoolingSpec())
    unit = KVEmbedder(tiny_engine, PoolingSpec(normalize=True)).fit(TEXTS, method="center")
    np.testing.assert_allclose(np.linalg.norm(plain.encode(TEXTS, normalize=True), axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(plain.encode(TEXTS), axis=1).std() > 1e-3
    np.testing.assert_allclose(np.linalg.norm(unit.encode(TEXTS), axis=1), 1, rtol=1e-5)
    assert np.linalg.norm(unit.encode(TEXTS, normalize=False), axis=1).std() > 1e-3


def test_similarity_is_the_cosine(embedder: KVEmbedder) -> None:
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [0.0, -3.0], [0.0, 0.0]])
    root = 1 / np.sqrt(2)
    np.testing.assert_allclose(embedder.similarity(a, b), [[1, 0, 0], [root, -root, 0]], atol=1e-6)
    assert embedder.similarity(a[0], b).shape == (1, 3)
    with pytest.raises(InvalidInputError, match="2 and 3"):
        embedder.similarity(a, np.zeros((1, 3)))


async def test_async_twins_give_the_same(embedder: KVEmbedder) -> None:
    np.testing.assert_array_equal(await embedder.aencode(TEXTS), embedder.encode(TEXTS))
    np.testing.assert_array_equal(await embedder.aencode_query(TEXTS), embedder.encode_query(TEXTS))
    np.testing.assert_array_equal(await embedder.aencode_document("a"), embedder.encode_document("a"))


# ---------------------------------------------------------------------- input that can't be used


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        ("", EmptyTextError, "Text 0"),
        (["a", ""], EmptyTextError, "Text 1"),
        (["a", "b", 3], InvalidInputError, "Text 2 is int"),
        (["a", None], InvalidInputError, "Text 1 is NoneType"),
        (b"a", InvalidInputError, "Text 0 is int"),
        (7, InvalidInputError, "not int"),
        (["a", "b\ud800"], InvalidInputError, "Text 1"),
    ],
)
def test_what_is_no_text_is_refused_by_its_index(
    embedder: KVEmbedder, texts: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        embedder.encode(texts)
    with pytest.raises(error, match=words):
        embedder.encode_query(texts)  # a prompt does not hide an empty text


def test_a_text_past_the_context_is_cut_only_where_asked(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine, PoolingSpec(layers=(0,)))
    limit = tiny_engine.info.context
    length = len(tiny_engine.tokenizer("a " * limit)["input_ids"])
    assert length > limit
    with pytest.raises(TextTooLongError, match=f"Text 1 has {length} tokens") as caught:
        embedder.encode(["a", "a " * limit])
    assert (caught.value.index, caught.value.length, caught.value.limit) == (1, length, limit)
    cut = embedder.encode("a " * limit, truncate=True)
    ids = tiny_engine.tokenizer("a " * limit)["input_ids"][:limit]
    np.testing.assert_allclose(cut, tiny_engine.pool([ids], [embedder.spec])[0][0], rtol=1e-5)
    lenient = KVEmbedder(tiny_engine, PoolingSpec(layers=(0,)), truncate=True)
    np.testing.assert_array_equal(lenient.encode("a " * limit), cut)
    with pytest.raises(TextTooLongError):
        lenient.encode("a " * limit, truncate=False)


@given(st.lists(st.text(st.characters(codec=None), max_size=40), max_size=4))
@example(["\x00"])
@example(["\ud83d", "\udc00\ud800"])
@example(["x" * 100_000])
@example(["\u200b\ufeff", " ", "\n\n"])
@example(["<|pad|><|im_start|>"])
@settings(max_examples=60, deadline=None)
def test_any_text_gives_a_finite_vector_or_an_error_of_ours(embedder: KVEmbedder, texts: list[str]) -> None:
    try:
        vectors = embedder.encode(texts)
    except KVRouteError:
        return
    assert vectors.shape == (len(texts), embedder.dimension)
    assert np.isfinite(vectors).all()


def test_a_spec_that_does_not_fit_the_model_is_refused_at_once(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(SpecError, match="Layer 40"):
        KVEmbedder(tiny_engine, PoolingSpec(layers=(40,)))
    with pytest.raises(SpecError, match="No preset"):
        KVEmbedder(tiny_engine, "magic")


def test_post_processing_of_another_size_is_refused(tiny_engine: TransformersEngine) -> None:
    with pytest.raises(InvalidInputError, match="size 3"):
        KVEmbedder(tiny_engine, postprocess=PostProcessor("center", np.zeros(3)))


# ---------------------------------------------------------------------- fitting and files


def many(count: int) -> list[str]:
    words = ["fox", "dog", "cat", "mat", "key", "value", "token", "answer", "question", "country"]
    return [f"the {words[i % 10]} and the {words[i // 10 % 10]} {i}" for i in range(count)]


def test_fit_whitens_what_it_embeds(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine).fit(many(60), dimension=7)
    assert embedder.dimension == 7
    vectors = embedder.encode(many(60)).astype(np.float64)
    np.testing.assert_allclose(np.cov(vectors.T), np.eye(7), atol=1e-2)


def test_a_fit_that_fails_leaves_what_was_fitted_before(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine).fit(many(30), dimension=7)
    with pytest.raises(InvalidInputError, match="were asked for"):
        embedder.fit(many(5), dimension=7)
    with pytest.raises(EmptyTextError, match="Text 1"):
        embedder.fit(["a", ""])
    assert embedder.dimension == 7


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "fitted"])
def test_saved_and_loaded_it_does_the_same(fitted: bool, tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    table = FrequencyTable.fit(TEXTS, tiny_engine.tokenizer)
    embedder = KVEmbedder(tiny_engine, "fast", prompts={"query": "q: "}, frequencies=table, truncate=True)
    if fitted:
        embedder.fit(many(30), dimension=5)
    embedder.save(tmp_path / "e")
    loaded = KVEmbedder.load(tmp_path / "e", tiny_engine)
    np.testing.assert_array_equal(loaded.encode_query(TEXTS), embedder.encode_query(TEXTS))
    assert (loaded.spec, loaded.prompts, loaded.truncate) == (embedder.spec, {"query": "q: "}, True)
    assert loaded.dimension == embedder.dimension
    assert {p.suffix for p in (tmp_path / "e").iterdir()} == {".json", ".safetensors"}
    if fitted:
        facts = loaded.postprocess.facts if loaded.postprocess else {}
        assert facts["fingerprint"] == tiny_engine.info.fingerprint
        assert facts["texts"] == 30
        assert len(facts["texts_digest"]) == 16


def test_another_models_embedder_is_refused_and_both_are_named(
    tiny_engine: TransformersEngine, tiny_model: Any, tmp_path: Path
) -> None:
    KVEmbedder(tiny_engine).save(tmp_path)
    other = TransformersEngine(tiny_model("llama", seed=1), tiny_engine.tokenizer, name="another")
    with pytest.raises(ModelMismatchError, match=r"tiny-llama.*another"):
        KVEmbedder.load(tmp_path, other)


def test_files_that_are_torn_or_missing_or_mixed_are_refused(tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    KVEmbedder(tiny_engine, PoolingSpec(layers=(0,))).fit(many(20), dimension=4).save(first)
    KVEmbedder(tiny_engine, PoolingSpec(layers=(1,))).fit(many(20), dimension=4).save(second)

    def refused(name: str, data: bytes | None, words: str) -> None:
        path = first / name
        whole = path.read_bytes()
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(FileFormatError, match=words):
            KVEmbedder.load(first, tiny_engine)
        path.write_bytes(whole)

    config = (first / "embedder.json").read_text()
    refused("embedder.json", None, "can't be read")
    refused("embedder.json", config[:-30].encode(), "can't be read")
    refused("embedder.json", config.replace('"truncate": false', '"truncate": true').encode(), "changed")
    refused("embedder.json", config.replace('"format": "1"', '"format": "2"').encode(), "newer")
    refused("embedder.json", json.dumps([1]).encode(), "not a file of kvroute")
    refused("postprocess.safetensors", None, "missing")
    refused("postprocess.safetensors", (first / "postprocess.safetensors").read_bytes()[:-9], "torn")
    refused("postprocess.safetensors", (second / "postprocess.safetensors").read_bytes(), "its model or its spec")
    KVEmbedder.load(first, tiny_engine)


def test_a_nan_in_the_cache_is_reported_with_its_place(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    embedder = KVEmbedder(TransformersEngine(model, tiny_tokenizer), PoolingSpec(layers="all"))
    with pytest.raises(KVRouteError, match="layer 1"):
        embedder.encode(TEXTS)


def test_texts_may_be_any_sequence(embedder: KVEmbedder) -> None:
    sequence: Sequence[str] = tuple(TEXTS)
    np.testing.assert_array_equal(embedder.encode(sequence), embedder.encode(TEXTS))
    np.testing.assert_array_equal(embedder.encode(np.array(TEXTS)), embedder.encode(TEXTS))  # type: ignore[arg-type]


def test_a_prompt_may_stand_around_the_text(tiny_engine: TransformersEngine) -> None:
    around = 'This: "{text}" means: "'
    spec = PoolingSpec(layers="last:2", part="v", tokens="last", heads="concat", layer_reduce="concat")
    embedder = KVEmbedder(tiny_engine, spec, prompts={"document": around})
    plain = KVEmbedder(tiny_engine, spec)
    texts = ["a {text} of mine", "short"]
    np.testing.assert_allclose(
        embedder.encode_document(texts), plain.encode([around.replace("{text}", t) for t in texts]), atol=1e-5
    )


def test_truncation_keeps_what_stands_behind_the_text(tiny_engine: TransformersEngine) -> None:
    around = "say {text} in one word:"
    embedder = KVEmbedder(tiny_engine, "paper-mteb", prompts={"document": around})
    long = "word " * tiny_engine.info.context
    with pytest.raises(TextTooLongError):
        embedder.encode_document(long)
    [ids] = embedder._tokenize([long], around, True)
    end = tiny_engine.tokenize_texts([" in one word:"], special_tokens=False)[0]
    assert len(ids) == tiny_engine.info.context
    assert ids[-len(end) :] == end
    assert embedder.encode_document(long, truncate=True).shape == (embedder.dimension,)
