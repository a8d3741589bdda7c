"""Tokens to text while they come, with stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns one answer's tokens into text, piece by piece.

    Holds text back while a character is incomplete (byte-level tokenizers) or while what is there may be the
    beginning of a stop text. The pieces joined are exactly :attr:`text`.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        self._done = 0  # tokens whose text is settled
        self._context = 0  # from where they are decoded again, so that joins between tokens come out right
        self._text = ""
        self._sent = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """The text so far, cut before a stop text."""
        return self._text

    def push(self, token: int) -> str:
        """One more token; returns the text that can be shown now."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._done])
        after = self._decode(self._ids[self._context :])
        if len(after) > len(before) and not after.endswith("\ufffd"):
            self._context, self._done = self._done, len(self._ids)
            self._append(after[len(before) :])
        return self._take(final=False)

    def finish(self) -> str:
        """The answer has ended: the rest of the text."""
        if not self.stopped and self._done < len(self._ids):
            before = self._decode(self._ids[self._context : self._done])
            after = self._decode(self._ids[self._context :])
            self._append(after[len(before) :])
            self._done = len(self._ids)
        return self._take(final=True)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _append(self, piece: str) -> None:
        if self.stopped:
            return
        longest = max((len(s) for s in self._stop), default=0)
        search_from = max(0, len(self._text) - longest + 1)
        self._text += piece
        found = [at for s in self._stop if (at := self._text.find(s, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True

    def _take(self, *, final: bool) -> str:
        end = len(self._text)
        if not final and not self.stopped:
            for s in self._stop:
                for size in range(min(len(s) - 1, end), 0, -1):
                    if self._text.endswith(s[:size]):
                        end = min(end, len(self._text) - size)
                        break
        piece = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece
