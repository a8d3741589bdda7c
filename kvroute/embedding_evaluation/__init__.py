"""How good embeddings are: keys and values beside hidden states of the same model and outside references."""

from __future__ import annotations

from kvroute.embedding_evaluation.evaluator import OutOfTimeError
from kvroute.embedding_evaluation.report import EmbeddingReport
from kvroute.embedding_evaluation.run import EvaluationOptions, evaluate_embeddings
from kvroute.embedding_evaluation.tasks import Tasks, load_tasks

__all__ = ["EmbeddingReport", "EvaluationOptions", "OutOfTimeError", "Tasks", "evaluate_embeddings", "load_tasks"]
