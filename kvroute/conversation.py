"""A conversation: every turn decides anew how hard to think, and goes on from the last turn's cache."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvroute.decisions import Routed, RoutedChunk
from kvroute.engines.threads import call_in_thread, in_thread
from kvroute.generation import CancelToken, Message

if TYPE_CHECKING:
    from kvroute.engines.prefix import Prefix
    from kvroute.router import Router


class Conversation:
    """Turns of a user and a router.

    A turn keeps the mode of the turn before unless its difficulty lies beyond a threshold by the policy's ``margin``,
    so that modes do not flap. The cache of each turn is kept, and the next turn computes only what is new: everything
    from the first token on in which its prompt differs. Chat templates leave out the thoughts of earlier turns, so the
    last answer is usually among it, and all before it is not. Models with recurrent layers can't go on from a token
    in the middle: they compute every prompt anew, with the same result.

    One turn at a time: a conversation is not for several threads at once. Its caches take memory until
    :meth:`reset`, or until it is dropped.

    Args:
        router: that answers.
        system: the system message, or None.
        messages: turns to begin with.
        reuse: whether the turns' caches are kept.
        template: further variables of the chat template, such as ``tools``.
    """

    def __init__(
        self,
        router: Router,
        system: str | None = None,
        *,
        messages: Sequence[Message] = (),
        reuse: bool = True,
        template: Mapping[str, Any] | None = None,
    ) -> None:
        self.router = router
        self.reuse = reuse
        self.template = template
        self._first: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._first += [dict(m) for m in messages]
        self._messages = list(self._first)
        self._last: str | None = None
        self._prefix: Prefix | None = None

    def __repr__(self) -> str:
        return f"Conversation({self.router!r}, {len(self._messages)} messages)"

    @property
    def messages(self) -> list[dict[str, Any]]:
        """All messages so far (a copy). Answers stand in it without their thoughts."""
        return [dict(m) for m in self._messages]

    @property
    def last_mode(self) -> str | None:
        """The mode that the last turn began in, or None before the first."""
        return self._last

    @property
    def kept(self) -> int:
        """Tokens whose keys and values are kept."""
        return 0 if self._prefix is None else len(self._prefix.token_ids)

    def reset(self) -> None:
        """Back to the messages it began with, without mode and cache."""
        self._messages = list(self._first)
        self._last = None
        self._prefix = None

    def say(self, text: str, **kwargs: Any) -> Routed:
        """One turn.

        Args:
            text: the user's message.
            kwargs: as in :meth:`kvroute.Router.generate`.

        Returns:
            the answer. ``usage.cached`` are the prompt's tokens that were taken over from the turns before.

        Raises:
            As the router's ``generate``; the conversation is then as it was.
        """
        asked = self._asked(text)
        return self._record(asked, self.router.generate(asked, **self._how(kwargs)))

    def stream(self, text: str, **kwargs: Any) -> Iterator[RoutedChunk]:
        """:meth:`say`, piece by piece. A turn whose iterator is left before its end is not kept."""
        asked = self._asked(text)
        chunks = self.router.stream(asked, **self._how(kwargs))
        return self._pieces(asked, chunks)

    async def asay(self, text: str, **kwargs: Any) -> Routed:
        """:meth:`say` in a thread. Cancelling the task ends the work, and the turn is not kept."""
        asked = self._asked(text)
        routed = await call_in_thread(lambda **how: self.router.generate(asked, **how), self._how(kwargs))
        return self._record(asked, routed)

    async def astream(self, text: str, **kwargs: Any) -> AsyncIterator[RoutedChunk]:
        """:meth:`stream` in a thread."""
        asked = self._asked(text)
        cancel = CancelToken(kwargs.pop("cancel", None))
        chunks = self.router.stream(asked, cancel=cancel, **self._how(kwargs))
        async for chunk in in_thread(chunks, cancel):
            yield self._noted(asked, chunk)

    # ------------------------------------------------------------------ parts

    def _asked(self, text: str) -> list[dict[str, Any]]:
        return [*self._messages, {"role": "user", "content": text}]

    def _how(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        how = {"last": self._last, "template": self.template, "keep_cache": self.reuse, **kwargs}
        return {"prefix": self._prefix, **how} if self._prefix is not None else how

    def _pieces(self, asked: list[dict[str, Any]], chunks: Iterator[RoutedChunk]) -> Iterator[RoutedChunk]:
        for chunk in chunks:
            yield self._noted(asked, chunk)

    def _noted(self, asked: list[dict[str, Any]], chunk: RoutedChunk) -> RoutedChunk:
        return chunk if chunk.routed is None else replace(chunk, routed=self._record(asked, chunk.routed))

    def _record(self, asked: list[dict[str, Any]], routed: Routed) -> Routed:
        """Take a turn in, with its cache, which the answer need not carry about."""
        kept = routed.generation.prefix
        routed = replace(routed, generation=replace(routed.generation, prefix=None))
        if not routed.generation.token_ids:  # cancelled before it began
            return routed
        self._messages = [*asked, {"role": "assistant", "content": routed.answer}]
        self._last = routed.decision.mode
        if kept is not None:
            self._prefix = kept
        return routed
