"""Requests to a vLLM engine of this process: what :mod:`kvroute.serving.sending` is for servers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

from kvroute.errors import InvalidInputError, ServerError
from kvroute.generation import Generation, Prompt, TokenIds
from kvroute.serving.about import About, about
from kvroute.serving.answers import PENDING
from kvroute.serving.asks import KEY
from kvroute.serving.jobs import Job
from kvroute.serving.link import Link, Writing
from kvroute.serving.mailbox import MAILBOX, WAITS
from kvroute.serving.wire import Choice, Completion, completion_usage

_LATE: Final = 5.0
"""Seconds that an answer waits for kvroute's result, which comes with the statistics of the same step or the next."""


class EngineLink(Link):
    """Sends jobs to an ``AsyncLLM``. All methods are called in the event loop that it was made in.

    Args:
        engine: vLLM's ``AsyncLLM``.
        name: what to call the model.
        in_flight: requests at a time.
    """

    def __init__(self, engine: Any, name: str, in_flight: int) -> None:
        self._engine = engine
        self._name = name
        self._slots = asyncio.Semaphore(in_flight)
        self._defaults: dict[str, Any] = engine.model_config.get_diff_sampling_param()

    async def write(self, writing: Writing) -> Generation:
        """Write one answer."""
        async with self._slots:
            async for part in self._run(writing.job, stream=writing.streamed):
                writing.take(part)
        return writing.generation()

    async def choose(self, job: Job) -> list[float]:
        """Log-probability that each of the job's ``choices`` comes next."""
        found: list[float] = []
        async with self._slots:
            async for output in self._outputs(job, uuid.uuid4().hex, stream=False):
                said = output.outputs[0].logprobs
                if said:
                    found = [float(said[0][token].logprob) for token in job.choices]
        return found

    async def tokens(self, prompts: Sequence[Prompt], *, special_tokens: bool = True) -> list[list[int]]:
        """Not needed: an engine of this process has its tokenizer here."""
        raise NotImplementedError

    async def about(self) -> About:
        """What the engine runs."""
        return await asyncio.to_thread(about, self._engine.vllm_config, self._name)

    async def leave(self) -> None:
        """End the engine's processes."""
        engine, self._engine = self._engine, None
        await asyncio.to_thread(engine.shutdown)

    # ------------------------------------------------------------------ one request

    async def _run(self, job: Job, *, stream: bool) -> AsyncGenerator[Completion, None]:
        """Its answer, whole or in pieces; the last one has kvroute's result."""
        request = uuid.uuid4().hex
        if MAILBOX.connected and not MAILBOX.partial:
            request = f"{request}-{WAITS}"
        expected = None if job.ask is None else MAILBOX.expect([request])
        try:
            said = False
            async for output in self._outputs(job, request, stream=stream):
                part = _completion(output)
                if PENDING in (part.kv_transfer_params or {}).get(KEY, {}):
                    part = part.model_copy(update={"kv_transfer_params": None})
                said = said or KEY in (part.kv_transfer_params or {})
                yield part
            if expected is not None and not said and MAILBOX.connected and await expected.wait(_LATE):
                yield Completion(kv_transfer_params={KEY: expected.results[0, 0]})
        finally:
            if expected is not None:
                expected.close()

    async def _outputs(self, job: Job, request: str, *, stream: bool) -> AsyncGenerator[Any, None]:
        """vLLM's own outputs. Closing the iterator ends the request.

        Raises:
            InvalidInputError: vLLM refuses the request.
            ServerError: the engine is dead.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = job.prompt
        assert isinstance(prompt, TokenIds)
        try:
            outputs = self._engine.generate({"prompt_token_ids": list(prompt.ids)}, self._params(job, stream), request)
            async for output in outputs:
                yield output
        except (EngineDeadError, EngineGenerateError) as error:
            raise ServerError(
                f"vLLM's engine failed: {error}", hint="Its log says why; make a new VLLMEngine."
            ) from error
        except ValueError as error:
            raise InvalidInputError(f"vLLM refuses prompt {job.index}: {error}") from error

    def _params(self, job: Job, stream: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options = job.options
        penalty = options.repetition_penalty
        if penalty is None:
            penalty = self._defaults.get("repetition_penalty", 1.0)
        return SamplingParams(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=0,
            min_p=0.0,
            stop=list(options.stop) or None,
            repetition_penalty=penalty,
            seed=job.seed,
            logprob_token_ids=list(job.choices) or None,
            output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
            extra_args=None if job.ask is None else {"kv_transfer_params": {KEY: job.ask.to_dict()}},
        )


def _completion(output: Any) -> Completion:
    """vLLM's output as a server would write it."""
    answer = output.outputs[0]
    choice = Choice.model_construct(
        text=answer.text,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
        token_ids=list(answer.token_ids),
        prompt_token_ids=list(output.prompt_token_ids or ()),
        logprobs=None,
    )
    return Completion.model_construct(
        model="",
        choices=[choice],
        usage=completion_usage(len(choice.prompt_token_ids or ()), output.num_cached_tokens or 0),
        kv_transfer_params=output.kv_transfer_params,
    )
