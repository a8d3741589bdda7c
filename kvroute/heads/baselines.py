"""The core's own scores as confidences, beside a trained one: each fitted and judged on the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kvroute.calibration_metrics import expected_calibration_error
from kvroute.confidence_maps import Bools, Floats, auroc, fit_map
from kvroute.heads.examples import Examples
from kvroute.label_rows import LabelMeta, LabelRow
from kvroute.p_true import probability_of_first, true_question
from kvroute.reading_scores import reading_scores
from kvroute.scores import SCORES, Score, family

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine

_TOGETHER = {"logits combined": family("logits"), "kv-coe combined": family("kv-coe"), "all combined": tuple(SCORES)}


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
    scores = _scores(engine, answers, rows, meta, progress)
    table = {n: np.array([_value(s.get(n)) for s in scores]) for n in SCORES}
    names = {n: (n,) for n in SCORES} | _TOGETHER
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


def _scores(
    engine: TransformersEngine, answers: Examples, rows: Mapping[str, LabelRow], meta: LabelMeta, progress: bool | None
) -> list[dict[str, Score]]:
    ids = [answers.texts[e.text] for e in answers.items]
    start = [e.start for e in answers.items]
    found: list[dict[str, Score]] = [{"length": Score(float(len(i) - s))} for i, s in zip(ids, start, strict=True)]
    for batch, reading in engine.read(ids, start, want=("kv", "logits", "hidden"), progress=progress):
        for place, scored in zip(batch, reading_scores(reading, [(start[i], len(ids[i])) for i in batch]), strict=True):
            found[place] |= scored
    asked = {}
    for place, item in enumerate(answers.items):
        text = engine.tokenizer.decode(list(ids[place][item.start :]), skip_special_tokens=True)
        prompt = meta.prompt.replace("{question}", rows[item.id].question)
        question = true_question(engine, prompt, text)
        if not isinstance(question, str) and len(question.token_ids) <= engine.info.context:
            asked[place] = question
    if asked:
        logprobs = engine.choice_logprobs(
            [q.token_ids for q in asked.values()], [q.choices for q in asked.values()], progress=progress
        )
        for place, (true, false) in zip(asked, logprobs.tolist(), strict=True):
            found[place]["p_true"] = probability_of_first(true, false)
    return found


def _value(score: Score | None) -> float:
    return float("nan") if score is None or score.value is None else score.value
