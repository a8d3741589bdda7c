"""An engine's pieces to a router's: which belong to the thought, which to the answer, and which were forced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from kvroute.decisions import RoutedChunk
from kvroute.generation import CancelToken, Prompt, SamplingOptions
from kvroute.route_steering import Request
from kvroute.routed_answers import routed_answer, target_answer

if TYPE_CHECKING:
    from kvroute.router import Router


def routed_pieces(
    router: Router,
    chunks: Iterator[Any],
    requests: list[Request],
    prompts: list[Prompt],
    options: SamplingOptions,
    cancel: CancelToken | None,
) -> Iterator[RoutedChunk]:
    """The pieces of some answers, as they come. Another target's answer is one piece.

    Args:
        router: whose targets, closing mark and confidence are used.
        chunks: the engine's.
        requests: by the index of their prompts; decided and switched by a :class:`~kvroute.route_steering.RouteSteer`.
        prompts: as the caller gave them.
        options: for other targets.
        cancel: for other targets.

    Raises:
        As :func:`~kvroute.routed_answers.target_answer`, where a prompt goes to another target.
    """
    closing = router.closing
    count = [0] * len(requests)
    tail: list[list[int]] = [[] for _ in requests]
    thinking: list[bool | None] = [None] * len(requests)
    for chunk in chunks:
        i, token = chunk.index, chunk.token_id
        request = requests[i]
        if request.decision.mode in router.targets:
            routed = target_answer(router, request, prompts[i], options, cancel)
            yield RoutedChunk(i, routed.text, None, "answer", False, routed)
            continue
        if thinking[i] is None:
            thinking[i] = request.decision.mode == "slow" and closing.exists
        switch = request.decision.switch
        forced = False
        if switch is not None and token is not None:
            forced = switch.token <= count[i] < switch.token + switch.forced
            if forced and count[i] == switch.token and switch.to == "slow":
                thinking[i], tail[i] = closing.exists, []
        phase: Literal["thought", "answer"] = "thought" if thinking[i] else "answer"
        if token is not None:
            count[i] += 1
            tail[i] = [*tail[i], token][-closing.width :]
            if thinking[i] and closing.ends(tail[i]):
                thinking[i] = False
        whole = None if chunk.generation is None else routed_answer(router, request, chunk.generation)
        yield RoutedChunk(i, chunk.text, token, phase, forced, whole)
