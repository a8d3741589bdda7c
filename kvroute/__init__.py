"""kvroute: embeddings, self-evaluation and routing from the KV cache a language model already keeps.

What this module exports is the public API; everything else may change. Names are loaded when first used, so
``import kvroute`` is light: no transformers, no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvroute._version import __version__
from kvroute.errors import (
    CalibrationError,
    ChatTemplateError,
    EmptyTextError,
    FileFormatError,
    InvalidInputError,
    KVRouteError,
    MissingExtraError,
    ModelLoadError,
    ModelMismatchError,
    NonFiniteCacheError,
    OutOfMemoryError,
    SpecError,
    TextTooLongError,
    UnsupportedModelError,
    WindowedLayerError,
)

if TYPE_CHECKING:
    from kvroute.calibration import ConfidenceCalibrator
    from kvroute.chains import ChainScores, ChainSpec, ChainState, chain_scores
    from kvroute.checkers import CheckResult
    from kvroute.embedder import KVEmbedder
    from kvroute.engines.base import Engine
    from kvroute.engines.decoding import Prefix
    from kvroute.engines.transformers_engine import TransformersEngine
    from kvroute.generation import (
        CancelToken,
        Generation,
        GenerationChunk,
        SamplingOptions,
        Timings,
        Usage,
    )
    from kvroute.heads.head import DifficultyHead
    from kvroute.heads.neighbours import Neighbour
    from kvroute.info import LayerInfo, ModelInfo
    from kvroute.label_rows import LabelRow, read_labels
    from kvroute.labelling import Question, label_questions
    from kvroute.pooling import PRESETS, PoolingSpec, pool
    from kvroute.postprocess import PostProcessor
    from kvroute.routing_evaluation import evaluate_head
    from kvroute.routing_report import RoutingReport
    from kvroute.scores import SCORES, Score, ScoreInfo
    from kvroute.self_evaluation import Evaluation, SelfEvaluator
    from kvroute.token_weights import FrequencyTable
    from kvroute_kernels import KVView

_LAZY = {
    "CancelToken": "kvroute.generation",
    "ChainScores": "kvroute.chains",
    "ChainSpec": "kvroute.chains",
    "ChainState": "kvroute.chains",
    "CheckResult": "kvroute.checkers",
    "ConfidenceCalibrator": "kvroute.calibration",
    "DifficultyHead": "kvroute.heads.head",
    "Engine": "kvroute.engines.base",
    "Evaluation": "kvroute.self_evaluation",
    "FrequencyTable": "kvroute.token_weights",
    "Generation": "kvroute.generation",
    "GenerationChunk": "kvroute.generation",
    "KVEmbedder": "kvroute.embedder",
    "KVView": "kvroute_kernels",
    "LabelRow": "kvroute.label_rows",
    "LayerInfo": "kvroute.info",
    "ModelInfo": "kvroute.info",
    "Neighbour": "kvroute.heads.neighbours",
    "PRESETS": "kvroute.pooling",
    "PoolingSpec": "kvroute.pooling",
    "PostProcessor": "kvroute.postprocess",
    "Prefix": "kvroute.engines.decoding",
    "Question": "kvroute.labelling",
    "RoutingReport": "kvroute.routing_report",
    "SCORES": "kvroute.scores",
    "SamplingOptions": "kvroute.generation",
    "Score": "kvroute.scores",
    "ScoreInfo": "kvroute.scores",
    "SelfEvaluator": "kvroute.self_evaluation",
    "Timings": "kvroute.generation",
    "TransformersEngine": "kvroute.engines.transformers_engine",
    "Usage": "kvroute.generation",
    "chain_scores": "kvroute.chains",
    "evaluate_head": "kvroute.routing_evaluation",
    "label_questions": "kvroute.labelling",
    "pool": "kvroute.pooling",
    "read_labels": "kvroute.label_rows",
}

__all__ = [
    "PRESETS",
    "SCORES",
    "CalibrationError",
    "CancelToken",
    "ChainScores",
    "ChainSpec",
    "ChainState",
    "ChatTemplateError",
    "CheckResult",
    "ConfidenceCalibrator",
    "DifficultyHead",
    "EmptyTextError",
    "Engine",
    "Evaluation",
    "FileFormatError",
    "FrequencyTable",
    "Generation",
    "GenerationChunk",
    "InvalidInputError",
    "KVEmbedder",
    "KVRouteError",
    "KVView",
    "LabelRow",
    "LayerInfo",
    "MissingExtraError",
    "ModelInfo",
    "ModelLoadError",
    "ModelMismatchError",
    "Neighbour",
    "NonFiniteCacheError",
    "OutOfMemoryError",
    "PoolingSpec",
    "PostProcessor",
    "Prefix",
    "Question",
    "RoutingReport",
    "SamplingOptions",
    "Score",
    "ScoreInfo",
    "SelfEvaluator",
    "SpecError",
    "TextTooLongError",
    "Timings",
    "TransformersEngine",
    "UnsupportedModelError",
    "Usage",
    "WindowedLayerError",
    "__version__",
    "chain_scores",
    "evaluate_head",
    "label_questions",
    "pool",
    "read_labels",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kvroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
