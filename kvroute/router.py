"""The router: reads a prompt's difficulty from its KV cache, thinks or does not, and may switch once on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast, overload

from kvroute.choosing import Chooser
from kvroute.decisions import Decision, Routed, RoutedChunk
from kvroute.engines.base import decides_inside
from kvroute.engines.threads import call_in_thread, in_thread
from kvroute.errors import InvalidInputError
from kvroute.generation import CancelToken, Message, Prompt, SamplingOptions, TokenIds, as_prompts
from kvroute.heads.head import DifficultyHead
from kvroute.policy import Policy, find_policy
from kvroute.prefilling import Prefilled, head_vectors, prefill
from kvroute.route_steering import ClosingMark, Request, RouteSteer
from kvroute.routed_answers import routed_answer, target_answer, with_confidence
from kvroute.routed_stream import routed_pieces
from kvroute.router_parts import Answering, check_parts, prompt_requests
from kvroute.served_policy import EnginePolicy, refuse, served_thinking
from kvroute.served_routing import served_answers, served_decisions, served_pieces
from kvroute.thinking import Mode, ThinkingMode

if TYPE_CHECKING:
    from kvroute.drift import DriftHealth, DriftMonitor
    from kvroute.engines.steering import Vectors
    from kvroute.engines.transformers_engine import TransformersEngine
    from kvroute.serving.vllm_base import VLLMBase
    from kvroute.voting import Voted


class Router(Chooser):
    """Decides for each request how hard to think, from the forward pass that happens anyway.

    The prompt's K and V give the difficulty before the first token; the mode's tokens follow in the same cache. With a
    two-step policy the difficulty is taken again at checkpoints, and the mode may change once, in flight
    (docs/concepts.md; arXiv 2601.20326, section 4.2). Thread-safe.

    Args:
        engine: the model. :class:`~kvroute.VLLMEngine` and :class:`~kvroute.VLLMClient` decide inside the engine, by
            policies that it has loaded.
        policy: what is done with a difficulty; a :class:`~kvroute.Policy`, one of its kinds by name, the path of its
            ``.json`` file, or its name in the folder ``KVROUTE_POLICIES``.
        head: the trained head; by default the one that the policy's file names.
        thinking: how the model thinks; by default read from its chat template.
        targets: further models by the names that the policy's ``targets`` use; each a router or an engine. A prompt
            that goes to one of them costs its prefill here and is answered there.
        confidence: a head trained with ``target="correct"``: every answer then carries its confidence. Over vLLM also
            the name of one that the engine has loaded.
        drift: watches whether live requests look like the calibration rows; by default the policy file's.
        options: how answers are written, where a call does not say.

    Raises:
        ModelMismatchError: a head was trained on another model.
        InvalidInputError: the policy reads a difficulty, and there is no head.
        UnsupportedModelError: how the model thinks is not known.
    """

    def __init__(
        self,
        engine: TransformersEngine | VLLMBase,
        policy: Policy | str | Path = "slow",
        *,
        head: DifficultyHead | str | Path | None = None,
        thinking: ThinkingMode | None = None,
        targets: Mapping[str, Answering] | None = None,
        confidence: DifficultyHead | str | None = None,
        drift: DriftMonitor | None = None,
        options: SamplingOptions | None = None,
    ) -> None:
        self.engine: TransformersEngine = cast(Any, engine)
        self.served_confidence: str | None = None
        if isinstance(confidence, str):
            if not decides_inside(engine):
                raise InvalidInputError(
                    f"The confidence {confidence!r} is a name, and only vLLM's engines have heads by name.",
                    hint="Pass confidence=DifficultyHead.load(FOLDER).",
                )
            self.served_confidence, confidence = confidence, None
        self.served: EnginePolicy | None = None
        folder = None
        if decides_inside(engine):
            refuse(head=head, targets=targets, drift=drift)
            self.served = EnginePolicy.of(cast(Any, engine), policy)
            policy = self.served.policy
        elif not isinstance(policy, Policy):
            policy, folder = find_policy(str(policy))
        if head is None and policy.head is not None and self.served is None:
            head = (folder or Path()) / policy.head
        if isinstance(head, str | Path):
            head = DifficultyHead.load(head, engine.info)
        if drift is None and policy.drift is not None and folder is not None:
            from kvroute.drift import DriftMonitor

            drift = DriftMonitor.load(folder / policy.drift, engine.info.fingerprint)
        super().__init__(policy, head, drift)
        self.targets = dict(targets or {})
        check_parts(policy, self.head, confidence, self.targets, engine, inside=self.served is not None)
        self.confidence = confidence
        if self.served is not None:
            self.thinking = served_thinking(cast(Any, engine), thinking, self.served)
        else:
            self.thinking = thinking or ThinkingMode.of(engine)
        self.options = options
        self.phrases: dict[Mode, list[int]] = {m: self.thinking.phrase(engine, m) for m in ("fast", "slow")}
        self.closing = ClosingMark(engine, self.thinking.close)

    @classmethod
    def load(cls, engine: TransformersEngine | VLLMBase, policy: str | Path, **kwargs: Any) -> Self:
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
        if self.served is not None:
            refuse(explain=explain, last=last)
            return served_decisions(self, requests)
        self.engine.check_lengths([r.layout.base for r in requests])
        vectors: list[Vectors | None] | None = None
        faults: list[str | None] = []
        began = time.perf_counter()
        head = self.head
        if self.policy.reads_difficulty and head is not None and requests:
            vectors, faults = head_vectors(self, head, requests)
        self.choose(requests, vectors, faults=faults, explain=explain, began=began)
        return [r.decision for r in requests]

    async def adecide(self, prompt: Prompt, **kwargs: Any) -> Decision:
        """:meth:`decide` in a thread."""
        return await asyncio.to_thread(lambda: self.decide(prompt, **kwargs))

    def prefill(
        self,
        prompt: Prompt,
        *,
        mode: str | None = None,
        last: str | None = None,
        template: Mapping[str, Any] | None = None,
        prefix: Any = None,
    ) -> Prefilled:
        """:meth:`decide`, with the prompt's cache kept for what answers it: all layers are run, and no token twice.

        Args:
            prompt, mode, last, template: as in :meth:`decide`.
            prefix: a cache that the prompt may continue.

        Raises:
            As :meth:`decide`.
        """
        requests = self._requests([prompt], mode, last, template)
        if self.served is not None:
            refuse(last=last, prefix=prefix)
        return prefill(self, requests, prefix=prefix)[0]

    def prefill_many(
        self,
        prompts: Sequence[Prompt],
        *,
        mode: str | Sequence[str | None] | None = None,
        last: str | None = None,
        template: Mapping[str, Any] | None = None,
        keep: bool = True,
    ) -> list[Prefilled]:
        """:meth:`prefill` for many, in one run.

        Args:
            prompts, mode, last, template: as in :meth:`decide_many`.
            keep: keep the caches. Otherwise it is what :meth:`decide_many` does, told with its tokens; nothing is run
                for a prompt whose mode is demanded.

        Raises:
            As :meth:`decide`.
        """
        requests = self._requests(list(prompts), mode, last, template)
        if self.served is not None:
            refuse(last=last)
        return prefill(self, requests, keep=keep)

    async def aprefill(self, prompt: Prompt, **kwargs: Any) -> Prefilled:
        """:meth:`prefill` in a thread."""
        return await asyncio.to_thread(lambda: self.prefill(prompt, **kwargs))

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
        if self.served is not None:
            refuse(explain=explain, last=last, prefix=prefix)
            show = False if single else progress
            found = served_answers(self, requests, chosen, features=features, cancel=cancel, progress=show)
            return found[0] if single else found
        written = self.engine.generate(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=with_confidence(self, features),
            options=chosen,
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
            progress=False if single else progress,
        )
        routed = [
            target_answer(self, r, p, chosen, cancel) if r.decision.mode in self.targets else routed_answer(self, r, g)
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
        if self.served is not None:
            refuse(explain=explain, last=last, prefix=prefix)
            return served_pieces(self, requests, chosen, features=features, cancel=cancel)
        chunks = self.engine.stream(
            [TokenIds(tuple(r.layout.base)) for r in requests],
            features=with_confidence(self, features),
            options=chosen,
            prefix=prefix,
            keep_cache=keep_cache,
            steer=RouteSteer(self, requests, explain=explain),
            cancel=cancel,
        )
        return routed_pieces(self, chunks, requests, listed, chosen, cancel)

    async def agenerate(self, prompts: Any, **kwargs: Any) -> Routed | list[Routed]:
        """:meth:`generate` in a thread. Cancelling the task ends the work."""
        found: Routed | list[Routed] = await call_in_thread(lambda **how: self.generate(prompts, **how), kwargs)
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

        if self.served is not None:
            raise InvalidInputError("vLLM can't vote in one run.", hint="Use TransformersEngine for best_of.")
        return best_of(self, prompts, n, **options)

    async def abest_of(self, prompts: Any, n: int = 5, **options: Any) -> Voted | list[Voted]:
        """:meth:`best_of` in a thread. Cancelling the task ends the work."""
        found: Voted | list[Voted] = await call_in_thread(lambda **how: self.best_of(prompts, n, **how), options)
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

    # ------------------------------------------------------------------ parts

    def _requests(
        self,
        prompts: list[Prompt],
        mode: str | Sequence[str | None] | None,
        last: str | None,
        template: Mapping[str, Any] | None = None,
    ) -> list[Request]:
        return prompt_requests(self, prompts, mode, last, template)

    def _options(self, options: SamplingOptions | None, sampling: Mapping[str, Any]) -> SamplingOptions:
        return SamplingOptions.chosen(options, sampling, self.options)
