"""What makes vectors comparable: the model, how it is pooled, what stands around the texts, what is done afterwards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvroute.errors import FileFormatError, ModelMismatchError
from kvroute.files import read_json, write_json
from kvroute.token_weights import FROM_VOCABULARY

if TYPE_CHECKING:
    from kvroute.embedder import KVEmbedder
    from kvroute.postprocess import PostProcessor
    from kvroute.token_weights import FrequencyTable

_KIND = "kvroute.embedding"


@dataclass(frozen=True, slots=True)
class EmbeddingIdentity:
    """Vectors of one identity can be compared with each other, and with no others. JSON-able.

    Attributes:
        model: its name, for people; the fingerprint counts.
        fingerprint: of the checkpoint, whatever its dtype and engine.
        spec: the pooling spec in canonical JSON, with the layers it means for this model.
        query: text put before or around queries.
        document: the same of documents.
        normalize: whether vectors have unit length.
        postprocess: digest of the fitted post-processing, or None.
        frequencies: digest of a frequency table of the user's, or None.
    """

    model: str
    fingerprint: str
    spec: str
    query: str = ""
    document: str = ""
    normalize: bool = False
    postprocess: str | None = None
    frequencies: str | None = None

    @classmethod
    def of(
        cls,
        embedder: KVEmbedder,
        *,
        query: str | None = None,
        document: str | None = None,
        normalize: bool | None = None,
    ) -> Self:
        """What an embedder's vectors are.

        Args:
            embedder: the embedder.
            query, document: put before or around the texts instead of its own prompts of that name.
            normalize: as in :meth:`KVEmbedder.encode`.
        """
        info = embedder.engine.info
        spec = embedder.spec.model_dump(mode="json", exclude={"normalize"})
        spec["layers"] = list(embedder.spec.read_layers(info.num_layers))
        if embedder.spec.weights != "sif":
            del spec["sif_a"]
        return cls(
            model=info.name,
            fingerprint=info.fingerprint,
            spec=json.dumps(spec, sort_keys=True),
            query=embedder.prompts.get("query", "") if query is None else query,
            document=embedder.prompts.get("document", "") if document is None else document,
            normalize=embedder.spec.normalize if normalize is None else normalize,
            postprocess=_postprocess_digest(embedder.postprocess),
            frequencies=_frequencies_digest(embedder.frequencies) if embedder.spec.weights == "sif" else None,
        )

    @property
    def digest(self) -> str:
        """16 hex digits over all but the model's name."""
        facts = {name: fact for name, fact in asdict(self).items() if name != "model"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.model} {self.digest}"

    def require(self, other: EmbeddingIdentity, what: str, *, hint: str | None = None) -> None:
        """Refuse vectors of another identity.

        Args:
            other: of the vectors that are there.
            what: what holds them.
            hint: what to do.

        Raises:
            ModelMismatchError: naming both, and what they differ in.
        """
        if other.digest != self.digest:
            raise ModelMismatchError(
                f"{what} holds vectors of {other}, and those at hand are of {self}: {other._differences(self)}.",
                hint=hint or "Embed with what it was made with, or embed all of its texts anew.",
            )

    def _differences(self, other: EmbeddingIdentity) -> str:
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "model")
        return "; ".join(f"{name} {_short(a)} and {_short(b)}" for name, a, b in pairs if a != b)

    def save(self, path: str | Path) -> None:
        """Write to a JSON file, whole or not at all."""
        write_json(path, _KIND, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: torn, changed, or another kind of file.
        """
        body = read_json(path, _KIND)
        try:
            return cls(**body)
        except TypeError as error:
            raise FileFormatError(f"{path} is not whole: {error}") from error


def _short(fact: Any) -> str:
    text = repr(fact) if not isinstance(fact, str) or not fact.startswith("{") else fact
    return text if len(text) <= 200 else f"{text[:197]}..."


def _postprocess_digest(fitted: PostProcessor | None) -> str | None:
    if fitted is None:
        return None
    digest = hashlib.sha256(fitted.method.encode())
    for part in (fitted.mean, fitted.scale, fitted.components):
        digest.update(b"none" if part is None else f"{part.shape}".encode() + part.tobytes())
    return digest.hexdigest()[:16]


def _frequencies_digest(table: FrequencyTable | None) -> str | None:
    """Of a table of the user's. The vocabulary's own follows from the tokenizer, which servers keep to themselves."""
    if table is None or table.origin == FROM_VOCABULARY:
        return None
    return hashlib.sha256(table.vocabulary.encode() + table.frequencies.tobytes()).hexdigest()[:16]
