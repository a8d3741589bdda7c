"""The LlamaIndex example with the real SmolLM2, as a reader runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.real
def test_the_right_notes_are_found_and_answered_from(tmp_path: Path) -> None:
    script = ROOT / "examples" / "rag_llama_index.py"
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    blocks = ran.stdout.strip().split("\n\n")
    assert len(blocks) == 3
    for block, word, said in zip(
        blocks, ("Bicycles", "canteen", "Parcels"), ("basement", "twelve", "dock"), strict=True
    ):
        _, found, answer = block.splitlines()
        assert word in found
        assert answer.startswith("  -> ")
        assert said in answer
