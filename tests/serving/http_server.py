"""A real vLLM server on CPU, as a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.serving.processes import ROOT, environment

CONNECTOR = {"kv_connector": "KVRouteConnector", "kv_role": "kv_producer"}
MIDDLEWARE = "kvroute.serving.middleware.KVRouteMiddleware"


@dataclass
class Running:
    """A server's address and process."""

    url: str
    process: subprocess.Popen[bytes]
    ended: bool = False

    def end(self) -> None:
        """End it with all its processes; nothing happens the second time, when its id may be another's."""
        if self.ended:
            return
        self.ended = True
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(ProcessLookupError):  # a server that was killed leaves its engine behind
            os.killpg(self.process.pid, signal.SIGKILL)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def vllm_command(model: Path, port: int, *, name: str) -> list[str]:
    """vLLM's own server of a model, with short texts and few requests."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    return [*command, "--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8"]


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, *, patience: float = 240.0) -> Iterator[Running]:
    """A server's process from when it answers on; ended whatever happens.

    Args:
        command: starts it.
        port: that it listens on.
        log: file for what it prints; shown where it does not start.
        patience: seconds that its start may take.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out, start_new_session=True)
    server = Running(f"http://127.0.0.1:{port}", process)
    try:
        _wait(server.url, process, log, patience)
        yield server
    finally:
        server.end()


@contextlib.contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    transfer: Mapping[str, Any] | None = CONNECTOR,
    name: str = "model",
    patience: float = 240.0,
) -> Iterator[str]:
    """Serve a model with kvroute and its middleware, or vLLM alone where ``transfer`` is None.

    Args:
        model: folder of the model.
        log, patience: as :func:`running`.
        options: more of the server's.
        transfer: value of ``--kv-transfer-config``.
        name: that it serves the model under.

    Yields:
        its address.
    """
    port = free_port()
    command = vllm_command(model, port, name=name)
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer), "--middleware", MIDDLEWARE]
    with running([*command, *options], port, log, patience=patience) as server:
        yield server.url


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError(log.read_text()[-6000:])
