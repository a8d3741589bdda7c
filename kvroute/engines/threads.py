"""A blocking iterator, read from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import TypeVar

from kvroute.generation import CancelToken

T = TypeVar("T")


async def in_thread(items: Iterator[T], cancel: CancelToken) -> AsyncIterator[T]:
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
