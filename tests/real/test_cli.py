"""The commands on the real SmolLM2, as a user calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvroute import KVEmbedder, TransformersEngine

pytestmark = pytest.mark.real


def kvroute(*arguments: object, **how: object) -> str:
    command = [sys.executable, "-m", "kvroute.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **how).stdout  # type: ignore[call-overload,no-any-return]


def test_ask_answers_and_scores() -> None:
    found = json.loads(kvroute("ask", "What is the capital of France?", "--max-tokens", 20, "--json"))
    assert "Paris" in found["text"]
    assert found["finish_reason"] == "stop"
    assert all(value is not None for value in found["scores"].values())
    assert found["confidence"] is None
    assert found["confidence_reason"]
    assert found["timings"]["features"] < found["timings"]["total"]


def test_embed_equals_the_library(tmp_path: Path, smollm2: TransformersEngine) -> None:
    texts = ["A cat sleeps on the sofa.", "Interest rates were raised again.", "How do I reset my password?"]
    (tmp_path / "in.txt").write_text("\n".join(texts))
    kvroute("embed", "in.txt", "--out", "out.npy", cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), KVEmbedder(smollm2).encode(texts), atol=1e-4)
