"""An answer that is being written, as events that a page can draw.

Every event is a JSON object with a ``type`` and the ``lane`` it belongs to: one lane an answer, side by side.

==============  ========================================================================================
``decision``    the mode, the prompt's difficulty, the threshold and why
``piece``       new text with its token's number, its phase (thought or answer) and its sentence; marks of a thought and
                forced tokens belong to none
``checkpoint``  a difficulty read in mid-answer, with the tokens written by then
``switch``      the change of mode in mid-answer
``sentence``    a sentence is whole: the confidence in the answer as far as it goes
``end``         the whole answer: tokens, confidence, why it ended
==============  =======================================================================================

Where the engine decides by itself (vLLM), decision, checkpoints and switch are known with the last piece, and so are
the sentences' confidences.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvroute.engines.base import decides_inside
from kvroute.errors import KVRouteError
from kvroute.generation import CancelToken, Generation, Prompt, SamplingOptions, TokenIds
from kvroute.heads.confidence import Confidence, vector_confidence
from kvroute.route_steering import RouteSteer
from kvroute.routed_answers import with_confidence
from kvroute.routed_stream import routed_pieces
from kvroute.router_parts import prompt_requests
from kvroute.self_evaluation import SelfEvaluator
from kvroute.ui.sentences import Sentences

if TYPE_CHECKING:
    from kvroute.decisions import Decision, Routed
    from kvroute.engines.base import Engine
    from kvroute.engines.steering import Steer, SteeredSession, Steering
    from kvroute.heads.head import DifficultyHead
    from kvroute.route_steering import Request
    from kvroute.router import Router

Event = dict[str, Any]
_NO_HEAD = "no confidence head was given"
_BY_NAME = "the server reads whole answers by its own head; give the head's folder for its sentences"


@dataclass(frozen=True, slots=True)
class _Piece:
    index: int
    text: str
    token: int | None
    phase: Literal["thought", "answer"]
    forced: bool = False
    generation: Generation | None = None
    routed: Routed | None = None


@dataclass(slots=True)
class _Lane:
    """What is known of one answer by now.

    Attributes:
        decision: kept up to date by the router; None until there is one.
        ids: tokens of the answer.
        ends: by sentence that is whole, how many tokens the answer had behind it.
        told: sentences whose confidence was told.
    """

    number: int
    decision: Decision | None = None
    sentences: Sentences = field(default_factory=lambda: Sentences())  # noqa: PLW0108 - a test cuts otherwise
    ids: list[int] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    decided: bool = False
    switched: bool = False
    looked: int = 0
    phase: str = ""

    def news(self, *, last: bool) -> Iterator[Event]:
        """What the decision says that was not told yet."""
        decision = self.decision
        if decision is None or not decision.mode:
            return
        if not self.decided:
            self.decided = True
            yield self.event("decision", **_facts(decision))
        for token, difficulty in decision.checkpoints[self.looked :]:
            yield self.event("checkpoint", token=token, difficulty=difficulty)
        self.looked = len(decision.checkpoints)
        switch = decision.switch
        if switch is not None and not self.switched and (last or len(self.ids) >= switch.token):
            self.switched = True
            yield self.event(
                "switch", to=switch.to, token=switch.token, difficulty=switch.difficulty, threshold=switch.threshold,
                forced=switch.forced, shadow=decision.why == "shadow",
            )  # fmt: skip

    def event(self, kind: str, **facts: Any) -> Event:
        """An event of this lane."""
        return {"type": kind, "lane": self.number, **facts}


class Watcher:
    """Streams answers as events.

    Args:
        engine: what writes them.
        router: decides how hard to think; without one the engine answers as it does.
        head: a trained confidence, for answers and their sentences.
    """

    def __init__(self, engine: Engine, router: Router | None, head: DifficultyHead | None = None) -> None:
        self.engine = engine
        self.router = router
        self.head = head
        self.evaluator = None if head is None else SelfEvaluator(engine, head=head, scores=())
        texts = () if router is None else (router.thinking.close, router.thinking.enter)
        self._marks = {text.strip() for text in texts if text and text.strip()}

    def watch(
        self,
        prompt: Prompt,
        options: SamplingOptions,
        *,
        modes: Sequence[str | None] = (None,),
        cancel: CancelToken | None = None,
    ) -> Iterator[Event]:
        """Answer a prompt, once for each mode, side by side.

        Args:
            prompt: a text, or the messages of a chat.
            options: how to write.
            modes: by lane ``fast``, ``slow`` or None where the policy decides; without a router one lane.
            cancel: ends the work from elsewhere.

        Raises:
            EmptyTextError, TextTooLongError, ChatTemplateError, InvalidInputError: before the first event.
            ServerError: of an engine that runs elsewhere.
        """
        began = time.perf_counter()
        if self.router is None:
            modes = (None,)
        lanes = [_Lane(i) for i in range(len(modes))]
        seen = _Seen()
        for piece in self._pieces(prompt, options, modes, lanes, seen, cancel):
            lane = lanes[piece.index]
            last = piece.generation is not None
            if piece.routed is not None:
                lane.decision = piece.routed.decision
            yield from lane.news(last=last)
            yield from self._written(lane, piece)
            if piece.token is not None:
                lane.ids.append(piece.token)
            if piece.generation is None:
                yield from self._live(lane, seen)
                continue
            yield from self._whole(lane, piece.generation, piece.routed, time.perf_counter() - began)

    # ------------------------------------------------------------------ pieces

    def _pieces(
        self,
        prompt: Prompt,
        options: SamplingOptions,
        modes: Sequence[str | None],
        lanes: Sequence[_Lane],
        seen: _Seen,
        cancel: CancelToken | None,
    ) -> Iterator[_Piece]:
        router, engine = self.router, self.engine
        prompts = [prompt] * len(modes)
        if router is None:
            features = None if self.evaluator is None else self.evaluator.features
            steer = {} if decides_inside(engine) else {"steer": _WatchedSteer(None, seen)}
            for chunk in engine.stream(prompts, features=features, options=options, cancel=cancel, **steer):
                yield _Piece(chunk.index, chunk.text, chunk.token_id, "answer", False, chunk.generation)
            return
        if router.served is not None:
            pieces = router.stream(prompts, mode=modes, options=options, cancel=cancel)
        else:
            # As Router.stream does, with a steer that lets the cache be read and the decision be seen on the way.
            requests = prompt_requests(router, prompts, modes, None, None)
            chunks = router.engine.stream(
                [TokenIds(tuple(r.layout.base)) for r in requests],
                features=with_confidence(router, None),
                options=options,
                steer=_WatchedSteer(RouteSteer(router, requests), seen),
                cancel=cancel,
            )
            pieces = routed_pieces(router, chunks, requests, prompts, options, cancel)
            seen.requests = requests
        for piece in pieces:
            if seen.requests:
                lanes[piece.index].decision = seen.requests[piece.index].decision
            generation = None if piece.routed is None else piece.routed.generation
            yield _Piece(piece.index, piece.text, piece.token_id, piece.phase, piece.forced, generation, piece.routed)

    def _written(self, lane: _Lane, piece: _Piece) -> Iterator[Event]:
        if piece.text or piece.token is not None:
            number = lane.sentences.number
            mark = piece.forced or piece.text.strip() in self._marks
            ended = (mark or piece.phase != lane.phase) and lane.sentences.close()
            if not mark:
                ended = lane.sentences.push(piece.text) or ended
            if ended:
                lane.ends[number] = len(lane.ids)
            lane.phase = piece.phase
            token = None if piece.token is None else len(lane.ids)
            yield lane.event(
                "piece", text=piece.text, token=token, phase=piece.phase, forced=piece.forced,
                sentence=None if mark else lane.sentences.number,
            )  # fmt: skip

    # ------------------------------------------------------------------ confidences

    def _live(self, lane: _Lane, seen: _Seen) -> Iterator[Event]:
        """Sentences that are whole, read from the cache that is writing the answer."""
        place = seen.places.get(lane.number)
        if self.head is None or place is None:
            return
        for sentence, count in lane.ends.items():
            start = place.start
            if sentence in lane.told or count < 1 or place.session.held(place.row) < start + count:
                continue  # forced tokens are run one a step: it is read a little later
            lane.told.add(sentence)
            yield lane.event("sentence", sentence=sentence, **_confidence(self._read(place, count)))

    def _read(self, place: _Place, count: int) -> Confidence:
        head = self.head
        assert head is not None
        try:
            with torch.inference_mode():
                vectors = place.session.pooled(
                    [place.row], head.spec, start=[place.start], stop=[place.start + count]
                )  # fmt: skip
        except KVRouteError as error:
            return None, str(error)
        return vector_confidence(head, vectors[0])

    def _whole(self, lane: _Lane, written: Generation, routed: Routed | None, seconds: float) -> Iterator[Event]:
        confidence = self._of_answer(written, routed)
        missing = {s: n for s, n in lane.ends.items() if s not in lane.told}
        for sentence, found in self._afterwards(written, missing).items():
            yield lane.event("sentence", sentence=sentence, **_confidence(found))
        yield lane.event("sentence", sentence=lane.sentences.number, **_confidence(confidence))
        mode = None if routed is None else routed.decision.final_mode
        yield lane.event(
            "end", tokens=written.usage.generated, prompt_tokens=written.usage.prompt, computed=written.usage.computed,
            finish_reason=written.finish_reason, seconds=seconds, mode=mode,
            fault=None if routed is None else routed.decision.fault,
            answer=written.text.strip() if routed is None else routed.answer, **_confidence(confidence),
        )  # fmt: skip

    def _of_answer(self, written: Generation, routed: Routed | None) -> Confidence:
        if routed is not None:
            return routed.confidence, routed.confidence_reason
        return (None, _NO_HEAD) if self.evaluator is None else self.evaluator.confidence(written)

    def _afterwards(self, written: Generation, ends: Mapping[int, int]) -> dict[int, Confidence]:
        """Sentences whose vectors could not be read on the way: the answer is read once more, as far as they go."""
        if not ends:
            return {}
        if self.evaluator is None:
            by_name = self.router is not None and self.router.served_confidence is not None
            return dict.fromkeys(ends, (None, _BY_NAME if by_name else _NO_HEAD))
        readable = {s: n for s, n in ends.items() if 1 <= n < len(written.token_ids)}
        prompt = TokenIds(tuple(written.prompt_token_ids))
        # A reading leaves the last token out, as it has no keys and values while an answer is written.
        rows = [(prompt, written.token_ids[: n + 1]) for n in readable.values()]
        try:
            read = self.evaluator.score_many(rows, finish_reason="length", progress=False) if rows else []
        except KVRouteError as error:
            return dict.fromkeys(ends, (None, str(error)))
        found: dict[int, Confidence] = {
            s: (e.confidence, e.confidence_reason) for s, e in zip(readable, read, strict=True)
        }
        return {s: found.get(s, (None, "it has no token of its own")) for s in ends}


def _facts(decision: Decision) -> Event:
    return {
        "mode": decision.mode,
        "difficulty": decision.difficulty,
        "threshold": decision.threshold,
        "probability": decision.probability,
        "why": decision.why,
        "policy": decision.policy,
        "proposed": decision.proposed,
        "fault": decision.fault,
    }


def _confidence(found: Confidence) -> Event:
    return {"confidence": found[0], "reason": found[1]}


# ---------------------------------------------------------------------- seeing the cache on the way


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an answer is being written: the session, its row there, and the first token behind its prompt."""

    session: SteeredSession
    row: int
    start: int


