"""Refuse an embedding other than the one an index was made with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle

from kvroute import InvalidInputError
from llama_index.embeddings.kvroute.base import KVRouteEmbedding
from llama_index.embeddings.kvroute.marking import MARK_FILE, STAMP_KEY, check_mark, check_stamps, write_mark

__all__ = ["MARK_FILE", "STAMP_KEY", "EmbeddingGuard", "check_index", "check_nodes", "mark_index"]


def mark_index(folder: str | Path, embedding: KVRouteEmbedding) -> None:
    """Write into a persisted index's folder what embedded it. ``KVRouteEmbedding(index_folder=...)`` does it by itself.

    Raises:
        ModelMismatchError: another embedding is written there; both are named.
    """
    write_mark(folder, embedding.identity)


def check_index(folder: str | Path, embedding: KVRouteEmbedding) -> None:
    """Refuse an embedding other than the one a persisted index was made with.

    Raises:
        ModelMismatchError: naming both, and what they differ in.
        InvalidInputError: the folder has no mark.
    """
    if not check_mark(folder, embedding.identity):
        raise InvalidInputError(
            f"Nothing in {folder} says what embedded the index ({MARK_FILE}).",
            hint="Give index_folder when you make the index, or call mark_index when it is persisted.",
        )


def check_nodes(nodes: Iterable[BaseNode | NodeWithScore], embedding: KVRouteEmbedding) -> None:
    """Refuse nodes that another embedding stamped in an ingestion pipeline; those without a stamp pass.

    Raises:
        ModelMismatchError: naming both.
    """
    check_stamps((n.node if isinstance(n, NodeWithScore) else n for n in nodes), embedding.identity)


class EmbeddingGuard(BaseNodePostprocessor):
    """Refuses retrieved nodes that another embedding stamped: for stores elsewhere, which have no folder here.

    ``index.as_query_engine(node_postprocessors=[EmbeddingGuard(embedding=embedding)])``.
    """

    embedding: KVRouteEmbedding
    """That embeds the queries."""

    @classmethod
    def class_name(cls) -> str:
        """Its name where it is serialised."""
        return "KVRouteEmbeddingGuard"

    def _postprocess_nodes(
        self,
        nodes: list[NodeWithScore],
        query_bundle: QueryBundle | None = None,  # noqa: ARG002 - LlamaIndex gives it
    ) -> list[NodeWithScore]:
        check_nodes(nodes, self.embedding)
        return nodes
