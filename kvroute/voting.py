"""Self-consistency out of one prefill: n samples of an answer share the prompt's cache, and the answers read from them
vote, weighted by their confidence (arXiv 2203.11171; weights by the model's own confidence: arXiv 2502.06233).

The vote ends when it can't turn any more: a sample adds at most 1, so it is settled as soon as the leader is ahead by
more than the samples still running could add. The winner is then the one that all samples would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvroute.answer_reading import final_number
from kvroute.decisions import Decision, Routed
from kvroute.errors import InvalidInputError
from kvroute.generation import CancelToken, Prompt, SamplingOptions, TokenIds, Usage, as_prompts
from kvroute.route_steering import Request, RouteSteer, RouteSteering
from kvroute.routed_answers import routed_answer, target_answers, with_confidence

if TYPE_CHECKING:
    from kvroute.engines.steering import SteeredSession
    from kvroute.router import Router

Read = Callable[[str], str | None]
"""Answer text in, what it votes for out; None where nothing can be read."""

TEMPERATURE = 0.7
"""Where nothing is said: samples have to differ to vote."""
UNKNOWN = 0.5
"""Weight of an answer that the confidence head can't judge."""
_ROUNDING = 1e-9


def read_answer(text: str) -> str | None:
    """What an answer says: its final number, as the number checker reads it, in one spelling; else its stripped text.

    None for an answer without a word.
    """
    number = final_number(text)
    if number is not None:
        return f"{number.value}{'%' if number.percent else ''}"
    return text.strip() or None


# ---------------------------------------------------------------------- what comes back


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer of several.

    Attributes:
        routed: the answer.
        vote: what was read from it; None where nothing could be read, or it was stopped.
        weight: of its vote, in [0, 1]; its confidence, 1 where the router has no confidence head, 0.5 where the head
            could not judge it; 0 without a vote.
        stopped: whether it was ended because the vote was settled, or cancelled.
    """

    routed: Routed
    vote: str | None
    weight: float
    stopped: bool


@dataclass(frozen=True, slots=True)
class Voted:
    """What some samples of an answer agree on.

    Attributes:
        winner: the answer with the most weight; equal weights go by number of votes, then by the earliest sample. None
            where no vote could be read.
        best: the winner's most confident sample, or None.
        weights: summed weight by answer, highest first.
        votes: number of votes by answer, in the same order.
        majority: the winner if every vote counted alike, of the samples that finished.
        samples: in their order.
        settled: whether the vote could not turn any more before all samples had ended; the others were stopped.
        decision: which mode, and why; all samples share it, but each may have switched on its own.
        usage: summed over the samples. The prompt is in ``computed`` once and in ``cached`` for all others, but for
            the mode's own tokens, which every sample runs.
    """

    winner: str | None
    best: Routed | None
    weights: dict[str, float]
    votes: dict[str, int]
    majority: str | None
    samples: list[Sample]
    settled: bool
    decision: Decision
    usage: Usage

    @property
    def finished(self) -> int:
        """Samples that came to their end."""
        return sum(not s.stopped for s in self.samples)

    @property
    def stopped(self) -> int:
        """Samples that were ended early."""
        return len(self.samples) - self.finished

    @property
    def unreadable(self) -> int:
        """Samples that finished and from which no vote could be read."""
        return sum(s.vote is None and not s.stopped for s in self.samples)

    @property
    def agreement(self) -> float:
        """Share of the weight that the winner has, 0 to 1; 0 without a vote."""
        total = math.fsum(self.weights.values())
        return self.weights[self.winner] / total if self.winner is not None and total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without features."""
        return {
            "winner": self.winner,
            "agreement": self.agreement,
            "weights": self.weights,
            "votes": self.votes,
            "majority": self.majority,
            "settled": self.settled,
            "finished": self.finished,
            "stopped": self.stopped,
            "unreadable": self.unreadable,
            "decision": self.decision.to_dict(),
            "usage": asdict(self.usage),
            "samples": [
                {"vote": s.vote, "weight": s.weight, "stopped": s.stopped, **s.routed.to_dict()} for s in self.samples
            ],
        }


# ---------------------------------------------------------------------- counting


