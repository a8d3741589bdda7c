"""kvroute for LangChain: a drop-in router, a chat model that thinks as hard as it must, embeddings, self-evaluation.

Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kvroute import MissingExtraError

if find_spec("langchain_core") is None:
    raise MissingExtraError("langchain-core", "langchain")

if TYPE_CHECKING:
    from langchain_kvroute.callback import SelfEvaluationCallbackHandler, SelfEvaluationRecord
    from langchain_kvroute.chat_model import ChatKVRoute
    from langchain_kvroute.decisions import KVRouteDecisionModel
    from langchain_kvroute.embeddings import KVRouteEmbeddings
    from langchain_kvroute.evaluating import SelfEvaluation, self_evaluation
    from langchain_kvroute.metadata import KVRouteMetadata, kvroute_metadata
    from langchain_kvroute.middleware import SelfEvaluationMiddleware
    from langchain_kvroute.openai import ChatOpenAIKVRoute, kvroute_ask
    from langchain_kvroute.router import KVRouteRouter, RoutedOutput

_LAZY = {
    "ChatKVRoute": "langchain_kvroute.chat_model",
    "ChatOpenAIKVRoute": "langchain_kvroute.openai",
    "KVRouteDecisionModel": "langchain_kvroute.decisions",
    "KVRouteEmbeddings": "langchain_kvroute.embeddings",
    "KVRouteMetadata": "langchain_kvroute.metadata",
    "KVRouteRouter": "langchain_kvroute.router",
    "RoutedOutput": "langchain_kvroute.router",
    "SelfEvaluation": "langchain_kvroute.evaluating",
    "SelfEvaluationCallbackHandler": "langchain_kvroute.callback",
    "SelfEvaluationMiddleware": "langchain_kvroute.middleware",
    "SelfEvaluationRecord": "langchain_kvroute.callback",
    "self_evaluation": "langchain_kvroute.evaluating",
    "kvroute_ask": "langchain_kvroute.openai",
    "kvroute_metadata": "langchain_kvroute.metadata",
}

__all__ = [
    "ChatKVRoute",
    "ChatOpenAIKVRoute",
    "KVRouteDecisionModel",
    "KVRouteEmbeddings",
    "KVRouteMetadata",
    "KVRouteRouter",
    "RoutedOutput",
    "SelfEvaluation",
    "SelfEvaluationCallbackHandler",
    "SelfEvaluationMiddleware",
    "SelfEvaluationRecord",
    "kvroute_ask",
    "kvroute_metadata",
    "self_evaluation",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'langchain_kvroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
