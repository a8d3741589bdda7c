"""What runs in the engine's worker: after each forward pass, one call reads what all requests just got.

An answer's sums and chains are fed with its new tokens; a prompt is pooled once, when it is whole. State is flat in
an answer's length. What a step costs, is what its passes over the new tokens' keys and values cost: only layers that
are asked for are read, each token once, and sums over them are taken in float32 before they are added in float64.
Pure torch: tested without an engine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from kvroute.errors import KVRouteError
from kvroute.pooling import token_sums
from kvroute.serving.answers import public_text
from kvroute.serving.asks import Ask, vectors_of
from kvroute.serving.config import ServingConfig
from kvroute.serving.feeding import Asked, Feeder, feature_key, narrowed
from kvroute.serving.forcing import BOARD, Board
from kvroute.serving.host_copies import HostCopies
from kvroute.serving.looking import Gather, Looker
from kvroute.serving.messages import Array, StepMeta, StepRequest, StepResults, Sums
from kvroute.serving.pages import LayerPages, stack_pages, view_of
from kvroute.serving.state_rows import StateRows
from kvroute_kernels import KVView, Workspace, prepare

_log = logging.getLogger(__name__)
_TOO_LATE = "The engine did not let kvroute read the end of the answer in time."
_GAP = "Some tokens of the answer were not read: what a step was to read was lost."
_LOGGED = 5
"""Faults that are logged in full; all are counted."""


class WorkerSide:
    """Reads pages after each step.

    Args:
        pages: every attention layer's, of this rank.
        num_layers: attention layers of the model.
        config: the server's, with its heads and policies.
        board: takes the tokens that are forced.
        gather: over the ranks of the tensor-parallel group; None where there is one.
        replicas: consecutive ranks that hold the same heads.
        copy: whether this rank holds the heads of the one before it.
    """

    def __init__(
        self,
        pages: Sequence[LayerPages],
        num_layers: int | None = None,
        *,
        config: ServingConfig | None = None,
        board: Board = BOARD,
        gather: Gather | None = None,
        replicas: int = 1,
        copy: bool = False,
    ) -> None:
        self._stacks = stack_pages(pages)
        for device in {page.keys.device for page in pages}:
            prepare(device)  # here, where the engine starts, and not in its first step
        self._num_layers = len(pages) if num_layers is None else num_layers
        self._config = ServingConfig() if config is None else config
        self._board = board
        self._copy = copy
        self._looker = Looker(
            self._config.catalog, pages, self._num_layers, self._view, board, gather=gather, replicas=replicas
        )
        self._asked: dict[str, Asked] = {}
        self._rows = StateRows()
        self._workspace = Workspace()
        self._copies = HostCopies()
        self._results: StepResults | None = None
        self._done: StepMeta | None = None
        self._begun: StepMeta | None = None
        self._rests: StepResults | None = None
        self._logged = 0
        self._lost = 0
        self._feeder = Feeder(self._num_layers, self._rows, self._workspace, self._copies)

    @property
    def num_states(self) -> int:
        """Requests that state is held for."""
        return len(self._asked)

    @property
    def keeps_up(self) -> bool:
        """Whether pages can be read between two steps as well as behind one: nothing is still being written, and no
        layer has given up a page that a step before needed."""
        return all(s.keys.device.type == "cpu" and not s.first.drops for s in self._stacks)

    def begin(self, meta: StepMeta) -> None:
        """Before the step runs: read what is left of requests that lost their pages. Raises nothing."""
        if meta is self._begun or not meta.rests:
            return
        self._begun = meta
        began = time.perf_counter()
        self._rests = self.read(meta.rests)
        self._rests.seconds = time.perf_counter() - began

    def step(self, meta: StepMeta) -> None:
        """Read what the step wrote; the second call for the same step does nothing. Raises nothing."""
        if meta is self._done:
            return
        self._done = meta
        began = time.perf_counter()
        rests, self._rests = self._rests, None
        if meta.rests and rests is None:
            rests = StepResults(copy=self._copy, faults=dict.fromkeys([r.id for r in meta.rests], _TOO_LATE))
        for request in meta.finished:
            try:
                self.drop(request)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                self.failed(error)
        if not meta.requests and not meta.finished and rests is None:
            return
        results = StepResults(copy=self._copy) if rests is None else rests
        try:
            self._work(meta.requests, results)
            self._lost += self._looker.quiet_faults(results.looks)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            if meta.requests:
                self._give_up(meta.requests, error, results)
            else:
                self.failed(error)
        results.held = len(self._asked) + len(self._board)
        results.seconds += time.perf_counter() - began
        self._results = results

    def failed(self, error: Exception) -> None:
        """Something failed that no request can be named for: count it, and say so with the next results."""
        self._lost += 1
        if self._logged < _LOGGED:
            self._logged += 1
            _log.warning("kvroute failed in the worker.", exc_info=error)

    def read(self, requests: Sequence[StepRequest]) -> StepResults:
        """Read at once, between two steps: what requests that end were waiting with. Raises nothing."""
        results = StepResults(copy=self._copy)
        self._guarded(requests, results)
        return results

    def results(self) -> StepResults | None:
        """What the last step read, once; None if there is nothing."""
        results, self._results = self._results, None
        lost, self._lost = self._lost + self._board.faults, 0
        self._board.faults = 0
        if lost:
            results = StepResults(copy=self._copy) if results is None else results
            results.lost += lost
        return results

    def drop(self, request: str) -> None:
        """Forget a request."""
        self._board.drop(request)
        asked = self._asked.pop(request, None)
        if asked is not None:
            self._rows.give(asked.slot)

    # ------------------------------------------------------------------ reading

    def _work(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        for asked in requests:
            if asked.force is not None:
                self._board.put(asked.id, *asked.force)
        results.looks = self._looker.take(requests)
        self._guarded([r for r in requests if r.prompt or r.high > r.low], results)

    def _give_up(self, requests: Sequence[StepRequest], error: Exception, results: StepResults) -> None:
        """These requests get no features any more. What is forced stays: an answer keeps its mode."""
        if self._logged < _LOGGED:
            self._logged += 1
            _log.warning("kvroute could not read %s.", [r.id for r in requests], exc_info=error)
        for request in requests:
            results.faults[request.id] = public_text(error)
            asked = self._asked.pop(request.id, None)
            if asked is not None:
                self._rows.give(asked.slot)

    def _guarded(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        """Read; where that fails, each request by itself, so that a fault costs its own request alone."""
        if not requests:
            return
        self._feeder.touched = False
        try:
            with torch.inference_mode():  # as the engine: what is made in its mode can be changed in it alone
                commit = self._read(requests)
                self._copies.wait()
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            if len(requests) > 1 and not self._feeder.touched:
                self.failed(error)
                for request in requests:
                    self._guarded([request], results)
                return
            self._give_up(requests, error, results)
            return
        results.extend(commit)

    def _read(self, requests: Sequence[StepRequest]) -> StepResults:
        for request in requests:
            if request.ask is not None and request.id not in self._asked:
                self._asked[request.id] = self._resolve(request.ask)
        known = [r for r in requests if r.id in self._asked]
        results = StepResults()
        prompts = [r for r in known if r.prompt and self._asked[r.id].prompt]
        if prompts:
            self._pool_prompts(prompts, results)
        answers = []
        for r in known:
            asked = self._asked[r.id]
            if r.high > r.low and (asked.answer or asked.chain):
                if r.low == (r.answer_start if asked.read is None else asked.read):
                    answers.append(r)
                else:  # what was to be read in between was lost on its way here
                    self._give_up([r], KVRouteError(_GAP), results)
        if answers:
            self._feed(answers, results)
        return results

    def _resolve(self, body: dict[str, object]) -> Asked:
        ask = Ask.from_dict(body)
        vectors = vectors_of(ask, self._config).values()
        prompt = {feature_key(of, spec): spec for of, spec in vectors if of == "prompt"}
        answer = {feature_key(of, spec): spec for of, spec in vectors if of == "answer"}
        return Asked(self._rows.take(), prompt, answer, ask.plan.chain is not None)

    def _view(self, requests: Sequence[StepRequest], lengths: list[int], starts: list[int]) -> KVView:
        tables = [[[0] * s + b for s, b in zip(r.skip, r.blocks, strict=True)] for r in requests]
        return view_of(self._stacks, tables, lengths, starts)

    def _pool_prompts(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        view = self._view(requests, [r.prompt_len for r in requests], [0] * len(requests))
        by_key: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            for key in self._asked[r.id].prompt:
                by_key.setdefault(key, []).append(i)
        for key, rows in by_key.items():
            spec = self._asked[requests[rows[0]].id].prompt[key]
            sums = token_sums(  # what lies in the workspace holds until the next key's sums
                view.select_sequences(rows),
                spec,
                num_layers=self._num_layers,
                stop=[requests[i].prompt_len for i in rows],
                sif_weights=[torch.from_numpy(requests[i].weights[spec.sif_a][: requests[i].prompt_len]) for i in rows]
                if spec.weights == "sif"
                else None,
                workspace=self._workspace,
            )
            results.sums[key] = Sums(
                [requests[i].id for i in rows],
                self._numbers(narrowed(spec, sums.keys)),
                self._numbers(narrowed(spec, sums.values)),
                self._copies.take(sums.weight.double()),
            )

    def _feed(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        view = self._view(requests, [r.high for r in requests], [r.low - r.window for r in requests])
        asked = [self._asked[r.id] for r in requests]
        self._feeder.feed(view, requests, asked, results)
        for r, one in zip(requests, asked, strict=True):
            one.read = r.high

    def _numbers(self, x: Tensor | None) -> Array | None:
        """On the host, copied out of the workspace."""
        if x is None:
            return None
        return self._copies.take(x.to(torch.float32, copy=x.device.type == "cpu"))
