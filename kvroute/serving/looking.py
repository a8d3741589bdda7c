"""Difficulties in the worker: pooled from the pages behind the forward pass, decided on, forced before the sampling.

Each rank of a tensor-parallel group has only some heads, so the sums of all looks of a step go through one gather; then
every rank decides by itself, and the same. A rank that can't read takes part with NaN, so that none waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvroute.choosing import Chooser
from kvroute.decisions import Decision
from kvroute.engines.steering import Vectors
from kvroute.errors import InvalidInputError
from kvroute.heads.head import DifficultyHead
from kvroute.pooling import PoolingSpec, reduced, token_range, token_sums
from kvroute.route_steering import Request, finite, switch_at
from kvroute.serving.answers import public_text
from kvroute.serving.catalog import Catalog
from kvroute.serving.forcing import Board
from kvroute.serving.messages import Look, Looked, StepRequest
from kvroute.serving.pages import LayerPages
from kvroute.thinking import Layout
from kvroute_kernels import KVView

_log = logging.getLogger(__name__)

Gather = Callable[[Tensor], Tensor]
"""From this rank's ``[n]`` float32 to ``[ranks, n]``, in rank order."""
ViewOf = Callable[[Sequence[StepRequest], list[int], list[int]], KVView]
"""From requests, tokens that are written and the first that is read to a view."""
_UNREAD = "The cache holds values that are not finite."


@dataclass(slots=True)
class _Group:
    """Looks of one step that one head reads."""

    requests: list[StepRequest]
    looks: list[Look]
    chooser: Chooser
    head: DifficultyHead
    faults: list[str | None]


