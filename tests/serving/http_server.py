"""A real vLLM server on CPU, as a process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.serving.processes import ROOT, environment

CONNECTOR = {"kv_connector": "KVRouteConnector", "kv_role": "kv_producer"}
MIDDLEWARE = "kvroute.serving.middleware.KVRouteMiddleware"


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
        log: file for what the server prints; shown where it does not start.
        options: more of the server's.
        transfer: value of ``--kv-transfer-config``.
        name: that it serves the model under.
        patience: seconds that its start may take.

    Yields:
        its address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "512", "--dtype", "float32", "--max-num-seqs", "8"]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer), "--middleware", MIDDLEWARE]
    with log.open("wb") as out:
        process = subprocess.Popen([*command, *options], cwd=ROOT, env=environment(), stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, process, log, patience)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


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
