"""One batch of answers: a prefill, then steps. Prompt features and answers come out of the same prefill.

A row's tokens are its prompt and what follows. Those that are in the cache are its *held* ones; the others wait to be
run, one a step: usually the one that was just chosen, more where tokens were forced (:mod:`kvroute.engines.steering`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvroute.chains import ChainState
from kvroute.engines.sampling import Sampler, end_tokens
from kvroute.engines.slab import SlabCache
from kvroute.engines.steering import Steering
from kvroute.engines.text import TextStream
from kvroute.errors import fault_text
from kvroute.features import FeaturePlan
from kvroute.generation import FinishReason, Generation, SamplingOptions, Timings, Usage
from kvroute.pooling import PoolingSpec, pool
from kvroute.scores import Score, family, logit_scores
from kvroute_kernels import KVView

logger = logging.getLogger(__name__)

_FLUSH = 32
"""Tokens that the chains take at once: they stay online, and their fixed cost is shared."""
_SPARE = 256
"""Tokens of room for the answer at first; the cache grows past it."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens whose keys and values are kept, for prompts that begin with them.

    Made by :meth:`kvroute.TransformersEngine.prefix`. Read-only: any number of generations, in any threads,
    may continue it at once.
    """

    token_ids: tuple[int, ...]
    cache: SlabCache
    fingerprint: str
    name: str

    def common(self, ids: Sequence[int]) -> int:
        """How many of its tokens a prompt begins with."""
        count = 0
        for mine, theirs in zip(self.token_ids, ids, strict=False):
            if mine != theirs:
                break
            count += 1
        return count


Event = tuple[int, int | None, str]
"""Row, token, text."""


@dataclass(slots=True)
class _Row:
    prompt: list[int]
    text: TextStream
    tokens: list[int]
    pad: int = 0  # slots on the left that hold nothing
    cached: int = 0
    noted: int = 0  # tokens that were chosen, not forced: those of the logit sums
    fed: int = 0  # answer tokens whose keys and values the chains have
    finish: FinishReason | None = None
    ended_at: float = 0.0
    ran: int = 0  # tokens in the cache when it ended
    logit_sums: Tensor | None = None
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
        self.model, self.tokenizer, self.options, self.plan = model, tokenizer, options, plan
        self.num_layers = num_layers
        self.prefix = prefix
        self.steering = steering
        self.sif_weights = sif_weights
        self.follow_text = follow_text or bool(options.stop)
        self.device = model.device
        self.rows = [_Row(list(p), TextStream(tokenizer, options.stop), []) for p in prompts]
        penalty = options.repetition_penalty or getattr(model.generation_config, "repetition_penalty", None) or 1.0
        self.sampler = Sampler(options, streams, float(penalty))
        self.ends = end_tokens(model, tokenizer)
        self.active = list(range(len(self.rows)))  # rows still being written
        self.lanes = list(self.active)  # the row in each sequence of the cache
        self.features: list[dict[str, np.ndarray[Any, np.dtype[np.float32]]]] = [{} for _ in self.rows]
        self.errors: list[dict[str, str]] = [{} for _ in self.rows]
        self.chain = ChainState(len(self.rows), plan.chain, num_layers) if plan.chain else None
        self.cache: SlabCache
        self.logits: Tensor
        self.width = max(len(r.prompt) for r in self.rows)
        for row in self.rows:
            row.pad = self.width - len(row.prompt)
        self.padding = torch.tensor([r.pad for r in self.rows], device=self.device)
        self.slots = self.width  # of the cache, padding included
        self.flushed = 0  # steps since the chains were fed
        self.prefilled = False
        self.feature_seconds = 0.0
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
        self._prompt_features()
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
        if self.plan.logits:
            self._note_logits(logits, due, tokens)
        events: list[Event] = []
        for r, token in zip(due, tokens, strict=True):
            row = self.rows[r]
            row.noted += 1
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
        self.flushed += 1
        if self.chain is not None and self.flushed % _FLUSH == 0:
            self._feed_chain(self.active)

    def cancel(self) -> list[tuple[int, str]]:
        """End all answers here; returns (row, rest of its text) of each."""
        ended = list(self.active)
        for r in ended:
            self.rows[r].finish = "cancelled"
            if not self.prefilled:
                self.errors[r] = dict.fromkeys(self.plan.pooled, "The work was cancelled before it began.")
        rest = [(r, self.rows[r].text.finish() if self.follow_text else "") for r in ended]
        self._close(ended)
        return rest

    def result(self, r: int) -> Generation:
        """The answer of a row that has ended."""
        row = self.rows[r]
        assert row.finish is not None
        text = row.text.text if self.follow_text else self._decode(row)
        generated = len(row.tokens)
        scores = self._scores(r)
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
                features=self.feature_seconds,
            ),
            features=self.features[r],
            scores=scores,
            feature_errors=self.errors[r],
            prefix=row.kept,
        )

    def _decode(self, row: _Row) -> str:
        kept = row.tokens[:-1] if row.tokens and row.tokens[-1] in self.ends else row.tokens
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def _scores(self, r: int) -> dict[str, Score]:
        row = self.rows[r]
        scores: dict[str, Score] = {}
        if self.chain is not None:
            if "kv-coe" in self.errors[r]:
                scores.update({n: Score(None, self.errors[r]["kv-coe"]) for n in family("kv-coe")})
            else:
                scores.update(self.chain.scores(r))
        if self.plan.logits:
            if row.logit_sums is None or "logits" in self.errors[r]:
                reason = self.errors[r].get("logits", "the answer has no token")
                scores.update({n: Score(None, reason) for n in family("logits")})
            else:
                means = (row.logit_sums / row.noted).tolist()
                scores.update(logit_scores(means))
        if self.plan.length:
            scores["length"] = Score(float(len(row.tokens)))
        return scores

    def _close(self, ended: list[int]) -> None:
        """Answers that have just ended: their features, while their keys and values are there."""
        if self.chain is not None:
            self._feed_chain(ended)
        if any(of == "answer" for of, _ in self.plan.pooled.values()):
            self._answer_features(ended)
        if self.keep_cache and self.prefilled:
            self._keep(ended)
        now = time.perf_counter()
        for r in ended:
            self.rows[r].ended_at, self.rows[r].ran = now, self._held(r)
        self.active = [r for r in self.active if not self.rows[r].finish]

    def _keep(self, ended: Sequence[int]) -> None:
        """Copy the caches of answers that have just ended. Recurrent states belong to no token: such are not kept."""
        if len(self.cache.attention_layers) != len(self.cache.layers):
            return
        for r in ended:
            row, held = self.rows[r], self._held(r)
            cache = self.cache.copy_sequence(self.model.config, self.lanes.index(r), row.pad, held)
            row.kept = Prefix(tuple((row.prompt + row.tokens)[:held]), cache, *self.model_id)

    # ------------------------------------------------------------------ features

    def view(self, rows: Sequence[int]) -> KVView:
        """The cache of some rows: their prompts and the answers' tokens but the last."""
        lanes = [self.lanes.index(r) for r in rows]
        lengths = [self._held(r) for r in self.lanes]
        view = self.cache.view(torch.tensor(lengths, device=self.device), self.padding)
        return view if lanes == list(range(len(self.lanes))) else view.select_sequences(lanes)

    def _waiting(self, row: int) -> int:
        """Tokens of a row that is being written which are not in the cache yet."""
        r = self.rows[row]
        return len(r.prompt) + len(r.tokens) - (self.slots - r.pad)

    def _written(self, row: int) -> int:
        """Tokens of an answer in the cache, but never the last one, which belongs to no feature (DESIGN section 3)."""
        r = self.rows[row]
        return max(min(self.slots - r.pad - len(r.prompt), len(r.tokens) - 1), 0)

    def _held(self, row: int) -> int:
        """Tokens of a row in the cache, prompt included."""
        r = self.rows[row]
        return min(self.slots - r.pad, len(r.prompt) + max(len(r.tokens) - 1, 0))

    # ------------------------------------------------------------------ what a steering sees

    def pooled(self, rows: Sequence[int], spec: PoolingSpec) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Pooled vectors of all that is in the cache of some rows: see :class:`SteeredSession`."""
        return self._pooled(list(rows), spec, [0] * len(rows), [self._held(r) for r in rows])

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

    def _guard(self, rows: Sequence[int], name: str, work: Callable[[list[int]], None]) -> None:
        """Run feature work on some rows: a fault is noted and costs neither an answer nor its neighbours' features."""
        began = time.perf_counter()
        try:
            work(list(rows))
        except Exception as error:  # noqa: BLE001 - an answer is worth more than its features
            if len(rows) > 1:
                for r in rows:
                    self._guard([r], name, work)
                return
            message = fault_text(error)
            logger.warning("The feature %r is missing: %s", name, message)
            self.errors[rows[0]].setdefault(name, message)
        self.feature_seconds += time.perf_counter() - began

    def _prompt_features(self) -> None:
        for name, (of, spec) in self.plan.pooled.items():
            if of == "prompt":

                def work(rows: list[int], name: str = name, spec: Any = spec) -> None:
                    self._pool(name, spec, rows, [0] * len(rows), [len(self.rows[r].prompt) for r in rows])

                self._guard(range(len(self.rows)), name, work)

    def _answer_features(self, ended: list[int]) -> None:
        empty = [r for r in ended if self._written(r) == 0]
        full = [r for r in ended if self._written(r) > 0]
        for name, (of, spec) in self.plan.pooled.items():
            if of != "answer":
                continue
            for r in empty:
                self.errors[r][name] = "The answer has no token with keys and values."
            if full:

                def work(rows: list[int], name: str = name, spec: Any = spec) -> None:
                    start = [len(self.rows[r].prompt) for r in rows]
                    stop = [s + self._written(r) for s, r in zip(start, rows, strict=True)]
                    self._pool(name, spec, rows, start, stop)

                self._guard(full, name, work)

    def _pool(self, name: str, spec: Any, rows: list[int], start: list[int], stop: list[int]) -> None:
        for r, vector in zip(rows, self._pooled(rows, spec, start, stop), strict=True):
            self.features[r][name] = vector

    def _pooled(
        self, rows: list[int], spec: Any, start: list[int], stop: list[int]
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        weights = None
        if spec.weights == "sif" and self.sif_weights is not None:
            table = self.sif_weights(spec.sif_a)
            ids = [self.rows[r].prompt + self.rows[r].tokens for r in rows]
            weights = [table[torch.tensor(i, device=table.device)] for i in ids]
        vectors = pool(self.view(rows), spec, num_layers=self.num_layers, start=start, stop=stop, sif_weights=weights)
        return vectors.float().cpu().numpy()

    def _feed_chain(self, rows: Sequence[int]) -> None:
        chain = self.chain
        due = [r for r in rows if self.rows[r].fed < self._written(r) and "kv-coe" not in self.errors[r]]
        if chain is None or not due:
            return

        def work(rows: list[int]) -> None:
            start = [len(self.rows[r].prompt) + self.rows[r].fed for r in rows]
            stop = [len(self.rows[r].prompt) + self._written(r) for r in rows]
            chain.update_view(self.view(rows), rows, start, stop)
            for r, s in zip(rows, stop, strict=True):
                self.rows[r].fed = s - len(self.rows[r].prompt)

        self._guard(due, "kv-coe", work)

    def _note_logits(self, logits: Tensor, due: Sequence[int], tokens: Sequence[int]) -> None:
        place = {r: i for i, r in enumerate(due)}

        def work(rows: list[int]) -> None:
            index = torch.tensor([place[r] for r in rows], device=logits.device)
            logprobs = torch.log_softmax(logits if len(rows) == len(place) else logits[index], dim=-1)
            taken = torch.tensor(tokens, device=logits.device)[index]
            noted = logit_statistics(logprobs, logprobs.gather(1, taken[:, None])[:, 0]).double().cpu()
            for r, statistics in zip(rows, noted, strict=True):
                sums = self.rows[r].logit_sums
                self.rows[r].logit_sums = statistics if sums is None else sums + statistics

        self._guard(due, "logits", work)


def logit_statistics(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Per position: log-probability of the chosen token, entropy in nats, probability of the likeliest token.

    Args:
        logprobs: ``[n, vocab]``.
        chosen: ``[n]``, log-probability of the token that was taken.

    Returns:
        ``[n, 3]``, in the order of ``family("logits")``.
    """
    probabilities = logprobs.exp()
    entropy = torch.special.entr(probabilities).sum(dim=-1)
    return torch.stack([chosen, entropy, probabilities.amax(dim=-1)], dim=1)
