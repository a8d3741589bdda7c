"""An engine that is a vLLM server, or several: the client of running servers that load kvroute's connector."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np

from kvroute.engines.base import Vectors
from kvroute.engines.prompts import PromptTokenizer
from kvroute.engines.threads import in_thread
from kvroute.errors import InvalidInputError, KVRouteError, ModelLoadError, ServerError
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
from kvroute.serving.sending import Job, Sender, check_text
from kvroute.serving.servers import Servers
from kvroute.serving.wire import ask_for, seeds

T = TypeVar("T")


class VLLMClient:
    """Writes answers on running vLLM servers, and gets their features from kvroute's connector there.

    Has the interface of :class:`~kvroute.TransformersEngine` as far as a server can give it. May be used from several
    threads and event loops at once. Requests go to the server with the fewest in flight. A server that can't be
    reached is left alone for a while, its unanswered requests go to another one, and it is tried again; a request that
    was answered, with an error too, is never sent again.

    Args:
        urls: address of a server such as ``http://host:8000``, or those of several that serve the same model.
        model: the model by the name the servers give it; by default the first that a server has.
        tokenizer: a transformers tokenizer, or the name or folder to load it from; by default the server tokenizes.
        info: what the model is, which heads and embeddings need: ``TransformersEngine.from_pretrained(...).info``.
        api_key: of the servers. Not taken from the environment.
        timeout: seconds until an answer must be there; of a stream, its next piece.
        connect_timeout: seconds until a connection must be there.
        retries: how often a request without an answer is sent again, once a server more for each further server.
        in_flight: requests that are sent at a time, all servers together.

    Raises:
        MissingExtraError: openai is not installed.
        InvalidInputError: an argument makes no sense.
        ModelLoadError: the tokenizer can't be loaded.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        tokenizer: Any = None,
        info: ModelInfo | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 5.0,
        retries: int = 3,
        in_flight: int = 64,
    ) -> None:
        listed = [urls] if isinstance(urls, str) else list(urls)
        if not listed:
            raise InvalidInputError("No server's address was given.")
        if not (timeout > 0 and connect_timeout > 0 and retries >= 0 and in_flight >= 1):
            raise InvalidInputError("Timeouts and in_flight are above 0, and retries is not below.")
        self._info = info
        self._tokenizer = _load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self._prompts = None if tokenizer is None else PromptTokenizer(self._tokenizer, model or "the server's model")
        self._sender = Sender(
            Servers(listed, api_key=api_key, timeout=timeout, connect_timeout=connect_timeout),
            model=model,
            info=info,
            timeout=timeout,
            attempts=retries + len(listed),
            in_flight=in_flight,
        )
        # One loop in a thread of its own holds all connections, whoever asks.
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvroute-vllm-client", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"VLLMClient({[s.url for s in self._sender.servers.all]}, model={self._sender.model!r})"

    def close(self) -> None:
        """Close all connections; requests in flight end. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._sender.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the model

    @property
    def model(self) -> str:
        """The model, as the servers name it; asks one of them where it was not given."""
        return self._sender.model or self._wait(self._sender.named())

    @property
    def info(self) -> ModelInfo:
        """What the model is.

        Raises:
            InvalidInputError: it was not given, and a server does not say.
        """
        if self._info is None:
            raise InvalidInputError(
                "What the servers' model is (layers, heads, fingerprint) is not known: a vLLM server does not say.",
                hint="Pass VLLMClient(..., info=TransformersEngine.from_pretrained(MODEL).info).",
            )
        return self._info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given.

        Raises:
            InvalidInputError: none was.
        """
        if self._tokenizer is None:
            raise InvalidInputError(
                "The client has no tokenizer of its own: the server tokenizes for it.",
                hint="Pass VLLMClient(..., tokenizer=MODEL), a name or a folder.",
            )
        return self._tokenizer

    @property
    def end_token(self) -> int | None:
        """The token that closes an answer, or None; needs the tokenizer."""
        return getattr(self.tokenizer, "eos_token_id", None)

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat with the turn opened for the model.

        Raises:
            ChatTemplateError, InvalidInputError: it can't be tokenized.
            ServerError: without a tokenizer here, as :meth:`generate`.
        """
        listed, _ = as_prompts([prompt])
        return self._tokenized(listed)[0]

    def tokenize_texts(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of plain texts.

        Raises:
            as :meth:`tokenize`.
        """
        if self._prompts is not None:
            return self._prompts.tokenize_texts(texts, special_tokens=special_tokens)
        return self._tokenized(texts, special_tokens=special_tokens)

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
            sif_weights: not taken: the server has its own.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            for each spec ``[n, dim]`` float32, in the order of the texts.

        Raises:
            InvalidInputError: ``sif_weights`` were given, or ``info`` is not known.
            ServerError: as :meth:`generate`, and where a vector is missing.
        """
        if sif_weights is not None:
            raise InvalidInputError(
                "A server weighs tokens by its own table, and sif_weights were given.", hint="Leave them out."
            )
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

    # ------------------------------------------------------------------ generation

    @overload
    def generate(
        self,
        prompts: str | TokenIds,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
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
        jobs = self._jobs(listed, features, SamplingOptions.chosen(options, sampling))
        with progress_bar("Writing answers", len(listed), show=False if single else progress) as advance:
            found = self._wait(self._sender.batch(jobs, cancel, advance))
        return found[0] if single else found

    async def agenerate(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """:meth:`generate` without blocking the event loop. Cancelling the task closes the connections."""
        sampling.pop("progress", None)
        listed, single = as_prompts(prompts)
        chosen = SamplingOptions.chosen(options, sampling)
        jobs = await asyncio.to_thread(self._jobs, listed, features, chosen)
        found = await asyncio.wrap_future(self._submit(self._sender.batch(jobs, cancel, lambda _: None)))
        return found[0] if single else found

    def stream(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Iterator[GenerationChunk]:
        """:meth:`generate`, piece by piece. The last piece of each answer carries its whole ``generation``.

        Closing the iterator closes the connections. Arguments are checked at the call. Pieces can't be taken back: a
        connection that breaks after the first one is a ServerUnreachableError. A cancelled answer keeps its text.
        """
        listed, _ = as_prompts(prompts)
        return self._stream(self._jobs(listed, features, SamplingOptions.chosen(options, sampling)), cancel)

    async def astream(self, prompts: Any, **kwargs: Any) -> AsyncIterator[GenerationChunk]:
        """:meth:`stream` without blocking the event loop. Leaving it or cancelling the task ends the work."""
        cancel = CancelToken(kwargs.pop("cancel", None))
        pieces = await asyncio.to_thread(lambda: self.stream(prompts, cancel=cancel, **kwargs))
        async for chunk in in_thread(pieces, cancel):
            yield chunk

    # ------------------------------------------------------------------ in the caller's thread

    def _jobs(self, prompts: list[Prompt], features: Features, options: SamplingOptions) -> list[Job]:
        """Check everything before anything is sent."""
        ask = ask_for(features, self._info)
        # A server takes texts as they are; a chat becomes tokens first, so that the whole answer comes back as written.
        here = self._prompts is not None
        others = [p for p in prompts if not isinstance(p, TokenIds) and (here or not isinstance(p, str))]
        found = iter(self._tokenized(others))
        ready = [
            p if isinstance(p, TokenIds) or (isinstance(p, str) and not here) else TokenIds(tuple(next(found)))
            for p in prompts
        ]
        return [
            Job(i, prompt, ask, options, seed)
            for i, (prompt, seed) in enumerate(zip(ready, seeds(ready, options), strict=True))
        ]

    def _tokenized(self, prompts: Sequence[Prompt], *, special_tokens: bool = True) -> list[list[int]]:
        if self._prompts is not None:
            return [self._prompts.tokenize(prompt) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            check_text(index, prompt)
        return (
            self._wait(self._sender.all([self._sender.tokens(p, special_tokens=special_tokens) for p in prompts]))
            if prompts
            else []
        )

    def _stream(self, jobs: list[Job], cancel: CancelToken | None) -> Iterator[GenerationChunk]:
        pieces: queue.SimpleQueue[GenerationChunk | None] = queue.SimpleQueue()
        running = self._submit(self._sender.streams(jobs, cancel, pieces.put))
        running.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
            if not running.cancelled():
                running.result()
        finally:
            running.cancel()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        running = self._submit(work)
        try:
            return running.result()
        except CancelledError as error:
            raise InvalidInputError("The client was closed while it waited for an answer.") from error
        except BaseException:
            running.cancel()  # of an interrupted caller
            raise

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed or threading.current_thread() is self._thread:
            work.close()
            raise InvalidInputError("The client is closed.", hint="Make a new one.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def _load_tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    from kvroute.models import BUNDLED, bundled_path

    try:
        place = bundled_path(str(source)) if str(source) in BUNDLED else source
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except KVRouteError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"The tokenizer of {source} can't be loaded: {error}", hint="Give the name or folder of the served model."
        ) from error
