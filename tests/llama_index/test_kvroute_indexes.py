"""KVRouteEmbedding in use: indexes, pipelines with cache and processes, FAISS, reloading, and the guard."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import faiss
import llama_index.core
import numpy as np
import pytest
from llama_index.core import Document, PromptTemplate, StorageContext, VectorStoreIndex, load_index_from_storage
from llama_index.core.ingestion import DocstoreStrategy, IngestionCache, IngestionPipeline
from llama_index.core.ingestion import pipeline as ingestion
from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.vector_stores.faiss import FaissVectorStore

from kvroute import FileFormatError, InvalidInputError, KVEmbedder, ModelMismatchError, PoolingSpec, TransformersEngine
from llama_index.embeddings.kvroute import (
    MARK_FILE,
    STAMP_KEY,
    EmbeddingGuard,
    KVRouteEmbedding,
    check_index,
    check_nodes,
    mark_index,
)

# LlamaIndex 0.14.0 calls it itself.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated method get_doc_id:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
THINKER = str(ROOT / "examples" / "tiny_thinker" / "model")
TEXTS = [
    "run so:a=1,b=2 from a",
    "map so:c>e,d>k,e>g from c",
    "top so:7,3,9,1",
    "draw so:hq",
    "run so:b=7,c=4",
    "top so:5",
]


@pytest.fixture
def documents() -> list[Document]:
    return [Document(text=text, id_=f"d{i}", metadata={"source": i}) for i, text in enumerate(TEXTS)]


def thinker(**settings: Any) -> KVRouteEmbedding:
    return KVRouteEmbedding(THINKER, **settings)


def found(index: Any, text: str, **how: Any) -> list[str]:
    return [n.node.get_content() for n in index.as_retriever(similarity_top_k=2, **how).retrieve(text)]


# ---------------------------------------------------------------------- indexes


async def test_a_text_finds_itself_sync_and_async(documents: list[Document]) -> None:
    plain = [Document(text=t) for t in TEXTS]
    index = VectorStoreIndex.from_documents(plain, embed_model=thinker(normalize=True))
    for text in TEXTS:
        [best, second] = index.as_retriever(similarity_top_k=2).retrieve(text)
        assert best.node.get_content() == text
        assert best.score == pytest.approx(1.0, abs=1e-4)
        assert second.score < best.score
    [best] = await index.as_retriever(similarity_top_k=1).aretrieve(TEXTS[3])
    assert best.node.get_content() == TEXTS[3]
    index.insert(Document(text="map so:z>1 from z"))
    assert found(index, "map so:z>1 from z")[0] == "map so:z>1 from z"


@pytest.mark.real
def test_questions_find_what_answers_them(smollm2: TransformersEngine) -> None:
    pairs = {
        "How do plants make food from sunlight?": "Photosynthesis turns light, water and carbon dioxide into sugar.",
        "Who painted the Mona Lisa?": "Leonardo da Vinci painted the Mona Lisa in Florence.",
        "What is the capital of France?": "Paris is the capital city of France, on the river Seine.",
        "How is steel made from iron?": "Steel is iron from a furnace with a little carbon left in it.",
        "Why does the moon pull the tides?": "Tides rise because the moon's gravity pulls on the sea.",
        "How do I bake bread?": "Bread is baked from flour, water, salt and yeast.",
    }
    facts = list(pairs.values())
    embedder = KVEmbedder(smollm2).fit([*facts, *pairs], method="center")
    index = VectorStoreIndex.from_documents(
        [Document(text=t) for t in facts], embed_model=KVRouteEmbedding(embedder=embedder)
    )
    right = [found(index, question)[0] == fact for question, fact in pairs.items()]
    assert sum(right) >= 5, right  # 1 of 6 by chance


def test_faiss_and_a_saved_index_that_reloads(documents: list[Document], tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    embedding = thinker(normalize=True, index_folder=folder)
    size = len(embedding.get_query_embedding("a"))
    assert not Path(folder).exists(), "a query marks nothing"
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(size))
    index = VectorStoreIndex.from_documents(
        documents, storage_context=StorageContext.from_defaults(vector_store=store), embed_model=embedding
    )
    before = {t: found(index, t) for t in TEXTS}
    index.storage_context.persist(folder)

    def reload(**settings: Any) -> Any:
        store = FaissVectorStore.from_persist_dir(folder)
        context = StorageContext.from_defaults(vector_store=store, persist_dir=folder)
        return load_index_from_storage(context, embed_model=thinker(index_folder=folder, **settings))

    again = reload(normalize=True)
    assert {t: found(again, t) for t in TEXTS} == before
    again.insert(Document(text="draw so:zz"))
    assert "draw so:zz" in found(again, "draw so:zz")
    with pytest.raises(ModelMismatchError, match="normalize True and False"):
        found(reload(), TEXTS[0])


def test_the_plain_store_reloads_beside_the_mark(documents: list[Document], tmp_path: Path) -> None:
    embedding = thinker(index_folder=tmp_path)
    VectorStoreIndex.from_documents(documents, embed_model=embedding).storage_context.persist(str(tmp_path))
    context = StorageContext.from_defaults(persist_dir=str(tmp_path))
    assert "draw so:hq" in found(load_index_from_storage(context, embed_model=embedding), "draw so:hq")[0]


# ---------------------------------------------------------------------- pipelines


class Counted(KVRouteEmbedding):
    """Counts texts that the model really embeds."""

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        COUNT.extend(texts)
        return super()._get_text_embeddings(texts)


COUNT: list[str] = []


def test_a_pipelines_cache_hits_and_another_spec_misses(documents: list[Document], tmp_path: Path) -> None:
    def run(cache: IngestionCache, **settings: Any) -> tuple[int, list[list[float]]]:
        COUNT.clear()
        steps = [SentenceSplitter(chunk_size=64, chunk_overlap=0), Counted(THINKER, **settings)]
        nodes = IngestionPipeline(transformations=steps, cache=cache).run(documents=documents)
        return len(COUNT), [n.embedding for n in nodes]

    cache = IngestionCache()
    count, first = run(cache)
    assert count == len(TEXTS)
    assert run(cache) == (0, first)
    for settings in ({"spec": "paper-mteb"}, {"text_instruction": "x: "}, {"normalize": True}):
        count, other = run(cache, **settings)
        assert count == len(TEXTS), settings
        assert other != first
        assert run(cache, **settings) == (0, other)
    copied = tmp_path / "model"
    shutil.copytree(THINKER, copied)
    pipeline = IngestionPipeline(transformations=[Counted(str(copied))], cache=cache)
    for changed, expected in ((False, len(TEXTS)), (False, 0), (True, len(TEXTS))):
        if changed:  # trained anew in its place
            (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
        COUNT.clear()
        pipeline.run(documents=documents)
        assert len(COUNT) == expected


async def test_a_pipeline_stamps_its_nodes_and_leaves_the_documents(documents: list[Document]) -> None:
    embedding = thinker()
    hashes = [d.hash for d in documents]
    for nodes in (embedding(documents), await embedding.acall(documents)):
        assert [n.metadata[STAMP_KEY] for n in nodes] == [str(embedding.identity)] * len(TEXTS)
        for node, document in zip(nodes, documents, strict=True):
            assert node.embedding == document.embedding
            for mode in (MetadataMode.EMBED, MetadataMode.LLM):
                assert STAMP_KEY not in node.get_content(metadata_mode=mode)
                assert "source" in node.get_content(metadata_mode=mode)
    assert [d.hash for d in documents] == hashes


def test_upserts_skip_what_is_there(documents: list[Document]) -> None:
    pipeline = IngestionPipeline(
        transformations=[Counted(THINKER)],
        docstore=SimpleDocumentStore(),
        vector_store=SimpleVectorStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
        disable_cache=True,
    )
    COUNT.clear()
    pipeline.run(documents=documents)
    pipeline.run(documents=[*documents, Document(text="draw so:new", id_="new")])
    assert len(COUNT) == len(TEXTS) + 1


@pytest.mark.slow
def test_parallel_workers_are_processes_and_their_cache_hits(
    documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pickled splitter looks for its tokenizer on the network, though llama-index-core brings it.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))

    def pipeline(**settings: Any) -> IngestionPipeline:
        embedding = thinker(index_folder=tmp_path / "store", **settings)
        return IngestionPipeline(transformations=[SentenceSplitter(), embedding], cache=cache)

    cache = IngestionCache()
    nodes = pipeline().run(documents=documents, num_workers=2)
    assert [n.ref_doc_id for n in nodes] == [d.id_ for d in documents]
    alone = thinker().get_text_embedding_batch([n.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes])
    np.testing.assert_allclose([n.embedding for n in nodes], alone, rtol=1e-4, atol=1e-5)
    check_index(tmp_path / "store", thinker())
    if not hasattr(ingestion, "_run_transformations_worker"):
        return  # LlamaIndex 0.14.0 throws the caches of workers away
    (tmp_path / "store" / MARK_FILE).unlink()
    again = pipeline().run(documents=documents, num_workers=2)
    assert [n.embedding for n in again] == [n.embedding for n in nodes]
    assert not (tmp_path / "store" / MARK_FILE).exists(), "the first text embedded makes it: none was"


# ---------------------------------------------------------------------- a switch on an index that is there


@pytest.fixture
def other_model(tiny_folder: Any) -> str:
    return str(tiny_folder("llama"))


def switches(other_model: str, tmp_path: Path) -> dict[str, KVRouteEmbedding]:
    engine = TransformersEngine.from_pretrained(THINKER)
    fitted = KVEmbedder(engine, "paper-mteb").fit(TEXTS, method="center")
    same: dict[str, Any] = {"spec": "paper-mteb", "query_instruction": "q: ", "index_folder": tmp_path}
    return {
        "fingerprint": KVRouteEmbedding(other_model, **same),
        "spec": thinker(**{**same, "spec": PoolingSpec(layers="last:2", normalize=True)}),
        "query": thinker(**{**same, "query_instruction": "ask: "}),
        "document": thinker(**same, text_instruction="d: "),
        "normalize": thinker(**same, normalize=False),
        "postprocess": KVRouteEmbedding(embedder=fitted, query_instruction="q: ", index_folder=tmp_path),
    }


def test_every_switch_is_refused_naming_both(documents: list[Document], other_model: str, tmp_path: Path) -> None:
    made_with = thinker(spec="paper-mteb", query_instruction="q: ", index_folder=tmp_path)
    VectorStoreIndex.from_documents(documents, embed_model=made_with).storage_context.persist(str(tmp_path))
    for what, other in switches(other_model, tmp_path).items():
        context = StorageContext.from_defaults(persist_dir=str(tmp_path))
        index: Any = load_index_from_storage(context, embed_model=other)
        for deed in (
            lambda index=index: index.as_retriever().retrieve("a"),
            lambda index=index: index.insert(Document(text="new")),
            lambda other=other: check_index(tmp_path, other),
            lambda other=other: mark_index(tmp_path, other),
        ):
            with pytest.raises(ModelMismatchError) as refused:
                deed()
            said = str(refused.value)
            assert f"{what} " in said
            assert str(made_with.identity) in said
            assert str(other.identity) in said
            assert str(tmp_path) in said


async def test_async_is_refused_too(documents: list[Document], tmp_path: Path) -> None:
    await thinker(index_folder=tmp_path).aget_text_embedding_batch(["a"])
    other = thinker(index_folder=tmp_path, spec="paper-mteb")
    for work in (other.aget_query_embedding("a"), other.aget_text_embedding_batch(["a"]), other.acall(documents)):
        with pytest.raises(ModelMismatchError, match="spec"):
            await work


def test_the_same_vectors_by_another_name_or_engine_pass(tmp_path: Path) -> None:
    thinker(spec=PoolingSpec(layers=(-1,)), index_folder=tmp_path).get_text_embedding("a")
    engine = TransformersEngine.from_pretrained(THINKER)
    for same in (
        thinker(spec=PoolingSpec(layers="last:1", sif_a=0.5), index_folder=tmp_path),
        KVRouteEmbedding(engine=engine, spec=PoolingSpec(layers=(4,)), index_folder=tmp_path, embed_batch_size=2),
    ):
        assert same.get_query_embedding("a")
        check_index(tmp_path, same)


def test_folders_without_a_mark_or_with_a_torn_one(tmp_path: Path) -> None:
    embedding = thinker()
    with pytest.raises(InvalidInputError, match="index_folder"):
        check_index(tmp_path, embedding)
    mark_index(tmp_path, embedding)
    check_index(tmp_path, embedding)
    path = tmp_path / MARK_FILE
    path.write_text(path.read_text().replace('"normalize": false', '"normalize": true'))
    with pytest.raises(FileFormatError, match="changed"):
        thinker(index_folder=tmp_path).get_query_embedding("a")


def test_a_text_that_fails_marks_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        thinker(index_folder=tmp_path).get_text_embedding("")
    assert not list(tmp_path.iterdir())


class ThinkerLLM(CustomLLM):
    """The tiny thinker as LlamaIndex sees a language model: just enough to answer."""

    engine: Any

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(context_window=self.engine.info.context, num_output=8, model_name=self.engine.info.name)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponse:
        return CompletionResponse(text=self.engine.generate([{"role": "user", "content": prompt}], max_tokens=8).text)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **_: Any) -> CompletionResponseGen:
        yield self.complete(prompt)


def test_stamped_nodes_are_refused_after_retrieval(documents: list[Document]) -> None:
    made_with, other = thinker(), thinker(spec=PoolingSpec(layers=(0,), part="v", heads="concat"))
    nodes = IngestionPipeline(transformations=[made_with]).run(documents=documents)

    llm = ThinkerLLM(engine=TransformersEngine.from_pretrained(THINKER))

    def engine(embedding: KVRouteEmbedding) -> Any:
        index = VectorStoreIndex(nodes, embed_model=embedding)
        return index.as_query_engine(
            llm=llm,
            response_mode="simple_summarize",
            text_qa_template=PromptTemplate("{context_str} {query_str}"),
            node_postprocessors=[EmbeddingGuard(embedding=embedding)],
        )

    found = engine(made_with).query(TEXTS[0])
    assert found.source_nodes
    assert found.response
    with pytest.raises(ModelMismatchError) as refused:
        check_nodes(nodes, other)
    assert str(made_with.identity) in str(refused.value)
    assert str(other.identity) in str(refused.value)
    check_nodes([*nodes, TextNode(text="no stamp")], made_with)
    same_size = thinker(text_instruction="d: ")
    with pytest.raises(ModelMismatchError):
        engine(same_size).query(TEXTS[0])
