"""Requests sent to a real server and timed, and what its processes take: shared by the scripts that start one."""

from __future__ import annotations

import http.client
import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

Seconds = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Streamed:
    """What one streamed request gave.

    Attributes:
        tokens: of its answer, as the server counts them.
        result: what kvroute said, or None.
        arrivals: seconds from the request to each chunk with text, and to the end of the stream.
    """

    tokens: int
    result: dict[str, Any] | None
    arrivals: list[float] = field(default_factory=list)

    def first(self) -> float:
        """Seconds to the first token."""
        return self.arrivals[0]

    def between(self) -> Seconds:
        """Seconds between two chunks with text."""
        return np.diff(self.arrivals[:-1])


def stream(url: str, body: Mapping[str, Any]) -> Streamed:
    """One completion, streamed.

    Args:
        url: of the server.
        body: of the request, without ``stream``.

    Raises:
        RuntimeError: the server answered with an error.
    """
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
    asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    began = time.perf_counter()
    connection.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(answer.read().decode())
    found = Streamed(0, None)
    for chunk in _events(answer):
        if chunk.get("choices"):
            found.tokens += 1
            found.arrivals.append(time.perf_counter() - began)
        if chunk.get("usage"):
            found.tokens = int(chunk["usage"]["completion_tokens"])
        found.result = (chunk.get("kv_transfer_params") or {}).get("kvroute", found.result)
    found.arrivals.append(time.perf_counter() - began)
    connection.close()
    return found


def stream_all(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Streamed]:
    """All at once, one thread a request."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(lambda body: stream(url, body), bodies))


def step_seconds(found: Sequence[Streamed]) -> Seconds:
    """Seconds of each step, as the requests that began together saw it: until the first token, between tokens, and
    until the end. Those that got two tokens in one chunk are left out."""
    length = max(len(one.arrivals) for one in found)
    whole = [one.arrivals for one in found if len(one.arrivals) == length]
    return np.diff(np.median(whole, axis=0), prepend=0.0)


def undisturbed(runs: Sequence[Seconds] | Seconds) -> float:
    """Seconds of a run whose steps each take the lower quartile of their times over all runs."""
    return float(np.percentile(np.stack(runs), 25, axis=0).sum())


def _events(lines: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[len(b"data: ") :])


def metric(url: str, name: str) -> float:
    """A metric of a server, summed over its labels; 0 where there is none."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def processes_below(parent: int) -> list[int]:
    """A process and all that it started, by id."""
    found, waiting = [], [parent]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            waiting += map(int, task.read_text().split())
    return found


def cpu_seconds(processes: Sequence[int]) -> float:
    """That processes and their threads have run so far (Linux)."""
    total = 0
    for process in processes:
        for task in Path(f"/proc/{process}/task").glob("*/schedstat"):
            total += int(task.read_text().split()[0])
    return total / 1e9
