"""An event loop in a thread of its own, for the link to an engine: it ends with whoever made it, asked to or not."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Final, TypeVar

from kvroute.errors import InvalidInputError

if TYPE_CHECKING:
    from kvroute.serving.link import Link

T = TypeVar("T")
_PATIENCE: Final = 10.0
"""Seconds that the end of a link may take where nobody waits for it on purpose."""


class Background:
    """Runs coroutines for callers in any thread.

    Args:
        owner: when it is garbage, or the interpreter ends, the link is closed and the thread ends too. Nothing in here
            may hold it.

    Attributes:
        link: to be closed at the end; None until there is one.
    """

    def __init__(self, owner: object) -> None:
        self.link: Link | None = None
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvroute-vllm", daemon=True)
        self._thread.start()
        weakref.finalize(owner, self.close, _PATIENCE)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin a coroutine.

        Raises:
            InvalidInputError: it is closed.
        """
        if self._closed or threading.current_thread() is self._thread:
            work.close()
            raise InvalidInputError("The client is closed.", hint="Make a new one.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, patience: float | None = None) -> None:
        """Close the link and end the thread. Closing twice does nothing.

        Args:
            patience: seconds that the link has for its end; None waits for it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if threading.current_thread() is self._thread:  # garbage was found in the loop, which can't wait for itself
            self._loop.create_task(self._end())
            return
        try:
            if self.link is not None:
                asyncio.run_coroutine_threadsafe(self.link.close(), self._loop).result(patience)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._loop.close()

    async def _end(self) -> None:
        try:
            if self.link is not None:
                await self.link.close()
        finally:
            self._loop.stop()
