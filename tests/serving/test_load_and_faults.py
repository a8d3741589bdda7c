"""The scripts that load, break and compare a real vLLM engine, each for a short while: all is as it must be."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.serving.processes import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("script", ["vllm_parity", "vllm_faults", "vllm_soak"])
def test_quick_run_is_as_it_must_be(script, tmp_path):
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / f"{script}.py"), "--quick", "--json"]
    command += ["--log", str(tmp_path / "log")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stderr[-4000:] + (tmp_path / "log").read_text()[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["name"] == script
    missed = {name: figure for name, figure in found["figures"].items() if figure["ok"] is False}
    assert not missed, run.stderr[-4000:]
    assert any(figure["ok"] for figure in found["figures"].values())
