"""One search for a head: which vector, which kind. It sees training and validation spans alone.

1. *specs*: a ridge on every pooling spec of a grid (layers x part x tokens, heads side by side), on a bounded number of
   spans that are prefilled once; nearest to plain first, so that a short budget still tries the plainest of each.
2. *variants*: around the best of them, heads averaged, layers side by side.
3. *kinds*: the best few specs on all spans, with every kind and setting.
4. *bare*: the best with and without the bare questions among its training spans.

Candidates are ordered by the AUROC of their prediction for "fast is right" (windows: closing here gives a right answer;
answers: this one is right) on spans they were not fitted on, then by mean squared error. All are kept in the report.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field

from kvroute.confidence_maps import auroc
from kvroute.heads.examples import Examples, Indices
from kvroute.heads.features import PrefillEngine, Reach, SumStore, check_spec, pool_spans, reach_of
from kvroute.heads.fitting import FITS, SETTINGS, Fitted, Rows, Setting, ridge_path
from kvroute.heads.models import Floats, HeadModel, Vectors
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec, Spec
from kvroute.progress import progress_bar

Kind = Literal["mlp", "ridge", "logistic", "trees"]
KINDS: tuple[Kind, ...] = ("ridge", "logistic", "mlp", "trees")

_WIDEST = 2048
"""Numbers in the widest vector that is tried."""
_AROUND = 4
"""Specs whose variants are tried."""
_TOKENS: tuple[dict[str, Any], ...] = (
    {}, {"tokens": "last"}, {"window": 16}, {"window": 64}, {"window": 8}, {"tokens": "sum"},
    {"tokens": "sum", "window": 64},
)  # fmt: skip


class SearchOptions(Spec):
    """Bounds of a search."""

    spec: PoolingSpec | None = None
    """The pooling spec, if it is not to be searched for."""
    window_spec: PoolingSpec | None = None
    """That of windows in mid-thought; by default ``spec`` too, if it is given."""
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    """Kinds of heads that are tried."""
    rows: int = Field(default=3000, ge=20, strict=True)
    """Spans, training and held ones each, that specs are chosen on."""
    finalists: int = Field(default=3, ge=1, strict=True)
    """Specs that all kinds are tried on."""
    spans: int = Field(default=40_000, ge=20, strict=True)
    """Training spans, and held ones, that a head is fitted on at most (windows can be very many)."""
    settings: int = Field(default=8, ge=1, strict=True)
    """Settings tried for each kind at most; of ridge, whose settings share one decomposition, all are."""
    budget_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Time for choosing: when it is over, no further candidate is begun. Reading the texts that a head is fitted on
    comes on top."""
    memory_mb: int = Field(default=1024, ge=1, strict=True)
    """Of the sums that specs are chosen on; fewer rows where they would take more."""
    bare: bool | None = None
    """Whether bare questions are trained on too; None tries both."""

    @classmethod
    def quick(cls, **changes: Any) -> Self:
        """Fewer rows, one finalist, one setting a kind: for a first look."""
        return cls(**({"rows": 400, "finalists": 1, "settings": 1, "spans": 4000} | changes))


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something that was tried.

    Attributes:
        stage: ``specs``, ``variants``, ``kinds`` or ``bare``.
        spec, kind, setting: what.
        bare: whether bare questions were among the training spans.
        train, held: spans it was fitted on and judged on (over all folds).
        auroc: on the held ones; None where they are all right or all wrong.
        mse: on the held ones, of targets in [0, 1].
        seconds: it took.
    """

    stage: str
    spec: PoolingSpec
    kind: str
    setting: dict[str, float]
    bare: bool
    train: int
    held: int
    auroc: float | None
    mse: float
    seconds: float

    @property
    def order(self) -> tuple[float, float]:
        """The better, the higher."""
        return (0.5 if self.auroc is None else round(self.auroc, 6), -self.mse)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "spec": self.spec.model_dump(mode="json", exclude_defaults=True)}


@dataclass(frozen=True)
class Problem:
    """What is to be learned.

    Attributes:
        examples: training and validation spans, none else.
        splits: (training, held) indices; one pair, or the folds of a cross-validation.
        binary: whether targets are 0 and 1.
        sign: 1 where a higher prediction means more likely right, -1 where it means harder.
        origin: of a reduced one, where its spans lie in the problem that it was taken from.
    """

    examples: Examples
    splits: tuple[tuple[Indices, Indices], ...]
    binary: bool
    sign: int
    origin: Indices | None = None

    def judge(self, held: Indices, found: Floats) -> tuple[float | None, float]:
        """AUROC and mean squared error of predictions."""
        truth = self.examples.right[held] >= 0.5
        mse = float(np.mean((found - self.examples.y[held]) ** 2))
        return (None if truth.all() or not truth.any() else auroc(self.sign * found, truth)), mse

    def without_bare(self) -> Problem:
        """The same without bare questions among the training spans."""
        bare = np.array([e.bare for e in self.examples.items], dtype=bool)
        splits = tuple((train[~bare[train]], held) for train, held in self.splits)
        return Problem(self.examples, splits, self.binary, self.sign, self.origin)

    def reduced(self, spans: int, rng: np.random.Generator) -> Problem:
        """At most so many training and so many held spans in each split, of whole texts chosen at random."""
        chosen = tuple(
            (_some(self.examples, train, spans, rng), _some(self.examples, held, spans, rng))
            for train, held in self.splits
        )
        used = np.unique(np.concatenate([i for pair in chosen for i in pair]))
        moved = tuple((np.searchsorted(used, train), np.searchsorted(used, held)) for train, held in chosen)
        return Problem(self.examples.take(used), moved, self.binary, self.sign, used)


@dataclass(frozen=True)
class Found:
    """The best candidate, fitted.

    Attributes:
        candidate: what it is.
        model: fitted on the training spans (of the folds together).
        rounds: epochs or trees it took.
        problem: that it was fitted on.
        x: ``[n, dim]`` vectors of the problem's spans.
        held: ``[m]`` indices of spans that were held out.
        predictions: ``[m]`` for them, by models not fitted on them.
        tried: every candidate.
    """

    candidate: Candidate
    model: HeadModel
    rounds: int
    problem: Problem
    x: Vectors
    held: Indices
    predictions: Floats
    tried: list[Candidate] = field(default_factory=list)


class Clock:
    """A budget of seconds."""

    def __init__(self, budget: float | None) -> None:
        self._began = time.monotonic()
        self._budget = budget

    def over(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent."""
        return self._budget is not None and time.monotonic() - self._began > share * self._budget


