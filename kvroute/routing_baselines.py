"""Difficulties by cheaper or other means, to put beside a head that reads keys and values.

=====================  ================================================================================
``length``             tokens of the prompt
``first-probability``  probability of the likeliest first token of a fast answer (one prefill)
``first-entropy``      entropy of that token (one prefill)
``last-hidden``        the last layer's hidden state at the prompt's last token, with the same kind of head
``minilm``             a sentence embedding by all-MiniLM-L6-v2 with the same kind of head
``tfidf``              character n-grams weighted by TF-IDF, with boosted trees
=====================  ================================================================================

Each is trained on the same train rows; validation rows stop early and choose settings. A single number becomes a
difficulty by a logistic curve fitted on the train rows, which keeps its order and finds its direction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvroute.confidence_maps import Floats
from kvroute.engines.base import Vectors
from kvroute.errors import FileFormatError, InvalidInputError, SpecError
from kvroute.files import read_tensors, write_tensors
from kvroute.label_rows import LabelRow, usable
from kvroute.minilm import minilm_vectors

if TYPE_CHECKING:
    from kvroute.engines.base import Engine
    from kvroute.thinking import ThinkingMode

Predict = Callable[[Vectors], Floats]
"""``[n, dim]`` to difficulties ``[n]`` in [0, 100]."""
FitHead = Callable[[Vectors, Floats, Vectors, Floats, int], Predict]
"""``fit(x_train, y_train, x_validation, y_validation, seed)``, targets in [0, 100]."""

_KIND = "kvroute.baseline-features"
_COLUMNS = {"length": ("length", 0), "first-probability": ("first-token", 0), "first-entropy": ("first-token", 1)}
_VECTORS = {"last-hidden": "last-hidden", "minilm": "minilm"}
BASELINES: tuple[str, ...] = ("length", "minilm", "tfidf", "first-probability", "first-entropy", "last-hidden")
"""All there are, in the order they are shown in."""
_GRAMS, _TREES, _STEP = 512, 300, 20


@dataclass(frozen=True, slots=True)
class EvaluationRows:
    """Labelled rows by their use: to train on, to choose on, to judge on."""

    train: list[LabelRow]
    validation: list[LabelRow]
    test: list[LabelRow]

    @classmethod
    def of(cls, rows: Sequence[LabelRow], test: str = "test") -> Self:
        """Rows that have a label, by their part.

        Args:
            rows: of a file.
            test: the part to judge on.

        Raises:
            InvalidInputError: a part without a row, or one to judge on that is trained or chosen on.
        """
        if test not in ("test", "calibration"):
            raise InvalidInputError(
                f"A head is judged on rows it never saw, not on the part {test!r}.", hint="Take test or calibration."
            )
        found = cls(usable(rows, "train"), usable(rows, "validation"), usable(rows, test))  # type: ignore[arg-type]
        for part, kept in (("train", found.train), ("validation", found.validation), (test, found.test)):
            if not kept:
                raise InvalidInputError(f"No labelled row is in the part {part}.", hint="Label more questions.")
        return found


@dataclass(frozen=True, slots=True)
class Judged:
    """Difficulties ``[n]`` in [0, 100] of the rows to choose on and of those to judge on."""

    validation: Floats
    test: Floats


def check_baselines(names: Sequence[str]) -> None:
    """Refuse names that are not known.

    Raises:
        SpecError: naming it and those there are.
    """
    for name in names:
        if name not in BASELINES:
            raise SpecError(f"No baseline is named {name!r}.", hint=f"There are: {', '.join(BASELINES)}.")


def judge(
    name: str, rows: EvaluationRows, features: BaselineFeatures, fit_head: FitHead | None = None, *, seed: int = 0
) -> Judged:
    """Train one baseline and let it judge.

    Args:
        name: one of :data:`BASELINES`.
        rows: rows by their use.
        features: where numbers come from.
        fit_head: the head for those that take one; by default :func:`head_fitter` of an MLP.
        seed: of the training.
    """
    check_baselines([name])
    labels = [_labels(part) for part in (rows.train, rows.validation)]
    if name == "tfidf":
        return _tfidf(rows, labels[0], labels[1], seed)
    if name in _COLUMNS:
        group, column = _COLUMNS[name]
        train, validation, test = (v[:, column].astype(np.float64) for v in features.parts(group, rows))
        curve = _logistic_curve(train, labels[0])
        return Judged(curve(validation), curve(test))
    x, x_validation, x_test = features.parts(_VECTORS[name], rows)
    predict = (fit_head or head_fitter())(x, labels[0], x_validation, labels[1], seed)
    return Judged(predict(x_validation), predict(x_test))


def head_fitter(kind: str = "mlp") -> FitHead:
    """Fits a head of a kind as ``kvroute train`` does; its setting is the one with the least validation error."""
    from kvroute.heads.fitting import FITS, SETTINGS, Rows

    if kind not in FITS:
        raise SpecError(f"No head is of kind {kind!r}.", hint=f"There are: {', '.join(FITS)}.")

    def fit(x: Vectors, y: Floats, x_validation: Vectors, y_validation: Floats, seed: int) -> Predict:
        train, held = Rows(x, y / 100), Rows(x_validation, y_validation / 100)
        models = [FITS[kind](train, held, setting, seed=seed, binary=False).model for setting in SETTINGS[kind]]
        errors = [float(np.mean((model.together(held.x) - held.y) ** 2)) for model in models]
        best = models[int(np.argmin(errors))]
        return lambda vectors: best.together(vectors) * 100

    return fit


# ---------------------------------------------------------------------- features


class BaselineFeatures:
    """Numbers that baselines are made of, each computed once a run and kept in a folder if one is given.

    Args:
        engine: the model.
        thinking: how it thinks; the first fast token is asked for behind its fast mode's tokens.
        folder: where to keep them; what is there already is taken if it is of the same rows and the same model.
        progress: whether to show bars; by default on a terminal.
    """

    def __init__(
        self, engine: Engine, thinking: ThinkingMode, *, folder: Path | None = None, progress: bool | None = None
    ) -> None:
        self.engine, self.thinking, self.folder, self.progress = engine, thinking, folder, progress
        self._known: dict[str, Vectors] = {}

    def parts(self, group: str, rows: EvaluationRows) -> list[Vectors]:
        """``[n, dim]`` of the rows to train, choose and judge on, computed together."""
        parts = (rows.train, rows.validation, rows.test)
        together = self([*rows.train, *rows.validation, *rows.test], group)
        return np.split(together, np.cumsum([len(p) for p in parts])[:-1])

    def __call__(self, rows: Sequence[LabelRow], group: str) -> Vectors:
        """``[n, dim]`` float32 of a group: ``length``, ``first-token`` (log-probability of the likeliest, entropy),
        ``last-hidden`` or ``minilm``."""
        key = self._digest(rows, group)
        if key not in self._known:
            self._known[key] = self._kept(rows, group, key)
        return self._known[key]

    def _kept(self, rows: Sequence[LabelRow], group: str, key: str) -> Vectors:
        path = None if self.folder is None or group == "length" else self.folder / f"{group}-{key}.safetensors"
        if path is not None and path.is_file():
            try:
                return np.asarray(read_tensors(path, _KIND)[0]["vectors"], dtype=np.float32)
            except (FileFormatError, KeyError):
                path.unlink(missing_ok=True)  # torn: made anew
        made = self._computed(rows, group)
        if not np.isfinite(made).all():
            raise InvalidInputError(f"The features {group!r} hold NaN or infinity.")
        if path is not None:
            write_tensors(path, _KIND, {"vectors": made}, {"group": group})
        return made

    def _computed(self, rows: Sequence[LabelRow], group: str) -> Vectors:
        if group == "minilm":
            return minilm_vectors([r.question for r in rows], progress=self.progress)
        prompts = [list(r.prompt_ids) for r in rows]
        if group == "length":
            return np.array([[len(ids)] for ids in prompts], dtype=np.float32)
        if group == "first-token":
            suffix = fast_suffix(self.engine, self.thinking)
            texts = [ids + suffix for ids in prompts]
            # What is read at an answer's first token does not depend on which token it is.
            found = np.empty((len(texts), 2), dtype=np.float32)
            for batch, logits in self._read(texts, [len(t) for t in texts], "logits"):
                for index, of_tokens in zip(batch, logits, strict=True):
                    entropy, most = float(of_tokens[0, 1]), float(of_tokens[0, 2])
                    found[index] = np.log(max(most, 1e-30)), entropy
            return found
        if group == "last-hidden":
            found = np.empty((len(prompts), self.engine.info.hidden_size), dtype=np.float32)
            # The mean over an "answer" without its last token, of two tokens, is the state of the first.
            for batch, hidden in self._read(prompts, [len(ids) - 1 for ids in prompts], "hidden"):
                for index, by_layer in zip(batch, hidden, strict=True):
                    found[index] = by_layer[-1].float().numpy()
            return found
        raise SpecError(f"No features are named {group!r}.")

    def _read(self, texts: list[list[int]], start: list[int], want: Any) -> Iterator[tuple[list[int], list[Any]]]:
        """What the model sees at ``start`` and behind it, with a token put behind each text."""
        for index, begin in enumerate(start):
            if begin < 1:
                raise InvalidInputError(f"The prompt of row {index} has no two tokens to read.")
        asked = [[*ids, ids[-1]] for ids in texts]
        for batch, reading in self.engine.read(asked, start, want={want}, progress=self.progress):
            yield batch, getattr(reading, want)

    def _digest(self, rows: Sequence[LabelRow], group: str) -> str:
        model = "" if group == "minilm" else f"{self.engine.info.fingerprint} {self.engine.info.dtype}"
        text = json.dumps(
            [group, model, self.thinking.model_dump(mode="json"), [[r.question, list(r.prompt_ids)] for r in rows]]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def fast_suffix(engine: Engine, thinking: ThinkingMode) -> list[int]:
    """The tokens that put the model into fast mode, the same behind every prompt."""
    chat = getattr(engine.tokenizer, "chat_template", None)
    return thinking.layout(engine, [{"role": "user", "content": "?"}] if chat else "?").fast


# ---------------------------------------------------------------------- fitting


def _labels(rows: Sequence[LabelRow]) -> Floats:
    return np.array([r.label for r in rows], dtype=np.float64)


def _logistic_curve(x: Floats, y: Floats) -> Callable[[Floats], Floats]:
    """``100 / (1 + exp(-(a + b x)))`` fitted to labels ``[n]`` in [0, 100] by cross-entropy."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = float(x.mean()), float(x.std())
    if spread == 0 or y.min() == y.max():
        level = float(y.mean())
        return lambda v: np.full(len(v), level)
    z = ((x - mean) / spread)[:, None]
    truth = np.repeat([True, False], len(z))
    weight = np.concatenate([y, 100 - y]) / 100
    kept = weight > 0
    fitted = LogisticRegression(C=1e3, max_iter=1000).fit(np.vstack([z, z])[kept], truth[kept], weight[kept])
    return lambda v: np.asarray(100 * fitted.predict_proba(((v - mean) / spread)[:, None])[:, 1])


