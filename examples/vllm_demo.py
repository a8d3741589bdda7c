"""One vLLM server that generates, routes, scores and embeds: what ``make demo-vllm`` runs.

Starts ``kvroute serve`` on the tiny thinker beside this file, with its policy, and talks to it as anybody would: with
the stock ``openai`` client. A dozen questions get as much thinking as each needs, beside always thinking; one answer's
JSON is shown as it came; and the same server embeds the questions. It is stopped at the end, whatever happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import openai
from rich.console import Console
from rich.json import JSON
from rich.panel import Panel
from rich.table import Table

from kvroute.checkers import check

THINKER = Path(__file__).parent / "tiny_thinker"
POLICY = "policy"
START_SECONDS = 600.0
AT_ONCE = 8
_SHOWN = 4000


class Server:
    """A server's process. As a context it is stopped at the end, with all processes that it started.

    Args:
        command: starts it.
        url: where it answers ``/health`` when it is ready.
        seconds: it may take for that.
    """

    def __init__(self, command: Sequence[str], url: str, seconds: float = START_SECONDS) -> None:
        self.command = list(command)
        self.url = url
        self.seconds = seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the server is stopped
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it, and wait until it is ready.

        Raises:
            RuntimeError: it ended, or took longer; with the last lines that it printed.
        """
        # vLLM's CPU build would take half of the machine's memory for its cache.
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
        self._process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        self._wait(self._process)

    def stop(self) -> None:
        """Ask it to end, and end what is left. A second call does nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._log.close()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"The server ended with code {process.returncode}:\n{self._last()}")
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
            except OSError:
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"The server was not ready within {self.seconds:g} seconds:\n{self._last()}")

    def _last(self) -> str:
        self._log.seek(0)
        return self._log.read()[-_SHOWN:].decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Routed:
    """One answer of the server's.

    Attributes:
        mode: it was written in, with the token of a switch.
        difficulty: read from the prompt; None where the mode was demanded.
        tokens: that were written.
        right: whether the answer is.
        body: of the whole answer.
    """

    mode: str
    difficulty: float | None
    tokens: int
    right: bool
    body: dict[str, Any]


def ask(client: openai.OpenAI, model: str, question: Any, wanted: dict[str, Any], max_tokens: int = 192) -> Routed:
    """Ask a question of the tiny thinker's, and tell what became of it.

    Raises:
        RuntimeError: the answer came without kvroute's part, or kvroute could do nothing.
    """
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question.question}],
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"kv_transfer_params": {"kvroute": wanted}},
    )
    said = ((answer.model_extra or {}).get("kv_transfer_params") or {}).get("kvroute")
    if not said or said["error"]:
        raise RuntimeError(f"kvroute did nothing for this answer: {said and said['error']}")
    decision = said["decision"]
    switch, mode = decision["switch"], decision["mode"]
    if switch is not None:
        mode = f"{'closed' if switch['to'] == 'fast' else 'opened'} at {switch['token']}"
    written = (answer.choices[0].message.content or "").rpartition("</think>")[2].strip()
    right = check(written, question.answer, "number").correct
    return Routed(
        mode,
        decision["difficulty"],
        said["tokens"]["answer"],
        bool(right),
        answer.model_dump(mode="json", exclude_unset=True),
    )


def show_routing(client: openai.OpenAI, model: str, console: Console, questions: Sequence[Any]) -> list[Routed]:
    """Send the questions under the policy and always slow, side by side on the server; print both."""
    asks: list[dict[str, Any]] = [{"policy": POLICY, "features": ["kv-coe", "length"]}, {"mode": "slow"}]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        both = [list(pool.map(lambda q, wanted=wanted: ask(client, model, q, wanted), questions)) for wanted in asks]
    table = Table(title=f"{len(questions)} questions under the policy, beside always slow", title_justify="left")
    table.add_column("question", max_width=13, no_wrap=True)
    for name in ("mode", "difficulty", "tokens", "right", "slow:\ntokens", "right"):
        table.add_column(name, justify="right", no_wrap=True, min_width=max(map(len, name.split("\n"))))
    marks = {True: "[green]yes[/green]", False: "[red]no[/red]"}
    for question, one, slow in zip(questions, *both, strict=True):
        difficulty = "" if one.difficulty is None else f"{one.difficulty:.0f}"
        table.add_row(
            question.question, one.mode, difficulty, str(one.tokens), marks[one.right], str(slow.tokens),
            marks[slow.right],
        )  # fmt: skip
    (tokens, right), (slow_tokens, slow_right) = (
        (sum(a.tokens for a in answers), sum(a.right for a in answers)) for answers in both
    )
    table.add_section()
    table.add_row("all", "", "", str(tokens), str(right), str(slow_tokens), str(slow_right))
    console.print(table)
    console.print(
        f"{slow_tokens - tokens} of {slow_tokens} tokens saved ({1 - tokens / slow_tokens:.0%}). The difficulty was "
        "read from each prompt's pages in the server's KV cache, while all of them were served in one batch.\n"
    )
    return both[0]


def show_json(console: Console, answer: Routed) -> None:
    """Print an answer as it came over the wire."""
    console.print(Panel(JSON(json.dumps(answer.body)), title="an answer's JSON", title_align="left", expand=False))


def show_embeddings(client: openai.OpenAI, model: str, console: Console, questions: Sequence[Any]) -> None:
    """Embed the questions on the same server, and print who is nearest to whom."""
    texts = [q.question for q in questions]
    answer = client.embeddings.create(model=model, input=texts)
    vectors = np.array([entry.embedding for entry in answer.data], dtype=np.float32)
    centred = vectors - vectors.mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    similarity = centred @ centred.T
    np.fill_diagonal(similarity, -1)
    table = Table(title=f"Embeddings, {vectors.shape[1]} dimensions, from the same server", title_justify="left")
    table.add_column("question", max_width=31, no_wrap=True)
    table.add_column("nearest", max_width=31, no_wrap=True)
    table.add_column("cosine", justify="right", min_width=len("cosine"))
    for i in range(min(4, len(texts))):
        j = int(similarity[i].argmax())
        table.add_row(texts[i], texts[j], f"{similarity[i, j]:.2f}")
    console.print(table)
    console.print(f"{answer.usage.prompt_tokens} tokens read. Cosines are of mean-free vectors.")


def questions_of(count: int, seed: int) -> list[Any]:
    """Questions that the tiny thinker was trained for, with their answers."""
    sys.path.insert(0, str(THINKER))
    from questions import make_question

    rng = random.Random(seed)
    return [make_question(rng) for _ in range(count)]


def show(url: str, console: Console, count: int, seed: int) -> None:
    """All that there is to see of a server."""
    questions = questions_of(count, seed)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        model = client.models.list().data[0].id
        routed = show_routing(client, model, console, questions)
        show_json(console, next((a for a in routed if " at " in a.mode), routed[0]))
        show_embeddings(client, model, console, questions)


def serve_command(port: int) -> list[str]:
    """Starts the server; ``kvroute serve`` prints the plain vLLM command behind it."""
    return [
        *(sys.executable, "-m", "kvroute.cli", "serve", str(THINKER / "model"), "--policy", str(THINKER)),
        *("--name", "tiny-thinker", "--port", str(port), "--dtype", "float32"),
        "--enforce-eager",
    ]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)  # the server is stopped on the way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    parser.add_argument("--url", help="of such a server that runs already, e.g. http://127.0.0.1:8000")
    arguments = parser.parse_args()
    console = Console()
    if arguments.url:
        show(arguments.url.rstrip("/"), console, arguments.questions, arguments.seed)
        return
    signal.signal(signal.SIGTERM, _leave)
    port = _free_port()
    command = serve_command(port)
    console.print("kvroute " + " ".join(command[3:]), style="dim", soft_wrap=True, highlight=False)
    began = time.monotonic()
    try:
        with Server(command, f"http://127.0.0.1:{port}") as server:
            with console.status("Starting vLLM; on a CPU this takes a minute or two"):
                server.start()
            console.print(f"The server is ready after {time.monotonic() - began:.0f} s.\n")
            show(server.url, console, arguments.questions, arguments.seed)
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    console.print("\nThe server is stopped.")


if __name__ == "__main__":
    main()
