"""Where a caller may put a hand on answers that are being written: tokens forced at the start and in flight.

An engine hands each batch to :meth:`Steer.open`. What comes back is asked once after the prefill which tokens follow
each prompt, and after every step which rows get tokens put into them. The cache is continued, so nothing is computed
twice (docs/concepts.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from kvroute.pooling import PoolingSpec

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class SteeredSession(Protocol):
    """What a steering sees of a batch. Rows are numbered within the batch."""

    def pooled(
        self,
        rows: Sequence[int],
        spec: PoolingSpec,
        *,
        start: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
    ) -> Vectors:
        """Pooled vectors ``[rows, dim]`` of what is in the cache: prompt, forced and written tokens.

        A token that was chosen but not run yet has no keys and values, so it is not in it.

        Args:
            rows: which.
            spec: how.
            start: by row the first token, the prompt's included in the count; 0 by default.
            stop: by row one past the last, at most :meth:`held`, which is the default.
        """
        ...

    def held(self, row: int) -> int:
        """Tokens of a row in the cache that :meth:`pooled` may read, prompt included."""
        ...

    def tokens_of(self, row: int) -> Sequence[int]:
        """The row's tokens behind its prompt so far, forced ones included."""
        ...

    def room(self, row: int) -> int:
        """How many more tokens the row may have."""
        ...

    def end(self, rows: Sequence[int]) -> None:
        """End some answers here, with ``finish_reason="cancelled"``."""
        ...


class Steering(Protocol):
    """Steers one batch."""

    def begin(self, session: SteeredSession, rows: Sequence[int]) -> list[list[int]]:
        """After the prefill: the tokens that follow each row's prompt. They count as its prompt.

        A row that is ended here gets none, and nothing is written for it.
        """
        ...

    def after(self, session: SteeredSession, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """After a step, for rows that go on and have no forced token left: tokens to put into some of them.

        An answer ends as ever where they fill ``max_tokens`` or complete a stop text.
        """
        ...


class Steer(Protocol):
    """Makes a steering for every batch that an engine forms."""

    @property
    def reserve(self) -> int:
        """The most tokens that ``begin`` puts behind a prompt."""
        ...

    def open(self, indices: Sequence[int]) -> Steering:
        """A steering for the prompts of these indices. One whose batch was given up (memory) is opened again."""
        ...
