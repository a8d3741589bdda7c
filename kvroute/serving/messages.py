"""What travels from the scheduler to the workers and back, each step. Pickled, so small and without our classes' state.

All numbers that come back are *partial sums over KV heads or over tokens*, so that ranks of a tensor-parallel group
merge exactly: sums of keys and values are joined head after head in rank order; squared norms are added before any
root or angle is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvroute.decisions import Decision
from kvroute.thinking import Mode

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class Look:
    """A difficulty that is to be read, and what is forced by it, before the step's tokens are sampled.

    Attributes:
        policy: name of the policy.
        shadow: whether nothing is forced.
        stop: tokens from the prompt's start that are read.
        mode: at a checkpoint the mode that the request is in; None for a prompt's look, which decides the mode.
        first: place in the answer's tokens from which on tokens are forced.
        forced: the tokens, by the mode they enter; a mode that can't be entered is not in it.
        weights: by sif_a, SIF weights of the last tokens up to ``stop`` (all, or the head's window).
    """

    policy: str
    shadow: bool
    stop: int
    mode: Mode | None
    first: int
    forced: dict[Mode, list[int]]
    weights: dict[float, Array] = field(default_factory=dict)


@dataclass(slots=True)
class Looked:
    """What a look found.

    Attributes:
        decision: of a prompt's look; None at a checkpoint.
        difficulty: at a checkpoint, in [0, 100]; None where there is a fault.
        fault: why there is no difficulty at a checkpoint.
        seconds: spent on a checkpoint.
    """

    decision: Decision | None = None
    difficulty: float | None = None
    fault: str | None = None
    seconds: float = 0.0


@dataclass(slots=True)
class StepRequest:
    """What is to be read of one request when this step has run.

    Attributes:
        id: the engine's.
        prompt_len: tokens of its prompt.
        answer_start: first token that its answer's features read: behind the prompt and the mode's tokens.
        low, high: answer tokens ``low..high`` (positions from the prompt's start) are new; equal if there are none.
        prompt: the prompt is whole now: pool it.
        skip: by KV cache group, how many blocks are left out before ``blocks``.
        blocks: by KV cache group, block ids.
        ask: what it asks (``Ask.to_dict``), the first time.
        weights: by sif_a, SIF weights: of all tokens up to the prompt's end or ``high`` where ``prompt``, else of
            tokens ``low - w..high``, of which ``w = window`` leave.
        window: tokens before ``low`` that are still read, because they leave a windowed sum.
        look: a difficulty to read, or None.
        force: place in the answer's tokens and tokens that are forced from there on, or None.
    """

    id: str
    prompt_len: int
    answer_start: int
    low: int
    high: int
    prompt: bool
    skip: tuple[int, ...]
    blocks: tuple[list[int], ...]
    ask: dict[str, Any] | None = None
    weights: dict[float, Array] = field(default_factory=dict)
    window: int = 0
    look: Look | None = None
    force: tuple[int, list[int]] | None = None


@dataclass(slots=True)
class StepMeta:
    """A step.

    Attributes:
        requests: what to read when it has run.
        finished: whose state to drop, when ``rests`` are read.
        rests: what to read before it runs, of requests that ended in the step before or are preempted in this one:
            their pages are free, and may be written now.
    """

    requests: list[StepRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    rests: list[StepRequest] = field(default_factory=list)


@dataclass(slots=True)
class Sums:
    """Sums of one feature of R requests so far.

    Attributes:
        ids: R requests.
        keys: ``[R, n_layers, H, D]`` float32, or None.
        values: ``[R, n_layers, H, Dv]`` float32, or None.
        weight: ``[R]`` float64, sum of the weights.
    """

    ids: list[str]
    keys: Array | None
    values: Array | None
    weight: Array

    def join(self, other: Sums) -> Sums:
        """With the heads of the next rank behind ours."""
        return Sums(self.ids, _cat(self.keys, other.keys, 2), _cat(self.values, other.values, 2), self.weight)

    def extend(self, other: Sums) -> Sums:
        """With other requests behind ours."""
        keys, values = _cat(self.keys, other.keys, 0), _cat(self.values, other.values, 0)
        return Sums(self.ids + other.ids, keys, values, np.concatenate([self.weight, other.weight]))


@dataclass(slots=True)
class Norms:
    """Squared lengths of the chains of R requests, to which T tokens came.

    Attributes:
        ids: R requests.
        counts: ``[R]`` new tokens each.
        steps: ``[T, 2]`` float64, by new token the squared distance to the one before (0 for the first) and the
            squared norm, request after request.
        span: ``[R]`` float64, squared distance of the newest token from the first.
        layers: ``[R, L, 2]`` float64, the same by layer of the sum over tokens.
        layer_span: ``[R]`` float64, squared distance of the last layer from the first.
    """

    ids: list[str]
    counts: Array
    steps: Array
    span: Array
    layers: Array
    layer_span: Array

    def add(self, other: Norms) -> Norms:
        """Summed with another rank's heads."""
        return Norms(
            self.ids,
            self.counts,
            self.steps + other.steps,
            self.span + other.span,
            self.layers + other.layers,
            self.layer_span + other.layer_span,
        )

    def extend(self, other: Norms) -> Norms:
        """With other requests behind ours."""
        names = ("counts", "steps", "span", "layers", "layer_span")
        return Norms(
            self.ids + other.ids, *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        )


@dataclass(slots=True)
class StepResults:
    """What a worker read in a step.

    Attributes:
        sums: by feature key (see :func:`kvroute.serving.worker.feature_key`), answers and prompts.
        norms: of the chains, or None.
        looks: by request; every rank of a tensor-parallel group has the same.
        faults: by request, why it gets no features any more.
        read: by request, the token up to which its answer is in the sums and norms.
        lost: exceptions since the last results that no request can be named for.
        held: requests that the worker holds state for.
        seconds: time spent in our code.
        copy: this rank holds the same heads as the one before it, so its numbers are left out.
    """

    sums: dict[str, Sums] = field(default_factory=dict)
    norms: Norms | None = None
    looks: dict[str, Looked] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    held: int = 0
    seconds: float = 0.0
    copy: bool = False

    def extend(self, part: StepResults) -> None:
        """Add what the same worker read of other requests in the same step."""
        for key, sums in part.sums.items():
            have = self.sums.get(key)
            self.sums[key] = sums if have is None else have.extend(sums)
        if part.norms is not None:
            self.norms = part.norms if self.norms is None else self.norms.extend(part.norms)
        self.looks |= part.looks
        self.faults |= part.faults
        self.read |= part.read

    def merge(self, other: StepResults) -> StepResults:
        """This rank's with the next rank's. What only one of them has, is a fault of the requests it is about."""
        faults = {**other.faults, **self.faults}
        looks = {**other.looks, **self.looks}
        rest: dict[str, Any] = {
            "read": {k: min(n, other.read.get(k, n)) for k, n in {**other.read, **self.read}.items()},
            "lost": self.lost + other.lost,
            "held": max(self.held, other.held),
            "seconds": max(self.seconds, other.seconds),
        }
        if other.copy:
            return StepResults(self.sums, self.norms, looks, faults, **rest)
        sums: dict[str, Sums] = {}
        for key in self.sums.keys() | other.sums.keys():
            a, b = self.sums.get(key), other.sums.get(key)
            if a is not None and b is not None and a.ids == b.ids:
                sums[key] = a.join(b)
            else:
                faults = {**dict.fromkeys(_ids(a) + _ids(b), _APART), **faults}
        norms = None
        if self.norms is not None and other.norms is not None and self.norms.ids == other.norms.ids:
            norms = self.norms.add(other.norms)
        elif self.norms is not None or other.norms is not None:
            faults = {**dict.fromkeys(_ids(self.norms) + _ids(other.norms), _APART), **faults}
        return StepResults(sums, norms, looks, faults, **rest)


_APART = "The ranks of the tensor-parallel group read different things."


def _ids(part: Sums | Norms | None) -> list[str]:
    return [] if part is None else part.ids


def _cat(a: Array | None, b: Array | None, axis: int) -> Array | None:
    return None if a is None or b is None else np.concatenate([a, b], axis=axis)
