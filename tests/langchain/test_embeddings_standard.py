"""LangChain's own tests of embeddings, on the tiny thinker and on SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from langchain_kvroute import KVRouteEmbeddings

THINKER = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker" / "model")


class TestUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KVRouteEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": THINKER}

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"KVROUTE_API_KEY": "s3cret"}, {"base_url": "http://127.0.0.1:9"}, {"api_key": "s3cret"}


class TestTinyThinker(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KVRouteEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": THINKER, "query_instruction": "question: "}


@pytest.mark.real
class TestSmolLM2(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return KVRouteEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "dtype": "float32"}
