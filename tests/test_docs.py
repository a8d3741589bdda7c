"""Runs every block of README and docs: Python blocks in one namespace a page, shell blocks line by line.

Those of the README's section "Inside vLLM", and all that name a server's address, need one:
``tests/serving/test_readme.py`` runs them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm_commands import warm_commands

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(?P<kind>python|bash|json|text)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n", re.MULTILINE)
# `make test` runs this very file, so a block that calls it is not run again from within.
RECURSIVE = {"make test"}
ADDRESS = "http://127.0.0.1:8000"
SERVED = re.compile(r"^## Inside vLLM\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str, *, served: bool = False) -> list[str]:
    """Blocks that need no server, or those that need one."""
    text = page.read_text()
    section = {
        m.start("body") for part in SERVED.finditer(text) for m in BLOCK.finditer(text, part.start(), part.end())
    }
    found = [m for m in BLOCK.finditer(text) if m["kind"] == kind]
    return [m["body"] for m in found if (m.start("body") in section or ADDRESS in m["body"]) == served]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text()
    kinds = [m["kind"] for m in FENCE.finditer(text)][::2]
    assert all(kind in {"python", "bash", "json", "text"} for kind in kinds), kinds
    assert len(kinds) == len(BLOCK.findall(text))


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python_blocks(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks(page, "python")))
    ran = subprocess.run([sys.executable, script.name], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.docs
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=name)
def test_shell_blocks(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = [
        line
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", "").splitlines()
        if line.strip() and not line.startswith("#") and line.strip() not in RECURSIVE
    ]
    with contextlib.ExitStack() as stack:
        if sum("kvroute " in line for line in lines) > 2:
            stack.enter_context(warm_commands(tmp_path / "bin"))
        places = (tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"])
        environment = {**os.environ, "PATH": os.pathsep.join(map(str, places))}
        for line in lines:
            in_checkout = line.startswith(("make ", "python benchmarks/"))
            ran = subprocess.run(
                ["bash", "-c", line],
                cwd=ROOT if in_checkout else tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, f"{line}\n{ran.stdout[-1500:]}\n{ran.stderr[-1500:]}"
