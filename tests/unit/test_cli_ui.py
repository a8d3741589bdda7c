"""``kvroute ui``: what it refuses before anything is served, and that it serves."""

from __future__ import annotations

import builtins
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvroute.ui.demo import THINKER_QUESTIONS, demo_folder
from tiny_models import build_model, build_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A model without a chat template: how it thinks is not known."""
    build_model("llama").save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_port_that_is_taken(run: Run) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("ui", "--port", taken.getsockname()[1])
    assert code == 2
    assert "Can't listen" in err
    assert "--port" in err


def test_labels_without_a_head(run: Run, plain: str) -> None:
    code, _, err = run("ui", "--model", plain, "--labels", "nothing.jsonl", "--port", 0)
    assert code == 2
    assert "need a head" in err


def test_a_policy_for_a_model_that_does_not_think(run: Run, plain: str) -> None:
    code, _, err = run("ui", "--model", plain, "--policy", "slow", "--port", 0)
    assert code == 2
    assert "think" in err


def test_without_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "uvicorn":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    code, _, err = run("ui", "--port", 0)
    assert code == 2
    assert "pip install 'kvroute[ui]'" in err


def test_the_demo_is_the_checkouts_thinker() -> None:
    folder = demo_folder()
    assert folder is not None
    assert (folder / "confidence" / "head.json").is_file()
    assert THINKER_QUESTIONS


def test_it_serves_and_ends_at_ctrl_c(plain: str) -> None:
    """Such a model is served without routing; an interrupt ends it quietly."""
    command = [sys.executable, "-m", "kvroute.cli", "ui", "--model", plain, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            line = served.stdout.readline()
            place = line.split(" at ")[1].split(" ")[0]
            about = json.load(urllib.request.urlopen(f"{place}api/about", timeout=20))
            assert about["policy"] is None
            assert "how it thinks is not known" in about["no_router"]
        finally:
            served.send_signal(signal.SIGINT)
            _, err = served.communicate(timeout=20)
    assert "Traceback" not in err, err
