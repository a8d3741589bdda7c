"""A trained head: pooled vector in, difficulty or confidence out; kept in a folder, bound to a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from kvroute.confidence_maps import Frozen, IsotonicMap, LogisticMap
from kvroute.errors import FileFormatError, InvalidInputError, SpecError
from kvroute.files import read_json, read_tensors, write_json, write_tensors, write_whole
from kvroute.heads.card import model_card
from kvroute.heads.models import MODELS, Floats, HeadModel, Vectors
from kvroute.heads.neighbours import Neighbour, Neighbours
from kvroute.pooling import PoolingSpec

if TYPE_CHECKING:
    from kvroute.info import ModelInfo

Target = Literal["difficulty", "correct"]

TENSORS, CONFIG, CARD, WINDOWS = "head.safetensors", "head.json", "README.md", "windows"
_KIND = "kvroute.head"


class _Saved(Frozen):
    """Body of ``head.json``."""

    spec: PoolingSpec
    target: Target
    kind: str
    model: str
    fingerprint: str
    data_hash: str
    metrics: dict[str, float]
    details: dict[str, Any]
    map: LogisticMap | IsotonicMap = Field(discriminator="method")
    tensors: str
    """SHA-256 of head.safetensors."""
    windows: str | None
    """SHA-256 of windows/head.json."""


@dataclass(frozen=True)
class DifficultyHead:
    """Maps a pooled vector to a difficulty in [0, 100], higher is harder; or, with target ``correct``, an answer's
    vector to the probability that it is right.

    Made by :func:`kvroute.heads.training.train_head` (``kvroute train``).

    Attributes:
        spec: how its vectors are pooled. Difficulty: over the prompt that both modes share. Correct: over the answer's
            tokens but the last. Windows: over everything held so far, prompt, mode's tokens and tokens written.
        target: ``difficulty`` or ``correct``.
        predictor: what it computes.
        map: difficulty (for ``correct`` the raw score) to a probability, fitted on validation rows.
        model: name of the model it was trained on.
        fingerprint: the model's fingerprint.
        data_hash: digest of the rows it was trained on.
        metrics: on held-out rows, which nothing was fitted to or chosen by.
        details: rows by part, seed, versions, settings.
        windows: the head for mid-thought, with a spec of its own, or None.
        neighbours: labelled questions to explain a decision with, or None.
    """

    spec: PoolingSpec
    target: Target
    predictor: HeadModel
    map: LogisticMap | IsotonicMap
    model: str
    fingerprint: str
    data_hash: str
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    windows: DifficultyHead | None = None
    neighbours: Neighbours | None = None

    def __repr__(self) -> str:
        return f"DifficultyHead({self.kind}, target={self.target!r}, model={self.model!r}, dim={self.predictor.dim})"

    @property
    def kind(self) -> str:
        """``mlp``, ``ridge``, ``logistic`` or ``trees``."""
        return self.predictor.kind

    @property
    def digest(self) -> str:
        """16 hex digits over everything that its results depend on."""
        digest = hashlib.sha256(f"{self.spec}\n{self.target}\n{self.kind}\n{self.map}\n{self.fingerprint}".encode())
        for name, array in sorted(self.predictor.tensors().items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()[:16]

    # ------------------------------------------------------------------ use

    def predict(self, vectors: Vectors) -> Floats:
        """Difficulties, or calibrated probabilities that answers are right.

        A row's result has the same bits whatever stands beside it.

        Args:
            vectors: ``[n, dim]`` float32, pooled by :attr:`spec`.

        Returns:
            ``[n]`` float64: for target ``difficulty`` in [0, 100], for ``correct`` in [0, 1]; higher is harder, or
            more likely right.

        Raises:
            InvalidInputError: another shape, or NaN or infinity.
        """
        found = self.predictor(self._checked(vectors))
        return self.map(found[:, None]) if self.target == "correct" else found * 100.0

    def probability(self, difficulty: Floats) -> Floats:
        """Calibrated probability that the fast answer is right (of windows: that one written now would be).

        Args:
            difficulty: ``[n]`` as :meth:`predict` gives them. Those of target ``correct`` are probabilities already
                and come back as they are.

        Returns:
            ``[n]`` in [0, 1], never rising with the difficulty.
        """
        given = np.asarray(difficulty, dtype=np.float64)
        return given if self.target == "correct" else self.map(given[:, None])

    def nearest(self, vectors: Vectors, k: int = 3) -> list[list[Neighbour]]:
        """The labelled training questions nearest to each vector, nearest first; none where the head keeps none.

        Raises:
            InvalidInputError: as :meth:`predict`.
        """
        x = self._checked(vectors)
        if self.neighbours is None:
            return [[] for _ in x]
        return self.neighbours.nearest((x - self.predictor.mean) * self.predictor.inverse, k)

    def require(self, info: ModelInfo) -> None:
        """Refuse another model.

        Raises:
            ModelMismatchError: naming both.
        """
        info.require(self.fingerprint, f"The {self.target} head", self.model)

    def _checked(self, vectors: Vectors) -> Vectors:
        x = np.asarray(vectors, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.predictor.dim:
            raise InvalidInputError(
                f"The head takes vectors [n, {self.predictor.dim}], not {list(x.shape)}.",
                hint="Pool them by head.spec, with the model that the head was trained on.",
            )
        if not np.isfinite(x).all():
            raise InvalidInputError("A vector for the head holds NaN or infinity.")
        return x

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path) -> None:
        """Write ``head.safetensors``, ``head.json`` and a model card ``README.md``; the windows head in ``windows/``.

        ``head.json`` comes last and names the digests of what it goes with, so that a folder that was cut short is
        refused.
        """
        target = Path(folder)
        if self.windows is not None:
            self.windows.save(target / WINDOWS)
        tensors = self.predictor.tensors() | (self.neighbours.tensors() if self.neighbours is not None else {})
        write_tensors(target / TENSORS, _KIND, tensors, {"kind": self.kind, "fingerprint": self.fingerprint})
        write_whole(target / CARD, model_card(self).encode())
        saved = _Saved(
            spec=self.spec,
            target=self.target,
            kind=self.kind,
            model=self.model,
            fingerprint=self.fingerprint,
            data_hash=self.data_hash,
            metrics=self.metrics,
            details=self.details,
            map=self.map,
            tensors=_digest(target / TENSORS),
            windows=_digest(target / WINDOWS / CONFIG) if self.windows is not None else None,
        )
        write_json(target / CONFIG, _KIND, saved.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path, info: ModelInfo | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            folder: the folder.
            info: the model it shall serve; without it the head may be looked at.

        Raises:
            FileFormatError: missing, torn, changed, of a newer format, or files of two heads.
            ModelMismatchError: trained on another model; both are named.
        """
        source = Path(folder)
        try:
            saved = _Saved.model_validate(read_json(source / CONFIG, _KIND))
        except (ValidationError, SpecError) as error:
            raise FileFormatError(f"{source / CONFIG} is not whole: {error}") from error
        if info is not None:
            info.require(saved.fingerprint, f"The head in {source}", saved.model)
        if saved.kind not in MODELS:
            raise FileFormatError(
                f"{source / CONFIG} is a head of kind {saved.kind!r}.", hint=f"Known are: {', '.join(MODELS)}."
            )
        tensors, _ = read_tensors(source / TENSORS, _KIND)
        _belongs(source / TENSORS, saved.tensors)
        predictor = MODELS[saved.kind].from_tensors(tensors)
        if info is not None and saved.spec.dimension(info) != predictor.dim:
            raise FileFormatError(
                f"The head in {source} takes {predictor.dim} numbers, and its spec gives {saved.spec.dimension(info)}."
            )
        windows = None
        if saved.windows is not None:
            _belongs(source / WINDOWS / CONFIG, saved.windows)
            windows = cls.load(source / WINDOWS, info)
        return cls(
            spec=saved.spec,
            target=saved.target,
            predictor=predictor,
            map=saved.map,
            model=saved.model,
            fingerprint=saved.fingerprint,
            data_hash=saved.data_hash,
            metrics=saved.metrics,
            details=saved.details,
            windows=windows,
            neighbours=Neighbours.from_tensors(tensors),
        )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FileFormatError(f"{path} can't be read: {error.strerror or error}.") from error


def _belongs(path: Path, digest: str) -> None:
    found = _digest(path)
    if found != digest:
        raise FileFormatError(
            f"{path} has the digest {found[:12]}, and {CONFIG} beside it names {digest[:12]}: it is of another head or "
            "was changed.",
            hint="Restore the folder, or train the head anew.",
        )
