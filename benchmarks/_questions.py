"""The questions that scripts ask: in which file of the data folder each public set lies, and sums made up here."""

from __future__ import annotations

import random
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
SUMS = "sums"
"""Of two numbers below 30, made up: what a very small model can do in part."""


def question_set(data: Path, name: str, count: int | None = None) -> list[Question]:
    """The rows of a set in their own order, or the first ``count``."""
    if name == SUMS:
        rng = random.Random("sums")
        pairs = dict.fromkeys((rng.randint(2, 29), rng.randint(2, 29)) for _ in range(1000))
        return [Question(f"{a}+{b}", f"What is {a} + {b}?", str(a + b), "number") for a, b in pairs][:count]
    path = data / "qa" / f"{FILES[name]}.jsonl"
    return read_questions(parse_jsonl(path.read_text(encoding="utf-8"), path)[:count], path)
