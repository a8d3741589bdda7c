"""One step of the online chains (KV-CoE).

The token-axis chain of a sequence is z_0..z_N, ``z_t = mean over layers of concat over heads of
[K; V]`` at token t (arXiv 2601.20326, section on KV-CoE; scores of arXiv 2410.13640, section 3).
Its state is z_0, the last z and two running sums, so a step costs O(L * H * D) and nothing that
grows with the length: ``sum m_i`` and ``sum a_i`` with ``m_i = |z_{i+1} - z_i|`` and
``a_i = angle(z_{i+1}, z_i)``. Angles are taken as ``2 atan2(|u - v|, |u + v|)`` of the unit
vectors, which keeps its digits where ``acos`` of a float32 cosine near 1 has lost them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvroute_kernels.dispatch import Backend, run
from kvroute_kernels.errors import KVViewError
from kvroute_kernels.ordered_sum import ordered_sum
from kvroute_kernels.paged_pool import paged_pool
from kvroute_kernels.view import KVView
from kvroute_kernels.workspace import Workspace


@dataclass(slots=True)
class ChainTensors:
    """State of B token-axis chains of vectors of size F. Flat in length.

    Attributes:
        first: ``[B, F]`` float32, z_0.
        last: ``[B, F]`` float32, the newest z.
        count: ``[B]`` int64, vectors seen.
        sum_magnitude: ``[B]`` float64, sum of |z_{i+1} - z_i|.
        sum_angle: ``[B]`` float64, sum of the angles, in radians.
        degenerate: ``[B]`` bool, an angle was undefined because a vector is zero.
    """

    first: Tensor
    last: Tensor
    count: Tensor
    sum_magnitude: Tensor
    sum_angle: Tensor
    degenerate: Tensor

    @classmethod
    def empty(cls, batch: int, size: int, device: torch.device | str = "cpu") -> ChainTensors:
        """The state of ``batch`` chains that have seen nothing."""
        return cls(
            first=torch.zeros(batch, size, device=device),
            last=torch.zeros(batch, size, device=device),
            count=torch.zeros(batch, dtype=torch.int64, device=device),
            sum_magnitude=torch.zeros(batch, dtype=torch.float64, device=device),
            sum_angle=torch.zeros(batch, dtype=torch.float64, device=device),
            degenerate=torch.zeros(batch, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, slots=True)
class ChainSteps:
    """Steps of R sequences, to which T tokens came; those of each sequence behind one another.

    Attributes:
        counts: new tokens of each sequence.
        rows: ``[T, 4]`` float64: magnitude, angle, squared magnitude, squared norm of z_t. The first three are 0 for a
            chain's first vector, and so is an angle that is undefined.
        layer_sums: ``[R, layers, H*D + H*Dv]`` float32, by layer the sums of keys, then values over each sequence's new
            tokens, where they were asked for.
    """

    counts: list[int]
    rows: Tensor
    layer_sums: Tensor | None = None

    @property
    def magnitudes(self) -> Tensor:
        """``[T]`` float32, |z_t - z_{t-1}|."""
        return self.rows[:, 0].float()

    @property
    def angles(self) -> Tensor:
        """``[T]`` float32, radians in [0, pi]."""
        return self.rows[:, 1].float()

    @property
    def squares(self) -> Tensor:
        """``[T, 2]`` float64, squared magnitude and squared norm: what ranks that hold some heads each can add up."""
        return self.rows[:, 2:]


def token_vectors(view: KVView, sequence: int, start: int, stop: int, layers: Sequence[int] | None = None) -> Tensor:
    """z_t of tokens ``start..stop`` of one sequence: ``[n, H*D + H*Dv]`` in float32 (float64 from float64).

    Mean over ``layers`` (all by default) of the concatenation over heads of keys, then values.
    """
    chosen = list(view.layers if layers is None else layers)
    accumulate = torch.float64 if view.dtype == torch.float64 else torch.float32
    split = view.split_layers(chosen)
    stacked: list[Tensor] = []
    for group, places, ranks in split:
        for i, piece in enumerate(view.token_slices(group, sequence, start, stop)):
            rows = piece if places == list(range(len(group.layers))) else piece[places]
            if len(split) == 1:  # ranks count up from 0
                stacked.append(rows)
                continue
            if len(stacked) <= i:
                stacked.append(rows.new_empty(len(chosen), *rows.shape[1:]))
            if rows.shape[1:] != stacked[i].shape[1:]:
                raise KVViewError(f"Layers {chosen} differ in heads or head size: a chain needs layers that are alike.")
            stacked[i][ranks] = rows
    parts = [ordered_sum(x, 0, accumulate).transpose(0, 1).flatten(1) / len(chosen) for x in stacked]
    return torch.cat(parts, dim=1)


def paged_chain_step(
    view: KVView,
    state: ChainTensors,
    rows: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    layer_sums: bool = False,
    backend: Backend | None = None,
    workspace: Workspace | None = None,
) -> ChainSteps:
    """Feed new tokens of a view's sequences to their chains, in place: one launch on a GPU.

    Args:
        view: the cache; sequence i feeds chain ``rows[i]``.
        state: the states, on the cache's device.
        rows: a chain of its own for every sequence.
        start: first new token of each sequence.
        stop: one past the last; equal to start where there is nothing new.
        layers: all by default. They must share H, D and Dv.
        layer_sums: also sum the new tokens by layer (for the layer-axis chain), in the same launch.
        backend: see :func:`kvroute_kernels.choose`.
        workspace: buffers to use again; then the layers' sums may lie in them until the next call.

    Raises:
        KVViewError: layers of different sizes, a range outside the sequence, an absent page, vectors that are not as
            large as the states'.
        WindowError: tokens a windowed layer holds no more.
    """
    chosen = list(view.layers if layers is None else layers)

    def triton() -> ChainSteps:
        from kvroute_kernels.chain_step_triton import paged_chain_step_triton

        return paged_chain_step_triton(view, state, rows, start, stop, chosen, layer_sums, workspace)

    def torch_() -> ChainSteps:
        return paged_chain_step_reference(view, state, rows, start, stop, chosen, layer_sums=layer_sums)

    def native() -> ChainSteps | None:
        from kvroute_kernels.chain_step_native import paged_chain_step_native
        from kvroute_kernels.native_library import can_read

        if not can_read(view, chosen):
            return None
        return paged_chain_step_native(view, state, rows, start, stop, chosen, layer_sums, workspace)

    device = view.lengths.device
    return run("paged_chain_step", device, view.dtype, backend, triton=triton, native=native, torch_=torch_)


def feed_layers(
    states: Tensor, rows: Sequence[int], sums: Tensor, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Add sums by layer to what is kept of chains over layers, in place, and measure them.

    Args:
        states: ``[chains, layers, F]`` float64, sums over all tokens so far.
        rows: a chain of its own for each of R sequences.
        sums: ``[R, layers, F]`` float32, over their new tokens (:attr:`ChainSteps.layer_sums`).
        backend: see :func:`kvroute_kernels.choose`; there is no kernel of Triton's.

    Returns:
        ``[R, layers, 2]`` float64, by layer the squared distance of its sum from the layer's before (0 for the first)
        and its squared norm; ``[R]`` float64, squared distance of the last layer's from the first's. Ranks that hold
        some heads each can add them up.
    """

    def torch_() -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(rows), dtype=torch.int64, device=states.device)
        summed = states[index] + sums
        states[index] = summed
        moved = torch.nn.functional.pad(_square(summed[:, 1:] - summed[:, :-1]), (1, 0))
        return torch.stack([moved, _square(summed)], dim=2), _square(summed[:, -1] - summed[:, 0])

    def native() -> tuple[Tensor, Tensor] | None:
        from kvroute_kernels.chain_step_native import feed_layers_native
        from kvroute_kernels.native_library import library

        return None if library() is None else feed_layers_native(states, rows, sums)

    return run("feed_layers", states.device, sums.dtype, backend, triton=torch_, native=native, torch_=torch_)


