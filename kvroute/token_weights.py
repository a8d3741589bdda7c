"""How much each token counts in a mean: SIF, smooth inverse frequency.

A token with relative frequency p counts a / (a + p) (Arora, Liang, Ma: A Simple but Tough-to-Beat Baseline for
Sentence Embeddings, ICLR 2017, section 3). The frequencies come from texts of the user's, or from the tokenizer alone:
a BPE vocabulary lists its merges in the order they were learned, which is by frequency, so its ranks follow Zipf's law.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvroute.errors import FileFormatError, InvalidInputError, ModelMismatchError
from kvroute.files import read_tensors, write_tensors

_KIND = "kvroute.frequencies"
_ZIPF_SHIFT = 2.7  # Mandelbrot's shift: keeps the first ranks from taking all the mass


class FrequencyTable:
    """Relative frequency of every token of one tokenizer.

    Args:
        frequencies: ``[vocab]``, not negative, with a positive sum; normalised to sum 1.
        vocabulary: :func:`vocabulary_digest` of the tokenizer.
        origin: where the frequencies come from, for people.

    Raises:
        InvalidInputError: not a vector of frequencies.
    """

    def __init__(self, frequencies: np.ndarray[Any, Any], vocabulary: str, origin: str) -> None:
        values = np.asarray(frequencies, dtype=np.float64)
        if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise InvalidInputError("Frequencies are a vector of finite numbers, none negative, not all zero.")
        self.frequencies = values / values.sum()
        self.vocabulary = vocabulary
        self.origin = origin

    def __repr__(self) -> str:
        return f"FrequencyTable({len(self.frequencies)} tokens, from {self.origin})"

    @classmethod
    def fit(cls, texts: Iterable[str], tokenizer: Any) -> Self:
        """Count tokens in texts; every token of the vocabulary gets one more, so that none is impossible.

        Raises:
            InvalidInputError: no text at all.
        """
        size = len(tokenizer)
        counts = np.ones(size, dtype=np.float64)
        seen = 0
        for text in texts:
            ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
            np.add.at(counts, ids, 1.0)
            seen += 1
        if seen == 0:
            raise InvalidInputError("A frequency table needs at least one text.", hint="Use from_vocabulary instead.")
        counts[_special_ids(tokenizer)] = counts.max()
        return cls(counts, vocabulary_digest(tokenizer), f"{seen} texts")

    @classmethod
    def from_vocabulary(cls, tokenizer: Any) -> Self:
        """A table that needs no text: Zipf's law over the ranks of the vocabulary.

        Good for BPE vocabularies, whose ids follow the order of the merges. Special tokens count as the most
        frequent ones.
        """
        ranks = np.arange(len(tokenizer), dtype=np.float64)
        frequencies = 1.0 / (ranks + _ZIPF_SHIFT)
        special = _special_ids(tokenizer)
        frequencies = np.sort(frequencies)[::-1].copy()
        frequencies[special] = frequencies[0]
        return cls(frequencies, vocabulary_digest(tokenizer), "the vocabulary's ranks")

    def weights(self, a: float = 1e-3) -> np.ndarray[Any, np.dtype[np.float32]]:
        """SIF weight of every token, ``[vocab]`` float32 in (0, 1]: a / (a + p)."""
        return np.asarray(a / (a + self.frequencies), dtype=np.float32)

    def require(self, tokenizer: Any) -> None:
        """Refuse a tokenizer with another vocabulary.

        Raises:
            ModelMismatchError: naming both.
        """
        found = vocabulary_digest(tokenizer)
        if found != self.vocabulary:
            raise ModelMismatchError(
                f"The frequency table was made for the vocabulary {self.vocabulary}, and the tokenizer has {found}.",
                hint="Make it anew with FrequencyTable.fit or FrequencyTable.from_vocabulary.",
            )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        meta = {"vocabulary": self.vocabulary, "origin": self.origin}
        write_tensors(path, _KIND, {"frequencies": self.frequencies}, meta)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: torn, changed, or another kind of file.
        """
        tensors, meta = read_tensors(path, _KIND)
        try:
            return cls(tensors["frequencies"], str(meta["vocabulary"]), str(meta["origin"]))
        except (KeyError, InvalidInputError) as error:
            raise FileFormatError(f"{path} is not a whole frequency table: {error}") from error


def vocabulary_digest(tokenizer: Any) -> str:
    """16 hex digits over the tokenizer's tokens and ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()[:16]


def _special_ids(tokenizer: Any) -> list[int]:
    ids: Sequence[int] = getattr(tokenizer, "all_special_ids", None) or []
    return sorted({int(i) for i in ids if 0 <= int(i) < len(tokenizer)})
