"""What runs beside the engine's scheduler: what each request asks, what a step has to read, and the results.

A request's result is a dict that the engine keeps by reference from its end on and that is filled when the
workers' numbers of the same step arrive. No engine is needed to test it.

Where the worker is at hand (in this process, alone, in step with us), an answer is read in pieces of :data:`PIECE`
tokens, and its rest when it ends: its pages are still whole then, and a piece costs little more than a token. Where
it is not, each step's tokens are read behind that step, for it may be the last.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from kvroute.chains import (
    NO_TOKEN,
    NOT_FINITE,
    ChainScores,
    named_scores,
    no_score,
    scores_of_steps,
    too_short,
)
from kvroute.errors import AskError, InvalidInputError, KVRouteError
from kvroute.features import FeaturePlan, Of
from kvroute.heads.head import DifficultyHead
from kvroute.pooling import PoolingSpec, reduced
from kvroute.route_steering import finite
from kvroute.scores import Score
from kvroute.serving.answers import Result, Tokens, public_text
from kvroute.serving.asks import CONFIDENCE, read_ask, vectors_of
from kvroute.serving.config import ServingConfig
from kvroute.serving.deciding import Decided, Decisions, ThinkingTokens, first_read
from kvroute.serving.messages import Array, Look, Looked, Norms, StepMeta, StepRequest, StepResults, Sums
from kvroute.serving.tally import Tally
from kvroute.serving.worker import feature_key, window_of

_log = logging.getLogger(__name__)
PIECE = 16
"""Tokens of an answer that are read at once, where they can wait."""
_OFF = "kvroute turned its features off after repeated faults; the server's log has the first of them."
_LOST = "The numbers that the workers read of it did not all arrive."


BlockIds = Sequence[Sequence[int]]
"""By KV cache group, a request's block ids."""


class Reader(Protocol):
    """A worker that reads at once."""

    def read(self, requests: Sequence[StepRequest]) -> StepResults:
        """See :meth:`kvroute.serving.worker.WorkerSide.read`."""
        ...


@dataclass(slots=True)
class _Request:
    """What is known of a running request; ``given`` tokens behind its prompt are an answer that came with it."""

    prompt_len: int
    plan: FeaturePlan | None
    tokens: Sequence[int]
    body: dict[str, Any] | None = None
    error: str | None = None
    given: int = 0
    vectors: dict[str, tuple[Of, PoolingSpec]] = field(default_factory=dict)
    of: frozenset[Of] = frozenset()  # what the vectors are of
    window: int = 0  # tokens behind an answer's newest that windowed sums need
    decided: Decided | None = None
    confidence: DifficultyHead | None = None
    sent: bool = False
    seen: bool = False
    pooled: bool = False
    fed: int = 0
    read: int = 0
    aborted: bool = False
    stop: int = 0  # tokens with keys and values, as far as was scheduled
    gone: bool = False  # its pages, before they were read to the end
    sums: dict[str, tuple[Array | None, Array | None, float]] = field(default_factory=dict)
    steps: list[Array] = field(default_factory=list)
    ends: tuple[float, Array, float] | None = None

    def wants(self, vectors: dict[str, tuple[Of, PoolingSpec]]) -> None:
        """Take the vectors that are asked for: what every step has to know of them is found out once."""
        self.vectors = vectors
        self.of = frozenset(of for of, _ in vectors.values())
        self.window = max((window_of(s) or 0 for of, s in vectors.values() if of == "answer"), default=0)

    @property
    def answer_start(self) -> int | None:
        """First token that its answer's features read; None while a mode's tokens may come before it."""
        return self.prompt_len if self.decided is None else self.decided.answer_start


@dataclass(slots=True)
class _Closing:
    """A request that ended: what is known of it, its result, tokens of its answer, and its blocks while they last."""

    state: _Request
    box: dict[str, Any]
    answer: int
    blocks: BlockIds


