"""An embedder by name: what adapters keep in a config or a pickle in place of the embedder itself."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvroute.embedder_identity import EmbeddingIdentity
from kvroute.engines.handle import EngineHandle
from kvroute.errors import InvalidInputError
from kvroute.pooling import PoolingSpec

if TYPE_CHECKING:
    from kvroute.embedder import KVEmbedder


class EmbedderHandle:
    """An embedder that is given, or made at its first use. Thread-safe. Copies share it; a pickle carries names alone.

    Args:
        embedder: that is there already.
        engine: the model, where there is none.
        spec: how to pool, or the name of a preset; by default ``best``.
        folder: of an embedder that :meth:`KVEmbedder.save` wrote, in place of a spec.

    Raises:
        InvalidInputError: too little or too much was given.
        SpecError: no preset has that name.
    """

    def __init__(
        self,
        embedder: KVEmbedder | None = None,
        *,
        engine: EngineHandle | None = None,
        spec: PoolingSpec | str | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if (embedder is None) == (engine is None):
            raise InvalidInputError("Give an embedder, or an engine to make one of, and not both.")
        if folder is not None and spec is not None:
            raise InvalidInputError("A saved embedder has its spec with it.", hint="Give the spec or the folder.")
        if embedder is not None and (spec is not None or folder is not None):
            raise InvalidInputError("An embedder has its spec with it.", hint="Drop the spec or folder beside it.")
        self.engine = engine
        self.folder = None if folder is None else str(folder)
        self.spec = PoolingSpec.preset(spec) if isinstance(spec, str) else spec
        self._embedder = embedder
        self._lock = threading.Lock()
        self._known: tuple[Any, EmbeddingIdentity] | None = None

    def __repr__(self) -> str:
        return f"EmbedderHandle({self._embedder or self.engine!r})"

    @property
    def given(self) -> bool:
        """Whether an embedder or engine was given that no name leads to."""
        return self.engine is None or self.engine.name is None

    @property
    def opened(self) -> bool:
        """Whether the embedder is there."""
        return self._embedder is not None

    def get(self) -> KVEmbedder:
        """The embedder.

        Raises:
            ModelLoadError, ServerError, MissingExtraError: its engine can't be opened.
            ModelMismatchError, FileFormatError: its folder does not go with the model, or is not whole.
            SpecError: the spec does not fit the model.
        """
        with self._lock:
            if self._embedder is None:
                from kvroute.embedder import KVEmbedder

                assert self.engine is not None
                engine = self.engine.get()
                if self.folder is not None:
                    self._embedder = KVEmbedder.load(self.folder, engine)
                else:
                    self._embedder = KVEmbedder(engine, self.spec or "best")
            return self._embedder

    def identity(
        self, *, query: str | None = None, document: str | None = None, normalize: bool | None = None
    ) -> EmbeddingIdentity:
        """What its vectors are; opens the embedder. Arguments as :meth:`EmbeddingIdentity.of`."""
        embedder = self.get()
        asked = (query, document, normalize, embedder.spec, tuple(sorted(embedder.prompts.items())))
        parts = (embedder.postprocess, embedder.frequencies)
        if self._known is not None:
            (known, known_parts), identity = self._known
            if known == asked and all(a is b for a, b in zip(known_parts, parts, strict=True)):
                return identity
        found = EmbeddingIdentity.of(embedder, query=query, document=document, normalize=normalize)
        self._known = (asked, parts), found
        return found

    def signature(self) -> str:
        """16 hex digits that differ where the vectors may: for keys of caches.

        Opens no model: where one is named, a local folder counts by its files' names, sizes and times, and whatever
        a server runs by its address and name.
        """
        if self.given:
            identity = self.identity()
            facts: Any = identity.digest
        else:
            assert self.engine is not None
            assert self.engine.name is not None
            name = self.engine.name
            spec = None if self.spec is None else self.spec.model_dump(mode="json")
            facts = [name.to_dict(), _files(name.model), spec, _contents(self.folder)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def require_name(self) -> None:
        """Refuse what no name leads to, before it is pickled or written down.

        Raises:
            InvalidInputError: an embedder or engine was given.
        """
        if self.given:
            raise InvalidInputError(
                "An embedder of a given engine can't be pickled or made from a dict: it holds a model, or connections.",
                hint="Name the model instead (and the folder of KVEmbedder.save, for what was fitted); it is opened "
                "where it is used.",
            )

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        self.require_name()
        return _named, (self.engine, self.spec, self.folder)


def _named(engine: EngineHandle, spec: PoolingSpec | None, folder: str | None) -> EmbedderHandle:
    return EmbedderHandle(engine=engine, spec=spec, folder=folder)


def _files(folder: str | None) -> list[list[Any]] | None:
    """Names, sizes and times of a local model's files; None where it is no folder."""
    if folder is None or not Path(folder).is_dir():
        return None
    stats = ((file.name, file.stat()) for file in sorted(Path(folder).iterdir()) if file.is_file())
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _contents(folder: str | None) -> list[list[str]] | None:
    """Digests of a saved embedder's files."""
    if folder is None:
        return None
    files = [file for file in sorted(Path(folder).glob("*")) if file.is_file()]
    return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
