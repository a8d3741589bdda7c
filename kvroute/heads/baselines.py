"""The core's own scores as confidences, beside a trained one: each fitted and judged on the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kvroute.answer_scores import read_scores, score_table
from kvroute.calibration_metrics import expected_calibration_error
from kvroute.confidence_maps import Bools, Floats, auroc, fit_map
from kvroute.generation import TokenIds
from kvroute.heads.examples import Examples
from kvroute.label_rows import LabelMeta, LabelRow
from kvroute.labelled_answers import LabelledAnswer
from kvroute.scores import COMBINATIONS, SCORES

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine


def confidence_baselines(
    engine: TransformersEngine,
    answers: Examples,
    rows: Mapping[str, LabelRow],
    meta: LabelMeta,
    *,
    progress: bool | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of every score on the test answers, by a logistic map fitted on the answers of the other parts.

    Args:
        engine: the model.
        answers: of training, validation and test rows.
        rows: by id.
        meta: their header, for the question that P(True) is asked about.
        progress: whether to show bars; by default on a terminal.

    Returns:
        by name: ``auroc``, ``brier``, ``calibration_error`` and ``n``, the test answers that have the score. Names of
        scores, and families put together by the logistic map. Empty without test rows.
    """
    test = np.array([e.part == "test" for e in answers.items], dtype=bool)
    truth = answers.y >= 0.5
    if not test.any() or len(set(truth[test])) < 2 or len(set(truth[~test])) < 2:
        return {}
    scores = read_scores(engine, _labelled(engine, answers, rows, meta), progress=progress)
    table = score_table(scores)
    names = {n: (n,) for n in SCORES} | COMBINATIONS
    found = {}
    for name, parts in names.items():
        x = np.stack([table[p] for p in parts if not np.isnan(table[p]).all()] or [np.full(len(test), np.nan)], axis=1)
        judged = _judge(x, truth, test)
        if judged is not None:
            found[name] = judged
    return found


def _judge(x: Floats, truth: Bools, test: Bools) -> dict[str, float] | None:
    whole = np.isfinite(x).all(axis=1)
    fit, out = whole & ~test, whole & test
    if len(set(truth[fit])) < 2 or len(set(truth[out])) < 2:
        return None
    p = fit_map(x[fit], truth[fit], "logistic")(x[out])
    return {
        "auroc": auroc(p, truth[out]),
        "brier": float(np.mean((p - truth[out]) ** 2)),
        "calibration_error": expected_calibration_error(p, truth[out]),
        "n": float(out.sum()),
    }


def _labelled(
    engine: TransformersEngine, answers: Examples, rows: Mapping[str, LabelRow], meta: LabelMeta
) -> list[LabelledAnswer]:
    found = []
    for item in answers.items:
        ids = answers.texts[item.text]
        text = str(engine.tokenizer.decode(list(ids[item.start :]), skip_special_tokens=True))
        asked = meta.prompt.replace("{question}", rows[item.id].question)
        prompt = TokenIds(tuple(ids[: item.start]))
        found.append(LabelledAnswer(prompt, tuple(ids[item.start :]), text, asked, item.right >= 0.5, item.group))
    return found