class SchedulerSide:
    """Keeps what requests ask and get. No method raises.

    Args:
        config: the server's.
        block_sizes: tokens a block, by KV cache group.
        sif: SIF weight of every token ``[vocab]`` for an ``a``; None where no table can be had.
        off: why no feature can be read from this engine, or None.
        thinking: gives the model's thinking tokens, at the first use; None where there is no tokenizer.
        longest: most tokens that a prompt and its answer may have together.
        runs_ahead: whether the engine schedules a step before it has the tokens of the last.
        reader: gives the worker, as soon as it is there and if it is at hand; else None.
    """

    def __init__(
        self,
        config: ServingConfig,
        block_sizes: Sequence[int],
        sif: Callable[[float], Array] | None = None,
        off: str | None = None,
        *,
        thinking: Callable[[], ThinkingTokens] | None = None,
        longest: int = 2**31,
        runs_ahead: bool = False,
        reader: Callable[[], Reader | None] | None = None,
    ) -> None:
        self._config = config
        self._reader = None if runs_ahead else reader
        self._steps = 0
        self._decisions = Decisions(config, thinking, longest=longest, runs_ahead=runs_ahead)
        self._block_sizes = list(block_sizes)
        self._sif = sif
        self.off = off
        self.faults = 0
        self.tally = Tally()
        self.tally.features_off(off is not None)
        self._in_a_row = 0
        self._running: dict[str, _Request] = {}
        self._closing: dict[str, _Closing] = {}
        self._gone: list[str] = []
        self._held = 0

    @property
    def num_states(self) -> int:
        """Requests that something is kept for."""
        return len(self._running) + len(self._closing)

    @property
    def idle(self) -> bool:
        """Whether no running request asks for anything."""
        return not self._running

    def statistics(self) -> dict[str, Any] | None:
        """What there is to tell since the last time, or None (see :meth:`Tally.take`)."""
        self.tally.holding(self.num_states, self._held)
        return self.tally.take()

    def failed(self, error: Exception, request: str | None = None) -> None:
        """A hook failed: count it.

        Args:
            error: what it raised.
            request: that ended in the hook; nothing more can be said of it.
        """
        if request is not None:
            state = self._running.pop(request, None)
            self._closing.pop(request, None)
            if state is not None and state.seen:
                self._gone.append(request)
        self._fault(error, "hook")

    def on_request(
        self,
        request: str,
        params: object,
        prompt: Sequence[int] | int,
        tokens: Sequence[int] = (),
        *,
        limit: int = 2**31,
        structured: bool = False,
    ) -> None:
        """A request came.

        Args:
            request: the engine's id.
            params: its ``kv_transfer_params``, whatever was sent.
            prompt: length of its prompt, or the prompt.
            tokens: all its tokens, prompt first; a live list of the engine's.
            limit: most tokens of its answer.
            structured: whether a grammar constrains it.
        """
        length = prompt if isinstance(prompt, int) else len(prompt)
        given = 0
        try:
            ask = read_ask(params, self._config)
            if ask is None:
                return
            if ask.answer_from is not None:
                if ask.answer_from > length:
                    raise AskError(f"'answer_from' is {ask.answer_from}, and the prompt has {length} tokens.")
                given, length = length - ask.answer_from, ask.answer_from
            state = _Request(length, ask.plan, tokens, body=ask.to_dict(), error=self.off, given=given)
            if self.off is None:
                state.wants(vectors_of(ask, self._config))
                state.decided = self._decisions.of(ask, tokens, length, limit, structured=structured)
                state.confidence = None if ask.confidence is None else self._config.catalog.head(ask.confidence)
            self.tally.asked(ask)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            state = _Request(length, None, (), error=public_text(error))
            self.tally.refused()
            if not isinstance(error, KVRouteError):
                self._fault(error, "ask")
        self._running[request] = state

    def asked(self, request: str) -> bool:
        """Whether anything is to be read of a request."""
        state = self._running.get(request)
        return state is not None and (state.error is None or state.decided is not None)

    def decides(self, request: str) -> bool:
        """Whether tokens may be forced into a request."""
        state = self._running.get(request)
        return state is not None and state.decided is not None and not state.decided.policy.shadow

    def step(self, scheduled: Sequence[tuple[str, int, int, BlockIds | Callable[[], BlockIds]]]) -> StepMeta:
        """What the workers are to read behind a step.

        Args:
            scheduled: by request that :meth:`asked`: id, tokens computed before, tokens of this step, its blocks (or
                what gives them, if they are needed).
        """
        if self._closing:  # the engine ended them without a word from the workers
            self._close()
        self._steps += 1
        waits = self._steps % PIECE != 0 and self._reader is not None and self._reader() is not None
        meta = StepMeta(finished=self._gone)
        self._gone = []
        for request, start, count, blocks in scheduled:
            state = self._running.get(request)
            if state is None or not self.asked(request):
                continue
            try:
                state.stop = start + count
                entry = self._entry(request, state, blocks, waits=waits)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                state.error = public_text(error)
                if state.decided is not None and not state.decided.request.decision.mode:
                    state.decided.took(Looked(fault=state.error))
                self._fault(error, "schedule")
                continue
            if entry is not None:
                meta.requests.append(entry)
        return meta

    def merge(self, results: StepResults | None) -> None:
        """Take what the workers read (ranks merged) and fill the results of requests that ended in the step."""
        try:
            if results is not None:
                self._held = results.held
                self.tally.spent("worker", results.seconds)
                for _ in range(results.lost):
                    self._fault(None, "hook")
                self._take(results)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            self._fault(error, "merge")
        if self._closing:
            self._close()

    def finished(
        self, request: str, answer: int = 0, *, aborted: bool = False, blocks: BlockIds = ()
    ) -> dict[str, Any] | None:
        """A request ended (or was aborted): its result, filled as soon as the workers' numbers are there.

        Args:
            request: the engine's id.
            answer: tokens it wrote.
            aborted: it was ended from outside, as by a stop string; the step in flight counts no more.
            blocks: that hold its keys and values, until the next step.
        """
        state = self._running.pop(request, None)
        if state is None:
            return None
        answer += state.given
        state.aborted = aborted
        # what a client reads where nothing comes to fill it
        box = Result(tokens=Tokens(state.prompt_len, answer), error=state.error or _LOST).to_dict()
        self._closing[request] = _Closing(state, box, answer, blocks)
        if aborted:
            self._close([request])
        return box

    # ------------------------------------------------------------------ inside

    def _close(self, requests: Sequence[str] | None = None) -> None:
        """Read what requests that ended (all of them) were waiting with, and fill their results."""
        closing = list(self._closing) if requests is None else list(requests)
        reader = None if self._reader is None else self._reader()
        if reader is not None:
            self._read_rests(closing, reader)
        for request in closing:
            self._fill(request)

    def _read_rests(self, requests: Sequence[str], reader: Reader) -> None:
        entries = []
        for request in requests:
            found = self._closing[request]
            state = found.state
            if state.error is not None:
                continue
            if not self._reaches(found.blocks, state.stop):  # preempted, and ended before it ran again
                state.gone = True
                continue
            try:
                entry = self._entry(request, state, found.blocks, ends=True)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                state.error = public_text(error)
                self._fault(error, "schedule")
                continue
            if entry is not None:
                entries.append(entry)
        if not entries:
            return
        try:
            self._take(reader.read(entries))
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            for entry in entries:
                self._closing[entry.id].state.error = public_text(error)
            self._fault(error, "merge")

    def _reaches(self, blocks: BlockIds, stop: int) -> bool:
        """Whether blocks hold that many tokens."""
        return len(blocks) == len(self._block_sizes) and all(
            len(ids) * size >= stop for ids, size in zip(blocks, self._block_sizes, strict=True)
        )

    def _entry(
        self,
        request: str,
        state: _Request,
        blocks: BlockIds | Callable[[], BlockIds],
        *,
        waits: bool = False,
        ends: bool = False,
    ) -> StepRequest | None:
        """What is to be read of a request.

        Args:
            request: its id.
            state: what is known of it.
            blocks: its blocks.
            waits: less than a piece of its answer is left for later.
            ends: it ended; nothing is decided any more.
        """
        stop = state.stop
        of = state.of if state.error is None else frozenset()
        chain = state.error is None and state.plan is not None and state.plan.chain is not None
        look, force = None, None
        if state.decided is not None and not ends:
            look, force = state.decided.due(state.tokens, stop, self._sif_of)
        begin = state.answer_start
        prompt = "prompt" in of and not state.pooled and stop >= state.prompt_len
        low = max(state.fed, state.prompt_len if begin is None else begin)
        high = max(low, stop) if begin is not None and ("answer" in of or chain) else low
        if waits and not prompt and high - low < PIECE:
            high = low
        reads = prompt or high > low
        if not reads and look is None and force is None:
            return None
        window = min(state.window, low - begin) if reads and begin is not None else 0
        firsts = [0] if prompt else []
        firsts += [low - window] if high > low else []
        firsts += [self._first(look)] if look is not None else []
        first = min(firsts, default=stop)
        skip = tuple(first // size for size in self._block_sizes)
        held = blocks() if callable(blocks) else blocks
        entry = StepRequest(
            id=request,
            prompt_len=state.prompt_len,
            answer_start=state.prompt_len if begin is None else begin,
            low=low,
            high=high,
            prompt=prompt,
            skip=skip,
            blocks=tuple(list(b[s:]) for b, s in zip(held, skip, strict=True)),
            ask=None if state.sent or not reads else state.body,
            weights=self._weights(state, prompt, high > low, low - window, high) if reads else {},
            window=window,
            look=look,
            force=force,
        )
        state.seen = True
        if reads:
            state.sent, state.pooled = True, state.pooled or prompt
            if high > low:
                state.fed = high
        return entry

    def _first(self, look: Look) -> int:
        """First token that a look reads."""
        head = self._config.catalog.policy(look.policy).head
        head = head if head is None or look.mode is None else head.windows
        return 0 if head is None else first_read(head.spec, look.stop)

    def _sif_of(self, ids: Sequence[int], a: float) -> Array:
        if self._sif is None:
            raise InvalidInputError("This server has no tokenizer, so no frequencies for weights='sif'.")
        found = np.asarray(ids, dtype=np.int64)
        if (found < 0).any():
            raise InvalidInputError("The engine schedules ahead of its tokens, so weights='sif' has no token to weigh.")
        return self._sif(a)[found]

    def _weights(self, state: _Request, prompt: bool, answer: bool, low: int, high: int) -> dict[float, Array]:
        """SIF weights: of answer tokens, or of a prompt and of the answer tokens that came in the same step."""
        due = ({"prompt"} if prompt else set()) | ({"answer"} if answer else set())
        wanted = {s.sif_a for of, s in state.vectors.values() if s.weights == "sif" and of in due}
        if not wanted:
            return {}
        high = high if answer else state.prompt_len
        low = 0 if prompt else low
        ids = state.tokens[low:high]
        if len(ids) < high - low:
            raise InvalidInputError("The engine schedules ahead of its tokens, so weights='sif' has no token to weigh.")
        return {a: self._sif_of(ids, a) for a in wanted}

    def _take(self, results: StepResults) -> None:
        for request, why in results.faults.items():
            state = self._find(request)
            if state is not None and state.error is None:
                state.error = why
                self._fault(None, "reading")
                if state.decided is not None and not state.decided.request.decision.mode:
                    state.decided.took(Looked(fault=why))
        for request, found in results.looks.items():
            state = self._find(request)
            if state is not None and state.decided is not None and state.decided.took(found) is not None:
                self._fault(None, "decision")
        for key, sums in results.sums.items():
            self._take_sums(key, sums)
        if results.norms is not None:
            self._take_norms(results.norms)
        for request, stop in results.read.items():
            state = self._find(request)
            if state is not None:
                state.read = max(state.read, stop)

    def _take_sums(self, key: str, sums: Sums) -> None:
        for i, request in enumerate(sums.ids):
            state = self._find(request)
            if state is not None:
                state.sums[key] = (
                    None if sums.keys is None else sums.keys[i],
                    None if sums.values is None else sums.values[i],
                    float(sums.weight[i]),
                )

    def _take_norms(self, norms: Norms) -> None:
        stops = np.cumsum(norms.counts).tolist()
        low = 0
        for i, (request, high) in enumerate(zip(norms.ids, stops, strict=True)):
            state = self._find(request)
            if state is not None:
                state.steps.append(norms.steps[low:high])
                state.ends = (float(norms.span[i]), norms.layers[i], float(norms.layer_span[i]))
            low = high

    def _find(self, request: str) -> _Request | None:
        state = self._running.get(request)
        if state is None and request in self._closing:
            state = self._closing[request].state
        return state

    def _fill(self, request: str) -> None:
        found = self._closing.pop(request)
        state, box, answer = found.state, found.box, found.answer
        if state.seen:
            self._gone.append(request)
        tokens = Tokens(state.prompt_len, answer)
        try:
            result = Result(tokens=tokens, error=state.error)
            if state.decided is not None:
                self._end_decision(state, state.decided, result, answer)
            if state.error is None:
                self._finish(state, result, answer)
            box.update(result.to_dict())
            if state.seen and result.error is None and not result.faults and not _unread(result):
                self._in_a_row = 0  # a request that got all it asked for
            self.tally.answered(request, result, box, (state.body or {}).get("policy"))
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            box.update(Result.failed(error, tokens).to_dict())
            self._fault(error, "result")
            self.tally.failed(request, box)

    def _finish(self, state: _Request, result: Result, answer: int) -> None:
        assert state.plan is not None
        if state.gone:
            result.faults.append("The answer was not read to its end: the engine had taken its pages for another one.")
        missing = self._missing(state, answer)
        if missing:
            self._fault(None, "lost")
        for name, (of, spec) in state.vectors.items():
            found = state.sums.get(feature_key(of, spec))
            if of == "answer" and missing:
                if name == CONFIDENCE:
                    result.confidence = Score(None, _LOST)
                else:
                    result.faults.append(f"{name}: {_LOST}")
                continue
            if name == CONFIDENCE:
                result.confidence = self._confidence(state, None if found is None else pooled_vector(spec, *found))
                continue
            if found is None:
                what = (
                    "prompt was not read to its end" if of == "prompt" else "answer has no token with keys and values"
                )
                result.faults.append(f"{name}: The {what}.")
                continue
            vector = pooled_vector(spec, *found)
            if np.isfinite(vector).all():
                result.features[name] = vector
            else:
                result.faults.append(f"{name}: The cache holds values that are not finite.")
                self._fault(None, "not finite")
        if state.plan.chain is not None:
            lost = named_scores(no_score(_LOST), no_score(_LOST))
            result.scores |= lost if missing else chain_results(state.steps, state.ends)
        if state.plan.length:
            result.scores["length"] = Score(float(answer))

    def _missing(self, state: _Request, answer: int) -> bool:
        """Whether steps of the answer are missing in what the workers read: then it is of other tokens than it says."""
        begin = state.answer_start
        chain = state.plan is not None and state.plan.chain is not None
        if begin is None or not (chain or "answer" in state.of):
            return False
        end = state.prompt_len + answer - 1  # the last token has no keys and values
        if not state.aborted and begin < end and state.read < end:
            return True
        return chain and sum(map(len, state.steps)) != max(state.read - begin, 0)

    def _end_decision(self, state: _Request, decided: Decided, result: Result, answer: int) -> None:
        before = decided.request.decision.fault
        result.decision, thought = decided.end(state.tokens, answer)
        result.tokens = Tokens(state.prompt_len, answer, thought)
        if before is None and result.decision.fault is not None and answer > 0:
            self._fault(None, "decision")

    def _confidence(self, state: _Request, vector: Array | None) -> Score:
        """That an answer is right, in [0, 1]; or none and the reason."""
        assert state.confidence is not None
        if vector is None:
            return Score(None, "The answer has no token with keys and values.")
        try:
            return Score(float(finite(state.confidence.predict(vector[None]))[0]))
        except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
            self._fault(None if isinstance(error, KVRouteError) else error, "confidence")
            return Score(None, public_text(error))

    def _fault(self, error: Exception | None, kind: str) -> None:
        self.faults += 1
        self.tally.fault(kind)
        self._in_a_row += 1
        if error is not None and self.faults <= 5:
            _log.warning("kvroute failed.", exc_info=error)
        if self._in_a_row >= self._config.faults_before_off and self.off is None:
            self.off = _OFF
            self.tally.features_off(True)
            _log.error("%s", _OFF)


def _unread(result: Result) -> bool:
    """Whether a fault cost a request its decision."""
    return result.decision is not None and result.decision.fault is not None


def pooled_vector(spec: PoolingSpec, keys: Array | None, values: Array | None, weight: float) -> Array:
    """A feature ``[dim]`` float32 from its sums ``[n_layers, H, D]``."""
    sums = [None if x is None else torch.from_numpy(np.array(x))[None] for x in (keys, values)]
    found: Array = reduced(spec, sums[0], sums[1], torch.tensor([weight], dtype=torch.float32))[0].numpy()
    return found


def chain_results(steps: list[Array], ends: tuple[float, Array, float] | None) -> dict[str, Score]:
    """The scores of the family ``kv-coe`` from squared lengths (see :class:`~kvroute.serving.messages.Norms`)."""
    if ends is None:
        return named_scores(no_score(too_short(0)), no_score(NO_TOKEN))
    return named_scores(scores_of_lengths(np.concatenate(steps), ends[0]), scores_of_lengths(ends[1], ends[2]))


def scores_of_lengths(steps: Array, span: float) -> ChainScores:
    """Both scores of a chain z_0..z_N.

    Args:
        steps: ``[N + 1, 2]``, |z_i - z_{i-1}|^2 (the first is not looked at) and |z_i|^2.
        span: |z_N - z_0|^2.
    """
    if len(steps) < 3:
        return no_score(too_short(len(steps)))
    if not np.isfinite(steps).all() or not math.isfinite(span):
        return no_score(NOT_FINITE)
    square = torch.from_numpy(np.ascontiguousarray(steps))
    norm = square[:, 1].sqrt()
    angles = _angles(square[1:, 0], norm[1:], norm[:-1])
    turn = _angles(torch.tensor(span, dtype=torch.float64), norm[-1], norm[0])
    # the same two ends in a plane
    first = torch.stack([norm[0], torch.zeros_like(turn)])
    last = torch.stack([norm[-1] * turn.cos(), norm[-1] * turn.sin()])
    return scores_of_steps(square[1:, 0].sqrt(), angles, first, last, bool((norm == 0).any()))


def _angles(square: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles of vectors with norms a and b, a root of ``square`` apart: as exact near 0 as that distance is."""
    low = (square - (a - b) ** 2).clamp_min(0)
    high = ((a + b) ** 2 - square).clamp_min(0)
    return 2 * torch.atan2(low.sqrt(), high.sqrt())
