"""What an engine in vLLM is and how it is talked to, in this process or elsewhere: model, tokens, checked requests."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Self, TypeVar

from kvroute.engines.prompts import PromptTokenizer
from kvroute.errors import (
    ConnectorMissingError,
    InvalidInputError,
    KVRouteError,
    ModelLoadError,
)
from kvroute.features import Features
from kvroute.generation import Prompt, SamplingOptions, TokenIds, as_prompts
from kvroute.info import ModelInfo
from kvroute.serving.about import About
from kvroute.serving.background import Background
from kvroute.serving.jobs import Decide, Job, check_text
from kvroute.serving.link import Link
from kvroute.serving.wire import ask_for, seeds, with_more

T = TypeVar("T")


class VLLMCore:
    """The part of an engine of vLLM's that what it gives is built on.

    May be used from several threads and event loops at once: one loop in a thread of its own talks to the engine.

    Args:
        tokenizer: a transformers tokenizer, or None where the engine tokenizes.
        info: what the model is, if known.
        name: the model's, for messages.
    """

    decides_inside = True
    """A :class:`~kvroute.Router` leaves decisions to the engine, which has policies of its own."""

    def __init__(self, *, tokenizer: Any, info: ModelInfo | None, name: str) -> None:
        self._info = info
        self._about: About | None = None
        self._tokenizer = tokenizer
        self._prompts = None if tokenizer is None else PromptTokenizer(tokenizer, name)
        self._background = Background(self)

    @property
    def _link(self) -> Link:
        link = self._background.link
        assert link is not None
        return link

    @_link.setter
    def _link(self, link: Link) -> None:
        self._background.link = link

    def close(self) -> None:
        """End requests in flight and let go of the engine. Closing twice does nothing."""
        self._background.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the model

    @property
    def about(self) -> About:
        """What the engine says of itself: model, policies, heads, limits.

        Raises:
            ServerError: a server that can't say, or can't be reached.
        """
        if self._about is None:
            self._about = self._wait(self._link.about())
        return self._about

    @property
    def info(self) -> ModelInfo:
        """What the model is.

        Raises:
            InvalidInputError: it was not given, and the server does not say.
            ConnectorMissingError: kvroute does not run in the server.
        """
        if self._info is None:
            about = self.about
            if not about.connector:
                raise ConnectorMissingError(
                    "kvroute does not run in the server's engine.",
                    hint="Start it with `kvroute serve`, or with --kv-transfer-config "
                    '\'{"kv_connector":"KVRouteConnector","kv_role":"kv_producer"}\'.',
                )
            if about.model is None:
                raise InvalidInputError(
                    f"The server can't tell what its model is: {about.model_error}",
                    hint="Pass info=TransformersEngine.from_pretrained(MODEL).info.",
                )
            self._info = about.model
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

    # ------------------------------------------------------------------ in the caller's thread

    def _jobs(
        self,
        prompts: list[Prompt],
        features: Features,
        options: SamplingOptions,
        decide: Decide | Sequence[Decide | None] | None = None,
        starts: Sequence[int] | None = None,
        choices: Sequence[Sequence[int]] | None = None,
    ) -> list[Job]:
        """Check everything before anything is sent."""
        decided = [decide] * len(prompts) if decide is None or isinstance(decide, Decide) else list(decide)
        if len(decided) != len(prompts):
            raise InvalidInputError(f"{len(prompts)} prompts, and {len(decided)} decisions asked.")
        plain = ask_for(features, self._info)
        # A server takes texts as they are; a chat becomes tokens first, so that the whole answer comes back as written.
        here = self._prompts is not None
        others = [p for p in prompts if not isinstance(p, TokenIds) and (here or not isinstance(p, str))]
        found = iter(self._tokenized(others))
        ready = [
            p if isinstance(p, TokenIds) or (isinstance(p, str) and not here) else TokenIds(tuple(next(found)))
            for p in prompts
        ]
        more = [0 if d is None else d.reserve for d in decided]
        self._check_lengths(ready, [options.max_tokens + n for n in more])
        written = {n: options.model_copy(update={"max_tokens": options.max_tokens + n}) for n in set(more)}
        return [
            Job(
                i,
                prompt,
                with_more(plain, decided[i], None if starts is None else starts[i]),
                written[more[i]],
                seed,
                () if choices is None else tuple(choices[i]),
            )
            for i, (prompt, seed) in enumerate(zip(ready, seeds(ready, options), strict=True))
        ]

    def _check_lengths(self, prompts: Sequence[str | TokenIds], max_tokens: Sequence[int]) -> None:
        """Nothing: a server refuses what does not fit."""

    def _tokenized(self, prompts: Sequence[Prompt], *, special_tokens: bool = True) -> list[list[int]]:
        if self._prompts is not None:
            return [self._prompts.tokenize(prompt) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            check_text(index, prompt)
        return self._wait(self._link.tokens(prompts, special_tokens=special_tokens)) if prompts else []

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
        return self._background.submit(work)


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer by name or folder.

    Raises:
        ModelLoadError: it can't be loaded.
    """
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
