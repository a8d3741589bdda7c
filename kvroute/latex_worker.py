"""The process behind :mod:`kvroute.latex_checker`: reads pairs, one JSON object a line, and says whether they agree."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys

_MEMORY = 2 << 30


def main() -> None:
    """Answer requests until standard input ends."""
    logging.disable()  # math-verify warns that its own limits are off
    math_verify = importlib.import_module("math_verify")
    parse, verify = math_verify.parse, math_verify.verify

    out = sys.stdout
    sys.stdout = sys.stderr  # whatever sympy prints is no reply
    _limit_memory()
    out.write("ready\n")
    out.flush()
    for line in sys.stdin:
        request = json.loads(line)
        _limit_time(request["seconds"])
        same = read = False
        try:
            # In prose math-verify looks for the expression itself; a formula is parsed as a whole.
            text = request["found"] if request["prose"] else f"${request['found']}$"
            found, answer = (parse(t, parsing_timeout=None) for t in (text, f"${request['answer']}$"))
            read = bool(found)
            same = bool(found and answer) and verify(answer, found, timeout_seconds=None)
        except (Exception, RecursionError, MemoryError):  # noqa: BLE001 - sympy raises anything on what it can't do
            pass
        out.write(json.dumps({"same": same, "read": read}) + "\n")
        out.flush()


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard), hard))


def _limit_time(seconds: float) -> None:
    """The system kills this process when its processor time is spent, also one whose checker is gone."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), hard))


if __name__ == "__main__":
    main()
