"""A decision that keeps its prefill: whatever answers the prompt on the same model goes on from that cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvroute.decisions import Decision
from kvroute.engines.prefix import Prefix
from kvroute.generation import SamplingOptions, TokenIds, Usage
from kvroute.served_routing import served_prefills

if TYPE_CHECKING:
    from kvroute.engines.steering import Vectors
    from kvroute.heads.head import DifficultyHead
    from kvroute.route_steering import Request
    from kvroute.router import Router


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A decided prompt.

    Attributes:
        decision: which mode, and why.
        usage: tokens that the decision cost; no token of an answer is kept. All 0 where nothing was run.
        prefix: the prompt's cache, which :meth:`kvroute.Router.generate` and the engine's calls take as ``prefix=``.
            None where nothing was run, where layers are recurrent, and over vLLM, which keeps its own.
    """

    decision: Decision
    usage: Usage
    prefix: Prefix | None = field(default=None, repr=False, compare=False)


def prefill(
    router: Router, requests: Sequence[Request], *, prefix: Prefix | None = None, keep: bool = True
) -> list[Prefilled]:
    """Decide requests in one run, and tell what it cost.

    Args:
        router: that decides.
        requests: their tokens, and modes that may be demanded.
        prefix: a cache that the prompts may continue, where theirs are kept.
        keep: go through all layers and keep the caches; else no layer is run above the deepest that the head reads.

    Raises:
        TextTooLongError, EmptyTextError, ModelMismatchError: before anything runs.
    """
    if router.served is not None:
        return [Prefilled(*found) for found in served_prefills(router, requests)]
    router.engine.check_lengths([r.layout.base for r in requests])
    began = time.perf_counter()
    head = router.head if router.policy.reads_difficulty else None
    read = [r for r in requests if r.forced is None] if head is not None else []
    unread = [r for r in requests if head is None or r.forced is not None]
    found: dict[int, Prefilled] = {}
    if unread:
        router.choose(unread, None, explain=False, began=began)
        found = {id(r): Prefilled(r.decision, Usage(len(r.layout.base), 0, 0, 0)) for r in unread}
    if read and head is not None:
        began = time.perf_counter()
        vectors, faults, left = _kept(router, head, read, prefix) if keep else _passed(router, head, read)
        router.choose(read, vectors, faults=faults, explain=False, began=began)
        found |= {id(r): Prefilled(r.decision, *rest) for r, rest in zip(read, left, strict=True)}
    return [found[id(r)] for r in requests]


_Left = list[tuple[Usage, Prefix | None]]


def head_vectors(
    router: Router, head: DifficultyHead, requests: Sequence[Request]
) -> tuple[list[Vectors | None], list[str | None]]:
    """A head's vectors of prompts whose caches are let go, and by prompt why there is none."""
    bases = [r.layout.base for r in requests]
    return router.each(
        "a prompt's features",
        len(bases),
        lambda rows: router.engine.pool([bases[i] for i in rows], [head.spec], progress=False)[0],
    )


def _passed(
    router: Router, head: DifficultyHead, requests: Sequence[Request]
) -> tuple[list[Vectors | None], list[str | None], _Left]:
    sizes = [len(r.layout.base) for r in requests]
    return *head_vectors(router, head, requests), [(Usage(size, 0, size, 0), None) for size in sizes]


def _kept(
    router: Router, head: DifficultyHead, requests: Sequence[Request], prefix: Prefix | None
) -> tuple[list[Vectors | None], list[str | None], _Left]:
    """The head's vectors of prompts whose caches are kept."""
    name = "difficulty"
    written = router.engine.generate(
        [TokenIds(tuple(r.layout.base)) for r in requests],
        features={name: head.spec},
        options=SamplingOptions(max_tokens=1),
        prefix=prefix,
        keep_cache=True,
        progress=False,
    )
    missing = "the prompt's vector is missing"
    faults = [None if name in w.features else w.feature_errors.get(name, missing) for w in written]
    left = [(Usage(w.usage.prompt, w.usage.cached, w.usage.computed, 0), w.prefix) for w in written]
    return [w.features.get(name) for w in written], faults, left
