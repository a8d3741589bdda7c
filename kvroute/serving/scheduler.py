"""What runs beside the engine's scheduler: what each request asks, what a step has to read, and the results.

A request's result is a dict that the engine keeps by reference from its end on and that is filled when the
workers' numbers of the same step arrive. No engine is needed to test it.

An answer is read in pieces of ``PIECE`` tokens where that can be, for a piece costs little more than a token, and its
rest when it ends. Where the worker is at hand (in this process, alone, in step with us), the rest is read at once.
Where it is not, it is read before the next step, when the pages are free and not yet written again; then the result
is late by a step, so the client must be one that waits for it (:data:`~kvroute.serving.mailbox.WAITS`). Else each
step's tokens are read behind that step, for it may be the last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from kvroute.errors import AskError, KVRouteError
from kvroute.serving.answers import PENDING, Result, Tokens, public_text
from kvroute.serving.asks import read_ask, vectors_of
from kvroute.serving.config import ServingConfig
from kvroute.serving.deciding import Decided, Decisions
from kvroute.serving.entries import PIECE, Entries
from kvroute.serving.finishing import LOST, finish
from kvroute.serving.kept_requests import BlockIds, Closing, KeptRequest, take_numbers
from kvroute.serving.mailbox import WAITS
from kvroute.serving.messages import Array, Looked, StepMeta, StepRequest, StepResults
from kvroute.serving.tally import Tally
from kvroute.serving.thinking_tokens import ThinkingTokens

_log = logging.getLogger(__name__)
_OFF = "kvroute turned its features off after repeated faults; the server's log has the first of them."


class Reader(Protocol):
    """A worker that reads at once."""

    def read(self, requests: Sequence[StepRequest]) -> StepResults:
        """See :meth:`kvroute.serving.worker.WorkerSide.read`."""
        ...


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
        holds_pages: whether a running request's pages hold all its tokens, up to the step behind its end.
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
        holds_pages: bool = False,
    ) -> None:
        self._config = config
        self._holds_pages = holds_pages and not runs_ahead
        self._reader = None if runs_ahead else reader
        self._steps = 0
        self._decisions = Decisions(config, thinking, longest=longest, runs_ahead=runs_ahead)
        self._entries = Entries(config, block_sizes, sif)
        self.off = off
        self.faults = 0
        self.tally = Tally()
        self.tally.features_off(off is not None)
        self._in_a_row = 0
        self._running: dict[str, KeptRequest] = {}
        self._closing: dict[str, Closing] = {}
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
            state = KeptRequest(length, ask.plan, tokens, body=ask.to_dict(), error=self.off, given=given)
            state.late = self._holds_pages and WAITS in request
            state.last = length + given + limit - 1
            if self.off is None:
                state.wants(vectors_of(ask, self._config))
                try:
                    state.decided = self._decisions.of(ask, tokens, length, limit, structured=structured)
                except AskError as error:
                    if not ask.features and ask.confidence is None:
                        raise
                    state.refused = public_text(error)
                    self.tally.refused()
                state.confidence = None if ask.confidence is None else self._config.catalog.head(ask.confidence)
            self.tally.asked(ask)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            state = KeptRequest(length, None, (), error=public_text(error))
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

    def step(
        self,
        scheduled: Sequence[tuple[str, int, int, BlockIds | Callable[[], BlockIds]]],
        preempted: Collection[str] = (),
    ) -> StepMeta:
        """What the workers are to read behind a step, and before it.

        Args:
            scheduled: by request that :meth:`asked`: id, tokens computed before, tokens of this step, its blocks (or
                what gives them, if they are needed).
            preempted: requests whose blocks were taken away for this step.
        """
        if self._closing:  # the engine ended them without a word from the workers
            self._close(over=True)
        self._steps += 1
        between = self._steps % PIECE != 0
        near = between and self._reader is not None and self._reader() is not None
        meta = StepMeta(finished=self._gone, rests=self._send_rests())
        meta.finished += [rest.id for rest in meta.rests]
        meta.rests += [entry for entry in map(self._kept_rest, preempted) if entry is not None]
        self._gone = []
        for request, start, count, blocks in scheduled:
            state = self._running.get(request)
            if state is None or not self.asked(request):
                continue
            try:
                if state.late and not (state.stop == start and self._entries.reaches(state.blocks, start + count)):
                    state.blocks = blocks = blocks() if callable(blocks) else blocks
                state.stop = start + count
                late = state.late and state.stop < state.last
                # A step counts no more for a request that is aborted while it runs, so none of it is read yet.
                behind = count if late and not near else 0
                entry = self._entries.entry(request, state, blocks, waits=near or (between and late), behind=behind)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                state.error = public_text(error)
                if state.decided is not None and not state.decided.request.decision.mode:
                    state.decided.took(Looked(fault=state.error))
                self._fault(error, "schedule")
                continue
            if entry is not None:
                meta.requests.append(entry)
        return meta

    def unsent(self) -> None:
        """A step runs without what was to be read before it, so that the pages of what ended are no longer whole."""
        for found in self._closing.values():
            found.state.gone |= found.rest is not None
            found.rest, found.blocks = None, ()

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
        box = Result(tokens=Tokens(state.prompt_len, answer), error=state.error or LOST).to_dict()
        self._closing[request] = Closing(state, box, answer, blocks)
        if aborted:
            self._close([request])
        return box

    # ------------------------------------------------------------------ inside

    def _close(self, requests: Sequence[str] | None = None, *, over: bool = False) -> None:
        """Read what requests that ended (all of them) were waiting with, and fill their results. Left are those of
        which the workers have to read a rest before the next step, and those whose numbers are under way, unless the
        step that would bring them is over."""
        closing = list(self._closing) if requests is None else list(requests)
        reader = None if self._reader is None else self._reader()
        if reader is not None:
            self._read_rests(closing, reader)
        for request in closing:
            found = self._closing[request]
            if reader is None and found.state.late and found.rest is None:
                found.rest = self._rest(request)
            due = found.rest is not None and not found.sent
            if due or (found.state.under_way and not over):
                # The engine may send the box at any time from here on, so it is not touched again.
                handed, found.box = found.box, dict(found.box)
                handed[PENDING] = True
            else:
                self._fill(request)

    def _send_rests(self) -> list[StepRequest]:
        """What the workers have to read before the next step."""
        rests = []
        for found in self._closing.values():
            if found.rest is not None and not found.sent:
                rests.append(found.rest)
                found.sent = True
        return rests

    def _kept_rest(self, request: str) -> StepRequest | None:
        """What is still to be read of a request whose blocks were taken away."""
        state = self._running.get(request)
        if state is None or not state.late or state.error is not None or not state.blocks:
            return None
        blocks, state.blocks = state.blocks, ()
        return self._entry_of_rest(request, state, blocks)

    def _rest(self, request: str) -> StepRequest | None:
        """What is still to be read of a request that ended."""
        found = self._closing[request]
        state = found.state
        if state.error is not None:
            return None
        # The last token has no keys and values, and a step in flight counts no more.
        end = state.prompt_len + found.answer - 1
        computed = min(state.stop, end)
        whole = computed >= end or end < state.prompt_len
        if not (whole and self._entries.reaches(found.blocks, computed)):  # preempted, and ended before it ran again
            state.gone |= state.reads_answer and state.fed < end
            return None
        state.stop = computed
        return self._entry_of_rest(request, state, found.blocks)

    def _entry_of_rest(self, request: str, state: KeptRequest, blocks: BlockIds) -> StepRequest | None:
        try:
            return self._entries.entry(request, state, blocks, ends=True)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            state.error = public_text(error)
            self._fault(error, "schedule")
            return None

    def _read_rests(self, requests: Sequence[str], reader: Reader) -> None:
        entries = [entry for entry in map(self._rest, requests) if entry is not None]
        if not entries:
            return
        try:
            self._take(reader.read(entries))
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            for entry in entries:
                self._closing[entry.id].state.error = public_text(error)
            self._fault(error, "merge")

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
        take_numbers(results, self._find)

    def _find(self, request: str) -> KeptRequest | None:
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
                result.faults += [] if state.refused is None else [state.refused]
                finish(state, result, answer, self._fault)
            box.update(result.to_dict())
            if state.seen and result.error is None and not result.faults and not result.undecided:
                self._in_a_row = 0  # a request that got all it asked for
            self.tally.answered(request, result, box, (state.body or {}).get("policy"))
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            box.update(Result.failed(error, tokens).to_dict())
            self._fault(error, "result")
            self.tally.failed(request, box)

    def _end_decision(self, state: KeptRequest, decided: Decided, result: Result, answer: int) -> None:
        before = decided.request.decision.fault
        result.decision, thought = decided.end(state.tokens, answer)
        result.tokens = Tokens(state.prompt_len, answer, thought)
        if before is None and result.decision.fault is not None and answer > 0:
            self._fault(None, "decision")

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
