"""One batch of answers: a prefill, then steps. Prompt features and answers come out of the same prefill.

A row's tokens are its prompt and what follows. Those that are in the cache are its *held* ones; the others wait to be
run, one a step: usually the one that was just chosen, more where tokens were forced (:mod:`kvroute.engines.steering`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvroute.engines.prefix import Prefix
from kvroute.engines.sampling import Sampler, end_tokens
from kvroute.engines.session_features import SessionFeatures
from kvroute.engines.slab import SlabCache
from kvroute.engines.steering import Steering
from kvroute.engines.text import TextStream
from kvroute.features import FeaturePlan
from kvroute.generation import FinishReason, Generation, SamplingOptions, Timings, Usage
from kvroute.pooling import PoolingSpec
from kvroute_kernels import KVView

_FLUSH = 32
"""Tokens that the chains take at once: they stay online, and their fixed cost is shared."""
_SPARE = 256
"""Tokens of room for the answer at first; the cache grows past it."""


Event = tuple[int, int | None, str]
"""Row, token, text."""


@dataclass(slots=True)
class _Row:
    prompt: list[int]
    text: TextStream
    tokens: list[int]
    pad: int = 0  # slots on the left that hold nothing
    cached: int = 0
    finish: FinishReason | None = None
    ended_at: float = 0.0
    ran: int = 0  # tokens in the cache when it ended
    kept: Prefix | None = None


class DecodeSession:
    """Prefills some prompts and writes their answers, one token a step.

    Args:
        model: a transformers causal model.
        tokenizer: its tokenizer.
        prompts: token ids, one list a prompt.
        streams: each prompt's random stream, from :func:`~kvroute.engines.sampling.random_streams`.
        options: how answers are written.
        plan: features to compute.
        prefix: a cache that prompts may continue.
        sif_weights: SIF weight of every token for an ``a``, for pooled features that need them.
        follow_text: whether text is needed while it is written (streaming, stop texts).
        steering: puts tokens behind the prompts and into answers.
        keep_cache: whether each answer's cache is kept, as a :class:`Prefix` for prompts that begin like it.
        model_id: fingerprint and name of the model, for kept caches.

    Equal prompts are run once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        streams: Sequence[int],
        options: SamplingOptions,
        plan: FeaturePlan,
        *,
        num_layers: int,
        prefix: Prefix | None = None,
        sif_weights: Callable[[float], Tensor] | None = None,
        follow_text: bool = False,
        steering: Steering | None = None,
        keep_cache: bool = False,
        model_id: tuple[str, str] = ("", ""),
    ) -> None:
        self.keep_cache, self.model_id = keep_cache, model_id
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.prefix = prefix
        self.steering = steering
        self.follow_text = follow_text or bool(options.stop)
        self.device = model.device
        self.rows = [_Row(list(p), TextStream(tokenizer, options.stop), []) for p in prompts]
        penalty = options.repetition_penalty or getattr(model.generation_config, "repetition_penalty", None) or 1.0
        self.sampler = Sampler(options, streams, float(penalty))
        self.ends = end_tokens(model, tokenizer)
        self.active = list(range(len(self.rows)))  # rows still being written
        self.lanes = list(self.active)  # the row in each sequence of the cache
        self.features = SessionFeatures(self, plan, num_layers, sif_weights)
        self.cache: SlabCache
        self.logits: Tensor
        self.width = max(len(r.prompt) for r in self.rows)
        for row in self.rows:
            row.pad = self.width - len(row.prompt)
        self.padding = torch.tensor([r.pad for r in self.rows], device=self.device)
        self.slots = self.width  # of the cache, padding included
        self.steps = 0  # run behind the prompts
        self.prefilled = False
        self.prefill_seconds = 0.0
        self.started = time.perf_counter()

    # ------------------------------------------------------------------ model

    def prefill(self) -> None:
        """Run the prompts; leaves the logits of the first tokens and the prompts' features."""
        room = min(self.options.max_tokens, _SPARE)
        self.cache = SlabCache(self.model.config, capacity=self.width + room)
        place: dict[tuple[int, ...], int] = {}  # of each prompt among those that are run
        source = [place.setdefault(tuple(r.prompt), len(place)) for r in self.rows]
        unique = [source.index(p) for p in range(len(place))] if len(place) < len(self.rows) else source
        shared = 0
        if self.prefix is not None:
            shared = min(min(self.prefix.common(r.prompt), len(r.prompt) - 1) for r in self.rows)
        new = self.width - shared
        if shared:
            assert self.prefix is not None
            kept = [len(self.rows[i].prompt) - new for i in unique]
            self.cache.continue_from(self.prefix.cache, kept, self.width)
        ids, positions = [], []
        fill = next(iter(self.ends), 0)
        for row in (self.rows[i] for i in unique):
            taken = row.prompt[-new:]
            pad = new - len(taken)
            row.cached = len(row.prompt) - len(taken)
            ids.append([fill] * pad + taken)
            positions.append([0] * pad + list(range(row.cached, len(row.prompt))))
        everyone = self.padding
        self.padding = everyone[torch.tensor(unique, device=self.device)]
        self._forward(torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device))
        if len(unique) < len(self.rows):
            copies = torch.tensor(source, device=self.device)
            self.cache.select_sequences(copies)
            self.logits = self.logits[copies]
            ran = set(unique)
            for i, row in enumerate(self.rows):
                if i not in ran:
                    row.cached = len(row.prompt)
        self.padding = everyone
        self.prefilled = True
        self.prefill_seconds = time.perf_counter() - self.started
        self.features.read_prompts()
        if self.steering is not None:
            self._begin(self.steering)

    def _begin(self, steering: Steering) -> None:
        """Put the tokens behind the prompts that the steering wants there.

        As many as all rows get run at once; the rest of longer ones one a step, beside rows that write already.
        """
        suffixes = steering.begin(self, list(self.active))
        for r, suffix in enumerate(suffixes):
            if self.rows[r].finish:
                suffixes[r] = []
            else:
                self.rows[r].prompt += suffix
        together = min((len(s) for s, row in zip(suffixes, self.rows, strict=True) if not row.finish), default=0)
        if len(self.cache.attention_layers) != len(self.cache.layers):
            together = min(together, 1)  # recurrent layers continue one token at a time
        if together == 0:
            return
        begin = [len(r.prompt) - len(s) for r, s in zip(self.rows, suffixes, strict=True)]
        # A row that ends here runs along with its last token, which nothing reads.
        ids = [s[:together] or row.prompt[-1:] * together for s, row in zip(suffixes, self.rows, strict=True)]
        positions = [list(range(b, b + together)) for b in begin]
        self.slots += together
        self._forward(torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device))

    def _forward(self, ids: Tensor, positions: Tensor) -> None:
        """Run new tokens of all lanes; keeps the last one's logits, float32 ``[lanes, vocab]``."""
        mask = None
        if bool(self.padding.any()):
            slots = torch.arange(self.slots, device=self.device)
            mask = (slots[None] >= self.padding[:, None]).long()
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1].float()

    def step(self) -> list[Event]:
        """Choose one token for every answer that is being written, then run them.

        Returns:
            (row, token, text that can be shown now) of each, forced tokens among them; the token is None where a
            steering ended an answer.
        """
        events = self._end_stopped()  # by the steering, before anything was written
        due = [r for r in self.active if self._waiting(r) == 0]
        events += self._choose(due) if due else []
        ended = [r for r in due if self.rows[r].finish]
        if ended:
            self._close(ended)
        if self.steering is not None:
            events += self._steer(self.steering, [r for r in due if not self.rows[r].finish])
        if self.active:
            self._advance()
        return events

    def _choose(self, due: list[int]) -> list[Event]:
        lane_of = {row: lane for lane, row in enumerate(self.lanes)}
        lanes = [lane_of[r] for r in due]
        logits = self.logits if len(lanes) == len(self.lanes) else self.logits[lanes]
        contexts = [self.rows[r].prompt + self.rows[r].tokens for r in due] if self.sampler.penalty != 1 else []
        tokens = self.sampler.choose(logits, due, contexts)
        self.features.note_logits(logits, due, tokens)
        events: list[Event] = []
        for r, token in zip(due, tokens, strict=True):
            row = self.rows[r]
            piece = self._add(row, token)
            if token in self.ends:
                row.finish = "stop"
            if row.finish and self.follow_text:
                piece += row.text.finish()
            events.append((r, token, piece))
        return events

    def _steer(self, steering: Steering, rows: list[int]) -> list[Event]:
        events: list[Event] = []
        for r, forced in (steering.after(self, rows) if rows else {}).items():
            row = self.rows[r]
            for token in forced:
                if row.finish:
                    break
                events.append((r, token, self._add(row, token)))
        return events + self._end_stopped()

    def _add(self, row: _Row, token: int) -> str:
        """Put a token behind a row, which may end it; returns the text that can be shown now."""
        row.tokens.append(token)
        piece = row.text.push(token) if self.follow_text and token not in self.ends else ""
        if row.text.stopped:
            row.finish = "stop"
        elif len(row.tokens) >= self.options.max_tokens:
            row.finish = "length"
        return piece

    def _end_stopped(self) -> list[Event]:
        """Close answers that were ended by a steering: what is left of their text."""
        stopped = [r for r in self.active if self.rows[r].finish]
        if not stopped:
            return []
        events: list[Event] = [(r, None, self.rows[r].text.finish() if self.follow_text else "") for r in stopped]
        self._close(stopped)
        return events

    def _advance(self) -> None:
        if len(self.active) <= len(self.lanes) // 2:  # most answers have ended: stop carrying them along
            keep = torch.tensor([self.lanes.index(r) for r in self.active], device=self.device)
            self.cache.select_sequences(keep)
            self.padding = self.padding[keep]
            self.lanes = list(self.active)
        ids, positions = [], []
        for row in (self.rows[r] for r in self.lanes):
            place = self.slots - row.pad
            behind = place - len(row.prompt)
            # An answer that has ended runs along with its last token, which nothing reads.
            following = row.tokens or row.prompt[-1:]
            ids.append([row.prompt[place] if behind < 0 else following[min(behind, len(following) - 1)]])
            positions.append([place])
        self.slots += 1
        self._forward(torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device))
        self.steps += 1
        if self.steps % _FLUSH == 0:
            self.features.feed_chains(self.active)

    def cancel(self) -> list[tuple[int, str]]:
        """End all answers here; returns (row, rest of its text) of each."""
        ended = list(self.active)
        for r in ended:
            self.rows[r].finish = "cancelled"
            if not self.prefilled:
                self.features.not_begun(r)
        rest = [(r, self.rows[r].text.finish() if self.follow_text else "") for r in ended]
        self._close(ended)
        return rest

    def result(self, r: int) -> Generation:
        """The answer of a row that has ended."""
        row = self.rows[r]
        assert row.finish is not None
        text = row.text.text if self.follow_text else self._decode(row)
        generated = len(row.tokens)
        return Generation(
            text=text,
            token_ids=row.tokens,
            prompt_token_ids=row.prompt,
            finish_reason=row.finish,
            usage=Usage(
                prompt=len(row.prompt),
                cached=row.cached,
                computed=row.ran - row.cached if self.prefilled else 0,
                generated=generated,
            ),
            timings=Timings(
                prefill=self.prefill_seconds,
                decode=row.ended_at - self.started - self.prefill_seconds,
                features=self.features.seconds,
            ),
            features=self.features.pooled[r],
            scores=self.features.scores(r),
            feature_errors=self.features.errors[r],
            prefix=row.kept,
        )

    def _decode(self, row: _Row) -> str:
        kept = row.tokens[:-1] if row.tokens and row.tokens[-1] in self.ends else row.tokens
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _close(self, ended: list[int]) -> None:
        """Answers that have just ended: their features, while their keys and values are there."""
        self.features.close(ended)
        if self.keep_cache and self.prefilled:
            self._keep(ended)
        now = time.perf_counter()
        for r in ended:
            self.rows[r].ended_at, self.rows[r].ran = now, self.held(r)
        self.active = [r for r in self.active if not self.rows[r].finish]

    def _keep(self, ended: Sequence[int]) -> None:
        """Copy the caches of answers that have just ended. Recurrent states belong to no token: such are not kept."""
        if len(self.cache.attention_layers) != len(self.cache.layers):
            return
        for r in ended:
            row, held = self.rows[r], self.held(r)
            cache = self.cache.copy_sequence(self.model.config, self.lanes.index(r), row.pad, held)
            row.kept = Prefix(tuple((row.prompt + row.tokens)[:held]), cache, *self.model_id)

    # ------------------------------------------------------------------ what features see

    def view(self, rows: Sequence[int]) -> KVView:
        """The cache of some rows: their prompts and the answers' tokens but the last."""
        lanes = [self.lanes.index(r) for r in rows]
        lengths = [self.held(r) for r in self.lanes]
        view = self.cache.view(torch.tensor(lengths, device=self.device), self.padding)
        return view if lanes == list(range(len(self.lanes))) else view.select_sequences(lanes)

    def _waiting(self, row: int) -> int:
        """Tokens of a row that is being written which are not in the cache yet."""
        r = self.rows[row]
        return len(r.prompt) + len(r.tokens) - (self.slots - r.pad)

    def written(self, row: int) -> int:
        """Tokens of an answer in the cache, but never the last one, which belongs to no feature (docs/concepts.md)."""
        r = self.rows[row]
        return max(min(self.slots - r.pad - len(r.prompt), len(r.tokens) - 1), 0)

    def held(self, row: int) -> int:
        """Tokens of a row in the cache, prompt included, but never an answer's last one."""
        r = self.rows[row]
        return min(self.slots - r.pad, len(r.prompt) + max(len(r.tokens) - 1, 0))

    # ------------------------------------------------------------------ what a steering sees

    def pooled(
        self,
        rows: Sequence[int],
        spec: PoolingSpec,
        *,
        start: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Pooled vectors of what is in the cache of some rows: see :class:`SteeredSession`."""
        first = [0] * len(rows) if start is None else list(start)
        last = [self.held(r) for r in rows] if stop is None else list(stop)
        return self.features.pool_rows(list(rows), spec, first, last)

    def tokens_of(self, row: int) -> Sequence[int]:
        """The row's tokens behind its prompt."""
        return self.rows[row].tokens

    def room(self, row: int) -> int:
        """How many more tokens the row may have."""
        return self.options.max_tokens - len(self.rows[row].tokens)

    def end(self, rows: Sequence[int]) -> None:
        """End some answers here."""
        for r in rows:
            self.rows[r].finish = self.rows[r].finish or "cancelled"
