"""LangChain's embeddings over a real vLLM server on CPU with the tiny thinker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_tests")

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests

from kvroute import (
    EmptyTextError,
    KVEmbedder,
    ServerError,
    ServerUnreachableError,
    TextTooLongError,
    TransformersEngine,
)
from langchain_kvroute import KVRouteEmbeddings
from tests.serving.http_server import Running, free_port, running
from tests.serving.processes import ROOT

pytestmark = pytest.mark.vllm
MODEL = str(ROOT / "examples" / "tiny_thinker" / "model")
KEY = "sesame"
TEXTS = ["run so:a=1,b=2", "map so:c>e,d>k from c", "top so:7,3,9", "draw so:q"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    port = free_port()
    command = [sys.executable, "-m", "kvroute.cli", "serve", MODEL, "--name", "thinker", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "384", "--dtype", "float32", "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("server") / "log"
    # Embeddings of one name share a client; this one closes it.
    shared = KVRouteEmbeddings(base_url=f"http://127.0.0.1:{port}", api_key=KEY)  # type: ignore[arg-type]
    with (
        running([*command, "--api-key", KEY], port, log, patience=500) as it,
        shared.opened(),
    ):  # by its name, with all tests
        yield it


class TestStandard(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _served(self, server: Running) -> None:
        type(self).url = server.url

    url = ""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KVRouteEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"base_url": self.url, "api_key": KEY}


@pytest.fixture(scope="module")
def served(server: Running) -> KVRouteEmbeddings:
    """By the address alone: the server tokenizes, and weighs the tokens of the preset ``best``."""
    return KVRouteEmbeddings(base_url=server.url, api_key=KEY, query_instruction="question: ", batch_size=3)  # type: ignore[arg-type]


def test_vectors_are_those_of_transformers(served: KVRouteEmbeddings, server: Running) -> None:
    here = KVRouteEmbeddings(model=MODEL, dtype="float32", query_instruction="question: ")
    for found, expected in (
        (served.embed_documents(TEXTS), here.embed_documents(TEXTS)),
        ([served.embed_query(t) for t in TEXTS], [here.embed_query(t) for t in TEXTS]),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max())
    assert served.identity.digest == here.identity.digest
    with_tokenizer = KVRouteEmbeddings(model=MODEL, base_url=f"{server.url}/v1", api_key=KEY)  # type: ignore[arg-type]
    with with_tokenizer.opened():
        found = with_tokenizer.embed_documents(TEXTS)
    np.testing.assert_allclose(found, here.embed_documents(TEXTS), rtol=0, atol=1e-3)


def test_a_saved_embedder_over_a_server(server: Running, tmp_path: Path) -> None:
    engine = TransformersEngine.from_pretrained(MODEL, dtype="float32")
    KVEmbedder(engine, prompts={"query": "q: "}).fit(TEXTS * 2, method="center").save(tmp_path)
    here = KVRouteEmbeddings(engine=engine, embedder_folder=str(tmp_path))
    there = KVRouteEmbeddings(base_url=server.url, model=MODEL, api_key=KEY, embedder_folder=str(tmp_path))  # type: ignore[arg-type]
    np.testing.assert_allclose(there.embed_query("a"), here.embed_query("a"), rtol=0, atol=1e-3)
    assert there.identity.digest == here.identity.digest
    there.opened().close()


async def test_in_a_vector_store(served: KVRouteEmbeddings, server: Running) -> None:
    plain = KVRouteEmbeddings(base_url=server.url, api_key=KEY)  # type: ignore[arg-type]
    store = InMemoryVectorStore(plain)
    await store.aadd_texts(TEXTS)
    for text in TEXTS:
        [best] = await store.asimilarity_search(text, k=1)
        assert best.page_content == text


def test_faults(served: KVRouteEmbeddings, server: Running) -> None:
    with pytest.raises(EmptyTextError) as empty:
        served.embed_documents([*TEXTS, ""])
    with pytest.raises(TextTooLongError) as long:
        served.embed_documents([*TEXTS, "run " * 600])
    assert (empty.value.index, long.value.index) == (4, 4)
    stranger = KVRouteEmbeddings(base_url=server.url, api_key="wrong-key")  # type: ignore[arg-type]
    with stranger.opened(), pytest.raises(ServerError) as refused:
        stranger.embed_query("a")
    assert refused.value.status == 401
    assert "wrong-key" not in str(refused.value)
    nowhere = KVRouteEmbeddings(base_url=f"http://127.0.0.1:{free_port()}")
    with nowhere.opened(), pytest.raises(ServerUnreachableError):
        nowhere.embed_query("a")
    assert served.embed_query("a")
