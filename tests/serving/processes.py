"""How the tests of the real engine start processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """Of a process that runs vLLM on CPU with this working tree."""
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_module(module: str, *arguments: str) -> None:
    """Run ``python -m module``; its output is shown where it fails."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
