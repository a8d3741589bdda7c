"""Labelled questions as columns: what a page needs to draw accuracy over tokens for any threshold.

Only rows that the head was not trained on are given. Where the labels hold closed thoughts (``kvroute label
--checkpoints``) and the head reads windows, each row also says what closing its thought at each checkpoint gives; a
thought that opens in a fast answer can't be told from labels, and is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from kvroute.engines.base import Engine, decides_inside
from kvroute.errors import InvalidInputError
from kvroute.heads.examples import mode_layout, window_examples
from kvroute.heads.features import pool_spans
from kvroute.label_rows import LabelMeta, LabelRow, Part, read_labels, usable
from kvroute.routing_curves import Modes

if TYPE_CHECKING:
    from kvroute.heads.head import DifficultyHead

PARTS: Final[tuple[Part, ...]] = ("test", "calibration", "validation")
"""Parts that are shown, the first that has rows first. Train rows flatter the head that was trained on them."""
MOST: Final = 4000
"""Rows of a part; of more, the first ones are taken, and that is said."""


@dataclass(frozen=True)
class Labelled:
    """A file of labels and the head that reads difficulties.

    Attributes:
        name: of the file.
        rows: with a label, those of :data:`PARTS`.
        meta: the file's header.
        head: its difficulty.
        head_name: of its folder.
    """

    name: str
    rows: list[LabelRow]
    meta: LabelMeta
    head: DifficultyHead
    head_name: str

    @classmethod
    def open(cls, file: Path, head: DifficultyHead, head_name: str, engine: Engine) -> Self:
        """Read and check a file.

        Raises:
            InvalidInputError: a head of another target, or no row that the head was not trained on.
            FileFormatError: no file of labels.
            ModelMismatchError: labels or head of another model.
        """
        if head.target != "difficulty":
            raise InvalidInputError(
                f"{head_name} says whether an answer is {head.target}, not how difficult a question is.",
                hint="Give a head that was trained with --target difficulty.",
            )
        head.require(engine.info)
        rows, meta = read_labels(file)
        engine.info.require(meta.fingerprint, f"{file}", meta.model)
        shown = usable(rows, *PARTS)
        if not shown:
            raise InvalidInputError(
                f"{file} has no labelled row of the parts {', '.join(PARTS)}.",
                hint="A curve on the rows that the head was trained on would flatter it: label more questions.",
            )
        return cls(file.name, shown, meta, head, head_name)

    def columns(self, engine: Engine) -> dict[str, Any]:
        """JSON-able: by part, one number a row and column.

        ``difficulty`` in [0, 100]; ``fast_right``, ``slow_right`` in [0, 1]; ``fast_tokens``, ``slow_tokens``;
        ``closings`` a list a row of [difficulty at the checkpoint, whether closing there is right, tokens then], or
        None.
        """
        parts = {p: [r for r in self.rows if r.part == p] for p in PARTS}
        shown = {p: rows[:MOST] for p, rows in parts.items() if rows}
        return {
            "file": self.name,
            "head": self.head_name,
            "every": self.meta.checkpoints if self._closes(engine) else None,
            "parts": {p: self._part(engine, rows, len(parts[p])) for p, rows in shown.items()},
        }

    def _closes(self, engine: Engine) -> bool:
        """Whether it can be told what closing a thought gives."""
        return (
            self.head.windows is not None
            and not decides_inside(engine)  # its caches are not at hand
            and self.meta.checkpoints is not None
            and self.meta.samples == 1
        )

    def _part(self, engine: Engine, rows: Sequence[LabelRow], total: int) -> dict[str, Any]:
        modes = Modes.of(rows)
        prompts = [list(r.prompt_ids) for r in rows]
        difficulty = self.head.predict(engine.pool(prompts, [self.head.spec], progress=False)[0])
        return {
            "rows": len(rows),
            "of": total,
            "difficulty": _rounded(difficulty),
            "fast_right": _rounded(modes.fast.right),
            "fast_tokens": _rounded(modes.fast.tokens),
            "slow_right": _rounded(modes.slow.right),
            "slow_tokens": _rounded(modes.slow.tokens),
            "closings": self._closings(engine, rows) if self._closes(engine) else None,
        }

    def _closings(self, engine: Any, rows: Sequence[LabelRow]) -> list[list[list[float]]]:
        windows = self.head.windows
        assert windows is not None
        every = window_examples(rows, mode_layout(engine, rows, self.meta))
        slow = every.take([i for i, item in enumerate(every.items) if item.mode == "slow"])
        vectors = pool_spans(engine, slow, [windows.spec], progress=False)[0]
        read = iter(_rounded(windows.predict(vectors)) if len(slow) else [])
        return [
            [
                [next(read), float(point.correct), float(point.tokens)]
                for point in row.slow[0].checkpoints
                if 0 < point.at <= row.slow[0].tokens
            ]
            for row in rows
        ]


def _rounded(values: Any) -> list[float]:
    """Three places are more than a page shows, and a third of the bytes."""
    found: list[float] = np.round(np.asarray(values, dtype=np.float64), 3).tolist()
    return found
