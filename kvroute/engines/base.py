"""What every engine offers. Embedder, self-evaluation and command line take any of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload, runtime_checkable

import numpy as np

from kvroute.features import Features
from kvroute.generation import CancelToken, Generation, GenerationChunk, Message, Prompt, SamplingOptions, TokenIds
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec

if TYPE_CHECKING:
    from kvroute.engines.reading import Reading, Want

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def decides_inside(engine: object) -> bool:
    """Whether an engine keeps its caches elsewhere, and decides and reads there: vLLM, in this process or another."""
    return bool(getattr(engine, "decides_inside", False))


@runtime_checkable
class Engine(Protocol):
    """Runs a causal model and gives features from its KV cache."""

    @property
    def info(self) -> ModelInfo:
        """What the model is."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        ...

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat with the turn opened for the model."""
        ...

    def tokenize_texts(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of plain texts, in one call of the tokenizer."""
        ...

    @property
    def end_token(self) -> int | None:
        """The token that closes an answer, or None."""
        ...

    def pool(
        self,
        token_ids: Sequence[Sequence[int]],
        specs: Sequence[PoolingSpec],
        *,
        sif_weights: Vectors | None = None,
        progress: bool | None = None,
    ) -> list[Vectors]:
        """Prefill texts and pool their caches: for each spec ``[n, dim]`` float32, in the order of the texts."""
        ...

    def read(
        self,
        token_ids: Sequence[Sequence[int]],
        start: Sequence[int],
        *,
        want: Collection[Want],
        layers: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Iterator[tuple[list[int], Reading]]:
        """Read answers that exist already: indices of a batch, and what it gives."""
        ...

    def choice_logprobs(
        self, token_ids: Sequence[Sequence[int]], choices: Sequence[Sequence[int]], *, progress: bool | None = None
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Log-probability that each of some tokens comes next: ``[n, choices]``."""
        ...

    @overload
    def generate(
        self,
        prompts: str | TokenIds,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
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
        **sampling: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Write answers."""
        ...

    def stream(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Iterator[GenerationChunk]:
        """Write answers, piece by piece."""
        ...

    async def agenerate(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """:meth:`generate` without blocking the event loop."""
        ...

    def astream(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> AsyncIterator[GenerationChunk]:
        """:meth:`stream` without blocking the event loop."""
        ...
