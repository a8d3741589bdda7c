"""The logits processor by itself, through both of vLLM's interfaces. No engine runs.

The V2 runner can't run on CPU: its request states and contexts are built here as its source builds them (0.32).
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvroute.serving import forcing
from kvroute.serving.forcing import REQUEST_KEY, Board

pytestmark = pytest.mark.vllm


@pytest.fixture
def board(monkeypatch) -> Board:
    from kvroute.serving import logits_processor

    board = Board()
    monkeypatch.setattr(logits_processor, "BOARD", board)
    assert forcing.BOARD is not board
    return board


def params(request: str | None):
    from vllm import SamplingParams

    return SamplingParams(extra_args=None if request is None else {REQUEST_KEY: request})


def processor_v1():
    from kvroute.serving.logits_processor import ForcedTokens

    return ForcedTokens(SimpleNamespace(), torch.device("cpu"), False)


def update(size: int, removed=(), added=(), moved=()):
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    return BatchUpdate(size, list(removed), list(added), list(moved))


def forced(logits: torch.Tensor) -> dict[int, int]:
    """Rows with one token left."""
    return {
        row: int(logits[row].argmax())
        for row in range(len(logits))
        if torch.isinf(logits[row]).sum() == logits.shape[1] - 1
    }


def test_it_is_what_both_runners_load():
    import vllm.v1.sample.logits_processor.interface as v1
    import vllm.v1.worker.gpu.sample.logits_processor as v2

    from kvroute.serving.logits_processor import ForcedTokens

    assert issubclass(ForcedTokens, v1.LogitsProcessor)
    assert issubclass(ForcedTokens, v2.LogitsProcessor)
    assert not processor_v1().is_argmax_invariant()


def test_v1_follows_rows_and_counts_places(board):
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    it = processor_v1()
    assert board.readers == 1
    answers: dict[str, list[int]] = {"a": [], "b": [5, 6], "c": []}
    it.update_state(
        update(
            3,
            added=[
                (0, params("a"), [1], answers["a"]),
                (1, params(None), [1], []),
                (2, params("b"), [1], answers["b"]),
            ],
        )
    )
    board.put("a", 0, [7, 8])
    board.put("b", 2, [9])
    assert forced(it.apply(torch.zeros(3, 12))) == {0: 7, 2: 9}
    assert forced(it.apply(torch.zeros(3, 12))) == {0: 7, 2: 9}  # a row that is asked twice
    answers["a"].append(7)
    answers["b"].append(9)
    assert forced(it.apply(torch.zeros(3, 12))) == {0: 8}
    it.update_state(update(3, moved=[(0, 2, MoveDirectionality.SWAP)]))
    assert forced(it.apply(torch.zeros(3, 12))) == {2: 8}
    it.update_state(update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert forced(it.apply(torch.zeros(2, 12))) == {0: 8}
    it.update_state(update(2, removed=[0], added=[(0, params("c"), [1], answers["c"])]))
    assert forced(it.apply(torch.zeros(2, 12))) == {}
    board.put("c", 0, [50])  # a token that the logits don't have
    untouched = torch.randn(2, 12)
    assert torch.equal(it.apply(untouched.clone()), untouched)


def test_a_fault_in_it_leaves_the_logits(board):
    it = processor_v1()
    it.update_state(update(1, added=[(0, params("a"), [1], None)]))  # no list to count
    board.put("a", 0, [3])
    logits = torch.randn(1, 8)
    assert torch.equal(it.apply(logits.clone()), logits)
    assert board.faults == 1


@pytest.mark.parametrize("method", ["__len__", "token"])
def test_a_fault_of_the_board_leaves_the_logits(board, monkeypatch, method):
    it = processor_v1()
    it.update_state(update(1, added=[(0, params("a"), [1], [])]))
    board.put("a", 0, [3])
    logits = torch.randn(1, 8)
    with monkeypatch.context() as patch:
        patch.setattr(Board, method, lambda *_: 1 / 0)
        assert torch.equal(it.apply(logits.clone()), logits)
    assert board.faults == 1
    assert forced(it.apply(logits)) == {0: 3}


def test_v2_keeps_slots_and_reads_lengths(board):
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from kvroute.serving.logits_processor import ForcedTokens

    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([4, 0, 6, 3], dtype=np.int32)))
    it = ForcedTokens(SimpleNamespace(), states)
    assert it.add_request(2, params("a"))
    assert not it.add_request(0, params(None))
    assert it.add_request(3, params("b"))
    board.put("a", 0, [7, 8])
    board.put("b", 1, [9])

    def context(slots: list[int], lengths: list[int]) -> LogitsContext:
        of = torch.tensor(slots)
        zeros = torch.zeros(len(slots), dtype=torch.int64)
        return LogitsContext(
            of, of, np.array(slots, dtype=np.int32), zeros, zeros, zeros, np.array(lengths, dtype=np.int32)
        )

    assert forced(it.apply(torch.zeros(3, 12), context([3, 0, 2], [3, 4, 6]))) == {2: 7}
    assert forced(it.apply(torch.zeros(3, 12), context([2, 3, 0], [7, 4, 5]))) == {0: 8, 1: 9}
    assert forced(it.apply(torch.zeros(2, 12), context([2, 3], [3, 2]))) == {}  # chunks of their prompts
    assert not it.add_request(2, params(None))  # the slot has a new request
    assert forced(it.apply(torch.zeros(2, 12), context([2, 3], [6, 4]))) == {1: 9}
    drafted = context([2, 3], [6, 4])
    assert forced(it.apply(torch.zeros(4, 12), drafted)) == {}  # several rows a request: drafted tokens


def test_the_connector_names_rows_and_takes_away_what_a_client_said():
    from kvroute.serving.connector import _name_request

    shared = params("someone else")
    request = SimpleNamespace(sampling_params=shared, request_id="mine")
    _name_request(request, decides=False)
    assert REQUEST_KEY not in request.sampling_params.extra_args
    assert shared.extra_args == {REQUEST_KEY: "someone else"}
    _name_request(request, decides=True)
    assert request.sampling_params.extra_args == {REQUEST_KEY: "mine"}
    pooling = SimpleNamespace(sampling_params=None, request_id="pooling")
    _name_request(pooling, decides=False)
    plain = params(None)
    request = SimpleNamespace(sampling_params=plain, request_id="plain")
    _name_request(request, decides=False)
    assert request.sampling_params is plain
