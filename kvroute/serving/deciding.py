"""Decisions on the scheduler's side: it knows all tokens, so it says when to look, and what came of it.

The worker reads the difficulty and forces what it asks for in the same step (:mod:`kvroute.serving.looking`); what was
decided is told here. On a server the mode's tokens are tokens of the answer: they are in its text, as a client of a
thinking model knows it, and count in ``max_tokens``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from kvroute.choosing import Chooser
from kvroute.decisions import Decision
from kvroute.errors import AskError, KVRouteError, UnsupportedModelError
from kvroute.policy import Policy
from kvroute.pooling import PoolingSpec, token_range
from kvroute.route_steering import Request, fits
from kvroute.serving.answers import public_text
from kvroute.serving.asks import Ask
from kvroute.serving.catalog import ServedPolicy
from kvroute.serving.config import ServingConfig
from kvroute.serving.messages import Array, Look, Looked
from kvroute.serving.thinking_tokens import ThinkingTokens
from kvroute.thinking import Mode

SifWeights = Callable[[Sequence[int], float], Array]
"""SIF weights of tokens, by their ids and sif_a."""
NOT_FORCED = (
    "The mode's tokens do not stand in the answer: the logits processor of kvroute is not loaded, or was overruled."
)
_CUT_OFF = "The request ended before it was decided."


@dataclass(slots=True)
class Decided:
    """One request that decides, from its prompt to its end.

    Attributes:
        request: its tokens and decision.
        policy: what is done with a difficulty; a demanded mode has one of that kind.
        served: the policy with its head; None for a demanded mode.
        name: the policy's.
        prompt_len: tokens of its prompt as it was sent.
        limit: most tokens the answer may have.
        thinking: the model's tokens.
        opened: whether the prompt opened a thought itself.
        known: whether the mode is decided (in shadow: shown by the answer).
        suffix: tokens of the mode at the answer's beginning, as far as known.
    """

    request: Request
    policy: Policy
    served: ServedPolicy | None
    name: str
    prompt_len: int
    limit: int
    thinking: ThinkingTokens
    opened: bool
    known: bool = False
    suffix: list[int] = field(default_factory=list)
    _sent: bool = False  # the first look or the fixed mode's tokens are on their way
    _written: int = 0  # at the checkpoint that is on its way

    @property
    def answer_start(self) -> int | None:
        """First token that the answer's features read; None while it is not known."""
        if self.policy.shadow:
            return self.prompt_len
        return self.prompt_len + len(self.suffix) if self.known else None

    # ------------------------------------------------------------------ each step

    def due(
        self, tokens: Sequence[int], stop: int, sif: SifWeights
    ) -> tuple[Look | None, tuple[int, list[int]] | None]:
        """What is to be done behind a step.

        Args:
            tokens: all of the request, prompt first.
            stop: tokens that have keys and values when the step has run.
            sif: weights of tokens.

        Returns:
            a look, and tokens to be forced from a place of the answer on.
        """
        if stop < self.prompt_len:
            return None, None
        if not self._sent:
            self._sent = True
            if self.request.decision.mode:  # known without a look
                return None, ((0, self.suffix) if self.suffix else None)
            base, layout = len(self.request.layout.base), self.request.layout
            forced: dict[Mode, list[int]] = {"fast": layout.fast, "slow": layout.slow}
            return self._look(tokens, base, None, 0, {} if self.policy.shadow else forced, sif), None
        return self._checkpoint(tokens, stop, sif), None

    def _checkpoint(self, tokens: Sequence[int], stop: int, sif: SifWeights) -> Look | None:
        """The look that the newest token's step takes, of all tokens before it, as an engine of one's own does."""
        request, policy = self.request, self.policy
        if policy.kind != "two-step" or not request.decision.mode:
            return None
        newest = stop == len(tokens)
        if policy.shadow and not self.known and not (newest and self._see(tokens)):
            return None
        held = stop - self.prompt_len - len(self.suffix) - 1
        if held < 0 or not request.is_checkpoint(held, policy.every) or not newest or not request.may_switch():
            return None
        behind = _Behind(tokens, self.prompt_len + len(self.suffix))
        request.follow(behind, self.thinking.mark)
        if not request.may_switch():
            return None
        request.looked = held // policy.every
        self._written = len(behind)
        to: Mode = "fast" if request.mode == "slow" else "slow"
        phrase = self.thinking.phrases[to]
        first = len(self.suffix) + self._written
        forced = {to: phrase} if not policy.shadow and fits(phrase, self.limit - first) else {}
        return self._look(tokens, stop - 1, request.mode, first, forced, sif)

    def _look(
        self,
        tokens: Sequence[int],
        stop: int,
        mode: Mode | None,
        first: int,
        forced: dict[Mode, list[int]],
        sif: SifWeights,
    ) -> Look:
        assert self.served is not None
        head = self.served.head
        spec = None if head is None else head.spec if mode is None or head.windows is None else head.windows.spec
        weights = {}
        if spec is not None and spec.weights == "sif":
            weights[spec.sif_a] = sif(tokens[first_read(spec, stop) : stop], spec.sif_a)
        return Look(self.name, self.policy.shadow, stop, mode, first, forced, weights)

    def _see(self, tokens: Sequence[int]) -> bool:
        """In shadow: whether the answer shows by now which mode it took."""
        found = self.thinking.shown(_Behind(tokens, self.prompt_len), self.opened)
        if found is not None:
            self.request.mode, size = found
            self.suffix = self.thinking.suffixes[self.request.mode] if size else []
            self.known = True
        return found is not None

    def took(self, looked: Looked) -> str | None:
        """What a look found. Returns its fault, or None."""
        request = self.request
        if looked.decision is not None:
            self._decide(looked.decision)
        elif not request.decision.mode:
            self._decide(
                Decision(self.policy.fallback, why="fault", policy=self.policy.kind, fault=looked.fault or _CUT_OFF),
                forced=False,
            )
        else:
            request.decision.fault = looked.fault
            request.decision.seconds += looked.seconds
            if looked.difficulty is not None:
                room = self.limit - len(self.suffix) - self._written
                request.observe(self.policy, self._written, looked.difficulty, self.thinking.phrases, room)
        return request.decision.fault

    def _decide(self, decision: Decision, *, forced: bool = True) -> None:
        request = self.request
        request.decision = decision
        if self.policy.shadow:
            return
        request.mode = "fast" if decision.mode == "fast" else "slow"
        self.suffix = request.layout.suffix(request.mode) if forced else []
        self.known = True

    # ------------------------------------------------------------------ the end

    def end(self, tokens: Sequence[int], length: int) -> tuple[Decision, int | None]:
        """The decision, and the tokens of the thought; None where nothing marks its end.

        Args:
            tokens: all of the request.
            length: those of them that are the answer's.
        """
        request = self.request
        if not request.decision.mode:
            fault = Decision(self.policy.fallback, why="fault", policy=self.policy.kind, fault=_CUT_OFF)
            request.decision = fault
        decision = request.decision
        answer = list(tokens[self.prompt_len : self.prompt_len + length])
        if self.policy.shadow:
            if not self.known and not self._see(tokens):
                self.request.mode = "fast"
            decision.mode = request.mode
        else:
            self._check(decision, answer)
        return decision, self._thought(answer)

    def _check(self, decision: Decision, answer: list[int]) -> None:
        """Whether what was to be forced stands in the answer, as far as that goes."""
        places = [(0, self.suffix)]
        switch = decision.switch
        if switch is not None and switch.forced:
            places.append((len(self.suffix) + switch.token, self.thinking.phrases[switch.to]))
        for first, wanted in places:
            there = answer[first : first + len(wanted)]
            if there != wanted[: len(there)]:
                decision.fault = decision.fault or NOT_FORCED

    def _thought(self, answer: list[int]) -> int | None:
        mark, switch = self.thinking.mark, self.request.decision.switch
        if not mark.exists:
            return None
        begin = 0
        if switch is not None and switch.forced and switch.to == "slow":
            begin = len(self.suffix) + switch.token
        elif self.request.decision.mode != "slow":
            return 0
        found = mark.find(answer[begin:])
        return max(len(answer) - begin, 0) if found is None else found


