"""Questions with checkable answers, from rows of JSON Lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvroute.errors import InvalidInputError
from kvroute.rows import text_field


@dataclass(frozen=True, slots=True)
class Question:
    """A question with a checkable answer.

    Attributes:
        id: names it; different questions have different ones.
        question, answer, answer_type: as in the row; the type is a name in :data:`kvroute.checkers.CHECKERS`.
        extra: the row's other fields.
    """

    id: str
    question: str
    answer: str
    answer_type: str
    extra: dict[str, Any] = field(default_factory=dict)


def read_questions(rows: Sequence[tuple[int, Mapping[str, Any]]], source: object) -> list[Question]:
    """Questions from rows with ``question``, ``answer``, ``answer_type`` and, if they have one, ``id``.

    Args:
        rows: each with its line number, from :func:`kvroute.rows.parse_jsonl`.
        source: what to call their file.

    Raises:
        InvalidInputError: a field is missing or no text, or two rows have the same id, naming the line.
    """
    questions, lines = [], dict[str, int]()
    for number, row in rows:
        name = row.get("id", f"line-{number}")
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InvalidInputError(f"{source}, line {number}: id is {type(name).__name__}, not a text.")
        name = str(name)
        if name in lines:
            raise InvalidInputError(f"{source}, lines {lines[name]} and {number} have the same id, {name!r}.")
        lines[name] = number
        question, answer, kind = (text_field(row, f, source, number) for f in ("question", "answer", "answer_type"))
        extra = {k: v for k, v in row.items() if k not in ("id", "question", "answer", "answer_type")}
        questions.append(Question(name, question, answer, kind, extra))
    return questions
