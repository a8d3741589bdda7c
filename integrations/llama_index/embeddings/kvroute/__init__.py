"""kvroute for LlamaIndex: the language model that is loaded anyway as the embedding model."""

from __future__ import annotations

from importlib.util import find_spec

from kvroute import MissingExtraError

if find_spec("llama_index.core") is None:
    raise MissingExtraError("llama-index-core", "llama-index")

from llama_index.embeddings.kvroute.base import KVRouteEmbedding
from llama_index.embeddings.kvroute.guarding import (
    MARK_FILE,
    STAMP_KEY,
    EmbeddingGuard,
    check_index,
    check_nodes,
    mark_index,
)

__all__ = [
    "MARK_FILE",
    "STAMP_KEY",
    "EmbeddingGuard",
    "KVRouteEmbedding",
    "check_index",
    "check_nodes",
    "mark_index",
]
