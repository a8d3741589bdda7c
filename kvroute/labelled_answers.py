"""Answers that are known to be right or wrong: out of files that ``kvroute label`` wrote, or of plain JSON Lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.confidence_maps import Bools
from kvroute.errors import InvalidInputError
from kvroute.generation import FinishReason, Prompt, TokenIds
from kvroute.heads.examples import mode_layout
from kvroute.label_rows import LabelMeta, LabelRow, Part, meta_path, read_labels, usable
from kvroute.rows import messages_in, parse_jsonl, text_field
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.engines.base import Engine

_ROW = (
    'A row is {"question": ..., "answer": ..., "correct": true}; in the question\'s place may stand "prompt", a text '
    'that the answer continues, or "messages".'
)


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """One answer, and whether it is right.

    Attributes:
        prompt: what it continues.
        answer: its text, or its token ids as they stand.
        text: its text.
        question: what P(True) asks about.
        correct: whether it is right.
        group: something equal for answers to like questions, which share a fold.
        part: of the data, or None where nothing says it.
        finish_reason: of an answer that is given as a text.
        mode: it was written in, or an empty text.
    """

    prompt: Prompt
    answer: str | tuple[int, ...]
    text: str
    question: Prompt
    correct: bool
    group: str
    part: Part | None = None
    finish_reason: FinishReason = "stop"
    mode: str = ""


@dataclass(frozen=True)
class AnswerSet:
    """Answers that are judged together.

    Attributes:
        name: of the set, in the report.
        answers: all of them.
        judged: ``[n]`` which of them figures are taken from; where some are not, what is fitted is fitted on those.
        questions: digest of the questions' file, or None where nothing says it.
    """

    name: str
    answers: tuple[LabelledAnswer, ...]
    judged: Bools
    questions: str | None = None

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def truth(self) -> Bools:
        """``[n]`` which answers are right."""
        return np.array([a.correct for a in self.answers], dtype=bool)


def read_answer_sets(
    path: str | Path, engine: Engine, *, part: str = "auto", mode: str = "both", limit: int | None = None
) -> list[AnswerSet]:
    """The answers in a file; a set for each mode where it is a file of labels.

    Args:
        path: what ``kvroute label`` wrote (its header lies beside it), or JSON Lines with ``correct``, ``answer`` and
            one of ``question``, ``prompt`` and ``messages``; ``id`` and ``group`` where answers belong together.
        engine: the model that wrote them.
        part: which answers are judged: ``test``, ``calibration``, ``all``, or ``auto``: ``test`` of a file of labels,
            else all.
        mode: ``fast``, ``slow`` or ``both``; of files of labels.
        limit: rows at most.

    Raises:
        InvalidInputError: a row that can't be used, naming its line; no answer of the part.
        FileFormatError, ModelMismatchError: a damaged file of labels, or one of another model.
    """
    if part not in ("auto", "all", "test", "calibration"):
        raise InvalidInputError(f"The part is auto, test, calibration or all, not {part!r}.")
    if mode not in ("fast", "slow", "both"):
        raise InvalidInputError(f"The mode is fast, slow or both, not {mode!r}.")
    name = Path(path).stem
    if not meta_path(path).is_file():
        if part in ("test", "calibration"):
            raise InvalidInputError(
                f"{path} has no parts: no header of labels lies beside it.",
                hint="Judge all of it, with the part 'all'.",
            )
        answers = tuple(_plain_answers(path, engine)[:limit])
        if not answers:
            raise InvalidInputError(f"{path} holds no answer.")
        return [AnswerSet(name, answers, np.ones(len(answers), dtype=bool))]
    rows, meta = read_labels(path)
    engine.info.require(meta.fingerprint, f"{path}", meta.model)
    modes: Sequence[Mode] = ("fast", "slow") if mode == "both" else (mode,)  # type: ignore[assignment]
    sets = []
    for one in modes:
        found = label_answers(engine, usable(rows)[:limit], meta, one)
        if not found:
            continue
        judged = np.array([part == "all" or a.part == ("test" if part == "auto" else part) for a in found], dtype=bool)
        # Of the other held-out part nothing is known here, and a promise may rest on it: it is left alone.
        kept = np.array(
            [j or a.part in ("train", "validation") for a, j in zip(found, judged, strict=True)], dtype=bool
        )
        if not judged.any():
            raise InvalidInputError(f"{path} has no answer of the part {part!r}.", hint="Label more questions.")
        answers = tuple(a for a, k in zip(found, kept, strict=True) if k)
        sets.append(AnswerSet(f"{name} ({one})", answers, judged[kept], meta.questions_digest))
    if not sets:
        raise InvalidInputError(f"{path} holds no labelled answer.", hint="Look at the rows' errors.")
    return [replace(sets[0], name=name)] if len(sets) == 1 else sets


def label_answers(engine: Engine, rows: Sequence[LabelRow], meta: LabelMeta, mode: Mode) -> list[LabelledAnswer]:
    """The answers that labelled rows hold in one mode."""
    if not rows:
        return []
    suffix = mode_layout(engine, rows, meta).suffix(mode)
    return [
        LabelledAnswer(
            prompt=TokenIds((*row.prompt_ids, *suffix)),
            answer=attempt.token_ids,
            text=attempt.text,
            question=meta.prompt.replace("{question}", row.question),
            correct=attempt.correct,
            group=row.skeleton,
            part=row.part,
            mode=mode,
        )
        for row in rows
        for attempt in (row.fast if mode == "fast" else row.slow)
    ]


def _plain_answers(path: str | Path, engine: Engine) -> list[LabelledAnswer]:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} can't be read: {error}.") from error
    chat = bool(getattr(engine.tokenizer, "chat_template", None))
    found = []
    for number, row in parse_jsonl(text, path):
        where = f"{path}, line {number}"
        if not isinstance(row.get("correct"), bool):
            raise InvalidInputError(f"{where}: 'correct' is not true or false.", hint=_ROW)
        answer = text_field(row, "answer", path, number)
        if not answer:
            raise InvalidInputError(f"{where}: the answer is empty.")
        reason: Any = row.get("finish_reason") or "stop"
        if reason not in ("stop", "length", "cancelled"):
            raise InvalidInputError(f"{where}: finish_reason is stop, length or cancelled, not {reason!r}.")
        prompt, question = _asked(row, path, number, chat)
        group = str(row.get("group", row.get("id", question)))
        found.append(
            LabelledAnswer(prompt, answer, answer, question, row["correct"], group, finish_reason=reason)
        )  # fmt: skip
    return found


def _asked(row: Mapping[str, Any], path: str | Path, number: int, chat: bool) -> tuple[Prompt, Prompt]:
    """What the answer continues, and what P(True) asks about."""
    messages = messages_in(row, path, number)
    if messages is not None:
        return messages, messages
    if "prompt" in row:
        prompt = text_field(row, "prompt", path, number)
        return prompt, str(row["question"]) if isinstance(row.get("question"), str) else prompt
    if "question" not in row:
        raise InvalidInputError(f"{path}, line {number}: no question, prompt or messages.", hint=_ROW)
    question = text_field(row, "question", path, number)
    return ([{"role": "user", "content": question}] if chat else question), question
