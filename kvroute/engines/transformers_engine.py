"""The embedded engine: a transformers model in this process."""

from __future__ import annotations

import asyncio
import logging
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from kvroute_kernels import KVView
from torch import Tensor

from kvroute.engines.base import Vectors
from kvroute.engines.batching import plan_batches
from kvroute.engines.decoding import DecodeSession, Prefix
from kvroute.engines.loading import describe, load_model
from kvroute.engines.memory import is_out_of_memory
from kvroute.engines.prompts import PromptTokenizer
from kvroute.engines.slab import SlabCache, StopForwardError
from kvroute.engines.threads import in_thread
from kvroute.errors import (
    EmptyTextError,
    InvalidInputError,
    OutOfMemoryError,
    TextTooLongError,
    UnsupportedModelError,
)
from kvroute.features import FeaturePlan, Features, plan_features
from kvroute.generation import CancelToken, Generation, GenerationChunk, Message, Prompt, SamplingOptions, as_prompts
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec, pool
from kvroute.progress import progress_bar
from kvroute.token_weights import FrequencyTable

logger = logging.getLogger(__name__)

_BUDGET_CPU, _BUDGET_GPU = 2048, 16384


class TransformersEngine:
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

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        revision: str | None = None,
        token_budget: int | None = None,
    ) -> None:
        if token_budget is not None and token_budget < 1:
            raise InvalidInputError(f"token_budget is at least 1 token, not {token_budget}.")
        if model.training:
            raise InvalidInputError(
                "The model is in training mode, where dropout would change its cache.", hint="Call model.eval() first."
            )
        self.model = model
        self._tokenizer = tokenizer
        self.token_budget = token_budget or (_BUDGET_CPU if model.device.type == "cpu" else _BUDGET_GPU)
        self._info = describe(model, name=name, revision=revision)
        self._prompts = PromptTokenizer(tokenizer, self._info.name)
        self._sif: dict[float, Tensor] = {}

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

    @property
    def info(self) -> ModelInfo:
        """Sizes, name, revision and fingerprint."""
        return self._info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._tokenizer

    def __repr__(self) -> str:
        return f"TransformersEngine({self._info.name!r}, {self._info.dtype}, {self.model.device})"

    # ------------------------------------------------------------------ tokens

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat with the turn opened for the model.

        Raises:
            ChatTemplateError: messages, and no chat template (or it refuses them).
            InvalidInputError: the text can't be tokenized (a lone surrogate, say).
        """
        return self._prompts.tokenize(prompt)

    def tokenize_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, in one call of the tokenizer.

        Raises:
            InvalidInputError: a text can't be tokenized, naming its index.
        """
        return self._prompts.tokenize_texts(texts)

    def check_lengths(self, token_ids: Sequence[Sequence[int]], limit: int | None = None) -> None:
        """Refuse texts that are empty or don't fit.

        Raises:
            EmptyTextError: naming the index.
            TextTooLongError: naming the index and the length.
        """
        limit = self._info.context if limit is None else limit
        for index, ids in enumerate(token_ids):
            if len(ids) == 0:
                raise EmptyTextError(index)
            if len(ids) > limit:
                raise TextTooLongError(index, len(ids), limit)

    # ------------------------------------------------------------------ prefill

    def prefill(
        self,
        token_ids: Sequence[Sequence[int]],
        *,
        layers: Sequence[int] | None = None,
        padding: Literal["left", "right"] = "right",
        progress: bool | None = None,
    ) -> Iterator[tuple[list[int], KVView]]:
        """Run texts and give their caches, batch by batch, the longest texts first.

        The forward is left as soon as the deepest of ``layers`` has its keys and values: nothing above it
        runs, nor does the LM head.

        Args:
            token_ids: the texts, at least one token each.
            layers: attention layers to keep; all by default.
            padding: side of the padding. Right needs no mask and is faster; the results agree.
            progress: whether to show a bar; by default on a terminal.

        Yields:
            indices of the batch's texts, and the view of their cache, valid until the next one.

        Raises:
            EmptyTextError, TextTooLongError: before anything runs.
            OutOfMemoryError: a single text does not fit the memory.
        """
        self.check_lengths(token_ids)
        lengths = [len(ids) for ids in token_ids]
        keep = frozenset(range(self._info.num_layers) if layers is None else layers)
        pending = plan_batches(lengths, self.token_budget)
        with progress_bar("Reading texts", len(lengths), show=progress) as advance:
            while pending:
                batch = pending.pop(0)
                view = None
                try:
                    view = self._prefill_batch([token_ids[i] for i in batch], keep, padding)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise OutOfMemoryError(
                            f"Text {batch[0]} with {lengths[batch[0]]} tokens does not fit the memory.",
                            hint="Split it, load the model in bfloat16, or use fewer layers.",
                        ) from error
                if view is None:
                    pending = self._halve_budget(lengths, [batch, *pending])
                    continue
                yield batch, view
                del view
                advance(len(batch))

    def _halve_budget(self, lengths: Sequence[int], pending: list[list[int]]) -> list[list[int]]:
        self.token_budget = max(1, self.token_budget // 2)
        warnings.warn(
            f"Out of memory: the token budget is halved to {self.token_budget} tokens a batch.",
            RuntimeWarning,
            stacklevel=3,
        )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        rest = [i for batch in pending for i in batch]
        return [[rest[i] for i in b] for b in plan_batches([lengths[i] for i in rest], self.token_budget)]

    @torch.inference_mode()
    def _prefill_batch(
        self, token_ids: Sequence[Sequence[int]], keep: frozenset[int], padding: Literal["left", "right"]
    ) -> KVView:
        device = self.model.device
        lengths = torch.tensor([len(ids) for ids in token_ids], device=device)
        width = max(len(ids) for ids in token_ids)
        cache = SlabCache(self.model.config, keep=keep, stop_after=max(keep), capacity=width)
        left = padding == "left"
        # Padding on the right comes after every real token, so a causal model needs no mask for it.
        rows = [[0] * (width - len(i)) + list(i) if left else list(i) + [0] * (width - len(i)) for i in token_ids]
        pads = (width - lengths) if left else None
        mask = positions = None
        if pads is not None:
            slots = torch.arange(width, device=device)[None]
            mask = (slots >= pads[:, None]).long()
            positions = (slots - pads[:, None]).clamp_min(0)
        with suppress(StopForwardError):
            self.model.get_decoder()(
                input_ids=torch.tensor(rows, device=device),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return cache.view(lengths, pads)

    def pool(
        self,
        token_ids: Sequence[Sequence[int]],
        specs: Sequence[PoolingSpec],
        *,
        sif_weights: Vectors | None = None,
        progress: bool | None = None,
    ) -> list[Vectors]:
        """Prefill texts once and pool their caches by each spec.

        Args:
            token_ids: the texts.
            specs: how to pool; layers deeper than the deepest they read are not run.
            sif_weights: ``[vocab]``, the SIF weight of every token, for specs that ask for it; by default from the
                frequencies that the vocabulary suggests.
            progress: whether to show a bar; by default on a terminal.

        Returns:
            for each spec ``[n, dim]`` float32, in the order of the texts.

        Raises:
            as :meth:`prefill` and :func:`kvroute.pooling.pool`.
        """
        out = [np.empty((len(token_ids), spec.dimension(self._info)), dtype=np.float32) for spec in specs]
        given = None if sif_weights is None else torch.as_tensor(sif_weights, device=self.model.device)
        if not specs or not len(token_ids):
            return out
        layers = sorted({layer for spec in specs for layer in spec.resolve(self._info.num_layers)})
        for batch, view in self.prefill(token_ids, layers=layers, progress=progress):
            for spec, vectors in zip(specs, out, strict=True):
                weights = None
                if spec.weights == "sif":
                    table = self.sif_weights(spec.sif_a) if given is None else given
                    weights = [table[torch.as_tensor(token_ids[i], device=table.device)] for i in batch]
                pooled = pool(view, spec, num_layers=self._info.num_layers, sif_weights=weights)
                vectors[batch] = pooled.float().cpu().numpy()
        return out

    def sif_weights(self, a: float) -> Tensor:
        """SIF weight of every token, ``[vocab]``, from the frequencies that the vocabulary suggests."""
        if a not in self._sif:
            table = FrequencyTable.from_vocabulary(self._tokenizer).weights(a)
            self._sif[a] = torch.from_numpy(table).to(self.model.device)
        return self._sif[a]

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
        return Prefix(tuple(ids), cache)

    @overload
    def generate(
        self,
        prompts: str,
        *,
        features: Features = None,
        options: SamplingOptions | None = None,
        prefix: Prefix | None = None,
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
            cancel: ends the work from elsewhere.
            progress: whether to show a bar for many prompts; by default on a terminal.

        Returns:
            a :class:`~kvroute.Generation` for one prompt, a list in their order for many.

        Raises:
            EmptyTextError, TextTooLongError, SpecError, ChatTemplateError, InvalidInputError: before anything runs.
            OutOfMemoryError: a single prompt does not fit the memory.
        """
        listed, single = as_prompts(prompts)
        run = self._plan(listed, features, options, sampling)
        found: dict[int, Generation] = {}
        show = False if single else progress
        with progress_bar("Writing answers", len(listed), show=show) as advance:
            for chunk in self._run(*run, prefix=prefix, cancel=cancel, follow_text=False):
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
        cancel: CancelToken | None = None,
        **sampling: Any,
    ) -> Iterator[GenerationChunk]:
        """:meth:`generate`, piece by piece. The last piece of each answer carries its whole ``generation``.

        Closing the iterator ends the work. Arguments are checked at the call, before the first piece.
        """
        listed, _ = as_prompts(prompts)
        run = self._plan(listed, features, options, sampling)
        return self._run(*run, prefix=prefix, cancel=cancel, follow_text=True)

    async def agenerate(self, prompts: Any, **kwargs: Any) -> Generation | list[Generation]:
        """:meth:`generate` in a thread. Cancelling the task ends the work."""
        cancel = kwargs.pop("cancel", None) or CancelToken()
        try:
            return await asyncio.to_thread(lambda: self.generate(prompts, cancel=cancel, **kwargs))
        except asyncio.CancelledError:
            cancel.cancel()
            raise

    async def astream(self, prompts: Any, **kwargs: Any) -> AsyncIterator[GenerationChunk]:
        """:meth:`stream` in a thread. Leaving the loop or cancelling the task ends the work."""
        cancel = kwargs.pop("cancel", None) or CancelToken()
        async for chunk in in_thread(self.stream(prompts, cancel=cancel, **kwargs), cancel):
            yield chunk

    def _plan(
        self, prompts: list[Prompt], features: Features, options: SamplingOptions | None, sampling: dict[str, Any]
    ) -> tuple[list[list[int]], FeaturePlan, SamplingOptions]:
        """Check everything before anything runs."""
        if options is not None and sampling:
            raise InvalidInputError(f"Give options or {sorted(sampling)}, not both.")
        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = (sampling["stop"],)
        chosen = options or SamplingOptions(**sampling)
        plan = plan_features(features)
        for _, spec in plan.pooled.values():
            spec.dimension(self._info)
        if plan.chain is not None:
            plan.chain.resolve(self._info.num_layers)
        ids = [self.tokenize(p) for p in prompts]
        self.check_lengths(ids, self._info.context - 1)
        for index, prompt in enumerate(ids):
            if len(prompt) + chosen.max_tokens > self._info.context + 1:
                raise TextTooLongError(
                    index,
                    len(prompt),
                    self._info.context + 1 - chosen.max_tokens,
                    hint=f"The context holds {self._info.context} tokens, prompt and answer together: "
                    f"shorten the prompt, or lower max_tokens ({chosen.max_tokens}).",
                )
        return ids, plan, chosen

    def _run(
        self,
        prompts: list[list[int]],
        plan: FeaturePlan,
        options: SamplingOptions,
        *,
        prefix: Prefix | None,
        cancel: CancelToken | None,
        follow_text: bool,
    ) -> Iterator[GenerationChunk]:
        lengths = [len(p) + options.max_tokens for p in prompts]
        pending = plan_batches(lengths, self.token_budget * 4)
        while pending:
            batch = pending.pop(0)
            session = DecodeSession(
                self.model,
                self._tokenizer,
                [prompts[i] for i in batch],
                batch,
                options,
                plan,
                num_layers=self._info.num_layers,
                prefix=prefix,
                sif_weights=self.sif_weights,
                follow_text=follow_text,
            )
            try:
                with torch.inference_mode():
                    session.prefill()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(batch) == 1:
                    raise OutOfMemoryError(
                        f"Prompt {batch[0]} with {len(prompts[batch[0]])} tokens does not fit the memory.",
                        hint="Shorten it, or load the model in bfloat16.",
                    ) from error
                session.active = []
                pending = self._halve_budget(lengths, [batch, *pending])
                continue
            yield from self._write(session, batch, cancel)

    def _write(self, session: DecodeSession, batch: list[int], cancel: CancelToken | None) -> Iterator[GenerationChunk]:
        while session.active:
            with torch.inference_mode():  # never across a yield: it would leak into the caller
                if cancel is not None and cancel.cancelled:
                    rest = session.cancel()
                    chunks = [GenerationChunk(batch[r], piece, None, session.result(r)) for r, piece in rest]
                else:
                    events = session.step()
                    done = {r: session.result(r) for r, _, _ in events if session.rows[r].finish}
                    chunks = [GenerationChunk(batch[r], piece, token, done.get(r)) for r, token, piece in events]
            yield from chunks
