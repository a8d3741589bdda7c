"""How the tests of the real engine start processes."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


@functools.cache
def _installed() -> tempfile.TemporaryDirectory | None:
    """A folder that shows vLLM this working tree's entry points, where kvroute is not installed beside it."""
    if importlib.metadata.entry_points(group="vllm.logits_processors", name="kvroute"):
        return None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tempfile.TemporaryDirectory(prefix="kvroute-entry-points-")
    info = Path(folder.name) / "kvroute-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvroute\nVersion: 0\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def environment() -> dict[str, str]:
    """Of a process that runs vLLM on CPU with this working tree."""
    shown = _installed()
    paths = [str(ROOT), str(ROOT / "kernels"), *([] if shown is None else [shown.name])]
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_NO_USAGE_STATS": "1",
    }


def run_module(module: str, *arguments: str) -> None:
    """Run ``python -m module``; its output is shown where it fails."""
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
