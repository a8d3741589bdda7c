"""Every score of answers that are known to be right or wrong, read once and kept.

What one pass over an answer gives (keys and values, logits, hidden states, a trained confidence) is read in one pass;
P(True) asks a question of its own. With a folder everything is kept there in chunks, so a run that was killed goes on
and a second one runs no model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.confidence_maps import Floats
from kvroute.errors import EmptyTextError, FileFormatError, TextTooLongError, UnsupportedModelError
from kvroute.files import read_tensors, write_tensors
from kvroute.p_true import p_true_scores
from kvroute.progress import progress_bar
from kvroute.scores import SCORES, Score, family
from kvroute.self_evaluation import CONFIDENCE, SelfEvaluator

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.heads.head import DifficultyHead
    from kvroute.labelled_answers import LabelledAnswer

_KIND = "kvroute.answer-scores"
_CHUNK = 256
_PASS = (*family("kv-coe"), *family("logits"), *family("length"), *family("hidden-coe"))
"""What one pass gives."""

Row = dict[str, Score]


def read_scores(
    engine: Engine,
    answers: Sequence[LabelledAnswer],
    *,
    head: DifficultyHead | None = None,
    folder: Path | None = None,
    progress: bool | None = None,
) -> list[Row]:
    """All scores of answers, and the head's confidence as ``confidence`` where there is a head.

    Args:
        engine: the model.
        answers: the answers.
        head: a trained confidence.
        folder: where scores are kept; those that lie there already are not computed again. They are bound to the model,
            its dtype, the answers and the head.
        progress: whether to show a bar; by default on a terminal.

    Returns:
        scores by name, in the order of the answers; one that an answer does not have is None with a reason.

    Raises:
        EmptyTextError: an answer is empty, naming its place. TextTooLongError: prompt and answer don't fit the context.
        InvalidInputError, ModelMismatchError: the head has another target, or another model.
    """
    store = _Store(engine, folder)
    reader = _Reader(engine, head)
    found: list[Row] = []
    with progress_bar("Reading answers", len(answers), show=progress) as advance:
        for start in range(0, len(answers), _CHUNK):
            chunk = answers[start : start + _CHUNK]
            try:
                found.extend(_read_chunk(store, reader, chunk))
            except EmptyTextError as error:  # a place within the chunk is of no use to the caller
                raise EmptyTextError(start + error.index) from error
            except TextTooLongError as error:
                raise TextTooLongError(start + error.index, error.length, error.limit, hint=error.hint) from error
            advance(len(chunk))
    return found


def _read_chunk(store: _Store, reader: _Reader, chunk: Sequence[LabelledAnswer]) -> list[Row]:
    plain = {"scores": _PASS, "p-true": family("p-true")}
    kept = {group: store.load(group, names, chunk) for group, names in plain.items()}
    own = None
    if reader.head is not None:
        group = f"confidence-{reader.head.digest}"
        own = store.load(group, (CONFIDENCE,), chunk)
        if kept["scores"] is None:  # both from one pass
            kept["scores"], own = reader.both(chunk)
        elif own is None:
            own = reader.confidence(chunk)
        store.save(group, (CONFIDENCE,), chunk, own)
    elif kept["scores"] is None:
        kept["scores"] = reader.both(chunk)[0]
    if kept["p-true"] is None:
        kept["p-true"] = reader.p_true(chunk)
    for group, names in plain.items():
        store.save(group, names, chunk, kept[group] or [])
    rows: list[Row] = [{} for _ in chunk]
    for part in (*kept.values(), own):
        for row, scores in zip(rows, part or rows, strict=True):
            row |= scores
    return [{name: row[name] for name in (*SCORES, CONFIDENCE) if name in row} for row in rows]


# ---------------------------------------------------------------------- reading


@dataclass
class _Reader:
    """Computes what is not kept."""

    engine: Engine
    head: DifficultyHead | None

    def both(self, chunk: Sequence[LabelledAnswer]) -> tuple[list[Row], list[Row]]:
        """The scores of one pass, and the head's confidence out of the same pass."""
        try:
            found = self._evaluate(chunk, _PASS)
        except UnsupportedModelError:  # hidden states or the LM head can't be had: the rest can
            found = self._evaluate(chunk, (*family("kv-coe"), *family("length")))
        scores = [{n: row.get(n, _MISSING) for n in _PASS} for row, _ in found]
        return scores, [own for _, own in found]

    def confidence(self, chunk: Sequence[LabelledAnswer]) -> list[Row]:
        """The head's confidence alone: no deeper than the head reads."""
        return [own for _, own in self._evaluate(chunk, family("length"))]

    def p_true(self, chunk: Sequence[LabelledAnswer]) -> list[Row]:
        """P(True)."""
        asked = [(a.question, a.text) for a in chunk]
        return [{"p_true": score} for score, _ in p_true_scores(self.engine, asked, progress=False)]

    def _evaluate(self, chunk: Sequence[LabelledAnswer], names: Sequence[str]) -> list[tuple[Row, Row]]:
        evaluator = SelfEvaluator(self.engine, scores=names, head=self.head)
        found = evaluator.score_many(
            [(a.prompt, a.answer) for a in chunk], finish_reason=[a.finish_reason for a in chunk], progress=False
        )
        return [(e.scores, {CONFIDENCE: _confidence(e.confidence, e.confidence_reason)}) for e in found]


