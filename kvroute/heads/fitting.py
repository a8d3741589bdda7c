"""Fitting of each kind of head, with scikit-learn and torch; what comes out is numpy (:mod:`kvroute.heads.models`).

All targets lie in [0, 1]: a difficulty over 100, or whether an answer is right. Each fit takes validation rows to stop
early by, or the number of rounds where there are none.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvroute.heads.models import (
    GRADES,
    Floats,
    HeadModel,
    LogisticModel,
    MLPModel,
    RidgeModel,
    TreesModel,
    Vectors,
)

Setting = Mapping[str, float]

_HIDDEN = 512
_EPOCHS, _PATIENCE = 150, 12
_TREES, _TREE_PATIENCE = 300, 30
_BATCH = 64, 1024
"""Smallest and largest batch; between them about 64 steps an epoch."""


@dataclass(frozen=True)
class Fitted:
    """A fitted model.

    Attributes:
        model: what it computes.
        rounds: epochs or trees it took, 0 where there are no such.
    """

    model: HeadModel
    rounds: int = 0


@dataclass(frozen=True)
class Rows:
    """Vectors and what they shall give.

    Attributes:
        x: ``[n, dim]`` float32.
        y: ``[n]`` float64 in [0, 1].
    """

    x: Vectors
    y: Floats

    def __len__(self) -> int:
        return len(self.y)


def standardization(x: Vectors) -> tuple[Vectors, Vectors]:
    """Mean and one over the standard deviation of ``[n, dim]``; 0 for what doesn't vary beyond rounding."""
    mean = x.mean(axis=0, dtype=np.float64)
    spread = x.std(axis=0, dtype=np.float64)
    varies = spread > 1e-6 * np.abs(mean) + 1e-12
    inverse = np.where(varies, 1 / np.where(varies, spread, 1.0), 0.0)
    return mean.astype(np.float32), inverse.astype(np.float32)


# ------------------------------------------------------------------ ridge


def fit_ridge(train: Rows, _validation: Rows | None, setting: Setting, **_: Any) -> Fitted:
    """Least squares with an L2 penalty ``alpha`` times the number of rows on the standardised weights."""
    return Fitted(ridge_path(train, [setting["alpha"]])[0])


def ridge_path(train: Rows, alphas: list[float]) -> list[RidgeModel]:
    """Ridge for several penalties out of one decomposition.

    Args:
        train: the rows.
        alphas: penalties a row, of the standardised weights.
    """
    mean, inverse = standardization(train.x)
    z = ((train.x - mean) * inverse).astype(np.float64)
    offset = z.mean(axis=0)
    z -= offset
    base = float(train.y.mean())
    y = train.y - base
    n, dim = z.shape
    if dim <= n:
        values, vectors = np.linalg.eigh(z.T @ z)
        projected = vectors.T @ (z.T @ y)
    else:  # fewer rows than numbers: the same through the rows' products
        values, vectors = np.linalg.eigh(z @ z.T)
        projected = vectors.T @ y
    values = np.maximum(values, 0.0)
    models = []
    for alpha in alphas:
        solved = vectors @ (projected / (values + alpha * n))
        weight = solved if dim <= n else z.T @ solved
        bias = np.array([base - offset @ weight])
        models.append(RidgeModel(mean, inverse, weight.astype(np.float32), bias))
    return models


# ------------------------------------------------------------------ logistic


