"""Embedders by name, and what makes their vectors comparable."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvroute import (
    EmbedderHandle,
    EmbeddingIdentity,
    EngineHandle,
    EngineName,
    FileFormatError,
    FrequencyTable,
    InvalidInputError,
    KVEmbedder,
    ModelMismatchError,
    PoolingSpec,
    SpecError,
    TransformersEngine,
)

TEXTS = ["the quick brown fox", "a cat sat on the mat", "question and answer", "keys and values"]


def named(model: str, **how: object) -> EmbedderHandle:
    return EmbedderHandle(engine=EngineHandle(name=EngineName(model)), **how)  # type: ignore[arg-type]


def test_it_is_made_once_at_its_first_use(tiny_folder: Callable[[str], str]) -> None:
    handle = named(tiny_folder("llama"), spec="paper-mteb")
    assert not handle.opened
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: handle.get(), range(4)))
    assert all(one is made[0] for one in made)
    assert handle.opened
    assert made[0].spec == PoolingSpec.preset("paper-mteb")


def test_pickles_and_copies(tiny_folder: Callable[[str], str], tiny_engine: TransformersEngine) -> None:
    handle = named(tiny_folder("llama"), spec=PoolingSpec(layers="last:1"))
    again = pickle.loads(pickle.dumps(handle))  # noqa: S301 - our own
    assert again.signature() == handle.signature()
    assert again.get().engine is handle.get().engine
    assert copy.deepcopy(handle) is handle
    for given in (EmbedderHandle(KVEmbedder(tiny_engine)), EmbedderHandle(engine=EngineHandle(tiny_engine))):
        assert given.given
        assert given.get().engine is tiny_engine
        with pytest.raises(InvalidInputError, match="Name the model"):
            pickle.dumps(given)


def test_a_signature_differs_where_vectors_may(
    tiny_folder: Callable[[str], str], tiny_engine: TransformersEngine, tmp_path: Path
) -> None:
    folder = tiny_folder("llama")
    KVEmbedder(tiny_engine).fit(TEXTS, method="center").save(tmp_path)
    first = named(folder, folder=tmp_path)
    handles = [named(folder), named(folder, spec="fast"), first, named(tiny_folder("qwen3"))]
    before = first.signature()
    assert len({h.signature() for h in handles}) == 4
    assert not any(h.opened for h in handles)
    KVEmbedder(tiny_engine).fit(TEXTS[:3], method="center").save(tmp_path)
    assert first.signature() != before


def test_what_makes_no_sense(tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    embedder, engine = KVEmbedder(tiny_engine), EngineHandle(tiny_engine)
    for wrong in (
        {},
        {"embedder": embedder, "engine": engine},
        {"embedder": embedder, "spec": "best"},
        {"engine": engine, "spec": "best", "folder": tmp_path},
    ):
        with pytest.raises(InvalidInputError):
            EmbedderHandle(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="bets"):
        EmbedderHandle(engine=engine, spec="bets")
    with pytest.raises(FileFormatError):
        EmbedderHandle(engine=engine, folder=tmp_path / "none").get()


def test_identities_of_the_same_vectors(tiny_engine: TransformersEngine) -> None:
    def of(spec: PoolingSpec | str, **how: object) -> str:
        return EmbeddingIdentity.of(KVEmbedder(tiny_engine, spec), **how).digest  # type: ignore[arg-type]

    deepest = tiny_engine.info.num_layers - 1
    base = of(PoolingSpec(layers="last:1"))
    assert base == of(PoolingSpec(layers=(deepest,))) == of(PoolingSpec(layers=(-1,), sif_a=0.5))
    assert base == of(PoolingSpec(layers="last:1", normalize=True), normalize=False)
    assert base != of(PoolingSpec(layers="last:1", normalize=True))
    assert base != of(PoolingSpec(layers="last:2"))
    assert base != of(PoolingSpec(layers="last:1"), query="q: ")
    assert of("best") == of("fast"), "five layers have one in their first quarter and in their first seventh"
    table = FrequencyTable.fit(TEXTS, tiny_engine.tokenizer)
    assert EmbeddingIdentity.of(KVEmbedder(tiny_engine, frequencies=table)).digest != of("best")


def test_prompts_and_fits_count_and_a_new_fit_is_noticed(tiny_engine: TransformersEngine) -> None:
    embedder = KVEmbedder(tiny_engine, prompts={"query": "q: ", "document": "d: "})
    handle = EmbedderHandle(embedder)
    first = handle.identity()
    assert (first.query, first.document, first.postprocess) == ("q: ", "d: ", None)
    assert handle.identity() is first
    assert handle.identity(query="other: ").query == "other: "
    embedder.fit(TEXTS, method="center")
    second = handle.identity()
    assert second.postprocess is not None
    with pytest.raises(ModelMismatchError) as refused:
        second.require(first, "The store")
    said = str(refused.value)
    assert said.startswith(
        f"The store holds vectors of {first}, and those at hand are of {second}: postprocess None and"
    )
    second.require(handle.identity(), "The store")


def test_identities_in_files(tiny_engine: TransformersEngine, tmp_path: Path) -> None:
    identity = EmbeddingIdentity.of(KVEmbedder(tiny_engine))
    path = tmp_path / "identity.json"
    identity.save(path)
    assert EmbeddingIdentity.load(path) == identity
    whole = json.loads(path.read_text())
    whole["body"]["query"] = "changed: "
    path.write_text(json.dumps(whole))
    with pytest.raises(FileFormatError, match="changed"):
        EmbeddingIdentity.load(path)
