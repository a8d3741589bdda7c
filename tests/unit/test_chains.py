"""ChainState, online, against the offline formula in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from kvroute import (
    SCORES,
    ChainSpec,
    ChainState,
    KVRouteError,
    NonFiniteCacheError,
    SpecError,
    WindowedLayerError,
    chain_scores,
)
from kvroute_kernels import KVView


def walk(
    tokens: int, layers: int = 4, heads: int = 3, size: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[L, T, H, D]`` that drift as those of a text do, rather than jump about."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(layers, 1, heads, size, generator=generator) * 4
    keys = base + torch.randn(layers, tokens, heads, size, generator=generator)
    values = torch.randn(layers, tokens, heads, size + 1, generator=generator).cumsum(dim=1) / 20
    return keys, values


def offline(keys: torch.Tensor, values: torch.Tensor, layers: list[int] | None = None) -> dict[str, float]:
    cache = [
        (k.transpose(0, 1).double().numpy(), v.transpose(0, 1).double().numpy())
        for k, v in zip(keys, values, strict=True)
    ]
    token = reference.coe(reference.token_chain(cache, 0, keys.shape[1], layers))
    layer = reference.coe(reference.layer_chain(cache, 0, keys.shape[1], layers))
    names = ("kv_coe_r_token", "kv_coe_c_token", "kv_coe_r_layer", "kv_coe_c_layer")
    return dict(zip(names, (*token, *layer), strict=True))


def values_of(state: ChainState, sequence: int = 0) -> dict[str, float | None]:
    return {name: score.value for name, score in state.scores(sequence).items()}


def test_after_2000_tokens_the_online_scores_are_those_of_the_formula() -> None:
    keys, values = walk(2000)
    wanted = offline(keys, values)
    one_by_one, at_once = ChainState(), ChainState()
    for t in range(2000):
        one_by_one.update(keys[:, t : t + 1], values[:, t : t + 1])
    at_once.update(keys, values)
    for state in (one_by_one, at_once):
        assert len(state) == 2000
        for name, value in values_of(state).items():
            assert value == pytest.approx(wanted[name], rel=1e-4), name
    assert set(wanted) <= set(SCORES)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(3, 60),
    layers=st.integers(3, 5),
    cuts=st.lists(st.integers(1, 59), max_size=5),
    chosen=st.sampled_from(["all", 0.7, [2, 0, 1], "last:3"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_cut_and_any_layers(tokens: int, layers: int, cuts: list[int], chosen: object, dtype: torch.dtype) -> None:
    keys, values = (x.to(dtype) for x in walk(tokens, layers, seed=tokens))
    spec = ChainSpec(layers=chosen)
    state = ChainState(spec=spec)
    borders = sorted({0, tokens, *(c for c in cuts if c < tokens)})
    for low, high in itertools.pairwise(borders):
        state.update(keys[:, low:high], values[:, low:high])
    resolved = list(spec.resolve(layers))
    wanted = offline(keys, values, resolved)
    for name, value in values_of(state).items():
        if name.endswith("layer") and len(resolved) < 3:
            assert value is None
        else:
            assert value == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name


def test_many_answers_of_many_lengths_in_one_state() -> None:
    lengths = [5, 40, 17]
    caches = [walk(n, seed=n) for n in lengths]
    keys = torch.full((4, 3, 3, 40, 6), float("nan"))
    values = torch.full((4, 3, 3, 40, 7), float("nan"))
    for b, (k, v) in enumerate(caches):
        keys[:, b, :, : lengths[b]], values[:, b, :, : lengths[b]] = k.transpose(1, 2), v.transpose(1, 2)
    view = KVView.from_contiguous(keys, values, lengths)
    state = ChainState(4)  # answer 0 gets nothing; the view's sequences feed 3, 1 and 2
    rows = [3, 1, 2]
    fed = [0, 0, 0]
    for step in (1, 9, 9, 100):
        stop = [min(n, f + step) for n, f in zip(lengths, fed, strict=True)]
        state.update_view(view, rows, fed, stop)
        fed = stop
    for b, row in enumerate(rows):
        wanted = offline(*caches[b])
        for name, value in values_of(state, row).items():
            assert value == pytest.approx(wanted[name], rel=1e-4), name
    assert all(score.value is None and score.reason for score in state.scores(0).values())


def test_a_states_memory_is_flat_but_for_the_8_bytes_of_coe_c() -> None:
    state = ChainState()
    keys, values = walk(3000)
    sizes = {}
    for t in range(3000):
        state.update(keys[:, t : t + 1], values[:, t : t + 1])
        if t + 1 in (100, 3000):
            sizes[t + 1] = state.nbytes
            assert len(state._steps[0]) < 64  # held in few tensors: each costs more than what is in it
    assert sizes[100][0] == sizes[3000][0]
    assert sizes[3000][1] == 8 * 2999
    assert sizes[100][1] == 8 * 99


def test_reading_does_not_disturb_the_state() -> None:
    keys, values = walk(30)
    read, unread = ChainState(), ChainState()
    for t in range(30):
        for state in (read, unread):
            state.update(keys[:, t : t + 1], values[:, t : t + 1])
        read.scores()
    assert values_of(read) == values_of(unread)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [(0, "has 0 vectors"), (1, "has 1 vectors"), (2, "has 2 vectors")],
)
def test_short_chains_have_a_reason_and_no_score(tokens: int, reason: str) -> None:
    state = ChainState()
    keys, values = walk(5)
    state.update(keys[:, :tokens], values[:, :tokens])
    scores = state.scores()
    for name in ("kv_coe_r_token", "kv_coe_c_token"):
        assert scores[name].value is None
        assert reason in str(scores[name].reason)
    if tokens == 0:
        assert "no token" in str(scores["kv_coe_r_layer"].reason)


def test_degenerate_chains_have_a_reason_and_no_score() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    zero = torch.zeros(2)
    for chain, reason in [
        ([a, b, a], "ends where it began"),
        ([a, a, a], "ends where it began"),
        ([a, b, 2 * a], "point the same way"),
        ([a, zero, b], "a vector of the chain is zero"),
        ([zero, a, b], "a vector of the chain is zero"),
        ([a, b, zero], "a vector of the chain is zero"),
        ([a, b * float("inf"), b], "not finite"),
        ([a, b, b * float("nan")], "not finite"),
        ([a], "has 1 vectors"),
    ]:
        scores = chain_scores(torch.stack(chain))
        for score in (scores.r, scores.c):
            assert score.value is None
            assert reason in str(score.reason)
        if torch.isfinite(torch.stack(chain)).all():
            state = ChainState()
            z = torch.stack(chain)[None, :, None]
            state.update(z, z)
            online = state.token_scores()
            assert (online.r, online.c) == (scores.r, scores.c)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_whatever_comes_in_no_nan_comes_out(rows: list[list[float]]) -> None:
    z = torch.tensor(rows, dtype=torch.float32)
    found = chain_scores(z)
    state = ChainState()
    try:
        state.update(z[None, :, None], z[None, :, None])
        scores = [found.r, found.c, *state.scores().values()]
    except KVRouteError:
        scores = [found.r, found.c]
    for score in scores:
        assert (score.value is None) != (score.reason is None)
        assert score.value is None or math.isfinite(score.value)


def test_the_offline_formula_is_the_papers() -> None:
    chain = torch.randn(12, 5)
    found = chain_scores(chain)
    assert (found.r.value, found.c.value) == pytest.approx(reference.coe(chain.double().numpy()), rel=1e-9)


def test_scores_do_not_depend_on_scale() -> None:
    keys, values = walk(40)
    small, large = ChainState(), ChainState()
    small.update(keys * 1e-3, values * 1e-3)
    large.update(keys * 1e3, values * 1e3)
    for a, b in zip(values_of(small).values(), values_of(large).values(), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    keys, values = walk(4)
    state = ChainState()
    with pytest.raises(SpecError, match="expected, not"):
        state.update(keys[0], values[0])
    with pytest.raises(SpecError, match="expected, not"):
        state.update(keys, values[:, :2])
    state.update(keys, values)
    before = values_of(state)
    with pytest.raises(SpecError, match="numbers"):
        state.update(keys[:, :, :2], values[:, :, :2])
    with pytest.raises(SpecError, match="no layer 2"):
        state.update(keys[:2], values[:2])
    with pytest.raises(SpecError, match="one answer"):
        ChainState(2).update(keys, values)
    with pytest.raises(SpecError, match="has 4 attention layers"):
        ChainState(spec=ChainSpec(layers=[7])).update(keys, values)
    assert values_of(state) == before


def test_nan_is_reported_with_layer_and_position_and_leaves_the_state_as_it_was() -> None:
    keys, values = walk(9)
    state = ChainState()
    state.update(keys[:, :5], values[:, :5])
    before = values_of(state)
    values[2, 7, 1, 0] = float("nan")
    with pytest.raises(NonFiniteCacheError) as caught:
        state.update(keys[:, 5:], values[:, 5:])
    assert (caught.value.layer, caught.value.position, caught.value.part) == (2, 7, "values")
    assert values_of(state) == before
    assert len(state) == 5


def test_tokens_that_a_window_dropped_can_not_be_fed() -> None:
    k = torch.randn(1, 2, 9, 4)
    view = KVView.from_contiguous([k, k[:, :, -3:]], [k, k[:, :, -3:]], [9], windows=[None, 4])
    with pytest.raises(WindowedLayerError, match="holds only a window"):
        ChainState().update_view(view, [0], [0], [9])
    ChainState().update_view(view, [0], [6], [9])


def test_layers_of_different_sizes_make_no_chain() -> None:
    view = KVView.from_contiguous(
        [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 6)], [torch.randn(1, 2, 5, 4)] * 2, [5]
    )
    with pytest.raises(SpecError):
        ChainState().update_view(view, [0], [0], [5])
    chosen = ChainState(spec=ChainSpec(layers=[1]))
    chosen.update_view(view, [0], [0], [5])
    assert np.isfinite(chosen.token_scores().r.value or 0)
