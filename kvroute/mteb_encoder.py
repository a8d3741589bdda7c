"""An embedder as mteb 2 takes it: ``mteb.evaluate(KVRouteEncoder(embedder), tasks)``.

mteb (https://github.com/embeddings-benchmark/mteb) brings the tasks; it is in the extra ``eval``.
Written for mteb 2.26.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.embedder_identity import EmbeddingIdentity
from kvroute.engines.base import Vectors
from kvroute.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

    from kvroute.embedder import KVEmbedder


class KVRouteEncoder:
    """mteb's ``EncoderProtocol`` around a :class:`~kvroute.KVEmbedder`.

    Queries and documents get the embedder's prompts ``query`` and ``document`` where it has them, and all other texts
    the prompt named after their task or its type (``STS``, ``Classification`` ...), if there is one. Texts past the
    context are cut, since mteb gives no way to refuse one, and an empty text is embedded as a space.

    Args:
        embedder: the embedder, with whatever was fitted.
        name: of the model in mteb's results, ``ORGANIZATION/NAME``; by default made of the model's name and a digest of
            everything that its vectors depend on, so that results of two embedders are not mixed up.

    Raises:
        MissingExtraError: mteb is not installed.
        InvalidInputError: a name of another form.
    """

    def __init__(self, embedder: KVEmbedder, *, name: str | None = None) -> None:
        try:
            import mteb  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("mteb", "eval") from error
        if name is not None and name.count("/") != 1:
            raise InvalidInputError(f"mteb's names are ORGANIZATION/NAME, not {name!r}.")
        self.embedder = embedder
        identity = EmbeddingIdentity.of(embedder)
        model = identity.model.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "model"
        self._name = name or f"kvroute/{model}-{identity.digest}"
        self._revision = identity.digest

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,  # noqa: ARG002
        hf_subset: str,  # noqa: ARG002
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Vectors:
        """Embed mteb's texts.

        Args:
            inputs: batches with a list ``text``.
            task_metadata: the task's.
            hf_split, hf_subset: of the task; make no difference.
            prompt_type: whether these are queries or documents.
            kwargs: mteb's settings of encoders; ``show_progress_bar`` is followed, batches are made by length.

        Returns:
            ``[n, dimension]`` float32.

        Raises:
            InvalidInputError: a batch without texts (images, say).
        """
        texts: list[str] = []
        for batch in inputs:
            if "text" not in batch:
                raise InvalidInputError(f"kvroute embeds texts, and the task gives {', '.join(batch)}.")
            texts += [text or " " for text in batch["text"]]
        if not texts:
            return np.empty((0, self.embedder.dimension), dtype=np.float32)
        progress = None if kwargs.get("show_progress_bar") else False
        return self.embedder.encode(
            texts, prompt_name=self._prompt(task_metadata, prompt_type), truncate=True, progress=progress
        )

    def _prompt(self, task: Any, prompt_type: Any) -> str | None:
        """Name of the embedder's prompt: for this task, for its kind of texts, or for its type of task."""
        kind = getattr(prompt_type, "value", prompt_type)
        names = [task.name, "document" if kind == "passage" else kind, task.type]
        return next((n for n in names if n is not None and n in self.embedder.prompts), None)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Vectors:
        """Cosines ``[n, m]``."""
        return self.embedder.similarity(np.atleast_2d(np.asarray(embeddings1)), np.atleast_2d(np.asarray(embeddings2)))

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Vectors:
        """Cosines of rows with rows, ``[n]``."""
        a, b = (np.atleast_2d(np.asarray(x, dtype=np.float32)) for x in (embeddings1, embeddings2))
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return np.asarray((a * b).sum(axis=1) / np.maximum(lengths, 1e-12), dtype=np.float32)

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb writes beside the results."""
        from mteb.models.model_meta import ModelMeta, ScoringFunction

        engine = self.embedder.engine
        model = getattr(engine, "model", None)
        return ModelMeta(
            loader=None,
            name=self._name,
            revision=self._revision,
            release_date=None,
            languages=None,
            n_parameters=None if model is None else sum(p.numel() for p in model.parameters()),
            memory_usage_mb=None,
            max_tokens=float(engine.info.context),
            embed_dim=self.embedder.dimension,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Transformers"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=bool(self.embedder.prompts),
            training_datasets=None,
        )
