"""What the workers are to read of a request behind a step: which tokens, from which blocks, and what to decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvroute.errors import InvalidInputError
from kvroute.serving.config import ServingConfig
from kvroute.serving.deciding import first_read
from kvroute.serving.kept_requests import BlockIds, KeptRequest
from kvroute.serving.messages import Array, Look, StepRequest

PIECE = 16
"""Tokens of an answer that are read at once, where they can wait."""


class Entries:
    """Makes the workers' entries of requests, and notes in each request what it has asked for.

    Args:
        config: the server's.
        block_sizes: tokens a block, by KV cache group.
        sif: SIF weight of every token ``[vocab]`` for an ``a``; None where no table can be had.
    """

    def __init__(self, config: ServingConfig, block_sizes: Sequence[int], sif: Callable[[float], Array] | None) -> None:
        self._config = config
        self._block_sizes = list(block_sizes)
        self._sif = sif

    def entry(
        self,
        request: str,
        state: KeptRequest,
        blocks: BlockIds | Callable[[], BlockIds],
        *,
        waits: bool = False,
        ends: bool = False,
        behind: int = 0,
    ) -> StepRequest | None:
        """What is to be read of a request.

        Args:
            request: its id.
            state: what is known of it.
            blocks: its blocks.
            waits: less than a piece of its answer is left for later.
            ends: it ended; nothing is decided any more.
            behind: newest tokens of its answer that are left for later.
        """
        stop = state.stop
        of = state.of if state.error is None else frozenset()
        chain = state.error is None and state.plan is not None and state.plan.chain is not None
        look, force = None, None
        if state.decided is not None and not ends:
            look, force = state.decided.due(state.tokens, stop, self._sif_of)
        begin = state.answer_start
        prompt = "prompt" in of and not state.pooled and stop >= state.prompt_len
        low = max(state.fed, state.prompt_len if begin is None else begin)
        high = max(low, stop - behind) if begin is not None and ("answer" in of or chain) else low
        if waits and not prompt and high - low < PIECE:
            high = low
        reads = prompt or high > low
        if not reads and look is None and force is None:
            return None
        window = min(state.window, low - begin) if reads and begin is not None else 0
        firsts = [0] if prompt else []
        firsts += [low - window] if high > low else []
        firsts += [self._first(look)] if look is not None else []
        first = min(firsts, default=stop)
        skip = tuple(first // size for size in self._block_sizes)
        held = blocks() if callable(blocks) else blocks
        entry = StepRequest(
            id=request,
            prompt_len=state.prompt_len,
            answer_start=state.prompt_len if begin is None else begin,
            low=low,
            high=high,
            prompt=prompt,
            skip=skip,
            blocks=tuple(list(b[s:]) for b, s in zip(held, skip, strict=True)),
            ask=None if state.sent or not reads else state.body,
            weights=self._weights(state, prompt, high > low, low - window, high) if reads else {},
            window=window,
            look=look,
            force=force,
        )
        state.seen = True
        if reads:
            state.sent, state.pooled = True, state.pooled or prompt
            if high > low:
                state.fed = high
        return entry

    def _first(self, look: Look) -> int:
        """First token that a look reads."""
        head = self._config.catalog.policy(look.policy).head
        head = head if head is None or look.mode is None else head.windows
        return 0 if head is None else first_read(head.spec, look.stop)

    def _sif_of(self, ids: Sequence[int], a: float) -> Array:
        if self._sif is None:
            raise InvalidInputError("This server has no tokenizer, so no frequencies for weights='sif'.")
        found = np.asarray(ids, dtype=np.int64)
        if (found < 0).any():
            raise InvalidInputError("The engine schedules ahead of its tokens, so weights='sif' has no token to weigh.")
        return self._sif(a)[found]

    def _weights(self, state: KeptRequest, prompt: bool, answer: bool, low: int, high: int) -> dict[float, Array]:
        """SIF weights: of answer tokens, or of a prompt and of the answer tokens that came in the same step."""
        due = ({"prompt"} if prompt else set()) | ({"answer"} if answer else set())
        wanted = {s.sif_a for of, s in state.vectors.values() if s.weights == "sif" and of in due}
        if not wanted:
            return {}
        high = high if answer else state.prompt_len
        low = 0 if prompt else low
        ids = state.tokens[low:high]
        if len(ids) < high - low:
            raise InvalidInputError("The engine schedules ahead of its tokens, so weights='sif' has no token to weigh.")
        return {a: self._sif_of(ids, a) for a in wanted}

    def reaches(self, blocks: BlockIds, stop: int) -> bool:
        """Whether blocks hold that many tokens."""
        return len(blocks) == len(self._block_sizes) and all(
            len(ids) * size >= stop for ids, size in zip(blocks, self._block_sizes, strict=True)
        )
