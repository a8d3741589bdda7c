"""Files of labels, written chunk by chunk: a run may be killed at any moment and goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvroute.label_rows import LabelRow, write_meta
from kvroute.progress import progress_bar
from kvroute.rows import PartialRun

if TYPE_CHECKING:
    from kvroute.labelling import Labeller
    from kvroute.questions import Question


def label_lines(rows: Sequence[LabelRow]) -> bytes:
    """Rows as JSON Lines, in ASCII, so that no character within a text looks like the end of a line."""
    return "".join(json.dumps(r.model_dump(mode="json"), allow_nan=False) + "\n" for r in rows).encode()


def write_labels(
    labeller: Labeller,
    questions: Sequence[Question],
    out: Path,
    *,
    chunk: int,
    identity: Mapping[str, Any] | None = None,
    restart: bool = False,
    force: bool = False,
    progress: bool | None = None,
) -> int:
    """Label questions into a file, its header beside it.

    Args:
        labeller: asks and checks.
        questions: what to ask.
        out: the file.
        chunk: questions that are answered together, of which a killed run loses one lot.
        identity: what the labels depend on beside the header and the dtype; a run with another one is refused.
        restart: drop what an earlier run left.
        force: a file that is there already may be replaced.
        progress: whether to show a bar; by default on a terminal.

    Returns:
        questions that an earlier run had labelled already.

    Raises:
        InvalidInputError: as :class:`~kvroute.rows.PartialRun`.
    """
    meta = labeller.meta(questions)
    known = {
        "command": "label",
        "meta": meta.model_dump(mode="json"),
        "dtype": labeller.engine.info.dtype,
        **(identity or {}),
    }
    with PartialRun(out, known, len(questions), chunk=chunk, restart=restart, force=force) as run:
        missing = run.missing
        resumed = run.rows - sum(stop - start for start, stop in missing)
        with progress_bar("Labelling", run.rows, show=progress) as advance:
            advance(resumed)
            for start, stop in missing:
                run.write(start, label_lines(labeller.label(questions[start:stop])))
                advance(stop - start)
        write_meta(out, meta)  # first, so that labels never stand without their header
        run.finish()
    return resumed
