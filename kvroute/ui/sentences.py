"""Sentences of a text that grows, piece by piece."""

from __future__ import annotations

import re
from typing import Final

_ENDED: Final = re.compile(r"""[.!?…]["'”’)\]]*$""")
_ENDED_CLOSED: Final = re.compile(r"""[。！？]["'”’)\]]*$""")  # scripts that put no space behind
STEP: Final = 24
"""Characters behind which a semicolon ends a sentence too: thoughts are often steps between semicolons."""


class Sentences:
    """Numbers the sentences of one text. A piece belongs to one sentence whole."""

    def __init__(self) -> None:
        self._number = 0
        self._text = ""

    @property
    def number(self) -> int:
        """Of the sentence that is being written, from 0."""
        return self._number

    def push(self, piece: str) -> bool:
        """One more piece, which may be empty; returns whether it begins a new sentence: the one before is whole."""
        begins = bool(self._text.strip()) and self._ends_before(piece)
        if begins:
            self.close()
        self._text += piece
        return begins

    def close(self) -> bool:
        """Something that is no part of the sentence follows; returns whether there was one."""
        whole = bool(self._text.strip())
        self._number += whole
        self._text = ""
        return whole

    def _ends_before(self, piece: str) -> bool:
        text = self._text
        if not piece or not piece.strip():
            return False
        if text.endswith("\n") or _ENDED_CLOSED.search(text):
            return True
        if text[-1:].isspace() and _ENDED.search(text.rstrip()):
            return True
        if piece[0].isspace() and _ENDED.search(text):
            return True
        return len(text) >= STEP and text.rstrip().endswith(";")