class Tally:
    """Votes as they come in.

    Args:
        n: how many there will be at most; each weighs at most 1.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.cast: dict[int, tuple[str | None, float]] = {}

    def add(self, index: int, vote: str | None, weight: float) -> None:
        """Count the vote of a sample; one without a vote adds nothing.

        Raises:
            InvalidInputError: a weight outside [0, 1].
        """
        if not 0 <= weight <= 1:
            raise InvalidInputError(f"A vote weighs 0 to 1, not {weight}.")
        self.cast[index] = vote, weight

    def ranking(self, *, weighted: bool = True) -> list[tuple[str, float, int]]:
        """Answer, weight and number of votes, the leader first. Independent of the order the votes came in."""
        weights: dict[str, list[float]] = {}
        for _, (vote, weight) in sorted(self.cast.items()):
            if vote is not None:
                weights.setdefault(vote, []).append(weight)
        rows = [(vote, math.fsum(w), len(w)) for vote, w in weights.items()]  # by earliest sample
        return sorted(rows, key=lambda row: (-row[1], -row[2]) if weighted else (-row[2],))

    @property
    def settled(self) -> bool:
        """Whether the samples that are missing can't change the leader, whatever they say."""
        rows = self.ranking()
        if not rows:
            return False
        second = rows[1][1] if len(rows) > 1 else 0.0
        return rows[0][1] - second > self.n - len(self.cast) + _ROUNDING


@dataclass(slots=True)
class _Poll:
    """One prompt's samples on their way."""

    prompt: Prompt
    requests: list[Request]
    tally: Tally
    early: bool
    decision: Decision | None = None
    found: dict[int, Sample] = field(default_factory=dict)
    usages: list[Usage] = field(default_factory=list)
    settled: bool = False  # while samples were still running

    @property
    def elsewhere(self) -> bool:
        return self.decision is not None and self.decision.mode not in ("fast", "slow")

    def add(self, index: int, routed: Routed, read: Read, weight: float) -> None:
        stopped = routed.generation.finish_reason == "cancelled"
        vote = None if stopped else read(routed.answer)
        if not stopped:
            self.tally.add(index, vote, weight)
            running = len(self.found) + 1 < len(self.requests)
            self.settled = self.settled or (self.early and running and self.tally.settled)
        self.found[index] = Sample(routed, vote, weight if vote is not None else 0.0, stopped)

    def result(self) -> Voted:
        rows = self.tally.ranking()
        winner = rows[0][0] if rows else None
        majority = self.tally.ranking(weighted=False)
        samples = [self.found[i] for i in sorted(self.found)]
        mine = [s for s in samples if winner is not None and s.vote == winner]
        return Voted(
            winner=winner,
            best=max(mine, key=lambda s: s.weight).routed if mine else None,
            weights={vote: weight for vote, weight, _ in rows},
            votes={vote: count for vote, _, count in rows},
            majority=majority[0][0] if majority else None,
            samples=samples,
            settled=self.settled and any(s.stopped for s in samples),
            decision=self.decision or self.requests[0].decision,
            usage=Usage(
                prompt=sum(u.prompt for u in self.usages),
                cached=sum(u.cached for u in self.usages),
                computed=sum(u.computed for u in self.usages),
                generated=sum(u.generated for u in self.usages),
            ),
        )


# ---------------------------------------------------------------------- steering


class _VoteSteer:
    """A :class:`~kvroute.engines.steering.Steer`: the router's, with one decision a prompt, and an end for what is
    settled."""

    def __init__(self, router: Router, polls: Sequence[_Poll], *, explain: bool) -> None:
        self.polls = [poll for poll in polls for _ in poll.requests]
        self.inner = RouteSteer(router, [r for poll in polls for r in poll.requests], explain=explain)

    @property
    def reserve(self) -> int:
        return self.inner.reserve

    def open(self, indices: Sequence[int]) -> _VoteSteering:
        return _VoteSteering(self.inner.open(indices), [self.polls[i] for i in indices])


