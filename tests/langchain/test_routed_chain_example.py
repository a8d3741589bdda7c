"""examples/routed_chain.py runs and prints what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "routed_chain.py"


def test_it_prints_decisions_and_what_they_save(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--questions", "6"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = re.findall(r"^(fast|slow) +([\d.]+) +(\d+) +(\d+) +(\d+)  (yes|no) ", ran.stdout, re.MULTILINE)
    assert len(rows) == 6
    assert {row[0] for row in rows} == {"fast", "slow"}
    for _, difficulty, written, prompt, cached, _ in rows:
        assert 0 <= float(difficulty) <= 100
        assert int(written) > 0
        assert int(prompt) - 6 <= int(cached) < int(prompt)  # all but the last token, and the mode's own
    saved, total = map(int, re.search(r"(\d+) of (\d+) written tokens saved", ran.stdout).groups())  # type: ignore[union-attr]
    assert 0 < saved < total


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
