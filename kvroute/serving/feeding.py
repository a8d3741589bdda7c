"""Feeds answers' new tokens to what is kept of them: sums by feature, and chains.

A step reads each new token once, by the kernels (compiled on a CPU), in a few calls for all requests and layers: chains
with the sums by layer, from which plain features are taken; and a call for each feature that weighs tokens or has a
window. Sums over a step's tokens are float32, and kept in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvroute.errors import WindowedLayerError
from kvroute.pooling import PoolingSpec
from kvroute.serving.host_copies import HostCopies
from kvroute.serving.messages import Array, Norms, StepRequest, StepResults, Sums
from kvroute.serving.state_rows import StateRows
from kvroute.serving.token_runs import Runs, runs_of, whole_runs, window_of
from kvroute_kernels import (
    ChainTensors,
    KVView,
    KVViewError,
    WindowError,
    Workspace,
    feed_layers,
    paged_chain_step,
    paged_pool,
)


def feature_key(of: str, spec: PoolingSpec) -> str:
    """Features with one key are read as one: what differs between them is done after the sums."""
    return (
        f"{of}|{spec.layers}|{spec.part}|{spec.tokens in ('last', 'first') and spec.tokens}|"
        f"{spec.window}|{spec.weights}|{spec.sif_a if spec.weights == 'sif' else ''}|{spec.layer_reduce}|{spec.heads}"
    )


def narrowed(spec: PoolingSpec, sums: Tensor | None) -> Tensor | None:
    """Sums ``[R, n, H, D]`` made as small as the spec allows before they are kept and sent: layers and heads that it
    averages or adds are one already, ``[R, 1, 1, D]`` at the least. Adding up tokens later gives the same."""
    if sums is None:
        return None
    if spec.heads == "mean":
        sums = sums.mean(dim=2, keepdim=True)
    if spec.layer_reduce == "mean":
        return sums.mean(dim=1, keepdim=True)
    return sums.sum(dim=1, keepdim=True) if spec.layer_reduce == "sum" else sums


@dataclass(slots=True)
class Asked:
    """What one request asks, resolved: specs by key, and whether chains; and how far its answer was read."""

    slot: int
    prompt: dict[str, PoolingSpec]
    answer: dict[str, PoolingSpec]
    chain: bool
    read: int | None = None


class _Read(NamedTuple):
    """What a step adds to a feature of some requests: sums ``[R, n, H, D]`` and weights ``[R]``."""

    key: str
    rows: list[int]
    spec: PoolingSpec
    sums: tuple[Tensor | None, Tensor | None]
    weight: Array


class Feeder:
    """Keeps sums and chains of answers.

    Args:
        num_layers: attention layers of the model.
        rows: where state is kept.
        workspace: buffers of the kernels.
        copies: brings numbers to the host.
    """

    def __init__(self, num_layers: int, rows: StateRows, workspace: Workspace, copies: HostCopies) -> None:
        self._num_layers = num_layers
        self._rows = rows
        self._workspace = workspace
        self._copies = copies
        self.touched = False
        """State was changed since this was last set to False, so what was read can't be read a second time."""

    def feed(self, view: KVView, requests: Sequence[StepRequest], asked: Sequence[Asked], results: StepResults) -> None:
        """Feed a step's tokens of R requests, and put what is kept of them now into the results.

        Raises:
            WindowedLayerError: a layer holds a token no more.
            whatever else the kernels raise; what can't be read is found before any state is changed.
        """
        try:
            self._feed(view, requests, asked, results)
        except WindowError as error:
            raise WindowedLayerError(str(error)) from error

    def _feed(
        self, view: KVView, requests: Sequence[StepRequest], asked: Sequence[Asked], results: StepResults
    ) -> None:
        chains = [i for i, one in enumerate(asked) if one.chain]
        by_key: dict[str, list[int]] = {}
        for i, one in enumerate(asked):
            for key in one.answer:
                by_key.setdefault(key, []).append(i)
        plain: list[tuple[str, list[int], PoolingSpec]] = []
        found: list[_Read] = []
        for key, all_rows in by_key.items():
            spec, rows = asked[all_rows[0]].answer[key], all_rows
            if window_of(spec) is None and spec.tokens != "first" and spec.weights is None:
                plain.append((key, [i for i in rows if asked[i].chain], spec))
                rows = [i for i in rows if not asked[i].chain]
                runs = whole_runs(rows, requests)
            else:
                runs = runs_of(rows, requests, spec)
            if rows:
                found.append(self._pooled(view, key, rows, spec, runs))
        slots = [one.slot for one in asked]
        if chains:
            sums, results.norms = self._chained(view, requests, chains, slots)
            place = {i: at for at, i in enumerate(chains)}
            found += [_taken(view, requests, key, rows, spec, sums, place) for key, rows, spec in plain if rows]
        self.touched = True
        for read in found:
            kept = self._kept(read, requests, slots)
            have = results.sums.get(read.key)
            results.sums[read.key] = kept if have is None else have.extend(kept)
        results.read = {r.id: r.high for r in requests}

    def _pooled(self, view: KVView, key: str, rows: list[int], spec: PoolingSpec, runs: Runs) -> _Read:
        """A feature's sums over runs, by a call of its own."""
        layers = spec.read_layers(self._num_layers)
        every = runs.sequence == list(range(view.num_sequences))
        weights = None
        if runs.weights is not None and runs.start:
            ends = np.cumsum(np.array(runs.stop) - np.array(runs.start))[:-1]
            weights = [torch.from_numpy(w) for w in np.split(runs.weights, ends)]
        sums = paged_pool(
            view if every else view.select_sequences(runs.sequence),
            layers=layers,
            start=runs.start,
            stop=runs.stop,
            part=spec.part,
            weights=weights,
            workspace=self._workspace,
        )
        parts = [_by_row(narrowed(spec, x), runs.row, len(rows)) for x in (sums.keys, sums.values)]
        return _Read(key, rows, spec, (parts[0], parts[1]), runs.total)

    def _kept(self, read: _Read, requests: Sequence[StepRequest], slots: Sequence[int]) -> Sums:
        """Add what a step read to what is kept, and give what that is now."""
        mine = torch.tensor([slots[i] for i in read.rows])
        out: list[Array | None] = []
        for letter, x in zip("kv", read.sums, strict=True):
            if x is None:
                out.append(None)
                continue
            state = self._rows.get(f"{read.key}|{letter}", x.shape[1:], torch.float64, x.device)
            place = mine.to(x.device)
            summed = state[place] + x
            state[place] = summed
            out.append(self._copies.take(summed.float()))
        total = self._rows.get(f"{read.key}|w", (), torch.float64, torch.device("cpu"))
        weight = total[mine] + torch.from_numpy(read.weight)
        total[mine] = weight
        return Sums([requests[i].id for i in read.rows], out[0], out[1], weight.numpy())

    def _chained(
        self, view: KVView, requests: Sequence[StepRequest], rows: list[int], slots: Sequence[int]
    ) -> tuple[Tensor, Norms]:
        """Feed chains: of the new tokens of R requests the sums by layer ``[R, L, F]``, and all squared lengths."""
        some = view if len(rows) == view.num_sequences else view.select_sequences(rows)
        mine, low = [slots[i] for i in rows], [requests[i].low for i in rows]
        state, layers = self._chain_tensors(view), list(range(self._num_layers))
        touched, self.touched = self.touched, True
        try:
            steps = paged_chain_step(
                some, state, mine, low, some.host_lengths, layers, layer_sums=True, workspace=self._workspace
            )
        except KVViewError:  # refused before any state was changed
            self.touched = touched
            raise
        sums = steps.layer_sums
        assert sums is not None
        kept = self._rows.get("chain|layers", sums.shape[1:], torch.float64, sums.device)
        norms, layer_spans = feed_layers(kept, mine, sums)
        place = torch.tensor(mine, device=sums.device)
        spans = (state.last[place] - state.first[place]).double().square().sum(dim=1)
        return sums, Norms(
            [requests[i].id for i in rows],
            np.array(steps.counts, dtype=np.int64),
            *(self._copies.take(x) for x in (steps.squares, spans, norms, layer_spans)),
        )

    def _chain_tensors(self, view: KVView) -> ChainTensors:
        """The states of all rows' chains; a row that is given out anew is zeros, as a chain that has seen nothing."""
        group = view.groups[0]
        device, size = view.lengths.device, group.keys.shape[2] * (group.keys.shape[4] + group.values.shape[4])
        return ChainTensors(
            self._rows.get("chain|first", (size,), torch.float32, device),
            self._rows.get("chain|last", (size,), torch.float32, device),
            self._rows.get("chain|count", (), torch.int64, device),
            self._rows.get("chain|magnitudes", (), torch.float64, device),
            self._rows.get("chain|angles", (), torch.float64, device),
            self._rows.get("chain|degenerate", (), torch.bool, device),
        )


