"""What a step's new tokens add to sums and chains, read by the kernels: a fixed, small number of launches for all
requests and layers. The worker does the same with torch's own ops where no kernel runs (:mod:`kvroute.serving.worker`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvroute_kernels import ChainTensors, KVView, Workspace, choose, paged_chain_step, paged_pool


class Runs(NamedTuple):
    """Tokens of one sequence each that follow each other and all count.

    Attributes:
        sequence: whose, of the view's.
        start, stop: which.
        weights: by run ``[stop - start]`` float32.
        turn: 0 for a sequence's first run, 1 for its second, and so on.
    """

    sequence: list[int]
    start: list[int]
    stop: list[int]
    weights: list[Tensor]
    turn: list[int]


def uses_kernels(view: KVView) -> bool:
    """Whether the kernels read this view."""
    return bool(view.groups) and choose(view.lengths.device, view.dtype) != "torch"


def runs_of(sequence: Tensor, position: Tensor, signs: Tensor) -> Runs:
    """The runs of the tokens whose weight is not 0.

    Args:
        sequence: ``[T]`` int64, rising.
        position: ``[T]`` int64, rising within a sequence.
        signs: ``[T]`` float64, weights.
    """
    kept = np.flatnonzero(signs.numpy())
    whose, where = sequence.numpy()[kept], position.numpy()[kept]
    begins = np.flatnonzero(np.r_[True, (np.diff(whose) != 0) | (np.diff(where) != 1)]) if len(kept) else kept
    ends = np.r_[begins[1:], len(kept)] if len(kept) else kept
    turn: list[int] = []
    for i, begin in enumerate(begins):
        turn.append(turn[-1] + 1 if i and whose[begin] == whose[begins[i - 1]] else 0)
    weights = signs.float()[torch.from_numpy(kept)]
    return Runs(
        whose[begins].tolist(),
        where[begins].tolist(),
        (where[ends - 1] + 1).tolist() if len(kept) else [],
        [weights[b:e] for b, e in zip(begins.tolist(), ends.tolist(), strict=True)],
        turn,
    )


def sums_of_runs(
    view: KVView,
    runs: Runs,
    rows: Sequence[int],
    layers: Sequence[int],
    part: Literal["k", "v", "kv"],
    workspace: Workspace | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Weighted sums of the runs' keys and of their values by request, ``[rows, layers, H, D]`` float32, copied out of
    the workspace."""
    place = {row: i for i, row in enumerate(rows)}
    plain = all(bool((w == 1).all()) for w in runs.weights)
    sums = paged_pool(
        view.select_sequences(runs.sequence),
        layers=layers,
        start=runs.start,
        stop=runs.stop,
        part=part,
        weights=None if plain else runs.weights,
        workspace=workspace,
    )
    found: list[Tensor | None] = []
    for x in (sums.keys, sums.values):
        if x is None:
            found.append(None)
            continue
        total = x.new_zeros(len(rows), *x.shape[1:])
        for turn in sorted(set(runs.turn)):  # each row once a turn, so that no two are added at once
            mine = [i for i, t in enumerate(runs.turn) if t == turn]
            at = torch.tensor([place[runs.sequence[i]] for i in mine], device=x.device)
            total[at] += x[torch.tensor(mine, device=x.device)]
        found.append(total)
    return found[0], found[1]


def feed_chains(
    view: KVView,
    state: ChainTensors,
    rows: Sequence[int],
    slots: Sequence[int],
    start: Sequence[int],
    layers: int,
    workspace: Workspace | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Feed the tokens ``start..`` of some of the view's sequences to the chains ``slots``.

    Returns:
        ``[T, 2]`` float64, squared distance of each new token to the one before (0 for a chain's first) and squared
        norm; of keys and of values the sums over each sequence's new tokens, ``[R, L, H*D]`` float32.
    """
    some = view.select_sequences(rows)
    chosen = list(range(layers))
    steps = paged_chain_step(some, state, slots, start, some.host_lengths, chosen, layer_sums=True, workspace=workspace)
    assert steps.layer_sums is not None
    keys = view.groups[0].keys
    size = keys.shape[2] * keys.shape[4]
    return steps.squares, [steps.layer_sums[:, :, :size], steps.layer_sums[:, :, size:]]
