"""Confidences of the answers in any chain, agent or graph, collected as they come."""

# ruff: noqa: ARG002 - the arguments of LangChain's callbacks, needed or not

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypedDict
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, Generation, LLMResult
from langchain_core.tracers.context import register_configure_hook

from kvroute import InvalidInputError
from langchain_kvroute.evaluating import Asked, Evaluator, Verdict, check_threshold, judge

logger = logging.getLogger(__name__)

_MOST_RUNS = 10_000
_MOST_REASONS = 50
_OTHER = "other reasons"


@dataclass(frozen=True, slots=True)
class SelfEvaluationRecord:
    """One answer of a model.

    Attributes:
        run_id: of the model's run.
        parent_run_id: of the run that called it, or None.
        root_run_id: of the run that the user started.
        tags, metadata: of the model's run.
        model: its name, or None where nobody says it.
        tool_calls: how many tools it calls.
        confidence: probability in [0, 1] that it is right, or None.
        reason: why there is none.
        low: whether there is one, and it lies below the handler's threshold.
        difficulty: of the prompt, in [0, 100], higher is harder, or None.
        mode: ``fast`` or ``slow``, as it ended, or None.
        scores: by the names in :data:`kvroute.SCORES`, each ``{"value", "reason"}``.
        tokens: as in :class:`~langchain_kvroute.KVRouteMetadata`; ``evaluated``: those that an evaluator ran.
        faults: what went wrong on the way.
    """

    run_id: UUID
    parent_run_id: UUID | None
    root_run_id: UUID
    tags: tuple[str, ...]
    metadata: dict[str, Any]
    model: str | None
    tool_calls: int
    confidence: float | None
    reason: str | None
    low: bool
    difficulty: float | None = None
    mode: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, but for metadata that is not."""
        ids = {n: None if v is None else str(v) for n, v in asdict(self).items() if n.endswith("run_id")}
        return {**asdict(self), **ids, "tags": list(self.tags), "faults": list(self.faults)}


class SelfEvaluationSummary(TypedDict):
    """All answers that a handler saw."""

    answers: int
    with_confidence: int
    mean_confidence: float | None
    threshold: float | None
    low: int
    """Answers with a confidence below the threshold."""
    without: dict[str, int]
    """Answers without a confidence, by reason."""
    forgotten: int
    """Answers that are counted, and whose records made room for later ones."""
    faults: int
    """Exceptions of the hook, and of this handler, that were caught."""


@dataclass(frozen=True, slots=True)
class _Run:
    root: UUID
    metadata: dict[str, Any]
    asked: Asked | None


_watching: ContextVar[SelfEvaluationCallbackHandler | None] = ContextVar("kvroute_watching", default=None)
register_configure_hook(_watching, inheritable=True)
_outer: ContextVar[tuple[SelfEvaluationCallbackHandler | None, ...]] = ContextVar("kvroute_outer", default=())
"""Whose ``with`` the present one stands in; of each thread and task its own."""


class SelfEvaluationCallbackHandler(BaseCallbackHandler):
    """Collects how likely the answers of chat models are right, by run; never breaks a run.

    Pass it as a callback (``config={"callbacks": [handler]}``), or run things within ``with handler:``. It reads what
    :class:`~langchain_kvroute.ChatKVRoute` and kvroute inside a vLLM server say of their answers, which costs nothing.
    Thread-safe; works in sync and async runs.

    Args:
        threshold: a lower confidence is low, in [0, 1]; None where nothing is.
        on_low_confidence: called with the :class:`SelfEvaluationRecord` of each low answer, before the model's run
            ends, in the thread of the run (of async runs in a thread of its own). What it raises is caught, counted
            and logged.
        evaluator: for answers of models that say nothing: a :class:`kvroute.SelfEvaluator`, or what takes messages
            and answer and returns a probability. A ``SelfEvaluator`` runs each such prompt and answer through its own
            model once more, in the run's time.
        max_records: so many records are kept, the latest; counts go on.

    Raises:
        InvalidInputError: a threshold outside [0, 1], ``max_records`` below 1, a hook without threshold, or a hook that
            is a coroutine function, which nobody would await.
    """

    raise_error = False

    def __init__(
        self,
        *,
        threshold: float | None = None,
        on_low_confidence: Callable[[SelfEvaluationRecord], object] | None = None,
        evaluator: Evaluator | None = None,
        max_records: int = 10_000,
    ) -> None:
        super().__init__()
        if max_records < 1:
            raise InvalidInputError(f"At least one record is kept, not {max_records}.")
        if on_low_confidence is not None and threshold is None:
            raise InvalidInputError("A hook for low confidence needs a threshold.", hint="Pass threshold=0.5.")
        if inspect.iscoroutinefunction(on_low_confidence):
            raise InvalidInputError(
                "on_low_confidence is a coroutine function, and nobody would await it.",
                hint="Pass a plain function; asyncio.run_coroutine_threadsafe reaches a loop from it.",
            )
        self.threshold = None if threshold is None else check_threshold(threshold)
        self.on_low_confidence = on_low_confidence
        self.evaluator = evaluator
        self._records: deque[SelfEvaluationRecord] = deque(maxlen=max_records)
        self._runs: OrderedDict[UUID, _Run] = OrderedDict()
        self._without: Counter[str] = Counter()
        self._answers = self._with = self._low = self._faults = 0
        self._sum = 0.0
        self._lock = threading.Lock()

    @property
    def run_inline(self) -> bool:  # type: ignore[override]
        """Whether async runs call it in the event loop: what it does alone takes microseconds, a thread takes more."""
        return self.on_low_confidence is None and self.evaluator is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(threshold={self.threshold}, answers={self._answers}, low={self._low})"

    # ------------------------------------------------------------------ what was collected

    @property
    def records(self) -> list[SelfEvaluationRecord]:
        """Those that are kept, oldest first."""
        with self._lock:
            return list(self._records)

    @property
    def low(self) -> list[SelfEvaluationRecord]:
        """Those of them below the threshold."""
        return [r for r in self.records if r.low]

    def of_run(self, run_id: UUID | str) -> list[SelfEvaluationRecord]:
        """Those of one run: the model's own, the one that called it, or the one that the user started."""
        return [r for r in self.records if str(run_id) in (str(r.run_id), str(r.parent_run_id), str(r.root_run_id))]

    def summary(self) -> SelfEvaluationSummary:
        """Of all answers since the beginning, or since :meth:`clear`."""
        with self._lock:
            return {
                "answers": self._answers,
                "with_confidence": self._with,
                "mean_confidence": self._sum / self._with if self._with else None,
                "threshold": self.threshold,
                "low": self._low,
                "without": dict(self._without),
                "forgotten": self._answers - len(self._records),
                "faults": self._faults,
            }

    def clear(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._records.clear()
            self._without.clear()
            self._answers = self._with = self._low = self._faults = 0
            self._sum = 0.0

    # ------------------------------------------------------------------ around some code

    def __enter__(self) -> Self:
        """What runs within is collected, in this thread and task and in those begun from them. Within another
        handler's ``with``, the inner one alone collects."""
        _outer.set((*_outer.get(), _watching.get()))
        _watching.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        *outer, before = _outer.get()
        _outer.set(tuple(outer))
        _watching.set(before)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied chain goes on telling the one that the user holds

    # ------------------------------------------------------------------ LangChain's side

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **_: Any
    ) -> None:
        """Remember who called whom."""
        self._begin(run_id, parent_run_id)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **_: Any) -> None:
        """Forget it."""
        self._end(run_id)

    def on_tool_start(
        self, serialized: Any, input_str: str, *, run_id: UUID, parent_run_id: UUID | None = None, **_: Any
    ) -> None:
        """As a chain: a tool may ask a model."""
        self._begin(run_id, parent_run_id)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        """Forget it."""
        self._end(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Forget it."""
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """Forget it."""
        self._end(run_id)

    def on_chat_model_start(
        self,
        serialized: Any,
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Remember which model was asked, and with an evaluator what."""
        self._begin(run_id, parent_run_id, metadata, messages[0] if len(messages) == 1 else None)

    def on_llm_start(
        self,
        serialized: Any,
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        metadata: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """The same of a model that continues texts."""
        self._begin(run_id, parent_run_id, metadata, prompts[0] if len(prompts) == 1 else None)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        """An answer that did not come is not one without a confidence."""
        self._end(run_id)

    def on_llm_end(
        self,
        response: LLMResult,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        **_: Any,
    ) -> None:
        """Collect."""
        try:
            run = self._end(run_id) or _Run(parent_run_id or run_id, {}, None)
            evaluator = None if run.asked is None else self.evaluator
            for answer in (_message(g) for listed in response.generations for g in listed):
                verdict = judge(answer, run.asked or "", evaluator)
                record = SelfEvaluationRecord(
                    run_id=run_id,
                    parent_run_id=parent_run_id,
                    root_run_id=run.root,
                    tags=tuple(tags or ()),
                    metadata=run.metadata,
                    model=answer.response_metadata.get("model_name") or run.metadata.get("ls_model_name"),
                    tool_calls=len(answer.tool_calls),
                    low=self._is_low(verdict),
                    **{name: getattr(verdict, name) for name in Verdict.__slots__},
                )
                self._keep(record)
        except Exception as error:  # noqa: BLE001 - watching must not break what is watched
            self._fault("An answer could not be recorded", error)

    # ------------------------------------------------------------------ parts

    def _begin(
        self, run_id: UUID, parent: UUID | None, metadata: dict[str, Any] | None = None, asked: Asked | None = None
    ) -> None:
        with self._lock:
            above = self._runs.get(parent) if parent is not None else None
            root = above.root if above is not None else (parent or run_id)
            self._runs[run_id] = _Run(root, dict(metadata or {}), asked if self.evaluator is not None else None)
            while len(self._runs) > _MOST_RUNS:  # runs whose end was never told
                self._runs.popitem(last=False)

    def _end(self, run_id: UUID) -> _Run | None:
        with self._lock:
            return self._runs.pop(run_id, None)

    def _is_low(self, verdict: Verdict) -> bool:
        return verdict.confidence is not None and self.threshold is not None and verdict.confidence < self.threshold

    def _keep(self, record: SelfEvaluationRecord) -> None:
        with self._lock:
            self._records.append(record)
            self._answers += 1
            self._low += record.low
            if record.confidence is not None:
                self._with += 1
                self._sum += record.confidence
            else:
                reason = record.reason or _OTHER
                if reason not in self._without and len(self._without) >= _MOST_REASONS:
                    reason = _OTHER
                self._without[reason] += 1
        if record.low and self.on_low_confidence is not None:
            try:
                self.on_low_confidence(record)
            except Exception as error:  # noqa: BLE001 - the user's hook must not break the user's run
                self._fault("The hook for low confidence failed", error)

    def _fault(self, what: str, error: Exception) -> None:
        with self._lock:
            self._faults += 1
        logger.warning("%s (%s).", what, type(error).__name__)  # its words may hold the prompt


def _message(generation: Generation) -> AIMessage:
    if isinstance(generation, ChatGeneration) and isinstance(generation.message, AIMessage):
        return generation.message
    return AIMessage(content=generation.text, response_metadata=dict(generation.generation_info or {}))
