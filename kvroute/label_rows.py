"""Labelled questions: what ``kvroute label`` writes and training, calibration and evaluation read.

A file is JSON Lines, one :class:`LabelRow` a line, with a header ``<file>.meta.json`` (:class:`LabelMeta`) beside it
that says which model, thinking mode, limits and versions it comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.files import read_json, write_json
from kvroute.rows import parse_jsonl
from kvroute.thinking import Mode, ThinkingMode

Part = Literal["train", "validation", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "calibration", "test")
_KIND = "kvroute.labels"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Checkpoint(_Row):
    """A thought that was closed early: what the answer would have been."""

    at: int
    """Tokens of the slow answer that were kept, before the closing phrase."""
    answer: str | None
    """As the checker read it; None where it could not be read."""
    correct: bool
    tokens: int
    """Tokens that such a run writes altogether: kept ones, closing phrase, answer."""


class Attempt(_Row):
    """One answer to a question in one mode."""

    mode: Mode
    text: str
    """All that was written behind the mode's tokens, the thought included."""
    token_ids: tuple[int, ...]
    """Its tokens, the end token included."""
    thought_tokens: int
    """Of these, the thought's, its closing mark included; 0 in fast mode."""
    answer: str | None
    """As the checker read it; None where it could not be read."""
    correct: bool
    readable: bool
    finish_reason: str
    seed: int | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    """Of a slow answer, in the order of ``at``."""

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return len(self.token_ids)


class LabelRow(_Row):
    """A question, what the model answered in both modes, and how difficult that makes it."""

    id: str
    question: str
    answer: str
    answer_type: str
    part: Part
    """By a hash of the skeleton, so that near-duplicates share a part and files may grow."""
    skeleton: str
    """Digest of the question with numbers and names masked."""
    prompt_ids: tuple[int, ...] = ()
    """Tokens of the prompt that both modes share."""
    fast: tuple[Attempt, ...] = ()
    slow: tuple[Attempt, ...] = ()
    """As many as samples were asked for."""
    label: float | None = None
    """0 fast is right and short, 25 fast is right but longer, 75 only slow is right, 100 neither (docs/concepts.md);
    with several samples the mean over them; None where the row failed."""
    error: str | None = None
    """Why the row has no label."""
    extra: dict[str, Any] = {}
    """Other fields of the question's row (kind, subject, level ...)."""

    @property
    def fast_right(self) -> float:
        """Share of the fast answers that are right."""
        return _mean([a.correct for a in self.fast])

    @property
    def slow_right(self) -> float:
        """Share of the slow answers that are right."""
        return _mean([a.correct for a in self.slow])

    @property
    def fast_tokens(self) -> float:
        """Tokens of a fast answer, on the mean."""
        return _mean([a.tokens for a in self.fast])

    @property
    def slow_tokens(self) -> float:
        """Tokens of a slow answer, on the mean."""
        return _mean([a.tokens for a in self.slow])


class LabelMeta(_Row):
    """Where a file of labels comes from."""

    model: str
    fingerprint: str
    thinking: ThinkingMode
    prompt: str = "{question}"
    """The user's message; ``{question}`` stands for the question."""
    short: int = 128
    """A right fast answer of fewer tokens has label 0, a longer one 25."""
    max_tokens: dict[str, int]
    """By mode, the most tokens of an answer."""
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    checkpoints: int | None = None
    """Every how many tokens a thought was closed."""
    shares: dict[str, float]
    """By part, its share of the skeletons."""
    questions_digest: str
    """Of the questions' file."""
    versions: dict[str, str]
    """Of kvroute, torch, transformers, Python."""


def meta_path(path: str | Path) -> Path:
    """The header that stands beside a file of labels."""
    path = Path(path)
    return path.with_name(f"{path.name}.meta.json")


def write_meta(path: str | Path, meta: LabelMeta) -> None:
    """Write the header of a file of labels."""
    write_json(meta_path(path), _KIND, meta.model_dump(mode="json"))


def read_labels(path: str | Path) -> tuple[list[LabelRow], LabelMeta]:
    """The rows of a file of labels, failed ones included, and its header.

    Raises:
        FileFormatError: the header is missing, torn or newer, or a line is no such row, naming it.
    """
    body = read_json(meta_path(path), _KIND)
    try:
        meta = LabelMeta.model_validate(body)
    except ValidationError as error:
        raise FileFormatError(f"{meta_path(path)} is no header of labels: {error}") from error
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} can't be read: {error}.") from error
    rows = []
    for number, row in parse_jsonl(text, path):
        try:
            rows.append(LabelRow.model_validate(row))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise FileFormatError(
                f"{path}, line {number}: not a labelled question ({where}: {first['msg']})."
            ) from error
    return rows, meta


def usable(rows: Sequence[LabelRow], *parts: Part) -> list[LabelRow]:
    """The rows of some parts that have a label."""
    return [r for r in rows if r.label is not None and (not parts or r.part in parts)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
