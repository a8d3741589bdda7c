"""A head for models whose labels would take too long: what it costs does not depend on what it has learned."""

from __future__ import annotations

import random

import numpy as np

from _texts import text_of
from kvroute import TransformersEngine
from kvroute.confidence_maps import LogisticMap
from kvroute.heads import DifficultyHead
from kvroute.heads.fitting import FITS, SETTINGS, Rows
from kvroute.pooling import PoolingSpec

PAPER = PoolingSpec(layers="last:4", window=64, part="kv", tokens="sum", heads="concat", layer_reduce="mean")
"""The paper's pooling for classification (arXiv 2601.20326, section 4.2)."""


def costs_head(
    engine: TransformersEngine, seed: int, *, kind: str = "mlp", spec: PoolingSpec = PAPER
) -> DifficultyHead:
    """The paper's MLP of 512 on the paper's pooling, fitted on random targets."""
    rng = random.Random(seed)
    texts = [text_of(24, rng) for _ in range(48)]
    x = engine.pool(engine.tokenize_texts(texts), [spec], progress=False)[0]
    y = np.random.default_rng(seed).random(len(x))
    fitted = FITS[kind](Rows(x[:32], y[:32]), Rows(x[32:], y[32:]), SETTINGS[kind][0], seed=seed, binary=False)
    curve = LogisticMap(means=(0.0,), scales=(1.0,), coefficients=(-0.02,), intercept=0.0)
    return DifficultyHead(
        spec=spec, target="difficulty", predictor=fitted.model, map=curve, model=engine.info.name,
        fingerprint=engine.info.fingerprint, data_hash="random",
    )  # fmt: skip
