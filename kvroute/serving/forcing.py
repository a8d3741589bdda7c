"""Tokens that are forced into answers: put on a board by the worker's side, taken off it by the logits processor.

Places are counted in the answer's tokens, so that a row that is asked again (a chunk of a prompt, an answer that is
computed anew after a preemption) gets the same token again. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

REQUEST_KEY: Final = "kvroute_rid"
"""Key in ``SamplingParams.extra_args`` under which the connector tells the logits processor a request's id. Only it
sets it: what a client sends under this name is removed."""


class Board:
    """What is forced, by request.

    Attributes:
        readers: logits processors that look at it; with none, nothing that is put here has any effect.
        faults: exceptions in the logits processor that nobody was told of yet.
    """

    def __init__(self) -> None:
        self.readers = 0
        self.faults = 0
        self._forced: dict[str, dict[int, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        """Requests that something is forced into."""
        return len(self._forced)

    def put(self, request: str, first: int, tokens: Sequence[int]) -> None:
        """Force tokens into an answer from its token ``first`` on (0 is the first behind the prompt)."""
        if tokens:
            self._forced.setdefault(request, {})[first] = tuple(tokens)

    def drop(self, request: str) -> None:
        """Forget a request."""
        self._forced.pop(request, None)

    def token(self, request: str, place: int) -> int | None:
        """The token forced at a place of an answer, or None."""
        for first, tokens in self._forced.get(request, {}).items():
            if first <= place < first + len(tokens):
                return tokens[place - first]
        return None


BOARD: Final = Board()
"""That of this process: a worker and its logits processor are in one."""
