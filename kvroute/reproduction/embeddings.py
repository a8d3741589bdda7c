"""The embeddings part of a recipe: classification by vectors, by the protocol of MTEB's classification tasks.

A logistic regression (100 iterations) is fitted on a few training rows a label, drawn anew in each experiment, and
judged on all test rows; the figure is the mean accuracy over the experiments (Muennighoff et al., MTEB, arXiv
2210.07316, section 3.2). The draws are not those of the package mteb, so that figures agree with its own up to chance.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvroute.recipes import DataSet, Recipe
from kvroute.reproduction.data import MissingFileError, Source, Texts
from kvroute.reproduction.steps import Engines, Steps

if TYPE_CHECKING:
    from kvroute.engines.base import Vectors

_ITERATIONS = 100


class Embedding:
    """Runs the part. Arguments as for :class:`~kvroute.reproduction.routing.Routing`."""

    def __init__(
        self, recipe: Recipe, source: Source, out: Path, steps: Steps, engines: Engines, progress: bool | None
    ) -> None:
        assert recipe.embeddings is not None
        self.recipe, self.part, self.source = recipe, recipe.embeddings, source
        self.out, self.steps, self.engines, self.progress = out, steps, engines, progress

    def evaluate(self) -> dict[str, dict[str, float | None]]:
        """Accuracy on every set."""
        found: dict[str, dict[str, float | None]] = {}
        for part in self.part.sets:
            try:
                texts = self.source.texts(part)
            except MissingFileError:
                if not part.optional:
                    raise
                self.steps.say(f"embed-{part.name}: left out, {part.file} is not there")
                continue
            facts = [self.recipe.model, self.recipe.dtype, self.part.model_dump(mode="json", exclude={"sets"}),
                     texts.train, texts.test]  # fmt: skip
            result = self.steps.run(
                f"embed-{part.name}",
                facts,
                lambda _, part=part, texts=texts: self._evaluate(part, texts),  # type: ignore[misc]
            )
            found |= result["figures"]
        return found

    def _evaluate(self, part: DataSet, texts: Texts) -> dict[str, Any]:
        from kvroute.embedder import KVEmbedder

        embedder = KVEmbedder(self.engines.reader(), self.part.spec)
        train, test = (
            embedder.encode([t for t, _ in half], truncate=True, progress=self.progress)
            for half in (texts.train, texts.test)
        )
        right = experiments(
            train, [label for _, label in texts.train], test, [label for _, label in texts.test],
            samples_per_label=self.part.samples_per_label, count=self.part.experiments, seed=self.part.seed,
        )  # fmt: skip
        return {"figures": {f"{part.name}.accuracy": accuracy(right, self.part.seed)}, "rows": len(texts.test)}


def experiments(
    train: Vectors, labels: list[str], test: Vectors, wanted: list[str], *, samples_per_label: int, count: int,
    seed: int,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """Whether each test row is right in each experiment, ``[count, n]`` bool.

    Args:
        train: ``[m, dim]`` vectors to draw from.
        labels: their labels.
        test: ``[n, dim]``.
        wanted: their labels.
        samples_per_label: rows drawn of each label; all where it has fewer.
        count: experiments.
        seed: of the draws.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    of, truth = np.asarray(labels), np.asarray(wanted)
    found = np.zeros((count, len(truth)), dtype=bool)
    for row in found:
        chosen = np.concatenate(
            [rng.permutation(np.flatnonzero(of == name))[:samples_per_label] for name in np.unique(of)]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            head = LogisticRegression(max_iter=_ITERATIONS).fit(train[chosen], of[chosen])
        row[:] = head.predict(test) == truth
    return found


def accuracy(right: np.ndarray[Any, Any], seed: int, draws: int = 2000, level: float = 0.95) -> dict[str, float | None]:
    """Mean over experiments and rows; the interval resamples both."""
    rng = np.random.default_rng(seed)
    values = right.astype(np.float64)
    count, n = values.shape
    drawn = np.empty(draws)
    for i in range(draws):
        drawn[i] = values[rng.integers(0, count, count)][:, rng.integers(0, n, n)].mean()
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(values.mean()), "low": float(low), "high": float(high)}
