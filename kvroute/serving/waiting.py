"""Waiting for requests in an event loop: many together, or until somebody cancels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from kvroute.generation import CancelToken, Timings

T = TypeVar("T")
_TICK = 0.02
"""Seconds between two looks at a cancel token."""


async def together(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await end(*tasks)


async def unless(cancel: CancelToken | None, work: Coroutine[Any, Any, T]) -> T | None:
    """The work's result, or None where it was cancelled before; then its connection is closed."""
    if cancel is None:
        return await work
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            if cancel.cancelled:
                return None
            await asyncio.wait([task], timeout=_TICK)
        return task.result()
    finally:
        await end(task)


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def timings(began: float, first: float | None) -> Timings:
    """What a client sees: from ``began`` to the first piece, and from there to now."""
    now = time.monotonic()
    start = began if first is None else first
    return Timings(start - began, now - start, 0.0)
