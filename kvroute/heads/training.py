"""Training of a head from labelled questions: search, the map to a probability, and figures on held-out rows."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute._version import __version__
from kvroute.calibration_metrics import cross_validate, expected_calibration_error
from kvroute.confidence_maps import Bools, Floats, IsotonicMap, LogisticMap, auroc, fit_map
from kvroute.errors import CalibrationError, InvalidInputError
from kvroute.heads.baselines import confidence_baselines
from kvroute.heads.examples import (
    EVERY,
    LEAST,
    Examples,
    answer_examples,
    check_rows,
    mode_layout,
    prompt_examples,
    window_examples,
)
from kvroute.heads.features import pool_spans
from kvroute.heads.head import DifficultyHead, Target
from kvroute.heads.neighbours import Neighbours
from kvroute.heads.search import Candidate, Found, Kind, Problem, SearchOptions, search
from kvroute.label_rows import LabelMeta, LabelRow, usable

if TYPE_CHECKING:
    from kvroute.engines.transformers_engine import TransformersEngine

_FOLDS = 5


@dataclass(frozen=True)
class TrainingReport:
    """What was tried and what came of it.

    Attributes:
        chosen: the candidate that was taken.
        tried: every candidate, in the order they were tried.
        validation: metrics of the chosen one on the spans that it was chosen on (of answers: out of fold).
        held_out: on test rows, computed once, after the choice; empty where there are none.
        baselines: for target ``correct``, by name the metrics of the core's scores on the same test answers.
        rows: spans by part, bare questions not counted.
        windows: of the head for mid-thought.
        seconds: of everything.
    """

    chosen: Candidate
    tried: list[Candidate]
    validation: dict[str, float]
    held_out: dict[str, float]
    rows: dict[str, int]
    seconds: float
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    windows: TrainingReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "chosen": self.chosen.to_dict(),
            "validation": self.validation,
            "held_out": self.held_out,
            "baselines": self.baselines,
            "rows": self.rows,
            "seconds": self.seconds,
            "tried": [c.to_dict() for c in self.tried],
            "windows": self.windows.to_dict() if self.windows is not None else None,
        }


def train_head(
    engine: TransformersEngine,
    rows: Sequence[LabelRow],
    meta: LabelMeta,
    *,
    target: Target = "difficulty",
    search: SearchOptions | None = None,
    kinds: Sequence[Kind] | None = None,
    seed: int = 0,
    windows: bool | None = None,
    every: int | None = None,
    progress: bool | None = None,
) -> tuple[DifficultyHead, TrainingReport]:
    """Train a head.

    Everything is chosen and fitted on rows of the parts ``train`` and ``validation``; the part ``calibration`` is never
    read, and ``test`` once, after the choice. For target ``correct`` the two first parts are cross-validated together,
    the answers to like questions (one skeleton) in one fold.

    Args:
        engine: the model that answered the questions.
        rows: labelled questions; those without a label are passed over.
        meta: their header.
        target: ``difficulty`` (vectors of prompts) or ``correct`` (vectors of answers).
        search: bounds of the search; see :class:`~kvroute.heads.search.SearchOptions`.
        kinds: kinds of heads to try, in place of the search's.
        seed: of everything random.
        windows: whether to train a head for mid-thought too; by default where the rows hold checkpoints
            enough.
        every: tokens of a fast answer between two windows; by default as many as the checkpoints are apart.
        progress: whether to show bars; by default on a terminal.

    Raises:
        ModelMismatchError: the rows come from another model.
        InvalidInputError: too few rows, or ``windows=True`` and rows without checkpoints.
    """
    began = time.perf_counter()
    engine.info.require(meta.fingerprint, "The file of labels", meta.model)
    if target not in ("difficulty", "correct"):
        raise InvalidInputError(f"The target is difficulty or correct, not {target!r}.")
    options = search or SearchOptions()
    if kinds is not None:
        options = SearchOptions(**{**dict(options), "kinds": tuple(kinds)})
    seen, test = usable(rows, "train", "validation"), usable(rows, "test")
    check_rows(seen)
    layout = mode_layout(engine, seen, meta)
    trainer = _Trainer(engine, meta, options, seed, progress)
    if target == "correct":
        head, report = trainer.train(target, answer_examples(seen, layout), answer_examples(test, layout))
        answers = answer_examples([*seen, *test], layout)
        fit = answers.where("train", "validation")
        if len(fit) > options.rows:  # a map of a score or two needs no more
            fit = np.sort(np.random.default_rng(seed).choice(fit, options.rows, replace=False))
        answers = answers.take([*fit, *answers.where("test")])
        baselines = confidence_baselines(engine, answers, {r.id: r for r in (*seen, *test)}, meta, progress=progress)
        return head, replace(report, baselines=baselines, seconds=time.perf_counter() - began)
    inner = None
    if windows is not False:
        every = every or meta.checkpoints or EVERY
        spans, held_out = window_examples(seen, layout, every=every), window_examples(test, layout, every=every)
        counts = [sum(e.mode == "slow" and e.part == p for e in spans.items) for p in ("train", "validation")]
        if min(counts) < LEAST and windows:
            raise InvalidInputError(
                f"A head for mid-thought needs at least {LEAST} checkpoints in training rows and as many in validation "
                f"rows, and there are {counts[0]} and {counts[1]}.",
                hint="Label with --checkpoints, or train without windows.",
            )
        if min(counts) >= LEAST:
            own = SearchOptions(**{**dict(options), "spec": options.window_spec or options.spec})
            inner = replace(trainer, options=own).train(target, spans, held_out, windows=True)
    prompts = prompt_examples(engine, seen, bare=options.bare is not False)
    head, report = trainer.train(target, prompts, prompt_examples(engine, test, bare=False))
    if inner is not None:
        head, report = replace(head, windows=inner[0]), replace(report, windows=inner[1])
    return head, replace(report, seconds=time.perf_counter() - began)


@dataclass(frozen=True)
class _Trainer:
    engine: TransformersEngine
    meta: LabelMeta
    options: SearchOptions
    seed: int
    progress: bool | None

    def train(
        self, target: Target, examples: Examples, test: Examples, *, windows: bool = False
    ) -> tuple[DifficultyHead, TrainingReport]:
        began = time.perf_counter()
        binary = target == "correct"
        problem = Problem(examples, self._splits(examples, binary), binary, 1 if binary else -1)
        found = search(self.engine, problem, self.options, seed=self.seed, progress=self.progress)
        held = found.problem.examples.take(found.held)
        scale = 1.0 if binary else 100.0
        curve = fit_probability(scale * found.predictions, held, rising=binary, seed=self.seed)
        head = DifficultyHead(
            spec=found.candidate.spec,
            target=target,
            predictor=found.model,
            map=curve,
            model=self.engine.info.name,
            fingerprint=self.engine.info.fingerprint,
            data_hash=examples.digest,
            neighbours=None if windows or binary else self._neighbours(found),
        )
        validation = _metrics(head, scale * found.predictions, held, windows=windows)
        held_out: dict[str, float] = {}
        if len(test):
            (vectors,) = pool_spans(self.engine, test, [head.spec], progress=self.progress)
            raw = head.predictor(vectors) * scale
            held_out = _metrics(head, raw, test, windows=windows)
        count = {p: len(examples.where(p, bare=False)) for p in ("train", "validation")} | {"test": len(test)}
        details = {
            "spans": count,
            "setting": dict(found.candidate.setting),
            "rounds": found.rounds,
            "bare questions": found.candidate.bare,
            "seed": self.seed,
            "thinking": self.meta.thinking.name,
            "questions": self.meta.questions_digest,
            "versions": _versions(),
        }
        report = TrainingReport(
            found.candidate, found.tried, validation, held_out, count, time.perf_counter() - began
        )  # fmt: skip
        return replace(head, metrics=held_out, details=details), report

    def _splits(self, examples: Examples, folds: bool) -> tuple[tuple[Any, Any], ...]:
        if not folds:
            return ((examples.where("train"), examples.where("validation")),)
        from sklearn.model_selection import StratifiedGroupKFold

        y = (examples.y >= 0.5).astype(int)
        groups = [e.group for e in examples.items]
        if min(np.bincount(y, minlength=2)) < _FOLDS or len(set(groups)) < _FOLDS:
            raise InvalidInputError(
                f"A confidence needs at least {_FOLDS} right and {_FOLDS} wrong answers, and there are "
                f"{int(y.sum())} right and {len(y) - int(y.sum())} wrong ones.",
                hint="Label more questions.",
            )
        kind = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=self.seed)
        return tuple(kind.split(np.zeros((len(y), 1)), y, groups))

    def _neighbours(self, found: Found) -> Neighbours:
        train = found.problem.examples.where("train", bare=False)
        items = [found.problem.examples.items[int(i)] for i in train]
        z = (found.x[train] - found.model.mean) * found.model.inverse
        labels = np.array([e.y * 100 for e in items])
        return Neighbours.fit(z, labels, [(e.id, e.question) for e in items], seed=self.seed)


# ------------------------------------------------------------------ probabilities


def fit_probability(values: Floats, held: Examples, *, rising: bool, seed: int = 0) -> LogisticMap | IsotonicMap:
    """A monotone map from predictions to the probability of being right, fitted on held-out spans.

    Logistic or isotonic, whichever has the lower Brier score in a cross-validation grouped by question. Where the
    values say nothing, or say it the wrong way round, it is the share that is right.

    Args:
        values: ``[n]``.
        held: the spans.
        rising: whether a higher value means more likely right.
        seed: of the folds.
    """
    values, truth, groups = _counted(values, held)
    if truth.all() or not truth.any() or auroc(values if rising else -values, truth) <= 0.5:
        # Smoothed: some hundred answers of one kind don't prove that there is no other.
        share = (float(truth.sum()) + 1) / (len(truth) + 2)
        return IsotonicMap(direction="higher" if rising else "lower", scores=(0.0,), confidences=(share,))
    x = values[:, None]
    briers = {}
    for method in ("logistic", "isotonic"):
        try:
            briers[method] = cross_validate(x, truth, method, groups, _FOLDS, seed).brier
        except (CalibrationError, ValueError):  # too few of one kind for folds
            return fit_map(x, truth, "logistic")
    return fit_map(x, truth, min(briers, key=lambda m: briers[m]))


def _counted(values: Floats, held: Examples) -> tuple[Floats, Bools, list[str]]:
    """One row an answer; a question of whose samples a share is right counts four times, that share of them right."""
    right = held.right
    groups = [e.group for e in held.items]
    if np.isin(right, (0.0, 1.0)).all():
        return values, right == 1.0, groups
    copies = 4
    truth = np.concatenate([np.arange(copies) < np.round(copies * r) for r in right])
    return np.repeat(values, copies), truth, [g for g in groups for _ in range(copies)]


# ------------------------------------------------------------------ metrics


def _metrics(head: DifficultyHead, raw: Floats, spans: Examples, *, windows: bool) -> dict[str, float]:
    """AUROC, calibration error, Brier score; of difficulties the mean absolute error too.

    Args:
        head: gives the probabilities.
        raw: ``[n]`` difficulties, or for target ``correct`` the scores before the map.
        spans: what they are of.
        windows: whether they are windows in mid-thought.
    """
    binary = head.target == "correct"
    right = spans.right >= 0.5
    values, truth, _ = _counted(raw, spans)
    p = head.map(values[:, None])
    found = {
        "auroc_right" if binary else "auroc_closing_right" if windows else "auroc_fast_right": _auroc(
            raw if binary else -raw, right
        ),
        "brier": float(np.mean((p - truth) ** 2)),
        "calibration_error": expected_calibration_error(p, truth),
        "share_right": float(spans.right.mean()),
        "n": float(len(spans)),
    }
    for mode in ("fast", "slow") if binary else ():  # one mode is right more often: what is left within each
        own = np.array([e.mode == mode for e in spans.items], dtype=bool)
        found[f"auroc_{mode}_answers"] = _auroc(raw[own], right[own]) if own.any() else float("nan")
    if not binary:
        found["mae"] = float(np.mean(np.abs(raw - 100 * spans.y)))
    if not binary and not windows:
        only_slow = np.array([e.only_slow for e in spans.items], dtype=bool)
        found["auroc_only_slow_right"] = _auroc(raw, only_slow)
        found["share_only_slow_right"] = float(only_slow.mean())
    return {name: value for name, value in found.items() if np.isfinite(value)}


def _auroc(values: Floats, truth: Bools) -> float:
    return float("nan") if truth.all() or not truth.any() else auroc(values, truth)


def _versions() -> dict[str, str]:
    import sklearn
    import torch

    return {
        "kvroute": __version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
