"""Commands with vLLM in their process, on CPU: they print what they print with transformers, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving.processes import ROOT, environment

pytestmark = pytest.mark.vllm
THINKER = ROOT / "examples" / "tiny_thinker"
MODEL = ["--model", str(THINKER / "model"), "--dtype", "float32"]
QUESTIONS = ["run a=6 b=5;1b*5;2b=8;3a+9", "right a=5 b=3;1b=7", "1+2=?"]
Run = Callable[..., tuple[int, str, str]]


def with_vllm(*words: str) -> list[dict[str, Any]]:
    """What a command prints, which is JSON by lines."""
    ran = subprocess.run(
        [sys.executable, "-m", "kvroute.cli", *words, *MODEL, "--engine", "vllm"],
        cwd=ROOT, env=environment() | {"TORCH_COMPILE_DISABLE": "1"}, capture_output=True, text=True, timeout=500,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("text", "finish_reason"):
        assert found[name] == expected[name]
    for name in ("prompt", "generated"):
        assert found["usage"][name] == expected["usage"][name]


def test_route_under_a_policy(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "".join(json.dumps({"question": q, "answer": "7", "answer_type": "number"}) + "\n" for q in QUESTIONS)
    )
    words = ["route", str(file), "--policy", str(THINKER / "policy.json"), "--max-tokens", "60", "--quiet"]
    _, printed, _ = run(*words, *MODEL)
    expected = [json.loads(line)["routed"] for line in printed.splitlines()]
    found = [row["routed"] for row in with_vllm(*words)]
    assert len(found) == len(QUESTIONS)
    for mine, theirs in zip(expected, found, strict=True):
        same(theirs, mine)
        assert (theirs["thought"], theirs["answer"]) == (mine["thought"], mine["answer"])
        assert theirs["correct"] == mine["correct"]
        a, b = theirs["decision"], mine["decision"]
        for name in ("mode", "final_mode", "why", "policy", "fault"):
            assert a[name] == b[name]
        assert a["difficulty"] == pytest.approx(b["difficulty"], abs=1e-2)


@pytest.mark.slow
def test_ask(run: Run) -> None:
    words = ["ask", QUESTIONS[0], "--max-tokens", "20", "--json"]
    _, printed, _ = run(*words, *MODEL)
    expected = json.loads(printed)
    (found,) = with_vllm(*words)
    same(found, expected)
    for name in ("kv_coe_r_token", "kv_coe_c_token", "kv_coe_r_layer", "kv_coe_c_layer", "length"):
        assert found["scores"][name] == pytest.approx(expected["scores"][name], rel=3e-4, abs=3e-5)
