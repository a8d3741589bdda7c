"""How much each token counts in a mean: SIF, smooth inverse frequency.

A token with relative frequency p counts a / (a + p) (Arora, Liang, Ma: A Simple but Tough-to-Beat Baseline for
Sentence Embeddings, ICLR 2017, section 3). The frequencies come from texts of the user's, or from the tokenizer alone:
a BPE vocabulary lists its merges in the order they were learned, which is by frequency, so its ranks follow Zipf's law.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvroute.errors import FileFormatError, InvalidInputError, ModelMismatchError
from kvroute.files import read_tensors, write_tensors

_KIND = "kvroute.frequencies"
FROM_VOCABULARY = "the vocabulary's merges"
"""Origin of a table that follows from the tokenizer alone."""
_CHUNK = 4096
_ZIPF_SHIFT = 2.7  # Mandelbrot's shift: keeps the first ranks from taking all the mass

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how SentencePiece writes a byte


class FrequencyTable:
    """Relative frequency of every token of one tokenizer.

    Args:
        frequencies: ``[vocab]``, each in [0, 1], not all 0.
        vocabulary: :func:`vocabulary_digest` of the tokenizer.
        origin: where the frequencies come from, for people.

    Raises:
        InvalidInputError: not a vector of frequencies.
    """

    def __init__(self, frequencies: np.ndarray[Any, Any], vocabulary: str, origin: str) -> None:
        values = np.asarray(frequencies, dtype=np.float64)
        if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all() or not values.any():
            raise InvalidInputError("Frequencies are a vector of numbers from 0 to 1, not all zero.")
        self.frequencies = values
        self.vocabulary = vocabulary
        self.origin = origin

    def __repr__(self) -> str:
        return f"FrequencyTable({len(self.frequencies)} tokens, from {self.origin})"

    @classmethod
    def fit(cls, texts: Iterable[str], tokenizer: Any) -> Self:
        """Count tokens in texts; every token of the vocabulary gets one more, so that none is impossible.

        Raises:
            InvalidInputError: no text at all, or one that can't be tokenized, naming its index.
        """
        counts = np.ones(_size(tokenizer), dtype=np.float64)
        seen = 0
        source = iter([texts] if isinstance(texts, str) else texts)
        while chunk := list(islice(source, _CHUNK)):
            try:
                listed = tokenizer(chunk, add_special_tokens=False)["input_ids"]
            except (UnicodeError, TypeError, ValueError) as error:
                raise InvalidInputError(f"{_first_fault(chunk, seen)} can't be tokenized: {error}") from error
            for ids in listed:
                np.add.at(counts, np.asarray(ids, dtype=np.int64), 1.0)
            seen += len(chunk)
        if seen == 0:
            raise InvalidInputError("A frequency table needs at least one text.", hint="Use from_vocabulary instead.")
        counts[_special_ids(tokenizer)] = counts.max()
        return cls(counts / counts.sum(), vocabulary_digest(tokenizer), f"{seen} texts")

    @classmethod
    def from_vocabulary(cls, tokenizer: Any) -> Self:
        """A table that needs no text: Zipf's law over the order in which the vocabulary's merges were learned.

        Good for BPE vocabularies, whose ids follow that order. Control tokens and single characters or bytes, which
        mean little by themselves, count as often as the first merge, so the frequencies sum to more than 1.
        """
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        meaningless = set(_special_ids(tokenizer))
        meaningless |= {i for token, i in vocabulary.items() if len(token) == 1 or _BYTE.fullmatch(token)}
        merged = sorted(set(vocabulary.values()) - meaningless)
        zipf = 1.0 / (np.arange(max(len(merged), 1), dtype=np.float64) + _ZIPF_SHIFT)
        zipf /= zipf.sum()
        frequencies = np.full(_size(tokenizer), zipf[0])
        frequencies[merged] = zipf[: len(merged)]
        return cls(frequencies, vocabulary_digest(tokenizer), FROM_VOCABULARY)

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


def _size(tokenizer: Any) -> int:
    """One more than the largest id: vocabularies have holes."""
    return 1 + max(tokenizer.get_vocab().values(), default=0)


def _special_ids(tokenizer: Any) -> list[int]:
    """Ids of control tokens, those that the tokenizer has no role for (``<file_sep>``, say) included."""
    ids = {int(i) for i in getattr(tokenizer, "all_special_ids", None) or []}
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    ids |= {int(i) for i, token in added.items() if getattr(token, "special", False)}
    return sorted(i for i in ids if 0 <= i < _size(tokenizer))


def _first_fault(texts: Sequence[object], offset: int) -> str:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"Text {offset + index} is {type(text).__name__}: it"
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"Text {offset + index}"
    return "A text"
