"""Blocking work, from an event loop: a call, and an iterator."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from kvroute.generation import CancelToken

T = TypeVar("T")


async def call_in_thread(work: Callable[..., T], arguments: Mapping[str, Any]) -> T:
    """Make a call in a thread. Cancelling the task ends the work.

    Args:
        work: takes the arguments, and ``cancel``.
        arguments: by name; a ``cancel`` among them ends the work too.
    """
    cancel = CancelToken(arguments.get("cancel"))
    try:
        return await asyncio.to_thread(work, **{**arguments, "cancel": cancel})
    except asyncio.CancelledError:
        cancel.cancel()
        raise


async def in_thread(items: Iterator[T], cancel: CancelToken) -> AsyncGenerator[T, None]:
    """Run an iterator in a thread of its own and give its items here.

    Args:
        items: the iterator; only the thread touches it.
        cancel: told when the reader leaves, so that the thread ends soon.

    Raises:
        whatever the iterator raises.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[T | None, BaseException | None]] = asyncio.Queue()

    def hand_over(item: T | None, error: BaseException | None) -> None:
        with suppress(RuntimeError):  # the loop may be gone
            loop.call_soon_threadsafe(pieces.put_nowait, (item, error))

    def work() -> None:
        end: BaseException = StopAsyncIteration()
        try:
            for item in items:
                hand_over(item, None)
        except BaseException as error:  # noqa: BLE001 - handed to the reader
            end = error
        hand_over(None, end)

    threading.Thread(target=work, name="kvroute-stream", daemon=True).start()
    try:
        while True:
            item, error = await pieces.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        cancel.cancel()
