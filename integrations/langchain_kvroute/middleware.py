"""What an agent does about an answer it is not sure of: note it, think again, ask another model, or ask a human."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self, cast, get_args

from kvroute import InvalidInputError, MissingExtraError

if find_spec("langchain") is None or find_spec("langgraph") is None:
    raise MissingExtraError("langchain", "langchain-agents")

from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ContextT,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    PrivateStateAttr,
    ResponseT,
    hook_config,
)
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langgraph.errors import GraphBubbleUp
from langgraph.types import Command

from langchain_kvroute.evaluating import (
    KEY,
    Attempt,
    Evaluator,
    SelfEvaluation,
    Verdict,
    ajudge,
    check_threshold,
    judge,
)
from langchain_kvroute.reviewing import ask_human

if TYPE_CHECKING:
    from langgraph.runtime import Runtime

logger = logging.getLogger(__name__)

Action = Literal["annotate", "retry", "escalate", "stop"]


class SelfEvaluationState(AgentState[ResponseT]):
    """State of an agent with the middleware."""

    kvroute_retries: NotRequired[Annotated[int, PrivateStateAttr]]
    """Further model calls in this run of the agent."""


class SelfEvaluationMiddleware(AgentMiddleware[SelfEvaluationState[ResponseT], ContextT, ResponseT]):
    """Looks at the confidence of an agent's answers, and acts where it is low.

    Final answers carry what was found in ``response_metadata["kvroute_self_evaluation"]`` (see
    :func:`~langchain_kvroute.self_evaluation`): all attempts with confidence, mode and tokens, and which one was kept.
    No fault of kvroute's, of the evaluator, of a retry or of the other model costs the first answer.

    Actions, one or several in the order in which they are tried:

    - ``annotate``: that alone.
    - ``retry``: the same model again with ``retry_settings``, by default thinking first, as
      :class:`~langchain_kvroute.ChatKVRoute` takes it.
    - ``escalate``: another model, ``escalate_to``.
    - ``stop``: what is low still is shown to a human: LangGraph's ``interrupt`` with a
      :class:`~langchain_kvroute.reviewing.LowConfidence`, resumed with ``Command(resume={"type": "approve"})``,
      ``{"type": "edit", "answer": ...}`` or ``{"type": "reject", "message": ...}``. The agent needs a checkpointer.

    Where tokens are streamed, those of answers that are not kept have been seen by then.

    Args:
        threshold: a lower confidence is low, in [0, 1].
        action: what is done about it.
        escalate_to: a chat model, or its name as ``init_chat_model`` takes it.
        retry_settings: put over the model's settings for a retry.
        max_retries: further model calls in one run of the agent, of ``retry`` and ``escalate`` together; by default one
            for each of them. The last of them is repeated while there are some left. They are counted in the state, so
            that a run that was stopped and goes on elsewhere does not begin anew.
        keep: of several answers the ``best``, which is the one with the highest confidence (a later one of an equal
            or without confidence is preferred), or the ``last``.
        missing: whether an answer without a confidence is left alone (``pass``) or counts as low (``act``).
        evaluate_tool_calls: whether steps that call tools are looked at too, before the tools run; by default final
            answers alone.
        evaluator: for models that say nothing of their confidence: a :class:`kvroute.SelfEvaluator`, which runs prompt
            and answer through its own model once more, or what takes messages and answer and returns a probability.

    Raises:
        InvalidInputError: arguments that make no sense, alone or together.
    """

    state_schema = SelfEvaluationState  # type: ignore[assignment]

    def __init__(
        self,
        *,
        threshold: float,
        action: Action | Sequence[Action] = "annotate",
        escalate_to: BaseChatModel | str | None = None,
        retry_settings: Mapping[str, Any] | None = None,
        max_retries: int | None = None,
        keep: Literal["best", "last"] = "best",
        missing: Literal["pass", "act"] = "pass",
        evaluate_tool_calls: bool = False,
        evaluator: Evaluator | None = None,
    ) -> None:
        super().__init__()
        self.threshold = check_threshold(threshold)
        self.actions: tuple[Action, ...] = (action,) if isinstance(action, str) else tuple(action)
        _check("action", self.actions, get_args(Action))
        _check("keep", (keep,), ("best", "last"))
        _check("missing", (missing,), ("pass", "act"))
        self.plan = tuple(a for a in self.actions if a in ("retry", "escalate"))
        if (escalate_to is None) == ("escalate" in self.plan):
            raise InvalidInputError(
                "The action 'escalate' and escalate_to, the model to escalate to, need one another.",
                hint="Give both, or none of them.",
            )
        if retry_settings is not None and "retry" not in self.plan:
            raise InvalidInputError("There are retry_settings, and the action is not 'retry'.")
        if max_retries is not None and (max_retries < 1 or not self.plan):
            raise InvalidInputError(
                f"max_retries bounds 'retry' and 'escalate' and is 1 or more, not {max_retries} for {self.actions}."
            )
        if isinstance(escalate_to, str):
            from langchain.chat_models import init_chat_model

            escalate_to = init_chat_model(escalate_to)
        self.escalate_to = escalate_to
        self.retry_settings = {"mode": "slow"} if retry_settings is None else dict(retry_settings)
        self.max_retries = len(self.plan) if max_retries is None else max_retries
        self.keep = keep
        self.missing = missing
        self.evaluate_tool_calls = evaluate_tool_calls
        self.evaluator = evaluator

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for shared in (self.escalate_to, self.evaluator):  # models: they are not to be there twice
            memo[id(shared)] = shared
        found = memo[id(self)] = type(self).__new__(type(self))
        found.__dict__.update(deepcopy(self.__dict__, memo))
        return found

    # ------------------------------------------------------------------ the agent's side

    def before_agent(
        self,
        state: SelfEvaluationState[ResponseT],
        runtime: Runtime[ContextT],  # noqa: ARG002
    ) -> dict[str, Any] | None:
        """A new run may retry anew. (A run that goes on from a checkpoint does not come by here.)"""
        return {"kvroute_retries": 0} if state.get("kvroute_retries") else None

    def wrap_model_call(
        self, request: ModelRequest[ContextT], handler: Callable[[ModelRequest[ContextT]], ModelResponse[ResponseT]]
    ) -> ModelResponse[ResponseT] | ExtendedModelResponse[ResponseT]:
        """Ask, judge, and ask again while the answer is low and retries are left."""
        step = _Step(self, request)
        answered: ModelResponse[ResponseT] | None = handler(request)
        while answered is not None:
            if (answer := step.to_judge(answered)) is not None:
                step.add(answered, judge(answer, step.asked, self.evaluator))
            answered = None
            while answered is None and (again := step.again()) is not None:
                try:
                    answered = handler(again)
                except GraphBubbleUp:
                    raise
                except Exception as error:  # noqa: BLE001 - there is an answer already
                    step.failed(error)
        return step.response()

    async def awrap_model_call(
        self,
        request: ModelRequest[ContextT],
        handler: Callable[[ModelRequest[ContextT]], Awaitable[ModelResponse[ResponseT]]],
    ) -> ModelResponse[ResponseT] | ExtendedModelResponse[ResponseT]:
        """The same."""
        step = _Step(self, request)
        answered: ModelResponse[ResponseT] | None = await handler(request)
        while answered is not None:
            if (answer := step.to_judge(answered)) is not None:
                step.add(answered, await ajudge(answer, step.asked, self.evaluator))
            answered = None
            while answered is None and (again := step.again()) is not None:
                try:
                    answered = await handler(again)
                except GraphBubbleUp:
                    raise
                except Exception as error:  # noqa: BLE001 - there is an answer already
                    step.failed(error)
        return step.response()

    @hook_config(can_jump_to=["model"])
    def after_model(
        self,
        state: SelfEvaluationState[ResponseT],
        runtime: Runtime[ContextT],  # noqa: ARG002
    ) -> dict[str, Any] | None:
        """With ``stop``, ask a human about an answer that is low."""
        return ask_human(state) if "stop" in self.actions else None

    @hook_config(can_jump_to=["model"])
    async def aafter_model(
        self, state: SelfEvaluationState[ResponseT], runtime: Runtime[ContextT]
    ) -> dict[str, Any] | None:
        """The same."""
        return self.after_model(state, runtime)


class _Step:
    """One step of an agent: the answers given to it, and which of them is kept."""

    def __init__(self, rules: SelfEvaluationMiddleware[Any, Any], request: ModelRequest[Any]) -> None:
        self.rules = rules
        self.request = request
        self.asked: list[BaseMessage] = [
            *([request.system_message] if request.system_message is not None else []),
            *request.messages,
        ]
        self.before = self.used = int(cast("dict[str, Any]", request.state).get("kvroute_retries") or 0)
        self.action = "first"
        self.attempts: list[Attempt] = []
        self.kept = 0
        self.answer: AIMessage | None = None
        self.best: ModelResponse[Any] | None = None
        self.verdict: Verdict | None = None
        self.tried = 0

    def to_judge(self, answered: ModelResponse[Any]) -> AIMessage | None:
        """What there is to judge. What is not judged is kept as it is, and ends the step."""
        answer = next((m for m in reversed(answered.result) if isinstance(m, AIMessage)), None)
        final = answer is not None and (answered.structured_response is not None or not answer.tool_calls)
        if answer is None or not (final or self.rules.evaluate_tool_calls):
            self._note(answer, Verdict(None, "a call of tools is not evaluated"))
            self._keep(answered, answer, None)
            return None
        return answer

    def add(self, answered: ModelResponse[Any], verdict: Verdict) -> None:
        """An answer that was judged."""
        answer = next(m for m in reversed(answered.result) if isinstance(m, AIMessage))
        self._note(answer, verdict)
        worse = (
            self.rules.keep == "best"
            and self.verdict is not None
            and self.verdict.confidence is not None
            and verdict.confidence is not None
            and verdict.confidence < self.verdict.confidence
        )
        if not worse:
            self._keep(answered, answer, verdict)

    def failed(self, error: Exception) -> None:
        """A further call brought no answer."""
        logger.warning("The %s of an answer failed (%s); the answer stands.", self.action, type(error).__name__)
        self._note(None, Verdict(None, "no answer came"), type(error).__name__)

    def again(self) -> ModelRequest[Any] | None:
        """The next request, or None where there is nothing more to do."""
        plan = self.rules.plan
        if not self.low or not plan or self.used >= self.rules.max_retries:
            return None
        self.action = plan[min(self.tried, len(plan) - 1)]
        self.tried += 1
        self.used += 1
        if self.action == "escalate":
            return self.request.override(model=cast("BaseChatModel", self.rules.escalate_to))
        return self.request.override(model_settings={**self.request.model_settings, **self.rules.retry_settings})

    @property
    def low(self) -> bool:
        """Whether something is to be done about the answer that is kept."""
        if self.verdict is None:
            return False
        if self.verdict.confidence is None:
            return self.rules.missing == "act"
        return self.verdict.confidence < self.rules.threshold

    def response(self) -> ModelResponse[Any] | ExtendedModelResponse[Any]:
        """The answer that is kept, and the count of retries for the state."""
        assert self.best is not None
        found = self.best
        if self.answer is not None and (self.verdict is not None or len(self.attempts) > 1):
            noted = _noted(self.answer, self._evaluation())
            found = replace(found, result=[noted if m is self.answer else m for m in found.result])
        if self.used == self.before:
            return found
        return ExtendedModelResponse(model_response=found, command=Command(update={"kvroute_retries": self.used}))

    def _evaluation(self) -> SelfEvaluation:
        return {
            "confidence": None if self.verdict is None else self.verdict.confidence,
            "reason": self.attempts[self.kept]["reason"],
            "threshold": self.rules.threshold,
            "low": self.low,
            "kept": self.kept,
            "attempts": self.attempts,
            "review": None,
        }

    def _note(self, answer: AIMessage | None, verdict: Verdict, fault: str | None = None) -> None:
        self.attempts.append(
            {
                "action": self.action,
                "confidence": verdict.confidence,
                "reason": verdict.reason,
                "mode": verdict.mode,
                "model": None if answer is None else answer.response_metadata.get("model_name"),
                "tokens": verdict.tokens,
                "tool_calls": 0 if answer is None else len(answer.tool_calls),
                "fault": fault,
            }
        )

    def _keep(self, answered: ModelResponse[Any], answer: AIMessage | None, verdict: Verdict | None) -> None:
        self.best, self.answer, self.verdict = answered, answer, verdict
        self.kept = len(self.attempts) - 1


def _noted(answer: AIMessage, found: SelfEvaluation) -> AIMessage:
    return answer.model_copy(update={"response_metadata": {**answer.response_metadata, KEY: found}})


def _check(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    if not given or not set(given) <= set(known) or len(set(given)) != len(given):
        raise InvalidInputError(f"{name} is of {', '.join(map(repr, known))}, each once, not {given}.")
