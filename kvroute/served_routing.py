"""Routing where the engine decides by itself: vLLM, in this process or elsewhere, under a policy that it has loaded.

The decision and the tokens come back with the answer. There the mode's tokens are tokens of the answer; here they are
taken off again, so that a :class:`~kvroute.Routed` is the same from every engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from kvroute.decisions import Decision, Routed, RoutedChunk
from kvroute.engines.text import TextStream
from kvroute.generation import CancelToken, FinishReason, Generation, Prompt, SamplingOptions, TokenIds, Usage
from kvroute.route_steering import Request
from kvroute.routed_answers import routed_answer, with_confidence
from kvroute.scores import Score
from kvroute.served_policy import MODES
from kvroute.serving.jobs import Decide
from kvroute.thinking import Mode

if TYPE_CHECKING:
    from kvroute.router import Router
    from kvroute.serving.vllm_base import VLLMBase

_SILENT: Final = "The engine said nothing of its decision."


# ---------------------------------------------------------------------- asking


@dataclass(frozen=True)
class Batch:
    """Requests as the engine gets them.

    Attributes:
        router: whose requests they are.
        requests: as the router knows them.
        prompts: their tokens; those of a mode stand in them where the engine can't put them there.
        decide: what it is to decide of each.
    """

    router: Router
    requests: list[Request]
    prompts: list[Prompt] = field(default_factory=list)
    decide: list[Decide | None] = field(default_factory=list)

    @classmethod
    def of(cls, router: Router, requests: list[Request]) -> Batch:
        """For a router's engine."""
        batch = cls(router, requests)
        served, thinking = router.served, router.thinking
        assert served is not None
        for request in requests:
            layout = request.layout
            fixed = request.forced or (None if served.name is not None else served.policy.kind)
            if fixed is not None and thinking.in_question:  # the engine can't, and need not: it stands in the prompt
                mode: Mode = "fast" if fixed == "fast" else "slow"
                batch.prompts.append(TokenIds((*layout.base, *layout.suffix(mode))))
                batch.decide.append(None if router.served_confidence is None else Decide())
                continue
            batch.prompts.append(TokenIds(tuple(layout.base)))
            if fixed is not None:
                mode = "fast" if fixed == "fast" else "slow"
                batch.decide.append(Decide(mode=mode, reserve=len(layout.suffix(mode))))
            else:
                longest = max(len(layout.fast), len(layout.slow))
                shadow = router.policy.shadow
                batch.decide.append(Decide(policy=served.name, shadow=shadow, reserve=longest))
        if router.served_confidence is not None:
            batch.decide[:] = [d and replace(d, confidence=router.served_confidence) for d in batch.decide]
        return batch

    def stands(self, index: int) -> bool:
        """Whether the mode's tokens of a request stand in its prompt, so that the engine decides nothing."""
        decide = self.decide[index]
        return decide is None or (decide.mode is None and decide.policy is None)

    def options(self, options: SamplingOptions) -> SamplingOptions:
        """As the engine gets them: a stop text that a mode's own tokens hold is looked for here alone."""
        thinking = self.router.thinking
        if any(stop in text for stop in options.stop for text in (thinking.fast, thinking.slow)):
            return options.model_copy(update={"stop": ()})
        return options

    def answer(self, index: int, generation: Generation, options: SamplingOptions) -> Routed:
        """What the engine wrote for a request, as its router gives it."""
        router, request = self.router, self.requests[index]
        decision = self._decision(index, generation)
        request.decision = decision
        request.mode = "fast" if decision.final_mode == "fast" else "slow"
        tail = Tail(router, request, options, behind=self.stands(index))
        for token in generation.token_ids:
            tail.push(token)
        tail.settle()
        stopped = tail.stopped  # before the rest of the text is there, as where an answer is written
        tail.finish()
        written = tail.tokens
        request.follow(written, router.closing)
        cut = len(tail.suffix) + len(written) < len(generation.token_ids)
        if cut:  # what was read behind the limit belongs to no answer
            limit = options.max_tokens
            decision.checkpoints = [c for c in decision.checkpoints if c[0] < limit]
            if decision.switch is not None and decision.switch.token >= limit:
                decision.switch = None
        reason: FinishReason = generation.finish_reason
        if stopped:
            reason = "stop"
        elif cut:
            reason = "length"
        sent = self.prompts[index]
        assert isinstance(sent, TokenIds)
        prompt, usage = [*sent.ids, *tail.suffix], generation.usage
        scores = dict(generation.scores)
        if "length" in scores:
            scores["length"] = Score(float(len(written)))
        with router._lock:
            router.counts[f"mode:{decision.mode}"] += 1
            router.counts["faults"] += decision.fault is not None
            router.counts["switches"] += decision.switch is not None and bool(decision.switch.forced)
        plain = replace(
            generation,
            text=tail.text,
            token_ids=written,
            prompt_token_ids=prompt,
            finish_reason=reason,
            usage=Usage(len(prompt), usage.cached, len(prompt) - usage.cached + max(len(written) - 1, 0), len(written)),
            scores=scores,
        )
        return routed_answer(router, request, plain)

    def _decision(self, index: int, generation: Generation) -> Decision:
        request, policy = self.requests[index], self.router.policy
        served = generation.served
        if served is not None and served.decision is not None:
            # A demanded mode is told as such; the policy's own mode, by its kind.
            decision = served.decision
            if request.forced is None and self.router.served is not None and self.router.served.name is None:
                decision.why = "policy"
            return decision
        fixed = request.forced or (policy.kind if policy.kind in MODES else None)
        if self.stands(index) and fixed is not None:
            return Decision(fixed, why="forced" if request.forced else "policy", policy=policy.kind)
        fault = _SILENT if served is None else served.error or " ".join(served.faults) or _SILENT
        if generation.finish_reason == "cancelled":
            fault = "The work was cancelled before it was decided."
        return Decision(self._shown(request, generation.token_ids), why="fault", policy=policy.kind, fault=fault)

    def _shown(self, request: Request, tokens: Sequence[int]) -> Mode:
        """The mode that an answer shows by its first tokens."""
        suffix = _suffix_of(request, tokens)
        if suffix and suffix == request.layout.slow:
            return "slow"
        return "fast" if suffix or not request.layout.fast else self.router.policy.fallback


