"""The logits processor that vLLM loads (entry point ``vllm.logits_processors``): it forces what is on the board.

One class for both of vLLM's interfaces (0.32): that of the V1 model runner, which hands over changes of a batch's rows,
and that of the V2 runner, which keeps requests in slots. A plugin that is not derived from both ends V2's start.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV1
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from kvroute.serving.forcing import BOARD, REQUEST_KEY

_log = logging.getLogger(__name__)


class ForcedTokens(LogitsProcessorV1, LogitsProcessorV2):  # type: ignore[misc]
    """Leaves a row one token where one is forced, and touches no other row.

    Args:
        vllm_config: unused.
        rest: of V1 device and whether memory is pinned; of V2 the request states.
    """

    def __init__(self, vllm_config: Any, *rest: Any) -> None:  # noqa: ARG002
        self._states: Any = rest[0] if len(rest) == 1 else None
        self._rows: dict[int, tuple[str, Any]] = {}  # V1: row -> request, its answer so far (a live list)
        self._slots: dict[int, str] = {}  # V2: slot -> request
        self._logged = False
        BOARD.readers += 1

    def is_argmax_invariant(self) -> bool:
        """It changes greedy answers too."""
        return False

    # ------------------------------------------------------------------ which row is whose

    def update_state(self, batch_update: Any) -> None:
        """V1: rows were removed, added and moved, in this order."""
        if batch_update is None:
            return
        try:
            self._follow(batch_update)
        except Exception:  # noqa: BLE001 - the engine must not see it
            self._rows.clear()  # whose row is whose is not known any more, and nobody may get another one's tokens
            self._fail()

    def _follow(self, batch_update: Any) -> None:
        rows = self._rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, _, answer in batch_update.added:
            request = _request_of(params)
            if request is None:
                rows.pop(row, None)
            else:
                rows[row] = (request, answer)
        for one, other, how in batch_update.moved:
            moved, there = rows.pop(one, None), rows.pop(other, None)
            if moved is not None:
                rows[other] = moved
            if there is not None and how == MoveDirectionality.SWAP:
                rows[one] = there

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a slot; returns whether anything may be forced into it."""
        self._slots.pop(req_idx, None)
        try:
            request = _request_of(sampling_params)
        except Exception:  # noqa: BLE001 - the engine must not see it
            self._fail()
            return False
        if request is None:
            return False
        self._slots[req_idx] = request
        return True

    # ------------------------------------------------------------------ force

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Force what is due in this step. V1 gives no context, V2 does."""
        try:
            if not len(BOARD):
                return logits
            due = self._due_v1() if ctx is None else self._due_v2(ctx, logits.shape[0])
            due = [(row, token) for row, token in due if row < logits.shape[0] and 0 <= token < logits.shape[1]]
            if due:
                rows, tokens = torch.tensor(due, dtype=torch.int64, device=logits.device).unbind(1)
                logits[rows] = -torch.inf
                logits[rows, tokens] = 0.0
        except Exception:  # noqa: BLE001 - the engine must not see it
            self._fail()
        return logits

    def _fail(self) -> None:
        BOARD.faults += 1
        if not self._logged:
            self._logged = True
            _log.exception("kvroute could not force a token.")

    def _due_v1(self) -> list[tuple[int, int]]:
        return [
            (row, token)
            for row, (request, answer) in self._rows.items()
            if (token := BOARD.token(request, len(answer))) is not None
        ]

    def _due_v2(self, ctx: Any, rows: int) -> list[tuple[int, int]]:
        slots = ctx.idx_mapping_np.tolist()
        if not self._slots or len(slots) != rows:  # several rows a request: drafted tokens, which is refused elsewhere
            return []
        due = []
        for row, slot in enumerate(slots):
            request = self._slots.get(slot)
            if request is None:
                continue
            place = int(ctx.seq_lens_upper_bound_np[row]) - int(self._states.prompt_len.np[slot])
            token = None if place < 0 else BOARD.token(request, place)
            if token is not None:
                due.append((row, token))
        return due


def _request_of(params: Any) -> str | None:
    request = (getattr(params, "extra_args", None) or {}).get(REQUEST_KEY)
    return request if isinstance(request, str) else None
