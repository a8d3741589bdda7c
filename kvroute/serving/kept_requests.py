"""What the scheduler's side keeps of a request: what it asks, how far it was read, and what the workers gave of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvroute.features import FeaturePlan, Of
from kvroute.heads.head import DifficultyHead
from kvroute.pooling import PoolingSpec
from kvroute.serving.deciding import Decided
from kvroute.serving.messages import Array, StepRequest, StepResults
from kvroute.serving.token_runs import window_of

BlockIds = Sequence[Sequence[int]]
"""By KV cache group, a request's block ids."""


@dataclass(slots=True)
class KeptRequest:
    """What is known of a running request; ``given`` tokens behind its prompt are an answer that came with it."""

    prompt_len: int
    plan: FeaturePlan | None
    tokens: Sequence[int]
    body: dict[str, Any] | None = None
    error: str | None = None
    refused: str | None = None  # why it decides nothing, where something else is asked of it
    given: int = 0
    vectors: dict[str, tuple[Of, PoolingSpec]] = field(default_factory=dict)
    of: frozenset[Of] = frozenset()  # what the vectors are of
    window: int = 0  # tokens behind an answer's newest that windowed sums need
    decided: Decided | None = None
    confidence: DifficultyHead | None = None
    sent: bool = False
    seen: bool = False
    pooled: bool = False
    fed: int = 0
    read: int = 0
    aborted: bool = False
    late: bool = False  # its client can wait for a result until the next step
    last: int = 2**31  # tokens with keys and values when its answer is as long as it may become
    stop: int = 0  # tokens with keys and values, as far as was scheduled
    blocks: BlockIds = ()  # that hold them, where a rest may have to be read when they are taken away
    gone: bool = False  # its pages, before they were read to the end
    sums: dict[str, tuple[Array | None, Array | None, float]] = field(default_factory=dict)
    steps: list[Array] = field(default_factory=list)
    ends: tuple[float, Array, float] | None = None

    def wants(self, vectors: dict[str, tuple[Of, PoolingSpec]]) -> None:
        """Take the vectors that are asked for: what every step has to know of them is found out once."""
        self.vectors = vectors
        self.of = frozenset(of for of, _ in vectors.values())
        self.window = max((window_of(s) or 0 for of, s in vectors.values() if of == "answer"), default=0)

    @property
    def reads_answer(self) -> bool:
        """Whether anything that is asked for is read from its answer."""
        return "answer" in self.of or (self.plan is not None and self.plan.chain is not None)

    @property
    def under_way(self) -> bool:
        """Whether workers were told to read tokens of its answer that they have not yet told of."""
        return self.late and self.error is None and self.read < self.fed

    @property
    def answer_start(self) -> int | None:
        """First token that its answer's features read; None while a mode's tokens may come before it."""
        return self.prompt_len if self.decided is None else self.decided.answer_start


@dataclass(slots=True)
class Closing:
    """A request that ended: what is known of it, its result, tokens of its answer, and its blocks while they last.

    ``rest`` is what the workers still have to read of it before the next step; ``sent`` that they were told to.
    """

    state: KeptRequest
    box: dict[str, Any]
    answer: int
    blocks: BlockIds
    rest: StepRequest | None = None
    sent: bool = False


def take_numbers(results: StepResults, find: Callable[[str], KeptRequest | None]) -> None:
    """Put the sums and chains that workers read into what is kept of the requests that ``find`` finds."""
    for key, sums in results.sums.items():
        for i, request in enumerate(sums.ids):
            state = find(request)
            if state is not None:
                state.sums[key] = (
                    None if sums.keys is None else sums.keys[i],
                    None if sums.values is None else sums.values[i],
                    float(sums.weight[i]),
                )
    if results.norms is not None:
        norms, low = results.norms, 0
        for i, (request, high) in enumerate(zip(norms.ids, np.cumsum(norms.counts).tolist(), strict=True)):
            state = find(request)
            if state is not None:
                state.steps.append(norms.steps[low:high])
                state.ends = (float(norms.span[i]), norms.layers[i], float(norms.layer_span[i]))
            low = high
    for request, stop in results.read.items():
        state = find(request)
        if state is not None:
            state.read = max(state.read, stop)
