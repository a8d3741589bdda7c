"""The embedded engine: a transformers model in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch

from kvroute.engines.batching import WRITING_WASTE, plan_batches
from kvroute.engines.decoding import DecodeSession
from kvroute.engines.loading import load_model
from kvroute.engines.memory import is_out_of_memory
from kvroute.engines.prefix import Prefix
from kvroute.engines.reader import TransformersReader
from kvroute.engines.sampling import random_streams
from kvroute.engines.slab import SlabCache
from kvroute.engines.steering import Steer
from kvroute.engines.threads import call_in_thread, in_thread
from kvroute.errors import InvalidInputError, OutOfMemoryError, UnsupportedModelError
from kvroute.features import FeaturePlan, Features, plan_features
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
from kvroute.progress import progress_bar

_SHARE = 4
"""Tokens of prompts and answers that are written together, by the tokens of a prefill: a step computes few of them."""


class TransformersEngine(TransformersReader):
    """Runs a causal model that is loaded in this process and reads its KV cache.

    The model is used as it is and never changed: an early exit leaves its forward from within the cache, so
    several threads may use it at once.

    Args:
        model: any ``AutoModelForCausalLM`` with a standard cache.
        tokenizer: its tokenizer.
        name: what to call the model; by default what its config says.
        revision: its revision, if known.
        token_budget: tokens a batch computes at most, padding included.

    Raises:
        UnsupportedModelError: the model keeps no KV cache that can be read.
    """

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        token_budget: int | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model and its tokenizer.

        Args:
            id_or_path: hub id, local folder, or the name of a model kvroute brings (``"smollm2"``).
            device: e.g. ``cuda``; by default a GPU if there is one.
            dtype: e.g. ``float32``; by default the checkpoint's own.
            revision: branch, tag or commit on the hub.
            trust_remote_code: whether to run code that comes with the model. Off.
            token_budget: as in the constructor.
            model_kwargs: handed to ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ModelLoadError: it can't be found or read.
            UnsupportedModelError: it keeps no KV cache that can be read.
        """
        model, tokenizer = load_model(
            id_or_path,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **model_kwargs,
        )
        return cls(model, tokenizer, name=str(id_or_path), revision=revision, token_budget=token_budget)

    def __repr__(self) -> str:
        return f"TransformersEngine({self._info.name!r}, {self._info.dtype}, {self.model.device})"

    # ------------------------------------------------------------------ generation

    def prefix(self, prompt: Prompt) -> Prefix:
        """Keep the cache of tokens that many prompts begin with (a system prompt, few shots).

        Args:
            prompt: the text they begin with, or the messages; the model's turn is not opened.

        Returns:
            what :meth:`generate` and its kin take as ``prefix=``. A prompt that shares only its first tokens
            with it continues those; features are the same as without it.

        Raises:
            UnsupportedModelError: the model has layers with a recurrent state.
        """
        ids = self._prompts.tokenize(prompt, open_turn=False)
        self.check_lengths([ids])
        with torch.inference_mode():
            cache = SlabCache(self.model.config, capacity=len(ids))
            if len(cache.attention_layers) != len(cache.layers):
                raise UnsupportedModelError(
                    f"{self._info.name} has layers with a recurrent state, whose prefixes can't be continued.",
                    hint="Generate without prefix= for this model.",
                )
            self.model.get_decoder()(
                input_ids=torch.tensor([ids], device=self.model.device), past_key_values=cache, use_cache=True
            )
        return Prefix(tuple(ids), cache, self._info.fingerprint, self._info.name)

    @overload
    def generate(
        self,
        prompts: str | TokenIds,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        prefix: Prefix | None = None,
        steer: Steer | None = None,
        keep_cache: bool = False,
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
        prefix: Prefix | None = None,
        steer: Steer | None = None,
        keep_cache: bool = False,
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
        prefix: Prefix | None = None,
        steer: Steer | None = None,
        keep_cache: bool = False,
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
        prefix: Prefix | None = None,
        steer: Steer | None = None,
        keep_cache: bool = False,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:
        """Write answers; features come out of the same forward passes.

        Args:
            prompts: a text, the messages of a chat, or a list of such.
            features: what else to give, by name or spec: see :mod:`kvroute.features`. Nothing asked, nothing paid.
            options: how to write; or its fields as keywords: ``max_tokens``, ``temperature``, ``top_p``, ``seed``,
                ``stop``, ``repetition_penalty``.
            prefix: a cache that the prompts may continue.
            steer: puts tokens behind prompts and into answers: see :mod:`kvroute.engines.steering`.
            keep_cache: whether each answer's ``prefix`` is kept, so that a prompt that goes on from it computes less.
            cancel: ends the work from elsewhere.
            progress: whether to show a bar for many prompts; by default on a terminal.

        Returns:
            a :class:`~kvroute.Generation` for one prompt, a list in their order for many.

        Raises:
            EmptyTextError, TextTooLongError, SpecError, ChatTemplateError, InvalidInputError: before anything runs.
            ModelMismatchError: the prefix is another model's.
            OutOfMemoryError: a single prompt does not fit the memory.
        """
        listed, single = as_prompts(prompts)
        run = self._plan(listed, features, options, prefix, sampling, reserve=steer.reserve if steer else 0)
        found: dict[int, Generation] = {}
        show = False if single else progress
        with progress_bar("Writing answers", len(listed), show=show) as advance:
            work = self._run(*run, prefix=prefix, steer=steer, keep_cache=keep_cache, cancel=cancel, follow_text=False)
            for chunk in work:
                if chunk.generation is not None:
                    found[chunk.index] = chunk.generation
                    advance(1)
        return found[0] if single else [found[i] for i in range(len(listed))]

    def stream(
        self,
        prompts: Any,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        prefix: Prefix | None = None,
        steer: Steer | None = None,
        keep_cache: bool = False,
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Iterator[GenerationChunk]:
        """:meth:`generate`, piece by piece. The last piece of each answer carries its whole ``generation``.

        Closing the iterator ends the work. Arguments are checked at the call, before the first piece. Pieces can't be
        taken back, so memory that runs out while a stream is written is an OutOfMemoryError; :meth:`generate` writes
        those answers again in smaller batches.
        """
        listed, _ = as_prompts(prompts)
        run = self._plan(listed, features, options, prefix, sampling, reserve=steer.reserve if steer else 0)
        return self._run(*run, prefix=prefix, steer=steer, keep_cache=keep_cache, cancel=cancel, follow_text=True)

    async def agenerate(self, prompts: Any, **kwargs: Any) -> Generation | list[Generation]:
        """:meth:`generate` in a thread. Cancelling the task ends the work."""
        return await call_in_thread(lambda **how: self.generate(prompts, **how), kwargs)

    async def astream(self, prompts: Any, **kwargs: Any) -> AsyncIterator[GenerationChunk]:
        """:meth:`stream` in a thread. Leaving the loop or cancelling the task ends the work."""
        cancel = CancelToken(kwargs.pop("cancel", None))
        async for chunk in in_thread(self.stream(prompts, cancel=cancel, **kwargs), cancel):
            yield chunk

    def _plan(
        self,
        prompts: list[Prompt],
        features: Features,
        options: SamplingOptions | None,
        prefix: Prefix | None,
        sampling: dict[str, Any],
        *,
        reserve: int = 0,
    ) -> tuple[list[list[int]], FeaturePlan, SamplingOptions]:
        """Check everything before anything runs."""
        chosen = SamplingOptions.chosen(options, sampling)
        if prefix is not None:
            self._info.require(prefix.fingerprint, "The prefix", prefix.name)
        plan = plan_features(features)
        for _, spec in plan.pooled.values():
            spec.dimension(self._info)
        if plan.chain is not None:
            plan.chain.resolve(self._info.num_layers)
        ids = [self.tokenize(p) for p in prompts]
        context = self._info.context
        if chosen.max_tokens > context:
            raise InvalidInputError(
                f"max_tokens={chosen.max_tokens} was asked for, and the context holds {context} tokens.",
                hint="Lower max_tokens.",
            )
        self.check_lengths(
            ids,
            context + 1 - chosen.max_tokens - reserve,  # the last token of an answer is never run
            hint=f"The context holds {context} tokens, prompt and answer together: shorten the prompt, or lower "
            f"max_tokens ({chosen.max_tokens}).",
        )
        return ids, plan, chosen

    def _run(
        self,
        prompts: list[list[int]],
        plan: FeaturePlan,
        options: SamplingOptions,
        *,
        prefix: Prefix | None,
        steer: Steer | None,
        keep_cache: bool,
        cancel: CancelToken | None,
        follow_text: bool,
    ) -> Iterator[GenerationChunk]:
        lengths = [len(p) + options.max_tokens for p in prompts]
        streams = random_streams(prompts)
        pending = plan_batches(lengths, self.token_budget * _SHARE, waste=WRITING_WASTE)
        while pending:
            batch = pending.pop(0)
            left = set(batch)
            session = DecodeSession(
                self.model,
                self._tokenizer,
                [prompts[i] for i in batch],
                [streams[i] for i in batch],
                options,
                plan,
                num_layers=self._info.num_layers,
                prefix=prefix,
                sif_weights=self.sif_weights,
                follow_text=follow_text,
                steering=steer.open(batch) if steer else None,
                keep_cache=keep_cache,
                model_id=(self._info.fingerprint, self._info.name),
            )
            try:
                if cancel is None or not cancel.cancelled:
                    with torch.inference_mode():
                        session.prefill()
                for chunk in self._write(session, batch, cancel):
                    if chunk.generation is not None:
                        left.discard(chunk.index)
                    yield chunk
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(left) == 1 or (follow_text and session.prefilled):
                    first = min(left)
                    raise OutOfMemoryError(
                        f"Prompt {first} with {len(prompts[first])} tokens, or its answer, does not fit the memory.",
                        hint="Shorten it, lower max_tokens, ask for fewer at once, or load the model in bfloat16.",
                    ) from error
            else:
                continue
            del session
            pending = self._halve_budget(lengths, [[i for i in batch if i in left], *pending], _SHARE, WRITING_WASTE)

    def _write(self, session: DecodeSession, batch: list[int], cancel: CancelToken | None) -> Iterator[GenerationChunk]:
        while session.active:
            with torch.inference_mode():  # never across a yield: it would leak into the caller
                if cancel is not None and cancel.cancelled:
                    rest = session.cancel()
                    chunks = [GenerationChunk(batch[r], piece, None, session.result(r)) for r, piece in rest]
                else:
                    events = session.step()
                    last = {r: i for i, (r, _, _) in enumerate(events) if session.rows[r].finish}
                    chunks = [
                        GenerationChunk(batch[r], piece, token, session.result(r) if last.get(r) == i else None)
                        for i, (r, token, piece) in enumerate(events)
                    ]
            yield from chunks