class Decisions:
    """Makes a :class:`Decided` of each request that asks for one.

    Args:
        config: the server's policies.
        thinking: gives the model's tokens, at the first use.
        longest: most tokens that prompt and answer may have together.
        runs_ahead: whether the engine schedules a step before it has the tokens of the last.
    """

    def __init__(
        self,
        config: ServingConfig,
        thinking: Callable[[], ThinkingTokens] | None,
        *,
        longest: int = 2**31,
        runs_ahead: bool = False,
    ) -> None:
        self._config = config
        self._make = thinking
        self._longest = longest
        self._runs_ahead = runs_ahead
        self._thinking: ThinkingTokens | None = None
        self._off: str | None = None
        self._choosers: dict[tuple[str, bool], Chooser] = {}

    def of(self, ask: Ask, tokens: Sequence[int], prompt_len: int, limit: int, *, structured: bool) -> Decided | None:
        """What an ask decides, or None where it asks for no decision.

        Args:
            ask: the request's.
            tokens: of the request, its prompt first.
            prompt_len: tokens of its prompt.
            limit: most tokens of the answer.
            structured: whether a grammar constrains it.

        Raises:
            AskError: this server can't decide it.
        """
        if ask.policy is None and ask.mode is None:
            return None
        thinking = self._tokens()
        served, policy, name = None, Policy(kind=ask.mode or "slow"), str(ask.mode)
        if ask.policy is not None:
            served, name = self._config.catalog.policy(ask.policy), ask.policy
            policy = served.policy.model_copy(update={"shadow": True}) if ask.shadow else served.policy
        if ask.mode is not None:
            policy = policy.model_copy(update={"shadow": False})
        if policy.kind == "two-step" and self._runs_ahead and ask.mode is None:
            raise AskError(
                "A two-step policy looks at what was written, and this engine schedules ahead of that.",
                hint="Start the server with --no-async-scheduling, or take a one-step policy.",
            )
        if structured and not policy.shadow:
            raise AskError(
                "A grammar constrains this answer, and a mode's tokens would break it.",
                hint="Drop the structured output, or 'policy' and 'mode'.",
            )
        prompt = tokens[:prompt_len]
        if len(prompt) < prompt_len:
            raise AskError("The prompt came as embeddings, and a mode's tokens are told by its tokens.")
        layout, given = thinking.layout(prompt)
        opened = not layout.slow and given is None and bool(thinking.suffixes["slow"])
        request = Request(layout, forced=given or ask.mode)
        limit = min(limit, self._longest - prompt_len)
        decided = Decided(request, policy, served, name, prompt_len, limit, thinking, opened)
        if given is not None and ask.mode not in (None, given):
            decided._decide(
                Decision(given, why="fault", policy=policy.kind, fault="The prompt sets the other mode itself.")
            )
        elif request.forced is not None or not policy.reads_difficulty:
            began = time.perf_counter()
            self._chooser(name, policy).choose([request], None, explain=False, began=began)
            decided._decide(request.decision)
        return decided

    def _chooser(self, name: str, policy: Policy) -> Chooser:
        """For what no head has to be read for."""
        key = (name, policy.shadow)
        if key not in self._choosers or self._choosers[key].policy != policy:
            self._choosers[key] = Chooser(policy, None, None)
        return self._choosers[key]

    def _tokens(self) -> ThinkingTokens:
        if self._off is None and self._thinking is None:
            try:
                if self._make is None:
                    raise UnsupportedModelError("This server has no tokenizer.")
                self._thinking = self._make()
            except Exception as error:
                self._off = public_text(error)
                if not isinstance(error, KVRouteError):
                    raise
        if self._thinking is None:
            raise AskError(f"This server does not decide how to think: {self._off}")
        return self._thinking


def first_read(spec: PoolingSpec, stop: int) -> int:
    """First token that a look up to ``stop`` reads."""
    return token_range(spec, 0, stop)[0]


class _Behind(Sequence[int]):
    """The tokens behind a place, without a copy of them all."""

    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self._tokens, self._start = tokens, start

    def __len__(self) -> int:
        return max(len(self._tokens) - self._start, 0)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            low, high, step = place.indices(len(self))
            return list(self._tokens[self._start + low : self._start + high])[::step]
        return self._tokens[self._start + range(len(self))[place]]

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])
