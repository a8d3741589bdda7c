"""The tiny thinker, a real model that thinks and calls a tool: shared by the adapters' tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvroute import TransformersEngine

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"
sys.path.insert(0, str(FOLDER))


@pytest.fixture(scope="session")
def thinker() -> TransformersEngine:
    """Shared by all tests, so leave it as it is."""
    return TransformersEngine.from_pretrained(FOLDER / "model")