def paged_chain_step_reference(
    view: KVView,
    state: ChainTensors,
    rows: Sequence[int],
    start: Sequence[int],
    stop: Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    layer_sums: bool = False,
) -> ChainSteps:
    """:func:`paged_chain_step` in plain torch."""
    sums = None
    if layer_sums:
        pooled = paged_pool(view, layers=layers, start=start, stop=stop, backend="torch")
        assert pooled.keys is not None
        assert pooled.values is not None
        sums = torch.cat([pooled.keys.flatten(2), pooled.values.flatten(2)], dim=2)
    vectors = [
        token_vectors(view, b, lo, hi, layers).float() for b, (lo, hi) in enumerate(zip(start, stop, strict=True))
    ]
    counts = [int(v.shape[0]) for v in vectors]
    if not sum(counts):
        return ChainSteps(counts, torch.zeros(0, 4, dtype=torch.float64, device=state.first.device), sums)
    padded = torch.nn.utils.rnn.pad_sequence(vectors, batch_first=True)
    device = padded.device
    index = torch.tensor(list(rows), dtype=torch.int64, device=device)
    known = state.count[index] > 0
    before = torch.cat([state.last[index][:, None], padded[:, :-1]], dim=1)
    squared = [_square(padded - before), _square(padded)]
    squared[0][:, 0] = torch.where(known, squared[0][:, 0], 0.0)
    held = torch.tensor(counts, device=device)
    magnitudes, angles = chain_step(state, index, padded, held)
    new = torch.arange(padded.shape[1], device=device)[None] < held[:, None]
    return ChainSteps(counts, torch.stack([x[new].double() for x in (magnitudes, angles, *squared)], dim=1), sums)


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=-1)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angle between vectors along the last axis, in radians, [0, pi]; NaN where one is zero."""
    u = a / torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    v = b / torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    return 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def chain_step(state: ChainTensors, rows: Tensor, vectors: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Feed new vectors to some chains, in place.

    Args:
        state: the states of B chains.
        rows: ``[R]`` int64, which chains.
        vectors: ``[R, n, F]``, their new vectors, oldest first.
        counts: ``[R]`` int64, how many of the n are real for each chain.

    Returns:
        magnitudes and angles of the new steps, ``[R, n]`` float32 each; entry j is the step that ends in
        vector j. Steps that are not real (padding, a chain's first vector) are 0.
    """
    vectors = vectors.float()
    n = vectors.shape[1]
    if n == 0 or vectors.shape[0] == 0:
        empty = vectors.new_zeros(vectors.shape[:2])
        return empty, empty
    fresh = state.count[rows] == 0
    previous = torch.cat([state.last[rows][:, None], vectors[:, :-1]], dim=1)
    place = torch.arange(n, device=vectors.device)[None]
    real = place < counts[:, None]
    step = real & ~((place == 0) & fresh[:, None])
    magnitude = torch.linalg.vector_norm(vectors - previous, dim=-1)
    angle = angle_between(vectors, previous)
    undefined = torch.isnan(angle)
    magnitude = torch.where(step, magnitude, 0.0)
    angle = torch.where(step & ~undefined, angle, 0.0)
    state.first[rows] = torch.where((fresh & (counts > 0))[:, None], vectors[:, 0], state.first[rows])
    newest = vectors[torch.arange(len(rows), device=vectors.device), (counts - 1).clamp_min(0)]
    state.last[rows] = torch.where((counts > 0)[:, None], newest, state.last[rows])
    state.count[rows] += counts
    state.sum_magnitude[rows] += magnitude.sum(dim=1, dtype=torch.float64)
    state.sum_angle[rows] += angle.sum(dim=1, dtype=torch.float64)
    state.degenerate[rows] |= (undefined & step).any(dim=1)
    return magnitude, angle