def _taken(
    view: KVView,
    requests: Sequence[StepRequest],
    key: str,
    rows: list[int],
    spec: PoolingSpec,
    layer_sums: Tensor,
    place: Mapping[int, int],
) -> _Read:
    """A feature's sums over all new tokens out of the sums by layer that chains have read."""
    keys, values = view.groups[0].keys, view.groups[0].values
    heads, size, layers = keys.shape[2], keys.shape[4], spec.read_layers(layer_sums.shape[1])
    chosen = slice(layers[0], layers[-1] + 1) if layers == tuple(range(layers[0], layers[-1] + 1)) else list(layers)
    at = [place[i] for i in rows]
    x = layer_sums if len(at) == len(place) else layer_sums[at]
    x = x[:, chosen]
    split = (
        x[..., : heads * size].view(*x.shape[:2], heads, size),
        x[..., heads * size :].view(*x.shape[:2], heads, values.shape[4]),
    )
    parts = [narrowed(spec, part) if letter in spec.part else None for letter, part in zip("kv", split, strict=True)]
    counts = np.array([requests[i].high - requests[i].low for i in rows], dtype=np.float64)
    return _Read(key, rows, spec, (parts[0], parts[1]), counts)


def _by_row(x: Tensor | None, row: Sequence[int], rows: int) -> Tensor | None:
    """Sums of runs added up by request, several runs of one in their order; copied out of a workspace."""
    if x is None:
        return None
    if list(row) == list(range(rows)):
        return x if x.device.type == "cpu" else x.clone()  # only kernels on a device lend their buffers
    total = x.new_zeros(rows, *x.shape[1:])
    turns: dict[int, list[int]] = {}
    seen: dict[int, int] = {}
    for run, of in enumerate(row):
        seen[of] = seen.get(of, -1) + 1
        turns.setdefault(seen[of], []).append(run)
    for runs in turns.values():  # each row once a turn, so that no two are added at once
        at = torch.tensor([row[run] for run in runs], device=x.device)
        total[at] += x[torch.tensor(runs, device=x.device)]
    return total
