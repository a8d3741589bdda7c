"""Answers to public questions, written once by a real model, checked, and kept as a file of labels."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _questions import question_set
from kvroute import TransformersEngine
from kvroute.checkers import check
from kvroute.generation import Generation, TokenIds
from kvroute.label_rows import Attempt, LabelMeta, LabelRow, read_labels, write_meta
from kvroute.labelling import Labeller
from kvroute.questions import Question
from kvroute.rows import PartialRun
from kvroute.skeletons import skeleton_digest
from kvroute.thinking import ThinkingMode

PLAIN = ThinkingMode(name="none", fast="", slow="", leave="", enter="")
"""One way of answering: the prompt says how."""
SUM = "{question}\nAnswer with one short equation that ends in the result, nothing else."
CHOICE = "{question}\nAnswer with the letter and the text of the right choice, nothing else."
STEPS = "{question}\nThink step by step in one or two short sentences, then end with: The answer is <number>."
_CHUNK = 80


@dataclass(frozen=True)
class Asked:
    """How a set of questions is asked.

    Attributes:
        prompt: the user's message.
        max_tokens: of an answer.
        one_by_one: whether questions that differ in their numbers alone may lie in different folds.
    """

    prompt: str
    max_tokens: int = 32
    one_by_one: bool = False


SETS: dict[str, Asked] = {
    "svamp": Asked(SUM),
    "multiarith": Asked(STEPS, 96),
    "sums": Asked(SUM, 16, one_by_one=True),
    "arc_easy": Asked(CHOICE, 24),
    "commonsenseqa": Asked(CHOICE, 24),
}


def answered(
    engine: TransformersEngine, name: str, data: Path, folder: Path, *, count: int
) -> tuple[list[LabelRow], LabelMeta]:
    """The first ``count`` questions of a set with the model's greedy answers; taken from ``folder`` where they are."""
    asked = SETS[name]
    questions = question_set(data, name, count)
    labeller = Labeller(
        engine, thinking=PLAIN, prompt=asked.prompt, max_tokens={"fast": asked.max_tokens, "slow": asked.max_tokens}
    )
    meta = labeller.meta(questions)
    digest = hashlib.sha256(f"{meta.model_dump_json()}{engine.info.dtype}".encode()).hexdigest()[:12]
    path = folder / f"{name}-{digest}.jsonl"
    if not path.is_file():
        with PartialRun(path, {"meta": meta.model_dump(mode="json")}, len(questions), chunk=_CHUNK, force=True) as run:
            for start, stop in run.missing:
                rows = _answer(engine, questions[start:stop], asked)
                run.write(start, "".join(r.model_dump_json() + "\n" for r in rows).encode())
                print(f"{name}: {stop} of {len(questions)} answers", file=sys.stderr, flush=True)
            write_meta(path, meta)
            run.finish()
    return read_labels(path)


def _answer(engine: TransformersEngine, questions: Sequence[Question], asked: Asked) -> list[LabelRow]:
    prompts = [
        TokenIds(tuple(engine.tokenize([{"role": "user", "content": asked.prompt.replace("{question}", q.question)}])))
        for q in questions
    ]
    found = engine.generate(prompts, max_tokens=asked.max_tokens, progress=False)
    rows = [_row(q, p, g) for q, p, g in zip(questions, prompts, found, strict=True)]
    if asked.one_by_one:
        rows = [r.model_copy(update={"skeleton": hashlib.sha256(r.id.encode()).hexdigest()}) for r in rows]
    return rows


def _row(question: Question, prompt: TokenIds, found: Generation) -> LabelRow:
    checked = check(found.text, question.answer, question.answer_type)
    attempt = Attempt(
        mode="fast", text=found.text, token_ids=tuple(found.token_ids), thought_tokens=0, answer=checked.answer,
        correct=checked.correct, readable=checked.readable, finish_reason=found.finish_reason,
    )  # fmt: skip
    return LabelRow(
        id=question.id, question=question.question, answer=question.answer, answer_type=question.answer_type,
        part="train", skeleton=skeleton_digest(question.question), prompt_ids=prompt.ids, fast=(attempt,),
        label=0.0 if checked.correct else 100.0,
    )  # fmt: skip
