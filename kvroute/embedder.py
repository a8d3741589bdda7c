"""Texts to vectors: :class:`KVEmbedder`."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from kvroute.engines.base import Engine, Vectors, decides_inside
from kvroute.errors import EmptyTextError, FileFormatError, InvalidInputError, SpecError, TextTooLongError
from kvroute.files import read_json, write_json
from kvroute.pooling import PoolingSpec
from kvroute.postprocess import Method, PostProcessor
from kvroute.token_weights import FrequencyTable

if TYPE_CHECKING:
    import torch

    from kvroute.contrastive import TextPair

_KIND = "kvroute.embedder"
_PLACE = "{text}"
_CONFIG, _POSTPROCESS, _FREQUENCIES = "embedder.json", "postprocess.safetensors", "frequencies.safetensors"


class _Saved(BaseModel):
    """What ``embedder.json`` holds."""

    model_config = ConfigDict(extra="forbid")

    model: str
    fingerprint: str
    spec: PoolingSpec
    prompts: dict[str, str]
    truncate: bool
    postprocess: bool
    frequencies: bool


class KVEmbedder:
    """Embeds texts with the KV cache of a causal model.

    Each text runs once, no deeper than the spec's deepest layer, and without the LM head.

    Args:
        engine: the model.
        spec: how to pool, or the name of a preset.
        prompts: texts put before the text, or around it where they hold ``{text}``, by name; ``encode_query`` uses
            ``query`` and ``encode_document`` uses ``document`` where they are given, as in sentence-transformers.
        frequencies: token frequencies for a spec with ``weights="sif"``; by default those that the tokenizer's
            vocabulary suggests. vLLM weighs by these itself.
        postprocess: fitted post-processing; see :meth:`fit` and :meth:`fit_pairs`.
        truncate: whether a text past the context is cut, or is an error.

    Raises:
        SpecError: the spec does not fit the model.
        ModelMismatchError: the frequencies belong to another tokenizer.
        InvalidInputError: the post-processing takes vectors of another size.
    """

    def __init__(
        self,
        engine: Engine,
        spec: PoolingSpec | str = "best",
        *,
        prompts: Mapping[str, str] | None = None,
        frequencies: FrequencyTable | None = None,
        postprocess: PostProcessor | None = None,
        truncate: bool = False,
    ) -> None:
        self.engine = engine
        self.spec = PoolingSpec.preset(spec) if isinstance(spec, str) else spec
        self.prompts = dict(prompts or {})
        self.truncate = truncate
        self.postprocess = postprocess
        self._pooled_dimension = self.spec.dimension(engine.info)
        if postprocess is not None and postprocess.input_dimension != self._pooled_dimension:
            raise InvalidInputError(
                f"The post-processing takes vectors of size {postprocess.input_dimension}, and the spec gives "
                f"{self._pooled_dimension}.",
                hint="Fit it with this spec and model: KVEmbedder.fit(texts).",
            )
        if frequencies is not None:
            frequencies.require(engine.tokenizer)
        elif self.spec.weights == "sif" and not decides_inside(engine):  # such an engine weighs by itself
            frequencies = FrequencyTable.from_vocabulary(engine.tokenizer)
        self.frequencies = frequencies
        self._weights = frequencies.weights(self.spec.sif_a) if frequencies and self.spec.weights == "sif" else None

    def __repr__(self) -> str:
        return f"KVEmbedder({self.engine.info.name!r}, dimension={self.dimension})"

    @property
    def dimension(self) -> int:
        """Size of a vector."""
        return self._pooled_dimension if self.postprocess is None else self.postprocess.dimension

    # ------------------------------------------------------------------ encoding

    @overload
    def encode(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, prompt: str | None = None,
        truncate: bool | None = None, normalize: bool | None = None, convert_to: Literal["numpy"] = "numpy",
        progress: bool | None = None,
    ) -> Vectors: ...  # fmt: skip
    @overload
    def encode(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, prompt: str | None = None,
        truncate: bool | None = None, normalize: bool | None = None, convert_to: Literal["torch"],
        progress: bool | None = None,
    ) -> torch.Tensor: ...  # fmt: skip
    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool | None = None,
        normalize: bool | None = None,
        convert_to: Literal["numpy", "torch"] = "numpy",
        progress: bool | None = None,
    ) -> Vectors | torch.Tensor:
        """Embed one text or many.

        Args:
            texts: the texts.
            prompt_name: which of :attr:`prompts` to put before each.
            prompt: a text to put before each, instead.
            truncate: whether a text past the context is cut; by default as the embedder was made.
            normalize: whether vectors get unit length at the end; by default as the spec says.
            convert_to: ``numpy`` or ``torch``.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            ``[n, dimension]`` float32, or ``[dimension]`` for a single text. A vector does not depend on the other
            texts of the call, but for rounding.

        Raises:
            EmptyTextError: a text with no token, naming its index.
            TextTooLongError: a text past the context, naming index and length, unless it is truncated.
            InvalidInputError: not a text, or one that can't be tokenized, naming its index.
        """
        if convert_to not in ("numpy", "torch"):
            raise InvalidInputError(f"convert_to is 'numpy' or 'torch', not {convert_to!r}.")
        vectors = self._pooled(_as_texts(texts), prompt_name, prompt, truncate, progress)
        if self.postprocess is not None:
            vectors = self.postprocess.transform(vectors)
        if self.spec.normalize if normalize is None else normalize:
            vectors = _unit(vectors)
        found = vectors[0] if isinstance(texts, str) else vectors
        if convert_to == "torch":
            import torch

            return torch.from_numpy(np.ascontiguousarray(found))
        return found

    def check(
        self, texts: str | Sequence[str], *, prompt_name: str | None = None, prompt: str | None = None,
        truncate: bool | None = None,
    ) -> None:  # fmt: skip
        """Raise what :meth:`encode` would raise for these texts, without running the model."""
        before = self.prompt(prompt_name, prompt)
        self._tokenize(_as_texts(texts), before, self.truncate if truncate is None else truncate)

    def encode_query(self, texts: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode` with the prompt ``query``, if there is one."""
        return self.encode(texts, **self._named("query", kwargs))

    def encode_document(self, texts: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode` with the prompt ``document``, if there is one."""
        return self.encode(texts, **self._named("document", kwargs))

    async def aencode(self, texts: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode` in a thread."""
        return await asyncio.to_thread(lambda: self.encode(texts, **kwargs))

    async def aencode_query(self, texts: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode_query` in a thread."""
        return await asyncio.to_thread(lambda: self.encode_query(texts, **kwargs))

    async def aencode_document(self, texts: str | Sequence[str], **kwargs: Any) -> Any:
        """:meth:`encode_document` in a thread."""
        return await asyncio.to_thread(lambda: self.encode_document(texts, **kwargs))

    def similarity(self, a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> Vectors:
        """Cosines of vectors ``[n, dim]`` and ``[m, dim]``: ``[n, m]`` float32 in [-1, 1]; higher is more alike."""
        first, second = (np.atleast_2d(np.asarray(x, dtype=np.float32)) for x in (a, b))
        if first.shape[1] != second.shape[1]:
            raise InvalidInputError(f"Vectors of size {first.shape[1]} and {second.shape[1]} can't be compared.")
        return np.asarray(np.clip(_unit(first) @ _unit(second).T, -1.0, 1.0), dtype=np.float32)

    # ------------------------------------------------------------------ fitting and files

    def fit(
        self, texts: Sequence[str], *, method: Method = "whiten", dimension: int | None = None, power: float = 1.0,
        prompt_name: str | None = None, truncate: bool | None = None, progress: bool | None = None,
    ) -> Self:  # fmt: skip
        """Fit post-processing on texts like those to be embedded; no labels are needed. Replaces what was fitted.

        Args:
            texts: some hundreds at least, and more than ``dimension``.
            method: ``center``, ``standardize``, ``whiten`` or ``project``.
            dimension: for ``whiten`` and ``project``, sizes kept.
            power: for ``whiten``, how far variances are evened out, 0 to 1.
            prompt_name, truncate, progress: as in :meth:`encode`.

        Raises:
            InvalidInputError: too few texts, or one that can't be embedded. What was fitted before stays.
        """
        listed = _as_texts(texts)
        vectors = self._pooled(listed, prompt_name, None, truncate, progress)
        fitted = PostProcessor.fit(vectors, method, dimension, power=power, blocks=self._blocks())
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        fitted.facts = {**self._bound_to(), "texts": len(listed), "texts_digest": digest}
        self.postprocess = fitted
        return self

    def fit_pairs(
        self, pairs: Sequence[TextPair | tuple[str, str]], *, texts: Sequence[str] = (), dimension: int | None = None,
        epochs: int = 30, seed: int = 0, prompt_name: str | None = None, truncate: bool | None = None,
        progress: bool | None = None,
    ) -> Self:  # fmt: skip
        """Train a linear projection on pairs of texts that belong together: a question and its answer, two texts of one
        label, paraphrases. The model stays as it is. Replaces what was fitted; saved and loaded like it.

        Args:
            pairs: some hundreds at least; :class:`~kvroute.contrastive.TextPair` also says which pairs are no negatives
                of each other.
            texts: further texts like those to be embedded, without a pair, for the whitening that it starts from.
            dimension: sizes kept; by default 256, or as many as the texts allow.
            epochs, seed: see :func:`kvroute.contrastive.fit_projection`.
            prompt_name, truncate, progress: as in :meth:`encode`.

        Raises:
            InvalidInputError: too few pairs, or a text that can't be embedded. What was fitted before stays.
        """
        from kvroute.contrastive import TextPair, fit_projection

        given = [p if isinstance(p, TextPair) else TextPair(*p) for p in pairs]
        listed = _as_texts(dict.fromkeys([t for p in given for t in (p.a, p.b)] + _as_texts(texts)))
        vectors = self._pooled(listed, prompt_name, None, truncate, progress)
        fitted = fit_projection(
            vectors, listed, given, dimension=dimension, blocks=self._blocks(), epochs=epochs, seed=seed,
            progress=progress,
        )  # fmt: skip
        digest = hashlib.sha256(json.dumps(given).encode()).hexdigest()[:16]
        fitted.facts = {**fitted.facts, **self._bound_to(), "pairs_digest": digest}
        self.postprocess = fitted
        return self

    def save(self, folder: str | Path) -> None:
        """Write spec, prompts and what was fitted to a folder: JSON and safetensors, bound to the model."""
        target = Path(folder)
        if self.postprocess is not None:
            self.postprocess.save(target / _POSTPROCESS, self._bound_to())
        if self.frequencies is not None:
            self.frequencies.save(target / _FREQUENCIES)
        saved = _Saved(
            model=self.engine.info.name,
            fingerprint=self.engine.info.fingerprint,
            spec=self.spec,
            prompts=self.prompts,
            truncate=self.truncate,
            postprocess=self.postprocess is not None,
            frequencies=self.frequencies is not None,
        )
        write_json(target / _CONFIG, _KIND, saved.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path, engine: Engine) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ModelMismatchError: it was fitted on another model; both are named.
            FileFormatError: a file is missing, torn, changed or of a newer format.
        """
        source = Path(folder)
        try:
            saved = _Saved.model_validate(read_json(source / _CONFIG, _KIND))
        except (ValidationError, SpecError) as error:
            raise FileFormatError(f"{source / _CONFIG} is not whole: {error}") from error
        engine.info.require(saved.fingerprint, f"The embedder in {source}", saved.model)
        embedder = cls(
            engine,
            saved.spec,
            prompts=saved.prompts,
            frequencies=FrequencyTable.load(source / _FREQUENCIES) if saved.frequencies else None,
            truncate=saved.truncate,
        )
        if saved.postprocess:
            fitted = PostProcessor.load(source / _POSTPROCESS)
            if any(fitted.facts.get(name) != fact for name, fact in embedder._bound_to().items()):
                raise FileFormatError(
                    f"{source / _POSTPROCESS} was not saved with {source / _CONFIG}: its model or its spec is another.",
                    hint="Save the embedder anew; its files belong together.",
                )
            embedder.postprocess = fitted
        return embedder

    # ------------------------------------------------------------------ parts

    def _blocks(self) -> list[int]:
        """Sizes of the parts that lie side by side in a pooled vector: layers, keys and values."""
        layers = self.spec.resolve(self.engine.info.num_layers)
        layer = self.engine.info.layers[layers[0]]
        sizes = {"k": layer.key_size, "v": layer.value_size}
        heads = layer.kv_heads if self.spec.heads == "concat" else 1
        times = len(layers) if self.spec.layer_reduce == "concat" else 1
        return [sizes[part] * heads for part in self.spec.part for _ in range(times)]

    def _bound_to(self) -> dict[str, Any]:
        return {"fingerprint": self.engine.info.fingerprint, "spec": self.spec.model_dump(mode="json")}

    def _pooled(
        self, texts: list[str], prompt_name: str | None, prompt: str | None, truncate: bool | None,
        progress: bool | None,
    ) -> Vectors:  # fmt: skip
        before = self.prompt(prompt_name, prompt)
        ids = self._tokenize(texts, before, self.truncate if truncate is None else truncate)
        return self.engine.pool(ids, [self.spec], sif_weights=self._weights, progress=progress)[0]

    def prompt(self, name: str | None = None, prompt: str | None = None) -> str:
        """The text put before each text: ``prompt``, or the one of :attr:`prompts` with that name, or nothing.

        Raises:
            InvalidInputError: both, or an unknown name; the message lists what there is.
        """
        if name is None:
            return prompt or ""
        if prompt is not None:
            raise InvalidInputError("Give prompt or prompt_name, not both.")
        try:
            return self.prompts[name]
        except KeyError:
            known = ", ".join(self.prompts) or "none"
            raise InvalidInputError(f"No prompt is named {name!r}.", hint=f"This embedder has: {known}.") from None

    def _named(self, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("prompt") is None and kwargs.get("prompt_name") is None and name in self.prompts:
            return {**kwargs, "prompt_name": name}
        return kwargs

    def _tokenize(self, texts: list[str], before: str, truncate: bool) -> list[list[int]]:
        for index, text in enumerate(texts):
            if not text:
                raise EmptyTextError(index)
        head, placed, tail = before.partition(_PLACE)
        ids = self.engine.tokenize_texts([head + t + tail for t in texts] if before else texts)
        limit = self.engine.info.context
        for index, tokens in enumerate(ids):
            if not tokens:
                raise EmptyTextError(index)
            if len(tokens) > limit:
                if not truncate:
                    raise TextTooLongError(index, len(tokens), limit)
                end = self.engine.tokenize_texts([tail], special_tokens=False)[0] if placed else []
                ids[index] = [*tokens[: max(limit - len(end), 0)], *end][:limit]
        return ids


def _as_texts(texts: object) -> list[str]:
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable):
        raise InvalidInputError(f"Give a text or a list of texts, not {type(texts).__name__}.")
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise InvalidInputError(f"Text {index} is {type(text).__name__}, not a text.")
    return listed


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)
