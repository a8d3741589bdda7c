"""The scripts on a real vLLM engine, each for a short while. What they count is as it must be; nothing is timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving.processes import ROOT

pytestmark = pytest.mark.vllm


def quick(script: str, log: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The figures of the JSON line that a quick run ends with, and what it said on standard error."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / f"{script}.py"), "--quick", "--json", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    logs = [log] if log.is_file() else sorted(log.glob("*.log"))
    assert run.returncode == 0, run.stderr[-4000:] + "".join(path.read_text()[-4000:] for path in logs)
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["name"] == script
    assert all(math.isfinite(figure["value"]) for figure in found["figures"].values())
    return found["figures"], run.stderr


@pytest.mark.parametrize(
    "script",
    [
        "vllm_soak",
        pytest.param("vllm_parity", marks=pytest.mark.slow),
        pytest.param("vllm_faults", marks=pytest.mark.slow),
    ],
)
def test_all_is_as_it_must_be(script: str, tmp_path: Path) -> None:
    figures, said = quick(script, tmp_path / "log", "--log", str(tmp_path / "log"))
    missed = {name: figure for name, figure in figures.items() if figure["ok"] is False}
    assert not missed, said[-4000:]
    assert any(figure["ok"] for figure in figures.values())


def test_routing(tmp_path: Path) -> None:
    figures, _ = quick("vllm_routing", tmp_path, "--logs", str(tmp_path))
    for policy in ("one_step", "two_step"):
        assert figures[f"{policy}_same_answers_as_transformers"]["value"] >= 0.99
        assert figures[f"{policy}_tokens_of_slow"]["value"] < 1


def test_overhead(tmp_path: Path) -> None:
    figures, _ = quick("vllm_overhead", tmp_path, "--logs", str(tmp_path), "--only", "server")
    assert {"throughput_every_feature", "throughput_nothing_asked", "hooks_wall_every_feature"} <= set(figures)
    assert figures["hooks_wall_every_feature"]["value"] > figures["hooks_wall_nothing_asked"]["value"] > 0


@pytest.mark.slow
def test_overhead_in_one_engine(tmp_path: Path) -> None:
    """Each run asserts that its requests have results with kvroute plugged in and asked, and else none."""
    figures, _ = quick("vllm_overhead", tmp_path, "--logs", str(tmp_path), "--only", "engine")
    keys = {"nothing_asked", "every_feature", "asked"}
    assert set(figures) == {f"engine_{key}" for key in keys} | {f"engine_undisturbed_{key}" for key in keys}
    assert all(0.5 < figure["value"] < 1.5 for figure in figures.values())
