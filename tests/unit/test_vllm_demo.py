"""The vLLM demo's server: it is waited for, its last words are told, and it is stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import vllm_demo  # noqa: E402
from vllm_demo import Server  # noqa: E402

HEALTHY = """
import http.server, os, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[2]).write_text(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that starts a process of its own, as vLLM does."""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def a_server(port: int, told: Path) -> Server:
    return Server([sys.executable, "-c", HEALTHY, str(port), str(told)], f"http://127.0.0.1:{port}", 30)


def is_gone(process: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_it_and_what_it_started_are_stopped(port, tmp_path, error):
    told = tmp_path / "processes"
    server = a_server(port, told)
    with contextlib.nullcontext() if error is None else pytest.raises(error), server:
        server.start()
        if error is not None:
            raise error
    for process in map(int, told.read_text().split()):
        assert is_gone(process)
    server.stop()


def test_the_demo_stops_it_when_it_is_ended_itself(port, tmp_path):
    told = tmp_path / "processes"
    script = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'examples'), *sys.path]!r}\n"
        "import time, vllm_demo\n"
        f"vllm_demo.serve_command = lambda port: [sys.executable, '-c', {HEALTHY!r}, str(port), {str(told)!r}]\n"
        "def show(*_):\n    print('showing', flush=True)\n    time.sleep(60)\n"
        "vllm_demo.show = show\n"
        "sys.argv = ['vllm_demo']\n"
        "vllm_demo.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert any(line == "showing\n" for line in demo.stdout)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(20) == 128 + signal.SIGTERM
    for process in map(int, told.read_text().split()):
        assert is_gone(process)


def test_last_words_are_told(port):
    server = Server([sys.executable, "-c", "print('no such model'); raise SystemExit(3)"], f"http://127.0.0.1:{port}")
    with server, pytest.raises(RuntimeError, match=r"code 3:\s+no such model"):
        server.start()


def test_one_that_takes_too_long_is_told_and_stopped(port):
    server = Server([sys.executable, "-c", "import time; time.sleep(60)"], f"http://127.0.0.1:{port}", 1.0)
    with server:
        with pytest.raises(RuntimeError, match="within 1 seconds"):
            server.start()
        assert server._process is not None
        process = server._process.pid
    assert is_gone(process)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


class Client:
    """The stock client's way to a chat, with an answer given beforehand."""

    def __init__(self, content: str, said: dict | None) -> None:
        message = SimpleNamespace(content=content)
        answer = SimpleNamespace(
            choices=[SimpleNamespace(message=message)],
            model_extra={"kv_transfer_params": {"kvroute": said}},
            model_dump=lambda **_: {"id": "x"},
        )
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=lambda **_: answer))


def said(switch: dict | None = None, error: str | None = None) -> dict:
    decision = {"mode": "slow", "difficulty": 80.0, "switch": switch}
    return {"decision": decision, "tokens": {"answer": 9}, "error": error}


def test_an_answer_is_judged_behind_its_thought():
    question = SimpleNamespace(question="run", answer="7")
    thought = "<think>\n8\n</think>\n\n7"
    one = vllm_demo.ask(Client(thought, said()), "m", question, {})  # type: ignore[arg-type]
    assert (one.mode, one.difficulty, one.tokens, one.right) == ("slow", 80.0, 9, True)
    two = vllm_demo.ask(Client("8", said({"to": "fast", "token": 4})), "m", question, {})  # type: ignore[arg-type]
    assert (two.mode, two.right) == ("closed at 4", False)


@pytest.mark.parametrize("found", [None, said(error="The policy is off.")])
def test_a_server_without_kvroute_is_told(found):
    with pytest.raises(RuntimeError, match="kvroute did nothing"):
        vllm_demo.ask(Client("7", found), "m", SimpleNamespace(question="run", answer="7"), {})  # type: ignore[arg-type]