class _VoteSteering:
    def __init__(self, inner: RouteSteering, polls: list[_Poll]) -> None:
        self.inner = inner
        self.polls = polls

    def begin(self, session: SteeredSession, rows: Sequence[int]) -> list[list[int]]:
        """Decide once a prompt; its other samples go the same way."""
        first = {id(self.polls[r]): r for r in reversed(rows) if self.polls[r].decision is None}
        suffixes: dict[int, list[int]] = {}
        if first:
            suffixes = dict(zip(first.values(), self.inner.begin(session, list(first.values())), strict=True))
        for r in suffixes:
            self.polls[r].decision = replace(self.inner.requests[r].decision, checkpoints=[])
        for r in rows:
            poll, request = self.polls[r], self.inner.requests[r]
            if r in suffixes or poll.decision is None:
                continue
            request.decision = replace(poll.decision, checkpoints=[], seconds=0.0)
            if poll.settled or poll.elsewhere:
                session.end([r])
                suffixes[r] = []
            else:
                request.mode = "fast" if poll.decision.mode == "fast" else "slow"
                suffixes[r] = request.layout.suffix(request.mode)
        return [suffixes[r] for r in rows]

    def after(self, session: SteeredSession, rows: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """End what is settled; the rest may switch."""
        session.end([r for r in rows if self.polls[r].settled])
        return self.inner.after(session, [r for r in rows if not self.polls[r].settled])


# ---------------------------------------------------------------------- the vote


def best_of(
    router: Router,
    prompts: Any,
    n: int = 5,
    *,
    read: Read = read_answer,
    weighted: bool = True,
    early: bool = True,
    mode: str | Sequence[str | None] | None = None,
    explain: bool = False,
    last: str | None = None,
    options: SamplingOptions | None = None,
    cancel: CancelToken | None = None,
    template: Mapping[str, Any] | None = None,
    prefix: Any = None,
    **sampling: Any,
) -> Voted | list[Voted]:
    """Answer n times out of one prefill, and vote.

    Args:
        router: decides once a prompt, for all its samples; in mid-answer each may switch on its own.
        prompts: a text, the messages of a chat, or a list of such.
        n: samples of each, at least 1.
        read: what an answer (without its thought) votes for; by default its final number, else its text.
        weighted: whether a vote weighs its answer's confidence, where the router has a confidence head; else 1.
        early: whether samples are stopped when the vote can't turn any more.
        mode, explain, last, cancel, template, prefix: as in :meth:`kvroute.Router.generate`.
        options, sampling: as in :meth:`kvroute.Router.generate`; the temperature is 0.7 where nothing sets one. With a
            seed, a prompt's samples do not depend on what is asked beside it.

    Returns:
        a :class:`Voted` for one prompt, a list in their order for many. Samples of a batch that does not fit the
        engine's token budget as a whole are prefilled once a batch; ``usage`` tells.

    Raises:
        InvalidInputError: n under 1, or several samples at temperature 0, which are all the same.
        As :meth:`kvroute.Router.generate` and, where memory runs out while answers are written, OutOfMemoryError.
    """
    listed, single = as_prompts(prompts)
    if n < 1:
        raise InvalidInputError(f"n={n} samples were asked for; at least 1 is needed.")
    given = router.options is not None and router.options.temperature > 0
    if options is None and not given:
        sampling.setdefault("temperature", TEMPERATURE)
    chosen = router._options(options, sampling)
    if n > 1 and chosen.temperature == 0:
        raise InvalidInputError(
            f"{n} samples at temperature 0 are the same answer {n} times.", hint="Set a temperature above 0."
        )
    asked = router._requests(listed, mode, last, template)
    polls = [
        _Poll(p, [r, *(Request(r.layout, forced=r.forced, last=r.last) for _ in range(n - 1))], Tally(n), early)
        for p, r in zip(listed, asked, strict=True)
    ]

    def weight(routed: Routed) -> float:
        if not weighted or router.confidence is None:
            return 1.0
        return UNKNOWN if routed.confidence is None else routed.confidence

    over = CancelToken(cancel)
    chunks = router.engine.stream(
        [TokenIds(tuple(poll.requests[0].layout.base)) for poll in polls for _ in range(n)],
        features=with_confidence(router, None),
        options=chosen,
        prefix=prefix,
        steer=_VoteSteer(router, polls, explain=explain),
        cancel=over,
    )
    for chunk in chunks:
        if chunk.generation is None:
            continue
        place, index = divmod(chunk.index, n)
        poll = polls[place]
        poll.usages.append(chunk.generation.usage)
        if poll.elsewhere:
            continue
        routed = routed_answer(router, poll.requests[index], chunk.generation)
        poll.add(index, routed, read, weight(routed))
        if all(p.settled or p.elsewhere or len(p.found) == n for p in polls):
            over.cancel()
    for poll in polls:
        if poll.elsewhere:
            found = target_answers(router, poll.requests[0], [poll.prompt] * n, chosen, cancel)
            for index, routed in enumerate(found):
                poll.usages.append(routed.usage)
                poll.add(index, routed, read, weight(routed))
    results = [poll.result() for poll in polls]
    return results[0] if single else results
