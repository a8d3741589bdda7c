"""``kvroute`` commands without their start, for pages with many: a process that has imported all forks for each.

A command has its own words, folder, environment, streams and exit code, as the installed one has; only the imports of
torch and transformers are paid once. The installed command itself is run by ``tests/real/test_cli.py``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIM = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as place:
    place.connect({address!r})
    asked = json.dumps({{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}).encode()
    socket.send_fds(place, [len(asked).to_bytes(4, "big") + asked], [0, 1, 2])
    code = place.recv(1)
sys.exit(code[0] if code else "kvroute ended without an exit code.")
"""
"""What stands for ``kvroute`` in ``PATH``."""
IMPORTED = (
    *("transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.models.llama.modeling_llama", "kvroute.embedder", "kvroute.engines.transformers_engine"),
)
"""By every command that reads a model."""


@contextlib.contextmanager
def warm_commands(folder: Path) -> Iterator[None]:
    """Write a ``kvroute`` to ``folder`` that starts at once, and serve it."""
    folder.mkdir()
    address = str(folder / "warm")
    shim = folder / "kvroute"
    shim.write_text(SHIM.format(python=sys.executable, address=address))
    shim.chmod(0o755)
    command = [sys.executable, "-m", "tests.warm_commands", address]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            server.terminate()


def serve(address: str) -> None:
    """Take commands until this process is ended."""
    from kvroute.cli import main

    for name in IMPORTED:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended commands are not waited for
    with socket.socket(socket.AF_UNIX) as place:
        place.bind(address)
        place.listen()
        print("ready", flush=True)
        while True:
            connection, _ = place.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(connection, main)
            connection.close()


def answer(connection: socket.socket, main: object) -> None:
    """Run one command in this process, tell its exit code, and end."""
    assert callable(main)
    code = 1
    try:
        data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        size = int.from_bytes(data[:4], "big")
        while len(data) < 4 + size:
            data += connection.recv(1 << 16)
        asked = json.loads(data[4:])
        for at, stream in enumerate(streams):
            os.dup2(stream, at)
            os.close(stream)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["kvroute", *asked["words"]]
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        connection.sendall(bytes([code & 255]))
        os._exit(code & 255)


if __name__ == "__main__":
    serve(sys.argv[1])
