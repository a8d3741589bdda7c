"""A decision model for LangChain's ``decisions``: local and free. It knows one question: how hard a prompt is.

Needs langchain-core 1.8 or newer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import ConfigDict, Field, PrivateAttr, model_validator

from kvroute import Decision, InvalidInputError, KVRouteError, MissingExtraError, Usage
from langchain_kvroute.branch_choice import fault_text, warn_once
from langchain_kvroute.messages import template_messages
from langchain_kvroute.rendering import as_messages
from langchain_kvroute.router_fields import RouterFields
from langchain_kvroute.router_handle import RouterHandle
from langchain_kvroute.templates import has_tokenizer

try:
    from langchain_core.decisions import (
        BaseDecisionModel,
        Choice,
        ChoiceAnswer,
        ClassifierResponse,
        Noul,
        NoulAnswer,
        Question,
        Score,
        ScoreAnswer,
        State,
    )
except ImportError as error:
    raise MissingExtraError(
        "langchain-core>=1.8 (for langchain_core.decisions)",
        "langchain",
        hint="Install it with: pip install 'kvroute[langchain]' 'langchain-core>=1.8'",
    ) from error

from langchain_core.messages import BaseMessage, UsageMetadata, convert_to_openai_messages
from langchain_core.messages.ai import InputTokenDetails


class KVRouteDecisionModel(RouterFields, BaseDecisionModel):
    """Answers typed questions by the difficulty of the state, read from the KV cache of one prefill.

    The words of a question are not read: all of them ask how hard the state is.

    - ``Choice``: the label of the mode (or target) that the policy takes. The easiest label has the probability that
      the fast answer is right, the chosen one the rest; where the easiest is chosen, the others share the rest. A
      policy weighs cost, so it may choose a label that is not the likeliest. ``confidence`` is the chosen label's
      probability.
    - ``Noul``: the probability that thinking is needed, which is that the fast answer is wrong.
    - ``Score``: the difficulty's place on the rubric, whose first level is the easiest. ``probabilities`` lie on the
      two levels beside it; ``confidence`` is the larger.

    The probability comes from the head's calibration; without one, difficulty / 100 stands for "thinking is needed".
    Where the difficulty can't be read, a ``Choice`` takes the policy's fallback with equal probabilities, and other
    questions raise. ``usage`` is what the prefill cost.

    A state is a text, messages, or JSON, which is read as a text.

    Args:
        fields: as below.

    Raises:
        pydantic.ValidationError: the fields do not fit together.
    """

    model: str = ""
    """As in other models of kvroute's; with a router, the name that traces show."""
    labels: dict[str, str] = Field(default_factory=dict)
    """From a label of a ``Choice`` to ``fast``, ``slow`` or another target of the policy; labels with such names need
    no entry."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    _handle: RouterHandle = PrivateAttr()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        further = sorted(set(self.labels.values()) - {"fast", "slow"})
        self._handle = self._router_handle(further)
        if self.router is not None and not self.model:
            inside = bool(getattr(self.router.engine, "decides_inside", False))  # a server is not asked here
            self.__dict__["model"] = "vLLM" if inside else str(self.router.engine.info.name)
        return self

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """It is; one with a live router can be dumped, and not be loaded."""
        return True

    @property
    def _provider(self) -> str:
        return "kvroute"

    def _classify(self, state: State, questions: dict[str, Question]) -> ClassifierResponse:
        asked: dict[str, Choice | Noul | Score] = {}
        for name, question in questions.items():
            if not isinstance(question, Choice | Noul | Score):
                raise InvalidInputError(
                    f"Question {name!r} is a {type(question).__name__}, and kvroute finds nothing in an image.",
                    hint="Ask a Choice, a Noul or a Score.",
                )
            asked[name] = question
        decision, usage, targets = self._decided(state)
        answers = {name: self._answer(name, question, decision, targets) for name, question in asked.items()}
        return ClassifierResponse(model=self.model or "vLLM", answers=answers, usage=_usage(usage))

    def _decided(self, state: State) -> tuple[Decision, Usage | None, tuple[str, ...]]:
        """The decision, what it cost, and the policy's targets, easiest first."""
        targets: tuple[str, ...] = ("fast", "slow")
        fallback = "slow"
        try:
            router = self._handle.get()
            policy, engine = router.policy, router.engine
            targets, fallback = policy.targets, policy.fallback
            chat = template_messages(_messages(state), arguments_as_text=not has_tokenizer(engine))
            [found] = router.prefill_many([chat], keep=False)
        except Exception as error:  # noqa: BLE001 - a Choice has a fallback
            warn_once("no decision, so the fallback is taken", error)
            return Decision(fallback, why="fault", fault=fault_text(error)), None, targets
        return found.decision, found.usage, targets

    def _answer(
        self, name: str, question: Choice | Noul | Score, decision: Decision, targets: tuple[str, ...]
    ) -> ChoiceAnswer | NoulAnswer | ScoreAnswer:
        if isinstance(question, Choice):
            return self._choice(name, question, decision, targets)
        if decision.difficulty is None:
            raise KVRouteError(
                f"Question {name!r} has no answer: {decision.fault or 'the policy reads no difficulty'}.",
                hint="A Noul or a Score needs a policy that reads the difficulty.",
            )
        if isinstance(question, Noul):
            return NoulAnswer(type="noul", noul=_needs_thinking(decision))
        last = len(question.criteria) - 1
        place = min(max(decision.difficulty / 100, 0.0), 1.0) * last
        low = min(int(place), last - 1)
        spread = dict.fromkeys(range(last + 1), 0.0) | {low: 1 - (place - low), low + 1: place - low}
        legend = dict(enumerate(question.criteria))
        return ScoreAnswer(
            type="score", score=place, legend=legend, probabilities=spread, confidence=max(spread.values())
        )

    def _choice(self, name: str, question: Choice, decision: Decision, targets: tuple[str, ...]) -> ChoiceAnswer:
        labels = list(question.criteria)
        label_of: dict[str, str] = {}
        for label in labels:
            target = self.labels.get(label, label)
            if target in label_of or target not in {*targets, "fast", "slow"}:
                raise InvalidInputError(
                    f"Question {name!r}: the label {label!r} stands for {target!r}; each label stands for one of "
                    f"{list(targets)}.",
                    hint="Pass labels={label: 'fast', ...}.",
                )
            label_of[target] = label
        missing = [t for t in {*targets, decision.mode} if t not in label_of]
        if missing:
            raise InvalidInputError(
                f"Question {name!r} has no label for {sorted(missing)}.", hint="Pass labels={label: 'fast', ...}."
            )
        chosen = label_of[decision.mode]
        if decision.difficulty is None:  # a fault, or a policy that reads none
            sure = decision.why != "fault"
            spread = {label: float(label == chosen) if sure else 1 / len(labels) for label in labels}
        else:
            easiest, hard = label_of[targets[0]], _needs_thinking(decision)
            others = [label for label in labels if label != easiest]
            rest = [chosen] if chosen != easiest else others
            spread = {label: hard / len(rest) if label in rest else 0.0 for label in others} | {easiest: 1 - hard}
            spread = {label: spread[label] for label in labels}
        return ChoiceAnswer(type="choice", choice=chosen, probabilities=spread, confidence=spread[chosen])


