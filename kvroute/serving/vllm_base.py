"""What the engines in vLLM have in common, in this process or elsewhere: the interface of an engine."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from kvroute.engines.base import Vectors
from kvroute.engines.threads import in_thread
from kvroute.errors import EmptyTextError, InvalidInputError, ServerError, UnsupportedModelError
from kvroute.features import Features
from kvroute.generation import (
    CancelToken,
    Generation,
    GenerationChunk,
    Message,
    Prompt,
    SamplingOptions,
    TokenIds,
    as_prompts,
)
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec
from kvroute.progress import progress_bar
from kvroute.serving.jobs import Decide, Job
from kvroute.serving.vllm_core import VLLMCore
from kvroute.token_weights import FrequencyTable

if TYPE_CHECKING:
    from kvroute.engines.reading import Reading, Want


class VLLMBase(VLLMCore):
    """The interface of :class:`~kvroute.TransformersEngine`, as far as an engine of vLLM's can give it.

    May be used from several threads and event loops at once: one loop in a thread of its own talks to the engine.

    Args:
        tokenizer: a transformers tokenizer, or None where the engine tokenizes.
        info: what the model is, if known.
        name: the model's, for messages.
    """

    def __init__(self, *, tokenizer: Any, info: ModelInfo | None, name: str) -> None:
        super().__init__(tokenizer=tokenizer, info=info, name=name)
        self._sif: dict[float, Vectors] = {}

    # ------------------------------------------------------------------ features of texts

    def pool(
        self,
        token_ids: Sequence[Sequence[int]],
        specs: Sequence[PoolingSpec],
        *,
        sif_weights: Vectors | None = None,
        progress: bool | None = None,
    ) -> list[Vectors]:
        """Pooled vectors of texts, as prompts that one token is written to.

        Args:
            token_ids: the texts.
            specs: how to pool.
            sif_weights: the engine weighs tokens by its own table, that of the tokenizer's vocabulary; another is
                refused.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            for each spec ``[n, dim]`` float32, in the order of the texts.

        Raises:
            InvalidInputError: ``sif_weights`` are others than the engine's, or ``info`` is not known.
            ServerError: as :meth:`generate`, and where a vector is missing.
        """
        if sif_weights is not None:
            self._check_sif(specs, sif_weights)
        out = [np.empty((len(token_ids), spec.dimension(self.info)), dtype=np.float32) for spec in specs]
        if not specs or not len(token_ids):
            return out
        answers = self.generate(
            [TokenIds(tuple(ids)) for ids in token_ids],
            features={str(i): spec for i, spec in enumerate(specs)},
            options=SamplingOptions(max_tokens=1),
            progress=progress,
        )
        for row, answer in enumerate(answers):
            for name, why in answer.feature_errors.items():
                raise ServerError(f"Text {row} has no vector by spec {name}: {why}")
            for i, vectors in enumerate(out):
                vectors[row] = answer.features[str(i)]
        return out

    def _check_sif(self, specs: Sequence[PoolingSpec], weights: Vectors) -> None:
        for a in {spec.sif_a for spec in specs if spec.weights == "sif"}:
            if a not in self._sif:
                self._sif[a] = FrequencyTable.from_vocabulary(self.tokenizer).weights(a)
            if not np.array_equal(self._sif[a], np.asarray(weights)):
                raise InvalidInputError(
                    "vLLM's side weighs tokens by the table of its tokenizer's vocabulary, and others were given.",
                    hint="Leave them out (frequencies=None), or use TransformersEngine.",
                )

    # ------------------------------------------------------------------ answers that exist

    def read(
        self,
        token_ids: Sequence[Sequence[int]],  # noqa: ARG002
        start: Sequence[int],  # noqa: ARG002
        *,
        want: Collection[Want],
        layers: Sequence[int] | None = None,  # noqa: ARG002
        progress: bool | None = None,  # noqa: ARG002
    ) -> Iterator[tuple[list[int], Reading]]:
        """Not given: caches, logits and hidden states stay where the engine is; see :meth:`answer_features`.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            f"vLLM hands out no {', '.join(sorted(want)) or 'cache'} of an answer that exists.",
            hint="Use TransformersEngine for this. SelfEvaluator has kv-coe, length and p-true from vLLM, too.",
        )

    def answer_features(
        self,
        token_ids: Sequence[Sequence[int]],
        start: Sequence[int],
        features: Features,
        *,
        progress: bool | None = None,
    ) -> list[Generation]:
        """Features of answers that exist already, read where the engine is.

        Args:
            token_ids: prompt and answer of each.
            start: where each answer begins, at least 1.
            features: as of :meth:`generate`; those of an answer leave its last token out, as while it was written.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            in order, with ``features``, ``scores`` and ``feature_errors``; the text means nothing.

        Raises:
            as :meth:`generate`; EmptyTextError: an answer without a token, naming the index.
        """
        for index, (ids, at) in enumerate(zip(token_ids, start, strict=True)):
            if not 1 <= at < len(ids):
                raise EmptyTextError(index)
        prompts: list[Prompt] = [TokenIds(tuple(ids[:-1])) for ids in token_ids]
        jobs = self._jobs(prompts, features, SamplingOptions(max_tokens=1), starts=start)
        with progress_bar("Reading answers", len(jobs), show=progress) as advance:
            return self._wait(self._link.batch(jobs, None, advance))

    def choice_logprobs(
        self, token_ids: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], *, progress: bool | None = None
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probability that each of some tokens comes next.

        Args:
            token_ids: the texts.
            choices: for each text the tokens, equally many for all.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            ``[n, choices]``, at most 0.

        Raises:
            as :meth:`generate`; ServerError: the server does not give them.
        """
        found = np.empty((len(token_ids), len(choices[0]) if choices else 0))
        if not found.size:
            return found
        prompts: list[Prompt] = [TokenIds(tuple(ids)) for ids in token_ids]
        jobs = self._jobs(prompts, None, SamplingOptions(max_tokens=1), choices=choices)
        with progress_bar("Asking the model", len(jobs), show=progress) as advance:
            found[:] = self._wait(self._link.choices(jobs, advance))
        return found

    # ------------------------------------------------------------------ generation

    @overload
    def generate(
        self,
        prompts: str | TokenIds,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Message],
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Write answers; features come from the server's own run.

        Args:
            prompts: a text, the messages of a chat, tokens, or a list of such.
            features: what else to give: see :mod:`kvroute.features`; ``logits`` and chains of another spec are not
                served.
            options: how to write; or its fields as keywords.
            decide: what the engine decides about all prompts, or about each; the result's ``served`` says what it did.
            cancel: closes the connections: answers that are not there yet are empty and ``cancelled``.
            progress: whether to show a bar for many prompts; by default on a terminal.

        Returns:
            a :class:`~kvroute.Generation` for one prompt, a list in their order for many. Its ``timings`` are those
            that the client sees, all in ``decode``.

        Raises:
            SpecError, AskError, InvalidInputError: before anything is sent, or the server refused a prompt.
            ServerUnreachableError: no server could be reached.
            ServerTimeoutError: an answer took longer than ``timeout``.
            ConnectorMissingError: features were asked for, and kvroute does not run in the server.
            ModelMismatchError: a server has another model.
            ServerError: anything else a server answered.
        """
        listed, single = as_prompts(prompts)
        jobs = self._jobs(listed, features, SamplingOptions.chosen(options, sampling), decide)
        with progress_bar("Writing answers", len(listed), show=False if single else progress) as advance:
            found = self._wait(self._link.batch(jobs, cancel, advance))
        return found[0] if single else found

    async def agenerate(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """:meth:`generate` without blocking the event loop. Cancelling the task closes the connections."""
        sampling.pop("progress", None)
        listed, single = as_prompts(prompts)
        chosen = SamplingOptions.chosen(options, sampling)
        jobs = await asyncio.to_thread(self._jobs, listed, features, chosen, decide)
        found = await asyncio.wrap_future(self._submit(self._link.batch(jobs, cancel, lambda _: None)))
        return found[0] if single else found

    def stream(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        decide: Decide | Sequence[Decide | None] | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Iterator[GenerationChunk]:
        """:meth:`generate`, piece by piece. The last piece of each answer carries its whole ``generation``.

        Closing the iterator closes the connections. Arguments are checked at the call. Pieces can't be taken back: a
        connection that breaks after the first one is a ServerUnreachableError. A cancelled answer keeps its text.
        """
        listed, _ = as_prompts(prompts)
        return self._stream(self._jobs(listed, features, SamplingOptions.chosen(options, sampling), decide), cancel)

    async def astream(self, prompts: Any, **kwargs: Any) -> AsyncIterator[GenerationChunk]:
        """:meth:`stream` without blocking the event loop. Leaving it or cancelling the task ends the work."""
        cancel = CancelToken(kwargs.pop("cancel", None))
        pieces = await asyncio.to_thread(lambda: self.stream(prompts, cancel=cancel, **kwargs))
        async for chunk in in_thread(pieces, cancel):
            yield chunk

    def _stream(self, jobs: list[Job], cancel: CancelToken | None) -> Iterator[GenerationChunk]:
        pieces: queue.SimpleQueue[GenerationChunk | None] = queue.SimpleQueue()
        running = self._submit(self._link.streams(jobs, cancel, pieces.put))
        running.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            if not running.cancelled():
                running.result()
        finally:
            running.cancel()
