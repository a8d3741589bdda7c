"""LangChain's embeddings over the KV cache of a causal model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self

from langchain_core.embeddings import Embeddings
from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kvroute import EmbedderHandle, EmbeddingIdentity, InvalidInputError, PoolingSpec
from langchain_kvroute.engine_fields import EngineFields


class KVRouteEmbeddings(EngineFields, Embeddings):
    """Embeds queries and documents with the KV cache of a language model: the one that answers, or any other.

    The model is named, and opened when first used; or an engine or embedder is given that is there already. A named
    one can be pickled; its key is not in the pickle. Async calls run in threads: one that is cancelled lets its batch
    run to the end and drops it. Settings don't change: make another one.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # a key may be in it
    )

    embedder: Any = Field(default=None, exclude=True, repr=False)
    """A :class:`kvroute.KVEmbedder` instead, with its spec, prompts and what it was fitted to."""
    spec: PoolingSpec | str | None = None
    """How to pool, or the name of a preset; None is ``best``, or what the embedder or its folder has."""
    embedder_folder: str | None = None
    """Of an embedder that ``KVEmbedder.save`` wrote: its spec, prompts and fitted post-processing."""
    query_instruction: str | None = None
    """Put before each query, or around it where it holds ``{text}``; None is the embedder's prompt ``query``."""
    document_instruction: str | None = None
    """The same for documents; None is the embedder's prompt ``document``."""
    normalize: bool | None = None
    """Whether vectors get unit length; None is as the spec says."""
    truncate: bool | None = None
    """Whether a text past the context is cut or is an error; None is as the embedder says (an error)."""
    batch_size: int | None = Field(default=None, ge=1)
    """Texts handed to the engine at a time; None is all of them. The engine makes batches of its own that fit its
    memory."""
    show_progress: bool = False
    """Whether to show a bar."""

    _embedder: EmbedderHandle = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _engine_of_embedder(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("embedder") is None:
            return given
        if any(given.get(beside) is not None for beside in ("engine", "model", "base_url")):
            raise InvalidInputError("An embedder has its engine with it.", hint="Drop the engine or name beside it.")
        return {**given, "engine": given["embedder"].engine}

    @model_validator(mode="after")
    def _made(self) -> Self:
        handle = None if self.embedder is not None else self._state.handle
        self._embedder = EmbedderHandle(self.embedder, engine=handle, spec=self.spec, folder=self.embedder_folder)
        return self

    @property
    def identity(self) -> EmbeddingIdentity:
        """What the vectors are: those of one identity can be compared. Opens the model."""
        return self._embedder.identity(
            query=self.query_instruction, document=self.document_instruction, normalize=self.normalize
        )

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts that are searched.

        Raises:
            EmptyTextError, TextTooLongError: naming the text's place. Nothing was embedded.
            KVRouteError: the model can't be opened, or a server does not answer.
        """
        listed = _listed(texts)
        embedder = self._embedder.get()
        size = self.batch_size or max(len(listed), 1)
        if len(listed) > size:
            prompt = self.document_instruction
            prompt = embedder.prompts.get("document") if prompt is None else prompt
            embedder.check(listed, prompt=prompt, truncate=self.truncate)
        found: list[list[float]] = []
        for start in range(0, len(listed), size):
            vectors = embedder.encode_document(listed[start : start + size], **self._asked(self.document_instruction))
            found.extend(vectors.tolist())
        return found

    def embed_query(self, text: str) -> list[float]:
        """Embed a text to search with.

        Raises:
            as :meth:`embed_documents`.
        """
        vectors = self._embedder.get().encode_query(_listed([text]), **self._asked(self.query_instruction))
        found: list[float] = vectors[0].tolist()
        return found

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """:meth:`embed_documents` in a thread."""
        return await asyncio.to_thread(self.embed_documents, texts)

    async def aembed_query(self, text: str) -> list[float]:
        """:meth:`embed_query` in a thread."""
        return await asyncio.to_thread(self.embed_query, text)

    def _asked(self, instruction: str | None) -> dict[str, Any]:
        return {
            "prompt": instruction,
            "normalize": self.normalize,
            "truncate": self.truncate,
            "progress": self.show_progress,
        }

    # ------------------------------------------------------------------ copies

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self.embedder)] = self.embedder
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        self._embedder.require_name()
        return super().__getstate__()


def _listed(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InvalidInputError("embed_documents takes a list of texts.", hint="Use embed_query, or put it in a list.")
    return list(texts)
