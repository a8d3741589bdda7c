"""The router: reads a prompt's difficulty from its KV cache, thinks or does not, and may switch once on the way."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload

import numpy as np

from kvroute.decisions import Decision, Routed, RoutedChunk
from kvroute.engines.threads import in_thread
from kvroute.errors import InvalidInputError
from kvroute.features import AnswerPooling
from kvroute.generation import CancelToken, Generation, Message, Prompt, SamplingOptions, TokenIds, as_prompts
from kvroute.heads.head import DifficultyHead
from kvroute.policy import Policy, policy_path
from kvroute.route_steering import Request, RouteSteer, fault_text
from kvroute.thinking import Mode, ThinkingMode

if TYPE_CHECKING:
    from kvroute.drift import DriftHealth, DriftMonitor
    from kvroute.engines.transformers_engine import TransformersEngine

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
        close = self.thinking.close
        self.close_ids = engine.tokenize_texts([close], special_tokens=False)[0] if close else []
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
        self, prompt: Prompt, *, mode: str | None = None, explain: bool = False, last: str | None = None
    ) -> Decision:
        """The choice alone: one prefill, which is left behind the deepest layer that the head reads.

        Args:
            prompt: a text, or the messages of a chat.
            mode: demand this one.
            explain: name the nearest labelled questions too.
            last: the mode of the conversation's last turn: it is left only beyond the policy's margin.
        """
        return self.decide_many([prompt], mode=mode, explain=explain, last=last)[0]

    def decide_many(
        self,
        prompts: Sequence[Prompt],
        *,
        mode: str | Sequence[str | None] | None = None,
        explain: bool = False,
        last: str | None = None,
    ) -> list[Decision]:
        """:meth:`decide` for many."""
        requests = self._requests(list(prompts), mode, last)
        vectors, fault = None, None
        began = time.perf_counter()
        if self.policy.reads_difficulty and self.head is not None and requests:
            try:
                vectors = self.engine.pool([r.layout.base for r in requests], [self.head.spec], progress=False)[0]
            except Exception as error:  # noqa: BLE001 - a choice is owed in any case
                fault = self.note_fault("the prompts' features", error)
        self.choose(requests, vectors, fault=fault, explain=explain, began=began)
        return [r.decision for r in requests]

    async def adecide(self, prompt: Prompt, **kwargs: Any) -> Decision:
        """:meth:`decide` in a thread."""
        return await asyncio.to_thread(lambda: self.decide(prompt, **kwargs))

    def choose(
        self, requests: Sequence[Request], vectors: Vectors | None, *, fault: str | None, explain: bool, began: float
    ) -> None:
        """Fill in the decisions of requests from their prompts' pooled vectors, ``[n, dim]`` or None."""
        difficulties: np.ndarray[Any, Any] | None = None
        probabilities: np.ndarray[Any, Any] | None = None
        if vectors is not None and self.head is not None:
            try:
                difficulties = self.head.predict(vectors)
                probabilities = self.head.probability(difficulties)
            except Exception as error:  # noqa: BLE001 - an answer is worth more than a decision
                fault = self.note_fault("the head", error)
                difficulties = None
        self._watch(difficulties, vectors)
        for i, request in enumerate(requests):
            difficulty = None if difficulties is None else float(difficulties[i])
            decision = self._decide(request, difficulty, fault)
            if probabilities is not None and difficulty is not None:
                decision.probability = float(probabilities[i])
            if explain and vectors is not None and self.head is not None and difficulty is not None:
                decision.nearest = self.head.nearest(vectors[i : i + 1])[0]
            request.decision = decision
        seconds = (time.perf_counter() - began) / max(len(requests), 1)
        for request in requests:
            request.decision.seconds = seconds
            self.counts[f"mode:{request.decision.mode}"] += 1
            if self.policy.shadow:
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
            if request.last is not None and request.last != decision.mode and policy.margin > 0:
                low, high = (policy.target_of(difficulty + sign * policy.margin)[0] for sign in (-1, 1))
                if request.last in (low, high):
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
            slow = difficulty > threshold or (policy.share == 1 and difficulty >= threshold)
            if slow and sum(older) + 1 > np.ceil(policy.share * seen):
                slow = False
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
        written = self.engine.generate(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=self._features(features),
            options=self._options(options, sampling),
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
            progress=False if single else progress,
        )
        chosen = self._options(options, sampling)
        routed = [
            self._routed(r, g) if r.decision.mode in ("fast", "slow") else self._elsewhere(r, p, chosen)
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
        chunks = self.engine.stream(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=self._features(features),
            options=self._options(options, sampling),
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
        )
        return self._pieces(chunks, requests, listed, self._options(options, sampling))

    def _pieces(
        self, chunks: Iterator[Any], requests: list[Request], prompts: list[Prompt], options: SamplingOptions
    ) -> Iterator[RoutedChunk]:
        count = [0] * len(requests)
        closing: list[list[int]] = [[] for _ in requests]
        thinking = [False] * len(requests)
        for chunk in chunks:
            i = chunk.index
            request = requests[i]
            switch = request.decision.switch
            if count[i] == 0:
                thinking[i] = request.decision.mode == "slow" and bool(self.close_ids)
            forced = False
            if switch is not None and switch.forced:
                forced = switch.token <= count[i] < switch.token + switch.forced
                if count[i] == switch.token and switch.to == "slow":
                    thinking[i], closing[i] = bool(self.close_ids), []
            phase: Literal["thought", "answer"] = "thought" if thinking[i] else "answer"
            if chunk.token_id is not None:
                count[i] += 1
                closing[i] = [*closing[i], chunk.token_id][-len(self.close_ids) or None :]
                if thinking[i] and closing[i] == self.close_ids:
                    thinking[i] = False
            routed = None
            if request.decision.mode not in ("fast", "slow"):
                routed = self._elsewhere(request, prompts[i], options)
                yield RoutedChunk(i, routed.text, None, "answer", False, routed)
                continue
            if chunk.generation is not None:
                routed = self._routed(request, chunk.generation)
            yield RoutedChunk(i, chunk.text, chunk.token_id, phase, forced, routed)

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

    # ------------------------------------------------------------------ account

    def health(self) -> dict[str, Any]:
        """Counts of modes, switches and faults, and what the drift monitor says (None without one)."""
        report: DriftHealth | None = None if self.drift is None else self.drift.health()
        return {
            "counts": dict(self.counts),
            "faults": self.counts["faults"],
            "drift": None if report is None else report.model_dump(mode="json"),
        }

    def note_fault(self, what: str, error: Exception) -> str:
        """Count a fault and log it in one line; returns it in words."""
        text = fault_text(error)
        with self._lock:
            self.counts["faults"] += 1
        logger.warning("kvroute could not read %s (%s): %s thinking is used.", what, text, self.policy.fallback)
        return text

    def note_switch(self) -> None:
        """Count a switch."""
        with self._lock:
            self.counts["switches"] += 1

    def _watch(self, difficulties: Any, vectors: Vectors | None) -> None:
        if self.drift is None or difficulties is None:
            return
        try:
            self.drift.update_many(difficulties, vectors)
        except Exception as error:  # noqa: BLE001 - watching must not cost an answer
            self.note_fault("the drift reference", error)

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
        if features is None:
            named: dict[str, Any] = {}
        elif isinstance(features, Mapping):
            named = dict(features)
        else:
            listed = [features] if isinstance(features, str) or not isinstance(features, Sequence) else list(features)
            named = {f if isinstance(f, str) else f"feature {i}": f for i, f in enumerate(listed)}
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

    def _elsewhere(self, request: Request, prompt: Prompt, options: SamplingOptions) -> Routed:
        """The answer of another target."""
        found = self.targets[request.decision.mode].generate(prompt, options=options)
        generation = _as_generation(found)
        if isinstance(found, Routed):
            return replace(found, decision=request.decision)
        return Routed(
            generation.text, "", generation.text, request.decision, generation, None, "another model wrote the answer"
        )

    def _routed(self, request: Request, generation: Generation) -> Routed:
        decision = request.decision
        confidence, reason = None, None if self.confidence else "no confidence head was given"
        if self.confidence is not None:
            features = dict(generation.features)
            vector = features.pop(_CONFIDENCE, None)
            if vector is None:
                reason = generation.feature_errors.get(_CONFIDENCE, "the answer has no features")
            else:
                try:
                    confidence = float(self.confidence.predict(vector[None])[0])
                except Exception as error:  # noqa: BLE001 - an answer is worth more than its confidence
                    reason = self.note_fault("the confidence", error)
            generation = replace(generation, features=features)
        ended: Mode = "slow" if request.mode == "slow" and not request.closed else "fast"
        thought, answer = self.thinking.split(generation.text, mode=ended)
        return Routed(generation.text, thought, answer, decision, generation, confidence, reason)


def _as_generation(found: Any) -> Generation:
    if isinstance(found, Routed):
        return found.generation
    if isinstance(found, Generation):
        return found
    raise InvalidInputError(f"A target answers with a Generation or a Routed, not {type(found).__name__}.")


def _found(policy: str) -> tuple[Policy, Path | None]:
    """A policy by kind, by file or by name; and the folder of its file."""
    if policy in ("fast", "slow"):
        return Policy(kind="fast" if policy == "fast" else "slow"), None
    path = policy_path(policy)
    return Policy.load(path), path.parent


def _uniform(ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) that depends on a prompt's tokens and a seed alone."""
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, ids))}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56