def _suffix_of(request: Request, tokens: Sequence[int]) -> list[int]:
    """The longest of the modes' tokens that an answer begins with."""
    found = [s for s in (request.layout.fast, request.layout.slow) if list(tokens[: len(s)]) == s]
    return max(found, key=len, default=[])


class Tail:
    """An answer behind its mode's tokens, token by token.

    Args:
        router: whose engine writes it.
        request: whose answer it is.
        options: with the stop texts and the limit of the caller.
        behind: whether the mode's tokens stood in the prompt.

    Attributes:
        suffix: the mode's tokens, as soon as they are told from an answer.
        tokens: behind them, as far as the limit and a stop text go.
    """

    def __init__(self, router: Router, request: Request, options: SamplingOptions, *, behind: bool) -> None:
        self._request = request
        self._limit = options.max_tokens
        self._text = TextStream(router.engine.tokenizer, options.stop)
        self._held: list[int] = []
        self._known = behind
        self.suffix: list[int] = []
        self.tokens: list[int] = []

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text.text

    @property
    def stopped(self) -> bool:
        """Whether a stop text has ended it."""
        return self._text.stopped

    def push(self, token: int) -> list[tuple[int, str]]:
        """One more token of the engine's; returns those that are the answer's, each with the text it completes."""
        if self._known:
            return self._take([token])
        self._held.append(token)
        layout = self._request.layout
        if any(len(self._held) < len(s) and self._held == s[: len(self._held)] for s in (layout.fast, layout.slow)):
            return []
        return self._settle()

    def settle(self) -> list[tuple[int, str]]:
        """No token follows: those that are still held."""
        return [] if self._known else self._settle()

    def finish(self) -> str:
        """The answer has ended: the rest of the text."""
        return self._text.finish()

    def _settle(self) -> list[tuple[int, str]]:
        self._known = True
        self.suffix = _suffix_of(self._request, self._held)
        return self._take(self._held[len(self.suffix) :])

    def _take(self, tokens: Sequence[int]) -> list[tuple[int, str]]:
        taken = []
        for token in tokens:
            if len(self.tokens) >= self._limit or self._text.stopped:
                break
            self.tokens.append(token)
            taken.append((token, self._text.push(token)))
        return taken


