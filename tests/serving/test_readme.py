"""The README's section "Inside vLLM", blocks of other pages that name a server, the demo and the stock client's
example, against the server that the README starts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.http_server import free_port
from tests.serving.processes import ROOT, environment
from tests.test_docs import ADDRESS, PAGES, blocks, name

sys.path.insert(0, str(ROOT / "examples"))

import vllm_demo

pytestmark = pytest.mark.vllm
README = ROOT / "README.md"


def run(arguments: list[str], folder: Path) -> str:
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment(), capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader has the examples and nothing else."""
    found = tmp_path_factory.mktemp("reader")
    (found / "examples").symlink_to(ROOT / "examples")
    return found


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Of the server that the README starts, but for its port."""
    [block] = blocks(README, "bash", served=True)
    words = shlex.split(block)
    assert words[:2] == ["kvroute", "serve"]
    port = str(free_port())
    command = [sys.executable, "-m", "kvroute.cli", *words[1:], "--port", port, "--enforce-eager"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        patch.chdir(folder)
        with vllm_demo.Server(command, f"http://127.0.0.1:{port}", 400) as server:
            server.start()
            yield server.url


def test_blocks_with_the_server(url, folder):
    found = [b for b in blocks(README, "python", served=True) if "VLLMEngine" not in b]
    assert len(found) == 2
    text = "\n".join(found)
    assert ADDRESS in text
    (folder / "page.py").write_text(text.replace(ADDRESS, url))
    printed = run(["page.py"], folder).splitlines()
    assert any(re.match(r"\{'value': -?\d.* 'reason': None\} \{'prompt': \d+, 'answer': \d+", line) for line in printed)
    assert printed[-1].startswith("(1, ")


@pytest.mark.parametrize("page", [p for p in PAGES if p != README and blocks(p, "python", served=True)], ids=name)
def test_blocks_of_other_pages(page, url, folder):
    script = folder / f"{page.stem}.py"
    script.write_text("\n\n".join(blocks(page, "python", served=True)).replace(ADDRESS, url))
    assert run([script.name], folder).strip()


def test_the_demo(url, folder):
    printed = run([str(ROOT / "examples" / "vllm_demo.py"), "--url", url, "--questions", "4"], folder)
    assert "4 questions under the policy" in printed
    assert '"kv_transfer_params"' in printed
    assert "Embeddings" in printed


def test_the_stock_clients_example(url, folder):
    printed = run([str(ROOT / "examples" / "vllm_openai_client.py"), url], folder)
    modes = re.findall(r"^ +\d+\.\d (fast|slow) +(\d+) tokens: \S", printed, re.MULTILINE)
    assert len(modes) == 2, printed
    assert re.search(r"kv_coe_r_token -?\d+\.\d{3}\n", printed)
    assert re.search(r"\n  difficulty \d+\.\d, in the last chunk\nEmbeddings of \d+ numbers", printed)


def test_the_engine_in_this_process(folder):
    [block] = [b for b in blocks(README, "python", served=True) if "VLLMEngine" in b]
    (folder / "engine.py").write_text(block)
    assert run(["engine.py"], folder).strip()
