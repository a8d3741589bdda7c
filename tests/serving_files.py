"""Heads and policies on disk for a server's tests, fitted on a model that is only described."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvroute import DifficultyHead, DriftMonitor, Policy, PoolingSpec
from kvroute.confidence_maps import LogisticMap
from kvroute.heads.models import RidgeModel
from kvroute.info import LayerInfo, ModelInfo

SPEC = PoolingSpec(layers="all", part="v", heads="concat", layer_reduce="concat")


def an_info(digest: str = "abc", layers: int = 4) -> ModelInfo:
    return ModelInfo(
        name="/srv/secret/tiny",
        architecture="Tiny",
        hidden_size=32,
        vocab_size=100,
        context=512,
        layers=tuple(LayerInfo(model_layer=i, kv_heads=2, key_size=8, value_size=8) for i in range(layers)),
        model_layers=layers,
        rope="{}",
        weights_digest=digest,
        dtype="float32",
    )


INFO = an_info()


def a_head(info: ModelInfo = INFO, spec: PoolingSpec = SPEC, **changes: Any) -> DifficultyHead:
    dim = spec.dimension(info)
    zeros = np.zeros(dim, dtype=np.float32)
    head = DifficultyHead(
        spec=spec,
        target="difficulty",
        predictor=RidgeModel(zeros, zeros, zeros, np.array([0.4])),
        map=LogisticMap(means=(50.0,), scales=(20.0,), coefficients=(-2.0,), intercept=0.0),
        model=info.name,
        fingerprint=info.fingerprint,
        data_hash="x",
    )
    return replace(head, **changes)


def write_policy(folder: Path, name: str = "policy", *, info: ModelInfo = INFO) -> Path:
    """As ``kvroute calibrate`` leaves it: the policy, its head's folder and its drift reference."""
    a_head(info, windows=a_head(info)).save(folder / "head")
    random = np.random.default_rng(0)
    monitor = DriftMonitor.fit(random.random(200) * 100, fingerprint=info.fingerprint)
    monitor.save(folder / f"{name}.drift.safetensors")
    Policy(kind="two-step", head="head", drift=f"{name}.drift.safetensors").save(folder / f"{name}.json")
    return folder