def _tfidf(rows: EvaluationRows, y: Floats, y_validation: Floats, seed: int) -> Judged:
    """Boosted trees on the commonest character n-grams of one to four, as many trees as validation rows like best."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), max_features=_GRAMS, sublinear_tf=True, dtype=np.float32
    )
    x = vectorizer.fit_transform([r.question for r in rows.train]).toarray()
    held, test = (
        vectorizer.transform([r.question for r in part]).toarray() for part in (rows.validation, rows.test)
    )  # fmt: skip
    boosted = HistGradientBoostingRegressor(
        learning_rate=0.1, max_iter=_STEP, max_leaf_nodes=15, l2_regularization=1.0, early_stopping=False,
        min_samples_leaf=max(2, min(20, len(y) // 20)), random_state=seed, warm_start=True,
    )  # fmt: skip
    best, found = np.inf, Judged(np.zeros(len(held)), np.zeros(len(test)))
    for trees in range(_STEP, _TREES + 1, _STEP):
        boosted.set_params(max_iter=trees).fit(x, y)
        judged = Judged(*(np.clip(boosted.predict(v).astype(np.float64), 0, 100) for v in (held, test)))
        error = float(np.mean((judged.validation - y_validation) ** 2))
        if error >= best:
            break
        best, found = error, judged
    return found