@dataclass(slots=True)
class _Seen:
    """What a watched steer has seen: by prompt the place of its answer; and the requests that are decided."""

    places: dict[int, _Place] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)


class _WatchedSteer:
    """A steer that lets another one steer, and notes where its answers are written."""

    def __init__(self, steer: Steer | None, seen: _Seen) -> None:
        self._steer, self._seen = steer, seen

    @property
    def reserve(self) -> int:
        return 0 if self._steer is None else self._steer.reserve

    def open(self, indices: Sequence[int]) -> _Watched:
        return _Watched(None if self._steer is None else self._steer.open(indices), self._seen, list(indices))


class _Watched:
    def __init__(self, steering: Steering | None, seen: _Seen, indices: list[int]) -> None:
        self._steering, self._seen, self._indices = steering, seen, indices

    def begin(self, session: SteeredSession, rows: Sequence[int]) -> list[list[int]]:
        prompts = [session.held(row) for row in rows]
        suffixes: list[list[int]] = [[] for _ in rows]
        if self._steering is not None:
            suffixes = self._steering.begin(session, rows)
        for row, held, suffix in zip(rows, prompts, suffixes, strict=True):
            self._seen.places[self._indices[row]] = _Place(session, row, held + len(suffix))
        return suffixes

    def after(self, session: SteeredSession, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
        return {} if self._steering is None else self._steering.after(session, rows)