def search(
    engine: PrefillEngine, problem: Problem, options: SearchOptions, *, seed: int = 0, progress: bool | None = None
) -> Found:
    """Find the best spec and kind for a problem and fit it.

    Raises:
        SpecError: a spec that is given doesn't fit the model.
    """
    clock = Clock(options.budget_seconds)
    rng = np.random.default_rng(seed)
    tried: list[Candidate] = []
    if options.spec is not None:
        check_spec(options.spec, engine.info)
        finalists, known = [options.spec], None
    else:
        finalists, known = _choose_specs(engine, problem.without_bare(), options, clock, rng, tried, progress)
    whole = problem.reduced(options.spans, rng)
    vectors = _vectors(engine, whole, finalists, known, progress)
    has_bare = any(e.bare for e in whole.examples.items)
    first = whole.without_bare() if options.bare is None else whole
    best: Found | None = None
    plan = [
        (kind, setting, spec, x)
        for kind in _by_cost(options.kinds)
        for spec, x in zip(finalists, vectors, strict=True)
        for setting in SETTINGS[kind][: len(SETTINGS[kind]) if kind == "ridge" else options.settings]
    ]
    with progress_bar("Trying heads", len(plan), show=progress) as advance:
        for kind, setting, spec, x in plan:
            if best is None or not clock.over():
                found = _try("kinds", first, x, spec, kind, setting, has_bare and first is whole, seed, clock)
                tried.append(found.candidate)
                best = found if best is None or found.candidate.order > best.candidate.order else best
            advance(1)
    assert best is not None
    if options.bare is None and has_bare and not clock.over():
        c = best.candidate
        found = _try("bare", whole, best.x, c.spec, c.kind, c.setting, True, seed, clock)
        tried.append(found.candidate)
        best = found if found.candidate.order > c.order else best
    return Found(
        best.candidate, best.model, best.rounds, best.problem, best.x, best.held, best.predictions, tried
    )  # fmt: skip


