"""The router: reads a prompt's difficulty from its KV cache, thinks or does not, and may switch once on the way."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, cast, get_args, overload

import numpy as np

from kvroute.decisions import Decision, Routed, RoutedChunk
from kvroute.engines.threads import in_thread
from kvroute.errors import InvalidInputError
from kvroute.features import AnswerPooling, named_features
from kvroute.generation import CancelToken, Generation, Message, Prompt, SamplingOptions, TokenIds, as_prompts
from kvroute.heads.head import DifficultyHead
from kvroute.policy import Policy, PolicyKind, policy_path
from kvroute.route_steering import ClosingMark, Request, RouteSteer, fault_text, finite
from kvroute.thinking import Mode, ThinkingMode

if TYPE_CHECKING:
    from kvroute.drift import DriftHealth, DriftMonitor
    from kvroute.engines.transformers_engine import TransformersEngine
    from kvroute.heads.neighbours import Neighbour
    from kvroute.voting import Voted

logger = logging.getLogger(__name__)

_CONFIDENCE = "kvroute:confidence"
Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Answering(Protocol):
    """What another target must offer: an engine or a router."""

    def generate(self, prompts: Any, **kwargs: Any) -> Any:
        """Answer one prompt."""
        ...


class Router:
    """Decides for each request how hard to think, from the forward pass that happens anyway.

    The prompt's K and V give the difficulty before the first token; the mode's tokens follow in the same cache. With a
    two-step policy the difficulty is taken again at checkpoints, and the mode may change once, in flight (DESIGN
    section 3; arXiv 2601.20326, section 4.2). Thread-safe.

    Args:
        engine: the model.
        policy: what is done with a difficulty; a :class:`~kvroute.Policy`, one of its kinds by name, the path of its
            ``.json`` file, or its name in the folder ``KVROUTE_POLICIES``.
        head: the trained head; by default the one that the policy's file names.
        thinking: how the model thinks; by default read from its chat template.
        targets: further models by the names that the policy's ``targets`` use; each a router or an engine. A prompt
            that goes to one of them costs its prefill here and is answered there.
        confidence: a head trained with ``target="correct"``: every answer then carries its confidence.
        drift: watches whether live requests look like the calibration rows; by default the policy file's.
        options: how answers are written, where a call does not say.

    Raises:
        ModelMismatchError: a head was trained on another model.
        InvalidInputError: the policy reads a difficulty, and there is no head.
        UnsupportedModelError: how the model thinks is not known.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        policy: Policy | str | Path = "slow",
        *,
        head: DifficultyHead | str | Path | None = None,
        thinking: ThinkingMode | None = None,
        targets: Mapping[str, Answering] | None = None,
        confidence: DifficultyHead | None = None,
        drift: DriftMonitor | None = None,
        options: SamplingOptions | None = None,
    ) -> None:
        self.engine = engine
        folder = None
        if not isinstance(policy, Policy):
            policy, folder = _found(str(policy))
        self.policy = policy
        if head is None and policy.head is not None:
            head = (folder or Path()) / policy.head
        self.head = DifficultyHead.load(head, engine.info) if isinstance(head, str | Path) else head
        if drift is None and policy.drift is not None and folder is not None:
            from kvroute.drift import DriftMonitor

            drift = DriftMonitor.load(folder / policy.drift, engine.info.fingerprint)
        self.drift = drift
        if policy.reads_difficulty and self.head is None:
            raise InvalidInputError(
                f"A {policy.kind} policy reads a difficulty, and there is no head.",
                hint="Pass head=, or train one: kvroute train.",
            )
        for given, target in ((self.head, "difficulty"), (confidence, "correct")):
            if given is not None:
                given.require(engine.info)
                if given.target != target:
                    raise InvalidInputError(f"A head with target {given.target!r} was given in place of {target!r}.")
        if policy.kind == "two-step" and self.head is not None and self.head.windows is None:
            raise InvalidInputError(
                "A two-step policy looks again in mid-answer, and the head has no part for that.",
                hint="Label with --checkpoints and train again, or use a one-step policy.",
            )
        self.targets = dict(targets or {})
        missing = [t for t in policy.targets if t not in ("fast", "slow") and t not in self.targets]
        if missing:
            raise InvalidInputError(
                f"The policy names the targets {missing}, which the router was not given.",
                hint="Pass targets={name: ...}.",
            )
        self.confidence = confidence
        self.thinking = thinking or ThinkingMode.of(engine)
        self.options = options
        self.phrases: dict[Mode, list[int]] = {m: self.thinking.phrase(engine, m) for m in ("fast", "slow")}
        self.closing = ClosingMark(engine, self.thinking.close)
        self.counts: Counter[str] = Counter()
        self._recent: deque[float] = deque(maxlen=policy.window)
        self._recent_slow: deque[bool] = deque(maxlen=policy.window)
        self._lock = threading.Lock()

    @classmethod
    def load(cls, engine: TransformersEngine, policy: str | Path, **kwargs: Any) -> Self:
        """A router from a policy's file or name, with the head and the drift reference that it names."""
        return cls(engine, policy, **kwargs)

    def __repr__(self) -> str:
        return f"Router({self.engine.info.name!r}, {self.policy.kind!r}, head={self.head!r})"

    # ------------------------------------------------------------------ deciding

    def decide(
        self,
        prompt: Prompt,
        *,
        mode: str | None = None,
        explain: bool = False,
        last: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Decision:
        """The choice alone: one prefill, which is left behind the deepest layer that the head reads.

        Args:
            prompt: a text, or the messages of a chat.
            mode: demand this one.
            explain: name the nearest labelled questions too.
            last: the mode of the conversation's last turn: it is left only beyond the policy's margin.
            template: further variables of the chat template, such as ``tools``.

        Raises:
            EmptyTextError, TextTooLongError, ChatTemplateError, InvalidInputError: before anything runs.
        """
        return self.decide_many([prompt], mode=mode, explain=explain, last=last, template=template)[0]

    def decide_many(
        self,
        prompts: Sequence[Prompt],
        *,
        mode: str | Sequence[str | None] | None = None,
        explain: bool = False,
        last: str | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> list[Decision]:
        """:meth:`decide` for many."""
        requests = self._requests(list(prompts), mode, last, template)
        bases = [r.layout.base for r in requests]
        self.engine.check_lengths(bases)
        vectors: list[Vectors | None] | None = None
        faults: list[str | None] = []
        began = time.perf_counter()
        head = self.head
        if self.policy.reads_difficulty and head is not None and requests:
            vectors, faults = self.each(
                "a prompt's features",
                len(bases),
                lambda rows: self.engine.pool([bases[i] for i in rows], [head.spec], progress=False)[0],
            )
        self.choose(requests, vectors, faults=faults, explain=explain, began=began)
        return [r.decision for r in requests]

    async def adecide(self, prompt: Prompt, **kwargs: Any) -> Decision:
        """:meth:`decide` in a thread."""
        return await asyncio.to_thread(lambda: self.decide(prompt, **kwargs))

    def each(
        self, what: str, count: int, work: Callable[[list[int]], Any], *, then: str | None = None
    ) -> tuple[list[Any], list[str | None]]:
        """What ``work`` gives for each of some rows: for all at once or, where that fails, for each alone.

        So a fault stays with its row; it is counted and logged.

        Returns:
            by row the result or None, and the fault in words or None.
        """
        rows = list(range(count))
        try:
            return _one_each(work(rows), count), [None] * count
        except Exception as error:  # noqa: BLE001 - an answer is worth more than a decision
            if count == 1:
                return [None], [self.note_fault(what, error, then=then)]
        found: list[Any] = [None] * count
        faults: list[str | None] = [None] * count
        last: Exception | None = None
        for i in rows:
            try:
                found[i] = _one_each(work([i]), 1)[0]
            except Exception as error:  # noqa: BLE001
                faults[i], last = fault_text(error), error
        if last is not None:
            self.note_fault(what, last, then=then, count=sum(f is not None for f in faults))
        return found, faults

    def choose(
        self,
        requests: Sequence[Request],
        vectors: Sequence[Vectors | None] | None,
        *,
        faults: Sequence[str | None] = (),
        explain: bool,
        began: float,
    ) -> None:
        """Fill in the decisions of requests.

        Args:
            requests: those to decide.
            vectors: by request its prompt's pooled vector ``[dim]``, or None where there is none; None altogether where
                the policy reads no difficulty.
            faults: by request why it has no vector.
            explain: name the nearest labelled questions.
            began: when the work on them did.
        """
        difficulties: list[float | None] = [None] * len(requests)
        probabilities: list[float | None] = [None] * len(requests)
        nearest: list[list[Neighbour] | None] = [None] * len(requests)
        reasons = [*faults] or [None] * len(requests)
        head = self.head
        if vectors is not None and head is not None:
            there = [i for i, v in enumerate(vectors) if v is not None]
            x = np.stack([v for v in vectors if v is not None]) if there else np.empty((0, 0), dtype=np.float32)
            if there:
                read, wrong = self.each("the head", len(there), lambda rows: finite(head.predict(x[rows])))
                for i, difficulty, reason in zip(there, read, wrong, strict=True):
                    difficulties[i], reasons[i] = None if difficulty is None else float(difficulty), reason
                self._watch([(d, x[n]) for n, d in enumerate(read) if d is not None])
            good = [n for n, i in enumerate(there) if difficulties[i] is not None]
            if good:
                values = np.array([difficulties[there[n]] for n in good])
                right, _ = self.each(
                    "the probability of a difficulty",
                    len(good),
                    lambda rows: finite(head.probability(values[rows])),
                    then="the decision has none",
                )
                near: list[Any] = [None] * len(good)
                if explain:
                    near, _ = self.each(
                        "the nearest questions",
                        len(good),
                        lambda rows: head.nearest(x[[good[n] for n in rows]]),
                        then="the decision names none",
                    )
                for n, p, k in zip(good, right, near, strict=True):
                    probabilities[there[n]], nearest[there[n]] = None if p is None else float(p), k
        for i, request in enumerate(requests):
            request.decision = self._decide(request, difficulties[i], reasons[i])
            request.decision.probability = probabilities[i]
            request.decision.nearest = nearest[i] or []
        seconds = (time.perf_counter() - began) / max(len(requests), 1)
        for request in requests:
            request.decision.seconds = seconds
            with self._lock:
                self.counts[f"mode:{request.decision.mode}"] += 1
            if request.decision.why == "shadow":
                d = request.decision
                logger.info("shadow: %s would be taken at difficulty %s", d.proposed, d.difficulty)

    def _decide(self, request: Request, difficulty: float | None, fault: str | None) -> Decision:
        policy = self.policy
        decision = Decision(mode=policy.fallback, difficulty=difficulty, policy=policy.kind)
        if request.forced is not None:
            decision.mode, decision.why = request.forced, "forced"
            return decision
        if policy.kind in ("fast", "slow"):
            decision.mode = policy.kind
        elif policy.kind == "random":
            decision.mode = "slow" if _uniform(request.layout.base, policy.seed) < policy.share else "fast"
        elif policy.kind == "length":
            decision.mode = "slow" if len(request.layout.base) > policy.length else "fast"
            decision.threshold = float(policy.length)
        elif difficulty is None:
            decision.why, decision.fault = "fault", fault or "no difficulty"
            return decision
        elif policy.kind == "budget":
            decision.mode, decision.threshold = self._within_budget(difficulty)
            decision.why = "budget"
        else:
            decision.mode, decision.threshold = policy.target_of(difficulty)
            decision.why = "difficulty"
            if request.last not in (None, decision.mode) and request.last in policy.targets_near(difficulty):
                decision.mode, decision.why = request.last, "margin"
        if policy.shadow:
            decision.proposed, decision.mode, decision.why = decision.mode, policy.fallback, "shadow"
        return decision

    def _within_budget(self, difficulty: float) -> tuple[Mode, float]:
        """Slow for the hardest ``share`` of the last ``window`` requests, and never for more than that."""
        policy = self.policy
        with self._lock:
            self._recent.append(difficulty)
            threshold = float(np.quantile(np.array(self._recent), 1 - policy.share))
            seen = len(self._recent)
            older = list(self._recent_slow)[-(policy.window - 1) :] if policy.window > 1 else []
            # Many may have the same difficulty: those at the threshold count, as far as the share goes.
            slow = difficulty >= threshold and sum(older) + 1 <= np.ceil(policy.share * seen)
            self._recent_slow.append(slow)
        return ("slow" if slow else "fast"), threshold

    # ------------------------------------------------------------------ answering

    @overload
    def generate(self, prompts: str | TokenIds, **kwargs: Any) -> Routed: ...
    @overload
    def generate(self, prompts: Sequence[Message], **kwargs: Any) -> Routed: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], **kwargs: Any) -> list[Routed]: ...
    def generate(
        self,
        prompts: Any,
        *,
        mode: str | Sequence[str | None] | None = None,
        explain: bool = False,
        last: str | None = None,
        features: Mapping[str, Any] | Sequence[Any] | str | None = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        progress: bool | None = None,
        template: Mapping[str, Any] | None = None,
        prefix: Any = None,
        keep_cache: bool = False,
        **sampling: Any,
    ) -> Routed | list[Routed]:
        """Decide, then answer, in one run over one cache.

        Args:
            prompts: a text, the messages of a chat, or a list of such; each decides for itself.
            mode: demand a mode, for all or one a prompt (None where the policy decides).
            explain: name the nearest labelled questions in the decisions.
            last: the mode of the conversation's last turn.
            features, options, cancel, progress, prefix, keep_cache, sampling: as in
                :meth:`kvroute.TransformersEngine.generate`.
            template: further variables of the chat template, such as ``tools``.

        Returns:
            a :class:`~kvroute.Routed` for one prompt, a list in their order for many.

        Raises:
            As the engine's ``generate``, before anything runs. A fault in head or features is no error: the policy's
            fallback is taken, and the decision says so.
        """
        listed, single = as_prompts(prompts)
        requests = self._requests(listed, mode, last, template)
        chosen = self._options(options, sampling)
        written = self.engine.generate(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=self._features(features),
            options=chosen,
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
            progress=False if single else progress,
        )
        routed = [
            self._elsewhere(r, p, chosen, cancel) if r.decision.mode in self.targets else self._routed(r, g)
            for r, g, p in zip(requests, written, listed, strict=True)
        ]
        return routed[0] if single else routed

    def stream(
        self,
        prompts: Any,
        *,
        mode: str | Sequence[str | None] | None = None,
        explain: bool = False,
        last: str | None = None,
        features: Mapping[str, Any] | Sequence[Any] | str | None = None,
        options: SamplingOptions | None = None,
        cancel: CancelToken | None = None,
        template: Mapping[str, Any] | None = None,
        prefix: Any = None,
        keep_cache: bool = False,
        **sampling: Any,
    ) -> Iterator[RoutedChunk]:
        """:meth:`generate`, piece by piece. The last piece of each answer carries the whole of it.

        Arguments are checked at the call; closing the iterator ends the work.
        """
        listed, _ = as_prompts(prompts)
        requests = self._requests(listed, mode, last, template)
        chosen = self._options(options, sampling)
        chunks = self.engine.stream(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=self._features(features),
            options=chosen,
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
        )
        return self._pieces(chunks, requests, listed, chosen, cancel)

    def _pieces(
        self,
        chunks: Iterator[Any],
        requests: list[Request],
        prompts: list[Prompt],
        options: SamplingOptions,
        cancel: CancelToken | None,
    ) -> Iterator[RoutedChunk]:
        count = [0] * len(requests)
        tail: list[list[int]] = [[] for _ in requests]
        thinking: list[bool | None] = [None] * len(requests)
        for chunk in chunks:
            i, token = chunk.index, chunk.token_id
            request = requests[i]
            if request.decision.mode in self.targets:
                routed = self._elsewhere(request, prompts[i], options, cancel)
                yield RoutedChunk(i, routed.text, None, "answer", False, routed)
                continue
            if thinking[i] is None:
                thinking[i] = request.decision.mode == "slow" and self.closing.exists
            switch = request.decision.switch
            forced = False
            if switch is not None and token is not None:
                forced = switch.token <= count[i] < switch.token + switch.forced
                if forced and count[i] == switch.token and switch.to == "slow":
                    thinking[i], tail[i] = self.closing.exists, []
            phase: Literal["thought", "answer"] = "thought" if thinking[i] else "answer"
            if token is not None:
                count[i] += 1
                tail[i] = [*tail[i], token][-self.closing.width :]
                if thinking[i] and self.closing.ends(tail[i]):
                    thinking[i] = False
            whole = None if chunk.generation is None else self._routed(request, chunk.generation)
            yield RoutedChunk(i, chunk.text, token, phase, forced, whole)

    async def agenerate(self, prompts: Any, **kwargs: Any) -> Routed | list[Routed]:
        """:meth:`generate` in a thread. Cancelling the task ends the work."""
        cancel = CancelToken(kwargs.pop("cancel", None))
        try:
            found: Routed | list[Routed] = await asyncio.to_thread(
                lambda: self.generate(prompts, cancel=cancel, **kwargs)
            )
        except asyncio.CancelledError:
            cancel.cancel()
            raise
        return found

    async def astream(self, prompts: Any, **kwargs: Any) -> AsyncIterator[RoutedChunk]:
        """:meth:`stream` in a thread. Leaving the loop or cancelling the task ends the work."""
        cancel = CancelToken(kwargs.pop("cancel", None))
        async for chunk in in_thread(self.stream(prompts, cancel=cancel, **kwargs), cancel):
            yield chunk

    @overload
    def best_of(self, prompts: str | TokenIds, n: int = 5, **options: Any) -> Voted: ...
    @overload
    def best_of(self, prompts: Sequence[Message], n: int = 5, **options: Any) -> Voted: ...
    @overload
    def best_of(self, prompts: Sequence[Prompt], n: int = 5, **options: Any) -> list[Voted]: ...
    def best_of(self, prompts: Any, n: int = 5, **options: Any) -> Voted | list[Voted]:
        """Answer n times out of one prefill, and let the answers vote: see :func:`kvroute.voting.best_of`."""
        from kvroute.voting import best_of

        return best_of(self, prompts, n, **options)

    async def abest_of(self, prompts: Any, n: int = 5, **options: Any) -> Voted | list[Voted]:
        """:meth:`best_of` in a thread. Cancelling the task ends the work."""
        cancel = CancelToken(options.pop("cancel", None))
        try:
            found: Voted | list[Voted] = await asyncio.to_thread(
                lambda: self.best_of(prompts, n, cancel=cancel, **options)
            )
        except asyncio.CancelledError:
            cancel.cancel()
            raise
        return found

    # ------------------------------------------------------------------ account

    def health(self) -> dict[str, Any]:
        """Counts of modes, switches and faults, and what the drift monitor says (None without one)."""
        report: DriftHealth | None = None if self.drift is None else self.drift.health()
        with self._lock:
            counts = dict(self.counts)
        return {
            "counts": counts,
            "faults": counts.get("faults", 0),
            "drift": None if report is None else report.model_dump(mode="json"),
        }

    def note_fault(self, what: str, error: Exception, *, then: str | None = None, count: int = 1) -> str:
        """Count a fault and log it in one line; returns it in words.

        Args:
            what: what could not be read.
            error: why.
            then: what is done about it; by default the fallback is taken.
            count: requests that it befell.
        """
        text = fault_text(error)
        with self._lock:
            self.counts["faults"] += count
        logger.warning(
            "kvroute could not read %s%s (%s): %s.",
            what,
            f" of {count} requests" if count > 1 else "",
            text,
            then or f"{self.policy.fallback} thinking is used",
        )
        return text

    def note_switch(self, by: int = 1) -> None:
        """Count a switch; or take it back, where its answer is written again."""
        with self._lock:
            self.counts["switches"] += by

    def _watch(self, seen: list[tuple[float, Vectors]]) -> None:
        if self.drift is None or not seen:
            return
        try:
            self.drift.update_many(np.array([d for d, _ in seen]), np.stack([v for _, v in seen]))
        except Exception as error:  # noqa: BLE001 - watching must not cost an answer
            self.note_fault("the drift reference", error, then="these requests are not watched")

    # ------------------------------------------------------------------ parts

    def _requests(
        self,
        prompts: list[Prompt],
        mode: str | Sequence[str | None] | None,
        last: str | None,
        template: Mapping[str, Any] | None = None,
    ) -> list[Request]:
        modes = [mode] * len(prompts) if mode is None or isinstance(mode, str) else list(mode)
        if len(modes) != len(prompts):
            raise InvalidInputError(f"{len(prompts)} prompts, and {len(modes)} modes.")
        for given in modes:
            if given not in (None, "fast", "slow", *self.targets):
                raise InvalidInputError(f"A mode is one of {['fast', 'slow', *self.targets]}, not {given!r}.")
        layouts = [self.thinking.layout(self.engine, p, template=template) for p in prompts]
        return [Request(layout, forced=m, last=last) for layout, m in zip(layouts, modes, strict=True)]

    def _features(self, features: Any) -> Any:
        if self.confidence is None:
            return features
        named = named_features(features)
        return {**named, _CONFIDENCE: AnswerPooling(self.confidence.spec)}

    def _options(self, options: SamplingOptions | None, sampling: dict[str, Any]) -> SamplingOptions:
        if options is not None and sampling:
            raise InvalidInputError(f"Give options or {sorted(sampling)}, not both.")
        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = (sampling["stop"],)
        if options is not None:
            return options
        if sampling:
            base = self.options.model_dump() if self.options else {}
            return SamplingOptions(**{**base, **sampling})
        return self.options or SamplingOptions()

    def _elsewhere(
        self, request: Request, prompt: Prompt, options: SamplingOptions, cancel: CancelToken | None
    ) -> Routed:
        """The answer of another target."""
        more = {} if cancel is None else {"cancel": cancel}
        found = self.targets[request.decision.mode].generate(prompt, options=options, **more)
        return _from_target(found, request.decision)

    def _ask_target(
        self, request: Request, prompts: Sequence[Prompt], options: SamplingOptions, cancel: CancelToken | None
    ) -> list[Routed]:
        """Another target's answers to prompts that share a decision."""
        more = {} if cancel is None else {"cancel": cancel}
        found = self.targets[request.decision.mode].generate(list(prompts), options=options, **more)
        return [_from_target(one, request.decision) for one in found]

    def _routed(self, request: Request, generation: Generation) -> Routed:
        if not request.decision.mode:
            undecided = "The work was cancelled before it was decided."
            request.decision = Decision(self.policy.fallback, why="fault", policy=self.policy.kind, fault=undecided)
        decision = request.decision
        confidence: float | None = None
        reason: str | None = None if self.confidence else "no confidence head was given"
        if self.confidence is not None:
            features, errors = dict(generation.features), dict(generation.feature_errors)
            vector, reason = features.pop(_CONFIDENCE, None), errors.pop(_CONFIDENCE, "the answer has no features")
            if vector is not None:
                try:
                    confidence, reason = float(finite(self.confidence.predict(vector[None]))[0]), None
                except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
                    reason = self.note_fault("an answer's confidence", error, then="it has none")
            generation = replace(generation, features=features, feature_errors=errors)
        ended: Mode = "slow" if request.mode == "slow" and not request.closed else "fast"
        thought, answer = self.thinking.split(generation.text, mode=ended)
        return Routed(generation.text, thought, answer, decision, generation, confidence, reason)


def _as_generation(found: Any) -> Generation:
    if isinstance(found, Routed):
        return found.generation
    if isinstance(found, Generation):
        return found
    raise InvalidInputError(f"A target answers with a Generation or a Routed, not {type(found).__name__}.")


def _from_target(found: Any, decision: Decision) -> Routed:
    """What another target answered, with the decision that sent the prompt there."""
    generation = _as_generation(found)
    if isinstance(found, Routed):
        return replace(found, decision=decision)
    return Routed(generation.text, "", generation.text, decision, generation, None, "another model wrote the answer")


def _found(policy: str) -> tuple[Policy, Path | None]:
    """A policy by kind, by file or by name; and the folder of its file."""
    if policy in get_args(PolicyKind):
        return Policy(kind=cast(PolicyKind, policy)), None
    path = policy_path(policy)
    return Policy.load(path), path.parent


def _one_each(found: Any, count: int) -> list[Any]:
    listed = list(found)
    if len(listed) != count:
        raise InvalidInputError(f"{count} rows gave {len(listed)} results.")
    return listed


def _uniform(ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that depends on a prompt's tokens and a seed alone."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56
