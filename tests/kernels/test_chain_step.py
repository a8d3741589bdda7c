"""chain_step and token_vectors against the formulas, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvroute_kernels import ChainTensors, KVView, angle_between, chain_step, token_vectors


def feed(vectors: torch.Tensor, cuts: list[int]) -> ChainTensors:
    """One chain, fed in pieces that end at ``cuts``."""
    state = ChainTensors.empty(1, vectors.shape[1])
    for low, high in zip([0, *cuts], [*cuts, len(vectors)], strict=True):
        chain_step(state, torch.tensor([0]), vectors[None, low:high], torch.tensor([high - low]))
    return state


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(2, 9), data=st.data())
def test_the_sums_do_not_depend_on_how_the_chain_is_cut(count: int, size: int, data: st.DataObject) -> None:
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(count * size))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=6)))
    state = feed(vectors, cuts)
    z = vectors.double().numpy()
    magnitudes = np.linalg.norm(z[1:] - z[:-1], axis=1)
    cosines = (z[1:] * z[:-1]).sum(1) / np.linalg.norm(z[1:], axis=1) / np.linalg.norm(z[:-1], axis=1)
    assert state.count.tolist() == [count]
    assert torch.equal(state.first[0], vectors[0])
    assert torch.equal(state.last[0], vectors[-1])
    assert float(state.sum_magnitude[0]) == pytest.approx(magnitudes.sum(), rel=1e-5)
    assert float(state.sum_angle[0]) == pytest.approx(np.arccos(np.clip(cosines, -1, 1)).sum(), rel=1e-5, abs=1e-6)
    assert not bool(state.degenerate[0])


def test_rows_and_counts_feed_the_right_chains() -> None:
    vectors = torch.randn(2, 4, 3)
    state = ChainTensors.empty(3, 3)
    magnitudes, angles = chain_step(state, torch.tensor([2, 0]), vectors, torch.tensor([4, 2]))
    assert state.count.tolist() == [2, 0, 4]
    assert torch.equal(state.last[2], vectors[0, 3])
    assert torch.equal(state.last[0], vectors[1, 1])
    assert not state.first[1].any()
    assert magnitudes[0, 0] == 0  # a chain's first vector ends no step
    assert (magnitudes[0, 1:] > 0).all()
    assert magnitudes[1].tolist()[2:] == [0, 0]  # padding
    assert angles[1].tolist()[2:] == [0, 0]
    assert float(state.sum_magnitude[2]) == pytest.approx(float(magnitudes[0].sum()), rel=1e-6)


def test_nothing_new_changes_nothing() -> None:
    state = feed(torch.randn(5, 3), [])
    before = (state.first.clone(), state.last.clone(), state.sum_magnitude.clone())
    chain_step(state, torch.tensor([0]), torch.randn(1, 2, 3), torch.tensor([0]))
    chain_step(state, torch.tensor([0]), torch.empty(1, 0, 3), torch.tensor([0]))
    assert state.count.tolist() == [5]
    assert torch.equal(before[0], state.first)
    assert torch.equal(before[1], state.last)
    assert torch.equal(before[2], state.sum_magnitude)


def test_a_zero_vector_marks_the_chain_and_leaves_no_nan() -> None:
    vectors = torch.randn(4, 3)
    vectors[2] = 0
    state = feed(vectors, [1])
    assert bool(state.degenerate[0])
    assert math.isfinite(float(state.sum_angle[0]))


def test_small_angles_keep_their_digits() -> None:
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([math.cos(1e-4), math.sin(1e-4)])
    assert float(angle_between(a, b)) == pytest.approx(1e-4, rel=1e-3)  # acos of the float32 cosine gives 0
    assert float(angle_between(a, -a)) == pytest.approx(math.pi)
    assert math.isnan(float(angle_between(a, torch.zeros(2))))


def test_token_vectors_are_the_mean_over_layers_of_heads_side_by_side() -> None:
    keys, values = torch.randn(5, 2, 3, 8, 4), torch.randn(5, 2, 3, 8, 6)
    view = KVView.from_contiguous(keys, values, [8, 8])
    found = token_vectors(view, 1, 2, 7, [0, 4, 3])
    wanted = torch.cat(
        [x[[0, 4, 3], 1, :, 2:7].double().mean(0).transpose(0, 1).flatten(1) for x in (keys, values)], dim=1
    )
    assert found.shape == (5, 3 * 4 + 3 * 6)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