_Known = tuple[Problem, SumStore]
"""Spans whose sums are there already."""


def _vectors(
    engine: PrefillEngine, problem: Problem, specs: Sequence[PoolingSpec], known: _Known | None, progress: bool | None
) -> list[Vectors]:
    """Vectors of a problem's spans by each spec; texts whose sums are known are not read again."""
    if known is None or known[0].origin is None or problem.origin is None:
        return pool_spans(engine, problem.examples, specs, progress=progress)
    there, at, of = np.intersect1d(problem.origin, known[0].origin, return_indices=True)
    rest = np.setdiff1d(np.arange(len(problem.origin)), at)
    new = pool_spans(engine, problem.examples.take(rest), specs, progress=progress)
    found = []
    for spec, vectors in zip(specs, new, strict=True):
        whole = np.empty((len(there) + len(rest), vectors.shape[1]), dtype=np.float32)
        whole[at], whole[rest] = known[1].vectors(spec, of), vectors
        found.append(whole)
    return found


# ------------------------------------------------------------------ specs


def layer_sets(layers: Sequence[int], num_layers: int) -> list[tuple[int, ...] | str]:
    """All, halves, thirds, the last four and the deepest of some layers, each once, in words where there are such."""
    n = len(layers)
    thirds = [layers[n * i // 3 : n * (i + 1) // 3] for i in range(3)] if n >= 3 else []
    cuts = [layers, layers[n // 2 :], layers[: (n + 1) // 2], thirds[1] if thirds else [], layers[-4:]]
    cuts += [thirds[0], thirds[2]] if thirds else []
    cuts.append(layers[-1:])
    sets: dict[tuple[int, ...], tuple[int, ...] | str] = {}
    for cut in cuts:
        if cut:
            sets.setdefault(tuple(cut), _in_words(tuple(cut), num_layers))
    return list(sets.values())


def _in_words(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...] | str:
    n = len(layers)
    if layers == tuple(range(num_layers)):
        return "all"
    if layers == tuple(range(num_layers - n, num_layers)):
        return f"last:{n}"
    return f"first:{n}" if layers == tuple(range(n)) else layers


def spec_grid(layers: Sequence[int], num_layers: int, heads: Literal["concat", "mean"] = "concat") -> list[PoolingSpec]:
    """The specs of the first stage, the plainest first."""
    grid = [
        (a + b + c, PoolingSpec(layers=chosen, part=part, heads=heads, **tokens))
        for a, chosen in enumerate(layer_sets(layers, num_layers))
        for b, part in enumerate(("kv", "v", "k"))
        for c, tokens in enumerate(_TOKENS)
    ]
    return [spec for _, spec in sorted(grid, key=lambda item: item[0])]


def _variants(spec: PoolingSpec, info: ModelInfo) -> Iterator[PoolingSpec]:
    other = "concat" if spec.heads == "mean" else "mean"
    for changes in ({"heads": other}, {"layer_reduce": "concat"}, {"heads": other, "layer_reduce": "concat"}):
        variant = spec.model_copy(update=changes)
        if variant.dimension(info) <= _WIDEST:
            yield variant


def _choose_specs(
    engine: PrefillEngine, problem: Problem, options: SearchOptions, clock: Clock, rng: np.random.Generator,
    tried: list[Candidate], progress: bool | None,
) -> tuple[list[PoolingSpec], _Known]:  # fmt: skip
    info = engine.info
    layers = SumStore.usable_layers(info, max(len(t) for t in problem.examples.texts))
    reaches: list[Reach] = list(dict.fromkeys(reach_of(PoolingSpec(**t)) for t in _TOKENS))
    most = options.memory_mb * 2**20 // SumStore.row_bytes(info, layers, len(reaches))
    small = problem.reduced(max(20, min(options.rows, most // 2)), rng)
    store = SumStore.fill(engine, small.examples, layers, reaches, progress=progress)
    best: dict[PoolingSpec, Candidate] = {}

    def consider(stage: str, spec: PoolingSpec) -> None:
        for candidate in _try_ridge(stage, small, store.vectors(spec), spec):
            tried.append(candidate)
            if spec not in best or candidate.order > best[spec].order:
                best[spec] = candidate

    kv_heads, key_size, value_size = info.layers[layers[0]].sizes
    wide = kv_heads * (key_size + value_size) > _WIDEST  # many KV heads, not grouped: side by side they are too much
    grid = spec_grid(layers, info.num_layers, "mean" if wide else "concat")
    with progress_bar("Trying pooling specs", len(grid), show=progress) as advance:
        for spec in grid:
            if not best or not clock.over(0.4):
                consider("specs", spec)
            advance(1)
    leaders = sorted(best, key=lambda s: best[s].order, reverse=True)
    for spec in leaders[:_AROUND]:
        for variant in _variants(spec, info):
            if not clock.over(0.5) and variant not in best:
                consider("variants", variant)
    return sorted(best, key=lambda s: best[s].order, reverse=True)[: options.finalists], (small, store)


# ------------------------------------------------------------------ candidates


def _try_ridge(stage: str, problem: Problem, x: Vectors, spec: PoolingSpec) -> list[Candidate]:
    """Ridge with every penalty, one decomposition a split."""
    began = time.perf_counter()
    settings = SETTINGS["ridge"]
    held = np.concatenate([h for _, h in problem.splits])
    found: list[list[Floats]] = [[] for _ in settings]
    for train, out in problem.splits:
        models = ridge_path(Rows(x[train], problem.examples.y[train]), [s["alpha"] for s in settings])
        for predictions, model in zip(found, models, strict=True):
            predictions.append(model.together(x[out]))
    seconds = (time.perf_counter() - began) / len(settings)
    train_count = len(problem.splits[0][0])
    return [
        Candidate(stage, spec, "ridge", dict(s), False, train_count, len(held),
                  *problem.judge(held, np.concatenate(p)), seconds)
        for s, p in zip(settings, found, strict=True)
    ]  # fmt: skip


def _try(
    stage: str, problem: Problem, x: Vectors, spec: PoolingSpec, kind: str, setting: Setting, bare: bool, seed: int,
    clock: Clock,
) -> Found:  # fmt: skip
    """Fit a candidate on each split; of a cross-validation, fit it once more on all spans."""
    began = time.perf_counter()
    y = problem.examples.y

    def fit(train: Indices, held: Indices | None, rounds: int | None = None) -> Fitted:
        validation = None if held is None else Rows(x[held], y[held])
        options = {"seed": seed, "binary": problem.binary, "rounds": rounds, "stop": clock.over}
        return FITS[kind](Rows(x[train], y[train]), validation, setting, **options)

    fitted = [fit(train, held) for train, held in problem.splits]
    rounds = int(np.median([f.rounds for f in fitted]))
    held = np.concatenate([h for _, h in problem.splits])
    if len(problem.splits) == 1:
        model = fitted[0].model
        predictions = model.together(x[held])
    else:
        if rounds:  # each fold stopped where its held spans said: judge them by a number of rounds that all share
            fitted = [fit(train, None, rounds) for train, _ in problem.splits]
        predictions = np.concatenate([f.model.together(x[h]) for f, (_, h) in zip(fitted, problem.splits, strict=True)])
        model = fit(np.unique(np.concatenate([np.concatenate(s) for s in problem.splits])), None, rounds or None).model
    score = problem.judge(held, predictions)
    seconds = time.perf_counter() - began
    candidate = Candidate(
        stage, spec, kind, dict(setting), bare, len(problem.splits[0][0]), len(held), *score, seconds
    )  # fmt: skip
    return Found(candidate, model, rounds, problem, x, held, predictions)


def _by_cost(kinds: Sequence[Kind]) -> list[Kind]:
    return [k for k in KINDS if k in kinds]


def _some(examples: Examples, indices: Indices, spans: int, rng: np.random.Generator) -> Indices:
    """At most so many of some spans, of whole texts as far as they go."""
    if len(indices) <= spans:
        return indices
    texts = np.array([examples.items[int(i)].text for i in indices])
    place = {int(t): n for n, t in enumerate(rng.permutation(np.unique(texts)))}
    order = np.argsort([place[int(t)] for t in texts], kind="stable")
    return np.sort(indices[order[:spans]])
