"""The Triton twin of the chain step, in the interpreter, against the reference.

What catches what (each was seen to fail on a mutant, see ``mutants.py``): a token before that is not the one before
(runs, calls cut anywhere), layers that are left out or counted twice (more layers than a tile), keys mixed with
values (sizes that differ), a state of another chain (rows in any order), NaN behind a sequence's end (mask tails).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvroute_kernels import ChainTensors, KVViewError, WindowError, paged_chain_step
from kvroute_kernels import chain_step_triton as kernels
from kvroute_kernels.chain_step_triton import PagedChain
from tests.kernels.caches import DTYPES, LAYOUTS, bytes_within, random_view, recorded
from tests.kernels.test_paged_pool_kernel import NoTensorOps

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_blocks")
quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_same_state(found: ChainTensors, wanted: ChainTensors) -> None:
    torch.testing.assert_close(found.first, wanted.first, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.last, wanted.last, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.count, wanted.count)
    assert torch.equal(found.degenerate, wanted.degenerate)
    torch.testing.assert_close(found.sum_magnitude, wanted.sum_magnitude, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(found.sum_angle, wanted.sum_angle, rtol=2e-6, atol=2e-6)


def assert_same(view, rows: list[int], cuts: list[tuple[list[int], list[int]]], layers=None, chains: int = 5) -> None:
    """Fed in the same calls, kernel and reference have the same steps and states."""
    group = view.groups[0]
    width = group.keys.shape[2] * (group.keys.shape[4] + group.values.shape[4])
    mine, theirs = (ChainTensors.empty(chains, width) for _ in range(2))
    for start, stop in cuts:
        found = paged_chain_step(view, mine, rows, start, stop, layers, layer_sums=True, backend="interpret")
        wanted = paged_chain_step(view, theirs, rows, start, stop, layers, layer_sums=True, backend="torch")
        assert found.counts == wanted.counts
        torch.testing.assert_close(found.magnitudes, wanted.magnitudes, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(found.angles, wanted.angles, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(found.layer_sums, wanted.layer_sums, rtol=2e-6, atol=3e-6)
        torch.testing.assert_close(found.squares, wanted.squares, rtol=2e-6, atol=1e-6)
        assert_same_state(mine, theirs)


@quick
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=2),
    layers=st.integers(1, 6),
    heads=st.integers(1, 2),
    size=st.sampled_from([1, 3, 8]),
    extra=st.sampled_from([0, 8, 3]),
    page=st.sampled_from([1, 4, 16]),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_it_is_the_reference(lengths, layers, heads, size, extra, page, layout, dtype, data) -> None:
    scales = (0.5, 3.0) if dtype.itemsize == 1 else (1.0, 1.0)
    view = random_view(
        lengths,
        layers=layers,
        heads=heads,
        size=size,
        value_size=size + extra,
        page=page,
        layout=layout,
        dtype=dtype,
        scales=scales,
    )
    rows = data.draw(st.permutations(range(5)))[: len(lengths)]
    cut = [data.draw(st.integers(0, n)) for n in lengths]
    zero = [0] * len(lengths)
    chosen = data.draw(st.sampled_from([None, [layers - 1], list(range(layers))[::-1]]))
    assert_same(view, rows, [(zero, cut), (cut, lengths)], chosen)


@pytest.mark.parametrize(("size", "value_size", "heads"), [(80, 80, 2), (128, 128, 1), (192, 128, 1), (512, 64, 1)])
def test_head_sizes(size: int, value_size: int, heads: int) -> None:
    view = random_view([3, 2], layers=5, heads=heads, size=size, value_size=value_size, layout="keys beside values")
    assert_same(view, [3, 0], [([0, 0], [2, 2]), ([2, 2], [3, 2])])


def test_a_long_chunk_is_joined_and_no_cut_changes_the_chain() -> None:
    view = random_view([14], layers=2, heads=1, size=4)
    assert_same(view, [1], [([0], [14])])
    whole, cut = (ChainTensors.empty(2, 8) for _ in range(2))
    paged_chain_step(view, whole, [1], [0], [14], backend="interpret")
    for start, stop in itertools.pairwise([0, 1, 2, 8, 14]):
        paged_chain_step(view, cut, [1], [start], [stop], backend="interpret")
    assert_same_state(cut, whole)
    assert int(whole.count[0]) == 0


def test_the_same_bits_on_every_run_and_in_every_batch() -> None:
    view = random_view([9, 0, 5, 2], layers=2, heads=1)
    states = [ChainTensors.empty(4, 16) for _ in range(3)]
    for state in states[:2]:
        paged_chain_step(view, state, [0, 1, 2, 3], [0] * 4, view.host_lengths, backend="interpret")
    for b, length in enumerate(view.host_lengths):
        paged_chain_step(view.select_sequences([b]), states[2], [b], [0], [length], backend="interpret")
    for name in ("first", "last", "count", "sum_magnitude", "sum_angle", "degenerate"):
        assert torch.equal(getattr(states[0], name), getattr(states[1], name))
        assert torch.equal(getattr(states[0], name), getattr(states[2], name))


@pytest.mark.parametrize(
    "vectors",
    [
        [[1.0, 0.0], [math.cos(1e-4), math.sin(1e-4)]],  # an arc cosine in float32 gives 0
        [[1.0, 0.0], [-1.0, 0.0]],  # pi
        [[1.0, 0.0], [-3.0, 1e-4]],
        [[1.0, 2.0], [1.0, 2.0]],  # no step at all
        [[1e-6, 0.0], [0.0, 1e6]],
        [[0.5, 0.5], [0.0, 3.0]],
    ],
)
def test_angles_keep_their_digits(vectors: list[list[float]]) -> None:
    view = random_view([2], layers=1, heads=1, size=2)
    group = view.groups[0]
    z = torch.tensor(vectors)
    group.keys[0, group.table.pages[0, 0], 0, :2] = z
    group.values[0, group.table.pages[0, 0], 0, :2] = 0
    state = ChainTensors.empty(1, 4)
    found = paged_chain_step(view, state, [0], [0], [2], backend="interpret")
    a, b = z.double()
    wanted = math.atan2(abs(float(a[0] * b[1] - a[1] * b[0])), float(a @ b))
    assert float(found.angles[1]) == pytest.approx(wanted, rel=2e-6, abs=1e-9)
    assert float(found.magnitudes[1]) == pytest.approx(float((a - b).norm()), rel=1e-6)
    assert found.angles[0] == 0


def test_a_zero_vector_marks_the_chain() -> None:
    view = random_view([4], layers=1, heads=1, size=2)
    group = view.groups[0]
    for part in (group.keys, group.values):
        part[0, group.table.pages[0, 0], 0, 2] = 0
    assert_same(view, [0], [([0], [2]), ([2], [4])])


def test_what_is_refused() -> None:
    view = random_view([4, 4])
    state = ChainTensors.empty(2, 32)
    for rows, message in (([0, 0], "each once"), ([0, 2], "There are 2 chains"), ([0], "2 sequences feed")):
        with pytest.raises(KVViewError, match=message):
            paged_chain_step(view, state, rows, [0, 0], [1, 1], backend="interpret")
    with pytest.raises(KVViewError, match="31 numbers"):
        paged_chain_step(view, ChainTensors.empty(2, 31), [0, 1], [0, 0], [1, 1], backend="interpret")
    view.groups[0].table.first[1] = 3
    with pytest.raises(WindowError):
        paged_chain_step(view, state, [0, 1], [0, 0], [1, 1], backend="interpret")
    assert not state.count.any()


def test_every_byte_is_read_once() -> None:
    view = random_view([9, 3], layers=6, heads=2, size=8, page=4, layout="keys beside values", dtype=torch.bfloat16)
    group, low, high = view.groups[0], [2, 2], [9, 3]
    state = ChainTensors.empty(2, 32)
    chain = PagedChain(CPU)
    chain.stage(view, [0, 1], low, high, view.layers, state)
    with recorded() as seen:
        chain.launch(state)
    found = bytes_within(seen, [group.keys])
    needed = sum(hi - lo for lo, hi in zip(low, high, strict=True)) * 6 * 2 * 16 * 2
    assert len(found) == len(set(found)) == needed


def test_offsets_of_a_cache_over_2_to_the_31_elements() -> None:
    view = random_view([3], layers=2, heads=2, size=8, page=2, dtype=torch.bfloat16)
    state = ChainTensors.empty(1, 32)
    chain = PagedChain(CPU)
    chain.stage(view, [0], [0], [3], [0, 1], state)
    planes = chain.buffers.get("planes", 0, torch.int64)
    strides = (3_000_000_008, 2_200_000_000, 2_147_483_656)
    for plane in range(4):
        planes[plane * 16 : plane * 16 + 4] = torch.tensor([(1 << 44) + (plane << 60), *strides])
        planes[plane * 16 + 7] = 1 << 40
    view.groups[0].table.pages[0, :2] = torch.tensor([(1 << 31) + 5, 1 << 30])
    with recorded(fake=True) as seen:
        chain.launch(state)
    wanted = set()
    for plane, t, h, d in itertools.product(range(4), range(3), range(2), range(8)):
        page = int(view.groups[0].table.pages[0, t // 2])
        at = page * strides[0] + h * strides[1] + t % 2 * strides[2] + d
        wanted.add(((1 << 44) + (plane << 60) + 2 * at) % (1 << 64))
    assert {int(a) for addresses, width in seen if width == 2 for a in addresses} == wanted


def test_a_step_is_one_launch_that_allocates_nothing_and_keeps_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append((self.name, grid, args))

    monkeypatch.setattr(kernels, "chain_step_kernel", Launch("step"))
    monkeypatch.setattr(kernels, "chain_step_join_kernel", Launch("join"))
    view = random_view([20, 9, 7], page=8)
    state = ChainTensors.empty(3, 32)
    chain = PagedChain(CPU)
    for t in range(5):  # a decode step each
        chain.stage(view, [2, 0, 1], [t, t, t], [t + 1, t + 1, t + 1], [0, 1], state)
        with NoTensorOps():
            chain.launch(state)
    assert [name for name, *_ in launched] == ["step"] * 5
    steps = [[a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args] for _, _, args in launched]
    assert all(step == steps[0] for step in steps)
    fixed = PagedChain(CPU, room=10)
    for low, high in (([0, 0, 0], [20, 9, 7]), ([1, 1, 1], [2, 2, 2])):
        fixed.stage(view, [2, 0, 1], low, high, [0, 1], state)
        fixed.launch(state)
    assert launched[-1][1] == launched[-3][1]  # the same grids


def test_a_fixed_room_gives_the_same_states() -> None:
    view = random_view([9, 5], layers=1, heads=1)
    plain, fixed = (ChainTensors.empty(2, 16) for _ in range(2))
    chain = PagedChain(CPU, room=6)
    for low, high in (([0, 0], [9, 4]), ([9, 4], [9, 5])):
        paged_chain_step(view, plain, [1, 0], low, high, backend="interpret")
        chain.stage(view, [1, 0], low, high, [0], fixed)
        chain.launch(fixed)
    assert torch.equal(plain.last, fixed.last)
    assert torch.equal(plain.sum_angle, fixed.sum_angle)
