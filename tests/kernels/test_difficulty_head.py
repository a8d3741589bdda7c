"""The difficulty head: the reference against kvroute's own MLP, and the Triton twin against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvroute.heads.models import MLPModel
from kvroute_kernels import KVViewError, MLPHead, difficulty_head
from kvroute_kernels.difficulty_head_triton import HeadStack
from tests.kernels.caches import recorded

pytestmark = pytest.mark.usefixtures("small_blocks")


def random_head(dim: int, hidden: int, seed: int) -> MLPHead:
    g = torch.Generator().manual_seed(seed)
    inverse = torch.rand(dim, generator=g)
    inverse[0] = 0  # does not vary
    return MLPHead(
        torch.randn(dim, generator=g),
        inverse,
        torch.randn(hidden, dim, generator=g) / dim**0.5,
        torch.randn(hidden, generator=g),
        torch.randn(hidden, generator=g) / hidden**0.5,
        0.4,
    )


def test_the_reference_is_the_heads_own_model() -> None:
    head = random_head(37, 11, 0)
    x = torch.randn(20, 37)
    arrays = (t.numpy() for t in (head.mean, head.inverse, head.hidden_weight, head.hidden_bias, head.weight))
    wanted = 100 * MLPModel(*arrays, np.array([head.bias]))(x.numpy())
    found = difficulty_head(x, [head], [0] * 20, [50.0] * 20, backend="torch")
    np.testing.assert_allclose(found.difficulty.numpy(), wanted, rtol=1e-5, atol=1e-4)
    assert found.flags.tolist() == [int(d > 50) for d in wanted]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.sampled_from([1, 4, 15, 16, 40]), st.integers(1, 21)), min_size=1, max_size=3),
    requests=st.integers(0, 4),
    data=st.data(),
)
def test_it_is_the_reference(sizes, requests, data) -> None:
    heads = [random_head(dim, hidden, i) for i, (dim, hidden) in enumerate(sizes)]
    which = [data.draw(st.integers(0, len(heads) - 1)) for _ in range(requests)]
    width = max(dim for dim, _ in sizes) + 3
    x = torch.full((requests, width), torch.nan)
    for row, head in enumerate(which):
        x[row, : heads[head].dim] = torch.randn(heads[head].dim, generator=torch.Generator().manual_seed(row))
    thresholds = [data.draw(st.sampled_from([10.0, 50.0, 90.0])) for _ in range(requests)]
    found = difficulty_head(x, heads, which, thresholds, backend="interpret")
    wanted = difficulty_head(x, heads, which, thresholds, backend="torch")
    torch.testing.assert_close(found.difficulty, wanted.difficulty, rtol=1e-5, atol=1e-3)
    assert torch.isfinite(found.difficulty).all()
    near = (wanted.difficulty - torch.tensor(thresholds)).abs() < 2e-3
    assert torch.equal(found.flags[~near], wanted.flags[~near])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_what_is_not_finite_has_no_difficulty(bad: float, backend: str) -> None:
    x = torch.randn(3, 8)
    x[1, 0] = bad  # where the head does not look: inverse is 0
    found = difficulty_head(x, [random_head(8, 5, 1)], [0] * 3, [0.0, 0.0, 100.0], backend=backend)
    assert found.flags[1] == -1
    assert torch.isnan(found.difficulty[1])
    assert torch.isfinite(found.difficulty[[0, 2]]).all()
    assert found.flags[2] == 0  # 100 is not above 100


def test_a_request_has_the_same_bits_whatever_stands_beside_it() -> None:
    heads = [random_head(40, 9, 0), random_head(16, 21, 1)]
    x = torch.randn(4, 40)
    whole = difficulty_head(x, heads, [0, 1, 1, 0], [50.0] * 4, backend="interpret").difficulty
    for i, head in enumerate([0, 1, 1, 0]):
        alone = difficulty_head(x[i : i + 1], [heads[head]], [0], [50.0], backend="interpret").difficulty
        assert torch.equal(alone, whole[i : i + 1])


def test_a_step_allocates_nothing_and_reads_each_weight_once() -> None:
    head = random_head(40, 9, 0)
    stack = HeadStack([head], torch.device("cpu"))
    x = torch.randn(2, 40)
    stack.stage([0, 0], [50.0, 50.0])
    with recorded() as seen:
        stack.launch(x)
    matrix = head.hidden_weight
    inside = [a for addresses, _ in seen for a in addresses if 0 <= int(a) - matrix.data_ptr() < matrix.nbytes]
    assert len(inside) == 2 * matrix.numel()
    grown = stack.buffers.grown
    stack.stage([0, 0], [20.0, 90.0])
    assert stack.buffers.grown == grown
    assert stack.launches == 2


def test_what_does_not_fit_is_refused() -> None:
    head = random_head(8, 3, 0)
    with pytest.raises(KVViewError, match="2 heads and 1 thresholds"):
        difficulty_head(torch.zeros(2, 8), [head], [0, 0], [1.0])
    with pytest.raises(KVViewError, match="There are 1 heads, and number 1"):
        difficulty_head(torch.zeros(1, 8), [head], [1], [1.0])
    with pytest.raises(KVViewError, match="takes 8 numbers, and a row has 7"):
        difficulty_head(torch.zeros(1, 7), [head], [0], [1.0])
