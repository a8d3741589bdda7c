"""A head and its baselines, judged together on rows that nothing was fitted to or chosen by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvroute.confidence_maps import Floats
from kvroute.errors import InvalidInputError, ModelLoadError, UnsupportedModelError
from kvroute.label_rows import LabelMeta, LabelRow
from kvroute.routing_baselines import (
    BASELINES,
    BaselineFeatures,
    EvaluationRows,
    FitHead,
    Judged,
    check_baselines,
    head_fitter,
    judge,
)
from kvroute.routing_curves import Modes, choose_threshold, hull_thresholds
from kvroute.routing_intervals import Resamples
from kvroute.routing_metrics import difficulty_figures, fast_probability
from kvroute.routing_report import RoutingReport

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.heads import DifficultyHead


def evaluate_head(
    head: DifficultyHead,
    rows: Sequence[LabelRow],
    meta: LabelMeta,
    engine: Engine,
    *,
    name: str = "head",
    baselines: Sequence[str] | None = None,
    fit_head: FitHead | None = None,
    test: str = "test",
    points: float = 1.0,
    seed: int = 0,
    resamples: int = 2000,
    folder: Path | None = None,
    progress: bool | None = None,
) -> RoutingReport:
    """Judge a difficulty head and its baselines.

    Baselines are trained on the train rows; thresholds and maps to probabilities come from the validation rows;
    figures from the part ``test``.

    Args:
        head: the head.
        rows: labelled rows of all parts; those without a label are passed over.
        meta: their header.
        engine: the model.
        name: what the head is called in the report.
        baselines: which; by default all, and those that can't run here are left out with a warning.
        fit_head: the head of the baselines that take one; by default of the same kind as ``head``.
        test: the part to judge on, ``test`` or ``calibration``.
        points: tokens are compared at the accuracy of always slow minus so many points.
        seed: of training and resampling.
        resamples: of the intervals.
        folder: where baselines' features are kept.
        progress: whether to show bars; by default on a terminal.

    Raises:
        InvalidInputError: a head of another target, or a part without rows.
        ModelMismatchError: head or rows belong to another model.
        ModelLoadError: a baseline that was asked for needs a package that is not installed.
    """
    if head.target != "difficulty":
        raise InvalidInputError(
            f"This head says whether an answer is {head.target}, not how difficult a question is.",
            hint="Its figures are in its card; evaluate a head that was trained with --target difficulty.",
        )
    head.require(engine.info)
    engine.info.require(meta.fingerprint, "The file of labels", meta.model)
    check_baselines(baselines or [])
    used = EvaluationRows.of(rows, test)
    drawn = Resamples(len(used.test), resamples, seed=seed)
    report = RoutingReport(
        Modes.of(used.test),
        drawn,
        points=points,
        about={
            "model": engine.info.name,
            "fingerprint": engine.info.fingerprint,
            "head": {
                "name": name,
                "kind": head.kind,
                "spec": head.spec.model_dump(mode="json"),
                "data": head.data_hash,
            },
            "questions": meta.questions_digest,
            "part": test,
            "trained_on": len(used.train),
            "chosen_on": len(used.validation),
            "without_label": sum(r.label is None for r in rows),
            "seed": seed,
            "left_out": {},
        },
    )
    prompts = [list(r.prompt_ids) for r in (*used.validation, *used.test)]
    difficulty = head.predict(engine.pool(prompts, [head.spec], progress=progress)[0])
    judged = Judged(difficulty[: len(used.validation)], difficulty[len(used.validation) :])
    _add(report, name, used, judged, head.probability(judged.test))
    features = BaselineFeatures(engine, meta.thinking, folder=folder, progress=progress)
    for baseline in BASELINES if baselines is None else baselines:
        try:
            found = judge(baseline, used, features, fit_head or head_fitter(head.kind), seed=seed)
        except (ModelLoadError, UnsupportedModelError) as error:
            if baselines is not None:
                raise
            warnings.warn(f"The baseline {baseline} is left out: {error}", RuntimeWarning, stacklevel=2)
            report.about["left_out"][baseline] = str(error)
            continue
        right = Modes.of(used.validation).fast.right
        _add(report, baseline, used, found, fast_probability(found.test, right, fitted_on=found.validation))
        report.compare(name, baseline)
    report.compare(name, "random")
    return report


def _add(report: RoutingReport, name: str, rows: EvaluationRows, judged: Judged, probability: Floats | None) -> None:
    """A difficulty's curve, its point at the threshold that validation rows choose, and how well it tells."""
    choice = Modes.of(rows.validation)
    hull = hull_thresholds(choice, judged.validation)
    report.add_sweep(name, report.modes.sweep(judged.test), chosen=report.modes.sweep(judged.test, hull))
    tau = choose_threshold(choice, judged.validation, report.points)
    report.add_point(name, report.modes.one_step(judged.test, tau))
    report.add_difficulty(name, difficulty_figures(rows.test, judged.test, probability, report.resamples))
