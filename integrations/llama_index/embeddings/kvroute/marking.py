"""What an index's vectors are: a file in its folder, and a stamp on its nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llama_index.core.schema import BaseNode

from kvroute import EmbeddingIdentity, ModelMismatchError

MARK_FILE = "kvroute_embedding.json"
"""In an index's folder: the :class:`kvroute.EmbeddingIdentity` of its vectors."""
STAMP_KEY = "kvroute_embedding"
"""Key of a node's metadata: model and digest of what embedded it. Neither embedded itself nor shown to an LLM."""


def check_mark(folder: str | Path, identity: EmbeddingIdentity) -> bool:
    """Whether a folder has a mark, which must be this one.

    Raises:
        ModelMismatchError: it is another; both are named.
        FileFormatError: it is torn or changed.
    """
    path = Path(folder) / MARK_FILE
    if not path.exists():
        return False
    identity.require(
        EmbeddingIdentity.load(path),
        f"The index in {folder}",
        hint="Query and extend it with what it was made with. To change that, embed all of its texts anew into another "
        "folder, or delete this one first.",
    )
    return True


def write_mark(folder: str | Path, identity: EmbeddingIdentity) -> None:
    """Mark a folder, unless it has this mark.

    Raises:
        ModelMismatchError, FileFormatError: as :func:`check_mark`.
    """
    if not check_mark(folder, identity):
        identity.save(Path(folder) / MARK_FILE)


def stamped(nodes: Sequence[BaseNode], identity: EmbeddingIdentity) -> list[BaseNode]:
    """Copies of nodes with a stamp. The nodes themselves stay, since a document's hash is taken of its metadata."""
    copies = []
    for node in nodes:
        copy = node.model_copy()
        copy.metadata = {**node.metadata, STAMP_KEY: str(identity)}
        copy.excluded_embed_metadata_keys = _with_key(node.excluded_embed_metadata_keys)
        copy.excluded_llm_metadata_keys = _with_key(node.excluded_llm_metadata_keys)
        copies.append(copy)
    return copies


def check_stamps(nodes: Iterable[BaseNode], identity: EmbeddingIdentity) -> None:
    """Refuse nodes that another embedding stamped; those without a stamp pass.

    Raises:
        ModelMismatchError: naming both.
    """
    for node in nodes:
        stamp = node.metadata.get(STAMP_KEY)
        if stamp is not None and str(stamp).rpartition(" ")[2] != identity.digest:
            raise ModelMismatchError(
                f"Node {node.node_id} was embedded by {stamp}, and the embedding at hand is {identity}: their vectors "
                "can't be compared.",
                hint="Query with what the index was made with, or embed all of its texts anew.",
            )


def _with_key(keys: Sequence[str]) -> list[str]:
    return [*keys, *([] if STAMP_KEY in keys else [STAMP_KEY])]
