"""A decision that keeps its prefill: whatever answers the prompt on the same model goes on from that cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvroute.decisions import Decision
from kvroute.engines.decoding import Prefix
from kvroute.generation import SamplingOptions, TokenIds, Usage
from kvroute.served_routing import served_prefill

if TYPE_CHECKING:
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


def prefill(router: Router, request: Request, prefix: Prefix | None) -> Prefilled:
    """Decide one request in a prefill that goes through all layers and is kept.

    Args:
        router: that decides.
        request: its tokens, and a mode that may be demanded.
        prefix: a cache that the prompt may continue.

    Raises:
        TextTooLongError, EmptyTextError, ModelMismatchError: before anything runs.
    """
    if router.served is not None:
        return Prefilled(*served_prefill(router, request))
    base, head = request.layout.base, router.head
    router.engine.check_lengths([base])
    began = time.perf_counter()
    if head is None or not router.policy.reads_difficulty or request.forced is not None:
        router.choose([request], None, explain=False, began=began)
        return Prefilled(request.decision, Usage(len(base), 0, 0, 0))
    name = "difficulty"
    [written] = router.engine.generate(
        [TokenIds(tuple(base))],
        features={name: head.spec},
        options=SamplingOptions(max_tokens=1),
        prefix=prefix,
        keep_cache=True,
        progress=False,
    )
    fault = None if name in written.features else written.feature_errors.get(name, "the prompt's vector is missing")
    router.choose([request], [written.features.get(name)], faults=[fault], explain=False, began=began)
    usage = written.usage
    return Prefilled(request.decision, Usage(usage.prompt, usage.cached, usage.computed, 0), written.prefix)