class Looker:
    """Takes a step's looks. Raises nothing.

    Args:
        catalog: the policies and their heads.
        pages: of all attention layers, this rank's heads.
        num_layers: attention layers of the model.
        view_of: the requests' pages as a view.
        board: takes what is forced.
        gather: over the ranks of the tensor-parallel group; None where there is one.
        replicas: consecutive ranks that hold the same heads.
    """

    def __init__(
        self,
        catalog: Catalog,
        pages: Sequence[LayerPages],
        num_layers: int,
        view_of: ViewOf,
        board: Board,
        gather: Gather | None = None,
        replicas: int = 1,
    ) -> None:
        self._catalog = catalog
        self._pages = {page.index: page for page in pages}
        self._num_layers = num_layers
        self._view_of = view_of
        self._board = board
        self._gather = gather
        self._replicas = replicas
        self._choosers: dict[tuple[str, bool], Chooser] = {}
        self._counted = 0

    def take(self, requests: Sequence[StepRequest]) -> dict[str, Looked]:
        """Take the looks of the requests that have one, and put on the board what they force."""
        due = [r for r in requests if r.look is not None]
        if not due:
            return {}
        began = time.perf_counter()
        found: dict[str, Looked] = {}
        groups: list[_Group] = []
        try:
            for members in _alike(due):
                try:
                    groups.append(self._group(members))
                except Exception as error:  # noqa: BLE001 - the same on every rank: no gather is missed
                    found |= self._fall_back(members, error)
            vectors = self._vectors(groups, [self._sums(group) for group in groups])
        except Exception as error:  # noqa: BLE001 - the engine must not see it
            return found | self._fall_back([r for r in due if r.id not in found], error)
        for group, rows in zip(groups, vectors, strict=True):
            try:
                found |= (self._choose if group.looks[0].mode is None else self._look_again)(group, rows, began)
            except Exception as error:  # noqa: BLE001 - the engine must not see it
                found |= self._fall_back(group.requests, error)
        return found

    def quiet_faults(self, looks: Mapping[str, Looked]) -> int:
        """Faults since the last call that none of the looks tells of: the head gave no probability, say."""
        counted = sum(chooser.counts["faults"] for chooser in self._choosers.values())
        new, self._counted = counted - self._counted, counted
        told = sum((found.decision.fault if found.decision else found.fault) is not None for found in looks.values())
        return max(new - told, 0)

    def _fall_back(self, requests: Sequence[StepRequest], error: Exception) -> dict[str, Looked]:
        """The policy's fallback for prompts that could not be decided; at a checkpoint the mode is kept."""
        _log.warning("kvroute could not decide on %s.", [r.id for r in requests], exc_info=error)
        fault = public_text(error)
        found = {}
        for request in requests:
            look = request.look
            assert look is not None
            found[request.id] = Looked(fault=fault)
            served = self._catalog.policies.get(look.policy)
            if look.mode is None and served is not None:
                policy = served.policy
                decision = Decision(policy.fallback, why="fault", policy=policy.kind, fault=fault)
                found[request.id] = self._decided(request.id, look, decision)
        return found

    def _decided(self, request: str, look: Look, decision: Decision) -> Looked:
        if not look.shadow:
            self._board.put(request, look.first, look.forced["fast" if decision.mode == "fast" else "slow"])
        return Looked(decision=decision)

    # ------------------------------------------------------------------ read

    def _group(self, requests: list[StepRequest]) -> _Group:
        looks = [r.look for r in requests if r.look is not None]
        first = looks[0]
        chooser = self._chooser(first.policy, first.shadow)
        head = chooser.head if first.mode is None or chooser.head is None else chooser.head.windows
        if head is None:
            raise InvalidInputError(f"The policy {first.policy!r} has no head for this look.")
        self._shapes(head.spec)  # raises for a head that does not fit the model
        return _Group(requests, looks, chooser, head, [None] * len(requests))

    def _chooser(self, name: str, shadow: bool) -> Chooser:
        key = (name, shadow)
        if key not in self._choosers:
            served = self._catalog.policy(name)
            policy = served.policy.model_copy(update={"shadow": True}) if shadow else served.policy
            self._choosers[key] = Chooser(policy, served.head, served.drift)
        return self._choosers[key]

    def _sums(self, group: _Group) -> Tensor:
        """Flat sums ``[R, n + 1]`` float32 of this rank's heads, the weight last; NaN where there are none."""
        rows = list(range(len(group.looks)))
        width = sum(int(np.prod(shape)) for shape in self._shapes(group.head.spec)) + 1
        device = next(iter(self._pages.values())).keys.device
        try:
            return self._read(group, rows)
        except Exception as error:  # noqa: BLE001 - this rank must take part in the gather
            if len(rows) == 1:
                self._note(group, 0, error)
                return torch.full((1, width), torch.nan, device=device)
        found = torch.full((len(rows), width), torch.nan, device=device)
        for row in rows:
            try:
                found[row] = self._read(group, [row])[0]
            except Exception as error:  # noqa: BLE001
                self._note(group, row, error)
        return found

    def _note(self, group: _Group, row: int, error: Exception) -> None:
        group.faults[row] = public_text(error)
        _log.warning("kvroute could not read the difficulty of %s.", group.requests[row].id, exc_info=error)

    def _read(self, group: _Group, rows: list[int]) -> Tensor:
        spec = group.head.spec
        requests, looks = [group.requests[i] for i in rows], [group.looks[i] for i in rows]
        stops = [look.stop for look in looks]
        starts = [token_range(spec, 0, stop)[0] for stop in stops]
        with torch.no_grad():
            sums = token_sums(
                self._view_of(requests, stops, starts),
                spec,
                num_layers=self._num_layers,
                stop=stops,
                sif_weights=[_sif(look, spec.sif_a, start) for look, start in zip(looks, starts, strict=True)]
                if spec.weights == "sif"
                else None,
            )
            parts = [x.flatten(1).float() for x in (sums.keys, sums.values) if x is not None]
            return torch.cat([*parts, sums.weight.float()[:, None].to(parts[0].device)], dim=1)

    def _shapes(self, spec: PoolingSpec) -> list[tuple[int, int, int]]:
        """``[layers, H, D]`` of the sums of keys, of values, as far as they are read; the same on every rank."""
        layers = spec.read_layers(self._num_layers)
        heads, key_size, value_size = self._pages[layers[0]].sizes
        sizes = {"k": key_size, "v": value_size}
        return [(len(layers), heads, sizes[part]) for part in "kv" if part in spec.part]

    def _vectors(self, groups: list[_Group], parts: list[Tensor]) -> list[Vectors]:
        """By group the pooled vectors ``[R, dim]`` over the heads of all ranks; not finite where a rank has none."""
        if not groups:
            return []
        flat = torch.cat([part.flatten() for part in parts])
        whole = flat[None] if self._gather is None else self._gather(flat)
        whole = whole[:: self._replicas].float().cpu()
        vectors, low = [], 0
        for group, part in zip(groups, parts, strict=True):
            by_rank = whole[:, low : low + part.numel()].view(len(whole), *part.shape)
            low += part.numel()
            sums: dict[str, Tensor] = {}
            place = 0
            spec = group.head.spec
            for letter, shape in zip((x for x in "kv" if x in spec.part), self._shapes(spec), strict=True):
                size = int(np.prod(shape))
                x = by_rank[:, :, place : place + size].reshape(len(whole), part.shape[0], *shape)
                place += size
                sums[letter] = torch.cat(list(x), dim=2)
            vectors.append(reduced(spec, sums.get("k"), sums.get("v"), by_rank[0, :, -1]).numpy())
        return vectors

    # ------------------------------------------------------------------ decide

    def _choose(self, group: _Group, vectors: Vectors, began: float) -> dict[str, Looked]:
        """Decide the modes, and force their tokens."""
        asked = [Request(Layout([], [], [])) for _ in group.requests]
        given = self._readable(group, vectors)
        group.chooser.choose(asked, given, faults=group.faults, explain=False, began=began)
        return {
            request.id: self._decided(request.id, look, one.decision)
            for request, look, one in zip(group.requests, group.looks, asked, strict=True)
        }

    def _look_again(self, group: _Group, vectors: Vectors, began: float) -> dict[str, Looked]:
        """A checkpoint: switch where the difficulty asks for it. A fault keeps the mode."""
        chooser, head = group.chooser, group.head
        given = self._readable(group, vectors)
        rows = [i for i, vector in enumerate(given) if vector is not None]
        stacked = [vector for vector in given if vector is not None]
        read, faults = chooser.each(
            "a checkpoint's features",
            len(rows),
            lambda some: finite(head.predict(np.stack([stacked[i] for i in some]))),
            then="the mode is kept",
        )
        by_row = dict(zip(rows, zip(read, faults, strict=True), strict=True))
        found = {}
        seconds = (time.perf_counter() - began) / len(group.requests)
        for i, (request, look) in enumerate(zip(group.requests, group.looks, strict=True)):
            difficulty, fault = by_row.get(i, (None, group.faults[i] or _UNREAD))
            found[request.id] = Looked(
                difficulty=None if difficulty is None else float(difficulty), fault=fault, seconds=seconds
            )
            if difficulty is None or look.shadow or look.mode is None:
                continue
            to = switch_at(chooser.policy, look.mode, float(difficulty))
            if to is not None and to[0] in look.forced:
                chooser.note_switch()
                self._board.put(request.id, look.first, look.forced[to[0]])
        return found

    @staticmethod
    def _readable(group: _Group, vectors: Vectors) -> list[Vectors | None]:
        good = [bool(np.isfinite(vector).all()) for vector in vectors]
        group.faults[:] = [f if f or fine else _UNREAD for f, fine in zip(group.faults, good, strict=True)]
        return [vector if fine else None for vector, fine in zip(vectors, good, strict=True)]


def _alike(requests: Sequence[StepRequest]) -> list[list[StepRequest]]:
    """Requests whose looks one head reads, in the order of the first of each."""
    groups: dict[tuple[str, bool, bool], list[StepRequest]] = {}
    for request in requests:
        if request.look is not None:
            look = request.look
            groups.setdefault((look.policy, look.shadow, look.mode is None), []).append(request)
    return list(groups.values())


def _sif(look: Look, a: float, start: int) -> Tensor:
    """SIF weights of the tokens up to ``stop``; those that are not read are zeros."""
    weights = look.weights[a]
    return torch.cat([torch.zeros(start), torch.from_numpy(np.asarray(weights, dtype=np.float32))])
