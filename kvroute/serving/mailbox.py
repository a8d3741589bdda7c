"""Where results from the engine meet those who wait for them, in the process that answers clients.

The engine's core sends every finished request's result with its statistics (see :mod:`kvroute.serving.metrics`),
whatever way the request ended. Who expects a result says so before the request is made; what nobody expects is
dropped, so nothing piles up.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

WAITS: Final = "kvroute-waits"
"""In a request's id: who made it waits for the mailbox's result, so that it may come a step after the answer's end."""
_log = logging.getLogger(__name__)
_CHILD = re.compile(r"(\d+)_(.+)", re.DOTALL)
_SUFFIX = re.compile(r"-[0-9a-f]{8}\Z")


class Slot:
    """Results that one caller waits for; a context that ends the waiting. Make one with :meth:`Mailbox.expect`.

    Attributes:
        results: (place of the request's id among those expected, number of the sample) to the result's dict.
    """

    def __init__(self, mailbox: Mailbox, ids: Sequence[str], each: int) -> None:
        self.results: dict[tuple[int, int], dict[str, Any]] = {}
        self._mailbox = mailbox
        self._places = {id: place for place, id in enumerate(ids)}
        self._wanted = len(self._places) * each
        self._loop = asyncio.get_running_loop()
        self._full = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait no more; a second call does nothing."""
        self._mailbox._forget(self._places, self)

    async def wait(self, seconds: float) -> bool:
        """Wait until all results are there; False where some were still missing after ``seconds``."""
        try:
            await asyncio.wait_for(self._full.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _put(self, id: str, sample: int, result: dict[str, Any]) -> None:
        self.results[self._places[id], sample] = result
        if len(self.results) >= self._wanted:
            try:
                self._loop.call_soon_threadsafe(self._full.set)
            except RuntimeError:  # the loop of who waited is closed
                self.close()


class Mailbox:
    """Results by the id that a request was made with.

    Attributes:
        connected: whether an engine of this process sends its statistics here.
        partial: whether it sends some of them to other processes: several API servers share it.
        on_fault: counts a fault, by its kind, of who brings results to clients; None where nothing is counted.
    """

    def __init__(self) -> None:
        self.connected = False
        self.partial = False
        self.on_fault: Callable[[str], None] | None = None
        self._lock = threading.Lock()
        self._slots: dict[str, Slot] = {}

    def expect(self, ids: Sequence[str], each: int = 1) -> Slot:
        """Expect results. Call it in the event loop that will wait, before the requests are made.

        Args:
            ids: as given to the engine, one a prompt; they must be nobody else's, so hold something random.
            each: samples of every prompt (``n``).
        """
        slot = Slot(self, ids, each)
        with self._lock:
            for id in ids:
                self._slots[id] = slot
        return slot

    def put(self, request: str, result: dict[str, Any]) -> None:
        """A result arrived.

        Args:
            request: the engine's own id: ``ID-xxxxxxxx`` for what was made as ``ID``, ``i_ID-xxxxxxxx`` for sample i.
            result: see :mod:`kvroute.serving.answers`.
        """
        with self._lock:
            found = next(((s, id, self._slots[id]) for s, id in _candidates(request) if id in self._slots), None)
        if found is not None:
            sample, id, slot = found
            slot._put(id, sample, result)

    def fault(self, kind: str) -> None:
        """A result could not be brought to its client: count it, where the engine's statistics are on."""
        if self.on_fault is not None:
            try:
                self.on_fault(kind)
            except Exception:  # noqa: BLE001 - an answer is on its way
                _log.warning("kvroute could not count a fault.", exc_info=True)

    @property
    def waiting(self) -> int:
        """Ids that results are expected for."""
        return len(self._slots)

    def _forget(self, ids: Iterable[str], slot: Slot) -> None:
        with self._lock:
            for id in ids:
                if self._slots.get(id) is slot:
                    del self._slots[id]


def deliver(results: Mapping[str, dict[str, Any]], mailbox: Mailbox | None = None) -> int:
    """Put results by the engine's ids into the process's mailbox. Raises nothing; returns how many could not be put."""
    box = MAILBOX if mailbox is None else mailbox
    failed = 0
    for request, result in results.items():
        try:
            box.put(request, result)
        except Exception:  # noqa: BLE001 - it runs in the loop that hands out everybody's answers
            failed += 1
            _log.warning("kvroute could not deliver a result.", exc_info=True)
    return failed


def _candidates(request: str) -> list[tuple[int, str]]:
    """What an engine's id may have been made from; its random suffix can be turned off."""
    found = [(0, _SUFFIX.sub("", request)), (0, request)]
    child = _CHILD.fullmatch(request)
    if child is not None:
        sample, rest = int(child[1]), child[2]
        found = [(sample, _SUFFIX.sub("", rest)), (sample, rest), *found]
    return found


MAILBOX: Final = Mailbox()
"""Of this process."""
