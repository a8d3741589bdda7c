"""Every script in benchmarks/ runs with ``--quick --json`` and ends with its line of JSON. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from run_all import scripts_in

ROOT = Path(__file__).parents[2]
SCRIPTS = [p.name for p in scripts_in(ROOT / "benchmarks") if not p.name.startswith("kernel_")]
"""The kernels' are run by ``tests/kernels/test_compiled.py``, and those on vLLM, where it is installed, by
``tests/serving/test_load_and_faults.py``."""

LONG = {
    *("agent_self_check.py", "best_of_votes.py", "calibration_guarantee.py", "early_exit.py", "embedding_quality.py"),
    *("embedding_throughput.py", "generate_overhead.py", "route_overhead.py", "routing_curve.py", "routing_quality.py"),
    *("score_quality.py", "switch_tokens.py"),
}
"""Half a minute or more each even so: ``make test-long`` runs them, CI does not."""

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in SCRIPTS]
)
def test_quick_run_ends_with_json(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script), "--quick", "--json", "--seconds", "6"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["name"] == script.removesuffix(".py")
    assert found["figures"]
    for figure in found["figures"].values():
        assert set(figure) == {"value", "low", "high", "must", "ok"}
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert found["ok"] in (True, False, None)
    assert found["versions"]["torch"]
