"""Searches that see open answers alone, each judged on the answers of the fold that it did not see.

Everything here is nested: for each of five folds (like questions in one fold) the whole search runs on the other four,
what it chose judges the fifth. So every answer is judged, none by anything that was chosen, fitted or calibrated on it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from answers.replay import Recorded, Replay
from kvroute.chains import chain_scores
from kvroute.confidence_maps import Bools, Floats, auroc, fit_map
from kvroute.heads.examples import Example, Examples
from kvroute.heads.features import pool_spans
from kvroute.heads.fitting import SETTINGS, Rows, ridge_path
from kvroute.heads.search import SearchOptions
from kvroute.heads.training import _Trainer
from kvroute.label_rows import LabelMeta

FOLDS = 5


@dataclass(frozen=True)
class Items:
    """Answers of all sets, one after the other.

    Attributes:
        sets: by answer, the number of its set.
        truth: by answer, whether it is right.
        groups: by answer, its question's skeleton.
    """

    sets: np.ndarray[Any, np.dtype[np.int64]]
    truth: Bools
    groups: tuple[str, ...]

    @property
    def folds(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """By answer, its fold: a hash of its question's skeleton."""
        return np.array([int(hashlib.sha256(g.encode()).hexdigest(), 16) % FOLDS for g in self.groups])

    def __len__(self) -> int:
        return len(self.truth)


# ------------------------------------------------------------------ trained on pooled keys and values


@dataclass(frozen=True)
class HeadSearch:
    """``kvroute train --target correct`` on recorded answers."""

    replay: Replay
    meta: LabelMeta
    items: Items
    options: SearchOptions
    seed: int

    def examples(self, at: Sequence[int]) -> Examples:
        """Spans of some answers."""
        texts = [self.replay.text(i) for i in at]
        spans = [
            Example(
                text=n, start=0, stop=len(texts[n]), y=float(self.items.truth[i]), right=float(self.items.truth[i]),
                only_slow=False, part="train", group=self.items.groups[i], id=str(i), question="", mode="fast",
            )
            for n, i in enumerate(at)
        ]  # fmt: skip
        return Examples(tuple(texts), tuple(spans))

    def confidences(self, out: Bools, fit: Bools) -> tuple[Floats, str]:
        """Of the answers ``out``, by a head that is chosen, fitted and calibrated on those in ``fit``; and its name."""
        engine: Any = self.replay
        trainer = _Trainer(engine, self.meta, self.options, self.seed, False)
        head, report = trainer.train("correct", self.examples(np.flatnonzero(fit).tolist()), Examples((), ()))
        judged = self.examples(np.flatnonzero(out).tolist())
        (vectors,) = pool_spans(engine, judged, [head.spec], progress=False)
        spec = head.spec.model_dump_json(exclude_defaults=True)
        return head.predict(vectors), f"{head.kind} {dict(report.chosen.setting)} on {spec}"

    def nested(self, within: Bools | None = None) -> tuple[Floats, list[str]]:
        """Each answer's confidence from the other folds, and what was chosen in each; ``within`` some sets alone."""
        every = np.ones(len(self.items), dtype=bool) if within is None else within
        found, chosen = np.full(len(self.items), np.nan), []
        for fold in range(FOLDS):
            out = every & (self.items.folds == fold)
            found[out], name = self.confidences(out, every & (self.items.folds != fold))
            chosen.append(name)
        return found, chosen

    def from_other_sets(self) -> Floats:
        """Each answer's confidence from the other sets alone."""
        found = np.full(len(self.items), np.nan)
        for one in np.unique(self.items.sets):
            out = self.items.sets == one
            found[out] = self.confidences(out, ~out)[0]
        return found


# ------------------------------------------------------------------ trained on hidden states


def hidden_probe(hidden: np.ndarray[Any, np.dtype[np.float32]], items: Items, layers: Sequence[int]) -> Floats:
    """The same on hidden states: a ridge on the mean state of the layer that the open answers like best.

    Args:
        hidden: ``[n, layers + 1, hidden]``.
        items: the answers.
        layers: that are tried.
    """
    folds, y = items.folds, items.truth.astype(np.float64)
    alphas = [s["alpha"] for s in SETTINGS["ridge"]]
    found = np.full(len(items), np.nan)
    for fold in range(FOLDS):
        open_, out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        best: tuple[float, int, float, Floats] | None = None
        for layer in layers:
            x = hidden[:, layer]
            judged = np.zeros((len(alphas), len(open_)))
            for inner in range(FOLDS):
                if inner != fold:
                    train, held = open_[folds[open_] != inner], folds[open_] == inner
                    for place, model in enumerate(ridge_path(Rows(x[train], y[train]), alphas)):
                        judged[place, held] = model.together(x[open_[held]])
            for alpha, values in zip(alphas, judged, strict=True):
                score = auroc(values, items.truth[open_])
                if best is None or score > best[0]:
                    best = score, layer, alpha, values
        assert best is not None
        _, layer, alpha, values = best
        x = hidden[:, layer]
        (model,) = ridge_path(Rows(x[open_], y[open_]), [alpha])
        curve = fit_map(values[:, None], items.truth[open_], "logistic")
        found[out] = curve(model.together(x[out])[:, None])
    return found


