"""The CPU's compiled chain step: the reference's steps and states, and the same bits wherever the tokens lie and
whatever stands beside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute_kernels import ChainTensors, KVView, KVViewError, WindowError, feed_layers, paged_chain_step
from kvroute_kernels.native_library import library
from tests.kernels.caches import DTYPES, LAYOUTS, random_view

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler")
STATE = ("first", "last", "count", "sum_magnitude", "sum_angle", "degenerate")


def width_of(view: KVView) -> int:
    group = view.groups[0]
    return group.keys.shape[2] * (group.keys.shape[4] + group.values.shape[4])


def assert_same_bits(a: ChainTensors, b: ChainTensors) -> None:
    for name in STATE:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8, 40, 64]),
    extra=st.sampled_from([0, 8, 3]),
    page=st.sampled_from([1, 16, 32, 128]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    shift=st.integers(0, 20),
    data=st.data(),
)
def test_steps_states_and_their_bits(lengths, heads, size, extra, page, layout, dtype, shift, data) -> None:
    made = {"layers": 3, "heads": heads, "size": size, "value_size": size + extra, "dtype": dtype}
    made["scales"] = (0.5, 3.0) if dtype.itemsize == 1 else (1.0, 1.0)
    view = random_view(lengths, page=page, layout=layout, shift=shift, **made)
    plain = random_view(lengths, page=128, layout="heads first", **made)  # the same numbers elsewhere
    layers = data.draw(st.sampled_from([None, [2], [2, 1, 0]]))
    rows = data.draw(st.permutations(range(5)))[: len(lengths)]
    cut = [data.draw(st.integers(0, n)) for n in lengths]
    mine, theirs, alone = (ChainTensors.empty(5, width_of(view)) for _ in range(3))
    for low, high in (([0] * len(lengths), cut), (cut, lengths)):
        found = paged_chain_step(view, mine, rows, low, high, layers, layer_sums=True, backend="native")
        wanted = paged_chain_step(view, theirs, rows, low, high, layers, layer_sums=True, backend="torch")
        assert found.counts == wanted.counts
        torch.testing.assert_close(found.rows[:, 0], wanted.rows[:, 0], rtol=3e-6, atol=2e-6)
        torch.testing.assert_close(found.rows[:, 1], wanted.rows[:, 1], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(found.squares, wanted.squares, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(found.layer_sums, wanted.layer_sums, rtol=3e-6, atol=1e-5)
        at = 0
        for b, (lo, hi) in enumerate(zip(low, high, strict=True)):
            one = paged_chain_step(
                plain.select_sequences([b]), alone, [rows[b]], [lo], [hi], layers, layer_sums=True, backend="native"
            )
            assert torch.equal(one.rows, found.rows[at : at + hi - lo])
            assert torch.equal(one.layer_sums[0], found.layer_sums[b])
            at += hi - lo
    torch.testing.assert_close(mine.first, theirs.first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.last, theirs.last, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.sum_magnitude, theirs.sum_magnitude, rtol=3e-6, atol=1e-5)
    torch.testing.assert_close(mine.sum_angle, theirs.sum_angle, rtol=3e-6, atol=1e-5)
    assert torch.equal(mine.count, theirs.count)
    assert torch.equal(mine.degenerate, theirs.degenerate)
    assert_same_bits(mine, alone)


def test_no_cut_and_no_number_of_threads_changes_a_bit() -> None:
    view = random_view([90, 700], layers=4, heads=3, size=40, page=32, layout="transposed keys")
    whole, cut, threads = (ChainTensors.empty(2, width_of(view)) for _ in range(3))
    paged_chain_step(view, whole, [1, 0], [0, 0], [90, 700], backend="native")
    for low in range(0, 700, 7):
        span = [min(low, 90), low], [min(low + 7, 90), min(low + 7, 700)]
        paged_chain_step(view, cut, [1, 0], *span, backend="native")
    assert_same_bits(whole, cut)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        paged_chain_step(view, threads, [1, 0], [0, 0], [90, 700], backend="native")
    finally:
        torch.set_num_threads(before)
    assert_same_bits(whole, threads)


def test_a_zero_vector_marks_the_chain() -> None:
    view = random_view([4], layers=1, heads=1, size=2)
    for part in (view.groups[0].keys, view.groups[0].values):
        part[0, view.groups[0].table.pages[0, 0], 0, 2] = 0
    state = ChainTensors.empty(1, 4)
    steps = paged_chain_step(view, state, [0], [0], [4], backend="native")
    assert state.degenerate.tolist() == [True]
    assert steps.angles[2:].tolist() == [0, 0]
    assert steps.angles[1] > 0


def test_what_is_refused_changes_nothing() -> None:
    view = random_view([4, 4])
    state = ChainTensors.empty(2, 32)
    for rows, message in (([0, 0], "each once"), ([0, 2], "There are 2 chains")):
        with pytest.raises(KVViewError, match=message):
            paged_chain_step(view, state, rows, [0, 0], [1, 1], backend="native")
    view.groups[0].table.first[1] = 3
    with pytest.raises(WindowError):
        paged_chain_step(view, state, [0, 1], [0, 0], [1, 1], backend="native")
    view.groups[0].table.first[1] = 0
    view.groups[0].table.pages[1] = -1
    with pytest.raises(KVViewError, match="absent"):
        paged_chain_step(view, state, [0, 1], [0, 0], [1, 1], backend="native")
    assert not state.count.any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (2, 30, 384)])
def test_layers_are_fed_as_in_torch(shape: tuple[int, int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    states = [torch.zeros(6, *shape[1:], dtype=torch.float64) for _ in range(2)]
    rows = [4, 0, 2][: shape[0]]
    for _ in range(3):
        sums = torch.randn(shape, generator=g)
        found = feed_layers(states[0], rows, sums, backend="native")
        wanted = feed_layers(states[1], rows, sums, backend="torch")
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert torch.equal(states[0], states[1])
    assert not states[0][[1, 3, 5]].any()
