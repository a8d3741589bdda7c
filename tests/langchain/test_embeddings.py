"""KVRouteEmbeddings: vectors, instructions, batches, stores, copies, threads, and what is refused."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import ValidationError

from kvroute import (
    EmptyTextError,
    InvalidInputError,
    KVEmbedder,
    ModelLoadError,
    PoolingSpec,
    ServerError,
    ServerTimeoutError,
    ServerUnreachableError,
    TextTooLongError,
    TransformersEngine,
    VLLMClient,
)
from langchain_kvroute import KVRouteEmbeddings
from serving_files import an_info
from vllm_stand_in import StandIn

THINKER = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker" / "model")
TEXTS = ["run so:a=1,b=2", "map so:c>e,d>k from c", "top so:7,3,9", "draw so:q"]
KEY = "s3cret-key"


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine.from_pretrained(THINKER)


@pytest.fixture(scope="module")
def named() -> KVRouteEmbeddings:
    return KVRouteEmbeddings(model=THINKER, query_instruction="question: ", document_instruction="answer: {text}.")


def test_vectors_are_the_embedders(named: KVRouteEmbeddings, engine: TransformersEngine) -> None:
    embedder = KVEmbedder(engine)
    queries = embedder.encode(["question: " + t for t in TEXTS])
    texts = embedder.encode([f"answer: {t}." for t in TEXTS])
    assert np.abs(queries - texts).max() > 1e-2
    np.testing.assert_allclose([named.embed_query(t) for t in TEXTS], queries, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(named.embed_documents(TEXTS), texts, rtol=1e-4, atol=1e-5)
    small = KVRouteEmbeddings(engine=engine, document_instruction="answer: {text}.", batch_size=3, show_progress=True)
    np.testing.assert_allclose(small.embed_documents(TEXTS), texts, rtol=1e-4, atol=1e-5)
    assert named.embed_documents([]) == []


async def test_async_gives_the_same(named: KVRouteEmbeddings) -> None:
    assert await named.aembed_query(TEXTS[0]) == named.embed_query(TEXTS[0])
    assert await named.aembed_documents(TEXTS) == named.embed_documents(TEXTS)


def test_an_embedder_and_a_saved_one_with_what_they_have(engine: TransformersEngine, tmp_path: Path) -> None:
    fitted = KVEmbedder(engine, "paper-mteb", prompts={"query": "q: ", "document": "d: "})
    fitted.fit(TEXTS * 2, method="center").save(tmp_path)
    given = KVRouteEmbeddings(embedder=fitted)
    saved = KVRouteEmbeddings(model=THINKER, embedder_folder=str(tmp_path))
    for made in (given, saved):
        np.testing.assert_allclose(made.embed_query("a"), fitted.encode_query("a"), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(made.embed_documents(["a"])[0], fitted.encode_document("a"), rtol=1e-4, atol=1e-5)
    assert given.identity.digest == saved.identity.digest
    bare = KVRouteEmbeddings(embedder=fitted, query_instruction="", normalize=False)
    np.testing.assert_allclose(bare.embed_query("a"), fitted.encode("a", normalize=False), rtol=1e-4, atol=1e-5)
    assert bare.identity.digest != given.identity.digest


async def test_in_a_vector_store(named: KVRouteEmbeddings) -> None:
    plain = KVRouteEmbeddings(model=THINKER)
    store = InMemoryVectorStore(plain)
    store.add_documents([Document(t, metadata={"place": i}) for i, t in enumerate(TEXTS)])
    for i, text in enumerate(TEXTS):
        [(best, score)] = store.similarity_search_with_score(text, k=1)
        assert best.metadata["place"] == i
        assert score == pytest.approx(1.0, abs=1e-4)
    [best] = await store.as_retriever(search_kwargs={"k": 1}).ainvoke(TEXTS[2])
    assert best.page_content == TEXTS[2]


@pytest.mark.real
def test_questions_find_what_answers_them(smollm2: TransformersEngine) -> None:
    pairs = {
        "How do plants make food from sunlight?": "Photosynthesis turns light, water and carbon dioxide into sugar.",
        "Who painted the Mona Lisa?": "Leonardo da Vinci painted the Mona Lisa in Florence.",
        "What is the capital of France?": "Paris is the capital city of France, on the river Seine.",
        "How do I bake bread?": "Bread is baked from flour, water, salt and yeast.",
    }
    embedder = KVEmbedder(smollm2).fit([*pairs, *pairs.values()], method="center")
    store = InMemoryVectorStore(KVRouteEmbeddings(embedder=embedder))
    store.add_texts(list(pairs.values()))
    assert [store.similarity_search(q, k=1)[0].page_content for q in pairs] == list(pairs.values())


# ---------------------------------------------------------------------- copies, keys


def test_pickles_copies_and_dumps(named: KVRouteEmbeddings, engine: TransformersEngine) -> None:
    again = pickle.loads(pickle.dumps(named))  # noqa: S301 - our own
    assert again.embed_query("a") == named.embed_query("a") == copy.deepcopy(named).embed_query("a")
    assert KVRouteEmbeddings(**named.model_dump()).model_dump() == named.model_dump()
    for given in (KVRouteEmbeddings(engine=engine), KVRouteEmbeddings(embedder=KVEmbedder(engine))):
        copied = copy.deepcopy(given)
        assert copied.engine is engine
        assert copied.embedder is given.embedder
        assert copied.embed_query("a") == given.embed_query("a")
        with pytest.raises(InvalidInputError, match="pickled"):
            pickle.dumps(given)


def test_keys_are_in_no_text_error_or_pickle() -> None:
    made = KVRouteEmbeddings(base_url="http://127.0.0.1:9", api_key=KEY)
    assert KEY not in repr(made) + str(made.model_dump()) + made.model_dump_json()
    assert KEY.encode() not in pickle.dumps(made)
    with pytest.raises(ValidationError, match="spce") as refused:
        KVRouteEmbeddings(base_url="http://127.0.0.1:9", api_key=KEY, spce="best")  # type: ignore[call-arg]
    assert KEY not in str(refused.value)


# ---------------------------------------------------------------------- threads, loops, tasks


def test_threads_and_two_event_loops(named: KVRouteEmbeddings) -> None:
    expected = [named.embed_query(t) for t in TEXTS]
    fresh = KVRouteEmbeddings(model=THINKER, query_instruction="question: ")
    with ThreadPoolExecutor(4) as threads:
        np.testing.assert_allclose(list(threads.map(fresh.embed_query, TEXTS * 4)), expected * 4, rtol=1e-4, atol=1e-5)
    for _ in range(2):
        assert asyncio.run(fresh.aembed_query(TEXTS[0])) == fresh.embed_query(TEXTS[0])


async def test_a_cancelled_task_leaves_it_usable(named: KVRouteEmbeddings) -> None:
    many = [f"{text} {number}" for number in range(2000) for text in TEXTS]  # long enough for a busy machine
    task = asyncio.create_task(named.aembed_documents(many))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await named.aembed_query(TEXTS[0]) == named.embed_query(TEXTS[0])


# ---------------------------------------------------------------------- what is refused


class Watched(KVEmbedder):
    """Counts the calls that embed."""

    calls = 0

    def encode_document(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().encode_document(*args, **kwargs)


def test_a_bad_text_is_named_by_its_place_before_work_is_done(engine: TransformersEngine) -> None:
    embedder = Watched(engine)
    made = KVRouteEmbeddings(embedder=embedder, batch_size=2)
    with pytest.raises(EmptyTextError) as empty:
        made.embed_documents([*TEXTS, ""])
    with pytest.raises(TextTooLongError) as long:
        asyncio.run(made.aembed_documents([*TEXTS, "a", "run " * 600]))
    assert (empty.value.index, long.value.index, embedder.calls) == (4, 5, 0)
    with pytest.raises(EmptyTextError):
        made.embed_query("")
    with pytest.raises(InvalidInputError, match="list of texts"):
        made.embed_documents("text")  # type: ignore[arg-type]
    assert len(KVRouteEmbeddings(engine=engine, truncate=True).embed_query("run " * 600)) == embedder.dimension


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "Give an engine"),
        ({"model": THINKER, "engine": object()}, "one of them"),
        ({"model": THINKER, "spec": "bets"}, "bets"),
        ({"model": THINKER, "spec": "best", "embedder_folder": "x"}, "spec or the folder"),
        ({"model": THINKER, "batch_size": 0}, "greater than or equal to 1"),
        ({"model": THINKER, "bach_size": 3}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        KVRouteEmbeddings(**wrong)


def test_an_embedder_has_its_engine_and_its_spec(engine: TransformersEngine, named: KVRouteEmbeddings) -> None:
    for beside in ({"engine": engine}, {"model": THINKER}, {"spec": "best"}):
        with pytest.raises(ValidationError, match="Drop the"):
            KVRouteEmbeddings(embedder=KVEmbedder(engine), **beside)
    with pytest.raises(ValidationError, match="frozen"):
        named.spec = "fast"
    with pytest.raises(ModelLoadError):
        KVRouteEmbeddings(model="/no/such/folder").embed_query("a")


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with StandIn() as server:
        server.result = lambda body, _: {"kvroute": {"features": {"0": [float(len(body["prompt"]))] * 32}}}
        yield server


def test_a_server_that_is_gone_or_too_slow_and_comes_back(stand_in: StandIn) -> None:
    with VLLMClient(stand_in.url, info=an_info(), retries=0, timeout=0.5) as client:
        made = KVRouteEmbeddings(engine=client, spec=PoolingSpec(layers="last:1", heads="concat"))
        assert made.embed_query("abc") == [4.0] * 32
        stand_in.delay = 2.0
        with pytest.raises(ServerTimeoutError):
            made.embed_query("abc")
        stand_in.delay = 0.0
        port = int(stand_in.url.rpartition(":")[2])
        stand_in.die()
        with pytest.raises(ServerUnreachableError):
            made.embed_documents(["abc", "d"])
        with StandIn(port=port) as again:
            again.result = stand_in.result
            assert made.embed_query("abcd") == [5.0] * 32


async def test_nothing_of_a_text_is_logged(
    named: KVRouteEmbeddings, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    for logger in ("kvroute", "kvroute_kernels", "langchain_kvroute"):
        caplog.set_level(logging.DEBUG, logger=logger)
    text = "sesame opens the door"
    assert named.embed_documents([text, text]) == await named.aembed_documents([text, text])
    assert named.embed_query(text)
    with pytest.raises(TextTooLongError):
        named.embed_documents(["a", "sesame " * 600])
    with VLLMClient(stand_in.url, info=an_info(), retries=0, connect_timeout=0.5) as client:
        made = KVRouteEmbeddings(engine=client, spec=PoolingSpec(layers="last:1", heads="concat"))
        assert made.embed_query(text)
        stand_in.act = lambda handler, _: handler.refuse(500, f"can't read {text}") is None
        with pytest.raises(ServerError, match="sesame"):
            await made.aembed_query(text)
        stand_in.die()
        with pytest.raises(ServerUnreachableError):
            made.embed_documents([text])
    assert "sesame" not in caplog.text