# ------------------------------------------------------------------ chains


@dataclass(frozen=True)
class Chain:
    """How a chain is made of an answer's keys and values."""

    part: str
    layers: str
    axis: str
    step: str = "token"
    window: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        extra = "" if self.window is None else f", last {self.window} tokens"
        extra += "" if self.head is None else f", head {self.head}"
        along = self.axis if self.axis == "layer" else f"{self.step} by {self.step}"
        return f"{self.part.upper()} of {self.layers} layers, {along}{extra}"


_LAYERS: dict[str, Callable[[int], slice]] = {
    "all": lambda n: slice(0, n),
    "first half of the": lambda n: slice(0, n // 2),
    "second half of the": lambda n: slice(n // 2, n),
    "middle third of the": lambda n: slice(n // 3, 2 * n // 3),
    "last four": lambda n: slice(n - 4, n),
    "first four": lambda n: slice(0, min(4, n)),
}
_BLOCKS = {"token": 1, "block of 4": 4, "block of 8": 8}


def chains(heads: int) -> list[Chain]:
    """Those that are tried."""
    found = []
    for part in ("kv", "k", "v"):
        for layers in _LAYERS:
            for window in (None, 16):
                found += [Chain(part, layers, "token", step, window) for step in (*_BLOCKS, "sentence")]
                found.append(Chain(part, layers, "layer", window=window))
        for head in range(heads):
            found += [Chain(part, "all", axis, head=head) for axis in ("token", "layer")]
    return found


def chain_values(recorded: Recorded, made: Sequence[Chain], ends: Sequence[Sequence[int]]) -> Floats:
    """CoE-R and CoE-C of every chain: ``[n, 2 * chains]``, NaN where an answer is too short for one.

    Args:
        recorded: the answers.
        made: the chains.
        ends: of each answer, one past the last token of each sentence.
    """
    found = np.full((len(recorded), 2 * len(made)), np.nan)
    for i in range(len(recorded)):
        sides = {"k": recorded.keys[i].float(), "v": recorded.values[i].float()}  # [L, T, H, D]
        for c, chain in enumerate(made):
            x = torch.cat([sides[side] for side in chain.part], dim=-1)
            x = x[_LAYERS[chain.layers](x.shape[0])]
            x = x[:, -chain.window :] if chain.window is not None else x
            x = x if chain.head is None else x[:, :, chain.head : chain.head + 1]
            if chain.axis == "layer":
                z = x.mean(dim=1).flatten(1)
            else:
                z = _steps(x.mean(dim=0).flatten(1), chain, [e - (sides["k"].shape[1] - x.shape[1]) for e in ends[i]])
            scores = chain_scores(z)
            for side, score in enumerate((scores.r, scores.c)):
                if score.value is not None:
                    found[i, 2 * c + side] = score.value
    return found


def _steps(z: torch.Tensor, chain: Chain, ends: Sequence[int]) -> torch.Tensor:
    """Means over blocks of tokens, or over sentences."""
    if chain.step == "sentence":
        cuts = sorted({min(max(e, 0), len(z)) for e in ends} | {0, len(z)})
        return torch.stack([z[a:b].mean(dim=0) for a, b in itertools.pairwise(cuts)]) if len(cuts) > 1 else z[:0]
    size = _BLOCKS[chain.step]
    whole = len(z) // size * size
    return z[:whole].reshape(-1, size, z.shape[1]).mean(dim=1)


def best_chain(values: Floats, items: Items, names: Sequence[str]) -> tuple[Floats, list[str]]:
    """Each answer's value by the chain, score and direction that the other folds like best; and what they chose.

    A value is the share of the set's open answers that lie below it, so that chains of different folds can be
    compared. An answer that is too short for the chain has one half.
    """
    found, chosen = np.full(len(items), 0.5), []
    for fold in range(FOLDS):
        open_ = items.folds != fold
        areas = np.array([_mean_auroc(values[:, c], items, open_) for c in range(values.shape[1])])
        at = int(np.argmax(np.abs(areas - 0.5)))
        sign = 1.0 if areas[at] >= 0.5 else -1.0
        chosen.append(f"{names[at]}, {'higher' if sign > 0 else 'lower'} is right, {max(areas[at], 1 - areas[at]):.3f}")
        for one in np.unique(items.sets):
            own = items.sets == one
            seen = np.sort(sign * values[own & open_, at])
            seen = seen[np.isfinite(seen)]
            out = own & ~open_ & np.isfinite(values[:, at])
            found[out] = np.searchsorted(seen, sign * values[out, at]) / max(len(seen), 1)
    return found, chosen


def _mean_auroc(column: Floats, items: Items, among: Bools) -> float:
    """Mean over sets; answers without a value lie in the middle, so that a chain which few have gains nothing by it."""
    areas = []
    for one in np.unique(items.sets):
        rows = among & (items.sets == one)
        values = column[rows]
        known = np.isfinite(values)
        if not known.any():
            return 0.5
        areas.append(auroc(np.where(known, values, np.median(values[known])), items.truth[rows]))
    return float(np.mean(areas))
