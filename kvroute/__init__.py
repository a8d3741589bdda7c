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
    ConnectorMissingError,
    EmptyTextError,
    FileFormatError,
    InvalidInputError,
    KVRouteError,
    MissingExtraError,
    ModelLoadError,
    ModelMismatchError,
    NonFiniteCacheError,
    OutOfMemoryError,
    ServerError,
    ServerTimeoutError,
    ServerUnreachableError,
    SpecError,
    TextTooLongError,
    UnsupportedModelError,
    WindowedLayerError,
)

if TYPE_CHECKING:
    from kvroute.calibration import ConfidenceCalibrator
    from kvroute.candidates import Candidate, one_step_candidate, quantile_thresholds, run_candidate
    from kvroute.cascade import Cascade, Cascaded
    from kvroute.chains import ChainScores, ChainSpec, ChainState, chain_scores
    from kvroute.checkers import CheckResult
    from kvroute.contrastive import TextPair
    from kvroute.conversation import Conversation
    from kvroute.decisions import Decision, Routed, RoutedChunk, Switch
    from kvroute.drift import DriftHealth, DriftMonitor
    from kvroute.embedder import KVEmbedder
    from kvroute.embedder_handle import EmbedderHandle
    from kvroute.embedder_identity import EmbeddingIdentity
    from kvroute.embedding_evaluation import EmbeddingReport, EvaluationOptions, evaluate_embeddings
    from kvroute.engines.base import Engine
    from kvroute.engines.handle import KEY_VARIABLE, EngineHandle, EngineName
    from kvroute.engines.prefix import Prefix
    from kvroute.engines.transformers_engine import TransformersEngine
    from kvroute.engines.vllm_engine import VLLMEngine
    from kvroute.evaluation import Evaluation
    from kvroute.features import AnswerPooling
    from kvroute.generation import (
        CancelToken,
        Generation,
        GenerationChunk,
        SamplingOptions,
        Timings,
        TokenIds,
        Usage,
    )
    from kvroute.guarantee import AtMostLoss, AtMostSlow, AtMostTokens, Certificate, certify, order_candidates
    from kvroute.heads.head import DifficultyHead
    from kvroute.heads.neighbours import Neighbour
    from kvroute.heads.search import SearchOptions
    from kvroute.heads.training import TrainingReport, train_head
    from kvroute.info import LayerInfo, ModelInfo
    from kvroute.label_rows import LabelRow, read_labels
    from kvroute.labelling import label_questions
    from kvroute.mteb_encoder import KVRouteEncoder
    from kvroute.policy import Policy
    from kvroute.pooling import PRESETS, PoolingSpec, pool
    from kvroute.postprocess import PostProcessor
    from kvroute.prefilling import Prefilled
    from kvroute.questions import Question
    from kvroute.router import Router
    from kvroute.routing_curves import Modes, Outcome
    from kvroute.routing_evaluation import evaluate_head
    from kvroute.routing_report import RoutingReport
    from kvroute.scores import SCORES, Score, ScoreInfo
    from kvroute.self_evaluation import SelfEvaluator
    from kvroute.serving.client import VLLMClient
    from kvroute.serving.jobs import Decide
    from kvroute.serving.wire import server_ask
    from kvroute.thinking import ThinkingMode
    from kvroute.token_weights import FrequencyTable
    from kvroute.voting import Sample, Voted
    from kvroute_kernels import KVView