def fit_logistic(train: Rows, _validation: Rows | None, setting: Setting, *, binary: bool, **_: Any) -> Fitted:
    """Softmax over the labels with penalty 1 / ``c``.

    A mean over samples lies between two labels and counts for both, by how near it is, so that the expectation
    is kept.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, inverse = standardization(train.x)
    z = (train.x - mean) * inverse
    grades = np.array([0.0, 1.0], dtype=np.float32) if binary else GRADES
    upper = np.clip(np.searchsorted(grades, train.y, side="left"), 1, len(grades) - 1)
    share = np.clip((train.y - grades[upper - 1]) / (grades[upper] - grades[upper - 1]), 0, 1)
    rows = np.concatenate([np.arange(len(z))] * 2)
    labels = np.concatenate([upper - 1, upper])
    weights = np.concatenate([1 - share, share])
    some = weights > 0
    rows, labels, weights = rows[some], labels[some], weights[some]
    seen = np.unique(labels)
    if len(seen) == 1:  # one label alone: nothing to tell apart
        flat = np.zeros((1, z.shape[1]), np.float32)
        return Fitted(LogisticModel(mean, inverse, flat, np.zeros(1, np.float32), grades[seen]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=setting["c"], max_iter=300, tol=1e-3).fit(z[rows], labels, sample_weight=weights)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(seen) == 2:  # scikit-learn keeps one line for two labels
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return Fitted(LogisticModel(mean, inverse, weight.astype(np.float32), bias.astype(np.float32), grades[seen]))


# ------------------------------------------------------------------ MLP


def fit_mlp(
    train: Rows,
    validation: Rows | None,
    setting: Setting,
    *,
    seed: int,
    rounds: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    **_: Any,
) -> Fitted:
    """The paper's MLP with AdamW and MSE; the epoch with the lowest error on the validation rows is kept.

    Args:
        train: the rows to fit.
        validation: rows to stop early by, or None with ``rounds``.
        setting: ``decay``, the weight decay.
        seed: of the first weights and the order of the rows.
        rounds: epochs, without validation rows.
        stop: says that the time is up; asked after each epoch.
    """
    mean, inverse = standardization(train.x)
    z = torch.from_numpy((train.x - mean) * inverse)
    y = torch.from_numpy(train.y.astype(np.float32))
    held = None if validation is None else torch.from_numpy((validation.x - mean) * inverse)
    batch = min(max(len(z) // 64, _BATCH[0]), _BATCH[1])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = torch.nn.Sequential(
            torch.nn.Linear(z.shape[1], _HIDDEN), torch.nn.ReLU(), torch.nn.Linear(_HIDDEN, 1)
        )  # fmt: skip
        with torch.no_grad():
            list(net.parameters())[-1].fill_(float(y.mean()))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=setting["decay"])
        best, best_error, best_epoch = _mlp_model(net, mean, inverse), np.inf, 0
        for epoch in range(1, (rounds or _EPOCHS) + 1):
            order = torch.randperm(len(z))
            for at in range(0, len(z), batch):
                chosen = order[at : at + batch]
                loss = torch.nn.functional.mse_loss(net(z[chosen])[:, 0], y[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if held is None or validation is None:
                best, best_epoch = _mlp_model(net, mean, inverse), epoch
            else:
                with torch.no_grad():
                    found = net(held)[:, 0].double().clamp(0, 1).numpy()
                error = float(np.mean((found - validation.y) ** 2))
                if error < best_error:
                    best, best_error, best_epoch = _mlp_model(net, mean, inverse), error, epoch
                elif epoch - best_epoch >= _PATIENCE:
                    break
            if stop():
                break
    return Fitted(best, best_epoch)


def _mlp_model(net: torch.nn.Sequential, mean: Vectors, inverse: Vectors) -> MLPModel:
    w, b, v, c = (p.detach().numpy().copy() for p in net.parameters())
    return MLPModel(mean, inverse, w, b, v[0], c.astype(np.float64))


# ------------------------------------------------------------------ trees


def fit_trees(
    train: Rows,
    validation: Rows | None,
    setting: Setting,
    *,
    seed: int,
    binary: bool,
    rounds: int | None = None,
    **_: Any,
) -> Fitted:
    """Gradient-boosted trees on the first ``components`` principal components of the standardised vectors.

    Args:
        train: the rows to fit.
        validation: rows that say how many trees are best, or None with ``rounds``.
        setting: ``components``, ``rate`` and ``leaves``.
        seed: of the PCA and the trees.
        binary: whether targets are 0 and 1, for a log-odds link.
        rounds: trees, without validation rows.
    """
    from sklearn.decomposition import PCA
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    mean, inverse = standardization(train.x)
    z = (train.x - mean) * inverse
    size = int(min(setting["components"], *z.shape))
    with np.errstate(divide="ignore", invalid="ignore"):
        pca = PCA(size, svd_solver="randomized" if size < min(z.shape) else "full", random_state=seed).fit(z)
    components = np.ascontiguousarray(pca.components_, dtype=np.float32)
    reduced = (z @ components.T).astype(np.float64)
    y = (train.y >= 0.5).astype(np.int64) if binary else train.y
    binary = binary and len(np.unique(y)) == 2
    kind = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
    boosted = kind(
        learning_rate=setting["rate"],
        max_iter=rounds or _TREES,
        max_leaf_nodes=int(setting["leaves"]),
        min_samples_leaf=max(2, min(20, len(y) // 20)),
        l2_regularization=1.0,
        early_stopping=False,
        random_state=seed,
    ).fit(reduced, y)
    kept = boosted.n_iter_
    if validation is not None:
        held = (((validation.x - mean) * inverse) @ components.T).astype(np.float64)
        stages = boosted.staged_predict_proba(held) if binary else boosted.staged_predict(held)
        errors = []
        for stage in stages:
            found = stage[:, 1] if binary else stage
            errors.append(float(np.mean((np.clip(found, 0, 1) - validation.y) ** 2)))
            if len(errors) - int(np.argmin(errors)) > _TREE_PATIENCE:
                break
        kept = int(np.argmin(errors)) + 1
    return Fitted(export_trees(boosted, kept, mean, inverse, components, binary=binary), kept)


def export_trees(
    boosted: Any, kept: int, mean: Vectors, inverse: Vectors, components: Vectors, *, binary: bool
) -> TreesModel:
    """The first ``kept`` trees of scikit-learn's histogram gradient boosting, as arrays."""
    parts: dict[str, list[Any]] = {n: [] for n in ("feature", "threshold", "left", "right", "value")}
    roots, at, deepest = [], 0, 0
    for (tree,) in boosted._predictors[:kept]:
        nodes = tree.nodes
        leaf = nodes["is_leaf"].astype(bool)
        self_index = np.arange(len(nodes)) + at
        parts["feature"].append(np.where(leaf, 0, nodes["feature_idx"]))
        parts["threshold"].append(np.where(leaf, 0.0, nodes["num_threshold"]))
        parts["left"].append(np.where(leaf, self_index, nodes["left"].astype(np.int64) + at))
        parts["right"].append(np.where(leaf, self_index, nodes["right"].astype(np.int64) + at))
        parts["value"].append(np.where(leaf, nodes["value"], 0.0))
        roots.append(at)
        at += len(nodes)
        deepest = max(deepest, int(nodes["depth"].max()))
    types = {"feature": np.int32, "threshold": np.float64, "left": np.int32, "right": np.int32, "value": np.float64}
    joined = {n: np.concatenate(p).astype(types[n]) for n, p in parts.items()}
    base = np.asarray(boosted._baseline_prediction, dtype=np.float64).reshape(-1)[:1]
    return TreesModel(
        mean, inverse, components,
        joined["feature"], joined["threshold"], joined["left"], joined["right"], joined["value"],
        roots=np.array(roots, dtype=np.int32),
        depth=np.array([deepest], dtype=np.int32),
        base=base,
        link=np.array([1 if binary else 0], dtype=np.int8),
    )  # fmt: skip


FITS: dict[str, Callable[..., Fitted]] = {
    "mlp": fit_mlp, "ridge": fit_ridge, "logistic": fit_logistic, "trees": fit_trees,
}  # fmt: skip
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "ridge": tuple({"alpha": a} for a in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)),
    "logistic": ({"c": 0.001}, {"c": 0.01}, {"c": 0.1}),
    "mlp": ({"decay": 1e-2}, {"decay": 0.3}),
    "trees": (
        {"components": 32, "rate": 0.1, "leaves": 8},
        {"components": 96, "rate": 0.06, "leaves": 15},
    ),
}
"""Settings that the search tries for each kind."""
