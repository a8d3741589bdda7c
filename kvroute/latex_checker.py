"""Mathematical answers by math-verify, in a process of their own that is killed when it takes too long.

Parsing and comparing run sympy, which can take forever or all memory on a short input, and within which no signal
and no thread is sure to be heard. So a worker process does it: it has a limit on memory and on processor time, and
the checker stops it after some seconds by the clock whatever it does.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import queue
import re
import subprocess
import sys
import threading
from typing import Any

from kvroute.answer_reading import final_part
from kvroute.checkers import CheckResult
from kvroute.errors import InvalidInputError, KVRouteError, MissingExtraError

TIME_LIMIT = 5.0
"""Seconds of processor time for one answer, so that a busy machine changes no result."""
_PATIENCE = 4
"""By the clock, how many times as long a worker may take before it is stopped from outside."""
_START_LIMIT = 120.0
"""Seconds for the worker to import sympy, on a busy machine."""
_MAX_ANSWER = 2000
"""An answer of more characters is no answer."""
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORD = re.compile(r"(?<!\\)(?<![A-Za-z])[A-Za-z]{3,}")


class LatexChecker:
    """Compares mathematical answers. One at a time; threads wait for each other.

    Args:
        time_limit: seconds of processor time for one answer, in whole seconds rounded up; after that, or after four
            times as long by the clock, it is unreadable and wrong.

    Raises:
        MissingExtraError: math-verify is not installed.
        InvalidInputError: a limit that is not positive.
    """

    def __init__(self, time_limit: float = TIME_LIMIT) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise MissingExtraError("math-verify", "eval")
        if not time_limit > 0:
            raise InvalidInputError(f"The time limit is a positive number of seconds, not {time_limit}.")
        self.time_limit = time_limit
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    def __call__(self, text: str, answer: str) -> CheckResult:
        """Whether a text's final answer equals the expected one.

        Raises:
            InvalidInputError: the expected answer is empty.
        """
        if not answer.strip():
            raise InvalidInputError("The expected answer is empty.")
        found, marked, prose = final_math(text)
        if found is None or len(found) > _MAX_ANSWER:
            return CheckResult.unreadable()
        if normal(found) == normal(answer):
            return CheckResult(found, True, True)
        reply = self._ask({"found": found, "answer": answer, "prose": prose})
        if reply is None:
            return CheckResult.unreadable()
        readable = bool(reply["read"] or marked)
        return CheckResult(found if readable else None, bool(reply["same"]), readable)

    def close(self) -> None:
        """End the worker."""
        with self._lock:
            self._stop()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's reply, or None if it took too long or died of the request."""
        with self._lock:
            worker = self._worker if self._worker is not None and self._worker.poll() is None else self._start()
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps(request | {"seconds": self.time_limit}) + "\n")
                worker.stdin.flush()
                line = self._lines.get(timeout=_PATIENCE * self.time_limit)
                if line is not None:
                    reply: dict[str, Any] = json.loads(line)
                    return reply
            except (queue.Empty, OSError, ValueError):
                pass
            self._stop()
            return None

    def _start(self) -> subprocess.Popen[str]:
        self._stop()
        worker = subprocess.Popen(
            [sys.executable, "-m", "kvroute.latex_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert worker.stdout is not None
            try:
                for line in worker.stdout:
                    lines.put(line)
            except (OSError, ValueError):
                pass
            lines.put(None)

        threading.Thread(target=read, daemon=True, name="kvroute-latex").start()
        self._worker, self._lines = worker, lines
        try:
            ready = lines.get(timeout=_START_LIMIT)
        except queue.Empty:
            ready = None
        if ready is None:
            self._stop()
            raise KVRouteError(
                "The process that compares mathematical answers did not start.",
                hint="Run `python -m kvroute.latex_worker` to see why.",
            )
        atexit.register(_kill, worker)
        return worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            _kill(worker)
            atexit.unregister(_kill)


def _kill(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not flushed goes nowhere
                pipe.close()


_shared: LatexChecker | None = None
_shared_lock = threading.Lock()


def check_latex(text: str, answer: str) -> CheckResult:
    """Mathematical answers, by a worker that all callers share. See :class:`LatexChecker`."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = LatexChecker()
    return _shared(text, answer)


def final_math(text: str) -> tuple[str | None, bool, bool]:
    r"""The final expression of a text: the last ``\boxed{}``, what follows "The answer is", the last formula, the last
    line.

    Returns:
        it, or None; whether something marks it as the answer; and whether it may hold words beside the expression.
    """
    part = final_part(text)
    stated = part.text.strip()
    if not stated:
        return None, False, False
    if part.how == "boxed":
        return stated, True, False
    formulas = [next(g for g in groups if g) for groups in _MATH.findall(stated)]
    if part.how == "phrase":
        chosen = (formulas[0] if formulas else stated.strip("*: ")).strip()
        return chosen, True, not formulas and _WORD.search(chosen) is not None
    if formulas:
        return formulas[-1].strip(), False, False
    return stated.splitlines()[-1].strip(), False, True


def normal(text: str) -> str:
    """An expression without what says nothing: spaces, ``\\left``, ``\\text``, dollar signs, a full stop."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right|!|,|;|:| |\$|quad|qquad)|[\s$]", "", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").rstrip(".")
