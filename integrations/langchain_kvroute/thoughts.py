"""Thought and answer told apart in a text that comes piece by piece."""

from __future__ import annotations

from typing import Literal

Phase = Literal["thought", "answer"]


class ThoughtReader:
    """Takes a text in pieces and gives it back in pieces that belong to the thought or to the answer.

    Marks are left out, and so is the white space around either part. What is read does not depend on how the text
    was cut.

    Args:
        opening: begins a thought, such as ``<think>``.
        closing: ends it.
        thinking: whether the text begins inside a thought.
        hold: keep an answer back until its end, and drop it where a thought is opened in it: it was broken off.
    """

    def __init__(self, opening: str, closing: str, *, thinking: bool, hold: bool = False) -> None:
        self._marks: dict[Phase, str] = {"answer": opening, "thought": closing}
        self._hold = hold
        self._phase: Phase = "thought" if thinking else "answer"
        self._text = ""
        self._blank = ""
        self._begun = False
        self._seen: set[Phase] = set()
        self._held: list[tuple[Phase, str]] = []

    def push(self, text: str) -> list[tuple[Phase, str]]:
        """What can be told of the text so far, and was not told before."""
        self._text += text
        told: list[tuple[Phase, str]] = []
        while True:
            mark = self._marks[self._phase]
            at = self._text.find(mark) if mark else -1
            if at < 0:
                keep = begun_mark(self._text, mark)
                end = len(self._text) - keep
                self._tell(self._text[:end], told)
                self._text = self._text[end:]
                return told
            self._tell(self._text[:at], told)
            self._text = self._text[at + len(mark) :]
            self._turn()

    def finish(self) -> list[tuple[Phase, str]]:
        """The text has ended: its rest."""
        told: list[tuple[Phase, str]] = []
        self._tell(self._text, told)
        self._text = ""
        return [*self._held, *told] if self._hold else told

    def _turn(self) -> None:
        if self._phase == "answer" and self._hold:
            self._held.clear()
            self._seen.discard("answer")
        self._phase = "answer" if self._phase == "thought" else "thought"
        self._blank, self._begun = "", False

    def _tell(self, text: str, told: list[tuple[Phase, str]]) -> None:
        text = self._blank + text
        if not self._begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        if not shown:
            return
        if not self._begun:
            self._begun = True
            if self._phase in self._seen:
                shown = f"\n\n{shown}"
            self._seen.add(self._phase)
        (self._held if self._hold and self._phase == "answer" else told).append((self._phase, shown))


def begun_mark(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