_LAZY = {
    "AnswerPooling": "kvroute.features",
    "AtMostLoss": "kvroute.guarantee",
    "AtMostSlow": "kvroute.guarantee",
    "AtMostTokens": "kvroute.guarantee",
    "CancelToken": "kvroute.generation",
    "Candidate": "kvroute.candidates",
    "Cascade": "kvroute.cascade",
    "Cascaded": "kvroute.cascade",
    "Certificate": "kvroute.guarantee",
    "ChainScores": "kvroute.chains",
    "ChainSpec": "kvroute.chains",
    "ChainState": "kvroute.chains",
    "CheckResult": "kvroute.checkers",
    "ConfidenceCalibrator": "kvroute.calibration",
    "Conversation": "kvroute.conversation",
    "Decide": "kvroute.serving.jobs",
    "Decision": "kvroute.decisions",
    "DifficultyHead": "kvroute.heads.head",
    "DriftHealth": "kvroute.drift",
    "DriftMonitor": "kvroute.drift",
    "EmbedderHandle": "kvroute.embedder_handle",
    "EmbeddingIdentity": "kvroute.embedder_identity",
    "EmbeddingReport": "kvroute.embedding_evaluation",
    "Engine": "kvroute.engines.base",
    "EngineHandle": "kvroute.engines.handle",
    "EngineName": "kvroute.engines.handle",
    "Evaluation": "kvroute.evaluation",
    "EvaluationOptions": "kvroute.embedding_evaluation",
    "FrequencyTable": "kvroute.token_weights",
    "Generation": "kvroute.generation",
    "GenerationChunk": "kvroute.generation",
    "KEY_VARIABLE": "kvroute.engines.handle",
    "KVEmbedder": "kvroute.embedder",
    "KVRouteEncoder": "kvroute.mteb_encoder",
    "KVView": "kvroute_kernels",
    "LabelRow": "kvroute.label_rows",
    "LayerInfo": "kvroute.info",
    "ModelInfo": "kvroute.info",
    "Neighbour": "kvroute.heads.neighbours",
    "PRESETS": "kvroute.pooling",
    "Modes": "kvroute.routing_curves",
    "Outcome": "kvroute.routing_curves",
    "Policy": "kvroute.policy",
    "PoolingSpec": "kvroute.pooling",
    "PostProcessor": "kvroute.postprocess",
    "Prefilled": "kvroute.prefilling",
    "Prefix": "kvroute.engines.prefix",
    "Question": "kvroute.questions",
    "Routed": "kvroute.decisions",
    "RoutedChunk": "kvroute.decisions",
    "Router": "kvroute.router",
    "RoutingReport": "kvroute.routing_report",
    "SCORES": "kvroute.scores",
    "Sample": "kvroute.voting",
    "SamplingOptions": "kvroute.generation",
    "Score": "kvroute.scores",
    "ScoreInfo": "kvroute.scores",
    "SearchOptions": "kvroute.heads.search",
    "SelfEvaluator": "kvroute.self_evaluation",
    "Switch": "kvroute.decisions",
    "TextPair": "kvroute.contrastive",
    "ThinkingMode": "kvroute.thinking",
    "Timings": "kvroute.generation",
    "TokenIds": "kvroute.generation",
    "TrainingReport": "kvroute.heads.training",
    "TransformersEngine": "kvroute.engines.transformers_engine",
    "Usage": "kvroute.generation",
    "VLLMClient": "kvroute.serving.client",
    "VLLMEngine": "kvroute.engines.vllm_engine",
    "Voted": "kvroute.voting",
    "certify": "kvroute.guarantee",
    "chain_scores": "kvroute.chains",
    "evaluate_embeddings": "kvroute.embedding_evaluation",
    "evaluate_head": "kvroute.routing_evaluation",
    "label_questions": "kvroute.labelling",
    "one_step_candidate": "kvroute.candidates",
    "order_candidates": "kvroute.guarantee",
    "pool": "kvroute.pooling",
    "read_labels": "kvroute.label_rows",
    "quantile_thresholds": "kvroute.candidates",
    "run_candidate": "kvroute.candidates",
    "server_ask": "kvroute.serving.wire",
    "train_head": "kvroute.heads.training",
}

__all__ = [
    "KEY_VARIABLE",
    "PRESETS",
    "SCORES",
    "AnswerPooling",
    "AtMostLoss",
    "AtMostSlow",
    "AtMostTokens",
    "CalibrationError",
    "CancelToken",
    "Candidate",
    "Cascade",
    "Cascaded",
    "Certificate",
    "ChainScores",
    "ChainSpec",
    "ChainState",
    "ChatTemplateError",
    "CheckResult",
    "ConfidenceCalibrator",
    "ConnectorMissingError",
    "Conversation",
    "Decide",
    "Decision",
    "DifficultyHead",
    "DriftHealth",
    "DriftMonitor",
    "EmbedderHandle",
    "EmbeddingIdentity",
    "EmbeddingReport",
    "EmptyTextError",
    "Engine",
    "EngineHandle",
    "EngineName",
    "Evaluation",
    "EvaluationOptions",
    "FileFormatError",
    "FrequencyTable",
    "Generation",
    "GenerationChunk",
    "InvalidInputError",
    "KVEmbedder",
    "KVRouteEncoder",
    "KVRouteError",
    "KVView",
    "LabelRow",
    "LayerInfo",
    "MissingExtraError",
    "ModelInfo",
    "ModelLoadError",
    "ModelMismatchError",
    "Modes",
    "Neighbour",
    "NonFiniteCacheError",
    "OutOfMemoryError",
    "Outcome",
    "Policy",
    "PoolingSpec",
    "PostProcessor",
    "Prefilled",
    "Prefix",
    "Question",
    "Routed",
    "RoutedChunk",
    "Router",
    "RoutingReport",
    "Sample",
    "SamplingOptions",
    "Score",
    "ScoreInfo",
    "SearchOptions",
    "SelfEvaluator",
    "ServerError",
    "ServerTimeoutError",
    "ServerUnreachableError",
    "SpecError",
    "Switch",
    "TextPair",
    "TextTooLongError",
    "ThinkingMode",
    "Timings",
    "TokenIds",
    "TrainingReport",
    "TransformersEngine",
    "UnsupportedModelError",
    "Usage",
    "VLLMClient",
    "VLLMEngine",
    "Voted",
    "WindowedLayerError",
    "__version__",
    "certify",
    "chain_scores",
    "evaluate_embeddings",
    "evaluate_head",
    "label_questions",
    "one_step_candidate",
    "order_candidates",
    "pool",
    "quantile_thresholds",
    "read_labels",
    "run_candidate",
    "server_ask",
    "train_head",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kvroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
