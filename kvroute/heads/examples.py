"""What a head learns from: spans of tokens whose keys and values are pooled, and what each shall give.

- prompts: the part that both modes share, labelled by its question; the bare question beside it, for training alone.
- windows: everything held at a checkpoint of a slow answer, and after every n-th token of a fast one.
- answers: an answer's tokens but the last, which has no keys and values while it is written either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvroute.errors import ChatTemplateError, InvalidInputError
from kvroute.heads.models import Floats
from kvroute.label_rows import LabelMeta, LabelRow, Part

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.thinking import Layout

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

LEAST = 20
"""Rows of training and of validation that a head needs; windows likewise."""
EVERY = 16
"""Tokens of a fast answer between two windows, where the labels' header does not say (policies look as often)."""


@dataclass(frozen=True, slots=True)
class Example:
    """One span.

    Attributes:
        text: which of the texts it lies in.
        start, stop: its tokens.
        y: what the head shall give, in [0, 1]: the label over 100, or whether the answer is right.
        right: share of fast answers that are right; of a window, whether closing there gives a right answer.
        only_slow: whether slow is right and fast is not.
        part, group, id, question: of its row; the group is the skeleton.
        bare: whether it is the question without the chat template.
        mode: of the answer that it lies in, or an empty text.
    """

    text: int
    start: int
    stop: int
    y: float
    right: float
    only_slow: bool
    part: Part
    group: str
    id: str
    question: str
    bare: bool = False
    mode: str = ""


@dataclass(frozen=True)
class Examples:
    """Texts, and the spans in them.

    Attributes:
        texts: token ids of each.
        items: the spans.
    """

    texts: tuple[tuple[int, ...], ...]
    items: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def y(self) -> Floats:
        """``[n]`` targets in [0, 1]."""
        return np.array([e.y for e in self.items], dtype=np.float64)

    @property
    def right(self) -> Floats:
        """``[n]`` share right."""
        return np.array([e.right for e in self.items], dtype=np.float64)

    def where(self, *parts: Part, bare: bool | None = None) -> Indices:
        """Indices of the spans of some parts."""
        chosen = [i for i, e in enumerate(self.items) if e.part in parts and (bare is None or e.bare == bare)]
        return np.array(chosen, dtype=np.int64)

    def take(self, indices: Sequence[int] | Indices) -> Self:
        """Some of the spans, and the texts that they lie in."""
        items = [self.items[int(i)] for i in indices]
        used = {t: n for n, t in enumerate(dict.fromkeys(e.text for e in items))}
        moved = tuple(replace(e, text=used[e.text]) for e in items)
        return type(self)(tuple(self.texts[t] for t in used), moved)

    @property
    def digest(self) -> str:
        """16 hex digits over all tokens, spans and targets."""
        facts = [[list(t) for t in self.texts], [[e.text, e.start, e.stop, e.y, e.part] for e in self.items]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


# ------------------------------------------------------------------ from label rows


def prompt_examples(engine: Engine, rows: Sequence[LabelRow], *, bare: bool) -> Examples:
    """Prompts, and with ``bare`` the plain questions of training rows."""
    texts = [r.prompt_ids for r in rows]
    items = [_of_row(r, i, 0, len(r.prompt_ids)) for i, r in enumerate(rows)]
    if bare:
        training = [r for r in rows if r.part == "train"]
        for row, ids in zip(training, engine.tokenize_texts([r.question for r in training]), strict=True):
            if ids and len(ids) <= engine.info.context and tuple(ids) != row.prompt_ids:
                items.append(replace(_of_row(row, len(texts), 0, len(ids)), bare=True))
                texts.append(tuple(ids))
    return Examples(tuple(texts), tuple(items))


def window_examples(rows: Sequence[LabelRow], layout: Layout, *, every: int = EVERY) -> Examples:
    """Windows in mid-thought, from the checkpoints of slow answers, and in fast answers after every n-th token.

    A window holds everything up to there: the prompt, the mode's tokens and those written.

    Targets: a checkpoint that closes right 0; else 75 where the finished slow answer is right, else 100. In a fast
    answer the question's label (docs/concepts.md).
    """
    texts: list[tuple[int, ...]] = []
    items: list[Example] = []
    for row in rows:
        for attempt in (*row.slow, *row.fast):
            held = [*row.prompt_ids, *layout.suffix(attempt.mode)]
            stops: list[tuple[int, float, bool]] = []
            if attempt.mode == "slow":
                late = 0.75 if attempt.correct else 1.0
                points = [c for c in attempt.checkpoints if 0 < c.at <= attempt.tokens]
                stops = [(c.at, 0.0 if c.correct else late, c.correct) for c in points]
            else:
                stops = [(n, _label(row), attempt.correct) for n in range(every, attempt.tokens, every)]
            for at, y, right in stops:
                span = _of_row(row, len(texts), 0, len(held) + at)
                items.append(replace(span, y=y, right=float(right), only_slow=y == 0.75, mode=attempt.mode))
            if stops:
                last = max(at for at, _, _ in stops)
                texts.append((*held, *attempt.token_ids[:last]))
    return Examples(tuple(texts), tuple(items))


def answer_examples(rows: Sequence[LabelRow], layout: Layout) -> Examples:
    """Answers, fast and slow; those of a single token have no keys and values to pool and are left out."""
    texts: list[tuple[int, ...]] = []
    items: list[Example] = []
    for row in rows:
        for attempt in (*row.fast, *row.slow):
            if attempt.tokens < 2:
                continue
            start = len(row.prompt_ids) + len(layout.suffix(attempt.mode))
            span = _of_row(row, len(texts), start, start + attempt.tokens - 1)
            right = float(attempt.correct)
            items.append(replace(span, y=right, right=right, only_slow=False, mode=attempt.mode))
            texts.append((*row.prompt_ids, *layout.suffix(attempt.mode), *attempt.token_ids))
    return Examples(tuple(texts), tuple(items))


def mode_layout(engine: Engine, rows: Sequence[LabelRow], meta: LabelMeta) -> Layout:
    """The tokens that each mode puts behind a prompt of these rows; they do not depend on the question."""
    content = meta.prompt.replace("{question}", rows[0].question)
    try:
        return meta.thinking.layout(engine, [{"role": "user", "content": content}])
    except ChatTemplateError:
        return meta.thinking.layout(engine, content)


def check_rows(rows: Sequence[LabelRow]) -> None:
    """Refuse rows that no head can be trained on.

    Raises:
        InvalidInputError: too few, or prompts without tokens.
    """
    for part in ("train", "validation"):
        count = sum(r.part == part for r in rows)
        if count < LEAST:
            raise InvalidInputError(
                f"A head needs at least {LEAST} labelled rows of the part {part!r}, and there are {count}.",
                hint="Label more questions.",
            )
    empty = next((r.id for r in rows if not r.prompt_ids), None)
    if empty is not None:
        raise InvalidInputError(f"Row {empty!r} has no prompt_ids.", hint="Label its question anew.")


def _label(row: LabelRow) -> float:
    assert row.label is not None  # usable rows alone come here
    return row.label / 100


def _of_row(row: LabelRow, text: int, start: int, stop: int) -> Example:
    only_slow = row.slow_right >= 0.5 > row.fast_right
    return Example(
        text, start, stop, _label(row), row.fast_right, only_slow, row.part, row.skeleton, row.id, row.question
    )
