"""A head for models whose labels would take too long: what it costs does not depend on what it has learned."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from _texts import text_of
from kvroute import Policy, TransformersEngine
from kvroute.confidence_maps import LogisticMap
from kvroute.heads import DifficultyHead
from kvroute.heads.fitting import FITS, SETTINGS, Rows
from kvroute.pooling import PRESETS, PoolingSpec

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


THINKING = {
    "fast": "<think>\n\n</think>\n\n",
    "slow": "<think>\n",
    "leave": "\n</think>\n\n",
    "enter": "\n<think>\n",
    "close": "</think>",
}


def costs_settings(model: str, folder: Path, seed: int) -> dict[str, Any]:
    """Heads and a policy for a model, written to a folder, as the connector's settings.

    The thresholds are in the middle, so that both modes and switches happen; what they read has no meaning here.
    """
    engine = TransformersEngine.from_pretrained(model, dtype="float32")
    head = costs_head(engine, seed)
    windows = costs_head(engine, seed + 1)
    answers = costs_head(engine, seed + 2, spec=PRESETS["paper-mteb"])
    replace(head, windows=windows).save(folder / "policies" / "head")
    replace(answers, target="correct").save(folder / "heads" / "right")
    Policy(kind="two-step", head="head", tau_fast=5, tau_slow=95).save(folder / "policies" / "costs.json")
    return {
        "policies": str(folder / "policies"),
        "heads": str(folder / "heads"),
        "thinking": THINKING,
        "strict": True,
    }
