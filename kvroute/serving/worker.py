"""What runs in the engine's worker: after each forward pass, one call reads what all requests just got.

An answer's sums and chains are fed with its new tokens; a prompt is pooled once, when it is whole. State is flat in
an answer's length. What a step costs, is what its passes over the new tokens' keys and values cost: only layers that
are asked for are read, each token once, and sums over them are taken in float32 before they are added in float64.
Pure torch: tested without an engine.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvroute.errors import WindowedLayerError
from kvroute.pooling import PoolingSpec, token_sums
from kvroute.serving.answers import public_text
from kvroute.serving.asks import Ask, vectors_of
from kvroute.serving.config import ServingConfig
from kvroute.serving.forcing import BOARD, Board
from kvroute.serving.host_copies import HostCopies
from kvroute.serving.kernel_reading import Runs, feed_chains, runs_of, sums_of_runs, uses_kernels
from kvroute.serving.looking import Gather, Looker
from kvroute.serving.messages import Array, Norms, StepMeta, StepRequest, StepResults, Sums
from kvroute.serving.pages import LayerPages, stack_pages, view_of
from kvroute_kernels import ChainTensors, KVView, WindowError, Workspace, prepare
from kvroute_kernels.view import read_numbers

_log = logging.getLogger(__name__)
_RUN = 4
"""New tokens a request, on average, from which on they are read as slices."""
_LOGGED = 5
"""Faults that are logged in full; all are counted."""


def feature_key(of: str, spec: PoolingSpec) -> str:
    """Features with one key are read as one: what differs between them is done after the sums."""
    return f"{of}|{spec.layers}|{spec.part}|{spec.tokens in ('last', 'first') and spec.tokens}|" + (
        f"{spec.window}|{spec.weights}|{spec.sif_a if spec.weights == 'sif' else ''}|{spec.layer_reduce == 'last'}"
    )


def window_of(spec: PoolingSpec) -> int | None:
    """Tokens of an answer that count, or None for all."""
    return 1 if spec.tokens == "last" else spec.window


@dataclass(slots=True)
class _Asked:
    """What one request asks, resolved: specs by key, and whether chains."""

    slot: int
    prompt: dict[str, PoolingSpec]
    answer: dict[str, PoolingSpec]
    chain: bool


class _Rows:
    """Named state tensors with one row a request; rows are reused and set to zero when given out."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._free: list[int] = []
        self._size = 0

    def take(self) -> int:
        if not self._free:
            more = max(16, self._size)
            self._free = list(range(self._size, self._size + more))[::-1]
            self._size += more
        row = self._free.pop()
        for tensor in self.tensors.values():
            if row < tensor.shape[0]:
                tensor[row] = 0
        return row

    def give(self, row: int) -> None:
        self._free.append(row)

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        have = self.tensors.get(name)
        if have is None or have.shape[0] < self._size:
            grown = torch.zeros(self._size, *shape, dtype=dtype, device=device)
            if have is not None:
                grown[: have.shape[0]] = have
            self.tensors[name] = have = grown
        return have


