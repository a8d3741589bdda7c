"""The way to an engine of vLLM's, in this process or elsewhere: jobs in, answers whole or piece by piece out."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvroute.generation import CancelToken, Generation, GenerationChunk, Prompt
from kvroute.info import ModelInfo
from kvroute.serving.about import About
from kvroute.serving.jobs import Job
from kvroute.serving.waiting import end, timings, together, unless
from kvroute.serving.wire import Answer, Completion


class Writing:
    """A job's answer as it is written.

    Args:
        job: the request.
        give: takes pieces; None where only the whole is wanted.

    Attributes:
        answer: so far.
        began: when the job was taken up; attempts that came to nothing count.
        first: when its first piece came, or None.
    """

    def __init__(self, job: Job, give: Callable[[GenerationChunk], None] | None = None) -> None:
        self.job = job
        self.answer = Answer()
        self.began = time.monotonic()
        self.first: float | None = None
        self._give = give

    @property
    def streamed(self) -> bool:
        """Whether it is wanted in pieces."""
        return self._give is not None

    def again(self) -> None:
        """From the beginning."""
        self.answer = Answer()

    def take(self, part: Completion) -> None:
        """The answer, or a piece of it."""
        text, tokens = self.answer.add(part)
        if self._give is None or not (text or tokens):
            return
        self.first = self.first or time.monotonic()
        for token in tokens[:-1]:  # the text of several tokens comes with the last of them
            self._give(GenerationChunk(self.job.index, "", token))
        self._give(GenerationChunk(self.job.index, text, tokens[-1] if tokens else None))

    def generation(self, *, cancelled: bool = False, info: ModelInfo | None = None) -> Generation:
        """The whole of it; see :meth:`~kvroute.serving.wire.Answer.generation`."""
        took = timings(self.began, self.first)
        return self.answer.generation(self.job.ask, took, cancelled=cancelled, info=info)


class Link(ABC):
    """The way to an engine of vLLM's. All methods are called in one event loop."""

    async def batch(
        self, jobs: Sequence[Job], cancel: CancelToken | None, done: Callable[[int], None]
    ) -> list[Generation]:
        """Answers in order; ``done`` is told of each."""

        async def one(job: Job) -> Generation:
            writing = Writing(job)
            found = await unless(cancel, self.write(writing))
            done(1)
            if found is None:
                writing.again()
                return writing.generation(cancelled=True)
            return found

        return await together([one(job) for job in jobs])

    async def streams(
        self, jobs: Sequence[Job], cancel: CancelToken | None, give: Callable[[GenerationChunk], None]
    ) -> None:
        """Answers piece by piece, each to ``give``."""

        async def one(job: Job) -> None:
            writing = Writing(job, give)
            whole = await unless(cancel, self.write(writing)) or writing.generation(cancelled=True)
            give(GenerationChunk(job.index, "", None, whole))

        await together([one(job) for job in jobs])

    async def choices(self, jobs: Sequence[Job], done: Callable[[int], None]) -> list[list[float]]:
        """Log-probability that each of a job's ``choices`` comes next."""

        async def one(job: Job) -> list[float]:
            found = await self.choose(job)
            done(1)
            return found

        return await together([one(job) for job in jobs])

    @abstractmethod
    async def write(self, writing: Writing) -> Generation:
        """Write one answer."""

    @abstractmethod
    async def choose(self, job: Job) -> list[float]:
        """:meth:`choices` of one job."""

    @abstractmethod
    async def tokens(self, prompts: Sequence[Prompt], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of texts, and of chats with the turn opened."""

    @abstractmethod
    async def about(self) -> About:
        """What the engine runs."""

    async def close(self) -> None:
        """End all requests and let go of the engine."""
        here = asyncio.current_task()
        await end(*(task for task in asyncio.all_tasks() if task is not here))
        await self.leave()
        await asyncio.get_running_loop().shutdown_asyncgens()

    @abstractmethod
    async def leave(self) -> None:
        """Let go of the engine: no request is left."""
