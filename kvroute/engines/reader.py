"""What an engine around a transformers model reads: tokens, caches, pooled vectors, answers that exist."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvroute.engines.base import Vectors
from kvroute.engines.batching import READING_WASTE, plan_batches
from kvroute.engines.loading import describe
from kvroute.engines.memory import is_out_of_memory
from kvroute.engines.prompts import PromptTokenizer
from kvroute.engines.reading import Reading, Want, choice_logprobs_batch, prefill_batch, read_batch
from kvroute.engines.sampling import end_tokens
from kvroute.errors import (
    EmptyTextError,
    InvalidInputError,
    NonFiniteCacheError,
    OutOfMemoryError,
    SpecError,
    TextTooLongError,
)
from kvroute.generation import Prompt
from kvroute.info import ModelInfo
from kvroute.pooling import PoolingSpec, pool
from kvroute.progress import progress_bar
from kvroute.token_weights import FrequencyTable
from kvroute_kernels import KVView

T = TypeVar("T")

_BUDGET_CPU, _BUDGET_GPU = 2048, 16384


class TransformersReader:
    """The reading half of :class:`~kvroute.TransformersEngine`; see there for the arguments."""

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

    @property
    def info(self) -> ModelInfo:
        """Sizes, name, revision and fingerprint."""
        return self._info

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self._tokenizer

    # ------------------------------------------------------------------ tokens

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of a chat with the turn opened for the model.

        Raises:
            ChatTemplateError: messages, and no chat template (or it refuses them).
            InvalidInputError: the text can't be tokenized (a lone surrogate, say).
        """
        return self._prompts.tokenize(prompt)

    def tokenize_texts(self, texts: Sequence[str], *, special_tokens: bool = True) -> list[list[int]]:
        """Token ids of plain texts, in one call of the tokenizer.

        Args:
            texts: the texts.
            special_tokens: whether the tokenizer adds its own (a begin token, say).

        Raises:
            InvalidInputError: a text can't be tokenized, naming its index.
        """
        return self._prompts.tokenize_texts(texts, special_tokens=special_tokens)

    @property
    def end_token(self) -> int | None:
        """The token that closes an answer: the tokenizer's own end token if the model stops at it."""
        ends = end_tokens(self.model, self._tokenizer)
        own = getattr(self._tokenizer, "eos_token_id", None)
        return own if own in ends else min(ends, default=None)

    def check_lengths(
        self, token_ids: Sequence[Sequence[int]], limit: int | None = None, *, hint: str | None = None
    ) -> None:
        """Refuse texts that are empty or don't fit.

        Args:
            token_ids: the texts.
            limit: tokens a text may have; the context by default.
            hint: what to do about one that is longer.

        Raises:
            EmptyTextError: naming the index.
            TextTooLongError: naming the index and the length.
            InvalidInputError: a token that the model does not have, naming the index.
        """
        limit = self._info.context if limit is None else limit
        for index, ids in enumerate(token_ids):
            if len(ids) == 0:
                raise EmptyTextError(index)
            if len(ids) > limit:
                raise TextTooLongError(index, len(ids), limit, hint=hint)
            low, high = min(ids), max(ids)
            if low < 0 or high >= self._info.vocab_size:
                raise InvalidInputError(
                    f"Text {index} holds token {low if low < 0 else high}, and {self._info.name} has "
                    f"{self._info.vocab_size} tokens.",
                    hint="Use the tokenizer that the model was trained with.",
                )

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
            EmptyTextError, TextTooLongError, SpecError: before anything runs.
            OutOfMemoryError: a single text does not fit the memory.
        """
        self.check_lengths(token_ids)
        lengths = [len(ids) for ids in token_ids]
        keep = self._kept(layers)

        def run(batch: list[int]) -> KVView:
            return prefill_batch(self.model, [token_ids[i] for i in batch], keep, padding)

        return self._batched(lengths, run, "Reading texts", progress)

    def read(
        self,
        token_ids: Sequence[Sequence[int]],
        start: Sequence[int],
        *,
        want: Collection[Want],
        layers: Sequence[int] | None = None,
        progress: bool | None = None,
    ) -> Iterator[tuple[list[int], Reading]]:
        """Read answers that exist already, batch by batch: what the model would have seen while writing them.

        Only what is asked for is computed: for the cache alone nothing above its deepest layer is run, and the LM
        head sees the answers' positions only, if logits are asked for.

        Args:
            token_ids: prompt and answer of each.
            start: where each answer begins, at least 1.
            want: any of ``kv``, ``logits``, ``hidden``.
            layers: attention layers of the cache to keep; all by default.
            progress: whether to show a bar; by default on a terminal.

        Yields:
            indices of the batch's answers, and their :class:`~kvroute.engines.reading.Reading`, valid until the
            next one.

        Raises:
            EmptyTextError: an answer without a token. TextTooLongError: prompt and answer don't fit. Both name the
                index and come before anything runs.
            OutOfMemoryError: a single answer does not fit the memory.
        """
        self.check_lengths([ids[s:] if s >= 1 else [] for ids, s in zip(token_ids, start, strict=True)])
        self.check_lengths([ids[:-1] for ids in token_ids])
        keep = self._kept(layers)

        def run(batch: list[int]) -> Reading:
            chosen = [token_ids[i] for i in batch], [start[i] for i in batch]
            return read_batch(self.model, *chosen, frozenset(want), keep)

        return self._batched([len(ids) - 1 for ids in token_ids], run, "Reading answers", progress)

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
            as :meth:`prefill`.
        """
        self.check_lengths(token_ids)
        found = np.empty((len(token_ids), len(choices[0]) if choices else 0))

        def run(batch: list[int]) -> Tensor:
            asked = torch.tensor([list(choices[i]) for i in batch])
            return choice_logprobs_batch(self.model, [token_ids[i] for i in batch], asked)

        for batch, logprobs in self._batched([len(i) for i in token_ids], run, "Asking the model", progress):
            found[batch] = logprobs.numpy()
        return found

    def _kept(self, layers: Sequence[int] | None) -> frozenset[int]:
        """The layers to keep: all by default."""
        every = frozenset(range(self._info.num_layers))
        keep = every if layers is None else frozenset(layers)
        if not keep or not keep <= every:
            raise SpecError(
                f"Layers {sorted(keep)} were asked for, and {self._info.name} has {len(every)} attention layers.",
                hint=f"Use 0 to {len(every) - 1}.",
            )
        return keep

    def _batched(
        self, lengths: Sequence[int], run: Callable[[list[int]], T], label: str, progress: bool | None
    ) -> Iterator[tuple[list[int], T]]:
        """Run texts in batches under the token budget, the longest first; halves it when the memory is exhausted."""
        pending = plan_batches(lengths, self.token_budget)
        with progress_bar(label, len(lengths), show=progress) as advance:
            while pending:
                batch = pending.pop(0)
                result = None
                try:
                    result = run(batch)
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(batch) == 1:
                        raise OutOfMemoryError(
                            f"Text {batch[0]} with {lengths[batch[0]]} tokens does not fit the memory.",
                            hint="Split it, load the model in bfloat16, or use fewer layers.",
                        ) from error
                if result is None:
                    pending = self._halve_budget(lengths, [batch, *pending])
                    continue
                yield batch, result
                del result
                advance(len(batch))

    def _halve_budget(
        self, lengths: Sequence[int], pending: list[list[int]], share: int = 1, waste: float = READING_WASTE
    ) -> list[list[int]]:
        """Plan what is left anew, with half the budget, of which a batch may take ``share`` times the tokens."""
        self.token_budget = max(1, self.token_budget // 2)
        warnings.warn(
            f"Out of memory: the token budget is halved to {self.token_budget} tokens a batch.",
            RuntimeWarning,
            stacklevel=3,
        )
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        rest = [i for batch in pending for i in batch]
        plan = plan_batches([lengths[i] for i in rest], self.token_budget * share, waste=waste)
        return [[rest[i] for i in b] for b in plan]

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
                try:
                    pooled = pool(view, spec, num_layers=self._info.num_layers, sif_weights=weights)
                except NonFiniteCacheError as error:  # name the text, not its place in the batch
                    place = batch[error.sequence]
                    raise NonFiniteCacheError(place, error.layer, error.position, error.part) from error
                vectors[batch] = pooled.float().cpu().numpy()
        return out

    def sif_weights(self, a: float) -> Tensor:
        """SIF weight of every token, ``[vocab]``, from the frequencies that the vocabulary suggests."""
        if a not in self._sif:
            table = FrequencyTable.from_vocabulary(self._tokenizer).weights(a)
            self._sif[a] = torch.from_numpy(table).to(self.model.device)
        return self._sif[a]
