"""Heads: from a pooled vector to a difficulty or a confidence (docs/concepts.md; arXiv 2601.20326, section 4.2)."""

from __future__ import annotations

from kvroute.heads.head import DifficultyHead
from kvroute.heads.neighbours import Neighbour

__all__ = ["DifficultyHead", "Neighbour"]