class _Gathered:
    """Keys and values of T tokens of several requests, one gather a stack of layers.

    Args:
        view: the requests' pages.
        sequence, position: ``[T]`` int64, whose token and which.
        layers: that are read.
    """

    def __init__(self, view: KVView, sequence: Tensor, position: Tensor, layers: Sequence[int]) -> None:
        self.layers: dict[int, tuple[int, int]] = {}
        self.parts: list[tuple[Tensor, Tensor]] = []
        wanted = set(layers)
        for group in view.groups:
            places = [place for place, layer in enumerate(group.layers) if layer in wanted]
            if not places:
                continue
            low, high = places[0], places[-1] + 1
            table, size = group.table, group.page_size
            slot = position + table.offset[sequence]
            page = table.pages[sequence, slot // size]
            if bool(((page < 0) | (position < table.first[sequence])).any()):
                raise WindowedLayerError(
                    f"Layer {group.layers[0]} holds only a window of the tokens, and earlier ones are needed."
                )
            row = slot % size
            # [T, G, H, D]: the two index tensors lead
            self.layers |= {group.layers[place]: (len(self.parts), place - low) for place in places}
            pick = functools.partial(_tokens_of, page=page, row=row)
            self.parts.append(
                (
                    read_numbers(group.keys[low:high], group.key_scale, pick),
                    read_numbers(group.values[low:high], group.value_scale, pick),
                )
            )

    def pick(self, layers: Sequence[int], part: int) -> Tensor:
        """``[T, n, H, D]`` float32 of some layers, in their order; part 0 are keys, 1 values."""
        places = [self.layers[i] for i in layers]
        groups = {g for g, _ in places}
        if len(groups) == 1:
            whole = self.parts[groups.pop()][part]
            wanted = [p for _, p in places]
            if wanted == list(range(wanted[0], wanted[0] + len(wanted))):
                return whole[:, wanted[0] : wanted[0] + len(wanted)].float()
            return whole[:, wanted].float()
        return torch.stack([self.parts[g][part][:, p].float() for g, p in places], dim=1)


@dataclass(slots=True)
class _Tokens:
    """T tokens of R requests, those of each behind one another.

    Attributes:
        sequence: ``[T]``, whose.
        position: ``[T]``, from the prompt's start.
        new: ``[T]`` bool, whether it came in this step; the others may leave a window.
    """

    sequence: Tensor
    position: Tensor
    new: Tensor

    def where(self, chosen: Tensor) -> _Tokens:
        """Some of them."""
        return _Tokens(self.sequence[chosen], self.position[chosen], self.new[chosen])


class WorkerSide:
    """Reads pages after each step.

    Args:
        pages: every attention layer's, of this rank.
        num_layers: attention layers of the model.
        config: the server's, with its heads and policies.
        board: takes the tokens that are forced.
        gather: over the ranks of the tensor-parallel group; None where there is one.
        replicas: consecutive ranks that hold the same heads.
        copy: whether this rank holds the heads of the one before it.
    """

    def __init__(
        self,
        pages: Sequence[LayerPages],
        num_layers: int | None = None,
        *,
        config: ServingConfig | None = None,
        board: Board = BOARD,
        gather: Gather | None = None,
        replicas: int = 1,
        copy: bool = False,
    ) -> None:
        self._stacks = stack_pages(pages)
        for device in {page.keys.device for page in pages}:
            prepare(device)  # here, where the engine starts, and not in its first step
        self._num_layers = len(pages) if num_layers is None else num_layers
        self._config = ServingConfig() if config is None else config
        self._board = board
        self._copy = copy
        self._looker = Looker(
            self._config.catalog, pages, self._num_layers, self._view, board, gather=gather, replicas=replicas
        )
        self._asked: dict[str, _Asked] = {}
        self._rows = _Rows()
        self._workspace = Workspace()
        self._copies = HostCopies()
        self._results: StepResults | None = None
        self._done: StepMeta | None = None
        self._logged = 0
        self._lost = 0
        self._touched = False  # state was changed, so what was read can't be read a second time

    @property
    def num_states(self) -> int:
        """Requests that state is held for."""
        return len(self._asked)

    @property
    def keeps_up(self) -> bool:
        """Whether pages can be read between two steps as well as behind one: nothing is still being written, and no
        layer has given up a page that a step before needed."""
        return all(s.keys.device.type == "cpu" and not s.first.drops for s in self._stacks)

    def step(self, meta: StepMeta) -> None:
        """Read what the step wrote; the second call for the same step does nothing. Raises nothing."""
        if meta is self._done:
            return
        self._done = meta
        began = time.perf_counter()
        for request in meta.finished:
            try:
                self.drop(request)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                self.failed(error)
        if not meta.requests and not meta.finished:
            return
        results = StepResults(copy=self._copy)
        try:
            self._work(meta.requests, results)
            self._lost += self._looker.quiet_faults(results.looks)
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            self._give_up(meta.requests, error, results)
        results.held = len(self._asked) + len(self._board)
        results.seconds = time.perf_counter() - began
        self._results = results

    def failed(self, error: Exception) -> None:
        """Something failed that no request can be named for: count it, and say so with the next results."""
        self._lost += 1
        if self._logged < _LOGGED:
            self._logged += 1
            _log.warning("kvroute failed in the worker.", exc_info=error)

    def read(self, requests: Sequence[StepRequest]) -> StepResults:
        """Read at once, between two steps: what requests that end were waiting with. Raises nothing."""
        results = StepResults(copy=self._copy)
        self._guarded(requests, results)
        return results

    def results(self) -> StepResults | None:
        """What the last step read, once; None if there is nothing."""
        results, self._results = self._results, None
        lost, self._lost = self._lost + self._board.faults, 0
        self._board.faults = 0
        if lost:
            results = StepResults(copy=self._copy) if results is None else results
            results.lost += lost
        return results

    def drop(self, request: str) -> None:
        """Forget a request."""
        self._board.drop(request)
        asked = self._asked.pop(request, None)
        if asked is not None:
            self._rows.give(asked.slot)

    # ------------------------------------------------------------------ reading

    def _work(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        for asked in requests:
            if asked.force is not None:
                self._board.put(asked.id, *asked.force)
        results.looks = self._looker.take(requests)
        self._guarded([r for r in requests if r.prompt or r.high > r.low], results)

    def _give_up(self, requests: Sequence[StepRequest], error: Exception, results: StepResults) -> None:
        """These requests get no features any more. What is forced stays: an answer keeps its mode."""
        if self._logged < _LOGGED:
            self._logged += 1
            _log.warning("kvroute could not read %s.", [r.id for r in requests], exc_info=error)
        for request in requests:
            results.faults[request.id] = public_text(error)
            asked = self._asked.pop(request.id, None)
            if asked is not None:
                self._rows.give(asked.slot)

    def _guarded(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        """Read; where that fails, each request by itself, so that a fault costs its own request alone."""
        if not requests:
            return
        self._touched = False
        try:
            with torch.inference_mode():  # as the engine: what is made in its mode can be changed in it alone
                commit = self._read(requests)
                self._copies.wait()
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            if len(requests) > 1 and not self._touched:
                self.failed(error)
                for request in requests:
                    self._guarded([request], results)
                return
            self._give_up(requests, error, results)
            return
        results.extend(commit)

    def _read(self, requests: Sequence[StepRequest]) -> StepResults:
        for request in requests:
            if request.ask is not None and request.id not in self._asked:
                self._asked[request.id] = self._resolve(request.ask)
        known = [r for r in requests if r.id in self._asked]
        results = StepResults()
        prompts = [r for r in known if r.prompt and self._asked[r.id].prompt]
        if prompts:
            self._pool_prompts(prompts, results)
        answers = [r for r in known if r.high > r.low and (self._asked[r.id].answer or self._asked[r.id].chain)]
        if answers:
            self._feed(answers, results)
        return results

    def _resolve(self, body: dict[str, object]) -> _Asked:
        ask = Ask.from_dict(body)
        vectors = vectors_of(ask, self._config).values()
        prompt = {feature_key(of, spec): spec for of, spec in vectors if of == "prompt"}
        answer = {feature_key(of, spec): spec for of, spec in vectors if of == "answer"}
        return _Asked(self._rows.take(), prompt, answer, ask.plan.chain is not None)

    def _view(self, requests: Sequence[StepRequest], lengths: list[int], starts: list[int]) -> KVView:
        tables = [[[0] * s + b for s, b in zip(r.skip, r.blocks, strict=True)] for r in requests]
        return view_of(self._stacks, tables, lengths, starts)

    def _pool_prompts(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        view = self._view(requests, [r.prompt_len for r in requests], [0] * len(requests))
        by_key: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            for key in self._asked[r.id].prompt:
                by_key.setdefault(key, []).append(i)
        for key, rows in by_key.items():
            spec = self._asked[requests[rows[0]].id].prompt[key]
            sums = token_sums(  # what lies in the workspace holds until the next key's sums
                view.select_sequences(rows),
                spec,
                num_layers=self._num_layers,
                stop=[requests[i].prompt_len for i in rows],
                sif_weights=[torch.from_numpy(requests[i].weights[spec.sif_a][: requests[i].prompt_len]) for i in rows]
                if spec.weights == "sif"
                else None,
                workspace=self._workspace,
            )
            results.sums[key] = Sums(
                [requests[i].id for i in rows],
                self._numbers(sums.keys, lent=True),
                self._numbers(sums.values, lent=True),
                self._copies.take(sums.weight.double()),
            )

    def _feed(self, requests: Sequence[StepRequest], results: StepResults) -> None:
        starts = [r.low - r.window for r in requests]
        view = self._view(requests, [r.high for r in requests], starts)
        low = torch.tensor([r.low for r in requests])
        begin = torch.tensor(starts)
        size = torch.tensor([r.high for r in requests]) - begin
        sequence = torch.repeat_interleave(torch.arange(len(requests)), size)
        position = torch.arange(len(sequence)) - (size.cumsum(0) - size)[sequence] + begin[sequence]
        tokens = _Tokens(sequence, position, position >= low[sequence])
        by_key: dict[str, list[int]] = {}
        for i, r in enumerate(requests):
            for key in self._asked[r.id].answer:
                by_key.setdefault(key, []).append(i)
        pooled = []
        for key, rows in by_key.items():
            spec = self._asked[requests[rows[0]].id].answer[key]
            signs = self._weights(spec, requests, tokens, low)
            signs[~_among(sequence, rows)] = 0
            pooled.append((key, rows, spec, signs))
        chains = [i for i, r in enumerate(requests) if self._asked[r.id].chain]
        if uses_kernels(view):
            self._feed_by_kernels(view, requests, pooled, chains, tokens, results)
            return
        # Tokens that leave a window are read again, for the layers of that window alone.
        windowed = [p for p in pooled if window_of(p[2]) is not None]
        plain = [p for p in pooled if window_of(p[2]) is None]
        fresh, feeds = tokens.new, []
        for some, chosen in ((plain, fresh), (windowed, _any([signs != 0 for *_, signs in windowed]))):
            layers = {layer for _, _, spec, _ in some for layer in spec.read_layers(self._num_layers)}
            if not layers:
                continue
            part = tokens if bool(chosen.all()) else tokens.where(chosen)
            got = self._gathered(view, part, sorted(layers))
            feeds.append((some, chosen, part, got))
        terms = self._chain_terms(view, requests, chains, tokens) if chains else None
        slots = torch.tensor([self._asked[r.id].slot for r in requests])
        self._touched = True
        if terms is not None:
            results.norms = self._feed_chains(*terms, requests, chains, slots)
        for some, chosen, part, got in feeds:
            for key, rows, spec, signs in some:
                results.sums[key] = self._add_sums(got, key, rows, spec, signs[chosen], part, slots, requests)
        results.read = {r.id: r.high for r in requests}

    def _feed_by_kernels(
        self,
        view: KVView,
        requests: Sequence[StepRequest],
        pooled: list[tuple[str, list[int], PoolingSpec, Tensor]],
        chains: list[int],
        tokens: _Tokens,
        results: StepResults,
    ) -> None:
        """The rest of :meth:`_feed`. What can't be read is found before any state is changed."""
        slots = torch.tensor([self._asked[r.id].slot for r in requests])
        read: list[tuple[str, list[int], PoolingSpec, Runs, tuple[Tensor | None, Tensor | None]]] = []
        for key, rows, spec, signs in pooled:
            runs = runs_of(tokens.sequence, tokens.position, signs)
            layers = spec.read_layers(self._num_layers)
            sums = sums_of_runs(view, runs, rows, layers, spec.part, self._workspace)
            read.append((key, rows, spec, runs, sums))
        self._touched = True
        if chains:
            held = self._chain_tensors(view)
            low = [requests[i].low for i in chains]
            mine = slots[chains].tolist()
            steps, by_layer = feed_chains(view, held, chains, mine, low, self._num_layers, self._workspace)
            spans = _square(held.last[mine] - held.first[mine])
            results.norms = self._norms(steps, spans, by_layer, requests, chains, slots[chains])
        for key, rows, spec, runs, sums in read:
            weight = torch.zeros(len(requests), dtype=torch.float64)
            for sequence, w in zip(runs.sequence, runs.weights, strict=True):
                weight[sequence] += w.sum(dtype=torch.float64)
            results.sums[key] = self._kept_sums(key, rows, spec, sums, weight[rows], slots, requests)
        results.read = {r.id: r.high for r in requests}

    def _chain_tensors(self, view: KVView) -> ChainTensors:
        """The states of all rows' chains; a row that is given out anew is zeros, as a chain that has seen nothing."""
        group = view.groups[0]
        device, size = view.lengths.device, group.keys.shape[2] * (group.keys.shape[4] + group.values.shape[4])
        shape, numbers = ((size,), ()), (torch.float32, torch.int64, torch.float64, torch.bool)
        return ChainTensors(
            self._rows.get("chain|first", shape[0], numbers[0], device),
            self._rows.get("chain|last", shape[0], numbers[0], device),
            self._rows.get("chain|count", shape[1], numbers[1], device),
            self._rows.get("chain|magnitudes", shape[1], numbers[2], device),
            self._rows.get("chain|angles", shape[1], numbers[2], device),
            self._rows.get("chain|degenerate", shape[1], numbers[3], device),
        )

    @staticmethod
    def _gathered(view: KVView, tokens: _Tokens, layers: Sequence[int]) -> _Gathered:
        device = view.lengths.device
        return _Gathered(view, tokens.sequence.to(device), tokens.position.to(device), layers)

    def _weights(self, spec: PoolingSpec, requests: Sequence[StepRequest], tokens: _Tokens, low: Tensor) -> Tensor:
        """``[T]`` float64, how much each token is added: negative where it leaves the window."""
        sequence, position, new = tokens.sequence, tokens.position, tokens.new
        window = window_of(spec)
        if spec.tokens == "first":
            begin = torch.tensor([r.answer_start for r in requests])[sequence]
            sign = (new & (position == begin)).double()
        elif window is None:
            sign = new.double()
        else:
            begin = torch.tensor([r.answer_start for r in requests])[sequence]
            high = torch.tensor([r.high for r in requests])[sequence]
            inside = position >= high - window
            was = (~new) & (position >= torch.maximum(low[sequence] - window, begin))
            sign = (new & inside).double() - (was & ~inside).double()
        if spec.weights == "position":
            return sign * (position + 1)
        if spec.weights == "sif":
            return sign * torch.from_numpy(np.concatenate([_sif(r, spec.sif_a) for r in requests])).double()
        return sign

    def _add_sums(
        self,
        got: _Gathered,
        key: str,
        rows: list[int],
        spec: PoolingSpec,
        signs: Tensor,
        tokens: _Tokens,
        slots: Tensor,
        requests: Sequence[StepRequest],
    ) -> Sums:
        chosen = signs != 0
        every = bool(chosen.all())
        sequence = tokens.sequence if every else tokens.sequence[chosen]
        signs = signs if every else signs[chosen]
        row = _places(len(requests), rows)[sequence]
        plain = bool((signs == 1).all())
        found: list[Tensor | None] = []
        for part, letter in enumerate("kv"):
            if letter not in spec.part:
                found.append(None)
                continue
            x = got.pick(spec.read_layers(self._num_layers), part)
            device = x.device
            x = x if every else x[chosen.to(device)]
            if not plain:
                x = x * signs.to(device, torch.float32)[:, None, None, None]
            found.append(_sums_by_row(x, row.to(device), len(rows)))
        weight = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, signs)
        return self._kept_sums(key, rows, spec, (found[0], found[1]), weight, slots, requests)

    def _kept_sums(
        self,
        key: str,
        rows: list[int],
        spec: PoolingSpec,
        sums: tuple[Tensor | None, Tensor | None],
        weight: Tensor,
        slots: Tensor,
        requests: Sequence[StepRequest],
    ) -> Sums:
        """Add a step's sums ``[R, n, H, D]`` and weights ``[R]`` to what is kept, and give what that is now."""
        mine = slots[rows]
        out: list[Array | None] = []
        for letter, x in zip("kv", sums, strict=True):
            if letter not in spec.part or x is None:
                out.append(None)
                continue
            state = self._rows.get(f"{key}|{letter}", x.shape[1:], torch.float64, x.device)
            place = mine.to(x.device)
            summed = state[place] + x
            state[place] = summed
            out.append(self._numbers(summed))
        total = self._rows.get(f"{key}|w", (), torch.float64, torch.device("cpu"))
        total[mine] += weight
        return Sums([requests[i].id for i in rows], out[0], out[1], total[mine].numpy())

    def _chain_terms(
        self, view: KVView, requests: Sequence[StepRequest], rows: list[int], tokens: _Tokens
    ) -> tuple[Tensor, list[Tensor]]:
        """Of the new tokens of R requests the means over layers ``[T, F]``, keys beside values, and of keys and of
        values the sums over each request's tokens ``[R, L, H*D]``; float32."""
        layers = tuple(range(self._num_layers))
        fresh = sum(requests[i].high - requests[i].low for i in rows)
        if len(view.groups) == 1 and view.groups[0].layers == layers and fresh >= _RUN * len(rows):
            try:
                return self._run_terms(view, requests, rows)
            except WindowError as error:
                raise WindowedLayerError(str(error)) from error
        part = tokens.where(tokens.new & _among(tokens.sequence, rows))
        got = self._gathered(view, part, layers)
        row = _places(len(requests), rows)[part.sequence]
        both = [got.pick(layers, part).flatten(2) for part in (0, 1)]  # [T, L, F]
        sums = [_sums_by_row(x, row.to(x.device), len(rows)) for x in both]
        return torch.cat([x.mean(dim=1) for x in both], dim=1), sums

    @staticmethod
    def _run_terms(view: KVView, requests: Sequence[StepRequest], rows: list[int]) -> tuple[Tensor, list[Tensor]]:
        """The same, run by run: tokens that follow each other in a page are read as one slice, which costs a third
        of what it takes to pick them one by one."""
        group = view.groups[0]
        means: tuple[list[Tensor], list[Tensor]] = ([], [])
        sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i in rows:
            offset, start = int(group.table.offset[i]), requests[i].low
            mine: list[Tensor | None] = [None, None]
            while start < requests[i].high:
                page_end = ((start + offset) // group.page_size + 1) * group.page_size - offset
                stop = min(requests[i].high, page_end)
                for part, piece in enumerate(view.token_slices(group, i, start, stop)):
                    x = torch.empty(piece.shape, device=piece.device).copy_(piece)  # [L, H, n, D]
                    before, summed = mine[part], x.sum(dim=2).flatten(1)
                    mine[part] = summed if before is None else before + summed
                    means[part].append(x.mean(dim=0).transpose(0, 1).flatten(1))
                start = stop
            for part, whole in enumerate(mine):
                assert whole is not None
                sums[part].append(whole)
        return torch.cat([torch.cat(x) for x in means], dim=1), [torch.stack(x) for x in sums]

    def _feed_chains(
        self, z: Tensor, summed: list[Tensor], requests: Sequence[StepRequest], rows: list[int], slots: Tensor
    ) -> Norms:
        device = z.device
        counts = torch.tensor([requests[i].high - requests[i].low for i in rows])
        mine = slots[rows].to(device)
        last_at = (counts.cumsum(0) - 1).to(device)
        first_at = last_at - counts.to(device) + 1
        first = self._rows.get("chain|first", z.shape[1:], torch.float32, device)
        last = self._rows.get("chain|last", z.shape[1:], torch.float32, device)
        fresh = torch.tensor([requests[i].low == requests[i].answer_start for i in rows], device=device)
        before = torch.cat([z[:1], z[:-1]])
        before[first_at] = torch.where(fresh[:, None], z[first_at], last[mine])
        steps = torch.stack([_square(z - before), _square(z)], dim=1)
        first[mine] = torch.where(fresh[:, None], z[first_at], first[mine])
        last[mine] = z[last_at]
        return self._norms(steps, _square(last[mine] - first[mine]), summed, requests, rows, slots[rows])

    def _norms(
        self,
        steps: Tensor,
        spans: Tensor,
        summed: list[Tensor],
        requests: Sequence[StepRequest],
        rows: list[int],
        slots: Tensor,
    ) -> Norms:
        """Add the sums by layer to what is kept, and give all squared lengths."""
        mine = slots.to(steps.device)
        norm, move, span = [], [], []
        for x, letter in zip(summed, "kv", strict=True):
            state = self._rows.get(f"chain|layers|{letter}", x.shape[1:], torch.float64, x.device)
            by_layer = state[mine] + x
            state[mine] = by_layer
            norm.append(_square(by_layer))
            move.append(_square(by_layer[:, 1:] - by_layer[:, :-1]))
            span.append(_square(by_layer[:, -1] - by_layer[:, 0]))
        moves = torch.nn.functional.pad(move[0] + move[1], (1, 0))
        return Norms(
            [requests[i].id for i in rows],
            np.array([requests[i].high - requests[i].low for i in rows], dtype=np.int64),
            self._copies.take(steps),
            self._copies.take(spans),
            self._copies.take(torch.stack([moves, norm[0] + norm[1]], dim=2)),
            self._copies.take(span[0] + span[1]),
        )

    def _numbers(self, x: Tensor | None, *, lent: bool = False) -> Array | None:
        """On the host, in float32; what is lent by the workspace is copied."""
        if x is None:
            return None
        return self._copies.take(x.to(torch.float32, copy=lent and x.device.type == "cpu"))


def _among(sequence: Tensor, rows: Sequence[int]) -> Tensor:
    """``[T]`` bool, whether a token is of one of these requests."""
    return torch.isin(sequence, torch.tensor(rows))


def _any(masks: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(masks)).any(dim=0) if masks else torch.zeros(0, dtype=torch.bool)


def _places(count: int, rows: Sequence[int]) -> Tensor:
    """``[count]``, by request its place among ``rows``."""
    places = torch.zeros(count, dtype=torch.int64)
    places[rows] = torch.arange(len(rows))
    return places


def _sums_by_row(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """``[T, ...]`` float32 summed into ``[rows, ...]``; ``row`` is ``[T]`` and rises."""
    if x.shape[0] == rows:  # a token each, as in most steps (none has none: then it would not be here)
        counts = torch.bincount(row, minlength=rows)
        if bool((counts == 1).all()):
            return x
    out = torch.zeros(rows, *x.shape[1:], dtype=x.dtype, device=x.device)
    return out.index_add_(0, row, x)


def _sif(request: StepRequest, a: float) -> Array:
    """Weights of the tokens ``low - window..high``, which come last; of a request that does not ask for them, zeros."""
    size = request.high - request.low + request.window
    found = request.weights.get(a)
    return np.zeros(size, np.float32) if found is None else found[len(found) - size :]


def _tokens_of(cache: Tensor, page: Tensor, row: Tensor) -> Tensor:
    """``[T, G, H, D]`` of ``[G, P, H, N, D]``."""
    return cache[:, page, :, row]


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum(dim=-1)