_MISSING = Score(None, "the model gives no hidden states or logits of an answer that exists")


def _confidence(value: float | None, reason: str | None) -> Score:
    return Score(value, None if value is not None else reason or "there is none")


# ---------------------------------------------------------------------- keeping


@dataclass
class _Store:
    """Scores in a folder, one file a group and chunk; without a folder nothing is kept."""

    engine: Engine
    folder: Path | None
    _bound: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._bound = [self.engine.info.fingerprint, self.engine.info.dtype]

    def load(self, group: str, names: Sequence[str], chunk: Sequence[LabelledAnswer]) -> list[Row] | None:
        """What was kept of these answers, or None."""
        path = self._path(group, names, chunk)
        if path is None or not path.is_file():
            return None
        try:
            tensors, meta = read_tensors(path, _KIND)
            values, reasons = tensors["values"], {(r, n): why for r, n, why in meta["reasons"]}
            return [
                {
                    name: Score(float(v)) if math.isfinite(v) else Score(None, reasons[r, name])
                    for name, v in zip(names, row, strict=True)
                }
                for r, row in enumerate(values)
            ]
        except (FileFormatError, KeyError, ValueError):
            path.unlink(missing_ok=True)  # torn: made anew
            return None

    def save(self, group: str, names: Sequence[str], chunk: Sequence[LabelledAnswer], rows: Sequence[Row]) -> None:
        """Keep scores, if they are not kept yet."""
        path = self._path(group, names, chunk)
        if path is None or path.is_file():
            return
        values = np.array([[_value(row[n]) for n in names] for row in rows], dtype=np.float64)
        reasons = [[r, n, row[n].reason] for r, row in enumerate(rows) for n in names if row[n].value is None]
        write_tensors(path, _KIND, {"values": values}, {"names": list(names), "reasons": reasons})

    def _path(self, group: str, names: Sequence[str], chunk: Sequence[LabelledAnswer]) -> Path | None:
        if self.folder is None:
            return None
        facts = [self._bound, group, list(names), [_facts(a) for a in chunk]]
        digest = hashlib.sha256(json.dumps(facts, default=_jsonable).encode()).hexdigest()[:16]
        return self.folder / f"{group}-{digest}.safetensors"


def _facts(answer: LabelledAnswer) -> list[Any]:
    return [answer.prompt, answer.answer, answer.text, answer.question, answer.finish_reason]


def _jsonable(value: Any) -> Any:
    """Token ids and messages, for a digest."""
    return list(value.ids) if hasattr(value, "ids") else dict(value)


def _value(score: Score) -> float:
    return math.nan if score.value is None else score.value


def score_table(rows: Sequence[Row]) -> dict[str, Floats]:
    """By name the values ``[n]`` float64, NaN where an answer has none."""
    every = dict.fromkeys(name for row in rows for name in row)
    return {name: np.array([_value(row[name]) if name in row else math.nan for row in rows]) for name in every}
