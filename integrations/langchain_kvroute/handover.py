"""A decided prompt's cache on its way to the chat model of the branch that was chosen.

The router sets it around its branch; a chat model on the same engine takes it up, so that the prompt is computed once.
Contexts are copied into threads and tasks by LangChain and asyncio, and each call has its own: nothing is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kvroute import Decision, Prefix


@dataclass(frozen=True, slots=True)
class Handover:
    """What a router's branch may go on from.

    Attributes:
        engine: that made the cache; on another one it is of no use.
        prefix: the prompt's keys and values, or None where the engine keeps them itself.
        decision: which mode, and why.
    """

    engine: Any
    prefix: Prefix | None
    decision: Decision


_current: ContextVar[Handover | None] = ContextVar("kvroute_handover", default=None)


@contextmanager
def hand_over(handover: Handover | None) -> Iterator[None]:
    """Offer it to what runs within."""
    token = _current.set(handover)
    try:
        yield
    finally:
        _current.reset(token)


def handed_over(engine: Any) -> Handover | None:
    """What was offered to this engine, or None. A prompt that begins otherwise goes on from what it shares with it."""
    found = _current.get()
    return found if found is not None and found.engine is engine else None
