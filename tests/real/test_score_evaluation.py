"""``kvroute evaluate scores`` on answers of the tiny thinker, with the confidence that it ships."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny_thinker"


def kvroute(*arguments: object) -> str:
    command = [sys.executable, "-m", "kvroute.cli", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_the_shipped_confidence_is_judged_beside_the_scores(tmp_path: Path) -> None:
    made = [sys.executable, str(FOLDER / "questions.py"), "--count", "64", "--seed", "4711"]
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes(subprocess.run(made, capture_output=True, check=True).stdout)
    labels, model, out = tmp_path / "labels.jsonl", FOLDER / "model", tmp_path / "report"
    kvroute("label", questions, "-m", model, "--max-fast", 48, "--max-slow", 48, "-o", labels, "-q")
    found = json.loads(
        kvroute(
            "evaluate", "scores", labels, "-m", model, "--head", FOLDER / "confidence", "--part", "all",
            "--mode", "fast", "-o", out, "--json", "-q",
        )
    )  # fmt: skip
    assert found["sets"]["labels"]["answers"] == 64
    mean = {name: figures["auroc"]["value"] for name, figures in found["mean"].items()}
    assert mean["confidence"] > 0.75  # on thousands of answers as its card says
    # What a trained confidence has to beat, and the untrained chains do not, here as elsewhere.
    assert mean["confidence"] > max(mean[n] for n in mean if n.startswith("kv_coe"))
    assert max(mean["entropy"], mean["mean_logprob"]) > 0.75
    pair = next(c for c in found["compared"] if (c["a"], c["b"]) == ("confidence", "length"))
    assert pair["p"] < 0.01
    assert (out / "report.html").stat().st_size > 20_000
