"""Scores to a confidence: fitted on answers known to be right or wrong, saved as JSON, bound to a model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from kvroute.calibration_metrics import CalibrationMetrics, cross_validate
from kvroute.confidence_maps import Bools, Floats, Frozen, IsotonicMap, LogisticMap, fit_map
from kvroute.errors import CalibrationError, FileFormatError
from kvroute.files import is_name, read_json, write_json
from kvroute.scores import SCORES, Score

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.info import ModelInfo

FOLDER_VARIABLE = "KVROUTE_CALIBRATORS"
"""The environment variable that names the folder of calibrators loaded by name."""

_KIND = "kvroute.confidence"
_MIN_ROWS = 20
_LARGEST = 1e100


class ConfidenceCalibrator(Frozen):
    """Turns scores of an answer into a confidence in [0, 1].

    Made by :meth:`fit` or :meth:`fit_rows`, kept in a JSON file. Applying it needs no scikit-learn.
    """

    names: tuple[str, ...]
    """The scores that it reads, in order."""
    map: LogisticMap | IsotonicMap = Field(discriminator="method")
    """Scores to confidence."""
    model: str
    """Name of the model it was fitted on."""
    fingerprint: str
    """The model's fingerprint."""
    rows: int
    """Rows it was fitted on."""
    left_out: int
    """Rows left out because a score was missing."""
    data_hash: str
    """Digest of the rows it was fitted on."""
    metrics: CalibrationMetrics
    """Out of fold."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.names) != self.map.size or len(set(self.names)) != len(self.names):
            raise ValueError("the map does not take these scores")
        return self

    @property
    def method(self) -> str:
        """``logistic`` or ``isotonic``."""
        return self.map.method

    def __repr__(self) -> str:
        return f"ConfidenceCalibrator({self.method}, {list(self.names)}, model={self.model!r})"

    # ------------------------------------------------------------------ fitting

    @classmethod
    def fit(
        cls,
        scores: Sequence[Mapping[str, Any]],
        correct: Sequence[bool],
        *,
        info: ModelInfo,
        names: Sequence[str] | None = None,
        method: Literal["logistic", "isotonic"] = "logistic",
        groups: Sequence[object] | None = None,
        folds: int = 5,
        seed: int = 0,
    ) -> Self:
        """Fit on scores of answers that are known to be right or wrong.

        Args:
            scores: of each answer, by name: a number, a :class:`~kvroute.scores.Score`, or None where it has none.
            correct: whether each answer is right.
            info: the model that the scores come from.
            names: which scores to read; by default all that occur.
            method: ``logistic`` (one score or several, standardised) or ``isotonic`` (one score; whether a higher one
                means more likely right is found from the rows).
            groups: something equal for answers to one question, which then share a fold.
            folds: of the cross-validation that gives the metrics.
            seed: of its shuffling.

        Raises:
            CalibrationError: too few rows or only one kind of answers, saying how many are needed; a score that is not
                known or not a number.

        A row in which one of the scores is missing is left out; a warning says how many were.
        """
        if len(scores) != len(correct):
            raise CalibrationError(f"{len(scores)} rows of scores, and {len(correct)} that say whether they are right.")
        if method not in ("logistic", "isotonic"):
            raise CalibrationError(f"The method is logistic or isotonic, not {method!r}.")
        if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
            raise CalibrationError(f"The cross-validation has at least 2 folds, not {folds}.")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise CalibrationError(f"A seed is 0 to {2**32 - 1}, not {seed}.")
        if groups is not None and len(groups) != len(scores):
            raise CalibrationError(f"{len(scores)} rows of scores, and {len(groups)} groups.")
        chosen = _chosen_names(scores, names, method)
        truth = np.array([_as_bool(i, c) for i, c in enumerate(correct)], dtype=bool)
        x: Floats = np.array(
            [[_as_float(i, n, row.get(n)) for n in chosen] for i, row in enumerate(scores)], dtype=np.float64
        )
        x = x.reshape(len(scores), len(chosen))
        whole: Bools = np.array([bool(np.isfinite(row).all()) for row in x], dtype=bool)
        left_out = int((~whole).sum())
        x, truth = x[whole], truth[whole]
        _check_enough(truth, left_out, folds)
        if left_out:
            warnings.warn(
                f"{left_out} of {len(whole)} rows miss a score of {', '.join(chosen)} and are left out.",
                RuntimeWarning,
                stacklevel=2,
            )
        kept = None if groups is None else [repr(g) for g, w in zip(groups, whole, strict=True) if w]
        metrics = cross_validate(x, truth, method, kept, folds, seed)
        body = json.dumps([list(chosen), x.tolist(), truth.tolist()])
        return cls(
            names=chosen,
            map=fit_map(x, truth, method),
            model=info.name,
            fingerprint=info.fingerprint,
            rows=len(x),
            left_out=left_out,
            data_hash=hashlib.sha256(body.encode()).hexdigest()[:16],
            metrics=metrics,
        )

    @classmethod
    def fit_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        *,
        engine: Engine | None = None,
        info: ModelInfo | None = None,
        names: Sequence[str] | None = None,
        method: Literal["logistic", "isotonic"] = "logistic",
        folds: int = 5,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Self:
        """Fit on rows as files hold them.

        Args:
            rows: each with ``correct`` (true or false) and ``scores`` (values by name, as :meth:`Evaluation.to_dict`
                gives them), or else ``prompt`` and ``answer``, which the engine scores first. Rows with the same
                ``prompt`` share a fold.
            engine: the model, for rows without scores.
            info: what the scores come from, where there is no engine.
            names, method, folds, seed: as in :meth:`fit`; names of families are taken too.
            progress: whether to show a bar; by default on a terminal.

        Raises:
            CalibrationError: as :meth:`fit`, or a row that lacks something, naming it.
            InvalidInputError: as :meth:`SelfEvaluator.score_many`.
        """
        from kvroute.self_evaluation import DEFAULT_SCORES, SelfEvaluator, score_names

        if engine is None and info is None:
            raise CalibrationError("Give the engine, or the info of the model that the scores come from.")
        chosen = None if names is None else score_names(names)
        correct, unscored = [], []
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping) or "correct" not in row:
                raise CalibrationError(f"Row {index} does not say whether its answer is correct.", hint=_ROW)
            correct.append(_as_bool(index, row["correct"]))
            given, askable = row.get("scores"), "prompt" in row and "answer" in row
            if not isinstance(given, Mapping):
                if not askable:
                    raise CalibrationError(f"Row {index} has neither scores nor prompt and answer.", hint=_ROW)
                unscored.append(index)
            elif engine is not None and askable and any(n not in given for n in chosen or ()):
                unscored.append(index)
        if unscored and engine is None:
            raise CalibrationError(
                f"{len(unscored)} rows have no scores, and there is no engine to score them.",
                hint="Give the engine, or rows that kvroute score has scored.",
            )
        scores: list[Mapping[str, Any]] = [s if isinstance(s := row.get("scores"), Mapping) else {} for row in rows]
        if engine is not None and unscored:
            evaluator = SelfEvaluator(engine, scores=chosen or DEFAULT_SCORES)
            found = evaluator.score_many(
                [(rows[i]["prompt"], rows[i]["answer"]) for i in unscored],
                finish_reason=[rows[i].get("finish_reason") or "stop" for i in unscored],
                progress=progress,
            )
            for index, evaluation in zip(unscored, found, strict=True):
                scores[index] = evaluation.scores
        asked = [row.get("prompt") for row in rows]
        grouped = all(p is not None for p in asked) and len({repr(p) for p in asked}) < len(asked)
        about = info if engine is None else engine.info
        assert about is not None
        return cls.fit(
            scores, correct, info=about, names=chosen, method=method, groups=asked if grouped else None, folds=folds,
            seed=seed,
        )  # fmt: skip

    # ------------------------------------------------------------------ use

    def confidence(self, scores: Mapping[str, Score | float | None]) -> tuple[float | None, str | None]:
        """How likely an answer is right.

        Args:
            scores: its scores by name.

        Returns:
            the confidence in [0, 1] and None, or None and the reason why there is none.
        """
        values = []
        for name in self.names:
            if name not in scores:
                return None, f"the score {name} is missing, and the calibrator reads it"
            score = scores[name]
            value = score.value if isinstance(score, Score) else score
            if value is None:
                reason = score.reason if isinstance(score, Score) else "it has no value"
                return None, f"the answer has no {name}: {reason}"
            if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
                return None, f"the score {name} is not a number"
            try:
                values.append(float(value))
            except OverflowError:  # an integer past any float
                return None, f"the score {name} is not finite"
            if not math.isfinite(values[-1]):
                return None, f"the score {name} is not finite"
        return float(self.map(np.array([values]))[0]), None

    def require(self, info: ModelInfo) -> None:
        """Refuse another model.

        Raises:
            ModelMismatchError: naming both.
        """
        info.require(self.fingerprint, "The confidence calibrator", self.model)

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write it as JSON: plain parameters, the model's fingerprint, metrics, format and kvroute's version."""
        write_json(path, _KIND, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: str | Path, info: ModelInfo | None = None) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            info: the model it shall serve; without it the file may be looked at, and a
                :class:`~kvroute.SelfEvaluator` still refuses another model.

        Raises:
            FileFormatError: missing, torn, changed, another kind of file or a newer format.
            ModelMismatchError: fitted on another model; both are named.
        """
        try:
            found = cls.model_validate(read_json(path, _KIND))
        except ValidationError as error:
            raise FileFormatError(f"{path} is not whole: {error}") from error
        if info is not None:
            info.require(found.fingerprint, f"The calibrator in {path}", found.model)
        return found

    @classmethod
    def by_name(cls, name: str, info: ModelInfo, folder: str | Path | None = None) -> Self:
        """Load ``<name>.json`` from the folder of calibrators.

        Args:
            name: letters, digits, ``.``, ``-`` and ``_``; never a path.
            info: the model it shall serve.
            folder: where they lie; by default what the environment variable ``KVROUTE_CALIBRATORS`` says.

        Raises:
            CalibrationError: no folder, no such name (the message lists what there is), or not a name.
            FileFormatError, ModelMismatchError: as :meth:`load`.
        """
        if not isinstance(name, str) or not is_name(name):
            raise CalibrationError(
                f"{name!r} is not a calibrator's name.", hint="A name has letters, digits, '.', '-' and '_', no path."
            )
        where = folder if folder is not None else os.environ.get(FOLDER_VARIABLE)
        if not where:
            raise CalibrationError(
                f"Calibrators are loaded by name from a folder, and none is set for {name!r}.",
                hint=f"Set {FOLDER_VARIABLE} to it, or pass folder=.",
            )
        path = Path(where) / f"{name}.json"
        if not path.is_file():
            known = sorted(p.stem for p in Path(where).glob("*.json")) if Path(where).is_dir() else []
            raise CalibrationError(
                f"No calibrator is named {name!r} in {where}.", hint=f"There are: {', '.join(known) or 'none'}."
            )
        return cls.load(path, info)


_ROW = 'A row is {"scores": {name: value}, "correct": true} or {"prompt": ..., "answer": ..., "correct": true}.'


# ---------------------------------------------------------------------- rows


def _chosen_names(scores: Sequence[Mapping[str, Any]], names: Sequence[str] | None, method: str) -> tuple[str, ...]:
    for index, row in enumerate(scores):
        if not isinstance(row, Mapping):
            raise CalibrationError(f"The scores of row {index} are {type(row).__name__}, not values by name.")
    found = tuple(dict.fromkeys(n for row in scores for n in row)) if names is None else tuple(dict.fromkeys(names))
    unknown = [n for n in found if n not in SCORES]
    if unknown:
        raise CalibrationError(f"No score is named {unknown[0]!r}.", hint=f"There are: {', '.join(SCORES)}.")
    if not found:
        raise CalibrationError("There is no score to read.", hint=f"There are: {', '.join(SCORES)}.")
    if method == "isotonic" and len(found) != 1:
        raise CalibrationError(
            f"An isotonic calibrator reads one score, not {len(found)}: {', '.join(found)}.",
            hint="Choose one by names=, or use method='logistic'.",
        )
    return tuple(n for n in SCORES if n in found)


def _as_bool(index: int, value: object) -> bool:
    if isinstance(value, bool | np.bool_) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise CalibrationError(f"'correct' of row {index} is {value!r}, not true or false.")


def _as_float(index: int, name: str, value: object) -> float:
    """The value, NaN where there is none."""
    if isinstance(value, Score):
        value = value.value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise CalibrationError(f"The score {name} of row {index} is {value!r}, not a number.")
    try:
        number = float(value)
    except (OverflowError, TypeError) as error:
        raise CalibrationError(f"The score {name} of row {index} is {value!r}, not a real number.") from error
    if not math.isfinite(number):
        return math.nan
    if abs(number) > _LARGEST:  # its square, a variance, must be finite
        raise CalibrationError(f"The score {name} of row {index} is {number}, too large to be one.")
    return number


def _check_enough(truth: Bools, left_out: int, folds: int) -> None:
    right, wrong = int(truth.sum()), int((~truth).sum())
    if right + wrong < _MIN_ROWS or min(right, wrong) < folds:
        missing = f" ({left_out} more miss a score)" if left_out else ""
        raise CalibrationError(
            f"There are {right} right and {wrong} wrong answers with scores{missing}; needed are at least {_MIN_ROWS} "
            f"answers, {folds} right and {folds} wrong ones among them.",
            hint="Add labelled answers, some of them right and some wrong.",
        )
