"""Buffers that are kept from call to call: the same sums, at the same addresses, by the same objects."""

from __future__ import annotations

import pytest
import torch

from kvroute_kernels import ChainTensors, KVView, KVViewError, Workspace, paged_chain_step, paged_pool
from tests.kernels.caches import random_view
from tests.unit.serving_steps import Engine

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_sums_are_those_without_a_workspace() -> None:
    workspace = Workspace()
    places: set[int] = set()
    for seed, lengths in enumerate(([40, 3], [7], [33, 21, 1])):  # later calls fit in the first one's buffers
        view = random_view(lengths, layers=2, seed=seed)
        wanted = paged_pool(view, backend="torch")
        found = paged_pool(view, backend="interpret", workspace=workspace)
        for mine, theirs in ((found.keys, wanted.keys), (found.values, wanted.values), (found.weight, wanted.weight)):
            assert mine is not None
            assert theirs is not None
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert found.keys is not None
        places.add(found.keys.data_ptr())
    pool = workspace.pool(torch.device("cpu"))
    assert len(places) <= 1 + pool.buffers.grown
    grown = pool.buffers.grown
    for seed in range(3):
        again = paged_pool(random_view([40, 3], layers=2, seed=seed), backend="interpret", workspace=workspace)
        assert again.keys is not None
        assert again.keys.data_ptr() in places
    assert pool.buffers.grown == grown


def test_chains_are_those_without_a_workspace() -> None:
    workspace, size = Workspace(), 2 * 2 * 8
    view = random_view([20, 9], layers=3)
    wanted, found = ChainTensors.empty(2, size), ChainTensors.empty(2, size)
    for start, stop in (([0, 0], [12, 5]), ([12, 5], [13, 6]), ([13, 6], [20, 9])):
        theirs = paged_chain_step(view, wanted, [0, 1], start, stop, layer_sums=True, backend="torch")
        mine = paged_chain_step(
            view, found, [0, 1], start, stop, layer_sums=True, backend="interpret", workspace=workspace
        )
        torch.testing.assert_close(mine.squares, theirs.squares, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.layer_sums, theirs.layer_sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.last, wanted.last, rtol=1e-5, atol=1e-6)
    assert found.count.tolist() == [20, 9]


def test_the_worker_keeps_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first steps a request that decodes asks for no buffer any more."""
    monkeypatch.setenv("KVROUTE_KERNELS", "interpret")
    engine = Engine()
    engine.add("a", 6, 12, {"a": {"of": "answer", "layers": [0, 2]}, "c": "kv-coe"}, seed=1)
    engine.step(("a", 0, 6))
    engine.step(("a", 6, 1))
    workspace = engine.workers[0]._workspace
    buffers = [workspace.pool(torch.device("cpu")).buffers, workspace.chain(torch.device("cpu")).buffers]
    grown = [b.grown for b in buffers]
    assert all(grown)
    for t in range(7, 12):
        engine.step(("a", t, 1))
    assert [b.grown for b in buffers] == grown


def test_lengths_on_the_host_are_checked() -> None:
    view = random_view([5, 3])
    assert KVView(view.groups, view.lengths, [5, 3]).host_lengths == [5, 3]
    with pytest.raises(KVViewError, match="1 lengths on the host for 2 sequences"):
        KVView(view.groups, view.lengths, [5])
