"""What scores of answers are worth on answers that are known to be right or wrong: ``kvroute evaluate scores``.

One pass reads the scores of every answer (:mod:`kvroute.answer_scores`), they are judged without a model
(:mod:`kvroute.score_judging`), and shown (:mod:`kvroute.score_report`). The measures are those of arXiv 2410.13640
(section 4) and the risk-coverage curve of arXiv 1705.08500.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvroute.answer_scores import read_scores, score_table
from kvroute.errors import InvalidInputError
from kvroute.score_judging import judge_set
from kvroute.score_report import ScoreReport

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.heads import DifficultyHead
    from kvroute.labelled_answers import AnswerSet


def evaluate_scores(
    engine: Engine,
    sets: Sequence[AnswerSet],
    *,
    head: DifficultyHead | None = None,
    folder: Path | None = None,
    folds: int = 5,
    seed: int = 0,
    resamples: int = 2000,
    progress: bool | None = None,
) -> ScoreReport:
    """Read every score of some answers and judge them.

    Args:
        engine: the model that wrote them.
        sets: the answers; see :func:`kvroute.labelled_answers.read_answer_sets`.
        head: a trained confidence, judged beside the scores. It must not have seen the judged answers.
        folder: where scores are kept, so that a second run computes none anew.
        folds: of cross-fitted maps.
        seed: of folds and resamples.
        resamples: of the intervals.
        progress: whether to show bars; by default on a terminal.

    Raises:
        InvalidInputError: too few right or wrong answers in a set, or a head that was trained on the judged answers.
        ModelMismatchError: the head belongs to another model.
    """
    if head is not None:
        for s in sets:
            if s.judged.all() and s.questions is not None and s.questions == head.details.get("questions"):
                raise InvalidInputError(
                    f"The head was trained on questions of {s.name}, so it can't be judged on all of them.",
                    hint="Judge the part 'test' or 'calibration'.",
                )
    judged = []
    for place, s in enumerate(sets):
        rows = read_scores(engine, s.answers, head=head, folder=folder, progress=progress)
        judged.append(
            judge_set(
                s.name, score_table(rows), s.truth, judged=s.judged, groups=[a.group for a in s.answers], folds=folds,
                resamples=resamples, seed=seed + place,
            )
        )  # fmt: skip
    info = engine.info
    spec = None if head is None else head.spec.model_dump(mode="json")
    about = {
        "model": info.name,
        "fingerprint": info.fingerprint,
        "dtype": info.dtype,
        "head": None if head is None else {"kind": head.kind, "spec": spec, "data": head.data_hash},
        "folds": folds,
        "seed": seed,
    }
    return ScoreReport(judged, about=about)