def _needs_thinking(decision: Decision) -> float:
    """Probability in [0, 1] that the fast answer is wrong."""
    if decision.probability is not None:
        return min(max(1 - decision.probability, 0.0), 1.0)
    assert decision.difficulty is not None
    return min(max(decision.difficulty / 100, 0.0), 1.0)


def _messages(state: State) -> list[BaseMessage]:
    """A state as a chat: messages as they are, JSON as the text of one message."""
    if isinstance(state, Sequence) and not isinstance(state, str):
        as_it_is = bool(state) and all(isinstance(m, BaseMessage) for m in state)
    else:
        as_it_is = isinstance(state, str | BaseMessage)
    text = state if as_it_is else json.dumps(state, ensure_ascii=False, default=_plain)
    messages = as_messages(text, text=False)
    assert not isinstance(messages, str)
    return messages


def _plain(value: Any) -> Any:
    if isinstance(value, BaseMessage):
        return convert_to_openai_messages([value])[0]
    return dict(value) if isinstance(value, Mapping) else list(value)


def _usage(usage: Usage | None) -> UsageMetadata | None:
    if usage is None:
        return None
    return UsageMetadata(
        input_tokens=usage.computed,
        output_tokens=usage.generated,
        total_tokens=usage.computed + usage.generated,
        input_token_details=InputTokenDetails(cache_read=usage.cached),
    )
