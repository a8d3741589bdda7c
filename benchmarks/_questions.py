"""The public questions that scripts ask: in which file of the data folder each set lies."""

from __future__ import annotations

from pathlib import Path

from kvroute.questions import Question, read_questions
from kvroute.rows import parse_jsonl

FILES = {
    "multiarith": "multiarith",
    "svamp": "svamp",
    "gsm8k": "gsm8k_test",
    "math": "math500",
    "arc_easy": "arc_easy1000",
    "commonsenseqa": "commonsenseqa",
}
"""By name of the set, the file in ``qa`` without its ending."""


def question_set(data: Path, name: str, count: int | None = None) -> list[Question]:
    """The rows of a set in their own order, or the first ``count``."""
    path = data / "qa" / f"{FILES[name]}.jsonl"
    return read_questions(parse_jsonl(path.read_text(encoding="utf-8"), path)[:count], path)
