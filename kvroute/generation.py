"""What goes into and comes out of a generation, whatever the engine."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from kvroute.errors import InvalidInputError
from kvroute.pooling import Spec
from kvroute.scores import Score

if TYPE_CHECKING:
    from kvroute.engines.prefix import Prefix
    from kvroute.serving.answers import Result

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt given by its tokens, which are continued as they stand."""

    ids: tuple[int, ...]


Prompt = str | Sequence[Message] | TokenIds
"""A text that is continued as it stands, the messages of a chat, or token ids."""

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingOptions(Spec):
    """How an answer is written."""

    max_tokens: int = Field(default=256, ge=1, strict=True)
    """At most so many tokens."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token (greedy)."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much probability together."""
    seed: int | None = Field(default=None, ge=0, lt=2**63, strict=True)
    """Fixes the sampling. Each prompt has a random stream of its own, made from the seed, its tokens and, where equal
    prompts are asked together, its place among them: an answer does not depend on other prompts or their order."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """As in transformers; by default what the model's own generation config says."""

    @classmethod
    def chosen(
        cls, options: SamplingOptions | None, sampling: Mapping[str, Any], default: SamplingOptions | None = None
    ) -> SamplingOptions:
        """Options given whole, or their fields as keywords over a default; one text for ``stop`` is a list of one.

        Raises:
            InvalidInputError: both were given.
            SpecError: a field makes no sense.
        """
        if options is not None:
            if sampling:
                raise InvalidInputError(f"Give options or {sorted(sampling)}, not both.")
            return options
        fields = {} if default is None else default.model_dump()
        fields.update(sampling)
        if isinstance(fields.get("stop"), str):
            fields["stop"] = (fields["stop"],)
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request.

    Attributes:
        prompt: tokens of the prompt.
        cached: of those, taken from a prefix that was there already.
        computed: tokens that went through the model: the prompt's rest and all generated ones but the last.
        generated: tokens of the answer, the end token included.
    """

    prompt: int
    cached: int
    computed: int
    generated: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request; those of a batch are shared by its requests.

    Attributes:
        prefill: until the prompt was in the cache.
        decode: from there to the request's last token.
        features: of these, spent on features.
    """

    prefill: float
    decode: float
    features: float

    @property
    def total(self) -> float:
        """Prefill and decode."""
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer, without end token and without the stop text.
        token_ids: its tokens, the end token included if it was sampled.
        prompt_token_ids: the prompt's tokens.
        finish_reason: ``stop`` (end token or stop text), ``length`` or ``cancelled``.
        usage: tokens.
        timings: seconds.
        features: pooled vectors by the name they were asked for, float32 ``[dim]``.
        scores: scores by their names in :data:`kvroute.SCORES`.
        feature_errors: by name, why a feature that was asked for is missing. A fault in a feature never costs
            the answer.
        prefix: with ``keep_cache``, the cache of the prompt and of all its tokens but the last, for prompts that begin
            with them; None where it was not asked for, where nothing ran, and for models with recurrent layers.
        served: what kvroute inside a vLLM engine said beside the features: decision, confidence, tokens by phase,
            faults; None from other engines.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    features: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    feature_errors: dict[str, str] = field(default_factory=dict)
    prefix: Prefix | None = field(default=None, repr=False, compare=False)
    served: Result | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of an answer that is being written.

    Attributes:
        index: which prompt it belongs to.
        text: new text; may be empty while a character or a stop text is incomplete.
        token_id: the new token, or None in a piece that only flushes text.
        generation: in the last piece of each answer, the whole of it, with features and usage.
    """

    index: int
    text: str
    token_id: int | None
    generation: Generation | None = None


class CancelToken:
    """Ends a generation from elsewhere: the answers so far come back with ``finish_reason="cancelled"``.

    Args:
        parent: a token that cancels this one too, but not the other way round.
    """

    def __init__(self, parent: CancelToken | None = None) -> None:
        self._event = threading.Event()
        self._parent = parent

    def cancel(self) -> None:
        """End the generation after the token that is being computed."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._event.is_set() or (self._parent is not None and self._parent.cancelled)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """One prompt or many: the list of them, and whether it was a single one.

    Raises:
        InvalidInputError: neither texts nor chat messages.
    """
    if isinstance(prompts, str | TokenIds):
        return [prompts], True
    if not isinstance(prompts, Sequence):
        raise InvalidInputError(f"A prompt is a text, a list of messages or TokenIds, not {type(prompts).__name__}.")
    if prompts and all(isinstance(p, Mapping) for p in prompts):
        return [prompts], True  # type: ignore[list-item]
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str | TokenIds):
            continue
        if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(m, Mapping) for m in prompt):
            raise InvalidInputError(
                f"Prompt {index} is neither a text nor a list of messages nor TokenIds.",
                hint="A message is a dict such as {'role': 'user', 'content': 'Hello'}.",
            )
    return list(prompts), False  # type: ignore[arg-type]
