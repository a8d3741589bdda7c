"""Many inputs in one call of the engine, though each has a run of its own.

Every input is invoked as LangChain does it, with its own callbacks, cache and retries, in a thread or task. What would
ask the engine waits until all inputs of the batch ask or are through; those that fit together are asked in one call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list, get_executor_for_config

from kvroute import CancelToken, KVRouteError
from langchain_kvroute import asking
from langchain_kvroute.asking import Answer, Asked

if TYPE_CHECKING:
    from langchain_core.messages import AIMessage

    from langchain_kvroute.chat_model import ChatKVRoute

AT_ONCE = 64
"""Inputs that are dealt with at a time where ``max_concurrency`` does not say."""

_current: ContextVar[Together | None] = ContextVar("kvroute_together", default=None)


def current() -> Together | None:
    """The batch that the running call belongs to, if it may still be asked with it."""
    return _current.get()


class Together:
    """Inputs whose prompts are asked together. Thread-safe.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._open = count
        self._waiting: list[tuple[Asked, Future[Answer]]] = []
        self._lock = threading.Lock()

    def answer(self, asked: Asked) -> Answer:
        """This prompt's answer, when all others are asked too."""
        return self._join(asked).result()

    async def aanswer(self, asked: Asked) -> Answer:
        """:meth:`answer` without blocking the event loop."""
        return await asyncio.wrap_future(self._join(asked))

    @contextmanager
    def input(self) -> Iterator[None]:
        """While one of the inputs is dealt with."""
        part = _Part(self)
        token = _current.set(part)
        try:
            yield
        finally:
            _current.reset(token)
            part.leave()

    def _join(self, asked: Asked) -> Future[Answer]:
        future: Future[Answer] = Future()
        with self._lock:
            self._waiting.append((asked, future))
        self._one_less()
        return future

    def _one_less(self) -> None:
        with self._lock:
            self._open -= 1
            ready = self._waiting if self._open == 0 else []
        if ready:
            threading.Thread(target=_ask, args=(ready,), name="kvroute-batch", daemon=True).start()


class _Part(Together):
    """One input's place in a batch: its first question is asked with the others, later ones (a retry's) alone."""

    def __init__(self, whole: Together) -> None:
        super().__init__(0)
        self._whole = whole
        self._left = False

    def _join(self, asked: Asked) -> Future[Answer]:
        if self._left:
            future: Future[Answer] = Future()
            threading.Thread(target=_ask, args=([(asked, future)],), name="kvroute-batch", daemon=True).start()
            return future
        self._left = True
        return self._whole._join(asked)

    def leave(self) -> None:
        """The input is through."""
        if not self._left:
            self._left = True
            self._whole._one_less()


def _ask(waiting: list[tuple[Asked, Future[Answer]]]) -> None:
    """Ask all, those that fit together in one call."""
    groups: list[list[tuple[Asked, Future[Answer]]]] = []
    for one in waiting:
        fitting = next((g for g in groups if g[0][0].fits(one[0])), None)
        if fitting is None:
            groups.append([one])
        else:
            fitting.append(one)
    for group in groups:
        _ask_group(group)


def _ask_group(group: list[tuple[Asked, Future[Answer]]]) -> None:
    cancel = CancelToken()

    def check(_: Any) -> None:
        if all(future.cancelled() for _, future in group):
            cancel.cancel()

    for _, future in group:
        future.add_done_callback(check)
    group = [one for one in group if not one[1].cancelled()]
    if not group:
        return
    try:
        found = asking.generate([asked for asked, _ in group], cancel)
    except KVRouteError as error:
        if len(group) == 1:
            _settle(group[0][1], error=error)
            return
        middle = len(group) // 2  # whose fault it was shows when it is asked alone
        _ask_group(group[:middle])
        _ask_group(group[middle:])
    except BaseException as error:  # noqa: BLE001 - it belongs to those who asked
        for _, future in group:
            _settle(future, error=error)
    else:
        for (_, future), answer in zip(group, found, strict=True):
            _settle(future, answer)


def _settle(future: Future[Answer], answer: Answer | None = None, error: BaseException | None = None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        assert answer is not None
        future.set_result(answer)


# ---------------------------------------------------------------------- as LangChain's batch


def batch(
    model: ChatKVRoute,
    inputs: Sequence[Any],
    config: RunnableConfig | list[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    **kwargs: Any,
) -> list[AIMessage]:
    """As :meth:`langchain_core.runnables.Runnable.batch`."""
    found: list[Any] = []
    configs = get_config_list(config, len(inputs)) if inputs else []
    for rows in _slices(len(inputs), configs):
        together = Together(len(rows))

        def one(row: int, together: Together = together) -> Any:
            try:
                with together.input():
                    return model.invoke(inputs[row], configs[row], **kwargs)
            except Exception as error:
                if return_exceptions:
                    return error
                raise

        with get_executor_for_config({**configs[rows[0]], "max_concurrency": len(rows)}) as executor:
            found += list(executor.map(one, rows))
    return found


async def abatch(
    model: ChatKVRoute,
    inputs: Sequence[Any],
    config: RunnableConfig | list[RunnableConfig] | None,
    *,
    return_exceptions: bool,
    **kwargs: Any,
) -> list[AIMessage]:
    """As :meth:`langchain_core.runnables.Runnable.abatch`."""
    found: list[Any] = []
    configs = get_config_list(config, len(inputs)) if inputs else []
    if inputs:
        await asking.in_pool(model.opened, wide=True)
    for rows in _slices(len(inputs), configs):
        together = Together(len(rows))

        async def one(row: int, together: Together = together) -> Any:
            with together.input():
                return await model.ainvoke(inputs[row], configs[row], **kwargs)

        found += await asyncio.gather(*(one(row) for row in rows), return_exceptions=return_exceptions)
    return found


def many(config: RunnableConfig | list[RunnableConfig] | None, count: int) -> list[RunnableConfig]:
    """Configs of inputs that an engine of vLLM's gets, many at a time."""
    if not count:
        return []
    return [{**c, "max_concurrency": c.get("max_concurrency") or AT_ONCE} for c in get_config_list(config, count)]


def _slices(count: int, configs: Sequence[RunnableConfig]) -> list[range]:
    size = (configs[0].get("max_concurrency") if configs else None) or AT_ONCE
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
