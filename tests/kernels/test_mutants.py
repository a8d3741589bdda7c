"""Every mistake in ``mutants.py`` is caught by its cases, and nothing is where none was made.

CI plants every second one; ``make test-long`` the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutants import CASES, MUTANTS, mutants_of

ROOT = Path(__file__).parents[2]


def test_there_are_enough_and_of_many_kinds() -> None:
    assert sum(len(mutants_of(module, 0)) for module in CASES) >= 20
    assert len({(m.module, m.kind) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("module", list(CASES))
def test_every_mutant_is_caught(module: str, half: int) -> None:
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-m",
        "tests.kernels.mutants",
        module,
        "--half",
        str(half),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    lines = json.loads(done.stdout.splitlines()[-1]) if done.stdout else []
    assert len(lines) == 1 + len(mutants_of(module, half)), done.stderr[-2000:]
    assert lines[0]["caught"] is None, f"without a mutant: {lines[0]['caught']}"
    assert [line["kind"] for line in lines[1:] if line["caught"] is None] == []
    assert done.returncode == 0