# ---------------------------------------------------------------------- the router's calls


def served_answers(
    router: Router,
    requests: list[Request],
    options: SamplingOptions,
    *,
    features: Any,
    cancel: CancelToken | None,
    progress: bool | None,
) -> list[Routed]:
    """Answers that the engine decided about. Raises as the engine's ``generate``."""
    batch = Batch.of(router, requests)
    written = _engine(router).generate(
        batch.prompts,
        features=with_confidence(router, features),
        options=batch.options(options),
        decide=batch.decide,
        cancel=cancel,
        progress=progress,
    )
    return [batch.answer(i, generation, options) for i, generation in enumerate(written)]


def served_decisions(router: Router, requests: list[Request]) -> list[Decision]:
    """What the engine decides about prompts: one token is written for each, which vLLM can't do without."""
    return [decision for decision, _ in _decided(router, requests)]


def served_prefills(router: Router, requests: Sequence[Request]) -> list[tuple[Decision, Usage]]:
    """What the engine decides about prompts, and what that cost; their caches stay in the engine."""
    found = _decided(router, list(requests))
    return [(decision, Usage(u.prompt, u.cached, u.prompt - u.cached, 0)) for decision, u in found]


def _decided(router: Router, requests: list[Request]) -> list[tuple[Decision, Usage]]:
    batch = Batch.of(router, requests)
    decide = [None if d is None else replace(d, reserve=0, confidence=None) for d in batch.decide]
    written = _engine(router).generate(
        batch.prompts, options=SamplingOptions(max_tokens=1), decide=decide, progress=False
    )
    return [(batch._decision(i, generation), generation.usage) for i, generation in enumerate(written)]


def served_pieces(
    router: Router,
    requests: list[Request],
    options: SamplingOptions,
    *,
    features: Any,
    cancel: CancelToken | None,
) -> Iterator[RoutedChunk]:
    """Answers piece by piece. What the engine forced in mid-answer is not told apart before the end: no piece is
    marked ``forced``."""
    batch = Batch.of(router, requests)
    chunks = _engine(router).stream(
        batch.prompts,
        features=with_confidence(router, features),
        options=batch.options(options),
        decide=batch.decide,
        cancel=cancel,
    )
    return _pieces(batch, chunks, options)


def _pieces(batch: Batch, chunks: Iterator[Any], options: SamplingOptions) -> Iterator[RoutedChunk]:
    router, requests = batch.router, batch.requests
    tails = [Tail(router, r, options, behind=batch.stands(i)) for i, r in enumerate(requests)]
    phases = [_Phase(router, request) for request in requests]
    for chunk in chunks:
        i = chunk.index
        tail, phase = tails[i], phases[i]
        if chunk.token_id is not None:
            for token, text in tail.push(chunk.token_id):
                yield RoutedChunk(i, text, token, phase.of(token, tail))
        if chunk.generation is not None:
            for token, text in tail.settle():
                yield RoutedChunk(i, text, token, phase.of(token, tail))
            yield RoutedChunk(i, tail.finish(), None, phase.now, False, batch.answer(i, chunk.generation, options))


class _Phase:
    """Whether an answer's tokens belong to its thought."""

    def __init__(self, router: Router, request: Request) -> None:
        self._closing = router.closing
        self._enter = router.phrases["slow"]
        self._request = request
        self._seen: list[int] = []
        self._thinking: bool | None = None

    @property
    def now(self) -> Literal["thought", "answer"]:
        """Of the newest token."""
        return "thought" if self._thinking else "answer"

    def of(self, token: int, tail: Tail) -> Literal["thought", "answer"]:
        """Of one more token."""
        if self._thinking is None:
            slow = self._request.layout.slow
            self._thinking = self._closing.exists and tail.suffix == slow
        width = max(self._closing.width, len(self._enter))
        self._seen = [*self._seen, token][-width:]
        phase = self.now
        if self._thinking:
            if self._closing.ends(self._seen[-self._closing.width :]):
                self._thinking = False
        elif self._closing.exists and self._enter and self._seen[-len(self._enter) :] == self._enter:
            self._thinking, self._seen = True, []
        return phase


def _engine(router: Router) -> VLLMBase:
    engine: Any = router.engine
    found: VLLMBase = engine
    return found
