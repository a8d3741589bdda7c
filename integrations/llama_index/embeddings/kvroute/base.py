"""LlamaIndex's embedding model over the KV cache of a causal model."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, SecretStr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.schema import BaseNode

from kvroute import (
    EmbedderHandle,
    EmbeddingIdentity,
    Engine,
    EngineHandle,
    EngineName,
    InvalidInputError,
    KVEmbedder,
    PoolingSpec,
)
from llama_index.embeddings.kvroute.marking import check_mark, stamped, write_mark

_log = logging.getLogger(__name__)
_GIVEN, _SERVED = "a given engine's model", "the server's model"
_BATCH = 64


class KVRouteEmbedding(BaseEmbedding):
    """Embeds queries and texts with the KV cache of a language model: the one that answers, or any other.

    The model is named, and opened when first used; or an engine or embedder is given that is there already. A named
    one can be pickled (for ``IngestionPipeline.run(num_workers=...)``) and written to a dict; a key is in neither:
    other processes take it from ``KVROUTE_API_KEY``.

    Args:
        model_name: hub id, local folder or ``smollm2``; with ``base_url``, where the server's tokenizer is (None leaves
            tokenizing to the server).
        engine: an engine instead: :class:`kvroute.TransformersEngine`, ``VLLMEngine`` or ``VLLMClient``.
        embedder: a :class:`kvroute.KVEmbedder` instead, with its spec, prompts and what it was fitted to.

        The others are the fields below.

    Raises:
        InvalidInputError: not exactly one of model, engine and embedder, or settings that don't go together.
        SpecError: no preset has that name.
    """

    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, protected_namespaces=(), hide_input_in_errors=True
    )

    model_name: str = Field(default=_GIVEN, frozen=True)
    """Of the model: hub id, local folder or ``smollm2``."""
    base_url: str | list[str] | None = Field(default=None, frozen=True)
    """Of a running vLLM server with kvroute, or of several that serve one model."""
    api_key: SecretStr | None = Field(default=None, exclude=True, frozen=True)
    """Of the servers; by default that of the environment variable ``KVROUTE_API_KEY``."""
    served_model_name: str | None = Field(default=None, frozen=True)
    """The model by the name that the servers give it; None takes their first."""
    kind: Literal["transformers", "vllm"] = Field(default="transformers", frozen=True)
    """What runs a named model in this process."""
    dtype: str = Field(default="auto", frozen=True)
    """Of a model in this process, as ``float32``; ``auto`` takes the checkpoint's own."""
    device: str | None = Field(default=None, frozen=True)
    """For transformers; None takes a GPU if there is one."""
    spec: PoolingSpec | str | None = Field(default=None, frozen=True)
    """How to pool, or the name of a preset; None is ``best``, or what the embedder or its folder has."""
    embedder_folder: str | None = Field(default=None, frozen=True)
    """Of an embedder that ``KVEmbedder.save`` wrote: its spec, prompts and fitted post-processing."""
    query_instruction: str | None = None
    """Put before each query, or around it where it holds ``{text}``; None is the embedder's prompt ``query``."""
    text_instruction: str | None = None
    """The same for the texts that are indexed; None is the embedder's prompt ``document``."""
    normalize: bool | None = None
    """Whether vectors get unit length; None is as the spec says."""
    truncate: bool | None = None
    """Whether a text past the context is cut or is an error; None is as the embedder says (an error)."""
    index_folder: str | None = None
    """Folder that the index is persisted in. The first text that is embedded writes there what its vectors are
    (``kvroute_embedding.json``); from then on another model, spec, instruction or post-processing is refused, for
    queries and for texts. None checks nothing."""

    _embedder: EmbedderHandle = PrivateAttr()

    def __init__(
        self,
        model_name: str | None = None,
        *,
        engine: Engine | None = None,
        embedder: KVEmbedder | None = None,
        base_url: str | Sequence[str] | None = None,
        api_key: SecretStr | str | None = None,
        served_model_name: str | None = None,
        kind: Literal["transformers", "vllm"] = "transformers",
        dtype: str = "auto",
        device: str | None = None,
        spec: PoolingSpec | str | None = None,
        embedder_folder: str | Path | None = None,
        query_instruction: str | None = None,
        text_instruction: str | None = None,
        normalize: bool | None = None,
        truncate: bool | None = None,
        index_folder: str | Path | None = None,
        embed_batch_size: int = _BATCH,
        num_workers: int | None = None,
        callback_manager: CallbackManager | None = None,
        rate_limiter: Any = None,
        embeddings_cache: None = None,
    ) -> None:
        if embeddings_cache is not None:
            raise InvalidInputError(
                "LlamaIndex's embeddings_cache finds vectors by their text alone: those of queries and of texts, and "
                "of other models and specs, would be mixed up.",
                hint="Use the cache of an IngestionPipeline.",
            )
        spec = PoolingSpec(**spec) if isinstance(spec, dict) else spec
        model_name = None if model_name in (_GIVEN, _SERVED) else model_name
        key = SecretStr(api_key) if isinstance(api_key, str) else api_key
        urls = (base_url,) if isinstance(base_url, str) else tuple(base_url or ())
        if (engine is not None) + (embedder is not None) + (model_name is not None or bool(urls)) != 1:
            raise InvalidInputError(
                "Give one of: an engine, an embedder, or the name of a model (of a server, its base_url).",
                hint='For example engine=engine, or model_name="smollm2".',
            )
        if embedder is not None:
            handle = EmbedderHandle(embedder, spec=spec, folder=embedder_folder)
        else:
            runs = "server" if urls else kind
            name = EngineName(model_name, runs, urls, dtype, device, served_model_name) if engine is None else None
            opens = EngineHandle(engine, name=name, api_key=None if key is None else key.get_secret_value())
            handle = EmbedderHandle(engine=opens, spec=spec, folder=embedder_folder)
        known = embedder.engine.info.name if embedder is not None else _GIVEN
        super().__init__(
            model_name=model_name or (_SERVED if base_url else known),
            base_url=base_url if base_url is None or isinstance(base_url, str) else list(base_url),
            api_key=key,
            served_model_name=served_model_name,
            kind=kind,
            dtype=dtype,
            device=device,
            spec=spec,
            embedder_folder=None if embedder_folder is None else str(embedder_folder),
            query_instruction=query_instruction,
            text_instruction=text_instruction,
            normalize=normalize,
            truncate=truncate,
            index_folder=None if index_folder is None else str(index_folder),
            embed_batch_size=embed_batch_size,
            num_workers=num_workers,
            callback_manager=callback_manager or CallbackManager([]),
            **({} if rate_limiter is None else {"rate_limiter": rate_limiter}),  # llama-index-core 0.14.0 has none
        )
        self._embedder = handle

    @classmethod
    def class_name(cls) -> str:
        """Its name where it is serialised."""
        return "KVRouteEmbedding"

    @property
    def identity(self) -> EmbeddingIdentity:
        """What the vectors are: those of one identity can be compared. Opens the model.

        Raises:
            KVRouteError: it can't be opened.
        """
        return self._embedder.identity(
            query=self.query_instruction, document=self.text_instruction, normalize=self.normalize
        )

    # ------------------------------------------------------------------ embedding

    def _encode(self, texts: Sequence[str], *, query: bool = False) -> list[Embedding]:
        marked = self.index_folder is None or check_mark(self.index_folder, self.identity)
        embedder = self._embedder.get()
        encode = embedder.encode_query if query else embedder.encode_document
        vectors = encode(
            texts,
            prompt=self.query_instruction if query else self.text_instruction,
            normalize=self.normalize,
            truncate=self.truncate,
            progress=False,
        )
        if self.index_folder is not None and not marked and not query:
            write_mark(self.index_folder, self.identity)
        found: list[Embedding] = vectors.tolist()
        return found

    def _check(self, texts: Sequence[str]) -> None:
        """Find a bad text by its place among all, before the first batch is run."""
        embedder = self._embedder.get()
        prompt = embedder.prompts.get("document") if self.text_instruction is None else self.text_instruction
        embedder.check(texts, prompt=prompt, truncate=self.truncate)

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([query], query=True)[0]

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._encode([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._encode, texts)

    def get_text_embedding_batch(self, texts: list[str], show_progress: bool = False, **kwargs: Any) -> list[Embedding]:
        """Embed texts, ``embed_batch_size`` at a time.

        Raises:
            EmptyTextError, TextTooLongError: naming the text's place. Nothing was embedded.
            ModelMismatchError: the index in ``index_folder`` was made with another embedding.
        """
        self._check(texts)
        return super().get_text_embedding_batch(texts, show_progress, **kwargs)

    async def aget_text_embedding_batch(
        self, texts: list[str], show_progress: bool = False, **kwargs: Any
    ) -> list[Embedding]:
        """:meth:`get_text_embedding_batch` in threads."""
        await asyncio.to_thread(self._check, texts)
        return await super().aget_text_embedding_batch(texts, show_progress, **kwargs)

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Embed nodes, as a step of an ingestion pipeline.

        Returns:
            copies with their vectors, and in their metadata, under ``kvroute_embedding``, what embedded them; it is
            neither embedded nor shown to an LLM. ``check_nodes`` and ``EmbeddingGuard`` read it.
        """
        return stamped(super().__call__(nodes, **kwargs), self.identity)

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """:meth:`__call__` in threads."""
        return stamped(await super().acall(nodes, **kwargs), self.identity)

    # ------------------------------------------------------------------ dicts, pickles, events

    def _given_name(self) -> str | None:
        return None if self.model_name in (_GIVEN, _SERVED) else self.model_name

    def to_payload(self) -> dict[str, Any]:
        """What events say of it: no secret."""
        name = self._given_name()
        if name is None and self._embedder.opened:
            name = self._embedder.get().engine.info.name
        return {
            "class_name": self.class_name(),
            "model_name": name or self.model_name,
            "embed_batch_size": self.embed_batch_size,
        }

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Its settings, JSON-able, without the key; :meth:`from_dict` takes them.

        ``vectors`` differs where the vectors may: an ingestion pipeline's cache takes it into its keys. It opens no
        named model: see :meth:`kvroute.EmbedderHandle.signature`.
        """
        data = super().to_dict(**kwargs)
        for name in ("api_key", "callback_manager", "rate_limiter", "embeddings_cache"):
            data.pop(name, None)
        if isinstance(self.spec, PoolingSpec):
            data["spec"] = self.spec.model_dump(mode="json")
        data["given"] = self._embedder.given
        data["model_name"] = self._embedder.get().engine.info.name if data["given"] else self._given_name()
        data["vectors"] = self._embedder.signature()
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Of :meth:`to_dict`. ``kwargs`` go before what it holds: ``api_key=...``, ``engine=...``.

        Raises:
            InvalidInputError: it was made with an engine or embedder that is given, and none is given here.
        """
        settings = {k: v for k, v in data.items() if k not in ("given", "vectors")}
        if data.get("given"):
            named = settings.pop("model_name", None)
            if not {"engine", "embedder", "model_name"} & kwargs.keys():
                raise InvalidInputError(
                    f"This embedding was made with a given engine of {named}, and a dict can't hold one.",
                    hint="Call from_dict(data, engine=...), or name the model: from_dict(data, model_name=...).",
                )
        return super().from_dict(settings, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self._embedder.require_name()
        settings = {**self.__dict__, "model_name": self._given_name(), "api_key": None}
        for name in settings.keys() & {"callback_manager", "rate_limiter"}:
            try:
                pickle.dumps(settings[name])
            except Exception as error:  # noqa: BLE001 - whatever its owner's __reduce__ raises
                _log.warning("A pickled KVRouteEmbedding goes without its %s: %s", name, type(error).__name__)
                settings[name] = None
        return {"settings": settings}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["settings"])  # type: ignore[misc]
